# mujoco, robosuite and LIBERO ship no types
# pyright: reportAttributeAccessIssue=false
"""LIBERO (Liu et al., arXiv 2306.03310): 130 table-top tasks of a Panda under OSC_POSE at 20 Hz. NEVER RUN.

Written against the public interface of hf-libero 0.1.4 over robosuite 1.4.0 and tested on a fake of it, because neither
fits beside this package's robosuite 1.5: docs/libero.md makes an environment of its own. What is real and was checked
is LIBERO's initial states, all 250 files, which `load_states` reads without running anything in them.

LIBERO renders upside down and its users turn that by 180 degrees, which mirrors left and right; here MuJoCo renders the
same cameras right side up, as `dita convert robomimic` stores LIBERO's frames.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import libero  # pyright: ignore[reportMissingImports]  # noqa: F401  an empty package; its subpackage is not
import mujoco
import numpy as np
from jaxtyping import Float32, Float64
from scipy.spatial.transform import Rotation

from dita.config import EnvConfig
from dita.embodiment import load_embodiment
from dita.envs import expect_known
from dita.envs.base import RobotEnv, numpy_seeded
from dita.types import EmbodimentSpec, FieldSpec

if not (Path(os.environ.get("LIBERO_CONFIG_PATH") or Path.home() / ".libero") / "config.yaml").is_file():
    raise ValueError(  # it would ask on standard input, which a worker process does not have
        "LIBERO has no config.yaml yet, where it notes its folders; run once: echo N | python -c 'import libero.libero'"
    )
from libero.libero import benchmark, get_libero_path  # pyright: ignore[reportMissingImports]
from libero.libero.envs.env_wrapper import ControlEnv  # pyright: ignore[reportMissingImports]

NAMES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
with contextlib.redirect_stdout(io.StringIO()):  # it prints the order of the tasks
    SUITES = {name: tuple(benchmark.get_benchmark_dict()[name]().tasks) for name in NAMES}
BY_NAME = {task.name: task for tasks in SUITES.values() for task in tasks}
TASKS = tuple(BY_NAME)
INSTRUCTIONS = {name: task.language for name, task in BY_NAME.items()}  # of LIBERO's file names, as its evaluation has

START, MODEL_SEED = 1, 0  # purpose of the random numbers of a start; seed of what is drawn while a model is built
SETTLE = 10  # steps in which objects that hang in the air fall, before an episode begins
STILL = np.array([0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0])  # no motion, gripper open
# what LIBERO's controller does with its command of -1 to 1: kind, size, mode, reference, scale
ACTION = (
    ("ee_position", 3, "delta", "measured", 0.05),
    ("ee_rotation_axis_angle", 3, "delta", "measured", 0.5),
    ("gripper_effort", 1, "absolute", None, -1.0),
)
SENSORS = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "robot0_joint_pos")


def make(config: EnvConfig, task: str) -> LiberoEnv:
    """Build the environment of one task.

    Raises:
        ValueError: unknown task, or an embodiment that is not LIBERO's Panda.
    """
    return LiberoEnv(load_embodiment(config.embodiment), task, config.max_steps, config.fast_render)


class LiberoEnv(RobotEnv):
    """A LIBERO task; its start depends on (task, seed) only: initial state `seed % 50`, fixtures drawn from the seed.

    Success, at any step: the goal of the task's bddl file holds; never while the start settles. The state is LIBERO's
    own observation, one physics step of 2 ms older than the joints, as in its data sets: tool position in the world,
    rotation of the hand, opening of the fingers.
    """

    model_cameras: ClassVar[dict[str, str]] = {"agentview_rgb": "agentview", "eye_in_hand_rgb": "robot0_eye_in_hand"}

    def __init__(self, embodiment: EmbodimentSpec, task: str, max_steps: int, fast_render: bool = True) -> None:
        super().__init__("libero", embodiment, TASKS, max_steps, fast_render)
        if tuple((f.kind, f.size, f.mode, f.reference, f.scale) for f in embodiment.action) != ACTION:
            raise ValueError(
                f"embodiment {embodiment.name!r} is not LIBERO's robot: its action must be a tool step in m and one in "
                "rad from where the tool is measured, then the gripper, with the scales of libero_panda.yaml"
            )
        self._env: Any = None
        self._load(task)

    def _load(self, task: str) -> None:
        expect_known("task", task, TASKS)
        found = BY_NAME[task]
        self.task, self.instruction = task, found.language
        self._starts = load_states(Path(get_libero_path("init_states"), found.problem_folder, found.init_states_file))
        if self._env is not None:
            self._env.close()
        with numpy_seeded(MODEL_SEED):
            self._env = ControlEnv(
                str(Path(get_libero_path("bddl_files"), found.problem_folder, found.bddl_file)),
                use_camera_obs=False,  # pictures are rendered here, and only when asked for
                has_offscreen_renderer=False,
                control_freq=self.embodiment.control_hz,
                ignore_done=True,  # max_steps is ours to say
                hard_reset=False,  # or every episode builds the model anew, and LIBERO draws once more per episode
            )
        self.model, self.data = self._env.sim.model._model, self._env.sim.data._data
        width = 1 + self.model.nq + self.model.nv
        if self._starts.shape[1] != width:
            raise ValueError(
                f"{found.init_states_file} has states of {self._starts.shape[1]} values, but the model of {task} has "
                f"{width} (time, positions, velocities): LIBERO's files and its code are of different versions"
            )
        self._loaded()

    def _place(self) -> None:
        start = np.random.default_rng([self.seed, START]).integers(2**32)
        with numpy_seeded(int(start)):  # where cabinets and stoves stand is in the model, not in an initial state
            self._env.reset()
        gripper = self._env.robots[0].gripper
        gripper.current_action = np.zeros(gripper.dof)
        self._seen = self._env.set_init_state(self._starts[self.seed % len(self._starts)])
        for _ in range(SETTLE):
            self._seen, *_ = self._env.step(STILL)

    def _hashed(self) -> Sequence[Any]:
        return self.model.body_pos, self.model.body_quat, self.model.geom_size

    def step(self, action: Float32[np.ndarray, "7"]) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Move the tool by one SI action for 50 ms; the reward is LIBERO's sparse one, 1 where the goal holds."""
        self._seen, reward, done, _ = self._env.step(self.source_action(action))
        self.success |= bool(done)
        self.steps += 1
        return {"state": self.state}, float(reward), self.success, self.steps >= self.max_steps, self._info()

    @property
    def commanded_position(self) -> Float64[np.ndarray, "3"]:
        """Measured tool position [m, world]: a step adds to where the tool is."""
        return np.array(self._seen["robot0_eef_pos"], float)

    @property
    def state(self) -> Float32[np.ndarray, "s"]:
        """The embodiment's fields by kind: tool, joints, gripper; never an object."""
        return np.concatenate([self._value(f) for f in self.embodiment.state]).astype(np.float32)

    def _value(self, field: FieldSpec) -> Float64[np.ndarray, "d"]:
        position, quaternion, fingers, joints = (np.asarray(self._seen[name], float) for name in SENSORS)
        if field.kind == "ee_position":
            return position
        if field.kind == "ee_rotation_6d":
            return Rotation.from_quat(quaternion).as_matrix()[:, :2].T.ravel()  # xyzw there
        if field.kind == "gripper_position":
            return np.clip([field.scale * (fingers[0] - fingers[1]) / 2], 0.0, 1.0)
        if field.kind == "joint_position":
            return joints
        raise ValueError(f"libero: state field {field.name}: {field.kind} is not supported")

    def _scene_option(self) -> mujoco.MjvOption:
        option = mujoco.MjvOption()
        option.geomgroup[0] = 0  # collision shapes
        return option

    def expert_action(self) -> Float32[np.ndarray, "7"]:
        """Raise a ValueError: there is no scripted expert."""
        raise ValueError("libero has no scripted expert; `dita convert robomimic` reads its demonstrations")

    def _attributes(self) -> dict[str, Any]:
        robot = self._env.robots[0]
        numbers = bool | int | float | np.generic | np.ndarray
        controller = {name: value for name, value in vars(robot.controller).items() if isinstance(value, numbers)}
        seen = {name: np.array(self._seen[name]) for name in SENSORS}
        return {"seen": seen, "controller": controller, "gripper": np.array(robot.gripper.current_action)}

    def _restore(self, attributes: dict[str, Any]) -> None:
        robot = self._env.robots[0]
        vars(robot.controller).update(attributes["controller"])  # it keeps the last rotation that it was sent to
        self._seen, robot.gripper.current_action = attributes["seen"], attributes["gripper"]

    def set_state(self, state: Any) -> None:
        """Restore a saved state; what LIBERO shows of it, such as a stove's flame, follows."""
        super().set_state(state)
        self._env._post_process()


def load_states(path: Path) -> Float64[np.ndarray, "k n"]:
    """Read a file of initial states: a pickled NumPy array in torch's zip, of which nothing is run.

    torch's `weights_only` reader builds what it knows and here, besides, plain arrays of float64.

    Args:
        path: LIBERO's `<task>.pruned_init`.

    Returns:
        one state a row: time, positions, velocities.

    Raises:
        ValueError: the file holds anything else.
        FileNotFoundError: there is no such file.
    """
    import pickle
    import zipfile

    import torch

    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: LIBERO's initial states come with its package")
    rebuild = np.zeros(0).__reduce__()[0]  # what NumPy's pickles call; its module is called otherwise since NumPy 2
    allowed: list[Any] = [(rebuild, f"{home}.multiarray._reconstruct") for home in ("numpy.core", "numpy._core")]
    allowed += [np.ndarray, np.dtype, type(np.dtype(np.float64))]
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("it is no zip")
        with torch.serialization.safe_globals(allowed):
            states = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, TypeError) as e:
        # torch adds advice to run it all the same
        why = str(e).split("WeightsUnpickler error: ")[-1].strip().split("\n")[0].split(". Please use")[0]
        raise ValueError(f"{path} is no file of initial states that can be read without running it: {why}") from None
    if not isinstance(states, np.ndarray) or states.dtype != np.float64 or states.ndim != 2 or not len(states):
        raise ValueError(f"{path} must hold an array [states, values] of float64, it holds {type(states).__name__}")
    if not np.isfinite(states).all():
        raise ValueError(f"{path} holds values that are not finite")
    return states
