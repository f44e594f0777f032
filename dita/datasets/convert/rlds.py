"""RLDS / Open X-Embodiment as TensorFlow Datasets writes it, read without TensorFlow.

A dataset folder (often `<name>/<version>/`) holds `features.json`, `dataset_info.json` and shards
`<name>-<split>.tfrecord-00000-of-00005`. A record is one episode: a `tf.train.Example` whose features are flat lists,
`steps/action` being every step's action one after the other; shapes are in `features.json` only.

Names: field f of the embodiment is the feature `steps/observation/f` (state) or `steps/action/f` (action); where the
data has one vector instead (`steps/observation/state`, `steps/action`; others by `-o state=KEY -o action=KEY`), its
columns are the embodiment's fields in their order. A camera is the picture feature of its name. For the datasets of
`oxe.py` a function that knows their layout names the fields instead. float64 features are float32 lists on disk.

Formats: https://www.tensorflow.org/tutorials/load_data/tfrecord (framing), tensorflow/core/example/example.proto,
tensorflow_datasets/core/proto/feature.proto. The parser reads only these messages, takes no size on trust and
allocates nothing that is not in the file.
"""

from __future__ import annotations

import json
import math
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np
from jaxtyping import Float32, UInt8

from dita.datasets.convert.base import (
    Item,
    Options,
    Rejected,
    assemble,
    check_inside,
    check_lengths,
    check_name,
    check_size,
    fit_spec,
    match_cameras,
    natural,
    refuse_to_guess,
    reject,
    rotation_columns,
    safe_path,
    to_si,
)
from dita.datasets.convert.oxe import TRANSFORMS, Transform
from dita.datasets.convert.pictures import decode_picture, picture_size
from dita.embodiment import load_embodiment
from dita.types import EmbodimentSpec, Episode, FieldSpec

OPTIONS = {
    "state": "feature under steps/ that holds the state vector, e.g. observation/proprio",
    "action": "feature under steps/ that holds the action vector",
    "cameras": "NAME:FEATURE,... to choose and name cameras, e.g. front:image,hand:wrist_image",
    "language": "feature under steps/ that holds the instruction, e.g. language_instruction_2",
    "transform": "a dataset of the OXE table whose layout this one has, or none for the plain one",
    "split": "only this split",
    "quaternion": "order of the quaternions in a vector, wxyz or xyzw",
}
INSTRUCTIONS = (
    "language_instruction",
    "observation/natural_language_instruction",
    "observation/language_instruction",
    "natural_language_instruction",
    "observation/instruction",
)
MAX_EPISODES = 2_000_000  # of one dataset; the largest of OXE has 0.6 million
SPLIT = re.compile(r"[A-Za-z0-9_]{1,64}")
TYPES = {"float32": "<f4", "float64": "<f8", "bool": "|b1"} | {
    f"{sign}int{bits}": f"<{sign or 'i'}{bits // 8}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}
COPY = "restore the file from a copy, or --quarantine to write the other episodes"


# --- TFRecord: uint64 length, its masked crc32c, the data, its masked crc32c


def masked_crc(data: bytes | memoryview) -> int:
    """Return the crc32c as TFRecord stores it."""
    crc = google_crc32c.value(bytes(data))
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


class Records(NamedTuple):
    """Where the records of one shard lie, and what ended the list too early."""

    spans: tuple[tuple[int, int], ...]  # (offset of the data, length)
    fault: tuple[str, str, str] | None  # code, expected, found


def find_records(path: Path) -> Records:
    """List the records of a shard by their headers; the data itself is checked when it is read."""
    stat = path.stat()
    return _scan(path, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _scan(path: Path, size: int, _changed: int) -> Records:
    spans: list[tuple[int, int]] = []
    with path.open("rb") as file:
        at = 0
        while at < size:
            where = f"record {len(spans)} at byte {at}"
            header = file.read(12)
            if len(header) < 12:
                return Records(tuple(spans), ("E_TRUNCATED", f"12 bytes of header of {where}", f"{len(header)}"))
            length, crc = struct.unpack("<QI", header)
            if masked_crc(header[:8]) != crc:
                expected = f"crc32c {masked_crc(header[:8]):#010x} of the length of {where}"
                return Records(tuple(spans), ("E_CHECKSUM", expected, f"{crc:#010x}"))
            if at + 16 + length > size:
                expected = f"{length} bytes and a checksum in {where}"
                return Records(tuple(spans), ("E_TRUNCATED", expected, f"{size - at - 12} bytes"))
            spans.append((at + 12, length))
            at += 16 + length
            file.seek(at)
    return Records(tuple(spans), None)


def read_record(path: Path, span: tuple[int, int], index: int) -> bytes:
    """Read one record and check its crc32c.

    Raises:
        Rejected: E_CHECKSUM, with the record and its place.
    """
    offset, length = span
    with path.open("rb") as file:
        file.seek(offset)
        data, footer = file.read(length), file.read(4)
    if len(data) < length or len(footer) < 4:
        raise Rejected("E_TRUNCATED", path, "", f"record {index}", f"{length + 4} bytes", f"{len(data)}", COPY)
    found = struct.unpack("<I", footer)[0]
    if masked_crc(data) != found:
        where = f"record {index} at byte {offset - 12}"
        raise Rejected("E_CHECKSUM", path, "", where, f"crc32c {masked_crc(data):#010x}", f"{found:#010x}", COPY)
    return data


# --- tf.train.Example: protobuf wire format, of these messages only


class WireError(ValueError):
    """Bytes that are no tf.train.Example."""


@dataclass(frozen=True)
class Values:
    """One feature's list, undecoded: `kind` 1 bytes, 2 float, 3 int64, 0 empty; views into the record."""

    kind: int
    parts: tuple[memoryview | bytes, ...]

    def numbers(self) -> np.ndarray:
        """Decode a float or int64 list; an empty one has neither."""
        if self.kind == 2:
            return np.concatenate([np.frombuffer(p, "<f4") for p in self.parts] or [np.zeros(0, "<f4")])
        if self.kind == 3:
            return np.concatenate([decode_varints(p) for p in self.parts] or [np.zeros(0, np.int64)])
        if self.kind == 0:
            return np.zeros(0, np.float32)
        raise WireError("a bytes list where numbers are expected")

    def strings(self) -> tuple[memoryview | bytes, ...]:
        """Return the values of a bytes list."""
        if self.kind in (0, 1):
            return self.parts
        raise WireError("a list of numbers where bytes are expected")


def decode_varints(data: memoryview | bytes) -> np.ndarray:
    """Decode packed varints to int64; at most ten bytes each.

    Raises:
        WireError: the last one is cut, or one is too long.
    """
    raw = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(raw < 128)
    if not len(raw):
        return np.zeros(0, np.int64)
    if not len(ends) or ends[-1] != len(raw) - 1:
        raise WireError("a cut integer")
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 10:
        raise WireError("an integer of more than ten bytes")
    out = np.zeros(len(ends), np.uint64)
    for k in range(int(lengths.max())):
        more = lengths > k
        out[more] |= (raw[starts[more] + k] & 0x7F).astype(np.uint64) << np.uint64(7 * k)
    return out.view(np.int64)


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for k in range(10):
        if at + k >= len(data):
            raise WireError("a cut integer")
        value |= (data[at + k] & 0x7F) << (7 * k)
        if data[at + k] < 128:
            return value, at + k + 1
    raise WireError("an integer of more than ten bytes")


def _fields(data: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """Yield (field number, wire type, its bytes) of one message."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            _, end = _varint(data, at)
        elif wire == 2:
            length, at = _varint(data, at)
            end = at + length
        elif wire in (1, 5):
            end = at + (8 if wire == 1 else 4)
        else:
            raise WireError(f"wire type {wire}")
        if end > len(data):
            raise WireError(f"a field of {end - at} bytes where {len(data) - at} are left")
        yield number, wire, data[at:end]
        at = end


def parse_example(record: bytes) -> dict[str, Values]:
    """Split a serialised tf.train.Example into its features, undecoded.

    Raises:
        WireError: it is none, or a feature comes twice.
    """
    features: dict[str, Values] = {}
    for number, wire, content in _fields(memoryview(record)):
        if (number, wire) != (1, 2):
            raise WireError(f"field {number} in Example")
        for inner, _, entry in _fields(content):
            if inner != 1:
                raise WireError(f"field {inner} in Features")
            name, values = _parse_entry(entry)
            if name in features:
                raise WireError(f"feature {name[:60]!r} comes twice")
            features[name] = values
    return features


def _parse_entry(entry: memoryview) -> tuple[str, Values]:
    name, values = "", Values(0, ())
    for number, wire, content in _fields(entry):
        if number == 1 and wire == 2:
            name = _text(content)
        elif number == 2 and wire == 2:
            values = _parse_values(content)
        else:
            raise WireError(f"field {number} in a feature")
    return name, values


def _parse_values(feature: memoryview) -> Values:
    kind, parts = 0, []
    for number, wire, content in _fields(feature):
        if wire != 2 or number not in (1, 2, 3) or kind not in (0, number):
            raise WireError(f"field {number} of wire type {wire} in a feature's value")
        kind = number
        for inner, inner_wire, value in _fields(content):
            # numbers may come packed or one by one
            if inner != 1 or inner_wire not in ({1: (2,), 2: (2, 5), 3: (2, 0)}[kind]):
                raise WireError(f"field {inner} of wire type {inner_wire} in a list")
            if kind == 2 and len(value) % 4:
                raise WireError(f"floats in {len(value)} bytes")
            parts.append(value)
    return Values(kind, tuple(parts))


def _text(data: memoryview | bytes) -> str:
    try:
        return bytes(data).decode()
    except UnicodeDecodeError as e:
        raise WireError(f"text that is not UTF-8: {e.reason} at byte {e.start}") from None


# --- features.json and dataset_info.json


@dataclass(frozen=True)
class Feature:
    """What features.json says of one list."""

    key: str  # as in the Example, e.g. "steps/observation/image"
    kind: str  # "tensor", "image", "text" or another class that is not read
    dtype: str
    shape: tuple[int | None, ...]  # of one step; None: not fixed
    encoding: str  # tensor: "none", "bytes", "zlib"

    @property
    def is_picture(self) -> bool:
        """An RGB camera: encoded, or a plain uint8 tensor."""
        plain = self.kind == "tensor" and self.encoding == "none" and None not in self.shape
        rgb = self.dtype == "uint8" and len(self.shape) == 3 and self.shape[2] == 3
        return rgb and (self.kind == "image" or plain)

    def about(self) -> str:
        """Describe it for people."""
        return f"{self.key} {self.dtype or self.kind}{[n or '?' for n in self.shape] if self.shape else ''}"


def read_json(path: Path) -> Any:
    """Read a JSON file of at most 64 MiB.

    Raises:
        Rejected: E_SCHEMA: it is not there or not JSON.
    """
    if not path.is_file():
        todo = "give the folder that tensorflow_datasets wrote; without it the lists have no shape"
        raise Rejected("E_SCHEMA", path, "", "", "the file", "none", todo)
    if path.stat().st_size > 2**26:
        raise Rejected("E_PATH", path, "", "", f"at most {2**26} bytes", str(path.stat().st_size), COPY)
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise Rejected("E_SCHEMA", path, "", "", "JSON", str(e), COPY) from None


def parse_features(values: Any, file: str | Path) -> dict[str, Feature]:
    """Flatten features.json: key -> Feature, of the episode (`episode_metadata/...`) and of its steps (`steps/...`).

    Raises:
        Rejected: E_SCHEMA: not the tree that tensorflow_datasets (4.3 or newer) writes.
    """
    out: dict[str, Feature] = {}
    try:
        _flatten(values, "", out, 0)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        found = f"{type(e).__name__} {e}"
        raise Rejected(
            "E_SCHEMA", file, "", "", "features as tensorflow_datasets >= 4.3 writes them", found, COPY
        ) from None
    if not any(key.startswith("steps/") for key in out):
        raise Rejected("E_SCHEMA", file, "", "steps", "a dataset of steps", f"{', '.join(out) or 'nothing'}", COPY)
    return out


def _flatten(node: dict[str, Any], key: str, out: dict[str, Feature], depth: int) -> None:
    if depth > 32:
        raise ValueError("features nested more than 32 deep")
    if "featuresDict" in node:
        for name, child in node["featuresDict"]["features"].items():
            _flatten(child, f"{key}/{name}" if key else name, out, depth + 1)
    elif key == "steps" and "sequence" in node:
        _flatten(node["sequence"]["feature"], key, out, depth + 1)
    elif "tensor" in node:
        tensor = node["tensor"]
        out[key] = Feature(key, "tensor", tensor["dtype"], _shape(tensor), tensor.get("encoding", "none").lower())
    elif "image" in node:
        out[key] = Feature(key, "image", node["image"].get("dtype", "uint8"), _shape(node["image"]), "")
    elif "text" in node:
        out[key] = Feature(key, "text", "", (), "")
    else:
        out[key] = Feature(key, node["pythonClassName"].rpartition(".")[2], "", (), "")


def _shape(node: dict[str, Any]) -> tuple[int | None, ...]:
    dims = [int(n) for n in node.get("shape", {}).get("dimensions", [])]
    if any(n < -1 or n > 2**31 for n in dims):
        raise ValueError(f"shape {dims}")
    return tuple(None if n == -1 else n for n in dims)


@dataclass(frozen=True)
class Shard:
    """One file of one split."""

    split: str
    number: int
    file: str  # relative to the dataset folder
    episodes: int  # that dataset_info.json says


def parse_info(info: Any, file: Path) -> tuple[str, list[Shard]]:
    """Return the dataset's name and its shards, as dataset_info.json lists them.

    Raises:
        Rejected: E_SCHEMA: a key is missing or odd, not TFRecord; E_PATH: hostile names or counts.
    """
    try:
        name, container = info["name"], info.get("fileFormat", "tfrecord")
        splits = [
            (s["name"], s.get("filepathTemplate", ""), [int(n) for n in s.get("shardLengths", [])])
            for s in info["splits"]
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        found = f"{type(e).__name__} {e}"
        raise Rejected("E_SCHEMA", file, "", "", "name and splits with shardLengths", found, COPY) from None
    if container != "tfrecord":
        todo = "write it again with file_format='tfrecord'"
        raise Rejected("E_SCHEMA", file, "", "fileFormat", "tfrecord", ascii(container), todo)
    if not isinstance(name, str) or not all(
        isinstance(s, str) and SPLIT.fullmatch(s) for s in (name, *(s[0] for s in splits))
    ):
        found = ascii([name, *(s[0] for s in splits)])[:120]
        raise Rejected("E_PATH", file, "", "name", "names of letters, digits and _ (at most 64)", found, COPY)
    if any(n < 0 for s in splits for n in s[2]) or sum(sum(s[2]) for s in splits) > MAX_EPISODES:
        raise Rejected("E_PATH", file, "", "shardLengths", f"at most {MAX_EPISODES} episodes", "more", COPY)
    shards = []
    for split, template, lengths in splits:
        for number, episodes in enumerate(lengths):
            shard = _shard_name(template, name, split, number, len(lengths))
            shards.append(Shard(split, number, check_name(shard, file, "filepathTemplate"), episodes))
    return name, shards


def _shard_name(template: str, dataset: str, split: str, number: int, count: int) -> str:
    x_of_y = f"{number:05d}-of-{count:05d}"
    parts = {
        "{DATASET}": dataset,
        "{SPLIT}": split,
        "{FILEFORMAT}": "tfrecord",
        "{SHARD_X_OF_Y}": x_of_y,
        "{SHARD_INDEX}": f"{number:05d}",
        "{NUM_SHARDS}": f"{count:05d}",
    }
    text = str(template) or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    for mark, value in parts.items():
        text = text.replace(mark, value)
    return text


def find_dataset(path: Path) -> Path:
    """Return the one dataset folder at, or up to two levels below, `path`.

    Raises:
        FileNotFoundError: nothing is there.
        Rejected: E_SCHEMA: none or several.
    """
    if path.is_file():
        path = path.parent
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist")
    for pattern in ("", "*/", "*/*/"):
        found = {p.parent for name in ("features.json", "dataset_info.json") for p in path.glob(pattern + name)}
        if len(found) == 1:
            return check_inside(path, found.pop())
        if found:
            names = ", ".join(sorted((p.relative_to(path).as_posix() for p in found), key=natural))
            raise Rejected("E_SCHEMA", path, "", "", "one dataset", names, "convert each into a store of its own")
    todo = "give the folder that tensorflow_datasets wrote"
    raise Rejected("E_SCHEMA", path, "", "", "features.json and dataset_info.json", "neither", todo)


# --- steps


class Steps:
    """The steps of one episode: features of `steps/` decoded on demand, every one with the same number of steps."""

    def __init__(self, example: Mapping[str, Values], features: Mapping[str, Feature], item: Item) -> None:
        self._example = example
        self._features = features
        self._item = item
        self.lengths: dict[str, int] = {}  # of what was decoded

    def array(self, name: str) -> np.ndarray:
        """Decode numbers to [m, ...] as features.json shapes them; float64 comes as float32, as it is stored.

        Raises:
            Rejected: E_KEY: not there; E_DTYPE: not numbers; E_SCHEMA: the list does not divide into steps.
        """
        feature, values = self._get(name)
        shape = feature.shape
        if feature.kind != "tensor" or feature.dtype not in TYPES or None in shape:
            raise self._odd(name, "numbers of a fixed shape", feature.about(), "E_DTYPE")
        if feature.encoding != "none":
            out = self._decode_bytes(feature, values, tuple(n or 0 for n in shape))
        else:
            flat = self._numbers(name, values)
            width = math.prod(n or 0 for n in shape)
            if width == 0 or len(flat) % width:
                raise self._odd(name, f"a multiple of {width} values ({feature.about()})", f"{len(flat)}")
            out = flat.reshape(-1, *(n or 0 for n in shape))
        self.lengths[name] = len(out)
        return out

    def vector(self, name: str) -> Float32[np.ndarray, "m d"]:
        """Return `array` as float32 rows."""
        out = self.array(name)
        return out.reshape(len(out), -1).astype(np.float32)

    def texts(self, name: str) -> list[str]:
        """Decode one text per step; Language-Table has rows of characters, padded with zeros.

        Raises:
            Rejected: E_KEY: not there; E_SCHEMA: not UTF-8.
        """
        feature, values = self._get(name)
        if feature.dtype in TYPES:
            rows = np.clip(self.array(name), 0, 0xFFFD).astype(int).tolist()
            return ["".join(chr(c) for c in row if c) for row in rows]
        try:
            out = [_text(value) for value in values.strings()]
        except WireError as e:
            raise self._odd(name, "UTF-8 texts", str(e)) from None
        self.lengths[name] = len(out)
        return out

    def pictures(self, name: str, height: int, width: int) -> UInt8[np.ndarray, "m h w 3"]:
        """Decode one RGB picture per step, all of one size.

        Raises:
            Rejected: E_KEY: not there; E_DTYPE: numbers; E_SCHEMA: damaged, or of another size; E_PATH: too much.
        """
        feature, values = self._get(name)
        if feature.kind != "image":
            frames = self.array(name)
            if frames.min(initial=0) < 0 or frames.max(initial=0) > 255:
                raise self._odd(name, "values of 0 .. 255", f"{frames.min()} .. {frames.max()}")
            return frames.astype(np.uint8)
        encoded = self._strings(name, values)
        self.lengths[name] = len(encoded)
        check_size((len(encoded), height, width, 3), 1, self._item.file, name, sum(map(len, encoded)))
        out = np.empty((len(encoded), height, width, 3), np.uint8)
        for i, data in enumerate(encoded):
            where = f"steps/{name}[{i}]"
            if (size := picture_size(data, self._item.file, where)) != (height, width):
                raise self._odd(f"{name}[{i}]", f"{width} x {height} pixels", f"{size[1]} x {size[0]}")
            out[i] = decode_picture(data, self._item.file, where)
        return out

    def _get(self, name: str) -> tuple[Feature, Values]:
        key = f"steps/{name}"
        if key not in self._features:
            have = ", ".join(k.removeprefix("steps/") for k in self._features if k.startswith("steps/"))
            raise self._odd(name, "the feature in features.json", f"only {have}", "E_KEY")
        if key not in self._example:
            raise self._odd(name, f"the feature as features.json says ({self._features[key].about()})", "none", "E_KEY")
        return self._features[key], self._example[key]

    def _strings(self, name: str, values: Values) -> tuple[memoryview | bytes, ...]:
        try:
            return values.strings()
        except WireError as e:
            raise self._odd(name, "a list of bytes", str(e), "E_DTYPE") from None

    def _numbers(self, name: str, values: Values) -> np.ndarray:
        try:
            return values.numbers()
        except WireError as e:
            raise self._odd(name, "a list of numbers", str(e), "E_DTYPE") from None

    def _decode_bytes(self, feature: Feature, values: Values, shape: tuple[int, ...]) -> np.ndarray:
        """Decode tensors that are stored as bytes, one value per step, perhaps deflated."""
        dtype = np.dtype(TYPES[feature.dtype])
        size = math.prod(shape) * dtype.itemsize
        name = feature.key.removeprefix("steps/")
        encoded = self._strings(name, values)
        check_size((len(encoded), size), 1, self._item.file, name, sum(map(len, encoded)))
        rows = []
        for i, data in enumerate(encoded):
            raw = bytes(data)
            if feature.encoding == "zlib":
                try:
                    raw = zlib.decompressobj().decompress(raw, size + 1)  # never more than it may be
                except zlib.error as e:
                    raise self._odd(f"{name}[{i}]", "deflated bytes", str(e)) from None
            if len(raw) != size:
                raise self._odd(f"{name}[{i}]", f"{size} bytes ({feature.about()})", f"{len(raw)}")
            rows.append(np.frombuffer(raw, dtype).reshape(shape))
        return np.stack(rows) if rows else np.zeros((0, *shape), dtype)

    def _odd(self, name: str, expected: str, found: str, code: str = "E_SCHEMA") -> Rejected:
        return reject(code, self._item, f"steps/{name}", expected, found, COPY)


def check_boundaries(steps: Steps, features: Mapping[str, Feature], item: Item) -> int:
    """Return the number of steps; the flags must say that this is one whole episode.

    Raises:
        Rejected: E_KEY: no is_last; E_SCHEMA: a flag on a wrong step; E_EMPTY: no steps.
    """
    last = steps.array("is_last").reshape(-1).astype(bool)
    if not len(last):
        raise reject("E_EMPTY", item, "steps/is_last", "at least 2 frames", "0", "remove the episode")
    flags = {"is_last": (last, len(last) - 1)}
    if "steps/is_first" in features:
        flags["is_first"] = (steps.array("is_first").reshape(-1).astype(bool), 0)
    check_lengths(steps.lengths, item)
    for name, (flag, step) in flags.items():
        if np.flatnonzero(flag).tolist() != [step]:
            found = f"at {np.flatnonzero(flag).tolist()[:5]}"
            todo = (
                "the episode is cut, or several run into one: write the dataset again, or --quarantine to leave it out"
            )
            raise reject("E_SCHEMA", item, f"steps/{name}", f"True at step {step} of {len(flag)} only", found, todo)
    return len(last)


def check_padding(values: np.ndarray, name: str, item: Item) -> None:
    """Refuse rows that are not finite, E_VALUE, and say when they look like padding at the end."""
    bad = np.asarray(~np.isfinite(values).all(axis=1))
    if bad.any():
        first = int(np.argmax(bad))
        tail = " to the end: padding" if bad[first:].all() else ""
        odd = next(v for v in values[first].tolist() if not np.isfinite(v))
        found = f"{odd} from step {first}{tail} ({bad.mean():.1%} of steps)"
        todo = "cut the episode where its padding begins" if tail else "correct or remove the episode"
        raise reject("E_VALUE", item, f"steps/{name}", "finite numbers", found, todo)


def check_frozen(frames: UInt8[np.ndarray, "m h w 3"], state: np.ndarray, camera: str, item: Item) -> None:
    """Refuse a camera that shows one picture while the robot moves, E_CAMERA."""
    # frames of one colour have a rule of their own
    still = len(frames) > 2 and frames[0].min() < frames[0].max() and (frames == frames[0]).all()
    if still and np.ptp(state, axis=0).any():
        found = f"{len(frames)} equal frames (100% of frames) while the state changes"
        todo = "leave the camera out of the embodiment, or the episode out by --quarantine"
        raise reject("E_CAMERA", item, f"images.{camera}", "frames that change", found, todo)


def one_instruction(texts: list[str], name: str, item: Item) -> str:
    """Return the episode's instruction; a text that changes on the way is no single episode.

    Raises:
        Rejected: E_INSTRUCTION.
    """
    for i, text in enumerate(texts):
        if text != texts[0]:
            found = f"{texts[0][:40]!r}, then {text[:40]!r} at step {i}"
            todo = "split the episode where the text changes"
            raise reject("E_INSTRUCTION", item, f"steps/{name}", "one text per episode", found, todo)
    return texts[0] if texts else ""


# --- the source


class RldsSource:
    """One dataset folder; an item is one record of one shard."""

    def __init__(self, path: Path, embodiment: EmbodimentSpec | None, options: Options) -> None:
        """Use `open_source`."""
        self.warnings: list[str] = []
        self._root = find_dataset(path)
        self._path = path if path.is_dir() else path.parent
        self._options = options
        self._features = parse_features(read_json(self._file("features.json")), self._root / "features.json")
        info = self._file("dataset_info.json")
        self.name, shards = parse_info(read_json(info), info)
        wanted = options.extra.get("split")
        self._shards = [s for s in shards if wanted in (None, s.split)]
        self._listed = {self._root / s.file: s.episodes for s in self._shards}
        if not self._shards:
            splits = ", ".join(sorted({s.split for s in shards})) or "no split with shards"
            raise Rejected(
                "E_EMPTY", info, "", "splits", wanted or "at least one", splits, "choose another: -o split=NAME"
            )
        self._transform = self._choose_transform()
        self._cameras = self._name_cameras(embodiment)
        given = embodiment is not None
        if embodiment is None and self._transform and self._transform.embodiment:
            embodiment = load_embodiment(self._transform.embodiment)
        if embodiment is None:
            raise self._refuse()
        rate = options.control_hz or embodiment.control_hz
        used = {n: k for n, k in self._cameras.items() if n in {c.name for c in embodiment.cameras}}
        sizes = {n: self._size(k) for n, k in (used if given else self._cameras).items()}
        left = {n: (0, 0) for n in self._cameras if n not in sizes}
        self.spec, notes = fit_spec(embodiment, sizes | left, rate, given=given, file=self._root)
        self.warnings += notes
        if self._transform and not self._transform.verified:
            self.warnings.append(
                f"{self.name}: its fields are named after public documentation and were never checked on its data: "
                f"look at them with dita inspect before training"
            )

    def items(self) -> list[Item]:
        """List every record that is there or that dataset_info.json says should be."""
        items: list[Item] = []
        for shard in self._shards:
            path = self._root / shard.file
            records = find_records(path) if self._is_safe(path) else Records((), None)
            count = max(shard.episodes, len(records.spans) + (records.fault is not None))
            file = path.relative_to(self._path).as_posix()
            items += [Item(f"{shard.split}/{shard.number:06d}/{i:06d}", file, i, shard.split) for i in range(count)]
        if not items:
            raise Rejected("E_EMPTY", self._root, "", "", "at least one episode", "none", "give another dataset")
        return items

    def read(self, item: Item) -> Episode:
        """Read one record, check it, and name its fields.

        Raises:
            Rejected: as the module's functions say.
        """
        try:
            example = parse_example(self._record(item))
        except WireError as e:
            raise reject("E_SCHEMA", item, "", "a tf.train.Example", str(e), COPY) from None
        steps = Steps(example, self._features, item)
        count = check_boundaries(steps, self._features, item)
        state, action, keep = self._vectors(steps, item, count)
        images = {c.name: steps.pictures(self._cameras[c.name], c.height, c.width)[keep] for c in self.spec.cameras}
        check_lengths(steps.lengths, item)
        for camera, frames in images.items():
            check_frozen(frames, state, camera, item)
        return Episode(
            images=images,
            state=state,
            action=action,
            stamp=np.arange(len(state)) / self.spec.control_hz,
            instruction=self._instruction(steps, item),
            success=None,
            source=item.id,
        )

    def close(self) -> None:
        """Nothing is held open."""

    # --- records

    def _file(self, name: str) -> Path:
        return safe_path(self._root, name)

    def _is_safe(self, path: Path) -> bool:
        try:
            check_inside(self._root, path)
        except Rejected:
            return False
        return path.is_file()

    def _record(self, item: Item) -> bytes:
        path, index = check_inside(self._root, self._path / item.file), int(item.key)
        if not path.is_file():
            raise reject("E_TRUNCATED", item, "", "the shard that dataset_info.json lists", "no such file", COPY)
        records = find_records(path)
        listed = self._listed[path]
        if index >= len(records.spans):
            code, expected, found = records.fault or (
                "E_TRUNCATED",
                f"{listed} records as dataset_info.json says",
                f"{len(records.spans)}",
            )
            raise reject(code, item, f"record {index}", expected, found, COPY)
        if index >= listed:
            found = f"{len(records.spans)} records"
            todo = "correct shardLengths, or restore the file"
            raise reject("E_COUNT", item, "shardLengths", f"{listed} as dataset_info.json says", found, todo)
        return read_record(path, records.spans[index], index)

    # --- names

    def _choose_transform(self) -> Transform | None:
        asked = self._options.extra.get("transform")
        if asked not in (None, "none", *TRANSFORMS):
            raise ValueError(f"no transform {asked!r}; there are none, {', '.join(TRANSFORMS)}")
        return TRANSFORMS.get(asked or self.name)

    def _name_cameras(self, spec: EmbodimentSpec | None) -> dict[str, str]:
        """Return camera name -> feature under steps/; the only camera of both needs no equal names."""
        keys = [k.removeprefix("steps/") for k, f in self._features.items() if k.startswith("steps/") and f.is_picture]
        named = {key.removeprefix("observation/").replace("/", "_"): key for key in keys}
        chosen = match_cameras(spec, list(named), self._options.extra.get("cameras"), self._root / "features.json")
        return {name: named[key] for name, key in chosen.items()}

    def _size(self, key: str) -> tuple[int, int]:
        """Return (height, width) of a camera: of features.json, or of the first picture that can be read."""
        height, width, _ = self._features[f"steps/{key}"].shape
        if height and width:
            check_size((1, height, width, 3), 1, self._root / "features.json", key)
            return height, width
        for item in self.items():
            try:
                pictures = parse_example(self._record(item))[f"steps/{key}"].strings()
                return picture_size(pictures[0], item.file, key)
            except (Rejected, WireError, KeyError, IndexError):
                continue
        raise Rejected("E_SCHEMA", self._root, "", f"steps/{key}", "a picture", "none that can be read", COPY)

    def _refuse(self) -> Rejected:
        steps = [f.about() for k, f in self._features.items() if k.startswith("steps/") and f.kind == "tensor"]
        told = {
            "names and units of the state and action fields": ", ".join(steps) or "no numbers",
            "the rate": "RLDS has no clock",
            "cameras": ", ".join(self._cameras) or "none",
        }
        return refuse_to_guess(f"rlds dataset {self.name}", self._root, told)

    def _vectors(self, steps: Steps, item: Item, count: int) -> tuple[np.ndarray, np.ndarray, slice]:
        """Return state [m s] and action [m a] in SI, and which of the steps they are of."""
        if self._transform is None:
            state = self._by_name(steps, "state", "observation", self.spec.state, item)
            action = self._by_name(steps, "action", "action", self.spec.action, item)
            check_lengths(steps.lengths, item)
            return state, action, slice(0, count)
        raw = {name: steps.vector(name) for name in self._transform.needs}
        check_lengths(steps.lengths, item)
        for name, values in raw.items():
            check_padding(values, name, item)
            if (width := self._transform.needs[name]) != values.shape[1]:
                todo = "it has another layout than the table knows: -o transform=none and an embodiment of your own"
                raise reject("E_SCHEMA", item, f"steps/{name}", f"{width} values", f"{values.shape[1]}", todo)
        named = self._transform.convert(raw)
        state = _pick(named.state, self.spec.state, "state", item)
        action = _pick(named.action, self.spec.action, "action", item)
        return to_si(state, self.spec.state), to_si(action, self.spec.action), named.keep

    def _by_name(
        self, steps: Steps, group: str, folder: str, fields: tuple[FieldSpec, ...], item: Item
    ) -> Float32[np.ndarray, "m d"]:
        asked = self._options.extra.get(group)
        if asked is None and all(f"steps/{folder}/{f.name}" in self._features for f in fields):
            parts = {f"{folder}/{f.name}": steps.vector(f"{folder}/{f.name}") for f in fields}
        else:
            key = asked or ("action" if group == "action" else "observation/state")
            parts = {key: steps.vector(key)}
        check_lengths(steps.lengths, item)
        for name, part in parts.items():
            check_padding(part, name, item)
        values, key = np.concatenate(list(parts.values()), axis=1), " + ".join(f"steps/{n}" for n in parts)
        order = self._options.extra.get("quaternion", "")
        width = rotation_columns(values.shape[1], fields)
        if width is None or (width == 4 and order not in ("wxyz", "xyzw")):
            expected = f"columns for {', '.join(f'{f.name}[{f.size}]' for f in fields)}"
            todo = f"correct the embodiment, or name another feature: -o {group}=KEY"
            if width == 4:
                expected, todo = "quaternions of a known order", "say it: -o quaternion=wxyz or xyzw"
            raise reject("E_SCHEMA", item, key, expected, f"{values.shape[1]} columns", todo)
        return assemble(values, fields, order, item.file, key)

    def _instruction(self, steps: Steps, item: Item) -> str:
        asked = self._options.extra.get("language")
        names = (asked,) if asked else INSTRUCTIONS
        for name in names:
            if asked or f"steps/{name}" in self._features:
                texts = steps.texts(name)
                check_lengths(steps.lengths, item)
                text = one_instruction(texts, name, item)
                return self._options.require_instruction(item.file, text)
        return self._options.require_instruction(item.file)


def _pick(named: Mapping[str, np.ndarray], fields: tuple[FieldSpec, ...], group: str, item: Item) -> np.ndarray:
    """Concatenate the fields that the embodiment asks for."""
    for field in fields:
        if field.name not in named or named[field.name].shape[1] != field.size:
            have = ", ".join(f"{n}[{v.shape[1]}]" for n, v in named.items()) or "none"
            todo = "name the embodiment's fields so, or -o transform=none"
            raise reject("E_SCHEMA", item, f"{group}.{field.name}", f"{field.name}[{field.size}]", f"only {have}", todo)
    return np.concatenate([named[f.name] for f in fields], axis=1)


def open_source(path: Path, embodiment: EmbodimentSpec | None, options: Options) -> RldsSource:
    """Open a dataset folder, its parent or its grandparent.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: an option names what there is not.
        Rejected: E_SCHEMA: features.json or dataset_info.json missing or odd, or no embodiment; E_EMPTY; E_PATH.
    """
    return RldsSource(path, embodiment, options)
