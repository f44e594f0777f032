"""The guard between policy and simulator: the same goals, smoothed; its faults end an episode."""

import numpy as np
import pytest

from dita.config import EnvConfig
from dita.envs import make
from dita.envs.guarded import Guarded, shipped_guard
from dita.envs.rollout import Player, Rules, Start, Timing

CONFIG = EnvConfig("metaworld", "metaworld_sawyer", ("button-press-topdown-v3",), 500, True)


@pytest.fixture(scope="module")
def env():
    made = make(CONFIG, CONFIG.tasks[0])
    yield made
    made.close()


def begin(env):
    env.reset(seed=3, options={"task": CONFIG.tasks[0]})
    return Guarded(env, shipped_guard())


def chunk(n, x=0.0, grip=-1.0):
    values = np.zeros((n, 4), np.float32)
    values[:, 0], values[:, 3] = x, grip
    return values


def test_guard_brings_the_hand_where_the_deltas_say_and_the_gripper_as_it_is_told(env):
    guarded = begin(env)
    start = env.state[:3].copy()  # the guard begins where the hand is measured, as live
    guarded.chunk(chunk(20, 0.002))
    actions = []
    for _ in range(24):
        actions.append(guarded.action())
        env.step(actions[-1])
    np.testing.assert_allclose(env.commanded_position - start, [0.04, 0, 0], atol=2e-3)
    assert all(action[3] == -1.0 for action in actions)
    assert guarded.guard.counts["R3"] == 0 and guarded.guard.counts["steps"] == 20
    accelerations = np.diff([a[0] for a in actions], n=2)
    assert np.all(np.abs(np.array(actions)[:, 0]) <= 0.01) and np.max(np.abs(accelerations)) < 0.01


def test_action_that_is_not_finite_is_held_and_then_a_fault(env):
    guarded = begin(env)
    for k in range(3):
        guarded.chunk(chunk(8, np.nan))
        for _ in range(2):
            env.step(guarded.action())
        assert bool(guarded.fault()) == (k == 2)
    assert "not finite" in guarded.fault()


def test_episode_ends_with_the_guards_fault_by_name(env):
    player = Player(CONFIG, Timing.of(env.embodiment, 1, 8), Rules(guard=True))
    player.start(Start(CONFIG.tasks[0], 0, 3, None))
    ended, calls = None, 0
    while ended is None:  # one good chunk, then nothing that the guard would take
        ended = player.run(chunk(8, 0.001 if not calls else 50.0)).ended
        calls += 1
        assert calls < 60
    player.close()
    assert not ended["success"] and ended["reason"].startswith("guard: ")


def test_guard_refuses_a_robot_that_it_cannot_play(env, monkeypatch):
    config = shipped_guard()
    monkeypatch.setattr(type(env), "stamp", property(lambda self: 0.0))
    env.reset(seed=3, options={"task": CONFIG.tasks[0]})
    with pytest.raises(ValueError, match="does not fill a step"):
        Guarded(env, type(config)(**{**vars(config), "tick": 0.009}))
