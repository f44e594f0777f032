"""A lifecycle node, messages and QoS as rclpy has them: what `bus_rclpy` is made of."""

import array
import importlib
from collections import deque
from typing import Any, Callable, Deque, List

import numpy as np
from rcl_interfaces.msg import SetParametersResult  # pyright: ignore[reportMissingImports]
from rclpy.duration import Duration  # pyright: ignore[reportMissingImports]
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn  # pyright: ignore[reportMissingImports]
from rclpy.qos import (  # pyright: ignore[reportMissingImports]
    DurabilityPolicy,
    HistoryPolicy,
    LivelinessPolicy,
    QoSProfile,
    ReliabilityPolicy,
)

from robot_io.bus import Qos

NO_LEASE_NS = 2**62  # a lease at least this long, or of zero, means none
SUCCESS, FAILURE = TransitionCallbackReturn.SUCCESS, TransitionCallbackReturn.FAILURE


class Node(LifecycleNode):
    """Hand transitions to the bus. rclpy keeps what a transition raises to itself: it is said here."""

    def __init__(self, name: str, context: Any, bus: Any) -> None:
        self._bus = bus
        super().__init__(name, context=context)
        self.add_on_set_parameters_callback(self._on_parameters)

    def _do(self, action: Callable[[], None]) -> Any:
        try:
            action()
        except Exception as e:
            self._bus.problem = str(e)
            self._bus.log("error", f"{type(e).__name__}: {e}")
            return FAILURE
        return SUCCESS

    def on_configure(self, state: Any) -> Any:
        return self._do(self._bus.configure)

    def on_activate(self, state: Any) -> Any:
        super().on_activate(state)  # publishers first: what starts may publish
        return self._do(self._bus.activate)

    def on_deactivate(self, state: Any) -> Any:
        done = self._do(lambda: self._bus.deactivate("deactivated"))  # publishers last: braking publishes
        super().on_deactivate(state)
        return done

    def on_cleanup(self, state: Any) -> Any:
        return self._do(self._bus.clear)

    def on_shutdown(self, state: Any) -> Any:
        return self._do(lambda: self._bus.leave("shut down"))

    def on_error(self, state: Any) -> Any:
        return self._do(lambda: self._bus.leave("a transition failed"))

    def _on_parameters(self, parameters: List[Any]) -> Any:
        mine = [p.name for p in parameters if p.name != "use_sim_time"]
        if self._bus.active and mine:
            text = f"{', '.join(mine)}: read when the node is configured; deactivate and clean it up before"
            return SetParametersResult(successful=False, reason=text)
        return SetParametersResult(successful=True)


class Latched:
    """A publisher that sends what was latched before the node was active as soon as it is; rclpy's drops it."""

    def __init__(self, publisher: Any, depth: int) -> None:
        self._publisher = publisher
        self._held: Deque[Any] = deque(maxlen=depth)

    def publish(self, message: Any) -> None:
        """Send one message, or hold it."""
        if self._publisher.is_activated:
            self._publisher.publish(message)
        else:
            self._held.append(message)

    def flush(self) -> None:
        """Send what is held."""
        while self._held:
            self._publisher.publish(self._held.popleft())


def class_of(type: str) -> Any:
    """Return the class of a message or service ("std_srvs/srv/SetBool").

    Raises:
        ValueError: its package is not installed.
    """
    package, kind, name = type.split("/")
    try:
        return getattr(importlib.import_module(f"{package}.{kind}"), name)
    except (ImportError, AttributeError):
        raise ValueError(f"no message type {type!r}; install the ROS 2 package {package}") from None


def _value(value: Any, field_type: str) -> Any:
    """Return what rclpy's setters take: bytes for a byte, array.array for bytes, lists for other arrays."""
    if field_type == "octet":
        return bytes([value])
    if isinstance(value, (bytes, bytearray)) or (isinstance(value, np.ndarray) and value.dtype == np.uint8):
        data = array.array("B")
        data.frombytes(value.tobytes() if isinstance(value, np.ndarray) else value)
        return data
    return value.tolist() if isinstance(value, np.ndarray) else value


def profile_of(qos: Qos) -> Any:
    """Return a QoSProfile."""
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


def qos_of(profile: Any) -> Qos:
    """Return what a QoSProfile says; inverts `profile_of`."""
    lease = profile.liveliness_lease_duration.nanoseconds
    return Qos(
        reliable=profile.reliability == ReliabilityPolicy.RELIABLE,
        latched=profile.durability == DurabilityPolicy.TRANSIENT_LOCAL,
        depth=profile.depth,  # discovery does not tell: 0
        lease_s=lease / 1e9 if 0 < lease < NO_LEASE_NS else None,
    )


def message(type: str, **fields: Any) -> Any:
    """Build a message; fields left out are zero.

    Raises:
        ValueError: an unknown type or field.
    """
    kind = class_of(type)
    known = kind.get_fields_and_field_types()
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"{type} has no field {', '.join(unknown)}; it has {', '.join(known)}")
    return kind(**{name: _value(value, known[name]) for name, value in fields.items()})
