"""robomimic, robosuite and LIBERO: HDF5 with `data/demo_<n>/{actions, obs/<key>}`, and the environment as JSON.

Facts this rests on: the rate stands in env_args.env_kwargs.control_freq, or is robosuite's default; quaternions are
xyzw; demo numbers may have gaps; masks may name absent demos; a gripper command of -1 opens. robosuite's OSC takes
commands in -1..1, scales them to output_max and adds them to the measured pose. robomimic's own frames are right side
up (seen); those that robosuite renders in its "opengl" convention, as LIBERO's, are upside down.
https://robomimic.github.io/docs/datasets/overview.html, https://robosuite.ai/docs/modules/controllers.html
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from jaxtyping import Float, UInt8

from dita.datasets.convert import hdf5
from dita.datasets.convert.base import (
    CAMERAS_OPTION,
    MIN_FRAMES,
    Item,
    Options,
    Refused,
    Rejected,
    assemble,
    check_lengths,
    fit_spec,
    list_files,
    match_cameras,
    natural,
    padded,
    refuse_to_guess,
    reject,
)
from dita.datasets.shards import difference
from dita.embodiment import embodiment_from_dict
from dita.types import CameraSpec, EmbodimentSpec, Episode, FieldSpec

OPTIONS = {
    "mask": "convert the demos of mask/<name> only, e.g. train",
    "cameras": CAMERAS_OPTION,
    "flip": "of the images: auto (default), none, vertical or rotate180",
}
FLIPS = {"none": (slice(None), slice(None)), "vertical": (slice(None, None, -1), slice(None)),
         "rotate180": (slice(None, None, -1), slice(None, None, -1))}  # fmt: skip
SPLITS = ("train", "valid", "test")  # masks that divide a data set
STATE_KEYS = ("eef_pos", "eef_quat", "gripper_qpos")  # what a state is made of, where nobody says otherwise
LIBERO_KEYS = {"ee_pos": "eef_pos", "ee_ori": "eef_quat", "gripper_states": "gripper_qpos", "joint_states": "joint_pos"}
ROBOSUITE = 1  # env_args.type
DEFAULT_HZ = 20.0  # control_freq of robosuite.make
PANDA_OPENING = 0.04  # [m] each finger's way; robosuite panda_gripper.xml
REACH = 2.0  # [m] about robosuite's origin, in which its arms work


def open_source(path: Path, embodiment: EmbodimentSpec | None, options: Options) -> RobomimicSource:
    """Open one HDF5 file or a folder of them.

    Raises:
        Rejected: nothing readable, or the embodiment cannot be inferred.
        ValueError: an unknown value of an option.
    """
    return RobomimicSource(path, embodiment, options)


@dataclass(frozen=True)
class Layout:
    """What all files of an input have in common."""

    env: Mapping[str, Any]  # env_args
    cameras: Mapping[str, tuple[int, int]]  # obs key -> (height, width)
    low_dim: Mapping[str, int]  # obs key -> size
    action_dim: int
    upside_down: bool
    skipped: tuple[str, ...]  # obs keys that are no frames and no vectors


@dataclass
class Seen:
    """Counts of what the demos have, for the layout."""

    env: dict[str, Any] = dataclass_field(default_factory=dict)
    upside_down: bool = False
    refused: Rejected | None = None  # the first one
    columns: Counter = dataclass_field(default_factory=Counter)  # of actions
    keys: dict[str, Counter] = dataclass_field(default_factory=dict)  # obs key -> (shape of a frame, NumPy kind)

    def add(self, demo: h5py.Group) -> None:
        """Count one demo."""
        actions = hdf5.member(demo, "actions", h5py.Dataset)
        obs = _observations(demo)
        self.columns[int(np.prod((actions.shape or ())[1:]))] += 1
        for key in hdf5.names(obs):
            shape, kind = _shape(obs, key)
            self.keys.setdefault(key, Counter())[shape[1:], kind] += 1

    def layout(self) -> Layout:
        """Return what at least half of the demos have."""
        if not self.columns:
            assert self.refused is not None
            raise self.refused
        demos = self.columns.total()
        usual = {key: seen.most_common(1)[0][0] for key, seen in self.keys.items() if 2 * seen.total() >= demos}
        cameras = {
            k: shape[:2] for k, (shape, kind) in usual.items() if len(shape) == 3 and shape[2] == 3 and kind == "u"
        }
        vectors = {k: int(np.prod(shape)) for k, (shape, kind) in usual.items() if len(shape) < 2 and kind in "fiub"}
        skipped = tuple(self.keys.keys() - cameras.keys() - vectors.keys())
        cameras = {key: cameras[key] for key in sorted(cameras, key=natural)}
        return Layout(self.env, cameras, vectors, self.columns.most_common(1)[0][0], self.upside_down, skipped)


@dataclass(frozen=True, eq=False)
class RawDemo:
    """One demo as it is on disk."""

    actions: Float[np.ndarray, "m c"]
    low_dim: Mapping[str, Float[np.ndarray, "m d"]]  # by obs key
    images: Mapping[str, UInt8[np.ndarray, "m h w 3"]]  # by camera name
    instruction: str
    success: bool | None


def to_episode(raw: RawDemo, spec: EmbodimentSpec, flip: str, item: Item) -> Episode:
    """Turn a raw demo into the canonical episode: SI, 6-D rotations, one opening per gripper, frames right side up."""
    rows, columns = FLIPS[flip]
    parts = [_state_field(raw.low_dim[f.name], f, item.file) for f in spec.state]
    return Episode(
        images={name: np.ascontiguousarray(frames[:, rows, columns]) for name, frames in raw.images.items()},
        state=np.concatenate(parts, axis=1),
        action=assemble(raw.actions, spec.action, "xyzw", item.file, "actions"),
        stamp=np.arange(len(raw.actions)) / spec.control_hz,
        instruction=raw.instruction,
        success=raw.success,
        source=item.id,
    )


def _state_field(values: np.ndarray, field: FieldSpec, file: str) -> np.ndarray:
    if field.kind == "gripper_position" and field.size == 1 and values.shape[1] == 2:
        values = (values[:, :1] - values[:, 1:]) / 2  # two fingers that move apart
    return assemble(values, (field,), "xyzw", file, f"obs/{field.name}")


class RobomimicSource:
    """One file or a folder of files."""

    def __init__(self, path: Path, embodiment: EmbodimentSpec | None, options: Options) -> None:
        """Use `open_source`."""
        self.warnings: list[str] = []
        self._root, self._options = path, options
        self._files = list_files(path, ".hdf5", ".h5")
        self._open: tuple[Path, h5py.File] | None = None
        flip = options.extra.get("flip", "auto")
        if flip not in ("auto", *FLIPS):
            raise ValueError(f"flip must be auto, {', '.join(FLIPS)}; got {flip!r}")
        layout = self._survey()
        self._keys = match_cameras(embodiment, list(layout.cameras), options.extra.get("cameras"), path)
        sizes = {name: layout.cameras[key] for name, key in self._keys.items()}
        hz = self._rate(layout, embodiment)
        given = embodiment is not None
        guess = embodiment if embodiment is not None else _infer(layout, hz, path)
        self.spec, notes = fit_spec(guess, sizes, hz, given=given, file=path)
        self.warnings += notes
        self._keys = {c.name: self._keys[c.name] for c in self.spec.cameras}
        self._check_fields(layout)
        self._flip, self._setup = flip, _setup(layout.env)
        if flip == "auto" and layout.upside_down and self._keys:
            self.warnings.append("frames are in robosuite's opengl convention and turned right side up; -o flip=none")
        used = {*self._keys.values(), *(f.name for f in self.spec.state)}
        if left := sorted({*layout.cameras, *layout.low_dim, *layout.skipped} - used):
            self.warnings.append(f"obs left out: {', '.join(left)}")

    def items(self) -> list[Item]:
        """List the demos of all files, in numeric order; a damaged file is one item."""
        items: list[Item] = []
        mask = self._options.extra.get("mask")
        known = False
        for path in self._files:
            name = self._name(path)
            try:
                with hdf5.refused_when_damaged(path):
                    demos, splits, masks = self._contents(path)
            except Rejected:
                items.append(Item(padded(name), name, ""))
                continue
            known |= mask in masks
            chosen = demos if mask is None else [d for d in demos if d in masks.get(mask, ())]
            for label, members in masks.items():
                if absent := sorted(members - set(demos), key=natural):
                    self.warnings.append(f"{name}: mask/{label} names {len(absent)} absent demos: {_some(absent)}")
            items += [Item(padded(f"{Path(name).with_suffix('')}/{d}"), name, d, splits[d]) for d in chosen]
        if mask is not None and not known:
            raise ValueError(f"no file of {self._root} has mask/{mask}")
        return items

    def read(self, item: Item) -> Episode:
        """Read one demo."""
        path = self._root if self._root.is_file() else self._root / item.file
        with hdf5.refused_when_damaged(path):
            return self._read(path, item)

    def _read(self, path: Path, item: Item) -> Episode:
        file = self._file(path)
        data = hdf5.group(file, "data")
        if item.key == "":
            raise Rejected("E_EMPTY", path, "", "data", "demos", "none", "remove the file")
        if (setup := _setup(_json(data.attrs.get("env_args")))) != self._setup:
            text = difference(self._setup, setup, "env_kwargs")
            todo = "convert files of another robot, controller or rate into another store"
            raise Rejected("E_SCHEMA", path, "", "env_args", "the same in all files", str(text), todo)
        if "+" in item.split:
            todo = "a test episode in the training set: remove it from one of the masks"
            raise reject("E_DUP", item, "mask", "a demo of one split", item.split, todo)
        demo = hdf5.group(data, str(item.key))
        actions = hdf5.dataset(demo, "actions", "fiu", 2)
        observed = _observations(demo)
        arrays = {key: hdf5.dataset(observed, key, "fiub") for key in (f.name for f in self.spec.state)}
        frames = {name: hdf5.dataset(observed, key, "u", 4) for name, key in self._keys.items()}
        obs = {f"obs/{key}": len(d) for key, d in arrays.items()}
        obs |= {f"obs/{self._keys[name]}": len(d) for name, d in frames.items()}
        lengths = {"actions": len(actions), **obs}
        if (declared := demo.attrs.get("num_samples")) is not None:
            lengths = {"num_samples": int(declared), **lengths}
        check_lengths(lengths, item)
        if len(actions) < MIN_FRAMES:
            raise reject("E_EMPTY", item, "", f"at least {MIN_FRAMES} frames", f"{len(actions)}", "remove the demo")
        raw = RawDemo(
            actions=hdf5.read(actions),
            low_dim={key: hdf5.read(d).reshape(len(d), -1) for key, d in arrays.items()},
            images={name: hdf5.read(d) for name, d in frames.items()},
            instruction=self._instruction(data, demo, path),
            success=_success(demo),
        )
        for name, images in raw.images.items():
            if images.dtype != np.uint8 or images.shape[3] != 3:
                found = f"{images.dtype} {list(images.shape[1:])}"
                todo = "correct or remove the episode"
                raise reject("E_SCHEMA", item, f"obs/{self._keys[name]}", "uint8 [h, w, 3]", found, todo)
        flip = self._flip if self._flip != "auto" else "vertical" if _upside_down(data) else "none"
        return to_episode(raw, self.spec, flip, item)

    def close(self) -> None:
        """Close the file that is open."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _name(self, path: Path) -> str:
        return path.name if path == self._root else path.relative_to(self._root).as_posix()

    def _file(self, path: Path) -> h5py.File:
        if self._open is None or self._open[0] != path:
            self.close()
            self._open = (path, hdf5.open_file(path, self._root))
        return self._open[1]

    def _contents(self, path: Path) -> tuple[list[str], dict[str, str], dict[str, set[str]]]:
        """Return the demos of a file, the split of each, and its masks."""
        file = self._file(path)
        demos = sorted(hdf5.names(hdf5.group(file, "data")), key=natural)
        if not demos:
            raise Rejected("E_EMPTY", path, "", "data", "demos", "none", "remove the file")
        masks: dict[str, set[str]] = {}
        for label in hdf5.names(hdf5.group(file, "mask")) if "mask" in file else []:
            members = hdf5.read(hdf5.dataset(file, f"mask/{label}", "SO", 1))
            masks[label] = {n.decode(errors="replace") if isinstance(n, bytes) else str(n) for n in members}
        return demos, {d: "+".join(s for s in SPLITS if d in masks.get(s, ())) for d in demos}, masks

    def _survey(self) -> Layout:
        """Look at every demo's keys and shapes, none of its values; what most demos have is what all must have."""
        seen = Seen()
        for path in self._files:
            try:
                with hdf5.refused_when_damaged(path):
                    demos, _, _ = self._contents(path)
                    data = hdf5.group(self._file(path), "data")
                    seen.env = seen.env or _json(data.attrs.get("env_args"))
                    seen.upside_down |= _upside_down(data)
            except Rejected as e:
                seen.refused = seen.refused or e
                continue
            for name in demos:
                try:
                    with hdf5.refused_when_damaged(path):
                        seen.add(hdf5.group(data, name))
                except Rejected as e:
                    seen.refused = seen.refused or e
        return seen.layout()

    def _rate(self, layout: Layout, embodiment: EmbodimentSpec | None) -> float:
        declared, asked = _kwargs(layout.env).get("control_freq"), self._options.control_hz
        if declared and asked and declared != asked:
            todo = "leave --control-hz out"
            raise Refused("E_STAMP", self._root, "", "control_freq", f"{asked:g} Hz", f"{declared} Hz", todo)
        for hz in (declared, self._options.control_hz, embodiment.control_hz if embodiment else None):
            if isinstance(hz, (int, float)) and 0 < hz < float("inf"):
                return float(hz)
        if layout.env.get("type") != ROBOSUITE:
            return 0.0
        self.warnings.append(f"no control_freq in env_args: {DEFAULT_HZ:g} Hz, robosuite's default; or --control-hz")
        return DEFAULT_HZ

    def _check_fields(self, layout: Layout) -> None:
        if absent := [f.name for f in self.spec.state if f.name not in layout.low_dim]:
            have = ", ".join(sorted(layout.low_dim)) or "none"
            todo = "name the embodiment's state fields as the obs keys"
            raise Rejected("E_KEY", self._root, "", "obs", ", ".join(absent), f"only {have}", todo)

    def _instruction(self, data: h5py.Group, demo: h5py.Group, path: Path) -> str:
        for values in (_json(demo.attrs.get("ep_meta")), demo.attrs, data.attrs, _json(data.attrs.get("problem_info"))):
            for key in ("lang", "language_instruction"):
                if text := _text(values.get(key)):
                    return self._options.require_instruction(path, text)
        env_name = str(_json(data.attrs.get("env_args")).get("env_name", ""))
        if self._options.instruction is None and env_name:
            words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", env_name.replace("_", " ")).lower()
            note = (
                f"no instruction in the data: the environment's name, {words!r}, is taken; better: --instruction TEXT"
            )
            if note not in self.warnings:
                self.warnings.append(note)
            return words
        return self._options.require_instruction(path)


def _infer(layout: Layout, hz: float, path: Path) -> EmbodimentSpec:
    try:
        return infer_embodiment(layout, hz, path)
    except Rejected:
        raise
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as e:  # JSON of another shape
        found = f"not as robosuite writes it: {type(e).__name__}: {e}"
        raise refuse_to_guess("robomimic", path, {"env_args": found}) from None


def _kwargs(env: Mapping[str, Any]) -> dict[str, Any]:
    found = env.get("env_kwargs")
    return found if isinstance(found, dict) else {}


def _setup(env: Mapping[str, Any]) -> dict[str, Any]:
    """Return what says how numbers are meant: robots, their controllers, the rate."""
    return {key: _kwargs(env).get(key) for key in ("robots", "controller_configs", "control_freq")}


def _upside_down(data: h5py.Group) -> bool:
    return _text(data.attrs.get("macros_image_convention")) == "opengl"


def infer_embodiment(layout: Layout, hz: float, path: Path) -> EmbodimentSpec:
    """Build the embodiment that env_args and the obs keys describe: Panda arms under OSC or joint control.

    Raises:
        Rejected: E_SCHEMA, listing what is missing.
    """
    kwargs = _kwargs(layout.env)
    robots = [kwargs["robots"]] if isinstance(kwargs.get("robots"), str) else list(kwargs.get("robots", []))
    missing = {}
    if not layout.env or not kwargs:
        missing["env_args"] = "no environment in data's attributes"
    if not hz:
        missing["control_freq"] = "not in env_args; --control-hz helps"
    if kwargs and set(robots) != {"Panda"}:
        missing["robots"] = f"{', '.join(map(str, robots)) or 'none'}: only Panda's gripper is known"
    keys = _state_keys(layout.low_dim, len(robots))
    if not keys:
        missing["state"] = f"no {' or '.join(STATE_KEYS)} among obs {', '.join(sorted(layout.low_dim)) or 'none'}"
    actions = _action_fields(_controllers(kwargs, len(robots)), layout.action_dim)
    if not actions:
        missing["actions"] = f"{layout.action_dim} columns; the controller in env_args does not explain them"
    if missing:
        raise refuse_to_guess("robomimic", path, missing)
    libero = any(key in LIBERO_KEYS for key, _, _ in keys)
    values = {
        "name": "_".join(["libero" if libero else "robosuite", *(r.lower() for r in robots)]),
        "robot": f"{' and '.join(['Franka Panda'] * len(robots))} in "
        f"{'LIBERO (robosuite, MuJoCo)' if libero else 'robosuite (MuJoCo)'}",
        "state": [_state_spec(key, kind, layout.low_dim[key], arm) for key, kind, arm in keys],
        "action": actions,
        "cameras": [],
        "obs_dt": 1 / hz,
        "action_dt": 1 / hz,
        "control_hz": hz,
        "limits": None,
    }
    spec = embodiment_from_dict(values, where=str(path))
    known = ("agentview_image", "agentview_rgb", "robot0_eye_in_hand_image", "eye_in_hand_rgb")
    order = sorted(layout.cameras, key=lambda n: (known.index(n) if n in known else len(known), natural(n)))
    cameras = tuple(CameraSpec(n, *layout.cameras[n], i) for i, n in enumerate(order))
    return EmbodimentSpec(**{**spec.__dict__, "cameras": cameras})


def _state_keys(low_dim: Mapping[str, int], arms: int) -> list[tuple[str, str, int]]:
    """Return (obs key, what it is, arm) of the state: hand and gripper of each arm, else its joints."""
    found = []
    for arm in range(arms):
        names = {kind: f"robot{arm}_{kind}" for kind in (*STATE_KEYS, "joint_pos")}
        libero = {kind: key for key, kind in LIBERO_KEYS.items() if arm == 0}
        keys = {kind: next((k for k in (names[kind], libero.get(kind)) if k in low_dim), None) for kind in names}
        hand = [(keys[kind], kind, arm) for kind in STATE_KEYS if keys[kind]]
        joints = [(keys["joint_pos"], "joint_pos", arm)] if keys["joint_pos"] and not keys["eef_pos"] else []
        found += joints + hand
    return found


def _state_spec(key: str, kind: str, size: int, arm: int) -> dict[str, Any]:
    at = 20 * arm  # slots: hand 0..8, gripper 9, joints 10..16, then the next arm
    if kind == "eef_pos":
        return field(key, "ee_position", 3, "m", "base", at, [-REACH] * 2 + [-0.5], [REACH] * 2 + [2.5])
    if kind == "eef_quat":
        return field(key, "ee_rotation_6d", 6, "1", "base", at + 3, [-1.0] * 6, [1.0] * 6)
    if kind == "gripper_qpos":
        return field(key, "gripper_position", 1, "1", "none", at + 9, [0.0], [1.0], scale=1 / PANDA_OPENING)
    return field(key, "joint_position", size, "rad", "joint", at + 10, [-3.8] * size, [3.8] * size)


def _controllers(kwargs: Mapping[str, Any], arms: int) -> list[Mapping[str, Any]]:
    """Return the controller of each arm; robosuite 1.5 has it inside `body_parts`, 1.4 as it is."""
    configs = kwargs.get("controller_configs")
    configs = configs if isinstance(configs, list) else [configs] * arms
    parts = [c.get("body_parts", {"right": c}) if isinstance(c, dict) else {} for c in configs]
    parts = [p.get("arms", p) for p in parts]
    if len(parts) != arms or any(list(p) != ["right"] for p in parts):
        return []
    return [p["right"] for p in parts]


def _action_fields(controllers: list[Mapping[str, Any]], columns: int) -> list[dict[str, Any]]:
    """Return the action fields: hand or joints and a gripper per arm; [] if they do not explain the columns."""
    fields: list[dict[str, Any]] = []
    for arm, c in enumerate(controllers):
        kind, delta = c.get("type"), c.get("input_type", "delta") == "delta" and c.get("control_delta", True)
        # "achieved" is robosuite's default: the goal is the measured pose plus the command
        reference = "commanded" if c.get("goal_update_mode") in ("desired", "target") else "measured"
        arms, at, prefix = columns / max(len(controllers), 1), 20 * arm, f"robot{arm}_"
        if kind in ("OSC_POSE", "OSC_POSITION") and delta:
            scales = [_scale(c, slice(0, 3)), _scale(c, slice(3, 6)) if kind == "OSC_POSE" else 1.0]
            if None in scales:
                return []
            names = (("ee_position", "m", scales[0]), ("ee_rotation_axis_angle", "rad", scales[1]))
            for i, (name, unit, scale) in enumerate(names[: 2 if kind == "OSC_POSE" else 1]):
                label = f"{prefix}{('position', 'rotation')[i]}_delta"
                bound = [float(scale or 0)] * 3
                low = [-b for b in bound]
                fields.append(field(label, name, 3, unit, "base", at + 3 * i, low, bound, scale, reference))
        elif kind == "OSC_POSE":
            high = [REACH, REACH, 2.5]
            fields.append(field(f"{prefix}position", "ee_position", 3, "m", "base", at, [-REACH, -REACH, -0.5], high))
            fields.append(field(f"{prefix}rotation", "ee_rotation_6d", 6, "1", "base", at + 14, [-1.0] * 6, [1.0] * 6))
        elif kind in ("JOINT_POSITION", "JOINT_VELOCITY") and arms == int(arms):
            joints, velocity = int(arms) - 1, kind == "JOINT_VELOCITY"
            scale = _scale(c, slice(None)) if delta or velocity else 1.0
            if scale is None:
                return []
            bound = [scale if delta or velocity else 3.8] * joints
            name, unit = ("joint_velocity", "rad/s") if velocity else ("joint_position", "rad")
            ref = reference if delta and not velocity else None
            low = [-b for b in bound]
            fields.append(field(f"{prefix}joints", name, joints, unit, "joint", at + 7, low, bound, scale, ref))
        else:
            return []
        fields.append(field(f"{prefix}gripper", "gripper_effort", 1, "1", "none", at + 6, [-1.0], [1.0], scale=-1.0))
    # an absolute rotation has three columns in the data
    expected = sum(3 if f["kind"] == "ee_rotation_6d" else f["size"] for f in fields)
    return fields if expected == columns else []


def _scale(controller: Mapping[str, Any], dims: slice) -> float | None:
    """Return SI per unit of command, if it is one number for these dims and symmetric about zero."""
    values = [np.atleast_1d(np.array(controller.get(k, np.nan), float)) for k in
              ("input_max", "input_min", "output_max", "output_min")]  # fmt: skip
    size = max(map(len, values))
    if any(len(v) not in (1, size) for v in values):
        return None
    i_max, i_min, o_max, o_min = (np.broadcast_to(v, max(size, 6))[dims] if len(v) == 1 else v[dims] for v in values)
    if not (np.all(i_max == -i_min) and np.all(o_max == -o_min) and np.ptp(o_max / i_max) == 0 and o_max[0] > 0):
        return None
    return float(o_max[0] / i_max[0])


def field(
    name: str, kind: str, size: int, unit: str, frame: str, slot: int, low: list[float], high: list[float],
    scale: float | None = 1.0, reference: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Return one field of an embodiment as plain values."""
    mode = "delta" if reference else "absolute"
    return {"name": name, "kind": kind, "size": size, "unit": unit, "frame": frame, "mode": mode,
            "reference": reference, "scale": scale, "slot": slot, "low": low, "high": high}  # fmt: skip


def _observations(demo: h5py.Group) -> h5py.Group:
    if "obs" not in demo and "states" in demo:
        todo = "a raw recording holds simulator states only: run robomimic's dataset_states_to_obs.py on it first"
        key, found = f"{demo.name}/obs", f"only {', '.join(hdf5.names(demo))}"
        raise Rejected("E_KEY", str(demo.file.filename), "", key, "observations", found, todo)
    return hdf5.group(demo, "obs")


def _success(demo: h5py.Group) -> bool | None:
    for key in ("dones", "rewards"):
        try:
            values = hdf5.read(hdf5.dataset(demo, key, "fiub", 1))
        except Rejected:
            continue
        if len(values) and values.max() >= 1:
            return True
    return None  # nothing says that it failed


def _shape(obs: h5py.Group, key: str) -> tuple[tuple[int, ...], str]:
    """Return shape and NumPy kind of a dataset; nothing for links and groups."""
    try:
        data = hdf5.member(obs, key, h5py.Dataset)
    except Rejected:
        return (), "-"
    return data.shape or (), data.dtype.kind


def _json(value: Any) -> dict[str, Any]:
    try:
        found = json.loads(_text(value) or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (list, tuple)):  # LIBERO keeps some instructions as single letters
        return "".join(map(str, value)).strip('" ')
    return value.strip('" ') if isinstance(value, str) else ""


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
