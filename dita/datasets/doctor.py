"""What is wrong with recorded episodes: pure checks over one episode's arrays, and a run over whole stores.

Two passes, each with one segment's low-dimensional arrays and a few frames in memory: the first learns what is usual in
a store (`Usual`), the second examines every episode against it. `FAULTS` names each fault, when it is severe enough to
leave the episode out, and what to do about it.
Shape legend: m frames of an episode, s state dims, a action dims, n episodes of a store.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Float64, UInt8
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from dita.config import from_dict
from dita.datasets.filters import write_filter
from dita.datasets.store import Store
from dita.embodiment import canonical_json, slices
from dita.normalize import NO_SPREAD, fit
from dita.types import EmbodimentSpec, EpisodeSpec, FieldSpec, NormStats

VERSION = 1
BLOCK = 32  # frames of one camera in memory

# "range" below is `Usual.state_range`: the median over episodes of how far a dimension moves
MIN_RANGE = 0.02  # of the limits' width: what moves less is judged by its limits, not by its own noise
IDLE_S = 1.0  # [s] shorter pauses belong to grasps
IDLE_STATE = 0.02  # of the range within IDLE_S: far above the noise of an encoder, far below any motion on purpose
IDLE_ACTION = 0.05  # of the usual largest step: a policy that repeats it moves nothing either
SMOOTH_HZ = 10.0  # below it a step between frames says nothing about smoothness
TREMOR = 1.0  # third differences over first ones: 0.1 for smooth motion, 3.2 for white noise (sqrt 20 / sqrt 2)
TREMOR_SIZE = 0.005  # of the range: smaller noise does not matter
JUMP_SIZE = 0.1  # of the range in one step
JUMP_RATIO = 4.0  # times the steps around it: 2 for any motion that lasts four frames
STUCK = 0.01  # of what is usual: a dimension that is used moves by more
LAG_SEARCH_S = 0.75  # [s] longer delays look like another motion
LAG_CORRELATION = 0.5  # below it commands and motion have too little in common to say
LAG_GAIN = 0.03  # the best lag must explain more than the usual one by this much
LAG_DEVIATION_S = 0.1  # [s] from the store's median lag, and at least LAG_DEVIATION_FRAMES
LAG_DEVIATION_FRAMES = 3
LAG_MAX_S = 0.5  # [s] a store whose robot follows later than that is aligned wrongly
BLANK_STD = 3.0  # of 255: noise of a covered lens; a picture of a plain wall has more
SAME_PIXEL = 2  # of 255: what a codec changes between two copies; sensor noise exceeds it somewhere
FROZEN_S = 0.2  # [s] a camera of 10 Hz in a log of 80 Hz repeats for less
FROZEN_MOTION = 0.05  # of the range while the picture stood still
REPEATS = 0.2  # share of moving frames that repeat their predecessor
REPEAT_MOTION = 0.005  # of the range in one step
JITTER = 0.2  # of the frame time: the picture is that share of a step away from its state
GAP_S = 0.5  # [s] what happened in between is not in the data
LIMIT_MARGIN = 0.01  # of the limits' width: calibration offsets
UNITS_RATIO = 3.0  # times the limit; degrees exceed radians by 57, millimetres metres by 1000
UNITS_MARGIN = 0.05  # of the limits' width, after scaling
UNITS_SHARE = 0.2  # of the frames
GRIPPER_TRAVEL = 0.1  # of the limits' width: less is no opening or closing
GRIPPER_MOVES = 3  # frames in which it moves
GRIPPER_AGREE = 0.25  # share of those that go where the command says
GRIPPER_STEP = 0.02  # of the limits' width: smaller differences say nothing
GRIPPER_APART = 0.9  # of the limits' width, and of the frames: at one end while commanded to the other
CLIP_MARGIN = 0.1  # of q99 - q01
CLIP_RARE = 0.05  # of the episodes: more of them are no outliers
CLIP_SHARE = 0.25  # of an episode's frames; 0.02 by construction
CLIP_TAIL = 3.0  # times q99 - q01 from end to end: the normaliser q01_q99 then cuts real moves
NEAR_CONSTANT = 0.01  # q99 - q01 over max - min: the normaliser q01_q99 blows such a dimension up

FACTORS = {"rad": np.pi / 180, "rad/s": np.pi / 180, "m": 1e-3, "m/s": 1e-3}
WRONG_UNITS = {"rad": "degrees", "rad/s": "degrees/s", "m": "millimetres", "m/s": "millimetres/s"}


@dataclass(frozen=True)
class Fault:
    """One kind of fault."""

    title: str
    error_share: float  # of the frames: from here on the episode is left out; 0: always, above 1: never
    advice: str


FAULTS: Mapping[str, Fault] = {
    "IDLE": Fault("nothing moves", 0.5, "trim the pause: a policy that copies it stays there"),
    "JERK": Fault("tremor or jumps", 0.2, "smooth or re-estimate the signal; a wrapped angle jumps by 2 pi"),
    "CONSTANT": Fault("a dimension stands still", 2, "check the sensor; with q01_q99 use min_max where spread is rare"),
    "LAG": Fault("actions and motion are shifted in time", 0, "align by stamps: action[i] is the one taken at frame i"),
    "BLANK": Fault("blank frames", 0.05, "check the camera's cable and exposure; leave the frames out"),
    "FROZEN": Fault("repeated frames while the robot moves", 0.05, "check the camera's rate and time stamps"),
    "CAMERA": Fault("a camera shows nothing new", 0, "leave the camera out of the embodiment, or the episode out"),
    "JITTER": Fault("irregular stamps", 2, "resample to the image stamps at the declared rate"),
    "GAP": Fault("a gap in time", 0, "split the episode at the gap"),
    "VALUE": Fault("values outside the limits", 0.05, "correct the embodiment's limits, or the recorder"),
    "UNITS": Fault("another unit than declared", 0, "set the field's scale in the converter and convert again"),
    "POLARITY": Fault("gripper command and motion disagree", 0, "1 = open: negate the scale in the converter"),
    "CLIP": Fault("far outside q01/q99", 2, "look at the episode; with few demonstrations use min_max"),
    "DUP": Fault("the same episode twice", 0, "keep one copy, and never one each in training and test"),
}


@dataclass(frozen=True)
class Finding:
    """One fault in one episode, or in a whole store."""

    code: str  # E_ or W_ and a key of FAULTS
    severity: Literal["error", "warning"]  # an error's episode is left out by the filter
    store: str
    episode: int | None  # None: the whole store
    source: str | None
    where: str  # "state.hand[2]", "camera front", "stamp"
    first_frame: int | None
    share: float  # of the episode's frames; of the store's frames for a whole store
    what: str
    advice: str


@dataclass(frozen=True)
class StoreSummary:
    """What was examined."""

    path: str
    embodiment: str
    episodes: int
    frames: int
    control_hz: float
    lag_s: float | None  # median over episodes, of motion behind command; None: cannot be told
    clip_rate: Mapping[str, float]  # share of values outside q01..q99, by field


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor.json` holds."""

    version: int
    stores: tuple[StoreSummary, ...]
    counts: Mapping[str, int]  # findings by code
    left_out: int  # episodes in the filter
    findings: tuple[Finding, ...]


@dataclass(frozen=True, eq=False)
class Symptom:
    """A fault as a check sees it: a key of FAULTS, where, and in which frames."""

    fault: str
    where: str
    bad: Bool[np.ndarray, "m"]
    what: str
    never_severe: bool = False


@dataclass(frozen=True, eq=False)
class Recording:
    """What a check sees of one episode; SI."""

    state: Float32[np.ndarray, "m s"]
    action: Float32[np.ndarray, "m a"]
    stamp: Float64[np.ndarray, "m"]


@dataclass(frozen=True, eq=False)
class FrameFacts:
    """What a check sees of one camera in one episode."""

    blank: Bool[np.ndarray, "m"]  # one colour only
    same: Bool[np.ndarray, "m"]  # as the frame before; False for the first


@dataclass(frozen=True, eq=False)
class Usual:
    """What is usual in a store."""

    stats: NormStats
    state_range: Float64[np.ndarray, "s"]  # median over episodes of max - min, at least MIN_RANGE of the limits
    action_range: Float64[np.ndarray, "a"]
    state_moves: Float64[np.ndarray, "s"]  # the same without the floor
    action_moves: Float64[np.ndarray, "a"]
    action_size: Float64[np.ndarray, "a"]  # median over episodes of max |action|
    state_extremes: Float64[np.ndarray, "2 s"]  # minimum and maximum of all but CLIP_RARE of the episodes
    action_extremes: Float64[np.ndarray, "2 a"]
    lag: float | None  # [frames] median; None: fewer than three episodes tell


# ---- first pass: what is usual


def learn_usual(spec: EmbodimentSpec, episodes: Iterable[Recording]) -> Usual:
    """Learn in one pass over a store what its episodes have in common.

    Raises:
        ValueError: there are no episodes.
    """
    states: list[np.ndarray] = []  # of each episode [2 s]
    actions: list[np.ndarray] = []
    lags: list[int] = []

    def look() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for e in episodes:
            states.append(np.stack([e.state.min(0), e.state.max(0)]).astype(np.float64))
            actions.append(np.stack([e.action.min(0), e.action.max(0)]).astype(np.float64))
            lags.extend([] if (lag := lag_of(spec, e)) is None else [lag[0]])
            yield e.state, e.action

    stats = fit(spec, look())
    state, action = (np.median(np.ptp(extremes, axis=1), axis=0) for extremes in (states, actions))
    return Usual(
        stats=stats,
        state_range=np.maximum(state, MIN_RANGE * _width(spec.state)),
        action_range=np.maximum(action, MIN_RANGE * _width(spec.action)),
        state_moves=state,
        action_moves=action,
        action_size=np.maximum(np.median(np.abs(actions).max(1), axis=0), 1e-9),
        state_extremes=_most(states),
        action_extremes=_most(actions),
        lag=float(np.median(lags)) if len(lags) >= 3 else None,
    )


def lag_of(spec: EmbodimentSpec, e: Recording) -> tuple[int, float, Callable[[float], float]] | None:
    """Return (frames by which motion follows command, its correlation, correlation at any lag), or None.

    The lag is where commanded and measured velocity correlate best. 0: the next state shows the action; -1: an action
    is the state of its own frame; below: actions come after what they caused.
    """
    pairs = _pairs(spec, ("ee_position", "joint_position", "joint_velocity"))
    if not pairs or len(e.stamp) < 12:
        return None
    command, motion = [], []
    for field, a, s in pairs:
        v = np.diff(e.state[:, s].astype(np.float64), axis=0)
        u = e.action[:, a].astype(np.float64)
        if field.mode == "absolute" and field.kind != "joint_velocity":
            u = np.diff(u, axis=0, prepend=u[:1])
        command.append(u[: len(v)])
        motion.append(v)
    u, v = np.concatenate(command, axis=1), np.concatenate(motion, axis=1)
    scale = np.where(v.std(0) > 0, u.std(0) / np.maximum(v.std(0), 1e-12), 0)  # each dim by the size of its command
    u, v = u - u.mean(0), (v - v.mean(0)) * scale
    search = min(round(LAG_SEARCH_S * spec.control_hz), len(u) // 2)

    def correlation(lag: float) -> float:
        k = round(lag)
        x, y = (u[: len(u) - k], v[k:]) if k >= 0 else (u[-k:], v[:k])
        norm = np.sqrt((x**2).sum() * (y**2).sum())
        return float((x * y).sum() / norm) if norm > 0 else 0.0

    values = [correlation(k) for k in range(-search, search + 1)]
    best = int(np.argmax(values))
    return (best - search, values[best], correlation) if values[best] >= LAG_CORRELATION else None


# ---- second pass: checks, each (spec, recording, usual) -> symptoms


def check_idle(spec: EmbodimentSpec, e: Recording, usual: Usual) -> Iterator[Symptom]:
    """Find spans in which neither the state nor what is commanded moves."""
    window = round(IDLE_S * spec.control_hz)
    if len(e.stamp) <= window:
        return
    still = (_within(e.state, window, np.ptp) < IDLE_STATE * usual.state_range).all(1)  # from each frame on
    for field, here, _ in slices(spec.action):
        a = e.action[:, here]
        if field.mode == "delta" or field.kind in ("joint_velocity", "base_velocity"):
            quiet = _within(np.abs(a), window, np.max) < IDLE_ACTION * usual.action_size[here]
        else:
            quiet = _within(a, window, np.ptp) < IDLE_STATE * usual.action_range[here]
        still &= quiet.all(1)
    bad = np.convolve(still, np.ones(window)).round().astype(bool)
    if bad.any():
        yield Symptom("IDLE", "state and action", bad, f"{_longest(bad) / spec.control_hz:.1f} s without motion")


def check_jerk(spec: EmbodimentSpec, e: Recording, usual: Usual) -> Iterator[Symptom]:
    """Find tremor (third differences as large as first ones) and single jumps in measured positions."""
    if spec.control_hz < SMOOTH_HZ or len(e.stamp) < 12:
        return
    for field, dim in dims(spec.state, "state"):
        if field.kind.startswith(("gripper", "base")):
            continue
        x, size = e.state[:, dim.index].astype(np.float64), usual.state_range[dim.index]
        step, third = np.diff(x), np.abs(np.diff(x, n=3))
        noise = np.median(third) / 0.6745 / np.sqrt(20)  # what white noise of that size would have
        jumps = (np.abs(step) > JUMP_SIZE * size) & (np.abs(step) > JUMP_RATIO * _around(step))
        if noise > TREMOR_SIZE * size and np.sqrt(20) * noise > TREMOR * np.sqrt((step**2).mean()):
            bad = _frames(third > np.sqrt(20) * TREMOR_SIZE * size, len(x), 2)
            yield Symptom("JERK", dim.name, bad, f"tremor of {noise:.2g} {field.unit}")
        elif jumps.any():
            frame = int(np.argmax(jumps))
            bad = _frames(jumps, len(x), 1)
            yield Symptom("JERK", dim.name, bad, f"jumps by {abs(step[frame]):.3g} {field.unit} within a frame")


def check_constant(spec: EmbodimentSpec, e: Recording, usual: Usual) -> Iterator[Symptom]:
    """Find dimensions that stand still in this episode though they move in most."""
    groups = (
        ("state", spec.state, e.state, usual.state_moves, usual.state_range),
        ("action", spec.action, e.action, usual.action_moves, usual.action_range),
    )
    for group, fields, values, moves, size in groups:
        for field, dim in dims(fields, group):
            i = dim.index
            usually = moves[i] >= size[i]  # the floor did not apply
            if field.kind.startswith("gripper") or not usually or len(values) < 12:
                continue
            if np.ptp(values[:, i]) < STUCK * moves[i]:
                what = f"stays at {values[0, i]:.4g} {field.unit}; it moves by {moves[i]:.2g} in most episodes"
                yield Symptom("CONSTANT", dim.name, np.ones(len(values), bool), what)


def check_lag(spec: EmbodimentSpec, e: Recording, usual: Usual) -> Iterator[Symptom]:
    """Find an episode whose motion follows its actions sooner or later than in the others."""
    found = lag_of(spec, e)
    if usual.lag is None or found is None:
        return
    lag, best, correlation = found
    far = max(LAG_DEVIATION_FRAMES, LAG_DEVIATION_S * spec.control_hz)
    if abs(lag - usual.lag) >= far and best - correlation(usual.lag) >= LAG_GAIN:
        what = f"motion {_follows(lag, spec)}, in most episodes {_follows(usual.lag, spec)}"
        yield Symptom("LAG", "action", np.ones(len(e.stamp), bool), what)


def check_stamps(spec: EmbodimentSpec, e: Recording, usual: Usual) -> Iterator[Symptom]:
    """Find irregular stamps and gaps."""
    step = np.diff(e.stamp)
    gaps = step > max(GAP_S, 2.5 / spec.control_hz)
    if gaps.any():
        what = f"{step.max():.2f} s between two frames at {spec.control_hz:g} Hz"
        yield Symptom("GAP", "stamp", _frames(gaps, len(e.stamp), 1), what)
    off = ~gaps & (np.abs(step * spec.control_hz - 1) > JITTER)
    if off.any():
        worst = 1e3 * np.abs(step[off] - 1 / spec.control_hz).max()
        what = f"frame times off by up to {worst:.1f} ms at {spec.control_hz:g} Hz"
        yield Symptom("JITTER", "stamp", _frames(off, len(e.stamp), 1), what)


def check_limits(spec: EmbodimentSpec, e: Recording, usual: Usual) -> Iterator[Symptom]:
    """Find values outside the embodiment's limits, and fields that another unit would put inside."""
    for group, fields, values in (("state", spec.state, e.state), ("action", spec.action, e.action)):
        for field, here, _ in slices(fields):
            x, low, high = values[:, here].astype(np.float64), np.array(field.low), np.array(field.high)
            outside = _outside(x, low, high, LIMIT_MARGIN)
            if not outside.any():
                continue
            factor = FACTORS.get(field.unit)
            if factor is not None and outside.any(1).mean() >= UNITS_SHARE:
                large = np.abs(x).max() >= UNITS_RATIO * np.maximum(np.abs(low), np.abs(high)).max()
                if large and not _outside(x * factor, low, high, UNITS_MARGIN).any():
                    what = f"up to {np.abs(x).max():.4g} in a field of [{field.unit}]: {WRONG_UNITS[field.unit]}?"
                    yield Symptom("UNITS", f"{group}.{field.name}", np.asarray(outside.any(1)), what)
                    continue
            for i in np.flatnonzero(outside.any(0)).tolist():
                worst = x[np.abs(x[:, i] - (low[i] + high[i]) / 2).argmax(), i]
                what = f"{worst:.4g}, limits {low[i]:g} .. {high[i]:g} {field.unit}"
                yield Symptom("VALUE", _name(group, field, i), outside[:, i], what)


def check_gripper(spec: EmbodimentSpec, e: Recording, usual: Usual) -> Iterator[Symptom]:
    """Find grippers that move against their command."""
    for field, a, s in _pairs(spec, ("gripper_position", "gripper_binary", "gripper_effort")):
        state = next(f for f, here, _ in slices(spec.state) if here == s)
        width, x = state.high[0] - state.low[0], e.state[:, s][:, 0].astype(np.float64)
        low, high = field.low[0], field.high[0]
        command = (e.action[:, a][:, 0].astype(np.float64) - low) / (high - low) * width + state.low[0]
        apart = np.abs(command - x) >= GRIPPER_APART * width
        if apart.mean() >= GRIPPER_APART:
            yield Symptom("POLARITY", f"action.{field.name}", apart, "stands at the other end than its command says")
        if np.ptp(x) < GRIPPER_TRAVEL * width:
            continue
        if field.mode == "delta" or field.kind == "gripper_effort":
            pull = command - (state.low[0] + width / 2)  # zero effort is the middle
        else:
            pull = command - x
        move = np.diff(x)
        decided = (np.abs(move) > GRIPPER_STEP * np.ptp(x)) & (np.abs(pull[:-1]) > GRIPPER_STEP * width)
        against = decided & (np.sign(move) != np.sign(pull[:-1]))
        # a command that is only late moves against for a moment, but mostly stands where the gripper stands
        opposite = np.sum((command - command.mean()) * (x - x.mean())) <= 0
        if opposite and decided.sum() >= GRIPPER_MOVES and 1 - against.sum() / decided.sum() <= GRIPPER_AGREE:
            what = f"moves against its command in {against.sum()} of {decided.sum()} moving frames"
            yield Symptom("POLARITY", f"action.{field.name}", _frames(against, len(x), 1), what)


def check_clip(spec: EmbodimentSpec, e: Recording, usual: Usual) -> Iterator[Symptom]:
    """Find episodes that lie far outside where the others are for much of their length.

    Outside q01..q99 of all values where these episodes are rare; up to one in twenty of them would widen that, hence
    the extremes of nineteen in twenty episodes as well.
    """
    for group, fields, values in (("state", spec.state, e.state), ("action", spec.action, e.action)):
        extremes = usual.state_extremes if group == "state" else usual.action_extremes
        for field, dim in dims(fields, group):
            if field.kind.startswith("gripper"):
                continue
            q01, q99 = _quantiles(usual.stats, group, field, dim.offset)
            low, high = max(q01, extremes[0, dim.index]), min(q99, extremes[1, dim.index])
            margin = CLIP_MARGIN * max(high - low, MIN_RANGE * (field.high[dim.offset] - field.low[dim.offset]))
            bad = (values[:, dim.index] < low - margin) | (values[:, dim.index] > high + margin)
            if bad.mean() >= CLIP_SHARE:
                yield Symptom("CLIP", dim.name, bad, f"far outside the store's {low:.3g} .. {high:.3g} {field.unit}")


CHECKS = (
    check_idle,
    check_jerk,
    check_constant,
    check_lag,
    check_stamps,
    check_limits,
    check_gripper,
    check_clip,
)


def scan_frames(blocks: Iterable[UInt8[np.ndarray, "k h w 3"]]) -> FrameFacts:
    """Look at the consecutive frames of one camera in one episode, a block at a time."""
    blank: list[np.ndarray] = []
    same: list[bool] = []
    last = None
    for block in blocks:
        flat = block.reshape(len(block), -1, 3)
        blank.append(flat[:, :: max(1, flat.shape[1] // 4096)].std(axis=1).max(1) < BLANK_STD)
        for frame in flat:
            same.append(last is not None and _equal(frame, last))
            last = frame
    return FrameFacts(np.concatenate(blank), np.array(same))


def check_frames(spec: EmbodimentSpec, e: Recording, usual: Usual, camera: str, facts: FrameFacts) -> Iterator[Symptom]:
    """Find blank frames, cameras that show nothing new, and pictures that stand still while the robot moves."""
    where, m = f"camera {camera}", len(e.stamp)
    moved = _moved(spec, e.state, usual)
    if facts.blank.mean() >= 0.9:
        yield Symptom("CAMERA", where, facts.blank, f"blank in {facts.blank.mean():.0%} of the frames")
        return
    if facts.blank.any():
        yield Symptom("BLANK", where, facts.blank, f"{facts.blank.sum()} blank frames")
    same = facts.same & ~facts.blank
    if m >= 12 and same[1:].all() and moved(0, m - 1) >= FROZEN_MOTION:
        yield Symptom("CAMERA", where, same, "the same picture from beginning to end")
        return
    frozen = np.zeros(m, bool)
    for start, stop in _runs(same):
        long = stop - start >= max(3, FROZEN_S * spec.control_hz)
        if long and moved(start - 1, stop - 1) >= FROZEN_MOTION:
            frozen[start:stop] = True
    if frozen.any():
        what = f"stands still for up to {_longest(frozen) / spec.control_hz:.2f} s while the robot moves"
        yield Symptom("FROZEN", where, frozen, what)
        return
    moving = np.array([False, *(moved(i, i + 1) >= REPEAT_MOTION for i in range(m - 1))])
    repeats = same & moving
    if moving.any() and repeats.sum() / moving.sum() >= REPEATS:
        what = f"{repeats.sum()} of {moving.sum()} moving frames repeat the one before"
        yield Symptom("FROZEN", where, repeats, what, never_severe=True)


def examine(spec: EmbodimentSpec, e: Recording, usual: Usual, frames: Mapping[str, FrameFacts]) -> list[Symptom]:
    """Run every check on one episode."""
    found = [s for check in CHECKS for s in check(spec, e, usual)]
    return found + [s for camera, facts in frames.items() for s in check_frames(spec, e, usual, camera, facts)]


def examine_store(spec: EmbodimentSpec, usual: Usual) -> Iterator[tuple[str, str, float, str]]:
    """Yield (fault, where, share, what) of a store as a whole: near-constant or heavy-tailed dimensions, lag."""
    for group, fields in (("state", spec.state), ("action", spec.action)):
        for field, dim in dims(fields, group):
            stats = usual.stats.fields[f"{group}/{field.name}"]
            i, (q01, q99) = dim.offset, _quantiles(usual.stats, group, field, dim.offset)
            spread, extent = q99 - q01, stats.max[i] - stats.min[i]
            if field.kind.startswith("gripper"):
                continue
            if extent < NO_SPREAD:
                yield "CONSTANT", dim.name, 1.0, f"is {stats.mean[i]:.4g} {field.unit} throughout; it maps to 0"
            elif spread < NEAR_CONSTANT * extent:
                what = f"98 % of its values lie within {spread:.2g} {field.unit}, all within {extent:.2g}"
                yield "CONSTANT", dim.name, 0.98, what
            elif extent > CLIP_TAIL * spread:
                what = f"reaches {stats.min[i]:.3g} .. {stats.max[i]:.3g}, q01..q99 is {q01:.3g} .. {q99:.3g}"
                yield "CLIP", dim.name, 0.02, f"{what} {field.unit}: q01_q99 cuts its tails"
    if usual.lag is not None and not -1 < usual.lag <= LAG_MAX_S * spec.control_hz:
        yield "LAG", "action", 1.0, f"motion {_follows(usual.lag, spec)} in most episodes"


# ---- whole stores


def diagnose(stores: Sequence[Store], progress: Callable[[str, int, int], None] | None = None) -> Diagnosis:
    """Examine stores one after the other, and look for episodes that are in two places.

    Args:
        stores: of a duplicate the first one is kept: name a held-out store first.
        progress: told (what, done, total) in episodes.

    Raises:
        StoreError: a part of a store is missing or damaged, with file, episode and frame.
    """
    findings: list[Finding] = []
    summaries: list[StoreSummary] = []
    seen: dict[str, tuple[Store, int]] = {}
    for store in stores:
        tell = _teller(progress, store)
        usual = learn_usual(store.spec, (e for _, _, e in tell("learning", _recordings(store))))
        whole = examine_store(store.spec, usual)
        findings += [_finding(store, None, *one, severe=False) for one in whole]
        outside = Outside(store.spec, usual)
        for part, number, e in tell("examining", _recordings(store)):
            outside.add(e)
            local = number - part.first
            frames = {c.name: scan_frames(_blocks(part.store, local, c.name)) for c in store.spec.cameras}
            findings += [_judge(store, number, s) for s in examine(store.spec, e, usual, frames)]
            findings += _twins(store, number, e, seen)
        lag_s = None if usual.lag is None else usual.lag / store.spec.control_hz
        frames_in_all = sum(store.length(i) for i in range(len(store.episodes)))
        summaries.append(
            StoreSummary(
                str(store.path), store.spec.name, len(store.episodes), frames_in_all, store.spec.control_hz, lag_s,
                outside.rates(),
            )
        )  # fmt: skip
    counts = dict(sorted(Counter(f.code for f in findings).items()))
    left_out = sum(map(len, leave_out(findings).values()))
    return Diagnosis(VERSION, tuple(summaries), counts, left_out, tuple(findings))


def leave_out(findings: Iterable[Finding]) -> dict[str, dict[str, list[str]]]:
    """Return store -> source -> codes of the episodes with errors: what the filter holds."""
    out: dict[str, dict[str, list[str]]] = {}
    for f in findings:
        if f.severity == "error" and f.source is not None:
            codes = out.setdefault(f.store, {}).setdefault(f.source, [])
            codes += [f.code] if f.code not in codes else []
    return out


def doctor_command(paths: Sequence[str], out: str, as_json: bool) -> None:
    """Run `dita inspect --doctor`: write doctor.json, doctor.html and filter.json into `out`.

    Raises:
        FileNotFoundError: a store is not there.
        ValueError: it is none or damaged, or one is named twice.
    """
    from dita.datasets.doctor_page import write_doctor_page  # matplotlib

    if len({Path(p).resolve() for p in paths}) < len(paths):
        raise ValueError(f"a store is named twice: {', '.join(paths)}; name each once")
    stores = [Store(p) for p in paths]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        diagnosis = diagnose(stores, tell)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "doctor.json").write_text(canonical_json(dataclasses.asdict(diagnosis)) + "\n")
    write_filter(
        folder / "filter.json", {str(s.path): leave_out(diagnosis.findings).get(str(s.path), {}) for s in stores}
    )
    write_doctor_page(folder / "doctor.html", diagnosis, stores)
    if as_json:
        print(json.dumps(dataclasses.asdict(diagnosis), indent=2))
    else:
        print_diagnosis(diagnosis, folder)


def read_diagnosis(path: Path) -> Diagnosis:
    """Read a doctor.json.

    Raises:
        ValueError: it is not one, or of another version; the file and the key are named.
    """
    from dita.checkpoint import read_json

    diagnosis = from_dict(Diagnosis, read_json(path), str(path))
    if diagnosis.version != VERSION:
        raise ValueError(f"{path} has version {diagnosis.version}, this dita reads {VERSION}")
    return diagnosis


def print_diagnosis(diagnosis: Diagnosis, folder: Path, console: Console | None = None) -> None:
    """Print a line per code, for people."""
    console = console or Console()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold underline")
    for column in ("code", "findings", "first", "what", "what to do"):
        table.add_column(column)
    for code, count in diagnosis.counts.items():
        f = next(f for f in diagnosis.findings if f.code == code)
        place = "whole store" if f.episode is None else f"episode {f.episode}, frame {f.first_frame}"
        table.add_row(code, str(count), f"{place}: {f.where}", f.what, f.advice)
    episodes = sum(s.episodes for s in diagnosis.stores)
    console.print(table if diagnosis.counts else "no findings")
    console.print(
        f"{diagnosis.left_out} of {episodes} episodes are left out by {folder / 'filter.json'}", highlight=False
    )
    console.print(f"findings with plots and frames: {folder / 'doctor.html'}", highlight=False)


class Outside:
    """Counts values outside q01..q99, by field."""

    def __init__(self, spec: EmbodimentSpec, usual: Usual) -> None:
        self._spec, self._stats = spec, usual.stats.fields
        self._counts: Counter[str] = Counter()
        self._values: Counter[str] = Counter()

    def add(self, e: Recording) -> None:
        """Count one episode."""
        for group, fields, values in (("state", self._spec.state, e.state), ("action", self._spec.action, e.action)):
            for field, here, _ in slices(fields):
                stats, x = self._stats[f"{group}/{field.name}"], values[:, here].astype(np.float64)
                outside = (x < np.array(stats.q01)) | (x > np.array(stats.q99))
                self._counts[f"{group}.{field.name}"] += int(outside.sum())
                self._values[f"{group}.{field.name}"] += x.size

    def rates(self) -> dict[str, float]:
        """Return the share of values outside, by field."""
        return {name: self._counts[name] / n for name, n in self._values.items()}


@dataclass(frozen=True)
class _Part:
    """One segment of a store, opened alone so that its arrays are freed after it."""

    store: Store
    first: int  # number of its first episode in the whole store


@dataclass(frozen=True)
class Dim:
    """One dimension of a field."""

    name: str
    index: int  # in the concatenated vector
    offset: int  # in the field


def _recordings(store: Store) -> Iterator[tuple[_Part, int, Recording]]:
    first = 0
    for segment in store.segments:
        part = _Part(Store(store.path, [segment]), first)
        for i in range(len(part.store.episodes)):
            yield part, first + i, Recording(part.store.state(i), part.store.action(i), part.store.stamp(i))
        first += len(part.store.episodes)


def _blocks(store: Store, episode: int, camera: str) -> Iterator[np.ndarray]:
    length = store.length(episode)
    for start in range(0, length, BLOCK):
        yield store.read_frames(episode, camera, range(start, min(start + BLOCK, length)))


def _teller(progress: Callable[[str, int, int], None] | None, store: Store) -> Callable[[str, Iterable], Iterator]:
    def tell(what: str, items: Iterable) -> Iterator:
        for done, item in enumerate(items, 1):
            yield item
            if progress is not None:
                progress(f"{what} {store.name}", done, len(store.episodes))

    return tell


def _judge(store: Store, number: int, s: Symptom) -> Finding:
    severe = s.bad.mean() >= FAULTS[s.fault].error_share and not s.never_severe
    return _finding(store, number, s.fault, s.where, float(s.bad.mean()), s.what, severe, int(np.argmax(s.bad)))


def _finding(
    store: Store, number: int | None, fault: str, where: str, share: float, what: str, severe: bool,
    first: int | None = None,
) -> Finding:  # fmt: skip
    code, severity = (f"E_{fault}", "error") if severe else (f"W_{fault}", "warning")
    source = None if number is None else store.episodes[number].source
    advice = FAULTS[fault].advice
    return Finding(code, severity, str(store.path), number, source, where, first, round(share, 6), what, advice)


def _twins(store: Store, number: int, e: Recording, seen: dict[str, tuple[Store, int]]) -> Iterator[Finding]:
    """Find the episode among those seen before, by content and by motion alone: images may be encoded anew."""
    spec: EpisodeSpec = store.episodes[number]
    keys = {f"content {spec.content_hash}": "same content"}
    if len(e.stamp) >= 12 and np.ptp(e.state, axis=0).any():
        keys[f"motion {_digest(e)}"] = "same states and actions, other images or words"
    known = next(((seen[key], what) for key, what in keys.items() if key in seen), None)
    if known is None:
        seen.update(dict.fromkeys(keys, (store, number)))
        return
    (other, twin), what = known
    what = f"{what} as episode {twin} ({other.episodes[twin].source}) of {other.path}"
    yield _finding(store, number, "DUP", "episode", 1.0, what, True, 0)


def _digest(e: Recording) -> str:
    arrays = (np.ascontiguousarray(a, "<f4") for a in (e.state, e.action))
    return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()


# ---- small pieces


def dims(fields: tuple[FieldSpec, ...], group: str) -> Iterator[tuple[FieldSpec, Dim]]:
    """Yield (field, dimension) of every dimension of a state or an action."""
    for field, here, _ in slices(fields):
        for i in range(field.size):
            yield field, Dim(_name(group, field, i), here.start + i, i)


def _name(group: str, field: FieldSpec, i: int) -> str:
    return f"{group}.{field.name}" + (f"[{i}]" if field.size > 1 else "")


def _pairs(spec: EmbodimentSpec, kinds: tuple[str, ...]) -> list[tuple[FieldSpec, slice, slice]]:
    """Return (action field, its slice, slice of the state field that measures it): same kind, in order."""
    measured = {"gripper_binary": "gripper_position", "gripper_effort": "gripper_position",
                "joint_velocity": "joint_position"}  # fmt: skip
    free = list(slices(spec.state))
    pairs = []
    for field, a, _ in slices(spec.action):
        kind = measured.get(field.kind, field.kind)
        match = next((f for f in free if f[0].kind == kind and f[0].size == field.size), None)
        if field.kind in kinds and match is not None:
            free.remove(match)
            pairs.append((field, a, match[1]))
    return pairs


def _width(fields: tuple[FieldSpec, ...]) -> Float64[np.ndarray, "d"]:
    return np.concatenate([np.array(f.high) - np.array(f.low) for f in fields]) if fields else np.zeros(0)


def _most(extremes: Sequence[np.ndarray]) -> Float64[np.ndarray, "2 d"]:
    low, high = np.swapaxes(np.stack(extremes), 0, 1)  # [n d] each
    return np.stack([np.quantile(low, CLIP_RARE, axis=0), np.quantile(high, 1 - CLIP_RARE, axis=0)])


def _quantiles(stats: NormStats, group: str, field: FieldSpec, i: int) -> tuple[float, float]:
    found = stats.fields[f"{group}/{field.name}"]
    return found.q01[i], found.q99[i]


def _within(x: np.ndarray, window: int, measure: Callable[..., np.ndarray]) -> np.ndarray:
    """Measure the `window` rows from each row on; [m - window + 1, d]."""
    return measure(np.lib.stride_tricks.sliding_window_view(x, window, axis=0), axis=-1)


def _moved(spec: EmbodimentSpec, state: np.ndarray, usual: Usual) -> Callable[[int, int], float]:
    """Return how far the arm moves within frames i..j, as a share of the range; grippers may be out of sight."""
    arm = [dim.index for f, dim in dims(spec.state, "state") if not f.kind.startswith("gripper")]
    scaled = state[:, arm] / usual.state_range[arm]
    return lambda i, j: float(np.ptp(scaled[i : j + 1], axis=0).max(initial=0))


def _around(step: np.ndarray) -> np.ndarray:
    """Return the size of the largest of the five steps before and after each.

    The two next to it count only where they go the same way: a glitch goes out and straight back.
    """
    padded = np.pad(step, 5)
    others = np.stack([padded[5 + o : 5 + o + len(step)] for o in range(-5, 6) if o])
    others[4:6] *= np.sign(others[4:6]) == np.sign(step)
    return np.abs(others).max(0)


def _frames(bad: np.ndarray, m: int, shift: int) -> np.ndarray:
    """Turn a mask over differences into one over frames."""
    out = np.zeros(m, bool)
    out[shift : shift + len(bad)] = bad
    return out


def _outside(x: np.ndarray, low: np.ndarray, high: np.ndarray, margin: float) -> np.ndarray:
    extra = margin * (high - low)
    return (x < low - extra) | (x > high + extra)


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[False], mask, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _longest(mask: np.ndarray) -> int:
    return max((stop - start for start, stop in _runs(mask)), default=0)


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    some = slice(None, None, max(1, len(a) // 512))  # most frames differ in these already
    return all(bool((np.maximum(a[k], b[k]) - np.minimum(a[k], b[k])).max() <= SAME_PIXEL) for k in (some, slice(None)))


def _follows(lag: float, spec: EmbodimentSpec) -> str:
    seconds = lag / spec.control_hz
    side = "follows its action" if lag >= 0 else "comes before its action"
    return f"{side} by {abs(lag):g} frames ({abs(seconds):.2f} s)"
