"""Simulated suites behind one interface; nothing here imports mujoco until an environment is made."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

from dita.config import EnvConfig
from dita.envs import gl

if TYPE_CHECKING:
    from dita.envs.base import RobotEnv

# suite -> the module that holds `make(config, task) -> RobotEnv` and `TASKS`
SUITES = {"metaworld": "dita.envs.metaworld"}


def make(config: EnvConfig, task: str) -> RobotEnv:
    """Build the environment of one task.

    Raises:
        ValueError: unknown suite, task or embodiment (with what exists), or no OpenGL backend works.
    """
    if config.suite not in SUITES:
        raise ValueError(f"unknown suite {config.suite!r}; {suggest(config.suite, SUITES)}")
    gl.select_backend()
    try:
        module = importlib.import_module(SUITES[config.suite])
    except ModuleNotFoundError as e:
        raise ValueError(f"suite {config.suite} needs the package {e.name}: pip install 'dita[sim-core]'") from None
    return module.make(config, task)


def suggest(name: str, known: Iterable[str]) -> str:
    """Say which names exist, the nearest ones first."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(near)}? All: {', '.join(names)}" if near else f"there are: {', '.join(names)}"
