"""Augmentation: published ranges, one draw per window and camera, exact colours, a pure function of its seed."""

from __future__ import annotations

import colorsys
import dataclasses

import numpy as np
import pytest
import torch
from conftest import contract_of, embodiment_dict, make_window, policy_config

from dita.batch import Batch
from dita.config import AugmentConfig
from dita.datasets.augment import augment
from dita.embodiment import embodiment_from_dict
from dita.preprocess import Preprocessor

OFF = AugmentConfig(0, 0.0, 0.0, 0.0, 0.0, 0.0)
PUBLISHED = AugmentConfig(0, 0.2, 0.2, 0.2, 0.2, 0.05)


def only(**changes: float) -> AugmentConfig:
    return dataclasses.replace(OFF, **changes)


@pytest.fixture
def batch() -> Batch:
    spec = embodiment_from_dict(embodiment_dict(cameras=2))
    preprocessor = Preprocessor(contract_of([spec], policy_config(cameras=2)))
    return preprocessor.batch([make_window(spec, i) for i in range(3)])


def with_images(batch: Batch, images: torch.Tensor) -> Batch:
    return dataclasses.replace(batch, observation=dataclasses.replace(batch.observation, images=images))


def test_a_pure_function_of_its_seed(batch: Batch) -> None:
    config = dataclasses.replace(PUBLISHED, shift=3)
    a, b, c = (augment(batch, config, seed).observation.images for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert a.dtype == torch.uint8 and a.shape == batch.observation.images.shape
    assert augment(batch, OFF, 1) is batch
    assert torch.equal(augment(batch, config, 1).actions, batch.actions)


@pytest.mark.parametrize("part", [f.name for f in dataclasses.fields(AugmentConfig)])
def test_frames_share_a_draw_and_cameras_do_not(batch: Batch, part: str) -> None:
    images = batch.observation.images
    same = images[:1, :1, :1].expand_as(images).contiguous()  # every frame, camera and window alike
    out = augment(with_images(batch, same), only(**{part: 3 if part == "shift" else 0.2}), 6).observation.images
    assert not torch.equal(out, same)
    assert torch.equal(out[:, 0], out[:, 1])
    views = [out[i, 0, v] for i in range(3) for v in range(2)]
    assert len({view.numpy().tobytes() for view in views}) == len(views)


def test_shift_and_crop_keep_flat_pictures_flat(batch: Batch) -> None:
    flat = torch.full_like(batch.observation.images, 100)
    for config in (only(shift=3), only(crop=0.2)):
        assert torch.equal(augment(with_images(batch, flat), config, 1).observation.images, flat)


def test_shift_moves_whole_pixels_and_repeats_edges(batch: Batch) -> None:
    images = batch.observation.images
    out = augment(batch, only(shift=2), 0).observation.images
    padded = torch.nn.functional.pad(images.float().flatten(0, 1), (2, 2, 2, 2, 0, 0), mode="replicate").byte()
    padded = padded.view(3, 2, 2, 3, 36, 36)
    for i in range(3):
        for v in range(2):
            places = [(y, x) for y in range(5) for x in range(5)
                      if torch.equal(out[i, :, v], padded[i, :, v, :, y : y + 32, x : x + 32])]  # fmt: skip
            assert len(places) == 1


def test_a_crop_shows_the_published_share_of_the_area(batch: Batch) -> None:
    """On a ramp, the difference between neighbours is the share of the side that is shown."""
    ramp = torch.arange(32, dtype=torch.uint8) * 7
    columns = ramp.expand(3, 2, 2, 3, 32, 32).contiguous()
    shares, lefts = [], []
    for seed in range(60):
        wide = augment(with_images(batch, columns), only(crop=0.2), seed).observation.images.float()
        high = augment(with_images(batch, columns.transpose(4, 5)), only(crop=0.2), seed).observation.images.float()
        width = (wide[..., 25] - wide[..., 6])[:, 0, :, 0, 0] / (19 * 7)
        height = (high[..., 25, :] - high[..., 6, :])[:, 0, :, 0, 0] / (19 * 7)
        shares.append((width * height).flatten())
        lefts.append(((wide[..., 0] / 7)[:, 0, :, 0, 0] / (32 * (1 - width)).clamp(min=0.5)).flatten())
        assert ((width / height).log().abs() < np.log(1.1) + 0.03).all()
    area = torch.cat(shares)
    assert 0.78 < area.min() < 0.83 and 0.97 < area.max() < 1.02 and 0.88 < area.mean() < 0.92
    assert torch.cat(lefts).std() > 0.15  # anywhere, not always in the middle


def test_brightness_and_contrast_stay_in_their_ranges(batch: Batch) -> None:
    grey = torch.full_like(batch.observation.images, 128)
    grey[..., ::2] = 118
    grey[..., 1::2] = 138
    light, spread = [], []
    for seed in range(50):
        light.append(
            augment(with_images(batch, grey), only(brightness=0.2), seed).observation.images.float().mean((1, 3, 4, 5))
        )
        out = augment(with_images(batch, grey), only(contrast=0.2), seed).observation.images.float()
        spread.append((out[..., 1] - out[..., 0]).mean((1, 3, 4)) / 20)
        assert (out.mean((1, 3, 4, 5)) - 128).abs().max() < 1
    delta = (torch.cat(light) - 128) / 255
    assert -0.205 < delta.min() < -0.18 and 0.18 < delta.max() < 0.205
    factor = torch.cat(spread)
    assert 0.75 < factor.min() < 0.87 and 1.13 < factor.max() < 1.25


def test_colours_are_those_of_hsv(batch: Batch) -> None:
    images = batch.observation.images
    for config in (only(hue=0.05), only(saturation=0.2)):
        out = augment(batch, config, 3).observation.images
        before = np.array([colorsys.rgb_to_hsv(*p) for p in images[1, 0, 1].flatten(1).T.numpy() / 255])
        after = np.array([colorsys.rgb_to_hsv(*p) for p in out[1, 0, 1].flatten(1).T.numpy() / 255])
        clear = (before[:, 1] > 0.3) & (before[:, 2] > 0.5) & (before[:, 1] < 0.8)
        assert clear.sum() > 100
        turn = (after - before + 0.5)[clear, 0] % 1 - 0.5
        ratio = after[clear, 1] / before[clear, 1]
        np.testing.assert_allclose(after[clear, 2], before[clear, 2], atol=0.003)
        if config.hue:
            assert 0.002 < abs(np.median(turn)) <= 0.05
            np.testing.assert_allclose(turn, np.median(turn), atol=0.01)
            np.testing.assert_allclose(ratio, 1, atol=0.02)
        else:
            assert 0.01 < abs(np.median(ratio) - 1) <= 0.2
            np.testing.assert_allclose(ratio, np.median(ratio), atol=0.02)
            np.testing.assert_allclose(turn, 0, atol=0.01)


@pytest.mark.parametrize("wrong", [{"crop": 1.0}, {"hue": 0.6}, {"shift": -1}, {"contrast": -0.1}])
def test_impossible_strengths_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"augment.{next(iter(wrong))}"):
        only(**wrong)
