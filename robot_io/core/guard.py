"""The last gate: composes chunks into one smooth path and lets nothing out of the envelope.

Reactions, weakest first: R0 drop and count; R1 clamp and count; R2 decelerate from the last command and hold until a
good chunk comes; R3 as R2, until somebody arms again. Every time is an argument: there is no clock here.
This is software protection, not a rated safety function (ISO 10218, ISO 13849).
"""

import dataclasses
import logging
import math
import os
from collections import Counter, deque
from dataclasses import dataclass
from typing import Deque, Dict, List, Optional, Sequence, Tuple

import numpy as np

from robot_io.core.chunk_buffer import EARLY, Chunk, ChunkBuffer, Step
from robot_io.core.diagnostics import Running
from robot_io.core.limits import Envelope, Robot
from robot_io.core.state_machine import State, StateMachine
from robot_io.core.tracker import Tracker

INSET = 1e-6  # [m or rad] that goals stay inside the position limits: more than rounding
HISTORY_S = 2.0  # how far back measured and sent positions are kept
MAX_TICKS = 2  # a tick later than this many periods is an overrun
GROSS = 20.0  # half ranges beyond a field's limits: another unit, not a strange action
OUTSIDE = 0.02  # of a position's range that a measurement may be outside of it: calibration, soft stops
JUMP_SPEEDS = 2.0  # times the speed limit, on top of the leash, that a measurement may move
FRESH_S = 1.0  # after a jump of the clock, fresh state must come within this time
SELF_CHECK_S = 1.0  # after a gripper command, within which the gripper's direction shows
SELF_CHECK_MOVE = 0.1  # of the gripper's range: smaller moves show nothing
TOOL_SHARE = 0.95  # of the tool's speed limit, for joint commands: the Jacobian changes a little while they brake
STOPS = ("protective_stop", "emergency_stop")  # driver modes in which nothing may be commanded
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
        self._measured: Deque[Tuple[float, np.ndarray]] = deque()
        self._sent: Deque[Tuple[float, np.ndarray]] = deque()  # (start of the step, how far the goal moved)
        self._bad: Deque[float] = deque(maxlen=3)  # when the last chunks that were not finite came
        self._covered = math.inf  # until when there is an action; inf before the first one
        self._held_since = 0.0

    @property
    def state(self) -> State:
        """Return the current state."""
        return self.machine.state

    # ---- inputs

    def on_state(self, stamp: float, configuration: np.ndarray, gripper: Optional[float] = None) -> None:
        """Take a measured configuration; one that is not finite or goes back in time is dropped."""
        if not np.all(np.isfinite(configuration)):
            self._count("R0", "state not finite")
        elif self._measured and stamp <= self._measured[-1][0]:
            self._count("R0", "state out of order")
        else:
            self._measured.append((stamp, self.space.normal(configuration)))
            while self._measured[0][0] < stamp - HISTORY_S:
                self._measured.popleft()

    def on_chunk(self, chunk: Chunk, now: float) -> Optional[str]:
        """Take a chunk; return what was wrong with it, if anything."""
        if self.state not in (State.ARMED, State.HOLDING):
            return self._count("R0", "chunk while not armed")
        if chunk.source != self.active:
            return self._count("R0", f"chunk of {chunk.source} while {self.active} is active")
        shape = self._shape_problem(chunk)
        if shape is not None:
            return self._count("R0", shape)
        if not (np.all(np.isfinite(chunk.motion)) and (chunk.gripper is None or np.all(np.isfinite(chunk.gripper)))):
            self._bad.append(now)
            if len(self._bad) == 3 and now - self._bad[0] <= 1.0:
                return self.fault("3 chunks that are not finite within 1 s", now)
            return self.hold("chunk not finite", now)
        if chunk.stamp > now + self.config.max_skew:
            return self._count("R0", "chunk from the future")
        clamped, excess = self._clamp(chunk)
        if excess > self.config.clamp_margin:
            return self.hold("action out of range", now)
        dropped = self.buffer.offer(clamped, now)
        if dropped is not None:
            return self._count("R0", dropped)
        if excess > 1e-6:
            self._count("R1", "action clamped")
        if self.machine.apply("resume", "a good chunk"):
            self._rebase(self._stopping_point())
        return None

    def on_writers(self, others: Sequence[str], now: float) -> None:
        """Take the names of the other writers on the command topic; any is a fault."""
        self.other_writers = tuple(others)
        if others:
            self.fault(f"a second writer on the command topic: {', '.join(others)}", now)

    def on_mode(self, mode: str, now: float) -> None:
        """Take the driver's mode."""
        self.mode = mode
        problem = self._mode_problem()
        if problem is not None:
            self.fault(problem, now)

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

    def take_over(self, source: str, now: float) -> None:
        """Execute the chunks of `source` only, beginning from the last command."""
        if source != self.active:
            self.active, self.pending = source, None
            self.buffer.clear(since=now)
            self._rebase(self._stopping_point())

    def hand_back(self, now: float) -> None:
        """Give control back to the policy, which continues from the last command with observations from now on."""
        self.take_over("policy", now)

    def arm(self, now: float) -> None:
        """Begin to execute, with the measured configuration as the first goal.

        After a fault the stream of commands goes on, smoothly, from where it was held; from IDLE it begins at the
        measured configuration.

        Raises:
            ValueError: it is not safe to; names every reason.
        """
        if self.state in (State.ARMED, State.HOLDING):
            return
        problems = self._arming_problems(now)
        if problems:
            raise ValueError(f"not armed: {'; '.join(problems)}")
        measured = self._measured[-1][1]
        if self.state is State.IDLE:
            self.tracker.restart(measured)
            self.envelope.restart(measured)
        self.buffer.clear(since=now)
        self._sent.clear()
        self._bad.clear()
        self.gripper = None
        self._rebase(measured)
        self.machine.apply("arm", "armed")

    def disarm(self, reason: str = "disarmed") -> None:
        """Decelerate, then send nothing."""
        self.machine.apply("disarm", reason)

    def hold(self, reason: str, now: float) -> str:
        """React with R2: decelerate from the last command and hold."""
        if self.machine.apply("hold", reason):
            self._held_since = now
            self._count("R2", reason)
        return reason

    def fault(self, reason: str, now: float) -> str:
        """React with R3: as R2, until somebody arms again."""
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
        if self.state is State.IDLE and not self.tracker.moving:
            return None, None
        self._watch(now)
        if periods > MAX_TICKS:
            self.hold("tick overrun", now)
            periods = 1
        executed = None
        for late in reversed(range(periods)):
            arrival = now - late * self.config.tick + self.config.tick  # a command is for the time of the next one
            executed = (self._compose(arrival) if self.state is State.ARMED else None) or executed
            self._gate(arrival)
        motion = self.tracker.motion
        return Command(now, motion.configuration, motion.velocity, self.gripper), executed

    def _watch(self, now: float) -> None:
        age = now - self._measured[-1][0]
        if age > self.config.state_timeout:
            self.fault(f"state older than {self.config.state_timeout} s", now)
        if age < -self.config.max_skew:
            self.fault("state from the future", now)
        if self.state is State.ARMED and now - self._covered > self.config.stream_timeout:
            self.hold(f"no action for {self.config.stream_timeout} s", now)
        if self.state is State.HOLDING and now - self._held_since > self.config.hold_timeout:
            self.fault(f"held for {self.config.hold_timeout} s ({self.machine.reason})", now)

    def _compose(self, time: float) -> Optional[Executed]:
        """Move the goal by the step that is due, once per step and never per tick."""
        step = self.buffer.due(time)
        if step is None:
            return None
        before = self.goal
        self.goal = self._leash(self._target(step))
        self._from, self._step_start = before, step.start
        if step.first:
            self._log_residual(step)
        moved = self.space.difference(self.goal, before)
        self._sent.append((step.start, moved))
        while self._sent[0][0] < time - HISTORY_S:
            self._sent.popleft()
        if step.chunk.gripper is not None:
            self.gripper = float(step.chunk.gripper[step.index])  # zero-order hold: never interpolated
        self._covered = step.end
        self.counts["steps"] += 1
        return Executed(step, self.goal, moved, self.gripper, step.chunk.source)

    def _target(self, step: Step) -> np.ndarray:
        """Return where a step wants the goal."""
        row, reference = step.chunk.motion[step.index], self.robot.motion.reference
        if reference is None:
            return self.space.normal(row)
        if reference == "commanded":
            return self.space.delta(self.goal, self.speed_scale * row)
        if reference == "measured":
            return self.space.delta(self._measured[-1][1], row)
        start = min(self._measured, key=lambda sample: abs(sample[0] - step.chunk.stamp))[1]
        return self.space.delta(start, row)

    def _leash(self, goal: np.ndarray) -> np.ndarray:
        """Keep the goal inside the position limits and near the measured configuration."""
        measured = self._measured[-1][1]
        lag = self.space.difference(goal, measured)
        distances = self.bounds.norms(lag)
        if np.any(distances > self.bounds.lag):
            self.counts["leash_hits"] += 1
            shares = np.minimum(1.0, self.bounds.lag / np.maximum(distances, 1e-12))
            goal = self.space.retract(measured, lag * np.repeat(shares, self.bounds.sizes))
        return self._inside(goal)

    def _inside(self, goal: np.ndarray) -> np.ndarray:
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
        motion = self.tracker.toward(goal, velocity) if self.state is State.ARMED else self.tracker.brake()
        broken = self.envelope.violations(motion.configuration)
        if broken:
            self.counts["envelope_stops"] += 1
            self.fault(f"the path would leave the envelope: {', '.join(broken)}", time)
            self.tracker.restart(self.tracker.configuration)
            self.envelope.restart(self.tracker.configuration)
            return
        self.tracker.take(motion)
        self.envelope.sent(motion.configuration)
        if self.state is State.ARMED:
            self.lag.add(float(np.linalg.norm(self.space.difference(goal, motion.configuration))))

    # ---- helpers

    def _arming_problems(self, now: float) -> List[str]:
        problems = []
        if self.other_writers:
            problems.append(f"a second writer on the command topic: {', '.join(self.other_writers)}")
        mode = self._mode_problem()
        if mode is not None:
            problems.append(mode)
        if self.tracker.moving:
            problems.append("still decelerating")
        if not self._measured:
            return [*problems, f"no measured {self._what()} yet"]
        stamp, x = self._measured[-1]
        if not -self.config.max_skew <= now - stamp <= self.config.state_timeout:
            problems.append(
                f"the measured {self._what()} is {now - stamp:.3f} s old; compare the clocks of the two hosts"
            )
        n = self.space.linear
        for i in np.flatnonzero((x[:n] < self.bounds.low[:n]) | (x[:n] > self.bounds.high[:n])):
            problems.append(
                f"{self.space.axes[i]} at {x[i]:.3f} is outside {self.bounds.low[i]:.3f} .. {self.bounds.high[i]:.3f}"
            )
        return problems

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

    def _clamp(self, chunk: Chunk) -> Tuple[Chunk, float]:
        """Return the chunk inside its fields' limits and the largest excess, as a share of a half range."""
        n = len(self.robot.motion.low)
        motion = chunk.motion.copy()
        motion[:, :n], excess = _clip(chunk.motion[:, :n], self.robot.motion.low, self.robot.motion.high)
        if chunk.gripper is None or self.robot.gripper is None:
            return dataclasses.replace(chunk, motion=motion), excess
        gripper, more = _clip(chunk.gripper, self.robot.gripper.low, self.robot.gripper.high)
        return dataclasses.replace(chunk, motion=motion, gripper=gripper), max(excess, more)

    def _stopping_point(self) -> np.ndarray:
        return self.tracker.stop(self.tracker.motion)

    def _rebase(self, x: np.ndarray) -> None:
        self.goal = self._from = self._inside(x)
        self._step_start, self._covered = -math.inf, math.inf

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
        self.counts[f"{reaction} {reason}"] += 1
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


def _clip(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> Tuple[np.ndarray, float]:
    clipped = np.clip(values, low, high)
    return clipped, float(np.max(np.abs(values - clipped) / (0.5 * (high - low))))
