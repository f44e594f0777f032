"""What a training step costs, counted on the meta device: operations for the MFU, bytes for the dry run."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from dita.batch import Observation
from dita.config import TrainConfig
from dita.policy.policy import DitaPolicy
from dita.preprocess import Contract

SIZES = {"cpu": 1024, "cuda": 8192}  # of the square matrices that a device is measured with


@dataclass(frozen=True)
class Cost:
    """Of one rank; memory is an estimate from above: attention probabilities count, which fused kernels never keep."""

    parameters: int
    trainable: int
    flops_per_window: float  # of the model: forward and backward with all noise samples, without recomputation
    largest_layer: int  # parameters that FSDP gathers at once, outside of which it keeps a shard
    activation_bytes: int  # kept for the backward pass of one microbatch

    def memory(self, shards: int, microbatches: int) -> dict[str, int]:
        """Return bytes per rank by what they are for; shards: ranks that share the state, 1 without FSDP."""
        copies = max(0, (microbatches - 1).bit_length() - 1) if shards == 1 else 0
        gathered = 2 * 4 * self.largest_layer if shards > 1 else 0  # this layer and the next one
        return {
            "weights": 4 * self.parameters // shards + gathered,
            "gradients": 4 * self.trainable * (1 + copies) // shards,
            "AdamW moments": 8 * self.trainable // shards,
            "EMA": 4 * self.trainable // shards,
            "activations": self.activation_bytes,
        }


def training_cost(config: TrainConfig, contract: Contract, microbatch: int) -> Cost:
    """Count a training step without running it."""
    policy = _on_meta(config, contract)
    sizes = {name: p.numel() for name, p in policy.named_parameters()}
    trainable = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    layers = [sum(p.numel() for p in m.parameters()) for m in policy.model.trunk.blocks]
    return Cost(
        sum(sizes.values()), trainable, _flops(policy, config), max([*layers, *sizes.values()]),
        _activations(policy, config, microbatch),
    )  # fmt: skip


def flops_per_window(config: TrainConfig, contract: Contract) -> float:
    """Return the operations of the model for one window: forward and backward with all its noise samples."""
    return _flops(_on_meta(config, contract), config)


def device_peak(device: torch.device, config: TrainConfig) -> float:
    """Return the operations per second that MFU is a share of: config.peak_tflops, or a matrix product measured now."""
    if config.peak_tflops is not None:
        return config.peak_tflops * 1e12
    n, dtype = SIZES[device.type], torch.bfloat16 if config.precision == "bf16" else torch.float32
    a = torch.ones(n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        began = time.perf_counter()
        b = a @ a
        b[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def _on_meta(config: TrainConfig, contract: Contract) -> DitaPolicy:
    with torch.device("meta"):
        policy = DitaPolicy(config.policy, config.diffusion, contract, torch.empty(0))
    policy.preprocessor = None  # pyright: ignore  nothing real goes in
    return policy.to("meta")


def _flops(policy: DitaPolicy, config: TrainConfig, windows: int = 1) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        _pass(policy, config, windows).float().square().sum().backward()
    policy.zero_grad(set_to_none=True)
    return counter.get_total_flops() / windows


def _activations(policy: DitaPolicy, config: TrainConfig, windows: int) -> int:
    if config.precision == "bf16":
        policy = policy.to(torch.bfloat16)
    if config.activation_checkpointing:
        policy.model.checkpoint_activations()
    weights = {p.untyped_storage()._cdata for p in policy.parameters()}
    kept: dict[int, Tensor] = {}  # by storage: views of one count once

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            kept.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _pass(policy, config, windows)
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def _pass(policy: DitaPolicy, config: TrainConfig, b: int) -> Tensor:
    """Run the network on windows of nothing: [b k n A]."""
    p, model = config.policy, policy.model
    k = 1 if config.diffusion.objective == "behaviour_cloning" else config.noise_samples_per_context
    size, t, v = p.vision.image_size, p.n_obs_steps, p.cameras
    with torch.device("meta"):
        observation = Observation(
            torch.zeros(b, t, v, 3, size, size, dtype=torch.uint8),
            torch.ones(b, t, v, dtype=torch.bool),
            torch.zeros(b, t, p.state_dim),
            torch.ones(b, p.state_dim, dtype=torch.bool),
            torch.zeros(b, 1, dtype=torch.long),
            torch.ones(b, 1, dtype=torch.bool),
            torch.zeros(b, dtype=torch.long),
        )
        if p.language.kind == "bytes":
            ids = torch.zeros(1, p.language.max_tokens * 4, dtype=torch.long)
            instruction = model.instruct(ids, ids == 0)
        else:  # frozen, and computed once for each instruction
            words = torch.ones(1, p.language.max_tokens, dtype=torch.bool)
            instruction = model.instruct_states(torch.zeros(1, p.language.max_tokens, p.dim), words)
        context = model.observe(observation, instruction.take(torch.zeros(b, dtype=torch.long)))
        slots = torch.ones(b, model.action_slots, dtype=torch.bool)
        if most := p.max_committed_slots:
            clean = torch.zeros(b, most, p.action_dim)
            context = model.commit(context, clean, slots[:, :most], torch.ones(b, dtype=torch.long))
        x = torch.zeros(b, k, model.action_slots, p.action_dim)
        return model.denoise(x, model.time_tokens(torch.zeros(b, k)), model.suffix(context, slots, k))
