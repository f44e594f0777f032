"""Train and evaluate what the README claims; every step resumes. Writes docs/evidence/demo.md, the JSON
behind it, and the README's table.

make evidence                     # everything: two to three hours on two idle cores
python benchmarks/evidence.py --only demo_seed0 demo_seed1
python benchmarks/evidence.py --table   # only rewrite the page from what is there
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

from dita.statistics import wilson

ROOT = Path(__file__).parent.parent
OUT = Path("outputs/evidence")
PAGE = ROOT / "docs" / "evidence"
TWO = ("button-press-topdown-v3", "drawer-open-v3")
THREE = (*TWO, "reach-v3")
CLONING = "diffusion.objective=behaviour_cloning"
# name -> (tasks, experiment, training seed, further overrides)
RUNS: dict[str, tuple[tuple[str, ...], str, int, tuple[str, ...]]] = {
    **{f"demo_seed{seed}": (TWO, "demo", seed, ()) for seed in range(3)},
    **{f"demo_cloning_seed{seed}": (TWO, "demo", seed, (CLONING,)) for seed in range(3)},
    "multitask_seed0": (THREE, "demo_multitask", 0, ()),
    "multitask_cloning_seed0": (THREE, "demo_multitask", 0, (CLONING,)),
}

LABELS = {
    "demo": "Dita, two instructions (the demo)",
    "demo_cloning": "behaviour cloning, same trunk and steps",
    "multitask": "Dita, three instructions",
    "multitask_cloning": "behaviour cloning, three instructions",
}
MARKERS = ("<!-- results: make evidence -->", "<!-- /results -->")


def commands(name: str) -> list[list[str]]:
    """Return the commands of one run, in order."""
    tasks, experiment, seed, more = RUNS[name]
    store, run = OUT / f"{len(tasks)}_tasks.zarr", OUT / name
    listed = f"env.tasks=[{','.join(tasks)}]"
    train = ["train", f"experiment={experiment}", f"data.stores=[{{path:{store},weight:1}}]", f"run={run}/train"]
    return [
        ["collect", f"out={store}", listed, "--resume"],
        [*train, f"seed={seed}", *more, "--resume"],
        ["eval", f"{run}/train", f"out={run}/eval", listed, "--resume"],
    ]


def run(name: str) -> None:
    """Do what is missing of one run and keep its result."""
    kept = PAGE / f"{name}.json"
    if kept.exists():
        return
    for command in commands(name):
        print("$ dita", *command, flush=True)
        subprocess.run([sys.executable, "-m", "dita.cli", *command], check=True, cwd=ROOT)
    shutil.copy(ROOT / OUT / name / "eval" / "eval_info.json", kept)


def page() -> str:
    """Return the Markdown page of every run that has a result; the others are listed as not measured."""
    lines = ["# What the demo reaches", "", "Unseen starts, 50 per task; 95 % Wilson intervals; `make evidence`.", ""]
    lines += ["| run | task | success | 95 % interval |", "|---|---|---|---|"]
    missing = [name for name in RUNS if not (PAGE / f"{name}.json").exists()]
    for name in (n for n in RUNS if n not in missing):
        for task, row in json.loads((PAGE / f"{name}.json").read_text())["tasks"].items():
            lines.append(_row(name, task, row["successes"], row["episodes"]))
    lines += [_row(f"**{n}, {k} training seeds**", task, w, m) for (n, task), (w, m, k) in _pooled().items() if k > 1]
    if missing:
        lines += ["", f"Not measured yet: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def readme_table() -> str:
    """Return the README's table: runs pooled over training seeds."""
    lines = ["| policy | task | success | 95 % interval | training seeds |", "|---|---|---|---|---|"]
    for (label, task), (wins, episodes, seeds) in sorted(_pooled().items()):
        low, high = wilson(wins, episodes)
        lines.append(f"| {LABELS[label]} | {task} | {wins}/{episodes} | {low:.1%} .. {high:.1%} | {seeds} |")
    return "\n".join(lines) + "\n"


def write_readme() -> None:
    """Replace the table between the README's markers."""
    path = ROOT / "README.md"
    before, rest = path.read_text().split(MARKERS[0])
    path.write_text(before + MARKERS[0] + "\n" + readme_table() + MARKERS[1] + rest.split(MARKERS[1])[1])


def _pooled() -> dict[tuple[str, str], list[int]]:
    pooled: dict[tuple[str, str], list[int]] = {}
    for name in RUNS:
        if (PAGE / f"{name}.json").exists():
            for task, row in json.loads((PAGE / f"{name}.json").read_text())["tasks"].items():
                total = pooled.setdefault((name.split("_seed")[0], task), [0, 0, 0])
                for i, value in enumerate((row["successes"], row["episodes"], 1)):
                    total[i] += value
    return pooled


def _row(name: str, task: str, successes: int, episodes: int) -> str:
    low, high = wilson(successes, episodes)
    return f"| {name} | {task} | {successes}/{episodes} | {low:.0%} .. {high:.0%} |"


def main() -> None:
    """Run what is asked for and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args()
    PAGE.mkdir(parents=True, exist_ok=True)
    for name in [] if args.table else args.only:
        run(name)
        (PAGE / "demo.md").write_text(page())
    (PAGE / "demo.md").write_text(page())
    write_readme()


if __name__ == "__main__":
    main()
