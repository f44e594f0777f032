"""(policy, environments, starts) -> episode results: environments in processes, the policy batched over them.

The results do not depend on the number of environments: start, noise and frames are functions of the episode's own
seed and step, and the policy always sees one padded batch size.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float32

from dita.config import EnvConfig, PerturbConfig
from dita.envs import make
from dita.envs.base import RobotEnv
from dita.envs.ensemble import Ensemble
from dita.envs.guarded import Guarded, shipped_guard
from dita.envs.perturb import Perturbation
from dita.envs.video import write_mp4
from dita.envs.workers import Worker, answered
from dita.types import ActionChunk, EmbodimentSpec, RawObservation

POLICY_NOISE = 3  # purpose of the random numbers that seed a policy call
VIDEO_EVERY = 4  # control steps per video frame
NICE = 10  # of simulators: while one policy waits for a core, all of them soon wait for the policy


class BatchPolicy(Protocol):
    """What a rollout needs of a policy; `None` instead of a chunk lets the suite's scripted expert act."""

    def predict_batch(
        self,
        histories: Sequence[Sequence[RawObservation]],
        seeds: Sequence[int],
        *,
        embodiment: str | None = None,
        num_inference_steps: int | None = None,
        batch_size: int | None = None,
    ) -> Sequence[ActionChunk | None]:
        """Return one chunk per history, each with its own seed."""
        ...


@dataclass(frozen=True)
class Start:
    """One episode of the fixed list."""

    task: str
    index: int  # in its task
    seed: int
    record: str | None  # folder for its video and trace
    picture: str | None = None  # folder for its last picture, should it fail and not be recorded

    @property
    def name(self) -> str:
        """What errors and files call it."""
        return f"{self.task} episode {self.index} (seed {self.seed})"


@dataclass(frozen=True)
class Timing:
    """How often the policy sees and acts, in control steps."""

    n_obs_steps: int
    obs_stride: int
    n_action_steps: int

    @classmethod
    def of(cls, spec: EmbodimentSpec, n_obs_steps: int, n_action_steps: int) -> Timing:
        """Turn the embodiment's seconds into control steps.

        Raises:
            ValueError: obs_dt is no whole number of control steps, or action_dt not one.
        """
        obs, action = spec.obs_dt * spec.control_hz, spec.action_dt * spec.control_hz
        if abs(obs - round(obs)) > 1e-6 or abs(action - 1) > 1e-6:
            raise ValueError(
                f"embodiment {spec.name}: at {spec.control_hz:g} Hz, obs_dt {spec.obs_dt} s is {obs:g} control steps "
                f"and action_dt {spec.action_dt} s is {action:g}; a rollout needs a whole number and exactly 1"
            )
        return cls(n_obs_steps, round(obs), n_action_steps)

    def shows(self, step: int) -> bool:
        """Say whether some policy call sees the frame of this step: only those are rendered."""
        return any((step + age) % self.n_action_steps == 0 for age in self._ages())

    def history_steps(self, step: int) -> list[int]:
        """Return the steps that a policy call at `step` sees, oldest first; fewer at an episode's start."""
        return [step - age for age in reversed(self._ages()) if step >= age]

    @property
    def span(self) -> int:
        """Steps from the oldest to the newest frame of a history."""
        return (self.n_obs_steps - 1) * self.obs_stride

    def _ages(self) -> range:
        return range(0, self.span + 1, self.obs_stride)


@dataclass(frozen=True)
class EpisodeResult:
    """One episode; every one of the fixed list counts."""

    task: str
    index: int
    seed: int
    start_hash: str
    success: bool  # at any step, which also ends the episode
    reason: str  # success, max_steps, or what went wrong
    steps: int
    replans: int
    latency: tuple[float, ...]  # [s] of each policy call, for its whole batch
    warnings: Mapping[str, int]  # MuJoCo's, by name


@dataclass(frozen=True, eq=False)
class Turn:
    """What an environment says between two policy calls: a history to act on, or an episode that ended."""

    history: Sequence[RawObservation]
    ended: Mapping[str, Any] | None  # fields of EpisodeResult


@dataclass(frozen=True)
class Rules:
    """What else episodes are played by."""

    guard: bool = False  # the robot's guard stands between chunks and environment; its faults end an episode
    temporal_ensembling: float | None = None  # decay of `dita.envs.ensemble`
    perturb: PerturbConfig | None = None


PLAIN = Rules()


class Player:
    """Lives in a worker process: plays one episode after the other, chunk by chunk."""

    def __init__(self, config: EnvConfig, timing: Timing, rules: Rules) -> None:
        self.config, self.timing, self.rules = config, timing, rules
        self._env: RobotEnv | None = None
        self._perturbation = None if rules.perturb is None else Perturbation(config, rules.perturb)

    def start(self, start: Start) -> Turn:
        """Begin an episode."""
        env = self._env = self._env or make(self.config, start.task)
        env.reset(seed=start.seed, options={"task": start.task})
        if self._perturbation is not None:
            self._perturbation.begin(env, start.seed)
        self._start, self._recorder = start, Recorder(start, env) if start.record else None
        self._frames: dict[int, RawObservation] = {0: env.observe()}
        self._guarded = Guarded(env, shipped_guard()) if self.rules.guard else None
        decay = self.rules.temporal_ensembling
        self._ensemble = None if decay is None else Ensemble(env.embodiment, decay)
        return self._turn()

    def run(self, values: Float32[np.ndarray, "n a"] | None) -> Turn:
        """Execute the first n_action_steps rows of a chunk open loop; None: the scripted expert acts."""
        env = self._env
        assert env is not None
        if values is not None and not np.isfinite(values).all():
            return self._end("an action is not finite")
        if self._recorder:
            self._recorder.chunk(values)
        if self._ensemble is not None and values is not None:
            values = self._ensemble.chunk(env.steps, values)
        guarded = self._guarded if values is not None else None
        if guarded is not None and values is not None:
            guarded.chunk(values)
        for i in range(self.timing.n_action_steps):
            if guarded is not None:
                action = guarded.action()
                if fault := guarded.fault():
                    return self._end(f"guard: {fault}")
            else:
                action = env.expert_action() if values is None else values[i]
            _, _, _, truncated, _ = env.step(action)
            if self._ensemble is not None:
                self._ensemble.executed(np.clip(action, env.action_space.low, env.action_space.high))  # pyright: ignore
            if self._recorder:
                self._recorder.step(action)
            if warnings := env.warnings():
                return self._end(f"MuJoCo warned: {', '.join(warnings)}")
            if env.success:
                return self._end("success")
            if truncated:
                return self._end("max_steps")
            if self.timing.shows(env.steps):
                self._frames[env.steps] = env.observe()
        return self._turn()

    def close(self) -> None:
        """Free the renderer."""
        if self._env is not None:
            self._env.close()

    def _turn(self) -> Turn:
        assert self._env is not None
        oldest = self._env.steps - self.timing.span  # later calls look back no further
        self._frames = {step: frame for step, frame in self._frames.items() if step >= oldest}
        return Turn([self._frames[step] for step in self.timing.history_steps(self._env.steps)], None)

    def _end(self, reason: str) -> Turn:
        env = self._env
        assert env is not None
        success = reason == "success"
        if self._recorder:
            self._recorder.write(success)
        elif self._start.picture is not None and not success and env.embodiment.cameras:
            from matplotlib.image import imsave  # not in every worker's start

            path = Path(self._start.picture) / f"episode_{self._start.index}_failure.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            imsave(path, env.render(), format="jpeg", pil_kwargs={"quality": 80})
        return Turn(
            (),
            {
                "start_hash": env.start_hash,
                "success": success,
                "reason": reason,
                "steps": env.steps,
                "warnings": env.warnings(),
            },
        )


class Recorder:
    """Video and trace of one episode: `episode_3_success.mp4` and `.json`."""

    def __init__(self, start: Start, env: RobotEnv) -> None:
        self._start, self._env = start, env
        self._frames = [env.render()]
        self._states, self._executed = [env.state.tolist()], []
        self._chunks: list[dict[str, Any]] = []

    def chunk(self, values: Float32[np.ndarray, "n a"] | None) -> None:
        """Note what the policy predicted for this step."""
        if values is not None:
            self._chunks.append({"step": self._env.steps, "values": values.tolist()})

    def step(self, action: Float32[np.ndarray, "a"]) -> None:
        """Note what was executed, after the environment stepped."""
        low, high = self._env.action_space.low, self._env.action_space.high  # pyright: ignore
        self._executed.append(np.clip(action, low, high).tolist())
        self._states.append(self._env.state.tolist())
        if self._env.steps % VIDEO_EVERY == 0 or self._env.success:
            self._frames.append(self._env.render())

    def write(self, success: bool) -> None:
        """Write both files."""
        spec = self._env.embodiment
        assert self._start.record is not None
        name = f"episode_{self._start.index}_{'success' if success else 'failure'}"
        path = Path(self._start.record) / f"{name}.mp4"
        write_mp4(path, self._frames, round(spec.control_hz / VIDEO_EVERY))
        trace = {
            "task": self._start.task,
            "seed": self._start.seed,
            "instruction": self._env.instruction,
            "embodiment": spec.name,
            "dt": 1 / spec.control_hz,
            "action_fields": [{"name": f.name, "size": f.size, "unit": f.unit} for f in spec.action],
            "chunks": self._chunks,  # predicted, SI
            "executed": self._executed,  # clipped to the limits, SI
            "states": self._states,
        }
        path.with_suffix(".json").write_text(json.dumps(trace))


def rollout(
    policy: BatchPolicy,
    env: EnvConfig,
    embodiment: str,
    starts: Sequence[Start],
    timing: Timing,
    *,
    n_envs: int,
    batch_size: int,
    num_inference_steps: int | None = None,
    rules: Rules = PLAIN,
) -> Iterator[EpisodeResult]:
    """Play every start and yield the results as they end.

    The policy is called as soon as a batch of environments waits for it, while the others simulate: with n_envs twice
    the batch_size neither side idles. A free environment takes the next start.

    Raises:
        RuntimeError: a worker process died; names its episode.
        ValueError: unknown task, a policy that does not fit, or a chunk shorter than n_action_steps.
    """
    waiting = deque(starts)
    workers = [Worker(Player, env, timing, rules, nice=NICE) for _ in range(min(n_envs, len(starts)))]
    playing: dict[Worker, _Playing] = {}
    ready: dict[Worker, Sequence[RawObservation]] = {}  # those of them that wait for the policy
    try:
        for worker in workers:
            _next_start(worker, waiting, playing)
        while playing:
            for worker in answered([w for w in playing if w not in ready]):
                turn: Turn = worker.result()
                if turn.ended is None:
                    ready[worker] = turn.history
                else:
                    yield playing.pop(worker).result(turn.ended)
                    _next_start(worker, waiting, playing)
            if not ready or len(ready) < min(batch_size, len(playing)):
                continue
            group = list(ready)[:batch_size]
            began = time.perf_counter()
            chunks = policy.predict_batch(
                [ready.pop(worker) for worker in group],
                [noise_seed(playing[worker].start, len(playing[worker].latency)) for worker in group],
                embodiment=embodiment,
                num_inference_steps=num_inference_steps,
                batch_size=batch_size,
            )
            seconds = time.perf_counter() - began
            for worker, chunk in zip(group, chunks, strict=True):
                playing[worker].latency.append(seconds)
                worker.call(playing[worker].start.name, "run", _values(chunk, timing))
    finally:
        for worker in workers:
            worker.close()


class _Playing:
    """The parent's notes on a running episode."""

    def __init__(self, start: Start) -> None:
        self.start = start
        self.latency: list[float] = []

    def result(self, ended: Mapping[str, Any]) -> EpisodeResult:
        s = self.start
        return EpisodeResult(
            task=s.task, index=s.index, seed=s.seed, replans=len(self.latency), latency=tuple(self.latency), **ended
        )


def noise_seed(start: Start, calls: int) -> int:
    """Return the seed of an episode's policy call, before which there were `calls`."""
    return int(np.random.default_rng([start.seed, POLICY_NOISE, calls]).integers(2**63))


def _next_start(worker: Worker, waiting: deque[Start], playing: dict[Worker, _Playing]) -> None:
    if waiting:
        start = waiting.popleft()
        playing[worker] = _Playing(start)
        worker.call(start.name, "start", start)


def _values(chunk: ActionChunk | None, timing: Timing) -> Float32[np.ndarray, "n a"] | None:
    if chunk is None:
        return None
    if len(chunk.values) < timing.n_action_steps:
        raise ValueError(f"n_action_steps {timing.n_action_steps} exceeds the policy's chunk of {len(chunk.values)}")
    return chunk.values
