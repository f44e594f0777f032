"""What decides our defaults: one question at a time, on the same starts, each answered by a card in docs/evidence.

make ablations                                                       # all of them: hours on two cores; resumes
python -m benchmarks.ablations spacing ensembling --episodes 150     # these only
python -m benchmarks.ablations spacing --checkpoints outputs/demo/train   # of a policy that is there
python -m benchmarks.ablations frames --steps 60 --episodes 10 --seeds 0  # does it run? its answer means little

A variant differs from the baseline in what its line says and in nothing else. The baseline is what we ship, trained
shorter: a policy that solves everything leaves nothing to see. Questions that train nothing ask it, too. Three or more
training seeds speak about the method: clustered by training seed and start. Fewer speak about those checkpoints: pairs
by start, McNemar's exact test. Holm's correction covers the variants of a question. Everything that was trained or
played is kept, shared by the questions that need it, and continued.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.ablation_questions import QUESTIONS, Budget

OUT = Path("outputs/ablations")
PAGE = Path(__file__).parent.parent / "docs" / "evidence"
TASKS = ("button-press-topdown-v3", "drawer-open-v3")


def main(argv: Sequence[str] | None = None) -> int:
    """Answer what is asked for."""
    # here, so that the spawned simulators, which import this file anew, do not wait for torch
    from benchmarks.ablation_cards import answer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=f"of {', '.join(QUESTIONS)} (all)")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="two or more")
    parser.add_argument("--episodes", type=int, default=50, help="unseen starts per task (50)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training (0 1 2)")
    parser.add_argument("--steps", type=int, default=300, help="of training (300, half the demo's)")
    parser.add_argument("--batch-size", type=int, default=32, help="of training (32, half the demo's)")
    parser.add_argument("--demonstrations", type=int, default=60, help="per task (60)")
    parser.add_argument("--experiment", default="demo", help="training recipe in configs/experiment (demo)")
    parser.add_argument("--checkpoints", nargs="+", default=[], metavar="RUN",
                        help="ask these what needs no training, one per seed (the baselines)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=OUT, help="what is trained and played")
    parser.add_argument("--page", type=Path, default=PAGE, help="folder of the cards")
    parser.add_argument("--n-envs", type=int, default=6, help="simulators; results do not depend on it")
    args = parser.parse_args(argv)
    if unknown := [q for q in args.questions if q not in QUESTIONS]:
        parser.error(f"no question {', '.join(unknown)}; there are {', '.join(QUESTIONS)}")
    if len(args.tasks) < 2:
        parser.error("an answer from one task is an answer about that task; name two or more")
    budget = Budget(
        tuple(args.tasks), args.episodes, tuple(args.seeds), args.steps, args.batch_size, args.demonstrations,
        args.experiment, tuple(args.checkpoints), args.out, args.page, args.n_envs,
    )  # fmt: skip
    for name in args.questions or QUESTIONS:
        print(answer(name, budget).read_text(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
