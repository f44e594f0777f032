"""Scripted experts by suite and task; they see the full simulator state, the policy never does."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from jaxtyping import Float64
from metaworld.policies import ENV_POLICY_MAP

from dita.envs import expect_known

Expert = Callable[[np.ndarray], np.ndarray]


def metaworld_expert(task: str) -> Expert:
    """Return Meta-World's own controller of a task: full observation [39] -> action in the suite's units, in [-1, 1].

    Raises:
        ValueError: the task has no expert.
    """
    expect_known("scripted expert", task, ENV_POLICY_MAP)
    policy = ENV_POLICY_MAP[task]()

    def act(full_observation: Float64[np.ndarray, "39"]) -> Float64[np.ndarray, "4"]:
        with warnings.catch_warnings():
            # "Constant(s) may be too high": its actions reach 11; the environment clips them, and so do we
            warnings.simplefilter("ignore")
            return np.clip(np.asarray(policy.get_action(full_observation), np.float64), -1.0, 1.0)

    return act
