"""One job of the comparison: collect, train, play."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers_low_dim import export_robomimic, low_dim_store
from benchmarks.peers_methods import BUDGETS, METHODS, Budget, Job, Method
from benchmarks.peers_networks import load_peer, replace_network
from benchmarks.peers_robomimic import RobomimicPolicy, train_robomimic
from benchmarks.peers_suite import low_dim_env
from dita.checkpoint import write_json
from dita.cli import compose
from dita.config import CollectConfig, EvalConfig, TrainConfig
from dita.datasets.store import Store
from dita.embodiment import canonical_json, load_embodiment
from dita.envs.collect import collect
from dita.envs.rollout import EpisodeResult, Start, Timing, rollout
from dita.evaluate import evaluate, fingerprint, read_episodes
from dita.train import build_policy, train

ENVS = 4  # simulator processes; results do not depend on it


def run(job: Job, out: Path) -> dict[str, Any]:
    """Collect, train and play whatever is missing of a job, and return its record."""
    method, budget = METHODS[job.method], BUDGETS[job.budget]
    folder = out / job.budget / job.task
    here, trained = (folder / f"{name}_seed{job.seed}" for name in (job.method, method.plays or job.method))
    config = _eval_config(job, method, budget, here / "eval")
    folder.mkdir(parents=True, exist_ok=True)
    demonstrations = _collect_config(job.task, folder, budget)
    store = Path(demonstrations.out)
    if not (store / "zarr.json").exists() or len(Store(store).episodes) < budget.demonstrations:
        collect(demonstrations, exist="resume")
    if method.low_dim:
        env = low_dim_env(config.env, folder)
        low_dim = folder / "low_dim.zarr"
        low_dim_store(store, low_dim, env, demonstrations.action_noise)
        config, store = replace(config, env=env), low_dim
    if method.network == "robomimic":
        episodes, parameters = _robomimic(job, config, store, here, budget)
    else:
        with _timed(trained, "train"):
            train_peer(train_config(job, store, trained / "train"), method.network)
        policy = load_peer(trained / "train", method.network)
        parameters = sum(p.numel() for p in policy.parameters())
        with _timed(here, "eval"):
            episodes = evaluate(policy, config, exist="resume").episodes
    return _record(job, episodes, parameters, _times(trained), _times(here))


def _robomimic(
    job: Job, config: EvalConfig, store: Path, here: Path, budget: Budget
) -> tuple[Sequence[EpisodeResult], int]:
    spec = load_embodiment(config.env.embodiment)
    hdf5 = store.with_suffix(".hdf5")
    if not hdf5.exists():
        export_robomimic(Store(store), hdf5.with_suffix(".partial"))
        hdf5.with_suffix(".partial").rename(hdf5)
    if not (here / "robomimic.json").exists():
        with _timed(here, "train"):
            train_robomimic(job.method, hdf5, spec, here, job.seed, budget.epochs, budget.updates)
    policy = RobomimicPolicy(here, spec)
    with _timed(here, "eval"):
        episodes = play(policy, config)
    return episodes, policy.parameters


def play(policy: RobomimicPolicy, config: EvalConfig) -> list[EpisodeResult]:
    """Play the starts that `dita eval` plays, with a policy that sees ten consecutive frames; continues.

    Writes `episodes.jsonl` into `config.out`, which `dita compare` reads.
    """
    out, (task,) = Path(config.out), config.env.tasks
    out.mkdir(parents=True, exist_ok=True)
    lines = out / "episodes.jsonl"
    done = {e.index: e for e in read_episodes(out)} if lines.exists() else {}
    lines.write_text("".join(canonical_json(asdict(e)) + "\n" for e in done.values()))  # a kill may have cut a line
    starts = [Start(task, i, config.seed + i, None) for i in range(config.episodes) if i not in done]
    timing = Timing(policy.n_obs_steps, 1, policy.n_action_steps)
    episodes = rollout(
        policy, config.env, policy.spec.name, starts, timing, n_envs=config.n_envs, batch_size=config.batch_size
    )
    with lines.open("a") as file:
        for episode in episodes:
            file.write(canonical_json(asdict(episode)) + "\n")
            file.flush()
            done[episode.index] = episode
    return [done[i] for i in range(config.episodes)]


def _suite(task: str) -> str:
    return "metaworld" if task.endswith("-v3") else "choice"


def _eval_config(job: Job, method: Method, budget: Budget, out: Path) -> EvalConfig:
    steps = "null" if method.n_action_steps is None else method.n_action_steps
    overrides = [f"env={_suite(job.task)}", f"env.tasks=[{job.task}]", f"episodes={budget.episodes}", "videos=0"]
    overrides += [f"out={out}", f"n_envs={ENVS}", f"batch_size={ENVS // 2}", "threads=1", f"n_action_steps={steps}"]
    return compose("eval", overrides, EvalConfig)


def _collect_config(task: str, folder: Path, budget: Budget) -> CollectConfig:
    overrides = [f"env={_suite(task)}", f"env.tasks=[{task}]", f"out={folder / 'demonstrations.zarr'}"]
    return compose("collect", [*overrides, f"episodes={budget.demonstrations}"], CollectConfig)


def train_config(job: Job, store: Path, out: Path) -> TrainConfig:
    """Return the demo's recipe with what the budget and the method change."""
    method, budget = METHODS[job.method], BUDGETS[job.budget]
    size = 64 if _suite(job.task) == "choice" else 96  # [px] of its camera
    overrides = ["experiment=demo", f"data.stores=[{{path:{store},weight:1}}]", f"run={out}", f"seed={job.seed}"]
    overrides += [f"steps={budget.steps}", f"batch_size={budget.batch_size}", "threads=1", "save_every=100"]
    overrides += [f"policy.vision.image_size={size}", *budget.overrides, *method.overrides]
    return compose("train", overrides, TrainConfig)


def train_peer(config: TrainConfig, network: str) -> None:
    """Train a policy with one of `peers_networks.NETWORKS` by the project's own loop; continues."""
    run = Path(config.run)
    if (run / "checkpoints" / f"{config.steps:07d}" / "train" / "manifest.json").exists():
        return
    if network == "dita":
        train(config, "resume")
    else:
        train(config, "resume", build=lambda *given: replace_network(build_policy(*given), network))


@contextmanager
def _timed(folder: Path, what: str) -> Iterator[None]:
    """Add wall and CPU seconds (of this process) to FOLDER/times.json, also where it is interrupted."""
    wall, cpu = time.monotonic(), time.process_time()
    try:
        yield
    finally:
        times = _times(folder)
        for name, seconds in (("wall", time.monotonic() - wall), ("cpu", time.process_time() - cpu)):
            times[f"{what}_{name}_s"] = round(times.get(f"{what}_{name}_s", 0.0) + seconds, 1)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "times.json", times)


def _times(folder: Path) -> dict[str, float]:
    path = folder / "times.json"
    return json.loads(path.read_text()) if path.exists() else {}


def _record(
    job: Job, episodes: Sequence[EpisodeResult], parameters: int, train_times: Mapping[str, float],
    eval_times: Mapping[str, float],
) -> dict[str, Any]:  # fmt: skip
    latency = [s for e in episodes for s in e.latency]
    machine = fingerprint()
    return {
        "method": job.method,
        "settings": json.loads(json.dumps(asdict(BUDGETS[job.budget]))),
        "outcomes": "".join(str(int(e.success)) for e in episodes),  # of start 0, 1, ...
        "starts": hashlib.sha256("".join(e.start_hash for e in episodes).encode()).hexdigest(),
        "reasons": {r: sum(e.reason == r for e in episodes) for r in sorted({e.reason for e in episodes})},
        "mean_steps": round(float(np.mean([e.steps for e in episodes])), 1),
        "inferences": sum(e.replans for e in episodes),
        "inference_p50_s": round(float(np.median(latency)), 5),  # of one call, for its whole batch
        "parameters": parameters,
        **{k: v for k, v in train_times.items() if k.startswith("train")},
        **{k: v for k, v in eval_times.items() if k.startswith("eval")},
        "machine": {key: machine[key] for key in ("python", "platform", "cpus", "git", "git_dirty")},
    }  # fmt: skip
