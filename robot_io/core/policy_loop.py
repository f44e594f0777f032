"""Observations in, chunks out, with inference in a thread of its own."""

import threading
from collections import deque
from typing import Any, Callable, Deque, Dict, List, Optional, Protocol, Sequence, Tuple

import numpy as np

from robot_io.core.diagnostics import Running

INFERENCE = 11  # purpose of the random numbers that seed one prediction
KEEP = 64  # observations
ROUNDING = 1e-4  # of a value, beyond what training had: a constant one comes back rounded
NEAR = 0.25  # of obs_dt: how far a frame of a history may be from where it should be
FAILURES = 3  # predictions in a row that may fail


class Predictor(Protocol):
    """Anything that predicts: a DitaPolicy, or a test's. It is given `committed` only where there is a prefix.

    What has a method `look(observation)`, as a PolicySession, is shown beforehand what the next history will hold.
    """

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
        self._look: Optional[Callable[[Any], None]] = getattr(policy, "look", None)
        self._on_chunk, self._on_error, self._seed, self._clock = on_chunk, on_error, seed, clock
        self.inference = Running()
        self.failures = 0
        self._observations: Deque[Any] = deque(maxlen=KEEP)
        self._changed = threading.Condition()
        self._generation = 0  # raised by `clear`: a prediction begun before it is thrown away
        self._predictions = 0
        self._predicted = -np.inf  # stamp of the last prediction's observation
        self._looked = -np.inf  # stamp of the last observation that was shown beforehand
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
            self._predictions, self._predicted, self._looked, self._earliest = 0, -np.inf, -np.inf, -np.inf

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

    def _due(self) -> bool:
        newest = self._observations[-1].stamp if self._observations else -np.inf
        return newest > self._predicted and newest >= self._earliest

    def _ahead(self) -> bool:
        """Return whether the newest observation will be an older one of the next history, if frames go on as now."""
        if self._look is None or len(self._observations) < 2 or self._earliest == -np.inf:
            return False
        before, stamp = (o.stamp for o in (self._observations[-2], self._observations[-1]))
        period = stamp - before
        until = period * np.ceil((self._earliest - stamp) / period - ROUNDING)  # the next prediction's observation
        near = (abs(until - i * self._obs_dt) <= NEAR * self._obs_dt for i in range(1, self._n))
        return stamp > max(self._predicted, self._looked) and any(near)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._running or self._due() or self._ahead())
                if not self._running:
                    return
                act = self._predict_next() if self._due() else self._look_ahead()
                self._begun = self._clock()
            try:
                act()
            except Exception as e:  # a thread that dies silently would look like a hung policy
                self.failures += 1
                self._on_error(e, self.failures >= FAILURES)
                if self.failures >= FAILURES:
                    return
            else:
                self.failures = 0
            finally:
                self._begun = None

    def _look_ahead(self) -> Callable[[], None]:
        assert self._look is not None
        look, observation = self._look, self._observations[-1]
        self._looked = observation.stamp
        return lambda: look(observation)

    def _predict_next(self) -> Callable[[], None]:
        history = self.history()
        self._predicted = history[-1].stamp
        generation, count = self._generation, self._predictions
        self._predictions += 1

        def predict() -> None:
            seed = int(np.random.default_rng([self._seed, INFERENCE, generation, count]).integers(2**31))
            begin = self._clock()
            prefix: Any = self._prefix(history[-1].stamp)
            chunk = self._policy.predict(history, seed=seed, **prefix)
            self.inference.add(self._clock() - begin)
            if generation == self._generation:
                earliest = self._on_chunk(chunk)
                with self._changed:
                    if generation == self._generation and earliest is not None:
                        self._earliest = earliest

        return predict

    def history(self) -> List[Any]:
        """Return the newest observation and those n obs_dt before it, oldest first; it ends at the first gap."""
        newest = self._observations[-1]
        history = [newest]
        for i in range(1, self._n):
            wanted = newest.stamp - i * self._obs_dt
            nearest = min(self._observations, key=lambda o: abs(o.stamp - wanted))
            if abs(nearest.stamp - wanted) > NEAR * self._obs_dt:
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

    def holds(self, rows: np.ndarray) -> bool:
        """Return whether no value of any row [n d] is outside."""
        return bool(np.all((rows >= self._low) & (rows <= self._high)))

    def take(self, values: np.ndarray) -> str:
        """Take one row; name what has been outside for more than `steps` rows, with its value, or return ""."""
        values = np.asarray(values, float)
        outside = ~((values >= self._low) & (values <= self._high))  # NaN is outside
        self._outside = np.where(outside, self._outside + 1, 0)
        return ", ".join(
            "{} is {:.3g}, training had {:.3g} .. {:.3g}".format(self._names[i], values[i], *self._ranges[i])
            for i in np.flatnonzero(self._outside > self._steps)
        )
