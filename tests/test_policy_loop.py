"""From topics to chunks: which observations may be acted on, the inference thread, the policy's node on a fake bus."""

import copy
import threading
import time
from collections import deque
from types import SimpleNamespace

import numpy as np
import pytest
from fake_robot import EMBODIMENT
from hypothesis import given
from hypothesis import strategies as st

from robot_io import messages as m
from robot_io.bus_dds import message
from robot_io.core.policy_loop import PolicyLoop, Range
from robot_io.core.sync import FrozenCameras, Synchronizer, nearest_to
from robot_io.nodes.policy import PolicyNode
from robot_io.nodes.topics import (
    CHUNK,
    CHUNK_GRIPPER,
    CONTRACT,
    DIAGNOSTICS,
    EXECUTED,
    GUARD_STATE,
    INSTRUCTION,
    POLICY_STATE,
)

T0 = 1000.0


# ---- synchronisation


def sync(**overrides):
    return Synchronizer(["left", "right"], ["tool"], **{"slop": 0.033, "max_age": 0.15, **overrides})


def test_observation_is_the_newest_instant_that_every_camera_has_reached():
    s = sync()
    for i in range(8):
        s.offer("tool", T0 + 0.0125 * i, f"tool{i}")
    s.offer("left", T0, "l0")
    s.offer("left", T0 + 0.05, "l1")
    s.offer("right", T0 + 0.001, "r0")
    found, reason = s.latest(T0 + 0.1)
    assert reason == "" and found == (T0 + 0.001, {"left": "l0", "right": "r0", "tool": "tool0"})
    s.offer("right", T0 + 0.051, "r1")
    assert s.latest(T0 + 0.1)[0] == (T0 + 0.05, {"left": "l1", "right": "r1", "tool": "tool4"})


def test_no_observation_comes_with_its_reason():
    s = sync()
    assert s.latest(T0) == (None, "nothing yet from left, right, tool")
    for source in ("left", "right", "tool"):
        s.offer(source, T0, source)
    assert "older than 0.15 s" in s.latest(T0 + 0.2)[1]
    s.offer("left", T0 + 1, "l")
    s.offer("right", T0 + 1, "r")
    assert s.latest(T0 + 1)[1].startswith("tool not within")


def test_frozen_stamps_are_refused_and_a_clock_that_jumps_back_pairs_nothing():
    s = sync()
    assert s.offer("left", T0, "a") is None
    assert s.offer("left", T0, "b") == "left repeats its stamp"
    s.offer("right", T0, "r")
    s.offer("tool", T0, "t")
    assert s.offer("left", T0 - 10, "c") is None
    assert s.latest(T0 - 10)[1] == "nothing yet from right, tool"


def test_stamps_in_the_future_are_dropped_and_told_until_they_are_right():
    s = sync(max_skew=0.05)
    assert s.offer("left", T0 + 0.04, "a", now=T0) is None and s.future() == ""
    assert s.offer("left", T0 + 0.2, "b", now=T0 + 0.1) == "left is stamped in the future"
    assert "left is stamped 0.100 s in the future" in s.future() and s.newest("left") == "a"
    assert s.offer("left", T0 + 0.15, "c", now=T0 + 0.15) is None and s.future() == ""
    assert s.counts == {"left is stamped in the future": 1}


def test_what_is_dropped_is_counted_by_source_and_a_flush_by_its_cause():
    s = sync()
    for stamp in (T0, T0, T0 - 10, T0 - 9, T0 - 9):
        s.offer("left", stamp, "x")
    assert s.counts == {"left repeats its stamp": 2, "left went back in time": 1}
    assert (s.flushes, s.flushed) == (1, "left went back in time")


@pytest.mark.parametrize(("offset", "flushes"), [(-0.02, 0), (-0.04, 0), (-0.1, 1), (-0.5, 1)])
def test_a_clock_that_is_set_back_by_less_than_the_tolerated_skew_costs_samples_but_no_flush(offset, flushes):
    s, dt = sync(max_skew=0.05, slop=0.1), 0.01
    for i in range(20):
        for source in ("left", "right", "tool"):
            late = offset if source == "tool" and i >= 10 else 0.0
            s.offer(source, T0 + i * dt + late, i, now=T0 + i * dt)
    assert s.flushes == flushes and s.newest("tool") == 19
    dropped = s.counts["tool is out of order"] + s.counts["tool repeats its stamp"]
    assert dropped == (0 if flushes else round(-offset / dt)), "until it has caught up with what was seen"
    if not flushes:
        assert s.latest(T0 + 19 * dt)[0] == (pytest.approx(T0 + 0.19), dict.fromkeys(("left", "right", "tool"), 19))


def test_a_silent_camera_is_named():
    s = sync()
    for source in ("left", "right", "tool"):
        s.offer(source, T0, source)
    s.offer("left", T0 + 0.2, "l")
    assert s.latest(T0 + 0.2)[1] == "right silent: the newest images are older than 0.15 s"


def test_a_picture_that_repeats_while_the_arm_moves_is_a_frozen_camera():
    cameras, picture = FrozenCameras(frames=4, moved=0.01), np.zeros((2, 2, 3), np.uint8)
    still, moved = np.array([0.5, 0.1]), np.array([0.5, 0.13])
    assert [cameras.take("left", picture.copy(), still) for _ in range(20)] == [""] * 20, "nothing moves"
    other = picture + 1
    assert [cameras.take("left", other.copy(), still + 0.02 * i) for i in range(3)] == [""] * 3
    assert cameras.take("left", other.copy(), moved) == "left frozen: 4 identical images while the arm moved"
    assert cameras.take("right", picture, moved).startswith("left frozen")
    assert cameras.take("left", picture, moved) == "", "it takes pictures again"
    assert [cameras.take("right", picture, None) for _ in range(9)] == [""] * 9, "nobody knows whether it moves"
    rested = FrozenCameras(frames=4, moved=0.01)
    assert [rested.take("left", picture, still) for _ in range(20)] == [""] * 20
    assert rested.take("left", picture, moved) == "", "pictures from before it moved prove nothing"
    assert [bool(rested.take("left", picture, moved)) for _ in range(2)] == [False, True]


def test_pictures_that_differ_in_one_pixel_are_not_frozen():
    pictures = [np.zeros((40, 40, 3), np.uint8) for _ in range(9)]
    for i, picture in enumerate(pictures):
        picture[1, 1 + i, 1] = 1
    cameras = FrozenCameras(frames=4, moved=0.01)
    assert [cameras.take("left", p, np.array([0.02 * i])) for i, p in enumerate(pictures)] == [""] * 9
    assert cameras.take("left", np.zeros((20, 40, 3), np.uint8), np.array([1.0])) == "", "nor those of another size"


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12, unique=True), st.integers(-5, 45))
def test_the_nearest_sample_is_the_nearest_of_all_and_the_older_of_two(stamps, wanted):
    queue = deque((float(stamp), stamp) for stamp in sorted(stamps))
    assert nearest_to(queue, wanted) == min(queue, key=lambda sample: abs(sample[0] - wanted))


# ---- inference


def frame(stamp):
    return SimpleNamespace(stamp=stamp)


class Recorder:
    def __init__(self):
        self.calls, self.entered, self.go = [], threading.Semaphore(0), threading.Semaphore(0)

    def predict(self, history, *, seed):
        self.calls.append(([o.stamp for o in history], seed))
        self.entered.release()
        assert self.go.acquire(timeout=5)
        return SimpleNamespace(stamp=history[-1].stamp)


def make_loop(policy, **overrides):
    chunks, errors = [], []
    options = {
        "n_obs_steps": 2,
        "obs_dt": 0.05,
        "seed": 3,
        "clock": lambda: 0.0,
        "on_chunk": chunks.append,
        **overrides,
    }
    options.setdefault("on_error", lambda e, last: errors.append((str(e), last)))
    return PolicyLoop(policy, **options), chunks, errors


def test_history_is_spaced_by_obs_dt_and_ends_at_a_gap():
    loop, _, _ = make_loop(Recorder(), n_obs_steps=3)
    for i in (0, 2, 3, 4, 6, 8):  # 12.5 ms apart, some missing
        loop.offer(frame(T0 + 0.0125 * i))
    assert [o.stamp for o in loop.history()] == [T0, T0 + 0.05, T0 + 0.1]
    loop.clear()
    for i in (0, 8, 12):
        loop.offer(frame(T0 + 0.0125 * i))
    assert [o.stamp for o in loop.history()] == [T0 + 0.1, T0 + 0.15]
    loop.clear()
    loop.offer(frame(T0))
    assert [o.stamp for o in loop.history()] == [T0]


def test_loop_predicts_from_the_newest_observation_once_and_forgets_at_clear():
    policy = Recorder()
    loop, chunks, errors = make_loop(policy)
    loop.start()
    loop.offer(frame(T0))
    assert policy.entered.acquire(timeout=5)
    loop.offer(frame(T0 + 0.05))
    loop.offer(frame(T0 + 0.10))
    loop.offer(frame(T0 + 0.02))  # goes back: ignored
    policy.go.release()
    assert policy.entered.acquire(timeout=5)
    assert [stamps for stamps, _ in policy.calls] == [[T0], [T0 + 0.05, T0 + 0.10]]
    loop.clear()  # an episode ends while it predicts
    loop.offer(frame(T0 + 0.20))
    policy.go.release(2)
    assert policy.entered.acquire(timeout=5)
    loop.stop()
    assert [c.stamp for c in chunks] == [T0, T0 + 0.20], "the prediction of the old episode is thrown away"
    assert errors == [] and len({seed for _, seed in policy.calls}) == 3
    assert loop.inference.count == 3


def test_loop_waits_for_the_stamp_that_its_owner_names_and_forgets_it_at_clear():
    policy = Recorder()
    policy.go.release(9)
    loop, _, _ = make_loop(policy, on_chunk=lambda chunk: chunk.stamp + 0.1)
    loop.start()
    loop.offer(frame(T0))
    assert policy.entered.acquire(timeout=5)
    loop.offer(frame(T0 + 0.05))
    assert not policy.entered.acquire(timeout=0.1)
    loop.offer(frame(T0 + 0.1))
    assert policy.entered.acquire(timeout=5)
    loop.clear()
    loop.offer(frame(T0 + 0.01))
    assert policy.entered.acquire(timeout=5)
    loop.stop()


class Failing:
    """Raise at the given calls; answer at the others."""

    def __init__(self, calls):
        self.calls, self.count, self.done = calls, 0, threading.Semaphore(0)

    def predict(self, history, *, seed, **prefix):
        self.count += 1
        self.prefix = prefix
        self.done.release()
        if self.count in self.calls:
            raise ValueError(f"no such camera {self.count}")
        return SimpleNamespace(stamp=history[-1].stamp)


def test_loop_goes_on_after_a_failure_and_ends_after_three_in_a_row():
    policy = Failing({1, 2, 4, 5, 6})
    loop, chunks, errors = make_loop(policy)
    loop.start()
    for i in range(6):
        loop.offer(frame(T0 + i))
        assert policy.done.acquire(timeout=5)
    loop._thread.join(5)
    assert not loop._thread.is_alive(), "the loop ended"
    assert errors == [
        *[(f"no such camera {i}", False) for i in (1, 2, 4, 5)],
        ("no such camera 6", True),
    ]
    assert [c.stamp for c in chunks] == [T0 + 2]


def test_loop_hands_over_what_the_receiver_of_chunks_raises():
    def refuse(chunk):
        raise ValueError("not finite")

    policy = Failing(set())
    loop, _, errors = make_loop(policy, on_chunk=refuse)
    loop.start()
    loop.offer(frame(T0))
    assert policy.done.acquire(timeout=5)
    loop.stop()
    assert errors == [("not finite", False)]


def test_prefix_of_an_observation_reaches_the_policy_and_a_hung_one_is_left_behind():
    policy, clock = Failing(set()), iter(range(100))
    loop, _, _ = make_loop(policy, prefix=lambda stamp: {"committed": stamp})
    loop.start()
    loop.offer(frame(T0))
    assert policy.done.acquire(timeout=5)
    loop.stop()
    assert policy.prefix == {"committed": T0} and loop.busy() == 0.0
    hung = Recorder()
    loop, _, _ = make_loop(hung, clock=lambda: float(next(clock)))
    loop.start()
    loop.offer(frame(T0))
    assert hung.entered.acquire(timeout=5)
    assert loop.busy() > 0
    loop.stop(timeout_s=0.05)
    assert loop._thread.is_alive()
    hung.go.release()
    loop._thread.join(5)


class Looking(Failing):
    """A predictor that is shown frames beforehand; fails at those stamps."""

    def __init__(self, bad=()):
        super().__init__(set())
        self.bad, self.histories, self.looked, self.seen = bad, [], [], threading.Semaphore(0)

    def predict(self, history, *, seed, **prefix):
        self.histories.append([o.stamp for o in history])
        return super().predict(history, seed=seed, **prefix)

    def look(self, observation):
        self.looked.append(observation.stamp)
        self.seen.release()
        if observation.stamp in self.bad:
            raise ValueError("no such camera")


@pytest.mark.parametrize(
    ("every", "ahead"),
    [
        (1, {1}),  # a camera at obs_dt, acted on at 0, 2, 4: the frame between
        (2, {2}),  # at twice that rate, acted on at 0, 4, 8: only the frame obs_dt before
        (3, {3}),
    ],
)
def test_only_a_frame_that_the_next_history_will_hold_is_looked_at_beforehand(every, ahead):
    policy = Looking()
    loop, _, errors = make_loop(policy, on_chunk=lambda chunk: chunk.stamp + 0.0875)
    loop.start()
    frames = [T0 + 0.05 * i / every for i in range(6 * every + 1)]
    for i, stamp in enumerate(frames):
        loop.offer(frame(stamp))
        if i % (2 * every) == 0:
            assert policy.done.acquire(timeout=5)
            time.sleep(0.02)  # until the stamp of the next one is known
        elif i % (2 * every) in ahead:
            assert policy.seen.acquire(timeout=5)
        else:
            assert not policy.seen.acquire(timeout=0.02)
    loop.stop()
    acted = frames[2 * every :: 2 * every]
    np.testing.assert_allclose(policy.histories[1:], [[stamp - 0.05, stamp] for stamp in acted], rtol=0, atol=1e-9)
    assert set(policy.looked) == {history[0] for history in policy.histories[1:]} and errors == []


def test_a_frame_that_cannot_be_looked_at_is_an_error_as_a_prediction_is():
    policy = Looking(bad={T0 + 0.05})
    loop, _, errors = make_loop(policy, on_chunk=lambda chunk: chunk.stamp + 0.0875)
    loop.start()
    loop.offer(frame(T0))
    assert policy.done.acquire(timeout=5)
    time.sleep(0.02)
    loop.offer(frame(T0 + 0.05))
    assert policy.seen.acquire(timeout=5)
    loop.offer(frame(T0 + 0.1))
    assert policy.done.acquire(timeout=5), "and the loop goes on"
    loop.stop()
    assert errors == [("no such camera", False)]


# ---- the training data's range


def test_values_outside_the_training_data_are_named_after_some_rows():
    known = Range([("hand", [0.0, 0.0], [1.0, 2.0]), ("grip", [0.5], [0.5])], margin=0.25, steps=3)
    inside = np.array([1.2, -0.4, 0.5])
    outside = np.array([1.2, -0.6, 0.5])
    assert all(known.take(inside) == "" for _ in range(9))
    assert [known.take(outside) for _ in range(3)] == ["", "", ""]
    assert known.take(outside) == "hand[1] is -0.6, training had 0 .. 2"
    assert known.take(inside) == "", "one row inside and it counts anew"
    assert [known.take(outside) for _ in range(3)] == ["", "", ""]
    known.clear()
    assert known.take(outside) == ""
    assert known.holds(np.stack([inside, inside])) and not known.holds(np.stack([inside, outside, inside]))
    assert not known.holds(np.array([[np.nan, 1.0, 0.5]]))
    constant = [known.take(np.array([0.5, 1.0, 0.5 + 1e-5])) for _ in range(9)]
    assert constant == [""] * 9, "rounding of what was constant in training is no news"
    assert "grip is 0.6" in [known.take(np.array([0.5, 1.0, 0.6])) for _ in range(5)][-1]
    assert "hand[0] is nan" in [known.take(np.array([np.nan, 1.0, 0.5])) for _ in range(5)][-1]


# ---- the node


class Bus:
    """A bus on a clock of the test's, in one thread; what is published is kept."""

    def __init__(self):
        self.waiting = []  # topics that are not urgent
        self.name, self.time, self.step, self.sent, self.heard, self.logs, self.timers = (
            "policy",
            T0,
            0.0,
            {},
            {},
            [],
            [],
        )
        self.stopped, self.requested = False, {}

    def msg(self, type, **fields):
        return message(type, **fields)

    def publisher(self, topic, type, qos):
        return SimpleNamespace(publish=lambda message: self.sent.setdefault(topic, []).append(message))

    def subscribe(self, topic, type, qos, callback, urgent=True):
        self.heard[topic], self.requested[topic] = callback, qos
        self.waiting += [topic] * (not urgent)

    def timer(self, period, callback):
        self.timers.append(callback)

    def now(self):
        return self.time + self.step

    def steady(self):
        return self.time - T0 + 100.0

    def log(self, level, text):
        self.logs.append((level, text))

    def shutdown(self):
        self.stopped = True

    def close(self):
        pass


class Rig:
    """The node with a point for an arm: pose, joints and one camera at 20 Hz, all on the test's clock."""

    def __init__(self, policy=None, **options):
        self.bus, self.policy = Bus(), policy or Scripted()
        timing = {"n_obs_steps": 2, "seed": 0, "slop": 0.033, "max_age": 0.15, **options}
        self.node = PolicyNode(self.bus, self.policy, EMBODIMENT, "0" * 64, observation_of, **timing)
        self.say(INSTRUCTION, self.bus.msg(m.STRING, data="go"))
        self.guard("ARMED")
        self.frames = 0

    def say(self, topic, message):
        self.bus.heard[topic](message)

    def guard(self, state, **more):
        self.say(GUARD_STATE, m.json_to_ros(self.bus.msg, {"state": state, "reason": "", "refused": "", **more}))

    def measure(self, hand, stamp=None):
        stamp = self.bus.now() if stamp is None else stamp
        self.say("/tool_pose", m.pose_to_ros(self.bus.msg, stamp, [hand, 0.6, 0.2], "base_link"))
        self.say("/joint_states", m.joints_to_ros(self.bus.msg, stamp, {"grip": 0.5}))

    def look(self, stamp=None, pixel=None):
        self.frames += 1
        image = np.full((24, 32, 3), self.frames % 250 if pixel is None else pixel, np.uint8)
        stamp = self.bus.now() if stamp is None else stamp
        self.say("/corner/image_raw", m.image_to_ros(self.bus.msg, stamp, image, "corner"))

    def check(self):
        for callback in self.bus.timers:
            callback()

    def run(self, seconds, hand=lambda t: 0.1, **look):
        """Measure every 10 ms, look every 50 ms."""
        for i in range(round(seconds / 0.01)):
            self.bus.time += 0.01
            self.measure(hand(self.bus.time - T0))
            if i % 5 == 4:
                self.look(**look)
            self.check()

    def wait(self, condition):
        end = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.002)

    def settle(self):
        """Wait until the newest observation was predicted from."""
        self.wait(lambda: self.policy.calls and self.policy.calls[-1][0][-1].stamp > self.bus.now() - 0.01)
        self.wait(lambda: self.node._loop.busy() == 0.0)

    @property
    def state(self):
        return m.json_from_ros(self.bus.sent[POLICY_STATE][-1])

    @property
    def status(self):
        return m.diagnostics_from_ros(self.bus.sent[DIAGNOSTICS][-1])["policy"]


def observation_of(images, state, instruction, stamp):
    return SimpleNamespace(images=images, state=state, instruction=instruction, stamp=stamp)


class Scripted:
    """Answer with chunks of 8 steps, whose values a test may change; remember what was given."""

    def __init__(self):
        self.calls, self.values = [], np.tile([0.001, 0.0, 0.0, 1.0], (8, 1))

    def predict(self, history, *, seed, **prefix):
        self.calls.append((history, prefix))
        return SimpleNamespace(values=self.values, stamp=history[-1].stamp, action_dt=0.0125, embodiment="point")


@pytest.fixture
def rig():
    made = Rig()
    yield made
    made.node._loop.stop(5)


def test_valid_observations_become_chunks_with_running_ids_and_their_stamps(rig):
    rig.run(0.05)
    rig.wait(lambda: len(rig.bus.sent.get(CHUNK, [])) == 1)
    rig.run(0.05)
    rig.wait(lambda: len(rig.bus.sent[CHUNK]) == 2)
    assert rig.state == {"ok": True, "reason": "", "reaction": ""}
    for topic in (CHUNK, CHUNK_GRIPPER):
        assert [m.chunk_id_of(x) for x in rig.bus.sent[topic]] == [1, 2]
        assert [m.stamp_of(x) for x in rig.bus.sent[topic]] == pytest.approx([T0 + 0.05, T0 + 0.10], abs=1e-9)
    assert len(rig.policy.calls[1][0]) == 2 and rig.policy.calls[1][1] == {}
    contract = m.json_from_ros(rig.bus.sent[CONTRACT][-1])
    assert contract["policy"] == {"mode": "latency_compensated"} and contract["hash"] == "0" * 64


def test_a_frame_a_little_before_its_time_is_acted_on():
    """Waiting for the exact time would cost a camera's whole period."""
    rig = Rig(stitching={"chunk_size": 16, "n_action_steps": 8})  # 0.1 s: every second frame
    rig.policy.values = np.tile(rig.policy.values, (2, 1))
    stamps = [T0 + 0.05 * i + late for i, late in enumerate([0.002, 0.0, -0.003, 0.003, 0.004, 0.0, -0.004], 1)]
    for i, stamp in enumerate(stamps):
        rig.bus.time = stamp + 0.006
        rig.measure(0.1 + 0.001 * i, stamp)
        rig.look(stamp)
        rig.check()
        rig.wait(lambda i=i: len(rig.bus.sent.get(CHUNK, [])) == i // 2 + 1 and rig.node._loop.busy() == 0.0)
    assert [history[-1].stamp for history, _ in rig.policy.calls] == pytest.approx(stamps[::2], abs=1e-8)
    values = rig.status["values"]
    assert float(values["observation_age.average"]) == pytest.approx(0.006)
    assert float(values["latency.average"]) == pytest.approx(0.006), "the test's clock stands still"
    rig.node._loop.stop(5)


def test_arming_gives_the_first_observation_as_long_as_a_silence_may_take(rig):
    nothing = "no observation: nothing yet from corner, /tool_pose, /joint_states"
    rig.guard("IDLE")
    rig.bus.time += 0.16
    rig.check()
    assert rig.state == {"ok": False, "reason": nothing, "reaction": "R2"}
    rig.guard("ARMED")
    rig.check()
    assert rig.state["ok"], "a guard that has just been armed is not held for what was never asked"
    rig.bus.time += 0.14
    rig.check()
    rig.guard("HOLDING")
    assert rig.state["ok"]
    rig.bus.time += 0.02
    rig.check()
    assert rig.state == {"ok": False, "reason": nothing, "reaction": "R2"}, "said anew, for the guard to hold"


def test_a_silent_camera_stops_the_policy_within_the_bound_and_its_return_starts_it_again(rig):
    rig.run(0.1)
    rig.settle()
    for _ in range(14):
        rig.bus.time += 0.01
        rig.measure(0.1)
        rig.check()
    assert rig.state["ok"]
    for _ in range(3):
        rig.bus.time += 0.01
        rig.measure(0.1)
        rig.check()
    assert rig.state == {
        "ok": False,
        "reason": "no observation: corner silent: the newest images are older than 0.15 s",
        "reaction": "R2",
    }
    assert rig.status["level"] == 2 and "corner silent" in rig.status["message"]
    calls = len(rig.policy.calls)
    rig.run(0.05)
    rig.wait(lambda: len(rig.policy.calls) == calls + 1)
    assert rig.state["ok"]
    assert len(rig.policy.calls[-1][0]) == 1, "what was seen before the gap is forgotten"


def test_a_camera_that_repeats_its_picture_while_the_arm_moves_is_a_problem_by_name(rig):
    rig.run(0.3, hand=lambda t: 0.2 * t)
    assert rig.state["ok"]
    rig.run(0.4, hand=lambda t: 0.2 * t, pixel=255)
    assert rig.state["reason"] == "corner frozen: 5 identical images while the arm moved"
    rig.wait(lambda: rig.node._loop.busy() == 0.0)
    calls = len(rig.policy.calls)
    rig.run(0.2, hand=lambda t: 0.2 * t, pixel=255)
    assert len(rig.policy.calls) == calls
    rig.run(0.1, hand=lambda t: 0.2 * t)
    assert rig.state["ok"]


def test_a_camera_that_repeats_its_stamp_is_silent_and_counted(rig):
    rig.run(0.1)
    old = rig.bus.now()
    rig.run(0.3, stamp=old)
    assert "corner silent" in rig.state["reason"]
    assert rig.status["values"]["dropped: corner repeats its stamp"] == "6"


def test_stamps_from_the_future_are_a_fault_with_the_topic(rig):
    rig.run(0.1)
    rig.look(stamp=rig.bus.now() + 0.06)
    rig.check()
    assert rig.state["reaction"] == "R3" and rig.state["reason"].startswith("corner is stamped 0.060 s in the future")
    rig.run(0.1)
    assert rig.state["ok"]


def test_a_clock_that_jumps_back_pairs_nothing_across_the_jump(rig):
    rig.run(0.1)
    rig.settle()
    calls = len(rig.policy.calls)
    rig.bus.step = -10.0
    rig.check()
    assert rig.state["reason"] == "no observation: the wall clock jumped by -10.000 s"
    rig.run(0.05)
    rig.wait(lambda: len(rig.policy.calls) == calls + 1)
    history = rig.policy.calls[-1][0]
    assert [o.stamp for o in history] == pytest.approx([T0 + 0.15 - 10.0]) and rig.state["ok"]


def test_stamps_that_go_back_empty_the_queues_and_say_so(rig):
    rig.run(0.1)
    rig.look(stamp=rig.bus.now() - 5.0)
    assert rig.state["reason"] == "no observation: corner went back in time" and rig.state["reaction"] == "R2"
    assert rig.node._sync.counts["corner went back in time"] == 1
    assert rig.node._sync.newest("/tool_pose") is None


def test_stamps_that_go_back_within_the_tolerated_skew_stop_nothing(rig):
    rig.run(0.1)
    before = rig.node._sync.newest("/tool_pose")
    rig.measure(0.3, stamp=rig.bus.now() - 0.02)
    rig.check()
    assert rig.state["ok"] and rig.node._sync.flushes == 0 and rig.node._sync.newest("/tool_pose") is before
    rig.run(0.1)
    assert rig.state["ok"]


def test_topics_that_are_out_of_step_are_named(rig):
    rig.run(0.1)
    for _ in range(6):
        rig.bus.time += 0.05
        rig.measure(0.1, stamp=rig.bus.now() - 0.04)
        rig.look()
        rig.check()
    assert rig.state["reason"] == "no observation: /tool_pose, /joint_states not within 0.033 s of the images"
    assert int(rig.status["values"]["no observation: /tool_pose, /joint_states not within 0.033 s of the images"]) == 6


def test_a_chunk_that_is_not_finite_is_not_sent_and_three_end_the_node(rig):
    rig.run(0.05)
    rig.wait(lambda: len(rig.bus.sent.get(CHUNK, [])) == 1)
    good, rig.policy.values = rig.policy.values, np.full((8, 4), np.nan)
    rig.run(0.05)
    rig.wait(lambda: rig.node._loop.failures == 1)
    rig.check()
    assert rig.state["reason"] == "the prediction failed: the policy's action is not finite (first bad row 0)"
    rig.policy.values = good
    rig.run(0.05)
    rig.wait(lambda: len(rig.bus.sent[CHUNK]) == 2)
    rig.check()
    assert rig.state["ok"] and not rig.bus.stopped
    rig.policy.values = np.full((8, 4), np.inf)
    for i in (1, 2, 3):
        rig.run(0.05)
        rig.wait(lambda: rig.node._loop.failures == i)  # noqa: B023
    rig.wait(lambda: rig.bus.stopped)
    with pytest.raises(ValueError, match="not finite"):
        rig.node.close()


def test_actions_that_training_never_had_are_not_sent():
    known = Range([("hand_delta", [-0.004] * 3, [0.004] * 3), ("effort", [-1.0], [1.0])], margin=1.0, steps=5)
    rig = Rig(action_range=known)
    rig.policy.values = np.tile([0.02, 0.0, 0.0, 1.0], (8, 1))
    rig.run(0.05)
    rig.wait(lambda: rig.node._loop.failures == 1)
    rig.check()
    assert "hand_delta[0] is 0.02, training had -0.004 .. 0.004" in rig.state["reason"]
    assert CHUNK not in rig.bus.sent
    rig.policy.values = np.tile([0.011, 0.0, 0.0, 1.0], (8, 1))
    rig.run(0.05)
    rig.wait(lambda: len(rig.bus.sent.get(CHUNK, [])) == 1)
    rig.node._loop.stop(5)


def test_states_that_training_never_had_are_told_but_acted_on():
    known = Range([("hand", [-1.0] * 3, [1.0] * 3), ("grip", [0.0], [1.0])], margin=0.1, steps=2)
    rig = Rig(state_range=known)
    rig.run(0.2, hand=lambda t: 2.0)
    rig.wait(lambda: CHUNK in rig.bus.sent)
    assert rig.state["ok"] and rig.status["level"] == 1
    assert "hand[0] is 2, training had -1 .. 1" in rig.status["message"]
    assert sum("outside the training data" in text for _, text in rig.bus.logs) == 1, "not once a frame"
    rig.node._loop.stop(5)


def test_messages_that_make_no_sense_are_dropped_and_counted_and_the_node_goes_on(rig):
    rig.run(0.1)
    rig.settle()
    image = m.image_to_ros(rig.bus.msg, rig.bus.now(), np.zeros((9, 9, 3), np.uint8), "corner")
    rig.say("/corner/image_raw", image)
    rig.say(GUARD_STATE, rig.bus.msg(m.STRING, data="{}"))
    rig.say(EXECUTED, rig.bus.msg(m.CARTESIAN_TRAJECTORY))
    rig.check()
    dropped = [key for key in rig.status["values"] if key.startswith("no observation: /corner/image_raw: an image of")]
    assert len(dropped) == 1
    calls = len(rig.policy.calls)
    rig.run(0.05)
    rig.wait(lambda: len(rig.policy.calls) == calls + 1)


def test_what_was_sent_comes_back_to_the_policy_as_committed_actions():
    rig = Rig(stitching={"mode": "rtc", "chunk_size": 8, "max_committed": 4, "trained": True})
    rig.node._stitcher.on_latency(0.024)  # two steps
    rig.run(0.05)
    rig.wait(lambda: len(rig.bus.sent.get(CHUNK, [])) == 1)
    stamp = m.stamp_of(rig.bus.sent[CHUNK][0])
    rig.bus.time += 0.0125
    step = m.ExecutedStep(
        stamp, 1, 0, rig.bus.now(), np.array([0.101, 0.6, 0.2]), np.array([0.001, 0, 0]), "policy", 1.0
    )
    rig.say(EXECUTED, m.executed_to_ros(rig.bus.msg, step, 0.0125, ["hand_delta"], False))
    rig.bus.time += 0.0125
    rig.measure(0.1)
    rig.look()
    rig.wait(lambda: len(rig.policy.calls) == 2)
    np.testing.assert_allclose(rig.policy.calls[1][1]["committed"], np.tile([0.001, 0, 0, 1.0], (2, 1)), atol=1e-7)
    rig.guard("HOLDING")
    rig.guard("ARMED")
    calls = len(rig.policy.calls)
    rig.run(0.05)
    rig.wait(lambda: len(rig.policy.calls) > calls)
    assert rig.policy.calls[-1][1] == {}, "after a stop nothing is decided"
    rig.node._loop.stop(5)


def test_nothing_is_predicted_while_disarmed_or_without_an_instruction():
    rig = Rig()
    rig.guard("IDLE")
    rig.run(0.2)
    assert rig.policy.calls == [] and rig.state["ok"]
    rig.say(INSTRUCTION, rig.bus.msg(m.STRING, data=""))
    rig.guard("ARMED")
    rig.run(0.2)
    assert rig.policy.calls == [] and rig.state["reason"] == "no instruction on /dita/instruction"
    rig.node._loop.stop(5)


def test_synchronous_chunks_begin_when_they_are_sent_and_the_next_look_waits_for_their_end():
    rig = Rig(stitching={"mode": "synchronous", "chunk_size": 8, "n_action_steps": 4})
    rig.run(0.05)
    rig.wait(lambda: len(rig.bus.sent.get(CHUNK, [])) == 1)
    assert len(rig.bus.sent[CHUNK][0].points) == 4
    end = m.stamp_of(rig.bus.sent[CHUNK][0]) + 4 * 0.0125
    rig.run(0.3)
    rig.wait(lambda: len(rig.policy.calls) > 1)
    assert rig.policy.calls[1][0][-1].stamp >= end - 1e-9
    chunk = SimpleNamespace(values=rig.policy.values, stamp=rig.bus.now(), action_dt=0.0125)
    assert rig.node._publish(chunk) == pytest.approx(rig.bus.now() + 4 * 0.0125), "not a little before its end"
    rig.node._loop.stop(5)


def test_a_joint_arm_is_read_by_name_and_its_chunks_travel_as_joints():
    values = copy.deepcopy(EMBODIMENT)
    joints = {"kind": "joint_position", "size": 2, "unit": "rad", "frame": "joint"}
    values["state"] = [{**values["state"][0], **joints, "name": "arm", "low": [-3] * 2, "high": [3] * 2}]
    values["action"] = [{**values["state"][0], "name": "arm_target"}]
    values["driver"] = {"joints": ["elbow", "wrist"]}
    bus, policy = Bus(), Scripted()
    policy.values = np.tile([0.3, -0.2], (8, 1))
    node = PolicyNode(bus, policy, values, "0" * 64, observation_of, n_obs_steps=1, seed=0, slop=0.033, max_age=0.15)
    bus.heard[INSTRUCTION](bus.msg(m.STRING, data="go"))
    bus.heard[GUARD_STATE](m.json_to_ros(bus.msg, {"state": "ARMED"}))
    bus.heard["/joint_states"](m.joints_to_ros(bus.msg, T0, {"wrist": 0.2, "elbow": 0.1, "other": 1.0}))
    image = m.image_to_ros(bus.msg, T0, np.zeros((24, 32, 3), np.uint8), "corner")
    bus.heard["/corner/image_raw"](image)
    end = time.monotonic() + 5
    while CHUNK not in bus.sent and time.monotonic() < end:
        time.sleep(0.002)
    np.testing.assert_array_equal(policy.calls[0][0][-1].state, np.array([0.1, 0.2], np.float32))
    message = bus.sent[CHUNK][0]
    assert list(message.joint_names) == ["elbow", "wrist"] and CHUNK_GRIPPER not in bus.sent
    dt, sent = m.joint_chunk_from_ros(message, "positions", ["elbow", "wrist"])
    np.testing.assert_array_equal(sent, policy.values)
    assert dt == pytest.approx(0.0125)
    node._loop.stop(5)


def test_states_wait_for_the_next_image_and_are_then_handled_before_it():
    bus = Rig().bus
    assert bus.waiting == ["/tool_pose", "/joint_states", EXECUTED], "nobody waits for them in an inference"
    order = list(bus.heard)
    assert max(order.index("/tool_pose"), order.index("/joint_states")) < order.index("/corner/image_raw")


def test_a_lost_state_keeps_no_other_one_waiting():
    requested = Rig().bus.requested
    for topic in ("/tool_pose", "/joint_states"):
        assert not requested[topic].reliable and requested[topic].depth == 10
