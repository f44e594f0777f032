"""The checklist before the first motion: reads, listens, replays training frames, and publishes a verdict.

It sends nothing to the arm, except with `move`, and then to the gripper only, while the guard is idle.
"""

import contextlib
import json
import os
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from robot_io import messages as m
from robot_io.bus import COMMAND, LATCHED, SENSOR, STATE, Bus, Qos, open_bus
from robot_io.core import preflight as checks
from robot_io.core.guard import GuardConfig
from robot_io.core.limits import Field, Robot, parse_robot
from robot_io.core.preflight import FAILED, LIMITS, OK, SKIPPED, WARNED, Heard, Item, Passage, Report
from robot_io.core.space import exponential, logarithm, quaternion_of_6d, rotate
from robot_io.nodes.guard import GuardNode, load_robot
from robot_io.nodes.topics import (
    ARM,
    BASE_FRAME,
    CONTRACT,
    GUARD_STATE,
    INSTRUCTION,
    PREFLIGHT,
    gripper_quantity,
    image_topic,
    joint_names,
)

SAMPLE = "preflight.safetensors"  # in a policy folder
WINDOWS_AND_ROWS = 11  # purpose of the random numbers that choose them
ROWS = 512  # of state and action, to compare statistics with
PICTURE_BYTES = 64 * 2**20  # kept per camera
SETTLE_S = 1.0  # until endpoints have found each other
LINGER_S = 2.0  # so that a latched verdict reaches a guard that is there
PATH_WAIT_S = 10.0  # for one window to come through; a first inference warms up
TRIES = 3
SAME_S = 1e-6  # what a stamp of today as float64 is good for, with a margin
GRIPPER_S = 1.5  # for a gripper to close or open
COLOURS = {OK: "green", FAILED: "bold red", WARNED: "yellow", SKIPPED: "dim"}


@dataclass(frozen=True, eq=False)
class Sample:
    """What preflight keeps of the training data."""

    windows: List[List[Any]]  # of RawObservation, each n_obs_steps long, obs_dt apart, oldest first
    state: np.ndarray  # [k s] rows spread over the episodes
    action: np.ndarray  # [k a] as training sees them; no rows where actions are trained relative to the state

    def pictures(self) -> Dict[str, np.ndarray]:
        """Return the frames by camera, uint8 [n h w 3]."""
        cameras = self.windows[0][-1].images
        return {c: np.stack([o.images[c] for window in self.windows for o in window]) for c in cameras}

    def states(self) -> np.ndarray:
        """Return the rows and the windows' states, [n s]."""
        return np.concatenate([np.stack([o.state for w in self.windows for o in w]), self.state])


def sample_stores(paths: Sequence[str], contract: Any, embodiment: str, windows: int, seed: int) -> Sample:
    """Choose windows and rows of training stores, half of the windows at the start of episodes.

    Raises:
        ValueError: a store's embodiment is not the contract's, or its episodes are shorter than a window.
        FileNotFoundError, StoreError: a store is missing or damaged.
    """
    from dita.datasets.dataset import iter_low_dim
    from dita.datasets.store import Store
    from dita.datasets.windows import strides
    from dita.types import RawObservation

    rng = np.random.default_rng([seed, WINDOWS_AND_ROWS])
    stores = [Store(path) for path in paths]
    spec = contract.specs[embodiment]
    for store in stores:
        contract.check_embodiment(store.spec)
    stride, frames = strides(spec)[0], contract.preprocess["n_obs_steps"]
    first = stride * (frames - 1)
    episodes = [(store, e) for store in stores for e in range(len(store.episodes)) if store.length(e) > first]
    if not episodes:
        raise ValueError(f"{', '.join(paths)}: no episode is longer than a window of {first + 1} frames")
    chosen = [episodes[i] for i in np.resize(rng.permutation(len(episodes)), windows)]
    made = []
    for i, (store, e) in enumerate(chosen):
        last = first if i % 2 == 0 else int(rng.integers(first, store.length(e)))
        steps = list(range(last - first, last + 1, stride))
        images = {c.name: store.read_frames(e, c.name, steps) for c in spec.cameras}
        state, words = store.state(e), store.episodes[e].instruction
        made.append(
            [RawObservation({c: x[j] for c, x in images.items()}, state[s], words, i * spec.obs_dt)
             for j, (s, i) in enumerate(zip(steps, range(frames), strict=True))]
        )  # fmt: skip
    low = [pair for store in stores for pair in iter_low_dim(store)]
    state, action = np.concatenate([s for s, _ in low]), np.concatenate([a for _, a in low])
    rows = np.sort(rng.permutation(len(state))[:ROWS])
    return Sample(made, state[rows], action[rows] if contract.preprocess["actions"] == "stored" else action[:0])


def save_sample(sample: Sample, folder: Path, contract_hash: str) -> Path:
    """Write a sample into a policy folder, so that a robot needs no store; return the file."""
    from safetensors.numpy import save_file

    tensors = {f"images/{c}": x for c, x in sample.pictures().items()}
    tensors["state"] = np.stack([[o.state for o in w] for w in sample.windows])
    tensors["stamp"] = np.array([[o.stamp for o in w] for w in sample.windows])
    tensors["rows/state"], tensors["rows/action"] = sample.state, sample.action
    words = json.dumps([w[-1].instruction for w in sample.windows])
    target = folder / SAMPLE
    partial = target.with_suffix(".partial")
    save_file(
        {k: np.ascontiguousarray(v) for k, v in tensors.items()},
        partial,
        {"contract": contract_hash, "instructions": words},
    )
    os.replace(partial, target)
    return target


def load_sample(path: Path, contract_hash: str) -> Sample:
    """Read a sample back.

    Raises:
        ValueError: not such a file, or of another contract.
    """
    from safetensors import SafetensorError, safe_open

    from dita.types import RawObservation

    try:
        with safe_open(path, "numpy") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as e:
        raise ValueError(f"{path} is no whole sample: {e}; write it again with preflight.save=true") from None
    if about.get("contract") != contract_hash:
        raise ValueError(
            f"{path} was made for contract {about.get('contract', '?')[:12]}, this is {contract_hash[:12]}"
        )
    k, frames = tensors["stamp"].shape
    cameras = {n[7:]: x.reshape(k, frames, *x.shape[1:]) for n, x in tensors.items() if n.startswith("images/")}
    words = json.loads(about["instructions"])
    windows = [
        [
            RawObservation({c: x[i, j] for c, x in cameras.items()}, tensors["state"][i, j], words[i], float(t))
            for j, t in enumerate(tensors["stamp"][i])
        ]
        for i in range(k)
    ]
    return Sample(windows, tensors["rows/state"], tensors["rows/action"])


# ---- listening


class Listener:
    """Hears everything that the policy and the guard would hear from this robot."""

    def __init__(self, bus: Bus, robot: Robot, sizes: Mapping[str, Tuple[int, int]]) -> None:
        """Subscribe.

        Args:
            sizes: height and width by camera.
        """
        self.bus, self.robot = bus, robot
        self.contract: Optional[Dict[str, Any]] = None  # what the running policy announces
        self.guard: Dict[str, Any] = {}  # the guard's state
        self.instruction: Optional[str] = None
        self._types: Dict[str, Tuple[str, Qos]] = {}
        self.cameras = {c: self._hear(image_topic(c), m.IMAGE, SENSOR, m.image_from_ros) for c in robot.cameras}
        for camera, heard in self.cameras.items():
            height, width = sizes[camera]
            heard.values = deque(maxlen=max(8, PICTURE_BYTES // (3 * height * width)))  # pyright: ignore
        self.pose: Optional[Heard] = None
        self.joints: Optional[Heard] = None
        joint_space = robot.space.name == "joint"  # then the guard needs the arm's joints, or else its pose
        if not joint_space or any(of_tool(f) for f in robot.state):
            self.pose = self._hear(robot.driver.pose_topic, m.POSE, STATE, m.pose_from_ros)
        if joint_space or any(not of_tool(f) for f in robot.state):
            self.joints = self._hear(robot.driver.joints_topic, m.JOINT_STATE, STATE, m.joints_from_ros)
        bus.subscribe(CONTRACT, m.STRING, LATCHED, self._on_contract)
        bus.subscribe(GUARD_STATE, m.STRING, LATCHED, self._on_guard)
        bus.subscribe(INSTRUCTION, m.STRING, LATCHED, self._on_instruction)

    def _hear(self, topic: str, type: str, qos: Qos, read: Callable[[Any], Any]) -> Heard:
        heard = Heard(topic, f"{type} ({qos})")
        self._types[topic] = (type, qos)

        def take(message: Any) -> None:
            arrival = self.bus.now()
            try:
                value = read(message)
            except ValueError as e:
                heard.problems[str(e)] += 1
                return
            heard.take(m.stamp_of(message), arrival, value)

        self.bus.subscribe(topic, type, qos, take)
        return heard

    def _on_contract(self, message: Any) -> None:
        self.contract = m.json_from_ros(message)

    def _on_guard(self, message: Any) -> None:
        self.guard = m.json_from_ros(message)

    def _on_instruction(self, message: Any) -> None:
        self.instruction = message.data

    @property
    def states(self) -> List[Heard]:
        """Return the streams of measured state."""
        return [heard for heard in (self.pose, self.joints) if heard is not None]

    @property
    def heard(self) -> List[Heard]:
        """Return every stream."""
        return [*self.cameras.values(), *self.states]

    def clear(self) -> None:
        """Forget what was heard so far."""
        for heard in self.heard:
            for part in (heard.stamps, heard.arrivals, heard.values, heard.problems):
                part.clear()

    def look_around(self) -> None:
        """Note who offers what."""
        for heard in self.heard:
            type, qos = self._types[heard.topic]
            heard.offers = [
                (w.node, f"{w.type} ({w.qos})", w.type == type and w.qos.satisfies(qos))
                for w in self.bus.writers(heard.topic)
            ]

    def state(self) -> np.ndarray:
        """Return the state vectors heard, [n s], each pose with the nearest joint state; empty where a part lacks."""
        none = np.zeros((0, sum(f.size for f in self.robot.state)))
        if not self.states or any(not heard.values for heard in self.states):
            return none
        pace, rows = self.states[0], []
        stamps = [np.array(heard.stamps) for heard in self.states]
        for stamp in pace.stamps:
            nearest = [h.values[int(np.argmin(np.abs(t - stamp)))] for h, t in zip(self.states, stamps, strict=True)]
            pose = nearest[0] if self.pose is not None else None
            try:
                rows.append(state_of(self.robot, pose, nearest[-1] if self.joints is not None else {}))
            except KeyError:  # a joint is missing: said by name elsewhere
                return none
        return np.stack(rows)


def of_tool(field: Field) -> bool:
    """Return whether a state field travels as the tool's pose."""
    return field.kind.startswith("ee_")


def names_of(robot: Robot, field: Field) -> List[str]:
    """Return the names under which a state field travels in joint states."""
    if field.kind == "joint_position" and len(robot.driver.joints) == field.size:
        return list(robot.driver.joints)
    return joint_names(field)


def state_of(robot: Robot, pose: Any, joints: Mapping[str, float]) -> np.ndarray:
    """Return the state vector of one instant, as the policy node makes it; KeyError where a joint is missing.

    Args:
        pose: of the tool: position and quaternion wxyz.
    """
    parts = []
    for f in robot.state:
        if f.kind == "ee_position":
            parts.append(pose[0])
        elif f.kind == "ee_rotation_6d":  # the first two columns of the matrix
            parts.append(np.concatenate([rotate(pose[1], axis) for axis in np.eye(3)[:2]]))
        elif of_tool(f):
            parts.append(logarithm(pose[1]))
        else:
            parts.append(np.array([joints[name] for name in names_of(robot, f)]))
    return np.concatenate(parts)


def wire_of(robot: Robot, state: np.ndarray) -> Tuple[np.ndarray, np.ndarray, Dict[str, float]]:
    """Return what a state travels as: tool position, quaternion wxyz, joints by name; inverts `state_of`."""
    position, quaternion, joints, start = np.zeros(3), np.array(m.IDENTITY), {}, 0
    for f in robot.state:
        values = np.asarray(state[start : start + f.size], float)
        start += f.size
        if f.kind == "ee_position":
            position = values
        elif f.kind == "ee_rotation_6d":
            quaternion = quaternion_of_6d(values)
        elif of_tool(f):
            quaternion = exponential(values)
        else:
            joints.update(zip(names_of(robot, f), values.tolist(), strict=True))
    return position, quaternion, joints


def heard_items(
    listener: Listener, spec: Mapping[str, Any], *, slop: float, max_age: float, state_timeout: float, max_skew: float
) -> List[Item]:
    """Judge the streams: presence, type and QoS, rates, stamps, spread, names, sizes, frozen content."""
    cameras, states = list(listener.cameras.values()), listener.states
    items = [item for heard in (*cameras, *states) for item in checks.topic_items(heard)]
    state = listener.state()
    for camera, heard in zip(spec["cameras"], cameras, strict=True):
        if heard.stamps:
            items += checks.stamp_items(heard, max_age, max_skew)
            items.append(checks.camera_rate_item(heard, spec["obs_dt"]))
            items += checks.image_format_items(heard, camera["height"], camera["width"])
            items += checks.frozen_items(heard, state)
    for heard in states:
        if heard.stamps:
            items += checks.stamp_items(heard, state_timeout, max_skew)
            items.append(checks.state_rate_item(heard, spec["control_hz"]))
    if listener.joints is not None:
        robot = listener.robot
        names = [*robot.driver.joints, *(n for f in robot.state if not of_tool(f) for n in names_of(robot, f))]
        known = [*names, *robot.driver.gripper_names]
        strict = robot.space.name == "joint"  # then the guard refuses joints that it does not know
        items += checks.joint_name_items(listener.joints, list(dict.fromkeys(names)), known, strict)
    if cameras:
        items.append(checks.spread_item(cameras, states, slop))
    return items


def value_items(
    live: np.ndarray,
    pictures: Mapping[str, np.ndarray],
    spec: Mapping[str, Any],
    stats: Mapping[str, Any],
    sample: Optional[Sample],
) -> List[Item]:
    """Judge what the state and the pictures say, against limits, statistics and training frames."""
    items: List[Item] = []
    if len(live):
        items += checks.state_items(spec, stats, live, None if sample is None else sample.states())
    if sample is None:
        text = "no training frames: give preflight.data, or write them into the policy folder with preflight.save=true"
        return [*items, Item("pictures", SKIPPED, text)]
    sizes = {c["name"]: (c["height"], c["width"]) for c in spec["cameras"]}
    whole = {c: x for c, x in pictures.items() if len(x) and x.shape[1:3] == sizes[c]}
    return [*items, *checks.image_items(whole, sample.pictures())]


# ---- the whole path, on a domain of its own


class Noted:
    """A predictor that notes what it was asked and what it said."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.calls: List[Tuple[List[Any], int, Any]] = []  # history, seed, chunk

    def predict(self, history: Any, *, seed: int) -> Any:
        """Predict, and note it."""
        chunk = self.policy.predict(history, seed=seed)
        self.calls.append((list(history), seed, chunk))
        return chunk


class Replay:
    """Training frames over real topics, through policy and guard nodes, on a domain where no arm listens."""

    def __init__(self, model: Any, name: str, file: Any, bus: Mapping[str, Any], **options: Any) -> None:
        """Join the domain.

        Args:
            model: a DitaPolicy.
            name: of the embodiment.
            file: this robot's own embodiment file, with limits.
            bus: arguments of `open_bus`, with a domain of its own.
            options: num_inference_steps and path of the session; slop; tick_hz, max_skew, clamp_margin of the guard.
        """
        from dita.embodiment import embodiment_to_dict
        from dita.policy.fast import PolicySession
        from dita.types import RawObservation
        from robot_io.nodes.policy import PolicyNode

        self.model, self.name, self.steps = model, name, options["num_inference_steps"]
        self.spec = model.specs[self.name]
        self.policy_bus, self.guard_bus = open_bus(name="replay_policy", **bus), open_bus(name="replay_guard", **bus)
        self.arm = open_bus(name="replay_arm", **bus)
        session = PolicySession(model, embodiment=name, num_inference_steps=self.steps, path=options["path"])
        self.noted = Noted(session)
        patient = {"state_timeout": PATH_WAIT_S, "stream_timeout": PATH_WAIT_S, "hold_timeout": PATH_WAIT_S}
        config = GuardConfig(1 / options["tick_hz"], **patient, **{k: options[k] for k in ("max_skew", "clamp_margin")})
        self.guard = GuardNode(self.guard_bus, config, file, require_preflight=False)
        self.robot = self.guard.robot
        self._take, self.guard.guard.on_chunk = self.guard.guard.on_chunk, self._on_chunk
        self._chunks: List[Tuple[Any, Optional[str]]] = []  # as the guard read them, and what it had against them
        self._images = {c: self.arm.publisher(image_topic(c), m.IMAGE, SENSOR) for c in self.robot.cameras}
        self._pose = self.arm.publisher(self.robot.driver.pose_topic, m.POSE, STATE)
        self._joints = self.arm.publisher(self.robot.driver.joints_topic, m.JOINT_STATE, STATE)
        self._words = self.arm.publisher(INSTRUCTION, m.STRING, LATCHED)
        self._arm = self.arm.publisher(ARM, m.BOOL, STATE)
        self.policy = PolicyNode(
            self.policy_bus,
            self.noted,
            embodiment_to_dict(self.spec),
            model.contract.hash_of(self.name),
            RawObservation,
            n_obs_steps=model.config.n_obs_steps,
            seed=0,
            slop=options["slop"],
            max_age=PATH_WAIT_S,  # ages are judged where the arm is
            interval=0.0,
        )
        self._ticking = threading.Thread(target=self.guard_bus.spin, name="guard", daemon=True)
        self._ticking.start()
        self._spin(SETTLE_S)

    def close(self) -> None:
        """Leave the domain; raises what inference raised."""
        self.arm.close()
        self.guard_bus.shutdown()
        self._ticking.join()
        self.guard.close()
        self.policy.stop()
        self.policy.close()

    def _on_chunk(self, chunk: Any, now: float) -> Optional[str]:
        problem = self._take(chunk, now)
        self._chunks.append((chunk, problem))
        return problem

    def _spin(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self.policy_bus.spin(0.005)

    def _until(self, condition: Callable[[], bool], seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not condition() and time.monotonic() < end:
            self._spin(0.005)
        return condition()

    def window(self, window: Sequence[Any]) -> Passage:
        """Send one window through and compare what came out; a machine that is busy gets three tries."""
        self._words.publish(self.arm.msg(m.STRING, data=window[-1].instruction))
        passage = Passage()
        for _ in range(TRIES):
            passage = self._try(window)
            if not passage.lost and not passage.refused:
                break
        return passage

    def _try(self, window: Sequence[Any]) -> Passage:
        self._arm.publish(self.arm.msg(m.BOOL, data=False))
        self._until(lambda: self.guard.guard.state == "IDLE" and not self.guard.guard.tracker.moving, 5.0)
        self._chunks.clear()
        self.noted.calls.clear()
        for _ in range(3):
            self._send_state(self.arm.now(), window[0].state)
            self._spin(0.02)
        self._arm.publish(self.arm.msg(m.BOOL, data=True))
        if not self._until(lambda: self.guard.guard.state in ("ARMED", "HOLDING"), 2.0):
            return Passage(lost=f"the guard refused to arm at a training pose: {self.guard.refused or 'no answer'}")
        self._spin(0.05)  # until the policy has heard of it
        last = self._send(window)
        came = self._until(
            lambda: self._found(len(window), last) is not None or self.policy.error is not None, PATH_WAIT_S
        )
        if self.policy.error is not None:
            return Passage(lost=f"inference failed: {self.policy.error}")
        if not came:
            return Passage(lost=f"nothing came through within {PATH_WAIT_S:g} s")
        return self._compare(window, *self._found(len(window), last))

    def _send(self, window: Sequence[Any]) -> float:
        """Publish a window's frames at the camera's pace; return the last stamp."""
        begin, stamp = self.arm.now() + 0.02, 0.0
        for i, frame in enumerate(window):
            stamp = round(begin + i * self.spec.obs_dt, 6)
            self._spin(max(0.0, stamp - self.arm.now()))
            self._send_state(stamp, frame.state)
            self._spin(0.01)  # an image is paired with the state that is there by then
            for camera, publisher in self._images.items():
                publisher.publish(m.image_to_ros(self.arm.msg, stamp, frame.images[camera], camera))
        return stamp

    def _send_state(self, stamp: float, state: np.ndarray) -> None:
        position, quaternion, joints = wire_of(self.robot, state)
        self._pose.publish(m.pose_to_ros(self.arm.msg, stamp, position, BASE_FRAME, quaternion))
        self._joints.publish(m.joints_to_ros(self.arm.msg, stamp, joints))

    def _found(self, frames: int, stamp: float) -> Any:
        """Return (history, seed, chunk, what the guard had against it) of the whole window, once they are there."""
        calls = [c for c in self.noted.calls if len(c[0]) == frames and abs(c[0][-1].stamp - stamp) < SAME_S]
        chunks = [c for c in self._chunks if abs(c[0].stamp - stamp) < SAME_S]
        return (*calls[0][:2], *chunks[0]) if calls and chunks else None

    def _compare(self, window: Sequence[Any], history: Sequence[Any], seed: int, chunk: Any, problem: Any) -> Passage:
        model, name, robot = self.model, self.name, self.robot
        offline = model.predict(window, seed=seed, embodiment=name, num_inference_steps=self.steps)
        seen, meant = (model.preprocessor.observe([model.preprocessor.window(w, name)]) for w in (history, window))
        observation = max(
            float((getattr(seen, part).double() - getattr(meant, part).double()).abs().max())
            for part in ("images", "image_valid", "state", "state_valid", "language", "language_valid", "embodiment")
            if getattr(seen, part).numel()
        )
        n = len(offline.values)  # before them there may be steps of rest
        apart = [np.abs(chunk.motion[-n:] - robot.motion_of(np.asarray(offline.values, float))).max()]
        if robot.gripper is not None:
            grip = offline.values[:, robot.action_slice(robot.gripper)][:, 0]
            apart.append(np.abs(chunk.gripper[-n:] - grip).max())
        return Passage(observation, float(max(apart)), problem or "")


# ---- the gripper


def try_gripper(listener: Listener, bus: Mapping[str, Any]) -> Item:
    """Close the gripper, open it, and say whether it went the way it was told.

    Only while the guard sends nothing; the writer leaves again, so that it is no second commander afterwards.
    """
    name, robot = "gripper direction", listener.robot
    measured = [f for f in robot.state if f.kind.startswith("gripper_")]
    if robot.gripper is None or not measured or listener.joints is None:
        return Item(name, SKIPPED, "this embodiment has no gripper that is both commanded and measured")
    if listener.guard.get("state", "IDLE") != "IDLE":
        return Item(name, FAILED, f"the guard is {listener.guard['state']}: disarm it before the gripper is tried")
    joint, driver = joint_names(measured[0])[0], robot.driver
    hand = open_bus(name="preflight_gripper", **bus)
    by_command = driver.gripper == "gripper_command"
    publisher = hand.publisher(driver.gripper_topic, m.GRIPPER_COMMAND if by_command else m.JOINT_TRAJECTORY, COMMAND)
    hand.spin(SETTLE_S)
    seen = []
    for end_of_range in (robot.gripper.low, robot.gripper.high):  # 1 is open, so the low end closes
        value, end = float(end_of_range[0]), time.monotonic() + GRIPPER_S / bus.get("rate", 1.0)
        while time.monotonic() < end:
            quantity = gripper_quantity(robot.gripper)
            publisher.publish(
                m.gripper_command_to_ros(hand.msg, value)
                if by_command
                else m.gripper_to_ros(hand.msg, hand.now(), driver.gripper_names, value, quantity, robot.action_dt)
            )
            listener.bus.spin(0.1)
        seen.append(listener.joints.values[-1].get(joint, np.nan) if listener.joints.values else np.nan)
    hand.close()
    return checks.gripper_item(joint, *seen)


# ---- the whole list


def run(
    *,
    bus: Mapping[str, Any],
    checkpoint: str,
    embodiment: str,
    data: Sequence[str],
    save: bool,
    windows: int,
    listen: float,
    replay: bool,
    replay_domain: int,
    move: bool,
    stay: bool,
    out: str,
    seed: int,
    slop: float,
    max_age: float,
    state_timeout: float,
    max_skew: float,
    tick_hz: float,
    clamp_margin: float,
    num_inference_steps: Optional[int],
    device: str,
    precision: Any,
    path: Any,
) -> Dict[str, Any]:
    """Go through the checklist, print it, write it and publish it; return the report.

    Args:
        bus: arguments of `open_bus`.
        checkpoint: run, checkpoint or policy folder.
        embodiment: the robot's own file, or a shipped name.
        data: training stores, for frames to compare with; empty: the sample in the policy folder, if there is one.
        save: write that sample, from `data`.
        windows: training windows to look at and to replay.
        listen: how long to listen [s].
        replay: whether windows go through the whole path, on domain `replay_domain`.
        move: whether the gripper may be closed and opened.
        stay: keep the verdict on the graph until Ctrl-C, for a guard that starts later.
        out: folder; gets preflight.json.
        seed: of the choice of windows.
        slop: largest spread of stamps in an observation [s].
        max_age: of pictures on arrival [s].
        state_timeout: of measured state on arrival [s].
        max_skew: stamps ahead of this host's clock [s]; of the guard, as tick_hz and clamp_margin.
        num_inference_steps: as for the policy; so are device, precision and path.

    Raises:
        ValueError: something failed, named by mistake and item; or checkpoint or data cannot be read.
    """
    import torch

    from dita.embodiment import embodiment_file, embodiment_to_dict, load_embodiment
    from dita.normalize import stats_to_dict
    from dita.policy.policy import DitaPolicy

    torch.set_num_threads(1)  # as the policy
    own = load_embodiment(embodiment)
    model = DitaPolicy.from_pretrained(checkpoint, device, precision)
    contract, values = model.contract, embodiment_to_dict(own)
    known = own.name in contract.specs
    report = Report(own.name, contract.hash_of(own.name) if known else "")
    report.items += checks.embodiment_items(contract.to_dict(), values)
    file = embodiment_file(embodiment)
    report.items.append(limits_item(file))
    guarded = report.items[-1].verdict == OK
    node = open_bus(name="preflight", **bus)
    verdict = node.publisher(PREFLIGHT, m.STRING, LATCHED)
    if known:
        spec, stats = embodiment_to_dict(contract.specs[own.name]), stats_to_dict(contract.stats[own.name])
        report.items += checks.statistics_items(spec, stats)
        sample = read_sample(model, own.name, checkpoint, data, save, windows, seed, report.contract)
        if sample is not None:
            report.items += checks.fitted_items(spec, stats, sample.state, sample.action)
        listener = Listener(
            node, parse_robot(values, need_limits=False), {c.name: (c.height, c.width) for c in own.cameras}
        )
        for seconds, what in ((SETTLE_S, listener.clear), (listen, listener.look_around)):
            node.spin(seconds / bus.get("rate", 1.0))
            what()
        bounds = {"slop": slop, "max_age": max_age, "state_timeout": state_timeout, "max_skew": max_skew}
        report.items.append(checks.announced_item(report.contract, listener.contract, CONTRACT))
        report.items += heard_items(listener, spec, **bounds)
        pictures = {c: np.stack(h.values) if _same_size(h.values) else np.zeros((0, 1, 1, 3), np.uint8)
                    for c, h in listener.cameras.items()}  # fmt: skip
        report.items += value_items(listener.state(), pictures, spec, stats, sample)
        words = [] if sample is None else sorted({w[-1].instruction for w in sample.windows})
        report.items.append(checks.instruction_item(listener.instruction, words))
        driver = listener.robot.driver
        topics = [driver.command_topic, *([driver.gripper_topic] if listener.robot.gripper is not None else [])]
        report.items += [checks.writer_item(t, [w.node for w in node.writers(t) if w.node != "guard"]) for t in topics]
        options = {"num_inference_steps": num_inference_steps, "path": path, "slop": slop}
        options.update(tick_hz=tick_hz, max_skew=max_skew, clamp_margin=clamp_margin)
        domain = {**bus, "domain_id": replay_domain}
        if replay and guarded:
            report.items += path_items(model, own.name, file, sample, domain, options)
        report.items.append(
            try_gripper(listener, bus)
            if move
            else Item("gripper direction", SKIPPED, "not tried; preflight.move=true closes and opens the gripper")
        )
    result = report.to_dict()
    verdict.publish(m.json_to_ros(node.msg, result))
    show(report)
    write(Path(out) / "preflight.json", result)
    try:
        node.spin(None if stay else LINGER_S)
    except KeyboardInterrupt:
        pass
    finally:
        node.close()
    if not report.passed:
        failed = [i.name for i in report.items if i.verdict == FAILED]
        raise ValueError(f"preflight failed: {', '.join(report.mistakes) or 'see above'} ({', '.join(failed)})")
    return result


def limits_item(file: Union[Path, Mapping[str, Any]]) -> Item:
    """Check that the guard can work with this robot's file: limits are there for everything it commands."""
    try:
        load_robot(file)
    except (ValueError, OSError) as e:
        return Item("limits", FAILED, str(e), LIMITS)
    return Item("limits", OK, "there for everything that the guard commands")


def read_sample(
    model: Any,
    embodiment: str,
    checkpoint: str,
    data: Sequence[str],
    save: bool,
    windows: int,
    seed: int,
    contract_hash: str,
) -> Optional[Sample]:
    """Return training frames from stores, or from the policy folder; None where there are none."""
    from dita.checkpoint import find_policy

    folder = find_policy(Path(checkpoint))
    if not data:
        return load_sample(folder / SAMPLE, contract_hash) if (folder / SAMPLE).is_file() else None
    sample = sample_stores(data, model.contract, embodiment, windows, seed)
    if save:
        save_sample(sample, folder, contract_hash)
    return sample


def path_items(
    model: Any, name: str, file: Path, sample: Optional[Sample], bus: Mapping[str, Any], options: Mapping[str, Any]
) -> List[Item]:
    """Send the sample's windows through the whole path, with a bar."""
    from rich.progress import track

    if sample is None:
        return [Item("path", SKIPPED, "no training frames to send through")]
    with contextlib.closing(Replay(model, name, file, bus, **options)) as replay:
        return checks.path_items([replay.window(w) for w in track(sample.windows, "replay", transient=True)])


def show(report: Report) -> None:
    """Print the checklist."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"preflight of {report.embodiment}, contract {report.contract[:12] or 'none'}")
    for column in ("item", "verdict", "mistake", "what was found"):
        table.add_column(column, overflow="fold")
    for item in report.items:
        table.add_row(item.name, f"[{COLOURS[item.verdict]}]{item.verdict}[/]", item.mistake, escape(item.text))
    console = Console()
    console.print(table)
    console.print(f"preflight {'passed' if report.passed else 'FAILED'}")


def write(target: Path, result: Mapping[str, Any]) -> None:
    """Write the report in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=target.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        json.dump(result, file, indent=1, allow_nan=False)
    os.replace(file.name, target)


def _same_size(pictures: Sequence[np.ndarray]) -> bool:
    return bool(pictures) and len({x.shape for x in pictures}) == 1
