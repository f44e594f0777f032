"""Inject every fault of table A into the live stack, over real DDS between processes, and write down what happened.

Each fault comes at random moments (seeded), many times; a reader process of its own judges what is on the wire. Every
repetition is a line of trials.jsonl as it ends: an interrupted run continues. Writes docs/evidence/live_faults.md.
Exit code 1 if a repetition was not as promised, or the control run, whose guard checks nothing, was not caught.

make chaos
python -m benchmarks.chaos --robot panda --repeat 20 --out outputs/chaos_panda --page /tmp/panda.md
python -m benchmarks.chaos --rows A1,A9 --repeat 2 --out /tmp/quick --page /tmp/quick/live_faults.md
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.chaos_nodes import APPLIED, INJECT, REGULAR, ROBOTS, SLOWER
from robot_io import messages as m
from robot_io.bus import LATCHED, STATE, open_bus
from robot_io.core.guard import SELF_CHECK_S, UNSAFE_FLAG, GuardConfig
from robot_io.core.limits import parse_robot
from robot_io.live import CHILD_ENV
from robot_io.nodes import topics as t

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "evidence" / "live_faults.md"
GOAL = (0.03, 0.15)  # fault -> deceleration, p50 and max [s]
STAND = 0.5  # deceleration -> standstill [s]
NAMED = 1.0  # until a text names the fault [s]
ENOUGH = 300  # repetitions for a p99
TICK_BOUND = (
    0.03  # a fault in the message itself: one tick at the guard, plus the wire both ways and a command's period
)
IN_FLIGHT = 0.2  # [s]: as GOAL, but the prediction that runs is still sent, and is a sign of life
GONE = "policy is gone|no action|no sign of life"
CLAMPED = "(?<!action )(?<!gripper )clamped"  # a guard's counter of goals at the border of the workspace or of a joint
SECOND_S = 0.2  # that a second commander may be one
HOLD_S = 1.0  # that the shipped guard holds before it faults
CHUNK_S = 0.3  # of the rule's chunks
MARGIN = 0.01  # [m] that stays free between the arm and what it must keep out of
NEAR = 0.05  # [m]: nearer than the Panda is to itself at its start, so that the guard had to stop it
GRIPPER_WAIT = 5.0  # the rule opens and closes in turn, every pi seconds
DOMAINS = 8  # of ROS, used in turn
TRIES = 4  # of a repetition whose arm did not move steadily before the fault: a busy machine
IMAGES = [t.image_topic(name) for name in ("corner", "wrist")]
POSE, JOINTS = "/tool_pose", "/joint_states"
STATES = [POSE, JOINTS]
CHUNKS = [t.CHUNK, t.CHUNK_GRIPPER]


class Void(Exception):
    """A repetition that says nothing: the machine was too busy for the arm to move steadily before the fault."""


# --- a rig


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


# --- rows


@dataclass(frozen=True)
class Expect:
    """What a repetition promised, and when its fault began."""

    t0: float
    names: str = ""  # regular expression; "": nothing needs to be said
    named_in: float = NAMED  # [s] from t0; more where the condition comes later than the injection
    stop: bool | None = True  # None: either
    bound: float = GOAL[1]  # condition -> deceleration [s]
    state: Sequence[str] = ("HOLDING", "FAULT")  # one of which was entered, for a stop
    after_queue: bool = False  # the condition is true when the last valid action is over, not at the injection
    problems: Sequence[str] = ()  # that the row itself found
    silent: bool = False  # the guard must not brake but say no more: the arm stops by itself
    frozen: float | None = None  # bound of the measured standstill, where nobody commands any more [s]
    near: bool = False  # the arm was driven at something: without a stop it would have come nearer than NEAR
    note: str = ""  # counted on the page
    wall: bool = (
        False  # the arm was driven at a limit of its position: it must come there, and names count from then on
    )
    held: bool = False  # one of `state` must be entered although nothing is said of a deceleration
    latest: float | None = None  # injection -> deceleration [s], where the condition comes later by itself
    honest: bool = True  # the state on the wire is the arm's, so that it must stay inside the workspace
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One fault of the table."""

    id: str
    fault: str
    reaction: str
    run: Callable[[Trial], Expect]
    variants: Sequence[Any] = (None,)
    robots: Sequence[str] = ("point",)  # in turn, after every round of the variants
    loss: Sequence[int] = (0,)  # per mille, per variant in turn
    control: bool = False  # the control run must be caught doing it
    phase: tuple[float, float] = (0.45, 0.9)  # [s] of steady motion before the fault, at random


@dataclass
class Trial:
    """A repetition: a rig in motion, a variant and random numbers."""

    rig: Rig
    variant: Any
    rng: np.random.Generator
    since: float

    def stopped(self, timeout_s: float = 2.0, more: float = 0.35) -> None:
        """Wait until the guard holds or faults, and a little longer; the verdict says if it did not."""
        with contextlib.suppress(TimeoutError):
            self.rig.until(lambda: self.rig.state in ("HOLDING", "FAULT", "IDLE"), timeout_s, "a stop")
        self.rig.spin(more)

    def faulted(self, timeout_s: float = 2.5, more: float = 0.35) -> None:
        """Wait until the guard faults, and a little longer."""
        with contextlib.suppress(TimeoutError):
            self.rig.until(lambda: self.rig.state == "FAULT", timeout_s, "FAULT")
        self.rig.spin(more)

    def refused(self, names: str, timeout_s: float = 2.0) -> list[str]:
        """Try to arm; return what is wrong if the guard arms or does not say why not."""
        rig = self.rig
        end = time.monotonic() + timeout_s
        rig.guard["refused"] = ""
        while time.monotonic() < end:
            rig.arm()
            rig.spin(0.15)
            if rig.state == "ARMED":
                return ["it armed"]
            if matches(names, rig.guard["refused"]):
                return []
        return [f"arming was refused with: {rig.guard['refused'] or 'nothing'}"]


def matches(names: str, text: str) -> bool:
    """Return whether a text names a fault."""
    return re.search(names, text) is not None


def outgoing(topics: Sequence[str], **change: Any) -> dict[str, Any]:
    """Return an order that changes what is sent on some topics."""
    return {"out": {topic: change for topic in topics}}


def a1(trial: Trial) -> Expect:
    """NaN and Inf in an action: from the policy, and on the wire behind its own check."""
    how, value = trial.variant
    at = float(trial.rng.random())
    if how == "policy":
        fault = {"bad": value, "step": int(trial.rng.integers(24)), "dim": int(trial.rng.integers(7))}
        t0 = trial.rig.inject("policy", when="predicted", predict=fault)
    else:
        topic = t.CHUNK if how == "wire" else t.CHUNK_GRIPPER
        t0 = trial.rig.inject("policy", when="out", **outgoing([topic], bad=value, at=at))
    trial.faulted()
    return Expect(t0, "not finite|non-finite", bound=TICK_BOUND, state=("FAULT",))


def a2(trial: Trial) -> Expect:
    """The driver stops to send its state."""
    seconds = float(trial.rng.uniform(0.2, 1.0))
    if trial.variant == "short":
        t0 = trial.rig.inject("twin", when="out", **outgoing(STATES, drop=True, count=2))
        trial.rig.inject("twin", when=None)
        trial.rig.spin(0.6)
        return Expect(t0, stop=False)
    if trial.variant == "stopped":
        t0 = trial.rig.kill("twin", signal.SIGSTOP)
        trial.rig.spin(seconds)
        trial.rig.kill("twin", signal.SIGCONT)
    else:
        t0 = trial.rig.inject("twin", when="out", **outgoing(STATES, drop=True))
        trial.rig.spin(seconds)
        trial.rig.inject("twin", when=None)
    trial.faulted(1.0)
    trial.rig.spin(0.2)
    return Expect(t0, "state.*old|stale|no.* state", state=("FAULT",))


def a3(trial: Trial) -> Expect:
    """Cameras fall silent."""
    topics = IMAGES if trial.variant == "all" else [IMAGES[int(trial.rng.integers(2))]]
    t0 = trial.rig.inject("twin", when="out", **outgoing(topics, drop=True))
    trial.faulted(2.5)
    return Expect(t0, "image|camera|no action|observation", bound=0.28, state=("FAULT",))


def a4(trial: Trial) -> Expect:
    """Cameras repeat a picture, with its old stamp or with new ones."""
    t0 = trial.rig.inject("twin", when="out", **outgoing(IMAGES, freeze=trial.variant))
    trial.faulted(2.5)
    return Expect(t0, "image|camera|frozen|same picture|no action", bound=0.45, state=("FAULT",))


def a5(trial: Trial) -> Expect:
    """Stamps of the state are off, at the start and while running."""
    when, offset = trial.variant
    if when == "arming":
        trial.rig.idle()
        t0 = trial.rig.inject("twin", when="out", **outgoing(STATES, stamp=offset))
        trial.rig.spin(0.2)
        problems = trial.refused("old|future|clock|stamp|skew")
        return Expect(t0, "old|future|clock|stamp|skew", stop=None, problems=problems)
    t0 = trial.rig.inject("twin", when="out", **outgoing(STATES, stamp=offset))
    if abs(offset) < 0.05:
        trial.rig.spin(0.8)
        return Expect(t0, stop=False)
    trial.faulted(1.5)
    if -0.1 < offset < 0:  # as old as a state may be that was long on its way: no clock tells the two apart
        caught = trial.rig.state in ("HOLDING", "FAULT")
        return Expect(t0, stop=None, note=f"{-1e3 * offset:.0f} ms behind {'stopped' if caught else 'tolerated'}")
    return Expect(t0, "old|future|clock|stamp|skew|back|out of order", state=("FAULT",))


def a6(trial: Trial) -> Expect:
    """A clock jumps by ten seconds, in the driver or in the guard."""
    node, jump = trial.variant
    if node == "twin":
        t0 = trial.rig.inject(node, when="out", **outgoing([*STATES, *IMAGES], stamp=jump))
    else:
        t0 = trial.rig.inject(node, clock=jump)
    trial.stopped(1.5, 0.4)
    return Expect(t0, "clock|old|future|back|out of order|stamp")


def a7(trial: Trial) -> Expect:
    """One camera is late, ever more, or rare."""
    change = {"delay": 0.4, "over": 0.8} if trial.variant == "ramp" else {"keep": 12}
    t0 = trial.rig.inject("twin", when="out", **outgoing([IMAGES[1]], **change))
    trial.stopped(3.0)
    latest = 1.0 if trial.variant == "ramp" else 0.45  # until it is late enough, or rare enough, to be out of step
    return Expect(t0, "image|camera|not within|slop|no action|observation", after_queue=True, latest=latest)


def a8(trial: Trial) -> Expect:
    """Inference takes longer than the chunk lasts."""
    seconds = float(trial.variant)
    t0 = trial.rig.inject("policy", when="predict", predict={"sleep": seconds})
    trial.rig.inject("policy", when=None)
    if seconds < 0.15:
        trial.rig.spin(0.8)
        return Expect(t0, stop=False)
    trial.stopped(1.5)
    trial.rig.spin(max(0.0, t0 + seconds + 0.1 - time.monotonic()))
    return Expect(t0, "no action|late|queue", after_queue=True)


def a9(trial: Trial) -> Expect:
    """Chunks that do not fit onto each other: two policies in turn, or a wrong idea of the delay."""
    what, size = trial.variant
    size *= (0.5 if trial.rig.robot in ("joints", "panda") else 0.05) if what == "jump" else 1
    change = {"plus": size, "every": 2} if what == "jump" else {"stamp": -size, "every": 2}
    t0 = trial.rig.inject("policy", when="out", **outgoing([t.CHUNK] if what == "jump" else CHUNKS, **change))
    trial.rig.spin(1.2)
    return Expect(t0, stop=None)


def a10(trial: Trial) -> Expect:
    """Actions far out of range, or at the edges of it in turn."""
    if isinstance(trial.variant, str):
        return refused_checkpoint(trial)
    name, size = trial.variant
    t0 = trial.rig.inject("policy", when="predicted", predict={name: size})
    if abs(size) < 1:
        trial.rig.spin(1.0)
        return Expect(t0, stop=None)
    trial.stopped()
    return Expect(t0, "range|limit", bound=GOAL[1])


def refused_checkpoint(trial: Trial) -> Expect:
    """Give `dita robot policy` a checkpoint that is not what it says, or another arm's: it must not start."""
    t0, problems = time.monotonic(), []
    with tempfile.TemporaryDirectory() as at:
        broken_checkpoint(Path(at) / "policy", trial.variant)
        robot = robot_file(Path(at), trial.variant)
        domain = trial.rig.domain_id + DOMAINS  # not where the rig is
        arguments = [f"checkpoint={at}/policy", f"env.embodiment={robot}", f"domain_id={domain}", "bus=dds"]
        command = [sys.executable, "-m", "dita.cli", "robot", "policy", *arguments]
        environment = {**os.environ, **CHILD_ENV, "PYTHONPATH": str(ROOT)}
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, env=environment)
        except subprocess.TimeoutExpired:
            return Expect(t0, stop=None, problems=["dita robot policy has started"])
    said = (done.stdout + done.stderr).strip()
    if done.returncode == 0:
        problems.append("dita robot policy ended with code 0")
    if not matches(CHECKPOINTS[trial.variant], said):
        problems.append(f"dita robot policy did not name it: {said[-200:]}")
    return Expect(t0, stop=None, problems=problems, note="refused by dita robot policy" if not problems else "")


def broken_checkpoint(folder: Path, how: str) -> None:
    """Write a tiny policy for a simulated Sawyer, then damage it."""
    from benchmarks.live_rows import made_up
    from dita.checkpoint import save_policy
    from dita.cli import compose
    from dita.config import TrainConfig
    from dita.embodiment import load_embodiment

    config = compose("train", ["policy=dita_tiny"], TrainConfig).policy
    save_policy(made_up(load_embodiment("metaworld_sawyer"), config), folder)
    if how not in DAMAGE:
        return
    path, listed = folder / "contract.json", folder / "manifest.json"
    contract = json.loads(path.read_text())
    DAMAGE[how](contract["embodiments"]["metaworld_sawyer"]["stats"])
    path.write_text(json.dumps(contract))
    if how != "statistics":  # somebody who also edits the list of files
        files = json.loads(listed.read_text())
        data = path.read_bytes()
        files["files"]["contract.json"] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        listed.write_text(json.dumps(files))


def robot_file(folder: Path, how: str) -> str:
    """Return the robot that the checkpoint is tried on: a name, or a file of the same name with other values."""
    if how not in OTHERS:
        return "metaworld_sawyer" if how in DAMAGE else "pusht"
    from dita.embodiment import embodiment_file

    values = yaml.safe_load(embodiment_file("metaworld_sawyer").read_text())
    OTHERS[how](values)
    path = folder / "robot.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def other_dims(robot: dict[str, Any]) -> None:
    """Give the first action one value more."""
    first = robot["action"][0]
    first |= {"size": first["size"] + 1, "low": [*first["low"], -1.0], "high": [*first["high"], 1.0]}


def other_camera(robot: dict[str, Any]) -> None:
    """Call the first camera something else."""
    robot["cameras"][0]["name"] = "elsewhere"


def scale_std(stats: dict[str, Any]) -> None:
    """Make every standard deviation ten times as large."""
    for values in stats["fields"].values():
        values["std"] = [10.0 * x for x in values["std"]]


def delete_key(stats: dict[str, Any]) -> None:
    """Forget one field."""
    del stats["fields"][sorted(stats["fields"])[0]]


def a11(trial: Trial) -> Expect:
    """Joints in another order, missing, unknown or twice, while running; mislabelled ones are the preflight's."""
    known = trial.rig.robot == "joints"  # the guard needs every joint's name; a point's gripper is the policy's alone
    how = trial.variant if known or trial.variant != "swap" else "drop"  # a point has one joint
    t0 = trial.rig.inject("twin", when="out", **outgoing([JOINTS], names=how))
    if how == "permute":  # names and values alike: another order means nothing
        trial.rig.spin(0.8)
        return Expect(t0, stop=False)
    if how == "add" and not known:
        trial.rig.spin(0.8)
        return Expect(t0, stop=None, note="added to a point's gripper: nobody's")
    if how == "swap":  # the values are plausible: only what does not follow its commands can show it
        trial.stopped(2.0)
        caught = trial.rig.state in ("HOLDING", "FAULT", "IDLE")
        return Expect(
            t0, stop=None, honest=False, note=f"swapped names {'stopped' if caught else 'NOT noticed'} by the guard"
        )
    trial.faulted(2.5)
    if known:
        return Expect(t0, "joint|name", bound=TICK_BOUND, state=("FAULT",))
    return Expect(t0, "joint|name|grip|observation", after_queue=True, latest=GOAL[1] + CHUNK_S)


def a12(trial: Trial) -> Expect:
    """Degrees for radians, millimetres for metres: in the state and in the action."""
    where, factor = trial.variant
    if where == "state":
        t0 = trial.rig.inject("twin", when="out", **outgoing(STATES, times=factor))
        trial.faulted(1.0)
        if factor < 1:  # zero, or nearly: plausible as long as the arm is within the leash of it
            caught = trial.rig.state == "FAULT"
            note = f"a state of {factor:g} times itself {'stopped' if caught else 'NOT noticed'}"
            return Expect(t0, stop=None, honest=False, note=note)
        return Expect(t0, "state|measured|workspace|unit|jump", bound=TICK_BOUND, state=("FAULT",), honest=False)
    t0 = trial.rig.inject("policy", when="out", **outgoing([t.CHUNK], times=factor))
    trial.stopped()
    gross = "another unit" in trial.rig.guard.get("reason", "")
    return Expect(t0, "range|limit|unit", bound=TICK_BOUND if gross else GOAL[1])


def a13(trial: Trial) -> Expect:
    """The gripper goes the other way, from the start or suddenly; then it must not arm, either."""
    rig = trial.rig
    if trial.variant == "start":
        rig.idle()
    begin = rig.driver(fault="gripper_inverted")
    if trial.variant == "start":
        rig.armed()
    with contextlib.suppress(TimeoutError):
        rig.until(lambda: rig.state == "FAULT", 2 * GRIPPER_WAIT + SELF_CHECK_S, "FAULT")
    rig.spin(0.3)
    # the first command that can show it is the second one after arming: from where to the first one is not known
    orders = [at for at in rig.gripper_at if begin < at < rig.guard_at - SELF_CHECK_S]
    t0 = orders[-1] + SELF_CHECK_S if orders else begin
    why = rig.guard.get("reason", "")
    right = rig.state == "FAULT" and "against its command" in why
    problems = [] if right else [f"with an inverted gripper: {rig.state}, {why}"]
    problems += trial.refused("against its command")
    rig.driver(off=True)
    rig.end("guard")  # it wants to be started anew
    rig.start("guard")
    rig.spin(1.0)
    return Expect(t0, "against its command", stop=None, problems=problems, extra={"seen_s": rig.guard_at - begin})


def a14(trial: Trial) -> Expect:
    """A policy for another robot, or with its cameras swapped."""
    rig = trial.rig
    if isinstance(trial.variant, str):
        return refused_checkpoint(trial)
    rig.idle()
    rig.end("policy")
    rig.end("guard")
    t0 = time.monotonic()
    rig.start("guard")
    rig.start("policy", hash="e" * 64, changes=trial.variant)
    rig.spin(3.0)
    problems = trial.refused("another robot than point: (name|action_dt|cameras)", 3.0)
    rig.end("policy")
    rig.end("guard")
    rig.start("guard")
    rig.start("policy")
    return Expect(t0, "", stop=None, problems=problems)


def a15(trial: Trial) -> Expect:
    """The policy is killed."""
    t0 = trial.rig.kill("policy", signal.SIGKILL)
    trial.faulted(2.5)
    trial.rig.start("policy")
    return Expect(t0, GONE, state=("FAULT",))


def a16(trial: Trial) -> Expect:
    """The policy hangs while its DDS threads live: stopped as a whole, or in an endless loop in a callback."""
    if trial.variant == "stopped":
        t0 = trial.rig.kill("policy", signal.SIGSTOP)
        trial.faulted(2.5)
        trial.rig.kill("policy", signal.SIGCONT)
        return Expect(t0, GONE, state=("FAULT",))
    t0 = trial.rig.inject("policy", when="hang", hang=2.2)
    trial.faulted(2.5)
    return Expect(t0, GONE, bound=IN_FLIGHT, state=("FAULT",))


def a17(trial: Trial) -> Expect:
    """The guard is killed; it comes back idle."""
    rig = trial.rig
    t0 = rig.kill("guard", signal.SIGKILL)
    rig.spin(0.6)
    rig.guard = {}
    rig.start("guard")
    begin = time.monotonic()
    rig.until(lambda: rig.state != "", 15.0, "the new guard's state")
    rig.spin(0.3)
    problems = [] if rig.state == "IDLE" else [f"the new guard is {rig.state}"]
    return Expect(t0, stop=None, frozen=0.2, problems=problems, extra={"restarted_s": time.monotonic() - begin})


def a18(trial: Trial) -> Expect:
    """The way from policy to guard is cut: nothing passes, only half of a chunk, or one chunk of many."""
    change = {"blackhole": {"drop": True}, "half": {"drop": True}, "slow": {"keep": 20}}[trial.variant]
    topics = [t.CHUNK_GRIPPER] if trial.variant == "half" else CHUNKS
    t0 = trial.rig.inject("policy", when="out", **outgoing(topics, **change))
    trial.stopped(2.0)
    return Expect(t0, "no action|policy", after_queue=True)


def a19(trial: Trial) -> Expect:
    """The policy is started anew, with the same or with another checkpoint.

    The same one may go on if the guard has held for no longer than its hold_timeout; in every other case nothing may
    move, with the new policy there and its chunks coming, until somebody arms.
    """
    rig, same = trial.rig, trial.variant == "same"
    contracts = len(rig.contracts)
    t0 = rig.kill("policy", signal.SIGTERM)
    rig.end("policy")
    rig.start("policy", hash="0" * 64 if same else "f" * 64)
    begin = time.monotonic()
    rig.until(lambda: len(rig.contracts) > contracts, 20.0, "the new policy's contract")
    back = time.monotonic() - begin
    with contextlib.suppress(TimeoutError):
        rig.until(lambda: rig.state in ("FAULT", "ARMED"), 2.0, "FAULT, or on in time")
    rig.spin(1.5)  # its chunks come
    problems, note = resumed([(at, s) for at, s in rig.history if at >= t0], same)
    steps = rig.steps
    rig.spin(0.3)
    if rig.state != "ARMED" and rig.steps != steps:
        problems.append(f"{rig.steps - steps} steps executed in {rig.state}")
    if same:
        rig.armed()
        rig.until(lambda: rig.steps > steps + 8, 10.0, "steps after arming")
    else:
        problems += trial.refused("contract", 4.0)
        rig.end("guard")
        rig.end("policy")
        rig.start("guard")
        rig.start("policy")
    return Expect(t0, GONE if same else f"{GONE}|contract", problems=problems, note=note, extra={"restarted_s": back})


def resumed(states: Sequence[tuple[float, str]], same: bool) -> tuple[list[str], str]:
    """Judge what a guard did, without being armed, while its policy was started anew.

    Args:
        states: (time [s], state) since the policy was killed.
        same: whether the new one has the same checkpoint.

    Returns:
        What is wrong, and what happened.
    """
    begin = next((at for at, s in states if s in ("HOLDING", "FAULT")), None)
    if begin is None:
        return ["it did not stop"], ""
    again = next((at for at, s in states if at > begin and s == "ARMED"), None)
    if again is None:
        last = states[-1][1]
        return ([] if last == "FAULT" else [f"{last} for more than {HOLD_S:g} s"]), "stayed in FAULT until armed"
    held, faulted = again - begin, any(s == "FAULT" for at, s in states if begin <= at < again)
    problems = []
    if not same:
        problems.append("it moves again with another checkpoint")
    if faulted or held > HOLD_S + 0.05:  # a tick and the wire
        problems.append(f"it moves again without being armed, {held:.2f} s later{', after FAULT' * faulted}")
    return problems, f"went on within the hold of {HOLD_S:g} s"


def a20(trial: Trial) -> Expect:
    """Chunks come again, late, or in the wrong order."""
    t0 = trial.rig.inject("replayer", how=trial.variant)
    trial.rig.spin(1.3)
    return Expect(t0, "duplicate|out-of-order|late chunk|R0 [1-9]", stop=False)


def a21(trial: Trial) -> Expect:
    """DDS packets get lost."""
    t0 = time.monotonic()
    while time.monotonic() < t0 + 3.0:
        trial.rig.arm()  # 20 % and more: it may stop, and must never leave the envelope
        trial.rig.spin(0.3)
    return Expect(t0, stop=False if trial.rig.loss <= 50 else None)


def a22(trial: Trial) -> Expect:
    """Somebody else offers the command topic."""
    t0 = trial.rig.inject("rogue", on=True, send=trial.variant)
    trial.faulted(1.5)
    problems = trial.refused("intruder", 1.0)
    trial.rig.inject("rogue")
    trial.rig.spin(0.3)
    return Expect(t0, "intruder", bound=0.2, state=("FAULT",), problems=problems)


def a23(trial: Trial) -> Expect:
    """The policy drives into a wall of the workspace."""
    rig = trial.rig
    t0 = rig.inject("policy", when="predict", predict={"toward": trial.variant})
    before = rig.clamped
    with contextlib.suppress(TimeoutError):  # seconds away, and diagnostics come once a second
        rig.until(lambda: rig.clamped > before or rig.state != "ARMED", 9.0, "the wall")
    rig.spin(0.5)
    return Expect(t0, f"{CLAMPED}|outside", stop=None, wall=True)


def a23_obstacle(trial: Trial) -> Expect:
    """The policy drives into a box, the table, the arm itself or a joint's limit."""
    way = TOWARD[trial.rig.robot][trial.variant]
    t0 = trial.rig.inject("policy", when="predict", predict={"toward": way})
    rig, limit = trial.rig, trial.variant == "limit"
    with contextlib.suppress(TimeoutError):  # when it is too near is for the guard to say
        rig.until(lambda: rig.state != "ARMED", 3.4, "a stop")
        t0 = rig.guard_at - 0.1
    rig.spin(max(0.6, t0 + 3.4 - time.monotonic() if limit else 0.0))
    named_in = NAMED + 2.0 * limit  # at 0.4 rad/s it is 2 s away
    return Expect(t0, CLAMPED if limit else "too near", stop=None, near=not limit, named_in=named_in)


def a25(trial: Trial) -> Expect:
    """The operator ends a process, or a callback raises."""
    what, node, value = trial.variant
    rig = trial.rig
    if what == "signal":
        t0 = rig.kill(node, value)
    elif what == "predict":
        t0 = rig.inject(node, when="predict raise", predict={"raise": True})
    else:
        t0 = rig.inject(node, when="raise", **{"raise": value})
    begin = time.monotonic()
    trial.stopped(2.0, 0.6)
    gone = what == "signal" or not rig.alive(node)
    problems = []
    if gone:
        with contextlib.suppress(TimeoutError):
            rig.until(lambda: not rig.alive(node), 5.0, f"{node} to end")
        if rig.alive(node):
            problems.append(f"{node} is still there after 5 s")
        elif what == "signal" and rig.processes[node].returncode != 0:
            problems.append(f"{node} ended with code {rig.processes[node].returncode}")
        if what != "signal" and not any("injected" in line for line in rig.lines[node]):
            problems.append(f"{node} does not say why it ended")
        rig.end(node)
        rig.start(node)
        rig.spin(1.0)
    names = {"guard": "stopped|disarmed|IDLE|injected|raised", "policy": f"{GONE}|injected"}[node]
    states = ("IDLE", "HOLDING", "FAULT")
    return Expect(
        t0,
        names,
        state=states,
        bound=GOAL[1] if node == "guard" or what == "predict" else IN_FLIGHT,
        problems=problems,
        extra={"gone_s": time.monotonic() - begin},
    )


def a26(trial: Trial) -> Expect:
    """The guard gets no processor."""
    rig = trial.rig
    t0 = time.monotonic()
    if trial.variant == "hogs":
        code = "import time\nend = time.monotonic() + 1.2\nwhile time.monotonic() < end: pass"
        hogs = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2 * (os.cpu_count() or 1))]
        rig.spin(1.4)
        for hog in hogs:
            hog.wait()
        return Expect(t0, stop=None)
    t0 = rig.kill("guard", signal.SIGSTOP)
    rig.spin(float(trial.rng.uniform(0.05, 0.3)))
    back = rig.kill("guard", signal.SIGCONT)
    trial.stopped(1.0, 0.4)
    names = "overrun|old|no action|clock|policy is gone|no sign of life"
    return Expect(back, names, stop=None, held=True)  # the reader cannot tell a pause from a deceleration


def restart(trial: Trial) -> Expect:
    """A process is killed, started again, and the arm moves on after arming."""
    rig, name = trial.rig, trial.variant
    t0 = rig.kill(name, signal.SIGKILL)
    rig.spin(float(trial.rng.uniform(0.1, 1.5)))
    rig.end(name)
    begin = time.monotonic()
    rig.start(name)
    rig.spin(1.0)
    return back_in_motion(trial, t0, begin)


def back_in_motion(trial: Trial, t0: float, begin: float) -> Expect:
    """Arm and require motion again."""
    problems = []
    try:
        trial.rig.idle()
        trial.rig.reset()  # a new twin waits for it
        trial.rig.move(0.5)
    except (TimeoutError, Void) as e:
        problems.append(str(e))
    return Expect(t0, stop=None, problems=problems, extra={"moving_again_s": time.monotonic() - begin})


def partition(trial: Trial) -> Expect:
    """The policy is cut off for some time and comes back."""
    t0 = trial.rig.kill("policy", signal.SIGSTOP)
    trial.faulted(2.5)
    trial.rig.spin(float(trial.rng.uniform(0.0, 2.0)))
    begin = trial.rig.kill("policy", signal.SIGCONT)
    trial.rig.spin(0.5)
    problems = [] if trial.rig.state == "FAULT" else [f"{trial.rig.state} without being armed"]
    after = back_in_motion(trial, t0, begin)
    return Expect(t0, GONE, state=("FAULT",), problems=[*problems, *after.problems], extra=after.extra)


def late_joiner(trial: Trial) -> Expect:
    """Every process starts anew, in a random order and seconds apart."""
    rig = trial.rig
    names = ["twin", "policy", "guard"]
    t0 = time.monotonic()
    rig.idle()
    for name in names:
        rig.end(name)
    rig.guard = {}
    begin = time.monotonic()
    for i in trial.rng.permutation(len(names)):
        rig.start(names[i])
        rig.spin(float(trial.rng.uniform(0.0, 1.5)))
    rig.until(lambda: rig.state != "", 15.0, "the guard's state")
    return back_in_motion(trial, t0, begin)


def second_guard(trial: Trial) -> Expect:
    """A second guard is started by mistake, and leaves again; neither may move the arm while both are there."""
    rig = trial.rig
    before = time.monotonic()
    rig.second, rig.second_history = {}, []
    rig.start("guard_2")
    try:
        rig.until(lambda: rig.state == "FAULT" and bool(rig.second), 15.0, "FAULT, and the second guard's state")
    except TimeoutError as e:
        rig.end("guard_2")
        return Expect(before, "second writer", stop=None, problems=[str(e)])
    t0 = next(at for at, s in rig.history if at > before and s == "FAULT")  # when it joined only the guard knows
    problems = trial.refused("second writer")
    with contextlib.suppress(TimeoutError):
        rig.until(lambda: matches("second writer", rig.second["refused"]), 2.0, "the second guard's no", rig.arm)
    armed, note = armed_for(rig.second_history), ""
    if armed > 0.0:  # asked before it had discovered the first one: a second commander, of whom A22 says how long
        note = "the second guard armed for a moment"
    if armed > SECOND_S:
        problems.append(f"the second guard was armed for {1e3 * armed:.0f} ms")
    if rig.second["state"] == "ARMED" or not matches("second writer", rig.second["refused"]):
        problems.append(f"the second guard: {rig.second['state']}, {rig.second['refused'] or 'nothing'}")
    rig.end("guard_2")
    begin = time.monotonic()
    rig.spin(3.5)  # a killed node is forgotten after its lease
    after = back_in_motion(trial, t0, begin)
    problems += after.problems
    return Expect(
        t0 - 0.3,
        "second writer",
        stop=None,
        held=True,
        state=("FAULT",),
        problems=problems,
        note=note,
        extra={**after.extra, "second_armed_ms": 1e3 * armed},
    )


def armed_for(states: Sequence[tuple[float, str]]) -> float:
    """Return the longest time that a guard was armed [s], from (time [s], state); until now if it still is."""
    ends = [at for at, _ in states[1:]] + [time.monotonic()]
    return max((end - at for (at, s), end in zip(states, ends, strict=False) if s == "ARMED"), default=0.0)


def a24(trial: Trial) -> Expect:
    """The arm's own stop is hit, and released."""
    rig = trial.rig
    t0 = rig.driver(fault="driver_mode", mode=trial.variant)
    trial.faulted(1.0, 0.3)
    rig.driver(off=True)
    rig.spin(0.5)
    problems = [] if rig.state == "FAULT" else [f"{rig.state} after the release"]
    return Expect(t0, trial.variant, bound=TICK_BOUND + 0.0125, state=("FAULT",), silent=True, problems=problems)


WALLS = ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1), (0.6, 0.6, -0.5))
GUARD_RAISES = tuple(("raise", "guard", where) for where in (POSE, t.CHUNK, "timer"))
SIGNALS = tuple(("signal", node, n) for n in (signal.SIGINT, signal.SIGTERM) for node in ("guard", "policy"))
PANDA_WAYS = {
    "box": (1, 0, 0, 0, 0, 0, 0), "table": (0, 1, 0, 0, 0, 0, 0), "itself": (0, 0, 0, -0.3, 0, -1, 0),
    "limit": (0, 0, 0, 0, 0, 1, 0),
}  # fmt: skip
TOWARD = {
    "arm": PANDA_WAYS, "panda": PANDA_WAYS,
    "boxed": {"box": (1, 0, 0), "table": (1, 0.2, 0), "itself": (1, 0, 0.2), "limit": (0, 0, 1)},
}  # fmt: skip
DAMAGE = {"statistics": scale_std, "statistics and manifest": scale_std, "key and manifest": delete_key}
OTHERS = {"same name, other dims": other_dims, "same name, other camera": other_camera}
CHECKPOINTS = {  # variant -> what must be named
    "same name, other dims": r"action\.\w+\.size is 3 for the policy and 4 here",
    "same name, other camera": r"cameras\.\w+\.name is '\w+' for the policy and 'elsewhere' here",
    "statistics": r"contract\.json", "statistics and manifest": "contract hash", "key and manifest": "contract hash",
    "another arm": "pusht",
}  # fmt: skip
BOTH = ("point", "joints")
ABSOLUTE = ("point_absolute", "joints")  # their circle is one in time: at first they catch up with it
ROWS = {row.id: row for row in (
    Row("A1", "NaN or Inf in an action", "R2 within a tick; R3 after 3 in 1 s", a1, control=True,
        robots=(*BOTH, "twist"),
        variants=[(how, value) for how in ("policy", "wire", "wire_gripper") for value in ("nan", "inf")]),
    Row("A2", "stale state: the driver stops", "R3", a2, robots=BOTH,
        variants=("stopped", "silent", "stopped", "short")),
    Row("A3", "a camera falls silent", "finish at most 100 ms, R2; R3 after 1 s", a3, variants=("all", "one")),
    Row("A4", "a camera repeats itself", "as A3", a4, variants=("old", "new")),
    Row("A5", "clock skew", "refuse to arm; running: R3", a5, variants=[
        *(("running", s * x) for x in (0.02, 0.06, 0.5, 3600.0) for s in (1, -1)),
        *(("arming", s * x) for x in (0.5, 3600.0) for s in (1, -1)),
    ]),
    Row("A6", "clock jumps", "R2; fresh data only", a6,
        variants=(("twin", -10.0), ("guard", -10.0), ("guard", 10.0), ("twin", 10.0))),
    Row("A7", "topics out of step", "R0; as A3 when none is valid", a7, variants=("ramp", "rare")),
    Row("A8", "inference late", "expired actions dropped, R2 when none is left", a8, variants=(0.5, 1.0, 2.0, 0.1)),
    Row("A9", "chunks do not join", "blend or R2, inside the envelope", a9, control=True,
        robots=("joints", "point_absolute"), variants=(("jump", 1), ("delay", 0.375), ("jump", -1), ("delay", -0.03))),
    Row("A10", "action out of range", "R1, then R2", a10, control=True,
        variants=(("times", 10.0), ("bang", 1.0), ("times", -10.0), ("bang", 0.25), ("times", 0.1), *DAMAGE)),
    Row("A11", "joint names", "by name only; R3", a11, robots=BOTH[::-1],
        variants=("permute", "swap", "drop", "duplicate", "add")),
    Row("A12", "units", "R3 in one tick", a12, robots=BOTH, variants=[
        (where, x) for x in (57.3, 1000.0, 0.001) for where in ("state", "action") if (where, x) != ("action", 0.001)
    ]),
    Row("A13", "gripper the other way round", "FAULT; refuse to arm", a13, variants=("start", "sudden")),
    Row("A14", "another robot's policy", "refuse to arm, name the field", a14, variants=(
        {"name": "other_arm"}, {"action_dt": 0.02}, {"cameras": ROBOTS["point"]["cameras"][::-1]},
        "another arm", *OTHERS,
    )),
    Row("A15", "policy killed", "R2, R3", a15, robots=(*BOTH, "twist")),
    Row("A16", "policy hangs", "R2, R3", a16, variants=("stopped", "loop")),
    Row("A17", "guard killed", "the driver holds within 100 ms; restart is IDLE", a17),
    Row("A18", "partition", "run out the chunk, end at rest", a18, variants=("blackhole", "half", "slow")),
    Row("A19", "policy restarted", "on within the hold of 1 s, else not until armed; another checkpoint: refused", a19,
        variants=("same", "other")),
    Row("A20", "late, duplicate, reordered chunks", "R0", a20, variants=("duplicate", "late", "reorder")),
    Row("A21", "packet loss 5, 20, 50 %", "5 %: no stop; never a violation", a21, loss=(50, 200, 500)),
    Row("A22", "second commander", "R3, by name", a22, robots=BOTH, variants=("nothing", "poses", "nan")),
    Row("A24", "protective stop, emergency stop", "FAULT within a tick; no motion on release", a24, robots=BOTH,
        variants=("protective_stop", "emergency_stop")),
    Row("A23", "collision, workspace", "stops inside", a23, robots=BOTH, variants=WALLS),
    Row("A23b", "boxes, the arm itself, joint limits", "stops 1 cm before", a23_obstacle, robots=("arm", "boxed"),
        variants=tuple(PANDA_WAYS)),
    Row("A25", "signals, exceptions", "R2, then exit", a25,
        variants=(*SIGNALS, *GUARD_RAISES, ("predict", "policy", None), ("raise", "policy", POSE))),
    Row("A26", "no processor for the guard", "R2, counted", a26, variants=("hogs", "stopped")),
    Row("R1", "kill and restart each process", "moves again after arming", restart,
        variants=("policy", "guard", "twin")),
    Row("R2", "partition and reconnect", "FAULT; moves again after arming", partition),
    Row("R3", "late joiners, any order", "moves after arming", late_joiner),
    Row("R4", "a second guard", "FAULT; moves again when it has left", second_guard),
)}  # fmt: skip
PHYSICAL = ("A1", "A2", "A8", "A9", "A13", "A15", "A16", "A23b", "A24")  # also with the Panda in MuJoCo
PANDA_ROWS = {f"{name}p": replace(ROWS[name], id=f"{name}p", robots=("panda",), control=False) for name in PHYSICAL}
NOT_PHYSICAL = {  # of the light rows, why MuJoCo would add nothing
    **dict.fromkeys(("A3", "A4", "A7"), "pictures, which are made up with either twin"),
    **dict.fromkeys(("A5", "A6", "A11", "A12"), "states are changed on the wire, behind either twin"),
    **dict.fromkeys(("A10", "A14"), "a chunk or a checkpoint is refused before anything moves otherwise than in A1"),
    **dict.fromkeys(("A18", "A19", "A20", "A21", "A22"), "between policy and guard; the arm only brakes, as in A15"),
    "A17": "the driver's timeout is the same code; it is measured where the lag is known",
    "A23": "the workspace is the tool's, for Cartesian commands; joints, boxes and the arm itself are A23bp",
    **dict.fromkeys(("A25", "A26", "R1", "R2", "R3", "R4"), "processes; the arm only brakes, as in A15"),
}  # fmt: skip
SEEN = "the judge sees it in the differences of a jerk-limited path: a tick, a command's period and the wire both ways"
PROMISES: dict[str, tuple[float | None, str, str]] = {  # row -> table A's bound [s], its words, what is tested here
    "A1": (0.01, "R2 in the same tick; R3 after 3 in 1 s",
        f"30 ms: {SEEN}; what the policy refuses itself is told at its next check, 20 ms; FAULT is required"),
    "A2": (0.1, "older than 50 ms: R3, decelerates within 100 ms",
        "150 ms from the first state that is missing: the shipped state_timeout is 100 ms, not 50; two missing states "
        "must not stop it"),
    "A3": (0.2, "image older than 150 ms: at most 100 ms of the chunk, then R2; R3 after 1 s",
        "280 ms from the first picture that is missing (the table's would be 200): with one silent camera the last "
        "valid instant counts until it is 150 ms old, so that the chunk of 300 ms is run out"),
    "A4": (0.35, "5 identical pictures + 100 ms, then as A3",
        "450 ms: pictures count as frozen once the arm has moved by 10 mm, and the first repetition is a period late"),
    "A5": (0.1, "running: R3 within 100 ms; refuse to arm, naming both hosts",
        f"150 ms to the deceleration: {SEEN}. FAULT is required, but not within a time: stamps that jump back are held "
        "first (A6) and fault after 1 s. 20 ms are tolerated (max_skew 50 ms) and must not stop it; a clock that is "
        "60 ms behind looks like a state that took 60 ms, which state_timeout (100 ms) allows"),
    "A6": (0.1, "R2; only fresh data, within 1 s", f"150 ms: {SEEN}; that it goes on is not judged"),
    "A7": (0.1, "drop; none valid for 150 ms: as A3",
        "150 ms from the end of the last valid action; from the injection 1 s (ramp), 450 ms (rare), as the condition "
        "comes with the delay"),
    "A8": (0.1, "R2 when the queue is empty, within 100 ms", f"150 ms from the end of the last valid action: {SEEN}"),
    "A9": (None, "inside the envelope, 0 violations", "the same; late by 30 steps and early by 30 ms, 2 policies"),
    "A10": (0.1, "R1, then R2 within 100 ms; other statistics: refuse to start",
        f"150 ms from the prediction: six of its steps (75 ms) are clamped first, and {SEEN}. By the action's limits; "
        "percentiles of the training data are the policy node's unit tests'"),
    "A11": (0.01, "by name only; missing, extra, twice: refuse to arm, show both lists",
        "while running: R3 within 30 ms for the guard's own joints; a gripper that only the policy reads: 150 ms from "
        "the end of the last valid action. Another order of names and values means nothing. Detected: missing, extra, "
        "twice, and two exchanged names if the measured values jump (more than the leash + twice the speed limit) or "
        "then do not follow their commands (twice the leash). NOT detected: two exchanged names while both joints read "
        "nearly the same; that is for the preflight, whose replay finds the joint order"),
    "A12": (0.01, "R3 in one tick; 0 commands outside",
        f"30 ms: {SEEN}; an action that is not beyond its limits by half their range (a delta: by ten ranges) is "
        "A10's: HOLDING within 150 ms. A state of 0.001 times itself is noticed where it jumps by more than the leash"),
    "A13": (None, "refuse to arm on disagreement", "FAULT 1 s after the first gripper command that can show it"),
    "A14": (None, "refuse to load, name the field", "the guard refuses to arm, dita robot policy to start, by field"),
    "A15": (0.15, "R2: decelerates within 150 ms; R3", "the same"),
    "A16": (0.15, "as A15",
        "the same; in a loop 200 ms, as the prediction that runs (30 ms, and its wait for the interpreter) is still "
        "sent and is a sign of life: the stream ends with it"),
    "A17": (0.1, "the driver holds within 100 ms; restart is IDLE",
        "the measured position stands within 200 ms: the timeout, a control step and the simulated arm's lag"),
    "A18": (0.1, "run out the chunk, end at rest, 0 jumps", f"150 ms from the end of the last valid action: {SEEN}"),
    "A19": (0.15, "no motion until the hash is equal, observations are fresh and, if held for > 1 s, it is re-armed",
        "the same, by the held time that was measured: the same checkpoint may go on within 1 s"),
    "A20": (None, "0 executed", "the same, and no stop"),
    "A21": (None, "5 %: no stop; 20 %: no violation; 50 %: R2",
        "50 %: R2 is not required, as chunks are repeated until they arrive: only no violation"),
    "A22": (0.2, "R3 within 200 ms, by name", "the same"),
    "A23": (None, "stops 1 cm before; 0 contacts",
        "the workspace's own walls: no command and no measured position beyond them; the 1 cm are A23b's. Named within "
        "1 s of the command that comes to the wall"),
    "A23b": (None, "stops 1 cm before; 0 contacts", "the same; a joint's own limit: no command beyond it"),
    "A24": (1 / 160, "nothing is sent after a tick; no motion on release",
        "42 ms from the order to the last command: the twin tells its mode at its next step (12.5 ms), and the wire "
        "three times"),
    "A25": (0.1, "R2 within 100 ms, gone within 5 s",
        f"the guard, and a prediction that raises: 150 ms: {SEEN}. The policy's process: 200 ms: its sign of life is "
        "missed after 100 ms, and the prediction that runs is one"),
    "A26": (None, "R2, counted, 0 violations",
        "no time: after a pause HOLDING or FAULT is required; beside hogs only no violation"),
    **dict.fromkeys(("R1", "R2", "R3"), (None, "recovery (issue)", "moves again once armed, not before")),
    "R4": (None, "recovery (issue)",
        "the first guard is in FAULT and neither arms while both are there; a second one that is asked before it has "
        "discovered the first is in FAULT within 200 ms, as A22 has it; then the first moves again"),
}  # fmt: skip
HELPERS = {"A20": "replayer", "A22": "rogue"}  # processes that a row needs besides


# --- one repetition


def bound_of(row: Row, expect: Expect) -> float:
    """Return by when a repetition must decelerate [s]; MuJoCo computes on the cores of what is judged: the goal's."""
    return max(expect.bound, GOAL[1]) if row.robots == ("panda",) else expect.bound


def judge(row: Row, expect: Expect, verdict: Mapping[str, Any], rig: Rig) -> dict[str, Any]:
    """Compare a verdict with what was promised; returns the repetition's numbers and its problems."""
    problems, bound = list(expect.problems), bound_of(row, expect)
    if verdict["non_finite"]:
        problems.append(f"{verdict['non_finite']} commands not finite")
    if verdict["violations"]:
        problems.append(f"outside the envelope: {verdict['violations']}")
    if (verdict["measured_outside"] and expect.honest) or verdict["warnings"]:
        problems.append(f"measured outside {verdict['measured_outside']}, warnings {verdict['warnings']}")
    nearest = verdict["clearance"]
    if nearest is not None and nearest["m"] < MARGIN:
        problems.append(f"{1e3 * nearest['m']:.1f} mm, {nearest['what']}")
    if expect.near and (nearest is None or nearest["m"] > NEAR):
        problems.append(f"it never came near: {nearest}")
    if verdict["executed_back"]:
        problems.append(f"{verdict['executed_back']} steps executed out of order")
    decel, still, state = verdict["decel_s"], verdict["still_s"], verdict["state"]
    begin = max(0.0, verdict["queue_s"] or 0.0) if expect.after_queue else 0.0  # of the condition
    decel = None if decel is None else decel - begin
    if expect.stop is False and (state is not None or decel is not None):
        problems.append(f"stopped without need: {state}")
    if expect.silent:
        decel, still = verdict["ended_s"], None
    if expect.stop:
        if decel is None:
            problems.append("no deceleration")
        elif decel > bound:
            problems.append(f"deceleration after {1e3 * decel:.0f} ms")
        if not expect.silent and (still is None or still - verdict["decel_s"] > STAND):
            problems.append(
                "no standstill" if still is None else f"standstill {still - verdict['decel_s']:.2f} s later"
            )
        if expect.latest is not None and verdict["decel_s"] is not None and verdict["decel_s"] > expect.latest:
            problems.append(f"deceleration {1e3 * verdict['decel_s']:.0f} ms after the injection")
    if (expect.stop or expect.held) and not set(verdict["states"]) & set(expect.state):
        problems.append(f"never {' or '.join(expect.state)}: {verdict['states']}")
    if expect.frozen is not None and (verdict["measured_still_s"] or 0.0) > expect.frozen:
        problems.append(f"the arm moved for {verdict['measured_still_s']:.3f} s")
    named = verdict["named"]["s"] if expect.names and verdict["named"] else None
    if expect.wall:
        if verdict["wall_s"] is None:
            problems.append("it never came to the wall")
        elif named is not None:
            named = max(0.0, named - verdict["wall_s"])
    if expect.names and (named is None or named > expect.named_in):
        problems.append("not named" if named is None else f"named after {named:.2f} s")
    return {
        "ok": not problems, "problems": problems, "stop": expect.stop, "bound_s": bound,
        "decel_s": decel if expect.stop is not False else None,
        "decel_from_injection_s": verdict["ended_s" if expect.silent else "decel_s"],
        "stand_s": None if still is None or verdict["decel_s"] is None else still - verdict["decel_s"],
        "speeds": verdict["speeds"] if problems else None, "state_s": state["s"] if state else None, "state": state,
        "reaction_s": state["s"] - begin if state and expect.stop else None,
        "fault_s": verdict["fault_s"], "measured_still_s": verdict["measured_still_s"] if expect.frozen else None,
        "named_s": named, "named_in": expect.named_in, "must_name": bool(expect.names),
        "text": verdict["named"]["text"] if expect.names and verdict["named"] else None,
        "commands": verdict["commands"], "details": verdict["details"],
        "violations": verdict["violations"], "non_finite": verdict["non_finite"],
        "speed": verdict["speed"], "extra": dict(expect.extra), "clearance": nearest, "note": expect.note,
    }  # fmt: skip


def repetition(row: Row, rig: Rig, k: int, seed: int) -> dict[str, Any]:
    """Play one repetition and return its record."""
    rng = np.random.default_rng([seed, zlib.crc32(row.id.encode()), k])
    variant = row.variants[k % len(row.variants)]
    helper = HELPERS.get(row.id)
    for name in set(HELPERS.values()) - {helper}:
        rig.end(name)  # the replayer also offers chunks: while it lives, a policy is never quite gone
    if helper and not rig.alive(helper):
        rig.start(helper)
        rig.spin(1.5)
    for attempt in range(TRIES):
        since = time.monotonic()
        with contextlib.suppress(Void) if rig.loss > 50 else contextlib.nullcontext():
            catch_up = 0.8 * (rig.robot in ABSOLUTE)
            rig.move(catch_up + float(rng.uniform(*row.phase)))
        trial = Trial(rig, variant, rng, since)
        expect = row.run(trial)
        verdict = rig.verdict(since, expect.t0, expect.names or "$^")
        steady = rig.loss > 50 or (verdict["speed"] or 0.0) > 0.1
        rig.clear()
        if steady or attempt == TRIES - 1:
            break
    result = judge(row, expect, verdict, rig)
    recover(rig)
    return {
        "row": row.id, "k": k, "seed": seed, "variant": variant, "loss": rig.loss, "control": rig.unsafe,
        **result, "voids": attempt,
    }  # fmt: skip


def recover(rig: Rig) -> None:
    """Bring the rig back to idle with the arm where it began, for the next repetition."""
    for name in ("twin", "policy", "guard"):
        if not rig.alive(name):
            rig.end(name)
            rig.start(name)
            rig.spin(1.0)
    rig.idle()
    rig.reset()
    rig.spin(0.1)


# --- the table


def run(rows: Sequence[Row], repeat: int, seed: int, work: Path, domain_id: int, control: bool) -> list[dict[str, Any]]:
    """Play what is missing of every row, and of the control run; one faulty row does not stop the others.

    Returns every trial of this seed in `work`, other rows' included: the page shows what was played there.
    """
    work.mkdir(parents=True, exist_ok=True)
    path = work / "trials.jsonl"
    records = read_trials(path)
    done = {(r["row"], r["k"], r["seed"], r["control"]) for r in records}
    todo = [(row, k, False) for row in rows for k in range(repeat)]
    todo += [(row, k, True) for row in rows if row.control and control for k in range(max(1, repeat // 4))]
    missing = [(row, k, unsafe) for row, k, unsafe in todo if (row.id, k, seed, unsafe) not in done]
    order = [row.id for row in rows]
    missing.sort(key=lambda item: (rig_key(*item), order.index(item[0].id), item[1]))
    with progress() as bar, path.open("a") as lines:
        task = bar.add_task("chaos", total=len(todo), completed=len(todo) - len(missing), text="")
        with Rigs(domain_id) as rigs:
            for row, k, unsafe in missing:
                record = attempt(rigs, row, k, unsafe, seed)
                record |= {"load": os.getloadavg()[0], "commit": git("rev-parse", "HEAD"), "time": time.time()}
                lines.write(json.dumps(record) + "\n")
                lines.flush()
                records.append(record)
                bar.update(
                    task, advance=1, text=f"{row.id} {'' if record['ok'] else '; '.join(record['problems'])[:80]}"
                )
    return [r for r in records if r["k"] < repeat and r["seed"] == seed]


def rig_key(row: Row, k: int, unsafe: bool) -> tuple[str, int, bool]:
    """Return which rig a repetition runs on."""
    return row.robots[k // len(row.variants) % len(row.robots)], row.loss[k % len(row.loss)], unsafe


def attempt(rigs: Rigs, row: Row, k: int, unsafe: bool, seed: int) -> dict[str, Any]:
    """Play a repetition; a rig that does not work is replaced, once."""
    for last in (False, True):
        try:
            return repetition(row, rigs.get(*rig_key(row, k, unsafe)), k, seed)
        except (TimeoutError, Void, queue.Empty, OSError) as e:
            rigs.close()
            if last:
                variant = row.variants[k % len(row.variants)]
                return {
                    "row": row.id, "k": k, "seed": seed, "variant": variant, "loss": row.loss[k % len(row.loss)],
                    "control": unsafe, "ok": False, "problems": [f"rig: {e}"],
                }  # fmt: skip
    raise AssertionError


class Rigs:
    """The rig of the moment; another kind replaces it."""

    def __init__(self, domain_id: int) -> None:
        self._domain_id, self._made = domain_id, 0
        self._rig: Rig | None = None
        self._key: Any = None

    def get(self, robot: str, loss: int, unsafe: bool) -> Rig:
        """Return a rig of a kind."""
        key = (robot, loss, unsafe)
        if self._rig is None or self._key != key:
            self.close()
            domain_id = self._domain_id + self._made % DOMAINS  # a killed rig is known to its domain for some seconds
            self._rig, self._key, self._made = Rig(domain_id, robot, loss, unsafe), key, self._made + 1
        return self._rig

    def close(self) -> None:
        """End the rig."""
        if self._rig is not None:
            self._rig.close()
            self._rig = None

    def __enter__(self) -> Rigs:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def read_trials(path: Path) -> list[dict[str, Any]]:
    """Return the repetitions that were played before; a kill may have cut the last line."""
    if not path.exists():
        return []
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    path.write_text("".join(whole))
    return [json.loads(line) for line in whole]


def progress() -> Progress:
    """Return the bar: what was played last, how many, how long it will take."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}"))


def git(*arguments: str) -> str:
    """Return git's answer, or nothing."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


# --- the page


def times(records: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Return one number of every repetition that has it."""
    return [r[key] for r in records if r.get(key) is not None]


def spread(values: Sequence[float], digits: int = 0, scale: float = 1e3) -> str:
    """Return p50 / max, with p99 where there are enough."""
    if not values:
        return "-"
    shown = [np.median(values), *([np.percentile(values, 99)] if len(values) >= ENOUGH else []), max(values)]
    return " / ".join(f"{scale * v:.{digits}f}" for v in shown)


def line(row: Row, records: Sequence[Mapping[str, Any]]) -> str:
    """Return a row's line of the table."""
    stops = [r for r in records if r.get("stop") or (r.get("stop") is None and r.get("state"))]
    named = [r for r in records if r.get("must_name")]
    within = sum(r["named_s"] is not None and r["named_s"] <= r.get("named_in", NAMED) for r in named)
    extra: dict[str, list[float]] = {}
    for r in records:
        for name, value in r.get("extra", {}).items():
            if not isinstance(value, bool):
                extra.setdefault(name, []).append(value)
    notes = [f"{name} {spread(values, 1, 1.0)}" for name, values in extra.items()]
    bounds = sorted({r["bound_s"] for r in records if r.get("stop")})
    if bounds:
        notes.append(f"bound {', '.join(f'{1e3 * b:.0f}' for b in bounds)} ms")
    said = [r["note"] for r in records if r.get("note")]
    notes += [f"{note}: {said.count(note)}" for note in sorted(set(said))]
    for what, key in (("FAULT", "fault_s"), ("measured standstill", "measured_still_s")):
        if times(records, key):
            notes.append(f"{what} after {spread(times(records, key))} ms")
    nearest = [r["clearance"]["m"] for r in records if r.get("clearance")]
    if nearest:
        notes.append(f"nearest {1e3 * min(nearest):.1f} mm")
    voids = sum(r.get("voids", 0) for r in records)
    if voids:
        notes.append(f"{voids} repeated: the arm stood before the fault")
    cells = [
        row.id, row.fault, row.reaction, f"{sum(r['ok'] for r in records)}/{len(records)}",
        spread(times([r for r in stops if r.get("stop")], "decel_s")),
        spread(times([r for r in stops if r.get("stop")], "decel_from_injection_s")),
        spread(times(stops, "state_s")), spread(times(stops, "stand_s")),
        str(sum(sum(r.get("violations", {}).values()) for r in records)),
        str(sum(r.get("non_finite", 0) for r in records)),
        f"{within}/{len(named)}" if named else "-", "; ".join(notes),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


HEAD = """# Faults of the live stack, injected over real DDS

`{command}`. {n} repetitions, {ok} as promised. Machine: {machine}; load average up to {load:.1f}; commit {commit};
seed {seed}; played until {when} UTC.

Processes: a light twin (a tool position in deltas or absolute, as poses or twists, six joints, or the Panda's seven,
each with a lag; rows that end in p: robosuite's Panda in MuJoCo, with made-up pictures), the shipped policy node around
a rule that keeps the arm on a circle at a steady speed, the shipped guard node, and a reader that sees only the wire
and judges every command by its stamps. A fault comes at a random moment of a steady motion. The reader works out the
clearance between the arm's capsules, and to boxes, of every command and of every measured state by itself: less than
{margin:.0f} mm is not as promised. In MuJoCo a warning or a contact of the arm with anything but its other finger is
not as promised, either.
**Condition -> deceleration** counts from the moment at which the condition of the table is true: the fault itself, or,
where the reaction is to run out a chunk, the end of the last valid action; **fault -> deceleration** counts from the
injection. Deceleration begins with the first command after the last one at {slower:.0%} or more of the slowest command
of the {regular:g} s before the fault; standstill (0.01 m/s or rad/s) counts from there. Times are as commands arrive at
the reader, p50 / max in ms (p50 / p99 / max from {enough} repetitions on). Goals: deceleration 30 / 150 ms, standstill
500 ms, 0 violations, 0 not finite, named within 1 s. A row's own bound is in its notes: a repetition beyond it is
not as promised. It is shorter than the goal where the fault is in the message itself, but not in MuJoCo, which computes
a large part of the time on the cores of the processes that are judged.

"""
COLUMNS = (
    "#", "fault", "reaction", "as promised", "condition -> deceleration", "fault -> deceleration", "fault -> state",
    "deceleration -> standstill", "violations", "not finite", "named", "notes",
)  # fmt: skip


BOUNDS = """### Against faults.md, and the issue's goals

**Condition -> reaction** is the arrival of the guard's own state (HOLDING, FAULT or IDLE) at the reader: one hop after
the guard has decided; where an arm comes to rest at the end of a chunk, that is stream_timeout (100 ms) later than the
deceleration. The bound is table A's, or its 100 ms for every fault; times in ms. The goals are for condition ->
deceleration and, the last, for deceleration -> standstill.

"""
BOUND_COLUMNS = (
    "#", "faults.md", "tested here", "bound", "condition -> reaction", "reaction within it", "deceleration within it",
    "p50 <= 30", "max <= 150", f"p99 <= 100 (from n = {ENOUGH})", "standstill <= 500",
)  # fmt: skip


def page(rows: Sequence[Row], records: Sequence[Mapping[str, Any]], command: str, seed: int) -> str:
    """Return the page of evidence."""
    real = [r for r in records if not r["control"]]
    load = max((r.get("load", 0.0) for r in records), default=0.0)
    commits = sorted({r.get("commit", "")[:12] for r in records})
    last = max((r.get("time", 0.0) for r in records), default=0.0)
    system = f"{platform.machine()}, {platform.release()}, Python {platform.python_version()}"
    text = HEAD.format(
        command=command,
        n=len(real),
        ok=sum(r["ok"] for r in real),
        seed=seed,
        load=load,
        machine=f"{os.cpu_count()} cores, {system}",
        commit=", ".join(commits),
        when=time.strftime("%Y-%m-%d %H:%M", time.gmtime(last)),
        slower=SLOWER,
        margin=1e3 * MARGIN,
        regular=REGULAR,
        enough=ENOUGH,
    )
    for title, wanted in (("The light twin", ROWS), ("robosuite's Panda in MuJoCo", PANDA_ROWS)):
        played = [(row, of) for row in rows if row.id in wanted and (of := [r for r in real if r["row"] == row.id])]
        if played:
            text += f"## {title}\n\n" + markdown(COLUMNS, [line(row, of) for row, of in played])
            text += BOUNDS + markdown(BOUND_COLUMNS, [bounds_line(row, of) for row, of in played])
        if played and wanted is PANDA_ROWS:
            text += "Rows that are not played with it: "
            text += "; ".join(f"{name}: {why}" for name, why in NOT_PHYSICAL.items()) + ".\n\n"
    text += "## Not as promised\n\n"
    bad: dict[tuple[str, str], int] = {}
    for r in real:
        for problem in r["problems"]:
            key = (r["row"], f"{json.dumps(r['variant'], default=str)}: {problem}")
            bad[key] = bad.get(key, 0) + 1
    text += "\n".join(f"- {row} {what} ({n} times)" for (row, what), n in bad.items()) or "Nothing."
    text += "\n\n## Control: the same faults with the guard's checks off\n\n"
    controls = [(row, [r for r in records if r["control"] and r["row"] == row.id]) for row in rows if row.control]
    lines = [
        f"| {row.id} | {sum(caught(r) for r in of)}/{len(of)} | {what_was_caught(of)} |" for row, of in controls if of
    ]
    if lines:
        text += "The reader must catch the guard doing what it should not.\n\n| # | caught | as |\n|---|---|---|\n"
    return text + ("\n".join(lines) or "Not played.") + "\n"


def markdown(columns: Sequence[str], lines: Sequence[str]) -> str:
    """Return a table."""
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *lines]) + "\n\n"


def bounds_line(row: Row, records: Sequence[Mapping[str, Any]]) -> str:
    """Return a row's line of the second table: table A's bound, the tested one, and the issue's goals."""
    limit, words, tested = PROMISES[row.id.removesuffix("p")]
    stops = [r for r in records if r.get("stop")]
    decel, react, stand = (times(stops, key) for key in ("decel_s", "reaction_s", "stand_s"))
    within = [
        f"{sum(v <= limit for v in values)}/{len(stops)}" if limit is not None and stops else "-"
        for values in (react, decel)
    ]
    cells = [
        row.id, words, tested, "-" if limit is None else f"{1e3 * limit:.0f}", spread(react), *within,
        met(decel, np.median, GOAL[0]), met(decel, max, GOAL[1]),
        met(decel, lambda x: np.percentile(x, 99), 0.1) if len(decel) >= ENOUGH else f"- (n {len(decel)})",
        met(stand, max, STAND),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def met(values: Sequence[float], of: Callable[[Any], Any], goal: float) -> str:
    """Return whether a goal is met, and by how much."""
    if not values:
        return "-"
    value = float(of(values))
    return f"{'yes' if value <= goal else 'NO'} ({1e3 * value:.0f})"


def caught(record: Mapping[str, Any]) -> bool:
    """Return whether the reader saw a command that should not have been sent."""
    return bool(record.get("violations") or record.get("non_finite"))


def what_was_caught(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the kinds of what was caught and how often."""
    total: dict[str, int] = {}
    for r in records:
        for name, n in {**r.get("violations", {}), "not finite": r.get("non_finite", 0)}.items():
            total[name] = total.get(name, 0) + n
    return ", ".join(f"{name} {n}" for name, n in total.items() if n) or "nothing"


def failed(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what keeps the run from being a success."""
    real, control = [r for r in records if not r["control"]], [r for r in records if r["control"]]
    lines = [f"{r['row']} #{r['k']}: {'; '.join(r['problems'])}" for r in real if not r["ok"]]
    for row in sorted({r["row"] for r in control}):
        if not any(caught(r) for r in control if r["row"] == row):
            lines.append(f"control {row}: the reader caught nothing")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the table and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = {**ROWS, **PANDA_ROWS}
    parser.add_argument("--rows", default="", help=f"comma-separated, of {', '.join(every)}; default: all of --robot")
    parser.add_argument(
        "--robot", choices=("light", "panda", "all"), default="light",
        help="panda: rows that end in p, in MuJoCo; needs the robosuite extra",
    )  # fmt: skip
    parser.add_argument("--repeat", type=int, default=20, help="of every row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--domain-id", type=int, default=60, help=f"the first of {DOMAINS}")
    parser.add_argument("--no-control", action="store_true", help="leave out the run with the guard's checks off")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "chaos", help="keeps trials.jsonl")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--overwrite", action="store_true", help="forget the trials first")
    args = parser.parse_args(arguments)
    unknown = [name for name in args.rows.split(",") if name and name not in every]
    if unknown:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(every)}")
    of = {"light": ROWS, "panda": PANDA_ROWS, "all": every}[args.robot]
    rows = [every[name] for name in args.rows.split(",") if name] or list(of.values())
    if args.overwrite:
        shutil.rmtree(args.out, ignore_errors=True)
    command = (
        f"make chaos ({args.robot} rows, {args.repeat} times each)"
        if not args.rows
        else f"rows {args.rows}, {args.repeat} times each"
    )
    records = run(rows, args.repeat, args.seed, args.out, args.domain_id, not args.no_control)
    args.page.parent.mkdir(parents=True, exist_ok=True)
    args.page.write_text(page(list(every.values()), records, command, args.seed))
    wanted = {row.id for row in rows}
    records = [r for r in records if r["row"] in wanted]
    lines = failed(records)
    print("\n".join([*lines[:40], f"{len(records)} repetitions, {len(lines)} not as promised; {args.page}"]))
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main())
