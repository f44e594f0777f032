"""Where an arm's links are: forward kinematics, Jacobian and clearance, from a URDF, with NumPy and nothing else.

Links are followed from the root to the tool, with whatever is rigidly fixed to them; what hangs on other moving joints
(fingers) is left out. Frames are the root link's. Shape legend: l links, j joints, c capsules, k boxes, m pairs.
Source of the format: ROS URDF XML specification (robot, link, joint, collision).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, Union
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np

MAX_BYTES = 10 * 2**20  # of a URDF: the largest public ones are below 1 MB
MOVING = ("revolute", "continuous", "prismatic")
TINY = 1e-12  # [m]
MOST_PLACES = 64  # on a way: an arm that brakes over more margins than that cannot be looked at within a tick
PARALLEL = 1e-12  # squared sine of an angle between two capsules' axes below which they count as parallel


@dataclass(frozen=True, eq=False)
class Capsule:
    """All points within `radius` of a segment, in its link's frame [m]."""

    link: str
    radius: float
    start: np.ndarray  # [3]
    end: np.ndarray  # [3]


@dataclass(frozen=True, eq=False)
class _Joint:
    name: str
    type: str
    parent: str
    child: str
    origin: np.ndarray  # [4 4], child's frame at rest in its parent's
    axis: np.ndarray  # [3]
    low: float
    high: float
    velocity: float
    mimic: bool


class Kinematics:
    """One arm. Build it with `Kinematics.from_urdf`."""

    def __init__(
        self, root: str, joints: Sequence[_Joint], tool: str, capsules: Sequence[Capsule], ignore: Sequence[Any]
    ) -> None:
        self.links = (root, *(joint.child for joint in joints))  # parents first
        self.tool_link = tool
        index = {link: i for i, link in enumerate(self.links)}
        moving = [i for i, joint in enumerate(joints, start=1) if joint.type in MOVING]
        self._parents = [index[joint.parent] for joint in joints]
        self._moving, self._tool = np.array(moving, int), index[tool]
        self._origins = np.array([joint.origin for joint in joints]).reshape(-1, 4, 4)
        arm = [joints[i - 1] for i in moving]
        self.joints = tuple(joint.name for joint in arm)
        self.low = np.array([joint.low for joint in arm])  # [j], rad or m; -inf for a continuous joint
        self.high = np.array([joint.high for joint in arm])
        self.velocity = np.array([joint.velocity for joint in arm])  # [j], rad/s or m/s
        self._axes = np.array([joint.axis for joint in arm]).reshape(-1, 3)
        self._slides = np.array([joint.type == "prismatic" for joint in arm], bool)
        turning = np.where(self._slides[:, None], 0.0, self._axes)
        self._cross = _cross(turning)
        self._cross2 = self._cross @ self._cross
        self._sliding = np.where(self._slides[:, None], self._axes, 0.0)
        self._set_capsules(index, joints, capsules, ignore)

    @classmethod
    def from_urdf(
        cls,
        source: Union[str, Path],
        tool: str,
        capsules: Optional[Sequence[Any]] = None,
        ignore_pairs: Sequence[Sequence[str]] = (),
    ) -> "Kinematics":
        """Build from a URDF.

        Args:
            source: a path, or the XML itself.
            tool: the link whose pose is the tool's.
            capsules: mappings or objects with link, radius [m], start and end [m, 3]; None: the URDF's own collision
                cylinders and spheres, and a link with another shape is refused. Empty: nothing is checked.
            ignore_pairs: links that may touch; neighbours may anyway.

        Raises:
            OSError: no such file.
            ValueError: not a URDF of a tree of links, a document type or an entity, a link that is not there, a joint
                on the way to the tool that is of another type, that mimics one, or that has no limits.
        """
        robot = _parse(source)
        joints, root = _tree(robot)
        way = _way(joints, root, tool)
        kept = _kept(joints, root, way)
        links = {root, *(joint.child for joint in kept)}
        shapes = _collisions(robot, links) if capsules is None else [_capsule(c) for c in capsules]
        for name in [shape.link for shape in shapes] + [link for pair in ignore_pairs for link in pair]:
            if name not in links:
                raise ValueError(f"urdf: no link {name!r} that the joints to {tool} move; there are {_list(links)}")
        if any(len(pair) != 2 for pair in ignore_pairs):
            raise ValueError(f"urdf: ignore_pairs are pairs of links, got {[list(pair) for pair in ignore_pairs]}")
        return cls(root, kept, tool, shapes, ignore_pairs)

    # ---- poses

    def place(self, q: np.ndarray) -> "Placed":
        """Return the arm at each of several joint positions q [k j]: what follows from one pass over the links."""
        q = np.asarray(q, float)
        if q.ndim != 2 or q.shape[1] != len(self.joints):
            raise ValueError(f"kinematics: {len(self.joints)} joints ({', '.join(self.joints)}), got {q.shape[-1:]}")
        return Placed(self, q, self._poses(q))

    def fk(self, q: np.ndarray) -> Dict[str, np.ndarray]:
        """Return the pose [4 4] of every link at joint positions q [j]."""
        return dict(zip(self.links, self.place(q[None]).poses[0], strict=True))

    def tool(self, q: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
        """Return the tool's position [m] and quaternion wxyz (w >= 0) at joint positions q [j]."""
        pose = self.place(q[None]).poses[0, self._tool]
        return pose[:3, 3].copy(), _quaternion(pose[:3, :3])

    def jacobian(self, q: np.ndarray) -> np.ndarray:
        """Return the tool's velocity per joint velocity, [6 j]: linear above angular, in the root's frame."""
        return self.place(q[None]).jacobian()

    def _jacobian(self, poses: np.ndarray) -> np.ndarray:
        frames = poses[self._moving]
        axes = (frames[:, :3, :3] @ self._axes[:, :, None])[:, :, 0]
        arms = poses[self._tool][:3, 3] - frames[:, :3, 3]
        slides = self._slides[:, None]
        (ax, ay, az), (x, y, z) = axes.T, arms.T
        speed = np.stack([ay * z - az * y, az * x - ax * z, ax * y - ay * x], axis=1)
        linear, angular = np.where(slides, axes, speed), np.where(slides, 0.0, axes)
        return np.hstack([linear, angular]).T

    def _poses(self, q: np.ndarray) -> np.ndarray:
        """Return poses [k l 4 4] at q [k j]."""
        angle = q[:, :, None, None]  # Rodrigues; a sliding joint's matrices are zero
        motion = np.zeros((*q.shape, 4, 4))
        motion[:, :, :3, :3] = np.eye(3) + np.sin(angle) * self._cross + (1 - np.cos(angle)) * self._cross2
        motion[:, :, :3, 3] = q[:, :, None] * self._sliding
        motion[:, :, 3, 3] = 1.0
        local = np.repeat(self._origins[:, None], len(q), axis=1)  # [l - 1, k 4 4]
        local[self._moving - 1] = local[self._moving - 1] @ motion.swapaxes(0, 1)
        poses = np.empty((len(self.links), len(q), 4, 4))
        poses[0] = np.eye(4)
        for i, parent in enumerate(self._parents):
            np.matmul(poses[parent], local[i], out=poses[i + 1])
        return poses.swapaxes(0, 1)

    # ---- clearance

    def clearance(
        self, q: np.ndarray, keep_out: Union[np.ndarray, Sequence[Any]] = (), floor: Optional[float] = None
    ) -> Tuple[float, str]:
        """Return the smallest distance [m] between capsules, and of capsules to boxes and floor, and what is so near.

        Negative: they overlap, by that much at least. Links that no joint moves are not compared with boxes and floor:
        the arm's base stands on something. With nothing to compare the distance is infinite.

        Args:
            q: joint positions [j].
            keep_out: boxes as (low, high), [k 2 3] m, in the root's frame.
            floor: height of a plane [m]; everything below it is kept out.
        """
        boxes, poses = np.asarray(keep_out, float).reshape(-1, 2, 3), self.place(q[None]).poses
        gaps = self._gaps(poses, boxes)[0]
        found = self._nearest(gaps, np.arange(len(gaps)), len(boxes))
        if floor is not None and len(self._free):
            heights = self._capsule_ends(poses)[0, self._free, 2]
            gaps = heights.min(axis=1) - self._radii[self._free] - floor
            i = int(np.argmin(gaps))
            found = min(found, (float(gaps[i]), f"{self._names[self._free[i]]} and the floor"))
        return found

    def way_clearance(
        self,
        way: "Placed",
        finer: Callable[[int], "Placed"],
        keep_out: Union[np.ndarray, Sequence[Any]],
        margin: float,
    ) -> Tuple[float, str]:
        """Return the smallest distance as `clearance` does, but along a way; exact only where it is below the margin.

        Between two places a distance changes by no more than the joints move times how far they reach. What that does
        not prove to stay above the margin is looked at again, so closely that it moves by about a margin from one place
        to the next: nothing is jumped over.

        Args:
            way: places in their order, one if the arm rests.
            finer: returns the same way in so many places.
            keep_out: boxes as (low, high), [k 2 3] m.
            margin: [m].
        """
        boxes = np.asarray(keep_out, float).reshape(-1, 2, 3)
        reach = np.concatenate([self._pair_reach, np.repeat(self._reach[self._free], len(boxes), axis=0)])
        change = np.abs(np.diff(way.q, axis=0)) @ reach.T  # [k - 1 m], at most
        unsure = np.flatnonzero(self._apart(way.poses[0], boxes) - change.sum(axis=0) < margin)
        gaps = self._gaps(way.poses, boxes, unsure)
        found = self._nearest(gaps.min(axis=0), unsure, len(boxes))
        if len(gaps) == 1 or found[0] < margin:
            return found
        close = (0.5 * (gaps[:-1] + gaps[1:] - change[:, unsure]) < margin).any(axis=0)
        if not close.any():
            return found
        count = math.ceil(change[:, unsure[close]].sum(axis=0).max() / margin) + 1
        gaps = self._gaps(finer(min(count, MOST_PLACES)).poses, boxes, unsure[close])
        return min(found, self._nearest(gaps.min(axis=0), unsure[close], len(boxes)))

    def _apart(self, poses: np.ndarray, boxes: np.ndarray) -> np.ndarray:
        """Return what the distances [m] of `_gaps` are at least at one place: those of balls around the capsules."""
        pose, (a, b) = poses[self._capsule_links], self._pairs
        centers = (pose[:, :3, :3] @ self._centers[:, :, None])[:, :, 0] + pose[:, :3, 3]
        pairs = _norm(centers[a] - centers[b]) - self._balls[a] - self._balls[b]
        if not len(boxes):
            return pairs
        free = centers[self._free, None]
        beyond = _norm(np.maximum(0.0, np.maximum(boxes[:, 0] - free, free - boxes[:, 1])))
        return np.concatenate([pairs, (beyond - self._balls[self._free, None]).ravel()])

    def _capsule_ends(self, poses: np.ndarray) -> np.ndarray:
        """Return [k c 3 2]."""
        poses = poses[:, self._capsule_links]
        return poses[..., :3, :3] @ self._ends + poses[..., :3, 3:]

    def _gaps(self, poses: np.ndarray, boxes: np.ndarray, which: Optional[np.ndarray] = None) -> np.ndarray:
        """Return the distances [k m] of the pairs of capsules, then of every free capsule to every box."""
        ends, radii, count = self._capsule_ends(poses), self._radii, len(self._pairs[0])
        start, end = ends[..., 0], ends[..., 1]
        which = np.arange(count + len(self._free) * len(boxes)) if which is None else which
        a, b = (side[which[which < count]] for side in self._pairs)
        gaps = np.empty((len(poses), len(which)))
        if len(a):
            ab = (side.reshape(-1, 3) for side in (start[:, a], end[:, a], start[:, b], end[:, b]))
            gaps[:, : len(a)] = segment_distance(*ab).reshape(-1, len(a)) - radii[a] - radii[b]
        if len(which) > len(a):
            free, box = np.divmod(which[len(a) :] - count, len(boxes))
            c, rows = self._free[free], (len(poses), len(free), 3)
            low, high = (np.broadcast_to(boxes[box, i], rows).reshape(-1, 3) for i in (0, 1))
            found = segment_box_distance(start[:, c].reshape(-1, 3), end[:, c].reshape(-1, 3), low, high)
            gaps[:, len(a) :] = found.reshape(-1, len(c)) - radii[c]
        return gaps

    def _nearest(self, gaps: np.ndarray, which: np.ndarray, boxes: int) -> Tuple[float, str]:
        """Return the least of the gaps [m] and what it is between."""
        if not len(gaps):
            return math.inf, ""
        i, (a, b) = int(np.argmin(gaps)), self._pairs
        index = int(which[i])
        if index < len(a):
            return float(gaps[i]), f"{self._names[a[index]]} and {self._names[b[index]]}"
        free, box = divmod(index - len(a), boxes)
        return float(gaps[i]), f"{self._names[self._free[free]]} and keep_out[{box}]"

    def _set_capsules(
        self, index: Mapping[str, int], joints: Sequence[_Joint], capsules: Sequence[Capsule], ignore: Sequence[Any]
    ) -> None:
        self.capsules = tuple(capsules)
        self._names = [capsule.link for capsule in capsules]
        self._radii = np.array([capsule.radius for capsule in capsules])
        self._capsule_links = np.array([index[name] for name in self._names], int)
        self._ends = np.array([np.stack([c.start, c.end], axis=1) for c in capsules]).reshape(-1, 3, 2)
        self._centers = self._ends.mean(axis=2)
        self._balls = self._radii + 0.5 * np.linalg.norm(self._ends[:, :, 1] - self._ends[:, :, 0], axis=1)
        body = [0]  # links that no joint moves against each other are one body
        above = {0: -1}  # body -> the one it hangs on
        for i, (joint, parent) in enumerate(zip(joints, self._parents, strict=True), start=1):
            body.append(i if joint.type in MOVING else body[parent])
            above.setdefault(body[i], body[parent])
        of = [body[i] for i in self._capsule_links]
        may = {frozenset(pair) for pair in ignore}
        pairs = [
            (a, b)
            for a in range(len(of))
            for b in range(a + 1, len(of))
            if of[a] != of[b]
            and of[a] != above[of[b]]
            and of[b] != above[of[a]]
            and frozenset((self._names[a], self._names[b])) not in may
        ]
        self._pairs = tuple(np.array(pairs, int).reshape(-1, 2).T)
        self._free = np.array([i for i, b in enumerate(of) if b != 0], int)
        self._reach = self._reaches(joints)
        a, b = self._pairs
        alone = (self._reach[a] > 0) != (self._reach[b] > 0)  # what moves both alike does not change their distance
        self._pair_reach = np.where(alone, np.maximum(self._reach[a], self._reach[b]), 0.0)

    def _reaches(self, joints: Sequence[_Joint]) -> np.ndarray:
        """Return how far a capsule's axis moves at most for what a joint moves, [c j]: m/rad, or 1 if it slides."""
        number = {i: j for j, i in enumerate(self._moving)}
        reaches = np.zeros((len(self._radii), len(number)))
        for c, link in enumerate(self._capsule_links):
            away = float(np.linalg.norm(self._ends[c], axis=0).max())
            while link:
                joint = joints[link - 1]
                if link in number:
                    slides = joint.type == "prismatic"
                    reaches[c, number[link]] = 1.0 if slides else max(away, TINY)
                    away += max(abs(joint.low), abs(joint.high)) if slides else 0.0
                away += float(np.linalg.norm(joint.origin[:3, 3]))
                link = self._parents[link - 1]
        return reaches


@dataclass(frozen=True, eq=False)
class Placed:
    """An arm at several joint positions; build it with `Kinematics.place`."""

    arm: Kinematics
    q: np.ndarray  # [k j]
    poses: np.ndarray  # [k l 4 4]

    @property
    def tools(self) -> np.ndarray:
        """Return the tool's positions [k 3] m."""
        return self.poses[:, self.arm._tool, :3, 3]

    def jacobian(self) -> np.ndarray:
        """Return the tool's velocity per joint velocity at the first place, as `Kinematics.jacobian`."""
        return self.arm._jacobian(self.poses[0])


# ---- distances


def segment_distance(p1: np.ndarray, q1: np.ndarray, p2: np.ndarray, q2: np.ndarray) -> np.ndarray:
    """Return the distances [m] between segments p1-q1 and p2-q2, [m 3] each; points are segments, too.

    The nearest points are both inside, or one is an end (Ericson, Real-Time Collision Detection, 5.1.9).
    """
    d1, d2, r = q1 - p1, q2 - p2, p1 - p2
    a, e, b = _dot(d1, d1), _dot(d2, d2), _dot(d1, d2)
    c, f = _dot(d1, r), _dot(d2, r)
    det = a * e - b * b
    crossing = det > PARALLEL * a * e
    det = np.where(crossing, det, 1.0)
    s, t = _share((b * f - c * e) / det), _share((a * f - b * c) / det)
    inside = np.where(crossing, _norm(r + s[:, None] * d1 - t[:, None] * d2), np.inf)
    points = np.concatenate([p1, q1, p2, q2])
    starts, ends = np.concatenate([p2, p2, p1, p1]), np.concatenate([q2, q2, q1, q1])
    at_ends = _point_segment_distance(points, starts, ends).reshape(4, -1)
    return np.minimum(inside, at_ends.min(axis=0, initial=np.inf))


def _point_segment_distance(point: np.ndarray, start: np.ndarray, end: np.ndarray) -> np.ndarray:
    along, to = end - start, point - start
    length = _dot(along, along)
    share = _share(_dot(to, along) / np.where(length > 0, length, 1.0))
    return _norm(to - share[:, None] * along)


def segment_box_distance(p: np.ndarray, q: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return the distances [m] of segments p-q to boxes low..high, [m 3] each; 0 where they meet.

    Along the segment the squared distance is convex and, between the planes of the box's faces, quadratic: the least of
    the quadratics' minima is exact.
    """
    d = q - p
    d = np.where(np.abs(d) < TINY, 0.0, d)  # along an axis it hardly moves on, a plane would be infinitely far
    safe = np.where(d == 0, 1.0, d)
    planes = np.where(np.tile(d, 2) == 0, 0.0, np.hstack([(low - p) / safe, (high - p) / safe]))
    edges = np.sort(np.hstack([_share(planes), np.zeros((len(p), 1)), np.ones((len(p), 1))]), axis=1)
    begin, end = edges[:, :-1], edges[:, 1:]
    middle = p[:, None] + (0.5 * (begin + end))[:, :, None] * d[:, None]  # [m 7 3]
    below, above = middle < low[:, None], middle > high[:, None]
    face = np.where(below, low[:, None], high[:, None])
    slope = np.where(below | above, d[:, None], 0.0)
    square, mixed = _dot(slope, slope), _dot(slope, face - p[:, None])
    at = np.minimum(np.maximum(mixed / np.where(square > 0, square, 1.0), begin), end)
    point = p[:, None] + at[:, :, None] * d[:, None]
    beyond = np.maximum(low[:, None] - point, 0) + np.maximum(point - high[:, None], 0)
    return _norm(beyond).min(axis=1, initial=np.inf)


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.einsum("...i,...i->...", a, b)


def _share(a: np.ndarray) -> np.ndarray:
    return np.minimum(np.maximum(a, 0.0), 1.0)  # np.clip costs three times as much on a few values


def _norm(a: np.ndarray) -> np.ndarray:
    return np.sqrt(_dot(a, a))


def _cross(axes: np.ndarray) -> np.ndarray:
    """Return matrices [j 3 3] that multiply from the left as the cross product with each axis."""
    matrices = np.zeros((len(axes), 3, 3))
    x, y, z = axes.T
    matrices[:, 0, 1], matrices[:, 0, 2], matrices[:, 1, 2] = -z, y, -x
    return matrices - matrices.transpose(0, 2, 1)


def _quaternion(r: np.ndarray) -> np.ndarray:
    """Return wxyz, w >= 0, of a rotation matrix: from its largest component (Shepperd 1978)."""
    trace = r[0, 0] + r[1, 1] + r[2, 2]
    squares = 0.25 * np.array([1 + trace, *(1 - trace + 2 * np.diag(r))])
    i = int(np.argmax(squares))
    skew = (r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1])
    symmetric = {(1, 2): r[1, 0] + r[0, 1], (1, 3): r[2, 0] + r[0, 2], (2, 3): r[2, 1] + r[1, 2]}
    largest = math.sqrt(squares[i])
    products = [skew[max(i, k) - 1] if 0 in (i, k) else symmetric[(min(i, k), max(i, k))] for k in range(4) if k != i]
    q = np.insert(0.25 * np.array(products) / largest, i, largest)
    return -q if q[0] < 0 else q


# ---- URDF


def _parse(source: Union[str, Path]) -> ElementTree.Element:
    """Read XML without document types: entities could expand without bound or read other files."""
    if isinstance(source, str) and source.lstrip().startswith("<"):
        data, where = source.encode(), "urdf"
    else:
        data, where = Path(source).read_bytes(), f"urdf {source}"
    if len(data) > MAX_BYTES:
        raise ValueError(f"{where}: {len(data)} bytes; a URDF has at most {MAX_BYTES}")
    builder, parser = ElementTree.TreeBuilder(), expat.ParserCreate()

    def refuse(name: str, *_: Any) -> None:
        raise ValueError(f"{where}: a document type ({name}) is not allowed; remove it")

    parser.StartDoctypeDeclHandler = refuse
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.data
    try:
        parser.Parse(data, True)
    except expat.ExpatError as e:
        raise ValueError(f"{where}: not XML: {e}") from None
    robot = builder.close()
    if robot.tag != "robot":
        raise ValueError(f"{where}: a URDF begins with <robot>, got <{robot.tag}>")
    if any(element.tag.startswith("xacro:") for element in robot.iter()):
        raise ValueError(f"{where}: this is xacro; expand it first: xacro FILE.xacro > FILE.urdf")
    return robot


def _tree(robot: ElementTree.Element) -> Tuple[List[_Joint], str]:
    """Return all joints and the root link."""
    links = [_name(link, "link") for link in robot.findall("link")]
    joints = [_joint(joint) for joint in robot.findall("joint")]
    children = [joint.child for joint in joints]
    for what, names in (("link", links), ("joint", [joint.name for joint in joints]), ("child link", children)):
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"urdf: {what} twice: {', '.join(twice)}")
    for joint in joints:
        for link in (joint.parent, joint.child):
            if link not in links:
                raise ValueError(f"urdf: joint {joint.name} names no link {link!r}; there are {_list(links)}")
    roots = [link for link in links if link not in children]
    if len(roots) != 1:
        raise ValueError(f"urdf: one link has no parent in a tree of links, got {_list(roots) or 'none'}")
    return joints, roots[0]


def _way(joints: Sequence[_Joint], root: str, tool: str) -> List[_Joint]:
    """Return the joints from the root to the tool, checked."""
    by_child = {joint.child: joint for joint in joints}
    if tool != root and tool not in by_child:
        raise ValueError(f"urdf: no link {tool!r} for the tool; there are {_list([root, *by_child])}")
    way: List[_Joint] = []
    while tool != root:
        if len(way) > len(joints):
            raise ValueError(f"urdf: the links around {tool} form a loop")
        way.insert(0, by_child[tool])
        tool = way[0].parent
    for joint in way:
        if joint.type not in (*MOVING, "fixed"):
            kinds = ", ".join((*MOVING, "fixed"))
            raise ValueError(f"urdf: joint {joint.name} is {joint.type}; on the way to the tool there may be {kinds}")
        if joint.mimic:
            raise ValueError(
                f"urdf: joint {joint.name} mimics another one, which is not supported on the way to the tool"
            )
        if joint.type in ("revolute", "prismatic") and not (joint.low < joint.high and joint.velocity > 0):
            raise ValueError(f"urdf: joint {joint.name} needs a <limit> with lower < upper and velocity > 0")
    return way


def _kept(joints: Sequence[_Joint], root: str, way: Sequence[_Joint]) -> List[_Joint]:
    """Return the joints on the way, and the fixed ones that hang on it, parents first."""
    kept: List[_Joint] = []
    reached = [root]
    for link in reached:
        for joint in joints:
            if joint.parent == link and (joint in way or joint.type == "fixed"):
                kept.append(joint)
                reached.append(joint.child)
    return kept


def _joint(element: ElementTree.Element) -> _Joint:
    name = _name(element, "joint")
    where = f"urdf: joint {name}"
    parent, child, limit = element.find("parent"), element.find("child"), element.find("limit")
    if parent is None or child is None:
        raise ValueError(f"{where}: needs <parent link=...> and <child link=...>")
    axis_element = element.find("axis")
    axis = _numbers("1 0 0" if axis_element is None else axis_element.get("xyz", "1 0 0"), 3, f"{where}: axis")
    length = float(np.linalg.norm(axis))
    type = element.get("type", "")
    if type in MOVING and length < 1e-9:
        raise ValueError(f"{where}: its axis is zero")
    given = {} if limit is None else limit.attrib
    bounds = {key: float(_numbers(given[key], 1, f"{where}: {key}")[0]) for key in given if key != "effort"}
    endless = type == "continuous"
    return _Joint(
        name=name,
        type=type,
        parent=parent.get("link", ""),
        child=child.get("link", ""),
        origin=_origin(element, where),
        axis=axis / length if length > 0 else axis,
        low=-math.inf if endless else bounds.get("lower", 0.0),
        high=math.inf if endless else bounds.get("upper", 0.0),
        velocity=bounds.get("velocity", math.inf if endless else 0.0),
        mimic=element.find("mimic") is not None,
    )


def _collisions(robot: ElementTree.Element, links: Any) -> List[Capsule]:
    """Return capsules that hold the cylinders and spheres of the links' collision shapes."""
    capsules = []
    for link in robot.findall("link"):
        name = _name(link, "link")
        for collision in link.findall("collision") if name in links else ():
            where = f"urdf: link {name}"
            geometry = collision.find("geometry")
            shape = None if geometry is None or not len(geometry) else geometry[0]
            tag = "nothing" if shape is None else shape.tag
            if shape is None or tag not in ("cylinder", "sphere"):
                raise ValueError(
                    f"{where} collides as {tag}, which is not supported; give limits.capsules in the embodiment file"
                )
            radius = float(_numbers(shape.get("radius", ""), 1, f"{where}: radius")[0])
            length = float(_numbers(shape.get("length", "0"), 1, f"{where}: length")[0])
            pose = _origin(collision, where)
            half = 0.5 * length * pose[:3, 2]
            capsules.append(_capsule(Capsule(name, radius, pose[:3, 3] - half, pose[:3, 3] + half)))
    return capsules


def _capsule(values: Any) -> Capsule:
    """Read a mapping or an object with link, radius, start and end."""
    get: Any = values.get if isinstance(values, Mapping) else (lambda key: getattr(values, key, None))
    try:
        radius = float(get("radius"))
        start, end = (np.array(get(key), float) for key in ("start", "end"))
    except (TypeError, ValueError):
        radius, start, end = math.nan, np.zeros(0), np.zeros(0)
    if not 0 < radius < math.inf or start.shape != (3,) or end.shape != (3,) or not np.isfinite([start, end]).all():
        raise ValueError(
            f"capsule of {get('link')!r}: needs a positive radius and 3 numbers for start and end [m], got {values}"
        )
    return Capsule(str(get("link")), radius, start, end)


def _origin(element: ElementTree.Element, where: str) -> np.ndarray:
    """Return <origin> as a pose [4 4]; rpy turns about the fixed axes x, y, z in turn."""
    origin = element.find("origin")
    given = {} if origin is None else origin.attrib
    roll, pitch, yaw = _numbers(given.get("rpy", "0 0 0"), 3, f"{where}: rpy")
    (cr, cp, cy), (sr, sp, sy) = np.cos([roll, pitch, yaw]), np.sin([roll, pitch, yaw])
    pose = np.eye(4)
    pose[:3, :3] = [
        [cy * cp, cy * sp * sr - sy * cr, cy * sp * cr + sy * sr],
        [sy * cp, sy * sp * sr + cy * cr, sy * sp * cr - cy * sr],
        [-sp, cp * sr, cp * cr],
    ]
    pose[:3, 3] = _numbers(given.get("xyz", "0 0 0"), 3, f"{where}: xyz")
    return pose


def _numbers(text: str, count: int, where: str) -> np.ndarray:
    try:
        values = np.array([float(word) for word in text.split()])
    except ValueError:
        values = np.array([math.nan])
    if len(values) != count or not np.all(np.isfinite(values)):
        raise ValueError(f"{where} must be {count} finite number{'s' if count > 1 else ''}, got {text!r}")
    return values


def _name(element: ElementTree.Element, what: str) -> str:
    name = element.get("name", "")
    if not name:
        raise ValueError(f"urdf: a {what} without a name")
    return name


def _list(names: Any) -> str:
    return ", ".join(sorted(names))
