# mujoco and gymnasium-robotics ship no types for what is used here
# pyright: reportAttributeAccessIssue=false
"""Fetch (Plappert et al., arXiv 1802.09464; gymnasium-robotics 1.4.2): a gripper pulled by a mocap body at 25 Hz.

Positions are relative to Fetch's base on the floor. A step adds to where the tool is, not to what was last commanded.
Farama reads positions that are one physics step of 2 ms older than the state; here they are the state's own.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

import mujoco
import numpy as np
from jaxtyping import Float32, Float64

from dita.config import EnvConfig
from dita.embodiment import load_embodiment
from dita.envs import expect_known
from dita.envs.base import RobotEnv
from dita.envs.experts import fetch_expert
from dita.types import EmbodimentSpec

with contextlib.redirect_stderr(io.StringIO()):  # it prints a notice about environments that are not used here
    from gymnasium_robotics.envs.fetch.pick_and_place import MujocoFetchPickAndPlaceEnv  # pyright: ignore
    from gymnasium_robotics.envs.fetch.push import MujocoFetchPushEnv  # pyright: ignore[reportMissingImports]
    from gymnasium_robotics.envs.fetch.reach import MujocoFetchReachEnv  # pyright: ignore[reportMissingImports]

CLASSES = {"reach": MujocoFetchReachEnv, "push": MujocoFetchPushEnv, "pick-and-place": MujocoFetchPickAndPlaceEnv}
INSTRUCTIONS = {
    "reach": "move the gripper to the red ball",
    "push": "push the block to the red ball",
    "pick-and-place": "pick up the block and bring it to the red ball",
}
PARAPHRASES = {
    "reach": ("reach the red ball", "bring your hand to the red sphere", "go to the red target"),
    "push": (
        "shove the cube over to the red sphere",
        "slide the block to the red target",
        "move the box to the red ball",
    ),
    "pick-and-place": (
        "grasp the cube and carry it to the red sphere",
        "take the block to the red target",
        "lift the box and hold it at the red ball",
    ),
}
TASKS = tuple(INSTRUCTIONS)
START = 1  # purpose of the random numbers that draw a start from its seed
FINGER = 0.05  # [m] of an open finger
GOAL = (1.0, 0.0, 0.0, 0.6)  # the block shows through


def make(config: EnvConfig, task: str) -> FetchEnv:
    """Build the environment of one task."""
    return FetchEnv(load_embodiment(config.embodiment), task, config.max_steps, config.fast_render)


class FetchEnv(RobotEnv):
    """A Fetch task; its start depends on (task, seed) only.

    Success, at any step: tool (reach) or block is within 5 cm of the goal. The goal is drawn as a red ball of that
    size, because nothing else says where it is; arm or block hide it in 3 % of the starts. Farama's starts are
    kept: 2 % (reach), 6 % (push) and 4 % (pick-and-place) are solved already. The state is the tool's position and the
    gripper's opening.
    """

    def __init__(self, embodiment: EmbodimentSpec, task: str, max_steps: int, fast_render: bool = True) -> None:
        super().__init__("fetch", embodiment, TASKS, max_steps, fast_render)
        self._load(task)

    def _load(self, task: str) -> None:
        expect_known("task", task, TASKS)
        self.task, self.instruction = task, INSTRUCTIONS[task]
        self._env = CLASSES[task]()
        self.model, self.data = self._env.model, self._env.data
        # Farama's ball of 2 cm is hidden by block or arm in 9 % of the starts; this one is what counts as there
        self.model.site("target0").size[:] = self._env.distance_threshold
        self.model.site("target0").rgba[:] = GOAL
        self._loaded()

    def _place(self) -> None:
        self._env.np_random = np.random.default_rng([self.seed, START])
        self._env.reset()
        marker = self.model.site("target0")
        marker.pos[:] = self._env.goal - self.model.body(marker.bodyid[0]).pos
        mujoco.mj_forward(self.model, self.data)

    def _hashed(self) -> Sequence[Any]:
        return (self._env.goal,)

    def step(self, action: Float32[np.ndarray, "4"]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Pull the tool by one SI action for 40 ms; the reward is Farama's sparse one, 0 at the goal and else -1."""
        self._env.step(self.source_action(action))
        mujoco.mj_forward(self.model, self.data)
        reached = float(np.linalg.norm(self._moved - self._env.goal)) < self._env.distance_threshold
        self.success |= reached
        self.steps += 1
        reward = 0.0 if reached else -1.0
        return {"state": self.state}, reward, self.success, self.steps >= self.max_steps, self._info()

    @property
    def _moved(self) -> Float64[np.ndarray, "3"]:
        """What has to get to the goal [m, world]."""
        return self.data.site("object0" if self._env.has_object else "robot0:grip").xpos

    @property
    def _base(self) -> Float64[np.ndarray, "3"]:
        return self.data.body("robot0:base_link").xpos

    @property
    def commanded_position(self) -> Float64[np.ndarray, "3"]:
        """Measured tool position [m, base frame]: the next delta adds to it."""
        return self.data.site("robot0:grip").xpos - self._base

    @property
    def state(self) -> Float32[np.ndarray, "4"]:
        """Tool position [m, base frame] and the gripper's opening; neither block nor goal."""
        fingers = [self.data.joint(f"robot0:{side}_gripper_finger_joint").qpos[0] for side in "lr"]
        return np.array([*self.commanded_position, np.clip(np.mean(fingers) / FINGER, 0, 1)], np.float32)

    def expert_action(self) -> Float32[np.ndarray, "4"]:
        """Return the scripted expert's action."""
        tool = self.data.site("robot0:grip").xpos
        move, gripper = fetch_expert(self.task, tool, float(self.state[3]), self._moved, self._env.goal)
        low, high = self.action_space.low, self.action_space.high  # pyright: ignore
        return np.clip([*move, gripper], low, high).astype(np.float32)
