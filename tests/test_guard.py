"""The guard on a fake clock: chunks by time, composition, envelope, reactions, controls. Fast: mutants run it."""

import copy
import itertools

import numpy as np
import pytest
from fake_robot import EMBODIMENT
from guard_arm import (
    CONFIG,
    DT,
    HOME,
    ROBOT,
    SPACES,
    T0,
    TICK,
    Arm,
    embodiment,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from dita.embodiment import embodiment_to_dict, load_embodiment
from robot_io.core.chunk_buffer import Chunk, ChunkBuffer
from robot_io.core.guard import INSET, Guard, GuardConfig
from robot_io.core.limits import Envelope
from robot_io.core.state_machine import TRANSITIONS, State, StateMachine
from robot_io.core.tracker import Tracker
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


def test_newer_chunk_replaces_older_at_the_steps_rate():
    buffer = ChunkBuffer()
    buffer.offer(chunk(T0, np.zeros((16, 3))), T0)
    assert buffer.due(T0 + 0.05).index == 4
    buffer.offer(chunk(T0 + 0.0501, np.ones((16, 3))), T0 + 0.0502)
    assert buffer.due(T0 + 0.0502) is None, "the step that has begun is not begun twice"
    assert buffer.due(T0 + 0.0627).index == 1


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
    assert [c.gripper for c in arm.sent[-8:]] == [-1.0] + 7 * [0.5], "no values in between"
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
    assert arm.guard.counts["leash_hits"] > 0
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
    smooth, times = EnvelopeReader(ROBOT.space, ROBOT.bounds), T0 + np.cumsum([0, 1, 2, 1, 1, 2, 1, 2, 2, 1, 1, 1]) * TICK
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
    speeds = np.diff([c.configuration[0] for c in arm.sent[-16:]]) / TICK
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
    assert arm.run(0.1).sent == []
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
