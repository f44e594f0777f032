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

from robot_io.core.limits import Field
from robot_io.messages import ExecutedStep

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
        if not self._steps and len(samples) > 1:  # before the first frame only the newest samples can be of use
            self._bytes -= _size(samples.pop(0)[1])
        samples.append((stamp, value))
        self._bytes += _size(value)
        if self._bytes > self.config.max_bytes:
            self.end(f"E_LENGTH: pictures of more than {self.config.max_bytes / 2**20:.0f} MiB; record shorter episodes")

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
        action_of: Callable[[Sequence[ExecutedStep], ExecutedStep, np.ndarray], np.ndarray],
    ) -> Frames:
        """Put everything on the grid.

        Args:
            state_of: the state [s] from one sample of each source.
            action_of: the action [a] from the steps that began in a frame (none, one or two), the last step so far
                and the frame's state.

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
        states = [state_of({s: self._samples[s][nearest[s][0][k]][1] for s in self._others()}) for k in range(length)]
        state = np.array(states, np.float32).reshape(length, -1)
        action, human, report = self._actions(stamp, state, action_of)
        images = {c: np.stack([self._samples[c][i][1] for i in nearest[c][0][:length]]) for c in self._cameras}
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
                self.ended = f"E_GAP: {source} is {abs(off[length]):.3f} s away from frame {length}"
        if length == 0:
            raise RecordError(f"{self.ended}; not one whole frame")
        return length

    def _actions(
        self, stamp: np.ndarray, state: np.ndarray, action_of: Callable[..., np.ndarray]
    ) -> Tuple[np.ndarray, np.ndarray, Dict[str, Any]]:
        bins: List[List[ExecutedStep]] = [[] for _ in stamp]
        for step in self._steps:
            if self._bin(step.stamp) < len(bins):
                bins[self._bin(step.stamp)].append(step)
        rows, human, last = [], [], self._steps[0]
        for k, steps in enumerate(bins):
            last = steps[-1] if steps else last
            rows.append(action_of(steps, last, state[k]))
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
    index = np.where(np.abs(t[right] - wanted) < np.abs(wanted - t[left]), right, left)
    return index, t[index] - wanted


def source_of(session: str, number: int, human: np.ndarray) -> str:
    """Return an episode's id in its store; it says which frames were a human's: "live/<session>/3/human=0-120"."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], human, [False]]).astype(int)))
    runs = ",".join(f"{begin}-{end}" for begin, end in zip(edges[::2], edges[1::2], strict=True))
    return f"live/{session}/{number:04d}/human={runs}"


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

ROTATIONS = ("ee_rotation_6d", "ee_rotation_axis_angle")
MOTION = ("ee_position", "joint_position", *ROTATIONS)
GRIPPERS = ("gripper_position", "gripper_binary", "gripper_effort")


def check_recordable(action: Sequence[Field], state: Sequence[Field]) -> None:
    """Refuse an action that executed steps do not tell.

    Raises:
        ValueError: naming the field and why.
    """
    for field in action:
        if field.kind not in (*MOTION, *GRIPPERS):
            raise ValueError(f"action.{field.name}: a {field.kind} is no motion that the guard executes")
        if field.reference == "chunk_start":
            raise ValueError(f"action.{field.name}: a delta from the chunk's start cannot be stored per frame")
        if field.reference == "measured" or (field.mode == "delta" and field.frame == "tool"):
            _part(state, np.zeros(sum(f.size for f in state)), field)


def action_of(
    action: Sequence[Field],
    state: Sequence[Field],
    steps: Sequence[ExecutedStep],
    last: ExecutedStep,
    observed: np.ndarray,
) -> np.ndarray:
    """Return the action [a] that a frame's executed steps were, SI.

    An absolute field is the last target. A delta from what was commanded is what the steps added, composed; where none
    began, nothing. A delta from what was measured is the way from the frame's state to the last target.

    Args:
        action: the embodiment's fields, as `check_recordable` accepts them.
        state: the fields of `observed` [s].
        steps: that began in the frame.
        last: the last step so far.

    Raises:
        RecordError: E_GRIPPER: the guard has not sent the gripper anything yet.
    """
    parts = []
    for field in action:
        if field.kind in GRIPPERS:
            if last.gripper is None:
                raise RecordError(f"E_GRIPPER: the guard has sent nothing for {field.name} yet")
            parts.append(np.array([last.gripper]))
        elif field.kind in ROTATIONS:
            parts.append(_rotation(field, state, steps, last, observed))
        else:
            parts.append(_translation(field, state, steps, last, observed))
    return np.concatenate(parts)


def _translation(field: Field, state: Sequence[Field], steps: Any, last: ExecutedStep, observed: Any) -> np.ndarray:
    target = last.target if field.kind == "joint_position" else last.target[:3]
    if field.mode == "absolute":
        return target
    if field.reference == "commanded":
        moved = sum((step.delta[: field.size] for step in steps), np.zeros(field.size))
    else:
        moved = target - _part(state, observed, field)
    return _orientation(field, state, steps, last, observed).T @ moved if field.frame == "tool" else moved


def _rotation(field: Field, state: Sequence[Field], steps: Any, last: ExecutedStep, observed: Any) -> np.ndarray:
    target = _matrix(last.target[3:])
    if field.mode == "absolute":
        return target[:, :2].T.reshape(-1) if field.size == 6 else rotation_log(target)
    before = _orientation(field, state, steps, last, observed)
    return rotation_log(before.T @ target if field.frame == "tool" else target @ before.T)


def _orientation(field: Field, state: Sequence[Field], steps: Any, last: ExecutedStep, observed: Any) -> np.ndarray:
    """Return the orientation that a delta adds to."""
    if field.reference == "measured" or len(last.target) != 7:
        there = next(f for f in state if f.kind in ROTATIONS)
        return _rotation_matrix(_slice(state, observed, there))
    before = _matrix(last.target[3:])
    for step in reversed(steps):
        before = rotation_exp(step.delta[3:]).T @ before
    return before


def _part(state: Sequence[Field], observed: np.ndarray, field: Field) -> np.ndarray:
    """Return the measured value that a delta refers to."""
    kinds = ROTATIONS if field.kind in ROTATIONS or field.frame == "tool" else (field.kind,)
    found = [f for f in state if f.kind in kinds]
    if not found:
        raise ValueError(f"action.{field.name} is a delta from a measured {' or '.join(kinds)}, which the state lacks")
    return _slice(state, observed, found[0])


def _slice(state: Sequence[Field], observed: np.ndarray, field: Field) -> np.ndarray:
    start = sum(f.size for f in state[: list(state).index(field)])
    return np.asarray(observed[start : start + field.size], float)


def _rotation_matrix(values: np.ndarray) -> np.ndarray:
    """Return the matrix of a 6-D rotation (its first two columns, Zhou et al. 2019) or of a rotation vector."""
    if len(values) == 3:
        return rotation_exp(values)
    x = values[:3] / np.linalg.norm(values[:3])
    y = values[3:] - (values[3:] @ x) * x
    y /= np.linalg.norm(y)
    return np.column_stack([x, y, np.cross(x, y)])
