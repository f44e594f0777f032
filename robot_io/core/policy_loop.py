"""Observations in, chunks out, with inference in a thread of its own."""

import threading
from collections import deque
from typing import Any, Callable, Deque, List, Optional, Protocol

import numpy as np

from robot_io.core.diagnostics import Running

INFERENCE = 11  # purpose of the random numbers that seed one prediction
KEEP = 64  # observations


class Predictor(Protocol):
    """Anything that predicts: a DitaPolicy, or a test's."""

    def predict(self, history: Any, *, seed: int) -> Any:
        """Return a chunk for observations, oldest first."""
        ...


class PolicyLoop:
    """Predict from the newest observation, again and again, as long as observations come.

    While a prediction runs, newer observations replace each other. A failure inside `predict` goes to `on_error`, and
    the loop ends.
    """

    def __init__(
        self,
        policy: Predictor,
        n_obs_steps: int,
        obs_dt: float,
        on_chunk: Callable[[Any], None],
        on_error: Callable[[BaseException], None],
        seed: int,
        clock: Callable[[], float],
        interval: float = 0.0,
    ) -> None:
        """Build it; `start` starts the thread.

        Args:
            n_obs_steps: frames in a history, `obs_dt` [s] apart.
            on_chunk: called in the thread with what `predict` returned.
            seed: of this run; every prediction gets its own from it.
            clock: measures inference [s].
            interval: least time between the stamps of two predictions' observations [s].
        """
        self._policy, self._n, self._obs_dt, self._interval = policy, n_obs_steps, obs_dt, interval
        self._on_chunk, self._on_error, self._seed, self._clock = on_chunk, on_error, seed, clock
        self.inference = Running()
        self._observations: Deque[Any] = deque(maxlen=KEEP)
        self._changed = threading.Condition()
        self._generation = 0  # raised by `clear`: a prediction begun before it is thrown away
        self._predictions = 0
        self._predicted = -np.inf  # stamp of the last prediction's observation
        self._running = False
        self._thread: Optional[threading.Thread] = None

    def offer(self, observation: Any) -> None:
        """Take an observation with a later stamp than the last one; earlier ones are ignored."""
        with self._changed:
            if not self._observations or observation.stamp > self._observations[-1].stamp:
                self._observations.append(observation)
                self._changed.notify()

    def clear(self) -> None:
        """Forget the past: a new episode begins."""
        with self._changed:
            self._observations.clear()
            self._generation += 1
            self._predictions, self._predicted = 0, -np.inf

    def start(self) -> None:
        """Start the inference thread."""
        self._running = True
        self._thread = threading.Thread(target=self._run, name="inference", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the prediction that runs."""
        with self._changed:
            self._running = False
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _ready(self) -> bool:
        if not self._running:
            return True
        newest = self._observations[-1].stamp if self._observations else -np.inf
        return newest > self._predicted and newest >= self._predicted + self._interval

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
            begin = self._clock()
            try:
                chunk = self._policy.predict(history, seed=seed)
            except Exception as e:  # a thread that dies silently would look like a hung policy
                self._on_error(e)
                return
            self.inference.add(self._clock() - begin)
            if generation == self._generation:
                self._on_chunk(chunk)

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
