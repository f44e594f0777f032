# mujoco and gymnasium-robotics ship no types for what is used here
# pyright: reportAttributeAccessIssue=false
"""Fetch (Plappert et al., arXiv 1802.09464; gymnasium-robotics 1.4.2): a gripper pulled by a mocap body at 25 Hz.

Positions are relative to Fetch's base on the floor. A step adds to where the tool is, not to what was last commanded.
Farama reads positions that are one physics step of 2 ms older than the state; here they are the state's own.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from typing import Any

import mujoco
import numpy as np
from jaxtyping import Float32, Float64, UInt8

from dita.config import EnvConfig
from dita.embodiment import load_embodiment
from dita.envs import expect_known
from dita.envs.base import RobotEnv, SimState
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
PHYSICS = mujoco.mjtState.mjSTATE_INTEGRATION


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
        super().__init__("fetch", embodiment, TASKS, max_steps)
        self.fast_render = fast_render
        self._renderers: dict[tuple[int, int], mujoco.Renderer] = {}
        self._load(task)

    def _load(self, task: str) -> None:
        expect_known("task", task, TASKS)
        self.close()
        self.task, self.instruction = task, INSTRUCTIONS[task]
        self._env = CLASSES[task]()
        self.model, self.data = self._env.model, self._env.data
        if self.fast_render:  # they are read when a renderer is created
            self.model.vis.quality.offsamples = 0
            self.model.vis.quality.shadowsize = 0
        # Farama's ball of 2 cm is hidden by block or arm in 9 % of the starts; this one is what counts as there
        self.model.site("target0").size[:] = self._env.distance_threshold
        self.model.site("target0").rgba[:] = GOAL
        cameras = [self.model.camera(i).name for i in range(self.model.ncam)]
        for camera in self.embodiment.cameras:
            expect_known(f"camera of {task}", camera.name, cameras)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode; the start is a function of (task, seed), a missing seed draws one.

        Args:
            seed: of the start.
            options: {"task": name} switches the task.

        Raises:
            ValueError: unknown task or option.
        """
        super().reset(seed=seed)
        if unknown := set(options or {}) - {"task"}:
            raise ValueError(f"unknown reset option {', '.join(sorted(unknown))}; there is: task")
        if (task := (options or {}).get("task", self.task)) != self.task:
            self._load(task)
        self.seed = int(self.np_random.integers(2**31)) if seed is None else seed
        self._env.np_random = np.random.default_rng([self.seed, START])
        self._env.reset()
        marker = self.model.site("target0")
        marker.pos[:] = self._env.goal - self.model.body(marker.bodyid[0]).pos
        mujoco.mj_forward(self.model, self.data)
        self.steps, self.success = 0, False
        self.start_hash = self._hash()
        return {"state": self.state}, self._info()

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

    def picture(self, camera: str, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
        """Render one of Fetch's cameras, right side up."""
        if (height, width) not in self._renderers:
            self._renderers[height, width] = mujoco.Renderer(self.model, height, width)
        renderer = self._renderers[height, width]
        renderer.update_scene(self.data, camera)
        if self.fast_render:
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        return renderer.render()

    def expert_action(self) -> Float32[np.ndarray, "4"]:
        """Return the scripted expert's action."""
        tool = self.data.site("robot0:grip").xpos
        move, gripper = fetch_expert(self.task, tool, float(self.state[3]), self._moved, self._env.goal)
        low, high = self.action_space.low, self.action_space.high  # pyright: ignore
        return np.clip([*move, gripper], low, high).astype(np.float32)

    def warnings(self) -> dict[str, int]:
        """Return MuJoCo's warnings since reset."""
        kinds = list(mujoco.mjtWarning.__members__.items())
        return {
            name: int(self.data.warning[int(kind)].number)
            for name, kind in kinds
            if name != "mjNWARNING" and self.data.warning[int(kind)].number
        }

    def get_state(self) -> SimState:
        """Save physics; the goal follows from the seed."""
        physics = np.empty(mujoco.mj_stateSize(self.model, PHYSICS))
        mujoco.mj_getState(self.model, self.data, physics, PHYSICS)
        full = np.concatenate([self._moved, self._env.goal])
        return SimState(self.task, self.seed, self.steps, self.success, physics, full, {})

    def set_state(self, state: SimState) -> None:
        """Restore a saved state of any task."""
        self.reset(seed=state.seed, options={"task": state.task})
        mujoco.mj_setState(self.model, self.data, state.physics, PHYSICS)
        mujoco.mj_forward(self.model, self.data)  # positions of bodies and sites, contacts
        mujoco.mj_setState(self.model, self.data, state.physics, PHYSICS)  # mj_forward moved the solver's warm start
        self.steps, self.success = state.steps, state.success

    def close(self) -> None:
        """Free the renderers; MuJoCo's own clean-up at exit comes too late for EGL."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()

    def _info(self) -> dict[str, Any]:
        return {"success": self.success, "warnings": self.warnings(), "start_hash": self.start_hash}

    def _hash(self) -> str:
        values = np.concatenate([self.get_state().physics, self._env.goal])
        return hashlib.sha256(self.task.encode() + values.tobytes()).hexdigest()
