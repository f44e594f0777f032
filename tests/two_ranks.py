"""What two processes do together, one scenario after the other; started by torchrun from test_distributed.py."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dita import train_log
from dita.config import DataConfig, StoreConfig, TrainConfig, from_dict
from dita.datasets import mixture
from dita.train import Trainer, train

PATIENCE = 5.0  # [s] of the last scenario's collectives


def main(folder: Path) -> None:
    base = from_dict(TrainConfig, json.loads((folder / "config.json").read_text()), "test")
    dist.init_process_group("gloo", timeout=timedelta(seconds=900))
    rank = dist.get_rank()
    said: dict[str, str] = {}

    def run(name: str, exist: str = "error", **changes) -> None:
        train(dataclasses.replace(base, run=str(folder / name), **changes), exist)  # pyright: ignore

    def refused(name: str, attempt: Callable[[], None]) -> None:
        try:
            attempt()
            said[name] = "nothing"
        except (Exception, KeyboardInterrupt) as e:
            said[name] = f"{type(e).__name__}: {e}"

    run("ddp")
    run("from_one", "resume")  # one process took its first two steps
    run("to_one", steps=2, optim=dataclasses.replace(base.optim, schedule="constant"))
    run("fsdp", parallel="fsdp", activation_checkpointing=True, async_save=True)
    run("damaged", data=damaged(folder, base))
    with_scaled_batch(5, lambda: run("spike", **spiking(base)))
    refused("parallel", lambda: run("x", parallel="none"))
    refused("batch", lambda: run("x", batch_size=5))
    refused("microbatch", lambda: run("x", batch_size=8, microbatch_size=3))
    refused("taken", lambda: run("ddp"))
    refused("nan", lambda: with_patch("_backward", poison(rank), lambda: run("nan")))
    refused("stop", lambda: with_patch("_follow", stop(rank), lambda: run("stop")))
    (folder / f"said_{rank}.json").write_text(json.dumps(said))

    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=PATIENCE))
    began = time.monotonic()
    try:
        with_patch("_backward", hang(rank), lambda: run("hang"))
    except RuntimeError as e:
        (folder / "hung.json").write_text(json.dumps({"seconds": time.monotonic() - began, "error": str(e)}))
        os._exit(3)  # the other one hangs, and with it any farewell


def with_patch(name: str, before: Callable[[Trainer, int], object], do: Callable[[], None]) -> None:
    """Call `before` after a method of the trainer, for a while."""
    method = getattr(Trainer, name)

    def patched(self: Trainer, step: int, *args: object) -> object:
        out = method(self, step, *args)
        before(self, step)
        return out

    setattr(Trainer, name, patched)
    try:
        do()
    finally:
        setattr(Trainer, name, method)


def damaged(folder: Path, base: TrainConfig) -> DataConfig:
    """Return the data of a store that a test has damaged, of which training leaves out more than it would otherwise."""
    data = dataclasses.replace(base.data, cache="mmap", stores=(StoreConfig(f"{folder}/damaged.zarr", 1.0, None),))
    object.__setattr__(data, "quarantine", 0.1)
    return data


def spiking(base: TrainConfig) -> dict[str, Any]:
    """Return what makes a run spike where its actions are large, and go back."""
    diffusion = dataclasses.replace(base.diffusion, prediction_type="sample")
    return {"steps": 8, "save_every": 2, "on_spike": "rollback", "diffusion": diffusion}


def with_scaled_batch(number: int, do: Callable[[], None]) -> None:
    """Make the actions of one batch ten thousand times larger, and four steps enough to tell a spike, for a while."""
    get, least = mixture._Batches.__getitem__, train_log.LEAST

    def scaled(self: Any, step: int) -> Any:
        batch, left_out = get(self, step)
        return (dataclasses.replace(batch, actions=batch.actions * 1e4) if step == number else batch), left_out

    mixture._Batches.__getitem__, train_log.LEAST = scaled, 4
    try:
        do()
    finally:
        mixture._Batches.__getitem__, train_log.LEAST = get, least


def poison(rank: int) -> Callable[[Trainer, int], None]:
    def act(trainer: Trainer, step: int) -> None:
        if rank == 1 and step == 1:
            assert trainer.gradient is not None
            trainer.gradient[7] = torch.nan

    return act


def stop(rank: int) -> Callable[[Trainer, int], None]:
    def act(trainer: Trainer, step: int) -> None:
        if rank == 1 and step == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    return act


def hang(rank: int) -> Callable[[Trainer, int], None]:
    def act(trainer: Trainer, step: int) -> None:
        if rank == 1 and step == 1:
            time.sleep(600)

    return act


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
