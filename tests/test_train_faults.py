"""What training survives, by the fault table: damage, full and slow disks, workers, loggers, locks, drift."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_train import config_for, losses, result, store  # noqa: F401
from two_ranks import with_patch

from dita import checkpoint
from dita.checkpoint import NoSpace, last_checkpoint, load_policy
from dita.cli import compose
from dita.config import EvalConfig, StoreConfig, ValidationConfig
from dita.datasets import mixture
from dita.datasets.filters import write_filter
from dita.run_folder import MAY_CHANGE, NEVER_CHANGES, Preempted, describe, newest_good, refuse_drift, run_folder
from dita.train import Trainer, build_policy, train
from dita.train_data import open_data
from dita.train_log import LEAST, SpikeWatch
from dita.validate import best_steps, held_out, read_validation


@pytest.fixture(scope="module")
def finished(store, tmp_path_factory) -> Path:  # noqa: F811
    run = tmp_path_factory.mktemp("finished") / "run"
    train(config_for(store, run, save_every=1, steps=3, keep_last=3))
    return run


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit": lambda p: flip(next(p.glob("*.safetensors")), 100_003),
    "a truncated shard": lambda p: os.truncate(next(p.glob("*.safetensors")), 1000),
    "an empty shard": lambda p: os.truncate(next(p.glob("*.safetensors")), 0),
    "a missing shard": lambda p: next(p.glob("*.safetensors")).unlink(),
    "missing values": lambda p: (p / "train.json").unlink(),
    "changed values": lambda p: (p / "train.json").write_text("{}"),
    "a shard of another checkpoint": lambda p: shutil.copy(next(p.glob("*.safetensors")), p / "shard-9.safetensors"),
    "a manifest of noise": lambda p: (p / "manifest.json").write_bytes(b"\x93\x00"),
    "an empty manifest": lambda p: (p / "manifest.json").write_text('{"version": 2}'),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_by_name_and_said_loudly(kind: str, finished: Path, tmp_path, capsys) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    newest = run / "checkpoints" / "0000003" / "train"
    DAMAGE[kind](newest)
    assert newest_good(run) == "0000002"
    said = capsys.readouterr().err
    assert f"DAMAGED CHECKPOINT 0000003 IS NOT USED: {newest}" in said
    assert "CONTINUING FROM THE OLDER CHECKPOINT 0000002" in said
    for name in ("0000001", "0000002"):
        DAMAGE[kind](run / "checkpoints" / name / "train")
    with pytest.raises(ValueError, match="0000001"):
        newest_good(run)


def test_a_run_continues_from_the_checkpoint_before_a_damaged_one(finished, store, tmp_path, capsys) -> None:  # noqa: F811
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    flip(next((run / "checkpoints" / "0000003" / "train").glob("*.safetensors")), 77_777)
    train(config_for(store, run, save_every=1, steps=3, keep_last=3), "resume")
    assert "CONTINUING FROM THE OLDER CHECKPOINT 0000002" in capsys.readouterr().err
    (tensors, ours), (others, theirs) = result(run), result(finished)
    assert ours == theirs and all(torch.equal(t, others[n]) for n, t in tensors.items())


def test_what_a_killed_save_left_is_removed(finished, store, tmp_path) -> None:  # noqa: F811
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    half = run / "checkpoints" / "0000004" / ".train.partial"
    half.mkdir(parents=True)
    (half / "shard-1.safetensors").write_bytes(b"half")
    assert last_checkpoint(run).name == "0000003"
    train(config_for(store, run, save_every=1, steps=3, keep_last=3), "resume")
    assert not half.parent.exists() and last_checkpoint(run).name == "0000003"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_fills_up_ends_with_75(number: int, store, tmp_path, monkeypatch) -> None:  # noqa: F811
    seal, saved = checkpoint._seal, []

    def full(partial: Path, folder: Path) -> None:
        saved.append(folder)
        if len(saved) > 2:  # a policy and a train state were written
            raise OSError(number, os.strerror(number))
        seal(partial, folder)

    monkeypatch.setattr(checkpoint, "_seal", full)
    with pytest.raises(NoSpace, match=r"0000002.* was not saved .*bytes are free: make room and continue") as e:
        train(config_for(store, tmp_path / "run", save_every=1, steps=4))
    assert e.value.exit_code == 75
    monkeypatch.undo()
    assert last_checkpoint(tmp_path / "run").name == "0000001"
    assert not list((tmp_path / "run").rglob(".*.partial"))


def test_storage_that_fails_costs_checkpoints_then_the_run(store, tmp_path, monkeypatch, capsys) -> None:  # noqa: F811
    def broken(partial: Path, folder: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint, "_seal", broken)
    with pytest.raises(OSError, match="the third checkpoint in a row that was not saved"):
        train(config_for(store, tmp_path / "run", save_every=1, steps=9))
    assert capsys.readouterr().err.count("training goes on to the next checkpoint") == 2
    assert len(losses(tmp_path / "run")) == 3


def test_a_save_that_takes_long_skips_the_next_one(store, tmp_path, monkeypatch, capsys) -> None:  # noqa: F811
    seal, free = checkpoint._seal, threading.Event()

    def slow(partial: Path, folder: Path) -> None:
        assert free.wait(300)
        seal(partial, folder)

    monkeypatch.setattr(checkpoint, "_seal", slow)
    config = config_for(store, tmp_path / "run", save_every=1, steps=3, keep_last=3, async_save=True, save_timeout=1e-9)
    with_patch("_follow", lambda _, step: free.set() if step == 2 else None, lambda: train(config))
    said = capsys.readouterr().err
    assert "step 2 is not saved" in said and "the storage is slow" in said
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["0000001", "0000003"]
    # what was written while training went on is the state of its own step
    plain = tmp_path / "plain"
    monkeypatch.undo()
    train(config_for(store, plain, save_every=1, steps=3, keep_last=3))
    for step in ("0000001", "0000003"):
        a, b = (checkpoint.load_train_state(r / "checkpoints" / step / "train") for r in (tmp_path / "run", plain))
        assert a[1]["loss_hash"] == b[1]["loss_hash"] and all(torch.equal(t, b[0][n]) for n, t in a[0].items())
        one, two = (load_policy(r / "checkpoints" / step).state_dict() for r in (tmp_path / "run", plain))
        assert all(torch.equal(t, two[n]) for n, t in one.items())


def test_signals_while_saving_leave_a_good_checkpoint(store, tmp_path, monkeypatch) -> None:  # noqa: F811
    seal = checkpoint._seal

    def interrupted(partial: Path, folder: Path) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        seal(partial, folder)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(checkpoint, "_seal", interrupted)
    with pytest.raises(Preempted, match="stopped after step 2; checkpoint saved") as e:
        train(config_for(store, tmp_path / "run", save_every=1))
    assert e.value.exit_code == 85 and e.value.signal == signal.SIGTERM
    monkeypatch.undo()
    assert newest_good(tmp_path / "run") == "0000002"  # that of step 1 was being written when the signal came
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["0000001", "0000002"]
    train(config_for(store, tmp_path / "run", save_every=1), "resume")
    train(config_for(store, tmp_path / "straight"))
    assert result(tmp_path / "run")[1] == result(tmp_path / "straight")[1]


def test_weights_that_are_not_finite_are_never_saved(store, tmp_path) -> None:  # noqa: F811
    def spoil(trainer: Trainer, step: int) -> None:
        if step == 1:
            next(iter(trainer.parameters.values())).data.fill_(torch.inf)

    with pytest.raises(ValueError, match="step 2: weights are not finite; no checkpoint is written"):
        with_patch("_follow", spoil, lambda: train(config_for(store, tmp_path / "run", save_every=1)))
    assert last_checkpoint(tmp_path / "run").name == "0000001"


# a worker that ends while it hands over leaves torch's half of the socket to the collector
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_that_dies_or_hangs_is_named(number: int, store, tmp_path, monkeypatch) -> None:  # noqa: F811
    monkeypatch.setattr(mixture, "LOOK", 0.5)
    config = config_for(store, tmp_path)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=1), worker_timeout=300.0)
    data = open_data(config)
    preprocess = build_policy(config, data.stores, data.episodes).preprocessor.batch
    batches = iter(mixture.loader(data.datasets, data.sampler, batch_size=4, preprocess=preprocess, start_step=0,
                                  steps=100, workers=1, timeout=300.0))  # fmt: skip
    next(batches)
    (worker,) = active_children()
    try:
        with pytest.raises(RuntimeError, match=str(worker.pid)) as e:
            os.kill(worker.pid, number)
            for _ in range(100):
                next(batches)
        if number == signal.SIGSTOP:
            assert "batch of step" in str(e.value) and f"{worker.pid} stopped" in str(e.value)
    finally:
        worker.join(60)  # killed, by us or with the error
    assert worker.exitcode == -signal.SIGKILL


def test_a_bad_sample_is_named_in_one_line() -> None:
    error = ValueError(
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        "  File x\nValueError: E_CHECKSUM: seg/images, episode 3, frame 7"
    )
    assert mixture._last_line(error) == "E_CHECKSUM: seg/images, episode 3, frame 7"
    assert mixture._last_line(ValueError("as it is")) == "as it is"


def test_a_spike_is_told_from_noise_and_from_slow_change() -> None:
    watch, rng = SpikeWatch(), np.random.default_rng(0)
    for step in range(300):
        assert watch.look(step, float(np.exp(rng.normal(0, 0.2) - step / 100))) is None
    z = watch.look(300, 1e4)
    assert z is not None and z > 10
    assert watch.look(301, float(np.exp(-3.0))) is None  # the spike itself does not hide the next one
    assert watch.look(302, 1e4) is not None
    short = SpikeWatch()
    assert [short.look(step, 1e9 if step == LEAST - 1 else 1.0) for step in range(LEAST)] == [None] * LEAST


def test_a_logger_that_is_down_costs_no_step(store, tmp_path, monkeypatch, capsys) -> None:  # noqa: F811
    def down(*args: object, **options: object) -> None:
        raise ConnectionError("no route to host")

    client = SimpleNamespace(log=down, finish=down)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: client))
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", down)
    train(config_for(store, tmp_path / "run", wandb="project", steps=2))
    assert len(losses(tmp_path / "run")) == 2
    said = capsys.readouterr().err
    assert "wandb does not work (ConnectionError: no route to host); training goes on" in said
    assert "TensorBoard does not work" in said


def test_a_line_of_the_log_says_what_was_trained_on(finished: Path, store) -> None:  # noqa: F811
    line = json.loads((finished / "log.jsonl").read_text().splitlines()[-1])
    assert line["mixture/small.zarr"] == 1.0 and 0 <= line["data_share"] <= 1 and line["mfu"] > 0
    assert line["loss/arm"] == line["loss/small.zarr"] == pytest.approx(line["loss"])


def test_locks_of_other_machines_and_of_the_dead(store, tmp_path) -> None:  # noqa: F811
    run = tmp_path / "run"
    run.mkdir()
    config, lock = describe(config_for(store, run), []), run / "lock"
    lock.write_text(f"{os.getpid()} another-machine 17")
    with pytest.raises(FileExistsError, match=f"process {os.getpid()} on another-machine is training in"):
        run_folder(run, config, "resume").__enter__()
    os.utime(lock, (time.time() - 61, time.time() - 61))  # not touched for longer than the lease
    with run_folder(run, config, "resume"):
        assert lock.read_text().split()[0] == str(os.getpid())
        with pytest.raises(FileExistsError, match=f"process {os.getpid()} is training in"):
            run_folder(run, config, "resume").__enter__()
    assert not lock.exists()
    lock.write_text(f"{os.getpid()} {os.uname().nodename} 1")  # the number was given to us after its holder died
    with run_folder(run, config, "resume"):
        pass
    lock.write_text("")  # its maker was killed before it wrote: nobody's, after the lease
    with pytest.raises(FileExistsError, match="a process is training in"):
        run_folder(run, config, "resume").__enter__()


def leaves(values: object, path: str = "") -> list[str]:
    if isinstance(values, dict) and values:
        return [leaf for key, inside in values.items() for leaf in leaves(inside, f"{path}.{key}" if path else key)]
    return [path]


def changed(values: dict, field: str) -> dict:
    """Return a copy in which one field is another."""
    key = next(k for k in values if field == k or field.startswith(f"{k}."))
    rest = field[len(key) + 1 :]
    return values | {key: changed(values[key], rest) if rest else "another"}


def test_every_field_that_drifts_is_shown_and_refused_by_its_kind(store, tmp_path, capsys) -> None:  # noqa: F811
    now = describe(config_for(store, tmp_path), open_data(config_for(store, tmp_path)).stores)
    fields, path = leaves(now), tmp_path / "config.json"
    assert {"optim.lr", "policy.vision.tokens", "code.dita/train.py", "code.torch", f"episodes_sha256.{store}"} <= set(
        fields
    )
    kinds = {"may change": 0, "never changes": 0, "refused": 0}
    for field in fields:
        path.write_text(json.dumps(changed(now, field)))
        free, never = (
            any(field == f or field.startswith(f"{f}.") for f in some) for some in (MAY_CHANGE, NEVER_CHANGES)
        )
        if free:
            refuse_drift(tmp_path, now, [])
        elif never:
            with pytest.raises(ValueError, match="never changes"):
                refuse_drift(tmp_path, now, [field])
            with pytest.raises(ValueError, match=rf"{re.escape(field)}: was 'another', now .*; use another run=$"):
                refuse_drift(tmp_path, now, [])
        else:
            with pytest.raises(ValueError, match=rf"{re.escape(field)}: was 'another', now .* --allow-drift"):
                refuse_drift(tmp_path, now, ["optim.clip_norm" if field != "optim.clip_norm" else "seed"])
        kind = "may change" if free else "never changes" if never else "refused"
        said = capsys.readouterr().err
        assert said.count("\n-") == said.count("\n+") - 1 == 1  # the field's two lines, and the header's
        assert f'\n-{field}: "another"\n+{field}: ' in said and said.endswith(f"  # {kind}\n")
        kinds[kind] += 1
        if kind == "refused":
            for allowed in (field, field.split(".")[0]):
                refuse_drift(tmp_path, now, [allowed])
                assert capsys.readouterr().err.endswith("  # allowed\n")
    assert min(kinds.values()) > 10
    with pytest.raises(ValueError, match=r"--allow-drift optim\.lrr: there is no such field"):
        refuse_drift(tmp_path, now, ["optim.lrr"])


def test_drift_is_taken_when_it_is_allowed_and_written_down(finished: Path, store, tmp_path, capsys) -> None:  # noqa: F811
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    base = config_for(store, run, save_every=1, steps=3, keep_last=3)
    other = dataclasses.replace(base, steps=5, optim=dataclasses.replace(base.optim, lr=2e-3))
    before = (run / "config.json").read_text()
    for allowed in ([], ["steps"], ["optim.lr"]):
        with pytest.raises(ValueError, match="was started with another config"):
            train(other, "resume", allow_drift=allowed)
        assert (run / "config.json").read_text() == before and len(losses(run)) == 3
    with pytest.raises(ValueError, match="is of --resume"):
        train(other, "overwrite", allow_drift=["steps"])
    train(other, "resume", allow_drift=["steps", "optim"])
    assert len(losses(run)) == 5
    taken = {"optim.lr": [0.001, 0.002], "steps": [3, 5]}
    assert json.loads((run / "drift.jsonl").read_text()) == {"step": 3, "was, now": taken}
    capsys.readouterr()
    train(other, "resume", allow_drift=["steps", "optim"])  # the same command once more: nothing drifts any more
    assert "---" not in capsys.readouterr().err and len((run / "drift.jsonl").read_text().splitlines()) == 1


def test_other_statistics_are_another_run_even_if_other_episodes_are_allowed(finished, store, tmp_path) -> None:  # noqa: F811
    run, path = tmp_path / "run", tmp_path / "filter.json"
    shutil.copytree(finished, run)
    write_filter(path, {str(store): {"test/3": ["BY_HAND"]}})
    base = config_for(store, run, save_every=1, steps=3, keep_last=3)
    fewer = dataclasses.replace(base.data, stores=(StoreConfig(str(store), 1.0, str(path)),))
    before = (run / "config.json").read_text()
    with pytest.raises(
        ValueError, match=r"data\.stores\[0\]\.filter: was None, now '.*filters_sha256\..*was None, now '"
    ):
        train(dataclasses.replace(base, data=fewer), "resume")
    with pytest.raises(
        ValueError, match=r"statistics differ from those.*\(\d+ values: embodiments\.arm\.stats\..*: was .*, now "
    ):
        train(dataclasses.replace(base, data=fewer), "resume", allow_drift=["data.stores", "filters_sha256"])
    assert (run / "config.json").read_text() == before  # what was refused is not taken for the run's own


def test_gradients_add_up_over_microbatches_to_the_mean_over_the_batch(store, tmp_path) -> None:  # noqa: F811
    lines = []
    for micro in (None, 1, 2):
        run = tmp_path / str(micro)
        train(config_for(store, run, batch_size=8, microbatch_size=micro, steps=1))
        lines.append(json.loads((run / "log.jsonl").read_text()))
    for key in ("loss", "grad_norm"):
        assert lines[0][key] == pytest.approx(lines[1][key], rel=1e-5)
        assert lines[0][key] == pytest.approx(lines[2][key], rel=1e-5)


def test_checkpoints_are_validated_on_what_training_does_not_see(store, tmp_path) -> None:  # noqa: F811
    run = tmp_path / "run"
    config = config_for(store, run, keep_last=1, keep_best=1, validation=ValidationConfig(1, 0.25, 8, None))
    data = open_data(config)
    assert len(data.held_out[0]) == 1 and not set(data.held_out[0]) & set(data.episodes[0])
    train(config)
    lines = read_validation(run)
    assert [v["step"] for v in lines] == [1, 2, 3, 4] and all(len(v["action_errors"]) >= 7 for v in lines)
    best = min(lines, key=lambda v: v["action_error"])["step"]
    assert best_steps(run, 1) == {best}
    assert {int(p.name) for p in (run / "checkpoints").iterdir()} == {best, 4}
    # validating changes nothing
    train(config_for(store, tmp_path / "blind", keep_last=1, validation=ValidationConfig(4, 0.25, 8, None)))
    assert losses(run) == losses(tmp_path / "blind")


def test_worse_checkpoints_are_flagged_only_beyond_chance(store, tmp_path, monkeypatch, capsys) -> None:  # noqa: F811
    import dita.evaluate
    from dita.statistics import Rate, rate
    from dita.validate import validate

    rollouts = compose("eval", ["episodes=20", "videos=0"], EvalConfig)
    config = config_for(store, tmp_path, validation=ValidationConfig(1, 0.0, 8, rollouts))
    wins = {1: 10, 2: 8, 3: 1, 4: 16, 5: 9}

    def evaluate(policy, asked, *, exist: str):
        assert asked.out == str(tmp_path / "rollouts" / f"{step:07d}")
        won = [i < wins[step] for i in range(20)]
        found: Rate = rate(won)
        return SimpleNamespace(macro=found, episodes=[SimpleNamespace(success=w) for w in won])

    monkeypatch.setattr(dita.evaluate, "evaluate", evaluate)
    flagged = []
    for step in wins:
        flagged.append(validate(None, config, tmp_path, step, [None])["regressed"])  # pyright: ignore
    assert flagged == [0.0, 0.0, 1.0, 0.0, 1.0]
    assert "step 3 is worse than step 1 beyond chance: success 5% (" in capsys.readouterr().err
    assert best_steps(tmp_path, 2) == {4, 1}


def test_held_out_episodes() -> None:
    assert held_out([3, 5, 8, 9], 0.0, 0) == [] and len(held_out([3, 5, 8, 9], 0.3, 0)) == 2
    assert set(held_out([3, 5, 8, 9], 0.5, 1)) < {3, 5, 8, 9}
    with pytest.raises(ValueError, match="holds out all 1 episodes"):
        held_out([3], 0.1, 0)


def test_the_ema_follows_with_a_growing_memory(store, tmp_path) -> None:  # noqa: F811
    config = config_for(store, tmp_path)
    data = open_data(config)
    trainer = Trainer(build_policy(config, data.stores, data.episodes), config)
    name, p = next(iter(trainer.parameters.items()))
    expected = None
    for step, value in enumerate((1.0, 5.0, -2.0)):
        p.data.fill_(value)
        trainer._follow(step)
        decay = (0.0, 2 / 11, 3 / 12)[step]  # min(ema_decay, (1 + n) / (10 + n)), as diffusers' EMAModel
        expected = value if expected is None else decay * expected + (1 - decay) * value
        assert trainer.shadow[name].flatten()[0].item() == pytest.approx(expected, rel=1e-6)
