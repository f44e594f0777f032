"""The recorder on a bus: topics -> sealed Zarr episodes, started, stopped and thrown away by topic.

`robot_io.core.recorder` puts the samples on a grid; this file hears the topics and owns the store.
"""

import time
from typing import Any, Dict, List, Mapping, Optional, Protocol, Sequence

import numpy as np

from robot_io import messages as m
from robot_io.bus import LATCHED, SENSOR, STATE, Bus, Qos, open_bus
from robot_io.core.limits import Robot, parse_robot
from robot_io.core.recorder import (
    TAG,
    Frames,
    RecorderConfig,
    RecordError,
    Take,
    action_of,
    check_recordable,
    columns_of,
    source_of,
)
from robot_io.core.space import logarithm
from robot_io.nodes.serve import serve
from robot_io.nodes.topics import (
    EXECUTED,
    GUARD_STATE,
    INSTRUCTION,
    JOINTS,
    RECORD,
    RECORD_STATE,
    TOOL_POSE,
    chunk_type,
    image_topic,
    joint_names,
)

QUEUE = 320  # commands and steps are missed by nobody who writes a file
COMMANDS = ("start", "stop", "discard", "seal")
BROKEN = ("HOLDING", "FAULT")  # the guard brakes: what is sent then belongs to no demonstration


class Sink(Protocol):
    """Where finished episodes go."""

    def add(self, frames: Frames, instruction: str, success: Optional[bool], source: str) -> None:
        """Store one episode durably."""
        ...

    def seal(self) -> Optional[str]:
        """Make what was added readable; return what was made, None if nothing waited."""
        ...

    def counts(self) -> Dict[str, int]:
        """Return how many episodes there are ("episodes") and how many of them are not sealed ("unsealed")."""
        ...

    def close(self) -> None:
        """Let others write."""
        ...


class RecorderNode:
    """Record what a human or a policy does with the arm, an episode at a time."""

    def __init__(
        self, bus: Bus, robot: Robot, sink: Sink, config: RecorderConfig, *, instruction: str, session: str
    ) -> None:
        """Join the graph.

        Args:
            robot: what is recorded: its state, action and cameras.
            instruction: of episodes for which none was given and none is on the topic.
            session: names this run's episodes in the store.
        """
        check_recordable(robot)
        self.bus, self.robot, self._sink, self._config = bus, robot, sink, config
        self._session, self._number = session, 0
        self._default, self._heard, self._instruction, self._tag = instruction, "", "", ""
        self._take: Optional[Take] = None
        self._frames: Optional[Frames] = None  # finished, not yet stored: the disk was full
        self._guard: Dict[str, Any] = {}
        self._latest: Dict[str, Any] = {}  # newest (stamp, value) of each source: a take begins with them
        self._reason = f"writing as session {session}"
        self._said = 0  # how often something was said: tells two equal answers apart
        self._last: Dict[str, Any] = {}  # the episode stored last
        self._shown: Dict[str, Any] = {}
        self._state = bus.publisher(RECORD_STATE, m.STRING, LATCHED)
        for camera in robot.cameras:
            bus.subscribe(image_topic(camera), m.IMAGE, SENSOR, self._image_callback(camera))
        bus.subscribe(robot.driver.pose_topic, m.POSE, _deep(STATE), self._on_pose)
        bus.subscribe(robot.driver.joints_topic, m.JOINT_STATE, _deep(STATE), self._on_joints)
        bus.subscribe(EXECUTED, chunk_type(robot), _deep(STATE), self._on_executed)
        bus.subscribe(INSTRUCTION, m.STRING, LATCHED, self._on_instruction)
        bus.subscribe(GUARD_STATE, m.STRING, LATCHED, self._on_guard)
        bus.subscribe(RECORD, m.STRING, STATE, self._on_command)
        bus.timer(0.1, self._watch)
        self._show()

    def stop(self) -> None:
        """Leave; an episode that is being recorded is thrown away, those stored are sealed."""
        self.bus.shutdown()

    def close(self) -> None:
        """Seal what was stored and leave the graph."""
        if self._take is not None or self._frames is not None:
            self.bus.log("warning", "the unfinished episode was thrown away; stop it before leaving")
        try:
            self._seal()
        finally:
            self._sink.close()
            self.bus.close()

    # ---- topics

    def _image_callback(self, camera: str) -> Any:
        def on_image(message: Any) -> None:
            try:
                self._offer(camera, m.stamp_of(message), m.image_from_ros(message))
            except ValueError as e:
                self._end(f"E_IMAGE: camera {camera}: {e}")

        return on_image

    def _on_pose(self, message: Any) -> None:
        self._offer(TOOL_POSE, m.stamp_of(message), m.pose_from_ros(message))

    def _on_joints(self, message: Any) -> None:
        try:
            self._offer(JOINTS, m.stamp_of(message), m.joints_from_ros(message))
        except ValueError as e:
            self._end(f"E_JOINTS: {e}")

    def _offer(self, source: str, stamp: float, value: Any) -> None:
        if source not in self._sources():
            return
        self._latest[source] = (stamp, value)
        if self._take is not None:
            self._take.offer(source, stamp, value)

    def _sources(self) -> List[str]:
        return [*self.robot.cameras, *sources_of(self.robot)]

    def _on_executed(self, message: Any) -> None:
        if self._take is None:
            return
        try:
            self._take.step(m.executed_from_ros(message, self.robot.space.rotation))
        except (ValueError, IndexError) as e:
            self._end(f"E_VALUE: {EXECUTED}: {e}")

    def _on_instruction(self, message: Any) -> None:
        self._heard = message.data

    def _on_guard(self, message: Any) -> None:
        try:
            self._guard = m.json_from_ros(message)
        except ValueError as e:
            self.bus.log("error", f"{GUARD_STATE}: {e}")
            return
        if self._take is not None and self._take.frames and self._guard.get("state") in BROKEN:
            self._end(f"E_STOP: guard {self._guard['state']}: {self._guard.get('reason', '')}")

    # ---- orders

    def _on_command(self, message: Any) -> None:
        try:
            order = m.json_from_ros(message)
            command = order["command"]
            if command not in COMMANDS:
                raise ValueError(f"no command {command!r}; there are {', '.join(COMMANDS)}")
        except (ValueError, KeyError, TypeError) as e:
            self._say(f"refused: {e}")
            return
        getattr(self, f"_{command}")(order)

    def _start(self, order: Mapping[str, Any]) -> None:
        if self._take is not None or self._frames is not None:
            self._say(f"refused: {self._name()} is not stopped or discarded yet")
            return
        instruction = order.get("instruction") or self._heard or self._default
        if not isinstance(instruction, str) or not instruction.strip():
            self._say(f"refused: no instruction; give one with start, on {INSTRUCTION} or as instruction=...")
            return
        tag = order.get("tag", "")
        if tag and not (isinstance(tag, str) and TAG.fullmatch(tag)):
            self._say(f"refused: a tag is letters, digits, _ = . - in at most four parts, got {tag!r}")
            return
        self._instruction, self._tag = instruction, tag
        self._take = Take(self.robot.cameras, sources_of(self.robot), self._config)
        for source, (stamp, value) in self._latest.items():
            self._take.offer(source, stamp, value)
        self._say(f"{self._name()}: {instruction}")

    def _stop(self, order: Mapping[str, Any]) -> None:
        success = order.get("success")
        if success not in (True, False, None):
            self._say(f"refused: success is true, false or left out, got {success!r}")
            return
        if self._take is None and self._frames is None:
            self._say("refused: nothing is being recorded")
            return
        name, ended = self._name(), ""
        try:
            if self._frames is None:
                assert self._take is not None
                self._frames = self._take.finish(self._state_of, self._action_of)
            ended = self._take.ended if self._take is not None else ""
            source = source_of(self._session, self._number, self._frames.human, self._tag)
            self._sink.add(self._frames, self._instruction, success, source)
        except RecordError as e:  # nothing that could be stored, now or later
            self._forget()
            self._say(f"{name} not stored: {e}")
            return
        except (ValueError, OSError) as e:  # e.g. a full disk: the episode waits in memory for another stop
            self._say(f"{name} not stored yet: {e}; make room and stop again, or discard it")
            return
        report = dict(self._frames.report)
        self._last = {"source": source, "success": success, "ended": ended, **report}
        self._number += 1
        self._forget()
        self._say(f"{name} stored: {report['frames']} frames" + (f", ended early by {ended}" if ended else ""))

    def _discard(self, order: Mapping[str, Any]) -> None:
        if self._take is None and self._frames is None:
            self._say("refused: nothing is being recorded")
            return
        name = self._name()
        self._forget()
        self._say(f"{name} discarded")

    def _seal(self, order: Optional[Mapping[str, Any]] = None) -> None:
        try:
            segment = self._sink.seal()
        except (ValueError, OSError) as e:
            self._say(f"not sealed: {e}")
            return
        self._say(f"sealed {segment}" if segment else "nothing to seal")

    def _forget(self) -> None:
        self._take = self._frames = None

    def _name(self) -> str:
        return f"episode {self._number}"

    def _end(self, reason: str) -> None:
        if self._take is not None and not self._take.ended:
            self._take.end(reason)

    # ---- state

    def _watch(self) -> None:
        if self._take is not None and self._frames is None:
            self._take.watch(self.bus.now())
            if self._take.ended and self._take.ended not in self._reason:
                self._say(f"{self._name()} ended: {self._take.ended}; stop keeps its {self._take.frames} frames")
        self._show()

    def _say(self, reason: str) -> None:
        self._reason, self._said = reason, self._said + 1
        self.bus.log("warning" if "E_" in reason or "refused" in reason else "info", f"recorder: {reason}")
        self._show()

    def _show(self) -> None:
        take = self._take
        state = "idle"
        if self._frames is not None:
            state = "unstored"
        elif take is not None:
            state = "ended" if take.ended else "recording"
        shown = {
            "state": state,
            "reason": self._reason,
            "said": self._said,
            "frames": take.frames // 10 * 10 if take is not None else 0,
            "instruction": self._instruction if take is not None else "",
            "ended": take.ended if take is not None else "",
            "last": self._last,
            **self._sink.counts(),
        }
        if shown != self._shown:
            self._shown = shown
            self._state.publish(m.json_to_ros(self.bus.msg, shown))

    def _state_of(self, values: Mapping[str, Any]) -> np.ndarray:
        return state_of(self.robot, values)

    def _action_of(self, steps: Any, last: Any, values: Mapping[str, Any]) -> np.ndarray:
        needs = self.robot.motion.reference == "measured"
        return action_of(self.robot, steps, last, measured_of(self.robot, values) if needs else None)


def sources_of(robot: Robot) -> List[str]:
    """Return the topics that state and actions are made of."""
    kinds = [f.kind for f in robot.state]
    if robot.motion.reference == "measured":
        kinds += [robot.motion.kind]
    tool = any(kind.startswith("ee_") for kind in kinds)
    joints = any(not kind.startswith("ee_") for kind in kinds)
    return [TOOL_POSE] * tool + [JOINTS] * joints


def state_of(robot: Robot, values: Mapping[str, Any]) -> np.ndarray:
    """Return the state [s] from a tool pose (position, quaternion wxyz) and joints by name.

    Raises:
        RecordError: E_JOINTS: a name is missing; shows both lists.
    """
    parts = []
    for field in robot.state:
        if field.kind == "ee_position":
            parts.append(values[TOOL_POSE][0])
        elif field.kind.startswith("ee_rotation"):
            wxyz = values[TOOL_POSE][1]
            parts.append(columns_of(wxyz) if field.kind == "ee_rotation_6d" else logarithm(wxyz))
        else:
            parts.append(_by_name(values[JOINTS], joint_names(field), field.name))
    return np.concatenate(parts)


def measured_of(robot: Robot, values: Mapping[str, Any]) -> np.ndarray:
    """Return the measured configuration; raises as `state_of`."""
    if robot.space.name == "joint":
        return _by_name(values[JOINTS], robot.driver.joints, robot.motion.name)
    position, wxyz = values[TOOL_POSE]
    return np.concatenate([position, wxyz]) if robot.space.rotation else position


def _by_name(joints: Mapping[str, float], names: Sequence[str], what: str) -> np.ndarray:
    if set(names) - set(joints):
        raise RecordError(f"E_JOINTS: {JOINTS} has {', '.join(joints)}; {what} needs {', '.join(names)}")
    return np.array([joints[name] for name in names])


def _deep(qos: Qos) -> Qos:
    return Qos(qos.reliable, qos.latched, QUEUE, qos.lease_s)


class ZarrSink:
    """A store of dita: each episode is staged durably when it is added and readable once sealed."""

    def __init__(self, path: str, embodiment: str, source: str, licence: str, codec: Any, exist: Any) -> None:
        """Open or create it; see `dita.datasets.writer.StoreWriter.create` for what it raises."""
        from dita.datasets.writer import StoreWriter
        from dita.embodiment import load_embodiment

        self._spec = load_embodiment(embodiment)
        self._store = StoreWriter.create(
            path, self._spec, source=source, licence=licence, codec=codec, exist=exist, writer="recorder"
        )

    def add(self, frames: Frames, instruction: str, success: Optional[bool], source: str) -> None:
        """Stage an episode; raises as `StoreWriter.add`."""
        from dita.types import Episode

        self._store.add(
            Episode(
                images=frames.images,
                state=frames.state,
                action=frames.action,
                stamp=frames.stamp,
                instruction=instruction,
                success=success,
                source=source,
            )
        )

    def seal(self) -> Optional[str]:
        """Pack what is staged; raises as `StoreWriter.seal`."""
        return self._store.seal()

    def counts(self) -> Dict[str, int]:
        """Return how many episodes there are, and how many of them wait for sealing."""
        return {"episodes": len(self._store.sources()), "unsealed": len(self._store.staged_sources())}

    def close(self) -> None:
        """Release the lock."""
        self._store.close()


def run(
    *,
    bus: Mapping[str, Any],
    embodiment: str,
    store: str,
    instruction: str,
    codec: str,
    exist: str,
    image_gap: Optional[float] = None,
    state_gap: float,
    action_gap: float,
    max_seconds: float,
    max_memory: int,
) -> None:
    """Record until it is stopped.

    Args:
        bus: arguments of `open_bus`.
        embodiment: shipped name or YAML file.
        store: folder of the store.
        exist: what to do with a store that is there: "error", "resume" or "overwrite".
        image_gap: None: obs_dt, so that one lost picture ends no episode.
        instruction, codec: as in `RecorderNode` and `ZarrSink`.
        state_gap, action_gap, max_seconds: as in `RecorderConfig`.
        max_memory: of an episode's pictures [bytes].
    """
    from dita.embodiment import embodiment_to_dict, load_embodiment

    spec = load_embodiment(embodiment)
    robot = parse_robot(embodiment_to_dict(spec), need_limits=False)
    config = RecorderConfig(
        dt=1 / spec.control_hz,
        image_gap=spec.obs_dt if image_gap is None else image_gap,
        state_gap=state_gap,
        action_gap=action_gap,
        max_seconds=max_seconds,
        max_bytes=max_memory,
    )
    sink = ZarrSink(store, embodiment, f"live recording of {spec.name}", "unknown", codec, exist)
    opened = open_bus(name="recorder", **bus)
    session = time.strftime("%Y%m%dT%H%M%S", time.gmtime(opened.now()))
    serve(RecorderNode(opened, robot, sink, config, instruction=instruction, session=session))
