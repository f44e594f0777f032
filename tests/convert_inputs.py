"""Small inputs of each format, written without this project's code; what the converters' tests share."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numcodecs
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
import test_convert_mcap as bag
import test_convert_rlds as tfds
from PIL import Image

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


# --- LeRobot v2.1 with pictures in the tables; v3.0 and videos: test_convert_lerobot.py

ALOHA_JOINTS = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")


def png(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return file.getvalue()


def write_lerobot(root: Path, number: int, start: int) -> None:
    arrays, count = aloha_arrays(number), np.arange(length_of(number))
    vectors = {"observation.state": arrays["observations/qpos"], "action": arrays["action"]}
    table = {key: pa.FixedSizeListArray.from_arrays(values.reshape(-1), 14) for key, values in vectors.items()}
    table["observation.images.top"] = [{"bytes": png(frame), "path": None} for frame in frames_of(number)]
    table |= {"timestamp": (count / 50).astype(np.float32), "frame_index": count, "index": start + count}
    table |= {"episode_index": 0 * count + number, "task_index": 0 * count}
    pq.write_table(pa.table(table), root / f"data/chunk-000/episode_{number:06d}.parquet")
    lines = {
        "episodes": {"episode_index": number, "tasks": ["hold"], "length": len(count)},
        "episodes_stats": {"episode_index": number, "stats": {
            key: {"min": v.min(0).tolist(), "max": v.max(0).tolist(), "count": [len(v)]} for key, v in vectors.items()
        }},
    }  # fmt: skip
    for name, line in lines.items():
        with (root / f"meta/{name}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def make_lerobot(folder: Path) -> Path:
    root = folder / "set"
    (root / "meta").mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    starts = np.cumsum([0, *(length_of(number) for number in range(4))]).tolist()
    for number in range(4):
        write_lerobot(root, number, starts[number])
    (root / "meta/tasks.jsonl").write_text(json.dumps({"task_index": 0, "task": "hold"}) + "\n")
    joints = [f"{side}_{joint}" for side in ("left", "right") for joint in ALOHA_JOINTS]
    vector = {"dtype": "float32", "shape": [14], "names": {"motors": joints}}
    counters = ("timestamp", "frame_index", "episode_index", "index", "task_index")
    features = {key: {"dtype": "int64", "shape": [1], "names": None} for key in counters}
    features |= {"observation.state": vector, "action": vector}
    shape = [*frames_of(0).shape[1:]]
    features["observation.images.top"] = {"dtype": "image", "shape": shape, "names": ["height", "width", "channel"]}
    (root / "meta/info.json").write_text(json.dumps({
        "codebase_version": "v2.1", "robot_type": "aloha", "total_episodes": 4, "total_frames": starts[-1],
        "chunks_size": 1000, "fps": 50, "splits": {"train": "0:4"}, "video_path": None, "features": features,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    }))  # fmt: skip
    return root


def spoil_lerobot(path: Path) -> str:
    file = path / "data/chunk-000/episode_000002.parquet"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return "E_TRUNCATED"


# --- RLDS and bags, with the arrays of the ReplayBuffer


def make_rlds(folder: Path) -> Path:
    vector, size = tfds.tensor("float32", 4), (SIZE, SIZE + 8)
    features = tfds.schema(action=vector, observation=tfds.folder(image=tfds.image("png", size), state=vector))
    episodes = []
    for number in range(4):
        arrays = replay_arrays(number)
        values = {
            "steps/action": arrays["action"],
            "steps/observation/state": arrays["state"],
            "steps/observation/image": [png(f) for f in frames_of(number)],
        }
        episodes.append(tfds.episode(length_of(number), **values))
    return tfds.write(folder / "set/1.0.0", {"train": [episodes[:1], episodes[1:]]}, features)


def spoil_rlds(path: Path) -> str:
    shard = path / "demo-train.tfrecord-00001-of-00002"
    data = bytearray(shard.read_bytes())
    data[int.from_bytes(data[:8], "little") + 16 + 500] ^= 4  # inside its second record
    shard.write_bytes(data)
    return "E_CHECKSUM"


def make_mcap(folder: Path) -> Path:
    for number, name in enumerate(("b1", "b2", "b9", "b10")):
        arrays, names = replay_arrays(number), ["x", "y", "z", "grip"]
        sent = [bag.instruction("reach", bag.START - 10**6)]
        for i, frame in enumerate(frames_of(number)):
            stamp = bag.START + i * 12_500_000
            picture = {
                "height": SIZE, "width": SIZE + 8, "encoding": "rgb8", "is_bigendian": 0, "step": 3 * (SIZE + 8),
                "data": frame.reshape(-1),
            }  # fmt: skip
            sent.append(bag.Sent("/camera/image_raw", bag.IMAGE, stamp, picture))
            for topic, key in (("/joint_states", "state"), ("/joint_command", "action")):
                body = {"name": names, "position": arrays[key][i].astype(float)}
                empty = {"velocity": np.zeros(0), "effort": np.zeros(0)}
                sent.append(bag.Sent(topic, bag.JOINTS, stamp + 2_000_000, body | empty))
        bag.record(folder / "bags" / name, sent)
    return folder / "bags"


def spoil_mcap(path: Path) -> str:
    file = path / "b9/b9.mcap"
    file.write_bytes(file.read_bytes().replace(b"rgb8", b"mono", 1))
    return "E_SCHEMA"


CASES = {
    "rlds": Case("rlds", make_rlds, ("--embodiment", "metaworld_sawyer"), spoil_rlds, replay_action),
    "mcap": Case("mcap", make_mcap, ("--embodiment", "metaworld_sawyer"), spoil_mcap, replay_action),
    "lerobot": Case("lerobot", make_lerobot, (), spoil_lerobot, lambda number: aloha_arrays(number)["action"]),
    "robomimic": Case("robomimic", make_robomimic, (), spoil_robomimic, robomimic_action),
    "aloha": Case(
        "aloha", make_aloha, ("--instruction", "hold"), spoil_aloha, lambda number: aloha_arrays(number)["action"]
    ),
    "diffusion_policy": Case(
        "diffusion_policy", make_replay, ("--embodiment", "metaworld_sawyer", "--instruction", "reach"), spoil_replay,
        replay_action,
    ),
}  # fmt: skip
