"""Keyboard teleoperation in a terminal: short chunks for the guard, which limits and checks them like a policy's.

A terminal tells of key presses only, never of releases: a press moves for HOLD_S, and a held key repeats.
"""

import contextlib
import math
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Tuple

import numpy as np

HOLD_S = 0.15  # motion after a key press; keys repeat about every 30 ms
STEPS = 8  # of a chunk: it runs out when this process or its terminal is gone
SPEEDS = (0.05, 0.1, 0.25, 0.5, 1.0)  # of the top speed, keys 1 to 5
TOP_LINEAR, TOP_ANGULAR, TOP_JOINT = 0.25, 0.8, 0.6  # m/s, rad/s, rad/s: what a hand can follow on a screen

# key -> (dimension of the tangent, direction)
CARTESIAN = {
    **{"w": (0, 1), "s": (0, -1), "a": (1, 1), "d": (1, -1), "r": (2, 1), "f": (2, -1)},
    **{"u": (3, 1), "o": (3, -1), "i": (4, 1), "k": (4, -1), "j": (5, 1), "l": (5, -1)},
}
ORDERS = {
    "t": "takeover",
    "\n": "arm",
    "\x7f": "disarm",
    "R": "record:start",
    "S": "record:stop",
    "Z": "record:fail",
    "X": "record:discard",
    "E": "record:seal",
    "q": "quit",
}
HELP = (
    "move w/s x  a/d y  r/f z   turn u/o i/k j/l   joint [ ] choose, w/s move   g gripper   1-5 speed   SPACE stop\n"
    "t take over / hand back   ENTER arm   BACKSPACE disarm   record: R start  S stop, a success  Z stop, a failure  "
    "X discard  E seal   q leave"
)


@dataclass(frozen=True)
class Axes:
    """What the keys move."""

    joints: Tuple[str, ...]  # empty for a tool
    top: np.ndarray  # [m] top speed of each dimension of the tangent


class Keys:
    """Key presses -> velocity of the tangent, gripper, and orders for others. No clock, no terminal."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self.level = 2  # of SPEEDS, from 1
        self.joint = 0  # that w and s move
        self.open = True
        self._until = np.full(len(axes.top), -math.inf)  # [m] until when each dimension moves
        self._direction = np.zeros(len(axes.top))

    def press(self, key: str, now: float) -> Optional[str]:
        """Follow a key; return the order that is not about motion, if it is one, "stop" included."""
        if key == " ":
            self.stop()
            return "stop"
        if key in ORDERS:
            return ORDERS[key]
        if key == "g":
            self.open = not self.open
        elif key.isdigit() and 1 <= int(key) <= len(SPEEDS):
            self.level = int(key)
        elif self.axes.joints and key in "[]":
            self.joint = (self.joint + (1 if key == "]" else -1)) % len(self.axes.joints)
        else:
            self._move(key, now)
        return None

    def _move(self, key: str, now: float) -> None:
        if self.axes.joints:
            found = {"w": (self.joint, 1), "s": (self.joint, -1)}.get(key)
        else:
            found = CARTESIAN.get(key)
        if found is not None and found[0] < len(self._until):
            self._until[found[0]], self._direction[found[0]] = now + HOLD_S, found[1]

    def stop(self) -> None:
        """Move nothing from now on."""
        self._until[:] = -math.inf

    def velocity(self, now: float) -> np.ndarray:
        """Return the velocity of the tangent [m], /s."""
        return np.where(now < self._until, self._direction * SPEEDS[self.level - 1] * self.axes.top, 0.0)
