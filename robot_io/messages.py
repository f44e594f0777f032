"""ROS 2 messages <-> plain values, by duck typing: rclpy's and rosbags' messages have the same field names.

`msg` is always a bus's factory, `msg("std_msgs/msg/String", data=...)`. Quaternions are wxyz here and xyzw on the wire.
A stamp survives the border exactly: a float of today's seconds is coarser than a nanosecond. Shape legend: h w image
size, n chunk length, d dims, j joints.
"""

import io
import json
import math
import re
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

Msg = Callable[..., Any]
Vector = Union[np.ndarray, Sequence[float]]

IMAGE = "sensor_msgs/msg/Image"
COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"
JOINT_STATE = "sensor_msgs/msg/JointState"
POSE = "geometry_msgs/msg/PoseStamped"
TWIST = "geometry_msgs/msg/TwistStamped"
JOINT_TRAJECTORY = "trajectory_msgs/msg/JointTrajectory"
CARTESIAN_TRAJECTORY = "trajectory_msgs/msg/MultiDOFJointTrajectory"
ARRAY = "std_msgs/msg/Float64MultiArray"
FLOAT = "std_msgs/msg/Float64"
GRIPPER_COMMAND = "control_msgs/msg/GripperCommand"  # not among Jazzy's common interfaces: needs ROS 2's own package
STRING = "std_msgs/msg/String"
BOOL = "std_msgs/msg/Bool"
DIAGNOSTICS = "diagnostic_msgs/msg/DiagnosticArray"

IDENTITY = (1.0, 0.0, 0.0, 0.0)  # wxyz
QUANTITIES = ("positions", "velocities", "effort")
COLOUR = {"rgb8": (3, (0, 1, 2)), "bgr8": (3, (2, 1, 0)), "rgba8": (4, (0, 1, 2)), "bgra8": (4, (2, 1, 0))}
MAX_PIXELS = 2**25  # of a compressed image: a few bytes must not unpack into all of the memory


@dataclass(frozen=True, eq=False)
class ExecutedStep:
    """One step of a chunk as it went out; the guard's answer to the policy."""

    chunk: float  # [s], stamp of the chunk
    id: int  # of the chunk
    index: int  # of the step in its chunk
    stamp: float  # [s], when the step began on the wire
    target: np.ndarray  # absolute: joints [j] rad, position [3] m, or position and quaternion wxyz [7]
    delta: np.ndarray  # how far the target moved: [j], [3], or [6] m and rad (rotation vector)
    source: str  # whose chunk it was: "policy", "teleop"
    gripper: Optional[float] = None


def stamp_to_ros(msg: Msg, stamp: float) -> Any:
    """Return a Time."""
    sec, nanosec = divmod(round(stamp * 1e9), 10**9)
    return msg("builtin_interfaces/msg/Time", sec=sec, nanosec=nanosec)


def stamp_of(message: Any) -> float:
    """Return the header's stamp [s]."""
    return message.header.stamp.sec + message.header.stamp.nanosec * 1e-9


def _header(msg: Msg, stamp: float, frame: str) -> Any:
    return msg("std_msgs/msg/Header", stamp=stamp_to_ros(msg, stamp), frame_id=frame)


def _duration(msg: Msg, seconds: float) -> Any:
    sec, nanosec = divmod(round(seconds * 1e9), 10**9)
    return msg("builtin_interfaces/msg/Duration", sec=sec, nanosec=nanosec)


def _seconds(duration: Any) -> float:
    return duration.sec + duration.nanosec * 1e-9


def _vector(msg: Msg, xyz: Vector, type: str = "Vector3") -> Any:
    x, y, z = xyz
    return msg(f"geometry_msgs/msg/{type}", x=float(x), y=float(y), z=float(z))


def _quaternion(msg: Msg, wxyz: Vector) -> Any:
    w, x, y, z = (float(v) for v in wxyz)
    return msg("geometry_msgs/msg/Quaternion", x=x, y=y, z=z, w=w)


def _xyz(vector: Any) -> np.ndarray:
    return np.array([vector.x, vector.y, vector.z])


def _wxyz(q: Any) -> np.ndarray:
    return np.array([q.w, q.x, q.y, q.z])


def image_to_ros(msg: Msg, stamp: float, rgb: np.ndarray, frame: str) -> Any:
    """Wrap an RGB image, uint8 [h w 3], as `rgb8`."""
    height, width, _ = rgb.shape
    data = np.ascontiguousarray(rgb, np.uint8).reshape(-1)
    header = _header(msg, stamp, frame)
    return msg(IMAGE, header=header, height=height, width=width, encoding="rgb8", step=3 * width, data=data)


def image_from_ros(message: Any, size: Optional[Tuple[int, int]] = None) -> np.ndarray:
    """Return RGB, uint8 [h w 3]: a view on the message's bytes; alpha is left out.

    Args:
        size: height and width that the embodiment declares; None: any.

    Raises:
        ValueError: an encoding other than rgb8, bgr8, rgba8 and bgra8, sizes that do not agree, or another `size`.
    """
    h, w, step = message.height, message.width, message.step
    if message.encoding not in COLOUR:
        raise ValueError(f"image encoding {message.encoding!r} is not supported; send {', '.join(COLOUR)}")
    channels, order = COLOUR[message.encoding]
    data = np.frombuffer(message.data, np.uint8)
    if h < 1 or w < 1 or step < channels * w or data.size != h * step:
        needs = h * max(step, channels * w)
        raise ValueError(f"an image of {h} x {w} with step {step} needs {needs} bytes, got {data.size}")
    _expect_size(size, h, w)
    pixels = data.reshape(h, step)[:, : channels * w].reshape(h, w, channels)
    return pixels[..., :3] if order == (0, 1, 2) else pixels[..., 2::-1]


def _expect_size(size: Optional[Tuple[int, int]], height: int, width: int) -> None:
    if size is not None and (height, width) != tuple(size):
        raise ValueError(f"an image of {height} x {width}, but the embodiment's camera has {size[0]} x {size[1]}")


def compressed_to_ros(msg: Msg, stamp: float, encoded: bytes, frame: str, format: str = "jpeg") -> Any:
    """Wrap an encoded image; format "jpeg" or "png"."""
    data = np.frombuffer(encoded, np.uint8)
    return msg(COMPRESSED_IMAGE, header=_header(msg, stamp, frame), format=format, data=data)


def compressed_from_ros(message: Any, size: Optional[Tuple[int, int]] = None) -> np.ndarray:
    """Decode a JPEG or PNG; return RGB, uint8 [h w 3].

    `format` as image_transport writes it: "jpeg", "png", or "<original>; jpeg compressed <order>". With order `rgb8`
    the channels were handed to a BGR encoder and are swapped back.

    Args:
        size: height and width that the embodiment declares; None: any.

    Raises:
        ValueError: another format, what cannot be decoded, an image that is not 8-bit colour, or another `size`.
    """
    from PIL import Image, UnidentifiedImageError  # the policy's process only: dita brings it

    kind = message.format.lower()
    if "compresseddepth" in kind or not re.search("jpe?g|png", kind):
        raise ValueError(f"compressed image format {message.format!r} is not supported; send jpeg or png")
    data = np.frombuffer(message.data, np.uint8).tobytes()
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG")) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"a compressed image of {height} x {width} is larger than {MAX_PIXELS} pixels")
            _expect_size(size, height, width)
            if image.mode not in ("RGB", "RGBA"):
                raise ValueError(f"a compressed image with channels {image.mode!r} is not supported; send 8-bit colour")
            pixels = np.asarray(image)
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as e:
        raise ValueError(f"a compressed image of {len(data)} bytes cannot be decoded: {e}") from None
    return pixels[..., 2::-1] if re.search("compressed rgba?8", kind) else pixels[..., :3]


def joints_to_ros(
    msg: Msg, stamp: float, positions: Mapping[str, float], velocities: Optional[Mapping[str, float]] = None
) -> Any:
    """Return a JointState of positions by name [rad or m] and, for the same names, velocities [rad/s or m/s]."""
    fields = {"position": np.array(list(positions.values()), float)}
    if velocities is not None:
        fields["velocity"] = np.array([velocities[name] for name in positions], float)
    return msg(JOINT_STATE, header=_header(msg, stamp, ""), name=list(positions), **fields)


def joints_from_ros(message: Any) -> Dict[str, float]:
    """Return positions by name.

    Raises:
        ValueError: a name twice, or not one position per name.
    """
    return _by_name(message, "position")


def joint_velocities_from_ros(message: Any) -> Dict[str, float]:
    """Return velocities by name; none where the message has none.

    Raises:
        ValueError: a name twice, or not one velocity per name.
    """
    return _by_name(message, "velocity") if len(message.velocity) else {}


def _by_name(message: Any, quantity: str) -> Dict[str, float]:
    names, values = list(message.name), getattr(message, quantity)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"a joint state needs unique names, got {', '.join(twice)} twice in {', '.join(names)}")
    if len(values) != len(names):
        raise ValueError(f"a joint state needs one {quantity} per name, got {len(values)} for {', '.join(names)}")
    return {name: float(value) for name, value in zip(names, values, strict=True)}


def pose_to_ros(msg: Msg, stamp: float, position: Vector, frame: str, quaternion: Vector = IDENTITY) -> Any:
    """Return a PoseStamped; position [m], quaternion wxyz."""
    pose = msg(
        "geometry_msgs/msg/Pose",
        position=_vector(msg, position, "Point"),
        orientation=_quaternion(msg, quaternion),
    )
    return msg(POSE, header=_header(msg, stamp, frame), pose=pose)


def pose_from_ros(message: Any) -> Tuple[np.ndarray, np.ndarray]:
    """Return position [m] and quaternion wxyz."""
    return _xyz(message.pose.position), _wxyz(message.pose.orientation)


def _twist(msg: Msg, linear: Vector, angular: Vector = (0.0, 0.0, 0.0)) -> Any:
    return msg("geometry_msgs/msg/Twist", linear=_vector(msg, linear), angular=_vector(msg, angular))


def twist_to_ros(msg: Msg, stamp: float, linear: Vector, angular: Vector, frame: str) -> Any:
    """Return a TwistStamped [m/s, rad/s], MoveIt Servo's input."""
    return msg(TWIST, header=_header(msg, stamp, frame), twist=_twist(msg, linear, angular))


def twist_from_ros(message: Any) -> Tuple[np.ndarray, np.ndarray]:
    """Return linear [m/s] and angular [rad/s] velocity."""
    return _xyz(message.twist.linear), _xyz(message.twist.angular)


def array_to_ros(msg: Msg, values: np.ndarray) -> Any:
    """Return a Float64MultiArray, ros2_control's forward command."""
    return msg(ARRAY, data=np.asarray(values, float))


def array_from_ros(message: Any) -> np.ndarray:
    """Return the values as float64 [d]."""
    return np.asarray(message.data, float)


def json_to_ros(msg: Msg, values: Any) -> Any:
    """Return a String of JSON."""
    return msg(STRING, data=json.dumps(values, allow_nan=False))


def json_from_ros(message: Any) -> Any:
    """Return the values of a String of JSON.

    Raises:
        ValueError: not JSON.
    """
    return json.loads(message.data)


def joint_chunk_to_ros(
    msg: Msg, stamp: float, dt: float, names: Sequence[str], values: np.ndarray, quantity: str, id: int = 0
) -> Any:
    """Return a chunk [n d] as JointTrajectory; point i is reached at stamp + (i + 1) dt.

    Args:
        quantity: "positions" or "effort" for absolute values, "velocities" for deltas: they travel as delta / dt.
        id: of the chunk; it travels in the frame's name, which a joint trajectory has no other use for.
    """
    if quantity not in QUANTITIES:
        raise ValueError(f"no quantity {quantity!r}; there are {', '.join(QUANTITIES)}")
    scale = dt if quantity == "velocities" else 1.0
    points = [
        msg(
            "trajectory_msgs/msg/JointTrajectoryPoint",
            time_from_start=_duration(msg, (i + 1) * dt),
            **{quantity: row},
        )
        for i, row in enumerate(np.asarray(values, float) / scale)
    ]
    header = _header(msg, stamp, f"chunk#{id}" if id else "")
    return msg(JOINT_TRAJECTORY, header=header, joint_names=list(names), points=points)


def joint_chunk_from_ros(
    message: Any, quantity: str, names: Optional[Sequence[str]] = None
) -> Tuple[float, np.ndarray]:
    """Return dt [s] and values [n d]; inverts `joint_chunk_to_ros`.

    Args:
        names: the order of the values; None: as the message has them.

    Raises:
        ValueError: no points, points that lack the quantity, uneven times, or other joints than `names`.
    """
    dt = _chunk_dt(message)
    rows = [getattr(point, quantity) for point in message.points]
    theirs = list(message.joint_names)
    if any(len(row) != len(theirs) for row in rows):
        raise ValueError(f"every point of a chunk for {theirs} needs {len(theirs)} {quantity}")
    values = np.array(rows, float).reshape(len(rows), len(theirs)) * (dt if quantity == "velocities" else 1.0)
    return dt, values if names is None else values[:, order_of(names, theirs)]


def order_of(wanted: Sequence[str], there: Sequence[str]) -> List[int]:
    """Return where each wanted name is in another list, which must hold the same names in any order.

    Raises:
        ValueError: a name is missing, too many or there twice; shows both lists.
    """
    missing, extra = [n for n in wanted if n not in there], [n for n in there if n not in wanted]
    twice = sorted({n for n in there if list(there).count(n) > 1})
    if missing or extra or twice:
        wrong = (("missing", missing), ("unknown", extra), ("twice", twice))
        what = ", ".join(f"{kind} {', '.join(names)}" for kind, names in wrong if names)
        raise ValueError(f"joints {', '.join(there)} where {', '.join(wanted)} are expected: {what}")
    return [list(there).index(name) for name in wanted]


def cartesian_chunk_to_ros(
    msg: Msg, stamp: float, dt: float, name: str, frame: str, values: np.ndarray, delta: bool, id: int = 0
) -> Any:
    """Return a chunk as MultiDOFJointTrajectory; point i is reached at stamp + (i + 1) dt.

    A delta fills `velocities` with delta / dt and leaves `transforms` empty, so that nobody takes it for a target.

    Args:
        values: positions [n 3] m, poses [n 7] (position, quaternion wxyz), or deltas: [n 3] m or [n 6] (m, then the
            rotation vector in rad).
        id: of the chunk; it travels as `name#id`.
    """
    points = []
    rows = np.asarray(values, float) / (dt if delta else 1.0)
    for i, row in enumerate(rows.tolist()):
        field = {"velocities": [_twist_of(msg, row)]} if delta else {"transforms": [_transform(msg, row)]}
        time = _duration(msg, (i + 1) * dt)
        points.append(msg("trajectory_msgs/msg/MultiDOFJointTrajectoryPoint", time_from_start=time, **field))
    names = [f"{name}#{id}" if id else name]
    return msg(CARTESIAN_TRAJECTORY, header=_header(msg, stamp, frame), joint_names=names, points=points)


def _transform(msg: Msg, pose: List[float]) -> Any:
    assert len(pose) in (3, 7), pose
    rotation = _quaternion(msg, pose[3:] if len(pose) == 7 else IDENTITY)
    return msg("geometry_msgs/msg/Transform", translation=_vector(msg, pose[:3]), rotation=rotation)


def _twist_of(msg: Msg, values: List[float]) -> Any:
    assert len(values) in (3, 6), values
    return _twist(msg, values[:3], values[3:] if len(values) == 6 else (0.0, 0.0, 0.0))


def cartesian_chunk_from_ros(message: Any, delta: bool, rotation: bool = False) -> Tuple[float, np.ndarray]:
    """Return dt [s] and values as in `cartesian_chunk_to_ros`, which it inverts.

    Args:
        rotation: whether poses [n 7] or deltas [n 6] are expected, or positions and deltas [n 3].

    Raises:
        ValueError: no points, deltas where positions are expected or the other way round, uneven times, or a rotation
            where none is expected.
    """
    dt = _chunk_dt(message)
    field = "velocities" if delta else "transforms"
    if any(len(getattr(point, field)) != 1 for point in message.points):
        raise ValueError(f"every point of a {'delta' if delta else 'position'} chunk needs one entry in {field}")
    if delta:
        twists = [point.velocities[0] for point in message.points]
        linear, angular = np.array([_xyz(t.linear) for t in twists]), np.array([_xyz(t.angular) for t in twists])
        turns, motion = bool(np.any(angular)), np.hstack([linear, angular]) * dt
    else:
        transforms = [point.transforms[0] for point in message.points]
        quaternions = np.array([_wxyz(t.rotation) for t in transforms])
        turns = bool(np.any(quaternions != np.array(IDENTITY)))
        motion = np.hstack([np.array([_xyz(t.translation) for t in transforms]), quaternions])
    if turns and not rotation:
        raise ValueError("a chunk that turns the tool, but this embodiment's actions have no rotation")
    return dt, motion if rotation else motion[:, :3]


def chunk_id_of(message: Any) -> int:
    """Return the id of a chunk of either kind, 0 where it has none.

    Raises:
        ValueError: something else where the id should be.
    """
    is_joint = message.points and hasattr(message.points[0], "positions")
    carrier = message.header.frame_id if is_joint else (message.joint_names or [""])[0]
    _, mark, number = carrier.rpartition("#")
    if not mark:
        return 0
    if not re.fullmatch("[0-9]{1,18}", number):
        raise ValueError(f"a chunk's id must be a number, got {carrier!r}")
    return int(number)


def _chunk_dt(message: Any) -> float:
    """Return the step of a chunk's times, which must be dt, 2 dt, ..."""
    times = [_seconds(point.time_from_start) for point in message.points]
    if not times or not times[0] > 0:
        raise ValueError("a chunk needs at least one point, the first at a positive time")
    if any(abs(t - (i + 1) * times[0]) > 1e-6 * (i + 1) for i, t in enumerate(times)):
        raise ValueError(f"a chunk's points must be evenly spaced, got times {times}")
    return times[0]


def executed_to_ros(msg: Msg, step: ExecutedStep, dt: float, names: Sequence[str], joint: bool) -> Any:
    """Report one executed step: a trajectory of one point, reached dt after its stamp.

    Which step of which chunk travels in the frame's name, `source/id/index/chunk stamp in ns` and then the gripper.

    Args:
        names: of the joints, or of the tool.
        joint: whether the target is joints, in a JointTrajectory, or the tool, in a MultiDOFJointTrajectory.
    """
    if "/" in step.source:
        raise ValueError(f"a source's name has no slash, got {step.source!r}")
    parts = [step.source, str(step.id), str(step.index), str(round(step.chunk * 1e9))]
    reference = "/".join(parts if step.gripper is None else [*parts, repr(float(step.gripper))])
    header, time = _header(msg, step.stamp, reference), _duration(msg, dt)
    if joint:
        point = msg(
            "trajectory_msgs/msg/JointTrajectoryPoint",
            positions=np.asarray(step.target, float),
            velocities=np.asarray(step.delta, float) / dt,
            time_from_start=time,
        )
        return msg(JOINT_TRAJECTORY, header=header, joint_names=list(names), points=[point])
    point = msg(
        "trajectory_msgs/msg/MultiDOFJointTrajectoryPoint",
        transforms=[_transform(msg, np.asarray(step.target, float).tolist())],
        velocities=[_twist_of(msg, (np.asarray(step.delta, float) / dt).tolist())],
        time_from_start=time,
    )
    return msg(CARTESIAN_TRAJECTORY, header=header, joint_names=list(names), points=[point])


def executed_from_ros(message: Any, rotation: bool = False) -> ExecutedStep:
    """Read `executed_to_ros`'s message of either kind.

    Args:
        rotation: of a Cartesian target: whether it is a pose [7] with a delta [6], or [3] and [3].

    Raises:
        ValueError: not such a message.
    """
    parts = message.header.frame_id.split("/")
    if len(parts) not in (4, 5) or len(message.points) != 1:
        raise ValueError(f"not an executed step: {message.header.frame_id!r} with {len(message.points)} points")
    point = message.points[0]
    dt = _seconds(point.time_from_start)
    if hasattr(point, "positions"):
        target, delta = np.asarray(point.positions, float), np.asarray(point.velocities, float) * dt
    else:
        transform, twist = point.transforms[0], point.velocities[0]
        target, delta = _xyz(transform.translation), _xyz(twist.linear) * dt
        if rotation:
            target = np.concatenate([target, _wxyz(transform.rotation)])
            delta = np.concatenate([delta, _xyz(twist.angular) * dt])
    source, id, index, chunk = parts[:4]
    sec, nanosec = divmod(int(chunk), 10**9)
    gripper = float(parts[4]) if len(parts) == 5 else None
    stamp = sec + nanosec * 1e-9  # as `stamp_of` reads it: the same float
    return ExecutedStep(stamp, int(id), int(index), stamp_of(message), target, delta, source, gripper)


def joint_command_to_ros(
    msg: Msg, stamp: float, names: Sequence[str], position: Vector, velocity: Vector, dt: float
) -> Any:
    """Return the command of one tick as JointTrajectory: reached at stamp + dt, at `velocity` [rad/s]."""
    point = msg(
        "trajectory_msgs/msg/JointTrajectoryPoint",
        positions=np.asarray(position, float),
        velocities=np.asarray(velocity, float),
        time_from_start=_duration(msg, dt),
    )
    return msg(JOINT_TRAJECTORY, header=_header(msg, stamp, ""), joint_names=list(names), points=[point])


def gripper_to_ros(msg: Msg, stamp: float, names: Sequence[str], value: float, quantity: str, dt: float) -> Any:
    """Return a gripper command as JointTrajectory, the same value for each of its joints."""
    return joint_chunk_to_ros(msg, stamp, dt, names, np.full((1, len(names)), float(value)), quantity)


def gripper_command_to_ros(msg: Msg, value: float, max_effort: float = 0.0) -> Any:
    """Return a control_msgs GripperCommand; an effort of 0 is the driver's own."""
    return msg(GRIPPER_COMMAND, position=float(value), max_effort=float(max_effort))


def gripper_command_from_ros(message: Any) -> float:
    """Return the position of a GripperCommand."""
    return float(message.position)


def float_to_ros(msg: Msg, value: float) -> Any:
    """Return a Float64."""
    return msg(FLOAT, data=float(value))


def float_from_ros(message: Any) -> float:
    """Return a Float64's value.

    Raises:
        ValueError: it is not finite.
    """
    if not math.isfinite(message.data):
        raise ValueError(f"a number that is not finite: {message.data}")
    return float(message.data)


def diagnostics_to_ros(msg: Msg, stamp: float, name: str, level: int, text: str, values: Mapping[str, Any]) -> Any:
    """Return a DiagnosticArray of one status; level 0 is ok, 1 a warning, 2 an error."""
    pairs: List[Any] = [msg("diagnostic_msgs/msg/KeyValue", key=k, value=str(v)) for k, v in values.items()]
    status = msg("diagnostic_msgs/msg/DiagnosticStatus", level=level, name=name, message=text, values=pairs)
    return msg(DIAGNOSTICS, header=_header(msg, stamp, ""), status=[status])


def diagnostics_from_ros(message: Any, name: Optional[str] = None) -> Dict[str, Dict[str, Any]]:
    """Return {status name: {"level", "message", "values"}}, of one status or of all."""
    return {
        s.name: {
            "level": int.from_bytes(s.level, "little") if isinstance(s.level, bytes) else int(s.level),  # rclpy: bytes
            "message": s.message,
            "values": {pair.key: pair.value for pair in s.values},
        }
        for s in message.status
        if name is None or s.name == name
    }
