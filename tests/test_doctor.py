"""The doctor: finds what is injected, accuses no clean episode, writes a filter that training obeys."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from test_store import make_store, small_spec
from test_train import config_for

from dita.cli import main
from dita.config import StoreConfig, from_dict
from dita.datasets.dataset import WindowDataset, shots
from dita.datasets.doctor import (
    FAULTS,
    Recording,
    diagnose,
    doctor_command,
    examine,
    learn_usual,
    print_diagnosis,
    read_diagnosis,
    scan_frames,
)
from dita.datasets.filters import kept, read_filter, write_filter
from dita.datasets.store import Store, StoreWriter
from dita.train import train
from dita.train_data import build_contract, chosen_episodes
from dita.types import EmbodimentSpec, Episode

PATH = Path(__file__).parent.parent / "benchmarks" / "doctor.py"
benchmark = importlib.util.module_from_spec(importlib.util.spec_from_file_location("doctor_benchmark", PATH))
sys.modules["doctor_benchmark"] = benchmark
benchmark.__spec__.loader.exec_module(benchmark)

ARMS = {spec.name: spec for spec in (benchmark.joint_arm(), benchmark.hand_arm())}
CLEAN, FAULTY = 8, 4
EPISODES = {name: [benchmark.synthetic_episode(s, i) for i in range(CLEAN + FAULTY)] for name, s in ARMS.items()}


def store_of(path: Path, spec: EmbodimentSpec, episodes: list[Episode], **changes) -> Store:
    with StoreWriter.create(path, spec, **({"source": "tests", "licence": "CC0-1.0"} | changes)) as writer:
        for e in episodes:
            writer.add(e)
    return Store(path)


def injected(name: str, arm: str, number: int, seed: int = 0) -> Episode:
    _, inject = (benchmark.INJECTIONS | benchmark.RARE)[name]
    episode = inject(ARMS[arm], EPISODES[arm][number], np.random.default_rng([seed, number]))
    return dataclasses.replace(episode, source=f"{name}/{number}")


# --- faults


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("name", benchmark.INJECTIONS)
def test_every_injected_fault_is_found_and_no_clean_episode_is_accused(name, arm) -> None:
    fault = benchmark.INJECTIONS[name][0]
    faulty = [injected(name, arm, CLEAN + i) for i in range(FAULTY)]
    found = benchmark.flags(ARMS[arm], [*EPISODES[arm][:CLEAN], *faulty])
    assert all(fault in f for f in found[CLEAN:]), found[CLEAN:]
    assert found[:CLEAN] == [set()] * CLEAN


@pytest.mark.parametrize("arm", ARMS)
def test_an_episode_unlike_the_others_is_found(arm) -> None:
    everyone = [benchmark.synthetic_episode(ARMS[arm], i) for i in range(40)]
    recordings = [Recording(e.state, e.action, e.stamp) for e in [*everyone, injected("elsewhere", arm, CLEAN)]]
    usual = learn_usual(ARMS[arm], recordings)
    found = [{s.fault for s in examine(ARMS[arm], r, usual, {})} for r in recordings]
    assert "CLIP" in found[-1]
    assert not any(found[:-1])


def test_a_finding_says_where_and_from_which_frame() -> None:
    spec, episodes = ARMS["joint_arm"], EPISODES["joint_arm"]
    e = episodes[0]
    state = e.state.copy()
    state[40:46, 2] = 4.0  # limit 2.9
    usual = learn_usual(spec, [Recording(x.state, x.action, x.stamp) for x in episodes])
    (symptom,) = [s for s in examine(spec, Recording(state, e.action, e.stamp), usual, {}) if s.fault == "VALUE"]
    assert symptom.where == "state.joints[2]"
    assert np.flatnonzero(symptom.bad).tolist() == list(range(40, 46))
    assert "4, limits -2.9 .. 2.9 rad" in symptom.what


def test_frames_are_scanned_the_same_in_any_blocks() -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (20, 16, 16, 3), np.uint8)
    frames[5] = 0
    frames[8:11] = frames[7]
    frames[11] = frames[7] // 2 * 2  # a codec's rounding
    facts = [
        scan_frames([frames]),
        scan_frames(np.split(frames, [3, 8, 9])),
        scan_frames(frames[i : i + 1] for i in range(20)),
    ]
    for f in facts:
        assert np.flatnonzero(f.blank).tolist() == [5]
        assert np.flatnonzero(f.same).tolist() == [8, 9, 10, 11]


def test_a_camera_slower_than_the_log_is_a_warning_only() -> None:
    spec = ARMS["joint_arm"]  # 50 Hz; the camera has 25 Hz
    halved = [
        dataclasses.replace(e, images={"front": e.images["front"][np.arange(len(e.stamp)) // 2 * 2]})
        for e in EPISODES["joint_arm"]
    ]
    usual = learn_usual(spec, [Recording(e.state, e.action, e.stamp) for e in halved])
    for e in halved:
        facts = {"front": scan_frames([e.images["front"]])}
        symptoms = examine(spec, Recording(e.state, e.action, e.stamp), usual, facts)
        assert [(s.fault, s.never_severe) for s in symptoms] == [("FROZEN", True)]


def test_a_still_robot_may_have_still_pictures() -> None:
    spec, e = ARMS["joint_arm"], EPISODES["joint_arm"][0]
    usual = learn_usual(spec, [Recording(x.state, x.action, x.stamp) for x in EPISODES["joint_arm"]])
    rows = np.zeros(40, int)  # 0.8 s: too short for a pause, and nothing moved
    recording = Recording(e.state[rows], e.action[rows], np.arange(40) / 50)
    facts = {"front": scan_frames([e.images["front"][rows]])}
    assert not {"FROZEN", "CAMERA", "IDLE"} & {s.fault for s in examine(spec, recording, usual, facts)}


def test_findings_about_a_whole_store(tmp_path) -> None:
    spec, episodes = ARMS["joint_arm"], []
    for e in EPISODES["joint_arm"][:4]:
        state, action = e.state.copy(), np.roll(e.state, 10, axis=0)  # actions that repeat an old state
        state[:, 1] = 0.25
        action[:, 2] = 0.0
        action[7, 2] = 1.0  # one rare value: q01..q99 is empty
        episodes.append(dataclasses.replace(e, state=state, action=action))
    diagnosis = diagnose([store_of(tmp_path / "s.zarr", spec, episodes)])
    whole = {(f.code, f.where): f.what for f in diagnosis.findings if f.episode is None}
    assert "0.25 rad throughout" in whole["W_CONSTANT", "state.joints[1]"]
    assert "98 % of its values" in whole["W_CONSTANT", "action.targets[2]"]
    assert re.search(r"before its action by 1\d frames", whole["W_LAG", "action"])
    assert diagnosis.left_out == 0  # nothing about a whole store leaves episodes out


# --- stores


def test_a_clean_store_has_no_findings(tmp_path) -> None:
    for arm, spec in ARMS.items():
        store = store_of(tmp_path / f"{arm}.zarr", spec, EPISODES[arm])
        diagnosis = diagnose([store])
        assert diagnosis.findings == () and diagnosis.counts == {} and diagnosis.left_out == 0
        (summary,) = diagnosis.stores
        assert (summary.embodiment, summary.episodes) == (arm, CLEAN + FAULTY)
        assert summary.frames == sum(len(e.stamp) for e in EPISODES[arm])
        assert summary.lag_s is not None and 0 <= summary.lag_s <= 0.15
        assert all(0 < rate < 0.04 for name, rate in summary.clip_rate.items() if "gripper" not in name)


def test_jpeg_stores_are_as_clean(tmp_path) -> None:
    pytest.importorskip("simplejpeg")
    episodes = [*EPISODES["hand_arm"][:11], injected("freeze", "hand_arm", 11)]
    store = store_of(tmp_path / "s.zarr", ARMS["hand_arm"], episodes, codec="jpeg")
    assert {f.source for f in diagnose([store]).findings} == {"freeze/11"}


def test_episodes_are_numbered_across_segments(tmp_path) -> None:
    spec, path = ARMS["hand_arm"], tmp_path / "s.zarr"
    store_of(path, spec, EPISODES["hand_arm"][:5], writer="a")
    with StoreWriter.create(path, spec, source="tests", licence="CC0-1.0", exist="resume", writer="b") as writer:
        for e in [*EPISODES["hand_arm"][5:8], injected("gap", "hand_arm", 9)]:
            writer.add(e)
    store, told = Store(path), []
    diagnosis = diagnose([store], lambda what, done, total: told.append((what, done, total)))
    (finding,) = [f for f in diagnosis.findings if f.code == "E_GAP"]
    assert store.episodes[finding.episode].source == finding.source == "gap/9"
    assert (
        store.stamp(finding.episode)[finding.first_frame] - store.stamp(finding.episode)[finding.first_frame - 1] > 0.5
    )
    assert told == [(f"{w} s.zarr", i, 9) for w in ("learning", "examining") for i in range(1, 10)]


def test_short_episodes_are_examined(tmp_path) -> None:
    make_store(tmp_path / "s.zarr", small_spec(), (1, 2, 3, 13))
    diagnosis = diagnose([Store(tmp_path / "s.zarr")])
    assert [(s.episodes, s.frames, s.lag_s) for s in diagnosis.stores] == [(4, 19, None)]
    assert "E_BLANK" in diagnosis.counts  # the one frame that `make_store` blanks


def test_duplicates_across_stores_leave_out_the_later_one(tmp_path) -> None:
    spec, e = ARMS["hand_arm"], EPISODES["hand_arm"]
    other_words = dataclasses.replace(e[1], source="again", instruction="do it once more")
    test = store_of(tmp_path / "test.zarr", spec, e[:4])
    training = store_of(tmp_path / "train.zarr", spec, [e[0], *e[4:], other_words])
    twins = [f for f in diagnose([test, training]).findings if f.code == "E_DUP"]
    assert {(f.store, f.source) for f in twins} == {(str(training.path), e[0].source), (str(training.path), "again")}
    assert any("same content as episode 0" in f.what for f in twins)
    assert any("same states and actions, other images or words" in f.what for f in twins)


# --- the command


@pytest.fixture(scope="module")
def examined(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("doctor")
    names = ("late", "covered", "freeze", "other_units", "jump", "jitter")
    faulty = [injected(name, "joint_arm", CLEAN - 2 + i) for i, name in enumerate(names)]
    more = [benchmark.synthetic_episode(ARMS["joint_arm"], 100 + i) for i in range(2)]
    store_of(folder / "s.zarr", ARMS["joint_arm"], [*EPISODES["joint_arm"][: CLEAN - 2], *more, *faulty])
    doctor_command([str(folder / "s.zarr")], str(folder / "out"), as_json=False)
    return folder / "s.zarr", folder / "out"


def test_the_command_writes_json_page_and_filter(examined) -> None:
    store, out = Store(examined[0]), examined[1]
    diagnosis = read_diagnosis(out / "doctor.json")
    assert {f.code for f in diagnosis.findings} >= {"E_LAG", "E_CAMERA", "E_FROZEN", "E_UNITS", "W_JERK", "W_JITTER"}
    for f in diagnosis.findings:
        assert (f.severity == "error") == f.code.startswith("E_") and f.advice == FAULTS[f.code[2:]].advice
        assert f.episode is None or store.episodes[f.episode].source == f.source
        assert 0 < f.share <= 1
    out_of = read_filter(out / "filter.json", store)
    assert out_of.keys() == {f.source for f in diagnosis.findings if f.severity == "error"}
    assert out_of.keys() >= {"late/6", "covered/7", "freeze/8", "other_units/9"}
    assert out_of["late/6"] == ["E_LAG"] and "jitter/11" not in out_of
    assert diagnosis.left_out == len(out_of)


def test_the_page_stands_alone(examined) -> None:
    page = (examined[1] / "doctor.html").read_text()
    body = page[page.index("<body>") :]
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)|url\((?!#)|<script|@import""", page)
    assert body.count("<article") == 6 and body.count("<svg") >= 6 and body.count("data:image/jpeg") == 36
    assert "degrees?" in body and "late/6" in body and "filter.json" in body


def test_a_second_run_writes_the_same_bytes(examined, tmp_path) -> None:
    store, out = examined
    doctor_command([str(store)], str(tmp_path / "again"), as_json=False)
    for name in ("doctor.json", "doctor.html", "filter.json"):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes()


def test_the_command_line(examined, tmp_path, capsys) -> None:
    store, out = str(examined[0]), str(tmp_path / "out")
    assert main(["inspect", store, "--doctor", "--out", out]) == 0
    assert f"4 of 14 episodes are left out by {out}/filter.json" in capsys.readouterr().out.replace("\n", "")
    assert main(["inspect", store, "--doctor", "--out", out, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((Path(out) / "doctor.json").read_text())
    for argv, message in (
        (["inspect", store, store, "--doctor"], "named twice"),
        (["inspect", store, store], "--doctor takes several"),
        (["inspect", store, "--doctor", "--verify"], "run each by itself"),
        (["inspect", store, "--doctor", "--view"], "run each by itself"),
        (["inspect", store, "--view", "--json"], "run each by itself"),
        (["inspect", store, "--episodes", "1"], "run each by itself"),
        (["inspect", "/nowhere.zarr", "--doctor"], "/nowhere.zarr"),
    ):
        assert main(argv) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_a_changed_json_is_refused(examined, tmp_path) -> None:
    values = json.loads((examined[1] / "doctor.json").read_text())
    for change, message in (({"version": 2}, "version 2"), ({"left_out": "no"}, "left_out"), ({"more": 1}, "more")):
        (tmp_path / "doctor.json").write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match=message):
            read_diagnosis(tmp_path / "doctor.json")


def test_nothing_found_is_said(tmp_path, capsys) -> None:
    diagnosis = diagnose([store_of(tmp_path / "s.zarr", ARMS["hand_arm"], EPISODES["hand_arm"])])
    print_diagnosis(diagnosis, Path("out"))
    assert "no findings" in capsys.readouterr().out


# --- the filter


@pytest.fixture
def filtered(tmp_path) -> tuple[Store, Path]:
    spec = dataclasses.replace(ARMS["hand_arm"], obs_dt=0.05, action_dt=0.05)
    store = store_of(tmp_path / "s.zarr", spec, EPISODES["hand_arm"][:6])
    path = tmp_path / "filter.json"
    out = {store.episodes[1].source: ["E_LAG"], store.episodes[4].source: ["E_GAP", "E_BLANK"]}
    write_filter(path, {str(store.path): out, "other.zarr": {"x": ["E_DUP"]}})
    return store, path


def test_a_filter_is_found_by_path_or_by_name(filtered, tmp_path) -> None:
    store, path = filtered
    assert kept(store, None) == (0, 1, 2, 3, 4, 5)
    assert kept(store, str(path)) == (0, 2, 3, 5)
    moved = tmp_path / "elsewhere" / "s.zarr"
    shutil.copytree(store.path, moved)
    assert kept(Store(moved), str(path)) == (0, 2, 3, 5)


def test_shots_come_from_what_is_kept(filtered) -> None:
    store, path = filtered
    few, more = (shots(store, k, 3, kept(store, str(path))) for k in (2, 4))
    assert set(few) < set(more) == {0, 2, 3, 5}
    order = [e for k in range(1, 7) for e in shots(store, k, 3) if k == 1 or e not in shots(store, k - 1, 3)]
    assert set(few) == set([e for e in order if e in more][:2])  # the others' order stays as it was
    with pytest.raises(ValueError, match="has 4 episodes, asked for 5"):
        shots(store, 5, 3, kept(store, str(path)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "holds list"),
        ('{"version":2,"stores":{}}', "is no filter"),
        ('{"version":1,"stores":{"s.zarr":["a"]}}', "is no filter"),
        ('{"version":1,"stores":{"other.zarr":{}}}', r"is about other.zarr, not about .*s\.zarr"),
        ('{"version":1,"stores":{"s.zarr":{"nobody/1":["E_LAG"]}}}', r"does not have: nobody/1; .*--doctor"),
    ],
)
def test_a_filter_that_does_not_fit_is_refused(filtered, content, message) -> None:
    store, path = filtered
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        kept(store, str(path))


def test_a_missing_or_total_filter_is_refused(filtered, tmp_path) -> None:
    store, path = filtered
    with pytest.raises(FileNotFoundError, match=r"no filter at .*--doctor"):
        kept(store, str(tmp_path / "none.json"))
    write_filter(path, {str(store.path): {e.source: ["E_UNITS"] for e in store.episodes}})
    with pytest.raises(ValueError, match="leaves no episode"):
        kept(store, str(path))


def with_filter(store: Store, run: Path, path: Path | None, **changes):
    config = config_for(store.path, run, **changes)
    stores = (StoreConfig(str(store.path), 1.0, None if path is None else str(path)),)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, stores=stores))


def test_training_never_samples_filtered_episodes_and_leaves_them_out_of_the_statistics(
    filtered, tmp_path, monkeypatch
) -> None:
    store, path = filtered
    seen: list[str] = []
    cut = WindowDataset.__getitem__

    def record(self, index):
        place = int(np.searchsorted(self._ends, index, side="right"))
        seen.append(self.store.episodes[self.episodes[place]].source)
        return cut(self, index)

    monkeypatch.setattr(WindowDataset, "__getitem__", record)
    for name, filter, numbers in (("all", None, range(6)), ("some", path, (0, 2, 3, 5))):
        config = with_filter(store, tmp_path / name, filter, steps=12, batch_size=8, save_every=12)
        train(config)
        assert set(seen) == {store.episodes[i].source for i in numbers}
        seen.clear()
        stats = build_contract(config, [store], [chosen_episodes(store, config.data.stores[0].filter, config)]).stats
        found = stats["hand_arm"].fields["state/hand"]
        states = np.concatenate([store.state(i)[:, :3] for i in numbers]).astype(np.float64)
        assert found.count == len(states)
        np.testing.assert_allclose(found.mean, states.mean(0), rtol=1e-9)
        np.testing.assert_array_equal(found.max, states.max(0))


def test_an_edited_filter_is_another_run(filtered, tmp_path) -> None:
    store, path = filtered
    config = with_filter(store, tmp_path / "run", path, steps=2)
    train(config)
    train(dataclasses.replace(config, log_every=2), exist="resume")
    path.write_text(json.dumps(json.loads(path.read_text()), indent=4))  # the same content
    train(config, exist="resume")
    write_filter(path, {str(store.path): {store.episodes[0].source: ["E_LAG"]}})
    with pytest.raises(ValueError, match=r"another config: filters_sha256.*was"):
        train(config, exist="resume")


def test_a_store_needs_no_filter_key() -> None:
    assert from_dict(StoreConfig, {"path": "a", "weight": 1}, "store") == StoreConfig("a", 1.0, None)
    assert from_dict(StoreConfig, {"path": "a", "weight": 1, "filter": "f"}, "store").filter == "f"
