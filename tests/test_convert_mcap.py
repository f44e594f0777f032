"""ROS 2 bags: parity with what rosbags wrote, damaged files, clocks, gaps, joints, and one code per refusal."""

from __future__ import annotations

import hashlib
import json
import shutil
import sqlite3
import struct
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lz4.frame
import numpy as np
import pytest
import simplejpeg
import yaml
import zstandard
from conftest import embodiment_dict
from conftest import field as field_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from rosbags.rosbag2 import CompressionFormat, CompressionMode, StoragePlugin, Writer
from rosbags.typesys import Stores, get_typestore

from dita.datasets.convert import bags, mcap
from dita.datasets.convert.base import Options, Rejected, check
from dita.datasets.convert.run import ConvertConfig, convert
from dita.datasets.store import Store
from dita.embodiment import embodiment_from_dict, embodiment_to_dict
from dita.types import EmbodimentSpec, Episode

REFERENCE = Path(__file__).parents[1] / "../shared/reference/datasets"
TYPES = get_typestore(Stores.ROS2_HUMBLE)
IMAGE, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
JOINTS, TRAJECTORY = "sensor_msgs/msg/JointState", "trajectory_msgs/msg/JointTrajectory"
ARRAY, STRING = "std_msgs/msg/Float64MultiArray", "std_msgs/msg/String"
H, W = 12, 20
START, PERIOD = 1_700_000_000_000_000_000, 50_000_000  # [ns]
NAMES = ("shoulder", "elbow", "wrist", "gripper")


# --- a recorder


@dataclass
class Sent:
    """One message on its way into a bag; `log` is its stamp and 4 ms unless said otherwise."""

    topic: str
    kind: str
    stamp: int
    body: dict[str, Any]
    log: int = field(default=-1)

    def __post_init__(self) -> None:
        self.log = self.stamp + 4_000_000 if self.log < 0 else self.log

    def data(self) -> bytes:
        make = TYPES.types
        body = dict(self.body)
        if self.kind not in (ARRAY, STRING):
            stamp = make["builtin_interfaces/msg/Time"](sec=self.stamp // 10**9, nanosec=self.stamp % 10**9)
            body["header"] = make["std_msgs/msg/Header"](stamp=stamp, frame_id="")
        return bytes(TYPES.serialize_cdr(make[self.kind](**body), self.kind))


def frame(i: int) -> np.ndarray:
    rng = np.random.default_rng(i)
    return np.kron(rng.integers(0, 256, (H // 4, W // 4, 3)), np.ones((4, 4, 1), int)).astype(np.uint8)


def image(i: int, stamp: int, topic: str = "/camera/image_raw", encoding: str = "rgb8") -> Sent:
    pixels = frame(i) if encoding == "rgb8" else np.ascontiguousarray(frame(i)[..., ::-1])
    body = {
        "height": H, "width": W, "encoding": encoding, "is_bigendian": 0, "step": 3 * W,
        "data": pixels.reshape(-1),
    }  # fmt: skip
    return Sent(topic, IMAGE, stamp, body)


def jpeg(i: int, stamp: int, topic: str = "/camera/image_raw/compressed") -> Sent:
    data = np.frombuffer(simplejpeg.encode_jpeg(frame(i), 95, "RGB", "444"), np.uint8)
    return Sent(topic, COMPRESSED, stamp, {"format": "rgb8; jpeg compressed bgr8", "data": data})


def position(i: int) -> np.ndarray:
    return np.array([0.1, 0.2, 0.3, 0.5]) + 0.001 * i


def joints(i: int, stamp: int, names: tuple[str, ...] = NAMES, topic: str = "/joint_states", **changes) -> Sent:
    order = [NAMES.index(n) if n in NAMES else 0 for n in names]
    body = {
        "name": list(names), "position": position(i)[order], "velocity": 10 * position(i)[order],
        "effort": np.zeros(0),
    }  # fmt: skip
    return Sent(topic, JOINTS, stamp, body | changes)


def command(i: int, stamp: int, names: tuple[str, ...] = NAMES) -> Sent:
    order = [NAMES.index(n) for n in names]
    make = TYPES.types
    point = make["trajectory_msgs/msg/JointTrajectoryPoint"](
        positions=position(i + 1)[order], velocities=np.zeros(0), accelerations=np.zeros(0), effort=np.zeros(0),
        time_from_start=make["builtin_interfaces/msg/Duration"](sec=0, nanosec=PERIOD),
    )  # fmt: skip
    return Sent("/joint_command", TRAJECTORY, stamp, {"joint_names": list(names), "points": [point]})


def instruction(text: str, stamp: int) -> Sent:
    return Sent("/instruction", STRING, stamp, {"data": text})


def scene(n: int = 12, start: int = START, first: int = 0, text: str | None = "push it", **joint_args) -> list[Sent]:
    """One episode; the command follows its frame by 9 ms, joint states come at twice the rate."""
    sent = [] if text is None else [instruction(text, start - 20_000_000)]
    for i in range(n):
        stamp = start + i * PERIOD
        sent += [
            joints(first + i, stamp + 1_000_000, **joint_args), image(first + i, stamp),
            command(first + i, stamp + 9_000_000), joints(first + i, stamp + 22_000_000, **joint_args),
        ]  # fmt: skip
    return sent


def record(
    path: Path, sent: list[Sent], storage: str = "mcap", compression: CompressionMode | None = None, split: int = 0
) -> Path:
    """Write a bag with rosbags' own writer."""
    plugin = StoragePlugin.MCAP if storage == "mcap" else StoragePlugin.SQLITE3
    writer = Writer(path, version=9, storage_plugin=plugin)
    if compression is not None:
        writer.set_compression(compression, CompressionFormat.ZSTD)
    with writer:
        known: dict[str, Any] = {}
        for message in sent:
            if message.topic not in known:
                known[message.topic] = writer.add_connection(message.topic, message.kind, typestore=TYPES)
            writer.write(known[message.topic], message.log, message.data())
    return path


def mcap_record(op: int, content: bytes) -> bytes:
    return struct.pack("<BQ", op, len(content)) + content


def text_of(value: str) -> bytes:
    return struct.pack("<I", len(value.encode())) + value.encode()


def chunk(records: bytes, how: str = "", crc: int | None = None, size: int | None = None) -> bytes:
    stored = {"": bytes, "zstd": zstandard.compress, "lz4": lz4.frame.compress}.get(how, bytes)(records)
    head = struct.pack(
        "<QQQI", 0, 0, len(records) if size is None else size, zlib.crc32(records) if crc is None else crc
    )
    return mcap_record(0x06, head + text_of(how) + struct.pack("<Q", len(stored)) + stored)


def channels(sent: list[Sent]) -> tuple[bytes, dict[str, int]]:
    ids = {topic: i for i, topic in enumerate(dict.fromkeys(m.topic for m in sent), 1)}
    kinds = {m.topic: m.kind for m in sent}
    out = b""
    for topic, i in ids.items():
        out += mcap_record(0x03, struct.pack("<H", i) + text_of(kinds[topic]) + text_of("ros2msg") + text_of(""))
        out += mcap_record(0x04, struct.pack("<HH", i, i) + text_of(topic) + text_of("cdr") + text_of(""))
    return out, ids


def packed(sent: list[Sent], ids: dict[str, int]) -> bytes:
    return b"".join(mcap_record(0x05, struct.pack("<HIQQ", ids[m.topic], 0, m.log, m.log) + m.data()) for m in sent)


def write_mcap(
    path: Path,
    sent: list[Sent],
    how: str = "zstd",
    per_chunk: int = 16,
    summary: bool = True,
    instructions: int | None = None,
) -> list[int]:
    """Write an MCAP file with chunk CRCs, which rosbags' writer leaves out; return where the chunks begin."""
    head, ids = channels(sent)
    data, places = bags.MAGIC + mcap_record(0x01, text_of("ros2") + text_of("tests")), []
    for i in range(0, len(sent), per_chunk):
        places.append(len(data))
        data += chunk((head if i == 0 else b"") + packed(sent[i : i + per_chunk], ids), how)
    data += mcap_record(0x0F, struct.pack("<I", zlib.crc32(data)))
    start = len(data) if summary else 0
    data += head if summary else b""
    if instructions is not None:
        counts = {i: sum(m.topic == topic for m in sent) for topic, i in ids.items()}
        counts[ids["/instruction"]] = instructions
        pairs = b"".join(struct.pack("<HQ", i, n) for i, n in counts.items())
        data += mcap_record(0x0B, struct.pack("<QHIIIIQQI", len(sent), 0, 0, 0, 0, 0, 0, 0, len(pairs)) + pairs)
    data += mcap_record(0x02, struct.pack("<QQI", start, 0, 0)) + bags.MAGIC
    path.write_bytes(data)
    return places


# --- a reader


def spec(**changes) -> EmbodimentSpec:
    arm = [field_dict("arm", "joint_position", 3, 0), field_dict("gripper", "gripper_position", 1, 9)]
    values = embodiment_dict() | {
        "state": arm, "action": arm, "control_hz": 20.0, "action_dt": 0.05,
        "cameras": [{"name": "camera", "height": H, "width": W, "slot": 0}],
    }  # fmt: skip
    return embodiment_from_dict(values | changes)


def options(**extra) -> Options:
    return Options(None, None, extra)


@dataclass
class Read:
    """All that a bag gave."""

    source: mcap.McapSource
    found: list[Episode | Rejected]

    @property
    def episodes(self) -> list[Episode]:
        return [e for e in self.found if isinstance(e, Episode)]

    @property
    def rejected(self) -> list[Rejected]:
        return [e for e in self.found if isinstance(e, Rejected)]

    @property
    def lengths(self) -> list[int]:
        return [len(e.stamp) for e in self.episodes]

    @property
    def codes(self) -> list[str]:
        return [e.code for e in self.rejected]

    def says(self, text: str) -> bool:
        return any(text in w for w in self.source.warnings)


def read(path: Path, robot: EmbodimentSpec | None = None, **extra) -> Read:
    source = mcap.open_source(path, robot or spec(), options(**extra))
    found: list[Episode | Rejected] = []
    for item in source.items():
        try:
            episode = source.read(item)
            check(episode, source.spec, item)
            found.append(episode)
        except Rejected as e:
            found.append(e)
    source.close()
    return Read(source, found)


def assert_scene(episode: Episode, n: int = 12, first: int = 0, start: int = START, text: str = "push it") -> None:
    assert episode.instruction == text
    assert np.array_equal(episode.stamp, (start + PERIOD * np.arange(n)) / 1e9)
    assert np.array_equal(episode.images["camera"], [frame(first + i) for i in range(n)])
    assert np.array_equal(episode.state, np.array([position(first + i) for i in range(n)], np.float32))
    assert np.array_equal(episode.action, np.array([position(first + i + 1) for i in range(n)], np.float32))


# --- what is read


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="needs the reference datasets")
@pytest.mark.parametrize("name", ["rosbag2_mcap", "rosbag2_db3"])
def test_equals_the_reference(name: str) -> None:
    expected = json.loads((REFERENCE / name / "expected.json").read_text())
    arm = [field_dict("arm", "joint_position", 7, 0, bound=6.3), field_dict("fingers", "joint_position", 2, 7)]
    camera = {"name": "camera", "height": 64, "width": 64, "slot": 0}
    result = read(REFERENCE / name, spec(state=arm, action=arm, cameras=[camera]))
    assert result.codes == [] and len(result.found) == expected["num_episodes"] == 3
    for episode, truth in zip(result.episodes, expected["episodes"], strict=True):
        assert (len(episode.stamp), episode.instruction) == (truth["frames"], truth["instruction"])
        assert round(episode.stamp[0] * 1e9) == pytest.approx(truth["first_camera_stamp_ns"], abs=300)
        for group, values in (("action", episode.action), ("state", episode.state)):
            assert values.astype(float).sum() == pytest.approx(truth[f"{group}_sum"], abs=1e-5)
            assert values[0] == pytest.approx(truth[f"{group}_first"], abs=1e-6)
            assert values[-1] == pytest.approx(truth[f"{group}_last"], abs=1e-6)
        for at, which in ((0, "first"), (-1, "last")):
            digest = hashlib.sha256(episode.images["camera"][at].tobytes()).hexdigest()
            assert digest == truth["cameras"]["camera"][f"{which}_sha256"]


@pytest.mark.parametrize(
    ("storage", "compression"),
    [
        ("mcap", None), ("mcap", CompressionMode.MESSAGE), ("mcap", CompressionMode.STORAGE),
        ("sqlite3", None), ("sqlite3", CompressionMode.MESSAGE),
    ],
)  # fmt: skip
def test_both_storages_and_their_compressions(
    tmp_path: Path, storage: str, compression: CompressionMode | None
) -> None:
    result = read(record(tmp_path / "b", scene(), storage, compression))
    assert result.codes == []
    assert_scene(result.episodes[0])
    assert result.says("no checksum")


@pytest.mark.parametrize("how", ["", "zstd", "lz4"])
@pytest.mark.parametrize("summary", [True, False])
def test_chunk_compressions_with_checksums(tmp_path: Path, how: str, summary: bool) -> None:
    write_mcap(tmp_path / "a.mcap", scene(), how, summary=summary)
    result = read(tmp_path / "a.mcap")
    assert_scene(result.episodes[0])
    assert result.codes == [] and not result.source.warnings


def test_a_file_without_chunks(tmp_path: Path) -> None:
    head, ids = channels(scene())
    data = bags.MAGIC + mcap_record(0x01, text_of("ros2") + text_of("tests")) + head + packed(scene(), ids)
    end = mcap_record(0x0F, struct.pack("<I", zlib.crc32(data)))
    (tmp_path / "a.mcap").write_bytes(data + end + mcap_record(0x02, bytes(20)) + bags.MAGIC)
    result = read(tmp_path / "a.mcap")
    assert_scene(result.episodes[0])
    assert result.codes == [] and not result.source.warnings


def test_bgr_and_compressed_only_bags(tmp_path: Path) -> None:
    bgr = [image(int((m.stamp - START) / PERIOD), m.stamp, encoding="bgr8") if m.kind == IMAGE else m for m in scene()]
    assert_scene(read(record(tmp_path / "bgr", bgr)).episodes[0])
    small = [jpeg(int((m.stamp - START) / PERIOD), m.stamp) if m.kind == IMAGE else m for m in scene()]
    found = read(record(tmp_path / "jpeg", small)).episodes[0].images["camera"]
    truth = np.array([frame(i) for i in range(12)])
    assert np.abs(found.astype(int) - truth).mean() < 3  # a swap of red and blue gives 60
    both = scene() + [jpeg(99 - i, START + i * PERIOD) for i in range(12)]
    assert_scene(read(record(tmp_path / "both", sorted(both, key=lambda m: m.log))).episodes[0])


def test_joints_are_matched_by_name(tmp_path: Path) -> None:
    shuffled = ("gripper", "wrist", "extra", "shoulder", "elbow")
    result = read(record(tmp_path / "b", scene(names=shuffled)))
    assert_scene(result.episodes[0])
    assert result.says("matched by name: shoulder = 3, elbow = 4, wrist = 1, gripper = 0")
    named = [field_dict(n, "joint_position", 1, i) for i, n in enumerate(reversed(NAMES))]
    episode = read(record(tmp_path / "c", scene()), spec(state=named, action=named)).episodes[0]
    assert np.array_equal(episode.state[:, ::-1], np.array([position(i) for i in range(12)], np.float32))
    some = [field_dict("arm", "joint_position", 2, 0)]
    episode = read(tmp_path / "c", spec(state=some, action=some), joints="wrist,shoulder").episodes[0]
    assert np.array_equal(episode.state, np.array([position(i)[[2, 0]] for i in range(12)], np.float32))


def test_velocities_and_other_command_types(tmp_path: Path) -> None:
    state = [field_dict("q", "joint_position", 4, 0), field_dict("dq", "joint_velocity", 4, 9, bound=9)]
    action = [field_dict("q", "joint_position", 4, 0)]
    for kind in (JOINTS, ARRAY):
        sent = []
        for m in scene():
            if m.kind == TRAJECTORY:
                i = int((m.stamp - START) / PERIOD)
                layout = TYPES.types["std_msgs/msg/MultiArrayLayout"](dim=[], data_offset=0)
                array = Sent("/joint_command", ARRAY, m.stamp, {"layout": layout, "data": position(i + 1)})
                m = array if kind == ARRAY else joints(i + 1, m.stamp, topic="/joint_command")
            sent.append(m)
        result = read(record(tmp_path / kind.replace("/", "_"), sent), spec(state=state, action=action))
        episode = result.episodes[0]
        assert np.array_equal(episode.action, np.array([position(i + 1) for i in range(12)], np.float32))
        assert np.array_equal(episode.state[:, 4:], np.array([10 * position(i) for i in range(12)], np.float32))
        assert result.says("names no joints") == (kind == ARRAY)


def test_an_effort_comes_from_the_effort_where_there_is_any(tmp_path: Path) -> None:
    action = [field_dict("arm", "joint_position", 3, 0), field_dict("grip", "gripper_effort", 1, 6)]
    for name, effort in (("with", np.array([0, 0, 0, 0.25])), ("without", np.zeros(0))):
        sent = [
            joints(int((m.stamp - START) / PERIOD), m.stamp, topic="/joint_command", effort=effort)
            if m.kind == TRAJECTORY else m
            for m in scene()
        ]  # fmt: skip
        episode = read(record(tmp_path / name, sent), spec(action=action)).episodes[0]
        truth = np.array([position(i) for i in range(12)], np.float32)
        assert np.array_equal(episode.action[:, :3], truth[:, :3])
        assert np.array_equal(episode.action[:, 3], truth[:, 3] if name == "without" else np.full(12, 0.25))


def test_several_cameras_are_paired_by_stamp(tmp_path: Path) -> None:
    hand = [image(50 + i, START + i * PERIOD + 15_000_000, "/hand/color/image_raw") for i in range(12)]
    sent = sorted(scene() + hand, key=lambda m: m.log)
    cameras = [{"name": n, "height": 1, "width": 1, "slot": i} for i, n in enumerate(("camera", "hand_color"))]
    episode = read(record(tmp_path / "b", sent), spec(cameras=cameras)).episodes[0]
    assert_scene(episode)
    assert np.array_equal(episode.images["hand_color"], [frame(50 + i) for i in range(12)])
    renamed = read(tmp_path / "b", cameras="camera:/hand/color/image_raw").episodes[0]
    assert np.array_equal(renamed.images["camera"], [frame(50 + i) for i in range(12)])


# --- episodes


def test_gaps_and_new_instructions_end_an_episode(tmp_path: Path) -> None:
    second = START + 12 * PERIOD  # no gap, another instruction
    third = second + 12 * PERIOD + 700_000_000  # a gap, the instruction stays
    sent = [
        *scene(), *scene(12, second, 20, "pull it"), *scene(5, third, 40, None), instruction("pull it", third + 10**9),
        *scene(4, third + 10**9 + PERIOD, 60, None),
    ]  # fmt: skip
    result = read(record(tmp_path / "b", sent))
    assert result.lengths == [12, 12, 5, 4] and result.codes == []
    assert_scene(result.episodes[1], 12, 20, second, "pull it")
    assert_scene(result.episodes[2], 5, 40, third, "pull it")


def test_an_instruction_sent_again_unchanged_ends_nothing(tmp_path: Path) -> None:
    sent = sorted([*scene(), *(instruction("push it", START + i * 10**8) for i in range(5))], key=lambda m: m.log)
    assert_scene(read(record(tmp_path / "b", sent)).episodes[0])


def test_without_an_instruction_one_must_be_given(tmp_path: Path) -> None:
    path = record(tmp_path / "b", scene(text=None))
    assert read(path).codes == ["E_INSTRUCTION"]
    source = mcap.open_source(path, spec(), Options("close it", None, {}))
    assert source.read(source.items()[0]).instruction == "close it"
    source.close()


@pytest.mark.parametrize("topic", ["/joint_states", "/joint_command"])
def test_a_hole_in_another_stream_splits_and_is_listed(tmp_path: Path, topic: str) -> None:
    hole = range(START + 10 * PERIOD, START + 25 * PERIOD)
    sent = [m for m in scene(40) if m.topic != topic or m.stamp not in hole]
    result = read(record(tmp_path / "b", sent))
    assert result.lengths == [10, 15] and result.codes == ["E_STAMP"]
    assert topic in str(result.rejected[0]) and "none for 15 frames" in str(result.rejected[0])
    assert [type(e) for e in result.found] == [Episode, Rejected, Episode]


def test_a_short_hole_leaves_frames_out_and_says_so(tmp_path: Path) -> None:
    sent = [m for m in scene(20) if m.topic != "/joint_command" or not 5 <= (m.stamp - START) // PERIOD < 8]
    result = read(record(tmp_path / "b", sent))
    assert result.lengths == [17] and result.codes == []
    assert result.says("3 frames are left out: nothing near enough on /joint_command")
    assert result.says("1 frames come more than 1.5 periods after")
    kept = [i for i in range(20) if not 5 <= i < 8]
    assert np.array_equal(result.episodes[0].stamp, (START + PERIOD * np.array(kept)) / 1e9)  # nothing is filled in
    assert np.array_equal(result.episodes[0].images["camera"], [frame(i) for i in kept])


def test_frames_at_the_ends_that_are_not_covered(tmp_path: Path) -> None:
    sent = [m for m in scene(20) if m.topic != "/joint_states" or 2 <= (m.stamp - START) // PERIOD < 17]
    result = read(record(tmp_path / "b", sent))
    assert result.lengths == [15] and result.codes == [] and result.says("5 frames are left out")


def test_a_clock_that_jumps_back_never_pairs_across(tmp_path: Path) -> None:
    sent = scene(10) + [m for m in scene(10, START - 10 * 10**9, 30, "pull it")]
    for i, m in enumerate(sent):
        m.log = START + i * 1_000_000
    result = read(record(tmp_path / "b", sent), clock="header", slop="0.02")
    assert sorted(result.lengths) == [10, 10]
    assert_scene(result.episodes[0], 10)
    assert_scene(result.episodes[1], 10, 30, START - 10 * 10**9, "pull it")


def test_frames_out_of_order_are_sorted_and_doubles_left_out(tmp_path: Path) -> None:
    sent = scene(12)
    pictures = [i for i, m in enumerate(sent) if m.kind == IMAGE]
    a, b = pictures[4], pictures[5]
    sent[a], sent[b] = sent[b], sent[a]
    sent.append(image(3, START + 3 * PERIOD))
    result = read(record(tmp_path / "b", sent, "sqlite3"))
    assert_scene(result.episodes[0])
    assert result.says("out of order") and result.says("1 frames with the stamp of the one before")


def test_a_frame_with_a_wild_stamp_is_counted_not_swallowed(tmp_path: Path) -> None:
    sent = scene(12)
    at = next(i for i, m in enumerate(sent) if m.kind == IMAGE and m.stamp == START + 5 * PERIOD)
    sent[at] = image(5, START + 3600 * 10**9)
    sent[at].log = START + 5 * PERIOD
    result = read(record(tmp_path / "b", sent))
    assert sum(result.lengths) + 1 == 12 and result.codes in (["E_STAMP"], ["E_EMPTY"])


def test_two_clocks_are_refused_unless_the_log_decides(tmp_path: Path) -> None:
    sent = scene()
    for m in sent:
        if m.topic == "/joint_states":
            m.stamp -= 3600 * 10**9  # its log time stays
    path = record(tmp_path / "b", sent)
    with pytest.raises(Rejected, match=r"^E_STAMP: .*clock.*/joint_states 3600\.00.*-o clock=log"):
        read(path)
    result = read(path, clock="log")
    assert result.lengths == [12]
    assert np.array_equal(result.episodes[0].state, np.array([position(i) for i in range(12)], np.float32))


def test_headers_without_stamps_go_by_the_log(tmp_path: Path) -> None:
    sent = scene()
    for m in sent:
        if m.topic == "/joint_states":
            m.stamp = 0
    result = read(record(tmp_path / "b", sent))
    assert result.lengths == [12] and result.says("/joint_states: its headers have no stamps")


def test_another_rate_is_refused(tmp_path: Path) -> None:
    path = record(tmp_path / "b", scene())
    with pytest.raises(Rejected, match=r"^E_STAMP: .*30 Hz.*20 Hz in the data"):
        read(path, spec(control_hz=30.0))


stamps = st.lists(st.integers(0, 3_000), min_size=1, max_size=40)


@settings(max_examples=150, deadline=None)
@given(stamps, st.lists(st.sampled_from(["", "", "", "/a"]), min_size=40, max_size=40), st.integers(0, 3))
def test_every_frame_is_in_one_piece_or_counted(raw: list[int], missing: list[str], sessions: int) -> None:
    stamp = np.array(raw) * 10**6
    n = len(raw)
    session = np.sort(np.arange(n) % (sessions + 1))
    text = ["a" if t < 1500 else "b" for t in raw]
    pieces, notes = mcap.split_episodes(stamp, session, text, missing[:n])
    numbers = [int(note.split()[0]) for note in notes if "left out" in note]
    used = [f for piece in pieces for f in piece.frames]
    assert len(used) == len(set(used)) and len(used) + sum(numbers) == n
    for piece in pieces:
        times = stamp[list(piece.frames)]
        assert len(set(session[list(piece.frames)])) == 1 and len({text[f] for f in piece.frames}) == 1
        assert (np.diff(times) > 0).all() and (np.diff(times) <= mcap.GAP).all()
        assert all(bool(missing[f]) == bool(piece.lost) for f in piece.frames)


@settings(max_examples=100, deadline=None)
@given(stamps, stamps, st.integers(0, 200))
def test_nearest_is_the_nearest(wanted: list[int], have: list[int], slop: int) -> None:
    found, near = mcap.nearest(np.array(wanted), np.array(have), slop)
    for w, f, n in zip(wanted, found, near, strict=True):
        best = min(abs(h - w) for h in have)
        assert abs(have[f] - w) == best and n == (best <= slop)


# --- damage


def test_a_bag_cut_anywhere_gives_what_is_before_the_cut(tmp_path: Path) -> None:
    sent = [*scene(8), *scene(8, START + 10 * 10**9, 10, "pull it"), *scene(8, START + 20 * 10**9, 20, "lift it")]
    path = tmp_path / "a.mcap"
    places = write_mcap(path, sent, "zstd", per_chunk=33)
    whole = path.read_bytes()
    end = whole.rindex(struct.pack("<BQ", 0x0F, 4)) + 12
    counts = set()
    for at in [*range(9, len(whole) - 60, 97), places[1], places[1] + 5, places[2] - 1, len(whole) - 59]:
        path.write_bytes(whole[:at])
        try:
            result = read(path)
        except Rejected as e:
            assert e.code == "E_TRUNCATED" and at < places[1]
            continue
        assert result.codes == (["E_TRUNCATED"] if at <= end else []), at  # behind it lies only the index
        assert_scene(result.episodes[0], 8)
        counts.add(len(result.episodes))
    assert counts == {1, 2, 3}


def test_an_empty_and_a_foreign_file(tmp_path: Path) -> None:
    for content, code in ((b"", "E_TRUNCATED"), (bags.MAGIC[:4], "E_TRUNCATED"), (b"PK\x03\x04 a zip", "E_SCHEMA")):
        (tmp_path / "a.mcap").write_bytes(content)
        with pytest.raises(Rejected, match=f"^{code}: .*a.mcap"):
            read(tmp_path / "a.mcap")
    for content, code in (
        (b"", "E_TRUNCATED"),
        (b"SQLite format 3\x00" + bytes(50), "E_TRUNCATED"),
        (b"x" * 900, "E_TRUNCATED"),
    ):
        (tmp_path / "a.db3").write_bytes(content)
        with pytest.raises(Rejected, match=f"^{code}: .*a.db3"):
            read(tmp_path / "a.db3")
    other = sqlite3.connect(tmp_path / "b.db3")
    other.execute("CREATE TABLE messages (id INTEGER)")
    other.commit()
    other.close()
    with pytest.raises(Rejected, match=r"^E_SCHEMA: .*tables messages and topics"):
        read(tmp_path / "b.db3")


@pytest.mark.parametrize("how", ["", "zstd", "lz4"])
def test_flipped_bits_are_seen_and_reading_goes_on_behind(tmp_path: Path, how: str) -> None:
    sent = [*scene(8), *scene(8, START + 10 * 10**9, 10, "pull it"), *scene(8, START + 20 * 10**9, 20, "lift it")]
    path = tmp_path / "a.mcap"
    places = write_mcap(path, sent, how, per_chunk=33)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for at in rng.integers(places[1] + 60, places[2], 40).tolist():
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        result = read(path)
        assert result.codes == ["E_CHECKSUM"]
        assert_scene(result.episodes[0], 8)
        assert_scene(result.episodes[-1], 8, 20, START + 20 * 10**9, "lift it")
        if "data section" in str(result.rejected[0]):  # a bit that the decompressor does not care for
            assert_scene(result.episodes[1], 8, 10, START + 10 * 10**9, "pull it")
        else:
            assert f"chunk at byte {places[1]}" in str(result.rejected[0]) and len(result.episodes) == 2


def test_a_lost_chunk_splits_even_where_the_gap_is_short(tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    places = write_mcap(path, scene(24), "", per_chunk=16, instructions=1)
    damaged = bytearray(path.read_bytes())
    damaged[places[2] + 200] ^= 1
    path.write_bytes(damaged)
    result = read(path)
    assert result.codes == ["E_CHECKSUM"] and len(result.lengths) == 2
    assert sum(result.lengths) >= 24 - 5  # four frames in the chunk, one that lost its command


def test_a_damaged_first_chunk_does_not_lose_the_channels(tmp_path: Path) -> None:
    path = tmp_path / "a.mcap"
    places = write_mcap(path, [*scene(8), *scene(8, START + 10**10, 10, "pull it")], "zstd", per_chunk=33)
    damaged = bytearray(path.read_bytes())
    damaged[places[0] + 100] ^= 1
    path.write_bytes(damaged)
    result = read(path)
    assert result.codes == ["E_CHECKSUM"]
    assert_scene(result.episodes[0], 8, 10, START + 10**10, "pull it")


def test_frames_behind_a_lost_instruction_do_not_get_the_old_one(tmp_path: Path) -> None:
    sent = [*scene(8), *scene(8, START + 10**10, 10, "pull it")]
    for summary, count in ((True, None), (True, 2), (True, 1)):
        places = write_mcap(tmp_path / "a.mcap", sent, "", per_chunk=11, summary=summary, instructions=count)
        damaged = bytearray((tmp_path / "a.mcap").read_bytes())
        damaged[places[3] + 120] ^= 1  # the fourth chunk begins with "pull it"
        (tmp_path / "a.mcap").write_bytes(damaged)
        result = read(tmp_path / "a.mcap")
        assert [e.instruction for e in result.episodes][:1] == ["push it"]
        if count == 1:  # the statistics say that none is lost
            assert [e.instruction for e in result.episodes] == ["push it", "push it"]
            assert result.codes == ["E_CHECKSUM"]
        else:
            assert sorted(result.codes) == ["E_CHECKSUM", "E_INSTRUCTION"] and len(result.episodes) == 1


def test_a_truncated_database_gives_the_rows_before(tmp_path: Path) -> None:
    folder = record(tmp_path / "b", [*scene(30), *scene(30, START + 10**10, 40, "pull it")], "sqlite3")
    whole = (folder / "b.db3").read_bytes()
    (folder / "b.db3").write_bytes(whole[: len(whole) * 6 // 10 // 4096 * 4096])
    try:
        result = read(folder)
    except Rejected as e:
        assert e.code == "E_TRUNCATED"
        return
    assert "E_TRUNCATED" in result.codes
    assert_scene(result.episodes[0], 30)


def test_a_write_ahead_log_is_not_forgotten(tmp_path: Path) -> None:
    folder = record(tmp_path / "b", scene(), "sqlite3")
    (folder / "b.db3-wal").write_bytes(b"x" * 100)
    result = read(folder)
    assert result.lengths == [12] and result.codes == ["E_TRUNCATED"] and "b.db3-wal" in str(result.rejected[0])


# --- metadata.yaml


def test_without_metadata_every_file_is_read(tmp_path: Path) -> None:
    folder = record(tmp_path / "b", scene())
    (folder / "metadata.yaml").unlink()
    result = read(folder)
    assert_scene(result.episodes[0])
    assert result.codes == [] and result.says("no metadata.yaml")


def test_split_recordings_are_one_and_others_are_their_own(tmp_path: Path) -> None:
    sent = scene(20)
    for loose in ("run_0.mcap", "run_1.mcap", "other.mcap"):
        part = {"run_0.mcap": sent[:41], "run_1.mcap": sent[41:], "other.mcap": scene(5, first=60)}[loose]
        write_mcap(tmp_path / loose, part)
    result = read(tmp_path)
    assert sorted(result.lengths) == [5, 20] and result.codes == []
    (tmp_path / "run_1.mcap").write_bytes(b"")
    result = read(tmp_path)
    assert (
        sorted(result.lengths)[0] == 5 and result.codes == ["E_TRUNCATED"] and "run_1.mcap" in str(result.rejected[0])
    )


def edited(folder: Path, **changes) -> Path:
    path = folder / "metadata.yaml"
    values = yaml.safe_load(path.read_text())
    values["rosbag2_bagfile_information"] |= changes
    path.write_text(yaml.safe_dump(values))
    return folder


def test_fewer_messages_than_metadata_says(tmp_path: Path) -> None:
    result = read(edited(record(tmp_path / "b", scene()), message_count=1000))
    assert result.lengths == [12] and result.codes == ["E_TRUNCATED"] and "1000 messages" in str(result.rejected[0])


def test_hostile_and_odd_metadata(tmp_path: Path) -> None:
    record(tmp_path / "other", scene(first=50))
    cases = [
        ({"relative_file_paths": ["../other/other.mcap"]}, "E_PATH"),
        ({"relative_file_paths": ["/etc/passwd"]}, "E_PATH"),
        ({"relative_file_paths": ["x" * 300]}, "E_PATH"),
        ({"relative_file_paths": ["gone.mcap"]}, "E_TRUNCATED"),
        ({"compression_mode": "FILE", "compression_format": "zstd"}, "E_SCHEMA"),
    ]
    for i, (changes, code) in enumerate(cases):
        with pytest.raises(Rejected, match=f"^{code}: "):
            read(edited(record(tmp_path / f"b{i}", scene()), **changes))
    bomb = "a: &a [x, x]\nb: &b [*a, *a]\nrosbag2_bagfile_information: *b\n"
    for i, text in enumerate((bomb, "{", "[]", "a: 1", "!!python/object/apply:os.system ['true']", "\x00")):
        folder = record(tmp_path / f"c{i}", scene())
        (folder / "metadata.yaml").write_text(text)
        result = read(folder)
        assert_scene(result.episodes[0])
        assert result.says("metadata.yaml cannot be read")


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    outside = record(tmp_path / "outside", scene(first=50))
    folder = record(tmp_path / "in/b", scene())
    (folder / "b.mcap").unlink()
    (folder / "b.mcap").symlink_to(outside / "outside.mcap")
    record(tmp_path / "in/c", scene())
    with pytest.raises(Rejected, match=r"^E_PATH: "):
        read(folder)


# --- what a bag lacks


def without(topic: str) -> list[Sent]:
    return [m for m in scene() if m.topic != topic]


@pytest.mark.parametrize("topic", ["/joint_states", "/joint_command", "/camera/image_raw"])
def test_a_missing_topic_is_named_with_what_is_there(tmp_path: Path, topic: str) -> None:
    with pytest.raises(Rejected, match=r"^E_KEY: ") as error:
        read(record(tmp_path / "b", without(topic)))
    wanted = "cameras" if "camera" in topic else topic
    assert wanted in error.value.key
    if topic != "/camera/image_raw":
        assert "/camera/image_raw (sensor_msgs/msg/Image)" in str(error.value) and "-o " in str(error.value)


def test_a_bag_that_cannot_be_used_does_not_stop_the_others(tmp_path: Path) -> None:
    record(tmp_path / "in/a", without("/joint_states"))
    record(tmp_path / "in/b", scene())
    result = read(tmp_path / "in")
    assert result.lengths == [12] and result.codes == ["E_KEY"]


def test_an_unknown_type_is_refused_where_it_is_needed_and_left_out_elsewhere(tmp_path: Path) -> None:
    odd = Sent("/battery", "my_msgs/msg/Unknown", START, {})
    odd.data = lambda: b"\x00\x01\x00\x00garbage"  # type: ignore[method-assign]
    write_mcap(tmp_path / "a.mcap", [odd, *scene()])
    result = read(tmp_path / "a.mcap")
    assert_scene(result.episodes[0])
    assert result.says("unknown types are left out: /battery (my_msgs/msg/Unknown)")
    with pytest.raises(
        Rejected, match=r"^E_DTYPE: .*/battery: expected sensor_msgs/msg/JointState.*my_msgs/msg/Unknown"
    ):
        read(tmp_path / "a.mcap", state="/battery")


def test_joints_missing_doubled_or_too_few(tmp_path: Path) -> None:
    cases = {
        "missing": (scene(names=("shoulder", "elbow", "wrist", "hand")), "missing \\['gripper'\\]"),
        "twice": (scene(names=(*NAMES, "wrist")), "twice \\['wrist'\\]"),
    }
    for name, (sent, text) in cases.items():
        result = read(record(tmp_path / name, sent))
        assert result.codes == ["E_JOINTS"]
        with pytest.raises(Rejected, match=text):
            raise result.rejected[0]
    changed = scene(6) + scene(6, START + 10**10, 20, "pull it", names=("shoulder", "elbow", "wrist", "hand"))
    result = read(record(tmp_path / "changed", changed))
    assert result.lengths == [6] and result.codes == ["E_JOINTS"]
    short = scene()
    for m in short:
        if m.kind == JOINTS:
            m.body["position"] = m.body["position"][:3]
    result = read(record(tmp_path / "short", short))
    assert result.codes == ["E_JOINTS"] and "one position for each of 4 joints" in str(result.rejected[0])
    with pytest.raises(Rejected, match=r"^E_JOINTS: .*7 joints: arm\[7\].*shoulder, elbow, wrist, gripper"):
        read(record(tmp_path / "c", scene()), spec(state=[field_dict("arm", "joint_position", 7, 0)]))


def test_messages_that_do_not_parse_are_counted(tmp_path: Path) -> None:
    sent = scene(20)
    states = [m for m in sent if m.topic == "/joint_states"]
    for m in states[10:12]:
        m.data = lambda: b"\x00\x01\x00\x00" + b"\xff" * 40  # type: ignore[method-assign]
    result = read(record(tmp_path / "b", sent))
    assert result.says("/joint_states: 2 messages left out") and result.codes == []
    assert result.lengths == [19]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"encoding": "16UC1"}, "send rgb8, bgr8"),
        ({"step": 3 * W - 1}, "step"),
        ({"data": np.zeros(10, np.uint8)}, "needs"),
        ({"height": H + 4}, "pixels|needs"),
    ],
)
def test_pictures_that_do_not_decode(tmp_path: Path, change: dict, text: str) -> None:
    sent = scene()
    [m for m in sent if m.kind == IMAGE][4].body |= change
    result = read(record(tmp_path / "b", sent))
    assert result.codes == ["E_SCHEMA"] and "/camera/image_raw message 4" in str(result.rejected[0])
    with pytest.raises(Rejected, match=text):
        raise result.rejected[0]


def test_what_cannot_be_inferred_or_is_misspelt(tmp_path: Path) -> None:
    path = record(tmp_path / "b", scene())
    with pytest.raises(Rejected, match=r"--embodiment FILE") as error:
        mcap.open_source(path, None, options())
    for text in ("shoulder, elbow, wrist, gripper", "/joint_command", "camera = /camera/image_raw", "20 Hz"):
        assert text in str(error.value)
    two = [{"name": n, "height": 1, "width": 1, "slot": i} for i, n in enumerate(("camera", "wrist_cam"))]
    with pytest.raises(Rejected, match=r"^E_KEY: .*wrist_cam.*camera \(/camera/image_raw\)"):
        read(path, spec(cameras=two))
    assert read(path, spec(cameras=two[1:])).episodes[0].images.keys() == {"wrist_cam"}
    for key, value in (("clock", "sun"), ("slop", "-1"), ("slop", "long")):
        with pytest.raises(ValueError, match=f"-o {key}={value}"):
            read(path, **{key: value})
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(Rejected, match=r"^E_EMPTY: "):
        read(tmp_path / "empty")


# --- bombs


def test_chunks_that_would_inflate_without_bound(tmp_path: Path) -> None:
    import tracemalloc

    zeros = bytes(300 * 2**20)
    head, ids = channels(scene())
    bombs = {
        "says small": chunk(zeros, "zstd", size=100),
        "says huge": chunk(b"", "zstd", size=2**40),
        "ratio": chunk(zeros, "zstd"),
        "lz4": chunk(zeros, "lz4", size=100),
        "unknown": chunk(b"abc", "lzma"),
    }
    del zeros
    tracemalloc.start()
    try:
        for name, bomb in bombs.items():
            path = tmp_path / f"{name}.mcap"
            end = mcap_record(0x0F, bytes(4)) + mcap_record(0x02, bytes(20)) + bags.MAGIC
            start = bags.MAGIC + mcap_record(0x01, text_of("ros2") + text_of("tests"))
            path.write_bytes(start + bomb + chunk(head + packed(scene(), ids)) + end)
            result = read(path)
            assert_scene(result.episodes[0])
            assert len(result.codes) == 1 and result.codes[0] in ("E_PATH", "E_CHECKSUM", "E_SCHEMA"), name
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 60 * 2**20


def test_message_bombs_and_huge_records(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="more than"):
        bags.inflate_message(zstandard.compress(bytes(200 * 2**20)))
    with pytest.raises(ValueError, match="zstd"):
        bags.inflate_message(b"nonsense")
    path = tmp_path / "a.mcap"
    write_mcap(path, scene())
    data = path.read_bytes()
    at = data.rindex(mcap_record(0x0F, b"")[:1] + struct.pack("<Q", 4))
    path.write_bytes(data[:at] + struct.pack("<BQ", 0x06, 2**62))
    result = read(path)
    assert_scene(result.episodes[0])
    assert result.codes == ["E_TRUNCATED"]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_files_never_crash_the_reader(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.mcap"
    write_mcap(path, scene(2), data.draw(st.sampled_from(["", "lz4", "zstd"])), per_chunk=4)
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(8, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.integers(8, len(whole)))])
    storage = bags.McapFile(path)
    try:
        for message in storage.messages():
            if isinstance(message, bags.Message):
                assert storage.fetch(message.place) == message.data
    finally:
        storage.close()


# --- the command


def test_in_is_written_plus_rejected_on_any_number_of_workers(tmp_path: Path) -> None:
    sent = [*scene(8), *scene(1, START + 10**10, 30, "pull it"), *scene(8, START + 2 * 10**10, 20, "lift it")]
    folder = tmp_path / "b"
    folder.mkdir()
    places = write_mcap(folder / "b.mcap", sent, per_chunk=10)
    (folder / "b.mcap").write_bytes((folder / "b.mcap").read_bytes()[: places[-1] + 40])
    robot = tmp_path / "robot.yaml"
    robot.write_text(yaml.safe_dump(embodiment_to_dict(spec())))
    hashes = []
    for workers in (0, 2):
        out = tmp_path / f"s{workers}.zarr"
        config = ConvertConfig(
            source="mcap", path=folder, out=out, embodiment=str(robot), instruction=None, control_hz=None, extra={},
            codec="raw", licence="MIT", workers=workers, exist="error", quarantine=True, ray=None,
        )  # fmt: skip
        tally = convert(config)
        assert tally.total == tally.written + len(tally.rejected) == 4
        assert sorted(r.code for r in tally.rejected) == ["E_EMPTY", "E_TRUNCATED"]
        store = Store(out)
        hashes.append([e.content_hash for e in store.episodes])
        assert [e.instruction for e in store.episodes] == ["push it", "lift it"]
        shutil.rmtree(out)
    assert hashes[0] == hashes[1]
