"""The black box: bounded memory, one record per burst, a bag that others open, bounded disk."""

import contextlib
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from fake_robot import EMBODIMENT
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rosbags.highlevel import AnyReader
from test_recorder import DT, T0, HandBus, step
from test_robot_live import Rig

from robot_io import messages as m
from robot_io.bus_dds import message
from robot_io.core.black_box import (
    REASONS,
    Reaction,
    Ring,
    Sample,
    Trigger,
    prune,
    reaction_of,
    reasons,
    record_name,
    records,
    timeline,
    worst_of,
)
from robot_io.core.limits import parse_robot
from robot_io.nodes.blackbox import BlackBoxNode, plain, series_of, write_record
from robot_io.nodes.topics import CHUNK, CHUNK_GRIPPER, CONTRACT, DIAGNOSTICS, EXECUTED, GUARD_STATE

ROBOT = parse_robot(EMBODIMENT, need_limits=False)
SETTINGS = {
    **{"seconds": 2.0, "max_memory": 4 * 2**20, "image_hz": 10.0, "after": 0.5, "interval": 5.0},
    **{"max_records": 3, "max_bytes": 10**8},
}


def sample(time, size=10, topic="/a"):
    return Sample(time, topic, m.STRING, b"x" * size)


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(0, 400)), max_size=60))
def test_a_ring_never_holds_more_than_its_time_and_its_bytes(steps):
    ring, time, given = Ring(5.0, 1000), 0.0, []
    for gap, size in steps:
        time += gap
        given.append(sample(time, size))
        ring.add(given[-1])
        held = ring.samples()
        assert ring.bytes == sum(len(s.data) for s in held) <= 1000
        assert held == given[len(given) - len(held) :], "the newest, in order"
        assert all(time - s.time <= 5.0 for s in held)
        left_out = given[: len(given) - len(held)]
        if left_out and time - left_out[-1].time <= 5.0:
            assert ring.evicted and ring.bytes + len(left_out[-1].data) > 1000 - 400


def reaction(time, kind="R2", reason="no action for 0.1 s"):
    return Reaction(time, kind, {"R2": "HOLDING", "R3": "FAULT", "GONE": "ARMED"}[kind], reason)


def test_a_burst_is_written_once_and_the_next_one_not_too_soon():
    trigger = Trigger(after=1.0, interval=10.0)
    assert trigger.due(0.0) == []
    trigger.react(reaction(100.0))
    trigger.react(reaction(100.9, "R3"))
    assert trigger.due(100.99) == []
    assert [r.time for r in trigger.due(101.0)] == [100.0, 100.9]
    assert trigger.due(101.1) == [] and not trigger.pending
    for k in range(50):
        trigger.react(reaction(102.0 + 0.1 * k))
        assert trigger.due(102.0 + 0.1 * k) == []
    assert trigger.due(110.9) == []
    assert len(trigger.due(111.0)) == 50, "nothing is forgotten"
    trigger.react(reaction(112.0))
    assert len(trigger.due(112.0, closing=True)) == 1, "on leaving, what waits is written at once"


def test_only_changes_to_holding_and_fault_are_reactions():
    state = {"state": "HOLDING", "reason": "chunk not finite"}
    assert reaction_of(state, "ARMED", 5.0) == Reaction(5.0, "R2", "HOLDING", "chunk not finite")
    assert reaction_of({"state": "FAULT", "reason": "x"}, "HOLDING", 5.0).reaction == "R3"
    assert reaction_of(state, "HOLDING", 5.0) is None
    assert reaction_of({"state": "ARMED"}, "FAULT", 5.0) is None and reaction_of({}, "", 5.0) is None


def test_a_record_is_named_by_its_worst_reaction_in_safe_letters():
    burst = [reaction(1.0), reaction(1.5, "R3", "a second writer: ../x/\x00y"), reaction(2.0, "R3", "other")]
    assert worst_of(burst).time == 1.5
    assert record_name("20261126T201500.250", burst) == "20261126T201500.250_R3-a-second-writer-..-x-y"


def test_prune_removes_the_oldest_records_and_nothing_that_is_none(tmp_path):
    def make(name, size=10):
        (tmp_path / name / "bag").mkdir(parents=True)
        (tmp_path / name / "bag" / "x").write_bytes(b"0" * size)
        (tmp_path / name / REASONS).write_text("{}")

    for second in range(5):
        make(f"20261126T20150{second}.000_R2-x", 1000)
    (tmp_path / "notes").mkdir()
    (tmp_path / "20261126T201500.000_R2-mine").mkdir()  # no reasons.json: somebody else's
    assert prune(tmp_path, 3, 10**6) == ["20261126T201500.000_R2-x", "20261126T201501.000_R2-x"]
    assert prune(tmp_path, 3, 1500) == ["20261126T201502.000_R2-x", "20261126T201503.000_R2-x"]
    assert prune(tmp_path, 3, 1) == [], "the newest one stays, however large"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "20261126T201500.000_R2-mine",
        "20261126T201504.000_R2-x",
        "notes",
    ]
    assert records(tmp_path / "none") == []


# ---- the node, with its topics by hand


def node(tmp_path, **changes):
    bus = HandBus()
    return bus, BlackBoxNode(bus, ROBOT, tmp_path / "box", **{**SETTINGS, **changes})


def say(bus, state, reason):
    bus.hear(GUARD_STATE, m.json_to_ros(message, {"state": state, "reason": reason, "refused": ""}))


def run(bus, seconds, moving=True):
    """Let a guard of 160 Hz, a twin of 80 Hz and a camera of 20 Hz say what they say."""
    for _ in range(round(seconds / DT)):
        t = bus.time
        hand = np.array([0.1 * np.sin(t) if moving else 0.0, 0.6, 0.2])
        for half in (0, 0.5):
            bus.time = t + half * DT
            bus.hear("/target_pose", m.pose_to_ros(message, bus.time, hand, "base_link"))
        bus.hear("/tool_pose", m.pose_to_ros(message, t, hand, "base_link"))
        bus.hear(EXECUTED, m.executed_to_ros(message, step(0, target=hand), DT, ["hand"], False))
        if round((t - T0) / DT) % 4 == 0:
            image = np.random.default_rng(0).integers(0, 255, (24, 32, 3)).astype(np.uint8)
            bus.hear("/corner/image_raw", m.image_to_ros(message, t, image, "corner"))
        bus.time = t + DT
        for timer in bus.timers:
            timer()


def wait(box):
    box._join()
    return box.written


@pytest.fixture
def record(tmp_path):
    bus, box = node(tmp_path)
    bus.hear(CONTRACT, m.json_to_ros(message, {"embodiment": EMBODIMENT, "hash": "f" * 64}))
    say(bus, "ARMED", "armed")
    run(bus, 3.0)
    diagnostics = m.diagnostics_to_ros(message, bus.time, "guard", 1, "HOLDING", {"R2": 1})
    bus.hear(DIAGNOSTICS, diagnostics)
    say(bus, "HOLDING", "no action for 0.1 s")
    run(bus, 0.3, moving=False)
    say(bus, "FAULT", "held for 1.0 s")
    run(bus, 0.4, moving=False)
    written = wait(box)
    assert len(written) == 1
    return bus, box, written[0]


def test_a_reaction_writes_one_record_with_why_and_what_led_to_it(record):
    bus, _, folder = record
    assert folder.name == "19700101T000143.300_R3-held-for-1.0-s"
    assert sorted(p.name for p in folder.iterdir()) == ["bag", "overview.png", "reasons.json"]
    found = json.loads((folder / REASONS).read_text())
    assert [(r["reaction"], r["reason"]) for r in found["reactions"]] == [
        ("R2", "no action for 0.1 s"),
        ("R3", "held for 1.0 s"),
    ]
    assert found["moment"] == pytest.approx(T0 + 3.3) and found["contract"] == "f" * 64
    assert found["embodiment"] == "point" and found["diagnostics"]["guard"]["values"] == {"R2": "1"}
    assert [s["state"] for s in found["states"]] == ["ARMED", "HOLDING", "FAULT"]
    assert found["left_out_for_memory"] == {"pictures": 0, "messages": 0}
    commands = found["topics"]["/target_pose"]
    assert commands["messages"] == pytest.approx(2.0 * 160, abs=4), "two seconds, as configured"
    assert commands["last"] - commands["first"] == pytest.approx(2.0, abs=0.02)
    with Image.open(folder / "overview.png") as image:
        assert image.size == (1200, 900) and len(np.unique(np.asarray(image.convert("L")))) > 20
    text = "\n".join(timeline(folder))
    assert "-0.300 s  R2       no action for 0.1 s" in text and "+0.000 s  R3       held for 1.0 s" in text
    assert not [line for line in bus.lines if line[0] == "error"]


def test_its_bag_is_read_by_others_with_every_topic_and_time(record):
    _, _, folder = record
    assert sorted(p.name for p in (folder / "bag").iterdir()) == ["bag.mcap", "metadata.yaml"]
    with AnyReader([folder / "bag"]) as bag:
        assert bag.message_count == sum(
            t["messages"] for t in json.loads((folder / REASONS).read_text())["topics"].values()
        )
        found = {c.topic: c for c in bag.connections}
        assert {"/target_pose", "/tool_pose", "/dita/executed", "/dita/state", "/diagnostics"} < set(found)
        times = [t for _, t, _ in bag.messages([found["/target_pose"]])]
        assert times == sorted(times)
        _, time, data = next(iter(bag.messages([found["/corner/image_raw/compressed"]])))
        picture = bag.deserialize(data, m.COMPRESSED_IMAGE)
        assert picture.format == "jpeg" and m.compressed_from_ros(picture).shape == (24, 32, 3)
        assert m.stamp_of(picture) == pytest.approx(time * 1e-9, abs=DT)
        state = [
            json.loads(bag.deserialize(d, m.STRING).data)["state"] for _, _, d in bag.messages([found["/dita/state"]])
        ]
        assert state[-2:] == ["HOLDING", "FAULT"]


def test_pictures_are_thinned_and_the_memory_is_bounded(tmp_path):
    bus, box = node(tmp_path, image_hz=5.0, max_memory=20_000)
    run(bus, 2.0)
    assert box._pictures.bytes <= 15_000 and box._rest.bytes <= 5_000
    assert box._rest.evicted > 0
    times = [s.time for s in box._pictures.samples()]
    assert len(times) > 3 and np.all(np.diff(times) > 0.17)


def test_a_guard_that_dies_armed_is_a_reason_and_one_that_leaves_idle_is_not(tmp_path):
    bus, box = node(tmp_path)
    for state, count in (("IDLE", 0), ("ARMED", 1)):
        say(bus, state, "")
        for alive in (1, 0):
            bus.hear("/target_pose liveliness", alive)
        run(bus, 1.0)
        assert len(wait(box)) == count
    assert box.written[0].name.endswith("_GONE-the-guard-is-gone")


def test_leaving_writes_what_waits(tmp_path):
    bus, box = node(tmp_path)
    run(bus, 0.2)
    say(bus, "FAULT", "state older than 0.1 s")
    box.close()
    assert len(box.written) == 1


def test_a_full_disk_is_an_error_line_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    bus, box = node(tmp_path)
    run(bus, 0.2)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("robot_io.nodes.blackbox.draw", full)
    say(bus, "FAULT", "x")
    run(bus, 1.0)
    wait(box)
    assert box.written == [] and list((tmp_path / "box").iterdir()) == []
    assert any("nothing written: OSError: [Errno 28]" in text for level, text in bus.lines if level == "error")
    monkeypatch.undo()
    bus.time += 10
    say(bus, "ARMED", "armed")
    say(bus, "FAULT", "y")
    run(bus, 1.0)
    assert len(wait(box)) == 1, "the next one is written again"


def test_nothing_that_is_sent_ends_it_and_what_is_not_finite_is_in_the_record(tmp_path):
    bus, box = node(tmp_path)
    for text in ("{", "[]", "3"):
        bus.hear(GUARD_STATE, message(m.STRING, data=text))
        bus.hear(CONTRACT, message(m.STRING, data=text))
    bus.hear("/corner/image_raw", message(m.IMAGE, encoding="mono8", height=1, width=1, step=1, data=[0]))
    bus.hear("/target_pose", m.pose_to_ros(message, T0, [np.nan, 0, 0], "base_link"))
    bus.hear(GUARD_STATE, message(m.STRING, data='{"state": "FAULT", "reason": "x", "value": NaN}'))
    run(bus, 1.0)
    (folder,) = wait(box)
    found = json.loads((folder / REASONS).read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found["states"][-1]["value"] == "nan"


def test_messages_of_another_bus_become_rosbags_own():
    class Other:
        def __init__(self, **fields):
            self.__dict__.update(fields)

    stamp = Other(sec=3, nanosec=4)
    header = Other(stamp=stamp, frame_id="x")
    pair = Other(key="a", value="b")
    status = Other(level=b"\x02", name="n", message="m", hardware_id="", values=[pair])
    made = plain(Other(header=header, status=[status]), m.DIAGNOSTICS)
    assert m.diagnostics_from_ros(made) == {"n": {"level": 2, "message": "m", "values": {"a": "b"}}}
    joints = plain(Other(header=header, name=["a"], position=[1.0], velocity=[], effort=[]), m.JOINT_STATE)
    assert joints.position.dtype == np.float64 and m.joints_from_ros(joints) == {"a": 1.0}


def test_series_are_what_the_samples_say(record):
    _, box, _ = record
    times, values = series_of(box._rest.samples(), "/target_pose")
    assert values.shape == (len(times), 3) and np.all(np.diff(times) > 0)
    np.testing.assert_allclose(values[:, 1:], np.tile([0.6, 0.2], (len(times), 1)))


def test_an_empty_box_still_writes_its_reason(tmp_path):
    burst = [reaction(T0)]
    samples = [sample_state()]
    folder = write_record(tmp_path, burst, samples, reasons(burst, samples, [], {}, {}), ROBOT)
    assert json.loads((folder / REASONS).read_text())["picture"] == "overview.png"
    assert timeline(folder)[0].startswith(folder.name)
    with pytest.raises(FileNotFoundError, match=f"is no record: it has no reasons.json; it holds {folder.name}"):
        timeline(tmp_path)
    assert not os.path.exists(Path(tmp_path) / f".{folder.name}.partial")


def sample_state():
    return Sample(T0, GUARD_STATE, m.STRING, bytes(message_bytes()))


def message_bytes():
    from robot_io.bus_dds import TYPES

    return TYPES.serialize_cdr(message(m.STRING, data="{}"), m.STRING)


@pytest.mark.live
def test_a_killed_policy_leaves_a_record_of_its_last_seconds(tmp_path):
    with contextlib.ExitStack() as stack:
        rig = Rig(stack, tmp_path, 152)
        rig.move()
        os.kill(rig.pids["policy"], signal.SIGKILL)
        rig.watch(lambda: records(tmp_path / "out" / "black_box"), 30.0)
    (record,) = records(tmp_path / "out" / "black_box")
    found = json.loads((record / REASONS).read_text())
    reasons_given = " | ".join(r["reason"] for r in found["reactions"])
    assert re.search("policy is gone|no action|no sign of life from policy", reasons_given), reasons_given
    assert {r["reaction"] for r in found["reactions"]} <= {"R2", "R3"} and found["embodiment"] == "point"
    wanted = (
        "/target_pose",
        "/tool_pose",
        "/joint_states",
        CHUNK,
        CHUNK_GRIPPER,
        EXECUTED,
        GUARD_STATE,
        DIAGNOSTICS,
        CONTRACT,
    )
    assert set(wanted) < set(found["topics"]) and "/corner/image_raw/compressed" in found["topics"]
    with AnyReader([record / "bag"]) as bag:
        assert bag.message_count == sum(t["messages"] for t in found["topics"].values())
    assert (record / "overview.png").stat().st_size > 10_000
    assert found["topics"]["/target_pose"]["last"] > found["moment"], "it shows the stop, too"
