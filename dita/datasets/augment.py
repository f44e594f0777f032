"""Image augmentation on the device, on uint8 batches; each window and camera draws once, for all its frames.

Parts, order and ranges are those published for Octo (https://arxiv.org/abs/2405.12213) and OpenVLA
(https://arxiv.org/abs/2406.09246): random resized crop of 0.8 to 1 of the area, brightness 0.2, contrast and
saturation 0.8 to 1.2, hue 0.05. Cameras draw apart, as there: their light and mounting vary apart, too.

Shape legend: b batch, v camera slots, t frames, c h w image.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dita.batch import Batch
from dita.config import AugmentConfig

ASPECT = 0.1  # a crop's width over height is within 1 / (1 + ASPECT) .. 1 + ASPECT


def augment(batch: Batch, config: AugmentConfig, seed: int, first: int = 0) -> Batch:
    """Shift, crop and recolour the images of a batch; a pure function of (batch, config, seed).

    first: number of its first window in a larger batch; each window draws by its own number, however that is cut.
    """
    if not any(dataclasses.astuple(config)):
        return batch
    images = batch.observation.images.transpose(1, 2)  # [b v t c h w]
    b, v = images.shape[:2]
    draws = iter(_draws(seed, range(first, first + b), v).unbind(-1))  # of numbers in 0..1, each [b v]

    def draw(low: float, high: float) -> Float[Tensor, "b v"]:
        return (low + (high - low) * next(draws)).to(images.device)

    def each(values: Float[Tensor, "b v"]) -> Float[Tensor, "b v 1 1 1 1"]:
        return values[:, :, None, None, None, None]

    if config.shift:
        offsets = torch.stack([next(draws), next(draws)], -1) * (2 * config.shift + 1)  # [b v 2]
        images = _shift(images, offsets.long().clamp(max=2 * config.shift) - config.shift)
    x = images.float() / 255
    if config.crop:
        x = _crop(x, draw(1 - config.crop, 1), draw(-1, 1), draw(0, 1), draw(0, 1))
    if config.brightness:
        x = (x + each(draw(-config.brightness, config.brightness))).clamp(0, 1)
    if config.contrast:
        mean = x.mean(dim=(4, 5), keepdim=True)
        x = (mean + (x - mean) * each(draw(1 - config.contrast, 1 + config.contrast))).clamp(0, 1)
    if config.saturation or config.hue:
        factor = each(draw(1 - config.saturation, 1 + config.saturation))[:, :, :, 0]
        x = _recolour(x, factor, each(draw(-config.hue, config.hue))[:, :, :, 0])
    images = (x * 255).round().byte().transpose(1, 2)
    return dataclasses.replace(batch, observation=dataclasses.replace(batch.observation, images=images))


def _draws(seed: int, windows: range, views: int) -> Float[Tensor, "b v 10"]:
    """Return uniform numbers of each window: two for the shift, four for the crop, four for the colours."""
    generator = torch.Generator()
    rows = []
    for window in windows:
        own = np.random.SeedSequence([seed, window]).generate_state(1, np.uint64)[0]
        rows.append(torch.rand(views, 10, generator=generator.manual_seed(int(own >> np.uint64(1)))))
    return torch.stack(rows)


def _shift(images: Tensor, offsets: Tensor) -> Tensor:
    """Move [b v t c h w] by (rows, columns) pixels; edges repeat."""
    b, v, _, _, h, w = images.shape
    offsets = offsets.to(images.device)
    rows = (torch.arange(h, device=images.device) + offsets[:, :, :1]).clamp(0, h - 1)  # [b v h]
    columns = (torch.arange(w, device=images.device) + offsets[:, :, 1:]).clamp(0, w - 1)
    batch = torch.arange(b, device=images.device)[:, None, None, None]
    view = torch.arange(v, device=images.device)[None, :, None, None]
    moved = images.permute(0, 1, 4, 5, 2, 3)[batch, view, rows[:, :, :, None], columns[:, :, None, :]]
    return moved.permute(0, 1, 4, 5, 2, 3)


def _crop(x: Tensor, area: Tensor, aspect: Tensor, down: Tensor, right: Tensor) -> Tensor:
    """Cut a share `area` of [b v t c h w] out and resize it back, bilinear; aspect in -1..1, place in 0..1."""
    b, v, t, c, h, w = x.shape
    ratio = (math.log1p(ASPECT) * aspect).exp()
    height, width = (area / ratio).sqrt().clamp(max=1), (area * ratio).sqrt().clamp(max=1)  # shares of the sides
    # what lies at the output's -1..1 in the input's -1..1
    center_y, center_x = (2 * down - 1) * (1 - height), (2 * right - 1) * (1 - width)
    zero = torch.zeros_like(area)
    theta = torch.stack([width, zero, center_x, zero, height, center_y], -1).view(b * v, 2, 3)
    grid = F.affine_grid(theta, [b * v, t * c, h, w], align_corners=False)
    cut = F.grid_sample(x.reshape(b * v, t * c, h, w), grid, padding_mode="border", align_corners=False)
    return cut.view(b, v, t, c, h, w)


def _recolour(x: Tensor, saturation: Tensor, hue: Tensor) -> Tensor:
    """Scale the saturation and turn the hue (1 = full circle) of [b v t c h w] in HSV."""
    r, g, b = x.unbind(3)
    high, low = x.amax(3), x.amin(3)
    chroma = high - low
    safe = chroma.clamp(min=1e-6)
    h = torch.where(
        high == r, ((g - b) / safe) % 6, torch.where(high == g, (b - r) / safe + 2, (r - g) / safe + 4)
    )  # 0..6
    h = (h + 6 * hue) % 6
    s = (chroma / high.clamp(min=1e-6) * saturation).clamp(0, 1)
    sectors = ((n + h) % 6 for n in (5, 3, 1))  # red, green, blue
    return torch.stack([high * (1 - s * torch.minimum(k, 4 - k).clamp(0, 1)) for k in sectors], 3)
