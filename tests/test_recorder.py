"""Topics -> episodes: the pure grid, the node with its topics by hand, and demonstrations over a real wire."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from fake_robot import EMBODIMENT, GOAL, field
from hypothesis import given, settings
from hypothesis import strategies as st

from dita.cli import main
from dita.config import LiveConfig, from_dict
from dita.datasets.store import Store
from robot_io import messages as m
from robot_io.bus_dds import message
from robot_io.core.limits import parse_robot
from robot_io.core.recorder import (
    RecorderConfig,
    RecordError,
    Take,
    action_of,
    check_recordable,
    columns_of,
    delta_between,
    human_steps,
    source_of,
)
from robot_io.core.space import exponential, logarithm, multiply, rotate
from robot_io.messages import ExecutedStep
from robot_io.nodes.recorder import RecorderNode, ZarrSink, state_of
from robot_io.nodes.topics import EXECUTED, GUARD_STATE, INSTRUCTION, RECORD, RECORD_STATE, image_topic
from robot_io.record import record

HERE = Path(__file__).parent

DT = 0.0125
T0 = 100.0
VALUES = {"dt": DT, "image_gap": 0.055, "state_gap": 0.033, "action_gap": 0.1, "max_seconds": 2.0, "max_bytes": 10**7}
CONFIG = RecorderConfig(**VALUES)


def step(k, target=(0, 0, 0), delta=(0, 0, 0), source="teleop", gripper=1.0):
    stamp = T0 + k * DT
    return ExecutedStep(T0, 1, 0, stamp, np.array(target, float), np.array(delta, float), source, gripper)


def picture(value):
    return np.full((2, 3, 3), value, np.uint8)


def feed(take, frames, lost=()):
    """Give a take what a twin gives: states at every step, pictures at every fourth."""
    for k in range(frames):
        take.offer("state", T0 + k * DT, np.array([k, 0.0]))
        if k % 4 == 0 and k not in lost:
            take.offer("cam", T0 + k * DT, picture(k))
        take.step(step(k, target=(k + 1, 0, 0), delta=(1, 0, 0)))
    return take


def new():
    return Take(["cam"], ["state"], CONFIG)


def finish(take):
    return take.finish(lambda v: v["state"], lambda steps, last, v: np.array([len(steps), last.target[0]]))


# ---- the grid


def test_frames_take_the_nearest_samples_and_say_how_far_off_they_are():
    take = feed(new(), 9)
    frames = finish(take)
    assert frames.stamp.tolist() == [T0 + k * DT for k in range(9)]
    assert frames.state[:, 0].tolist() == list(range(9))
    # the earlier of two equally near pictures: frame 2 still shows picture 0
    assert frames.images["cam"][:, 0, 0, 0].tolist() == [0, 0, 0, 4, 4, 4, 4, 8, 8]
    assert frames.action.tolist() == [[1, k + 1] for k in range(9)]
    assert frames.report["cam off by at most [s]"] == pytest.approx(2 * DT)
    assert frames.report["state off by at most [s]"] == pytest.approx(0, abs=1e-9)
    assert frames.human.all() and take.ended == ""


def test_one_lost_picture_is_bridged_and_three_end_the_episode_with_a_code():
    take = feed(new(), 17, lost={8})
    assert len(finish(take).stamp) == 17 and take.ended == ""
    take = feed(new(), 18, lost={8, 12, 16})
    frames = finish(take)
    assert len(frames.stamp) == 9 and take.ended.startswith("E_GAP: cam is 0.06"), "too long for the end of an episode"
    take = feed(new(), 11, lost={4, 8})
    frames = finish(take)
    assert len(frames.stamp) == 5 and take.ended == "", "what had not arrived yet is no fault"
    assert frames.report["last frames without a picture or state"] == 6
    take = feed(new(), 25, lost={8, 12, 16})
    frames = finish(take)
    assert len(frames.stamp) == 9 and frames.state[-1, 0] == 8
    assert take.ended.startswith("E_GAP: cam is 0.06")
    assert take.ended.endswith("away from frame 9")


def test_steps_that_were_not_sent_are_frames_in_which_nothing_new_was_and_two_in_one_are_both_kept():
    take = new()
    for k in range(6):
        take.offer("state", T0 + k * DT, np.array([k, 0.0]))
        take.offer("cam", T0 + k * DT, picture(k))
    for k in (0, 1, 3.4, 4.1, 4.9):  # nothing within half a step of 2, two around 4 .. 5
        take.step(step(k, target=(k, 0, 0)))
    frames = finish(take)
    np.testing.assert_allclose(frames.action, [[1, 0], [1, 1], [0, 1], [1, 3.4], [1, 4.1], [1, 4.9]], rtol=1e-6)
    assert frames.report["frames in which nothing new was sent"] == 1
    assert frames.report["frames with two steps"] == 0
    take = new()
    take.offer("state", T0, np.zeros(2))
    take.offer("cam", T0, picture(0))
    for k in (0, 0.7, 1.3):
        take.step(step(k))
    frames = finish(take)
    assert frames.action[:, 0].tolist() == [1, 2] and frames.report["frames with two steps"] == 1


@pytest.mark.parametrize(
    ("spoil", "ended"),
    [
        (lambda t: t.step(step(20)), r"E_GAP: no step was executed for 0\.1[12]"),
        (lambda t: t.step(step(5)), r"E_STAMP: executed steps went back"),
        (lambda t: t.offer("state", T0, np.zeros(2)), r"E_STAMP: state went back"),
        (lambda t: t.step(step(11, delta=(np.nan, 0, 0))), r"E_VALUE: an executed step that is not finite"),
        (lambda t: t.watch(T0 + 10 * DT + 0.2), r"E_GAP: no step was executed for 0\.2"),
        (lambda t: [t.step(step(k)) for k in range(11, 170)], r"E_LENGTH: longer than 2 s"),
        (
            lambda t: t.offer("cam", T0 + 1, np.zeros((2000, 2000, 3), np.uint8)),
            r"E_LENGTH: pictures of more than 10 MiB",
        ),
    ],
)
def test_what_breaks_an_episode_ends_it_with_a_code_and_keeps_the_frames_before(spoil, ended):
    take = feed(new(), 11)
    spoil(take)
    assert re.match(ended, take.ended), take.ended
    before = take.frames
    take.step(step(500))
    assert take.frames == before, "nothing is taken after the end"
    assert len(finish(take).stamp) >= 11


def test_a_silent_camera_is_noticed_while_it_happens():
    take = new()
    for k in range(30):
        take.offer("state", T0 + k * DT, np.zeros(2))
        take.step(step(k))
        if k == 0:
            take.offer("cam", T0, picture(0))
        take.watch(T0 + k * DT)
    assert take.ended.startswith("E_GAP: cam sent nothing for 0.1")


def test_nothing_executed_or_nothing_seen_is_no_episode():
    with pytest.raises(RecordError, match=r"E_EMPTY: the guard executed nothing"):
        finish(new())
    take = new()
    take.step(step(0))
    with pytest.raises(RecordError, match="E_GAP: nothing came from cam, state"):
        finish(take)
    take.offer("cam", T0 - 10, picture(0))
    take.offer("state", T0, np.zeros(2))
    with pytest.raises(RecordError, match=r"E_GAP: cam is 10\.000 s away from frame 0; not one whole frame"):
        finish(take)


def test_what_came_before_the_first_step_does_not_pile_up():
    take = new()
    for k in range(1000):
        take.offer("cam", T0 + k, np.zeros((200, 200, 3), np.uint8))
    assert take.ended == "" and len(take._samples["cam"]) == 2


def test_recorder_config_refuses_what_is_no_time():
    with pytest.raises(ValueError, match="recorder: image_gap must be positive, got 0"):
        RecorderConfig(**{**VALUES, "image_gap": 0})


# ---- whose steps


@given(st.lists(st.booleans(), min_size=1, max_size=60))
def test_a_source_says_which_steps_were_a_humans(human):
    source = source_of("20261126T200000", 3, np.array(human))
    assert source.startswith("live/20261126T200000/0003/human=")
    assert human_steps(source, len(human)).tolist() == human


def test_sources_of_interventions_read_as_one_expects():
    human = np.zeros(500, bool)
    human[10:20] = human[100:101] = True
    assert source_of("s", 0, human) == "live/s/0000/human=10-20,100-101"
    assert human_steps("metaworld/reach-v3/seed=1", 5) is None
    assert human_steps("live/s/0000/human=", 3).tolist() == [False] * 3


# ---- actions


def embodiment(action, state=()):
    base = {k: v for k, v in EMBODIMENT.items() if k not in ("action", "state")}
    return {**base, "action": action, "state": list(state) or EMBODIMENT["state"]}


def rotation_field(kind, frame, reference):
    size = 6 if kind == "ee_rotation_6d" else 3
    return {**field("turn", kind, size, -4, 4, reference), "unit": "rad", "frame": frame}


def make(kind, frame, reference, gripper=True):
    position = {**field("hand", "ee_position", 3, -1, 1, reference), "frame": frame}
    action = [position]
    if kind:
        action.append(rotation_field(kind, frame, reference))
    if gripper:
        action.append(field("effort", "gripper_effort", 1, -1, 1))
    return parse_robot(embodiment(action), need_limits=False)


vectors = st.lists(st.floats(-1, 1), min_size=3, max_size=3).map(np.array)


@settings(max_examples=50)
@given(
    vectors, vectors, vectors, vectors, st.sampled_from(["base", "tool"]), st.sampled_from(["commanded", "measured"])
)
def test_deltas_lead_where_the_guard_went(position, turn, moved, turned, frame, reference):
    robot = make("ee_rotation_axis_angle", frame, reference)
    before = np.concatenate([position, exponential(turn)])
    delta = np.concatenate([moved, turned])
    after = robot.space.retract(before, delta)
    sent = ExecutedStep(0.0, 1, 0, 0.0, after, delta, "policy", -1.0)
    action = action_of(robot, [sent], sent, before)
    np.testing.assert_allclose(robot.space.delta(before, action[:6]), after, atol=1e-7)
    assert action[6] == -1.0
    if frame == "base" and np.linalg.norm(turned) < 3:
        np.testing.assert_allclose(action[:6], delta, atol=1e-7)


def test_two_steps_in_a_frame_are_composed_and_none_is_no_motion():
    robot = make("ee_rotation_axis_angle", "base", "commanded")
    start = np.array([0, 0, 0, 1.0, 0, 0, 0])
    first, second = np.array([0.1, 0, 0, 0.3, 0, 0]), np.array([0, 0.2, 0, 0, 0.4, 0])
    middle = robot.space.retract(start, first)
    end = robot.space.retract(middle, second)
    steps = [ExecutedStep(0, 1, 0, 0, middle, first, "p", 0.0), ExecutedStep(0, 1, 1, 0, end, second, "p", 0.5)]
    action = action_of(robot, steps, steps[-1], None)
    np.testing.assert_allclose(action[:3], [0.1, 0.2, 0])
    wanted = logarithm(multiply(exponential(second[3:]), exponential(first[3:])))
    np.testing.assert_allclose(action[3:6], wanted, atol=1e-9)
    np.testing.assert_allclose(action_of(robot, [], steps[-1], None), [0] * 6 + [0.5], atol=1e-12)


def test_absolute_actions_are_the_last_target():
    q = exponential(np.array([0.1, -0.7, 0.3]))
    sent = ExecutedStep(0, 1, 0, 0, np.array([0.1, 0.2, 0.3, *q]), np.zeros(6), "p", 1.0)
    action = action_of(make("ee_rotation_6d", "base", None), [], sent, None)
    np.testing.assert_allclose(action[:3], [0.1, 0.2, 0.3])
    np.testing.assert_allclose(action[3:6], rotate(q, np.array([1.0, 0, 0])), atol=1e-12)
    np.testing.assert_allclose(action[3:9], columns_of(q))
    action = action_of(make("ee_rotation_axis_angle", "base", None), [], sent, None)
    np.testing.assert_allclose(action[3:6], [0.1, -0.7, 0.3], atol=1e-12)


def test_fields_are_where_the_embodiment_has_them_and_joints_are_joints():
    grip, joints = field("grip", "gripper_position", 1, 0, 1), field("arm", "joint_position", 2, -3, 3)
    robot = parse_robot(embodiment([grip, joints]), need_limits=False)
    sent = ExecutedStep(0, 1, 0, 0, np.array([0.5, -0.5]), np.array([0.1, 0]), "p", 0.25)
    assert action_of(robot, [sent], sent, None).tolist() == [0.25, 0.5, -0.5]


def test_without_a_gripper_command_there_is_no_action_and_chunk_start_cannot_be_stored():
    sent = ExecutedStep(0, 1, 0, 0, np.zeros(3), np.zeros(3), "p", None)
    with pytest.raises(RecordError, match="E_GRIPPER: the guard has sent nothing for effort yet"):
        action_of(make("", "base", "commanded"), [sent], sent, None)
    assert action_of(make("", "base", "commanded", gripper=False), [sent], sent, None).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"action\.hand: a delta from the chunk's start cannot be stored"):
        check_recordable(make("", "base", "chunk_start"))
    space = make("ee_rotation_axis_angle", "tool", "commanded").space
    np.testing.assert_allclose(delta_between(space, space.origin, space.origin), np.zeros(6), atol=1e-12)


# ---- the node, with its topics by hand


class HandBus:
    """A bus whose messages, timers and clock are the test's."""

    name = "test"

    def __init__(self):
        self.time, self.sent, self.callbacks, self.timers, self.lines = T0, [], {}, [], []

    msg = staticmethod(message)

    def publisher(self, topic, type, qos):
        return SimpleNamespace(publish=lambda value: self.sent.append((topic, value)))

    def subscribe(self, topic, type, qos, callback, urgent=True):
        self.callbacks.setdefault(topic, []).append(callback)

    def timer(self, period, callback):
        self.timers.append(callback)

    def on_liveliness(self, topic, callback):
        self.callbacks.setdefault(f"{topic} liveliness", []).append(callback)

    def now(self):
        return self.time

    steady = now

    def log(self, level, text):
        self.lines.append((level, text))

    def shutdown(self):
        pass

    close = shutdown

    def hear(self, topic, value):
        for callback in self.callbacks[topic]:
            callback(value)

    def last(self, topic):
        return json.loads([v for t, v in self.sent if t == topic][-1].data)


class ListSink:
    def __init__(self):
        self.added, self.sealed, self.problem, self.closed = [], 0, None, False

    def add(self, frames, instruction, success, source):
        if self.problem:
            raise self.problem
        self.added.append((frames, instruction, success, source))

    def seal(self):
        waiting, self.sealed = len(self.added) - self.sealed, len(self.added)
        return "recorder-0000" if waiting else None

    def counts(self):
        return {"episodes": len(self.added), "unsealed": len(self.added) - self.sealed}

    def close(self):
        self.closed = True


ROBOT = parse_robot(EMBODIMENT, need_limits=False)


@pytest.fixture
def rig():
    bus, sink = HandBus(), ListSink()
    config = RecorderConfig(**{**VALUES, "max_seconds": 60.0})
    return SimpleNamespace(
        bus=bus, sink=sink, node=RecorderNode(bus, ROBOT, sink, config, instruction="", session="20261126T201500")
    )


def order(rig, command, **values):
    rig.bus.hear(RECORD, m.json_to_ros(message, {"command": command, **values}))
    return rig.bus.last(RECORD_STATE)


def play(rig, frames, source=lambda k: "teleop", begin=0):
    """Let a twin of 80 Hz and a guard say what they say."""
    for k in range(begin, begin + frames):
        rig.bus.time = t = T0 + k * DT
        hand = np.array([0.001 * k, 0.6, 0.2])
        rig.bus.hear("/tool_pose", m.pose_to_ros(message, t, hand, "base_link"))
        rig.bus.hear("/joint_states", m.joints_to_ros(message, t, {"other": 9.0, "grip": 0.5}))
        if k % 4 == 0:
            image = np.full((24, 32, 3), k % 256, np.uint8)
            rig.bus.hear(image_topic("corner"), m.image_to_ros(message, t, image, "corner"))
        sent = ExecutedStep(T0, 1, k, t, hand + np.array([0.001, 0, 0]), np.array([0.001, 0, 0]), source(k), -1.0)
        rig.bus.hear(EXECUTED, m.executed_to_ros(message, sent, DT, ["hand_delta"], False))
        for timer in rig.bus.timers:
            timer()


def test_an_episode_is_started_recorded_stopped_and_sealed_by_topic(rig):
    assert rig.bus.last(RECORD_STATE)["state"] == "idle"
    play(rig, 8)
    assert order(rig, "start", instruction="go to the goal")["state"] == "recording"
    play(rig, 40, lambda k: "teleop" if k < 20 else "policy", begin=8)
    state = order(rig, "stop", success=True)
    assert state["state"] == "idle" and state["reason"] == "episode 0 stored: 40 frames"
    assert (state["episodes"], state["unsealed"]) == (1, 1)
    frames, instruction, success, source = rig.sink.added[0]
    assert (instruction, success) == ("go to the goal", True)
    assert source == "live/20261126T201500/0000/human=0-12" and state["last"]["source"] == source
    np.testing.assert_allclose(frames.state[:, 0], 0.001 * np.arange(8, 48), rtol=1e-6)
    np.testing.assert_allclose(frames.state[:, 3], 0.5)
    np.testing.assert_allclose(frames.action, np.tile([0.001, 0, 0, -1], (40, 1)), atol=1e-9)
    assert frames.images["corner"].shape == (40, 24, 32, 3) and frames.images["corner"][4, 0, 0, 0] == 12
    assert order(rig, "seal")["reason"] == "sealed recorder-0000"
    assert order(rig, "seal")["reason"] == "nothing to seal"
    assert rig.bus.last(RECORD_STATE)["unsealed"] == 0


def test_a_discarded_episode_leaves_nothing_and_its_number_to_the_next(rig):
    order(rig, "start", instruction="a")
    play(rig, 10)
    assert order(rig, "discard")["reason"] == "episode 0 discarded"
    order(rig, "start", instruction="b")
    play(rig, 10, begin=10)
    order(rig, "stop")
    assert [(i, s) for _, i, s, _ in rig.sink.added] == [("b", None)]
    assert rig.sink.added[0][3].startswith("live/20261126T201500/0000/")


@pytest.mark.parametrize(
    ("orders", "says"),
    [
        ([("stop", {})], "refused: nothing is being recorded"),
        ([("discard", {})], "refused: nothing is being recorded"),
        ([("start", {})], "refused: no instruction; give one with start, on /dita/instruction"),
        ([("start", {"instruction": "a"})] * 2, "refused: episode 0 is not stopped or discarded yet"),
        ([("begin", {})], "refused: no command 'begin'; there are start, stop, discard, seal"),
        (
            [("start", {"instruction": "a"}), ("stop", {"success": "yes"})],
            "refused: success is true, false or left out",
        ),
        ([("start", {"instruction": "a"}), ("stop", {})], "episode 0 not stored: E_EMPTY: the guard executed nothing"),
    ],
)
def test_orders_that_make_no_sense_are_refused_with_a_reason(rig, orders, says):
    for command, values in orders:
        state = order(rig, command, **values)
    assert state["reason"].startswith(says)
    assert not rig.sink.added


def test_what_is_no_order_at_all_ends_nothing(rig):
    for text in ("{", "[]", "{}", '{"command": 3}'):
        rig.bus.hear(RECORD, message(m.STRING, data=text))
        assert "refused" in rig.bus.last(RECORD_STATE)["reason"]
    rig.bus.hear(GUARD_STATE, message(m.STRING, data="{"))
    rig.bus.hear(INSTRUCTION, message(m.STRING, data="press the button"))
    assert order(rig, "start")["instruction"] == "press the button"


@pytest.mark.parametrize(
    ("fault", "ended"),
    [
        (
            lambda bus: bus.hear(GUARD_STATE, m.json_to_ros(message, {"state": "FAULT", "reason": "state older"})),
            "E_STOP: guard FAULT: state older",
        ),
        (
            lambda bus: bus.hear(
                "/corner/image_raw", message(m.IMAGE, encoding="mono8", height=1, width=1, step=1, data=[0])
            ),
            "E_IMAGE: camera corner: image encoding 'mono8'",
        ),
        (
            lambda bus: bus.hear("/joint_states", message(m.JOINT_STATE, name=["a", "a"], position=[0, 1])),
            "E_JOINTS: a joint state needs unique names",
        ),
        (
            lambda bus: bus.hear(EXECUTED, message(m.CARTESIAN_TRAJECTORY)),
            "E_VALUE: /dita/executed: not an executed step",
        ),
    ],
)
def test_a_fault_ends_the_episode_at_once_and_stop_keeps_what_came_before(rig, fault, ended):
    order(rig, "start", instruction="a")
    play(rig, 20)
    fault(rig.bus)
    for timer in rig.bus.timers:
        timer()
    state = rig.bus.last(RECORD_STATE)
    assert state["state"] == "ended" and state["ended"].startswith(ended)
    assert f"episode 0 ended: {ended}" in state["reason"]
    play(rig, 20, begin=20)
    state = order(rig, "stop", success=False)
    assert state["reason"].startswith(f"episode 0 stored: 20 frames, ended early by {ended}")
    assert len(rig.sink.added[0][0].stamp) == 20


def test_a_joint_that_is_missing_is_named_and_nothing_is_stored(rig):
    order(rig, "start", instruction="a")
    t = rig.bus.time = T0
    rig.bus.hear("/tool_pose", m.pose_to_ros(message, t, [0, 0, 0], "base_link"))
    rig.bus.hear("/joint_states", m.joints_to_ros(message, t, {"other": 9.0}))
    rig.bus.hear("/corner/image_raw", m.image_to_ros(message, t, np.zeros((24, 32, 3), np.uint8), "corner"))
    rig.bus.hear(EXECUTED, m.executed_to_ros(message, step(0), DT, ["hand_delta"], False))
    state = order(rig, "stop")
    assert state["reason"] == "episode 0 not stored: E_JOINTS: /joint_states has other; grip needs grip"
    assert state["state"] == "idle" and not rig.sink.added


def test_a_full_disk_keeps_the_episode_in_memory_until_there_is_room(rig):
    order(rig, "start", instruction="a")
    play(rig, 12)
    rig.sink.problem = OSError(28, "E_NOSPACE: no space left")
    state = order(rig, "stop", success=True)
    assert (
        state["state"] == "unstored"
        and "E_NOSPACE" in state["reason"]
        and "make room and stop again" in state["reason"]
    )
    play(rig, 12, begin=12)
    assert "not stopped or discarded" in order(rig, "start", instruction="b")["reason"]
    rig.sink.problem = None
    assert order(rig, "stop", success=True)["reason"] == "episode 0 stored: 12 frames"
    assert len(rig.sink.added) == 1


def test_leaving_throws_the_open_episode_away_seals_the_others_and_frees_the_store(rig):
    order(rig, "start", instruction="a")
    play(rig, 12)
    order(rig, "stop")
    order(rig, "start", instruction="a")
    rig.node.close()
    assert rig.sink.sealed == 1 and rig.sink.closed and len(rig.sink.added) == 1
    assert ("warning", "the unfinished episode was thrown away; stop it before leaving") in rig.bus.lines


def test_state_is_built_from_pose_and_joints_by_name():
    state = [
        field("grip", "gripper_position", 1, 0, 1),
        field("arm", "joint_position", 2, -3, 3),
        field("turn", "ee_rotation_6d", 6, -1, 1),
        field("hand", "ee_position", 3, -1, 1),
    ]
    robot = parse_robot(embodiment(EMBODIMENT["action"], state), need_limits=False)
    q = exponential(np.array([0, 0, np.pi / 2]))
    values = {"/tool_pose": (np.array([1.0, 2, 3]), q), "/joint_states": {"arm_1": 0.2, "grip": 0.7, "arm_0": 0.1}}
    np.testing.assert_allclose(state_of(robot, values), [0.7, 0.1, 0.2, 0, 1, 0, -1, 0, 0, 1, 2, 3], atol=1e-12)


# ---- over the wire


def live_config(tmp_path, domain_id, **changes):
    values = yaml.safe_load((HERE.parent / "configs" / "robot.yaml").read_text())
    del values["defaults"]
    slots = {"grip": 3, "effort": 3}
    fields = {k: [{**f, "slot": slots.get(f["name"], 0)} for f in EMBODIMENT[k]] for k in ("state", "action")}
    (tmp_path / "point.yaml").write_text(yaml.safe_dump({**EMBODIMENT, **fields}))
    env = {
        **{"suite": "fake", "embodiment": str(tmp_path / "point.yaml"), "tasks": ("go",)},
        **{"max_steps": 400, "fast_render": True},
    }
    values.update(checkpoint="none", out=str(tmp_path / "out"), store=str(tmp_path / "live.zarr"), env=env)
    values.update(domain_id=domain_id, start_timeout=30.0, episode_timeout=30.0, state_timeout=0.5, stream_timeout=0.3)
    return from_dict(LiveConfig, {**values, **changes}, "robot")


def fake_twin(domain_id):
    return {"twin": [sys.executable, str(HERE / "fake_teleop.py"), json.dumps({"domain_id": domain_id})]}


@pytest.mark.live
def test_demonstrations_over_topics_become_a_store_that_verifies_and_trains(tmp_path, capsys):
    word = record(live_config(tmp_path, 150, episodes=2, seed=5), commands=fake_twin(150))
    assert (word["episodes"], word["unsealed"]) == (2, 0)
    with pytest.raises(FileExistsError, match="exists; --resume continues it"):
        ZarrSink(str(tmp_path / "live.zarr"), str(tmp_path / "point.yaml"), "x", "x", "raw", "error")
    word = record(live_config(tmp_path, 150, episodes=3, seed=5), exist="resume", commands=fake_twin(150))
    assert (word["episodes"], word["unsealed"]) == (3, 0)
    store = Store(tmp_path / "live.zarr")
    assert store.verify() > 10_000
    seeds = [int(re.fullmatch(r"live/\w+/\d{4}/go/seed=(\d+)/human=0-\d+", e.source)[1]) for e in store.episodes]
    assert seeds[0] >= 5 and len(set(seeds)) == 3 and seeds == sorted(seeds), "a start that failed is not repeated"
    for i, episode in enumerate(store.episodes):
        assert episode.success and episode.instruction == "go to the goal" and store.length(i) > 30
        assert human_steps(episode.source, store.length(i)).all()
        action, state = store.action(i), store.state(i)
        moved = np.linalg.norm(state[-1, :3] - GOAL)
        assert moved < 0.02, "the point reached the goal while it was recorded"
        # what is stored is what moved the point: the sum of the deltas leads from the first state to the last command
        np.testing.assert_allclose(state[0, :3] + action[:, :3].sum(0), state[-1, :3], atol=0.02)
        assert np.all(action[:, 3] == -1) and np.abs(action[:, :3]).max() <= 0.01
        assert np.allclose(np.diff(store.stamp(i)), 0.0125, atol=1e-6)
    capsys.readouterr()
    store_path = str(tmp_path / "live.zarr")
    for more in (["--verify"], ["--doctor", "--out", str(tmp_path / "doctor")]):
        assert main(["inspect", store_path, *more]) == 0, capsys.readouterr()
    diagnosis = json.loads((tmp_path / "doctor" / "doctor.json").read_text())
    assert diagnosis["left_out"] == 0, diagnosis["findings"]
    train = ["train", "experiment=smoke", f"data.stores=[{{path:{store_path},weight:1}}]", "steps=2", "save_every=2"]
    assert main([*train, f"run={tmp_path / 'run'}"]) == 0, capsys.readouterr()
    assert list((tmp_path / "run").rglob("*.safetensors"))
