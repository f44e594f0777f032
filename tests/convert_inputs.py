"""Small inputs of each format, written without this project's code; what the converters' tests share."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numcodecs
import numpy as np
import simplejpeg

SIZE = 16
ENV_ARGS = {
    "env_name": "NutAssemblySquare", "type": 1, "env_version": "1.4.1",
    "env_kwargs": {
        "robots": ["Panda"], "control_freq": 20, "camera_names": ["agentview"],
        "controller_configs": {
            "type": "OSC_POSE", "input_max": 1, "input_min": -1, "output_max": [0.05] * 3 + [0.5] * 3,
            "output_min": [-0.05] * 3 + [-0.5] * 3, "control_delta": True,
        },
    },
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One source's way through the contract suite: an input of four episodes, and how to spoil the third."""

    source: str
    make: Callable[[Path], Path]  # writes below a folder, returns IN
    args: tuple[str, ...]
    spoil: Callable[[Path], str]  # damages episode 2 of 0..3, returns the code it gets
    action: Callable[[int], np.ndarray]  # of episode i as it must come out, SI


def rng_of(number: int) -> np.random.Generator:
    return np.random.default_rng([7, number])


def length_of(number: int) -> int:
    return 5 + number


def frames_of(number: int, camera: int = 0) -> np.ndarray:
    shape = (length_of(number), SIZE, SIZE + 8, 3)
    return np.random.default_rng([8, number, camera]).integers(0, 256, shape, np.uint8)


# --- robomimic


def demo_arrays(number: int) -> dict[str, Any]:
    rng, n = rng_of(number), length_of(number)
    quat = rng.normal(size=(n, 4))
    finger = rng.uniform(0.001, 0.039, n)
    return {
        "actions": np.concatenate([rng.uniform(-1, 1, (n, 6)), rng.choice([-1.0, 1.0], (n, 1))], axis=1),
        "obs/robot0_eef_pos": rng.uniform(-0.5, 0.5, (n, 3)),
        "obs/robot0_eef_quat": quat / np.linalg.norm(quat, axis=1, keepdims=True),
        "obs/robot0_gripper_qpos": np.stack([finger, -finger], axis=1),
        "obs/object": rng.normal(size=(n, 5)),
        "obs/agentview_image": frames_of(number),
    }


def write_demo(file: h5py.File, name: str, arrays: dict[str, Any], **options: Any) -> h5py.Group:
    demo = file.create_group(f"data/{name}")
    demo.attrs["num_samples"] = len(arrays["actions"])
    for key, values in arrays.items():
        demo.create_dataset(key, data=values, **options)
    return demo


def make_robomimic(folder: Path, names: tuple[str, ...] = ("demo_1", "demo_2", "demo_9", "demo_10")) -> Path:
    path = folder / "set.hdf5"
    with h5py.File(path, "w") as file:
        for number, name in enumerate(names):
            write_demo(file, name, demo_arrays(number))
        file["data"].attrs["env_args"] = json.dumps(ENV_ARGS)
    return path


def spoil_robomimic(path: Path) -> str:
    with h5py.File(path, "r+") as file:
        file["data/demo_9/obs/robot0_eef_pos"][2, 1] = np.nan
    return "E_VALUE"


def robomimic_action(number: int) -> np.ndarray:
    return demo_arrays(number)["actions"] * ([0.05] * 3 + [0.5] * 3 + [-1.0])


# --- ALOHA


def aloha_arrays(number: int) -> dict[str, Any]:
    rng, n = rng_of(number), length_of(number)
    qpos = rng.uniform(0.1, 0.9, (n, 14))
    return {
        "action": (qpos + 0.01).astype(np.float32),
        "observations/qpos": qpos.astype(np.float32),
        "observations/qvel": np.zeros((n, 14), np.float32),
        "observations/images/top": frames_of(number),
        "observations/images/angle": frames_of(number, 1),
    }


def write_aloha(path: Path, arrays: dict[str, Any]) -> None:
    with h5py.File(path, "w") as file:
        file.attrs["sim"] = True
        for key, values in arrays.items():
            file.create_dataset(key, data=values)


def make_aloha(folder: Path) -> Path:
    (folder / "episodes").mkdir()
    for number, name in enumerate(("episode_0", "episode_1", "episode_9", "episode_10")):
        write_aloha(folder / "episodes" / f"{name}.hdf5", aloha_arrays(number))
    return folder / "episodes"


def spoil_aloha(path: Path) -> str:
    file = path / "episode_9.hdf5"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return "E_TRUNCATED"


def padded_jpegs(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Encode as ACT's recorder does: RGB handed to an encoder that takes it for BGR, rows padded to one length."""
    # RGB planes named BGR: what cv2.imencode does to an RGB array
    jpegs = [simplejpeg.encode_jpeg(np.ascontiguousarray(f), 95, "BGR", "444") for f in frames]
    lengths = np.array([len(j) for j in jpegs])
    rows = np.zeros((len(jpegs), lengths.max()), np.uint8)
    for row, jpeg in zip(rows, jpegs, strict=True):
        row[: len(jpeg)] = np.frombuffer(jpeg, np.uint8)
    return rows, lengths


# --- diffusion_policy: Zarr v2 by hand


def write_zarr2(folder: Path, name: str, values: np.ndarray, chunk: int, codec: Any = None) -> None:
    path = folder / name
    path.mkdir(parents=True)
    chunks = (chunk, *values.shape[1:])
    config = None if codec is None else codec.get_config()
    (path / ".zarray").write_text(json.dumps({
        "zarr_format": 2, "shape": values.shape, "chunks": chunks, "dtype": values.dtype.str, "compressor": config,
        "fill_value": 0, "order": "C", "filters": None,
    }))  # fmt: skip
    for i in range(0, len(values), chunk):
        block = np.zeros(chunks, values.dtype)
        part = values[i : i + chunk]
        block[: len(part)] = part
        data = block.tobytes() if codec is None else codec.encode(block.tobytes())
        (path / ".".join([str(i // chunk), *["0"] * (values.ndim - 1)])).write_bytes(data)


def replay_arrays(number: int) -> dict[str, np.ndarray]:
    rng, n = rng_of(number), length_of(number)
    position = rng.uniform([-0.3, 0.4, 0.1], [0.3, 0.8, 0.3], (n, 3))
    return {
        "state": np.concatenate([position, rng.uniform(0, 1, (n, 1))], axis=1).astype(np.float32),
        "action": rng.uniform(-1, 1, (n, 4)).astype(np.float32),
        "img": frames_of(number).astype(np.float32),
    }


def make_replay(folder: Path, codec: Any = None) -> Path:
    path = folder / "buffer.zarr"
    codec = codec or numcodecs.Blosc("zstd", 5, 2)
    episodes = [replay_arrays(number) for number in range(4)]
    for key in ("state", "action", "img"):
        write_zarr2(path, f"data/{key}", np.concatenate([e[key] for e in episodes]), 4, codec)
    ends = np.cumsum([len(e["action"]) for e in episodes])
    write_zarr2(path, "meta/episode_ends", ends, len(ends), codec)
    for group in (path, path / "data", path / "meta"):
        (group / ".zgroup").write_text('{"zarr_format": 2}')
    return path


def spoil_replay(path: Path) -> str:
    (path / "data/img/3.0.0.0").unlink()  # frames 12..15, inside episode 2 only
    return "E_CHUNK_MISSING"


def replay_action(number: int) -> np.ndarray:
    return replay_arrays(number)["action"] * [0.01, 0.01, 0.01, -1.0]


CASES = {
    "robomimic": Case("robomimic", make_robomimic, (), spoil_robomimic, robomimic_action),
    "aloha": Case(
        "aloha", make_aloha, ("--instruction", "hold"), spoil_aloha, lambda number: aloha_arrays(number)["action"]
    ),
    "diffusion_policy": Case(
        "diffusion_policy", make_replay, ("--embodiment", "metaworld_sawyer", "--instruction", "reach"), spoil_replay,
        replay_action,
    ),
}  # fmt: skip
