"""The contract of a dataset source, and what every source shares: names, sizes, units, lengths, rotations.

A source is one file `dita/datasets/convert/<name>.py` with

    OPTIONS: dict[str, str]     what `-o key=value` it knows: key -> one line of help (may be empty)
    open_source(path, embodiment, options) -> Source

and one pure function raw -> canonical `Episode` in which the format's quirks die. Every input episode ends in exactly
one of written and rejected with one of CODES; the driver (`run.py`) counts.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from jaxtyping import Float
from scipy.spatial.transform import Rotation

from dita.datasets.shards import StoreError
from dita.datasets.writer import check_episode
from dita.embodiment import slices
from dita.types import CameraSpec, EmbodimentSpec, Episode, FieldSpec

# of rejections, each with file, episode, key, what was expected and found; docs/converting.md shows them
CODES = {
    "E_PATH": "a name, link or size that is a trick: nothing is followed out of the input, nothing inflates a bomb",
    "E_LINK": "a link inside a file (HDF5): links are not followed",
    "E_PICKLE": "content that would have to be run to be read",
    "E_TRUNCATED": "a file or stream ends early",
    "E_CHECKSUM": "its own checksum, or the format's library, says that it is damaged",
    "E_CHUNK_MISSING": "data that was never written and would read as zeros",
    "E_SCHEMA": "not this format, or an odd shape; also a command that does not say enough",
    "E_VERSION": "a version of the format that is not known",
    "E_LAYOUT": "files of another version than the metadata say",
    "E_KEY": "a key is missing",
    "E_DTYPE": "strings or objects where numbers belong",
    "E_LENGTH": "arrays of one episode have unequal lengths",
    "E_COUNT": "more or fewer episodes or frames than the metadata say",
    "E_INDEX": "an index has a gap, comes twice or belongs to another episode",
    "E_EMPTY": "fewer than two frames, or no episode at all",
    "E_VIDEO": "a video is shorter than its table, or begins elsewhere",
    "E_STAMP": "stamps do not increase, or not at the rate",
    "E_STATS": "statistics of other episodes",
    "E_TASK": "no task, several, or one that is not listed",
    "E_INSTRUCTION": "no instruction, and none was given",
    "E_VALUE": "not finite, or outside the field's limits",
    "E_UNITS": "degrees for radians, millimetres for metres",
    "E_POLARITY": "a gripper outside its range, or upside down",
    "E_JOINTS": "joint names missing, twice or unknown",
    "E_CAMERA": "blank frames in more than 5 % of an episode",
    "E_DUP": "an episode of another split",
    "W_DUP": "an episode that is there already: counted, written once; no fault",
    "E_READ": "the format's library refused it",
    "E_CRASH": "the process that read it died",
}
MAX_LINE = 2000  # characters of a message
MAX_NAME = 200  # characters of a file or key name
MAX_FRAME_PIXELS = 16 * 2**20  # of one decoded frame
MAX_EPISODE_BYTES = 16 * 2**30  # of one episode's decoded arrays
MAX_RATIO = 200  # decoded / stored bytes of a large array: gzip makes 1000 of zeros, camera frames make 5
RATIO_FROM = 256 * 2**20  # bytes; smaller arrays do no harm
MAX_FRAMES = 10**7  # per episode
BLANK_SHARE = 0.05  # of an episode's frames
MIN_FRAMES = 2
STILL_FRAMES = 20  # in which a joint should move
POLARITY_FRAMES = 20  # that a gripper's command and state must have in common to be compared
CAMERAS_OPTION = "the cameras to take and other names for them: NAME:KEY,KEY,... (default: all)"
PATH_ADVICE = "remove it from the input; nothing outside the input folder is read"


class Rejected(ValueError):
    """One input episode, or file, that is refused; its text is one line with all that is known."""

    def __init__(self, code: str, file: str | Path, episode: str, key: str, expected: str, found: str, todo: str):
        self.code, self.file, self.episode, self.key = code, str(file), episode, key
        self.expected, self.found, self.todo = expected, found, todo
        what = ": ".join(part for part in (episode and f"episode {episode}", key) if part)
        where = ": ".join(part for part in (self.file, what) if part)
        super().__init__(printable(f"{code}: {where}: expected {expected}, found {found}; {todo}"))

    def __reduce__(self) -> tuple:
        """Pickle by its fields: it crosses processes."""
        return type(self), tuple(self.fields().values())

    def fields(self) -> dict[str, str]:
        """Return code, file, episode, key, expected, found and todo."""
        names = ("code", "file", "episode", "key", "expected", "found", "todo")
        return {name: getattr(self, name) for name in names}


class Refused(Rejected):
    """The command does not say enough to read anything; no fault of the data, so no episode is counted."""


class Note(str):
    """A warning; the command shows the first of each group, and how many there are."""

    group: str

    def __new__(cls, text: str, group: str) -> Self:
        note = super().__new__(cls, text)
        note.group = group
        return note

    def __getnewargs__(self) -> tuple[str, str]:
        """Pickle with the group."""
        return str(self), self.group


@dataclass(frozen=True)
class Item:
    """Picklable handle of one input episode, or of a file whose episodes cannot be listed (reading it is refused).

    Two runs over the same input give the same items; `--resume` goes by `id`.
    """

    id: str  # unique and stable, becomes Episode.source; sorts as the input does: numbers through `padded`
    file: str  # relative to the input
    key: str | int  # what `read` needs: an index, a group's name
    split: str = ""  # "train", "val", ...; one episode in two splits is refused


@dataclass(frozen=True)
class Options:
    """What the command line gives where a format has nothing."""

    instruction: str | None
    control_hz: float | None
    extra: Mapping[str, str]  # `-o key=value`, checked against the source's OPTIONS

    def require_instruction(self, file: str | Path, found: str | None = None) -> str:
        """Return the file's own instruction, else `--instruction`; refuse when there is neither."""
        text = " ".join((found or self.instruction or "").split())
        if not text:
            raise Refused(
                "E_INSTRUCTION", file, "", "instruction", "a text", "none", "say what is done: --instruction TEXT"
            )
        return text


class Source(Protocol):
    """An opened input: a file or a folder of one format.

    `open_source(path, embodiment, options)` finds `spec`: the given embodiment with the cameras' sizes from the data
    (`fit_spec`), or one inferred from what the format tells. Where it cannot be inferred, `refuse_to_guess`. It is
    cheap and deterministic: every worker process opens the input for itself.
    """

    spec: EmbodimentSpec
    warnings: list[str]  # the driver prints and empties it

    def items(self) -> list[Item]:
        """List every input episode, in numeric order, without reading them.

        A damaged file is one item: reading it says why. Raises only when there is nothing to list.
        """
        ...

    def read(self, item: Item) -> Episode:
        """Read one episode, whole and canonical; the driver runs `check` on it.

        Raises:
            Rejected: why it cannot be used. Other exceptions count as E_READ.
        """
        ...

    def close(self) -> None:
        """Free the files."""
        ...


# --- names and sizes


def printable(text: str) -> str:
    """Make a text from a file one short line without control characters, which a terminal would obey."""
    words = " ".join(text.split())
    words = words if len(words) <= MAX_LINE else f"{words[: MAX_LINE // 2]} ... {words[-MAX_LINE // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words)


def natural(name: str) -> list[Any]:
    """Sort key: demo_2 before demo_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"([0-9]+)", name)]


def padded(name: str) -> str:
    """Pad the numbers of a name to six digits, so that plain sorting is numeric: demo_10 -> demo_000010."""
    return re.sub(r"[0-9]+", lambda m: m[0].zfill(6), name)


def check_name(name: str, file: str | Path, what: str = "name") -> str:
    """Return a name or relative path that comes out of a file, if it stays where it is used.

    Raises:
        Rejected: E_PATH: empty, absolute, with `..`, a drive, a backslash or control characters, or too long.
    """
    parts = name.split("/")
    bad = (
        not name
        or name.startswith("/")
        or ".." in parts
        or "\\" in name
        or re.match(r"[A-Za-z]:", name) is not None
        or any(ord(c) < 32 for c in name)
        or max(map(len, parts)) > MAX_NAME
    )
    if bad:
        shown = ascii(name if len(name) <= 60 else f"{name[:57]}...")
        expected = f"a relative name of at most {MAX_NAME} characters"
        raise Rejected("E_PATH", file, "", what, expected, shown, PATH_ADVICE)
    return name


def safe_path(root: Path, name: str, file: str | Path = "") -> Path:
    """Return root/name for a name that comes out of a file; it need not exist.

    Raises:
        Rejected: E_PATH: the name is a trick (`check_name`) or a link leads out of `root`.
    """
    path = root / check_name(name, file or root, "path")
    return check_inside(root, path)


def check_inside(root: Path, path: Path) -> Path:
    """Return `path`, which must lie in the folder `root` (or be it) also when links are followed.

    Raises:
        Rejected: E_PATH; also for a link to a folder, and for what is no file (a pipe would block for ever).
    """
    real, base = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    if not real.is_relative_to(base):
        found = f"a link to {real}"
    elif real.is_dir() and path.is_symlink() and path != root:
        found = f"a link to the folder {real}"
    elif real.exists() and not real.is_dir() and not real.is_file():
        found = "a pipe, socket or device"
    else:
        return path
    raise Rejected("E_PATH", path, "", "", f"a file inside {base}", found, PATH_ADVICE)


def list_files(root: Path, *suffixes: str) -> list[Path]:
    """List the input's files with one of the suffixes, in numeric order: `root` itself, or all below the folder.

    A link that leaves the folder, or leads to a folder, is listed and not followed: `check_inside` refuses it as an
    item of its own.

    Raises:
        FileNotFoundError: nothing is at `root`.
        Rejected: E_EMPTY: no such file.
    """
    if not root.exists():
        raise FileNotFoundError(f"{root} does not exist")
    if root.is_file():
        return [root]
    walk = list(os.walk(root))
    found = [Path(d) / f for d, _, files in walk for f in files if f.lower().endswith(suffixes)]
    found += [Path(d) / f for d, folders, _ in walk for f in folders if (Path(d) / f).is_symlink()]
    if not found:
        wanted = " or ".join(suffixes)
        raise Rejected(
            "E_EMPTY", root, "", "", f"at least one {wanted} file", "none", "give the folder that holds them"
        )
    return sorted(found, key=lambda p: natural(p.relative_to(root).as_posix()))


def check_size(shape: Sequence[int], itemsize: int, file: str | Path, key: str, stored: int | None = None) -> None:
    """Refuse an array that would inflate without bound, before anything is allocated.

    Args:
        shape: frames first; images are [m, h, w, c].
        itemsize: bytes per element.
        file: for the error.
        key: for the error.
        stored: bytes on disk, where known.

    Raises:
        Rejected: E_PATH.
    """
    total = int(np.prod([int(n) for n in shape], dtype=object)) * itemsize if len(shape) else itemsize
    limits = [
        (total, MAX_EPISODE_BYTES, "decoded bytes per episode"),
        (int(shape[0]) if len(shape) else 1, MAX_FRAMES, "frames per episode"),
        (int(shape[1]) * int(shape[2]) if len(shape) == 4 else 0, MAX_FRAME_PIXELS, "pixels per frame"),
        (total // (stored or total or 1) if total > RATIO_FROM else 1, MAX_RATIO, "decoded bytes per stored byte"),
    ]
    for found, limit, what in limits:
        if found > limit:
            raise Rejected(
                "E_PATH", file, "", key, f"at most {limit} {what}", str(found), "split it, or check where it comes from"
            )


def check_pixels(width: int, height: int, file: str | Path, key: str) -> None:
    """Refuse a compressed picture by the size in its header, before it is decoded; E_PATH."""
    if not 0 < width * height <= MAX_FRAME_PIXELS:
        expected = f"1 to {MAX_FRAME_PIXELS} pixels per frame"
        raise Rejected("E_PATH", file, "", key, expected, f"{width} x {height}", "check where it comes from")


# --- embodiments


def refuse_to_guess(source: str, path: Path, missing: Mapping[str, str]) -> Refused:
    """Return the refusal of a source that cannot infer its embodiment; `missing`: field -> what the data say."""
    what = "; ".join(f"{name} ({found})" for name, found in missing.items())
    return Refused(
        "E_SCHEMA",
        path,
        "",
        "embodiment",
        f"what {source} does not tell: {what}",
        "none",
        "give it with --embodiment FILE (copy one of configs/embodiment/*.yaml)",
    )


def fit_spec(
    spec: EmbodimentSpec, sizes: Mapping[str, tuple[int, int]], control_hz: float, *, given: bool, file: str | Path
) -> tuple[EmbodimentSpec, list[str]]:
    """Fit an embodiment to the data: the cameras' sizes, and for an inferred one also the cameras and the rate.

    Args:
        spec: of a file.
        sizes: (height, width) of every camera of the data, by camera name.
        control_hz: of the data.
        given: by the user: then its cameras are the ones to read, and its rate must be the data's.
        file: for errors.

    Returns:
        The fitted embodiment and one line per thing that is left out or differs.

    Raises:
        Rejected: E_SCHEMA: a given camera is not in the data; E_STAMP: another rate was given; E_PATH: names that
            differ in case only.
    """
    notes: list[str] = []
    known = {c.name: c for c in spec.cameras}
    if given:
        if absent := [n for n in known if n not in sizes]:
            have = ", ".join(sizes) or "none"
            todo = "correct the embodiment's cameras"
            raise Rejected("E_SCHEMA", file, "", "cameras", ", ".join(absent), f"only {have}", todo)
        if abs(spec.control_hz / control_hz - 1) > 0.01:
            expected = f"{spec.control_hz:g} Hz as in embodiment {spec.name}"
            todo = "correct control_hz, obs_dt and action_dt of the embodiment"
            raise Rejected("E_STAMP", file, "", "control_hz", expected, f"{control_hz:g} Hz in the data", todo)
        if left := [n for n in sizes if n not in known]:
            notes.append(f"cameras left out, since embodiment {spec.name} has no such: {', '.join(left)}")
        names = list(known)
    else:
        names = sorted(sizes, key=lambda n: (n not in known, known[n].slot if n in known else 0, natural(n)))
    if len({n.lower() for n in names}) < len(names):
        raise Rejected("E_PATH", file, "", "cameras", "names that differ", ", ".join(names), "rename one")
    cameras = []
    for i, name in enumerate(names):
        height, width = sizes[name]
        if given and (known[name].height, known[name].width) != (height, width):
            notes.append(
                f"camera {name}: {width} x {height} in the data, {known[name].width} x {known[name].height} in the "
                f"embodiment: the data's size is kept"
            )
        cameras.append(CameraSpec(name, height, width, known[name].slot if given else i))
    dt = 1 / control_hz
    rates = {} if given else {"action_dt": dt, "obs_dt": max(1, round(spec.obs_dt / dt)) * dt}
    rate = spec.control_hz if given else control_hz
    return dataclasses.replace(spec, cameras=tuple(cameras), control_hz=rate, **rates), notes


def to_si(values: Float[np.ndarray, "m d"], fields: tuple[FieldSpec, ...]) -> Float[np.ndarray, "m d"]:
    """Scale the source's own values, concatenated as the fields are, to SI float32.

    SI = scale * value. A gripper position or a binary gripper with a negative scale counts from the other end: 1 is
    open here, and a source where 1 is closed has scale -1 and gives 1 - value.
    """
    out = np.empty(values.shape, np.float32)
    for field, here, _ in slices(fields):
        turned = field.kind in ("gripper_position", "gripper_binary") and field.scale < 0
        with np.errstate(over="ignore", invalid="ignore"):  # `check` finds what is not finite
            out[:, here] = values[:, here].astype(np.float64) * field.scale + turned
    return out


def reorder(expected: Sequence[str], found: Sequence[str], file: str | Path, key: str) -> list[int]:
    """Return for each expected joint its index in `found`: by name, never by position.

    Raises:
        Rejected: E_JOINTS: a name is missing or comes twice.
    """
    missing = [n for n in expected if n not in found]
    twice = sorted({n for n in found if list(found).count(n) > 1})
    if missing or twice:
        what = f"{', '.join(found) or 'no names'} (missing {missing}, twice {twice})"
        raise Rejected("E_JOINTS", file, "", key, ", ".join(expected), what, "name the joints as the embodiment does")
    return [list(found).index(n) for n in expected]


# --- rotations


def rotation_6d(rotation: Rotation) -> Float[np.ndarray, "m 6"]:
    """Return the first two columns of the matrices, one after the other (Zhou et al. 2019)."""
    return np.moveaxis(rotation.as_matrix()[..., :2], -1, -2).reshape(-1, 6)


def quaternion_6d(values: Float[np.ndarray, "m 4"], order: str, file: str | Path, key: str) -> Float[np.ndarray, "m 6"]:
    """Turn quaternions of either sign, `order` "wxyz" or "xyzw", into 6-D rotations.

    Raises:
        Rejected: E_VALUE: a norm is further than 1 % from one (or not finite), with the first frame and share.
    """
    norms = np.linalg.norm(values, axis=1)
    if np.any(bad := ~(np.abs(norms - 1) < 0.01)):
        frame = int(np.argmax(bad))
        found = f"norm {norms[frame]:.4g} at frame {frame} ({bad.mean():.1%} of frames)"
        raise Rejected("E_VALUE", file, "", key, "unit quaternions", found, "correct or remove the episode")
    return rotation_6d(Rotation.from_quat(values, scalar_first=order == "wxyz"))


def assemble(
    columns: Float[np.ndarray, "m c"], fields: tuple[FieldSpec, ...], order: str, file: str | Path, key: str
) -> Float[np.ndarray, "m d"]:
    """Turn the source's own columns, concatenated as the fields are, into SI float32.

    An absolute rotation (6-D here) may take 3 columns in the source (axis-angle, rad), 4 (a quaternion, `order` "wxyz"
    or "xyzw") or 6; it has no scale.

    Raises:
        Rejected: E_SCHEMA: another number of columns; E_VALUE: no rotation.
    """
    width = rotation_columns(columns.shape[1], fields)
    if width is None:
        names = ", ".join(f"{f.name}[{f.size}]" for f in fields)
        todo = "correct the embodiment's fields"
        raise Rejected("E_SCHEMA", file, "", key, f"columns for {names}", f"{columns.shape[1]} columns", todo)
    parts, start = [], 0
    for field in fields:
        stop = start + (width if field.kind == "ee_rotation_6d" else field.size)
        values = columns[:, start:stop].astype(np.float64)
        if field.kind != "ee_rotation_6d":
            parts.append(to_si(values, (field,)))
        elif width == 4:
            parts.append(quaternion_6d(values, order, file, key))
        else:
            parts.append(values if width == 6 else rotation_6d(Rotation.from_rotvec(values)))
        start = stop
    return np.concatenate(parts, axis=1).astype(np.float32)


def rotation_columns(columns: int, fields: tuple[FieldSpec, ...]) -> int | None:
    """Return how many of the source's columns each absolute rotation has: 3, 4, 6, 0 without any; None: no fit."""
    turns = sum(f.kind == "ee_rotation_6d" for f in fields)
    left = columns - sum(f.size for f in fields if f.kind != "ee_rotation_6d")
    if turns == 0:
        return 0 if left == 0 else None
    return left // turns if left % turns == 0 and left // turns in (3, 4, 6) else None


def match_cameras(
    spec: EmbodimentSpec | None, keys: Sequence[str], chosen: str | None = None, file: str | Path = ""
) -> dict[str, str]:
    """Return camera name -> key of the data.

    Args:
        spec: given by the user, or None. Its only camera is the data's only camera, whatever that is called.
        keys: of the data's cameras.
        chosen: "NAME:KEY,KEY,...", the user's own choice and names.
        file: for the error.

    Raises:
        Rejected: E_KEY: a chosen key is no camera of the data.
    """
    if chosen:
        pairs = [text.strip().rpartition(":") for text in chosen.split(",")]
        if absent := [key for _, _, key in pairs if key not in keys]:
            todo = "choose with -o cameras=NAME:KEY,..."
            raise Refused("E_KEY", file, "", "cameras", ", ".join(absent), f"only {', '.join(keys) or 'none'}", todo)
        return {name or key: key for name, _, key in pairs}
    if spec is not None and len(spec.cameras) == len(keys) == 1:
        return {spec.cameras[0].name: keys[0]}
    return {key: key for key in keys}


# --- what every episode must pass


def check_lengths(lengths: Mapping[str, int], item: Item) -> None:
    """Refuse arrays of unequal lengths, E_LENGTH, with all lengths."""
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{k} {n}" for k, n in lengths.items())
        raise reject("E_LENGTH", item, "", "equal lengths", found, "correct or remove the episode")


def reject(code: str, item: Item, key: str, expected: str, found: str, todo: str) -> Rejected:
    """Return the refusal of one episode."""
    return Rejected(code, item.file, item.id, key, expected, found, todo)


def check(episode: Episode, spec: EmbodimentSpec, item: Item) -> list[Note]:
    """Check a canonical episode against its embodiment; return warnings.

    Raises:
        Rejected: E_EMPTY, E_LENGTH, E_SCHEMA, E_VALUE, E_STAMP, E_INSTRUCTION, E_UNITS, E_POLARITY, E_CAMERA.
    """
    if not episode.instruction.strip():
        todo = "say what is done: --instruction TEXT"
        raise reject("E_INSTRUCTION", item, "instruction", "a text", "none", todo)
    if len(episode.stamp) < MIN_FRAMES:
        found = f"{len(episode.stamp)}"
        raise reject("E_EMPTY", item, "", f"at least {MIN_FRAMES} frames", found, "remove the episode")
    assert episode.source == item.id, (episode.source, item.id)
    for group, fields, values in (("state", spec.state, episode.state), ("action", spec.action, episode.action)):
        for field, here, _ in slices(fields):
            _check_finite(values[:, here], f"{group}.{field.name}", item)
    try:
        check_episode(episode, spec)
    except StoreError as e:
        raise _from_store(e, item) from None
    warnings: list[Note] = []
    for group, fields, values in (("state", spec.state, episode.state), ("action", spec.action, episode.action)):
        for field, here, _ in slices(fields):
            warnings += _check_range(values[:, here], field, f"{group}.{field.name}", item)
    _check_polarity(episode, spec, item)
    for camera, frames in episode.images.items():
        warnings += _check_camera(frames, camera, item)
    return [Note(f"{item.id}: {text}", text.group) for text in warnings]


def _from_store(error: StoreError, item: Item) -> Rejected:
    text = str(error).removeprefix(f"{error.code}: ").removeprefix(f"episode {item.id!r}: ")
    return reject(error.code, item, "", "what a store takes", text, "correct or remove it")


def _check_finite(values: Float[np.ndarray, "m d"], key: str, item: Item) -> None:
    bad = ~np.isfinite(values)
    if bad.any():
        frame, dim = np.argwhere(bad)[0].tolist()
        found = f"{values[frame, dim]} at frame {frame} ({bad.any(axis=1).mean():.1%} of frames)"
        raise reject("E_VALUE", item, f"{key}[{dim}]", "finite values", found, "correct or remove the episode")


def _check_range(values: Float[np.ndarray, "m d"], field: FieldSpec, key: str, item: Item) -> list[Note]:
    """Compare with the field's limits; a little outside is a warning, far outside another unit or damage."""
    low, high = np.array(field.low), np.array(field.high)
    outside = (values < low - 1e-6) | (values > high + 1e-6)
    if not outside.any():
        return _check_moves(values, field, key)
    frame, dim = np.argwhere(outside)[0].tolist()
    share = outside.any(axis=1).mean()
    expected = f"{low[dim]:g} .. {high[dim]:g} {field.unit}"
    found = f"{values[frame, dim]:.5g} at frame {frame} ({share:.1%} of frames)"
    excess = np.maximum(low - values, values - high) / (high - low)  # in ranges
    if field.kind.startswith("gripper"):
        if excess.max() > 0.1:
            todo = "1 is open, 0 (or -1) closed: correct scale, low and high of the gripper in the embodiment"
            raise reject("E_POLARITY", item, key, expected, found, todo)
        return [Note(f"{key}: expected {expected}, found {found}", f"{key} outside")]
    for unit, factor, name in (("rad", np.pi / 180, "degrees"), ("m", 1e-3, "millimetres")):
        reach = np.abs(values).max() / np.maximum(np.abs(low), np.abs(high)).max()
        if field.unit.split("/")[0] == unit and reach > 0.1 / factor and reach < 10 / factor:
            todo = f"these look like {name}: set the field's scale to {factor:.6g} in the embodiment"
            raise reject("E_UNITS", item, key, expected, found, todo)
    # joints cannot be far outside their range; hands and commands may leave the box that somebody wrote down
    slack = 0.1 if field.kind == "joint_position" and field.mode == "absolute" else 1.0
    if excess.max() > slack:
        todo = "correct the field's limits in the embodiment, or remove the episode"
        raise reject("E_VALUE", item, key, expected, found, todo)
    return [Note(f"{key}: expected {expected}, found {found}", f"{key} outside")]


def _check_moves(values: Float[np.ndarray, "m d"], field: FieldSpec, key: str) -> list[Note]:
    if field.kind != "joint_position" or not key.startswith("state.") or len(values) < STILL_FRAMES:
        return []
    still = np.flatnonzero(np.ptp(values, axis=0) == 0).tolist()
    text = f"{key}: joints {still} have one value in all {len(values)} frames"
    return [Note(text, f"{key} {still} still")] if still else []


def _check_polarity(episode: Episode, spec: EmbodimentSpec, item: Item) -> None:
    """Refuse a gripper whose state closes when its command opens: compare them over delays up to half a second."""
    states = [(f, s) for f, s, _ in slices(spec.state) if f.kind == "gripper_position"]
    actions = [(f, s) for f, s, _ in slices(spec.action) if f.kind.startswith("gripper") and f.mode == "absolute"]
    if len(states) != len(actions) or any(f.size != 1 for f, _ in (*states, *actions)):
        return
    for (state, here), (action, there) in zip(states, actions, strict=True):
        position, command = episode.state[:, here.start], episode.action[:, there.start]
        # chance alone makes short ones look alike
        delays = range(min(len(command) - POLARITY_FRAMES, round(spec.control_hz / 2) + 1))
        likeness = [_correlation(command[: len(command) - k], position[k:]) for k in delays]
        if likeness and min(likeness) < -0.7 and max(likeness) < 0.3:
            found = f"correlation {min(likeness):.2f}"
            todo = "1 is open in both: turn the sign of one gripper's scale in the embodiment"
            raise reject("E_POLARITY", item, f"action.{action.name}", f"{state.name} to follow it", found, todo)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if np.std(a) < 0.05 or np.std(b) < 0.05:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def _check_camera(frames: np.ndarray, camera: str, item: Item) -> list[Note]:
    blank = np.array([frame.min() == frame.max() for frame in frames])
    notes = []
    if blank.any():
        found = f"{blank.sum()} of one colour, the first at {int(np.argmax(blank))} ({blank.mean():.1%} of frames)"
        if blank.mean() > BLANK_SHARE:
            expected = f"at most {BLANK_SHARE:.0%} blank frames"
            raise reject("E_CAMERA", item, f"images.{camera}", expected, found, "remove the camera or the episode")
        notes.append(Note(f"images.{camera}: frames {found}", f"{camera} blank"))
    if len(frames) > MIN_FRAMES and all(np.array_equal(frames[0], frame) for frame in frames[1:]):
        notes.append(Note(f"images.{camera}: all {len(frames)} frames are equal", f"{camera} frozen"))
    return notes


def json_lines(rejections: Sequence[Rejected]) -> Iterator[str]:
    """Yield one JSON object per rejection."""
    for rejected in rejections:
        yield json.dumps(rejected.fields(), ensure_ascii=True) + "\n"
