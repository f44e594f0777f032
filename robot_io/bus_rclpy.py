"""The bus on a real ROS 2 lifecycle node: a logic-free adapter, for machines with a sourced ROS 2 (Humble or later)."""

import array
import importlib
import time
from typing import Any, Callable, Dict, List, Optional

import numpy as np
import rclpy  # pyright: ignore[reportMissingImports]
from rclpy.clock import Clock, ClockType  # pyright: ignore[reportMissingImports]
from rclpy.duration import Duration  # pyright: ignore[reportMissingImports]
from rclpy.executors import SingleThreadedExecutor  # pyright: ignore[reportMissingImports]
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn  # pyright: ignore[reportMissingImports]
from rclpy.qos import (  # pyright: ignore[reportMissingImports]
    DurabilityPolicy,
    HistoryPolicy,
    LivelinessPolicy,
    QoSProfile,
    ReliabilityPolicy,
)

from robot_io.bus import Qos, Writer

try:
    from rclpy.event_handler import (  # pyright: ignore[reportMissingImports]
        PublisherEventCallbacks,
        SubscriptionEventCallbacks,
    )
except ImportError:  # Humble
    from rclpy.qos_event import (  # pyright: ignore[reportMissingImports]
        PublisherEventCallbacks,
        SubscriptionEventCallbacks,
    )

NO_LEASE_NS = 2**62  # a lease at least this long, or of zero, means none


def _message_class(type: str) -> Any:
    package, kind, name = type.split("/")
    try:
        return getattr(importlib.import_module(f"{package}.{kind}"), name)
    except (ImportError, AttributeError):
        raise ValueError(f"no message type {type!r}; install the ROS 2 package {package}") from None


def _value(value: Any) -> Any:
    """Return what rclpy's setters take: array.array for bytes, lists for other arrays, numbers as they are."""
    if isinstance(value, np.ndarray):
        return array.array("B", value.tobytes()) if value.dtype == np.uint8 else value.tolist()
    return value


def _profile(qos: Qos) -> Any:
    profile = QoSProfile(
        history=HistoryPolicy.KEEP_LAST,
        depth=qos.depth,
        reliability=ReliabilityPolicy.RELIABLE if qos.reliable else ReliabilityPolicy.BEST_EFFORT,
        durability=DurabilityPolicy.TRANSIENT_LOCAL if qos.latched else DurabilityPolicy.VOLATILE,
    )
    if qos.lease_s is not None:
        profile.liveliness = LivelinessPolicy.AUTOMATIC
        profile.liveliness_lease_duration = Duration(nanoseconds=int(qos.lease_s * 1e9))
    return profile


def _from_profile(profile: Any) -> Qos:
    lease = profile.liveliness_lease_duration.nanoseconds
    return Qos(
        reliable=profile.reliability == ReliabilityPolicy.RELIABLE,
        latched=profile.durability == DurabilityPolicy.TRANSIENT_LOCAL,
        depth=profile.depth,
        lease_s=lease / 1e9 if 0 < lease < NO_LEASE_NS else None,
    )


class _Node(LifecycleNode):
    """Configured and activated by its bus; leaving the active state ends the bus."""

    def __init__(self, name: str, leave: Callable[[], None]) -> None:
        super().__init__(name)
        self._leave = leave

    def on_deactivate(self, state: Any) -> Any:
        self._leave()
        return super().on_deactivate(state)

    def on_shutdown(self, state: Any) -> Any:
        self._leave()
        return TransitionCallbackReturn.SUCCESS


class RclpyBus:
    """A node under rclpy. Implements `robot_io.bus.Bus`."""

    def __init__(self, name: str, domain_id: int) -> None:
        if not rclpy.ok():
            rclpy.init(domain_id=domain_id)
        self.name = name
        self._running = True
        self._mismatch: Callable[[str], None] = lambda text: self.log("error", text)
        self._liveliness: Dict[str, Callable[[int], None]] = {}
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._node = _Node(name, self.shutdown)
        self._node.trigger_configure()
        self._node.trigger_activate()
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)

    def msg(self, type: str, **fields: Any) -> Any:
        """Build a message; fields left out are zero. Raises ValueError for unknown names."""
        kind = _message_class(type)
        unknown = sorted(set(fields) - set(kind.get_fields_and_field_types()))
        if unknown:
            raise ValueError(f"{type} has no field {', '.join(unknown)}")
        if type == "diagnostic_msgs/msg/DiagnosticStatus":
            fields["level"] = bytes([fields.get("level", 0)])  # rclpy's `byte` is bytes
        return kind(**{name: _value(value) for name, value in fields.items()})

    def publisher(self, topic: str, type: str, qos: Qos) -> Any:
        """Offer `topic`."""
        events = PublisherEventCallbacks(incompatible_qos=lambda event: self._report(topic, "offers", qos, event))
        return self._node.create_publisher(_message_class(type), topic, _profile(qos), event_callbacks=events)

    def subscribe(self, topic: str, type: str, qos: Qos, callback: Callable[[Any], None]) -> None:
        """Call `callback(message)` for every message on `topic`."""
        events = SubscriptionEventCallbacks(
            incompatible_qos=lambda event: self._report(topic, "requests", qos, event),
            liveliness=lambda event: self._liveliness.get(topic, lambda alive: None)(event.alive_count),
        )
        kind, profile = _message_class(type), _profile(qos)
        self._node.create_subscription(kind, topic, callback, profile, event_callbacks=events)

    def timer(self, period_s: float, callback: Callable[[], None]) -> None:
        """Call `callback` every `period_s` on a steady clock."""
        self._node.create_timer(period_s, callback, clock=self._steady)

    def now(self) -> float:
        """Return the node's clock [s]: the system's, or /clock under `use_sim_time`."""
        return self._node.get_clock().now().nanoseconds * 1e-9

    def steady(self) -> float:
        """Return a clock that never jumps [s]."""
        return time.monotonic()

    def param(self, name: str, default: Any) -> Any:
        """Return a node parameter, or its default."""
        if not self._node.has_parameter(name):
            self._node.declare_parameter(name, default)
        return self._node.get_parameter(name).value

    def log(self, level: str, text: str) -> None:
        """Write one line to the node's logger."""
        logger = self._node.get_logger()
        # one line of source per level: rclpy refuses another level from the same line
        if level == "error":
            logger.error(text)
        elif level == "warning":
            logger.warning(text)
        else:
            logger.info(text)

    def spin(self, timeout_s: Optional[float] = None) -> None:
        """Run callbacks until `shutdown`, or for `timeout_s`."""
        end = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        while self._running and rclpy.ok() and time.monotonic() < end:
            self._executor.spin_once(timeout_sec=min(0.1, max(0.0, end - time.monotonic())))

    def shutdown(self) -> None:
        """Let `spin` return, within its 0.1 s."""
        self._running = False

    def close(self) -> None:
        """Leave the graph."""
        self.shutdown()
        self._executor.shutdown()
        self._node.destroy_node()

    def writers(self, topic: str) -> List[Writer]:
        """List everybody who offers `topic`, oneself included."""
        found = self._node.get_publishers_info_by_topic(topic)
        return [Writer(i.node_name, i.topic_type, _from_profile(i.qos_profile)) for i in found]

    def wait_for_writer(self, topic: str, type: str, qos: Qos, timeout_s: float) -> None:
        """Spin until somebody offers `topic` as requested.

        Raises:
            TimeoutError: nobody does; says which topic, type and QoS, after how long, and what is there instead.
        """
        end = time.monotonic() + timeout_s
        while time.monotonic() < end and self._running:
            self.spin(0.02)
            if any(w.type == type and w.qos.satisfies(qos) for w in self.writers(topic)):
                return
        there = "; ".join(f"{w.node} offers {w.type} ({w.qos})" for w in self.writers(topic)) or "nobody offers it"
        nodes = ", ".join(sorted(set(self._node.get_node_names()) - {self.name})) or "none"
        raise TimeoutError(
            f"no publisher on {topic} of {type} ({qos}) after {timeout_s:g} s: {there}. Nodes: {nodes}. "
            "Start the peer, or compare ROS_DOMAIN_ID and QoS"
        )

    def on_qos_mismatch(self, callback: Callable[[str], None]) -> None:
        """Call `callback(text)` when an endpoint of this node and another one do not match."""
        self._mismatch = callback

    def on_liveliness(self, topic: str, callback: Callable[[int], None]) -> None:
        """Call `callback(alive)` when the number of live writers on a subscribed topic changes."""
        self._liveliness[topic] = callback

    def _report(self, topic: str, verb: str, qos: Qos, event: Any) -> None:
        if verb == "offers":
            others = self._node.get_subscriptions_info_by_topic(topic)
        else:
            others = self._node.get_publishers_info_by_topic(topic)
        theirs = "; ".join(f"{i.node_name} has {_from_profile(i.qos_profile)}" for i in others)
        self._mismatch(
            f"QoS mismatch on {topic} ({event.last_policy_kind}): {self.name} {verb} {qos}; {theirs}. "
            "Nothing flows between them"
        )
