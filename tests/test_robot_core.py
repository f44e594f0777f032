"""The live stack's core on a fake clock: chunks by time, composition, envelope, states."""

import copy
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fake_robot import EMBODIMENT

from dita.embodiment import embodiment_to_dict, load_embodiment
from robot_io.core.chunk_buffer import Chunk
from robot_io.core.diagnostics import LoopTiming, Running
from robot_io.core.guard import Guard, GuardConfig
from robot_io.core.limits import parse_robot
from robot_io.live import EnvelopeReader

ROBOT = parse_robot(EMBODIMENT)
TICK, DT = 1 / 160, 0.0125
CONFIG = GuardConfig(
    tick=TICK, state_timeout=0.1, stream_timeout=0.1, hold_timeout=1.0, max_skew=0.05, clamp_margin=0.25
)
HOME = np.array([0.0, 0.6, 0.2])
T0 = 1000.0


def shifted(position, *by):
    return np.asarray(position) + np.array(by)


def chunk(stamp, motion, gripper=-1.0):
    motion = np.atleast_2d(np.asarray(motion, float))
    return Chunk(stamp, DT, motion, np.full(len(motion), float(gripper)))


class Arm:
    """A guard with an arm that follows perfectly, on a fake clock of ticks, judged by the independent reader."""

    def __init__(self, robot=ROBOT, home=HOME):
        self.guard, self.now, self.measured = Guard(robot, CONFIG), T0, np.array(home, float)
        self.judge = EnvelopeReader(robot.space, robot.bounds)
        self.sent, self.executed, self.fresh = [], [], True
        self.guard.on_state(self.now, self.measured)

    def arm(self):
        self.guard.arm(self.now)
        return self

    def run(self, seconds, periods=1):
        for _ in range(round(seconds / TICK / periods)):
            self.now += periods * TICK
            if self.fresh:
                self.guard.on_state(self.now, self.measured)
            command, executed = self.guard.tick(self.now, periods)
            if executed is not None:
                self.executed.append(executed)
            if command is not None:
                self.sent.append(command)
                self.judge.take(command.stamp, command.configuration)
                self.measured = command.configuration
        return self

    @property
    def speed(self):
        return float(np.linalg.norm(self.sent[-1].configuration - self.sent[-2].configuration)) / TICK

    def assert_inside(self):
        assert self.judge.non_finite == 0
        assert sum(self.judge.violations.values()) == 0, self.judge.to_dict()
        assert self.guard.counts["envelope_stops"] == 0


# ---- the embodiment


def test_shipped_embodiment_is_read_strictly():
    robot = parse_robot(embodiment_to_dict(load_embodiment("metaworld_sawyer")))
    assert robot.motion.reference == "commanded" and robot.gripper.kind == "gripper_effort"
    assert robot.action_dim == 4 and robot.action_slice(robot.gripper) == slice(3, 4)
    assert robot.limits.max_speed == 1.5 and robot.limits.max_lag == 0.15
    np.testing.assert_array_equal(robot.motion.high, [0.01] * 3)


def broken(path, value):
    values = copy.deepcopy(EMBODIMENT)
    here = values
    for key in path[:-1]:
        here = here[key]
    if value is None and path[-1] != "limits":
        del here[path[-1]]
    else:
        here[path[-1]] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("limits",), None, "no limits"),
        (("limits", "max_jerk"), None, "no limits.max_jerk"),
        (("limits", "max_jerk"), -1.0, "max_jerk must be a positive number"),
        (("limits", "max_speed"), "fast", "max_speed must be a positive number"),
        (("limits", "workspace_low"), [0.9, 0.9, 0.9], "must be below"),
        (("limits", "workspace_high"), [1.0, float("nan"), 1.0], "3 finite numbers"),
        (("action_dt",), 0, "action_dt"),
        (("colour",), "red", "unknown colour"),
        (("action", 0, "kind"), "base_velocity", "executes one joint_position, or one ee_position"),
        (("action", 0, "kind"), "joint_position", "no limits.joints for hand_delta_0, hand_delta_1"),
        (("action", 0, "reference"), "goal", "delta with reference goal"),
        (("action", 0, "low"), [-0.01], "3 finite numbers"),
        (("action", 0, "low"), [0.02, 0.02, 0.02], "every low"),
    ],
)
def test_embodiment_problems_are_named(path, value, says):
    with pytest.raises(ValueError, match=says):
        parse_robot(broken(path, value))


# ---- diagnostics


def test_running_statistics_match_numpy():
    values, running = np.random.default_rng([0, 4]).uniform(0, 5, 200), Running()
    for v in values:
        running.add(v)
    assert (running.count, running.max) == (200, values.max())
    assert running.mean == pytest.approx(values.mean()) and running.std == pytest.approx(values.std())
    assert Running().std == 0.0


def test_loop_timing_counts_overruns_and_leaves_pauses_out():
    timing = LoopTiming(0.01)
    for begin in (0.0, 0.01, 0.02, 0.05):
        timing.begin(begin)
        timing.end(begin + 0.002)
    timing.pause()
    timing.begin(9.0)
    assert timing.overruns == 1 and timing.periodicity.count == 3
    assert timing.to_dict()["execution_time.average"] == pytest.approx(0.002)


# ---- the folder alone

ALONE = """
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "dita", "hydra", "zarr", "mujoco", "jaxtyping", "scipy"}:
            raise ImportError(f"{name} on the robot's path")
sys.meta_path.insert(0, Block())
import json, pathlib, robot_io
assert pathlib.Path(robot_io.__file__).parent == pathlib.Path.cwd() / "robot_io", robot_io.__file__
import robot_io.messages, robot_io.bus, robot_io.bus_dds, robot_io.nodes, robot_io.core.guard, robot_io.core.sync
from robot_io.bus import open_bus
from robot_io.nodes.guard import GuardNode
from robot_io.core.guard import GuardConfig
contract = json.loads(sys.argv[1])
config = GuardConfig(1 / 160, 0.1, 0.1, 1.0, 0.05, 0.25)
node = GuardNode(open_bus("dds", "guard", 77), config, contract, require_preflight=False)
node.bus.spin(0.1)
node.stop()
node.bus.spin(1.0)
print("guarded", node.guard.robot.name)
"""


def test_guard_runs_from_a_copy_of_its_folder_alone(tmp_path):
    source = Path(__file__).parent.parent / "robot_io"
    shutil.copytree(source, tmp_path / "robot_io", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-c", ALONE, json.dumps(EMBODIMENT)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "guarded point"


def test_robot_folder_keeps_python_3_10_syntax():
    import ast

    for path in sorted((Path(__file__).parent.parent / "robot_io").rglob("*.py")):
        ast.parse(path.read_text(), str(path), feature_version=(3, 10))


def test_a_node_keeps_the_memory_of_its_images():
    code = """if True:
        import resource, sys
        from robot_io.nodes.serve import keep_memory
        if sys.argv[1] == "kept":
            keep_memory()
        for i in range(100):
            if i == 50:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            images = [bytearray(900_000) for _ in range(4)]
            for image in images:
                image[::4096] = image[::4096]
            del image, images
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    faults = {
        how: int(subprocess.run([sys.executable, "-c", code, how], env=plain, check=True, capture_output=True).stdout)
        for how in ("kept", "mapped")
    }
    if platform.libc_ver()[0] == "glibc":
        assert faults["kept"] < 50 < 200 * 100 < faults["mapped"]  # page faults of 200 images
