"""Keys -> chunks, and the operator's console: pure mappings, nodes with their topics by hand, a pseudo-terminal."""

import os
import pty
import re
import sys
import termios
from types import SimpleNamespace

import numpy as np
import pytest
from fake_robot import EMBODIMENT, field
from hypothesis import given, settings
from hypothesis import strategies as st
from test_recorder import DT, T0, HandBus, embodiment, make, vectors

from robot_io import messages as m
from robot_io.bus_dds import message
from robot_io.core.chunk_buffer import Chunk
from robot_io.core.guard import Guard, GuardConfig
from robot_io.core.limits import parse_robot
from robot_io.core.space import exponential
from robot_io.messages import ExecutedStep
from robot_io.nodes import operator as console_module
from robot_io.nodes.operator import Console, Screen, describe, guard_line, one_shot, picture, read_keys, terminal
from robot_io.nodes.teleop import (
    HOLD_S,
    ORDERS,
    SPEEDS,
    STEPS,
    TOP_ANGULAR,
    TOP_JOINT,
    TOP_LINEAR,
    Axes,
    Keys,
    TeleopNode,
    axes_of,
    chunk_rows,
    play,
)
from robot_io.nodes.topics import (
    APPROVE,
    ARM,
    CHUNK,
    EXECUTED,
    GUARD_STATE,
    RECORD,
    RECORD_STATE,
    SPEED,
    TAKEOVER,
    TELEOP,
    TELEOP_GRIPPER,
)

ROBOT = parse_robot(EMBODIMENT)
TOP = np.array([0.2, 0.3, 0.4, 0.5, 0.6, 0.7])


def keys():
    return Keys(Axes((), TOP))


# ---- keys


@pytest.mark.parametrize(
    ("key", "axis", "sign"),
    [(k, i // 2, 1 - 2 * (i % 2)) for i, k in enumerate(["w", "s", "a", "d", "r", "f", "u", "o", "i", "k", "j", "l"])],
)
def test_each_motion_key_moves_one_axis_one_way_for_a_moment(key, axis, sign):
    k = keys()
    assert k.press(key, 10.0) is None
    wanted = np.zeros(6)
    wanted[axis] = sign * SPEEDS[1] * TOP[axis]
    np.testing.assert_allclose(k.velocity(10.0), wanted)
    np.testing.assert_allclose(k.velocity(10.0 + 0.99 * HOLD_S), wanted)
    np.testing.assert_array_equal(k.velocity(10.0 + HOLD_S), np.zeros(6))


def test_two_axes_move_together_the_last_direction_counts_and_space_stops_at_once():
    k = keys()
    for key in ("w", "a", "s"):
        k.press(key, 0.0)
    assert k.velocity(0.1).tolist()[:3] == pytest.approx([-0.02, 0.03, 0])
    assert k.press(" ", 0.1) == "stop"
    assert not k.velocity(0.1).any()


def test_speed_keys_gripper_key_and_orders():
    k = keys()
    for level in "12345":
        k.press(level, 0.0)
        k.press("r", 0.0)
        assert k.velocity(0.0)[2] == pytest.approx(SPEEDS[int(level) - 1] * TOP[2])
    for key in ("6", "0", "9", "?", "\x1b", "é", "٣"):
        assert k.press(key, 0.0) is None
    assert k.level == 5 and k.open
    k.press("g", 0.0)
    assert not k.open
    assert {k.press(key, 0.0) for key in ORDERS} == set(ORDERS.values())


def test_a_three_axis_arm_ignores_rotation_keys_and_a_joint_arm_moves_the_chosen_joint():
    flat = Keys(Axes((), TOP[:3]))
    flat.press("u", 0.0)
    assert not flat.velocity(0.0).any()
    arm = Keys(Axes(("a", "b"), TOP[:2]))
    arm.press("w", 0.0)
    assert arm.velocity(0.0).tolist() == [pytest.approx(0.02), 0]
    arm.press("]", 0.5)
    arm.press("s", 0.5)
    assert arm.velocity(0.5).tolist() == [0, pytest.approx(-0.03)]
    arm.press("]", 0.5)
    assert arm.joint == 0
    arm.press("[", 0.5)
    assert arm.joint == 1
    arm.press("a", 0.9)
    assert not arm.velocity(0.9).any()


def test_top_speed_stays_inside_limits_and_inside_what_one_step_may_be():
    top = axes_of(ROBOT).top
    assert top.tolist() == [TOP_LINEAR] * 3  # 1.5 m/s and 10 mm per 12.5 ms allow more
    limits = {**EMBODIMENT["limits"], "max_speed": 0.1}
    slow = parse_robot({**EMBODIMENT, "limits": limits})
    np.testing.assert_allclose(axes_of(slow).top, 0.1 / np.sqrt(3))
    short = [field("hand_delta", "ee_position", 3, -0.001, 0.002, "commanded")]
    np.testing.assert_allclose(axes_of(parse_robot(embodiment(short))).top, 0.001 / DT)
    turning = axes_of(make("ee_rotation_axis_angle", "base", "commanded"))
    assert turning.top.tolist() == [TOP_LINEAR] * 3 + [TOP_ANGULAR] * 3
    joints = embodiment([field("arm", "joint_position", 2, -3, 3)])
    arm = axes_of(parse_robot(joints, need_limits=False))
    assert arm.top.tolist() == [TOP_JOINT] * 2 and len(arm.joints) == 2


# ---- chunks


@settings(max_examples=40)
@given(
    vectors, vectors, vectors, vectors, st.sampled_from(["base", "tool"]), st.sampled_from(["commanded", "measured"])
)
def test_whatever_a_delta_refers_to_the_tool_moves_at_the_velocity(position, turn, linear, angular, frame, reference):
    robot = make("ee_rotation_axis_angle", frame, reference)
    x = np.concatenate([position, exponential(turn)])
    velocity = np.concatenate([linear, angular])
    last = ExecutedStep(T0, 1, 0, T0, x, np.zeros(6), "teleop", 1.0)
    rows = chunk_rows(robot, velocity, T0 + DT, 3, last, x)
    np.testing.assert_allclose(robot.space.delta(x, rows[0]), robot.space.retract(x, velocity * DT), atol=1e-7)
    assert rows.shape == (3, 6)


def test_absolute_chunks_go_on_from_the_last_target_and_begin_where_the_arm_is():
    robot = make("", "base", None)
    velocity = np.array([0.1, 0, 0])
    last = ExecutedStep(T0, 1, 0, T0, np.array([0.5, 0, 0]), np.zeros(3), "teleop", 1.0)
    rows = chunk_rows(robot, velocity, T0 + 2 * DT, 3, last, np.zeros(3))
    np.testing.assert_allclose(rows[:, 0], 0.5 + 0.1 * DT * np.array([2, 3, 4]))
    rows = chunk_rows(robot, velocity, T0 + 2 * DT, 3, None, np.array([0.3, 0, 0]))
    np.testing.assert_allclose(rows[:, 0], 0.3 + 0.1 * DT * np.array([1, 2, 3]))
    rows = chunk_rows(make("", "base", "chunk_start"), velocity, T0 + DT, 2, last, np.array([0.4, 0, 0]))
    np.testing.assert_allclose(rows[:, 0], 0.1 + 0.1 * DT * np.array([1, 2]))
    with pytest.raises(ValueError, match="no measured configuration yet"):
        chunk_rows(robot, velocity, T0, 3, None, None)


def node(robot=ROBOT, instruction=""):
    bus = HandBus()
    return bus, TeleopNode(bus, robot, instruction)


def sent(bus, topic):
    return [value for t, value in bus.sent if t == topic]


def executed(bus, gripper, x=(0.1, 0.6, 0.2)):
    step = ExecutedStep(T0, 1, 0, bus.time, np.array(x), np.zeros(3), "policy", gripper)
    bus.hear(EXECUTED, m.executed_to_ros(message, step, DT, ["hand"], False))


def ready(bus):
    bus.hear("/tool_pose", m.pose_to_ros(message, bus.time, [0.1, 0.6, 0.2], "base_link"))
    bus.hear("/joint_states", m.joints_to_ros(message, bus.time, {"grip": 0.5}))


def test_nothing_is_sent_before_taking_over_and_after_handing_back():
    bus, teleop = node()
    ready(bus)
    (publish,) = bus.timers
    teleop.press("w")
    publish()
    assert not sent(bus, TELEOP)
    teleop.press("t")
    assert m.json_from_ros(sent(bus, TAKEOVER)[-1]) == {"active": True}
    publish()
    assert len(sent(bus, TELEOP)) == len(sent(bus, TELEOP_GRIPPER)) == 1
    teleop.press("t")
    assert m.json_from_ros(sent(bus, TAKEOVER)[-1]) == {"active": False}
    publish()
    assert len(sent(bus, TELEOP)) == 1


def test_chunks_lie_on_one_grid_move_while_a_key_is_held_and_hold_still_otherwise():
    bus, teleop = node()
    ready(bus)
    teleop.press("t")
    bus.time = T0 + 10.4 * DT
    teleop.press("w")
    bus.timers[0]()
    bus.time = T0 + 11.9 * DT
    bus.timers[0]()
    bus.time += 1
    bus.timers[0]()
    chunks = sent(bus, TELEOP)
    stamps = [m.stamp_of(c) for c in chunks]
    np.testing.assert_allclose(np.array(stamps[:2]) - T0, [10 * DT, 11 * DT], atol=1e-6)
    dt, rows = m.cartesian_chunk_from_ros(chunks[0], True)
    assert dt == pytest.approx(DT) and rows.shape == (STEPS, 3)
    np.testing.assert_allclose(rows, np.tile([SPEEDS[1] * TOP_LINEAR * DT, 0, 0], (STEPS, 1)), atol=1e-9)
    assert not m.cartesian_chunk_from_ros(chunks[2], True)[1].any()
    assert [m.chunk_id_of(c) for c in chunks] == [1, 2, 3]
    assert [m.stamp_of(c) for c in sent(bus, TELEOP_GRIPPER)] == stamps


@pytest.mark.parametrize(("last", "first", "after"), [(-1.0, -1.0, 1.0), (1.0, 1.0, -1.0), (None, 0.0, -1.0)])
def test_taking_over_leaves_the_gripper_as_it_is_until_g(last, first, after):
    bus, teleop = node()
    ready(bus)
    if last is not None:
        executed(bus, last)
    teleop.press("t")
    bus.timers[0]()
    values = [m.joint_chunk_from_ros(c, "effort")[1] for c in sent(bus, TELEOP_GRIPPER)]
    assert np.all(values[0] == first)
    if last is None:
        teleop.keys.open = True
    teleop.press("g")
    bus.timers[0]()
    assert np.all(m.joint_chunk_from_ros(sent(bus, TELEOP_GRIPPER)[-1], "effort")[1] == after)


def test_a_joint_arm_is_driven_by_name():
    joints = field("arm", "joint_position", 2, -3, 3)
    robot = parse_robot({**embodiment([joints], [joints]), "driver": {"joints": ["j1", "j2"]}}, need_limits=False)
    bus, teleop = node(robot)
    teleop.press("t")
    bus.timers[0]()
    assert not sent(bus, TELEOP) and teleop.note == "no measured configuration yet"
    bus.hear("/joint_states", m.joints_to_ros(message, T0, {"j2": 2.0, "other": 9.0, "j1": 1.0}))
    teleop.press("w")
    bus.timers[0]()
    (chunk,) = sent(bus, TELEOP)
    _, rows = m.joint_chunk_from_ros(chunk, "positions", ["j1", "j2"])
    np.testing.assert_allclose(rows[0], [1 + SPEEDS[1] * TOP_JOINT * DT, 2.0])
    assert "joint" in teleop.line()


def test_record_and_arm_keys_give_their_orders():
    bus, teleop = node(instruction="press it")
    for key in ("R", "S", "Z", "X", "E", "\n", "\x7f"):
        teleop.press(key)
    assert [m.json_from_ros(v) for v in sent(bus, RECORD)] == [
        {"command": "start", "instruction": "press it"},
        {"command": "stop", "success": True},
        {"command": "stop", "success": False},
        {"command": "discard"},
        {"command": "seal"},
    ]
    assert [v.data for v in sent(bus, ARM)] == [True, False]


def test_messages_that_make_no_sense_are_said_and_end_nothing():
    bus, teleop = node()
    bus.hear(EXECUTED, message(m.CARTESIAN_TRAJECTORY))
    bus.hear("/joint_states", message(m.JOINT_STATE, name=["a", "a"], position=[0, 0]))
    bus.hear(GUARD_STATE, message(m.STRING, data="{"))
    bus.hear(GUARD_STATE, message(m.STRING, data="3"))
    assert len([line for line in bus.lines if line[0] == "error"]) >= 4
    assert "no guard heard" in teleop.line()


def test_play_follows_keys_until_q():
    bus, teleop = node()
    bus.spin = lambda timeout_s: setattr(bus, "time", bus.time + timeout_s)
    typed = iter([["t"], ["w", "a"], [], ["q"]])
    shown = []
    play(teleop, lambda: next(typed), shown.append)
    assert teleop.active and teleop.leaving and teleop.keys.velocity(bus.time)[:2].all()
    assert next(typed, None) is None and shown and "HUMAN" in shown[-1]


# ---- terminals


def test_the_terminal_is_restored_after_an_error_and_escape_sequences_are_no_keys(monkeypatch):
    mine, theirs = pty.openpty()
    monkeypatch.setattr(sys, "stdin", os.fdopen(theirs, "r", closefd=False))
    before = termios.tcgetattr(theirs)
    with pytest.raises(RuntimeError), terminal() as read:
        assert not termios.tcgetattr(theirs)[3] & (termios.ICANON | termios.ECHO)
        os.write(mine, b"w\x1b[A\x1b[15~a\x1bOPg")
        typed = []
        for _ in range(100):
            typed += read()
            if len(typed) >= 3:
                break
        assert typed == ["w", "a", "g"]
        raise RuntimeError
    assert termios.tcgetattr(theirs) == before
    os.close(mine)
    os.close(theirs)


def test_without_a_terminal_it_says_what_to_do(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))
    with pytest.raises(ValueError, match="needs a terminal; for scripts: dita robot operator command=arm"), terminal():
        pass
    read, write = os.pipe()
    os.close(write)
    assert read_keys(read) == [], "the end of a file is no key and no endless loop"
    os.close(read)


# ---- the operator's console


class Guarded(HandBus):
    """A bus with a guard and a recorder that follow orders, some of them."""

    def __init__(self):
        super().__init__()
        self.state = {"state": "IDLE", "reason": "started", "refused": "", "source": "policy", "speed": 1.0}
        self.state.update(approval=False, pending=None)
        self.deaf = False

    def spin(self, timeout_s):
        self.time += timeout_s
        changes = {
            ARM: lambda v: {"state": "ARMED" if v.data else "IDLE"},
            TAKEOVER: lambda v: {"source": "teleop" if m.json_from_ros(v)["active"] else "policy"},
            SPEED: lambda v: {"speed": v.data},
            "/dita/approval": lambda v: {"approval": v.data},
            APPROVE: lambda v: {"pending": None} if m.json_from_ros(v)["chunk"] == self.state["pending"] else {},
        }
        for topic, value in self.sent:
            if topic in changes and not self.deaf:
                self.state.update(changes[topic](value))
            if topic == RECORD:
                said = {"state": "idle", "said": 2, "episodes": 3, "reason": f"got {value.data}"}
                self.hear(RECORD_STATE, m.json_to_ros(message, said))
        self.sent.clear()
        self.hear(GUARD_STATE, m.json_to_ros(message, self.state))


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("arm", "ARMED: started; policy is in control at 100% of the limits"),
        ("disarm", "IDLE"),
        ("takeover", "teleop is in control"),
        ("handback", "policy is in control"),
        ("slow", "at 25% of the limits"),
        ("speed:0.3", "at 30% of the limits"),
        ("approval:on", "policy is in control"),
        ("approve:17", "policy is in control"),
        ("reject:17", "policy is in control"),
        ("status", "chunk 17 waits for approval"),
        ("record:stop", '3 episodes; got {"command": "stop", "success": true}'),
        ("record:fail", 'got {"command": "stop", "success": false}'),
        ("record:seal", 'got {"command": "seal"}'),
    ],
)
def test_one_shot_orders_wait_until_they_are_followed(command, says):
    bus = Guarded()
    bus.state["pending"] = 17
    console = Console(bus, ROBOT)
    bus.hear(RECORD_STATE, m.json_to_ros(message, {"state": "recording", "said": 1}))
    text = one_shot(console, command)
    assert says in text
    assert bus.state["approval"] == (command == "approval:on")
    assert ("waits" in text) == (not command.endswith(":17") and not command.startswith("record"))


@pytest.mark.parametrize("command", ["arms", "speed:fast", "speed:2", "speed:0", "approve:x", "record:begin", ""])
def test_orders_that_are_none_are_named_before_anything_is_sent(command):
    bus = Guarded()
    with pytest.raises(ValueError, match=r"there are arm, disarm|give a number|a scale in"):
        one_shot(Console(bus, ROBOT), command)
    assert not bus.sent


def test_an_order_that_is_not_followed_says_what_the_guard_said(monkeypatch):
    monkeypatch.setattr(console_module, "ANSWER_S", 0.05)
    bus = Guarded()
    bus.deaf = True
    bus.state["refused"] = "not armed: no preflight yet"
    with pytest.raises(TimeoutError, match=r"arm: nothing within 0\.05 s; not armed: no preflight yet"):
        one_shot(Console(bus, ROBOT), "arm")


def chunk(n, id):
    rows = np.tile([0.001, 0.002, 0], (n, 1))
    return m.cartesian_chunk_to_ros(message, T0, DT, "hand_delta", "base_link", rows, True, id)


def screen():
    bus, tables = Guarded(), []
    return bus, Screen(Console(bus, ROBOT), tables.append), tables


def text_of(table):
    from rich.console import Console as Rich

    rich = Rich(width=140, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    rich.print(table)
    rich.file.close()
    return rich.export_text()


def test_the_next_chunk_is_shown_and_waits_for_y_or_n():
    bus, shown, tables = screen()
    bus.state.update(state="ARMED", approval=True, pending=None)
    bus.spin(0.1)
    shown.show()
    assert shown.shown is None
    bus.hear(CHUNK, chunk(16, 7))
    bus.state["pending"] = 7
    bus.spin(0.1)
    shown.show()
    text = text_of(tables[-1])
    assert "chunk 7" in text and "approve? y / n" in text and "16 steps of 12.5 ms" in text
    assert "moves [0.016, 0.032, 0.0]" in text and "across x, up y" in text
    shown.press("n")
    assert [m.json_from_ros(v) for t, v in bus.sent if t == APPROVE] == [{"chunk": 7, "approved": False}]
    assert shown.note == "chunk 7 left out"
    shown.show()
    assert shown.shown is None, "the guard has not answered yet"
    bus.state["pending"] = 8
    bus.spin(0.1)
    shown.show()
    assert shown.shown == 8 and "not seen here" in text_of(tables[-1])
    shown.press("y")
    assert [m.json_from_ros(v) for t, v in bus.sent if t == APPROVE] == [{"chunk": 8, "approved": True}]
    shown.press("y")
    assert len(bus.sent) == 1, "an answer counts once"


def test_what_waits_for_approval_stays_until_it_is_answered():
    config = GuardConfig(0.00625, 0.1, 0.1, 1.0, 0.05, 0.25)
    guard = Guard(ROBOT, config)
    guard.on_state(T0, np.array([0.0, 0.6, 0.2]))
    guard.arm(T0)
    guard.approval = True

    def offer(id):
        stamp = T0 + 0.001 * id
        return guard.on_chunk(Chunk(stamp, DT, np.zeros((8, 3)), np.ones(8), id), stamp)

    assert [offer(id) for id in (1, 2, 3)] == [None] * 3
    assert guard.pending.id == 1 and guard.counts["chunks while one waits"] == 2
    guard.leave_out(2)
    assert guard.pending.id == 1
    guard.leave_out(1)
    assert guard.pending is None
    offer(4)
    assert guard.pending.id == 4
    guard.approve(4, T0 + 0.01)
    assert guard.pending is None


def test_console_keys_give_their_orders_and_unknown_ones_none():
    bus, shown, tables = screen()
    bus.spin(0)
    for key in "ad":
        assert shown.press(key)
    for key in ("t", "h", "s", "-", "p", "y", "?", "\n"):
        assert shown.press(key)
    topics = [topic for topic, _ in bus.sent]
    assert topics == [ARM, ARM, TAKEOVER, TAKEOVER, SPEED, SPEED, "/dita/approval"]
    assert [v.data for t, v in bus.sent if t == SPEED] == [0.25, 0.95]
    assert not shown.press("q")
    diagnostics = m.diagnostics_to_ros(message, T0, "guard", 1, "x", {"R0": 3, "R2": 1})
    bus.hear("/diagnostics", diagnostics)
    executed(bus, 1.0)
    shown.show()
    text = text_of(tables[-1])
    assert re.search(r"R0 3 +R1 0 +R2 1 +R3 0", text) and "image to first command" in text


def test_a_picture_of_a_path_has_its_begin_and_end_inside_its_frame():
    for path in (np.zeros((4, 3)), np.random.default_rng(0).normal(size=(30, 3)), np.arange(5.0)[:, None], np.eye(7)):
        lines = picture(path)
        assert len(lines) == 12 and all(len(line) == 41 for line in lines[:11])
        assert "X" in "".join(lines[:11])
    lines = picture(np.array([[0, 0, 0], [0, 1.0, 2.0]]))
    assert lines[-1] == "across y, up z, 2000.0 mm or mrad wide"
    assert "X" in lines[0] and "o" in lines[10], "up is up"
    assert describe(np.zeros((1, 3)), DT, False)[0].endswith("top speed 0.000")


def test_a_guard_line_without_a_guard_says_so():
    assert guard_line(Console(HandBus(), ROBOT)) == "-: no guard heard"
