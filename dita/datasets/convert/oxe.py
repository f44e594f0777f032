"""What is known of the layouts of Open X-Embodiment's datasets: raw step features -> named fields, one entry each.

A field keeps one name over all datasets, so that one embodiment file serves several:

    state    ee_position [m]  ee_rotation (6-D)  joints [rad]  gripper (1 = open)
    action   ee_delta [m]  rotation_delta (axis-angle) [rad]  gripper (1 = open)

A dataset gives some of them; an embodiment takes what it wants by name. Roll, pitch and yaw turn about the fixed axes
(`xyz` of scipy); quaternions are xyzw in the data.

Everything here comes from public documentation: the datasets' own descriptions and the sheet of
https://github.com/google-deepmind/open_x_embodiment. `verified` is True only where a file of the dataset was read by
this project and looked right; so far that is none of them. `configs/data/oxe_mixture.yaml` says which datasets the
published model was trained on, and how often each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from jaxtyping import Float32
from scipy.spatial.transform import Rotation

from dita.config import from_dict
from dita.datasets.convert.base import rotation_6d
from dita.embodiment import config_folder

Raw = Mapping[str, Float32[np.ndarray, "m d"]]  # features under steps/, one row per step
Column = Callable[[Raw], np.ndarray]


@dataclass(frozen=True, eq=False)
class Named:
    """The fields of one episode, [k d] each, and which of its m steps they belong to."""

    state: Mapping[str, np.ndarray]
    action: Mapping[str, np.ndarray]
    keep: slice


@dataclass(frozen=True)
class Transform:
    """One dataset's layout."""

    convert: Callable[[Raw], Named]  # pure
    needs: Mapping[str, int]  # feature -> its width
    embodiment: str | None  # shipped file whose field and camera names are this dataset's
    verified: bool


# --- grippers: each [m 1] -> 1 = open


def opening(values: np.ndarray) -> np.ndarray:
    """Clip a gripper where 1 is open."""
    return np.clip(values, 0, 1)


def closing(values: np.ndarray) -> np.ndarray:
    """Turn a gripper where 1 is closed."""
    return 1 - np.clip(values, 0, 1)


def opening_decided(values: np.ndarray) -> np.ndarray:
    """Turn a nearly continuous command into open or closed: in-between steps take the next decided value."""
    out = (values > 0.5).astype(np.float32)  # of what follows the last decided step
    decided = (values > 0.95) | (values < 0.05)
    for i in range(len(out) - 2, -1, -1):
        if not decided[i]:
            out[i] = out[i + 1]
    return out


def closing_relative(values: np.ndarray) -> np.ndarray:
    """Add up a command that says close (+1), open (-1) or as it is (0); before the first one it is the other way."""
    turns = np.where(values > 0.1, -1, np.where(values < -0.1, 1, 0)).reshape(-1)  # 1 opens
    moves = np.flatnonzero(turns)
    now = -turns[moves[0]] if len(moves) else 1
    out = np.empty(len(turns), np.float32)
    for i, turn in enumerate(turns):
        now = turn or now
        out[i] = now > 0
    return out[:, None]


# --- columns


def cut(name: str, start: int = 0, stop: int | None = None) -> Column:
    """Take some columns of a feature as they are."""
    return lambda raw: raw[name][:, start:stop]


def turned(how: Callable[[np.ndarray], np.ndarray], name: str, column: int = 0) -> Column:
    """Take one column through a gripper function."""
    return lambda raw: how(raw[name][:, column : column + 1])


def scaled(factor: float, name: str, column: int) -> Column:
    """Take one column times a factor, within 0 and 1."""
    return lambda raw: np.clip(raw[name][:, column : column + 1] * factor, 0, 1)


def euler_6d(name: str, start: int = 0) -> Column:
    """Turn roll, pitch and yaw into a 6-D rotation."""
    return lambda raw: rotation_6d(Rotation.from_euler("xyz", raw[name][:, start : start + 3]))


def quaternion_xyzw_6d(name: str, start: int = 0) -> Column:
    """Turn a quaternion into a 6-D rotation; scipy refuses a zero one."""
    return lambda raw: rotation_6d(Rotation.from_quat(raw[name][:, start : start + 4]))


def euler_vector(name: str, start: int = 0) -> Column:
    """Turn a rotation by roll, pitch and yaw into axis-angle."""
    return lambda raw: Rotation.from_euler("xyz", raw[name][:, start : start + 3]).as_rotvec()


def quaternion_vector(name: str, start: int = 0) -> Column:
    """Turn a rotation by a quaternion xyzw into axis-angle."""
    return lambda raw: Rotation.from_quat(raw[name][:, start : start + 4]).as_rotvec()


def fields(state: Mapping[str, Column], action: Mapping[str, Column]) -> Callable[[Raw], Named]:
    """Name columns; every step is kept."""

    def convert(raw: Raw) -> Named:
        return Named(
            {name: column(raw) for name, column in state.items()},
            {name: column(raw) for name, column in action.items()},
            slice(None),
        )

    return convert


def bridge(state: str, gripper: Column) -> Callable[[Raw], Named]:
    """Relabel BridgeData V2: what its hand did, not what it was told; without the first step, whose action is zero.

    An action is the way from one measured pose to the next, so the last step has none and is left out as well.
    """

    def convert(raw: Raw) -> Named:
        pose = raw[state]
        rotation = Rotation.from_euler("xyz", pose[:, 3:6])
        keep = slice(1, len(pose) - 1)
        step = (rotation[2:] * rotation[1:-1].inv()).as_rotvec() if len(pose) > 2 else np.zeros((0, 3))
        return Named(
            {
                "ee_position": pose[keep, :3],
                "ee_rotation": rotation_6d(rotation)[keep],
                "gripper": opening(pose[keep, 6:7]),
            },
            {"ee_delta": np.diff(pose[1:, :3], axis=0), "rotation_delta": step, "gripper": gripper(raw)[keep]},
            keep,
        )

    return convert


def split_action(gripper: Column) -> dict[str, Column]:
    """Name the actions of datasets that keep them apart, with roll, pitch and yaw."""
    return {
        "ee_delta": cut("action/world_vector"),
        "rotation_delta": euler_vector("action/rotation_delta"),
        "gripper": gripper,
    }


def flat_action(gripper: Column) -> dict[str, Column]:
    """Name the columns of datasets with one action vector: position, roll, pitch and yaw, gripper."""
    return {"ee_delta": cut("action", 0, 3), "rotation_delta": euler_vector("action", 3), "gripper": gripper}


SPLIT = {"action/world_vector": 3, "action/rotation_delta": 3}
CLOSEDNESS = "action/gripper_closedness_action"
OBS = "observation/"
PANDA_HAND = 1 / 0.08  # [1/m] a Franka hand opens to 80 mm

# robosuite-like state of the Austin labs: seven joints, gripper opening [m], then a pose
AUSTIN = {"joints": cut(OBS + "state", 0, 7), "gripper": scaled(PANDA_HAND, OBS + "state", 7)}
AUSTIN_POSE = {
    "ee_position": cut(OBS + "state", 0, 3),
    "ee_rotation": quaternion_xyzw_6d(OBS + "state", 3),
    "gripper": scaled(PANDA_HAND, OBS + "state", 7),
}

TRANSFORMS: dict[str, Transform] = {
    "fractal20220817_data": Transform(
        fields(
            {
                "ee_position": cut(OBS + "base_pose_tool_reached", 0, 3),
                "ee_rotation": quaternion_xyzw_6d(OBS + "base_pose_tool_reached", 3),
                "gripper": turned(closing, OBS + "gripper_closed"),
            },
            split_action(turned(closing_relative, CLOSEDNESS)),
        ),
        SPLIT | {CLOSEDNESS: 1, OBS + "base_pose_tool_reached": 7, OBS + "gripper_closed": 1},
        "google_robot_fractal",
        False,
    ),
    "kuka": Transform(
        fields(
            {
                "ee_position": cut(OBS + "clip_function_input/base_pose_tool_reached", 0, 3),
                "ee_rotation": quaternion_xyzw_6d(OBS + "clip_function_input/base_pose_tool_reached", 3),
                "gripper": turned(closing, OBS + "gripper_closed"),
            },
            split_action(turned(closing_relative, CLOSEDNESS)),
        ),
        SPLIT | {CLOSEDNESS: 1, OBS + "clip_function_input/base_pose_tool_reached": 7, OBS + "gripper_closed": 1},
        None,
        False,
    ),
    # BridgeData V2 as its own site publishes it
    "bridge_dataset": Transform(
        bridge(OBS + "state", turned(opening_decided, "action", 6)),
        {"action": 7, OBS + "state": 7},
        "widowx_bridge",
        False,
    ),
    # ... and as Open X-Embodiment does
    "bridge": Transform(
        bridge(OBS + "state", turned(opening, "action/open_gripper")),
        {"action/open_gripper": 1, OBS + "state": 7},
        None,
        False,
    ),
    "taco_play": Transform(
        fields(
            {
                "ee_position": cut(OBS + "robot_obs", 0, 3),
                "ee_rotation": euler_6d(OBS + "robot_obs", 3),
                "gripper": scaled(PANDA_HAND, OBS + "robot_obs", 6),
                "joints": cut(OBS + "robot_obs", 7, 14),
            },
            {
                "ee_delta": cut("action/rel_actions_world", 0, 3),
                "rotation_delta": euler_vector("action/rel_actions_world", 3),
                "gripper": turned(opening, "action/rel_actions_world", 6),
            },
        ),
        {OBS + "robot_obs": 15, "action/rel_actions_world": 7},
        "franka_taco_play",
        False,
    ),
    "jaco_play": Transform(
        fields(
            {"ee_position": cut(OBS + "end_effector_cartesian_pos", 0, 3)},
            {
                "ee_delta": cut("action/world_vector"),
                "gripper": turned(closing_relative, CLOSEDNESS),
            },
        ),
        {"action/world_vector": 3, CLOSEDNESS: 1, OBS + "end_effector_cartesian_pos": 7},
        "kinova_jaco_play",
        False,
    ),
    "berkeley_cable_routing": Transform(
        fields(
            {"joints": cut(OBS + "robot_state")},
            {"ee_delta": cut("action/world_vector"), "rotation_delta": euler_vector("action/rotation_delta")},
        ),
        SPLIT | {OBS + "robot_state": 7},
        None,
        False,
    ),
    "roboturk": Transform(fields({}, split_action(turned(closing, CLOSEDNESS))), SPLIT | {CLOSEDNESS: 1}, None, False),
    "nyu_door_opening_surprising_effectiveness": Transform(
        fields({}, split_action(turned(closing_relative, CLOSEDNESS))), SPLIT | {CLOSEDNESS: 1}, None, False
    ),
    "viola": Transform(
        fields(
            {"joints": cut(OBS + "joint_states"), "gripper": scaled(PANDA_HAND, OBS + "gripper_states", 0)},
            split_action(turned(closing, CLOSEDNESS)),
        ),
        SPLIT | {CLOSEDNESS: 1, OBS + "joint_states": 7, OBS + "gripper_states": 1},
        None,
        False,
    ),
    # robot_state: 6 joints, position, quaternion, gripper closed, blocked
    "berkeley_autolab_ur5": Transform(
        fields(
            {
                "joints": cut(OBS + "robot_state", 0, 6),
                "ee_position": cut(OBS + "robot_state", 6, 9),
                "ee_rotation": quaternion_xyzw_6d(OBS + "robot_state", 9),
                "gripper": turned(closing, OBS + "robot_state", 13),
            },
            split_action(turned(closing_relative, CLOSEDNESS)),
        ),
        SPLIT | {CLOSEDNESS: 1, OBS + "robot_state": 15},
        "ur5_berkeley_autolab",
        False,
    ),
    "toto": Transform(
        fields({"joints": cut(OBS + "state")}, split_action(turned(opening, "action/open_gripper"))),
        SPLIT | {"action/open_gripper": 1, OBS + "state": 7},
        None,
        False,
    ),
    # a stick on a table: two directions, no gripper
    "language_table": Transform(
        fields({"ee_position": cut(OBS + "effector_translation")}, {"ee_delta": cut("action")}),
        {"action": 2, OBS + "effector_translation": 2},
        None,
        False,
    ),
    "stanford_hydra_dataset_converted_externally_to_rlds": Transform(
        fields(
            {
                "ee_position": cut(OBS + "state", 0, 3),
                "ee_rotation": quaternion_xyzw_6d(OBS + "state", 3),
                "joints": cut(OBS + "state", 10, 17),
            },
            flat_action(turned(closing, "action", 6)),
        ),
        {"action": 7, OBS + "state": 27},
        None,
        False,
    ),
    "austin_buds_dataset_converted_externally_to_rlds": Transform(
        fields(AUSTIN, flat_action(turned(closing, "action", 6))), {"action": 7, OBS + "state": 24}, None, False
    ),
    "nyu_franka_play_dataset_converted_externally_to_rlds": Transform(
        fields(
            {
                "joints": cut(OBS + "state", 0, 7),
                "ee_position": cut(OBS + "state", 7, 10),
                "ee_rotation": euler_6d(OBS + "state", 10),
            },
            {
                "ee_delta": cut("action", 7, 10),
                "rotation_delta": euler_vector("action", 10),
                "gripper": turned(opening, "action", 13),
            },
        ),
        {"action": 15, OBS + "state": 13},
        None,
        False,
    ),
    "furniture_bench_dataset_converted_externally_to_rlds": Transform(
        fields(
            {"ee_position": cut(OBS + "state", 0, 3), "ee_rotation": quaternion_xyzw_6d(OBS + "state", 3)},
            {
                "ee_delta": cut("action", 0, 3),
                "rotation_delta": quaternion_vector("action", 3),
                "gripper": turned(closing, "action", 7),
            },
        ),
        {"action": 8, OBS + "state": 35},
        None,
        False,
    ),
    "ucsd_kitchen_dataset_converted_externally_to_rlds": Transform(
        fields({"joints": cut(OBS + "state", 0, 7)}, flat_action(turned(opening, "action", 6))),
        {"action": 8, OBS + "state": 21},
        None,
        False,
    ),
    "austin_sailor_dataset_converted_externally_to_rlds": Transform(
        fields(AUSTIN_POSE, flat_action(turned(closing, "action", 6))), {"action": 7, OBS + "state": 8}, None, False
    ),
    "austin_sirius_dataset_converted_externally_to_rlds": Transform(
        fields(AUSTIN_POSE, flat_action(turned(closing, "action", 6))), {"action": 7, OBS + "state": 8}, None, False
    ),
    # residuals to the next ten way-points; the first of them is the step
    "bc_z": Transform(
        fields(
            {
                "ee_position": cut(OBS + "present/xyz"),
                "ee_rotation": lambda raw: rotation_6d(Rotation.from_rotvec(raw[OBS + "present/axis_angle"])),
                "gripper": turned(closing, OBS + "present/sensed_close"),
            },
            {
                "ee_delta": cut("action/future/xyz_residual", 0, 3),
                "rotation_delta": cut("action/future/axis_angle_residual", 0, 3),
                "gripper": turned(closing, "action/future/target_close"),
            },
        ),
        {
            OBS + "present/xyz": 3,
            OBS + "present/axis_angle": 3,
            OBS + "present/sensed_close": 1,
            "action/future/xyz_residual": 30,
            "action/future/axis_angle_residual": 30,
            "action/future/target_close": 10,
        },
        None,
        False,
    ),
    "dlr_edan_shared_control_converted_externally_to_rlds": Transform(
        fields(
            {"ee_position": cut(OBS + "state", 0, 3), "ee_rotation": euler_6d(OBS + "state", 3)},
            flat_action(turned(closing, "action", 6)),
        ),
        {"action": 7, OBS + "state": 7},
        None,
        False,
    ),
    "iamlab_cmu_pickup_insert_converted_externally_to_rlds": Transform(
        fields(
            {"joints": cut(OBS + "state", 0, 7), "gripper": scaled(1, OBS + "state", 7)},
            {
                "ee_delta": cut("action", 0, 3),
                "rotation_delta": quaternion_vector("action", 3),
                "gripper": turned(opening, "action", 7),
            },
        ),
        {"action": 8, OBS + "state": 20},
        None,
        False,
    ),
    "utaustin_mutex": Transform(
        fields(AUSTIN, flat_action(turned(closing, "action", 6))), {"action": 7, OBS + "state": 24}, None, False
    ),
    # stores no gripper command: the state, turned, stands for it
    "berkeley_fanuc_manipulation": Transform(
        fields(
            {"joints": cut(OBS + "state", 0, 6), "gripper": turned(closing, OBS + "state", 6)},
            flat_action(turned(closing, OBS + "state", 6)),
        ),
        {"action": 6, OBS + "state": 13},
        None,
        False,
    ),
    "cmu_stretch": Transform(
        fields({"ee_position": cut(OBS + "state", 0, 3)}, flat_action(turned(opening, "action", 6))),
        {"action": 8, OBS + "state": 4},
        None,
        False,
    ),
    "dobbe": Transform(
        fields(
            {"ee_position": cut(OBS + "state", 0, 3), "ee_rotation": euler_6d(OBS + "state", 3)},
            flat_action(turned(opening, "action", 6)),
        ),
        {"action": 7, OBS + "state": 7},
        None,
        False,
    ),
}


# --- mixtures


@dataclass(frozen=True)
class MixtureDataset:
    """One dataset of a mixture."""

    name: str  # as dataset_info.json says
    weight: float  # factor on its number of steps
    transform: str | None  # key of TRANSFORMS
    embodiment: str | None  # shipped file; None: give your own
    verified: bool
    note: str  # why something is null, or what to mind

    def __post_init__(self) -> None:
        known = TRANSFORMS.get(self.transform or "")
        problems = {
            "weight must be positive": not self.weight > 0,
            f"no transform {self.transform!r}": self.transform is not None and known is None,
            "what is null needs a note": None in (self.transform, self.embodiment) and not self.note,
            "verified differs from the transform's": self.verified != (known is not None and known.verified),
        }
        if wrong := [text for text, bad in problems.items() if bad]:
            raise ValueError(f"{self.name}: {'; '.join(wrong)}")


@dataclass(frozen=True)
class Mixture:
    """Datasets and how often each is drawn."""

    name: str
    source: str
    datasets: tuple[MixtureDataset, ...]

    def __post_init__(self) -> None:
        names = [d.name for d in self.datasets]
        if twice := sorted({n for n in names if names.count(n) > 1}):
            raise ValueError(f"datasets listed twice: {', '.join(twice)}")


def load_mixture(name_or_path: str | Path) -> Mixture:
    """Load a mixture by shipped name ("oxe_mixture") or from a YAML file.

    Raises:
        ValueError: no such file, or a dataset is unknown, listed twice or has no positive weight.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = config_folder() / "data" / f"{name_or_path}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in (config_folder() / "data").glob("*.yaml")))
        raise ValueError(f"no mixture {str(name_or_path)!r}; shipped: {known}; or give a .yaml file")
    return from_dict(Mixture, yaml.safe_load(path.read_text()), str(path))


def shares(mixture: Mixture, steps: Mapping[str, int]) -> dict[str, float]:
    """Turn a mixture's weights into `data.stores` weights, the share of samples of each dataset.

    A published weight multiplies a dataset's size; the weight of a store is the share itself.

    Args:
        mixture: its weights.
        steps: number of steps of every dataset that was converted; the others are left out.

    Raises:
        ValueError: a dataset that the mixture does not have, or an empty one.
    """
    weights = {d.name: d.weight for d in mixture.datasets}
    if odd := [name for name, count in steps.items() if name not in weights or count < 1]:
        raise ValueError(f"{', '.join(odd)}: not in the mixture {mixture.name}, or without steps")
    total = sum(weights[name] * count for name, count in steps.items())
    return {name: weights[name] * count / total for name, count in steps.items()}
