"""The chaos harness: what it injects, what its reader sees, and a handful of rows over a real wire."""

import json
import math
import time
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import chaos
from benchmarks.chaos_nodes import ROBOTS, Change, Circle, Reader
from robot_io import messages as m
from robot_io.bus_dds import message
from robot_io.core.limits import parse_robot
from robot_io.core.space import exponential
from robot_io.live import EnvelopeReader, command_of

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


@pytest.mark.parametrize("name", ROBOTS)
def test_rule_keeps_every_robot_at_a_steady_speed(name):
    bus = SimpleNamespace(order={}, applied=lambda what: None)
    circle = Circle(name, bus)
    robot, x = parse_robot(ROBOTS[name]), circle.orbit.at(0.0)
    values = circle.predict([SimpleNamespace(state=np.array([*x, 0.5]), stamp=3.0)], seed=0).values
    motion = values[:, robot.action_slice(robot.motion)]
    steps = motion if robot.motion.mode == "delta" else np.diff(motion, axis=0)
    np.testing.assert_allclose(np.linalg.norm(steps, axis=1), circle.orbit.speed * 0.0125, rtol=0.01)
    bus.order = {"predict": {"bad": "inf", "step": 5, "dim": 1}}
    values = circle.predict([SimpleNamespace(state=np.array([*x, 0.5]), stamp=3.0)], seed=0).values
    assert np.isinf(values[5, 1]) and np.isfinite(np.delete(values, 5, axis=0)).all()


# --- what the reader sees


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


def test_commands_are_read_by_name_in_every_form():
    robot = parse_robot(ROBOTS["joints"])
    x, names = np.arange(6.0), list(robot.driver.joints)
    sent = m.joint_chunk_to_ros(message, 2.0, 0.01, names[::-1], x[::-1][None], "positions")
    stamp, read = command_of(robot, sent, 9.0)
    assert stamp == 2.0
    np.testing.assert_array_equal(read, x)
    with pytest.raises(ValueError, match="the robot has"):
        command_of(robot, m.joint_chunk_to_ros(message, 2.0, 0.01, names[:5], x[None, :5], "positions"), 9.0)


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
    rows = [chaos.ROWS["A1"], chaos.ROWS["A2"]]
    records = [record("A1"), record("A1", ok=False, problems=["no deceleration"], decel_s=None), record("A2")]
    records.append(record("A1", control=True, violations={"jerk": 3}))
    text = chaos.page(rows, records, "make chaos", 0)
    assert "| A1 | NaN or Inf in an action |" in text and "| 1/2 |" in text and "| A1 | 1/1 | jerk 3 |" in text
    assert chaos.failed(records) == ["A1 #0: no deceleration"]
    records[-1]["violations"] = {}
    assert "control A1: the reader caught nothing" in chaos.failed(records)


def test_cut_line_of_an_interrupted_run_is_played_again(tmp_path):
    path = tmp_path / "trials.jsonl"
    path.write_text(json.dumps(record("A1")) + "\n" + '{"row": "A2"')
    assert [r["row"] for r in chaos.read_trials(path)] == ["A1"]
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
    assert [chaos.caught(r) for r in records if r["control"]] == [True]
    again = time.monotonic()
    chaos.main([*arguments, "--page", str(tmp_path / "page.md")])
    assert time.monotonic() - again < 0.5 * (again - began), "what was played is not played again"
