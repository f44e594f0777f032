"""Two evaluations, or two groups of them, on the same starts: what may be claimed about their difference."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from dita.config import EvalConfig
from dita.evaluate import evaluate, read_episodes
from dita.policy.policy import DitaPolicy
from dita.statistics import (
    Methods,
    Paired,
    Sequential,
    compare_methods,
    compare_pairs,
    holm,
    mcnemar_power,
)

BLOCK = 10  # starts per task between two looks of a sequential comparison
Outcomes = Mapping[tuple[str, int], tuple[str, bool]]  # (task, index) -> (hash of the start, success)


@dataclass(frozen=True)
class Comparison:
    """What comparing two checkpoints found; `compare.json` holds the same."""

    a: str
    b: str
    tasks: Mapping[str, Paired]
    p_holm: Mapping[str, float]  # of the tasks, adjusted for asking about each
    pooled: Paired
    power: Mapping[int, float]  # pairs -> chance that they show +20 points
    sequential: Mapping[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, verdicts included."""
        return {
            **asdict(self),
            "tasks": {task: {**asdict(p), "verdict": p.verdict} for task, p in self.tasks.items()},
            "pooled": {**asdict(self.pooled), "verdict": self.pooled.verdict},
        }


def compare(a: str, b: str, config: EvalConfig, *, maximum: int | None = None, out: str | None = None) -> Comparison:
    """Compare two evaluations, or two checkpoints, which are then evaluated on the starts of `config`.

    Args:
        a: folder of an evaluation, or of a checkpoint.
        b: likewise; both of the same kind.
        config: how checkpoints are evaluated; evaluations go to `config.out`/a and /b and are continued.
        maximum: starts per task; look after every 10 and stop once it is decided. None: all of `config.episodes`.
        out: where `compare.json` goes; None: nowhere.

    Raises:
        ValueError: the starts are not the same, one folder holds no evaluation and the other does, or a maximum with
            evaluations that are finished already.
    """
    finished = [(Path(folder) / "episodes.jsonl").exists() for folder in (a, b)]
    if finished[0] != finished[1]:
        raise ValueError(f"{a if finished[0] else b} is an evaluation and the other is not; give two of the same kind")
    if finished[0] and maximum is not None:
        raise ValueError("these are evaluations already; a maximum is for two checkpoints, evaluated as far as needed")
    if finished[0]:
        first, second, watched = outcomes(a), outcomes(b), None
    else:
        first, second, watched = _play(a, b, config, maximum)
    comparison = compare_outcomes(a, b, first, second, watched)
    if out is not None:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        Path(out).write_text(json.dumps(comparison.to_dict(), indent=1, allow_nan=False))
    _print(comparison)
    return comparison


def outcomes(folder: str) -> Outcomes:
    """Read an evaluation's episodes.

    Raises:
        ValueError: the folder holds no evaluation.
    """
    return {(e.task, e.index): (e.start_hash, e.success) for e in read_episodes(Path(folder))}


def compare_outcomes(
    a: str, b: str, first: Outcomes, second: Outcomes, watched: Sequential | None = None
) -> Comparison:
    """Pair two evaluations by start.

    Raises:
        ValueError: a start that only one of them played, or played from another state.
    """
    _same_starts(a, first, b, second)
    keys = sorted(first)
    tasks = {
        task: compare_pairs([first[k][1] for k in keys if k[0] == task], [second[k][1] for k in keys if k[0] == task])
        for task in sorted({k[0] for k in keys})
    }
    pooled = compare_pairs([first[k][1] for k in keys], [second[k][1] for k in keys])
    sequential = None
    if watched is not None:
        sequential = {**asdict(watched), "e": watched.e, "verdict": watched.verdict}
    adjusted = holm({task: paired.p for task, paired in tasks.items()})
    base = min(0.8, float(np.mean([first[k][1] for k in keys])))
    power = {n: mcnemar_power(n, base, base + 0.2) for n in (50, 150)}
    return Comparison(a, b, tasks, adjusted, pooled, power, sequential)


def compare_groups(a: Sequence[str], b: Sequence[str], smallest_effect: float) -> Methods:
    """Compare two methods, one evaluation per training seed each, all on the same starts.

    Raises:
        ValueError: fewer than three seeds of a method, or starts that are not the same.
    """
    groups = [[outcomes(folder) for folder in group] for group in (a, b)]
    if not groups[0] or not groups[1]:
        raise ValueError("two methods need evaluations of several training seeds each")
    for folder, played in zip([*a, *b], [*groups[0], *groups[1]], strict=True):
        _same_starts(a[0], groups[0][0], folder, played)
    keys = sorted(groups[0][0])
    first, second = (np.array([[run[k][1] for k in keys] for run in group], bool) for group in groups)
    methods = compare_methods(first, second, smallest_effect)
    low, high = methods.interval
    Console().print(
        f"B - A: {methods.difference:+.1%}, 95 % {low:+.1%} .. {high:+.1%}, p {methods.p:.3g}; {methods.verdict} "
        f"({methods.seeds[0]} and {methods.seeds[1]} training seeds, {methods.starts} starts; equivalent within "
        f"{smallest_effect:.0%}: p {methods.p_equivalent:.3g})",
        highlight=False,
    )
    return methods


def _same_starts(a: str, first: Outcomes, b: str, second: Outcomes) -> None:
    if missing := sorted(set(first) ^ set(second)):
        task, index = missing[0]
        raise ValueError(f"{a} and {b} did not play the same starts: only one has {task} {index} ({len(missing)} such)")
    for (task, index), (start, _) in first.items():
        if second[task, index][0] != start:
            raise ValueError(f"{a} and {b} differ in the start of {task} {index}; use the same seed and suite version")


def _play(a: str, b: str, config: EvalConfig, maximum: int | None) -> tuple[Outcomes, Outcomes, Sequential | None]:
    """Evaluate both, all at once or block by block until it is decided."""
    policies = [DitaPolicy.from_pretrained(folder, config.device) for folder in (a, b)]
    names = [str(Path(config.out) / name) for name in ("a", "b")]

    def play(episodes: int) -> tuple[Outcomes, Outcomes]:
        for policy, name in zip(policies, names, strict=True):
            evaluate(policy, replace(config, out=name, episodes=episodes), exist="resume")
        played = ({key: value for key, value in outcomes(name).items() if key[1] < episodes} for name in names)
        first, second = played
        return first, second

    if maximum is None:
        return *play(config.episodes), None
    watched = Sequential(maximum * len(config.env.tasks))
    first, second = {}, {}
    while not watched.stopped:
        before = set(first)
        first, second = play(min(maximum, len(before) // len(config.env.tasks) + BLOCK))
        for key in sorted(set(first) - before, key=lambda k: (k[1], k[0])):
            if not watched.stopped:
                watched.add(first[key][1], second[key][1])
    return first, second, watched


def _print(comparison: Comparison) -> None:
    table = Table(title=f"A = {comparison.a}   B = {comparison.b}")
    for column in ("task", "pairs", "only A", "only B", "B - A", "95 % interval", "p", "p (Holm)", "verdict"):
        table.add_column(column)
    rows = [*comparison.tasks.items(), *([("all", comparison.pooled)] if len(comparison.tasks) > 1 else [])]
    for name, p in rows:
        low, high = p.interval
        adjusted = f"{comparison.p_holm[name]:.3g}" if name in comparison.p_holm else ""
        table.add_row(
            name, str(p.pairs), str(p.a_only), str(p.b_only), f"{p.difference:+.0%}", f"{low:+.0%} .. {high:+.0%}",
            f"{p.p:.3g}", adjusted, p.verdict,
        )  # fmt: skip
    console = Console()
    console.print(table)
    if s := comparison.sequential:
        stop = f"after {s['pairs']} pairs of {s['maximum']} at most"
        console.print(f"sequential: {s['verdict']} {stop}, e = {s['e']:.3g}", highlight=False)
    seen = comparison.pooled
    console.print(
        f"{seen.pairs} pairs see a gain of 20 points with power {seen.power_20:.2f}"
        + "".join(f"; {n} would with {power:.2f}" for n, power in comparison.power.items() if n != seen.pairs),
        highlight=False,
    )
