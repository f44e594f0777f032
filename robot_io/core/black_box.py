"""What a black box keeps and when it writes: bounded memory, one record per burst, bounded disk.

Plain Python: the node (`robot_io.nodes.blackbox`) brings the messages, the bag file and the picture.
"""

import json
import re
import shutil
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Deque, Dict, List, Mapping, Optional, Sequence, Tuple

REACTIONS = {"HOLDING": "R2", "FAULT": "R3"}
REASONS = "reasons.json"
RECORD = re.compile(r"\d{8}T\d{6}\.\d{3}_[A-Za-z0-9.-]+")  # the folders that this module may delete


@dataclass(frozen=True)
class Sample:
    """One message as it arrived."""

    time: float  # [s], of arrival
    topic: str
    type: str
    data: bytes  # CDR


@dataclass(frozen=True)
class Reaction:
    """One R2 or R3 of the guard, or its loss."""

    time: float  # [s]
    reaction: str  # R2, R3 or GONE
    state: str
    reason: str


class Ring:
    """The newest samples that are not older than `seconds` and together not larger than `max_bytes`."""

    def __init__(self, seconds: float, max_bytes: int) -> None:
        self.seconds, self.max_bytes = seconds, max_bytes
        self.bytes = 0
        self.evicted = 0  # samples that the size, not their age, pushed out
        self._samples: Deque[Sample] = deque()

    def add(self, sample: Sample) -> None:
        """Take a sample; the oldest ones make room."""
        self._samples.append(sample)
        self.bytes += len(sample.data)
        while self._samples and sample.time - self._samples[0].time > self.seconds:
            self._drop()
        while self.bytes > self.max_bytes:
            self._drop()
            self.evicted += 1

    def _drop(self) -> None:
        self.bytes -= len(self._samples.popleft().data)

    def samples(self) -> List[Sample]:
        """Return what is held, oldest first."""
        return list(self._samples)


class Trigger:
    """Collect reactions and say when to write them: `after` seconds later, and never sooner than `interval`."""

    def __init__(self, after: float, interval: float) -> None:
        self.after, self.interval = after, interval
        self._pending: List[Reaction] = []
        self._written = -float("inf")

    @property
    def pending(self) -> bool:
        """Whether a reaction waits to be written."""
        return bool(self._pending)

    def react(self, reaction: Reaction) -> None:
        """Take a reaction; it joins those that wait."""
        self._pending.append(reaction)

    def due(self, now: float, closing: bool = False) -> List[Reaction]:
        """Return the burst to write now, or nothing; `closing` does not wait for what follows it."""
        ready = (
            now >= max(self._written + self.interval, self._pending[0].time + self.after) if self._pending else False
        )
        if not (ready or (closing and self._pending)):
            return []
        burst, self._pending, self._written = self._pending, [], now
        return burst


def reaction_of(state: Mapping[str, Any], before: str, time: float) -> Optional[Reaction]:
    """Return the reaction that a change of the guard's state from `before` stands for, if it is one."""
    now = str(state.get("state", ""))
    if now == before or now not in REACTIONS:
        return None
    return Reaction(time, REACTIONS[now], now, str(state.get("reason", "")))


def record_name(stamp: str, burst: Sequence[Reaction]) -> str:
    """Return a folder's name: UTC time, then the worst reaction and its reason in a few safe letters."""
    worst = worst_of(burst)
    words = re.sub(r"[^A-Za-z0-9.]+", "-", f"{worst.reaction} {worst.reason}").strip("-")[:48]
    return f"{stamp}_{words}"


def worst_of(burst: Sequence[Reaction]) -> Reaction:
    """Return the first of the strongest reactions of a burst."""
    rank = ("R2", "R3", "GONE")
    return max(burst, key=lambda r: (rank.index(r.reaction), -r.time))


def reasons(
    burst: Sequence[Reaction],
    samples: Sequence[Sample],
    states: Sequence[Tuple[float, Mapping[str, Any]]],
    diagnostics: Mapping[str, Any],
    about: Mapping[str, Any],
) -> Dict[str, Any]:
    """Return `reasons.json`: why it was written, what led to it and what the bag covers.

    Args:
        states: the guard's states in the window, with the time each came [s].
        diagnostics: the last status of each node.
        about: embodiment, contract, memory.
    """
    return {
        "version": 1,
        "moment": worst_of(burst).time,
        "reactions": [asdict(r) for r in burst],
        "states": [{"time": time, **state} for time, state in states],
        "diagnostics": dict(diagnostics),
        "topics": coverage(samples),
        **about,
    }


def coverage(samples: Sequence[Sample]) -> Dict[str, Dict[str, Any]]:
    """Return per topic how many messages there are, and from when to when [s]."""
    found: Dict[str, Dict[str, Any]] = {}
    for s in samples:
        topic = found.setdefault(s.topic, {"type": s.type, "messages": 0, "first": s.time})
        topic["messages"] += 1
        topic["last"] = s.time
    return found


def records(folder: Path) -> List[Path]:
    """Return the finished records in a folder, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if RECORD.fullmatch(p.name) and (p / REASONS).is_file())


def prune(folder: Path, max_records: int, max_bytes: int) -> List[str]:
    """Delete the oldest records until neither cap is exceeded; the newest one always stays. Return their names."""
    kept = records(folder)
    sizes = {p: sum(f.stat().st_size for f in p.rglob("*") if f.is_file()) for p in kept}
    gone = []
    while len(kept) > 1 and (len(kept) > max_records or sum(sizes[p] for p in kept) > max_bytes):
        oldest = kept.pop(0)
        shutil.rmtree(oldest)
        gone.append(oldest.name)
    return gone


def timeline(record: Path) -> List[str]:
    """Return a record as lines for a terminal.

    Raises:
        FileNotFoundError: the folder is no record; says which ones there are.
    """
    if not (record / REASONS).is_file():
        there = ", ".join(p.name for p in records(record)) or "no record of a black box"
        raise FileNotFoundError(f"{record} is no record: it has no {REASONS}; it holds {there}")
    values = json.loads((record / REASONS).read_text(encoding="utf-8"))
    moment = values["moment"]
    lines = [f"{record.name}  {values.get('embodiment') or 'unknown embodiment'}"]
    events = [(s["time"], f"{s['state']:<8} {s.get('reason', '')}") for s in values["states"]]
    events += [(r["time"], f"{r['reaction']:<8} {r['reason']}") for r in values["reactions"]]
    lines += [f"{time - moment:+9.3f} s  {text}" for time, text in sorted(events, key=lambda e: e[0])]
    for topic, t in sorted(values["topics"].items()):
        first, last = t["first"] - moment, t["last"] - moment
        lines.append(f"{topic:<44} {t['messages']:>6} messages  {first:+8.2f} .. {last:+6.2f} s")
    return lines
