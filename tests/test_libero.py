"""LIBERO's adapter on a fake of LIBERO's interface; what a real LIBERO does with it is not known."""

from __future__ import annotations

import importlib
import pickle
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dita.config import EnvConfig
from dita.embodiment import load_embodiment
from dita.envs import gl, make, suite_module

gl.select_backend()

import fake_libero  # noqa: E402
from test_envs import (  # noqa: E402, F401  the contract: they run on the `button` of this module
    test_an_unknown_reset_option_is_refused,
    test_gymnasium_accepts_the_environment,
    test_with_images_carries_what_observe_shows,
)

LIFT, OTHER = "lift_the_hand", "KITCHEN_SCENE1_open_it"
NAMES = {
    **{suite: [] for suite in ("libero_spatial", "libero_object", "libero_10")},
    **{"libero_goal": [LIFT], "libero_90": [OTHER]},
}
ENV = EnvConfig("libero", "libero_panda", (LIFT,), max_steps=60, fast_render=True)
STATES = 5


def write_states(path: Path, states: object) -> None:
    """Write as LIBERO did: torch.save under NumPy 1, whose modules are called otherwise."""
    torch.save(states, path)
    with zipfile.ZipFile(path) as source:
        parts = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w") as target:
        for name, data in parts.items():
            target.writestr(name, data.replace(b"numpy._core.", b"numpy.core."))


def states_of_the_scene() -> np.ndarray:
    rng = np.random.default_rng(0)
    states = np.zeros((STATES, 1 + 12 + 11))
    states[:, 1:8] = np.concatenate([rng.uniform(-0.2, 0.2, (STATES, 3)), np.tile([1.0, 0, 0, 0], (STATES, 1))], 1)
    states[:, 3] = 1.0
    states[:, 8:10] = rng.uniform(-0.05, 0.05, (STATES, 2))
    return states


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Let the fake be LIBERO for this module, with files made here."""
    root = tmp_path_factory.mktemp("libero")
    (root / "config.yaml").write_text("{}")
    for suite, tasks in NAMES.items():
        for task in tasks:
            for kind, name in (("bddl_files", f"{task}.bddl"), ("init_states", f"{task}.pruned_init")):
                (root / kind / suite).mkdir(parents=True, exist_ok=True)
                (root / kind / suite / name).touch()
            write_states(root / "init_states" / suite / f"{task}.pruned_init", states_of_the_scene())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIBERO_CONFIG_PATH", str(root))
        for name, module in fake_libero.modules(root, NAMES).items():
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, "dita.envs.libero", raising=False)
        yield root
        sys.modules.pop("dita.envs.libero", None)


@pytest.fixture
def button(installed):
    env = make(ENV, LIFT)
    yield env
    env.close()


def wander(env, steps: int, seed: int = 0) -> np.ndarray:
    rng, space, rows = np.random.default_rng(seed), env.action_space, []
    for _ in range(steps):
        observation, reward, done, _, _ = env.step(rng.uniform(space.low, space.high).astype(np.float32))
        rows.append([*observation["state"], reward, done, *env.get_state().physics])
    return np.array(rows)


# --- without LIBERO


def test_a_missing_libero_is_one_line_that_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "libero", None)
    monkeypatch.delitem(sys.modules, "dita.envs.libero", raising=False)
    with pytest.raises(ValueError, match=r"suite libero needs the package libero: .*\.venv-libero.*libero\.md") as e:
        suite_module("libero")
    assert "\n" not in str(e.value)


def test_a_libero_that_would_ask_for_its_folders_is_refused(installed, monkeypatch, tmp_path):
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path))
    monkeypatch.delitem(sys.modules, "dita.envs.libero", raising=False)
    with pytest.raises(ValueError, match=r"no config.yaml yet.*echo N \| python -c 'import libero.libero'"):
        importlib.import_module("dita.envs.libero")


# --- starts and states


def test_tasks_and_sentences_are_liberos(installed, capsys):
    suite = suite_module("libero")
    assert suite.TASKS == (LIFT, OTHER) and suite.INSTRUCTIONS[LIFT] == "lift the hand"
    assert list(suite.SUITES) == list(suite.NAMES) and capsys.readouterr().out == ""
    with pytest.raises(ValueError, match=r"unknown task 'lift_the_hnd'; did you mean lift_the_hand"):
        make(ENV, "lift_the_hnd")


def test_a_start_is_a_function_of_task_and_seed(button):
    fresh = make(ENV, OTHER)
    fresh.reset(seed=1)
    button.reset(seed=9)
    other = button.start_hash
    wander(button, 12)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    button.reset(seed=6)
    assert np.array_equal(np.random.get_state()[1], before), "NumPy's global generator is left alone"  # noqa: NPY002
    fresh.reset(seed=6, options={"task": LIFT})
    assert button.start_hash == fresh.start_hash != other
    assert np.array_equal(wander(button, 15), wander(fresh, 15))
    fresh.close()


def test_a_start_is_the_seeds_initial_state_settled_for_ten_steps(button):
    button.reset(seed=1_000_002)
    states, commands = states_of_the_scene(), np.array(button._env.commands)
    assert commands.shape == (10, 7) and not commands[:, :6].any() and (commands[:, 6] == -1).all()
    assert button.steps == 0 and not button.success and button.data.time == pytest.approx(10 * 0.05)
    np.testing.assert_allclose(button.data.qpos[:2], states[1_000_002 % STATES][1:3], atol=1e-3)
    cabinet, start = button.model.body("cabinet").pos.copy(), button.start_hash
    button.reset(seed=1_000_002 + STATES)  # the same initial state, other fixtures
    assert not np.array_equal(button.model.body("cabinet").pos, cabinet) and button.start_hash != start
    options = button._env.kwargs
    assert options["ignore_done"] and not options["hard_reset"] and not options["use_camera_obs"]


def test_a_saved_state_continues_bit_equal(button):
    other = make(ENV, OTHER)
    other.reset(seed=1)
    for steps in (0, 7):
        button.reset(seed=3)
        wander(button, steps, seed=1)
        saved = button.get_state()
        here, expected = button.state, wander(button, 12)
        picture = button.observe().images["agentview_rgb"]
        for env in (button, other):
            env.set_state(saved)
            assert (env.task, env.steps, env.success) == (LIFT, steps, saved.success)
            assert np.array_equal(env.state, here) and np.array_equal(wander(env, 12), expected)
            assert np.array_equal(env.observe().images["agentview_rgb"], picture)
            assert env._env.flame == (env.data.qpos[9] > 0.05)
    other.close()


def test_the_state_is_hand_and_gripper_but_never_the_bowl(button):
    button.reset(seed=0)
    seen = button._env._get_observations()
    assert button.state.shape == (10,) and button.observation_space["state"].contains(button.state)
    np.testing.assert_allclose(button.state[:3], seen["robot0_eef_pos"], atol=1e-6)
    np.testing.assert_allclose(button.state[3:9], [1, 0, 0, 0, -1, 0], atol=1e-6)  # half a turn about x
    fingers = seen["robot0_gripper_qpos"]
    assert button.state[9] == pytest.approx((fingers[0] - fingers[1]) / 0.08, abs=1e-6)


# --- actions, success, pictures


def test_actions_are_metres_and_radians_and_one_is_open(button):
    button.reset(seed=0)
    button.step(np.array([0.01, -0.02, 0.2, 0.1, 0.0, -0.25, 1.0], np.float32))  # z beyond its limit
    np.testing.assert_allclose(button._env.commands[-1], [0.2, -0.4, 1.0, 0.2, 0.0, -0.5, -1.0], atol=1e-6)
    for effort, opening in ((1.0, 1.0), (-1.0, 0.0)):
        for _ in range(25):
            button.step(np.array([0, 0, 0, 0, 0, 0, effort], np.float32))
        assert button.state[9] == pytest.approx(opening, abs=0.03)
    with pytest.raises(ValueError, match=r"robot0_position_delta\[3\], .*robot0_gripper\[1\]"):
        button.step(np.full(7, np.nan, np.float32))


def test_success_is_the_goal_at_any_step(button):
    button.reset(seed=0)
    up, down = (np.array([0, 0, z, 0, 0, 0, 1], np.float32) for z in (0.05, -0.05))
    while not button.success:
        _, reward, terminated, _, info = button.step(up)
        assert (reward == 1) == terminated == info["success"] and button.steps < 20
    for _ in range(15):
        _, reward, terminated, _, _ = button.step(down)
    assert reward == 0 and terminated


def test_pictures_are_right_side_up_and_under_the_names_of_the_data(button):
    def red_row() -> float:
        r, g, b = (button.observe().images["agentview_rgb"][..., i].astype(int) for i in range(3))
        return float(np.nonzero((r > 90) & (g < 60) & (b < 60))[0].mean())

    button.reset(seed=0)
    images = button.observe().images
    assert {name: picture.shape for name, picture in images.items()} == {
        "agentview_rgb": (128, 128, 3),
        "eye_in_hand_rgb": (128, 128, 3),
    }
    low = red_row()
    for _ in range(3):
        button.step(np.array([0, 0, 0.05, 0, 0, 0, 1], np.float32))
    assert button.data.qpos[9] > 0.04 and red_row() < low - 4, "higher in the world is higher in the picture"


def test_there_is_no_expert(button):
    with pytest.raises(ValueError, match="no scripted expert"):
        button.expert_action()


def test_embodiments_and_files_that_do_not_fit_are_refused(installed):
    suite, spec = suite_module("libero"), load_embodiment("libero_panda")
    with pytest.raises(ValueError, match=r"'robosuite_panda_osc' is not LIBERO's robot"):
        suite.LiberoEnv(load_embodiment("robosuite_panda_osc"), LIFT, 10)
    camera = replace(spec.cameras[0], name="corner")
    with pytest.raises(ValueError, match=r"unknown camera of lift_the_hand 'corner'"):
        suite.LiberoEnv(replace(spec, cameras=(camera,)), LIFT, 10)
    path = installed / "init_states" / "libero_goal" / f"{LIFT}.pruned_init"
    kept = path.read_bytes()
    write_states(path, states_of_the_scene()[:, :-1])
    with pytest.raises(ValueError, match=r"states of 23 values, but the model .* has 24"):
        make(ENV, LIFT)
    path.write_bytes(kept)


# --- initial states


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


def test_initial_states_are_read_and_nothing_in_them_is_run(installed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load_states, path = suite_module("libero").load_states, tmp_path / "a.pruned_init"
    for write in (torch.save, lambda states, to: write_states(to, states)):  # as NumPy 2 and NumPy 1 pickle
        write(states_of_the_scene(), path)
        assert np.array_equal(load_states(path), states_of_the_scene())
    refused = r"can be read without running it: (Unsupported global|Can only build|it is no zip)"
    for bad in (Bomb(), np.array([Bomb()], object), [Bomb()], np.zeros(3, object)):
        torch.save(bad, path)
        with pytest.raises(ValueError, match=refused):
            load_states(path)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=refused):
        load_states(path)
    path.write_bytes(b"no zip")
    with pytest.raises(ValueError, match=refused):
        load_states(path)
    assert not (tmp_path / "exploded").exists()


def test_initial_states_that_are_none_are_refused(installed, tmp_path):
    load_states, path = suite_module("libero").load_states, tmp_path / "a.pruned_init"
    with pytest.raises(FileNotFoundError, match="is missing"):
        load_states(path)
    for bad in (torch.zeros(2, 3), np.zeros(3), {"a": 1}):
        torch.save(bad, path)
        with pytest.raises(ValueError, match=r"must hold an array \[states, values\] of float64"):
            load_states(path)
    torch.save(np.zeros((2, 3), np.float32), path)
    with pytest.raises(ValueError, match="read without running it"):
        load_states(path)
    torch.save(np.array([[np.nan]]), path)
    with pytest.raises(ValueError, match="not finite"):
        load_states(path)
