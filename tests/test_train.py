"""Training end to end at the smallest size: exact resume, refusals, learning-rate schedule, optimizer groups."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import diffusion_config, embodiment_dict, field, policy_config

from dita.checkpoint import last_checkpoint, load_policy, load_train_state
from dita.config import (
    AugmentConfig,
    DataConfig,
    OptimConfig,
    PreprocessConfig,
    StoreConfig,
    TrainConfig,
    ValidationConfig,
)
from dita.datasets.store import StoreWriter
from dita.embodiment import embodiment_from_dict
from dita.optimize import lr_scale, make_optimizer
from dita.train import Trainer, build_policy, train
from dita.train_data import open_data
from dita.types import Episode


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "small.zarr"
    spec = embodiment_from_dict(embodiment_dict())
    rng = np.random.default_rng(0)
    with StoreWriter.create(path, spec, source="test", licence="CC0-1.0") as writer:
        for i in range(4):
            m = 20 + i
            writer.add(
                Episode(
                    images={"cam0": rng.integers(0, 256, (m, 32, 32, 3), np.uint8)},
                    state=rng.uniform(-1, 1, (m, 4)).astype(np.float32),
                    action=rng.uniform(-0.01, 0.01, (m, 4)).astype(np.float32),
                    stamp=np.arange(m) * 0.0125,
                    instruction=["press the button", "open the drawer"][i % 2],
                    success=True,
                    source=f"test/{i}",
                )
            )
        writer.seal()
    return path


def config_for(store: Path, run: Path, **changes) -> TrainConfig:
    values = {
        "run": str(run), "seed": 0, "steps": 4, "batch_size": 4, "microbatch_size": None,
        "noise_samples_per_context": 2, "loss_reduction": "token", "device": "cpu", "parallel": "ddp",
        "precision": "fp32", "activation_checkpointing": False, "compile": False, "threads": 1, "log_every": 1,
        "on_spike": "warn",
        "save_every": 2, "async_save": False, "keep_last": 2, "keep_best": 0, "collective_timeout": 60.0,
        "save_timeout": 60.0, "worker_timeout": 60.0, "peak_tflops": 1.0, "wandb": None,
        "policy": policy_config(), "diffusion": diffusion_config(),
        "preprocess": PreprocessConfig("min_max", "squash", "stored"),
        "data": DataConfig((StoreConfig(str(store), 1.0, None),), "mask", "ram", 0, None, 0.0),
        "augment": AugmentConfig(2, 0.1, 0.1, 0.1, 0.1, 0.05),
        "optim": OptimConfig(1e-3, 0.1, 0.01, (0.9, 0.95), 2, "cosine", 1.0, 0.99),
        "validation": ValidationConfig(0, 0.0, 8, None),
    }  # fmt: skip
    return TrainConfig(**(values | changes))


def result(run: Path) -> tuple[dict, str]:
    tensors, state = load_train_state(last_checkpoint(run) / "train")
    return tensors, state["loss_hash"]


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss_exact"] for line in (run / "log.jsonl").read_text().splitlines()]


def test_resumed_training_is_bit_equal(store, tmp_path) -> None:
    train(config_for(store, tmp_path / "whole"))
    cut = config_for(store, tmp_path / "cut")
    train(cut)
    # go back to step 2, as after a kill, and continue; twice
    for _ in range(2):
        last = last_checkpoint(tmp_path / "cut")
        for path in sorted(last.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        last.rmdir()
        train(cut, exist="resume")
    (a, hash_a), (b, hash_b) = result(tmp_path / "whole"), result(tmp_path / "cut")
    assert hash_a == hash_b and len(hash_a) == 64
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_relative_actions_train_with_statistics_of_their_own(tmp_path) -> None:
    values = embodiment_dict()
    values["action"] = [field("target", "ee_position", 3, 0), field("grip", "gripper_effort", 1, 6)]
    spec, rng = embodiment_from_dict(values), np.random.default_rng(0)
    path = tmp_path / "absolute.zarr"
    with StoreWriter.create(path, spec, source="test", licence="CC0-1.0") as writer:
        for i in range(2):
            state = np.cumsum(rng.uniform(-0.01, 0.01, (20, 4)), axis=0).astype(np.float32) + i
            images = {"cam0": rng.integers(0, 256, (20, 32, 32, 3), np.uint8)}
            action = state + np.float32([0.01, 0, 0, 0])
            writer.add(Episode(images, state, action, np.arange(20) * 0.0125, "move", True, f"test/{i}"))
        writer.seal()
    spread = {}
    for actions in ("stored", "relative"):
        run = tmp_path / actions
        train(config_for(path, run, preprocess=PreprocessConfig("min_max", "squash", actions)))
        stats = load_policy(run).contract.stats["arm"].fields
        spread[actions] = stats["action/target"].max[0] - stats["action/target"].min[0]
        assert stats["state/hand"].max[0] > 0.9
    assert spread["stored"] > 0.9 and spread["relative"] < 0.2  # where the hand stood is no part of a relative action


def test_another_seed_gives_other_losses(store, tmp_path) -> None:
    for seed in (0, 1):
        train(config_for(store, tmp_path / str(seed), seed=seed, steps=2))
    assert losses(tmp_path / "0") != losses(tmp_path / "1")


def test_killed_training_continues(store, tmp_path) -> None:
    run = tmp_path / "run"
    config = config_for(store, run, steps=400, save_every=1)
    code = (
        "import json,sys; from dita.config import *; from dita.train import train\n"
        "train(from_dict(TrainConfig, json.load(open(sys.argv[1])), 'test'), 'resume')"
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(config)))
    command = [sys.executable, "-c", code, str(path)]
    for number in (signal.SIGKILL, signal.SIGTERM):
        known = set((run / "checkpoints").glob("[0-9]*")) if run.exists() else set()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and process.poll() is None:
            whole = {p.parent.parent for p in (run / "checkpoints").glob("[0-9]*/train/manifest.json")}
            if len(whole - known) >= 2:
                break
            time.sleep(0.02)
        os.kill(process.pid, number)
        _, error = process.communicate(timeout=300)
        assert process.returncode == -9 or b"continue with --resume" in error
        load_policy(run)
    assert int(last_checkpoint(run).name) == len(losses(run)) >= 4


def test_refusals(store, tmp_path) -> None:
    run = tmp_path / "run"
    config = config_for(store, run, steps=2)
    train(config)
    with pytest.raises(FileExistsError, match="--resume"):
        train(config)
    with pytest.raises(ValueError, match=r"optim.lr: was 0.001, now 0.002"):
        train(dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=2e-3)), "resume")
    train(config, "overwrite")
    (run / "lock").write_text(str(os.getpid()))
    with pytest.raises(FileExistsError, match="is training in"):
        train(config, "resume")
    (run / "lock").unlink()
    with pytest.raises(ValueError, match="no CUDA"):
        train(dataclasses.replace(config, device="cuda", run=str(tmp_path / "gpu")))


def test_a_loss_that_is_not_finite_stops_before_the_step(store, tmp_path, monkeypatch) -> None:
    from dita.policy.policy import DitaPolicy

    def forward(self, batch, draws):
        good = self.model.head.weight.sum() * torch.ones(len(batch.actions))
        return good * torch.tensor([1.0, float("nan"), 1.0, 1.0])

    monkeypatch.setattr(DitaPolicy, "forward", forward)
    with pytest.raises(ValueError, match=r"step 0: loss nan.* samples \[1\] of the global batch.*not_finite_0000000"):
        train(config_for(store, tmp_path / "run"))
    named = json.loads((tmp_path / "run" / "not_finite_0000000.json").read_text())["samples"]
    assert len(named) == 1 and named[0]["store"] == str(store) and 0 <= named[0]["episode"] < 4
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_full_disk_stops_before_writing(store, tmp_path, monkeypatch) -> None:
    run = tmp_path / "run"
    config = config_for(store, run)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OSError, match="MiB wanted, 0 MiB free"):
        train(dataclasses.replace(config, data=dataclasses.replace(config.data, cache="mmap")))
    assert not list((run / "checkpoints").glob("*/*/manifest.json"))
    monkeypatch.undo()
    train(dataclasses.replace(config, data=dataclasses.replace(config.data, cache="mmap")), "resume")
    assert last_checkpoint(run).name == "0000004"


def test_learning_rate_schedule() -> None:
    config = OptimConfig(1.0, 1.0, 0.0, (0.9, 0.9), 4, "cosine", 1.0, 0.9)
    scales = [lr_scale(step, 14, config) for step in range(14)]
    assert scales[:4] == [0.25, 0.5, 0.75, 1.0]
    assert scales[4] == 1.0 and scales[9] == pytest.approx(0.5) and 0 < scales[13] < 0.05
    assert lr_scale(13, 14, dataclasses.replace(config, schedule="constant")) == 1.0


def test_gradients_are_clipped_by_their_global_norm(store, tmp_path) -> None:
    config = config_for(store, tmp_path, optim=OptimConfig(1e-3, 0.1, 0.01, (0.9, 0.95), 2, "cosine", 0.5, 0.99))
    data = open_data(config)
    trainer = Trainer(build_policy(config, data.stores, data.episodes), config)
    assert trainer.gradient is not None
    for value, left in ((3.0, 0.5), (1e-6, None)):
        trainer.gradient.fill_(value)
        norm = value * len(trainer.gradient) ** 0.5
        assert trainer._reduce_and_clip() == pytest.approx(norm, rel=1e-3)
        assert float(trainer.gradient.norm()) == pytest.approx(left or norm, rel=1e-3)


def test_bf16_and_compiled_blocks_are_asked_for(store, tmp_path, monkeypatch) -> None:
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    for name, changes in {"fp32": {}, "bf16": {"precision": "bf16"}, "compiled": {"compile": True}}.items():
        train(config_for(store, tmp_path / name, steps=1, **changes))
    full, half, same = (losses(tmp_path / name)[0] for name in ("fp32", "bf16", "compiled"))
    assert half != full and half == pytest.approx(full, rel=0.02) and same == full
    assert compiled == ["Block"] * policy_config().layers
    weights = result(tmp_path / "bf16")[0]
    assert {t.dtype for n, t in weights.items() if n.startswith(("ema.", "optimizer."))} == {torch.float32}


def test_vectors_do_not_decay_and_the_backbone_is_slower(store, tmp_path) -> None:
    parameters = {
        "model.vision.patches.stem.weight": torch.nn.Parameter(torch.zeros(2, 2)),
        "model.trunk.norm.weight": torch.nn.Parameter(torch.zeros(2)),
        "model.head.weight": torch.nn.Parameter(torch.zeros(2, 2)),
    }
    config = OptimConfig(1.0, 0.1, 0.5, (0.9, 0.9), 1, "cosine", 1.0, 0.9)
    groups = {
        id(p): (g["base_lr"], g["weight_decay"])
        for g in make_optimizer(parameters, config).param_groups
        for p in g["params"]
    }
    assert [groups[id(p)] for p in parameters.values()] == [(0.1, 0.5), (1.0, 0.0), (1.0, 0.5)]
