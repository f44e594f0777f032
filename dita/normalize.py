"""Streaming statistics per embodiment and named field, and the affine maps made from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float32

from dita.config import from_dict
from dita.embodiment import slices
from dita.types import EmbodimentSpec, FieldSpec, FieldStats, NormStats

Method = Literal["q01_q99", "min_max", "mean_std"]
QUANTILE_ROWS = 1_000_000
NO_SPREAD = 1e-6  # in the field's own unit; below it a dimension is constant and maps to 0


class _Running:
    """Count, mean, variance and extremes of rows (Chan et al. 1979), and a thinned sample for quantiles."""

    def __init__(self, dims: int) -> None:
        self.count, self.mean, self.m2 = 0, np.zeros(dims), np.zeros(dims)
        self.low, self.high = np.full(dims, np.inf), np.full(dims, -np.inf)
        self.rows: list[np.ndarray] = []
        self.kept, self.stride = 0, 1

    def add(self, x: np.ndarray) -> None:
        x = x.astype(np.float64)
        n, mean = len(x), x.mean(0)
        delta, total = mean - self.mean, self.count + n
        self.m2 += ((x - mean) ** 2).sum(0) + delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.low, self.high = np.minimum(self.low, x.min(0)), np.maximum(self.high, x.max(0))
        # rows number 0, stride, 2*stride... of the whole stream: the same sample however it is cut into pieces
        kept = x[-self.count % self.stride :: self.stride]
        self.count = total
        self.rows.append(kept)
        self.kept += len(kept)
        if self.kept > QUANTILE_ROWS:
            self.rows = [np.concatenate(self.rows)[::2]]
            self.kept, self.stride = len(self.rows[0]), self.stride * 2

    def stats(self, cut: slice) -> FieldStats:
        q01, q99 = np.quantile(np.concatenate(self.rows)[:, cut], [0.01, 0.99], axis=0)
        std = np.sqrt(self.m2 / self.count)
        values = (self.mean[cut], std[cut], self.low[cut], self.high[cut], q01, q99)
        return FieldStats(self.count, *(tuple(float(v) for v in value) for value in values))


def fit(
    spec: EmbodimentSpec, episodes: Iterable[tuple[Float32[np.ndarray, "m s"], Float32[np.ndarray, "m a"]]]
) -> NormStats:
    """Compute statistics in one pass over (state, action) arrays of episodes.

    Raises:
        ValueError: there is nothing to fit on.
    """
    state, action = _Running(spec.state_dim), _Running(spec.action_dim)
    for states, actions in episodes:
        state.add(states)
        action.add(actions)
    if action.count == 0:
        raise ValueError(f"no episodes to compute the statistics of {spec.name!r} from")
    fields = {f"state/{f.name}": state.stats(cut) for f, cut, _ in slices(spec.state)}
    fields |= {f"action/{f.name}": action.stats(cut) for f, cut, _ in slices(spec.action)}
    return NormStats(spec.name, fields)


def pool(parts: Sequence[FieldStats]) -> FieldStats:
    """Join statistics of the same field on several robots as if their rows were one set (Chan et al. 1979).

    Count, mean, spread and extremes are exact. Quantiles of the whole lie between those of the parts: the outermost
    are taken, so that no part's 98 % are cut.
    """
    if len(parts) == 1:
        return parts[0]
    counts = np.array([p.count for p in parts], np.float64)
    share = (counts / counts.sum())[:, None]
    mean, std = (np.array([getattr(p, key) for p in parts]) for key in ("mean", "std"))  # [parts d]
    middle = (share * mean).sum(0)
    spread = np.sqrt((share * (std**2 + (mean - middle) ** 2)).sum(0))
    low, low_q = (np.array([getattr(p, key) for p in parts]).min(0) for key in ("min", "q01"))
    high, high_q = (np.array([getattr(p, key) for p in parts]).max(0) for key in ("max", "q99"))
    values = (middle, spread, low, high, low_q, high_q)
    return FieldStats(int(counts.sum()), *(tuple(float(v) for v in value) for value in values))


def beyond(known: FieldStats, seen: FieldStats, method: Method) -> list[int]:
    """Return the dims of which 98 % of what was seen is not within three times the usual range around its middle.

    A dim that never moved has no range to compare with; see `frozen`.
    """
    found = []
    for i, (low, high) in enumerate(zip(seen.q01, seen.q99, strict=True)):
        a, b = usual_range(known, method, i)
        if b - a >= NO_SPREAD and not (2 * a - b <= low and high <= 2 * b - a):
            found.append(i)
    return found


def frozen(kept: FieldStats, seen: FieldStats, method: Method) -> list[int]:
    """Return the dims that moved, but that these statistics would map to 0 as constant."""
    _, spread = _affine(kept, method)
    return [i for i, s in enumerate(spread) if s < NO_SPREAD <= seen.max[i] - seen.min[i]]


def usual_range(stats: FieldStats, method: Method, i: int) -> tuple[float, float]:
    """Return what a dim is normalised by: its extremes, its quantiles, or three standard deviations to either side."""
    center, spread = _affine(stats, method)
    width = float(spread[i]) * (3 if method == "mean_std" else 1)
    return float(center[i]) - width, float(center[i]) + width


def stats_to_dict(stats: NormStats) -> dict[str, Any]:
    """Return plain JSON values; `stats_from_dict` inverts it."""
    return {
        "embodiment": stats.embodiment,
        "fields": {k: {n: list(v) if isinstance(v, tuple) else v for n, v in asdict(f).items()}
                   for k, f in stats.fields.items()},
    }  # fmt: skip


def stats_from_dict(values: dict[str, Any]) -> NormStats:
    """Build statistics from plain values; raises ValueError on unknown, missing or mistyped keys."""
    return from_dict(NormStats, values, "statistics")


class Normalizer:
    """The affine map of one group of fields, x_normalised = (x - center) / spread, and its inverse.

    Unit range is [-1, 1] for `q01_q99` and `min_max`, one standard deviation for `mean_std`. 6-D rotations stay as
    they are; a dimension with no spread maps to 0 and back to its mean.
    """

    def __init__(self, group: str, fields: tuple[FieldSpec, ...], stats: NormStats, method: Method) -> None:
        """Raises KeyError if a field has no statistics, ValueError if they have another size."""
        dims = sum(f.size for f in fields)
        self.names = ", ".join(f"{group}.{f.name}[{f.size}]" for f in fields)
        self.center, self.spread = np.zeros(dims, np.float32), np.ones(dims, np.float32)
        self.constant: Bool[np.ndarray, "d"] = np.zeros(dims, bool)
        for field, here, _ in slices(fields):
            key = f"{group}/{field.name}"
            if key not in stats.fields:
                raise KeyError(f"no statistics for {key} of {stats.embodiment!r}; there are: {sorted(stats.fields)}")
            if field.kind == "ee_rotation_6d":
                continue
            center, spread = _affine(stats.fields[key], method)
            if len(center) != field.size:
                raise ValueError(f"statistics of {key} have {len(center)} dims, the field has {field.size}")
            self.constant[here] = spread < NO_SPREAD
            self.center[here] = np.where(spread < NO_SPREAD, stats.fields[key].mean, center)
            self.spread[here] = np.where(spread < NO_SPREAD, 1.0, spread)

    def apply(self, x: Float32[np.ndarray, "... d"]) -> Float32[np.ndarray, "... d"]:
        """Normalise; values outside the statistics stay outside [-1, 1]: nothing is clipped.

        Raises:
            ValueError: the last axis is not d.
        """
        if x.shape[-1] != len(self.center):
            raise ValueError(f"got {x.shape[-1]} values but the embodiment has {len(self.center)}: {self.names}")
        return np.where(self.constant, 0.0, (x - self.center) / self.spread).astype(np.float32)

    def invert(self, x: Float32[np.ndarray, "... d"]) -> Float32[np.ndarray, "... d"]:
        """Undo `apply`; a constant dimension returns its mean."""
        return np.where(self.constant, self.center, x * self.spread + self.center).astype(np.float32)


def _affine(stats: FieldStats, method: Method) -> tuple[np.ndarray, np.ndarray]:
    if method == "mean_std":
        return np.array(stats.mean), np.array(stats.std)
    low, high = (stats.q01, stats.q99) if method == "q01_q99" else (stats.min, stats.max)
    return (np.array(low) + np.array(high)) / 2, (np.array(high) - np.array(low)) / 2
