"""Embodiments, statistics and the preprocessor: round trips, refusals by name, one path for all sources."""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import numpy as np
import pytest
import yaml
from conftest import contract_of, embodiment_dict, field, make_history, make_stats, make_window, policy_config
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dita.embodiment import (
    config_folder,
    embodiment_from_dict,
    embodiment_to_dict,
    load_embodiment,
    pad,
    pad_mask,
    unpad,
)
from dita.normalize import Normalizer, fit, stats_from_dict, stats_to_dict
from dita.preprocess import Preprocessor
from dita.types import NormStats

SPEC = embodiment_from_dict(embodiment_dict())


@pytest.mark.parametrize("path", sorted((config_folder() / "embodiment").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_embodiments_load_and_round_trip(path) -> None:
    spec = load_embodiment(path.stem)
    assert spec.name == path.stem
    assert embodiment_from_dict(embodiment_to_dict(spec)) == spec
    assert load_embodiment(path) == spec


def test_shipped_embodiments_share_slots() -> None:
    """One arm's fields stand where every other arm has them, so that a mixture shares what it learns."""
    arm = {
        "action": {"ee_position": 0, "ee_rotation_axis_angle": 3, "gripper": 6, "joint_position": 7},
        "state": {"ee_position": 0, "ee_rotation_6d": 3, "gripper": 9, "joint_position": 10},
    }
    robots = ("franka_panda", "franka_fr3", "widowx_250s", "ur5e", "xarm6", "xarm7", "sawyer", "kinova_gen3",
              "kuka_iiwa", "google_robot", "fetch", "metaworld_sawyer")  # fmt: skip
    for spec in map(load_embodiment, robots):
        for group, fields in (("state", spec.state), ("action", spec.action)):
            first: dict[str, int] = {}
            for f in fields:
                first.setdefault("gripper" if f.kind.startswith("gripper") else f.kind, f.slot)
            for kind, slot in first.items():
                if f"{group}/{kind}" != "action/joint_position" or spec.name != "fetch":  # only its torso
                    assert arm[group].get(kind, slot) == slot, f"{spec.name}: {group}.{kind}"
        gripper = next(f for f in spec.state if f.kind == "gripper_position")
        assert (gripper.low, gripper.high) == ((0.0,), (1.0,))


def test_unknown_embodiment_lists_the_shipped_ones() -> None:
    with pytest.raises(ValueError, match=r"shipped: .*metaworld_sawyer"):
        load_embodiment("metaworld_swayer")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(colour="red"), "colour"),
        (lambda d: d.pop("obs_dt"), "obs_dt"),
        (lambda d: d.update(action_dt=0.0), "action_dt must be positive"),
        (lambda d: d.update(action=[]), "at least one action"),
        (lambda d: d["action"][0].update(reference=None), "delta names its reference"),
        (lambda d: d["action"][0].update(kind="ee_twist"), "kind"),
        (lambda d: d["action"][0].update(scale=0.0), "scale"),
        (lambda d: d["action"][0].update(low=[0.0, 0.0]), "3 values each"),
        (lambda d: d["action"][0].update(low=[0.02] * 3), "below its high"),
        (lambda d: d["action"][1].update(slot=2), "slots must be unique"),
        (lambda d: d["action"][1].update(name="delta"), "names must be unique"),
        (lambda d: d["cameras"].append(d["cameras"][0]), "camera names"),
        (lambda d: d["state"].append(field("r", "ee_rotation_6d", 3, 3)), "has size 6"),
    ],
)
def test_embodiment_refusals_name_the_field(change, message) -> None:
    values = yaml.safe_load(yaml.safe_dump(embodiment_dict()))
    change(values)
    with pytest.raises(ValueError, match=message):
        embodiment_from_dict(values, "arm.yaml")


@given(hnp.arrays(np.float32, (5, 4), elements=st.floats(-10, 10, width=32)))
def test_pad_unpad_is_the_identity(values) -> None:
    padded = pad(values, SPEC.action, 9)
    np.testing.assert_array_equal(unpad(padded, SPEC.action), values)
    assert np.all(padded[:, ~pad_mask(SPEC.action, 9)] == 0)


def test_a_field_beyond_the_padded_vector_is_refused() -> None:
    with pytest.raises(ValueError, match=r"field 'grip' needs slots 6..6"):
        pad_mask(SPEC.action, 6)
    with pytest.raises(ValueError, match=r"got 3 values but the embodiment has 4: delta\[3\], grip\[1\]"):
        pad(np.zeros((2, 3), np.float32), SPEC.action, 9)


@settings(max_examples=30)
@given(st.integers(1, 60), st.lists(st.integers(0, 60), max_size=4), st.integers(0, 2**16))
def test_streaming_statistics_equal_numpy_however_cut(rows, cuts, seed) -> None:
    rng = np.random.default_rng(seed)
    state, action = rng.normal(3, 2, (rows, 4)).astype(np.float32), rng.normal(0, 1, (rows, 4)).astype(np.float32)
    bounds = sorted({0, rows, *[min(c, rows) for c in cuts]})
    stats = fit(SPEC, [(state[a:b], action[a:b]) for a, b in pairwise(bounds)])
    hand, exact = stats.fields["state/hand"], state[:, :3].astype(np.float64)
    assert hand.count == rows
    np.testing.assert_allclose(hand.mean, exact.mean(0), rtol=1e-9)
    np.testing.assert_allclose(hand.std, exact.std(0), rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(hand.min, exact.min(0))
    np.testing.assert_array_equal(hand.max, exact.max(0))
    np.testing.assert_allclose(hand.q99, np.quantile(exact, 0.99, axis=0), rtol=1e-9)
    assert stats_from_dict(stats_to_dict(stats)) == stats


def test_quantiles_are_thinned_alike_however_cut(monkeypatch) -> None:
    monkeypatch.setattr("dita.normalize.QUANTILE_ROWS", 64)
    rng = np.random.default_rng(0)
    state, action = rng.normal(size=(1000, 4)).astype(np.float32), rng.normal(size=(1000, 4)).astype(np.float32)
    whole = fit(SPEC, [(state[i : i + 10], action[i : i + 10]) for i in range(0, 1000, 10)])
    assert whole.fields["state/hand"].q01 == pytest.approx(np.quantile(state[:, :3], 0.01, axis=0), abs=0.8)
    assert whole.fields["state/hand"].count == 1000


@pytest.mark.parametrize("method", ["q01_q99", "min_max", "mean_std"])
@given(values=hnp.arrays(np.float32, (3, 4), elements=st.floats(-5, 5, width=32)))
def test_normalising_inverts(method, values) -> None:
    normalizer = Normalizer("action", SPEC.action, make_stats(SPEC), method)
    np.testing.assert_allclose(normalizer.invert(normalizer.apply(values)), values, rtol=1e-4, atol=1e-5)


def test_ranges_map_to_one_and_constants_to_zero() -> None:
    action = np.tile(np.array([0.0, 1.0, -2.0, 0.5], np.float32), (10, 1))
    action[:, 0] = np.linspace(-3, 5, 10)
    stats = fit(SPEC, [(action, action)])
    normalizer = Normalizer("action", SPEC.action, stats, "min_max")
    out = normalizer.apply(action)
    assert (out[0, 0], out[-1, 0]) == (-1, 1)
    assert np.all(out[:, 1:] == 0)
    np.testing.assert_array_equal(normalizer.invert(np.full((1, 4), 9.0, np.float32))[0, 1:], [1.0, -2.0, 0.5])
    assert normalizer.apply(action * 2)[-1, 0] > 1  # nothing is clipped


def test_six_d_rotations_are_left_as_they_are() -> None:
    values = embodiment_dict() | {"state": [field("r", "ee_rotation_6d", 6, 3)]}
    spec = embodiment_from_dict(values)
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    stats = fit(spec, [(x * 7, np.zeros((4, 4), np.float32))])
    np.testing.assert_array_equal(Normalizer("state", spec.state, stats, "min_max").apply(x), x)


def test_statistics_of_another_size_are_refused() -> None:
    stats = make_stats(SPEC)
    wrong = NormStats("arm", stats.fields | {"action/grip": stats.fields["action/delta"]})
    with pytest.raises(ValueError, match="action/grip have 3 dims, the field has 1"):
        Normalizer("action", SPEC.action, wrong, "min_max")


def test_a_dataset_window_and_a_live_history_give_the_same_observation() -> None:
    preprocessor = Preprocessor(contract_of([SPEC], policy_config()))
    history = make_history(SPEC, 0)
    window = make_window(
        SPEC, 0, images={"cam0": np.stack([o.images["cam0"] for o in history])},
        state=np.stack([o.state for o in history]), instruction=history[-1].instruction,
    )  # fmt: skip
    live, stored = preprocessor.observe([preprocessor.window(history, "arm")]), preprocessor.observe([window])
    for name in (f.name for f in dataclasses.fields(live)):
        assert (getattr(live, name) == getattr(stored, name)).all(), name


def test_a_short_history_repeats_its_first_frame_masked() -> None:
    preprocessor = Preprocessor(contract_of([SPEC], policy_config()))
    history = make_history(SPEC, 0, length=1)
    observation = preprocessor.observe([preprocessor.window(history, "arm")])
    assert observation.image_valid.tolist() == [[[False], [True]]]
    assert (observation.images[0, 0] == observation.images[0, 1]).all()
    assert (observation.state[0, 0] == observation.state[0, 1]).all()


def test_actions_survive_the_way_there_and_back() -> None:
    preprocessor = Preprocessor(contract_of([SPEC], policy_config()))
    values = np.random.default_rng(0).uniform(-0.01, 0.01, (6, 4)).astype(np.float32)
    state = np.zeros(4, np.float32)
    chunk = preprocessor.decode_actions(preprocessor.encode_actions(values, "arm", state), "arm", 2.5, state)
    np.testing.assert_allclose(chunk.values, values, atol=1e-8)
    assert (chunk.stamp, chunk.action_dt) == (2.5, SPEC.action_dt)
    values[3, 1] = np.nan
    with pytest.raises(ValueError, match="first bad row 3"):
        preprocessor.encode_actions(values, "arm", state)


def test_other_sizes_are_resized_without_moving_the_picture() -> None:
    big = embodiment_from_dict(embodiment_dict(size=64))
    preprocessor = Preprocessor(contract_of([big], policy_config()))
    picture = np.zeros((2, 64, 64, 3), np.uint8)
    picture[:, 16:32, 32:64] = 200
    window = make_window(big, 0, images={"cam0": picture})
    small = preprocessor.observe([window]).images[0, 1, 0]
    assert small.shape == (3, 32, 32)
    assert small[:, 12, 24].tolist() == [200] * 3 and small[:, 4, 4].tolist() == [0] * 3


def test_cameras_beyond_the_policys_slots_are_refused() -> None:
    two = embodiment_from_dict(embodiment_dict(cameras=2))
    with pytest.raises(ValueError, match="cam1"):
        Preprocessor(contract_of([two], policy_config(cameras=1)))
