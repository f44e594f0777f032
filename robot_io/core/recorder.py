"""Topics -> episodes: what was seen at each step and what the guard really sent in it.

Frames lie on the grid of the control rate, from the first step that was executed on. Each frame takes from every source
the sample with the nearest stamp; where none is near enough the episode ends, with a code. Its action is what the guard
executed in that step: nothing is interpolated, and a demonstration's clean intention is not recorded in its place.
No clock here: every time is an argument. Shape legend: m frames, h w image size, s state dims, a action dims.
"""

import math
import re
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from robot_io.core.limits import Robot
from robot_io.core.space import Space, conjugate, logarithm, rotate
from robot_io.messages import ExecutedStep

TIE = 1e-6  # [s]: stamps of today as float64 are good to 0.2 us
TAG = re.compile(r"[A-Za-z0-9_=.-]{1,64}(/[A-Za-z0-9_=.-]{1,64}){0,3}")
HUMAN = re.compile(r"/human=((?:\d+-\d+(?:,\d+-\d+)*)?)$")


@dataclass(frozen=True)
class RecorderConfig:
    """How near is near enough; times in seconds."""

    dt: float  # of the grid: 1 / control_hz
    image_gap: float  # between a frame and its picture
    state_gap: float  # between a frame and its state
    action_gap: float  # without an executed step; shorter ones are frames in which nothing new was sent
    max_seconds: float  # of an episode
    max_bytes: int  # of an episode's pictures in memory

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"recorder: {name} must be positive, got {value}")


@dataclass(frozen=True, eq=False)
class Frames:
    """An episode on its grid, before it is named."""

    images: Mapping[str, np.ndarray]  # uint8 [m h w 3] by camera
    state: np.ndarray  # float32 [m s]
    action: np.ndarray  # float32 [m a]
    stamp: np.ndarray  # float64 [m], s
    human: np.ndarray  # bool [m]: a human's step
    report: Mapping[str, Any]  # how well the sources fit the grid


class RecordError(ValueError):
    """Nothing to store: the text begins with a code."""


class Take:
    """One recording in the making."""

    def __init__(self, cameras: Sequence[str], sources: Sequence[str], config: RecorderConfig) -> None:
        """Begin.

        Args:
            cameras: each needs a picture for every frame.
            sources: of the state, each needs a sample for every frame.
        """
        self.config = config
        self.ended = ""  # code and reason, once it can go on no further
        self._cameras = tuple(cameras)
        self._samples: Dict[str, List[Tuple[float, Any]]] = {s: [] for s in (*cameras, *sources)}
        self._steps: List[ExecutedStep] = []
        self._bytes = 0

    @property
    def frames(self) -> int:
        """Return how many frames there are so far."""
        return self._bin(self._steps[-1].stamp) + 1 if self._steps else 0

    def _bin(self, stamp: float) -> int:
        return round((stamp - self._steps[0].stamp) / self.config.dt)

    def offer(self, source: str, stamp: float, value: Any) -> None:
        """Take a picture (by camera) or a part of the state (by source); one whose stamp goes back ends the episode."""
        samples = self._samples[source]
        if self.ended or (samples and stamp == samples[-1][0]):
            return
        if samples and stamp < samples[-1][0]:
            self.end(f"E_STAMP: {source} went back from {samples[-1][0]:.3f} to {stamp:.3f} s")
            return
        while not self._steps and len(samples) > 1 and stamp - samples[1][0] > self.config.action_gap:
            self._bytes -= _size(samples.pop(0)[1])  # too long before the first frame to be of use
        samples.append((stamp, value))
        self._bytes += _size(value)
        if self._bytes > self.config.max_bytes:
            self.end(
                f"E_LENGTH: pictures of more than {self.config.max_bytes / 2**20:.0f} MiB; record shorter episodes"
            )

    def step(self, step: ExecutedStep) -> None:
        """Take an executed step."""
        if self.ended:
            return
        if not (np.all(np.isfinite(step.target)) and np.all(np.isfinite(step.delta)) and math.isfinite(step.stamp)):
            self.end("E_VALUE: an executed step that is not finite")
        elif self._steps and step.stamp <= self._steps[-1].stamp:
            self.end(f"E_STAMP: executed steps went back from {self._steps[-1].stamp:.3f} to {step.stamp:.3f} s")
        elif self._steps and step.stamp - self._steps[-1].stamp > self.config.action_gap:
            self.end(f"E_GAP: no step was executed for {step.stamp - self._steps[-1].stamp:.2f} s")
        elif self._steps and step.stamp - self._steps[0].stamp > self.config.max_seconds:
            self.end(f"E_LENGTH: longer than {self.config.max_seconds:g} s")
        else:
            self._steps.append(step)

    def watch(self, now: float) -> None:
        """End the episode when something that it needs has stopped coming."""
        if not self._steps or self.ended:
            return
        if now - self._steps[-1].stamp > self.config.action_gap + self.config.dt:
            self.end(f"E_GAP: no step was executed for {now - self._steps[-1].stamp:.2f} s")
            return
        for source, samples in self._samples.items():
            silent = now - (samples[-1][0] if samples else self._steps[0].stamp)
            if silent > self._gap(source) + self.config.action_gap:
                self.end(f"E_GAP: {source} sent nothing for {silent:.2f} s")
                return

    def end(self, reason: str) -> None:
        """Take nothing more; the first reason stays."""
        self.ended = self.ended or reason

    def finish(
        self,
        state_of: Callable[[Mapping[str, Any]], np.ndarray],
        action_of: Callable[[Sequence[ExecutedStep], ExecutedStep, Mapping[str, Any]], np.ndarray],
    ) -> Frames:
        """Put everything on the grid.

        Args:
            state_of: the state [s] from one sample of each source.
            action_of: the action [a] from the steps that began in a frame (none, one or two), the last step so far
                and one sample of each source.

        Raises:
            RecordError: E_EMPTY: nothing was executed; E_GAP: there is not one whole frame.
            ValueError: what `state_of` and `action_of` raise.
        """
        if not self._steps:
            raise RecordError("E_EMPTY: the guard executed nothing while this was recorded; is it armed?")
        missing = [source for source, samples in self._samples.items() if not samples]
        if missing:
            raise RecordError(f"E_GAP: nothing came from {', '.join(missing)}")
        stamp = self._steps[0].stamp + np.arange(self.frames) * self.config.dt
        nearest = {source: _nearest([t for t, _ in s], stamp) for source, s in self._samples.items()}
        length = self._whole_frames(stamp, nearest)
        stamp = stamp[:length]
        seen = [{s: self._samples[s][nearest[s][0][k]][1] for s in self._others()} for k in range(length)]
        state = np.array([state_of(values) for values in seen], np.float32).reshape(length, -1)
        action, human, report = self._actions(stamp, seen, action_of)
        images = {c: np.stack([self._samples[c][i][1] for i in nearest[c][0][:length]]) for c in self._cameras}
        report["last frames without a picture or state"] = self.frames - length
        for source, (_, off) in nearest.items():
            report[f"{source} off by at most [s]"] = float(np.max(np.abs(off[:length])))
        return Frames(images, state, action, stamp, human, report)

    def _gap(self, source: str) -> float:
        return self.config.image_gap if source in self._cameras else self.config.state_gap

    def _others(self) -> List[str]:
        return [s for s in self._samples if s not in self._cameras]

    def _whole_frames(self, stamp: np.ndarray, nearest: Mapping[str, Tuple[np.ndarray, np.ndarray]]) -> int:
        """Return how many frames come before the first one that lacks something; say what it lacks."""
        length = len(stamp)
        for source, (_, off) in nearest.items():
            far = np.abs(off[:length]) > self._gap(source)
            if far.any():
                length = int(np.argmax(far))
                late = stamp[length] > self._samples[source][-1][0]  # its next sample was still on its way
                if not late or (len(stamp) - length) * self.config.dt > self.config.action_gap or length == 0:
                    self.end(f"E_GAP: {source} is {abs(off[length]):.3f} s away from frame {length}")
        if length == 0:
            raise RecordError(f"{self.ended}; not one whole frame")
        return length

    def _actions(
        self, stamp: np.ndarray, seen: Sequence[Mapping[str, Any]], action_of: Callable[..., np.ndarray]
    ) -> Tuple[np.ndarray, np.ndarray, Dict[str, Any]]:
        bins: List[List[ExecutedStep]] = [[] for _ in stamp]
        for step in self._steps:
            if self._bin(step.stamp) < len(bins):
                bins[self._bin(step.stamp)].append(step)
        rows, human, last = [], [], self._steps[0]
        for k, steps in enumerate(bins):
            last = steps[-1] if steps else last
            rows.append(action_of(steps, last, seen[k]))
            human.append(last.source == "teleop")
        report = {
            "frames": len(bins),
            "frames in which nothing new was sent": sum(not steps for steps in bins),
            "frames with two steps": sum(len(steps) > 1 for steps in bins),
        }
        return np.array(rows, np.float32).reshape(len(bins), -1), np.array(human, bool), report


def _size(value: Any) -> int:
    return value.nbytes if isinstance(value, np.ndarray) else 0


def _nearest(times: Sequence[float], wanted: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Return for every wanted time the index of the nearest one, the earlier of two, and how far off it is [s]."""
    t = np.array(times)
    right = np.clip(np.searchsorted(t, wanted), 1, max(len(t) - 1, 1))
    left = right - 1
    right = np.minimum(right, len(t) - 1)
    index = np.where(np.abs(t[right] - wanted) < np.abs(wanted - t[left]) - TIE, right, left)
    return index, t[index] - wanted


def source_of(session: str, number: int, human: np.ndarray, tag: str = "") -> str:
    """Return an episode's id in its store; it says which frames were a human's: "live/<session>/0003/human=0-120".

    Args:
        tag: of the start, e.g. "reach-v3/seed=3"; stands before the frames.
    """
    edges = np.flatnonzero(np.diff(np.concatenate([[False], human, [False]]).astype(int)))
    runs = ",".join(f"{begin}-{end}" for begin, end in zip(edges[::2], edges[1::2], strict=True))
    return "/".join(["live", session, f"{number:04d}", *([tag] if tag else []), f"human={runs}"])


def human_steps(source: str, length: int) -> Optional[np.ndarray]:
    """Return which of an episode's `length` frames were a human's, from its source; None if it does not say."""
    found = HUMAN.search(source)
    if found is None:
        return None
    steps = np.zeros(length, bool)
    for run in filter(None, found.group(1).split(",")):
        begin, end = run.split("-")
        steps[int(begin) : int(end)] = True
    return steps


# ---- the action of a frame, in the embodiment's own representation


def check_recordable(robot: Robot) -> None:
    """Refuse an action that executed steps do not tell.

    Raises:
        ValueError: naming the field and why.
    """
    for field in robot.action:
        if field.reference == "chunk_start":
            raise ValueError(f"action.{field.name}: a delta from the chunk's start cannot be stored per frame")


def action_of(
    robot: Robot, steps: Sequence[ExecutedStep], last: ExecutedStep, measured: Optional[np.ndarray]
) -> np.ndarray:
    """Return the action [a] that a frame's executed steps were, SI.

    An absolute field is the last target. A delta from what was commanded is what the steps added, composed; where none
    began, nothing. A delta from what was measured is the way from there to the last target.

    Args:
        robot: as `check_recordable` accepts it.
        steps: that began in the frame.
        last: the last step so far.
        measured: configuration of the frame; needed by deltas from what was measured.

    Raises:
        RecordError: E_GRIPPER: the guard has not sent the gripper anything yet.
    """
    space, goal = robot.space, last.target
    if robot.motion.mode == "absolute":
        motion, turn = goal[: space.linear], goal[space.linear :]
        if robot.rotation is not None:
            turn = columns_of(turn) if robot.rotation.kind == "ee_rotation_6d" else logarithm(turn)
    else:
        before = goal
        if robot.motion.reference == "measured":
            assert measured is not None
            before = measured
        else:
            for step in reversed(steps):
                before = space.retract(before, -step.delta)
        delta = delta_between(space, before, goal)
        motion, turn = delta[: space.linear], delta[space.linear :]
    action = np.zeros(robot.action_dim)
    action[robot.action_slice(robot.motion)] = motion
    if robot.rotation is not None:
        action[robot.action_slice(robot.rotation)] = turn
    if robot.gripper is not None:
        if last.gripper is None:
            raise RecordError(f"E_GRIPPER: the guard has sent nothing for {robot.gripper.name} yet")
        action[robot.action_slice(robot.gripper)] = last.gripper
    return action


def delta_between(space: Space, before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Return the action's delta that leads from one configuration to another; inverts `Space.delta`."""
    delta = space.difference(after, before)
    if space.rotation:
        back = conjugate(before[space.linear :])
        if space.tool_position:
            delta[: space.linear] = rotate(back, delta[: space.linear])
        if space.tool_rotation:
            delta[space.linear :] = rotate(back, delta[space.linear :])
    return delta


def columns_of(wxyz: np.ndarray) -> np.ndarray:
    """Return the 6-D form of a rotation: the first two columns of its matrix (Zhou et al., CVPR 2019)."""
    return np.concatenate([rotate(wxyz, np.array([1.0, 0, 0])), rotate(wxyz, np.array([0, 1.0, 0]))])
