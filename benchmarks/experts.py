"""How often each scripted expert solves its task, with the noise that `dita collect` lays on its actions.

make evidence-experts
python -m benchmarks.experts --suites robosuite fetch --starts 50

Writes docs/evidence/experts.md and experts.json. Nothing is rendered; starts are those of `dita collect`, seeds from 0.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from rich.progress import track

PAGE = Path(__file__).parent.parent / "docs" / "evidence"
NOISE = (0.0, 0.05, 0.15)
ARMS = tuple(f"robosuite_{arm}_osc" for arm in ("panda", "ur5e", "kinova3", "iiwa"))


@dataclass(frozen=True)
class Job:
    """One expert with one noise."""

    suite: str
    embodiment: str | None  # None: the suite's
    task: str
    noise: float


@dataclass(frozen=True)
class Outcome:
    """What came of a job's starts."""

    solved: int
    starts: int
    steps: float  # control steps of a solved start, HOLD_STEPS included; mean


def experts(suites: Sequence[str]) -> list[tuple[str, str | None, str]]:
    """Return (suite, embodiment, task) of every expert there is.

    Raises:
        ValueError: a suite is not installed.
    """
    from dita.envs import suite_module

    found: list[tuple[str, str | None, str]] = []
    for suite in suites:
        if suite == "robosuite":
            found += [(suite, arm, task) for task in ("Lift", "Stack") for arm in (*ARMS, "robosuite_panda_joint")]
        elif suite == "aloha":
            found.append((suite, None, "AlohaTransferCube"))
        else:
            found += [(suite, None, task) for task in suite_module(suite).TASKS]
    return found


def play(job: Job, starts: int) -> Outcome:
    """Let an expert drive from its first starts."""
    import numpy as np

    import dita.envs
    from dita.cli import compose
    from dita.config import EvalConfig
    from dita.envs.collect import drive

    words = [f"env={job.suite}", f"env.tasks=[{job.task}]"]
    words += [f"env.embodiment={job.embodiment}"] if job.embodiment else []
    env = dita.envs.make(compose("eval", words, EvalConfig).env, job.task)
    steps = []
    for seed in range(starts):
        env.reset(seed=seed)
        for _ in drive(env, seed, job.noise):
            pass
        if env.success and not env.warnings():
            steps.append(env.steps)
    env.close()
    return Outcome(len(steps), starts, float(np.mean(steps)) if steps else 0.0)


def page(outcomes: Sequence[tuple[Job, Outcome]]) -> str:
    """Return the Markdown page: the hard ones one by one, those that never fail in one line each."""
    from dita.statistics import wilson

    starts, noises = outcomes[0][1].starts, _noises(outcomes)
    low = wilson(starts, starts)[0]
    lines = [
        "# Scripted experts", "",
        f"`make evidence-experts`: {starts} starts each (seeds 0 to {starts - 1}), by noise on the executed action,",
        "std in half ranges, correlated over 10 steps; `dita collect` has 0.15.",
        f"{starts} of {starts} is {low:.0%} .. 100% (95 %, Wilson).",
        "Only successes are stored, so a low rate costs time and favours easy starts: lower `action_noise` there.", "",
        f"| suite | embodiment | task | {' | '.join(f'noise {n:g}' for n in noises)} | mean steps without |",
        "|---|---|---|" + "---|" * (len(noises) + 1),
    ]  # fmt: skip
    found = {job: outcome for job, outcome in outcomes}
    keys = list(dict.fromkeys((j.suite, j.embodiment, j.task) for j, _ in outcomes))
    rows = {key: [found[Job(*key, noise)] for noise in noises] for key in keys}
    perfect = [key for key, row in rows.items() if all(o.solved == o.starts for o in row)]
    for (suite, embodiment, task), row in rows.items():
        if (suite, embodiment, task) not in perfect or suite != "metaworld":
            cells = " | ".join(f"{o.solved}/{o.starts}" for o in row)
            lines.append(f"| {suite} | {embodiment or '-'} | {task} | {cells} | {row[0].steps:.0f} |")
    names = [task for suite, _, task in perfect if suite == "metaworld"]
    if names:
        lines += ["", f"{len(names)} more tasks of Meta-World, all starts with each noise: {', '.join(names)}."]
    return "\n".join(lines) + "\n"


def _noises(outcomes: Sequence[tuple[Job, Outcome]]) -> list[float]:
    return sorted({job.noise for job, _ in outcomes})


def main(argv: Sequence[str] | None = None) -> None:
    """Play every expert and write the page."""
    suites = ("metaworld", "robosuite", "fetch", "aloha", "choice")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", choices=suites, default=list(suites))
    parser.add_argument("--starts", type=int, default=20, help="of each task and noise (20)")
    parser.add_argument("--noise", nargs="+", type=float, default=list(NOISE))
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (one per core)")
    parser.add_argument("--page", type=Path, default=PAGE, help="folder of the page")
    args = parser.parse_args(argv)
    try:
        jobs = [Job(*expert, noise) for expert in experts(args.suites) for noise in args.noise]
    except ValueError as e:  # a suite that is not installed
        parser.error(str(e))
    with multiprocessing.get_context("spawn").Pool(args.workers, maxtasksperchild=10) as pool:
        played = track(pool.imap(partial(play, starts=args.starts), jobs), "experts", len(jobs))
        outcomes = list(zip(jobs, played, strict=True))
    args.page.mkdir(parents=True, exist_ok=True)
    records = [asdict(job) | asdict(outcome) for job, outcome in outcomes]
    (args.page / "experts.json").write_text(json.dumps(records, indent=1) + "\n")
    (args.page / "experts.md").write_text(page(outcomes))


if __name__ == "__main__":
    main()
