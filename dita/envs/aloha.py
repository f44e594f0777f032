# mujoco ships no types for its compiled part
# pyright: reportAttributeAccessIssue=false
"""gym-aloha 0.1.5 (Zhao et al., arXiv 2304.13705): two ViperX 300 arms follow joint targets at 50 Hz.

Scene, starts and success rule are gym-aloha's. MuJoCo runs them directly, because gym-aloha renders three pictures of
640x480 at every step; the physics is bit-equal to it. Seed s starts where gym-aloha's `reset(seed=s)` does.

Success, at any step: AlohaTransferCube, the left arm's left finger touches the cube and the cube not the table;
AlohaInsertion, the peg touches the pin inside the socket.
"""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np
from gym_aloha.constants import (  # pyright: ignore[reportMissingImports]
    ASSETS_DIR,
    START_ARM_POSE,
    normalize_puppet_gripper_position,
    unnormalize_puppet_gripper_position,
)
from gym_aloha.utils import sample_box_pose, sample_insertion_pose  # pyright: ignore[reportMissingImports]
from jaxtyping import Float32, Float64
from scipy.spatial.transform import Rotation

from dita.config import EnvConfig
from dita.embodiment import load_embodiment
from dita.envs import expect_known
from dita.envs.base import RobotEnv
from dita.envs.experts import Hand, at_most, damped_least_squares, transfer_expert
from dita.types import EmbodimentSpec

SCENES = {"AlohaTransferCube": "bimanual_viperx_transfer_cube.xml", "AlohaInsertion": "bimanual_viperx_insertion.xml"}
TASKS = tuple(SCENES)
INSTRUCTIONS = {
    "AlohaTransferCube": "pick up the cube with the right arm and hand it to the left arm",
    "AlohaInsertion": "pick up the peg and the socket and insert the peg into the socket",
}
PARAPHRASES = {
    "AlohaTransferCube": (
        "take the red cube with the right gripper and give it to the left gripper",
        "grab the block on the right and pass it over to the other arm",
        "transfer the cube from the right hand into the left hand",
    ),
    "AlohaInsertion": (
        "lift the red peg and the blue socket, then put the peg into the socket",
        "grab the stick and the sleeve and push the stick into the sleeve",
        "with one part in each hand, slide the peg into the socket in mid-air",
    ),
}
FIELDS = (("left_joints", 6), ("left_gripper", 1), ("right_joints", 6), ("right_gripper", 1))
SIDES = ("left", "right")
SUBSTEP = 0.002  # [s], the scenes' physics
FINGERTIP = (0.15, 0.0, 0.0)  # [m] in the gripper's frame, which looks along x and opens along y
GAIN = 0.2  # share of the way to its waypoint by which a hand's target moves in one step
LEAD = 0.2  # [rad] by which a joint's target may lead the joint


def make(config: EnvConfig, task: str) -> AlohaEnv:
    """Build the environment of one task.

    Raises:
        ValueError: unknown task, or an embodiment that is not two arms under joint targets at 50 Hz.
    """
    return AlohaEnv(load_embodiment(config.embodiment), task, config.max_steps, config.fast_render)


class AlohaEnv(RobotEnv):
    """A gym-aloha task; its start depends on (task, seed) only.

    State and action are joints [rad] and gripper openings of the left, then of the right arm; no object is in them.
    """

    def __init__(self, embodiment: EmbodimentSpec, task: str, max_steps: int, fast_render: bool = True) -> None:
        super().__init__("aloha", embodiment, TASKS, max_steps, fast_render)
        for fields in (embodiment.state, embodiment.action):
            if tuple((f.name, f.size) for f in fields) != FIELDS or any(f.mode != "absolute" for f in fields):
                raise ValueError(
                    f"embodiment {embodiment.name!r} is not gym-aloha's robot: state and action must be the absolute "
                    f"fields {', '.join(f'{name}[{size}]' for name, size in FIELDS)}, as in sim_aloha.yaml"
                )
        self._substeps = round(1 / embodiment.control_hz / SUBSTEP)
        self._load(task)

    def _load(self, task: str) -> None:
        expect_known("task", task, TASKS)
        self.task, self.instruction = task, INSTRUCTIONS[task]
        self.model = mujoco.MjModel.from_xml_path(str(ASSETS_DIR / SCENES[task]))
        self.data = mujoco.MjData(self.model)
        self._loaded()

    def _place(self) -> None:
        mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:16] = self.data.ctrl[:] = START_ARM_POSE
        if self.task == "AlohaTransferCube":
            self.data.qpos[16:] = sample_box_pose(self.seed)
        else:
            self.data.qpos[16:] = np.concatenate(sample_insertion_pose(self.seed))
        mujoco.mj_forward(self.model, self.data)

    def step(self, action: Float32[np.ndarray, "a"]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Follow one set of joint targets for one control step; the reward is gym-aloha's stage, 0 to 4."""
        self.data.ctrl[:] = _controls(self.source_action(action))
        mujoco.mj_step2(self.model, self.data)  # positions, Jacobians and contacts are those of the current state,
        mujoco.mj_step(self.model, self.data, self._substeps - 1)
        mujoco.mj_step1(self.model, self.data)  # and so they are again
        self.steps += 1
        reward = self.stage()
        self.success |= reward == 4
        return {"state": self.state}, float(reward), self.success, self.steps >= self.max_steps, self._info()

    def stage(self) -> int:
        """Return how far the task is, by gym-aloha's rule on contacts: 0 to 4, which is success."""
        touching = self._contacts()
        left, right = "vx300s_left/10_left_gripper_finger", "vx300s_right/10_right_gripper_finger"
        if self.task == "AlohaTransferCube":
            lifted = ("red_box", "table") not in touching
            if ("red_box", left) in touching:
                return 4 if lifted else 3
            return (2 if lifted else 1) if ("red_box", right) in touching else 0
        walls = [f"socket-{i}" for i in range(1, 5)]
        lifted = not any((part, "table") in touching for part in ("red_peg", *walls))
        if ("red_peg", "pin") in touching:
            return 4
        if lifted and any(("red_peg", wall) in touching for wall in walls):
            return 3
        both = ("red_peg", right) in touching and any((wall, left) in touching for wall in walls)
        return (2 if lifted else 1) if both else 0

    def _contacts(self) -> set[tuple[str, str]]:
        """Return the pairs of geoms that touch, both ways round."""
        name = [(self.model.geom(a).name, self.model.geom(b).name) for a, b in self.data.contact.geom]
        return {*name, *((b, a) for a, b in name)}

    @property
    def commanded(self) -> Float64[np.ndarray, "14"]:
        """The last targets, as the action has them."""
        return _normalised(self.data.ctrl)

    @property
    def commanded_position(self) -> Float64[np.ndarray, "3"]:
        """There is none: two tools under joint targets.

        Raises:
            ValueError: always.
        """
        raise ValueError("aloha has two tools and takes absolute joint targets: read `commanded`")

    @property
    def state(self) -> Float32[np.ndarray, "14"]:
        """Joints and gripper openings of both arms; arms that a wild command slams past a limit read as that limit."""
        space = self.observation_space["state"]  # pyright: ignore
        return np.clip(_normalised(self.data.qpos[:16]).astype(np.float32), space.low, space.high)

    def expert_action(self) -> Float32[np.ndarray, "14"]:
        """Return the action of the scripted expert: AlohaTransferCube has one."""
        expect_known("scripted expert", self.task, ("AlohaTransferCube",))
        hands = {side: self._hand(side) for side in SIDES}
        goals = transfer_expert(hands["left"], hands["right"], self.data.body("box").xpos.copy())
        parts = []
        for i, (side, (position, turn, gripper)) in enumerate(zip(SIDES, goals, strict=True)):
            hand, joints = hands[side], slice(8 * i, 8 * i + 6)
            rotate = (turn * hand.turn.inv()).as_rotvec()
            twist = GAIN * np.concatenate([at_most(position - hand.position, 0.05), at_most(rotate, 0.4)])
            measured = self.data.qpos[joints]
            target = self.data.ctrl[joints] + damped_least_squares(self._jacobian(side, hand.position), twist)
            parts += [np.clip(target, measured - LEAD, measured + LEAD), [gripper]]
        low, high = self.action_space.low, self.action_space.high  # pyright: ignore
        return np.clip(np.concatenate(parts), low, high).astype(np.float32)

    def _hand(self, side: str) -> Hand:
        body = self.data.body(f"vx300s_{side}/gripper_link")
        turn, gripper = Rotation.from_matrix(body.xmat.reshape(3, 3)), 7 * SIDES.index(side) + 6
        closing = bool(self.commanded[gripper] < 0.5)
        return Hand(body.xpos + turn.apply(FINGERTIP), turn, float(self.state[gripper]), closing)

    def _jacobian(self, side: str, point: Float64[np.ndarray, "3"]) -> Float64[np.ndarray, "6 6"]:
        """Return the velocity of a point of the hand, in the world, per joint velocity."""
        linear, angular = np.zeros((3, self.model.nv)), np.zeros((3, self.model.nv))
        body = self.model.body(f"vx300s_{side}/gripper_link").id
        mujoco.mj_jac(self.model, self.data, linear, angular, point, body)
        first = 8 * SIDES.index(side)
        return np.vstack([linear, angular])[:, first : first + 6]


def _normalised(raw: Float64[np.ndarray, "16"]) -> Float64[np.ndarray, "14"]:
    """Turn joints and both fingers of each arm [rad, m] into joints and gripper openings."""
    arms = [(arm[:6], [normalize_puppet_gripper_position(arm[6])]) for arm in (raw[:8], raw[8:])]
    return np.concatenate([part for arm in arms for part in arm])


def _controls(action: Float64[np.ndarray, "14"]) -> Float64[np.ndarray, "16"]:
    """Turn joint targets and gripper openings into those of MuJoCo's servos, one per finger."""
    parts = []
    for arm in (action[:7], action[7:]):
        finger = unnormalize_puppet_gripper_position(arm[6])
        parts += [arm[:6], [finger, -finger]]
    return np.concatenate(parts)
