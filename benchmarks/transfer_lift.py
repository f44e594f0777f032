"""Does pretraining on other arms help a held-out one? robosuite Lift: pretrain on Panda, UR5e and Kinova3 (and
Meta-World's Sawyer and Fetch), hold the IIWA out, finetune it with 1, 5, 10 and 20 demonstrations.

    make transfer-lift                                    # everything: a day on two idle cores; resumes
    python -m benchmarks.transfer_lift --budget-minutes 60   # as far as that goes
    python -m benchmarks.transfer_lift --seeds 1 --threads 1   # one of several beside each other, after the rates
    python -m benchmarks.transfer_lift --list             # what is done and what is missing
    python -m benchmarks.transfer_lift --report           # only write the page from what is there

Every arm goes through `dita finetune` with the same steps, and differs only in the checkpoint it starts from: from
scratch is a checkpoint of random weights with the demonstrations' own statistics. One JSON per cell, what decides most
first: 10 demonstrations, from scratch and full, of every seed and subset. Nothing is chosen by looking at the IIWA but
by the calibration, which sees from-scratch only; learning rates are chosen before the first cell on the UR5e, held out
of a pretraining of its own. A budget stops what runs, and the next call continues it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dita.statistics import compare_methods, hierarchical_bootstrap

ROOT = Path(__file__).parent.parent
OUT = Path("outputs/transfer_lift")
KEPT = ROOT / "docs" / "evidence" / "transfer_lift"
TARGET = "iiwa"
ROBOTS = ("panda", "ur5e", "kinova3")
# name -> how its demonstrations are collected; joint_* are the variant without a shared OSC
OTHERS = {
    "sawyer": ("env=metaworld", "env.tasks=[pick-place-v3]"),
    "fetch": ("env=fetch", "env.tasks=[pick-and-place]"),
}
NOISE = 0.05  # of the arms' demonstrations: with 0.15 the IIWA's expert fails in 55 of 115 starts, with 0.05 in 0 of 20
PRETRAINING, POOL = 50, 60  # demonstrations of each source; of the IIWA, from which subsets are drawn
SHOTS, SEEDS, SUBSETS, STARTS = (1, 5, 10, 20), (0, 1, 2), (0, 1, 2, 3, 4), 100
METHODS = ("full", "lora", "head")
WANTED = (0.2, 0.7)  # of from-scratch with 10, or the comparison has no room
# tried in this order: finetuning steps, and control steps until a start counts as failed
DIFFICULTIES = ((400, 200), (800, 200), (400, 100), (200, 100), (1600, 200))
EFFECT = 0.1  # smallest difference of rates that matters, declared beforehand
CALIBRATION_RATE = 1.0e-3
TRIED = (3.0e-4, 1.0e-3, 3.0e-3)  # learning rates
PRETRAINING_STEPS = 3000  # configs/experiment/transfer_lift.yaml


@dataclass(frozen=True)
class Cell:
    """One finetuning and its evaluation."""

    arm: str  # key of ARMS
    method: str
    shots: int
    seed: int  # of pretraining and of finetuning
    subset: int  # which demonstrations

    @property
    def name(self) -> str:
        return f"{self.arm}_{self.method}_{self.shots}_seed{self.seed}_subset{self.subset}"


# arm -> (checkpoint that it starts from, statistics)
ARMS: dict[str, tuple[str, str]] = {
    "pretrained": ("pretrain", "pretrained"),
    "scratch": ("random", "new"),
    "zero_shot": ("pretrain", "pretrained"),
    # controls, full finetuning with 10
    "vision_only": ("vision", "pretrained"),
    "shuffled": ("pretrain_shuffled", "pretrained"),
    "scratch_long": ("random", "new"),  # as many steps as pretraining and finetuning together
    "co_training": ("pretrain", "pretrained"),
    "statistics_new": ("pretrain", "new"),
    "statistics_pooled": ("pretrain", "pooled"),
    "joint": ("pretrain_joint", "pretrained"),
    "joint_scratch": ("random_joint", "new"),
}
CONTROLS = tuple(ARMS)[3:]


def cells() -> list[Cell]:
    """Return every cell, what decides most first: 10 shots of from-scratch and full, then everything of a subset."""
    found = []
    for subset in SUBSETS:
        for seed in SEEDS:
            for shots in SHOTS:
                found.append(Cell("scratch", "full", shots, seed, subset))
                found += [Cell("pretrained", method, shots, seed, subset) for method in METHODS]
            if subset == 0:
                found.append(Cell("zero_shot", "full", 0, seed, subset))
            found += [Cell(arm, "full", 10, seed, subset) for arm in CONTROLS]
    return sorted(found, key=_turn)


def _turn(cell: Cell) -> tuple[int, ...]:
    """Return when a cell's turn is: lower goes first."""
    full = cell.arm in ("scratch", "pretrained", "zero_shot") and cell.method == "full"
    if full and cell.shots == 10:
        return 0, cell.subset, cell.seed
    return 1, cell.subset, 0 if full else 1 if cell.arm == "pretrained" else 2, cell.seed


# ---- steps: each leaves a file or folder and is skipped when it is there


class BudgetOver(Exception):
    """The time is over; every step continues where it was stopped."""


class Given:
    """What the command line gives every step."""

    end = float("inf")  # of the budget, by time.monotonic
    threads = 0  # of a training; 0: all cores


def dita(*words: str) -> None:
    """Run a command of `dita`; when the budget is over, stop it as Ctrl-C would, so that it saves and can resume."""
    print("$ dita", *words, flush=True)
    left = Given.end - time.monotonic()
    if left <= 0:
        raise BudgetOver
    process = subprocess.Popen([sys.executable, "-m", "dita.cli", *words], cwd=ROOT)
    try:
        code = process.wait(None if left == float("inf") else left)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise BudgetOver from None
    if code:
        raise SystemExit(f"dita {words[0]} ended with {code}; what is done is kept, run this again")


def embodiment(robot: str, joint: bool) -> str:
    """Return the embodiment of a robosuite arm; those of joint control are made from the Panda's and its own model."""
    if not joint:
        return f"robosuite_{robot}_osc"
    path = (ROOT / OUT / "embodiments" / f"robosuite_{robot}_joint.json").resolve()
    if not path.exists():
        from dita.embodiment import embodiment_to_dict

        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(embodiment_to_dict(joint_embodiment(robot))))
    return str(path)


def joint_embodiment(robot: str):
    """Describe an arm moved by steps of its joints: the Panda's file with this arm's number of joints."""
    from dita.embodiment import load_embodiment

    panda, osc = load_embodiment("robosuite_panda_joint"), load_embodiment(f"robosuite_{robot}_osc")
    joints = 6 if robot == "ur5e" else 7

    def fit(field):
        if not field.kind.startswith("joint"):
            return next((f for f in osc.state if f.name == field.name), field)
        # a turn and a half either way holds every joint of these arms
        low, high = (-9.5, 9.5) if field.mode == "absolute" else (-0.1, 0.1)
        return dataclasses.replace(field, size=joints, low=(low,) * joints, high=(high,) * joints)

    fields = {group: tuple(fit(f) for f in getattr(panda, group)) for group in ("state", "action")}
    about = {"name": f"robosuite_{robot}_joint", "robot": f"{osc.robot.split(',')[0]}, JOINT_POSITION"}
    return dataclasses.replace(panda, **about, **fields, limits=None, driver=None)


def collect(robot: str, joint: bool = False) -> Path:
    """Collect a robot's demonstrations."""
    store = OUT / "data" / f"{robot}{'_joint' if joint else ''}.zarr"
    done = ROOT / OUT / "data" / f"{store.name}.done"
    if not done.exists():
        arm = (
            "env=robosuite",
            "env.tasks=[Lift]",
            f"env.embodiment={embodiment(robot, joint)}",
            f"action_noise={NOISE}",
        )
        words = OTHERS.get(robot, arm)
        dita("collect", f"out={store}", *words, f"episodes={POOL if robot == TARGET else PRETRAINING}", "--resume")
        done.touch()
    return store


def shuffle(store: Path) -> Path:
    """Write a store whose actions are those of other instants: the pictures and the marginals of the data only."""
    from dita.datasets.store import Store, StoreWriter
    from dita.types import Episode

    target = store.with_name(f"{store.stem}_shuffled.zarr")
    if (ROOT / target).exists():
        return target
    source = Store(ROOT / store)
    actions = np.concatenate([source.action(i) for i in range(len(source.episodes))])
    actions = actions[np.random.default_rng(0).permutation(len(actions))]
    partial, first = target.with_suffix(".partial"), 0
    with StoreWriter.create(
        ROOT / partial, source.spec, source="shuffled actions", licence="MIT", exist="overwrite"
    ) as w:
        for i, e in enumerate(source.episodes):
            n = source.length(i)
            images = {c.name: source.read_frames(i, c.name, range(n)) for c in source.spec.cameras}
            taken = actions[first : first + n]
            w.add(Episode(images, source.state(i), taken, source.stamp(i), e.instruction, e.success, e.source))
            first += n
        w.seal()
    (ROOT / partial).rename(ROOT / target)
    return target


def stores(joint: bool = False, leave_out: str | None = None) -> list[Path]:
    """Return the stores of pretraining, collected."""
    robots = [r for r in ROBOTS if r != leave_out]
    return [collect(r, joint) for r in robots] + ([] if joint else [collect(r) for r in OTHERS])


def pretrain(kind: str, seed: int, leave_out: str | None = None) -> Path:
    """Train the checkpoint that an arm starts from; vision and random ones are made from the one of `pretrain`."""
    name = f"{kind}{f'_without_{leave_out}' if leave_out else ''}_seed{seed}"
    run, joint = OUT / name, kind.endswith("_joint")
    if (ROOT / run / "done").exists():
        return run
    if kind in ("vision", "random", "random_joint"):
        _reinitialise(pretrain("pretrain_joint" if joint else "pretrain", seed, leave_out), run, kind, seed)
    else:
        data = [shuffle(s) for s in stores()] if kind == "pretrain_shuffled" else stores(joint, leave_out)
        listed = ",".join(f"{{path:{s},weight:{1 if s.stem.split('_')[0] in OTHERS else 2}}}" for s in data)
        more = ["policy.state_dim=17", "policy.action_dim=8"] if joint else []
        words = ["experiment=transfer_lift", f"data.stores=[{listed}]", f"run={run}", f"seed={seed}", *more]
        words += [f"threads={Given.threads}"]
        dita("train", *words, "--resume")
    (ROOT / run / "done").touch()
    return run


def _reinitialise(source: Path, run: Path, kind: str, seed: int) -> None:
    """Write a policy of the source's contract with fresh weights; `vision` keeps what sees and reads."""
    import torch

    from dita.checkpoint import load_policy, save_policy
    from dita.policy.policy import DitaPolicy

    base = load_policy(ROOT / source)
    torch.manual_seed(seed)
    fresh = DitaPolicy(base.config, base.diffusion.config, base.contract)
    if kind == "vision":
        fresh.model.vision.load_state_dict(base.model.vision.state_dict())
        fresh.model.language.load_state_dict(base.model.language.state_dict())
    save_policy(fresh, ROOT / run / "policy")


def finetune(cell: Cell, run: Path, steps: int, lr: float, robot: str = TARGET) -> None:
    """Finetune a cell."""
    kind, statistics = ARMS[cell.arm]
    joint = cell.arm.startswith("joint")
    data = f"{{path:{collect(robot, joint)},weight:1,filter:null}}"
    if cell.arm == "co_training":
        data += "".join(f",{{path:{s},weight:0.2,filter:null}}" for s in stores())
    steps += PRETRAINING_STEPS if cell.arm == "scratch_long" else 0
    checkpoint = pretrain(kind, cell.seed, leave_out=None if robot == TARGET else robot)
    dita(
        "finetune", str(checkpoint), f"data.stores=[{data}]", f"run={run}", f"shots={cell.shots}", f"steps={steps}",
        f"shots_seed={cell.subset}", f"seed={cell.seed}", f"method={cell.method}", f"statistics={statistics}",
        f"optim.lr={lr}", "batch_size=32", "augment.shift=3", "save_every=200", "keep_last=1", "replay=false",
        f"threads={Given.threads}",
        "--overwrite" if cell.shots == 0 else "--resume",
    )  # fmt: skip


def play(cell: Cell, run: Path, out: Path, starts: int, max_steps: int, robot: str = TARGET) -> dict:
    """Evaluate a finetuned policy on the fixed unseen starts."""
    name = embodiment(robot, cell.arm.startswith("joint"))
    words = ["env=robosuite", "env.tasks=[Lift]", f"env.embodiment={name}", f"env.max_steps={max_steps}"]
    dita(
        "eval", str(run), f"out={out}", *words, f"episodes={starts}", "videos=0", "n_envs=4", "batch_size=2", "--resume"
    )
    return json.loads((ROOT / out / "eval_info.json").read_text())


def run_cell(cell: Cell, difficulty: tuple[int, int], lr: float, starts: int = STARTS, folder: str = "cells") -> dict:
    """Do one cell and keep its result; what it trained is deleted."""
    steps, max_steps = difficulty
    kept = (KEPT if folder == "cells" else ROOT / OUT / folder) / f"{cell.name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    began, run, out = time.monotonic(), OUT / folder / cell.name, OUT / folder / f"{cell.name}_eval"
    finetune(cell, run, steps, lr)
    info = play(cell, run, out, starts, max_steps)
    episodes = [json.loads(line) for line in (ROOT / out / "episodes.jsonl").read_text().splitlines()]
    outcomes = [e["success"] for e in sorted(episodes, key=lambda e: e["index"])]
    result = {
        "cell": dataclasses.asdict(cell), "finetuning_steps": steps, "lr": lr, "max_steps": max_steps,
        "outcomes": outcomes, "successes": sum(outcomes), "starts": len(outcomes), "seconds": time.monotonic() - began,
        "fingerprint": info["fingerprint"],
    }  # fmt: skip
    kept.parent.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(result, indent=1))
    subprocess.run(["rm", "-rf", str(ROOT / run / "checkpoints")], check=True)
    return result


def calibrate(starts: int = 50) -> tuple[int, int] | None:
    """Choose the difficulty: the first at which from-scratch with 10 solves 20 to 70 %; None: there is none."""
    path = KEPT / "calibration.json"
    tried = json.loads(path.read_text()) if path.exists() else []
    for difficulty in DIFFICULTIES:
        found = next((t for t in tried if (t["steps"], t["max_steps"]) == difficulty), None)
        if found is None:
            steps, max_steps = difficulty
            cell = Cell("scratch", "full", 10, 0, 0)
            result = run_cell(cell, difficulty, CALIBRATION_RATE, starts, f"calibration_{steps}_{max_steps}")
            found = {"steps": steps, "max_steps": max_steps, "successes": result["successes"], "starts": starts}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps([*tried, found], indent=1))
            tried.append(found)
        if WANTED[0] <= found["successes"] / found["starts"] <= WANTED[1]:
            return difficulty
    return None


def rates(difficulty: tuple[int, int], robot: str = "ur5e", starts: int = 50) -> dict[str, float]:
    """Choose the learning rate of from-scratch and of each method on an arm that its own pretraining did not see.

    The first of those that solve most; what was tried is kept in learning_rates.json.
    """
    path = KEPT / "learning_rates.json"
    tried = json.loads(path.read_text()) if path.exists() else []
    for name, arm, method in (("scratch", "scratch", "full"), *((m, "pretrained", m) for m in METHODS)):
        for lr in TRIED:
            if any((t["name"], t["lr"]) == (name, lr) for t in tried):
                continue
            run, cell = OUT / "rates" / f"{name}_{lr:g}", Cell(arm, method, 10, 0, 0)
            finetune(cell, run, difficulty[0], lr, robot)
            info = play(cell, run, run.with_name(f"{run.name}_eval"), starts, difficulty[1], robot)
            tried.append({"name": name, "lr": lr, "successes": info["pooled"]["successes"], "starts": starts})
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(tried, indent=1))
    return best_rates(tried)


def best_rates(tried: Sequence[dict]) -> dict[str, float]:
    """Return the rate that solved most, by name; of equals the lowest."""
    ranked = sorted(tried, key=lambda t: (-t["successes"], t["lr"]))
    return {t["name"]: t["lr"] for t in reversed(ranked)}


# ---- what came out


def results(folder: Path) -> list[dict]:
    """Read the cells that are done."""
    wanted = {c.name for c in cells()}
    return [json.loads(p.read_text()) for p in sorted(folder.glob("*.json")) if p.stem in wanted]


def groups(done: Sequence[dict]) -> dict[tuple[str, str, int], list[list[list[bool]]]]:
    """Sort outcomes into (arm, method, shots) -> [training seed][subset][start]."""
    found: dict[tuple[str, str, int], dict[int, list[list[bool]]]] = {}
    for r in done:
        c = r["cell"]
        found.setdefault((c["arm"], c["method"], c["shots"]), {}).setdefault(c["seed"], []).append(r["outcomes"])
    return {key: [by_seed[s] for s in sorted(by_seed)] for key, by_seed in sorted(found.items())}


def page(done: Sequence[dict], before: Sequence[str] = ()) -> str:
    """Return the Markdown page of the cells that are done; the others are counted as missing.

    Args:
        before: paragraphs about what was fixed before the first cell.
    """
    lines = ["# Ten-shot transfer: robosuite Lift on a held-out IIWA", ""]
    lines += [f"{len(done)} of {len(cells())} cells are measured; `make transfer-lift` continues.", ""]
    lines += [line for paragraph in before for line in (paragraph, "")]
    if not done:
        return "\n".join([*lines, "No cell has been measured yet, so nothing is claimed."]) + "\n"
    lines += ["Rates over unseen starts; 95 % intervals by a hierarchical bootstrap over training seeds, demonstration",
              "subsets and starts. With one seed or subset the interval leaves their spread out.", "",
              "| arm | method | shots | seeds | subsets | starts | success | 95 % interval |",
              "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    found = groups(done)
    for (arm, method, shots), outcomes in found.items():
        low, high = hierarchical_bootstrap(outcomes, 0)
        flat = [x for seed in outcomes for subset in seed for x in subset]
        subsets = max(len(seed) for seed in outcomes)
        numbers = f"{len(outcomes)} | {subsets} | {len(flat)} | {np.mean(flat):.0%} | {low:.0%} .. {high:.0%}"
        lines.append(f"| {arm} | {method} | {shots} | {numbers} |")
    lines += ["", *_differences(found)]
    return "\n".join(lines) + "\n"


def fixed_before(folder: Path) -> list[str]:
    """Say how difficulty and learning rates were chosen, from their files."""
    paths = {name: folder / f"{name}.json" for name in ("calibration", "learning_rates")}
    found = {name: json.loads(path.read_text()) if path.exists() else [] for name, path in paths.items()}
    lines = [
        f"Difficulty: {t['steps']} finetuning steps and {t['max_steps']} control steps; from scratch with 10 "
        f"demonstrations of the IIWA (rate {CALIBRATION_RATE:g}): {t['successes']}/{t['starts']}."
        for t in found["calibration"]
    ]
    tried = [f"{t['name']} {t['lr']:g}: {t['successes']}/{t['starts']}" for t in found["learning_rates"]]
    chosen = ", ".join(f"{name} {lr:g}" for name, lr in best_rates(found["learning_rates"]).items())
    if tried:
        lines.append(f"Learning rates, tried on the UR5e held out: {'; '.join(tried)}. Best so far: {chosen}.")
    return lines


def _differences(found: dict[tuple[str, str, int], list[list[list[bool]]]]) -> Iterator[str]:
    for shots in SHOTS:
        scratch = found.get(("scratch", "full", shots))
        for method in METHODS:
            ours = found.get(("pretrained", method, shots))
            if scratch is None or ours is None:
                continue
            # a seed's outcomes over the subsets that both have played
            both = min(len(s) for s in [*scratch, *ours])
            a, b = (np.array([np.concatenate(seed[:both]) for seed in g], bool) for g in (scratch, ours))
            if min(len(a), len(b)) < 3:
                yield f"- {shots} shots, {method} against scratch: {len(b)} training seeds, too few to compare methods."
                continue
            m = compare_methods(a, b, EFFECT)
            yield (
                f"- {shots} shots, {method} against scratch: {m.difference:+.0%} "
                f"({m.interval[0]:+.0%} .. {m.interval[1]:+.0%}, p = {m.p:.2g}): "
                f"{m.verdict.replace('B', 'pretraining').replace('A', 'from scratch')}"
            )


def plot(done: Sequence[dict], path: Path) -> None:
    """Draw the learning curves: success over shots."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    found = groups(done)
    for arm, method in [("scratch", "full"), *(("pretrained", m) for m in METHODS)]:
        points = [(k, found[arm, method, k]) for k in SHOTS if (arm, method, k) in found]
        if not points:
            continue
        x = [k for k, _ in points]
        y = [float(np.mean([x for seed in o for subset in seed for x in subset])) for _, o in points]
        spans = np.array([hierarchical_bootstrap(o, 0) for _, o in points])
        label = "from scratch" if arm == "scratch" else f"pretrained, {method}"
        axes.errorbar(x, y, yerr=np.abs(spans.T - y), marker="o", capsize=3, label=label)
    if zero := found.get(("zero_shot", "full", 0)):
        rate = float(np.mean([x for seed in zero for subset in seed for x in subset]))
        axes.axhline(rate, ls=":", color="gray", label="zero-shot")
    axes.set(xlabel="demonstrations of the IIWA", ylabel="success", ylim=(0, 1), xticks=SHOTS)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_report() -> None:
    """Write page and plot."""
    done = results(KEPT)
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT.parent / "transfer_lift.md").write_text(page(done, fixed_before(KEPT)))
    if done:
        plot(done, KEPT.parent / "transfer_lift.png")


def main() -> None:
    """Run what is missing, within a budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--budget-minutes", type=float, default=float("inf"), help="stop after that; run again to go on"
    )
    parser.add_argument("--arms", nargs="*", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="*", type=int, choices=SEEDS, default=list(SEEDS))
    parser.add_argument("--threads", type=int, default=0, help="of a training; 0: all cores")
    parser.add_argument("--list", action="store_true", help="say what is done and what is missing")
    parser.add_argument("--report", action="store_true", help="only write the page")
    args = parser.parse_args()
    done = {Cell(**r["cell"]) for r in results(KEPT)}
    missing = [c for c in cells() if c not in done and c.arm in args.arms and c.seed in args.seeds]
    if args.list:
        print(f"{len(done)} cells are done, {len(missing)} are missing; next: {missing[0].name if missing else '-'}")
        return
    Given.end, Given.threads = time.monotonic() + 60 * args.budget_minutes, args.threads
    try:
        if not args.report:
            run_missing(missing)
    except BudgetOver:
        print("the budget is over; the same command continues")
    write_report()


def run_missing(missing: Sequence[Cell]) -> None:
    """Calibrate, choose learning rates, then run cells.

    Raises:
        BudgetOver: there is no time left.
        SystemExit: no difficulty suits.
    """
    difficulty = calibrate()
    if difficulty is None:
        raise SystemExit(f"no difficulty of {DIFFICULTIES} has from-scratch with 10 at 20 to 70 %: see {KEPT}")
    lr = rates(difficulty)
    for cell in missing:
        run_cell(cell, difficulty, lr["scratch" if "scratch" in cell.arm else cell.method])


if __name__ == "__main__":
    main()
