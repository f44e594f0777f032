"""LeRobot v2.1 and v3.0: parquet tables, pictures in mp4 or in the tables; read without the lerobot package.

v2.1: meta/episodes.jsonl and tasks.jsonl, one parquet and one mp4 per camera for each episode. v3.0: the rows of
meta/episodes/*/*.parquet say in which shared parquet and mp4 an episode lies and from which second on; the texts are
the pandas index of meta/tasks.parquet. Format: https://huggingface.co/docs/lerobot/lerobot-dataset-v3

A killed recorder leaves counts of episodes that do not exist and shifts later episodes to the pictures of others
(lerobot#2495, #3522). So rows are taken by episode_index and frames by time stamp, and whatever is written twice
(counts, lengths, indices, slices, statistics) has to agree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from jaxtyping import Float64, UInt8

from dita.datasets.convert.base import (
    CAMERAS_OPTION,
    Item,
    Options,
    Refused,
    Rejected,
    assemble,
    check_size,
    fit_spec,
    match_cameras,
    refuse_to_guess,
    reorder,
    rotation_columns,
    safe_path,
    to_si,
)
from dita.datasets.convert.lerobot_meta import (
    COUNTERS,
    EDIT,
    INFO,
    OTHERS,
    Entry,
    Feature,
    Info,
    check_totals,
    damage,
    episode_id,
    find_broken,
    find_orphans,
    find_problems,
    open_parquet,
    read_entries,
    read_info,
    read_tasks,
    same,
)
from dita.datasets.convert.pictures import decode_picture, picture_size
from dita.datasets.convert.video import read_frames
from dita.embodiment import load_embodiment
from dita.types import EmbodimentSpec, Episode, FieldSpec

OPTIONS = {
    "action": "feature that holds the actions (default: action)",
    "state": "feature that holds the state (default: observation.state)",
    "cameras": CAMERAS_OPTION,
    "quaternion": "order of quaternions, where there are any: wxyz or xyzw",
    "tolerance": "seconds between a row and its video frame (default: 1e-4, as lerobot)",
    "write_embodiment": "write a file to edit for --embodiment, made from the features, and stop",
}
SUCCESS = "next.success"
ARM = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
ARMS = tuple(f"{side}_{joint}" for side in ("left", "right") for joint in ARM)
SLOTS = {"state": (10, 9), "action": (7, 6)}  # of joints and gripper, as in the shipped embodiments
# (robot_type, names of the state, of the action) -> what they can stand for; the values must bear it out, see `infer`
KNOWN: dict[tuple[str, tuple[str, ...], tuple[str, ...]], str] = {
    ("sawyer", ("x", "y", "z", "gripper"), ("dx", "dy", "dz", "gripper")): "metaworld_sawyer",
    ("aloha", ARMS, ARMS): "aloha",
}


@dataclass(frozen=True, eq=False)
class Raw:
    """One episode as stored: the source's own units, order and names."""

    images: Mapping[str, UInt8[np.ndarray, "m h w 3"]]  # by feature
    state: Float64[np.ndarray, "m s"]
    action: Float64[np.ndarray, "m a"]
    stamp: Float64[np.ndarray, "m"]  # [s] from the episode's start
    task: str
    success: bool | None


@dataclass(frozen=True)
class Layout:
    """Where the parts of an embodiment lie in the data."""

    spec: EmbodimentSpec
    cameras: Mapping[str, str]  # name -> feature
    state: list[int]  # index in the data of each column that makes the embodiment's state
    action: list[int]
    quaternion: str  # order, where there are any


def to_episode(raw: Raw, layout: Layout, item: Item) -> Episode:
    """Turn what LeRobot stores into an episode of an embodiment: named cameras, joints in its order, SI."""
    state, action = raw.state[:, layout.state], raw.action[:, layout.action]
    return Episode(
        images={camera: raw.images[key] for camera, key in layout.cameras.items()},
        state=assemble(state, layout.spec.state, layout.quaternion, item.file, "state"),
        action=assemble(action, layout.spec.action, layout.quaternion, item.file, "action"),
        stamp=raw.stamp,
        instruction=raw.task,
        success=raw.success,
        source=item.id,
    )


def open_source(path: str | Path, embodiment: EmbodimentSpec | None, options: Options) -> LeRobotSource:
    """Open the folder of a LeRobot data set, the one that holds `meta`.

    Raises:
        FileNotFoundError: nothing is there.
        Rejected: E_KEY, E_SCHEMA, E_VERSION, E_LAYOUT, E_PATH: nothing that can be read; E_COUNT: more
            episodes than can be; E_SCHEMA, E_JOINTS, E_STAMP: no embodiment, or another one.
    """
    return LeRobotSource(Path(path), embodiment, options)


class LeRobotSource:
    """An opened data set; see `base.Source`."""

    def __init__(self, root: Path, embodiment: EmbodimentSpec | None, options: Options) -> None:
        """Use `open_source`."""
        self.root, self._options, self._tolerance = root, options, _tolerance(options)
        self.warnings: list[str] = []
        self._groups: dict[str, list[set[int]]] = {}  # table -> the episodes in each of its row groups
        self.info = info = read_info(root)
        self.keys = {
            "state": options.extra.get("state", "observation.state"),
            "action": options.extra.get("action", "action"),
        }
        self.entries, refused, broken = read_entries(root, info, self._vectors)
        self._refused = find_problems(root, info, self.entries, refused, broken) | refused
        self._files = find_orphans(root, info, self.entries, self._refused.keys())
        self._files |= find_broken(root, self._refused.values(), broken)
        if not (self._refused or self._files):
            self._files = check_totals(root, info, self.entries, self._vectors)
        self._tasks = read_tasks(root, info)
        self._fit(embodiment)

    @property
    def _vectors(self) -> list[str]:
        return [key for key in self.keys.values() if key in self.info.features]

    def items(self) -> list[Item]:
        """List the files that are refused, then the episodes that the metadata list or at least count."""
        indices = sorted(self.entries.keys() | self._refused.keys())
        tables = {i: self.entries[i].table if i in self.entries else INFO for i in indices}
        files = [Item(id, Path(e.file).relative_to(self.root).as_posix(), id) for id, e in self._files.items()]
        return [*files, *(Item(episode_id(i), tables[i], i, self._split(i)) for i in indices)]

    def read(self, item: Item) -> Episode:
        """Read one episode; see `base.Source`.

        Raises:
            Rejected: E_INDEX, E_COUNT, E_EMPTY, E_LENGTH, E_KEY, E_DTYPE, E_SCHEMA, E_CHUNK_MISSING, E_TRUNCATED,
                E_CHECKSUM, E_STAMP, E_STATS, E_TASK, E_VALUE, E_VIDEO, E_PATH, E_DUP, E_INSTRUCTION.
        """
        if problem := self._files.get(item.id) or self._refused.get(int(item.key)):
            raise problem
        return to_episode(self.read_raw(int(item.key)), self.layout, item)

    def close(self) -> None:
        """Do nothing: files are open only while an episode is read."""

    def read_raw(self, index: int) -> Raw:
        """Read one listed episode in the source's own units; see `read` for what is raised."""
        entry, features = self.entries[index], self.info.features
        pictures = [features[key] for key in self.layout.cameras.values()]
        wanted = [*COUNTERS, *self._vectors, *(f.key for f in pictures if f.dtype == "image")]
        wanted += [SUCCESS] if SUCCESS in features else []
        rows = Rows(self.root, entry, wanted, self._groups.setdefault(entry.table, []))
        rows.check_counters(self.info.fps, self._tolerance)
        vectors = {key: rows.vectors(features[key]) for key in self._vectors}
        for key, values in vectors.items():
            check_stats(values, entry.stats.get(key, {}), rows, key)
        task = self._task(entry, rows)
        stamp = rows.numbers("timestamp").astype(np.float64)
        images = {f.key: self._pictures(f, entry, rows, stamp) for f in pictures}
        success = bool(rows.numbers(SUCCESS)[-1]) if SUCCESS in features else None
        state, action = (vectors.get(key, np.zeros((len(stamp), 0))) for key in self.keys.values())
        return Raw(images, state, action, stamp, task, success)

    def _pictures(
        self, feature: Feature, entry: Entry, rows: Rows, stamp: Float64[np.ndarray, "m"]
    ) -> UInt8[np.ndarray, "m h w 3"]:
        check_size((entry.length, *feature.shape), 1, rows.path, feature.key)
        if feature.dtype == "image":
            return rows.pictures(feature)
        clip = entry.clips[feature.key]
        times, slack = clip.start + stamp, self._tolerance + float(np.spacing(np.float32(stamp[-1])))
        path = safe_path(self.root, clip.path)
        size = (feature.shape[0], feature.shape[1])
        return read_frames(path, times, slack, size, feature.key, whole=clip.stop is None)

    def _task(self, entry: Entry, rows: Rows) -> str:
        indices = rows.numbers("task_index")
        changes = np.flatnonzero(np.diff(indices))
        if len(changes):
            found = f"{indices[0]}, then {indices[changes[0] + 1]} at frame {changes[0] + 1}"
            raise rows.no("E_TASK", "task_index", "one task per episode", found, "split the episode there")
        text = self._tasks.get(int(indices[0]))
        if text is None:
            known = ", ".join(map(str, self._tasks)) or "none"
            raise rows.no("E_TASK", "task_index", f"one of meta/tasks: {known}", f"{indices[0]}", EDIT)
        if entry.tasks and text not in entry.tasks:
            found = f"{text!r} by task_index {indices[0]}"
            raise rows.no("E_TASK", "task_index", f"one of meta/episodes: {list(entry.tasks)}", found, EDIT)
        return self._options.require_instruction(rows.path, text)

    def _split(self, index: int) -> str:
        return next((name for name, indices in self.info.splits.items() if index in indices), "")

    def _fit(self, given: EmbodimentSpec | None) -> None:
        """Find the embodiment, its cameras and the order of its dims."""
        where, features, extra = self.root / INFO, self.info.features, self._options.extra
        if self.keys["action"] not in features:
            todo = "name the feature that holds them: -o action=KEY"
            raise Refused("E_KEY", where, "", "features", self.keys["action"], f"only {', '.join(features)}", todo)
        asked = self._options.control_hz
        if asked is not None and abs(asked / self.info.fps - 1) > 0.01:
            found, todo = f"{self.info.fps:g} Hz in the data", "leave --control-hz out"
            raise Refused("E_STAMP", where, "", "fps", f"{asked:g} Hz as asked for", found, todo)
        colour = [f.key for f in features.values() if f.dtype in ("image", "video") and f.shape[2] == 3]
        wanted = {c.name for c in given.cameras} if given else set()
        short = {(key if key in wanted else camera_name(key)): key for key in colour}
        chosen = match_cameras(given, list(short), extra.get("cameras"), where)
        cameras = {name: short[key] for name, key in chosen.items()}
        if target := extra.get("write_embodiment"):
            self._write_embodiment(Path(target), {name: features[key] for name, key in cameras.items()})
        spec = given or infer(self.info, self.entries.values(), self.keys, where)
        sizes = {name: (features[key].shape[0], features[key].shape[1]) for name, key in cameras.items()}
        self.spec, notes = fit_spec(spec, sizes, self.info.fps, given=given is not None, file=where)
        order = {}
        for group, fields in (("state", spec.state), ("action", spec.action)):
            key = self.keys[group]
            order[group] = match_fields(fields, features.get(key), key, extra.get("quaternion"), where)
            if order[group] != sorted(order[group]):
                pairs = zip(order[group], fields, strict=True)
                moved = ", ".join(f"{features[key].names[i]} -> {field.name}" for i, field in pairs)
                notes.append(f"{key} reordered by name: {moved}")
        names = {c.name: cameras[c.name] for c in self.spec.cameras}
        self.layout = Layout(self.spec, names, **order, quaternion=extra.get("quaternion", "wxyz"))
        self.warnings += [*notes, *self._left_out(set(cameras.values()))]
        if given is None:
            self.warnings.append(f"embodiment {spec.name}: by robot_type, names and range of the values")

    def _left_out(self, cameras: set[str]) -> Iterator[str]:
        used = {*self.keys.values(), *cameras, *COUNTERS, SUCCESS}
        if left := [key for key in self.info.features if key not in used]:
            yield f"features left out, since a store has no place for them: {', '.join(left)}"

    def _write_embodiment(self, target: Path, cameras: Mapping[str, Feature]) -> NoReturn:
        text = skeleton(self.info, list(self.entries.values()), self.keys, cameras)
        with target.open("x") as file:
            file.write(text)
        raise ValueError(f"wrote {target}: correct its kinds, units, frames and scales, then --embodiment {target}")


def camera_name(key: str) -> str:
    """Shorten a feature's key: observation.images.top -> top."""
    return re.sub(r"^observation\.(images\.)?", "", key)


def _tolerance(options: Options) -> float:
    text = options.extra.get("tolerance", "1e-4")
    try:
        value = float(text)
    except ValueError:
        value = np.nan
    if not 0 < value < 1:
        raise ValueError(f"-o tolerance={text}: expected seconds, e.g. 1e-4")
    return value


# --- embodiments


def infer(info: Info, entries: Iterable[Entry], keys: Mapping[str, str], file: Path) -> EmbodimentSpec:
    """Return the shipped embodiment that robot_type, names and values stand for.

    LeRobot names dims but no units. Degrees, or a normalised command, would leave the limits of the embodiment or fill
    a small part of them only.

    Raises:
        Refused: E_SCHEMA: it cannot be told; says what the data hold.
    """
    names = {group: info.features[key].names if key in info.features else () for group, key in keys.items()}
    stats = {group: [s for e in entries if (s := e.stats.get(key))] for group, key in keys.items()}
    if known := KNOWN.get((info.robot_type, names["state"], names["action"])):
        spec = load_embodiment(known)
        if _borne_out(spec.state, stats["state"]) and _borne_out(spec.action, stats["action"]):
            return spec
    shown = [f"{key}: {', '.join(names[group]) or 'no names'}" for group, key in keys.items()]
    cameras = [f for f in info.features.values() if f.dtype in ("image", "video")]
    shown += ["cameras: " + (", ".join(f"{camera_name(f.key)} {f.shape[1]}x{f.shape[0]}" for f in cameras) or "none")]
    shown += [f"robot_type {info.robot_type!r}", f"{info.fps:g} Hz"]
    refusal = refuse_to_guess("lerobot", file, {"kinds, units and frames": "; ".join(shown)})
    todo = f"{refusal.todo}; -o write_embodiment=FILE writes one for this data set, to edit"
    raise Refused(**{**refusal.fields(), "todo": todo})


def _borne_out(fields: tuple[FieldSpec, ...], stats: Sequence[Mapping[str, np.ndarray]]) -> bool:
    """Say whether the values lie in the fields' limits, up to a tenth of their range, and use a tenth of one."""
    if not stats:
        return False
    extremes = np.stack([np.min([s["min"] for s in stats], axis=0), np.max([s["max"] for s in stats], axis=0)])
    values = to_si(extremes, fields)
    low, high = (np.concatenate([getattr(f, name) for f in fields]) for name in ("low", "high"))
    slack = 0.1 * (high - low)
    return bool(np.all((values > low - slack) & (values < high + slack)) and np.any(np.ptp(values, axis=0) > slack))


def match_fields(
    fields: tuple[FieldSpec, ...], feature: Feature | None, key: str, quaternion: str | None, file: Path
) -> list[int]:
    """Return for each column that the embodiment takes its index in the data: by name where both name single joints.

    Raises:
        Refused: E_JOINTS: another number of columns; E_SCHEMA: quaternions of an unknown order.
        Rejected: E_JOINTS: names that overlap without being the same.
    """
    names, found = (feature.names, feature.shape[0]) if feature else ((), 0)
    width = rotation_columns(found, fields)
    if width is None:
        expected = f"{', '.join(f'{f.name}[{f.size}]' for f in fields) or 'none'}"
        todo = "correct the embodiment's fields, or -o state=KEY, -o action=KEY"
        raise Refused("E_JOINTS", file, "", key, expected, f"{found}: {', '.join(names) or 'no names'}", todo)
    if width == 4 and quaternion not in ("wxyz", "xyzw"):
        todo = "look it up where the data come from"
        raise Refused("E_SCHEMA", file, "", key, "-o quaternion=wxyz or xyzw", f"{quaternion}", todo)
    ours, theirs = [_plain(f.name) for f in fields], [_plain(n) for n in names]
    if all(f.size == 1 for f in fields) and set(ours) & set(theirs):
        return reorder(ours, theirs, file, key)
    return list(range(found))


def skeleton(info: Info, entries: Sequence[Entry], keys: Mapping[str, str], cameras: Mapping[str, Feature]) -> str:
    """Return an embodiment file to edit: a field for each name, limits as wide as the data, the data's rate."""

    def lines(values: Iterable[Mapping[str, Any]]) -> str:
        flow = (yaml.safe_dump(dict(v), sort_keys=False, default_flow_style=True, width=10_000).strip() for v in values)
        return "".join(f"\n  - {text}" for text in flow) or " []"

    text = f"""\
# Made from the features of a LeRobot data set, which tells neither kinds nor units nor frames: correct them.
# SI value = scale * the data's value (degrees: unit rad, scale 0.0174533); grippers: 1 = open; low and high in SI.
name: {re.sub(r"[^A-Za-z0-9]+", "_", info.robot_type)}
robot: {json.dumps(info.robot_type)}
"""
    for group, key in keys.items():
        stats = [s for e in entries if (s := e.stats.get(key))]
        fields = _skeleton_fields(info.features[key], stats, SLOTS[group]) if key in info.features else ()
        text += f"{group}:{lines(fields)}\n"
    sizes = [(name, f.shape) for name, f in cameras.items()]
    slots = [{"name": name, "height": h, "width": w, "slot": i} for i, (name, (h, w, _)) in enumerate(sizes)]
    text += f"cameras:{lines(slots)}\n"
    dt = 1 / info.fps
    return text + f"obs_dt: {dt!r}\naction_dt: {dt!r}\ncontrol_hz: {info.fps!r}\nlimits: null\n"


def _skeleton_fields(
    feature: Feature, stats: Sequence[Mapping[str, np.ndarray]], slots: tuple[int, int]
) -> Iterator[dict[str, Any]]:
    """Yield a field for each dim; `slots`: of the first joint and of the gripper, a second arm 20 further."""
    size = feature.shape[0]
    low = np.min([s["min"] for s in stats], axis=0) if stats else -np.ones(size)
    high = np.max([s["max"] for s in stats], axis=0) if stats else np.ones(size)
    names = feature.names or tuple(f"value_{i}" for i in range(size))
    grippers = ["gripper" in name.lower() for name in names]
    places = list(_skeleton_slots(grippers, *slots))
    if len(set(places)) < size:
        places = list(range(size))
    for i, (name, gripper) in enumerate(zip(names, grippers, strict=True)):
        yield {
            "name": re.sub(r"\W+", "_", _plain(name)),
            "kind": "gripper_position" if gripper else "joint_position",
            "size": 1,
            "unit": "1" if gripper else "rad",
            "frame": "none" if gripper else "joint",
            "mode": "absolute",
            "reference": None,
            "scale": 1.0,
            "slot": places[i],
            "low": [float(low[i])],
            "high": [float(max(high[i], low[i] + 1e-3))],
        }


def _skeleton_slots(grippers: Sequence[bool], joint: int, gripper: int) -> Iterator[int]:
    arm = count = 0
    for is_gripper in grippers:  # the one after an arm's joints ends the arm
        yield 20 * arm + (gripper if is_gripper else joint + count)
        arm, count = (arm + 1, 0) if is_gripper else (arm, count + 1)


def _plain(name: str) -> str:
    return name.removesuffix(".pos")


# --- tables


class Rows:
    """The rows of one episode, by feature."""

    def __init__(self, root: Path, entry: Entry, wanted: list[str], groups: list[set[int]]) -> None:
        """Read the wanted features from the episode's own parquet (v2.1), or by episode_index from a shared one (v3.0).

        Raises:
            Rejected: E_CHUNK_MISSING, E_TRUNCATED, E_CHECKSUM; E_KEY: a column is missing; E_LENGTH: more or fewer
                rows than the metadata say.
        """
        self.path, self.episode, self._entry = safe_path(root, entry.table), episode_id(entry.index), entry
        file = open_parquet(self.path, self.episode)
        names = file.schema_arrow.names
        if missing := [key for key in wanted if key not in names]:
            raise self.no("E_KEY", missing[0], "a column", f"only {', '.join(names)}", OTHERS)
        with damage(self.path, self.episode):
            self.table = _read_rows(file, wanted, None if entry.first is None else entry.index, groups)
        if self.table.num_rows != entry.length:
            raise self.no("E_LENGTH", "length", f"{entry.length} rows as in meta", f"{self.table.num_rows}", OTHERS)

    def no(self, code: str, key: str, expected: str, found: str, todo: str) -> Rejected:
        """Return a refusal of this episode."""
        return Rejected(code, self.path, self.episode, key, expected, found, todo)

    def numbers(self, key: str) -> np.ndarray:
        """Return a column of one number per row; features of shape (1,) are scalars in parquet."""
        return self._matrix(key, 1)[:, 0]

    def vectors(self, feature: Feature) -> Float64[np.ndarray, "m d"]:
        """Return a column of one vector per row.

        Raises:
            Rejected: E_SCHEMA, E_DTYPE, E_LENGTH: not what info.json says; E_VALUE: null, NaN or infinite.
        """
        if len(feature.shape) != 1:
            raise self.no("E_SCHEMA", feature.key, "a vector", f"shape {list(feature.shape)}", EDIT)
        values = self._matrix(feature.key, feature.shape[0]).astype(np.float64)
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            frame, dim = bad[0].tolist()
            share = len(np.unique(bad[:, 0])) / len(values)
            found = f"{values[frame, dim]} in dim {dim} at frame {frame} ({share:.1%} of frames)"
            raise self.no("E_VALUE", feature.key, "finite numbers", found, OTHERS)
        return values

    def pictures(self, feature: Feature) -> UInt8[np.ndarray, "m h w 3"]:
        """Decode a column of PNG or JPEG bytes.

        Raises:
            Rejected: E_SCHEMA: no bytes, another size or mode, or damaged.
        """
        column = self.table[feature.key].combine_chunks()
        if not pa.types.is_struct(column.type) or column.type.get_field_index("bytes") < 0:
            raise self.no("E_SCHEMA", feature.key, "bytes of pictures", f"{column.type}", EDIT)
        frames = np.empty((len(column), *feature.shape), np.uint8)
        for i, data in enumerate(column.field("bytes")):
            frames[i] = self._picture(data.as_py(), feature, f"{feature.key}, frame {i}")
        return frames

    def check_counters(self, fps: float, tolerance: float) -> None:
        """Compare episode_index, frame_index, index and timestamp with what they must be.

        Raises:
            Rejected: E_INDEX, E_STAMP.
        """
        count = np.arange(self._entry.length)
        first = self.numbers("index")[0] if self._entry.first is None else self._entry.first
        expected = {"episode_index": self._entry.index + 0 * count, "frame_index": count, "index": first + count}
        for key, values in expected.items():
            found = self.numbers(key)
            if np.any(wrong := found != values):
                i = int(np.argmax(wrong))
                text = f"{found[i]} ({wrong.mean():.1%} of frames are off)"
                raise self.no("E_INDEX", key, f"{values[i]} at frame {i}", text, OTHERS)
        stamp = self.numbers("timestamp").astype(np.float64)
        slack = tolerance + 2 * np.spacing(np.float32(count[-1] / fps))  # they are float32
        wrong = ~np.isfinite(stamp)
        wrong[1:] |= ~(np.abs(np.diff(stamp) - 1 / fps) <= slack)
        if np.any(wrong):
            i = int(np.argmax(wrong))
            text = f"{stamp[i]:.6f} s at frame {i} after {stamp[max(i - 1, 0)]:.6f} s ({wrong.mean():.1%} of frames)"
            raise self.no("E_STAMP", "timestamp", f"steps of {1 / fps:.6f} s within {tolerance:g} s", text, OTHERS)

    def _matrix(self, key: str, size: int) -> np.ndarray:
        column = self.table[key].combine_chunks()
        kind = column.type
        if not (pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind)):
            values = self._numpy(column, key, 1)[:, None]
            if size != 1:
                raise self.no("E_LENGTH", key, f"{size} values per row", f"one {kind}", EDIT)
            return values
        fixed = kind.list_size if pa.types.is_fixed_size_list(kind) else column.value_lengths().fill_null(-1)
        sizes = np.where(column.is_null().to_numpy(zero_copy_only=False), -1, fixed)
        if np.any(wrong := sizes != size):
            i = int(np.argmax(wrong))
            found = f"{sizes[i]} at frame {i}" if sizes[i] >= 0 else f"null at frame {i}"
            raise self.no("E_LENGTH", key, f"{size} values per row", found, EDIT)
        return self._numpy(column.flatten(), key, size).reshape(-1, size)

    def _numpy(self, column: pa.Array, key: str, size: int) -> np.ndarray:
        kind = column.type
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
            raise self.no("E_DTYPE", key, "numbers", f"{kind}", EDIT)
        if column.null_count:
            frame = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False))) // size
            raise self.no("E_VALUE", key, "numbers", f"null at frame {frame}", OTHERS)
        return column.to_numpy(zero_copy_only=False)

    def _picture(self, data: bytes | None, feature: Feature, key: str) -> UInt8[np.ndarray, "h w 3"]:
        if data is None:
            raise self.no("E_SCHEMA", key, "bytes of a picture", "none, at most a path to a file", EDIT)
        height, width = picture_size(data, self.path, key)
        if (height, width) != feature.shape[:2]:
            expected = f"{feature.shape[1]} x {feature.shape[0]} as in info.json"
            raise self.no("E_SCHEMA", key, expected, f"{width} x {height}", EDIT)
        return decode_picture(data, self.path, key)


def _read_rows(file: pq.ParquetFile, columns: list[str], episode: int | None, groups: list[set[int]]) -> pa.Table:
    """Read all rows, or, batch by batch, those of one episode of a shared file.

    `groups`, the episodes in each row group, is filled when empty: the file's own statistics would tell them too, but
    Arrow aborts the process when those are damaged.
    """
    if episode is None:
        return file.read(columns, use_threads=False)
    if not groups:
        indices = (file.read_row_group(g, ["episode_index"], use_threads=False) for g in range(file.num_row_groups))
        groups += [set(table["episode_index"].unique().to_pylist()) for table in indices]
    mine = [g for g, held in enumerate(groups) if episode in held]
    batches = file.iter_batches(256, row_groups=mine, columns=columns, use_threads=False)
    kept = [b.filter(pa.array(b.column("episode_index").to_numpy(zero_copy_only=False) == episode)) for b in batches]
    schema = kept[0].schema if kept else pa.schema([file.schema_arrow.field(name) for name in columns])
    return pa.Table.from_batches(kept, schema)


def check_stats(values: Float64[np.ndarray, "m d"], stats: Mapping[str, np.ndarray], rows: Rows, key: str) -> None:
    """Compare an episode with its own statistics; others show that metadata and data have come apart.

    Raises:
        Rejected: E_STATS.
    """
    actual = {"count": [len(values)], "min": values.min(axis=0), "max": values.max(axis=0)}
    for name in stats:
        if not same(actual[name], stats[name]):
            expected = f"{np.asarray(actual[name]).tolist()} as in its rows"
            todo = f"the statistics in meta are of other rows: {OTHERS}"
            raise rows.no("E_STATS", f"stats/{key}/{name}", expected, f"{stats[name].tolist()}", todo)
