"""The processes of a campaign of faults, and a rig that talks to them as an operator would."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.chaos_nodes import APPLIED, INJECT, ROBOTS
from robot_io import messages as m
from robot_io.bus import LATCHED, STATE, open_bus
from robot_io.core.guard import UNSAFE_FLAG, GuardConfig
from robot_io.core.limits import parse_robot
from robot_io.live import CHILD_ENV
from robot_io.nodes import topics as t

ROOT = Path(__file__).parent.parent
CLAMPED = "(?<!action )(?<!gripper )clamped"  # a guard's counter of goals at the border of the workspace or of a joint
IMAGES = [t.image_topic(name) for name in ("corner", "wrist")]
POSE, JOINTS = "/tool_pose", "/joint_states"
STATES = [POSE, JOINTS]
CHUNKS = [t.CHUNK, t.CHUNK_GRIPPER]


class Void(Exception):
    """A repetition that says nothing: the machine was too busy for the arm to move steadily before the fault."""


class Rig:
    """Twin, policy, guard and reader as processes, and a console in this one."""

    def __init__(self, domain_id: int, robot: str = "point", loss: int = 0, unsafe: bool = False) -> None:
        self.domain_id, self.robot, self.loss, self.unsafe = domain_id, robot, loss, unsafe
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.lines: dict[str, deque[str]] = {}
        self.guard: dict[str, str] = {}
        self.second: dict[str, str] = {}  # what a second guard says
        self.second_history: list[tuple[float, str]] = []
        self.history: list[tuple[float, str]] = []  # of the guard's states
        self.clamped = 0  # how often the guard has held a goal inside the limits, as it said last
        self._writers: dict[str, set[Any]] = {"guard": set(), "guard_2": set()}
        self.episode: dict[str, Any] = {}
        self.guard_at = -np.inf  # when the last state came
        self.applied: list[dict[str, Any]] = []
        self.ids = 0
        self.verdicts: queue.Queue[str] = queue.Queue()
        self.bus = open_bus("dds", "console", domain_id)
        self._inject = self.bus.publisher(INJECT, m.STRING, STATE)
        self._driver = self.bus.publisher(t.INJECT, m.STRING, STATE)
        self._arm = self.bus.publisher(t.ARM, m.BOOL, STATE)
        self._episode = self.bus.publisher(t.EPISODE, m.STRING, STATE)
        # deep: of two guards that speak at once, a reader of depth 1 keeps only the last
        self.bus.subscribe(t.GUARD_STATE, m.STRING, replace(LATCHED, depth=20), self._on_guard)
        self.bus.subscribe(t.EPISODE_STATE, m.STRING, STATE, self._on_episode)
        self.bus.subscribe(APPLIED, m.STRING, STATE, lambda message: self.applied.append(m.json_from_ros(message)))
        self.steps = 0  # that the guard has executed
        parsed = parse_robot(ROBOTS[robot])
        self.bus.subscribe(parsed.driver.gripper_topic, m.JOINT_TRAJECTORY, STATE, self._on_gripper)
        self.gripper_at: list[float] = []  # when it was told to go elsewhere
        kind = t.chunk_type(parsed)
        self.bus.subscribe(t.EXECUTED, kind, STATE, lambda _: setattr(self, "steps", self.steps + 1))
        for name in ("reader", "twin", "policy", "guard"):
            self.start(name)
        self._number = 0
        self.bus.subscribe(t.DIAGNOSTICS, m.DIAGNOSTICS, STATE, self._on_diagnostics)
        self.contracts: list[Any] = []
        self.bus.subscribe(t.CONTRACT, m.STRING, LATCHED, self.contracts.append)
        self.reset(60.0)
        self.until(lambda: bool(self.contracts), 30.0, "the policy's contract")  # one that comes later is another one

    def _on_guard(self, message: Any) -> None:
        """Take a state; one of a writer that is new while a second guard runs is that one's, also when it has left."""
        writer = message.sample_info.publication_handle
        if whose(writer, self._writers, self.alive("guard_2")) == "guard_2":
            self.second = m.json_from_ros(message)
            self.second_history.append((time.monotonic(), self.second["state"]))
            return
        self.guard, self.guard_at = m.json_from_ros(message), time.monotonic()
        self.history.append((self.guard_at, self.state))

    def _on_diagnostics(self, message: Any) -> None:
        status = m.diagnostics_from_ros(message, "guard").get("guard")
        if status is not None:
            values = status["values"].items()
            self.clamped = sum(int(n) for name, n in values if matches(CLAMPED, name))

    def _on_gripper(self, message: Any) -> None:
        self.gripper_at.append(time.monotonic())

    def _on_episode(self, message: Any) -> None:
        self.episode = m.json_from_ros(message)

    @property
    def state(self) -> str:
        """Return the guard's state as it said last."""
        return self.guard.get("state", "")

    def start(self, name: str, **changes: Any) -> None:
        """Start a process of the rig, in place of the one that is there."""
        self.end(name)
        arguments: dict[str, Any] = {"domain_id": self.domain_id, **changes}
        role = name.split("_")[0]
        arguments["robot"] = self.robot
        if role in ("twin", "policy", "guard"):
            arguments["loss"] = self.loss
        if role == "guard":
            arguments["config"] = guard_config(self.unsafe)
        command = [sys.executable, "-m", "benchmarks.chaos_nodes", role, json.dumps(arguments)]
        process = subprocess.Popen(
            command, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**os.environ, **CHILD_ENV, "PYTHONPATH": str(ROOT), UNSAFE_FLAG: "1" if self.unsafe else "0"},
            start_new_session=True,
        )  # fmt: skip
        self.processes[name], self.lines[name] = (
            process,
            deque(maxlen=200),
        )  # a traceback, and what libraries say after it
        threading.Thread(target=self._read, args=(name, process), daemon=True).start()

    def _read(self, name: str, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                (self.verdicts.put if line.startswith("{") else self.lines[name].append)(line.rstrip())

    def alive(self, name: str) -> bool:
        """Return whether a process runs."""
        return name in self.processes and self.processes[name].poll() is None

    def kill(self, name: str, number: int) -> float:
        """Send a signal and return when."""
        at = time.monotonic()
        self.processes[name].send_signal(number)
        return at

    def end(self, name: str) -> None:
        """Kill a process that is there."""
        process = self.processes.pop(name, None)
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.kill()
        if process is not None:
            process.wait()
            assert process.stdin is not None
            process.stdin.close()

    def close(self) -> None:
        """End everything."""
        for name in list(self.processes):
            self.end(name)
        self.bus.close()

    def spin(self, seconds: float) -> None:
        """Let time pass."""
        self.bus.spin(seconds)

    def until(self, condition: Callable[[], bool], timeout_s: float, what: str, again: Any = None) -> float:
        """Spin until `condition`, calling `again` every 0.3 s, and return how long it took [s].

        Raises:
            TimeoutError: it did not come true; with what the guard says.
        """
        begin = repeat = time.monotonic()
        while not condition():
            now = time.monotonic()
            if now - begin > timeout_s:
                ended = [f"{n}: {' | '.join(self.lines[n])}" for n in self.processes if not self.alive(n)]
                raise TimeoutError(f"{what}: not within {timeout_s:g} s; guard {self.guard}; ended {ended}")
            if again is not None and now >= repeat:
                again()
                repeat = now + 0.3
            self.bus.spin(0.005)
        return time.monotonic() - begin

    def inject(self, node: str, *, when: str | None = "order", timeout_s: float = 3.0, **order: Any) -> float:
        """Give a node an order and return when it showed; `when` is the start of what it reports."""
        self.ids += 1
        number, self.applied = self.ids, []
        self._inject.publish(m.json_to_ros(self.bus.msg, {"id": number, "node": node, **order}))
        if when is None:
            return time.monotonic()

        def found() -> list[float]:
            return [a["at"] for a in self.applied if a["id"] == number and a["what"].startswith(when)]

        self.until(lambda: bool(found()), timeout_s, f"{node}: {when} of {order}")
        return found()[0]

    def driver(self, **order: Any) -> float:
        """Give the twin an order of its own, see robot_io/nodes/inject.py, and return when."""
        self._driver.publish(m.json_to_ros(self.bus.msg, order))
        return time.monotonic()

    def clear(self) -> None:
        """Take every order back."""
        for node in ("twin", "policy", "guard", "rogue", "replayer"):
            if self.alive(node):
                self.inject(node, when=None)

    def arm(self, yes: bool = True) -> None:
        """Ask the guard to arm or disarm, once."""
        self._arm.publish(self.bus.msg(m.BOOL, data=yes))

    def reset(self, timeout_s: float = 10.0) -> None:
        """Begin a new episode in the twin; the guard must be idle."""
        self.spin(0.12)  # the stream ends, so that nobody takes a new start for a jump
        self._number += 1
        number = self._number
        order = m.json_to_ros(self.bus.msg, {"episode": number, "task": "circle", "seed": number})
        self.until(
            lambda: self.episode.get("episode") == number,
            timeout_s,
            "twin: reset",
            lambda: self._episode.publish(order),
        )

    def idle(self) -> None:
        """Disarm and wait until the guard is idle."""
        self.until(lambda: self.state == "IDLE", 8.0, "disarm", lambda: self.arm(False))

    def armed(self, timeout_s: float = 20.0) -> float:
        """Arm, again and again until it works, and return how long it took; disarm where the guard asks for that."""

        def again() -> None:
            self.arm("disarm, and" not in self.guard.get("refused", "") or self.state == "IDLE")

        return self.until(lambda: self.state == "ARMED", timeout_s, "arm", again)

    def move(self, seconds: float) -> None:
        """Have the arm move for some time without a stop.

        Raises:
            Void: it stops by itself.
        """
        for _ in range(8):
            self.armed()
            first = self.steps
            self.until(lambda: self.steps > first + 8 or self.state != "ARMED", 20.0, "steps")  # noqa: B023
            begin = time.monotonic()
            while self.state == "ARMED" and time.monotonic() - begin < seconds:
                self.bus.spin(0.005)
            if self.state == "ARMED":
                return
        raise Void(f"the arm does not move for {seconds:.1f} s: {self.guard}")

    def verdict(self, since: float, t0: float, names: str) -> dict[str, Any]:
        """Ask the reader."""
        process = self.processes["reader"]
        assert process.stdin is not None
        asked = {"since": since, "t0": t0, "until": time.monotonic(), "names": names}
        process.stdin.write(json.dumps(asked) + "\n")
        process.stdin.flush()
        return json.loads(self.verdicts.get(timeout=20.0))


def whose(writer: Any, writers: dict[str, set[Any]], second: bool) -> str:
    """Return which guard a writer is; `writers` remembers it, `second` says whether a second guard runs."""
    for name, known in writers.items():
        if writer in known:
            return name
    name = "guard_2" if second else "guard"
    writers[name].add(writer)
    return name


def guard_config(unsafe: bool) -> dict[str, Any]:
    """Return the shipped knobs of the guard, or those of the control run."""
    shipped = yaml.safe_load((ROOT / "configs" / "robot.yaml").read_text())
    values = {f.name: shipped[f.name] for f in fields(GuardConfig) if f.name in shipped}
    return {"tick": 1.0 / shipped["tick_hz"], **values, **({"unsafe_checks_off": True} if unsafe else {})}


def matches(names: str, text: str) -> bool:
    """Return whether a text names a fault."""
    return re.search(names, text) is not None
