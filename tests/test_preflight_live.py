"""Preflight over DDS: a driver with one mistake at a time, a tiny policy, and its training store."""

import json
import threading

import numpy as np
import pytest
import torch
import yaml
from conftest import diffusion_config, field, policy_config
from test_preflight import pictures

from dita.checkpoint import save_policy
from dita.cli import main
from dita.config import LiveConfig, PreprocessConfig, from_dict
from dita.datasets.dataset import iter_low_dim
from dita.datasets.store import Store, StoreWriter
from dita.embodiment import config_folder, embodiment_from_dict
from dita.normalize import fit
from dita.policy.policy import DitaPolicy
from dita.preprocess import make_contract
from dita.types import Episode
from robot_io import messages as m
from robot_io.bus import COMMAND, LATCHED, SENSOR, STATE, open_bus
from robot_io.core.guard import GuardConfig
from robot_io.live import arguments_of, commands_of
from robot_io.nodes.guard import GuardNode
from robot_io.nodes.preflight import SAMPLE, load_sample, run, sample_stores, save_sample
from robot_io.nodes.topics import (
    CONTRACT,
    GRIPPER,
    GUARD_STATE,
    INSTRUCTION,
    JOINTS,
    PREFLIGHT,
    TARGET_POSE,
    TOOL_POSE,
    image_topic,
)

HOME = np.array([0.1, -0.4, 0.3, 0.2, -0.7, 1.1, -1.9, 1.0], np.float32)  # hand, four joints, gripper
DOMAIN, REPLAY = 123, 124


def embodiment(name="bench_arm", **changes):
    joints = {**field("joints", "joint_position", 4, 3, bound=2.5), "unit": "rad", "frame": "joint"}
    grip = {**field("gripper", "gripper_position", 1, 9), "low": [0.0], "high": [1.0]}
    return {
        **{"name": name, "robot": "a test arm", "obs_dt": 0.05, "action_dt": 0.025, "control_hz": 40.0},
        "state": [field("hand", "ee_position", 3, 0), joints, grip],
        "action": [field("delta", "ee_position", 3, 0, "delta", 0.01), field("grip", "gripper_effort", 1, 6)],
        "cameras": [{"name": c, "height": 48, "width": 64, "slot": i} for i, c in enumerate(("front", "wrist"))],
        "limits": {
            **{"max_speed": 1.0, "max_acceleration": 50.0, "max_jerk": 5000.0, "max_lag": 0.2},
            **{"workspace_low": [-1.0, -1.0, -1.0], "workspace_high": [1.0, 1.0, 1.0]},
        },
        **changes,
    }


def episode(seed, length=30):
    rng = np.random.default_rng([seed, 6])
    way = np.cumsum(0.004 * rng.standard_normal((length, 8)), axis=0)
    state = HOME + 0.01 * rng.standard_normal(8) + way
    state[:, 7] = np.clip(1.0 - np.linspace(0, 1, length), 0, 1)
    action = np.clip(0.005 * rng.standard_normal((length, 4)), -0.01, 0.01)
    stamps = np.arange(length) / 40.0
    return Episode(
        pictures(seed, length),
        *(state.astype(np.float32), action.astype(np.float32), stamps),
        *("lift the block", True, f"seed={seed}"),
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Return a folder with an embodiment file, a store and a policy that was made for them."""
    at = tmp_path_factory.mktemp("world")
    (at / "arm.yaml").write_text(yaml.safe_dump(embodiment()))
    spec = embodiment_from_dict(embodiment())
    with StoreWriter.create(at / "train.zarr", spec, source="tests", licence="CC0-1.0") as writer:
        for seed in range(6):
            writer.add(episode(seed))
    torch.manual_seed(0)
    config = policy_config(cameras=2)
    stats = fit(spec, iter_low_dim(Store(at / "train.zarr")))
    contract = make_contract(PreprocessConfig("q01_q99", "squash", "stored"), config, [spec], [stats])
    save_policy(DitaPolicy(config, diffusion_config(), contract), at / "policy")
    return at


def settings(world, tmp_path, **changes):
    values = yaml.safe_load((config_folder() / "robot.yaml").read_text())
    del values["defaults"]
    preflight = {**values["preflight"], "data": [str(world / "train.zarr")], "windows": 6, "listen": 1.5}
    values["preflight"] = {**preflight, "replay": False, "replay_domain": REPLAY, "out": str(tmp_path / "out")}
    env = {"suite": "none", "embodiment": str(world / "arm.yaml"), "tasks": ("x",), "max_steps": 1, "fast_render": True}
    values.update(checkpoint=str(world / "policy"), domain_id=DOMAIN, env=env)
    live = from_dict(LiveConfig, values, "robot")
    return {**arguments_of(live)["preflight"], **changes}


class Driver(threading.Thread):
    """Publishes a still arm and two cameras, with one mistake."""

    def __init__(self, mistake=""):
        super().__init__(daemon=True)
        self.mistake, self.opening, self.commands = mistake, 1.0, 0
        self.bus = open_bus("dds", "driver", DOMAIN)
        self.views = pictures(77, 40)
        self.images = {c: self.bus.publisher(image_topic(c), m.IMAGE, SENSOR) for c in self.views}
        self.pose = self.bus.publisher(TOOL_POSE, m.POSE, STATE)
        self.joints = self.bus.publisher(JOINTS, m.JOINT_STATE, STATE)
        words = self.bus.publisher(INSTRUCTION, m.STRING, LATCHED)
        words.publish(self.bus.msg(m.STRING, data="lift the block"))
        self.verdict = None
        self.bus.subscribe(PREFLIGHT, m.STRING, LATCHED, self.on_verdict)
        self.bus.subscribe(GRIPPER, m.JOINT_TRAJECTORY, COMMAND, self.on_gripper)
        self.extra = []
        if mistake == "second writer":
            self.extra.append(self.bus.publisher(TARGET_POSE, m.POSE, COMMAND))
        if mistake == "other contract":
            self.extra.append(self.bus.publisher(CONTRACT, m.STRING, LATCHED))
            self.extra[0].publish(m.json_to_ros(self.bus.msg, {"hash": "f" * 64}))
        if mistake == "armed":
            self.extra.append(self.bus.publisher(GUARD_STATE, m.STRING, LATCHED))
            self.extra[0].publish(m.json_to_ros(self.bus.msg, {"state": "ARMED"}))
        self.frame = 0
        period = 0.05 if mistake != "wrong rate" else 0.1
        self.due = [[self.bus.now(), 1 / 40.0, self.send_state], [self.bus.now(), period, self.send_images]]
        self.bus.timer(0.005, self.send_due)

    def send_due(self):
        """Send what is due, stamped on a grid as a driver does: a busy machine must not look like a slow one."""
        for task in self.due:
            while task[0] <= self.bus.now():
                task[2](task[0])
                task[0] += task[1]

    def on_verdict(self, message):
        self.verdict = m.json_from_ros(message)

    def on_gripper(self, message):
        value = float(m.joint_chunk_from_ros(message, "effort")[1][-1, 0])
        self.commands += 1
        self.opening = float((value > 0) != (self.mistake == "inverted gripper"))

    def send_state(self, now):
        now -= 0.5 if self.mistake == "stale stamps" else 0.0
        state = HOME.astype(float)
        joints = state[3:7]
        if self.mistake == "degrees":
            joints = np.rad2deg(joints)
        if self.mistake == "joint order":
            joints = joints[[2, 0, 3, 1]]
        names = [f"joints_{i}" for i in range(4)]
        if self.mistake == "joint names":
            names[2] = "elbow"
        hand = 1000 * state[:3] if self.mistake == "millimetres" else state[:3]
        self.pose.publish(m.pose_to_ros(self.bus.msg, now, hand, "base_link"))
        values = {**dict(zip(names, joints.tolist(), strict=True)), "gripper": self.opening}
        self.joints.publish(m.joints_to_ros(self.bus.msg, now, values))

    def send_images(self, stamp):
        self.frame += 1
        for camera, publisher in self.images.items():
            shown = camera
            if self.mistake == "swapped cameras":
                shown = {"front": "wrist", "wrist": "front"}[camera]
            if self.mistake == "missing topic" and camera == "wrist":
                continue
            image = self.views[shown][self.frame % 40]
            if self.mistake == "BGR":
                image = image[..., ::-1]
            if self.mistake == "image format":
                image = image[::2, ::2]
            publisher.publish(m.image_to_ros(self.bus.msg, stamp, image, camera))

    def run(self):
        self.bus.spin()

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.bus.shutdown()
        self.join()
        self.bus.close()


def outcome(world, tmp_path, mistake, **changes):
    """Run preflight against a driver; return its report, which may be a failed one, and the driver."""
    with Driver(mistake) as driver:
        try:
            run(**settings(world, tmp_path, **changes))
        except ValueError as e:
            assert "preflight failed" in str(e)
        return json.loads((tmp_path / "out" / "preflight.json").read_text()), driver


@pytest.mark.live
def test_clean_robot_passes_with_every_window_identical_and_the_gripper_tried(world, tmp_path, capsys):
    report, driver = outcome(world, tmp_path, "", replay=True, move=True)
    assert report["passed"], [i for i in report["items"] if i["verdict"] == "failed"]
    assert report == driver.verdict, "the guard reads what was written"
    assert report["embodiment"] == "bench_arm" and len(report["contract"]) == 64
    verdicts = {i["name"]: i["verdict"] for i in report["items"]}
    assert verdicts["path"] == "ok" and verdicts["gripper direction"] == "ok" and driver.commands > 5
    text = next(i["text"] for i in report["items"] if i["name"] == "path")
    assert "6 training windows: observations differ by 0," in text
    assert verdicts["contract hash"] == "skipped"
    assert {n: v for n, v in verdicts.items() if v == "warned"} == {}
    assert "preflight passed" in capsys.readouterr().out


@pytest.mark.live
@pytest.mark.parametrize(
    ("mistake", "named"),
    [
        *((name, name) for name in ("joint order", "degrees", "millimetres", "BGR", "swapped cameras", "wrong rate")),
        *((name, name) for name in ("joint names", "image format", "missing topic", "second writer")),
        *(("stale stamps", "stale stamps"), ("other contract", "wrong statistics")),
    ],
)
def test_mistake_of_the_robot_is_named_over_the_wire(world, tmp_path, mistake, named):
    report, driver = outcome(world, tmp_path, mistake)
    assert not report["passed"] and report["mistakes"] == [named], report["mistakes"]
    assert driver.verdict["passed"] is False and driver.commands == 0


@pytest.mark.live
def test_inverted_gripper_is_measured_and_not_tried_while_the_guard_is_armed(world, tmp_path):
    report, driver = outcome(world, tmp_path, "inverted gripper", move=True)
    assert report["mistakes"] == ["inverted gripper"] and driver.commands > 5
    report, driver = outcome(world, tmp_path, "armed", move=True)
    item = next(i for i in report["items"] if i["name"] == "gripper direction")
    assert item["verdict"] == "failed" and "disarm" in item["text"] and driver.commands == 0


@pytest.mark.live
def test_checkpoint_of_another_robot_fails_without_listening(world, tmp_path):
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(embodiment("other")))
    with pytest.raises(ValueError, match="preflight failed: other embodiment"):
        run(**settings(world, tmp_path, embodiment=str(tmp_path / "other.yaml")))
    (tmp_path / "arm.yaml").write_text(yaml.safe_dump(embodiment(limits=None)))
    with pytest.raises(ValueError, match=r"preflight failed: .*missing limits"):
        run(**settings(world, tmp_path, embodiment=str(tmp_path / "arm.yaml")))


@pytest.mark.live
def test_guard_arms_only_after_preflight_passed_for_the_policys_contract(world, tmp_path):
    policy = DitaPolicy.from_pretrained(world / "policy")
    told = {"embodiment": embodiment(), "hash": policy.contract.hash_of("bench_arm")}
    knobs = {"state_timeout": 5.0, "stream_timeout": 5.0, "hold_timeout": 30.0, "max_skew": 1.0, "clamp_margin": 0.25}
    bus = open_bus("dds", "guard", DOMAIN)
    node = GuardNode(bus, GuardConfig(tick=1 / 160, **knobs), world / "arm.yaml", require_preflight=True)
    thread = threading.Thread(target=bus.spin, daemon=True)
    thread.start()
    with Driver() as driver:
        driver.bus.publisher(CONTRACT, m.STRING, LATCHED).publish(m.json_to_ros(driver.bus.msg, told))
        with pytest.raises(ValueError, match="no preflight yet"):
            node.arm()
        with pytest.raises(ValueError, match="preflight failed: wrong statistics"):
            broken = dict(told, hash="e" * 64)
            driver.bus.publisher(CONTRACT, m.STRING, LATCHED).publish(m.json_to_ros(driver.bus.msg, broken))
            run(**settings(world, tmp_path))
        with pytest.raises(ValueError, match="preflight failed: wrong statistics"):
            node.arm()
        driver.bus.publisher(CONTRACT, m.STRING, LATCHED).publish(m.json_to_ros(driver.bus.msg, told))
        report = run(**settings(world, tmp_path, move=True))
        assert {i["name"]: i["verdict"] for i in report["items"]}["contract hash"] == "ok"
        node.arm()
        assert node.guard.state == "ARMED"
    bus.shutdown()
    thread.join()
    node.close()


def test_sample_is_the_same_after_writing_and_reading(world, tmp_path):
    policy = DitaPolicy.from_pretrained(world / "policy")
    contract, name = policy.contract, "bench_arm"
    sample = sample_stores([str(world / "train.zarr")], contract, name, 5, 3)
    again = sample_stores([str(world / "train.zarr")], contract, name, 5, 3)
    other = sample_stores([str(world / "train.zarr")], contract, name, 5, 4)
    assert [len(w) for w in sample.windows] == [2] * 5
    store = Store(world / "train.zarr")
    starts = np.stack([store.state(e)[2] for e in range(6)])  # the earliest full history: obs_dt is two frames
    for i in (0, 2, 4):
        assert any(np.array_equal(sample.windows[i][-1].state, s) for s in starts)
    np.testing.assert_array_equal(sample.state, again.state)
    assert any(
        not np.array_equal(a, b) for a, b in zip(sample.pictures().values(), other.pictures().values(), strict=True)
    )
    path = save_sample(sample, tmp_path, contract.hash_of(name))
    assert path.name == SAMPLE and [p.name for p in tmp_path.iterdir()] == [SAMPLE]
    read = load_sample(path, contract.hash_of(name))
    for mine, theirs in zip(sample.windows, read.windows, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert (a.instruction, a.stamp) == (b.instruction, b.stamp)
            np.testing.assert_array_equal(a.state, b.state)
            for camera in a.images:
                np.testing.assert_array_equal(a.images[camera], b.images[camera])
    np.testing.assert_array_equal(sample.action, read.action)
    with pytest.raises(ValueError, match="made for contract"):
        load_sample(path, "0" * 64)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="no whole sample"):
        load_sample(path, contract.hash_of(name))


def test_live_starts_neither_preflight_nor_anything_else_that_an_operator_starts(world, tmp_path):
    values = yaml.safe_load((config_folder() / "robot.yaml").read_text())
    del values["defaults"]
    env = {"suite": "none", "embodiment": "metaworld_sawyer", "tasks": ("x",), "max_steps": 1, "fast_render": True}
    started = set(commands_of(from_dict(LiveConfig, {**values, "env": env}, "robot")))
    assert started == {"blackbox", "guard", "policy", "twin"}


def test_saving_a_sample_needs_stores(world, tmp_path):
    values = yaml.safe_load((config_folder() / "robot.yaml").read_text())
    env = {"suite": "none", "embodiment": "metaworld_sawyer", "tasks": ("x",), "max_steps": 1, "fast_render": True}
    del values["defaults"]
    values["preflight"]["save"] = True
    with pytest.raises(ValueError, match="name its stores"):
        from_dict(LiveConfig, {**values, "env": env}, "robot")


def test_i_know_lets_the_guard_arm_without_and_nothing_else_does(monkeypatch):
    seen = []
    monkeypatch.setattr("robot_io.live.run_role", lambda role, config, exist: seen.append((role, config)))
    assert main(["robot", "guard"]) == main(["robot", "guard", "--i-know"]) == 0
    assert [(role, config.require_preflight) for role, config in seen] == [("guard", True), ("guard", False)]
    assert arguments_of(seen[0][1])["guard"]["require_preflight"] is True
