"""The guard on a bus: the only writer of the command topic.

It takes limits and driver from its own embodiment file, never from the wire. Imports neither torch, dita, hydra, zarr
nor mujoco: it runs from a copy of this folder.
"""

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Tuple, Union

import numpy as np

from robot_io import messages as m
from robot_io.bus import COMMAND, LATCHED, SENSOR, STATE, Bus, Services, open_bus
from robot_io.core.chunk_buffer import Chunk
from robot_io.core.diagnostics import LoopTiming
from robot_io.core.guard import Guard, GuardConfig
from robot_io.core.kinematics import Kinematics
from robot_io.core.limits import Robot, parse_robot
from robot_io.core.state_machine import State
from robot_io.nodes.serve import serve
from robot_io.nodes.topics import (
    APPROVAL,
    APPROVE,
    ARM,
    BASE_FRAME,
    CHUNK,
    CHUNK_GRIPPER,
    CONTRACT,
    DIAGNOSTICS,
    EXECUTED,
    GUARD_STATE,
    HEARTBEAT,
    NO_INSTRUCTION,
    POLICY_STATE,
    PREFLIGHT,
    SPEED,
    TAKEOVER,
    TELEOP,
    TELEOP_GRIPPER,
    chunk_type,
    command_type,
    gripper_quantity,
    joint_names,
)

LOCAL = ("limits", "driver", "robot")  # of an embodiment: what a policy does not say about a robot
WATCH_S = 0.05  # how often the command topic's writers are looked at: a second one is a fault within 200 ms
STOP_S = 4.0  # after which the process leaves even if it still moves: the driver's timeout holds the arm then
STANDING_S = 1.0  # that a policy gets, once it is asked to act, to take back what it said before
DIAGNOSE_S = 0.5  # so that what was dropped is named within a second
SETTLE_S = 1.0  # that discovery takes to find the others; 0.5 s was too short on two busy cores
MOST_STEPS = 1024  # of a chunk
HALVES = 8  # of chunks that wait for the other half
SHOWN = 3  # differences that are named in one line
UNKNOWN = "unknown"  # a contract of nobody


def load_robot(embodiment: Union[str, Path, Mapping[str, Any]]) -> Tuple[Robot, Dict[str, Any]]:
    """Read a robot with its limits, its driver and, where the file names a URDF, its kinematics.

    Args:
        embodiment: a JSON or YAML file, or its plain values; a URDF's path is relative to the file.

    Returns:
        The robot and the plain values.

    Raises:
        OSError: no such file.
        ValueError: not such a file, limits that the action needs are missing, or the URDF does not fit.
    """
    values, folder = embodiment, Path()
    if not isinstance(embodiment, Mapping):
        folder = Path(embodiment).parent
        text = Path(embodiment).read_text(encoding="utf-8")
        if str(embodiment).endswith(".json"):
            values = json.loads(text)
        else:
            import yaml

            try:
                values = yaml.safe_load(text)
            except yaml.YAMLError as e:
                raise ValueError(f"{embodiment}: not YAML: {' '.join(str(e).split())}") from None
    if not isinstance(values, Mapping):
        raise ValueError(f"{embodiment}: an embodiment is a mapping, got {type(values).__name__}")
    robot = parse_robot(values)
    if robot.limits.urdf is None:
        return robot, dict(values)
    where = f"embodiment {robot.name}.limits"
    if robot.limits.tool is None:
        raise ValueError(f"{where}: with a urdf, tool names the link whose speed is limited")
    shapes = None if values["limits"].get("capsules") is None else robot.limits.capsules
    kinematics = Kinematics.from_urdf(
        folder / robot.limits.urdf, robot.limits.tool, shapes, ignore_pairs=robot.limits.ignore_pairs
    )
    if robot.space.name == "joint" and kinematics.joints != robot.driver.joints:
        theirs, ours = ", ".join(kinematics.joints), ", ".join(robot.driver.joints)
        raise ValueError(f"{where}: the urdf moves {theirs}; driver.joints must be the same in order, got {ours}")
    return dataclasses.replace(robot, kinematics=kinematics), dict(values)


def contract_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> List[str]:
    """Name every field in which two embodiments differ, but for limits, driver and wording."""
    mine = {key: value for key, value in ours.items() if key not in LOCAL}
    other = {key: value for key, value in theirs.items() if key not in LOCAL}
    return list(_differences("", mine, other))


def _differences(path: str, ours: Any, theirs: Any) -> Iterator[str]:
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        for key in sorted({*ours, *theirs}):
            yield from _differences(f"{path}.{key}".lstrip("."), ours.get(key), theirs.get(key))
    elif isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)) and len(ours) == len(theirs):
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            label = a.get("name", i) if isinstance(a, Mapping) else i
            yield from _differences(f"{path}.{label}", a, b)
    elif ours != theirs:
        yield f"{path} is {_short(theirs)} for the policy and {_short(ours)} here"


def _short(value: Any) -> str:
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
        return f"[{', '.join(str(v.get('name', '?')) for v in value)}]"
    return repr(value)


class GuardNode:
    """The guard on a bus: the only writer of the command topic."""

    def __init__(
        self,
        bus: Bus,
        config: GuardConfig,
        embodiment: Union[str, Path, Mapping[str, Any]],
        *,
        require_preflight: bool,
        settle: float = 0.0,
    ) -> None:
        """Join the graph.

        Args:
            embodiment: this robot's own file or plain values, with limits and driver.
            require_preflight: refuse to arm until /dita/preflight says that this contract passed.
            settle: refuse to arm for so long after joining [s]: discovery takes time to find other writers of commands,
                and the policy's contract to come.

        Raises:
            OSError, ValueError: as `load_robot`.
        """
        self.bus, self.config = bus, config
        self.robot, self._embodiment = load_robot(embodiment)
        self.guard = Guard(self.robot, config)
        self.hash = ""  # of the policy's contract
        self.refused = ""  # why the last arming was
        self.timing = LoopTiming(config.tick)
        self._contract: Optional[Dict[str, Any]] = None  # the newest one; compared when nothing moves
        self._require_preflight = require_preflight
        self._settled_at, self._settle = bus.steady() + settle, settle
        self._preflight: Dict[str, Any] = {}  # the newest verdict
        self._problems: Dict[str, str] = {}  # what keeps it from arming, by topic
        self._mismatches: List[str] = []
        self._standing: Optional[Tuple[str, str]] = None  # what keeps the policy from acting, and its reaction
        self._asked = np.inf  # steady time since when it is asked to act, until what stood before then was heeded
        self._said: Dict[str, float] = {}  # error -> when it was logged
        self._strangers: Tuple[str, ...] = ()  # names of joint states that hold none of ours
        self._gripper: Optional[float] = None  # measured
        self._orientation = np.array(m.IDENTITY)  # measured; kept where the action has no rotation
        self._held_orientation = self._orientation
        self._gripper_sent: Optional[float] = None
        self._halves: Dict[Tuple[str, int], Dict[float, Any]] = {}  # motions and grippers by stamp
        self._stopping = False
        self._leave_at = np.inf
        self._sending = False
        self._shown: Tuple[Any, ...] = ()
        self._open()

    def _open(self) -> None:
        bus, driver = self.bus, self.robot.driver
        joint = self.robot.space.name == "joint"
        self._command = bus.publisher(driver.command_topic, command_type(self.robot), COMMAND)
        if self.robot.gripper is not None:
            kind = m.GRIPPER_COMMAND if driver.gripper == "gripper_command" else m.JOINT_TRAJECTORY
            self._gripper_command = bus.publisher(driver.gripper_topic, kind, COMMAND)
        self._executed = bus.publisher(EXECUTED, chunk_type(self.robot), STATE)
        self._state = bus.publisher(GUARD_STATE, m.STRING, LATCHED)
        self._diagnostics = bus.publisher(DIAGNOSTICS, m.DIAGNOSTICS, STATE)
        # best effort: only the newest state or sign of life counts, and a lost one must not keep the next ones waiting
        if joint or self.robot.gripper is not None:
            self._subscribe(driver.joints_topic, m.JOINT_STATE, SENSOR, self._on_joints)
        if not joint:
            self._subscribe(driver.pose_topic, m.POSE, SENSOR, self._on_pose)
        for source, motion, gripper in (("policy", CHUNK, CHUNK_GRIPPER), ("teleop", TELEOP, TELEOP_GRIPPER)):
            self._subscribe(motion, chunk_type(self.robot), COMMAND, self._half(source, 0))
            if self.robot.gripper is not None:
                self._subscribe(gripper, m.JOINT_TRAJECTORY, COMMAND, self._half(source, 1))
            bus.on_liveliness(motion, self._liveliness(source))
        self._subscribe(CONTRACT, m.STRING, LATCHED, lambda message: self.use(m.json_from_ros(message)))
        self._subscribe(PREFLIGHT, m.STRING, LATCHED, self._on_preflight)
        self._subscribe(driver.mode_topic, m.STRING, LATCHED, self._on_mode)
        self._subscribe(ARM, m.BOOL, STATE, self._on_arm)
        self._subscribe(HEARTBEAT, m.STRING, SENSOR, self._on_heartbeat)
        self._subscribe(POLICY_STATE, m.STRING, LATCHED, self._on_policy_state)
        self._subscribe(TAKEOVER, m.STRING, STATE, self._on_takeover)
        self._subscribe(SPEED, m.FLOAT, STATE, self._on_speed)
        self._subscribe(APPROVAL, m.BOOL, STATE, self._on_approval)
        self._subscribe(APPROVE, m.STRING, STATE, self._on_approve)
        if isinstance(bus, Services):
            bus.service(ARM, "std_srvs/srv/SetBool", self._serve_arm)
        else:
            bus.log("info", f"no services on this bus: arm and disarm by topic, {ARM}")
        bus.on_qos_mismatch(self._on_mismatch)
        self._anchor()
        bus.timer(self.config.tick, self._tick)
        bus.timer(WATCH_S, self._watch)
        bus.timer(DIAGNOSE_S, self._diagnose)
        bus.log("info", f"guarding {self.robot.name}: {driver.command} on {driver.command_topic}")
        self._show()

    def _subscribe(self, topic: str, type: str, qos: Any, callback: Callable[[Any], None]) -> None:
        """Subscribe; a message that makes no sense is refused and counted, whoever sends it."""

        def checked(message: Any) -> None:
            try:
                callback(message)
            except (ValueError, KeyError, TypeError, AttributeError) as e:
                self.guard.on_problem(f"message refused on {topic}", "R0", self.bus.now())
                self._say(f"message refused on {topic}: {type_of(e)}{e}")

        self.bus.subscribe(topic, type, qos, checked)

    def _say(self, text: str) -> None:
        """Log an error, the same one once a second at most: a stream of bad messages must not fill the disk."""
        now = self.bus.steady()
        if now >= self._said.get(text, -np.inf) + 1.0:
            self._said = {**{t: at for t, at in self._said.items() if now < at + 1.0}, text: now}
            self.bus.log("error", text)

    # ---- who may arm

    def use(self, contract: Mapping[str, Any]) -> None:
        """Take the policy's description of the robot and compare it with this robot's own.

        Another contract while armed is a fault; it counts once the guard is idle.

        Raises:
            ValueError, KeyError: not a contract.
        """
        if not isinstance(contract, Mapping) or not isinstance(contract["hash"], str):
            raise ValueError("a contract has embodiment and hash")
        if not isinstance(contract["embodiment"], Mapping):
            raise ValueError("a contract's embodiment is a mapping")
        self._contract = {"embodiment": dict(contract["embodiment"]), "hash": contract["hash"]}
        if self.guard.state is not State.IDLE and not self.hash:  # armed for a human: its chunks stay refused
            self._problems[CONTRACT] = "a policy joined after arming; disarm, and it counts"
            self._show()
        elif self.guard.state is not State.IDLE and contract["hash"] != self.hash:
            changed = f"the contract changed from {self.hash[:12]} to {contract['hash'][:12]}"
            self._problems[CONTRACT] = f"{changed}; disarm, and the new one counts"
            self.guard.fault(changed, self.bus.now())
            self.bus.log("error", self._problems[CONTRACT])
            self._show()
        self._adopt()

    def _adopt(self) -> None:
        """Compare the newest contract, once nothing moves."""
        if self._contract is None or self.guard.state is not State.IDLE:
            return
        contract, self._contract = self._contract, None
        self.hash = contract["hash"]
        different = contract_differences(self._embodiment, contract["embodiment"])
        self._problems.pop(CONTRACT, None)
        if different:
            more = f" and {len(different) - SHOWN} more" if len(different) > SHOWN else ""
            listed = ", ".join(different[:SHOWN])
            self._problems[CONTRACT] = f"the policy is for another robot than {self.robot.name}: {listed}{more}"
            self.bus.log("error", self._problems[CONTRACT])
        else:
            self.bus.log("info", f"contract {self.hash[:12]} fits {self.robot.name}")
        self._show()

    def _on_preflight(self, message: Any) -> None:
        values = m.json_from_ros(message)
        if not isinstance(values, Mapping) or not isinstance(values["passed"], bool):
            raise ValueError("a preflight's verdict has passed, items and contract")
        self._preflight = dict(values)

    def _preflight_problem(self) -> Optional[str]:
        verdict = self._preflight
        if not self._require_preflight:
            return None
        if not verdict:
            return "no preflight yet: run `dita robot preflight`, or start the guard with --i-know"
        if not verdict["passed"]:
            return f"preflight failed: {_failed(verdict)}"
        if verdict.get("embodiment", self.robot.name) != self.robot.name:
            return f"preflight passed for {verdict['embodiment']}, but this is {self.robot.name}: run it again"
        if (verdict.get("contract") or "") != self.hash:
            there, here = str(verdict.get("contract"))[:12], self.hash[:12] or UNKNOWN
            return f"preflight passed for contract {there}, but the policy's is {here}: run it again"
        return None

    def arm(self) -> None:
        """Begin to execute.

        Raises:
            ValueError: it is not safe to; says why.
        """
        self._adopt()
        problems = [*self._problems.values(), self._preflight_problem(), *self._blind()]
        if self.bus.steady() < self._settled_at:
            problems.append(f"it has just joined and listens for {self._settle:g} s who else is there: ask again")
        listed = [problem for problem in problems if problem]
        try:
            if listed and self.guard.state not in (State.ARMED, State.HOLDING):
                raise ValueError(f"not armed: {'; '.join(listed)}")
            self._held_orientation = self._orientation
            again = self.guard.state in (State.ARMED, State.HOLDING)
            self.guard.arm(self.bus.now())
            self._asked = self._asked if again else self.bus.steady()
            self.refused, self._gripper_sent = "", None
        except ValueError as e:
            self.refused = str(e)
            self.bus.log("error", self.refused)
            raise
        finally:
            self._show()

    def _blind(self) -> List[str]:
        """Say why no state may be coming in."""
        if self._strangers:
            ours, theirs = ", ".join(self._wanted()), ", ".join(self._strangers)
            return [f"{self.robot.driver.joints_topic} has {theirs}, but the arm's joints are {ours}"]
        return []

    def disarm(self, reason: str = "disarmed") -> None:
        """Decelerate, then send nothing."""
        self.guard.disarm(reason)
        self._show()

    def _on_arm(self, message: Any) -> None:
        if not message.data:
            self.disarm()
            return
        with contextlib.suppress(ValueError):  # said on /dita/state
            self.arm()

    def _serve_arm(self, request: Any) -> Dict[str, Any]:
        if not request.data:
            self.disarm()
            return {"success": True, "message": self.guard.state.value}
        try:
            self.arm()
        except ValueError as e:
            return {"success": False, "message": str(e)}
        return {"success": True, "message": self.guard.state.value}

    # ---- leaving

    def stop(self, reason: str = "stopped") -> None:
        """Decelerate, then leave."""
        self._stopping = True
        self._leave_at = min(self._leave_at, self.bus.steady() + STOP_S)
        self.guard.disarm(reason)
        self._show()

    def on_stop(self, reason: str) -> None:
        """Brake after an exception in a callback, or a lifecycle transition, and leave."""
        self.guard.fault(reason, self.bus.now())
        self._show()
        self.stop(reason)

    def close(self) -> None:
        """Leave the graph."""
        self.bus.close()

    # ---- the tick

    def _anchor(self) -> None:
        """Tie the grid of ticks to both clocks."""
        self._steady, self._wall = self.bus.steady(), self.bus.now()

    def _arrival(self) -> float:
        """Return the time of a message's arrival; the later one while a jump of the clock waits for the next tick."""
        return max(self.bus.now(), self._wall + (self.bus.steady() - self._steady))

    def _tick(self) -> None:
        guard = self.guard
        steady = self.bus.steady()
        if guard.state is State.IDLE and not guard.tracker.moving:
            self._rest()
            self.timing.pause()
            self._anchor()
            if self._stopping:
                self.bus.shutdown()
            return
        if steady > self._leave_at:
            self.bus.log("error", "still moving: left to the driver's timeout")
            self.bus.shutdown()
            return
        self.timing.begin(steady)
        periods = max(1, round((steady - self._steady) / self.config.tick))
        self._steady += periods * self.config.tick
        self._wall += periods * self.config.tick
        skew = (self.bus.now() - self._wall) - (steady - self._steady)
        if abs(skew) > self.config.max_skew:
            self._wall += skew
            guard.on_clock_jump(skew, self._wall)
        self._wall += 0.01 * skew  # follow a clock that is being slewed, without a step in the stamps
        self._heed(steady)
        self._send(self._wall, periods)
        self.timing.end(self.bus.steady())

    def _send(self, now: float, periods: int) -> None:
        command, executed = self.guard.tick(now, periods)
        if command is not None:
            velocity = command.velocity if self.guard.tracker.moving else np.zeros(self.robot.space.tangent)
            self._command.publish(self._command_message(command.stamp, command.configuration, velocity))
            self._sending = True
            self._send_gripper(command.stamp, command.gripper)
        if executed is not None:
            self._report(executed, now)
        self._show()

    def _command_message(self, stamp: float, x: np.ndarray, velocity: np.ndarray) -> Any:
        msg, driver = self.bus.msg, self.robot.driver
        if driver.command == "joint_trajectory":
            return m.joint_command_to_ros(msg, stamp, driver.joints, x, velocity, self.config.tick)
        if driver.command == "position_array":
            return m.array_to_ros(msg, x)
        turn = self.robot.space.rotation
        if driver.command == "twist":
            return m.twist_to_ros(msg, stamp, velocity[:3], velocity[3:] if turn else np.zeros(3), BASE_FRAME)
        return m.pose_to_ros(msg, stamp, x[:3], BASE_FRAME, x[3:] if turn else self._held_orientation)

    def _send_gripper(self, stamp: float, value: Optional[float]) -> None:
        if value is None or value == self._gripper_sent or self.robot.gripper is None:
            return
        msg, driver = self.bus.msg, self.robot.driver
        if driver.gripper == "gripper_command":
            message = m.gripper_command_to_ros(msg, value)
        else:
            quantity, dt = gripper_quantity(self.robot.gripper), self.robot.action_dt
            message = m.gripper_to_ros(msg, stamp, driver.gripper_names, value, quantity, dt)
        self._gripper_command.publish(message)
        self._gripper_sent = value

    def _report(self, executed: Any, now: float) -> None:
        chunk, joint = executed.step.chunk, self.robot.space.name == "joint"
        step = m.ExecutedStep(
            chunk.stamp,
            chunk.id,
            executed.step.index,
            now,
            executed.goal,
            executed.delta,
            executed.source,
            executed.gripper,
        )
        names = self.robot.driver.joints if joint else [self.robot.motion.name]
        self._executed.publish(m.executed_to_ros(self.bus.msg, step, self.robot.action_dt, names, joint))

    def _rest(self) -> None:
        """Say once that a velocity command is over: a driver would go on with the last one until its timeout."""
        if self._sending and self.robot.driver.command == "twist":
            zero = np.zeros(3)
            self._command.publish(m.twist_to_ros(self.bus.msg, self.bus.now(), zero, zero, BASE_FRAME))
        self._sending = False

    # ---- what it says

    def _show(self) -> None:
        guard = self.guard
        pending = guard.pending.id if guard.pending is not None else None
        shown = (guard.state.value, guard.machine.reason, self.refused)
        controls = (guard.active, guard.speed_scale, guard.approval, pending)
        if (*shown, *controls) == self._shown:
            return
        changed = self._shown[:3] != shown
        self._shown = (*shown, *controls)
        keys = ("state", "reason", "refused", "source", "speed", "approval", "pending")
        self._state.publish(m.json_to_ros(self.bus.msg, dict(zip(keys, self._shown, strict=True))))
        if changed:
            self._diagnose()
            if guard.state in (State.HOLDING, State.FAULT):
                self.bus.log("warning", f"{guard.state.value}: {guard.machine.reason}")

    def _diagnose(self) -> None:
        level = {State.HOLDING: 1, State.FAULT: 2}.get(self.guard.state, 0)
        values: Dict[str, Any] = {**self.guard.to_dict(), **self.timing.to_dict()}
        text = f"{self.guard.state.value}: {self.guard.machine.reason}"
        if self.refused:
            text, level = f"{text}; {self.refused}", max(level, 1)
        values.update({f"mismatch {i}": mismatch for i, mismatch in enumerate(self._mismatches)})
        self._diagnostics.publish(m.diagnostics_to_ros(self.bus.msg, self.bus.now(), "guard", level, text, values))

    def _watch(self) -> None:
        """Look for other writers where only the guard may write; a second guard has its name, too."""
        topics = [self.robot.driver.command_topic]
        if self.robot.gripper is not None:
            topics.append(self.robot.driver.gripper_topic)
        others: List[str] = []
        for topic in topics:
            nodes = [writer.node for writer in self.bus.writers(topic)]
            if self.bus.name in nodes:
                nodes.remove(self.bus.name)
            others += [node for node in nodes if node not in others]
        self.guard.on_writers(others, self.bus.now())
        self._show()

    def _on_mismatch(self, text: str) -> None:
        if text not in self._mismatches:
            self._mismatches.append(text)
        self._say(text)
        self._diagnose()

    # ---- what it hears

    def _on_pose(self, message: Any) -> None:
        position, orientation = m.pose_from_ros(message)
        if not abs(np.linalg.norm(orientation) - 1) < 1e-3:
            raise ValueError(f"the orientation {orientation.tolist()} is not a unit quaternion (wxyz)")
        self._orientation = orientation
        x = np.concatenate([position, self._orientation]) if self.robot.space.rotation else position
        self.guard.on_state(m.stamp_of(message), x, self._gripper, self._arrival())
        self._show()

    def _wanted(self) -> Tuple[str, ...]:
        return self.robot.driver.joints

    def _on_joints(self, message: Any) -> None:
        topic = self.robot.driver.joints_topic
        try:
            positions = self._map(m.joints_from_ros(message))
        except ValueError as e:
            self._problems[topic] = f"{topic}: {e}"
            self.guard.on_problem(self._problems[topic], "R3", self.bus.now())
            self._show()
            return
        self._problems.pop(topic, None)
        if positions is not None:
            self.guard.on_state(m.stamp_of(message), positions, self._gripper, self._arrival())
            self._show()

    def _map(self, found: Dict[str, float]) -> Optional[np.ndarray]:
        """Return the arm's joints in its order, None if there are none; note the gripper.

        Raises:
            ValueError: some of the arm's joints are missing, or there are others than arm, gripper and state fields.
        """
        wanted, grippers = self._wanted(), self._gripper_names()
        self._gripper = next((found[name] for name in grippers if name in found), self._gripper)
        if not any(name in found for name in wanted):
            self._strangers = tuple(found) if wanted and not set(found) <= set(grippers) else ()
            return None
        self._strangers = ()
        known = {*wanted, *grippers, *self._state_names()}
        m.order_of(wanted, [name for name in found if name in wanted or name not in known])
        return np.array([found[name] for name in wanted])

    def _gripper_names(self) -> List[str]:
        measured = [f for f in self.robot.state if f.kind.startswith("gripper_")]
        return [*self.robot.driver.gripper_names, *(name for f in measured for name in joint_names(f))]

    def _state_names(self) -> List[str]:
        fields = [f for f in self.robot.state if not f.kind.startswith("ee_") and f.kind != "joint_position"]
        return [name for f in fields for name in joint_names(f)]

    def _on_mode(self, message: Any) -> None:
        self.guard.on_mode(str(message.data), self.bus.now())
        self._show()

    def _half(self, source: str, which: int) -> Callable[[Any], None]:
        def on_half(message: Any) -> None:
            """Wait for the other half, and hand over both once. Repeated or late ones keep no others from meeting."""
            if self.robot.gripper is None:
                self._on_chunk(source, message, None)
                return
            stamp, mine = m.stamp_of(message), self._halves.setdefault((source, which), {})
            other = self._halves.setdefault((source, 1 - which), {}).pop(stamp, None)
            if other is not None:
                self._on_chunk(source, *((message, other) if which == 0 else (other, message)))
                return
            if stamp in mine:
                self.guard.on_problem("half of a chunk again", "R0", self.bus.now())
            mine[stamp] = message
            if len(mine) > HALVES:
                del mine[next(iter(mine))]  # the first that came
                self.guard.on_problem("half of a chunk alone", "R0", self.bus.now())

        return on_half

    def _on_chunk(self, source: str, motion: Any, gripper: Any) -> None:
        """Hand a chunk to the guard."""
        robot = self.robot
        if source == "policy" and not self.hash:
            raise ValueError(f"a chunk before its contract on {CONTRACT}")
        if len(motion.points) > MOST_STEPS:  # reading them would take the time of ticks
            raise ValueError(f"a chunk of {len(motion.points)} steps; at most {MOST_STEPS}")
        delta = robot.motion.mode == "delta"
        if robot.space.name == "joint":
            quantity = "velocities" if delta else "positions"
            dt, values = m.joint_chunk_from_ros(motion, quantity, robot.driver.joints)
        else:
            if motion.header.frame_id != BASE_FRAME:
                raise ValueError(f"a chunk in frame {motion.header.frame_id!r}; it must be {BASE_FRAME!r}")
            dt, values = m.cartesian_chunk_from_ros(motion, delta, robot.space.rotation)
        closing = None
        if robot.gripper is not None:
            closing = m.joint_chunk_from_ros(gripper, gripper_quantity(robot.gripper))[1][:, 0]
        chunk = Chunk(m.stamp_of(motion), dt, values, closing, m.chunk_id_of(motion), source)
        self.guard.on_chunk(chunk, self.bus.now())
        self._show()

    def _liveliness(self, source: str) -> Callable[[int], None]:
        def on_liveliness(alive: int) -> None:
            if alive == 0 and source == "policy":
                self._problems.pop(POLICY_STATE, None)  # what it said last no longer counts
                self._standing = None
            if alive == 0 and self.guard.active == source:
                self.guard.hold(f"the {'policy' if source == 'policy' else 'teleoperator'} is gone", self.bus.now())
                self._show()

        return on_liveliness

    def _on_heartbeat(self, message: Any) -> None:
        self.guard.on_heartbeat(str(message.data), self.bus.now())

    def _on_policy_state(self, message: Any) -> None:
        """Hold, or fault, when the policy says why it must not act; a clock that differs also refuses to arm."""
        values = m.json_from_ros(message)
        ok, reason, reaction = values["ok"], f"policy: {values['reason']}", values["reaction"]
        if not isinstance(ok, bool) or (not ok and reaction not in ("R2", "R3")):
            raise ValueError(f"a policy's state has ok, reason and reaction (R2 or R3), got {values}")
        self._problems.pop(POLICY_STATE, None)
        self._standing = None if ok else (reason, reaction)
        if not ok and reaction == "R3":
            self._problems[POLICY_STATE] = reason
        if not ok and self.guard.active == "policy":
            self.guard.on_problem(reason, reaction, self.bus.now())
        self._show()

    def _heed(self, steady: float) -> None:
        """React to what the policy said before it was asked to act and has not taken back since.

        It gets a while: being asked resolves some of it (an image too old, a prediction to try again), and says so.
        """
        if steady - self._asked < STANDING_S or self.guard.active != "policy":
            return
        self._asked = np.inf
        if self._standing is not None and not self._standing[0].endswith(NO_INSTRUCTION):  # somebody will give one
            self.guard.on_problem(*self._standing, self.bus.now())

    def _on_takeover(self, message: Any) -> None:
        active = m.json_from_ros(message)["active"]
        if not isinstance(active, bool):
            raise ValueError(f"active is true or false, got {active!r}")
        if active:
            self.guard.take_over("teleop", self.bus.now())
        else:
            self._asked = self.bus.steady() if self.guard.active != "policy" else self._asked
            self.guard.hand_back(self.bus.now())
        self.bus.log("info", f"{self.guard.active} is in control")
        self._show()

    def _on_speed(self, message: Any) -> None:
        self.guard.set_speed(m.float_from_ros(message))
        self.bus.log("info", f"speed {self.guard.speed_scale:g} of the limits")
        self._show()

    def _on_approval(self, message: Any) -> None:
        self.guard.approval = bool(message.data)
        self._show()

    def _on_approve(self, message: Any) -> None:
        values = m.json_from_ros(message)
        if values.get("approved", True):
            self.guard.approve(int(values["chunk"]), self.bus.now())
        else:
            self.guard.leave_out(int(values["chunk"]))
        self._show()


def type_of(error: BaseException) -> str:
    """Return an error's type where its text alone says nothing."""
    return "" if isinstance(error, ValueError) else f"{type(error).__name__} "


def _failed(verdict: Mapping[str, Any]) -> str:
    """Return what failed in a preflight."""
    try:
        failed = [item for item in verdict["items"] if item["verdict"] == "failed"]
        return ", ".join(item.get("mistake") or item["name"] for item in failed) or "no item"
    except (TypeError, KeyError, AttributeError):
        return "see its report"


def run(
    *,
    bus: Mapping[str, Any],
    embodiment: Union[str, Mapping[str, Any]],
    require_preflight: bool = True,
    tick_hz: float,
    **limits: Any,
) -> None:
    """Run the guard until it is stopped.

    Args:
        bus: arguments of `open_bus`.
        embodiment: this robot's own file (JSON or YAML) or plain values, with limits and driver.
        require_preflight: refuse to arm until the preflight passed.
        tick_hz: of the output, at least 100.
        limits: the other fields of `GuardConfig`.
    """
    load_robot(embodiment)  # before anybody joins the graph
    config = GuardConfig(tick=1.0 / tick_hz, **limits)
    _take_priority()
    joined = open_bus(name="guard", **bus)
    serve(GuardNode(joined, config, embodiment, require_preflight=require_preflight, settle=SETTLE_S))


def from_parameters(bus: Bus) -> GuardNode:
    """Make the guard of a ROS 2 node's parameters: `embodiment`, `tick_hz`, `require_preflight` and `GuardConfig`'s.

    Raises:
        ValueError: parameters that make no sense, or no embodiment.
    """
    knobs = [f for f in dataclasses.fields(GuardConfig) if f.name != "tick" and f.default is dataclasses.MISSING]
    values = {field.name: bus.param(field.name, 0.0) for field in knobs}
    tick_hz, embodiment = bus.param("tick_hz", 0.0), bus.param("embodiment", "")
    if not tick_hz > 0 or not embodiment:
        raise ValueError("set its parameters (embodiment, tick_hz, ...), as launch/dita.launch.py does")
    config = GuardConfig(tick=1.0 / tick_hz, **values)
    _take_priority()
    required = bus.param("require_preflight", True)
    return GuardNode(bus, config, embodiment, require_preflight=required, settle=SETTLE_S)


def _take_priority() -> None:
    with contextlib.suppress(PermissionError):  # real-time priority, as ros2_control asks for; not everybody may
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
