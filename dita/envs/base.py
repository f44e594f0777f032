# mujoco ships no types for its compiled part
# pyright: reportAttributeAccessIssue=false
"""The interface of every simulated suite: a gymnasium environment in SI units that renders only when asked.

What every suite does alike stands here once: starts by seed, pictures, MuJoCo's warnings, save and restore.
"""

from __future__ import annotations

import abc
import contextlib
import copy
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import gymnasium
import numpy as np
from gymnasium import spaces
from jaxtyping import Float32, Float64, UInt8

from dita.envs import expect_known
from dita.types import EmbodimentSpec, FieldSpec, RawObservation

RENDER_SIZE = 256  # [px]


@dataclass(frozen=True, eq=False)
class SimState:
    """A simulator's complete state in the middle of an episode; `RobotEnv.set_state` continues from it bit-equal."""

    task: str
    seed: int
    steps: int
    success: bool
    physics: Float64[np.ndarray, "n"]  # MuJoCo's integration state: with warm start, controls and mocap bodies
    attributes: dict[str, Any]  # the suite's own Python state


class RobotEnv(gymnasium.Env[dict[str, Any], Float32[np.ndarray, "a"]]):
    """One robot in one task of a suite.

    Actions are the embodiment's action fields in SI; values beyond the limits are clipped to them, as the suite does.
    `reset` and `step` return only the state, because rendering costs far more than physics: `observe` renders. Wrap in
    `WithImages` for observations that carry the pictures. An episode is a success once any step was one; `terminated`
    says so, `truncated` says that max_steps is reached, and stepping on is allowed after either.

    A suite implements the abstract part, and of the methods with a leading underscore those in which it differs. Its
    constructor calls `_load`, which sets `task`, `instruction`, `model` and `data` and ends with `_loaded`.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}  # pyright: ignore
    render_mode = "rgb_array"

    suite: str  # key of dita.envs.SUITES
    embodiment: EmbodimentSpec
    tasks: tuple[str, ...]  # all that the suite has
    task: str
    instruction: str
    max_steps: int
    model: Any  # mujoco.MjModel
    data: Any  # mujoco.MjData
    upside_down: frozenset[str] = frozenset()  # cameras that the suite mounts so
    model_cameras: ClassVar[Mapping[str, str]] = {}  # the model's name of a camera that the embodiment calls otherwise
    seed: int = 0
    steps: int = 0
    success: bool = False
    start_hash: str = ""  # SHA-256 of the simulator's state after reset

    def __init__(
        self, suite: str, embodiment: EmbodimentSpec, tasks: tuple[str, ...], max_steps: int, fast_render: bool = True
    ) -> None:
        self.suite, self.embodiment, self.tasks, self.max_steps = suite, embodiment, tasks, max_steps
        self.fast_render = fast_render
        self.observation_space = spaces.Dict({"state": _box(embodiment.state)})
        self.action_space = _box(embodiment.action)
        self.scale = np.repeat([f.scale for f in embodiment.action], [f.size for f in embodiment.action])
        self._renderers: dict[tuple[int, int], Any] = {}

    # ---- what a suite says

    @abc.abstractmethod
    def _load(self, task: str) -> None:
        """Switch to a task.

        Raises:
            ValueError: it does not exist.
        """

    @abc.abstractmethod
    def _place(self) -> None:
        """Put robot and objects at the start of `self.seed`."""

    @property
    def _start_name(self) -> str:
        """Return what starts of equal physics are told apart by."""
        return self.task

    def _hashed(self) -> Sequence[Any]:
        """Return what makes a start beside physics: what `_place` writes into the model."""
        return ()

    def _attributes(self) -> dict[str, Any]:
        """Return the state that the suite keeps in Python, copied by the caller."""
        return {}

    def _restore(self, attributes: dict[str, Any]) -> None:
        """Take such a state, after the start that it belongs to."""

    def _scene_option(self) -> Any:
        """Return MuJoCo's MjvOption for pictures; None: its default."""
        return None

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
    def expert_action(self) -> Float32[np.ndarray, "a"]:
        """Return the scripted expert's action for this instant, SI, within the limits.

        Raises:
            ValueError: the task has no expert.
        """

    # ---- what all do alike

    def _loaded(self) -> None:
        """Take a new model: quality of its pictures, and whether it has the embodiment's cameras."""
        self.close()
        if self.fast_render:  # on a CPU these two dominate; they are read when a renderer is created
            self.model.vis.quality.offsamples = 0
            self.model.vis.quality.shadowsize = 0
        cameras = [self.model.camera(i).name for i in range(self.model.ncam)]
        for camera in self.embodiment.cameras:
            expect_known(f"camera of {self.task}", self.model_camera(camera.name), cameras)

    def model_camera(self, camera: str) -> str:
        """Return what the model calls a camera of the embodiment."""
        return self.model_cameras.get(camera, camera)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode; the start is a function of (task, seed), a missing seed draws one.

        Args:
            seed: of the start.
            options: {"task": name} switches the task.

        Raises:
            ValueError: unknown task or option.
        """
        super().reset(seed=seed)
        if unknown := set(options or {}) - {"task"}:
            raise ValueError(f"unknown reset option {', '.join(sorted(unknown))}; there is: task")
        if (task := (options or {}).get("task", self.task)) != self.task:
            self._load(task)
        self.seed = int(self.np_random.integers(2**31)) if seed is None else seed
        self._place()
        self.begin()
        return {"state": self.state}, self._info()

    def begin(self) -> None:
        """Make the present state the start of the episode."""
        self.steps, self.success = 0, False
        self.start_hash = self._hash()

    def _info(self) -> dict[str, Any]:
        return {"success": self.success, "warnings": self.warnings(), "start_hash": self.start_hash}

    def _hash(self) -> str:
        digest = hashlib.sha256(self._start_name.encode())
        for part in (self._physics(), *self._hashed()):
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    def _physics(self) -> Float64[np.ndarray, "n"]:
        import mujoco

        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        physics = np.empty(mujoco.mj_stateSize(self.model, kind))
        mujoco.mj_getState(self.model, self.data, physics, kind)
        return physics

    def get_state(self) -> SimState:
        """Save the complete state; what `reset` writes into the model follows from the seed."""
        attributes = copy.deepcopy(self._attributes())
        return SimState(self.task, self.seed, self.steps, self.success, self._physics(), attributes)

    def set_state(self, state: SimState) -> None:
        """Restore a saved state, of this or of another instance, of any task; what follows is bit-equal."""
        import mujoco

        self.reset(seed=state.seed, options={"task": state.task})
        self._restore(copy.deepcopy(state.attributes))
        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        mujoco.mj_setState(self.model, self.data, state.physics, kind)
        mujoco.mj_forward(self.model, self.data)  # positions of bodies and sites, contacts
        mujoco.mj_setState(self.model, self.data, state.physics, kind)  # mj_forward moved the solver's warm start
        self.steps, self.success = state.steps, state.success

    def warnings(self) -> dict[str, int]:
        """Return the simulator's warnings of this episode with their counts (MuJoCo's `mjData.warning`)."""
        import mujoco

        counts = {name: int(kind) for name, kind in mujoco.mjtWarning.__members__.items() if name != "mjNWARNING"}
        found = {name: int(self.data.warning[kind].number) for name, kind in counts.items()}
        return {name: count for name, count in found.items() if count}

    def picture(self, camera: str, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
        """Render a camera of the suite, RGB, right side up; physics does not notice."""
        import mujoco

        if (height, width) not in self._renderers:
            self._renderers[height, width] = mujoco.Renderer(self.model, height, width)
        renderer = self._renderers[height, width]
        renderer.update_scene(self.data, self.model_camera(camera), self._scene_option())
        if self.fast_render:
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
        picture = renderer.render()
        return np.ascontiguousarray(picture[::-1, ::-1]) if camera in self.upside_down else picture

    def close(self) -> None:
        """Free the renderers; MuJoCo's own clean-up at exit comes too late for EGL."""
        for renderer in self._renderers.values():
            renderer.close()
        self._renderers.clear()

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


@contextlib.contextmanager
def numpy_seeded(seed: int) -> Iterator[None]:
    """Seed NumPy's global generator, which is all that robosuite draws from, and put it back after."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002
