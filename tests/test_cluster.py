"""Before and around a job of a cluster: the dry run, what it counts, the sbatch script under a fake SLURM."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from pathlib import Path

import pytest
from test_train import config_for, store  # noqa: F401

from dita.cli import main
from dita.cost import training_cost
from dita.dry_run import dry_run
from dita.preprocess import make_contract

SBATCH = Path(__file__).parent.parent / "configs" / "slurm" / "train.sbatch"


def test_the_papers_size_on_four_nodes(capsys) -> None:
    assert main(["train", "experiment=dita_base_4x8", "--dry-run", "--ranks", "32"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    # the published count, and two vectors of transformers' DINOv2 that the published one has not
    assert "8192 = 32 x 4 x 64 windows" in said and f"{213_225_984 + 2 * 768:,} of them trained" in said
    assert main(["train", "experiment=dita_base_4x8", "--dry-run", "--ranks", "24"]) == 1
    assert "8192 is global and must divide by 24" in capsys.readouterr().err


def test_a_dry_run_with_data_draws_the_first_batch(store, tmp_path) -> None:  # noqa: F811
    config = config_for(store, tmp_path / "run")
    found = dry_run(config, 2)
    windows = 20 + 21 + 22 + 23
    assert found["windows"] == windows and found["steps_per_epoch"] == windows / 4
    assert (tmp_path / "run" / "first_batch.png").read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "run" / "config.json").exists()  # nothing was begun


def test_cost_grows_with_what_it_is_of(store, tmp_path) -> None:  # noqa: F811
    config = config_for(store, tmp_path)
    contract = make_contract(config.preprocess, config.policy, [], [])
    cost = training_cost(config, contract, 4)
    # a product of the head alone, forward and twice backward, for each of two noise samples
    head = 3 * 2 * config.policy.dim * config.policy.action_dim * config.policy.chunk_size * 2
    assert cost.flops_per_window > head
    more = training_cost(dataclasses.replace(config, noise_samples_per_context=4), contract, 4)
    assert cost.flops_per_window < more.flops_per_window < 2 * cost.flops_per_window
    larger = training_cost(config, contract, 8)
    assert 1.9 < larger.activation_bytes / cost.activation_bytes < 2.1
    recomputed = training_cost(dataclasses.replace(config, activation_checkpointing=True), contract, 4)
    assert recomputed.activation_bytes < cost.activation_bytes and recomputed.flops_per_window == cost.flops_per_window
    assert cost.memory(2, 1)["AdamW moments"] == 8 * cost.trainable // 2
    # four microbatches without FSDP keep one more gradient, which they are added to in pairs
    assert cost.memory(1, 4)["gradients"] == 8 * cost.trainable and cost.memory(1, 2)["gradients"] == 4 * cost.trainable


@pytest.mark.parametrize(("code", "requeued"), [(85, True), (0, False), (1, False), (75, False)])
def test_the_sbatch_script_requeues_what_made_room(code: int, requeued: bool, tmp_path) -> None:
    log = tmp_path / "log"
    for name, body in {
        "srun": f'echo "srun $*" >> {log}; exec "${{@:3}}"',
        "dita": f'echo "dita $*" >> {log}; exit {code}',
        "scontrol": f'echo "scontrol $*" >> {log}',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", str(SBATCH), "run=outputs/x", "data.stores=[{path:a,weight:1}]"], env=env)
    lines = log.read_text().splitlines()
    assert done.returncode == code and lines[1] == "dita train run=outputs/x data.stores=[{path:a,weight:1}] --resume"
    assert ("scontrol requeue 7" in lines) == requeued
    options = [line.split()[1] for line in SBATCH.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--requeue", "--signal=USR1@180", "--open-mode=append"} <= set(options)
