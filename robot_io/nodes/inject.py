"""Faults that a simulated driver can be told to have, for rehearsals of preflight and guard; nothing on a real robot.

Orders on /twin/inject, a String of JSON: `{"fault": "camera_delay", "s": 0.1}` begins one, `{"fault": "camera_delay",
"off": true}` ends it, `{"off": true}` ends all. What is active, and why an order was refused, is on /twin/injected.

    fault                 arguments (default)   what the driver then sends
    camera_silent         camera (all)          no picture
    camera_frozen_stamp   camera (all)          the last picture with its old stamp, again and again
    camera_frozen_content camera (all)          the last picture with new stamps
    camera_delay          s, camera (all)       every picture s seconds late
    bgr                   camera (all)          blue for red, still called rgb8
    cameras_swapped                             the first camera's pictures as the second's and the other way round
    stamp_offset          topic, s              stamps that are off; negative: back in time
    rate                  factor, topic (all cameras)  only this share of the messages
    joints_permuted       values (false)        names rotated by one; with `values` the values too, which is harmless
    joints_missing        joint (the first)     one joint less
    joints_extra                                one joint more
    joints_duplicate      joint (the first)     one name twice
    joints_degrees                              the arm's joints in degrees
    pose_mm                                     the tool's position in millimetres
    state_silent                                neither joints nor pose
    gripper_inverted                            a gripper that opens when told to close
    driver_mode           mode                  not a fault of the wire: the arm stops, as with its E-stop pressed
"""

import copy
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Callable, Deque, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from robot_io import messages as m
from robot_io.bus import LATCHED, STATE, Bus, Publisher, Qos
from robot_io.nodes.topics import INJECT, INJECTED, image_topic

FLUSH_S = 0.005  # how finely delays are kept
MODES = ("running", "reduced", "protective_stop", "emergency_stop")
REQUIRED = object()


@dataclass
class Stream:
    """What is sent on one topic."""

    topic: str
    type: str
    publisher: Publisher
    seen: Any = None  # the newest message before any fault
    memory: Dict[str, Any] = field(default_factory=dict)  # of the active faults


Change = Callable[["Faults", Stream, Any, Mapping[str, Any]], Any]  # message -> message, or None: nothing is sent


class Faults:
    """A bus's publishers, with the faults that are active between the node and the wire."""

    def __init__(self, bus: Bus, cameras: Sequence[str], grippers: Sequence[str], enabled: bool) -> None:
        """Listen for orders, if `enabled`.

        Args:
            cameras: names, in the embodiment's order.
            grippers: names among the joint states that are no joints of the arm.
            enabled: without it every message passes unchanged and no topic is offered.
        """
        self.bus, self.cameras, self.grippers, self.enabled = bus, tuple(cameras), set(grippers), enabled
        self.active: Dict[str, Dict[str, Any]] = {}
        self.streams: Dict[str, Stream] = {}
        self._late: Deque[Tuple[float, Stream, Any]] = deque()
        if enabled:
            self._injected = bus.publisher(INJECTED, m.STRING, LATCHED)
            bus.subscribe(INJECT, m.STRING, STATE, self._on_order)
            bus.timer(FLUSH_S, self._flush)
            self._report("")

    def publisher(self, topic: str, type: str, qos: Qos) -> Publisher:
        """Offer `topic`; what is published passes the active faults."""
        publisher = self.bus.publisher(topic, type, qos)
        if not self.enabled:
            return publisher
        self.streams[topic] = Stream(topic, type, publisher)
        return _Faulty(self, self.streams[topic])

    def begin(self, name: Any, **arguments: Any) -> None:
        """Begin a fault, or begin it anew with other arguments.

        Raises:
            ValueError: no such fault or argument, one that is missing, or a value that makes no sense.
        """
        if name not in FAULTS:
            raise ValueError(f"no fault {name!r}; there are {', '.join(FAULTS)}")
        known = FAULTS[name].arguments
        if unknown := sorted(set(arguments) - set(known)):
            raise ValueError(f"{name}: no argument {', '.join(unknown)}; there are {', '.join(known) or 'none'}")
        values = {**known, **arguments}
        if missing := [key for key, value in values.items() if value is REQUIRED]:
            raise ValueError(f"{name}: needs {', '.join(missing)}")
        self._check(name, values)
        self.end(name)
        self.active[name] = values

    def end(self, name: Optional[str] = None) -> None:
        """End one fault, or all; messages that it held back are sent at once."""
        for key in list(self.active) if name is None else [name]:
            self.active.pop(key, None)
            for stream in self.streams.values():
                stream.memory.pop(key, None)
        if "camera_delay" not in self.active:
            self._flush(math.inf)

    def send(self, stream: Stream, message: Any) -> None:
        """Send a message through the active faults."""
        before, stream.seen = stream.seen, message
        for name, values in list(self.active.items()):
            fault = FAULTS[name]
            if fault.change is None or stream.type not in fault.types or not _meant(stream, values):
                continue
            stream.memory.setdefault(name, {"before": before})
            message = fault.change(self, stream, message, values)
            if message is None:
                return
        stream.publisher.publish(message)

    def hold_back(self, stream: Stream, message: Any, seconds: float) -> None:
        """Send a message later."""
        self._late.append((self.bus.steady() + seconds, stream, message))

    def _flush(self, now: Optional[float] = None) -> None:
        now = self.bus.steady() if now is None else now
        while self._late and self._late[0][0] <= now:
            _, stream, message = self._late.popleft()
            stream.publisher.publish(message)

    def _check(self, name: str, values: Mapping[str, Any]) -> None:
        for key in ("s", "factor"):
            value = values.get(key, 0.0)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{name}: {key} must be a number, got {value!r}")
        if name == "rate" and not 0 <= values["factor"] <= 1:
            raise ValueError(f"rate: factor is a share in [0, 1], got {values['factor']}")
        if name == "camera_delay" and not values["s"] >= 0:
            raise ValueError(f"camera_delay: s must not be negative, got {values['s']}")
        if name == "driver_mode" and values["mode"] not in MODES:
            raise ValueError(f"driver_mode: no mode {values['mode']!r}; there are {', '.join(MODES)}")
        if name == "cameras_swapped" and len(self.cameras) < 2:
            raise ValueError(f"cameras_swapped: needs two cameras, there are {', '.join(self.cameras) or 'none'}")
        if values.get("camera") is not None and values["camera"] not in self.cameras:
            raise ValueError(f"{name}: no camera {values['camera']!r}; there are {', '.join(self.cameras)}")
        if values.get("topic") is not None and values["topic"] not in self.streams:
            raise ValueError(f"{name}: no topic {values['topic']!r}; there are {', '.join(self.streams)}")

    def _on_order(self, message: Any) -> None:
        try:
            order = m.json_from_ros(message)
            if not isinstance(order, dict):
                raise ValueError(f"an order is a JSON object, got {order!r}")
            name, off = order.pop("fault", None), order.pop("off", False)
            if off and (order or name not in (None, *FAULTS)):
                raise ValueError(f"off takes the name of a fault or nothing, got {name!r} and {order}")
            if off:
                self.end(name)
            else:
                self.begin(name, **order)
        except ValueError as e:
            self.bus.log("error", f"{INJECT}: {e}")
            self._report(str(e))
        else:
            self._report("")

    def _report(self, error: str) -> None:
        self._injected.publish(m.json_to_ros(self.bus.msg, {"active": self.active, "error": error}))


class _Faulty:
    """The publisher that a node sees."""

    def __init__(self, faults: Faults, stream: Stream) -> None:
        self._faults, self._stream = faults, stream

    def publish(self, message: Any) -> None:
        """Send one message through the active faults."""
        self._faults.send(self._stream, message)


def _meant(stream: Stream, values: Mapping[str, Any]) -> bool:
    """Return whether a fault is about this stream; a fault that names neither camera nor topic is about all."""
    if values.get("camera") is not None:
        return stream.topic == image_topic(values["camera"])
    return values.get("topic") in (None, stream.topic)


def _with(message: Any, **fields: Any) -> Any:
    """Return a message with other fields; the original may be kept by somebody."""
    changed = copy.copy(message)
    for name, value in fields.items():
        setattr(changed, name, value)
    return changed


def _restamped(faults: Faults, message: Any, stamp: float) -> Any:
    return _with(message, header=_with(message.header, stamp=m.stamp_to_ros(faults.bus.msg, stamp)))


def _silent(faults: Faults, stream: Stream, message: Any, values: Mapping[str, Any]) -> Any:
    return None


def _frozen_stamp(faults: Faults, stream: Stream, message: Any, values: Mapping[str, Any]) -> Any:
    memory = stream.memory["camera_frozen_stamp"]
    return memory.setdefault("frozen", message if memory["before"] is None else memory["before"])


def _frozen_content(faults: Faults, stream: Stream, message: Any, values: Mapping[str, Any]) -> Any:
    memory = stream.memory["camera_frozen_content"]
    frozen = memory.setdefault("frozen", message if memory["before"] is None else memory["before"])
    return _with(frozen, header=message.header)


def _delayed(faults: Faults, stream: Stream, message: Any, values: Mapping[str, Any]) -> Any:
    faults.hold_back(stream, message, values["s"])


def _bgr(faults: Faults, stream: Stream, message: Any, values: Mapping[str, Any]) -> Any:
    return _with(message, data=np.ascontiguousarray(m.image_from_ros(message)[..., ::-1]).reshape(-1))


def _swapped(faults: Faults, stream: Stream, message: Any, values: Mapping[str, Any]) -> Any:
    pair = [image_topic(camera) for camera in faults.cameras[:2]]
    if stream.topic not in pair:
        return message
    other = faults.streams[pair[1 - pair.index(stream.topic)]].seen  # of this instant, or of the one before
    if other is None:
        return None
    sizes = {name: getattr(other, name) for name in ("height", "width", "step", "data")}
    return _with(message, **sizes)


def _offset(faults: Faults, stream: Stream, message: Any, values: Mapping[str, Any]) -> Any:
    return _restamped(faults, message, m.stamp_of(message) + values["s"])


def _thinned(faults: Faults, stream: Stream, message: Any, values: Mapping[str, Any]) -> Any:
    if values["topic"] is None and stream.type != m.IMAGE:
        return message
    memory = stream.memory["rate"]
    memory["share"] = memory.get("share", 0.0) + values["factor"]
    if memory["share"] < 1.0 - 1e-9:
        return None
    memory["share"] -= 1.0
    return message


def _renamed(message: Any, names: List[str], rows: Sequence[int]) -> Any:
    """Return a joint state with these names, its values taken from these rows."""
    order = list(rows)
    values = {k: np.asarray(getattr(message, k), float) for k in ("position", "velocity", "effort")}
    return _with(message, name=names, **{k: v[order] for k, v in values.items() if len(v)})


def _permuted(faults: Faults, stream: Stream, message: Any, values: Mapping[str, Any]) -> Any:
    names, rows = list(message.name), list(range(len(message.name)))
    turned = names[1:] + names[:1]
    return _renamed(message, turned, rows[1:] + rows[:1] if values["values"] else rows)


def _row(message: Any, joint: Optional[str]) -> int:
    names = list(message.name)
    return names.index(joint) if joint in names else 0


def _missing(faults: Faults, stream: Stream, message: Any, values: Mapping[str, Any]) -> Any:
    rows = [i for i in range(len(message.name)) if i != _row(message, values["joint"])]
    return _renamed(message, [message.name[i] for i in rows], rows)


def _extra(faults: Faults, stream: Stream, message: Any, values: Mapping[str, Any]) -> Any:
    return _renamed(message, [*message.name, "intruder"], [*range(len(message.name)), 0])


def _duplicate(faults: Faults, stream: Stream, message: Any, values: Mapping[str, Any]) -> Any:
    row = _row(message, values["joint"])
    return _renamed(message, [*message.name, message.name[row]], [*range(len(message.name)), row])


def _degrees(faults: Faults, stream: Stream, message: Any, values: Mapping[str, Any]) -> Any:
    scale = np.array([1.0 if name in faults.grippers else math.degrees(1.0) for name in message.name])
    fields = {k: np.asarray(getattr(message, k), float) for k in ("position", "velocity")}
    return _with(message, **{k: v * scale for k, v in fields.items() if len(v)})


def _millimetres(faults: Faults, stream: Stream, message: Any, values: Mapping[str, Any]) -> Any:
    p = message.pose.position
    return _with(message, pose=_with(message.pose, position=_with(p, x=1e3 * p.x, y=1e3 * p.y, z=1e3 * p.z)))


@dataclass(frozen=True)
class Fault:
    """One way to be wrong."""

    types: Tuple[str, ...]  # of the messages that it changes
    change: Optional[Change]  # None: the node itself asks for it
    arguments: Mapping[str, Any] = field(default_factory=dict)  # name -> default


ONE_CAMERA = {"camera": None}
STATES = (m.JOINT_STATE, m.POSE)
FAULTS: Dict[str, Fault] = {
    "camera_silent": Fault((m.IMAGE,), _silent, ONE_CAMERA),
    "camera_frozen_stamp": Fault((m.IMAGE,), _frozen_stamp, ONE_CAMERA),
    "camera_frozen_content": Fault((m.IMAGE,), _frozen_content, ONE_CAMERA),
    "bgr": Fault((m.IMAGE,), _bgr, ONE_CAMERA),
    "cameras_swapped": Fault((m.IMAGE,), _swapped),
    "camera_delay": Fault((m.IMAGE,), _delayed, {"s": REQUIRED, **ONE_CAMERA}),
    "stamp_offset": Fault((m.IMAGE, *STATES), _offset, {"topic": REQUIRED, "s": REQUIRED}),
    "rate": Fault((m.IMAGE, *STATES), _thinned, {"factor": REQUIRED, "topic": None}),
    "joints_permuted": Fault((m.JOINT_STATE,), _permuted, {"values": False}),
    "joints_missing": Fault((m.JOINT_STATE,), _missing, {"joint": None}),
    "joints_extra": Fault((m.JOINT_STATE,), _extra),
    "joints_duplicate": Fault((m.JOINT_STATE,), _duplicate, {"joint": None}),
    "joints_degrees": Fault((m.JOINT_STATE,), _degrees),
    "pose_mm": Fault((m.POSE,), _millimetres),
    "state_silent": Fault(STATES, _silent),
    "gripper_inverted": Fault((), None),
    "driver_mode": Fault((), None, {"mode": REQUIRED}),
}
