"""ROS 2 bags (MCAP and SQLite): streams at their own rates -> episodes at the stamps of a camera.

Names: a camera is the topic `/<camera>/image_raw` (or `/<camera>/image_raw/compressed`, `/<camera>/compressed`);
others by `-o cameras=NAME:TOPIC,...`; the only camera of both needs no equal names. The state is `/joint_states`, the
action `/joint_command` (JointTrajectory: its first point; JointState; or Float64MultiArray, which has no names), the
instruction `/instruction` (String, latched); others by `-o state= action= instruction=`. Joints are matched by name:
their order is `-o joints=`, else the names of the embodiment's fields where all have size 1, else that of the command.
The embodiment's fields take them one after the other: their positions; for gripper_effort the effort, where a message
has any; for joint_velocity the velocities, from the first joint on again.

Time: header stamps, in the order of the clock that made them; a message without a header counts at its log time. The
first camera sets the frames; every other stream gives its nearest message within half a frame (`-o slop=`), nothing is
interpolated. An episode ends where frames are more than 0.5 s apart, where the instruction changes, where the clock
jumps back and where data is lost; an instruction that is sent again unchanged ends none. Frames that another stream
does not cover are left out and counted; more than 0.5 s of them, and every damaged part of a file, are rejections of
their own, so that the account of `dita convert` shows them.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from dita.datasets.convert.bags import (
    Bag,
    Fault,
    Message,
    Storage,
    Topic,
    find_bags,
    inflate_message,
    open_storage,
)
from dita.datasets.convert.base import (
    Item,
    Options,
    Refused,
    Rejected,
    check_inside,
    check_pixels,
    check_size,
    fit_spec,
    match_cameras,
    padded,
    refuse_to_guess,
    reject,
    reorder,
    to_si,
)
from dita.datasets.convert.pictures import decode_picture, picture_size
from dita.types import EmbodimentSpec, Episode, FieldSpec
from robot_io.messages import ARRAY, IMAGE, JOINT_STATE, JOINT_TRAJECTORY, STRING, image_from_ros

OPTIONS = {
    "cameras": "NAME:TOPIC,... of type Image or CompressedImage",
    "state": "topic of the joint states (/joint_states)",
    "action": "topic of the command (/joint_command): JointTrajectory, JointState or Float64MultiArray",
    "instruction": "topic of the instruction (/instruction), a String",
    "joints": "names of the state's joints, in the order of the embodiment's fields",
    "action_joints": "names of the command's joints, where they are not the state's",
    "slop": "seconds between a frame and what belongs to it (half a frame)",
    "clock": "header (default) or log: which stamps to go by",
}
COMPRESSED = "sensor_msgs/msg/CompressedImage"
PICTURES = (IMAGE, COMPRESSED)
ACTIONS = (JOINT_TRAJECTORY, JOINT_STATE, ARRAY)
GAP = 500_000_000  # [ns] between frames that ends an episode
SKEW = 50_000_000  # [ns] likewise, worth a warning
TWO_CLOCKS = 500_000_000  # [ns] between the delays of two streams, header to log
SUFFIXES = ("/image_raw/compressed", "/image_raw", "/image/compressed", "/compressed", "/image")
ADVICE = "restore the file from a copy, or --quarantine to write what is left"


@cache
def _typestore() -> Any:
    """Return the standard message types; those that a bag brings along are code from outside and stay unread."""
    from rosbags.typesys import Stores, get_typestore

    return get_typestore(Stores.ROS2_HUMBLE)


def deserialize(data: bytes, kind: str) -> Any:
    """Decode one CDR message of a standard type.

    Raises:
        ValueError: the bytes are no such message.
    """
    try:
        return _typestore().deserialize_cdr(data, kind)
    except Exception as e:  # rosbags' generated code meets damage with whatever comes first
        raise ValueError(f"{kind} that does not parse: {type(e).__name__} {e}") from None


def header_stamp(data: bytes) -> int:
    """Return the stamp [ns] of a message that begins with a Header, without decoding the rest.

    Raises:
        ValueError: too short.
    """
    if len(data) < 12:
        raise ValueError(f"a message of {len(data)} bytes has no header")
    seconds, nanoseconds = struct.unpack_from("<iI" if data[1] & 1 else ">iI", data, 4)
    return seconds * 10**9 + nanoseconds


# --- streams


@dataclass
class Stream:
    """One topic's messages in the order of writing."""

    topic: str
    order: list[int] = field(default_factory=list)  # running number over the bag
    log: list[int] = field(default_factory=list)  # [ns]
    stamp: list[int] = field(default_factory=list)  # [ns]; 0: the header was never filled in
    place: list[tuple[int, tuple[int, int]]] = field(default_factory=list)  # cameras: file, place in it
    value: list[Any] = field(default_factory=list)  # others: what they say
    bad: list[str] = field(default_factory=list)  # what did not parse


@dataclass(frozen=True)
class Joints:
    """One joint message: names, and values by quantity; a missing quantity is an empty row."""

    names: tuple[str, ...]
    position: np.ndarray
    velocity: np.ndarray
    effort: np.ndarray


def joints_of(data: bytes, kind: str) -> Joints:
    """Read a joint state or command.

    Raises:
        ValueError: it does not parse, or is a trajectory without points.
    """
    message = deserialize(data, kind)
    if kind == ARRAY:
        values = np.asarray(message.data, float)
        return Joints((), values, values, values)
    if kind == JOINT_STATE:
        return Joints(
            tuple(message.name), *(np.asarray(getattr(message, q)) for q in ("position", "velocity", "effort"))
        )
    if not message.points:
        raise ValueError("a JointTrajectory without points")
    point = message.points[0]
    values = (np.asarray(getattr(point, q)) for q in ("positions", "velocities", "effort"))
    return Joints(tuple(message.joint_names), *values)


@dataclass
class Recording:
    """One bag, indexed: small messages decoded, pictures by their place."""

    bag: Bag
    types: dict[str, Topic]
    pictures: dict[str, Stream]  # by topic
    state: Stream
    action: Stream
    instruction: Stream
    cuts: list[tuple[int, Fault]]  # (order of the next message, what is lost)
    knows_texts: bool  # no instruction is among what is lost
    notes: list[str] = field(default_factory=list)
    cameras: dict[str, Stream] = field(default_factory=dict)  # by our names

    @property
    def file(self) -> str:
        """Where it begins, for errors."""
        return str(self.bag.files[0])


def picture_message_size(message: Any, file: str, key: str) -> tuple[int, int]:
    """Return (height, width) of an Image or CompressedImage.

    Raises:
        Rejected: E_SCHEMA: not a picture; E_PATH: too large to be a frame.
    """
    if not hasattr(message, "encoding"):
        return picture_size(message.data.tobytes(), file, key)
    check_pixels(message.width, message.height, file, key)
    return message.height, message.width


def camera_name(topic: str) -> str:
    """Name the camera of a picture topic: /hand/image_raw/compressed -> hand."""
    for suffix in SUFFIXES:
        topic = topic.removesuffix(suffix)
    return topic.strip("/").replace("/", "_")


def name_cameras(recording: Recording, spec: EmbodimentSpec | None, chosen: str | None) -> dict[str, Stream]:
    """Return camera name -> its stream; of a raw and a compressed stream of one camera the raw one.

    Raises:
        Refused: E_KEY: a chosen topic has no pictures.
    """
    types = recording.types
    topics = sorted((t for t in types if types[t].type in PICTURES), key=lambda t: (types[t].type != IMAGE, len(t), t))
    if chosen:
        named = match_cameras(spec, topics, chosen, recording.file)
        found = {camera_name(name) if name == topic else name: topic for name, topic in named.items()}
    else:
        every = {camera_name(t): t for t in reversed(topics) if "depth" not in t.lower()}
        found = {name: every[key] for name, key in match_cameras(spec, sorted(every)).items()}
    return {name: recording.pictures.get(topic, Stream(topic)) for name, topic in found.items()}


def index(bag: Bag, asked: Mapping[str, str]) -> Recording:
    """Read a bag once from front to back.

    Args:
        bag: what to read.
        asked: the source's options.

    Raises:
        Rejected: a file of it is no bag at all.
    """
    state, action = asked.get("state", "/joint_states"), asked.get("action", "/joint_command")
    instruction = asked.get("instruction", "/instruction")
    pictures: dict[str, Stream] = {}
    small = {topic: Stream(topic) for topic in (state, action, instruction)}
    types: dict[str, Topic] = {}
    cuts: list[tuple[int, Fault]] = []
    counts = dict(bag.counts)
    count, checked = 0, True
    for number, path in enumerate(bag.files):
        try:
            storage = open_storage(path)
        except Rejected as e:
            if len(bag.files) == 1:
                raise
            cuts.append((count, Fault(e.code, path.name, e.expected, e.found)))
            continue
        try:
            for message in storage.messages():
                if isinstance(message, Fault):
                    cuts.append((count, message._replace(where=f"{path.name}: {message.where}")))
                    continue
                kind = storage.topics[message.topic].type
                if kind in PICTURES:
                    stream = pictures.setdefault(message.topic, Stream(message.topic))
                    _add(stream, message, kind, count, bag.compressed, place=(number, message.place))
                elif message.topic in small:
                    _add(small[message.topic], message, kind, count, bag.compressed)
                count += 1
            types |= storage.topics
            if len(bag.files) == 1:
                counts = counts or storage.counts
            checked &= storage.checked
        finally:
            storage.close()
    if bag.expected is not None and not cuts and count != bag.expected:
        cuts.append((count, Fault("E_TRUNCATED", "metadata.yaml", f"{bag.expected} messages", f"{count}")))
    texts = small[instruction]
    knows_texts = not cuts or counts.get(instruction) == len(texts.order)
    found = Recording(bag, types, pictures, small[state], small[action], texts, cuts, knows_texts)
    found.notes += bag.notes
    if odd := [f"{topic} ({t.type})" for topic, t in types.items() if t.type not in _typestore().types]:
        found.notes.append(f"topics of unknown types are left out: {', '.join(sorted(odd)[:10])}")
    if not checked:
        found.notes.append("some of its messages have no checksum, so damage inside them cannot be seen")
    return found


def _add(
    stream: Stream,
    message: Message,
    kind: str,
    order: int,
    compressed: bool,
    place: tuple[int, tuple[int, int]] | None = None,
) -> None:
    try:
        data = inflate_message(message.data) if compressed else message.data
        stamp = message.log if kind in (ARRAY, STRING) else header_stamp(data)
        value: Any = None
        if kind == STRING:
            value = " ".join(deserialize(data, kind).data.split())
        elif kind in ACTIONS:
            value = joints_of(data, kind)
    except ValueError as e:
        stream.bad.append(f"message {len(stream.order) + len(stream.bad)}: {e}")
        return
    stream.order.append(order)
    stream.log.append(message.log)
    stream.stamp.append(stamp)
    stream.value.append(value)
    if place is not None:
        stream.place.append(place)


# --- time: pure functions on stamps


@dataclass(frozen=True)
class Piece:
    """Consecutive frames of the first camera: an episode, or what is lost and why."""

    frames: tuple[int, ...]  # indices into the first camera's stream
    text: str  # instruction; empty: none was sent
    lost: str  # empty: an episode


def split_clock(stamp: Int64[np.ndarray, "n"], gap: int = GAP) -> Int64[np.ndarray, "n"]:
    """Number the spans between backward jumps of a clock by more than `gap`; a little disorder is none."""
    if not len(stamp):
        return np.zeros(0, np.int64)
    out, high, session = np.zeros(len(stamp), np.int64), stamp[0], 0
    for i, t in enumerate(stamp.tolist()):
        if t < high - gap:
            session, high = session + 1, t
        high = max(high, t)
        out[i] = session
    return out


def nearest(
    wanted: Int64[np.ndarray, "n"], have: Int64[np.ndarray, "m"], slop: int
) -> tuple[Int64[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
    """Return for each wanted stamp the index of the nearest one and whether it is within the slop; any order."""
    if not len(have):
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
    order = np.argsort(have, kind="stable")
    ordered = have[order]
    right = np.clip(np.searchsorted(ordered, wanted), 0, len(have) - 1)
    left = np.maximum(right - 1, 0)
    best = np.where(np.abs(ordered[left] - wanted) <= np.abs(ordered[right] - wanted), left, right)
    return order[best], np.abs(ordered[best] - wanted) <= slop


def split_episodes(
    stamp: Int64[np.ndarray, "n"],
    session: Int64[np.ndarray, "n"],
    text: Sequence[str],
    missing: Sequence[str],
    gap: int = GAP,
) -> tuple[list[Piece], list[str]]:
    """Cut frames into episodes.

    Args:
        stamp: of every frame [ns].
        session: frames of different sessions never belong together.
        text: the instruction in force at every frame.
        missing: per frame the streams that do not cover it; empty where all do.
        gap: longest time between frames of one episode [ns].

    Returns:
        Episodes and lost parts in order, and notes on what was sorted or left out.
    """
    pieces: list[Piece] = []
    notes: list[str] = []
    doubles = swaps = left_out = 0
    for number in np.unique(session):
        own = np.flatnonzero(session == number)
        ordered = own[np.argsort(stamp[own], kind="stable")]
        swaps += int((ordered != own).sum())
        keep = np.concatenate([[True], np.diff(stamp[ordered]) > 0])
        doubles += int((~keep).sum())
        for stretch in _stretches(ordered[keep], stamp, text, gap):
            found, dropped = _covered(stretch, stamp, text, missing, gap)
            pieces += found
            left_out += dropped
    if swaps:
        notes.append(f"{swaps} frames were out of order and are sorted by their stamps")
    if doubles:
        notes.append(f"{doubles} frames with the stamp of the one before are left out")
    if left_out:
        what = ", ".join(sorted({m for m in missing if m}))
        notes.append(f"{left_out} frames are left out: nothing near enough on {what}")
    return pieces, notes


def _stretches(frames: np.ndarray, stamp: np.ndarray, text: Sequence[str], gap: int) -> list[list[int]]:
    out: list[list[int]] = []
    for frame in frames.tolist():
        if not out or stamp[frame] - stamp[out[-1][-1]] > gap or text[frame] != text[out[-1][-1]]:
            out.append([])
        out[-1].append(frame)
    return out


def _covered(
    stretch: list[int], stamp: np.ndarray, text: Sequence[str], missing: Sequence[str], gap: int
) -> tuple[list[Piece], int]:
    """Cut a stretch where other streams fail for longer than `gap`; return also how many frames were left out."""
    pieces: list[Piece] = []
    held: list[int] = []  # uncovered frames since the last covered one
    episode: list[int] = []
    dropped = 0

    def close_hole(until: int | None) -> None:
        nonlocal dropped, held, episode
        if not held:
            return
        begin = stamp[episode[-1]] if episode else stamp[held[0]]
        end = stamp[until] if until is not None else stamp[held[-1]]
        if end - begin > gap or (until is None and not episode):
            if episode:
                pieces.append(Piece(tuple(episode), text[stretch[0]], ""))
                episode = []
            pieces.append(Piece(tuple(held), text[stretch[0]], missing[held[0]]))
        else:
            dropped += len(held)
        held = []

    for frame in stretch:
        if missing[frame]:
            held.append(frame)
        else:
            close_hole(frame)
            episode.append(frame)
    close_hole(None)
    if episode:
        pieces.append(Piece(tuple(episode), text[stretch[0]], ""))
    return pieces, dropped


def check_clocks(streams: Sequence[Stream], file: str) -> list[str]:
    """Refuse streams whose headers come from two clocks, E_STAMP; return notes where they may.

    A header's clock is known by its delay to the recorder's: the median over a stream.
    """
    delays = {s.topic: int(np.median(np.array(s.log) - np.array(s.stamp))) for s in streams if s.order}
    if delays and max(delays.values()) - min(delays.values()) > TWO_CLOCKS:
        found = ", ".join(f"{t} {d / 1e9:.3f} s" for t, d in delays.items())
        todo = "synchronise the hosts and record again; or go by the time of recording: -o clock=log"
        expected = f"delays from header to log within {TWO_CLOCKS / 1e9} s of each other"
        raise Rejected("E_STAMP", file, "", "clock", expected, found, todo)
    if delays and max(delays.values()) - min(delays.values()) > SKEW:
        text = ", ".join(f"{t} {d / 1e9:.3f} s" for t, d in delays.items())
        return [f"delays from header to log differ: {text}; are the hosts' clocks synchronised?"]
    return []


# --- the source


@dataclass(frozen=True, eq=False)
class Plan:
    """A bag's episodes, and per frame of the first camera which message of each stream belongs to it."""

    recording: Recording
    pieces: list[Piece]
    stamp: Int64[np.ndarray, "n"]  # [ns]
    match: Mapping[str, Int64[np.ndarray, "n"]]  # topic -> index into its stream
    notes: list[str]
    hz: float


class McapSource:
    """One bag or a folder of them."""

    def __init__(self, path: Path, embodiment: EmbodimentSpec | None, options: Options) -> None:
        """Use `open_source`."""
        self.warnings: list[str] = []
        self._path = path
        self._asked = dict(options.extra)
        self._options = options
        if (clock := self._asked.get("clock", "header")) not in ("header", "log"):
            raise ValueError(f"-o clock={clock}: header or log")
        self._slop = None if "slop" not in self._asked else _seconds(self._asked["slop"])
        self._bags = {bag.name: bag for bag in find_bags(path)}
        self._plan = lru_cache(maxsize=2)(self._make_plan)
        self._storage: dict[Path, Storage] = {}
        self._given = embodiment
        try:
            self._fit(self._first_plan(), embodiment)
        except BaseException:
            self.close()
            raise

    def _fit(self, first: Plan, embodiment: EmbodimentSpec | None) -> None:
        """Find joints, cameras' sizes and rate in the first bag that can be used."""
        if embodiment is None:
            raise self._refuse(first)
        self._joints, self._action_joints = self._choose_joints(first.recording, embodiment)
        sizes = {name: self._camera_size(first.recording, name) for name in self._needed(first.recording)}
        absent = {name: (0, 0) for name in first.recording.cameras if name not in sizes}
        rate = self._options.control_hz or embodiment.control_hz
        rate = rate if abs(first.hz / rate - 1) < 0.1 else first.hz  # jitter is no other rate
        self.spec, notes = fit_spec(embodiment, sizes | absent, rate, given=True, file=self._path)
        self.warnings += notes

    def items(self) -> list[Item]:
        """List every episode of every bag, and one item for each part that is lost: reading it says why."""
        items: list[Item] = []
        root = self._path if self._path.is_dir() else self._path.parent
        for name, bag in self._bags.items():
            file = bag.files[0].relative_to(root).as_posix()
            try:
                plan = self._plan(name)
            except Rejected:
                items.append(Item(f"{padded(name)}/damaged", file, f"{name}|bag|0"))
                continue
            self.warnings += [f"{name}: {note}" for note in plan.notes]
            items += [Item(f"{padded(name)}/{i:06d}", file, f"{name}|piece|{i}") for i in range(len(plan.pieces))]
            items += [
                Item(f"{padded(name)}/lost-{i:06d}", file, f"{name}|cut|{i}") for i in range(len(plan.recording.cuts))
            ]
        return items

    def read(self, item: Item) -> Episode:
        """Read one episode.

        Raises:
            Rejected: it is a lost part, or a message in it does not decode.
        """
        name, what, number = str(item.key).rsplit("|", 2)
        plan = self._plan(name)
        if what == "cut":
            fault = plan.recording.cuts[int(number)][1]
            raise reject(fault.code, item, fault.where, fault.expected, fault.found, ADVICE)
        piece = plan.pieces[int(number)]
        if piece.lost:
            first, last = (plan.stamp[piece.frames[i]] / 1e9 for i in (0, -1))
            found = f"none for {len(piece.frames)} frames from {first:.6f} to {last:.6f} s"
            raise reject("E_STAMP", item, piece.lost, "a message near every frame", found, ADVICE)
        instruction = self._options.require_instruction(item.file, piece.text)
        frames = np.array(piece.frames)
        recording = plan.recording
        state = self._values(recording.state, plan, frames, self.spec.state, self._joints, item)
        action = self._values(recording.action, plan, frames, self.spec.action, self._action_joints, item)
        return Episode(
            images={c.name: self._pictures(plan, c.name, frames, (c.height, c.width), item) for c in self.spec.cameras},
            state=to_si(state, self.spec.state),
            action=to_si(action, self.spec.action),
            stamp=plan.stamp[frames] / 1e9,
            instruction=instruction,
            success=None,
            source=item.id,
        )

    def close(self) -> None:
        """Close the files."""
        for storage in self._storage.values():
            storage.close()
        self._storage.clear()

    # --- opening

    def _first_plan(self) -> Plan:
        """Return the first bag that can be used; where none can, say why of the first."""
        error: Rejected | None = None
        for name in self._bags:
            try:
                return self._plan(name)
            except Rejected as e:
                error = error or e
        assert error is not None
        raise error

    def _needed(self, recording: Recording) -> list[str]:
        cameras = recording.cameras
        return list(cameras) if self._given is None else [c.name for c in self._given.cameras if c.name in cameras]

    def _make_plan(self, name: str) -> Plan:
        """Index a bag and cut it into episodes.

        Raises:
            Rejected: a topic is missing or of another type, two clocks, or no bag at all.
        """
        bag = self._bags[name]
        for path in bag.files:
            check_inside(self._path if self._path.is_dir() else self._path.parent, path)
        recording = index(bag, self._asked)
        recording.cameras = name_cameras(recording, self._given, self._asked.get("cameras"))
        try:
            cameras = self._cameras(recording)
            self._check_topics(recording, cameras)
        except Rejected as e:
            if not recording.cuts:
                raise
            fault = recording.cuts[0][1]  # why it lacks something
            found = f"{fault.found}, and the rest has no {e.key}"
            raise Rejected(fault.code, recording.file, "", fault.where, fault.expected, found, ADVICE) from None
        main, *others = (recording.cameras[c] for c in cameras)
        streams = [*others, recording.state, recording.action]
        notes = [*recording.notes, *_clock_notes([main, *streams], self._asked.get("clock", "header"))]
        notes += check_clocks([main, *streams], recording.file)
        stamp = np.array(main.stamp)
        period = float(np.median(np.diff(np.sort(stamp)))) if len(stamp) > 1 else 0.0
        slop = int(period / 2 if self._slop is None else self._slop * 1e9)
        session, others_session = split_sessions(main, streams, [at for at, _ in recording.cuts])
        match, missing = _match(stamp, session, streams, others_session, slop)
        texts = _texts(recording, main.order)
        pieces, more = split_episodes(stamp, session, texts, missing)
        notes += more
        for stream in (main, *streams, recording.instruction):
            if stream.bad:
                notes.append(f"{stream.topic}: {len(stream.bad)} messages left out, the first: {stream.bad[0]}")
        late = sum(int((np.diff(stamp[list(p.frames)]) > 1.5 * period).sum()) for p in pieces if not p.lost)
        if late:
            notes.append(
                f"{main.topic}: {late} frames come more than 1.5 periods after the one before: some were dropped"
            )
        match[main.topic] = np.arange(len(stamp))
        return Plan(recording, pieces, stamp, match, notes, 1e9 / period if period else 0.0)

    def _cameras(self, recording: Recording) -> list[str]:
        """Return the cameras to read, the one that sets the frames first."""
        cameras = recording.cameras
        if self._given is not None and (absent := [c.name for c in self._given.cameras if c.name not in cameras]):
            have = ", ".join(f"{n} ({s.topic})" for n, s in cameras.items()) or "none"
            todo = "rename the embodiment's cameras, or -o cameras=NAME:TOPIC"
            raise Rejected("E_KEY", recording.file, "", "cameras", ", ".join(absent), f"only {have}", todo)
        names = self._needed(recording)
        if not names:
            found = ", ".join(f"{t} ({k.type})" for t, k in recording.types.items()) or "no topics"
            raise Rejected("E_KEY", recording.file, "", "cameras", f"a topic of {' or '.join(PICTURES)}", found, ADVICE)
        return names

    def _check_topics(self, recording: Recording, cameras: Sequence[str]) -> None:
        file, needed = recording.file, [recording.cameras[c] for c in cameras]
        wanted: list[tuple[str, Stream, tuple[str, ...]]] = [("cameras", stream, PICTURES) for stream in needed]
        wanted += [("state", recording.state, (JOINT_STATE,)), ("action", recording.action, ACTIONS)]
        if recording.instruction.topic in recording.types:
            wanted.append(("instruction", recording.instruction, (STRING,)))
        for option, stream, kinds in wanted:
            topic, todo = stream.topic, f"name another topic: -o {option}=TOPIC"
            if topic not in recording.types:
                have = ", ".join(f"{t} ({k.type})" for t, k in sorted(recording.types.items())) or "no topics"
                raise Rejected("E_KEY", file, "", topic, "the topic", f"only {have}", todo)
            kind, encoding = recording.types[topic]
            if kind not in kinds or encoding != "cdr":
                found = f"{kind} in {encoding}"
                raise Rejected("E_DTYPE", file, "", topic, f"{' or '.join(kinds)} in cdr", found, todo)
            if not stream.order:
                raise Rejected("E_EMPTY", file, "", topic, "messages", f"none ({len(stream.bad)} do not parse)", todo)

    def _choose_joints(self, recording: Recording, spec: EmbodimentSpec) -> tuple[list[str], list[str]]:
        """Return the joints of state and action, in the order of the embodiment's fields."""
        state, action = recording.state.value[0].names, recording.action.value[0].names
        out = []
        for group, fields, own in (("joints", spec.state, state), ("action_joints", spec.action, action)):
            named = [f.name for f in fields]
            if group in self._asked or (group == "action_joints" and "joints" in self._asked):
                joints = [n.strip() for n in self._asked.get(group, self._asked.get("joints", "")).split(",")]
            elif all(f.size == 1 for f in fields) and own and set(named) <= set(own):
                joints = named
            else:
                joints = list(action or state)
            for width in _joint_counts(fields):
                if width != len(joints):
                    expected = f"{width} joints: {', '.join(f'{f.name}[{f.size}]' for f in fields)}"
                    found = f"{len(joints)}: {', '.join(joints)}"
                    todo = f"say which in the order of the fields: -o {group}=NAME,..."
                    raise Refused("E_JOINTS", recording.file, "", group, expected, found, todo)
            out.append(joints)
        if action and set(action) >= set(out[1]) and [n for n in state if n in out[0]] != out[0]:
            # positions of the two lists differ: say how they are put together
            pairs = ", ".join(f"{n} = {list(state).index(n)}" for n in out[0] if n in state)
            self.warnings.append(f"{recording.state.topic} has its joints in another order, matched by name: {pairs}")
        if not action:
            self.warnings.append(
                f"{recording.action.topic} names no joints: they are taken in the order {', '.join(out[1])}"
            )
        return out[0], out[1]

    def _refuse(self, plan: Plan) -> Rejected:
        recording = plan.recording
        told = {
            "fields, units and limits of the state": f"joints {', '.join(recording.state.value[0].names)}",
            "fields of the action": f"{recording.action.topic}, {recording.types[recording.action.topic].type}",
            "cameras": ", ".join(f"{n} = {s.topic}" for n, s in recording.cameras.items()),
            "the rate": f"{plan.hz:.3g} Hz",
        }
        return refuse_to_guess("a bag", self._path, told)

    # --- reading

    def _fetch(self, recording: Recording, place: tuple[int, tuple[int, int]]) -> bytes:
        path = recording.bag.files[place[0]]
        if path not in self._storage:
            self.close()  # one file at a time: episodes are read in order
            self._storage[path] = open_storage(path)
        data = self._storage[path].fetch(place[1])
        return inflate_message(data) if recording.bag.compressed else data

    def _camera_size(self, recording: Recording, name: str) -> tuple[int, int]:
        """Return (height, width) of a camera's first message that tells it."""
        stream = recording.cameras[name]
        for place in stream.place[:100]:
            try:
                message = deserialize(self._fetch(recording, place), recording.types[stream.topic].type)
                return picture_message_size(message, recording.file, stream.topic)
            except (ValueError, Rejected):
                continue
        found = f"none in {min(len(stream.place), 100)} messages"
        raise Rejected("E_SCHEMA", recording.file, "", stream.topic, "a picture", found, ADVICE)

    def _pictures(self, plan: Plan, name: str, frames: np.ndarray, size: tuple[int, int], item: Item) -> np.ndarray:
        recording, stream = plan.recording, plan.recording.cameras[name]
        check_size((len(frames), *size, 3), 1, item.file, stream.topic)
        out = np.empty((len(frames), *size, 3), np.uint8)
        for i, message in enumerate(plan.match[stream.topic][frames].tolist()):
            where = f"{stream.topic} message {message}"
            try:
                data = self._fetch(recording, stream.place[message])
                picture = deserialize(data, recording.types[stream.topic].type)
                if (found := picture_message_size(picture, item.file, where)) != size:
                    expected, what = f"{size[1]} x {size[0]} pixels", f"{found[1]} x {found[0]}"
                    raise reject("E_SCHEMA", item, where, expected, what, "write its sizes into stores of their own")
                is_raw = hasattr(picture, "encoding")
                out[i] = image_from_ros(picture) if is_raw else decode_picture(picture.data.tobytes(), item.file, where)
            except ValueError as e:
                if isinstance(e, Rejected):
                    raise
                raise reject("E_SCHEMA", item, where, "a picture that decodes", str(e), ADVICE) from None
        return out

    def _values(
        self, stream: Stream, plan: Plan, frames: np.ndarray, fields: Sequence[FieldSpec], joints: list[str], item: Item
    ) -> np.ndarray:
        rows = [stream.value[i] for i in plan.match[stream.topic][frames].tolist()]
        columns: dict[tuple[str, ...], list[int]] = {}
        out = np.empty((len(rows), sum(f.size for f in fields)))
        for i, row in enumerate(rows):
            if row.names not in columns:
                columns[row.names] = self._columns(row, joints, stream.topic, item)
            out[i] = _row(row, columns[row.names], fields, stream.topic, i, item)
        return out

    def _columns(self, row: Joints, joints: list[str], topic: str, item: Item) -> list[int]:
        if not row.names:  # a plain array: its order is all there is
            return list(range(len(joints)))
        return reorder(joints, row.names, item.file, topic)


def _row(
    row: Joints, columns: list[int], fields: Sequence[FieldSpec], topic: str, frame: int, item: Item
) -> np.ndarray:
    """Return one message's values as the fields take them."""
    taken = {False: 0, True: 0}  # joints used up, by whether velocities are asked for
    parts = []
    for f in fields:
        fast, quantity = f.kind == "joint_velocity", _quantity(f, row)
        values = getattr(row, quantity)
        if len(values) != len(row.names or columns):
            expected, todo = f"one {quantity} for each of {len(row.names or columns)} joints", "correct or remove it"
            raise reject("E_JOINTS", item, f"{topic}, frame {frame}", expected, f"{len(values)}", todo)
        parts.append(values[columns[taken[fast] : taken[fast] + f.size]])
        taken[fast] += f.size
    return np.concatenate(parts)


def _quantity(f: FieldSpec, row: Joints) -> str:
    if f.kind == "gripper_effort" and len(row.effort):
        return "effort"
    return "velocity" if f.kind == "joint_velocity" else "position"


def _joint_counts(fields: Sequence[FieldSpec]) -> set[int]:
    """Return how many joints the fields take: velocities are of the same joints once more."""
    fast = sum(f.size for f in fields if f.kind == "joint_velocity")
    return {fast, sum(f.size for f in fields) - fast} - {0}


def _texts(recording: Recording, order: Sequence[int]) -> list[str]:
    """Return the instruction in force when each frame was written; unknown where lost data may have changed it."""
    sent = np.array(recording.instruction.order, np.int64)
    last = np.searchsorted(sent, order, side="right") - 1
    texts = [recording.instruction.value[i] if i >= 0 else "" for i in last.tolist()]
    if recording.knows_texts or not len(sent):
        return texts
    cuts = [at for at, _ in recording.cuts]
    before_frame, before_text = (np.searchsorted(cuts, at, side="right") for at in (order, sent[np.maximum(last, 0)]))
    return [text if same else "" for text, same in zip(texts, before_frame == before_text, strict=True)]


def split_sessions(
    main: Stream, others: Sequence[Stream], cuts: Sequence[int]
) -> tuple[Int64[np.ndarray, "n"], list[Int64[np.ndarray, "m"]]]:
    """Number what belongs together, in order of writing: a jump back of the main clock and lost data begin anew.

    Args:
        main: the stream that sets the frames.
        others: what is paired with it.
        cuts: running numbers of the messages before which data is lost.

    Returns:
        The session of every message of `main`, and of each other stream.
    """
    order, stamp = np.array(main.order), np.array(main.stamp)
    lost, jumps = np.searchsorted(cuts, order, side="right"), split_clock(stamp)
    begins = np.flatnonzero((np.diff(lost) > 0) | (np.diff(jumps) > 0)) + 1  # frames that open a session
    turns = [cuts[lost[i] - 1] if lost[i] > lost[i - 1] else order[i] for i in begins.tolist()]
    out = []
    for stream in others:
        there, when = np.array(stream.order), np.array(stream.stamp)
        own = np.searchsorted(turns, there, side="right")
        for number, i in enumerate(begins.tolist()):
            if lost[i] > lost[i - 1]:
                continue
            # between the last frame of the old clock and the first of the new one: by the nearer stamp
            between = (there > order[i - 1]) & (there < order[i])
            nearer = np.abs(when - stamp[i]) < np.abs(when - stamp[i - 1])
            own[between & nearer] = number + 1
        out.append(own)
    return np.searchsorted(turns, order, side="right"), out


def _match(
    stamp: np.ndarray, session: np.ndarray, streams: Sequence[Stream], sessions: Sequence[np.ndarray], slop: int
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Find for every frame each stream's nearest message of the same session; say which streams have none."""
    match: dict[str, np.ndarray] = {}
    missing = [""] * len(stamp)
    for stream, own in zip(streams, sessions, strict=True):
        found = match[stream.topic] = np.zeros(len(stamp), np.int64)
        there = np.array(stream.stamp)
        for number in np.unique(session):
            frames, here = np.flatnonzero(session == number), np.flatnonzero(own == number)
            nearby, near = nearest(stamp[frames], there[here], slop)
            found[frames] = here[nearby] if len(here) else 0
            for frame in frames[~near].tolist():
                missing[frame] = missing[frame] or stream.topic
    return match, missing


def _clock_notes(streams: Sequence[Stream], clock: str) -> list[str]:
    """Choose the clock of every stream, in place; return notes on headers that nobody filled in."""
    notes = []
    for stream in streams:
        if clock == "header" and stream.stamp and not any(stream.stamp):
            notes.append(f"{stream.topic}: its headers have no stamps, so the time of recording counts")
        if clock == "log" or not any(stream.stamp):
            stream.stamp = list(stream.log)
    return notes


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < 10:
        raise ValueError(f"-o slop={text}: a number of seconds between 0 and 10")
    return value


def open_source(path: Path, embodiment: EmbodimentSpec | None, options: Options) -> McapSource:
    """Open a bag file, a bag folder or a folder of bags.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: an option that makes no sense.
        Rejected: no bag can be used (the first one's reason), or no embodiment was given.
    """
    return McapSource(path, embodiment, options)
