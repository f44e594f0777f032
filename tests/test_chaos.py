"""The chaos harness: what it injects, what its reader sees, and a handful of rows over a real wire."""

import json
import math
import re
import time
from collections import deque
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import chaos, chaos_faults, chaos_page, chaos_rig
from benchmarks.chaos_nodes import PANDA_START, ROBOTS, Change, Circle, PhysicalEnv, Reader
from robot_io import messages as m
from robot_io.bus_dds import message
from robot_io.core.limits import parse_robot
from robot_io.core.space import exponential
from robot_io.live import EnvelopeReader, command_of
from robot_io.nodes import main
from robot_io.nodes.guard import load_robot

TICK = 1 / 160


# --- what is injected


def passed(values, sent):
    change, out = Change(values), []
    for one in sent:
        change.pass_on(one, out.append, lambda: None)
    return out


def chunk(stamp=1.0, n=4):
    return m.cartesian_chunk_to_ros(message, stamp, 0.0125, "hand", "base_link", np.full((n, 3), 0.001), True)


def values_of(sent):
    return m.cartesian_chunk_from_ros(sent, True)[1]


def test_changes_of_messages_do_what_they_say_and_leave_the_original_alone():
    whole = chunk()
    (spoilt,) = passed({"bad": "nan", "at": 0.99}, [whole])
    assert np.isnan(values_of(spoilt)).sum() == 1 and np.isfinite(values_of(whole)).all()
    (scaled,) = passed({"times": 57.3}, [whole])
    np.testing.assert_allclose(values_of(scaled), 0.0573)
    (moved,) = passed({"stamp": -10.0}, [whole])
    assert m.stamp_of(moved) == pytest.approx(-9.0) and m.stamp_of(whole) == 1.0
    assert passed({"drop": True}, [whole] * 3) == []
    assert len(passed({"keep": 3}, [whole] * 9)) == 3
    assert len(passed({"drop": True, "count": 2}, [whole] * 5)) == 3
    alternating = passed({"plus": 0.5, "every": 2}, [chunk() for _ in range(4)])
    assert [np.allclose(values_of(c), 0.001) for c in alternating] == [True, False, True, False]


def test_frozen_pictures_keep_their_stamp_or_get_new_ones():
    images = [m.image_to_ros(message, float(k), np.full((2, 2, 3), k, np.uint8), "c") for k in range(3)]
    old, new = passed({"freeze": "old"}, images), passed({"freeze": "new"}, images)
    assert [m.stamp_of(i) for i in old] == [0.0, 0.0, 0.0] and [m.stamp_of(i) for i in new] == [0.0, 1.0, 2.0]
    assert all(np.all(m.image_from_ros(i) == 0) for i in (*old, *new))


@pytest.mark.parametrize(
    ("how", "names"),
    [("permute", ["b", "a"]), ("drop", ["b"]), ("add", ["a", "b", "nobody"]), ("duplicate", ["a", "b", "a"])],
)
def test_joint_names_break_in_every_way(how, names):
    (broken,) = passed({"names": how}, [m.joints_to_ros(message, 0.0, {"a": 1.0, "b": 2.0})])
    assert list(broken.name) == names and len(broken.position) == len(names)
    assert dict(zip(broken.name, broken.position, strict=True)).get("b") == 2.0


def test_swapped_names_give_each_value_to_another_joint():
    (broken,) = passed({"names": "swap"}, [m.joints_to_ros(message, 0.0, {"a": 1.0, "b": 2.0})])
    assert m.joints_from_ros(broken) == {"a": 2.0, "b": 1.0}


@pytest.mark.parametrize("name", ROBOTS)
def test_rule_keeps_every_robot_at_a_steady_speed(name):
    bus = SimpleNamespace(order={}, applied=lambda what: None)
    circle = Circle(name, bus)
    robot, x = parse_robot(ROBOTS[name]), circle.orbit.at(0.0)
    values = circle.predict([SimpleNamespace(state=np.array([*x, 0.5]), stamp=3.0)], seed=0).values
    motion = values[:, robot.action_slice(robot.motion)]
    steps = motion if robot.motion.mode == "delta" else np.diff(motion, axis=0)
    np.testing.assert_allclose(np.linalg.norm(steps, axis=1), circle.orbit.speed * robot.action_dt, rtol=0.01)
    bus.order = {"predict": {"bad": "inf", "step": 5, "dim": 1}}
    values = circle.predict([SimpleNamespace(state=np.array([*x, 0.5]), stamp=3.0)], seed=0).values
    assert np.isinf(values[5, 1]) and np.isfinite(np.delete(values, 5, axis=0)).all()


# --- what the reader sees


def test_counters_of_an_earlier_fault_do_not_name_a_later_one():
    reader = Reader.__new__(Reader)
    reader.texts, reader._counted = deque(), {}
    for late in (1, 1, 2):
        values = {"too late": late, "steps": 5}
        reader._on_diagnostics(m.diagnostics_to_ros(message, 0.0, "guard", 0, "armed", values))
    assert [text for _, text in reader.texts] == [
        "guard: armed (too late 1, steps 5)", "guard: armed ()", "guard: armed (too late 2)",
    ]  # fmt: skip


def reader_of(times, positions):
    """A reader without a bus, that has seen commands at arrival times [s] with these x."""
    reader = Reader.__new__(Reader)
    reader.commands, last = deque(), None
    for at, x in zip(times, positions, strict=True):
        speed = math.nan if last is None else abs(x - last[1]) / (at - last[0])
        reader.commands.append((at, 1, at, np.array([x, 0.0, 0.0]), speed))
        last = (at, x)
    return reader


def test_deceleration_and_standstill_are_found_to_a_command():
    times = TICK * np.arange(200)
    speed = np.interp(times, [0, 0.8, 0.9], [0.3, 0.3, 0.0])
    reader = reader_of(times, np.cumsum(speed) * TICK)
    stop = reader._stop(list(reader.commands), t0=0.7)
    assert stop["speed"] == pytest.approx(0.3) and stop["ended_s"] is not None
    assert stop["decel_s"] == pytest.approx(0.1, abs=2 * TICK) and stop["still_s"] == pytest.approx(0.2, abs=2 * TICK)
    fast = reader_of(times, 0.3 * times)
    assert fast._stop(list(fast.commands), t0=0.7)["decel_s"] is None
    dip = np.where((times > 0.72) & (times < 0.74), 0.1, speed)  # of a moment: not the deceleration that counts
    dipped = reader_of(times, np.cumsum(dip) * TICK)
    assert dipped._stop(list(dipped.commands), t0=0.7)["decel_s"] == pytest.approx(0.1, abs=2 * TICK)


def test_stream_that_ends_in_motion_has_ended_and_not_stopped():
    times = TICK * np.arange(100)
    reader = reader_of(times, 0.3 * times)
    stop = reader._stop(list(reader.commands), t0=0.5)
    assert stop["still_s"] is None and stop["ended_s"] == pytest.approx(times[-1] - 0.5)


def pose_robot():
    point = ROBOTS["point"]
    turn = {**point["action"][0], "name": "turn", "kind": "ee_rotation_axis_angle", "unit": "rad"}
    angular = {"max_angular_speed": 2.0, "max_angular_acceleration": 20.0, "max_angular_jerk": 4000.0}
    limits = {**point["limits"], **angular, "max_angular_lag": 0.5}
    return parse_robot({**point, "action": [point["action"][0], turn], "limits": limits})


def test_reader_judges_each_joint_and_each_rotation():
    robot = parse_robot(ROBOTS["joints"])
    smooth, rough = (EnvelopeReader(robot.space, robot.bounds) for _ in range(2))
    for k in range(20):
        smooth.take(1e9 + k * TICK, np.full(6, 1.5 * k * TICK))  # each at 1.5 rad/s of 2: their norm is beyond it
        rough.take(1e9 + k * TICK, np.array([0, 0, 0, 0, 0, 0.03 * (k % 2)]))
    assert sum(smooth.violations.values()) == 0 and smooth.speed() == pytest.approx(1.5, rel=1e-3)
    assert min(rough.violations[name] for name in ("speed", "acceleration", "jerk")) > 10
    rough.take(1e9 + 1, np.full(6, 1.6))
    assert rough.violations["workspace"] == 1

    robot = pose_robot()
    reader = EnvelopeReader(robot.space, robot.bounds)
    for k in range(40):  # steady about an axis that is none of the frame's, through a half turn
        turned = exponential(np.array([0.6, 0.0, 0.8]) * 1.9 * k * TICK + [0.0, 0.0, 0.0])
        reader.take(1e9 + k * TICK, np.array([0.0, 0.7, 0.3, *(turned if k % 2 else -turned)]))
    assert sum(reader.violations.values()) == 0 and reader.speed() == pytest.approx(1.9, rel=1e-3)
    reader.take(1e9 + 40 * TICK, np.array([0.0, 0.7, 0.3, 1.0, 0.0, 0.0, 0.0]))
    assert reader.violations["speed"] == 1


def test_reader_judges_twists_as_derivatives():
    robot = parse_robot(ROBOTS["twist"])
    sent = m.twist_to_ros(message, 2.0, np.array([0.3, 0.0, 0.0]), np.zeros(3), "base_link")
    stamp, read = command_of(robot, sent, 9.0)
    assert stamp == 2.0
    np.testing.assert_array_equal(read, [0.3, 0.0, 0.0])
    smooth, jump, fast = (EnvelopeReader(robot.space, robot.bounds, twists=True) for _ in range(3))
    for k in range(20):
        smooth.take(1e9 + k * TICK, np.array([0.001 * k, 0.0, 0.0]))  # 0.16 m/s2 of 15, anywhere: it is no position
        jump.take(1e9 + k * TICK, np.array([0.0, 0.0, 0.5 * (k >= 10)]))  # 80 m/s2
        fast.take(1e9 + k * TICK, np.array([0.0, 1.1, 0.0]))  # of 1.0 m/s
    assert sum(smooth.violations.values()) == 0 and smooth.peaks["acceleration"] == pytest.approx(0.16, rel=1e-3)
    assert smooth.speed() == pytest.approx(0.019)
    assert (jump.violations["acceleration"], jump.violations["jerk"], jump.violations["speed"]) == (1, 2, 0)
    assert fast.violations["speed"] == 19 and fast.violations["workspace"] == 0


def looked(name, configurations):
    robot = load_robot(ROBOTS[name])[0]
    reader = Reader.__new__(Reader)
    reader.robot = robot
    return [reader.clearance(np.array(x, float), "measured") for x in configurations]


def test_reader_works_out_how_near_the_arm_is_to_boxes_and_to_itself():
    beside, inside = looked("boxed", [(0.15, 0.7, 0.3), (0.25, 0.7, 0.3)])
    assert beside == (pytest.approx(0.05), "measured: keep_out[0]") and inside[0] == 0.0
    assert looked("boxed", [(np.nan, 0.7, 0.3)]) == [(np.inf, "")]
    starts = np.array(PANDA_START)
    ways = (0.0, "box"), (0.49, "box"), (0.45, "table"), (1.0, "itself")
    at = [starts + share * np.array(chaos_faults.PANDA_WAYS[way]) for share, way in ways]
    free, box, table, itself = looked("arm", at)
    assert free[0] > chaos_faults.NEAR
    assert box[0] < chaos_faults.MARGIN and box[1] == "measured: panda_hand and keep_out[0]"
    assert table[0] < chaos_faults.MARGIN and table[1].endswith("keep_out[1]")
    assert itself[0] < chaos_faults.MARGIN and itself[1] == "measured: panda_link0 and panda_hand"


def verdict(**changes):
    values = {
        "commands": 9, "violations": {}, "details": [], "non_finite": 0, "measured_outside": 0, "warnings": 0,
        "clearance": None, "speed": 0.3, "decel_s": None, "still_s": None, "ended_s": None, "queue_s": None,
        "measured_still_s": 0.0, "state": None, "states": [], "named": {"s": 0.1, "text": "too near"}, "executed": 3,
        "executed_back": 0, "speeds": [], "fault_s": None, "wall_s": None,
    }  # fmt: skip
    return {**values, **changes}


@pytest.mark.parametrize(
    ("distance", "problem"), [(0.0101, None), (0.0099, "9.9 mm, measured: a and b"), (0.2, "never came near")]
)
def test_arm_that_comes_nearer_than_the_margin_or_was_never_near_is_not_as_promised(distance, problem):
    expect = chaos_faults.Expect(0.0, "too near", stop=None, near=True)
    near = {"m": distance, "what": "measured: a and b"}
    rig: Any = SimpleNamespace(unsafe=False)
    result = chaos.judge(chaos_faults.ROWS["A23b"], expect, verdict(clearance=near), rig)
    assert result["ok"] == (problem is None) and (problem is None or problem in result["problems"][0])


def judged(row, expect, **changes):
    rig: Any = SimpleNamespace(unsafe=False)
    return chaos.judge(chaos_faults.ROWS[row], expect, verdict(**changes), rig)


def test_name_counts_from_the_wall_and_an_arm_that_never_came_there_is_not_as_promised():
    expect = chaos_faults.Expect(0.0, "clamped", stop=None, wall=True)
    assert judged("A23", expect, wall_s=2.0, named={"s": 2.9, "text": "x clamped"})["ok"]
    late = judged("A23", expect, wall_s=2.0, named={"s": 3.1, "text": "x clamped"})
    assert late["problems"] == ["named after 1.10 s"] and late["named_s"] == pytest.approx(1.1)
    assert judged("A23", expect)["problems"] == ["it never came to the wall"]


def test_clamped_actions_do_not_name_a_wall():
    for text, found in (("x clamped 3", True), ("joint_0 clamped", True), ("R1 action clamped 2", False)):
        assert chaos_rig.matches(chaos_rig.CLAMPED, f"guard: ARMED: armed ({text})") == found
    assert not chaos_rig.matches(chaos_rig.CLAMPED, "R1 gripper clamped")


def test_state_must_be_entered_where_it_is_asked_and_the_latest_deceleration_counts_from_the_injection():
    held = chaos_faults.Expect(0.0, stop=None, held=True)
    assert judged("A26", held, states=["HOLDING", "ARMED"])["ok"]
    assert judged("A26", held, states=["ARMED"])["problems"] == ["never HOLDING or FAULT: ['ARMED']"]
    late = chaos_faults.Expect(0.0, after_queue=True, latest=0.4)
    stop = {"decel_s": 0.45, "still_s": 0.5, "queue_s": 0.4, "states": ["HOLDING"]}
    result = judged("A7", late, **stop, state={"s": 0.48, "state": "HOLDING", "reason": ""})
    assert result["problems"] == ["deceleration 450 ms after the injection"]
    assert result["decel_s"] == pytest.approx(0.05) and result["reaction_s"] == pytest.approx(0.08)


def test_two_guards_are_told_apart_by_their_writers():
    writers = {"guard": set(), "guard_2": set()}
    said = [
        chaos_rig.whose(w, writers, second) for w, second in ((1, False), (1, True), (2, True), (2, False), (3, False))
    ]
    assert said == ["guard", "guard", "guard_2", "guard_2", "guard"]


def test_second_guard_is_timed_while_it_is_armed():
    assert chaos_faults.armed_for([]) == chaos_faults.armed_for([(1.0, "IDLE"), (2.0, "FAULT")]) == 0.0
    assert chaos_faults.armed_for([(1.0, "IDLE"), (2.0, "ARMED"), (2.15, "FAULT")]) == pytest.approx(0.15)
    now = time.monotonic()
    assert chaos_faults.armed_for([(now - 5.0, "ARMED")]) >= 5.0


def test_reader_judges_the_states_of_the_guard_that_moved_the_arm():
    reader = Reader.__new__(Reader)
    reader.states = deque([(0.0, "IDLE", "", 1), (1.0, "ARMED", "", 1), (2.0, "IDLE", "", 2), (2.1, "FAULT", "two", 1)])
    assert [s for _, s, _ in reader._states(0.5, 1.5)] == ["IDLE", "ARMED", "FAULT"]
    assert len(reader._states(0.5, 0.9)) == 4, "none of them moved it"


def test_reader_finds_the_command_that_comes_to_the_wall():
    reader = reader_of(TICK * np.arange(100), np.minimum(0.4 + 0.002 * np.arange(100), 0.5 - 1e-6))
    reader.robot = parse_robot(ROBOTS["point"])
    reader.bounds = reader.robot.bounds
    commands = [(at, w, stamp, np.add(x, [0.0, 0.7, 0.3]), speed) for at, w, stamp, x, speed in reader.commands]
    assert reader._wall(commands, 0.1) == pytest.approx(50 * TICK - 0.1)
    assert reader._wall(commands[:40], 0.1) is None


HELD = [(0.1, "HOLDING")]


@pytest.mark.parametrize(
    ("states", "same", "problem"),
    [
        ([*HELD, (0.9, "ARMED")], True, None),
        ([*HELD, (1.1, "FAULT")], True, None),
        ([*HELD, (1.1, "FAULT")], False, None),
        ([*HELD, (1.3, "ARMED")], True, "without being armed, 1.20 s later"),
        ([*HELD, (0.5, "FAULT"), (0.6, "ARMED")], True, "0.50 s later, after FAULT"),
        ([*HELD, (0.9, "ARMED")], False, "another checkpoint"),
        (HELD, True, "HOLDING for more than 1 s"),
        ([], True, "did not stop"),
    ],
)
def test_policy_that_comes_back_may_go_on_only_within_the_hold_and_with_the_same_checkpoint(states, same, problem):
    problems, note = chaos_faults.resumed(states, same)
    assert problems == [] if problem is None else problem in problems[0]
    assert ("within the hold" in note) == any(s == "ARMED" for _, s in states)


def test_commands_are_read_by_name_in_every_form():
    robot = parse_robot(ROBOTS["joints"])
    x, names = np.arange(6.0), list(robot.driver.joints)
    sent = m.joint_chunk_to_ros(message, 2.0, 0.01, names[::-1], x[::-1][None], "positions")
    stamp, read = command_of(robot, sent, 9.0)
    assert stamp == 2.0
    np.testing.assert_array_equal(read, x)
    with pytest.raises(ValueError, match="the robot has"):
        command_of(robot, m.joint_chunk_to_ros(message, 2.0, 0.01, names[:5], x[None, :5], "positions"), 9.0)


def test_contacts_of_the_panda_in_mujoco_are_seen():
    pytest.importorskip("robosuite")
    env = PhysicalEnv("panda")
    env.reset(seed=1, options={})
    free = np.array(PANDA_START)
    env.drive(free, 1.0, 0.1)
    assert env.warnings() == {}
    for share in np.linspace(0, 1, 40):
        env.drive(free + share * np.array([0, 0.7, 0, 0, 0, 0, 0]), 1.0, 0.02)
    assert env.warnings()["contacts"] > 0, "it is driven into the table"
    env.reset(seed=1, options={})
    assert env.warnings() == {}
    env.close()


@pytest.mark.parametrize("how", chaos_faults.DAMAGE)
def test_damaged_checkpoints_do_not_load(tmp_path, how):
    from dita.checkpoint import load_policy

    chaos_faults.broken_checkpoint(tmp_path / "policy", how)
    with pytest.raises(ValueError, match=chaos_faults.CHECKPOINTS[how]):
        load_policy(tmp_path / "policy")


@pytest.mark.parametrize("how", chaos_faults.OTHERS)
def test_checkpoint_of_a_robot_of_the_same_name_is_refused_by_field_before_anybody_joins_the_graph(
    tmp_path, how, capsys, monkeypatch
):
    def joined(*_, **__):
        raise AssertionError("it has joined the graph")

    monkeypatch.setattr("robot_io.nodes.policy.open_bus", joined)
    chaos_faults.broken_checkpoint(tmp_path / "policy", how)
    live = {"seed": 0, "device": "cpu", "precision": "fp32", "path": "eager", "slop": 0.033, "max_age": 0.15}
    values = {"bus": {}, "checkpoint": str(tmp_path / "policy"), "num_inference_steps": None, "interval": 0.0, **live}
    robot = chaos_faults.robot_file(tmp_path, how)
    assert main(["policy", json.dumps({**values, "embodiment": robot})]) == 1
    said = capsys.readouterr().err
    assert re.search(chaos_faults.CHECKPOINTS[how], said) and said.count("\n") == 1 and robot in said
    with pytest.raises(AssertionError, match="joined"):  # its own robot
        main(["policy", json.dumps({**values, "embodiment": "metaworld_sawyer"})])


# --- the table


def record(row, **changes):
    values = {
        "row": row, "k": 0, "variant": None, "control": False, "ok": True, "problems": [], "stop": True, "bound_s": 0.1,
        "decel_s": 0.01, "decel_from_injection_s": 0.02, "stand_s": 0.1, "state_s": 0.01, "state": {"s": 0.01},
        "named_s": 0.01, "must_name": True, "violations": {}, "non_finite": 0, "load": 1.0, "commit": "c" * 40,
        "time": 0.0, "extra": {},
    }  # fmt: skip
    return {**values, **changes}


def test_page_counts_and_a_control_that_is_not_caught_is_a_failure():
    rows = [chaos_faults.ROWS["A1"], chaos_faults.ROWS["A2"]]
    records = [record("A1"), record("A1", ok=False, problems=["no deceleration"], decel_s=None), record("A2")]
    records.append(record("A1", control=True, violations={"jerk": 3}))
    text = chaos_page.page(rows, records, "make chaos", 0)
    assert "| A1 | NaN or Inf in an action |" in text and "| 1/2 |" in text and "| A1 | 1/1 | jerk 3 |" in text
    assert chaos_page.failed(records) == ["A1 #0: no deceleration"]
    near = record("A2", note="noticed", clearance={"m": 0.0123, "what": "a and b"})
    assert "noticed: 1; nearest 12.3 mm" in chaos_page.page(rows, [*records, near], "make chaos", 0)
    records[-1]["violations"] = {}
    assert "control A1: the reader caught nothing" in chaos_page.failed(records)


def test_page_says_for_every_row_what_the_table_promises_and_whether_the_goals_are_met():
    assert set(chaos_faults.PROMISES) == set(chaos_faults.ROWS)
    physical = {name.removesuffix("p") for name in chaos_faults.PANDA_ROWS}
    assert physical | set(chaos_faults.NOT_PHYSICAL) == set(chaos_faults.ROWS) and not physical & set(
        chaos_faults.NOT_PHYSICAL
    )
    records = [record("A1", reaction_s=s, decel_s=2 * s) for s in (0.004, 0.02)] + [record("A2p", decel_s=0.16)]
    text = chaos_page.page([*chaos_faults.ROWS.values(), *chaos_faults.PANDA_ROWS.values()], records, "make chaos", 0)
    light, panda = text.split("## robosuite's Panda in MuJoCo")
    row = next(one for one in light.splitlines() if one.startswith("| A1 | R2 in the same tick"))
    assert "| 10 | 12 / 20 | 1/2 | 1/2 | yes (24) | yes (40) | - (n 2) | yes (100) |" in row
    assert "| A2p | older than 50 ms" in panda and "NO (160) | NO (160)" in panda and "A3: pictures" in panda
    assert "A2p" not in light
    many = chaos_page.bounds_line(
        chaos_faults.ROWS["A1"], [record("A1", decel_s=0.02)] * 299 + [record("A1", decel_s=0.2)]
    )
    assert "yes (20) | NO (200) | yes (20)" in many


def test_cut_line_of_an_interrupted_run_is_played_again(tmp_path):
    path = tmp_path / "trials.jsonl"
    path.write_text(json.dumps(record("A1")) + "\n" + '{"row": "A2"')
    assert [r["row"] for r in chaos_page.read_trials(path)] == ["A1"]
    assert path.read_text().count("\n") == 1


def test_unknown_row_is_named(capsys):
    with pytest.raises(SystemExit):
        chaos.main(["--rows", "A99"])
    assert "no row A99; there are A1, A2" in capsys.readouterr().err


@pytest.mark.live
def test_handful_of_rows_over_the_wire_and_a_control_that_is_caught(tmp_path):
    arguments = ["--rows", "A1,A2,A15,A22,A24,A25", "--repeat", "1", "--out", str(tmp_path), "--domain-id", "110"]
    began = time.monotonic()
    chaos.main([*arguments, "--page", str(tmp_path / "page.md")])
    records = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    real = {r["row"]: r for r in records if not r["control"]}
    assert set(real) == {"A1", "A2", "A15", "A22", "A24", "A25"}
    for r in real.values():  # no timing here: the table has it
        assert not r.get("violations") and r.get("non_finite") == 0 and r["named_s"] is not None, r
        assert r["state"] is not None, r
    assert [chaos_page.caught(r) for r in records if r["control"]] == [True]
    again = time.monotonic()
    chaos.main([*arguments, "--page", str(tmp_path / "page.md")])
    assert time.monotonic() - again < 0.5 * (again - began), "what was played is not played again"
