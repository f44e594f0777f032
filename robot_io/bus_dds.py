"""Join a ROS 2 graph with two wheels, cyclonedds and rosbags, and no ROS installed.

Wire rules (ROS 2 design, "Topic and Service name mapping"; rmw_cyclonedds): topic `rt/<name>`, type
`pkg::msg::dds_::Type_`, plain CDR (XCDR1), final structs, the type's RIHS01 hash in USER_DATA.
"""

import os
import re
import sys
import threading
import time
from functools import lru_cache
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Type

import numpy as np
from cyclonedds.builtin import (
    BuiltinDataReader,
    BuiltinTopic,
    BuiltinTopicDcpsParticipant,
    BuiltinTopicDcpsPublication,
    BuiltinTopicDcpsSubscription,
)
from cyclonedds.core import (
    DDSException,
    GuardCondition,
    InstanceState,
    ReadCondition,
    SampleState,
    ViewState,
    WaitSet,
)
from cyclonedds.core import Qos as DdsQos
from cyclonedds.domain import Domain, DomainParticipant
from cyclonedds.idl import IdlStruct, make_idl_struct, types
from cyclonedds.internal import InvalidSample
from cyclonedds.pub import DataWriter
from cyclonedds.qos import Policy
from cyclonedds.sub import DataReader
from cyclonedds.topic import Topic
from cyclonedds.util import duration
from rosbags.interfaces import Nodetype
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from robot_io.bus import STATE, Clock, Qos, Stopper, Timer, TypeWatch, Writer, wait_for_writer

TYPES = get_typestore(Stores.ROS2_JAZZY)
# not among the common interfaces (https://github.com/ros-controls/control_msgs)
TYPES.register(get_types_from_msg("float64 position\nfloat64 max_effort\n", "control_msgs/msg/GripperCommand"))

# A killed node is forgotten after 3 s, so that a new guard does not take its predecessor for a second commander.
XML = """<CycloneDDS><Domain Id="any">
<General>{general}</General>
<Discovery>{discovery}<SPDPInterval>1s</SPDPInterval><LeaseDuration>3s</LeaseDuration></Discovery>
<Internal><SocketReceiveBufferSize max="4MB"/>{internal}</Internal>
<Tracing><Verbosity>severe</Verbosity><OutputFile>stderr</OutputFile></Tracing>
</Domain></CycloneDDS>"""
# Fragments just below a loopback datagram and a large receive buffer: a VGA image is 15 fragments, none lost.
LOOPBACK = (
    '<Interfaces><NetworkInterface name="lo"/></Interfaces><AllowMulticast>false</AllowMulticast>'
    "<MaxMessageSize>65500B</MaxMessageSize><FragmentSize>63000B</FragmentSize>"
)
INDEX = "<ParticipantIndex>auto</ParticipantIndex><MaxAutoParticipantIndex>31</MaxAutoParticipantIndex>"
REMAP = re.compile(r"/[\w/]+:=/[\w/]+")
RANGES = ("LOCALHOST", "SUBNET")
ADDRESS = re.compile(r"[0-9A-Za-z.:%_-]+")
LOSS = "DITA_TEST_LOSS_PERMILLE"  # tests only: of the packets that this process sends, so many are lost


def network_of(
    discovery: Optional[str] = None, peers: Optional[Sequence[str]] = None, interface: str = "", loss_permille: int = 0
) -> str:
    """Return CycloneDDS's configuration; what is not given comes from ROS 2's own environment variables.

    Args:
        discovery: LOCALHOST (one machine, or with peers several) or SUBNET (multicast).
        peers: addresses of the other machines: unicast. Loopback has no multicast, and multicast beside unicast finds
            nobody, so one excludes the other.
        interface: a network interface's name; empty: the one that CycloneDDS finds.
        loss_permille: tests only, see `open_bus`.

    Raises:
        ValueError: another range, peers together with SUBNET, an address that is none.
    """
    variables = os.environ
    discovery = discovery or variables.get("ROS_AUTOMATIC_DISCOVERY_RANGE") or "LOCALHOST"
    if peers is None:
        peers = [peer.strip() for peer in variables.get("ROS_STATIC_PEERS", "").split(";") if peer.strip()]
    loss = loss_permille or int(variables.get(LOSS, "0"))
    if discovery not in RANGES:
        raise ValueError(f"discovery range {discovery!r} is not known here; there are {', '.join(RANGES)}")
    if peers and discovery == "SUBNET":
        raise ValueError(
            f"discovery range SUBNET is multicast, the peers {', '.join(peers)} are unicast, and both together find "
            "nobody: leave out the peers, or use LOCALHOST, which with peers reaches just these machines"
        )
    bad = [text for text in (*peers, interface) if text and not ADDRESS.fullmatch(text)]
    if bad or not 0 <= loss <= 1000:
        raise ValueError(f"not an address, an interface or a loss of 0 to 1000 per mille: {bad or loss}")
    named = f'<Interfaces><NetworkInterface name="{interface}"/></Interfaces>' if interface else ""
    internal = f"<Test><XmitLossiness>{loss}</XmitLossiness></Test>" if loss else ""
    if discovery == "SUBNET":
        return XML.format(general=f"{named}<AllowMulticast>true</AllowMulticast>", discovery="", internal=internal)
    listed = "".join(f'<Peer address="{peer}"/>' for peer in ("127.0.0.1", *peers))
    general = f"{named}<AllowMulticast>false</AllowMulticast>" if peers else LOOPBACK
    return XML.format(general=general, discovery=f"{INDEX}<Peers>{listed}</Peers>", internal=internal)


BASE = {
    "bool": bool,
    "byte": types.byte,
    "char": types.uint8,  # ROS 2's char is an unsigned byte
    "string": str,
    **{name: getattr(types, name) for name in ("int8", "int16", "int32", "int64", "float32", "float64")},
    **{name: getattr(types, name) for name in ("uint8", "uint16", "uint32", "uint64")},
}
DTYPES = {name: np.dtype(name) for name in BASE if name not in ("bool", "byte", "char", "string")}
DTYPES.update(bool=np.dtype(bool), byte=np.dtype(np.uint8), char=np.dtype(np.uint8))

POLICIES = {2: "durability", 11: "reliability", 8: "liveliness lease", 23: "data representation"}
LOOK_S = 1.0  # how often writers are compared by type, which costs more [s]
POLL_S = 0.05  # how often mismatches and live writers are looked at [s]
_domains: Dict[int, Tuple[Domain, str]] = {}


@lru_cache(maxsize=None)
def _struct(type: str) -> Type[IdlStruct]:
    """Build the IDL struct of a message: it gives a topic its name and type information.

    Its serialiser is rosbags', 300 times faster for an image than a plain `sequence[uint8]`; arrays are NumPy views
    on the received bytes.
    """
    package, _, name = type.split("/")
    fields = {field: _annotation(desc) for field, desc in _fields(type)}
    TYPES.get_msgdef(type)  # compiles the serialiser; the first message would, for 50 ms in the middle of ticks
    struct: Any = make_idl_struct(f"{name}_", f"{package}.msg.dds_.{name}_", fields, dataclassify=False)
    struct.__init__ = lambda self, message: setattr(self, "message", message)
    struct.serialize = lambda self, **_: _padded(TYPES.serialize_cdr(self.message, type))
    struct.deserialize = staticmethod(lambda data, **_: _decode(data, type))
    struct.deserialize_key = staticmethod(lambda data, **_: None)  # of the sample that says that a writer left
    return struct


def _padded(data: Any) -> bytes:
    """Return bytes in whole words, as the writer wants them: of an image, each copy more costs 50 us."""
    return b"".join((data, bytes(-len(data) % 4)))


class _Unreadable:
    """Bytes that are no message; raising instead would lose the messages that are taken with it."""

    def __init__(self, error: Exception) -> None:
        self.error = error


def _decode(data: Any, type: str) -> Any:
    try:
        return TYPES.deserialize_cdr(data, type)
    except Exception as e:  # whatever the decoder says
        return _Unreadable(e)


def _fields(type: str) -> List[Tuple[str, Any]]:
    if type not in TYPES.fielddefs:
        raise ValueError(f"no message type {type!r} in ROS 2 Jazzy's common interfaces")
    # an empty IDL struct is illegal: ROS 2 puts this byte in
    return TYPES.fielddefs[type][1] or [("structure_needs_at_least_one_member", (Nodetype.BASE, ("uint8", 0)))]


def _annotation(desc: Any) -> Any:
    kind, what = desc
    if kind == Nodetype.BASE:
        return BASE[what[0]]
    if kind == Nodetype.NAME:
        return _struct(what)
    element, length = what
    if kind == Nodetype.ARRAY:
        return types.array[_annotation(element), length]
    return types.sequence[_annotation(element), length] if length else types.sequence[_annotation(element)]


@lru_cache(maxsize=None)
def _plan(type: str) -> Tuple[Any, Dict[str, Callable[[], Any]], Dict[str, Callable[[Any], Any]]]:
    """Return a type's class, what makes the default of each field, and what converts a value, where something does."""
    fields = _fields(type)
    converters = {name: convert for name, desc in fields if (convert := _converter(desc)) is not None}
    return TYPES.types[type], {name: _default(desc) for name, desc in fields}, converters


def _converter(desc: Any) -> Optional[Callable[[Any], Any]]:
    if desc[0] not in (Nodetype.SEQUENCE, Nodetype.ARRAY) or desc[1][0][0] != Nodetype.BASE:
        return None
    dtype = DTYPES.get(desc[1][0][1][0])
    return list if dtype is None else (lambda value: np.ascontiguousarray(value, dtype))


def _default(desc: Any) -> Callable[[], Any]:
    kind, what = desc
    if kind == Nodetype.BASE:
        return str if what[0] == "string" else (lambda: DTYPES[what[0]].type(0).item())
    if kind == Nodetype.NAME:
        return lambda: message(what)
    (element_kind, element), length = what
    if element_kind == Nodetype.BASE and element[0] in DTYPES:
        dtype, empty = DTYPES[element[0]], np.zeros(0, DTYPES[element[0]])
        return (lambda: np.zeros(length, dtype)) if kind == Nodetype.ARRAY else (lambda: empty)
    return list


def message(type: str, **fields: Any) -> Any:
    """Build a rosbags message; fields left out are zero, sequences of numbers become arrays.

    Raises:
        ValueError: an unknown type or field.
    """
    build, defaults, converters = _plan(type)  # a chunk has 80 messages within: this must be quick
    for name, convert in converters.items():
        if name in fields:
            fields[name] = convert(fields[name])
    if fields.keys() != defaults.keys():
        fields = {**{name: default() for name, default in defaults.items() if name not in fields}, **fields}
    if len(fields) > len(defaults):
        unknown = ", ".join(sorted(fields.keys() - defaults.keys()))
        raise ValueError(f"{type} has no field {unknown}; it has {', '.join(defaults)}")
    return build(**fields)


@lru_cache(maxsize=None)
def _hash(type: str) -> str:
    return TYPES.hash_rihs01(type)


def _dds_qos(qos: Qos, type: str) -> DdsQos:
    policies = [
        Policy.Reliability.Reliable(duration(milliseconds=100)) if qos.reliable else Policy.Reliability.BestEffort,
        Policy.Durability.TransientLocal if qos.latched else Policy.Durability.Volatile,
        Policy.History.KeepLast(qos.depth),
        Policy.DataRepresentation(use_cdrv0_representation=True, use_xcdrv2_representation=False),
        Policy.Userdata(f"typehash={_hash(type)};".encode()),
    ]
    if qos.latched:  # or a late joiner gets one message whatever the depth
        policies.append(Policy.DurabilityService(0, Policy.History.KeepLast(qos.depth), -1, -1, -1))
    if qos.lease_s is not None:
        policies.append(Policy.Liveliness.Automatic(int(qos.lease_s * 1e9)))
    return DdsQos(*policies)


def _from_dds_qos(dds: DdsQos) -> Qos:
    policies = {policy.__scope__: policy for policy in dds}
    lease = getattr(policies.get("Liveliness"), "lease_duration", None)
    return Qos(
        reliable=isinstance(policies.get("Reliability"), Policy.Reliability.Reliable),
        latched=policies.get("Durability") == Policy.Durability.TransientLocal,
        depth=getattr(policies.get("History"), "depth", 1),
        lease_s=None if lease is None or lease >= 2**62 else lease / 1e9,
    )


class DdsPublisher:
    """Writes rosbags messages to one topic."""

    def __init__(self, writer: DataWriter, topic: str, type: str, qos: Qos) -> None:
        self.writer, self.topic, self.type, self.qos = writer, topic, type, qos
        self.sample, self.closed = _struct(type), False

    def publish(self, message: Any) -> None:
        """Send one message; after the bus's end there is nobody to send it to."""
        try:
            self.writer.write(self.sample(message))  # pyright: ignore[reportCallIssue]
        except DDSException:
            if not self.closed:  # another thread may be in here while the bus leaves
                raise


class _Subscription:
    def __init__(self, reader: DataReader, topic: str, type: str, qos: Qos, callback: Callable[[Any], None]) -> None:
        self.reader, self.topic, self.type, self.qos, self.callback = reader, topic, type, qos, callback
        self.condition = ReadCondition(reader, ViewState.Any | SampleState.NotRead | InstanceState.Any)
        self.alive, self.unreadable = 0, 0
        self.on_liveliness: Optional[Callable[[int], None]] = None

    def take(self) -> List[Any]:
        # an InvalidSample says that a writer left
        return [s for s in self.reader.take(N=self.qos.depth) if not isinstance(s, InvalidSample)]


class DdsBus:
    """A node on CycloneDDS. Implements `robot_io.bus.Bus`."""

    def __init__(
        self,
        name: str,
        domain_id: int,
        clock: Optional[Clock] = None,
        network: Optional[str] = None,
        remap: Sequence[str] = (),
    ) -> None:
        """Join the graph; `network` is from `network_of`, `remap` has "/FROM:=/TO".

        Raises:
            ValueError: this process is on that domain already, with another network; a remap that is none.
        """
        wrong = [text for text in remap if not REMAP.fullmatch(text)]
        if wrong:
            raise ValueError(f"a topic is remapped by /FROM:=/TO, got {', '.join(wrong)}")
        self._remap = {before: after for before, after in (text.split(":=") for text in remap)}
        network = network or network_of()
        if domain_id not in _domains:
            _domains[domain_id] = (Domain(domain_id, network), network)
        elif _domains[domain_id][1] != network:
            raise ValueError(f"this process is on domain {domain_id} with another discovery, peers or loss already")
        self.name, self.domain_id, self.clock = name, domain_id, clock or Clock()
        self.now, self.steady = self.clock.now, self.clock.steady
        self._participant = DomainParticipant(domain_id, qos=DdsQos(Policy.EntityName(name)))
        self._participants = _Directory(self._participant, BuiltinTopicDcpsParticipant)
        self._writers = _Directory(self._participant, BuiltinTopicDcpsPublication)
        self._readers = _Directory(self._participant, BuiltinTopicDcpsSubscription)
        self._waitset = WaitSet(self._participant)
        self._wake = GuardCondition(self._participant)  # ends a wait in `spin` from any thread
        self._waitset.attach(self._wake)
        self._topics: Dict[Tuple[str, str], Topic] = {}
        self._publishers: List[DdsPublisher] = []
        self._subscriptions: List[_Subscription] = []
        self._stopper = Stopper(self.log)
        self._timers: List[Timer] = []
        self.timer(POLL_S * self.clock.rate, self._poll)
        self.timer(LOOK_S * self.clock.rate, self._look)
        self._types = TypeWatch(name)
        self._mismatch: Callable[[str], None] = lambda text: self.log("error", text)
        self._closed = False
        self._running = threading.Event()
        self._running.set()

    @property
    def running(self) -> bool:
        """Return whether nobody has called `shutdown` yet."""
        return self._running.is_set()

    msg = staticmethod(message)

    def publisher(self, topic: str, type: str, qos: Qos) -> DdsPublisher:
        """Offer `topic`."""
        writer = DataWriter(self._participant, self._topic(topic, type), qos=_dds_qos(qos, type))
        self._publishers.append(DdsPublisher(writer, topic, type, qos))
        return self._publishers[-1]

    def subscribe(self, topic: str, type: str, qos: Qos, callback: Callable[[Any], None], urgent: bool = True) -> None:
        """Call `callback(message)` for every message on `topic`; what is not urgent ends no wait of `spin`."""
        reader = DataReader(self._participant, self._topic(topic, type), qos=_dds_qos(qos, type))
        subscription = _Subscription(reader, topic, type, qos, callback)
        if urgent:
            self._waitset.attach(subscription.condition)
        self._subscriptions.append(subscription)

    def timer(self, period_s: float, callback: Callable[[], None]) -> None:
        """Call `callback` every `period_s` of the bus's clock."""
        self._timers.append(Timer(period_s, lambda: self._stopper.call(callback), self.steady()))

    def param(self, name: str, default: Any) -> Any:
        """Return the default: without ROS, parameters are the node's own arguments."""
        return default

    def log(self, level: str, text: str) -> None:
        """Write one line to stderr."""
        print(f"[{self.name}] {level}: {text}", file=sys.stderr, flush=True)

    def spin(self, timeout_s: Optional[float] = None) -> None:
        """Run callbacks until `shutdown`, or for `timeout_s` of real time."""
        end = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        while self._running.is_set() and time.monotonic() < min(end, self._stopper.deadline):
            wait = min((timer.next - self.steady()) / self.clock.rate for timer in self._timers)
            wait = min(wait, end - time.monotonic())
            if wait > 0:
                self._waitset.wait(int(wait * 1e9))
            for subscription in self._subscriptions:
                self._dispatch(subscription)
            for timer in self._timers:
                timer.dispatch(self.steady())
        if time.monotonic() >= self._stopper.deadline:
            self.shutdown()
        if not self._running.is_set():
            self._stopper.finish()

    def _dispatch(self, subscription: _Subscription) -> None:
        for sample in subscription.take():
            if isinstance(sample, _Unreadable):  # nothing that somebody sends may end a node
                subscription.unreadable += 1
                if subscription.unreadable in (1, 10, 100, 1000):
                    n, topic = subscription.unreadable, subscription.topic
                    text = f"{n} message{'s' * (n > 1)} on {topic} cannot be read as {subscription.type}"
                    self.log("error", f"{text}: {sample.error}")
            else:
                self._stopper.call(subscription.callback, sample)

    def shutdown(self) -> None:
        """Let `spin` return."""
        self._running.clear()
        self._wake.set(True)

    def close(self) -> None:
        """Leave the graph now; nothing of this bus may be used after."""
        if self._closed:
            return
        self.shutdown()
        self._closed = True
        for publisher in self._publishers:
            publisher.closed = True
        conditions = [s.condition for s in self._subscriptions]
        endpoints = [p.writer for p in self._publishers] + [s.reader for s in self._subscriptions]
        directories = (self._participants, self._writers, self._readers)
        builtin = [entity for d in directories for entity in (d.changes, d.reader)]
        # What cyclonedds does when the last reference goes, and does once only: others hold some references, and the
        # graph must see us leave now. Children first: a handle that is deleted late may be somebody else's by then.
        everything = (self._waitset, self._wake, *conditions, *endpoints, *builtin, *self._topics.values())
        for entity in (*everything, self._participant):
            entity.__del__()
        self._waitset.attached.clear()

    def writers(self, topic: str) -> List[Writer]:
        """List everybody who offers `topic`, oneself included."""
        return self._endpoints(self._writers, topic)

    def wait_for_writer(self, topic: str, type: str, qos: Qos, timeout_s: float) -> None:
        """Spin until somebody offers `topic` as requested.

        Raises:
            TimeoutError: nobody does; says which topic, type and QoS, after how long, and what is there instead.
        """
        wait_for_writer(
            self, topic, type, qos, timeout_s, lambda: [self._node_of(key) for key in self._participants.alive()]
        )

    def on_qos_mismatch(self, callback: Callable[[str], None]) -> None:
        """Call `callback(text)` when an endpoint of this node and another one do not match."""
        self._mismatch = callback

    def on_liveliness(self, topic: str, callback: Callable[[int], None]) -> None:
        """Call `callback(alive)` when the number of live writers on a subscribed topic changes."""
        found = [s for s in self._subscriptions if s.topic == topic]
        if not found:
            raise ValueError(f"subscribe to {topic} before watching its writers")
        found[0].on_liveliness = callback

    def on_stop(self, callback: Callable[[str], None]) -> None:
        """Call `callback(reason)` when the node must come to rest and leave."""
        self._stopper.callback = callback

    def _topic(self, name: str, type: str) -> Topic:
        key = (name, type)
        if key not in self._topics:
            if not name.startswith("/"):
                raise ValueError(f"topic names are absolute here: /{name}, got {name}")
            self._topics[key] = Topic(self._participant, f"rt{self._remap.get(name, name)}", _struct(type))
        return self._topics[key]

    def _poll(self) -> None:
        for publisher in self._publishers:
            status = publisher.writer.get_offered_incompatible_qos_status()
            if status.total_count_change:
                others = self._endpoints(self._readers, publisher.topic)
                self._report(publisher, "offers", others, "requests", status.last_policy_id)
        for subscription in self._subscriptions:
            status = subscription.reader.get_requested_incompatible_qos_status()
            if status.total_count_change:
                others = self._endpoints(self._writers, subscription.topic)
                self._report(subscription, "requests", others, "offers", status.last_policy_id)
            alive = subscription.reader.get_liveliness_changed_status().alive_count
            if alive != subscription.alive:
                subscription.alive = alive
                if subscription.on_liveliness is not None:
                    self._stopper.call(subscription.on_liveliness, alive)

    def _look(self) -> None:
        for mine in self._subscriptions:
            for text in self._types.look(mine.topic, mine.type, _hash(mine.type), self.writers(mine.topic)):
                self._mismatch(text)

    def _report(self, mine: Any, verb: str, others: List[Writer], other_verb: str, policy: int) -> None:
        if policy not in POLICIES:  # another type, which `TypeWatch` tells
            return
        theirs = "; ".join(f"{w.node} {other_verb} {w.qos}" for w in others if w.qos != mine.qos)
        self._mismatch(
            f"QoS mismatch on {mine.topic} ({POLICIES[policy]}): "
            f"{self.name} {verb} {mine.qos}; {theirs or 'the other end is gone'}. Nothing flows between them"
        )

    def _node_of(self, participant: Any) -> str:
        found = self._participants.alive().get(participant)
        return next((q.name for q in found.qos if q.__scope__ == "EntityName"), str(participant)) if found else "?"

    def _endpoints(self, directory: "_Directory", topic: str) -> List[Writer]:
        name = f"rt{self._remap.get(topic, topic)}"
        found = [e for e in directory.alive().values() if e.topic_name == name]
        return [
            Writer(self._node_of(e.participant_key), _ros_type(e.type_name), _from_dds_qos(e.qos), _type_hash(e.qos))
            for e in found
        ]


class _Directory:
    """What discovery knows of participants, writers or readers; only changes are read, so that asking is cheap."""

    def __init__(self, participant: DomainParticipant, topic: BuiltinTopic) -> None:
        self.reader = BuiltinDataReader(participant, topic)
        self.changes = ReadCondition(self.reader, ViewState.Any | SampleState.NotRead | InstanceState.Any)
        self._alive: Dict[Any, Any] = {}

    def alive(self) -> Dict[Any, Any]:
        """Return {key: what is there}."""
        for sample in self.reader.read(N=1024, condition=self.changes):
            if sample.sample_info.instance_state == InstanceState.Alive:
                self._alive[sample.key] = sample
            else:
                self._alive.pop(sample.key, None)
        return self._alive


def _type_hash(qos: DdsQos) -> str:
    data = next((policy.data for policy in qos if policy.__scope__ == "Userdata"), b"")
    found = re.search(rb"typehash=(\w+)", data)
    return found.group(1).decode() if found else ""


def _ros_type(dds: str) -> str:
    return dds.replace("::dds_::", "/").replace("::", "/").rstrip("_")


def loopback_check(timeout_s: float = 5.0, domain_id: int = 99) -> Optional[str]:
    """Exchange a message between two participants of this process.

    Returns:
        None when it arrived, otherwise the problem in one line.
    """
    try:
        sender, receiver = DdsBus("check_sender", domain_id), DdsBus("check_receiver", domain_id)
    except Exception as e:  # whatever the C library refuses: no loopback, no ports left
        return f"DDS cannot start on loopback: {e}"
    heard: List[str] = []
    receiver.subscribe("/dita/check", "std_msgs/msg/String", STATE, lambda m: heard.append(m.data))
    publisher = sender.publisher("/dita/check", "std_msgs/msg/String", STATE)
    end = time.monotonic() + timeout_s
    while not heard and time.monotonic() < end:
        publisher.publish(message("std_msgs/msg/String", data="hello"))
        receiver.spin(0.02)
    sender.close()
    receiver.close()
    return None if heard else f"no DDS message on loopback within {timeout_s:g} s: is UDP on 127.0.0.1 blocked?"
