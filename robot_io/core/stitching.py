"""Where one chunk follows another: what is decided already, and what becomes of a prediction before it is sent.

A chunk is late by the time it took to make. Its steps that are past by then are dropped by their stamps, never by an
estimated index; the delay d (in steps) is estimated only to tell the policy how many of its first actions are decided.
There is no clock here, every time is an argument. Shape legend: n steps, m motion dims of a chunk, a action dims.
"""

import math
from bisect import bisect_right
from collections import Counter, deque
from itertools import pairwise, takewhile
from typing import Any, Deque, Dict, List, Optional, Sequence, Tuple

import numpy as np

from robot_io.core.chunk_buffer import EARLY, Chunk
from robot_io.core.diagnostics import Running
from robot_io.core.limits import Robot
from robot_io.core.space import Space, conjugate, logarithm, multiply, rotate

SYNCHRONOUS, COMPENSATED, ENSEMBLING, RTC = "synchronous", "latency_compensated", "ensembling", "rtc"
MODES = ("auto", SYNCHRONOUS, COMPENSATED, ENSEMBLING, RTC)
KEEP = 256  # executed steps, and measured latencies
CHUNKS = 8  # that are averaged at most
DECAY = 0.01  # of the weights exp(-DECAY i), i = 0 for the oldest (Zhao et al., arXiv 2304.13705)
FADE = 4  # steps over which a plan turns into a new prediction, of real-time chunking
ALIKE = 1e-9  # of a mean on SO(3): one step of the iteration moves it by less [rad]

Knot = Tuple[float, np.ndarray]


def delta_between(space: Space, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return the action's delta [tangent] that leads from `before` to `after`; inverts `Space.delta`."""
    if not space.rotation:
        return after - before
    n, q = space.linear, before[space.linear :]
    position, turned = after[:n] - before[:n], after[n:]
    turn = multiply(conjugate(q), turned) if space.tool_rotation else multiply(turned, conjugate(q))
    return np.concatenate([rotate(conjugate(q), position) if space.tool_position else position, logarithm(turn)])


def mean(space: Space, configurations: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Return the weighted mean: of numbers the average, of rotations the one on SO(3) (Karcher's, by iteration)."""
    w = np.asarray(weights, float) / np.sum(weights)
    found = configurations[-1]
    for _ in range(32):
        step = w @ np.array([space.difference(x, found) for x in configurations])
        found = space.retract(found, step)
        if not space.rotation or np.linalg.norm(step[space.linear :]) < ALIKE:
            break
    return found


def actions_of(robot: Robot, motion: np.ndarray, gripper: Optional[np.ndarray]) -> np.ndarray:
    """Return actions [n a] of a chunk's motion [n m] and gripper [n]; inverts `Robot.motion_of`."""
    actions = np.zeros((len(motion), robot.action_dim))
    n = robot.motion.size
    actions[:, robot.action_slice(robot.motion)] = motion[:, :n]
    if robot.rotation is not None:
        turns = motion[:, n:]
        if robot.rotation.mode == "absolute" and robot.rotation.kind == "ee_rotation_6d":
            turns = np.array([[*rotate(q, np.eye(3)[0]), *rotate(q, np.eye(3)[1])] for q in turns])
        elif robot.rotation.mode == "absolute":
            turns = np.array([logarithm(q) for q in turns])
        actions[:, robot.action_slice(robot.rotation)] = turns
    if robot.gripper is not None:
        assert gripper is not None
        actions[:, robot.action_slice(robot.gripper)] = gripper[:, None]
    return actions


class Plan:
    """What the robot was told and will be told unless a newer chunk comes: absolute targets by time.

    The past is what the guard said it sent; the future is the rest of the last published chunk, put on top of that.
    """

    def __init__(self, robot: Robot) -> None:
        if robot.motion.reference not in (None, "commanded"):
            raise ValueError(
                f"{robot.motion.name} adds to {robot.motion.reference}; a plan needs absolute actions or deltas that "
                "add to the last command: use mode latency_compensated or synchronous"
            )
        self.robot, self.space, self.dt = robot, robot.space, robot.action_dt
        self.scale = 1.0  # of the guard's deltas, its slow mode
        self.clear()

    def clear(self) -> None:
        """Forget everything: the robot was stopped or somebody else moved it."""
        self._sent: Deque[Tuple[float, np.ndarray, np.ndarray, Optional[float]]] = deque(maxlen=KEEP)
        self._chunk: Optional[Chunk] = None
        self._from = -math.inf

    def on_executed(self, start: float, target: np.ndarray, delta: np.ndarray, gripper: Optional[float]) -> None:
        """Take what was sent for the step that began at `start` [s]: its target, and the tangent that led there."""
        if not self._sent or start > self._sent[-1][0]:
            before = self.space.retract(target, -delta)
            self._sent.append((start, before, target, gripper))

    def on_published(self, chunk: Chunk, now: float) -> None:
        """Take the chunk that was sent to the guard at `now` [s]."""
        self._chunk, self._from = chunk, now - self.dt

    def rests(self, since: float, now: float) -> bool:
        """Return whether nothing was sent or is planned for any time between `since` and `now` [s]."""
        slack, chunk = EARLY * self.dt, self._chunk
        if self._sent and self._sent[-1][0] + self.dt > since + slack:
            return False
        return chunk is None or chunk.stamp >= now - slack or chunk.stamp + len(chunk.motion) * self.dt <= since + slack

    def _steps(self, since: float, until: float) -> List[Tuple[float, np.ndarray, np.ndarray, Optional[float]]]:
        """Return (start, configuration before, target, gripper) of every known step between two times."""
        if not self._sent:
            return []
        steps = [*takewhile(lambda s: s[0] + self.dt > since, reversed(self._sent))][::-1] or [self._sent[-1]]
        chunk, (last, _, goal, _) = self._chunk, self._sent[-1]
        for i in range(len(chunk.motion) if chunk is not None else 0):
            assert chunk is not None
            start = chunk.stamp + i * self.dt
            if start < last + 0.5 * self.dt or start < self._from + EARLY * self.dt:
                continue  # executed, or past when the chunk arrived
            if start >= until:
                break
            row = chunk.motion[i]
            target = self.space.delta(goal, self.scale * row) if self.robot.motion.mode == "delta" else row
            steps.append((start, goal, target, None if chunk.gripper is None else float(chunk.gripper[i])))
            goal = target
        return steps

    def actions(self, begin: float, n: int) -> np.ndarray:
        """Return the decided ones [k a] of the n actions from `begin` [s] on, in the robot's own representation.

        k < n where the plan ends. Steps whose grid is shifted against the plan's are read off it by interpolation;
        the gripper is held, not interpolated. Before its first step the robot stood where that step began.
        """
        steps = self._steps(begin, begin + n * self.dt)
        if not steps or (self.robot.gripper is not None and steps[0][3] is None):
            return np.zeros((0, self.robot.action_dim))
        knots, slack = self._knots(steps), EARLY * self.dt
        k = min(n, math.floor((knots[-1][0] - begin) / self.dt + EARLY))
        if k < 1:
            return np.zeros((0, self.robot.action_dim))
        points = self._read(knots, [begin + i * self.dt for i in range(k + 1)])
        gripper = None
        if self.robot.gripper is not None:
            known = [(start, value) for start, _, _, value in steps if value is not None]
            after = [bisect_right(known, begin + i * self.dt + slack, key=lambda s: s[0]) for i in range(k)]
            gripper = np.array([known[max(0, i - 1)][1] for i in after])
        if self.robot.motion.mode == "delta":
            motion = np.array([delta_between(self.space, a, b) for a, b in pairwise(points)])
        else:
            motion = np.array(points[1:])
        return actions_of(self.robot, motion, gripper)

    def at(self, time: float) -> Optional[np.ndarray]:
        """Return the configuration that is commanded for a time [s], or None if that is not decided."""
        steps = self._steps(time, time + self.dt)
        if not steps:
            return None
        knots = self._knots(steps)
        return self._read(knots, [time])[0] if time <= knots[-1][0] + EARLY * self.dt else None

    def _knots(self, steps: Sequence[Tuple[float, np.ndarray, np.ndarray, Optional[float]]]) -> List[Knot]:
        knots: List[Knot] = []
        for start, before, target, _ in steps:
            while knots and knots[-1][0] >= start - EARLY * self.dt:
                knots.pop()  # a shifted grid: the guard goes on to the next target before the last one is reached
            knots += [(start, before), (start + self.dt, target)]
        return knots

    def _read(self, knots: Sequence[Knot], times: Sequence[float]) -> List[np.ndarray]:
        found, i = [], 0
        for time in times:
            while i < len(knots) - 2 and knots[i + 1][0] < time:
                i += 1
            (t0, x0), (t1, x1) = knots[i], knots[i + 1]
            share = min(1.0, max(0.0, (time - t0) / (t1 - t0)))
            near = round(share)  # on the grid the targets themselves, not what interpolation makes of them
            found.append((x0, x1)[near] if abs(share - near) < EARLY else self.space.interpolate(x0, x1, share))
        return found


class Stitcher:
    """One of the modes, for one robot and policy. Not for several threads at once."""

    def __init__(
        self,
        robot: Robot,
        mode: str,
        *,
        chunk_size: Optional[int] = None,
        n_action_steps: Optional[int] = None,
        interval: float = 0.0,
        past_slots: int = 0,
        max_committed: int = 0,
        trained: bool = False,
        fade: int = FADE,
    ) -> None:
        """Build one.

        Args:
            mode: one of MODES; auto: rtc for a policy that was trained with a committed prefix, else
                latency_compensated.
            chunk_size: of the policy; None: not known, and not checked.
            n_action_steps: executed before the next prediction, fewer where the delay leaves no more of a chunk; None:
                as few as the delay and `interval` let it.
            interval: least time between two predictions' observations [s].
            past_slots: actions before the chunk that a committed prefix begins with.
            max_committed: rows of a prefix, past ones included.
            trained: whether the policy was trained with such prefixes.
            fade: steps over which rtc leads from what was planned into a prediction; 0: it goes out as it is.

        Raises:
            ValueError: no such mode, or one that these actions or this policy do not allow.
        """
        if mode not in MODES:
            raise ValueError(f"no mode {mode!r}; there are {', '.join(MODES)}")
        fits = robot.motion.reference in (None, "commanded")
        if mode == "auto":
            mode = RTC if trained and fits else COMPENSATED
        if n_action_steps is not None and not 1 <= n_action_steps <= (chunk_size or n_action_steps):
            raise ValueError(f"n_action_steps {n_action_steps} must be in 1..{chunk_size}, the chunk's size")
        if mode == RTC and max_committed <= past_slots:
            raise ValueError(f"mode rtc: the policy takes {max_committed} committed rows, {past_slots} of them past")
        self.robot, self.mode, self.trained, self._fade = robot, mode, trained, fade
        self.plan = Plan(robot) if mode in (ENSEMBLING, RTC) or fits else None
        self._size, self._past, self._most = chunk_size, past_slots, max_committed
        self._wanted = n_action_steps or math.ceil(interval / robot.action_dt - EARLY)
        self._latencies: Deque[float] = deque(maxlen=KEEP)
        self._delay = 0
        self._older: Deque[Tuple[float, np.ndarray]] = deque(maxlen=CHUNKS - 1)  # (stamp, targets [n m])
        self._given = 0  # of the last prediction's steps, how many were decided
        self.counts: Counter = Counter()
        self.jump = Running()  # |new - planned action| of the first step that is new, in the action's own units

    def clear(self) -> None:
        """Forget what was sent and predicted; latencies stay."""
        self._older.clear()
        if self.plan is not None:
            self.plan.clear()

    def on_executed(self, start: float, target: np.ndarray, delta: np.ndarray, gripper: Optional[float]) -> None:
        """Take what was sent for a step, as `Plan.on_executed`."""
        if self.plan is not None:
            self.plan.on_executed(start, target, delta, gripper)

    def set_speed(self, scale: float) -> None:
        """Take the guard's speed scale: deltas that are planned move by this share."""
        if self.plan is not None:
            self.plan.scale = scale

    # ---- delay and execution

    def on_latency(self, seconds: float) -> None:
        """Take a measured time from an observation's stamp to its published chunk [s]."""
        self._latencies.append(seconds)
        self._delay = math.ceil(float(np.percentile(self._latencies, 99)) / self.robot.action_dt - EARLY)

    @property
    def delay(self) -> int:
        """Return d, steps from an observation to its chunk: the measured 99th percentile, rounded up; 0 at first."""
        return self._delay

    @property
    def execution(self) -> int:
        """Return s, steps from one prediction's observation to the next one's."""
        return max(1, self.delay, self._until_next)

    @property
    def _until_next(self) -> int:
        left = self._wanted if self._size is None else self._size - self.delay
        bridged = self.delay <= left  # else asking more often would only take time from who is late already
        return min(self._wanted, left) if bridged and self.mode != SYNCHRONOUS else self._wanted

    def problem(self) -> str:
        """Say why chunks cannot follow each other without a gap, or that a prefix is cut; else ""."""
        d, s = self.delay, self.execution
        if self._size and self.mode != SYNCHRONOUS and not d <= s <= self._size - d:
            return (
                f"a chunk of {self._size} steps cannot bridge a delay of {d} and {s} steps of execution: fewer "
                "num_inference_steps, a smaller n_action_steps or a larger chunk_size"
            )
        if self.mode == RTC and self._past + d > self._most:
            return f"a delay of {d} steps is more than the {self._most - self._past} that the policy takes as committed"
        return ""

    # ---- around a prediction

    def committed(self, stamp: float) -> Optional[np.ndarray]:
        """Return the decided actions [k a] to give to the policy with the observation of `stamp` [s], or None."""
        if self.mode != RTC or self.plan is None:
            return None
        rows = min(self._most, self._past + self.delay)
        begin = stamp - self._past * self.robot.action_dt
        found = self.plan.actions(begin, rows) if rows else np.zeros((0, 0))
        self._given = max(0, len(found) - self._past)
        self.counts["committed"] += self._given > 0
        return found.astype(np.float32) if len(found) else None

    def stitch(self, values: np.ndarray, stamp: float, now: float) -> Tuple[np.ndarray, float]:
        """Return the actions [n a] and the stamp to publish at `now` [s] for a prediction.

        Where nothing moved since the observation, as after arming, steps of rest come before the prediction: its own
        first ones would else be past, and the arm would start in the middle of a motion.
        """
        values = np.asarray(values, float)
        if self.mode == SYNCHRONOUS:
            return values[: self._wanted or len(values)], now
        late = self._late(stamp, now)
        if self.plan is not None and self.plan.rests(stamp, now) and late < len(values):  # else it is too old
            values = self._after_rest(values, late)
        self._note_jump(values, stamp, now)
        if self.mode == ENSEMBLING:
            values = self._ensemble(values, stamp, now)
        if self.mode == RTC:
            values = self._fade_in(values, stamp, now)
        return values, stamp

    def published(self, chunk: Chunk, now: float) -> None:
        """Take the chunk that went out at `now` [s]."""
        if self.plan is not None:
            self.plan.on_published(chunk, now)

    def next_stamp(self, stamp: float, rows: int) -> float:
        """Return the earliest stamp of the next observation, after a chunk with `rows` that was stamped `stamp` [s]."""
        if self.mode == SYNCHRONOUS:
            return stamp + rows * self.robot.action_dt
        return stamp + self._until_next * self.robot.action_dt

    def _late(self, stamp: float, now: float) -> int:
        """Return the first step that has not begun by `now`."""
        return max(0, math.ceil((now - stamp) / self.robot.action_dt - EARLY))

    def _note_jump(self, values: np.ndarray, stamp: float, now: float) -> None:
        k = self._late(stamp, now)
        if self.plan is None or k >= len(values):
            return
        old = self.plan.actions(stamp, k + 1)
        if len(old) == k + 1:
            here = self.robot.action_slice(self.robot.motion)
            self.jump.add(float(np.linalg.norm(values[k, here] - old[k, here])))

    def _after_rest(self, values: np.ndarray, steps: int) -> np.ndarray:
        """Put steps of rest before a prediction; absolute targets go to the first one."""
        rest = np.repeat(values[:1], steps, axis=0)
        for field in (self.robot.motion, self.robot.rotation):
            if field is not None and field.mode == "delta":
                rest[:, self.robot.action_slice(field)] = 0.0
        return np.concatenate([rest, values])

    def _fade_in(self, values: np.ndarray, stamp: float, now: float) -> np.ndarray:
        """Lead from the plan into a prediction over its first free steps; past its end the plan goes on straight.

        A policy knows what is committed only as well as it has learned to: without this, each chunk would begin with
        its error as a jump. Deltas are blended as velocities are, without making up for the way that is lost; absolute
        targets end on the prediction. The gripper is never blended.
        """
        assert self.plan is not None
        robot, dt = self.robot, self.robot.action_dt
        first = max(self._given, self._late(stamp, now))
        old = self.plan.actions(stamp - dt, 1 + first + self._fade)  # from the step before the chunk on
        n = min(self._fade, len(values) - first)
        delta, scale = robot.motion.mode == "delta", self.plan.scale
        if len(old) < 1 + first + (not delta) or n < 1 or (delta and scale <= 0):
            return values  # nothing is known that it could lead on from
        motion, planned = np.array(robot.motion_of(values)), list(robot.motion_of(old))
        while len(planned) < 1 + first + n:
            step = None if delta else robot.space.difference(planned[-1], planned[-2])
            planned.append(planned[-1] if step is None else robot.space.retract(planned[-1], step))
        for k in range(n):
            new, before, share = motion[first + k], planned[1 + first + k], (k + 1) / (n + 1)
            if delta:
                motion[first + k] = share * new + (1 - share) * before / scale
            else:
                motion[first + k] = robot.space.interpolate(before, new, share * share * (3 - 2 * share))
        return actions_of(robot, motion, _gripper_of(robot, values))

    def _ensemble(self, values: np.ndarray, stamp: float, now: float) -> np.ndarray:
        """Average the targets that overlapping predictions have for a time; steps that are past stay as planned."""
        assert self.plan is not None
        robot, space, dt = self.robot, self.robot.space, self.robot.action_dt
        delta, motion = robot.motion.mode == "delta", robot.motion_of(values)
        start = self.plan.at(stamp)
        if delta and start is None:
            return values  # nothing was sent yet that it could add to
        targets = motion
        if delta:
            targets = np.array(_compose(space, start, motion))
        averaged, n = targets.copy(), len(targets)
        for i in range(n):
            found = [x for s, old in self._older for x in _target_at(space, old, (stamp + i * dt - s) / dt)]
            if found:
                weights = np.exp(-DECAY * np.arange(len(found) + 1))
                averaged[i] = mean(space, [*found, targets[i]], weights.tolist())
        self._older.append((stamp, targets))
        if not delta:
            return actions_of(robot, averaged, _gripper_of(robot, values))
        path = [start, *averaged]
        for i in range(1, min(n, self._late(stamp, now)) + 1):
            planned = self.plan.at(stamp + i * dt)
            path[i] = path[i] if planned is None else planned
        rows = np.array([delta_between(space, a, b) for a, b in pairwise(path)])
        return actions_of(robot, rows, _gripper_of(robot, values))

    def to_dict(self) -> Dict[str, Any]:
        """Return plain values for diagnostics."""
        kind = {True: "rtc (trained)", False: "rtc (training-free)"}[self.trained] if self.mode == RTC else self.mode
        steps = {
            "delay_steps": self.delay,
            "execution_steps": self.execution,
            "committed_chunks": self.counts["committed"],
        }
        return {"mode": kind, **steps, **self.jump.to_dict("boundary_jump")}


def _compose(space: Space, start: Any, deltas: np.ndarray) -> List[np.ndarray]:
    targets, x = [], start
    for row in deltas:
        x = space.delta(x, row)
        targets.append(x)
    return targets


def _target_at(space: Space, targets: np.ndarray, index: float) -> List[np.ndarray]:
    """Return a chunk's target at a broken index as a list, empty outside of the chunk."""
    low = math.floor(index + EARLY)
    share = index - low
    if abs(share) <= EARLY:
        return [targets[low]] if 0 <= low < len(targets) else []
    if not 0 <= low < len(targets) - 1:
        return []
    return [space.interpolate(targets[low], targets[low + 1], share)]


def _gripper_of(robot: Robot, values: np.ndarray) -> Optional[np.ndarray]:
    return None if robot.gripper is None else values[:, robot.action_slice(robot.gripper)][:, 0]
