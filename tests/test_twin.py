"""A simulated arm behind a driver's topics, and the faults that it can be told to have."""

from __future__ import annotations

import numpy as np
import pytest
from fake_robot import EMBODIMENT, GOAL, JOINT_GOAL, JointEnv, PointEnv, joint_embodiment
from local_bus import LocalBus

from robot_io import messages as m
from robot_io.bus import COMMAND, SENSOR, STATE
from robot_io.nodes.inject import FAULTS, Faults
from robot_io.nodes.topics import (
    EPISODE,
    EPISODE_STATE,
    EXECUTED,
    INJECT,
    INJECTED,
    JOINTS,
    TELEOP,
    TELEOP_GRIPPER,
    TOOL_POSE,
    command_type,
    image_topic,
)
from robot_io.nodes.twin import EXPERT_STEPS, TwinNode

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


# --- the driver


HELD = 0.15  # [s] without a command: longer than the driver's timeout


class Arm:
    """A twin on a local bus, commanded as its driver says."""

    def __init__(self, embodiment, env=None, **options):
        self.bus, self.embodiment = LocalBus(), embodiment
        self.env = env or (JointEnv(embodiment) if "driver" in embodiment else PointEnv())
        self.twin = TwinNode(self.bus, self.env, embodiment, command_timeout=0.1, **options)
        self.robot = self.twin.robot
        self._command = self.bus.publisher(self.robot.driver.command_topic, command_type(self.robot), COMMAND)
        self.twin.reset({"episode": 0, "task": "go", "seed": 0})

    def send(self, message):
        self._command.publish(message)

    def joints(self, values, names=None):
        """Command joint positions."""
        driver, now = self.robot.driver, self.bus.now()
        if driver.command == "position_array":
            self.send(m.array_to_ros(self.bus.msg, np.asarray(values)))
        else:
            speeds = np.zeros(len(values))
            self.send(m.joint_command_to_ros(self.bus.msg, now, names or driver.joints, values, speeds, 0.01))

    def pose(self, x):
        quaternion = x[3:] if len(x) == 7 else m.IDENTITY
        self.send(m.pose_to_ros(self.bus.msg, self.bus.now(), x[:3], "base_link", quaternion))

    def stream(self, send, seconds):
        """Send a command every 10 ms."""
        for _ in range(round(seconds / 0.01)):
            send()
            self.bus.run(0.01)

    def order(self, **values):
        self.bus.publisher(INJECT, m.STRING, STATE).publish(m.json_to_ros(self.bus.msg, values))

    def last(self, topic):
        return self.bus.sent[topic][-1]

    def report(self):
        self.bus.run(0.05)  # it comes with the pictures
        return m.json_from_ros(self.last(EPISODE_STATE))


@pytest.mark.parametrize("command", ["joint_trajectory", "position_array"])
@pytest.mark.parametrize("mode", ["delta", "absolute"])
@pytest.mark.parametrize("joints", [2, 7])
def test_joint_arms_follow_positions_in_either_form(command, mode, joints):
    arm = Arm(joint_embodiment(joints, command, mode))
    goal = np.linspace(-0.3, 0.4, joints)
    arm.stream(lambda: arm.joints(goal), 1.0)
    state = arm.last("/joint_states")
    names = [f"j{i + 1}" for i in range(joints)]
    assert list(state.name) == [*names, "grip"], "the driver's names"
    np.testing.assert_allclose(state.position[:joints], goal, atol=1e-3)
    assert len(state.velocity) == joints + 1 and np.all(np.abs(state.velocity) < 0.01)
    if command == "joint_trajectory":  # by name, whatever the order
        arm.stream(lambda: arm.joints(-goal[::-1], names[::-1]), 1.0)
        np.testing.assert_allclose(arm.env.joints, -goal, atol=1e-3)
    assert arm.report()["refused"] == 0


def test_velocities_are_those_of_the_joints():
    arm = Arm(joint_embodiment(2))
    begin = arm.env.commanded.copy()
    for i in range(1, 30):
        arm.joints(begin + 0.01 * i)
        arm.bus.run(0.0125)
    np.testing.assert_allclose(arm.last("/joint_states").velocity[:2], 0.8, rtol=1e-3)  # rad/s


def test_a_joint_command_that_jumps_is_clipped_and_counted():
    arm = Arm(joint_embodiment(2))
    begin = arm.env.commanded.copy()
    arm.joints(begin + np.array([1.0, 0.001]))
    arm.bus.run(0.0126)
    np.testing.assert_allclose(arm.env.commanded - begin, [0.02, 0.001], atol=1e-7)
    assert arm.report()["clipped"] > 0


def bad_commands(arm):
    msg, now, names = arm.bus.msg, arm.bus.now(), list(arm.robot.driver.joints)
    zeros = np.zeros(len(names))

    def command(names, values):
        return m.joint_command_to_ros(msg, now, names, values, np.zeros(len(values)), 0.01)

    return [
        command(names, [np.nan, 0.0]),
        command(names, [0.0, np.inf]),
        command(["j1", "j3"], zeros),
        command(["j1"], [0.0]),
        command(["j1", "j1"], zeros),
        msg(m.JOINT_TRAJECTORY, joint_names=names),
    ]


def test_commands_that_make_no_sense_are_refused_and_counted():
    arm = Arm(joint_embodiment(2))
    begin = arm.env.commanded.copy()
    for n, message in enumerate(bad_commands(arm), start=1):
        arm.send(message)
        arm.bus.run(0.02)
        assert arm.twin._episode["refused"] == n and arm.bus.logged[-1][0] == "error"
        assert np.array_equal(arm.env.commanded, begin)
    assert arm.report()["timeouts"] == 0, "a refused command is no command"


def test_an_array_of_the_wrong_length_is_refused():
    arm = Arm(joint_embodiment(3, "position_array"))
    arm.joints([0.0, 0.0])
    assert arm.twin._episode["refused"] == 1 and "3 values" in arm.bus.logged[-1][1]


def test_orders_and_grippers_that_make_no_sense_are_refused():
    arm = Arm(joint_embodiment(2))
    for text in ("{", "[]", '{"episode": 1}'):
        arm.bus.publisher(EPISODE, m.STRING, STATE).publish(arm.bus.msg(m.STRING, data=text))
    gripper = arm.bus.publisher(arm.robot.driver.gripper_topic, m.JOINT_TRAJECTORY, COMMAND)
    gripper.publish(m.gripper_to_ros(arm.bus.msg, 0.0, ["effort"], np.nan, "effort", 0.01))
    gripper.publish(m.gripper_to_ros(arm.bus.msg, 0.0, ["thumb"], 1.0, "effort", 0.01))
    assert arm.twin._episode["refused"] == 5
    arm.bus.run(0.1)
    assert arm.env.grip == 0.5


def test_without_commands_the_arm_holds_after_the_drivers_timeout():
    arm = Arm(joint_embodiment(2))
    arm.joints(arm.env.commanded + 10.0)
    arm.bus.run(0.099)
    moving = arm.env.commanded.copy()
    arm.bus.run(HELD)
    held = arm.env.commanded.copy()
    assert np.all(held >= moving) and np.all(held < moving + 0.05)
    arm.bus.run(1.0)
    assert np.array_equal(arm.env.commanded, held)
    assert arm.report()["timeouts"] == 1


@pytest.mark.parametrize("mode", ["protective_stop", "emergency_stop"])
def test_a_stopped_driver_ignores_commands_until_their_stream_began_anew(mode):
    arm = Arm(joint_embodiment(2), inject=True)
    goal = arm.env.commanded + 0.5
    assert arm.last("/driver/mode").data == "running"
    arm.stream(lambda: arm.joints(goal), 0.1)
    moving = arm.env.commanded.copy()
    arm.order(fault="driver_mode", mode=mode)
    arm.bus.run(0.0126)
    stopped = arm.env.commanded.copy()
    assert arm.last("/driver/mode").data == mode and np.all(stopped - moving <= 0.021)
    arm.stream(lambda: arm.joints(goal), 0.3)
    assert np.array_equal(arm.env.commanded, stopped)
    arm.order(fault="driver_mode", off=True)
    arm.stream(lambda: arm.joints(goal), 0.3)
    assert arm.last("/driver/mode").data == "running"
    assert np.array_equal(arm.env.commanded, stopped), "no motion on release while somebody goes on commanding"
    assert arm.report()["ignored"] >= 50
    arm.bus.run(HELD)
    arm.stream(lambda: arm.joints(goal), 0.3)
    assert np.all(arm.env.commanded > stopped)


def test_reduced_mode_still_follows():
    arm = Arm(joint_embodiment(2), inject=True)
    arm.order(fault="driver_mode", mode="reduced")
    arm.stream(lambda: arm.joints(np.zeros(2)), 0.5)
    np.testing.assert_allclose(arm.env.joints, 0.0, atol=1e-3)


def test_faults_are_off_unless_asked_for():
    arm = Arm(joint_embodiment(2))
    arm.order(fault="state_silent")
    before = len(arm.bus.sent["/joint_states"])
    arm.bus.run(0.1)
    assert len(arm.bus.sent["/joint_states"]) > before and INJECTED not in arm.bus.sent


@pytest.mark.parametrize("inverted", [False, True])
def test_a_gripper_obeys_or_does_the_opposite(inverted):
    arm = Arm(joint_embodiment(2), inject=True)
    if inverted:
        arm.order(fault="gripper_inverted")
    gripper = arm.bus.publisher(arm.robot.driver.gripper_topic, m.JOINT_TRAJECTORY, COMMAND)
    for effort, opening in ((1.0, 1.0), (-1.0, 0.0)):
        gripper.publish(m.gripper_to_ros(arm.bus.msg, arm.bus.now(), ["effort"], effort, "effort", 0.0125))
        arm.bus.run(0.3)
        assert arm.last("/joint_states").position[-1] == (1 - opening if inverted else opening)


def test_points_follow_poses_and_twists():
    arm = Arm(EMBODIMENT)
    arm.stream(lambda: arm.pose(GOAL), 1.0)
    np.testing.assert_allclose(m.pose_from_ros(arm.last("/tool_pose"))[0], GOAL, atol=1e-3)
    assert arm.report()["success"]
    twisted = Arm({**EMBODIMENT, "driver": {"command": "twist"}}, PointEnv())
    velocity = np.array([0.1, 0.0, -0.05])
    begin = twisted.env.commanded_position.copy()
    twisted.stream(
        lambda: twisted.send(m.twist_to_ros(twisted.bus.msg, twisted.bus.now(), velocity, np.zeros(3), "base_link")),
        0.5,
    )
    np.testing.assert_allclose(twisted.env.commanded_position - begin, 0.5 * velocity, atol=2e-3)
    twisted.bus.run(HELD)
    held = twisted.env.commanded_position.copy()
    twisted.bus.run(1.0)
    assert np.array_equal(twisted.env.commanded_position, held), "a velocity ends with its stream"


def test_images_come_at_their_own_rate_with_the_state_of_their_instant():
    arm = Arm(joint_embodiment(3))
    arm.bus.run(1.0)
    pictures, states = arm.bus.sent["/corner/image_raw"], arm.bus.sent["/joint_states"]
    np.testing.assert_allclose(np.diff([m.stamp_of(p) for p in pictures]), 0.05, atol=1e-6)
    np.testing.assert_allclose(np.diff([m.stamp_of(s) for s in states]), 0.0125, atol=1e-6)
    assert {m.stamp_of(p) for p in pictures} <= {m.stamp_of(s) for s in states}


@pytest.mark.parametrize("mode", ["delta", "absolute"])
def test_the_expert_demonstrates_as_a_teleoperator_does(mode):
    """Executed as a guard would, at the step's own rate, its chunks lead to the goal without overshoot."""
    arm = Arm(joint_embodiment(3, mode=mode), expert=True)
    arm.bus.sent.clear()
    goal, most = arm.env.commanded.copy(), arm.env.commanded.copy()
    for _ in range(120):
        if chunks := arm.bus.sent.pop(TELEOP, []):
            gripper = arm.bus.sent[TELEOP_GRIPPER][-1]
            assert m.stamp_of(gripper) == m.stamp_of(chunks[-1])
            assert m.chunk_id_of(gripper) == m.chunk_id_of(chunks[-1]) > 0
            quantity = "velocities" if mode == "delta" else "positions"
            dt, values = m.joint_chunk_from_ros(chunks[-1], quantity, arm.robot.driver.joints)
            assert dt == pytest.approx(0.0125) and values.shape == (EXPERT_STEPS, 3)
            step = values[0] if mode == "delta" else np.clip(values[0] - goal, -0.01, 0.01)
            goal = goal + step
            done = m.ExecutedStep(m.stamp_of(chunks[-1]), 1, 0, arm.bus.now(), goal, step, "teleop")
            report = m.executed_to_ros(arm.bus.msg, done, dt, arm.robot.driver.joints, True)
            arm.bus.publisher(EXECUTED, m.JOINT_TRAJECTORY, STATE).publish(report)
        arm.joints(goal - 0.02)  # a guard's tracker lags
        arm.bus.run(0.0125)
        most = np.maximum(most, goal)
    np.testing.assert_allclose(goal, JOINT_GOAL, atol=1e-6)
    np.testing.assert_allclose(most, JOINT_GOAL, atol=1e-6)


def test_a_reset_by_topic_begins_once_and_says_the_instruction():
    arm = Arm(joint_embodiment(2))
    order = m.json_to_ros(arm.bus.msg, {"episode": 1, "task": "go", "seed": 7})
    orders = arm.bus.publisher(EPISODE, m.STRING, STATE)
    orders.publish(order)
    start = arm.env.commanded.copy()
    arm.stream(lambda: arm.joints(np.zeros(2)), 0.2)
    orders.publish(order)
    report = arm.report()
    assert report["episode"] == 1 and report["steps"] > 10, "the same order again is no other episode"
    assert not np.array_equal(arm.env.commanded, start)
    assert [i.data for i in arm.bus.sent["/dita/instruction"]] == ["go to the goal"] * 2


def test_a_late_twin_lets_simulated_time_slip():
    arm = Arm(joint_embodiment(2))
    arm.bus.run(0.5)
    arm.bus.time += 2.0
    for timer in arm.bus._timers:
        timer[0] = arm.bus.time
    arm.bus.run(0.5)
    report = arm.report()
    assert report["slipped_s"] == pytest.approx(2.0, abs=0.05)
    assert 0.3 < report["real_time_factor"] < 0.5
    assert m.stamp_of(arm.last("/joint_states")) <= arm.bus.now() + 1e-6


def test_the_first_picture_of_an_episode_costs_no_simulated_time():
    arm = Arm(EMBODIMENT)
    observe = arm.env.observe

    def slowly():  # a renderer that loads the scene
        arm.bus.time += 0.5
        arm.env.observe = observe
        return observe()

    arm.env.observe = slowly
    arm.twin.reset({"episode": 5, "task": "go", "seed": 0})
    assert m.stamp_of(arm.last(image_topic(arm.robot.cameras[0]))) == pytest.approx(arm.bus.now())
    arm.bus.run(0.3)
    assert arm.report()["slipped_s"] == 0 and arm.report()["real_time_factor"] == 1


def test_simulator_warnings_are_said_once():
    arm = Arm(joint_embodiment(2))
    arm.env.warnings = lambda: {"mjWARN_BADQVEL": 3}
    assert arm.report()["warnings"] == {"mjWARN_BADQVEL": 3}
    arm.bus.run(0.3)
    assert [text for level, text in arm.bus.logged if level == "error"] == ["the simulator warns: mjWARN_BADQVEL"]
