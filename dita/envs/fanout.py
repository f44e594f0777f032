"""Episodes over the machines of a Ray cluster: each worker plays a share of the starts with a policy of its own.

The results are those of one machine: an episode follows from its own seed, and the policy always sees the same padded
batch. What a worker films travels back with the episode, so machines need no folder in common.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dita.config import EnvConfig
from dita.envs.rollout import BatchPolicy, EpisodeResult, Start, Timing, rollout


def connect(address: str, workers: int) -> Any:
    """Return Ray, connected.

    Args:
        address: "local" starts Ray on this machine; "auto", host:port or ray://host:port is a running cluster.
        workers: that will want a CPU each.

    Raises:
        ValueError: Ray is not installed, nothing answers, or the cluster is too small.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError("ray= needs the package ray: pip install 'dita[cluster]'; or leave it null") from None
    local = {"num_cpus": max(workers, os.cpu_count() or 1), "include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, **local)
    except (ConnectionError, ValueError) as e:
        raise ValueError(
            f"no Ray cluster at {address!r}: {e}; start one with `ray start --head`, or use ray=local"
        ) from None
    if (cpus := int(ray.cluster_resources().get("CPU", 0))) < workers:
        ray.shutdown()
        raise ValueError(f"ray_workers={workers} need as many CPUs, the cluster has {cpus}")
    return ray


def fan_out(
    policy: BatchPolicy,
    env: EnvConfig,
    embodiment: str,
    starts: Sequence[Start],
    timing: Timing,
    *,
    ray: Any,
    workers: int,
    threads: int,
    **options: Any,
) -> Iterator[EpisodeResult]:
    """Play every start, as `rollout` does with `options`, on a cluster; yield the results as they end.

    Args:
        ray: what `connect` returned; it is shut down at the end.
        workers: processes with a policy each, spread over the machines; each asks for one CPU, and for a GPU where
            the policy is on one.
        threads: of torch in each; 0: all cores.

    Raises:
        ValueError: a machine has other versions of what counts.
        RuntimeError: a worker or one of its simulators died; what was yielded is whole.
    """
    workers = min(workers, len(starts))
    try:
        gpus = 1 if str(getattr(policy, "device", "cpu")).startswith("cuda") else 0
        remote = ray.remote(num_cpus=1, num_gpus=gpus, scheduling_strategy="SPREAD")(Share)
        shares = [remote.remote(threads) for _ in range(workers)]
        _expect_alike(ray.get([share.about.remote() for share in shares]))
        shared = ray.put(policy)
        by_key = {(s.task, s.index): s for s in starts}
        plays = [share.play.options(num_returns="streaming") for share in shares]
        streams = [p.remote(shared, env, embodiment, starts[i::workers], timing, options) for i, p in enumerate(plays)]
        while streams:
            (stream,), _ = ray.wait(streams, num_returns=1)
            try:
                episode, files = ray.get(next(stream))
            except StopIteration:
                streams.remove(stream)
                continue
            _write(by_key[episode.task, episode.index], files)
            yield episode
    except ray.exceptions.RayTaskError as e:
        raise e.cause from None
    except ray.exceptions.RayError as e:
        raise RuntimeError(f"the cluster lost a worker: {str(e).strip().splitlines()[0]}; --resume continues") from None
    finally:
        ray.shutdown()


class Share:
    """Lives in a process of the cluster: one policy, and simulators of its own."""

    def __init__(self, threads: int) -> None:
        import torch

        torch.set_num_threads(threads or os.cpu_count() or 1)

    def about(self) -> dict[str, Any]:
        """Say what runs here."""
        from dita.evaluate import fingerprint  # it imports this module

        return fingerprint()

    def play(
        self,
        policy: BatchPolicy,
        env: EnvConfig,
        embodiment: str,
        starts: Sequence[Start],
        timing: Timing,
        options: Mapping[str, Any],
    ) -> Iterator[tuple[EpisodeResult, dict[str, bytes]]]:
        """Play the starts; yield each episode with what was filmed of it, by file name."""
        with TemporaryDirectory() as folder:
            at = {task: str(Path(folder) / str(i)) for i, task in enumerate(env.tasks)}
            here = [
                replace(s, record=s.record and at[s.task], picture=s.picture and at[s.task]) for s in starts
            ]  # fmt: skip
            for episode in rollout(policy, env, embodiment, here, timing, **options):
                films = sorted(Path(at[episode.task]).glob(f"episode_{episode.index}_*"))
                yield episode, {film.name: film.read_bytes() for film in films}


def _write(start: Start, files: Mapping[str, bytes]) -> None:
    folder = Path(start.record or start.picture or "")
    for name, content in files.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _expect_alike(machines: Sequence[Mapping[str, Any]]) -> None:
    """Refuse workers whose software is not this machine's: their results would not be, either."""
    from dita.evaluate import fingerprint

    here = fingerprint()
    for there in machines:
        mine, theirs = (m["versions"] | {"git": m["git"]} for m in (here, there))
        if differ := [f"{k} {theirs[k]} (here {mine[k]})" for k in mine if mine[k] != theirs[k]]:
            raise ValueError(f"a machine of the cluster has {', '.join(differ)}: install there what is here")
