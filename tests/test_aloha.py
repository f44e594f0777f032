"""gym-aloha's two arms under joint targets: the suites' common contract, and what is this one's own."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest

from dita.config import CollectConfig, EnvConfig
from dita.datasets.store import Store
from dita.embodiment import load_embodiment
from dita.envs import gl, make
from dita.envs.collect import JOINT_RANGE, collect, demonstrate

gl.select_backend()
pytest.importorskip("gym_aloha", reason="gym-aloha needs the extra sim")

from test_envs import (  # noqa: E402, F401  the contract: they run on the `button` of this module
    play,
    test_an_unknown_reset_option_is_refused,
    test_gymnasium_accepts_the_environment,
    test_observations_carry_the_simulated_time,
    test_stepping_renders_nothing_and_rendering_changes_nothing,
    test_with_images_carries_what_observe_shows,
)

from dita.envs.aloha import INSTRUCTIONS, PARAPHRASES, TASKS, AlohaEnv  # noqa: E402

TRANSFER, INSERT = "AlohaTransferCube", "AlohaInsertion"
CONFIG = EnvConfig("aloha", "sim_aloha", (TRANSFER,), max_steps=400, fast_render=True)
HOME = np.array([0, -0.96, 1.16, 0, -0.3, 0, 0.1] * 2, np.float32)


@pytest.fixture(scope="module")
def made():
    env = make(CONFIG, TRANSFER)
    yield env
    env.close()


@pytest.fixture
def button(made):
    made.close()  # nothing rendered yet
    made.reset(seed=0, options={"task": TRANSFER})
    return made


# --- starts and states


@pytest.mark.parametrize("task", TASKS)
def test_a_start_is_a_function_of_task_and_seed(button, task):
    fresh = make(CONFIG, task)
    button.reset(seed=9, options={"task": task})
    other = button.start_hash
    for _ in range(10):
        button.step(HOME + 0.2)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    button.reset(seed=5)
    assert np.array_equal(np.random.get_state()[1], before), "NumPy's global generator is left alone"  # noqa: NPY002
    fresh.reset(seed=5)
    assert button.start_hash == fresh.start_hash != other
    for _ in range(20):
        assert np.array_equal(button.step(HOME)[0]["state"], fresh.step(HOME)[0]["state"])
    assert np.array_equal(button.data.qpos, fresh.data.qpos)


def test_tasks_do_not_share_start_hashes(button):
    hashes = set()
    for task in TASKS:
        for seed in range(3):
            button.reset(seed=seed, options={"task": task})
            hashes.add(button.start_hash)
    assert len(hashes) == 6


def test_a_seed_starts_where_gym_aloha_starts(button):
    from gym_aloha.utils import sample_box_pose, sample_insertion_pose

    button.reset(seed=7)
    assert np.array_equal(button.data.qpos[16:], sample_box_pose(7))
    button.reset(seed=7, options={"task": INSERT})
    assert np.array_equal(button.data.qpos[16:], np.concatenate(sample_insertion_pose(7)))


def test_a_saved_state_continues_bit_equal(button):
    other = make(CONFIG, INSERT)
    other.reset(seed=1)
    for steps in (0, 50, 90):  # 50: with the cube in the right hand
        button.reset(seed=3)
        play(button, steps)
        saved = button.get_state()
        expected, picture = play(button, 30), button.observe().images["top"]
        button.set_state(saved)
        assert button.steps == steps and button.success == saved.success
        assert np.array_equal(play(button, 30), expected)
        assert np.array_equal(button.observe().images["top"], picture)
        other.set_state(saved)
        assert (other.task, other.steps) == (TRANSFER, steps)
        assert np.array_equal(play(other, 30), expected)
    assert expected[-1, -1], "a success was replayed"
    other.close()


def test_the_state_is_joints_and_grippers_but_no_object(button):
    before = button.state
    button.data.qpos[16:] += 0.05
    assert np.array_equal(button.state, before) and before.shape == (14,)
    np.testing.assert_allclose(before[[0, 1, 2, 3, 4, 5]], HOME[:6], atol=1e-6)
    np.testing.assert_allclose(before[[6, 13]], (0.02239 - 0.01844) / (0.058 - 0.01844), atol=1e-6)
    for i, side in enumerate(("left", "right")):
        button.data.joint(f"vx300s_{side}/waist").qpos[0] = 0.3 + i
        button.data.joint(f"vx300s_{side}/left_finger").qpos[0] = 0.058
    assert button.state[[0, 6, 7, 13]].tolist() == pytest.approx([0.3, 1.0, 1.3, 1.0])


def test_a_state_past_the_limits_reads_as_the_limit(button):
    button.data.qpos[:16] = 20.0
    assert np.array_equal(button.state, button.observation_space["state"].high)


# --- the physics and the rule of gym-aloha


@pytest.mark.filterwarnings("ignore")  # dm_control's own
@pytest.mark.parametrize("task", TASKS)
def test_physics_and_stages_are_gym_alohas(button, task):
    """One state in both, the same actions: the same joints bit by bit, and the same reward at every step."""
    import mujoco
    from dm_control import mujoco as dm
    from gym_aloha.constants import ASSETS_DIR
    from gym_aloha.tasks.sim import InsertionTask, TransferCubeTask

    from dita.envs.aloha import SCENES

    PHYSICS = mujoco.mjtState.mjSTATE_INTEGRATION

    theirs = dm.Physics.from_xml_path(str(ASSETS_DIR / SCENES[task]))
    rule = TransferCubeTask() if task == TRANSFER else InsertionTask()
    button.reset(seed=1, options={"task": task})
    mujoco.mj_setState(theirs.model.ptr, theirs.data.ptr, button.get_state().physics, PHYSICS)
    mujoco.mj_forward(theirs.model.ptr, theirs.data.ptr)
    mujoco.mj_setState(theirs.model.ptr, theirs.data.ptr, button.get_state().physics, PHYSICS)
    rng, stages = np.random.default_rng(0), set()
    for i in range(130):
        action = HOME + 0.3 * np.sin(i / 20 + rng.random(14).astype(np.float32)) if task == INSERT else None
        action = button.expert_action() if action is None else action
        limits = button.action_space
        rule.before_step(np.clip(action, limits.low, limits.high).astype(np.float64), theirs)
        theirs.step(10)
        _, reward, *_ = button.step(action)
        assert np.array_equal(theirs.data.qpos, button.data.qpos)
        assert rule.get_reward(theirs) == reward
        stages.add(reward)
    assert task == INSERT or stages >= {0.0, 2.0, 4.0}


def test_the_stages_of_the_insertion_are_gym_alohas(button, monkeypatch):
    """Its rule on contacts that no script here reaches, by name."""
    left, right = "vx300s_left/10_left_gripper_finger", "vx300s_right/10_right_gripper_finger"
    hold = {("red_peg", right), ("socket-2", left)}
    button.reset(seed=0, options={"task": INSERT})
    for pairs, stage in (
        (set(), 0),
        ({("red_peg", right)}, 0),
        (hold | {("red_peg", "table")}, 1),
        (hold | {("socket-4", "table")}, 1),
        (hold, 2),
        (hold | {("red_peg", "socket-3")}, 3),
        ({("red_peg", "socket-1"), ("red_peg", "table")}, 0),
        (hold | {("red_peg", "pin"), ("red_peg", "socket-1")}, 4),
    ):
        monkeypatch.setattr(button, "_contacts", lambda pairs=pairs: pairs)
        assert button.stage() == stage, pairs


def test_success_is_that_of_any_step(button):
    button.reset(seed=4)
    while not button.success:
        _, reward, terminated, _, _ = button.step(button.expert_action())
    assert terminated and reward == 4
    for _ in range(60):  # the left hand opens and lets it fall
        _, reward, terminated, _, _ = button.step(np.where(np.arange(14) % 7 == 6, 1.0, button.commanded))
    assert terminated and button.success and reward < 4


def test_running_the_suite_does_not_load_dm_control():
    import subprocess

    code = (
        "import sys; from dita.config import EnvConfig; from dita.envs import make;"
        f"make(EnvConfig('aloha', 'sim_aloha', ('{TRANSFER}',), 9, True), '{TRANSFER}').reset(seed=0);"
        "print([m for m in ('dm_control', 'metaworld', 'robosuite') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "[]\n", "it would render three pictures of 640x480 per step"


# --- actions


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_actions_that_are_no_actions_are_refused(button, bad):
    names = r"left_joints\[6\], left_gripper\[1\], right_joints\[6\], right_gripper\[1\]"
    before = button.get_state().physics
    for i in range(14):
        action = HOME.copy()
        action[i] = bad
        with pytest.raises(ValueError, match=names):
            button.step(action)
    with pytest.raises(ValueError, match=names):
        button.step(HOME[:7])
    assert button.steps == 0 and np.array_equal(button.get_state().physics, before)


def test_actions_are_absolute_joints_in_radians_and_one_is_open(button):
    target = HOME + np.array([0.2, 0.1, -0.1, 0.05, 0.1, -0.2, 0.8, -0.2, 0.15, 0.1, 0.05, 0.2, 0.3, -0.1], np.float32)
    for _ in range(150):
        button.step(target)
    np.testing.assert_allclose(button.commanded, target, atol=1e-6)
    joints = np.arange(14) % 7 != 6
    np.testing.assert_allclose(button.state[joints], target[joints], atol=0.03)
    assert button.state[6] == pytest.approx(0.9, abs=0.05) and button.state[13] < 0.1
    with pytest.raises(ValueError, match="two tools"):
        _ = button.commanded_position


def test_values_beyond_the_limits_are_clipped(button):
    button.step(np.full(14, 9.0, np.float32))
    np.testing.assert_allclose(button.commanded, button.action_space.high, atol=1e-6)
    low, high = np.array([button.model.actuator(i).ctrlrange for i in (1, 9)]).T
    assert button.action_space.low[[1, 8]] == pytest.approx(low) and button.action_space.high[[1, 8]] == pytest.approx(
        high
    )


# --- pictures, experts, reports


def test_pictures_are_right_side_up(button):
    """The cube is the red in the picture: it moves up with the hand, and right is the side of the right arm."""

    def red(camera: str) -> np.ndarray:
        r, g, b = (button.picture(camera, 96, 128)[..., i].astype(int) for i in range(3))
        return np.argwhere((r > 100) & (g < 60) & (b < 60)).mean(0)

    button.reset(seed=0)
    for camera in ("top", "angle"):
        column = []
        for x in (-0.1, 0.1):
            button.data.qpos[16:19] = x, 0.6, 0.02
            button.set_state(button.get_state())
            column.append(red(camera)[1])
        assert column[1] > column[0] + 10, camera
    button.data.qpos[16:19] = 0.0, 0.6, 0.02
    button.set_state(button.get_state())
    low = red("angle")[0]
    button.data.qpos[18] = 0.2
    button.set_state(button.get_state())
    assert red("angle")[0] < low - 10


def test_every_camera_of_the_suite_renders(button):
    names = [button.model.camera(i).name for i in range(button.model.ncam)]
    assert len(names) == 7
    for name in names:
        picture = button.picture(name, 48, 64)
        assert picture.shape == (48, 64, 3) and picture.std() > 5, name


def test_expert_hands_the_cube_over_from_every_start_within_its_limits(button):
    low, high = button.action_space.low, button.action_space.high
    needed, firm = [], 0
    for seed in range(20):
        button.reset(seed=seed)
        while not button.success and button.steps < 400:
            action = button.expert_action()
            assert (action >= low).all() and (action <= high).all()
            button.step(action)
        needed.append(button.steps if button.success else 1000)
        rows = play(button, 60)
        firm += rows[-1, -2] == 4
        assert button.warnings() == {}
    assert sum(n < 1000 for n in needed) >= 19, needed
    assert np.median(needed) < 150
    assert firm >= 17, "and the left hand keeps it"


def test_only_the_transfer_has_an_expert(button):
    button.reset(seed=0, options={"task": INSERT})
    with pytest.raises(ValueError, match=r"unknown scripted expert 'AlohaInsertion'; .*AlohaTransferCube"):
        button.expert_action()


def test_every_task_has_its_own_sentence_and_paraphrases():
    assert set(INSTRUCTIONS) == set(PARAPHRASES) == set(TASKS)
    every = [*INSTRUCTIONS.values(), *(p for several in PARAPHRASES.values() for p in several)]
    assert len(set(every)) == len(every) == 8


def test_collect_writes_demonstrations_that_carry_both_arms(tmp_path):
    config = CollectConfig(str(tmp_path / "a.zarr"), CONFIG, 2, 0, action_noise=0.15, workers=1, codec="raw")
    collect(config, exist="error")
    episodes = Store(config.out).episodes
    assert [e.instruction for e in episodes] == [INSTRUCTIONS[TRANSFER]] * 2
    assert {e.embodiment for e in episodes} == {"sim_aloha"}


def test_noise_on_absolute_targets_is_small_and_spares_the_grippers(button):
    button.reset(seed=4)
    executed = []
    step = button.step
    button.step = lambda action: executed.append(action) or step(action)
    try:
        episode = demonstrate(button, 4, 0.15)
    finally:
        del button.step
    assert episode is not None and episode.images["top"].shape[1:] == (96, 128, 3)
    noise = np.stack(executed) - episode.action
    grippers = np.arange(14) % 7 == 6
    assert np.all(noise[:, grippers] == 0)
    assert noise[:, ~grippers].std() == pytest.approx(0.15 * JOINT_RANGE, rel=0.4)


def test_an_unstable_simulation_is_reported(button, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT
    assert button.warnings() == {}
    button.data.qvel[:] = 1e12
    button.step(HOME)
    assert button.warnings() and set(button.warnings()) <= {"mjWARN_BADQVEL", "mjWARN_BADQACC", "mjWARN_BADQPOS"}
    button.reset(seed=0)
    assert button.warnings() == {}


def test_embodiments_that_do_not_fit_are_refused():
    spec = load_embodiment("sim_aloha")
    with pytest.raises(ValueError, match=r"'metaworld_sawyer' is not gym-aloha's robot: .*left_joints\[6\]"):
        AlohaEnv(load_embodiment("metaworld_sawyer"), TRANSFER, 10)
    with pytest.raises(ValueError, match=r"unknown camera of AlohaTransferCube 'corner'"):
        AlohaEnv(replace(spec, cameras=(replace(spec.cameras[0], name="corner"),)), TRANSFER, 10)
    with pytest.raises(ValueError, match=r"unknown task 'AlohaTransfer'; did you mean AlohaTransferCube"):
        AlohaEnv(spec, "AlohaTransfer", 10)


def test_the_real_robots_slots_are_the_simulators():
    """So that one policy can train on both."""
    real, sim = load_embodiment("aloha"), load_embodiment("sim_aloha")
    for group in ("state", "action"):
        layouts = [[(f.name, f.kind, f.size, f.slot) for f in getattr(spec, group)] for spec in (real, sim)]
        assert layouts[0] == layouts[1]
