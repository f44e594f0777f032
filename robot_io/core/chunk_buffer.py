"""Chunks by time: the newest one is executed, what its stamp says is past is dropped."""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Optional

import numpy as np

EARLY = 1e-3  # of a step: today's seconds as float64 are good to 0.2 us


@dataclass(frozen=True, eq=False)
class Chunk:
    """Consecutive actions of one observation."""

    stamp: float  # [s] of the observation: step i lasts from stamp + i dt to stamp + (i + 1) dt
    dt: float  # [s]
    motion: np.ndarray  # [n m], configurations, or tangents if the embodiment's motion is a delta
    gripper: Optional[np.ndarray]  # [n]
    id: int = 0  # a running number of its source
    source: str = "policy"

    def end(self) -> float:
        """Return when the last step is over [s]."""
        return self.stamp + len(self.motion) * self.dt


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a chunk that is due."""

    chunk: Chunk
    index: int
    first: bool  # the chunk's first step to be executed

    @property
    def start(self) -> float:
        """Return when the step begins [s]."""
        return self.chunk.stamp + self.index * self.chunk.dt

    @property
    def end(self) -> float:
        """Return when the step's target is reached [s]."""
        return self.start + self.chunk.dt


class ChunkBuffer:
    """Hold the newest chunk and hand out each step once, when it is due.

    Steps of successive chunks follow each other at the step's own rate even if the chunks' grids are shifted: a step
    is handed out no sooner than half a step after the last one's start plus half a step.
    """

    def __init__(self) -> None:
        self.counts: Counter = Counter()
        self._chunk: Optional[Chunk] = None
        self._next = 0  # index after the last one handed out
        self._last_stamp = -math.inf
        self._last_start = -math.inf

    def clear(self, since: float) -> None:
        """Forget everything; only chunks of observations from `since` [s] on are taken."""
        self._chunk, self._last_stamp, self._last_start = None, math.nextafter(since, -math.inf), -math.inf

    def offer(self, chunk: Chunk, now: float) -> Optional[str]:
        """Take a chunk in place of the older one; return why it was dropped, if it was."""
        reason = self._refuse(chunk, now)
        self.counts["chunks_dropped" if reason else "chunks"] += 1
        if reason is None:
            self._chunk, self._next, self._last_stamp = chunk, 0, chunk.stamp
        return reason

    def _refuse(self, chunk: Chunk, now: float) -> Optional[str]:
        if chunk.stamp == self._last_stamp:
            return "duplicate chunk"
        if chunk.stamp < self._last_stamp:
            return "out-of-order chunk"
        if chunk.end() <= now:
            return "late chunk"
        return None

    def due(self, now: float) -> Optional[Step]:
        """Return the step that begins now or began since the last call, or None."""
        chunk = self._chunk
        if chunk is None or now < chunk.stamp:
            return None
        index = math.floor((now - chunk.stamp) / chunk.dt + EARLY)
        start = chunk.stamp + index * chunk.dt
        if index >= len(chunk.motion) or start < self._last_start + 0.5 * chunk.dt:
            return None
        self.counts["expired_steps"] += index - self._next
        step = Step(chunk, index, first=self._next == 0)
        self._next, self._last_start = index + 1, start
        return step
