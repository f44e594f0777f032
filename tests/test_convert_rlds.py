"""RLDS read without TensorFlow: parity with what tensorflow_datasets wrote, and one code per malformed input.

The small inputs are written with protobuf's own encoder, from the public definition of tf.train.Example.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import simplejpeg
from conftest import embodiment_dict, field
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from dita.datasets.convert import oxe, rlds
from dita.datasets.convert.base import Options, Rejected, check
from dita.datasets.convert.run import ConvertConfig, convert
from dita.datasets.store import Store
from dita.embodiment import embodiment_from_dict, embodiment_to_dict, load_embodiment
from dita.types import EmbodimentSpec

REFERENCE = Path(__file__).parents[1] / "../shared/reference/datasets/rlds"
H, W = 16, 24


# --- a writer of its own


def _example_class():
    proto = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")
    kinds = {"BytesList": 12, "FloatList": 2, "Int64List": 3}
    for name, kind in kinds.items():
        proto.message_type.add(name=name).field.add(name="value", number=1, label=3, type=kind)
    feature = proto.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for i, (name, short) in enumerate(zip(kinds, ("bytes_list", "float_list", "int64_list"), strict=True), 1):
        feature.field.add(name=short, number=i, label=1, type=11, type_name=f".t.{name}", oneof_index=0)
    features = proto.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=1, type=9)
    entry.field.add(name="value", number=2, label=1, type=11, type_name=".t.Feature")
    features.field.add(name="feature", number=1, label=3, type=11, type_name=".t.Features.FeatureEntry")
    example = proto.message_type.add(name="Example")
    example.field.add(name="features", number=1, label=1, type=11, type_name=".t.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(proto)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


Example = _example_class()


def encode(features: dict) -> bytes:
    example = Example()
    for name, values in features.items():
        feature = example.features.feature[name]
        if isinstance(values, list):
            feature.bytes_list.value.extend(values)
        elif np.asarray(values).dtype.kind == "f":
            feature.float_list.value.extend(np.asarray(values, np.float32).reshape(-1).tolist())
        else:
            feature.int64_list.value.extend(np.asarray(values).reshape(-1).astype(np.int64).tolist())
    return example.SerializeToString()


def frame_record(data: bytes) -> bytes:
    def masked(part: bytes) -> bytes:
        crc = google_crc32c.value(part)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32)

    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def tensor(dtype: str, *shape: int, encoding: str = "none") -> dict:
    dims = {"dimensions": [str(n) for n in shape]} if shape else {}
    return {"pythonClassName": "Tensor", "tensor": {"dtype": dtype, "encoding": encoding, "shape": dims}}


def image(encoding: str = "jpeg", shape: tuple[int, int] | None = (H, W)) -> dict:
    dims = ["-1", "-1", "3"] if shape is None else [str(shape[0]), str(shape[1]), "3"]
    return {
        "pythonClassName": "Image",
        "image": {"dtype": "uint8", "encodingFormat": encoding, "shape": {"dimensions": dims}},
    }


def folder(**features) -> dict:
    return {"pythonClassName": "FeaturesDict", "featuresDict": {"features": features}}


def schema(**steps) -> dict:
    flags = {name: tensor("bool") for name in ("is_first", "is_last", "is_terminal")}
    inner = folder(**flags | {"language_instruction": {"pythonClassName": "Text", "text": {}}} | steps)
    return folder(steps={"pythonClassName": "Dataset", "sequence": {"feature": inner, "length": "-1"}})


PLAIN = schema(action=tensor("float64", 4), observation=folder(image=image(), state=tensor("float32", 4)))


def pictures(n: int, seed: int) -> list[bytes]:
    rng = np.random.default_rng(seed)
    frames = np.kron(rng.integers(0, 256, (n, H // 8, W // 8, 3)), np.ones((8, 8, 1), int)).astype(np.uint8)
    return [simplejpeg.encode_jpeg(f, 95, "RGB", "444") for f in frames]


def episode(n: int = 6, seed: int = 0, **changes) -> dict:
    rng = np.random.default_rng(seed)
    flag = np.zeros(n, bool)
    values = {
        "steps/is_first": np.arange(n) == 0,
        "steps/is_last": np.arange(n) == n - 1,
        "steps/is_terminal": flag,
        "steps/language_instruction": [b"press the button"] * n,
        "steps/action": rng.uniform(-0.01, 0.01, (n, 4)),
        "steps/observation/state": rng.uniform(0, 1, (n, 4)),
        "steps/observation/image": pictures(n, seed),
    }
    return {k: v for k, v in (values | changes).items() if v is not None}


def write(
    root: Path,
    episodes: dict[str, list[list[dict]]] | list[dict],
    features: dict | None = PLAIN,
    name: str = "demo",
    **info,
) -> Path:
    """Write splits -> shards -> episodes."""
    splits = {"train": [episodes]} if isinstance(episodes, list) else episodes
    root.mkdir(parents=True, exist_ok=True)
    listed = []
    for split, shards in splits.items():
        for i, shard in enumerate(shards):
            path = root / f"{name}-{split}.tfrecord-{i:05d}-of-{len(shards):05d}"
            path.write_bytes(b"".join(frame_record(encode(e)) for e in shard))
        listed.append({"name": split, "shardLengths": [str(len(s)) for s in shards], "numBytes": "0"})
    values = {"name": name, "fileFormat": "tfrecord", "version": "1.0.0", "splits": listed} | info
    (root / "dataset_info.json").write_text(json.dumps(values))
    if features is not None:
        (root / "features.json").write_text(json.dumps(features))
    return root


def spec(**changes) -> EmbodimentSpec:
    values = embodiment_dict() | {"cameras": [{"name": "image", "height": H, "width": W, "slot": 0}]}
    return embodiment_from_dict(values | changes)


def options(**extra) -> Options:
    return Options(None, None, extra)


def read_all(root: Path, robot: EmbodimentSpec | None = None, **extra) -> list:
    """Return an Episode or a Rejected per item, in order."""
    source = rlds.open_source(root, robot or spec(), options(**extra))
    out = []
    for item in source.items():
        try:
            found = source.read(item)
            check(found, source.spec, item)
        except Rejected as e:
            found = e
        out.append(found)
    return out


def codes(found: list) -> list[str]:
    return [e.code if isinstance(e, Rejected) else "ok" for e in found]


def shard_of(root: Path, split: str = "train", i: int = 0, of: int = 1) -> Path:
    return root / f"demo-{split}.tfrecord-{i:05d}-of-{of:05d}"


# --- what is read


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="needs the reference datasets")
def test_equals_what_tensorflow_datasets_reads() -> None:
    expected = json.loads((REFERENCE / "expected.json").read_text())
    values = embodiment_dict() | {"cameras": [{"name": "image", "height": 64, "width": 64, "slot": 0}]}
    values["action"] = [field("delta", "ee_position", 3, 0, "delta"), field("grip", "gripper_effort", 1, 6)]
    source = rlds.open_source(REFERENCE, embodiment_from_dict(values), options())
    items = source.items()
    assert len(items) == expected["num_episodes"] == 3
    for item, truth in zip(items, expected["episodes"], strict=True):
        found = source.read(item)
        assert check(found, source.spec, item) == []
        assert (len(found.stamp), found.instruction) == (truth["frames"], truth["instruction"])
        for group, values in (("action", found.action), ("state", found.state)):
            assert values.astype(float).sum() == pytest.approx(truth[f"{group}_sum"], abs=1e-9)
            assert values[0].tolist() == truth[f"{group}_first"]
            assert values[-1].tolist() == truth[f"{group}_last"]
        camera = truth["cameras"]["image"]
        for frame, which in ((0, "first"), (-1, "last")):
            mean = found.images["image"][frame].reshape(-1, 3).mean(axis=0)
            assert np.abs(mean - camera[f"{which}_mean_rgb"]).max() <= camera["mean_rgb_tolerance"]


def test_shards_and_splits_are_read_in_order(tmp_path: Path) -> None:
    shards = {
        "train": [[episode(6, 0), episode(3, 1)], [episode(4, 2)]],
        "val": [[episode(5, 3)]],
    }
    root = write(tmp_path / "demo/1.0.0", shards)
    source = rlds.open_source(tmp_path, spec(), options())
    items = source.items()
    assert [i.id for i in items] == [
        "train/000000/000000", "train/000000/000001", "train/000001/000000", "val/000000/000000",
    ]  # fmt: skip
    assert [i.split for i in items] == ["train", "train", "train", "val"]
    for item, raw in zip(items, [e for s in shards.values() for shard in s for e in shard], strict=True):
        found = source.read(item)
        assert found.source == item.id
        assert np.array_equal(found.action, raw["steps/action"].astype(np.float32))
        assert np.array_equal(found.state, raw["steps/observation/state"].astype(np.float32))
        frames = [simplejpeg.decode_jpeg(p, "RGB") for p in raw["steps/observation/image"]]
        assert np.array_equal(found.images["image"], frames)
        assert np.array_equal(found.stamp, np.arange(len(found.action)) / 80)
    assert len(read_all(root, split="val")) == 1


def test_fields_by_name_png_and_plain_tensors(tmp_path: Path) -> None:
    from io import BytesIO

    from PIL import Image

    frames = np.random.default_rng(0).integers(0, 256, (4, H, W, 3), np.uint8)
    encoded = []
    for frame in frames:
        buffer = BytesIO()
        Image.fromarray(frame).save(buffer, "PNG")
        encoded.append(buffer.getvalue())
    features = schema(
        action=folder(delta=tensor("float32", 3), grip=tensor("float32")),
        observation=folder(
            front=image("png", None), plain=tensor("uint8", H, W, 3), hand=tensor("float32", 3),
            gripper=tensor("float32", 1, encoding="zlib"), natural_language_instruction=tensor("string"),
        ),
    )  # fmt: skip
    import zlib

    grip = np.linspace(0, 1, 4, dtype=np.float32)
    raw = episode(4, **{"steps/observation/image": None, "steps/observation/state": None, "steps/action": None}) | {
        "steps/action/delta": np.full((4, 3), 0.005),
        "steps/action/grip": grip,
        "steps/observation/front": encoded,
        "steps/observation/plain": frames,
        "steps/observation/hand": np.full((4, 3), 0.25),
        "steps/observation/gripper": [zlib.compress(g.tobytes()) for g in grip],
        "steps/observation/natural_language_instruction": [b"open it"] * 4,
    }
    root = write(tmp_path / "d", [raw], features)
    robot = spec(cameras=[{"name": n, "height": 1, "width": 1, "slot": i} for i, n in enumerate(("front", "plain"))])
    (found,) = read_all(root, robot, language="observation/natural_language_instruction")
    assert np.array_equal(found.images["front"], frames) and np.array_equal(found.images["plain"], frames)
    assert found.instruction == "open it"
    assert np.array_equal(found.state[:, 3], grip) and np.array_equal(found.action[:, 3], grip)
    (renamed,) = read_all(root, spec(), cameras="image:front")
    assert np.array_equal(renamed.images["image"], frames)
    assert renamed.instruction == "press the button"


def test_an_instruction_in_characters(tmp_path: Path) -> None:
    text = "push the blue cube" + "\0" * 6  # as Language-Table pads it
    observation = folder(image=image(), state=tensor("float32", 4), instruction=tensor("int32", len(text)))
    features = schema(action=tensor("float32", 4), observation=observation)
    rows = np.tile([ord(c) for c in text], (6, 1))
    root = write(tmp_path / "d", [episode(6, 0, **{"steps/observation/instruction": rows})], features)
    (found,) = read_all(root, language="observation/instruction")
    assert found.instruction == "push the blue cube"
    (plain,) = read_all(root)
    assert plain.instruction == "press the button"  # the text of the steps comes first


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(max_size=12),
        st.one_of(
            st.lists(st.binary(max_size=20), max_size=5),
            st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=9).map(
                lambda v: np.array(v, np.float32)
            ),
            st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=9).map(lambda v: np.array(v, np.int64)),
        ),
        max_size=5,
    )
)
def test_the_parser_inverts_protobufs_encoder(features: dict) -> None:
    found = rlds.parse_example(encode(features))
    assert found.keys() == features.keys()
    for name, values in features.items():
        if isinstance(values, list):
            assert [bytes(v) for v in found[name].strings()] == values
        else:
            assert found[name].numbers().dtype == values.dtype
            assert found[name].numbers().tobytes() == values.tobytes()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_bytes_never_escape_the_parser(data: st.DataObject) -> None:
    whole = bytearray(encode({"a": np.arange(20), "b": [b"xyz", b""], "c": np.linspace(0, 1, 9)}))
    for _ in range(data.draw(st.integers(0, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        for values in rlds.parse_example(cut).values():
            if values.kind == 1:
                assert sum(map(len, values.strings())) <= len(cut)
            else:
                assert values.numbers().size <= len(cut)
    except rlds.WireError:
        pass


# --- malformed inputs


@pytest.mark.parametrize(("cut", "expected"), [(5, "a checksum"), (None, "3 records"), (-7, "12 bytes of header")])
def test_a_truncated_shard_loses_only_what_is_cut(tmp_path: Path, cut: int | None, expected: str) -> None:
    root = write(tmp_path / "d", [episode(3, i) for i in range(3)])
    data = shard_of(root).read_bytes()
    ends = np.cumsum([16 + len(encode(episode(3, i))) for i in range(3)]).tolist()
    keep = {5: ends[2] - 5, None: ends[1], -7: ends[1] + 7}[cut]
    shard_of(root).write_bytes(data[:keep])
    found = read_all(root)
    assert codes(found) == ["ok", "ok", "E_TRUNCATED"]
    assert "000002" in str(found[2]) and shard_of(root).name in str(found[2]) and expected in str(found[2])


def test_a_shard_that_is_missing_or_empty_is_counted(tmp_path: Path) -> None:
    root = write(tmp_path / "d", {"train": [[episode(3, 0), episode(3, 1)], [episode(3, 2)], [episode(3, 3)]]})
    shard_of(root, i=0, of=3).unlink()
    shard_of(root, i=1, of=3).write_bytes(b"")
    assert codes(read_all(root)) == ["E_TRUNCATED"] * 3 + ["ok"]


def test_a_flipped_bit_is_named_with_file_and_record(tmp_path: Path) -> None:
    root = write(tmp_path / "d", [episode(3, i) for i in range(3)])
    whole = shard_of(root).read_bytes()
    first = 16 + len(encode(episode(3, 0)))
    rng = np.random.default_rng(0)
    for place in [*range(first, first + 12), *rng.integers(first + 12, 2 * first, 60).tolist()]:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        shard_of(root).write_bytes(damaged)
        found = read_all(root)
        header = place < first + 12  # then the place of the next record is unknown as well
        assert codes(found) == ["ok", "E_CHECKSUM", "E_CHECKSUM" if header else "ok"], place
        assert shard_of(root).name in str(found[1]) and "record 1" in str(found[1])


@pytest.mark.parametrize("name", ["features.json", "dataset_info.json"])
@pytest.mark.parametrize("content", [None, b"{", b"[]", b'{"a": 1}', b"[" * 100_000])
def test_metadata_missing_or_odd(tmp_path: Path, name: str, content: bytes | None) -> None:
    root = write(tmp_path / "d", [episode()])
    (root / name).unlink()
    if content is not None:
        (root / name).write_bytes(content)
    with pytest.raises(Rejected, match=f"^E_SCHEMA: .*{name}"):
        rlds.open_source(root, spec(), options())


def flags(n: int, *steps: int) -> np.ndarray:
    return np.isin(np.arange(n), steps)


CASES: dict[str, tuple[dict, str, str]] = {
    "is_last missing": ({"steps/is_last": None}, "E_KEY", "steps/is_last"),
    "is_last never": ({"steps/is_last": flags(6)}, "E_SCHEMA", "True at step 5 of 6 only, found at"),
    "is_last early": ({"steps/is_last": flags(6, 3)}, "E_SCHEMA", r"found at \[3\]"),
    "two episodes in one": ({"steps/is_last": flags(6, 2, 5)}, "E_SCHEMA", r"found at \[2, 5\]"),
    "is_first late": ({"steps/is_first": flags(6, 1)}, "E_SCHEMA", "steps/is_first"),
    "NaN padding": (
        {"steps/action": np.where(np.arange(6)[:, None] < 4, 0.001, np.nan) * np.ones((6, 4))},
        "E_VALUE",
        "nan from step 4 to the end: padding",
    ),
    "one NaN": ({"steps/observation/state": np.where(np.arange(24) == 9, np.nan, 0.5)}, "E_VALUE", "from step 2 "),
    "infinite": ({"steps/action": np.full((6, 4), np.inf)}, "E_VALUE", "inf"),
    "empty language": ({"steps/language_instruction": [b""] * 6}, "E_INSTRUCTION", "--instruction"),
    "blank language": ({"steps/language_instruction": [b" \n "] * 6}, "E_INSTRUCTION", "--instruction"),
    "no language": ({"steps/language_instruction": []}, "E_LENGTH", "language_instruction 0"),
    "other language": ({"steps/language_instruction": [b"a"] * 3 + [b"b"] * 3}, "E_INSTRUCTION", "at step 3"),
    "not UTF-8": ({"steps/language_instruction": [b"\xff\xfe"] * 6}, "E_SCHEMA", "UTF-8"),
    "not divisible": ({"steps/action": np.zeros(23)}, "E_SCHEMA", "a multiple of 4 values"),
    "too short": ({"steps/action": np.zeros((5, 4))}, "E_LENGTH", "action 5"),
    "too few frames": ({"steps/observation/image": pictures(4, 0)}, "E_LENGTH", "image 4"),
    "key missing": ({"steps/observation/state": None}, "E_KEY", "steps/observation/state"),
    "camera missing": ({"steps/observation/image": None}, "E_KEY", "steps/observation/image"),
    "bytes for numbers": ({"steps/action": [b"x"] * 6}, "E_DTYPE", "a bytes list"),
    "numbers for pictures": ({"steps/observation/image": np.arange(6)}, "E_DTYPE", "a list of numbers"),
    "picture cut": ({"steps/observation/image": [p[:-60] for p in pictures(6, 0)]}, "E_SCHEMA", "picture"),
    "no picture": ({"steps/observation/image": [b"GIF89a"] * 6}, "E_SCHEMA", "JPEG or PNG"),
    "empty picture": ({"steps/observation/image": [b""] * 6}, "E_SCHEMA", "JPEG or PNG"),
    "black": (
        {"steps/observation/image": [simplejpeg.encode_jpeg(np.zeros((H, W, 3), np.uint8))] * 6},
        "E_CAMERA",
        "blank frames",
    ),
    "one colour": (
        {"steps/observation/image": [*pictures(5, 0), simplejpeg.encode_jpeg(np.full((H, W, 3), 200, np.uint8))]},
        "E_CAMERA",
        "1 of one colour, the first at 5",
    ),
    "one step": (
        {k: v[:1] for k, v in episode().items()} | {"steps/is_last": flags(1, 0)},
        "E_EMPTY",
        "at least 2",
    ),
    "no steps": ({k: v[:0] for k, v in episode().items()}, "E_EMPTY", "at least 2"),
    "millimetres": ({"steps/observation/state": np.full((6, 4), 999.0)}, "E_UNITS", "millimetres"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_malformed_episode_gets_its_code(tmp_path: Path, case: str) -> None:
    changes, code, text = CASES[case]
    found = read_all(write(tmp_path / "d", [episode(6, 1), episode(6, 0, **changes), episode(6, 2)]))
    assert codes(found)[::2] == ["ok", "ok"]
    assert isinstance(found[1], Rejected), case
    with pytest.raises(Rejected, match=f"(?s)^{code}.*{text}"):
        raise found[1]
    assert str(found[1]).count("\n") == 0


def test_few_blank_frames_and_a_frozen_camera(tmp_path: Path) -> None:
    blank = simplejpeg.encode_jpeg(np.zeros((H, W, 3), np.uint8))
    still = {"steps/observation/image": pictures(1, 1) * 6}
    episodes = [
        episode(40, 0, **{"steps/observation/image": [*pictures(39, 0), blank]}),
        episode(6, 1, **still),
        episode(6, 2, **still | {"steps/observation/state": np.full((6, 4), 0.5)}),
    ]
    source = rlds.open_source(write(tmp_path / "d", episodes), spec(), options())
    items = source.items()
    (warning,) = check(source.read(items[0]), source.spec, items[0])
    assert "1 of one colour, the first at 39 (2.5% of frames)" in warning
    with pytest.raises(Rejected, match=r"^E_CAMERA: .*images\.image.*6 equal frames.*while the state changes"):
        source.read(items[1])
    (warning,) = check(source.read(items[2]), source.spec, items[2])  # nothing moved
    assert "all 6 frames are equal" in warning


def test_a_record_that_is_no_example(tmp_path: Path) -> None:
    root = write(tmp_path / "d", [episode(), episode(6, 1)])
    shard_of(root).write_bytes(frame_record(b"\x0a\xff\xff\xff\xff\x0f") + frame_record(encode(episode(6, 1))))
    assert codes(read_all(root)) == ["E_SCHEMA", "ok"]


def test_more_records_than_listed_are_refused_not_dropped(tmp_path: Path) -> None:
    root = write(tmp_path / "d", [episode(6, i) for i in range(3)])
    info = json.loads((root / "dataset_info.json").read_text())
    info["splits"][0]["shardLengths"] = ["2"]
    (root / "dataset_info.json").write_text(json.dumps(info))
    found = read_all(root)
    assert codes(found) == ["ok", "ok", "E_COUNT"] and "shardLengths" in str(found[2])


def split(**values) -> dict:
    return {"splits": [{"name": "train", "shardLengths": ["1"]} | values]}


@pytest.mark.parametrize(
    ("info", "code"),
    [
        (split(name="../../etc"), "E_PATH"),
        ({"name": "../x"}, "E_PATH"),
        (split(filepathTemplate="/etc/{DATASET}"), "E_PATH"),
        (split(filepathTemplate="../{DATASET}-{SPLIT}.tfrecord"), "E_PATH"),
        (split(filepathTemplate="a\x00b"), "E_PATH"),
        (split(filepathTemplate="x" * 300), "E_PATH"),
        (split(shardLengths=["1000000000000000000"]), "E_PATH"),
        (split(shardLengths=["-4"]), "E_PATH"),
        (split(shardLengths=["many"]), "E_SCHEMA"),
        (split(shardLengths=[]), "E_EMPTY"),
        ({"splits": []}, "E_EMPTY"),
        ({"fileFormat": "array_record"}, "E_SCHEMA"),
    ],
)
def test_hostile_or_odd_dataset_info(tmp_path: Path, info: dict, code: str) -> None:
    root = write(tmp_path / "d", [episode()], **info)
    with pytest.raises(Rejected, match=f"^{code}: "):
        rlds.open_source(root, spec(), options()).items()


def test_a_shard_that_links_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    other = write(tmp_path / "other", [episode(6, 5)])
    root = write(tmp_path / "d", {"train": [[episode()], [episode(6, 1)]]})
    shard_of(root, i=1, of=2).unlink()
    shard_of(root, i=1, of=2).symlink_to(shard_of(other))
    assert codes(read_all(root)) == ["ok", "E_PATH"]


def png_bomb() -> bytes:
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + b"IHDR"
        + struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
        + bytes(4)
    )


def test_bombs_are_refused_before_they_are_inflated(tmp_path: Path) -> None:
    import tracemalloc
    import zlib

    bomb = zlib.compress(bytes(200 * 2**20), 9)
    features = schema(
        action=tensor("float32", 4, encoding="zlib"), observation=folder(image=image(), state=tensor("float32", 4))
    )
    root = write(tmp_path / "z", [episode(6, 0, **{"steps/action": [bomb] * 6})], features)
    huge = schema(
        action=tensor("float64", 4), observation=folder(image=image(shape=(4000, 4000)), state=tensor("float32", 4))
    )
    many = write(tmp_path / "p", [episode(6, 0, **{"steps/observation/image": [png_bomb()] * 6})])
    wide = write(tmp_path / "w", [episode()], huge)
    tracemalloc.start()
    try:
        found = [*read_all(root), *read_all(many), *read_all(wide)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert codes(found) == ["E_SCHEMA", "E_PATH", "E_PATH"]
    assert peak < 20 * 2**20


def test_what_cannot_be_inferred_is_refused(tmp_path: Path) -> None:
    root = write(tmp_path / "d", [episode()])
    with pytest.raises(Rejected, match=r"--embodiment FILE") as error:
        rlds.open_source(root, None, options())
    assert "steps/observation/state float32[4]" in str(error.value) and "image" in str(error.value)
    robot = spec(action=[field("joints", "joint_position", 7, 0)])
    assert "joints[7]" in str(read_all(root, robot)[0]) and codes(read_all(root, robot)) == ["E_SCHEMA"]
    with pytest.raises(Rejected, match=r"E_SCHEMA.*cameras.*wrist"):
        two = [{"name": n, "height": 1, "width": 1, "slot": i} for i, n in enumerate(("image", "wrist"))]
        rlds.open_source(root, spec(cameras=two), options())
    with pytest.raises(ValueError, match="no transform 'nope'"):
        rlds.open_source(root, spec(), options(transform="nope"))
    with pytest.raises(Rejected, match=r"E_EMPTY.*train"):
        rlds.open_source(root, spec(), options(split="test"))


def test_the_only_camera_needs_no_name_and_quaternions_need_an_order(tmp_path: Path) -> None:
    quaternion = np.tile([0.0, 0.0, 0.6, 0.8], (6, 1))
    root = write(tmp_path / "d", [episode(6, 0, **{"steps/observation/state": quaternion})])
    front = [{"name": "front", "height": 1, "width": 1, "slot": 0}]
    turn = {**field("turn", "ee_rotation_6d", 6, 3), "unit": "1"}
    robot = spec(cameras=front, state=[turn])
    assert "-o quaternion=" in str(read_all(root, robot)[0])
    (found,) = read_all(root, robot, quaternion="xyzw")
    assert found.images.keys() == {"front"}
    matrix = Rotation.from_quat([0, 0, 0.6, 0.8]).as_matrix()
    assert np.allclose(found.state[3], np.concatenate([matrix[:, 0], matrix[:, 1]]))


def test_several_datasets_in_a_folder_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a/1.0.0", [episode()])
    write(tmp_path / "b/1.0.0", [episode()])
    with pytest.raises(Rejected, match=r"E_SCHEMA.*one dataset.*a/1.0.0, b/1.0.0"):
        rlds.open_source(tmp_path, spec(), options())
    with pytest.raises(FileNotFoundError):
        rlds.open_source(tmp_path / "c", spec(), options())


# --- the command


def run(root: Path, out: Path, tmp_path: Path, **changes):
    import yaml

    robot = tmp_path / "robot.yaml"
    robot.write_text(yaml.safe_dump(embodiment_to_dict(spec())))
    values = {
        "source": "rlds", "path": root, "out": out, "embodiment": str(robot), "instruction": None, "control_hz": None,
        "extra": {}, "codec": "raw", "licence": "MIT", "workers": 0, "exist": "error", "quarantine": True, "ray": None,
    }  # fmt: skip
    return convert(ConvertConfig(**(values | changes)))


def test_in_is_written_plus_rejected(tmp_path: Path) -> None:
    twin = episode(6, 9)
    shards = {
        "train": [[episode(6, 0), episode(6, 1, **{"steps/action": np.zeros(23)})], [twin]],
        "test": [[episode(5, 2), twin]],
    }
    tally = run(write(tmp_path / "d", shards), tmp_path / "s.zarr", tmp_path)
    assert tally.total == 5 and tally.written + len(tally.rejected) == 5
    assert sorted(r.code for r in tally.rejected) == ["E_DUP", "E_SCHEMA"]
    assert [e.source for e in Store(tmp_path / "s.zarr").episodes][:1] == ["test/000000/000000"]


# --- Open X-Embodiment


def random_raw(transform: oxe.Transform, n: int = 7) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.uniform(0.05, 0.5, (n, width)).astype(np.float32) for name, width in transform.needs.items()}


SIZES = {"ee_delta": (2, 3), "rotation_delta": (3,), "ee_rotation": (6,), "gripper": (1,), "ee_position": (2, 3)}


@pytest.mark.parametrize("name", oxe.TRANSFORMS)
def test_every_transform_gives_finite_fields_of_the_common_names(name: str) -> None:
    transform = oxe.TRANSFORMS[name]
    raw = random_raw(transform)
    before = {k: v.copy() for k, v in raw.items()}
    named = transform.convert(raw)
    assert all(np.array_equal(raw[k], before[k]) for k in raw)  # pure
    steps = len(range(7)[named.keep])
    assert named.action
    for group in (named.state, named.action):
        for field_name, values in group.items():
            assert values.shape[0] == steps and np.isfinite(values).all()
            assert values.shape[1] in SIZES.get(field_name, (6, 7)), field_name
    for group in (named.state, named.action):
        assert "gripper" not in group or 0 <= group["gripper"].min() <= group["gripper"].max() <= 1
    assert not transform.verified  # no file of Open X-Embodiment was ever read here
    if transform.embodiment:
        robot = load_embodiment(transform.embodiment)
        assert {f.name: f.size for f in robot.action} == {k: v.shape[1] for k, v in named.action.items()}
        assert {(f.name, f.size) for f in robot.state} <= {(k, v.shape[1]) for k, v in named.state.items()}


@pytest.mark.parametrize(
    ("function", "values", "expected"),
    [
        (oxe.opening, [-1, 0, 0.5, 2], [0, 0, 0.5, 1]),
        (oxe.closing, [-1, 0, 0.25, 2], [1, 1, 0.75, 0]),
        (oxe.closing_relative, [0, 0, 1, 0, 0, -1, 0], [1, 1, 0, 0, 0, 1, 1]),
        (oxe.closing_relative, [0, -1, 0], [0, 1, 1]),
        (oxe.closing_relative, [0, 0], [1, 1]),
        (oxe.opening_decided, [1, 0.6, 0.3, 0, 0.4, 1, 0.7], [1, 0, 0, 0, 1, 1, 1]),
    ],
)
def test_grippers(function: Callable, values: list, expected: list) -> None:
    found = function(np.array(values, np.float32)[:, None])
    assert found.shape == (len(values), 1)
    assert found[:, 0].tolist() == expected


def test_bridge_actions_lead_from_one_measured_pose_to_the_next() -> None:
    rng = np.random.default_rng(0)
    state = np.concatenate([rng.normal(size=(6, 3)), rng.uniform(-1, 1, (6, 3)), rng.uniform(0, 1, (6, 1))], axis=1)
    named = oxe.TRANSFORMS["bridge_dataset"].convert({"observation/state": state, "action": np.ones((6, 7))})
    assert named.keep == slice(1, 5)
    position, rotation = state[1, :3], Rotation.from_euler("xyz", state[1, 3:6])
    for step in range(4):
        position = position + named.action["ee_delta"][step]
        rotation = Rotation.from_rotvec(named.action["rotation_delta"][step]) * rotation
    assert np.allclose(position, state[5, :3])
    assert (rotation * Rotation.from_euler("xyz", state[5, 3:6]).inv()).magnitude() < 1e-9


def test_a_known_dataset_needs_no_embodiment(tmp_path: Path) -> None:
    features = schema(
        action=folder(world_vector=tensor("float32", 3), rotation_delta=tensor("float32", 3),
                      gripper_closedness_action=tensor("float32", 1)),
        observation=folder(image=image(), base_pose_tool_reached=tensor("float32", 7),
                           gripper_closed=tensor("float32", 1)),
    )  # fmt: skip
    n = 6
    raw = episode(n, **{"steps/observation/state": None, "steps/action": None}) | {
        "steps/action/world_vector": np.full((n, 3), 0.01),
        "steps/action/rotation_delta": np.zeros((n, 3)),
        "steps/action/gripper_closedness_action": np.array([0, 0, 1, 0, 0, 0], float),
        "steps/observation/base_pose_tool_reached": np.tile([0.5, 0.1, 0.8, 0, 0, 0, -1.0], (n, 1)),
        "steps/observation/gripper_closed": np.zeros(n),
    }
    root = write(tmp_path / "d", [raw], features, name="fractal20220817_data")
    source = rlds.open_source(root, None, options())
    assert source.spec.name == "google_robot_fractal" and source.spec.control_hz == 3
    assert any("never checked on its data" in w for w in source.warnings)
    (item,) = source.items()
    found = source.read(item)
    check(found, source.spec, item)
    assert found.action[:, 6].tolist() == [1, 1, 0, 0, 0, 0]
    assert found.state[0].tolist() == pytest.approx([0.5, 0.1, 0.8, 1, 0, 0, 0, 1, 0, 1])


def test_the_mixture_has_28_datasets_that_are_known_or_say_why_not() -> None:
    mixture = oxe.load_mixture("oxe_mixture")
    assert len(mixture.datasets) == 28
    for dataset in mixture.datasets:
        assert dataset.weight > 0 and not dataset.verified
        if dataset.transform is None:
            assert dataset.note and dataset.embodiment is None
        else:
            assert dataset.embodiment == oxe.TRANSFORMS[dataset.transform].embodiment
        if dataset.embodiment is not None:
            assert load_embodiment(dataset.embodiment).name == dataset.embodiment
        else:
            assert dataset.note
    assert sum(d.transform is not None for d in mixture.datasets) == 26
    assert {d.name: d.weight for d in mixture.datasets}["droid"] == 0.06


def test_weights_become_shares_of_samples() -> None:
    mixture = oxe.load_mixture("oxe_mixture")
    found = oxe.shares(mixture, {"taco_play": 100, "language_table": 1000, "bridge_dataset": 200})
    assert found == pytest.approx({"taco_play": 0.4, "language_table": 0.2, "bridge_dataset": 0.4})
    with pytest.raises(ValueError, match="nope"):
        oxe.shares(mixture, {"nope": 3})


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"weight": 0.0}, "weight must be positive"),
        ({"transform": "taco"}, "no transform 'taco'"),
        ({"embodiment": None}, "what is null needs a note"),
        ({"verified": True}, "verified differs"),
        ({"wieght": 1.0}, "unknown key"),
    ],
)
def test_a_mixture_file_is_checked(tmp_path: Path, change: dict, text: str) -> None:
    entry = {
        "name": "taco_play", "weight": 1.0, "transform": "taco_play", "embodiment": "franka_taco_play",
        "verified": False, "note": "",
    }  # fmt: skip
    path = tmp_path / "m.yaml"
    path.write_text(json.dumps({"name": "m", "source": "s", "datasets": [entry | change]}))
    with pytest.raises(ValueError, match=text):
        oxe.load_mixture(path)
    path.write_text(json.dumps({"name": "m", "source": "s", "datasets": [entry, entry]}))
    with pytest.raises(ValueError, match="listed twice: taco_play"):
        oxe.load_mixture(path)
    with pytest.raises(ValueError, match="shipped: oxe_mixture"):
        oxe.load_mixture("other")
