"""A simulated arm behind a driver's topics.

It takes commands in whichever form the embodiment's `driver` says, and gives joints, tool pose, cameras, the driver's
mode and its command timeout. Orders: `/dita/episode` begins an episode; `/twin/inject` has faults, see
`robot_io.nodes.inject`, if it was started with `inject`. With `expert` it publishes what the environment's expert would
do as a teleoperator's chunks.
"""

from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import numpy as np

from robot_io import messages as m
from robot_io.bus import COMMAND, LATCHED, SENSOR, STATE, Bus, Publisher, open_bus
from robot_io.core.limits import Field, parse_robot
from robot_io.core.space import exponential, logarithm, quaternion_of_6d, rotate
from robot_io.nodes.inject import Faults
from robot_io.nodes.serve import be_nice, serve
from robot_io.nodes.topics import (
    BASE_FRAME,
    EPISODE,
    EPISODE_STATE,
    EXECUTED,
    INSTRUCTION,
    TELEOP,
    TELEOP_GRIPPER,
    chunk_type,
    command_type,
    gripper_quantity,
    image_topic,
    joint_names,
)

LATE_S = 0.05  # that it may be late before simulated time slips: half of what the guard lets a state age
EXPERT_STEPS = 8  # of its chunks: a late one must not leave the guard without an action
JUMP = (
    2.0  # a command may move this many times as fast as the action's own limit; the rest is clipped, as a driver does
)
LOOKS = 4  # at the clock per step, whose grid begins with the episode and not with the timer
RUNNING = ("running", "reduced")  # modes in which a driver follows commands


class TwinNode:
    """A simulated arm behind a driver's topics."""

    def __init__(
        self,
        bus: Bus,
        env: Any,
        embodiment: Mapping[str, Any],
        command_timeout: float,
        driver_hz: float = 100.0,
        inject: bool = False,
        expert: bool = False,
    ) -> None:
        """Join the graph.

        Args:
            env: a `dita.envs` RobotEnv, or anything with its reset, step, observe, success, warnings, instruction and
                `commanded` (or, if the action is a position, `commanded_position`). One with `drive` follows commands
                at `driver_hz`, others at their control rate; one with `velocities` adds them to the joint states.
            embodiment: the env's, as plain values.
            command_timeout: without a command for this long [s] the arm holds, as a driver does.
            driver_hz: of the arm and its states: a whole number of times the control rate.
            inject: have faults on request.
            expert: publish the expert's actions as a teleoperator's.

        Raises:
            ValueError: `driver_hz` is no multiple of the control rate.
        """
        self.bus, self.env, self.robot = bus, env, parse_robot(embodiment, need_limits=False)
        self._timeout, self._expert = command_timeout, expert
        control_hz = embodiment["control_hz"]
        self._per_control = round(driver_hz / control_hz) if hasattr(env, "drive") else 1
        if hasattr(env, "drive") and abs(driver_hz - self._per_control * control_hz) > 1e-6 * driver_hz:
            raise ValueError(f"twin: driver_hz {driver_hz:g} must be a multiple of the control rate {control_hz:g}")
        self._dt = 1.0 / control_hz / max(1, self._per_control)
        self._per_image = round(self.robot.obs_dt / self._dt)
        self._episode: Dict[str, Any] = {}
        self._begin = self._start = 0.0
        self._target: Optional[np.ndarray] = None  # a configuration, or the twist [m/s, rad/s]
        self._target_time = -np.inf
        self._locked = False  # after a stop, until the command stream has been silent once
        self._mode, self._warned = "", set()
        self._executed: Optional[np.ndarray] = None  # the guard's goal
        self._chunks = 0
        driver = self.robot.driver
        grippers = [name for f in self.robot.state if f.kind.startswith("gripper") for name in joint_names(f)]
        self.faults = Faults(bus, self.robot.cameras, grippers, inject)
        self._images = {c: self.faults.publisher(image_topic(c), m.IMAGE, SENSOR) for c in self.robot.cameras}
        self._pose = self.faults.publisher(driver.pose_topic, m.POSE, STATE)
        self._joints = self.faults.publisher(driver.joints_topic, m.JOINT_STATE, STATE)
        self._mode_state = bus.publisher(driver.mode_topic, m.STRING, LATCHED)
        self._instruction = bus.publisher(INSTRUCTION, m.STRING, LATCHED)
        self._state = bus.publisher(EPISODE_STATE, m.STRING, STATE)
        bus.subscribe(driver.command_topic, command_type(self.robot), COMMAND, self._checked(self._on_command))
        if self.robot.gripper is not None:
            type = m.GRIPPER_COMMAND if driver.gripper == "gripper_command" else m.JOINT_TRAJECTORY
            bus.subscribe(driver.gripper_topic, type, COMMAND, self._checked(self._on_gripper))
        bus.subscribe(EPISODE, m.STRING, STATE, self._checked(self._on_episode))
        if expert:
            self._teleop: List[Publisher] = [bus.publisher(TELEOP, chunk_type(self.robot), COMMAND)]
            if self.robot.gripper is not None:
                self._teleop.append(bus.publisher(TELEOP_GRIPPER, m.JOINT_TRAJECTORY, COMMAND))
            bus.subscribe(EXECUTED, chunk_type(self.robot), STATE, self._checked(self._on_executed))
        self._follow_mode()
        bus.timer(self._dt / LOOKS, self._run)

    def stop(self) -> None:
        """Leave."""
        self.bus.shutdown()

    def close(self) -> None:
        """Free the simulator's renderers and leave the graph."""
        self.env.close()
        self.bus.close()

    def _checked(self, callback: Callable[[Any], None]) -> Callable[[Any], None]:
        def call(message: Any) -> None:
            try:
                callback(message)
            except ValueError as e:  # nothing that somebody sends may end the driver
                self.bus.log("error", f"refused: {e}")
                if self._episode:
                    self._episode["refused"] += 1

        return call

    def _on_episode(self, message: Any) -> None:
        order = m.json_from_ros(message)
        if not isinstance(order, dict) or not {"episode", "task", "seed"} <= set(order):
            raise ValueError(f"{EPISODE} needs episode, task and seed, got {order!r}")
        if order["episode"] != self._episode.get("episode"):
            self.reset(order)

    def reset(self, order: Mapping[str, Any]) -> None:
        """Begin an episode: its number, task and seed."""
        self.env.reset(seed=order["seed"], options={"task": order["task"]})
        self._target, self._target_time, self._executed = None, -np.inf, None
        gripper = self.robot.gripper
        self._closing = np.zeros(0) if gripper is None else 0.5 * (gripper.low + gripper.high)
        first = self.env.observe()  # before time begins: the first picture of a scene takes half a second
        self._begin, self._start, self._done = self.bus.now(), self.bus.steady(), 0
        counts = ("steps", "clipped", "timeouts", "refused", "ignored")
        self._episode = {**order, **dict.fromkeys(counts, 0), "success": False, "slipped_s": 0.0}
        self._warned = set()
        self._instruction.publish(self.bus.msg(m.STRING, data=self.env.instruction))
        self._send_state(self._begin, first.state)
        self._send_images(self._begin, first)
        self._demonstrate(self._begin)

    # ---- commands

    def _on_command(self, message: Any) -> None:
        robot, command = self.robot, self.robot.driver.command
        if command == "pose":
            position, quaternion = m.pose_from_ros(message)
            target = np.concatenate([position, quaternion]) if robot.space.rotation else position
        elif command == "twist":
            linear, angular = m.twist_from_ros(message)
            target = np.concatenate([linear, angular]) if robot.space.rotation else linear
        elif command == "joint_trajectory":
            target = m.joint_chunk_from_ros(message, "positions", robot.driver.joints)[1][-1]
        else:
            target = m.array_from_ros(message)
        if not np.all(np.isfinite(target)):  # MuJoCo would silently zero every control
            raise ValueError(f"a command on {robot.driver.command_topic} is not finite: {target.tolist()}")
        problem = robot.space.problem(target) if command != "twist" else None
        if problem is not None:
            raise ValueError(f"a command on {robot.driver.command_topic}: {problem}")
        if not self._episode:
            return
        self._target_time = self.bus.now()
        if self._locked or self._mode not in RUNNING:
            self._episode["ignored"] += 1
        else:
            self._target = target

    def _on_gripper(self, message: Any) -> None:
        robot = self.robot
        assert robot.gripper is not None
        if robot.driver.gripper == "gripper_command":
            value = np.array([m.gripper_command_from_ros(message)])
        else:
            names = robot.driver.gripper_names
            value = m.joint_chunk_from_ros(message, gripper_quantity(robot.gripper), names)[1][-1, :1]
        if not np.all(np.isfinite(value)):
            raise ValueError(f"a gripper command is not finite: {value.tolist()}")
        if self._episode and self._mode in RUNNING:
            self._closing = np.clip(value, robot.gripper.low, robot.gripper.high)

    def _on_executed(self, message: Any) -> None:
        self._executed = m.executed_from_ros(message, self.robot.space.rotation).target

    def _follow_mode(self) -> None:
        """Tell the driver's mode when it changes; a stop forgets the command and waits for a new stream of them."""
        mode = self.faults.active.get("driver_mode", {}).get("mode", "running")
        if mode != self._mode:
            self._mode = mode
            self._mode_state.publish(self.bus.msg(m.STRING, data=mode))
            self.bus.log("info" if mode in RUNNING else "warning", f"driver: {mode}")
        if mode not in RUNNING:
            self._target, self._locked = None, True
        elif self._locked and self.bus.now() - self._target_time > self._timeout:
            self._locked = False

    def _commanded(self) -> np.ndarray:
        env = self.env
        return np.asarray(env.commanded if hasattr(env, "commanded") else env.commanded_position, float)

    # ---- time

    def _run(self) -> None:
        """Make every step that time asks for; too far behind, simulated time slips and the factor drops below 1."""
        self._follow_mode()
        if not self._episode:
            return
        due = int((self.bus.steady() - self._start) / self._dt + 1e-6)
        if (due - self._done) * self._dt > LATE_S:
            late = (due - self._done - 1) * self._dt
            self._begin, self._start = self._begin + late, self._start + late
            self._episode["slipped_s"] += late
            due = self._done + 1
        while self._done < due:
            self._step()

    def _step(self) -> None:
        commanded = self._target is not None
        state = self._move()
        self._done += 1
        stamp = self._begin + self._done * self._dt
        control = self._done % self._per_control == 0
        self._episode["steps"] += commanded and control
        self._episode["success"] = bool(self.env.success)
        self._send_state(stamp, state)  # before the picture: who pairs the two has it then, and nobody waits for both
        if self._done % self._per_image == 0:
            self._send_images(stamp, self.env.observe())
        if control:
            self._demonstrate(stamp)

    def _move(self) -> np.ndarray:
        """Advance the env toward the target, or let it stay where it is commanded to be; return its state."""
        goal = self._goal()
        closing = self._closing
        if "gripper_inverted" in self.faults.active and self.robot.gripper is not None:
            closing = self.robot.gripper.low + self.robot.gripper.high - closing
        if hasattr(self.env, "drive"):
            self.env.drive(goal, float(closing[0]) if len(closing) else 0.0, self._dt)
            return self.env.state
        return self.env.step(self._action(goal, closing))[0]["state"]

    def _goal(self) -> np.ndarray:
        """Return the configuration to go to in this step."""
        space, commanded = self.robot.space, self._commanded()
        if self._target is not None and self.bus.now() - self._target_time > self._timeout:
            self._target = None
            self._episode["timeouts"] += 1
        if self._target is None:
            return commanded
        if self.robot.driver.command == "twist":
            motion = self._target * self._dt
        else:
            motion = space.difference(space.normal(self._target), commanded)
        limit = self._reach()
        clipped = np.clip(motion, -limit, limit)
        self._episode["clipped"] += bool(np.any(np.abs(clipped - motion) > 1e-9))
        return space.retract(commanded, clipped)

    def _reach(self) -> np.ndarray:
        """Return how far one step may move each axis; anywhere where the action is absolute."""
        fields = [f for f in (self.robot.motion, self.robot.rotation) if f is not None]
        if self.robot.motion.mode == "absolute":
            return np.full(self.robot.space.tangent, np.inf)
        limits = np.concatenate([np.maximum(-f.low, f.high) for f in fields])
        return limits * (JUMP / self._per_control if hasattr(self.env, "drive") else 1.0)

    def _action(self, goal: np.ndarray, closing: np.ndarray) -> np.ndarray:
        """Return the env's SI action that leads to a goal."""
        space, robot, commanded = self.robot.space, self.robot, self._commanded()
        n = space.linear
        motion = goal[:n] if robot.motion.mode == "absolute" else space.difference(goal, commanded)[:n]
        action = np.zeros(robot.action_dim, np.float32)
        action[robot.action_slice(robot.motion)] = motion
        if robot.rotation is not None:
            action[robot.action_slice(robot.rotation)] = _turn(robot.rotation, goal, space.difference(goal, commanded))
        action[robot.action_slice(robot.gripper)] = closing
        return action

    # ---- what it says

    def _send_images(self, stamp: float, observation: Any) -> None:
        for camera, publisher in self._images.items():
            publisher.publish(m.image_to_ros(self.bus.msg, stamp, observation.images[camera], camera))
        self._report()

    def _send_state(self, stamp: float, state: np.ndarray) -> None:
        speeds = self.env.velocities() if hasattr(self.env, "velocities") else {}
        joints: Dict[str, float] = {}
        velocities: Dict[str, float] = {}
        position, quaternion = None, np.array(m.IDENTITY)
        start = 0
        for field in self.robot.state:
            values = np.asarray(state[start : start + field.size], float)
            start += field.size
            if field.kind == "ee_position":
                position = values
            elif field.kind.startswith("ee_rotation"):
                quaternion = _quaternion(field, values)
            else:
                names = self._names(field)
                joints.update(zip(names, values.tolist(), strict=True))
                if field.name in speeds:
                    velocities.update(zip(names, np.asarray(speeds[field.name], float).tolist(), strict=True))
        if position is not None:
            self._pose.publish(m.pose_to_ros(self.bus.msg, stamp, position, BASE_FRAME, quaternion))
        if joints:
            known = velocities if set(velocities) == set(joints) else None
            self._joints.publish(m.joints_to_ros(self.bus.msg, stamp, joints, known))

    def _names(self, field: Field) -> Tuple[str, ...]:
        driver = self.robot.driver
        return driver.joints if field.kind == "joint_position" and driver.joints else tuple(joint_names(field))

    def _report(self) -> None:
        simulated = self._done * self._dt
        factor = simulated / (simulated + self._episode["slipped_s"]) if simulated else 1.0
        warnings = self.env.warnings()
        for name in sorted(set(warnings) - self._warned):
            self.bus.log("error", f"the simulator warns: {name}")
        self._warned |= set(warnings)
        values = {"real_time_factor": factor, "warnings": warnings, "mode": self._mode}
        self._state.publish(m.json_to_ros(self.bus.msg, {**self._episode, **values}))

    def _demonstrate(self, stamp: float) -> None:
        """Publish what the expert would do from here, EXPERT_STEPS times: the next chunk replaces all but the first.

        A delta adds to the guard's own last goal, which is ahead of the arm: the expert is told of it.
        """
        if not self._expert:
            return
        robot, msg, dt = self.robot, self.bus.msg, self.robot.action_dt
        if self._executed is not None and hasattr(self.env, "expert_from"):
            action = self.env.expert_from(self._executed)
        else:
            action = self.env.expert_action()
        self._chunks += 1
        action = np.tile(np.asarray(action, float), (EXPERT_STEPS, 1))
        motion, delta = robot.motion_of(action), robot.motion.mode == "delta"
        if robot.space.name == "joint":
            quantity = "velocities" if delta else "positions"
            chunk = m.joint_chunk_to_ros(msg, stamp, dt, robot.driver.joints, motion, quantity, self._chunks)
        else:
            name = robot.motion.name
            chunk = m.cartesian_chunk_to_ros(msg, stamp, dt, name, BASE_FRAME, motion, delta, self._chunks)
        chunks = [chunk]
        if robot.gripper is not None:
            value = action[:, robot.action_slice(robot.gripper)]
            quantity = gripper_quantity(robot.gripper)
            chunks.append(m.joint_chunk_to_ros(msg, stamp, dt, [robot.gripper.name], value, quantity, self._chunks))
        for publisher, message in zip(self._teleop, chunks, strict=True):
            publisher.publish(message)


def _turn(field: Field, goal: np.ndarray, motion: np.ndarray) -> np.ndarray:
    """Return a rotation field's value for a goal [7] that is `motion` [6] away."""
    if field.mode == "delta":
        return motion[3:]
    if field.kind == "ee_rotation_axis_angle":
        return logarithm(goal[3:])
    return np.concatenate([rotate(goal[3:], axis) for axis in np.eye(3)[:2]])  # two columns of its matrix


def _quaternion(field: Field, values: np.ndarray) -> np.ndarray:
    return quaternion_of_6d(values) if field.kind == "ee_rotation_6d" else exponential(values)


def run(
    *,
    bus: Mapping[str, Any],
    env: Mapping[str, Any],
    command_timeout: float,
    seed: int,
    driver_hz: float = 100.0,
    inject: bool = False,
    expert: bool = False,
) -> None:
    """Run a simulated arm until it is stopped.

    Args:
        bus: arguments of `open_bus`.
        env: plain values of `dita.config.EnvConfig`.
        command_timeout: of the driver [s].
        seed: of the start that it shows until it is reset.
        driver_hz: of the arm and its states.
        inject: have faults on request, see `robot_io.nodes.inject`.
        expert: publish the expert's actions as a teleoperator's.
    """
    from dita.config import EnvConfig, from_dict
    from dita.embodiment import embodiment_to_dict
    from dita.envs import make

    be_nice(-10)  # it stands for a robot, which waits for nobody
    config = from_dict(EnvConfig, env, "env")
    made = make(config, config.tasks[0])
    values = embodiment_to_dict(made.embodiment)
    node = TwinNode(open_bus(name="twin", **bus), made, values, command_timeout, driver_hz, inject, expert)
    node.reset({"episode": -1, "task": config.tasks[0], "seed": seed})
    serve(node)
