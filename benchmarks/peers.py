"""Dita against other policies on the same demonstrations and the same starts: trains, plays and compares; resumes.

Writes docs/evidence/peers.json, one record per (budget, task, method, training seed) with the outcome of every start,
and docs/evidence/peers.md, which is made from that file alone; whatever it holds is not done again.

make peers                                      # the default tasks, three training seeds, published epochs
python -m benchmarks.peers --tasks touch-red --budget small --seeds 0 --minutes 60
python -m benchmarks.peers --table              # only rewrite the page
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "evidence"
TASKS = ("button-press-topdown-v3", "drawer-open-v3")


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what is missing of the plan and write page and records after each run."""
    # here, so that the spawned simulators, which import this file anew, do not wait for torch
    from rich.console import Console

    from benchmarks.peers_methods import BUDGETS, METHODS, jobs
    from benchmarks.peers_page import page, read_results
    from benchmarks.peers_robomimic import missing
    from benchmarks.peers_run import run

    parser = argparse.ArgumentParser(
        "benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), metavar="TASK", help="of metaworld or choice")
    parser.add_argument("--budget", choices=list(BUDGETS), default="full", help="how much is trained and played (full)")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="METHOD",
                        help=f"of {', '.join(METHODS)}")  # fmt: skip
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of training (0 1 2)")
    parser.add_argument("--minutes", type=float, help="begin nothing new after this long; without: until all is done")
    parser.add_argument("--out", type=Path, default=Path("outputs/peers"), help="stores, checkpoints, episodes")
    parser.add_argument("--evidence", type=Path, default=PAGE, help="folder of peers.json and peers.md")
    parser.add_argument("--table", action="store_true", help="run nothing, only rewrite the page")
    args = parser.parse_args(arguments)
    console, began, path = Console(), time.monotonic(), args.evidence / "peers.json"
    plan = jobs(args.budget, args.tasks, args.methods, args.seeds)
    results = read_results(path)
    lacking = missing()
    todo = [] if args.table else [job for job in plan if job.key not in results]
    if lacking and any(METHODS[job.method].network == "robomimic" for job in todo):
        console.print(f"left out: {lacking}", highlight=False, soft_wrap=True)
        todo = [job for job in todo if METHODS[job.method].network != "robomimic"]
    args.evidence.mkdir(parents=True, exist_ok=True)
    for i, job in enumerate(todo):
        if args.minutes is not None and time.monotonic() - began > 60 * args.minutes:
            console.print(f"{len(todo) - i} runs are left: the time is up", highlight=False)
            break
        console.rule(f"{job.key} ({i + 1} of {len(todo)})")
        record = run(job, args.out)
        results = read_results(path) | {job.key: record}  # another process may have added to it
        _write(path, json.dumps(results, indent=1, sort_keys=True, allow_nan=False) + "\n")
        _write(args.evidence / "peers.md", page(results, plan))
        console.print(f"{job.key}: {record['outcomes'].count('1')} of {len(record['outcomes'])}", highlight=False)
    _write(args.evidence / "peers.md", page(results, plan))


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt as stop:
        sys.exit(f"{stop or 'stopped'}; the same command continues")
