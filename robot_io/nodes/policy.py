"""The policy on a bus: observations from topics in, chunks onto topics out."""

import threading
from typing import Any, Callable, Dict, List, Mapping, Optional, Tuple

import numpy as np

from robot_io import messages as m
from robot_io.bus import COMMAND, LATCHED, SENSOR, STATE, Bus, Qos, open_bus
from robot_io.core.chunk_buffer import Chunk
from robot_io.core.diagnostics import Running
from robot_io.core.limits import Field, parse_robot
from robot_io.core.policy_loop import NEAR, PolicyLoop, Predictor, Range
from robot_io.core.space import logarithm, rotate
from robot_io.core.state_machine import State
from robot_io.core.stitching import SYNCHRONOUS, Stitcher
from robot_io.core.sync import FrozenCameras, Synchronizer
from robot_io.nodes.guard import contract_differences
from robot_io.nodes.serve import serve
from robot_io.nodes.topics import (
    BASE_FRAME,
    CHUNK,
    CHUNK_GRIPPER,
    CONTRACT,
    DIAGNOSTICS,
    EXECUTED,
    GUARD_STATE,
    HEARTBEAT,
    INSTRUCTION,
    NO_INSTRUCTION,
    POLICY_STATE,
    chunk_type,
    gripper_quantity,
    image_topic,
    joint_names,
)

HEARTBEAT_S = 0.03  # a third of the guard's shortest wait
CHECK_S = 0.02  # how often silence is looked for
CAMERA_FRAMES = 3  # that a camera may leave out, if that is longer than max_age
HUNG_S = 1.0  # that an inference may take before it is told
SAY_S = 5.0  # between two log lines of one kind
LEAVE_S = 2.0  # that the inference thread gets at the end
MEASURED = Qos(reliable=False, latched=False, depth=10, lease_s=None)  # a lost one must not keep others waiting
STATE_MARGIN, STATE_FRAMES = 0.25, 10  # outside the training data: a share of its range, observations in a row
ACTION_MARGIN, ACTION_STEPS = 1.0, 5


class PolicyNode:
    """Observations from topics into a policy, its chunks onto topics.

    While there is no valid observation the policy is not asked and /dita/policy_state says why, for the guard to hold.
    """

    def __init__(
        self,
        bus: Bus,
        policy: Predictor,
        embodiment: Mapping[str, Any],
        contract_hash: str,
        observation: Callable[..., Any],
        *,
        n_obs_steps: int,
        seed: int,
        slop: float,
        max_age: float,
        interval: float = 0.0,
        max_skew: float = 0.05,
        compressed: bool = False,
        stitching: Optional[Mapping[str, Any]] = None,
        state_range: Optional[Range] = None,
        action_range: Optional[Range] = None,
        about: Optional[Mapping[str, Any]] = None,
    ) -> None:
        """Join the graph.

        Args:
            embodiment: plain values, `dita.embodiment.embodiment_to_dict`.
            observation: builds what the policy takes, from images, state, instruction and stamp.
            n_obs_steps: frames in a history.
            slop: largest spread of stamps within an observation [s].
            max_age: oldest observation to act on [s].
            interval: least time between two predictions' observations [s], up to a quarter of obs_dt.
            max_skew: how far in the future a stamp may be, and how far the wall clock may step [s].
            compressed: whether images come as CompressedImage, on image_transport's topic.
            stitching: arguments of `Stitcher`; None: chunks go out as they are predicted.
            state_range: what training had, to warn of other states.
            action_range: what training had, to refuse other actions.
            about: the policy, for the contract's readers.
        """
        self.bus, self.robot, self._observation = bus, parse_robot(embodiment, need_limits=False), observation
        self.error: Optional[BaseException] = None
        self._stitcher = Stitcher(self.robot, **{"mode": "latency_compensated", **(stitching or {})}, interval=interval)
        self._lock = threading.Lock()  # of the stitcher: the bus's thread tells it what was sent
        self._state_range, self._action_range = state_range, action_range
        self._max_skew, self._silence = max_skew, max(CAMERA_FRAMES * self.robot.obs_dt, max_age)
        self._armed = False
        self._guard: Tuple[Any, ...] = ()
        self._instruction = ""
        self._problem: Optional[Tuple[str, str]] = ("nothing seen yet", "R2")  # and its reaction
        self._shown: Any = False  # nothing yet; None: that there is no problem
        self._refused: Dict[str, int] = {}  # why there was no observation -> how often
        self._reason = "nothing seen yet"  # why there is none now
        self._flushed = ""  # why all that was seen is forgotten, until something is seen again
        self._strange = ""  # state outside the training data
        self._failed = ""  # the last prediction, and why
        self._valid_at = -np.inf  # steady time of the last valid observation
        self._armed_at = -np.inf  # steady time; what was asked of it begins there
        self._offset = bus.now() - bus.steady()
        self._said: Dict[str, float] = {}
        self._id = 0
        self._cameras = {c["name"]: (c["height"], c["width"]) for c in embodiment["cameras"]}
        self._age, self._latency = Running(), Running()  # of an observation as inference begins, as its chunk is sent
        self._sync = Synchronizer(self.robot.cameras, self._sources(), slop, max_age, max_skew)
        self._frozen = FrozenCameras()
        self._loop = PolicyLoop(
            policy, n_obs_steps, self.robot.obs_dt, self._publish, self._fail, seed, bus.steady, self._prefix
        )
        self._contract = bus.publisher(CONTRACT, m.STRING, LATCHED)
        self._state = bus.publisher(POLICY_STATE, m.STRING, LATCHED)
        self._chunk = bus.publisher(CHUNK, chunk_type(self.robot), COMMAND)
        if self.robot.gripper is not None:
            self._chunk_gripper = bus.publisher(CHUNK_GRIPPER, m.JOINT_TRAJECTORY, COMMAND)
        self._diagnostics = bus.publisher(DIAGNOSTICS, m.DIAGNOSTICS, STATE)
        # states before images, which are paired with them
        if self.robot.driver.pose_topic in self._sources():
            self._subscribe(self.robot.driver.pose_topic, m.POSE, MEASURED, self._on_pose, urgent=False)
        if self.robot.driver.joints_topic in self._sources():
            self._subscribe(self.robot.driver.joints_topic, m.JOINT_STATE, MEASURED, self._on_joints, urgent=False)
        for camera in self.robot.cameras:
            if compressed:
                self._subscribe(f"{image_topic(camera)}/compressed", m.COMPRESSED_IMAGE, SENSOR, self._image(camera))
            else:
                self._subscribe(image_topic(camera), m.IMAGE, SENSOR, self._image(camera))
        self._subscribe(INSTRUCTION, m.STRING, LATCHED, self._on_instruction)
        self._subscribe(GUARD_STATE, m.STRING, LATCHED, self._on_guard)
        self._subscribe(EXECUTED, chunk_type(self.robot), STATE, self._on_executed, urgent=False)
        about = {**(about or {}), "mode": self._stitcher.mode}
        self._contract.publish(
            m.json_to_ros(bus.msg, {"embodiment": dict(embodiment), "hash": contract_hash, "policy": about})
        )
        heartbeat = bus.publisher(HEARTBEAT, m.STRING, STATE)
        bus.timer(HEARTBEAT_S, lambda: heartbeat.publish(bus.msg(m.STRING, data="policy")))
        bus.timer(CHECK_S, self._check)
        bus.timer(1.0, self._diagnose)
        self._loop.start()

    def stop(self) -> None:
        """End inference and leave."""
        self.bus.shutdown()

    def close(self) -> None:
        """End the inference thread, leave the graph, and raise what inference raised."""
        self._loop.stop(LEAVE_S)
        self.bus.close()
        if self.error is not None:
            raise self.error

    def _subscribe(self, topic: str, type: str, qos: Any, callback: Callable[[Any], None], urgent: bool = True) -> None:
        """Subscribe; a message that makes no sense is dropped, counted and said, whoever sends it."""

        def checked(message: Any) -> None:
            try:
                callback(message)
            except (ValueError, KeyError, TypeError, AttributeError, IndexError) as e:
                self._count(f"{topic}: {e}")
                self._reason = f"{topic}: {e}"
                self._say("error", topic, self._reason)

        self.bus.subscribe(topic, type, qos, checked, urgent)

    def _say(self, level: Any, kind: str, text: str) -> None:
        """Log, at most once in a while for each kind."""
        now = self.bus.steady()
        if now - self._said.get(kind, -np.inf) >= SAY_S:
            self._said[kind] = now
            self.bus.log(level, text)

    def _count(self, reason: str) -> None:
        self._refused[reason] = self._refused.get(reason, 0) + 1

    # ---- what it sees

    def _sources(self) -> List[str]:
        tool = any(_is_tool(f) for f in self.robot.state)
        joints = any(not _is_tool(f) for f in self.robot.state)
        return [self.robot.driver.pose_topic] * tool + [self.robot.driver.joints_topic] * joints

    def _image(self, camera: str) -> Callable[[Any], None]:
        def on_image(message: Any) -> None:
            size = self._cameras[camera]
            compressed = not hasattr(message, "encoding")
            image = m.compressed_from_ros(message, size) if compressed else m.image_from_ros(message, size)
            if self._offer(camera, m.stamp_of(message), image):
                self._frozen.take(camera, image, self._newest_state())
                self._observe()

        return on_image

    def _on_pose(self, message: Any) -> None:
        self._offer(self.robot.driver.pose_topic, m.stamp_of(message), m.pose_from_ros(message))

    def _on_joints(self, message: Any) -> None:
        joints = m.joints_from_ros(message)
        topic = self.robot.driver.joints_topic
        wanted = [name for f in self.robot.state if not _is_tool(f) for name in self._joint_names(f)]
        missing = [name for name in wanted if name not in joints]
        if missing and len(missing) == len(wanted):
            return  # another device's joints on the same topic
        if missing:
            raise ValueError(f"has {', '.join(joints)} but the policy needs {', '.join(missing)}")
        self._offer(topic, m.stamp_of(message), joints)

    def _offer(self, source: str, stamp: float, value: Any) -> bool:
        before = self._sync.flushes
        dropped = self._sync.offer(source, stamp, value, self.bus.now())
        if self._sync.flushes != before:
            self._forget(self._sync.flushed)
        if dropped is not None:
            self._reason = dropped
        return dropped is None

    def _forget(self, reason: str) -> None:
        """Act on nothing that was seen before: a clock jumped."""
        self._frozen.clear()
        self._flushed, self._valid_at = reason, -np.inf
        self._interrupt()
        self._check()

    def _interrupt(self) -> None:
        self._loop.clear()
        with self._lock:
            self._stitcher.clear()

    def _on_instruction(self, message: Any) -> None:
        self._instruction = str(message.data)

    def _on_guard(self, message: Any) -> None:
        values = m.json_from_ros(message)
        state, source, speed = values["state"], values.get("source", "policy"), values.get("speed", 1.0)
        armed = state in (State.ARMED, State.HOLDING)
        if (armed and not self._armed) or source != (self._guard or (None, source))[1]:
            self._loop.clear()
        if armed and not self._armed:
            self._armed_at = self.bus.steady()
        if (state, source, speed) != self._guard:
            with self._lock:  # what was planned is not what will be done
                self._stitcher.clear()
                self._stitcher.set_speed(float(speed))
        self._armed, self._guard = armed, (state, source, speed)

    def _on_executed(self, message: Any) -> None:
        step = m.executed_from_ros(message, self.robot.space.rotation)
        with self._lock:
            self._stitcher.on_executed(
                step.chunk + step.index * self.robot.action_dt, step.target, step.delta, step.gripper
            )

    def _observe(self) -> None:
        found, reason = self._sync.latest(self.bus.now())
        if found is None:
            self._count(reason)
            self._reason = reason
            return
        if self._frozen.reason() or self._sync.future():
            self._count(self._frozen.reason() or "stamped in the future")
            return
        self._valid_at, self._flushed = self.bus.steady(), ""
        stamp, values = found
        state = np.concatenate([self._field(f, values) for f in self.robot.state]).astype(np.float32)
        if not np.all(np.isfinite(state)):
            raise ValueError("a state that is not finite")
        if self._state_range is not None:
            self._strange = self._state_range.take(state)
            if self._strange:
                self._say("warning", "strange", f"outside the training data: {self._strange}")
        self._check()
        may_try = self._problem is None or self._problem[0] == self._failed  # a failed prediction is tried again
        if self._armed and may_try:
            images = {camera: values[camera] for camera in self.robot.cameras}
            self._loop.offer(self._observation(images, state, self._instruction, stamp))

    def _newest_state(self) -> Optional[np.ndarray]:
        values = {source: self._sync.newest(source) for source in self._sources()}
        if not values or any(value is None for value in values.values()):
            return None
        return np.concatenate([self._field(f, values) for f in self.robot.state])

    def _field(self, field: Field, values: Mapping[str, Any]) -> np.ndarray:
        if not _is_tool(field):
            return np.array([values[self.robot.driver.joints_topic][name] for name in self._joint_names(field)])
        position, quaternion = values[self.robot.driver.pose_topic]
        if field.kind == "ee_position":
            return position
        if field.kind == "ee_rotation_6d":
            return np.concatenate([rotate(quaternion, axis) for axis in np.eye(3)[:2]])
        return logarithm(quaternion)

    def _joint_names(self, field: Field) -> List[str]:
        joints = self.robot.driver.joints
        if field.kind == "joint_position" and len(joints) == field.size:
            return list(joints)
        return joint_names(field)

    # ---- whether it may act

    def _check(self) -> None:
        """Find what keeps the policy from acting, and say it when it changes."""
        jump = (self.bus.now() - self.bus.steady()) - self._offset
        if abs(jump) > self._max_skew:
            self._offset += jump
            self._sync.clear()
            self._forget(f"the wall clock jumped by {jump:.3f} s")
            return
        self._offset += 0.01 * jump  # a clock that is being slewed
        before, self._problem = self._problem, self._find_problem()
        if self._problem is not None and before is None:
            self._interrupt()
        if self._problem != self._shown:
            self._show()

    def _find_problem(self) -> Optional[Tuple[str, str]]:
        future, frozen = self._sync.future(), self._frozen.reason()
        if future:
            return future, "R3"
        if frozen:
            return frozen, "R2"
        since = self._valid_at if self._flushed else max(self._valid_at, self._armed_at)
        if self.bus.steady() - since > self._silence:
            silent = self._sync.latest(self.bus.now())[1]
            return f"no observation: {self._flushed or silent or self._reason}", "R2"
        if not self._instruction:
            return NO_INSTRUCTION, "R2"
        if self._failed:
            return self._failed, "R2"
        return None

    def _show(self) -> None:
        problem = self._shown = self._problem
        reason, reaction = problem or ("", "")
        self._state.publish(
            m.json_to_ros(self.bus.msg, {"ok": problem is None, "reason": reason, "reaction": reaction})
        )
        if problem is not None and self._armed:
            self._say("warning", reason.split(":")[0], reason)
        self._diagnose()

    def _diagnose(self) -> None:
        values: Dict[str, Any] = {"inferences": self._loop.inference.count, "failures": self._loop.failures}
        values.update(self._loop.inference.to_dict("execution_time"))
        values.update({**self._age.to_dict("observation_age"), **self._latency.to_dict("latency")})
        with self._lock:
            values.update(self._stitcher.to_dict())
            tight = self._stitcher.problem()
        busy = self._loop.busy()
        slow = f"an inference has been running for {busy:.1f} s" if busy > HUNG_S else ""
        strange = f"state outside the training data: {self._strange}" if self._strange else ""
        values.update({f"no observation: {reason}": n for reason, n in self._refused.items()})
        values.update({f"dropped: {reason}": n for reason, n in self._sync.counts.items()})
        for kind, text in (("tight", tight), ("slow", slow)):
            if text and self._armed:
                self._say("warning", kind, text)
        problem = self._problem[0] if self._problem is not None else ""
        text = "; ".join(t for t in (problem, slow, tight, strange) if t)
        level = 2 if problem or slow else 1 if text else 0
        self._diagnostics.publish(m.diagnostics_to_ros(self.bus.msg, self.bus.now(), "policy", level, text, values))

    # ---- in the inference thread

    def _prefix(self, stamp: float) -> Dict[str, Any]:
        self._age.add(self.bus.now() - stamp)
        with self._lock:
            committed = self._stitcher.committed(stamp)
        return {} if committed is None else {"committed": committed}

    def _publish(self, chunk: Any) -> float:
        """Send a prediction; return the earliest stamp of the next observation."""
        values = np.asarray(chunk.values, float)
        _check_values(values, self.robot.action_dim, self._action_range)
        now = self.bus.now()
        with self._lock:
            values, stamp = self._stitcher.stitch(values, chunk.stamp, now)
            self._id += 1
            gripper = values[:, self.robot.action_slice(self.robot.gripper)]
            closing = None if self.robot.gripper is None else gripper[:, 0]
            sent = Chunk(stamp, chunk.action_dt, self.robot.motion_of(values), closing, self._id)
            self._stitcher.published(sent, now)
        self._send(sent, gripper)
        self._latency.add(self.bus.now() - chunk.stamp)
        self._failed = ""
        with self._lock:
            self._stitcher.on_latency(now - chunk.stamp)
        # frames come a little before or after their time: waiting for the exact one would cost a whole period
        early = 0.0 if self._stitcher.mode == SYNCHRONOUS else NEAR * self.robot.obs_dt
        return self._stitcher.next_stamp(stamp, len(values)) - early

    def _send(self, chunk: Chunk, gripper: np.ndarray) -> None:
        msg, robot, delta = self.bus.msg, self.robot, self.robot.motion.mode == "delta"
        stamp, dt, id = chunk.stamp, chunk.dt, chunk.id
        if robot.gripper is not None:
            quantity = gripper_quantity(robot.gripper)
            self._chunk_gripper.publish(
                m.joint_chunk_to_ros(msg, stamp, dt, [robot.gripper.name], gripper, quantity, id)
            )
        if robot.space.name == "joint":
            quantity = "velocities" if delta else "positions"
            message = m.joint_chunk_to_ros(msg, stamp, dt, robot.driver.joints, chunk.motion, quantity, id)
        else:
            message = m.cartesian_chunk_to_ros(msg, stamp, dt, robot.motion.name, BASE_FRAME, chunk.motion, delta, id)
        self._chunk.publish(message)

    def _fail(self, error: BaseException, last: bool) -> None:
        """Tell of a prediction that failed; after several in a row the process ends with the last one's error."""
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        self._failed = f"the prediction failed: {kind}{' '.join(str(error).split())[:300]}"
        self.bus.log("error", self._failed)
        if last:
            self.error = error
            self.bus.shutdown()


def _is_tool(field: Field) -> bool:
    return field.kind.startswith("ee_")


def _check_values(values: np.ndarray, dims: int, known: Optional[Range]) -> None:
    """Refuse a chunk that no robot should see.

    Raises:
        ValueError: a value that is not finite, another number of dims, or actions that no training data had.
    """
    if values.ndim != 2 or values.shape[1] != dims or not len(values):
        raise ValueError(f"a chunk has shape {list(values.shape)}, the embodiment's actions have {dims} values")
    bad = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(bad):
        raise ValueError(f"the policy's action is not finite (first bad row {bad[0]})")
    if known is not None and not known.holds(values):
        known.clear()
        for row in values:
            strange = known.take(row)
            if strange:
                raise ValueError(f"actions outside the training data for more than {ACTION_STEPS} steps: {strange}")


def run(
    *,
    bus: Mapping[str, Any],
    checkpoint: str,
    embodiment: str,
    seed: int,
    num_inference_steps: Optional[int],
    device: str,
    precision: Any,
    path: Any,
    slop: float,
    max_age: float,
    interval: float,
    mode: str = "auto",
    n_action_steps: Optional[int] = None,
    max_skew: float = 0.05,
    compressed: bool = False,
) -> None:
    """Run a checkpoint's policy until it is stopped; other arguments as in `PolicyNode` and `Stitcher`.

    Args:
        embodiment: the robot's own file, or a shipped name; the checkpoint must be for just this robot.

    Raises:
        ValueError: it is for another one; names every field that differs.
    """
    import torch

    from dita.embodiment import embodiment_to_dict, load_embodiment
    from dita.policy.fast import PolicySession
    from dita.policy.policy import DitaPolicy
    from dita.types import RawObservation

    torch.set_num_threads(1)  # the guard and the twin need the other core
    model = DitaPolicy.from_pretrained(checkpoint, device, precision)
    own = load_embodiment(embodiment)
    name = model.embodiment_name(own.name)
    different = contract_differences(embodiment_to_dict(own), embodiment_to_dict(model.specs[name]))
    if different:
        raise ValueError(
            f"the checkpoint {checkpoint} is for another robot than {name}: {', '.join(different)}; load this robot's "
            f"checkpoint, or correct {embodiment}"
        )
    session = PolicySession(model, embodiment=name, num_inference_steps=num_inference_steps, path=path)
    state_range, action_range = ranges(model.contract, name)
    steps = n_action_steps or (None if interval else model.config.n_action_steps)  # as in evaluation
    node = PolicyNode(
        open_bus(name="policy", **bus),
        session,
        embodiment_to_dict(model.specs[name]),
        model.contract.hash_of(name),
        RawObservation,
        n_obs_steps=model.config.n_obs_steps,
        seed=seed,
        slop=slop,
        max_age=max_age,
        interval=interval,
        max_skew=max_skew,
        compressed=compressed,
        stitching={"mode": mode, "n_action_steps": steps, **stitching_of(model.config)},
        state_range=state_range,
        action_range=action_range,
        about={
            "checkpoint": checkpoint,
            "chunk_size": model.config.chunk_size,
            "n_obs_steps": model.config.n_obs_steps,
        },
    )
    serve(node)


def stitching_of(config: Any) -> Dict[str, Any]:
    """Return what a `Stitcher` must know of a `dita.config.PolicyConfig`."""
    slots, trained = config.past_action_slots + config.chunk_size, config.max_committed_slots
    return {
        "chunk_size": config.chunk_size,
        "past_slots": config.past_action_slots,
        "max_committed": trained or slots - 1,
        "trained": trained > 0,
    }


def ranges(contract: Any, embodiment: str) -> Tuple[Range, Optional[Range]]:
    """Return the training data's states and actions, from a checkpoint's contract; relative actions cannot be told."""
    spec, fields = contract.specs[embodiment], contract.stats[embodiment].fields

    def of(group: str, specs: Any) -> List[Tuple[str, Any, Any]]:
        return [(f.name, fields[f"{group}/{f.name}"].q01, fields[f"{group}/{f.name}"].q99) for f in specs]

    state = Range(of("state", spec.state), STATE_MARGIN, STATE_FRAMES)
    if contract.preprocess["actions"] == "relative":
        return state, None
    return state, Range(of("action", spec.action), ACTION_MARGIN, ACTION_STEPS)
