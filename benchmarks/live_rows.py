"""Rows 8 and 9: a live node against bare inference and an HTTP server; where chunks meet under injected delay."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import math
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from multiprocessing.util import Finalize
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from rich.progress import track

from benchmarks.harness import OTHERS, ROOT, Case, busy_cores, interleave
from dita.checkpoint import save_policy
from dita.cli import compose
from dita.config import EnvConfig, PolicyConfig, PreprocessConfig, TrainConfig
from dita.embodiment import canonical_json, embodiment_to_dict, load_embodiment
from dita.envs import make
from dita.evaluate import identity
from dita.normalize import fit
from dita.policy.fast import PolicySession, inference_twin
from dita.policy.policy import DitaPolicy
from dita.preprocess import make_contract
from dita.statistics import wilson
from dita.types import EmbodimentSpec, RawObservation
from robot_io.core.chunk_buffer import Chunk, ChunkBuffer
from robot_io.core.limits import parse_robot
from robot_io.core.stitching import COMPENSATED, ENSEMBLING, FADE, RTC, SYNCHRONOUS, Stitcher
from robot_io.nodes.policy import stitching_of

BUILD = ROOT / "build" / "stitching"
PAGE = ROOT / "docs" / "evidence"
TASKS = ("button-press-topdown-v3", "drawer-open-v3")
CHUNK, COMMITTED = 48, 24  # steps of 12.5 ms: bridges 300 ms
DELAYS = (0, 6, 12, 18, 24)  # [steps], up to half a chunk
STARTS, GROUP = 10, 10  # per task and cell, and how many of them share policy calls; more starts only add groups
STEPS, EXECUTED = 250, 8  # of an episode at most; of a chunk before the next is asked for, as `dita eval` has it
RECIPE = ("steps=1200", "batch_size=32", "noise_samples_per_context=2", "threads=1")  # two policies at a time
WORKERS = 2
RESAMPLES = 400
FIRST_SEED = 950_000  # of the starts: neither demonstrations' nor `dita eval`'s
MODES = {  # how it is called -> (mode, whether the policy was trained with committed prefixes, steps of fading)
    "naive switch": (COMPENSATED, False, 0),
    "ensembling": (ENSEMBLING, False, 0),
    "rtc, trained": (RTC, True, FADE),
    "rtc, training-free": (RTC, False, FADE),
    "rtc, trained, not faded": (RTC, True, 0),
    "synchronous": (SYNCHRONOUS, False, 0),
}
COLOURS = ("#5d6872", "#009e73", "#0072b2", "#56b4e9", "#cc79a7", "#d55e00")


# ---- row 8

IMAGE_HZ, STATE_HZ, TICK_HZ = 10.0, 100.0, 100.0
WARM_UP = 8  # images of a round until the server joins; as many again until it counts
INFERENCE_STEPS = 5  # a tick well below the camera's period: else each waits for the last one, and that is measured
SIZE = (480, 640)
INSTRUCTION_TEXT = "press the button"


def bench_arm() -> EmbodimentSpec:
    """Return a Sawyer that is commanded at 50 Hz and seen at 10 Hz by a VGA camera."""
    spec = load_embodiment("metaworld_sawyer")
    camera = replace(spec.cameras[0], height=SIZE[0], width=SIZE[1])
    return replace(spec, name="bench_arm", cameras=(camera,), obs_dt=0.1, action_dt=0.02, control_hz=50.0)


class Arm:
    """The benchmark's own side of the graph: an arm that follows at once, a camera, an operator and a reader."""

    def __init__(self, bus: Any, spec: EmbodimentSpec) -> None:
        from robot_io import messages as m
        from robot_io.bus import COMMAND, LATCHED, SENSOR, STATE
        from robot_io.nodes import topics as t

        self.m, self.bus, self.camera = m, bus, spec.cameras[0].name
        self.hand, self.guard, self.policy, self.diagnostics = np.array([0.0, 0.6, 0.2]), {}, {}, {}
        self.chunks: list[tuple[float, float]] = []  # (image stamp, latency [s]) as chunks arrive here
        self.holds = 0  # times that the guard stopped for want of an action, or worse
        self.commands: list[float] = []  # when commands arrive here [s]
        self.begin, self.sent = 0.0, []  # of `run`: steady time, and the images' stamps [s]
        self._pose, self._joints = (
            bus.publisher(t.TOOL_POSE, m.POSE, STATE),
            bus.publisher(t.JOINTS, m.JOINT_STATE, STATE),
        )
        self._image = bus.publisher(t.image_topic(self.camera), m.IMAGE, SENSOR)
        self._words, self._arm = bus.publisher(t.INSTRUCTION, m.STRING, LATCHED), bus.publisher(t.ARM, m.BOOL, STATE)
        bus.subscribe(t.TARGET_POSE, m.POSE, COMMAND, self._on_command)
        bus.subscribe(t.CHUNK, m.CARTESIAN_TRAJECTORY, COMMAND, self._on_chunk)
        bus.subscribe(t.GUARD_STATE, m.STRING, LATCHED, self._on_guard)
        bus.subscribe(t.POLICY_STATE, m.STRING, LATCHED, lambda x: self.policy.update(m.json_from_ros(x)))
        bus.subscribe(t.DIAGNOSTICS, m.DIAGNOSTICS, STATE, lambda x: self.diagnostics.update(m.diagnostics_from_ros(x)))
        self._words.publish(bus.msg(m.STRING, data=INSTRUCTION_TEXT))

    def _on_guard(self, message: Any) -> None:
        self.guard.update(self.m.json_from_ros(message))
        self.holds += self.guard["state"] in ("HOLDING", "FAULT")

    def _on_command(self, message: Any) -> None:
        self.hand = self.m.pose_from_ros(message)[0]
        self.commands.append(time.monotonic())

    def _on_chunk(self, message: Any) -> None:
        stamp = self.m.stamp_of(message)
        self.chunks.append((stamp, self.bus.now() - stamp))

    def order(self, armed: bool) -> None:
        """Arm or disarm."""
        self._arm.publish(self.bus.msg(self.m.BOOL, data=armed))

    def run(self, images: Sequence[np.ndarray] | None, until: Any, timeout_s: float = 60.0) -> None:
        """Publish state at 100 Hz, and images at 10 Hz, until `until(images sent)`."""
        begin, states, sent = time.monotonic(), 0, 0
        self.begin, self.sent = begin, []
        while not until(sent):
            passed = time.monotonic() - begin
            if passed > timeout_s:
                raise TimeoutError(f"node_latency: nothing within {timeout_s:g} s; guard {self.guard}")
            if passed * STATE_HZ >= states:
                states = int(passed * STATE_HZ) + 1
                stamp = self.bus.now()
                self._pose.publish(self.m.pose_to_ros(self.bus.msg, stamp, self.hand, "base_link"))
                self._joints.publish(self.m.joints_to_ros(self.bus.msg, stamp, {"gripper": 0.5}))
            if images is not None and passed * IMAGE_HZ >= sent:
                stamp = self.bus.now()
                self.sent.append(stamp)
                image = images[sent % len(images)]
                self._image.publish(self.m.image_to_ros(self.bus.msg, stamp, image, self.camera))
                sent += 1
            self.bus.spin(max(0.0, begin + states / STATE_HZ - time.monotonic()))

    def acted(self) -> list[tuple[int, float]]:
        """Return (index of the image, latency [s]) of every chunk of this `run`."""
        first, sent = self.sent[0] - 1e-3, np.array(self.sent)
        return [(int(np.argmin(np.abs(sent - stamp))), late) for stamp, late in self.chunks if stamp >= first]


def _pictures() -> list[np.ndarray]:
    return list(np.random.default_rng([0, 8]).integers(0, 256, (8, *SIZE, 3), np.uint8))


def _over_http(port: int, begin: float, indices: Sequence[int], acts: int) -> Iterator[tuple[float, float]]:
    """Yield (image -> actions, inference alone) [s] of the images that are acted on, every second one from `acts` on.

    Image i is due at `begin` + i camera periods of the machine's monotonic clock.
    """
    link, pictures = http.client.HTTPConnection("127.0.0.1", port, timeout=30), _pictures()
    for i in indices:
        time.sleep(max(0.0, begin + i / IMAGE_HZ - time.monotonic()))
        stamp, act = time.time(), i % 2 == acts
        values = {"state": [0.0, 0.6, 0.2, 0.5], "instruction": INSTRUCTION_TEXT, "stamp": stamp}
        link.request(
            "POST", "/act" if act else "/see", pictures[i % 8].tobytes(), {"X-Observation": json.dumps(values)}
        )
        answer = json.loads(link.getresponse().read())
        if act:
            yield time.time() - stamp, answer["seconds"]


def _http_rows(*arguments: Any) -> list[tuple[float, float]]:
    return list(_over_http(*arguments))


def node_latency(tier: str) -> list[Case]:
    """Row 8: image stamp -> chunk through real processes over DDS, against the bare tick and an HTTP server.

    Both see every image and act on every second one, by turns, while the guard is armed: the node on one, the server on
    the next. So both have the same load around them, in the same seconds. The bare tick is what the server's process
    spends in `predict`.
    """
    from robot_io.bus import open_bus
    from robot_io.live import Children
    from robot_io.nodes.serve import be_nice

    rounds, images = (6, 100) if tier == "full" else (1, 2 * WARM_UP + 4)
    config = compose("train", ["policy=dita_tiny"], TrainConfig).policy
    spec, domain = bench_arm(), 87
    others = busy_cores()
    with TemporaryDirectory() as folder, ExitStack() as stack:
        at, robot = f"{folder}/policy", Path(folder) / "bench_arm.json"
        save_policy(made_up(spec, config), Path(at))
        robot.write_text(canonical_json(embodiment_to_dict(spec)), encoding="utf-8")
        children = stack.enter_context(Children())
        port = _free_port()
        children.start("http", [sys.executable, "-m", "benchmarks.act_server", at, str(port), str(INFERENCE_STEPS)])
        bus_arguments = {"kind": "dds", "domain_id": domain}
        policy = {
            "bus": bus_arguments, "checkpoint": at, "embodiment": str(robot), "seed": 0,
            "num_inference_steps": INFERENCE_STEPS,
            "device": "cpu", "precision": "fp32", "path": "auto", "slop": 0.033, "max_age": 0.15, "interval": 0.0,
        }  # fmt: skip
        guard = {
            "bus": bus_arguments, "embodiment": embodiment_to_dict(spec), "require_preflight": False,
            "tick_hz": TICK_HZ, "state_timeout": 0.1, "stream_timeout": 0.1, "hold_timeout": 1.0, "max_skew": 0.05,
            "clamp_margin": 0.25,
        }  # fmt: skip
        for name, arguments in (("policy", policy), ("guard", guard)):
            children.start(name, [sys.executable, "-m", "robot_io.nodes", name, json.dumps(arguments), "--with-parent"])
        bus = open_bus(name="bench", **bus_arguments)
        stack.callback(bus.close)
        stack.callback(be_nice, os.nice(0))
        be_nice(-10)  # camera, arm and readers are other machines: they do not wait for those that compute
        arm = Arm(bus, spec)
        # of a process of its own: in a thread it would wait for the interpreter that publishes the arm
        client = stack.enter_context(ProcessPoolExecutor(1, multiprocessing.get_context("spawn")))
        found = _measure_rounds(arm, children, client, port, rounds, images)
    return _latency_cases(found, others)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _measure_rounds(
    arm: Arm, children: Any, client: ProcessPoolExecutor, port: int, rounds: int, images: int
) -> dict[str, Any]:
    node, http_, bare, gaps, holds, together, acts = [], [], [], [], 0, 0, [0]
    pictures, served = _pictures(), []
    _wait_http(port, children)
    client.submit(_http_rows, port, 0.0, [0, 1], 0).result()  # its imports are done before anything is timed

    def acting(_: int) -> bool:
        children.check()
        if arm.policy.get("ok") and arm.guard.get("state") != "ARMED":
            arm.order(True)
        return arm.guard.get("state") == "ARMED" and len(arm.chunks) > 0

    def over(sent: int) -> bool:
        if sent == WARM_UP and not served:
            acts[0] = (arm.acted()[-1][0] + 1) % 2  # the images that the node leaves out
            served.append(client.submit(_http_rows, port, arm.begin, range(sent, images), acts[0]))
        return sent >= images

    for _ in range(rounds):
        arm.chunks.clear()
        arm.run(pictures, acting)
        commands, held = len(arm.commands), arm.holds
        arm.run(pictures, over)
        measured = [(i, seconds) for i, seconds in arm.acted() if i >= 2 * WARM_UP]
        node += [seconds for _, seconds in measured]
        together += sum(i % 2 == acts[0] for i, _ in measured)
        rows = served.pop().result()[WARM_UP // 2 :]
        http_ += [total for total, _ in rows]
        bare += [alone for _, alone in rows]
        holds += arm.holds - held
        gaps += [b - a for a, b in pairwise(arm.commands[commands:])]
        arm.order(False)
        arm.run(None, lambda _: arm.guard.get("state") == "IDLE")
    stages = {name: {k: float(v) for k, v in arm.diagnostics.get(name, {}).get("values", {}).items() if _is_number(v)}
              for name in ("guard", "policy")}  # fmt: skip
    asked = rounds * (images - 2 * WARM_UP) // 2
    return {"node": node, "http": http_, "bare": bare, "gaps": gaps, "holds": holds, "together": together,
            "asked": asked, **stages}  # fmt: skip


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _wait_http(port: int, children: Any) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        children.check()
        with contextlib.suppress(OSError):
            list(_over_http(port, 0.0, [0], 0))
            return
        time.sleep(0.2)
    raise TimeoutError("node_latency: the HTTP server did not start")


def _stages(policy: Mapping[str, float]) -> str:
    """Say where the time of the node goes, by its own diagnostics."""
    age, predict, sent = (
        1e3 * policy.get(f"{name}.average", math.nan) for name in ("observation_age", "execution_time", "latency")
    )
    return (
        f"on average {age:.1f} ms from the image's stamp until inference begins (transport, pairing, threads), "
        f"{predict:.1f} ms of inference, {sent - age - predict:.1f} ms to check, build and send the chunk"
    )


def _latency_cases(found: dict[str, Any], others: float) -> list[Case]:
    if not found["node"]:
        raise TimeoutError("node_latency: no chunk came over the wire")
    ms = {name: dict(zip(("p50", "p99"), np.percentile(found[name], (50, 99)).tolist(), strict=True))
          for name in ("node", "http", "bare")}  # fmt: skip
    detail = {
        "seconds": {k: found[k] for k in ("node", "http", "bare")},
        "guard": found["guard"],
        "policy": found["policy"],
        "together": found["together"],
        "others_cores": others,
    }
    quiet = others <= OTHERS
    noise = "" if quiet else f"no wall-time ratio: others used {others:.1f} cores"
    cases, where = [], noise or f"node_latency: {_stages(found['policy'])}"
    for peer in ("bare", "http"):
        for q in ("p50", "p99"):
            ours, theirs = ms["node"][q], ms[peer][q]
            most = 1.05 * theirs + 2e-3 if q == "p50" else 1.2 * theirs
            goal = ("<= 1.05x + 2 ms" if q == "p50" else "<= 1.2x") if peer == "bare" else "reported"
            name = f"image to chunk over DDS, {q}, against {'the bare tick' if peer == 'bare' else 'an HTTP server'}"
            met = ours <= most if quiet and peer == "bare" else None
            cases.append(Case(name, ours, theirs, "s", theirs / ours if quiet else None, goal, met, where, detail))
    period, std = 1 / TICK_HZ, found["guard"].get("periodicity.standard_deviation", math.nan)
    bad = not quiet or math.isnan(std)
    cases.append(Case("jitter of the guard's period", std if not math.isnan(std) else None, period, "s",
                      None if bad else period / std, "<= 5 % of the period", None if bad else std <= 0.05 * period,
                      noise or "node_latency: periods as the guard measured them, periods as the peer",
                      {"arrival_std_s": float(np.std(found["gaps"])) if found["gaps"] else None}))  # fmt: skip
    late = sum(s > 1 / IMAGE_HZ for s in found["node"]) + max(0, found["asked"] - len(found["node"]))
    under = found["holds"]
    cases.append(Case("underruns of the command stream", float(under), None, "",
                      float(under == 0) if quiet else None, "0", under == 0 if quiet else None,
                      noise or f"node_latency: {late} of {found['asked']} chunks later than a camera period",
                      {"deadline_misses": late, "overruns": found["guard"].get("overruns")}))  # fmt: skip
    return cases


# ---- row 9


@dataclass(frozen=True)
class Episode:
    """One start under one mode and delay."""

    name: str  # of MODES
    delay: int  # [steps]
    task: str
    seed: int
    success: bool
    steps: int
    underruns: int  # steps for which there was no action, between the first chunk and the end
    jumps: list[float]  # [m] |action - the one before| where a chunk takes over or ends
    inside: list[float]  # the same within chunks
    jerks: list[float]  # [m/s^3] of the commanded path where a chunk takes over or ends
    jerks_inside: list[float]


@dataclass(frozen=True)
class Seam:
    """What the episodes of one mode showed at one delay."""

    episodes: Sequence[Episode]

    def rows(self, key: str) -> list[float]:
        """Return a list of the episodes' joined."""
        return [x for e in self.episodes for x in getattr(e, key)]

    def ratio(self, seams: str, inside: str) -> tuple[float, float, float]:
        """Return the median at seams over the median within chunks, and its 95 % bootstrap interval over episodes."""
        if not self.rows(seams) or not self.rows(inside):
            return math.nan, math.nan, math.nan
        at, within = ([np.array(getattr(e, key)) for e in self.episodes] for key in (seams, inside))
        rng, n = np.random.default_rng([0, 9]), len(self.episodes)
        draws = []
        for _ in range(RESAMPLES):
            rows = rng.integers(n, size=n)
            a, b = (np.concatenate([part[i] for i in rows]) for part in (at, within))
            if len(a) and len(b):
                draws.append(np.median(a) / max(np.median(b), 1e-9))
        low, high = np.percentile(draws, (2.5, 97.5)).tolist()
        return median(self.rows(seams)) / max(median(self.rows(inside)), 1e-9), low, high

    @property
    def jump(self) -> tuple[float, float, float]:
        """Return the jump in medians within chunks, and its interval."""
        return self.ratio("jumps", "inside")

    @property
    def success(self) -> tuple[int, int, float, float]:
        """Return (successes, episodes, low, high) with the 95 % Wilson interval."""
        wins, n = sum(e.success for e in self.episodes), len(self.episodes)
        return (wins, n, *wilson(wins, n))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values; None where no two chunks met."""
        wins, n, *interval = self.success

        def known(values: Sequence[float]) -> list[float] | None:
            return None if any(math.isnan(v) for v in values) else list(values)

        jumps, jerks = self.rows("jumps"), self.rows("jerks")
        return {
            "episodes": n, "successes": wins, "success_interval": interval, "seams": len(jumps),
            "jump_ratio_and_interval": known(self.jump),
            "jerk_ratio_and_interval": known(self.ratio("jerks", "jerks_inside")),
            "jump_m": median(jumps) if jumps else None, "jerk_m_s3": median(jerks) if jerks else None,
            "underruns": sum(e.underruns for e in self.episodes),
            "mean_steps": sum(e.steps for e in self.episodes) / n,
        }  # fmt: skip


class Play:
    """One episode in simulated time, every chunk arriving `delay` steps after its observation."""

    def __init__(self, env: Any, policy: DitaPolicy, name: str, delay: int, task: str, seed: int) -> None:
        self.env, self.seed, self.delay = env, seed, delay
        spec, (mode, _, fade) = env.embodiment, MODES[name]
        self.robot, self.dt = parse_robot(embodiment_to_dict(spec)), spec.action_dt
        self.stride = round(spec.obs_dt / spec.action_dt)
        self.stitcher = Stitcher(self.robot, mode, n_action_steps=EXECUTED, fade=fade, **stitching_of(policy.config))
        self.stitcher.on_latency(delay * self.dt)
        self.synchronous, self.buffer, self.k = mode == SYNCHRONOUS, ChunkBuffer(), 0
        env.reset(seed=seed, options={"task": task})
        self.frames: dict[int, RawObservation] = {}
        self.arriving: tuple[int, Any] | None = None
        self.earliest, self.soonest = -math.inf, 0  # [s], [steps]
        self.path, self.began = [np.array(env.commanded_position, float)], []
        self.effort, self.first, self.underruns = np.zeros(self.robot.action_dim, np.float32), True, 0

    def asks(self) -> tuple[list[RawObservation], np.ndarray | None] | None:
        """Return (history, committed actions) if a prediction begins with this step."""
        if self.k % self.stride or self.k < self.soonest - self.stride:
            return None
        # pictures cost most: only the two that the next prediction reads
        self.frames = {i: o for i, o in self.frames.items() if i >= self.k - self.stride} | {self.k: self.env.observe()}
        if self.arriving is not None or self.k * self.dt < self.earliest - 1e-9:
            return None
        assert self.k == 0 or len(self.frames) == 2
        return list(self.frames.values()), self.stitcher.committed(self.k * self.dt)

    def take(self, chunk: Any) -> None:
        """Take the prediction that was asked for, under way from now on."""
        self.arriving = (self.k + self.delay, chunk)
        busy = self.delay + EXECUTED if self.synchronous else max(self.delay, EXECUTED)
        self.soonest = math.ceil((self.k + busy) / self.stride) * self.stride

    def arrive(self) -> None:
        """Let a chunk arrive that is due: the next prediction may begin at the same step."""
        robot, now = self.robot, self.k * self.dt
        if self.arriving is not None and self.k == self.arriving[0]:
            values, stamp = self.stitcher.stitch(self.arriving[1].values, self.arriving[1].stamp, now)
            gripper = values[:, robot.action_slice(robot.gripper)][:, 0]
            chunk = Chunk(stamp, self.dt, robot.motion_of(values), gripper, self.k + 1)
            self.stitcher.published(chunk, now)
            self.buffer.offer(chunk, now)
            self.earliest, self.arriving = self.stitcher.next_stamp(stamp, len(values)), None

    def step(self) -> None:
        """Move by one step."""
        robot, now = self.robot, self.k * self.dt
        due, action = self.buffer.due(now), self.effort.copy()
        action[robot.action_slice(robot.motion)] = 0.0
        if due is None:
            self.underruns += not self.first
        else:
            action[robot.action_slice(robot.motion)] = due.chunk.motion[due.index]
            assert due.chunk.gripper is not None
            action[robot.action_slice(robot.gripper)] = due.chunk.gripper[due.index]
            self.effort, self.first = action, False
        action = np.clip(action, self.env.action_space.low, self.env.action_space.high)
        self.env.step(action)
        self.path.append(np.array(self.env.commanded_position, float))
        self.began.append(0 if due is None else due.chunk.id)
        if due is not None:
            delta = action[robot.action_slice(robot.motion)].astype(float)
            gripper = float(action[robot.action_slice(robot.gripper)][0])
            self.stitcher.on_executed(due.start, self.path[-1], delta, gripper)
        self.k += 1

    def episode(self, name: str) -> Episode:
        """Return what it showed."""
        jumps, inside, jerks, jerks_inside = seams_of(np.array(self.path), self.began, self.dt)
        return Episode(name, self.delay, self.env.task, self.seed, bool(self.env.success), self.k, self.underruns,
                       jumps, inside, jerks, jerks_inside)  # fmt: skip


def seams_of(path: np.ndarray, began: Sequence[int], dt: float) -> tuple[list[float], ...]:
    """Return jumps [m] at seams and within chunks, and jerks [m/s^3] likewise, of a commanded path [k+1 3].

    began: each step's chunk, 0 for none. Where the arm waits between chunks there is neither.
    """
    actions = np.diff(path, axis=0)
    jerk = np.linalg.norm(np.diff(actions, n=2, axis=0), axis=1) / dt**3
    seen = next((i for i, id in enumerate(began) if id), len(began))
    found: tuple[list[float], ...] = ([], [], [], [])
    for i in range(seen + 2, len(actions)):
        if not began[i] and not began[i - 1]:
            continue
        within = int(began[i] == began[i - 1])
        found[within].append(float(f"{np.linalg.norm(actions[i] - actions[i - 1]):.6g}"))
        found[2 + within].append(float(f"{jerk[i - 2]:.6g}"))
    return found


class Stage:
    """Policies and environments of one process, and the groups of starts that are played together."""

    def __init__(self, policies: dict[bool, DitaPolicy], size: int, steps: int) -> None:
        self._policies = {prefix: inference_twin(policy, pack=True) for prefix, policy in policies.items()}
        self._steps = steps
        self._envs = [make(EnvConfig("metaworld", "metaworld_sawyer", TASKS, steps, True), TASKS[0])
                      for _ in range(size)]  # fmt: skip

    def play(self, name: str, delay: int, task: str, first: int) -> list[Episode]:
        """Play one start per environment in lockstep: who asks at the same step is answered by one policy call."""
        policy = self._policies[MODES[name][1]]
        plays = [Play(env, policy, name, delay, task, first + i) for i, env in enumerate(self._envs)]
        for k in range(self._steps):
            playing = [p for p in plays if not p.env.success]
            for p in playing:
                p.arrive()
            asked = [(p, *question) for p in playing if (question := p.asks()) is not None]
            for given in (False, True):
                rows = [row for row in asked if (row[2] is not None) == given]
                if rows:
                    chunks = policy.predict_batch(
                        [history for _, history, _ in rows], [p.seed * 1000 + k for p, _, _ in rows],
                        batch_size=len(plays), committed=[c for _, _, c in rows if c is not None] if given else None,
                    )  # fmt: skip
                    for (p, _, _), chunk in zip(rows, chunks, strict=True):
                        p.take(chunk)
                        p.arrive()  # at once, without a delay
            for p in playing:
                p.step()
        return [p.episode(name) for p in plays]

    def close(self) -> None:
        """Free the renderers."""
        for env in self._envs:
            env.close()


_stage: list[Stage] = []  # of a worker process


def _open_stage(runs: dict[bool, Path]) -> None:
    torch.set_num_threads(1)
    _stage.append(Stage({prefix: DitaPolicy.from_pretrained(run) for prefix, run in runs.items()}, GROUP, STEPS))
    Finalize(None, _stage[0].close, exitpriority=10)  # the interpreter's own clean-up comes too late for EGL


def _play(cell: tuple[str, int, str, int]) -> list[Episode]:
    return _stage[0].play(*cell)


def play_all(runs: dict[bool, Path]) -> list[Episode]:
    """Play what is not yet in build/stitching/episodes.*.jsonl, a group at a time, on two cores; return all.

    Other weights, and other settings of this row, have another file. A group is whole or played again: its rows share
    policy calls, and kernels round differently at other sizes.
    """
    weights = {str(prefix): identity(DitaPolicy.from_pretrained(run)) for prefix, run in runs.items()}
    asked = canonical_json({"weights": weights, "group": GROUP, "steps": STEPS, "executed": EXECUTED, "modes": MODES})
    path = BUILD / f"episodes.{hashlib.sha256(asked.encode()).hexdigest()[:12]}.jsonl"
    cells = [(name, delay, task, FIRST_SEED + first)
             for task in TASKS for first in range(0, STARTS, GROUP) for name in MODES for delay in DELAYS]  # fmt: skip
    found: dict[tuple[str, int, str, int], Episode] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        if line.endswith("}"):  # the last one may be cut
            e = Episode(**json.loads(line))
            found[e.name, e.delay, e.task, e.seed] = e

    def whole(cell: tuple[str, int, str, int]) -> bool:
        return all((*cell[:3], cell[3] + i) in found for i in range(GROUP))

    todo = [cell for cell in cells if not whole(cell)]
    print(f"stitching: {len(cells) - len(todo)} of {len(cells)} groups are in {path}", flush=True)
    spawn = multiprocessing.get_context("spawn")
    with path.open("a") as lines, ProcessPoolExecutor(WORKERS, spawn, _open_stage, (runs,)) as pool:
        lines.write("\n")  # behind a line that was cut
        groups = pool.map(_play, todo)
        for episodes in track(groups, "stitching", total=len(todo)):
            lines.write("".join(canonical_json(asdict(e)) + "\n" for e in episodes))
            lines.flush()
            found.update({(e.name, e.delay, e.task, e.seed): e for e in episodes})
    return [found[*cell[:3], cell[3] + i] for cell in cells for i in range(GROUP)]


def train_policies(overrides: Sequence[str] = (), episodes: int = 60) -> dict[bool, Path]:
    """Collect and train once, into build/; return the run folders with and without committed prefixes.

    The two differ in nothing else. A policy that was trained with prefixes has hardly seen its first actions without
    one, so the modes that give none, and the training-free one, get a policy of their own.
    """
    store, runs = BUILD / "demonstrations.zarr", {True: BUILD / "with_prefix", False: BUILD / "without_prefix"}
    collect = ["collect", f"out={store}", f"env.tasks=[{','.join(TASKS)}]", f"episodes={episodes}", "--resume"]
    trains = []
    for prefix, run in runs.items():
        slots = f"policy.max_committed_slots={COMMITTED if prefix else 0}"
        trains.append(["train", "experiment=demo", f"data.stores=[{{path:{store},weight:1}}]", f"run={run}",
                       f"policy.chunk_size={CHUNK}", slots, *RECIPE, *overrides, "--resume"])  # fmt: skip
    for commands in ([collect], trains):  # the two trainings at once, a core for each
        for command in commands:
            print("$ dita", *command, flush=True)
        running = [subprocess.Popen([sys.executable, "-m", "dita.cli", *c], cwd=ROOT) for c in commands]
        failed = [c for c, process in zip(commands, running, strict=True) if process.wait()]
        if failed:
            raise RuntimeError(f"dita {' '.join(failed[0])} failed; the same command goes on")
    return runs


def made_up(spec: EmbodimentSpec, config: PolicyConfig) -> DitaPolicy:
    """Return random weights for an embodiment; its statistics are its limits."""
    torch.manual_seed(0)
    rows = np.linspace(0, 1, 200, dtype=np.float32)[:, None]
    low, high = (np.concatenate([getattr(f, k) for f in spec.action]) for k in ("low", "high"))
    states = [np.concatenate([getattr(f, k) for f in spec.state]) for k in ("low", "high")]
    state, action = (a + rows * (b - a) for a, b in (states, (0.05 * low, 0.05 * high)))
    stats = fit(spec, [(state.astype(np.float32), action.astype(np.float32))])
    contract = make_contract(PreprocessConfig("q01_q99", "squash", "stored"), config, [spec], [stats])
    diffusion = compose("train", ["experiment=demo"], TrainConfig).diffusion
    return DitaPolicy(config, diffusion, contract).eval().requires_grad_(False)


def stitching(tier: str) -> list[Case]:
    """Row 9: a closed loop in Meta-World with every chunk late by an injected delay, once per mode.

    The full tier goes on where it stopped: demonstrations, training and episodes are kept in build/stitching.
    """
    torch.set_num_threads(1)
    spec = load_embodiment("metaworld_sawyer")
    if tier == "full":
        runs = train_policies()
        policies = {prefix: DitaPolicy.from_pretrained(run) for prefix, run in runs.items()}
        episodes, delays, pairs = play_all(runs), DELAYS, 100
    else:
        config = replace(compose("train", ["policy=dita_tiny"], TrainConfig).policy, chunk_size=CHUNK)
        policies = {p: made_up(spec, replace(config, max_committed_slots=COMMITTED * p)) for p in (True, False)}
        stage, delays, pairs = Stage(policies, 2, 24), (0, 8), 2
        episodes = [e for name in MODES for d in delays for e in stage.play(name, d, TASKS[0], FIRST_SEED)]
        stage.close()
    seams = seams_by_cell(episodes)
    if tier == "full":
        write_page(seams, spec.action_dt)
    cost = [case for name in ("rtc, trained", "rtc, training-free")
            for case in _prefix_cost(name, PolicySession(policies[MODES[name][1]]), spec, pairs)]  # fmt: skip
    return [*_seam_cases(seams, delays), *cost]


def seams_by_cell(episodes: Sequence[Episode]) -> dict[tuple[str, int], Seam]:
    """Group episodes by (mode, delay)."""
    cells: dict[tuple[str, int], list[Episode]] = {}
    for e in episodes:
        cells.setdefault((e.name, e.delay), []).append(e)
    return {cell: Seam(rows) for cell, rows in cells.items()}


def _seam_cases(seams: dict[tuple[str, int], Seam], delays: Sequence[int]) -> list[Case]:
    def worst(name: str, among: Sequence[int]) -> tuple[float, float, float]:
        met = [jump for d in among if not math.isnan((jump := seams[name, d].jump)[0])]
        assert met, f"no two chunks of {name} met"
        return max(met)

    table = {name: {d: seams[name, d].to_dict() for d in delays} for name in MODES}
    far, naive, cases = max(delays), worst("naive switch", delays)[0], []
    for name in ("ensembling", "rtc, trained", "rtc, training-free", "rtc, trained, not faded"):
        most, low, high = worst(name, delays)
        late = worst(name, [d for d in delays if d])[0]
        note = (f"stitching: {name}, worst jump over delays of {min(delays)}..{far} steps {most:.2f} in-chunk medians "
                f"(95 % {low:.2f} .. {high:.2f}), {late:.2f} without the delay 0, which has no prefix")  # fmt: skip
        goal = name in ("rtc, trained", "rtc, training-free")
        cases.append(
            Case(f"worst jump over delays, {name}, against a naive switch", most, naive, "x in-chunk median",
                 naive / max(most, 1e-9), "<= 1.5 in-chunk medians" if goal else "reported",
                 most <= 1.5 if goal else None, note, {"delays": table[name], "naive": table["naive switch"]})
        )  # fmt: skip
    for name in ("rtc, trained", "rtc, training-free", "ensembling", "synchronous"):
        (a, n, low, high), (b, m, _, _) = (seams[x, far].success for x in (name, "naive switch"))
        cases.append(
            Case(f"success at {far} steps of delay, {name}, against a naive switch", a / n, b / m, "",
                 a * m / (b * n) if b else None, "reported", None,
                 f"stitching: {name}, {a} of {n} starts at {far} steps (95 % {low:.2f} .. {high:.2f})",
                 {"delays": table[name]})
        )  # fmt: skip
    return cases


def _prefix_cost(name: str, session: PolicySession, spec: EmbodimentSpec, pairs: int) -> list[Case]:
    rng = np.random.default_rng([0, 9])
    camera, count = spec.cameras[0], iter(range(10**6))
    low, high = (np.concatenate([getattr(f, k) for f in spec.state]) for k in ("low", "high"))
    robot = parse_robot(embodiment_to_dict(spec))
    stitcher = Stitcher(robot, RTC, **stitching_of(session.policy.config))
    stitcher.on_latency(8 * spec.action_dt)

    def look() -> RawObservation:
        image = rng.integers(0, 256, (camera.height, camera.width, 3), np.uint8)
        stamp = next(count) * spec.obs_dt
        return RawObservation({camera.name: image}, rng.uniform(low, high).astype(np.float32), "press", stamp)

    frames = [look(), look()]

    def tick(mode: str) -> None:
        frames[:] = [frames[1], look()]
        stamp, prefix = frames[1].stamp, {}
        if mode == RTC:
            for i in range(4):
                stitcher.on_executed(stamp - (4 - i) * spec.action_dt, np.zeros(3), np.zeros(3), 1.0)
            prefix = {"committed": stitcher.committed(stamp)}
            assert prefix["committed"] is not None
        chunk = session.predict(frames, seed=0, **prefix)
        if mode == RTC:
            values, stamp = stitcher.stitch(chunk.values, chunk.stamp, stamp)
            stitcher.published(Chunk(stamp, spec.action_dt, robot.motion_of(values), values[:, -1]), stamp)

    begin = frames[1].stamp
    stitcher.published(Chunk(begin, spec.action_dt, np.zeros((CHUNK, 3)), np.ones(CHUNK)), begin)
    found = interleave(lambda: tick(RTC), lambda: tick(COMPENSATED), pairs, warm_up=3)
    case = found.case(f"a tick with 8 committed steps, {name}, against one without", round(1 / 1.05, 3))
    note = case.note or f"stitching: {name}, a prefix costs {1 / found.ratio - 1:+.1%} of a tick"
    return [replace(case, goal="<= 5 % more", note=note)]


def write_page(seams: dict[tuple[str, int], Seam], dt: float, folder: Path = PAGE) -> None:
    """Draw success and jump against latency, and tabulate them with intervals; cells without episodes are left out."""
    draw(seams, dt, folder / "stitching.png")
    counts = sorted({len(s.episodes) for s in seams.values()})
    lines = [
        "# Chunks under injected latency", "",
        f"`make bench ROWS=stitching`: {' to '.join(map(str, counts))} unseen starts per cell, of {' and '.join(TASKS)}"
        f" in equal parts, at most {STEPS} steps of {1e3 * dt:g} ms each, in simulated time; chunks of {CHUNK} steps, "
        f"the next one asked for after {EXECUTED}, or as soon as the last one came. `rtc, trained` runs a policy that "
        f"was trained with committed prefixes of up to {COMMITTED} steps; all other modes run one that was trained the "
        "same way without them. At 0 ms nothing is committed, so there the rows of RTC compare the two policies. RTC "
        f"leads from what was planned into each prediction over {FADE} steps, but where it says `not faded`.", "",
        "Success with its 95 % Wilson interval; jump: the median change of the commanded step where a chunk takes over "
        "or ends, in medians within chunks, with a 95 % bootstrap interval over episodes; jerk likewise, and its "
        "median at seams; steps without an action; mean length of an episode.", "",
        "![success, jump and jerk against latency](stitching.png)", "",
        "| mode | latency [ms] | success | 95 % | jump | 95 % | jerk | jerk [m/s³] | underruns | steps |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in MODES:
        for d in sorted(d for n, d in seams if n == name):
            seam = seams[name, d]
            wins, n, low, high = seam.success
            jump, least, most = seam.jump
            values = seam.to_dict()
            jerk = "-" if values["jerk_m_s3"] is None else f"{values['jerk_m_s3']:.0f}"
            lines.append(
                f"| {name} | {1e3 * d * dt:g} | {wins}/{n} | {low:.2f} .. {high:.2f} | {jump:.2f} | {least:.2f} .. "
                f"{most:.2f} | {seam.ratio('jerks', 'jerks_inside')[0]:.2f} | {jerk} | {values['underruns']} | "
                f"{values['mean_steps']:.0f} |"
            )
    text = "\n".join(lines).replace("nan .. nan", "-").replace(" nan ", " - ")  # no two chunks met
    (folder / "stitching.md").write_text(text + "\n")


def draw(seams: dict[tuple[str, int], Seam], dt: float, path: Path) -> None:
    """Draw success, jump and jerk against latency, intervals as whiskers, modes side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    success, jump, jerk = figure.subplots(1, 3)
    for i, (name, colour) in enumerate(zip(MODES, COLOURS, strict=True)):
        row = [(1e3 * d * dt + 6 * (i - 2), seams[name, d]) for d in sorted(d for n, d in seams if n == name)]
        if not row:
            continue
        at = [x for x, _ in row]
        style = {"marker": "o", "markersize": 4, "linewidth": 1.4, "color": colour, "label": name, "capsize": 2}
        rates = [(wins / n, low, high) for wins, n, low, high in (s.success for _, s in row)]
        for axes, values in ((success, rates), (jump, [s.jump for _, s in row])):
            axes.errorbar(at, [v for v, _, _ in values], [[max(0.0, v - low) for v, low, _ in values],
                          [max(0.0, high - v) for v, _, high in values]], elinewidth=0.8, **style)  # fmt: skip
        jerk.errorbar(at, [median(s.rows("jerks") or [math.nan]) for _, s in row], **style)
    jump.axhline(1.5, color="0.4", linestyle="--", linewidth=1)
    jump.annotate("goal", (1.0, 1.5), (3, 0), ("axes fraction", "data"), "offset points", fontsize=8, va="center")
    success.set(title="success", ylim=(-0.03, 1.03))
    jump.set(title="jump where chunks meet\n[medians within chunks]", yscale="log")
    jerk.set(title="median jerk where chunks meet\n[m/s³]", yscale="log")
    for axes in (jump, jerk):
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    for axes in (success, jump, jerk):
        axes.set_xticks([1e3 * d * dt for d in sorted({d for _, d in seams})])
        axes.set_xlabel("injected latency [ms]")
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*success.get_legend_handles_labels(), loc="outside lower center", ncols=len(MODES), frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
