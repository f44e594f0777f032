"""Running statistics under ros2_control's names: periodicity, execution time, overruns."""

import math
from typing import Dict, Optional


class Running:
    """Mean, standard deviation and maximum of a stream (Welford 1962)."""

    def __init__(self) -> None:
        self.count, self.mean, self.max, self._m2 = 0, 0.0, 0.0, 0.0

    def add(self, value: float) -> None:
        """Take one value."""
        self.count += 1
        delta = value - self.mean
        self.mean += delta / self.count
        self._m2 += delta * (value - self.mean)
        self.max = max(self.max, value)

    @property
    def std(self) -> float:
        """Return the population's standard deviation."""
        return math.sqrt(self._m2 / self.count) if self.count else 0.0

    def to_dict(self, name: str) -> Dict[str, float]:
        """Return plain values under `name`."""
        return {f"{name}.average": self.mean, f"{name}.standard_deviation": self.std, f"{name}.max": self.max}


class LoopTiming:
    """How regularly a loop ran; call `begin` and `end` around each cycle."""

    def __init__(self, period: float) -> None:
        self.period = period
        self.periodicity, self.execution, self.overruns = Running(), Running(), 0
        self._begin: Optional[float] = None

    def begin(self, now: float) -> None:
        """Note the start of a cycle [s]; more than two periods after the last one is an overrun."""
        if self._begin is not None:
            self.periodicity.add(now - self._begin)
            self.overruns += now - self._begin > 2 * self.period
        self._begin = now

    def end(self, now: float) -> None:
        """Note the end of a cycle [s]."""
        assert self._begin is not None
        self.execution.add(now - self._begin)

    def pause(self) -> None:
        """Leave out the time until the next `begin`."""
        self._begin = None

    def to_dict(self) -> Dict[str, float]:
        """Return plain values [s]."""
        return {
            **self.periodicity.to_dict("periodicity"),
            **self.execution.to_dict("execution_time"),
            "overruns": self.overruns,
        }
