"""The latest observation whose parts belong together, by the stamps of their sources."""

from collections import deque
from typing import Any, Deque, Dict, Optional, Sequence, Tuple

KEEP = 64  # samples per source: 0.6 s of a 100 Hz state


class Synchronizer:
    """Collect stamped samples per source and pick the ones of one instant."""

    def __init__(self, pacers: Sequence[str], others: Sequence[str], slop: float, max_age: float) -> None:
        """Build one.

        Args:
            pacers: the slow sources (cameras); the instant is the newest that all of them have reached.
            others: the fast ones, of which the nearest sample is taken.
            slop: largest spread of the stamps in one observation [s].
            max_age: oldest instant that is still an observation [s].
        """
        if not pacers:
            raise ValueError("an observation needs at least one camera")
        self._pacers, self._slop, self._max_age = tuple(pacers), slop, max_age
        self._samples: Dict[str, Deque[Tuple[float, Any]]] = {s: deque(maxlen=KEEP) for s in (*pacers, *others)}

    def offer(self, source: str, stamp: float, value: Any) -> Optional[str]:
        """Take a sample; return why it was dropped, if it was. A stamp that goes back empties every queue."""
        queue = self._samples[source]
        if queue and stamp == queue[-1][0]:
            return f"{source} repeats its stamp"
        if queue and stamp < queue[-1][0]:
            self.clear()  # a clock went back: nothing is paired across the jump
        queue.append((stamp, value))
        return None

    def clear(self) -> None:
        """Forget every sample."""
        for queue in self._samples.values():
            queue.clear()

    def latest(self, now: float) -> Tuple[Optional[Tuple[float, Dict[str, Any]]], str]:
        """Return (stamp, {source: value}) of the newest instant and "", or None and the reason."""
        missing = [source for source, queue in self._samples.items() if not queue]
        if missing:
            return None, f"nothing yet from {', '.join(missing)}"
        stamp = min(self._samples[source][-1][0] for source in self._pacers)
        if now - stamp > self._max_age:
            return None, f"the newest images are older than {self._max_age} s"
        nearest = {s: min(queue, key=lambda sample: abs(sample[0] - stamp)) for s, queue in self._samples.items()}
        off = [s for s, (t, _) in nearest.items() if abs(t - stamp) > self._slop]
        if off:
            return None, f"{', '.join(off)} not within {self._slop} s of the images"
        return (stamp, {s: value for s, (_, value) in nearest.items()}), ""
