"""Temporal ensembling of ACT (Zhao et al., arXiv 2304.13705, section IV-A): overlapping predictions are averaged.

At step t, the prediction that chunk i (0 is the oldest that reaches t) made for it weighs exp(-m i). ACT's actions are
absolute; a delta that adds to the last command is composed to where it leads first, as the live stack does, for two
chunks that disagree about the way may agree about the place. Grippers are not averaged: half of open and closed is
neither, so the newest prediction counts.
Shape legend: n steps of a chunk, c chunks, a action dims, d dims of a field.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64
from scipy.spatial.transform import Rotation

from dita.embodiment import slices
from dita.types import EmbodimentSpec, FieldSpec

ALIKE = 1e-9  # [rad] by which a step of the mean of rotations moves it when it has arrived


class Ensemble:
    """One episode's overlapping chunks."""

    def __init__(self, spec: EmbodimentSpec, decay: float) -> None:
        """Begin an episode.

        Raises:
            ValueError: a delta in the tool's frame or from the chunk's start, which has no place to average.
        """
        self._fields, self._decay = [_Field(f, here) for f, here, _ in slices(spec.action)], decay
        self._chunks: list[tuple[int, int, list[Any]]] = []  # (step of row 0, rows, targets by field), oldest first

    def chunk(self, step: int, values: Float32[np.ndarray, "n a"]) -> Float32[np.ndarray, "n a"]:
        """Take the chunk that was predicted at `step` and return what to execute from there on."""
        n, rows = len(values), np.asarray(values, np.float64)
        self._chunks = [c for c in self._chunks if c[0] + c[1] > step]
        self._chunks.append((step, n, [f.targets(rows[:, f.here]) for f in self._fields]))
        reach = np.array(
            [begin + length - step for begin, length, _ in self._chunks]
        )  # steps from now on that a chunk has
        covers = np.arange(n) < reach[:, None]  # [c n]
        weights = np.where(covers, np.exp(-self._decay * (np.cumsum(covers, 0) - 1)), 0.0)
        weights /= weights.sum(0)
        out = rows.copy()
        for k, f in enumerate(self._fields):
            seen = [targets[k][step - begin :][:n] for begin, _, targets in self._chunks]
            out[:, f.here] = f.average(seen, covers, weights)
        return out.astype(np.float32)

    def executed(self, action: Float32[np.ndarray, "a"]) -> None:
        """Take what was executed in one step, clipped to the limits: deltas add to it."""
        for f in self._fields:
            f.move(np.asarray(action, np.float64)[f.here])


class _Field:
    """How one field of the action is averaged."""

    def __init__(self, f: FieldSpec, here: slice) -> None:
        self.here, self._kind = here, f.kind
        self._newest = f.kind.startswith("gripper")
        self._turn = f.kind.startswith("ee_rotation")
        # what adds to the measured state cannot be composed: those deltas are averaged as they are
        self._adds = f.mode == "delta" and f.reference == "commanded"
        if f.mode == "delta" and (f.reference == "chunk_start" or f.frame == "tool"):
            raise ValueError(
                f"temporal_ensembling: {f.name} is a delta in frame {f.frame} from {f.reference}; it averages absolute "
                "fields and base-frame deltas that add to the command or the state"
            )
        self._at: Any = Rotation.identity() if self._turn else np.zeros(f.size)  # moved since the episode's start

    def move(self, action: Float64[np.ndarray, "d"]) -> None:
        if self._adds:
            self._at = Rotation.from_rotvec(action) * self._at if self._turn else self._at + action

    def targets(self, rows: Float64[np.ndarray, "n d"]) -> Any:
        """Return what a chunk's rows lead to: numbers [n d], or n rotations."""
        if not self._turn:
            return self._at + np.cumsum(rows, 0) if self._adds else rows
        turns = _rotations(self._kind, rows)
        if not self._adds:
            return turns
        found, at = [], self._at
        for turn in turns:
            found.append(at := turn * at)
        return Rotation.concatenate(found)

    def average(
        self, seen: list[Any], covers: Bool[np.ndarray, "c n"], weights: Float64[np.ndarray, "c n"]
    ) -> Float64[np.ndarray, "n d"]:
        """Average what each chunk has from now on, and return it as this field's action."""
        newest, n = seen[-1], covers.shape[1]
        if self._newest:
            return newest
        if not self._turn:
            total = np.zeros_like(newest)
            for targets, w in zip(seen, weights, strict=True):
                total[: len(targets)] += w[: len(targets), None] * targets
            return np.diff(total, axis=0, prepend=self._at[None]) if self._adds else total
        mean = newest
        for _ in range(32):  # the mean on SO(3), Karcher's, by iteration from the newest
            step = np.zeros((n, 3))
            for targets, w in zip(seen, weights, strict=True):
                step[: len(targets)] += w[: len(targets), None] * (targets * mean[: len(targets)].inv()).as_rotvec()
            mean = Rotation.from_rotvec(step) * mean
            if np.linalg.norm(step, axis=1).max() < ALIKE:
                break
        if self._adds:
            before = Rotation.concatenate([self._at, mean[:-1]]) if n > 1 else self._at
            return (mean * before.inv()).as_rotvec().reshape(n, 3)
        return (
            mean.as_rotvec()
            if self._kind == "ee_rotation_axis_angle"
            else mean.as_matrix()[:, :, :2].transpose(0, 2, 1).reshape(n, 6)
        )


def _rotations(kind: str, rows: Float64[np.ndarray, "n d"]) -> Rotation:
    """Read axis-angle vectors, or the two columns of 6D rotations (Zhou et al., arXiv 1812.07035)."""
    if kind == "ee_rotation_axis_angle":
        return Rotation.from_rotvec(rows)
    x = rows[:, :3] / np.linalg.norm(rows[:, :3], axis=1, keepdims=True)
    y = rows[:, 3:] - (rows[:, 3:] * x).sum(1, keepdims=True) * x
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    return Rotation.from_matrix(np.stack([x, y, np.cross(x, y)], axis=2))
