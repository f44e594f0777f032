"""The latest observation whose parts belong together, by the stamps of their sources, and why there is none."""

from collections import Counter, deque
from typing import Any, Deque, Dict, List, Optional, Sequence, Tuple

import numpy as np

KEEP = 64  # samples per source: 0.6 s of a 100 Hz state
FROZEN_FRAMES = 5  # identical pictures in a row, while the arm moves, that no camera takes
SPARSE = 16  # pixels
MOVED = 0.01  # of some state value, in its own unit: m, rad, share of a gripper


class Synchronizer:
    """Collect stamped samples per source and pick the ones of one instant."""

    def __init__(
        self, pacers: Sequence[str], others: Sequence[str], slop: float, max_age: float, max_skew: float = 0.05
    ) -> None:
        """Build one.

        Args:
            pacers: the slow sources (cameras); the instant is the newest that all of them have reached.
            others: the fast ones, of which the nearest sample is taken.
            slop: largest spread of the stamps in one observation [s].
            max_age: oldest instant that is still an observation [s].
            max_skew: how far in the future a stamp may be, and how far one that is out of order may be back [s].
        """
        if not pacers:
            raise ValueError("an observation needs at least one camera")
        self._pacers, self._slop, self._max_age, self._max_skew = tuple(pacers), slop, max_age, max_skew
        self._samples: Dict[str, Deque[Tuple[float, Any]]] = {s: deque(maxlen=KEEP) for s in (*pacers, *others)}
        self._future: Dict[str, float] = {}  # source -> how far its last stamp was in the future [s]
        self.counts: Counter = Counter()  # what was dropped, by reason and source
        self.flushes, self.flushed = 0, ""  # how often every queue was emptied, and why the last time

    def offer(self, source: str, stamp: float, value: Any, now: Optional[float] = None) -> Optional[str]:
        """Take a sample; return why it was dropped, if it was.

        One that is older than the last is dropped; by more than `max_skew`, a clock went back: every queue is emptied.
        """
        queue = self._samples[source]
        if now is not None:
            self._future.pop(source, None)
            if stamp - now > self._max_skew:
                self._future[source] = stamp - now
                return self._drop(f"{source} is stamped in the future")
        if queue and stamp == queue[-1][0]:
            return self._drop(f"{source} repeats its stamp")
        if queue and 0 < queue[-1][0] - stamp <= self._max_skew:
            return self._drop(f"{source} is out of order")  # as clocks may differ: what follows will be later again
        if queue and stamp < queue[-1][0]:
            self.clear()  # a clock went back: nothing is paired across the jump
            self.flushes, self.flushed = self.flushes + 1, self._drop(f"{source} went back in time")
        queue.append((stamp, value))
        return None

    def _drop(self, reason: str) -> str:
        self.counts[reason] += 1
        return reason

    def clear(self) -> None:
        """Forget every sample."""
        for queue in self._samples.values():
            queue.clear()

    def newest(self, source: str) -> Optional[Any]:
        """Return the last value of a source."""
        queue = self._samples[source]
        return queue[-1][1] if queue else None

    def future(self) -> str:
        """Name the sources whose stamps are in the future, and by how much; "" if none are."""
        return ", ".join(
            f"{source} is stamped {ahead:.3f} s in the future: compare the clocks of its host and of this one"
            for source, ahead in self._future.items()
        )

    def latest(self, now: float) -> Tuple[Optional[Tuple[float, Dict[str, Any]]], str]:
        """Return (stamp, {source: value}) of the newest instant and "", or None and the reason."""
        missing = [source for source, queue in self._samples.items() if not queue]
        if missing:
            return None, f"nothing yet from {', '.join(missing)}"
        stamp = min(self._samples[source][-1][0] for source in self._pacers)
        if now - stamp > self._max_age:
            late = [source for source in self._pacers if now - self._samples[source][-1][0] > self._max_age]
            return None, f"{', '.join(late)} silent: the newest images are older than {self._max_age} s"
        nearest = {source: nearest_to(queue, stamp) for source, queue in self._samples.items()}
        off = [s for s, (t, _) in nearest.items() if abs(t - stamp) > self._slop]
        if off:
            return None, f"{', '.join(off)} not within {self._slop} s of the images"
        return (stamp, {s: value for s, (_, value) in nearest.items()}), ""


def nearest_to(queue: Deque[Tuple[float, Any]], stamp: float) -> Tuple[float, Any]:
    """Return the sample of a queue in order whose stamp is nearest, the older one of two: it is among the newest."""
    best = queue[-1]
    for sample in reversed(queue):
        if abs(sample[0] - stamp) > abs(best[0] - stamp):
            break
        best = sample
    return best


class FrozenCameras:
    """Notice cameras that go on publishing one picture, with new stamps, while the arm moves."""

    def __init__(self, frames: int = FROZEN_FRAMES, moved: float = MOVED) -> None:
        self._frames, self._moved = frames, moved
        self._last: Dict[str, np.ndarray] = {}
        self._since: Dict[str, Tuple[int, Optional[np.ndarray]]] = {}  # frames alike since it moved, state at the first
        self._frozen: List[str] = []

    def clear(self) -> None:
        """Forget every picture."""
        self._last, self._since, self._frozen = {}, {}, []

    def take(self, camera: str, image: np.ndarray, state: Optional[np.ndarray]) -> str:
        """Take a picture and the state that was measured last; return what is frozen, or ""."""
        last, self._last[camera] = self._last.get(camera), image
        same = last is not None and _alike(last, image)
        count, first = self._since.get(camera, (1, None)) if same else (1, None)
        first = state if first is None else first
        away = 0.0 if state is None or first is None else float(np.max(np.abs(state - first), initial=0.0))
        # those from before it moved prove nothing: an arm that begins to move is ahead of its pictures
        count += same and away > self._moved
        self._since[camera] = (count, first)
        if count >= self._frames and camera not in self._frozen:
            self._frozen.append(camera)
        elif not same and camera in self._frozen:
            self._frozen.remove(camera)
        return self.reason()

    def reason(self) -> str:
        """Name the frozen cameras, or ""."""
        frozen = ", ".join(self._frozen)
        return f"{frozen} frozen: {self._frames} identical images while the arm moved" if frozen else ""


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    """Return whether two pictures are equal; of most, a few pixels tell that they are not."""
    return a.shape == b.shape and np.array_equal(a[::SPARSE, ::SPARSE], b[::SPARSE, ::SPARSE]) and np.array_equal(a, b)
