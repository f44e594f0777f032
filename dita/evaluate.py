"""A policy over a fixed list of starts: success with intervals, latency, videos, and what reproduces them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from dita.checkpoint import find_policy
from dita.config import EvalConfig, PerturbConfig, to_dict
from dita.datasets.shards import difference
from dita.embodiment import canonical_json, load_embodiment
from dita.envs import check_tasks
from dita.envs.ensemble import Ensemble
from dita.envs.fanout import connect, fan_out
from dita.envs.perturb import check_instructions
from dita.envs.rollout import EpisodeResult, Rules, Start, Timing, rollout
from dita.lock import LOCK, held
from dita.policy.policy import DitaPolicy
from dita.statistics import Rate, bootstrap_macro, macro, rate
from dita.types import ActionChunk, EmbodimentSpec, RawObservation

RULE = "success at any step, which ends the episode; warnings of the simulator and actions that are not finite fail it"
PACKAGES = (
    *("dita", "torch", "numpy", "mujoco", "gymnasium", "diffusers", "transformers"),
    *("metaworld", "robosuite", "gym-aloha", "gymnasium-robotics"),
)
# what may change between an interrupted evaluation and its continuation
FREE = ("out", "n_envs", "threads", "device", "videos", "episodes", "ray", "ray_workers")


class Baseline(Protocol):
    """A stand-in for a policy, to know what the numbers are worth."""

    name: str
    n_action_steps: int

    def predict_batch(self, histories: Any, seeds: Any, **options: Any) -> Sequence[ActionChunk | None]: ...


class Expert:
    """The suite's scripted expert: the ceiling."""

    name, n_action_steps = "expert", 8

    def predict_batch(
        self, histories: Sequence[Sequence[RawObservation]], seeds: Sequence[int], **options: Any
    ) -> list[None]:
        """Leave the acting to the expert next to the simulator; only that one sees the state."""
        return [None] * len(histories)


class Zero:
    """No motion and no grip: the floor."""

    name, n_action_steps = "zero", 8

    def __init__(self, embodiment: EmbodimentSpec) -> None:
        self._spec = embodiment

    def predict_batch(
        self, histories: Sequence[Sequence[RawObservation]], seeds: Sequence[int], **options: Any
    ) -> list[ActionChunk]:
        """Return chunks of zeros."""
        zeros = np.zeros((self.n_action_steps, self._spec.action_dim), np.float32)
        return [ActionChunk(zeros, h[-1].stamp, self._spec.action_dt, self._spec.name) for h in histories]


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found; `eval_info.json` holds the same."""

    tasks: Mapping[str, Rate]  # Wilson
    pooled: Rate  # Wilson over all episodes
    macro: Rate  # mean of the tasks' rates; Wilson's limits joined by MOVER
    latency: tuple[float, float]  # p50, p99 [s] of one policy call, for its whole batch
    episodes: tuple[EpisodeResult, ...]  # in the order of the fixed list


def evaluate(
    policy: DitaPolicy | Baseline,
    config: EvalConfig,
    *,
    exist: Literal["error", "resume", "overwrite"],
    checkpoint: Path | None = None,
) -> EvalResult:
    """Play `config.episodes` fixed starts of each task and write the outcome below `config.out`.

    Start i of a task has seed config.seed + i. Every episode of the list counts. Files: `eval_config.json`,
    `episodes.jsonl` (one line per episode as it ends), `eval_info.json`, `videos/<task>/episode_<i>_<outcome>.mp4`,
    and the last picture of every failure without a video, as `.jpg` beside them. With `config.ray`, a cluster plays.

    Args:
        policy: what plays.
        config: how, and on which starts.
        exist: what to do where `config.out` exists.
        checkpoint: where the policy came from; its folder and training step go into `eval_info.json`.

    Raises:
        FileExistsError: `config.out` exists and `exist` is "error", or another process evaluates into it.
        ValueError: unknown task, an embodiment that differs from the checkpoint's, a perturbation that the suite does
            not have, no cluster, or a continuation whose policy or settings differ (named).
        RuntimeError: a simulator process died; what was finished stays for "resume".
    """
    check_tasks(config.env)
    check_instructions(config.env, config.perturb)
    spec = load_embodiment(config.env.embodiment)
    timing = _timing(policy, config, spec)
    rules = Rules(config.guard, config.temporal_ensembling, config.perturb)
    if isinstance(policy, DitaPolicy):
        policy.contract.check_embodiment(spec)
    torch.set_num_threads(config.threads or os.cpu_count() or 1)
    ray = None if config.ray is None else connect(config.ray, config.ray_workers)
    out = Path(config.out)
    asked = {"config": to_dict(config), "policy": identity(policy)}
    _check_folder(out, exist)
    with held(out, "evaluating into", "out="):
        done = _open(out, asked, exist)
        todo = [s for s in _starts(config, out) if (s.task, s.index) not in done]
        with _progress() as progress, (out / "episodes.jsonl").open("a") as lines:
            bar = progress.add_task("eval", total=len(done) + len(todo), completed=len(done), rate=_running(done))
            sizes = {"n_envs": config.n_envs, "batch_size": config.batch_size}
            options: Any = {**sizes, "num_inference_steps": config.num_inference_steps, "rules": rules}
            if ray is None:
                episodes = rollout(policy, config.env, spec.name, todo, timing, **options)
            else:
                options |= {"ray": ray, "workers": config.ray_workers, "threads": config.threads}
                episodes = fan_out(policy, config.env, spec.name, todo, timing, **options)
            for episode in episodes:
                lines.write(canonical_json(asdict(episode)) + "\n")
                lines.flush()
                done[episode.task, episode.index] = episode
                progress.update(bar, advance=1, rate=_running(done))
        result = summarise([done[s.task, s.index] for s in _starts(config, out)])
        _write(out / "eval_info.json", _info(result, asked) | {"checkpoint": _origin(checkpoint)})
    _print(result, out)
    return result


def summarise(episodes: Sequence[EpisodeResult]) -> EvalResult:
    """Turn episodes into rates with 95 % intervals: Wilson (1927), and MOVER (Zou & Donner 2008) for the macro mean."""
    by_task: dict[str, list[bool]] = {}
    for e in episodes:
        by_task.setdefault(e.task, []).append(e.success)
    tasks = {task: rate(wins) for task, wins in by_task.items()}
    latency = [s for e in episodes for s in e.latency]
    p50, p99 = (float(p) for p in np.percentile(latency, (50, 99)))
    return EvalResult(
        tasks, rate([e.success for e in episodes]), macro(list(tasks.values())), (p50, p99), tuple(episodes)
    )


def identity(policy: DitaPolicy | Baseline) -> dict[str, str]:
    """Say which policy this is: contract hash and a SHA-256 over its weights."""
    if not isinstance(policy, DitaPolicy):
        return {"name": policy.name}
    digest = hashlib.sha256()
    for name, tensor in sorted(policy.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    d = policy.diffusion.config
    sampler = d.objective if d.objective == "behaviour_cloning" else f"{d.solver}, {d.timestep_spacing} spacing"
    return {
        "name": policy.config.name,
        "contract": policy.contract.root_hash,
        "weights": digest.hexdigest(),
        "sampler": f"{sampler}, {d.num_inference_steps} steps",
    }


def _origin(checkpoint: Path | None) -> dict[str, Any] | None:
    """Return a checkpoint's folder and its training step, which the name of its folder says."""
    if checkpoint is None:
        return None
    name = find_policy(checkpoint).parent.name
    return {"folder": str(checkpoint), "step": int(name) if name.isdigit() else None}


def fingerprint() -> dict[str, Any]:
    """Describe the software and the machine behind a number."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "opengl": os.environ.get("MUJOCO_GL"),
        "torch_threads": torch.get_num_threads(),
        "versions": versions,
        "git": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _timing(policy: DitaPolicy | Baseline, config: EvalConfig, spec: EmbodimentSpec) -> Timing:
    learned = isinstance(policy, DitaPolicy)
    steps = config.n_action_steps or (policy.config if learned else policy).n_action_steps
    if learned and steps > policy.config.chunk_size:
        raise ValueError(f"n_action_steps {steps} exceeds the checkpoint's chunk_size {policy.config.chunk_size}")
    if learned and config.temporal_ensembling is not None and steps == policy.config.chunk_size:
        raise ValueError(
            f"temporal_ensembling averages overlapping chunks; with n_action_steps {steps}, the whole chunk, none "
            "overlap: set n_action_steps=1"
        )
    if config.temporal_ensembling is not None:
        Ensemble(spec, config.temporal_ensembling)  # refuses fields that it cannot average
    return Timing.of(spec, policy.config.n_obs_steps if learned else 1, steps)


def _starts(config: EvalConfig, out: Path) -> list[Start]:
    films = {task: str(out / "videos" / task) for task in config.env.tasks}
    return [
        Start(task, i, config.seed + i, films[task] if i < config.videos else None, films[task])
        for task in config.env.tasks
        for i in range(config.episodes)
    ]


def read_episodes(out: Path) -> list[EpisodeResult]:
    """Read the episodes of an evaluation, in the order in which they ended.

    Raises:
        ValueError: `out` holds no evaluation.
    """
    lines = out / "episodes.jsonl"
    if not lines.is_file():
        raise ValueError(f"{out} holds no evaluation: it has no episodes.jsonl; give the out= of dita eval")
    # a kill may have cut the last line
    whole = [line for line in lines.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [_episode(json.loads(line)) for line in whole]


def _check_folder(out: Path, exist: str) -> None:
    """Make the folder, unless it may not be written into."""
    if out.exists() and exist == "error":
        raise FileExistsError(f"{out} exists; --resume continues it, --overwrite deletes it first")
    out.mkdir(parents=True, exist_ok=True)
    if {p.name for p in out.iterdir()} - {LOCK} and not (out / "eval_config.json").exists():
        raise ValueError(f"{out} exists and is no evaluation: it has no eval_config.json; choose another out=")


def _open(out: Path, asked: Mapping[str, Any], exist: str) -> dict[tuple[str, int], EpisodeResult]:
    """Return the episodes that an interrupted evaluation of the same policy and settings has finished."""
    path, lines = out / "eval_config.json", out / "episodes.jsonl"
    if exist == "overwrite":
        for old in out.iterdir():
            if old.name != LOCK:
                shutil.rmtree(old) if old.is_dir() else old.unlink()
    if not path.exists():
        _write(path, asked)
        return {}
    _same(json.loads(path.read_text()), asked, out)
    whole = (
        [line for line in lines.read_text().splitlines(keepends=True) if line.endswith("\n")] if lines.exists() else []
    )
    lines.write_text("".join(whole))  # a kill may have cut the last line
    done = (_episode(json.loads(line)) for line in whole)
    return {(e.task, e.index): e for e in done}


def _same(before: Mapping[str, Any], asked: Mapping[str, Any], out: Path) -> None:
    def compared(values: Mapping[str, Any]) -> dict[str, Any]:
        config = {key: value for key, value in values["config"].items() if key not in FREE}
        return json.loads(canonical_json({**config, "policy": values["policy"]}))

    if text := difference(compared(asked), compared(before)):
        raise ValueError(f"{out} holds another evaluation ({text}); choose another out= or --overwrite")


def _episode(values: Mapping[str, Any]) -> EpisodeResult:
    return EpisodeResult(**{**values, "latency": tuple(values["latency"])})


def _info(result: EvalResult, asked: Mapping[str, Any]) -> dict[str, Any]:
    episodes = result.episodes
    return {
        "rule": RULE,
        "tasks": {
            task: {**asdict(r), "mean_steps": float(np.mean([e.steps for e in episodes if e.task == task]))}
            for task, r in result.tasks.items()
        },
        "pooled": asdict(result.pooled),
        "macro": {
            **asdict(result.macro),
            "bootstrap": bootstrap_macro([[e.success for e in episodes if e.task == task] for task in result.tasks], 0),
        },
        "latency_s": {"p50": result.latency[0], "p99": result.latency[1]},
        "distinct_starts": len({e.start_hash for e in episodes}),
        "reasons": {r: sum(e.reason == r for e in episodes) for r in sorted({e.reason for e in episodes})},
        "fingerprint": {**fingerprint(), "perturb": _said(asked["config"]["perturb"])},
        **asked,
    }


def _said(perturb: Mapping[str, Any]) -> str:
    changes = PerturbConfig(**perturb).changes
    flags = ", ".join(f"{key}={value}" for key, value in changes.items())
    return f"{flags}, seed {perturb['seed']}" if changes else "nothing"


def _write(path: Path, values: Any) -> None:
    text = json.dumps(values, indent=1, allow_nan=False)
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.replace(path)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _running(done: Mapping[Any, EpisodeResult]) -> str:
    if not done:
        return ""
    so_far = rate([e.success for e in done.values()])
    return f"{so_far.successes} succeeded, 95 % {so_far.interval[0]:.0%} .. {so_far.interval[1]:.0%}"


def _progress() -> Progress:
    text, so_far = TextColumn("[progress.description]{task.description}"), TextColumn("{task.fields[rate]}")
    return Progress(text, BarColumn(), MofNCompleteColumn(), so_far, TimeElapsedColumn(), TimeRemainingColumn())


def _print(result: EvalResult, out: Path) -> None:
    table = Table(title=f"success, rule: any step; policy call p50 {result.latency[0] * 1e3:.0f} ms")
    for column in ("task", "success", "rate", "95 % interval"):
        table.add_column(column)
    rows = {**result.tasks, **({"mean over tasks": result.macro} if len(result.tasks) > 1 else {})}
    for name, r in rows.items():
        low, high = r.interval
        table.add_row(name, f"{r.successes}/{r.episodes}", f"{r.success_rate:.0%}", f"{low:.0%} .. {high:.0%}")
    console = Console()
    console.print(table)
    console.print(f"{out / 'eval_info.json'}", highlight=False)
