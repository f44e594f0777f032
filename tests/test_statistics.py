"""Rates and differences: exact where a formula is, and simulated where only the long run tells."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar as statsmodels_mcnemar

from dita.cli import main
from dita.compare import compare_groups, compare_outcomes
from dita.statistics import (
    Sequential,
    bootstrap_macro,
    compare_methods,
    compare_pairs,
    hierarchical_bootstrap,
    holm,
    mcnemar,
    mcnemar_power,
    tango,
)


def pairs(both: int, a_only: int, b_only: int, neither: int) -> tuple[list[bool], list[bool]]:
    a = [True] * (both + a_only) + [False] * (b_only + neither)
    b = [True] * both + [False] * a_only + [True] * b_only + [False] * neither
    return a, b


@pytest.fixture(autouse=True)
def wide(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_is_statsmodels_exact_test(a_only, b_only) -> None:
    table = [[5, a_only], [b_only, 5]]
    assert mcnemar(a_only, b_only) == pytest.approx(statsmodels_mcnemar(table, exact=True).pvalue)


@given(st.integers(1, 80), st.data())
def test_tangos_limits_are_where_the_score_test_just_accepts(n, data) -> None:
    b_only = data.draw(st.integers(0, n))
    a_only = data.draw(st.integers(0, n - b_only))
    low, high = tango(n, b_only, a_only)
    estimate = (b_only - a_only) / n
    assert -1 <= low <= estimate + 1e-6 and estimate - 1e-6 <= high <= 1
    assert tango(n, a_only, b_only) == pytest.approx((-high, -low), abs=1e-6)
    if a_only == b_only == 0:
        z2 = stats.norm.ppf(0.975) ** 2
        assert high == pytest.approx(z2 / (n + z2), abs=1e-6), "the closed form without discordant pairs"


def test_tangos_interval_covers_what_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        drawn = rng.multinomial(60, [0.5, 0.1, 0.25, 0.15])
        low, high = tango(60, int(drawn[2]), int(drawn[1]))
        covered += low <= 0.15 <= high
    assert 0.935 <= covered / 2000 <= 0.97


def test_power_is_that_of_the_test_played_out() -> None:
    assert mcnemar_power(50, 0.5, 0.7) == pytest.approx(0.44, abs=0.005)
    assert mcnemar_power(150, 0.5, 0.7) == pytest.approx(0.93, abs=0.005)
    rng = np.random.default_rng(1)
    a, b = rng.random((2000, 60)) < 0.3, rng.random((2000, 60)) < 0.6
    found = np.mean([mcnemar(int((x & ~y).sum()), int((y & ~x).sum())) <= 0.05 for x, y in zip(a, b, strict=True)])
    assert mcnemar_power(60, 0.3, 0.6) == pytest.approx(found, abs=0.03)
    assert mcnemar_power(60, 0.0, 0.0) == 0


@pytest.mark.parametrize(
    ("table", "verdict"),
    [
        ((20, 0, 10, 20), "B is better"),
        ((20, 12, 1, 20), "A is better"),
        ((20, 5, 8, 20), "not distinguishable"),
        ((50, 0, 0, 0), "not distinguishable"),
    ],
)
def test_verdicts_say_no_more_than_the_test(table, verdict) -> None:
    found = compare_pairs(*pairs(*table))
    assert found.verdict == verdict
    assert found.difference == pytest.approx((table[2] - table[1]) / sum(table))
    assert (found.pairs, found.a_only, found.b_only) == (sum(table), table[1], table[2])


def test_two_evaluations_of_one_policy_with_other_noise_rarely_differ() -> None:
    """A/A: 1,000 comparisons of equals, whose starts are not equally hard, reject at most at the stated rate."""
    rng = np.random.default_rng(2)
    rejected = 0
    for _ in range(1000):
        hard = rng.beta(2, 2, 100)  # of each start
        a, b = rng.random(100) < hard, rng.random(100) < hard
        rejected += mcnemar(int((a & ~b).sum()), int((b & ~a).sum())) <= 0.05
    assert rejected <= 50


def test_looking_after_every_pair_does_not_raise_the_error() -> None:
    rng = np.random.default_rng(3)
    decided = 0
    for _ in range(1000):
        watched = Sequential(200)
        while not watched.stopped:
            watched.add(bool(rng.random() < 0.5), bool(rng.random() < 0.5))
        decided += watched.decided
    assert decided <= 50
    peeking = 0
    for _ in range(100):
        a, b = rng.random(200) < 0.5, rng.random(200) < 0.5
        lost, won = np.cumsum(a & ~b), np.cumsum(b & ~a)
        peeking += any(mcnemar(int(lost[i]), int(won[i])) <= 0.05 for i in range(20, 200, 5))
    assert peeking / 100 > 0.1, "the fixed test, looked at as often, would"


def test_a_real_difference_stops_early_and_says_which() -> None:
    watched = Sequential(500)
    while not watched.stopped:
        watched.add(False, True)
    assert watched.verdict == "B is better" and watched.pairs < 15
    undecided = Sequential(3)
    undecided.add(True, True)
    assert undecided.verdict == "undecided" and undecided.e == 1.0
    undecided.add(True, True)
    undecided.add(False, False)
    assert undecided.verdict == "not distinguishable"


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.2])
def test_methods_that_differ_only_in_their_seeds_are_rarely_told_apart(spread) -> None:
    rng = np.random.default_rng(4)

    def method() -> np.ndarray:
        seeds, starts = rng.normal(0, spread, (3, 1)), 0.2 * rng.normal(size=(1, 100))
        return rng.random((3, 100)) < np.clip(0.5 + seeds + starts, 0, 1)

    rejected = sum(compare_methods(method(), method(), 0.1).p <= 0.05 for _ in range(500))
    assert rejected <= 0.07 * 500


@pytest.mark.parametrize("spread", [0.0, 0.2])
def test_what_a_checkpoint_brings_cancels_where_it_is_used_in_two_ways(spread) -> None:
    rng = np.random.default_rng(7)

    def pair(effect: float, taste: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        chance = 0.5 + rng.normal(0, spread, (3, 1)) + 0.2 * rng.normal(size=(1, 100))
        other = chance + effect + rng.normal(0, taste, (3, 1))  # taste: how much checkpoints differ in liking it
        draw = rng.random((3, 100))  # most starts end the same way twice
        again = np.where(rng.random((3, 100)) < 0.2, rng.random((3, 100)), draw)
        return draw < np.clip(chance, 0, 1), again < np.clip(other, 0, 1)

    for taste in (0.0, 0.1):
        pairs = [pair(0.0, taste) for _ in range(500)]
        assert sum(compare_methods(*p, 0.1, same_checkpoints=True).p <= 0.05 for p in pairs) <= 0.07 * 500
    pairs = [pair(0.15) for _ in range(100)]
    seen = {
        same: sum(compare_methods(*p, 0.1, same_checkpoints=same).p <= 0.05 for p in pairs) for same in (True, False)
    }
    assert seen[True] > 60 and seen[True] > seen[False] + (30 if spread else -10)
    with pytest.raises(ValueError, match="as many on both sides, got 3 and 4"):
        compare_methods(pairs[0][0], np.zeros((4, 100), bool), 0.1, same_checkpoints=True)


def test_pooling_the_episodes_of_seeds_would_see_what_is_not_there() -> None:
    rng = np.random.default_rng(5)
    pooled = 0
    for _ in range(200):
        a, b = (rng.random((3, 100)) < np.clip(0.5 + rng.normal(0, 0.15, (3, 1)), 0, 1) for _ in range(2))
        pooled += mcnemar(int((a & ~b).sum()), int((b & ~a).sum())) <= 0.05
    assert pooled / 200 > 0.3, "why compare_methods exists"


def test_methods_are_better_equivalent_or_neither() -> None:
    rng = np.random.default_rng(6)
    low, high = rng.random((4, 200)) < 0.3, rng.random((4, 200)) < 0.7
    assert compare_methods(low, high, 0.1).verdict == "B is better"
    assert compare_methods(high, low, 0.1).verdict == "A is better"
    starts = rng.random(400) < 0.5
    same = np.tile(starts, (5, 1))
    almost = same ^ (rng.random((5, 400)) < 0.02)
    assert compare_methods(same, almost, 0.1).verdict == "equivalent"
    assert compare_methods(same, same, 0.1).verdict == "equivalent"
    few = rng.random((3, 10)) < 0.5
    assert compare_methods(few, rng.random((3, 10)) < 0.6, 0.05).verdict == "not distinguishable"
    with pytest.raises(ValueError, match="at least 3 training seeds, got 2 and 3"):
        compare_methods(few[:2], few, 0.1)
    with pytest.raises(ValueError, match="smallest_effect"):
        compare_methods(few, few, 0.0)


def test_holm_steps_down() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert holm({}) == {}


def test_bootstraps_widen_with_the_groups_that_differ() -> None:
    low, high = bootstrap_macro([[True] * 10 + [False] * 10, [True] * 20], 0)
    assert low < 0.75 < high and high - low < 0.25
    alike = [[[True, False] * 10] * 5] * 3
    apart = [[[True] * 20] * 5, [[True, False] * 10] * 5, [[False] * 20] * 5]
    narrow, wide = hierarchical_bootstrap(alike, 0, 2000), hierarchical_bootstrap(apart, 0, 2000)
    assert wide[1] - wide[0] > 3 * (narrow[1] - narrow[0])
    assert hierarchical_bootstrap(alike, 0, 500) == hierarchical_bootstrap(alike, 0, 500)


# ---- folders


def evaluation(folder, wins: dict[str, list[bool]], starts: str = "s") -> str:
    folder.mkdir(parents=True)
    lines = [
        {"task": task, "index": i, "seed": i, "success": won, "steps": 1, "reason": "success", "replans": 1,
         "start_hash": f"{starts}{task}{i}", "latency": [0.1], "warnings": {}}
        for task, row in wins.items() for i, won in enumerate(row)
    ]  # fmt: skip
    (folder / "episodes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines) + '{"cut')
    return str(folder)


def test_compare_prints_and_writes_what_was_found(tmp_path, capsys) -> None:
    a = evaluation(tmp_path / "a", {"push": [True] * 5 + [False] * 25, "pull": [True] * 30})
    b = evaluation(tmp_path / "b", {"push": [True] * 25 + [False] * 5, "pull": [True] * 30})
    assert main(["compare", a, b, "--json", str(tmp_path / "compare.json")]) == 0
    printed = capsys.readouterr().out
    assert "B is better" in printed and "not distinguishable" in printed and "power" in printed
    written = json.loads((tmp_path / "compare.json").read_text())
    assert written["tasks"]["push"]["verdict"] == written["pooled"]["verdict"] == "B is better"
    assert written["p_holm"]["push"] == pytest.approx(2 * written["tasks"]["push"]["p"])
    assert written["tasks"]["pull"]["difference"] == 0


def test_other_starts_are_refused_by_name(tmp_path, capsys) -> None:
    a = evaluation(tmp_path / "a", {"push": [True] * 3})
    fewer = evaluation(tmp_path / "fewer", {"push": [True] * 2})
    other = evaluation(tmp_path / "other", {"push": [True] * 3}, starts="t")
    assert main(["compare", a, fewer]) == 1
    assert "only one has push 2" in capsys.readouterr().err
    assert main(["compare", a, other]) == 1
    assert "differ in the start of push 0" in capsys.readouterr().err
    assert main(["compare", a, str(tmp_path / "none")]) == 1
    assert "is an evaluation and the other is not" in capsys.readouterr().err
    assert main(["compare", a, a, "--maximum", "10"]) == 1
    assert "evaluations already" in capsys.readouterr().err


def test_methods_take_a_folder_per_seed(tmp_path, capsys) -> None:
    rng = np.random.default_rng(0)
    a = [evaluation(tmp_path / f"a{i}", {"push": (rng.random(40) < 0.2).tolist()}) for i in range(3)]
    b = [evaluation(tmp_path / f"b{i}", {"push": (rng.random(40) < 0.8).tolist()}) for i in range(3)]
    assert compare_groups(a, b, 0.1).verdict == "B is better"
    assert main(["compare", "--methods", ",".join(a), ",".join(b), "--json", str(tmp_path / "m.json")]) == 0
    assert json.loads((tmp_path / "m.json").read_text())["verdict"] == "B is better"
    assert "3 and 3 training seeds" in capsys.readouterr().out
    assert main(["compare", "--methods", ",".join(a[:2]), ",".join(b)]) == 1
    assert "at least 3 training seeds" in capsys.readouterr().err


def test_sequential_evidence_is_reported(tmp_path) -> None:
    watched = Sequential(10)
    a = {("push", i): (f"h{i}", False) for i in range(10)}
    b = {("push", i): (f"h{i}", True) for i in range(10)}
    while not watched.stopped:
        watched.add(False, True)
    found = compare_outcomes("a", "b", a, b, watched)
    assert found.sequential is not None and found.sequential["verdict"] == "B is better"
    assert found.to_dict()["pooled"]["verdict"] == "B is better"
