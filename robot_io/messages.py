"""ROS 2 messages <-> plain values, by duck typing: rclpy's and rosbags' messages have the same field names.

`msg` is always a bus's factory, `msg("std_msgs/msg/String", data=...)`. Quaternions are wxyz here and xyzw on the wire.
A stamp survives the border exactly: a float of today's seconds is coarser than a nanosecond. Shape legend: h w image
size, n chunk length, d dims.
"""

import json
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

Msg = Callable[..., Any]
Vector = Union[np.ndarray, Sequence[float]]

IMAGE = "sensor_msgs/msg/Image"
JOINT_STATE = "sensor_msgs/msg/JointState"
POSE = "geometry_msgs/msg/PoseStamped"
TWIST = "geometry_msgs/msg/TwistStamped"
JOINT_TRAJECTORY = "trajectory_msgs/msg/JointTrajectory"
CARTESIAN_TRAJECTORY = "trajectory_msgs/msg/MultiDOFJointTrajectory"
ARRAY = "std_msgs/msg/Float64MultiArray"
STRING = "std_msgs/msg/String"
BOOL = "std_msgs/msg/Bool"
DIAGNOSTICS = "diagnostic_msgs/msg/DiagnosticArray"

IDENTITY = (1.0, 0.0, 0.0, 0.0)  # wxyz
QUANTITIES = ("positions", "velocities", "effort")


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
    x, y, z = (float(v) for v in xyz)
    return msg(f"geometry_msgs/msg/{type}", x=x, y=y, z=z)


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


def image_from_ros(message: Any) -> np.ndarray:
    """Return RGB, uint8 [h w 3]: a view on the message's bytes where the encoding allows.

    Raises:
        ValueError: an encoding other than rgb8 and bgr8, or sizes that do not agree.
    """
    h, w, step = message.height, message.width, message.step
    if message.encoding not in ("rgb8", "bgr8"):
        raise ValueError(f"image encoding {message.encoding!r} is not supported; send rgb8 or bgr8")
    data = np.frombuffer(message.data, np.uint8)
    if step < 3 * w or data.size != h * step:
        raise ValueError(f"an image of {h} x {w} with step {step} needs {h * max(step, 3 * w)} bytes, got {data.size}")
    rgb = data.reshape(h, step)[:, : 3 * w].reshape(h, w, 3)
    return rgb if message.encoding == "rgb8" else rgb[..., ::-1]


def joints_to_ros(msg: Msg, stamp: float, positions: Mapping[str, float]) -> Any:
    """Return a JointState of positions by name [rad or m]."""
    values = np.array(list(positions.values()), float)
    return msg(JOINT_STATE, header=_header(msg, stamp, ""), name=list(positions), position=values)


def joints_from_ros(message: Any) -> Dict[str, float]:
    """Return positions by name.

    Raises:
        ValueError: a name twice, or not one position per name.
    """
    names = list(message.name)
    if len(set(names)) != len(names) or len(message.position) != len(names):
        raise ValueError(f"a joint state needs one position per unique name, got {names}, {list(message.position)}")
    return {name: float(value) for name, value in zip(names, message.position, strict=True)}


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
    msg: Msg, stamp: float, dt: float, names: Sequence[str], values: np.ndarray, quantity: str
) -> Any:
    """Return a chunk [n d] as JointTrajectory; point i is reached at stamp + (i + 1) dt.

    Args:
        quantity: "positions" or "effort" for absolute values, "velocities" for deltas: they travel as delta / dt.
    """
    if quantity not in QUANTITIES:
        raise ValueError(f"no quantity {quantity!r}; there are {', '.join(QUANTITIES)}")
    scale = dt if quantity == "velocities" else 1.0
    points = [
        msg(
            "trajectory_msgs/msg/JointTrajectoryPoint",
            time_from_start=_duration(msg, (i + 1) * dt),
            **{quantity: np.asarray(row, float) / scale},
        )
        for i, row in enumerate(values)
    ]
    return msg(JOINT_TRAJECTORY, header=_header(msg, stamp, ""), joint_names=list(names), points=points)


def joint_chunk_from_ros(message: Any, quantity: str) -> Tuple[float, np.ndarray]:
    """Return dt [s] and values [n d]; inverts `joint_chunk_to_ros`.

    Raises:
        ValueError: no points, points that lack the quantity, or uneven times.
    """
    dt = _chunk_dt(message)
    rows = [getattr(point, quantity) for point in message.points]
    width = len(message.joint_names)
    if any(len(row) != width for row in rows):
        raise ValueError(f"every point of a chunk for {list(message.joint_names)} needs {width} {quantity}")
    return dt, np.array(rows, float).reshape(len(rows), width) * (dt if quantity == "velocities" else 1.0)


def cartesian_chunk_to_ros(
    msg: Msg, stamp: float, dt: float, name: str, frame: str, values: np.ndarray, delta: bool
) -> Any:
    """Return a chunk of positions or deltas [n 3] in m as MultiDOFJointTrajectory.

    Point i is reached at stamp + (i + 1) dt. A delta fills `velocities` with delta / dt and leaves `transforms` empty,
    so that nobody takes it for a target.
    """
    points = []
    for i, row in enumerate(values):
        field = {"velocities": [_twist(msg, row / dt)]} if delta else {"transforms": [_transform(msg, row)]}
        time = _duration(msg, (i + 1) * dt)
        points.append(msg("trajectory_msgs/msg/MultiDOFJointTrajectoryPoint", time_from_start=time, **field))
    return msg(CARTESIAN_TRAJECTORY, header=_header(msg, stamp, frame), joint_names=[name], points=points)


def _transform(msg: Msg, position: Vector) -> Any:
    rotation = _quaternion(msg, IDENTITY)
    return msg("geometry_msgs/msg/Transform", translation=_vector(msg, position), rotation=rotation)


def cartesian_chunk_from_ros(message: Any, delta: bool) -> Tuple[float, np.ndarray]:
    """Return dt [s] and positions or deltas [n 3] in m; inverts `cartesian_chunk_to_ros`.

    Raises:
        ValueError: no points, deltas where positions are expected or the other way round, or uneven times.
    """
    dt = _chunk_dt(message)
    field = "velocities" if delta else "transforms"
    if any(len(getattr(point, field)) != 1 for point in message.points):
        raise ValueError(f"every point of a {'delta' if delta else 'position'} chunk needs one entry in {field}")
    if delta:
        return dt, np.array([_xyz(p.velocities[0].linear) * dt for p in message.points])
    return dt, np.array([_xyz(p.transforms[0].translation) for p in message.points])


def _chunk_dt(message: Any) -> float:
    """Return the step of a chunk's times, which must be dt, 2 dt, ..."""
    times = [_seconds(point.time_from_start) for point in message.points]
    if not times or not times[0] > 0:
        raise ValueError("a chunk needs at least one point, the first at a positive time")
    if any(abs(t - (i + 1) * times[0]) > 1e-6 * (i + 1) for i, t in enumerate(times)):
        raise ValueError(f"a chunk's points must be evenly spaced, got times {times}")
    return times[0]


def executed_to_ros(
    msg: Msg, chunk: float, index: int, dt: float, name: str, frame: str, target: np.ndarray, delta: np.ndarray
) -> Any:
    """Report what was sent for step `index` of the chunk with stamp `chunk`: the target [m] and what was added [m]."""
    point = msg(
        "trajectory_msgs/msg/MultiDOFJointTrajectoryPoint",
        transforms=[_transform(msg, target)],
        velocities=[_twist(msg, delta / dt)],
        time_from_start=_duration(msg, (index + 1) * dt),
    )
    return msg(CARTESIAN_TRAJECTORY, header=_header(msg, chunk, frame), joint_names=[name], points=[point])


def executed_from_ros(message: Any, dt: float) -> Tuple[float, int, np.ndarray, np.ndarray]:
    """Return chunk stamp, index, target [m] and delta [m]; inverts `executed_to_ros`."""
    point = message.points[0]
    index = round(_seconds(point.time_from_start) / dt) - 1
    return stamp_of(message), index, _xyz(point.transforms[0].translation), _xyz(point.velocities[0].linear) * dt


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
