"""Our instruction-decides suite: the suites' common contract, one start for all sentences, and what counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from dita.config import CollectConfig, EnvConfig
from dita.datasets.store import Store
from dita.embodiment import embodiment_to_dict, load_embodiment
from dita.envs import gl, make
from dita.envs.collect import collect

gl.select_backend()

from test_envs import (  # noqa: E402, F401  the contract: they run on the `button` of this module
    play,
    test_an_unknown_reset_option_is_refused,
    test_gymnasium_accepts_the_environment,
    test_observations_carry_the_simulated_time,
    test_stepping_renders_nothing_and_rendering_changes_nothing,
    test_with_images_carries_what_observe_shows,
)

from dita.envs.choice import COLOURS, INSTRUCTIONS, PARAPHRASES, TASKS, swapped  # noqa: E402

TOUCH = ("touch-red", "touch-green", "touch-blue")
ENV = EnvConfig("choice", "choice_hand", TOUCH, max_steps=80, fast_render=True)
STILL = np.zeros(3, np.float32)


@pytest.fixture(scope="module")
def made():
    env = make(ENV, "touch-red")
    yield env
    env.close()


@pytest.fixture
def button(made):
    made.close()  # nothing rendered yet
    made.reset(seed=0, options={"task": "touch-red"})
    return made


# --- one start for every sentence


def test_start_and_picture_are_the_same_for_every_task(button):
    seen = {}
    for seed in (3, 4):
        for task in TASKS:
            button.reset(seed=seed, options={"task": task})
            o = button.observe()
            seen.setdefault(seed, []).append((button.start_hash, o.images["front"].tobytes(), o.state.tobytes()))
            assert o.instruction == INSTRUCTIONS[task]
    assert len(set(seen[3])) == len(set(seen[4])) == 1 and seen[3][0] != seen[4][0]


def test_colours_take_every_place_and_never_lie_close(button):
    leftmost, gaps = [], []
    for seed in range(60):
        button.reset(seed=seed)
        places = button.places
        leftmost.append(max(places, key=lambda c: places[c][1]))
        gaps += [np.linalg.norm(places[a] - places[b]) for a in places for b in places if a < b]
    assert min(leftmost.count(c) for c in COLOURS) > 10, "no colour can be told by its place"
    assert min(gaps) > 0.07


def test_a_start_is_a_function_of_the_seed(button):
    fresh = make(ENV, "push-blue")
    play(button, 20)
    button.reset(seed=9)
    other = button.start_hash
    button.reset(seed=5, options={"task": "push-blue"})
    fresh.reset(seed=5)
    assert button.start_hash == fresh.start_hash != other
    assert np.array_equal(play(button, 30), play(fresh, 30))


@pytest.mark.parametrize("task", ["touch-green", "push-green"])
def test_a_saved_state_continues_bit_equal(button, task):
    other = make(ENV, "push-red")
    for steps in (0, 7, 12):
        button.reset(seed=3, options={"task": task})
        play(button, steps)
        saved = button.get_state()
        picture, expected = button.observe().images["front"], play(button, 12)
        later = button.observe().images["front"]
        for env in (button, other):
            env.set_state(saved)
            assert (env.task, env.steps, env.success) == (task, steps, saved.success)
            assert np.array_equal(env.observe().images["front"], picture)
            assert np.array_equal(play(env, 12), expected)
            assert np.array_equal(env.observe().images["front"], later)
    assert expected[-1, -1], "a success was replayed"
    other.close()


# --- what counts


@pytest.mark.parametrize("task", TASKS)
def test_experts_always_succeed_within_the_limits(button, task):
    low, high = button.action_space.low, button.action_space.high
    for seed in range(30):
        button.reset(seed=seed, options={"task": task})
        while not button.success and button.steps < 40:
            action = button.expert_action()
            assert (action >= low).all() and (action <= high).all()
            button.step(action)
        assert button.success and button.warnings() == {}, seed


def reader(sentence: str) -> str | None:
    """Return the task that a sentence asks for; what a policy that understands would do."""
    return next((task for task, text in INSTRUCTIONS.items() if text == sentence), None)


def expert_of(env, colour: str) -> np.ndarray:
    named, env._named = env._named, colour
    action = env.expert_action()
    env._named = named
    return action


def success_rate(env, task: str, sentence: str, obey: Callable[[str], str | None], seeds: int = 12) -> float:
    """Play a policy that sees only the sentence; the environment judges by the task."""
    wins = 0
    for seed in range(seeds):
        env.reset(seed=seed, options={"task": task})
        env.instruction = sentence
        obeyed = obey(env.observe().instruction)
        while not env.success and env.steps < 40:
            env.step(expert_of(env, obeyed.split("-")[1]) if obeyed else STILL)
        wins += env.success
    return wins / seeds


def test_the_sentence_decides(button):
    """Right, blank and swapped sentences tell a policy that listens from one that does not."""
    for task in TOUCH:
        assert success_rate(button, task, INSTRUCTIONS[task], reader) == 1.0
        assert success_rate(button, task, "", reader) == 0.0
        assert success_rate(button, task, swapped(task), reader) == 0.0
    deaf = [success_rate(button, task, INSTRUCTIONS[task], lambda _: "touch-red") for task in TOUCH]
    assert deaf == [1.0, 0.0, 0.0], "always the same colour: a third"


@pytest.mark.parametrize("verb", ["touch", "push"])
def test_a_wrong_touch_fails_for_good(button, verb):
    task = f"{verb}-red"
    button.reset(seed=1, options={"task": task})
    begin = button.places["red"]
    while not button._touched():
        button.step(expert_of(button, "blue"))
    assert button._touched() == {"blue"} and not button.success
    button.step(np.array([0, 0, 0.02], np.float32))
    saved = button.get_state()
    for _ in range(50):
        button.step(button.expert_action())
    assert "red" in button._touched() if verb == "touch" else button.places["red"][0] - begin[0] >= 0.05
    assert not button.success, "the right one came second"
    button.set_state(saved)
    assert button._wrong, "and a restored state remembers"
    button.reset(seed=1)
    assert not button._wrong


def test_pushing_one_into_another_fails(button):
    button.reset(seed=2, options={"task": "push-red"})
    button.data.qpos[5:7] = button.places["red"] + (0.05, 0.0)  # green right behind it
    button._begin = button.places
    for _ in range(40):
        button.step(button.expert_action())
    assert button.places["red"][0] - button._begin["red"][0] >= 0.05
    assert not button.success


def test_every_task_has_its_own_sentences():
    assert len(set(INSTRUCTIONS.values())) == len(TASKS) == 6
    every = [text for texts in PARAPHRASES.values() for text in texts] + list(INSTRUCTIONS.values())
    assert set(PARAPHRASES) == set(TASKS) and len(set(every)) == len(every)
    for task in TASKS:
        colour = task.split("-")[1]
        assert all(colour in text for text in (INSTRUCTIONS[task], *PARAPHRASES[task])) and colour not in swapped(task)
    with pytest.raises(ValueError, match=r"unknown task 'touch-gren'; did you mean touch-green"):
        swapped("touch-gren")


# --- actions, state, pictures


@pytest.mark.parametrize("action", [[0, 0, np.nan], [0, np.inf, 0], [0, 0], [[0, 0, 0]]])
def test_actions_that_are_no_actions_are_refused(button, action):
    with pytest.raises(ValueError, match=r"tip_delta\[3\]"):
        button.step(np.array(action, np.float32))
    assert button.steps == 0


def test_actions_are_metres_and_stop_at_the_walls(button):
    before = button.commanded_position
    button.step(np.array([-0.004, 0.007, 0.05], np.float32))  # z beyond its limit
    np.testing.assert_allclose(button.commanded_position - before, [-0.004, 0.007, 0.02], atol=1e-8)
    for _ in range(10):
        button.step(STILL)
    np.testing.assert_allclose(button.state, button.commanded_position, atol=0.01)
    for _ in range(30):
        button.step(np.array([-0.02, 0.02, 0.02], np.float32))
    np.testing.assert_allclose(button.commanded_position, [-0.25, 0.25, 0.22])
    assert button.observation_space["state"].contains(button.state)


def test_the_state_holds_no_cylinder(button):
    before = button.state
    button.data.qpos[3:] += 0.03
    assert button.state.shape == (3,) and np.array_equal(button.state, before)


def test_pictures_are_right_side_up_and_show_every_colour(button):
    """What lies further away is higher in the picture, what lies left is left."""

    def middle(channel: int) -> np.ndarray:
        picture = button.observe().images["front"].astype(int)
        rest = np.delete(picture, channel, -1).max(-1)
        rows, columns = np.nonzero(picture[..., channel] > rest + 40)
        assert len(rows) > 8
        return np.array([rows.mean(), columns.mean()])

    for seed in range(4):
        button.reset(seed=seed)
        places, seen = button.places, {c: middle(i) for i, c in enumerate(COLOURS)}
        for a in COLOURS:
            for b in COLOURS:
                if places[a][1] > places[b][1] + 0.05:
                    assert seen[a][1] < seen[b][1] - 3
                if places[a][0] > places[b][0] + 0.04:
                    assert seen[a][0] < seen[b][0]


def test_an_unstable_simulation_is_reported(button, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT
    assert button.warnings() == {}
    button.data.qvel[:] = 1e12
    button.step(STILL)
    assert button.warnings() and set(button.warnings()) <= {"mjWARN_BADQVEL", "mjWARN_BADQACC", "mjWARN_BADQPOS"}
    button.reset(seed=0)
    assert button.warnings() == {}


def test_what_does_not_exist_is_refused():
    from dita.envs.choice import ChoiceEnv

    spec = load_embodiment("choice_hand")
    with pytest.raises(ValueError, match=r"unknown camera of touch-red 'frnt'; did you mean front"):
        ChoiceEnv(replace(spec, cameras=(replace(spec.cameras[0], name="frnt"),)), "touch-red", 10)
    with pytest.raises(ValueError, match=r"unknown task 'touch-yellow'"):
        ChoiceEnv(spec, "touch-yellow", 10)


def test_the_guard_finds_every_limit_that_it_needs():
    from robot_io.core.limits import parse_robot

    robot = parse_robot(embodiment_to_dict(load_embodiment("choice_hand")))
    assert robot.bounds is not None and robot.space.tangent == 3 and robot.gripper is None


def test_collected_demonstrations_carry_their_sentences(tmp_path):
    config = CollectConfig(str(tmp_path / "a.zarr"), ENV, 2, 0, action_noise=0.15, workers=1, codec="raw")
    collect(config, exist="error")
    episodes = Store(config.out).episodes
    assert sorted(e.instruction for e in episodes) == sorted([INSTRUCTIONS[t] for t in TOUCH] * 2)
