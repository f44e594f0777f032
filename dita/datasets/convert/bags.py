"""The files of a ROS 2 bag, MCAP or SQLite: messages in the order they were written, and what is damaged between them.

Own readers, since a bag is often what a killed recorder left: MCAP is read as a stream, so that a cut file gives
everything before the cut; each chunk's CRC is checked, a damaged chunk is left out and reported, and reading goes on
behind it. Nothing is followed, executed or inflated beyond what a chunk announces. Message types come from the
installed definitions, never from those in the bag.

Formats: https://mcap.dev/spec, https://github.com/ros2/rosbag2 (rosbag2_storage_sqlite3)
"""

from __future__ import annotations

import io
import re
import sqlite3
import struct
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import lz4.frame
import yaml
import zstandard

from dita.datasets.convert.base import Rejected, list_files, natural, safe_path

MAGIC = b"\x89MCAP0\r\n"
FOOTER, SCHEMA, CHANNEL, MESSAGE, CHUNK, STATISTICS, DATA_END = 0x02, 0x03, 0x04, 0x05, 0x06, 0x0B, 0x0F
PRIVATE = 0x80  # opcodes from here on are for extensions
MAX_CHUNK = 2**30  # bytes, inflated
MAX_MESSAGE = 2**28
MAX_RATIO = 2000  # inflated / stored
MAX_METADATA = 2**20
SPLIT = re.compile(r"(_[0-9]+)?\.(mcap|db3)$")
ADVICE = "restore the file from a copy, or --quarantine to write what is left"


class Fault(NamedTuple):
    """Something that could not be read; the messages around it are good."""

    code: str
    where: str
    expected: str
    found: str


class Message(NamedTuple):
    """One message as it was recorded."""

    topic: str
    log: int  # [ns] when it was written
    data: bytes  # CDR
    place: tuple[int, int]  # for `fetch`


class Topic(NamedTuple):
    """What a bag says of one topic."""

    type: str
    encoding: str


class Storage(Protocol):
    """One file of a bag."""

    path: Path
    topics: dict[str, Topic]  # complete after `messages` has run
    counts: dict[str, int]  # messages by topic, as its statistics say; empty: they say nothing
    checked: bool  # False: some messages have no checksum, so damage in them cannot be seen

    def messages(self) -> Iterator[Message | Fault]:
        """Yield every message in the order of the file, and what is damaged where it lies."""
        ...

    def fetch(self, place: tuple[int, int]) -> bytes:
        """Read one message's data again."""
        ...

    def close(self) -> None:
        """Close the file."""
        ...


# --- MCAP


class DamagedChunk(ValueError):
    """A chunk that is not what it says; the text names expected and found, the code is first."""

    def __init__(self, code: str, expected: str, found: str) -> None:
        super().__init__(code, expected, found)
        self.code, self.expected, self.found = code, expected, found


def _string(data: memoryview, at: int) -> tuple[str, int]:
    if at + 4 > len(data):
        raise ValueError("a string is cut")
    (length,) = struct.unpack_from("<I", data, at)
    if at + 4 + length > len(data):
        raise ValueError("a string is cut")
    return bytes(data[at + 4 : at + 4 + length]).decode(), at + 4 + length


def _records(data: memoryview) -> Iterator[tuple[int, memoryview, int]]:
    """Yield (opcode, content, offset of the content) of consecutive records; ValueError where they are cut."""
    at = 0
    while at < len(data):
        if at + 9 > len(data):
            raise ValueError(f"a record at byte {at} of {len(data)} is cut")
        (length,) = struct.unpack_from("<Q", data, at + 1)
        if at + 9 + length > len(data):
            raise ValueError(f"a record of {length} bytes at byte {at} of {len(data)} is cut")
        yield data[at], data[at + 9 : at + 9 + length], at + 9
        at += 9 + length


def inflate_chunk(content: memoryview) -> tuple[memoryview, bool]:
    """Return a chunk's records and whether a CRC vouches for them.

    Raises:
        DamagedChunk: E_CHECKSUM, E_TRUNCATED, E_SCHEMA (unknown compression), E_PATH (a bomb).
    """
    try:
        size, crc = struct.unpack_from("<QI", content, 16)
        name, at = _string(content, 28)
        (stored,) = struct.unpack_from("<Q", content, at)
    except (struct.error, ValueError) as e:
        raise DamagedChunk("E_SCHEMA", "the header of a chunk", str(e)) from None
    data = content[at + 8 : at + 8 + stored]
    if len(data) != stored:
        raise DamagedChunk("E_TRUNCATED", f"{stored} bytes of records", f"{len(data)}")
    if size > MAX_CHUNK or size > MAX_RATIO * max(stored, 4096):
        raise DamagedChunk("E_PATH", f"at most {min(MAX_CHUNK, MAX_RATIO * max(stored, 4096))} bytes", f"{size}")
    try:
        raw = _inflate(name, data, size)
    except (zstandard.ZstdError, RuntimeError, EOFError) as e:
        raise DamagedChunk("E_CHECKSUM", f"{name} data", str(e)) from None
    if len(raw) != size:
        raise DamagedChunk("E_CHECKSUM", f"{size} bytes of records", f"{'more' if len(raw) > size else len(raw)}")
    if crc and zlib.crc32(raw) != crc:
        raise DamagedChunk("E_CHECKSUM", f"CRC {crc:#010x}", f"{zlib.crc32(raw):#010x}")
    return memoryview(raw), crc != 0


def _inflate(name: str, data: memoryview, size: int) -> bytes | memoryview:
    """Inflate at most size + 1 bytes: what a frame says of itself is not believed."""
    if name == "":
        return data
    if name == "zstd":
        # not decompress(): that allocates the size which the frame's own header announces
        with zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(io.BytesIO(data)) as reader:
            return reader.read(size + 1)
    if name == "lz4":
        return lz4.frame.LZ4FrameDecompressor().decompress(bytes(data), max_length=size + 1)
    raise DamagedChunk("E_SCHEMA", "compression lz4, zstd or none", ascii(name)[:40])


class McapFile:
    """An MCAP file, read from the front; its index is not used but for the list of channels."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            Rejected: E_TRUNCATED, E_SCHEMA: not an MCAP file.
        """
        self.path = path
        self.topics: dict[str, Topic] = {}
        self.checked = True
        self.counts: dict[str, int] = {}
        self._channels: dict[int, str] = {}
        self._unknown: set[int] = set()
        self._schemas: dict[int, str] = {}
        self._chunk: tuple[int, memoryview] = (-1, memoryview(b""))
        self._file = path.open("rb")
        self._size = path.stat().st_size
        magic = self._file.read(8)
        if magic != MAGIC:
            code = "E_TRUNCATED" if MAGIC.startswith(magic) else "E_SCHEMA"
            self.close()
            raise Rejected(code, path, "", "", f"an MCAP file ({MAGIC!r})", f"{magic!r}", ADVICE)
        self._read_summary()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def messages(self) -> Iterator[Message | Fault]:
        """Yield every message and fault, in the order of the file."""
        count = faults = 0
        for found in self._data_section():
            if isinstance(found, Fault):
                faults += 1
            else:
                count += 1
            yield found
        expected = sum(self.counts.values())
        if self.counts and count != expected and not faults:
            yield Fault("E_TRUNCATED", "statistics", f"{expected} messages", f"{count}")

    def _data_section(self) -> Iterator[Message | Fault]:
        at, crc, faults = 8, zlib.crc32(MAGIC), 0
        while at < self._size:
            head = self._read(at, 9)
            op, length = struct.unpack("<BQ", head) if len(head) == 9 else (0, self._size)
            if at + 9 + length > self._size or (op == FOOTER and at != self._size - 37):
                expected = f"a record of {length} bytes" if len(head) == 9 else "a record or the end"
                yield Fault("E_TRUNCATED", f"byte {at}", expected, f"{max(self._size - at - 9, 0)} bytes to the end")
                return
            if op == FOOTER:
                return
            if op == DATA_END and length >= 4:
                (expected_crc,) = struct.unpack("<I", self._read(at + 9, 4))
                self.checked |= expected_crc == crc
                if expected_crc not in (0, crc) and not faults:
                    yield Fault("E_CHECKSUM", "data section", f"CRC {expected_crc:#010x}", f"{crc:#010x}")
                return
            if op in (SCHEMA, CHANNEL, MESSAGE, CHUNK) and length <= MAX_CHUNK:
                content = self._read(at + 9, length)
                crc = zlib.crc32(content, zlib.crc32(head, crc))
                for found in self._record(op, memoryview(content), at):
                    faults += isinstance(found, Fault)
                    yield found
            else:
                crc = self._skip(at, 9 + length, crc)
                if op in (SCHEMA, CHANNEL, MESSAGE, CHUNK):
                    faults += 1
                    yield Fault("E_PATH", f"byte {at}", f"records of at most {MAX_CHUNK} bytes", f"{length}")
                elif not (0 < op <= DATA_END or op >= PRIVATE):
                    faults += 1
                    yield Fault("E_SCHEMA", f"byte {at}", "a record that the format knows", f"opcode {op:#04x}")
            at += 9 + length
        yield Fault("E_TRUNCATED", f"byte {at}", "the end of the data section", "the end of the file")

    def fetch(self, place: tuple[int, int]) -> bytes:
        """Read one message's data: (offset of its chunk's record or -1, offset of the record's content)."""
        chunk, at = place
        if chunk < 0:
            (length,) = struct.unpack("<Q", self._read(at - 8, 8))
            return self._read(at + 22, length - 22)
        if self._chunk[0] != chunk:
            (length,) = struct.unpack("<Q", self._read(chunk + 1, 8))
            self._chunk = chunk, inflate_chunk(memoryview(self._read(chunk + 9, length)))[0]
        raw = self._chunk[1]
        (length,) = struct.unpack_from("<Q", raw, at - 8)
        return bytes(raw[at + 22 : at + length])

    def _read(self, at: int, size: int) -> bytes:
        self._file.seek(at)
        return self._file.read(size)

    def _skip(self, at: int, size: int, crc: int) -> int:
        self._file.seek(at)
        while size:
            part = self._file.read(min(size, 2**20))
            crc, size = zlib.crc32(part, crc), size - len(part)
        return crc

    def _record(self, op: int, content: memoryview, at: int) -> Iterator[Message | Fault]:
        if op != CHUNK:
            self.checked &= op != MESSAGE
            try:
                yield from self._small(op, content, (-1, at + 9))
            except (ValueError, struct.error) as e:
                yield Fault("E_SCHEMA", f"byte {at}", "a schema, channel or message", str(e))
            return
        try:
            raw, checked = inflate_chunk(content)
        except DamagedChunk as e:
            yield Fault(e.code, f"chunk at byte {at}", e.expected, e.found)
            return
        self.checked &= checked
        self._chunk = at, raw
        try:
            for inner, record, offset in _records(raw):
                yield from self._small(inner, record, (at, offset))
        except (ValueError, struct.error) as e:
            yield Fault("E_SCHEMA", f"chunk at byte {at}", "records that fill it", str(e))

    def _small(self, op: int, content: memoryview, place: tuple[int, int]) -> Iterator[Message | Fault]:
        if op == SCHEMA:
            self._schemas[struct.unpack_from("<H", content)[0]] = _string(content, 2)[0]
        elif op == CHANNEL:
            self._add_channel(content)
        elif op == MESSAGE:
            channel, _, log, _ = struct.unpack_from("<HIQQ", content)
            if channel in self._unknown:
                return
            if channel not in self._channels:
                self._unknown.add(channel)  # one report for all of its messages
                expected = "a channel record for every message"
                yield Fault("E_SCHEMA", f"message at byte {place}", expected, f"channel {channel} without one")
            elif len(content) > MAX_MESSAGE:
                expected = f"at most {MAX_MESSAGE} bytes"
                yield Fault("E_PATH", f"message at byte {place}", expected, f"{len(content)}")
            else:
                yield Message(self._channels[channel], log, bytes(content[22:]), place)

    def _add_channel(self, content: memoryview) -> None:
        channel, schema = struct.unpack_from("<HH", content)
        topic, at = _string(content, 4)
        encoding, _ = _string(content, at)
        self._channels[channel] = topic
        self.topics.setdefault(topic, Topic(self._schemas.get(schema, "unknown"), encoding))

    def _read_summary(self) -> None:
        """Take schemas and channels from the end, where it is whole: the chunk that holds them may be damaged."""
        tail = self._read(max(self._size - 37, 0), 37)
        if len(tail) < 37 or tail[:9] != struct.pack("<BQ", FOOTER, 20) or tail[-8:] != MAGIC:
            return
        start, offsets, crc = struct.unpack_from("<QQI", tail, 9)
        end = offsets or self._size - 37
        if not 8 <= start < end <= self._size - 37 or end - start > MAX_CHUNK:
            return
        if crc and zlib.crc32(self._read(start, self._size - 37 - start) + tail[:25]) != crc:
            return  # what it lists is in the data as well
        try:
            for op, content, _ in _records(memoryview(self._read(start, end - start))):
                if op in (SCHEMA, CHANNEL):
                    list(self._small(op, content, (-1, 0)))
                elif op == STATISTICS:
                    counts = struct.iter_unpack("<HQ", content[46 : 46 + struct.unpack_from("<I", content, 42)[0]])
                    self.counts = {self._channels[channel]: n for channel, n in counts if channel in self._channels}
        except (ValueError, struct.error):
            return


# --- SQLite


class SqliteFile:
    """A .db3 file, opened read-only; SQLite has no checksums, so only a damaged structure is seen."""

    def __init__(self, path: Path) -> None:
        """Open the file.

        Raises:
            Rejected: E_TRUNCATED, E_SCHEMA: not a bag's database.
        """
        self.path = path
        self.checked = False
        self.topics: dict[str, Topic] = {}
        self.counts: dict[str, int] = {}
        if path.stat().st_size == 0:
            raise Rejected("E_TRUNCATED", path, "", "", "an SQLite database", "0 bytes", ADVICE)
        self._db = sqlite3.connect(f"file:{_quoted(path)}?mode=ro&immutable=1", uri=True, check_same_thread=False)
        self._db.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_MESSAGE)
        self._db.text_factory = lambda raw: raw.decode(errors="replace")
        try:
            self._db.execute("PRAGMA trusted_schema = OFF")
            names = "'messages', 'topics'"
            query = f"SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name IN ({names})"
            (tables,) = self._db.execute(query).fetchone()
            rows = (
                self._db.execute("SELECT id, name, type, serialization_format FROM topics").fetchall()
                if tables == 2
                else []
            )
        except sqlite3.Error as e:
            self._db.close()
            raise Rejected("E_TRUNCATED", path, "", "", "an SQLite database", str(e), ADVICE) from None
        if tables != 2:
            self._db.close()
            raise Rejected("E_SCHEMA", path, "", "", "tables messages and topics", f"{tables} of them", ADVICE)
        self._names = {number: str(name) for number, name, _, _ in rows}
        self.topics = {str(name): Topic(str(kind), str(encoding)) for _, name, kind, encoding in rows}

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def messages(self) -> Iterator[Message | Fault]:
        """Yield every message that the table still gives, in the order of writing."""
        count = 0
        try:
            with closing(self._db.execute("SELECT id, topic_id, timestamp, data FROM messages ORDER BY id")) as rows:
                for row, topic, log, data in rows:
                    count += 1
                    if topic in self._names and isinstance(data, bytes) and isinstance(log, int):
                        yield Message(self._names[topic], log, data, (-1, row))
                    else:
                        yield Fault("E_SCHEMA", f"message {row}", "a known topic, a time and bytes", f"topic {topic}")
        except sqlite3.Error as e:
            yield Fault("E_TRUNCATED", f"after {count} messages", "a whole table of messages", str(e))
        log = self.path.with_name(f"{self.path.name}-wal")
        if log.is_file() and log.stat().st_size:
            found = f"{log.stat().st_size} bytes in {log.name} (open the file once with sqlite3 to merge them)"
            yield Fault("E_TRUNCATED", f"after {count} messages", "everything in the database itself", found)

    def fetch(self, place: tuple[int, int]) -> bytes:
        """Read one message's data by its row."""
        return self._db.execute("SELECT data FROM messages WHERE id = ?", place[1:]).fetchone()[0]


def _quoted(path: Path) -> str:
    from urllib.parse import quote

    return quote(str(path.absolute()))


# --- bags


@dataclass(frozen=True)
class Bag:
    """One recording: its files in order and what metadata.yaml says of them."""

    name: str  # relative to the input
    files: tuple[Path, ...]
    expected: int | None  # messages, None: not said
    counts: dict[str, int]  # by topic; empty: not said
    compressed: bool  # every message by itself, zstd
    notes: tuple[str, ...]


def find_bags(root: Path) -> list[Bag]:
    """List the recordings of a file, a bag folder or a folder of them; files beside one metadata.yaml are one.

    Raises:
        FileNotFoundError: nothing is there.
        Rejected: E_EMPTY, E_PATH, E_SCHEMA (whole-file compression).
    """
    files = list_files(root, ".mcap", ".db3", ".zstd")
    if root.is_file():
        return [Bag(root.name, (root,), None, {}, False, ())]
    folders = sorted({f.parent for f in files}, key=lambda p: natural(p.relative_to(root).as_posix()))
    bags: list[Bag] = []
    for folder in folders:
        here = [f for f in files if f.parent == folder]
        bags += [_bag_of(folder, here, root)] if (folder / "metadata.yaml").is_file() else _loose_bags(here, root)
    return bags


def _loose_bags(here: list[Path], root: Path) -> list[Bag]:
    """Group files without a metadata.yaml: <name>_0, <name>_1 are one recording, as rosbag2 splits it."""
    groups: dict[str, list[Path]] = {}
    for path in here:
        groups.setdefault(SPLIT.sub("", path.name.removesuffix(".zstd")), []).append(path)
    note = "no metadata.yaml (was the recorder killed?): read from the front, without a count to check against"
    return [Bag(_name(paths[0], root), tuple(paths), None, {}, False, (note,)) for paths in groups.values()]


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path != root else root.name


def _bag_of(folder: Path, here: list[Path], root: Path) -> Bag:
    name = _name(folder, root)
    path = folder / "metadata.yaml"
    try:
        info = read_metadata(path)
        listed = [str(n) for n in info["relative_file_paths"]]
        expected, mode = int(info["message_count"]), str(info.get("compression_mode") or "none").lower()
        topics = info["topics_with_message_count"]
        counts = {str(t["topic_metadata"]["name"]): int(t["message_count"]) for t in topics}
    except (KeyError, TypeError, ValueError, RecursionError, yaml.YAMLError) as e:
        note = f"metadata.yaml cannot be read ({type(e).__name__} {e}): every file is read from its front"
        return Bag(name, tuple(here), None, {}, False, (" ".join(note.split())[:300],))
    files = [safe_path(folder, n, path) for n in listed]
    if mode == "file" or any(f.suffix == ".zstd" for f in files):
        todo = "decompress its files first: zstd -d"
        raise Rejected("E_SCHEMA", path, "", "compression_mode", "none or message", mode, todo)
    notes = [f"{f.name} is not in metadata.yaml and is left out" for f in here if f not in files]
    return Bag(name, tuple(files), expected, counts, mode == "message", tuple(notes))


def read_metadata(path: Path) -> dict[str, Any]:
    """Read the body of a metadata.yaml, without aliases: they are what YAML bombs are made of.

    Raises:
        ValueError, KeyError, TypeError, yaml.YAMLError: it is not what rosbag2 writes.
    """
    if path.stat().st_size > MAX_METADATA:
        raise ValueError(f"{path.stat().st_size} bytes")
    text = path.read_text()
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
        raise ValueError("it has aliases")
    return yaml.safe_load(text)["rosbag2_bagfile_information"]


def open_storage(path: Path) -> Storage:
    """Open one file of a bag by its suffix.

    Raises:
        Rejected: E_TRUNCATED, E_SCHEMA.
    """
    if not path.is_file():
        raise Rejected("E_TRUNCATED", path, "", "", "the file that metadata.yaml lists", "none", ADVICE)
    return SqliteFile(path) if path.suffix == ".db3" else McapFile(path)


def inflate_message(data: bytes) -> bytes:
    """Inflate one message of a bag whose messages are compressed one by one.

    Raises:
        ValueError: damaged or a bomb.
    """
    size = min(MAX_MESSAGE, MAX_RATIO * max(len(data), 4096))
    try:
        with zstandard.ZstdDecompressor(max_window_size=2**27).stream_reader(io.BytesIO(data)) as reader:
            raw = reader.read(size + 1)
    except zstandard.ZstdError as e:
        raise ValueError(f"zstd: {e}") from None
    if len(raw) > size:
        raise ValueError(f"a message of more than {size} bytes")
    return raw
