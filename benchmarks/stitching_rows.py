"""Row 9: where chunks meet under injected delay."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing.util import Finalize
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.progress import track

from benchmarks.harness import ROOT, Case, interleave
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
