"""LeRobot read without lerobot: parity with what it wrote, and one code per malformed input.

The small inputs are written here with pyarrow and PyAV: both versions, both media, several files per chunk, episodes
that begin in the middle of a file.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import embodiment_dict, field
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dita.cli import main
from dita.datasets.convert import lerobot
from dita.datasets.convert.base import Item, Options, Refused, Rejected, check, safe_path
from dita.datasets.convert.lerobot import Layout, Raw, match_fields, open_source, to_episode
from dita.datasets.convert.lerobot_meta import Feature, fill
from dita.datasets.convert.video import read_frames
from dita.datasets.store import Store
from dita.embodiment import embodiment_from_dict, embodiment_to_dict, load_embodiment
from dita.types import EmbodimentSpec

REFERENCE = Path(__file__).parents[1] / "../shared/reference/datasets"
SETS = ["lerobot_v21_image", "lerobot_v21_video", "lerobot_v30_image", "lerobot_v30_video"]
H, W, FPS = 64, 96, 10
LENGTHS = (7, 5, 9, 6)
FILES = (0, 0, 1, 1)  # v3.0: the data file of each episode
CLIPS = (0, 1, 1, 1)  # v3.0: its mp4
TASKS = ("pick up the cube", "open the drawer")
NAMES = ["shoulder.pos", "elbow.pos", "gripper.pos"]
CAMERA = "observation.images.top"
DEGREE = math.pi / 180
TWO_CAMERAS = [{"name": name, "height": H, "width": W, "slot": i} for i, name in enumerate(("top", "wrist"))]
ITEM = Item("episode_000000", "data/x.parquet", 0)


# --- a writer of its own


@dataclass(frozen=True, eq=False)
class Made:
    """What was written: the data set's folder, and each episode as it must come out."""

    root: Path
    state: list[np.ndarray]
    action: list[np.ndarray]
    frames: list[np.ndarray]

    def tasks(self, i: int) -> str:
        return TASKS[i % 2]


def make(root: Path, version: str, media: str, codec: str = "libx264", faststart: bool = True) -> Made:
    rng = np.random.default_rng([5, LENGTHS[0]])
    state = [rng.uniform(-90, 90, (n, 3)).astype(np.float32) for n in LENGTHS]
    action = [rng.uniform(-90, 90, (n, 3)).astype(np.float32) for n in LENGTHS]
    for measured, commanded in zip(state, action, strict=True):
        measured[:, 2] = rng.uniform(0, 100, len(measured))
        commanded[:, 2] = np.roll(measured[:, 2], -1)  # the gripper follows its command
    frames = [np.stack([picture(i, k) for k in range(n)]) for i, n in enumerate(LENGTHS)]
    made = Made(root, state, action, frames)
    (root / "meta").mkdir(parents=True)
    v3 = version == "v3.0"
    starts = np.cumsum([0, *LENGTHS])
    tables = [rows(made, i, int(starts[i]), media) for i in range(len(LENGTHS))]
    if v3:
        for f in sorted(set(FILES)):
            write(root / f"data/chunk-000/file-{f:03d}.parquet", pick(tables, FILES, f))
    else:
        for i, table in enumerate(tables):
            write(root / f"data/chunk-{i // 2:03d}/episode_{i:06d}.parquet", [table])
    if media == "video":
        clips = [pick(frames, CLIPS, c) for c in (0, 1)] if v3 else [[f] for f in frames]
        for i, parts in enumerate(clips):
            name = f"videos/{CAMERA}/chunk-000/file-{i:03d}.mp4" if v3 else v21_video(i)
            encode(root / name, np.concatenate(parts), codec, faststart)
    (write_meta_v30 if v3 else write_meta_v21)(made, starts, media)
    write_json(root / "meta/info.json", info(version, media))
    return made


def pick(values: list, files: tuple[int, ...], file: int) -> list:
    return [v for v, f in zip(values, files, strict=True) if f == file]


def v21_video(i: int) -> str:
    return f"videos/chunk-{i // 2:03d}/{CAMERA}/episode_{i:06d}.mp4"


def picture(episode: int, frame: int) -> np.ndarray:
    """A frame that tells its episode (top half) and its number (bottom half), coarse enough for a lossy codec."""
    image = np.full((H, W, 3), 20, np.uint8)
    image[: H // 2, : W // 2] = 40 + 50 * episode
    image[H // 2 :, : W // 2] = 40 + 20 * frame
    return image


def read_picture(image: np.ndarray) -> tuple[int, int]:
    top, bottom = (image[rows, 8 : W // 2 - 8].mean() for rows in (slice(8, H // 2 - 8), slice(H // 2 + 8, H - 8)))
    return round((top - 40) / 50), round((bottom - 40) / 20)


def rows(made: Made, i: int, start: int, media: str) -> pa.Table:
    n = LENGTHS[i]
    count = np.arange(n)
    columns = {
        "observation.state": pa.FixedSizeListArray.from_arrays(pa.array(made.state[i].reshape(-1)), 3),
        "action": pa.FixedSizeListArray.from_arrays(pa.array(made.action[i].reshape(-1)), 3),
        "next.success": pa.array(count == n - 1 if i == 0 else np.zeros(n, bool)),
        "timestamp": pa.array((count / FPS).astype(np.float32)),
        "frame_index": pa.array(count),
        "episode_index": pa.array(np.full(n, i)),
        "index": pa.array(start + count),
        "task_index": pa.array(np.full(n, i % 2)),
    }
    if media == "image":
        pictures = [{"bytes": png(image), "path": f"frame_{k:06d}.png"} for k, image in enumerate(made.frames[i])]
        columns[CAMERA] = pa.array(pictures, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    return pa.table(columns)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def write(path: Path, tables: list[pa.Table]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)


def encode(path: Path, frames: np.ndarray, codec: str = "libx264", faststart: bool = True) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"movflags": "faststart"} if faststart else {}) as container:
        stream = container.add_stream(codec, rate=FPS, options={"g": "4", "crf": "20"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())


def statistics(made: Made, i: int) -> dict:
    values = {"observation.state": made.state[i], "action": made.action[i]}
    return {k: {"min": v.min(0).tolist(), "max": v.max(0).tolist(), "count": [len(v)]} for k, v in values.items()}


def write_meta_v21(made: Made, starts: np.ndarray, media: str) -> None:
    lines = [{"episode_index": i, "tasks": [made.tasks(i)], "length": n} for i, n in enumerate(LENGTHS)]
    write_lines(made.root / "meta/episodes.jsonl", lines)
    write_lines(made.root / "meta/tasks.jsonl", [{"task_index": i, "task": t} for i, t in enumerate(TASKS)])
    stats = [{"episode_index": i, "stats": statistics(made, i)} for i in range(len(LENGTHS))]
    write_lines(made.root / "meta/episodes_stats.jsonl", stats)


def write_meta_v30(made: Made, starts: np.ndarray, media: str) -> None:
    entries = []
    for i, n in enumerate(LENGTHS):
        entry = {
            "episode_index": i, "tasks": [made.tasks(i)], "length": n, "data/chunk_index": 0,
            "data/file_index": FILES[i], "dataset_from_index": int(starts[i]), "dataset_to_index": int(starts[i + 1]),
        }  # fmt: skip
        if media == "video":
            before = sum(LENGTHS[k] for k in range(i) if CLIPS[k] == CLIPS[i])
            entry |= {f"videos/{CAMERA}/chunk_index": 0, f"videos/{CAMERA}/file_index": CLIPS[i]}
            entry[f"videos/{CAMERA}/from_timestamp"] = before / FPS
            entry[f"videos/{CAMERA}/to_timestamp"] = (before + n) / FPS
        for key, stats in statistics(made, i).items():
            entry |= {f"stats/{key}/{name}": values for name, values in stats.items()}
        entries.append(entry)
    for f in (0, 1):  # two files of metadata
        table = pa.Table.from_pylist(entries[2 * f : 2 * f + 2])
        write(made.root / f"meta/episodes/chunk-000/file-{f:03d}.parquet", [table])
    tasks = pa.table({"task_index": [0, 1], "__index_level_0__": list(TASKS)})
    pq.write_table(tasks, made.root / "meta/tasks.parquet")
    whole = {"observation.state": np.concatenate(made.state), "action": np.concatenate(made.action)}
    stats = {k: {"min": v.min(0).tolist(), "max": v.max(0).tolist(), "count": [len(v)]} for k, v in whole.items()}
    write_json(made.root / "meta/stats.json", stats)


def info(version: str, media: str) -> dict:
    def scalar(dtype: str) -> dict:
        return {"dtype": dtype, "shape": [1], "names": None}

    v3 = version == "v3.0"
    features = {
        "observation.state": {"dtype": "float32", "shape": [3], "names": NAMES},
        "action": {"dtype": "float32", "shape": [3], "names": {"motors": NAMES}},
        "next.success": scalar("bool"), "timestamp": scalar("float32"),
        **{key: scalar("int64") for key in ("frame_index", "episode_index", "index", "task_index")},
        CAMERA: {"dtype": media, "shape": [H, W, 3], "names": ["height", "width", "channels"]},
    }  # fmt: skip
    paths = ("data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
             "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4") if v3 else (
             "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
             "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4")  # fmt: skip
    return {
        "codebase_version": version, "robot_type": "so100", "total_episodes": len(LENGTHS),
        "total_frames": sum(LENGTHS), "total_tasks": len(TASKS), "chunks_size": 1000 if v3 else 2, "fps": FPS,
        "splits": {"train": "0:3", "val": "3:4"}, "data_path": paths[0],
        "video_path": paths[1] if media == "video" else None, "features": features,
    }  # fmt: skip


def write_json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values))


def write_lines(path: Path, lines: list[dict]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def arm(**changes) -> EmbodimentSpec:
    def joints() -> list[dict]:
        angle = {"unit": "rad", "frame": "joint", "scale": DEGREE}
        grip = {"unit": "1", "frame": "none", "scale": 0.01, "low": [0.0], "high": [1.0]}
        return [
            field("shoulder", "joint_position", 1, 0, bound=2.0) | angle,
            field("elbow", "joint_position", 1, 1, bound=2.0) | angle,
            field("gripper", "gripper_position", 1, 2) | grip,
        ]

    values = embodiment_dict("arm") | {"state": joints(), "action": joints(), "control_hz": FPS, "action_dt": 1 / FPS}
    values["cameras"] = [{"name": "top", "height": H, "width": W, "slot": 0}]
    return embodiment_from_dict(values | {"obs_dt": 1 / FPS} | changes)


def opened(root: Path, spec: EmbodimentSpec | None = None, **extra: str) -> lerobot.LeRobotSource:
    return open_source(root, spec or arm(), Options(None, None, extra))


def episodes(found: dict[str, Rejected | None]) -> dict[str, Rejected]:
    """The episodes that are refused, without the files that contradict them."""
    return {name: e for name, e in found.items() if e is not None and name.startswith("episode_")}


def outcomes(root: Path) -> dict[str, Rejected | None]:
    """Read every item: id -> None, or why it is refused."""
    source = opened(root)
    found: dict[str, Rejected | None] = {}
    for item in source.items():
        assert item.id not in found
        try:
            check(source.read(item), source.spec, item)
            found[item.id] = None
        except Rejected as e:
            found[item.id] = e
    return found


def episode(i: int) -> str:
    return f"episode_{i:06d}"


# --- what is right


@pytest.mark.parametrize("name", SETS)
def test_parity_with_what_lerobot_wrote(name: str) -> None:
    if not (folder := REFERENCE / name).is_dir():
        pytest.skip("no reference data")
    expected = json.loads((folder / "expected.json").read_text())
    source = open_source(folder / "dataset", None, Options(None, None, {}))
    items = source.items()
    assert len(items) == expected["num_episodes"] and source.info.fps == expected["fps"]
    assert {c.name: [c.height, c.width, 3] for c in source.spec.cameras} == {
        lerobot.camera_name(key): size for key, size in expected["cameras"].items()
    }
    scale = np.repeat([f.scale for f in source.spec.action], [f.size for f in source.spec.action])
    for item, wanted in zip(items, expected["episodes"], strict=True):
        raw = source.read_raw(int(item.key))
        assert (len(raw.stamp), raw.task) == (wanted["frames"], wanted["instruction"])
        assert (raw.action.shape[1], raw.state.shape[1]) == (wanted["action_dim"], wanted["state_dim"])
        for values, key in ((raw.action, "action"), (raw.state, "state")):
            assert values[0].tolist() == wanted[f"{key}_first"] and values[-1].tolist() == wanted[f"{key}_last"]
            assert values.sum() == pytest.approx(wanted[f"{key}_sum"], rel=1e-12)
        np.testing.assert_allclose(raw.action.sum(0), wanted["action_sum_per_dim"], rtol=1e-12, atol=1e-12)
        for key, camera in wanted["cameras"].items():
            for at, frame in (("first", raw.images[key][0]), ("last", raw.images[key][-1])):
                if f"{at}_sha256" in camera:
                    assert hashlib.sha256(frame.tobytes()).hexdigest() == camera[f"{at}_sha256"]
                tolerance = camera.get("mean_rgb_tolerance", 1e-3)
                np.testing.assert_allclose(frame.mean((0, 1)), camera[f"{at}_mean_rgb"], atol=tolerance)
        canonical = source.read(item)
        check(canonical, source.spec, item)
        np.testing.assert_array_equal(canonical.action, (raw.action * scale).astype(np.float32))
        np.testing.assert_array_equal(canonical.state, raw.state.astype(np.float32))


def test_the_inferred_embodiment_is_meta_worlds() -> None:
    if not (folder := REFERENCE / "lerobot_v30_video").is_dir():
        pytest.skip("no reference data")
    source = open_source(folder / "dataset", None, Options(None, None, {}))
    shipped = load_embodiment("metaworld_sawyer")
    assert (source.spec.name, source.spec.action) == (shipped.name, shipped.action)
    assert (source.spec.control_hz, source.spec.action_dt, source.spec.obs_dt) == (20, 0.05, 0.05)
    assert any("metaworld_sawyer" in text for text in source.warnings)
    assert any("next.reward, next.done" in text for text in source.warnings)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
@pytest.mark.parametrize(("media", "codec"), [("image", ""), ("video", "libx264"), ("video", "libsvtav1")])
def test_every_value_comes_out(tmp_path: Path, version: str, media: str, codec: str) -> None:
    made = make(tmp_path / "set", version, media, codec)
    source = opened(made.root)
    items = source.items()
    assert [(i.id, i.split) for i in items] == [(episode(i), "val" if i == 3 else "train") for i in range(4)]
    for i, item in enumerate(items):
        got = source.read(item)
        assert check(got, source.spec, item) == []
        assert (got.instruction, got.success, got.source) == (made.tasks(i), i == 0, item.id)
        scale = np.array([DEGREE, DEGREE, 0.01])
        np.testing.assert_array_equal(got.state, (made.state[i].astype(np.float64) * scale).astype(np.float32))
        np.testing.assert_array_equal(got.action, (made.action[i].astype(np.float64) * scale).astype(np.float32))
        np.testing.assert_array_equal(got.stamp, (np.arange(LENGTHS[i]) / FPS).astype(np.float32))
        if media == "image":
            np.testing.assert_array_equal(got.images["top"], made.frames[i])
        assert [read_picture(f) for f in got.images["top"]] == [(i, k) for k in range(LENGTHS[i])]
    assert source.warnings == []


def test_a_duplicate_tree_of_images_is_ignored(tmp_path: Path) -> None:
    made = make(tmp_path / "set", "v2.1", "image")
    folder = made.root / f"images/{CAMERA}/episode_000000"
    folder.mkdir(parents=True)
    (folder / "frame_000000.png").write_bytes(b"not even a picture")
    assert list(outcomes(made.root).values()) == [None] * 4


def test_joints_are_reordered_by_name_only(tmp_path: Path) -> None:
    made = make(tmp_path / "set", "v3.0", "image")
    values = embodiment_to_dict(arm())
    values["state"] = values["state"][::-1]
    source = opened(made.root, embodiment_from_dict(values))
    got = source.read(source.items()[1])
    expected = made.state[1].astype(np.float64)[:, ::-1] * [0.01, DEGREE, DEGREE]
    np.testing.assert_array_equal(got.state, expected.astype(np.float32))
    assert "observation.state reordered by name: gripper.pos -> gripper" in source.warnings[0]
    feature = Feature("action", "float32", (3,), ("shoulder.pos", "elbow.pos", "wrist.pos"))
    with pytest.raises(Rejected, match=r"E_JOINTS: x: action: expected shoulder, elbow, gripper, found .*missing"):
        match_fields(arm().action, feature, "action", None, Path("x"))
    group = embodiment_dict()["action"]  # a group of three and a gripper: names cannot be compared, sizes can
    fields = embodiment_from_dict(embodiment_dict() | {"action": group}).action
    with pytest.raises(Refused, match=r"E_JOINTS: .*expected delta\[3\], grip\[1\], found 3: shoulder"):
        match_fields(fields, feature, "action", None, Path("x"))


def test_rotations_come_as_the_data_have_them() -> None:
    pose = [
        field("hand", "ee_position", 3, 0),
        field("turn", "ee_rotation_6d", 6, 3),
        field("g", "gripper_binary", 1, 9),
    ]
    spec = embodiment_from_dict(embodiment_dict() | {"state": pose, "action": pose})
    quaternion = Feature("s", "float32", (8,), ())
    with pytest.raises(Refused, match=r"E_SCHEMA: .*expected -o quaternion=wxyz or xyzw"):
        match_fields(spec.state, quaternion, "s", None, Path("x"))
    order = match_fields(spec.state, quaternion, "s", "xyzw", Path("x"))
    assert match_fields(spec.state, Feature("s", "float32", (7,), ()), "s", None, Path("x")) == list(range(7))
    values = np.array([[0.1, 0.2, 0.3, 0.0, 0.0, math.sqrt(0.5), -math.sqrt(0.5), 1.0]])  # -90 degrees about z
    got = to_episode(Raw({}, values, values, np.zeros(1), "go", None), Layout(spec, {}, order, order, "xyzw"), ITEM)
    np.testing.assert_allclose(got.state, [[0.1, 0.2, 0.3, 0, -1, 0, 1, 0, 0, 1]], atol=1e-7)


def test_the_pure_function_maps_names_and_units() -> None:
    raw = Raw(
        {"observation.images.a": np.full((2, 4, 4, 3), 7, np.uint8)},
        np.array([[90.0, 50.0], [180.0, 100.0]]), np.array([[1.0], [2.0]]), np.array([0.0, 0.1]), "go", None,
    )  # fmt: skip
    spec = embodiment_from_dict(
        embodiment_dict()
        | {
            "state": [
                field("g", "gripper_position", 1, 0) | {"scale": -0.01},
                field("j", "joint_position", 1, 1) | {"scale": DEGREE},
            ],
            "action": [field("v", "joint_velocity", 1, 0) | {"scale": 0.5}],
        }
    )
    got = to_episode(raw, Layout(spec, {"a": "observation.images.a"}, [1, 0], [0], "wxyz"), ITEM)
    np.testing.assert_allclose(got.state, [[0.5, np.pi / 2], [0.0, np.pi]], rtol=1e-6)
    np.testing.assert_allclose(got.action, [[0.5], [1.0]])
    assert list(got.images) == ["a"] and got.source == ITEM.id


def test_other_feature_names_and_shapes(tmp_path: Path) -> None:
    made = make(tmp_path / "set", "v3.0", "image")
    for path in made.root.glob("data/*/*.parquet"):
        edit_table(path, lambda t: t.rename_columns([{"action": "actions"}.get(n, n) for n in t.column_names]))

    def rename(values: dict) -> None:
        values["features"]["actions"] = values["features"].pop("action")
        values["features"][CAMERA] |= {"shape": [3, H, W], "names": ["channels", "height", "width"]}

    edit_info(made.root, rename)
    with pytest.raises(Rejected, match=r"E_KEY: .*expected action, found .*actions.*-o action=KEY"):
        opened(made.root)
    source = opened(made.root, action="actions")
    np.testing.assert_array_equal(source.read_raw(2).action, made.action[2])
    assert source.read_raw(2).images[CAMERA].shape == (9, H, W, 3)


# --- embodiments


def test_no_embodiment_is_a_clear_refusal(tmp_path: Path) -> None:
    made = make(tmp_path / "set", "v2.1", "video")
    with pytest.raises(Refused) as refusal:
        open_source(made.root, None, Options(None, None, {}))
    text = str(refusal.value)
    for part in ("E_SCHEMA", "shoulder.pos, elbow.pos", "top 96x64", "'so100'", "10 Hz", "--embodiment", "write_emb"):
        assert part in text, text
    assert "\n" not in text


@pytest.mark.parametrize(("reach", "known"), [(1.0, True), (0.4, True), (0.01, False), (30.0, False)])
def test_names_alone_do_not_make_an_embodiment(tmp_path: Path, reach: float, known: bool) -> None:
    made = make(tmp_path / "set", "v2.1", "image")

    def sawyer(values: dict) -> None:
        values["robot_type"] = "sawyer"
        values["features"]["observation.state"] |= {"shape": [4], "names": ["x", "y", "z", "gripper"]}
        values["features"]["action"] |= {"shape": [4], "names": ["dx", "dy", "dz", "gripper"]}

    edit_info(made.root, sawyer)
    state = {"min": [0, 0.3, 0.1, 0], "max": [0.1, 0.9, 0.3, 1]}
    stats = [{"min": [-reach, 0, 0, 0], "max": [reach, 0, 0, 0], "count": [n]} for n in LENGTHS]
    lines = [
        {"episode_index": i, "stats": {"action": s, "observation.state": state | {"count": s["count"]}}}
        for i, s in enumerate(stats)
    ]
    write_lines(made.root / "meta/episodes_stats.jsonl", lines)
    if known:
        assert open_source(made.root, None, Options(None, None, {})).spec.name == "metaworld_sawyer"
    else:
        with pytest.raises(Refused, match=r"E_SCHEMA: .*dx, dy, dz, gripper"):
            open_source(made.root, None, Options(None, None, {}))


def test_a_skeleton_is_written_once_and_loads(tmp_path: Path) -> None:
    made = make(tmp_path / "set", "v3.0", "video")
    target = tmp_path / "arm.yaml"
    with pytest.raises(ValueError, match=r"wrote .*arm.yaml: .*--embodiment"):
        opened(made.root, write_embodiment=str(target))
    with pytest.raises(FileExistsError):
        opened(made.root, write_embodiment=str(target))
    spec = load_embodiment(target)
    assert [f.name for f in spec.action] == ["shoulder", "elbow", "gripper"]
    assert [f.slot for f in spec.state] == [10, 11, 9] and [f.slot for f in spec.action] == [7, 8, 6]
    assert [(c.name, c.height, c.width) for c in spec.cameras] == [("top", H, W)]
    source = opened(made.root, spec)
    item = source.items()[0]
    check(source.read(item), source.spec, item)
    arms = list(lerobot._skeleton_slots([False] * 6 + [True] + [False] * 6 + [True], 7, 6))
    assert arms == [*range(7, 13), 6, *range(27, 33), 26]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"control_hz": 30.0}, "E_STAMP: .*30 Hz as in embodiment arm, found 10 Hz"),
        ({"cameras": TWO_CAMERAS}, "E_SCHEMA: .*expected wrist, found only top"),
        ({"action": [field("a", "joint_position", 2, 0)]}, r"E_JOINTS: .*action: expected a\[2\], found 3"),
    ],
)
def test_an_embodiment_that_does_not_fit(tmp_path: Path, changes: dict, message: str) -> None:
    made = make(tmp_path / "set", "v3.0", "image")
    with pytest.raises(Rejected, match=message):
        opened(made.root, arm(**changes))


def test_aloha_is_known_by_its_joints(tmp_path: Path) -> None:
    made = make(tmp_path / "set", "v2.1", "image")

    def aloha(values: dict) -> None:
        values["robot_type"] = "aloha"
        for key in ("observation.state", "action"):
            values["features"][key] |= {"shape": [14], "names": {"motors": list(lerobot.ARMS)}}

    edit_info(made.root, aloha)
    for unit, known in ((1.0, True), (1 / DEGREE, False)):
        stats = {"min": [-0.5 * unit] * 6 + [0] + [-0.5 * unit] * 6 + [0], "max": [unit] * 6 + [1] + [unit] * 6 + [1]}
        lines = [
            {"episode_index": i, "stats": dict.fromkeys(("action", "observation.state"), stats | {"count": [n]})}
            for i, n in enumerate(LENGTHS)
        ]
        write_lines(made.root / "meta/episodes_stats.jsonl", lines)
        if known:
            spec = open_source(made.root, None, Options(None, None, {})).spec
            assert (spec.name, spec.control_hz, [c.name for c in spec.cameras]) == ("aloha", FPS, ["top"])
        else:
            with pytest.raises(Refused, match=r"E_SCHEMA: .*left_waist"):
                open_source(made.root, None, Options(None, None, {}))


def test_the_only_camera_goes_by_any_name(tmp_path: Path) -> None:
    made = make(tmp_path / "set", "v3.0", "image")
    for name in ("front", "top", CAMERA):
        source = opened(made.root, arm(cameras=[{"name": name, "height": H, "width": W, "slot": 0}]))
        np.testing.assert_array_equal(source.read(source.items()[0]).images[name], made.frames[0])


def test_cameras_can_be_chosen_and_named(tmp_path: Path) -> None:
    made = make(tmp_path / "set", "v3.0", "image")
    edit_info(made.root, lambda v: v["features"].update({"observation.images.side": v["features"][CAMERA]}))
    source = opened(
        made.root, arm(cameras=[{"name": "front", "height": H, "width": W, "slot": 0}]), cameras="front:top"
    )
    np.testing.assert_array_equal(source.read(source.items()[0]).images["front"], made.frames[0])
    assert any("observation.images.side" in text for text in source.warnings)
    with pytest.raises(Refused, match=r"E_KEY: .*expected back, found only top, side"):
        opened(made.root, cameras="back")


def test_another_rate_is_not_taken(tmp_path: Path) -> None:
    made = make(tmp_path / "set", "v2.1", "image")
    assert open_source(made.root, arm(), Options(None, 10.0, {})).spec.control_hz == FPS
    with pytest.raises(Refused, match=r"E_STAMP: .*30 Hz as asked for, found 10 Hz"):
        open_source(made.root, arm(), Options(None, 30.0, {}))


# --- what is wrong: (mutation, the episodes it costs -> code, part of the text)


def edit_info(root: Path, edit: Callable[[dict], object]) -> None:
    values = json.loads((root / "meta/info.json").read_text())
    edit(values)
    write_json(root / "meta/info.json", values)


def edit_table(path: Path, edit: Callable[[pa.Table], pa.Table]) -> None:
    table = edit(pq.read_table(path, partitioning=None))
    pq.write_table(table, path, row_group_size=4)  # other row groups than episodes


def edit_column(path: Path, key: str, edit: Callable[[list], list | None]) -> None:
    def change(table: pa.Table) -> pa.Table:
        values = table[key].to_pylist()
        values = edit(values) or values
        return table.set_column(table.column_names.index(key), key, pa.array(values, table[key].type))

    edit_table(path, change)


def data(root: Path, i: int) -> Path:
    v21 = root / f"data/chunk-{i // 2:03d}/episode_{i:06d}.parquet"
    return v21 if v21.exists() else root / f"data/chunk-000/file-{FILES[i]:03d}.parquet"


def row(root: Path, i: int, k: int = 0) -> int:
    """The row of frame k of episode i in its file."""
    v21 = (root / "meta/episodes.jsonl").exists()
    return k if v21 else k + sum(LENGTHS[j] for j in range(i) if FILES[j] == FILES[i])


def edit_meta(root: Path, i: int, edit: Callable[[dict], object]) -> None:
    """Edit what the metadata say of one episode; returning False removes it."""
    if (path := root / "meta/episodes.jsonl").exists():
        lines = [json.loads(text) for text in path.read_text().splitlines()]
        write_lines(path, [line for k, line in enumerate(lines) if k != i or edit(line) is not False])
        return
    path = root / f"meta/episodes/chunk-000/file-{i // 2:03d}.parquet"
    lines = pq.read_table(path, partitioning=None).to_pylist()
    lines = [line for line in lines if line["episode_index"] != i or edit(line) is not False]
    pq.write_table(pa.Table.from_pylist(lines), path)


def truncate(path: Path, share: float = 0.6) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def put(path: Path, key: str, at: int, value: object) -> None:
    edit_column(path, key, lambda values: values.__setitem__(at, value))


def put_dim(path: Path, key: str, at: int, value: float) -> None:
    edit_column(path, key, lambda values: values[at].__setitem__(1, value))


def shift_time(root: Path, i: int, by: float) -> None:
    def move(line: dict) -> None:
        line[f"videos/{CAMERA}/from_timestamp"] += by
        line[f"videos/{CAMERA}/to_timestamp"] += by

    edit_meta(root, i, move)


def swap_stats(root: Path) -> None:
    path = root / "meta/episodes_stats.jsonl"
    if path.exists():
        lines = [json.loads(text) for text in path.read_text().splitlines()]
        lines[1]["stats"], lines[2]["stats"] = lines[2]["stats"], lines[1]["stats"]
        write_lines(path, lines)
        return
    found: list[dict] = []
    for i in (1, 2):
        edit_meta(root, i, lambda line: found.append({k: v for k, v in line.items() if k.startswith("stats/")}))
    for i, stats in ((1, found[1]), (2, found[0])):
        edit_meta(root, i, lambda line, s=stats: line.update(s))


Mutation = Callable[[Path], object]
BOTH = ("v2.1", "v3.0")
FAULTS: list[tuple[str, tuple[str, ...], str, Mutation, dict[int, str], str]] = [
    ("count", BOTH, "image", lambda r: edit_info(r, lambda v: v.update(total_episodes=6)),
     {4: "E_COUNT", 5: "E_COUNT"}, "total_episodes: expected 6, found 4 in meta"),
    ("count too low", BOTH, "image", lambda r: edit_info(r, lambda v: v.update(total_episodes=3)),
     {3: "E_COUNT"}, "expected 3, found 4 in meta"),
    ("index gap", BOTH, "image", lambda r: edit_meta(r, 1, lambda line: False), {1: "E_INDEX"}, "a gap"),
    ("listed twice", BOTH, "image", lambda r: edit_meta(r, 3, lambda line: line.update(episode_index=2)),
     {2: "E_INDEX", 3: "E_COUNT"}, "expected an episode listed once, found twice"),
    ("footer-less", ("v2.1",), "image", lambda r: truncate(data(r, 1)), {1: "E_TRUNCATED"}, "with its footer"),
    ("footer-less", ("v3.0",), "image", lambda r: truncate(data(r, 1)), {0: "E_TRUNCATED", 1: "E_TRUNCATED"}, "footer"),
    ("empty parquet", ("v2.1",), "image", lambda r: data(r, 1).write_bytes(b""), {1: "E_TRUNCATED"}, "0 bytes"),
    ("footer-less list", ("v3.0",), "image", lambda r: truncate(r / "meta/episodes/chunk-000/file-001.parquet"),
     {2: "E_TRUNCATED", 3: "E_TRUNCATED"}, "meta/episodes/chunk-000/file-001.parquet"),
    ("no parquet", ("v2.1",), "image", lambda r: data(r, 2).unlink(), {2: "E_CHUNK_MISSING"}, "episode_000002.parquet"),
    ("cut line", ("v2.1",), "image", lambda r: truncate(r / "meta/episodes.jsonl", 0.9), {3: "E_SCHEMA"}, "line 4"),
    ("length", BOTH, "image", lambda r: edit_meta(r, 2, lambda line: line.update(length=8)),
     {2: "E_LENGTH E_INDEX"}, "8 rows"),
    ("length 0", BOTH, "image", lambda r: edit_meta(r, 2, lambda line: line.update(length=0)), {2: "E_EMPTY"},
     "found 0"),
    ("timestamp", BOTH, "video", lambda r: put(data(r, 2), "timestamp", row(r, 2, 4), 0.43), {2: "E_STAMP"},
     "timestamp: expected steps of 0.100000 s within 0.0001 s, found 0.430000 s at frame 4 after 0.300000 s"),
    ("NaN stamp", BOTH, "image", lambda r: put(data(r, 2), "timestamp", row(r, 2), math.nan), {2: "E_STAMP"},
     "frame 0"),
    ("frame index", BOTH, "image", lambda r: put(data(r, 2), "frame_index", row(r, 2, 4), 5), {2: "E_INDEX"},
     "frame_index: expected 4 at frame 4, found 5"),
    ("index", BOTH, "image", lambda r: put(data(r, 3), "index", row(r, 3, 2), 99), {3: "E_INDEX"},
     "index: expected 23"),
    ("other episode", ("v2.1",), "image", lambda r: put(data(r, 3), "episode_index", 5, 2), {3: "E_INDEX"},
     "expected 3"),
    ("stats", BOTH, "image", swap_stats, {1: "E_STATS", 2: "E_STATS"}, "stats/observation.state/min: expected"),
    ("no stats", ("v2.1",), "image", lambda r: truncate(r / "meta/episodes_stats.jsonl", 0.4),
     {1: "E_STATS", 2: "E_STATS", 3: "E_STATS"}, "episodes_stats.jsonl"),
    ("NaN", BOTH, "image", lambda r: put_dim(data(r, 0), "action", 3, math.nan), {0: "E_VALUE"},
     "action: expected finite numbers, found nan in dim 1 at frame 3 (14.3% of frames)"),
    ("inf", BOTH, "image", lambda r: put_dim(data(r, 0), "observation.state", 3, math.inf), {0: "E_VALUE"},
     "found inf"),
    ("null", BOTH, "image", lambda r: put_dim(data(r, 0), "action", 3, None), {0: "E_VALUE"}, "null at frame 3"),
    ("null row", BOTH, "image", lambda r: put(data(r, 0), "action", 3, None), {0: "E_LENGTH"}, "null at frame 3"),
    ("no action", ("v2.1",), "image", lambda r: edit_table(data(r, 0), lambda t: t.drop_columns(["action"])),
     {0: "E_KEY"}, "action: expected a column, found only observation.state"),
    ("no action", ("v3.0",), "image", lambda r: edit_table(data(r, 0), lambda t: t.drop_columns(["action"])),
     {0: "E_KEY", 1: "E_KEY"}, "action"),
    ("strings", ("v2.1",), "image", lambda r: edit_table(data(r, 0), lambda t: t.set_column(
        t.column_names.index("action"), "action", pa.array(["left"] * len(t)))), {0: "E_DTYPE"}, "found string"),
    ("scalars", ("v2.1",), "image", lambda r: edit_table(data(r, 0), lambda t: t.set_column(
        t.column_names.index("action"), "action", pa.array([1.0] * len(t)))), {0: "E_LENGTH"}, "3 values per row"),
    ("wide", ("v2.1",), "image", lambda r: edit_table(data(r, 0), lambda t: t.set_column(
        t.column_names.index("action"), "action", pa.array([[1.0] * 4] * len(t)))), {0: "E_LENGTH"}, "4 at frame 0"),
    ("two tasks", BOTH, "image", lambda r: put(data(r, 2), "task_index", row(r, 2, 6), 1), {2: "E_TASK"},
     "expected one task per episode, found 0, then 1 at frame 6"),
    ("no task", BOTH, "image", lambda r: edit_column(
        data(r, 3), "task_index", lambda v: [7 if x == 1 else x for x in v]),
     {3: "E_TASK"}, "expected one of meta/tasks: 0, 1, found 7"),
    ("other task", BOTH, "image", lambda r: edit_meta(r, 3, lambda line: line.update(tasks=["dance"])), {3: "E_TASK"},
     "'open the drawer' by task_index 1"),
    ("two splits", BOTH, "image", lambda r: edit_info(r, lambda v: v["splits"].update(val="2:4")), {2: "E_DUP"},
     "expected an episode in one split, found train, val"),
    ("bad picture", BOTH, "image", lambda r: put(data(r, 2), CAMERA, row(r, 2, 1), {"bytes": b"GIF", "path": "x"}),
     {2: "E_SCHEMA"}, f"{CAMERA}, frame 1"),
    ("no picture", BOTH, "image", lambda r: put(data(r, 2), CAMERA, row(r, 2, 1), {"bytes": None, "path": "/etc/x"}),
     {2: "E_SCHEMA"}, "at most a path"),
    ("other size", BOTH, "image", lambda r: put(
        data(r, 2), CAMERA, row(r, 2, 1), {"bytes": png(np.zeros((8, 8, 3), np.uint8)), "path": ""}),
     {2: "E_SCHEMA"}, "expected 96 x 64 as in info.json, found 8 x 8"),
    ("short video", ("v2.1",), "video", lambda r: encode(r / v21_video(2), np.stack([picture(2, k) for k in range(8)])),
     {2: "E_VIDEO"}, "expected 9 frames, as rows in the table, found 8, the last at 0.700000 s"),
    ("long video", ("v2.1",), "video", lambda r: encode(r / v21_video(2), np.stack([picture(2, k) for k in range(10)])),
     {2: "E_VIDEO"}, "expected 9 frames, as rows in the table, found 10"),
    ("small video", ("v2.1",), "video", lambda r: encode(r / v21_video(2), np.zeros((9, 32, 32, 3), np.uint8)),
     {2: "E_SCHEMA"}, "expected 96 x 64, found 32 x 32"),
    ("short video", ("v3.0",), "video", lambda r: encode(
        r / f"videos/{CAMERA}/chunk-000/file-001.mp4", np.stack([picture(1, k) for k in range(5)] * 3)),
     {3: "E_VIDEO"}, "found 1, the last at 1.400000 s"),
    ("no video", ("v2.1",), "video", lambda r: (r / v21_video(2)).unlink(), {2: "E_CHUNK_MISSING"}, v21_video(2)),
    ("a playlist", ("v2.1",), "video", lambda r: (r / v21_video(2)).write_text("ffconcat version 1.0\nfile a.mp4\n"),
     {2: "E_TRUNCATED"}, "an mp4 that decodes"),
    ("between frames", ("v3.0",), "video", lambda r: shift_time(r, 3, 0.03), {3: "E_STAMP"}, "frame 0 at 1.430000 s"),
    ("another's frames", ("v3.0",), "video", lambda r: shift_time(r, 3, -0.3), {2: "E_INDEX", 3: "E_INDEX"},
     "expected own frames, found episode_000002 until 1.4"),
    ("slice and length", ("v3.0",), "video", lambda r: edit_meta(
        r, 1, lambda line: line.update({f"videos/{CAMERA}/to_timestamp": 0.4})), {1: "E_VIDEO"},
     "expected 0.5 s, 5 frames"),
    ("slice of rows", ("v3.0",), "image", lambda r: edit_meta(r, 2, lambda line: line.update(dataset_to_index=20)),
     {2: "E_INDEX"}, "expected 9 rows, its length, found from 12 to 20"),
    ("positions", ("v3.0",), "image", lambda r: edit_meta(
        r, 2, lambda line: line.update(dataset_from_index=11, dataset_to_index=20)), {2: "E_INDEX"},
     "expected 11 at frame 0"),
    ("unlisted rows", ("v3.0",), "image", lambda r: (
        edit_meta(r, 3, lambda line: False), edit_info(r, lambda v: v.update(total_episodes=3))),
     {3: "E_INDEX"}, "rows of episode_index 3 only here"),
    ("unlisted table", ("v2.1",), "image", lambda r: (
        edit_meta(r, 3, lambda line: False), edit_info(r, lambda v: v.update(total_episodes=3))),
     {3: "E_INDEX"}, "episode_000003.parquet"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("version", "media", "break_it", "codes", "text"),
    [
        pytest.param(version, media, break_it, codes, text, id=f"{name}-{version}")
        for name, versions, media, break_it, codes, text in FAULTS
        for version in versions
    ],
)
def test_each_fault_costs_its_episodes_only(
    tmp_path: Path, version: str, media: str, break_it: Mutation, codes: dict[int, str], text: str
) -> None:
    made = make(tmp_path / "set", version, media)
    assert set(outcomes(made.root).values()) == {None}
    break_it(made.root)
    found = outcomes(made.root)
    assert found.keys() >= {episode(i) for i in range(4)}
    refused = episodes(found)
    assert refused.keys() == {episode(i) for i in codes}
    files = {"meta/info.json", "meta/stats.json", "meta/episodes_stats.jsonl"}
    assert {name for name in found if not name.startswith("episode_")} <= files
    for i, code in codes.items():
        error = refused[episode(i)]
        assert error.code in code.split()
        assert error.file and error.episode in (episode(i), "") and error.expected and error.found and error.todo
    assert "\n" not in str(refused[episode(min(codes))])
    if codes != {2: "E_LENGTH E_INDEX"}:
        assert any(text in str(e) for e in refused.values()), [str(e) for e in refused.values()]


@pytest.mark.parametrize(
    ("version", "break_it", "message"),
    [
        ("v3.0", lambda r: edit_info(r, lambda v: v.update(codebase_version="v9.9")), "E_VERSION: .*found 'v9.9'"),
        ("v2.1", lambda r: edit_info(r, lambda v: v.update(codebase_version="v2.0")),
         "E_VERSION: .*lerobot's own scripts"),
        ("v2.1", lambda r: edit_info(r, lambda v: v.update(codebase_version="v3.0")),
         "E_LAYOUT: .*episodes.jsonl of v2.1"),
        ("v3.0", lambda r: edit_info(r, lambda v: v.update(codebase_version="v2.1")),
         "E_LAYOUT: .*meta/episodes of v3.0"),
        ("v3.0", lambda r: edit_info(r, lambda v: v.update(total_episodes=10**9)),
         "E_COUNT: .*expected 1000000000 epis"),
        ("v3.0", lambda r: (r / "meta/info.json").write_text("{"), "E_SCHEMA: .*expected JSON"),
        ("v3.0", lambda r: (r / "meta/info.json").write_text("[" * 100_000), "E_SCHEMA: .*expected JSON"),
        ("v3.0", lambda r: edit_info(r, lambda v: v.pop("fps")), "E_KEY: .*fps"),
        ("v3.0", lambda r: edit_info(r, lambda v: v.update(fps=0)), "E_SCHEMA: .*fps: expected a positive number"),
        ("v3.0", lambda r: edit_info(r, lambda v: v.update(fps="10")),
         "E_SCHEMA: .*fps: expected a number, found '10'"),
        ("v3.0", lambda r: edit_info(r, lambda v: v["features"].pop("action")), "E_KEY: .*expected action"),
        ("v3.0", lambda r: edit_info(r, lambda v: v["features"].pop("index")), "E_KEY: .*expected index"),
        ("v3.0", lambda r: (r / "meta/tasks.parquet").unlink(), "E_CHUNK_MISSING: .*tasks.parquet"),
        ("v3.0", lambda r: truncate(r / "meta/tasks.parquet"), "E_TRUNCATED: .*tasks.parquet"),
        ("v2.1", lambda r: (r / "meta/tasks.jsonl").unlink(), "E_CHUNK_MISSING: .*tasks.jsonl"),
        ("v2.1", lambda r: (r / "meta/info.json").unlink(), "E_SCHEMA: .*expected a folder with meta/info.json"),
    ],
)  # fmt: skip
def test_what_cannot_be_opened(tmp_path: Path, version: str, break_it: Mutation, message: str) -> None:
    made = make(tmp_path / "set", version, "image")
    break_it(made.root)
    with pytest.raises(Rejected, match=message) as refusal:
        opened(made.root)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("break_it", "file", "code", "text"),
    [
        (lambda r: write(r / "meta/episodes/chunk-001/file-000.parquet", [pa.table({"episode_index": [7]})]),
         "meta/episodes/chunk-001/file-000.parquet", "E_KEY", "length: expected a column"),
        (lambda r: edit_info(r, lambda v: v.update(total_frames=5)),
         "meta/info.json", "E_COUNT", "expected 5, found 27"),
        (lambda r: write_json(r / "meta/stats.json", {"action": {"min": [0], "max": [1], "count": [9]}}),
         "meta/stats.json", "E_STATS", "action."),
        (lambda r: write_json(r / "meta/stats.json", {"action": {"min": [0] * 3, "max": [1], "count": [27]}}),
         "meta/stats.json", "E_STATS", "action.max: expected"),
    ],
)  # fmt: skip
def test_totals_that_contradict_the_episodes(
    tmp_path: Path, break_it: Mutation, file: str, code: str, text: str
) -> None:
    made = make(tmp_path / "set", "v3.0", "image")
    break_it(made.root)
    found = outcomes(made.root)
    assert next(iter(found)) == file  # the first item: nothing is written before it is known
    assert {name for name, e in found.items() if e is not None} == {file}
    assert found[file].code == code and text in str(found[file])


def test_the_folder_above_is_pointed_out(tmp_path: Path) -> None:
    make(tmp_path / "set", "v2.1", "image")
    with pytest.raises(Rejected, match=f"give {tmp_path / 'set'}"):
        opened(tmp_path)
    with pytest.raises(FileNotFoundError):
        opened(tmp_path / "nowhere")


# --- cut films


@pytest.mark.parametrize(("version", "costs"), [("v2.1", [2]), ("v3.0", [2, 3])])
def test_half_an_mp4_that_still_decodes(tmp_path: Path, version: str, costs: list[int]) -> None:
    made = make(tmp_path / "set", version, "video")
    path = made.root / (v21_video(2) if version == "v2.1" else f"videos/{CAMERA}/chunk-000/file-001.mp4")
    with av.open(str(path)) as container:
        at = [p.pos for p in container.demux(video=0) if p.size]
        middle = sorted(at)[4 if version == "v2.1" else 9]
    path.write_bytes(path.read_bytes()[: middle + 5])
    with av.open(str(path)) as container:  # it opens, and promises all frames
        assert container.streams.video[0].frames == (9 if version == "v2.1" else 20)
    found = outcomes(made.root)
    assert {name: e.code for name, e in episodes(found).items()} == {episode(i): "E_TRUNCATED" for i in costs}


@pytest.mark.parametrize(("name", "film"), [
    ("lerobot_v30_video", "videos/observation.images.wrist/chunk-000/file-000.mp4"),
    ("lerobot_v21_video", "videos/chunk-000/observation.images.wrist/episode_000001.mp4"),
])  # fmt: skip
def test_half_a_film_that_lerobot_wrote(tmp_path: Path, name: str, film: str) -> None:
    if not (folder := REFERENCE / name).is_dir():
        pytest.skip("no reference data")
    root = tmp_path / "set"
    shutil.copytree(folder / "dataset", root, copy_function=shutil.copyfile)  # the original may be read-only
    truncate(root / film, 0.5)
    whole, cut = (open_source(path, None, Options(None, None, {})) for path in (folder / "dataset", root))
    refused = []
    for item in cut.items():
        try:
            np.testing.assert_array_equal(cut.read(item).images["wrist"], whole.read(item).images["wrist"])
        except Rejected as e:
            refused.append((item.id, e.code))
    assert 0 < len(refused) < 3 and (episode(1), "E_TRUNCATED") in refused
    assert {code for _, code in refused} == {"E_TRUNCATED"}


def test_an_mp4_without_its_index_is_cut_too(tmp_path: Path) -> None:
    made = make(tmp_path / "set", "v3.0", "video", faststart=False)
    truncate(made.root / f"videos/{CAMERA}/chunk-000/file-001.mp4", 0.9)
    found = outcomes(made.root)
    assert {name: e.code for name, e in episodes(found).items()} == {episode(i): "E_TRUNCATED" for i in (1, 2, 3)}


@pytest.mark.parametrize("codec", ["libx264", "libsvtav1"])
def test_wherever_it_is_cut_no_other_frame_is_shown(tmp_path: Path, codec: str) -> None:
    path, cut = tmp_path / "a.mp4", tmp_path / "cut.mp4"
    encode(path, np.stack([picture(k // 10, k % 10) for k in range(24)]), codec)
    slices = [np.arange(a, a + 8) / FPS for a in (0, 8, 16)]
    whole = [read_frames(path, times, 1e-4, (H, W), "top", whole=False) for times in slices]
    content = path.read_bytes()
    shown = 0
    for size in np.linspace(content.index(b"mdat"), len(content) - 1, 60).astype(int):
        cut.write_bytes(content[:size])
        for times, frames in zip(slices, whole, strict=True):
            try:
                got = read_frames(cut, times, 1e-4, (H, W), "top", whole=False)
            except Rejected as e:
                assert e.code == "E_TRUNCATED"
                continue
            np.testing.assert_array_equal(got, frames)
            shown += 1
    assert 0 < shown < 180


def test_a_wider_tolerance_can_be_given(tmp_path: Path) -> None:
    made = make(tmp_path / "set", "v3.0", "video")
    shift_time(made.root, 3, 0.02)
    source = opened(made.root, tolerance="0.025")
    got = source.read(source.items()[3])
    assert [read_picture(f) for f in got.images["top"]] == [(3, k) for k in range(LENGTHS[3])]
    for text in ("soon", "0", "nan", "-1"):
        with pytest.raises(ValueError, match=r"-o tolerance=.*expected seconds"):
            opened(made.root, tolerance=text)


@pytest.mark.parametrize("codec", ["libx264", "libsvtav1"])
def test_any_slice_of_a_film(tmp_path: Path, codec: str) -> None:
    frames = np.stack([picture(k // 10, k % 10) for k in range(43)])
    encode(tmp_path / "a.mp4", frames, codec)
    for first, stop in ((0, 43), (0, 1), (42, 43), (3, 9), (17, 31)):
        times = np.arange(first, stop) / FPS
        got = read_frames(tmp_path / "a.mp4", times, 1e-4, (H, W), "top", whole=False)
        assert [read_picture(f) for f in got] == [(k // 10, k % 10) for k in range(first, stop)]
    with pytest.raises(Rejected, match=r"E_VIDEO: .*found 3, the last at 4.200000 s"):
        read_frames(tmp_path / "a.mp4", np.arange(40, 45) / FPS, 1e-4, (H, W), "top", whole=False)
    with pytest.raises(Rejected, match=r"E_VIDEO: .*found 0"):
        read_frames(tmp_path / "a.mp4", np.arange(50, 55) / FPS, 1e-4, (H, W), "top", whole=False)


def test_a_slice_takes_the_memory_of_a_slice(tmp_path: Path) -> None:
    encode(tmp_path / "a.mp4", np.zeros((300, 96, 128, 3), np.uint8))
    script = (
        "import resource, sys, numpy as np\n"
        "from pathlib import Path\n"
        "from dita.datasets.convert.video import read_frames\n"
        "path = Path(sys.argv[1])\n"
        "def read(a, b): read_frames(path, np.arange(a, b) / 10, 1e-4, (96, 128), 'top', whole=False)\n"
        "read(0, 4)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for a in range(0, 296, 4): read(a, a + 4)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path / "a.mp4")], capture_output=True, text=True)
    assert int(run.stdout) * 1024 < 300 * 96 * 128 * 3 / 2, run.stderr  # all frames: 11 MB
    tracemalloc.start()
    read_frames(tmp_path / "a.mp4", np.arange(296, 300) / FPS, 1e-4, (96, 128), "top", whole=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 96 * 128 * 3


# --- tricks


TRICKS = [
    "../../{chunk_index:03d}", "/etc/passwd", "data/../../x", "data/{chunk_index.__class__}", "data/{0}", "{}",
    "data/{chunk_index!r}", "data/{chunk_index:999999999d}", "data/{nothing}.parquet", "data\\x", "C:/x", "a\0b", "",
    "data/{chunk_index:>{file_index}}", "data/" + "x" * 300, "{chunk_index", "data/{chunk_index[0]}",
]  # fmt: skip


@pytest.mark.parametrize("template", TRICKS)
@pytest.mark.parametrize("key", ["data_path", "video_path"])
def test_tricks_in_templates_are_refused(tmp_path: Path, template: str, key: str) -> None:
    made = make(tmp_path / "set", "v3.0", "video")
    edit_info(made.root, lambda v: v.update({key: template}))
    with pytest.raises(Rejected, match="E_PATH"):
        opened(made.root)


def test_a_trick_in_the_name_of_a_camera_is_refused(tmp_path: Path) -> None:
    made = make(tmp_path / "set", "v2.1", "video")
    edit_info(made.root, lambda v: v["features"].update({"../../../etc": v["features"].pop(CAMERA)}))
    with pytest.raises(Rejected, match="E_PATH"):
        opened(made.root)


@pytest.mark.parametrize("version", BOTH)
def test_links_out_of_the_folder_are_refused(tmp_path: Path, version: str) -> None:
    made = make(tmp_path / "set", version, "video")
    outside = tmp_path / "elsewhere.parquet"
    shutil.move(data(made.root, 3), outside)
    if version == "v2.1":
        (made.root / "data/chunk-001/episode_000003.parquet").symlink_to(outside)
    else:
        (made.root / "data/chunk-000/file-001.parquet").symlink_to(outside)
    found = outcomes(made.root)
    costs = [3] if version == "v2.1" else [2, 3]
    assert {i: e.code for i in range(4) if (e := found[episode(i)])} == dict.fromkeys(costs, "E_PATH")


def test_a_hub_cache_of_links_is_explained(tmp_path: Path) -> None:
    made = make(tmp_path / "set", "v3.0", "image")
    (made.root / "meta/info.json").rename(tmp_path / "blob")
    (made.root / "meta/info.json").symlink_to(tmp_path / "blob")
    with pytest.raises(Rejected, match=r"E_PATH: .*found a link to .*blob; .*cp -rL"):
        opened(made.root)


@settings(max_examples=300, deadline=None)
@given(st.text("{}./:abc_d0 19xi\\\0", max_size=40), st.sampled_from(["a", "../..", "/b", "{c}"]))
def test_no_template_leads_out(template: str, video: str) -> None:
    root = Path("/nowhere/set")
    try:
        path = safe_path(root, fill(template, root, abc=3, d=12, video_key=video))
    except Rejected as e:
        assert e.code == "E_PATH"
        return
    assert path.resolve().is_relative_to(root) and not {"{", "}"} & set(str(path))


# --- flipped bits


def flip_bits(root: Path, folder: Path, seed: int) -> None:
    """Flip one bit of one file at a time: everything is read or refused. Runs in a process that Arrow may abort."""
    rng = np.random.default_rng(seed)
    files = sorted(p for p in (root / folder).rglob("*") if p.is_file())
    for _ in range(60):
        path = files[rng.integers(len(files))]
        content = path.read_bytes()
        at = rng.integers(max(0, len(content) - 3000), len(content))  # the footers are at the end
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.integers(8)]) + content[at + 1 :])
        try:
            source = opened(root)
            for item in source.items():
                try:
                    source.read(item)
                except Rejected:
                    print("refused")
        except Rejected:
            print("refused")
        path.write_bytes(content)


@pytest.mark.parametrize(("folder", "media"), [("meta", "image"), ("data", "image"), ("videos", "video")])
def test_a_flipped_bit_is_read_or_refused(tmp_path: Path, folder: str, media: str) -> None:
    made = make(tmp_path / "set", "v3.0", media)
    script = "import sys; sys.path.insert(0, sys.argv[1]); import test_convert_lerobot as t; from pathlib import Path\n"
    script += "t.flip_bits(Path(sys.argv[2]), Path(sys.argv[3]), 3)"
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(made.root), folder]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("refused") > 3


# --- through the driver


def run(made: Made, out: Path, *flags: str) -> int:
    embodiment = out.with_name("arm.yaml")
    embodiment.write_text(json.dumps(embodiment_to_dict(arm())))
    arguments = ["--embodiment", str(embodiment), "--workers", "0", *flags]
    return main(["convert", "lerobot", str(made.root), str(out), *arguments])


@settings(max_examples=6, deadline=None)
@given(st.sets(st.integers(0, 3)), st.sampled_from(["image", "video"]))
def test_in_is_written_and_rejected(tmp_path_factory: pytest.TempPathFactory, cut: set[int], media: str) -> None:
    folder = tmp_path_factory.mktemp("convert")
    made = make(folder / "set", "v2.1", media)
    for i in cut:
        truncate(data(made.root, i))
    out = folder / "out.zarr"
    assert run(made, out, "--quarantine") == (1 if len(cut) == 4 else 0)
    listed = folder / "out.zarr.rejected.jsonl"
    rejected = [json.loads(line) for line in listed.read_text().splitlines()] if cut else []
    assert {r["episode"] for r in rejected} == {episode(i) for i in cut}
    assert {r["code"] for r in rejected} <= {"E_TRUNCATED"}
    if len(cut) == 4:
        assert not out.exists()
        return
    store = Store(out)
    store.verify()
    assert [e.source for e in store.episodes] == [episode(i) for i in range(4) if i not in cut]
    for k, entry in enumerate(store.episodes):
        i = int(entry.source[-6:])
        np.testing.assert_allclose(store.action(k) / [DEGREE, DEGREE, 0.01], made.action[i], rtol=1e-6)
        frames = store.read_frames(k, "top", range(LENGTHS[i]))
        assert [read_picture(f) for f in frames] == [(i, j) for j in range(LENGTHS[i])]


def test_a_refused_input_leaves_nothing_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make(tmp_path / "set", "v3.0", "image")
    before = {p: p.read_bytes() for p in made.root.rglob("*") if p.is_file()}
    edit_info(made.root, lambda v: v.update(codebase_version="v9.9"))
    assert run(made, tmp_path / "out.zarr") == 1
    error = capsys.readouterr().err
    assert "E_VERSION" in error and "'v9.9'" in error and "Traceback" not in error
    assert not (tmp_path / "out.zarr").exists()
    edit_info(made.root, lambda v: v.update(codebase_version="v3.0"))
    assert before.keys() == {p for p in made.root.rglob("*") if p.is_file()}  # the input is only read
    assert run(made, tmp_path / "out.zarr") == 0
    assert [e.instruction for e in Store(tmp_path / "out.zarr").episodes] == [TASKS[i % 2] for i in range(4)]
