"""Where chunks meet: what is decided, in every representation of an action, and what each mode sends."""

import copy
from itertools import pairwise

import numpy as np
import pytest
from fake_robot import EMBODIMENT
from hypothesis import given, settings
from hypothesis import strategies as st

from robot_io.core.chunk_buffer import Chunk
from robot_io.core.guard import Guard, GuardConfig
from robot_io.core.limits import parse_robot
from robot_io.core.space import Space, exponential, logarithm, unit
from robot_io.core.stitching import DECAY, MODES, Plan, Stitcher, actions_of, delta_between, mean

T0, DT = 1000.0, 0.0125
TURN = {
    "axis_angle_delta": {"kind": "ee_rotation_axis_angle", "size": 3, "mode": "delta", "reference": "commanded"},
    "axis_angle": {"kind": "ee_rotation_axis_angle", "size": 3, "mode": "absolute", "reference": None},
    "6d": {"kind": "ee_rotation_6d", "size": 6, "mode": "absolute", "reference": None},
}


def robot(motion="delta", turn=None, frame="base", gripper=True, reference="commanded"):
    """Return a robot of the given action: a position or joints, maybe a rotation, maybe a gripper."""
    values = copy.deepcopy(EMBODIMENT)
    hand, grip = values["action"]
    hand["reference"] = reference
    if motion in ("absolute", "joints"):
        hand.update(mode="absolute", reference=None, low=[-3.0] * 3, high=[3.0] * 3)
    if motion in ("joints", "joint deltas"):
        hand.update(kind="joint_position", unit="rad", frame="joint")
    hand["frame"] = frame if turn else hand["frame"]
    fields = [hand]
    if turn:
        size = TURN[turn]["size"]
        fields.append({**hand, **TURN[turn], "name": "turn", "unit": "rad", "low": [-4] * size, "high": [4] * size})
    values["action"] = [*fields, grip] if gripper else fields
    return parse_robot(values, need_limits=False)


SPACES = {
    "joints": robot("joints"),
    "joint deltas": robot("joint deltas"),
    "position": robot("absolute"),
    "position deltas": robot(),
    "pose 6d": robot("absolute", "6d"),
    "pose axis-angle": robot("absolute", "axis_angle"),
    "pose deltas": robot("delta", "axis_angle_delta"),
    "tool deltas": robot("delta", "axis_angle_delta", frame="tool"),
}


def walk(r, n, seed, step=0.004):
    """Return n + 1 configurations of a smooth walk from a random one."""
    rng = np.random.default_rng([seed, 1])
    x = r.space.origin.copy()
    x[: r.space.linear] = rng.uniform(-0.5, 0.5, r.space.linear)
    if r.space.rotation:
        x[r.space.linear :] = unit(rng.normal(size=4))
    path = [x]
    for v in rng.normal(0, 1, (n, r.space.tangent)):
        path.append(r.space.retract(path[-1], step * v))
    return path


def actions_along(r, path, gripper):
    """Return the actions that lead along a path, by the robot's own composition."""
    if r.motion.mode == "delta":
        motion = np.array([delta_between(r.space, a, b) for a, b in pairwise(path)])
    else:
        motion = np.array(path[1:])
    return actions_of(r, motion, gripper)


def chunk_of(r, actions, stamp, id=1):
    gripper = actions[:, r.action_slice(r.gripper)][:, 0] if r.gripper else None
    return Chunk(stamp, DT, r.motion_of(actions), gripper, id)


def told(plan, path, gripper, start=T0):
    """Tell a plan that the steps along a path were executed."""
    for i, (a, b) in enumerate(pairwise(path)):
        plan.on_executed(start + i * DT, b, plan.space.difference(b, a), gripper[i])


# ---- representations


@pytest.mark.parametrize("name", SPACES)
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6))
def test_deltas_between_configurations_lead_from_one_to_the_other(name, seed):
    space = SPACES[name].space
    a, b = walk(SPACES[name], 1, seed, step=0.7)
    again = space.delta(a, delta_between(space, a, b))
    np.testing.assert_allclose(space.difference(again, b), 0, atol=1e-9)


@pytest.mark.parametrize("name", SPACES)
def test_actions_and_motion_invert_each_other(name):
    r = SPACES[name]
    path = walk(r, 5, 3, step=0.3)
    gripper = np.linspace(-1, 1, 5)
    actions = actions_along(r, path, gripper)
    assert actions.shape == (5, r.action_dim)
    motion = r.motion_of(actions)
    back = actions_of(r, motion, gripper)
    np.testing.assert_allclose(back, actions, atol=1e-9)
    np.testing.assert_array_equal(back[:, r.action_slice(r.gripper)][:, 0], gripper)


def test_mean_is_the_average_of_numbers_and_the_middle_of_two_rotations():
    flat, posed = Space("cartesian", ("x", "y", "z")), SPACES["pose 6d"].space
    found = mean(flat, [np.array([0.0, 0, 0]), np.array([1.0, 2, 4])], [1.0, 3.0])
    np.testing.assert_allclose(found, [0.75, 1.5, 3.0], atol=1e-12)
    a, b = walk(SPACES["pose 6d"], 1, 5, step=0.8)
    middle = mean(posed, [a, b], [1.0, 1.0])
    np.testing.assert_allclose(posed.difference(middle, posed.interpolate(a, b, 0.5)), 0, atol=1e-9)
    third = mean(posed, [a, b], [2.0, 1.0])
    np.testing.assert_allclose(posed.difference(third, posed.interpolate(a, b, 1 / 3)), 0, atol=1e-9)
    flipped = np.concatenate([b[:3], -b[3:]])  # the same rotation
    np.testing.assert_allclose(posed.difference(mean(posed, [a, flipped], [1, 1]), middle), 0, atol=1e-9)


def test_mean_rotation_is_where_the_weighted_turns_to_all_cancel():
    posed = SPACES["pose 6d"].space
    three = walk(SPACES["pose 6d"], 2, 8, step=0.6)
    weights = np.array([0.2, 0.3, 0.5])
    middle = mean(posed, three, weights.tolist())
    np.testing.assert_allclose(weights @ [posed.difference(x, middle) for x in three], 0, atol=1e-8)


# ---- what is decided


@pytest.mark.parametrize("name", SPACES)
def test_the_past_and_the_published_future_come_back_exactly_on_the_grid(name):
    r = SPACES[name]
    path, gripper = walk(r, 12, 0), np.linspace(0, 1, 12)
    actions = actions_along(r, path, gripper)
    plan = Plan(r)
    told(plan, path[:5], gripper)  # 4 executed
    plan.on_published(chunk_of(r, actions[2:], T0 + 2 * DT), T0 + 3.5 * DT)
    np.testing.assert_allclose(plan.actions(T0, 12), actions, atol=1e-9)
    np.testing.assert_allclose(plan.actions(T0 + 3 * DT, 4), actions[3:7], atol=1e-9)
    assert len(plan.actions(T0 + 9 * DT, 8)) == 3, "cut where the plan ends, never padded"
    assert plan.actions(T0 + 12 * DT, 4).shape == (0, r.action_dim)


def test_what_was_really_sent_replaces_what_was_planned():
    r = SPACES["position deltas"]
    plan = Plan(r)
    actions = np.tile([0.002, 0.0, 0.0, 1.0], (6, 1))
    plan.on_executed(T0, np.array([0.101, 0, 0]), np.array([0.001, 0, 0]), 1.0)  # the guard's leash let only half out
    plan.on_published(chunk_of(r, actions, T0), T0)
    np.testing.assert_allclose(plan.actions(T0, 3)[:, 0], [0.001, 0.002, 0.002], atol=1e-12)
    np.testing.assert_allclose(plan.at(T0 + 2 * DT), [0.103, 0, 0], atol=1e-12)
    plan.scale = 0.5  # slow mode
    np.testing.assert_allclose(plan.actions(T0, 3)[:, 0], [0.001, 0.001, 0.001], atol=1e-12)


def test_a_shifted_grid_reads_the_plan_by_time_and_holds_the_gripper():
    r = SPACES["position deltas"]
    plan = Plan(r)
    steps = np.array([0.001, 0.003, 0.005, 0.007])
    path = [np.array([x, 0.0, 0.0]) for x in np.concatenate([[0], np.cumsum(steps)])]
    told(plan, path, [1.0, 1.0, -1.0, -1.0])
    rows = plan.actions(T0 + 0.5 * DT, 9)
    np.testing.assert_allclose(rows[:, 0], [0.002, 0.004, 0.006], atol=1e-12)
    np.testing.assert_array_equal(rows[:, 3], [1.0, 1.0, -1.0])


def test_before_the_first_step_the_robot_stood_still():
    r = SPACES["position deltas"]
    plan = Plan(r)
    plan.on_executed(T0, np.array([0.5, 0, 0]), np.array([0.001, 0, 0]), -1.0)
    np.testing.assert_allclose(plan.actions(T0 - 2 * DT, 3)[:, 0], [0, 0, 0.001], atol=1e-12)


def test_steps_that_were_past_when_the_chunk_came_are_not_planned():
    r = SPACES["position deltas"]
    plan = Plan(r)
    plan.on_executed(T0, np.array([0.0, 0, 0]), np.zeros(3), 1.0)
    actions = np.tile([0.001, 0, 0, 1.0], (8, 1)) * np.array([1, 1, 1, 0]) + np.array([0, 0, 0, 1.0])
    plan.on_published(chunk_of(r, actions, T0), T0 + 4.5 * DT)
    assert plan.at(T0 + 4 * DT) == pytest.approx([0, 0, 0])
    assert plan.at(T0 + 8 * DT) == pytest.approx([0.004, 0, 0]), "steps 4 to 7 only"


def test_nothing_is_decided_before_something_was_sent_and_after_a_stop():
    r = SPACES["pose deltas"]
    plan, path = Plan(r), walk(r, 4, 0)
    gripper = np.ones(4)
    plan.on_published(chunk_of(r, actions_along(r, path, gripper), T0), T0)
    assert plan.actions(T0, 3).shape == (0, r.action_dim) and plan.at(T0) is None
    told(plan, path, gripper)
    assert len(plan.actions(T0, 3)) == 3
    plan.clear()
    assert plan.actions(T0, 3).shape == (0, r.action_dim)


@pytest.mark.parametrize("reference", ["measured", "chunk_start"])
def test_deltas_on_what_is_measured_have_no_plan(reference):
    values = copy.deepcopy(EMBODIMENT)
    values["action"][0]["reference"] = reference
    r = parse_robot(values, need_limits=False)
    for mode in ("rtc", "ensembling"):
        with pytest.raises(ValueError, match=f"adds to {reference}"):
            Stitcher(r, mode, chunk_size=16, max_committed=8, trained=True)
    assert Stitcher(r, "auto", chunk_size=16, max_committed=8, trained=True).mode == "latency_compensated"


@settings(max_examples=15, deadline=None)
@given(st.floats(0.0, 0.99), st.integers(0, 99))
def test_the_plan_is_what_the_guard_does_whatever_the_delay(shift, seed):
    """Two chunks with shifted grids go through a real guard; the plan made before equals the goals it then reports."""
    values = copy.deepcopy(EMBODIMENT)
    r = parse_robot(values)
    guard = Guard(r, GuardConfig(1 / 160, 9.0, 9.0, 9.0, 0.05, 0.25))
    plan, start = Plan(r), np.array([0.0, 0.6, 0.2])
    rng = np.random.default_rng([seed, 2])
    motion = rng.uniform(-0.002, 0.002, (2, 16, 3))
    guard.on_state(T0, start)
    guard.arm(T0)
    sent = [Chunk(T0, DT, motion[0], np.ones(16), 1), Chunk(T0 + (4 + shift) * DT, DT, motion[1], np.ones(16), 2)]
    guard.on_chunk(sent[0], T0)
    plan.on_published(sent[0], T0)
    found, promised = [], None
    for i in range(1, 30):
        now = T0 + i / 160
        guard.on_state(now, start)
        if i == 13:  # 6.5 steps: the second chunk comes
            guard.on_chunk(sent[1], now)
            plan.on_published(sent[1], now + guard.config.tick)  # a command is for the time of the next tick
            promised = [plan.at(sent[1].stamp + k * DT) for k in range(4, 9)]
        executed = guard.tick(now)[1]
        if executed is not None:
            begin = executed.step.start
            plan.on_executed(begin, executed.goal, executed.delta, executed.gripper)
            found.append((executed.step.chunk.id, begin + DT, executed.goal))
    second = [(t, goal) for id, t, goal in found if id == 2]
    assert promised is not None
    for k, expected in enumerate(promised, start=4):
        goals = [goal for t, goal in second if abs(t - sent[1].stamp - k * DT) < 1e-6]
        if goals:
            np.testing.assert_allclose(expected, goals[0], atol=1e-9)
    assert sum(abs(t - sent[1].stamp - k * DT) < 1e-6 for k in range(4, 9) for t, _ in second) >= 4


# ---- modes


OTHER = robot(reference="measured")


def stitcher(mode, r=None, **options):
    return Stitcher(r or SPACES["position deltas"], mode, **{"chunk_size": 16, **options})


def test_auto_is_rtc_for_policies_that_were_trained_for_it():
    assert stitcher("auto", trained=True, max_committed=8).mode == "rtc"
    assert stitcher("auto", max_committed=15).mode == "latency_compensated"
    with pytest.raises(ValueError, match="there are auto, synchronous"):
        stitcher("fast")
    with pytest.raises(ValueError, match=r"in 1\.\.16"):
        stitcher("rtc", n_action_steps=17, max_committed=8)
    with pytest.raises(ValueError, match="1 committed rows, 1 of them past"):
        stitcher("rtc", past_slots=1, max_committed=1)
    assert len(MODES) == 5


def test_delay_is_the_99th_percentile_in_steps_and_execution_at_least_that():
    s = stitcher("latency_compensated")
    assert (s.delay, s.execution, s.problem()) == (0, 1, "")
    for _ in range(99):
        s.on_latency(3 * DT)
    assert (s.delay, s.execution) == (3, 3)
    for _ in range(3):
        s.on_latency(5.2 * DT)
    assert (s.delay, s.execution, s.problem()) == (6, 6, "")
    assert stitcher("rtc", n_action_steps=7, max_committed=8).execution == 7
    assert stitcher("rtc", interval=0.05, max_committed=8).execution == 4
    for _ in range(256):
        s.on_latency(9 * DT)
    assert "a chunk of 16 steps cannot bridge a delay of 9 and 9 steps of execution" in s.problem()


@pytest.mark.parametrize(
    ("late", "wanted", "asked"),
    [(2, 8, 8), (7, 8, 8), (6, 12, 10), (8, 12, 8), (9, 12, 12), (20, 8, 8)],
)
def test_fewer_steps_are_executed_where_the_delay_leaves_no_more_of_a_chunk(late, wanted, asked):
    s = stitcher("latency_compensated", n_action_steps=wanted)
    for _ in range(100):
        s.on_latency(late * DT)
    assert s.next_stamp(T0, 16) == pytest.approx(T0 + asked * DT)
    assert bool(s.problem()) == (late > 8), "a delay of more than half a chunk cannot be bridged"
    assert s.execution == max(late, asked)


def test_a_prefix_that_the_policy_cannot_take_is_said():
    s = stitcher("rtc", max_committed=4, past_slots=1, trained=True)
    s.on_latency(3 * DT)
    assert s.problem() == ""
    s.on_latency(4 * DT)
    assert "a delay of 4 steps is more than the 3" in s.problem()


@pytest.mark.parametrize("mode", ["latency_compensated", "rtc"])
def test_predictions_go_out_as_they_are_while_the_arm_moves(mode):
    s = stitcher(mode, max_committed=8, fade=0)
    values = np.random.default_rng(0).normal(size=(16, 4))
    s.on_executed(T0 - DT, np.zeros(3), np.zeros(3), 1.0)
    s.published(chunk_of(s.robot, values, T0 - DT), T0)
    out, stamp = s.stitch(values, T0, T0 + 0.04)
    np.testing.assert_array_equal(out, values)
    assert stamp == T0 and s.next_stamp(T0, 16) == T0
    assert stitcher(mode, n_action_steps=4, max_committed=8).next_stamp(T0, 16) == T0 + 4 * DT


@pytest.mark.parametrize("mode", ["latency_compensated", "rtc", "ensembling"])
def test_a_chunk_for_an_arm_that_stood_still_begins_when_it_is_sent(mode):
    """Its first steps would else be past, and the arm would start in the middle of a motion."""
    values = np.random.default_rng(0).normal(size=(16, 4))

    def rests(sent=None, planned=None, space="position deltas"):
        s = stitcher(mode, SPACES[space], max_committed=8)
        if sent is not None:
            s.on_executed(sent, np.ones(3), np.ones(3), 1.0)
        if planned is not None:
            s.published(chunk_of(s.robot, values[:4], planned), T0)
        out, stamp = s.stitch(values, T0, T0 + 2.5 * DT)
        assert stamp == T0
        if len(out) > 16:
            np.testing.assert_allclose(out[3:], values, atol=1e-12)
            waiting = [0, 0, 0, values[0, 3]] if "deltas" in space else values[0]  # on the way to the first target
            np.testing.assert_allclose(out[:3], np.tile(waiting, (3, 1)), atol=1e-12)
        return len(out) > 16

    assert rests() and rests(space="position"), "nothing was ever sent"
    assert rests(sent=T0 - DT), "the last step ended with the observation"
    assert rests(sent=T0 - 5 * DT, planned=T0 - 4 * DT), "the last chunk ended with it"
    assert not rests(sent=T0 - 0.5 * DT), "a step was under way"
    assert not rests(planned=T0 - 3 * DT), "a chunk has a step left"
    assert not rests(planned=T0 + DT), "a chunk begins meanwhile"
    late = stitcher(mode, max_committed=8).stitch(values, T0, T0 + 16 * DT)[0]
    np.testing.assert_allclose(late, values, atol=1e-12)  # all of it is past, as the guard shall see
    assert len(stitcher("latency_compensated", OTHER).stitch(values, T0, T0 + 2.5 * DT)[0]) == 16, "nobody knows"


def test_synchronous_chunks_start_when_sent_and_are_cut():
    s = stitcher("synchronous", n_action_steps=4)
    values = np.random.default_rng(0).normal(size=(16, 4))
    out, stamp = s.stitch(values, T0, T0 + 0.3)
    np.testing.assert_array_equal(out, values[:4])
    assert stamp == T0 + 0.3 and s.next_stamp(stamp, 4) == pytest.approx(T0 + 0.3 + 4 * DT)


@pytest.mark.parametrize("name", SPACES)
@pytest.mark.parametrize("past", [0, 2])
def test_committed_rows_are_past_slots_then_as_many_as_the_delay(name, past):
    r = SPACES[name]
    path, gripper = walk(r, 12, 4), np.linspace(0, 1, 12)
    actions = actions_along(r, path, gripper)
    s = stitcher("rtc", r, past_slots=past, max_committed=8)
    assert s.committed(T0) is None
    s.on_latency(2.5 * DT)
    told(s.plan, path[:6], gripper)
    s.published(chunk_of(r, actions, T0), T0)
    rows = s.committed(T0 + 4 * DT)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(rows, actions[4 - past : 7], atol=1e-6)
    for _ in range(256):
        s.on_latency(20 * DT)
    np.testing.assert_allclose(s.committed(T0 + 2 * DT), actions[2 - past : 10 - past], atol=1e-6)
    s.clear()
    assert s.committed(T0 + 4 * DT) is None
    assert stitcher("latency_compensated", r).committed(T0) is None


@pytest.mark.parametrize("name", ["joints", "position", "pose 6d", "pose axis-angle"])
def test_ensembling_averages_absolute_targets_of_one_time_and_never_the_gripper(name):
    r = SPACES[name]
    one, two = walk(r, 16, 1), walk(r, 16, 1)
    two = [r.space.retract(x, np.full(r.space.tangent, 0.2)) for x in two]
    s = stitcher("ensembling", r)
    first = actions_along(r, one, np.ones(16))
    second = actions_along(r, two[3:], -np.ones(13))  # the same motion, moved, three steps later
    np.testing.assert_allclose(s.stitch(first, T0, T0)[0], first, atol=1e-9)
    s.published(chunk_of(r, first, T0), T0)
    out, stamp = s.stitch(second, T0 + 3 * DT, T0 + 4 * DT)
    assert stamp == T0 + 3 * DT
    np.testing.assert_array_equal(out[:, r.action_slice(r.gripper)], -1)
    weights = [1.0, np.exp(-DECAY)]
    expected = [mean(r.space, [a, b], weights) for a, b in zip(one[4:], two[4:], strict=True)]
    for row, x in zip(r.motion_of(out), expected, strict=True):
        np.testing.assert_allclose(r.space.difference(row, x), 0, atol=1e-9)
    third, _ = s.stitch(second, T0 + 100 * DT, T0 + 100 * DT)
    np.testing.assert_allclose(r.motion_of(third), r.motion_of(second), atol=1e-9)


@pytest.mark.parametrize("name", ["position deltas", "pose deltas", "tool deltas", "joint deltas"])
def test_ensembling_of_deltas_averages_where_they_lead_and_starts_from_what_was_sent(name):
    r = SPACES[name]
    path = walk(r, 20, 2, step=0.02)
    other = [r.space.retract(x, np.full(r.space.tangent, 0.01)) for x in path]
    s = stitcher("ensembling", r)
    told(s.plan, path[:2], np.ones(2))
    first = actions_along(r, path[1:18], np.ones(16))  # from T0 + dt on
    s.stitch(first, T0 + DT, T0 + DT)
    s.published(chunk_of(r, first, T0 + DT), T0 + DT)
    told(s.plan, path[:5], np.ones(5))  # four steps by now
    second = actions_along(r, [path[3], *other[4:20]], np.ones(16))  # from T0 + 3 dt, commanded to be at path[3]
    out, _ = s.stitch(second, T0 + 3 * DT, T0 + 5 * DT)
    x = path[3]
    for k, row in enumerate(r.motion_of(out)):
        x, i = r.space.delta(x, row), 4 + k
        expected = path[i] if k < 2 else other[i]  # the first two are past
        if 2 <= k and i <= 17:
            expected = mean(r.space, [path[i], other[i]], [1.0, np.exp(-DECAY)])
        np.testing.assert_allclose(r.space.difference(x, expected), 0, atol=1e-6)


def test_ensembling_on_shifted_grids_reads_the_older_chunk_between_its_targets():
    r = SPACES["position"]
    line = np.arange(1, 17) * 0.01
    first = actions_of(r, np.column_stack([line, 0 * line, 0 * line]), np.ones(16))
    s = stitcher("ensembling", r)
    s.stitch(first, T0, T0)
    s.published(chunk_of(r, first, T0), T0)
    out, _ = s.stitch(first, T0 + 2.5 * DT, T0 + 3 * DT)
    w = np.exp(-DECAY)
    expected = (line[:13] + 0.025 + w * line[:13]) / (1 + w)
    np.testing.assert_allclose(out[:13, 0], expected, atol=1e-12)
    np.testing.assert_allclose(out[13:, 0], line[13:], atol=1e-12)


def test_the_jump_where_a_chunk_takes_over_is_measured_at_its_first_new_step():
    r = SPACES["position deltas"]
    s = stitcher("latency_compensated")
    s.on_executed(T0, np.array([0.001, 0, 0]), np.array([0.001, 0, 0]), 1.0)
    old, new = np.tile([0.001, 0, 0, 1.0], (16, 1)), np.tile([0.001, 0.003, 0, 1.0], (16, 1))
    s.published(chunk_of(r, old, T0), T0)
    s.stitch(new, T0 + 2 * DT, T0 + 4.5 * DT)
    assert s.jump.count == 1 and s.jump.max == pytest.approx(0.003)
    s.stitch(old, T0 + 2 * DT, T0 + 4.5 * DT)
    assert s.jump.count == 2 and s.jump.mean == pytest.approx(0.0015)
    values = s.to_dict()
    assert values["mode"] == "latency_compensated" and values["boundary_jump.max"] == pytest.approx(0.003)


def handover(name, old, new, late=2, given=3, scale=1.0):
    """Return what goes out for `new` at `late` steps of delay, with `given` steps of the plan `old` committed."""
    r = SPACES[name]
    s = stitcher("rtc", r, max_committed=8)
    s.set_speed(scale)
    s.on_latency(given * DT)
    start = r.space.origin.copy()
    s.on_executed(T0, r.space.delta(start, scale * old[0, :-1]) if "deltas" in name else r.motion_of(old)[0],
                  scale * old[0, :-1] if "deltas" in name else np.zeros(r.space.tangent), 1.0)  # fmt: skip
    s.published(chunk_of(r, old, T0), T0)
    assert len(s.committed(T0 + DT)) == given
    out, stamp = s.stitch(new, T0 + DT, T0 + (1 + late) * DT)
    assert stamp == T0 + DT
    return out


def test_real_time_chunking_leads_from_the_plan_into_a_prediction_of_deltas():
    old, new = np.tile([0.001, 0, 0, 1.0], (16, 1)), np.tile([0.006, 0.005, 0, -1.0], (16, 1))
    out = handover("position deltas", old, new)
    np.testing.assert_allclose(out[3:7, 0], [0.002, 0.003, 0.004, 0.005], atol=1e-12)
    np.testing.assert_allclose(out[3:7, 1], [0.001, 0.002, 0.003, 0.004], atol=1e-12)
    np.testing.assert_array_equal(np.delete(out, range(3, 7), 0), np.delete(new, range(3, 7), 0))
    np.testing.assert_array_equal(out[:, 3], new[:, 3])  # never the gripper
    np.testing.assert_allclose(handover("position deltas", old[:4], new)[3:7], out[3:7], atol=1e-12)  # the plan ends
    np.testing.assert_allclose(handover("position deltas", old, new, scale=0.5), out, atol=1e-12)  # the guard scales
    later = handover("position deltas", old, new, late=5)  # than was committed: from where it takes over
    np.testing.assert_array_equal(later[:5], new[:5])
    np.testing.assert_allclose(later[5:9, 0], [0.002, 0.003, 0.004, 0.005], atol=1e-12)


@pytest.mark.parametrize("name", ["joints", "position", "pose 6d", "pose axis-angle"])
def test_absolute_targets_of_real_time_chunking_end_on_the_prediction(name):
    r = SPACES[name]
    along = np.zeros(r.space.tangent)
    along[0] = 0.01

    def line(offset, n=16):
        path = [r.space.origin]
        for _ in range(n):
            path.append(r.space.retract(path[-1], along))
        side = np.full(r.space.tangent, offset)
        return actions_along(r, [path[0], *(r.space.retract(x, side) for x in path[1:])], np.ones(n))

    old, new = line(0.0), line(0.02)[1:]
    for plan in (old, old[:5]):  # past its end it goes on straight
        out = r.motion_of(handover(name, plan, new))
        expected, planned = r.motion_of(new), r.motion_of(old)[1:]
        aside = [np.abs(r.space.difference(a, b)).max() for a, b in zip(out, planned, strict=True)]
        shares = [s * s * (3 - 2 * s) for s in (0.2, 0.4, 0.6, 0.8)]
        np.testing.assert_allclose(aside[3:7], [0.02 * s for s in shares], atol=2e-4)
        for i in (*range(3), *range(7, 15)):
            np.testing.assert_allclose(out[i], expected[i], atol=1e-12)


@pytest.mark.parametrize("name", SPACES)
def test_a_prediction_that_is_the_plan_stays_as_it_is(name):
    r = SPACES[name]
    actions = actions_along(r, walk(r, 16, 6), np.ones(16))
    s = stitcher("rtc", r, max_committed=8)
    s.on_latency(2 * DT)
    path = walk(r, 16, 6)
    told(s.plan, path[:2], np.ones(16))
    s.published(chunk_of(r, actions, T0), T0)
    assert s.committed(T0 + DT) is not None
    out, _ = s.stitch(actions[1:], T0 + DT, T0 + 3 * DT)
    np.testing.assert_allclose(r.motion_of(out), r.motion_of(actions[1:]), atol=1e-9)


def test_quaternions_of_opposite_sign_are_one_rotation():
    r = SPACES["pose 6d"]
    q = exponential(np.array([3.0, 0.4, 0.1]))
    x, y = np.array([0, 0, 0, *q]), np.array([0, 0, 0, *-q])
    np.testing.assert_allclose(delta_between(r.space, x, y), 0, atol=1e-9)
    assert np.linalg.norm(logarithm(q)) < np.pi
