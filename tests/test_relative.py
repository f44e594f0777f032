"""Relative actions: there and back, rotations as rotations, statistics after the transform, absolute on the way out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import contract_of, diffusion_config, embodiment_dict, field, make_history, make_window, policy_config
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from dita.embodiment import embodiment_from_dict
from dita.normalize import fit
from dita.policy.fast import PolicySession
from dita.policy.policy import DitaPolicy
from dita.preprocess import Preprocessor
from dita.relative import relative_chunks, to_absolute, to_relative


def embodiment(**changes):
    """Absolute position, 6-D rotation and gripper; a joint delta that stays a delta."""
    values = embodiment_dict("pose")
    values["state"] = [
        field("gripper", "gripper_position", 1, 9),
        field("position", "ee_position", 3, 0),
        field("rotation", "ee_rotation_6d", 6, 3),
    ]
    values["action"] = [
        field("target", "ee_position", 3, 0),
        field("turn", "ee_rotation_6d", 6, 7),
        field("nudge", "joint_position", 2, 3, "delta"),
        field("grip", "gripper_position", 1, 6),
    ]
    return embodiment_from_dict(values | changes)


SPEC = embodiment()


def six(rotation: Rotation) -> np.ndarray:
    return np.concatenate([rotation.as_matrix()[..., 0], rotation.as_matrix()[..., 1]], axis=-1)


def sample(seed: int, n: int = 5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    turns = Rotation.random(n + 1, random_state=seed)
    state = np.concatenate([rng.random(1), rng.uniform(-1, 1, 3), six(turns[0])]).astype(np.float32)
    low_dim = rng.uniform(-1, 1, (n, 6))
    action = np.concatenate([low_dim[:, :3], six(turns[1:]), low_dim[:, 3:]], axis=1).astype(np.float32)
    return state, action


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000))
def test_there_and_back_is_the_same(seed) -> None:
    state, action = sample(seed)
    relative = to_relative(action, state, SPEC)
    np.testing.assert_allclose(to_absolute(relative, state, SPEC), action, atol=2e-6)
    np.testing.assert_array_equal(relative[:, 9:], action[:, 9:])  # deltas and grippers stay


def test_values_are_differences_and_turns() -> None:
    state, action = sample(3)
    relative = to_relative(action, state, SPEC)
    np.testing.assert_allclose(relative[:, :3], action[:, :3] - state[1:4], atol=1e-7)
    expected = [six(_rotation(a) * _rotation(state[4:10]).inv()) for a in action[:, 3:9]]
    np.testing.assert_allclose(relative[:, 3:9], expected, atol=1e-6)
    here = np.concatenate([state[1:4], state[4:10], [0, 0, 1]])[None].astype(np.float32)
    standing = to_relative(here, state, SPEC)[0]
    np.testing.assert_allclose(standing, [0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1], atol=1e-6)


def _rotation(values: np.ndarray) -> Rotation:
    x, y = values[:3], values[3:]
    return Rotation.from_matrix(np.stack([x, y, np.cross(x, y)], axis=-1))


def test_an_absolute_action_without_its_state_is_refused() -> None:
    values = embodiment_dict("bare") | {"action": [field("joints", "joint_position", 2, 0)]}
    config = policy_config()
    with pytest.raises(
        ValueError, match=r"action 'joints' of 'bare' needs a state field of kind joint_position, size 2"
    ):
        Preprocessor(contract_of([embodiment_from_dict(values)], config, actions="relative"))
    Preprocessor(contract_of([embodiment_from_dict(values)], config))  # as stored: nothing to be relative to


def test_statistics_are_those_of_the_chunks() -> None:
    state = np.arange(6, dtype=np.float32)[:, None] * 10 + np.zeros((6, 1), np.float32)
    spec = embodiment_from_dict(
        embodiment_dict("line")
        | {"state": [field("x", "joint_position", 1, 0)], "action": [field("y", "joint_position", 1, 0)]}
    )
    action = state + 1
    rows = relative_chunks(state, action, spec, range(0, 3), stride=1)
    # row 0: +1 for 6 frames, row 1: +11 for 5, row 2: +21 for 4
    assert sorted(rows[:, 0].tolist()) == [1.0] * 6 + [11.0] * 5 + [21.0] * 4
    past = relative_chunks(state, action, spec, range(-1, 1), stride=2)
    assert sorted(past[:, 0].tolist()) == [-19.0] * 4 + [1.0] * 6
    stats = fit(spec, [(state, rows)])
    assert (stats.fields["action/y"].min, stats.fields["action/y"].max) == ((1.0,), (21.0,))
    assert stats.fields["state/x"].count == 6


def test_a_policy_of_relative_actions_commands_absolute_ones() -> None:
    """The same pictures and network; a hand that stands elsewhere is sent as much elsewhere, to rounding."""
    config = policy_config(action_dim=13, state_dim=12, state_tokens=False)
    torch.manual_seed(0)
    policy = DitaPolicy(config, diffusion_config(), contract_of([SPEC], config, actions="relative")).eval()
    assert policy.contract.root_hash != contract_of([SPEC], config).root_hash
    history = [dataclasses.replace(o, state=sample(0)[0]) for o in make_history(SPEC, 0)]
    moved = [dataclasses.replace(o, state=o.state + np.float32([0, 0.5, -0.25, 0.125] + [0] * 6)) for o in history]
    for predict in (policy.predict, PolicySession(policy).predict):
        here, there = predict(history, seed=1).values, predict(moved, seed=1).values
        expected = np.broadcast_to(np.float32([0.5, -0.25, 0.125]), (6, 3))
        np.testing.assert_allclose(there[:, :3] - here[:, :3], expected, atol=1e-5)
        np.testing.assert_allclose(there[:, 3:], here[:, 3:], atol=1e-6)
        again = predict(history, seed=1, committed=here[:2])
        np.testing.assert_array_equal(again.values[:2], here[:2])
    window = make_window(SPEC, 0, state=np.stack([sample(1)[0]] * 2), actions=sample(1, 6)[1])
    batch = policy.preprocessor.batch([window])
    back = policy.preprocessor.decode_actions(batch.actions[0].numpy(), "pose", 0.0, window.state[-1])
    np.testing.assert_allclose(back.values, window.actions, atol=1e-5)
