"""Scripted experts by suite and task; they see the full simulator state, the policy never does."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy.spatial.transform import Rotation

from dita.envs import expect_known

Expert = Callable[[np.ndarray], np.ndarray]


def metaworld_expert(task: str) -> Expert:
    """Return Meta-World's own controller of a task: full observation [39] -> action in the suite's units, in [-1, 1].

    Raises:
        ValueError: the task has no expert.
    """
    from metaworld.policies import ENV_POLICY_MAP  # one suite's package may be there without the other's

    expect_known("scripted expert", task, ENV_POLICY_MAP)
    policy = ENV_POLICY_MAP[task]()

    def act(full_observation: Float64[np.ndarray, "39"]) -> Float64[np.ndarray, "4"]:
        with warnings.catch_warnings():
            # "Constant(s) may be too high": its actions reach 11; the environment clips them, and so do we
            warnings.simplefilter("ignore")
            return np.clip(np.asarray(policy.get_action(full_observation), np.float64), -1.0, 1.0)

    return act


DOWN = np.array([0.0, 0.0, -1.0])
ABOVE = 0.08  # [m] over a cube before going down
LIFTED = 0.15  # [m] over where it lies
CLEAR = 0.03  # [m] over a cube on which another one is to lie
STEP_M, STEP_RAD = 0.04, 0.2  # how far ahead of the tool a goal is: the arm's lag makes 0.2-0.4 m/s of it


def lift_expert(
    tool: Float64[np.ndarray, "3"],
    turn: Rotation,
    cube: Float64[np.ndarray, "3"],
    facing: Rotation,
    held: bool,
) -> tuple[Float64[np.ndarray, "3"], Float64[np.ndarray, "3"], float]:
    """Lift a cube: over it and square to it, down, close, up. No memory.

    Args:
        tool: position of the finger tips [m]; `turn` has their rotation, its z axis out of the hand.
        cube: position of the cube's middle [m]; `facing` has its rotation.
        held: both fingers touch it.

    Returns:
        where to go from here [m], how to turn from here (rotation vector, rad), and the gripper: 1 opens, -1 closes.
    """
    x, y, _ = facing.as_matrix().T
    squares = [Rotation.from_matrix(np.stack([a, np.cross(DOWN, a), DOWN], 1)) for a in _level(x, -x, y, -y)]
    turns = [(square * turn.inv()).as_rotvec() for square in squares]
    rotate = min(turns, key=np.linalg.norm)
    offset = cube - tool
    aside, near = np.linalg.norm(offset[:2]), np.linalg.norm(offset) < 0.012
    if held:
        move = np.array([0.0, 0.0, LIFTED])
    elif aside > 0.015 or np.linalg.norm(rotate) > 0.15:
        move = offset + np.array([0.0, 0.0, ABOVE])
    else:
        move = offset
    return at_most(move, STEP_M), at_most(rotate, STEP_RAD), -1.0 if held or near else 1.0


STACKED = 0.006  # [m] of height within which a cube counts as lying on the other
OVERLAP = 0.018  # [m] that its middle may be beside the other's: 25 mm make it fall off


def stack_expert(
    tool: Float64[np.ndarray, "3"],
    turn: Rotation,
    cube: Float64[np.ndarray, "3"],
    facing: Rotation,
    held: bool,
    opening: float,
    base: Float64[np.ndarray, "3"],
    height: float,
) -> tuple[Float64[np.ndarray, "3"], Float64[np.ndarray, "3"], float]:
    """Put a cube onto another: grip it as `lift_expert` does, up, over the other, down, let go, up. No memory.

    Args:
        tool: position of the finger tips [m]; `turn` has their rotation, its z axis out of the hand.
        cube: position of its middle [m]; `facing` has its rotation.
        held: both fingers touch it.
        opening: of the gripper, 1 = open.
        base: position of the other cube's middle [m].
        height: of the cube's middle over the other's once it lies there [m].

    Returns:
        where to go from here [m], how to turn from here (rotation vector, rad), and the gripper: 1 opens, -1 closes.
    """
    place = base + np.array([0.0, 0.0, height])
    aside, above = np.linalg.norm((cube - place)[:2]), cube[2] - place[2]
    lift, rotate, gripper = lift_expert(tool, turn, cube, facing, held)  # what is held is kept level, too
    if aside < OVERLAP and above < STACKED:
        return np.array([0.0, 0.0, STEP_M * (opening > 0.8)]), rotate, 1.0  # before that, it would drag the cube along
    if not held:
        return lift, rotate, gripper
    move = place - cube
    if aside > (OVERLAP if above < CLEAR / 2 else OVERLAP / 2):
        move[2] += CLEAR
    if aside > 2 * OVERLAP and above < CLEAR / 2:
        move[:2] = 0.0
    return at_most(move, STEP_M), rotate, -1.0


MEET = np.array([0.0, 0.5, 0.25])  # [m] where a cube changes hands
ACROSS = Rotation.from_euler("Z", 180, degrees=True)  # the right hand level, towards the left arm
ROLLED = Rotation.from_euler("X", 90, degrees=True)  # the left hand level, towards the right arm, a finger above
OVER = ACROSS * Rotation.from_euler("Y", 90, degrees=True)  # the right hand down, its fingers along y
SHARE = 0.012  # [m] short of the cube's middle, where the right hand has its finger tips


@dataclass(frozen=True, eq=False)
class Hand:
    """One hand of two: its finger tips [m], its rotation with x out of the hand, its opening, and if it is to close."""

    position: Float64[np.ndarray, "3"]
    turn: Rotation
    opening: float
    closing: bool

    def at(self, grip: Float64[np.ndarray, "3"]) -> bool:
        """Say whether the finger tips are where they are to grip: closely to begin, less so while closing."""
        return bool(np.linalg.norm(grip - self.position) < (0.02 if self.closing else 0.01))

    def has(self, grip: Float64[np.ndarray, "3"]) -> bool:
        """Say whether the fingers stopped at the cube's width there; touch is no sign, as it comes and goes."""
        return self.closing and self.at(grip) and 0.45 < self.opening < 0.66


Waypoint = tuple[Float64[np.ndarray, "3"], Rotation, float]  # position [m], rotation, gripper: 1 opens, 0 closes


def transfer_expert(left: Hand, right: Hand, cube: Float64[np.ndarray, "3"]) -> tuple[Waypoint, Waypoint]:
    """Hand a cube over: take it from above, level it at the meeting point, take it over from the side. No memory.

    Args:
        left: receives.
        right: picks.
        cube: position of the cube's middle [m]; its sides are along the axes of the world.

    Returns:
        the waypoints of both hands.
    """
    take = cube - np.array([SHARE, 0.0, 0.0])
    offset = cube - right.position
    aside, tilted = np.linalg.norm(offset[:2]), (OVER * right.turn.inv()).magnitude()
    away = MEET - np.array([0.12, 0.0, 0.0])
    if left.has(take):
        let_go = right.opening > 0.8  # before that, it would drag the cube along
        back = np.array([let_go * max(0.0, MEET[0] + 0.12 - right.position[0]), 0.0, 0.0])
        return (left.position, ROLLED, 0.0), (right.position + back, ACROSS, 1.0)
    if right.has(cube):
        low = cube[2] < 0.12
        to = np.array([*right.position[:2], 0.2]) if low else MEET
        ready = np.linalg.norm(right.position - MEET) < 0.02 and (ACROSS * right.turn.inv()).magnitude() < 0.1
        if not ready:
            return (away, ROLLED, 1.0), (to, OVER if low else ACROSS, 0.0)
        return (take, ROLLED, 0.0 if left.at(take) else 1.0), (to, ACROSS, 0.0)
    if aside > 0.015 or tilted > 0.15:
        return (away, ROLLED, 1.0), (cube + np.array([0.0, 0.0, ABOVE]), OVER, 1.0)
    return (away, ROLLED, 1.0), (cube, OVER, 0.0 if right.at(cube) else 1.0)


def choice_expert(
    tip: Float64[np.ndarray, "3"], place: Float64[np.ndarray, "2"], verb: str, left: float, reach: float, top: float
) -> Float64[np.ndarray, "3"]:
    """Return where to send the tip of `choice`: over everything, down, and with `push` forward. No memory.

    Args:
        tip: its position [m].
        place: of the named cylinder [m]; further away is +x.
        verb: touch or push.
        left: how far it has still to be pushed [m].
        reach: distance at which the tip touches its side [m].
        top: height of the tip that lies on it [m].
    """
    at = place if verb == "touch" else place - (reach + 0.015, 0.0)
    offset = at - tip[:2]
    if verb == "push" and tip[2] < top - 0.02 and abs(offset[1]) < 0.01 and offset[0] < 0.008:  # low and behind it
        return np.array([tip[0] + np.clip(left, 0.0, 0.03), place[1], top / 2])
    if np.linalg.norm(offset) > 0.008:
        return np.array([*at, max(top + 0.03, tip[2])])
    return np.array([*at, top - 0.01 if verb == "touch" else top / 2])


def damped_least_squares(
    jacobian: Float64[np.ndarray, "6 j"], twist: Float64[np.ndarray, "6"], damping: float = 0.05
) -> Float64[np.ndarray, "j"]:
    """Return the joint step for a tool step (Wampler 1986): small where the arm is close to singular."""
    return jacobian.T @ np.linalg.solve(jacobian @ jacobian.T + damping**2 * np.eye(6), twist)


def _level(*axes: Float64[np.ndarray, "3"]) -> list[Float64[np.ndarray, "3"]]:
    flat = [axis * (1.0, 1.0, 0.0) for axis in axes]
    return [axis / np.linalg.norm(axis) for axis in flat if np.linalg.norm(axis) > 0.5]


def at_most(vector: Float64[np.ndarray, "3"], length: float) -> Float64[np.ndarray, "3"]:
    """Shorten a vector to a length where it is longer."""
    return vector * min(1.0, length / max(1e-9, float(np.linalg.norm(vector))))


def fetch_expert(
    task: str,
    tool: Float64[np.ndarray, "3"],
    opening: float,
    block: Float64[np.ndarray, "3"],
    goal: Float64[np.ndarray, "3"],
) -> tuple[Float64[np.ndarray, "3"], float]:
    """Solve a Fetch task: go there; push from behind; grasp from above and carry. No memory.

    Args:
        task: reach, push or pick-and-place.
        tool: position of the finger tips [m].
        opening: of the gripper, 1 = open.
        block: position of its middle [m]; it is 5 cm wide.
        goal: where tool or block has to be [m].

    Returns:
        where to go from here [m], and the gripper: 1 opens, -1 closes.
    """
    if task == "reach":
        return goal - tool, 0.0
    if task == "push":
        return _push(tool, block, goal), 0.0
    offset = block - tool
    if np.linalg.norm(offset) < 0.02:
        return (goal - block if opening < 0.53 else offset), -1.0
    if np.linalg.norm(offset[:2]) > 0.01 or opening < 0.9:  # 5 cm fill half of it
        return offset - ABOVE * DOWN, 1.0
    return offset, 1.0


def _push(
    tool: Float64[np.ndarray, "3"], block: Float64[np.ndarray, "3"], goal: Float64[np.ndarray, "3"]
) -> np.ndarray:
    way = (goal - block)[:2]
    left = float(np.linalg.norm(way))
    if left < 0.01:
        return np.zeros(3)
    way = way / left
    offset = block[:2] - tool[:2]
    ahead, aside = float(offset @ way), float(abs(offset @ (-way[1], way[0])))
    low = tool[2] < block[2] + 0.03
    if low and ahead > 0.02 and aside < 0.015:  # behind it: keep on its line
        correction = offset - ahead * way
        return np.array([*(min(left, 0.03) * way + correction), block[2] - tool[2]])
    behind = block[:2] - 0.075 * way - tool[:2]
    if np.linalg.norm(behind) > 0.015:
        high = block[2] + ABOVE - tool[2]
        return np.array([*(behind if not low or ahead > 0.06 else np.zeros(2)), high])
    return np.array([*behind, block[2] - tool[2]])
