"""The bus on a real ROS 2 lifecycle node: a logic-free adapter, for machines with a sourced ROS 2 (Humble or later).

`RclpyBus(name, domain)` is active from the start. With `build` the node is a managed one: configure calls `build(bus)`,
activate starts its subscriptions, timers and services and lets its publishers send, deactivate and shutdown let it
brake first (https://design.ros2.org/articles/node_lifecycle.html).
"""

import contextlib
import time
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import rclpy  # pyright: ignore[reportMissingImports]
from rcl_interfaces.msg import ParameterDescriptor  # pyright: ignore[reportMissingImports]
from rclpy.clock import Clock, ClockType  # pyright: ignore[reportMissingImports]
from rclpy.context import Context  # pyright: ignore[reportMissingImports]
from rclpy.exceptions import InvalidParameterTypeException  # pyright: ignore[reportMissingImports]
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor  # pyright: ignore[reportMissingImports]
from rclpy.qos import qos_policy_name_from_kind  # pyright: ignore[reportMissingImports]
from rclpy.signals import SignalHandlerOptions  # pyright: ignore[reportMissingImports]

from robot_io.bus import Qos, Stopper, Timer, TypeWatch, Writer, wait_for_writer
from robot_io.node_rclpy import SUCCESS, Latched, Node, class_of, message, profile_of, qos_of

try:
    from rclpy import event_handler as events  # pyright: ignore[reportMissingImports]
except ImportError:  # Humble
    from rclpy import qos_event as events  # pyright: ignore[reportMissingImports]

POLL_S = 0.1  # how often `spin` looks whether it is over; constant, or rclpy would gather its wait set anew


class RclpyBus:
    """A node under rclpy. Implements `robot_io.bus.Bus` and `robot_io.bus.Services`."""

    def __init__(self, name: str, domain_id: Optional[int], build: Optional[Callable[[Any], Any]] = None) -> None:
        """Join the graph; domain None: ROS_DOMAIN_ID."""
        self._build, self.built = build, None
        self.running, self.active, self._asked, self.problem = True, build is None, False, ""
        self._stopper = Stopper(self.log)
        self._mismatch: Callable[[str], None] = lambda text: self.log("error", text)
        self._liveliness: Dict[str, Callable[[int], None]] = {}
        self._subscribed: List[Tuple[str, str]] = []
        self._publishers: List[Any] = []
        self._latched: List[Latched] = []
        self._timers: List[Timer] = []
        self._starts: List[Callable[[], None]] = []
        self._ends: List[Callable[[], Any]] = []
        self._steady = Clock(clock_type=ClockType.STEADY_TIME)
        self._context = Context()
        # rclpy's own handlers would end the context, and the node could not publish its way to a stop
        rclpy.init(context=self._context, domain_id=domain_id, signal_handler_options=SignalHandlerOptions.NO)
        self._node = Node(name, self._context, self)
        self.name = self._node.get_name()  # it may be remapped
        self._types = TypeWatch(self.name)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self._node)
        if build is None:
            self.start()

    def start(self) -> None:
        """Configure and activate. Raises ValueError with the reason when a transition fails."""
        for trigger in (self._node.trigger_configure, self._node.trigger_activate):
            if trigger() != SUCCESS:
                raise ValueError(f"{self.name} did not start: {self.problem}")

    def configure(self) -> None:
        if self._build is not None:
            try:
                self.built = self._build(self)
            except Exception:
                self.clear()
                raise

    def activate(self) -> None:
        if self._build is not None and self.built is None:  # a node that was deactivated begins anew
            self.configure()
        self.active = True
        try:
            for publisher in self._publishers:
                publisher.on_activate(None)  # those that were made after rclpy's own round
            for held in self._latched:
                held.flush()
            for start in self._starts:
                start()
            self.timer(1.0, self._look)
        except Exception:
            self.active = False
            self.clear()
            raise

    def deactivate(self, reason: str) -> None:
        """Let the node come to rest; the executor waits for this transition, so the timers are run here."""
        if not self.active:
            return
        self._stopper.ask(reason)
        while self.running and time.monotonic() < self._stopper.deadline:
            for timer in self._timers:
                timer.dispatch(time.monotonic())
            time.sleep(0.001)
        self.active = False
        if self._build is not None:
            self.clear()
        self.running = self._build is not None

    def clear(self) -> None:
        for end in reversed(self._ends):
            end()
        for made in (self._ends, self._starts, self._timers, self._publishers, self._latched, self._subscribed):
            made.clear()
        self._liveliness.clear()
        self.built, self._stopper = None, Stopper(self.log)

    def leave(self, reason: str) -> None:
        self.deactivate(reason)
        self.running = False

    def _begin(self, start: Callable[[], None]) -> None:
        """Do it now if active, or else when activated: an inactive node hears and does nothing."""
        self._starts.append(start)
        if self.active:
            start()

    def msg(self, type: str, **fields: Any) -> Any:
        """Build a message; fields left out are zero. Raises ValueError for unknown names."""
        return message(type, **fields)

    def publisher(self, topic: str, type: str, qos: Qos) -> Any:
        """Offer `topic`; nothing leaves before the node is active."""
        handler = events.PublisherEventCallbacks(incompatible_qos=lambda e: self._report(topic, "offers", qos, e))
        made = self._node.create_lifecycle_publisher(class_of(type), topic, profile_of(qos), event_callbacks=handler)
        self._ends.append(lambda: self._node.destroy_lifecycle_publisher(made))
        self._publishers.append(made)
        if self.active:
            made.on_activate(None)
        if not qos.latched:
            return made
        self._latched.append(Latched(made, qos.depth))
        return self._latched[-1]

    def subscribe(self, topic: str, type: str, qos: Qos, callback: Callable[[Any], None], urgent: bool = True) -> None:
        """Call `callback(message)` for every message on `topic`; the executor treats all as urgent."""
        kind, profile = class_of(type), profile_of(qos)
        handler = events.SubscriptionEventCallbacks(
            incompatible_qos=lambda e: self._report(topic, "requests", qos, e),
            liveliness=lambda e: self._stopper.call(self._liveliness.get(topic, lambda alive: None), e.alive_count),
        )

        def start() -> None:
            made = self._node.create_subscription(
                kind, topic, lambda message: self._stopper.call(callback, message), profile, event_callbacks=handler
            )
            self._ends.append(lambda: self._node.destroy_subscription(made))

        self._subscribed.append((topic, type))
        self._begin(start)

    def timer(self, period_s: float, callback: Callable[[], None]) -> None:
        """Call `callback` every `period_s` on a steady clock."""
        timer = Timer(period_s, lambda: self._stopper.call(callback), time.monotonic())
        self._timers.append(timer)

        def start() -> None:
            made = self._node.create_timer(period_s, timer.callback, clock=self._steady)
            self._ends.append(lambda: self._node.destroy_timer(made))

        self._begin(start)

    def service(self, name: str, type: str, callback: Callable[[Any], Mapping[str, Any]]) -> None:
        """Answer requests with the fields that `callback(request)` returns."""
        kind = class_of(type)

        def answer(request: Any, response: Any) -> Any:
            for field, value in (self._stopper.call(callback, request) or {}).items():
                setattr(response, field, value)
            return response

        def start() -> None:
            made = self._node.create_service(kind, name, answer)
            self._ends.append(lambda: self._node.destroy_service(made))

        self._begin(start)

    def now(self) -> float:
        """Return the node's clock [s]: the system's, or /clock under `use_sim_time`."""
        return self._node.get_clock().now().nanoseconds * 1e-9

    def steady(self) -> float:
        """Return a clock that never jumps [s]."""
        return time.monotonic()

    def param(self, name: str, default: Any) -> Any:
        """Return a node parameter, or its default. Raises ValueError for another type than the default's."""
        if not self._node.has_parameter(name):
            about = ParameterDescriptor(description="read when the node is configured")
            try:
                self._node.declare_parameter(name, default, about)
            except InvalidParameterTypeException:
                wanted = type(default).__name__
                raise ValueError(f"parameter {name} must be of type {wanted}, as {default!r} is") from None
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
        while self.running and self._context.ok() and time.monotonic() < min(end, self._stopper.deadline):
            if self._asked:
                self._node.trigger_shutdown()
                break
            with contextlib.suppress(ExternalShutdownException):
                self._executor.spin_once(timeout_sec=min(POLL_S, max(0.0, end - time.monotonic())))
        if time.monotonic() >= self._stopper.deadline:
            self.shutdown()
        if not self.running:
            self._stopper.finish()

    def shutdown(self) -> None:
        """Let `spin` return, within its 0.1 s."""
        self.running = False

    def ask_to_leave(self, *_: Any) -> None:
        """Let `spin` shut the node down and return; for signal handlers."""
        self._asked = True

    def close(self) -> None:
        """Leave the graph."""
        self.shutdown()
        self._executor.shutdown()
        self._node.destroy_node()
        self._context.try_shutdown()

    def writers(self, topic: str) -> List[Writer]:
        """List everybody who offers `topic`, oneself included."""
        found = self._node.get_publishers_info_by_topic(self._node.resolve_topic_name(topic))  # it does not remap
        return [Writer(i.node_name, i.topic_type, qos_of(i.qos_profile)) for i in found]

    def wait_for_writer(self, topic: str, type: str, qos: Qos, timeout_s: float) -> None:
        """Spin until somebody offers `topic` as requested. Raises TimeoutError that says what is there instead."""
        wait_for_writer(self, topic, type, qos, timeout_s, self._node.get_node_names)

    def on_qos_mismatch(self, callback: Callable[[str], None]) -> None:
        """Call `callback(text)` when an endpoint of this node and another one do not match."""
        self._mismatch = callback

    def on_liveliness(self, topic: str, callback: Callable[[int], None]) -> None:
        """Call `callback(alive)` when the number of live writers on a subscribed topic changes."""
        if topic not in [subscribed for subscribed, _ in self._subscribed]:
            raise ValueError(f"subscribe to {topic} before watching its writers")
        self._liveliness[topic] = callback

    def on_stop(self, callback: Callable[[str], None]) -> None:
        """Call `callback(reason)` when the node must come to rest and leave."""
        self._stopper.callback = callback

    def _look(self) -> None:
        for topic, type in self._subscribed:
            for text in self._types.look(topic, type, "", self.writers(topic)):
                self._mismatch(text)

    def _report(self, topic: str, verb: str, qos: Qos, e: Any) -> None:
        policy, name, node = (
            qos_policy_name_from_kind(e.last_policy_kind),
            self._node.resolve_topic_name(topic),
            self._node,
        )
        if policy == "INVALID":  # another type, which `TypeWatch` tells
            return
        ask = node.get_subscriptions_info_by_topic if verb == "offers" else node.get_publishers_info_by_topic
        theirs = "; ".join(f"{i.node_name} has {qos_of(i.qos_profile)}" for i in ask(name))
        self._stopper.call(
            self._mismatch,
            f"QoS mismatch on {topic} ({policy}): {self.name} {verb} {qos}; {theirs}. Nothing flows between them",
        )
