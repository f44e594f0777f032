"""What the guard knows of a robot, read strictly from the contract's plain values, and the envelope check.

No dita import: on a robot this folder runs alone.
"""

import math
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Tuple

import numpy as np

REFERENCES = ("commanded", "measured", "chunk_start")
EMBODIMENT_KEYS = {
    *("name", "robot", "state", "action", "cameras", "obs_dt", "action_dt", "control_hz", "limits"),
}
FIELD_KEYS = {"name", "kind", "size", "unit", "frame", "mode", "reference", "scale", "slot", "low", "high"}
LIMIT_KEYS = {"max_speed", "max_acceleration", "max_jerk", "workspace_low", "workspace_high", "max_lag"}
ROUNDING = 1e-6  # relative: differences of float64 positions of about a metre at millisecond steps


@dataclass(frozen=True, eq=False)
class Field:
    """One named part of a state or an action, SI."""

    name: str
    kind: str
    size: int
    mode: str
    reference: Optional[str]
    low: np.ndarray  # [size], of one step for a delta
    high: np.ndarray


@dataclass(frozen=True, eq=False)
class Limits:
    """Bounds on the tool: norms of speed [m/s], acceleration [m/s^2] and jerk [m/s^3]; a box [m]; a leash [m]."""

    max_speed: float
    max_acceleration: float
    max_jerk: float
    workspace_low: np.ndarray  # [3]
    workspace_high: np.ndarray  # [3]
    max_lag: float


@dataclass(frozen=True, eq=False)
class Robot:
    """An embodiment as guard and policy node need it."""

    name: str
    state: Tuple[Field, ...]
    action: Tuple[Field, ...]
    motion: Field  # the tool's position, absolute or delta
    gripper: Optional[Field]
    cameras: Tuple[str, ...]
    obs_dt: float  # [s]
    action_dt: float  # [s]
    limits: Limits

    @property
    def action_dim(self) -> int:
        """Return the length of an action."""
        return sum(field.size for field in self.action)

    def action_slice(self, field: Optional[Field]) -> slice:
        """Return where a field lies in an action; an empty slice for None."""
        if field is None:
            return slice(0, 0)
        start = sum(f.size for f in self.action[: self.action.index(field)])
        return slice(start, start + field.size)


def parse_robot(values: Mapping[str, Any]) -> Robot:
    """Read `dita.embodiment.embodiment_to_dict`'s plain values.

    Raises:
        ValueError: an unknown or missing key, a value of the wrong kind, no limits, or an action that this guard
            cannot execute: it takes one `ee_position` and at most one gripper field.
    """
    _keys(values, EMBODIMENT_KEYS, "embodiment")
    where = f"embodiment {values['name']}"
    action = [_field(f, where) for f in values["action"]]
    motion = [f for f in action if f.kind == "ee_position"]
    gripper = [f for f in action if f.kind.startswith("gripper_")]
    if len(motion) != 1 or motion[0].size != 3 or len(gripper) > 1 or len(motion) + len(gripper) != len(action):
        kinds = ", ".join(f"{f.name} ({f.kind}[{f.size}])" for f in action)
        raise ValueError(f"{where}: the guard executes one ee_position[3] and at most one gripper field, got {kinds}")
    if any(f.size != 1 for f in gripper):
        raise ValueError(f"{where}: a gripper has one value, {gripper[0].name} has {gripper[0].size}")
    return Robot(
        name=values["name"],
        state=tuple(_field(f, where) for f in values["state"]),
        action=tuple(action),
        motion=motion[0],
        gripper=gripper[0] if gripper else None,
        cameras=tuple(c["name"] for c in values["cameras"]),
        obs_dt=_positive(values, "obs_dt", where),
        action_dt=_positive(values, "action_dt", where),
        limits=_limits(values["limits"], where),
    )


def _keys(values: Mapping[str, Any], expected: set, where: str) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected a mapping, got {values!r}")
    missing, unknown = sorted(expected - set(values)), sorted(set(values) - expected)
    if missing or unknown:
        raise ValueError(
            f"{where}: missing {', '.join(missing) or 'nothing'}, unknown {', '.join(unknown) or 'nothing'}"
        )


def _field(values: Mapping[str, Any], where: str) -> Field:
    _keys(values, FIELD_KEYS, f"{where}: field")
    name, size = values["name"], values["size"]
    mode, reference = values["mode"], values["reference"]
    if (mode, reference) != ("absolute", None) and not (mode == "delta" and reference in REFERENCES):
        raise ValueError(f"{where}.{name}: {mode} with reference {reference}; a delta has one of {REFERENCES}")
    low, high = _vector(values, "low", size, f"{where}.{name}"), _vector(values, "high", size, f"{where}.{name}")
    if not np.all(low < high):
        raise ValueError(f"{where}.{name}: every low must be below its high, got {low} and {high}")
    return Field(name, values["kind"], size, mode, reference, low, high)


def _limits(values: Optional[Mapping[str, Any]], where: str) -> Limits:
    if values is None:
        raise ValueError(f"{where}: no limits, so the guard does not move it; add `limits` to the embodiment file")
    _keys(values, LIMIT_KEYS, f"{where}.limits")
    low, high = (_vector(values, k, 3, f"{where}.limits") for k in ("workspace_low", "workspace_high"))
    if not np.all(low < high):
        raise ValueError(f"{where}.limits: workspace_low must be below workspace_high, got {low} and {high}")
    scalars = {
        k: _positive(values, k, f"{where}.limits") for k in ("max_speed", "max_acceleration", "max_jerk", "max_lag")
    }
    return Limits(workspace_low=low, workspace_high=high, **scalars)


def _positive(values: Mapping[str, Any], key: str, where: str) -> float:
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{where}.{key} must be a positive number, got {value!r}")
    return float(value)


def _vector(values: Mapping[str, Any], key: str, size: int, where: str) -> np.ndarray:
    try:
        vector = np.array(values[key], float)
    except (TypeError, ValueError):
        vector = np.array(np.nan)
    if vector.shape != (size,) or not np.all(np.isfinite(vector)):
        raise ValueError(f"{where}.{key} must be {size} finite numbers, got {values[key]!r}")
    return vector


class Envelope:
    """Check positions sent at a fixed period against the limits, by their finite differences."""

    def __init__(self, limits: Limits, period: float) -> None:
        self.limits, self.period = limits, period
        self._sent = np.zeros((3, 3))  # the last three positions, newest first

    def restart(self, position: np.ndarray) -> None:
        """Begin anew, at rest at `position`."""
        self._sent = np.tile(position, (3, 1))

    def violations(self, position: np.ndarray) -> List[str]:
        """Name every limit that sending `position` next would break."""
        if not np.all(np.isfinite(position)):
            return ["not finite"]
        p, (a, b, c) = position, self._sent
        motion: Dict[str, Tuple[np.ndarray, float]] = {
            "speed": ((p - a) / self.period, self.limits.max_speed),
            "acceleration": ((p - 2 * a + b) / self.period**2, self.limits.max_acceleration),
            "jerk": ((p - 3 * a + 3 * b - c) / self.period**3, self.limits.max_jerk),
        }
        broken = [name for name, (value, bound) in motion.items() if np.linalg.norm(value) > bound * (1 + ROUNDING)]
        inside = np.all(p >= self.limits.workspace_low) and np.all(p <= self.limits.workspace_high)
        return broken if inside else [*broken, "workspace"]

    def sent(self, position: np.ndarray) -> None:
        """Remember what was sent."""
        self._sent = np.vstack([position, self._sent[:2]])
