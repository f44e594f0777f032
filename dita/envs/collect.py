"""Scripted demonstrations: noise on what is executed, the expert's clean action in the store."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float32
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dita.config import CollectConfig
from dita.datasets.writer import StoreWriter
from dita.embodiment import load_embodiment
from dita.envs import check_tasks, make
from dita.envs.base import RobotEnv
from dita.envs.workers import Worker
from dita.types import EmbodimentSpec, Episode, RawObservation

HOLD_STEPS = 10  # recorded after success, so that the policy learns to stay
NOISE = 2  # purpose of the random numbers that disturb an episode's actions
NOISE_STEPS = 10  # control steps over which that noise is correlated
MAX_ATTEMPTS = 10  # per wanted episode
# [rad] that count as the half range of an absolute joint target, whose own range is all that the joint can reach; an
# expert that moves on from its last target adds the noise of several steps up
JOINT_RANGE = 0.01


@dataclass(frozen=True, eq=False)
class Attempt:
    """One start tried; `episode` is None where the expert failed or nothing was to be recorded."""

    start_hash: str
    episode: Episode | None


class Demonstrator:
    """Lives in a worker process: drives the expert through one start after the other."""

    def __init__(self, config: CollectConfig) -> None:
        self.config = config
        self._env: RobotEnv | None = None

    def attempt(self, task: str, seed: int, record: bool) -> Attempt:
        """Try one start; without `record`, only say which start it is."""
        env = self._env = self._env or make(self.config.env, task)
        env.reset(seed=seed, options={"task": task})
        episode = demonstrate(env, seed, self.config.action_noise) if record else None
        return Attempt(env.start_hash, episode)

    def close(self) -> None:
        """Free the renderer."""
        if self._env is not None:
            self._env.close()


def demonstrate(env: RobotEnv, seed: int, action_noise: float) -> Episode | None:
    """Record the expert from a fresh start, one frame per control step; None if it fails or the simulator warns.

    Args:
        env: just reset.
        seed: of the noise.
        action_noise: std of the noise on the executed action, in half ranges (JOINT_RANGE for absolute joint targets);
            DART (Laskey et al. 2017). It is
            correlated over NOISE_STEPS, so that the hand really leaves the expert's path and the store shows the way
            back; independent noise would average out.
    """
    observations: list[RawObservation] = []
    actions: list[Float32[np.ndarray, "a"]] = []
    for action in drive(env, seed, action_noise):
        observations.append(env.observe())
        actions.append(action)
    if not env.success or env.warnings():
        return None
    return Episode(
        images={c.name: np.stack([o.images[c.name] for o in observations]) for c in env.embodiment.cameras},
        state=np.stack([o.state for o in observations]),
        action=np.stack(actions),
        stamp=np.array([o.stamp for o in observations]),
        instruction=env.instruction,
        success=True,
        source=source_of(env.suite, env.task, seed),
    )


def drive(env: RobotEnv, seed: int, action_noise: float) -> Iterator[Float32[np.ndarray, "a"]]:
    """Yield the expert's clean action of each control step, which is then executed with noise; see `demonstrate`.

    Ends HOLD_STEPS after success, or at `env.max_steps`.
    """
    rng = np.random.default_rng([seed, NOISE])
    std = action_noise * _noise_range(env.embodiment)
    keep = np.exp(-1 / NOISE_STEPS)
    noise = std * rng.standard_normal(len(std))
    left = HOLD_STEPS
    while left > 0 and env.steps < env.max_steps:
        action = env.expert_action()
        yield action
        env.step((action + noise).astype(np.float32))
        noise = keep * noise + np.sqrt(1 - keep**2) * std * rng.standard_normal(len(std))
        left -= env.success


def collect(config: CollectConfig, *, exist: Literal["error", "resume", "overwrite"]) -> None:
    """Write `config.episodes` successful demonstrations of each task into a sealed store.

    Start i of a task has seed config.seed + i; the first successes in that order are stored, so the store's content
    does not depend on the number of workers. Failed attempts are counted, never stored.

    Raises:
        FileExistsError: `config.out` exists and `exist` is "error".
        ValueError: unknown task, suite or embodiment, a store that differs, or the expert fails too often.
    """
    check_tasks(config.env)
    spec = load_embodiment(config.env.embodiment)
    source = f"{config.env.suite}: scripted experts, seed {config.seed}, action noise {config.action_noise:g}"
    began = time.monotonic()
    workers: list[Worker] = []
    try:
        # the context manager seals on a clean end; after Ctrl-C the staged episodes wait for --resume
        with StoreWriter.create(
            config.out, spec, source=source, licence="MIT", codec=config.codec, exist=exist
        ) as store:
            wanted = [task for task in config.env.tasks if _stored(store, config, task) < config.episodes]
            workers += [Worker(Demonstrator, config) for _ in range(config.workers if wanted else 0)]
            with _progress() as progress:
                tried = {task: _collect_task(config, task, store, workers, progress) for task in wanted}
    finally:
        for worker in workers:
            worker.close()
    _summarise(config, tried, time.monotonic() - began)


def source_of(suite: str, task: str, seed: int) -> str:
    """Return the id of a demonstration in its store."""
    return f"{suite}/{task}/seed={seed}"


def _collect_task(
    config: CollectConfig, task: str, store: StoreWriter, workers: list[Worker], progress: Progress
) -> int:
    """Store the missing demonstrations of one task; return how many starts failed."""
    bar = progress.add_task(task, total=config.episodes, failed=0)
    starts: set[str] = set()
    done = failed = 0
    for seed, attempt in _attempts(config, task, store, workers):
        duplicate, stored = attempt.start_hash in starts, source_of(config.env.suite, task, seed) in store.sources()
        starts.add(attempt.start_hash)
        if attempt.episode is not None and not duplicate:
            store.add(attempt.episode)
            stored = True
        done, failed = done + stored, failed + (not stored)
        progress.update(bar, completed=done, failed=failed)
        if done >= config.episodes:
            return failed
        if done + failed >= MAX_ATTEMPTS * config.episodes:
            break
    raise ValueError(
        f"the expert of {task} made only {done} of {config.episodes} demonstrations in {done + failed} "
        f"starts; raise env.max_steps ({config.env.max_steps}) or lower action_noise"
    )


def _attempts(
    config: CollectConfig, task: str, store: StoreWriter, workers: list[Worker]
) -> Iterator[tuple[int, Attempt]]:
    """Yield the attempts in order of their seeds: worker i has seeds i, i + n, i + 2n, ..."""

    def start(worker: Worker, seed: int) -> None:
        source = source_of(config.env.suite, task, seed)
        worker.call(source, "attempt", task, seed, source not in store.sources())

    for i, worker in enumerate(workers):
        start(worker, config.seed + i)
    for seed, worker in zip(itertools.count(config.seed), itertools.cycle(workers), strict=False):
        yield seed, worker.result()
        start(worker, seed + len(workers))


def _stored(store: StoreWriter, config: CollectConfig, task: str) -> int:
    prefix = source_of(config.env.suite, task, 0).removesuffix("0")
    return sum(source.startswith(prefix) for source in store.sources())


def _noise_range(spec: EmbodimentSpec) -> Float32[np.ndarray, "a"]:
    # a gripper keeps the expert's grip: noise there drops what it holds
    halves = [(np.array(f.high) - f.low) / 2 * (not f.kind.startswith("gripper")) for f in spec.action]
    joints = [f.kind == "joint_position" and f.mode == "absolute" for f in spec.action]
    return np.concatenate(
        [np.minimum(half, JOINT_RANGE) if joint else half for half, joint in zip(halves, joints, strict=True)]
    ).astype(np.float32)


def _progress() -> Progress:
    text = TextColumn("[progress.description]{task.description}")
    failed = TextColumn("{task.fields[failed]} failed starts")
    return Progress(text, BarColumn(), MofNCompleteColumn(), failed, TimeElapsedColumn(), TimeRemainingColumn())


def _summarise(config: CollectConfig, failed: dict[str, int], seconds: float) -> None:
    console = Console()
    for task in config.env.tasks:
        text = f"{failed[task]} failed starts" if task in failed else "were there already"
        console.print(f"{task}: {config.episodes} demonstrations, {text}", highlight=False)
    console.print(f"{config.out}: sealed after {seconds:.1f} s", highlight=False)
