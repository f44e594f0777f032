"""diffusion_policy's ReplayBuffer: Zarr v2, `data/<key>` over all frames, `meta/episode_ends`; a folder or a .zip.

Facts this rests on: no rate, no instruction, no units: the embodiment must be given. Frames are often float32 0..255.
Zarr v2 reads a missing chunk as zeros and follows links, so the chunks are read here: each must be there, in the
folder, and as long as its array says; of the codecs only those that cannot run code and whose output is bounded.
https://github.com/real-stanford/diffusion_policy (common/replay_buffer.py), https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html
"""

from __future__ import annotations

import bz2
import itertools
import json
import lzma
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numcodecs.blosc
import numcodecs.lz4
import numpy as np
import zstandard
from jaxtyping import Float, Int, UInt8

from dita.datasets.convert.base import (
    CAMERAS_OPTION,
    MAX_FRAMES,
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
)
from dita.types import EmbodimentSpec, Episode, FieldSpec

OPTIONS = {
    "state": "keys of the state, as the embodiment's fields follow each other: state (default), "
    "agent_pos, robot_eef_pose,gripper; columns by state[0:2]",
    "action": "the same for the action: action (default)",
    "cameras": CAMERAS_OPTION,
    "quaternion": "order of the quaternions of an absolute rotation: xyzw (default) or wxyz",
}
MAX_METADATA = 2**20  # [bytes] of a JSON file
RESTORE = "restore the file from a copy, or write the data set again"
# with bounded output; pickles, JSON objects and strings are none of them
CODECS = ("blosc", "zstd", "lz4", "zlib", "gzip", "bz2", "lzma")
# what the decoders raise
DAMAGE = (ValueError, RuntimeError, OSError, EOFError, struct.error, zlib.error, zstandard.ZstdError, lzma.LZMAError)


def open_source(path: Path, embodiment: EmbodimentSpec | None, options: Options) -> ReplayBufferSource:
    """Open a ReplayBuffer in a folder, or in a .zip of it.

    Raises:
        Rejected: no embodiment or instruction was given, or the metadata are damaged.
    """
    return ReplayBufferSource(path, embodiment, options)


@dataclass(frozen=True, eq=False)
class RawEpisode:
    """One episode's rows of the arrays."""

    action: Float[np.ndarray, "m a"]
    state: Float[np.ndarray, "m s"]
    images: Mapping[str, np.ndarray]  # [m, h, w, 3] of any numeric type, by camera name


def to_episode(raw: RawEpisode, spec: EmbodimentSpec, instruction: str, order: str, item: Item) -> Episode:
    """Turn an episode's rows into the canonical one: SI by the embodiment, frames uint8."""
    return Episode(
        images={name: _to_uint8(frames, name, item) for name, frames in raw.images.items()},
        state=assemble(raw.state, spec.state, order, item.file, "data/state"),
        action=assemble(raw.action, spec.action, order, item.file, "data/action"),
        stamp=np.arange(len(raw.action)) / spec.control_hz,
        instruction=instruction,
        success=None,
        source=item.id,
    )


def _to_uint8(frames: np.ndarray, name: str, item: Item) -> UInt8[np.ndarray, "m h w 3"]:
    if frames.dtype == np.uint8:
        return frames
    low, high = float(frames.min()), float(frames.max())
    if not (np.isfinite(low) and np.isfinite(high) and 0 <= low and high <= 255):
        found, todo = f"{frames.dtype} from {low:g} to {high:g}", "write frames as 0..255"
        raise reject("E_VALUE", item, f"images.{name}", "values from 0 to 255", found, todo)
    if frames.dtype.kind == "f" and high <= 1 and np.any(frames % 1):
        found, todo = f"{frames.dtype} from {low:g} to {high:g}", "write frames as 0..255, not as 0..1"
        raise reject("E_VALUE", item, f"images.{name}", "values from 0 to 255", found, todo)
    return frames.astype(np.uint8)


class ReplayBufferSource:
    """One ReplayBuffer."""

    def __init__(self, path: Path, embodiment: EmbodimentSpec | None, options: Options) -> None:
        """Use `open_source`."""
        self.warnings: list[str] = []
        self._root = path
        self._files = _Zip(path) if path.is_file() else _Folder(path)
        self._check_groups()
        self._arrays = {key: Array(self._files, f"data/{key}") for key in self._files.children("data")}
        cameras = {k: a for k, a in self._arrays.items() if len(a.shape) == 4 and a.shape[3] == 3}
        if embodiment is None:
            shapes = ", ".join(f"{k} {list(a.shape[1:])}" for k, a in self._arrays.items())
            raise refuse_to_guess("diffusion_policy", path, {"units, frames and rate": f"arrays {shapes or 'none'}"})
        self._order = options.extra.get("quaternion", "xyzw")
        if self._order not in ("xyzw", "wxyz"):
            raise ValueError(f"quaternion must be xyzw or wxyz, got {self._order!r}")
        self._instruction = options.require_instruction(path)
        self._ends = self._episode_ends()
        self._keys = match_cameras(embodiment, sorted(cameras, key=natural), options.extra.get("cameras"), path)
        sizes = {name: (cameras[key].shape[1], cameras[key].shape[2]) for name, key in self._keys.items()}
        hz = options.control_hz or embodiment.control_hz
        self.spec, notes = fit_spec(embodiment, sizes, hz, given=True, file=path)
        self.warnings += notes
        self._keys = {c.name: self._keys[c.name] for c in self.spec.cameras}
        self.warnings += [f"data/{key} is camera {name}" for name, key in self._keys.items() if key != name]
        self._state = [self._column(text) for text in options.extra.get("state", "state").split(",")]
        self._action = [self._column(text) for text in options.extra.get("action", "action").split(",")]
        self._check_columns("state", self._state, self.spec.state)
        self._check_columns("action", self._action, self.spec.action)
        used = {key for key, _ in (*self._state, *self._action)} | set(self._keys.values())
        if left := sorted(self._arrays.keys() - used):
            self.warnings.append(f"left out: {', '.join(f'data/{key}' for key in left)}")

    def items(self) -> list[Item]:
        """List the episodes."""
        return [Item(f"episode_{i:06d}", self._root.name, i) for i in range(len(self._ends))]

    def read(self, item: Item) -> Episode:
        """Read one episode's rows of all arrays."""
        number = int(item.key)
        start, stop = int(self._ends[number - 1]) if number else 0, int(self._ends[number])
        used = {key for key, _ in (*self._state, *self._action)} | set(self._keys.values())
        lengths = {f"data/{key}": self._arrays[key].shape[0] for key in sorted(used)}
        check_lengths({"meta/episode_ends": int(self._ends[-1]), **lengths}, item)
        if not 0 <= start < stop:
            found, todo = f"{start} .. {stop}", "correct meta/episode_ends"
            raise reject("E_EMPTY", item, "meta/episode_ends", "a first and a later last frame", found, todo)

        def rows(columns: list[tuple[str, slice]]) -> np.ndarray:
            parts = [self._arrays[key].read(start, stop).reshape(stop - start, -1)[:, cut] for key, cut in columns]
            return np.concatenate([part.astype(np.float64) for part in parts], axis=1)

        images = {name: self._arrays[key].read(start, stop) for name, key in self._keys.items()}
        raw = RawEpisode(rows(self._action), rows(self._state), images)
        return to_episode(raw, self.spec, self._instruction, self._order, item)

    def close(self) -> None:
        """Close the archive."""
        self._files.close()

    def _check_groups(self) -> None:
        for name in (".zgroup", "data/.zgroup", "meta/.zgroup"):
            if self._files.read(name, MAX_METADATA) is None:
                todo = "give the folder that holds data/ and meta/ of a ReplayBuffer"
                if (self._root / "zarr.json").exists():
                    todo = "this is Zarr v3; a ReplayBuffer is Zarr v2"
                raise Rejected("E_SCHEMA", self._root, "", name, "a group of Zarr v2", "no such file", todo)

    def _episode_ends(self) -> Int[np.ndarray, "e"]:
        array = Array(self._files, "meta/episode_ends")
        if len(array.shape) != 1 or array.dtype.kind not in "iu" or array.shape[0] > MAX_FRAMES:
            found = f"{array.dtype} {list(array.shape)}"
            raise Rejected("E_SCHEMA", self._root, "", "meta/episode_ends", "whole numbers, 1 axis", found, RESTORE)
        return array.read(0, array.shape[0]).astype(np.int64)

    def _check_columns(self, name: str, columns: list[tuple[str, slice]], fields: tuple[FieldSpec, ...]) -> None:
        count = sum(len(range(math.prod(self._arrays[key].shape[1:]))[cut]) for key, cut in columns)
        if rotation_columns(count, fields) is None:
            expected = f"columns for {', '.join(f'{f.name}[{f.size}]' for f in fields)}"
            todo = f"choose columns with -o {name}=KEY[0:2],KEY, or correct the embodiment's fields"
            raise Rejected("E_SCHEMA", self._root, "", name, expected, f"{count} columns", todo)

    def _column(self, text: str) -> tuple[str, slice]:
        match = re.fullmatch(r"\s*([^\[\]]+?)\s*(?:\[(\d+):(\d+)\])?\s*", text)
        key = match[1] if match else text
        array = self._arrays.get(key)
        if match is None or array is None or array.dtype.kind not in "fiub" or len(array.shape) > 3:
            have = ", ".join(self._arrays) or "none"
            todo = "name keys with -o state=KEY,... and -o action=KEY,..."
            raise Rejected("E_KEY", self._root, "", f"data/{key}", "an array of numbers", f"only {have}", todo)
        return key, slice(int(match[2]), int(match[3])) if match[2] else slice(None)


class Array:
    """One array of Zarr v2, read chunk by chunk along its first axis."""

    def __init__(self, files: _Folder | _Zip, name: str) -> None:
        self._files, self._name = files, name
        meta = _metadata(files, name)
        try:
            self.shape: tuple[int, ...] = tuple(_whole(n, 0) for n in meta["shape"])
            self._chunks: tuple[int, ...] = tuple(_whole(n, 1) for n in meta["chunks"])
            self.dtype = _dtype(meta["dtype"])
            self._codec: dict[str, Any] | None = meta["compressor"]
            self._order, filters = meta["order"], meta["filters"]
            self._separator = meta.get("dimension_separator", ".")
            good = meta["zarr_format"] == 2 and self._order in ("C", "F") and self._separator in (".", "/")
            good &= 1 <= len(self.shape) == len(self._chunks)
        except (KeyError, TypeError, ValueError) as e:
            found = f"{type(e).__name__}: {e}"
            raise Rejected(
                "E_SCHEMA", files.path, "", f"{name}/.zarray", "metadata of Zarr v2", found, RESTORE
            ) from None
        if self.dtype.kind == "O" or filters:
            found = f"dtype {meta['dtype']}, filters {[_id(f) for f in filters or []]}"
            todo = "objects may be pickles, which run code: write plain numbers"
            raise Rejected("E_PICKLE", files.path, "", f"{name}/.zarray", "numbers without filters", found, todo)
        if not good or self.dtype.kind not in "fiub":
            found = f"dtype {meta['dtype']}, order {self._order}, chunks {meta['chunks']} of {meta['shape']}"
            raise Rejected("E_SCHEMA", files.path, "", f"{name}/.zarray", "an array of numbers", found, RESTORE)
        if self._codec is not None and _id(self._codec) not in CODECS:
            todo = "write it with one of these codecs"
            raise Rejected("E_SCHEMA", files.path, "", f"{name}/.zarray", ", ".join(CODECS), _id(self._codec), todo)
        check_size((min(self.shape[0], self._chunks[0]), *self._chunks[1:]), self.dtype.itemsize, files.path, name)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows start..stop.

        Raises:
            Rejected: E_CHUNK_MISSING, E_CHECKSUM, E_TRUNCATED, E_PATH.
        """
        check_size((stop - start, *self.shape[1:]), self.dtype.itemsize, self._files.path, self._name)
        out = np.empty((stop - start, *self.shape[1:]), self.dtype)
        grid = [range(-(-n // c)) for n, c in zip(self.shape[1:], self._chunks[1:], strict=True)]
        for first in range(start // self._chunks[0], -(-stop // self._chunks[0])):
            for rest in itertools.product(*grid):
                origin = [i * c for i, c in zip((first, *rest), self._chunks, strict=True)]
                chunk = self._chunk((first, *rest), origin[0])
                begin = [start, *(0 for _ in rest)]
                end = [stop, *self.shape[1:]]
                low = [max(b, o) for b, o in zip(begin, origin, strict=True)]
                high = [min(e, o + c) for e, o, c in zip(end, origin, self._chunks, strict=True)]
                there = tuple(slice(i - b, j - b) for i, j, b in zip(low, high, begin, strict=True))
                out[there] = chunk[tuple(slice(i - o, j - o) for i, j, o in zip(low, high, origin, strict=True))]
        return out

    def _chunk(self, index: tuple[int, ...], frame: int) -> np.ndarray:
        name = f"{self._name}/{self._separator.join(map(str, index))}"
        size = math.prod(self._chunks) * self.dtype.itemsize
        # an incompressible chunk grows a little
        stored = self._files.read(name, size + size // 8 + 4096)
        file = f"{self._files.path}/{name}"
        if stored is None:
            found = f"no such file (from frame {frame} on)"
            raise Rejected("E_CHUNK_MISSING", file, "", self._name, "the chunk", found, f"zeros are no data: {RESTORE}")
        try:
            data = decode(stored, self._codec, size)
        except (
            ValueError,
            RuntimeError,
            OSError,
            EOFError,
            struct.error,
            zlib.error,
            zstandard.ZstdError,
            lzma.LZMAError,
        ) as e:
            found = f"{type(e).__name__}: {e} (from frame {frame} on)"
            code = "E_CHECKSUM" if stored else "E_TRUNCATED"
            raise Rejected(code, file, "", self._name, f"a chunk of {size} bytes", found, RESTORE) from None
        if len(data) != size:
            code = "E_TRUNCATED" if len(data) < size else "E_PATH"
            found = f"{'more' if len(data) > size else len(data)} bytes (from frame {frame} on)"
            raise Rejected(code, file, "", self._name, f"a chunk of {size} bytes", found, RESTORE)
        return np.frombuffer(data, self.dtype).reshape(self._chunks, order=self._order)


def decode(stored: bytes, codec: Mapping[str, Any] | None, size: int) -> bytes:
    """Decompress a chunk that should have `size` bytes; never make more than one byte too many."""
    name = _id(codec) if codec is not None else ""
    if name == "":
        return stored
    if name == "blosc":
        # header: version, versionlz, flags, typesize, then uint32 nbytes, blocksize, cbytes
        nbytes, _, cbytes = struct.unpack_from("<III", stored, 4)
        if cbytes > len(stored):
            raise EOFError(f"the header says {cbytes} bytes, the file has {len(stored)}")
        if nbytes != size or cbytes != len(stored):
            raise ValueError(f"the header says {cbytes} -> {nbytes} bytes, the file has {len(stored)}")
        return numcodecs.blosc.decompress(stored)
    if name == "lz4":
        (nbytes,) = struct.unpack_from("<I", stored)
        if nbytes != size:
            raise ValueError(f"the header says {nbytes} bytes")
        return numcodecs.lz4.decompress(stored)
    if name == "zstd":
        with zstandard.ZstdDecompressor().stream_reader(stored) as reader:
            return reader.read(size + 1)
    stream: Any
    if name in ("zlib", "gzip"):
        stream = zlib.decompressobj(wbits=47)
    else:
        assert name in ("bz2", "lzma"), name
        stream = bz2.BZ2Decompressor() if name == "bz2" else lzma.LZMADecompressor(memlimit=2**28)
    data = stream.decompress(stored, size + 1)
    if not stream.eof and len(data) <= size:
        raise EOFError("the stream ends early")
    return data


class _Folder:
    """Files of a folder, none of them a link."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self, name: str, limit: int) -> bytes | None:
        path = self.path / name
        for part in (path, *path.parents):
            if part == self.path:
                break
            if part.is_symlink():
                found = f"a link to {part.readlink()}"
                raise Rejected("E_PATH", part, "", name, "a plain file or folder", found, "copy what it points to")
        if not path.exists():
            return None
        check_inside(self.path, path)
        if path.stat().st_size > limit:
            found = f"{path.stat().st_size} bytes"
            raise Rejected("E_PATH", path, "", name, f"at most {limit} bytes", found, RESTORE)
        return path.read_bytes()

    def children(self, name: str) -> list[str]:
        folder = self.path / name
        names = sorted((p.name for p in folder.iterdir() if (p / ".zarray").exists()), key=natural)
        return [check_name(n, self.path, f"{name}/...") for n in names]

    def close(self) -> None:
        pass


class _Zip:
    """Members of a .zip, read in memory: nothing is unpacked."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._zip = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, OSError) as e:
            expected = "a folder, or a .zip of it"
            raise Rejected("E_SCHEMA", path, "", "", expected, f"{type(e).__name__}: {e}", RESTORE) from None
        names = self._zip.namelist()
        for name in names:
            check_name(name.rstrip("/") or "/", path, "member")
        top = {n.split("/")[0] for n in names}
        # some archives hold the folder, some its content
        self._prefix = f"{top.pop()}/" if ".zgroup" not in names and len(top) == 1 else ""

    def read(self, name: str, limit: int) -> bytes | None:
        try:
            info = self._zip.getinfo(self._prefix + name)
        except KeyError:
            return None
        if info.file_size > limit:
            found = f"{info.file_size} bytes"
            raise Rejected("E_PATH", self.path, "", name, f"at most {limit} bytes", found, RESTORE)
        try:
            with self._zip.open(info) as file:
                return file.read(limit + 1)
        except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError, zlib.error) as e:
            raise Rejected("E_CHECKSUM", self.path, "", name, "a readable member", str(e), RESTORE) from None

    def children(self, name: str) -> list[str]:
        pattern = re.compile(re.escape(f"{self._prefix}{name}/") + r"([^/]+)/\.zarray")
        return sorted((m[1] for n in self._zip.namelist() if (m := pattern.fullmatch(n))), key=natural)

    def close(self) -> None:
        self._zip.close()


def _metadata(files: _Folder | _Zip, name: str) -> dict[str, Any]:
    key = f"{name}/.zarray"
    text = files.read(key, MAX_METADATA)
    if text is None:
        raise Rejected("E_KEY", files.path, "", key, "an array of Zarr v2", "no such file", RESTORE)
    try:
        meta = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise Rejected("E_SCHEMA", files.path, "", key, "JSON", str(e), RESTORE) from None
    if not isinstance(meta, dict):
        raise Rejected("E_SCHEMA", files.path, "", key, "a JSON object", type(meta).__name__, RESTORE)
    return meta


def _dtype(text: Any) -> np.dtype:
    if not isinstance(text, str) or len(text) > 8:
        raise ValueError(f"dtype {text!r}")
    return np.dtype(text)


def _whole(value: Any, least: int) -> int:
    if not isinstance(value, int) or value < least or value > 2**40:
        raise ValueError(f"{value!r} is no length")
    return value


def _id(codec: Any) -> str:
    return str(codec.get("id", "?")) if isinstance(codec, dict) else "?"
