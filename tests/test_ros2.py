"""Against a real ROS 2: to be run by somebody who has one, with each middleware in turn.

    source /opt/ros/jazzy/setup.bash
    pip install cyclonedds rosbags ruckig pytest hypothesis pillow    # beside ROS 2's own NumPy 1, never another NumPy
    export ROS_AUTOMATIC_DISCOVERY_RANGE=LOCALHOST
    RMW_IMPLEMENTATION=rmw_cyclonedds_cpp python -m pytest tests/test_ros2.py --noconftest -o filterwarnings=default
    RMW_IMPLEMENTATION=rmw_fastrtps_cpp ... the same

The rest of the contract of a bus: `tests/test_robot_bus.py -k rclpy`. Where rclpy is absent everything here is skipped,
and never passed: the fake of `fake_rclpy.py` is of no use here. Domains 70 to 74 are used.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytestmark = [pytest.mark.ros2]
rclpy = pytest.importorskip("rclpy", reason="no ROS 2 here: source one, see the top of tests/test_ros2.py")
if not hasattr(rclpy, "get_default_context"):
    pytest.skip("this rclpy is the fake one of our own tests", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fake_robot import EMBODIMENT, START  # noqa: E402
from lifecycle_msgs.srv import ChangeState, GetState  # noqa: E402
from rclpy.parameter import Parameter  # noqa: E402
from rclpy.signals import SignalHandlerOptions  # noqa: E402
from std_srvs.srv import SetBool  # noqa: E402

from robot_io import messages as m  # noqa: E402
from robot_io.bus import COMMAND, LATCHED, SENSOR, STATE, Qos, open_bus  # noqa: E402
from robot_io.bus_rclpy import RclpyBus  # noqa: E402
from robot_io.nodes import topics  # noqa: E402

WAIT_S = 30.0
T = 1_795_471_436.791799
IMAGE = np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3)
DELTAS = np.random.default_rng([0, 5]).uniform(-0.01, 0.01, (16, 3))
EXECUTED = m.ExecutedStep(T, 3, 7, T + 0.09, DELTAS[0], DELTAS[1], "policy", 0.25)
GUARD = {"tick_hz": 160.0, "state_timeout": 0.5, "stream_timeout": 0.5, "hold_timeout": 5.0}
GUARD.update(max_skew=0.05, clamp_margin=0.25)

# name -> (type, QoS, build, what to compare)
MESSAGES = {
    "image": (m.IMAGE, SENSOR, lambda g: m.image_to_ros(g, T, IMAGE, "cam"), m.image_from_ros),
    "compressed": (
        *(m.COMPRESSED_IMAGE, SENSOR),
        lambda g: m.compressed_to_ros(g, T, bytes(range(256)), "cam", "jpeg"),
        lambda x: bytes(x.data) + x.format.encode(),
    ),
    "joints": (m.JOINT_STATE, STATE, lambda g: m.joints_to_ros(g, T, {"b": 1.5, "a": -2.0}), m.joints_from_ros),
    "pose": (
        *(m.POSE, COMMAND),
        lambda g: m.pose_to_ros(g, T, [1, 2, 3], "base", [0.5, 0.5, -0.5, 0.5]),
        lambda x: np.concatenate(m.pose_from_ros(x)),
    ),
    "twist": (
        *(m.TWIST, COMMAND),
        lambda g: m.twist_to_ros(g, T, [1, 2, 3], [4, 5, 6], "base"),
        lambda x: np.concatenate(m.twist_from_ros(x)),
    ),
    "array": (m.ARRAY, COMMAND, lambda g: m.array_to_ros(g, np.array([1.0, 2.5])), m.array_from_ros),
    "float": (m.FLOAT, STATE, lambda g: m.float_to_ros(g, 0.25), m.float_from_ros),
    "bool": (m.BOOL, STATE, lambda g: g(m.BOOL, data=True), lambda x: x.data),
    "json": (m.STRING, LATCHED, lambda g: m.json_to_ros(g, {"a": [1, None]}), m.json_from_ros),
    "joint_chunk": (
        *(m.JOINT_TRAJECTORY, COMMAND),
        lambda g: m.joint_chunk_to_ros(g, T, 0.0125, ["x", "y", "z"], DELTAS, "velocities"),
        lambda x: [(list(x.joint_names), list(p.velocities), p.time_from_start.nanosec) for p in x.points],
    ),
    "cartesian_chunk": (
        *(m.CARTESIAN_TRAJECTORY, COMMAND),
        lambda g: m.cartesian_chunk_to_ros(g, T, 0.0125, "tool", "base", DELTAS, delta=True),
        lambda x: m.cartesian_chunk_from_ros(x, delta=True)[1],
    ),
    "executed": (
        *(m.CARTESIAN_TRAJECTORY, STATE),
        lambda g: m.executed_to_ros(g, EXECUTED, 0.0125, ["tool"], False),
        lambda x: (m.executed_from_ros(x).id, m.executed_from_ros(x).source, m.executed_from_ros(x).target),
    ),
    "diagnostics": (
        *(m.DIAGNOSTICS, STATE),
        lambda g: m.diagnostics_to_ros(g, T, "guard", 1, "late", {"overruns": 3}),
        m.diagnostics_from_ros,
    ),
    "gripper": (m.GRIPPER_COMMAND, COMMAND, lambda g: m.gripper_command_to_ros(g, 0.4), m.gripper_command_from_ros),
}


def until(buses, condition, what, again=lambda: None, timeout_s=WAIT_S):
    """Spin all buses in turn until `condition`; fail with `what` and the middleware's name."""
    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            middleware = os.environ.get("RMW_IMPLEMENTATION", "the default middleware")
            pytest.fail(f"{what}: nothing within {timeout_s:g} s under {middleware}")
        again()
        for bus in buses:
            bus.spin(0.02)


@pytest.fixture(scope="module")
def pair():
    """A node on the DDS bus and one on the real rclpy, in one graph."""
    made = open_bus("dds", "without_ros", 70), open_bus("rclpy", "with_ros", 70)
    yield made
    for bus in made:
        bus.close()


class Caller:
    """A plain rclpy node that calls services, with a context of its own."""

    def __init__(self, domain_id):
        self.context = rclpy.context.Context()
        rclpy.init(context=self.context, domain_id=domain_id, signal_handler_options=SignalHandlerOptions.NO)
        self.node = rclpy.create_node("caller", context=self.context)
        self.executor = rclpy.executors.SingleThreadedExecutor(context=self.context)
        self.executor.add_node(self.node)

    def call(self, kind, name, request, spin=()):
        client = self.node.create_client(kind, name)
        end = time.monotonic() + WAIT_S
        while not client.service_is_ready():
            assert time.monotonic() < end, f"service {name} does not appear; nodes: {self.node.get_node_names()}"
            self.executor.spin_once(timeout_sec=0.05)
            for bus in spin:
                bus.spin(0.02)
        future = client.call_async(request)
        while not future.done():
            assert time.monotonic() < end, f"service {name} does not answer"
            self.executor.spin_once(timeout_sec=0.05)
            for bus in spin:
                bus.spin(0.02)
        self.node.destroy_client(client)
        return future.result()

    def change(self, node, transition, spin=()):
        request = ChangeState.Request()
        request.transition.id = {"configure": 1, "cleanup": 2, "activate": 3, "deactivate": 4}[transition]
        return self.call(ChangeState, f"/{node}/change_state", request, spin).success

    def state(self, node, spin=()):
        return self.call(GetState, f"/{node}/get_state", GetState.Request(), spin).current_state.label

    def close(self):
        self.executor.shutdown()
        self.node.destroy_node()
        self.context.try_shutdown()


@pytest.fixture
def caller(request):
    made = Caller(request.param)
    yield made
    made.close()


# ---- the two buses in one graph


@pytest.mark.parametrize("name", MESSAGES)
@pytest.mark.parametrize("direction", ["dds to rclpy", "rclpy to dds"])
def test_every_message_crosses_in_both_directions(pair, name, direction):
    sender, receiver = pair if direction == "dds to rclpy" else pair[::-1]
    kind, qos, build, read = MESSAGES[name]
    try:
        message = build(sender.msg)
    except ValueError as e:
        pytest.skip(f"{e}")  # control_msgs is not in every installation
    topic, heard = f"/{name}_{direction.replace(' ', '_')}", []
    publisher = sender.publisher(topic, kind, qos)
    receiver.subscribe(topic, kind, qos, heard.append)
    until(pair, lambda: heard, f"{kind} on {topic}", lambda: publisher.publish(message))
    np.testing.assert_equal(read(heard[0]), read(message))
    if hasattr(message, "header"):
        assert m.stamp_of(heard[0]) == m.stamp_of(message), "exactly"


@pytest.mark.parametrize("direction", ["dds to rclpy", "rclpy to dds"])
def test_a_large_image_crosses(pair, direction):
    sender, receiver = pair if direction == "dds to rclpy" else pair[::-1]
    image = np.random.default_rng([0, 8]).integers(0, 256, (480, 640, 3), np.uint8)
    heard, topic = [], f"/vga_{direction.replace(' ', '_')}"
    publisher = sender.publisher(topic, m.IMAGE, STATE)
    receiver.subscribe(topic, m.IMAGE, STATE, heard.append)
    message = m.image_to_ros(sender.msg, T, image, "cam")
    until(pair, lambda: heard, "a VGA image", lambda: publisher.publish(message))
    np.testing.assert_array_equal(m.image_from_ros(heard[0]), image)


@pytest.mark.parametrize("direction", ["dds to rclpy", "rclpy to dds"])
@pytest.mark.parametrize("depth", [1, 3])
def test_a_late_joiner_gets_what_is_latched(pair, direction, depth):
    sender, receiver = pair if direction == "dds to rclpy" else pair[::-1]
    topic, qos = f"/latched_{depth}_{direction.replace(' ', '_')}", Qos(True, True, depth, None)
    publisher, heard = sender.publisher(topic, m.STRING, qos), []
    for i in range(5):
        publisher.publish(sender.msg(m.STRING, data=str(i)))
    receiver.subscribe(topic, m.STRING, qos, lambda x: heard.append(x.data))
    until(pair, lambda: len(heard) >= depth, f"the last {depth} latched messages")
    assert heard == [str(i) for i in range(5)][-depth:]


def test_both_see_each_others_writers_with_type_and_qos(pair):
    dds, ros = pair
    dds.publisher("/seen_dds", m.POSE, COMMAND)
    ros.publisher("/seen_ros", m.POSE, COMMAND)
    until(pair, lambda: ros.writers("/seen_dds") and dds.writers("/seen_ros"), "each other's writers")
    for writer in (*ros.writers("/seen_dds"), *dds.writers("/seen_ros")):
        assert writer.type == m.POSE and writer.qos.reliable and not writer.qos.latched
        assert writer.qos.lease_s == pytest.approx(0.1)
    ros.wait_for_writer("/seen_dds", m.POSE, COMMAND, WAIT_S)
    dds.wait_for_writer("/seen_ros", m.POSE, COMMAND, WAIT_S)


def test_a_qos_mismatch_is_said_on_both_sides(pair):
    dds, ros = pair
    said = {"dds": [], "ros": []}
    dds.on_qos_mismatch(said["dds"].append)
    ros.on_qos_mismatch(said["ros"].append)
    dds.publisher("/mismatch", m.STRING, SENSOR)
    ros.subscribe("/mismatch", m.STRING, LATCHED, lambda x: None)
    until(
        pair, lambda: all(any("/mismatch" in t for t in texts) for texts in said.values()), "a mismatch on both sides"
    )
    assert any("requests reliable, latched" in text for text in said["ros"]), said


def test_another_type_is_said(pair):
    dds, ros = pair
    said = []
    ros.on_qos_mismatch(said.append)
    dds.publisher("/typed", m.BOOL, STATE)
    ros.subscribe("/typed", m.STRING, STATE, lambda x: None)
    until(pair, lambda: any("type mismatch on /typed" in text for text in said), "a type mismatch")


def test_a_killed_writer_is_noticed_by_its_lease(pair):
    _, ros = pair
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\nfrom robot_io.bus import *\n"
        "b = open_bus('dds', 'victim', 70)\np = b.publisher('/victim', 'std_msgs/msg/String', COMMAND)\nb.spin(120)"
    )
    alive = []
    ros.subscribe("/victim", m.STRING, COMMAND, lambda x: None)
    ros.on_liveliness("/victim", alive.append)
    process = subprocess.Popen([sys.executable, "-c", code, str(ROOT)])
    try:
        until(pair, lambda: alive and alive[-1] == 1, "the victim's writer")
    finally:
        process.kill()
        process.wait()
    until(pair, lambda: alive[-1] == 0, "the end of the victim's lease")


def test_the_guard_shares_its_process_with_ros_and_numpy_1_and_imports_nothing_heavy():
    code = (
        "import sys, rclpy, robot_io.bus_rclpy, robot_io.nodes.guard, numpy\n"
        "print(numpy.__version__, *sorted({'torch', 'dita', 'hydra', 'zarr', 'mujoco', 'scipy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    version, *banned = done.stdout.split()
    assert done.returncode == 0 and banned == [], (banned, done.stderr)
    assert version.startswith("1.") or "ROS_DISTRO" not in os.environ, f"ROS 2 pins NumPy 1, here is {version}"


# ---- the lifecycle, over its services


class Blinker:
    def __init__(self, bus):
        self.bus, self.left = bus, -1
        self.light = bus.publisher("/light", m.FLOAT, STATE)
        bus.publisher("/light/kind", m.STRING, LATCHED).publish(bus.msg(m.STRING, data="red"))
        self.rate = bus.param("rate", 100.0)
        if self.rate <= 0:
            raise ValueError("the rate must be positive")
        bus.timer(1.0 / self.rate, self.tick)
        bus.service("/light/set", "std_srvs/srv/SetBool", lambda request: {"success": request.data, "message": "seen"})
        bus.on_stop(self.stop)

    def tick(self):
        self.light.publish(self.bus.msg(m.FLOAT, data=float(self.left)))
        self.left -= self.left > 0
        if self.left == 0:
            self.bus.shutdown()

    def stop(self, reason):
        self.left = 3


@pytest.fixture
def managed():
    made = RclpyBus("blinker", 71, Blinker)
    watcher, seen, kinds = open_bus("dds", "watcher", 71), [], []
    watcher.subscribe("/light", m.FLOAT, STATE, lambda x: seen.append(x.data))
    watcher.subscribe("/light/kind", m.STRING, LATCHED, lambda x: kinds.append(x.data))
    yield SimpleNamespace(bus=made, watcher=watcher, seen=seen, kinds=kinds, spin=(made, watcher))
    watcher.close()
    made.close()


@pytest.mark.parametrize("caller", [71], indirect=True)
def test_lifecycle_transitions_start_brake_and_start_again(managed, caller):
    spin = managed.spin
    assert caller.state("blinker", spin) == "unconfigured"
    assert caller.change("blinker", "configure", spin)
    until(spin, lambda: managed.watcher.writers("/light"), "the configured publisher")
    for bus in spin * 10:
        bus.spin(0.02)
    assert managed.seen == managed.kinds == [], "inactive: nothing leaves"
    assert caller.change("blinker", "activate", spin)
    until(spin, lambda: managed.seen, "messages of the active node")
    until(spin, lambda: managed.kinds == ["red"], "what was latched before the activation")
    request = SetBool.Request()
    request.data = True
    answer = caller.call(SetBool, "/light/set", request, spin)
    assert answer.success and answer.message == "seen"
    assert caller.change("blinker", "deactivate", spin)
    until(spin, lambda: 1.0 in managed.seen, "the last message while braking")
    assert managed.seen[-3:] == [3.0, 2.0, 1.0]
    assert caller.state("blinker", spin) == "inactive" and managed.bus.built is None
    managed.seen.clear()
    assert caller.change("blinker", "activate", spin)
    until(spin, lambda: -1.0 in managed.seen, "messages after the second activation")
    assert caller.change("blinker", "deactivate", spin) and caller.change("blinker", "cleanup", spin)
    assert caller.state("blinker", spin) == "unconfigured"


def test_parameters_are_typed_refused_while_active_and_read_again(managed):
    node = managed.bus._node
    managed.bus.start()
    assert managed.bus.built.rate == 100.0
    (result,) = node.set_parameters([Parameter("rate", value=50.0)])
    assert not result.successful and "deactivate" in result.reason
    node.trigger_deactivate()
    (result,) = node.set_parameters([Parameter("rate", value="fast")])
    assert not result.successful, "another type"
    (result,) = node.set_parameters([Parameter("rate", value=50.0)])
    assert result.successful, result.reason
    node.trigger_activate()
    assert managed.bus.built.rate == 50.0
    node.trigger_deactivate()
    node.trigger_cleanup()
    assert node.set_parameters([Parameter("rate", value=-1.0)])[0].successful
    with pytest.raises(ValueError, match="blinker did not start: the rate must be positive"):
        managed.bus.start()


def test_a_signal_brakes_before_the_node_is_gone(managed):
    managed.bus.start()
    until(managed.spin, lambda: managed.seen, "messages")
    managed.bus.ask_to_leave()
    managed.bus.spin(10.0)
    until((managed.watcher,), lambda: 1.0 in managed.seen, "the last message while braking")
    assert not managed.bus.running


def test_timers_of_a_real_executor_keep_160_hertz_on_average():
    bus, ticks = open_bus("rclpy", "timing", 72), []
    bus.timer(1 / 160, lambda: ticks.append(bus.steady()))
    bus.spin(3.0)
    bus.close()
    assert len(ticks) > 0.9 * 3 * 160, f"{len(ticks)} ticks in 3 s: too busy a machine, or a slow executor"


# ---- the guard, end to end


def guard_command(tmp_path, **parameters):
    path = tmp_path / "arm.json"
    path.write_text(json.dumps(EMBODIMENT))
    values = {**GUARD, "embodiment": path, "require_preflight": "false", **parameters}
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from robot_io.nodes import ros2; ros2.guard()"
    words = [word for name, value in values.items() for word in ("-p", f"{name}:={value}")]
    return [sys.executable, "-c", code, "--ros-args", *words]


class Arm:
    """A point that is where it is told to be, seen and driven over either bus."""

    def __init__(self, kind, domain_id):
        self.bus = open_bus(kind, "arm", domain_id)
        self.at, self.commands, self.said, self.id = np.array(START, float), [], [], 0
        bus = self.bus
        self.pose, self.arm = bus.publisher(topics.TOOL_POSE, m.POSE, STATE), bus.publisher(topics.ARM, m.BOOL, STATE)
        self.chunk = bus.publisher(topics.CHUNK, m.CARTESIAN_TRAJECTORY, COMMAND)
        self.grip = bus.publisher(topics.CHUNK_GRIPPER, m.JOINT_TRAJECTORY, COMMAND)
        self.heartbeat = bus.publisher(topics.HEARTBEAT, m.STRING, STATE)
        contract = bus.publisher(topics.CONTRACT, m.STRING, LATCHED)
        contract.publish(m.json_to_ros(bus.msg, {"embodiment": EMBODIMENT, "hash": "0" * 64}))
        bus.subscribe(topics.TARGET_POSE, m.POSE, COMMAND, self.on_command)
        bus.subscribe(topics.GUARD_STATE, m.STRING, LATCHED, lambda x: self.said.append(m.json_from_ros(x)))
        bus.timer(0.02, self.measure)
        bus.timer(0.1, self.plan)

    def on_command(self, message):
        self.at = m.pose_from_ros(message)[0]
        self.commands.append(self.at)

    def measure(self):
        self.pose.publish(m.pose_to_ros(self.bus.msg, self.bus.now(), self.at, "base_link"))
        self.heartbeat.publish(self.bus.msg(m.STRING, data="policy"))

    def plan(self):
        """Ask for 0.2 m/s along x, back and forth."""
        self.id += 1
        stamp, sign = self.bus.now(), 1.0 if self.at[0] < 0.15 else -1.0
        motion = np.zeros((24, 3))
        motion[:, 0] = 0.0025 * sign
        msg, closing = self.bus.msg, np.full((24, 1), -1.0)
        self.grip.publish(m.joint_chunk_to_ros(msg, stamp, 0.0125, ["effort"], closing, "effort", id=self.id))
        self.chunk.publish(
            m.cartesian_chunk_to_ros(msg, stamp, 0.0125, "hand_delta", "base_link", motion, True, id=self.id)
        )

    def state(self):
        return self.said[-1]["state"] if self.said else ""


@pytest.mark.parametrize("kind", ["dds", "rclpy"])
@pytest.mark.parametrize("caller", [73], indirect=True)
def test_guard_end_to_end_arms_moves_and_brakes(kind, caller, tmp_path):
    env = {**os.environ, "ROS_DOMAIN_ID": "73"}
    process = subprocess.Popen(guard_command(tmp_path), env=env, stderr=subprocess.PIPE, text=True)
    arm = Arm(kind, 73)
    try:
        until([arm.bus], lambda: arm.state() == "IDLE", "the guard's first state")
        request = SetBool.Request()
        request.data = True
        end = time.monotonic() + WAIT_S
        while not (answer := caller.call(SetBool, topics.ARM, request, [arm.bus])).success:
            assert time.monotonic() < end, f"the guard does not arm: {answer.message}"
        until([arm.bus], lambda: len(arm.commands) > 200, f"commands of the armed guard, said {arm.said[-1:]}")
        path = np.array(arm.commands)
        assert np.isfinite(path).all() and np.ptp(path[:, 0]) > 0.02, "it moves"
        limits = EMBODIMENT["limits"]
        assert np.all(path >= limits["workspace_low"]) and np.all(path <= limits["workspace_high"])
        if kind == "rclpy":
            assert caller.change("guard", "deactivate", [arm.bus]), "braking inside the transition"
            assert caller.state("guard", [arm.bus]) == "inactive"
            count = len(arm.commands)
            arm.bus.spin(0.5)
            assert len(arm.commands) <= count + 2, "an inactive guard sends nothing"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)
        assert process.returncode == 0, err
        arm.bus.spin(0.2)
        steps = np.linalg.norm(np.diff(np.array(arm.commands), axis=0), axis=1)
        assert steps[-1] < 0.2 * steps.max(), "the last commands are slower: it braked"
    finally:
        if process.poll() is None:
            process.kill()
            print(process.communicate()[1], file=sys.stderr)
        arm.bus.close()


def test_launch_file_starts_a_guard_and_restarts_a_killed_one_in_idle(tmp_path):
    """Needs the package built and sourced: colcon build --packages-select robot_io && source install/setup.bash."""
    found = subprocess.run(["ros2", "pkg", "prefix", "robot_io"], capture_output=True, text=True)
    if found.returncode:
        pytest.skip("robot_io is not built and sourced here: colcon build --packages-select robot_io")
    path = tmp_path / "arm.json"
    path.write_text(json.dumps(EMBODIMENT))
    off = [f"{name}:=false" for name in ("policy", "preflight", "blackbox", "require_preflight")]
    command = ["ros2", "launch", "robot_io", "dita.launch.py", f"embodiment:={path}", *off]
    log = (tmp_path / "launch.log").open("w")
    env = {**os.environ, "ROS_DOMAIN_ID": "74"}
    process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    bus, said = open_bus("dds", "watcher", 74), []
    bus.subscribe(topics.GUARD_STATE, m.STRING, LATCHED, lambda x: said.append(m.json_from_ros(x)["state"]))
    try:
        until([bus], lambda: said == ["IDLE"], f"the launched guard; see {log.name}", timeout_s=60)
        ours = str(os.getpgid(process.pid))
        listed = subprocess.run(["pgrep", "-g", ours, "-f", "robot_io/guard"], capture_output=True)
        for pid in listed.stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        until([bus], lambda: said == ["IDLE", "IDLE"], f"the restarted guard; see {log.name}", timeout_s=60)
    finally:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        bus.close()
        log.close()
