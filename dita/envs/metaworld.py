"""Meta-World v3 (Yu et al. 2019; Farama 3.1.1): 50 tasks of a Sawyer arm moved by a mocap hand at 80 Hz."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, UInt8
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.sawyer_xyz_env import SawyerXYZEnv

from dita.config import EnvConfig
from dita.embodiment import load_embodiment
from dita.envs import expect_known
from dita.envs.base import RobotEnv
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
PARAPHRASES = {
    "assembly-v3": ("place the ring over the peg", "pick up the ring and slide it onto the peg"),
    "basketball-v3": ("drop the ball into the hoop", "pick up the ball and score a basket"),
    "bin-picking-v3": (
        "take the block from its bin and drop it in the other one",
        "transfer the block to the second bin",
    ),
    "box-close-v3": ("close the box with its lid", "cover the box"),
    "button-press-topdown-v3": ("push the button down", "press down on the button with the hand above it"),
    "button-press-topdown-wall-v3": (
        "go over the wall and push the button down",
        "press the button behind the wall from above",
    ),
    "button-press-v3": ("push the button in", "press the button from the front"),
    "button-press-wall-v3": ("go around the wall and push the button", "push the button behind the wall"),
    "coffee-button-v3": ("start the coffee machine", "push the coffee maker's button"),
    "coffee-pull-v3": ("drag the mug back from the coffee maker", "take the cup away from under the coffee machine"),
    "coffee-push-v3": ("slide the cup below the coffee maker", "move the mug to where the coffee comes out"),
    "dial-turn-v3": ("rotate the dial", "give the knob a turn"),
    "disassemble-v3": ("remove the ring from the peg", "lift the ring from its peg"),
    "door-close-v3": ("shut the door", "push the door until it is closed"),
    "door-lock-v3": ("turn the lock so that the door is locked", "bolt the door"),
    "door-open-v3": ("pull the door open", "get the door to stand open"),
    "door-unlock-v3": ("turn the lock so that the door is unlocked", "release the door's lock"),
    "drawer-close-v3": ("shut the drawer", "push the drawer in"),
    "drawer-open-v3": ("pull the drawer out", "get the drawer to stand open"),
    "faucet-close-v3": ("close the tap", "rotate the faucet's handle until the water stops"),
    "faucet-open-v3": ("open the tap", "rotate the faucet's handle until the water runs"),
    "hammer-v3": ("pick up the hammer and hit the nail", "hammer the nail into the board"),
    "hand-insert-v3": ("insert the block into the hole", "reach into the hole with the block"),
    "handle-press-side-v3": ("push the handle down, coming from the side", "from the side, lower the handle"),
    "handle-press-v3": ("push the handle down", "lower the handle"),
    "handle-pull-side-v3": ("lift the handle, coming from the side", "from the side, raise the handle"),
    "handle-pull-v3": ("lift the handle", "raise the handle"),
    "lever-pull-v3": ("lift the lever", "raise the lever"),
    "peg-insert-side-v3": ("push the peg into the hole in the box's side", "put the peg sideways into the box"),
    "peg-unplug-side-v3": ("pull the peg out of the box's side", "remove the peg sideways from the box"),
    "pick-out-of-hole-v3": ("lift the block out of its hole", "get the block from the hole"),
    "pick-place-v3": ("grasp the block and carry it to the goal", "lift the block and hold it at the target"),
    "pick-place-wall-v3": (
        "grasp the block and carry it across the wall to the goal",
        "lift the block over the wall to the target",
    ),
    "plate-slide-back-side-v3": ("move the plate sideways out of the goal", "drag the puck out of the net to the side"),
    "plate-slide-back-v3": ("move the plate back from the goal", "drag the puck out of the net"),
    "plate-slide-side-v3": ("move the plate sideways to the goal", "push the puck into the net from the side"),
    "plate-slide-v3": ("move the plate to the goal", "push the puck into the net"),
    "push-back-v3": ("drag the block back to the goal", "bring the block towards you, to the target"),
    "push-v3": ("slide the block to the goal", "shove the block onto the target"),
    "push-wall-v3": ("slide the block past the wall to the goal", "move the block to the target behind the wall"),
    "reach-v3": ("move the hand to the goal", "go to the target"),
    "reach-wall-v3": ("move the hand past the wall to the goal", "go to the target beyond the wall"),
    "shelf-place-v3": ("place the block on the shelf", "lift the block and set it on the shelf"),
    "soccer-v3": ("score with the ball", "shove the ball into the net"),
    "stick-pull-v3": ("use the stick to drag the thermos", "hook the thermos with the stick and pull it"),
    "stick-push-v3": ("use the stick to shove the thermos", "move the thermos forward with the stick"),
    "sweep-into-v3": ("brush the block into the hole", "push the block until it falls into the hole"),
    "sweep-v3": ("brush the block off the table", "push the block over the table's edge"),
    "window-close-v3": ("shut the window", "slide the window closed"),
    "window-open-v3": ("slide the window open", "push the window open"),
}
TASKS = tuple(sorted(INSTRUCTIONS))
START = 1  # purpose of the random numbers that draw a start from its seed


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

    Success, at any step: Meta-World's own `success` of the task. The state is the hand's position and the gripper's
    opening; object and goal stay hidden from the policy.
    """

    upside_down = frozenset({"corner", "corner2", "corner3", "corner4"})  # Meta-World mounts these cameras so

    def __init__(self, embodiment: EmbodimentSpec, task: str, max_steps: int, fast_render: bool = True) -> None:
        super().__init__("metaworld", embodiment, TASKS, max_steps, fast_render)
        self._load(task)

    def _load(self, task: str) -> None:
        expect_known("task", task, TASKS)
        self.task, self.instruction = task, INSTRUCTIONS[task]
        self._env: SawyerXYZEnv = ALL_V3_ENVIRONMENTS[task]()
        self._env._set_task_called = True
        # experts need the goal; the cached observation space has it clipped to zero
        self._env._partially_observable = False
        del self._env.sawyer_observation_space
        # it refuses to step after 500 steps; max_steps is ours to say
        self._env.max_path_length = np.iinfo(np.int64).max
        self.model, self.data = self._env.model, self._env.data
        if task not in GOAL_IN_PICTURE:
            for i in range(self.model.nsite):
                if self.model.site(i).name.startswith("goal"):
                    self.model.site_rgba[i, 3] = 0
        self._loaded()

    def _place(self) -> None:
        # Meta-World ignores reset(seed). Let the task draw from our generator first (some tasks reject starts until
        # object and goal are far enough apart), then freeze what it accepted: reset() places it twice.
        env = self._env
        env.seeded_rand_vec, env._freeze_rand_vec = True, False
        env.np_random = np.random.default_rng([self.seed, START])
        env.reset_model()
        env._freeze_rand_vec = True
        self._full, _ = env.reset()
        self._expert = metaworld_expert(self.task)

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
        return super().picture(camera, height, width)

    def expert_action(self) -> Float32[np.ndarray, "a"]:
        """Return the clipped action of Meta-World's own controller, SI."""
        return (self._expert(self._full) * self.scale).astype(np.float32)

    def _hashed(self) -> Sequence[Any]:
        return self.model.body_pos, self.model.site_pos, self._env._target_pos

    def _attributes(self) -> dict[str, Any]:
        return {"full": self._full, "env": {k: v for k, v in vars(self._env).items() if _is_value(v)}}

    def _restore(self, attributes: dict[str, Any]) -> None:
        self._full = attributes["full"]
        vars(self._env).update(attributes["env"])


def _is_value(value: Any) -> bool:
    # arrays that own no memory are windows into MjData or the frozen start: they follow physics and seed
    return isinstance(value, bool | int | float | np.generic) or (isinstance(value, np.ndarray) and value.base is None)
