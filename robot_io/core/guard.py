"""The last gate: composes chunks into one smooth path and lets nothing out of the envelope.

Reactions, weakest first: R0 drop and count; R1 clamp a small excess and count; R2 decelerate from the last command and
hold until a good chunk comes; R3 as R2, until somebody arms again. Every time is an argument: there is no clock here.
This is software protection, not a rated safety function (ISO 10218, ISO 13849).
"""

from collections import Counter, deque
from dataclasses import dataclass
from typing import Deque, Dict, List, Optional, Sequence, Tuple

import numpy as np

from robot_io.core.chunk_buffer import EARLY, Chunk, ChunkBuffer, Step
from robot_io.core.diagnostics import Running
from robot_io.core.limits import Envelope, Robot
from robot_io.core.state_machine import State, StateMachine
from robot_io.core.tracker import Tracker, stop_distance

BOX_MARGIN = 1.5  # stop distances that goals stay inside the workspace, so that braking anywhere ends inside it
HISTORY_S = 2.0  # how far back measured and sent positions are kept
MAX_TICKS = 2  # a tick later than this many periods is an overrun


@dataclass(frozen=True)
class GuardConfig:
    """The guard's knobs; times in seconds."""

    tick: float  # period of the output
    state_timeout: float  # measured state older than this: R3
    stream_timeout: float  # no action to execute for this long: R2
    hold_timeout: float  # held for this long: R3
    max_skew: float  # stamps further in the future than this: R3
    clamp_margin: float  # of a field's half range: a larger excess is no rounding, R2

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"guard: {name} must be positive, got {value}")
        if self.tick > 0.01:
            raise ValueError(f"guard: it runs at 100 Hz or more, got {1 / self.tick:.0f}")


@dataclass(frozen=True, eq=False)
class Command:
    """What is sent at one tick."""

    stamp: float  # [s]
    position: np.ndarray  # [3], m, absolute
    gripper: Optional[float]  # None until the first chunk


@dataclass(frozen=True, eq=False)
class Executed:
    """What became of one step: the goal [m] and how far it moved [m]."""

    step: Step
    goal: np.ndarray
    delta: np.ndarray


class Guard:
    """Chunks and measured positions in, one command per tick out."""

    def __init__(self, robot: Robot, config: GuardConfig) -> None:
        if config.tick > robot.action_dt:
            raise ValueError(f"guard: a tick ({config.tick} s) must not exceed a step ({robot.action_dt} s)")
        self.robot, self.config = robot, config
        self.machine = StateMachine()
        self.counts: Counter = Counter(R0=0, R1=0, R2=0, R3=0)
        self.residual, self.lag = Running(), Running()
        self.buffer = ChunkBuffer()
        self.tracker = Tracker(robot.limits, config.tick)
        self.envelope = Envelope(robot.limits, config.tick)
        self.goal = self._from = np.zeros(3)  # where the current step ends and where it began
        self._step_start = -np.inf
        self.gripper: Optional[float] = None
        self.other_writers: Tuple[str, ...] = ()
        margin = BOX_MARGIN * stop_distance(robot.limits)
        self._low, self._high = robot.limits.workspace_low + margin, robot.limits.workspace_high - margin
        if not np.all(self._low < self._high):
            raise ValueError(f"guard: the workspace is smaller than twice the braking margin of {margin:.3f} m")
        self._measured: Deque[Tuple[float, np.ndarray]] = deque()
        self._sent: Deque[Tuple[float, np.ndarray]] = deque()  # (start of the step, how far the goal moved)
        self._bad: Deque[float] = deque(maxlen=3)  # when the last chunks that were not finite came
        self._covered = np.inf  # until when there is an action; inf before the first one
        self._held_since = 0.0

    @property
    def state(self) -> State:
        """Return the current state."""
        return self.machine.state

    # ---- inputs

    def on_state(self, stamp: float, position: np.ndarray) -> None:
        """Take a measured tool position [m]; one that is not finite or goes back in time is dropped."""
        if not np.all(np.isfinite(position)):
            self._count("R0", "state not finite")
        elif self._measured and stamp <= self._measured[-1][0]:
            self._count("R0", "state out of order")
        else:
            self._measured.append((stamp, np.array(position, float)))
            while self._measured[0][0] < stamp - HISTORY_S:
                self._measured.popleft()

    def on_chunk(self, chunk: Chunk, now: float) -> Optional[str]:
        """Take a chunk; return what was wrong with it, if anything."""
        if self.state not in (State.ARMED, State.HOLDING):
            return self._count("R0", "chunk while not armed")
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
            self._rebase(self.tracker.position)
        return None

    def on_writers(self, others: Sequence[str], now: float) -> None:
        """Take the names of the other writers on the command topic; any is a fault."""
        self.other_writers = tuple(others)
        if others:
            self.fault(f"a second writer on the command topic: {', '.join(others)}", now)

    def arm(self, now: float) -> None:
        """Begin to execute, with the measured position as the first goal.

        After a fault the stream of commands goes on, smoothly, from where it was held; from IDLE it begins at the
        measured position.

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
            position = self._gate(arrival)
        return Command(now, position, self.gripper), executed

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
        self.goal = self._leash(self._reference(step.chunk) + step.chunk.motion[step.index])
        self._from, self._step_start = before, step.start
        if step.first:
            self._log_residual(step)
        self._sent.append((step.start, self.goal - before))
        while self._sent[0][0] < time - HISTORY_S:
            self._sent.popleft()
        if step.chunk.gripper is not None:
            self.gripper = float(step.chunk.gripper[step.index])  # zero-order hold: never interpolated
        self._covered = step.end
        self.counts["steps"] += 1
        return Executed(step, self.goal, self.goal - before)

    def _reference(self, chunk: Chunk) -> np.ndarray:
        reference = self.robot.motion.reference
        if reference is None:
            return np.zeros(3)
        if reference == "commanded":
            return self.goal
        if reference == "measured":
            return self._measured[-1][1]
        return min(self._measured, key=lambda sample: abs(sample[0] - chunk.stamp))[1]

    def _leash(self, goal: np.ndarray) -> np.ndarray:
        """Keep the goal inside the workspace and near the measured position."""
        lag = goal - self._measured[-1][1]
        distance = float(np.linalg.norm(lag))
        if distance > self.robot.limits.max_lag:
            self.counts["leash_hits"] += 1
            goal = self._measured[-1][1] + lag * (self.robot.limits.max_lag / distance)
        inside = np.clip(goal, self._low, self._high)
        self.counts["workspace_clamps"] += bool(np.any(inside != goal))
        return inside

    def _interpolate(self, time: float) -> Tuple[np.ndarray, np.ndarray]:
        """Return where the goal is at `time`, on a straight line within a step, and its velocity [m/s]."""
        share = (time - self._step_start) / self.robot.action_dt
        if share > 1 + EARLY:
            return self.goal, np.zeros(3)
        return self._from + share * (self.goal - self._from), (self.goal - self._from) / self.robot.action_dt

    def _gate(self, time: float) -> np.ndarray:
        """Advance the tracker by one period and let its position out if it is inside the envelope."""
        last = self.tracker.position
        goal, velocity = self._interpolate(time)
        position = self.tracker.toward(goal, velocity) if self.state is State.ARMED else self.tracker.brake()
        broken = self.envelope.violations(position)
        if broken:
            self.counts["envelope_stops"] += 1
            self.fault(f"the path would leave the envelope: {', '.join(broken)}", time)
            self.tracker.restart(last)
            self.envelope.restart(last)
            return last
        self.envelope.sent(position)
        if self.state is State.ARMED:
            self.lag.add(float(np.linalg.norm(goal - position)))
        return position

    # ---- helpers

    def _arming_problems(self, now: float) -> List[str]:
        problems = []
        if self.other_writers:
            problems.append(f"a second writer on the command topic: {', '.join(self.other_writers)}")
        if self.tracker.moving:
            problems.append("still decelerating")
        if not self._measured:
            return [*problems, "no measured position yet"]
        stamp, position = self._measured[-1]
        if not -self.config.max_skew <= now - stamp <= self.config.state_timeout:
            problems.append(f"the measured position is {now - stamp:.3f} s old; compare the clocks of the two hosts")
        limits = self.robot.limits
        if np.any(position < limits.workspace_low) or np.any(position > limits.workspace_high):
            problems.append(f"the tool at {np.round(position, 3).tolist()} m is outside the workspace")
        return problems

    def _shape_problem(self, chunk: Chunk) -> Optional[str]:
        if chunk.motion.ndim != 2 or chunk.motion.shape[1] != 3 or not len(chunk.motion):
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
        motion, excess = _clip(chunk.motion, self.robot.motion.low, self.robot.motion.high)
        if chunk.gripper is None or self.robot.gripper is None:
            return Chunk(chunk.stamp, chunk.dt, motion, None), excess
        gripper, more = _clip(chunk.gripper, self.robot.gripper.low, self.robot.gripper.high)
        return Chunk(chunk.stamp, chunk.dt, motion, gripper), max(excess, more)

    def _rebase(self, position: np.ndarray) -> None:
        self.goal = self._from = np.clip(position, self._low, self._high)
        self._step_start, self._covered = -np.inf, np.inf

    def _log_residual(self, step: Step) -> None:
        """Compare what the chunk wanted for its expired steps with what was sent in their place."""
        if self.robot.motion.reference == "commanded":
            wanted = step.chunk.motion[: step.index].sum(axis=0)
            since = step.chunk.stamp - 0.5 * step.chunk.dt
            sent = sum((delta for start, delta in self._sent if start >= since), np.zeros(3))
            self.residual.add(float(np.linalg.norm(wanted - sent)))

    def _count(self, reaction: str, reason: str) -> str:
        self.counts[reaction] += 1
        self.counts[f"{reaction} {reason}"] += 1
        return reason

    def to_dict(self) -> Dict[str, float]:
        """Return every counter and statistic as plain values."""
        return {
            **self.counts,
            **self.buffer.counts,
            **self.residual.to_dict("residual_m"),
            **self.lag.to_dict("lag_m"),
        }


def _clip(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> Tuple[np.ndarray, float]:
    clipped = np.clip(values, low, high)
    return clipped, float(np.max(np.abs(values - clipped) / (0.5 * (high - low))))
