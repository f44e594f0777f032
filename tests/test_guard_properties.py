"""Whatever comes in, in every space: what goes out is finite and inside the envelope, says an independent checker."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from guard_arm import SPACES, TICK, Arm, embodiment, home_of
from hypothesis import given, settings
from hypothesis import strategies as st

from robot_io.core.chunk_buffer import Chunk
from robot_io.core.guard import Guard, GuardConfig
from robot_io.core.state_machine import State
from robot_io.nodes.guard import load_robot

EVENTS = (
    *("good", "good", "good", "jump", "reverse", "nan", "inf", "huge", "gross", "small excess", "far excess", "gap"),
    *("duplicate", "old", "future", "shape", "late tick", "state gap", "arm", "arm", "blocked", "disarm", "state nan"),
    *("state jump", "state back", "clock jump", "mode", "speed", "takeover", "hand back", "approval", "approve"),
    *("heartbeat", "limit", "limit"),
)


def play(arm: Arm, event: str, ticks: int, rng: np.random.Generator) -> None:
    """Let one thing happen, then time pass."""
    guard, space, delta = arm.guard, arm.robot.space, arm.robot.motion.mode == "delta"
    low, high = guard._action_low, guard._action_high
    if delta:
        motion = rng.uniform(low, high, (16, space.tangent))
    else:
        step = rng.uniform(-0.02, 0.02, space.tangent)
        motion = np.array([space.retract(arm.measured, (i + 1) * step) for i in range(16)])
    gripper, stamp, source = rng.uniform(-1, 1, 16), arm.now + TICK, guard.active
    n = space.linear
    if event == "jump":
        motion[:, :n] = rng.choice([-1, 1], n) * (high - low)[:n] / 2 if delta else rng.uniform(low[:n], high[:n])
    elif event == "limit":
        motion[:, :n] = np.where(rng.random(n) < 0.5, low[:n], high[:n])
    elif event == "reverse":
        motion[:, :n] = np.where(np.arange(16)[:, None] % 2, low[:n], high[:n])
    elif event in ("nan", "inf"):
        motion[rng.integers(16), rng.integers(n)] = np.nan if event == "nan" else np.inf
    elif event in ("huge", "gross"):
        motion[:, :n] *= 5 if event == "huge" else 57.3
    elif event in ("small excess", "far excess"):
        motion[:, :n] = (1.1 if event == "small excess" else 2.0) * np.where(motion[:, :n] > 0, high[:n], low[:n])
    elif event in ("duplicate", "old"):
        stamp = arm.now - 10 * (event == "old")
    elif event == "future":
        stamp += 3600
    elif event == "shape":
        motion = motion[:, :-1]
    elif event == "arm":
        try:
            arm.run(0.1).guard.arm(arm.now)
        except ValueError as e:
            assert "not armed" in str(e)
    elif event == "disarm":
        guard.disarm()
    elif event == "state nan":
        guard.on_state(arm.now + 1e-4, np.full(space.size, np.nan))
    elif event == "state jump":
        guard.on_state(arm.now + 1e-4, space.retract(arm.measured, rng.uniform(-1, 1, space.tangent)))
    elif event == "state back":
        guard.on_state(arm.now - 10, arm.measured)
    elif event == "clock jump":
        by = float(rng.uniform(-10, 10))
        arm.now += by
        guard.on_clock_jump(by, arm.now)
        guard.on_state(arm.now, arm.measured)
        arm.checker.restart()
    elif event == "mode":
        guard.on_mode(str(rng.choice(["running", "protective_stop"])), arm.now)
        guard.on_mode("running", arm.now)
    elif event == "speed":
        guard.set_speed(float(rng.uniform(0.05, 1.0)))
    elif event == "takeover":
        guard.take_over("teleop", arm.now)
    elif event == "hand back":
        guard.hand_back(arm.now)
    elif event == "approval":
        guard.approval = not guard.approval
    elif event == "approve" and guard.pending is not None:
        try:
            guard.approve(guard.pending.id, arm.now)
        except ValueError as e:
            assert "was not executed" in str(e)
    elif event == "heartbeat":
        guard.on_heartbeat("policy", arm.now)
    chunks = ("good", "jump", "limit", "reverse", "nan", "inf", "huge", "gross", "small excess", "far excess")
    if event in (*chunks, "duplicate", "old", "future", "shape", "takeover", "hand back", "speed"):
        guard.on_chunk(replace(arm.chunk(motion, stamp=stamp, source=source), gripper=gripper), arm.now)
    arm.fresh = event not in ("state gap", "blocked")
    if event == "blocked":
        for _ in range(ticks):
            guard.on_state(arm.now + TICK, space.retract(arm.measured, rng.uniform(-0.02, 0.02, space.tangent)))
            arm.run(TICK)
    else:
        arm.run(ticks * TICK, periods=int(rng.integers(2, 6)) if event == "late tick" else 1)
    arm.fresh = True


@pytest.mark.parametrize(("space", "mode"), SPACES)
@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(1, 16)), min_size=1, max_size=30), st.integers(0, 1000))
def test_what_goes_out_is_finite_and_inside_the_envelope(space, mode, events, seed):
    rng = np.random.default_rng([seed, 3])
    arm = Arm(embodiment(space, mode))
    arm.measured = arm.robot.space.retract(home_of(arm.robot), rng.uniform(-0.15, 0.15, arm.robot.space.tangent))
    arm.run(TICK).arm()
    for event, ticks in events:
        play(arm, event, ticks, rng)
    arm.run(1.2)  # what is still to come: the rest of a chunk, no more actions, the longest braking
    arm.assert_inside()
    if arm.state in (State.FAULT, State.HOLDING):
        assert not arm.guard.tracker.moving


READY = np.array([0, -np.pi / 4, 0, -3 * np.pi / 4, 0, np.pi / 2, np.pi / 4])
PANDA = Path(__file__).parent.parent / "configs" / "embodiment" / "robosuite_panda_joint.yaml"


def boxes_around(kinematics, rng, count=3):
    """Draw thin boxes near the tool, not yet too near."""
    found = []
    while len(found) < count:
        size = rng.uniform(0.02, 0.5, 3)
        size[rng.integers(3)] = rng.uniform(0.002, 0.02)
        center = kinematics.tool(READY)[0] + rng.uniform(-0.35, 0.35, 3)
        box = (center - size / 2, center + size / 2)
        if kinematics.clearance(READY, [box])[0] > 0.012:
            found.append(box)
    return tuple(found)


@pytest.mark.parametrize("seed", range(8))
def test_an_arm_that_is_driven_at_boxes_stops_a_centimetre_before(seed):
    """Panda, joint commands, full speed toward random places: faults.md A23, every command that moves is looked at."""
    rng = np.random.default_rng([23, seed])
    robot = load_robot(PANDA)[0]
    kinematics, boxes = robot.kinematics, boxes_around(robot.kinematics, rng)
    robot = replace(robot, limits=replace(robot.limits, keep_out=boxes))
    guard = Guard(robot, GuardConfig(TICK, 0.1, 0.1, 10.0, 0.05, 0.25))
    goal = np.clip(READY + rng.uniform(-1.2, 1.2, 7), kinematics.low + 0.05, kinematics.high - 0.05)
    now, x = 1e9, READY.copy()
    guard.on_state(now, x)
    guard.arm(now)
    sent = []
    for t in range(240):
        if t % 32 == 0:
            row = np.clip((goal - x) / 8, -0.1, 0.1)
            guard.on_chunk(Chunk(now, robot.action_dt, np.tile(row, (12, 1)), np.full(12, 1.0), t + 1), now)
        now += TICK
        guard.on_state(now, x)
        command, _ = guard.tick(now)
        assert command is not None
        x = command.configuration
        sent.append(x)
        if guard.state is State.HOLDING and not guard.tracker.moving:
            break
    assert np.abs(sent[-1] - READY).max() > 0.01, "it moved"
    assert min(kinematics.clearance(q, boxes)[0] for q in sent[::2]) >= 0.01 - 1e-6
