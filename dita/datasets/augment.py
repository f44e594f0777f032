"""Image augmentation on the device, on uint8 batches, the same for all frames and views of a window."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from dita.batch import Batch
from dita.config import AugmentConfig

LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def augment(batch: Batch, config: AugmentConfig, seed: int) -> Batch:
    """Shift and recolour the images of a batch; a pure function of (batch, config, seed)."""
    if config.shift == 0 and max(config.brightness, config.contrast, config.saturation) == 0:
        return batch
    generator = torch.Generator().manual_seed(seed)
    images = batch.observation.images
    if config.shift:
        images = _shift(images, config.shift, generator)
    if max(config.brightness, config.contrast, config.saturation) > 0:
        images = _recolour(images, config, generator)
    return dataclasses.replace(batch, observation=dataclasses.replace(batch.observation, images=images))


def _shift(images: UInt8[Tensor, "b t v c h w"], most: int, generator: torch.Generator) -> UInt8[Tensor, "b t v c h w"]:
    b, t, v, c, h, w = images.shape
    padded = F.pad(images.reshape(b, t * v * c, h, w).float(), [most] * 4, mode="replicate").byte()
    offsets = torch.randint(2 * most + 1, (b, 2), generator=generator).tolist()
    moved = torch.stack([padded[i, :, y : y + h, x : x + w] for i, (y, x) in enumerate(offsets)])
    return moved.view(b, t, v, c, h, w)


def _recolour(images: UInt8[Tensor, "b t v c h w"], config: AugmentConfig, generator: torch.Generator) -> Tensor:
    def factor(strength: float) -> Float[Tensor, "b 1 1 1 1 1"]:
        draw = torch.rand(images.shape[0], generator=generator) * 2 - 1
        return (1 + strength * draw).to(images.device).view(-1, 1, 1, 1, 1, 1)

    x = images.float() * factor(config.brightness)
    mean = x.mean(dim=(1, 2, 3, 4, 5), keepdim=True)
    x = mean + (x - mean) * factor(config.contrast)
    luma = torch.tensor(LUMA, device=x.device).view(1, 1, 1, 3, 1, 1)
    grey = (x * luma).sum(3, keepdim=True)
    x = grey + (x - grey) * factor(config.saturation)
    return x.round().clamp(0, 255).byte()
