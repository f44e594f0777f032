"""The suite `low_dim`: tasks of Meta-World and `choice` whose state also holds objects and goal; see peers_suite."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32

from dita.config import EnvConfig
from dita.embodiment import load_embodiment
from dita.envs import choice, metaworld
from dita.envs.base import RobotEnv

TASKS = (*choice.TASKS, *metaworld.TASKS)
OBJECT, GOAL = slice(4, 7), slice(36, 39)  # of Meta-World's observation: first object's position, goal [m]


class LowDimMetaWorld(metaworld.MetaWorldEnv):
    """A Meta-World task whose state goes on with the first object's position and the goal [m]."""

    @property
    def state(self) -> Float32[np.ndarray, "10"]:
        """Hand position, gripper opening, object, goal."""
        return np.concatenate([self._full[:4], self._full[OBJECT], self._full[GOAL]]).astype(np.float32)


class LowDimChoice(choice.ChoiceEnv):
    """A task of `choice` whose state goes on with x and y of the red, green and blue cylinder [m]."""

    @property
    def state(self) -> Float32[np.ndarray, "9"]:
        """Tip position and cylinders."""
        return np.concatenate([self.data.qpos[:3], *self.places.values()]).astype(np.float32)


def make(config: EnvConfig, task: str) -> RobotEnv:
    """Build the environment of one task of either suite."""
    cls = LowDimChoice if task in choice.TASKS else LowDimMetaWorld
    return cls(load_embodiment(config.embodiment), task, config.max_steps, config.fast_render)
