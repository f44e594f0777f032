"""The last gate: composes chunks into one smooth path and lets nothing out of the envelope.

Reactions, weakest first: R0 drop and count; R1 clamp and count; R2 decelerate from the last command and hold until a
good chunk comes; R3 as R2, until somebody arms again. Every time is an argument: there is no clock here.
This is software protection, not a rated safety function (ISO 10218, ISO 13849).
"""

import dataclasses
import logging
import math
import os
import re
from collections import Counter, deque
from dataclasses import dataclass
from typing import Any, Callable, Deque, Dict, List, Optional, Sequence, Tuple

import numpy as np

from robot_io.core.chunk_buffer import EARLY, Chunk, ChunkBuffer, Step
from robot_io.core.diagnostics import Running
from robot_io.core.kinematics import Placed
from robot_io.core.limits import Envelope, Robot
from robot_io.core.state_machine import State, StateMachine
from robot_io.core.tracker import Motion, Tracker

INSET = 1e-6  # [m or rad] that goals stay inside the position limits: more than rounding
HISTORY_S = 2.0  # how far back measured and sent positions are kept
MAX_TICKS = 2  # a tick later than this many periods is an overrun
GAP_S = 0.05  # after a longer pause the arm is taken to rest at the last command: drivers time out, readers start anew
GROSS = {"delta": 20.0, "absolute": 1.0}  # half ranges beyond a field's limits: another unit, not a strange action
OUTSIDE = 0.02  # of a position's range that a measurement may be outside of it: calibration, soft stops
JUMP_SPEEDS = 2.0  # times the speed limit, on top of the leash, that a measurement may move
FRESH_S = 1.0  # after a jump of the clock, fresh state must come within this time
SELF_CHECK_S = 1.0  # after a gripper command, within which the gripper's direction shows
SELF_CHECK_MOVE = 0.1  # of the gripper's range: smaller moves show nothing
WAY_PLACES = 4  # at which the way to rest is looked at first
TOOL_SHARE = 0.95  # of the tool's speed limit, for joint commands: the Jacobian changes a little while they brake
STOPS = ("protective_stop", "emergency_stop")  # driver modes in which nothing may be commanded
NUMBER = re.compile(r"-?\d+\.\d+")  # measured values in a reason: its counter is one for all of them
UNSAFE_FLAG = "DITA_UNSAFE_TEST"  # environment variable that must be 1 for `unsafe_checks_off`


@dataclass(frozen=True)
class GuardConfig:
    """The guard's knobs; times in seconds."""

    tick: float  # period of the output
    state_timeout: float  # measured state older than this: R3
    stream_timeout: float  # no action to execute, or no sign of life, for this long: R2
    hold_timeout: float  # held for this long: R3
    max_skew: float  # stamps further in the future than this: R3
    clamp_margin: float  # of a field's half range: a larger excess is no rounding
    clamp_steps: int = 5  # more steps in a row with such an excess: R2
    unsafe_checks_off: bool = False  # for the control run of the fault tests only: lets everything through

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self)[:-1]:
            if not getattr(self, field.name) > 0:
                raise ValueError(f"guard: {field.name} must be positive, got {getattr(self, field.name)}")
        if self.tick > 0.01:
            raise ValueError(f"guard: it runs at 100 Hz or more, got {1 / self.tick:.0f}")
        if self.unsafe_checks_off:
            if os.environ.get(UNSAFE_FLAG) != "1":
                raise ValueError(f"guard: unsafe_checks_off is for tests without a robot; it needs {UNSAFE_FLAG}=1")
            logging.getLogger("robot_io").critical("THE GUARD'S CHECKS ARE OFF: anything goes out. Never on a robot")


@dataclass(frozen=True, eq=False)
class Command:
    """What is sent at one tick."""

    stamp: float  # [s]
    configuration: np.ndarray  # in the robot's space, absolute
    velocity: np.ndarray  # [tangent], per second
    gripper: Optional[float]  # None until there is a reason to move it


@dataclass(frozen=True, eq=False)
class Executed:
    """What became of one step: the goal, how far it moved as a tangent, and who asked for it."""

    step: Step
    goal: np.ndarray
    delta: np.ndarray
    gripper: Optional[float]
    source: str


class Guard:
    """Chunks and measured configurations in, one command per tick out."""

    def __init__(self, robot: Robot, config: GuardConfig) -> None:
        if config.tick > robot.action_dt:
            raise ValueError(f"guard: a tick ({config.tick} s) must not exceed a step ({robot.action_dt} s)")
        if robot.bounds is None:
            raise ValueError(f"guard: {robot.name} has no limits for what it moves; parse_robot says which")
        self.robot, self.config, self.space, self.bounds = robot, config, robot.space, robot.bounds
        self.machine = StateMachine()
        self.counts: Counter = Counter(R0=0, R1=0, R2=0, R3=0)
        self.residual, self.lag = Running(), Running()
        self.buffer = ChunkBuffer()
        self.tracker = Tracker(self.space, self.bounds, config.tick)
        self.envelope = Envelope(self.space, self.bounds, config.tick)
        self.goal = self._from = self.space.origin  # where the current step ends and where it began
        self._step_start = -math.inf
        self.gripper: Optional[float] = None
        self.other_writers: Tuple[str, ...] = ()
        self.mode: Optional[str] = None  # the driver's, if it says
        self.active = "policy"  # whose chunks are executed
        self.speed_scale = 1.0
        self.approval = False
        self.pending: Optional[Chunk] = None  # waits for approval
        self._low, self._high = self.bounds.low + INSET, self.bounds.high - INSET
        self._action_low, self._action_high = _action_limits(robot)
        self._measured: Deque[Tuple[float, np.ndarray]] = deque()
        self._sent: Deque[Tuple[float, np.ndarray]] = deque()  # (start of the step, how far the goal moved)
        self._bad: Deque[float] = deque(maxlen=3)  # when the last chunks that were not finite came
        self._covered = math.inf  # until when there is an action; inf before the first one
        self._alive: Optional[float] = None  # the last sign of life, once there was one
        self._held_since = 0.0
        self._fresh_by = -math.inf  # until when stale state is only held, after a jump of the clock
        self._ahead = 0.0  # how far in the future the newest measurement was when it came [s]
        self._jumped = ""  # what `on_state` found, for the next tick
        self._over = 0  # steps in a row that were far outside the action's limits
        self._distrust = False  # held for such steps: only a chunk without any of them goes on
        self._silent = False  # the driver stopped: send nothing until armed again
        self._wanted: Optional[float] = None  # gripper, before hysteresis and dwell
        self._gripper_moved = -math.inf
        self._opening: Optional[float] = None  # measured gripper
        self._check: Optional[Tuple[float, float, float]] = None  # (time, opening, direction) of a gripper command
        self._polarity = ""  # what the gripper's self-check found

    @property
    def state(self) -> State:
        """Return the current state."""
        return self.machine.state

    # ---- inputs

    def on_state(
        self, stamp: float, configuration: np.ndarray, gripper: Optional[float] = None, now: Optional[float] = None
    ) -> None:
        """Take a measured configuration, and the gripper's measured opening where there is one.

        One that is not finite or a little late is dropped. One that no arm could have come to, or out of its range, is
        a fault: another unit, another joint, another robot. So is, with the time of its arrival, one from the future.
        """
        x = np.asarray(configuration, float)
        if not np.all(np.isfinite(x)):
            self._count("R0", "state not finite")
            return
        problem = self.space.problem(x)
        if problem is not None:
            self.fault(f"measured state: {problem}", stamp)
            return
        x = self.space.normal(x)
        if self._measured and stamp <= self._measured[-1][0]:
            back = self._measured[-1][0] - stamp
            if back <= self.config.max_skew:
                self._count("R0", "state out of order")
                return
            self._jumped = f"the stamps of the measured {self._what()} jumped back by {back:.3f} s"
            self._measured.clear()
        problem = self._state_problem(stamp, x)
        if problem is not None:
            self.fault(problem, stamp)
        self._ahead = 0.0 if now is None else stamp - now
        if self._ahead > self.config.max_skew and stamp > self._fresh_by:  # after a jump old ones may be on their way
            self.fault(self._future_problem(), stamp)
        self._measured.append((stamp, x))
        while self._measured[0][0] < stamp - HISTORY_S:
            self._measured.popleft()
        if gripper is not None and math.isfinite(gripper):
            self._opening = gripper
            self._check_gripper(stamp)

    def on_chunk(self, chunk: Chunk, now: float) -> Optional[str]:
        """Take a chunk; return what was wrong with it, if anything."""
        if self.state not in (State.ARMED, State.HOLDING):
            return self._count("R0", "chunk while not armed")
        if chunk.source != self.active:
            return self._count("R0", f"chunk of {chunk.source} while {self.active} is active")
        shape = self._shape_problem(chunk)
        if shape is not None:
            return self._count("R0", shape)
        if not self.config.unsafe_checks_off:
            problem = self._content_problem(chunk, now)
            if problem is not None:
                return problem
        if not self.approval:
            return self._accept(chunk, now)
        if self.pending is not None and chunk.stamp <= self.pending.stamp:
            return self._count("R0", "out-of-order chunk")
        if self.pending is None:  # what an operator looks at stays until it is answered
            self.pending = chunk
        else:
            self.counts["chunks while one waits"] += 1
        return None

    def _accept(self, chunk: Chunk, now: float) -> Optional[str]:
        """Let a chunk be executed in place of the older one."""
        if not self._is_fresh(now):
            return self._count("R0", "chunk before fresh state")
        if self._distrust and self._far_out(chunk, now):
            return self._count("R0", "chunk out of the action's limits while held for that")
        dropped = self.buffer.offer(chunk, now)
        if dropped is not None:
            return self._count("R0", dropped)
        self._distrust = False
        if self._alive is not None:
            self._alive = now
        if self.machine.apply("resume", "a good chunk"):
            self._rebase(self._stopping_point())
        return None

    def on_heartbeat(self, source: str, now: float) -> None:
        """Take a sign of life of a source of chunks; once there was one, its absence is R2 as that of actions is."""
        if source == self.active:
            self._alive = now

    def on_clock_jump(self, by: float, now: float) -> None:
        """Take that the wall clock has jumped by [s]; `now` is on the new one. Nothing is paired across the jump."""
        self.hold(f"the wall clock jumped by {by:.3f} s", now)
        self._held_since, self._fresh_by, self._alive = now, now + FRESH_S, None
        self._measured.clear()
        self._sent.clear()
        self._bad.clear()
        self.buffer.clear(since=now)
        self.pending = self._check = None
        self._gripper_moved += by
        self._rebase(self.goal)

    def on_writers(self, others: Sequence[str], now: float) -> None:
        """Take the names of the other writers on the command topic; any is a fault."""
        self.other_writers = tuple(others)
        if others:
            self.fault(f"a second writer on the command topic: {', '.join(others)}", now)

    def on_mode(self, mode: str, now: float) -> None:
        """Take the driver's mode; in one that stops the arm nothing is sent, until it is over and somebody arms."""
        self.mode = mode
        problem = self._mode_problem()
        if problem is not None:
            self.fault(problem, now)
            self._silent = True
            self._at_rest(self.tracker.configuration)

    def on_problem(self, reason: str, reaction: str, now: float) -> str:
        """React to what a node sees, with "R0", "R2" or "R3"."""
        return {"R0": self._drop, "R2": self.hold, "R3": self.fault}[reaction](reason, now)

    # ---- the operator's controls

    def set_speed(self, scale: float) -> None:
        """Scale the speed limit, and the deltas that add to the last command, so that their path stays the same.

        Raises:
            ValueError: not in (0, 1].
        """
        if not 0 < scale <= 1:
            raise ValueError(f"guard: a speed scale lies in (0, 1], got {scale}")
        self.speed_scale = self.tracker.scale = scale

    def approve(self, chunk_id: int, now: float) -> None:
        """Execute the chunk that waits for approval, beginning now.

        Raises:
            ValueError: no such chunk waits, or it cannot be executed; says why.
        """
        chunk = self.pending
        if chunk is None or chunk.id != chunk_id:
            waits = "none waits" if chunk is None else f"chunk {chunk.id} waits"
            raise ValueError(f"guard: chunk {chunk_id} does not wait for approval; {waits}")
        self.pending = None
        first = now + 2 * self.config.tick  # the next tick's command is for the one after it
        reason = self._accept(dataclasses.replace(chunk, stamp=first), now)
        if reason is not None:
            raise ValueError(f"guard: chunk {chunk_id} was not executed: {reason}")

    def leave_out(self, chunk_id: int) -> None:
        """Forget the chunk that waits for approval, so that the next one waits; another id changes nothing."""
        if self.pending is not None and self.pending.id == chunk_id:
            self.pending = None

    def take_over(self, source: str, now: float) -> None:
        """Execute the chunks of `source` only, beginning from the last command."""
        if source != self.active:
            self.active, self.pending, self._alive = source, None, None
            self.buffer.clear(since=now)
            self._rebase(self._stopping_point())

    def hand_back(self, now: float) -> None:
        """Give control back to the policy, which continues from the last command with observations from now on."""
        self.take_over("policy", now)

    def arm(self, now: float) -> None:
        """Begin to execute, with the measured configuration as the first goal.

        After a fault the stream of commands goes on, smoothly, from where it was held; from IDLE it begins at the
        measured configuration. The gripper keeps its last command after a fault; from IDLE it has none until a chunk
        brings one, so it never moves by itself.

        Raises:
            ValueError: it is not safe to; names every reason.
        """
        if self.state in (State.ARMED, State.HOLDING):
            return
        problems = self._arming_problems(now)
        if problems:
            raise ValueError(f"not armed: {'; '.join(problems)}")
        measured = self._measured[-1][1]
        if self.state is State.IDLE or self._silent:
            self._at_rest(measured)
        if self.state is State.IDLE:
            self.gripper = None
        self.buffer.clear(since=now)
        self._sent.clear()
        self._bad.clear()
        self.pending = self._check = self._alive = None
        self._over, self._distrust, self._silent, self._fresh_by = 0, False, False, -math.inf
        self._rebase(measured)
        self.machine.apply("arm", "armed, WITH THE CHECKS OFF" if self.config.unsafe_checks_off else "armed")

    def disarm(self, reason: str = "disarmed") -> None:
        """Decelerate, then send nothing."""
        self.machine.apply("disarm", reason)

    def hold(self, reason: str, now: float) -> str:
        """React with R2: decelerate from the last command and hold."""
        if self.config.unsafe_checks_off:
            return self._count("R0", reason)
        if self.machine.apply("hold", reason):
            self._held_since = now
            self._count("R2", reason)
        return reason

    def fault(self, reason: str, now: float) -> str:
        """React with R3: as R2, until somebody arms again."""
        if self.config.unsafe_checks_off:
            return self._count("R0", reason)
        if self.machine.apply("fault", reason):
            self._count("R3", reason)
        return reason

    # ---- the tick

    def tick(self, now: float, periods: int = 1) -> Tuple[Optional[Command], Optional[Executed]]:
        """Return the command for this tick and the step that began with it.

        Args:
            now: [s], on the grid of ticks.
            periods: ticks since the last call; more than one means that the process came late.
        """
        if self._silent or (self.state is State.IDLE and not self.tracker.moving):
            return None, None
        self._watch(now)
        if periods > MAX_TICKS:
            self.hold("tick overrun", now)
        if periods * self.config.tick > GAP_S:
            self._at_rest(self.tracker.configuration)
            periods = 1
        executed = None
        for late in reversed(range(periods)):
            arrival = now - late * self.config.tick + self.config.tick  # a command is for the time of the next one
            executed = (self._compose(arrival) if self.state is State.ARMED else None) or executed
            self._move_gripper(arrival)
            self._gate(arrival)
        motion = self.tracker.motion
        return Command(now, motion.configuration, motion.velocity, self.gripper), executed

    def _watch(self, now: float) -> None:
        self._watch_state(now)
        timeout = self.config.stream_timeout
        if self.state is State.ARMED and not self.approval and now - self._covered > timeout:
            self.hold(f"no action for {timeout} s", now)
        if self.state is State.ARMED and self._alive is not None and now - self._alive > timeout:
            self.hold(f"no sign of life from {self.active} for {timeout} s", now)
        if self.state is State.HOLDING and now - self._held_since > self.config.hold_timeout:
            self.fault(f"held for {self.config.hold_timeout} s ({self.machine.reason})", now)

    def _watch_state(self, now: float) -> None:
        if self._jumped:
            self.hold(self._jumped, now)
            self._jumped, self._fresh_by = "", now + FRESH_S
        if self._is_fresh(now):
            lag = self.bounds.norms(self.space.difference(self.tracker.configuration, self._measured[-1][1]))
            for i in np.flatnonzero(lag > 2 * self.bounds.lag):
                self.fault(f"{self.bounds.names[i]} is {lag[i]:.3f} away from its command", now)
        elif now > self._fresh_by:
            age = now - self._measured[-1][0] if self._measured else math.inf
            late = f"older than {self.config.state_timeout} s" if age > 0 else "from the future: compare the clocks"
            self.fault(f"state {late}", now)

    def _compose(self, time: float) -> Optional[Executed]:
        """Move the goal by the step that is due, once per step and never per tick."""
        step = self.buffer.due(time)
        if step is None:
            return None
        row = self._clamp(step, time)
        if self.state is not State.ARMED:
            return None
        before = self.goal
        self.goal = self._target(step, row)
        if not self.config.unsafe_checks_off:
            self.goal = self._inside(self._leash(self.goal))
        self._from, self._step_start = before, step.start
        if step.first:
            self._log_residual(step)
        moved = self.space.difference(self.goal, before)
        self._sent.append((step.start, moved))
        while self._sent[0][0] < time - HISTORY_S:
            self._sent.popleft()
        if step.chunk.gripper is not None:
            self._want_gripper(float(step.chunk.gripper[step.index]))
            self._move_gripper(time)
        self._covered = step.end
        self.counts["steps"] += 1
        return Executed(step, self.goal, moved, self.gripper, step.chunk.source)

    def _clamp(self, step: Step, time: float) -> np.ndarray:
        """Return a step's motion inside the action's limits; too many far outside are held."""
        row = step.chunk.motion[step.index]
        if self.config.unsafe_checks_off:
            return row
        clamped = np.clip(row, self._action_low, self._action_high)
        excess = _excess(row, self._action_low, self._action_high)
        if np.max(excess) > 1e-6:
            self._count("R1", "action clamped")
        self._over = self._over + 1 if np.max(excess) > self.config.clamp_margin else 0
        if self._over > self.config.clamp_steps:
            self._over, self._distrust = 0, True
            self.hold(f"{self._axis(int(np.argmax(excess)))} out of the action's limits for too long", time)
        return clamped

    def _target(self, step: Step, row: np.ndarray) -> np.ndarray:
        """Return where a step wants the goal."""
        reference = self.robot.motion.reference
        if reference is None:
            return self.space.normal(row)
        if reference == "commanded":
            return self.space.delta(self.goal, self.speed_scale * row)
        if reference == "measured":
            return self.space.delta(self._measured[-1][1], row)
        start = min(self._measured, key=lambda sample: abs(sample[0] - step.chunk.stamp))[1]
        return self.space.delta(start, row)

    def _leash(self, goal: np.ndarray) -> np.ndarray:
        """Keep a goal near the measured configuration."""
        measured = self._measured[-1][1]
        lag = self.space.difference(goal, measured)
        distances = self.bounds.norms(lag)
        if np.any(distances > self.bounds.lag):
            self.counts["leash_hits"] += 1
            shares = np.minimum(1.0, self.bounds.lag / np.maximum(distances, 1e-12))
            goal = self.space.retract(measured, lag * np.repeat(shares, self.bounds.sizes))
        return goal

    def _inside(self, goal: np.ndarray) -> np.ndarray:
        """Keep a goal inside the position limits."""
        n = self.space.linear
        inside = np.clip(goal[:n], self._low[:n], self._high[:n])
        for i in np.flatnonzero(inside != goal[:n]):
            self.counts[f"{self.space.axes[i]} clamped"] += 1
        return np.concatenate([inside, goal[n:]])

    def _interpolate(self, time: float) -> Tuple[np.ndarray, np.ndarray]:
        """Return where the goal is at `time`, on the shortest way within a step, and its velocity [tangent/s]."""
        share = (time - self._step_start) / self.robot.action_dt
        if share > 1 + EARLY:
            return self.goal, np.zeros(self.space.tangent)
        way = self.space.difference(self.goal, self._from)
        return self.space.retract(self._from, share * way), way / self.robot.action_dt

    def _gate(self, time: float) -> None:
        """Advance the path by one period, to a configuration inside the envelope."""
        goal, velocity = self._interpolate(time)
        if self.config.unsafe_checks_off:
            self.tracker.take(Motion(goal, velocity, np.zeros(self.space.tangent)))
            return
        motion = self._wanted_motion(goal, velocity, time) if self.state is State.ARMED else None
        motion = motion or self.tracker.brake()
        broken = self.envelope.violations(motion.configuration)
        if broken:
            self.counts["envelope_stops"] += 1
            self.fault(f"the path would leave the envelope: {', '.join(broken)}", time)
            self._at_rest(self.tracker.configuration)
            return
        self.tracker.take(motion)
        self.envelope.sent(motion.configuration)
        if self.state is State.ARMED:
            self.lag.add(float(np.linalg.norm(self.space.difference(goal, motion.configuration))))

    def _wanted_motion(self, goal: np.ndarray, velocity: np.ndarray, time: float) -> Optional[Motion]:
        """Return the motion toward the goal, or None where the arm must brake instead.

        It must brake if it could not stop in time after that motion. Whatever it did last tick was checked likewise, so
        braking now ends outside of every obstacle.
        """
        motion = self.tracker.toward(goal, velocity)
        kinematics, keep_out, margin = self.robot.kinematics, self.robot.limits.keep_out, self.robot.limits.margin
        if not np.all(np.isfinite(motion.configuration)):
            return motion  # the envelope refuses it
        if self.space.name == "cartesian":
            near = _box_problem(self._stopping_positions(motion), keep_out, margin) if keep_out else None
        elif kinematics is None:
            return motion
        else:
            way = kinematics.place(self.tracker.way(motion, WAY_PLACES if motion.moving else 1))
            if self._tool_speed(motion, way) > TOOL_SHARE * (self.robot.limits.max_speed or math.inf):
                self._count("R1", "tool speed limited")
                return None
            near = self._arm_problem(way, lambda count: kinematics.place(self.tracker.way(motion, count)))
        if near is not None:
            self.hold(f"would come too near: {near}", time)
            return None
        return motion

    def _tool_speed(self, motion: Motion, way: Placed) -> float:
        """Return the highest tool speed [m/s] of joints that begin to brake; 0 where nothing limits it."""
        if self.robot.limits.max_speed is None:
            return 0.0
        v, a = motion.velocity, motion.acceleration
        peak = v + np.where(a * v > 0, a * np.abs(a) / (2 * self.bounds.jerk), 0.0)  # until the acceleration is gone
        return float(np.linalg.norm(way.jacobian()[:3] @ peak))

    def _stopping_positions(self, motion: Motion) -> np.ndarray:
        """Return the tool's positions [k 3] m while it brakes, a margin or less from each other."""
        end = self.tracker.stop(motion)[:3]
        length = float(np.abs(end - motion.configuration[:3]).sum())
        return self.tracker.way(motion, 2 + math.ceil(length / self.robot.limits.margin))[:, :3]

    def _arm_problem(self, way: Placed, finer: Callable[[int], Placed]) -> Optional[str]:
        """Name what an arm comes too near to on a way: a box, another link, the workspace's border."""
        limits = self.robot.limits
        if limits.workspace_low is not None:
            outside = ((way.tools < limits.workspace_low) | (way.tools > limits.workspace_high)).any(axis=1)
            if outside.any():
                return f"the tool at {np.round(way.tools[outside][0], 3).tolist()} m outside the workspace"
        distance, what = way.arm.way_clearance(way, finer, limits.keep_out, limits.margin)
        return f"{distance:.3f} m between {what}" if distance < limits.margin else None

    def _obstacle(self, x: np.ndarray) -> Optional[str]:
        """Name what a configuration at rest is too near to."""
        if self.space.name == "cartesian":
            return _box_problem(x[None, :3], self.robot.limits.keep_out, self.robot.limits.margin)
        kinematics = self.robot.kinematics
        return None if kinematics is None else self._arm_problem(kinematics.place(x[None]), kinematics.place)

    # ---- the gripper

    def _want_gripper(self, value: float) -> None:
        assert self.robot.gripper is not None
        low, high = self.robot.gripper.low[0], self.robot.gripper.high[0]
        if not self.config.unsafe_checks_off:
            if _excess(np.array([value]), low, high)[0] > 1e-6:
                self._count("R1", "gripper clamped")
            value = min(max(value, low), high)
        self._wanted = value

    def _move_gripper(self, time: float) -> None:
        """Send a wanted value if it differs enough and the last change is long enough ago; in between it is held."""
        if self.state is not State.ARMED or self._wanted is None or self._wanted == self.gripper:
            return
        driver = self.robot.driver
        if self.gripper is not None:
            small = abs(self._wanted - self.gripper) <= driver.gripper_hysteresis
            if small or time - self._gripper_moved < driver.gripper_dwell:
                return
            if self._opening is not None:
                opens = math.copysign(1.0, self._wanted - self.gripper) * driver.gripper_direction
                self._check = time, self._opening, opens
        self.gripper, self._gripper_moved = self._wanted, time

    def _check_gripper(self, stamp: float) -> None:
        """Compare the way the gripper has gone since its last command with the one that it was told to go."""
        if self._check is None or stamp - self._check[0] < SELF_CHECK_S:
            return
        _, before, direction = self._check
        self._check = None
        assert self._opening is not None
        measured = [f for f in self.robot.state if f.kind == "gripper_position"]
        width = float(measured[0].high[0] - measured[0].low[0]) if measured else 1.0
        if (self._opening - before) * direction < -SELF_CHECK_MOVE * width:
            self._polarity = (
                f"the gripper went from {before:.2f} to {self._opening:.2f} against its command: correct "
                "driver.gripper_direction or the gripper's field, then restart the guard"
            )
            self.fault(self._polarity, stamp)

    # ---- helpers

    def _arming_problems(self, now: float) -> List[str]:
        problems = []
        if self.other_writers:
            problems.append(f"a second writer on the command topic: {', '.join(self.other_writers)}")
        mode = self._mode_problem()
        if mode is not None:
            problems.append(mode)
        if self._polarity:
            problems.append(self._polarity)
        if self.tracker.moving:
            problems.append("still decelerating")
        if not self._measured:
            return [*problems, f"no measured {self._what()} yet"]
        stamp, x = self._measured[-1]
        if self._ahead > self.config.max_skew:
            problems.append(self._future_problem())
        elif not -self.config.max_skew <= now - stamp <= self.config.state_timeout:
            problems.append(
                f"the measured {self._what()} is {now - stamp:.3f} s old; compare the clocks of the two hosts"
            )
        n = self.space.linear
        for i in np.flatnonzero((x[:n] < self.bounds.low[:n]) | (x[:n] > self.bounds.high[:n])):
            problems.append(self._out_of_range(i, x[i]))
        if self.state is State.FAULT and not self._silent:
            lag = self.bounds.norms(self.space.difference(self.tracker.configuration, x))
            for i in np.flatnonzero(lag > self.bounds.lag):
                problems.append(f"{self.bounds.names[i]} is {lag[i]:.3f} away from its last command; disarm first")
        near = self._obstacle(x)
        if near is not None:
            problems.append(near)
        return problems

    def _future_problem(self) -> str:
        return (
            f"the measured {self._what()} is {self._ahead:.3f} s in the future: compare the clocks of the driver's "
            "host and of this one"
        )

    def _out_of_range(self, i: Any, value: float) -> str:
        low, high = self.bounds.low[i], self.bounds.high[i]
        return f"{self.space.axes[i]} at {value:.3f} is outside {low:.3f} .. {high:.3f}"

    def _state_problem(self, stamp: float, x: np.ndarray) -> Optional[str]:
        """Say why a measured configuration cannot be true."""
        n = self.space.linear
        low, high = self.bounds.low[:n], self.bounds.high[:n]
        slack = OUTSIDE * (high - low)
        for i in np.flatnonzero((x[:n] < low - slack) | (x[:n] > high + slack)):
            return f"measured {self._out_of_range(i, x[i])}: another unit or another joint?"
        if self._measured:
            since, before = self._measured[-1]
            moved = self.bounds.norms(self.space.difference(x, before))
            possible = self.bounds.lag + JUMP_SPEEDS * self.bounds.speed * (stamp - since)
            for i in np.flatnonzero(moved > possible):
                name = self.bounds.names[i]
                return f"measured {name} jumped by {moved[i]:.3f} within {stamp - since:.3f} s: another unit?"
        return None

    def _is_fresh(self, now: float) -> bool:
        return (
            bool(self._measured) and -self.config.max_skew <= now - self._measured[-1][0] <= self.config.state_timeout
        )

    def _what(self) -> str:
        return "joints" if self.space.name == "joint" else "position"

    def _mode_problem(self) -> Optional[str]:
        """Say why the driver's mode lets nothing be commanded."""
        required = self.robot.driver.required_mode
        if self.mode in STOPS or (required is not None and self.mode != required):
            return f"the driver is in {self.mode or 'an unknown mode'}" + (f", not {required}" if required else "")
        return None

    def _shape_problem(self, chunk: Chunk) -> Optional[str]:
        width = self.space.size if self.robot.motion.mode == "absolute" else self.space.tangent
        if chunk.motion.ndim != 2 or chunk.motion.shape[1] != width or not len(chunk.motion):
            return "chunk of the wrong shape"
        if (chunk.gripper is None) != (self.robot.gripper is None):
            return "chunk without its gripper" if chunk.gripper is None else "chunk with a gripper"
        if chunk.gripper is not None and chunk.gripper.shape != (len(chunk.motion),):
            return "chunk of the wrong shape"
        if abs(chunk.dt - self.robot.action_dt) > 1e-6:
            return "chunk of another step"
        return None

    def _content_problem(self, chunk: Chunk, now: float) -> Optional[str]:
        """React to values and stamps that no good source sends."""
        if not (np.all(np.isfinite(chunk.motion)) and (chunk.gripper is None or np.all(np.isfinite(chunk.gripper)))):
            self._bad.append(now)
            if len(self._bad) == 3 and now - self._bad[0] <= 1.0:
                return self.fault("3 chunks that are not finite within 1 s", now)
            return self.hold("chunk not finite", now)
        ahead = chunk.stamp - now
        if ahead > self.config.max_skew:
            return self.fault(f"a chunk is {ahead:.3f} s in the future: compare the clocks of the two hosts", now)
        if self.robot.motion.mode == "absolute":
            problem = self.space.problem(chunk.motion)
            if problem is not None:
                return self.hold(f"chunk: {problem}", now)
        excess = _excess(chunk.motion, self._action_low, self._action_high).max(axis=0)
        worst = int(np.argmax(excess))
        if excess[worst] > GROSS[self.robot.motion.mode]:
            return self.fault(f"{self._axis(worst)} is {excess[worst]:.1f} half ranges out: another unit?", now)
        return None

    def _far_out(self, chunk: Chunk, now: float) -> bool:
        """Return whether a step that is not over yet is outside the action's limits by more than rounding."""
        due = chunk.motion[max(0, math.floor((now - chunk.stamp) / chunk.dt)) :]
        return bool(np.any(_excess(due, self._action_low, self._action_high) > self.config.clamp_margin))

    def _axis(self, i: int) -> str:
        return self.space.axes[i]

    def _at_rest(self, x: np.ndarray) -> None:
        """Begin a new stream of commands."""
        self.tracker.restart(x)
        self.envelope.restart(x)

    def _stopping_point(self) -> np.ndarray:
        return self.tracker.stop(self.tracker.motion)

    def _rebase(self, x: np.ndarray) -> None:
        self.goal = self._from = self._inside(x)
        self._step_start, self._covered, self._wanted = -math.inf, math.inf, None

    def _log_residual(self, step: Step) -> None:
        """Compare what the chunk wanted for its expired steps with what was sent in their place."""
        if self.robot.motion.reference == "commanded":
            wanted = step.chunk.motion[: step.index].sum(axis=0)
            since = step.chunk.stamp - 0.5 * step.chunk.dt
            sent = sum((delta for start, delta in self._sent if start >= since), np.zeros(self.space.tangent))
            self.residual.add(float(np.linalg.norm(wanted - sent)))

    def _drop(self, reason: str, now: float) -> str:
        return self._count("R0", reason)

    def _count(self, reaction: str, reason: str) -> str:
        self.counts[reaction] += 1
        self.counts[f"{reaction} {NUMBER.sub('#', reason)}"] += 1
        return reason

    def to_dict(self) -> Dict[str, float]:
        """Return every counter and statistic as plain values."""
        unit = "rad" if self.space.name == "joint" else "m"
        return {
            **self.counts,
            **self.buffer.counts,
            "speed_scale": self.speed_scale,
            **self.residual.to_dict(f"residual_{unit}"),
            **self.lag.to_dict(f"lag_{unit}"),
        }


def _action_limits(robot: Robot) -> Tuple[np.ndarray, np.ndarray]:
    """Return the limits of a chunk's row; an absolute rotation has none."""
    low, high = [robot.motion.low], [robot.motion.high]
    if robot.rotation is not None and robot.rotation.mode == "delta":
        low, high = [*low, robot.rotation.low], [*high, robot.rotation.high]
    elif robot.rotation is not None:
        low, high = [*low, np.full(4, -np.inf)], [*high, np.full(4, np.inf)]
    return np.concatenate(low), np.concatenate(high)


def _box_problem(positions: np.ndarray, keep_out: Sequence[Any], margin: float) -> Optional[str]:
    """Name the first box that one of the tool's positions [k 3] m is too near to."""
    for low, high in keep_out:
        distance = float(np.linalg.norm(np.maximum(0.0, np.maximum(low - positions, positions - high)), axis=1).min())
        if distance < margin:
            return f"{distance:.3f} m between the tool and the keep-out box at {low.tolist()}"
    return None


def _excess(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return how far values are outside their limits, in half ranges."""
    return np.abs(values - np.clip(values, low, high)) / (0.5 * (high - low))
