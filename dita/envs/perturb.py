# mujoco ships no types for its compiled part
# pyright: reportAttributeAccessIssue=false
"""Robustness: one change at a time, or several, to what an episode shows, says or starts from.

Every draw follows from (perturb.seed, the flag, the seed of the start), so that flags do not disturb each other's draws
and two checkpoints meet the same changes. Pictures change in MuJoCo's model only, where physics does not look.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float32
from scipy.spatial.transform import Rotation

from dita.config import EnvConfig, PerturbConfig
from dita.envs import suite_module
from dita.envs.base import RobotEnv
from dita.types import FieldSpec

INSTRUCTION, CAMERA, LIGHT, TEXTURE, START = range(5)  # purposes of the random numbers
BLANK = " "  # no sentence at all is a mistake to every tokenizer
SETTLE_S = 0.25  # that a robot stands at its start before the episode begins
SHARE = 0.5  # of a delta's limit that it moves by in a step on its way there
SPEED = 0.5  # [m/s, rad/s] at which absolute targets move there
SEEN = ("cam_pos", "cam_quat", "light_diffuse", "light_ambient", "geom_rgba")  # of the model


def check_instructions(env: EnvConfig, perturb: PerturbConfig) -> None:
    """Refuse a kind of instruction for which a task has no sentence.

    Raises:
        ValueError: with what the suite has.
    """
    for task in env.tasks if perturb.instruction != "given" else ():
        sentence(env, task, perturb, 0)


def sentence(env: EnvConfig, task: str, perturb: PerturbConfig, start: int) -> str:
    """Return what an episode of `task` from the seed `start` is told instead; raises as `check_instructions`.

    swapped: the suite's own swapped sentence, or else that of the next of env.tasks.
    """
    suite, kind = suite_module(env.suite), perturb.instruction
    if kind == "blank":
        return BLANK
    if kind == "paraphrased":
        if not hasattr(suite, "PARAPHRASES"):
            raise ValueError(f"suite {env.suite} has no paraphrases; for {task} there is: {suite.INSTRUCTIONS[task]!r}")
        known = suite.PARAPHRASES[task]
        return known[int(_draws(perturb, INSTRUCTION, start).integers(len(known)))]
    if hasattr(suite, "swapped"):
        return suite.swapped(task)
    if len(env.tasks) < 2:
        raise ValueError(
            f"suite {env.suite} has no swapped sentences and env.tasks only {task}, "
            f"{suite.INSTRUCTIONS[task]!r}: name a second task, whose sentence is taken, or use the suite choice"
        )
    return suite.INSTRUCTIONS[env.tasks[(env.tasks.index(task) + 1) % len(env.tasks)]]


class Perturbation:
    """Changes the episodes of one environment, which was just reset; what it changed is put back before the next."""

    def __init__(self, config: EnvConfig, perturb: PerturbConfig) -> None:
        self.config, self.perturb = config, perturb
        self._model, self._before = None, {}

    def begin(self, env: RobotEnv, start: int) -> None:
        """Change an episode that begins from the seed `start`.

        Raises:
            ValueError: the suite's cameras, sentences or actions do not allow it.
        """
        p = self.perturb
        if p.instruction != "given":
            env.instruction = sentence(self.config, env.task, p, start)
        if p.start:
            _displace(env, p.start, _draws(p, START, start))
        if not (p.camera_shift or p.camera_turn or p.light or p.texture):
            return
        import mujoco

        self._put_back(env)
        if p.camera_shift or p.camera_turn:
            _move_cameras(env, p, _draws(p, CAMERA, start))
        if p.light:
            _relight(env, p.light, _draws(p, LIGHT, start))
        if p.texture:
            _repaint(env, p.texture, _draws(p, TEXTURE, start))
        mujoco.mj_camlight(env.model, env.data)  # cameras and lamps in the world; nothing that physics reads

    def _put_back(self, env: RobotEnv) -> None:
        head = env.model.vis.headlight
        arrays = {name: getattr(env.model, name) for name in SEEN} | {"diffuse": head.diffuse, "ambient": head.ambient}
        if env.model is not self._model:  # another task may be another model
            self._model, self._before = env.model, {name: np.array(a) for name, a in arrays.items()}
        for name, array in arrays.items():
            array[:] = self._before[name]


def _draws(perturb: PerturbConfig, purpose: int, start: int) -> np.random.Generator:
    return np.random.default_rng([perturb.seed, purpose, start])


def _move_cameras(env: RobotEnv, perturb: PerturbConfig, rng: np.random.Generator) -> None:
    """Shift [m] and turn [rad] each of the embodiment's cameras in its own frame."""
    import mujoco

    aimed = (mujoco.mjtCamLight.mjCAMLIGHT_TARGETBODY, mujoco.mjtCamLight.mjCAMLIGHT_TARGETBODYCOM)
    for camera in env.embodiment.cameras:
        i = env.model.camera(env.model_camera(camera.name)).id
        mode = env.model.cam_mode[i]
        if mode != mujoco.mjtCamLight.mjCAMLIGHT_FIXED and (mode not in aimed or perturb.camera_turn):
            raise ValueError(
                f"camera {camera.name} of {env.suite} always looks at a body or follows it: it can be shifted only if "
                "it stays where it is, and never be turned; set perturb.camera_turn=0"
            )
        shift, turn = rng.uniform(-1, 1, 3), rng.uniform(-1, 1, 3)
        before = Rotation.from_quat(env.model.cam_quat[i], scalar_first=True)
        env.model.cam_pos[i] += before.apply(perturb.camera_shift * shift)
        after = before * Rotation.from_rotvec(perturb.camera_turn * turn)
        env.model.cam_quat[i] = after.as_quat(scalar_first=True)


def _relight(env: RobotEnv, most: float, rng: np.random.Generator) -> None:
    """Scale every lamp, the one at the camera included, by its own factor per colour."""
    factors = 1 + most * rng.uniform(-1, 1, (env.model.nlight + 1, 3))
    head = env.model.vis.headlight
    for array in (env.model.light_diffuse, env.model.light_ambient):
        array[:] *= factors[1:]
    for array in (head.diffuse, head.ambient):
        array[:] *= factors[0]


def _repaint(env: RobotEnv, share: float, rng: np.random.Generator) -> None:
    """Mix a random colour into every surface that cannot move: table, walls, floor; robot and objects keep theirs.

    A surface's own colour, where it has one, comes before its material's; a texture is tinted by it.
    """
    m = env.model
    for i in range(m.ngeom):
        body, colour = m.geom_bodyid[i], rng.uniform(0, 1, 3)
        if m.body_weldid[body] != 0 or m.body_mocapid[body] >= 0:
            continue
        plain = np.all(m.geom_rgba[i] == 0.5 * np.array([1, 1, 1, 2], m.geom_rgba.dtype))  # MuJoCo's "not given"
        own = m.mat_rgba[m.geom_matid[i]] if plain and m.geom_matid[i] >= 0 else m.geom_rgba[i]
        m.geom_rgba[i] = [*((1 - share) * own[:3] + share * colour), own[3]]


def _displace(env: RobotEnv, most: float, rng: np.random.Generator) -> None:
    """Let the robot move by up to `most` along each axis of its tool [m], or in each joint [rad], and begin there.

    Its own actions take it there, so that its controllers, its state and the simulator agree; rotations stay, and
    grippers, or open where they take an effort.
    """
    fields, hz = env.embodiment.action, env.embodiment.control_hz
    ways = [_way(env, f, most, rng) for f in fields]
    paces = [SHARE * max(f.high) if f.mode == "delta" else SPEED / hz for f in fields]  # of one step
    steps = max(1, *(int(np.ceil(np.abs(way).max() / pace)) for way, pace in zip(ways, paces, strict=True)))
    begin = {f.name: here for f, here in zip(env.embodiment.state, _parts(env), strict=True)}
    for k in range(steps + round(SETTLE_S * hz)):
        parts = []
        for f, way in zip(fields, ways, strict=True):
            if f.mode == "delta":
                parts.append(way / steps if k < steps else 0 * way)
            elif f.kind == "gripper_effort":
                parts.append(np.array(f.high))
            else:
                parts.append(begin[f.name] + way * min(1.0, (k + 1) / steps))
        env.step(np.concatenate(parts).astype(np.float32))
    env.begin()


def _way(env: RobotEnv, f: FieldSpec, most: float, rng: np.random.Generator) -> Float32[np.ndarray, "d"]:
    held = f.mode == "delta" or f.kind == "gripper_effort" or f.name in {s.name for s in env.embodiment.state}
    if not held:
        raise ValueError(
            f"perturb.start: {env.embodiment.name} takes an absolute {f.name}, and its state has no field of that name"
        )
    draw = rng.uniform(-most, most, f.size)
    moves = f.kind in ("ee_position", "joint_position")
    return draw.astype(np.float32) if moves else np.zeros(f.size, np.float32)


def _parts(env: RobotEnv) -> list[np.ndarray]:
    sizes = np.cumsum([f.size for f in env.embodiment.state])[:-1]
    return np.split(env.state, sizes)
