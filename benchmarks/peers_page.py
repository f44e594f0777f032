"""Records -> what may be claimed: rates with intervals, paired differences, and words that fit them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers_methods import BUDGETS, METHODS, ROBOMIMIC_EPOCHS, Budget, Job
from dita.statistics import LEVEL, MIN_SEEDS, compare_methods, compare_pairs, holm, wilson

SMALLEST_EFFECT = 0.1  # of a success rate: declared before anything was measured
Results = Mapping[str, Mapping[str, Any]]  # Job.key -> record


def page(results: Results, planned: Sequence[Job]) -> str:
    """Return the Markdown page of all results; planned jobs without one are listed."""
    lines = ["# Dita and its peers, in the same run", INTRODUCTION]
    for budget in [b for b in BUDGETS if any(key.startswith(f"{b}/") for key in results)]:
        tasks = sorted({key.split("/")[1] for key in results if key.startswith(f"{budget}/")})
        lines += [f"## Budget `{budget}`", "", _budget_text(BUDGETS[budget]), ""]
        lines += [*_rates(results, budget, tasks), "", *_differences(results, budget), ""]
    missing = [job.key for job in planned if job.key not in results]
    lines += ["## What is missing", ""]
    lines += [f"Of the {len(planned)} planned runs {len(missing)} have not been made: they continue with `make peers`."]
    lines += ["", *[f"- {key}" for key in missing], ""] if missing else [""]
    return "\n".join(lines)


INTRODUCTION = f"""
Every method learns from the same scripted demonstrations of one task and plays the same unseen starts; last checkpoint,
one policy per task. Rates have 95 % Wilson intervals over all episodes, which treat the episodes of several training
seeds as independent. `make peers`; `peers.json` holds the outcome of every start.

- *dita*, *flow*, *behaviour_cloning*, *unet* see one camera and the hand's state. They share encoder, batches, gradient
  steps, optimizer, EMA and 10 denoising steps (behaviour cloning has none); only the named part differs.
- *one_action* is *dita*'s checkpoint that looks again after each action instead of after eight.
- *dita_state* and robomimic 0.3.0 (its own code) see no picture but the positions of object and goal, of which the
  camera's policies know nothing: compare them with each other only. The demonstrations are the same ones, played again
  from their seeds and checked to be bit-equal.
- robomimic's hyperparameters are the published ones; its epochs are {ROBOMIMIC_EPOCHS} only in the budget `full`. With
  fewer, its rows say what it reaches in that budget, not what it can reach. Gradient steps of different methods cost
  different time: see the CPU seconds (of training, mean over seeds).
- In the budget `small` BC-RNN-GMM returned one and the same action for every state of button-press-topdown-v3, on its
  training data too: its mixture had settled on the dims that hardly vary. Whether more epochs cure it was not tried.
- The U-Net has a quarter of the published channels, which still makes it the larger network: see the parameters. Rows
  of a chunk past the end of an episode reach its convolutions as zeros, where the trunk does not see them.

A *method* is called better only with at least {MIN_SEEDS} training seeds of both (clustered by start and seed; smallest
effect, declared beforehand: {SMALLEST_EFFECT:.0%}). With fewer, the words are about these checkpoints only (McNemar,
exact, on paired starts). All p-values are adjusted by Holm over the comparisons of their budget.
"""


def _budget_text(budget: Budget) -> str:
    published = "published" if budget.epochs == ROBOMIMIC_EPOCHS else f"of {ROBOMIMIC_EPOCHS} published"
    return (
        f"{budget.demonstrations} demonstrations; ours: {budget.steps} gradient steps of {budget.batch_size} "
        f"observations with 4 noise samples each; robomimic: {budget.epochs} epochs ({published}) of {budget.updates} "
        f"gradient steps of 100 windows; {budget.episodes} starts."
    )


def _rates(results: Results, budget: str, tasks: Sequence[str]) -> list[str]:
    lines = ["| task | method | success | 95 % interval | training seeds | parameters | train CPU | inference p50 |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for task in tasks:
        for name, method in METHODS.items():
            found = list(_seeds(results, budget, task, name).values())
            if not found:
                continue
            outcomes = "".join(r["outcomes"] for r in found)
            wins, (low, high) = outcomes.count("1"), wilson(outcomes.count("1"), len(outcomes))
            cpu = float(np.mean([r["train_cpu_s"] for r in found]))
            lines.append(
                f"| {task} | *{name}*: {method.label} | {wins}/{len(outcomes)} | {low:.0%} .. {high:.0%} "
                f"| {len(found)} | {found[0]['parameters']:,} | {cpu:.0f} s "
                f"| {np.median([r['inference_p50_s'] for r in found]) * 1e3:.0f} ms |"
            )
    return lines


def comparisons(results: Results, budget: str) -> list[dict[str, Any]]:
    """Compare every method with its reference, task by task, on the training seeds that both have.

    Raises:
        ValueError: two runs played other starts.
    """
    found = []
    for task in sorted({key.split("/")[1] for key in results if key.startswith(f"{budget}/")}):
        for name, method in METHODS.items():
            ours = _seeds(results, budget, task, method.against) if method.against else {}
            theirs = _seeds(results, budget, task, name)
            seeds = sorted(ours.keys() & theirs.keys())
            if not seeds:
                continue
            if len({run[s]["starts"] for run in (ours, theirs) for s in seeds}) > 1:
                raise ValueError(
                    f"{budget}/{task}: {name} and {method.against} played other starts; delete one's records"
                )
            a, b = (np.array([[c == "1" for c in run[s]["outcomes"]] for s in seeds]) for run in (ours, theirs))
            row = {"task": task, "a": method.against, "b": name, "seeds": len(seeds), "pairs": a.size}
            if len(seeds) >= MIN_SEEDS:
                same = method.plays is not None and method.plays == method.against
                methods = compare_methods(a, b, SMALLEST_EFFECT, same_checkpoints=same)
                row |= {"interval": methods.interval, "p": methods.p, "p_equivalent": methods.p_equivalent}
            else:
                paired = compare_pairs(a.ravel().tolist(), b.ravel().tolist())
                row |= {"interval": paired.interval, "p": paired.p, "power_20": paired.power_20}
            found.append(row | {"difference": float(b.mean() - a.mean())})
    adjusted = holm({str(i): row["p"] for i, row in enumerate(found)})
    return [
        row | {"p_holm": adjusted[str(i)], "verdict": _verdict(row, adjusted[str(i)])} for i, row in enumerate(found)
    ]


def _verdict(row: Mapping[str, Any], p: float) -> str:
    """Say in words what may be claimed, and about what."""
    if p <= 1 - LEVEL:
        words = f"{row['b' if row['difference'] > 0 else 'a']} is better"
    elif row.get("p_equivalent", 1.0) <= 1 - LEVEL:
        words = f"equivalent within {SMALLEST_EFFECT:.0%}"
    else:
        words = "not distinguishable"
    return words if row["seeds"] >= MIN_SEEDS else f"these checkpoints: {words}"


def _differences(results: Results, budget: str) -> list[str]:
    lines = ["| task | A | B | B - A | 95 % interval | p (Holm) | seeds x starts | verdict |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    rows = comparisons(results, budget)
    for row in rows:
        low, high = row["interval"]
        lines.append(
            f"| {row['task']} | {row['a']} | {row['b']} | {row['difference']:+.0%} | {low:+.0%} .. {high:+.0%} "
            f"| {row['p_holm']:.3g} | {row['seeds']} x {row['pairs'] // row['seeds']} | {row['verdict']} |"
        )
    if powers := [row["power_20"] for row in rows if "power_20" in row]:
        lines += ["", f"Power to see +20 points between two checkpoints: {min(powers):.2f} .. {max(powers):.2f}."]
    return lines


def _seeds(results: Results, budget: str, task: str, method: str | None) -> dict[int, Mapping[str, Any]]:
    prefix = f"{budget}/{task}/{method}/"
    return {int(key.removeprefix(prefix)): value for key, value in results.items() if key.startswith(prefix)}


def read_results(path: Path) -> dict[str, Any]:
    """Read peers.json.

    Raises:
        ValueError: a record was made with other settings than its budget has now.
    """
    results = json.loads(path.read_text()) if path.exists() else {}
    for key, record in results.items():
        now = json.loads(json.dumps(asdict(BUDGETS[key.split("/")[0]])))
        if record["settings"] != now:
            raise ValueError(
                f"{path}: {key} was made with {record['settings']}, its budget is {now} now; delete it there"
            )
    return results
