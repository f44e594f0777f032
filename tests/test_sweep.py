"""`dita train --multirun`: Hydra's sweeps and launchers around the same training, requeued by submitit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_train import losses, store  # noqa: F401
from two_ranks import with_patch

from dita.checkpoint import last_checkpoint
from dita.cli import main

ROOT = Path(__file__).parent.parent


def words(store: Path, run: Path, *more: str) -> list[str]:  # noqa: F811
    small = ["experiment=smoke", "policy.vision.image_size=48", "threads=1", "log_every=1", "peak_tflops=1"]
    return [*small, f"data.stores=[{{path:{store},weight:1}}]", f"run={run}", *more]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["hydra/launcher=submitit_slurm"], "hydra/launcher=submitit_slurm is a setting of Hydra's launchers"),
        (["-m", "--overwrite"], "--multirun continues what is there"),
        (["-m", "--dry-run"], "--multirun continues what is there"),
        (["-m", "seed=0,1", "optim.lrr=1,2"], "unknown key 'optim.lrr'; did you mean lr?"),
        (["-m", "seed=0,1", "optim.lr=1e-3,fast"], "could not convert string to float: 'fast'"),
        (["-m", "policy.dim=64,30", "policy.heads=4"], "policy.dim 30 must divide"),
        (["-m", "hydra/launcher=nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_a_job_begins(argv, message, store, tmp_path, capsys) -> None:  # noqa: F811
    assert main(["train", *argv, *words(store, tmp_path / "run")]) == 1
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said and said.count("\n") == 1
    assert not (tmp_path / "run" / "checkpoints").exists() and not list(tmp_path.glob("run/seed*"))


def test_a_sweep_trains_once_for_every_combination(store, tmp_path, capsys) -> None:  # noqa: F811
    here, argv = Path.cwd(), list(sys.argv)
    command = ["train", "-m", *words(store, tmp_path / "run", "steps=2", "seed=0,1", "optim.lr=1e-3,2e-3")]
    begun: list[tuple] = []

    def stop(trainer, step: int) -> None:
        begun.append((trainer.config.seed, trainer.config.optim.lr, step))
        if len(begun) == 3:  # the second job's first step
            signal.raise_signal(signal.SIGTERM)

    codes: list[int] = []
    with_patch("_follow", stop, lambda: codes.append(main(command)))
    assert codes == [85] and begun == [(0, 0.001, 0), (0, 0.001, 1), (0, 0.002, 0)]  # the other jobs did not begin
    assert "stopped after step 1" in capsys.readouterr().err
    begun.clear()
    with_patch("_follow", lambda t, step: begun.append((t.config.seed, t.config.optim.lr, step)), lambda: main(command))
    assert begun == [(0, 0.002, 1), *((1, lr, step) for lr in (0.001, 0.002) for step in (0, 1))]
    names = {f"seed={seed},optim.lr={lr}" for seed in (0, 1) for lr in (0.001, 0.002)}
    assert {p.name for p in (tmp_path / "run").iterdir()} == names | {"hydra"}
    assert main(["train", *words(store, tmp_path / "alone", "steps=2", "seed=1", "optim.lr=2e-3")]) == 0
    assert losses(tmp_path / "run" / "seed=1,optim.lr=0.002") == losses(tmp_path / "alone")
    assert Path.cwd() == here and sys.argv == argv


def test_a_job_that_fails_is_named_and_the_others_go_on(store, tmp_path, capsys) -> None:  # noqa: F811
    run = tmp_path / "run"
    assert main(["train", "-m", *words(store, run, "steps=1", "batch_size=3,4", "microbatch_size=2")]) == 1
    said = capsys.readouterr().err
    assert f"dita train: {run}/batch_size=3: batch_size 3 over 1 processes is 3 windows each" in said
    assert len(losses(run / "batch_size=4")) == 1 and "Traceback" not in said


@pytest.mark.slow  # three starts of Python with torch
def test_submitit_requeues_a_job_that_made_room(store, tmp_path) -> None:  # noqa: F811
    """submitit's local executor stands for SLURM's: the same handler, signal and pickled job."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    run, steps = tmp_path / "run", 60
    assert main(["train", *words(store, tmp_path / "alone", f"steps={steps}")]) == 0
    command = words(store, run, f"steps={steps}", "save_every=1", "hydra/launcher=submitit_local")
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    log = (tmp_path / "said").open("w")
    dita = subprocess.Popen(
        [sys.executable, "-m", "dita.cli", "train", "-m", *command], env=env, cwd=tmp_path, stdout=log, stderr=log
    )
    at, deadline = run, time.monotonic() + 1200
    while dita.poll() is None and time.monotonic() < deadline:
        if list(at.glob("checkpoints/*/train/manifest.json")):
            os.kill(int((at / "lock").read_text().split()[0]), signal.SIGUSR2)
            break
        time.sleep(0.02)
    try:
        assert dita.wait(1200) == 0, (tmp_path / "said").read_text()
    finally:
        dita.kill()
        log.close()
    logs = "".join(p.read_text() for p in run.rglob("*_log.out")) + "".join(
        p.read_text() for p in run.rglob("*_log.err")
    )
    assert "this job is preempted" in logs and "Requeued job" in logs and "continue with --resume" in logs
    assert int(last_checkpoint(at).name) == steps and losses(at) == losses(tmp_path / "alone")
    assert json.loads((at / "config.json").read_text())["steps"] == steps
