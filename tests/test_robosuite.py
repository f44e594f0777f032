"""robosuite's tasks under tool and joint commands: the suites' common contract, and what is this one's own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dita.config import EnvConfig
from dita.datasets.store import Store
from dita.embodiment import embodiment_from_dict, embodiment_to_dict, load_embodiment
from dita.envs import gl, make
from dita.envs.collect import demonstrate

gl.select_backend()
pytest.importorskip("robosuite", reason="robosuite needs the extra sim: apt-get install gcc python3-dev linux-libc-dev")

from test_envs import (  # noqa: E402, F401  the contract: they run on the `button` of this module
    play,
    test_an_unknown_reset_option_is_refused,
    test_gymnasium_accepts_the_environment,
    test_observations_carry_the_simulated_time,
    test_stepping_renders_nothing_and_rendering_changes_nothing,
    test_with_images_carries_what_observe_shows,
)

from dita.envs.robosuite import INSTRUCTIONS, TASKS  # noqa: E402

OSC, JOINT = "robosuite_panda_osc", "robosuite_panda_joint"


def env_config(embodiment: str) -> EnvConfig:
    return EnvConfig("robosuite", embodiment, ("Lift",), max_steps=200, fast_render=True)


@pytest.fixture(scope="module")
def both():
    made = {name: make(env_config(name), "Lift") for name in (OSC, JOINT)}
    yield made
    for env in made.values():
        env.close()


@pytest.fixture(params=[OSC, JOINT])
def button(request, both):
    env = both[request.param]
    env.close()  # nothing rendered yet
    return env


@pytest.fixture
def osc(both):
    return both[OSC]


@pytest.fixture
def joint(both):
    return both[JOINT]


def still(env):
    return np.zeros(env.embodiment.action_dim, np.float32)


# --- starts and states


def test_a_start_is_a_function_of_task_and_seed(button):
    fresh = make(env_config(button.embodiment.name), "Lift")
    button.reset(seed=9)
    other = button.start_hash
    play(button, 20)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    button.reset(seed=5)
    assert np.array_equal(np.random.get_state()[1], before), "NumPy's global generator is left alone"  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    fresh.reset(seed=5)
    assert button.start_hash == fresh.start_hash != other
    assert np.array_equal(play(button, 30), play(fresh, 30)), "also past the grasp"


def test_a_saved_state_continues_bit_equal(button):
    other = make(env_config(button.embodiment.name), "Stack")
    other.reset(seed=1)
    for steps in (0, 12, 28):  # 28: with the cube in the hand
        button.reset(seed=3)
        play(button, steps)
        saved = button.get_state()
        expected, picture = play(button, 12), button.observe().images["agentview"]
        button.set_state(saved)
        assert button.steps == steps and button.success == saved.success
        assert np.array_equal(play(button, 12), expected)
        assert np.array_equal(button.observe().images["agentview"], picture)
        other.set_state(saved)
        assert (other.task, other.steps) == ("Lift", steps)
        assert np.array_equal(play(other, 12), expected)
    assert expected[-1, -1], "a success was replayed"
    other.close()


def test_the_state_is_tool_or_joints_and_gripper_but_never_the_cube(button):
    button.reset(seed=0)
    before = button.state
    address = button.model.joint("cube_joint0").qposadr[0]
    button.data.qpos[address] += 0.02
    button._env.sim.step1()
    assert np.array_equal(button.state, before)
    kinds = [f.kind for f in button.embodiment.state]
    assert button.embodiment.state_dim == (10 if "ee_position" in kinds else 8)


def test_state_fields_are_what_they_say(osc, joint):
    osc.reset(seed=4)
    joint.reset(seed=4)
    site = osc.data.site("gripper0_right_grip_site")
    base = np.array([-0.56, 0.0, 0.912])
    np.testing.assert_allclose(osc.state[:3], site.xpos - base, atol=1e-6)
    np.testing.assert_allclose(osc.state[3:9], site.xmat.reshape(3, 3)[:, :2].T.ravel(), atol=1e-6)
    names = [f"robot0_joint{i + 1}" for i in range(7)]
    np.testing.assert_allclose(joint.state[1:], [joint.data.joint(n).qpos[0] for n in names], atol=1e-6)
    assert osc.state[9] == joint.state[0] == pytest.approx(0.020833 / 0.04, abs=1e-4)


def test_the_urdf_of_the_guard_is_this_arm(joint):
    """Its tool is Franka's centre point, 6.9 mm further out than robosuite's grip site."""
    from robot_io.core.kinematics import Kinematics

    limits = joint.embodiment.limits
    path = load_path(limits.urdf)
    kinematics = Kinematics.from_urdf(path, limits.tool)
    for seed in range(3):
        joint.reset(seed=seed)
        play(joint, 15)
        for _ in range(20):
            joint.drive(joint.commanded, 0.0, 0.05)  # at rest: robosuite's hand is joined softly
        position, _ = kinematics.tool(joint.joints)
        measured, turn = joint._tool()
        out = turn.apply([0.0, 0.0, 0.0069])
        np.testing.assert_allclose(position, measured + out, atol=3e-4)


def load_path(name: str):
    from dita.embodiment import config_folder

    return config_folder() / "embodiment" / name


def test_velocities_are_derivatives_of_the_state(button):
    button.reset(seed=0)
    play(button, 8)
    fields = {f.name: slice(a, a + f.size) for f, a in zip(button.embodiment.state, starts(button), strict=True)}
    before, speeds = button.state, button.velocities()
    button.drive(button.commanded, 1.0, 0.002)
    for name, speed in speeds.items():
        moved = (button.state - before)[fields[name]] / 0.002
        np.testing.assert_allclose(moved, speed, atol=0.15)
    assert "gripper" in speeds and ("joints" in speeds) == ("joints" in fields)


def starts(env):
    return np.cumsum([0, *(f.size for f in env.embodiment.state)])[:-1]


# --- actions


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_actions_that_are_no_actions_are_refused(button, bad):
    button.reset(seed=0)
    names = r"gripper_effort\[1\]"
    for i in range(button.embodiment.action_dim):
        action = still(button)
        action[i] = bad
        with pytest.raises(ValueError, match=names):
            button.step(action)
    with pytest.raises(ValueError, match=names):
        button.step(still(button)[:-1])
    goal = button.commanded
    goal[1] = bad
    with pytest.raises(ValueError, match="must be finite"):
        button.drive(goal, 0.0, 0.01)
    with pytest.raises(ValueError, match="must be finite"):
        button.drive(button.commanded, bad, 0.01)
    assert button.steps == 0 and button.warnings() == {}


def test_tool_deltas_are_metres_and_radians_in_the_base_frame(osc):
    from scipy.spatial.transform import Rotation

    osc.reset(seed=0)
    begin = osc.configuration
    for _ in range(4):
        osc.step(np.array([0.01, -0.02, 0.08, 0.02, 0.0, 0.03, 0.0], np.float32))  # z beyond its limit
    np.testing.assert_allclose(osc.commanded[:3] - begin[:3], [0.04, -0.08, 0.2], atol=1e-6)
    for _ in range(40):
        osc.step(still(osc))
    np.testing.assert_allclose(osc.configuration[:3], osc.commanded[:3], atol=3e-3)
    was, now = (Rotation.from_quat(q, scalar_first=True) for q in (begin[3:], osc.configuration[3:]))
    step = Rotation.from_rotvec([0.02, 0.0, 0.03])
    np.testing.assert_allclose((now * was.inv()).as_rotvec(), (step**4).as_rotvec(), atol=1e-2)


def test_joint_deltas_are_radians_and_stop_at_the_joints_ends(joint):
    joint.reset(seed=0)
    begin = joint.joints
    delta = np.array([0.05, -0.02, 0.03, 0.04, -0.05, 0.02, 0.01])
    for _ in range(4):
        joint.step(np.append(delta, 0.0).astype(np.float32))
    np.testing.assert_allclose(joint.commanded - begin, 4 * delta, atol=1e-6)
    for _ in range(20):
        joint.step(still(joint))
    np.testing.assert_allclose(joint.joints, joint.commanded, atol=2e-3)
    low, high = joint.joint_range
    for _ in range(40):
        joint.step(np.array([0, 0, 0, 0, 0, 0, 0.1, 0], np.float32))
    assert joint.commanded[6] == high[6] and np.all(joint.commanded >= low)
    for field in joint.embodiment.state[1:]:
        np.testing.assert_allclose((field.low, field.high), (low, high), atol=1e-6)


def test_a_measured_delta_adds_to_where_the_arm_is():
    values = embodiment_to_dict(load_embodiment(OSC))
    for field in values["action"][:2]:
        field["reference"] = "measured"
    from dita.envs.robosuite import RobosuiteEnv

    env = RobosuiteEnv(embodiment_from_dict(values), "Lift", 10)
    env.reset(seed=0)
    env.step(np.array([0.05, 0, 0, 0, 0, 0, 0], np.float32))
    lagging = env.configuration
    assert lagging[0] < env.commanded[0] - 0.01
    env.step(still(env))
    np.testing.assert_allclose(env.commanded[:3], lagging[:3], atol=1e-9)


def test_one_is_open(button):
    button.reset(seed=0)
    index = [f.name for f in button.embodiment.state].index("gripper")
    at = starts(button)[index]
    for effort, opening in ((1.0, 1.0), (-1.0, 0.0), (1.0, 1.0)):
        action = still(button)
        action[-1] = effort
        for _ in range(30):
            button.step(action)
        assert button.state[at] == pytest.approx(opening, abs=0.03)


@pytest.mark.parametrize("ticks", [2, 5, 25])
def test_a_driver_at_another_rate_moves_the_gripper_as_fast(osc, ticks):
    osc.reset(seed=0)
    for _ in range(50 // ticks):  # 0.1 s
        osc.drive(osc.commanded, -1.0, ticks * 0.002)
    assert osc._gripper.current_action[0] == pytest.approx(-0.4)


def test_following_a_goal_in_ticks_is_following_it_in_steps(osc):
    osc.reset(seed=2)
    start = osc.get_state()
    osc.step(np.array([0.02, 0.01, -0.02, 0.0, 0.0, 0.1, 0.0], np.float32))
    stepped, goal = osc.configuration, osc.commanded
    osc.set_state(start)
    for _ in range(5):
        osc.drive(goal, 0.0, 0.01)
    np.testing.assert_allclose(osc.configuration, stepped, atol=1e-9)


# --- pictures, experts, reports


def test_pictures_are_right_side_up_and_show_no_markers(osc):
    """The hand moves up in the picture when it goes up; nothing green or translucent marks the tool."""

    def red_row() -> float:
        picture = osc.picture("agentview", 96, 96).astype(int)
        r, g, b = (picture[..., i] for i in range(3))
        assert not ((g > 150) & (r < 90) & (b < 90)).any()
        rows = np.nonzero((r > 90) & (g < 60) & (b < 70))[0]
        return float(rows.mean())

    osc.reset(seed=0)
    play(osc, 31)
    low = red_row()
    play(osc, 8)
    assert red_row() < low - 2, "the lifted cube"
    picture = osc.picture("frontview", 96, 96)
    assert picture[:24].std() < picture[48:].std(), "wall above, table and robot below"


def test_expert_lifts_every_start_within_its_limits(button):
    low, high = button.action_space.low, button.action_space.high
    needed = []
    for seed in range(20):
        button.reset(seed=seed)
        while not button.success and button.steps < 100:
            action = button.expert_action()
            assert (action >= low).all() and (action <= high).all()
            button.step(action)
        assert button.warnings() == {}
        needed.append(button.steps if button.success else 1000)
    assert sum(n < 1000 for n in needed) >= 19, needed
    assert np.median(needed) < 60


def test_expert_stacks_within_its_limits_and_leaves_the_cube_there(osc):
    low, high = osc.action_space.low, osc.action_space.high
    for seed in (1, 4):
        osc.reset(seed=seed, options={"task": "Stack"})
        while not osc.success and osc.steps < 100:
            action = osc.expert_action()
            assert (action >= low).all() and (action <= high).all()
            osc.step(action)
        assert osc.success and osc.warnings() == {}
        play(osc, 20)
        red, green = (osc.data.body(i).xpos for i in (osc._env.cubeA_body_id, osc._env.cubeB_body_id))
        np.testing.assert_allclose(red - green, [0, 0, 0.045], atol=0.015)
        assert np.linalg.norm(osc.data.site("gripper0_right_grip_site").xpos - red) > 0.03, "the hand let go and left"
    osc.reset(seed=0, options={"task": "Lift"})


def test_only_lift_and_stack_have_an_expert(osc):
    osc.reset(seed=0, options={"task": "Door"})
    with pytest.raises(ValueError, match=r"unknown scripted expert 'Door'; .*Lift, Stack"):
        osc.expert_action()
    osc.reset(seed=0, options={"task": "Lift"})


@pytest.mark.parametrize("task", [t for t in TASKS if t != "Lift"])
def test_every_task_starts_by_seed_and_runs(osc, task):
    osc.reset(seed=1, options={"task": task})
    first, instruction = osc.start_hash, osc.instruction
    observation, _, success, _, info = osc.step(still(osc))
    osc.reset(seed=2)
    assert osc.start_hash != first
    osc.reset(seed=1)
    assert osc.start_hash == first
    assert np.array_equal(osc.step(still(osc))[0]["state"], observation["state"])
    assert not success and info["warnings"] == {} and instruction == INSTRUCTIONS[task]
    osc.reset(seed=0, options={"task": "Lift"})


def test_every_task_has_its_own_sentence():
    assert len(set(INSTRUCTIONS.values())) == len(TASKS) == 7


def test_a_demonstration_trains(osc, tmp_path):
    from dita.datasets.writer import StoreWriter

    osc.reset(seed=4)
    episode = demonstrate(osc, 4, 0.0)
    assert episode is not None and episode.images["agentview"].shape[1:] == (96, 96, 3)
    with StoreWriter.create(tmp_path / "a.zarr", osc.embodiment, source="robosuite", licence="MIT") as store:
        store.add(episode)
    assert [e.instruction for e in Store(tmp_path / "a.zarr").episodes] == ["lift the red cube"]


def test_an_unstable_simulation_is_reported(osc, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes MUJOCO_LOG.TXT
    osc.reset(seed=0)
    assert osc.warnings() == {}
    osc.data.qvel[:] = 1e12
    osc.step(still(osc))
    assert osc.warnings() and set(osc.warnings()) <= {"mjWARN_BADQVEL", "mjWARN_BADQACC", "mjWARN_BADQPOS"}
    osc.reset(seed=0)
    assert osc.warnings() == {}


def test_embodiments_that_do_not_fit_are_refused():
    from dita.envs.robosuite import RobosuiteEnv

    spec = load_embodiment(OSC)
    with pytest.raises(ValueError, match=r"'sawyer' names no arm of robosuite's: .*panda, ur5e, kinova3, iiwa"):
        RobosuiteEnv(replace(spec, name="sawyer"), "Lift", 10)
    with pytest.raises(ValueError, match=r"unknown camera of Lift 'corner'"):
        RobosuiteEnv(replace(spec, cameras=(replace(spec.cameras[0], name="corner"),)), "Lift", 10)
    with pytest.raises(ValueError, match=r"UR5e has 6 joints, field joints has 7"):
        RobosuiteEnv(replace(load_embodiment(JOINT), name="robosuite_ur5e_joint"), "Lift", 10)
    with pytest.raises(ValueError, match=r"unknown task 'lift'; did you mean Lift"):
        RobosuiteEnv(spec, "lift", 10)


@pytest.mark.parametrize("name", [OSC, JOINT])
def test_the_guard_finds_every_limit_that_it_needs(name):
    from robot_io.core.limits import parse_robot

    robot = parse_robot(embodiment_to_dict(load_embodiment(name)))
    assert robot.bounds is not None and np.all(robot.bounds.speed > 0)
    assert robot.space.tangent == (6 if name == OSC else 7)


def test_expert_lifts_the_cube_through_the_guard(button):
    """Twin and guard on one bus in simulated time: what goes out stays within the embodiment file's limits."""
    from local_bus import LocalBus

    from robot_io import messages as m
    from robot_io.bus import STATE
    from robot_io.core.guard import GuardConfig
    from robot_io.nodes.guard import GuardNode
    from robot_io.nodes.topics import ARM, TAKEOVER
    from robot_io.nodes.twin import TwinNode

    name, tick = button.embodiment.name, 0.01
    bus = LocalBus()
    twin = TwinNode(bus, button, embodiment_to_dict(button.embodiment), command_timeout=0.1, expert=True)
    config = GuardConfig(
        tick, state_timeout=0.1, stream_timeout=0.1, hold_timeout=1.0, max_skew=0.05, clamp_margin=0.25
    )
    guard = GuardNode(bus, config, load_path(f"{name}.yaml"), require_preflight=False)
    twin.reset({"episode": 0, "task": "Lift", "seed": 2})
    bus.run(0.2)
    bus.publisher(TAKEOVER, m.STRING, STATE).publish(m.json_to_ros(bus.msg, {"active": True}))
    bus.publisher(ARM, m.BOOL, STATE).publish(bus.msg(m.BOOL, data=True))
    for _ in range(100):
        bus.run(0.1)
        if button.success:
            break
    assert button.success and button.warnings() == {}
    assert guard.guard.state.value == "ARMED" and not guard.guard.to_dict().get("R2")
    assert (twin._episode["refused"], twin._episode["timeouts"]) == (0, 0)
    commands, bounds = bus.sent[guard.robot.driver.command_topic], guard.robot.bounds
    if name == JOINT:
        path = np.array([c.points[0].positions for c in commands])
    else:
        path = np.array([m.pose_from_ros(c)[0] for c in commands])
    assert (
        len(path) > 100 and np.all(path >= bounds.low[: path.shape[1]]) and np.all(path <= bounds.high[: path.shape[1]])
    )
    for order, limit in ((1, bounds.speed), (2, bounds.acceleration)):
        motion = np.diff(path, order, axis=0) / tick**order
        size = np.abs(motion).max(0) if name == JOINT else np.linalg.norm(motion, axis=1).max()
        assert np.all(size <= (limit if name == JOINT else limit[0]) * (1 + 1e-6)), (order, size, limit)


@pytest.mark.parametrize("robot", ["ur5e", "kinova3", "iiwa"])
def test_other_arms_lift_too(robot):
    env = make(env_config(f"robosuite_{robot}_osc"), "Lift")
    for seed in range(2):
        env.reset(seed=seed)
        while not env.success and env.steps < 150:
            env.step(env.expert_action())
        assert env.success and env.warnings() == {}
