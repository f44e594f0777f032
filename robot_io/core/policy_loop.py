"""Observations in, chunks out, with inference in a thread of its own."""

import threading
from collections import deque
from typing import Any, Callable, Deque, Dict, List, Optional, Protocol, Sequence, Tuple

import numpy as np

from robot_io.core.diagnostics import Running

INFERENCE = 11  # purpose of the random numbers that seed one prediction
KEEP = 64  # observations
ROUNDING = 1e-4  # of a value, beyond what training had: a constant one comes back rounded
FAILURES = 3  # predictions in a row that may fail


class Predictor(Protocol):
    """Anything that predicts: a DitaPolicy, or a test's. It is given `committed` only where there is a prefix."""

    def predict(self, history: Any, *, seed: int) -> Any:
        """Return a chunk for observations, oldest first."""
        ...


class PolicyLoop:
    """Predict from the newest observation, again and again, as long as observations come.

    While a prediction runs, newer observations replace each other. A failure inside `predict` goes to `on_error`;
    after FAILURES of them in a row the loop ends.
    """

    def __init__(
        self,
        policy: Predictor,
        n_obs_steps: int,
        obs_dt: float,
        on_chunk: Callable[[Any], Optional[float]],
        on_error: Callable[[BaseException, bool], None],
        seed: int,
        clock: Callable[[], float],
        prefix: Callable[[float], Dict[str, Any]] = lambda stamp: {},
    ) -> None:
        """Build it; `start` starts the thread.

        Args:
            n_obs_steps: frames in a history, `obs_dt` [s] apart.
            on_chunk: called in the thread with what `predict` returned; returns the earliest stamp of the next
                observation to predict from, or None for any later one.
            on_error: called in the thread with what `predict` or `on_chunk` raised and whether the loop ends with it.
            seed: of this run; every prediction gets its own from it.
            clock: measures inference [s].
            prefix: more arguments of `predict` for an observation's stamp, called in the thread.
        """
        self._policy, self._n, self._obs_dt, self._prefix = policy, n_obs_steps, obs_dt, prefix
        self._on_chunk, self._on_error, self._seed, self._clock = on_chunk, on_error, seed, clock
        self.inference = Running()
        self.failures = 0
        self._observations: Deque[Any] = deque(maxlen=KEEP)
        self._changed = threading.Condition()
        self._generation = 0  # raised by `clear`: a prediction begun before it is thrown away
        self._predictions = 0
        self._predicted = -np.inf  # stamp of the last prediction's observation
        self._earliest = -np.inf  # stamp of the next one's
        self._begun: Optional[float] = None  # when the prediction that runs began
        self._running = False
        self._thread: Optional[threading.Thread] = None

    def offer(self, observation: Any) -> None:
        """Take an observation with a later stamp than the last one; earlier ones are ignored."""
        with self._changed:
            if not self._observations or observation.stamp > self._observations[-1].stamp:
                self._observations.append(observation)
                self._changed.notify()

    def clear(self) -> None:
        """Forget the past: a new episode begins, or what was seen is not to be acted on."""
        with self._changed:
            self._observations.clear()
            self._generation += 1
            self._predictions, self._predicted, self._earliest = 0, -np.inf, -np.inf

    def start(self) -> None:
        """Start the inference thread."""
        self._running = True
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    def stop(self, timeout_s: Optional[float] = None) -> None:
        """End the thread after the prediction that runs; one that hangs is left behind after `timeout_s`."""
        with self._changed:
            self._running = False
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(timeout_s)

    def busy(self) -> float:
        """Return how long the prediction that runs has been running [s], 0 if none does."""
        begun = self._begun
        return 0.0 if begun is None else self._clock() - begun

    def _ready(self) -> bool:
        if not self._running:
            return True
        newest = self._observations[-1].stamp if self._observations else -np.inf
        return newest > self._predicted and newest >= self._earliest

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._ready)
                if not self._running:
                    return
                history = self.history()
                self._predicted = history[-1].stamp
                generation, count = self._generation, self._predictions
                self._predictions += 1
            seed = int(np.random.default_rng([self._seed, INFERENCE, generation, count]).integers(2**31))
            begin = self._begun = self._clock()
            try:
                prefix: Any = self._prefix(history[-1].stamp)
                chunk = self._policy.predict(history, seed=seed, **prefix)
                self.inference.add(self._clock() - begin)
                if generation == self._generation:
                    earliest = self._on_chunk(chunk)
                    with self._changed:
                        if generation == self._generation and earliest is not None:
                            self._earliest = earliest
            except Exception as e:  # a thread that dies silently would look like a hung policy
                self.failures += 1
                self._on_error(e, self.failures >= FAILURES)
                if self.failures >= FAILURES:
                    return
            else:
                self.failures = 0
            finally:
                self._begun = None

    def history(self) -> List[Any]:
        """Return the newest observation and those n obs_dt before it, oldest first; it ends at the first gap."""
        newest = self._observations[-1]
        history = [newest]
        for i in range(1, self._n):
            wanted = newest.stamp - i * self._obs_dt
            nearest = min(self._observations, key=lambda o: abs(o.stamp - wanted))
            if abs(nearest.stamp - wanted) > 0.25 * self._obs_dt:
                break
            history.insert(0, nearest)
        return history


class Range:
    """Notice values that stay outside what the training data had, by more than a margin."""

    def __init__(
        self, fields: Sequence[Tuple[str, Sequence[float], Sequence[float]]], margin: float, steps: int
    ) -> None:
        """Build one.

        Args:
            fields: (name, 1st percentiles, 99th percentiles) in the order of the values.
            margin: that is still no news, as a share of a value's range.
            steps: more rows in a row outside are told.
        """
        self._names = [f"{n}[{i}]" if len(low) > 1 else n for n, low, _ in fields for i in range(len(low))]
        low, high = (np.concatenate([np.asarray(f[i], float) for f in fields]) for i in (1, 2))
        spread = margin * (high - low) + ROUNDING * np.maximum(1.0, np.abs(high))
        self._low, self._high, self._steps = low - spread, high + spread, steps
        self._ranges = list(zip(low.tolist(), high.tolist(), strict=True))
        self._outside = np.zeros(len(low), int)

    def clear(self) -> None:
        """Begin anew."""
        self._outside[:] = 0

    def take(self, values: np.ndarray) -> str:
        """Take one row; name what has been outside for more than `steps` rows, with its value, or return ""."""
        values = np.asarray(values, float)
        outside = ~((values >= self._low) & (values <= self._high))  # NaN is outside
        self._outside = np.where(outside, self._outside + 1, 0)
        return ", ".join(
            "{} is {:.3g}, training had {:.3g} .. {:.3g}".format(self._names[i], values[i], *self._ranges[i])
            for i in np.flatnonzero(self._outside > self._steps)
        )
