"""The guard on a fake clock: chunks by time, composition, envelope, reactions, controls. Fast: mutants run it."""

import copy
import dataclasses
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from fake_robot import EMBODIMENT
from guard_arm import (
    CONFIG,
    DT,
    HOME,
    JOINT_HOME,
    JOINTS,
    ROBOT,
    SPACES,
    T0,
    TICK,
    Arm,
    embodiment,
    matrix,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dita.embodiment import embodiment_from_dict, embodiment_to_dict, load_embodiment
from robot_io.core.chunk_buffer import Chunk, ChunkBuffer
from robot_io.core.guard import INSET, Guard, GuardConfig
from robot_io.core.limits import Envelope, parse_robot
from robot_io.core.state_machine import TRANSITIONS, State, StateMachine
from robot_io.core.tracker import Motion, Tracker
from robot_io.live import EnvelopeReader


def shifted(position, *by):
    return np.asarray(position) + np.array(by)


def chunk(stamp, motion, gripper=-1.0):
    motion = np.atleast_2d(np.asarray(motion, float))
    return Chunk(stamp, DT, motion, np.full(len(motion), float(gripper)))


# ---- chunk buffer


def test_buffer_hands_out_each_step_once_and_when_it_is_due():
    buffer = ChunkBuffer()
    assert buffer.offer(chunk(T0, np.eye(3)), T0) is None
    assert buffer.due(T0 - 0.001) is None
    assert buffer.due(T0).index == 0
    assert buffer.due(T0 + 0.012) is None
    step = buffer.due(T0 + 0.0126)
    assert step.index == 1 and not step.first
    assert step.start == pytest.approx(T0 + DT) and step.end == pytest.approx(T0 + 2 * DT)
    assert buffer.due(T0 + 0.025).index == 2
    assert buffer.due(T0 + 0.0376) is None, "past its end"


def test_buffer_drops_what_has_expired_by_time_and_counts_it():
    buffer = ChunkBuffer()
    buffer.offer(chunk(T0, np.zeros((16, 3))), T0 + 0.07)
    step = buffer.due(T0 + 0.07)
    assert step.index == 5 and step.first
    assert buffer.counts["expired_steps"] == 5


def test_buffer_counts_only_the_steps_between_those_it_hands_out():
    buffer = ChunkBuffer()
    buffer.offer(chunk(T0, np.zeros((16, 3))), T0)
    assert buffer.due(T0).index == 0
    assert buffer.due(T0 + 3.5 * DT).index == 3
    assert buffer.counts["expired_steps"] == 2


def test_newer_chunk_replaces_older_at_the_steps_rate():
    buffer = ChunkBuffer()
    buffer.offer(chunk(T0, np.zeros((16, 3))), T0)
    assert buffer.due(T0 + 0.05).index == 4
    buffer.offer(chunk(T0 + 0.0501, np.ones((16, 3))), T0 + 0.0502)
    assert buffer.due(T0 + 0.0502) is None, "the step that has begun is not begun twice"
    assert buffer.due(T0 + 0.0627).index == 1


def test_a_step_that_begins_half_a_step_after_the_last_one_is_handed_out():
    buffer, dt, motion = ChunkBuffer(), 0.125, np.zeros((4, 3))  # without rounding
    buffer.offer(Chunk(0.0, dt, motion, None), 0.0)
    assert buffer.due(0.0).start == 0.0
    buffer.offer(Chunk(0.0625, dt, motion, None), 0.0625)
    assert buffer.due(0.0625).start == 0.0625


def test_a_chunk_is_late_from_the_moment_on_that_its_last_step_is_over():
    motion = np.zeros((4, 3))
    assert ChunkBuffer().offer(Chunk(1.0, 0.125, motion, None), 1.5) == "late chunk"
    assert ChunkBuffer().offer(Chunk(1.0, 0.125, motion, None), 1.4999) is None


def test_late_duplicate_and_out_of_order_chunks_are_dropped_and_counted():
    buffer = ChunkBuffer()
    assert buffer.offer(chunk(T0, np.zeros((4, 3))), T0) is None
    assert buffer.offer(chunk(T0, np.zeros((4, 3))), T0) == "duplicate chunk"
    assert buffer.offer(chunk(T0 - 0.01, np.zeros((4, 3))), T0) == "out-of-order chunk"
    assert buffer.offer(chunk(T0 + 0.01, np.zeros((4, 3))), T0 + 0.07) == "late chunk"
    assert buffer.counts["chunks"] == 1 and buffer.counts["chunks_dropped"] == 3
    buffer.clear(since=T0 + 1)
    assert buffer.due(T0) is None
    assert buffer.offer(chunk(T0 + 0.9, np.zeros((99, 3))), T0 + 1) == "out-of-order chunk", "from before the arming"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 0.4), st.floats(0, 0.15), st.integers(1, 24)), max_size=12), st.integers(0, 9))
def test_buffer_never_hands_out_two_steps_within_half_a_step(offers, jitter_seed):
    buffer, starts = ChunkBuffer(), []
    rng = np.random.default_rng(jitter_seed)
    arrivals = sorted((stamp + delay, stamp, n) for stamp, delay, n in offers)
    for now in np.cumsum(rng.uniform(0, 2 * TICK, 120)):
        while arrivals and arrivals[0][0] <= now:
            _, stamp, n = arrivals.pop(0)
            buffer.offer(chunk(T0 + stamp, np.zeros((n, 3))), T0 + now)
        step = buffer.due(T0 + now)
        if step is not None:
            assert step.start <= T0 + now + 1e-4 * DT + 1e-3 * DT and step.end > T0 + now - 1e-4
            starts.append(step.start)
    assert all(b - a >= 0.5 * DT - 1e-6 for a, b in itertools.pairwise(starts))


# ---- composition


def test_commanded_deltas_add_up_exactly_whatever_the_arm_measures():
    arm = Arm().arm()
    deltas = np.random.default_rng([0, 1]).uniform(-0.006, 0.006, (24, 3))
    arm.guard.on_chunk(chunk(arm.now + TICK, deltas), arm.now)
    arm.run(0.3)
    assert [e.step.index for e in arm.executed] == list(range(24))
    goals = np.array([e.goal for e in arm.executed])
    np.testing.assert_allclose(goals, HOME + np.cumsum(deltas, axis=0), atol=1e-12)
    arm.run(0.1)
    np.testing.assert_allclose(arm.sent[-1].configuration, goals[-1], atol=1e-9)
    arm.assert_inside()


def test_measured_deltas_start_from_where_the_arm_is():
    values = copy.deepcopy(EMBODIMENT)
    values["action"][0]["reference"] = "measured"
    arm = Arm(values).arm()
    arm.guard.on_chunk(chunk(arm.now, np.full((4, 3), 0.004)), arm.now)
    arm.fresh = False
    arm.guard.on_state(arm.now + 1e-4, HOME + 0.05)
    arm.run(DT)
    np.testing.assert_allclose(arm.executed[0].goal, HOME + 0.054, atol=1e-12)


def test_chunk_start_deltas_add_to_the_pose_at_the_chunks_stamp():
    values = copy.deepcopy(EMBODIMENT)
    values["action"][0]["reference"] = "chunk_start"
    arm = Arm(values).arm()
    arm.guard.on_chunk(chunk(arm.now + 1e-4, [[0.002] * 3, [0.004] * 3, [0.006] * 3]), arm.now)
    arm.run(3 * DT)
    np.testing.assert_allclose(arm.executed[-1].goal, HOME + 0.006, atol=1e-12)


def test_absolute_chunks_are_goals():
    values = copy.deepcopy(EMBODIMENT)
    values["action"][0].update(mode="absolute", reference=None, low=[-1] * 3, high=[1] * 3)
    arm = Arm(values).arm()
    goal = shifted(HOME, 0.1, -0.05, 0.02)
    arm.guard.on_chunk(chunk(arm.now, np.tile(goal, (24, 1))), arm.now)
    arm.run(0.3)
    np.testing.assert_allclose(arm.sent[-1].configuration, goal, atol=1e-9)
    arm.assert_inside()


def test_expired_deltas_are_not_made_up_for_and_the_residual_says_so():
    arm = Arm().arm()
    begin = arm.now + TICK
    arm.guard.on_chunk(chunk(begin, np.full((8, 3), [0.004, 0, 0])), arm.now)
    arm.run(5 * DT)
    second = chunk(begin + DT, np.full((16, 3), [0.006, 0, 0]))
    arm.guard.on_chunk(second, arm.now)
    done = arm.guard.goal[0] - HOME[0]
    sent = len(arm.executed)
    arm.run(DT)
    first = arm.executed[sent]
    assert first.step.chunk.stamp == second.stamp and first.step.index == sent - 1
    assert arm.guard.goal[0] - HOME[0] == pytest.approx(done + 0.006), "one delta, not the expired ones"
    # what it wanted for the expired steps minus what was sent since its stamp, this first step included
    expired = first.step.index
    assert arm.guard.residual.max == pytest.approx(expired * (0.006 - 0.004), abs=1e-9)


def test_gripper_is_held_between_steps_and_never_moved_by_a_fault():
    arm = Arm().arm()
    assert arm.run(DT).sent[-1].gripper is None
    arm.guard.on_chunk(Chunk(arm.now + TICK, DT, np.zeros((2, 3)), np.array([-1.0, 0.5])), arm.now)
    arm.run(0.05)
    assert [c.gripper for c in list(arm.sent)[-8:]] == [-1.0] + 7 * [0.5], "no values in between"
    arm.guard.fault("a test", arm.now)
    arm.run(1.0)
    assert arm.sent[-1].gripper == 0.5


# ---- limits and tracking


def test_leash_keeps_the_goal_near_a_blocked_arm():
    arm = Arm().arm()
    arm.fresh = False
    for _ in range(30):  # the arm stands still while the policy pushes on
        arm.guard.on_chunk(chunk(arm.now + 1e-4, np.full((8, 3), [0.01, 0, 0])), arm.now)
        for _ in range(4):
            arm.guard.on_state(arm.now + TICK, HOME)
            arm.run(TICK)
    assert np.linalg.norm(arm.guard.goal - HOME) == pytest.approx(ROBOT.limits.max_lag)
    assert arm.guard.counts["steps"] / 2 < arm.guard.counts["leash_hits"] <= arm.guard.counts["steps"]
    arm.assert_inside()


def test_tracker_reaches_its_goal_and_brakes_within_the_promised_time():
    tracker = Tracker(ROBOT.space, ROBOT.bounds, TICK)
    tracker.restart(HOME)
    for _ in range(100):
        tracker.take(tracker.toward(shifted(HOME, 0.3, 0, 0), np.zeros(3)))
    np.testing.assert_allclose(tracker.configuration, shifted(HOME, 0.3, 0, 0), atol=1e-9)
    assert not tracker.moving
    for _ in range(10):
        tracker.take(tracker.toward(HOME, np.zeros(3)))
    assert tracker.moving
    for _ in range(8):  # 0.87 m/s at 69 m/s^2
        tracker.take(tracker.brake())
    assert not tracker.moving


@pytest.mark.parametrize(
    ("path", "broken"),  # x after each tick, from rest at 0; the last one breaks it
    [
        ([0.0095], ["speed of tool", "acceleration of tool", "jerk of tool"]),  # 1.52 m/s
        ([0.005], ["acceleration of tool"]),  # 128 m/s^2
        ([0.0045, 0.0075], ["jerk of tool"]),  # 115 to -38 m/s^2 within 6.25 ms
        ([0.0], []),
    ],
)
def test_envelope_names_the_limits_that_a_step_would_break(path, broken):
    envelope = Envelope(ROBOT.space, ROBOT.bounds, TICK)
    start = np.array([0.2, 0.6, 0.2])
    envelope.restart(start)
    for x in path[:-1]:
        assert envelope.violations(shifted(start, x, 0, 0)) == []
        envelope.sent(shifted(start, x, 0, 0))
    assert envelope.violations(shifted(start, path[-1], 0, 0)) == broken
    assert envelope.violations(start * np.nan) == ["not finite"]
    envelope.restart(np.array([0.5, 0.6, 0.2]))
    assert envelope.violations(np.array([0.5 + 1e-9, 0.6, 0.2])) == ["x outside the workspace"]


def test_reader_on_the_wire_agrees_at_uneven_times():
    smooth = EnvelopeReader(ROBOT.space, ROBOT.bounds)
    times = T0 + np.cumsum([0, 1, 2, 1, 1, 2, 1, 2, 2, 1, 1, 1]) * TICK
    for t in times:  # 0.5 m/s^2 after a start at 0.6 m/s
        smooth.take(t, shifted(HOME, 0.6 * (t - T0) + 0.25 * (t - T0) ** 2, 0, 0))
    assert sum(smooth.violations.values()) == 0
    assert smooth.peaks["acceleration"] == pytest.approx(0.5, rel=0.1)
    rough = EnvelopeReader(ROBOT.space, ROBOT.bounds)
    for t, x in zip(times, 3 * [0.0] + 9 * [0.006], strict=True):  # a jump within one tick
        rough.take(t, shifted(HOME, x, 0, 0))
    assert rough.violations["acceleration"] > 0 and rough.violations["jerk"] > 0 and rough.violations["speed"] == 0
    rough.take(times[-1] + TICK, np.array([np.nan, 0, 0]))
    assert rough.non_finite == 1


def test_steady_motion_is_followed_without_ripple_or_lag():
    arm = Arm().arm()
    arm.guard.on_chunk(chunk(arm.now + TICK, np.full((24, 3), [0.006, 0, 0])), arm.now)
    arm.run(0.28)
    speeds = np.diff([c.configuration[0] for c in list(arm.sent)[-16:]]) / TICK
    np.testing.assert_allclose(speeds, 0.006 / DT, rtol=0.01)
    expected = HOME[0] + 0.006 / DT * (arm.now - T0)  # from T0 + TICK; a command is for the time of the next one
    assert arm.sent[-1].configuration[0] == pytest.approx(expected, abs=1e-4)


def test_expert_like_motion_lags_a_step_at_most_within_the_shipped_limits():
    arm = Arm(embodiment_to_dict(load_embodiment("metaworld_sawyer"))).arm()
    signs = np.repeat(np.random.default_rng([0, 2]).choice([-1, 0, 1], (40, 3)), 8, axis=0)
    start = arm.now
    for i in range(0, 280, 4):
        arm.guard.on_chunk(chunk(start + i * DT + 1e-5, 0.01 * signs[i : i + 16]), arm.now)
        arm.run(4 * DT)
    assert arm.guard.state is State.ARMED and arm.guard.counts["R2"] == 0
    assert arm.guard.lag.mean < 0.003 and arm.guard.lag.max < 0.01 * np.sqrt(3)
    arm.assert_inside()


# ---- reactions


def test_a_chunk_that_is_not_finite_stops_in_the_same_tick_and_three_are_a_fault():
    arm = Arm().arm()
    arm.guard.on_chunk(chunk(arm.now, np.full((24, 3), [0.006, 0, 0])), arm.now)
    arm.run(0.2)
    fast = arm.speed
    bad = chunk(arm.now, np.full((24, 3), np.nan))
    assert arm.guard.on_chunk(bad, arm.now) == "chunk not finite"
    assert arm.guard.state is State.HOLDING
    arm.run(TICK)
    assert arm.speed < fast, "it decelerates at once"
    arm.run(0.1)
    assert arm.speed == pytest.approx(0, abs=1e-9)
    for _ in range(2):
        arm.guard.on_chunk(chunk(arm.now, np.full((24, 3), np.inf)), arm.now)
    assert arm.guard.state is State.FAULT and "3 chunks" in arm.guard.machine.reason
    assert arm.guard.counts["R2"] == 1 and arm.guard.counts["R3"] == 1
    arm.assert_inside()


def test_bad_chunks_far_apart_are_no_fault():
    arm = Arm().arm()
    for _ in range(4):
        arm.guard.on_chunk(chunk(arm.now, np.full((8, 3), np.nan)), arm.now)
        arm.run(0.3)
        arm.guard.on_chunk(chunk(arm.now + 1e-4, np.zeros((24, 3))), arm.now)
        arm.run(0.3)
    assert arm.guard.state is State.ARMED and arm.guard.counts["R2"] == 4


def test_a_hold_brakes_at_once_and_does_not_go_on_to_the_goal():
    values = copy.deepcopy(EMBODIMENT)
    values["action"][0].update(mode="absolute", reference=None, low=[-1] * 3, high=[1] * 3)
    arm = Arm(values).arm()
    arm.guard.on_chunk(chunk(arm.now, np.tile(shifted(HOME, 0.14, 0, 0), (24, 1))), arm.now)
    arm.run(0.08)
    held, fast = arm.sent[-1].configuration, arm.speed
    assert fast > 0.5 and np.linalg.norm(arm.guard.goal - held) > 0.05
    arm.guard.hold("a test", arm.now)
    arm.run(0.2)
    assert 0 < arm.sent[-1].configuration[0] - held[0] < 0.02
    arm.assert_inside()


def test_an_empty_queue_is_noticed_after_the_stream_timeout_and_held_long_is_a_fault():
    arm = Arm().arm()
    arm.guard.on_chunk(chunk(arm.now, np.full((8, 3), [0.01, 0, 0])), arm.now)
    begin = arm.now
    arm.run(8 * DT + 0.09)
    assert arm.guard.state is State.ARMED
    arm.run(0.03)
    assert arm.guard.state is State.HOLDING and "no action" in arm.guard.machine.reason
    arm.run(begin + 8 * DT + 0.1 + 1.05 - arm.now)
    assert arm.guard.state is State.FAULT
    assert arm.speed == 0
    arm.assert_inside()


def test_a_good_chunk_ends_a_hold_from_where_the_arm_stopped():
    arm = Arm().arm()
    arm.guard.on_chunk(chunk(arm.now, np.full((8, 3), [0.008, 0, 0])), arm.now)
    arm.run(0.05)
    arm.guard.hold("a test", arm.now)
    arm.run(0.1)
    stopped = arm.sent[-1].configuration
    arm.guard.on_chunk(chunk(arm.now, np.full((8, 3), [0, 0.004, 0])), arm.now)
    assert arm.guard.state is State.ARMED
    arm.run(TICK)
    np.testing.assert_allclose(arm.executed[-1].goal, shifted(stopped, 0, 0.004, 0), atol=1e-9)
    arm.assert_inside()


def test_before_the_first_chunk_the_arm_waits_without_a_deadline():
    arm = Arm().arm().run(3.0)
    assert arm.guard.state is State.ARMED
    np.testing.assert_array_equal(arm.sent[-1].configuration, HOME)


def test_stale_state_is_a_fault_that_brakes_in_time():
    arm = Arm().arm()
    arm.guard.on_chunk(chunk(arm.now, np.full((40, 3), [0.008, 0, 0])), arm.now)
    arm.run(0.1)
    arm.fresh = False
    arm.run(0.1 + 2 * TICK)
    assert arm.guard.state is State.FAULT and "state older" in arm.guard.machine.reason
    arm.run(0.05)
    assert arm.speed == pytest.approx(0, abs=1e-9)
    arm.assert_inside()


def test_state_from_the_future_is_a_fault():
    arm = Arm().arm()
    arm.guard.on_state(arm.now + 0.2, HOME)
    arm.fresh = False
    arm.run(TICK)
    assert arm.guard.state is State.FAULT and "future" in arm.guard.machine.reason


def test_a_second_writer_is_a_fault_by_name():
    arm = Arm().arm()
    arm.guard.on_writers([], arm.now)
    assert arm.guard.state is State.ARMED
    arm.guard.on_writers(["rogue"], arm.now)
    assert arm.guard.state is State.FAULT and "rogue" in arm.guard.machine.reason


def test_a_late_tick_holds_and_a_slightly_late_one_catches_up():
    arm = Arm().arm()
    arm.guard.on_chunk(chunk(arm.now, np.full((40, 3), [0.008, 0, 0])), arm.now)
    arm.run(0.1)
    arm.run(2 * TICK, periods=2)
    assert arm.guard.state is State.ARMED
    arm.run(3 * TICK, periods=3)
    assert arm.guard.state is State.HOLDING and arm.guard.machine.reason == "tick overrun"
    arm.run(0.1)
    arm.assert_inside()


def test_actions_slightly_out_of_range_are_clamped_and_far_ones_hold():
    arm = Arm().arm()
    arm.guard.on_chunk(chunk(arm.now, np.full((4, 3), 0.012)), arm.now)
    arm.run(DT)
    np.testing.assert_allclose(arm.executed[0].delta, 0.01, atol=1e-12)
    assert arm.guard.counts["R1"] == 1


@pytest.mark.parametrize(("space", "mode"), SPACES)
def test_actions_far_out_of_range_for_more_than_five_steps_hold(space, mode):
    arm = Arm(embodiment(space, mode)).arm()
    high = 1.5 * arm.guard._action_high[1] + (0.5 if mode == "absolute" else 0.0)
    motion = arm.ahead(1, 0.0, 24)
    motion[8:13, 1] = high  # five of them, then good ones
    arm.offer(motion)
    arm.run(24 * DT)
    assert arm.state is State.ARMED and arm.guard.counts["R1"] == 5
    motion = arm.ahead(1, 0.0, 24)
    motion[8:, 1] = high
    arm.offer(motion)
    arm.run(15 * DT)
    axis = arm.robot.space.axes[1]
    assert arm.state is State.HOLDING and arm.reason == f"{axis} out of the action's limits for too long"
    assert arm.guard.counts["R1"] == 11 and arm.guard.counts["R2"] == 1
    arm.run(0.3)
    assert arm.speed < 1e-9
    arm.assert_inside()


def test_a_hold_for_actions_far_out_of_range_ends_only_with_a_chunk_that_is_good_throughout():
    def bad(n):
        return np.concatenate([np.zeros((24 - n, 3)), np.full((n, 3), [0.0, 0.015, 0.0])])

    arm = Arm().arm()
    arm.offer(bad(24))
    arm.run(7 * DT)
    assert arm.state is State.HOLDING
    for n in (24, 8, 1):  # a policy that goes on like this: no step of it is executed
        assert arm.offer(bad(n)) == "chunk out of the action's limits while held for that"
        arm.run(0.1)
        assert arm.state is State.HOLDING
    assert arm.speed < 1e-9 and len(arm.executed) <= 6
    assert arm.offer(bad(1)[::-1], stamp=arm.now - 2 * DT) is None, "the bad step is over"
    assert arm.state is State.ARMED
    arm.offer(bad(24))
    arm.run(10 * DT)
    assert arm.state is State.HOLDING, "one by itself is clamped as before, six in a row hold again"
    held = arm.now
    while arm.state is State.HOLDING and arm.now < held + 2.0:
        arm.offer(bad(24))
        arm.run(0.05)
    assert arm.state is State.FAULT and arm.now - held <= CONFIG.hold_timeout + 0.05, "counted from the first hold"
    assert "held for 1.0 s" in arm.reason
    arm.arm()
    assert arm.offer(bad(1)) is None, "arming forgets it"
    arm.assert_inside()


@pytest.mark.parametrize("space", ["joint", "cartesian", "pose"])
@pytest.mark.parametrize(("excess", "gross"), [(0.9, False), (1.1, True)])
def test_a_target_further_out_than_half_the_range_is_another_unit(space, excess, gross):
    arm = Arm(embodiment(space, "absolute")).arm().run(0.1)
    low, high = arm.guard._action_low[0], arm.guard._action_high[0]
    values = np.tile(arm.ahead(0, 0.0, 1), (24, 1))
    values[-1, 0] = high + excess * 0.5 * (high - low)
    said = arm.offer(values)
    assert ("another unit?" in (said or "")) == gross
    assert (arm.state is State.FAULT) == gross


@pytest.mark.parametrize(("space", "mode"), SPACES)
def test_degrees_for_radians_are_a_fault_before_anything_moves(space, mode):
    arm = Arm(embodiment(space, mode)).arm().run(0.1)
    sent = arm.last
    values = 57.3 * arm.guard._action_high[:3].max() * np.ones_like(arm.ahead(0, 0.0, 24))
    if space == "pose" and mode == "absolute":
        values[:, 3:] = [1, 0, 0, 0]
    assert "another unit?" in arm.offer(values)
    assert arm.state is State.FAULT
    arm.run(0.2)
    np.testing.assert_array_equal(arm.last, sent)
    arm.assert_inside()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Chunk(T0, DT, np.zeros((4, 2)), np.zeros(4)), "chunk of the wrong shape"),
        (Chunk(T0, DT, np.zeros((0, 3)), np.zeros(0)), "chunk of the wrong shape"),
        (Chunk(T0, DT, np.zeros((4, 3)), np.zeros(3)), "chunk of the wrong shape"),
        (Chunk(T0, DT, np.zeros((4, 3)), None), "chunk without its gripper"),
        (Chunk(T0, 0.02, np.zeros((4, 3)), np.zeros(4)), "chunk of another step"),
    ],
)
def test_chunks_that_do_not_fit_are_dropped_and_counted(bad, reason):
    arm = Arm().arm()
    assert arm.guard.on_chunk(bad, arm.now) == reason
    assert arm.guard.counts["R0"] == 1 and arm.guard.state is State.ARMED


def test_a_chunk_from_the_future_is_a_fault_that_says_to_compare_the_clocks():
    arm = Arm().arm()
    arm.offer(np.zeros((4, 3)), stamp=arm.now + 0.049)
    assert arm.state is State.ARMED
    assert "0.060 s in the future: compare the clocks" in arm.offer(np.zeros((4, 3)), stamp=arm.now + 0.06)
    assert arm.state is State.FAULT


# ---- arming and states


def test_arming_needs_a_fresh_state_inside_the_workspace_and_nobody_else():
    guard = Guard(ROBOT, CONFIG)
    with pytest.raises(ValueError, match="no measured position yet"):
        guard.arm(T0)
    guard.on_state(T0, shifted(HOME, 0, 0, 1))
    guard.on_writers(["rogue"], T0)
    with pytest.raises(ValueError, match=r"rogue.*0\.500 s old.*z at 1\.200 is outside"):
        guard.arm(T0 + 0.5)
    assert guard.state is State.IDLE and guard.tick(T0)[0] is None
    guard.on_writers([], T0)
    guard.on_state(T0 + 1, HOME)
    with pytest.raises(ValueError, match="clocks"):
        guard.arm(T0 + 0.9)
    guard.arm(T0 + 1)
    assert guard.state is State.ARMED


def test_nothing_moves_while_idle_and_disarming_brakes_first():
    arm = Arm()
    assert arm.guard.on_chunk(chunk(arm.now, np.zeros((4, 3))), arm.now) == "chunk while not armed"
    assert not arm.run(0.1).sent
    arm.arm()
    arm.guard.on_chunk(chunk(arm.now + 1e-4, np.full((24, 3), [0.008, 0, 0])), arm.now)
    arm.run(0.1)
    arm.guard.disarm()
    assert arm.guard.state is State.IDLE
    count = len(arm.sent)
    arm.run(0.1)
    assert 0 < len(arm.sent) - count < 12, "it decelerates, then is silent"
    assert not arm.guard.tracker.moving
    arm.assert_inside()


def test_a_fault_needs_arming_and_starts_at_the_measured_pose_without_a_jump():
    arm = Arm().arm()
    arm.guard.fault("a test", arm.now)
    arm.guard.on_chunk(chunk(arm.now, np.full((24, 3), 0.008)), arm.now)
    arm.run(0.2)
    np.testing.assert_array_equal(arm.sent[-1].configuration, HOME)
    arm.measured = shifted(HOME, 0.03, 0, 0)  # somebody pushed the arm
    arm.fresh = False
    for _ in range(16):
        arm.guard.on_state(arm.now + TICK, shifted(HOME, 0.03, 0, 0))
        arm.run(TICK)
    arm.guard.arm(arm.now)
    arm.fresh = True
    arm.run(0.2)
    np.testing.assert_allclose(arm.sent[-1].configuration, shifted(HOME, 0.03, 0, 0), atol=1e-9)
    arm.assert_inside()


def test_state_machine_follows_its_table_and_ignores_the_rest():
    events = {"arm", "hold", "resume", "fault", "disarm"}
    for state, event in itertools.product(State, events):
        machine = StateMachine()
        machine.state = state
        expected = TRANSITIONS.get((state, event))
        assert machine.apply(event, "why") == (expected is not None)
        assert machine.state is (expected or state)
        assert (machine.reason == "why") == (expected is not None)
    assert (State.FAULT, "resume") not in TRANSITIONS and (State.IDLE, "resume") not in TRANSITIONS


@pytest.mark.parametrize("field", ["tick", "state_timeout", "clamp_margin"])
def test_guard_config_refuses_what_makes_no_sense(field):
    with pytest.raises(ValueError, match=field):
        GuardConfig(**{**vars(CONFIG), field: 0.0})


def test_guard_runs_at_100_hz_or_more():
    with pytest.raises(ValueError, match="100 Hz"):
        GuardConfig(**{**vars(CONFIG), "tick": 0.02})


def test_the_path_stops_at_the_workspaces_bound():
    arm = Arm(home=[0.45, 0.95, 0.45]).arm()
    for _ in range(10):
        arm.guard.on_chunk(chunk(arm.now + 1e-5, np.full((16, 3), 0.01)), arm.now)
        arm.run(0.1)
    np.testing.assert_allclose(arm.guard.goal, ROBOT.limits.workspace_high - INSET, atol=1e-12)
    np.testing.assert_allclose(arm.sent[-1].configuration, arm.guard.goal, atol=1e-6)
    arm.assert_inside()


# ---- every space

QUARTER = math.pi / 2


def test_the_spaces_are_named_after_what_moves():
    joint, pose = Arm(embodiment("joint")).robot.space, Arm(embodiment("pose")).robot.space
    assert (joint.name, joint.axes, joint.size, joint.tangent, joint.linear) == ("joint", tuple(JOINTS), 7, 7, 7)
    assert (pose.name, pose.axes, pose.size, pose.tangent) == ("cartesian", ("x", "y", "z", "rx", "ry", "rz"), 7, 6)
    assert pose.problem(np.array([0.0] * 3)) == "a cartesian configuration has 7 values, got (3,)"
    assert pose.problem(np.array([0, 0, 0, 2.0, 0, 0, 0])) == "not a unit quaternion"
    np.testing.assert_array_equal(pose.normal([1, 2, 3, -1, 0, 0, 0])[3:], [1, 0, 0, 0])
    np.testing.assert_array_equal(pose.origin, [0, 0, 0, 1, 0, 0, 0])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1.5, 1.5), min_size=12, max_size=12))
def test_retract_inverts_difference_and_rotations_are_left_increments(values):
    space = Arm(embodiment("pose")).robot.space
    x = space.retract(space.origin, np.array(values[:6]))
    y = space.retract(x, np.array(values[6:]))
    turn = np.linalg.norm(values[9:])
    wrapped = np.array(values[6:]) if turn <= math.pi else space.difference(y, x)
    np.testing.assert_allclose(space.difference(y, x), wrapped, atol=1e-9)
    np.testing.assert_allclose(space.retract(x, space.difference(y, x)), y, atol=1e-9)
    np.testing.assert_allclose(
        matrix(y[3:]), matrix(space.retract(space.origin, np.array(values[6:]))[3:]) @ matrix(x[3:]), atol=1e-9
    )
    half = space.interpolate(x, y, 0.5)
    np.testing.assert_allclose(space.difference(y, half), space.difference(half, x), atol=1e-9)
    assert y[3] >= 0 and np.linalg.norm(y[3:]) == pytest.approx(1)


def test_deltas_add_in_the_frame_that_their_field_declares():
    turned = np.array([0, 0, 0, math.sqrt(0.5), 0, 0, math.sqrt(0.5)])  # 90 degrees about z
    step = np.array([0.01, 0, 0, 0.02, 0, 0])
    base = Arm(embodiment("pose")).robot.space.delta(turned, step)
    tool = Arm(embodiment("pose", frame="tool")).robot.space.delta(turned, step)
    np.testing.assert_allclose(base[:3], [0.01, 0, 0], atol=1e-12)
    np.testing.assert_allclose(tool[:3], [0, 0.01, 0], atol=1e-12)
    space = Arm(embodiment("pose")).robot.space
    np.testing.assert_allclose(space.difference(base, turned)[3:], [0.02, 0, 0], atol=1e-12)
    np.testing.assert_allclose(space.difference(tool, turned)[3:], [0, 0.02, 0], atol=1e-12)


def test_absolute_rotations_of_six_numbers_become_quaternions():
    robot = Arm(embodiment("pose", "absolute")).robot
    space = robot.space
    for vector in ([0.3, -0.2, 0.9], [QUARTER * 2, 0, 0], [0, QUARTER * 2 - 0.01, 0], [0, 0, -3.0], [0, 0, 0]):
        q = space.retract(space.origin, np.array([0, 0, 0, *vector]))[3:]
        columns = matrix(q)[:, :2].T.reshape(-1)
        action = np.array([[0.1, 0.2, 0.3, *(2.0 * columns[:3]), *columns[3:], 0.5]])
        motion = robot.motion_of(action)
        np.testing.assert_allclose(motion[0, :3], [0.1, 0.2, 0.3])
        np.testing.assert_allclose(matrix(motion[0, 3:]), matrix(q), atol=1e-9)
    delta = Arm(embodiment("pose")).robot
    np.testing.assert_array_equal(delta.motion_of(np.arange(7.0)[None]), [np.arange(6.0)])
    assert Arm().robot.motion_of(np.arange(4.0)[None]).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(("space", "mode"), SPACES)
def test_a_chunk_is_followed_to_its_goal_in_every_space(space, mode):
    arm = Arm(embodiment(space, mode)).arm()
    home = arm.measured
    arm.offer(arm.ahead(arm.robot.space.tangent - 1, 0.005, 16))
    arm.run(16 * DT + 2 * TICK)
    assert len(arm.executed) == 16
    arm.run(0.09)
    moved = np.zeros(arm.robot.space.tangent)
    moved[-1] = 0.08
    np.testing.assert_allclose(arm.robot.space.difference(arm.last, home), moved, atol=1e-9)
    np.testing.assert_allclose(sum(e.delta for e in arm.executed), moved, atol=1e-9)
    np.testing.assert_allclose(arm.sent[-1].velocity, 0, atol=1e-9)
    arm.assert_inside()


def test_velocities_are_those_of_the_path():
    for space, _ in SPACES[::2]:
        arm = Arm(embodiment(space)).arm()
        arm.offer(arm.ahead(0, 0.005))
        arm.run(0.3)
        step = arm.robot.space.difference(arm.last, arm.sent[-2].configuration)
        np.testing.assert_allclose(arm.sent[-1].velocity, step / TICK, atol=2e-3)
        assert arm.sent[-1].velocity[0] == pytest.approx(0.4, rel=0.01)


@pytest.mark.parametrize("space", ["joint", "pose"])
@pytest.mark.parametrize("reference", ["measured", "chunk_start"])
def test_deltas_from_the_measured_configuration(space, reference):
    arm = Arm(embodiment(space, reference=reference)).arm()
    home, last = arm.measured, arm.robot.space.tangent - 1
    shares = np.arange(1, 5)[:, None] if reference == "chunk_start" else 1.0
    arm.offer(arm.ahead(last, 0.005, 4) * shares)
    away = np.zeros(last + 1)
    away[last] = 0.02
    arm.fresh = False
    arm.guard.on_state(arm.now + TICK, home)
    arm.guard.on_state(arm.now + 3 * TICK, arm.robot.space.retract(home, away))
    arm.now += 3 * TICK
    arm.run(2 * TICK)
    goal = arm.robot.space.difference(arm.guard.goal, home)[last]
    expected = 0.025 if reference == "measured" else 0.005 * (arm.executed[-1].step.index + 1)
    assert goal == pytest.approx(expected)


@pytest.mark.parametrize(("sign", "bound"), [(1, "high"), (-1, "low")])
def test_joints_stop_at_their_limits_however_fast_they_come(sign, bound):
    values = embodiment("joint")
    values["limits"]["joints"].update(low=[-3.0] * 7, high=[2.0] * 7)
    arm = Arm(values).arm()
    for _ in range(14):
        arm.offer(np.full((16, 7), sign * 0.04))
        arm.run(16 * DT)
    limit = getattr(arm.guard.bounds, bound)
    np.testing.assert_allclose(arm.last, limit, atol=1e-4)
    assert np.all(sign * (limit - arm.last) >= 0)
    counts = arm.guard.counts
    assert counts["steps"] / 2 < counts["joint5 clamped"] <= counts["steps"] and arm.state is State.ARMED
    arm.assert_inside()


def test_the_leash_holds_each_joint_and_the_rotation():
    for space, lag in (("joint", 0.5), ("pose", 0.6)):
        arm = Arm(embodiment(space)).arm()
        arm.fresh, home, last = False, arm.measured, arm.robot.space.tangent - 1
        for _ in range(45):  # it stands still while the policy pushes on
            arm.offer(arm.ahead(last, 0.02, 8))
            for _ in range(4):
                arm.guard.on_state(arm.now + TICK, home)
                arm.run(TICK)
        assert arm.robot.space.difference(arm.guard.goal, home)[last] == pytest.approx(lag)
        assert arm.guard.counts["leash_hits"] > 0
        arm.assert_inside()


# ---- measured state


@pytest.mark.parametrize(("space", "axis"), [("joint", 3), ("position", 2)])
def test_a_state_out_of_its_range_is_a_fault_at_once_and_refuses_arming(space, axis):
    arm = Arm(embodiment(space)).arm()
    wrong, name = arm.measured.copy(), arm.robot.space.axes[axis]
    high, low = arm.guard.bounds.high[axis], arm.guard.bounds.low[axis]
    wrong[axis] = high + 0.019 * (high - low)
    arm.guard._measured.clear()
    arm.guard.on_state(arm.now + TICK / 4, wrong)
    assert arm.state is State.ARMED, "calibration"
    wrong[axis] = high + 0.021 * (high - low)
    arm.guard.on_state(arm.now + TICK / 2, wrong)
    assert arm.state is State.FAULT
    assert arm.reason == f"measured {name} at {wrong[axis]:.3f} is outside {low:.3f} .. {high:.3f}: " + (
        "another unit or another joint?"
    )
    arm.guard.disarm()
    with pytest.raises(ValueError, match=f"not armed: {name} at"):
        arm.guard.arm(arm.now + TICK / 2)


@pytest.mark.parametrize(("space", "name"), [("joint", "joint5"), ("position", "tool"), ("pose", "rotation")])
def test_a_state_that_no_arm_could_have_come_to_is_a_fault(space, name):
    arm = Arm(embodiment(space)).arm()
    i = arm.guard.bounds.names.index(name)
    far = np.zeros(arm.robot.space.tangent)
    possible = arm.guard.bounds.lag[i] + 2 * arm.guard.bounds.speed[i] * TICK
    far[arm.guard.bounds.starts[i]] = 0.99 * possible
    arm.guard.on_state(arm.now + TICK, arm.robot.space.retract(arm.measured, far))
    assert arm.state is State.ARMED
    arm = Arm(embodiment(space)).arm()
    far[arm.guard.bounds.starts[i]] = 1.01 * possible
    arm.guard.on_state(arm.now + TICK, arm.robot.space.retract(arm.measured, far))
    assert arm.state is State.FAULT and arm.reason.startswith(f"measured {name} jumped by")


def test_an_arm_that_does_not_follow_its_command_is_a_fault():
    arm = Arm(embodiment("joint")).arm()
    arm.fresh = False
    for i in range(1, 30):
        arm.guard.on_state(arm.now + TICK, shifted(JOINT_HOME, *[0.04 * i] + [0] * 6))
        arm.run(TICK)
        assert arm.state is (State.ARMED if 0.04 * i <= 1.0 + 1e-9 else State.FAULT)
    assert arm.reason.startswith("joint1 is 1.0") and arm.reason.endswith("away from its command")


def test_after_a_fault_far_from_the_last_command_arming_says_to_disarm_first():
    arm = Arm(embodiment("joint")).arm().run(0.05)
    arm.guard.fault("a test", arm.now)
    arm.run(0.05)
    arm.guard._measured.clear()
    arm.guard.on_state(arm.now, shifted(JOINT_HOME, 0, 0, 0, 0, 0, 0, 0.6))
    with pytest.raises(ValueError, match=r"joint7 is 0.600 away from its last command; disarm first"):
        arm.guard.arm(arm.now)
    arm.guard.disarm()
    arm.guard.arm(arm.now)
    assert arm.guard.tracker.configuration[6] == pytest.approx(JOINT_HOME[6] + 0.6)


def test_a_state_of_another_shape_is_a_fault():
    arm = Arm(embodiment("joint")).arm()
    arm.guard.on_state(arm.now + TICK, np.zeros(6))
    assert arm.state is State.FAULT and "a joint configuration has 7 values" in arm.reason


def test_states_that_are_not_finite_or_out_of_order_are_dropped():
    arm = Arm().arm()
    arm.guard.on_state(arm.now + TICK, HOME * np.nan)
    arm.guard.on_state(arm.now, HOME)
    arm.guard.on_state(arm.now - 0.05, HOME)
    assert arm.guard.counts["R0"] == 3 and arm.state is State.ARMED
    assert arm.guard.counts["R0 state not finite"] == 1 and arm.guard.counts["R0 state out of order"] == 2


def test_stamps_that_jump_back_hold_until_fresh_state_comes_and_are_a_fault_without():
    for comes in (True, False):
        arm = Arm().arm()
        arm.offer(arm.ahead(0, 0.005))
        arm.run(0.1)
        arm.guard.on_state(arm.now - 10, arm.measured)
        arm.fresh = False
        arm.run(TICK)
        assert arm.state is State.HOLDING and "position jumped back by 10.0" in arm.reason
        arm.run(0.5)
        assert arm.state is State.HOLDING
        assert arm.offer(arm.ahead(0, 0.005)) == "chunk before fresh state"
        if comes:
            arm.fresh = True
            arm.run(TICK)
            assert arm.offer(arm.ahead(0, 0.005)) is None
            assert arm.state is State.ARMED
        else:
            arm.run(0.55)
            assert arm.state is State.FAULT
        arm.assert_inside()


def test_a_jump_of_the_wall_clock_holds_and_pairs_nothing_across_it():
    for by in (-10.0, 10.0):
        arm = Arm().arm()
        arm.offer(arm.ahead(0, 0.005))
        arm.run(0.1)
        arm.now += by
        arm.guard.on_clock_jump(by, arm.now)
        assert arm.state is State.HOLDING and arm.reason == f"the wall clock jumped by {by:.3f} s"
        arm.fresh = False
        arm.checker.restart()
        arm.run(0.3)
        assert arm.state is State.HOLDING, "no state yet on the new clock"
        assert arm.offer(arm.ahead(0, 0.005)) == "chunk before fresh state"
        arm.fresh = True
        arm.run(TICK)
        assert arm.offer(arm.ahead(0, 0.005), stamp=arm.now - 0.5) == "out-of-order chunk"
        assert arm.offer(arm.ahead(0, 0.005)) is None and arm.state is State.ARMED
        arm.run(0.1)
        arm.assert_inside()
    arm.guard.on_clock_jump(-1.0, arm.now - 1.0)
    arm.now -= 1.0
    arm.fresh = False
    arm.run(1.02)
    assert arm.state is State.FAULT


# ---- driver, stream, problems


def test_a_driver_that_stops_is_sent_nothing_until_it_runs_and_somebody_arms():
    arm = Arm().arm()
    arm.guard.on_mode("running", arm.now)
    arm.offer(arm.ahead(0, 0.005))
    arm.run(0.1)
    arm.guard.on_mode("protective_stop", arm.now)
    count = len(arm.sent)
    arm.run(0.1)
    assert arm.state is State.FAULT and arm.reason == "the driver is in protective_stop" and len(arm.sent) == count
    with pytest.raises(ValueError, match="not armed: the driver is in protective_stop"):
        arm.guard.arm(arm.now)
    arm.guard.on_mode("running", arm.now)
    arm.run(0.1)
    assert arm.state is State.FAULT and len(arm.sent) == count, "no motion on release"
    arm.measured = shifted(arm.measured, 0.2, 0, 0)
    arm.guard._measured.clear()
    arm.guard.on_state(arm.now, arm.measured)
    arm.guard.arm(arm.now)
    arm.run(TICK)
    np.testing.assert_allclose(arm.last, arm.measured)


def test_a_required_mode_must_have_been_heard():
    values = embodiment("position")
    values["driver"] = {"required_mode": "running"}
    arm = Arm(values)
    with pytest.raises(ValueError, match="the driver is in an unknown mode, not running"):
        arm.arm()
    arm.guard.on_mode("reduced", arm.now)
    with pytest.raises(ValueError, match="the driver is in reduced, not running"):
        arm.arm()
    arm.guard.on_mode("running", arm.now)
    assert arm.arm().state is State.ARMED


def test_a_source_that_gave_signs_of_life_holds_without_them():
    arm = Arm().arm()
    arm.guard.on_heartbeat("teleop", arm.now)
    arm.offer(arm.ahead(0, 0.005, 100))
    arm.run(0.2)
    assert arm.state is State.ARMED, "nobody ever promised any"
    arm.guard.on_heartbeat("policy", arm.now)
    arm.run(0.1 - TICK)
    assert arm.state is State.ARMED
    arm.run(2 * TICK)
    assert arm.state is State.HOLDING and arm.reason == "no sign of life from policy for 0.1 s"
    assert arm.offer(arm.ahead(0, 0.005)) is None
    arm.run(0.05)
    assert arm.state is State.ARMED, "a chunk is a sign of life"


@pytest.mark.parametrize(("reaction", "state"), [("R0", "ARMED"), ("R2", "HOLDING"), ("R3", "FAULT")])
def test_a_nodes_problem_gets_the_reaction_that_it_asks_for(reaction, state):
    arm = Arm().arm()
    assert arm.guard.on_problem("/joint_states lacks joint3", reaction, arm.now) == "/joint_states lacks joint3"
    assert arm.state.value == state and arm.guard.counts[reaction] == 1
    assert arm.guard.counts[f"{reaction} /joint_states lacks joint3"] == 1


def test_a_counter_is_one_for_all_values_of_a_reason():
    arm = Arm().arm()
    arm.guard.on_problem("joint3 is 0.25 off", "R0", arm.now)
    arm.guard.on_problem("joint3 is -1.50 off", "R0", arm.now)
    assert arm.guard.to_dict()["R0 joint3 is # off"] == 2


def test_a_pause_longer_than_a_driver_waits_begins_anew_at_rest():
    for periods, moves in ((8, True), (9, False)):
        arm = Arm().arm()
        arm.offer(arm.ahead(0, 0.005))
        arm.run(0.1)
        before = arm.last
        arm.run(periods * TICK, periods=periods)
        assert arm.state is State.HOLDING and arm.reason == "tick overrun"
        assert (np.linalg.norm(arm.last - before) > 1e-4) == moves
        arm.run(0.1)
        arm.assert_inside()


# ---- bounds of time, on numbers without rounding

EXACT = GuardConfig(
    tick=1 / 128, state_timeout=0.125, stream_timeout=0.125, hold_timeout=1.0, max_skew=0.0625, clamp_margin=0.25
)
NOW, A_LITTLE = 1024.0, 2.0**-10  # [s]


def exact(armed=True):
    """Return a guard that has measured its arm now."""
    values = embodiment("position")
    values["action_dt"] = 1 / 64
    guard = Guard(parse_robot(values), EXACT)
    guard.on_state(NOW, HOME)
    if armed:
        guard.arm(NOW)
    return guard


def exact_chunk(stamp, motion=(0.0, 0.0, 0.0), **kwargs):
    return Chunk(stamp, 1 / 64, np.atleast_2d(np.asarray(motion, float)), np.array([-1.0]), **kwargs)


@pytest.mark.parametrize("away", [0.125, -0.0625])
def test_arming_takes_a_state_up_to_its_bounds(away):
    exact(armed=False).arm(NOW + away)
    with pytest.raises(ValueError, match="s old; compare the clocks"):
        exact(armed=False).arm(NOW + away + math.copysign(A_LITTLE, away))


def test_a_state_is_fresh_up_to_its_timeout_and_a_clock_apart_up_to_its_skew():
    for away, says in ((0.125, "state older than 0.125 s"), (-0.0625, "state from the future")):
        guard = exact()
        guard.tick(NOW + away)
        assert guard.state is State.ARMED
        guard.tick(NOW + away + math.copysign(A_LITTLE, away))
        assert guard.state is State.FAULT and says in guard.machine.reason


def test_a_state_out_of_order_up_to_the_skew_is_dropped_and_beyond_it_a_jump():
    guard = exact()
    guard.on_state(NOW, shifted(HOME, 0.01, 0, 0))
    guard.on_state(NOW - 0.0625, HOME)
    guard.tick(NOW)
    assert guard.state is State.ARMED and guard.counts["R0 state out of order"] == 2
    guard.on_state(NOW - 0.0625 - A_LITTLE, HOME)
    guard.tick(NOW)
    assert guard.state is State.HOLDING and "jumped back by 0.063 s" in guard.machine.reason


def test_a_measurement_stamped_after_its_arrival_by_more_than_the_skew_is_a_fault():
    guard = exact()
    guard.on_state(NOW + 0.0625, HOME, now=NOW)
    guard.on_state(NOW + 0.07, HOME, now=NOW + 60.0)  # that is old: what to make of it is the tick's
    assert guard.state is State.ARMED
    guard.on_state(NOW + 0.125, HOME, now=NOW + 0.0625 - A_LITTLE)
    assert guard.state is State.FAULT and "0.063 s in the future: compare the clocks" in guard.machine.reason
    guard.disarm()
    guard.tick(NOW + 0.125)
    with pytest.raises(ValueError, match="s in the future: compare the clocks"):
        guard.arm(NOW + 0.125)
    guard.on_state(NOW + 0.25, HOME, now=NOW + 0.25)
    guard.arm(NOW + 0.25)


def test_old_stamps_on_their_way_are_no_fault_right_after_the_clock_jumped_back():
    guard = exact()
    guard.on_clock_jump(-0.5, NOW - 0.5)
    guard.on_state(NOW, HOME, now=NOW - 0.5)
    assert guard.state is State.HOLDING
    guard.on_state(NOW + 1.0, HOME, now=NOW - 0.4)
    assert guard.state is State.FAULT and "in the future" in guard.machine.reason


def test_a_chunk_ahead_of_now_up_to_the_skew_is_taken():
    guard = exact()
    assert guard.on_chunk(exact_chunk(NOW + 0.0625), NOW) is None
    guard.on_chunk(exact_chunk(NOW + 0.0625 + A_LITTLE), NOW)
    assert guard.state is State.FAULT and "a chunk is 0.063 s in the future" in guard.machine.reason


def test_the_timeouts_of_actions_and_of_a_hold_are_held_to():
    guard = exact()
    guard.on_chunk(exact_chunk(NOW + 1 / 128), NOW)
    guard.tick(NOW)
    over = NOW + 1 / 128 + 1 / 64  # when the step is
    for at, state in ((0.125, State.ARMED), (0.125 + A_LITTLE, State.HOLDING)):
        guard.on_state(over + at, HOME)
        guard.tick(over + at)
        assert guard.state is state
    assert guard.machine.reason == "no action for 0.125 s"
    held = over + 0.125 + A_LITTLE
    for at, state in ((1.0, State.HOLDING), (1.0 + A_LITTLE, State.FAULT)):
        guard.on_state(held + at, HOME)
        guard.tick(held + at)
        assert guard.state is state
    assert guard.machine.reason == "held for 1.0 s (no action for 0.125 s)"


def test_a_source_is_silent_after_the_stream_timeout_and_no_sooner():
    guard = exact()
    guard.on_heartbeat("policy", NOW)
    for at, state in ((0.125, State.ARMED), (0.125 + A_LITTLE, State.HOLDING)):
        guard.on_state(NOW + at, HOME)
        guard.tick(NOW + at)
        assert guard.state is state
    assert "no sign of life" in guard.machine.reason


@pytest.mark.parametrize(("last", "state"), [(1.0, State.FAULT), (1.0 + A_LITTLE, State.HOLDING)])
def test_the_last_three_chunks_that_are_not_finite_count_whatever_came_before(last, state):
    guard = exact()
    for at in (-2.0, 0.0, 0.5, last):
        guard.on_chunk(exact_chunk(NOW + at, (math.nan, 0.0, 0.0)), NOW + at)
    assert guard.state is state


def test_bad_chunks_from_before_a_jump_of_the_clock_are_forgotten():
    guard = exact()
    for at in (0.0, 0.25):
        guard.on_chunk(exact_chunk(NOW + at, (math.nan, 0.0, 0.0)), NOW + at)
    guard.on_clock_jump(-0.25, NOW)
    guard.on_chunk(exact_chunk(NOW + 0.125, (math.nan, 0.0, 0.0)), NOW + 0.125)
    assert guard.state is State.HOLDING


def test_without_fresh_state_a_second_after_a_jump_of_the_clock_it_is_a_fault():
    guard = exact()
    guard.config = dataclasses.replace(EXACT, hold_timeout=10.0)
    guard.on_clock_jump(5.0, NOW + 5.0)
    for at, state in ((1.0, State.HOLDING), (1.0 + A_LITTLE, State.FAULT)):
        guard.tick(NOW + 5.0 + at)
        assert guard.state is state
    assert guard.machine.reason == "state older than 0.125 s"


def test_the_grippers_dwell_survives_a_jump_of_the_clock():
    arm = gripper_arm(gripper_dwell=4 * DT).arm()
    play_gripper(arm, 1.0)
    arm.now -= 10.0
    arm.guard.on_clock_jump(-10.0, arm.now)
    arm.checker.restart()
    arm.run(2 * TICK)
    assert play_gripper(arm, *[0.0] * 6)[-1] == 0.0


def test_a_delta_is_another_unit_from_twenty_half_ranges_outside_on():
    for excess, state in ((19.5, State.ARMED), (20.5, State.FAULT)):
        guard = exact()
        guard.on_chunk(exact_chunk(NOW + 1 / 128, ((1 + excess) * guard.robot.motion.high[0], 0.0, 0.0)), NOW)
        assert guard.state is state


def test_a_chunk_that_is_left_out_makes_room_for_the_next_one():
    guard = exact()
    guard.approval = True
    guard.leave_out(7)  # none waits
    guard.on_chunk(exact_chunk(NOW, id=7), NOW)
    guard.leave_out(6)
    assert guard.pending is not None and guard.pending.id == 7
    assert guard.on_chunk(exact_chunk(NOW, id=8), NOW) == "out-of-order chunk"
    assert guard.on_chunk(exact_chunk(NOW + A_LITTLE, id=9), NOW) is None
    assert guard.pending.id == 7 and guard.counts["chunks while one waits"] == 1, "what is looked at stays"
    guard.leave_out(7)
    assert guard.pending is None
    guard.on_chunk(exact_chunk(NOW + 2 * A_LITTLE, id=10), NOW)
    assert guard.pending.id == 10


def test_an_approved_chunk_begins_with_the_next_ticks_command():
    guard = exact()
    guard.approval = True
    guard.on_chunk(exact_chunk(NOW, id=7), NOW)
    guard.approve(7, NOW)
    _, executed = guard.tick(NOW + 1 / 128)
    assert executed is not None and executed.step.chunk.id == 7 and executed.step.index == 0


def test_a_tick_moves_by_one_period():
    def moved(*periods):
        guard = exact()
        guard.on_chunk(exact_chunk(NOW + 1 / 128, (0.008, 0.0, 0.0)), NOW)
        guard.tick(NOW)
        command, _ = guard.tick(NOW + 1 / 64, *periods)
        assert command is not None
        return command.configuration[0]

    assert 0 < moved() == moved(1) < moved(2)


def test_a_guard_begins_with_nothing_counted_and_at_full_speed():
    guard = exact(armed=False)
    assert [guard.to_dict()[r] for r in ("R0", "R1", "R2", "R3")] == [0, 0, 0, 0]
    assert guard.to_dict()["speed_scale"] == 1.0
    guard.set_speed(1.0)


def test_arming_waits_until_the_arm_stands():
    arm = Arm().arm()
    arm.offer(arm.ahead(0, 0.005))
    arm.run(0.1)
    arm.guard.fault("a test", arm.now)
    with pytest.raises(ValueError, match="not armed: still decelerating"):
        arm.guard.arm(arm.now)
    arm.run(0.2)
    arm.guard.arm(arm.now)


def test_the_lag_behind_the_goal_is_told():
    arm = Arm().arm()
    assert arm.guard.to_dict()["lag_m.max"] == 0
    arm.offer(arm.ahead(0, 0.005))
    arm.run(0.1)
    assert 0 < arm.guard.to_dict()["lag_m.max"] < 0.02


@pytest.mark.parametrize(
    ("motion", "says"), [(np.full(3, np.nan), "not finite"), (shifted(HOME, 0.1, 0, 0), "speed of tool")]
)
def test_a_path_that_would_leave_the_envelope_is_not_sent_and_is_a_fault(motion, says):
    arm = Arm().arm().run(0.05)
    before = arm.last
    arm.guard.tracker.toward = lambda goal, velocity: Motion(motion, np.zeros(3), np.zeros(3))
    arm.run(3 * TICK)
    np.testing.assert_array_equal(arm.last, before)
    assert arm.state is State.FAULT and arm.reason.startswith(f"the path would leave the envelope: {says}")
    assert arm.guard.counts["envelope_stops"] == 1 and not arm.checker.violations


# ---- obstacles


class Fingertip:
    """A plane arm for a kinematics: the tool is at (q0, q1, q2) / 2 m; a wall at x = 0.3."""

    def place(self, q):
        return SimpleNamespace(arm=self, q=q, tools=q[:, :3] / 2, jacobian=lambda: np.eye(6, 7) / 2)

    def way_clearance(self, way, finer, keep_out, margin):
        return float(0.3 - way.q[:, 0].max() / 2), "finger and wall"


def test_joints_brake_before_what_kinematics_says_is_near():
    arm = Arm(embodiment("joint"), kinematics=Fingertip()).arm()
    for _ in range(12):
        arm.offer(arm.ahead(0, 0.03, 16))
        arm.run(0.1)
    assert "R2 would come too near: # m between finger and wall" in arm.guard.counts
    assert 0.28 < arm.last[0] / 2 <= 0.29 + 1e-9
    arm.run(0.2)
    arm.offer(arm.ahead(0, -0.03, 16))
    before = arm.last[0]
    arm.run(0.2)
    assert arm.last[0] < before - 0.1, "it may go away from it"
    arm.assert_inside()


def test_arming_refuses_near_an_obstacle():
    arm = Arm(embodiment("joint"), home=shifted(JOINT_HOME, 0.59, 0, 0, 0, 0, 0, 0), kinematics=Fingertip())
    with pytest.raises(ValueError, match=r"not armed: 0.005 m between finger and wall"):
        arm.arm()


def test_joint_commands_keep_the_tool_speed_and_the_workspace():
    values = embodiment("joint")
    values["limits"].update(max_speed=0.4, workspace_low=[-1, -1, -2], workspace_high=[0.2, 1, 2])
    arm = Arm(values, kinematics=Fingertip()).arm()
    for _ in range(20):
        arm.offer(arm.ahead(0, 0.03, 16))
        arm.run(0.1)
    speeds = [
        np.linalg.norm(b.configuration[:3] - a.configuration[:3]) / 2 / TICK for a, b in itertools.pairwise(arm.sent)
    ]
    assert 0.36 < max(speeds) <= 0.4
    assert 0.19 < arm.last[0] / 2 <= 0.2
    assert arm.guard.counts["R1 tool speed limited"] > 0
    assert any("outside the workspace" in reason for reason in arm.guard.counts)
    arm.assert_inside()


@pytest.mark.parametrize("space", ["position", "pose"])
def test_a_tool_stays_out_of_the_keep_out_boxes(space):
    values = embodiment(space)
    values["limits"]["keep_out"] = [{"low": [0.1, 0.0, 0.0], "high": [0.2, 1.0, 1.0]}]
    arm = Arm(values).arm()
    for _ in range(10):
        arm.offer(arm.ahead(0, 0.01, 16))
        arm.run(0.1)
    assert 0.08 < arm.last[0] <= 0.09 + 1e-9
    assert arm.guard.counts["R2 would come too near: # m between the tool and the keep-out box at [#, #, #]"] > 0
    arm.assert_inside()


# ---- the gripper


def gripper_arm(**driver):
    values = embodiment("position")
    values["action"][1].update(kind="gripper_position", low=[0.0], high=[1.0])
    values["driver"] = driver
    return Arm(values)


def play_gripper(arm, *values):
    """Send a chunk of one gripper value per step, run it and return what was commanded at each tick."""
    first = len(arm.sent)
    chunk = dataclasses.replace(arm.chunk(np.zeros((len(values), 3))), gripper=np.array(values, float))
    assert arm.guard.on_chunk(chunk, arm.now) is None
    arm.run(len(values) * DT)
    return [c.gripper for c in list(arm.sent)[first:]]


def test_small_changes_of_the_gripper_are_not_sent():
    arm = gripper_arm(gripper_hysteresis=0.1).arm()
    assert play_gripper(arm, 0.5, 0.55, 0.6, 0.65, 0.55, 0.5)[::2] == [0.5, 0.5, 0.5, 0.65, 0.65, 0.5]


def test_the_gripper_changes_no_more_often_than_its_dwell_and_then_to_the_newest():
    arm = gripper_arm(gripper_dwell=3 * DT).arm()
    assert play_gripper(arm, 0.0, 1.0, 0.4, 0.6, 0.6, 0.6)[::2] == [0.0, 0.0, 0.0, 0.6, 0.6, 0.6]


def test_a_change_that_waits_for_the_dwell_is_not_sent_in_a_hold():
    arm = gripper_arm(gripper_dwell=4 * DT).arm()
    play_gripper(arm, 1.0, 0.0)
    arm.guard.hold("a test", arm.now)
    arm.run(0.2)
    assert arm.sent[-1].gripper == 1.0
    arm.offer(np.zeros((8, 3)), gripper=1.0)
    arm.run(0.05)
    assert arm.sent[-1].gripper == 1.0


def test_after_a_fault_the_gripper_keeps_its_command_and_from_idle_it_has_none():
    arm = gripper_arm().arm()
    play_gripper(arm, 0.2)
    arm.guard.fault("a test", arm.now)
    arm.run(0.1)
    arm.arm().run(TICK)
    assert arm.sent[-1].gripper == 0.2
    arm.guard.disarm()
    arm.run(0.1)
    arm.arm().run(TICK)
    assert arm.sent[-1].gripper is None


def test_gripper_values_out_of_range_are_clamped():
    arm = gripper_arm().arm()
    assert play_gripper(arm, 1.3)[0] == 1.0 and arm.guard.counts["R1 gripper clamped"] == 1


@pytest.mark.parametrize(
    ("direction", "opening", "fault"), [(1, 0.0, True), (1, 1.0, False), (-1, 1.0, True), (1, 0.45, False)]
)
def test_a_gripper_that_moves_against_its_command_is_a_fault_and_refuses_arming(direction, opening, fault):
    arm = gripper_arm(gripper_direction=direction).arm()
    arm.opening = 0.5
    for i in range(12):
        play_gripper(arm, *[0.5 if i == 0 else 0.9] * 8)
        if i:
            arm.opening = opening
    assert (arm.state is State.FAULT) == fault
    if fault:
        assert arm.reason.startswith(f"the gripper went from 0.50 to {opening:.2f} against its command")
        arm.guard.disarm()
        with pytest.raises(ValueError, match="against its command"):
            arm.guard.arm(arm.now)


# ---- the operator's controls


def test_slow_mode_scales_speed_and_commanded_deltas_and_brakes_as_hard_as_ever():
    fast, slow = Arm().arm(), Arm().arm()
    slow.guard.set_speed(0.25)
    for arm in (fast, slow):
        arm.offer(arm.ahead(0, 0.008))
        arm.run(0.2)
    assert slow.speed == pytest.approx(0.25 * fast.speed, rel=0.01)
    assert slow.executed[-1].delta[0] == pytest.approx(0.002)
    absolute = Arm(embodiment("position", "absolute")).arm()
    absolute.guard.set_speed(0.1)
    absolute.offer(np.tile(shifted(HOME, 0.14, 0, 0), (40, 1)))
    absolute.run(0.3)
    assert absolute.speed == pytest.approx(0.15 / math.sqrt(3), rel=0.01)
    for scale in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"in \(0, 1\]"):
            slow.guard.set_speed(scale)
    assert slow.guard.to_dict()["speed_scale"] == 0.25


def test_a_chunk_waits_for_approval_and_then_begins_now():
    arm = Arm().arm()
    arm.guard.approval = True
    assert arm.offer(arm.ahead(0, 0.005, 8), id=7) is None
    arm.run(2.0)
    assert arm.state is State.ARMED and not arm.executed and arm.guard.pending.id == 7
    with pytest.raises(ValueError, match="chunk 6 does not wait for approval; chunk 7 waits"):
        arm.guard.approve(6, arm.now)
    arm.guard.approve(7, arm.now)
    arm.run(0.2)
    assert [e.step.index for e in arm.executed] == list(range(8)) and arm.executed[0].step.chunk.id == 7
    assert arm.last[0] == pytest.approx(0.04)
    arm.run(2.0)
    assert arm.state is State.ARMED, "it waits for the next one"
    with pytest.raises(ValueError, match="chunk 7 does not wait for approval; none waits"):
        arm.guard.approve(7, arm.now)
    assert arm.offer(arm.ahead(0, 0.005, 8), id=9) is None
    assert arm.offer(arm.ahead(0, 0.005, 8), id=8, stamp=arm.now) == "out-of-order chunk"
    arm.fresh = False
    arm.run(0.2)
    with pytest.raises(ValueError, match=r"does not wait|not executed"):
        arm.guard.approve(9, arm.now)
    arm.assert_inside()


def test_a_takeover_begins_at_the_last_command_and_so_does_the_hand_back():
    arm = Arm().arm()
    arm.offer(arm.ahead(0, 0.005))
    arm.run(0.1)
    arm.guard.take_over("teleop", arm.now)
    assert arm.offer(arm.ahead(0, 0.005)) == "chunk of policy while teleop is active"
    arm.run(0.5)
    stopped = arm.last
    assert arm.state is State.ARMED and arm.speed < 1e-9
    np.testing.assert_allclose(stopped, arm.guard.goal, atol=1e-9)
    assert arm.offer(arm.ahead(1, 0.005, 4), source="teleop") is None
    arm.run(0.1)
    assert arm.executed[-1].source == "teleop"
    np.testing.assert_allclose(arm.last, shifted(stopped, 0, 0.02, 0), atol=1e-9)
    arm.guard.hand_back(arm.now)
    handed = arm.now
    assert arm.offer(arm.ahead(0, 0.005), source="teleop") == "chunk of teleop while policy is active"
    assert arm.offer(arm.ahead(0, 0.005), stamp=handed - 0.01) == "out-of-order chunk", "an observation from before"
    assert arm.offer(arm.ahead(0, 0.005, 1)) is None
    arm.run(0.05)
    np.testing.assert_allclose(arm.last, shifted(stopped, 0.005, 0.02, 0), atol=1e-9)
    arm.assert_inside()


# ---- the control run


def test_checks_off_needs_its_flag_and_lets_everything_out(monkeypatch, caplog):
    off = {**vars(CONFIG), "unsafe_checks_off": True}
    with pytest.raises(ValueError, match="DITA_UNSAFE_TEST=1"):
        GuardConfig(**off)
    monkeypatch.setenv("DITA_UNSAFE_TEST", "1")
    arm = Arm(config=GuardConfig(**off)).arm()
    assert "CHECKS ARE OFF" in caplog.text and arm.reason == "armed, WITH THE CHECKS OFF"
    arm.offer(np.full((8, 3), 5.0))
    arm.run(0.1)
    arm.offer(np.full((8, 3), np.nan))
    arm.guard.on_writers(["rogue"], arm.now)
    arm.run(0.1)
    assert arm.checker.violations["not finite"] > 0 and arm.checker.violations["speed of tool"] > 0
    assert arm.state is State.ARMED


# ---- limits that are missing


def test_missing_limits_are_named():
    values = embodiment("joint")
    values["limits"]["joints"]["jerk"] = None
    with pytest.raises(ValueError, match=r"no limits.joints.jerk for joint1; no limits.joints.jerk for joint2"):
        parse_robot(values)
    values = embodiment("joint")
    values["limits"]["joints"]["velocity"][0] = None
    with pytest.raises(ValueError, match=r"no limits.joints.velocity for joint7: the guard does not move it"):
        parse_robot(values)
    values = embodiment("joint")
    values["driver"] = {"joints": [*JOINTS[:6], "wrist"]}
    with pytest.raises(ValueError, match=r"no limits.joints for wrist"):
        parse_robot(values)
    values = embodiment("pose")
    del values["limits"]["max_angular_jerk"]
    with pytest.raises(ValueError, match=r"no limits.max_angular_jerk"):
        parse_robot(values)
    robot = parse_robot(values, need_limits=False)
    assert robot.bounds is None
    with pytest.raises(ValueError, match="has no limits for what it moves"):
        Guard(robot, CONFIG)


def test_joint_limits_go_by_name():
    bounds = Arm(embodiment("joint")).guard.bounds
    assert bounds.names == tuple(JOINTS)
    np.testing.assert_array_equal(bounds.speed, [2.1, 2.1, 2.1, 2.1, 2.6, 2.6, 2.6])
    np.testing.assert_array_equal(bounds.low, [-2.9, -1.7, -2.9, -3.0, -2.9, 0.0, -2.9])
    np.testing.assert_array_equal(bounds.lag, np.full(7, 0.5))
    pose = Arm(embodiment("pose")).guard.bounds
    assert pose.names == ("tool", "rotation") and pose.speed.tolist() == [1.5, 2.5] and pose.lag.tolist() == [0.15, 0.6]
    np.testing.assert_allclose(pose.per_axis(pose.speed), np.repeat([1.5, 2.5], 3) / math.sqrt(3))
    np.testing.assert_allclose(pose.norms(np.array([3, 4, 0, 0, 5, 12.0])), [5, 13])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"driver": {"command": "pose"}}, "command: pose cannot carry joints"),
        ({"driver": {"command": "telepathy"}}, "no 'telepathy'; there are pose, twist"),
        ({"driver": {"joints": JOINTS[:3]}}, "joints has 7 values, got 3 names"),
        ({"driver": {"joints": [*JOINTS[:6], JOINTS[0]]}}, "a name twice"),
        ({"driver": {"joints": "joint"}}, "must be a list of names"),
        ({"driver": {"gripper": "suction"}}, "no 'suction'"),
        ({"driver": {"gripper_direction": 2}}, "no 2; there are 1, -1"),
        ({"driver": {"gripper_dwell": -1.0}}, "gripper_dwell must be a positive number"),
        ({"driver": {"colour": "red"}}, "unknown colour"),
    ],
)
def test_driver_problems_are_named(change, says):
    with pytest.raises(ValueError, match=says):
        parse_robot({**embodiment("joint"), **change})


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("velocity", [1.0] * 6, "velocity needs a value for each of joint7, joint6"),
        ("velocity", [1.0] * 6 + [0.0], "velocity must be positive, got 0.0 for joint1"),
        ("high", [5.0] * 6 + [-9.0], "low must be below high, got -2.9 and -9.0 for joint1"),
        ("low", [math.nan] + [-3.0] * 6, "low must be a finite number, got nan for joint7"),
        ("max_lag", 0, "max_lag must be a positive number"),
        ("names", ["a", "a"], "a name twice"),
        ("colour", 1, "unknown colour"),
    ],
)
def test_joint_limit_problems_are_named(key, value, says):
    values = embodiment("joint")
    values["limits"]["joints"][key] = value
    with pytest.raises(ValueError, match=says):
        parse_robot(values)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ([(1, {"mode": "absolute", "reference": None})], "must share mode and reference"),
        ([(1, {"kind": "ee_rotation_6d"})], "executes one joint_position"),
        (
            [(0, {"frame": "tool"}), (1, {"kind": "gripper_position", "size": 1, "low": [0], "high": [1]})],
            "at most one",
        ),
    ],
)
def test_actions_that_do_not_fit_together_are_named(changes, says):
    values = embodiment("pose")
    for i, change in changes:
        values["action"][i].update(change)
    with pytest.raises(ValueError, match=says):
        parse_robot(values)


def test_frames_that_cannot_be_followed_are_named():
    with pytest.raises(ValueError, match="hand is in the tool's frame, which needs a rotation field"):
        parse_robot(embodiment("position", frame="tool"))
    with pytest.raises(ValueError, match="an absolute pose is in the base frame"):
        parse_robot(embodiment("pose", "absolute", frame="tool"))


def plain(values):
    """Give fields and axes the slots that dita asks for."""
    slot = 0
    for f in (*values["state"], *values["action"]):
        f["slot"], slot = slot, slot + f["size"]
    return values


def test_an_embodiment_file_carries_limits_and_driver_to_the_guard():
    values = plain(embodiment("joint"))
    values["limits"]["joints"]["jerk"][0] = None
    values["limits"].update(
        keep_out=[{"low": [0, 0, 0], "high": [1, 1, 1]}],
        capsules=[{"link": "a", "radius": 0.1, "start": [0, 0, 0], "end": [0, 0, 1]}],
        ignore_pairs=[["a", "b"]],
    )
    spec = embodiment_from_dict(values)
    assert embodiment_from_dict(embodiment_to_dict(spec)) == spec
    with pytest.raises(ValueError, match=r"no limits.joints.jerk for joint7: the guard"):
        parse_robot(embodiment_to_dict(spec))
    robot = parse_robot(embodiment_to_dict(spec), need_limits=False)
    assert robot.limits.margin == 0.01 and robot.limits.ignore_pairs == (("a", "b"),)
    np.testing.assert_array_equal(robot.limits.keep_out[0], [[0, 0, 0], [1, 1, 1]])
    assert robot.limits.capsules[0]["radius"] == 0.1 and robot.driver.joints == tuple(JOINTS)
    values["limits"]["joints"]["jerk"] = None
    assert embodiment_from_dict(values).limits.joints.jerk is None


def test_an_embodiment_from_before_drivers_is_read_as_it_was():
    values = plain(copy.deepcopy(EMBODIMENT))
    assert "driver" not in values and "joints" not in values["limits"]
    spec = embodiment_from_dict(values)
    assert spec.driver is None and spec.limits.joints is None
    assert parse_robot(embodiment_to_dict(spec)).driver == parse_robot(values).driver
    driver = parse_robot(values).driver
    assert (driver.command, driver.command_topic, driver.pose_topic) == ("pose", "/target_pose", "/tool_pose")
    assert (driver.gripper_direction, driver.gripper_hysteresis, driver.required_mode) == (1, 0.0, None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"workspace_high": None}, "no limits.workspace_low, limits.workspace_high"),
        ({"keep_out": [{"low": [0, 0, 0], "high": [1, 1, 1], "name": "table"}]}, "unknown name"),
        ({"keep_out": [{"low": [0, 0, 0], "high": [1, 0, 1]}]}, "low must be below high"),
        (
            {"capsules": [{"link": "a", "radius": 0.1, "start": [0, 0, 0], "end": [0, 1]}]},
            "end must be 3 finite numbers",
        ),
        ({"capsules": [{"link": "a", "radius": 0, "start": [0, 0, 0], "end": [0, 1, 0]}]}, "radius must be a positive"),
        ({"capsules": [{"link": "a", "radius": -1, "start": [0] * 3, "end": [0, 1, 0]}]}, "radius must be a positive"),
        ({"max_speed": True}, "max_speed must be a positive number, got True"),
    ],
)
def test_limits_that_make_no_sense_are_named(changes, says):
    values = embodiment("position")
    values["limits"].update(changes)
    with pytest.raises(ValueError, match=says):
        Guard(parse_robot(values), CONFIG)


def test_fields_and_joints_that_make_no_sense_are_named():
    values = embodiment("joint")
    values["limits"]["joints"]["velocity"][2] = True
    with pytest.raises(ValueError, match="velocity must be a finite number, got True for joint5"):
        parse_robot(values)
    values = embodiment("position")
    values["action"][0].update(low=[0.0] * 3, high=[0.0] * 3)
    with pytest.raises(ValueError, match="every low must be below its high"):
        parse_robot(values)
    for names in (["", *JOINTS[1:]], [1, *JOINTS[1:]], "joints"):
        values = embodiment("joint")
        values["driver"]["joints"] = names
        with pytest.raises(ValueError, match="joints must be a list of names"):
            parse_robot(values)


def test_a_tool_that_moves_in_a_plane_is_for_a_policy_and_not_for_the_guard():
    values = embodiment("cartesian")
    (hand,) = [f for f in values["action"] if f["kind"] == "ee_position"]
    hand |= {"size": 2, "low": hand["low"][:2], "high": hand["high"][:2]}
    with pytest.raises(ValueError, match=r"moves a tool in space; .* has 2 values, not 3"):
        parse_robot(values)
    assert parse_robot(values, need_limits=False).motion.size == 2


@pytest.mark.parametrize(
    "path",
    [(), ("limits",), ("action", 0), ("state", 0), ("limits", "joints")],
    ids=lambda p: ".".join(map(str, p)) or "top",
)
def test_an_unknown_key_is_named_wherever_it_stands(path):
    values = copy.deepcopy(embodiment("joint"))
    inside = values
    for key in path:
        inside = inside[key]
    inside["spede"] = 1.0
    with pytest.raises(ValueError, match="unknown spede"):
        parse_robot(values)


def test_an_unknown_key_of_a_capsule_is_named():
    values = embodiment("position")
    values["limits"]["capsules"] = [{"link": "hand", "radius": 0.05, "start": [0, 0, 0], "end": [0, 0, 1], "spede": 1}]
    with pytest.raises(ValueError, match="unknown spede"):
        parse_robot(values)


def test_a_joint_that_cannot_move_is_refused():
    values = embodiment("joint")
    values["limits"]["joints"]["low"][2] = values["limits"]["joints"]["high"][2]
    with pytest.raises(ValueError, match="low must be below high"):
        parse_robot(values)


def test_a_hundred_ticks_a_second_and_one_a_step_are_enough():
    robot = parse_robot(embodiment("position"))
    config = dataclasses.replace(CONFIG, tick=0.01)
    assert Guard(robot, config).config.tick == 0.01
    assert Guard(dataclasses.replace(robot, action_dt=0.01), config).robot.action_dt == 0.01
    with pytest.raises(ValueError, match="100 Hz or more"):
        dataclasses.replace(CONFIG, tick=0.0101)


def test_every_step_that_is_executed_is_counted_once():
    arm = Arm(embodiment("position")).arm()
    arm.offer(arm.ahead(0, 0.001, steps=8))
    arm.run(8 * DT)
    assert arm.guard.counts["steps"] == len(arm.executed) == 8


def far_out(arm, rows, of=16):
    """Return a chunk whose first rows are out of the action's limits for some steps."""
    motion = arm.ahead(1, 0.0, of)
    motion[:rows, 1] = 1.5 * arm.guard._action_high[1]
    return motion


def test_five_steps_far_out_are_allowed_again_after_arming_and_after_a_hold_for_six():
    arm = Arm(embodiment("position")).arm()
    arm.offer(far_out(arm, 5))
    arm.run(16 * DT)
    assert arm.state is State.ARMED
    arm.offer(far_out(arm, 6))
    arm.run(16 * DT)
    assert arm.state is State.HOLDING
    arm.offer(far_out(arm, 0))
    arm.offer(far_out(arm, 5))
    arm.run(16 * DT)
    assert arm.state is State.ARMED


def test_a_chunk_that_begins_far_out_later_is_not_trusted_after_a_hold():
    arm = Arm(embodiment("position")).arm()
    arm.offer(far_out(arm, 6))
    arm.run(10 * DT)
    assert arm.state is State.HOLDING
    later = arm.chunk(far_out(arm, 1), stamp=arm.now + 3 * DT)
    assert arm.guard.on_chunk(later, arm.now) == "chunk out of the action's limits while held for that"
    begun = arm.chunk(far_out(arm, 1), stamp=arm.now - 1.5 * DT)
    assert arm.guard.on_chunk(begun, arm.now) is None, "the row that is far out is over"


def test_bad_chunks_from_before_arming_are_forgotten():
    arm = Arm(embodiment("position")).arm()
    for _ in range(2):
        arm.offer(np.full((8, 3), np.nan))
        arm.run(4 * DT)
    arm.guard.disarm()
    arm.run(0.3)
    assert arm.state is State.IDLE
    arm.arm()
    arm.offer(np.full((8, 3), np.nan))
    assert arm.state is State.HOLDING, "the third within a second, but the first since it was armed"


@pytest.mark.parametrize("bound", ["low", "high"])
def test_an_arm_at_the_very_end_of_its_joints_may_be_armed(bound):
    values = embodiment("joint")
    limits = parse_robot(values).bounds
    arm = Arm(values, home=getattr(limits, bound))
    assert arm.arm().state is State.ARMED
    envelope = Envelope(arm.robot.space, arm.guard.bounds, TICK)
    envelope.restart(arm.measured)
    assert envelope.violations(arm.measured) == []


def test_a_change_of_the_gripper_of_just_its_hysteresis_is_small():
    arm = gripper_arm(gripper_hysteresis=0.125).arm()
    assert play_gripper(arm, 0.5, 0.625, 0.626)[::2] == [0.5, 0.5, 0.626]


def test_a_change_that_waited_for_the_dwell_goes_out_between_two_steps():
    arm = gripper_arm(gripper_dwell=2.4 * DT).arm()
    assert play_gripper(arm, 0.2, 0.8, 0.8, 0.8, 0.8)[:7] == [0.2, 0.2, 0.2, 0.2, 0.2, 0.8, 0.8]  # two ticks a step


def test_what_was_executed_tells_the_grippers_command_of_its_own_step():
    arm = gripper_arm().arm()
    play_gripper(arm, 0.5, 1.0, 0.25)
    assert [e.gripper for e in arm.executed] == [0.5, 1.0, 0.25]
