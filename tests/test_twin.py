"""A simulated arm behind a driver's topics, and the faults that it can be told to have."""

from __future__ import annotations

import numpy as np
import pytest
from local_bus import LocalBus

from robot_io import messages as m
from robot_io.bus import SENSOR, STATE
from robot_io.nodes.inject import FAULTS, Faults
from robot_io.nodes.topics import INJECT, INJECTED, JOINTS, TOOL_POSE, image_topic

FRONT, WRIST = image_topic("front"), image_topic("wrist")
JOINT_NAMES = ["a", "b", "finger"]


class Source:
    """Something that publishes what a driver publishes, message by message."""

    def __init__(self, enabled: bool = True) -> None:
        self.bus = LocalBus()
        self.faults = Faults(self.bus, ("front", "wrist"), ("finger",), enabled)
        self.publishers = {
            topic: self.faults.publisher(topic, type, qos)
            for topic, type, qos in (
                (FRONT, m.IMAGE, SENSOR), (WRIST, m.IMAGE, SENSOR), (JOINTS, m.JOINT_STATE, STATE),
                (TOOL_POSE, m.POSE, STATE),
            )
        }  # fmt: skip
        self.n = 0

    def order(self, **values):
        self.bus.publisher(INJECT, m.STRING, STATE).publish(m.json_to_ros(self.bus.msg, values))
        return m.json_from_ros(self.bus.sent[INJECTED][-1])

    def publish(self):
        """Send one of each; every value says which one it is."""
        self.n += 1
        stamp, msg = self.bus.now(), self.bus.msg
        front, wrist = np.full((2, 3, 3), self.n, np.uint8), np.full((4, 5, 3), 100 + self.n, np.uint8)
        front[..., 0] = 200
        self.publishers[FRONT].publish(m.image_to_ros(msg, stamp, front, "front"))
        self.publishers[WRIST].publish(m.image_to_ros(msg, stamp, wrist, "wrist"))
        positions = {"a": 1.0, "b": 2.0, "finger": 0.5}
        self.publishers[JOINTS].publish(m.joints_to_ros(msg, stamp, positions, {"a": 0.1, "b": 0.2, "finger": 0.0}))
        self.publishers[TOOL_POSE].publish(m.pose_to_ros(msg, stamp, (0.1, 0.2, 0.3), "base_link"))
        self.bus.time += 0.05

    def last(self, topic):
        return self.bus.sent[topic][-1]

    def count(self, topic):
        return len(self.bus.sent.get(topic, []))


@pytest.fixture
def source():
    made = Source()
    made.publish()
    return made


def everything(source):
    return {topic: [repr(message) for message in source.bus.sent[topic]] for topic in source.publishers}


def test_without_faults_nothing_changes_and_disabled_nothing_is_offered():
    plain, enabled = Source(enabled=False), Source()
    for made in (plain, enabled):
        for _ in range(3):
            made.publish()
    assert everything(plain) == everything(enabled)
    assert set(plain.bus.sent) == set(plain.publishers) and not plain.bus._readers and not plain.bus._timers


def test_every_fault_ends_when_it_is_told_to(source):
    arguments = {
        "camera_delay": {"s": 0.1}, "stamp_offset": {"topic": FRONT, "s": 1.0}, "rate": {"factor": 0.5},
        "driver_mode": {"mode": "protective_stop"},
    }  # fmt: skip
    for name in FAULTS:
        assert name in source.order(fault=name, **arguments.get(name, {}))["active"]
        source.publish()
    assert source.order(off=True) == {"active": {}, "error": ""}
    untouched = Source()
    untouched.n, untouched.bus.time = source.n, source.bus.time
    source.publish()
    untouched.publish()
    for topic in source.publishers:
        assert repr(source.last(topic)) == repr(untouched.last(topic))


@pytest.mark.parametrize(
    ("order", "says"),
    [
        ({"fault": "camera_slient"}, "no fault 'camera_slient'; there are camera_silent"),
        ({"fault": "camera_delay"}, "camera_delay: needs s"),
        ({"fault": "camera_delay", "s": -1}, "must not be negative"),
        ({"fault": "camera_delay", "s": "1"}, "s must be a number"),
        ({"fault": "rate", "factor": 2.0}, "a share in"),
        ({"fault": "camera_silent", "camera": "left"}, "no camera 'left'; there are front, wrist"),
        ({"fault": "stamp_offset", "topic": "/x", "s": 1}, "no topic '/x'; there are /front/image_raw"),
        ({"fault": "pose_mm", "s": 1}, "pose_mm: no argument s; there are none"),
        ({"fault": "driver_mode", "mode": "asleep"}, "no mode 'asleep'; there are running"),
        ({"off": True, "fault": "camera_slient"}, "off takes the name"),
        ([1], "an order is a JSON object"),
    ],
)
def test_orders_that_make_no_sense_are_refused_and_said(source, order, says):
    source.bus.publisher(INJECT, m.STRING, STATE).publish(m.json_to_ros(source.bus.msg, order))
    answer = m.json_from_ros(source.bus.sent[INJECTED][-1])
    assert says in answer["error"] and answer["active"] == {}
    assert says in source.bus.logged[-1][1]


def test_swapping_needs_two_cameras():
    faults = Faults(LocalBus(), ("front",), (), True)
    with pytest.raises(ValueError, match="needs two cameras, there are front"):
        faults.begin("cameras_swapped")


def test_cameras_fall_silent_all_or_one(source):
    source.order(fault="camera_silent", camera="front")
    source.publish()
    assert (source.count(FRONT), source.count(WRIST), source.count(JOINTS)) == (1, 2, 2)
    source.order(fault="camera_silent")
    source.publish()
    assert (source.count(FRONT), source.count(WRIST), source.count(JOINTS)) == (1, 2, 3)


@pytest.mark.parametrize(("fault", "old_stamp"), [("camera_frozen_stamp", True), ("camera_frozen_content", False)])
def test_frozen_cameras_repeat_the_last_picture(source, fault, old_stamp):
    first = source.last(FRONT)
    source.order(fault=fault)
    for _ in range(2):
        source.publish()
        frozen = source.last(FRONT)
        assert np.array_equal(frozen.data, first.data)
        assert (m.stamp_of(frozen) == m.stamp_of(first)) == old_stamp
    assert source.count(FRONT) == 3 and m.stamp_of(source.last(JOINTS)) > m.stamp_of(first)


def test_delayed_pictures_keep_their_stamps_and_order(source):
    source.order(fault="camera_delay", s=0.1)
    begin = source.bus.now()
    source.publish()
    source.publish()
    assert source.count(FRONT) == 1
    source.bus.run(0.02)
    assert source.count(FRONT) == 2
    assert m.stamp_of(source.last(FRONT)) == pytest.approx(begin)
    assert source.bus.now() - begin >= 0.1
    source.order(fault="camera_delay", off=True)
    assert source.count(FRONT) == 3, "what was held back comes out"


def test_stamps_of_one_topic_are_off_or_jump_back(source):
    for seconds in (0.5, -10.0):
        source.order(fault="stamp_offset", topic=JOINTS, s=seconds)
        now = source.bus.now()
        source.publish()
        assert m.stamp_of(source.last(JOINTS)) == pytest.approx(now + seconds)
        assert m.stamp_of(source.last(FRONT)) == pytest.approx(now)


@pytest.mark.parametrize(("topic", "counts"), [(None, (5, 5, 11)), (JOINTS, (11, 11, 5))])
def test_rate_lets_a_share_pass(source, topic, counts):
    source.order(fault="rate", factor=0.4, topic=topic)
    for _ in range(10):
        source.publish()
    assert (source.count(FRONT), source.count(WRIST), source.count(JOINTS)) == counts


def test_colours_and_cameras_are_swapped(source):
    source.order(fault="bgr")
    source.publish()
    assert m.image_from_ros(source.last(FRONT))[0, 0].tolist() == [2, 2, 200]
    assert source.last(FRONT).encoding == "rgb8"
    source.order(off=True)
    source.order(fault="cameras_swapped")
    source.publish()
    front, wrist = m.image_from_ros(source.last(FRONT)), m.image_from_ros(source.last(WRIST))
    assert front.shape == (4, 5, 3) and front[0, 0, 0] == 102, "the wrist's newest at that moment"
    assert wrist.shape == (2, 3, 3) and wrist[0, 0].tolist() == [200, 3, 3]


@pytest.mark.parametrize(
    ("order", "names", "positions"),
    [
        ({"fault": "joints_permuted"}, ["b", "finger", "a"], [1.0, 2.0, 0.5]),
        ({"fault": "joints_permuted", "values": True}, ["b", "finger", "a"], [2.0, 0.5, 1.0]),
        ({"fault": "joints_missing"}, ["b", "finger"], [2.0, 0.5]),
        ({"fault": "joints_missing", "joint": "b"}, ["a", "finger"], [1.0, 0.5]),
        ({"fault": "joints_extra"}, [*JOINT_NAMES, "intruder"], [1.0, 2.0, 0.5, 1.0]),
        ({"fault": "joints_duplicate"}, [*JOINT_NAMES, "a"], [1.0, 2.0, 0.5, 1.0]),
        ({"fault": "joints_degrees"}, JOINT_NAMES, [57.29577951308232, 114.59155902616465, 0.5]),
    ],
)
def test_joint_states_are_wrong_in_one_way(source, order, names, positions):
    source.order(**order)
    source.publish()
    state = source.last(JOINTS)
    assert list(state.name) == names and len(state.velocity) == len(names)
    np.testing.assert_allclose(state.position, positions)
    assert len(source.bus.sent[JOINTS][0].name) == 3, "earlier messages are left alone"


def test_poses_in_millimetres_and_silent_states(source):
    source.order(fault="pose_mm")
    source.publish()
    np.testing.assert_allclose(m.pose_from_ros(source.last(TOOL_POSE))[0], [100, 200, 300])
    source.order(fault="state_silent")
    source.publish()
    assert (source.count(TOOL_POSE), source.count(JOINTS), source.count(FRONT)) == (2, 2, 3)
