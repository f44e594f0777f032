"""Data that is damaged or makes the loss spike: the run stops, or leaves it out and says so, alike on every resume."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import diffusion_config, embodiment_dict
from test_train import config_for, losses, result, store  # noqa: F401
from two_ranks import with_patch

from dita.checkpoint import whole_checkpoints
from dita.config import TrainConfig, ValidationConfig
from dita.datasets import mixture
from dita.datasets.store import StoreError, StoreWriter
from dita.embodiment import embodiment_from_dict
from dita.train import Trainer, remove_checkpoint, train
from dita.train_data import open_data
from dita.types import Episode
from dita.validate import read_validation

SIZE = 8  # [px]
FRAMES = 1000  # of each of ten episodes: 10 000 frames, each a chunk


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("large") / "large.zarr"
    spec, rng = embodiment_from_dict(embodiment_dict(size=SIZE)), np.random.default_rng(0)
    with StoreWriter.create(path, spec, source="test", licence="CC0-1.0") as writer:
        for i in range(10):
            images = {"cam0": rng.integers(0, 256, (FRAMES, SIZE, SIZE, 3), np.uint8)}
            state, action = (rng.uniform(-k, k, (FRAMES, 4)).astype(np.float32) for k in (1, 0.01))
            stamp = np.arange(FRAMES) / spec.control_hz
            writer.add(Episode(images, state, action, stamp, "press the button", True, f"test/{i}"))
        writer.seal()
    return path


def config_of(path: Path, run: Path, quarantine: float, cache: str = "mmap", **changes) -> TrainConfig:
    config = config_for(path, run, **({"steps": 3, "save_every": 1, "keep_last": 9} | changes))
    data = dataclasses.replace(config.data, quarantine=quarantine, cache=cache)
    return dataclasses.replace(config, data=data)


def damage(path: Path, batch: int, row: int) -> tuple[int, int]:
    """Flip a bit in the last picture that a sample of a batch looks at; return its episode and frame."""
    data = open_data(config_of(path, path, 0.0))
    _, window = data.sampler.sample(batch, 4)[row]
    chunk, (episode, frame) = SIZE * SIZE * 3 + 4, divmod(window, FRAMES)
    (shard,) = path.glob(f"segments/*/images/cam0/c/{window // 256}/0/0/0")
    content = bytearray(shard.read_bytes())
    content[window % 256 * chunk + 17] ^= 4
    shard.write_bytes(content)
    return episode, frame


@pytest.fixture(scope="module")
def hurt(whole, tmp_path_factory) -> tuple[Path, tuple[int, int]]:
    path = tmp_path_factory.mktemp("hurt") / "large.zarr"
    shutil.copytree(whole, path)
    return path, damage(path, 1, 2)


def listed(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]


def recorded(do) -> list[np.ndarray]:
    """Return each step's mean squared errors and counts [g, 2]."""
    rows: list[np.ndarray] = []
    with_patch("step", lambda trainer, step: rows.append(trainer.samples), do)
    return rows


def test_one_damaged_chunk_of_ten_thousand_stops_the_run_by_name(hurt, tmp_path) -> None:
    path, (episode, frame) = hurt
    with pytest.raises(StoreError, match=rf"E_CHECKSUM.*\(test/{episode}\), frame {frame}\)"):
        train(config_of(path, tmp_path / "run", 0.0))
    assert len(losses(tmp_path / "run")) == 1 and not (tmp_path / "run" / "quarantine.jsonl").exists()
    with pytest.raises(StoreError, match="E_CHECKSUM"):
        train(config_of(path, tmp_path / "ram", 0.0, "ram"))
    with pytest.raises(ValueError, match=r"data\.quarantine must be in 0 \.\. 0\.001, got 0\.002"):
        config_of(path, tmp_path, 0.002)


def test_a_damaged_sample_is_left_out_not_replaced_and_listed(whole, hurt, tmp_path, capsys) -> None:
    path, (episode, frame) = hurt
    runs = {"whole": config_of(whole, tmp_path / "whole", 0.001), "hurt": config_of(path, tmp_path / "hurt", 0.001)}
    clean, bad = (recorded(lambda c=c: train(c)) for c in runs.values())
    said = capsys.readouterr().err
    assert np.array_equal(clean[0], bad[0]) and clean[1][:, 1].min() > 0
    assert np.array_equal(np.delete(clean[1], 2, 0), np.delete(bad[1], 2, 0)) and bad[1][2, 1] == 0
    (others, counts) = np.delete(clean[1], 2, 0).T  # nothing was put in its place: the mean is over the other three
    assert losses(tmp_path / "hurt")[1] == pytest.approx((others * counts).sum() / counts.sum(), rel=1e-12)
    (line,) = listed(tmp_path / "hurt")
    assert {k: line[k] for k in ("step", "row", "store", "episode", "frame", "source")} == {
        "step": 1, "row": 2, "store": str(path), "episode": episode, "frame": frame, "source": f"test/{episode}"
    }  # fmt: skip
    assert line["why"].startswith("E_CHECKSUM") and f"frame {frame}" in line["why"]
    assert said.count("step 1: left out as damaged (1 of 10000 samples): E_CHECKSUM") == 1
    assert "1 of 10000 samples (0.010%) were left out as damaged" in said.splitlines()[-2] and line["why"] in said
    assert not (tmp_path / "whole" / "quarantine.jsonl").exists()


def test_a_resumed_run_leaves_out_the_same(hurt, tmp_path, capsys) -> None:
    path, _ = hurt
    straight, cut = tmp_path / "straight", tmp_path / "cut"
    train(config_of(path, straight, 0.001))
    for left in ("0000001", "0000002"):  # before the damaged sample, and after it
        shutil.rmtree(cut, ignore_errors=True)
        shutil.copytree(straight, cut)
        for newer in [c for c in whole_checkpoints(cut) if c.name > left]:
            remove_checkpoint(newer)
        capsys.readouterr()
        train(config_of(path, cut, 0.001, "ram"), "resume")  # which reads every picture at the start
        assert "1 of 10000 samples (0.010%) were left out" in capsys.readouterr().err
        (a, hash_a), (b, hash_b) = result(straight), result(cut)
        assert hash_a == hash_b and all(torch.equal(a[n], b[n]) for n in a)
        assert listed(straight) == listed(cut)


def test_more_damage_than_allowed_stops_the_run(hurt, tmp_path) -> None:
    path = tmp_path / "large.zarr"
    shutil.copytree(hurt[0], path)
    damage(path, 2, 0)
    message = r"2 of 10000 samples are damaged, more than data\.quarantine=0\.0001 lets.*the last: E_CHECKSUM"
    with pytest.raises(ValueError, match=message):
        train(config_of(path, tmp_path / "run", 0.0001))
    assert [line["step"] for line in listed(tmp_path / "run")] == [1, 2]
    assert len(losses(tmp_path / "run")) == 2  # the third step was not taken
    with pytest.raises(ValueError, match=message):  # nor is it by trying again
        train(config_of(path, tmp_path / "run", 0.0001), "resume")
    train(config_of(path, tmp_path / "run", 0.001), "resume")  # a higher limit may be set on the way
    assert len(losses(tmp_path / "run")) == 3 and len(listed(tmp_path / "run")) == 2


def test_what_is_not_damage_is_no_bad_sample(whole, tmp_path, monkeypatch) -> None:
    def down(self, episode, camera, frames):
        raise StoreError("E_NETWORK: s3://bucket does not answer")

    monkeypatch.setattr("dita.datasets.store.Store.read_frames", down)
    with pytest.raises(StoreError, match="E_NETWORK"):
        train(config_of(whole, tmp_path / "run", 0.001))


def test_validation_leaves_out_damaged_windows_too(hurt, tmp_path, capsys) -> None:
    path, (episode, _) = hurt
    for seed in range(99):  # of the split: one that holds the damaged episode out
        config = config_of(
            path, tmp_path / "run", 0.001, steps=1, seed=seed, validation=ValidationConfig(1, 0.1, 8, None)
        )
        if open_data(config).held_out == [[episode]]:
            break
    hit = np.linspace(0, FRAMES - 1, 8).astype(int)
    (shard,) = path.glob(f"segments/*/images/cam0/c/{(episode * FRAMES + hit[3]) // 256}/0/0/0")
    content = shard.read_bytes()
    try:
        changed = bytearray(content)
        changed[(episode * FRAMES + hit[3]) % 256 * (SIZE * SIZE * 3 + 4) + 17] ^= 4
        shard.write_bytes(changed)
        train(config)
    finally:
        shard.write_bytes(content)
    assert "validation: left out as damaged: E_CHECKSUM" in capsys.readouterr().err
    assert len(read_validation(tmp_path / "run")[0]["action_errors"]) == 7


# --- loss spikes

SPIKE = 7  # a batch; the newest checkpoint before it is that of step 6


@pytest.fixture
def watchful(monkeypatch) -> None:
    monkeypatch.setattr("dita.train_log.LEAST", 4)


def scale(monkeypatch, batches, shift: int = 0) -> None:
    """Make the actions of some batches ten thousand times larger; pass over `shift` batches from step 6 on."""
    get = mixture._Batches.__getitem__

    def scaled(self, step: int):
        batch, left_out = get(self, step + shift if step >= 6 else step)
        return (dataclasses.replace(batch, actions=batch.actions * 1e4) if step in batches else batch), left_out

    monkeypatch.setattr(mixture._Batches, "__getitem__", scaled)


def spiking(store: Path, run: Path, **changes) -> TrainConfig:  # noqa: F811
    diffusion = diffusion_config(prediction_type="sample")  # whose loss grows with the actions
    return config_for(store, run, **({"steps": 10, "keep_last": 9, "diffusion": diffusion} | changes))


def test_a_spike_is_warned_of_and_kept(store, tmp_path, watchful, monkeypatch, capsys) -> None:  # noqa: F811
    scale(monkeypatch, {SPIKE})
    train(spiking(store, tmp_path / "run"))
    assert "step 7: loss" in (said := capsys.readouterr().err) and "is a spike" in said and "back to" not in said
    kept = json.loads((tmp_path / "run" / "spike_0000007.json").read_text())
    assert [step for step, _ in kept["recent"]] == list(range(8)) and len(kept["largest"]) == 4
    assert kept["recent"][-1][1] == losses(tmp_path / "run")[7] > 1e6 * kept["recent"][-2][1]
    assert {"store", "episode", "frame", "source", "loss"} <= kept["largest"][0].keys()
    assert [p.name for p in (tmp_path / "run").glob("spike*")] == ["spike_0000007.json"]


def test_a_rollback_goes_back_and_past_the_spike(store, tmp_path, watchful, monkeypatch, capsys) -> None:  # noqa: F811
    with monkeypatch.context() as patch:
        scale(patch, {SPIKE})
        train(spiking(store, tmp_path / "run", on_spike="rollback"))
        said = capsys.readouterr().err
        assert said.count("back to checkpoint 0000006, on with batch 8; 2 batches were passed over so far") == 1

        def kill(trainer: Trainer, step: int) -> None:
            if trainer.ahead == 2 and step == 6:
                raise RuntimeError("killed")

        with pytest.raises(RuntimeError, match="killed"):
            cut = spiking(store, tmp_path / "cut", on_spike="rollback")
            with_patch("_follow", kill, lambda: train(cut))
        for _ in range(2):  # from before the rollback, which is found again, and from after it
            train(cut, "resume")
            straight, resumed = result(tmp_path / "run"), result(tmp_path / "cut")
            assert straight[1] == resumed[1] and all(torch.equal(t, resumed[0][n]) for n, t in straight[0].items())
            remove_checkpoint(tmp_path / "cut" / "checkpoints" / "0000010")
    with monkeypatch.context() as patch:  # as if batches 6 and 7 had never been
        scale(patch, {}, shift=2)
        train(spiking(store, tmp_path / "without"))
    (a, hash_a), (b, hash_b) = result(tmp_path / "run"), result(tmp_path / "without")
    assert hash_a == hash_b and all(torch.equal(a[n], b[n]) for n in a)
    assert losses(tmp_path / "run") == losses(tmp_path / "without") and len(losses(tmp_path / "run")) == 10


def test_spikes_that_stay_stop_the_run(store, tmp_path, watchful, monkeypatch) -> None:  # noqa: F811
    scale(monkeypatch, set(range(SPIKE, 99)))
    with pytest.raises(ValueError, match=r"still spikes after going back to checkpoint 0000006 3 times.*not the data"):
        train(spiking(store, tmp_path / "run", on_spike="rollback"))
    names = sorted(p.name for p in (tmp_path / "run").glob("spike*"))
    assert names == [f"spike_000000{batch}.json" for batch in (7, 8, 9)] + ["spike_0000010.json"]


def test_without_a_checkpoint_a_spike_is_only_warned_of(store, tmp_path, watchful, monkeypatch, capsys) -> None:  # noqa: F811
    scale(monkeypatch, {SPIKE})
    train(spiking(store, tmp_path / "run", on_spike="rollback", save_every=99))
    assert "there is no checkpoint to go back to yet; training goes on" in capsys.readouterr().err
    assert len(losses(tmp_path / "run")) == 10
