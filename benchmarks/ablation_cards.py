"""Train, play and compare the variants of a question, and write its card."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.ablation_questions import LANGUAGE_LONGER, LANGUAGE_TASKS, QUESTIONS, Budget, Question, Variant
from dita.cli import compose
from dita.compare import compare_outcomes, outcomes
from dita.config import EvalConfig
from dita.embodiment import load_embodiment
from dita.evaluate import evaluate, fingerprint, identity
from dita.policy.diffusion import Diffusion
from dita.policy.policy import DitaPolicy
from dita.statistics import LEVEL, MIN_SEEDS, compare_methods, compare_pairs, holm, rate

ROOT = Path(__file__).parent.parent
SMALLEST_EFFECT = 0.1  # declared beforehand: below it two methods are equivalent
PROBE_STEPS = 20  # after which a variant's time per step is read, for equal wall time


@dataclass(frozen=True)
class Line:
    """What a variant reached, and how it differs from the baseline."""

    name: str
    successes: int
    episodes: int
    interval: tuple[float, float]
    gained: int | None  # starts that it solves and the baseline, which has none of these, does not
    lost: int | None
    difference: float | None
    difference_interval: tuple[float, float] | None
    p: float | None
    p_holm: float | None
    verdict: str


def answer(name: str, budget: Budget) -> Path:
    """Train and play every variant of a question and write its card; what is there is kept.

    Raises:
        FileNotFoundError: no checkpoint, with what to run first.
        RuntimeError: a command failed; its own message stands above.
    """
    question = QUESTIONS[name]
    if question.language:
        budget = replace(budget, tasks=LANGUAGE_TASKS, steps=budget.steps * LANGUAGE_LONGER)
    steps: dict[str, int] = {}
    played = {}
    for variant in question.variants:
        steps[variant.name] = _steps(question, variant, budget)
        runs = _given(question, budget) or [_train(variant, s, steps[variant.name], budget) for s in budget.seeds]
        folders = [_folder(variant, Path(run), budget) for run in runs]
        for run, folder in zip(runs, folders, strict=True):
            _play(variant, Path(run), folder, budget)
        played[variant.name] = [str(folder) for folder in folders]
    moved = [v.name for v in question.variants if any(word.startswith("perturb.start=") for word in v.eval)]
    lines = compare_variants(played, same_checkpoints=not question.trained, moved=moved)
    return write_card(name, question, lines, budget, steps, played)


def _given(question: Question, budget: Budget) -> tuple[str, ...]:
    return () if question.trained or question.language else budget.checkpoints


def compare_variants(
    played: Mapping[str, Sequence[str]], *, same_checkpoints: bool = False, moved: Collection[str] = ()
) -> list[Line]:
    """Compare evaluations of several variants, one per training seed each, with those of the first variant.

    Args:
        played: folders by variant.
        same_checkpoints: the variants are ways to use the same checkpoints.
        moved: variants that begin elsewhere on purpose; their starts are paired by task and index.

    Raises:
        ValueError: they did not play the same starts.
    """
    found = {name: [outcomes(folder) for folder in folders] for name, folders in played.items()}
    (first, baseline), *others = found.items()
    for name, runs in found.items():
        for folder, run in zip(played[name], runs, strict=True):
            begun = {k: (baseline[0][k][0], won) for k, (_, won) in run.items()} if name in moved else run
            compare_outcomes(played[first][0], folder, baseline[0], begun)  # refuses starts that are not the same
    keys = sorted(baseline[0])
    wins = {name: np.array([[run[k][1] for k in keys] for run in runs], bool) for name, runs in found.items()}
    differences = {name: _difference(wins[first], wins[name], same_checkpoints) for name, _ in others}
    adjusted = holm({name: p for name, (_, _, p, _) in differences.items()})
    lines = [_line(first, wins[first], wins[first], None, None)]
    return lines + [_line(name, wins[first], wins[name], differences[name], adjusted[name]) for name, _ in others]


def _difference(
    a: np.ndarray, b: np.ndarray, same_checkpoints: bool
) -> tuple[float, tuple[float, float], float, float]:
    """Return difference b - a, its 95 % interval, p, and p that it is as large as SMALLEST_EFFECT.

    Between methods where there are seeds for it; else between these checkpoints, where nothing is called equivalent.
    """
    if len(a) >= MIN_SEEDS:
        methods = compare_methods(a, b, SMALLEST_EFFECT, same_checkpoints=same_checkpoints)
        return methods.difference, methods.interval, methods.p, methods.p_equivalent
    pairs = compare_pairs(a.ravel().tolist(), b.ravel().tolist())
    return pairs.difference, pairs.interval, pairs.p, 1.0


def _line(
    name: str,
    baseline: np.ndarray,
    wins: np.ndarray,
    difference: tuple[float, tuple[float, float], float, float] | None,
    p_holm: float | None,
) -> Line:
    r = rate(wins.ravel().tolist())
    if difference is None or p_holm is None:
        return Line(name, r.successes, r.episodes, r.interval, None, None, None, None, None, None, "baseline")
    value, interval, p, p_equivalent = difference
    verdict = "works" if value > 0 else "hurts"
    if p_holm > 1 - LEVEL:
        small = f", less than {100 * SMALLEST_EFFECT:.0f} points" if p_equivalent <= 1 - LEVEL else ""
        verdict = f"no detectable effect{small}"
    gained, lost = int((wins & ~baseline).sum()), int((baseline & ~wins).sum())
    return Line(name, r.successes, r.episodes, r.interval, gained, lost, value, interval, p, p_holm, verdict)


def write_card(
    name: str,
    question: Question,
    lines: Sequence[Line],
    budget: Budget,
    steps: Mapping[str, int],
    played: Mapping[str, Sequence[str]],
) -> Path:
    """Write docs/evidence/ablation_<name>.md and the JSON behind it."""
    seeds, given = len(next(iter(played.values()))), _given(question, budget)
    pairs = "trained apart for each variant" if question.trained else "whose checkpoints play every variant"
    what = f"{seeds} training seeds, {pairs}; clustered by training seed and start"
    if seeds < MIN_SEEDS:
        few = "1 training seed" if seeds == 1 else f"{seeds} training seeds"
        what = f"{few}: pairs by start, McNemar exact; it speaks about what was played here, not about the method"
    trained = (
        f"; {budget.demonstrations} demonstrations per task, {budget.steps} steps of {budget.batch_size} observations"
    )
    trained = f"; {', '.join(given)}" if given else trained
    if question.equal_time:
        trained += f" of the baseline and as long for the others ({', '.join(f'{k}: {n}' for k, n in steps.items())})"
    page = [
        f"# {question.text}", "",
        f"    {_command(name, question, budget)}", "",
        f"Tasks {', '.join(budget.tasks)}; {budget.episodes} unseen starts each, the same for all{trained}.", "",
        f"{what[0].upper()}{what[1:]}.", "",
        "| variant | success | 95 % | won, lost | against the first | 95 % interval | p | p (Holm) | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_row(line) for line in lines), "",
        f"**Verdict: {_verdict(lines)}**", "",
        "A null result says what so many pairs could have seen: read the interval of the difference. *Less than "
        f"{100 * SMALLEST_EFFECT:.0f} points* is said where two one-sided tests show it.", "",
    ]  # fmt: skip
    budget.page.mkdir(parents=True, exist_ok=True)
    folder = {variant: list(folders) for variant, folders in played.items()}
    values = {
        "question": question.text, "variants": [asdict(v) for v in question.variants],
        "lines": [asdict(line) for line in lines], "seeds": seeds if given else list(budget.seeds),
        "steps": dict(steps), "evaluations": folder, "fingerprint": fingerprint(),
    }  # fmt: skip
    (budget.page / f"ablation_{name}.json").write_text(json.dumps(values, indent=1, allow_nan=False) + "\n")
    card = budget.page / f"ablation_{name}.md"
    card.write_text("\n".join(page))
    return card


def _verdict(lines: Sequence[Line]) -> str:
    return "; ".join(f"{line.name}: {line.verdict}" for line in lines[1:])


def _row(line: Line) -> str:
    low, high = line.interval
    cells = [line.name, f"{line.successes}/{line.episodes}", f"{low:.1%} .. {high:.1%}"]
    if line.difference is None or line.difference_interval is None:
        return f"| {' | '.join([*cells, '', '', '', '', '', line.verdict])} |"
    low, high = line.difference_interval
    cells += [
        f"+{line.gained} -{line.lost}",
        f"{line.difference:+.1%}",
        f"{low:+.1%} .. {high:+.1%}",
        f"{line.p:.3g}",
        f"{line.p_holm:.3g}",
    ]
    return f"| {' | '.join([*cells, line.verdict])} |"


def _command(name: str, question: Question, budget: Budget) -> str:
    words = ["python", "-m", "benchmarks.ablations", name, "--episodes", str(budget.episodes)]
    words += [] if question.language else ["--tasks", *budget.tasks]
    if given := _given(question, budget):
        return shlex.join([*words, "--checkpoints", *given])
    steps = budget.steps // (LANGUAGE_LONGER if question.language else 1)
    words += ["--steps", str(steps), "--batch-size", str(budget.batch_size), "--seeds", *map(str, budget.seeds)]
    return shlex.join(words)


def _folder(variant: Variant, run: Path, budget: Budget) -> Path:
    """Return where a variant's evaluation goes: questions share what is the same."""
    how = [*(f"{key}={value}" for key, value in variant.sampler.items()), *variant.eval]
    return budget.out / "played" / "__".join(map(_slug, [str(run), *how]))


def _env(budget: Budget) -> list[str]:
    suite = "choice" if budget.tasks == LANGUAGE_TASKS else "metaworld"
    return [f"env={suite}", f"env.tasks=[{','.join(budget.tasks)}]"]


def _play(variant: Variant, run: Path, out: Path, budget: Budget) -> None:
    """Evaluate a variant's checkpoint; a finished evaluation is only read."""
    overrides = [*_env(budget), f"episodes={budget.episodes}", f"out={out}", "videos=0"]
    config = compose("eval", [*overrides, f"n_envs={budget.n_envs}", *variant.eval], EvalConfig)
    try:
        policy = DitaPolicy.from_pretrained(run, config.device)
    except FileNotFoundError as e:
        raise FileNotFoundError(f"{e}; `make demo` trains outputs/demo/train, or name others: --checkpoints") from None
    if variant.sampler:
        changed = replace(policy.diffusion.config, **variant.sampler)
        policy.diffusion = Diffusion(changed, policy.diffusion.alphas_cumprod)
    print(f"{variant.name}: {run}, {identity(policy)['sampler']}", flush=True)
    evaluate(policy, config, exist="resume", checkpoint=run)


def _steps(question: Question, variant: Variant, budget: Budget) -> int:
    """Return how many steps a variant is trained."""
    baseline = question.variants[0]
    if not question.equal_time or variant == baseline:
        return budget.steps
    ours, theirs = (_seconds_per_step(v, budget) for v in (baseline, variant))
    return max(1, round(budget.steps * ours / theirs))


def _train(variant: Variant, seed: int, steps: int, budget: Budget) -> str:
    """Train a variant with a seed and return the run folder."""
    run = _run(variant, budget, f"{steps}_seed{seed}")
    if not (run / "checkpoints" / f"{steps:07d}" / "train" / "manifest.json").exists():
        _dita("train", *_recipe(variant, budget), f"run={run}", f"seed={seed}", f"steps={steps}", "--resume")
    return str(run)


def _run(variant: Variant, budget: Budget, name: str) -> Path:
    what = "__".join(map(_slug, variant.train)) or "baseline"
    return budget.out / "trained" / f"{_tasks(budget)}_{what}_{name}"


def _recipe(variant: Variant, budget: Budget) -> list[str]:
    """Collect, where that was not done, and return what `dita train` is told."""
    store = budget.out / f"{_tasks(budget)}_{budget.demonstrations}.zarr"
    if not (store / "zarr.json").exists():
        _dita("collect", f"out={store}", *_env(budget), f"episodes={budget.demonstrations}", "--resume")
    size = load_embodiment(compose("eval", _env(budget), EvalConfig).env.embodiment).cameras[0].height
    return [
        f"experiment={budget.experiment}", f"data.stores=[{{path:{store},weight:1}}]", "threads=1",
        f"batch_size={budget.batch_size}", f"policy.vision.image_size={size}", *variant.train,
    ]  # fmt: skip


def _tasks(budget: Budget) -> str:
    return _slug("_".join(budget.tasks))


def _seconds_per_step(variant: Variant, budget: Budget) -> float:
    """Return a variant's wall time per training step, from a short run of its own."""
    run = _run(variant, budget, "probe")
    _dita("train", *_recipe(variant, budget), f"run={run}", f"steps={PROBE_STEPS}", "log_every=5", "seed=0", "--resume")
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return float(np.median([row["data_s"] + row["update_s"] for row in rows[1:]]))  # the first steps warm up


def _dita(*words: str) -> None:
    print("$ dita", shlex.join(words), flush=True)
    done = subprocess.run([sys.executable, "-m", "dita.cli", *words], cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"dita {words[0]} failed with exit code {done.returncode}; run this again: it continues")


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name)
