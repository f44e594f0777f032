"""A store as windows: every (episode, step) is one, with the masks and spacing of its embodiment."""

from __future__ import annotations

import math
import mmap
import os
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from multiprocessing import reduction
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32, UInt8

from dita.datasets.store import Store, StoreError
from dita.datasets.windows import PadEnd, action_rows, compose_actions, observation_frames, strides
from dita.types import Window

SHOTS = 0x53484F54  # purpose of the random numbers of `shots`


class WindowDataset:
    """Windows of the chosen episodes, in order: episode by episode, step by step."""

    def __init__(
        self,
        store: Store,
        *,
        n_obs_steps: int,
        chunk_size: int,
        pad_end: PadEnd,
        past_action_slots: int = 0,
        cache: Literal["mmap", "ram"] = "mmap",
        episodes: Sequence[int] | None = None,
        keep_damaged: bool = False,
    ) -> None:
        """Choose how windows are cut.

        Args:
            store: frames at 1/control_hz; obs_dt and action_dt of its embodiment must be multiples of that.
            n_obs_steps: observation frames, obs_dt apart, the last one now.
            chunk_size: actions from now on, action_dt apart.
            pad_end: actions past the episode's end are invalid ("mask") or hold still ("hold").
            past_action_slots: actions before now, in front of the chunk.
            cache: "mmap" reads and checks frames each time; "ram" decodes all of them once into memory that
                loader workers share.
            episodes: numbers of the episodes to use; None: all.
            keep_damaged: of cache="ram": a damaged frame is an error of its windows only.

        Raises:
            ValueError: a dt is no multiple, or an episode does not exist.
            StoreError: E_NOSPACE: no memory for cache="ram"; or a frame is missing or damaged.
        """
        self.store = store
        self.episodes = tuple(range(len(store.episodes)) if episodes is None else episodes)
        _check_episodes(store, self.episodes)
        self._sizes = (n_obs_steps, chunk_size, past_action_slots)
        self._pad_end: PadEnd = pad_end
        self._obs_stride, self._action_stride = strides(store.spec)
        self._ends = list(accumulate(store.length(e) for e in self.episodes))
        self._composed: dict[int, np.ndarray] = {}
        self._cache = _FrameCache(store, self.episodes, keep_damaged) if cache == "ram" else None

    def __len__(self) -> int:
        """Return the number of windows: one per frame."""
        return self._ends[-1]

    def __getitem__(self, index: int) -> Window:
        """Cut window `index`.

        Raises:
            IndexError: there is no such window.
            StoreError: a frame is missing or damaged.
        """
        return self._cut(index, self._read)

    def unread(self, index: int) -> Window:
        """Cut window `index` without its pictures: they are black, and neither a frame nor a step of it is valid."""
        cameras = {c.name: (c.height, c.width, 3) for c in self.store.spec.cameras}
        window = self._cut(index, lambda _, camera, frames: np.zeros((len(frames), *cameras[camera]), np.uint8))
        invalid = {name: np.zeros_like(getattr(window, name)) for name in ("frame_valid", "step_valid")}
        return replace(window, **invalid)

    def _cut(self, index: int, read: Callable[[int, str, list[int]], UInt8[np.ndarray, "t h w 3"]]) -> Window:
        if not 0 <= index < self._ends[-1]:
            raise IndexError(f"window {index} of {len(self)}")
        place = bisect_right(self._ends, index)
        episode = self.episodes[place]
        length = self.store.length(episode)
        step = index - self._ends[place] + length
        n_obs_steps, chunk_size, past = self._sizes
        frames, frame_valid = observation_frames(step, n_obs_steps, self._obs_stride)
        rows, step_valid = action_rows(length, step, chunk_size, self._action_stride, self._pad_end, past)
        return Window(
            images={c.name: read(episode, c.name, frames.tolist()) for c in self.store.spec.cameras},
            frame_valid=frame_valid,
            state=self.store.state(episode)[frames],
            instruction=self.store.episodes[episode].instruction,
            embodiment=self.store.spec.name,
            stamp=float(self.store.stamp(episode)[step]),
            actions=self._actions(episode)[rows],
            step_valid=step_valid,
        )

    def locate(self, index: int) -> tuple[int, int]:
        """Return the (episode, frame) that window `index` stands at."""
        place = bisect_right(self._ends, index)
        return self.episodes[place], index - self._ends[place] + self.store.length(self.episodes[place])

    def _read(self, episode: int, camera: str, frames: list[int]) -> UInt8[np.ndarray, "t h w 3"]:
        if self._cache is not None:
            return self._cache.read(episode, camera, frames)
        return self.store.read_frames(episode, camera, frames)

    def _actions(self, episode: int) -> Float32[np.ndarray, "m+1 a"]:
        if episode not in self._composed:
            actions = self.store.action(episode)
            self._composed[episode] = compose_actions(actions, self._action_stride, self.store.spec.action)
        return self._composed[episode]


class _FrameCache:
    """Decoded frames of some episodes in anonymous memory that spawned workers map rather than copy.

    A memory file vanishes with the last process that has it, however that ends, and /dev/shm's size does not matter.
    """

    def __init__(self, store: Store, episodes: Sequence[int], keep_damaged: bool) -> None:
        lengths = [store.length(e) for e in episodes]
        self._damaged: dict[tuple[str, int], str] = {}  # what is wrong with a frame, by camera and place
        self._first = dict(zip(episodes, np.cumsum([0, *lengths[:-1]]).tolist(), strict=True))
        self._shapes = {c.name: (sum(lengths), c.height, c.width, 3) for c in store.spec.cameras}
        _require_memory(sum(map(math.prod, self._shapes.values())))
        self._keep({camera: os.memfd_create(f"dita-{camera}") for camera in self._shapes})
        for camera, shape in self._shapes.items():
            os.ftruncate(self._files[camera], math.prod(shape))
            frames = np.frombuffer(mmap.mmap(self._files[camera], math.prod(shape)), np.uint8).reshape(shape)
            for episode, first in self._first.items():
                here = frames[first : first + store.length(episode)]
                try:
                    here[...] = store.read_frames(episode, camera, range(len(here)))
                except StoreError:
                    if not keep_damaged:
                        raise
                    self._read_one_by_one(store, episode, camera, here)
        self._map()

    def _read_one_by_one(self, store: Store, episode: int, camera: str, out: UInt8[np.ndarray, "m h w 3"]) -> None:
        for frame in range(len(out)):
            try:
                out[frame] = store.read_frames(episode, camera, [frame])[0]
            except StoreError as e:
                self._damaged[camera, self._first[episode] + frame] = str(e)

    def read(self, episode: int, camera: str, frames: list[int]) -> UInt8[np.ndarray, "t h w 3"]:
        """Return frames of an episode by their index in it."""
        places = [self._first[episode] + i for i in frames]
        if self._damaged:
            for place in places:
                if (camera, place) in self._damaged:
                    raise StoreError(self._damaged[camera, place])
        return self._frames[camera][places]

    def __getstate__(self) -> dict[str, Any]:
        files = {camera: reduction.DupFd(file) for camera, file in self._files.items()}
        return {"_first": self._first, "_shapes": self._shapes, "_damaged": self._damaged, "files": files}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._first, self._shapes, self._damaged = state["_first"], state["_shapes"], state["_damaged"]
        self._keep({camera: file.detach() for camera, file in state["files"].items()})
        self._map()

    def _keep(self, files: dict[str, int]) -> None:
        self._files = files
        for file in files.values():
            weakref.finalize(self, os.close, file)

    def _map(self) -> None:
        self._frames = {
            camera: np.frombuffer(mmap.mmap(file, 0, access=mmap.ACCESS_READ), np.uint8).reshape(self._shapes[camera])
            for camera, file in self._files.items()
        }


def shots(store: Store, k: int, seed: int, among: Sequence[int] | None = None) -> tuple[int, ...]:
    """Choose k episodes, the same ones for a seed; fewer shots are a subset of more.

    Args:
        store: to choose from.
        k: how many.
        seed: of the order.
        among: numbers of the episodes to choose from; None: all. The others' order does not depend on it.

    Raises:
        ValueError: there are fewer than k episodes, or k < 1.
    """
    allowed = set(range(len(store.episodes)) if among is None else among)
    if not 1 <= k <= len(allowed):
        raise ValueError(f"{store.path} has {len(allowed)} episodes, asked for {k} shots")
    order = np.random.default_rng([seed, SHOTS]).permutation(len(store.episodes)).tolist()
    return tuple(sorted([e for e in order if e in allowed][:k]))


def iter_low_dim(
    store: Store, episodes: Iterable[int] | None = None
) -> Iterator[tuple[Float32[np.ndarray, "m s"], Float32[np.ndarray, "m a"]]]:
    """Yield (state, action) of the chosen episodes as training sees them: actions composed to action_dt.

    Raises:
        ValueError: an episode does not exist, or a dt is no multiple of the store's.
    """
    chosen = tuple(range(len(store.episodes)) if episodes is None else episodes)
    _check_episodes(store, chosen)
    _, stride = strides(store.spec)
    for episode in chosen:
        yield store.state(episode), compose_actions(store.action(episode), stride, store.spec.action)[:-1]


def _check_episodes(store: Store, episodes: Sequence[int]) -> None:
    wrong = [e for e in episodes if not 0 <= e < len(store.episodes)]
    if wrong or not episodes or len(set(episodes)) != len(episodes):
        raise ValueError(
            f"{store.path} has episodes 0..{len(store.episodes) - 1}; name each wanted one once, got {list(episodes)}"
        )


def _require_memory(needed: int) -> None:
    lines = Path("/proc/meminfo").read_text().splitlines()
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    if needed > available:
        raise StoreError(
            f"E_NOSPACE: data.cache=ram needs {needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are "
            "available; use data.cache=mmap"
        )
