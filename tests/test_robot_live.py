"""Twin, policy and guard as three processes over DDS: a point for an arm and a rule for a policy, but a real wire."""

import ast
import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import MISSING, fields
from pathlib import Path

import numpy as np
import pytest
import yaml
from fake_robot import EMBODIMENT, GOAL

from dita.config import LiveConfig, from_dict
from robot_io import messages as m
from robot_io.bus import COMMAND, LATCHED, STATE, open_bus
from robot_io.core.guard import GuardConfig
from robot_io.live import Children, Judge, Operator, commands_of, live
from robot_io.nodes import main
from robot_io.nodes.topics import CHUNK, CONTRACT, GRIPPER, TARGET_POSE

HERE = Path(__file__).parent
pytestmark = pytest.mark.live


def config(tmp_path, domain_id, **changes):
    values = yaml.safe_load((HERE.parent / "configs" / "robot.yaml").read_text())
    del values["defaults"]
    point = tmp_path / "point.json"  # the guard's own
    point.write_text(json.dumps(EMBODIMENT))
    env = {"suite": "fake", "embodiment": str(point), "tasks": ("go",), "max_steps": 400, "fast_render": True}
    values.update(checkpoint="none", out=str(tmp_path / "out"), env=env, domain_id=domain_id, start_timeout=30.0)
    return from_dict(LiveConfig, {**values, **changes}, "robot")


def fakes(domain_id, endless=False):
    arguments = json.dumps({"domain_id": domain_id})
    policy = json.dumps({"domain_id": domain_id, "endless": endless})
    script = str(HERE / "fake_robot.py")
    return {
        "twin": [sys.executable, script, "twin", arguments],
        "policy": [sys.executable, script, "policy", policy],
    }


class Rig:
    """The three processes, an operator and the judge, with the arm moving to and fro."""

    def __init__(self, stack, tmp_path, domain_id, endless=True):
        self.config = config(tmp_path, domain_id)
        self.children = stack.enter_context(Children())
        commands = {**commands_of(self.config), **fakes(domain_id, endless)}
        self.pids = {name: self.children.start(name, command) for name, command in commands.items()}
        self.bus = open_bus("dds", "live", domain_id)
        stack.callback(self.bus.close)
        self.judge = Judge(self.bus)
        self.operator = Operator(self.bus, self.judge, self.children)
        self.bus.wait_for_writer(CHUNK, m.CARTESIAN_TRAJECTORY, COMMAND, 30.0)
        self.bus.wait_for_writer("/tool_pose", m.POSE, STATE, 30.0)
        self.operator.until(lambda: self.judge.robot is not None, 10.0, "contract")

    def move(self):
        """Arm and wait until the arm has been moving for a while; a starved machine's fault is armed away."""
        self.operator.reset(0, "go", 0)
        self.operator.until(lambda: self.judge.tool_stamp > 0, 10.0, "tool pose")
        for _ in range(5):
            self.operator.arm()
            begun = len(self.judge.latencies)
            self.operator.until(
                lambda: len(self.judge.latencies) > begun + 5 or self.judge.guard["state"] == "FAULT",  # noqa: B023
                10.0,
                "chunks to be executed",
            )
            if self.judge.guard["state"] == "ARMED":
                return
        pytest.fail(f"the arm never moved: {self.judge.guard}")

    def watch(self, condition, timeout_s=5.0):
        """Spin until `condition`, and return how long it took [s]; dead children are expected."""
        begin = time.monotonic()
        while not condition():
            assert time.monotonic() - begin < timeout_s, self.judge.guard
            self.bus.spin(0.005)
        return time.monotonic() - begin

    def standstill(self):
        """Wait until two commands in a row are equal."""
        self.watch(lambda: self.judge.guard["state"] in ("HOLDING", "FAULT"))
        last = [None]

        def same():
            before, last[0] = last[0], self.judge.last_command
            count = self.judge.envelope.commands
            self.watch(lambda: self.judge.envelope.commands > count)
            return before is not None and np.array_equal(before, self.judge.last_command)

        return self.watch(same)


@pytest.fixture
def stack():
    with contextlib.ExitStack() as made:
        yield made


def assert_inside(judge):
    assert judge.envelope.commands > 30
    assert judge.envelope.non_finite == 0
    assert sum(judge.envelope.violations.values()) == 0, judge.envelope.to_dict()


def test_two_episodes_reach_the_goal_over_the_wire_and_are_accounted_for(tmp_path):
    c = config(tmp_path, 71, episodes=2, seed=5)
    result = live(c, fakes(71))
    assert result == json.loads((tmp_path / "out" / "live.json").read_text())
    played = [(e["task"], e["seed"], e["end"]) for e in result["episodes"]]
    assert played == [("go", 5, "success"), ("go", 6, "success")]
    assert result["successes"] == 2 and result["contract"] == "0" * 64 and result["embodiment"] == "point"
    assert all(30 < e["steps"] < 400 and e["refused"] == 0 for e in result["episodes"])
    assert result["latency_ms"]["n"] == len(result["latency_ms"]["values"]) > 10
    assert 30 < result["latency_ms"]["p50"] <= result["latency_ms"]["p99"], "the policy thinks for 30 ms"
    assert result["chunk_age_ms"]["p50"] > 30
    assert result["envelope"]["commands"] > 100 and result["envelope"]["streams"] >= 2
    assert result["envelope"]["non_finite"] == 0 and sum(result["envelope"]["violations"].values()) == 0
    assert result["envelope"]["peaks"]["speed"] > 0.1, "it moved"
    assert result["guard"]["R3"] == 0 and result["guard"]["R1"] == 0
    assert result["guard"]["steps"] > 50 and result["guard"]["expired_steps"] > 0
    assert result["policy"]["inferences"] >= result["latency_ms"]["n"]
    assert 0 < result["real_time_factor"] <= 1 and result["publish"]["period_mean_ms"] == pytest.approx(6.25, rel=0.2)
    with pytest.raises(FileExistsError, match=r"live\.json exists"):
        live(c, fakes(71))
    assert live(c, fakes(71), exist="resume") == result


def test_killed_policy_mid_motion_is_a_stop_within_limits_and_then_a_fault(stack, tmp_path):
    rig = Rig(stack, tmp_path, 72)
    rig.move()
    os.kill(rig.pids["policy"], signal.SIGKILL)
    assert rig.watch(lambda: rig.judge.guard["state"] == "HOLDING") < 1.0
    assert any(said in rig.judge.guard["reason"] for said in ("policy is gone", "no action", "no sign of life"))
    assert rig.standstill() < 1.0
    held = rig.judge.last_command
    rig.watch(lambda: rig.judge.guard["state"] == "FAULT")
    assert "held for" in rig.judge.guard["reason"]
    np.testing.assert_array_equal(rig.judge.last_command, held)
    with pytest.raises(ChildProcessError, match="policy ended with code -9"):
        rig.children.check()
    assert_inside(rig.judge)


def test_frozen_twin_is_a_fault_and_arming_again_goes_on(stack, tmp_path):
    rig = Rig(stack, tmp_path, 73)
    rig.move()
    os.kill(rig.pids["twin"], signal.SIGSTOP)
    rig.watch(lambda: rig.judge.guard["state"] == "FAULT")
    assert "state older than 0.1 s" in rig.judge.guard["reason"]
    rig.standstill()
    os.kill(rig.pids["twin"], signal.SIGCONT)
    chunks, stamp = len(rig.judge.latencies), rig.judge.tool_stamp
    rig.watch(lambda: rig.judge.tool_stamp > stamp)
    rig.operator.arm()
    rig.watch(lambda: len(rig.judge.latencies) > chunks + 2)
    assert_inside(rig.judge)


def test_second_commander_is_a_fault_by_name_and_its_nan_is_refused(stack, tmp_path):
    rig = Rig(stack, tmp_path, 74)
    rig.move()
    rogue = open_bus("dds", "rogue", 74)
    stack.callback(rogue.close)
    poses = rogue.publisher(TARGET_POSE, m.POSE, COMMAND)
    grips = rogue.publisher(GRIPPER, m.JOINT_TRAJECTORY, COMMAND)
    rig.watch(lambda: rig.judge.guard["state"] == "FAULT")
    assert "second writer on the command topic: rogue" in rig.judge.guard["reason"]
    assert_inside(rig.judge)
    for _ in range(3):
        poses.publish(m.pose_to_ros(rogue.msg, rogue.now(), [np.nan, 0.6, 0.2], "base_link"))
        grips.publish(m.joint_chunk_to_ros(rogue.msg, rogue.now(), 0.01, ["effort"], np.array([[np.inf]]), "effort"))
        rogue.spin(0.05)
    rig.watch(lambda: rig.judge.episode["refused"] >= 2)
    rig.children.check()
    with pytest.raises(TimeoutError, match=r"guard: arm.*second writer"):
        short_arm(rig)


def short_arm(rig):
    import robot_io.live as live_module

    before, live_module.READY_S = live_module.READY_S, 1.0
    try:
        rig.operator.arm()
    finally:
        live_module.READY_S = before


def test_another_contract_is_a_fault_and_a_terminated_guard_brakes_first(stack, tmp_path):
    rig = Rig(stack, tmp_path, 75)
    rig.move()
    impostor = open_bus("dds", "impostor", 75)
    stack.callback(impostor.close)
    contract = impostor.publisher(CONTRACT, m.STRING, LATCHED)
    contract.publish(m.json_to_ros(impostor.msg, {"embodiment": EMBODIMENT, "hash": "f" * 64}))
    rig.watch(lambda: rig.judge.guard["state"] == "FAULT")
    assert "the contract changed from 000000000000 to ffffffffffff" in rig.judge.guard["reason"]
    os.kill(rig.pids["guard"], signal.SIGTERM)
    rig.watch(lambda: not rig.bus.writers(TARGET_POSE), 10.0)
    with pytest.raises(ChildProcessError, match="guard ended with code 0"):
        rig.watch(lambda: rig.children.check())
    assert_inside(rig.judge)


def test_killed_guard_leaves_the_arm_held_by_the_drivers_timeout(stack, tmp_path):
    rig = Rig(stack, tmp_path, 80)
    rig.move()
    assert rig.judge.episode["timeouts"] == 0
    os.kill(rig.pids["guard"], signal.SIGKILL)
    assert rig.watch(lambda: rig.judge.episode["timeouts"] == 1) < 1.0


def test_guard_survives_a_contract_that_makes_no_sense(stack, tmp_path):
    rig = Rig(stack, tmp_path, 81)
    rig.move()
    impostor = open_bus("dds", "impostor", 81)
    stack.callback(impostor.close)
    contract = impostor.publisher(CONTRACT, m.STRING, LATCHED)
    contract.publish(impostor.msg(m.STRING, data="{"))
    contract.publish(impostor.msg(m.STRING, data="[]"))
    rig.watch(lambda: any("message refused on /dita/contract" in line for line in rig.children.lines("guard")))
    rig.children.check()
    assert rig.judge.guard["state"] == "ARMED"


def test_terminated_guard_decelerates_within_limits(stack, tmp_path):
    rig = Rig(stack, tmp_path, 76)
    rig.move()
    os.kill(rig.pids["guard"], signal.SIGTERM)
    rig.watch(lambda: not rig.bus.writers(TARGET_POSE), 10.0)
    assert rig.judge.guard["state"] == "IDLE"
    assert_inside(rig.judge)


def test_crashed_child_is_named_with_its_last_lines_and_nobody_is_left(tmp_path):
    commands = {**fakes(77), "policy": [sys.executable, "-c", "print('loading'); raise SystemExit('out of memory')"]}
    with pytest.raises(ChildProcessError, match=r"policy ended with code 1: loading \| out of memory"):
        live(config(tmp_path, 77), commands)
    assert not (tmp_path / "out").exists(), "nothing half-written"


def test_peer_that_never_joins_is_an_error_with_topic_type_and_time(tmp_path):
    commands = {**fakes(78), "policy": [sys.executable, "-c", "import time; time.sleep(60)"]}
    with pytest.raises(TimeoutError, match=r"no publisher on /dita/contract of std_msgs/msg/String \(reliable"):
        live(config(tmp_path, 78, start_timeout=3.0), commands)


def test_children_end_when_their_owner_does(tmp_path):
    with Children() as children:
        pid = children.start("sleeper", [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"])
        while children.lines("sleeper") != ["up"]:
            time.sleep(0.02)
        children.check()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["robot", "{}"], 1, "there are blackbox, guard, operator, policy"),
        (["guard", "{"], 1, "error:"),
        (["guard", '{"bus": {"kind": "can", "domain_id": 0}, "tick_hz": 50}'], 1, "error:"),
        (
            ["guard", '{"bus": {"kind": "dds", "domain_id": 79}, "tick_hz": 160, "embodiment": "none.json"}'],
            1,
            "none.json",
        ),
    ],
)
def test_node_mistakes_are_one_line_and_an_exit_code(arguments, code, says, capsys):
    assert main(arguments) == code
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1


def test_launch_file_starts_the_guard_with_the_shipped_values():
    tree = ast.parse((HERE.parent / "robot_io" / "launch" / "dita.launch.py").read_text())
    guard = next(ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign))
    shipped = yaml.safe_load((HERE.parent / "configs" / "robot.yaml").read_text())
    assert guard == {name: shipped[name] for name in guard}
    assert set(guard) == {"tick_hz"} | {f.name for f in fields(GuardConfig) if f.default is MISSING} - {"tick"}


def test_live_config_refuses_what_makes_no_sense(tmp_path):
    with pytest.raises(ValueError, match="episodes must be positive"):
        config(tmp_path, 71, episodes=0)
    with pytest.raises(ValueError, match="real_time_factor"):
        config(tmp_path, 71, real_time_factor=2.0)
    assert np.linalg.norm(GOAL) > 0
