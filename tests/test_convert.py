"""Converters: the contract suite over every source, the driver's account, and what every source checks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numcodecs
import numpy as np
import pytest
from conftest import embodiment_dict, field
from convert_inputs import (
    CASES,
    ENV_ARGS,
    Case,
    aloha_arrays,
    demo_arrays,
    frames_of,
    length_of,
    make_robomimic,
    padded_jpegs,
    write_aloha,
    write_demo,
    write_zarr2,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from dita.cli import main
from dita.datasets.convert import SOURCES, base, diffusion_policy, run
from dita.datasets.convert.base import Item, Rejected, assemble, check, check_size, fit_spec, padded, to_si
from dita.datasets.store import Store, StoreError, StoreWriter
from dita.embodiment import embodiment_from_dict, embodiment_to_dict, load_embodiment
from dita.types import EmbodimentSpec, Episode

REFERENCE = Path(__file__).parents[1] / "../shared/reference/datasets"
ITEM = Item("episode_000000", "file", 0)


@dataclasses.dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def account(self) -> str:
        return self.out.strip().rpartition(": ")[2]


@pytest.fixture
def convert(capsys) -> Callable[..., Result]:
    def call(case: Case, path: Path, out: Path, *more: str, workers: int = 0) -> Result:
        argv = ["convert", case.source, str(path), str(out), "--workers", str(workers), *case.args, *more]
        code = main(argv)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(code, captured.out, captured.err)

    return call


@pytest.fixture(params=sorted(CASES))
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture
def robomimic() -> Case:
    return CASES["robomimic"]


def tree(folder: Path) -> dict[str, str]:
    """Hash every file below a folder."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def rejections(out: Path) -> list[dict[str, str]]:
    path = run.rejected_file(out)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def assert_holds(out: Path, case: Case, numbers: Sequence[int]) -> None:
    store = Store(out)
    store.verify()
    assert [store.length(i) for i in range(len(store.episodes))] == [length_of(n) for n in numbers]
    for i, number in enumerate(numbers):
        np.testing.assert_allclose(store.action(i), case.action(number), rtol=1e-6, atol=1e-7)
        frames = store.read_frames(i, store.spec.cameras[-1].name, range(store.length(i)))
        assert np.array_equal(frames, frames_of(number))


def test_every_code_is_explained() -> None:
    sources = (Path(base.__file__).parent).glob("*.py")
    used = {code for path in sources for code in re.findall(r"[\"'(]([EW]_[A-Z_]+)[\"']", path.read_text())}
    assert used - {"E_LOCKED"} <= set(base.CODES)
    page = (Path(__file__).parents[1] / "docs" / "converting.md").read_text()
    assert [code for code, about in base.CODES.items() if f"| `{code}` | {about} |" not in page] == []


# --- the contract, on every source


def test_every_source_has_a_case_or_tests_of_its_own() -> None:
    others = "".join(p.stem for p in Path(__file__).parent.glob("test_convert_*.py"))
    assert [name for name in SOURCES if name not in CASES and name not in others] == []


def test_every_episode_comes_out_in_numeric_order(case, convert, tmp_path) -> None:
    result = convert(case, case.make(tmp_path), tmp_path / "s.zarr")
    assert (result.code, result.account) == (0, "in 4 = written 4 + rejected 0 + already there 0")
    assert_holds(tmp_path / "s.zarr", case, range(4))
    assert rejections(tmp_path / "s.zarr") == []


def test_workers_do_not_change_the_bytes(case, convert, tmp_path) -> None:
    path = case.make(tmp_path)
    assert convert(case, path, tmp_path / "a.zarr").code == 0
    assert convert(case, path, tmp_path / "b.zarr", workers=2).code == 0
    assert tree(tmp_path / "a.zarr") == tree(tmp_path / "b.zarr")


def test_the_first_rejection_ends_the_run_and_leaves_a_valid_store(case, convert, tmp_path) -> None:
    path, out = case.make(tmp_path), tmp_path / "s.zarr"
    code = case.spoil(path)
    result = convert(case, path, out)
    assert result.code == 1
    assert result.account == "in 4 = written 2 + rejected 1 + already there 0 + not read 1"
    assert f"dita convert: {code}: " in result.err and result.err.count(f"{code}: ") == 1
    assert_holds(out, case, [0, 1])


def test_quarantine_writes_the_rest_and_lists_the_rejection(case, convert, tmp_path) -> None:
    path, out = case.make(tmp_path), tmp_path / "s.zarr"
    code = case.spoil(path)
    result = convert(case, path, out, "--quarantine")
    assert (result.code, result.account) == (0, "in 4 = written 3 + rejected 1 + already there 0")
    (line,) = rejections(out)
    assert line["code"] == code and all(line[key] for key in ("episode", "expected", "found", "todo"))
    assert Path(line["file"]).is_relative_to(path)
    assert_holds(out, case, [0, 1, 3])


def test_resume_after_an_interrupt_reads_only_what_is_missing(case, convert, tmp_path, monkeypatch) -> None:
    path, out = case.make(tmp_path), tmp_path / "s.zarr"
    read, seen = run.Reader.read, []

    def interrupted(self: Any, item: Item) -> Any:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(item.id)
        return read(self, item)

    monkeypatch.setattr(run.Reader, "read", interrupted)
    result = convert(case, path, out)
    assert result.code == 130
    assert result.account == "in 4 = written 2 + rejected 0 + already there 0 + not read 2"
    monkeypatch.setattr(run.Reader, "read", lambda self, item: seen.append(item.id) or read(self, item))
    result = convert(case, path, out, "--resume")
    assert (result.code, result.account) == (0, "in 4 = written 2 + rejected 0 + already there 2")
    assert len(seen) == len(set(seen)) == 4
    assert_holds(out, case, range(4))
    result = convert(case, path, out, "--resume")
    assert (result.code, result.account) == (0, "in 4 = written 0 + rejected 0 + already there 4")


def test_an_existing_store_is_not_touched_unasked(case, convert, tmp_path) -> None:
    path, out = case.make(tmp_path), tmp_path / "s.zarr"
    assert convert(case, path, out).code == 0
    before = tree(out)
    result = convert(case, path, out)
    assert result.code == 1 and "--resume" in result.err and tree(out) == before
    case.spoil(path)
    assert convert(case, path, out, "--resume").code == 0  # what is there is not read again
    assert tree(out) == before
    assert convert(case, path, out, "--overwrite", "--quarantine").code == 0
    assert_holds(out, case, [0, 1, 3])


def test_nothing_is_written_elsewhere(case, convert, tmp_path) -> None:
    (tmp_path / "in").mkdir()
    path, out = case.make(tmp_path / "in"), tmp_path / "out" / "s.zarr"
    (tmp_path / "out").mkdir()
    (tmp_path / "canary").write_text("tweet")
    before = tree(tmp_path)
    case.spoil(path)
    spoiled = tree(tmp_path)
    assert convert(case, path, out, "--quarantine").code == 0
    after = tree(tmp_path)
    assert {k: after.get(k) for k in spoiled} == spoiled
    new = set(after) - set(before)
    assert all(name.startswith(("out/s.zarr/", "out/s.zarr.rejected.jsonl")) for name in new)


def test_jpeg_stores_are_close(case, convert, tmp_path) -> None:
    out = tmp_path / "s.zarr"
    assert convert(case, case.make(tmp_path), out, "--codec", "jpeg").code == 0
    store = Store(out)
    assert store.codecs == ("jpeg",)
    frames = store.read_frames(0, store.spec.cameras[-1].name, range(5))
    assert np.abs(frames.astype(int) - frames_of(0)).mean() < 12  # noise is the worst picture there is


def test_cameras_are_chosen_and_named(case, convert, tmp_path) -> None:
    path = case.make(tmp_path)
    keys = {"robomimic": "agentview_image", "aloha": "top", "lerobot": "top", "diffusion_policy": "img"}
    keys |= {"rlds": "image", "mcap": "/camera/image_raw"}
    key = keys[case.source]
    name = "corner4" if "--embodiment" in case.args else "front"
    result = convert(case, path, tmp_path / "s.zarr", "-o", f"cameras={name}:{key}")
    assert result.code == 0, result.err
    store = Store(tmp_path / "s.zarr")
    assert [c.name for c in store.spec.cameras] == [name]
    assert_holds(tmp_path / "s.zarr", case, range(4))
    result = convert(case, path, tmp_path / "t.zarr", "-o", "cameras=nose")
    assert result.code == 1 and f"expected nose, found only {'angle, ' * (case.source == 'aloha')}{key}" in result.err


def test_unknown_options_say_what_there_is(case, convert, tmp_path) -> None:
    result = convert(case, case.make(tmp_path), tmp_path / "s.zarr", "-o", "nonsense=1")
    assert result.code == 1 and "has no option nonsense; it has" in result.err
    assert not (tmp_path / "s.zarr").exists()


# --- the driver


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(robomimic, tmp_path) -> None:
    """Kill the command while it stages and while it seals; the store stays whole, and a rerun completes it."""
    path, out = tmp_path / "set.hdf5", tmp_path / "s.zarr"
    with h5py.File(path, "w") as file:
        for number in range(40):
            arrays = demo_arrays(0) | {"actions": demo_arrays(0)["actions"] * (number + 1) / 40}
            write_demo(file, f"demo_{number}", arrays)
        file["data"].attrs["env_args"] = json.dumps(ENV_ARGS)
    command = [sys.executable, "-m", "dita.cli", "convert", "robomimic", str(path), "--resume", "--workers", "0"]
    moments = [*(("staging/*/*/episode.json", n) for n in (2, 9, 23, 38)), ("segments/main-0000", 1)]
    for pattern, count in moments:
        process = subprocess.Popen([*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and len(list(out.glob(pattern))) < count:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if list(out.glob("segments/*.sealed.json")):
            Store(out).verify()
    result = subprocess.run([*command, str(out)], check=True, capture_output=True, text=True)
    assert "in 40 = " in result.stdout and "rejected 0" in result.stdout
    subprocess.run([*command, str(tmp_path / "whole.zarr")], check=True, capture_output=True)
    Store(out).verify()
    one, two = Store(tmp_path / "whole.zarr"), Store(out)
    contents = {e.source: e.content_hash for e in two.episodes}
    assert contents == {e.source: e.content_hash for e in one.episodes} and len(contents) == len(two.episodes) == 40


class CrashingReader(run.Reader):
    """Dies on the third episode, as a decoder does on hostile input."""

    def read(self, item: Item) -> run.Outcome:
        if item.key == "demo_9":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(item)


def test_a_worker_that_dies_rejects_one_episode(robomimic, convert, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(run, "Reader", CrashingReader)
    result = convert(robomimic, robomimic.make(tmp_path), tmp_path / "s.zarr", "--quarantine", workers=2)
    assert (result.code, result.account) == (0, "in 4 = written 3 + rejected 1 + already there 0")
    assert [line["code"] for line in rejections(tmp_path / "s.zarr")] == ["E_CRASH"]


def test_what_a_library_says_about_a_file_is_a_rejection(robomimic, convert, tmp_path, monkeypatch) -> None:
    def read(self: Any, path: Path, item: Item) -> Episode:
        raise ZeroDivisionError("by a decoder")

    monkeypatch.setattr("dita.datasets.convert.robomimic.RobomimicSource._read", read)
    result = convert(robomimic, robomimic.make(tmp_path), tmp_path / "s.zarr", "--quarantine")
    assert (result.code, result.account) == (1, "in 4 = written 0 + rejected 4 + already there 0")
    assert {(line["code"], line["found"]) for line in rejections(tmp_path / "s.zarr")} == {
        ("E_READ", "ZeroDivisionError: by a decoder")
    }


def test_warnings_of_a_kind_are_counted(robomimic, convert, tmp_path) -> None:
    path = make_robomimic(tmp_path)
    with h5py.File(path, "r+") as file:
        for name in ("demo_1", "demo_9"):
            file[f"data/{name}/obs/robot0_eef_pos"][0, 0] = 2.5
    result = convert(robomimic, path, tmp_path / "s.zarr")
    lines = [line for line in result.err.splitlines() if "outside" in line or "eef_pos: expected" in line]
    assert lines == [
        "warning: set/demo_000001: state.robot0_eef_pos: expected -2 .. 2 m, found 2.5 at frame 0 (20.0% of frames) "
        "(2 such)"
    ]


def test_when_everything_is_rejected_there_is_no_store(robomimic, convert, tmp_path) -> None:
    path = tmp_path / "set.hdf5"
    with h5py.File(path, "w") as file:
        for number in range(2):
            write_demo(file, f"demo_{number}", demo_arrays(number) | {"actions": np.full((5 + number, 7), np.nan)})
        file["data"].attrs["env_args"] = json.dumps(ENV_ARGS)
    result = convert(robomimic, path, tmp_path / "s.zarr", "--quarantine")
    assert (result.code, result.account) == (1, "in 2 = written 0 + rejected 2 + already there 0")
    assert "nothing was written" in result.err and not (tmp_path / "s.zarr").exists()


def test_overwrite_deletes_nothing_but_stores(robomimic, convert, tmp_path, monkeypatch) -> None:
    path, out = robomimic.make(tmp_path), tmp_path / "precious"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    for more in (("--overwrite",), ("--resume",), ()):
        assert convert(robomimic, path, out, *more).code == 1
        assert tree(out).keys() == {"thesis.txt"}
    good = tmp_path / "s.zarr"
    assert convert(robomimic, path, good).code == 0
    before = tree(good)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert convert(robomimic, path, good, "--overwrite", "--ray", "auto").code == 1
    assert tree(good) == before


def test_large_inputs_are_sealed_as_they_come(robomimic, convert, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(run, "SEAL_BYTES", 12_000)
    assert convert(robomimic, robomimic.make(tmp_path), tmp_path / "s.zarr").code == 0
    assert [e.segment for e in Store(tmp_path / "s.zarr").episodes] == ["main-0000"] * 2 + ["main-0001"] * 2
    assert_holds(tmp_path / "s.zarr", robomimic, range(4))


def test_a_full_disk_keeps_what_was_finished(robomimic, convert, tmp_path, monkeypatch) -> None:
    add, path, out = StoreWriter.add, robomimic.make(tmp_path), tmp_path / "s.zarr"

    def full(self: StoreWriter, episode: Episode) -> str:
        if len(self.sources()) == 2:
            raise StoreError(f"E_NOSPACE: {out} is full; free some and rerun with --resume")
        return add(self, episode)

    monkeypatch.setattr(StoreWriter, "add", full)
    result = convert(robomimic, path, out)
    assert result.code == 1 and result.account.endswith("not read 2") and "E_NOSPACE" in result.err
    monkeypatch.setattr(StoreWriter, "add", add)
    result = convert(robomimic, path, out, "--resume")
    assert (result.code, result.account) == (0, "in 4 = written 2 + rejected 0 + already there 2")
    assert_holds(out, robomimic, range(4))


def test_a_second_writer_is_told_to_wait(robomimic, convert, tmp_path) -> None:
    path, out = robomimic.make(tmp_path), tmp_path / "s.zarr"
    assert convert(robomimic, path, out).code == 0
    writer = StoreWriter.create(out, Store(out).spec, source="robomimic set.hdf5", licence="unknown", exist="resume")
    try:
        result = convert(robomimic, path, out, "--resume")
        assert result.code == 1 and "E_LOCKED" in result.err
    finally:
        writer.close()
    assert_holds(out, robomimic, range(4))


def test_a_duplicate_is_counted_and_not_written_twice(robomimic, convert, tmp_path) -> None:
    path = make_robomimic(tmp_path)
    with h5py.File(path, "r+") as file:
        file.copy("data/demo_2", "data/demo_20")
    result = convert(robomimic, path, tmp_path / "s.zarr")
    assert (result.code, result.account) == (0, "in 5 = written 4 + rejected 1 + already there 0")
    assert [line["code"] for line in rejections(tmp_path / "s.zarr")] == ["W_DUP"]
    result = convert(robomimic, path, tmp_path / "s.zarr", "--resume")
    assert (result.code, result.account) == (0, "in 5 = written 0 + rejected 1 + already there 4")


def test_a_duplicate_in_another_split_is_refused(robomimic, convert, tmp_path) -> None:
    path = make_robomimic(tmp_path)
    with h5py.File(path, "r+") as file:
        file.copy("data/demo_2", "data/demo_20")
        file["mask/train"] = np.array([b"demo_1", b"demo_2", b"demo_9", b"demo_10"])
        file["mask/valid"] = np.array([b"demo_20"])
    result = convert(robomimic, path, tmp_path / "s.zarr")
    assert result.code == 1 and "E_DUP" in result.err and "of split train" in result.err


def copy(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))  # noqa: S301  what was pickled here


class Here:
    """A cluster of one machine: its tasks run one after the other in this process."""

    def size(self) -> int:
        return 2

    def map(self, function: Callable[..., Any], jobs: Sequence[tuple]) -> list[Any]:
        return [copy(function(*copy(job))) for job in jobs]


def test_a_cluster_writes_one_segment_per_task(case, convert, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(run, "ray_cluster", lambda address: Here())
    path, out = case.make(tmp_path), tmp_path / "s.zarr"
    result = convert(case, path, out, "--ray", "auto")
    assert (result.code, result.account) == (0, "in 4 = written 4 + rejected 0 + already there 0")
    assert Store(out).segments == ("ray0000-0000", "ray0001-0000")
    assert_holds(out, case, range(4))
    result = convert(case, path, out, "--ray", "auto", "--resume")
    assert (result.code, result.account) == (0, "in 4 = written 0 + rejected 0 + already there 4")


def test_a_cluster_counts_rejections_and_duplicates_of_all_tasks(robomimic, convert, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(run, "ray_cluster", lambda address: Here())
    seen = run.Book.__init__
    # tasks on other machines may not see each other's staged episodes
    monkeypatch.setattr(run, "stage_share", unseeing)
    path, out = make_robomimic(tmp_path), tmp_path / "s.zarr"
    with h5py.File(path, "r+") as file:
        file.copy("data/demo_1", "data/demo_30")
    assert robomimic.spoil(path) == "E_VALUE"
    result = convert(robomimic, path, out, "--ray", "auto", "--quarantine")
    assert (result.code, result.account) == (0, "in 5 = written 3 + rejected 2 + already there 0")
    assert sorted(line["code"] for line in rejections(out)) == ["E_VALUE", "W_DUP"]
    assert_holds(out, robomimic, [0, 1, 3])
    assert seen is run.Book.__init__


def unseeing(config: run.ConvertConfig, spec: EmbodimentSpec, items: Sequence[Item], name: str) -> run.Tally:
    """Stage a share in a store of its own, then move it: the task has seen nobody else's episodes."""
    apart = dataclasses.replace(config, out=config.out.with_name(f"{name}.zarr"))
    tally = STAGE_SHARE(apart, spec, items, name)
    (config.out / "staging").mkdir(exist_ok=True)
    if (apart.out / "staging" / name).exists():
        (apart.out / "staging" / name).rename(config.out / "staging" / name)
    return tally


STAGE_SHARE = run.stage_share


def test_without_ray_the_flag_says_so(robomimic, convert, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    result = convert(robomimic, robomimic.make(tmp_path), tmp_path / "s.zarr", "--ray", "auto")
    assert result.code == 1 and "dita[cluster]" in result.err
    assert not (tmp_path / "s.zarr").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["convert", "robomimic", "/nowhere.hdf5", "/tmp/dita-test-none"], "/nowhere.hdf5 does not exist"),
        (["convert", "robomimic", "{}", "/tmp/dita-test-none", "--workers", "-1"], "--workers must be >= 0"),
        (["convert", "robomimic", "{}", "/tmp/dita-test-none", "-o", "mask"], "KEY=VALUE"),
        (["convert", "robomimic", "{}", "/tmp/dita-test-none", "--embodiment", "nobody"], "no embodiment 'nobody'"),
        (["convert", "robomimic", "{}", "/tmp/dita-test-none", "-o", "flip=up"], "flip must be"),
        (["convert", "robomimic", "{}", "/tmp/dita-test-none", "-o", "mask=few"], "mask/few"),
        (["convert", "aloha", "{}", "/tmp/dita-test-none"], "--instruction TEXT"),
    ],
)
def test_commands_that_say_too_little_are_one_line(argv, message, tmp_path, capsys) -> None:
    path = make_robomimic(tmp_path)
    assert main([a.format(path) for a in argv]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert not Path("/tmp/dita-test-none").exists()


# --- what every source checks


def make_spec(**changes: Any) -> EmbodimentSpec:
    return embodiment_from_dict(embodiment_dict(size=8) | changes)


def make_episode(spec: EmbodimentSpec, frames: int = 40, **changes: Any) -> Episode:
    rng = np.random.default_rng(0)
    values = {
        "images": {c.name: rng.integers(0, 256, (frames, c.height, c.width, 3), np.uint8) for c in spec.cameras},
        "state": np.concatenate([f_values(f.low, f.high, frames, rng) for f in spec.state], axis=1),
        "action": np.concatenate([f_values(f.low, f.high, frames, rng) for f in spec.action], axis=1),
        "stamp": np.arange(frames) / spec.control_hz,
        "instruction": "test", "success": None, "source": ITEM.id,
    }  # fmt: skip
    return Episode(**(values | changes))


def f_values(low: Sequence[float], high: Sequence[float], frames: int, rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(low, high, (frames, len(low))).astype(np.float32)


def changed(values: np.ndarray, index: Any, value: float) -> np.ndarray:
    values = values.copy()
    values[index] = value
    return values


def test_a_good_episode_passes_without_a_word() -> None:
    assert check(make_episode(make_spec()), make_spec(), ITEM) == []


@pytest.mark.parametrize(
    ("changes", "code", "found"),
    [
        (
            lambda e: {"state": changed(e.state, (3, 1), np.nan)},
            "E_VALUE",
            "hand[1]: expected finite values, found nan at frame 3 (2.5%",
        ),
        (
            lambda e: {"action": changed(e.action, (0, 0), np.inf)},
            "E_VALUE",
            "delta[0]: expected finite values, found inf at frame 0",
        ),
        (lambda e: {"state": e.state[:-1]}, "E_LENGTH", "'state': 39"),
        (lambda e: {"stamp": e.stamp[::-1].copy()}, "E_STAMP", "stamps must increase"),
        (lambda e: {"stamp": e.stamp * 2}, "E_STAMP", "0.025 s apart"),
        (lambda e: {"instruction": " "}, "E_INSTRUCTION", "none"),
        (lambda e: {"state": e.state * [1000, 1000, 1000, 1]}, "E_UNITS", "at frame 0"),
        (lambda e: {"state": changed(e.state, (7, 0), 3.5)}, "E_VALUE", "3.5 at frame 7 (2.5% of frames)"),
        (lambda e: {"state": changed(e.state, (9, 3), 2.0)}, "E_POLARITY", "2 at frame 9"),
        (lambda e: {"images": {"cam0": changed(e.images["cam0"], slice(0, 3), 0)}}, "E_CAMERA", "3 of one colour"),
    ],
)
def test_faults_have_their_codes(changes, code, found) -> None:
    spec = make_spec()
    good = make_episode(spec)
    values = {k: v.astype(np.float32) if k in ("state", "action") else v for k, v in changes(good).items()}
    with pytest.raises(Rejected) as error:
        check(dataclasses.replace(good, **values), spec, ITEM)
    assert error.value.code == code and found in str(error.value) and "\n" not in str(error.value)
    assert error.value.episode == ITEM.id and error.value.todo


def test_a_little_is_a_warning_with_its_count() -> None:
    spec = make_spec()
    good = make_episode(spec)
    images = {"cam0": changed(good.images["cam0"], slice(5, 7), 9)}
    notes = check(dataclasses.replace(good, images=images, state=changed(good.state, (2, 0), 1.2)), spec, ITEM)
    assert len(notes) == 2 and "2 of one colour, the first at 5 (5.0%" in notes[1] and "1.2 at frame 2" in notes[0]
    still = {"cam0": np.repeat(good.images["cam0"][:1], 40, axis=0)}
    assert "all 40 frames are equal" in check(dataclasses.replace(good, images=still), spec, ITEM)[0]


@pytest.mark.parametrize("frames", [0, 1])
def test_episodes_of_no_or_one_frame_are_rejected(frames) -> None:
    spec = make_spec()
    with pytest.raises(Rejected, match=r"^E_EMPTY: .*at least 2 frames, found"):
        check(make_episode(spec, frames), spec, ITEM)


def test_joints_that_never_move_are_named() -> None:
    spec = make_spec(state=[field("arm", "joint_position", 3, 0, bound=2.9) | {"unit": "rad"}])
    good = make_episode(spec)
    notes = check(dataclasses.replace(good, state=changed(good.state, (slice(None), 1), 0.5)), spec, ITEM)
    assert notes == ["episode_000000: state.arm: joints [1] have one value in all 40 frames"]
    assert copy(notes[0]).group == notes[0].group


def test_degrees_in_a_field_of_radians() -> None:
    joint = field("joint", "joint_position", 1, 0, bound=2.9) | {"unit": "rad"}
    spec = make_spec(state=[joint])
    for degrees in (30.0, 80.0, 170.0):
        state = np.linspace(-degrees, degrees, 40, dtype=np.float32)[:, None]
        with pytest.raises(Rejected, match=r"^E_UNITS: .*degrees"):
            check(dataclasses.replace(make_episode(spec), state=state), spec, ITEM)
        assert check(dataclasses.replace(make_episode(spec), state=np.radians(state) * 0.9), spec, ITEM) == []


def test_a_gripper_that_goes_the_other_way_is_upside_down() -> None:
    spec = make_spec()
    good = make_episode(spec, 240)
    command = np.where(np.arange(240) % 160 < 80, 1, -1).astype(np.float32)
    position = np.clip(0.5 + 0.5 * np.roll(command, 3), 0.05, 0.95)
    right = dataclasses.replace(
        good,
        action=np.concatenate([good.action[:, :3], command[:, None]], axis=1),
        state=np.concatenate([good.state[:, :3], position[:, None]], axis=1),
    )
    assert check(right, spec, ITEM) == []
    wrong = dataclasses.replace(right, state=right.state * [1, 1, 1, -1] + [0, 0, 0, 1])
    wrong = dataclasses.replace(wrong, state=wrong.state.astype(np.float32))
    with pytest.raises(Rejected, match=r"^E_POLARITY: .*correlation -"):
        check(wrong, spec, ITEM)


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 60))
def test_random_episodes_are_never_upside_down(seed, frames) -> None:
    spec = make_spec(cameras=[])
    rng = np.random.default_rng(seed)
    state = np.concatenate([f_values(f.low, f.high, frames, rng) for f in spec.state], axis=1)
    action = np.concatenate([f_values(f.low, f.high, frames, rng) for f in spec.action], axis=1)
    state[:, 3] = np.abs(state[:, 3])
    assert check(make_episode(spec, frames, state=state, action=action, images={}), spec, ITEM) == []


HOSTILE = [
    "../x",
    "a/../../x",
    "/etc/passwd",
    "a\0b",
    "x" * 300,
    "C:\\x",
    "c:x",
    "a\\..\\b",
    "",
    "..",
    "a\nb",
    "\x1b[31m",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused_in_one_line(name, tmp_path) -> None:
    with pytest.raises(Rejected) as error:
        base.safe_path(tmp_path, name)
    assert error.value.code == "E_PATH" and len(str(error.value)) < 400 + len(str(tmp_path))
    assert str(error.value).isprintable()


def test_links_pipes_and_folders_in_an_input_are_refused(tmp_path) -> None:
    root = tmp_path / "in"
    (root / "sub").mkdir(parents=True)
    (tmp_path / "secret.h5").write_text("x")
    (root / "good.h5").write_text("x")
    (root / "inside.h5").symlink_to("good.h5")
    (root / "out.h5").symlink_to(tmp_path / "secret.h5")
    (root / "folder.h5").symlink_to(root / "sub")
    os.mkfifo(root / "pipe.h5")
    listed = base.list_files(root, ".h5")
    assert [p.name for p in listed] == ["folder.h5", "good.h5", "inside.h5", "out.h5", "pipe.h5"]
    verdicts = {}
    for path in listed:
        try:
            base.check_inside(root, path)
            verdicts[path.name] = "good"
        except Rejected as e:
            verdicts[path.name] = e.code
    assert verdicts == {
        "good.h5": "good", "inside.h5": "good", "out.h5": "E_PATH", "folder.h5": "E_PATH", "pipe.h5": "E_PATH"
    }  # fmt: skip


def test_bombs_are_refused_before_anything_is_allocated() -> None:
    for shape, stored in (
        ((10**6, 1000, 1000, 3), None),
        ((10, 10**5, 10**5, 3), None),
        ((10**9,), None),
        ((2**40, 2**40), None),
        ((1000, 1000, 1000), 10_000),
    ):
        with pytest.raises(Rejected, match=r"^E_PATH: "):
            check_size(shape, 1, "file", "key", stored)
    check_size((1000, 480, 640, 3), 1, "file", "key", 100 * 2**20)
    check_size((64, 64, 3), 1, "file", "key", 8)  # small ones may be of one colour


@settings(deadline=None)
@given(st.lists(st.integers(0, 999_999), min_size=2, max_size=20, unique=True))
def test_padded_names_sort_as_numbers(numbers) -> None:
    names = [f"demo_{n}" for n in numbers]
    assert [names.index(n) for n in sorted(names, key=padded)] == [numbers.index(n) for n in sorted(numbers)]
    assert sorted(names, key=padded) == sorted(names, key=base.natural)


def test_a_rejection_survives_its_process() -> None:
    for kind in (Rejected, base.Refused):
        error = kind("E_VALUE", "f", "e", "k", "x", "y\nz", "do")
        twin = copy(error)
        assert type(twin) is kind and str(twin) == str(error) == "E_VALUE: f: episode e: k: expected x, found y z; do"
        assert twin.fields() == error.fields()


def test_grippers_count_from_the_open_end() -> None:
    spec = make_spec(state=[field("g", "gripper_position", 1, 0) | {"scale": -1.25, "low": [0.0], "high": [1.0]}])
    np.testing.assert_allclose(to_si(np.array([[0.0], [0.4], [0.8]]), spec.state)[:, 0], [1, 0.5, 0], atol=1e-7)
    effort = make_spec(state=[field("g", "gripper_effort", 1, 0) | {"scale": -1.0}])
    np.testing.assert_allclose(to_si(np.array([[-1.0], [1.0]]), effort.state)[:, 0], [1, -1])


@settings(deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["xyzw", "wxyz", "rotvec", "6d"]))
def test_rotations_come_out_as_two_columns_whatever_the_sign(seed, kind) -> None:
    rng = np.random.default_rng(seed)
    rotation = Rotation.random(6, random_state=seed)
    signs = rng.choice([-1.0, 1.0], (6, 1))
    matrix = rotation.as_matrix()
    columns = {
        "xyzw": rotation.as_quat() * signs, "wxyz": rotation.as_quat(scalar_first=True) * signs,
        "rotvec": rotation.as_rotvec(), "6d": np.concatenate([matrix[:, :, 0], matrix[:, :, 1]], axis=1),
    }[kind]  # fmt: skip
    turn = field("turn", "ee_rotation_6d", 6, 0) | {"unit": "1"}
    spec = make_spec(state=[turn, field("x", "ee_position", 1, 6) | {"scale": 2.0}])
    found = assemble(np.concatenate([columns, np.ones((6, 1))], axis=1), spec.state, kind[-4:], "f", "k")
    np.testing.assert_allclose(found[:, :3], matrix[:, :, 0], atol=1e-6)
    np.testing.assert_allclose(found[:, 3:6], matrix[:, :, 1], atol=1e-6)
    assert np.all(found[:, 6] == 2.0)


def test_columns_that_do_not_fit_and_quaternions_that_are_none_are_refused() -> None:
    spec = make_spec(state=[field("turn", "ee_rotation_6d", 6, 0), field("x", "ee_position", 3, 6)])
    with pytest.raises(Rejected, match=r"^E_SCHEMA: .*turn\[6\], x\[3\], found 8 columns"):
        assemble(np.ones((4, 8)), spec.state, "xyzw", "f", "k")
    values = np.tile([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0], (4, 1))
    values[2, :4] = 0
    with pytest.raises(Rejected, match=r"^E_VALUE: .*norm 0 at frame 2 \(25.0% of frames\)"):
        assemble(values, spec.state, "xyzw", "f", "k")


def test_joints_are_matched_by_name() -> None:
    assert base.reorder(["a", "b", "c"], ["c", "x", "a", "b"], "f", "k") == [2, 3, 0]
    for names in (["a", "b"], ["a", "b", "c", "b"], []):
        with pytest.raises(Rejected, match=r"^E_JOINTS: "):
            base.reorder(["a", "b", "c"], names, "f", "k")


def test_fitting_an_embodiment() -> None:
    spec = make_spec(cameras=[{"name": n, "height": 8, "width": 8, "slot": i} for i, n in enumerate("ab")])
    fitted, notes = fit_spec(spec, {"c": (4, 6), "a": (8, 8)}, 40.0, given=False, file="f")
    assert [(c.name, c.height, c.width, c.slot) for c in fitted.cameras] == [("a", 8, 8, 0), ("c", 4, 6, 1)]
    assert (fitted.control_hz, fitted.action_dt, fitted.obs_dt) == (40.0, 0.025, 0.05) and notes == []
    fitted, notes = fit_spec(spec, {"c": (4, 6), "a": (8, 8), "b": (4, 6)}, 80.0, given=True, file="f")
    assert [c.name for c in fitted.cameras] == ["a", "b"] and fitted.action_dt == spec.action_dt
    assert any("left out" in n and "c" in n for n in notes) and any("camera b: 6 x 4" in n for n in notes)
    for sizes, hz, code in (({"a": (8, 8)}, 80.0, "E_SCHEMA"), ({"a": (8, 8), "b": (8, 8)}, 30.0, "E_STAMP")):
        with pytest.raises(Rejected, match=f"^{code}: "):
            fit_spec(spec, sizes, hz, given=True, file="f")
    with pytest.raises(Rejected, match=r"^E_PATH: "):
        fit_spec(spec, {"cam": (8, 8), "CAM": (8, 8)}, 80.0, given=False, file="f")


# --- robomimic


def edit(path: Path, change: Callable[[h5py.File], Any]) -> Path:
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def drop(key: str) -> Callable[[h5py.File], Any]:
    return lambda file: file.__delitem__(key)


def put(key: str, value: Any, **options: Any) -> Callable[[h5py.File], Any]:
    def change(file: h5py.File) -> None:
        if key in file:
            del file[key]
        if isinstance(value, (h5py.SoftLink, h5py.ExternalLink)):
            file[key] = value
        else:
            file.create_dataset(key, data=value, **options)

    return change


def unwritten(file: h5py.File) -> None:
    del file["data/demo_9/obs/agentview_image"]
    data = file.create_dataset("data/demo_9/obs/agentview_image", (7, 16, 24, 3), "u1", chunks=(1, 16, 24, 3))
    data[:6] = 7


def raw_external(file: h5py.File) -> None:
    del file["data/demo_9/actions"]
    raw = Path(file.filename).parent / "raw.bin"
    raw.write_bytes(bytes(7 * 7 * 8))
    file.create_dataset("data/demo_9/actions", (7, 7), "f8", external=[(str(raw), 0, h5py.h5f.UNLIMITED)])


def shorten(file: h5py.File, frames: int) -> None:
    del file["data/demo_9"]
    write_demo(file, "demo_9", {key: values[:frames] for key, values in demo_arrays(2).items()})


def leak(file: h5py.File) -> None:
    file["mask/train"] = np.array([b"demo_1", b"demo_9", b"demo_10"])
    file["mask/valid"] = np.array([b"demo_2", b"demo_9"])


def raw(file: h5py.File) -> None:
    file.move("data/demo_9/obs", "data/demo_9/states")


def virtual(file: h5py.File) -> None:
    del file["data/demo_9/actions"]
    layout = h5py.VirtualLayout((7, 7), "f8")
    layout[:] = h5py.VirtualSource("other.h5", "x", (7, 7))
    file.create_virtual_dataset("data/demo_9/actions", layout)


IMAGE = "data/demo_9/obs/agentview_image"


@pytest.mark.parametrize(
    ("change", "code", "found"),
    [
        (drop("data/demo_9/actions"), "E_KEY", "/data/demo_9/actions"),
        (drop("data/demo_9/obs"), "E_KEY", "/data/demo_9/obs"),
        (raw, "E_KEY", "dataset_states_to_obs.py"),
        (leak, "E_DUP", "train+valid"),
        (lambda f: shorten(f, 0), "E_EMPTY", "0"),
        (lambda f: shorten(f, 1), "E_EMPTY", "1"),
        (drop("data/demo_9/obs/robot0_eef_quat"), "E_KEY", "robot0_eef_quat"),
        (drop(IMAGE), "E_KEY", "agentview_image"),
        (lambda f: f["data/demo_9"].attrs.__setitem__("num_samples", 9), "E_LENGTH", "num_samples 9, actions 7"),
        (put("data/demo_9/obs/robot0_eef_pos", np.zeros((6, 3))), "E_LENGTH", "obs/robot0_eef_pos 6"),
        (put("data/demo_9/actions", np.array([b"a"] * 7)), "E_DTYPE", "strings"),
        (put("data/demo_9/actions", ["a"] * 7, dtype=h5py.string_dtype()), "E_DTYPE", "strings"),
        (put("data/demo_9/actions", h5py.ExternalLink("other.h5", "/x")), "E_LINK", "external link to other.h5:/x"),
        (put("data/demo_9/actions", h5py.SoftLink("/data/demo_1/actions")), "E_LINK", "soft link"),
        (put(IMAGE, h5py.ExternalLink("/etc/passwd", "/x")), "E_LINK", "external link"),
        (raw_external, "E_LINK", "another file"),
        (virtual, "E_LINK", "virtual"),
        (unwritten, "E_CHUNK_MISSING", "1 of 7 chunks"),
        (put(IMAGE, np.zeros((7, 16, 24, 3), np.float32)), "E_DTYPE", "float32"),
        (put(IMAGE, frames_of(2)[:, :8]), "E_SCHEMA", "[7, 8, 24, 3]"),
        (put(IMAGE, np.zeros((7, 16, 24, 3), np.uint8)), "E_CAMERA", "7 of one colour"),
        (put("data/demo_9/actions", np.zeros((7, 6))), "E_SCHEMA", "6 columns"),
        (put("data/demo_9/obs/robot0_eef_quat", np.zeros((7, 4))), "E_VALUE", "norm 0 at frame 0"),
        (put("data/demo_9/obs/robot0_eef_pos", np.full((7, 3), 300.0)), "E_UNITS", "300 at frame 0"),
        (put("data/demo_9/obs/robot0_gripper_qpos", np.full((7, 2), [0.4, -0.4])), "E_POLARITY", "10 at frame 0"),
        (put("data/demo_9", np.zeros(3)), "E_SCHEMA", "a group"),
    ],
)
def test_robomimic_faults(change, code, found, robomimic, convert, tmp_path) -> None:
    path, out = edit(make_robomimic(tmp_path), change), tmp_path / "s.zarr"
    result = convert(robomimic, path, out, "--quarantine")
    assert (result.code, result.account) == (0, "in 4 = written 3 + rejected 1 + already there 0")
    (line,) = rejections(out)
    assert line["code"] == code and found in " ".join(line.values()), line
    assert_holds(out, robomimic, [0, 1, 3])


def test_hostile_demo_names_are_rejected_and_printed_harmlessly(robomimic, convert, tmp_path) -> None:
    path = make_robomimic(tmp_path)
    with h5py.File(path, "r+") as file:
        for name in ("..", "x" * 300, "demo\x1b[2J", "demo 7"):
            write_demo(file, name, {k: v[:4] for k, v in demo_arrays(len(name) % 7).items()})
    result = convert(robomimic, path, tmp_path / "s.zarr", "--quarantine", "--instruction", "x")
    assert (result.code, result.account) == (0, "in 8 = written 5 + rejected 3 + already there 0")
    assert {line["code"] for line in rejections(tmp_path / "s.zarr")} == {"E_PATH"}
    assert "\x1b" not in result.err + result.out + run.rejected_file(tmp_path / "s.zarr").read_text()


@pytest.mark.parametrize(
    "env",
    [
        {"env_kwargs": []}, {"env_kwargs": {"robots": 5}}, {"env_kwargs": {"robots": [["Panda"]]}}, [], "x", 3,
        {"env_kwargs": {"robots": ["Panda"], "control_freq": "20", "controller_configs": {"body_parts": 3}}},
        {"env_kwargs": {"robots": ["Panda"], "control_freq": 1e400, "controller_configs": {"output_max": "x"}}},
        {"env_kwargs": {"robots": ["Panda"], "controller_configs": {"type": "OSC_POSE", "output_max": "x"}}},
    ],
    ids=str,
)  # fmt: skip
def test_odd_environments_are_refused_in_one_line(env, robomimic, convert, tmp_path) -> None:
    path = edit(make_robomimic(tmp_path), lambda f: f["data"].attrs.__setitem__("env_args", json.dumps(env)))
    result = convert(robomimic, path, tmp_path / "s.zarr")
    assert result.code == 1 and "--embodiment FILE" in result.err and result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "E_TRUNCATED"),
        (b"not HDF5 at all, but long enough", "E_SCHEMA"),
        (None, "E_KEY"),
        ("cut", "E_TRUNCATED"),
        ("empty", "E_EMPTY"),
        ("link", "E_LINK"),
    ],
)
def test_robomimic_files_that_are_none(content, code, robomimic, convert, tmp_path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    make_robomimic(folder)
    bad = folder / "bad.hdf5"
    if isinstance(content, bytes):
        bad.write_bytes(content)
    elif content == "cut":
        bad.write_bytes((folder / "set.hdf5").read_bytes()[:20_000])
    else:
        with h5py.File(bad, "w") as file:
            if content == "empty":
                file.create_group("data")
            elif content == "link":
                file["data"] = h5py.ExternalLink("set.hdf5", "/data")
    result = convert(robomimic, folder, tmp_path / "s.zarr", "--quarantine")
    assert (result.code, result.account) == (0, "in 5 = written 4 + rejected 1 + already there 0")
    assert [line["code"] for line in rejections(tmp_path / "s.zarr")] == [code]
    # alone, it is the whole input
    result = convert(robomimic, bad, tmp_path / "t.zarr", "--quarantine")
    assert result.code == 1 and code in result.err and not (tmp_path / "t.zarr").exists()


def test_every_flipped_byte_of_an_hdf5_is_survived(robomimic, convert, tmp_path) -> None:
    """HDF5 detects few of them; whatever it says, the account holds and nothing but the store is written."""
    path = make_robomimic(tmp_path)
    good = path.read_bytes()
    rng = np.random.default_rng(3)
    for i, position in enumerate(rng.integers(0, len(good), 40).tolist()):
        bad = bytearray(good)
        bad[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(bad))
        result = convert(robomimic, path, tmp_path / f"{i}.zarr", "--quarantine")
        if "--embodiment FILE" not in result.err:  # env_args was hit
            numbers = [int(word) for word in result.account.split() if word.isdigit()]
            assert numbers[0] == sum(numbers[1:4])
            assert result.code == (0 if numbers[1] else 1)


@pytest.mark.parametrize(
    ("key", "value"), [("control_freq", 10), ("robots", ["Sawyer"]), ("controller_configs", {"type": "OSC_POSITION"})]
)
def test_files_of_another_setup_are_rejected_not_mixed(key, value, robomimic, convert, tmp_path) -> None:
    (tmp_path / "in").mkdir()
    make_robomimic(tmp_path / "in")
    env = json.loads(json.dumps(ENV_ARGS))
    env["env_kwargs"][key] = value
    with h5py.File(tmp_path / "in" / "z.hdf5", "w") as file:
        write_demo(file, "demo_0", demo_arrays(5))
        file["data"].attrs["env_args"] = json.dumps(env)
    result = convert(robomimic, tmp_path / "in", tmp_path / "s.zarr", "--quarantine")
    assert (result.code, result.account) == (0, "in 5 = written 4 + rejected 1 + already there 0")
    assert f"env_kwargs.{key}" in rejections(tmp_path / "s.zarr")[0]["found"]


def test_robomimic_reads_the_layouts_that_exist(robomimic, convert, tmp_path) -> None:
    """A folder, gzip, next_obs, other robots' cameras, low-dimensional sets, joints, masks."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(("b_2.hdf5", "sub/b_10.hdf5")):
        with h5py.File(folder / name, "w") as file:
            arrays = demo_arrays(number)
            arrays |= {k.replace("obs/", "next_obs/"): v for k, v in arrays.items() if k.startswith("obs/")}
            arrays["obs/sideview_image"] = frames_of(number, 1)
            arrays["dones"] = np.eye(length_of(number), dtype=int)[-1]
            demo = write_demo(file, "demo_0", arrays, compression="gzip")
            demo.attrs["ep_meta"] = json.dumps({"lang": f"do {number}"})
            file["data"].attrs["env_args"] = json.dumps(ENV_ARGS)
            file["mask/train"] = np.array([b"demo_0", b"demo_77"])
    result = convert(robomimic, folder, tmp_path / "s.zarr", "-o", "mask=train")
    assert (result.code, result.account) == (0, "in 2 = written 2 + rejected 0 + already there 0")
    assert "names 1 absent demos: demo_77" in result.err
    store = Store(tmp_path / "s.zarr")
    assert [c.name for c in store.spec.cameras] == ["agentview_image", "sideview_image"]
    assert [(e.instruction, e.success) for e in store.episodes] == [("do 0", True), ("do 1", True)]
    assert [e.source for e in store.episodes] == ["b_000002/demo_000000", "sub/b_000010/demo_000000"]


def test_robomimic_low_dim_sets_and_joints(robomimic, convert, tmp_path) -> None:
    path = tmp_path / "set.hdf5"
    arrays = {k: v for k, v in demo_arrays(0).items() if "image" not in k and "eef" not in k}
    arrays["obs/robot0_joint_pos"] = np.random.default_rng(0).uniform(-2, 2, (5, 7))
    arrays["actions"] = np.random.default_rng(0).uniform(-1, 1, (5, 8))
    env = json.loads(json.dumps(ENV_ARGS))
    env["env_kwargs"]["controller_configs"] = {
        "type": "JOINT_POSITION", "input_max": 1, "input_min": -1, "output_max": 0.05, "output_min": -0.05
    }  # fmt: skip
    with h5py.File(path, "w") as file:
        write_demo(file, "demo_0", arrays)
        file["data"].attrs["env_args"] = json.dumps(env)
    assert convert(robomimic, path, tmp_path / "s.zarr").code == 0
    store = Store(tmp_path / "s.zarr")
    assert [(f.name, f.kind, f.size) for f in store.spec.state] == [
        ("robot0_joint_pos", "joint_position", 7), ("robot0_gripper_qpos", "gripper_position", 1)
    ]  # fmt: skip
    assert [(f.kind, f.mode, f.scale) for f in store.spec.action] == [
        ("joint_position", "delta", 0.05), ("gripper_effort", "absolute", -1.0)
    ]  # fmt: skip
    assert store.spec.cameras == ()


def test_robosuite_1_5_controllers_and_two_arms(convert, robomimic, tmp_path) -> None:
    part = ENV_ARGS["env_kwargs"]["controller_configs"] | {"input_type": "delta", "gripper": {"type": "GRIP"}}
    env = json.loads(json.dumps(ENV_ARGS))
    env["env_kwargs"]["robots"] = ["Panda", "Panda"]
    env["env_kwargs"]["controller_configs"] = [{"type": "BASIC", "body_parts": {"right": part}}] * 2
    arrays = demo_arrays(0)
    arrays |= {k.replace("robot0", "robot1"): v for k, v in arrays.items() if "robot0" in k}
    arrays["actions"] = np.concatenate([arrays["actions"], -arrays["actions"]], axis=1)
    path = tmp_path / "set.hdf5"
    with h5py.File(path, "w") as file:
        write_demo(file, "demo_0", arrays)
        file["data"].attrs["env_args"] = json.dumps(env)
    assert convert(robomimic, path, tmp_path / "s.zarr").code == 0
    store = Store(tmp_path / "s.zarr")
    assert (store.spec.name, store.spec.state_dim, store.spec.action_dim) == ("robosuite_panda_panda", 20, 14)
    scales = np.array([0.05] * 3 + [0.5] * 3 + [-1.0])
    np.testing.assert_allclose(store.action(0), arrays["actions"] * [*scales, *scales], rtol=1e-6)


def libero(path: Path, convention: str = "opengl") -> None:
    arrays = demo_arrays(0)
    rotation = Rotation.from_quat(arrays["obs/robot0_eef_quat"])
    with h5py.File(path, "w") as file:
        write_demo(file, "demo_0", {
            "actions": arrays["actions"], "obs/agentview_rgb": frames_of(0), "obs/ee_ori": rotation.as_rotvec(),
            "obs/ee_pos": arrays["obs/robot0_eef_pos"], "obs/gripper_states": arrays["obs/robot0_gripper_qpos"],
        })  # fmt: skip
        file["data"].attrs["env_args"] = json.dumps(ENV_ARGS)
        file["data"].attrs["macros_image_convention"] = convention
        file["data"].attrs["problem_info"] = json.dumps({"language_instruction": list("put it away")})


@pytest.mark.parametrize(
    ("convention", "more", "expected"),
    [
        ("opengl", (), lambda f: f[:, ::-1]),
        ("opengl", ("-o", "flip=none"), lambda f: f),
        ("opencv", (), lambda f: f),
        ("opengl", ("-o", "flip=rotate180"), lambda f: f[:, ::-1, ::-1]),
    ],
)
def test_libero_frames_are_turned_right_side_up(convention, more, expected, convert, robomimic, tmp_path) -> None:
    libero(tmp_path / "task_demo.hdf5", convention)
    assert convert(robomimic, tmp_path / "task_demo.hdf5", tmp_path / "s.zarr", *more).code == 0
    store = Store(tmp_path / "s.zarr")
    assert store.spec.name == "libero_panda" and store.episodes[0].instruction == "put it away"
    assert np.array_equal(store.read_frames(0, "agentview_rgb", range(5)), expected(frames_of(0)))
    matrix = Rotation.from_quat(demo_arrays(0)["obs/robot0_eef_quat"]).as_matrix()
    np.testing.assert_allclose(store.state(0)[:, 3:6], matrix[:, :, 0], atol=1e-6)


def test_shipped_pandas_are_what_is_inferred(convert, robomimic, tmp_path) -> None:
    """The embodiment files say what the converter infers, but for the cameras' sizes."""
    libero(tmp_path / "libero.hdf5")
    for path, name in ((make_robomimic(tmp_path), "robosuite_panda"), (tmp_path / "libero.hdf5", "libero_panda")):
        assert convert(robomimic, path, tmp_path / f"{name}.zarr").code == 0
        found = embodiment_to_dict(Store(tmp_path / f"{name}.zarr").spec) | {"cameras": None}
        assert found == embodiment_to_dict(load_embodiment(name)) | {"cameras": None}


@pytest.mark.parametrize(
    ("change", "missing"),
    [
        (lambda env: env["env_kwargs"].__setitem__("robots", ["Jaco"]), "robots (Jaco"),
        (lambda env: env["env_kwargs"]["controller_configs"].__setitem__("type", "IK_POSE"), "actions (7 columns"),
        (lambda env: env["env_kwargs"]["controller_configs"].__setitem__("output_max", [1, 2, 3, 4, 5, 6]), "actions"),
        (lambda env: env.clear(), "env_args"),
        (lambda env: (env["env_kwargs"].pop("control_freq"), env.__setitem__("type", 2)), "control_freq"),
    ],
)
def test_robomimic_refuses_to_guess(change, missing, robomimic, convert, tmp_path) -> None:
    env = json.loads(json.dumps(ENV_ARGS))
    change(env)
    path = edit(make_robomimic(tmp_path), lambda f: f["data"].attrs.__setitem__("env_args", json.dumps(env)))
    result = convert(robomimic, path, tmp_path / "s.zarr")
    assert result.code == 1 and missing in result.err and "--embodiment FILE" in result.err
    assert result.err.count("\n") == 1
    spec = embodiment_to_dict(load_embodiment("robosuite_panda"))
    spec["cameras"] = spec["cameras"][:1]
    (tmp_path / "mine.json.yaml").write_text(json.dumps(spec))
    more = ("--embodiment", str(tmp_path / "mine.json.yaml"), "--instruction", "put the nut on the peg")
    given = convert(robomimic, path, tmp_path / "s.zarr", *more)
    assert given.code == 0, given.err
    assert_holds(tmp_path / "s.zarr", robomimic, range(4))


# --- ALOHA


@pytest.mark.parametrize("with_lengths", [True, False])
@pytest.mark.parametrize("colours", ["swapped", "standard"])
def test_aloha_compressed_frames_and_their_colours(with_lengths, colours, convert, tmp_path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    picture = np.zeros((6, 32, 48, 3), np.uint8)
    picture[:, :16] = [200, 40, 10]  # red above, blue below
    picture[:, 16:] = [10, 60, 220]
    picture += np.arange(6, dtype=np.uint8)[:, None, None, None]
    shown = picture if colours == "swapped" else np.ascontiguousarray(picture[..., ::-1])
    rows, lengths = padded_jpegs(shown)
    arrays = {k: v[:5] if len(v) > 5 else v for k, v in aloha_arrays(1).items() if "images" not in k}
    arrays = {k: np.concatenate([v, v[-1:]]) for k, v in arrays.items()}
    arrays |= {"observations/images/cam_high": rows, "observations/images/cam_low": rows}
    if with_lengths:
        arrays["compress_len"] = np.stack([lengths, lengths]).astype(np.float64)
    write_aloha(folder / "episode_0.hdf5", arrays)
    result = convert(CASES["aloha"], folder, tmp_path / "s.zarr", "-o", f"jpeg={colours}")
    assert result.code == 0, result.err
    frames = Store(tmp_path / "s.zarr").read_frames(0, "cam_high", range(6))
    assert np.abs(frames.astype(int) - picture).max() < 16 and frames[0, 0, 0, 0] > 180


def test_aloha_with_a_base(convert, tmp_path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(2):
        base_action = np.random.default_rng(number).uniform(-0.5, 0.5, (length_of(number), 2)).astype(np.float32)
        write_aloha(folder / f"episode_{number}.hdf5", aloha_arrays(number) | {"base_action": base_action})
    assert convert(CASES["aloha"], folder, tmp_path / "s.zarr").code == 0
    store = Store(tmp_path / "s.zarr")
    assert (store.spec.name, store.spec.action_dim) == ("mobile_aloha", 16)
    assert np.array_equal(store.action(1)[:, 14:], base_action)
    plain = convert(CASES["aloha"], folder, tmp_path / "t.zarr", "--embodiment", str(aloha_file(tmp_path)))
    assert plain.code == 0 and "left out: base_action" in plain.err


def aloha_file(folder: Path) -> Path:
    spec = embodiment_to_dict(load_embodiment("aloha"))
    spec["cameras"] = [{"name": n, "height": 16, "width": 24, "slot": i} for i, n in enumerate(("top", "angle"))]
    (folder / "my_aloha.yaml").write_text(json.dumps(spec))
    return folder / "my_aloha.yaml"


def cut_jpegs() -> np.ndarray:
    rows, lengths = padded_jpegs(frames_of(2))
    rows[3, lengths[3] // 2 :] = 0
    return rows


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda a: a.pop("action"), "E_KEY"),
        (lambda a: a.pop("observations/qpos"), "E_KEY"),
        (lambda a: a.pop("observations/images/angle"), "E_KEY"),
        (lambda a: a.__setitem__("action", a["action"][:-1]), "E_LENGTH"),
        (lambda a: a.__setitem__("action", a["action"][:, :13]), "E_SCHEMA"),
        (lambda a: a.__setitem__("observations/qpos", np.degrees(a["observations/qpos"])), "E_UNITS"),
        (lambda a: a.update({k: v[:1] for k, v in a.items()}), "E_EMPTY"),
        (lambda a: a.update({k: v[:0] for k, v in a.items()}), "E_EMPTY"),
        (lambda a: a.__setitem__("observations/images/top", np.zeros((7, 100), np.uint8)), "E_READ"),
        (lambda a: a.__setitem__("observations/images/top", cut_jpegs()), "E_TRUNCATED"),
        (lambda a: a.__setitem__("observations/images/top", np.zeros((7, 16, 24), np.uint8)), "E_SCHEMA"),
    ],
)
def test_aloha_faults(change, code, convert, tmp_path) -> None:
    case = CASES["aloha"]
    path, out = case.make(tmp_path), tmp_path / "s.zarr"
    arrays = aloha_arrays(2)
    change(arrays)
    write_aloha(path / "episode_9.hdf5", arrays)
    result = convert(case, path, out, "--quarantine")
    assert (result.code, result.account) == (0, "in 4 = written 3 + rejected 1 + already there 0")
    assert [line["code"] for line in rejections(out)] == [code]
    assert_holds(out, case, [0, 1, 3])


# --- diffusion_policy


@pytest.mark.parametrize(
    "codec",
    [
        numcodecs.Blosc("lz4", 5, 1), numcodecs.Blosc("zstd", 5, 2), numcodecs.Zstd(3), numcodecs.LZ4(),
        numcodecs.Zlib(1), numcodecs.GZip(1), numcodecs.BZ2(1), numcodecs.LZMA(), None,
    ],
    ids=str,
)  # fmt: skip
def test_replay_buffer_codecs_are_bounded(codec, tmp_path) -> None:
    values = np.random.default_rng(0).integers(0, 9, (10, 3, 2), np.int32)
    write_zarr2(tmp_path, "data/x", values, 4, codec)
    array = diffusion_policy.Array(diffusion_policy._Folder(tmp_path), "data/x")
    for start, stop in ((0, 10), (3, 9), (4, 8), (9, 10)):
        assert np.array_equal(array.read(start, stop), values[start:stop])
    bomb = bytes(50 * 2**20)
    chunk = tmp_path / "data/x/1.0.0"
    chunk.write_bytes(bomb if codec is None else codec.encode(bomb))
    with pytest.raises(Rejected, match=r"^(E_PATH|E_CHECKSUM): .*found .*bytes"):
        array.read(0, 10)
    good = (tmp_path / "data/x/0.0.0").read_bytes()
    for cut in (b"", good[: len(good) // 2], good[:-1]):
        chunk.write_bytes(cut)
        with pytest.raises(Rejected, match=r"^(E_TRUNCATED|E_CHECKSUM): .*1\.0\.0.*from frame 4 on"):
            array.read(0, 10)


def test_replay_buffer_as_a_zip(convert, tmp_path) -> None:
    import zipfile

    case = CASES["diffusion_policy"]
    path = case.make(tmp_path)
    for name, prefix in (("inside.zip", ""), ("folder.zip", "buffer.zarr/")):
        with zipfile.ZipFile(tmp_path / name, "w", zipfile.ZIP_DEFLATED) as archive:
            for file in sorted(p for p in path.rglob("*") if p.is_file()):
                archive.write(file, prefix + file.relative_to(path).as_posix())
        assert convert(case, tmp_path / name, tmp_path / f"{name}.zarr").code == 0
        assert_holds(tmp_path / f"{name}.zarr", case, range(4))
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("../evil", "x")
    result = convert(case, tmp_path / "evil.zip", tmp_path / "evil.zarr")
    assert result.code == 1 and "E_PATH" in result.err and not (tmp_path.parent / "evil").exists()


def change_json(name: str, **values: Any) -> Callable[[Path], Any]:
    def change(path: Path) -> None:
        file = path / name
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


def outside(path: Path) -> None:
    chunk = path / "data/img/3.0.0.0"
    chunk.rename(path.parent / "elsewhere")
    chunk.symlink_to(path.parent / "elsewhere")


@pytest.mark.parametrize(
    ("change", "code", "rejected"),
    [
        (lambda p: (p / "data/img/3.0.0.0").unlink(), "E_CHUNK_MISSING", 1),
        (outside, "E_PATH", 1),
        (lambda p: (p / "data/img/3.0.0.0").write_bytes(b""), "E_TRUNCATED", 1),
        (lambda p: (p / "data/action/0.0").unlink(), "E_CHUNK_MISSING", 1),
        (change_json("data/action/.zarray", dtype="|O", filters=[{"id": "pickle"}]), "E_PICKLE", None),
        (change_json("data/action/.zarray", compressor={"id": "pickle"}), "E_SCHEMA", None),
        (change_json("data/action/.zarray", shape=[26]), "E_SCHEMA", None),
        (change_json("data/action/.zarray", shape=[25, 4]), "E_LENGTH", 4),
        (change_json("data/action/.zarray", shape=[2**50, 4]), "E_SCHEMA", None),
        (change_json("data/img/.zarray", chunks=[26, 16, 24, 3]), "E_CHECKSUM", 4),
        (change_json("meta/episode_ends/.zarray", dtype="<f8"), "E_SCHEMA", None),
        (lambda p: (p / "meta/episode_ends/.zarray").write_text("{"), "E_SCHEMA", None),
        (lambda p: (p / "data/.zgroup").unlink(), "E_SCHEMA", None),
        (lambda p: write_zarr2(p.parent / "x", "a", np.array([0, 0, 18, 26]), 4) or swap(p), "E_EMPTY", 2),
    ],
)
def test_replay_buffer_faults(change, code, rejected, convert, tmp_path) -> None:
    case = CASES["diffusion_policy"]
    path, out = case.make(tmp_path), tmp_path / "s.zarr"
    change(path)
    result = convert(case, path, out, "--quarantine")
    assert code in result.err
    if rejected is None:
        assert (result.code, result.account) == (1, "in 1 = written 0 + rejected 1 + already there 0")
    else:
        assert result.account == f"in 4 = written {4 - rejected} + rejected {rejected} + already there 0"
        assert {line["code"] for line in rejections(out)} == {code}
        assert result.code == (0 if rejected < 4 else 1)


def swap(path: Path) -> None:
    import shutil

    shutil.rmtree(path / "meta/episode_ends")
    (path.parent / "x/a").rename(path / "meta/episode_ends")


def test_push_t_takes_the_columns_it_is_told(convert, tmp_path) -> None:
    path = tmp_path / "pusht.zarr"
    rng = np.random.default_rng(0)
    state, action = rng.uniform(50, 450, (9, 5)), rng.uniform(50, 450, (9, 2))
    frames = np.random.default_rng(1).integers(0, 256, (9, 96, 96, 3)).astype(np.float32)
    for key, values in (("state", state), ("action", action), ("img", frames), ("n_contacts", state[:, :1])):
        write_zarr2(path, f"data/{key}", values.astype(np.float32), 9)
    write_zarr2(path, "meta/episode_ends", np.array([4, 9]), 2)
    for group in (path, path / "data", path / "meta"):
        (group / ".zgroup").write_text('{"zarr_format": 2}')
    case = dataclasses.replace(
        CASES["diffusion_policy"], args=("--embodiment", "pusht", "--instruction", "push the T to its place")
    )
    result = convert(case, path, tmp_path / "s.zarr")
    assert result.code == 1 and "5 columns" in result.err and "-o state=KEY[0:2]" in result.err
    result = convert(case, path, tmp_path / "s.zarr", "-o", "state=state[0:2]")
    assert result.code == 0 and "left out: data/n_contacts" in result.err
    store = Store(tmp_path / "s.zarr")
    np.testing.assert_allclose(store.state(1), state[4:, :2] / 512, rtol=1e-6)
    np.testing.assert_allclose(store.action(0), action[:4] / 512, rtol=1e-6)
    result = convert(case, path, tmp_path / "t.zarr", "-o", "state=state[0:2]", "--control-hz", "20")
    assert result.code == 1 and "E_STAMP" in result.err


@pytest.mark.parametrize("values", [0.5, 300.0, -1.0, np.nan, np.inf])
def test_frames_that_are_no_bytes_are_refused(values) -> None:
    frames = np.full((3, 4, 4, 3), values, np.float32)
    with pytest.raises(Rejected, match=r"^E_VALUE: "):
        diffusion_policy._to_uint8(frames, "img", ITEM)


# --- against what the formats' own tools wrote


REFERENCES = {
    "robomimic": ("robomimic", "lift64.hdf5", ()),
    "aloha": ("aloha", ".", ("--instruction", "wave")),
    "dp_zarr": ("diffusion_policy", "metaworld.zarr", ("--embodiment", "metaworld_sawyer", "--instruction", "reach")),
    "rlds": ("rlds", ".", ("--embodiment", "{rlds}")),
    "rosbag2_mcap": ("mcap", ".", ("--embodiment", "{bag}")),
    "rosbag2_db3": ("mcap", ".", ("--embodiment", "{bag}")),
    "lerobot_v21_image": ("lerobot", "dataset", ()),
    "lerobot_v21_video": ("lerobot", "dataset", ()),
    "lerobot_v30_image": ("lerobot", "dataset", ()),
    "lerobot_v30_video": ("lerobot", "dataset", ()),
}


def write_specs(folder: Path) -> dict[str, str]:
    """Write the embodiments of the formats that do not tell them."""
    arm = [field("arm", "joint_position", 7, 0, bound=6.3), field("fingers", "joint_position", 2, 7)]
    bag = {"state": arm, "action": arm, "control_hz": 20.0, "obs_dt": 0.05, "action_dt": 0.05}
    bag["cameras"] = [{"name": "camera", "height": 64, "width": 64, "slot": 0}]
    rlds = embodiment_to_dict(load_embodiment("metaworld_sawyer"))
    rlds["cameras"] = [{"name": "image", "height": 64, "width": 64, "slot": 0}]
    files = {}
    for name, values in (("bag", embodiment_dict() | bag), ("rlds", rlds)):
        (folder / f"{name}.yaml").write_text(json.dumps(values))
        files[name] = str(folder / f"{name}.yaml")
    return files


@pytest.mark.skipif(not REFERENCE.exists(), reason="needs the reference data sets")
@pytest.mark.parametrize("folder", REFERENCES)
def test_reference_sets(folder, convert, tmp_path) -> None:
    source, path, args = REFERENCES[folder]
    specs = write_specs(tmp_path)
    case = Case(source, lambda p: p, tuple(a.format(**specs) for a in args), lambda p: "", lambda i: np.zeros(0))
    expected = json.loads((REFERENCE / folder / "expected.json").read_text())
    out, count = tmp_path / "s.zarr", expected["num_episodes"]
    result = convert(case, REFERENCE / folder / path, out)
    assert result.code == 0, result.err
    assert result.account == f"in {count} = written {count} + rejected 0 + already there 0"
    before = tree(out)
    result = convert(case, REFERENCE / folder / path, out, "--resume")
    assert result.account == f"in {count} = written 0 + rejected 0 + already there {count}"
    assert tree(out) == before
    store = Store(out)
    store.verify()
    assert expected["fps"] in (None, store.spec.control_hz)
    for i, wanted in enumerate(expected["episodes"]):
        assert store.length(i) == wanted["frames"]
        assert wanted["instruction"] in (None, store.episodes[i].instruction)
        assert_actions(store, i, wanted)
        assert_state(store, i, wanted, source)
        for key, camera in wanted["cameras"].items():
            assert_frames(store, i, key, camera)


def assert_actions(store: Store, i: int, wanted: dict[str, Any]) -> None:
    """The file's own values are the store's without the embodiment's scale."""
    raw = store.action(i) / np.concatenate([np.full(f.size, f.scale) for f in store.spec.action])
    if "action_sum_per_dim" in wanted:
        np.testing.assert_allclose(raw.sum(0, dtype=np.float64), wanted["action_sum_per_dim"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(raw.sum(dtype=np.float64), wanted["action_sum"], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(raw[0], wanted["action_first"], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(raw[-1], wanted["action_last"], rtol=1e-6, atol=1e-7)


def assert_state(store: Store, i: int, wanted: dict[str, Any], source: str) -> None:
    for frame, values in ((0, np.array(wanted["state_first"])), (-1, np.array(wanted["state_last"]))):
        if source == "robomimic":  # position, xyzw, two fingers
            matrix = Rotation.from_quat(values[3:7]).as_matrix()
            values = np.concatenate([values[:3], matrix[:, 0], matrix[:, 1], [(values[7] - values[8]) / 2 / 0.04]])
        np.testing.assert_allclose(store.state(i)[frame], values, rtol=1e-5, atol=1e-6)


def assert_frames(store: Store, i: int, key: str, camera: dict[str, Any]) -> None:
    names = [c.name for c in store.spec.cameras]
    name = key if key in names else next((n for n in names if key.endswith(n)), names[0])
    for frame, which in ((0, "first"), (store.length(i) - 1, "last")):
        data = store.read_frames(i, name, [frame])[0]
        if digest := camera.get(f"{which}_sha256"):
            assert hashlib.sha256(data.tobytes()).hexdigest() == digest
        else:
            error = np.abs(data.reshape(-1, 3).mean(axis=0) - camera[f"{which}_mean_rgb"]).max()
            assert error <= camera["mean_rgb_tolerance"]
