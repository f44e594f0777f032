"""One sharded Zarr v3 array: its metadata, and a direct reader of its frames.

The reader opens each shard once (a local one is mapped into memory), parses its index once and checks the crc32c of
every chunk it touches. Per read it costs microseconds where zarr-python costs about a millisecond, and it never turns a
missing chunk into zeros (zarr-python 3.1 does).
Format: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import google_crc32c
import numpy as np

CHUNKS_PER_SHARD = 256
INDEX_BYTES = CHUNKS_PER_SHARD * 16 + 4  # (offset, size) uint64 pairs and a crc32c, at the end of the file
MISSING = 2**64 - 1
CRC_OF_CHECKED = 0x48674BC7  # of anything with its own crc32c behind it: no copy without the last four bytes
OPEN_SHARDS = 128  # at once per array: each holds a file descriptor, and 1024 is a common limit
READ_AT_ONCE = 64  # frames: more than a window, little enough to hold twice

BYTES = {"name": "bytes"}
LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
CRC32C = {"name": "crc32c"}
# what a frame goes through; 4:4:4 since 4:2:0 costs 32 dB on small saturated objects
IMAGE_CODECS = {
    "raw": BYTES,
    "jpeg": {"name": "imagecodecs_jpeg", "configuration": {"level": 95, "subsampling": "444"}},
}


class StoreError(ValueError):
    """A damaged, missing or refused part of a store; the message opens with a stable code and names what to do."""

    @property
    def code(self) -> str:
        """Return the code, e.g. E_CHECKSUM."""
        found = re.search(r"[EW]_[A-Z]+(_[A-Z]+)*", str(self))  # a torch worker puts its own line first
        return found.group() if found else ""

    @property
    def is_damage(self) -> bool:
        """Whether it is about what is stored, not about a network, a disk or rights."""
        return self.code in ("E_CHECKSUM", "E_CHUNK_MISSING", "E_TRUNCATED", "E_DECODE")


@dataclass(frozen=True)
class ArrayLayout:
    """Shape, type and chunking of one array; every array of a store is fully described by these five values."""

    name: str  # inside the segment, e.g. "images/front"
    shape: tuple[int, ...]  # frames first
    dtype: str
    inner: int  # frames per chunk
    codec: str  # key of IMAGE_CODECS

    @property
    def shard_frames(self) -> int:
        """Frames per shard file."""
        return self.inner * CHUNKS_PER_SHARD

    @property
    def shards(self) -> int:
        """Number of shard files."""
        return -(-self.shape[0] // self.shard_frames)

    def shard_name(self, shard: int) -> str:
        """Return the path of a shard inside the segment."""
        return "/".join([self.name, "c", str(shard), *["0"] * (len(self.shape) - 1)])

    def metadata(self) -> dict[str, Any]:
        """Return the array's `zarr.json`."""
        codec = IMAGE_CODECS[self.codec] if self.dtype == "uint8" else LITTLE
        sharding = {
            "chunk_shape": [self.inner, *self.shape[1:]],
            "codecs": [codec, CRC32C],
            "index_codecs": [LITTLE, CRC32C],
            "index_location": "end",
        }
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self.shard_frames, *self.shape[1:]]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0 if self.dtype == "uint8" else 0.0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {},
        }


def difference(expected: Any, found: Any, where: str = "") -> str | None:
    """Describe the first difference between two JSON values as "field: expected x, found y"; None if equal."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in sorted(expected.keys() | found.keys()):
            inside = f"{where}.{key}" if where else key
            if key not in found or key not in expected:
                return f"{inside}: {'missing' if key in expected else 'unknown'}"
            if text := difference(expected[key], found[key], inside):
                return text
        return None
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = enumerate(zip(expected, found, strict=True))
        return next((text for i, (e, f) in pairs if (text := difference(e, f, f"{where}[{i}]"))), None)
    return None if expected == found else f"{where}: expected {json.dumps(expected)}, found {json.dumps(found)}"


class ShardReader:
    """Read chunks and frames of one array.

    Raises:
        StoreError: E_CHUNK_MISSING, E_CHECKSUM, E_TRUNCATED or E_DECODE, with file, episode and frame.
    """

    def __init__(self, files: Any, segment: str, layout: ArrayLayout, locate: Callable[[int], str]) -> None:
        """Read one array of a segment.

        Args:
            files: of the store; see `dita.datasets.files`.
            segment: its folder in there.
            layout: of the array.
            locate: names the episode and frame of a segment frame.
        """
        self.layout = layout
        self._files = files
        self._segment = segment
        self._locate = locate
        self._shard = lru_cache(OPEN_SHARDS)(self._open_shard)

    def read(self, frames: Sequence[int]) -> np.ndarray:
        """Return the given frames of the segment, [t, ...]; `inner` must be 1."""
        out = np.empty((len(frames), *self.layout.shape[1:]), self.layout.dtype)
        for start in range(0, len(frames), READ_AT_ONCE):
            some = frames[start : start + READ_AT_ONCE]
            for i, chunk in self._chunks(some):
                self._decode(some[i], chunk, out[start + i])
        return out

    def read_all(self) -> np.ndarray:
        """Return the whole array."""
        chunks = range(-(-self.layout.shape[0] // self.layout.inner))
        out = np.empty((len(chunks), self.layout.inner, *self.layout.shape[1:]), self.layout.dtype)
        for i, chunk in self._chunks(chunks):
            self._decode(i, chunk, out[i])
        return out.reshape(-1, *self.layout.shape[1:])[: self.layout.shape[0]]

    def check_shard(self, shard: int) -> None:
        """Check the index and every chunk of one shard."""
        first, last = shard * CHUNKS_PER_SHARD, -(-self.layout.shape[0] // self.layout.inner)
        for number in range(first, min(first + CHUNKS_PER_SHARD, last)):
            for _, chunk in self._chunks([number]):
                self._check(number, google_crc32c.value(chunk))

    def _decode(self, number: int, chunk: np.ndarray, out: np.ndarray) -> None:
        """Check a chunk, payload and crc, and put its values into `out`, contiguous."""
        if self.layout.codec == "jpeg":
            self._check(number, google_crc32c.value(chunk))
            try:
                decode_jpeg(chunk[:-4], out)
            except ValueError as e:  # it was written like that
                raise self._error("E_DECODE", number, str(e)) from None
            return
        values = out.reshape(-1).view(np.uint8)
        values[...] = chunk[:-4]
        # the copy, not the chunk: it is in the CPU's cache, which makes its crc twice as fast
        self._check(number, google_crc32c.extend(google_crc32c.value(values), chunk[-4:].tobytes()))

    def _check(self, number: int, crc: int) -> None:
        if crc != CRC_OF_CHECKED:
            raise self._error("E_CHECKSUM", number, "the chunk's crc32c does not match")

    def _chunks(self, chunks: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (position, bytes and crc, unchecked) of some chunks; each shard is asked once for all of its own."""
        shards = [chunk // CHUNKS_PER_SHARD for chunk in chunks]
        for shard in sorted(set(shards)):
            pieces, index = self._shard(shard)
            mine = [i for i, s in enumerate(shards) if s == shard]
            wanted = [index[chunks[i] % CHUNKS_PER_SHARD] for i in mine]
            end = pieces.size - INDEX_BYTES
            for i, (offset, size) in zip(mine, wanted, strict=True):
                if offset == MISSING:
                    raise self._error("E_CHUNK_MISSING", chunks[i], "the chunk is not in the shard's index")
                if offset + size > end:
                    what = f"the chunk ends at byte {offset + size} of {pieces.size}"
                    raise self._error("E_TRUNCATED", chunks[i], what)
            yield from zip(mine, self._cut(pieces, wanted, chunks[mine[0]]), strict=True)

    def _cut(self, pieces: Any, wanted: list[list[int]], first: int) -> list[np.ndarray]:
        try:
            return pieces.cut(wanted)
        except FileNotFoundError:
            raise self._error("E_CHUNK_MISSING", first, "the shard file does not exist") from None

    def _open_shard(self, shard: int) -> tuple[Any, list[list[int]]]:
        number = shard * CHUNKS_PER_SHARD
        try:
            pieces, index = self._files.open(f"{self._segment}/{self.layout.shard_name(shard)}", INDEX_BYTES)
        except FileNotFoundError:
            raise self._error("E_CHUNK_MISSING", number, "the shard file does not exist") from None
        if pieces.size < INDEX_BYTES:
            raise self._error("E_TRUNCATED", number, f"{pieces.size} bytes are too few for a shard")
        if google_crc32c.value(index) != CRC_OF_CHECKED:
            raise self._error("E_CHECKSUM", number, "the shard index's crc32c does not match")
        return pieces, np.frombuffer(index[:-4], "<u8").reshape(-1, 2).tolist()

    def _error(self, code: str, number: int, what: str) -> StoreError:
        path = self._files.at(f"{self._segment}/{self.layout.shard_name(number // CHUNKS_PER_SHARD)}")
        where = self._locate(number * self.layout.inner)
        return StoreError(f"{code}: {path}: {what} ({where}); restore the file from a copy or rebuild the store")


def decode_jpeg(payload: Any, out: np.ndarray | None = None) -> np.ndarray:
    """Decode one JPEG to uint8 [h, w, 3], into `out` if given.

    Raises:
        ValueError: no JPEG, or not of `out`'s shape.
    """
    decoded = import_simplejpeg().decode_jpeg(payload, "RGB", buffer=out)
    if out is not None and decoded.shape != out.shape[-3:]:
        raise ValueError(f"a JPEG of {decoded.shape}, expected {out.shape}")
    return decoded


def import_simplejpeg() -> ModuleType:
    """Import simplejpeg, which only stores with codec=jpeg need; raise ImportError saying how to get it."""
    try:
        import simplejpeg
    except ImportError:
        raise ImportError("stores with codec=jpeg need simplejpeg: pip install 'dita[convert]'") from None
    return simplejpeg
