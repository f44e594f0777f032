"""The transfer experiment's bookkeeping: its cells, its page, what a budget stops, what shuffling keeps."""

from __future__ import annotations

import json
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import embodiment_dict
from test_finetune import episode, write_store

from benchmarks import transfer_lift as lift
from dita.datasets.store import Store
from dita.embodiment import embodiment_from_dict, embodiment_to_dict
from dita.normalize import fit
from dita.preprocess import Contract, extend_contract


def test_the_cells_are_the_experiment_and_what_decides_most_goes_first() -> None:
    found = lift.cells()
    assert len(set(found)) == len(found) == len({c.name for c in found})
    counts = Counter(c.arm for c in found)
    assert counts["pretrained"] == 4 * 3 * 3 * 5 and counts["scratch"] == 4 * 3 * 5 and counts["zero_shot"] == 3
    assert all(counts[arm] == 15 for arm in lift.CONTROLS) and len(lift.CONTROLS) == 8
    first = found[: 2 * 3 * 5]
    assert {(c.arm, c.method, c.shots) for c in first} == {("scratch", "full", 10), ("pretrained", "full", 10)}
    # three seeds, which a comparison of methods needs, are done before the next subset begins
    assert [c.subset for c in first] == [k for k in range(5) for _ in range(6)]
    then = found[len(first) : len(first) + 3 * (6 + 1 + 8 + 8)]
    assert {c.arm for c in then} == set(lift.ARMS) and {c.subset for c in then} == {0}
    assert all(c.method == "full" for c in then[:21]) and {c.arm for c in then[-24:]} == set(lift.CONTROLS)


def result(cell: lift.Cell, outcomes: list[bool]) -> dict:
    return {"cell": {k: getattr(cell, k) for k in ("arm", "method", "shots", "seed", "subset")}, "outcomes": outcomes}


def test_the_page_says_what_was_measured_and_no_more(tmp_path) -> None:
    assert "nothing is claimed" in lift.page([])
    one = [result(lift.Cell("scratch", "full", 10, 0, 0), [True] * 4 + [False] * 6)]
    text = lift.page(one)
    assert "| scratch | full | 10 | 1 | 1 | 10 | 40% |" in text and "against" not in text
    good, poor = [True] * 9 + [False], [True] * 2 + [False] * 8
    done = [result(lift.Cell("scratch", "full", 10, s, 0), poor[s:] + poor[:s]) for s in range(3)]
    done += [result(lift.Cell("pretrained", "lora", 10, s, 0), good[s:] + good[:s]) for s in range(3)]
    text = lift.page(done)
    assert "- 10 shots, lora against scratch: +70%" in text and "pretraining is better" in text
    assert "too few to compare methods" in lift.page(done[:-1])
    for r in done:
        (tmp_path / f"{lift.Cell(**r['cell']).name}.json").write_text(json.dumps(r))
    (tmp_path / "calibration.json").write_text("[]")
    assert len(lift.results(tmp_path)) == 6
    lift.plot(done, tmp_path / "curve.png")
    assert (tmp_path / "curve.png").stat().st_size > 5000


def test_what_was_fixed_before_is_on_the_page(tmp_path) -> None:
    tried = [("scratch", 3e-4, 10), ("scratch", 1e-3, 20), ("scratch", 3e-3, 20), ("full", 1e-3, 9)]
    records = [{"name": name, "lr": lr, "successes": n, "starts": 50} for name, lr, n in tried]
    assert lift.best_rates(records) == {"scratch": 1e-3, "full": 1e-3} and lift.best_rates([]) == {}
    assert lift.fixed_before(tmp_path) == []
    (tmp_path / "learning_rates.json").write_text(json.dumps(records))
    (tmp_path / "calibration.json").write_text(
        json.dumps([{"steps": 400, "max_steps": 200, "successes": 19, "starts": 50}])
    )
    text = lift.page([], lift.fixed_before(tmp_path))
    assert "400 finetuning steps" in text and "19/50" in text and "scratch 0.003: 20/50" in text
    assert "Best so far: full 0.001, scratch 0.001." in text and "nothing is claimed" in text


def test_rates_are_tried_once_and_before_the_first_cell(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lift, "KEPT", tmp_path)
    events = []
    info = {"pooled": {"successes": 5}}
    monkeypatch.setattr(lift, "calibrate", lambda: (400, 200))
    monkeypatch.setattr(lift, "finetune", lambda cell, run, steps, lr, robot: events.append((robot, cell.method, lr)))
    monkeypatch.setattr(lift, "play", lambda *args: info)
    monkeypatch.setattr(lift, "run_cell", lambda cell, difficulty, lr: events.append((cell.arm, cell.method, lr)))
    lift.run_missing(lift.cells()[:2])
    assert [e[0] for e in events] == ["ur5e"] * 4 * len(lift.TRIED) + ["scratch", "pretrained"]
    assert events[-1] == ("pretrained", "full", lift.TRIED[0])  # all the same: the lowest
    events.clear()
    lift.run_missing([])
    assert events == []


def test_a_budget_stops_what_runs(monkeypatch) -> None:
    monkeypatch.setattr(lift.Given, "end", lift.time.monotonic() + 1.0)
    monkeypatch.setattr(sys, "executable", "/bin/sleep")
    ran = []

    class Sleep(lift.subprocess.Popen):
        def __init__(self, words, **options) -> None:
            ran.append(words)
            super().__init__(["/bin/sleep", "60"], **options)

    monkeypatch.setattr(lift.subprocess, "Popen", Sleep)
    with pytest.raises(lift.BudgetOver):
        lift.dita("train")
    with pytest.raises(lift.BudgetOver):
        lift.dita("eval")
    assert len(ran) == 1  # nothing begins when the time is over


def test_shuffled_actions_keep_the_marginals_only(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(lift, "ROOT", tmp_path)
    spec = embodiment_from_dict(embodiment_dict())
    path = write_store(tmp_path / "panda.zarr", spec, [episode(i, spec) for i in range(3)])
    before, after = Store(path), Store(tmp_path / lift.shuffle(path.relative_to(tmp_path)))
    a, b = (np.concatenate([s.action(i) for i in range(3)]) for s in (before, after))
    assert not np.array_equal(a, b) and sorted(map(tuple, a)) == sorted(map(tuple, b))
    assert all(np.array_equal(before.state(i), after.state(i)) for i in range(3))


def test_the_joint_variants_arms_share_their_fields() -> None:
    arms = {r: lift.joint_embodiment(r) for r in (*lift.ROBOTS, lift.TARGET)}
    rng = np.random.default_rng(0)
    assert [f.size for f in arms["ur5e"].action] == [6, 1]
    for spec in arms.values():
        assert embodiment_from_dict(embodiment_to_dict(spec)) == spec
    stats = {
        s.name: fit(s, [tuple(rng.normal(size=(9, n)).astype(np.float32) for n in (s.state_dim, s.action_dim))])
        for r, s in arms.items()
        if r != lift.TARGET
    }
    specs = {s.name: s for r, s in arms.items() if r != lift.TARGET}
    preprocess = {"state_dim": 17, "action_dim": 8, "cameras": 2, "normalization": "min_max"}
    _, origins = extend_contract(Contract(preprocess, specs, stats), arms[lift.TARGET], None, "pretrained")
    like = {o.part: o.like for o in origins}
    assert like["action.joint_delta"] == like["state.joints"] == ("robosuite_kinova3_joint", "robosuite_panda_joint")
