# mujoco ships no types for its compiled part
# pyright: reportAttributeAccessIssue=false
"""Meta-World v3 (Yu et al. 2019; Farama 3.1.1): 50 tasks of a Sawyer arm moved by a mocap hand at 80 Hz."""

from __future__ import annotations

import copy
import hashlib
from typing import Any

import mujoco
import numpy as np
from jaxtyping import Float32, Float64, UInt8
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.sawyer_xyz_env import SawyerXYZEnv

from dita.config import EnvConfig
from dita.embodiment import load_embodiment
from dita.envs import expect_known
from dita.envs.base import RobotEnv, SimState
from dita.envs.experts import metaworld_expert
from dita.types import EmbodimentSpec

INSTRUCTIONS = {
    "assembly-v3": "put the ring onto the peg",
    "basketball-v3": "put the ball into the basket",
    "bin-picking-v3": "move the block into the other bin",
    "box-close-v3": "put the lid onto the box",
    "button-press-topdown-v3": "press the button from above",
    "button-press-topdown-wall-v3": "reach over the wall and press the button from above",
    "button-press-v3": "press the button",
    "button-press-wall-v3": "reach past the wall and press the button",
    "coffee-button-v3": "press the button of the coffee machine",
    "coffee-pull-v3": "pull the mug away from the coffee machine",
    "coffee-push-v3": "push the mug under the coffee machine",
    "dial-turn-v3": "turn the dial",
    "disassemble-v3": "take the ring off the peg",
    "door-close-v3": "close the door",
    "door-lock-v3": "lock the door",
    "door-open-v3": "open the door",
    "door-unlock-v3": "unlock the door",
    "drawer-close-v3": "close the drawer",
    "drawer-open-v3": "open the drawer",
    "faucet-close-v3": "turn the faucet off",
    "faucet-open-v3": "turn the faucet on",
    "hammer-v3": "drive the nail in with the hammer",
    "hand-insert-v3": "put the block into the hole",
    "handle-press-side-v3": "press the handle down from the side",
    "handle-press-v3": "press the handle down",
    "handle-pull-side-v3": "pull the handle up from the side",
    "handle-pull-v3": "pull the handle up",
    "lever-pull-v3": "pull the lever up",
    "peg-insert-side-v3": "insert the peg into the side of the box",
    "peg-unplug-side-v3": "unplug the peg from the side of the box",
    "pick-out-of-hole-v3": "take the block out of the hole",
    "pick-place-v3": "pick up the block and bring it to the target",
    "pick-place-wall-v3": "pick up the block and bring it over the wall to the target",
    "plate-slide-back-side-v3": "slide the plate out of the goal sideways",
    "plate-slide-back-v3": "slide the plate back out of the goal",
    "plate-slide-side-v3": "slide the plate into the goal sideways",
    "plate-slide-v3": "slide the plate into the goal",
    "push-back-v3": "pull the block back to the target",
    "push-v3": "push the block to the target",
    "push-wall-v3": "push the block around the wall to the target",
    "reach-v3": "reach the target",
    "reach-wall-v3": "reach the target behind the wall",
    "shelf-place-v3": "put the block onto the shelf",
    "soccer-v3": "push the ball into the goal",
    "stick-pull-v3": "pull the thermos with the stick",
    "stick-push-v3": "push the thermos with the stick",
    "sweep-into-v3": "sweep the block into the hole",
    "sweep-v3": "sweep the block off the table",
    "window-close-v3": "close the window",
    "window-open-v3": "open the window",
}
TASKS = tuple(sorted(INSTRUCTIONS))
UPSIDE_DOWN = {"corner", "corner2", "corner3", "corner4"}  # Meta-World mounts these cameras so
START = 1  # purpose of the random numbers that draw a start from its seed
PHYSICS = mujoco.mjtState.mjSTATE_INTEGRATION  # with warm start and mocap: what a bit-equal continuation needs


def make(config: EnvConfig, task: str) -> MetaWorldEnv:
    """Build the environment of one task."""
    return MetaWorldEnv(load_embodiment(config.embodiment), task, config.max_steps, config.fast_render)


# Meta-World draws a marker at the goal of every task. A drawer needs none: it would tell the policy where to go. Here
# nothing else in the picture says where the goal is.
GOAL_IN_PICTURE = frozenset({
    "reach-v3", "reach-wall-v3", "push-v3", "push-wall-v3", "push-back-v3", "pick-place-v3", "pick-place-wall-v3",
    "stick-push-v3", "stick-pull-v3", "soccer-v3", "sweep-v3", "coffee-push-v3", "coffee-pull-v3", "disassemble-v3",
})  # fmt: skip


class MetaWorldEnv(RobotEnv):
    """A Meta-World task; its start depends on (task, seed) only.

    The state is the hand's position and the gripper's opening; object and goal stay hidden from the policy.
    """

    def __init__(self, embodiment: EmbodimentSpec, task: str, max_steps: int, fast_render: bool = True) -> None:
        super().__init__("metaworld", embodiment, TASKS, max_steps)
        self.fast_render = fast_render
        self._renderers: dict[tuple[int, int], mujoco.Renderer] = {}
        self._load(task)

    def _load(self, task: str) -> None:
        expect_known("task", task, TASKS)
        self.close()
        self.task, self.instruction = task, INSTRUCTIONS[task]
        self._env: SawyerXYZEnv = ALL_V3_ENVIRONMENTS[task]()
        self._env._set_task_called = True
        # experts need the goal; the cached observation space has it clipped to zero
        self._env._partially_observable = False
        del self._env.sawyer_observation_space
        # it refuses to step after 500 steps; max_steps is ours to say
        self._env.max_path_length = np.iinfo(np.int64).max
        if self.fast_render:  # on a CPU these two dominate; they are read when a renderer is created
            self._env.model.vis.quality.offsamples = 0
            self._env.model.vis.quality.shadowsize = 0
        if task not in GOAL_IN_PICTURE:
            for i in range(self._env.model.nsite):
                if self._env.model.site(i).name.startswith("goal"):
                    self._env.model.site_rgba[i, 3] = 0
        cameras = [self._env.model.camera(i).name for i in range(self._env.model.ncam)]
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
        self._place()
        self._expert = metaworld_expert(self.task)
        self.steps, self.success = 0, False
        self.start_hash = self._hash()
        return {"state": self.state}, self._info()

    def _place(self) -> None:
        # Meta-World ignores reset(seed). Let the task draw from our generator first (some tasks reject starts until
        # object and goal are far enough apart), then freeze what it accepted: reset() places it twice.
        env = self._env
        env.seeded_rand_vec, env._freeze_rand_vec = True, False
        env.np_random = np.random.default_rng([self.seed, START])
        env.reset_model()
        env._freeze_rand_vec = True
        self._full, _ = env.reset()

    def step(self, action: Float32[np.ndarray, "a"]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Move the hand by one SI action for 12.5 ms; the reward is Meta-World's."""
        self._full, reward, _, _, info = self._env.step(self.source_action(action))  # pyright: ignore
        self.steps += 1
        self.success |= bool(info["success"])
        return {"state": self.state}, float(reward), self.success, self.steps >= self.max_steps, self._info()

    @property
    def commanded_position(self) -> Float64[np.ndarray, "3"]:
        """Position of the mocap body [m]."""
        return self._env.data.mocap_pos[0].copy()

    @property
    def state(self) -> Float32[np.ndarray, "4"]:
        """Hand position [m] and gripper opening: the rest of Meta-World's observation is object and goal."""
        return self._full[:4].astype(np.float32)

    def picture(self, camera: str, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
        """Render one of Meta-World's cameras, right side up."""
        for site in self._env._target_site_config:  # stepping puts the goal's marker back where the model has it
            self._env._set_pos_site(*site)
        if (height, width) not in self._renderers:
            self._renderers[height, width] = mujoco.Renderer(self._env.model, height, width)
        renderer = self._renderers[height, width]
        renderer.update_scene(self._env.data, camera)
        if self.fast_render:
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        picture = renderer.render()
        return np.ascontiguousarray(picture[::-1, ::-1]) if camera in UPSIDE_DOWN else picture

    def expert_action(self) -> Float32[np.ndarray, "a"]:
        """Return the clipped action of Meta-World's own controller, SI."""
        return (self._expert(self._full) * self.scale).astype(np.float32)

    def warnings(self) -> dict[str, int]:
        """Return MuJoCo's warnings since reset."""
        kinds = list(mujoco.mjtWarning.__members__.items())
        return {
            name: int(self._env.data.warning[int(kind)].number)
            for name, kind in kinds
            if name != "mjNWARNING" and self._env.data.warning[int(kind)].number
        }

    def get_state(self) -> SimState:
        """Save physics and Meta-World's Python attributes; what `reset` writes into the model follows from the seed."""
        model, data = self._env.model, self._env.data
        physics = np.empty(mujoco.mj_stateSize(model, PHYSICS))
        mujoco.mj_getState(model, data, physics, PHYSICS)
        attributes = copy.deepcopy({k: v for k, v in vars(self._env).items() if _is_value(v)})
        return SimState(self.task, self.seed, self.steps, self.success, physics, self._full.copy(), attributes)

    def set_state(self, state: SimState) -> None:
        """Restore a saved state of any task."""
        self.reset(seed=state.seed, options={"task": state.task})
        vars(self._env).update(copy.deepcopy(state.attributes))
        self._full = state.full_observation.copy()
        model, data = self._env.model, self._env.data
        mujoco.mj_setState(model, data, state.physics, PHYSICS)
        mujoco.mj_forward(model, data)  # positions of bodies and sites, contacts
        mujoco.mj_setState(model, data, state.physics, PHYSICS)  # mj_forward moved the solver's warm start
        self.steps, self.success = state.steps, state.success

    def close(self) -> None:
        """Free the renderers; MuJoCo's own clean-up at exit comes too late for EGL."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()

    def _info(self) -> dict[str, Any]:
        return {"success": self.success, "warnings": self.warnings(), "start_hash": self.start_hash}

    def _hash(self) -> str:
        model = self._env.model
        parts = (self.get_state().physics, model.body_pos, model.site_pos, self._env._target_pos)
        return hashlib.sha256(
            self.task.encode() + b"".join(np.ascontiguousarray(p).tobytes() for p in parts)
        ).hexdigest()


def _is_value(value: Any) -> bool:
    # arrays that own no memory are windows into MjData or the frozen start: they follow physics and seed
    return isinstance(value, bool | int | float | np.generic) or (isinstance(value, np.ndarray) and value.base is None)
