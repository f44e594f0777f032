"""Row 4 in the trainer, and row 11: two processes over gloo against twice one, and whether the losses are the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

from benchmarks.harness import OTHERS, ROOT, Case, busy_cores, interleave
from benchmarks.policy_rows import made_up_batch, make_policy
from dita.batch import Batch, Observation
from dita.cli import compose
from dita.config import TrainConfig
from dita.distributed import ALONE, Ranks
from dita.policy.policy import DitaPolicy
from dita.train import Trainer

GOAL = 0.85
RANKS = 2


def ddp_scaling(tier: str) -> list[Case]:
    """Row 11: samples/s at two processes / (2 x one process), the same global batch of dita_tiny, one thread each."""
    others = busy_cores()
    with TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
        command += ["-m", "benchmarks.train_rows", tier, str(out)]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"torchrun failed: {done.stderr.strip().splitlines()[-1:]}")
        found = json.loads(out.read_text())
    rates = [
        (found["batch"] / two, found["batch"] / one) for two, one in zip(found["two_s"], found["one_s"], strict=True)
    ]
    ratio = median(two / (RANKS * one) for two, one in rates)
    equal = found["two_hash"] == found["one_hash"]
    note = f"losses of {found['steps']} steps {'bit-equal' if equal else 'DIFFER'}"
    quiet = others <= OTHERS and (os.cpu_count() or 1) >= RANKS
    if not quiet:
        note += f"; no ratio: others used {others:.1f} cores"
    return [
        Case(
            "two processes against 2 x one, dita_tiny", median(two for two, _ in rates),
            RANKS * median(one for _, one in rates), "samples/s", ratio if quiet else None,
            f">= {GOAL}x, losses bit-equal", (ratio >= GOAL and equal) if quiet else None if equal else False, note,
            {**found, "others_cores": others, "ratio_if_quiet": ratio},
        )
    ]  # fmt: skip


def made_up_share(policy: DitaPolicy, config: TrainConfig, ranks: Ranks) -> Batch:
    """Make up a rank's windows of a global batch that is the same for any number of ranks."""
    one, rows = made_up_batch(policy), config.batch_size // ranks.world

    def repeat(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.expand(rows, *tensor.shape[1:]).contiguous()

    generator = torch.Generator().manual_seed(0)
    actions = torch.rand(config.batch_size, *one.actions.shape[1:], generator=generator) * 2 - 1
    observation = Observation(*(repeat(getattr(one.observation, f.name)) for f in fields(Observation)))
    valid = repeat(one.action_valid)
    return Batch(observation, actions[ranks.rank * rows : (ranks.rank + 1) * rows] * valid, valid)


def trainer_multinoise(tier: str) -> list[Case]:
    """Row 4 through whole steps of the trainer (dita_tiny): one with K noise samples against K with one."""
    cases = []
    for k, goal in ((4, 3.3), (8, 6.0)):
        overrides = ["peak_tflops=1", *([] if tier == "full" else ["experiment=smoke"])]
        configs = [compose("train", [*overrides, f"noise_samples_per_context={n}"], TrainConfig) for n in (k, 1)]
        packed, single = (Side(replace(c, batch_size=16 if tier == "full" else 2, steps=10**6), ALONE) for c in configs)
        found = interleave(partial(packed.run, 1), partial(single.run, k), 5 if tier == "full" else 1)
        cases.append(found.case(f"K={k} against {k} steps of the trainer", goal))
    return cases


class Side:
    """A trainer, and how long its steps took."""

    def __init__(self, config: TrainConfig, ranks: Ranks) -> None:
        policy = make_policy(config.policy, config.diffusion).train().requires_grad_(True)
        self.trainer = Trainer(policy, config, ranks)
        self.batch = made_up_share(policy, config, ranks)
        self.seconds: list[float] = []

    def run(self, steps: int) -> None:
        """Take some steps."""
        began = time.perf_counter()
        for _ in range(steps):
            self.trainer.step(self.trainer.step_done, self.batch)
        self.seconds.append((time.perf_counter() - began) / steps)


def _rank(tier: str, out: Path) -> None:
    """Train in turn as one of two processes and, on rank 0, alone while the other one waits."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, full = dist.get_rank(), tier == "full"
    batch, micro, steps, pairs = (64, 16, 4, 7) if full else (4, 2, 1, 2)
    config = compose("train", ["peak_tflops=1", *([] if full else ["experiment=smoke"])], TrainConfig)
    config = replace(config, batch_size=batch, microbatch_size=micro, steps=1000)
    two, one = Side(config, Ranks(rank, RANKS)), Side(config, ALONE)
    turns: list[Callable[[], None]] = [lambda: two.run(steps), lambda: one.run(steps) if rank == 0 else None]
    for _ in range(pairs + 1):  # the first one warms up
        for turn in turns:
            dist.barrier()
            turn()
    if rank == 0:
        hashes = {"two_hash": two.trainer.loss_hash, "one_hash": one.trainer.loss_hash}
        seconds = {"two_s": two.seconds[1:], "one_s": one.seconds[1:]}
        out.write_text(json.dumps({"batch": batch, "steps": steps * (pairs + 1), **seconds, **hashes}))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _rank(sys.argv[1], Path(sys.argv[2]))
