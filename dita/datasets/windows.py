"""Pure index math: which frames and which actions make the window at one step of an episode.

Shape legend: m frames of an episode, t observation frames, n actions of a chunk, a action dims.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Int64
from scipy.spatial.transform import Rotation

from dita.embodiment import slices
from dita.types import EmbodimentSpec, FieldSpec

PadEnd = Literal["mask", "hold"]


def stride_of(dt: float, store_dt: float, what: str) -> int:
    """Return how many frames of a store make `dt` seconds.

    Raises:
        ValueError: `dt` is no whole multiple of `store_dt`.
    """
    stride = round(dt / store_dt)
    if stride < 1 or abs(dt / store_dt - stride) > 1e-3:
        raise ValueError(
            f"{what} {dt:g} s is no whole multiple of the store's {store_dt:g} s between frames; set it to "
            f"{max(stride, 1) * store_dt:g} s in the embodiment, or resample the store"
        )
    return stride


def strides(spec: EmbodimentSpec) -> tuple[int, int]:
    """Return (frames per obs_dt, frames per action_dt) of stores of this embodiment; raise as `stride_of`."""
    dt = 1 / spec.control_hz
    return stride_of(spec.obs_dt, dt, f"{spec.name}: obs_dt"), stride_of(spec.action_dt, dt, f"{spec.name}: action_dt")


def observation_frames(
    step: int, n_obs_steps: int, stride: int
) -> tuple[Int64[np.ndarray, "t"], Bool[np.ndarray, "t"]]:
    """Return the frames that end at `step`, oldest first, and which are real.

    Where the episode had not begun, the window's first real frame is repeated with valid False: what a robot has,
    whose history is still short.
    """
    first = step - stride * (n_obs_steps - 1)
    frames = np.arange(first, step + 1, stride)
    valid = frames >= 0
    if first >= 0:  # most windows: what follows costs microseconds
        return frames, valid
    return np.where(valid, frames, frames[np.argmax(valid)]), valid


def action_rows(
    length: int, step: int, chunk_size: int, stride: int, pad_end: PadEnd, past: int = 0
) -> tuple[Int64[np.ndarray, "n"], Bool[np.ndarray, "n"]]:
    """Return rows of `compose_actions` for a chunk from `step` on, after `past` earlier ones, and which are valid.

    Past the end lies the hold row, number `length`: invalid with pad_end="mask", and so is a row that only partly has
    real actions; valid with "hold". Before the start lies row 0, never valid.
    """
    first, stop = step - stride * past, step + stride * chunk_size
    rows = np.arange(first, stop, stride)
    if first >= 0 and stop <= length:  # most windows: what follows costs microseconds
        return rows, rows >= 0
    valid = (rows >= 0) if pad_end == "hold" else (rows >= 0) & (rows + stride <= length)
    return rows.clip(0, length), valid


def compose_actions(
    actions: Float32[np.ndarray, "m a"], stride: int, fields: tuple[FieldSpec, ...]
) -> Float32[np.ndarray, "m+1 a"]:
    """Return at row i the one action that does what actions i..i+stride-1 do, and a last row that holds still.

    Deltas add up (rotations as rotations, in their frame), an absolute field takes the last value; what lies past the
    end holds still: no delta, the last absolute value.

    Raises:
        ValueError: a delta refers to the start of a chunk, which a store does not have.
    """
    m = len(actions)
    # substep k of row i is action i+k; row m is the hold action
    sub = np.minimum(np.arange(m + 1)[:, None] + np.arange(stride), m)  # [m+1 stride]
    composed = np.empty((m + 1, actions.shape[1]), np.float32)
    for field, here, _ in slices(fields):
        last = actions[-1:, here] if field.mode == "absolute" else np.zeros((1, field.size), np.float32)
        values = np.concatenate([actions[:, here], last])[sub]  # [m+1 stride size]
        if field.reference == "chunk_start":
            raise ValueError(f"action.{field.name}: a delta from the chunk's start cannot be stored per frame")
        if field.mode == "absolute":
            composed[:, here] = values[:, -1]
        elif field.kind == "ee_rotation_axis_angle" and stride > 1:
            composed[:, here] = _compose_rotations(values, in_tool=field.frame == "tool")
        else:
            composed[:, here] = values.sum(1)
    return composed


def _compose_rotations(values: Float32[np.ndarray, "m k 3"], in_tool: bool) -> Float32[np.ndarray, "m 3"]:
    total = Rotation.from_rotvec(values[:, 0])
    for k in range(1, values.shape[1]):
        turn = Rotation.from_rotvec(values[:, k])
        total = total * turn if in_tool else turn * total
    return total.as_rotvec().astype(np.float32)
