"""Fetch of gymnasium-robotics: the suites' common contract, and what is this one's own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dita.config import EnvConfig
from dita.datasets.store import Store
from dita.embodiment import load_embodiment
from dita.envs import gl, make
from dita.envs.collect import demonstrate

gl.select_backend()
pytest.importorskip("gymnasium_robotics", reason="Fetch needs the extra sim")

from test_envs import (  # noqa: E402, F401  the contract: they run on the `button` of this module
    play,
    test_an_unknown_reset_option_is_refused,
    test_gymnasium_accepts_the_environment,
    test_observations_carry_the_simulated_time,
    test_stepping_renders_nothing_and_rendering_changes_nothing,
    test_with_images_carries_what_observe_shows,
)

from dita.envs.fetch import INSTRUCTIONS, PARAPHRASES, TASKS  # noqa: E402

ENV = EnvConfig("fetch", "fetch_mocap", ("reach",), max_steps=100, fast_render=True)
STILL = np.zeros(4, np.float32)
CAMERA = "external_camera_0"


@pytest.fixture(scope="module")
def made():
    env = make(ENV, "pick-and-place")
    yield env
    env.close()


@pytest.fixture
def button(made):
    made.close()  # nothing rendered yet
    made.reset(seed=0, options={"task": "pick-and-place"})
    return made


# --- starts and states


@pytest.mark.parametrize("task", TASKS)
def test_a_start_is_a_function_of_task_and_seed(button, task):
    fresh = make(ENV, task)
    play(button, 20)
    button.reset(seed=9, options={"task": task})
    other = button.start_hash
    play(button, 20)
    button.reset(seed=5)
    fresh.reset(seed=5)
    assert button.start_hash == fresh.start_hash != other
    assert np.array_equal(play(button, 20), play(fresh, 20))


@pytest.mark.parametrize("task", TASKS)
def test_a_saved_state_continues_bit_equal(button, task):
    other = make(ENV, "reach")
    for steps in (0, 8, 14):  # the block is in the hand at 14
        button.reset(seed=3, options={"task": task})
        play(button, steps)
        saved = button.get_state()
        expected, picture = play(button, 12), button.picture(CAMERA, 96, 96)
        for env in (button, other):
            env.set_state(saved)
            assert (env.task, env.steps, env.success) == (task, steps, saved.success)
            assert np.array_equal(play(env, 12), expected)
            assert np.array_equal(env.picture(CAMERA, 96, 96), picture)
    assert expected[-1, -1], "a success was replayed"
    other.close()


def test_the_state_is_tool_and_gripper_but_neither_block_nor_goal(button):
    before = button.state
    button.data.joint("object0:joint").qpos[:2] += 0.03
    button._env.goal[:] += 0.03
    assert button.state.shape == (4,) and np.array_equal(button.state, before)
    base = button.data.body("robot0:base_link").xpos
    np.testing.assert_allclose(before[:3], button.data.site("robot0:grip").xpos - base, atol=1e-6)


# --- actions


@pytest.mark.parametrize("action", [[0, 0, np.nan, 0], [0, 0, 0, np.inf], [0, 0, 0], [[0, 0, 0, 0]]])
def test_actions_that_are_no_actions_are_refused(button, action):
    with pytest.raises(ValueError, match=r"tool_delta\[3\], gripper_effort\[1\]"):
        button.step(np.array(action, np.float32))
    assert button.steps == 0 and button.warnings() == {}


def test_actions_are_metres_from_where_the_tool_is(button):
    for step in ([0.02, 0.0, 0.0], [0.0, -0.03, 0.01], [0.5, 0.0, 0.0]):
        link = button.data.body("robot0:gripper_link").xpos.copy()
        button.step(np.array([*step, 0], np.float32))
        np.testing.assert_allclose(button.data.mocap_pos[0] - link, np.clip(step, -0.05, 0.05), atol=1e-7)
    for _ in range(15):
        button.step(STILL)
    begin = button.state
    for _ in range(5):
        button.step(np.array([0, 0, 0.02, 0], np.float32))
    assert 0.03 < button.state[2] - begin[2] < 0.1, "it lags"


def test_one_is_open(button):
    for effort, opening in ((1.0, 1.0), (-1.0, 0.0), (1.0, 1.0)):
        for _ in range(30):
            button.step(np.array([0, 0, 0.02, effort], np.float32))
        assert button.state[3] == pytest.approx(opening, abs=0.05)


# --- pictures, experts, reports


def red(picture: np.ndarray) -> np.ndarray:
    r, g, b = (picture[..., i].astype(int) for i in range(3))
    rows, columns = np.nonzero((r - g > 60) & (r - b > 60))
    return np.array([rows.mean(), columns.mean(), len(rows)])


@pytest.mark.parametrize("task", TASKS)
def test_the_goal_is_to_be_seen(button, task):
    """Its ball, the only cue to where it is, is where it is; it follows the goal through the picture."""
    goals, seen = [], []
    for seed in range(30):
        button.reset(seed=seed, options={"task": task})
        np.testing.assert_allclose(button.data.site("target0").xpos, button._env.goal, atol=1e-9)
        goals.append(button._env.goal.copy())
        seen.append(red(button.picture(CAMERA, 96, 96)))
    seen, goals = np.array(seen), np.array(goals)
    clear = seen[:, 2] > 60
    assert (seen[:, 2] > 10).mean() > 0.85 and clear.sum() > 10
    assert np.corrcoef(seen[clear, 1], goals[clear, 1])[0, 1] > 0.9, "left and right"
    if task == "reach":  # at x = 1.3 the camera's row is a mixture of height and distance
        rise = goals[clear, 2] - 0.9 * goals[clear, 0]
        assert np.corrcoef(seen[clear, 0], rise)[0, 1] < -0.9, "what is higher or further is higher in the picture"


def test_every_camera_is_right_side_up_or_looks_straight_down(button):
    for i in range(button.model.ncam):
        up, back = button.data.cam_xmat[i].reshape(3, 3)[2, 1:]
        assert up > 0.5 or abs(back) > 0.99


@pytest.mark.parametrize("task", TASKS)
def test_expert_solves_its_starts_within_its_limits(button, task):
    low, high = button.action_space.low, button.action_space.high
    needed = []
    for seed in range(25):
        button.reset(seed=seed, options={"task": task})
        while not button.success and button.steps < 50:  # Farama's own limit
            action = button.expert_action()
            assert (action >= low).all() and (action <= high).all()
            button.step(action)
        assert button.warnings() == {}
        needed.append(button.steps if button.success else 1000)
    assert sum(n < 1000 for n in needed) >= 24, needed


def test_the_expert_lifts_the_block(button):
    heights = []
    for seed in range(6):
        button.reset(seed=seed, options={"task": "pick-and-place"})
        play(button, 50)
        heights.append((button._env.goal[2], button._moved[2]))
    high = [(goal, block) for goal, block in heights if goal > 0.5]
    assert high and all(abs(goal - block) < 0.05 for goal, block in high)


def test_success_is_within_five_centimetres_at_any_step(button):
    button.reset(seed=3, options={"task": "reach"})
    assert np.linalg.norm(button._moved - button._env.goal) > 0.05
    while not button.success:
        _, reward, *_ = button.step(button.expert_action())
        assert (reward == 0) == button.success == (np.linalg.norm(button._moved - button._env.goal) < 0.05)
    for _ in range(10):
        _, reward, terminated, _, _ = button.step(np.array([0.05, 0.05, 0.05, 0], np.float32))
    assert terminated and reward == -1


def test_every_task_has_its_own_sentences():
    every = [text for texts in PARAPHRASES.values() for text in texts] + list(INSTRUCTIONS.values())
    assert set(PARAPHRASES) == set(INSTRUCTIONS) == set(TASKS) and len(set(every)) == len(every) == 12
    assert all("red" in text for text in every), "the goal is named"


def test_a_demonstration_trains(button, tmp_path):
    from dita.datasets.writer import StoreWriter

    button.reset(seed=4)
    episode = demonstrate(button, 4, 0.15)
    assert episode is not None and episode.images[CAMERA].shape[1:] == (96, 96, 3)
    with StoreWriter.create(tmp_path / "a.zarr", button.embodiment, source="fetch", licence="MIT") as store:
        store.add(episode)
    assert [e.instruction for e in Store(tmp_path / "a.zarr").episodes] == [INSTRUCTIONS["pick-and-place"]]


def test_an_unstable_simulation_is_reported(button, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT
    assert button.warnings() == {}
    button.data.qvel[:] = 1e12
    button.step(STILL)
    assert button.warnings() and set(button.warnings()) <= {"mjWARN_BADQVEL", "mjWARN_BADQACC", "mjWARN_BADQPOS"}
    button.reset(seed=0)
    assert button.warnings() == {}


def test_what_does_not_exist_is_refused():
    from dita.envs.fetch import FetchEnv

    spec = load_embodiment("fetch_mocap")
    with pytest.raises(ValueError, match=r"unknown camera of reach 'external_camera'; did you mean external_camera_0"):
        FetchEnv(replace(spec, cameras=(replace(spec.cameras[0], name="external_camera"),)), "reach", 10)
    with pytest.raises(ValueError, match=r"unknown task 'slide'"):
        FetchEnv(spec, "slide", 10)
