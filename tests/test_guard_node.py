"""The guard on a bus, with a bus that has no wire and a clock that the test turns."""

import copy
import json
import math
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from fake_robot import EMBODIMENT, START, field

from robot_io import messages as m
from robot_io.bus import SENSOR, STATE, Stopper, Writer
from robot_io.bus_dds import message
from robot_io.core.chunk_buffer import Chunk
from robot_io.core.guard import Guard, GuardConfig
from robot_io.core.kinematics import Kinematics
from robot_io.core.space import exponential, logarithm, multiply
from robot_io.nodes import topics
from robot_io.nodes.guard import GuardNode, contract_differences, from_parameters, load_robot

TICK = 1 / 160
T0 = 1_795_471_436.0
CONFIG = GuardConfig(
    tick=TICK, state_timeout=0.1, stream_timeout=0.1, hold_timeout=1.0, max_skew=0.05, clamp_margin=0.25
)
HASH = "a" * 64
TOOL = {
    **{"max_speed": 1.5, "max_acceleration": 120.0, "max_jerk": 24000.0, "max_lag": 0.15},
    **{"workspace_low": [-0.5, 0.4, 0.05], "workspace_high": [0.5, 1.0, 0.5]},
}
JOINT_LIMITS = {
    **{"names": ["shoulder", "elbow"], "low": [-2.0, -2.0], "high": [2.0, 2.0], "velocity": [2.0, 2.0]},
    **{"acceleration": [20.0, 20.0], "jerk": [2000.0, 2000.0], "max_lag": 0.3},
}
URDF = """<robot name="planar"><link name="base"/><link name="upper"/><link name="lower"/>
<joint name="shoulder" type="revolute"><parent link="base"/><child link="upper"/><axis xyz="0 0 1"/>
<limit lower="-2" upper="2" velocity="2"/></joint>
<joint name="elbow" type="revolute"><parent link="upper"/><child link="lower"/><origin xyz="0.4 0 0"/>
<axis xyz="0 0 1"/><limit lower="-2" upper="2" velocity="2"/></joint></robot>"""


def joint_arm(command="joint_trajectory", reference=None, **driver):
    """Return a two-joint arm with a gripper."""
    low, high = (-0.05, 0.05) if reference else (-2.0, 2.0)
    return {
        **{"name": "planar", "robot": "two joints", "obs_dt": 0.05, "action_dt": 0.05, "control_hz": 20.0},
        "state": [field("arm", "joint_position", 2, -2, 2), field("grip", "gripper_position", 1, 0, 1)],
        "action": [
            field("arm", "joint_position", 2, low, high, reference),
            field("grip", "gripper_position", 1, 0, 1),
        ],
        "cameras": [{"name": "corner", "height": 24, "width": 32, "slot": 0}],
        "limits": {"joints": JOINT_LIMITS},
        "driver": {"command": command, "joints": ["shoulder", "elbow"], "gripper_names": ["finger"], **driver},
    }


def tool_arm(command="pose", rotation=False, **driver):
    """Return a point that moves by deltas, or a hand that also turns by them; without a gripper."""
    arm = {**copy.deepcopy(EMBODIMENT), "driver": {"command": command, **driver}}
    arm["state"], arm["action"] = arm["state"][:1], arm["action"][:1]
    arm["limits"] = dict(TOOL)
    if rotation:
        arm["action"].append(field("turn", "ee_rotation_axis_angle", 3, -0.1, 0.1, "commanded"))
        arm["limits"].update(max_angular_speed=3.0, max_angular_acceleration=60.0, max_angular_jerk=6000.0)
        arm["limits"].update(max_angular_lag=0.5)
    return arm


class Bus:
    """What `robot_io.bus.Bus` promises, without a wire."""

    def __init__(self):
        self.name, self.time, self.wall, self.running = "guard", 50.0, T0, True
        self.sent, self.readers, self.timers, self.logged = defaultdict(list), defaultdict(list), [], []
        self.types, self.others, self.alive, self.services = {}, defaultdict(list), {}, {}
        self.requested = {}
        self.mismatch, self.stopper = None, Stopper(self.log)

    def msg(self, type, **fields):
        return message(type, **fields)

    def publisher(self, topic, type, qos):
        self.types[topic] = type
        message(type)  # a type that this bus does not know is refused
        return SimpleNamespace(publish=lambda sent: self.sent[topic].append(sent))

    def subscribe(self, topic, type, qos, callback, urgent=True):
        self.types.setdefault(topic, type)
        self.requested[topic] = qos
        self.readers[topic].append(callback)

    def send(self, topic, sent):
        for callback in self.readers[topic]:
            self.stopper.call(callback, sent)

    def timer(self, period_s, callback):
        self.timers.append([self.time + period_s, period_s, callback])

    def advance(self, seconds, each=lambda: None):
        end = self.time + seconds
        while self.timers and (timer := min(self.timers, key=lambda t: t[0]))[0] <= end + 1e-9 and self.running:
            self.wall += timer[0] - self.time
            self.time = timer[0]
            timer[0] += timer[1]
            each()
            self.stopper.call(timer[2])
        self.wall, self.time = self.wall + end - self.time, end

    def now(self):
        return self.wall

    def steady(self):
        return self.time

    def log(self, level, text):
        self.logged.append((level, text))

    def writers(self, topic):
        mine = [Writer(self.name, "", None)] if topic in self.types else []
        return mine + [Writer(node, "", None) for node in self.others[topic]]

    def on_liveliness(self, topic, callback):
        self.alive[topic] = callback

    def on_qos_mismatch(self, callback):
        self.mismatch = callback

    def on_stop(self, callback):
        self.stopper.callback = callback

    def service(self, name, type, callback):
        self.services[name] = (type, callback)

    def shutdown(self):
        self.running = False

    def close(self):
        pass


class Rig:
    """A guard, an arm that does what it is told, and whoever talks to them."""

    def __init__(self, embodiment, require_preflight=False, start=None, contract=True, settle=0.0, **config):
        self.bus, self.embodiment = Bus(), embodiment
        required = {"require_preflight": require_preflight, "settle": settle}
        self.node = GuardNode(self.bus, replace(CONFIG, **config), embodiment, **required)
        self.bus.on_stop(self.node.on_stop)
        self.joint = self.node.robot.space.name == "joint"
        self.x = np.array(start if start is not None else ([0.0, 0.5] if self.joint else START), float)
        self.orientation = np.array([0.0, 1.0, 0.0, 0.0])
        self.measure, self.commands, self.names = True, [], ["shoulder", "elbow"]
        if contract:
            self.contract()
        self.state()

    def contract(self, hash=HASH, **changes):
        values = {"embodiment": {**self.embodiment, **changes}, "hash": hash}
        self.bus.send(topics.CONTRACT, m.json_to_ros(message, values))

    def state(self, **positions):
        now = self.bus.now()
        if self.joint:
            found = {**dict(zip(("shoulder", "elbow"), self.x, strict=True)), "finger": 0.5, **positions}
            self.bus.send("/joint_states", m.joints_to_ros(message, now, found))
        else:
            self.bus.send("/tool_pose", m.pose_to_ros(message, now, self.x[:3], "base_link", self.orientation))

    def follow(self):
        """Do what the newest command says; a twist is integrated."""
        sent = self.bus.sent[self.node.robot.driver.command_topic]
        for command in sent[len(self.commands) :]:
            self.commands.append(command)
            kind = self.node.robot.driver.command
            if kind == "joint_trajectory":
                self.x = np.array(command.points[0].positions)
            elif kind == "position_array":
                self.x = m.array_from_ros(command)
            elif kind == "pose":
                self.x, self.orientation = m.pose_from_ros(command)
            else:
                linear, angular = m.twist_from_ros(command)
                self.x = self.x + TICK * linear
                self.orientation = multiply(exponential(TICK * angular), self.orientation)
        if self.measure:
            self.state()

    def run(self, seconds):
        self.bus.advance(seconds, self.follow)
        return self

    def arm(self):
        self.bus.send(topics.ARM, message(m.BOOL, data=True))
        return self.said

    def disarm(self):
        self.bus.send(topics.ARM, message(m.BOOL, data=False))
        return self

    def chunk(self, values, gripper=None, id=1, source="policy", dt=None, frame="base_link"):
        robot, stamp = self.node.robot, self.bus.now()
        values, dt = np.atleast_2d(values), dt or robot.action_dt
        motion = topics.CHUNK if source == "policy" else topics.TELEOP
        closing = topics.CHUNK_GRIPPER if source == "policy" else topics.TELEOP_GRIPPER
        if gripper is not None:
            rows = np.full((len(values), 1), gripper)
            self.bus.send(closing, m.joint_chunk_to_ros(message, stamp, dt, ["grip"], rows, "positions", id))
        delta = robot.motion.mode == "delta"
        if self.joint:
            quantity = "velocities" if delta else "positions"
            sent = m.joint_chunk_to_ros(message, stamp, dt, self.names, values, quantity, id)
        else:
            sent = m.cartesian_chunk_to_ros(message, stamp, dt, "hand", frame, values, delta, id)
        self.bus.send(motion, sent)

    @property
    def said(self):
        return m.json_from_ros(self.bus.sent[topics.GUARD_STATE][-1])

    @property
    def diagnosed(self):
        return m.diagnostics_from_ros(self.bus.sent[topics.DIAGNOSTICS][-1])["guard"]


# ---- what comes out


@pytest.mark.parametrize(("command", "kind"), [("joint_trajectory", m.JOINT_TRAJECTORY), ("position_array", m.ARRAY)])
def test_joint_commands_go_out_as_the_driver_wants_them(command, kind):
    rig = Rig(joint_arm(command))
    topic = rig.node.robot.driver.command_topic
    assert rig.bus.types[topic] == kind
    assert rig.arm()["state"] == "ARMED"
    goal = np.array([0.2, 0.3])
    for i in range(8):
        rig.chunk(np.tile(goal, (4, 1)), gripper=1.0, id=i + 1)
        rig.run(0.1)
    np.testing.assert_allclose(rig.x, goal, atol=1e-6)
    assert len(rig.commands) >= 0.8 / TICK - 2, "one per tick"
    if command == "joint_trajectory":
        assert list(rig.commands[0].joint_names) == ["shoulder", "elbow"]
        assert rig.commands[0].points[0].time_from_start.nanosec == round(TICK * 1e9)
        positions = np.array([c.points[0].positions for c in rig.commands])
        velocities = np.array([c.points[0].velocities for c in rig.commands])
        stamps = np.array([m.stamp_of(c) for c in rig.commands])
        np.testing.assert_allclose(np.diff(stamps), TICK, atol=1e-6)
        middle = 0.5 * (velocities[1:] + velocities[:-1])
        np.testing.assert_allclose(np.diff(positions, axis=0) / TICK, middle, atol=0.03), "the path's own velocity"
        assert np.abs(velocities).max() > 0.1 and np.abs(velocities[-1]).max() < 1e-6
    grip = rig.bus.sent["/gripper_controller/joint_trajectory"]
    assert len(grip) == 1 and list(grip[0].joint_names) == ["finger"], "sent when it changes"
    assert list(grip[0].points[0].positions) == [1.0]


def test_poses_keep_the_measured_orientation_where_actions_do_not_turn():
    rig = Rig(tool_arm())
    rig.arm()
    rig.chunk(np.full((4, 3), 0.002))
    rig.run(0.02)
    position, orientation = m.pose_from_ros(rig.commands[-1])
    np.testing.assert_array_equal(orientation, [0.0, 1.0, 0.0, 0.0])
    assert np.all(position > START) and rig.commands[-1].header.frame_id == "base_link"


def test_poses_turn_where_actions_do():
    rig = Rig(tool_arm(rotation=True))
    assert rig.arm()["state"] == "ARMED"
    for i in range(6):
        rig.chunk(np.tile([0.0, 0.0, 0.0, 0.0, 0.0, 0.01], (8, 1)), id=i + 1)
        rig.run(0.0625)
    turned = logarithm(multiply(rig.orientation, np.array([0.0, -1.0, 0.0, 0.0])))
    assert turned[2] > 0.15 and np.abs(turned[:2]).max() < 1e-6, "about the base's z"
    step = m.executed_from_ros(rig.bus.sent[topics.EXECUTED][-1], rotation=True)
    assert step.target.shape == (7,) and step.delta.shape == (6,)
    assert step.delta[5] == pytest.approx(0.01)


@pytest.mark.parametrize("rotation", [False, True])
def test_twists_are_the_velocity_of_the_tracked_path_and_end_with_zero(rotation):
    rig = Rig(tool_arm("twist", rotation))
    assert rig.bus.types["/servo_node/delta_twist_cmds"] == m.TWIST
    rig.arm()
    rig.x = np.array(START)
    delta = [0.004, 0.0, 0.0, 0.0, 0.0, 0.02][: 6 if rotation else 3]
    for i in range(6):
        rig.chunk(np.tile(delta, (8, 1)), id=i + 1)
        rig.run(0.0625)
    rig.run(0.2)
    assert rig.said["state"] == "HOLDING"
    moved = sum(m.executed_from_ros(e, rotation).delta for e in rig.bus.sent[topics.EXECUTED])
    speeds = np.array([np.concatenate(m.twist_from_ros(c)) for c in rig.commands])
    assert rig.x[0] - START[0] == pytest.approx(moved[0], abs=0.01) and moved[0] > 0.05
    assert np.all(speeds[-1] == 0.0), "holding is a zero twist, again and again"
    assert np.any(speeds[:, 5]) == rotation
    sent = rig.bus.sent["/servo_node/delta_twist_cmds"]
    count = len(sent)
    rig.disarm().run(0.1)
    assert len(sent) == count + 1 and not np.any(np.concatenate(m.twist_from_ros(sent[-1])))
    rig.run(0.1)
    assert len(sent) == count + 1, "an idle guard sends nothing"


def test_driver_section_names_topics_and_forms():
    rig = Rig(joint_arm("position_array", command_topic="/arm/commands", joints_topic="/arm/states"))
    assert rig.bus.types["/arm/commands"] == m.ARRAY and "/arm/states" in rig.bus.readers
    with pytest.raises(ValueError, match="pose cannot carry arm"):
        Rig(joint_arm("pose"))


def test_a_gripper_command_goes_out_where_the_driver_wants_one():
    rig = Rig(joint_arm(gripper="gripper_command"))
    rig.arm()
    rig.chunk(np.tile(rig.x, (4, 1)), gripper=1.0)
    rig.run(0.1)
    sent = rig.bus.sent["/gripper_controller/gripper_cmd"]
    assert [m.gripper_command_from_ros(g) for g in sent] == [1.0]


def test_executed_steps_say_whose_and_which():
    rig = Rig(joint_arm(reference="commanded"))
    rig.arm()
    rig.chunk(np.full((6, 2), 0.01), gripper=0.75, id=9)
    begin = rig.bus.now()
    rig.run(0.2)
    steps = [m.executed_from_ros(e) for e in rig.bus.sent[topics.EXECUTED]]
    assert [s.index for s in steps][:3] in ([0, 1, 2], [1, 2, 3])
    assert {(s.id, s.source, s.gripper) for s in steps} == {(9, "policy", 0.75)}
    assert all(abs(s.stamp - s.chunk - s.index * 0.05) <= 2 * TICK for s in steps), "when it began on the wire"
    assert steps[0].chunk == pytest.approx(begin, abs=1e-6)
    np.testing.assert_allclose(sum(s.delta for s in steps), steps[-1].target - [0.0, 0.5], atol=1e-9)


# ---- whose limits, whose contract


def test_contract_of_another_robot_refuses_to_arm_naming_the_field():
    rig = Rig(joint_arm(), contract=False)
    other = copy.deepcopy(joint_arm())
    other["action"][0]["unit"] = "deg"
    other["limits"] = None
    other["robot"] = "other words"
    del other["driver"]
    rig.bus.send(topics.CONTRACT, m.json_to_ros(message, {"embodiment": other, "hash": HASH}))
    said = rig.arm()
    assert said["state"] == "IDLE"
    assert "action.arm.unit is 'deg' for the policy and 'm' here" in said["refused"]
    assert "limits" not in said["refused"] and "driver" not in said["refused"] and "words" not in said["refused"]
    rig.contract("b" * 64)
    assert rig.arm()["state"] == "ARMED", "another policy, the right one, before anything moved"


def test_the_guards_limits_are_its_own_files():
    rig = Rig(joint_arm(), contract=False)
    generous = {"joints": {**JOINT_LIMITS, "velocity": [99.0, 99.0]}}
    rig.contract(limits=generous)
    assert rig.arm()["state"] == "ARMED"
    np.testing.assert_array_equal(rig.node.robot.limits.joints.velocity, [2.0, 2.0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda e: e["cameras"].append(e["cameras"][0]),
            "cameras is [corner, corner] for the policy and [corner] here",
        ),
        (lambda e: e["state"][0].update(low=[-9, -9]), "state.arm.low.0 is -9 for the policy and -2 here"),
        (lambda e: e.update(action_dt=0.1), "action_dt is 0.1 for the policy and 0.05 here"),
        (lambda e: e.pop("obs_dt"), "obs_dt is None for the policy and 0.05 here"),
        (lambda e: e.update(new=1), "new is 1 for the policy and None here"),
    ],
)
def test_contract_differences_are_named(change, says):
    theirs = copy.deepcopy(joint_arm())
    change(theirs)
    assert any(said.startswith(says) for said in contract_differences(joint_arm(), theirs))
    assert contract_differences(joint_arm(), {**joint_arm(), "limits": None, "robot": "x"}) == []


def test_a_policy_that_joins_an_armed_human_stops_nobody_and_counts_after_disarming():
    rig = Rig(joint_arm(), contract=False)
    rig.arm()
    rig.run(0.05)
    rig.contract()
    rig.run(0.05)
    assert rig.said["state"] == "ARMED" and rig.node.hash == ""
    rig.disarm().run(0.1)
    assert rig.arm()["state"] == "ARMED" and rig.node.hash == HASH


def test_another_contract_while_armed_is_a_fault_and_counts_after_disarming():
    rig = Rig(joint_arm())
    rig.arm()
    rig.run(0.05)
    rig.contract("b" * 64)
    assert rig.said["state"] == "FAULT"
    assert rig.said["reason"] == f"the contract changed from {'a' * 12} to {'b' * 12}"
    assert "disarm, and the new one counts" in rig.arm()["refused"]
    rig.disarm().run(0.1)
    assert rig.arm()["state"] == "ARMED" and rig.node.hash == "b" * 64


def test_the_same_contract_again_is_no_news():
    rig = Rig(joint_arm())
    rig.arm()
    rig.contract()
    assert rig.said["state"] == "ARMED"


def test_chunks_of_a_policy_without_a_contract_are_refused_but_a_human_needs_none():
    rig = Rig(joint_arm(), contract=False)
    assert rig.arm()["state"] == "ARMED"
    rig.chunk(np.tile(rig.x, (4, 1)), gripper=1.0)
    assert any("a chunk before its contract on /dita/contract" in text for _, text in rig.bus.logged)
    assert rig.node.guard.counts["R0"] == 1
    rig.bus.send(topics.TAKEOVER, m.json_to_ros(message, {"active": True}))
    rig.run(0.02)
    rig.chunk(np.tile(rig.x + 0.05, (8, 1)), gripper=1.0, source="teleop")
    rig.run(0.2)
    assert {m.executed_from_ros(e).source for e in rig.bus.sent[topics.EXECUTED]} == {"teleop"}


@pytest.mark.parametrize(
    ("verdict", "says"),
    [
        (None, "no preflight yet"),
        ({"passed": True, "contract": "c" * 64, "items": []}, "passed for contract cccccccccccc"),
        ({"passed": True, "contract": HASH, "embodiment": "ur5e", "items": []}, "passed for ur5e, but this is planar"),
        (
            {
                **{"passed": False, "contract": HASH},
                "items": [{"name": "units", "verdict": "failed", "mistake": "degrees"}, {"name": "x", "verdict": "ok"}],
            },
            "preflight failed: degrees",
        ),
    ],
)
def test_without_a_passed_preflight_it_does_not_arm(verdict, says):
    rig = Rig(joint_arm(), require_preflight=True)
    if verdict is not None:
        rig.bus.send(topics.PREFLIGHT, m.json_to_ros(message, verdict))
    said = rig.arm()
    assert said["state"] == "IDLE" and says in said["refused"]
    good = {"passed": True, "contract": HASH, "embodiment": "planar", "items": []}
    rig.bus.send(topics.PREFLIGHT, m.json_to_ros(message, good))
    assert rig.arm()["state"] == "ARMED"


def test_embodiment_files_are_read_with_their_kinematics(tmp_path):
    arm = joint_arm()
    arm["limits"] = {**arm["limits"], "urdf": "planar.urdf", "tool": "lower", "max_speed": 1.0}
    (tmp_path / "planar.urdf").write_text(URDF)
    path = tmp_path / "planar.json"
    path.write_text(json.dumps(arm))
    robot, values = load_robot(path)
    assert robot.kinematics.joints == ("shoulder", "elbow") and values == arm
    np.testing.assert_allclose(robot.kinematics.tool(np.array([0.0, 0.5]))[0], [0.4, 0, 0])
    yaml_path = tmp_path / "planar.yaml"
    yaml_path.write_text(json.dumps(arm))
    assert load_robot(yaml_path)[0].kinematics.joints == robot.kinematics.joints
    arm["driver"]["joints"] = ["elbow", "shoulder"]
    path.write_text(json.dumps(arm))
    with pytest.raises(ValueError, match=r"urdf moves shoulder, elbow; driver\.joints must be the same in order"):
        load_robot(path)
    arm["limits"]["tool"] = None
    path.write_text(json.dumps(arm))
    with pytest.raises(ValueError, match="tool names the link"):
        load_robot(path)
    yaml_path.write_text("a: [")
    with pytest.raises(ValueError, match=r"planar\.yaml: not YAML"):
        load_robot(yaml_path)
    yaml_path.write_text("[]")
    with pytest.raises(ValueError, match="an embodiment is a mapping, got list"):
        load_robot(yaml_path)
    with pytest.raises(FileNotFoundError):
        load_robot(tmp_path / "none.json")


def test_limits_missing_for_a_joint_are_named_before_anything_joins():
    arm = joint_arm()
    arm["limits"] = {"joints": {**JOINT_LIMITS, "jerk": [2000.0, None]}}
    with pytest.raises(ValueError, match=r"no limits\.joints\.jerk for elbow"):
        Rig(arm)


# ---- what is measured


def test_joints_are_mapped_by_name_whatever_their_order():
    rig = Rig(joint_arm())
    rig.bus.send("/joint_states", m.joints_to_ros(message, T0 + 0.01, {"finger": 0.0, "elbow": 0.7, "shoulder": -0.1}))
    rig.bus.wall += 0.02
    assert rig.arm()["state"] == "ARMED"
    np.testing.assert_array_equal(rig.node.guard.goal, [-0.1, 0.7])
    rig.names = ["elbow", "shoulder"]
    rig.x = np.array([-0.1, 0.7])
    for i in range(4):
        rig.chunk(np.tile([0.6, -0.2], (4, 1)), gripper=0.0, id=i + 1)
        rig.run(0.1)
    np.testing.assert_allclose(rig.x, [-0.2, 0.6], atol=1e-3)


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["shoulder", "finger"], "joints shoulder where shoulder, elbow are expected: missing elbow"),
        (["shoulder", "elbow", "wrist"], "shoulder, elbow, wrist where shoulder, elbow are expected: unknown wrist"),
        (["shoulder", "elbow", "elbow"], "unique names, got elbow twice"),
    ],
)
def test_missing_extra_and_duplicate_joints_refuse_to_arm_and_fault_mid_run(names, says):
    rig = Rig(joint_arm())
    bad = message(m.JOINT_STATE, name=names, position=np.zeros(len(names)))
    bad.header.stamp = m.stamp_to_ros(message, T0 + 0.001)
    rig.bus.send("/joint_states", bad)
    said = rig.arm()
    assert said["state"] == "IDLE" and says in said["refused"] and "/joint_states" in said["refused"]
    rig.run(0.02)
    assert rig.arm()["state"] == "ARMED", "good again"
    rig.run(0.02)
    rig.bus.send("/joint_states", bad)
    assert rig.said["state"] == "FAULT" and says in rig.said["reason"]
    assert says in rig.diagnosed["message"] and rig.diagnosed["level"] == 2, "at once, not at the next second"


def test_joint_states_of_another_robot_are_shown_when_ours_do_not_come():
    rig = Rig(joint_arm())
    rig.measure = False
    rig.bus.send("/joint_states", m.joints_to_ros(message, T0 + 0.01, {"joint_1": 0.0, "joint_2": 0.0}))
    assert "/joint_states has joint_1, joint_2, but the arm's joints are shoulder, elbow" in rig.arm()["refused"]


def test_a_gripper_that_publishes_by_itself_is_no_stranger():
    rig = Rig(joint_arm())
    rig.bus.send("/joint_states", m.joints_to_ros(message, T0 + 0.01, {"finger": 0.25}))
    assert rig.arm()["state"] == "ARMED"


def test_stale_state_is_a_fault_said_at_once():
    rig = Rig(joint_arm())
    rig.arm()
    rig.run(0.05)
    rig.measure = False
    rig.run(0.15)
    assert rig.said["state"] == "FAULT" and "state older than 0.1 s" in rig.said["reason"]
    assert rig.diagnosed["message"].startswith("FAULT: state older than")
    assert {"periodicity.average", "execution_time.average", "overruns"} <= set(rig.diagnosed["values"])


@pytest.mark.parametrize("mode", ["protective_stop", "emergency_stop"])
def test_a_stopped_driver_is_a_fault_and_refuses_to_arm(mode):
    rig = Rig(joint_arm())
    rig.arm()
    rig.bus.send("/driver/mode", message(m.STRING, data=mode))
    assert rig.said["state"] == "FAULT" and mode in rig.said["reason"]
    rig.run(0.3)
    assert mode in rig.arm()["refused"]
    rig.bus.send("/driver/mode", message(m.STRING, data="running"))
    rig.run(0.05)
    assert rig.said["state"] == "FAULT", "no motion on release"
    assert rig.arm()["state"] == "ARMED"


# ---- who else is there


@pytest.mark.parametrize("controller", ["joint_trajectory_controller", "gripper_controller"])
def test_a_second_commander_is_a_fault_by_name_within_200_ms(controller):
    rig = Rig(joint_arm())
    rig.arm()
    rig.bus.others[f"/{controller}/joint_trajectory"] = ["rogue"]
    rig.run(0.1)
    assert rig.said["state"] == "FAULT" and "rogue" in rig.said["reason"]
    rig.run(0.2)
    assert "rogue" in rig.arm()["refused"]


def test_a_second_guard_is_a_second_commander():
    rig = Rig(joint_arm())
    rig.arm()
    rig.bus.others["/joint_trajectory_controller/joint_trajectory"] = ["guard"]
    rig.run(0.1)
    assert rig.said["state"] == "FAULT" and "guard" in rig.said["reason"]


def test_a_source_that_is_gone_holds_only_while_it_is_active():
    rig = Rig(joint_arm())
    rig.arm()
    rig.run(0.02)
    rig.bus.alive[topics.TELEOP](0)
    assert rig.said["state"] == "ARMED"
    rig.bus.alive[topics.CHUNK](0)
    assert (rig.said["state"], rig.said["reason"]) == ("HOLDING", "the policy is gone")
    rig.run(1.1)
    assert rig.said["state"] == "FAULT"


def test_a_jump_of_the_wall_clock_holds_until_there_is_fresh_data():
    rig = Rig(joint_arm())
    rig.arm()
    rig.chunk(np.tile([0.1, 0.6], (8, 1)), gripper=1.0)
    rig.run(0.05)
    rig.bus.wall -= 10.0
    rig.run(TICK)
    assert rig.said["state"] == "HOLDING" and "wall clock jumped by -10" in rig.said["reason"]
    rig.run(0.3)
    assert np.abs(rig.commands[-1].points[0].velocities).max() < 1e-12
    assert m.stamp_of(rig.commands[-1]) == pytest.approx(rig.bus.now(), abs=2 * TICK), "on the new clock"
    rig.chunk(np.tile([0.1, 0.6], (8, 1)), gripper=1.0, id=2)
    rig.run(0.1)
    assert rig.said["state"] == "ARMED" and rig.node.guard.counts["envelope_stops"] == 0


def test_a_source_that_no_longer_gives_signs_of_life_is_held_although_its_chunk_goes_on():
    rig = Rig(joint_arm())
    rig.arm()
    rig.chunk(np.tile([0.1, 0.6], (40, 1)), gripper=1.0)
    for _ in range(10):
        rig.bus.send(topics.HEARTBEAT, message(m.STRING, data="policy"))
        rig.run(0.05)
    assert rig.said["state"] == "ARMED"
    rig.run(0.12)
    assert rig.said["state"] == "HOLDING" and "no sign of life from policy" in rig.said["reason"]


def test_a_state_from_the_future_is_a_fault_as_it_arrives_and_refuses_to_arm():
    rig = Rig(joint_arm())
    rig.arm()
    rig.run(0.05)
    found = {"shoulder": 0.0, "elbow": 0.5, "finger": 0.5}

    def measured(ahead):
        rig.bus.send("/joint_states", m.joints_to_ros(message, rig.bus.now() + ahead, found))
        return rig.said

    assert measured(0.045)["state"] == "ARMED"
    said = measured(0.055)  # no tick between: by the next one its age would be inside the bound
    assert (
        said["state"] == "FAULT" and "0.055 s in the future: compare the clocks of the driver's host" in said["reason"]
    )
    rig.measure = False
    rig.run(0.3)
    measured(0.055)
    rig.run(2 * TICK)
    assert "0.055 s in the future" in rig.arm()["refused"]
    rig.run(0.1)
    measured(0.0)
    assert rig.arm()["state"] == "ARMED"


def test_a_policy_that_must_not_act_is_held_and_says_why():
    def state(rig, ok, reason="", reaction=""):
        values = {"ok": ok, "reason": reason, "reaction": reaction}
        rig.bus.send(topics.POLICY_STATE, m.json_to_ros(message, values))
        return rig.said

    rig = Rig(joint_arm())
    rig.arm()
    rig.run(0.05)
    assert state(rig, True)["state"] == "ARMED"
    said = state(rig, False, "camera corner repeats its picture", "R2")
    assert (said["state"], said["reason"]) == ("HOLDING", "policy: camera corner repeats its picture")
    assert state(rig, False, "corner is 0.5 s in the future", "R3")["state"] == "FAULT"
    rig.run(0.3)
    assert "policy: corner is 0.5 s in the future" in rig.arm()["refused"]
    state(rig, True)
    assert rig.arm()["state"] == "ARMED"
    rig.bus.send(topics.TAKEOVER, m.json_to_ros(message, {"active": True}))
    assert state(rig, False, "no instruction", "R2")["state"] == "ARMED", "a human drives"
    state(rig, False, "no reaction")
    assert any("ok, reason and reaction" in text for _, text in rig.bus.logged)


def policy_says(rig, ok, reason="", reaction=""):
    values = {"ok": ok, "reason": reason, "reaction": reaction}
    rig.bus.send(topics.POLICY_STATE, m.json_to_ros(message, values))


def test_what_stood_before_arming_holds_if_the_policy_does_not_take_it_back():
    rig = Rig(joint_arm())
    policy_says(rig, False, "corner frozen: 5 identical images while the arm moved", "R2")
    rig.run(5.0)
    assert rig.arm()["state"] == "ARMED"
    assert rig.run(0.9).said["state"] == "ARMED", "being asked to act may resolve it"
    said = rig.run(0.2).said
    assert (said["state"], said["reason"].split(":")[0]) == ("HOLDING", "policy")
    assert "frozen" in said["reason"]
    rig.run(2.0)
    assert rig.said["state"] == "FAULT"
    rig.run(0.3)
    assert rig.arm()["state"] == "ARMED"
    assert rig.run(1.1).said["state"] == "HOLDING", "and so it is after every arming, while it stands"


def test_what_arming_resolves_holds_nothing():
    rig = Rig(joint_arm())
    policy_says(rig, False, "no observation: corner silent", "R2")
    rig.arm()
    rig.run(0.02)
    policy_says(rig, True)
    assert rig.run(3.0).said["state"] == "ARMED"
    rig = Rig(joint_arm())
    policy_says(rig, False, topics.NO_INSTRUCTION, "R2")
    rig.arm()
    assert rig.run(3.0).said["state"] == "ARMED", "somebody may still give one"
    rig = Rig(joint_arm())
    policy_says(rig, False, "the prediction failed: gone with its process", "R2")
    rig.bus.alive[topics.CHUNK](0)
    rig.arm()
    assert rig.run(3.0).said["state"] == "ARMED", "a policy that is gone says nothing any more"


def test_what_the_policy_said_while_a_human_drove_counts_once_it_is_handed_back():
    rig = Rig(joint_arm())
    rig.bus.send(topics.TAKEOVER, m.json_to_ros(message, {"active": True}))
    rig.arm()
    policy_says(rig, False, "the prediction failed: no memory", "R2")
    assert rig.run(2.0).said["state"] == "ARMED"
    rig.bus.send(topics.TAKEOVER, m.json_to_ros(message, {"active": False}))
    assert rig.run(0.9).said["state"] == "ARMED"
    said = rig.run(0.2).said
    assert (said["state"], said["reason"]) == ("HOLDING", "policy: the prediction failed: no memory")


@pytest.mark.parametrize(("arm", "topic"), [(joint_arm, "/joint_states"), (tool_arm, "/tool_pose")])
def test_a_lost_state_does_not_keep_the_next_ones_waiting(arm, topic):
    requested = Rig(arm()).bus.requested[topic]
    assert not requested.reliable
    assert STATE.satisfies(requested), "ros2_control's joint_state_broadcaster and the twin offer reliable"
    assert SENSOR.satisfies(requested), "and a driver that offers best effort is understood, too"


def test_qos_mismatches_are_said_in_log_and_diagnostics():
    rig = Rig(joint_arm())
    rig.bus.mismatch("QoS mismatch on /joint_states (reliability): driver offers best effort")
    assert rig.diagnosed["values"]["mismatch 0"].startswith("QoS mismatch on /joint_states")
    assert ("error", rig.diagnosed["values"]["mismatch 0"]) in rig.bus.logged


# ---- the operator


def test_arming_is_a_service_where_the_bus_has_services():
    rig = Rig(joint_arm(), require_preflight=True)
    kind, call = rig.bus.services[topics.ARM]
    assert kind == "std_srvs/srv/SetBool"
    answer = call(SimpleNamespace(data=True))
    assert answer["success"] is False and "no preflight yet" in answer["message"]
    good = {"passed": True, "contract": HASH, "items": []}
    rig.bus.send(topics.PREFLIGHT, m.json_to_ros(message, good))
    assert call(SimpleNamespace(data=True)) == {"success": True, "message": "ARMED"}
    assert call(SimpleNamespace(data=False)) == {"success": True, "message": "IDLE"}


def test_a_bus_without_services_says_so():
    bus = Bus()
    hidden = SimpleNamespace(**{n: getattr(bus, n) for n in dir(bus) if not n.startswith("__") and n != "service"})
    GuardNode(hidden, CONFIG, joint_arm(), require_preflight=False)
    assert any("no services on this bus" in text for _, text in bus.logged)


def test_a_human_takes_over_and_hands_back_without_a_jump():
    rig = Rig(joint_arm())
    rig.arm()
    rig.chunk(np.tile([0.2, 0.7], (8, 1)), gripper=1.0)
    rig.run(0.1)
    rig.bus.send(topics.TAKEOVER, m.json_to_ros(message, {"active": True}))
    assert rig.said["source"] == "teleop"
    rig.run(0.02)
    dropped = rig.node.guard.counts["R0"]
    rig.chunk(np.tile([1.0, 1.0], (8, 1)), gripper=1.0, id=2)
    assert rig.node.guard.counts["R0"] == dropped + 1
    rig.chunk(np.tile([0.1, 0.6], (8, 1)), gripper=1.0, id=1, source="teleop")
    rig.run(0.2)
    rig.bus.send(topics.TAKEOVER, m.json_to_ros(message, {"active": False}))
    assert rig.said["source"] == "policy"
    rig.run(0.02)
    rig.chunk(np.tile([0.2, 0.7], (8, 1)), gripper=1.0, id=3)
    rig.run(0.2)
    velocities = np.array([c.points[0].velocities for c in rig.commands])
    assert np.abs(np.diff(velocities, axis=0)).max() <= 20.0 * TICK + 1e-9, "no more than the acceleration allows"
    assert rig.node.guard.counts["envelope_stops"] == 0


def test_speed_scales_what_goes_out():
    def peak(scale):
        rig = Rig(joint_arm())
        rig.bus.send(topics.SPEED, m.float_to_ros(message, scale))
        assert rig.said["speed"] == scale
        rig.arm()
        for i in range(5):
            rig.chunk(np.tile([0.25, 0.7], (8, 1)), gripper=1.0, id=i + 1)
            rig.run(0.1)
        return max(np.abs(c.points[0].velocities).max() for c in rig.commands)

    assert peak(0.1) <= 0.2 + 1e-9 < peak(1.0)


def test_a_chunk_waits_for_its_approval():
    rig = Rig(joint_arm())
    rig.bus.send(topics.APPROVAL, message(m.BOOL, data=True))
    assert rig.said["approval"] is True
    rig.arm()
    rig.chunk(np.tile([0.1, 0.6], (8, 1)), gripper=1.0, id=7)
    rig.run(0.05)
    assert rig.said["pending"] == 7 and rig.bus.sent[topics.EXECUTED] == []
    rig.bus.send(topics.APPROVE, m.json_to_ros(message, {"chunk": 7}))
    rig.run(0.1)
    assert {m.executed_from_ros(e).id for e in rig.bus.sent[topics.EXECUTED]} == {7}


@pytest.mark.parametrize(
    ("topic", "text"),
    [
        (topics.CONTRACT, "{"),
        (topics.CONTRACT, "[]"),
        (topics.CONTRACT, "{}"),
        (topics.CONTRACT, '{"hash": 3, "embodiment": {}}'),
        (topics.CONTRACT, '{"hash": "a", "embodiment": []}'),
        (topics.PREFLIGHT, '{"passed": "yes"}'),
        (topics.PREFLIGHT, "3"),
        (topics.TAKEOVER, '{"active": 1}'),
        (topics.TAKEOVER, "[]"),
        (topics.APPROVE, '{"chunk": "x"}'),
        (topics.APPROVE, "null"),
    ],
)
def test_what_makes_no_sense_is_refused_by_topic_and_ends_nothing(topic, text):
    rig = Rig(joint_arm())
    rig.arm()
    rig.bus.send(topic, message(m.STRING, data=text))
    assert rig.said["state"] == "ARMED" and rig.bus.stopper.error is None
    assert any(level == "error" and f"message refused on {topic}" in said for level, said in rig.bus.logged)


def test_a_stream_of_bad_messages_is_logged_once_a_second():
    rig = Rig(tool_arm())
    rig.orientation = np.zeros(4)
    rig.run(2.5)
    said = [text for _, text in rig.bus.logged if "orientation [0.0, 0.0, 0.0, 0.0] is not a unit quaternion" in text]
    assert len(said) == 3 and "message refused on /tool_pose" in said[0]
    assert "old" in rig.arm()["refused"], "what is refused is no state"
    assert rig.node.guard.counts["R0 message refused on /tool_pose"] > 300


@pytest.mark.parametrize("scale", [math.nan, 0.0, 1.5, -1.0])
def test_a_speed_that_makes_no_sense_changes_nothing(scale):
    rig = Rig(joint_arm())
    rig.bus.send(topics.SPEED, message(m.FLOAT, data=scale))
    assert rig.node.guard.speed_scale == 1.0
    assert any("message refused on /dita/speed" in text for _, text in rig.bus.logged)


@pytest.mark.parametrize("topic", [topics.CHUNK, topics.CHUNK_GRIPPER])
def test_halves_that_are_repeated_late_keep_no_others_from_meeting(topic):
    rig = Rig(joint_arm())
    rig.arm()
    sent = {name: [] for name in (topics.CHUNK, topics.CHUNK_GRIPPER)}
    send = rig.bus.send

    def between(name, message):  # the other half of an old chunk comes between the halves of each new one
        send(name, message)
        if name in sent:
            sent[name].append(message)
        if name == topics.CHUNK_GRIPPER:
            for old in sent[topic][-7:-1]:
                send(topic, old)

    rig.bus.send = between
    for i in range(12):
        rig.chunk(np.tile(rig.x, (4, 1)), gripper=1.0, id=i + 1)
        rig.run(0.05)
    assert rig.node.guard.buffer.counts["chunks"] == 12 and rig.said["state"] == "ARMED"
    assert sum(len(waiting) for waiting in rig.node._halves.values()) <= 16


def test_half_a_chunk_is_counted_when_it_comes_again_and_when_it_stays_alone():
    rig = Rig(joint_arm())
    rig.arm()
    counts, send = rig.node.guard.counts, rig.bus.send
    halves = []
    rig.bus.send = lambda name, message: send(name, message) if name != topics.CHUNK else halves.append(message)
    for i in range(9):
        rig.chunk(np.tile(rig.x, (4, 1)), gripper=1.0, id=i + 1)
        assert counts["R0 half of a chunk alone"] == (i == 8), "eight may wait"
        rig.run(0.02)
    for _ in range(3):
        send(topics.CHUNK, halves[0])  # its other half was the first to go
    assert counts["R0 half of a chunk again"] == 2 and rig.node.guard.buffer.counts["chunks"] == 0
    send(topics.CHUNK, halves[-1])
    assert rig.node.guard.buffer.counts["chunks"] == 1, "the newest still meet"


def test_broken_chunks_are_refused_by_what_is_wrong_with_them():
    rig = Rig(joint_arm())
    rig.arm()
    rig.names = ["shoulder", "wrist"]
    rig.chunk(np.tile(rig.x, (4, 1)), gripper=1.0)
    rig.names = ["shoulder", "elbow"]
    rig.chunk(np.zeros((0, 2)), gripper=1.0)
    rig.chunk(np.tile(rig.x, (1025, 1)), gripper=1.0)
    said = " ".join(text for _, text in rig.bus.logged)
    assert "missing elbow, unknown wrist" in said and "at least one point" in said
    assert "a chunk of 1025 steps; at most 1024" in said
    tool = Rig(tool_arm())
    tool.chunk(np.zeros((4, 3)), frame="tool0")
    assert any("a chunk in frame 'tool0'; it must be 'base_link'" in text for _, text in tool.bus.logged)


# ---- leaving


def test_an_exception_in_a_callback_brakes_first_and_then_leaves():
    rig = Rig(joint_arm())
    rig.arm()
    for i in range(3):
        rig.chunk(np.tile([0.5, 1.0], (8, 1)), gripper=1.0, id=i + 1)
        rig.run(0.1)
    speed = np.abs(rig.commands[-1].points[0].velocities).max()
    assert speed > 0.2

    def broken(message):
        raise ZeroDivisionError("a mistake of ours")

    rig.bus.readers["/joint_states"].insert(0, broken)
    rig.state()
    states = [m.json_from_ros(s) for s in rig.bus.sent[topics.GUARD_STATE]]
    assert any(s["state"] == "FAULT" and "ZeroDivisionError: a mistake of ours" in s["reason"] for s in states)
    rig.bus.readers["/joint_states"].pop(0)
    rig.run(1.0)
    assert not rig.bus.running, "it left"
    velocities = np.array([c.points[0].velocities for c in rig.commands])
    assert np.abs(np.diff(velocities, axis=0)).max() <= 20.0 * TICK + 1e-9, "decelerated within its limits"
    assert np.abs(velocities[-1]).max() < 0.01
    assert isinstance(rig.bus.stopper.error, ZeroDivisionError)


def test_stopping_decelerates_and_then_leaves():
    rig = Rig(joint_arm())
    rig.arm()
    for i in range(3):
        rig.chunk(np.tile([0.5, 1.0], (8, 1)), gripper=1.0, id=i + 1)
        rig.run(0.1)
    rig.node.stop()
    assert rig.bus.running
    rig.run(1.0)
    assert not rig.bus.running and np.abs(rig.commands[-1].points[0].velocities).max() < 0.01
    idle = Rig(joint_arm())
    idle.node.stop()
    idle.run(0.05)
    assert not idle.bus.running


def test_a_guard_that_cannot_come_to_rest_leaves_anyway():
    rig = Rig(joint_arm())
    rig.arm()
    rig.node.guard.tick = lambda now, periods: (None, None)
    type(rig.node.guard.tracker).moving, before = property(lambda self: True), type(rig.node.guard.tracker).moving
    try:
        rig.node.stop()
        rig.run(3.5)
        assert rig.bus.running
        rig.run(1.0)
    finally:
        type(rig.node.guard.tracker).moving = before
    assert not rig.bus.running
    assert ("error", "still moving: left to the driver's timeout") in rig.bus.logged


# ---- an arm with its URDF


def panda(tmp_path, **limits):
    """Return the file of a joint-controlled Panda with the shipped URDF."""
    names = [f"panda_joint{i}" for i in range(1, 8)]
    urdf = Path(__file__).parent.parent / "configs" / "embodiment" / "urdf" / "panda.urdf"
    kinematics = Kinematics.from_urdf(urdf, "panda_hand_tcp")
    arm = {
        **{"name": "panda", "robot": "Panda", "obs_dt": 0.05, "action_dt": 0.05, "control_hz": 20.0, "cameras": []},
        "state": [field("joints", "joint_position", 7, -4, 4)],
        "action": [field("joints", "joint_position", 7, -4, 4)],
        "limits": {
            "joints": {
                **{"names": names, "low": kinematics.low.tolist(), "high": kinematics.high.tolist(), "max_lag": 0.5},
                **{"velocity": [2.0] * 7, "acceleration": [10.0] * 7, "jerk": [1000.0] * 7},
            },
            **{"urdf": str(urdf), "tool": "panda_hand_tcp", "ignore_pairs": [["panda_link1", "panda_link3"]]},
            **limits,
        },
        "driver": {"joints": names},
    }
    path = tmp_path / "panda.json"
    path.write_text(json.dumps(arm))
    return path


def drive(guard, start, goal, seconds):
    """Send absolute chunks toward a goal with an arm that follows; return every joint command."""
    now, x, sent = T0, np.array(start, float), []
    guard.on_state(now, x)
    guard.arm(now)
    for tick in range(round(seconds / TICK)):
        if tick % 16 == 0:
            share = np.clip((tick * TICK + 0.05 * np.arange(1, 9)) / 1.0, 0, 1)[:, None]
            guard.on_chunk(Chunk(now, 0.05, start + share * (goal - start), None, tick + 1), now)
        now += TICK
        guard.on_state(now, x)
        command, _ = guard.tick(now)
        x = command.configuration
        sent.append(x)
    return np.array(sent)


READY = np.array([0, -np.pi / 4, 0, -3 * np.pi / 4, 0, np.pi / 2, np.pi / 4])
DOWN = np.array([0, 0.6, 0, -2.1, 0, 2.7, np.pi / 4])  # the hand 0.35 m lower


def test_a_policy_that_drives_into_a_box_is_stopped_a_centimetre_before_it(tmp_path):
    box = {"low": [0.2, -0.5, -0.2], "high": [0.9, 0.5, 0.3]}
    robot, _ = load_robot(panda(tmp_path, keep_out=[box]))
    free, _ = load_robot(panda(tmp_path))
    boxes = [(box["low"], box["high"])]
    unhindered = drive(Guard(free, CONFIG), READY, DOWN, 1.5)
    assert min(free.kinematics.clearance(x, boxes)[0] for x in unhindered) < -0.02, "or this test shows nothing"
    guard = Guard(robot, CONFIG)
    sent = drive(guard, READY, DOWN, 1.5)
    nearest = min(robot.kinematics.clearance(x, boxes)[0] for x in sent)
    assert 0.01 - 1e-6 <= nearest < 0.08, "stopped before it, and not far off"
    assert "panda_hand and keep_out[0]" in guard.machine.reason


def test_joint_commands_keep_the_tools_speed(tmp_path):
    def peak(**limits):
        robot, _ = load_robot(panda(tmp_path, **limits))
        sent = drive(Guard(robot, CONFIG), READY, DOWN, 1.5)
        tools = np.array([robot.kinematics.tool(x)[0] for x in sent])
        return np.linalg.norm(np.diff(tools, axis=0), axis=1).max() / TICK

    assert peak(max_speed=0.2) <= 0.2 + 1e-6 < peak(max_speed=5.0)


def test_a_guard_that_has_just_joined_listens_before_it_arms():
    rig = Rig(joint_arm(), settle=0.5)
    assert "just joined and listens for 0.5 s" in rig.arm()["refused"] and rig.said["state"] == "IDLE"
    rig.run(0.51)
    assert rig.arm()["state"] == "ARMED"


def test_a_lost_sign_of_life_keeps_no_other_one_waiting():
    assert not Rig(joint_arm()).bus.requested[topics.HEARTBEAT].reliable


def test_a_guard_of_ros_parameters_listens_before_it_arms_too(tmp_path, monkeypatch):
    path = tmp_path / "arm.json"
    path.write_text(json.dumps(joint_arm()), encoding="utf-8")
    monkeypatch.setattr("robot_io.nodes.guard._take_priority", lambda: None)
    bus = Bus()
    values = {**asdict(CONFIG), "tick_hz": 1 / CONFIG.tick, "embodiment": str(path)}
    bus.param = lambda name, default: values.get(name, default)
    node = from_parameters(bus)
    with pytest.raises(ValueError, match="just joined and listens for 1 s"):
        node.arm()
