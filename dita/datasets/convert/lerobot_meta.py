"""What the metadata of a LeRobot data set say of its episodes, and whether it can be true; see lerobot.py."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dita.datasets.convert.base import Rejected, natural, safe_path

VERSIONS = ("v2.1", "v3.0")
INFO = "meta/info.json"
COUNTERS = ("timestamp", "frame_index", "episode_index", "index", "task_index")
STATS = ("min", "max", "count")
PLACEHOLDER = re.compile(r"\{(\w+)(?::0([1-9])d)?\}")
MAX_MISSING = 100_000  # episodes that info.json may count without their being there
OTHERS = "record it again, or --quarantine to write a new store of the other episodes"
KINDS = {str: "a text", int: "a whole number", (int, float): "a number", list: "a list", dict: "an object"}
EDIT = "correct the file, or write the data set again"


@dataclass(frozen=True)
class Feature:
    """One entry of info.json's features; a picture has shape (height, width, channels)."""

    key: str
    dtype: str  # of NumPy, "string", "image" or "video"
    shape: tuple[int, ...]
    names: tuple[str, ...]  # of a vector's dims, or empty


@dataclass(frozen=True)
class Info:
    """meta/info.json, checked."""

    version: str
    robot_type: str
    fps: float  # [Hz]
    features: Mapping[str, Feature]
    episodes: int  # as it counts them
    frames: int
    chunks_size: int
    data_path: str  # template
    video_path: str  # template; empty where there are no videos
    splits: Mapping[str, range]

    @property
    def videos(self) -> list[str]:
        """Keys of the features that lie in mp4 files."""
        return [key for key, f in self.features.items() if f.dtype == "video"]


@dataclass(frozen=True)
class Clip:
    """The slice of an mp4 that belongs to an episode; stop None: the whole file does."""

    path: str
    start: float  # [s]
    stop: float | None


@dataclass(frozen=True)
class Entry:
    """One episode as the metadata describe it."""

    index: int
    length: int
    tasks: tuple[str, ...]
    table: str  # parquet that holds its rows, relative
    first: int | None  # global index of its first row; None: v2.1, where the parquet is its own
    clips: Mapping[str, Clip]  # by feature
    stats: Mapping[str, Mapping[str, np.ndarray]]  # feature -> min, max, count; empty where there are none


def episode_id(index: int) -> str:
    """Name an episode so that plain sorting is numeric."""
    return f"episode_{index:06d}"


def read_info(root: Path) -> Info:
    """Read meta/info.json.

    Raises:
        FileNotFoundError: no folder.
        Rejected: E_KEY, E_SCHEMA: not there, not JSON, or a key is missing or odd; E_VERSION: another version;
            E_LAYOUT: not the files of its version; E_PATH: a template that leaves the folder or holds more than names
            and numbers.
    """
    if not root.exists():
        raise FileNotFoundError(f"{root} does not exist")
    try:
        path = safe_path(root, INFO)
    except Rejected as e:  # a Hugging Face cache is a tree of links
        raise Rejected(**{**e.fields(), "todo": f"{e.todo}: copy the data set with cp -rL"}) from None
    if not path.is_file():
        inside = sorted(p.parent.parent for p in root.glob(f"*/{INFO}"))
        todo = f"give {inside[0]}" if inside else "give the folder of a LeRobot data set"
        raise Rejected("E_SCHEMA", root, "", "", f"a folder with {INFO}", "none", todo)
    values = _json(path.read_bytes(), path)
    _check_version(root, path, values)
    features = {key: _feature(key, f, path) for key, f in _get(values, "features", dict, path).items()}
    if missing := [key for key in COUNTERS if key not in features]:
        raise Rejected("E_KEY", path, "", "features", missing[0], f"only {', '.join(features)}", EDIT)
    has_video = any(f.dtype == "video" for f in features.values())
    info = Info(
        version=values["codebase_version"],
        robot_type=str(values.get("robot_type") or "unknown"),
        fps=_number(values, "fps", path),
        features=features,
        episodes=_count(values, "total_episodes", path),
        frames=_count(values, "total_frames", path),
        chunks_size=max(1, _count(values, "chunks_size", path)),
        data_path=_get(values, "data_path", str, path),
        video_path=_get(values, "video_path", str, path) if has_video else "",
        splits=dict(_splits(values.get("splits"))),
    )
    if not 0 < info.fps < 1e5:
        raise Rejected("E_SCHEMA", path, "", "fps", "a positive number", f"{info.fps}", EDIT)
    _check_templates(root, info, path)
    return info


def _check_version(root: Path, path: Path, values: Mapping[str, Any]) -> None:
    version = _get(values, "codebase_version", str, path)
    if version not in VERSIONS:
        todo = "convert it to v3.0 with lerobot's own scripts first"
        raise Rejected("E_VERSION", path, "", "codebase_version", " or ".join(VERSIONS), repr(version), todo)
    layouts = {"v2.1": "meta/episodes.jsonl", "v3.0": "meta/episodes"}
    if not (root / layouts[version]).exists():
        other = next(v for v in VERSIONS if v != version)
        found = f"{layouts[other]} of {other}" if (root / layouts[other]).exists() else "none"
        raise Rejected("E_LAYOUT", path, "", "codebase_version", f"{layouts[version]} of {version}", found, EDIT)


def _check_templates(root: Path, info: Info, path: Path) -> None:
    """Fill the templates once, so that a trick in them is refused before anything else is read."""
    at = {"episode_index": 0, "episode_chunk": 0} if info.version == "v2.1" else {"chunk_index": 0, "file_index": 0}
    safe_path(root, fill(info.data_path, path, **at), path)
    for key in info.videos:
        safe_path(root, fill(info.video_path, path, **at, video_key=key), path)


def _feature(key: str, values: Any, path: Path) -> Feature:
    if not isinstance(values, dict):
        raise Rejected("E_SCHEMA", path, "", f"features.{key}", "dtype and shape", f"{values!r:.60}", EDIT)
    dtype, shape = _get(values, "dtype", str, path), _get(values, "shape", list, path)
    if not all(type(n) is int and 0 < n < 2**20 for n in shape):
        raise Rejected("E_SCHEMA", path, "", f"features.{key}.shape", "positive numbers", f"{shape}", EDIT)
    names = tuple(_names(values.get("names")))
    if dtype not in ("image", "video"):
        shape = tuple(shape) or (1,)
        return Feature(key, dtype, shape, names if len(names) == shape[0] else ())
    if len(shape) != 3:
        raise Rejected("E_SCHEMA", path, "", f"features.{key}.shape", "height, width, channels", f"{shape}", EDIT)
    first = names[0].startswith("channel") if names else shape[0] in (1, 3) and shape[2] not in (1, 3)
    return Feature(key, dtype, (*shape[1:], shape[0]) if first else tuple(shape), ())


def _names(names: Any) -> Iterator[str]:
    """Yield the names of dims, which come as a list, in a list, by group, or as name -> index."""
    if isinstance(names, str):
        yield names
    elif isinstance(names, list):
        yield from itertools.chain.from_iterable(_names(n) for n in names)
    elif isinstance(names, dict) and all(isinstance(n, int) for n in names.values()):
        yield from sorted(names, key=lambda n: names[n])
    elif isinstance(names, dict):
        yield from itertools.chain.from_iterable(_names(n) for n in names.values())


def _splits(values: Any) -> Iterator[tuple[str, range]]:
    for name, text in values.items() if isinstance(values, dict) else ():
        if match := re.fullmatch(r"(\d{1,9}):(\d{1,9})", str(text)):
            yield name, range(int(match[1]), int(match[2]))


def fill(template: str, file: Path, **values: int | str) -> str:
    """Put values into a path template, which is untrusted: only {name} and {name:03d} mean something.

    Raises:
        Rejected: E_PATH: anything else in braces.
    """

    def put(match: re.Match[str]) -> str:
        value = values.get(match[1], match[0])
        return f"{value:0{match[2]}d}" if match[2] and isinstance(value, int) else f"{value}"

    text = PLACEHOLDER.sub(put, template)
    if "{" in text or "}" in text:
        expected = f"only {', '.join(f'{{{name}}}' for name in values)} in braces"
        raise Rejected("E_PATH", file, "", "data_path, video_path", expected, ascii(template[:100]), EDIT)
    return text


class MetaRow(dict):
    """What one line or row of the metadata says, and where it stands."""

    def __init__(self, values: Mapping[str, Any], file: Path) -> None:
        """Hold `values` of `file`."""
        super().__init__(values)
        self.file = file


def read_entries(
    root: Path, info: Info, vectors: list[str]
) -> tuple[dict[int, Entry], dict[int, Rejected], list[Rejected]]:
    """Read what the metadata say of each episode: the usable ones, the refused ones, and what tells nothing."""
    list_rows, make_entry = (_rows_v21, _entry_v21) if info.version == "v2.1" else (_rows_v30, _entry_v30)
    entries: dict[int, Entry] = {}
    refused: dict[int, Rejected] = {}
    broken: list[Rejected] = []
    for row in list_rows(root, info, vectors, broken):
        try:
            index = _count(row, "episode_index", row.file)
        except Rejected as e:
            broken.append(e)
            continue
        try:
            if index in entries or index in refused:
                raise Rejected("E_INDEX", row.file, "", "episode_index", "an episode listed once", "twice", EDIT)
            entries[index] = make_entry(row, index, info, vectors)
        except Rejected as e:
            entries.pop(index, None)
            refused[index] = _of_episode(e, index)
    return dict(sorted(entries.items())), refused, broken


def _of_episode(error: Rejected, index: int) -> Rejected:
    return Rejected(**{**error.fields(), "episode": episode_id(index)})


def _rows_v21(root: Path, info: Info, vectors: list[str], broken: list[Rejected]) -> Iterator[MetaRow]:
    statistics = root / "meta/episodes_stats.jsonl"
    stats: dict[Any, Any] = {}
    if statistics.is_file():
        stats = {str(row.get("episode_index")): row.get("stats") for row in _json_lines(root, statistics, broken)}
    for row in _json_lines(root, root / "meta/episodes.jsonl", broken):
        found = stats.get(str(row.get("episode_index")), "none") if statistics.is_file() else None
        yield MetaRow({**row, "stats": found}, row.file)


def _entry_v21(row: MetaRow, index: int, info: Info, vectors: list[str]) -> Entry:
    at = {"episode_index": index, "episode_chunk": index // info.chunks_size}
    file = row.file.with_name("episodes_stats.jsonl")
    return Entry(
        index=index,
        length=_length(row),
        tasks=_texts(row, "tasks"),
        table=table_v21(info, index),
        first=None,
        clips={key: Clip(fill(info.video_path, row.file, **at, video_key=key), 0.0, None) for key in info.videos},
        stats={} if row["stats"] is None else _stats(row["stats"], vectors, info, file),
    )


def _rows_v30(root: Path, info: Info, vectors: list[str], broken: list[Rejected]) -> Iterator[MetaRow]:
    wanted = ["episode_index", "length", "tasks", "data/chunk_index", "data/file_index"]
    wanted += ["dataset_from_index", "dataset_to_index"]
    parts = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
    wanted += [f"videos/{key}/{part}" for key in info.videos for part in parts]
    stats = [f"stats/{key}/{name}" for key in vectors for name in STATS]
    for path in sorted((root / "meta/episodes").glob("*/*.parquet"), key=lambda p: natural(p.as_posix())):
        try:
            file = open_parquet(safe_path(root, path.relative_to(root).as_posix()), "")
            names = file.schema_arrow.names
            if missing := [name for name in wanted if name not in names]:
                raise Rejected("E_KEY", path, "", missing[0], "a column", f"only {', '.join(names[:20])}", EDIT)
            columns = [*wanted, *(name for name in stats if name in names)]
            with damage(path, ""):
                rows = file.read(columns, use_threads=False).to_pylist()
        except Rejected as e:
            broken.append(e)
            continue
        yield from (MetaRow(values, path) for values in rows)


def _entry_v30(row: MetaRow, index: int, info: Info, vectors: list[str]) -> Entry:
    length = _length(row)
    first, stop = (_count(row, key, row.file) for key in ("dataset_from_index", "dataset_to_index"))
    if stop - first != length:
        found = f"from {first} to {stop}"
        raise Rejected("E_INDEX", row.file, "", "dataset_to_index", f"{length} rows, its length", found, EDIT)
    at = {key: _count(row, f"data/{key}", row.file) for key in ("chunk_index", "file_index")}
    stats = {key: {name: row.get(f"stats/{key}/{name}") for name in STATS} for key in vectors}
    there = [key for key in vectors if any(values is not None for values in stats[key].values())]
    return Entry(
        index=index,
        length=length,
        tasks=_texts(row, "tasks"),
        table=fill(info.data_path, row.file, **at),
        first=first,
        clips={key: _clip(row, key, length, info) for key in info.videos},
        stats=_stats(stats, there, info, row.file),
    )


def _clip(row: MetaRow, key: str, length: int, info: Info) -> Clip:
    at = {name: _count(row, f"videos/{key}/{name}", row.file) for name in ("chunk_index", "file_index")}
    start, stop = (_number(row, f"videos/{key}/{name}", row.file) for name in ("from_timestamp", "to_timestamp"))
    if not (start >= 0 and abs((stop - start) * info.fps - length) < 0.5):
        expected = f"{length / info.fps:.6g} s, {length} frames at {info.fps:g} Hz"
        found = f"from {start:.6g} to {stop:.6g} s"
        raise Rejected("E_VIDEO", row.file, "", f"videos/{key}/to_timestamp", expected, found, EDIT)
    return Clip(fill(info.video_path, row.file, **at, video_key=key), start, stop)


def _stats(values: Any, vectors: Iterable[str], info: Info, file: Path) -> dict[str, dict[str, np.ndarray]]:
    found = {}
    for key in vectors:
        shapes = {"min": info.features[key].shape, "max": info.features[key].shape, "count": (1,)}
        try:
            found[key] = {name: np.asarray(values[key][name], np.float64) for name in STATS}
            odd = any(found[key][name].shape != shapes[name] for name in STATS)
        except (KeyError, TypeError, ValueError):
            odd = True
        if odd:
            expected, todo = f"{', '.join(STATS)} of every dim", f"{EDIT}, or delete it: dita computes its own"
            raise Rejected("E_STATS", file, "", f"stats of {key}", expected, f"{values!r:.60}", todo)
    return found


def find_problems(
    root: Path, info: Info, entries: Mapping[int, Entry], refused: Iterable[int], broken: Sequence[Rejected]
) -> dict[int, Rejected]:
    """Refuse episodes that are counted but not listed, listed but not counted, in two splits, or share video frames."""
    path = root / INFO
    listed = sorted({*entries, *refused})
    numbered = max(info.episodes, listed[-1] + 1 if listed else 0)
    if numbered - len(listed) > MAX_MISSING:
        found = f"{len(listed)} in meta, numbered to {numbered - 1}"
        raise Rejected("E_COUNT", path, "", "total_episodes", f"{info.episodes} episodes", found, EDIT)
    problems = {}
    for index in listed[info.episodes :]:
        problems[index] = Rejected(
            "E_COUNT", path, episode_id(index), "total_episodes", f"{info.episodes}", f"{len(listed)} in meta", EDIT
        )
    for index in sorted(set(range(numbered)) - set(listed)):
        problems[index] = _missing(path, info, index, listed, broken)
    for index in listed:
        if len(names := [name for name, indices in info.splits.items() if index in indices]) > 1:
            todo = "correct the splits"
            problems[index] = Rejected(
                "E_DUP", path, episode_id(index), "splits", "an episode in one split", ", ".join(names), todo
            )
    return problems | _overlaps(root, info, entries.values())


def _missing(path: Path, info: Info, index: int, listed: list[int], broken: Sequence[Rejected]) -> Rejected:
    if broken:
        return _of_episode(broken[0], index)
    if listed and index < listed[-1]:
        found = f"a gap; the {len(listed)} episodes in meta go to {listed[-1]}"
        return Rejected("E_INDEX", path, episode_id(index), "episode_index", "each index once", found, OTHERS)
    found = f"{len(listed)} in meta"
    return Rejected("E_COUNT", path, episode_id(index), "total_episodes", f"{info.episodes}", found, OTHERS)


def _overlaps(root: Path, info: Info, entries: Iterable[Entry]) -> dict[int, Rejected]:
    """Refuse two episodes that claim the same frames of an mp4: who of them is right cannot be told."""
    problems = {}
    entries = [e for e in entries if e.first is not None]
    for key in info.videos:
        clips = sorted((e.clips[key].path, e.clips[key].start, e.clips[key].stop or 0.0, e.index) for e in entries)
        for (path, _, stop, a), (other, start, _, b) in itertools.pairwise(clips):
            if path != other or start >= stop - 0.5 / info.fps:
                continue
            found = f"{episode_id(a)} until {stop:.6g} s, {episode_id(b)} from {start:.6g} s"
            for index in (a, b):
                at = f"videos/{key}/from_timestamp"
                problems[index] = Rejected("E_INDEX", root / path, episode_id(index), at, "own frames", found, OTHERS)
    return problems


def find_orphans(root: Path, info: Info, entries: Mapping[int, Entry], refused: Iterable[int]) -> dict[str, Rejected]:
    """Refuse rows and tables that the metadata do not list: a recorder was killed between the two; by item id."""
    known, orphans = {*entries, *refused}, {}
    lengths: dict[str, int | None] = {}  # of the tables that need no look
    for entry in entries.values():
        lengths[entry.table] = (lengths.get(entry.table) or 0) + entry.length
    if info.version == "v2.1":  # a table of its own each: reading it tells what is wrong with it
        lengths = {table_v21(info, index): None for index in known}
    top = info.data_path.partition("{")[0].rpartition("/")[0]
    for path in sorted((root / top).rglob("*.parquet"), key=lambda p: natural(p.as_posix())):
        name = path.relative_to(root).as_posix()
        if name.startswith("meta/") or (name in lengths and lengths[name] is None):
            continue
        try:
            file = open_parquet(safe_path(root, name), name)
            if file.metadata.num_rows == lengths.get(name):
                continue
            with damage(path, name):
                indices = file.read(["episode_index"], use_threads=False)["episode_index"].unique().to_pylist()
        except (Rejected, KeyError) as e:
            if name not in lengths:
                orphans[name] = e if isinstance(e, Rejected) else _orphan(path, name, "a table without episode_index")
            continue
        new = [i for i in indices if isinstance(i, int) and i not in known]
        for index in new:
            orphans[episode_id(index)] = _orphan(path, episode_id(index), f"rows of episode_index {index} only here")
        if not new and name not in lengths and not set(indices) & set(refused):
            orphans[name] = _orphan(path, name, f"a table that none of them names, with episodes {indices[:5]}")
    return orphans


def find_broken(root: Path, refused: Iterable[Rejected], broken: Iterable[Rejected]) -> dict[str, Rejected]:
    """Refuse damaged metadata that no missing episode accounts for; by file."""
    told = {(e.file, e.key) for e in refused}
    left = [e for e in broken if (e.file, e.key) not in told]
    names = [Path(e.file).relative_to(root).as_posix() for e in left]
    return {name: Rejected(**{**e.fields(), "episode": name}) for name, e in zip(names, left, strict=True)}


def table_v21(info: Info, index: int) -> str:
    """Name the table of an episode in v2.1."""
    at = {"episode_index": index, "episode_chunk": index // info.chunks_size}
    return fill(info.data_path, Path(INFO), **at)


def _orphan(path: Path, episode: str, found: str) -> Rejected:
    return Rejected("E_INDEX", path, episode, "episode_index", "episodes that meta lists", found, OTHERS)


def check_totals(root: Path, info: Info, entries: Mapping[int, Entry], vectors: Iterable[str]) -> dict[str, Rejected]:
    """Compare a complete list of episodes with the totals in info.json and stats.json; by file, why it is refused."""
    found: dict[str, Rejected] = {}
    frames = sum(e.length for e in entries.values())
    if frames != info.frames:
        text = f"{frames} in the episodes"
        found[INFO] = Rejected("E_COUNT", root / INFO, INFO, "total_frames", f"{info.frames}", text, EDIT)
    name = "meta/stats.json"
    if not (root / name).is_file():
        return found
    stats = _json(safe_path(root, name).read_bytes(), root / name)
    todo = f"{EDIT}, or delete it: dita computes its own statistics"
    for key in vectors:
        whole = stats.get(key)
        if not (isinstance(whole, dict) and whole.keys() >= set(STATS)):
            continue
        parts = [e.stats[key] for e in entries.values() if key in e.stats]
        expected: dict[str, Any] = {"count": [frames]}
        if len(parts) == len(entries):
            expected["min"] = np.min([s["min"] for s in parts], axis=0)
            expected["max"] = np.max([s["max"] for s in parts], axis=0)
        for what, values in expected.items():
            if not same(values, whole[what]):
                text = f"{np.asarray(values).tolist()} as of its episodes"
                found[name] = Rejected("E_STATS", root / name, name, f"{key}.{what}", text, f"{whole[what]}", todo)
    return found


def read_tasks(root: Path, info: Info) -> dict[int, str]:
    """Read task_index -> text.

    Raises:
        Rejected: E_CHUNK_MISSING, E_SCHEMA, E_TRUNCATED, E_CHECKSUM: the file is missing or odd; E_TASK: two texts.
    """
    tasks: dict[int, str] = {}
    for row in _tasks_v21(root) if info.version == "v2.1" else _tasks_v30(root):
        index, text = _count(row, "task_index", row.file), _get(row, "task", str, row.file)
        if tasks.setdefault(index, text) != text:
            raise Rejected("E_TASK", row.file, "", "task_index", f"one text for {index}", "two", EDIT)
    return tasks


def _tasks_v21(root: Path) -> list[MetaRow]:
    broken: list[Rejected] = []
    rows = list(_json_lines(root, root / "meta/tasks.jsonl", broken))
    if broken:
        raise broken[0]
    return rows


def _tasks_v30(root: Path) -> list[MetaRow]:
    path = safe_path(root, "meta/tasks.parquet")
    file = open_parquet(path, "")
    with damage(path, ""):
        table = file.read(use_threads=False)
        rows = table.to_pylist()
    texts = [f.name for f in table.schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    if len(texts) != 1:  # the pandas index: __index_level_0__, or a name that somebody gave it
        raise Rejected("E_SCHEMA", path, "", "task", "one column of texts", ", ".join(table.column_names), EDIT)
    return [MetaRow({**row, "task": row[texts[0]]}, path) for row in rows]


# --- values out of JSON and parquet


def _json(content: bytes, path: Path, line: str = "") -> dict[str, Any]:
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as e:
        raise Rejected("E_SCHEMA", path, "", line, "JSON", f"{e}", EDIT) from None
    if not isinstance(values, dict):
        raise Rejected("E_SCHEMA", path, "", line, "a JSON object", type(values).__name__, EDIT)
    return values


def _json_lines(root: Path, path: Path, broken: list[Rejected]) -> Iterator[MetaRow]:
    """Yield the objects of a JSON Lines file; lines that are none go to `broken`."""
    if not safe_path(root, path.relative_to(root).as_posix()).is_file():
        broken.append(Rejected("E_CHUNK_MISSING", path, "", "", "a file", "none", "restore it"))
        return
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            if line.strip():
                yield MetaRow(_json(line, path, f"line {number}"), path)
        except Rejected as e:
            broken.append(e)


def _get(values: Mapping[str, Any], key: str, kind: Any, path: Path) -> Any:
    if key not in values:
        raise Rejected("E_KEY", path, "", key, KINDS[kind], f"only {', '.join(list(values)[:20])}", EDIT)
    found = values[key]
    if not isinstance(found, kind) or isinstance(found, bool):
        raise Rejected("E_SCHEMA", path, "", key, KINDS[kind], f"{found!r:.60}", EDIT)
    return found


def _count(values: Mapping[str, Any], key: str, path: Path) -> int:
    found = _get(values, key, int, path)
    if not 0 <= found < 2**48:
        raise Rejected("E_SCHEMA", path, "", key, "a count", f"{found}", EDIT)
    return found


def _number(values: Mapping[str, Any], key: str, path: Path) -> float:
    found = _get(values, key, (int, float), path)
    if not abs(found) < 1e15:
        raise Rejected("E_SCHEMA", path, "", key, "a finite number", f"{found}", EDIT)
    return float(found)


def _length(row: MetaRow) -> int:
    length = _count(row, "length", row.file)
    if not length:
        raise Rejected("E_EMPTY", row.file, "", "length", "at least 2 frames", "0", "remove the episode")
    return length


def _texts(row: MetaRow, key: str) -> tuple[str, ...]:
    found = row.get(key)
    return tuple(str(text) for text in found) if isinstance(found, list) else ()


def same(values: Any, stats: Any) -> bool:
    """Say whether statistics in meta are these values."""
    try:
        found = np.asarray(stats, np.float64)
    except (TypeError, ValueError):
        return False
    return found.shape == np.shape(values) and np.allclose(values, found, rtol=1e-5, atol=1e-6)


def open_parquet(path: Path, episode: str) -> pq.ParquetFile:
    """Open a parquet file.

    Raises:
        Rejected: E_CHUNK_MISSING: it does not exist; E_TRUNCATED: it has no footer; E_CHECKSUM: the footer is damaged.
    """
    if not path.is_file():
        raise Rejected("E_CHUNK_MISSING", path, episode, "", "a parquet file", "none", OTHERS)
    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowException, OSError, ValueError) as e:  # names that are no UTF-8 are a plain ValueError
        code = "E_CHECKSUM" if path.read_bytes()[-4:] == b"PAR1" else "E_TRUNCATED"
        found = f"{path.stat().st_size} bytes: {e}"
        raise Rejected(code, path, episode, "", "a parquet file with its footer", found, OTHERS) from None


@contextmanager
def damage(path: Path, episode: str) -> Iterator[None]:
    """Turn what Arrow raises while it reads pages into a refusal, E_CHECKSUM."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise Rejected("E_CHECKSUM", path, episode, "", "readable pages", f"{e}", OTHERS) from None
