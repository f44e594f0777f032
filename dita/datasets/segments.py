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
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dita.datasets.shards import ArrayLayout, ShardReader, StoreError, difference
from dita.embodiment import canonical_json, embodiment_from_dict, sha256_json
from dita.types import EmbodimentSpec

FORMAT_VERSION = 1
LOW_DIM_CHUNK = 256  # frames; images have one frame per chunk
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
RESTORE = "restore the file from a copy or rebuild the store"
GROUP = {"zarr_format": 3, "node_type": "group", "attributes": {}}


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


class Segment:
    """One sealed segment: manifest, episode list and array readers. Opening checks all but the shards' bytes."""

    def __init__(self, store: Path, segment: str, spec: EmbodimentSpec) -> None:
        """Open `segments/<segment>` of the store; see `Store` for what it raises."""
        self.id = segment
        self.folder = store / "segments" / segment
        manifest = read_manifest(store, segment)
        self.codec: str = manifest["codec"]
        self._files: dict[str, list] = manifest["files"]
        self._layouts = {layout.name: layout for layout in segment_layouts(spec, manifest["frames"], self.codec)}
        self._shards = {lay.shard_name(i): (lay, i) for lay in self._layouts.values() for i in range(lay.shards)}
        self._readers: dict[str, ShardReader] = {}
        self.episodes: list[dict[str, Any]] = []
        expected = segment_files(tuple(self._layouts.values()))
        if text := difference(sorted(expected), sorted(self._files), "files"):
            raise StoreError(f"E_SCHEMA: {self.folder}.sealed.json: {text}")
        self._check_sizes(self._files.keys() - self._shards.keys())
        self._check_metadata()
        self.episodes = self._read_episodes(manifest["frames"])
        self._check_sizes(self._shards.keys())

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
                raise ValueError(f"no array {name!r} in {self.folder}; it has {', '.join(self._layouts)}")
            self._readers[name] = ShardReader(self.folder, self._layouts[name], self.locate)
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
            if hash_file(self.folder / name)[1] != digest:
                self._explain(name)
            yield size

    def _explain(self, name: str) -> None:
        if name in self._shards:
            layout, shard = self._shards[name]
            ShardReader(self.folder, layout, self.locate).check_shard(shard)
        raise StoreError(f"E_CHECKSUM: {self.folder / name}: SHA-256 differs from the manifest; {RESTORE}")

    def _check_sizes(self, names: Iterable[str]) -> None:
        for name in sorted(names):
            path, expected = self.folder / name, self._files[name][0]
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                raise StoreError(f"E_CHUNK_MISSING: {path}: the file does not exist{self._begins(name)}; {RESTORE}")
            if size != expected:
                code = "E_TRUNCATED" if size < expected else "E_CHECKSUM"
                what = f"expected {expected} bytes, found {size}"
                raise StoreError(f"{code}: {path}: {what}{self._begins(name)}; {RESTORE}")

    def _begins(self, name: str) -> str:
        if name not in self._shards:
            return ""
        layout, shard = self._shards[name]
        return f" (from {self.locate(shard * layout.shard_frames)} on)"

    def _check_metadata(self) -> None:
        expected = {f"{name}/zarr.json": layout.metadata() for name, layout in self._layouts.items()}
        for name in ("zarr.json", "images/zarr.json", *expected):
            found = read_json(self.folder / name)
            if text := difference(expected.get(name, found), found):
                raise StoreError(f"E_SCHEMA: {self.folder / name}: {text}")
            if hash_file(self.folder / name)[1] != self._files[name][1]:
                raise StoreError(f"E_CHECKSUM: {self.folder / name}: edited or damaged after sealing; {RESTORE}")

    def _read_episodes(self, frames: int) -> list[dict[str, Any]]:
        path = self.folder / "zarr.json"
        episodes = read_json(path)["attributes"]["episodes"]
        starts, stops = [e["start"] for e in episodes], [e["stop"] for e in episodes]
        if [*starts, frames] != [0, *stops]:
            raise StoreError(f"E_LENGTH: {path}: episodes end at {stops} but the arrays have {frames} frames")
        return episodes


def read_root(path: Path) -> dict[str, Any]:
    """Read and check the attributes of a store.

    Raises:
        FileNotFoundError: nothing is there.
        StoreError: E_SCHEMA: not a store; E_VERSION: a newer one.
    """
    if not path.exists():
        raise FileNotFoundError(f"no store at {path}; `dita collect` writes one")
    if (path / ".zgroup").exists() or (path / ".zarray").exists():
        raise StoreError(f"E_SCHEMA: {path} is Zarr v2; a store of dita is a Zarr v3 group")
    if not (path / "zarr.json").is_file():
        raise StoreError(f"E_SCHEMA: {path} is not a store of dita: it has no zarr.json")
    root = read_json(path / "zarr.json")
    attributes = _member(_member(root, "attributes"), "dita")
    if not isinstance(version := _member(attributes, "format_version"), int):
        raise StoreError(f"E_SCHEMA: {path} is not a store of dita: its attributes lack dita.format_version")
    if version > FORMAT_VERSION:
        raise StoreError(
            f"E_VERSION: {path} has format {version}, this dita reads up to {FORMAT_VERSION}: upgrade dita"
        )
    known = {k: attributes.get(k) for k in ("embodiment", "control_hz", "source", "licence")}
    if text := difference(GROUP | {"attributes": {"dita": known | {"format_version": FORMAT_VERSION}}}, root):
        raise StoreError(f"E_SCHEMA: {path / 'zarr.json'}: {text}")
    return attributes


def sealed_segments(path: Path) -> list[str]:
    """Return the ids of the sealed segments of a store, sorted."""
    return sorted(p.name.removesuffix(".sealed.json") for p in path.glob("segments/[!.]*.sealed.json"))


def staged_episodes(path: Path) -> list[Path]:
    """Return the folders of all staged, unsealed episodes of a store, sorted."""
    return sorted(p.parent for p in path.glob("staging/*/*/episode.json") if not p.parent.suffix)


def read_manifest(store: Path, segment: str) -> dict[str, Any]:
    """Read the manifest of a sealed segment and check it, and that the store is the one it was sealed in."""
    path = store / "segments" / f"{segment}.sealed.json"
    if not path.is_file():
        raise FileNotFoundError(f"no sealed segment {segment!r} in {store}; it has {sealed_segments(store)}")
    manifest = read_json(path)
    if isinstance(version := _member(manifest, "format_version"), int) and version > FORMAT_VERSION:
        raise StoreError(
            f"E_VERSION: {path} has format {version}, this dita reads up to {FORMAT_VERSION}: upgrade dita"
        )
    body = {k: v for k, v in manifest.items() if k != "sha256"} if isinstance(manifest, dict) else {}
    if path.read_text() != canonical_json(body | {"sha256": sha256_json(body)}):
        raise StoreError(f"E_CHECKSUM: {path}: the manifest is damaged; {RESTORE}")
    if hash_file(store / "zarr.json")[1] != body["store_sha256"]:
        raise StoreError(f"E_CHECKSUM: {store / 'zarr.json'}: changed after {segment} was sealed; {RESTORE}")
    if read_json(store / "segments" / "zarr.json") != GROUP:
        raise StoreError(f"E_SCHEMA: {store / 'segments' / 'zarr.json'}: expected {canonical_json(GROUP)}")
    return body


def read_spec(path: Path, attributes: Mapping[str, Any]) -> EmbodimentSpec:
    """Build the embodiment of a store from its attributes; raise E_SCHEMA where it is none."""
    try:
        spec = embodiment_from_dict(attributes["embodiment"], where="embodiment")
        check_names(c.name for c in spec.cameras)
    except (TypeError, ValueError) as e:
        raise StoreError(f"E_SCHEMA: {path / 'zarr.json'}: {e}") from None
    if attributes["control_hz"] != spec.control_hz:
        raise StoreError(f"E_SCHEMA: {path / 'zarr.json'}: control_hz differs from the embodiment's")
    return spec


def check_names(names: Iterable[str]) -> None:
    """Refuse names that cannot be file names: E_PATH."""
    for name in names:
        if not NAME.fullmatch(name):
            raise ValueError(f"E_PATH: {name!r} cannot be a file name; use letters, digits, _ . - (at most 64)")


def read_json(path: Path) -> Any:
    """Read JSON; raise E_SCHEMA where it is none."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        raise StoreError(f"E_SCHEMA: {path} is not JSON; {RESTORE}") from None


def _member(values: Any, key: str) -> Any:
    return values.get(key) if isinstance(values, dict) else None


def hash_file(path: Path) -> tuple[int, str]:
    """Return size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return file.tell(), digest.hexdigest()


def _frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array
