"""Rows 8 and 9: a live node against bare inference and an HTTP server; where chunks meet under injected delay."""

from __future__ import annotations

import contextlib
import copy
import http.client
import json
import math
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from benchmarks.harness import OTHERS, ROOT, Case, busy_cores, interleave
from dita.checkpoint import save_policy
from dita.cli import compose
from dita.config import EnvConfig, PolicyConfig, PreprocessConfig, TrainConfig
from dita.embodiment import embodiment_to_dict, load_embodiment
from dita.envs import make
from dita.normalize import fit
from dita.policy.fast import PolicySession
from dita.policy.policy import DitaPolicy
from dita.preprocess import make_contract
from dita.statistics import wilson
from dita.types import EmbodimentSpec, RawObservation
from robot_io.core.chunk_buffer import Chunk, ChunkBuffer
from robot_io.core.limits import parse_robot
from robot_io.core.stitching import COMPENSATED, ENSEMBLING, RTC, SYNCHRONOUS, Stitcher
from robot_io.nodes.policy import stitching_of

BUILD = ROOT / "build" / "stitching"
PAGE = ROOT / "docs" / "evidence"
TASKS = ("button-press-topdown-v3", "drawer-open-v3")
CHUNK, COMMITTED = 48, 24  # steps of 12.5 ms: bridges 300 ms
FIRST_SEED = 950_000  # of the starts: neither demonstrations' nor `dita eval`'s
MODES = {  # how it is called -> (mode, whether the policy reads the prefix that it was trained with)
    "naive switch": (COMPENSATED, True),
    "ensembling": (ENSEMBLING, True),
    "rtc, trained": (RTC, True),
    "rtc, training-free": (RTC, False),
    "synchronous": (SYNCHRONOUS, True),
}


# ---- row 8

IMAGE_HZ, STATE_HZ, TICK_HZ = 10.0, 100.0, 100.0
WARM_UP = 8  # images of a round
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

    def run(self, images: Sequence[np.ndarray] | None, until: Any, timeout_s: float = 60.0) -> int:
        """Publish state at 100 Hz, and images at 10 Hz, until `until(images sent)`; return how many were sent."""
        begin, states, sent = time.monotonic(), 0, 0
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
                image = images[sent % len(images)]
                self._image.publish(self.m.image_to_ros(self.bus.msg, self.bus.now(), image, self.camera))
                sent += 1
            self.bus.spin(0.002)
        return sent


def _pictures() -> list[np.ndarray]:
    return list(np.random.default_rng([0, 8]).integers(0, 256, (8, *SIZE, 3), np.uint8))


def _over_http(port: int, count: int) -> Iterator[tuple[float, float]]:
    """Yield (image -> actions, inference alone) [s] for images at 10 Hz."""
    link, pictures = http.client.HTTPConnection("127.0.0.1", port, timeout=30), _pictures()
    begin = time.monotonic()
    for i in range(count):
        time.sleep(max(0.0, begin + i / IMAGE_HZ - time.monotonic()))
        stamp = time.time()
        values = {"state": [0.0, 0.6, 0.2, 0.5], "instruction": INSTRUCTION_TEXT, "stamp": stamp}
        link.request("POST", "/act", pictures[i % 8].tobytes(), {"X-Observation": json.dumps(values)})
        answer = json.loads(link.getresponse().read())
        yield time.time() - stamp, answer["seconds"]


def node_latency(tier: str) -> list[Case]:
    """Row 8: image stamp -> chunk through real processes over DDS, against the bare tick and an HTTP server."""
    from robot_io.bus import open_bus
    from robot_io.live import Children

    rounds, images = (4, 60) if tier == "full" else (1, 12 + WARM_UP)
    config = compose("train", ["policy=dita_tiny"], TrainConfig).policy
    spec, domain = bench_arm(), 87
    others = busy_cores()
    with TemporaryDirectory() as at, ExitStack() as stack:
        save_policy(made_up(spec, config), Path(at))
        children = stack.enter_context(Children())
        port = _free_port()
        children.start("http", [sys.executable, "-m", "benchmarks.act_server", at, str(port)])
        bus_arguments = {"kind": "dds", "domain_id": domain}
        policy = {
            "bus": bus_arguments, "checkpoint": at, "embodiment": spec.name, "seed": 0, "num_inference_steps": None,
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
        arm = Arm(bus, spec)
        found = _measure_rounds(arm, children, port, rounds, images)
    return _latency_cases(found, others)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _measure_rounds(arm: Arm, children: Any, port: int, rounds: int, images: int) -> dict[str, Any]:
    node, http_, bare, gaps, holds = [], [], [], [], 0
    pictures = _pictures()
    _wait_http(port, children)
    for _ in range(rounds):

        def armed(_: int) -> bool:
            children.check()
            if arm.policy.get("ok") and arm.guard.get("state") != "ARMED":
                arm.order(True)
            return arm.guard.get("state") == "ARMED"

        arm.run(pictures, armed)
        arm.run(pictures, lambda sent: sent > WARM_UP)
        before, commands, held = len(arm.chunks), len(arm.commands), arm.holds
        arm.run(pictures, lambda sent: sent >= images)
        node += [seconds for _, seconds in arm.chunks[before:]]
        holds += arm.holds - held
        gaps += [b - a for a, b in pairwise(arm.commands[commands:])]
        arm.order(False)
        arm.run(None, lambda _: arm.guard.get("state") == "IDLE")
        rows = list(_over_http(port, images))[WARM_UP:]
        http_ += [total for total, _ in rows]
        bare += [alone for _, alone in rows]
    guard = {k: float(v) for k, v in arm.diagnostics.get("guard", {}).get("values", {}).items() if _is_number(v)}
    asked = rounds * (images - 1)
    return {"node": node, "http": http_, "bare": bare, "gaps": gaps, "holds": holds, "guard": guard, "asked": asked}


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
            list(_over_http(port, 1))
            return
        time.sleep(0.2)
    raise TimeoutError("node_latency: the HTTP server did not start")


def _latency_cases(found: dict[str, Any], others: float) -> list[Case]:
    if not found["node"]:
        raise TimeoutError("node_latency: no chunk came over the wire")
    ms = {name: dict(zip(("p50", "p99"), np.percentile(found[name], (50, 99)).tolist(), strict=True))
          for name in ("node", "http", "bare")}  # fmt: skip
    detail = {
        "seconds": {k: found[k] for k in ("node", "http", "bare")},
        "guard": found["guard"],
        "others_cores": others,
    }
    quiet = others <= OTHERS
    noise = "" if quiet else f"no wall-time ratio: others used {others:.1f} cores"
    cases = []
    for peer in ("bare", "http"):
        for q in ("p50", "p99"):
            ours, theirs = ms["node"][q], ms[peer][q]
            most = 1.05 * theirs + 2e-3 if q == "p50" else 1.2 * theirs
            goal = ("<= 1.05x + 2 ms" if q == "p50" else "<= 1.2x") if peer == "bare" else "reported"
            name = f"image to chunk over DDS, {q}, against {'the bare tick' if peer == 'bare' else 'an HTTP server'}"
            met = ours <= most if quiet and peer == "bare" else None
            cases.append(Case(name, ours, theirs, "s", theirs / ours if quiet else None, goal, met, noise, detail))
    period, std = 1 / TICK_HZ, found["guard"].get("periodicity.standard_deviation", math.nan)
    bad = not quiet or math.isnan(std)
    cases.append(Case("jitter of the guard's period", std if not math.isnan(std) else None, period, "s",
                      None if bad else period / std, "<= 5 % of the period", None if bad else std <= 0.05 * period,
                      noise or "node_latency: periods as the guard measured them, periods as the peer",
                      {"arrival_std_s": float(np.std(found["gaps"])) if found["gaps"] else None}))  # fmt: skip
    late = sum(s > 1 / IMAGE_HZ for s in found["node"]) + max(0, found["asked"] - len(found["node"]) - WARM_UP)
    under = found["holds"]
    cases.append(Case("underruns of the command stream", float(under), None, "",
                      float(under == 0) if quiet else None, "0", under == 0 if quiet else None,
                      noise or f"node_latency: {late} of {found['asked']} chunks later than a camera period",
                      {"deadline_misses": late, "overruns": found["guard"].get("overruns")}))  # fmt: skip
    return cases


# ---- row 9


@dataclass
class Seam:
    """What one or more episodes showed at one delay."""

    successes: int = 0
    episodes: int = 0
    underruns: int = 0  # steps for which there was no action, between the first chunk and the end
    jumps: list[float] = field(default_factory=list)  # [m] |action - the one before| where a chunk takes over
    inside: list[float] = field(default_factory=list)  # the same within chunks
    jerks: list[float] = field(default_factory=list)  # [m/s^3] of the commanded path where a chunk takes over
    jerks_inside: list[float] = field(default_factory=list)

    @property
    def jump(self) -> float:
        """Return the median jump where chunks meet, in units of the median within them."""
        return median(self.jumps) / max(median(self.inside), 1e-9) if self.jumps and self.inside else math.nan

    @property
    def jerk(self) -> float:
        """Return the same of the jerk."""
        return median(self.jerks) / max(median(self.jerks_inside), 1e-9) if self.jerks else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        share = None if math.isnan(self.jump) else self.jump
        jerk = None if math.isnan(self.jerk) else self.jerk
        return {
            "successes": self.successes, "episodes": self.episodes, "underruns": self.underruns,
            "boundaries": len(self.jumps), "jump_ratio": share, "jerk_ratio": jerk,
            "jump_m": median(self.jumps) if self.jumps else None,
            "inside_m": median(self.inside) if self.inside else None,
            "jerk_m_s3": median(self.jerks) if self.jerks else None,
        }  # fmt: skip


def without_prefix(policy: DitaPolicy) -> DitaPolicy:
    """Return the same weights as a policy that was not trained with committed prefixes."""
    twin = copy.copy(policy)
    twin.config = replace(policy.config, max_committed_slots=0)
    return twin


def play(
    env: Any, session: PolicySession, mode: str, trained: bool, delay: int, task: str, seed: int, steps: int, seam: Seam
) -> None:
    """Play one episode in simulated time, every chunk arriving `delay` steps after its observation."""
    spec = env.embodiment
    robot, dt, stride = parse_robot(embodiment_to_dict(spec)), spec.action_dt, round(spec.obs_dt / spec.action_dt)
    options = {**stitching_of(session.policy.config), "trained": trained}
    stitcher, buffer = (
        Stitcher(robot, mode, n_action_steps=8 if mode == SYNCHRONOUS else None, **options),
        ChunkBuffer(),
    )
    stitcher.on_latency(delay * dt)
    session.reset()
    env.reset(seed=seed, options={"task": task})
    frames: dict[int, RawObservation] = {}
    arriving: tuple[int, Any] | None = None
    earliest, path, began = -math.inf, [np.array(env.commanded_position, float)], []
    effort, first = np.zeros(robot.action_dim, np.float32), True
    for k in range(steps):
        now = k * dt
        if k % stride == 0:
            frames = {i: o for i, o in frames.items() if i >= k - stride} | {k: env.observe()}
            if arriving is None and now >= earliest - 1e-9:
                history = [frames[i] for i in (k - stride, k) if i in frames]
                committed = stitcher.committed(now)
                prefix = {} if committed is None else {"committed": committed}
                arriving = (k + delay, session.predict(history, seed=seed * 1000 + k, **prefix))
        if arriving is not None and k == arriving[0]:
            values, stamp = stitcher.stitch(arriving[1].values, arriving[1].stamp, now)
            gripper = values[:, robot.action_slice(robot.gripper)][:, 0]
            chunk = Chunk(stamp, dt, robot.motion_of(values), gripper, k + 1)
            stitcher.published(chunk, now)
            buffer.offer(chunk, now)
            earliest, arriving = stitcher.next_stamp(stamp, len(values)), None
        due = buffer.due(now)
        action = effort.copy()
        action[robot.action_slice(robot.motion)] = 0.0
        if due is None:
            seam.underruns += not first
        else:
            action[robot.action_slice(robot.motion)] = due.chunk.motion[due.index]
            action[robot.action_slice(robot.gripper)] = (
                0.0 if due.chunk.gripper is None else due.chunk.gripper[due.index]
            )
            effort, first = action, False
        action = np.clip(action, env.action_space.low, env.action_space.high)
        env.step(action)
        path.append(np.array(env.commanded_position, float))
        began.append(0 if due is None else due.chunk.id)
        if due is not None:
            delta = action[robot.action_slice(robot.motion)].astype(float)
            stitcher.on_executed(due.start, path[-1], delta, float(action[robot.action_slice(robot.gripper)][0]))
        if env.success:
            break
    _measure(seam, np.array(path), began, dt)
    seam.episodes += 1
    seam.successes += bool(env.success)


def _measure(seam: Seam, path: np.ndarray, began: Sequence[int], dt: float) -> None:
    actions = np.diff(path, axis=0)
    jerk = np.linalg.norm(np.diff(actions, n=2, axis=0), axis=1) / dt**3
    seen = next((i for i, id in enumerate(began) if id), len(began))
    for i in range(seen + 2, len(actions)):
        jump = float(np.linalg.norm(actions[i] - actions[i - 1]))
        boundary = began[i] != began[i - 1]
        (seam.jumps if boundary else seam.inside).append(jump)
        (seam.jerks if boundary else seam.jerks_inside).append(float(jerk[i - 2]))


def train_policy() -> Path:
    """Collect and train once, into build/; return the run's folder."""
    store, run = BUILD / "demonstrations.zarr", BUILD / "train"
    tasks = f"env.tasks=[{','.join(TASKS)}]"
    sizes = [f"policy.chunk_size={CHUNK}", f"policy.max_committed_slots={COMMITTED}"]
    for command in (
        ["collect", f"out={store}", tasks, "episodes=60", "--resume"],
        ["train", "experiment=demo", f"data.stores=[{{path:{store},weight:1}}]", f"run={run}", *sizes, "--resume"],
    ):
        print("$ dita", *command, flush=True)
        subprocess.run([sys.executable, "-m", "dita.cli", *command], check=True, cwd=ROOT)
    return run


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
    """Row 9: a closed loop in Meta-World with every chunk late by an injected delay, once per mode."""
    torch.set_num_threads(1)
    full = tier == "full"
    if full:
        policy = DitaPolicy.from_pretrained(train_policy())
    else:
        config = compose("train", ["policy=dita_tiny"], TrainConfig).policy
        policy = made_up(
            load_embodiment("metaworld_sawyer"), replace(config, chunk_size=CHUNK, max_committed_slots=COMMITTED)
        )
    sessions = {True: PolicySession(policy), False: PolicySession(without_prefix(policy))}
    steps, episodes, delays = (300, 20, (0, 4, 8, 12, 16, 20, 24)) if full else (24, 1, (0, 8))
    env = make(EnvConfig("metaworld", "metaworld_sawyer", TASKS, steps, True), TASKS[0])
    seams = {(name, d): Seam() for name in MODES for d in delays}
    try:
        for e in range(episodes):
            for (name, delay), seam in seams.items():
                mode, trained = MODES[name]
                task = TASKS[e % len(TASKS)]
                play(env, sessions[trained], mode, trained, delay, task, FIRST_SEED + e // len(TASKS), steps, seam)
            if full:
                print(f"stitching: episode {e + 1} of {episodes}", flush=True)
    finally:
        env.close()
    if full:
        write_page(seams, delays, env.embodiment.action_dt, episodes)
    cost = _prefix_cost(sessions[True], env.embodiment, 10 if full else 2)
    return [*_seam_cases(seams, [d for d in delays if d <= CHUNK // 2]), *cost]


def _seam_cases(seams: dict[tuple[str, int], Seam], delays: Sequence[int]) -> list[Case]:
    late = [d for d in delays if d > 0]
    naive = max(seams["naive switch", d].jump for d in late)
    table = {name: {d: seams[name, d].to_dict() for d in delays} for name in MODES}
    cases = []
    for name in ("ensembling", "rtc, trained", "rtc, training-free"):
        worst = max(seams[name, d].jump for d in late)
        goal = "rtc" in name
        cases.append(
            Case(f"worst jump over delays, {name}, against a naive switch", worst, naive, "x in-chunk median",
                 naive / max(worst, 1e-9), "<= 1.5 in-chunk medians" if goal else "reported",
                 worst <= 1.5 if goal else None, f"stitching: delays 1..{max(late)} steps, {name} and naive switch",
                 {"delays": table[name], "naive": table["naive switch"]})
        )  # fmt: skip
    far = max(late)
    for name in ("rtc, trained", "rtc, training-free", "ensembling", "synchronous"):
        ours, peer = (seams[n, far] for n in (name, "naive switch"))
        a, b = ours.successes / ours.episodes, peer.successes / peer.episodes
        cases.append(
            Case(f"success at {far} steps of delay, {name}, against a naive switch", a, b, "", a / b if b else None,
                 "reported", None, f"stitching: success of {ours.episodes} episodes at the longest delay")
        )  # fmt: skip
    return cases


def _prefix_cost(session: PolicySession, spec: EmbodimentSpec, pairs: int) -> list[Case]:
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
    case = found.case("a tick with committed prefix, against one without", round(1 / 1.05, 3))
    note = case.note or f"stitching: a prefix costs {found.ours / found.peer - 1:+.1%} of a tick"
    return [replace(case, goal="<= 5 % more", note=note)]


def write_page(seams: dict[tuple[str, int], Seam], delays: Sequence[int], dt: float, episodes: int) -> None:
    """Draw success and jerk against latency, and tabulate them with intervals, into docs/evidence."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    success, jerk = figure.subplots(1, 2)
    at = [1e3 * d * dt for d in delays]
    for name in MODES:
        row = [seams[name, d] for d in delays]
        success.plot(at, [s.successes / s.episodes for s in row], marker="o", label=name)
        jerk.plot(at, [median(s.jerks) if s.jerks else math.nan for s in row], marker="o", label=name)
    success.set(xlabel="injected latency [ms]", ylabel="success", ylim=(-0.03, 1.03))
    jerk.set(xlabel="injected latency [ms]", ylabel="median jerk where chunks meet [m/s³]", yscale="log")
    success.legend(fontsize=8)
    figure.savefig(PAGE / "stitching.png", dpi=120)
    lines = [
        "# Chunks under injected latency", "",
        f"`make bench ROWS=stitching`: {episodes} unseen starts of {', '.join(TASKS)} per cell, one trained policy "
        f"(chunk of {CHUNK} steps of {1e3 * dt:g} ms), simulated time. Success with its 95 % Wilson interval; jump and "
        "jerk where a chunk takes over, in medians within chunks; steps without an action.", "",
        "![success and jerk against latency](stitching.png)", "",
        "| mode | latency [ms] | success | 95 % interval | jump | jerk | underruns |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in MODES:
        for d in delays:
            s = seams[name, d]
            low, high = wilson(s.successes, s.episodes)
            lines.append(f"| {name} | {1e3 * d * dt:g} | {s.successes}/{s.episodes} | {low:.2f} .. {high:.2f} | "
                         f"{s.jump:.2f} | {s.jerk:.2f} | {s.underruns} |")  # fmt: skip
    (PAGE / "stitching.md").write_text("\n".join(lines) + "\n")
