"""Ablations: what a card claims from made-up episodes, and what is trained and played for it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import ablation_cards
from benchmarks.ablation_cards import answer, compare_variants
from benchmarks.ablation_questions import QUESTIONS, Budget
from benchmarks.ablations import TASKS, main
from dita.cli import compose
from dita.config import EvalConfig, TrainConfig


def budget(tmp_path: Path, **changes) -> Budget:
    values = {
        "tasks": TASKS, "episodes": 40, "seeds": (0,), "steps": 600, "batch_size": 64, "demonstrations": 60,
        "experiment": "demo", "checkpoints": (), "out": tmp_path / "out", "page": tmp_path / "page", "n_envs": 2,
    }  # fmt: skip
    return Budget(**(values | changes))


def played(folder: Path, solved: int, starts: int = 80, place: str = "h") -> str:
    folder.mkdir(parents=True)
    lines = [
        {"task": TASKS[i % 2], "index": i, "seed": i, "start_hash": f"{place}{i}", "success": i < solved, "reason": "x",
         "steps": 9, "replans": 1, "latency": [0.1], "warnings": {}} for i in range(starts)
    ]  # fmt: skip
    (folder / "episodes.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_verdicts_follow_from_pairs_and_are_corrected_for_asking_twice(tmp_path):
    solved = {"base": 60, "better": 80, "as good": 58, "a little worse": 54, "worse": 30}
    lines = compare_variants({name: [played(tmp_path / name, n)] for name, n in solved.items()})
    assert [line.verdict for line in lines] == ["baseline", "works", "no detectable effect", "no detectable effect",
                                                "hurts"]  # fmt: skip
    little = lines[3]
    assert little.p is not None and little.p_holm is not None and little.p < 0.05 < little.p_holm  # 6 to 0 of 4 asked
    assert (little.successes, little.episodes, little.difference) == (54, 80, -6 / 80)
    assert (little.gained, little.lost, lines[1].gained, lines[1].lost) == (0, 6, 20, 0)
    assert lines[0].difference is None and lines[0].interval == pytest.approx((0.645, 0.831), abs=1e-3)


def test_three_seeds_speak_about_methods(tmp_path):
    runs = {name: [played(tmp_path / f"{name}{seed}", n + seed) for seed in range(3)] for name, n in
            {"base": 20, "better": 70}.items()}  # fmt: skip
    one, three = compare_variants({name: r[:1] for name, r in runs.items()}), compare_variants(runs)
    assert three[1].verdict == one[1].verdict == "works" and three[1].episodes == 240
    assert three[1].p != one[1].p
    runs["hardly other"] = [played(tmp_path / f"c{seed}", 20 + seed + (seed == 1)) for seed in range(3)]
    lines = compare_variants({name: runs[name] for name in ("base", "hardly other")}, same_checkpoints=True)
    assert lines[1].verdict == "no detectable effect, less than 10 points" and lines[1].gained == 1


def test_starts_that_differ_are_refused(tmp_path):
    with pytest.raises(ValueError, match="did not play the same starts"):
        compare_variants({"a": [played(tmp_path / "a", 4)], "b": [played(tmp_path / "b", 4, starts=78)]})
    elsewhere = {"a": [str(tmp_path / "a")], "c": [played(tmp_path / "c", 5, place="moved")]}
    with pytest.raises(ValueError, match="differ in the start of"):
        compare_variants(elsewhere)
    assert compare_variants(elsewhere, moved=["c"])[1].gained == 1


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_variant_is_made_of_keys_that_exist(name):
    question = QUESTIONS[name]
    assert len({v.name for v in question.variants}) == len(question.variants) > 1
    for variant in question.variants:
        compose("eval", variant.eval, EvalConfig)
        config = compose("train", ["experiment=demo", *variant.train], TrainConfig)
        assert set(variant.sampler) <= set(vars(config.diffusion))
    assert len({(v.eval, v.train, str(v.sampler)) for v in question.variants}) == len(question.variants)
    first = question.variants[0]
    assert first.train == () and first.sampler == {}  # what we ship


def option(words: tuple[str, ...], key: str) -> str:
    return next(w for w in words if w.startswith(f"{key}="))[len(key) + 1 :]


@pytest.fixture
def done(monkeypatch):
    """Commands that would have been given, and (variant, run folder, evaluation) that would have been played."""
    commands, plays = [], []

    def dita(*words: str) -> None:
        commands.append(words)
        if "log_every=5" in words:  # a probe of speed: K = 8 takes twice as long
            run = Path(option(words, "run"))
            run.mkdir(parents=True, exist_ok=True)
            update = 0.4 if "noise_samples_per_context=8" in words else 0.2
            rows = [{"step": 5, "data_s": 9.0, "update_s": 9.0}, {"step": 10, "data_s": 0.0, "update_s": update}]
            (run / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def play(variant, run, out, budget) -> None:
        plays.append((variant.name, run, out))
        if not out.exists():
            played(out, 60 if variant.name in ("K = 4", "leading") else 30)

    monkeypatch.setattr(ablation_cards, "_dita", dita)
    monkeypatch.setattr(ablation_cards, "_play", play)
    return commands, plays


def test_a_card_is_written_from_what_was_trained_and_played(tmp_path, done):
    commands, plays = done
    card = answer("noise_samples", budget(tmp_path)).read_text()
    trained = [words for words in commands if words[0] == "train" and "log_every=5" not in words]
    samples = [next((w[-1] for w in words if w.startswith("noise_samples")), "4") for words in trained]
    # K = 8 takes twice as long, so it gets half as many steps
    assert dict(zip(samples, [option(words, "steps") for words in trained], strict=True)) == {
        "4": "600", "1": "600", "8": "300",
    }  # fmt: skip
    assert [(name, str(run)) for name, run, _ in plays] == [
        (f"K = {k}", option(words, "run")) for k, words in zip((4, 1, 8), trained, strict=True)
    ]
    assert "**Verdict: K = 1: hurts; K = 8: hurts**" in card and "K = 4: 600, K = 1: 600, K = 8: 300" in card
    assert (
        "| K = 8 | 30/80 | 27.7% .. 48.5% | +0 -30 | -37.5% |" in card
        and "--steps 600 --batch-size 64 --seeds 0" in card
    )
    values = json.loads((tmp_path / "page" / "ablation_noise_samples.json").read_text())
    assert values["lines"][1]["verdict"] == "hurts" and values["fingerprint"]["versions"]["torch"]


def test_questions_share_what_is_the_same(tmp_path, done):
    commands, plays = done
    for name in ("n_action_steps", "ensembling", "state_tokens", "frames"):
        answer(name, budget(tmp_path, seeds=(0, 1)))
    runs = {option(words, "run") for words in commands if words[0] == "train"}
    assert len(runs) == 2 * (1 + 1 + 2)  # baseline, no state, 1 and 4 frames; of two seeds each
    outs = [out for *_, out in plays]
    assert len(set(outs)) == 2 * (4 + 2 + 1 + 2) and len(outs) == 2 * (4 + 3 + 2 + 3)


def test_what_is_trained_is_not_begun_again(tmp_path, done):
    commands, _ = done
    answer("state_tokens", budget(tmp_path))
    for run in {option(words, "run") for words in commands if words[0] == "train"}:
        manifest = Path(run) / "checkpoints" / "0000600" / "train" / "manifest.json"
        manifest.parent.mkdir(parents=True)
        manifest.touch()
    commands.clear()
    answer("state_tokens", budget(tmp_path))
    assert [words[0] for words in commands if words[0] == "train"] == []


def test_a_checkpoint_that_is_there_is_asked_what_needs_no_training(tmp_path, done):
    commands, plays = done
    given = budget(tmp_path, checkpoints=("outputs/demo/train",))
    card = answer("spacing", given).read_text()
    assert not commands and {run for _, run, _ in plays} == {Path("outputs/demo/train")}
    assert "--checkpoints outputs/demo/train" in card and "--steps" not in card
    answer("state_tokens", given)
    assert [words[0] for words in commands].count("train") == 2 and len(plays) == 4


def test_variants_are_compared_as_what_they_are(tmp_path, done, monkeypatch):
    asked = {}

    def compare(played, **how):
        asked[len(asked)] = how
        return [ablation_cards.Line("x", 1, 2, (0.0, 1.0), None, None, None, None, None, None, "baseline")]

    monkeypatch.setattr(ablation_cards, "compare_variants", compare)
    for name in ("spacing", "frames", "robustness"):
        answer(name, budget(tmp_path))
    assert [how["same_checkpoints"] for how in asked.values()] == [True, False, True]
    assert [how["moved"] for how in asked.values()] == [[], [], ["hand starts up to 3 cm away"]]


def test_language_is_asked_where_the_sentence_decides(tmp_path, done):
    commands, _ = done
    card = answer("language", budget(tmp_path, checkpoints=("outputs/demo/train",))).read_text()
    collect, trained = commands[0], [words for words in commands if words[0] == "train"]
    assert "env=choice" in collect and option(collect, "env.tasks") == "[touch-red,touch-green,touch-blue]"
    assert {option(words, "policy.vision.image_size") for words in trained} == {"64"}  # of its camera
    assert {option(words, "steps") for words in trained} == {"3000"}
    assert "Tasks touch-red, touch-green, touch-blue" in card and "--tasks" not in card and "--steps 600" in card


def test_simulators_do_not_wait_for_torch():
    # each of them imports the file that was started
    code = "import sys, benchmarks.ablations; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_what_does_not_exist_is_refused(capsys):
    for words, said in (
        (["colour"], "no question colour; there are spacing"),
        (["--tasks", "reach-v3"], "two or more"),
    ):
        with pytest.raises(SystemExit):
            main(words)
        assert said in capsys.readouterr().err
