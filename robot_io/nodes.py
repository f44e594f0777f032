"""One entry per process: guard, policy, twin; `robot_io.live` runs the three together.

    python -m robot_io.nodes guard '{"tick_hz": 160}'

The guard's path imports neither torch, dita, hydra, zarr nor mujoco: it runs from a copy of this folder.
"""

import contextlib
import ctypes
import gc
import json
import os
import signal
import sys
from dataclasses import fields
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from robot_io import messages as m
from robot_io.bus import COMMAND, LATCHED, SENSOR, STATE, Bus, open_bus
from robot_io.core.chunk_buffer import Chunk
from robot_io.core.diagnostics import LoopTiming
from robot_io.core.guard import Guard, GuardConfig
from robot_io.core.limits import Field, parse_robot
from robot_io.core.policy_loop import PolicyLoop, Predictor
from robot_io.core.state_machine import State
from robot_io.core.sync import Synchronizer

TOOL_POSE = "/tool_pose"  # twin -> all: measured position
JOINTS = "/joint_states"  # twin -> policy: gripper and joints, by name
TARGET_POSE = "/target_pose"  # guard -> twin: the command topic
GRIPPER = "/gripper_controller/joint_trajectory"  # guard -> twin
CHUNK = "/dita/chunk"  # policy -> guard
CHUNK_GRIPPER = "/dita/chunk_gripper"  # policy -> guard: same stamp, which is the chunk's id
EXECUTED = "/dita/executed"  # guard -> policy
CONTRACT = "/dita/contract"  # policy -> all, latched
INSTRUCTION = "/dita/instruction"  # operator or twin -> policy, latched
ARM = "/dita/arm"  # operator -> guard
GUARD_STATE = "/dita/state"  # guard -> all
EPISODE = "/dita/episode"  # operator -> twin: reset
EPISODE_STATE = "/dita/episode_state"  # twin -> operator
DIAGNOSTICS = "/diagnostics"

BASE_FRAME = "base_link"
MAX_CATCH_UP = 20  # twin: steps it may be late before simulated time slips


def image_topic(camera: str) -> str:
    """Return the topic of a camera."""
    return f"/{camera}/image_raw"


def joint_names(field: Field) -> List[str]:
    """Return the names under which a state field travels as joints.

    Raises:
        ValueError: a tool rotation, which no joint state can carry.
    """
    if field.kind.startswith("ee_rotation"):
        raise ValueError(f"state field {field.name}: {field.kind} is not carried by the live stack yet")
    return [field.name] if field.size == 1 else [f"{field.name}_{i}" for i in range(field.size)]


def is_tool(field: Field) -> bool:
    """Return whether a state field travels as the tool's pose."""
    return field.kind == "ee_position"


def gripper_quantity(field: Field) -> str:
    """Return the trajectory quantity of a gripper field."""
    return "effort" if field.kind == "gripper_effort" else "positions"


class GuardNode:
    """The guard on a bus: the only writer of the command topic."""

    def __init__(self, bus: Bus, config: GuardConfig, contract: Optional[Mapping[str, Any]] = None) -> None:
        self.bus, self.config = bus, config
        self.guard: Optional[Guard] = None
        self.hash = ""
        self.refused = ""  # why the last arming was
        self.timing = LoopTiming(config.tick)
        self._stopping = False
        self._shown: Tuple[Any, ...] = ()
        self._gripper_sent: Optional[float] = None
        self._motion: Any = None  # the newest halves of a chunk, until both are there
        self._gripper: Any = None
        self._command = bus.publisher(TARGET_POSE, m.POSE, COMMAND)
        self._gripper_command = bus.publisher(GRIPPER, m.JOINT_TRAJECTORY, COMMAND)
        self._executed = bus.publisher(EXECUTED, m.CARTESIAN_TRAJECTORY, STATE)
        self._state = bus.publisher(GUARD_STATE, m.STRING, LATCHED)
        self._diagnostics = bus.publisher(DIAGNOSTICS, m.DIAGNOSTICS, STATE)
        bus.subscribe(TOOL_POSE, m.POSE, STATE, self._on_pose)
        bus.subscribe(CHUNK, m.CARTESIAN_TRAJECTORY, COMMAND, self._on_motion)
        bus.subscribe(CHUNK_GRIPPER, m.JOINT_TRAJECTORY, COMMAND, self._on_gripper)
        bus.subscribe(ARM, m.BOOL, STATE, self._on_arm)
        if contract is None:
            bus.subscribe(CONTRACT, m.STRING, LATCHED, self._on_contract)
        else:
            self.use(contract)
        bus.on_liveliness(CHUNK, self._on_policy_liveliness)
        self._anchor()
        bus.timer(config.tick, self._tick)
        bus.timer(0.1, self._watch)
        bus.timer(1.0, self._diagnose)

    def use(self, contract: Mapping[str, Any]) -> None:
        """Take the robot's description; another one than before is a fault until the guard is restarted."""
        if self.guard is None:
            self.guard = Guard(parse_robot(contract["embodiment"]), self.config)
            self.hash = contract["hash"]
            self.bus.log("info", f"guarding {self.guard.robot.name}, contract {self.hash[:12]}")
        elif contract["hash"] != self.hash:
            self.refused = f"the contract changed from {self.hash[:12]} to {contract['hash'][:12]}; restart the guard"
            self.guard.fault(self.refused, self.bus.now())
            self.bus.log("error", self.refused)

    def stop(self) -> None:
        """Decelerate, then leave."""
        self._stopping = True
        if self.guard is not None:
            self.guard.disarm("stopped")

    def close(self) -> None:
        """Leave the graph."""
        self.bus.close()

    def _anchor(self) -> None:
        """Tie the grid of ticks to both clocks."""
        self._steady, self._wall = self.bus.steady(), self.bus.now()

    def _tick(self) -> None:
        guard = self.guard
        if guard is None or (guard.state is State.IDLE and not guard.tracker.moving):
            self.timing.pause()
            self._anchor()
            if self._stopping:
                self.bus.shutdown()
            return
        steady = self.bus.steady()
        self.timing.begin(steady)
        periods = max(1, round((steady - self._steady) / self.config.tick))
        self._steady += periods * self.config.tick
        self._wall += periods * self.config.tick
        skew = (self.bus.now() - self._wall) - (steady - self._steady)
        if abs(skew) > self.config.max_skew:
            guard.fault(f"the wall clock jumped by {skew:.3f} s", self.bus.now())
            self._wall += skew
        self._wall += 0.01 * skew  # follow a clock that is being slewed, without a step in the stamps
        self._send(guard, self._wall, periods)
        self.timing.end(self.bus.steady())

    def _send(self, guard: Guard, now: float, periods: int) -> None:
        command, executed = guard.tick(now, periods)
        msg, motion, dt = self.bus.msg, guard.robot.motion, guard.robot.action_dt
        if command is not None:
            self._command.publish(m.pose_to_ros(msg, command.stamp, command.position, BASE_FRAME))
            if command.gripper != self._gripper_sent and command.gripper is not None and guard.robot.gripper:
                field, value = guard.robot.gripper, np.array([[command.gripper]])
                quantity = gripper_quantity(field)
                self._gripper_command.publish(
                    m.joint_chunk_to_ros(msg, command.stamp, dt, [field.name], value, quantity)
                )
                self._gripper_sent = command.gripper
        if executed is not None:
            chunk, index = executed.step.chunk.stamp, executed.step.index
            goal, delta = executed.goal, executed.delta
            self._executed.publish(m.executed_to_ros(msg, chunk, index, dt, motion.name, BASE_FRAME, goal, delta))
        self._show(guard)

    def _show(self, guard: Guard) -> None:
        shown = (guard.state.value, guard.machine.reason, self.refused)
        if shown != self._shown:
            self._shown = shown
            self._state.publish(
                m.json_to_ros(self.bus.msg, dict(zip(("state", "reason", "refused"), shown, strict=True)))
            )
            if guard.state in (State.HOLDING, State.FAULT):
                self.bus.log("warning", f"{guard.state.value}: {guard.machine.reason}")

    def _watch(self) -> None:
        if self.guard is not None:
            others = [w.node for w in self.bus.writers(TARGET_POSE)]
            if self.bus.name in others:
                others.remove(self.bus.name)
            self.guard.on_writers(others, self.bus.now())
            self._show(self.guard)

    def _diagnose(self) -> None:
        if self.guard is not None:
            level = {State.HOLDING: 1, State.FAULT: 2}.get(self.guard.state, 0)
            values = {**self.guard.to_dict(), **self.timing.to_dict()}
            text = f"{self.guard.state.value}: {self.guard.machine.reason}"
            self._diagnostics.publish(m.diagnostics_to_ros(self.bus.msg, self.bus.now(), "guard", level, text, values))

    def _on_contract(self, message: Any) -> None:
        try:
            self.use(m.json_from_ros(message))
        except (ValueError, KeyError, TypeError) as e:  # nothing that somebody sends may end the guard
            self.bus.log("error", f"contract refused: {e}")

    def _on_pose(self, message: Any) -> None:
        if self.guard is not None:
            self.guard.on_state(m.stamp_of(message), m.pose_from_ros(message)[0])

    def _on_motion(self, message: Any) -> None:
        self._motion = message
        self._on_chunk()

    def _on_gripper(self, message: Any) -> None:
        self._gripper = message
        self._on_chunk()

    def _on_chunk(self) -> None:
        """Hand a chunk to the guard once its halves are both there, and only once."""
        guard, motion, gripper = self.guard, self._motion, self._gripper
        if guard is None or motion is None:
            return
        if guard.robot.gripper is not None and (gripper is None or m.stamp_of(gripper) != m.stamp_of(motion)):
            return
        self._motion = self._gripper = None
        try:
            dt, values = m.cartesian_chunk_from_ros(motion, guard.robot.motion.mode == "delta")
            closing = None
            if guard.robot.gripper is not None:
                closing = m.joint_chunk_from_ros(gripper, gripper_quantity(guard.robot.gripper))[1][:, 0]
        except ValueError as e:
            self.bus.log("error", f"chunk refused: {e}")
            guard.counts["R0"] += 1
            return
        guard.on_chunk(Chunk(m.stamp_of(motion), dt, values, closing), self.bus.now())

    def _on_arm(self, message: Any) -> None:
        if self.guard is None:
            self.bus.log("error", f"not armed: no contract yet on {CONTRACT}; is the policy running?")
            return
        if not message.data:
            self.guard.disarm()
            return
        try:
            self.guard.arm(self.bus.now())
            self.refused, self._gripper_sent = "", None
        except ValueError as e:
            self.refused = str(e)
            self.bus.log("error", self.refused)
        self._show(self.guard)

    def _on_policy_liveliness(self, alive: int) -> None:
        if alive == 0 and self.guard is not None:
            self.guard.hold("the policy is gone", self.bus.now())


class PolicyNode:
    """Observations from topics into a policy, its chunks onto topics."""

    def __init__(
        self,
        bus: Bus,
        policy: Predictor,
        embodiment: Mapping[str, Any],
        contract_hash: str,
        observation: Callable[..., Any],
        *,
        n_obs_steps: int,
        seed: int,
        slop: float,
        max_age: float,
        interval: float,
    ) -> None:
        """Join the graph.

        Args:
            embodiment: plain values, `dita.embodiment.embodiment_to_dict`.
            observation: builds what the policy takes, from images, state, instruction and stamp.
            n_obs_steps: frames in a history.
            slop: largest spread of stamps within an observation [s].
            max_age: oldest observation to act on [s].
            interval: least time between two predictions' observations [s].
        """
        self.bus, self.robot, self._observation = bus, parse_robot(embodiment), observation
        self.error: Optional[BaseException] = None
        self._armed = False
        self._instruction = ""
        self._missing: Dict[str, int] = {}  # why there was no observation -> how often
        self._sync = Synchronizer(self.robot.cameras, self._sources(), slop, max_age)
        self._loop = PolicyLoop(
            policy, n_obs_steps, self.robot.obs_dt, self._publish, self._fail, seed, bus.steady, interval
        )
        self._contract = bus.publisher(CONTRACT, m.STRING, LATCHED)
        self._chunk = bus.publisher(CHUNK, m.CARTESIAN_TRAJECTORY, COMMAND)
        self._chunk_gripper = bus.publisher(CHUNK_GRIPPER, m.JOINT_TRAJECTORY, COMMAND)
        self._diagnostics = bus.publisher(DIAGNOSTICS, m.DIAGNOSTICS, STATE)
        for camera in self.robot.cameras:
            bus.subscribe(image_topic(camera), m.IMAGE, SENSOR, self._image_callback(camera))
        bus.subscribe(TOOL_POSE, m.POSE, STATE, self._on_pose)
        bus.subscribe(JOINTS, m.JOINT_STATE, STATE, self._on_joints)
        bus.subscribe(INSTRUCTION, m.STRING, LATCHED, self._on_instruction)
        bus.subscribe(GUARD_STATE, m.STRING, LATCHED, self._on_guard)
        self._contract.publish(m.json_to_ros(bus.msg, {"embodiment": dict(embodiment), "hash": contract_hash}))
        bus.timer(1.0, self._diagnose)
        self._loop.start()

    def stop(self) -> None:
        """End inference and leave."""
        self.bus.shutdown()

    def close(self) -> None:
        """Wait for the inference thread, leave the graph, and raise what inference raised."""
        self._loop.stop()
        self.bus.close()
        if self.error is not None:
            raise self.error

    def _sources(self) -> List[str]:
        tool = [TOOL_POSE for f in self.robot.state if is_tool(f)]
        return tool + ([JOINTS] if any(not is_tool(f) for f in self.robot.state) else [])

    def _image_callback(self, camera: str) -> Callable[[Any], None]:
        def on_image(message: Any) -> None:
            self._sync.offer(camera, m.stamp_of(message), m.image_from_ros(message))
            self._observe()

        return on_image

    def _on_pose(self, message: Any) -> None:
        self._sync.offer(TOOL_POSE, m.stamp_of(message), m.pose_from_ros(message)[0])

    def _on_joints(self, message: Any) -> None:
        self._sync.offer(JOINTS, m.stamp_of(message), m.joints_from_ros(message))

    def _on_instruction(self, message: Any) -> None:
        self._instruction = message.data

    def _on_guard(self, message: Any) -> None:
        armed = m.json_from_ros(message)["state"] in (State.ARMED, State.HOLDING)
        if armed and not self._armed:
            self._loop.clear()
        self._armed = armed

    def _observe(self) -> None:
        if not self._armed or not self._instruction:
            return
        found, reason = self._sync.latest(self.bus.now())
        if found is None:
            self._missing[reason] = self._missing.get(reason, 0) + 1
            return
        stamp, values = found
        images = {camera: values[camera] for camera in self.robot.cameras}
        state = np.concatenate([self._field(f, values) for f in self.robot.state]).astype(np.float32)
        self._loop.offer(self._observation(images, state, self._instruction, stamp))

    def _field(self, field: Field, values: Mapping[str, Any]) -> np.ndarray:
        if is_tool(field):
            return values[TOOL_POSE]
        joints, names = values[JOINTS], joint_names(field)
        missing = [name for name in names if name not in joints]
        if missing:
            raise ValueError(f"{JOINTS} has {', '.join(joints)} but the policy needs {', '.join(missing)}")
        return np.array([joints[name] for name in names])

    def _publish(self, chunk: Any) -> None:
        """Send a chunk's fields; called in the inference thread."""
        msg, robot = self.bus.msg, self.robot
        values = np.asarray(chunk.values, float)
        motion, gripper = values[:, robot.action_slice(robot.motion)], values[:, robot.action_slice(robot.gripper)]
        delta = robot.motion.mode == "delta"
        if robot.gripper is not None:
            names, quantity = [robot.gripper.name], gripper_quantity(robot.gripper)
            closing = m.joint_chunk_to_ros(msg, chunk.stamp, chunk.action_dt, names, gripper, quantity)
            self._chunk_gripper.publish(closing)
        self._chunk.publish(
            m.cartesian_chunk_to_ros(msg, chunk.stamp, chunk.action_dt, robot.motion.name, BASE_FRAME, motion, delta)
        )

    def _fail(self, error: BaseException) -> None:
        self.error = error
        self.bus.shutdown()

    def _diagnose(self) -> None:
        values: Dict[str, Any] = {"inferences": self._loop.inference.count}
        values.update(self._loop.inference.to_dict("execution_time"))
        values.update({f"no observation: {reason}": n for reason, n in self._missing.items()})
        self._diagnostics.publish(m.diagnostics_to_ros(self.bus.msg, self.bus.now(), "policy", 0, "", values))


class TwinNode:
    """A simulated arm behind a driver's topics, in real time."""

    def __init__(self, bus: Bus, env: Any, embodiment: Mapping[str, Any], command_timeout: float) -> None:
        """Join the graph.

        Args:
            env: a `dita.envs` RobotEnv, or anything with its reset, step, observe, success, warnings,
                instruction and commanded_position.
            embodiment: the env's, as plain values.
            command_timeout: without a command for this long [s] the arm holds, as a driver does.
        """
        self.bus, self.env, self.robot = bus, env, parse_robot(embodiment)
        self._timeout = command_timeout
        self._dt = 1.0 / embodiment["control_hz"]
        self._per_image = round(self.robot.obs_dt / self._dt)
        self._episode: Dict[str, Any] = {}
        self._images = {c: bus.publisher(image_topic(c), m.IMAGE, SENSOR) for c in self.robot.cameras}
        self._pose = bus.publisher(TOOL_POSE, m.POSE, STATE)
        self._joints = bus.publisher(JOINTS, m.JOINT_STATE, STATE)
        self._instruction = bus.publisher(INSTRUCTION, m.STRING, LATCHED)
        self._state = bus.publisher(EPISODE_STATE, m.STRING, STATE)
        bus.subscribe(TARGET_POSE, m.POSE, COMMAND, self._on_target)
        bus.subscribe(GRIPPER, m.JOINT_TRAJECTORY, COMMAND, self._on_gripper)
        bus.subscribe(EPISODE, m.STRING, STATE, self._on_episode)
        bus.timer(self._dt, self._run)

    def stop(self) -> None:
        """Leave."""
        self.bus.shutdown()

    def close(self) -> None:
        """Free the simulator's renderers and leave the graph."""
        self.env.close()
        self.bus.close()

    def _on_episode(self, message: Any) -> None:
        order = m.json_from_ros(message)
        if order["episode"] != self._episode.get("episode"):
            self.reset(order)

    def reset(self, order: Mapping[str, Any]) -> None:
        """Begin an episode: its number, task and seed."""
        self.env.reset(seed=order["seed"], options={"task": order["task"]})
        self._target: Optional[np.ndarray] = None
        self._target_time = -np.inf
        gripper = self.robot.gripper
        self._closing = np.zeros(0) if gripper is None else 0.5 * (gripper.low + gripper.high)
        self._begin, self._start, self._done = self.bus.now(), self.bus.steady(), 0
        self._episode = {
            **order,
            **{"steps": 0, "success": False, "clipped": 0, "timeouts": 0, "refused": 0, "slipped_s": 0.0},
        }
        self._instruction.publish(self.bus.msg(m.STRING, data=self.env.instruction))
        self._send_images(self._begin)

    def _on_target(self, message: Any) -> None:
        position = m.pose_from_ros(message)[0]
        if not np.all(np.isfinite(position)):
            self._refuse("a target pose")  # MuJoCo would silently zero every control
        elif self._episode:
            self._target, self._target_time = position, self.bus.now()

    def _on_gripper(self, message: Any) -> None:
        assert self.robot.gripper is not None
        value = m.joint_chunk_from_ros(message, gripper_quantity(self.robot.gripper))[1][-1]
        if not np.all(np.isfinite(value)):
            self._refuse("a gripper command")
        elif self._episode:
            self._closing = value

    def _refuse(self, what: str) -> None:
        self.bus.log("error", f"{what} is not finite and was refused")
        if self._episode:
            self._episode["refused"] += 1

    def _run(self) -> None:
        """Make every step that time asks for; too far behind, simulated time slips and the factor drops below 1."""
        if not self._episode:
            return
        due = int((self.bus.steady() - self._start) / self._dt)
        if due - self._done > MAX_CATCH_UP:
            late = (due - self._done - 1) * self._dt
            self._begin, self._start = self._begin + late, self._start + late
            self._episode["slipped_s"] += late
            due = self._done + 1
        while self._done < due:
            self._step()

    def _step(self) -> None:
        observation = self.env.step(self._action())[0]
        self._done += 1
        stamp = self._begin + self._done * self._dt
        self._episode["steps"] += self._target is not None
        self._episode["success"] = bool(self.env.success)
        if self._done % self._per_image == 0:
            self._send_images(stamp)
        else:
            self._send_state(stamp, observation["state"])

    def _action(self) -> np.ndarray:
        """Return the env's SI action toward the target, or to stay where the arm is commanded to be."""
        commanded = np.asarray(self.env.commanded_position, float)
        if self._target is not None and self.bus.now() - self._target_time > self._timeout:
            self._target = None
            self._episode["timeouts"] += 1
        target = commanded if self._target is None else self._target
        field = self.robot.motion
        motion = target - commanded if field.mode == "delta" else target
        clipped = np.clip(motion, field.low, field.high)
        self._episode["clipped"] += bool(np.any(np.abs(clipped - motion) > 1e-9))
        action = np.zeros(self.robot.action_dim, np.float32)
        action[self.robot.action_slice(field)] = clipped
        action[self.robot.action_slice(self.robot.gripper)] = self._closing
        return action

    def _send_images(self, stamp: float) -> None:
        observation = self.env.observe()
        self._send_state(stamp, observation.state)  # first: an image is paired with the state that is there by then
        for camera, publisher in self._images.items():
            publisher.publish(m.image_to_ros(self.bus.msg, stamp, observation.images[camera], camera))
        self._report()

    def _send_state(self, stamp: float, state: np.ndarray) -> None:
        joints: Dict[str, float] = {}
        start = 0
        for field in self.robot.state:
            values = np.asarray(state[start : start + field.size], float)
            start += field.size
            if is_tool(field):
                self._pose.publish(m.pose_to_ros(self.bus.msg, stamp, values, BASE_FRAME))
            else:
                joints.update(zip(joint_names(field), values.tolist(), strict=True))
        if joints:
            self._joints.publish(m.joints_to_ros(self.bus.msg, stamp, joints))

    def _report(self) -> None:
        simulated = self._done * self._dt
        factor = simulated / (simulated + self._episode["slipped_s"]) if simulated else 1.0
        self._state.publish(
            m.json_to_ros(self.bus.msg, {**self._episode, "real_time_factor": factor, "warnings": self.env.warnings()})
        )


def guard(*, bus: Mapping[str, Any], contract: Optional[str] = None, tick_hz: float, **limits: float) -> None:
    """Run the guard until it is stopped.

    Args:
        bus: arguments of `open_bus`.
        contract: JSON file with embodiment and hash; None: wait for it on /dita/contract.
        tick_hz: of the output, at least 100.
        limits: the other fields of `GuardConfig`.
    """
    config = GuardConfig(tick=1.0 / tick_hz, **limits)
    with contextlib.suppress(PermissionError):  # real-time priority, as ros2_control asks for; not everybody may
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
    values = None
    if contract is not None:
        with open(contract, encoding="utf-8") as file:
            values = json.load(file)
    _serve(GuardNode(open_bus(name="guard", **bus), config, values))


def policy(
    *,
    bus: Mapping[str, Any],
    checkpoint: str,
    embodiment: str,
    seed: int,
    num_inference_steps: Optional[int],
    device: str,
    precision: Any,
    path: Any,
    slop: float,
    max_age: float,
    interval: float,
) -> None:
    """Run a checkpoint's policy until it is stopped; arguments as in `PolicyNode`."""
    import torch

    from dita.embodiment import embodiment_to_dict
    from dita.policy.fast import PolicySession
    from dita.policy.policy import DitaPolicy
    from dita.types import RawObservation

    torch.set_num_threads(1)  # the guard and the twin need the other core
    model = DitaPolicy.from_pretrained(checkpoint, device, precision)
    session = PolicySession(model, embodiment=embodiment, num_inference_steps=num_inference_steps, path=path)
    spec = embodiment_to_dict(model.specs[embodiment])
    node = PolicyNode(
        open_bus(name="policy", **bus),
        session,
        spec,
        model.contract.hash_of(embodiment),
        RawObservation,
        n_obs_steps=model.config.n_obs_steps,
        seed=seed,
        slop=slop,
        max_age=max_age,
        interval=interval,
    )
    _serve(node)


def twin(*, bus: Mapping[str, Any], env: Mapping[str, Any], command_timeout: float, seed: int) -> None:
    """Run a simulated arm until it is stopped.

    Args:
        bus: arguments of `open_bus`.
        env: plain values of `dita.config.EnvConfig`.
        command_timeout: of the driver [s].
        seed: of the start that it shows until it is reset.
    """
    from dita.config import EnvConfig, from_dict
    from dita.embodiment import embodiment_to_dict
    from dita.envs import make

    config = from_dict(EnvConfig, env, "env")
    made = make(config, config.tasks[0])
    node = TwinNode(open_bus(name="twin", **bus), made, embodiment_to_dict(made.embodiment), command_timeout)
    node.reset({"episode": -1, "task": config.tasks[0], "seed": seed})
    _serve(node)


def _serve(node: Any) -> None:
    """Spin until SIGINT, SIGTERM or the node's own end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: node.stop())
    gc.collect()
    gc.freeze()  # or the collector would go through everything that was imported, for 30 ms in the middle of a tick
    node.bus.spin()
    node.close()


def ros2_guard() -> None:
    """Run the guard as a ROS 2 lifecycle node (`ros2 run robot_io guard`); its knobs are node parameters."""
    bus = open_bus("rclpy", "guard", int(os.environ.get("ROS_DOMAIN_ID", "0")))
    values = {field.name: bus.param(field.name, 0.0) for field in fields(GuardConfig) if field.name != "tick"}
    tick_hz = bus.param("tick_hz", 0.0)
    if not tick_hz > 0:
        raise ValueError("guard: set its parameters (tick_hz, ...), as launch/dita.launch.py does")
    _serve(GuardNode(bus, GuardConfig(tick=1.0 / tick_hz, **values)))


NODES: Dict[str, Callable[..., None]] = {"guard": guard, "policy": policy, "twin": twin}


def main(arguments: Sequence[str]) -> int:
    """Run one node: its name, its arguments as JSON, and `--with-parent` to end when the parent does."""
    name, values, *flags = arguments
    if name not in NODES:
        print(f"error: no node {name!r}; there are {', '.join(NODES)}", file=sys.stderr)
        return 2
    if "--with-parent" in flags:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    try:
        NODES[name](**json.loads(values))
    except (ValueError, KeyError, OSError, TypeError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # DDS's own threads may outlive Python's clean-up
