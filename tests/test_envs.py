"""Simulated suites: starts, SI actions, pictures, save and restore, collection, rollouts."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given
from hypothesis import strategies as st

from dita.cli import compose
from dita.config import CollectConfig, EnvConfig, PerturbConfig
from dita.datasets.store import Store
from dita.embodiment import load_embodiment
from dita.envs import INSTALL, SUITES, check_tasks, gl, make
from dita.envs.base import RobotEnv, WithImages
from dita.envs.collect import HOLD_STEPS, collect, demonstrate
from dita.envs.ensemble import Ensemble
from dita.envs.perturb import Perturbation, check_instructions, sentence
from dita.envs.rollout import PLAIN, EpisodeResult, Player, Start, Timing, rollout
from dita.envs.video import write_mp4
from dita.envs.workers import Worker
from dita.types import ActionChunk

gl.select_backend()

BUTTON, DRAWER, REACH = "button-press-topdown-v3", "drawer-open-v3", "reach-v3"
ENV = EnvConfig("metaworld", "metaworld_sawyer", (BUTTON,), max_steps=300, fast_render=True)
SPEC = load_embodiment("metaworld_sawyer")
STILL = np.zeros(4, np.float32)


@pytest.fixture
def button():
    env = make(ENV, BUTTON)
    yield env
    env.close()


def play(env: RobotEnv, steps: int) -> np.ndarray:
    """Let the expert act; return state, reward and success of every step."""
    rows = []
    for _ in range(steps):
        observation, reward, terminated, _, _ = env.step(env.expert_action())
        rows.append([*observation["state"].tolist(), reward, terminated])
    return np.array(rows)


# --- OpenGL


def test_gl_tries_only_what_the_user_chose_and_once(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.delenv("DITA_OPENGL", raising=False)
    monkeypatch.setattr(gl, "works", lambda backend: backend == "egl")
    with pytest.raises(ValueError, match=r"tried osmesa\); unset MUJOCO_GL=osmesa, or run: apt-get"):
        gl.select_backend()
    monkeypatch.setattr(gl, "works", lambda backend: backend == "osmesa")
    assert gl.select_backend() == "osmesa"
    monkeypatch.setattr(gl, "works", lambda backend: pytest.fail("a worker must not probe again"))
    assert gl.select_backend() == "osmesa"
    monkeypatch.setenv("DITA_OPENGL", "")


def test_gl_takes_the_first_backend_that_renders(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.delitem(sys.modules, "mujoco", raising=False)
    monkeypatch.setenv("DITA_OPENGL", "")
    monkeypatch.setattr(gl, "works", lambda backend: backend == "osmesa")
    assert gl.select_backend() == "osmesa"


def test_gl_as_root_installs_what_is_missing(monkeypatch):
    commands = []
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.delitem(sys.modules, "mujoco", raising=False)
    monkeypatch.setenv("DITA_OPENGL", "")
    monkeypatch.setattr(gl, "works", lambda backend: bool(commands))
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("subprocess.run", lambda command, **options: commands.append(command))
    assert gl.ensure_backend() == "egl"
    assert commands[-1][:3] == ["apt-get", "install", "-y"] and "libegl1" in commands[-1]
    monkeypatch.setattr(gl, "works", lambda backend: False)
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.delenv("MUJOCO_GL")
    with pytest.raises(ValueError, match="apt-get install -y libegl1"):
        gl.ensure_backend()


def test_gl_says_what_to_install(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.delitem(sys.modules, "mujoco", raising=False)
    monkeypatch.setattr(gl, "works", lambda backend: False)
    with pytest.raises(ValueError, match="apt-get install -y libegl1"):
        gl.select_backend()


def test_gl_refuses_when_mujoco_came_first(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setitem(sys.modules, "mujoco", sys)
    with pytest.raises(ValueError, match="before dita chose"):
        gl.select_backend()


def test_gl_probe_tells_a_backend_that_cannot_work():
    assert not gl.works("nonsense")


def test_importing_envs_leaves_mujoco_and_torch_out():
    code = "import sys, dita.envs.rollout; print([m for m in ('mujoco', 'metaworld', 'torch') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- the suite


def test_names_that_do_not_exist_get_the_nearest():
    with pytest.raises(ValueError, match=r"unknown task 'drawer-opn-v3'; did you mean drawer-open-v3"):
        check_tasks(replace(ENV, tasks=(BUTTON, "drawer-opn-v3")))
    with pytest.raises(ValueError, match=r"unknown task 'drawer-opn-v3'"):
        make(ENV, "drawer-opn-v3")
    with pytest.raises(ValueError, match=r"unknown suite 'maniskill'; there are: .*metaworld"):
        make(replace(ENV, suite="maniskill"), BUTTON)
    with pytest.raises(ValueError, match="at least one task, none twice"):
        check_tasks(replace(ENV, tasks=(BUTTON, BUTTON)))


def test_a_camera_that_does_not_exist_is_refused():
    from dita.envs.metaworld import MetaWorldEnv

    spec = replace(SPEC, cameras=(replace(SPEC.cameras[0], name="corner9"),))
    with pytest.raises(ValueError, match=r"unknown camera of .* 'corner9'; did you mean corner"):
        MetaWorldEnv(spec, BUTTON, 10)


def test_every_task_has_its_own_sentence_and_an_expert():
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS
    from metaworld.policies import ENV_POLICY_MAP

    from dita.envs.metaworld import INSTRUCTIONS

    assert len(INSTRUCTIONS) == 50
    assert set(INSTRUCTIONS) == set(ALL_V3_ENVIRONMENTS) == set(ENV_POLICY_MAP)
    assert len(set(INSTRUCTIONS.values())) == 50


def test_the_lists_of_metaworlds_benchmarks_are_its_own():
    from metaworld.env_dict import MT10_V3, MT50_V3

    for name, tasks in (("metaworld_mt10", MT10_V3), ("metaworld_mt50", MT50_V3)):
        env = compose("collect", [f"env={name}", "out=x"], CollectConfig).env
        assert set(env.tasks) == set(tasks) and len(env.tasks) == len(tasks) and env.max_steps == 500
        check_tasks(env)


@pytest.mark.filterwarnings("ignore:.*is different from the unwrapped version")  # the wrapper is what is checked
@pytest.mark.filterwarnings("ignore:.*we recommend using a symmetric")  # ours are SI: joints' ranges are what they are
@pytest.mark.parametrize("wrap", [lambda env: env, WithImages])
def test_gymnasium_accepts_the_environment(wrap, button):
    env: gymnasium.Env = wrap(button)
    check_env(env, skip_render_check=True)
    observation, _ = env.reset(seed=1)
    assert env.observation_space.contains(observation)


def test_with_images_carries_what_observe_shows(button):
    env = WithImages(button)
    seen, _ = env.reset(seed=3)
    pictures = button.observe().images
    assert set(seen["images"]) == set(pictures) and pictures
    assert all(np.array_equal(seen["images"][name], picture) for name, picture in pictures.items())


# pick-place rejects starts with object and goal too near: the draw goes through the task itself
@pytest.mark.parametrize("task", [BUTTON, REACH, "pick-place-v3"])
def test_a_start_is_a_function_of_task_and_seed(task):
    fresh, used = make(ENV, task), make(ENV, DRAWER)
    used.reset(seed=8)
    play(used, 20)
    used.reset(seed=9, options={"task": task})
    other = used.start_hash
    play(used, 20)
    used.reset(seed=5)
    fresh.reset(seed=5)
    assert used.start_hash == fresh.start_hash != other
    assert np.array_equal(play(used, 10), play(fresh, 10))


def test_an_unknown_reset_option_is_refused(button):
    with pytest.raises(ValueError, match="unknown reset option goal"):
        button.reset(seed=0, options={"goal": 1})


@pytest.mark.parametrize("task", [BUTTON, DRAWER, "hammer-v3"])
def test_a_saved_state_continues_bit_equal(task):
    env, other = make(ENV, task), make(ENV, REACH)
    env.reset(seed=3)
    play(env, 25)
    saved = env.get_state()
    expected = play(env, 30)
    env.set_state(saved)
    assert np.array_equal(play(env, 30), expected)
    other.reset(seed=1)
    other.set_state(saved)
    assert (other.task, other.steps) == (task, 25)
    assert np.array_equal(play(other, 30), expected)


def test_actions_are_metres_and_one_is_open(button):
    button.reset(seed=0)
    before = button.commanded_position
    button.step(np.array([-0.004, 0.007, 0.02, 0.0], np.float32))  # z beyond its limit
    np.testing.assert_allclose(button.commanded_position - before, [-0.004, 0.007, 0.01], atol=1e-8)
    for gripper, closed in ((-1.0, True), (1.0, False)):
        for _ in range(40):
            observation, *_ = button.step(np.array([0, 0, 0, gripper], np.float32))
        assert (observation["state"][3] < 0.5) == closed


@pytest.mark.parametrize("action", [[0, 0, np.nan, 0], [0, np.inf, 0, 0], [0, 0, 0], [[0, 0, 0, 0]]])
def test_actions_that_are_no_actions_are_refused(button, action):
    button.reset(seed=0)
    with pytest.raises(ValueError, match=r"hand_delta\[3\], gripper_effort\[1\]"):
        button.step(np.array(action, np.float32))
    assert button.steps == 0


def test_the_state_holds_neither_object_nor_goal(button):
    button.reset(seed=0)
    assert button.observe().state.shape == (4,)
    np.testing.assert_allclose(button.state[:3], button._env.get_endeff_pos(), atol=1e-6)


def test_stepping_renders_nothing_and_rendering_changes_nothing(button):
    button.reset(seed=2)
    blind = play(button, 30)
    assert not button._renderers
    button.reset(seed=2)
    seen = []
    for _ in range(30):
        button.observe()
        seen.append(play(button, 1)[0])
    assert np.array_equal(blind, np.array(seen))


def test_pictures_are_right_side_up(button):
    """The hand's cyan finger moves up in the picture when the hand goes up."""

    def finger_row() -> float:
        r, g, b = (button.observe().images["corner4"][..., i].astype(int) for i in range(3))
        return float(np.nonzero((b > 120) & (g > 120) & (r < 80))[0].mean())

    button.reset(seed=0)
    low = finger_row()
    for _ in range(15):
        button.step(np.array([0, 0, 0.01, 1], np.float32))
    assert finger_row() < low - 5


def test_the_button_moves_in_the_picture_with_the_start(button):
    pictures = []
    for seed in (0, 1):
        button.reset(seed=seed)
        pictures.append(button.observe().images["corner4"].astype(int))
    assert (np.abs(pictures[0] - pictures[1]).max(-1) > 60).sum() > 20


def test_observations_carry_the_simulated_time(button):
    button.reset(seed=0)
    play(button, 4)
    assert button.observe().stamp == pytest.approx(4 / button.embodiment.control_hz)


@pytest.mark.parametrize("task", [BUTTON, DRAWER, REACH])
def test_experts_succeed_within_the_limits(task):
    env = make(ENV, task)
    low, high = env.action_space.low, env.action_space.high  # pyright: ignore
    for seed in range(3):
        env.reset(seed=seed)
        while not env.success and env.steps < 200:
            action = env.expert_action()
            assert (action >= low).all() and (action <= high).all()
            env.step(action)
        assert env.success


def test_an_unstable_simulation_is_reported(button, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT
    button.reset(seed=0)
    assert button.warnings() == {}
    button._env.data.qvel[:] = 1e12
    button.step(STILL)
    assert set(button.warnings()) <= {"mjWARN_BADQVEL", "mjWARN_BADQACC", "mjWARN_BADQPOS"}
    assert button.warnings()
    button.reset(seed=0)
    assert button.warnings() == {}


# --- collection


def collect_config(tmp_path: Path, **changes) -> CollectConfig:
    config = CollectConfig(str(tmp_path / "a.zarr"), ENV, 2, 0, action_noise=0.3, workers=2, codec="raw")
    return replace(config, **changes)


def contents(config: CollectConfig) -> dict[str, str]:
    return {e.source: e.content_hash for e in Store(config.out).episodes}


def test_noise_disturbs_what_is_executed_but_not_what_is_recorded(button):
    button.reset(seed=4)
    noisy = demonstrate(button, 4, 0.3)
    button.reset(seed=4)
    clean = demonstrate(button, 4, 0.0)
    assert noisy is not None and clean is not None
    assert np.array_equal(noisy.action[0], clean.action[0])
    assert not np.array_equal(noisy.state[1], clean.state[1])
    button.reset(seed=4)
    replayed = [button.state]
    for action in clean.action[:-1]:
        button.step(action)
        replayed.append(button.state)
    assert np.array_equal(np.stack(replayed), clean.state)
    assert (np.abs(noisy.action[:, :3]) <= 0.01 + 1e-9).all()


def test_a_demonstration_holds_after_success(button):
    button.reset(seed=4)
    while not button.success:
        play(button, 1)
    needed = button.steps
    button.reset(seed=4)
    episode = demonstrate(button, 4, 0.0)
    assert episode is not None
    assert len(episode.stamp) == needed + HOLD_STEPS - 1
    np.testing.assert_allclose(np.diff(episode.stamp), 0.0125)
    assert episode.images["corner4"].shape == (len(episode.stamp), 96, 96, 3)
    assert episode.source == "metaworld/button-press-topdown-v3/seed=4"
    assert episode.instruction == "press the button from above"


def test_an_expert_that_fails_leaves_no_demonstration():
    env = make(replace(ENV, max_steps=20), BUTTON)
    env.reset(seed=0)
    assert demonstrate(env, 0, 0.0) is None


def test_the_number_of_workers_and_a_resume_change_nothing(tmp_path):
    one = collect_config(tmp_path, out=str(tmp_path / "one.zarr"), workers=1)
    two = collect_config(tmp_path, out=str(tmp_path / "two.zarr"), workers=2)
    collect(replace(one, episodes=1), exist="error")
    assert len(contents(one)) == 1
    collect(one, exist="resume")
    collect(two, exist="resume")
    assert contents(one) == contents(two)
    assert sorted(contents(one)) == [f"metaworld/{BUTTON}/seed={i}" for i in (0, 1)]
    collect(two, exist="resume")  # nothing left to do
    assert len(contents(two)) == 2
    with pytest.raises(FileExistsError, match="--resume"):
        collect(two, exist="error")
    with pytest.raises(ValueError, match="action noise"):
        collect(replace(two, action_noise=0.1), exist="resume")


def test_a_collection_that_cannot_succeed_says_so(tmp_path):
    config = collect_config(tmp_path, env=replace(ENV, max_steps=3), episodes=1, workers=1)
    with pytest.raises(ValueError, match="made only 0 of 1 demonstrations in 10 starts"):
        collect(config, exist="error")


def test_an_unknown_task_leaves_nothing_behind(tmp_path):
    config = collect_config(tmp_path, env=replace(ENV, tasks=("button",)))
    with pytest.raises(ValueError, match="unknown task 'button'"):
        collect(config, exist="error")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="collect: workers must be at least 1, got 0"):
        replace(config, workers=0)
    with pytest.raises(ValueError, match="action_noise must not be negative"):
        replace(config, action_noise=-0.1)


# --- rollouts


def test_timing_of_the_shipped_embodiment():
    timing = Timing.of(SPEC, n_obs_steps=2, n_action_steps=8)
    assert timing == Timing(2, 4, 8)
    assert [s for s in range(1, 17) if timing.shows(s)] == [4, 8, 12, 16]
    assert (timing.history_steps(0), timing.history_steps(8)) == ([0], [4, 8])
    with pytest.raises(ValueError, match=r"obs_dt 0.03 s is 2.4 control steps"):
        Timing.of(replace(SPEC, obs_dt=0.03), 2, 8)
    with pytest.raises(ValueError, match=r"action_dt 0.025 s is 2"):
        Timing.of(replace(SPEC, action_dt=0.025), 2, 8)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 10))
def test_exactly_the_frames_that_are_seen_are_rendered(n_obs_steps, obs_stride, n_action_steps):
    timing = Timing(n_obs_steps, obs_stride, n_action_steps)
    calls = range(0, 200, n_action_steps)
    seen = {step for call in calls for step in timing.history_steps(call)}
    until = calls[-1] - n_obs_steps * obs_stride
    assert {s for s in seen if 0 < s <= until} == {s for s in range(1, until + 1) if timing.shows(s)}
    for call in calls:
        steps = timing.history_steps(call)
        assert steps[-1] == call and len(steps) <= n_obs_steps
        assert np.all(np.diff(steps) == obs_stride)


class Wanderer:
    """Acts on what it is given: the seed, the pictures and the length of the history."""

    def __init__(self, rows: int = 8) -> None:
        self.rows, self.sizes = rows, []

    def predict_batch(self, histories, seeds, *, embodiment=None, num_inference_steps=None, batch_size=None):
        self.sizes.append((len(histories), batch_size))
        return [self._chunk(h, s) for h, s in zip(histories, seeds, strict=True)]

    def _chunk(self, history, seed) -> ActionChunk:
        values = np.random.default_rng(seed).uniform(-0.01, 0.01, (self.rows, 4)).astype(np.float32)
        values[:, 0] += np.float32(np.mean([o.images["corner4"].mean() for o in history]) / 1e5)
        assert np.allclose(np.diff([o.stamp for o in history]), 0.05)
        return ActionChunk(values, history[-1].stamp, 0.0125, "metaworld_sawyer")


def starts(tmp_path: Path, n: int = 4, record: int = 0) -> list[Start]:
    return [
        Start(task, i, 100 + i, str(tmp_path / task) if i < record else None)
        for task in (BUTTON, DRAWER)
        for i in range(n // 2)
    ]


def run(policy, starts: list[Start], n_envs: int, batch_size: int = 4, max_steps: int = 18) -> list[EpisodeResult]:
    env, timing = replace(ENV, max_steps=max_steps), Timing(2, 4, 8)
    results = rollout(policy, env, SPEC.name, starts, timing, n_envs=n_envs, batch_size=batch_size)
    done = [replace(r, latency=()) for r in results]
    return sorted(done, key=lambda r: (r.task, r.index))


def test_results_do_not_depend_on_the_number_of_environments_or_on_videos(tmp_path):
    alone = run(Wanderer(), starts(tmp_path), n_envs=1)
    many = Wanderer()
    together = run(many, starts(tmp_path, record=1), n_envs=3, batch_size=2)
    assert alone == together
    assert [(r.steps, r.replans, r.reason) for r in alone] == [(18, 3, "max_steps")] * 4
    assert len({r.start_hash for r in alone}) == 4
    assert {size for _, size in many.sizes} == {2} and max(rows for rows, _ in many.sizes) == 2
    trace = json.loads((tmp_path / BUTTON / "episode_0_failure.json").read_text())
    assert [c["step"] for c in trace["chunks"]] == [0, 8, 16]
    assert (len(trace["executed"]), len(trace["states"])) == (18, 19)
    np.testing.assert_array_equal(trace["executed"][8], np.clip(trace["chunks"][1]["values"][0], *limits()))
    with av.open(str(tmp_path / BUTTON / "episode_0_failure.mp4")) as video:
        assert len(list(video.decode(video=0))) == 1 + 18 // 4


def limits() -> tuple[np.ndarray, np.ndarray]:
    low = np.concatenate([f.low for f in SPEC.action]).astype(np.float32)
    return low, -low


def test_an_action_that_is_not_finite_fails_its_episode_only(tmp_path):
    class Broken(Wanderer):
        def _chunk(self, history, seed):
            chunk = super()._chunk(history, seed)
            if "drawer" in history[-1].instruction:
                chunk.values[3, 1] = np.nan
            return chunk

    reasons = [(r.task, r.success, r.reason) for r in run(Broken(), starts(tmp_path, 2), n_envs=2)]
    assert reasons == [(BUTTON, False, "max_steps"), (DRAWER, False, "an action is not finite")]


def test_a_warning_of_the_simulator_fails_the_episode(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT
    player = Player(ENV, Timing(1, 4, 8), PLAIN)
    assert player.start(Start(BUTTON, 0, 0, None)).ended is None
    player._env._env.data.qvel[:] = 1e12  # pyright: ignore
    ended = player.run(np.zeros((8, 4), np.float32)).ended
    assert ended is not None and ended["reason"].startswith("MuJoCo warned: mjWARN_BAD")
    assert (ended["success"], ended["steps"]) == (False, 1) and ended["warnings"]
    player.close()


def test_a_dead_worker_is_an_error_that_names_its_episode(tmp_path):
    class Killer(Wanderer):
        def predict_batch(self, *args, **kwargs):
            for child in multiprocessing.active_children():
                child.kill()
                child.join()
            return super().predict_batch(*args, **kwargs)

    with pytest.raises(RuntimeError, match=r"button-press-topdown-v3 episode 0 \(seed 100\) died \(exit code -9\)"):
        run(Killer(), starts(tmp_path), n_envs=1)
    assert not multiprocessing.active_children()


def test_a_chunk_shorter_than_what_is_executed_is_refused(tmp_path):
    with pytest.raises(ValueError, match="n_action_steps 8 exceeds the policy's chunk of 4"):
        run(Wanderer(rows=4), starts(tmp_path), n_envs=1)


class Echo:
    """A worker's object for the test below."""

    def say(self, what):
        if what == "boom":
            raise ValueError("boom happened")
        return what

    def niceness(self):
        return os.getpriority(os.PRIO_PROCESS, 0)

    def close(self):
        pass


def test_a_worker_answers_raises_and_drops_what_nobody_took():
    worker = Worker(Echo)
    worker.call("first", "say", 1)
    worker.call("second", "say", 2)
    assert worker.result() == 2
    worker.call("third", "say", "boom")
    with pytest.raises(ValueError, match="boom happened"):
        worker.result()
    worker.call("fourth", "say", 4)
    assert worker.result() == 4
    worker.close()


def test_a_worker_stands_back_as_far_as_it_is_told():
    own = os.getpriority(os.PRIO_PROCESS, 0)
    for nice in (0, 3):
        worker = Worker(Echo, nice=nice)
        worker.call("niceness", "niceness")
        assert worker.result() == min(19, own + nice)
        worker.close()


def test_an_mp4_that_browsers_play(tmp_path):
    frames = [np.full((64, 64, 3), (i * 20, 128, 0), np.uint8) for i in range(10)]
    write_mp4(tmp_path / "deep" / "a.mp4", frames, 20)
    with av.open(str(tmp_path / "deep" / "a.mp4")) as video:
        stream = video.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 20)
        decoded = [f.to_ndarray(format="rgb24") for f in video.decode(video=0)]
    assert len(decoded) == 10
    assert abs(float(decoded[9][..., 0].mean()) - 180) < 12


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_is_registered_with_tasks_and_make(name):
    package = {"aloha": "gym_aloha", "fetch": "gymnasium_robotics", "libero": "libero", "robosuite": "robosuite"}
    if name in package:
        pytest.importorskip(package[name], reason=INSTALL[name])
    suite = importlib.import_module(SUITES[name])
    assert suite.TASKS and callable(suite.make)


# --- what holds for every suite

ABOUT = {
    "aloha": ("gym_aloha", "sim_aloha", ("AlohaTransferCube", "AlohaInsertion")),
    "choice": ("mujoco", "choice_hand", ("touch-red", "push-blue")),
    "fetch": ("gymnasium_robotics", "fetch_mocap", ("push", "reach")),
    "metaworld": ("metaworld", "metaworld_sawyer", (DRAWER, REACH)),
    "robosuite": ("robosuite", "robosuite_panda_osc", ("Lift", "Door")),
}
FLAGS = {"camera_shift": 0.05, "camera_turn": 0.05, "light": 0.5, "texture": 0.7}


@pytest.fixture(scope="module", params=ABOUT)  # not libero: test_libero.py
def two_of_a_suite(request):
    package, embodiment, tasks = ABOUT[request.param]
    pytest.importorskip(package, reason="pip install 'dita[sim]'")
    config = EnvConfig(request.param, embodiment, tasks, max_steps=100, fast_render=True)
    envs = [make(config, task) for task in tasks]
    yield config, *envs
    for env in envs:
        env.close()


@pytest.fixture
def sim(two_of_a_suite):
    """Two environments of a suite in its first task, unchanged."""
    config, *envs = two_of_a_suite
    for env in envs:
        env.reset(seed=0, options={"task": config.tasks[0]})
        env.instruction = importlib.import_module(SUITES[config.suite]).INSTRUCTIONS[env.task]
    before = [(env.model, visible(env)) for env in envs]
    yield config, *envs
    for model, arrays in before:
        for array, values in zip(visible_arrays(model), arrays, strict=True):
            array[:] = values


def visible_arrays(model) -> list[np.ndarray]:
    head = model.vis.headlight
    return [model.cam_pos, model.cam_quat, model.light_diffuse, model.light_ambient, model.geom_rgba, head.diffuse,
            head.ambient]  # fmt: skip


def visible(env: RobotEnv) -> list[np.ndarray]:
    return [np.copy(array) for array in visible_arrays(env.model)]


def perturbed(**flags) -> PerturbConfig:
    return replace(PerturbConfig(5, "given", 0.0, 0.0, 0.0, 0.0, 0.0), **flags)


def seen(env: RobotEnv) -> dict[str, np.ndarray]:
    return {name: picture.copy() for name, picture in env.observe().images.items()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[bool]:
    return [np.array_equal(a[name], b[name]) for name in a]


def wander(env: RobotEnv, steps: int) -> np.ndarray:
    """Act near the middle of the limits; return the state of every step."""
    rng, space = np.random.default_rng(0), env.action_space
    middle, half = (space.high + space.low) / 2, (space.high - space.low) / 2  # pyright: ignore
    actions = (middle + 0.1 * half * rng.uniform(-1, 1, (steps, len(half)))).astype(np.float32)
    return np.stack([env.step(action)[0]["state"] for action in actions])


def test_a_saved_state_of_any_suite_continues_bit_equal(sim):
    _, env, other = sim
    env.reset(seed=3)
    wander(env, 9)
    saved, picture = env.get_state(), seen(env)
    expected, later = wander(env, 9), seen(env)
    for one in (env, other):
        one.reset(seed=1, options={"task": other.tasks[0]})
        one.set_state(saved)
        assert (one.task, one.seed, one.steps, one.success) == (saved.task, 3, 9, saved.success)
        assert np.array_equal(one.get_state().physics, saved.physics) and all(same(seen(one), picture))
        assert np.array_equal(wander(one, 9), expected) and all(same(seen(one), later))


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_on_the_picture_changes_the_picture_and_nothing_else(sim, flag):
    config, env, other = sim
    perturb = perturbed(**{flag: FLAGS[flag]})
    env.reset(seed=3)
    picture, physics, start, said = seen(env), env.get_state().physics, env.start_hash, env.instruction
    expected = wander(env, 6)
    perturbation = Perturbation(config, perturb)
    env.reset(seed=3)
    if config.suite == "aloha" and flag == "camera_turn":
        with pytest.raises(ValueError, match=r"camera top of aloha always looks at a body.*set perturb.camera_turn=0"):
            perturbation.begin(env, 3)
        return
    perturbation.begin(env, 3)
    assert not any(same(seen(env), picture)) and env.instruction == said
    assert np.array_equal(env.get_state().physics, physics) and env.start_hash == start
    changed = seen(env)
    assert np.array_equal(wander(env, 6), expected)
    env.reset(seed=4)
    perturbation.begin(env, 4)
    assert not any(same(seen(env), changed))
    env.reset(seed=3)
    perturbation.begin(env, 3)  # what was changed for the last episode was put back first
    assert all(same(seen(env), changed))
    other.reset(seed=3)
    Perturbation(config, perturb).begin(other, 3)  # another instance meets the same change
    assert all(same(seen(other), changed))


def test_nothing_is_changed_where_no_flag_is_set(sim):
    config, env, _ = sim
    env.reset(seed=3)
    before = (env.get_state().physics.tobytes(), env.start_hash, env.instruction, seen(env))
    env.reset(seed=3)
    Perturbation(config, perturbed(seed=9)).begin(env, 3)
    after = (env.get_state().physics.tobytes(), env.start_hash, env.instruction, seen(env))
    assert before[:3] == after[:3] and all(same(before[3], after[3]))


def test_another_start_pose_moves_the_robot_and_no_camera(sim):
    config, env, other = sim
    env.reset(seed=3)
    home, start = env.state.copy(), env.start_hash
    looks = visible(env)
    Perturbation(config, perturbed(start=0.04)).begin(env, 3)
    assert (env.steps, env.success) == (0, False) and env.start_hash != start and env.instruction
    moved = np.concatenate([
        env.state[i : i + f.size] - home[i : i + f.size]
        for i, f in zip(np.cumsum([0] + [f.size for f in env.embodiment.state]), env.embodiment.state, strict=False)
        if f.kind in ("ee_position", "joint_position")
    ])  # fmt: skip
    assert 0.004 < np.abs(moved).max() < 0.06
    assert all(np.array_equal(a, b) for a, b in zip(visible(env), looks, strict=True))
    other.reset(seed=3)
    Perturbation(config, perturbed(start=0.04)).begin(other, 3)
    assert other.start_hash == env.start_hash and np.array_equal(wander(other, 5), wander(env, 5))


def test_another_sentence_changes_the_sentence_only(sim):
    config, env, _ = sim
    env.reset(seed=3)
    suite, task = importlib.import_module(SUITES[config.suite]), config.tasks[0]
    picture, physics = seen(env), env.get_state().physics
    swap = suite.swapped(task) if config.suite == "choice" else suite.INSTRUCTIONS[config.tasks[1]]
    for kind, expected in {"blank": [" "], "swapped": [swap], "paraphrased": suite.PARAPHRASES[task]}.items():
        Perturbation(config, perturbed(instruction=kind)).begin(env, 3)
        assert env.observe().instruction in expected and env.instruction != suite.INSTRUCTIONS[task]
        assert np.array_equal(env.get_state().physics, physics) and all(same(seen(env), picture))
    several = {sentence(config, task, perturbed(instruction="paraphrased"), start) for start in range(30)}
    assert several == set(suite.PARAPHRASES[task])
    every = [*suite.INSTRUCTIONS.values(), *(text for texts in suite.PARAPHRASES.values() for text in texts)]
    assert set(suite.PARAPHRASES) == set(suite.TASKS) and len(every) == len(set(every))


def test_a_sentence_that_a_suite_does_not_have_is_refused_with_what_there_is(monkeypatch):
    one = replace(ENV, tasks=(BUTTON,))
    with pytest.raises(ValueError, match=r"no swapped sentences and env.tasks only button.*'press the button"):
        check_instructions(one, perturbed(instruction="swapped"))
    monkeypatch.delattr("dita.envs.metaworld.PARAPHRASES")
    with pytest.raises(ValueError, match=r"metaworld has no paraphrases; for button.* there is: 'press the button"):
        check_instructions(one, perturbed(instruction="paraphrased"))


def test_flags_do_not_disturb_each_others_draws(button):
    both, values, before = perturbed(camera_shift=0.05, light=0.5), [], visible(button)
    for perturb in (both, replace(both, light=0.0), replace(both, camera_shift=0.0)):
        for array, value in zip(visible_arrays(button.model), before, strict=True):
            array[:] = value
        Perturbation(ENV, perturb).begin(button, 1)
        values.append((button.model.cam_pos.copy(), button.model.light_diffuse.copy()))
    assert np.array_equal(values[0][0], values[1][0]) and np.array_equal(values[0][1], values[2][1])
    assert not np.array_equal(values[0][0], values[2][0])


# --- overlapping chunks


def test_overlapping_absolute_chunks_are_averaged_as_in_act():
    spec, decay, n = load_embodiment("sim_aloha"), 0.3, 6
    rng, ensemble, chunks = np.random.default_rng(0), Ensemble(spec, decay), []
    grippers = [6, 13]
    for step in range(0, 14, 2):
        chunks.append((step, rng.uniform(-0.5, 0.5, (n, 14)).astype(np.float32)))
        out = ensemble.chunk(step, chunks[-1][1])
        for i in range(n):
            said = [c[step + i - s] for s, c in chunks if step + i - s < n]  # oldest first
            weights = np.array([np.exp(-decay * k) for k in range(len(said))])
            expected = (weights[:, None] * said).sum(0) / weights.sum()
            expected[grippers] = said[-1][grippers]
            np.testing.assert_allclose(out[i], expected, atol=1e-6)


@pytest.mark.parametrize("name", ["metaworld_sawyer", "robosuite_panda_osc"])
def test_overlapping_deltas_are_averaged_as_on_the_robot(name):
    """The live stack's stitching, without delay, gives the same actions: places and rotations, not steps."""
    from dita.embodiment import embodiment_to_dict
    from robot_io.core.chunk_buffer import Chunk
    from robot_io.core.limits import parse_robot
    from robot_io.core.stitching import DECAY, ENSEMBLING, Stitcher

    spec = load_embodiment(name)
    robot = parse_robot(embodiment_to_dict(spec))
    space, dt, k, n = robot.space, robot.action_dt, 2, 16
    stitcher, ensemble = Stitcher(robot, ENSEMBLING, chunk_size=n), Ensemble(spec, DECAY)
    at = np.array([0.1, 0.2, 0.3, *([0.8, 0.0, 0.6, 0.0] if space.rotation else [])])
    stitcher.on_executed(-dt, at, np.zeros(space.tangent), 0.0)
    rng, high = np.random.default_rng(1), np.concatenate([f.high for f in spec.action])
    for step in range(0, 20, k):
        values = (0.5 * high * rng.uniform(-1, 1, (n, len(high)))).astype(np.float32)
        ours = ensemble.chunk(step, values)
        theirs, stamp = stitcher.stitch(values, step * dt, step * dt)
        np.testing.assert_allclose(ours, theirs, atol=2e-7)
        motion, grip = robot.motion_of(theirs), theirs[:, -1]
        stitcher.published(Chunk(stamp, dt, motion, grip), stamp)
        for i in range(k):
            target = space.delta(at, motion[i])
            stitcher.on_executed((step + i) * dt, target, motion[i], float(grip[i]))
            ensemble.executed(ours[i])
            at = target


def test_deltas_that_have_no_place_to_average_are_refused_and_measured_ones_averaged_as_they_are():
    field = SPEC.action[0]
    with pytest.raises(ValueError, match=r"hand_delta is a delta in frame base from chunk_start; it averages absolute"):
        Ensemble(replace(SPEC, action=(replace(field, reference="chunk_start"),)), 0.01)
    ensemble = Ensemble(replace(SPEC, action=(replace(field, reference="measured"),)), 0.0)
    ensemble.chunk(0, np.full((4, 3), 0.002, np.float32))
    ensemble.executed(np.full(3, 0.002, np.float32))
    np.testing.assert_allclose(ensemble.chunk(1, np.full((4, 3), 0.004, np.float32))[:, 0], [0.003] * 3 + [0.004])


def test_absolute_rotations_are_averaged_on_so3():
    turn = replace(load_embodiment("robosuite_panda_osc").action[1], mode="absolute", reference=None)
    ensemble = Ensemble(replace(SPEC, action=(turn,)), 0.0)
    ensemble.chunk(0, np.array([[0, 0, 3.0], [0, 0, 3.0]], np.float32))
    average = ensemble.chunk(1, np.array([[0, 0, -3.0], [0, 0, -3.0]], np.float32))  # 0.28 rad apart, across pi
    np.testing.assert_allclose(np.abs(average[0]), [0, 0, np.pi], atol=1e-6)
    np.testing.assert_allclose(average[1], [0, 0, -3.0], atol=1e-6)
