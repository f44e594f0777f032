"""Keyboard teleoperation in a terminal: short chunks for the guard, which limits and checks them like a policy's.

A terminal tells of key presses only, never of releases: a press moves for HOLD_S, and a held key repeats.
"""

import contextlib
import math
from dataclasses import dataclass
from typing import Any, Callable, List, Mapping, Optional, Tuple

import numpy as np

from robot_io import messages as m
from robot_io.bus import COMMAND, STATE, Bus, open_bus
from robot_io.core.limits import Robot
from robot_io.core.recorder import delta_between
from robot_io.messages import ExecutedStep
from robot_io.nodes.guard import load_robot
from robot_io.nodes.operator import Console, guard_line, record_line, terminal
from robot_io.nodes.recorder import measured_of
from robot_io.nodes.topics import (
    BASE_FRAME,
    EXECUTED,
    JOINTS,
    TELEOP,
    TELEOP_GRIPPER,
    TOOL_POSE,
    chunk_type,
    gripper_quantity,
)

HOLD_S = 0.15  # motion after a key press; keys repeat about every 30 ms
STEPS = 8  # of a chunk: it runs out when this process or its terminal is gone
SPEEDS = (0.05, 0.1, 0.25, 0.5, 1.0)  # of the top speed, keys 1 to 5
LEVELS = ("1", "2", "3", "4", "5")
TOP_LINEAR, TOP_ANGULAR, TOP_JOINT = 0.25, 0.8, 0.6  # m/s, rad/s, rad/s: what a hand can follow on a screen

# key -> (dimension of the tangent, direction)
CARTESIAN = {
    **{"w": (0, 1), "s": (0, -1), "a": (1, 1), "d": (1, -1), "r": (2, 1), "f": (2, -1)},
    **{"u": (3, 1), "o": (3, -1), "i": (4, 1), "k": (4, -1), "j": (5, 1), "l": (5, -1)},
}
ORDERS = {
    "t": "takeover",
    "\n": "arm",
    "\x7f": "disarm",
    "R": "record:start",
    "S": "record:stop",
    "Z": "record:fail",
    "X": "record:discard",
    "E": "record:seal",
    "q": "quit",
}
HELP = (
    "move w/s x  a/d y  r/f z   turn u/o i/k j/l   joint [ ] choose, w/s move   g gripper   1-5 speed   SPACE stop\n"
    "t take over / hand back   ENTER arm   BACKSPACE disarm   record: R start  S stop, a success  Z stop, a failure  "
    "X discard  E seal   q leave"
)


@dataclass(frozen=True)
class Axes:
    """What the keys move."""

    joints: Tuple[str, ...]  # empty for a tool
    top: np.ndarray  # [m] top speed of each dimension of the tangent


class Keys:
    """Key presses -> velocity of the tangent, gripper, and orders for others. No clock, no terminal."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.level = 2  # of SPEEDS, from 1
        self.joint = 0  # that w and s move
        self.open = True
        self._until = np.full(len(axes.top), -math.inf)  # [m] until when each dimension moves
        self._direction = np.zeros(len(axes.top))

    def press(self, key: str, now: float) -> Optional[str]:
        """Follow a key; return the order that is not about motion, if it is one, "stop" included."""
        if key == " ":
            self.stop()
            return "stop"
        if key in ORDERS:
            return ORDERS[key]
        if key == "g":
            self.open = not self.open
        elif key in LEVELS:
            self.level = LEVELS.index(key) + 1
        elif self.axes.joints and key in "[]":
            self.joint = (self.joint + (1 if key == "]" else -1)) % len(self.axes.joints)
        else:
            self._move(key, now)
        return None

    def _move(self, key: str, now: float) -> None:
        keys = {"w": (self.joint, 1), "s": (self.joint, -1)} if self.axes.joints else CARTESIAN
        found = keys.get(key)
        if found is not None and found[0] < len(self._until):
            self._until[found[0]], self._direction[found[0]] = now + HOLD_S, found[1]

    def stop(self) -> None:
        """Move nothing from now on."""
        self._until[:] = -math.inf

    def velocity(self, now: float) -> np.ndarray:
        """Return the velocity of the tangent [m], /s."""
        return np.where(now < self._until, self._direction * SPEEDS[self.level - 1] * self.axes.top, 0.0)


def axes_of(robot: Robot) -> Axes:
    """Return what the keys move of a robot, never faster than its limits and its action's steps allow."""
    space, dt = robot.space, robot.action_dt
    if space.name == "joint":
        top = np.full(space.tangent, TOP_JOINT)
    else:
        top = np.array([TOP_LINEAR] * 3 + [TOP_ANGULAR] * 3)[: space.tangent]
    if robot.bounds is not None:
        top = np.minimum(top, robot.bounds.per_axis(robot.bounds.speed))
    if robot.motion.mode == "delta":
        fields = [robot.motion] if robot.rotation is None else [robot.motion, robot.rotation]
        step = np.concatenate([np.minimum(-f.low, f.high) for f in fields])
        top = np.minimum(top, np.maximum(step, 0.0) / dt)
    return Axes(tuple(space.axes) if space.name == "joint" else (), top)


def chunk_rows(
    robot: Robot,
    velocity: np.ndarray,
    stamp: float,
    steps: int,
    last: Optional[ExecutedStep],
    measured: Optional[np.ndarray],
) -> np.ndarray:
    """Return the motion [n m] of a chunk that moves on at a velocity, as the embodiment's action says.

    Args:
        velocity: of the tangent, base frame.
        stamp: of the chunk [s].
        last: the newest executed step: what is absolute goes on from its target.
        measured: the newest configuration; what is absolute begins there where nothing was executed yet.

    Raises:
        ValueError: neither is known and the action needs one.
    """
    space, dt, reference = robot.space, robot.action_dt, robot.motion.reference
    if reference == "commanded" and not (space.tool_position or space.tool_rotation):
        return np.tile(velocity * dt, (steps, 1))
    if measured is None:
        raise ValueError("no measured configuration yet")
    start, since = (measured, stamp - dt) if last is None else (last.target, last.stamp)
    times = np.maximum(stamp + np.arange(steps) * dt - since, 0.0)
    goals = np.array([space.retract(start, velocity * t) for t in times])
    if reference is None:
        return goals
    if reference == "chunk_start":
        return np.array([delta_between(space, measured, goal) for goal in goals])
    before = start if reference == "commanded" else measured
    row = delta_between(space, before, space.retract(start, velocity * dt))  # the lag stays what it is
    return np.tile(row, (steps, 1))


class TeleopNode:
    """Keys in, chunks out, at the control rate while the human has the arm."""

    def __init__(self, bus: Bus, robot: Robot, instruction: str = "") -> None:
        """Join the graph.

        Args:
            instruction: of the episodes that it starts; "": what the recorder knows.
        """
        self.bus, self.robot, self._instruction = bus, robot, instruction
        self.console = Console(bus, robot)
        self.keys = Keys(axes_of(robot))
        self.active, self.leaving, self.note = False, False, ""
        self._gripper: Optional[float] = None  # what is sent; None: not known yet
        self._last: Optional[ExecutedStep] = None
        self._seen: dict = {}
        self._grid, self._id = bus.now(), 0
        self._chunk = bus.publisher(TELEOP, chunk_type(robot), COMMAND)
        self._chunk_gripper = bus.publisher(TELEOP_GRIPPER, m.JOINT_TRAJECTORY, COMMAND)
        bus.subscribe(EXECUTED, chunk_type(robot), STATE, self._on_executed)
        bus.subscribe(
            robot.driver.pose_topic,
            m.POSE,
            STATE,
            lambda message: self._seen.update({TOOL_POSE: m.pose_from_ros(message)}),
        )
        bus.subscribe(robot.driver.joints_topic, m.JOINT_STATE, STATE, self._on_joints)
        bus.timer(robot.action_dt, self._publish)

    def _on_executed(self, message: Any) -> None:
        try:
            self._last = m.executed_from_ros(message, self.robot.space.rotation)
        except (ValueError, IndexError) as e:
            self.bus.log("error", f"{EXECUTED}: {e}")

    def _on_joints(self, message: Any) -> None:
        try:
            self._seen[JOINTS] = m.joints_from_ros(message)
        except ValueError as e:
            self.bus.log("error", f"{JOINTS}: {e}")

    def press(self, key: str) -> None:
        """Follow a key."""
        was_open = self.keys.open
        order = self.keys.press(key, self.bus.now())
        if self.keys.open != was_open and self.robot.gripper is not None:
            field = self.robot.gripper
            self._gripper = float(field.high[0] if self.keys.open else field.low[0])
        if order is not None:
            self._follow(order)

    def _follow(self, order: str) -> None:
        name, _, value = order.partition(":")
        if name == "takeover":
            self.take_over(not self.active)
        elif name in ("arm", "disarm"):
            self.console.arm(name == "arm")
        elif name == "record":
            success = {"stop": True, "fail": False}.get(value)
            more = {} if success is None else {"success": success}
            if value == "start" and self._instruction:
                more = {"instruction": self._instruction}
            self.console.order_record("stop" if value == "fail" else value, **more)
        self.leaving = self.leaving or name == "quit"
        self.note = order

    def take_over(self, active: bool) -> None:
        """Take the arm or hand it back; the gripper stays as it is until g is pressed."""
        self.active = active
        self.keys.stop()
        if active and self.robot.gripper is not None:
            self._gripper = self._gripper_now()
            field = self.robot.gripper
            self.keys.open = self._gripper > 0.5 * float(field.low[0] + field.high[0])
        self.console.take_over(active)

    def _gripper_now(self) -> float:
        """Return the command that leaves the gripper alone: the last one sent, or else as far open as it is."""
        field = self.robot.gripper
        assert field is not None
        if self._last is not None and self._last.gripper is not None:
            return self._last.gripper
        low, high = float(field.low[0]), float(field.high[0])
        opening = next((f for f in self.robot.state if f.kind == "gripper_position"), None)
        measured = self._seen.get(JOINTS, {}).get(opening.name) if opening is not None else None
        return high if measured is None else float(np.clip(low + (high - low) * measured, low, high))

    def _publish(self) -> None:
        if not self.active:
            return
        robot, now = self.robot, self.bus.now()
        dt = robot.action_dt
        stamp = (
            self._grid + math.floor((now - self._grid) / dt) * dt
        )  # one grid for all chunks: steps follow each other
        try:
            motion = chunk_rows(robot, self.keys.velocity(now), stamp, STEPS, self._fresh(now), self._measured())
        except (ValueError, KeyError) as e:
            self.note = str(e)
            return
        self._id += 1
        send_chunk(self.bus, robot, self._chunk, self._chunk_gripper, stamp, motion, self._gripper, self._id)

    def _fresh(self, now: float) -> Optional[ExecutedStep]:
        return self._last if self._last is not None and now - self._last.stamp < 0.5 else None

    def _measured(self) -> Optional[np.ndarray]:
        needed = JOINTS if self.robot.space.name == "joint" else TOOL_POSE
        return measured_of(self.robot, self._seen) if needed in self._seen else None

    def line(self) -> str:
        """Say what the human does and what the guard makes of it."""
        keys = self.keys
        who = "HUMAN" if self.active else "policy"
        joint = f"  joint {keys.axes.joints[keys.joint]}" if keys.axes.joints else ""
        gripper = "" if self.robot.gripper is None else f"  gripper {'open' if keys.open else 'closed'}"
        speed = f"  speed {keys.level} ({SPEEDS[keys.level - 1]:.0%})"
        first = f"{who}{speed}{gripper}{joint}  {self.note}"
        return "\n".join(
            (first, f"guard     {guard_line(self.console)}", f"recorder  {record_line(self.console.record)}")
        )


def send_chunk(
    bus: Bus,
    robot: Robot,
    chunk: Any,
    chunk_gripper: Any,
    stamp: float,
    motion: np.ndarray,
    gripper: Optional[float],
    id: int,
) -> None:
    """Publish a chunk's two halves, the gripper's first."""
    msg, dt = bus.msg, robot.action_dt
    if robot.gripper is not None and gripper is not None:
        values = np.full((len(motion), 1), gripper)
        quantity = gripper_quantity(robot.gripper)
        chunk_gripper.publish(m.joint_chunk_to_ros(msg, stamp, dt, [robot.gripper.name], values, quantity, id))
    delta = robot.motion.mode == "delta"
    if robot.space.name == "joint":
        quantity = "velocities" if delta else "positions"
        chunk.publish(m.joint_chunk_to_ros(msg, stamp, dt, robot.driver.joints, motion, quantity, id))
    else:
        chunk.publish(m.cartesian_chunk_to_ros(msg, stamp, dt, robot.motion.name, BASE_FRAME, motion, delta, id))


def run(*, bus: Mapping[str, Any], embodiment: Any, instruction: str = "") -> None:
    """Teleoperate from this terminal until q or Ctrl-C.

    Args:
        bus: arguments of `open_bus`.
        embodiment: the robot's file or plain values.
        instruction: of the episodes that it starts; "": what the recorder knows.

    Raises:
        ValueError: there is no terminal.
    """
    from rich.live import Live

    robot = load_robot(embodiment)[0]
    with terminal() as read, contextlib.closing(open_bus(name="teleop", **bus)) as opened, Live(HELP) as live:
        node = TeleopNode(opened, robot, instruction)
        try:
            play(node, read, lambda text: live.update(text))
        finally:
            if node.active:  # the policy gets the arm back: a guard that waits for a human would hold for ever
                node.take_over(False)
                opened.spin(0.2)


def play(node: TeleopNode, read: Callable[[], List[str]], show: Callable[[str], None]) -> None:
    """Follow the keys until one of them is q."""
    shown = 0.0
    while not node.leaving:
        node.bus.spin(0.01)
        for key in read():
            node.press(key)
        if node.bus.steady() - shown > 0.1:
            shown = node.bus.steady()
            show(f"{HELP}\n{node.line()}")
