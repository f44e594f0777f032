"""ALOHA and ACT: one HDF5 per episode with `action`, `observations/qpos`, `observations/images/<camera>`.

Facts this rests on: 50 Hz by convention (DT = 0.02), no instruction; left arm, left gripper, right arm, right gripper;
grippers are normalised, 1 = open; mobile ALOHA adds `base_action` (forward m/s, turning rad/s). With compress=True the
frames are JPEG, padded with zeros to one length, their lengths in `compress_len`; the recorder hands RGB to OpenCV's
encoder, which takes it for BGR, so that any other decoder shows red and blue swapped.
https://github.com/tonyzhaozh/act (record_sim_episodes.py), https://github.com/MarkFzp/mobile-aloha
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
from jaxtyping import Float, UInt8

from dita.datasets.convert import hdf5
from dita.datasets.convert.base import (
    CAMERAS_OPTION,
    MAX_EPISODE_BYTES,
    Item,
    Options,
    Rejected,
    assemble,
    check_lengths,
    check_pixels,
    fit_spec,
    list_files,
    match_cameras,
    natural,
    padded,
    refuse_to_guess,
    reject,
)
from dita.datasets.shards import import_simplejpeg
from dita.embodiment import load_embodiment
from dita.types import EmbodimentSpec, Episode

OPTIONS = {
    "cameras": CAMERAS_OPTION,
    "jpeg": "colours of compressed frames: swapped (default, as ACT's recorder writes them) or standard",
}


def open_source(path: Path, embodiment: EmbodimentSpec | None, options: Options) -> AlohaSource:
    """Open one episode's HDF5 file, or a folder of them.

    Raises:
        Rejected: nothing readable, or another robot without --embodiment.
        ValueError: an unknown value of an option.
    """
    return AlohaSource(path, embodiment, options)


@dataclass(frozen=True, eq=False)
class RawEpisode:
    """One file as it is on disk, JPEGs decoded."""

    action: Float[np.ndarray, "m a"]  # with base_action's columns behind
    qpos: Float[np.ndarray, "m q"]
    images: Mapping[str, UInt8[np.ndarray, "m h w 3"]]  # RGB, by camera name
    success: bool | None


def to_episode(raw: RawEpisode, spec: EmbodimentSpec, instruction: str, item: Item) -> Episode:
    """Turn a raw episode into the canonical one; the joints are rad already, the grippers 1 = open."""
    return Episode(
        images=raw.images,
        state=assemble(raw.qpos, spec.state, "wxyz", item.file, "observations/qpos"),
        action=assemble(raw.action, spec.action, "wxyz", item.file, "action"),
        stamp=np.arange(len(raw.action)) / spec.control_hz,
        instruction=instruction,
        success=raw.success,
        source=item.id,
    )


class AlohaSource:
    """One file or a folder of files, one episode each."""

    def __init__(self, path: Path, embodiment: EmbodimentSpec | None, options: Options) -> None:
        """Use `open_source`."""
        self.warnings: list[str] = []
        self._root = path
        self._instruction = options.require_instruction(path)
        self._files = list_files(path, ".hdf5", ".h5")
        colours = options.extra.get("jpeg", "swapped")
        if colours not in ("swapped", "standard"):
            raise ValueError(f"jpeg must be swapped or standard, got {colours!r}")
        self._colours: Literal["RGB", "BGR"] = "BGR" if colours == "swapped" else "RGB"
        cameras, dims, compressed, left = self._survey()
        if embodiment is None and dims not in ((14, 14, 0), (14, 14, 2)):
            found = f"{dims[0]} of qpos, {dims[1]} of action, {dims[2]} of base_action"
            raise refuse_to_guess("aloha", path, {"columns other than 14 and 14, with 2 or no base_action": found})
        guess = embodiment or load_embodiment("mobile_aloha" if dims[2] else "aloha")
        self._keys = match_cameras(embodiment, list(cameras), options.extra.get("cameras"), path)
        sizes = {name: cameras[key] for name, key in self._keys.items()}
        hz = options.control_hz or guess.control_hz
        self.spec, notes = fit_spec(guess, sizes, hz, given=embodiment is not None, file=path)
        if embodiment is None and options.control_hz is None:
            self.warnings.append(f"the format has no rate: {hz:g} Hz by its convention; or --control-hz")
        self.warnings += notes
        self._keys = {c.name: self._keys[c.name] for c in self.spec.cameras}
        self._base = any(f.kind == "base_velocity" for f in self.spec.action)
        if dims[2] and not self._base:
            self.warnings.append(f"left out: base_action, since embodiment {self.spec.name} has no base velocity")
        if left:
            self.warnings.append(f"left out: {', '.join(left)}")
        if compressed:
            self.warnings.append(f"compressed frames: colours taken as {colours}; -o jpeg=swapped|standard")

    def items(self) -> list[Item]:
        """List the files in numeric order."""
        names = [self._name(path) for path in self._files]
        return [Item(padded(str(Path(name).with_suffix(""))), name, "") for name in names]

    def read(self, item: Item) -> Episode:
        """Read one file."""
        path = self._root if self._root.is_file() else self._root / item.file
        with hdf5.refused_when_damaged(path), hdf5.open_file(path, self._root) as file:
            action = hdf5.dataset(file, "action", "fiu", 2)
            qpos = hdf5.dataset(file, "observations/qpos", "fiu", 2)
            parts = {"action": action, "observations/qpos": qpos}
            if self._base:
                parts["base_action"] = hdf5.dataset(file, "base_action", "fiu", 2)
            frames = {n: hdf5.dataset(file, f"observations/images/{key}", "u") for n, key in self._keys.items()}
            images = {f"observations/images/{self._keys[name]}": d for name, d in frames.items()}
            check_lengths({key: len(d) for key, d in (parts | images).items()}, item)
            actions = [hdf5.read(parts[key]).astype(np.float64) for key in ("action", "base_action") if key in parts]
            raw = RawEpisode(
                action=np.concatenate(actions, axis=1),
                qpos=hdf5.read(qpos),
                images={name: self._frames(file, d, self._keys[name], item) for name, d in frames.items()},
                success=_success(file),
            )
            return to_episode(raw, self.spec, self._instruction, item)

    def close(self) -> None:
        """Do nothing: files are open while they are read."""

    def _name(self, path: Path) -> str:
        return path.name if path == self._root else path.relative_to(self._root).as_posix()

    def _frames(self, file: h5py.File, data: h5py.Dataset, camera: str, item: Item) -> np.ndarray:
        rows = hdf5.read(data)
        if rows.dtype == np.uint8 and rows.ndim == 4 and rows.shape[3] == 3:
            return rows
        if rows.dtype == np.uint8 and rows.ndim == 2:
            return _decode(rows, _lengths(file, camera, rows.shape), self._colours, item, str(data.name))
        found, todo = f"{rows.dtype} {list(rows.shape)}", "correct or remove the episode"
        raise reject("E_SCHEMA", item, str(data.name), "uint8 [m, h, w, 3], or JPEGs as uint8 [m, n]", found, todo)

    def _survey(self) -> tuple[dict[str, tuple[int, int]], tuple[int, int, int], bool, list[str]]:
        """Look at every file's keys and shapes: cameras with sizes, columns of qpos, action and base_action, the rest.

        Also whether frames are compressed.
        """
        sizes: dict[str, Counter] = {}
        dims: Counter = Counter()
        others: set[str] = set()
        compressed, refused = False, None
        for path in self._files:
            try:
                with hdf5.refused_when_damaged(path), hdf5.open_file(path, self._root) as file:
                    shapes = [hdf5.member(file, key, h5py.Dataset).shape for key in ("observations/qpos", "action")]
                    others |= {f"observations/{key}" for key in hdf5.names(hdf5.group(file, "observations"))}
                    base = hdf5.member(file, "base_action", h5py.Dataset).shape if "base_action" in file else (0, 0)
                    images = hdf5.group(file, "observations/images") if _has_images(file) else None
                    found = {key: _frame_size(images, key) for key in hdf5.names(images)} if images is not None else {}
                    dims[tuple(shape[-1] if shape else 0 for shape in (*shapes, base))] += 1
            except Rejected as e:  # comes back when the file is read
                refused = refused or e
                continue
            for key, (height, width, jpeg) in found.items():
                sizes.setdefault(key, Counter())[height, width] += 1
                compressed |= jpeg
        if not dims:
            assert refused is not None
            raise refused
        names = sorted(sizes, key=natural)
        columns: Any = dims.most_common(1)[0][0]
        left = sorted(others - {"observations/qpos", "observations/images"})
        return {key: sizes[key].most_common(1)[0][0] for key in names}, columns, compressed, left


def _has_images(file: h5py.File) -> bool:
    return "images" in hdf5.group(file, "observations")


def _frame_size(images: h5py.Group, key: str) -> tuple[int, int, bool]:
    data = hdf5.dataset(images, key, "u")
    if data.ndim == 4:
        return data.shape[1], data.shape[2], False
    height, width = _jpeg_size(bytes(data[0]), str(data.file.filename), str(data.name))
    return height, width, True


def _jpeg_size(payload: bytes, file: str, key: str) -> tuple[int, int]:
    try:
        height, width, _, _ = import_simplejpeg().decode_jpeg_header(payload, strict=False)
    except ValueError as e:
        raise Rejected("E_READ", file, "", key, "JPEG frames", str(e), "write the file again") from None
    check_pixels(width, height, file, key)
    return height, width


def _lengths(file: h5py.File, camera: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return the bytes of each JPEG: compress_len has one row per camera, in the order they were written."""
    full = np.full(shape[0], shape[1])
    if "compress_len" not in file:
        return full
    table = hdf5.read(hdf5.dataset(file, "compress_len", "fiu"))
    cameras = hdf5.names(hdf5.group(file, "observations/images"))
    if table.shape != (len(cameras), shape[0]) or np.any((table < 1) | (table > shape[1])):
        found = f"{list(table.shape)} from {table.min() if table.size else 0} to {table.max() if table.size else 0}"
        expected = f"{[len(cameras), shape[0]]} from 1 to {shape[1]}"
        raise Rejected("E_LENGTH", file.filename, "", "compress_len", expected, found, "correct or remove the episode")
    # h5py lists by name, the recorder by its own camera list: the longest of all rows is right for each
    return table.max(axis=0).astype(int)


def _decode(
    rows: UInt8[np.ndarray, "m n"], lengths: np.ndarray, colours: Literal["RGB", "BGR"], item: Item, key: str
) -> UInt8[np.ndarray, "m h w 3"]:
    """Decode padded JPEGs; `colours` is the order of the planes in which the recorder's RGB comes out as RGB."""
    simplejpeg = import_simplejpeg()
    frames: list[np.ndarray] = []
    size = _jpeg_size(rows[0].tobytes(), item.file, key)
    if len(rows) * size[0] * size[1] * 3 > MAX_EPISODE_BYTES:
        expected = f"at most {MAX_EPISODE_BYTES} decoded bytes per episode"
        raise reject("E_PATH", item, key, expected, f"{len(rows)} frames of {size[1]} x {size[0]}", "split it")
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        payload = row[:length].tobytes().rstrip(b"\0")
        try:
            if not payload.endswith(b"\xff\xd9"):
                raise ValueError(f"{len(payload)} bytes without the end mark of a JPEG")
            if (found := _jpeg_size(payload, item.file, key)) != size:
                raise ValueError(f"{found[1]} x {found[0]} pixels, the first has {size[1]} x {size[0]}")
            frames.append(simplejpeg.decode_jpeg(payload, colours))
        except ValueError as e:
            todo = "correct or remove the episode"
            code = e.code if isinstance(e, Rejected) else "E_TRUNCATED" if "end mark" in str(e) else "E_READ"
            raise reject(code, item, key, "JPEG frames of one size", f"frame {number}: {e}", todo) from None
    return np.stack(frames)


def _success(file: h5py.File) -> bool | None:
    value = file.attrs.get("success")
    return bool(value) if isinstance(value, (bool, np.bool_, np.integer)) else None
