"""The format of a store on disk, and one sealed segment of it.

    <name>.zarr/zarr.json              attributes "dita": format_version, embodiment, control_hz, source, licence
      segments/<id>/                   a Zarr v3 group: images/<camera>, state, action, stamp; attributes "episodes"
      segments/<id>.sealed.json        manifest: size and SHA-256 of every file, lengths; appears by one atomic rename
      staging/<writer>/<hash>/         finished episodes that wait for sealing; staging/<writer>.lock

Readers see sealed segments only; nothing is rewritten in place.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from dita.datasets.files import LocalFiles, RemoteFiles
from dita.datasets.shards import ArrayLayout, ShardReader, StoreError, difference
from dita.embodiment import canonical_json, embodiment_from_dict, sha256_json
from dita.types import EmbodimentSpec

FORMAT_VERSION = 1
LOW_DIM_CHUNK = 256  # frames; images have one frame per chunk
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,80}")  # <writer>-<number>
STAGED = re.compile(r"[0-9a-f]+")
RESTORE = "restore the file from a copy or rebuild the store"
SEALED = ".sealed.json"
GROUP = {"zarr_format": 3, "node_type": "group", "attributes": {}}

Files = LocalFiles | RemoteFiles


def segment_layouts(spec: EmbodimentSpec, frames: int, codec: str) -> tuple[ArrayLayout, ...]:
    """Return the arrays of a segment of `frames` frames."""
    images = (ArrayLayout(f"images/{c.name}", (frames, c.height, c.width, 3), "uint8", 1, codec) for c in spec.cameras)
    return (
        *images,
        ArrayLayout("state", (frames, spec.state_dim), "float32", LOW_DIM_CHUNK, "raw"),
        ArrayLayout("action", (frames, spec.action_dim), "float32", LOW_DIM_CHUNK, "raw"),
        ArrayLayout("stamp", (frames,), "float64", LOW_DIM_CHUNK, "raw"),
    )


def segment_files(layouts: tuple[ArrayLayout, ...]) -> list[str]:
    """Return every file of a segment, by its path inside it."""
    shards = (layout.shard_name(i) for layout in layouts for i in range(layout.shards))
    return ["zarr.json", "images/zarr.json", *(f"{layout.name}/zarr.json" for layout in layouts), *shards]


@dataclass(frozen=True)
class Root:
    """The checked `zarr.json` of a store."""

    attributes: Mapping[str, Any]  # "dita"
    spec: EmbodimentSpec
    sha256: str  # of the file; every segment names it


class Segment:
    """One sealed segment: manifest, episode list and array readers. Opening checks all but the shards' bytes.

    It pickles without open files and without arrays, and does not check again what was checked at opening: a loader
    worker starts at once, also on a remote store.
    """

    def __init__(self, files: Files, segment: str, root: Root) -> None:
        """Open `segments/<segment>` of a store; see `Store` for what it raises."""
        self.id = segment
        self.folder = f"segments/{segment}"
        self._store = files
        manifest = _read_manifest(files, segment, root)
        self.codec: str = manifest["codec"]
        self._files: dict[str, list] = manifest["files"]  # size and SHA-256 by name inside the segment
        self._layouts = {layout.name: layout for layout in segment_layouts(root.spec, manifest["frames"], self.codec)}
        self._shards = {lay.shard_name(i): (lay, i) for lay in self._layouts.values() for i in range(lay.shards)}
        self._readers: dict[str, ShardReader] = {}
        self.episodes: list[dict[str, Any]] = []
        expected = segment_files(tuple(self._layouts.values()))
        if text := difference(sorted(expected), sorted(self._files), "files"):
            raise StoreError(f"E_SCHEMA: {files.at(self.folder)}{SEALED}: {text}")
        sizes = files.sizes(self.folder, sorted(self._files))
        self._check_sizes({name: size for name, size in sizes.items() if name not in self._shards})
        self.episodes = self._read_metadata(manifest["frames"])  # whose names the errors about shards need
        self._check_sizes(sizes)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("state", "action", "stamp")} | {"_readers": {}}

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(size for size, _ in self._files.values())

    @cached_property
    def state(self) -> np.ndarray:
        """State at every frame, read once."""
        return _frozen(self.reader("state").read_all())

    @cached_property
    def action(self) -> np.ndarray:
        """Action at every frame, read once."""
        return _frozen(self.reader("action").read_all())

    @cached_property
    def stamp(self) -> np.ndarray:
        """Stamp of every frame, read once."""
        return _frozen(self.reader("stamp").read_all())

    def reader(self, name: str) -> ShardReader:
        """Return the reader of one array, e.g. "images/front"."""
        if name not in self._readers:
            if name not in self._layouts:
                raise ValueError(f"no array {name!r} in {self._at()}; it has {', '.join(self._layouts)}")
            self._readers[name] = ShardReader(self._store, self.folder, self._layouts[name], self.locate)
        return self._readers[name]

    def locate(self, frame: int) -> str:
        """Name the episode and frame at a frame of this segment."""
        for i, e in enumerate(self.episodes):
            if e["start"] <= frame < e["stop"]:
                return f"segment {self.id}, episode {i} ({e['source']}), frame {frame - e['start']}"
        return f"segment {self.id}, frame {frame}"

    def verify(self) -> Iterator[int]:
        """Check the SHA-256 of every file; yield each size."""
        for name, (size, digest) in self._files.items():
            try:
                found = self._store.sha256(f"{self.folder}/{name}")
            except FileNotFoundError:
                found = None
            if found != digest:
                self._explain(name)
            yield size

    def _explain(self, name: str) -> NoReturn:
        self._check_sizes(self._store.sizes(self.folder, [name]))
        if name in self._shards:
            layout, shard = self._shards[name]
            ShardReader(self._store, self.folder, layout, self.locate).check_shard(shard)
        raise StoreError(f"E_CHECKSUM: {self._at(name)}: SHA-256 differs from the manifest; {RESTORE}")

    def _at(self, name: str = "") -> Path | str:
        return self._store.at(f"{self.folder}/{name}" if name else self.folder)

    def _check_sizes(self, sizes: Mapping[str, int | None]) -> None:
        for name, size in sizes.items():
            expected = self._files[name][0]
            if size is None:
                raise StoreError(
                    f"E_CHUNK_MISSING: {self._at(name)}: the file does not exist{self._begins(name)}; {RESTORE}"
                )
            if size != expected:
                code = "E_TRUNCATED" if size < expected else "E_CHECKSUM"
                what = f"expected {expected} bytes, found {size}"
                raise StoreError(f"{code}: {self._at(name)}: {what}{self._begins(name)}; {RESTORE}")

    def _begins(self, name: str) -> str:
        if name not in self._shards:
            return ""
        layout, shard = self._shards[name]
        return f" (from {self.locate(shard * layout.shard_frames)} on)"

    def _read_metadata(self, frames: int) -> list[dict[str, Any]]:
        """Check every `zarr.json` of the segment; return the episodes."""
        expected = {f"{name}/zarr.json": layout.metadata() for name, layout in self._layouts.items()}
        expected = {"images/zarr.json": GROUP} | expected
        found = {}
        for name in ("zarr.json", *expected):
            data = self._store.read(f"{self.folder}/{name}")
            found[name] = parse_json(data, self._at(name))
            if text := difference(expected.get(name, found[name]), found[name]):
                raise StoreError(f"E_SCHEMA: {self._at(name)}: {text}")
            if hashlib.sha256(data).hexdigest() != self._files[name][1]:
                raise StoreError(f"E_CHECKSUM: {self._at(name)}: edited or damaged after sealing; {RESTORE}")
        episodes = found["zarr.json"]["attributes"]["episodes"]
        starts, stops = [e["start"] for e in episodes], [e["stop"] for e in episodes]
        if [*starts, frames] != [0, *stops]:
            raise StoreError(
                f"E_LENGTH: {self._at('zarr.json')}: episodes end at {stops} but the arrays have {frames} frames"
            )
        return episodes


def read_root(files: Files) -> Root:
    """Read and check the root of a store.

    Raises:
        FileNotFoundError: nothing is there.
        StoreError: E_SCHEMA: not a store, or its embodiment is none; E_VERSION: a newer one.
    """
    path = files.at("zarr.json")
    try:
        data = files.read("zarr.json")
    except (FileNotFoundError, NotADirectoryError):
        raise _no_store(files) from None
    root = parse_json(data, path)
    attributes = _member(_member(root, "attributes"), "dita")
    if not isinstance(version := _member(attributes, "format_version"), int):
        raise StoreError(f"E_SCHEMA: {path} is not of a store of dita: its attributes lack dita.format_version")
    _check_version(version, path)
    known = {k: attributes.get(k) for k in ("embodiment", "control_hz", "source", "licence")}
    if text := difference(GROUP | {"attributes": {"dita": known | {"format_version": FORMAT_VERSION}}}, root):
        raise StoreError(f"E_SCHEMA: {path}: {text}")
    try:
        spec = embodiment_from_dict(attributes["embodiment"], where="embodiment")
        check_names(c.name for c in spec.cameras)
    except (TypeError, ValueError) as e:
        raise StoreError(f"E_SCHEMA: {path}: {e}") from None
    if attributes["control_hz"] != spec.control_hz:
        raise StoreError(f"E_SCHEMA: {path}: control_hz differs from the embodiment's")
    return Root(attributes, spec, hashlib.sha256(data).hexdigest())


def sealed_segments(files: Files) -> list[str]:
    """Return the ids of the sealed segments of a store, sorted.

    Raises:
        StoreError: E_SCHEMA: the folder of segments is no Zarr group, or its server does not list it; E_PATH.
    """
    names = files.names("segments")
    if "zarr.json" not in names:
        raise StoreError(
            f"E_SCHEMA: {files.at('segments')} lists no zarr.json: it is missing, or the web server makes no index of "
            "folders (nginx: autoindex on)"
        )
    if parse_json(files.read("segments/zarr.json"), files.at("segments/zarr.json")) != GROUP:
        raise StoreError(f"E_SCHEMA: {files.at('segments/zarr.json')}: expected {canonical_json(GROUP)}")
    ids = sorted({n.removesuffix(SEALED) for n in names if n.endswith(SEALED) and not n.startswith(".")})
    if wrong := [i for i in ids if not SEGMENT.fullmatch(i)]:
        raise StoreError(f"E_PATH: {files.at('segments')} lists {wrong[0]!r}, which names no segment")
    return ids


def staged_episodes(files: Files) -> list[str]:
    """Return the folders of all staged, unsealed episodes inside a store, sorted."""
    writers = [f"staging/{w}" for w in files.names("staging") if NAME.fullmatch(w)]
    folders = [f"{w}/{e}" for w in writers for e in files.names(w) if STAGED.fullmatch(e)]
    return sorted(f for f in folders if "episode.json" in files.names(f))


def _no_store(files: Files) -> Exception:
    for name in (".zgroup", ".zarray"):
        with suppress(FileNotFoundError, NotADirectoryError):
            files.read(name)
            return StoreError(f"E_SCHEMA: {files.root} is Zarr v2; a store of dita is a Zarr v3 group")
    if files.exists():
        return StoreError(f"E_SCHEMA: {files.root} is not a store of dita: it has no zarr.json")
    return FileNotFoundError(f"no store at {files.root}; `dita collect` and `dita convert` write one")


def _read_manifest(files: Files, segment: str, root: Root) -> dict[str, Any]:
    name = f"segments/{segment}{SEALED}"
    try:
        data = files.read(name)
    except FileNotFoundError:
        raise FileNotFoundError(f"no sealed segment {segment!r} in {files.root}: {files.at(name)} is missing") from None
    manifest = parse_json(data, files.at(name))
    if isinstance(version := _member(manifest, "format_version"), int):
        _check_version(version, files.at(name))
    body = {k: v for k, v in manifest.items() if k != "sha256"} if isinstance(manifest, dict) else {}
    if data != canonical_json(body | {"sha256": sha256_json(body)}).encode():
        raise StoreError(f"E_CHECKSUM: {files.at(name)}: the manifest is damaged; {RESTORE}")
    if root.sha256 != body["store_sha256"]:
        raise StoreError(f"E_CHECKSUM: {files.at('zarr.json')}: changed after {segment} was sealed; {RESTORE}")
    return body


def _check_version(version: int, where: Path | str) -> None:
    if version > FORMAT_VERSION:
        raise StoreError(
            f"E_VERSION: {where} has format {version}, this dita reads up to {FORMAT_VERSION}: upgrade dita"
        )


def check_names(names: Iterable[str]) -> None:
    """Refuse names that cannot be file names on every system: E_PATH."""
    seen: dict[str, str] = {}
    for name in names:
        if not NAME.fullmatch(name):
            raise ValueError(f"E_PATH: {name!r} cannot be a file name; use letters, digits, _ . - (at most 64)")
        if (twin := seen.setdefault(name.casefold(), name)) != name:
            raise ValueError(f"E_PATH: {twin!r} and {name!r} differ in case only; some disks take them for one")


def parse_json(data: bytes, where: Path | str) -> Any:
    """Parse JSON; raise E_SCHEMA where it is none."""
    try:
        return json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise StoreError(f"E_SCHEMA: {where} is not JSON; {RESTORE}") from None


def read_json(path: Path) -> Any:
    """Read a local JSON file; raise E_SCHEMA where it is none."""
    return parse_json(path.read_bytes(), path)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


def _member(values: Any, key: str) -> Any:
    return values.get(key) if isinstance(values, dict) else None


def _frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array
