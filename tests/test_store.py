"""The store: round trips, what a reader refuses, and what survives kills, bit flips, full disks and second writers."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import re
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import simplejpeg
import zarr
from conftest import embodiment_dict

import dita.datasets.jpeg  # noqa: F401  lets zarr-python read codec=jpeg
from dita.datasets.shards import INDEX_BYTES, MISSING, decode_jpeg
from dita.datasets.store import Store, StoreError
from dita.datasets.writer import StoreWriter
from dita.embodiment import embodiment_from_dict
from dita.types import EmbodimentSpec, Episode

LENGTHS = (150, 1, 200, 90)  # the second shard begins inside episode 2


def small_spec() -> EmbodimentSpec:
    return embodiment_from_dict(embodiment_dict(cameras=2, size=8))


def make_episode(spec: EmbodimentSpec, number: int, length: int, **changes) -> Episode:
    rng = np.random.default_rng([number, length])
    images = {c.name: rng.integers(0, 256, (length, c.height, c.width, 3), np.uint8) for c in spec.cameras}
    images[spec.cameras[0].name][length // 2] = 0  # an all-zero frame, which zarr-python would leave out
    values = {
        "images": images,
        "state": rng.uniform(-1, 1, (length, spec.state_dim)).astype(np.float32),
        "action": rng.uniform(-0.01, 0.01, (length, spec.action_dim)).astype(np.float32),
        "stamp": 5.0 + np.arange(length) / spec.control_hz,
        "instruction": ("open the drawer", "press the button")[number % 2],
        "success": (True, False, None)[number % 3],
        "source": f"test/{number:03d}",
    }
    return Episode(**(values | changes))


def make_store(path: Path, spec: EmbodimentSpec, lengths=LENGTHS, codec="raw") -> list[Episode]:
    episodes = [make_episode(spec, i, n) for i, n in enumerate(lengths)]
    with create(path, spec, codec=codec) as writer:
        for episode in episodes:
            writer.add(episode)
    return episodes


def create(path: Path, spec: EmbodimentSpec, **changes) -> StoreWriter:
    return StoreWriter.create(path, spec, **({"source": "tests", "licence": "CC0-1.0"} | changes))


def assert_holds(store: Store, number: int, episode: Episode) -> None:
    entry = store.episodes[number]
    assert (entry.source, entry.instruction, entry.success) == (episode.source, episode.instruction, episode.success)
    assert store.length(number) == len(episode.stamp)
    for name in ("state", "action", "stamp"):
        found, expected = getattr(store, name)(number), getattr(episode, name)
        assert found.dtype == expected.dtype
        assert found.tobytes() == expected.tobytes()
    for camera, frames in episode.images.items():
        assert store.read_frames(number, camera, range(len(frames))).tobytes() == frames.tobytes()


def error(code: str):
    return pytest.raises(StoreError, match=f"^{code}: ")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "s.zarr"


@pytest.fixture
def shard(path: Path) -> Path:
    return path / "segments/main-0000/images/cam1/c/1/0/0/0"


# --- round trips


def test_round_trip_is_byte_equal(path: Path) -> None:
    spec = small_spec()
    episodes = make_store(path, spec)
    store = Store(path)
    assert store.spec == spec
    assert len(store.episodes) == len(episodes)
    for i, episode in enumerate(episodes):
        assert_holds(store, i, episode)
    assert store.episodes[2].dt == 1 / 80
    assert (store.episodes[2].start, store.episodes[2].stop) == (151, 351)
    assert not store.state(0).flags.writeable
    total = sum(f.stat().st_size for f in path.glob("segments/*/**/*") if f.is_file())
    assert store.verify() == total
    assert sorted(p.name for p in path.iterdir()) == ["segments", "zarr.json"]


@pytest.mark.parametrize("codec", ["raw", "jpeg"])
def test_plain_zarr_python_reads_the_same(path: Path, codec: str) -> None:
    make_store(path, small_spec(), codec=codec)
    store = Store(path)
    group = zarr.open_group(path, mode="r", zarr_format=3)
    assert group.attrs["dita"]["format_version"] == 1
    segment = group["segments/main-0000"]
    for i, entry in enumerate(store.episodes):
        for camera in ("cam0", "cam1"):
            ours = store.read_frames(i, camera, range(store.length(i)))
            assert np.array_equal(ours, segment[f"images/{camera}"][entry.start : entry.stop])
        for name in ("state", "action", "stamp"):
            assert np.array_equal(getattr(store, name)(i), segment[name][entry.start : entry.stop])


def test_frames_come_in_the_order_asked_and_may_repeat(path: Path) -> None:
    episodes = make_store(path, small_spec())
    frames = [199, 0, 0, 104, 105]  # 104 | 105 is where the second shard begins
    found = Store(path).read_frames(2, "cam1", frames)
    assert np.array_equal(found, episodes[2].images["cam1"][frames])


@pytest.mark.parametrize("frames", [[-1], [200], [0, 500]])
def test_frames_outside_the_episode_are_refused(path: Path, frames: list[int]) -> None:
    make_store(path, small_spec())
    with pytest.raises(ValueError, match=r"has frames 0\.\.199"):
        Store(path).read_frames(2, "cam0", frames)
    with pytest.raises(ValueError, match=r"no array 'images/other'.*images/cam0, images/cam1"):
        Store(path).read_frames(2, "other", [0])


def test_bytes_do_not_depend_on_the_order_of_adding(tmp_path: Path) -> None:
    spec = small_spec()
    episodes = [make_episode(spec, i, 20) for i in range(5)]
    for name, order in (("a", [0, 1, 2, 3, 4]), ("b", [3, 1, 4, 0, 2])):
        with create(tmp_path / name, spec) as writer:
            for i in order:
                writer.add(episodes[i])
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) > 10
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_jpeg_keeps_small_saturated_objects(path: Path) -> None:
    spec = embodiment_from_dict(embodiment_dict(size=64))
    frame = np.full((64, 64, 3), 120, np.uint8)
    frame[20:23, 20:23] = (255, 0, 0)
    frame[41:44, 30:33] = (0, 0, 255)
    episode = make_episode(spec, 0, 1, images={"cam0": frame[None]})
    with create(path, spec, codec="jpeg") as writer:
        writer.add(episode)
    found = Store(path).read_frames(0, "cam0", [0])[0].astype(float)
    patch = np.s_[18:25, 18:25]  # 4:2:0 has 12 dB here
    psnr = 10 * np.log10(255**2 / np.mean((found[patch] - frame[patch]) ** 2))
    assert psnr > 30


def test_a_store_pickles_and_keeps_its_episode_numbers(path: Path) -> None:
    spec = small_spec()
    make_store(path, spec)
    store = Store(path)
    store.read_frames(0, "cam0", [0])
    pickled = pickle.dumps(store)
    with create(path, spec, exist="resume", writer="another") as writer:  # sorts before "main"
        writer.add(make_episode(spec, 50, 5))
    copy = pickle.loads(pickled)  # noqa: S301
    assert [e.source for e in copy.episodes] == [e.source for e in store.episodes]
    assert np.array_equal(copy.read_frames(3, "cam1", [7]), store.read_frames(3, "cam1", [7]))
    assert Store(path).episodes[0].source == "test/050"


def test_reading_needs_neither_zarr_nor_torch() -> None:
    code = "import sys, dita.datasets.store; print([m for m in ('zarr', 'torch', 'simplejpeg') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- what is no store, or not one for us


def test_nothing_there(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no store at"):
        Store(path)


def test_not_a_store(path: Path) -> None:
    path.mkdir()
    with error("E_SCHEMA"):
        Store(path)
    zarr.open_group(path, mode="w", zarr_format=3)
    with pytest.raises(StoreError, match=r"attributes lack dita\.format_version"):
        Store(path)
    shutil.rmtree(path)
    zarr.open_group(path, mode="w", zarr_format=2)
    with pytest.raises(StoreError, match="Zarr v2"):
        Store(path)


def test_newer_format_is_refused(path: Path) -> None:
    make_store(path, small_spec())
    root = json.loads((path / "zarr.json").read_text())
    root["attributes"]["dita"]["format_version"] = 2
    (path / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(StoreError, match=r"E_VERSION: .*format 2, this dita reads up to 1: upgrade"):
        Store(path)


def test_unsealed_episodes_are_said(path: Path) -> None:
    spec = small_spec()
    create(path, spec).close()
    with pytest.raises(StoreError, match=r"E_UNSEALED: .* has no episodes"):
        Store(path)
    writer = create(path, spec, exist="resume")
    writer.add(make_episode(spec, 0, 3))
    writer.close()
    with pytest.raises(StoreError, match=r"E_UNSEALED: .*1 staged episodes.*--resume"):
        Store(path)


@pytest.mark.parametrize(
    ("file", "old", "new", "field"),
    [
        ("images/cam0/zarr.json", '"uint8"', '"int8"', "data_type"),
        ("images/cam0/zarr.json", '"crc32c"', '"zstd"', "codecs"),
        ("state/zarr.json", "441", "440", "shape"),
    ],
)
def test_edited_metadata_names_the_field(path: Path, file: str, old: str, new: str, field: str) -> None:
    make_store(path, small_spec())
    edited = path / "segments/main-0000" / file
    text = edited.read_text()
    assert old in text
    edited.write_text(text.replace(old, new.ljust(len(old))))
    with pytest.raises(StoreError, match=rf"E_SCHEMA: .*{file}: {field}"):
        Store(path)


def test_edited_embodiment_is_noticed(path: Path) -> None:
    make_store(path, small_spec())
    text = (path / "zarr.json").read_text()
    (path / "zarr.json").write_text(text.replace("a test arm", "a best arm"))
    with error("E_CHECKSUM"):
        Store(path)


def test_names_that_leave_the_folder_are_refused(path: Path) -> None:
    spec = small_spec()
    bad = dataclasses.replace(spec, cameras=(dataclasses.replace(spec.cameras[0], name="../../x"),))
    with pytest.raises(ValueError, match="E_PATH"):
        create(path, bad)
    assert not path.exists()


def test_names_that_differ_in_case_only_are_refused(path: Path) -> None:
    spec = small_spec()
    twins = tuple(dataclasses.replace(c, name=n) for c, n in zip(spec.cameras, ("Wrist", "wrist"), strict=True))
    with pytest.raises(ValueError, match=r"E_PATH: 'Wrist' and 'wrist' differ in case only"):
        create(path, dataclasses.replace(spec, cameras=twins))


def test_links_out_of_the_store_are_refused(path: Path, tmp_path: Path) -> None:
    make_store(path, small_spec())
    (path / "segments/main-0000/state/c/0/0").rename(tmp_path / "state")
    (path / "segments/main-0000/state/c/0/0").symlink_to(tmp_path / "state")
    with pytest.raises(StoreError, match=r"E_PATH: .*state/c/0/0 is a link that leaves the store"):
        Store(path)
    (tmp_path / "link.zarr").symlink_to(path)  # the store itself may lie elsewhere
    (path / "segments/main-0000/state/c/0/0").unlink()
    (tmp_path / "state").rename(path / "segments/main-0000/state/c/0/0")
    assert len(Store(tmp_path / "link.zarr").episodes) == 4


# --- damage


def test_missing_shard(path: Path, shard: Path) -> None:
    make_store(path, small_spec())
    shard.unlink()
    with pytest.raises(StoreError, match=r"E_CHUNK_MISSING: .*/images/cam1/c/1/0/0/0.*\(test/002\), frame 105"):
        Store(path)


def test_shard_lost_after_opening(path: Path, shard: Path) -> None:
    make_store(path, small_spec())
    store = Store(path)
    shard.unlink()
    with pytest.raises(StoreError, match=r"E_CHUNK_MISSING: .*c/1/0/0/0.*episode 2 \(test/002\), frame 105"):
        store.read_frames(2, "cam1", [120])


def test_truncated_and_empty_files(path: Path, shard: Path) -> None:
    make_store(path, small_spec())
    content = shard.read_bytes()
    for size in (len(content) - 1, 1000, 0):
        shard.write_bytes(content[:size])
        with pytest.raises(StoreError, match=rf"E_TRUNCATED: .*expected {len(content)} bytes, found {size}"):
            Store(path)


def test_missing_chunk_is_an_error_where_zarr_reads_zeros(path: Path, shard: Path) -> None:
    make_store(path, small_spec())
    content = bytearray(shard.read_bytes())
    slot = len(content) - INDEX_BYTES + 16 * 10  # frame 266 of the segment, frame 115 of episode 2
    content[slot : slot + 16] = struct.pack("<QQ", MISSING, MISSING)
    content[-4:] = struct.pack("<I", google_crc32c.value(bytes(content[-INDEX_BYTES:-4])))
    shard.write_bytes(content)
    assert zarr.open_group(path, mode="r")["segments/main-0000/images/cam1"][266].max() == 0
    message = r"E_CHUNK_MISSING: .*images/cam1/c/1/0/0/0: .*episode 2 \(test/002\), frame 115"
    with pytest.raises(StoreError, match=message):
        Store(path).read_frames(2, "cam1", [114, 115])
    with pytest.raises(StoreError, match=message):
        Store(path).verify()


def test_a_flip_is_seen_when_its_frame_is_read(path: Path, shard: Path) -> None:
    episodes = make_store(path, small_spec())
    content = bytearray(shard.read_bytes())
    content[10 * (8 * 8 * 3 + 4) + 77] ^= 4
    shard.write_bytes(content)
    store = Store(path)
    assert np.array_equal(store.read_frames(2, "cam1", [114, 116]), episodes[2].images["cam1"][[114, 116]])
    with pytest.raises(StoreError, match=r"E_CHECKSUM: .*crc32c.*episode 2 \(test/002\), frame 115") as caught:
        store.read_frames(2, "cam1", [115])
    assert caught.value.code == "E_CHECKSUM"


@pytest.mark.parametrize("codec", ["raw", "jpeg"])
def test_a_flip_after_a_good_read_is_seen_by_the_next_one(path: Path, shard: Path, codec: str) -> None:
    make_store(path, small_spec(), codec=codec)
    store = Store(path)
    before = store.read_frames(2, "cam1", [115])
    with shard.open("r+b") as file:
        index = np.frombuffer(shard.read_bytes()[-INDEX_BYTES:-4], "<u8").reshape(-1, 2)
        file.seek(int(index[10].sum()) - 9)  # frame 115's, in its payload
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(StoreError, match=r"E_CHECKSUM: .*crc32c.*episode 2 \(test/002\), frame 115"):
        store.read_frames(2, "cam1", [115])
    assert before.shape == (1, 8, 8, 3) and before.flags.writeable  # a copy of its own


def test_a_jpeg_of_another_size_is_refused() -> None:
    jpeg = simplejpeg.encode_jpeg(np.zeros((8, 16, 3), np.uint8), 95, "RGB", "444")
    assert decode_jpeg(jpeg, np.empty((8, 16, 3), np.uint8)).shape == (8, 16, 3)
    for shape in ((16, 8, 3), (32, 16, 3), (4, 16, 3)):
        with pytest.raises(ValueError):
            decode_jpeg(jpeg, np.empty(shape, np.uint8))


def test_a_picture_that_was_written_as_no_jpeg_is_named(path: Path, shard: Path) -> None:
    make_store(path, small_spec(), codec="jpeg")
    content = bytearray(shard.read_bytes())
    start, size = np.frombuffer(content[-INDEX_BYTES:-4], "<u8").reshape(-1, 2)[10].tolist()
    payload = b"\0" * (size - 4)
    content[start : start + size] = payload + struct.pack("<I", google_crc32c.value(payload))  # its checksum is right
    shard.write_bytes(content)
    with pytest.raises(StoreError, match=r"E_DECODE: .*episode 2 \(test/002\), frame 115") as caught:
        Store(path).read_frames(2, "cam1", [115])
    assert caught.value.is_damage and not StoreError("E_NETWORK: no answer").is_damage


@pytest.mark.parametrize("codec", ["raw", "jpeg"])
def test_every_bit_flip_is_detected(path: Path, codec: str) -> None:
    make_store(path, small_spec(), codec=codec)
    Store(path).verify()
    rng = np.random.default_rng(7)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    assert len(files) == 17
    for flip in range(90):
        file = files[flip % len(files)]
        content = bytearray(file.read_bytes())
        original = bytes(content)
        position, bit = int(rng.integers(len(content))), int(rng.integers(8))
        content[position] ^= 1 << bit
        file.write_bytes(content)
        with pytest.raises(StoreError) as caught:
            Store(path).verify()
        assert caught.value.code, caught.value
        file.write_bytes(original)
    Store(path).verify()


# --- the writer refuses


@pytest.mark.parametrize(
    ("code", "change", "message"),
    [
        ("E_VALUE", lambda e: {"instruction": " "}, "instruction must not be empty"),
        ("E_VALUE", lambda e: {"action": spoil(e.action, (7, 1), np.nan)}, r"action\.delta\[1\] is nan at frame 7"),
        ("E_VALUE", lambda e: {"state": spoil(e.state, (3, 3), np.inf)}, r"state\.gripper\[0\] is inf at frame 3"),
        ("E_STAMP", lambda e: {"stamp": spoil(e.stamp, 5, e.stamp[4])}, "at frame 5"),
        ("E_STAMP", lambda e: {"stamp": e.stamp * 4}, "control_hz 80 means 0.0125 s"),
        ("E_LENGTH", lambda e: {"action": e.action[:-1]}, "'state': 10, 'action': 9"),
        ("E_LENGTH", lambda e: {k: getattr(e, k)[:0] for k in ("state", "action", "stamp")}, "length"),
        (
            "E_SCHEMA",
            lambda e: {"state": e.state[:, :3]},
            r"state: expected float32 \[10, 4\], found float32 \[10, 3\]",
        ),
        ("E_SCHEMA", lambda e: {"action": e.action.astype(float)}, "found float64"),
        ("E_SCHEMA", lambda e: {"images": {"cam0": e.images["cam0"]}}, "cameras"),
        ("E_SCHEMA", lambda e: {"images": {c: f[:, :4] for c, f in e.images.items()}}, r"images/cam0: expected uint8"),
    ],
)
def test_bad_episodes_are_refused_and_leave_nothing(path: Path, code: str, change, message: str) -> None:
    spec = small_spec()
    good = make_episode(spec, 0, 10)
    with create(path, spec) as writer:
        with pytest.raises(StoreError, match=f"^{code}: .*test/000.*{message}"):
            writer.add(dataclasses.replace(good, **change(good)))
        assert writer.sources() == frozenset()
        writer.add(good)
    assert len(Store(path).episodes) == 1


def spoil(array: np.ndarray, where, value: float) -> np.ndarray:
    array = array.copy()
    array[where] = value
    return array


def test_duplicates_are_refused_by_source_and_by_content(path: Path) -> None:
    spec = small_spec()
    first = make_episode(spec, 0, 10)
    for exist in ("error", "resume"):  # staged just now, and sealed by an earlier writer
        with create(path, spec, exist=exist) as writer:
            if exist == "error":
                writer.add(first)
            with pytest.raises(StoreError, match=r"E_DUP: .*has an episode with source 'test/000'"):
                writer.add(make_episode(spec, 5, 12, source="test/000"))
            with pytest.raises(StoreError, match=r"E_DUP: .*'other' has the same content as 'test/000'"):
                writer.add(dataclasses.replace(first, source="other", stamp=first.stamp + 9))


def test_existing_folders(path: Path) -> None:
    spec = small_spec()
    make_store(path, spec)
    with pytest.raises(FileExistsError, match="--resume continues it, --overwrite deletes"):
        create(path, spec)
    with pytest.raises(ValueError, match="licence: expected"):
        create(path, spec, licence="MIT", exist="resume")
    with pytest.raises(ValueError, match=r"embodiment\.obs_dt: expected 0.1"):
        create(path, dataclasses.replace(spec, obs_dt=0.1), exist="resume")
    with create(path, spec, exist="resume") as writer:
        assert writer.sources() == {f"test/{i:03d}" for i in range(4)}
        assert writer.staged_sources() == frozenset()
        writer.add(make_episode(spec, 9, 5))
        assert writer.staged_sources() == {"test/009"}
    assert Store(path).segments == ("main-0000", "main-0001")
    with create(path, spec, exist="overwrite") as writer:
        writer.add(make_episode(spec, 9, 5))
    assert [e.source for e in Store(path).episodes] == ["test/009"]


def test_overwrite_deletes_stores_only(path: Path) -> None:
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")
    for exist in ("overwrite", "resume"):
        with pytest.raises(ValueError, match="not a store"):
            create(path, small_spec(), exist=exist)
    assert (path / "thesis.tex").read_text() == "years of work"


def test_two_writers(path: Path) -> None:
    spec = small_spec()
    with create(path, spec) as first:
        first.add(make_episode(spec, 0, 5))
        with pytest.raises(StoreError, match=f"E_LOCKED: process {os.getpid()} on "):
            create(path, spec, exist="resume")
        with error("E_LOCKED"):
            create(path, spec, exist="overwrite")
        with create(path, spec, exist="resume", writer="main-b") as second:  # a name that begins like the other's
            second.add(make_episode(spec, 1, 6))
            with error("E_DUP"):
                second.add(make_episode(spec, 0, 7))
        first.add(make_episode(spec, 2, 7))
    store = Store(path)
    assert store.segments == ("main-0000", "main-b-0000")
    assert [e.source for e in store.episodes] == ["test/000", "test/002", "test/001"]


def test_a_lock_of_another_host_is_respected(path: Path) -> None:
    spec = small_spec()
    create(path, spec).close()
    (path / "staging").mkdir()
    (path / "staging/main.lock").write_text('{"host": "elsewhere", "pid": 4}')
    with pytest.raises(StoreError, match=r"E_LOCKED: process 4 on elsewhere .*delete the lock file"):
        create(path, spec, exist="resume")


def test_no_space_left_before_and_while_writing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small_spec()
    with create(path, spec) as writer:
        writer.add(make_episode(spec, 0, 50))
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
            with pytest.raises(StoreError, match=r"E_NOSPACE: .*1 MiB are free"):
                writer.add(make_episode(spec, 1, 50))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, limits[1]))
        try:
            with error("E_NOSPACE"):
                writer.add(make_episode(spec, 1, 50))
            with error("E_NOSPACE"):
                writer.seal()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert writer.staged_sources() == {"test/000"}
        writer.add(make_episode(spec, 1, 50))
    store = Store(path)
    for i in range(2):
        assert_holds(store, i, make_episode(spec, i, 50))


def test_a_damaged_staged_episode_is_not_sealed(path: Path) -> None:
    spec = small_spec()
    writer = create(path, spec)
    writer.add(make_episode(spec, 0, 50))
    file = next(path.rglob("state.npy"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreError, match=r"E_CHECKSUM: .*staged episode is damaged"):
        writer.seal()
    writer.close()


# --- kills

KILLED_WRITER = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_store import create, make_episode, small_spec

at, calls = int(sys.argv[3]), 0

def counted(call):
    def run(*args, **kwargs):
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args, **kwargs)
    return run

for name in ("fsync", "rename", "unlink", "rmdir", "mkdir", "open"):
    setattr(os, name, counted(getattr(os, name)))
spec = small_spec()
with create(sys.argv[2], spec) as writer:
    for i in range(8):
        writer.add(make_episode(spec, i, 40))
        print(f"test/{i:03d}", flush=True)
        if i == 4:
            writer.seal()
print("calls", calls)
"""


def run_killed(path: Path, at: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", KILLED_WRITER, str(Path(__file__).parent), str(path), str(at)]
    return subprocess.run(command, capture_output=True, text=True)


def test_killed_writers_lose_only_the_open_episode(tmp_path: Path) -> None:
    spec = small_spec()
    whole = run_killed(tmp_path / "whole.zarr", 0)
    assert whole.returncode == 0, whole.stderr
    calls = int(whole.stdout.split()[-1])
    rng = np.random.default_rng(3)
    for at in np.sort(rng.choice(np.arange(1, calls + 1), 8, replace=False)).tolist():
        path = tmp_path / f"{at}.zarr"
        killed = run_killed(path, at)
        assert killed.returncode == -9, killed.stderr
        finished = set(re.findall(r"test/\d+", killed.stdout))
        with create(path, spec, exist="resume") as writer:
            assert finished <= writer.sources(), f"killed at call {at}"
            assert len(writer.sources() - finished) <= 1  # staged, but killed before saying so
            for i in range(8):
                if f"test/{i:03d}" not in writer.sources():
                    writer.add(make_episode(spec, i, 40))
        store = Store(path)
        store.verify()
        assert sorted(e.source for e in store.episodes) == [f"test/{i:03d}" for i in range(8)]
        for i, entry in enumerate(store.episodes):
            assert_holds(store, i, make_episode(spec, int(entry.source[-3:]), 40))
        assert sorted(p.name for p in path.iterdir()) == ["segments", "zarr.json"]
        assert not list(path.rglob("*.partial")) and not list(path.rglob("*.removed"))


def test_leftovers_are_reported(path: Path) -> None:
    spec = small_spec()
    make_store(path, spec)
    (path / "staging/main/abc.partial/images").mkdir(parents=True)
    (path / "segments/main-0001/state").mkdir(parents=True)
    (path / "segments/main-b-0000").mkdir()  # another writer's, perhaps at work
    with create(path, spec, exist="resume") as writer:
        assert len(writer.cleaned) == 2
        assert "unsealed segment main-0001" in writer.cleaned[0]
        assert "unfinished episode abc" in writer.cleaned[1]
    assert sorted(p.name for p in (path / "segments").iterdir() if p.is_dir()) == ["main-0000", "main-b-0000"]


def test_a_half_created_store_is_completed(path: Path) -> None:
    (path / "segments").mkdir(parents=True)
    for leftover in (path / ".zarr.json.4.partial", path / "segments/.zarr.json.4.partial"):
        leftover.write_text("{")
    episode = make_episode(small_spec(), 0, 5)
    with create(path, small_spec(), exist="resume") as writer:
        writer.add(episode)
    assert_holds(Store(path), 0, episode)
    assert not list(path.rglob("*.partial"))
