"""The processes of a chaos rig: the real nodes behind a bus that can be told to misbehave, and who judges them.

    python -m benchmarks.chaos_nodes twin|policy|guard|reader|rogue|replayer '{...}'

The nodes are the shipped ones; only their bus is wrapped. The policy's network is replaced by a rule that keeps the arm
moving at a steady speed, so that a deceleration shows at any moment.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import json
import os
import queue
import re
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import yaml

from robot_io import messages as m
from robot_io.bus import LATCHED, STATE, Bus, open_bus
from robot_io.nodes.serve import be_nice, serve

INJECT = "/chaos/inject"  # harness -> nodes: String, JSON
APPLIED = "/chaos/applied"  # nodes -> harness: String, JSON; at = monotonic clock, which all processes share
REGULAR = 0.3  # [s] before a fault: what the motion's slowest command is taken from
SLOWER = 0.98  # of that speed: below it the arm decelerates
STILL = 0.01  # [m/s] or [rad/s]: standstill, as ros2_controllers has it
STILL_S = 0.04  # for so long
SILENT_S = 0.1  # no command for so long: the stream has ended
KEEP_S = 40.0  # of everything, in the reader
AT_WALL = 1e-4  # [m] or [rad]: a command so near to its limit is there


# --- a bus that misbehaves on request


class InjectBus:
    """A bus like the one it wraps, until an order for this node comes on /chaos/inject.

    An order replaces the last one: {"id": 7, "node": "policy", "out": {topic: change}, "in": {topic: change},
    "clock": offset [s], "hang": seconds, "raise": topic, "predict": fault}. Changes of a message: see `Change`.
    """

    def __init__(self, bus: Bus) -> None:
        self._bus = bus
        self.order: dict[str, Any] = {}
        self.outgoing: dict[str, Change] = {}
        self.incoming: dict[str, Change] = {}
        self._said: set[Any] = set()
        self._applied = bus.publisher(APPLIED, m.STRING, STATE)
        bus.subscribe(INJECT, m.STRING, STATE, self._on_order)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bus, name)

    def now(self) -> float:
        """Return the wall clock, set wrong by the order."""
        return self._bus.now() + self.order.get("clock", 0.0)

    def publisher(self, topic: str, type: str, qos: Any) -> Any:
        """Offer `topic`; what is sent passes the order's change."""
        inner = self._bus.publisher(topic, type, qos)

        def publish(message: Any) -> None:
            change = self.outgoing.get(topic)
            if change is None:
                inner.publish(message)
            else:
                change.pass_on(message, inner.publish, lambda: self.applied(f"out {topic}"))

        return SimpleNamespace(publish=publish)

    def subscribe(self, topic: str, type: str, qos: Any, callback: Callable[[Any], None], urgent: bool = True) -> None:
        """Subscribe; what comes passes the order's change, and its callback may raise or hang."""

        def receive(message: Any) -> None:
            self._misbehave(topic)
            change = self.incoming.get(topic)
            if change is None:
                callback(message)
            else:
                change.pass_on(message, callback, lambda: self.applied(f"in {topic}"))

        self._bus.subscribe(topic, type, qos, receive, urgent)

    def timer(self, period_s: float, callback: Callable[[], None]) -> None:
        """Call `callback` in a rhythm."""

        def tick() -> None:
            self._misbehave("timer")
            callback()

        self._bus.timer(period_s, tick)

    def applied(self, what: str) -> None:
        """Tell the harness, once, that an order has begun to show."""
        key = (self.order.get("id"), what)
        if key not in self._said:
            self._said.add(key)
            values = {"id": self.order.get("id"), "node": self._bus.name, "what": what, "at": time.monotonic()}
            self._applied.publish(m.json_to_ros(self._bus.msg, values))

    def _misbehave(self, where: str) -> None:
        if self.order.get("raise") == where:
            self.order = {**self.order, "raise": None}
            self.applied(f"raise {where}")
            raise RuntimeError(f"injected in the callback of {where}")
        seconds = self.order.get("hang")
        if seconds:
            self.order = {**self.order, "hang": None}
            self.applied("hang")
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                pass

    def _on_order(self, message: Any) -> None:
        order = m.json_from_ros(message)
        if order["node"] == self._bus.name:
            self.outgoing = {topic: Change(values) for topic, values in order.get("out", {}).items()}
            self.incoming = {topic: Change(values) for topic, values in order.get("in", {}).items()}
            self.order = order
            self.applied("order")


class Change:
    """What happens to the messages of one topic.

    {"drop": true}; {"keep": k} lets every k-th pass; {"stamp": s} moves the header's stamp; {"freeze": "old" | "new"}
    repeats the first message with its stamp or with new ones; {"delay": s} or {"delay": s, "over": s} a ramp;
    {"times": x} scales the payload; {"bad": "nan" | "inf", "count": n, "at": u} spoils one value of the next n;
    {"plus": x, "every": 2} adds to every other one; {"names": "permute" | "swap" | "drop" | "add" | "duplicate"}.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.count = 0
        self.begin = time.monotonic()
        self._frozen: Any = None

    def pass_on(self, message: Any, send: Callable[[Any], None], applied: Callable[[], None]) -> None:
        """Send the message as the change wants it."""
        values = self.values
        self.count += 1
        if values.get("count") is not None and self.count > values["count"]:
            send(message)
            return
        if values.get("drop") or (values.get("keep") and self.count % values["keep"]):
            applied()
            return
        if values.get("every") and self.count % values["every"]:
            send(message)
            return
        message = self._changed(message)
        if "delay" in values:
            over = values.get("over", 0.0)
            share = min(1.0, (time.monotonic() - self.begin) / over) if over else 1.0
            applied()
            threading.Timer(values["delay"] * share, send, (message,)).start()
            return
        applied()  # before it is sent: the time from which on it counts
        send(message)

    def _changed(self, message: Any) -> Any:
        values = self.values
        if "freeze" in values:
            self._frozen = self._frozen or message
            frozen = copy.copy(self._frozen)
            if values["freeze"] == "new":
                frozen.header = message.header
            return frozen
        if not any(k in values for k in ("stamp", "times", "bad", "plus", "names")):
            return message
        message = copy.deepcopy(message)
        if "stamp" in values:
            total = m.stamp_of(message) + values["stamp"]
            message.header.stamp.sec, nanosec = divmod(round(total * 1e9), 10**9)
            message.header.stamp.nanosec = nanosec
        if "times" in values:
            each_number(message, lambda x: x * values["times"])
        if "plus" in values:
            each_number(message, lambda x: x + values["plus"])
        if "bad" in values:
            spoil(message, float(values["bad"]), values.get("at", 0.0))
        if "names" in values:
            rename(message, values["names"])
        return message


PAYLOAD = ("positions", "velocities", "effort", "position", "data")  # fields that carry numbers of a motion


def slots(message: Any) -> list[tuple[Any, Any]]:
    """Return (holder, key) of every number of a message's payload; times, stamps and rotations are none."""
    found: list[tuple[Any, Any]] = []
    for point in getattr(message, "points", [message]):
        for name in PAYLOAD:
            values = getattr(point, name, None)
            if isinstance(values, np.ndarray):
                values = values.copy()
                setattr(point, name, values)
                found += [(values, i) for i in range(len(values))]
        vectors = [t.translation for t in getattr(point, "transforms", [])]
        vectors += [t.linear for t in getattr(point, "velocities", []) if hasattr(t, "linear")]
        if hasattr(point, "pose"):
            vectors.append(point.pose.position)
        found += [(vector.__dict__, axis) for vector in vectors for axis in "xyz"]
    return found


def each_number(message: Any, change: Callable[[float], float]) -> None:
    """Change every number of a message's payload."""
    for holder, key in slots(message):
        holder[key] = change(holder[key])


def spoil(message: Any, value: float, at: float) -> None:
    """Set one number, at a share in [0, 1) of them, to a value that is not finite."""
    found = slots(message)
    holder, key = found[int(at * len(found))]
    holder[key] = value


def rename(message: Any, how: str) -> None:
    """Put the joints of a JointState into another order, which is harmless, or break their names.

    "swap" exchanges the first two names only: each has then the other's value.
    """
    names = list(message.name)
    if how == "permute":
        message.name, message.position = names[1:] + names[:1], np.roll(message.position, -1)
    elif how == "swap":
        message.name = [names[1], names[0], *names[2:]]
    elif how == "drop":
        message.name, message.position = names[1:], message.position[1:]
    elif how == "add":
        message.name, message.position = [*names, "nobody"], np.append(message.position, 0.0)
    else:
        message.name, message.position = [*names, names[0]], np.append(message.position, 0.0)


# --- a point for an arm


def field(name: str, kind: str, size: int, low: float, high: float, reference: str | None = None) -> dict[str, Any]:
    """Return one field of an embodiment, SI."""
    return {
        "name": name, "kind": kind, "size": size, "unit": "m", "frame": "base",
        "mode": "delta" if reference else "absolute", "reference": reference, "scale": 1.0, "slot": 0,
        "low": [low] * size, "high": [high] * size,
    }  # fmt: skip


LIMITS = {  # as of an arm, not of a point: it takes time and room to stop
    "max_speed": 1.0, "max_acceleration": 15.0, "max_jerk": 3000.0, "max_lag": 0.15,
    "workspace_low": [-0.5, 0.3, 0.0], "workspace_high": [0.5, 1.1, 0.6],
}  # fmt: skip
JOINTS = [f"joint_{i}" for i in range(6)]
JOINT_LIMITS = {
    "names": JOINTS, "low": [-1.5] * 6, "high": [1.5] * 6, "velocity": [2.0] * 6, "acceleration": [12.0] * 6,
    "jerk": [3000.0] * 6, "max_lag": 0.6,
}  # fmt: skip
CAMERAS = [{"name": name, "height": 24, "width": 32, "slot": i} for i, name in enumerate(("corner", "wrist"))]
COMMON = {"obs_dt": 0.05, "action_dt": 0.0125, "control_hz": 80.0, "cameras": CAMERAS}
GRIP = field("grip_target", "gripper_position", 1, 0, 1)
PANDA = Path(__file__).parent.parent / "configs" / "embodiment" / "robosuite_panda_joint.yaml"
PANDA_START = (0.0, 0.1963, 0.0, -2.618, 0.0, 2.9416, 0.7854)  # robosuite's


def panda() -> dict[str, Any]:
    """Return the shipped Panda under joint commands, with a finer step and boxes to keep out of."""
    values = yaml.safe_load(PANDA.read_text())
    grip, arm = values["state"]
    delta, effort = values["action"]
    return {
        **values, **COMMON, "action_dt": 0.01, "control_hz": 100.0, "name": "robosuite_panda_chaos",
        "state": [arm, grip], "action": [{**delta, "low": [-0.02] * 7, "high": [0.02] * 7}, effort],
        "limits": {
            **values["limits"], "urdf": str(PANDA.parent / values["limits"]["urdf"]), "margin": 0.01,
            "keep_out": [
                {"low": [0.2, 0.3, -0.2], "high": [0.9, 0.6, 1.0]},  # to its left
                {"low": [0.2, -0.8, -0.4], "high": [1.2, 0.8, -0.1]},  # the table, whose top is at -0.112
                {"low": [-0.25, -0.25, -1.0], "high": [0.25, 0.25, 0.0]},  # its pedestal
            ],
        },
    }  # fmt: skip


MEASURED = [field("hand", "ee_position", 3, -2, 2), field("grip", "gripper_position", 1, 0, 1)]
ROBOTS: dict[str, dict[str, Any]] = {
    "point": {
        **COMMON, "name": "point", "robot": "a point", "state": MEASURED, "limits": LIMITS,
        "action": [field("hand_delta", "ee_position", 3, -0.01, 0.01, "commanded"), GRIP],
    },
    "point_absolute": {
        **COMMON, "name": "point_absolute", "robot": "a point", "state": MEASURED, "limits": LIMITS,
        "action": [field("hand_target", "ee_position", 3, -2, 2), GRIP],
    },
    "boxed": {  # as the first, with a box beside the circle
        **COMMON, "name": "boxed", "robot": "a point", "state": MEASURED,
        "limits": {**LIMITS, "keep_out": [{"low": [0.2, 0.5, 0.1], "high": [0.3, 0.9, 0.5]}], "margin": 0.01},
        "action": [field("hand_delta", "ee_position", 3, -0.01, 0.01, "commanded"), GRIP],
    },
    "twist": {
        **COMMON, "name": "twist", "robot": "a point", "state": MEASURED, "limits": LIMITS,
        "driver": {"command": "twist"},
        "action": [field("hand_delta", "ee_position", 3, -0.01, 0.01, "commanded"), GRIP],
    },
    "arm": panda(),  # the Panda's joints, each with a lag
    "panda": panda(),  # in MuJoCo
    "joints": {
        **COMMON, "name": "joints", "robot": "six joints", "limits": {"joints": JOINT_LIMITS},
        "driver": {"command": "joint_trajectory", "joints": JOINTS},
        "state": [field("arm", "joint_position", 6, -3, 3), field("grip", "gripper_position", 1, 0, 1)],
        "action": [field("arm_target", "joint_position", 6, -3, 3), GRIP],
    },
}  # fmt: skip


@dataclass(frozen=True)
class Orbit:
    """A circle in two axes of a robot's space."""

    center: np.ndarray
    axes: tuple[int, int]
    radius: float
    speed: float

    def at(self, angle: float | np.ndarray) -> np.ndarray:
        """Return the configuration at an angle, [d] or [n d]."""
        x = np.zeros((*np.shape(angle), len(self.center))) + self.center
        x[..., self.axes[0]] += self.radius * np.cos(angle)
        x[..., self.axes[1]] += self.radius * np.sin(angle)
        return x


TOOL = Orbit(np.array([0.0, 0.7, 0.3]), (0, 2), 0.1, 0.3)
SEVEN = Orbit(np.array(PANDA_START) - 0.2 * np.eye(7)[0], (0, 6), 0.2, 0.4)
ORBITS = {
    **dict.fromkeys(("point", "point_absolute", "boxed", "twist"), TOOL), **dict.fromkeys(("arm", "panda"), SEVEN),
    "joints": Orbit(np.zeros(6), (0, 1), 0.3, 0.5),
}  # fmt: skip


def grip_range(robot: str) -> tuple[float, float]:
    """Return what closes and what opens the gripper."""
    grip = ROBOTS[robot]["action"][-1]
    return grip["low"][0], grip["high"][0]


def pictures(x: np.ndarray) -> dict[str, np.ndarray]:
    """Return one picture per camera that shows a configuration, as bytes."""
    image = np.zeros((24, 32, 3), np.uint8)
    shown = np.frombuffer(x.astype(np.float32).tobytes(), np.uint8)
    image.reshape(-1)[: len(shown)] = shown
    return {"corner": image, "wrist": image[::-1].copy()}


class PointEnv:
    """Numbers that follow their commands with a lag of a few steps, and a gripper that follows at a limited speed."""

    instruction = "circle"
    success = False

    def __init__(self, name: str) -> None:
        self._name = name
        self._delta = ROBOTS[name]["action"][0]["mode"] == "delta"

    def reset(self, *, seed: int, options: Mapping[str, str]) -> None:
        """Begin on the circle."""
        self.commanded = ORBITS[self._name].at(0.0)
        self.hand, self.grip = self.commanded.copy(), 0.5

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray]]:
        """Advance by a step."""
        motion = np.asarray(action[:-1], float)
        self.commanded = self.commanded + motion if self._delta else motion
        self.hand = self.hand + 0.5 * (self.commanded - self.hand)
        low, high = grip_range(self._name)
        opening = (float(action[-1]) - low) / (high - low)
        self.grip += float(np.clip(opening - self.grip, -0.02, 0.02))
        return ({"state": self._state()},)

    def _state(self) -> np.ndarray:
        return np.array([*self.hand, self.grip], np.float32)

    def observe(self) -> Any:
        """Return images that change with the hand and the gripper."""
        return SimpleNamespace(images=pictures(self._state()), state=self._state())

    def warnings(self) -> dict[str, int]:
        """Return nothing: no simulator, no warnings."""
        return {}

    def close(self) -> None:
        """Free nothing."""


class PhysicalEnv:
    """robosuite's Lift in MuJoCo; what touches the arm, or the arm itself, counts as a warning.

    Pictures are those of the other twins: rendering robosuite's takes 20 ms each without a GPU, and the arm stands.
    """

    def __init__(self, name: str) -> None:
        from dita.embodiment import embodiment_from_dict
        from dita.envs.robosuite import RobosuiteEnv

        self._env = RobosuiteEnv(embodiment_from_dict({**ROBOTS[name], "cameras": []}), "Lift", 10**9)
        self._contacts = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._env, name)

    def reset(self, *, seed: int, options: Mapping[str, str]) -> None:
        """Begin anew, where robosuite begins."""
        self._contacts = 0
        self._env.reset(seed=seed)

    def drive(self, goal: np.ndarray, gripper: float, seconds: float) -> None:
        """Follow a goal, and look for contacts of the arm."""
        self._env.drive(goal, gripper, seconds)
        model, data = self._env.model, self._env.data
        for contact in data.contact[: data.ncon]:
            names = [model.body(model.geom_bodyid[g]).name for g in (contact.geom1, contact.geom2)]
            arm, hand = (sum(n.startswith(prefix) for n in names) for prefix in (("robot0", "gripper0"), "gripper0"))
            self._contacts += arm > 0 and hand < 2  # its fingers may meet

    def observe(self) -> Any:
        """Return images that change with the joints."""
        return SimpleNamespace(images=pictures(self._env.state), state=self._env.state)

    def warnings(self) -> dict[str, int]:
        """Return MuJoCo's warnings, and contacts."""
        return {**self._env.warnings(), **({"contacts": self._contacts} if self._contacts else {})}


class Circle:
    """Move on a circle at a steady speed, from wherever the arm is; thinks for 30 ms, or as its order says."""

    def __init__(self, name: str, bus: InjectBus, steps: int = 24) -> None:
        embodiment = ROBOTS[name]
        self.dt, self.steps, self.bus, self.orbit = embodiment["action_dt"], steps, bus, ORBITS[name]
        self.name, self.delta = embodiment["name"], embodiment["action"][0]["mode"] == "delta"
        self.grip = grip_range(name)

    def predict(self, history: Any, *, seed: int, **options: Any) -> Any:
        """Return a chunk, spoiled as the bus's order says."""
        time.sleep(0.03)
        fault = self.bus.order.get("predict") or {}
        now = history[-1]
        motion = self._motion(np.array(now.state[:-1], float), now.stamp, fault)
        low, high = self.grip
        opening = 0.5 + 0.4 * np.sign(np.sin(now.stamp))
        values = np.column_stack([motion, np.full(self.steps, low + (high - low) * opening)])
        values = self._spoil(values, fault)
        return SimpleNamespace(values=values, stamp=now.stamp, action_dt=self.dt, embodiment=self.name)

    def _motion(self, hand: np.ndarray, stamp: float, fault: Mapping[str, Any]) -> np.ndarray:
        orbit, step = self.orbit, self.orbit.speed * self.dt
        if "toward" in fault:  # straight on, into whatever is there
            direction = np.resize(np.array(fault["toward"], float), len(hand))
            way = np.tile(step * direction, (self.steps, 1))
            return way if self.delta else hand + np.cumsum(way, axis=0)
        if not self.delta:  # by time, so that chunks agree
            return orbit.at(orbit.speed / orbit.radius * (stamp + self.dt * (1 + np.arange(self.steps))))
        rows = []
        i, j = orbit.axes
        for _ in range(self.steps):
            off = hand - orbit.center
            direction = np.zeros(len(hand))
            distance = max(float(np.hypot(off[i], off[j])), 1e-3)
            direction[i], direction[j] = -off[j] / distance, off[i] / distance
            back = -off
            back[i], back[j] = (orbit.radius / distance - 1) * off[i], (orbit.radius / distance - 1) * off[j]
            direction = direction + 8 * back
            rows.append(step * direction / np.linalg.norm(direction))
            hand = hand + rows[-1]
        return np.array(rows)

    def _spoil(self, values: np.ndarray, fault: Mapping[str, Any]) -> np.ndarray:
        if fault:
            self.bus.applied(f"predict {next(iter(fault))}")
        if "sleep" in fault:
            time.sleep(fault["sleep"])
        if "raise" in fault:
            raise RuntimeError("injected in predict")
        if "bad" in fault:
            values[fault["step"] % len(values), fault["dim"] % values.shape[1]] = float(fault["bad"])
        if "bang" in fault:
            values[:, :-1] *= np.where(np.arange(len(values)) % 2, 8.0, -8.0)[:, None] * fault["bang"]
        if "times" in fault:
            values[:, :-1] *= fault["times"]
        if fault and "sleep" not in fault:
            self.bus.applied("predicted")
        return values


def run_twin(*, bus: Bus, robot: str, command_timeout: float = 0.1) -> Any:
    """Return the shipped twin node around a point."""
    from robot_io.nodes.twin import TwinNode

    env: Any = PhysicalEnv(robot) if robot == "panda" else PointEnv(robot)
    return TwinNode(bus, env, ROBOTS[robot], command_timeout, inject=True)


def run_policy(*, bus: Bus, robot: str, hash: str = "0" * 64, changes: Mapping[str, Any] | None = None) -> Any:
    """Return the shipped policy node around a rule; `changes` make it another robot's."""
    from robot_io.nodes.policy import PolicyNode

    embodiment = {**ROBOTS[robot], **(changes or {})}
    names = ("images", "state", "instruction", "stamp")

    def observation(*values: Any) -> Any:
        return SimpleNamespace(**dict(zip(names, values, strict=True)))

    timing: dict[str, Any] = {"slop": 0.033, "max_age": 0.15, "interval": 0.0}
    rule: Any = Circle(robot, bus)  # pyright: ignore[reportArgumentType]
    return PolicyNode(bus, rule, embodiment, hash, observation, n_obs_steps=2, seed=0, **timing)


def run_guard(*, bus: Bus, robot: str, config: Mapping[str, Any]) -> Any:
    """Return the shipped guard node."""
    from robot_io.core.guard import GuardConfig
    from robot_io.nodes.guard import SETTLE_S, GuardNode

    with contextlib.suppress(PermissionError):  # as the shipped guard does
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
    return GuardNode(bus, GuardConfig(**config), ROBOTS[robot], require_preflight=False, settle=SETTLE_S)


# --- the judge


class Reader:
    """Record what is on the wire, by arrival and by stamp, and give verdicts; knows nothing from the harness but times.

    Commands of every writer are streams of their own. A verdict is asked for over stdin and answered on stdout.
    """

    def __init__(self, bus: Any, robot: str) -> None:
        from robot_io.nodes.guard import load_robot

        self.bus = bus
        self.robot = load_robot(ROBOTS[robot])[0]
        assert self.robot.bounds is not None
        self.bounds = self.robot.bounds
        self.commands: deque[Any] = deque()  # (arrival, writer, stamp, position, speed)
        self.measured: deque[Any] = deque()  # (arrival, position)
        self.violations: deque[Any] = deque()  # (arrival, what)
        self.places: deque[Any] = deque()  # (arrival, configuration, "commanded" or "measured")
        self.details: deque[Any] = deque()  # (arrival, spacing and speeds of the commands of a violation)
        self.states: deque[Any] = deque()  # (arrival, state, reason, writer)
        self.texts: deque[Any] = deque()  # (arrival, text)
        self.executed: deque[Any] = deque()  # (arrival, chunk stamp, index)
        self.episode: dict[str, Any] = {}
        self._counted: dict[str, Any] = {}  # node -> what its last diagnostics said
        self._streams: dict[Any, Any] = {}
        self._subscribe()
        self._asked: queue.Queue[str] = queue.Queue()
        threading.Thread(target=lambda: [self._asked.put(line) for line in sys.stdin], daemon=True).start()
        bus.timer(0.01, self._answer)

    def _subscribe(self) -> None:
        from robot_io.bus import COMMAND
        from robot_io.live import COMMANDS
        from robot_io.nodes import topics as t

        driver = self.robot.driver
        deep: dict[str, Any] = {"depth": 400}
        subscribe = self.bus.subscribe
        subscribe(driver.command_topic, COMMANDS[driver.command], replace(COMMAND, **deep), self._on_command)
        subscribe(driver.gripper_topic, m.JOINT_TRAJECTORY, replace(COMMAND, **deep), self._on_gripper)
        if driver.joints:
            subscribe(driver.joints_topic, m.JOINT_STATE, replace(STATE, **deep), self._on_joints)
        else:
            subscribe(driver.pose_topic, m.POSE, replace(STATE, **deep), self._on_pose)
        subscribe(t.EXECUTED, t.chunk_type(self.robot), replace(STATE, **deep), self._on_executed)
        every = replace(LATCHED, **deep)  # also the states between: two guards, or a hold that is soon over
        subscribe(t.POLICY_STATE, m.STRING, every, lambda x: self._keep(self.texts, f"policy: {x.data}"))
        subscribe(t.GUARD_STATE, m.STRING, every, self._on_state)
        subscribe(t.EPISODE_STATE, m.STRING, STATE, self._on_episode)
        subscribe(t.DIAGNOSTICS, m.DIAGNOSTICS, STATE, self._on_diagnostics)

    def stop(self) -> None:
        """Leave."""
        self.bus.shutdown()

    def close(self) -> None:
        """Leave the graph."""
        self.bus.close()

    def _keep(self, queue: deque[Any], *values: Any) -> None:
        now = time.monotonic()
        queue.append((now, *values))
        while queue[0][0] < now - KEEP_S:
            queue.popleft()

    def _on_command(self, message: Any) -> None:
        from robot_io.live import EnvelopeReader, command_of

        if message.header.frame_id == "rogue":
            return
        writer = message.sample_info.publication_handle
        twist = self.robot.driver.command == "twist"
        stamp, position = command_of(self.robot, message, time.time())
        if not twist:
            self._keep(self.places, position, "commanded")
        if writer not in self._streams:
            self._streams[writer] = {"envelope": EnvelopeReader(self.robot.space, self.bounds, twist), "last": None}
        stream = self._streams[writer]
        before = Counter(stream["envelope"].violations)
        before["non_finite"], gaps = stream["envelope"].non_finite, stream["envelope"].gaps
        stream["envelope"].take(stamp, position)
        after = Counter(stream["envelope"].violations)
        after["non_finite"] = stream["envelope"].non_finite
        for what in after - before:
            self._keep(self.violations, what)
            recent = stream["envelope"].recent()
            detail = {"what": what, "dt_ms": [round(1e3 * float(b[0] - a[0]), 3) for a, b in pairwise(recent)]}
            moves = [b[1] if twist else (b[1] - a[1]) / (b[0] - a[0]) for a, b in pairwise(recent)]
            detail["speeds"] = [round(float(np.linalg.norm(move)), 4) for move in moves]
            self._keep(self.details, detail)
        new = stream["last"] is None or stream["envelope"].gaps > gaps
        speed = stream["envelope"].speed()
        if not twist:
            self._on_stream(new, stream["last"], stamp, position)
        stream["last"] = (stamp, position, time.monotonic())
        self._keep(self.commands, writer, stamp, position, speed)

    def _on_stream(self, new: bool, last: Any, stamp: float, position: np.ndarray) -> None:
        """A stream begins at the measured position; one that is interrupted goes on within the limits of speed.

        For how long it was silent say the stamps, too: a reader that is behind sees the end of one stream and the
        begin of the next at once.
        """
        if not new:
            return
        pause = np.inf if last is None else max(time.monotonic() - last[2], stamp - last[0])
        if (
            last is not None
            and pause < SILENT_S
            and np.linalg.norm(position - last[1]) > self.bounds.speed[0] * (pause + 0.05)
        ):
            self._keep(self.violations, "jump across a gap of stamps")
        if last is None and self.measured:
            away = float(np.linalg.norm(position - self.measured[-1][1]))
            if away > 0.02:
                self._keep(self.violations, f"first command {away:.3f} m from the measured position")

    def clearance(self, x: np.ndarray, which: str) -> tuple[float, str]:
        """Return how near a configuration is to what it must keep out of, itself included [m], and to what.

        Asked for with the verdict: while an arm moves, it would take the time of the processes that are judged.
        """
        limits, kinematics = self.robot.limits, self.robot.kinematics
        if not np.all(np.isfinite(x)):
            return np.inf, ""
        if kinematics is not None:
            distance, what = kinematics.clearance(x, limits.keep_out)
            return distance, f"{which}: {what}"
        if len(limits.keep_out) and self.robot.space.name == "cartesian":
            gaps = [float(np.linalg.norm(np.maximum(0, np.maximum(a - x[:3], x[:3] - b)))) for a, b in limits.keep_out]
            return min(gaps), f"{which}: keep_out[{int(np.argmin(gaps))}]"
        return np.inf, ""

    def _on_gripper(self, message: Any) -> None:
        values = np.concatenate([np.concatenate([p.positions, p.velocities, p.effort]) for p in message.points])
        if message.header.frame_id != "rogue" and not np.all(np.isfinite(values)):
            self._keep(self.violations, "non_finite gripper")

    def _on_pose(self, message: Any) -> None:
        position = m.pose_from_ros(message)[0]
        self._keep(self.measured, position)
        self._keep(self.places, position, "measured")

    def _on_joints(self, message: Any) -> None:
        with contextlib.suppress(ValueError, KeyError):  # names that are wrong on purpose
            found = m.joints_from_ros(message)
            joints = np.array([found[name] for name in self.robot.driver.joints])
            self._keep(self.measured, joints)
            self._keep(self.places, joints, "measured")

    def _on_executed(self, message: Any) -> None:
        step = m.executed_from_ros(message)
        self._keep(self.executed, step.chunk, step.index)

    def _on_state(self, message: Any) -> None:
        values = m.json_from_ros(message)
        self._keep(self.states, values["state"], values["reason"], message.sample_info.publication_handle)
        self._keep(self.texts, f"{values['state']}: {values['reason']} | {values['refused']}")

    def _on_episode(self, message: Any) -> None:
        self.episode = m.json_from_ros(message)

    def _on_diagnostics(self, message: Any) -> None:
        """Keep what is new: a counter that an earlier fault has left behind does not name a later one."""
        for name, status in m.diagnostics_from_ros(message).items():
            before = self._counted.get(name, {})
            self._counted[name] = dict(status["values"])
            counts = ", ".join(f"{k} {v}" for k, v in status["values"].items() if before.get(k) != v)
            self._keep(self.texts, f"{name}: {status['message']} ({counts})")

    def _answer(self) -> None:
        while not self._asked.empty():
            print(json.dumps(self.verdict(**json.loads(self._asked.get())), allow_nan=False), flush=True)

    def verdict(self, since: float, t0: float, until: float, names: str) -> dict[str, Any]:
        """Judge a repetition.

        Args:
            since: from when on every command counts [s, monotonic].
            t0: when the fault began.
            until: the end.
            names: regular expression of a text that names the fault.
        """
        commands = [c for c in self.commands if since <= c[0] <= until]
        broken = Counter(what for at, what in self.violations if since <= at <= until)
        non_finite = sum(n for what, n in broken.items() if what.startswith("non_finite"))
        measured = [(at, p) for at, p in self.measured if since <= at <= until]
        low, high = self.bounds.low, self.bounds.high
        named = [(at, text) for at, text in self.texts if at >= t0 - 0.001 and re.search(names, text)]
        states = self._states(since, t0)
        stops = [(at, s, why) for at, s, why in states if at >= t0 and s != "ARMED"]
        faults = [at for at, s, _ in stops if s == "FAULT"]
        chunks = [stamp for at, stamp, _ in self.executed if since <= at <= until]
        stop = self._stop(commands, t0)
        places = [(x, which) for at, x, which in self.places if since <= at <= until]
        nearest = min((self.clearance(x, which) for x, which in places), default=(np.inf, ""))
        covered = [at for at, _, _ in self.executed if at <= t0 + (stop["still_s"] or np.inf)]
        return {
            "commands": len(commands),
            "violations": {k: v for k, v in broken.items() if not k.startswith("non_finite")},
            "details": [d for at, d in self.details if since <= at <= until][:5],
            "non_finite": non_finite,
            "measured_outside": sum(not (np.all(p >= low) and np.all(p <= high)) for _, p in measured),
            "warnings": sum(self.episode.get("warnings", {}).values()),
            "clearance": {"m": nearest[0], "what": nearest[1]} if np.isfinite(nearest[0]) else None,
            **stop,
            "queue_s": covered[-1] + self.robot.action_dt - t0 if covered else None,
            "measured_still_s": _still_since(measured, t0),
            "state": {"s": stops[0][0] - t0, "state": stops[0][1], "reason": stops[0][2]} if stops else None,
            "states": [s for at, s, _ in states if t0 <= at <= until],
            "fault_s": faults[0] - t0 if faults else None,
            "wall_s": self._wall(commands, t0),
            "named": None if not named else {"s": max(0.0, named[0][0] - t0), "text": named[0][1][:300]},
            "executed": len(chunks),
            "executed_back": sum(b < a for a, b in pairwise(chunks)),
            "speeds": [round(c[4], 4) for c in commands if c[0] > t0 and np.isfinite(c[4])][:30],
        }

    def _states(self, since: float, t0: float) -> list[tuple[float, str, str]]:
        """Return the states of the guard that moved the arm: another one that joins speaks for itself."""
        ours = next((w for at, s, _, w in self.states if since <= at <= t0 and s == "ARMED"), None)
        return [(at, s, why) for at, s, why, w in self.states if ours is None or w == ours]

    def _wall(self, commands: Sequence[Any], t0: float) -> float | None:
        """Return when the first command came to a limit of its position [s after t0]."""
        if self.robot.driver.command == "twist":
            return None
        low, high = self.bounds.low, self.bounds.high
        n = len(low)
        there = (
            c[0] - t0
            for c in commands
            if c[0] > t0 and np.any((c[3][:n] < low + AT_WALL) | (c[3][:n] > high - AT_WALL))
        )
        return next(there, None)

    def _stop(self, commands: Sequence[Any], t0: float) -> dict[str, Any]:
        """Find the deceleration that ends in the first standstill after t0.

        It begins with the first command after the last one that was as fast as the slowest of the regular motion.
        """
        regular = [c[4] for c in commands if t0 - REGULAR <= c[0] <= t0 and np.isfinite(c[4])]
        after = [c for c in commands if c[0] > t0]
        result: dict[str, Any] = {
            "speed": float(np.median(regular)) if regular else None,
            "decel_s": None, "still_s": None, "ended_s": None,
        }  # fmt: skip
        times = [t0, *(c[0] for c in after)]
        gap = next((a for a, b in zip(times, [*times[1:], np.inf], strict=True) if b - a > SILENT_S), None)
        if gap is not None and time.monotonic() - gap > SILENT_S:
            result["ended_s"] = gap - t0
        moved = [(c[0], c[4]) for c in after if np.isfinite(c[4])]
        still = _first_still(moved)
        if still is None and regular and moved and result["ended_s"] is not None:
            at, speed = moved[-1]  # a stream that ends at rest ends with the last bit of its braking
            still = at if at <= t0 + result["ended_s"] + 0.01 and speed < 0.2 * min(regular) else None
        if not regular or still is None:
            return result
        threshold = SLOWER * min(regular)
        fast = [c[0] for c in after if c[0] <= still and c[4] >= threshold]
        last = max(fast, default=t0)
        slower = [c[0] for c in after if c[0] > last]
        return {**result, "decel_s": slower[0] - t0, "still_s": still - t0}


def _first_still(speeds: Sequence[tuple[float, float]]) -> float | None:
    begin = None
    for at, speed in speeds:
        if speed > STILL:
            begin = None
        elif begin is None:
            begin = at
        if begin is not None and at - begin >= STILL_S:
            return begin
    return None


def _still_since(measured: Sequence[tuple[float, np.ndarray]], t0: float) -> float | None:
    """Return when the measured position stopped to move for good [s after t0]."""
    after = [(at, p) for at, p in measured if at >= t0]
    if not after:
        return None
    end = after[-1][1]
    moving = [at for at, p in after if np.linalg.norm(p - end) > 1e-3]
    return (max(moving) - t0) if moving else 0.0


# --- others on the wire


class Rogue:
    """A second commander on request: {"node": "rogue", "on": true, "send": "nothing" | "nan" | "poses"}."""

    def __init__(self, bus: Any, robot: str) -> None:
        from robot_io.core.limits import parse_robot

        self.bus, self._domain, self._robot, self._name = bus, bus.domain_id, parse_robot(ROBOTS[robot]), robot
        self._other: Any = None
        self._applied = bus.publisher(APPLIED, m.STRING, STATE)
        bus.subscribe(INJECT, m.STRING, STATE, self._on_order)
        bus.timer(0.02, self._send)

    def stop(self) -> None:
        """Leave."""
        self.bus.shutdown()

    def close(self) -> None:
        """Leave the graph."""
        self.bus.close()

    def _on_order(self, message: Any) -> None:
        from robot_io.bus import COMMAND
        from robot_io.nodes.topics import command_type

        order = m.json_from_ros(message)
        if order["node"] != "rogue":
            return
        if self._other is not None:
            self._other.close()
            self._other = None
        at = time.monotonic()
        if order.get("on"):
            self._send_what = order["send"]
            self._other = open_bus("dds", "intruder", self._domain)
            self._pose = self._other.publisher(self._robot.driver.command_topic, command_type(self._robot), COMMAND)
        values = {"id": order["id"], "node": "rogue", "what": "order", "at": at}
        self._applied.publish(m.json_to_ros(self.bus.msg, values))

    def _send(self) -> None:
        if self._other is not None and self._send_what != "nothing":
            x = ORBITS[self._name].center.copy()
            if self._send_what == "nan":
                x[0] = np.nan
            if self._robot.driver.joints:
                message = m.joint_command_to_ros(
                    self.bus.msg, self.bus.now(), self._robot.driver.joints, x, 0 * x, 0.01
                )
                message.header.frame_id = "rogue"
            else:
                message = m.pose_to_ros(self.bus.msg, self.bus.now(), x, "rogue")
            self._pose.publish(message)


class Replayer:
    """Record chunks and play them back as they were: {"node": "replayer", "how": "duplicate" | "late" | "reorder"}."""

    def __init__(self, bus: Any, robot: str) -> None:
        from robot_io.bus import COMMAND
        from robot_io.core.limits import parse_robot
        from robot_io.nodes import topics as t

        self.bus, motion = bus, t.chunk_type(parse_robot(ROBOTS[robot]))
        self._order: dict[str, Any] = {}
        self._kept: deque[Any] = deque(maxlen=60)  # (arrival, publisher, message)
        self._applied = bus.publisher(APPLIED, m.STRING, STATE)
        for topic, type in ((t.CHUNK, motion), (t.CHUNK_GRIPPER, m.JOINT_TRAJECTORY)):
            publisher = bus.publisher(topic, type, COMMAND)
            bus.subscribe(topic, type, COMMAND, lambda message, p=publisher: self._on_chunk(p, message))
        bus.subscribe(INJECT, m.STRING, STATE, self._on_order)
        bus.timer(0.03, self._send)

    def stop(self) -> None:
        """Leave."""
        self.bus.shutdown()

    def close(self) -> None:
        """Leave the graph."""
        self.bus.close()

    def _on_chunk(self, publisher: Any, message: Any) -> None:
        if not self._order.get("how"):  # what is heard while playing is one's own
            self._kept.append((time.monotonic(), publisher, message))

    def _on_order(self, message: Any) -> None:
        order = m.json_from_ros(message)
        if order["node"] == "replayer":
            self._order = order
            values = {"id": order["id"], "node": "replayer", "what": "order", "at": time.monotonic()}
            self._applied.publish(m.json_to_ros(self.bus.msg, values))

    def _send(self) -> None:
        how, kept = self._order.get("how"), list(self._kept)
        if not how or not kept:
            return
        chosen = {"duplicate": kept[-2:], "late": kept[:2], "reorder": kept[::-1][:12]}[how]
        for _, publisher, message in chosen:
            publisher.publish(message)


ROLES: dict[str, Callable[..., Any]] = {
    "twin": run_twin, "policy": run_policy, "guard": run_guard,
    "reader": Reader, "rogue": Rogue, "replayer": Replayer,
}  # fmt: skip


def main(role: str, arguments: Mapping[str, Any]) -> None:
    """Run one process of a rig."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: nobody outlives the harness
    values = dict(arguments)
    domain, loss = values.pop("domain_id"), values.pop("loss", 0)
    bus: Any = open_bus("dds", role, domain, loss_permille=loss)
    if role in ("twin", "policy", "guard"):
        bus = InjectBus(bus)
    if role in ("twin", "reader"):  # an arm and a clock: neither waits for what computes
        be_nice(-10)
    serve(ROLES[role](bus=bus, **values))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
    sys.stdout.flush()
    os._exit(0)
