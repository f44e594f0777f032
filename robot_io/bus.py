"""The port between plain Python and a ROS 2 graph: what every node is written against.

Two implementations: `bus_dds` (CycloneDDS wheels, no ROS installed) and `bus_rclpy` (a real lifecycle node).
"""

import math
import time
import typing
from dataclasses import dataclass
from typing import Any, Callable, Iterator, List, Literal, Mapping, Optional, Protocol, Sequence, Set, Tuple

BRAKE_S = 2.0  # what a node has to come to rest in before its bus leaves without it [s]


@dataclass(frozen=True)
class Qos:
    """What a writer offers or a reader requests; an offer must be at least what is requested or nothing matches."""

    reliable: bool
    latched: bool  # the last `depth` messages reach late joiners
    depth: int
    lease_s: Optional[float]  # a writer's process that is silent for longer counts as gone; None: the middleware's own

    def satisfies(self, requested: "Qos") -> bool:
        """Return whether this offer is at least what is requested (DDS 1.4, table in 2.2.3)."""
        forever = float("inf")
        lease = (self.lease_s or forever) <= (requested.lease_s or forever)
        return self.reliable >= requested.reliable and self.latched >= requested.latched and lease

    def __str__(self) -> str:
        lease = "" if self.lease_s is None else f", lease {self.lease_s} s"
        reliable = "reliable" if self.reliable else "best effort"
        return f"{reliable}, {'latched' if self.latched else 'volatile'}, keep last {self.depth}{lease}"


SENSOR = Qos(reliable=False, latched=False, depth=5, lease_s=None)
STATE = Qos(reliable=True, latched=False, depth=10, lease_s=None)
COMMAND = Qos(reliable=True, latched=False, depth=10, lease_s=0.1)
LATCHED = Qos(reliable=True, latched=True, depth=1, lease_s=None)


@dataclass(frozen=True)
class Writer:
    """One writer on a topic, as discovery shows it."""

    node: str  # the node's name, or its participant's key where it gives none
    type: str
    qos: Qos
    type_hash: str = ""  # of the type's definition (REP 2016), where the writer gives one


class Publisher(Protocol):
    """Where a node puts the messages of one topic."""

    def publish(self, message: Any) -> None:
        """Send one message; safe from any thread."""
        ...


class Bus(Protocol):
    """One node in a graph. Callbacks and timers run one at a time, in the thread that spins."""

    name: str

    @property
    def running(self) -> bool:
        """Return whether nobody has called `shutdown` yet."""
        ...

    def msg(self, type: str, **fields: Any) -> Any:
        """Build a message ("std_msgs/msg/String"); fields left out are zero. Raises ValueError for unknown names."""
        ...

    def publisher(self, topic: str, type: str, qos: Qos) -> Publisher:
        """Offer `topic`."""
        ...

    def subscribe(self, topic: str, type: str, qos: Qos, callback: Callable[[Any], None], urgent: bool = True) -> None:
        """Call `callback(message)` for every message on `topic`.

        What is not urgent may wait for the next timer or urgent message, before which it is then handled if it was
        subscribed to before: a stream that nobody waits for need not take time from an inference.
        """
        ...

    def timer(self, period_s: float, callback: Callable[[], None]) -> None:
        """Call `callback` every `period_s` of the bus's clock; calls that are missed are not made up for."""
        ...

    def now(self) -> float:
        """Return the clock of all stamps [s]: the system's wall clock, slowed by the bus's rate."""
        ...

    def steady(self) -> float:
        """Return a clock that never jumps [s], at the same rate as `now`."""
        ...

    def param(self, name: str, default: Any) -> Any:
        """Return a parameter, or its default."""
        ...

    def log(self, level: Literal["info", "warning", "error"], text: str) -> None:
        """Write one line for people."""
        ...

    def spin(self, timeout_s: Optional[float] = None) -> None:
        """Run callbacks until `shutdown`, or for `timeout_s` of real time."""
        ...

    def shutdown(self) -> None:
        """Let `spin` return; callable more than once, from a callback and from any thread."""
        ...

    def close(self) -> None:
        """Leave the graph; nothing of this bus may be used after."""
        ...

    def writers(self, topic: str) -> List[Writer]:
        """List everybody who offers `topic`, oneself included."""
        ...

    def wait_for_writer(self, topic: str, type: str, qos: Qos, timeout_s: float) -> None:
        """Spin until somebody offers `topic` as requested.

        Raises:
            TimeoutError: nobody does; says which topic, type and QoS, after how long, and what is there instead.
        """
        ...

    def on_qos_mismatch(self, callback: Callable[[str], None]) -> None:
        """Call `callback(text)` when an endpoint of this node and another one do not match; text says who offers what.

        Without it a mismatch is logged as an error. Another type on the same topic counts as one.
        """
        ...

    def on_liveliness(self, topic: str, callback: Callable[[int], None]) -> None:
        """Call `callback(alive)` when the number of live writers on a subscribed topic changes."""
        ...

    def on_stop(self, callback: Callable[[str], None]) -> None:
        """Call `callback(reason)` when the node must come to rest and leave: an exception in one of its callbacks or
        timers, a lifecycle transition.

        Timers and callbacks go on until the node calls `shutdown`, for `BRAKE_S` at most; then `spin` raises the
        exception again. Without it an exception ends `spin` at once.
        """
        ...


@typing.runtime_checkable
class Services(Protocol):
    """What a bus has on top where the middleware's services are had: `if isinstance(bus, Services)`.

    DDS vendors frame requests differently, so services work inside ROS 2 only; whatever has one has a topic as well.
    """

    def service(self, name: str, type: str, callback: Callable[[Any], Mapping[str, Any]]) -> None:
        """Answer requests ("std_srvs/srv/SetBool") with the fields that `callback(request)` returns."""
        ...


class Stopper:
    """Run a node's callbacks for a bus; after an exception in one the node brakes before the bus leaves."""

    def __init__(self, log: Callable[[str, str], None]) -> None:
        self.callback: Optional[Callable[[str], None]] = None
        self.error: Optional[Exception] = None
        self.deadline = math.inf  # of `time.monotonic`
        self._log = log

    def call(self, callback: Callable[..., Any], *arguments: Any) -> Any:
        """Call back; return what it returns, or None after an exception."""
        try:
            return callback(*arguments)
        except Exception as e:
            if self.callback is None:
                raise
            if self.error is None:  # a timer that fails at every tick is said once
                self.error = e
                self.ask(f"{type(e).__name__}: {e}")

    def ask(self, reason: str) -> None:
        """Ask the node to come to rest and leave."""
        self._log("error" if self.error else "info", f"stopping: {reason}")
        self.deadline = min(self.deadline, time.monotonic() + BRAKE_S)
        try:
            if self.callback is not None:
                self.callback(reason)
        except Exception as e:
            self.error, self.deadline = self.error or e, -math.inf

    def finish(self) -> None:
        """Raise the first exception again, if there was one."""
        if self.error is not None:
            raise self.error


class Timer:
    """Calls on a grid; what is missed is gone."""

    def __init__(self, period: float, callback: Callable[[], Any], start: float) -> None:
        if not period > 0:
            raise ValueError(f"a timer's period must be positive, got {period} s")
        self.period, self.callback, self.next = period, callback, start + period

    def dispatch(self, now: float) -> None:
        """Call back if it is time [s]."""
        if now >= self.next:
            self.next += self.period * (1 + (now - self.next) // self.period)
            self.callback()


class TypeWatch:
    """Tell of writers whose type is not the one that a reader asks for: DDS and ROS 2 say nothing about these."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._said: Set[Tuple[str, str, str, str]] = set()

    def look(self, topic: str, type: str, type_hash: str, writers: Sequence[Writer]) -> Iterator[str]:
        """Yield one line per writer on `topic` that offers something else, once."""
        for writer in writers:
            other = bool(type_hash and writer.type_hash and type_hash != writer.type_hash)
            key = (topic, writer.node, writer.type, writer.type_hash)
            if (writer.type != type or other) and key not in self._said:
                self._said.add(key)
                yield (
                    f"type mismatch on {topic}: {self._name} requests {type}, {writer.node} offers {writer.type}"
                    + (" of another definition" if writer.type == type else "")
                    + ". Do not expect its messages"
                )


class Clock:
    """Wall and steady time at `rate` times real time; slow motion for machines that cannot keep up.

    Every process of a graph must use the same rate, or stamps do not agree.
    """

    def __init__(self, rate: float = 1.0) -> None:
        if not 0 < rate <= 1:
            raise ValueError(f"the clock's rate must be in (0, 1], got {rate}")
        self.rate = rate

    def now(self) -> float:
        """Return wall time [s], slowed from the epoch on."""
        return self.rate * time.time()

    def steady(self) -> float:
        """Return monotonic time [s] at the same rate."""
        return self.rate * time.monotonic()


def wait_for_writer(
    bus: Bus, topic: str, type: str, qos: Qos, timeout_s: float, nodes: Callable[[], Sequence[str]]
) -> None:
    """Do what `Bus.wait_for_writer` says, with `nodes` for the names of everybody there."""
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and bus.running:
        bus.spin(min(0.02, timeout_s))
        if any(w.type == type and w.qos.satisfies(qos) for w in bus.writers(topic)):
            return
    there = "; ".join(f"{w.node} offers {w.type} ({w.qos})" for w in bus.writers(topic)) or "nobody offers it"
    others = ", ".join(sorted(set(nodes()) - {bus.name})) or "none"
    raise TimeoutError(
        f"no publisher on {topic} of {type} ({qos}) after {timeout_s:g} s: {there}. Nodes: {others}. "
        "Start the peer, or compare ROS_DOMAIN_ID, discovery range and QoS"
    )


def open_bus(
    kind: str,
    name: str,
    domain_id: int,
    rate: float = 1.0,
    discovery: Optional[str] = None,
    peers: Optional[Sequence[str]] = None,
    interface: str = "",
    loss_permille: int = 0,
    remap: Sequence[str] = (),
) -> Bus:
    """Join a graph as node `name`.

    Args:
        kind: "dds" (CycloneDDS wheels) or "rclpy" (a sourced ROS 2, which takes the rest from its environment).
        domain_id: as ROS_DOMAIN_ID.
        rate: of the clock, see `Clock`; rclpy has only 1.
        discovery: LOCALHOST, or SUBNET for multicast; None: ROS_AUTOMATIC_DISCOVERY_RANGE, or LOCALHOST.
        peers: addresses of the other machines, for unicast; None: ROS_STATIC_PEERS. Never together with SUBNET.
        interface: network interface by name, for several machines; empty: CycloneDDS chooses.
        loss_permille: tests only: of the packets that this process sends, so many are lost.
        remap: topics under other names, "FROM:=TO" as ROS 2 has them.
    """
    if kind == "dds":
        from robot_io.bus_dds import DdsBus, network_of

        return DdsBus(name, domain_id, Clock(rate), network_of(discovery, peers, interface, loss_permille), remap)
    if kind == "rclpy":
        from robot_io.bus_rclpy import RclpyBus

        if rate != 1.0:
            raise ValueError("the rclpy bus runs in real time only; leave the real-time factor at 1")
        if discovery or peers or interface or loss_permille or remap:
            raise ValueError(
                "the rclpy bus takes its network from ROS: set ROS_AUTOMATIC_DISCOVERY_RANGE and ROS_STATIC_PEERS, and "
                "remap with --ros-args -r FROM:=TO"
            )
        return RclpyBus(name, domain_id)
    raise ValueError(f"no bus {kind!r}; there are dds and rclpy")
