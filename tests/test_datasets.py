"""Windows at episode ends, the stateless sampler, the loader, and `dita inspect`."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import io
import json
import os
import pickle
from collections import Counter
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
from conftest import contract_of, embodiment_dict, field, policy_config
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy.spatial.transform import Rotation
from scipy.stats import chisquare
from test_store import create, make_episode, make_store, small_spec

from dita.datasets.dataset import WindowDataset, iter_low_dim, shots
from dita.datasets.inspect import contact_sheet, inspect, inspect_command, print_table
from dita.datasets.mixture import PERIOD, MixtureSampler, loader, permute
from dita.datasets.store import Store, StoreError
from dita.datasets.windows import action_rows, compose_actions, observation_frames, stride_of
from dita.embodiment import embodiment_from_dict
from dita.preprocess import Preprocessor
from dita.types import RawObservation

LENGTHS = (20, 1, 33)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, list]:
    path = tmp_path_factory.mktemp("data") / "s.zarr"
    episodes = make_store(path, small_spec(), LENGTHS)
    return Store(path), episodes


def dataset_of(store: Store, **changes) -> WindowDataset:
    return WindowDataset(store, **({"n_obs_steps": 2, "chunk_size": 6, "pad_end": "mask"} | changes))


# --- index math


@settings(deadline=None)
@given(st.integers(0, 40), st.integers(1, 5), st.integers(1, 6))
def test_observation_frames_equal_a_naive_history(step: int, n_obs_steps: int, stride: int) -> None:
    history = [step]
    while len(history) < n_obs_steps and history[0] - stride >= 0:
        history.insert(0, history[0] - stride)
    missing = n_obs_steps - len(history)
    frames, valid = observation_frames(step, n_obs_steps, stride)
    assert frames.tolist() == [history[0]] * missing + history
    assert valid.tolist() == [False] * missing + [True] * len(history)


@settings(deadline=None)
@given(
    st.integers(1, 30),
    st.data(),
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(0, 3),
    st.sampled_from(["mask", "hold"]),
)
def test_chunks_equal_a_naive_loop(length: int, data, chunk_size: int, stride: int, past: int, pad_end) -> None:
    step = data.draw(st.integers(0, length - 1))
    spec = small_spec()
    actions = np.random.default_rng(length).normal(size=(length, 4)).astype(np.float32)
    rows, valid = action_rows(length, step, chunk_size, stride, pad_end, past)
    chunk = compose_actions(actions, stride, spec.action)[rows]
    for i, first in enumerate(range(step - past * stride, step + chunk_size * stride, stride)):
        covered = range(first, first + stride)
        inside = [t for t in covered if 0 <= t < length]
        if first < 0:
            assert not valid[i]
        else:
            assert valid[i] == (len(inside) == stride or pad_end == "hold")
            np.testing.assert_allclose(chunk[i, :3], actions[inside, :3].sum(0), atol=1e-5)  # nothing past the end
            assert chunk[i, 3] == actions[min(covered[-1], length - 1), 3]


def test_composed_rotations_turn_as_the_single_ones_do() -> None:
    rng = np.random.default_rng(0)
    actions = rng.normal(scale=0.5, size=(8, 3)).astype(np.float32)
    for frame in ("base", "tool"):
        values = embodiment_dict()
        turn = field("turn", "ee_rotation_axis_angle", 3, 0, "delta") | {"frame": frame, "unit": "rad"}
        spec = embodiment_from_dict(values | {"action": [turn]})
        fine, coarse = Rotation.identity(), Rotation.identity()
        for a in actions:
            fine = fine * Rotation.from_rotvec(a) if frame == "tool" else Rotation.from_rotvec(a) * fine
        for a in compose_actions(actions, 4, spec.action)[[0, 4]]:
            coarse = coarse * Rotation.from_rotvec(a) if frame == "tool" else Rotation.from_rotvec(a) * coarse
        assert (fine * coarse.inv()).magnitude() < 1e-5
        assert np.array_equal(compose_actions(actions, 1, spec.action)[:-1], actions)


def test_seconds_become_strides_or_an_error() -> None:
    assert stride_of(0.05, 1 / 80, "obs_dt") == 4
    assert stride_of(1 / 15, 1 / 30, "obs_dt") == 2
    for dt in (0.03, 0.001):
        with pytest.raises(ValueError, match=r"arm: obs_dt .* no whole multiple of the store's 0.0125 s"):
            stride_of(dt, 1 / 80, "arm: obs_dt")
    spec = small_spec()
    chunked = dataclasses.replace(spec.action[0], reference="chunk_start")
    with pytest.raises(ValueError, match=r"action\.delta: a delta from the chunk's start"):
        compose_actions(np.zeros((3, 4), np.float32), 1, (chunked, spec.action[1]))


# --- datasets


@pytest.mark.parametrize("cache", ["mmap", "ram"])
def test_every_window_equals_its_episode(stored, cache) -> None:
    store, episodes = stored
    dataset = dataset_of(store, cache=cache, past_action_slots=1)
    assert len(dataset) == sum(LENGTHS)
    places = [(e, step) for e, length in enumerate(LENGTHS) for step in range(length)]
    for index, (e, step) in enumerate(places):
        window, episode = dataset[index], episodes[e]
        frames = [step - 4 if step >= 4 else step, step]
        for camera in ("cam0", "cam1"):
            assert np.array_equal(window.images[camera], episode.images[camera][frames])
        assert np.array_equal(window.state, episode.state[frames])
        assert window.frame_valid.tolist() == [step >= 4, True]
        assert (window.instruction, window.embodiment) == (episode.instruction, "arm")
        assert window.stamp == episode.stamp[step]
        real = [0 <= t < LENGTHS[e] for t in range(step - 1, step + 6)]
        assert window.step_valid.tolist() == real
        assert np.array_equal(window.actions[real], episode.action[step - 1 : step + 6] if step else episode.action[:6])
    with pytest.raises(IndexError):
        dataset[len(dataset)]


def test_hold_keeps_the_arm_still_and_the_gripper_as_it_is(stored) -> None:
    store, episodes = stored
    window = dataset_of(store, pad_end="hold")[LENGTHS[0] - 2]
    assert window.step_valid.all()
    assert np.array_equal(window.actions[:2], episodes[0].action[-2:])
    assert (window.actions[2:, :3] == 0).all()
    assert (window.actions[2:, 3] == episodes[0].action[-1, 3]).all()


def test_a_window_is_what_the_live_preprocessor_makes(stored) -> None:
    store, episodes = stored
    preprocessor = Preprocessor(contract_of([store.spec], policy_config(cameras=2)))
    dataset, episode = dataset_of(store), episodes[0]
    for step in (0, 3, 4, 19):
        history = [
            RawObservation(
                {c: f[t] for c, f in episode.images.items()}, episode.state[t], episode.instruction, episode.stamp[t]
            )
            for t in (step - 4, step)
            if t >= 0
        ]
        live = preprocessor.observe([preprocessor.window(history, "arm")])
        trained = preprocessor.observe([dataset[step]])
        for name in ("images", "image_valid", "state", "language"):
            assert torch.equal(getattr(live, name), getattr(trained, name)), (step, name)


def test_chosen_episodes(stored) -> None:
    store, episodes = stored
    dataset = dataset_of(store, episodes=[2, 0])
    assert len(dataset) == 53
    assert np.array_equal(dataset[33].state[1], episodes[0].state[0])
    for wrong in ([3], [-1], [], [0, 0]):
        with pytest.raises(ValueError, match=r"has episodes 0\.\.2"):
            dataset_of(store, episodes=wrong)


def test_shots_are_nested_and_repeatable(stored) -> None:
    store, _ = stored
    chosen = [shots(store, k, seed=5) for k in (1, 2, 3)]
    assert [len(c) for c in chosen] == [1, 2, 3]
    assert set(chosen[0]) < set(chosen[1]) < set(chosen[2]) == {0, 1, 2}
    assert chosen[1] == shots(store, 2, seed=5)
    assert len({shots(store, 1, seed=s) for s in range(20)}) == 3
    for k in (0, 4):
        with pytest.raises(ValueError, match="has 3 episodes"):
            shots(store, k, seed=0)


def test_statistics_see_the_composed_actions(tmp_path: Path) -> None:
    spec = dataclasses.replace(small_spec(), action_dt=0.05)
    episode = make_episode(spec, 0, 9)
    with create(tmp_path / "s.zarr", spec) as writer:
        writer.add(episode)
    store = Store(tmp_path / "s.zarr")
    ((state, action),) = iter_low_dim(store)
    assert np.array_equal(state, episode.state)
    assert len(action) == 9
    np.testing.assert_allclose(action[2, :3], episode.action[2:6, :3].sum(0), atol=1e-7)
    assert np.array_equal(dataset_of(store)[2].actions[:1], action[2:3])


def memory_files() -> int:
    return sum("memfd:dita-" in link for link in map(try_readlink, Path("/proc/self/fd").iterdir()))


def try_readlink(path: Path) -> str:
    try:
        return os.readlink(path)
    except FileNotFoundError:  # the listing's own
        return ""


def test_ram_cache_is_given_back_and_refused_when_too_big(stored, monkeypatch: pytest.MonkeyPatch) -> None:
    store, _ = stored
    gc.collect()
    assert memory_files() == 0
    dataset = dataset_of(store, cache="ram")
    assert memory_files() >= 2
    del dataset
    gc.collect()
    assert memory_files() == 0
    monkeypatch.setattr(Path, "read_text", lambda path: "MemTotal: 99999 kB\nMemAvailable: 10 kB")
    with pytest.raises(StoreError, match=r"E_NOSPACE: .*0\.0 GiB are available; use data\.cache=mmap"):
        dataset_of(store, cache="ram")


# --- sampler


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**63))
def test_permute_is_a_permutation(length: int, key: int) -> None:
    out = permute(np.arange(length), length, np.full(length, key, np.uint64))
    assert np.array_equal(np.sort(out), np.arange(length))


def test_permute_looks_random() -> None:
    length, keys = 1000, 40
    first = np.concatenate([permute(np.arange(100), length, np.full(100, k, np.uint64)) for k in range(keys)])
    assert chisquare(np.bincount(first // 50, minlength=20)).pvalue > 1e-3
    steps = np.diff(permute(np.arange(length), length, np.full(length, 9, np.uint64)))
    assert len(np.unique(steps)) > 500  # 1 for a rotation
    assert (
        abs(np.corrcoef(np.arange(length), permute(np.arange(length), length, np.full(length, 9, np.uint64)))[0, 1])
        < 0.1
    )


def draw(sampler: MixtureSampler, steps: range, batch_size: int) -> list[tuple[int, int]]:
    return [pair for step in steps for pair in sampler.sample(step, batch_size)]


def test_every_window_once_per_epoch_in_a_new_order() -> None:
    lengths = [37, 100, 1]
    pairs = draw(MixtureSampler(lengths, [1, 2, 0.1], seed=3), range(200), 7)
    for d, length in enumerate(lengths):
        windows = [w for dataset, w in pairs if dataset == d]
        epochs = [windows[i : i + length] for i in range(0, len(windows) - length + 1, length)]
        assert len(epochs) >= 4
        assert all(sorted(e) == list(range(length)) for e in epochs)
        assert length == 1 or len({tuple(e) for e in epochs}) == len(epochs)


@settings(deadline=None)
@given(st.integers(0, 10**9), st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 2**40))
def test_ranks_share_the_global_batch(step: int, world_size: int, seed: int) -> None:
    sampler = MixtureSampler([50, 1000], [1, 3], seed)
    ranks = [sampler.sample(step, 12, rank, world_size) for rank in range(world_size)]
    assert [pair for part in ranks for pair in part] == sampler.sample(step, 12)
    assert all(0 <= w < (50, 1000)[d] for d, w in ranks[0])


def test_batches_depend_on_the_position_in_the_stream_only() -> None:
    sampler = MixtureSampler([50, 1000], [1, 3], seed=1)
    assert draw(sampler, range(12), 8) == draw(MixtureSampler([50, 1000], [1, 3], seed=1), range(6), 16)
    assert draw(sampler, range(12), 8) != draw(MixtureSampler([50, 1000], [1, 3], seed=2), range(12), 8)


def test_weights_are_met() -> None:
    weights = np.array([0.001, 0.2, 1.0, 3.5])
    sampler = MixtureSampler([10, 10, 10, 10], weights.tolist(), seed=0)
    for start in (0, 900):  # across the end of a period as well
        counts = Counter(d for d, _ in draw(sampler, range(start, start + 300), 64))
        observed = np.array([counts[d] for d in range(4)])
        assert chisquare(observed, weights / weights.sum() * observed.sum()).pvalue > 1e-3
    counts = Counter(d for d, _ in draw(sampler, range(PERIOD // 64), 64))
    assert all(abs(counts[d] - PERIOD * w / weights.sum()) < 1 for d, w in enumerate(weights))


@pytest.mark.parametrize(
    ("lengths", "weights"), [([], []), ([3], [1, 2]), ([3, 0], [1, 1]), ([3, 3], [1, 0]), ([3, 3], [1, -1]),
                             ([3, 3], [1, float("nan")]), ([3, 3], [1, 1e-9])],
)  # fmt: skip
def test_impossible_mixtures_are_refused(lengths, weights) -> None:
    with pytest.raises(ValueError, match="weight"):
        MixtureSampler(lengths, weights, seed=0)


# --- loader


def load(stored, start: int, steps: int, workers: int = 0, cache="ram", **changes) -> list:
    store, _ = stored
    datasets = [dataset_of(store), dataset_of(store, cache=cache, episodes=[2])]
    preprocessor = Preprocessor(contract_of([store.spec], policy_config(cameras=2)))
    sampler = MixtureSampler([len(d) for d in datasets], [1, 1], seed=4)
    arguments = {"batch_size": 6, "preprocess": preprocessor.batch, "start_step": start, "steps": steps}
    return list(loader(datasets, sampler, workers=workers, **(arguments | changes)))


def same(a, b) -> bool:
    tensors = ("images", "image_valid", "state", "language", "embodiment")
    equal = all(torch.equal(getattr(a.observation, n), getattr(b.observation, n)) for n in tensors)
    return equal and torch.equal(a.actions, b.actions) and torch.equal(a.action_valid, b.action_valid)


def test_resuming_and_workers_change_nothing(stored) -> None:
    whole = load(stored, 0, 5)
    assert len(whole) == 5
    assert whole[0].observation.images.shape == (6, 2, 2, 3, 32, 32)
    assert not same(whole[3], whole[4])
    for again in (load(stored, 3, 5), load(stored, 3, 5, workers=1)):
        assert len(again) == 2
        assert same(again[0], whole[3]) and same(again[1], whole[4])


def test_ranks_cut_the_batch(stored) -> None:
    (whole,), halves = load(stored, 2, 3), [load(stored, 2, 3, rank=r, world_size=2)[0] for r in range(2)]
    assert torch.equal(torch.cat([h.actions for h in halves]), whole.actions)
    with pytest.raises(ValueError, match="must divide by 4 ranks"):
        load(stored, 0, 1, rank=0, world_size=4)


def test_damage_stops_the_loader_and_names_the_frame(tmp_path: Path) -> None:
    make_store(tmp_path / "s.zarr", small_spec(), LENGTHS)
    shard = tmp_path / "s.zarr/segments/main-0000/images/cam0/c/0/0/0/0"
    content = bytearray(shard.read_bytes())
    content[30 * (8 * 8 * 3 + 4)] ^= 1
    shard.write_bytes(content)
    for workers in (0, 1):
        with pytest.raises(StoreError, match=r"E_CHECKSUM.*test/002\), frame 9") as caught:
            load((Store(tmp_path / "s.zarr"), None), 0, 60, workers, cache="mmap")
        assert caught.value.code == "E_CHECKSUM"


@pytest.mark.parametrize(("workers", "cache"), [(0, "mmap"), (1, "ram")])
def test_a_damaged_window_comes_as_one_that_counts_for_nothing(tmp_path: Path, workers: int, cache) -> None:
    make_store(tmp_path / "s.zarr", small_spec(), LENGTHS)
    shard = tmp_path / "s.zarr/segments/main-0000/images/cam0/c/0/0/0/0"
    content = shard.read_bytes()

    def batches() -> tuple[list, list]:
        store = Store(tmp_path / "s.zarr")
        every = [WindowDataset(store, n_obs_steps=2, chunk_size=6, pad_end="mask", cache=cache, keep_damaged=True)]
        preprocessor = Preprocessor(contract_of([store.spec], policy_config(cameras=2)))
        made = loader(every, MixtureSampler([len(every[0])], [1], seed=4), batch_size=len(every[0]), steps=1,
                      preprocess=preprocessor.batch, start_step=0, workers=workers, leave_out=True)  # fmt: skip
        return [(batch, made.left_out) for batch in made]

    ((whole, nothing),) = batches()
    shard.write_bytes(content[: 30 * (8 * 8 * 3 + 4)] + b"\0" * 8 + content[30 * (8 * 8 * 3 + 4) + 8 :])
    ((hurt, rows),) = batches()
    assert nothing == () and 1 <= len(rows) <= 2  # the windows that look at the frame
    others = np.setdiff1d(np.arange(len(whole.actions)), rows)
    assert torch.equal(whole.actions[others], hurt.actions[others])
    assert torch.equal(whole.observation.images[others], hurt.observation.images[others])
    assert not hurt.action_valid[list(rows)].any() and not hurt.observation.image_valid[list(rows)].any()
    assert whole.observation.image_valid[list(rows)].any()


def resident(*names: str) -> int:
    """Resident memory of this process by kind [bytes]."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(names))


def resident_of(folder: Path) -> int:
    """Resident memory of the files mapped from a folder [bytes]."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:  # the head of a mapping
            ours = str(folder) in line
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """1200 frames of 12 KiB in five shards."""
    path = tmp_path_factory.mktemp("larger") / "s.zarr"
    make_store(path, embodiment_from_dict(embodiment_dict(size=64)), (500, 700))
    return Store(path)


def test_memory_stays_level_over_many_windows(larger: Store) -> None:
    dataset = dataset_of(larger)
    preprocessor = Preprocessor(contract_of([larger.spec], policy_config()))
    batches = loader([dataset], MixtureSampler([len(dataset)], [1], seed=0), batch_size=20,
                     preprocess=preprocessor.batch, start_step=0, steps=400, workers=0)  # fmt: skip
    after = {}
    for step, _ in enumerate(batches):
        if step in (150, 399):  # the first 1200 windows map the files
            gc.collect()
            after[step] = resident("RssAnon", "RssFile")
    assert after[399] - after[150] < 4 * 2**20  # one frame in thirty kept would be as much


def test_mapped_pages_of_large_stores_are_given_back(larger: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_all() -> int:
        store = pickle.loads(pickle.dumps(larger))  # noqa: S301  opens its files anew
        for episode in (0, 1, 0, 1):
            for frame in range(larger.length(episode)):
                store.read_frames(episode, "cam0", [frame])
        return resident_of(larger.path)

    shards = sum(f.stat().st_size for f in larger.path.glob("segments/*/images/cam0/c/**/*") if f.is_file())
    gc.collect()
    assert read_all() > 0.9 * shards  # a small store stays mapped
    gc.collect()
    monkeypatch.setattr("dita.datasets.files.RESIDENT", 0)
    assert read_all() < 0.7 * shards


# --- inspect


def test_inspect_tells_what_is_there(stored) -> None:
    store, episodes = stored
    info = json.loads(json.dumps(inspect(store)))
    assert (info["embodiment"], info["episodes"], info["frames"]) == ("arm", 3, 54)
    assert info["frames_per_episode"] == list(LENGTHS)
    assert (info["codecs"], info["segments"], info["staged_unsealed"]) == (["raw"], ["main-0000"], 0)
    assert info["fps"] == 80 and abs(info["fps_measured"] - 80) < 1e-6
    assert info["instructions"] == {"open the drawer": 2, "press the button": 1}
    assert (info["successes"], info["success_unknown"]) == (1, 1)
    assert info["instruction_by_episode"] == [e.instruction for e in episodes]
    assert info["success_by_episode"] == [True, False, None]
    assert info["cameras"] == [{"name": f"cam{i}", "height": 8, "width": 8} for i in range(2)]
    hand, gripper = info["state"]
    assert (hand["name"], hand["unit"], gripper["size"]) == ("hand", "m", 1)
    all_states = np.concatenate([e.state for e in episodes])
    assert hand["max"] == all_states[:, :3].max(0).tolist()
    assert gripper["min"] == [all_states[:, 3].min()]
    for i, e in enumerate(episodes):
        np.testing.assert_allclose(info["action_sum"][i], e.action.astype(float).sum(0), rtol=1e-12)
        assert info["action_first"][i] == e.action[0].tolist()
        assert info["action_last"][i] == e.action[-1].tolist()
        hashes = info["frame_sha256"]["cam1"][i]
        assert hashes["first"] == hashlib.sha256(e.images["cam1"][0].tobytes()).hexdigest()
        assert hashes["last"] == hashlib.sha256(e.images["cam1"][-1].tobytes()).hexdigest()


def test_the_table_fits_a_narrow_terminal(stored) -> None:
    store, _ = stored
    console = Console(file=io.StringIO(), width=100)
    print_table(inspect(store), console)
    text = console.file.getvalue()
    for expected in ("3, 1 successful, 1 unknown", "54; 1 to 33 per episode", "state.hand[2]", "action.grip", "80 Hz"):
        assert expected in text
    assert "…" not in text


def test_the_sheet_has_a_row_per_episode_and_camera(stored, tmp_path: Path) -> None:
    store, _ = stored
    contact_sheet(store, tmp_path / "sheet.png")
    height, width, _ = matplotlib.image.imread(tmp_path / "sheet.png").shape
    assert width == 1200 and abs(height / 6 - 195) < 1


def test_the_command_prints_json_or_refuses(stored, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store, _ = stored
    inspect_command(str(store.path), verify=True, as_json=True, sheet=None)
    info = json.loads(capsys.readouterr().out)
    assert info["verified"] is True and info["frames"] == 54
    make_store(tmp_path / "s.zarr", small_spec(), (3,))
    stamp = tmp_path / "s.zarr/segments/main-0000/stamp/c/0"
    content = bytearray(stamp.read_bytes())
    content[5] ^= 1
    stamp.write_bytes(content)
    with pytest.raises(StoreError, match=r"E_CHECKSUM: .*/stamp/c/0: .*episode 0 \(test/000\), frame 0"):
        inspect_command(str(tmp_path / "s.zarr"), verify=True, as_json=True, sheet=None)
