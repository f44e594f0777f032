"""Configurations and their tangents: joints, or a tool's position with or without its rotation, by one set of rules.

A configuration is float64 [size]: numbers that add, then, if there is a rotation, a unit quaternion wxyz with w >= 0.
A tangent is float64 [tangent]: the same numbers, then a rotation vector [rad] in the base frame (Sola et al., 2018,
"A micro Lie theory for state estimation in robotics": SO(3) with left increments).
"""

import math
from dataclasses import dataclass
from typing import Any, Optional, Tuple

import numpy as np

UNIT = 1e-3  # how far a quaternion's norm may be from 1: float32 and rounded text are well inside
POSITION = ("x", "y", "z")
ROTATION = ("rx", "ry", "rz")


def multiply(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return the Hamilton product: first the rotation q, then p."""
    a, b, c, d = p.tolist()
    e, f, g, h = q.tolist()
    return np.array(
        [
            a * e - b * f - c * g - d * h,
            a * f + b * e + c * h - d * g,
            a * g - b * h + c * e + d * f,
            a * h + b * g - c * f + d * e,
        ]
    )


def conjugate(q: np.ndarray) -> np.ndarray:
    """Return the inverse of a unit quaternion."""
    return q * (1.0, -1.0, -1.0, -1.0)


def exponential(v: np.ndarray) -> np.ndarray:
    """Return the unit quaternion of a rotation vector [rad]."""
    x, y, z = v.tolist()
    angle = math.sqrt(x * x + y * y + z * z)
    s = 0.5 if angle < 1e-9 else math.sin(0.5 * angle) / angle
    return np.array([math.cos(0.5 * angle), s * x, s * y, s * z])


def logarithm(q: np.ndarray) -> np.ndarray:
    """Return the shortest rotation vector [rad] of a unit quaternion of either sign."""
    w, x, y, z = q.tolist()
    n = math.sqrt(x * x + y * y + z * z)
    s = 2.0 / w if n < 1e-9 else 2.0 * math.atan2(math.copysign(n, w), abs(w)) / n
    return np.array([s * x, s * y, s * z])


def rotate(q: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return a vector [3], turned by a unit quaternion."""
    return multiply(multiply(q, np.array([0.0, *v])), conjugate(q))[1:]


def unit(q: np.ndarray) -> np.ndarray:
    """Return a quaternion at norm 1 with w >= 0."""
    return q * (math.copysign(1.0, q[0]) / math.sqrt(q @ q))


def quaternion_of_6d(columns: np.ndarray) -> np.ndarray:
    """Return wxyz of the first two columns [6] of a rotation matrix, made orthonormal (Zhou et al., CVPR 2019)."""
    x = columns[:3] / np.linalg.norm(columns[:3])
    y = columns[3:] - (x @ columns[3:]) * x
    y = y / np.linalg.norm(y)
    z = np.cross(x, y)
    xx, yy, zz = x[0], y[1], z[2]
    q = np.array(  # the row with the largest diagonal is well conditioned (Shepperd 1978)
        [
            [1 + xx + yy + zz, y[2] - z[1], z[0] - x[2], x[1] - y[0]],
            [y[2] - z[1], 1 + xx - yy - zz, x[1] + y[0], z[0] + x[2]],
            [z[0] - x[2], x[1] + y[0], 1 - xx + yy - zz, y[2] + z[1]],
            [x[1] - y[0], z[0] + x[2], y[2] + z[1], 1 - xx - yy + zz],
        ]
    )
    return unit(q[int(np.argmax(np.diag(q)))])


@dataclass(frozen=True)
class Space:
    """What one action moves."""

    name: str  # "joint" or "cartesian"
    axes: Tuple[str, ...]  # a name for each tangent axis
    rotation: bool = False  # whether a quaternion follows the numbers that add
    tool_position: bool = False  # whether a delta's position is in the tool's frame
    tool_rotation: bool = False

    @property
    def tangent(self) -> int:
        """Return the length of a tangent."""
        return len(self.axes)

    @property
    def linear(self) -> int:
        """Return how many numbers add."""
        return len(self.axes) - 3 * self.rotation

    @property
    def size(self) -> int:
        """Return the length of a configuration."""
        return len(self.axes) + self.rotation

    @property
    def origin(self) -> np.ndarray:
        """Return the configuration of zeros and no rotation."""
        return np.array([*[0.0] * self.linear, *([1.0, 0.0, 0.0, 0.0] if self.rotation else [])])

    def problem(self, x: np.ndarray) -> Optional[str]:
        """Return why an array [... size] of finite values is no configuration, or None."""
        if x.shape[-1:] != (self.size,):
            return f"a {self.name} configuration has {self.size} values, got {x.shape[-1:]}"
        if self.rotation and np.any(np.abs(np.linalg.norm(x[..., self.linear :], axis=-1) - 1) > UNIT):
            return "not a unit quaternion"
        return None

    def normal(self, x: Any) -> np.ndarray:
        """Return a configuration as float64, its quaternion at norm 1 with w >= 0."""
        configuration = np.array(x, float)
        if self.rotation:
            configuration[self.linear :] = unit(configuration[self.linear :])
        return configuration

    def difference(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return the tangent that leads from b to a: log(R_a R_b^T) for a rotation."""
        if not self.rotation:
            return a - b
        n = self.linear
        return np.concatenate([a[:n] - b[:n], logarithm(multiply(a[n:], conjugate(b[n:])))])

    def retract(self, x: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Return the configuration that a tangent leads to from x."""
        if not self.rotation:
            return x + v
        n = self.linear
        return np.concatenate([x[:n] + v[:n], unit(multiply(exponential(v[n:]), x[n:]))])

    def delta(self, x: np.ndarray, d: np.ndarray) -> np.ndarray:
        """Return x after an action's delta [tangent], each part in the frame that its field declares."""
        if not self.rotation:
            return x + d
        n, q = self.linear, x[self.linear :]
        position = rotate(q, d[:n]) if self.tool_position else d[:n]
        turn = exponential(d[n:])
        turned = multiply(q, turn) if self.tool_rotation else multiply(turn, q)
        return np.concatenate([x[:n] + position, unit(turned)])

    def interpolate(self, a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
        """Return the configuration a share of the shortest way from a to b."""
        return self.retract(a, share * self.difference(b, a))
