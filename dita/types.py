"""The NumPy side of the house: frozen dataclasses that Zarr, MuJoCo and ROS all produce and consume.

No logic, no torch. Units are SI; quaternions are wxyz with w >= 0; grippers have 1 = open.
Shape legend: h w image size, s state dims, a action dims, n chunk length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Float64, UInt8

FieldKind = Literal[
    "ee_position",
    "ee_rotation_6d",
    "ee_rotation_axis_angle",
    "joint_position",
    "joint_velocity",
    "gripper_position",
    "gripper_binary",
    "gripper_effort",
    "base_velocity",
]
Frame = Literal["base", "tool", "joint", "none"]
Mode = Literal["absolute", "delta"]
Reference = Literal["commanded", "measured", "chunk_start"]


@dataclass(frozen=True, eq=False)
class RawObservation:
    """One instant in physical units: what a dataset, a simulator and a robot all give."""

    images: Mapping[str, UInt8[np.ndarray, "h w 3"]]  # RGB, right side up, by camera name
    state: Float32[np.ndarray, "s"]  # the embodiment's state fields, concatenated, SI
    instruction: str
    stamp: float  # [s], the clock of the source


@dataclass(frozen=True, eq=False)
class ActionChunk:
    """Consecutive actions in physical units; a delta stays a delta, whoever executes it composes it."""

    values: Float32[np.ndarray, "n a"]  # the embodiment's action fields, concatenated, SI
    stamp: float  # [s] of values[0], which is the action for the observation's own step
    action_dt: float  # [s] between rows
    embodiment: str


@dataclass(frozen=True, eq=False)
class Window:
    """Observation frames ending now and, in training, the actions from now: what the preprocessor turns into a batch.

    t observation frames, oldest first; n actions.
    """

    images: Mapping[str, UInt8[np.ndarray, "t h w 3"]]
    frame_valid: Bool[np.ndarray, "t"]  # False: before the episode's start, the first frame repeated
    state: Float32[np.ndarray, "t s"]
    instruction: str
    embodiment: str
    stamp: float  # [s] of the last frame
    actions: Float32[np.ndarray, "n a"] | None = None  # physical units
    step_valid: Bool[np.ndarray, "n"] | None = None  # False: past the episode's end


@dataclass(frozen=True, eq=False)
class Episode:
    """A whole episode in memory, physical units: what collectors, converters and recorders hand to a store."""

    images: Mapping[str, UInt8[np.ndarray, "m h w 3"]]
    state: Float32[np.ndarray, "m s"]
    action: Float32[np.ndarray, "m a"]  # action[i] is the one taken at frame i
    stamp: Float64[np.ndarray, "m"]  # [s], increasing
    instruction: str
    success: bool | None
    source: str  # the source's own id, unique in a store


@dataclass(frozen=True)
class FieldSpec:
    """One named part of a state or an action."""

    name: str
    kind: FieldKind
    size: int
    unit: str  # "m", "rad", "m/s", "rad/s", or "1" for a ratio
    frame: Frame
    mode: Mode
    reference: Reference | None  # what a delta adds to; None for an absolute field
    scale: float  # SI value = scale * the source's own value; only environments, drivers and converters use it
    slot: int  # first index in the policy's padded vector
    low: tuple[float, ...]  # limits in SI, one per dim; of one step for a delta
    high: tuple[float, ...]


@dataclass(frozen=True)
class CameraSpec:
    """One named camera, as the source delivers it."""

    name: str
    height: int
    width: int
    slot: int  # index of this view in the policy's camera axis


@dataclass(frozen=True)
class JointLimits:
    """What the guard lets out, joint by joint, for joint commands; one value per name, SI.

    It refuses to arm where one is missing or null, by the joint's name.
    """

    names: tuple[str, ...]
    max_lag: float  # leash |commanded - measured| of each joint [rad]
    low: tuple[float | None, ...] | None = None  # [rad]
    high: tuple[float | None, ...] | None = None
    velocity: tuple[float | None, ...] | None = None  # [rad/s]
    acceleration: tuple[float | None, ...] | None = None  # [rad/s^2]
    jerk: tuple[float | None, ...] | None = None  # [rad/s^3]


@dataclass(frozen=True)
class Capsule:
    """A link's body: all points within a radius of a segment, in the link's frame [m]."""

    link: str
    radius: float
    start: tuple[float, float, float]
    end: tuple[float, float, float]


@dataclass(frozen=True)
class Box:
    """A box in the base frame [m]."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]


@dataclass(frozen=True)
class MotionLimits:
    """What the guard lets out. Which of these it needs depends on the action; it refuses to arm without them, by name.

    Tool limits bound Cartesian commands, and through `urdf` also joint commands.
    """

    max_speed: float | None = None  # of the tool [m/s]
    max_acceleration: float | None = None  # [m/s^2]
    max_jerk: float | None = None  # [m/s^3]
    workspace_low: tuple[float, float, float] | None = None  # [m]
    workspace_high: tuple[float, float, float] | None = None
    max_lag: float | None = None  # leash |commanded - measured| [m]
    max_angular_speed: float | None = None  # [rad/s]
    max_angular_acceleration: float | None = None  # [rad/s^2]
    max_angular_jerk: float | None = None  # [rad/s^3]
    max_angular_lag: float | None = None  # [rad]
    joints: JointLimits | None = None
    urdf: str | None = None  # path, relative to the embodiment file
    tool: str | None = None  # the tool's link in it
    capsules: tuple[Capsule, ...] | None = None
    ignore_pairs: tuple[tuple[str, str], ...] | None = None  # links that may touch
    keep_out: tuple[Box, ...] | None = None
    margin: float | None = None  # [m] that a predicted stop stays away from all these; None: 0.01


@dataclass(frozen=True)
class DriverSpec:
    """How a live robot is commanded and read; topics default to those of the twin."""

    command: Literal["pose", "twist", "joint_trajectory", "position_array"] | None = None
    command_topic: str | None = None
    joints: tuple[str, ...] | None = None  # the joints of a joint_position field, in its order
    joints_topic: str | None = None  # measured joints, by name
    pose_topic: str | None = None  # measured tool pose
    gripper: Literal["joint_trajectory", "gripper_command"] | None = None
    gripper_topic: str | None = None
    gripper_names: tuple[str, ...] | None = None
    gripper_hysteresis: float | None = None  # smaller changes of the command are not sent
    gripper_dwell: float | None = None  # [s] least time between two changes
    gripper_direction: Literal[1, -1] | None = None  # of the measured opening when the command rises; 1 if None
    mode_topic: str | None = None
    required_mode: str | None = None  # refuse to arm in another one


@dataclass(frozen=True)
class EmbodimentSpec:
    """A robot as the policy sees it: named fields, cameras and rates."""

    name: str
    robot: str  # for people
    state: tuple[FieldSpec, ...]
    action: tuple[FieldSpec, ...]
    cameras: tuple[CameraSpec, ...]
    obs_dt: float  # [s] between observation frames of a window
    action_dt: float  # [s] between rows of a chunk
    control_hz: float  # the source's own rate
    limits: MotionLimits | None  # the guard's; not part of the contract hash
    driver: DriverSpec | None = None  # the live robot's; not part of the contract hash

    @property
    def state_dim(self) -> int:
        """Number of real state dims s."""
        return sum(f.size for f in self.state)

    @property
    def action_dim(self) -> int:
        """Number of real action dims a."""
        return sum(f.size for f in self.action)


@dataclass(frozen=True)
class FieldStats:
    """Statistics of one field, one value per dim, in SI."""

    count: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    min: tuple[float, ...]
    max: tuple[float, ...]
    q01: tuple[float, ...]
    q99: tuple[float, ...]


@dataclass(frozen=True)
class NormStats:
    """Statistics of one embodiment; keys are `state/<field>` and `action/<field>`."""

    embodiment: str
    fields: Mapping[str, FieldStats]


@dataclass(frozen=True)
class EpisodeSpec:
    """Where one episode lies and what it is; frames start..stop of the segment's arrays."""

    store: str
    segment: str
    start: int
    stop: int
    dt: float  # [s] between frames
    instruction: str
    success: bool | None
    source: str  # the source's own id, e.g. "metaworld/button-press-topdown-v3/seed=17"
    embodiment: str
    content_hash: str
