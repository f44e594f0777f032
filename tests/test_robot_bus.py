"""The contract of a bus, on every bus there is: DDS over the wire between processes, rclpy where it is installed."""

import io
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest

from robot_io import messages as m
from robot_io.bus import COMMAND, LATCHED, SENSOR, STATE, Clock, Qos, open_bus
from robot_io.bus_dds import TYPES, _struct, loopback_check, message

DOMAIN = 61
T = 1_795_471_436.791799  # a stamp of today with all its digits
IMAGE = np.arange(48 * 64 * 3, dtype=np.uint8).reshape(48, 64, 3)
DELTAS = np.random.default_rng([0, 5]).uniform(-0.01, 0.01, (16, 3))
POSES = np.random.default_rng([0, 6]).uniform(-1.0, 1.0, (16, 7))
EXECUTED = m.ExecutedStep(T, 3, 7, T + 0.09, DELTAS[0], DELTAS[1], "policy", 0.25)


def png(rgb: np.ndarray, format: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(rgb).save(buffer, format, **options)
    return buffer.getvalue()


# name -> (type, QoS, build, read, expected)
MESSAGES = {
    "image": (m.IMAGE, SENSOR, lambda g: m.image_to_ros(g, T, IMAGE, "cam"), m.image_from_ros, IMAGE),
    "joints": (m.JOINT_STATE, STATE, lambda g: m.joints_to_ros(g, T, {"b": 1.5, "a": -2.0}), m.joints_from_ros, None),
    "pose": (m.POSE, COMMAND, lambda g: m.pose_to_ros(g, T, [1, 2, 3], "base", [0.5, 0.5, -0.5, 0.5]), None, None),
    "twist": (m.TWIST, COMMAND, lambda g: m.twist_to_ros(g, T, [1, 2, 3], [4, 5, 6], "base"), None, None),
    "array": (m.ARRAY, COMMAND, lambda g: m.array_to_ros(g, np.array([1.0, 2.5])), m.array_from_ros, [1.0, 2.5]),
    "json": (m.STRING, LATCHED, lambda g: m.json_to_ros(g, {"a": [1, None]}), m.json_from_ros, {"a": [1, None]}),
    "bool": (m.BOOL, STATE, lambda g: g(m.BOOL, data=True), lambda x: x.data, True),
    "joint chunk": (
        m.JOINT_TRAJECTORY,
        COMMAND,
        lambda g: m.joint_chunk_to_ros(g, T, 0.0125, ["x", "y", "z"], DELTAS, "velocities"),
        lambda x: m.joint_chunk_from_ros(x, "velocities")[1],
        DELTAS,
    ),
    "delta chunk": (
        m.CARTESIAN_TRAJECTORY,
        COMMAND,
        lambda g: m.cartesian_chunk_to_ros(g, T, 0.0125, "tool", "base", DELTAS, delta=True),
        lambda x: m.cartesian_chunk_from_ros(x, delta=True)[1],
        DELTAS,
    ),
    "position chunk": (
        m.CARTESIAN_TRAJECTORY,
        COMMAND,
        lambda g: m.cartesian_chunk_to_ros(g, T, 0.0125, "tool", "base", DELTAS, delta=False),
        lambda x: m.cartesian_chunk_from_ros(x, delta=False)[1],
        DELTAS,
    ),
    "executed": (
        m.CARTESIAN_TRAJECTORY,
        STATE,
        lambda g: m.executed_to_ros(g, EXECUTED, 0.0125, ["tool"], joint=False),
        lambda x: np.concatenate([m.executed_from_ros(x).target, m.executed_from_ros(x).delta]),
        DELTAS[:2].reshape(-1),
    ),
    "pose chunk": (
        m.CARTESIAN_TRAJECTORY,
        COMMAND,
        lambda g: m.cartesian_chunk_to_ros(g, T, 0.0125, "tool", "base", POSES, delta=False, id=12),
        lambda x: m.cartesian_chunk_from_ros(x, delta=False, rotation=True)[1],
        POSES,
    ),
    "twist chunk": (
        m.CARTESIAN_TRAJECTORY,
        COMMAND,
        lambda g: m.cartesian_chunk_to_ros(g, T, 0.0125, "tool", "base", POSES[:, :6], delta=True, id=12),
        lambda x: m.cartesian_chunk_from_ros(x, delta=True, rotation=True)[1],
        POSES[:, :6],
    ),
    "joint command": (
        m.JOINT_TRAJECTORY,
        COMMAND,
        lambda g: m.joint_command_to_ros(g, T, ["x", "y", "z"], DELTAS[0], DELTAS[1], 0.00625),
        lambda x: np.concatenate([x.points[0].positions, x.points[0].velocities]),
        DELTAS[:2].reshape(-1),
    ),
    "compressed": (
        m.COMPRESSED_IMAGE,
        SENSOR,
        lambda g: m.compressed_to_ros(g, T, png(IMAGE), "cam", "png"),
        m.compressed_from_ros,
        IMAGE,
    ),
    "float": (m.FLOAT, STATE, lambda g: m.float_to_ros(g, 0.25), m.float_from_ros, 0.25),
    "diagnostics": (
        m.DIAGNOSTICS,
        STATE,
        lambda g: m.diagnostics_to_ros(g, T, "guard", 1, "late", {"overruns": 3}),
        lambda x: m.diagnostics_from_ros(x, "guard"),
        {"guard": {"level": 1, "message": "late", "values": {"overruns": "3"}}},
    ),
}

ECHO = """
import sys
sys.path[:0] = sys.argv[3:]
from test_robot_bus import MESSAGES
from robot_io.bus import open_bus
bus = open_bus(sys.argv[1], "echo", int(sys.argv[2]))
for name, (type, qos, *_) in MESSAGES.items():
    topic = "/" + name.replace(" ", "_")
    publisher = bus.publisher(topic + "/back", type, qos)
    bus.subscribe(topic, type, qos, publisher.publish)
bus.spin(60)
"""


BUSES = ["dds", pytest.param("rclpy", marks=pytest.mark.ros2)]


@pytest.fixture(scope="module", params=BUSES)
def bus(request):
    if request.param == "rclpy":
        pytest.importorskip("rclpy")
    made = open_bus(request.param, "tester", DOMAIN)
    yield made
    made.close()


@pytest.fixture(scope="module")
def echo(bus):
    kind = "dds" if type(bus).__name__ == "DdsBus" else "rclpy"
    here = os.path.dirname(__file__)
    process = subprocess.Popen([sys.executable, "-c", ECHO, kind, str(DOMAIN), here, os.path.dirname(here)])
    yield process
    process.kill()
    process.wait()


def until(bus, condition, again=lambda: None, timeout_s=10.0):
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "nothing came"
        again()
        bus.spin(0.05)


@pytest.mark.parametrize("name", MESSAGES)
def test_every_message_survives_the_wire_and_back(bus, echo, name):
    kind, qos, build, read, expected = MESSAGES[name]
    topic, back = "/" + name.replace(" ", "_"), []
    publisher = bus.publisher(topic, kind, qos)
    bus.subscribe(topic + "/back", kind, qos, back.append)
    bus.wait_for_writer(topic + "/back", kind, qos, 20.0)
    sent = build(bus.msg)
    until(bus, lambda: back, lambda: publisher.publish(sent))
    if hasattr(back[0], "header"):
        assert m.stamp_of(back[0]) == (EXECUTED.stamp if name == "executed" else T), "exactly"
    if name == "pose":
        np.testing.assert_array_equal(np.concatenate(m.pose_from_ros(back[0])), [1, 2, 3, 0.5, 0.5, -0.5, 0.5])
        assert back[0].pose.orientation.w == 0.5 and back[0].pose.orientation.y == -0.5, "xyzw on the wire"
    elif name == "twist":
        np.testing.assert_array_equal(np.concatenate(m.twist_from_ros(back[0])), [1, 2, 3, 4, 5, 6])
    elif name == "joints":
        assert read(back[0]) == {"b": 1.5, "a": -2.0}
    elif isinstance(expected, np.ndarray):
        np.testing.assert_allclose(read(back[0]), expected, rtol=1e-15, atol=0)
    else:
        np.testing.assert_equal(read(back[0]), expected)
    if name == "image":
        image = read(back[0])
        assert image.base is not None and not image.flags.owndata, "a view, not a copy"
    if name == "executed":
        step = m.executed_from_ros(back[0])
        assert (step.chunk, step.id, step.index, step.source, step.gripper) == (T, 3, 7, "policy", 0.25)


def test_late_joiner_gets_what_is_latched(bus):
    publisher = bus.publisher("/latched", m.STRING, LATCHED)
    publisher.publish(bus.msg(m.STRING, data="first"))
    publisher.publish(bus.msg(m.STRING, data="last"))
    heard = []
    bus.subscribe("/latched", m.STRING, LATCHED, lambda x: heard.append(x.data))
    until(bus, lambda: heard)
    assert heard == ["last"]


def test_writers_are_listed_by_node_type_and_qos(bus, echo):
    bus.wait_for_writer("/bool/back", m.BOOL, STATE, 20.0)
    writers = bus.writers("/bool/back")
    assert [(w.node, w.type) for w in writers] == [("echo", m.BOOL)]
    assert writers[0].qos.reliable and not writers[0].qos.latched
    assert bus.writers("/nobody") == []


def test_peer_that_never_appears_is_named_with_type_qos_and_time(bus):
    with pytest.raises(TimeoutError, match=r"no publisher on /missing of sensor_msgs/msg/Image \(best effort.*0\.2 s"):
        bus.wait_for_writer("/missing", m.IMAGE, SENSOR, 0.2)


def test_peer_of_another_qos_is_shown(bus):
    bus.publisher("/weak", m.STRING, SENSOR)
    with pytest.raises(TimeoutError, match=r"tester offers std_msgs/msg/String \(best effort"):
        bus.wait_for_writer("/weak", m.STRING, LATCHED, 0.3)


def test_qos_mismatch_says_who_offers_what(bus):
    said = []
    bus.on_qos_mismatch(said.append)
    bus.publisher("/mismatch", m.STRING, SENSOR)
    bus.subscribe("/mismatch", m.STRING, LATCHED, lambda x: None)
    until(bus, lambda: len(said) >= 2)
    text = " ".join(said)
    assert "QoS mismatch on /mismatch" in text and "best effort" in text and "latched" in text


def test_killed_writer_is_noticed_by_its_lease(bus):
    code = (
        "from robot_io.bus import *\nimport sys\n"
        "b = open_bus(sys.argv[1], 'victim', int(sys.argv[2]))\n"
        "p = b.publisher('/victim', 'std_msgs/msg/String', COMMAND)\nb.spin(60)"
    )
    alive = []
    bus.subscribe("/victim", m.STRING, COMMAND, lambda x: None)
    bus.on_liveliness("/victim", alive.append)
    kind = "dds" if type(bus).__name__ == "DdsBus" else "rclpy"
    process = subprocess.Popen([sys.executable, "-c", code, kind, str(DOMAIN)])
    until(bus, lambda: alive == [1], timeout_s=20.0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    begin = time.monotonic()
    until(bus, lambda: alive == [1, 0])
    assert time.monotonic() - begin < 2.0


def test_timers_keep_their_grid_and_shutdown_ends_spin(bus):
    own = open_bus("dds" if type(bus).__name__ == "DdsBus" else "rclpy", "timing", DOMAIN)
    calls = []

    def tick():
        calls.append(own.steady())
        if len(calls) == 3:
            time.sleep(0.05)  # misses ticks, which are not made up for
        if len(calls) == 8:
            own.shutdown()

    own.timer(0.02, tick)
    own.spin(5.0)
    own.close()
    assert len(calls) == 8
    gaps = np.diff(calls)
    assert gaps[2] >= 0.05 and np.sum(gaps < 0.005) <= 1


def test_messages_refuse_unknown_names(bus):
    with pytest.raises(ValueError, match="no message type 'nope/msg/Nope'"):
        bus.msg("nope/msg/Nope")
    with pytest.raises(ValueError, match="has no field colour"):
        bus.msg(m.STRING, colour="red")
    assert bus.msg(m.POSE).pose.position.x == 0.0


# ---- without a wire


def test_loopback_check_finds_nothing_wrong_here():
    assert loopback_check(timeout_s=10.0) is None


def test_every_jazzy_type_has_a_struct_a_default_and_a_hash():
    for name in TYPES.types:
        _struct(name).__idl__.fill_type_data()
        data = TYPES.serialize_cdr(message(name), name)
        TYPES.deserialize_cdr(data, name)
        assert TYPES.hash_rihs01(name).startswith("RIHS01_")
    assert _struct(m.POSE).__idl_typename__ == "geometry_msgs.msg.dds_.PoseStamped_"
    known = "RIHS01_df668c740482bbd48fb39d76a70dfd4bd59db1288021743503259e948f6b1a18"  # ROS 2's own for String
    assert TYPES.hash_rihs01(m.STRING) == known


def test_qos_satisfies_as_dds_says():
    strong, weak = Qos(True, True, 1, 0.1), Qos(False, False, 1, None)
    assert strong.satisfies(weak) and not weak.satisfies(strong)
    assert not Qos(True, False, 1, None).satisfies(Qos(True, True, 1, None))
    assert not Qos(True, True, 1, 0.2).satisfies(strong), "a longer lease is less"


def test_slow_clock_runs_at_its_rate():
    clock = Clock(0.5)
    begin, real = clock.steady(), time.monotonic()
    time.sleep(0.05)
    assert clock.steady() - begin == pytest.approx(0.5 * (time.monotonic() - real), rel=0.1)
    with pytest.raises(ValueError, match="rate"):
        Clock(2.0)
    with pytest.raises(ValueError, match="no bus 'can'"):
        open_bus("can", "x", 0)


def test_images_of_other_layouts():
    bgr = m.image_to_ros(message, T, IMAGE[..., ::-1], "cam")
    bgr.encoding = "bgr8"
    np.testing.assert_array_equal(m.image_from_ros(bgr), IMAGE)
    padded = message(m.IMAGE, height=2, width=1, step=5, encoding="rgb8", data=np.arange(10))
    np.testing.assert_array_equal(m.image_from_ros(padded), [[[0, 1, 2]], [[5, 6, 7]]])
    padded.height = 3
    with pytest.raises(ValueError, match="needs 15 bytes, got 10"):
        m.image_from_ros(padded)
    padded.encoding = "mono8"
    with pytest.raises(ValueError, match="'mono8' is not supported; send rgb8, bgr8, rgba8, bgra8"):
        m.image_from_ros(padded)
    with pytest.raises(ValueError, match="of 48 x 64, but the embodiment's camera has 64 x 48"):
        m.image_from_ros(bgr, (64, 48))


@pytest.mark.parametrize(("encoding", "order"), [("rgba8", [0, 1, 2, 3]), ("bgra8", [2, 1, 0, 3])])
def test_alpha_is_left_out(encoding, order):
    four = np.dstack([IMAGE, np.full(IMAGE.shape[:2], 7, np.uint8)])[..., order]
    image = message(m.IMAGE, height=48, width=64, step=256, encoding=encoding, data=four.reshape(-1))
    np.testing.assert_array_equal(m.image_from_ros(image, (48, 64)), IMAGE)


def test_compressed_images_are_rgb_whoever_encoded_them():
    smooth = np.full((48, 64, 3), (200, 100, 50), np.uint8)
    jpeg = m.compressed_to_ros(message, T, png(smooth, "JPEG", quality=95), "cam")
    assert np.abs(m.compressed_from_ros(jpeg, (48, 64)).astype(int) - smooth).max() <= 3
    jpeg.format = "rgb8; jpeg compressed bgr8"
    assert np.abs(m.compressed_from_ros(jpeg).astype(int) - smooth).max() <= 3
    swapped = m.compressed_to_ros(message, T, png(IMAGE[..., ::-1]), "cam", "rgb8; png compressed rgb8")
    np.testing.assert_array_equal(m.compressed_from_ros(swapped), IMAGE)
    alpha = np.dstack([IMAGE, np.full(IMAGE.shape[:2], 7, np.uint8)])
    np.testing.assert_array_equal(m.compressed_from_ros(m.compressed_to_ros(message, T, png(alpha), "c", "png")), IMAGE)


@pytest.mark.parametrize(
    ("data", "format", "size", "says"),
    [
        (png(IMAGE), "16UC1; compressedDepth png", None, "compressedDepth png' is not supported; send jpeg or png"),
        (png(IMAGE), "tiff", None, "'tiff' is not supported"),
        (png(IMAGE)[:100], "png", None, "of 100 bytes cannot be decoded"),
        (b"GIF89a", "png", None, "cannot be decoded"),
        (png(IMAGE), "png", (64, 48), "of 48 x 64, but the embodiment's camera has 64 x 48"),
        (png(IMAGE[..., 0]), "png", None, "channels 'L' is not supported"),
        (png(np.zeros((8192, 8192, 3), np.uint8)), "png", None, "of 8192 x 8192 is larger than"),
    ],
)
def test_compressed_images_that_are_something_else_are_refused(data, format, size, says):
    with pytest.raises(ValueError, match=says):
        m.compressed_from_ros(m.compressed_to_ros(message, T, data, "cam", format), size)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x: setattr(x, "name", ["a", "a"]), "unique names, got a twice in a, a"),
        (lambda x: setattr(x, "position", np.zeros(1)), "one position per name, got 1 for a, b"),
        (lambda x: setattr(x, "position", np.zeros(0)), "one position per name, got 0 for a, b"),
    ],
)
def test_broken_joint_states_are_refused(change, says):
    joints = m.joints_to_ros(message, T, {"a": 1.0, "b": 2.0})
    change(joints)
    with pytest.raises(ValueError, match=says):
        m.joints_from_ros(joints)


def test_broken_chunks_are_refused():
    chunk = m.cartesian_chunk_to_ros(message, T, 0.0125, "tool", "base", DELTAS, delta=True)
    assert not chunk.points[0].transforms and len(chunk.points[0].velocities) == 1
    assert chunk.points[3].time_from_start.nanosec == 50_000_000
    with pytest.raises(ValueError, match="needs one entry in transforms"):
        m.cartesian_chunk_from_ros(chunk, delta=False)
    chunk.points.pop(3)
    with pytest.raises(ValueError, match="evenly spaced"):
        m.cartesian_chunk_from_ros(chunk, delta=True)
    chunk.points.clear()
    with pytest.raises(ValueError, match="at least one point"):
        m.cartesian_chunk_from_ros(chunk, delta=True)
    joint = m.joint_chunk_to_ros(message, T, 0.1, ["a"], np.ones((2, 1)), "positions")
    with pytest.raises(ValueError, match="needs 1 effort"):
        m.joint_chunk_from_ros(joint, "effort")
    with pytest.raises(ValueError, match="a where b, c are expected: missing b, c, unknown a"):
        m.joint_chunk_from_ros(joint, "positions", ["b", "c"])
    with pytest.raises(ValueError, match="twice a"):
        m.order_of(["a", "b"], ["a", "b", "a"])
    with pytest.raises(ValueError, match="no quantity 'torque'"):
        m.joint_chunk_to_ros(message, T, 0.1, ["a"], np.ones((2, 1)), "torque")


def test_a_chunk_that_turns_an_arm_without_rotation_is_refused():
    turning = m.cartesian_chunk_to_ros(message, T, 0.1, "tool", "base", POSES, delta=False)
    with pytest.raises(ValueError, match="turns the tool, but this embodiment's actions have no rotation"):
        m.cartesian_chunk_from_ros(turning, delta=False)
    turning = m.cartesian_chunk_to_ros(message, T, 0.1, "tool", "base", POSES[:, :6], delta=True)
    assert turning.points[2].velocities[0].angular.x == pytest.approx(POSES[2, 3] / 0.1), "rotation vector / dt"
    with pytest.raises(ValueError, match="turns the tool"):
        m.cartesian_chunk_from_ros(turning, delta=True)


def test_chunks_carry_their_id_and_joints_map_by_name():
    tool = m.cartesian_chunk_to_ros(message, T, 0.1, "tool", "base", DELTAS, delta=True, id=41)
    assert m.chunk_id_of(tool) == 41 and tool.header.frame_id == "base", "a frame of TF"
    joint = m.joint_chunk_to_ros(message, T, 0.1, ["a", "b"], np.array([[1.0, 2.0]]), "positions", id=42)
    assert m.chunk_id_of(joint) == 42 and joint.joint_names == ["a", "b"], "names a controller knows"
    np.testing.assert_array_equal(m.joint_chunk_from_ros(joint, "positions", ["b", "a"])[1], [[2.0, 1.0]])
    assert m.chunk_id_of(m.cartesian_chunk_to_ros(message, T, 0.1, "tool", "base", DELTAS, delta=True)) == 0
    tool.joint_names = ["tool#1e5"]
    with pytest.raises(ValueError, match="id must be a number, got 'tool#1e5'"):
        m.chunk_id_of(tool)


@pytest.mark.parametrize(("joint", "target", "delta"), [(True, 7, 7), (False, 7, 6), (False, 3, 3)])
def test_an_executed_step_says_which_of_whose_chunk_and_reads_as_a_trajectory(joint, target, delta):
    target, delta = POSES[0, :target], POSES[1, :delta]
    step = m.ExecutedStep(T, 9, 2, T + 0.3, target, delta, "teleop")
    sent = m.executed_to_ros(message, step, 0.1, ["tool"] if not joint else list("abcdefg"), joint)
    assert m.stamp_of(sent) == T + 0.3 and sent.points[0].time_from_start.nanosec == 100_000_000
    back = m.executed_from_ros(sent, rotation=len(delta) == 6)
    np.testing.assert_allclose(back.target, target, rtol=1e-15)
    np.testing.assert_allclose(back.delta, delta, rtol=1e-15)
    assert (back.chunk, back.id, back.index, back.source, back.gripper) == (T, 9, 2, "teleop", None)
    with pytest.raises(ValueError, match="not an executed step: 'base'"):
        m.executed_from_ros(m.cartesian_chunk_to_ros(message, T, 0.1, "tool", "base", DELTAS[:1], delta=True))
    with pytest.raises(ValueError, match="no slash"):
        m.executed_to_ros(message, m.ExecutedStep(T, 9, 2, T, target, delta, "a/b"), 0.1, ["tool"], joint)


def test_joint_states_carry_velocities_by_name():
    state = m.joints_to_ros(message, T, {"b": 1.0, "a": 2.0}, {"a": 0.2, "b": 0.1})
    assert m.joints_from_ros(state) == {"b": 1.0, "a": 2.0}
    assert m.joint_velocities_from_ros(state) == {"b": 0.1, "a": 0.2}
    assert m.joint_velocities_from_ros(m.joints_to_ros(message, T, {"a": 1.0})) == {}
    state.velocity = np.zeros(1)
    with pytest.raises(ValueError, match="one velocity per name, got 1 for b, a"):
        m.joint_velocities_from_ros(state)


def test_numbers_and_grippers_are_checked():
    assert m.float_from_ros(m.float_to_ros(message, 0.5)) == 0.5
    with pytest.raises(ValueError, match="not finite"):
        m.float_from_ros(m.float_to_ros(message, float("nan")))
    closing = m.gripper_to_ros(message, T, ["left", "right"], 0.04, "positions", 0.1)
    grip = m.gripper_command_to_ros(lambda type, **fields: SimpleNamespace(type=type, **fields), 0.03)
    assert grip.type == "control_msgs/msg/GripperCommand" and grip.max_effort == 0.0
    assert m.gripper_command_from_ros(grip) == 0.03
    assert closing.joint_names == ["left", "right"] and list(closing.points[0].positions) == [0.04, 0.04]
