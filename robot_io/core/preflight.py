"""Checks before the first motion: pure functions of what was read, heard and recorded; NumPy only.

Every check returns items with a verdict. A mistake that a check recognises is called by its name, from MISTAKES.
Shape legend: n messages, k training frames, h w image size, s state dims, j joints.
"""

from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

OK, FAILED, WARNED, SKIPPED = "ok", "failed", "warned", "skipped"

JOINT_ORDER, DEGREES, MILLIMETRES, BGR = "joint order", "degrees", "millimetres", "BGR"
SWAPPED_CAMERAS, TURNED_CAMERA = "swapped cameras", "turned camera"
WRONG_RATE, STALE, FUTURE, BACKWARDS = "wrong rate", "stale stamps", "future stamps", "stamps going back"
UNSYNCHRONISED, FROZEN = "topics out of step", "frozen content"
GRIPPER, STATISTICS, EMBODIMENT = "inverted gripper", "wrong statistics", "other embodiment"
JOINT_NAMES, IMAGE_FORMAT, LIMITS = "joint names", "image format", "missing limits"
NO_TOPIC, QOS, WRITER, PATH = "missing topic", "QoS or type mismatch", "second writer", "live path differs"
MISTAKES = (
    *(JOINT_ORDER, DEGREES, MILLIMETRES, BGR, SWAPPED_CAMERAS, TURNED_CAMERA, WRONG_RATE, STALE, FUTURE, BACKWARDS),
    *(UNSYNCHRONISED, FROZEN, GRIPPER, STATISTICS, EMBODIMENT, JOINT_NAMES, IMAGE_FORMAT, LIMITS, NO_TOPIC, QOS),
    *(WRITER, PATH),
)

NOT_COMPARED = ("limits", "driver", "robot")  # keys of an embodiment that are the robot's own
FEWEST = 5  # messages, to say anything about a rate
HISTORY_SLACK = 0.25  # of obs_dt: how far a frame of a history may be from its time (PolicyLoop.history)
STATE_SLACK = 1.25  # a state's period may be this many control periods
POOL = 12  # a picture is compared as POOL x POOL mean colours
GREY = 3.0  # [0..255] a smaller difference of pictures says nothing
MOVED = 0.01  # [rad, m or share] a state that changed by this much has moved
GRIPPER_MOVED = 0.05  # [share of the opening]
SUSPICIOUS = 0.5  # ranges of the data between a live state and the nearest training state
UNITS = {"joint_position": (180 / np.pi, DEGREES), "ee_position": (1000.0, MILLIMETRES)}


@dataclass(frozen=True)
class Item:
    """One line of the checklist."""

    name: str
    verdict: str  # ok, failed, warned, skipped
    text: str  # what was found, what was expected, what to do
    mistake: str = ""  # of MISTAKES, where one was recognised


@dataclass
class Report:
    """All items and what follows from them."""

    embodiment: str
    contract: str  # hash
    items: List[Item] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Return whether something was checked and nothing failed."""
        return bool(self.items) and all(item.verdict != FAILED for item in self.items)

    @property
    def mistakes(self) -> List[str]:
        """Return the names of the mistakes that failed an item, each once."""
        return list(dict.fromkeys(i.mistake for i in self.items if i.verdict == FAILED and i.mistake))

    def to_dict(self) -> Dict[str, Any]:
        """Return plain values, as /dita/preflight carries them."""
        return {
            "passed": self.passed,
            "embodiment": self.embodiment,
            "contract": self.contract,
            "mistakes": self.mistakes,
            "items": [vars(item) for item in self.items],
        }


@dataclass
class Heard:
    """What one topic gave while it was listened to."""

    topic: str
    requested: str  # type and QoS that were asked for, for people
    offers: Sequence[Tuple[str, str, bool]] = ()  # per writer: node, type and QoS for people, whether it fits
    stamps: List[float] = field(default_factory=list)  # [s], of the sources
    arrivals: List[float] = field(default_factory=list)  # [s], this host's clock
    values: List[Any] = field(default_factory=list)  # images [h w 3], positions [3], or {joint: position}
    problems: Counter = field(default_factory=Counter)  # why a message could not be read -> how often

    def take(self, stamp: float, arrival: float, value: Any) -> None:
        """Add one message."""
        self.stamps.append(stamp)
        self.arrivals.append(arrival)
        self.values.append(value)


# ---- what is written: contract against the robot's own file


def embodiment_items(contract: Mapping[str, Any], robot: Mapping[str, Any]) -> List[Item]:
    """Compare the checkpoint's embodiment with the robot's own file, field by field.

    Args:
        contract: `contract.json` of a checkpoint.
        robot: the robot's own embodiment file, plain values.
    """
    known = sorted(contract["embodiments"])
    if robot["name"] not in known:
        text = f"the checkpoint knows {', '.join(known) or 'none'}, this robot is {robot['name']}: load its checkpoint"
        return [Item("embodiment", FAILED, text, EMBODIMENT)]
    spec = contract["embodiments"][robot["name"]]["spec"]
    items = []
    for path, theirs, ours in differences(spec, robot):
        group, _, key = path.rpartition(".")
        gripper = key == "scale" and _kind(spec, group).startswith("gripper_") and theirs * ours < 0
        text = f"{path}: the checkpoint has {theirs!r}, this robot's file {ours!r}"
        items.append(Item(f"embodiment {path}", FAILED, text, GRIPPER if gripper else EMBODIMENT))
    text = f"{robot['name']}: dims, names, units, frames, references, polarity, cameras and rates agree"
    return items or [Item("embodiment", OK, text)]


def differences(checkpoint: Mapping[str, Any], robot: Mapping[str, Any]) -> List[Tuple[str, Any, Any]]:
    """Return (path, checkpoint's value, robot's value) of all that differs; fields and cameras by their names."""
    return [
        found
        for key in sorted(set(checkpoint) | set(robot))
        if key not in NOT_COMPARED
        for found in _differences(key, checkpoint.get(key), robot.get(key))
    ]


def _differences(path: str, a: Any, b: Any) -> List[Tuple[str, Any, Any]]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return [d for k in sorted(set(a) | set(b)) for d in _differences(f"{path}.{k}", a.get(k), b.get(k))]
    named = [x for x in (a, b) if isinstance(x, list) and all(isinstance(v, Mapping) and "name" in v for v in x)]
    if len(named) == 2:
        names = [[v["name"] for v in x] for x in named]
        if names[0] != names[1]:
            return [(f"{path} names", names[0], names[1])]
        return [d for x, y in zip(a, b, strict=True) for d in _differences(f"{path}.{x['name']}", x, y)]
    same = a == b or (isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and list(a) == list(b))
    return [] if same else [(path, a, b)]


def _kind(spec: Mapping[str, Any], group: str) -> str:
    """Return the kind of `action.<name>`, "" for what is no field."""
    part, _, name = group.partition(".")
    return next((f["kind"] for f in spec.get(part, ()) if isinstance(f, Mapping) and f.get("name") == name), "")


def announced_item(ours: str, announced: Optional[Mapping[str, Any]], topic: str) -> Item:
    """Compare the checkpoint's hash, statistics included, with the one that the running policy works by."""
    name = "contract hash"
    if announced is None:
        return Item(name, SKIPPED, f"nobody announces a contract on {topic}: start the policy before")
    theirs = str(announced.get("hash"))
    if theirs == ours:
        return Item(name, OK, f"the running policy works by the same contract and statistics, {ours[:12]}")
    text = (
        f"the running policy works by {theirs[:12]}, this checkpoint has {ours[:12]}: statistics or checkpoint differ"
    )
    return Item(name, FAILED, text, STATISTICS)


def statistics_items(spec: Mapping[str, Any], stats: Mapping[str, Any]) -> List[Item]:
    """Check that every field has statistics of its size that make sense and lie inside the field's limits."""
    items = []
    for group in ("state", "action"):
        for f in spec[group]:
            key = f"{group}/{f['name']}"
            items += _field_statistics(key, f, stats["fields"].get(key))
    return items or [Item("statistics", OK, f"{len(stats['fields'])} fields, each complete and inside its limits")]


def _field_statistics(key: str, f: Mapping[str, Any], stats: Optional[Mapping[str, Any]]) -> List[Item]:
    name = f"statistics {key}"
    if stats is None:
        return [Item(name, FAILED, f"the checkpoint has no statistics for {key}", STATISTICS)]
    values = {n: np.array(stats[n], float) for n in ("mean", "std", "min", "max", "q01", "q99")}
    if any(v.shape != (f["size"],) or not np.all(np.isfinite(v)) for v in values.values()):
        return [Item(name, FAILED, f"{key} needs {f['size']} finite values of each statistic", STATISTICS)]
    low, q01, q99, high = (values[n] for n in ("min", "q01", "q99", "max"))
    slack = 1e-6 + 1e-6 * np.abs(values["mean"])
    ordered = np.all(low <= q01 + slack) and np.all(q01 <= q99) and np.all(q99 <= high + slack)
    inside = np.all(values["mean"] >= low - slack) and np.all(values["mean"] <= high + slack)
    if not (ordered and inside and np.all(values["std"] <= (high - low) + slack)):
        return [Item(name, FAILED, f"{key}: min, q01, mean, q99, max are not in order: edited?", STATISTICS)]
    margin = 0.25 * (np.array(f["high"]) - np.array(f["low"]))
    out = (q01 < np.array(f["low"]) - margin) | (q99 > np.array(f["high"]) + margin)
    if not np.any(out):
        return []
    factor, mistake = UNITS.get(f["kind"], (0.0, ""))
    d = int(np.argmax(out))
    text = f"{key}[{d}]: data q01..q99 is {q01[d]:.4g}..{q99[d]:.4g}, the field's limits {f['low'][d]}..{f['high'][d]}"
    if factor and np.max(np.abs([q01, q99])) > 4 * np.max(np.abs([f["low"], f["high"]])):
        return [Item(name, FAILED, f"{text}: recorded in {mistake}?", mistake)]
    return [Item(name, WARNED, text)]


def fitted_items(
    spec: Mapping[str, Any], stats: Mapping[str, Any], state: np.ndarray, action: np.ndarray
) -> List[Item]:
    """Compare the checkpoint's statistics with training data themselves: another file, or scaled ones.

    Args:
        state: [k s] rows of training data, spread over episodes; at least 64 of them to judge the spread.
        action: [k a] of the same.
    """
    items: List[Item] = []
    for group, rows in (("state", state), ("action", action)):
        start = 0
        for f in spec[group]:
            values = rows[:, start : start + f["size"]]
            start += f["size"]
            items += _fitted_field(f"{group}/{f['name']}", f, stats["fields"].get(f"{group}/{f['name']}"), values)
    return items or [Item("statistics fit the data", OK, f"{len(state)} training frames lie where they say")]


def _fitted_field(key: str, f: Mapping[str, Any], stats: Optional[Mapping[str, Any]], rows: np.ndarray) -> List[Item]:
    if stats is None or not len(rows):
        return []
    low, high = np.array(stats["min"], float), np.array(stats["max"], float)
    floor = 1e-3 * (np.array(f["high"]) - np.array(f["low"]))
    margin = 0.05 * (high - low) + floor
    outside = np.mean((rows < low - margin) | (rows > high + margin), axis=0)
    d = int(np.argmax(outside))
    if outside[d] > 0.05:
        seen = f"{rows[:, d].min():.4g}..{rows[:, d].max():.4g}"
        text = f"{key}[{d}]: training data are {seen}, the checkpoint's statistics say {low[d]:.4g}..{high[d]:.4g}"
        return [Item(f"statistics fit {key}", FAILED, text, STATISTICS)]
    mine, theirs = np.std(rows, axis=0), np.array(stats["std"], float)
    off = (mine < 0.4 * theirs) & (theirs > floor) | (mine > 2.5 * theirs) & (mine > floor)
    if len(rows) >= 64 and np.any(off):
        d = int(np.argmax(off))
        text = f"{key}[{d}]: training data spread by {mine[d]:.3g}, the checkpoint's statistics say {theirs[d]:.3g}"
        return [Item(f"statistics fit {key}", FAILED, text, STATISTICS)]
    return []


# ---- what is heard


def topic_items(heard: Heard) -> List[Item]:
    """Check that somebody offers the topic as asked for, and that its messages can be read."""
    name, topic = f"topic {heard.topic}", heard.topic
    there = "; ".join(f"{node} offers {what}" for node, what, _ in heard.offers)
    if not heard.offers:
        return [Item(name, FAILED, f"nobody publishes {topic} ({heard.requested}): start the driver, remap", NO_TOPIC)]
    if not any(fits for _, _, fits in heard.offers):
        text = f"{topic}: preflight requests {heard.requested}, but {there}. Nothing flows between them"
        return [Item(name, FAILED, text, QOS)]
    if heard.problems:
        reason, count = heard.problems.most_common(1)[0]
        mistake = JOINT_NAMES if "joint state" in reason else IMAGE_FORMAT
        return [Item(name, FAILED, f"{topic}: {count} messages cannot be read: {reason}", mistake)]
    if not heard.stamps:
        return [Item(name, FAILED, f"{topic}: {there}, but nothing arrived", NO_TOPIC)]
    if len(heard.offers) > 1:
        nodes = ", ".join(node for node, _, _ in heard.offers)
        return [Item(name, FAILED, f"{topic} has several publishers: {nodes}; end all but one", WRITER)]
    return [Item(name, OK, f"{there}: {len(heard.stamps)} messages")]


def stamp_items(heard: Heard, max_age: float, max_skew: float) -> List[Item]:
    """Check that stamps are fresh, not from the future, and rise.

    Args:
        max_age: largest median age at arrival [s].
        max_skew: how far stamps may lie ahead of this host's clock [s].
    """
    if len(heard.stamps) < FEWEST:
        return []
    topic, steps = heard.topic, np.diff(heard.stamps)
    node = heard.offers[0][0] if heard.offers else "its source"
    items = []
    ages = np.array(heard.arrivals) - np.array(heard.stamps)
    age = float(np.median(ages))
    host = f"{topic}: stamps of {node} are {abs(age):.3f} s"
    if age > max_age:
        text = f"{host} behind this host's clock on arrival (at most {max_age:g}): old data, or clocks that differ"
        items.append(Item(f"age {topic}", FAILED, text, STALE))
    elif age < -max_skew:
        text = f"{host} ahead of this host's clock (at most {max_skew:g}): synchronise the clocks of both hosts"
        items.append(Item(f"age {topic}", FAILED, text, FUTURE))
    else:
        verdict = WARNED if age > 0.5 * max_age else OK
        items.append(Item(f"age {topic}", verdict, f"{1e3 * age:.0f} ms old on arrival, at most {1e3 * max_age:.0f}"))
    repeats, back = int(np.sum(steps == 0)), int(np.sum(steps < 0))
    if back:
        text = f"{topic}: {back} of {len(steps)} stamps go back, by up to {-steps.min():.3f} s: two sources, or a reset"
        items.append(Item(f"order {topic}", FAILED, text, BACKWARDS))
    elif repeats > 0.1 * len(steps):
        text = f"{topic}: {repeats} of {len(steps)} stamps repeat: {node} sends old messages again"
        items.append(Item(f"order {topic}", FAILED, text, STALE))
    else:
        items.append(Item(f"order {topic}", OK, "stamps rise"))
    return items


def period_of(heard: Heard) -> float:
    """Return the median time between messages [s]: of their stamps, or of their arrivals where stamps stand still."""
    steps = np.diff(heard.stamps)
    rising = steps[steps > 0]
    return float(np.median(rising if len(rising) >= FEWEST - 1 else np.diff(heard.arrivals)))


def camera_rate_item(heard: Heard, obs_dt: float) -> Item:
    """Check that a camera has a frame wherever a history of frames obs_dt apart wants one."""
    name, topic = f"rate {heard.topic}", heard.topic
    if len(heard.stamps) < FEWEST:
        return Item(name, FAILED, f"{topic}: {len(heard.stamps)} messages are too few for a rate", WRONG_RATE)
    period = period_of(heard)
    per = max(1, round(obs_dt / period))
    text = f"{topic}: a frame every {1e3 * period:.1f} ms, the policy was trained on one every {1e3 * obs_dt:.1f} ms"
    if abs(per * period - obs_dt) > HISTORY_SLACK * obs_dt * (0.5 if per == 1 else 1.0):
        return Item(name, FAILED, f"{text}: set the camera to {1 / obs_dt:g} Hz or a multiple", WRONG_RATE)
    return Item(name, OK, text)


def state_rate_item(heard: Heard, control_hz: float) -> Item:
    """Check that measured state comes at least as often as the robot is controlled; more often is fine."""
    name, topic = f"rate {heard.topic}", heard.topic
    if len(heard.stamps) < FEWEST:
        return Item(name, FAILED, f"{topic}: {len(heard.stamps)} messages are too few for a rate", WRONG_RATE)
    period = period_of(heard)
    text = f"{topic}: {1 / period:.1f} Hz, the embodiment says {control_hz:g} Hz"
    if period > STATE_SLACK / control_hz:
        return Item(name, FAILED, f"{text}: raise the driver's rate", WRONG_RATE)
    return Item(name, OK, text)


def spread_item(cameras: Sequence[Heard], states: Sequence[Heard], slop: float) -> Item:
    """Check that every camera's frames find a sample of every other topic within `slop` [s]."""
    first, name = cameras[0], "spread"
    worst, which = 0.0, ""
    for other in (*cameras[1:], *states):
        if len(other.stamps) < FEWEST or len(first.stamps) < FEWEST:
            return Item(name, SKIPPED, f"too few messages on {first.topic} or {other.topic}")
        stamps = np.array(other.stamps)
        inner = first.stamps[1:-1]  # at the edges one topic may simply have been heard earlier
        nearest = float(np.median([np.min(np.abs(stamps - t)) for t in inner]))
        if nearest > worst:
            worst, which = nearest, other.topic
    text = f"the nearest stamps of {first.topic} and {which or 'nothing else'} differ by {1e3 * worst:.0f} ms"
    if worst > slop:
        return Item(
            name, FAILED, f"{text}, at most {1e3 * slop:.0f}: one of the two clocks or drivers lags", UNSYNCHRONISED
        )
    return Item(name, OK, text)


def joint_name_items(
    heard: Heard, expected: Sequence[str], known: Sequence[str] = (), strict: bool = True
) -> List[Item]:
    """Compare the names in the joint states with those that the robot's file gives.

    Args:
        expected: names that must be there.
        known: further names that may be there.
        strict: whether other names are refused, as the guard of a joint-commanded arm does, or only told.
    """
    if not heard.values:
        return []
    name, topic = f"names {heard.topic}", heard.topic
    sets = {tuple(sorted(value)) for value in heard.values}
    if len(sets) > 1:
        shown = " then ".join(str(list(s)) for s in sorted(sets))
        return [Item(name, FAILED, f"{topic}: the names change while listening: {shown}", JOINT_NAMES)]
    there = list(heard.values[0])
    missing, extra = [n for n in expected if n not in there], [n for n in there if n not in (*expected, *known)]
    both = f"{topic} has {', '.join(there)}; the embodiment needs {', '.join(expected)}"
    if missing:
        return [Item(name, FAILED, f"{both}: missing {', '.join(missing)}", JOINT_NAMES)]
    if extra and strict:
        return [Item(name, FAILED, f"{both}: the guard refuses others: {', '.join(extra)}", JOINT_NAMES)]
    if extra:
        return [Item(name, WARNED, f"{both}: {', '.join(extra)} is not used")]
    return [Item(name, OK, f"{len(there)} joints, matched by name")]


def image_format_items(heard: Heard, height: int, width: int) -> List[Item]:
    """Check the size of a camera's images."""
    sizes = Counter(tuple(value.shape[:2]) for value in heard.values)
    if not sizes:
        return []
    name, topic = f"size {heard.topic}", heard.topic
    wrong = [f"{h} x {w}" for h, w in sizes if (h, w) != (height, width)]
    if wrong:
        text = f"{topic}: images of {', '.join(wrong)}, the embodiment says {height} x {width}: set the driver"
        return [Item(name, FAILED, text, IMAGE_FORMAT)]
    return [Item(name, OK, f"{height} x {width}")]


def frozen_items(heard: Heard, state: np.ndarray) -> List[Item]:
    """Check that pictures change while the arm moves; where nothing moves, nothing can be said.

    Args:
        state: [n s], as it was heard over the same time.
    """
    name = f"content {heard.topic}"
    if len(heard.values) < FEWEST:
        return []
    same = sum(np.array_equal(a, b) for a, b in pairwise(heard.values))
    moved = len(state) and float(np.max(np.ptp(state, axis=0), initial=0.0)) > MOVED
    if same < len(heard.values) - 1:
        return [Item(name, OK, "pictures change")]
    if moved:
        text = (
            f"{heard.topic}: {len(heard.values)} pictures in a row are the same while the arm moves: restart the camera"
        )
        return [Item(name, FAILED, text, FROZEN)]
    return [Item(name, SKIPPED, "the pictures do not change, and nothing moves: move the arm by hand to tell")]


def instruction_item(heard: Optional[str], trained: Sequence[str]) -> Item:
    """Compare the instruction with those of the training data; `trained` is empty where they are not known."""
    name = "instruction"
    if not heard:
        return Item(name, WARNED, "no instruction is given yet: the policy will wait for one")
    if trained and heard not in trained:
        return Item(name, WARNED, f"{heard!r} is not among the training instructions seen: {', '.join(trained[:5])}")
    return Item(name, OK, repr(heard))


def writer_item(topic: str, others: Sequence[str]) -> Item:
    """Check that nobody but the guard writes commands."""
    if others:
        text = f"{topic}: {', '.join(others)} writes commands beside the guard; end it"
        return Item(f"writers {topic}", FAILED, text, WRITER)
    return Item(f"writers {topic}", OK, "nobody writes commands but the guard")


# ---- what the values say


def state_items(
    spec: Mapping[str, Any], stats: Mapping[str, Any], live: np.ndarray, sample: Optional[np.ndarray]
) -> List[Item]:
    """Compare a live state with the robot's limits and with training data: units, order of joints, statistics.

    Args:
        spec: the embodiment, plain values.
        stats: its statistics, plain values.
        live: [n s] as heard, SI as it should be.
        sample: [k s] training states, starts of episodes among them; None: only the statistics are known.
    """
    items: List[Item] = []
    start = 0
    for f in spec["state"]:
        part = slice(start, start + f["size"])
        start += f["size"]
        values = np.median(live[:, part], axis=0)
        field_stats = stats["fields"][f"state/{f['name']}"]
        known = None if sample is None else sample[:, part]
        items.append(_state_item(f, field_stats, values, known))
    return items


def _state_item(f: Mapping[str, Any], stats: Mapping[str, Any], x: np.ndarray, sample: Optional[np.ndarray]) -> Item:
    name = f"state {f['name']}"
    if not np.all(np.isfinite(x)):
        return Item(name, FAILED, f"{f['name']} is not finite: {x.tolist()}", STATISTICS)
    low, high = np.array(f["low"], float), np.array(f["high"], float)
    margin = 0.02 * (high - low)
    q01, q99 = np.array(stats["q01"], float), np.array(stats["q99"], float)
    spread = np.maximum(q99 - q01, 0.02 * (high - low))
    if sample is None:
        sample = np.stack([q01, (q01 + q99) / 2, q99])  # stand-ins where only quantiles are known
    seen = f"{f['name']} is {np.round(x, 3).tolist()}"
    off = _distance(x, sample, spread)
    out = bool(np.any((x < low - margin) | (x > high + margin)))
    if out or off > SUSPICIOUS:
        found = _explanations(f, x, sample, spread, (low - margin, high + margin))
        better, mistake, why = min(found, default=(np.inf, "", ""))
        if better < 0.4 * off and mistake == GRIPPER:
            return Item(name, WARNED, f"{seen}, training had {_range(q01, q99)}: {why}")
        if better < 0.4 * off:
            return Item(name, FAILED, f"{seen}, training had {_range(q01, q99)}: {why}", mistake)
    if out:
        what = GRIPPER if f["kind"].startswith("gripper_") and _flips_in(x, low, high) else STATISTICS
        return Item(name, FAILED, f"{seen}, outside its limits {_range(low, high)}: check unit and offset", what)
    worst = np.maximum(q01 - x, x - q99) / spread
    d = int(np.argmax(worst))
    if worst[d] > 3.0:
        text = f"{seen}: dim {d} lies {worst[d]:.1f} ranges outside the statistics {_range(q01, q99)}: another file?"
        return Item(name, FAILED, text, STATISTICS)
    if worst[d] > 0.5:
        return Item(name, WARNED, f"{seen}: outside the training data {_range(q01, q99)}: move the arm to its start")
    return Item(name, OK, f"{seen}, training had {_range(q01, q99)}")


def _range(low: np.ndarray, high: np.ndarray) -> str:
    return f"{np.round(low, 3).tolist()}..{np.round(high, 3).tolist()}"


def _flips_in(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> bool:
    return bool(np.all((-x >= low) & (-x <= high)))


def _distance(x: np.ndarray, sample: np.ndarray, spread: np.ndarray) -> float:
    """Return how far x is from the nearest row, in ranges of the data, by its worst dim."""
    return float(np.min(np.max(np.abs(sample - x) / spread, axis=1)))


def _explanations(
    f: Mapping[str, Any], x: np.ndarray, sample: np.ndarray, spread: np.ndarray, limits: Tuple[np.ndarray, np.ndarray]
) -> List[Tuple[float, str, str]]:
    """Return (distance to training, mistake, what to do) of what could have happened to x."""
    found = []
    if f["kind"] in UNITS:
        factor, mistake = UNITS[f["kind"]]
        scaled = x / factor
        if np.all((scaled >= limits[0]) & (scaled <= limits[1])):
            why = f"in {mistake}? this field is in {f['unit']}: convert in the driver"
            found.append((_distance(scaled, sample, spread), mistake, why))
    if f["kind"].startswith("gripper_"):
        why = "closed where training was open, or inverted? preflight.move=true tells"
        found.append((_distance(np.array(f["low"]) + np.array(f["high"]) - x, sample, spread), GRIPPER, why))
    if f["kind"] == "joint_position":
        order, distance = best_order(x, sample, spread)
        moved = ", ".join(f"{i} is really {p}" for i, p in enumerate(order) if i != p)
        why = f"fits only with the joints in another order (by index: {moved}): check their names"
        if moved:
            found.append((distance, JOINT_ORDER, why))
    return found


def best_order(x: np.ndarray, sample: np.ndarray, spread: np.ndarray) -> Tuple[List[int], float]:
    """Return the order in which x's entries come nearest to a row of `sample`, and how near [ranges].

    Entry i of the result says which entry of x belongs to place i.
    """
    chosen = sample[np.linspace(0, len(sample) - 1, min(len(sample), 64)).astype(int)]
    stay = SUSPICIOUS**2 * (1 - np.eye(len(x)))  # of joints that stand alike, none is said to be another
    candidates = []
    for row in chosen:
        order, _ = assign(((row[:, None] - x[None, :]) / spread[:, None]) ** 2 + stay)
        candidates.append((float(np.max(np.abs(x[order] - row) / spread)), order))
    distance, order = min(candidates)
    return order, distance


def assign(cost: np.ndarray) -> Tuple[List[int], float]:
    """Return for each row the column of the cheapest one-to-one assignment, and its cost (Bellman over subsets)."""
    n = len(cost)
    best: Dict[int, Tuple[float, List[int]]] = {0: (0.0, [])}
    for row in range(n):
        after: Dict[int, Tuple[float, List[int]]] = {}
        for used, (total, columns) in best.items():
            for column in range(n):
                if not used >> column & 1:
                    key, value = used | 1 << column, total + float(cost[row, column])
                    if key not in after or value < after[key][0]:
                        after[key] = (value, [*columns, column])
        best = after
    total, columns = best[(1 << n) - 1]
    return columns, total


def pooled(images: np.ndarray) -> np.ndarray:
    """Return mean colours [k POOL POOL 3] of pictures [k h w 3], whatever their size."""
    _, h, w, _ = images.shape
    rows, columns = (np.linspace(0, size, POOL + 1).astype(int) for size in (h, w))
    x = np.add.reduceat(images.astype(np.float64), rows[:-1], axis=1)
    x = np.add.reduceat(x, columns[:-1], axis=2)
    return x / (np.diff(rows)[:, None, None] * np.diff(columns)[None, :, None])


VIEWS = {  # how a picture can be wrong
    "": lambda x: x,
    BGR: lambda x: x[..., ::-1],
    "upside down": lambda x: x[:, ::-1, ::-1],
    "flipped": lambda x: x[:, ::-1],
    "mirrored": lambda x: x[:, :, ::-1],
}


def image_items(live: Mapping[str, np.ndarray], reference: Mapping[str, np.ndarray]) -> List[Item]:
    """Compare live pictures with training frames: colour order, swapped or turned cameras.

    Args:
        live: by camera, uint8 [n h w 3].
        reference: by camera, uint8 [k h w 3], starts of episodes among them.
    """
    cameras = [c for c in reference if c in live and len(live[c])]
    lacking = [Item(f"picture {c}", SKIPPED, f"{c}: no picture to compare") for c in reference if c not in cameras]
    if not cameras:
        return lacking
    seen = {c: pooled(live[c]) for c in cameras}
    known = {c: pooled(reference[c]) for c in cameras}
    cost = np.array([[_unlike(seen[a], known[b]) for a in cameras] for b in cameras]).reshape(len(cameras), -1)
    order = list(range(len(cameras)))
    if len(cameras) > 1:
        best, total = assign(cost)
        if best != order and total < 0.7 * np.trace(cost) and np.trace(cost) - total > GREY:
            order = best
    items = lacking
    for i, camera in enumerate(cameras):
        name, shown = f"picture {camera}", cameras[order[i]]
        if order[i] != i:
            text = f"{camera}: what it showed in training comes from {shown}'s topic: exchange the cameras' names"
            items.append(Item(name, FAILED, text, SWAPPED_CAMERAS))
        items.append(_picture_item(name, camera, seen[shown], known[camera]))
    return items


def _picture_item(name: str, camera: str, seen: np.ndarray, known: np.ndarray) -> Item:
    apart = {view: _unlike(turn(seen), known) for view, turn in VIEWS.items()}
    usual = apart.pop("")
    view, least = min(apart.items(), key=lambda item: item[1])
    told = f"{camera}: mean difference to the nearest training frame is {usual:.1f} of 255"
    if least < 0.75 * usual and usual - least > GREY:
        mistake = BGR if view == BGR else TURNED_CAMERA
        what = "red and blue exchanged" if view == BGR else f"the picture {view}"
        return Item(name, FAILED, f"{told}, and {least:.1f} with {what}: correct the driver", mistake)
    own = (
        float(np.median([_unlike(known[i : i + 1], np.delete(known, i, 0)) for i in range(len(known))]))
        if len(known) > 1
        else 0.0
    )
    if usual > 3 * own + 20:
        return Item(name, WARNED, f"{told} ({own:.1f} among themselves): other light, view or scene than in training")
    colour = _unlike(VIEWS[BGR](known), known)
    if colour < GREY:
        return Item(name, WARNED, f"{told}; training frames are too grey to tell red from blue")
    return Item(name, OK, told)


def _unlike(seen: np.ndarray, known: np.ndarray) -> float:
    """Return the mean absolute difference to the nearest known picture, median over the seen ones."""
    each = np.mean(np.abs(seen[:, None] - known[None]), axis=(2, 3, 4))  # [n k]
    return float(np.median(each.min(axis=1)))


def gripper_item(name: str, closed: float, opened: float) -> Item:
    """Judge a gripper by what it measured after a command to close and after one to open; 1 = open."""
    text = f"{name}: measured {closed:.2f} after closing and {opened:.2f} after opening"
    if opened - closed > GRIPPER_MOVED:
        return Item("gripper direction", OK, text)
    if closed - opened > GRIPPER_MOVED:
        return Item("gripper direction", FAILED, f"{text}: it moves the wrong way, 1 must be open", GRIPPER)
    return Item("gripper direction", FAILED, f"{text}: it does not move: blocked, or not connected?")


# ---- what came through the whole path


@dataclass(frozen=True)
class Passage:
    """What one training window came to: topics, sync, preprocessing, policy, chunk, guard."""

    observation: float = np.inf  # largest difference of the network's input to the offline one
    chunk: float = np.inf  # largest difference of the actions, as the guard read them, to the offline ones [SI]
    refused: str = ""  # what the guard had against the chunk
    lost: str = ""  # why nothing came through


def path_items(passages: Sequence[Passage], tolerance: float = 1e-5) -> List[Item]:
    """Judge training windows that went the whole way: identical up to `tolerance`, and executable."""
    items = []
    for i, p in enumerate(passages):
        told = f"window {i}: observation differs by {p.observation:.2g}, chunk by {p.chunk:.2g} from offline"
        if p.lost:
            items.append(Item(f"path {i}", FAILED, f"window {i}: {p.lost}", PATH))
        elif not (p.observation <= tolerance and p.chunk <= tolerance):  # NaN fails
            text = f"{told}, at most {tolerance:g}: topics, sync or preprocessing change it"
            items.append(Item(f"path {i}", FAILED, text, PATH))
        elif p.refused:
            items.append(Item(f"path {i}", WARNED, f"{told}, but the guard would not execute all of it: {p.refused}"))
    if items or not passages:
        return items
    worst = max(p.observation for p in passages), max(p.chunk for p in passages)
    text = f"{len(passages)} training windows: observations differ by {worst[0]:.2g}, chunks by {worst[1]:.2g}"
    return [Item("path", OK, f"{text} from offline, and the guard executes them")]
