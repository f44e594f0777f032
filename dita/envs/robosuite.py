# mujoco and robosuite ship no types
# pyright: reportAttributeAccessIssue=false
"""robosuite 1.5 (Zhu et al., arXiv 2009.12293): table-top tasks of several arms under its own torque controllers.

Positions are in the arm's base frame, which stands 0.56 m from the table's middle and 0.112 m above its top. The tool
is robosuite's grip site, between the finger tips. The embodiment says everything: `robosuite_<robot>_...` which arm, a
`joint_position` action JOINT_POSITION control, an `ee_position` action OSC_POSE.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import mujoco
import numpy as np
from jaxtyping import Float32, Float64
from scipy.spatial.transform import Rotation

from dita.config import EnvConfig
from dita.embodiment import load_embodiment, slices
from dita.envs import expect_known
from dita.envs.base import RobotEnv, numpy_seeded
from dita.envs.experts import damped_least_squares, lift_expert, stack_expert
from dita.types import EmbodimentSpec, FieldSpec

logging.getLogger("robosuite_logs").addFilter(lambda record: record.levelno >= logging.ERROR)  # a page per import
import robosuite  # noqa: E402

ROBOTS = {"panda": "Panda", "ur5e": "UR5e", "kinova3": "Kinova3", "iiwa": "IIWA"}
INSTRUCTIONS = {
    "Lift": "lift the red cube",
    "Stack": "put the red cube onto the green cube",
    "Door": "open the door",
    "PickPlace": "put every object into its bin",
    "PickPlaceCan": "put the can into its bin",
    "NutAssembly": "put both nuts onto their pegs",
    "NutAssemblySquare": "put the square nut onto the square peg",
}
PARAPHRASES = {
    "Lift": ("pick up the red cube", "raise the red block off the table", "grab the red cube and hold it up"),
    "Stack": (
        "stack the red cube on the green cube",
        "set the red block on top of the green block",
        "pick up the red cube and place it upon the green one",
    ),
    "Door": ("pull the door open", "turn the handle and open the door", "get the door to stand open"),
    "PickPlace": (
        "sort all objects into their bins",
        "bring each object to the bin where it belongs",
        "move everything into the matching bins",
    ),
    "PickPlaceCan": (
        "place the can in the bin where it belongs",
        "pick up the can and drop it into its bin",
        "move the can over to its bin",
    ),
    "NutAssembly": (
        "fit both nuts onto the matching pegs",
        "place the square and the round nut on their pegs",
        "slide each nut over its peg",
    ),
    "NutAssemblySquare": (
        "fit the square nut over the square peg",
        "slide the square ring onto the peg with corners",
        "pick up the square nut and place it on its peg",
    ),
}
TASKS = tuple(INSTRUCTIONS)
START = 1  # purpose of the random numbers that draw a start from its seed
MODEL_SEED = 0  # of what robosuite draws while it builds a model, the cube's size: the same in every episode
SUBSTEP = 0.002  # [s], robosuite's physics
GRIPPER_STEP = 0.05  # [s] in which robosuite's gripper command moves by its speed
# Both take absolute goals, because only `RobosuiteEnv` composes deltas. robosuite's JOINT_POSITION has kp 50, which
# lags 0.3 s; this is as stiff as a real arm's position interface.
CONTROLLERS = {
    "OSC_POSE": {"kp": 150, "input_ref_frame": "world", "uncouple_pos_ori": True},
    "JOINT_POSITION": {"kp": 600},
}


def make(config: EnvConfig, task: str) -> RobosuiteEnv:
    """Build the environment of one task.

    Raises:
        ValueError: unknown task, or an embodiment that names no arm of robosuite's.
    """
    return RobosuiteEnv(load_embodiment(config.embodiment), task, config.max_steps, config.fast_render)


class RobosuiteEnv(RobotEnv):
    """A robosuite task; its start depends on (embodiment, task, seed) only.

    Success, at any step: robosuite's own `_check_success` of the task.
    """

    def __init__(self, embodiment: EmbodimentSpec, task: str, max_steps: int, fast_render: bool = True) -> None:
        super().__init__("robosuite", embodiment, TASKS, max_steps, fast_render)
        suite, _, name = embodiment.name.partition("_")
        if suite != "robosuite" or name.split("_")[0] not in ROBOTS:
            raise ValueError(
                f"embodiment {embodiment.name!r} names no arm of robosuite's: robosuite_<robot>_..., with one of "
                f"{', '.join(ROBOTS)}"
            )
        self._robot_name = ROBOTS[name.split("_")[0]]
        self._joint = any(f.kind == "joint_position" for f in embodiment.action)
        self._load(task)

    def _load(self, task: str) -> None:
        expect_known("task", task, TASKS)
        self.task, self.instruction = task, INSTRUCTIONS[task]
        kind = "JOINT_POSITION" if self._joint else "OSC_POSE"
        arm = {
            **{"type": kind, "input_type": "absolute", "damping_ratio": 1, "impedance_mode": "fixed"},
            **{"kp_limits": [0, 1000], "damping_ratio_limits": [0, 10], "interpolation": None, "ramp_ratio": 0.2},
            **{"gripper": {"type": "GRIP"}, **CONTROLLERS[kind]},
        }
        with numpy_seeded(MODEL_SEED):
            suite: Any = robosuite  # where it is not installed, pyright takes this very file for it
            self._env = suite.make(
                task,
                robots=self._robot_name,
                controller_configs={"type": "BASIC", "body_parts": {"right": arm}},
                has_renderer=False,
                has_offscreen_renderer=False,
                use_camera_obs=False,
                use_object_obs=False,
                control_freq=self.embodiment.control_hz,
                ignore_done=True,
                hard_reset=False,  # or every episode compiles the model anew, for 2 s
                renderer="mujoco",
            )
        self.model, self.data = self._env.sim.model._model, self._env.sim.data._data
        robot = self._env.robots[0]
        self._arm, self._fingers = robot.part_controllers["right"], robot.part_controllers["right_gripper"]
        self._gripper = robot.gripper["right"]
        self._finger = self.model.joint(robot.gripper_joints["right"][0])
        self._shut, self._open = self._finger_range()
        self._loaded()
        for field, size in ((f, len(self._arm.qpos_index)) for f in (*self.embodiment.state, *self.embodiment.action)):
            if field.kind.startswith("joint_") and field.size != size:
                raise ValueError(f"{self._robot_name} has {size} joints, field {field.name} has {field.size}")

    def _finger_range(self) -> tuple[float, float]:
        """Return where the gripper's first joint is when closed and when open."""
        ends = []
        for closing in (1.0, -1.0):
            self._gripper.current_action = np.zeros(len(self._gripper.actuators))
            for _ in range(20):
                self._gripper.format_action(np.array([closing]))
            low, high = self.model.actuator(self._gripper.actuators[0]).ctrlrange
            ends.append(float((low + high) / 2 + (high - low) / 2 * self._gripper.current_action[0]))
        return ends[0], ends[1]

    def _place(self) -> None:
        start = np.random.default_rng([self.seed, START]).integers(2**32)
        with numpy_seeded(int(start)):
            self._env.reset()
        robot = self._env.robots[0]  # a reset builds its controllers anew
        self._arm, self._fingers = robot.part_controllers["right"], robot.part_controllers["right_gripper"]
        self._gripper.current_action = np.zeros(len(self._gripper.actuators))
        self._env.sim.step1()  # from here on positions, Jacobians and contacts are those of the current state
        self._goal = self.configuration

    @property
    def _start_name(self) -> str:
        return f"{self.embodiment.name}/{self.task}"

    def _hashed(self) -> Sequence[Any]:
        return self.model.body_pos, self.model.body_quat, self.model.geom_size

    def step(self, action: Float32[np.ndarray, "a"]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Move the goal by one SI action and the arm for one control step; the reward is robosuite's sparse one."""
        values = self.source_action(action) * self.scale
        goal, gripper = self._compose(values)
        self.drive(goal, gripper, 1 / self.embodiment.control_hz)
        self.steps += 1
        reward = float(self._env.reward(values))
        return {"state": self.state}, reward, self.success, self.steps >= self.max_steps, self._info()

    def drive(self, goal: Float64[np.ndarray, "m"], gripper: float, seconds: float) -> None:
        """Follow an absolute goal, as a driver does; not counted as steps.

        Args:
            goal: joints [j] rad, or position [3] m and quaternion wxyz, base frame.
            gripper: SI value of the gripper's action field: -1 closes, 1 opens, by robosuite's speed.
            seconds: whole physics steps of 2 ms.

        Raises:
            ValueError: a value that is not finite: MuJoCo would zero every control without a word.
        """
        if not (np.all(np.isfinite(goal)) and np.isfinite(gripper)):
            raise ValueError(f"a goal must be finite, got {np.asarray(goal).tolist()} and {gripper}")
        count = round(seconds / SUBSTEP)
        self._goal = np.array(goal, float)
        action = np.zeros(self._env.action_dim)
        self._arm.new_update = self._fingers.new_update = True  # or they would use what they saw at the reset
        self._set_goals(gripper, count * SUBSTEP / GRIPPER_STEP)
        for _ in range(count):
            self._env._pre_action(action, policy_step=False)
            self._env.sim.step2()
            self._env.sim.step1()
        self.success |= bool(self._env._check_success())

    def _set_goals(self, gripper: float, share: float) -> None:
        goal = self._goal
        if not self._joint:
            origin, turn = self._base()
            goal = np.concatenate([origin + turn.apply(goal[:3]), (turn * _rotation(goal[3:])).as_rotvec()])
        self._arm.set_goal(goal)
        before = self._gripper.current_action
        after = self._gripper.format_action(np.array([-gripper]))
        self._gripper.current_action = before + share * (after - before)
        self._fingers.set_goal(self._gripper.current_action)

    def _compose(self, values: Float64[np.ndarray, "a"]) -> tuple[Float64[np.ndarray, "m"], float]:
        """Return the goal that an SI action names, and its gripper."""
        goal, gripper = self._goal.copy(), 0.0
        for field, here, _ in slices(self.embodiment.action):
            value = values[here]
            base = self._goal if field.reference == "commanded" else self.configuration
            if field.kind.startswith("gripper"):
                gripper = float(value[0])
            elif field.kind == "joint_position":
                goal = value if field.mode == "absolute" else base + value
            elif field.kind == "ee_position":
                goal[:3] = value if field.mode == "absolute" else base[:3] + value
            elif field.kind == "ee_rotation_axis_angle":
                turn = Rotation.from_rotvec(value)
                goal[3:] = _wxyz(turn if field.mode == "absolute" else turn * _rotation(base[3:]))
            else:
                raise ValueError(f"robosuite: action field {field.name}: {field.kind} is not supported")
        if self._joint:
            goal = np.clip(goal, *self.joint_range)
        return goal, gripper

    @property
    def joint_range(self) -> tuple[Float64[np.ndarray, "j"], Float64[np.ndarray, "j"]]:
        """Lowest and highest joint positions of the arm's model [rad]; infinite where it has none."""
        joints = [self.model.joint(name) for name in self._env.robots[0].robot_joints]
        ranges = np.array([j.range if self.model.jnt_limited[j.id] else (-np.inf, np.inf) for j in joints])
        return ranges[:, 0], ranges[:, 1]

    @property
    def configuration(self) -> Float64[np.ndarray, "m"]:
        """Measured joints [rad], or tool position [m] and quaternion wxyz in the base frame, as the action moves it."""
        if self._joint:
            return self.joints
        position, turn = self._tool()
        return np.concatenate([position, _wxyz(turn)])

    @property
    def commanded(self) -> Float64[np.ndarray, "m"]:
        """The last goal, as `configuration`."""
        return self._goal.copy()

    @property
    def commanded_position(self) -> Float64[np.ndarray, "3"]:
        """Last commanded tool position [m, base frame]; the measured one under joint control."""
        return self._tool()[0] if self._joint else self._goal[:3].copy()

    @property
    def joints(self) -> Float64[np.ndarray, "j"]:
        """The arm's joints [rad]."""
        return self.data.qpos[self._arm.qpos_index].copy()

    @property
    def state(self) -> Float32[np.ndarray, "s"]:
        """The embodiment's fields by kind: tool, joints, gripper; never an object."""
        return np.concatenate([self._value(f) for f in self.embodiment.state]).astype(np.float32)

    def _value(self, field: FieldSpec) -> Float64[np.ndarray, "d"]:
        if field.kind == "joint_position":
            return self.joints
        if field.kind == "joint_velocity":
            return self.data.qvel[self._arm.qvel_index].copy()
        if field.kind == "gripper_position":
            return np.array([self._opening()])
        position, turn = self._tool()
        if field.kind == "ee_position":
            return position
        if field.kind == "ee_rotation_6d":
            return turn.as_matrix()[:, :2].T.ravel()
        raise ValueError(f"robosuite: state field {field.name}: {field.kind} is not supported")

    def _opening(self) -> float:
        """Return how far the gripper is open: 0 to 1."""
        opening = (self.data.qpos[self._finger.qposadr] - self._shut) / (self._open - self._shut)
        return float(np.clip(opening, 0.0, 1.0).item())

    def velocities(self) -> dict[str, Float64[np.ndarray, "d"]]:
        """Return the speeds of the state's joint and gripper fields, by field: rad/s, and openings per second."""
        speed = self.data.qvel[self._finger.dofadr] / (self._open - self._shut)
        by_kind = {"joint_position": self.data.qvel[self._arm.qvel_index].copy(), "gripper_position": speed}
        return {f.name: by_kind[f.kind] for f in self.embodiment.state if f.kind in by_kind}

    def _base(self) -> tuple[Float64[np.ndarray, "3"], Rotation]:
        body = self.data.body("robot0_base")
        return body.xpos.copy(), Rotation.from_matrix(body.xmat.reshape(3, 3))

    def _tool(self) -> tuple[Float64[np.ndarray, "3"], Rotation]:
        site = self.data.site(self._arm.ref_name)
        origin, turn = self._base()
        inverse = turn.inv()
        return inverse.apply(site.xpos - origin), inverse * Rotation.from_matrix(site.xmat.reshape(3, 3))

    def _scene_option(self) -> mujoco.MjvOption:
        option = mujoco.MjvOption()
        option.geomgroup[0] = 0  # collision shapes
        option.sitegroup[:] = 0  # markers
        return option

    def expert_action(self) -> Float32[np.ndarray, "a"]:
        """Return the action of the scripted expert: Lift and Stack have one."""
        return self.expert_from(self._goal)

    def expert_from(self, goal: Float64[np.ndarray, "m"]) -> Float32[np.ndarray, "a"]:
        """Return the expert's action if the last goal is another one, such as a guard's, which is ahead of the arm."""
        expect_known("scripted expert", self.task, ("Lift", "Stack"))
        position, turn = self._tool()
        if self.task == "Lift":
            held = self._env._check_grasp(self._gripper, self._env.cube)
            cube = self._seen(self._env.cube_body_id)
            move, rotate, gripper = lift_expert(position, turn, *cube, held)
        else:
            held = self._env._check_grasp(self._gripper, self._env.cubeA)
            cube, (under, _) = self._seen(self._env.cubeA_body_id), self._seen(self._env.cubeB_body_id)
            height = self._env.cubeA.size[2] + self._env.cubeB.size[2]
            move, rotate, gripper = stack_expert(position, turn, *cube, held, self._opening(), under, height)
        action = np.zeros(self.embodiment.action_dim)
        for field, here, _ in slices(self.embodiment.action):
            if field.kind.startswith("gripper"):
                action[here] = gripper
                continue
            action[here] = self._expert_value(field, goal, position, turn, move, rotate)
        low, high = self.action_space.low, self.action_space.high
        return np.clip(action, low, high).astype(np.float32)

    def _seen(self, body: int) -> tuple[Float64[np.ndarray, "3"], Rotation]:
        """Return where a body is [m] and its rotation, in the base frame."""
        origin, turn = self._base()
        found = self.data.body(body)
        return turn.inv().apply(found.xpos - origin), turn.inv() * _rotation(found.xquat)

    def _expert_value(
        self,
        field: FieldSpec,
        goal: np.ndarray,
        position: np.ndarray,
        turn: Rotation,
        move: np.ndarray,
        rotate: np.ndarray,
    ) -> Float64[np.ndarray, "d"]:
        """Return a field's value that leads from here by `move` [m] and `rotate` [rad], both in the base frame."""
        turned = Rotation.from_rotvec(rotate) * turn
        from_goal = field.reference == "commanded"
        if field.kind == "joint_position":
            target = self.joints + damped_least_squares(
                self._jacobian(), 0.5 * np.concatenate([move, rotate])
            )  # joints lag less
            return target if field.mode == "absolute" else target - (goal if from_goal else self.joints)
        if field.kind == "ee_position":
            target = position + move
            return target if field.mode == "absolute" else target - (goal[:3] if from_goal else position)
        if field.kind != "ee_rotation_axis_angle":
            raise ValueError(f"robosuite: action field {field.name}: {field.kind} has no expert")
        if field.mode == "absolute":
            return turned.as_rotvec()
        return (turned * (_rotation(goal[3:]) if from_goal else turn).inv()).as_rotvec()

    def _jacobian(self) -> Float64[np.ndarray, "6 j"]:
        """Return the tool's velocity per joint velocity, in the base frame."""
        linear, angular = np.zeros((3, self.model.nv)), np.zeros((3, self.model.nv))
        mujoco.mj_jacSite(self.model, self.data, linear, angular, self.model.site(self._arm.ref_name).id)
        back = self._base()[1].inv().as_matrix()
        return np.vstack([back @ linear, back @ angular])[:, self._arm.qvel_index]

    def _attributes(self) -> dict[str, Any]:
        return {"goal": self._goal, "gripper": np.array(self._gripper.current_action, float)}

    def _restore(self, attributes: dict[str, Any]) -> None:
        self._goal = attributes["goal"]
        self._gripper.current_action = attributes["gripper"]


def _wxyz(turn: Rotation) -> Float64[np.ndarray, "4"]:
    return turn.as_quat(canonical=True, scalar_first=True)


def _rotation(wxyz: Float64[np.ndarray, "4"]) -> Rotation:
    return Rotation.from_quat(wxyz, scalar_first=True)
