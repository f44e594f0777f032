"""The torch side of the house: what the policy's two verbs, loss and sample, take.

Shape legend: b batch, t observation frames, v camera slots, c h w image, s padded state, l language tokens,
n chunk length, a padded action. Masks say True = real.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Observation:
    """A batch of observation windows, normalised where it says so; images stay uint8 until they are on the device."""

    images: UInt8[Tensor, "b t v c h w"]
    image_valid: Bool[Tensor, "b t v"]
    state: Float[Tensor, "b t s"]  # normalised, zero where not valid
    state_valid: Bool[Tensor, "b s"]
    language: Int[Tensor, "b l"]  # token ids
    language_valid: Bool[Tensor, "b l"]
    embodiment: Int[Tensor, "b"]  # index into the policy's embodiments

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Observation:
        """Move every tensor to `device`."""
        return Observation(*(getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)))

    def rows(self, part: slice) -> Observation:
        """Take some windows."""
        return Observation(*(getattr(self, f.name)[part] for f in fields(self)))

    def pin_memory(self) -> Observation:
        """Copy to page-locked memory, for copies to a CUDA device that do not block; torch's DataLoader calls it."""
        return Observation(*(getattr(self, f.name).pin_memory() for f in fields(self)))

    @property
    def batch_size(self) -> int:
        """Number of windows b."""
        return self.images.shape[0]


@dataclass(frozen=True, eq=False)
class Batch:
    """Observations with the normalised actions to predict."""

    observation: Observation
    actions: Float[Tensor, "b n a"]  # normalised, zero where not valid
    action_valid: Bool[Tensor, "b n a"]  # a real step and a real dim

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Move every tensor to `device`."""
        return Batch(
            self.observation.to(device, non_blocking),
            self.actions.to(device, non_blocking=non_blocking),
            self.action_valid.to(device, non_blocking=non_blocking),
        )

    def rows(self, part: slice) -> Batch:
        """Take some windows."""
        return Batch(self.observation.rows(part), self.actions[part], self.action_valid[part])

    def pin_memory(self) -> Batch:
        """Copy to page-locked memory; see `Observation.pin_memory`."""
        return Batch(self.observation.pin_memory(), self.actions.pin_memory(), self.action_valid.pin_memory())
