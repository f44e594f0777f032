"""A fake of LIBERO's public interface over a toy MuJoCo scene: names, signatures and quirks of hf-libero 0.1.4.

Not LIBERO: a hand on three slides instead of a Panda, a cabinet instead of a kitchen. It keeps what an adapter can get
wrong: prints, fixtures that NumPy's global generator places in the model, init states without them, a controller that
keeps its goal, a gripper that keeps its command over a soft reset, -1 opens, an episode that ends by itself.
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, NamedTuple

import mujoco
import numpy as np

SCENE = """
<mujoco>
  <option timestep="0.002"/><default><geom group="1"/></default>
  <worldbody>
    <light pos="0 0 2"/>
    <geom name="table" type="box" pos="0 0 0.8" size="0.4 0.4 0.05" rgba="0.3 0.3 0.3 1" contype="0" conaffinity="0"/>
    <body name="cabinet" pos="0 0.3 0.9"><geom type="box" size="0.05 0.05 0.05" rgba="0 0 1 1"/></body>
    <body name="bowl" pos="0.2 0 1"><freejoint name="bowl"/><geom type="sphere" size="0.03" rgba="0 1 0 1"/></body>
    <body name="robot0_right_hand" gravcomp="1" pos="0 0 1.1" quat="0 1 0 0">
      <joint name="x" type="slide" axis="1 0 0" damping="20"/>
      <joint name="y" type="slide" axis="0 -1 0" damping="20"/>
      <joint name="z" type="slide" axis="0 0 -1" damping="20"/>
      <geom type="sphere" size="0.04" rgba="1 0 0 1" mass="0.5" contype="0" conaffinity="0"/>
      <site name="gripper0_grip_site" pos="0 0 0.1"/>
      <camera name="robot0_eye_in_hand" pos="0.1 0 0" xyaxes="0 1 0 -1 0 0"/>
      <body name="finger1" gravcomp="1"><joint name="finger1" type="slide" axis="0 1 0" range="0 0.04" damping="10"/>
        <geom type="box" size="0.01 0.01 0.02" pos="0 0 0.1" mass="0.1" contype="0" conaffinity="0"/></body>
      <body name="finger2" gravcomp="1"><joint name="finger2" type="slide" axis="0 1 0" range="-0.04 0" damping="10"/>
        <geom type="box" size="0.01 0.01 0.02" pos="0 0 0.1" mass="0.1" contype="0" conaffinity="0"/></body>
    </body>
    <camera name="agentview" pos="1.2 0 1.2" xyaxes="0 1 0 -0.1 0 1"/>
  </worldbody>
  <actuator>
    <position joint="x" kp="500"/><position joint="y" kp="500"/><position joint="z" kp="500"/>
    <position joint="finger1" kp="100"/><position joint="finger2" kp="100"/>
  </actuator>
</mujoco>"""


class Task(NamedTuple):
    name: str
    language: str
    problem: str
    problem_folder: str
    bddl_file: str
    init_states_file: str


def suite_class(suite: str, names: list[str]) -> type:
    class Suite:
        def __init__(self, task_order_index: int = 0) -> None:
            print("[info] using task orders")
            self.tasks = [Task(n, n.replace("_", " "), "Libero", suite, f"{n}.bddl", f"{n}.pruned_init") for n in names]

    return Suite


class Controller:
    """Adds a step to the measured position; a rotation of exactly zero leaves the last goal, as OSC does."""

    def __init__(self) -> None:
        self.goal_pos, self.goal_ori = np.zeros(3), np.eye(3)
        self.new_update, self.sim = True, object()


class Gripper:
    dof = 1

    def __init__(self) -> None:
        self.current_action = np.zeros(1)

    def format_action(self, action: np.ndarray) -> np.ndarray:
        step = np.array([-1.0, 1.0]) * 0.01 * np.sign(action)
        self.current_action = np.clip(self.current_action + step, -1.0, 1.0)
        return self.current_action


class ControlEnv:
    """`libero.libero.envs.env_wrapper.ControlEnv`, with the keywords that the adapter gives."""

    def __init__(self, bddl_file_name: str, **kwargs: Any) -> None:
        assert Path(bddl_file_name).exists(), f"[error] {bddl_file_name} does not exist!"
        self.kwargs, self.task, self.commands = kwargs, Path(bddl_file_name).stem, []
        model = mujoco.MjModel.from_xml_string(SCENE)
        self._model, self._data = model, mujoco.MjData(model)
        self.sim = types.SimpleNamespace(
            model=types.SimpleNamespace(_model=model), data=types.SimpleNamespace(_data=self._data)
        )
        self.robots = [types.SimpleNamespace(controller=Controller(), gripper=Gripper())]
        self.steps, self.flame = 0, False

    def reset(self) -> dict[str, np.ndarray]:
        mujoco.mj_resetData(self._model, self._data)
        self._model.body("cabinet").pos[:2] = np.array([0.0, 0.3]) + np.random.uniform(-0.02, 0.02, 2)  # noqa: NPY002
        self.robots[0].controller, self.steps = Controller(), 0
        mujoco.mj_forward(self._model, self._data)
        return self._get_observations()

    def set_init_state(self, init_state: np.ndarray) -> dict[str, np.ndarray]:
        nq, nv = self._model.nq, self._model.nv
        self._data.time = init_state[0]
        self._data.qpos[:], self._data.qvel[:] = init_state[1 : 1 + nq], init_state[1 + nq : 1 + nq + nv]
        mujoco.mj_forward(self._model, self._data)
        self._post_process()
        return self._get_observations()

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, dict]:
        if self.steps >= 1000 and not self.kwargs.get("ignore_done"):
            raise ValueError("executing action in terminated episode")
        assert len(action) == 7
        self.commands.append(np.array(action))
        self.steps += 1
        controller, data = self.robots[0].controller, self._data
        controller.goal_pos = data.qpos[7:10] + 0.05 * np.clip(action[:3], -1, 1)
        if np.any(action[3:6]):
            controller.goal_ori = np.diag(1 + np.array(action[3:6], float))
        for _ in range(int(500 / self.kwargs["control_freq"])):
            mujoco.mj_forward(self._model, data)
            data.ctrl[:3] = controller.goal_pos + 0.01 * np.diag(controller.goal_ori - np.eye(3))
            data.ctrl[3:] = 0.02 - 0.02 * self.robots[0].gripper.format_action(action[6:])[1] * np.array([1, 1])
            data.ctrl[4] *= -1
            mujoco.mj_step(self._model, data)
        self._post_process()
        done = bool(data.qpos[9] > 0.1)
        return self._get_observations(), float(done), done, {}

    def _post_process(self) -> None:
        self.flame = bool(self._data.qpos[9] > 0.05)

    def _get_observations(self) -> dict[str, np.ndarray]:
        data = self._data
        return {
            "robot0_joint_pos": np.zeros(7),
            "robot0_eef_pos": np.array(data.site("gripper0_grip_site").xpos),
            "robot0_eef_quat": np.array(data.body("robot0_right_hand").xquat)[[1, 2, 3, 0]],
            "robot0_gripper_qpos": np.array(data.qpos[10:12]),
            "bowl_pos": np.array(data.body("bowl").xpos),
        }

    def close(self) -> None:
        del self.sim


def modules(root: Path, names: dict[str, list[str]]) -> dict[str, types.ModuleType]:
    """Return what to put into `sys.modules`; bddl files and init states lie under `root`."""
    made = {name: types.ModuleType(name) for name in ("libero", "libero.libero", "libero.libero.envs")}
    made["libero.libero.benchmark"] = types.ModuleType("libero.libero.benchmark")
    made["libero.libero.envs.env_wrapper"] = types.ModuleType("libero.libero.envs.env_wrapper")
    suites = {suite: suite_class(suite, tasks) for suite, tasks in names.items()}
    vars(made["libero.libero.benchmark"])["get_benchmark_dict"] = lambda help=False: suites
    vars(made["libero.libero"]).update(
        benchmark=made["libero.libero.benchmark"], get_libero_path=lambda key: str(root / key)
    )
    vars(made["libero.libero.envs.env_wrapper"])["ControlEnv"] = ControlEnv
    return made
