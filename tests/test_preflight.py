"""Each mistake is called by its name, and clean data raise no alarm."""

import copy

import numpy as np
import pytest

from robot_io.core import preflight as p
from robot_io.core.preflight import FAILED, OK, SKIPPED, WARNED, Heard, Report

SEEDS = range(8)
LOW, HIGH = [-2.9, -1.8, -2.9, -3.1, -2.9, 0.0, -2.9], [2.9, 1.8, 2.9, -0.07, 2.9, 3.75, 2.9]
HOME = np.array([0.0, -0.3, 0.1, -2.2, 0.0, 2.0, 0.8])
NAMES = [f"joints_{i}" for i in range(7)]


def field(name, kind, low, high, unit="1", scale=1.0, mode="absolute"):
    reference = "commanded" if mode == "delta" else None
    return {
        **{"name": name, "kind": kind, "size": len(low), "unit": unit, "frame": "joint", "mode": mode, "slot": 0},
        **{"reference": reference, "scale": scale, "low": list(low), "high": list(high)},
    }


def embodiment():
    joints, hand = (
        field("joints", "joint_position", LOW, HIGH, "rad"),
        field("hand", "ee_position", [-1] * 3, [1] * 3, "m"),
    )
    grip = field("grip", "gripper_position", [0.0], [1.0])
    return {
        **{"name": "arm", "robot": "a test arm", "obs_dt": 0.1, "action_dt": 0.05, "control_hz": 100.0},
        "state": [joints, hand, grip],
        "action": [field("joints", "joint_position", LOW, HIGH, "rad"), field("grip", "gripper_effort", [-1.0], [1.0])],
        "cameras": [{"name": c, "height": 48, "width": 64, "slot": i} for i, c in enumerate(("front", "wrist"))],
        "limits": None,
    }


def training(seed, rows=400):
    """Return states and actions of a training set: around a home pose, the gripper anywhere."""
    rng = np.random.default_rng([seed, 1])
    hand = np.array([0.4, 0.0, 0.3]) + 0.1 * rng.standard_normal((rows, 3))
    state = np.column_stack([HOME + 0.15 * rng.standard_normal((rows, 7)), hand, rng.uniform(0, 1, rows)])
    action = np.column_stack([state[:, :7], rng.choice([-1.0, 1.0], rows)])
    return state, action


def statistics(spec, state, action):
    fields = {}
    for group, rows in (("state", state), ("action", action)):
        start = 0
        for f in spec[group]:
            x = rows[:, start : start + f["size"]]
            start += f["size"]
            q01, q99 = np.quantile(x, [0.01, 0.99], axis=0)
            values = {"mean": x.mean(0), "std": x.std(0), "min": x.min(0), "max": x.max(0), "q01": q01, "q99": q99}
            fields[f"{group}/{f['name']}"] = {"count": len(x), **{k: v.tolist() for k, v in values.items()}}
    return {"embodiment": spec["name"], "fields": fields}


def contract(seed=0):
    spec = embodiment()
    return {"embodiments": {"arm": {"spec": spec, "stats": statistics(spec, *training(seed))}}}


def live_state(seed, n=50):
    """Return an arm at rest near where episodes begin, with a sensor's noise."""
    rng = np.random.default_rng([seed, 2])
    start = np.array([*HOME, 0.4, 0.0, 0.3, 1.0]) + np.array([0.1] * 7 + [0.05] * 3 + [0.0]) * rng.uniform(-1, 1, 11)
    return start + 1e-4 * rng.standard_normal((n, 11))


def pictures(seed, n):
    """Return two cameras' views: a blue table and a red object; a green wall and a yellow lamp."""
    rng = np.random.default_rng([seed, 3])
    out = {}
    for camera, back, thing in (("front", (40, 70, 160), (200, 30, 30)), ("wrist", (60, 120, 60), (220, 200, 40))):
        frames = np.tile(np.array(back, np.float64), (n, 48, 64, 1))
        frames += np.linspace(-30, 30, 48)[None, :, None, None]  # brighter below
        for frame in frames:
            y, x = rng.integers(4, 20), rng.integers(4, 26)
            frame[y : y + 14, x : x + 14] = thing
        out[camera] = np.clip(frames + rng.normal(0, 4, frames.shape), 0, 255).astype(np.uint8)
    return out


def stream(seed, topic="/front/image_raw", period=0.1, delay=0.01, n=40, node="driver"):
    """Return what a topic gives whose stamps and arrivals jitter as real ones do."""
    rng = np.random.default_rng([seed, 4])
    stamps = 1.7e9 + period * np.arange(n) + 0.02 * period * rng.standard_normal(n)
    arrivals = stamps + delay + rng.exponential(0.002, n)
    values = rng.integers(0, 255, (n, 4, 5, 3), np.uint8)
    return Heard(topic, "type (qos)", [(node, "type (qos)", True)], stamps.tolist(), arrivals.tolist(), list(values))


def verdicts(items):
    return {i.name: (i.verdict, i.mistake) for i in items}


def mistakes(items):
    return {i.mistake for i in items if i.verdict == FAILED}


# ---- what is written


def test_same_embodiment_passes_whatever_the_guards_own_limits_and_driver_are():
    robot = {**embodiment(), "robot": "mine", "limits": {"max_speed": 1.0}, "driver": {"command": "pose"}}
    assert [(i.verdict, i.name) for i in p.embodiment_items(contract(), robot)] == [(OK, "embodiment")]


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (lambda r: r["state"][0].update(unit="deg"), "state.joints.unit"),
        (lambda r: r["state"][0].update(size=6, low=LOW[:6], high=HIGH[:6]), "state.joints.size"),
        (lambda r: r["state"].reverse(), "state names"),
        (lambda r: r["action"][0].update(frame="tool"), "action.joints.frame"),
        (lambda r: r["action"][0].update(mode="delta", reference="measured"), "action.joints.reference"),
        (lambda r: r["cameras"][1].update(name="left"), "cameras names"),
        (lambda r: r["cameras"][1].update(width=32), "cameras.wrist.width"),
        (lambda r: r.update(obs_dt=0.2), "obs_dt"),
        (lambda r: r.update(control_hz=50.0), "control_hz"),
        (lambda r: r.update(surplus=1), "surplus"),
    ],
)
def test_every_difference_of_the_embodiment_is_another_embodiment_by_field_name(change, path):
    robot = embodiment()
    change(robot)
    items = p.embodiment_items(contract(), robot)
    assert f"embodiment {path}" in [i.name for i in items] and mistakes(items) == {p.EMBODIMENT}


def test_checkpoint_of_another_robot_is_named_with_what_it_knows():
    (item,) = p.embodiment_items(contract(), {**embodiment(), "name": "other"})
    assert (item.verdict, item.mistake) == (FAILED, p.EMBODIMENT) and "knows arm, this robot is other" in item.text


def test_gripper_scale_of_the_other_sign_is_an_inverted_gripper_and_of_another_size_is_not():
    robot = embodiment()
    robot["action"][1]["scale"] = -1.0
    (item,) = p.embodiment_items(contract(), robot)
    assert (item.name, item.mistake) == ("embodiment action.grip.scale", p.GRIPPER)
    robot["action"][1]["scale"] = 2.0
    assert mistakes(p.embodiment_items(contract(), robot)) == {p.EMBODIMENT}


def test_announced_contract_must_have_the_checkpoints_hash():
    assert p.announced_item("a" * 64, None, "/dita/contract").verdict == SKIPPED
    assert p.announced_item("a" * 64, {"hash": "a" * 64}, "/dita/contract").verdict == OK
    item = p.announced_item("a" * 64, {"hash": "b" * 64}, "/dita/contract")
    assert (item.verdict, item.mistake) == (FAILED, p.STATISTICS)
    assert p.announced_item("a" * 64, {}, "/dita/contract").verdict == FAILED


@pytest.mark.parametrize("seed", SEEDS)
def test_clean_statistics_raise_no_alarm(seed):
    spec, (state, action) = embodiment(), training(seed)
    stats = statistics(spec, state, action)
    assert [i.verdict for i in p.statistics_items(spec, stats)] == [OK]
    rows = np.random.default_rng(seed).choice(len(state), 80, replace=False)
    assert [i.verdict for i in p.fitted_items(spec, stats, state[rows], action[rows])] == [OK]


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s.pop("state/hand"),
        lambda s: s["state/joints"].update(mean=[0.0] * 6),
        lambda s: s["state/joints"]["std"].__setitem__(2, float("nan")),
        lambda s: s["state/hand"].update(q01=s["state/hand"]["q99"], q99=s["state/hand"]["q01"]),
        lambda s: s["state/hand"].update(std=[100.0, 0.1, 0.1]),
    ],
)
def test_damaged_statistics_are_wrong_statistics(damage):
    spec = embodiment()
    stats = statistics(spec, *training(0))
    damage(stats["fields"])
    items = p.statistics_items(spec, stats)
    assert mistakes(items) == {p.STATISTICS} and len(items) == 1


def test_statistics_in_degrees_or_millimetres_are_recognised_by_the_fields_limits():
    spec = embodiment()
    state, action = training(0)
    items = p.statistics_items(
        spec, statistics(spec, np.column_stack([np.rad2deg(state[:, :7]), state[:, 7:]]), action)
    )
    assert mistakes(items) == {p.DEGREES}
    items = p.statistics_items(
        spec, statistics(spec, np.column_stack([state[:, :7], 1000 * state[:, 7:10], state[:, 10:]]), action)
    )
    assert mistakes(items) == {p.MILLIMETRES}


@pytest.mark.parametrize("factor", [0.1, 10.0])
@pytest.mark.parametrize("seed", SEEDS)
def test_statistics_of_other_data_do_not_fit_the_training_frames(seed, factor):
    spec, (state, action) = embodiment(), training(seed)
    mean = state.mean(0)
    scaled = statistics(spec, mean + factor * (state - mean), action)
    assert mistakes(p.fitted_items(spec, scaled, state[:80], action[:80])) == {p.STATISTICS}
    shifted = statistics(spec, state + 1.0, action)
    assert mistakes(p.fitted_items(spec, shifted, state[:80], action[:80])) == {p.STATISTICS}


# ---- what is heard


def test_topic_that_nobody_offers_or_that_does_not_match_says_who_offers_what():
    (item,) = p.topic_items(Heard("/front/image_raw", "Image (reliable)"))
    assert item.mistake == p.NO_TOPIC and "Image (reliable)" in item.text
    (item,) = p.topic_items(Heard("/x", "Image (reliable)", [("cam", "Image (best effort)", False)]))
    assert item.mistake == p.QOS
    assert (
        item.text
        == "/x: preflight requests Image (reliable), but cam offers Image (best effort). Nothing flows between them"
    )
    (item,) = p.topic_items(Heard("/x", "Image", [("cam", "Image", True)]))
    assert item.mistake == p.NO_TOPIC and "nothing arrived" in item.text
    heard = stream(0)
    heard.offers = [("a", "t", True), ("b", "t", True)]
    (item,) = p.topic_items(heard)
    assert item.mistake == p.WRITER and "a, b" in item.text


def test_messages_that_cannot_be_read_are_named_by_their_reason():
    heard = stream(0)
    heard.problems["image encoding 'mono8' is not supported"] += 3
    (item,) = p.topic_items(heard)
    assert item.mistake == p.IMAGE_FORMAT and "3 messages cannot be read: image encoding 'mono8'" in item.text
    heard.problems.clear()
    heard.problems["a joint state needs one position per unique name"] += 1
    assert p.topic_items(heard)[0].mistake == p.JOINT_NAMES


@pytest.mark.parametrize("seed", SEEDS)
def test_clean_stream_raises_no_alarm(seed):
    camera, state = stream(seed), stream(seed, "/joint_states", 0.01, n=400)
    items = [
        *(i for h in (camera, state) for i in (*p.topic_items(h), *p.stamp_items(h, 0.15, 0.05))),
        *(p.camera_rate_item(camera, 0.1), p.state_rate_item(state, 100.0), p.spread_item([camera], [state], 0.033)),
        *(p.frozen_items(camera, live_state(seed)), p.image_format_items(camera, 4, 5))[0],
        *p.image_format_items(camera, 4, 5),
    ]
    assert {i.verdict for i in items} == {OK}, items


@pytest.mark.parametrize("offset", [0.2, 0.5, 3600.0])
def test_old_and_future_stamps(offset):
    late, early = stream(0, delay=offset), stream(0, delay=-offset)
    assert mistakes(p.stamp_items(late, 0.15, 0.05)) == {p.STALE}
    items = p.stamp_items(early, 0.15, 0.05)
    assert mistakes(items) == {p.FUTURE} and "driver" in items[0].text


def test_stamps_that_repeat_are_stale_and_that_go_back_are_named():
    heard = stream(0)
    heard.stamps[5:] = [heard.stamps[4]] * 35
    assert p.STALE in mistakes(p.stamp_items(heard, 100.0, 0.05))
    heard = stream(0)
    heard.stamps[20:] = [s - 10 for s in heard.stamps[20:]]
    items = p.stamp_items(heard, 100.0, 0.05)
    assert mistakes(items) == {p.BACKWARDS} and "1 of 39 stamps go back, by up to 9.9" in items[-1].text
    assert p.stamp_items(stream(0, n=4), 0.1, 0.1) == []


@pytest.mark.parametrize(
    ("hz", "verdict"),
    [
        (10.0, OK),
        (20.0, OK),
        (30.0, OK),
        (9.5, OK),
        (5.0, FAILED),
        (15.0, FAILED),
        (7.0, FAILED),
        (24.0, OK),
        (12.0, FAILED),
    ],
)
def test_camera_rate_must_give_a_frame_where_the_history_wants_one(hz, verdict):
    item = p.camera_rate_item(stream(0, period=1 / hz), 0.1)
    assert item.verdict == verdict and (item.mistake == p.WRONG_RATE) == (verdict == FAILED), item


def test_state_must_come_as_often_as_the_robot_is_controlled():
    assert p.state_rate_item(stream(0, period=0.01), 100.0).verdict == OK
    assert p.state_rate_item(stream(0, period=0.002), 100.0).verdict == OK
    assert p.state_rate_item(stream(0, period=0.02), 100.0).mistake == p.WRONG_RATE
    assert p.state_rate_item(stream(0, n=3), 100.0).mistake == p.WRONG_RATE
    assert p.camera_rate_item(stream(0, n=3), 0.1).mistake == p.WRONG_RATE


def test_rate_of_frozen_stamps_is_that_of_arrivals():
    heard = stream(0)
    heard.stamps = [heard.stamps[0]] * 40
    assert p.period_of(heard) == pytest.approx(0.1, rel=0.1)


def test_topics_out_of_step_are_named():
    camera, other, state = stream(0), stream(1, "/wrist/image_raw"), stream(0, "/joint_states", 0.01, n=400)
    other.stamps = [s + 0.05 for s in other.stamps]
    item = p.spread_item([camera, other], [state], 0.033)
    assert item.mistake == p.UNSYNCHRONISED and "/wrist/image_raw" in item.text
    state.stamps = state.stamps[:3]
    assert p.spread_item([camera], [state], 0.033).verdict == SKIPPED


def joint_stream(values):
    heard = stream(0, "/joint_states", n=len(values))
    heard.values = values
    return heard


def test_joint_names_missing_extra_and_changing():
    clean = [dict.fromkeys(reversed(NAMES), 0.0)] * 6  # the order of the message does not matter
    assert [i.verdict for i in p.joint_name_items(joint_stream(clean), NAMES)] == [OK]
    less = [{n: 0.0 for n in NAMES[1:]}] * 6
    (item,) = p.joint_name_items(joint_stream(less), NAMES)
    assert item.mistake == p.JOINT_NAMES and "missing joints_0" in item.text and "joints_1, joints_2" in item.text
    more = [{**clean[0], "wheel": 0.0}] * 6
    (item,) = p.joint_name_items(joint_stream(more), NAMES, strict=False)
    assert item.verdict == WARNED and "wheel is not used" in item.text
    (item,) = p.joint_name_items(joint_stream(more), NAMES)
    assert item.mistake == p.JOINT_NAMES and "refuses others: wheel" in item.text
    assert [i.verdict for i in p.joint_name_items(joint_stream(more), NAMES, ["wheel"])] == [OK]
    (item,) = p.joint_name_items(joint_stream([*clean, *more]), NAMES)
    assert item.mistake == p.JOINT_NAMES and "change" in item.text


def test_image_of_another_size_is_named_with_both():
    (item,) = p.image_format_items(stream(0), 48, 64)
    assert item.mistake == p.IMAGE_FORMAT and "images of 4 x 5, the embodiment says 48 x 64" in item.text


def test_frozen_pictures_are_a_fault_only_while_the_arm_moves():
    heard = stream(0)
    heard.values = [heard.values[0]] * 40
    still = live_state(0)
    assert [i.verdict for i in p.frozen_items(heard, still)] == [SKIPPED]
    moving = still + np.linspace(0, 0.2, len(still))[:, None]
    (item,) = p.frozen_items(heard, moving)
    assert (item.verdict, item.mistake) == (FAILED, p.FROZEN)


def test_second_writer_is_named():
    assert p.writer_item("/target_pose", []).verdict == OK
    item = p.writer_item("/target_pose", ["rogue"])
    assert item.mistake == p.WRITER and "rogue writes commands beside the guard" in item.text


# ---- what the values say


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_clean_state_raises_no_alarm(seed, known):
    spec, (state, action) = embodiment(), training(seed)
    items = p.state_items(spec, statistics(spec, state, action), live_state(seed), state[:64] if known else None)
    assert mistakes(items) == set() and [i.name for i in items] == ["state joints", "state hand", "state grip"], items


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_degrees_and_millimetres_are_told_by_their_factor(seed, known):
    spec, (state, action) = embodiment(), training(seed)
    stats, sample, live = statistics(spec, state, action), state[:64] if known else None, live_state(seed)
    degrees = np.column_stack([np.rad2deg(live[:, :7]), live[:, 7:]])
    items = p.state_items(spec, stats, degrees, sample)
    assert mistakes(items) == {p.DEGREES} and "in degrees? this field is in rad" in items[0].text
    millimetres = np.column_stack([live[:, :7], 1000 * live[:, 7:10], live[:, 10:]])
    assert mistakes(p.state_items(spec, stats, millimetres, sample)) == {p.MILLIMETRES}


@pytest.mark.parametrize("seed", SEEDS)
def test_joint_order_is_told_by_what_fits_training(seed):
    spec, (state, action) = embodiment(), training(seed)
    rng = np.random.default_rng([seed, 5])
    live = live_state(seed)
    order = rng.permutation(7)
    while np.max(np.abs(HOME - HOME[order])) < 1.0:  # joints that stand alike tell nothing
        order = rng.permutation(7)
    mixed = np.column_stack([live[:, order], live[:, 7:]])
    items = p.state_items(spec, statistics(spec, state, action), mixed, state[:64])
    assert mistakes(items) == {p.JOINT_ORDER}, items
    assert "is really" in items[0].text


def test_joint_order_names_the_joints_that_were_swapped():
    spec, (state, action) = embodiment(), training(0)
    live = live_state(0)
    live[:, [3, 5]] = live[:, [5, 3]]
    items = p.state_items(spec, statistics(spec, state, action), live, state[:64])
    assert "3 is really 5, 5 is really 3" in items[0].text


def test_state_outside_of_everything_is_wrong_statistics_and_a_little_outside_a_warning():
    spec, (state, action) = embodiment(), training(0)
    stats = statistics(spec, state, action)
    narrow = copy.deepcopy(stats)
    for key in ("q01", "q99", "min", "max", "mean"):
        narrow["fields"]["state/hand"][key] = [v * 0.05 - 0.6 for v in narrow["fields"]["state/hand"][key]]
    assert mistakes(p.state_items(spec, narrow, live_state(0), None)) == {p.STATISTICS}
    live = live_state(0)
    live[:, 7] = stats["fields"]["state/hand"]["q99"][0] + 0.6 * 0.5
    hand = verdicts(p.state_items(spec, stats, live, state[:64]))["state hand"]
    assert hand == (WARNED, "")
    live[:, 7] = np.nan
    assert verdicts(p.state_items(spec, stats, live, None))["state hand"][0] == FAILED


def test_gripper_that_reads_negative_is_inverted_and_that_counts_is_outside():
    spec, (state, action) = embodiment(), training(0)
    stats, live = statistics(spec, state, action), live_state(0)
    live[:, 10] = -1.0
    assert mistakes(p.state_items(spec, stats, live, None)) == {p.GRIPPER}
    live[:, 10] = 255.0
    assert mistakes(p.state_items(spec, stats, live, None)) == {p.STATISTICS}


@pytest.mark.parametrize("n", range(1, 8))
def test_assignment_is_the_cheapest_of_all(n):
    from itertools import permutations

    cost = np.random.default_rng(n).uniform(0, 1, (n, n))
    columns, total = p.assign(cost)
    assert sorted(columns) == list(range(n))
    assert total == pytest.approx(min(sum(cost[i, q[i]] for i in range(n)) for q in permutations(range(n))))
    assert total == pytest.approx(sum(cost[i, columns[i]] for i in range(n)))


@pytest.mark.parametrize("seed", SEEDS)
def test_clean_pictures_raise_no_alarm(seed):
    items = p.image_items(pictures(seed + 100, 10), pictures(seed, 16))
    assert [(i.name, i.verdict) for i in items] == [("picture front", OK), ("picture wrist", OK)], items


@pytest.mark.parametrize("seed", SEEDS)
def test_red_and_blue_exchanged_swapped_and_turned_cameras_are_told_apart(seed):
    live, reference = pictures(seed + 100, 10), pictures(seed, 16)
    swapped = {"front": live["wrist"], "wrist": live["front"]}
    assert mistakes(p.image_items(swapped, reference)) == {p.SWAPPED_CAMERAS}
    items = p.image_items({**live, "front": live["front"][..., ::-1]}, reference)
    assert verdicts(items) == {"picture front": (FAILED, p.BGR), "picture wrist": (OK, "")}
    items = p.image_items({**live, "wrist": live["wrist"][:, ::-1, ::-1]}, reference)
    assert verdicts(items)["picture wrist"] == (FAILED, p.TURNED_CAMERA)


def test_pictures_of_another_world_and_without_colour_are_warnings():
    reference = pictures(0, 16)
    items = p.image_items({c: np.full((5, 48, 64, 3), 250, np.uint8) for c in reference}, reference)
    assert {i.verdict for i in items} == {WARNED}
    grey = {c: np.repeat(x.mean(-1, keepdims=True), 3, -1).astype(np.uint8) for c, x in pictures(0, 16).items()}
    items = p.image_items({c: x[:8] for c, x in grey.items()}, grey)
    assert all(i.verdict == WARNED and "too grey" in i.text for i in items)


def test_camera_without_pictures_is_skipped_by_name():
    reference = pictures(0, 6)
    assert verdicts(p.image_items({}, reference)) == {f"picture {c}": (SKIPPED, "") for c in ("front", "wrist")}
    one = p.image_items({"wrist": reference["wrist"]}, reference)
    assert verdicts(one) == {"picture front": (SKIPPED, ""), "picture wrist": (OK, "")}


def test_pooling_keeps_mean_colours_of_any_size():
    image = np.zeros((1, 97, 131, 3), np.uint8)
    image[..., 0] = 200
    np.testing.assert_allclose(p.pooled(image)[0, ..., 0], 200.0)
    np.testing.assert_allclose(p.pooled(image)[0, ..., 1:], 0.0)
    assert p.pooled(image).shape == (1, p.POOL, p.POOL, 3)


def test_gripper_direction_is_what_was_measured():
    assert p.gripper_item("grip", 0.1, 0.9).verdict == OK
    item = p.gripper_item("grip", 0.9, 0.1)
    assert (item.verdict, item.mistake) == (FAILED, p.GRIPPER)
    item = p.gripper_item("grip", 0.5, 0.52)
    assert (item.verdict, item.mistake) == (FAILED, "") and "does not move" in item.text


def test_path_must_give_the_offline_observation_and_chunk():
    clean = [p.Passage(0.0, 9e-6), p.Passage(1e-6, 0.0)]
    (item,) = p.path_items(clean)
    assert item.verdict == OK and "2 training windows: observations differ by 1e-06, chunks by 9e-06" in item.text
    assert p.path_items([]) == []
    for wrong in (p.Passage(2e-5, 0.0), p.Passage(0.0, float("nan")), p.Passage(), p.Passage(0.0, 0.0, lost="nothing")):
        (item,) = p.path_items([*clean, wrong])
        assert (item.name, item.verdict, item.mistake) == ("path 2", FAILED, p.PATH)
    (item,) = p.path_items([p.Passage(0.0, 0.0, "action out of range")])
    assert item.verdict == WARNED and "action out of range" in item.text


def test_report_passes_only_if_something_was_checked_and_nothing_failed():
    report = Report("arm", "a" * 64)
    assert not report.passed
    report.items += [p.Item("a", OK, ""), p.Item("b", WARNED, ""), p.Item("c", SKIPPED, "")]
    assert report.passed and report.mistakes == []
    report.items += [p.Item("d", FAILED, "", p.BGR), p.Item("e", FAILED, "", p.BGR), p.Item("f", FAILED, "")]
    assert report.to_dict()["passed"] is False and report.to_dict()["mistakes"] == [p.BGR]
    assert report.to_dict()["items"][3] == {"name": "d", "verdict": "failed", "text": "", "mistake": "BGR"}
    assert set(p.MISTAKES) >= {
        *("joint order", "degrees", "BGR", "swapped cameras", "wrong rate", "stale stamps"),
        *("inverted gripper", "wrong statistics", "other embodiment"),
    }
