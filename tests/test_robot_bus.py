"""The contract of a bus, on every bus there is: DDS over the wire between processes, rclpy where it is installed.

"fake rclpy" runs the rclpy bus's own code over `fake_rclpy.py`, which is no ROS 2: only "rclpy" tells about a real one.
"""

import gc
import io
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace
from xml.etree import ElementTree

import fake_rclpy
import numpy as np
import PIL.Image
import pytest

from robot_io import messages as m
from robot_io.bus import COMMAND, LATCHED, SENSOR, STATE, Clock, Qos, Services, TypeWatch, Writer, open_bus
from robot_io.bus_dds import TYPES, DdsBus, _struct, loopback_check, message, network_of

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

START = """
import sys
sys.path[:0] = sys.argv[3:]
kind, domain = sys.argv[1], int(sys.argv[2])
if kind == "fake rclpy":
    import fake_rclpy
    fake_rclpy.install()
from robot_io.bus import *
from robot_io.bus import open_bus as open
from robot_io import messages as m
"""
ECHO = """
from test_robot_bus import MESSAGES
bus = open(kind.split()[-1], "echo", domain)
for name, (type, qos, *_) in MESSAGES.items():
    topic = "/" + name.replace(" ", "_")
    publisher = bus.publisher(topic + "/back", type, qos)
    bus.subscribe(topic, type, qos, publisher.publish)
bus.spin(60)
"""
# ends with 3 once its publisher has been at rest for a while after an exception; prints what happened
BRAKING = """
import time
bus = open(kind.split()[-1], "braking", domain)
left = [5]
def tick():
    if left[0] < 5:
        left[0] -= 1
    if left[0] == 0:
        bus.shutdown()
def stop(reason):
    left[0] = 4
    print("asked:", reason, flush=True)
def wrong(message):
    raise RuntimeError("no such thing")
bus.on_stop(stop)
bus.timer(0.01, tick)
bus.subscribe("/wrong", m.STRING, LATCHED, wrong)
bus.publisher("/wrong", m.STRING, LATCHED).publish(bus.msg(m.STRING, data="x"))
try:
    bus.spin(20)
except RuntimeError as e:
    print("raised:", e, "left:", left[0], flush=True)
bus.close()
"""


def start(kind, code, **options):
    here = os.path.dirname(__file__)
    arguments = [sys.executable, "-c", START + code, kind, str(DOMAIN), here, os.path.dirname(here)]
    return subprocess.Popen(arguments, text=True, **options)


@pytest.fixture(scope="module", params=["dds", "fake rclpy", pytest.param("rclpy", marks=pytest.mark.ros2)])
def kind(request):
    if request.param == "fake rclpy":
        with fake_rclpy.installed():
            yield request.param
        return
    if request.param == "rclpy":
        pytest.importorskip("rclpy")
    yield request.param


@pytest.fixture(scope="module")
def bus(kind):
    made = open_bus(kind.split()[-1], "tester", DOMAIN)
    yield made
    made.close()


@pytest.fixture
def second(kind):
    """A second node in this process."""
    made = open_bus(kind.split()[-1], "second", DOMAIN)
    yield made
    made.close()


@pytest.fixture(scope="module")
def echo(bus, kind):
    process = start(kind, ECHO)
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
    # an echo that was killed before this one is remembered for its lease of 3 s
    until(bus, lambda: [(w.node, w.type) for w in bus.writers("/bool/back")] == [("echo", m.BOOL)])
    writers = bus.writers("/bool/back")
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


def test_another_type_on_a_topic_is_said_once(bus, second):
    said = []
    bus.on_qos_mismatch(said.append)
    second.publisher("/typed", m.BOOL, STATE)
    bus.subscribe("/typed", m.STRING, STATE, lambda x: None)
    until(bus, lambda: said)
    bus.spin(1.2)
    mine = [text for text in said if "/typed" in text]
    assert mine == [
        f"type mismatch on /typed: tester requests {m.STRING}, second offers {m.BOOL}. Do not expect its messages"
    ]


def test_killed_writer_is_noticed_by_its_lease(bus, kind):
    code = "b = open(kind.split()[-1], 'victim', domain)\np = b.publisher('/victim', m.STRING, COMMAND)\nb.spin(60)"
    alive = []
    with pytest.raises(ValueError, match="subscribe to /victim before"):
        bus.on_liveliness("/victim", alive.append)
    bus.subscribe("/victim", m.STRING, COMMAND, lambda x: None)
    bus.on_liveliness("/victim", alive.append)
    process = start(kind, code)
    until(bus, lambda: alive == [1], timeout_s=20.0)
    process.send_signal(signal.SIGKILL)
    process.wait()
    begin = time.monotonic()
    until(bus, lambda: alive == [1, 0])
    assert time.monotonic() - begin < 2.0


def test_timers_keep_their_grid_and_shutdown_ends_spin(second):
    calls = []

    def tick():
        calls.append(second.steady())
        if len(calls) == 3:
            time.sleep(0.05)  # misses ticks, which are not made up for
        if len(calls) == 8:
            second.shutdown()

    second.timer(0.02, tick)
    assert second.running
    second.spin(5.0)
    assert len(calls) == 8 and not second.running
    gaps = np.diff(calls)
    assert gaps[2] >= 0.05 and np.sum(gaps < 0.005) <= 1


def test_what_is_not_urgent_comes_before_what_is_if_it_was_subscribed_to_before(bus, second, kind):
    heard, states, images = [], bus.publisher("/state", m.FLOAT, STATE), bus.publisher("/image", m.FLOAT, STATE)
    second.subscribe("/state", m.FLOAT, STATE, lambda x: heard.append(("state", x.data)), urgent=False)
    second.subscribe("/image", m.FLOAT, STATE, lambda x: heard.append(("image", x.data)))
    until(second, lambda: heard[-1:] == [("image", 0.0)], lambda: images.publish(bus.msg(m.FLOAT, data=0.0)))
    until(second, lambda: ("state", 0.0) in heard, lambda: states.publish(bus.msg(m.FLOAT, data=0.0)))
    second.spin(0.2)
    del heard[:]
    for i in (1.0, 2.0):
        states.publish(bus.msg(m.FLOAT, data=i))
    time.sleep(0.1)
    images.publish(bus.msg(m.FLOAT, data=3.0))
    until(second, lambda: len(heard) == 3)
    if kind == "dds":
        assert heard == [("state", 1.0), ("state", 2.0), ("image", 3.0)]
    assert sorted(heard) == [("image", 3.0), ("state", 1.0), ("state", 2.0)]
    states.publish(bus.msg(m.FLOAT, data=4.0))  # nothing else comes but the bus's own timers
    until(second, lambda: heard[-1] == ("state", 4.0))


def test_messages_without_end_do_not_starve_a_timer(second):
    """Each message calls for the next one: a bus that served all of them first would never come to the timer."""
    heard, ticks = [], []
    publisher = second.publisher("/endless", m.ARRAY, COMMAND)
    message = m.array_to_ros(second.msg, np.zeros(100))

    def again(message):
        heard.append(1)
        publisher.publish(message)

    def tick():
        ticks.append(1)
        if not heard:
            publisher.publish(message)
        if len(ticks) >= 160 and len(heard) > 100:
            second.shutdown()

    second.subscribe("/endless", m.ARRAY, COMMAND, again)
    second.timer(1 / 160, tick)
    second.spin(30.0)
    assert len(ticks) >= 160 and len(heard) > 100


def test_two_readers_and_two_writers_of_one_topic(bus, second):
    first, other = [], []
    bus.subscribe("/twice", m.STRING, STATE, lambda x: first.append(x.data))
    bus.subscribe("/twice", m.STRING, STATE, lambda x: other.append(x.data))
    publishers = {"a": bus.publisher("/twice", m.STRING, STATE), "b": second.publisher("/twice", m.STRING, STATE)}

    def send():
        for name, publisher in publishers.items():
            publisher.publish(bus.msg(m.STRING, data=name))

    until(bus, lambda: set(first) == set(other) == {"a", "b"}, send)
    assert sorted(w.node for w in bus.writers("/twice")) == ["second", "tester"]


def test_latched_depth_is_how_many_a_late_joiner_gets_and_in_order(bus):
    deep = Qos(reliable=True, latched=True, depth=3, lease_s=None)
    publisher = bus.publisher("/deep", m.STRING, deep)
    for i in range(5):
        publisher.publish(bus.msg(m.STRING, data=str(i)))
    heard = []
    bus.subscribe("/deep", m.STRING, deep, lambda x: heard.append(x.data))
    until(bus, lambda: len(heard) >= 3)
    bus.spin(0.3)
    assert heard == ["2", "3", "4"]


def test_an_image_of_six_megabytes_arrives_whole(bus):
    image = np.random.default_rng([0, 7]).integers(0, 256, (1080, 1920, 3), np.uint8)
    heard = []
    publisher = bus.publisher("/large", m.IMAGE, STATE)
    bus.subscribe("/large", m.IMAGE, STATE, heard.append)
    sent = m.image_to_ros(bus.msg, T, image, "cam")
    until(bus, lambda: heard, lambda: publisher.publish(sent), timeout_s=30.0)
    np.testing.assert_array_equal(m.image_from_ros(heard[0]), image)


def test_an_exception_in_a_callback_ends_spin(second):
    def wrong():
        raise ZeroDivisionError("in a timer")

    second.timer(0.01, wrong)
    with pytest.raises(ZeroDivisionError, match="in a timer"):
        second.spin(5.0)


def test_after_an_exception_the_node_brakes_first_and_then_spin_raises(kind):
    process = start(kind, BRAKING, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert out.splitlines() == [
        "asked: RuntimeError: no such thing",
        "raised: no such thing left: 0",
    ], err
    assert err.count("stopping: RuntimeError: no such thing") == 1


def test_a_node_that_fails_at_every_tick_is_not_waited_for_for_ever(second, monkeypatch):
    import robot_io.bus as bus_module

    monkeypatch.setattr(bus_module, "BRAKE_S", 0.2)
    asked, ticks = [], []

    def wrong():
        ticks.append(1)
        raise ValueError(f"tick {len(ticks)}")

    second.on_stop(asked.append)
    second.timer(0.01, wrong)
    with pytest.raises(ValueError, match=r"^tick 1$"):
        second.spin(20.0)
    assert asked == ["ValueError: tick 1"] and len(ticks) > 1, "asked once, and given time to come to rest"


def test_a_stop_that_fails_ends_the_node_at_once(second):
    def wrong(*_):
        raise KeyError("both")

    second.on_stop(wrong)
    second.timer(0.01, wrong)
    begin = time.monotonic()
    with pytest.raises(KeyError, match="both"):
        second.spin(20.0)
    assert time.monotonic() - begin < 10.0


def test_services_exist_where_the_middleware_has_them(second, kind):
    assert isinstance(second, Services) == (kind != "dds")


def test_a_timer_needs_a_period(second):
    with pytest.raises(ValueError, match="period must be positive"):
        second.timer(0.0, lambda: None)


def test_messages_refuse_unknown_names(bus):
    with pytest.raises(ValueError, match="no message type 'nope/msg/Nope'"):
        bus.msg("nope/msg/Nope")
    with pytest.raises(ValueError, match="has no field colour"):
        bus.msg(m.STRING, colour="red")
    assert bus.msg(m.POSE).pose.position.x == 0.0


# ---- the DDS bus alone


def test_bytes_that_are_no_message_are_said_and_end_nobody(capfd, monkeypatch):
    bus, rogue = DdsBus("bytes", DOMAIN), DdsBus("rogue", DOMAIN)
    heard = []
    bus.subscribe("/bytes", m.STRING, STATE, lambda x: heard.append(x.data))
    publisher = rogue.publisher("/bytes", m.STRING, STATE)

    decode = TYPES.deserialize_cdr

    def fail(data, type):  # CycloneDDS itself refuses to send what is broken
        if b"bad" in bytes(data):
            raise UnicodeDecodeError("utf-8", b"bad", 0, 1, "as if")
        return decode(data, type)

    monkeypatch.setattr(TYPES, "deserialize_cdr", fail)

    def send():
        publisher.publish(message(m.STRING, data="bad"))
        publisher.publish(message(m.STRING, data="fine"))

    until(bus, lambda: len(heard) > 12, send)
    assert set(heard) == {"fine"}, "a bad one takes no good one with it"
    err = capfd.readouterr().err
    assert f"1 message on /bytes cannot be read as {m.STRING}: 'utf-8'" in err and "10 messages on /bytes" in err
    assert err.count("\n") == 2, "a flood of them is not a flood of lines"
    rogue.close()
    bus.close()


def test_no_message_waits_for_its_serialiser_to_be_compiled(monkeypatch):
    def late(lines):
        raise AssertionError("compiled in the middle of a guard's ticks")

    TYPES.cache.clear()
    _struct.cache_clear()
    bus, heard = DdsBus("compiled", DOMAIN), []
    bus.subscribe("/compiled", m.JOINT_STATE, STATE, lambda x: heard.append(x.name))
    publisher = bus.publisher("/compiled", m.JOINT_STATE, STATE)
    monkeypatch.setattr("rosbags.serde.cdr.compile_lines", late)
    until(bus, lambda: heard, lambda: publisher.publish(m.joints_to_ros(message, T, {"a": 1.0})))
    assert heard[0] == ["a"]
    bus.close()


def test_closing_twice_and_publishing_afterwards_is_quiet():
    bus = DdsBus("closing", DOMAIN)
    publisher = bus.publisher("/closing", m.STRING, STATE)
    bus.subscribe("/closing", m.STRING, STATE, lambda x: None)
    bus.close()
    publisher.publish(message(m.STRING, data="from a thread that is still running"))
    bus.close()
    del bus, publisher
    gc.collect()  # cyclonedds deletes entities when their last reference goes: it must not do it a second time
    again = DdsBus("closing", DOMAIN)
    heard = []
    publisher = again.publisher("/closing", m.STRING, LATCHED)
    publisher.publish(message(m.STRING, data="alive"))
    again.subscribe("/closing", m.STRING, LATCHED, lambda x: heard.append(x.data))
    until(again, lambda: heard)
    again.close()


def test_type_watch_tells_another_definition_of_the_same_name():
    watch = TypeWatch("me")
    writers = [Writer("old", m.STRING, STATE, "RIHS01_a"), Writer("same", m.STRING, STATE, "RIHS01_b")]
    writers.append(Writer("silent", m.STRING, STATE))
    said = list(watch.look("/x", m.STRING, "RIHS01_b", writers))
    assert said == [
        f"type mismatch on /x: me requests {m.STRING}, old offers {m.STRING} of another definition. "
        "Do not expect its messages"
    ]
    assert not list(watch.look("/x", m.STRING, "RIHS01_b", writers))


def test_the_network_is_loopback_unless_asked(monkeypatch):
    for name in ("ROS_AUTOMATIC_DISCOVERY_RANGE", "ROS_STATIC_PEERS", "DITA_TEST_LOSS_PERMILLE"):
        monkeypatch.delenv(name, raising=False)
    local = ElementTree.fromstring(network_of())
    assert local.find(".//NetworkInterface").get("name") == "lo"
    assert local.findtext(".//AllowMulticast") == "false" and local.find(".//Test") is None
    subnet = ElementTree.fromstring(network_of("SUBNET", interface="eth7"))
    assert subnet.findtext(".//AllowMulticast") == "true" and subnet.find(".//Peers") is None
    assert subnet.find(".//NetworkInterface").get("name") == "eth7"
    several = ElementTree.fromstring(network_of(peers=["10.0.0.5", "robot.local"]))
    assert several.findtext(".//AllowMulticast") == "false", "unicast and multicast together find nobody"
    assert [p.get("address") for p in several.iter("Peer")] == ["127.0.0.1", "10.0.0.5", "robot.local"]
    assert several.find(".//NetworkInterface") is None, "not lo: the other machines are somewhere else"


def test_ros_own_variables_choose_the_network(monkeypatch):
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "SUBNET")
    monkeypatch.delenv("ROS_STATIC_PEERS", raising=False)
    assert "<AllowMulticast>true" in network_of() and "<AllowMulticast>false" in network_of("LOCALHOST")
    monkeypatch.setenv("ROS_STATIC_PEERS", "10.0.0.5; 10.0.0.6")
    with pytest.raises(ValueError, match=r"SUBNET is multicast, the peers 10\.0\.0\.5, 10\.0\.0\.6 are unicast"):
        network_of()
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "LOCALHOST")
    assert network_of().count("<Peer ") == 3
    monkeypatch.setenv("ROS_AUTOMATIC_DISCOVERY_RANGE", "OFF")
    with pytest.raises(ValueError, match="'OFF' is not known here; there are LOCALHOST, SUBNET"):
        network_of()
    monkeypatch.setenv("DITA_TEST_LOSS_PERMILLE", "50")
    assert "<XmitLossiness>50</XmitLossiness>" in network_of("LOCALHOST")


@pytest.mark.parametrize(
    "arguments", [{"peers": ['1.2.3.4"/><x']}, {"interface": "lo<"}, {"loss_permille": 1001}, {"loss_permille": -1}]
)
def test_nothing_else_gets_into_the_networks_xml(arguments):
    with pytest.raises(ValueError, match="not an address, an interface or a loss"):
        network_of("LOCALHOST", **{"peers": [], **arguments})


def test_one_domain_has_one_network_per_process():
    first = open_bus("dds", "first", DOMAIN + 1)
    with pytest.raises(ValueError, match="on domain 62 with another discovery"):
        open_bus("dds", "other", DOMAIN + 1, loss_permille=10)
    first.close()
    with pytest.raises(ValueError, match="takes its network from ROS"), fake_rclpy.installed():
        open_bus("rclpy", "other", DOMAIN + 1, peers=["10.0.0.5"])


def test_a_dds_node_hears_and_watches_a_remapped_topic_under_its_other_name():
    arm, node = DdsBus("arm", DOMAIN), open_bus("dds", "node", DOMAIN, remap=["/tool_pose:=/left/tool_pose"])
    heard = []
    node.subscribe("/tool_pose", m.BOOL, LATCHED, lambda x: heard.append(x.data))
    arm.publisher("/left/tool_pose", m.BOOL, LATCHED).publish(message(m.BOOL, data=True))
    until(node, lambda: heard == [True])
    assert [w.node for w in node.writers("/tool_pose")] == ["arm"]
    node.close()
    arm.close()
    with pytest.raises(ValueError, match="a topic is remapped by /FROM:=/TO, got tool_pose:=/x"):
        open_bus("dds", "node", DOMAIN, remap=["tool_pose:=/x"])


LOSSY = """
bus = open("dds", "lossy", domain + 2, peers=[], loss_permille=int(kind))
weak = Qos(reliable=False, latched=False, depth=1000, lease_s=None)
best, safe = (bus.publisher(t, m.FLOAT, q) for t, q in (("/best", weak), ("/safe", Qos(True, False, 1000, None))))
begin = []
bus.subscribe("/begin", m.BOOL, STATE, begin.append)
while not begin:
    bus.spin(0.05)
for i in range(300):
    for publisher in (best, safe):
        publisher.publish(bus.msg(m.FLOAT, data=float(i)))
    bus.spin(0.002)
bus.spin(30)
"""


def test_injected_loss_loses_best_effort_messages_and_no_reliable_one():
    bus = open_bus("dds", "counter", DOMAIN + 2, peers=[])
    best, safe = [], []
    bus.subscribe("/best", m.FLOAT, Qos(False, False, 1000, None), lambda x: best.append(x.data))
    bus.subscribe("/safe", m.FLOAT, Qos(True, False, 1000, None), lambda x: safe.append(x.data))
    begin = bus.publisher("/begin", m.BOOL, STATE)
    process = start("200", LOSSY)
    until(bus, lambda: len(bus.writers("/best")) == len(bus.writers("/safe")) == 1, timeout_s=30.0)
    bus.spin(0.5)
    until(bus, lambda: safe and safe[-1] == 299.0, lambda: begin.publish(bus.msg(m.BOOL, data=True)), timeout_s=30.0)
    process.kill()
    process.wait()
    bus.close()
    assert safe == [float(i) for i in range(300)], "sent again until it arrives, in order"
    assert 150 < len(best) < 290 and best == sorted(best), "of 300, 20 % lost"


PEER = """
bus = open("dds", "peer", domain + 3, peers=[kind])
publisher = bus.publisher("/peer", m.STRING, LATCHED)
publisher.publish(bus.msg(m.STRING, data="here"))
bus.spin(60)
"""


def own_address():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent: it asks which interface would be taken
            return probe.getsockname()[0]
        except OSError:
            return None


@pytest.mark.skipif(own_address() in (None, "127.0.0.1"), reason="this machine has no interface but loopback")
def test_two_processes_meet_by_unicast_on_a_real_interface():
    address = own_address()
    bus = open_bus("dds", "finder", DOMAIN + 3, peers=[address])
    heard = []
    bus.subscribe("/peer", m.STRING, LATCHED, lambda x: heard.append(x.data))
    process = start(address, PEER)
    try:
        until(bus, lambda: heard == ["here"], timeout_s=30.0)
    finally:
        process.kill()
        process.wait()
        bus.close()


# ---- the managed node, over the fake


class Blinker:
    """A node that blinks, takes three more ticks to come to rest, and can be asked to be quick."""

    def __init__(self, bus):
        self.bus, self.ticks, self.left = bus, 0, -1
        self.light = bus.publisher("/light", m.FLOAT, STATE)
        bus.publisher("/light/kind", m.STRING, LATCHED).publish(bus.msg(m.STRING, data="red"))
        self.quick = bus.param("quick", False)
        if bus.param("rate", 100.0) <= 0:
            raise ValueError("the rate must be positive")
        bus.timer(0.01, self.tick)
        bus.subscribe("/dim", m.FLOAT, STATE, self.dim)
        bus.service("/light/set", "std_srvs/srv/SetBool", self.set)
        bus.on_stop(self.stop)
        self.dimmed = []

    def tick(self):
        self.ticks += 1
        self.light.publish(self.bus.msg(m.FLOAT, data=float(self.left)))
        self.left -= self.left > 0
        if self.left == 0:
            self.bus.shutdown()

    def dim(self, message):
        self.dimmed.append(message.data)

    def set(self, request):
        if not request.data:
            raise RuntimeError("it cannot be off")
        return {"success": True, "message": "on"}

    def stop(self, reason):
        self.left = 3


@pytest.fixture
def managed():
    with fake_rclpy.installed():
        from robot_io.bus_rclpy import RclpyBus

        made = RclpyBus("blinker", DOMAIN, Blinker)
        watcher = open_bus("dds", "watcher", DOMAIN)
        seen = []
        watcher.subscribe("/light", m.FLOAT, STATE, lambda x: seen.append(x.data))
        yield made, made._node, watcher, seen
        watcher.close()
        made.close()


def both(bus, watcher, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        bus.spin(0.02)
        watcher.spin(0.02)


def test_a_node_is_silent_and_deaf_until_activated_and_brakes_when_deactivated(managed):
    bus, node, watcher, seen = managed
    dim = watcher.publisher("/dim", m.FLOAT, STATE)
    assert not bus.writers("/light"), "unconfigured: nothing is there"
    kinds = []
    watcher.subscribe("/light/kind", m.STRING, LATCHED, lambda x: kinds.append(x.data))
    node.trigger_configure()
    blinker = bus.built
    until(watcher, lambda: watcher.writers("/light"))
    dim.publish(watcher.msg(m.FLOAT, data=0.5))
    both(bus, watcher, 0.5)
    blinker.light.publish(bus.msg(m.FLOAT, data=9.0))
    both(bus, watcher, 0.2)
    assert seen == kinds == [] and blinker.ticks == 0 and blinker.dimmed == [], "inactive"
    node.trigger_activate()
    until(watcher, lambda: kinds == ["red"])  # what was latched before is not lost
    until(watcher, lambda: -1.0 in seen, lambda: bus.spin(0.05))
    until(watcher, lambda: blinker.dimmed, lambda: (dim.publish(watcher.msg(m.FLOAT, data=0.25)), bus.spin(0.05)))
    assert node.fake_call("/light/set", SetBool(True)).message == "on"
    node.trigger_deactivate()
    until(watcher, lambda: 1.0 in seen)
    assert seen[-3:] == [3.0, 2.0, 1.0], "it went on publishing until it was at rest"
    assert blinker.left == 0 and bus.running and bus.built is None
    ticks = blinker.ticks
    both(bus, watcher, 0.2)
    assert blinker.ticks == ticks and node._services == {}
    node.trigger_activate()
    assert bus.built is not blinker, "it begins anew"
    seen.clear()
    until(watcher, lambda: -1.0 in seen, lambda: bus.spin(0.05))
    node.trigger_deactivate()
    node.trigger_cleanup()
    assert node.state == "unconfigured" and not node._timers and not node._managed_entities


def SetBool(data):
    from std_srvs.srv import SetBool as Type

    return Type.Request(data=data)


def test_a_service_that_fails_answers_no_and_stops_the_node(managed):
    bus, node, _, _ = managed
    bus.start()
    answer = node.fake_call("/light/set", SetBool(False))
    assert not answer.success and answer.message == ""
    with pytest.raises(RuntimeError, match="it cannot be off"):
        bus.spin(10.0)
    assert not bus.running


def test_parameters_are_typed_and_read_at_configuration(managed, monkeypatch):
    bus, node, _, _ = managed
    monkeypatch.setattr(sys, "argv", ["blinker", "--ros-args", "-p", "rate:=50.0", "-p", "quick:=true"])
    bus.start()
    assert bus.built.quick is True and bus.param("rate", 1.0) == 50.0
    change = SimpleNamespace(name="rate", value=-1.0)
    (refused,) = node.set_parameters([change])
    assert not refused.successful and "rate: read when the node is configured" in refused.reason
    assert node.set_parameters([SimpleNamespace(name="use_sim_time", value=True)])[0].successful
    node.trigger_deactivate()
    assert node.set_parameters([change])[0].successful
    node.trigger_cleanup()
    with pytest.raises(ValueError, match="blinker did not start: the rate must be positive"):
        bus.start()
    assert node.state == "unconfigured" and not node._managed_entities, "what it had made is gone"
    monkeypatch.setattr(sys, "argv", ["blinker", "--ros-args", "-p", "other:=5"])
    with pytest.raises(ValueError, match=r"parameter other must be of type float, as 1\.0 is"):
        bus.param("other", 1.0)


def test_a_signal_is_the_shutdown_transition(managed):
    bus, node, watcher, seen = managed
    bus.start()
    until(watcher, lambda: -1.0 in seen, lambda: bus.spin(0.05))
    blinker = bus.built
    bus.ask_to_leave(signal.SIGTERM, None)
    bus.spin(10.0)
    assert node.state == "finalized" and not bus.running and blinker.left == 0
    until(watcher, lambda: 1.0 in seen)


def test_remapped_topics_are_watched_under_their_real_names(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--ros-args", "-r", "/target:=/arm/target", "-r", "__node:=left_guard"])
    other = open_bus("dds", "rogue", DOMAIN)
    other.publisher("/arm/target", m.POSE, COMMAND)
    with fake_rclpy.installed():
        bus = open_bus("rclpy", "guard", DOMAIN)
        bus.publisher("/target", m.POSE, COMMAND)
        assert bus.name == "left_guard"
        until(bus, lambda: sorted(w.node for w in bus.writers("/target")) == ["left_guard", "rogue"])
        bus.close()
    other.close()


def test_the_fake_refuses_what_rclpy_refuses():
    with fake_rclpy.installed():
        bus = open_bus("rclpy", "strict", DOMAIN)
        kind = type(bus.msg(m.JOINT_STATE))
        for field, value in (("position", np.zeros(2)), ("position", [1]), ("name", "a"), ("header", None)):
            with pytest.raises(AssertionError):
                kind(**{field: value})
        with pytest.raises(AssertionError):
            type(bus.msg("diagnostic_msgs/msg/DiagnosticStatus"))(level=1)
        assert bus.msg("diagnostic_msgs/msg/DiagnosticStatus", level=1).level == b"\x01"
        assert bus.msg(m.COMPRESSED_IMAGE, data=b"abc").data.tolist() == [97, 98, 99]
        with pytest.raises(TypeError):
            bus.publisher("/strict", m.STRING, STATE).publish(bus.msg(m.BOOL))
        bus.close()
    assert "rclpy" not in sys.modules and "robot_io.bus_rclpy" not in sys.modules


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
