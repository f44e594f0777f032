"""A bus inside one process, with a clock that only the test moves: nodes run at once and the same way every time."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from robot_io.bus_dds import message


class LocalBus:
    """Nodes share it; it calls whoever subscribed, and keeps what was sent on each topic."""

    def __init__(self, name: str = "local", time: float = 1000.0) -> None:
        self.name, self.time = name, time
        self.sent: dict[str, list[Any]] = {}
        self.logged: list[tuple[str, str]] = []
        self._readers: dict[str, list[Callable[[Any], None]]] = {}
        self._timers: list[list[Any]] = []  # next call, period, callback

    def msg(self, type: str, **fields: Any) -> Any:
        return message(type, **fields)

    def publisher(self, topic: str, type: str, qos: Any) -> Any:
        def publish(message: Any) -> None:
            self.sent.setdefault(topic, []).append(message)
            for callback in self._readers.get(topic, []):
                callback(message)

        return SimpleNamespace(publish=publish)

    def subscribe(self, topic: str, type: str, qos: Any, callback: Callable[[Any], None], urgent: bool = True) -> None:
        self._readers.setdefault(topic, []).append(callback)

    def timer(self, period_s: float, callback: Callable[[], None]) -> None:
        self._timers.append([self.time + period_s, period_s, callback])

    def run(self, seconds: float) -> None:
        """Let time pass."""
        end = self.time + seconds
        while self._timers and (timer := min(self._timers, key=lambda t: t[0]))[0] <= end + 1e-9:
            self.time = timer[0]
            timer[0] += timer[1]
            timer[2]()
        self.time = end

    def now(self) -> float:
        return self.time

    def steady(self) -> float:
        return self.time

    def log(self, level: str, text: str) -> None:
        self.logged.append((level, text))

    def on_qos_mismatch(self, callback: Callable[[str], None]) -> None:
        pass

    def on_liveliness(self, topic: str, callback: Callable[[int], None]) -> None:
        pass

    def writers(self, topic: str) -> list[Any]:
        return []

    def shutdown(self) -> None:
        pass

    def close(self) -> None:
        pass
