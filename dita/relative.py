"""Absolute actions <-> actions relative to the state at the chunk's start, field by field.

What a policy learns from relative targets does not depend on where the arm happens to stand; what leaves the
preprocessor is absolute again. Positions subtract; a rotation is the turn from the state's to the action's, in the
field's own frame of reference: R_action R_state^T. Deltas, grippers and velocities stay as they are.
Shape legend: n actions, a action dims, s state dims, m frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Float32

from dita.embodiment import slices
from dita.types import EmbodimentSpec, FieldSpec

KINDS = ("ee_position", "joint_position", "ee_rotation_6d")
Combine = Callable[[np.ndarray, np.ndarray], np.ndarray]


def to_relative(
    values: Float32[np.ndarray, "... a"], state: Float32[np.ndarray, "... s"], spec: EmbodimentSpec
) -> Float32[np.ndarray, "... a"]:
    """Express absolute position and rotation fields relative to a state; inverts `to_absolute`.

    Raises:
        ValueError: such an action field has no state field of its kind, size and frame.
    """
    return _combine(values, state, spec, np.subtract, lambda a, s: a @ np.swapaxes(s, -1, -2))


def to_absolute(
    values: Float32[np.ndarray, "... a"], state: Float32[np.ndarray, "... s"], spec: EmbodimentSpec
) -> Float32[np.ndarray, "... a"]:
    """Undo `to_relative`."""
    return _combine(values, state, spec, np.add, np.matmul)


def relative_chunks(
    state: Float32[np.ndarray, "m s"],
    action: Float32[np.ndarray, "m a"],
    spec: EmbodimentSpec,
    rows: range,
    stride: int,
) -> Float32[np.ndarray, "k a"]:
    """Return every real action of every chunk of an episode, relative to its chunk's start: what statistics are of.

    Args:
        rows: of a chunk, 0 for the action of the frame itself, negative for past ones.
        stride: frames between rows.
    """
    frames = np.arange(len(state))
    parts = []
    for row in rows:
        other = frames + row * stride
        real = (other >= 0) & (other < len(action))
        parts.append(to_relative(action[other[real]], state[real], spec))
    return np.concatenate(parts)


def anchors(spec: EmbodimentSpec) -> Iterator[tuple[FieldSpec, slice, slice]]:
    """Yield (absolute action field, its slice of the action, the slice of the state it is relative to).

    Raises:
        ValueError: as `to_relative`.
    """
    states = {(f.kind, f.size, f.frame): here for f, here, _ in slices(spec.state) if f.mode == "absolute"}
    for field, here, _ in slices(spec.action):
        if field.mode != "absolute" or field.kind not in KINDS:
            continue
        if (field.kind, field.size, field.frame) not in states:
            raise ValueError(
                f"preprocess.actions=relative: action {field.name!r} of {spec.name!r} needs a state field of kind "
                f"{field.kind}, size {field.size}, frame {field.frame}; there are: "
                + ", ".join(f"{f.name} ({f.kind}, {f.size}, {f.frame})" for f in spec.state)
            )
        yield field, here, states[field.kind, field.size, field.frame]


def _combine(values: np.ndarray, state: np.ndarray, spec: EmbodimentSpec, vector: Combine, turn: Combine) -> np.ndarray:
    out = values.astype(np.float32, copy=True)
    for field, here, there in anchors(spec):
        if field.kind == "ee_rotation_6d":
            out[..., here] = _six(turn(_matrix(values[..., here]), _matrix(state[..., there])))
        else:
            out[..., here] = vector(values[..., here], state[..., there])
    return out


def _matrix(six: np.ndarray) -> np.ndarray:
    """Return rotation matrices [... 3 3] of their first two columns [... 6], made orthonormal (arXiv 1812.07035)."""
    first, second = six[..., :3].astype(np.float64), six[..., 3:].astype(np.float64)
    x = first / np.linalg.norm(first, axis=-1, keepdims=True)
    y = second - (x * second).sum(-1, keepdims=True) * x
    y = y / np.linalg.norm(y, axis=-1, keepdims=True)
    return np.stack([x, y, np.cross(x, y)], axis=-1)


def _six(matrix: np.ndarray) -> np.ndarray:
    return np.concatenate([matrix[..., 0], matrix[..., 1]], axis=-1)
