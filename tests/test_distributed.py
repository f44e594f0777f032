"""Two processes over gloo stand for a cluster: the same losses as one, the same checkpoints, the same end."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import config_for, losses, result, store  # noqa: F401
from two_ranks import damaged, spiking, with_patch, with_scaled_batch

from dita.checkpoint import last_checkpoint, load_policy
from dita.config import TrainConfig
from dita.distributed import ranks_of_environment
from dita.optimize import PairwiseSum, sample_weights
from dita.run_folder import Preempted
from dita.train import train
from dita.train_data import open_data

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(store, tmp_path_factory) -> Path:  # noqa: F811
    """One process trains, then two do, in one start of torchrun."""
    at = tmp_path_factory.mktemp("two")
    config = config_for(store, at / "one", batch_size=8, microbatch_size=2)
    (at / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    train(config)
    first = dataclasses.replace(config, run=str(at / "from_one"), save_every=1)
    with pytest.raises(KeyboardInterrupt, match="after step 2"):
        with_patch(
            "_follow", lambda trainer, step: step == 1 and signal.raise_signal(signal.SIGINT), lambda: train(first)
        )
    shutil.copytree(store, at / "damaged.zarr")
    harm(at / "damaged.zarr", config)
    train(dataclasses.replace(config, run=str(at / "damaged_one"), data=damaged(at, config)))
    with_scaled_batch(5, lambda: train(dataclasses.replace(config, run=str(at / "spike_one"), **spiking(config))))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    command = [*torchrun, str(HERE / "two_ranks.py"), str(at)]
    env = os.environ | {"PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=3000)
    assert (at / "hung.json").exists(), done.stderr
    return at


def harm(path: Path, config: TrainConfig) -> None:
    """Flip a bit of what the second of two processes reads in its second step."""
    dataset, window = open_data(config).sampler.sample(1, 8)[6]
    (shard,) = path.glob("segments/*/images/cam0/c/0/0/0/0")
    content = bytearray(shard.read_bytes())
    content[window * (32 * 32 * 3 + 4) + 9] ^= 1
    shard.write_bytes(content)
    assert dataset == 0


def same(a: Path, b: Path) -> None:
    (tensors, hash_a), (others, hash_b) = result(a), result(b)
    assert hash_a == hash_b and len(hash_a) == 64 and losses(a) == losses(b)
    assert tensors.keys() == others.keys() and all(torch.equal(tensors[n], others[n]) for n in tensors)


def test_two_processes_are_bit_equal_to_one(folder: Path) -> None:
    same(folder / "one", folder / "ddp")


def test_two_processes_continue_what_one_began(folder: Path) -> None:
    same(folder / "one", folder / "from_one")


def test_two_processes_leave_out_and_go_back_as_one_does(folder: Path) -> None:
    for name in ("damaged", "spike"):
        same(folder / f"{name}_one", folder / name)
    lines = [(folder / name / "quarantine.jsonl").read_text() for name in ("damaged", "damaged_one")]
    assert lines[0] == lines[1] and json.loads(lines[0].splitlines()[0])["why"].startswith("E_CHECKSUM")
    assert {(line["step"], line["row"]) for line in map(json.loads, lines[0].splitlines())} >= {(1, 6)}
    kept = [json.loads((folder / name / "spike_0000005.json").read_text()) for name in ("spike", "spike_one")]
    assert kept[0] == kept[1] and kept[0]["step"] == 5 and len(losses(folder / "spike")) == 8


def test_one_process_continues_what_two_began(folder: Path, store) -> None:  # noqa: F811
    base = config_for(store, folder / "alone", batch_size=8, microbatch_size=2)
    config = dataclasses.replace(base, steps=2, optim=dataclasses.replace(base.optim, schedule="constant"))
    train(config)
    same(folder / "alone", folder / "to_one")
    # two more steps each, after the two of one and of two processes
    for name in ("alone", "to_one"):
        train(dataclasses.replace(config, run=str(folder / name), steps=4), "resume", allow_drift=["steps"])
    same(folder / "alone", folder / "to_one")


def test_sharded_training_follows_within_1e_5_and_any_number_reads_its_shards(folder: Path) -> None:
    assert np.allclose(losses(folder / "one"), losses(folder / "fsdp"), rtol=1e-5, atol=0)
    last = last_checkpoint(folder / "fsdp")
    assert len(list((last / "train").glob("*.safetensors"))) == 2
    assert not [p for p in last.rglob("*") if p.name == ".metadata" or p.suffix in (".distcp", ".pkl", ".pt")]
    tensors, others = result(folder / "one")[0], result(folder / "fsdp")[0]
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        if not name.startswith("optimizer."):
            assert (tensor - others[name]).abs().mean() < 1e-5, name  # single ones may turn where gradients are nothing
    one, two = (load_policy(folder / name).state_dict() for name in ("one", "fsdp"))
    assert all(one[n].shape == two[n].shape for n in one)


def test_every_rank_refuses_for_the_same_reason(folder: Path) -> None:
    first, second = (json.loads((folder / f"said_{rank}.json").read_text()) for rank in (0, 1))
    for said in (first, second):
        assert said["parallel"] == "ValueError: this job has 2 processes and parallel=none: set parallel=ddp or " \
            "parallel=fsdp"  # fmt: skip
        assert "batch_size 5 is global and must divide by 2 processes" in said["batch"]
        assert "batch_size 8 over 2 processes is 4 windows each, which do not divide by microbatch_size 3" in \
            said["microbatch"]  # fmt: skip
        assert "holds a run already" in said["taken"]
        assert said["nan"].startswith("NotFinite: step 1: loss ") and "the gradient of rank [1]" in said["nan"]
        assert said["stop"].startswith("Preempted: stopped after step 1; checkpoint saved")
    assert second["taken"].startswith("OtherRankError: rank 0: FileExistsError")
    named = json.loads((folder / "nan" / "not_finite_0000001.json").read_text())
    assert named["step"] == 1 and len(named["samples"]) == 8
    assert {"store", "episode", "frame", "source"} <= named["samples"][0].keys()
    assert not list((folder / "nan" / "checkpoints").glob("*"))
    assert last_checkpoint(folder / "stop").name == "0000001"
    assert Preempted.exit_code == 85


def test_a_rank_that_hangs_ends_the_others(folder: Path) -> None:
    hung = json.loads((folder / "hung.json").read_text())
    assert "imeout" in hung["error"] or "imed out" in hung["error"]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_gradients_add_in_pairs(count: int) -> None:
    parts = [torch.tensor([0.1 * 3**i], dtype=torch.float32) for i in range(count)]
    running = torch.zeros(1)
    add = PairwiseSum(running)
    for part in parts:
        add.begin()
        running += part
    add.finish()
    level = list(parts)
    while len(level) > 1:
        level = [sum(level[i : i + 2][1:], level[i]) for i in range(0, len(level), 2)]
    assert torch.equal(running, level[0])


@pytest.mark.parametrize(
    ("reduction", "shares"),
    [("token", [1 / 21, 4 / 21, 16 / 21]), ("square", [1 / 7, 2 / 7, 4 / 7]), ("sample", [1 / 3, 1 / 3, 1 / 3])],
)
def test_loss_reductions(reduction: str, shares: list[float]) -> None:
    counted = np.array([1.0, 4.0, 16.0, 0.0])
    weights = sample_weights(counted, reduction)
    np.testing.assert_allclose((weights * counted)[:3], shares)  # InternVL3's table, benchmarks of components.md
    assert weights[3] == 0


def test_ranks_come_from_torchrun_or_srun(monkeypatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "8")  # a shell inside a job: not a task of a step
    assert ranks_of_environment() == (0, 1, 0)
    for name, value in {"SLURM_PROCID": "5", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert ranks_of_environment() == (5, 8, 1)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert ranks_of_environment() == (1, 2, 0)
