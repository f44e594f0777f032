"""Which windows make the batch of a step: a pure function of (seed, step, position), with no state to save.

A run resumes exactly from its step number, any number of ranks and workers makes the same global batches, and each
window of a dataset comes once per epoch of that dataset, in an order of its own per epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt64
from torch.utils.data import DataLoader, Dataset

from dita.batch import Batch
from dita.datasets.dataset import WindowDataset
from dita.types import EmbodimentSpec, Window

PERIOD = 2**16  # draws after which the order of datasets repeats; weights are met to 1 / PERIOD
ROUNDS = 6
ORDER = 0x4F524445  # purpose of the random numbers of the order of datasets
WORKER_TIMEOUT = 300  # [s]; a worker killed for memory would otherwise hang the run


class MixtureSampler:
    """Draw (dataset, window) pairs by weight."""

    def __init__(self, lengths: Sequence[int], weights: Sequence[float], seed: int) -> None:
        """Mix datasets of `lengths` windows, with `weights` relative to each other.

        Raises:
            ValueError: no dataset, an empty one, or a weight that is not positive or below 1 / 65536 of the sum.
        """
        share = np.asarray(weights, np.float64)
        if not len(lengths) or len(lengths) != len(weights) or min(lengths) < 1:
            raise ValueError(f"a mixture needs datasets with windows and one weight each, got {lengths} and {weights}")
        if not (np.isfinite(share).all() and (share > 0).all()):
            raise ValueError(f"weights must be positive, got {list(weights)}; leave a store out instead")
        slots = _apportion(share / share.sum(), PERIOD)
        if slots.min() < 1:
            raise ValueError(f"weights {list(weights)}: the smallest is below 1/{PERIOD} of the sum")
        self._lengths = tuple(int(n) for n in lengths)
        self._seed = seed
        self._order = np.random.default_rng([seed, ORDER]).permutation(np.repeat(np.arange(len(slots)), slots))
        # draws of the period's own dataset before it in the period, and the dataset's draws per period
        self._rank = np.empty(PERIOD, np.int64)
        for d, count in enumerate(slots):
            self._rank[self._order == d] = np.arange(count)
        self._slots = slots

    def sample(self, step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[tuple[int, int]]:
        """Return (dataset, window) of the global batch of `step`, or of one rank's slice of it.

        Raises:
            ValueError: `batch_size`, the global one, does not divide by `world_size`.
        """
        if batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} is global and must divide by {world_size} ranks")
        share = batch_size // world_size
        draws = step * batch_size + rank * share + np.arange(share)
        datasets = self._order[draws % PERIOD]
        earlier = draws // PERIOD * self._slots[datasets] + self._rank[draws % PERIOD]  # draws of the same dataset
        windows = np.empty(share, np.int64)
        for d in np.unique(datasets):
            mine, length = datasets == d, self._lengths[d]
            keys = _keys(self._seed, int(d), earlier[mine] // length)
            windows[mine] = permute(earlier[mine] % length, length, keys)
        return list(zip(datasets.tolist(), windows.tolist(), strict=True))


def check_rates(specs: Sequence[EmbodimentSpec], told: bool) -> None:
    """Refuse a mixture of time steps that the network cannot tell apart.

    Args:
        specs: the embodiments of the mixture.
        told: the network sees which embodiment it is (policy.embodiment_token), and so which time steps.

    Raises:
        ValueError: obs_dt or action_dt differ and `told` is False; all of them are listed.
    """
    for key in ("obs_dt", "action_dt"):
        found = {s.name: getattr(s, key) for s in specs}
        if not told and max(found.values()) - min(found.values()) > 1e-3 * min(found.values()):
            listed = ", ".join(f"{name} {dt:g} s" for name, dt in found.items())
            raise ValueError(
                f"{key} differs in this mixture ({listed}): give the embodiments one {key} (whole multiples of a "
                "store's steps compose), or set policy.embodiment_token=true"
            )


def permute(index: Int64[np.ndarray, "k"], length: int, keys: UInt64[np.ndarray, "k"]) -> Int64[np.ndarray, "k"]:
    """Map each index in 0..length-1 through the permutation of its key, with nothing stored.

    A Feistel network over the next power of four, walked until the value falls inside (Black and Rogaway 2002,
    "Ciphers with arbitrary finite domains").
    """
    half = np.uint64(max(1, ((length - 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    value = index.astype(np.uint64)
    walking = np.ones(len(value), bool)
    while walking.any():
        left, right, key = value[walking] >> half, value[walking] & mask, keys[walking]
        for i in range(ROUNDS):
            left, right = right, left ^ (_mix(right ^ _mix(key + np.uint64(i))) & mask)
        value[walking] = left << half | right
        walking &= value >= length
    return value.astype(np.int64)


def loader(
    datasets: Sequence[WindowDataset],
    sampler: MixtureSampler,
    *,
    batch_size: int,
    preprocess: Callable[[list[Window]], Batch],
    start_step: int,
    steps: int,
    workers: int,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """Load the batches of steps start_step..steps-1, in order; the same ones for any number of workers.

    Args:
        datasets: in the sampler's order.
        sampler: says which windows make a step.
        batch_size: over all ranks together.
        preprocess: windows -> batch, in the worker; it must pickle.
        start_step: the first step, when resuming.
        steps: the step to stop before.
        workers: spawned processes; 0 loads in this one.
        rank: of this process.
        world_size: number of ranks.

    Raises:
        ValueError: `batch_size` does not divide by `world_size`.
        StoreError: a frame is missing or damaged, once its batch is asked for.
    """
    batches = _Batches(datasets, sampler, batch_size, preprocess, rank, world_size)
    many: dict[str, Any] = {"multiprocessing_context": "spawn", "persistent_workers": True, "timeout": WORKER_TIMEOUT}
    return DataLoader(
        batches,
        batch_size=None,
        sampler=range(start_step, steps),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        **(many if workers else {}),
    )


class _Batches(Dataset):
    """The batch of each step."""

    def __init__(
        self,
        datasets: Sequence[WindowDataset],
        sampler: MixtureSampler,
        batch_size: int,
        preprocess: Callable[[list[Window]], Batch],
        rank: int,
        world_size: int,
    ) -> None:
        self._datasets = tuple(datasets)
        self._sampler = sampler
        self._preprocess = preprocess
        self._share = (batch_size, rank, world_size)
        sampler.sample(0, *self._share)  # refuses a bad share now, not in a worker

    def __getitem__(self, step: int) -> Batch:
        chosen = self._sampler.sample(step, *self._share)
        return self._preprocess([self._datasets[d][w] for d, w in chosen])


def _apportion(shares: np.ndarray, total: int) -> Int64[np.ndarray, "d"]:
    """Round shares of `total` to whole numbers that add up to it, by largest remainders."""
    exact = shares * total
    counts = np.floor(exact).astype(np.int64)
    missing = total - int(counts.sum())
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return counts


def _keys(seed: int, dataset: int, epochs: Int64[np.ndarray, "k"]) -> UInt64[np.ndarray, "k"]:
    base = np.array([seed % 2**64], np.uint64)
    return _mix(_mix(_mix(base) + np.uint64(dataset)) + epochs.astype(np.uint64))


def _mix(x: UInt64[np.ndarray, "k"]) -> UInt64[np.ndarray, "k"]:
    """Scramble 64 bits, one to one (splitmix64, Steele et al. 2014); unsigned overflow is meant."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
