"""Run twin, policy and guard as three processes, let them play episodes, and judge what goes over the wire.

The judge is a reader of its own: what it says about the command topic does not come from the guard.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Deque, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from robot_io import messages as m
from robot_io.bus import COMMAND, LATCHED, STATE, Bus, open_bus
from robot_io.core.diagnostics import Running
from robot_io.core.limits import Bounds, Robot, parse_robot
from robot_io.core.space import Space
from robot_io.nodes import NODES, entry
from robot_io.nodes.guard import load_robot
from robot_io.nodes.topics import (
    ARM,
    CHUNK,
    CONTRACT,
    DIAGNOSTICS,
    EPISODE,
    EPISODE_STATE,
    EXECUTED,
    GUARD_STATE,
    TOOL_POSE,
)

if TYPE_CHECKING:
    from dita.config import LiveConfig

TOGETHER = ("twin", "policy", "guard", "blackbox")  # what `live` starts
LAST_LINES = 12  # of a crashed child
GAP_S = 0.05  # a longer pause in the command stream is a new stream
QUEUE = 320  # of the judge: it must miss no command even if it is kept waiting for 2 s
STAMP_S = 1e-6  # what a stamp of today as float64 is good for, with a margin
READY_S = 20.0  # for a reset, an arming, a deceleration
CHILD_ENV = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",  # a spinning worker would take the guard's core
    "PYTHONUNBUFFERED": "1",
}


class Children:
    """Named processes that end when this object is closed, whatever happens."""

    def __init__(self) -> None:
        self._processes: Dict[str, "subprocess.Popen[str]"] = {}
        self._lines: Dict[str, Deque[str]] = {}

    def start(self, name: str, command: Sequence[str]) -> int:
        """Start a process and return its id; its output is kept, the last lines of it."""
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **CHILD_ENV},
            start_new_session=True,  # Ctrl-C reaches the parent only, which ends them in order
        )
        self._processes[name], self._lines[name] = process, deque(maxlen=LAST_LINES)
        threading.Thread(target=self._read, args=(name, process), daemon=True).start()
        return process.pid

    def _read(self, name: str, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self._lines[name].append(line.rstrip())

    def lines(self, name: str) -> List[str]:
        """Return a process's last lines."""
        return list(self._lines[name])

    def check(self) -> None:
        """Raise ChildProcessError if one has ended, with its name and last lines."""
        for name, process in self._processes.items():
            code = process.poll()
            if code is not None:
                time.sleep(0.1)  # its last words
                raise ChildProcessError(f"{name} ended with code {code}: {' | '.join(self.lines(name)) or 'no output'}")

    def close(self, timeout_s: float = 5.0) -> None:
        """End all: SIGTERM, then SIGKILL."""
        for process in self._processes.values():
            if process.poll() is None:
                process.terminate()
        end = time.monotonic() + timeout_s
        for process in self._processes.values():
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def __enter__(self) -> "Children":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


COMMANDS = {  # what can be judged
    "pose": m.POSE,
    "twist": m.TWIST,
    "joint_trajectory": m.JOINT_TRAJECTORY,
    "position_array": m.ARRAY,
}


def command_of(robot: Robot, message: Any, arrived: float) -> Tuple[float, np.ndarray]:
    """Return when a command is for [s] and the configuration that it asks for, or the twist [m/s, rad/s].

    An array has no stamp but its arrival.

    Raises:
        ValueError: a trajectory of other joints.
    """
    if robot.driver.command == "position_array":
        return arrived, m.array_from_ros(message)
    if robot.driver.command == "joint_trajectory":
        names, values = list(message.joint_names), message.points[-1].positions
        if sorted(names) != sorted(robot.driver.joints) or len(values) != len(names):
            raise ValueError(f"a command for {names}, the robot has {list(robot.driver.joints)}")
        return m.stamp_of(message), np.array([values[names.index(name)] for name in robot.driver.joints], float)
    if robot.driver.command == "twist":
        linear, angular = m.twist_from_ros(message)
        return m.stamp_of(message), np.concatenate([linear, angular]) if robot.space.rotation else linear
    position, quaternion = m.pose_from_ros(message)
    return m.stamp_of(message), np.concatenate([position, quaternion]) if robot.space.rotation else position


class EnvelopeReader:
    """Judge the commands on the wire by their own stamps, in the robot's space.

    Divided differences: the k-th one of a path, times k!, is the k-th derivative at some time in between (mean value
    theorem), so a path inside the limits passes at any spacing of its samples. The bounds are widened by what the
    stamps' resolution does to them. Rotations are taken as rotation vectors from a sample in the middle, whose
    derivatives differ from the true ones by half the angle between samples: 2 % is allowed for it. Twists are the first
    derivative themselves and say nothing about the workspace: the measured position does.
    """

    def __init__(self, space: Space, bounds: Bounds, twists: bool = False) -> None:
        self.space, self.bounds, self.twists = space, bounds, twists
        self.commands, self.non_finite, self.gaps = 0, 0, 0
        self.violations: Counter = Counter(speed=0, acceleration=0, jerk=0, workspace=0)
        self.peaks = {"speed": 0.0, "acceleration": 0.0, "jerk": 0.0}  # of any group, in its own unit
        self._samples: Deque[Any] = deque(maxlen=4)
        self._slack = np.array([2e-2 if name == "rotation" else 1e-3 for name in bounds.names])

    def take(self, stamp: float, x: np.ndarray) -> None:
        """Take one command: its time [s] and configuration, or twist."""
        self.commands += 1
        if not np.all(np.isfinite(x)):
            self.non_finite += 1
            return
        if self._samples and not 0 < stamp - self._samples[-1][0] <= GAP_S:
            self._samples.clear()
            self.gaps += 1
        self._samples.append((stamp, x))
        n = 0 if self.twists else self.space.linear
        inside = np.all(x[:n] >= self.bounds.low[:n]) and np.all(x[:n] <= self.bounds.high[:n])
        self.violations["workspace"] += not inside
        limits = (self.bounds.speed, self.bounds.acceleration, self.bounds.jerk)
        for order, (name, bound) in enumerate(zip(self.peaks, limits, strict=True), start=1):
            if len(self._samples) > order:
                values = self._derivative(order)
                self.peaks[name] = max(self.peaks[name], float(np.max(values)))
                shortest = min(b[0] - a[0] for a, b in pairwise(self._samples))
                slack = 2**order * self.bounds.speed * STAMP_S / shortest**order
                self.violations[name] += bool(np.any(values > bound * (1 + self._slack) + slack))

    def recent(self) -> List[Any]:
        """Return the newest commands of the stream, oldest first, as (stamp, configuration)."""
        return list(self._samples)

    def speed(self) -> float:
        """Return the newest commanded speed, the largest of any group [m/s or rad/s]; NaN at a stream's begin."""
        return float(np.max(self._derivative(1))) if len(self._samples) > 1 else math.nan

    def _derivative(self, order: int) -> np.ndarray:
        samples = list(self._samples)[-order - 1 :]
        times = [stamp - samples[0][0] for stamp, _ in samples]
        middle = samples[len(samples) // 2][1]
        if self.twists:
            order, times, values = order - 1, times[1:], [x for _, x in samples[1:]]
        else:
            values = [self.space.difference(x, middle) for _, x in samples]
        for k in range(1, order + 1):
            values = [(b - a) / (times[i + k] - times[i]) for i, (a, b) in enumerate(pairwise(values))]
        return math.factorial(order) * self.bounds.norms(values[0])

    def to_dict(self) -> Dict[str, Any]:
        """Return plain values."""
        return {
            "commands": self.commands,
            "non_finite": self.non_finite,
            "violations": dict(self.violations),
            "peaks": self.peaks,
            "streams": self.gaps + 1 if self.commands else 0,
        }


class Judge:
    """Everything that a run shows on its topics."""

    def __init__(self, bus: Bus, own: Optional[Robot] = None) -> None:
        """Listen; `own` has the limits that the guard has, None: those of the policy's contract."""
        self.bus, self._own = bus, own
        self.robot: Optional[Robot] = None
        self.contract: Dict[str, Any] = {}
        self.envelope: Optional[EnvelopeReader] = None
        self.guard: Dict[str, str] = {}  # state, reason, refused
        self.episode: Dict[str, Any] = {}
        self.diagnostics: Dict[str, Dict[str, str]] = {}
        self.latencies: List[float] = []  # [s] image stamp -> first command of its chunk, as it arrives here
        self.ages: List[float] = []  # [s] image stamp -> its chunk, as it arrives here
        self.periods, self.late = Running(), 0
        self.tool_stamp = -math.inf
        self.last_command: Optional[np.ndarray] = None
        self._first: Optional[float] = None  # the last chunk seen to be executed
        self._arrived: Optional[float] = None
        self._tick: Optional[float] = None
        bus.subscribe(CONTRACT, m.STRING, LATCHED, self._on_contract)
        bus.subscribe(CHUNK, m.CARTESIAN_TRAJECTORY, replace(COMMAND, depth=QUEUE), self._on_chunk)
        bus.subscribe(EXECUTED, m.CARTESIAN_TRAJECTORY, replace(STATE, depth=QUEUE), self._on_executed)
        bus.subscribe(GUARD_STATE, m.STRING, LATCHED, self._on_guard)
        bus.subscribe(EPISODE_STATE, m.STRING, STATE, self._on_episode)
        bus.subscribe(TOOL_POSE, m.POSE, STATE, self._on_pose)
        bus.subscribe(DIAGNOSTICS, m.DIAGNOSTICS, STATE, self._on_diagnostics)

    def _on_contract(self, message: Any) -> None:
        if self.robot is not None:  # the first one is what the run is judged by, whatever else is sent
            return
        self.contract = m.json_from_ros(message)
        self.robot = self._own or parse_robot(self.contract["embodiment"])
        assert self.robot.bounds is not None
        driver = self.robot.driver
        self.envelope = EnvelopeReader(self.robot.space, self.robot.bounds, driver.command == "twist")
        if driver.command not in COMMANDS:
            raise ValueError(f"commands as {driver.command} cannot be judged; there are {', '.join(COMMANDS)}")
        qos = replace(COMMAND, depth=QUEUE)
        self.bus.subscribe(driver.command_topic, COMMANDS[driver.command], qos, self._on_command)

    def _on_command(self, message: Any) -> None:
        assert self.robot is not None and self.envelope is not None
        stamp, self.last_command = command_of(self.robot, message, self.bus.now())
        self.envelope.take(stamp, self.last_command)
        now = self.bus.steady()
        if self._arrived is not None and self._tick is not None and 0 < stamp - self._tick <= GAP_S:
            self.periods.add(now - self._arrived)
        self._arrived, self._tick = now, stamp

    def _on_chunk(self, message: Any) -> None:
        self.ages.append(self.bus.now() - m.stamp_of(message))

    def _on_executed(self, message: Any) -> None:
        chunk = m.executed_from_ros(message).chunk
        if chunk != self._first:
            self._first = chunk
            self.latencies.append(self.bus.now() - chunk)

    def _on_guard(self, message: Any) -> None:
        self.guard = m.json_from_ros(message)

    def _on_episode(self, message: Any) -> None:
        self.episode = m.json_from_ros(message)

    def _on_pose(self, message: Any) -> None:
        self.tool_stamp = m.stamp_of(message)

    def _on_diagnostics(self, message: Any) -> None:
        for name, status in m.diagnostics_from_ros(message).items():
            self.diagnostics[name] = status["values"]

    def to_dict(self) -> Dict[str, Any]:
        """Return plain values; latencies in ms."""
        guard = self.diagnostics.get("guard", {})
        return {
            "contract": self.contract.get("hash"),
            "embodiment": self.robot.name if self.robot else None,
            "latency_ms": _percentiles(self.latencies),
            "chunk_age_ms": _percentiles(self.ages),
            "publish": {
                "period_mean_ms": 1e3 * self.periods.mean,
                "jitter_std_ms": 1e3 * self.periods.std,
                "period_max_ms": 1e3 * self.periods.max,
                "late_ticks": int(float(guard.get("overruns", 0))),
            },
            "envelope": self.envelope.to_dict() if self.envelope else None,
            "guard": {name: float(value) for name, value in guard.items()},
            "policy": {name: _plain(value) for name, value in self.diagnostics.get("policy", {}).items()},
        }


def _plain(value: str) -> Any:
    try:
        return float(value)
    except ValueError:
        return value


def _percentiles(seconds: Sequence[float]) -> Dict[str, Any]:
    values = [1e3 * s for s in seconds]
    if not values:
        return {"n": 0, "p50": None, "p99": None, "values": []}
    p50, p99 = np.percentile(values, (50, 99)).tolist()
    return {"n": len(values), "p50": p50, "p99": p99, "values": [round(v, 3) for v in values]}


class Operator:
    """Arm, disarm and reset over topics, waiting for the answers."""

    def __init__(self, bus: Bus, judge: Judge, children: Children) -> None:
        self.bus, self.judge, self.children = bus, judge, children
        self._arm = bus.publisher(ARM, m.BOOL, STATE)
        self._episode = bus.publisher(EPISODE, m.STRING, STATE)

    def until(
        self, condition: Callable[[], bool], timeout_s: float, what: str, again: Callable[[], None] = lambda: None
    ) -> None:
        """Spin until `condition`, calling `again` every half second.

        Raises:
            TimeoutError: it did not come true; says what.
            ChildProcessError: a process ended meanwhile.
        """
        end, repeat = time.monotonic() + timeout_s, time.monotonic()
        while not condition():
            self.children.check()
            if time.monotonic() > end:
                raise TimeoutError(f"{what}: nothing within {timeout_s:g} s")
            if time.monotonic() >= repeat:
                again()
                repeat += 0.5
            self.bus.spin(0.01)

    def reset(self, episode: int, task: str, seed: int) -> None:
        """Begin an episode in the twin and wait until it answers.

        The command stream is silent for a moment before, so that nobody takes the new start for a jump.
        """
        self.bus.spin(2 * GAP_S)
        order = m.json_to_ros(self.bus.msg, {"episode": episode, "task": task, "seed": seed})
        self.until(
            lambda: self.judge.episode.get("episode") == episode,
            READY_S,
            f"twin: reset to {task}, seed {seed}",
            lambda: self._episode.publish(order),
        )

    def arm(self) -> None:
        """Arm the guard.

        Raises:
            TimeoutError: it did not arm; with the reason that it gave.
        """
        yes = self.bus.msg(m.BOOL, data=True)
        try:
            self.until(
                lambda: self.judge.guard.get("state") == "ARMED",
                READY_S,
                "guard: arm",
                lambda: self._arm.publish(yes),
            )
        except TimeoutError as e:
            raise TimeoutError(f"{e}; {self.judge.guard.get('refused') or 'no answer'}") from None

    def disarm(self) -> None:
        """Disarm the guard and wait until it is idle."""
        no = self.bus.msg(m.BOOL, data=False)
        self.until(
            lambda: self.judge.guard.get("state") == "IDLE", READY_S, "guard: disarm", lambda: self._arm.publish(no)
        )


def play(operator: Operator, config: "LiveConfig", progress: Callable[[str], None]) -> List[Dict[str, Any]]:
    """Play the episodes and return one record each, a task's together: another scene takes a second to load."""
    records, tasks = [], config.env.tasks
    turns = [(i % len(tasks), i // len(tasks)) for i in range(config.episodes)]
    for episode, (turn, start) in enumerate(sorted(turns)):
        task, seed = tasks[turn], config.seed + start
        operator.reset(episode, task, seed)
        begin = operator.bus.now()
        operator.until(lambda: operator.judge.tool_stamp > begin, READY_S, f"twin: {TOOL_POSE}")  # noqa: B023
        operator.arm()
        records.append({"task": task, "seed": seed, **_play_one(operator, config)})
        operator.disarm()
        progress(f"{task} seed {seed}: {records[-1]['end']} after {records[-1]['steps']} steps")
    return records


def _play_one(operator: Operator, config: "LiveConfig") -> Dict[str, Any]:
    judge, begin = operator.judge, time.monotonic()
    first = len(judge.latencies)

    def end() -> Optional[str]:
        if judge.episode["success"]:
            return "success"
        if judge.guard["state"] == "FAULT":
            return "fault"
        return "max_steps" if judge.episode["steps"] >= config.env.max_steps else None

    operator.until(lambda: end() is not None, config.episode_timeout, "twin: the end of an episode")
    twin = {k: v for k, v in judge.episode.items() if k not in ("episode", "task", "seed")}
    reason = judge.guard["reason"] if end() == "fault" else ""
    latency = _percentiles(judge.latencies[first:])
    record = {"end": end(), "reason": reason, "seconds": time.monotonic() - begin}
    return {**twin, **record, "chunks": latency["n"], "p50_ms": latency["p50"]}


def arguments_of(config: "LiveConfig", exist: str = "error") -> Dict[str, Dict[str, Any]]:
    """Return the arguments of each node's entry in `robot_io.nodes`; `exist`: what to do with a recorder's store."""
    guard = {"tick_hz", "state_timeout", "stream_timeout", "hold_timeout", "max_skew", "clamp_margin"}
    values: Dict[str, Dict[str, Any]] = {
        "guard": {
            **{name: getattr(config, name) for name in guard},
            "embodiment": guards_file(config),
            "require_preflight": config.require_preflight,
        },
        "twin": {
            "env": asdict(config.env),
            **{name: getattr(config, name) for name in ("command_timeout", "seed", "driver_hz", "inject", "expert")},
        },
        "policy": {
            "checkpoint": config.checkpoint,
            "embodiment": guards_file(config),
            "seed": config.seed,
            "num_inference_steps": config.num_inference_steps,
            "device": config.device,
            "precision": config.precision,
            "path": config.path,
            "slop": config.slop,
            "max_age": config.max_age,
            "interval": config.replan_interval,
            "max_skew": config.max_skew,
            "mode": config.mode,
            "n_action_steps": config.n_action_steps,
            "compressed": config.compressed,
        },
        "recorder": {
            "embodiment": config.env.embodiment,
            "store": config.store,
            "instruction": config.instruction or "",
            "codec": config.codec,
            "exist": exist,
            "state_gap": config.slop,
            "action_gap": config.record_gap,
            "max_seconds": config.record_seconds,
            "max_memory": round(config.record_mb * 1e6),
        },
        "blackbox": {
            "embodiment": guards_file(config),
            "folder": str(Path(config.out) / "black_box"),
            "show": config.show,
            "seconds": config.black_box_seconds,
            "max_memory": round(config.black_box_mb * 1e6),
            "image_hz": config.black_box_hz,
            "after": config.black_box_after,
            "interval": config.black_box_interval,
            "max_records": config.black_box_records,
            "max_bytes": round(config.black_box_disk_mb * 1e6),
        },
        "teleop": {"embodiment": guards_file(config), "instruction": config.instruction or ""},
        "operator": {"embodiment": guards_file(config), "command": config.command},
    }
    shared = ("checkpoint", "seed", "num_inference_steps", "device", "precision", "path", "slop", "max_age")
    values["preflight"] = {
        **{name: values["policy"][name] for name in shared},
        "embodiment": guards_file(config),
        **{name: getattr(config, name) for name in ("state_timeout", "max_skew", "tick_hz", "clamp_margin")},
        **asdict(config.preflight),
    }
    return {name: {"bus": _bus_arguments(config), **arguments} for name, arguments in values.items()}


def guards_file(config: "LiveConfig") -> str:
    """Return the embodiment file that the guard reads by itself.

    Raises:
        ValueError: no such file or shipped name; lists the shipped ones.
    """
    from dita.embodiment import embodiment_file

    return str(embodiment_file(config.guard_embodiment or config.env.embodiment).resolve())


def commands_of(config: "LiveConfig", names: Sequence[str] = TOGETHER, exist: str = "error") -> Dict[str, List[str]]:
    """Return the command line of each process of a run in simulation, which needs no preflight."""
    python = [sys.executable, "-m", "robot_io.nodes"]
    arguments = arguments_of(replace(config, require_preflight=False), exist)
    return {name: [*python, name, json.dumps(arguments[name]), "--with-parent"] for name in names}


def run_role(role: str, config: "LiveConfig", exist: str = "error") -> None:
    """Run `live` or `record`, or one node by itself.

    Raises:
        ValueError: no such role.
    """
    if role == "live":
        live(config, exist=exist)
    elif role == "record":
        from robot_io.record import record

        record(config, exist=exist)
    elif role in NODES:
        entry(role)(**arguments_of(config, exist)[role])
    else:
        raise ValueError(f"no role {role!r}; there are live, record, {', '.join(NODES)}")


def _bus_arguments(config: "LiveConfig") -> Dict[str, Any]:
    network = {
        "discovery": config.discovery,
        "peers": None if config.peers is None else list(config.peers),
        "interface": config.interface,
        "remap": list(config.remap),
    }
    return {"kind": config.bus, "domain_id": config.domain_id, "rate": config.real_time_factor, **network}


def live(
    config: "LiveConfig", commands: Optional[Mapping[str, Sequence[str]]] = None, exist: str = "error"
) -> Dict[str, Any]:
    """Run the live stack and write `live.json` into the output folder.

    Args:
        config: every knob.
        commands: other command lines for some of the processes, for tests and other robots.
        exist: what to do with a result that is there: "error", "resume" (it is the result) or "overwrite".

    Raises:
        FileExistsError: the folder has a result already, and `exist` is "error".
        TimeoutError: a process did not join or answer; says which topic, type and QoS, after how long.
        ChildProcessError: a process ended by itself; with its name and last lines.
    """
    target = Path(config.out) / "live.json"
    if target.exists() and exist == "resume":
        return json.loads(target.read_text(encoding="utf-8"))
    if target.exists() and exist != "overwrite":
        raise FileExistsError(f"{target} exists; --resume keeps it, --overwrite replaces it")
    slow = 1 / config.real_time_factor
    with contextlib.ExitStack() as stack:
        stack.enter_context(terminate_as_interrupt())
        children = stack.enter_context(Children())
        for name, command in {**commands_of(config), **(commands or {})}.items():
            children.start(name, command)
        bus = open_bus(name="live", **_bus_arguments(config))
        stack.callback(bus.close)
        judge = Judge(bus, load_robot(guards_file(config))[0])
        operator = Operator(bus, judge, children)
        progress = stack.enter_context(_progress(config.episodes))
        _join(operator, config)
        records = play(operator, config, progress)
        operator.until(_settled(judge, bus), READY_S * slow, f"{DIAGNOSTICS} of guard and policy")
    result = summary(config, judge, records)
    _write(target, result)
    print("\n".join(closing_lines(result)))
    return result


def closing_lines(result: Mapping[str, Any]) -> List[str]:
    """Say what a live run came to, for a terminal."""
    latency, publish, envelope = result["latency_ms"], result["publish"], result["envelope"] or {}
    reactions = "  ".join(f"{name} {int(result['guard'].get(name, 0))}" for name in ("R0", "R1", "R2", "R3"))
    outside, broken = sum(envelope.get("violations", {}).values()), envelope.get("non_finite", 0)
    waited = f"p50 {latency['p50']:.0f} ms  p99 {latency['p99']:.0f} ms" if latency["n"] else "no command"
    return [
        f"success         {result['successes']}/{len(result['episodes'])}",
        f"real-time       factor {result['real_time_factor']:.2f}",
        f"image->command  {waited}",
        f"late ticks      {publish['late_ticks']}  (more than two periods at {result['tick_hz']:.0f} Hz)",
        f"guard           {reactions}  (dropped, clamped, held, fault)",
        f"commands        {envelope.get('commands', 0)}, outside the envelope {outside}, not finite {broken}",
    ]


def _join(operator: Operator, config: "LiveConfig") -> None:
    """Wait for every process, whatever ends first."""
    end = time.monotonic() + config.start_timeout
    wanted = [
        (EPISODE_STATE, m.STRING, STATE),
        (GUARD_STATE, m.STRING, LATCHED),
        (CONTRACT, m.STRING, LATCHED),
    ]
    for topic, type, qos in wanted:
        while not any(w.type == type and w.qos.satisfies(qos) for w in operator.bus.writers(topic)):
            operator.children.check()
            if time.monotonic() > end:
                operator.bus.wait_for_writer(topic, type, qos, 0.1)  # says what is there instead
            operator.bus.spin(0.05)
    operator.until(lambda: operator.judge.robot is not None, READY_S, f"{CONTRACT} of the policy")


def _settled(judge: Judge, bus: Bus) -> Callable[[], bool]:
    """Return a condition: the nodes have reported once more, so that their counters are complete."""
    judge.diagnostics.clear()
    return lambda: {"guard", "policy"} <= set(judge.diagnostics)


def summary(config: "LiveConfig", judge: Judge, records: List[Dict[str, Any]]) -> Dict[str, Any]:
    """Return the result as plain JSON values."""
    factors = [r["real_time_factor"] * config.real_time_factor for r in records]
    return {
        "checkpoint": config.checkpoint,
        "tick_hz": config.tick_hz,
        "episodes": records,
        "successes": sum(r["success"] for r in records),
        "real_time_factor": min(factors),
        "deadline_misses": sum(r["timeouts"] for r in records),
        "simulator_warnings": sum(sum(r["warnings"].values()) for r in records),
        **judge.to_dict(),
    }


def _write(target: Path, result: Mapping[str, Any]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=target.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        json.dump(result, file, indent=1, allow_nan=False)
    os.replace(file.name, target)


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C, so that the children are ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _progress(episodes: int) -> Iterator[Callable[[str], None]]:
    """Show a bar of the episodes."""
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("live", total=episodes)

        def advance(text: str) -> None:
            bar.console.print(text)
            bar.advance(task)

        yield advance
