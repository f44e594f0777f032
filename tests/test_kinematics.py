"""Kinematics against MuJoCo, distances against brute force, and what is refused."""

import math
from pathlib import Path

import mujoco
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from robot_io.core.kinematics import Capsule, Kinematics, _quaternion, segment_box_distance, segment_distance

URDF = Path(__file__).parent.parent / "configs" / "embodiment" / "urdf" / "panda.urdf"
TOOL = "panda_hand_tcp"
IGNORE = [("panda_link1", "panda_link3")]
HOME = np.array([0, -np.pi / 4, 0, -3 * np.pi / 4, 0, np.pi / 2, np.pi / 4])
PANDA = Kinematics.from_urdf(URDF, TOOL, ignore_pairs=IGNORE)

# a slide, an endless joint about a skew axis, a fixed side branch and a finger that mimics: two capsules on one body
SMALL = """<robot name="small"><link name="base"/><link name="cart"/><link name="wheel"/><link name="tip"/>
<link name="lamp"/><link name="finger"/>
<joint name="rail" type="prismatic"><parent link="base"/><child link="cart"/><origin xyz="0 0 0.5" rpy="0.3 -0.2 0.7"/>
<axis xyz="0 2 0"/><limit lower="-1" upper="1" velocity="0.5" effort="1"/></joint>
<joint name="spin" type="continuous"><parent link="cart"/><child link="wheel"/><origin xyz="0.1 0.2 0.3"/>
<axis xyz="1 1 0.5"/></joint>
<joint name="end" type="fixed"><parent link="wheel"/><child link="tip"/><origin xyz="0.4 0 0" rpy="0 0 1"/></joint>
<joint name="arm" type="fixed"><parent link="cart"/><child link="lamp"/><origin xyz="0 0 0.3"/></joint>
<joint name="grip" type="prismatic"><parent link="tip"/><child link="finger"/><axis xyz="1 0 0"/>
<limit lower="0" upper="0.04" velocity="1" effort="1"/><mimic joint="spin"/></joint></robot>"""


def in_mujoco(urdf):
    """Load the same URDF with MuJoCo's own reader; every link keeps its frame."""
    options = '<mujoco><compiler fusestatic="false" balanceinertia="true"/></mujoco>'
    return mujoco.MjModel.from_xml_string(urdf.replace("</robot>", f"{options}</robot>"))


def with_balls(urdf):
    """Give every link of SMALL a shape: MuJoCo moves nothing without mass."""
    ball = '<collision><geometry><sphere radius="0.02"/></geometry></collision>'
    for link in ("base", "cart", "wheel", "tip", "lamp", "finger"):
        urdf = urdf.replace(f'<link name="{link}"/>', f'<link name="{link}">{ball}</link>')
    return urdf


@pytest.mark.parametrize(
    ("kinematics", "text"),
    [
        (PANDA, URDF.read_text()),
        (Kinematics.from_urdf(SMALL, "tip", []), with_balls(SMALL).replace("<mimic ", "<skip ")),
    ],
    ids=["panda", "small"],
)
def test_poses_and_jacobian_are_mujocos(kinematics, text):
    model = in_mujoco(text)
    data = mujoco.MjData(model)
    rng = np.random.default_rng([0, 7])
    addresses = [model.joint(name).qposadr[0] for name in kinematics.joints]
    dofs = [model.joint(name).dofadr[0] for name in kinematics.joints]
    low, high = np.maximum(kinematics.low, -4.0), np.minimum(kinematics.high, 4.0)
    for _ in range(50):
        q = rng.uniform(low, high)
        data.qpos[:] = 0
        data.qpos[addresses] = q
        mujoco.mj_kinematics(model, data)
        mujoco.mj_comPos(model, data)
        poses = kinematics.fk(q)
        for link in kinematics.links[1:]:
            body = data.body(link)
            np.testing.assert_allclose(poses[link][:3, 3], body.xpos, atol=1e-9)
            np.testing.assert_allclose(poses[link][:3, :3], body.xmat.reshape(3, 3), atol=1e-9)
        position, quaternion = kinematics.tool(q)
        body = data.body(kinematics.tool_link)
        np.testing.assert_allclose(position, body.xpos, atol=1e-9)
        assert quaternion[0] >= 0
        assert abs(np.dot(quaternion, body.xquat)) == pytest.approx(1.0, abs=1e-12)
        linear, angular = np.zeros((3, model.nv)), np.zeros((3, model.nv))
        mujoco.mj_jacBody(model, data, linear, angular, body.id)
        np.testing.assert_allclose(kinematics.jacobian(q), np.vstack([linear, angular])[:, dofs], atol=1e-9)


def test_panda_is_robosuites_panda_up_to_its_flange():
    robosuite = pytest.importorskip("robosuite")
    path = Path(robosuite.__file__).parent / "models" / "assets" / "robots" / "panda" / "robot.xml"
    model = mujoco.MjModel.from_xml_path(str(path))
    data = mujoco.MjData(model)
    rng = np.random.default_rng([0, 8])
    hinges = [i for i in range(model.njnt) if model.jnt_type[i] == mujoco.mjtJoint.mjJNT_HINGE]
    assert len(hinges) == 7
    np.testing.assert_allclose(model.jnt_range[hinges], np.column_stack([PANDA.low, PANDA.high]), atol=1e-3)
    for _ in range(20):
        q = rng.uniform(PANDA.low, PANDA.high)
        data.qpos[model.jnt_qposadr[hinges]] = q
        mujoco.mj_kinematics(model, data)
        base, poses = data.body("link0"), PANDA.fk(q)
        for i in range(1, 8):
            body = data.body(f"link{i}")
            here = base.xmat.reshape(3, 3).T @ (body.xpos - base.xpos)
            np.testing.assert_allclose(poses[f"panda_link{i}"][:3, 3], here, atol=1e-4)
            turned = base.xmat.reshape(3, 3).T @ body.xmat.reshape(3, 3)
            np.testing.assert_allclose(poses[f"panda_link{i}"][:3, :3], turned, atol=1e-4)


def test_jacobian_is_the_derivative_of_the_tools_pose():
    q, step = HOME + 0.1, 1e-6
    for i, column in enumerate(PANDA.jacobian(q).T):
        shift = step * np.eye(7)[i]
        there, back = PANDA.fk(q + shift)[TOOL], PANDA.fk(q - shift)[TOOL]
        np.testing.assert_allclose((there[:3, 3] - back[:3, 3]) / (2 * step), column[:3], atol=1e-8)
        spin = (there[:3, :3] - back[:3, :3]) / (2 * step) @ PANDA.fk(q)[TOOL][:3, :3].T
        np.testing.assert_allclose([spin[2, 1], spin[0, 2], spin[1, 0]], column[3:], atol=1e-8)


def test_panda_as_published():
    assert PANDA.joints == tuple(f"panda_joint{i}" for i in range(1, 8))
    np.testing.assert_array_equal(PANDA.velocity, [2.175] * 4 + [2.61] * 3)
    assert (PANDA.low[3], PANDA.high[3]) == (-3.0718, -0.0698)
    position, quaternion = PANDA.tool(HOME)  # the ready pose: hand pointing down
    np.testing.assert_allclose(position, [0.3069, 0, 0.4869], atol=1e-4)
    np.testing.assert_allclose(np.abs(quaternion), [0, 1, 0, 0], atol=1e-9)


@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q) > 0.1))
def test_quaternions_come_back_from_matrices(values):
    w, x, y, z = q = np.array(values) / np.linalg.norm(values)
    matrix = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    back = _quaternion(matrix)
    assert back[0] >= 0
    assert abs(np.dot(back, q)) == pytest.approx(1.0, abs=1e-9)


# ---- distances

number = st.one_of(st.floats(-2, 2), st.sampled_from([-1.0, 0.0, 0.5, 1.0]))  # the latter: parallel, touching, points
point = st.tuples(number, number, number).map(np.array)
SHARES = np.linspace(0, 1, 201)[:, None]


@settings(deadline=None)
@given(point, point, point, point)
def test_segment_distance_is_the_least_of_all_points(p1, q1, p2, q2):
    distance = float(segment_distance(*(x[None] for x in (p1, q1, p2, q2)))[0])
    a, b = p1 + SHARES * (q1 - p1), p2 + SHARES * (q2 - p2)
    sampled = np.linalg.norm(a[:, None] - b[None], axis=2).min()
    spacing = 0.0025 * (np.linalg.norm(q1 - p1) + np.linalg.norm(q2 - p2))  # half of what a sample misses, each
    assert sampled - spacing - 1e-9 <= distance <= sampled + 1e-9


@settings(deadline=None)
@example(np.zeros(3), np.array([0, 0, 2e-313]), np.zeros(3), np.ones(3))  # a plane at more than a float's range
@given(point, point, point, st.tuples(*[st.floats(0.01, 2)] * 3).map(np.array))
def test_segment_box_distance_is_the_least_of_all_points(p, q, low, size):
    distance = float(segment_box_distance(p[None], q[None], low[None], (low + size)[None])[0])
    points = p + SHARES * (q - p)
    sampled = np.linalg.norm(points - np.clip(points, low, low + size), axis=1).min()
    assert sampled - 0.0025 * np.linalg.norm(q - p) - 1e-9 <= distance <= sampled + 1e-9


def test_distances_known_by_hand():
    x, y, z = np.eye(3)[:, None]
    zero = np.zeros((1, 3))
    assert segment_distance(zero, x, 2 * z, 2 * z + y) == 2.0, "crossing above each other"
    assert segment_distance(zero, x, 3 * x, 4 * x) == 2.0, "in line"
    assert segment_distance(zero, x, y, y + x) == 1.0, "parallel"
    assert segment_distance(zero, zero, 3 * x + 4 * y, 3 * x + 4 * y) == 5.0, "points"
    low, high = np.zeros((1, 3)), np.ones((1, 3))
    assert segment_box_distance(2 * x, 2 * x + y, low, high) == 1.0
    assert segment_box_distance(-x - 0.5 * y, 2 * x + 2.5 * y, low, high) == 0.0, "through it"
    corner = segment_box_distance(2 * x + y + z, x + 2 * y + z, low, high)
    np.testing.assert_allclose(corner, math.sqrt(0.5), rtol=1e-12)


# ---- clearance


def test_clearance_names_what_is_near():
    assert PANDA.clearance(HOME)[0] > 0.03
    folded = HOME.copy()
    folded[[1, 3, 5]] = -1.7, -3.0, 0.3
    distance, what = PANDA.clearance(folded)
    assert distance < 0 and "panda_hand" in what
    tool = PANDA.tool(HOME)[0]
    box = tool + np.array([[[-0.1, -0.1, -0.3], [0.1, 0.1, -0.05]]])
    distance, what = PANDA.clearance(HOME, np.concatenate([box + 5.0, box]))
    # the hand's second capsule: 0.1 m from the hand's frame, which is 0.1034 m from the tool's, radius 0.02 m
    assert what == "panda_hand and keep_out[1]"
    assert distance == pytest.approx(0.05 + 0.0034 - 0.02, abs=1e-9)
    assert PANDA.clearance(HOME, [(box[0, 0] + 5, box[0, 1] + 5)])[1] != what
    low = np.array([0, 0.6, 0, -2.1, 0, 2.7, np.pi / 4])  # the hand points down again
    distance, what = PANDA.clearance(low, floor=PANDA.tool(low)[0][2] - 0.03)
    assert (what, distance) == ("panda_hand and the floor", pytest.approx(0.03 + 0.0034 - 0.02, abs=1e-9))


def test_the_base_may_stand_on_something():
    table = [([-1, -1, -1], [1, 1, 0.0])]
    assert PANDA.clearance(HOME, table)[0] > 0.03
    assert PANDA.clearance(HOME, floor=0.0)[0] > 0.03


def test_neighbours_and_pairs_that_may_touch_are_not_compared():
    bent = HOME.copy()
    bent[[1, 3]] = 1.7, -1.0
    distance, what = Kinematics.from_urdf(URDF, TOOL).clearance(bent)
    assert distance < 0 and what == "panda_link1 and panda_link3"
    assert PANDA.clearance(bent)[0] > 0
    shapes = [
        {"link": "wheel", "radius": 0.1, "start": [0, 0, 0], "end": [0, 0, 0.1]},
        {"link": "cart", "radius": 0.5, "start": [0, 0, 0], "end": [0, 0, 0]},
        {"link": "lamp", "radius": 0.5, "start": [0, 0, 0], "end": [0, 0, 0]},
        {"link": "base", "radius": 0.5, "start": [0, 0, 0], "end": [0, 0, 0]},
    ]
    small = Kinematics.from_urdf(SMALL, "tip", shapes[:3])
    assert small.clearance(np.zeros(2)) == (math.inf, ""), "wheel and cart are neighbours; cart and lamp one body"
    small = Kinematics.from_urdf(SMALL, "tip", shapes)
    assert small.clearance(np.zeros(2))[1] == "wheel and base"
    assert Kinematics.from_urdf(SMALL, "tip", []).clearance(np.zeros(2), floor=0.0) == (math.inf, "")


def test_a_box_is_only_compared_with_what_moves():
    fixed = Capsule("base", 0.1, np.zeros(3), np.zeros(3))
    small = Kinematics.from_urdf(SMALL, "tip", [fixed])
    assert small.clearance(np.zeros(2), [([-1, -1, -1], [1, 1, 1])], floor=1.0) == (math.inf, "")


# ---- what is refused


def urdf(joint="", links='<link name="a"/><link name="b"/>', joint_type="revolute"):
    limit = '<limit lower="-1" upper="1" velocity="1" effort="1"/>'
    body = joint or limit
    return (
        f'<robot name="r">{links}<joint name="hinge" type="{joint_type}"><parent link="a"/><child link="b"/>{body}'
        "</joint></robot>"
    )


BOMB = '<!DOCTYPE r [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]>' + urdf()
LIMIT = '<limit lower="-1" upper="1" velocity="1"/>'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (BOMB, r"document type \(r\) is not allowed"),
        ('<!DOCTYPE r SYSTEM "file:///etc/passwd">' + urdf(), "document type"),
        ("<robot", "not XML"),
        ("<mujoco/>", "begins with <robot>, got <mujoco>"),
        ('<robot xmlns:xacro="x"><xacro:macro/></robot>', "expand it first"),
        (urdf(joint_type="floating"), "joint hinge is floating"),
        (urdf(joint_type=""), "joint hinge is ; on the way"),
        (urdf(LIMIT + '<mimic joint="x"/>'), "hinge mimics another"),
        (urdf("<origin/>"), "hinge needs a <limit>"),
        (urdf('<limit lower="1" upper="-1" velocity="1"/>'), "lower < upper"),
        (urdf('<limit lower="-1" upper="1" velocity="0"/>'), "velocity > 0"),
        (urdf('<limit lower="nan" upper="1" velocity="1"/>'), "lower must be 1 finite number, got 'nan'"),
        (urdf(LIMIT + '<axis xyz="0 0 0"/>'), "its axis is zero"),
        (urdf(LIMIT + '<origin xyz="1 2"/>'), "xyz must be 3 finite numbers, got '1 2'"),
        (urdf(links='<link name="a"/><link name="c"/>'), "names no link 'b'; there are a, c"),
        (urdf(links='<link name="a"/><link name="b"/><link name="b"/>'), "link twice: b"),
        (urdf(links='<link name="a"/><link name="b"/><link name="c"/>'), "one link has no parent.*got a, c"),
        (urdf(links='<link name="a"/><link/>'), "a link without a name"),
        ('<robot><link name="a"/><link name="x"/></robot>', "one link has no parent"),
        ('<robot><link name="b"/><joint name="j"><child link="b"/></joint></robot>', "needs <parent link=...>"),
        ('<robot><link name="a"/></robot>', "no link 'b' for the tool; there are a"),
    ],
)
def test_what_is_no_arm_is_refused_by_name(text, says):
    with pytest.raises(ValueError, match=says):
        Kinematics.from_urdf(text, "b")


def test_a_document_type_cannot_hide_behind_another_encoding(tmp_path):
    path = tmp_path / "sly.urdf"
    path.write_bytes(BOMB.encode("utf-16"))
    with pytest.raises(ValueError, match=r"sly\.urdf: a document type"):
        Kinematics.from_urdf(path, "b")
    with pytest.raises(FileNotFoundError):
        Kinematics.from_urdf(tmp_path / "none.urdf", "b")
    path.write_bytes(b"<robot>" + b" " * (10 * 2**20) + b"</robot>")
    with pytest.raises(ValueError, match="10485775 bytes; a URDF has at most"):
        Kinematics.from_urdf(path, "b")


def test_a_loop_of_links_is_refused():
    def joint(name, parent, child):
        return f'<joint name="{name}" type="fixed"><parent link="{parent}"/><child link="{child}"/></joint>'

    links = "".join(f'<link name="{name}"/>' for name in "rab")
    with pytest.raises(ValueError, match="form a loop"):
        Kinematics.from_urdf(f"<robot>{links}{joint('1', 'a', 'b')}{joint('2', 'b', 'a')}</robot>", "b")


@pytest.mark.parametrize(
    ("capsules", "ignore", "says"),
    [
        ([{"link": "nose", "radius": 0.1, "start": [0, 0, 0], "end": [0, 0, 0]}], [], "no link 'nose'"),
        ([{"link": "finger", "radius": 0.1, "start": [0, 0, 0], "end": [0, 0, 0]}], [], "no link 'finger'"),
        ([{"link": "tip", "radius": 0.0, "start": [0, 0, 0], "end": [0, 0, 0]}], [], "'tip': needs a positive radius"),
        ([{"link": "tip", "radius": 0.1, "start": [0, 0], "end": [0, 0, 0]}], [], "3 numbers"),
        ([{"link": "tip", "radius": 0.1, "start": [0, 0, np.nan], "end": [0, 0, 0]}], [], "3 numbers"),
        ([{"link": "tip", "start": [0, 0, 0], "end": [0, 0, 0]}], [], "positive radius"),
        ([], [("tip", "nose")], "no link 'nose'"),
        ([], [("tip",)], "pairs of links"),
    ],
)
def test_capsules_and_pairs_that_fit_no_link_are_refused(capsules, ignore, says):
    with pytest.raises(ValueError, match=says):
        Kinematics.from_urdf(SMALL, "tip", capsules, ignore)


def test_a_mesh_is_not_silently_left_out():
    mesh = '<link name="b"><collision><geometry><mesh filename="b.stl"/></geometry></collision></link>'
    text = urdf(links='<link name="a"/>' + mesh)
    with pytest.raises(ValueError, match=r"link b collides as mesh.*limits\.capsules"):
        Kinematics.from_urdf(text, "b")
    assert Kinematics.from_urdf(text, "b", capsules=[]).joints == ("hinge",)


def test_joints_of_another_number_are_refused():
    with pytest.raises(ValueError, match=r"7 joints \(panda_joint1, .*got \(6,\)"):
        PANDA.tool(np.zeros(6))


@pytest.mark.parametrize("places", [2, 4])
def test_a_thin_wall_between_two_places_of_a_way_is_not_jumped_over(places):
    begin, end = HOME.copy(), HOME.copy()
    begin[0], end[0] = -0.6, 0.6

    def way(count):
        return PANDA.place(np.linspace(begin, end, count))

    tool, margin = PANDA.tool(HOME)[0], 0.01
    half = np.array([0.05, 0.001, 0.05])
    wall = [(tool - half, tool + half)]  # 2 mm, half way
    assert min(PANDA.clearance(q, wall)[0] for q in (begin, end)) > 3 * margin
    distance, what = PANDA.way_clearance(way(places), way, wall, margin)
    assert distance < margin and what.endswith("keep_out[0]")
    up = np.array([0.0, 0.0, 0.6])
    aside = [(low + up, high + up) for low, high in wall]
    closest = min(PANDA.clearance(q, aside)[0] for q in way(400).q)
    assert PANDA.way_clearance(way(places), way, aside, margin)[0] >= margin < closest


@pytest.mark.parametrize("seed", range(12))
def test_a_way_is_clear_only_if_every_place_on_it_is(seed):
    rng = np.random.default_rng([23, seed])
    begin = HOME + rng.uniform(-0.5, 0.5, 7)
    end = begin + rng.uniform(-0.15, 0.15, 7)

    def way(count):
        return PANDA.place(np.linspace(begin, end, count))

    center = PANDA.tool(0.5 * (begin + end))[0] + rng.uniform(-0.15, 0.15, 3)
    half = rng.uniform(0.001, 0.1, 3)
    box, margin = [(center - half, center + half)], 0.02
    truth = min(PANDA.clearance(q, box)[0] for q in way(200).q)
    found = PANDA.way_clearance(way(4), way, box, margin)[0]
    assert (found < margin) or truth >= margin - 1e-3, (
        "what is too near must be found, but for what lies between places"
    )
    assert (found >= margin) or truth < margin
