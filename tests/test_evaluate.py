"""Evaluation: intervals, files, continuation, baselines; and the machine report."""

from __future__ import annotations

import json
import math
import os
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import make_policy
from hypothesis import given
from hypothesis import strategies as st

from dita import machine
from dita.config import EnvConfig, EvalConfig, PerturbConfig
from dita.embodiment import load_embodiment
from dita.envs import gl
from dita.envs.ensemble import Ensemble
from dita.envs.fanout import Share
from dita.envs.rollout import EpisodeResult
from dita.evaluate import Expert, Zero, evaluate, fingerprint, identity, summarise
from dita.lock import held

gl.select_backend()

BUTTON, REACH = "button-press-topdown-v3", "reach-v3"
SPEC = load_embodiment("metaworld_sawyer")
UNCHANGED = PerturbConfig(0, "given", 0.0, 0.0, 0.0, 0.0, 0.0)


def eval_config(tmp_path: Path, **changes) -> EvalConfig:
    env = EnvConfig("metaworld", "metaworld_sawyer", (BUTTON, REACH), max_steps=120, fast_render=True)
    config = EvalConfig(
        str(tmp_path / "eval"), env, episodes=2, seed=1_000_000, n_envs=2, batch_size=4, n_action_steps=None,
        num_inference_steps=None, temporal_ensembling=None, videos=1, device="cpu", threads=1, guard=False,
        perturb=UNCHANGED, ray=None, ray_workers=2,
    )  # fmt: skip
    return replace(config, **changes)


def episode(task: str, index: int, success: bool, latency: tuple[float, ...] = (0.1,)) -> EpisodeResult:
    reason = "success" if success else "max_steps"
    return EpisodeResult(task, index, index, f"hash{index}", success, reason, 10, 1, latency, {})


def outcomes(result) -> list[EpisodeResult]:
    return [replace(e, latency=()) for e in result.episodes]


def wilson(k: int, n: int) -> tuple[float, float]:
    """The interval from its defining equation |p_hat - p| = z sqrt(p (1 - p) / n)."""
    z, p = 1.959963984540054, k / n
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)


@given(st.integers(0, 60), st.integers(1, 60))
def test_rates_carry_wilson_intervals(k, n):
    k = min(k, n)
    result = summarise([episode("a", i, i < k) for i in range(n)])
    rate = result.tasks["a"]
    assert (rate.episodes, rate.successes, rate.success_rate) == (n, k, k / n)
    np.testing.assert_allclose(rate.interval, wilson(k, n), atol=1e-9)
    assert result.pooled == rate
    np.testing.assert_allclose(result.macro.interval, rate.interval, atol=1e-12)  # one task: MOVER is Wilson


def test_the_macro_mean_weighs_tasks_not_episodes():
    result = summarise([episode("a", i, True) for i in range(30)] + [episode("b", i, False) for i in range(10)])
    assert (result.pooled.success_rate, result.macro.success_rate) == (0.75, 0.5)
    low, high = result.macro.interval
    (a_low, _), (_, b_high) = wilson(30, 30), wilson(0, 10)
    assert low == pytest.approx(0.5 - (1 - a_low) / 2) and high == pytest.approx(0.5 + b_high / 2)


def test_latency_is_over_all_policy_calls():
    result = summarise([episode("a", 0, True, (0.1, 0.3)), episode("a", 1, False, (0.2,))])
    assert result.latency == pytest.approx((0.2, 0.298))


def test_expert_and_zero_bound_the_scale_and_write_every_file(tmp_path):
    config = eval_config(tmp_path)
    result = evaluate(Expert(), config, exist="error")
    assert [(t, r.successes, r.episodes) for t, r in result.tasks.items()] == [(BUTTON, 2, 2), (REACH, 2, 2)]
    assert [(e.task, e.index, e.seed) for e in result.episodes] == [
        (task, i, 1_000_000 + i) for task in (BUTTON, REACH) for i in (0, 1)
    ]
    info = json.loads((tmp_path / "eval" / "eval_info.json").read_text())
    assert info["tasks"][REACH]["interval"] == pytest.approx(wilson(2, 2))
    assert (info["distinct_starts"], info["reasons"], info["policy"]) == (4, {"success": 4}, {"name": "expert"})
    assert info["config"]["env"]["tasks"] == [BUTTON, REACH] and info["fingerprint"]["versions"]["mujoco"]
    videos = sorted(p.relative_to(tmp_path / "eval").as_posix() for p in (tmp_path / "eval").rglob("*.mp4"))
    assert videos == [f"videos/{task}/episode_0_success.mp4" for task in (BUTTON, REACH)]
    assert len((tmp_path / "eval" / "episodes.jsonl").read_text().splitlines()) == 4

    with pytest.raises(FileExistsError, match="--resume continues it"):
        evaluate(Expert(), config, exist="error")
    with pytest.raises(ValueError, match=r"policy.name: expected \"zero\", found \"expert\".*--overwrite"):
        evaluate(Zero(SPEC), config, exist="resume")
    with pytest.raises(ValueError, match="seed: expected 5, found 1000000"):
        evaluate(Expert(), replace(config, seed=5), exist="resume")
    short = replace(config, env=replace(config.env, max_steps=16, tasks=(REACH,)), episodes=1, videos=0)
    floor = evaluate(Zero(SPEC), short, exist="overwrite")
    assert [(e.success, e.reason, e.steps, e.replans) for e in floor.episodes] == [(False, "max_steps", 16, 2)]
    assert not list((tmp_path / "eval").rglob("*.mp4"))


class Interrupted(Expert):
    """An expert that Ctrl-C meets after some calls."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def predict_batch(self, histories, seeds, **options):
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        return super().predict_batch(histories, seeds, **options)


def test_an_interrupted_evaluation_continues_to_the_same_result(tmp_path):
    config = eval_config(tmp_path, videos=0, n_envs=1)
    with pytest.raises(KeyboardInterrupt):
        evaluate(Interrupted(20), config, exist="resume")  # nothing there yet: resume begins
    lines = tmp_path / "eval" / "episodes.jsonl"
    done = lines.read_text()
    assert 1 <= len(done.splitlines()) < 4
    lines.write_text(done + '{"task": "butt')  # a kill in the middle of a line
    calls = Interrupted(10_000)
    result = evaluate(calls, replace(config, n_envs=2), exist="resume")
    assert 10_000 - calls.calls < sum(e.replans for e in result.episodes)  # the finished ones were not played again
    whole = evaluate(Expert(), replace(config, out=str(tmp_path / "whole"), n_envs=2), exist="error")
    assert outcomes(result) == outcomes(whole)
    assert len(lines.read_text().splitlines()) == 4


def test_a_folder_that_is_no_evaluation_is_left_alone(tmp_path):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "thesis.tex").write_text("precious")
    for exist in ("resume", "overwrite"):
        with pytest.raises(ValueError, match="is no evaluation"):
            evaluate(Expert(), eval_config(tmp_path), exist=exist)
    assert (tmp_path / "eval" / "thesis.tex").read_text() == "precious"


def test_two_processes_do_not_write_one_evaluation(tmp_path):
    config = eval_config(tmp_path)
    Path(config.out).mkdir(parents=True)
    with held(Path(config.out), "evaluating into", "out="):
        for exist in ("resume", "overwrite"):
            with pytest.raises(FileExistsError, match=f"process {os.getpid()} is evaluating into .*another out="):
                evaluate(Expert(), config, exist=exist)
    assert list(Path(config.out).iterdir()) == []  # nothing was begun, and the lock was given back


def test_bad_input_leaves_nothing_behind(tmp_path, spec):
    config = eval_config(tmp_path)
    with pytest.raises(ValueError, match="unknown task 'buton'"):
        evaluate(Expert(), replace(config, env=replace(config.env, tasks=("buton",))), exist="error")
    with pytest.raises(ValueError, match="'metaworld_sawyer' is not in the checkpoint; it knows"):
        evaluate(make_policy(spec), config, exist="error")
    with pytest.raises(ValueError, match="eval: n_envs must be at least 1, got 0"):
        replace(config, n_envs=0)
    with pytest.raises(ValueError, match="n_action_steps 7 exceeds the checkpoint's chunk_size 6"):
        evaluate(make_policy(SPEC), replace(config, n_action_steps=7), exist="error")
    assert not list(tmp_path.iterdir())


def test_an_untrained_policy_is_played_the_same_by_any_number_of_environments(tmp_path):
    policy = make_policy(SPEC)
    env = EnvConfig("metaworld", "metaworld_sawyer", (BUTTON,), max_steps=12, fast_render=True)
    config = eval_config(tmp_path, env=env, episodes=3, videos=3)
    traces = []
    for n_envs in (1, 3):
        result = evaluate(policy, replace(config, n_envs=n_envs), exist="overwrite")
        assert [(e.steps, e.replans) for e in result.episodes] == [(12, 4)] * 3  # n_action_steps 3
        traces.append({p.name: json.loads(p.read_text()) for p in (tmp_path / "eval" / "videos").rglob("*.json")})
    assert len(traces[0]) == 3 and traces[0] == traces[1]  # chunks, actions and states to the last bit


def test_overlapping_chunks_are_averaged_in_the_run(tmp_path):
    env = EnvConfig("metaworld", "metaworld_sawyer", (BUTTON,), max_steps=9, fast_render=True)
    config = eval_config(tmp_path, env=env, episodes=1, n_action_steps=2, temporal_ensembling=0.3)
    evaluate(make_policy(SPEC), config, exist="error")
    (path,) = (tmp_path / "eval" / "videos").rglob("*.json")
    trace, ensemble = json.loads(path.read_text()), Ensemble(SPEC, 0.3)
    low, high = (np.concatenate([getattr(f, side) for f in SPEC.action]) for side in ("low", "high"))
    executed: list[np.ndarray] = []
    for chunk in trace["chunks"]:
        rows = ensemble.chunk(chunk["step"], np.array(chunk["values"], np.float32))
        for row in rows[: min(2, 9 - chunk["step"])]:
            executed.append(np.clip(row, low, high).astype(np.float32))
            ensemble.executed(executed[-1])
    np.testing.assert_allclose(trace["executed"], executed, atol=1e-7)
    predicted = np.array([chunk["values"][0] for chunk in trace["chunks"]])
    assert np.abs(predicted[1:, :3] - np.array(trace["executed"])[2::2, :3]).max() > 1e-4
    with pytest.raises(ValueError, match="with n_action_steps 6, the whole chunk, none overlap: set n_action_steps=1"):
        evaluate(make_policy(SPEC), replace(config, n_action_steps=6), exist="overwrite")


def test_what_was_changed_is_recorded_and_told_apart(tmp_path):
    env = EnvConfig("metaworld", "metaworld_sawyer", (BUTTON, REACH), max_steps=8, fast_render=True)
    perturb = replace(UNCHANGED, seed=4, instruction="swapped", camera_shift=0.02, start=0.01)
    config = eval_config(tmp_path, env=env, episodes=2, perturb=perturb)
    assert len(evaluate(Zero(SPEC), config, exist="error").episodes) == 4
    info = json.loads((tmp_path / "eval" / "eval_info.json").read_text())
    assert info["fingerprint"]["perturb"] == "instruction=swapped, camera_shift=0.02, start=0.01, seed 4"
    assert info["config"]["perturb"]["camera_shift"] == 0.02 and info["checkpoint"] is None
    trace = json.loads(next((tmp_path / "eval" / "videos" / BUTTON).glob("*.json")).read_text())
    assert trace["instruction"] == "reach the target"
    # the first episode of each task is filmed; of the others that fail there is the last picture
    films = sorted(p.name for p in (tmp_path / "eval" / "videos" / REACH).iterdir())
    assert films == ["episode_0_failure.json", "episode_0_failure.mp4", "episode_1_failure.jpg"]
    with pytest.raises(ValueError, match=r"perturb.camera_shift: expected 0\.03, found 0\.02"):
        evaluate(Zero(SPEC), replace(config, perturb=replace(perturb, camera_shift=0.03)), exist="resume")
    for key, value in (("light", 1.5), ("texture", -0.1), ("camera_turn", -1.0), ("seed", -1)):
        with pytest.raises(ValueError, match=rf"perturb\.{key} must"):
            replace(perturb, **{key: value})


def test_a_cluster_plays_what_one_process_plays(tmp_path):
    """The protocol of the fan-out, with a stand-in for Ray that works in this process."""
    policy = make_policy(SPEC)
    env = EnvConfig("metaworld", "metaworld_sawyer", (BUTTON,), max_steps=7, fast_render=True)
    config = eval_config(tmp_path, env=env, episodes=2, videos=1, n_envs=1)
    expected, films = evaluate(policy, config, exist="error"), contents(tmp_path / "eval" / "videos")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ray", FakeRay())
        result = evaluate(policy, replace(config, ray="auto", ray_workers=5), exist="overwrite")
        assert outcomes(result) == outcomes(expected) and contents(tmp_path / "eval" / "videos") == films
        (tmp_path / "eval").rename(tmp_path / "whole")
        patch.setattr(FakeRay, "CPUS", 1)
        with pytest.raises(ValueError, match="ray_workers=2 need as many CPUs, the cluster has 1"):
            evaluate(policy, replace(config, ray="auto"), exist="overwrite")
        assert not (tmp_path / "eval").exists()
        patch.setattr(FakeRay, "CPUS", 8)
        patch.setattr(Share, "about", lambda self: fingerprint() | {"git": "0ff"})
        with pytest.raises(
            ValueError, match=r"a machine of the cluster has git 0ff \(here .*install there what is here"
        ):
            evaluate(policy, replace(config, ray="auto"), exist="overwrite")
        patch.setitem(sys.modules, "ray", None)
        with pytest.raises(ValueError, match=r"ray= needs the package ray: pip install 'dita\[cluster\]'"):
            evaluate(policy, replace(config, ray="auto"), exist="overwrite")


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


class FakeRay:
    """As much of Ray as the fan-out calls; everything is copied on its way, as Ray does."""

    CPUS = 8

    class exceptions:
        class RayError(Exception): ...

        class RayTaskError(RayError): ...

    def __init__(self) -> None:
        self.up = False

    def init(self, **options) -> None:
        self.up = True

    def shutdown(self) -> None:
        self.up = False

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": self.CPUS}

    def put(self, value):
        return pickle.dumps(value)

    def get(self, refs):
        return [self.get(r) for r in refs] if isinstance(refs, list) else pickle.loads(refs)  # noqa: S301

    def wait(self, streams, num_returns):
        return [streams[-1]], streams[:-1]  # any order is as good

    def remote(self, **resources):
        assert resources["num_gpus"] == 0
        return lambda cls: SimpleNamespace(remote=lambda *args: FakeActor(self, cls(*args)))


class FakeActor:
    def __init__(self, ray: FakeRay, target) -> None:
        def play(policy, *args):
            return (ray.put(item) for item in target.play(ray.get(policy), *ray.get(ray.put(args))))

        self.about = SimpleNamespace(remote=lambda: ray.put(target.about()))
        self.play = SimpleNamespace(options=lambda num_returns: SimpleNamespace(remote=play))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_ray_itself_plays_what_one_process_plays(tmp_path):
    pytest.importorskip("ray", reason="pip install 'dita[cluster]'")
    policy = make_policy(SPEC)
    env = EnvConfig("metaworld", "metaworld_sawyer", (BUTTON,), max_steps=7, fast_render=True)
    config = eval_config(tmp_path, env=env, episodes=2, videos=1, n_envs=1)
    expected, films = evaluate(policy, config, exist="error"), contents(tmp_path / "eval" / "videos")
    result = evaluate(policy, replace(config, ray="local", ray_workers=2), exist="overwrite")
    assert outcomes(result) == outcomes(expected) and contents(tmp_path / "eval" / "videos") == films


def test_identity_follows_the_weights(spec):
    policy = make_policy(spec)
    before = identity(policy)
    assert before == identity(make_policy(spec))
    next(iter(policy.parameters())).data.add_(1e-3)
    after = identity(policy)
    assert after["weights"] != before["weights"] and after["contract"] == before["contract"]


# --- dita env


def test_the_machine_report_has_a_line_for_everything(monkeypatch):
    monkeypatch.setattr(machine, "_dds", lambda: (True, "stubbed: the buses have their own tests"))
    checks = {c.name: c for c in machine.machine_report()}
    assert {"Python", "OpenGL", "DDS on loopback", "torch", "disk", "memory", "extra sim-core"} <= set(checks)
    assert checks["Python"].ok and checks["OpenGL"].ok and checks["extra sim-core"].ok


def test_a_broken_part_is_a_line_that_says_what_to_install(monkeypatch):
    def broken():
        raise OSError("libddsc.so: cannot open")

    monkeypatch.setattr(machine, "_dds", broken)
    monkeypatch.setattr(gl, "works", lambda backend: False)
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    checks = {c.name: c for c in machine.machine_report()}
    assert not checks["DDS on loopback"].ok and "libddsc.so" in checks["DDS on loopback"].text
    assert not checks["OpenGL"].ok and "apt-get install -y libegl1" in checks["OpenGL"].text
    assert checks["extra robot"].text == "no cyclonedds, rosbags, ruckig: pip install 'dita[robot]'"


def test_the_printed_report_keeps_the_brackets_of_extras(monkeypatch, capsys):
    monkeypatch.setattr(machine, "machine_report", lambda: [machine.Check("extra sim", False, "pip 'dita[sim]'")])
    machine.print_machine()
    assert "'dita[sim]'" in capsys.readouterr().out
