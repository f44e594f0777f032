"""A point for an arm, a rule for a policy: the live stack's other two processes, with nothing to train or render.

python tests/fake_robot.py twin|policy '{"domain_id": 3}'
"""

import json
import os
import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np

from robot_io.bus import open_bus
from robot_io.nodes.policy import PolicyNode
from robot_io.nodes.serve import serve
from robot_io.nodes.twin import TwinNode

START, GOAL = np.array([0.0, 0.6, 0.2]), np.array([0.2, 0.7, 0.3])


def field(name: str, kind: str, size: int, low: float, high: float, reference: str | None = None) -> dict[str, Any]:
    mode = "delta" if reference else "absolute"
    return {
        **{"name": name, "kind": kind, "size": size, "unit": "m", "frame": "base", "mode": mode, "slot": 0},
        **{"reference": reference, "scale": 1.0, "low": [low] * size, "high": [high] * size},
    }


EMBODIMENT = {
    **{"name": "point", "robot": "a point", "obs_dt": 0.05, "action_dt": 0.0125, "control_hz": 80.0},
    "state": [field("hand", "ee_position", 3, -1, 1), field("grip", "gripper_position", 1, 0, 1)],
    "action": [
        field("hand_delta", "ee_position", 3, -0.01, 0.01, "commanded"),
        field("effort", "gripper_effort", 1, -1, 1),
    ],
    "cameras": [{"name": "corner", "height": 24, "width": 32, "slot": 0}],
    "limits": {
        **{"max_speed": 1.5, "max_acceleration": 120.0, "max_jerk": 24000.0, "max_lag": 0.15},
        **{"workspace_low": [-0.5, 0.4, 0.05], "workspace_high": [0.5, 1.0, 0.5]},
    },
}


class PointEnv:
    """A hand that follows its command with a lag of a few steps; a success when it reaches the goal."""

    instruction = "go to the goal"

    def reset(self, *, seed: int, options: dict[str, str]) -> None:
        self.commanded_position, self.hand, self.grip, self.success = START.copy(), START.copy(), 0.0, False

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray]]:
        assert np.all(np.abs(action[:3]) <= 0.01 + 1e-9), "the twin clips to the env's own limits"
        self.commanded_position += action[:3]
        self.hand += 0.5 * (self.commanded_position - self.hand)
        self.grip = float(action[3])
        self.success |= bool(np.linalg.norm(self.hand - GOAL) < 0.01)
        return ({"state": self._state()},)

    def _state(self) -> np.ndarray:
        return np.array([*self.hand, self.grip], np.float32)

    def observe(self) -> Any:
        image = np.zeros((24, 32, 3), np.uint8)
        image[0, 0] = np.clip(255 * self.hand, 0, 255)
        return SimpleNamespace(images={"corner": image}, state=self._state())

    def warnings(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        pass


class PointPolicy:
    """Walk to the goal at 0.4 m/s, thinking for 30 ms; `endless`: away from it and back, for ever."""

    def __init__(self, endless: bool = False) -> None:
        self.endless = endless

    def predict(self, history: Any, *, seed: int) -> Any:
        time.sleep(0.03)
        now = history[-1]
        assert now.images["corner"].shape == (24, 32, 3) and now.instruction == PointEnv.instruction
        motion = np.zeros((24, 3))
        if self.endless:
            motion[:, 0] = 0.005 * np.sign(np.sin(2 * np.pi * (now.stamp + 0.0125 * np.arange(24)) / 2.0))
        else:
            motion[:] = np.clip((GOAL - now.state[:3]) / 24, -0.005, 0.005)
        values = np.column_stack([motion, np.full(24, -1.0)])
        return SimpleNamespace(values=values, stamp=now.stamp, action_dt=0.0125, embodiment="point")


def main(name: str, domain_id: int, endless: bool = False) -> None:
    bus = open_bus("dds", name, domain_id)
    if name == "twin":
        serve(TwinNode(bus, PointEnv(), EMBODIMENT, command_timeout=0.1))
        return
    names = ("images", "state", "instruction", "stamp")

    def observation(*values: Any) -> Any:
        return SimpleNamespace(**dict(zip(names, values, strict=True)))

    timing = {"slop": 0.033, "max_age": 0.15, "interval": 0.0}
    policy = PointPolicy(endless)
    serve(PolicyNode(bus, policy, EMBODIMENT, "0" * 64, observation, n_obs_steps=2, seed=0, **timing))


if __name__ == "__main__":
    main(sys.argv[1], **json.loads(sys.argv[2]))
    os._exit(0)
