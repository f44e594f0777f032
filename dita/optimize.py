"""The arithmetic of a step: the weight of each sample, the sum of the gradients, the optimizer and its rate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn

from dita.config import OptimConfig


def sample_weights(counted: Float64[np.ndarray, "g"], reduction: str) -> Float64[np.ndarray, "g"]:
    """Return the weight of each sample's squared errors in the loss, given how many elements it has.

    token: every element alike; sample: every sample alike; square: between them, a sample of l elements weighs
    sqrt(l) (InternVL 2.5, arXiv 2412.05271, sec. 3.3).
    """
    power = {"token": 0.0, "square": 0.5, "sample": 1.0}[reduction]
    real = counted > 0
    weights = np.where(real, np.maximum(counted, 1.0) ** -power, 0.0)
    return weights / max(math.fsum(weights * counted), 1e-300)


def flat_gradient(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return one vector whose parts are the parameters' gradients: added over ranks, and clipped, at once.

    torch's DistributedDataParallel orders its buckets anew after the first step of a process, and with them the order
    of sums over three or more ranks: a resumed run would differ from one that never stopped.
    """
    gradient = torch.zeros(sum(p.numel() for p in parameters), device=parameters[0].device)
    offset = 0
    for p in parameters:
        p.grad = gradient[offset : offset + p.numel()].view_as(p)
        offset += p.numel()
    return gradient


class PairwiseSum:
    """Adds the gradients of microbatches in pairs of pairs: ((a + b) + (c + d)) + ...

    One rank with four microbatches then adds in the same order as two ranks with two each. The price is a copy of the
    gradient for each doubling beyond two. FSDP keeps its own sum.
    """

    def __init__(self, running: Tensor | None) -> None:
        self.running = running  # autograd adds a pair into it
        self.done = 0
        self.waiting: list[tuple[int, Tensor]] = []  # (number of pairs in it, sum)

    def begin(self) -> None:
        """Make room for the next microbatch's gradient, which autograd adds to `running`."""
        if self.running is not None and self.done and self.done % 2 == 0:
            self._put_aside()
        self.done += 1

    def finish(self) -> None:
        """Leave the sum of all of them in `running`."""
        if self.running is None or not self.waiting:
            return
        self._put_aside()
        while len(self.waiting) > 1:
            (_, later), (pairs, earlier) = self.waiting.pop(), self.waiting.pop()
            self.waiting.append((pairs, earlier.add_(later)))
        self.running.copy_(self.waiting.pop()[1])

    def _put_aside(self) -> None:
        assert self.running is not None
        pairs, total = 1, self.running.clone()
        self.running.zero_()
        while self.waiting and self.waiting[-1][0] == pairs:
            total = self.waiting.pop()[1].add_(total)
            pairs *= 2
        self.waiting.append((pairs, total))


def make_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """Build AdamW: no decay on vectors, a scaled rate for a pretrained vision backbone."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, p in parameters.items():
        groups.setdefault((".vision.patches." in name, p.ndim >= 2), []).append(p)
    return torch.optim.AdamW(
        [
            {
                "params": params,
                "base_lr": config.lr * (config.vision_lr_scale if backbone else 1.0),
                "weight_decay": config.weight_decay if matrix else 0.0,
            }
            for (backbone, matrix), params in groups.items()
        ],
        lr=config.lr,
        betas=config.betas,
        fused=False,
    )


def lr_scale(step: int, steps: int, config: OptimConfig) -> float:
    """Return the factor on the learning rate: linear warm-up, then constant or cosine to zero."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * progress))
