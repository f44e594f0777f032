"""Write episodes into a store, crash-safe.

An episode is the unit of commit: `StoreWriter.add` stages it (fsync, rename), `seal` packs what is staged into one new
segment. Killed at any byte, a writer loses the episode it was adding and nothing else.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from dita.datasets.files import LocalFiles, open_files
from dita.datasets.segments import (
    FORMAT_VERSION,
    GROUP,
    SEALED,
    Segment,
    check_names,
    read_json,
    read_root,
    sealed_segments,
    segment_files,
    segment_layouts,
    staged_episodes,
)
from dita.datasets.shards import IMAGE_CODECS, ArrayLayout, StoreError, difference, import_simplejpeg
from dita.embodiment import canonical_json, embodiment_to_dict, sha256_json, slices
from dita.types import EmbodimentSpec, Episode

DISK_RESERVE = 64 * 2**20  # [bytes] left free

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]  # (done, total)


class StoreWriter:
    """Write whole episodes into a store; one writer per `writer` name at a time, any number of names.

    As a context manager it seals on a clean exit; after an error or Ctrl-C what was staged waits for the next run.
    """

    def __init__(self, path: Path, spec: EmbodimentSpec, codec: str, writer: str) -> None:
        """Use `StoreWriter.create`."""
        self.path = path
        self.spec = spec
        self._files = LocalFiles(path)
        self._codec = codec
        self._name = writer
        self._staging = path / "staging" / writer
        self._sources: set[str] = set()  # of sealed episodes and of everybody's staged ones
        self._by_content: dict[str, str] = {}  # content hash -> source, of the same
        self._staged: dict[str, Path] = {}  # source -> folder, this writer's
        self._lock = _lock(path / "staging" / f"{writer}.lock")
        try:
            self._staging.mkdir(exist_ok=True)
            self._read_sealed()
            self.cleaned: tuple[str, ...] = tuple(self._clean())  # what an earlier, killed run left behind
            self._read_staged()
        except BaseException:
            self.close()
            raise
        for text in self.cleaned:
            log.warning("%s: %s", path, text)

    @classmethod
    def create(
        cls,
        path: str | Path,
        spec: EmbodimentSpec,
        *,
        source: str,
        licence: str,
        codec: Literal["raw", "jpeg"] = "raw",
        exist: Literal["error", "resume", "overwrite"] = "error",
        writer: str = "main",
    ) -> StoreWriter:
        """Create a store, or continue one.

        Args:
            path: the store's folder, by habit `<name>.zarr`.
            spec: every episode's embodiment.
            source: where the data comes from, for people.
            licence: of the data, e.g. an SPDX id.
            codec: of the images; "jpeg" is lossy (quality 95, 4:4:4).
            exist: what to do when `path` exists.
            writer: a name of its own for each of several writers into one store.

        Raises:
            FileExistsError: `path` exists and exist="error".
            ValueError: a name that cannot be a file name, an unknown codec, an existing store that differs (the field
                is named), or overwrite of something that is no store.
            StoreError: E_LOCKED: another process writes under this name.
        """
        if not isinstance(files := open_files(path), LocalFiles):
            raise ValueError(f"{path}: a store is written to a local disk and copied to where it is served from")
        path = files.root
        check_names([writer])
        check_names(c.name for c in spec.cameras)
        if codec not in IMAGE_CODECS:
            raise ValueError(f"no codec {codec!r}; there are {', '.join(IMAGE_CODECS)}")
        if codec == "jpeg":
            import_simplejpeg()  # now, not when everything is staged
        if path.exists() and exist == "error":
            raise FileExistsError(f"{path} exists; --resume continues it, --overwrite deletes it first")
        if path.exists() and exist == "overwrite":
            _remove_store(path)
        _create_root(path, {"source": source, "licence": licence, **_root_attributes(spec)})
        return cls(path, spec, codec, writer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self.seal()
        finally:
            self.close()

    def close(self) -> None:
        """Release the lock; staged episodes stay staged."""
        with suppress(OSError):
            self._staging.rmdir()  # only when empty
        _unlock(self._lock, self.path / "staging" / f"{self._name}.lock")
        with suppress(OSError):
            self._staging.parent.rmdir()

    def sources(self) -> frozenset[str]:
        """Return the sources of all episodes, sealed or staged: what a rerun may skip."""
        return frozenset(self._sources)

    def staged_sources(self) -> frozenset[str]:
        """Return the sources of this writer's episodes that wait for sealing."""
        return frozenset(self._staged)

    def add(self, episode: Episode) -> str:
        """Check one finished episode and stage it durably; return its content hash.

        Raises:
            StoreError: E_SCHEMA (shape, dtype, cameras), E_LENGTH, E_VALUE (not finite, empty instruction), E_STAMP
                (not increasing, or not at control_hz), E_DUP (source or content is there), E_NOSPACE.
        """
        check_episode(episode, self.spec)
        digest = content_hash(episode)
        if episode.source in self._sources:
            raise StoreError(f"E_DUP: {self.path} has an episode with source {episode.source!r}; skip it")
        if twin := self._by_content.get(digest):
            raise StoreError(f"E_DUP: episode {episode.source!r} has the same content as {twin!r}; skip it")
        arrays = {name: np.ascontiguousarray(a) for name, a in _staged_arrays(episode).items()}
        _require_space(self.path, sum(a.nbytes for a in arrays.values()))
        entry = {
            "source": episode.source,
            "instruction": episode.instruction,
            "success": episode.success,
            "content_hash": digest,
        }
        folder = self._staging / hashlib.sha256(episode.source.encode()).hexdigest()[:32]
        with _disk_errors(self.path):
            _stage(folder, arrays, entry)
        self._remember(entry)
        self._staged[episode.source] = folder
        return digest

    def seal(self, progress: Progress | None = None) -> str | None:
        """Pack this writer's staged episodes, ordered by source, into one new segment; return its id, None if none.

        Equal episodes give equal bytes, in whatever order they were added. `progress` is told (frames, all frames).

        Raises:
            StoreError: E_NOSPACE, or E_CHECKSUM: a staged episode was damaged.
        """
        if not self._staged:
            return None
        folders = [self._staged[source] for source in sorted(self._staged)]
        numbers = [int(s.rpartition("-")[2]) for s in sealed_segments(self._files) if _writer_of(s) == self._name]
        segment = f"{self._name}-{max(numbers, default=-1) + 1:04d}"
        _require_space(self.path, sum(file.stat().st_size for f in folders for file in f.rglob("*.npy")))
        with _disk_errors(self.path):
            self._write_segment(segment, folders, progress)
        for folder in folders:
            _remove(folder)
        self._staged = {}
        return segment

    def _write_segment(self, segment: str, staged: list[Path], progress: Progress | None) -> None:
        folder = self.path / "segments" / segment
        entries, frames = [], 0
        for episode in staged:
            length = _check_staged(episode, self.spec)
            entries.append({**read_json(episode / "episode.json"), "start": frames, "stop": frames + length})
            frames += length
        layouts = segment_layouts(self.spec, frames, self._codec)
        _write_json(folder / "images" / "zarr.json", GROUP)
        for i, layout in enumerate(layouts):
            parts = (_load_staged(episode, layout.name) for episode in staged)  # one open at a time
            for done in _write_array(folder, layout, parts):
                if progress is not None:
                    progress(i * frames + done, len(layouts) * frames)
        _write_json(folder / "zarr.json", GROUP | {"attributes": {"episodes": entries}})
        files = {n: [(folder / n).stat().st_size, LocalFiles(folder).sha256(n)] for n in segment_files(layouts)}
        for path in (*(folder / name for name in files), *(Path(directory) for directory, _, _ in os.walk(folder))):
            _sync(path)
        _sync(folder.parent)
        manifest = {
            "format_version": FORMAT_VERSION,
            "store_sha256": self._files.sha256("zarr.json"),
            "codec": self._codec,
            "frames": frames,
            "files": files,
        }
        sealed = canonical_json(manifest | {"sha256": sha256_json(manifest)})
        _write_atomic(folder.with_name(f"{segment}{SEALED}"), sealed.encode())

    def _remember(self, entry: Mapping[str, Any]) -> None:
        self._sources.add(entry["source"])
        self._by_content[entry["content_hash"]] = entry["source"]

    def _read_sealed(self) -> None:
        root = read_root(self._files)
        for segment in sealed_segments(self._files):
            for entry in Segment(self._files, segment, root).episodes:
                self._remember(entry)

    def _read_staged(self) -> None:
        for folder in (self.path / name for name in staged_episodes(self._files)):
            entry = read_json(folder / "episode.json")
            self._remember(entry)
            if folder.parent == self._staging:
                self._staged[entry["source"]] = folder

    def _clean(self) -> Iterator[str]:
        for file in (*self.path.glob(".zarr.json.*.partial"), *self.path.glob("segments/.zarr.json.*.partial")):
            file.unlink(missing_ok=True)
        sealed = set(sealed_segments(self._files))
        for path in sorted((self.path / "segments").iterdir()):
            mine = _writer_of(path.name.removeprefix(".")) == self._name
            if mine and path.suffix == ".partial":
                path.unlink()
            elif mine and path.is_dir() and path.name not in sealed:
                _remove(path)
                yield f"removed the unsealed segment {path.name}; its episodes are still staged"
        for folder in sorted(self._staging.iterdir()):
            if folder.suffix == ".partial":
                shutil.rmtree(folder)
                yield f"removed the unfinished episode {folder.name}; its writer ended before it was staged"
            elif folder.suffix == ".removed":
                shutil.rmtree(folder)
            elif read_json(folder / "episode.json")["source"] in self._sources:
                _remove(folder)
                yield f"removed the staged copy {folder.name} of a sealed episode"


def check_episode(episode: Episode, spec: EmbodimentSpec) -> None:
    """Check an episode against its embodiment.

    Raises:
        StoreError: E_SCHEMA, E_LENGTH, E_VALUE or E_STAMP; see `StoreWriter.add`.
    """
    who = f"episode {episode.source!r}"
    if not episode.source or not episode.instruction.strip():
        raise StoreError(f"E_VALUE: {who}: source and instruction must not be empty")
    if text := difference(sorted(c.name for c in spec.cameras), sorted(episode.images), "cameras"):
        raise StoreError(f"E_SCHEMA: {who}: {text}")
    arrays = _staged_arrays(episode)
    lengths = {name: len(a) for name, a in arrays.items()}
    if len(set(lengths.values())) != 1 or len(episode.stamp) == 0:
        raise StoreError(f"E_LENGTH: {who}: every array needs the same length of at least 1, found {lengths}")
    for layout in segment_layouts(spec, len(episode.stamp), "raw"):
        found = arrays[layout.name]
        if found.shape != layout.shape or found.dtype != layout.dtype:
            raise StoreError(
                f"E_SCHEMA: {who}: {layout.name}: expected {layout.dtype} {list(layout.shape)}, "
                f"found {found.dtype} {list(found.shape)}"
            )
    for group, fields in (("state", spec.state), ("action", spec.action)):
        for field, here, _ in slices(fields):
            _check_finite(arrays[group][:, here], f"{who}: {group}.{field.name}")
    _check_finite(episode.stamp[:, None], f"{who}: stamp")
    _check_stamps(episode.stamp, spec.control_hz, who)


def content_hash(episode: Episode) -> str:
    """Hash what an episode shows and does: images, state, action, instruction; not its stamps or source."""
    cameras = sorted(episode.images)
    arrays = [*(episode.images[c] for c in cameras), episode.state, episode.action]
    digest = hashlib.sha256(canonical_json([episode.instruction, cameras, [a.shape for a in arrays]]).encode())
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _writer_of(segment: str) -> str:
    return segment.rpartition("-")[0]


# --- segments


def _write_array(folder: Path, layout: ArrayLayout, parts: Iterable[np.ndarray]) -> Iterator[int]:
    """Write one array through zarr-python, each shard once; yield the frames done."""
    import zarr  # not needed for reading

    if layout.codec == "jpeg":
        import dita.datasets.jpeg  # noqa: F401  registers the codec

    _write_json(folder / layout.name / "zarr.json", layout.metadata())
    done = 0
    # all-zero chunks are left out by default, and then look like lost ones
    with zarr.config.set({"array.write_empty_chunks": True}):
        array = zarr.open_array(folder / layout.name, mode="r+")
        for block in _blocks(parts, layout.shard_frames):
            array[done : done + len(block)] = block
            done += len(block)
            yield done


def _blocks(parts: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """Cut the concatenation of `parts` into blocks of `size` rows, the last one shorter."""
    held: list[np.ndarray] = []
    count = 0
    for part in parts:
        while len(part):
            held.append(part[: size - count])
            count += len(held[-1])
            part = part[len(held[-1]) :]
            if count == size:
                yield np.concatenate(held)
                held, count = [], 0
    if held:
        yield np.concatenate(held)


# --- roots


def _root_attributes(spec: EmbodimentSpec) -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, "embodiment": embodiment_to_dict(spec), "control_hz": spec.control_hz}


def _create_root(path: Path, attributes: Mapping[str, Any]) -> None:
    if not (path / "zarr.json").exists():
        names = {p.name for p in path.iterdir() if p.suffix != ".partial"} if path.exists() else set()
        if others := sorted(names - {"segments", "staging"}):
            raise ValueError(f"{path} exists and is not a store of dita: it holds {', '.join(others[:5])}")
        with suppress(FileNotFoundError):  # another writer creates the same store and cleaned our partial file away
            _write_json(path / "segments" / "zarr.json", GROUP)
            _write_json(path / "zarr.json", GROUP | {"attributes": {"dita": dict(attributes)}})
        _sync(path.parent)
    if text := difference(attributes, read_root(LocalFiles(path)).attributes):
        raise ValueError(f"{path} exists and differs in {text}; write into another store or --overwrite it")


def _remove_store(path: Path) -> None:
    if any(path.iterdir()):
        read_root(LocalFiles(path))  # raises on anything that is not a store
    for lock in path.glob("staging/*.lock"):
        _unlock(_lock(lock), lock)
    _remove(path)


# --- staged episodes


def _staged_arrays(episode: Episode) -> dict[str, np.ndarray]:
    images = {f"images/{camera}": array for camera, array in episode.images.items()}
    return images | {"state": episode.state, "action": episode.action, "stamp": episode.stamp}


def _stage(folder: Path, arrays: Mapping[str, np.ndarray], entry: Mapping[str, Any]) -> None:
    partial = folder.with_suffix(".partial")
    try:
        (partial / "images").mkdir(parents=True)
        for name, array in arrays.items():
            with (partial / f"{name}.npy").open("wb") as file:
                # not np.save: on a full disk it raises an OSError without errno
                np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
                file.write(array.data)
                _flush(file)
        _write_json(partial / "episode.json", entry)
        _sync(partial / "images")
        _sync(partial)
        partial.rename(folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _load_staged(folder: Path, name: str) -> np.ndarray:
    return np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)


def _check_staged(folder: Path, spec: EmbodimentSpec) -> int:
    """Return the number of frames of a staged episode that is as it was when it was added."""
    entry = read_json(folder / "episode.json")
    try:
        episode = Episode(
            images={c.name: _load_staged(folder, f"images/{c.name}") for c in spec.cameras},
            state=_load_staged(folder, "state"),
            action=_load_staged(folder, "action"),
            stamp=_load_staged(folder, "stamp"),
            instruction=entry["instruction"],
            success=entry["success"],
            source=entry["source"],
        )
        check_episode(episode, spec)
        intact = content_hash(episode) == entry["content_hash"]
    except (OSError, ValueError, KeyError):
        intact = False
    if not intact:
        raise StoreError(f"E_CHECKSUM: {folder}: this staged episode is damaged; delete the folder and rerun")
    return len(episode.stamp)


def _check_finite(values: np.ndarray, where: str) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        frame, dim = bad[0].tolist()
        share = len(np.unique(bad[:, 0])) / len(values)
        raise StoreError(f"E_VALUE: {where}[{dim}] is {values[frame, dim]} at frame {frame} ({share:.1%} of frames)")


def _check_stamps(stamp: np.ndarray, control_hz: float, who: str) -> None:
    steps = np.diff(stamp)
    if np.any(steps <= 0):
        frame = int(np.argmax(steps <= 0)) + 1
        raise StoreError(
            f"E_STAMP: {who}: stamps must increase: {stamp[frame - 1]} s, then {stamp[frame]} s at frame {frame}"
        )
    if len(steps) and abs(np.median(steps) * control_hz - 1) > 0.1:
        raise StoreError(
            f"E_STAMP: {who}: frames are {np.median(steps):.6g} s apart but control_hz {control_hz:g} means "
            f"{1 / control_hz:.6g} s; resample the episode or correct the embodiment"
        )


# --- locks: flock for this host (a dead process holds nothing), host and pid for the others and for people


def _lock(path: Path) -> int:
    while True:
        path.parent.mkdir(exist_ok=True)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # another writer left and took the empty folder along
            continue
        owner = _read_owner(fd)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise _locked(path, owner) from None
        if not _is_current(path, fd):  # its last owner removed it between our open and our lock
            os.close(fd)
            continue
        owner = _read_owner(fd)
        if owner and owner["host"] != socket.gethostname():
            os.close(fd)
            raise _locked(path, owner)
        os.ftruncate(fd, 0)
        os.pwrite(fd, canonical_json({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
        return fd


def _unlock(fd: int, path: Path) -> None:
    path.unlink(missing_ok=True)
    os.close(fd)


def _is_current(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def _read_owner(fd: int) -> dict[str, Any]:
    try:
        return json.loads(os.pread(fd, 4096, 0))
    except ValueError:
        return {}


def _locked(path: Path, owner: Mapping[str, Any]) -> StoreError:
    who = f"process {owner.get('pid', '?')} on {owner.get('host', 'this host')}"
    return StoreError(
        f"E_LOCKED: {who} writes here ({path}); wait for it, give this writer a name of its own, or, if that host is "
        "gone, delete the lock file"
    )


# --- files


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_atomic(path, json.dumps(values, indent=2, sort_keys=True).encode())


def _write_atomic(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with partial.open("wb") as file:
        file.write(content)
        _flush(file)
    partial.rename(path)
    _sync(path.parent)


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def _remove(folder: Path) -> None:
    """Delete a folder so that a kill on the way leaves a `.removed` one, not half of a good one."""
    doomed = folder.with_name(f"{folder.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _require_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path).free
    if free < needed + DISK_RESERVE:
        raise StoreError(
            f"E_NOSPACE: {path} needs {needed / 2**20:.0f} MiB and {DISK_RESERVE / 2**20:.0f} MiB in reserve, "
            f"{free / 2**20:.0f} MiB are free; free some and rerun with --resume"
        )


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise StoreError(
            f"E_NOSPACE: writing into {path} failed ({e.strerror}); finished episodes are intact, free some space and "
            "rerun with --resume"
        ) from None
