"""A guard on a fake clock in any space, with an arm that follows perfectly, and a checker of its own."""

import copy
import math
from collections import Counter, deque
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from fake_robot import EMBODIMENT, field

from robot_io.core.chunk_buffer import Chunk
from robot_io.core.guard import Command, Executed, Guard, GuardConfig
from robot_io.core.limits import Robot, parse_robot
from robot_io.core.state_machine import State

TICK, DT, T0 = 1 / 160, 0.0125, 1000.0
CONFIG = GuardConfig(
    tick=TICK, state_timeout=0.1, stream_timeout=0.1, hold_timeout=1.0, max_skew=0.05, clamp_margin=0.25
)
HOME = np.array([0.0, 0.6, 0.2])
JOINTS = [f"joint{i}" for i in range(1, 8)]
JOINT_LIMITS = {  # a Panda's, with a driver's acceleration
    "names": JOINTS[::-1],  # another order than the action's: only names count
    "low": [-2.9, 0.0, -2.9, -3.0, -2.9, -1.7, -2.9],
    "high": [2.9, 3.7, 2.9, -0.1, 2.9, 1.7, 2.9],
    "velocity": [2.6, 2.6, 2.6, 2.1, 2.1, 2.1, 2.1],
    "acceleration": [20.0, 10.0, 20.0, 12.5, 15.0, 7.5, 15.0],
    "jerk": [2000.0, 1000.0, 2000.0, 1250.0, 1500.0, 750.0, 1500.0],
    "max_lag": 0.5,
}
JOINT_HOME = np.array([0.0, -0.5, 0.0, -2.0, 0.0, 1.5, 0.8])
ANGULAR = {
    **{"max_angular_speed": 2.5, "max_angular_acceleration": 60.0, "max_angular_jerk": 12000.0},
    **{"max_angular_lag": 0.6},
}


def embodiment(space: str, mode: str = "delta", reference: str = "commanded", frame: str = "base") -> dict[str, Any]:
    """Return an embodiment of "joint", "position" or "pose"."""
    values = copy.deepcopy(EMBODIMENT)
    values["name"] = f"{space} {mode}"
    reference = reference if mode == "delta" else None
    effort = values["action"][1]
    if space == "joint":
        motion = [field("joints", "joint_position", 7, -0.04, 0.04, reference)]
        if mode == "absolute":
            motion[0].update(low=JOINT_LIMITS["low"][::-1], high=JOINT_LIMITS["high"][::-1])
        values["limits"] = {"joints": copy.deepcopy(JOINT_LIMITS)}
        values["driver"] = {"joints": JOINTS}
    else:
        bound = 0.01 if mode == "delta" else 1.0
        motion = [field("hand", "ee_position", 3, -bound, bound, reference)]
        if space == "pose":
            kind, size = ("ee_rotation_axis_angle", 3) if mode == "delta" else ("ee_rotation_6d", 6)
            bound = 0.02 if mode == "delta" else 1.0
            motion.append(field("turn", kind, size, -bound, bound, reference))
            values["limits"].update(ANGULAR)
        for f in motion:
            f["frame"] = frame
    values["action"] = [*motion, effort]
    return values


SPACES = [(space, mode) for space in ("joint", "position", "pose") for mode in ("delta", "absolute")]
ROBOT = parse_robot(EMBODIMENT)


def home_of(robot: Robot) -> np.ndarray:
    """Return a configuration well inside the limits."""
    if robot.space.name == "joint":
        return JOINT_HOME.copy()
    return np.array([*HOME, 1.0, 0.0, 0.0, 0.0]) if robot.space.rotation else HOME.copy()


def matrix(q: np.ndarray) -> np.ndarray:
    """Return the rotation matrix of a quaternion wxyz."""
    w, x, y, z = q
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def rotation_vector(r: np.ndarray) -> np.ndarray:
    """Return the rotation vector of a matrix turned by less than a right angle."""
    axis = 0.5 * np.array([r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]])
    sine = float(np.linalg.norm(axis))
    return axis if sine < 1e-9 else axis * math.asin(min(1.0, sine)) / sine


class Checker:
    """Judge commands by their own stamps with divided differences, straight from the embodiment's plain values."""

    def __init__(self, values: dict[str, Any]) -> None:
        limits, self.joint = values["limits"], bool(values["limits"].get("joints"))
        if self.joint:
            rows, names = limits["joints"], values["driver"]["joints"]
            order = [rows["names"].index(name) for name in names]
            self.groups = [
                (name, slice(i, i + 1), [rows[k][j] for k in ("velocity", "acceleration", "jerk")])
                for i, (name, j) in enumerate(zip(names, order, strict=True))
            ]
            self.low, self.high = (np.array(rows[k])[order] for k in ("low", "high"))
        else:
            tool = [limits[k] for k in ("max_speed", "max_acceleration", "max_jerk")]
            self.groups = [("tool", slice(0, 3), tool)]
            self.low, self.high = np.array(limits["workspace_low"]), np.array(limits["workspace_high"])
            if limits.get("max_angular_speed"):
                turn = [limits[k] for k in ("max_angular_speed", "max_angular_acceleration", "max_angular_jerk")]
                self.groups.append(("rotation", slice(3, 6), turn))
        self._starts = [axes.start for _, axes, _ in self.groups]
        self._bounds = np.array([bounds for _, _, bounds in self.groups]).T  # [order, group]
        # a rotation's increments do not commute within a late tick
        self._loose_uneven = np.array([5e-2 if name == "rotation" else 1e-3 for name, _, _ in self.groups])
        self.violations: Counter = Counter()
        self.commands = 0
        self._samples: deque[tuple[float, np.ndarray]] = deque(maxlen=4)  # times, and the path laid out flat
        self._last: np.ndarray | None = None

    def restart(self) -> None:
        """Begin a new stream."""
        self._samples.clear()

    def take(self, stamp: float, x: np.ndarray) -> None:
        """Take one command."""
        self.commands += 1
        if not np.all(np.isfinite(x)):
            self.violations["not finite"] += 1
            return
        n = len(self.low)
        for i in np.flatnonzero((x[:n] < self.low) | (x[:n] > self.high)):
            self.violations[f"position {i}"] += 1
        flat = x[:n]
        if len(x) > n:
            if abs(np.linalg.norm(x[n:]) - 1) > 1e-9:
                self.violations["not a unit quaternion"] += 1
            turned = np.zeros(3)
            if self._samples and self._last is not None:
                turned = self._samples[-1][1][n:] + rotation_vector(matrix(x[n:]) @ matrix(self._last[n:]).T)
            flat = np.concatenate([flat, turned])
        self._last = x
        if self._samples and stamp - self._samples[-1][0] > 0.05:  # as the reader on the wire: a new stream
            self._samples.clear()
        self._samples.append((stamp, flat))
        self._check()

    def _check(self) -> None:
        times, values = [t for t, _ in self._samples], [v for _, v in self._samples]
        steps = [b - a for a, b in pairwise(times)]
        for order in range(1, len(times)):  # the last entry of each level has the newest samples only
            values = [(b - a) / (times[i + order] - times[i]) for i, (a, b) in enumerate(pairwise(values))]
            shortest, longest = min(steps[-order:]), max(steps[-order:])
            found = math.factorial(order) * np.sqrt(np.add.reduceat(values[-1] ** 2, self._starts))
            loose = self._loose_uneven if longest > 1.1 * shortest else 1e-3
            slack = 2**order * self._bounds[0] * 1e-6 / shortest**order  # of stamps as float64
            for i in (found > self._bounds[order - 1] * (1 + loose) + slack).nonzero()[0]:
                self.violations[f"{('speed', 'acceleration', 'jerk')[order - 1]} of {self.groups[i][0]}"] += 1


class Arm:
    """A guard with an arm that follows perfectly, on a fake clock of ticks."""

    def __init__(
        self, values: dict[str, Any] = EMBODIMENT, home: Any = None, config: GuardConfig = CONFIG, **robot: Any
    ):
        self.robot = parse_robot(values)
        if robot:
            self.robot = replace(self.robot, **robot)
        self.guard, self.now = Guard(self.robot, config), T0
        self.measured = home_of(self.robot) if home is None else np.array(home, float)
        self.opening: float | None = None
        self.checker = Checker(values)
        self.sent: deque[Command] = deque(maxlen=10_000)
        self.executed: list[Executed] = []
        self.fresh, self.ticks, self._ids = True, 0, 0
        self.guard.on_state(self.now, self.measured)

    @property
    def state(self) -> State:
        return self.guard.state

    @property
    def reason(self) -> str:
        return self.guard.machine.reason

    @property
    def last(self) -> np.ndarray:
        return self.sent[-1].configuration

    @property
    def speed(self) -> float:
        """Norm of the last two commands' difference per second."""
        return float(np.linalg.norm(self.last - self.sent[-2].configuration)) / TICK

    def arm(self) -> "Arm":
        self.guard.arm(self.now)
        return self

    def chunk(self, motion: Any, gripper: float = -1.0, stamp: float | None = None, **kwargs: Any) -> Chunk:
        """Return a chunk that begins with the next tick."""
        motion = np.atleast_2d(np.asarray(motion, float))
        self._ids += 1
        stamp = self.now + TICK if stamp is None else stamp
        values = {"id": self._ids, **kwargs}
        return Chunk(stamp, self.robot.action_dt, motion, np.full(len(motion), float(gripper)), **values)

    def offer(self, motion: Any, **kwargs: Any) -> str | None:
        """Send a chunk."""
        return self.guard.on_chunk(self.chunk(motion, **kwargs), self.now)

    def ahead(self, axis: int, by: float, steps: int = 40) -> np.ndarray:
        """Return a chunk's motion along one axis: deltas of `by`, or absolute goals `by` further each step."""
        tangent = np.zeros(self.robot.space.tangent)
        tangent[axis] = by
        if self.robot.motion.mode == "delta":
            return np.tile(tangent, (steps, 1))
        return np.array([self.robot.space.retract(self.measured, (i + 1) * tangent) for i in range(steps)])

    def run(self, seconds: float, periods: int = 1) -> "Arm":
        """Let time pass."""
        for _ in range(round(seconds / TICK / periods)):
            self.now += periods * TICK
            self.ticks += 1
            if self.fresh:
                self.guard.on_state(self.now, self.measured, self.opening)
            command, executed = self.guard.tick(self.now, periods)
            if executed is not None:
                self.executed.append(executed)
            if command is None:
                self.checker.restart()
                continue
            self.sent.append(command)
            self.checker.take(command.stamp, command.configuration)
            self.measured = command.configuration
        return self

    def assert_inside(self) -> None:
        assert not self.checker.violations, dict(self.checker.violations)
        assert self.guard.counts["envelope_stops"] == 0
