"""The interface of every simulated suite: a gymnasium environment in SI units that renders only when asked."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces
from jaxtyping import Float32, Float64, UInt8

from dita.types import EmbodimentSpec, FieldSpec, RawObservation

RENDER_SIZE = 256  # [px]


@dataclass(frozen=True, eq=False)
class SimState:
    """A simulator's complete state in the middle of an episode; `RobotEnv.set_state` continues from it bit-equal."""

    task: str
    seed: int
    steps: int
    success: bool
    physics: Float64[np.ndarray, "n"]
    full_observation: Float64[np.ndarray, "o"]  # what the expert sees
    attributes: dict[str, Any]  # the suite's own Python state


class RobotEnv(gymnasium.Env[dict[str, Any], Float32[np.ndarray, "a"]]):
    """One robot in one task of a suite.

    Actions are the embodiment's action fields in SI; values beyond the limits are clipped to them, as the suite does.
    `reset` and `step` return only the state, because rendering costs far more than physics: `observe` renders. Wrap in
    `WithImages` for observations that carry the pictures. An episode is a success once any step was one; `terminated`
    says so, `truncated` says that max_steps is reached, and stepping on is allowed after either.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}  # pyright: ignore
    render_mode = "rgb_array"

    suite: str  # key of dita.envs.SUITES
    embodiment: EmbodimentSpec
    tasks: tuple[str, ...]  # all that the suite has
    task: str
    instruction: str
    max_steps: int
    steps: int = 0
    success: bool = False
    start_hash: str = ""  # SHA-256 of the simulator's state after reset

    def __init__(self, suite: str, embodiment: EmbodimentSpec, tasks: tuple[str, ...], max_steps: int) -> None:
        self.suite, self.embodiment, self.tasks, self.max_steps = suite, embodiment, tasks, max_steps
        self.observation_space = spaces.Dict({"state": _box(embodiment.state)})
        self.action_space = _box(embodiment.action)
        self.scale = np.repeat([f.scale for f in embodiment.action], [f.size for f in embodiment.action])

    @property
    def stamp(self) -> float:
        """Simulated seconds since the start of the episode."""
        return self.steps / self.embodiment.control_hz

    @property
    @abc.abstractmethod
    def commanded_position(self) -> Float64[np.ndarray, "3"]:
        """Last commanded tool position [m, base frame]: what a delta with reference `commanded` adds to."""

    @property
    @abc.abstractmethod
    def state(self) -> Float32[np.ndarray, "s"]:
        """The embodiment's state fields of this instant, SI."""

    @abc.abstractmethod
    def picture(self, camera: str, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
        """Render a camera of the suite, RGB, right side up; physics does not notice."""

    @abc.abstractmethod
    def expert_action(self) -> Float32[np.ndarray, "a"]:
        """Return the scripted expert's action for this instant, SI, within the limits.

        Raises:
            ValueError: the task has no expert.
        """

    @abc.abstractmethod
    def warnings(self) -> dict[str, int]:
        """Return the simulator's warnings of this episode with their counts (MuJoCo's `mjData.warning`)."""

    @abc.abstractmethod
    def get_state(self) -> SimState:
        """Save the complete state."""

    @abc.abstractmethod
    def set_state(self, state: SimState) -> None:
        """Restore a saved state, of this or of another instance; what follows is bit-equal."""

    def observe(self) -> RawObservation:
        """Render the embodiment's cameras and return them with the state of this instant."""
        images = {c.name: self.picture(c.name, c.height, c.width) for c in self.embodiment.cameras}
        return RawObservation(images, self.state, self.instruction, self.stamp)

    def render(self) -> UInt8[np.ndarray, "h w 3"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return the first camera's view at a size for people."""
        return self.picture(self.embodiment.cameras[0].name, RENDER_SIZE, RENDER_SIZE)

    def source_action(self, action: Float32[np.ndarray, "a"]) -> Float64[np.ndarray, "a"]:
        """Check an SI action, clip it to the limits and convert it to the source's own units.

        Raises:
            ValueError: wrong shape, or a value that is not finite.
        """
        if np.shape(action) != self.action_space.shape or not np.all(np.isfinite(action)):
            names = ", ".join(f"{f.name}[{f.size}]" for f in self.embodiment.action)
            raise ValueError(f"an action must be finite values of {names}; got {np.asarray(action).tolist()}")
        assert isinstance(self.action_space, spaces.Box)
        return np.clip(np.asarray(action, np.float64), self.action_space.low, self.action_space.high) / self.scale


class WithImages(gymnasium.ObservationWrapper):
    """A RobotEnv whose observations carry the pictures too, for libraries that know only gymnasium."""

    def __init__(self, env: RobotEnv) -> None:
        super().__init__(env)
        images: dict[str, spaces.Space] = {
            c.name: spaces.Box(0, 255, (c.height, c.width, 3), np.uint8) for c in env.embodiment.cameras
        }
        self.observation_space = spaces.Dict({"images": spaces.Dict(images), "state": _box(env.embodiment.state)})

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        """Render, at every step."""
        env = self.unwrapped
        assert isinstance(env, RobotEnv)
        return {"images": dict(env.observe().images), "state": observation["state"]}


def _box(fields: tuple[FieldSpec, ...]) -> spaces.Box:
    low, high = np.concatenate([f.low for f in fields]), np.concatenate([f.high for f in fields])
    return spaces.Box(low.astype(np.float32), high.astype(np.float32))
