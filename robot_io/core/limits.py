"""What the guard knows of a robot, read strictly from plain values, and the envelope check.

No dita import: on a robot this folder runs alone.
"""

import math
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from robot_io.core.space import POSITION, ROTATION, Space, exponential, quaternion_of_6d

REFERENCES = ("commanded", "measured", "chunk_start")
EMBODIMENT_KEYS = {
    *("name", "robot", "state", "action", "cameras", "obs_dt", "action_dt", "control_hz", "limits"),
}
FIELD_KEYS = {"name", "kind", "size", "unit", "frame", "mode", "reference", "scale", "slot", "low", "high"}
TOOL = ("max_speed", "max_acceleration", "max_jerk")
ANGULAR = ("max_angular_speed", "max_angular_acceleration", "max_angular_jerk")
SCALARS = (*TOOL, *ANGULAR, "max_lag", "max_angular_lag", "margin")
LIMIT_KEYS = {
    *SCALARS,
    *("workspace_low", "workspace_high", "joints", "urdf", "tool", "capsules", "ignore_pairs", "keep_out"),
}
JOINT_ROWS = ("low", "high", "velocity", "acceleration", "jerk")
JOINT_KEYS = {"names", "max_lag", *JOINT_ROWS}
COMMANDS = {
    "pose": "/target_pose",
    "twist": "/servo_node/delta_twist_cmds",
    "joint_trajectory": "/joint_trajectory_controller/joint_trajectory",
    "position_array": "/forward_position_controller/commands",
}
GRIPPERS = {
    "joint_trajectory": "/gripper_controller/joint_trajectory",
    "gripper_command": "/gripper_controller/gripper_cmd",
}
ROTATIONS = {
    ("ee_rotation_axis_angle", "delta"),
    ("ee_rotation_axis_angle", "absolute"),
    ("ee_rotation_6d", "absolute"),
}
MARGIN = 0.01  # [m] that a predicted stop stays away from bodies and boxes, unless the file says otherwise
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
    frame: str = "base"
    unit: str = "1"


@dataclass(frozen=True, eq=False)
class JointLimits:
    """Bounds of each joint; arrays [j] in rad, rad/s, rad/s^2, rad/s^3; NaN where the file has none."""

    names: Tuple[str, ...]
    low: np.ndarray
    high: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray
    jerk: np.ndarray
    max_lag: float  # [rad]


@dataclass(frozen=True, eq=False)
class Limits:
    """An embodiment file's limits as they stand there; what it leaves out is None."""

    max_speed: Any = None  # of the tool: norms [m/s, m/s^2, m/s^3]
    max_acceleration: Any = None
    max_jerk: Any = None
    max_lag: Any = None  # [m]
    workspace_low: Any = None  # [3], m
    workspace_high: Any = None
    max_angular_speed: Any = None  # norms [rad/s, rad/s^2, rad/s^3]
    max_angular_acceleration: Any = None
    max_angular_jerk: Any = None
    max_angular_lag: Any = None  # [rad]
    joints: Optional[JointLimits] = None
    urdf: Optional[str] = None
    tool: Optional[str] = None
    capsules: Tuple[Mapping[str, Any], ...] = ()
    ignore_pairs: Tuple[Tuple[str, str], ...] = ()
    keep_out: Tuple[Tuple[np.ndarray, np.ndarray], ...] = ()  # (low, high), m
    margin: float = MARGIN


@dataclass(frozen=True, eq=False)
class Bounds:
    """The limits of a space, ready for the tracker and the envelope.

    A group is one joint, or the three axes of a position or a rotation, of which the norm is bounded.
    """

    names: Tuple[str, ...]  # of the groups: a joint's, or "tool" and "rotation"
    sizes: np.ndarray  # axes of each group
    starts: np.ndarray  # first axis of each group
    speed: np.ndarray  # [groups]
    acceleration: np.ndarray
    jerk: np.ndarray
    lag: np.ndarray
    low: np.ndarray  # [axes] of the position; infinite for a rotation
    high: np.ndarray

    def norms(self, tangent: np.ndarray) -> np.ndarray:
        """Return the norm of each group."""
        return np.sqrt(np.add.reduceat(tangent * tangent, self.starts))

    def per_axis(self, values: np.ndarray) -> np.ndarray:
        """Return each axis's part of a group's bound, so that the norm stays inside in every direction."""
        return np.repeat(values / np.sqrt(self.sizes), self.sizes)


@dataclass(frozen=True)
class Driver:
    """How the robot is commanded and read."""

    command: str
    command_topic: str
    joints: Tuple[str, ...]  # of a joint_position field, in its order; empty for a Cartesian action
    joints_topic: str
    pose_topic: str
    gripper: str
    gripper_topic: str
    gripper_names: Tuple[str, ...]
    gripper_hysteresis: float  # smaller changes are not sent
    gripper_dwell: float  # [s]
    gripper_direction: int  # sign of the measured opening's change when the command rises
    mode_topic: str
    required_mode: Optional[str]


DRIVER_KEYS = set(Driver.__dataclass_fields__)


@dataclass(frozen=True, eq=False)
class Robot:
    """An embodiment as guard and policy node need it."""

    name: str
    state: Tuple[Field, ...]
    action: Tuple[Field, ...]
    motion: Field  # a joint_position or ee_position, absolute or delta
    rotation: Optional[Field]  # of the tool, in the same mode
    gripper: Optional[Field]
    cameras: Tuple[str, ...]
    obs_dt: float  # [s]
    action_dt: float  # [s]
    space: Space
    limits: Limits
    bounds: Optional[Bounds]  # None: limits are missing, and nobody asked for them
    driver: Driver
    kinematics: Any = None  # a core.kinematics.Kinematics, set by who has the URDF

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

    def motion_of(self, actions: np.ndarray) -> np.ndarray:
        """Return the motion of actions [n a] as a chunk carries it: configurations [n m], or tangents if delta."""
        motion = actions[:, self.action_slice(self.motion)]
        if self.rotation is None:
            return motion
        turns = actions[:, self.action_slice(self.rotation)]
        if self.rotation.mode == "absolute":
            as_quaternion = quaternion_of_6d if self.rotation.kind == "ee_rotation_6d" else exponential
            turns = np.array([as_quaternion(row) for row in turns]).reshape(len(turns), 4)
        return np.concatenate([motion, turns], axis=1)


def parse_robot(values: Mapping[str, Any], need_limits: bool = True) -> Robot:
    """Read `dita.embodiment.embodiment_to_dict`'s plain values.

    Args:
        values: the embodiment; of `driver` and `limits`, keys may be missing or None.
        need_limits: refuse an embodiment with which the guard could not move, naming what is missing.

    Raises:
        ValueError: an unknown or missing key, a value of the wrong kind, missing limits, or an action that this guard
            cannot execute: it takes one `joint_position`, or one `ee_position` and at most one rotation, and at most
            one gripper field.
    """
    _keys(values, EMBODIMENT_KEYS, {"driver"}, "embodiment")
    where = f"embodiment {values['name']}"
    action = tuple(_field(f, where) for f in values["action"])
    motion, rotation, gripper = _roles(action, where)
    driver = _driver(values.get("driver") or {}, motion, gripper, where)
    space = _space(motion, rotation, driver)
    limits = _limits(values["limits"] or {}, where)
    missing = ["limits"] if values["limits"] is None else _missing(space, limits)
    if missing and need_limits:
        raise ValueError(
            f"{where}: no {'; no '.join(missing)}: the guard does not move it; add them to the embodiment file"
        )
    if need_limits and motion.kind == "ee_position" and motion.size != len(POSITION):
        raise ValueError(f"{where}: the guard moves a tool in space; {motion.name} has {motion.size} values, not 3")
    return Robot(
        name=values["name"],
        state=tuple(_field(f, where) for f in values["state"]),
        action=action,
        motion=motion,
        rotation=rotation,
        gripper=gripper,
        cameras=tuple(c["name"] for c in values["cameras"]),
        obs_dt=_positive(values, "obs_dt", where),
        action_dt=_positive(values, "action_dt", where),
        space=space,
        limits=limits,
        bounds=None if missing else _bounds(space, limits),
        driver=driver,
    )


def _roles(action: Sequence[Field], where: str) -> Tuple[Field, Optional[Field], Optional[Field]]:
    """Return which field moves the robot, which one turns the tool and which one is the gripper."""
    motion = [f for f in action if f.kind in ("joint_position", "ee_position")]
    rotation = [f for f in action if (f.kind, f.mode) in ROTATIONS]
    gripper = [f for f in action if f.kind.startswith("gripper_")]
    kinds = ", ".join(f"{f.name} ({f.kind}[{f.size}], {f.mode})" for f in action)
    tool = [f for f in motion if f.kind == "ee_position" and f.size == 3]
    fits = len(motion) == 1 and len(rotation) <= len(tool) and len(gripper) <= 1
    if not fits or len(motion) + len(rotation) + len(gripper) != len(action):
        raise ValueError(
            f"{where}: the guard executes one joint_position, or one ee_position[3] with at most one rotation, and at "
            f"most one gripper field, got {kinds}"
        )
    if rotation and (rotation[0].mode, rotation[0].reference) != (motion[0].mode, motion[0].reference):
        raise ValueError(f"{where}: position and rotation must share mode and reference, got {kinds}")
    if not rotation and motion[0].frame == "tool":
        raise ValueError(f"{where}: {motion[0].name} is in the tool's frame, which needs a rotation field to follow")
    if motion[0].mode == "absolute" and any(f.frame == "tool" for f in (*motion, *rotation)):
        raise ValueError(f"{where}: an absolute pose is in the base frame, got frame tool")
    if gripper and gripper[0].size != 1:
        raise ValueError(f"{where}: a gripper has one value, {gripper[0].name} has {gripper[0].size}")
    if gripper and gripper[0].mode != "absolute":
        raise ValueError(f"{where}: a gripper command is absolute, {gripper[0].name} is a {gripper[0].mode}")
    return motion[0], rotation[0] if rotation else None, gripper[0] if gripper else None


def _space(motion: Field, rotation: Optional[Field], driver: Driver) -> Space:
    if motion.kind == "joint_position":
        return Space("joint", driver.joints)
    if rotation is None:
        return Space("cartesian", POSITION)
    tool = motion.frame == "tool", rotation.frame == "tool"
    return Space("cartesian", POSITION + ROTATION, True, *tool)


def joint_names(field: Field) -> Tuple[str, ...]:
    """Return the names under which a field's values travel as joints, unless a driver names them."""
    return (field.name,) if field.size == 1 else tuple(f"{field.name}_{i}" for i in range(field.size))


def _driver(values: Mapping[str, Any], motion: Field, gripper: Optional[Field], where: str) -> Driver:
    where = f"{where}.driver"
    _keys(values, set(), DRIVER_KEYS, where)
    joint = motion.kind == "joint_position"
    given = {key: value for key, value in values.items() if value is not None}
    command = _one_of(given.get("command", "joint_trajectory" if joint else "pose"), COMMANDS, f"{where}.command")
    if joint != (command in ("joint_trajectory", "position_array")):
        raise ValueError(f"{where}.command: {command} cannot carry {motion.name} ({motion.kind})")
    joints = _names(given.get("joints", joint_names(motion)), f"{where}.joints") if joint else ()
    if joint and len(joints) != motion.size:
        raise ValueError(f"{where}.joints: {motion.name} has {motion.size} values, got {len(joints)} names: {joints}")
    form = _one_of(given.get("gripper", "joint_trajectory"), GRIPPERS, f"{where}.gripper")
    names = given.get("gripper_names", joint_names(gripper) if gripper else ())
    return Driver(
        command=command,
        command_topic=given.get("command_topic", COMMANDS[command]),
        joints=joints,
        joints_topic=given.get("joints_topic", "/joint_states"),
        pose_topic=given.get("pose_topic", "/tool_pose"),
        gripper=form,
        gripper_topic=given.get("gripper_topic", GRIPPERS[form]),
        gripper_names=_names(names, f"{where}.gripper_names"),
        gripper_hysteresis=_not_negative(given, "gripper_hysteresis", where),
        gripper_dwell=_not_negative(given, "gripper_dwell", where),
        gripper_direction=int(_one_of(given.get("gripper_direction", 1), (1, -1), where)),
        mode_topic=given.get("mode_topic", "/driver/mode"),
        required_mode=given.get("required_mode"),
    )


def _one_of(value: Any, known: Any, where: str) -> Any:
    if value not in known:
        raise ValueError(f"{where}: no {value!r}; there are {', '.join(map(str, known))}")
    return value


def _names(values: Any, where: str) -> Tuple[str, ...]:
    if isinstance(values, str) or not all(isinstance(v, str) and v for v in values):
        raise ValueError(f"{where} must be a list of names, got {values!r}")
    names = tuple(values)
    if len(set(names)) != len(names):
        raise ValueError(f"{where}: a name twice in {list(names)}")
    return names


def _missing(space: Space, limits: Limits) -> List[str]:
    """Name every limit that this space needs and the file leaves out."""
    if space.name == "cartesian":
        needed = [*TOOL, "max_lag", "workspace_low", "workspace_high"]
        needed += [*ANGULAR, "max_angular_lag"] if space.rotation else []
        missing = [f"limits.{key}" for key in needed if getattr(limits, key) is None]
        return [f"{', '.join(missing)}"] if missing else []
    if limits.joints is None:
        return [f"limits.joints for {', '.join(space.axes)}"]
    names = limits.joints.names
    missing = [f"limits.joints for {name}" for name in space.axes if name not in names]
    for row in JOINT_ROWS:
        values = getattr(limits.joints, row)
        missing += [
            f"limits.joints.{row} for {n}" for n in space.axes if n in names and np.isnan(values[names.index(n)])
        ]
    return missing


def _bounds(space: Space, limits: Limits) -> Bounds:
    if space.name == "joint":
        joints = limits.joints
        assert joints is not None
        order = [joints.names.index(name) for name in space.axes]
        low, high, speed, acceleration, jerk = (getattr(joints, row)[order] for row in JOINT_ROWS)
        lag = np.full(len(order), joints.max_lag)
        sizes = np.ones(len(order), int)
        return Bounds(space.axes, sizes, np.arange(len(order)), speed, acceleration, jerk, lag, low, high)
    rotation = [0, 1] if space.rotation else [0]
    free = np.full(3 * len(rotation[1:]), np.inf)
    speed, acceleration, jerk = (
        np.array([getattr(limits, pair[i]) for i in rotation]) for pair in zip(TOOL, ANGULAR, strict=True)
    )
    return Bounds(
        names=("tool", "rotation")[: len(rotation)],
        sizes=np.full(len(rotation), 3),
        starts=3 * np.arange(len(rotation)),
        speed=speed,
        acceleration=acceleration,
        jerk=jerk,
        lag=np.array([limits.max_lag, limits.max_angular_lag][: len(rotation)]),
        low=np.concatenate([limits.workspace_low, -free]),
        high=np.concatenate([limits.workspace_high, free]),
    )


def _keys(values: Mapping[str, Any], required: set, optional: set, where: str) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: expected a mapping, got {values!r}")
    missing, unknown = sorted(required - set(values)), sorted(set(values) - required - optional)
    if missing or unknown:
        raise ValueError(
            f"{where}: missing {', '.join(missing) or 'nothing'}, unknown {', '.join(unknown) or 'nothing'}"
        )


def _field(values: Mapping[str, Any], where: str) -> Field:
    _keys(values, FIELD_KEYS, set(), f"{where}: field")
    name, size = values["name"], values["size"]
    mode, reference = values["mode"], values["reference"]
    if (mode, reference) != ("absolute", None) and not (mode == "delta" and reference in REFERENCES):
        raise ValueError(f"{where}.{name}: {mode} with reference {reference}; a delta has one of {REFERENCES}")
    low, high = _vector(values, "low", size, f"{where}.{name}"), _vector(values, "high", size, f"{where}.{name}")
    if not np.all(low < high):
        raise ValueError(f"{where}.{name}: every low must be below its high, got {low} and {high}")
    return Field(name, values["kind"], size, mode, reference, low, high, values["frame"], values["unit"])


def _limits(values: Mapping[str, Any], where: str) -> Limits:
    """Read what is there; `_missing` says what is not."""
    where = f"{where}.limits"
    _keys(values, set(), LIMIT_KEYS, where)
    given = {key: value for key, value in values.items() if value is not None}
    found: Dict[str, Any] = {key: _positive(given, key, where) for key in SCALARS if key in given}
    found.update({key: given[key] for key in ("urdf", "tool") if key in given})
    if "workspace_low" in given and "workspace_high" in given:
        found["workspace_low"], found["workspace_high"] = _box(given, "workspace_low", "workspace_high", where)
    if "joints" in given:
        found["joints"] = _joint_limits(given["joints"], f"{where}.joints")
    for capsule in given.get("capsules", ()):
        _keys(capsule, {"link", "radius", "start", "end"}, set(), f"{where}.capsules")
        _positive(capsule, "radius", f"{where}.capsules")
        for end in ("start", "end"):
            _vector(capsule, end, 3, f"{where}.capsules")
    found["capsules"] = tuple(dict(c) for c in given.get("capsules", ()))
    pairs = [_names(pair, f"{where}.ignore_pairs") for pair in given.get("ignore_pairs", ())]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{where}.ignore_pairs: each has two links, got {pairs}")
    found["ignore_pairs"] = tuple(pairs)
    for box in given.get("keep_out", ()):
        _keys(box, {"low", "high"}, set(), f"{where}.keep_out")
    found["keep_out"] = tuple(_box(box, "low", "high", f"{where}.keep_out") for box in given.get("keep_out", ()))
    return Limits(**found)


def _box(values: Mapping[str, Any], low_key: str, high_key: str, where: str) -> Tuple[np.ndarray, np.ndarray]:
    low, high = _vector(values, low_key, 3, where), _vector(values, high_key, 3, where)
    if not np.all(low < high):
        raise ValueError(f"{where}: {low_key} must be below {high_key}, got {low} and {high}")
    return low, high


def _joint_limits(values: Mapping[str, Any], where: str) -> JointLimits:
    _keys(values, {"names", "max_lag"}, JOINT_KEYS, where)
    names = _names(values["names"], f"{where}.names")
    rows = {row: _row(values.get(row), names, f"{where}.{row}") for row in JOINT_ROWS}
    for name, low, high in zip(names, rows["low"], rows["high"], strict=True):
        if low >= high:
            raise ValueError(f"{where}: low must be below high, got {low} and {high} for {name}")
    for row in JOINT_ROWS[2:]:
        for name, value in zip(names, rows[row], strict=True):
            if value <= 0:
                raise ValueError(f"{where}.{row} must be positive, got {value} for {name}")
    return JointLimits(names=names, max_lag=_positive(values, "max_lag", where), **rows)


def _row(values: Any, names: Sequence[str], where: str) -> np.ndarray:
    """Return a value per joint; NaN for None, which stands for a limit that nobody has."""
    if values is None:
        values = [None] * len(names)
    if isinstance(values, str) or len(values) != len(names):
        raise ValueError(f"{where} needs a value for each of {', '.join(names)}, got {values!r}")
    for name, value in zip(names, values, strict=True):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and math.isfinite(value)):
            raise ValueError(f"{where} must be a finite number, got {value!r} for {name}")
    return np.array([math.nan if value is None else value for value in values], float)


def _not_negative(values: Mapping[str, Any], key: str, where: str) -> float:
    return _positive(values, key, where) if values.get(key) else 0.0


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
    """Check configurations sent at a fixed period against the bounds, by their finite differences."""

    def __init__(self, space: Space, bounds: Bounds, period: float) -> None:
        self.space, self.bounds, self.period = space, bounds, period
        self.restart(space.origin)

    def restart(self, x: np.ndarray) -> None:
        """Begin anew, at rest at a configuration."""
        self._last = x
        self._velocity = self._acceleration = np.zeros(self.space.tangent)

    def _motion(self, x: np.ndarray) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        velocity = self.space.difference(x, self._last) / self.period
        acceleration = (velocity - self._velocity) / self.period
        return velocity, acceleration, (acceleration - self._acceleration) / self.period

    def violations(self, x: np.ndarray) -> List[str]:
        """Name every limit that sending x next would break, and whose it is."""
        if not np.all(np.isfinite(x)):
            return ["not finite"]
        bounds = self.bounds
        broken: List[str] = []
        limits = (("speed", bounds.speed), ("acceleration", bounds.acceleration), ("jerk", bounds.jerk))
        for (name, bound), value in zip(limits, self._motion(x), strict=True):
            over = bounds.norms(value) > bound * (1 + ROUNDING)
            broken += [f"{name} of {bounds.names[i]}" for i in np.flatnonzero(over)]
        n = self.space.linear
        outside = (x[:n] < bounds.low[:n]) | (x[:n] > bounds.high[:n])
        where = "its range" if self.space.name == "joint" else "the workspace"
        return broken + [f"{self.space.axes[i]} outside {where}" for i in np.flatnonzero(outside)]

    def sent(self, x: np.ndarray) -> None:
        """Remember what was sent."""
        self._velocity, self._acceleration, _ = self._motion(x)
        self._last = x
