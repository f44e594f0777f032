"""A FAKE of the part of rclpy that `robot_io.bus_rclpy` uses, so that this file's code runs where there is no ROS 2.

It says nothing about a real ROS 2: that is what the tests marked `ros2` are for, and they never see this. Signatures,
argument checks and the oddities (a lifecycle publisher is silent until activated, what a transition raises is kept,
one callback per `spin_once`, `get_publishers_info_by_topic` does not remap, setters refuse NumPy arrays) are those of
rclpy in Jazzy and of the classes that rosidl generates. Messages travel over real DDS, so that processes can meet.
"""

import array
import contextlib
import enum
import importlib.util
import json
import math
import os
import sys
import threading
import time
import types
from collections import deque
from collections.abc import Sequence, Set
from functools import cache
from itertools import pairwise

import numpy as np
from rosbags.interfaces import Nodetype

from robot_io.bus import Qos
from robot_io.bus_dds import TYPES, DdsBus, _fields
from robot_io.bus_dds import message as wire_message

INTEGERS = {
    f"{u}int{n}": (0, 2**n) if u else (-(2 ** (n - 1)), 2 ** (n - 1)) for u in ("", "u") for n in (8, 16, 32, 64)
}
IDL = {"byte": "octet", "bool": "boolean", "float64": "double", "float32": "float", "char": "uint8"}
PACKAGES = sorted({name.split("/")[0] for name in TYPES.fielddefs} | {"std_srvs", "rcl_interfaces"})


# ---- messages


def check_one(kind, what, value, field):
    """Raise AssertionError as the setters that rosidl generates do."""
    if kind == Nodetype.NAME:
        assert isinstance(value, message_class(what)), f"The '{field}' field must be a sub message of type '{what}'"
    elif what == "string":
        assert isinstance(value, str), f"The '{field}' field must be of type 'str'"
    elif what == "bool":
        assert isinstance(value, bool), f"The '{field}' field must be of type 'bool'"
    elif what == "byte":
        assert isinstance(value, (bytes, bytearray)) and len(value) == 1, f"The '{field}' field must be of type 'bytes'"
    elif what in ("float32", "float64"):
        assert isinstance(value, float), f"The '{field}' field must be of type 'float'"
    else:
        low, high = INTEGERS["uint8" if what == "char" else what]
        assert isinstance(value, int) and low <= value < high, f"The '{field}' field must be an integer in its range"


def check(desc, value, field):
    kind, what = desc
    if kind in (Nodetype.BASE, Nodetype.NAME):
        check_one(kind, what[0] if kind == Nodetype.BASE else what, value, field)
        return value
    (element_kind, element), length = what
    name = element[0] if element_kind == Nodetype.BASE else element
    if isinstance(value, array.array):
        assert value.typecode == {"uint8": "B", "float64": "d"}.get(name), f"'{field}': another type code"
        return value
    if kind == Nodetype.ARRAY and isinstance(value, np.ndarray):
        assert value.dtype == np.dtype(name) and value.size == length, f"'{field}': another dtype or size"
        return value
    assert isinstance(value, (Sequence, Set)) and not isinstance(value, str), (
        f"The '{field}' field must be a set or sequence, got {type(value)}"
    )
    assert kind == Nodetype.SEQUENCE or len(value) == length
    for element_value in value:
        check_one(element_kind, name, element_value, field)
    return array.array({"uint8": "B", "float64": "d"}[name], value) if name in ("uint8", "float64") else list(value)


def default(desc):
    kind, what = desc
    if kind == Nodetype.NAME:
        return message_class(what)()
    if kind == Nodetype.BASE:
        return {"string": "", "bool": False, "byte": b"\0", "float32": 0.0, "float64": 0.0}.get(what[0], 0)
    (element_kind, element), length = what
    if kind == Nodetype.ARRAY:
        return [default((element_kind, element))] * length
    return array.array("B") if element[0] == "uint8" and element_kind == Nodetype.BASE else []


def idl_name(desc):
    kind, what = desc
    if kind == Nodetype.BASE:
        return IDL.get(what[0], what[0])
    if kind == Nodetype.NAME:
        return what.replace("/msg/", "/")
    inner = idl_name(what[0])
    return f"sequence<{inner}>" if kind == Nodetype.SEQUENCE else f"{inner}[{what[1]}]"


@cache
def message_class(type_name):
    descs = dict(_fields(type_name))

    class Message:
        def __init__(self, **fields):
            assert all(field in descs for field in fields), f"Invalid arguments passed to constructor: {fields}"
            for field, desc in descs.items():
                setattr(self, field, fields.get(field, default(desc)))

        def __setattr__(self, field, value):
            object.__setattr__(self, field, check(descs[field], value, field))

        @classmethod
        def get_fields_and_field_types(cls):
            return {field: idl_name(desc) for field, desc in descs.items()}

    Message.TYPE = type_name
    return Message


def to_wire(message):
    values = {}
    for field, (kind, what) in _fields(message.TYPE):
        value = getattr(message, field)
        if kind == Nodetype.NAME:
            value = to_wire(value)
        elif kind == Nodetype.BASE and what[0] == "byte":
            value = value[0]
        elif kind in (Nodetype.SEQUENCE, Nodetype.ARRAY) and what[0][0] == Nodetype.NAME:
            value = [to_wire(v) for v in value]
        values[field] = value
    return wire_message(message.TYPE, **values)


def from_wire(type_name, wire):
    values = {}
    for field, (kind, what) in _fields(type_name):
        value = getattr(wire, field)
        if kind == Nodetype.NAME:
            value = from_wire(what, value)
        elif kind == Nodetype.BASE and what[0] == "byte":
            value = bytes([value])
        elif kind in (Nodetype.SEQUENCE, Nodetype.ARRAY) and what[0][0] == Nodetype.NAME:
            value = [from_wire(what[0][1], v) for v in value]
        elif isinstance(value, np.ndarray):
            value = array.array("B", value.tobytes()) if value.dtype == np.uint8 else value.tolist()
        values[field] = value
    return message_class(type_name)(**values)


class SetBool:
    class Request:
        def __init__(self, *, data=False):
            assert isinstance(data, bool)
            self.data = data

    class Response:
        __slots__ = ("_message", "_success")

        def __init__(self):
            self._success, self._message = False, ""

        success = property(lambda self: self._success)
        message = property(lambda self: self._message)

        @success.setter
        def success(self, value):
            assert isinstance(value, bool), "The 'success' field must be of type 'bool'"
            self._success = value

        @message.setter
        def message(self, value):
            assert isinstance(value, str), "The 'message' field must be of type 'str'"
            self._message = value


class ParameterDescriptor:
    def __init__(self, *, description="", read_only=False):
        self.description, self.read_only = description, read_only


class SetParametersResult:
    def __init__(self, *, successful=False, reason=""):
        self.successful, self.reason = successful, reason


# ---- QoS, clocks, context


class ReliabilityPolicy(enum.IntEnum):
    SYSTEM_DEFAULT, RELIABLE, BEST_EFFORT = 0, 1, 2


class DurabilityPolicy(enum.IntEnum):
    SYSTEM_DEFAULT, TRANSIENT_LOCAL, VOLATILE = 0, 1, 2


class HistoryPolicy(enum.IntEnum):
    SYSTEM_DEFAULT, KEEP_LAST, KEEP_ALL = 0, 1, 2


class LivelinessPolicy(enum.IntEnum):
    SYSTEM_DEFAULT, AUTOMATIC = 0, 1


class QoSPolicyKind(enum.IntEnum):
    INVALID, DURABILITY, DEADLINE, LIVELINESS, RELIABILITY = 1, 2, 4, 8, 16


KINDS = {2: QoSPolicyKind.DURABILITY, 8: QoSPolicyKind.LIVELINESS, 11: QoSPolicyKind.RELIABILITY}


class Duration:
    def __init__(self, *, seconds=0, nanoseconds=0):
        self.nanoseconds = int(seconds * 1e9) + nanoseconds


class QoSProfile:
    def __init__(self, *, history, depth, reliability, durability):
        self.history, self.depth = HistoryPolicy(history), int(depth)
        self.reliability, self.durability = ReliabilityPolicy(reliability), DurabilityPolicy(durability)
        self.liveliness, self.liveliness_lease_duration = LivelinessPolicy.SYSTEM_DEFAULT, Duration()

    def to_bus(self):
        lease = self.liveliness_lease_duration.nanoseconds / 1e9 or None
        assert lease is None or self.liveliness == LivelinessPolicy.AUTOMATIC
        latched = self.durability == DurabilityPolicy.TRANSIENT_LOCAL
        return Qos(self.reliability == ReliabilityPolicy.RELIABLE, latched, self.depth, lease)

    @classmethod
    def from_bus(cls, qos):
        made = cls(
            history=HistoryPolicy.KEEP_LAST,
            depth=0,  # discovery does not tell
            reliability=ReliabilityPolicy.RELIABLE if qos.reliable else ReliabilityPolicy.BEST_EFFORT,
            durability=DurabilityPolicy.TRANSIENT_LOCAL if qos.latched else DurabilityPolicy.VOLATILE,
        )
        made.liveliness_lease_duration = Duration(nanoseconds=int(1e9 * qos.lease_s) if qos.lease_s else 2**63 - 1)
        return made


class ClockType(enum.IntEnum):
    ROS_TIME, SYSTEM_TIME, STEADY_TIME = 1, 2, 3


class Clock:
    def __init__(self, *, clock_type=ClockType.SYSTEM_TIME):
        self.clock_type = ClockType(clock_type)

    def now(self):
        read = time.monotonic_ns if self.clock_type == ClockType.STEADY_TIME else time.time_ns
        return types.SimpleNamespace(nanoseconds=read())


class SignalHandlerOptions(enum.Enum):
    NO, SIGINT, SIGTERM, ALL = range(4)


class Context:
    def __init__(self):
        self.domain_id, self._ok = None, False

    def ok(self):
        return self._ok

    def try_shutdown(self):
        self._ok = False


def init(*, args=None, context=None, domain_id=None, signal_handler_options=None):
    assert isinstance(context, Context) and signal_handler_options is SignalHandlerOptions.NO
    context.domain_id = int(os.environ.get("ROS_DOMAIN_ID", "0")) if domain_id is None else domain_id
    context._ok = True


class InvalidParameterTypeException(Exception):
    pass


class ExternalShutdownException(Exception):
    pass


def ros_arguments(flag):
    """Return {name: text} of `--ros-args -p name:=text` or of `-r from:=to`."""
    words = sys.argv[sys.argv.index("--ros-args") :] if "--ros-args" in sys.argv else []
    return dict(b.split(":=", 1) for a, b in pairwise(words) if a == flag)


# ---- events, the lifecycle node, the executor


class PublisherEventCallbacks:
    def __init__(self, *, deadline=None, liveliness=None, incompatible_qos=None, use_default_callbacks=True):
        self.incompatible_qos = incompatible_qos


class SubscriptionEventCallbacks:
    def __init__(
        self, *, deadline=None, incompatible_qos=None, liveliness=None, message_lost=None, use_default_callbacks=True
    ):
        self.incompatible_qos, self.liveliness = incompatible_qos, liveliness


class TransitionCallbackReturn(enum.Enum):
    SUCCESS, FAILURE, ERROR = range(3)


class Wire(DdsBus):
    """The DDS underneath: what it hears becomes work of the executor."""

    def wait(self, seconds):
        if seconds > 0:
            self._waitset.wait(int(seconds * 1e9))
        for subscription in list(self._subscriptions):
            self._dispatch(subscription)
        for timer in self._timers:
            timer.dispatch(self.steady())

    def _report(self, mine, verb, others, other_verb, policy):
        kind = KINDS.get(policy, QoSPolicyKind.INVALID)
        mine.fake_event(types.SimpleNamespace(total_count_change=1, last_policy_kind=kind))

    def forget(self, made, entity):
        if made in self._subscriptions:
            self._subscriptions.remove(made)
            self._waitset.detach(made.condition)
            made.condition.__del__()
        else:
            self._publishers.remove(made)
            made.closed = True
        entity.__del__()


class LifecyclePublisher:
    def __init__(self, inner, kind):
        self._inner, self._kind, self._enabled = inner, kind, False

    is_activated = property(lambda self: self._enabled)

    def on_activate(self, state):
        self._enabled = True
        return TransitionCallbackReturn.SUCCESS

    def on_deactivate(self, state):
        self._enabled = False
        return TransitionCallbackReturn.SUCCESS

    def publish(self, msg):
        if self._enabled:
            if not isinstance(msg, self._kind):
                raise TypeError(f"Expected {self._kind}, got {type(msg)}")
            self._inner.publish(to_wire(msg))


class Logger:
    def __init__(self, name):
        self._name, self._severities = name, {}

    def _log(self, severity, text):
        assert isinstance(text, str)
        caller = sys._getframe(2)
        line = (caller.f_code.co_filename, caller.f_lineno)
        if self._severities.setdefault(line, severity) != severity:
            raise ValueError("Logger severity cannot be changed between calls.")
        print(f"[{severity}] [{self._name}]: {text}", file=sys.stderr, flush=True)

    def info(self, text):
        self._log("INFO", text)

    def warning(self, text):
        self._log("WARN", text)

    def error(self, text):
        self._log("ERROR", text)


class LifecycleNode:
    def __init__(self, node_name, *, enable_communication_interface=True, context=None):
        assert isinstance(context, Context) and context.ok(), "rclpy.init() first"
        self._remaps, self._parameters = ros_arguments("-r"), {}
        self._name = self._remaps.pop("__node", node_name)
        self._wire = Wire(self._name, context.domain_id)
        self._work, self._timers, self._services, self._on_set = deque(), [], {}, []
        self._managed_entities, self._logger, self.state = set(), Logger(self._name), "unconfigured"
        self._lock = threading.Lock()

    # transitions: where from, callback, where to after success and after failure
    def _change(self, before, callback, success, failure):
        if self.state not in before:
            raise RuntimeError(
                f"Failed to trigger lifecycle state machine transition: {self.state} is none of {before}"
            )
        first = self.state
        try:
            result = callback(types.SimpleNamespace(label=first))
        except Exception:
            result = TransitionCallbackReturn.ERROR
        if result == TransitionCallbackReturn.ERROR:
            self.on_error(None)
        self.state = success if result == TransitionCallbackReturn.SUCCESS else failure
        return result

    def trigger_configure(self):
        return self._change(("unconfigured",), self.on_configure, "inactive", "unconfigured")

    def trigger_activate(self):
        return self._change(("inactive",), self.on_activate, "active", "inactive")

    def trigger_deactivate(self):
        return self._change(("active",), self.on_deactivate, "inactive", "active")

    def trigger_cleanup(self):
        return self._change(("inactive",), self.on_cleanup, "unconfigured", "inactive")

    def trigger_shutdown(self):
        return self._change(("unconfigured", "inactive", "active"), self.on_shutdown, "finalized", self.state)

    def on_activate(self, state):
        for entity in self._managed_entities:
            entity.on_activate(state)
        return TransitionCallbackReturn.SUCCESS

    def on_deactivate(self, state):
        for entity in self._managed_entities:
            entity.on_deactivate(state)
        return TransitionCallbackReturn.SUCCESS

    # endpoints
    def create_lifecycle_publisher(self, msg_type, topic, qos_profile, *, event_callbacks=None):
        assert isinstance(qos_profile, QoSProfile)
        inner = self._wire.publisher(self.resolve_topic_name(topic), msg_type.TYPE, qos_profile.to_bus())
        inner.fake_event = lambda event: self._work.append(lambda: event_callbacks.incompatible_qos(event))
        made = LifecyclePublisher(inner, msg_type)
        self._managed_entities.add(made)
        return made

    def destroy_lifecycle_publisher(self, publisher):
        self._managed_entities.discard(publisher)
        self._wire.forget(publisher._inner, publisher._inner.writer)

    def create_subscription(self, msg_type, topic, callback, qos_profile, *, event_callbacks=None):
        assert isinstance(qos_profile, QoSProfile)

        def heard(wire):
            made = from_wire(msg_type.TYPE, wire)
            self._work.append(lambda: callback(made))

        name = self.resolve_topic_name(topic)
        self._wire.subscribe(name, msg_type.TYPE, qos_profile.to_bus(), heard)
        made = self._wire._subscriptions[-1]
        made.fake_event = lambda event: self._work.append(lambda: event_callbacks.incompatible_qos(event))
        made.on_liveliness = lambda alive: self._work.append(
            lambda: event_callbacks.liveliness(types.SimpleNamespace(alive_count=alive))
        )
        return made

    def destroy_subscription(self, subscription):
        self._wire.forget(subscription, subscription.reader)

    def create_timer(self, timer_period_sec, callback, callback_group=None, clock=None):
        assert isinstance(timer_period_sec, float) and clock.clock_type == ClockType.STEADY_TIME
        made = types.SimpleNamespace(
            period=timer_period_sec, callback=callback, next=time.monotonic() + timer_period_sec
        )
        self._timers.append(made)
        return made

    def destroy_timer(self, timer):
        self._timers.remove(timer)

    def create_service(self, srv_type, srv_name, callback):
        self._services[srv_name] = (srv_type, callback)
        return srv_name

    def destroy_service(self, service):
        del self._services[service]

    def fake_call(self, name, request):
        """Answer as a client would see it."""
        srv_type, callback = self._services[name]
        assert isinstance(request, srv_type.Request)
        return callback(request, srv_type.Response())

    # graph
    def resolve_topic_name(self, topic, *, only_expand=False):
        return self._remaps.get(topic, topic)

    def get_publishers_info_by_topic(self, topic_name):
        return self._info(self._wire._writers, topic_name)

    def get_subscriptions_info_by_topic(self, topic_name):
        return self._info(self._wire._readers, topic_name)

    def _info(self, directory, topic):
        return [
            types.SimpleNamespace(node_name=w.node, topic_type=w.type, qos_profile=QoSProfile.from_bus(w.qos))
            for w in self._wire._endpoints(directory, topic)
        ]

    def get_node_names(self):
        return [self._wire._node_of(key) for key in self._wire._participants.alive()]

    def get_name(self):
        return self._name

    def get_clock(self):
        return Clock(clock_type=ClockType.SYSTEM_TIME)

    def get_logger(self):
        return self._logger

    # parameters
    def has_parameter(self, name):
        return name in self._parameters

    def declare_parameter(self, name, value, descriptor):
        assert isinstance(descriptor, ParameterDescriptor) and isinstance(value, (bool, int, float, str))
        text = ros_arguments("-p").get(name)
        if text is not None:
            given = text
            with contextlib.suppress(ValueError):
                given = json.loads(text)
            if type(given) is not type(value):
                raise InvalidParameterTypeException(f"{name}: {type(value)}, {type(given)}")
            value = given
        self._parameters[name] = value
        return self.get_parameter(name)

    def get_parameter(self, name):
        return types.SimpleNamespace(name=name, value=self._parameters[name])

    def add_on_set_parameters_callback(self, callback):
        self._on_set.append(callback)

    def set_parameters(self, parameters):
        results = []
        for parameter in parameters:
            result = next((r for r in (f([parameter]) for f in self._on_set) if not r.successful), None)
            results.append(result or SetParametersResult(successful=True))
            if result is None:
                self._parameters[parameter.name] = parameter.value
        return results

    def destroy_node(self):
        self._wire.close()


class SingleThreadedExecutor:
    def __init__(self, *, context=None):
        self._context, self._nodes = context, []

    def add_node(self, node):
        self._nodes.append(node)
        return True

    def spin_once(self, timeout_sec=None):
        """Run one callback, or none after the timeout."""
        if not self._context.ok():
            raise ExternalShutdownException()
        (node,) = self._nodes
        end = math.inf if timeout_sec is None else time.monotonic() + timeout_sec
        while True:
            now = time.monotonic()
            due = next((t for t in node._timers if now >= t.next), None)
            if due is not None:
                due.next += due.period * (1 + (now - due.next) // due.period)
                return due.callback()
            if node._work:
                return node._work.popleft()()
            first = min((t.next for t in node._timers), default=math.inf)
            node._wire.wait(max(0.0, min(first, end, now + 0.02) - now))
            if time.monotonic() >= end and not node._work:
                return None

    def shutdown(self, timeout_sec=None):
        return True


# ---- putting it in place


def modules():
    """Return {name: module}: rclpy and the message packages."""
    names = {
        "rclpy": {"init": init},
        "rclpy.clock": {"Clock": Clock, "ClockType": ClockType},
        "rclpy.context": {"Context": Context},
        "rclpy.duration": {"Duration": Duration},
        "rclpy.event_handler": {
            "PublisherEventCallbacks": PublisherEventCallbacks,
            "SubscriptionEventCallbacks": SubscriptionEventCallbacks,
        },
        "rclpy.exceptions": {"InvalidParameterTypeException": InvalidParameterTypeException},
        "rclpy.executors": {
            "ExternalShutdownException": ExternalShutdownException,
            "SingleThreadedExecutor": SingleThreadedExecutor,
        },
        "rclpy.lifecycle": {"LifecycleNode": LifecycleNode, "TransitionCallbackReturn": TransitionCallbackReturn},
        "rclpy.qos": {
            "DurabilityPolicy": DurabilityPolicy,
            "HistoryPolicy": HistoryPolicy,
            "LivelinessPolicy": LivelinessPolicy,
            "QoSProfile": QoSProfile,
            "ReliabilityPolicy": ReliabilityPolicy,
            "qos_policy_name_from_kind": lambda kind: QoSPolicyKind(kind).name,
        },
        "rclpy.signals": {"SignalHandlerOptions": SignalHandlerOptions},
        "std_srvs.srv": {"SetBool": SetBool},
        "rcl_interfaces.msg": {"ParameterDescriptor": ParameterDescriptor, "SetParametersResult": SetParametersResult},
    }
    for type_name in TYPES.fielddefs:
        package, _, name = type_name.split("/")
        if package != "rcl_interfaces":
            names.setdefault(f"{package}.msg", {})[name] = message_class(type_name)
    made = {}
    for name, values in {**{key: {} for key in PACKAGES}, **names}.items():
        made[name] = types.ModuleType(name, "a fake, for tests")
        made[name].__dict__.update(values)
    for name, module in made.items():
        if "." in name:
            setattr(made[name.split(".")[0]], name.split(".")[1], module)
    return made


OURS = ("robot_io.bus_rclpy", "robot_io.node_rclpy")


def install():
    """Put the fake in place, for the life of a process.

    Raises:
        RuntimeError: there is a real one.
    """
    if importlib.util.find_spec("rclpy") is not None:
        raise RuntimeError("there is a real rclpy: no need to fake one")
    sys.modules.update(modules())


@contextlib.contextmanager
def installed():
    """Have the fake in place for a while."""
    before = set(sys.modules)
    install()
    try:
        yield
    finally:
        for name in (*modules(), *OURS):
            if name not in before:
                sys.modules.pop(name, None)
