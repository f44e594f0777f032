"""The black box: the last minute of every topic, written when the guard reacts with R2 or R3.

A process of its own: the guard does no file I/O and does not wait for it. A record is a folder: a rosbag2 bag (MCAP,
opens in Foxglove and with `ros2 bag`), `reasons.json` and `overview.png`. It appears by one rename.
"""

import json
import math
import shutil
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
from rosbags.interfaces import Nodetype
from rosbags.typesys import Stores, get_typestore

from robot_io import messages as m
from robot_io.bus import COMMAND, LATCHED, SENSOR, STATE, Bus, Qos, open_bus
from robot_io.core.black_box import (
    REASONS,
    Reaction,
    Ring,
    Sample,
    Trigger,
    prune,
    reaction_of,
    reasons,
    record_name,
    timeline,
    worst_of,
)
from robot_io.core.limits import Robot
from robot_io.nodes.guard import load_robot
from robot_io.nodes.serve import be_nice, serve
from robot_io.nodes.topics import (
    APPROVAL,
    APPROVE,
    ARM,
    CHUNK,
    CHUNK_GRIPPER,
    CONTRACT,
    DIAGNOSTICS,
    EXECUTED,
    GUARD_STATE,
    INSTRUCTION,
    SPEED,
    TAKEOVER,
    TELEOP,
    TELEOP_GRIPPER,
    chunk_type,
    command_type,
    image_topic,
)

TYPES = get_typestore(Stores.ROS2_JAZZY)
QUALITY = 85  # of the pictures kept: for people, not for training
IMAGE_SHARE = 0.75  # of the memory
GAP_S = 0.05  # between two commands: no speed is drawn across it
WARM_S = 10.0  # after which it imports what it will draw with, if it has not had to by then
QUEUE = 320  # a black box misses nothing while it writes


def topics_of(robot: Robot) -> List[Tuple[str, str, Qos]]:
    """Return what is kept beside pictures, states and diagnostics."""
    chunk, driver = chunk_type(robot), robot.driver
    found = [
        (driver.command_topic, command_type(robot), COMMAND),
        (driver.pose_topic, m.POSE, STATE),
        (driver.joints_topic, m.JOINT_STATE, STATE),
        (driver.mode_topic, m.STRING, LATCHED),
        (CHUNK, chunk, COMMAND),
        (CHUNK_GRIPPER, m.JOINT_TRAJECTORY, COMMAND),
        (TELEOP, chunk, COMMAND),
        (TELEOP_GRIPPER, m.JOINT_TRAJECTORY, COMMAND),
        (EXECUTED, chunk, STATE),
        (INSTRUCTION, m.STRING, LATCHED),
        (ARM, m.BOOL, STATE),
        (TAKEOVER, m.STRING, STATE),
        (SPEED, m.FLOAT, STATE),
        (APPROVAL, m.BOOL, STATE),
        (APPROVE, m.STRING, STATE),
    ]
    if driver.gripper == "joint_trajectory":
        found.append((driver.gripper_topic, m.JOINT_TRAJECTORY, COMMAND))
    return found


class BlackBoxNode:
    """Keep the last seconds of every topic and write them when the guard reacts."""

    def __init__(
        self,
        bus: Bus,
        robot: Robot,
        folder: Path,
        *,
        seconds: float,
        max_memory: int,
        image_hz: float,
        after: float,
        interval: float,
        max_records: int,
        max_bytes: int,
    ) -> None:
        """Join the graph.

        Args:
            robot: whose topics are kept; its limits are drawn.
            folder: gets one folder per record.
            seconds: what is kept.
            max_memory: of the messages kept [bytes].
            image_hz: pictures kept per camera and second, the rest is left out.
            after: what a record shows of the time after the reaction [s].
            interval: least time between two records [s]; reactions in between share the next one.
            max_records: kept on disk; the oldest goes first.
            max_bytes: of all records on disk.
        """
        self.bus, self.robot, self.folder, self._seconds = bus, robot, folder, seconds
        self._image_period, self._max = 1.0 / image_hz, (max_records, max_bytes)
        self._pictures = Ring(seconds, int(IMAGE_SHARE * max_memory))
        self._rest = Ring(seconds, int((1 - IMAGE_SHARE) * max_memory))
        self._trigger = Trigger(after, interval)
        self._last_picture: Dict[str, float] = {}
        self._latched: Dict[str, Sample] = {}  # what came before the window and still holds
        self._states: List[Tuple[float, Mapping[str, Any]]] = []
        self._diagnostics: Dict[str, Any] = {}
        self._hash = ""  # of the contract
        self._guard_alive = False
        self._writing: Optional[threading.Thread] = None
        self.written: List[Path] = []
        for topic, type, qos in topics_of(robot):
            bus.subscribe(topic, type, _deep(qos), self._keeper(topic, type))
        bus.on_liveliness(robot.driver.command_topic, self._on_guard_liveliness)
        for camera in robot.cameras:
            topic = image_topic(camera)
            bus.subscribe(topic, m.IMAGE, SENSOR, self._picture_taker(topic))
        bus.subscribe(GUARD_STATE, m.STRING, LATCHED, self._on_state)
        bus.subscribe(CONTRACT, m.STRING, LATCHED, self._on_contract)
        bus.subscribe(DIAGNOSTICS, m.DIAGNOSTICS, STATE, self._on_diagnostics)
        bus.timer(0.2, self._write_due)

    def stop(self) -> None:
        """Write what waits, then leave."""
        self.bus.shutdown()

    def close(self) -> None:
        """Write what waits and leave the graph."""
        self._join()
        burst = self._trigger.due(self.bus.now(), closing=True)
        if burst:
            self._write(burst)
        self.bus.close()

    def _keeper(self, topic: str, type: str) -> Callable[[Any], None]:
        return lambda message: self._keep(topic, type, message)

    def _picture_taker(self, topic: str) -> Callable[[Any], None]:
        return lambda message: self._on_image(topic, message)

    def _keep(self, topic: str, type: str, message: Any) -> None:
        self._rest.add(self._sample(topic, type, message))

    def _sample(self, topic: str, type: str, message: Any) -> Sample:
        return Sample(self.bus.now(), topic, type, bytes(TYPES.serialize_cdr(plain(message, type), type)))

    def _on_image(self, topic: str, message: Any) -> None:
        now = self.bus.now()
        if now - self._last_picture.get(topic, -math.inf) < 0.9 * self._image_period:
            return
        self._last_picture[topic] = now
        try:
            data = jpeg(m.image_from_ros(message))
        except ValueError as e:  # a camera that sends what nobody understands is itself worth a line
            self.bus.log("warning", f"{topic}: {e}")
            return
        if data is None:
            self._pictures.add(self._sample(topic, m.IMAGE, message))
            return
        kept = TYPES.types[m.COMPRESSED_IMAGE](
            header=plain(message.header, "std_msgs/msg/Header"), format="jpeg", data=data
        )
        encoded = bytes(TYPES.serialize_cdr(kept, m.COMPRESSED_IMAGE))
        self._pictures.add(Sample(now, f"{topic}/compressed", m.COMPRESSED_IMAGE, encoded))

    def _on_state(self, message: Any) -> None:
        now = self.bus.now()
        self._keep(GUARD_STATE, m.STRING, message)
        try:
            state = m.json_from_ros(message)
            before = self._states[-1][1].get("state", "") if self._states else ""
            found = reaction_of(state, before, now)
        except (ValueError, AttributeError, TypeError) as e:
            self.bus.log("error", f"{GUARD_STATE}: {e}")
            return
        self._states.append((now, state))
        while len(self._states) > 1 and now - self._states[1][0] > self._seconds:
            self._states.pop(0)  # the one that held when the window begins stays
        if found is not None:
            self._trigger.react(found)

    def _on_contract(self, message: Any) -> None:
        try:
            contract = m.json_from_ros(message)
            self._hash = str(contract["hash"])
        except (ValueError, KeyError, TypeError) as e:
            self.bus.log("error", f"{CONTRACT}: {e}")
            return
        self._latched[CONTRACT] = self._sample(CONTRACT, m.STRING, message)

    def _on_diagnostics(self, message: Any) -> None:
        self._keep(DIAGNOSTICS, m.DIAGNOSTICS, message)
        self._diagnostics.update(m.diagnostics_from_ros(message))

    def _on_guard_liveliness(self, alive: int) -> None:
        state = self._states[-1][1].get("state", "") if self._states else ""
        if self._guard_alive and alive == 0 and state not in ("", "IDLE"):
            self._trigger.react(Reaction(self.bus.now(), "GONE", state, "the guard is gone"))
        self._guard_alive = alive > 0

    def _write_due(self) -> None:
        if self._writing is not None and not self._writing.is_alive():
            self._writing = None
        if self._writing is None:
            burst = self._trigger.due(self.bus.now())
            if burst:
                job = self._job(burst)
                self._writing = threading.Thread(target=self._run, args=(job,), name="black box", daemon=True)
                self._writing.start()

    def _job(self, burst: Sequence[Reaction]) -> Dict[str, Any]:
        """Freeze what a record shows; what arrives from now on is not in it."""
        samples = sorted([*self._latched.values(), *self._rest.samples(), *self._pictures.samples()], key=_time)
        about = {
            "embodiment": self.robot.name,
            "contract": self._hash,
            "seconds": self._seconds,
            "left_out_for_memory": {"pictures": self._pictures.evicted, "messages": self._rest.evicted},
        }
        values = reasons(burst, samples, list(self._states), dict(self._diagnostics), about)
        return {"burst": burst, "samples": samples, "reasons": values, "robot": self.robot}

    def _write(self, burst: Sequence[Reaction]) -> None:
        self._run(self._job(burst))

    def _run(self, job: Mapping[str, Any]) -> None:
        try:
            record = write_record(self.folder, **job)
            self.written.append(record)
            self.bus.log("info", f"black box: wrote {record}")
            gone = prune(self.folder, *self._max)
            if gone:
                self.bus.log("info", f"black box: removed {', '.join(gone)} to keep to its caps")
        except Exception as e:  # a full disk must not end the recording of what comes next
            self.bus.log("error", f"black box: nothing written: {type(e).__name__}: {e}")

    def _join(self) -> None:
        if self._writing is not None:
            self._writing.join()


def _time(sample: Sample) -> float:
    return sample.time


def _deep(qos: Qos) -> Qos:
    return Qos(qos.reliable, qos.latched, 1 if qos.latched else QUEUE, qos.lease_s)


def plain(message: Any, type: str) -> Any:
    """Return a message as rosbags' own class, whichever bus it came from."""
    if isinstance(message, TYPES.types[type]):
        return message
    fields = TYPES.fielddefs[type][1]
    return TYPES.types[type](**{name: _plain(getattr(message, name), desc) for name, desc in fields})


def _plain(value: Any, desc: Any) -> Any:
    kind, what = desc
    if kind == Nodetype.NAME:
        return plain(value, what)
    if kind == Nodetype.BASE:
        return int.from_bytes(value, "little") if isinstance(value, bytes) else value  # rclpy: a byte is bytes
    (inner, name), _ = what
    if inner == Nodetype.NAME:
        return [plain(v, name) for v in value]
    if name[0] == "string":
        return [str(v) for v in value]
    return np.asarray(value, "uint8" if name[0] in ("byte", "char") else name[0])


def jpeg(rgb: np.ndarray) -> Optional[np.ndarray]:
    """Encode a picture [h w 3] for people; None where no JPEG library is installed."""
    try:
        import simplejpeg
    except ImportError:
        return None
    return np.frombuffer(simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), QUALITY), np.uint8)


# ---- the record


def write_record(
    folder: Path,
    burst: Sequence[Reaction],
    samples: Sequence[Sample],
    reasons: Mapping[str, Any],
    robot: Robot,
) -> Path:
    """Write one record and return its folder.

    Raises:
        OSError: the disk; nothing half-written is left.
    """
    moment = worst_of(burst).time
    stamp = time.strftime("%Y%m%dT%H%M%S", time.gmtime(moment)) + f".{int(moment % 1 * 1000):03d}"
    record = folder / record_name(stamp, burst)
    partial = folder / f".{record.name}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write_bag(partial / "bag", samples)
        picture = _drawn(partial / "overview.png", burst, samples, reasons["states"], robot)
        text = json.dumps(_finite({**reasons, "picture": picture}), indent=1, allow_nan=False)
        (partial / REASONS).write_text(text, encoding="utf-8")
        partial.rename(record)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return record


def _drawn(path: Path, *what: Any) -> str:
    """Draw, and return the file's name or why there is none: a picture that fails must not cost the record."""
    try:
        draw(path, *what)
    except OSError:
        raise
    except Exception as e:
        return f"none: {type(e).__name__}: {e}"
    return path.name


def _finite(values: Any) -> Any:
    """Write what is not finite as text: it may be the very reason of the record, and JSON has no number for it."""
    if isinstance(values, Mapping):
        return {str(k): _finite(v) for k, v in values.items()}
    if isinstance(values, (list, tuple)):
        return [_finite(v) for v in values]
    return str(values) if isinstance(values, float) and not math.isfinite(values) else values


def write_bag(path: Path, samples: Sequence[Sample]) -> None:
    """Write samples as a rosbag2 bag, MCAP; the log time is that of arrival."""
    from rosbags.rosbag2 import StoragePlugin, Writer

    with Writer(path, version=9, storage_plugin=StoragePlugin.MCAP) as bag:
        kinds = dict.fromkeys((s.topic, s.type) for s in samples)
        connections = {kind: bag.add_connection(*kind, typestore=TYPES) for kind in kinds}
        for s in samples:
            bag.write(connections[s.topic, s.type], round(s.time * 1e9), s.data)


Series = Tuple[np.ndarray, np.ndarray]  # t [n], values [n d]


def series_of(samples: Sequence[Sample], topic: str) -> Series:
    """Return a topic's numbers over time: positions of poses and joints, targets, or speeds.

    The time is the message's own stamp, or that of arrival where it has none.
    """
    times, rows = [], []
    for s in samples:
        if s.topic == topic:
            message = TYPES.deserialize_cdr(s.data, s.type)
            row = _numbers(message, s.type)
            if row is not None and (not rows or len(row) == len(rows[0])):
                times.append(m.stamp_of(message) if hasattr(message, "header") else s.time)
                rows.append(row)
    return np.array(times), np.array(rows, float).reshape(len(rows), len(rows[0]) if rows else 0)


def _numbers(message: Any, type: str) -> Optional[np.ndarray]:
    if type == m.POSE:
        return m.pose_from_ros(message)[0]
    if type == m.TWIST:
        return m.twist_from_ros(message)[0]
    if type == m.ARRAY:
        return m.array_from_ros(message)
    if type == m.JOINT_STATE:
        return np.asarray(message.position, float)
    if not message.points:
        return None
    point = message.points[-1]
    if type == m.JOINT_TRAJECTORY:
        values = next((v for v in (point.positions, point.effort, point.velocities) if len(v)), None)
        return None if values is None else np.asarray(values, float)
    p = point.transforms[0].translation if point.transforms else point.velocities[0].linear
    return np.array([p.x, p.y, p.z])


COLORS = {"IDLE": "#b8b8b8", "ARMED": "#6fb56f", "HOLDING": "#e8b04a", "FAULT": "#d9584d"}


def draw(
    path: Path,
    burst: Sequence[Reaction],
    samples: Sequence[Sample],
    states: Sequence[Mapping[str, Any]],
    robot: Robot,
) -> None:
    """Draw commands, their speed against its limit, the gripper and the states over time, the moments marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    moment = worst_of(burst).time
    figure = Figure(figsize=(12, 9), layout="constrained")
    axes = figure.subplots(4, 1, sharex=True, height_ratios=[4, 3, 1.5, 0.7])
    sent = series_of(samples, robot.driver.command_topic)
    _draw_motion(axes[0], sent, samples, robot, moment)
    _draw_speed(axes[1], sent, robot, moment)
    gripper = series_of(samples, robot.driver.gripper_topic)
    if len(gripper[0]):
        axes[2].step(gripper[0] - moment, gripper[1], where="post", marker=".")
    axes[2].set_ylabel("gripper\ncommand")
    last = max([moment, *(s.time for s in samples[-1:])])
    edges = [*(s["time"] for s in states), last]
    for state, begin, end in zip(states, edges[:-1], edges[1:], strict=True):
        axes[3].axvspan(begin - moment, end - moment, color=COLORS.get(state.get("state", ""), "white"))
    axes[3].set_yticks([])
    axes[3].set_ylabel("state")
    axes[3].set_xlabel("s, 0 = the reaction; grey IDLE, green ARMED, orange HOLDING, red FAULT")
    for axis in axes:
        for r in burst:
            axis.axvline(r.time - moment, color="k", lw=1, ls="--")
    times = [s.time for s in samples if s.type not in LATCHED_TYPES] or [moment]
    axes[0].set_xlim(min(times) - moment - 0.1, max(*times, moment) - moment + 0.1)
    figure.suptitle("\n".join(f"{r.reaction} at {r.time - moment:+.3f} s: {r.reason}" for r in burst[:6]), fontsize=10)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=100)


LATCHED_TYPES = (m.STRING,)  # may have come long before


def _draw_motion(axis: Any, sent: Series, samples: Sequence[Sample], robot: Robot, moment: float) -> None:
    joint = robot.space.name == "joint"
    measured = series_of(samples, robot.driver.joints_topic if joint else robot.driver.pose_topic)
    goals = series_of(samples, EXECUTED)
    count = robot.space.linear
    for i in range(count):
        if i < sent[1].shape[1]:
            axis.plot(sent[0] - moment, sent[1][:, i], color=f"C{i}", label=robot.space.axes[i])
        if i < measured[1].shape[1] and not joint:
            axis.plot(measured[0] - moment, measured[1][:, i], color=f"C{i}", alpha=0.4, lw=2.5)
        if i < goals[1].shape[1]:
            axis.plot(goals[0] - moment, goals[1][:, i], ".", color=f"C{i}", ms=2)
    axis.set_ylabel("sent (line), goals (dots)" + (", rad" if joint else ",\nmeasured (wide), m"))
    if sent[1].shape[1]:
        axis.legend(loc="upper left", ncols=4, fontsize=8)


def _draw_speed(axis: Any, sent: Series, robot: Robot, moment: float) -> None:
    """Draw each group's speed as a share of its limit."""
    t, values = sent
    count = robot.space.linear
    if len(t) > 2 and robot.bounds is not None and values.shape[1] >= count:
        dt = np.maximum(np.diff(t), 1e-4)[:, None]
        rate = values[1:, :count] if robot.driver.command == "twist" else np.diff(values[:, :count], axis=0) / dt
        tangent = np.zeros((len(rate), robot.space.tangent))
        tangent[:, :count] = rate
        shares = np.array([robot.bounds.norms(row) / robot.bounds.speed for row in tangent])
        shares[dt[:, 0] > GAP_S] = np.nan
        axis.plot(t[1:] - moment, shares, lw=1)
    axis.axhline(1.0, color="r", ls=":", label="limit")
    axis.legend(loc="upper left", fontsize=8)
    axis.set_ylabel("speed of what was sent,\nshare of its limit")


def run(*, bus: Mapping[str, Any], embodiment: Any, folder: str, show: Optional[str] = None, **values: Any) -> None:
    """Run the black box until it is stopped, or show a record.

    Args:
        bus: arguments of `open_bus`.
        embodiment: the robot's file or plain values.
        folder: gets the records.
        show: a record's folder: print its timeline and leave.
        values: as in `BlackBoxNode`.
    """
    if show is not None:
        print("\n".join(timeline(Path(show))))
        return
    node = BlackBoxNode(open_bus(name="blackbox", **bus), load_robot(embodiment)[0], Path(folder), **values)
    be_nice(10)  # what it draws and writes may wait, a robot may not
    # it takes a second, and the first record comes in trouble
    warm = threading.Timer(WARM_S, import_module, args=("matplotlib.backends.backend_agg",))
    warm.daemon = True
    warm.start()
    serve(node)
