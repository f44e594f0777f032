"""Process groups, FSDP2 wrapping and rank helpers: one process and many run the same training loop.

Ranks come from torchrun's environment or from `srun`'s. What ranks tell each other goes over gloo on the CPU; gradients
go over NCCL on GPUs. Numbers that every rank must agree on are gathered and added in the order of the samples, so that
they do not depend on the number of ranks.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float64
from torch import Tensor, nn

T = TypeVar("T")
PATIENCE = timedelta(days=2)  # for rank 0 to evaluate while the others wait


class OtherRankError(RuntimeError):
    """Rank 0 failed and has said why; this rank stops with it."""


@dataclass(frozen=True)
class Ranks:
    """Where this process stands among the others; without a process group, alone."""

    rank: int = 0
    world: int = 1
    local: int = 0  # on this machine: which GPU
    patient: dist.ProcessGroup | None = None  # waits for days
    saving: dist.ProcessGroup | None = None  # of the threads that write checkpoints: no call of theirs meets ours

    @property
    def first(self) -> bool:
        """Whether this rank writes files, locks, logs and evaluates."""
        return self.rank == 0

    def gather(self, rows: Float64[np.ndarray, "r c"]) -> Float64[np.ndarray, "wr c"]:
        """Return the rows of all ranks in their order, in fp64; each has as many."""
        if self.world == 1:
            return rows
        mine = torch.from_numpy(np.ascontiguousarray(rows, np.float64))
        every = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(every, mine)
        return torch.cat(every).numpy()

    def any(self, flag: bool) -> bool:
        """Return whether the flag is up on any rank."""
        return bool(self.gather(np.array([[float(flag)]])).any())

    def add(self, vector: Tensor) -> None:
        """Add a tensor over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(vector)

    def on_first(self, do: Callable[[], T]) -> T:
        """Call a function on rank 0 and return its plain result on every rank; may take long.

        Raises:
            OtherRankError: it failed; on rank 0 the error itself.
        """
        if self.world == 1:
            return do()
        box: list[Any] = [None, None]
        if not self.first:
            dist.broadcast_object_list(box, src=0, group=self.patient)
            if box[1] is not None:
                raise OtherRankError(f"rank 0: {box[1]}")
            return box[0]
        try:
            box[0] = do()
        except BaseException as e:
            dist.broadcast_object_list([None, f"{type(e).__name__}: {e}"], src=0, group=self.patient)
            raise
        dist.broadcast_object_list(box, src=0, group=self.patient)
        return box[0]

    @contextmanager
    def holding(self, claim: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
        """Hold something on rank 0 for all; what it raises when it is claimed stops every rank."""
        with ExitStack() as stack:
            self.on_first(lambda: stack.enter_context(claim()))
            yield


ALONE = Ranks()


@contextmanager
def processes(device: str, parallel: str, timeout: float) -> Iterator[Ranks]:
    """Join the process group of this job, and leave it at the end; one that is there already is used and kept.

    Args:
        device: cpu, cuda.
        parallel: none refuses more than one process.
        timeout: [s] after which a collective that a rank does not join is an error.

    Raises:
        ValueError: several processes and parallel=none.
    """
    rank, world, local = ranks_of_environment()
    if world > 1 and parallel == "none":
        raise ValueError(f"this job has {world} processes and parallel=none: set parallel=ddp or parallel=fsdp")
    if device.startswith("cuda"):
        torch.cuda.set_device(local if world > 1 else torch.device(device))
    if world == 1 and parallel != "fsdp":
        yield ALONE
        return
    mine = not dist.is_initialized()
    if mine:
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        store = dist.HashStore() if world == 1 else None  # pyright: ignore[reportPrivateImportUsage]
        if store is None:
            os.environ.setdefault("MASTER_ADDR", _first_host())
            os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", "0")) % 20000))
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world))
        ours = {"store": store, "rank": 0, "world_size": 1} if store else {}
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout), **ours)
    try:
        groups: Any = (dist.new_group(backend="gloo", timeout=PATIENCE) for _ in range(2))
        yield Ranks(rank, world, local, *groups)
    finally:
        if mine:
            dist.destroy_process_group()


def ranks_of_environment() -> tuple[int, int, int]:
    """Return (rank, world size, rank on this machine) as torchrun or srun set them; else (0, 1, 0)."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0))
    # set by srun for each task of a step; SLURM_NTASKS is there in a plain shell of a job, too, and says nothing
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        return int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"])
    return 0, 1, 0


def _first_host() -> str:
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    if nodes is None:
        return "localhost"
    done = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
    return done.stdout.split()[0]


def shard(policy: nn.Module, layers: Sequence[nn.Module], device: str) -> None:
    """Shard weights, gradients and optimizer state over the ranks, layer by layer (FSDP2).

    Gradients are added over the ranks, not averaged: the loss of a rank is its share of the global mean already.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    for module in (*layers, policy):
        fully_shard(module, mesh=mesh)
        assert isinstance(module, FSDPModule)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # else it would scale by 1 inside, which gloo cannot


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor on the CPU, gathered from its shards if it has such (then every rank must call this)."""
    from torch.distributed.tensor import DTensor

    full = tensor.detach()
    return (full.full_tensor() if isinstance(full, DTensor) else full).cpu()
