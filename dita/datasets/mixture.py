"""Which windows make the batch of a step: a pure function of (seed, step, position), with no state to save.

A run resumes exactly from its step number, any number of ranks and workers makes the same global batches, and each
window of a dataset comes once per epoch of that dataset, in an order of its own per epoch.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import active_children
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt64
from torch.utils.data import DataLoader, Dataset

from dita.batch import Batch
from dita.datasets.dataset import WindowDataset
from dita.datasets.store import StoreError
from dita.types import EmbodimentSpec, Window

PERIOD = 2**16  # draws after which the order of datasets repeats; weights are met to 1 / PERIOD
ROUNDS = 6
ORDER = 0x4F524445  # purpose of the random numbers of the order of datasets
WORKER_TIMEOUT = 300.0  # [s] for a batch
LOOK = 2.0  # [s] between looks at workers while one is waited for


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
    timeout: float = WORKER_TIMEOUT,
    leave_out: bool = False,
) -> Watched:
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
        timeout: of a batch [s].
        leave_out: let a window with damaged frames come as `WindowDataset.unread` has it, its row in
            `Watched.left_out`; else it is an error.

    Raises:
        ValueError: `batch_size` does not divide by `world_size`.
        StoreError: a frame is missing or damaged, once its batch is asked for.
    """
    batches = _Batches(datasets, sampler, batch_size, preprocess, rank, world_size, leave_out)
    many: dict[str, Any] = {"multiprocessing_context": "spawn", "persistent_workers": True, "timeout": LOOK}
    batches = DataLoader(
        batches,
        batch_size=None,
        sampler=range(start_step, steps),
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        **(many if workers else {}),
    )
    return Watched(batches, start_step, timeout)


class Watched:
    """The batches of a DataLoader, with an error in one line for a worker that is killed, hung or fails."""

    def __init__(self, batches: DataLoader, first_step: int, timeout: float) -> None:
        self._batches, self._first, self._timeout = batches, first_step, timeout
        self.left_out: tuple[int, ...] = ()  # rows of the last batch whose windows could not be read
        self._workers: list[BaseProcess] = []
        self._waiting = self._hung = ""  # for what, and which worker was found to be stopped

    def __iter__(self) -> Iterator[Batch]:
        """Raises RuntimeError naming the worker's process and the step it should have brought; or its own error."""
        others, over = set(active_children()), threading.Event()
        batches = iter(self._batches)
        self._workers += [p for p in active_children() if p not in others]
        if self._workers:
            threading.Thread(target=self._look, args=(over,), name="loader", daemon=True).start()
        try:
            for step in itertools.count(self._first):
                self._waiting = f"batch of step {step}"
                found = self._next(batches)
                self._waiting = ""
                if found is None:
                    return
                batch, self.left_out = found[0], tuple(found[1])  # torch makes lists of tuples
                yield batch
        finally:
            over.set()

    def _next(self, batches: Iterator[tuple[Batch, tuple[int, ...]]]) -> tuple[Batch, tuple[int, ...]] | None:
        began = time.monotonic()
        while True:
            try:
                return next(batches)
            except StopIteration:
                return None
            except Exception as e:
                late = time.monotonic() - began
                if self._hung:
                    raise RuntimeError(
                        f"{self._waiting} did not come for {late:.0f} s: {self._hung}; a stopped worker was suspended "
                        "from outside (kill -CONT) or is being debugged"
                    ) from None
                if isinstance(e, (EOFError, ConnectionError)):  # a worker left while it handed the batch over
                    raise RuntimeError(f"{self._waiting}: {type(e).__name__}; {_states(self._workers)}") from None
                if not isinstance(e, RuntimeError):
                    raise type(e)(_last_line(e)) from None
                if "timed out" not in str(e) or late > self._timeout:
                    raise RuntimeError(f"{self._waiting}: {_last_line(e)}; {_states(self._workers)}") from None
                # torch's timeout: nothing is lost, the same batch may be asked for again

    def _look(self, over: threading.Event) -> None:
        """End workers of which one is stopped at two looks in a row while a batch is waited for.

        In a thread of its own: torch's timeout does not come if a worker stops while it hands a batch over.
        """
        stopped: set[int | None] = set()
        while not over.wait(LOOK):
            seen = {p.pid for p in self._workers if _state(p) in ("T", "t")} if self._waiting else set()
            if seen & stopped:
                self._hung = _states(self._workers)
                for worker in self._workers:
                    worker.kill()  # a stopped one would not hear a kinder word; torch then raises where it waits
                return
            stopped = seen


def _last_line(error: Exception) -> str:
    """Return what a worker's error says, without the traceback that torch puts into its text."""
    lines = str(error).strip().splitlines()
    wrapped = lines and lines[0].startswith("Caught ")
    return lines[-1].removeprefix(f"{type(error).__name__}: ") if wrapped else str(error)


def _states(workers: Sequence[BaseProcess]) -> str:
    words = {"T": "stopped", "t": "stopped", "Z": "dead", "": "dead", "D": "waiting for the disk"}
    found = [f"{p.pid} {words.get(_state(p), 'alive')}" for p in workers]
    return f"loader workers (process ids): {', '.join(found)}"


def _state(process: BaseProcess) -> str:
    try:
        return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


class _Batches(Dataset):
    """The batch of each step, and the rows of it that could not be read."""

    def __init__(
        self,
        datasets: Sequence[WindowDataset],
        sampler: MixtureSampler,
        batch_size: int,
        preprocess: Callable[[list[Window]], Batch],
        rank: int,
        world_size: int,
        leave_out: bool,
    ) -> None:
        self._datasets = tuple(datasets)
        self._sampler = sampler
        self._preprocess = preprocess
        self._leave_out = leave_out
        self._share = (batch_size, rank, world_size)
        sampler.sample(0, *self._share)  # refuses a bad share now, not in a worker

    def __getitem__(self, step: int) -> tuple[Batch, tuple[int, ...]]:
        windows, left_out = [], []
        for row, (d, w) in enumerate(self._sampler.sample(step, *self._share)):
            try:
                windows.append(self._datasets[d][w])
            except StoreError as e:
                if not (self._leave_out and e.is_damage):
                    raise
                windows.append(self._datasets[d].unread(w))
                left_out.append(row)
        return self._preprocess(windows), tuple(left_out)


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
