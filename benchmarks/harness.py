"""Benchmarks as ratios, both sides in one run: pairs A B A B ... in turn, medians, wall and CPU time, JSON, a table.

make bench                            # every row, full size; about an hour
make bench ROWS="denoise_exact memory"
python -m benchmarks --tier quick     # tiny sizes: does every row run? its numbers mean nothing
python -m benchmarks --table          # only rewrite the README's table from benchmarks/results
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from dita.evaluate import fingerprint

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARKERS = ("<!-- benchmarks: make bench -->", "<!-- /benchmarks -->")
PAIRS = 5
SETTLE_S = 1.0  # to see what others do on this machine
OTHERS = 0.15  # cores that others may use before a wall-time ratio is worth nothing


@dataclass(frozen=True)
class Case:
    """One line of a row: ours against a peer. Larger ratios are better; a ratio below 1 is a loss."""

    name: str
    ours: float | None
    peer: float | None
    unit: str
    ratio: float | None  # None: not measured, or refused; `note` says why
    goal: str  # as benchmarks.md has it, e.g. ">= 3.0x"
    met: bool | None
    note: str = ""
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pairs:
    """Medians over interleaved pairs [s]; `ratio` is peer / ours, the median over pairs."""

    ours: float
    peer: float
    ratio: float
    ours_cpu: float
    peer_cpu: float
    cpu_ratio: float
    others: float  # cores that other processes used just before
    detail: Mapping[str, Any]

    def case(self, name: str, goal: float, **detail: Any) -> Case:
        """Make a line of it; without a wall-time ratio where others used the machine."""
        text, more = f">= {goal:g}x", {**self.detail, **detail}
        if self.others > OTHERS:
            note = f"no wall-time ratio: others used {self.others:.1f} cores; CPU-time ratio {self.cpu_ratio:.2f}x"
            return Case(name, self.ours, self.peer, "s", None, text, None, note, more)
        return Case(name, self.ours, self.peer, "s", self.ratio, text, self.ratio >= goal, "", more)


def busy_cores(seconds: float = SETTLE_S) -> float:
    """Return how many cores this machine uses while this process sleeps."""

    def ticks() -> tuple[int, int]:
        values = [int(v) for v in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
        return sum(values), values[3] + values[4]  # all, idle + waiting

    total, idle = ticks()
    time.sleep(seconds)
    total_after, idle_after = ticks()
    passed = max(1, total_after - total)
    return (1 - (idle_after - idle) / passed) * (os.cpu_count() or 1)


def interleave(ours: Callable[[], Any], peer: Callable[[], Any], pairs: int = PAIRS, warm_up: int = 1) -> Pairs:
    """Time two functions in turn: ours, peer, ours, peer ..."""
    for _ in range(warm_up):
        ours()
        peer()
    others = busy_cores()
    rows = [(_timed(ours), _timed(peer)) for _ in range(pairs)]
    wall, cpu = ([(a[clock], b[clock]) for a, b in rows] for clock in (0, 1))
    ratio, cpu_ratio = (median(b / a for a, b in column) for column in (wall, cpu))
    (a, b), (a_cpu, b_cpu) = ((median(side) for side in zip(*column, strict=True)) for column in (wall, cpu))
    detail = {"pairs": pairs, "wall_s": wall, "cpu_s": cpu, "cpu_ratio": cpu_ratio, "others_cores": others}
    return Pairs(a, b, ratio, a_cpu, b_cpu, cpu_ratio, others, detail)


def _timed(function: Callable[[], Any]) -> tuple[float, float]:
    """Return wall and CPU seconds; those of child processes that ended count too."""

    def cpu() -> float:
        return sum(os.times()[:4])  # user and system, of this process and of its children

    cpu_before, wall = cpu(), time.perf_counter()
    function()
    return time.perf_counter() - wall, max(cpu() - cpu_before, 1e-9)


def profile(function: Callable[[], Any], most: int = 6) -> list[str]:
    """Say where the time of a call goes: the operators with the most time of their own, and their shares."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CPU]) as run:
        function()
    events = sorted(run.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    return [f"{e.key} {e.self_cpu_time_total / total:.0%} ({e.count} calls)" for e in events[:most]]


def machine() -> dict[str, Any]:
    """Describe the machine and the software behind a number."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":")[1].strip() for line in info.splitlines() if line.startswith("model name")]
    flags = next((line.split(":")[1].split() for line in info.splitlines() if line.startswith("flags")), [])
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    return {
        **fingerprint(),
        "cpu": f"{models[0] if models else platform.processor()} ({', '.join(f for f in wanted if f in flags)})",
        "load": os.getloadavg(),
        "threads_env": {k: v for k, v in os.environ.items() if k.startswith(("OMP_", "GOMP_", "MKL_"))},
    }


def save(row: str, tier: str, cases: Sequence[Case], seconds: float, folder: Path = RESULTS) -> Path:
    """Keep a row's JSON; the quick tier has a file of its own, so that it never replaces a measurement."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{row}{'' if tier == 'full' else f'.{tier}'}.json"
    values = {"row": row, "tier": tier, "seconds": seconds, "machine": machine(), "cases": [asdict(c) for c in cases]}
    path.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")
    return path


def print_cases(row: str, cases: Sequence[Case]) -> None:
    """Print a row."""
    table = Table(title=row, title_justify="left")
    for column in ("case", "ours", "peer", "ratio", "goal", "met"):
        table.add_column(column)
    for c in cases:
        table.add_row(c.name, *_cells(c))
    Console().print(table)
    for note in {c.note for c in cases if c.note}:
        Console().print(f"  {note}", highlight=False)


def readme_table(folder: Path = RESULTS) -> str:
    """Return the README's table from the JSON of full runs; rows that never ran are listed as not measured."""
    from benchmarks.rows import ROWS

    lines = ["| row | case | ours | peer | ratio | goal | met |", "|---|---|---|---|---|---|---|"]
    cpus, missing, notes = set(), [], []
    for row in ROWS:
        path = folder / f"{row}.json"
        if not path.exists():
            missing.append(row)
            continue
        values = json.loads(path.read_text())
        cpus.add(f"{values['machine']['cpu']}, {values['machine']['cpus']} cores, torch "
                 f"{values['machine']['versions']['torch']}")  # fmt: skip
        for c in values["cases"]:
            case = Case(**c)
            lines.append(f"| {row} | {case.name} | {' | '.join(_cells(case))} |")
            if case.note:
                plain = case.met or (case.met is None and case.ratio is not None)  # met, or there is no goal
                note = case.note.removeprefix(f"{row}: ")
                notes.append(f"- {row}, {note}" if plain else f"- **{row}**, {note}")
    notes = list(dict.fromkeys(notes))  # several cases may share one
    notes += [f"- Not yet measured: {', '.join(missing)}."] if missing else []
    return "\n".join([*lines, "", *notes, "", f"Machine: {'; '.join(sorted(cpus)) or 'none yet'}."]) + "\n"


def write_readme() -> None:
    """Replace the table between the README's markers."""
    path = ROOT / "README.md"
    before, rest = path.read_text().split(MARKERS[0])
    path.write_text(before + MARKERS[0] + "\n" + readme_table() + MARKERS[1] + rest.split(MARKERS[1])[1])


def _cells(c: Case) -> tuple[str, str, str, str, str]:
    missing = "not measured" if c.ratio is None else "-"  # a ratio without a goal
    met = missing if c.met is None else "yes" if c.met else "**missed**"
    ratio = "-" if c.ratio is None else f"{c.ratio:.2f}x"
    return _quantity(c.ours, c.unit), _quantity(c.peer, c.unit), ratio, c.goal, met


def _quantity(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "s":
        return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"
    return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.3g} {unit}"
