"""Low-rank adapters through peft: put into a policy for training, folded into its weights wherever it is written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from dita.config import LoraConfig
from dita.policy.policy import DitaPolicy

ADAPTED = ("trunk.", "vision.qformer.")  # whose linear layers get adapters
# of a policy's parameters: what reads and writes the padded vectors, and the robots' tokens; small, so trained whole
PROJECTIONS = ("model.state.", "model.action.", "model.head.", "model.embodiment.")


def train_projections(policy: DitaPolicy) -> None:
    """Freeze all but the state and action projections and the embodiment token."""
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(name.startswith(PROJECTIONS))


def add_adapters(policy: DitaPolicy, config: LoraConfig, seed: int) -> None:
    """Add adapters that start as the identity to the trunk and the Q-Former; all else but the projections is frozen.

    Raises:
        ValueError: peft is not installed.
    """
    try:
        import peft  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        raise ValueError("method=lora needs the package peft: pip install 'dita[finetune]'") from None
    torch.manual_seed(seed)
    targets = [n for n, m in policy.model.named_modules() if isinstance(m, nn.Linear) and n.startswith(ADAPTED)]
    lora = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets)  # pyright: ignore
    peft.inject_adapter_in_model(lora, policy.model)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(".lora_" in name or name.startswith(PROJECTIONS))


def merged_weights(policy: DitaPolicy, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return weights with the adapters folded in at the scale of training; those of a policy without, as they are."""
    if not any(".base_layer." in name for name in weights):
        return weights
    from peft.tuners.lora import LoraLayer  # pyright: ignore[reportMissingImports]

    merged = {name.replace(".base_layer.", "."): t for name, t in weights.items() if ".lora_" not in name}
    for name, module in policy.named_modules():
        if isinstance(module, LoraLayer):
            a, b = (weights[f"{name}.lora_{part}.default.weight"] for part in "AB")
            merged[f"{name}.weight"] = merged[f"{name}.weight"] + module.scaling["default"] * (b @ a)
    return merged
