"""A point or a few joints for an arm, a rule for a policy: the live stack's other two processes, with nothing to train
or render.

python tests/fake_robot.py twin|policy '{"domain_id": 3}'

twin: {"joints": 4} is an arm of 2 to 7 joints, {"inject": true} has faults on request (robot_io/nodes/inject.py).
policy: {"endless": true} moves to and fro.
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


JOINT_GOAL = 0.5  # [rad], of every joint


def joint_embodiment(joints: int = 4, command: str = "joint_trajectory", mode: str = "delta") -> dict[str, Any]:
    """Describe an arm of 2 to 7 joints, j1, j2, ..."""
    assert 2 <= joints <= 7, joints
    names = [f"j{i + 1}" for i in range(joints)]
    step, reference = (0.02, "commanded") if mode == "delta" else (2.0, None)
    every = {"names": names, "low": [-2.0] * joints, "high": [2.0] * joints, "max_lag": 0.5}
    return {
        **{"name": f"arm{joints}", "robot": f"{joints} joints", "obs_dt": 0.05, "action_dt": 0.0125},
        **{"control_hz": 80.0, "cameras": EMBODIMENT["cameras"]},
        "state": [field("joints", "joint_position", joints, -2, 2), field("grip", "gripper_position", 1, 0, 1)],
        "action": [
            field("joint_command", "joint_position", joints, -step, step, reference),
            field("effort", "gripper_effort", 1, -1, 1),
        ],
        "limits": {
            "joints": {
                **every,
                **{"velocity": [2.0] * joints, "acceleration": [40.0] * joints, "jerk": [4000.0] * joints},
            }
        },
        "driver": {"command": command, "joints": names, "gripper_direction": 1},
    }


class JointEnv:
    """Joints that follow their command with a lag; a success when all are at the goal; its expert goes there."""

    instruction = "go to the goal"

    def __init__(self, embodiment: dict[str, Any]) -> None:
        self._joints = embodiment["state"][0]["size"]
        self._delta = embodiment["action"][0]["mode"] == "delta"

    def reset(self, *, seed: int, options: dict[str, str]) -> None:
        start = np.random.default_rng(seed).uniform(-0.1, 0.1, self._joints)
        self.commanded, self.joints, self.grip, self.success = start, start.copy(), 0.5, False
        self.speed = np.zeros(self._joints)

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray]]:
        motion = np.asarray(action[:-1], float)
        assert np.all(np.isfinite(motion)) and (not self._delta or np.all(np.abs(motion) <= 0.02 + 1e-6))
        self.commanded = self.commanded + motion if self._delta else motion
        before = self.joints
        self.joints = before + 0.5 * (self.commanded - before)
        self.speed = (self.joints - before) * 80.0
        self.grip = float(np.clip(self.grip + 0.1 * np.sign(action[-1]), 0, 1))
        self.success |= bool(np.all(np.abs(self.joints - JOINT_GOAL) < 0.01))
        return ({"state": self.state},)

    @property
    def state(self) -> np.ndarray:
        return np.array([*self.joints, self.grip], np.float32)

    def velocities(self) -> dict[str, np.ndarray]:
        return {"joints": self.speed, "grip": np.zeros(1)}

    def expert_action(self) -> np.ndarray:
        return self.expert_from(self.commanded)

    def expert_from(self, goal: np.ndarray) -> np.ndarray:
        motion = np.clip(JOINT_GOAL - goal, -0.01, 0.01) if self._delta else np.full(self._joints, JOINT_GOAL)
        return np.append(motion, 1.0)

    def observe(self) -> Any:
        image = np.zeros((24, 32, 3), np.uint8)
        image[0, : self._joints] = np.clip(100 + 50 * self.joints, 0, 255)[:, None]
        return SimpleNamespace(images={"corner": image}, state=self.state)

    def warnings(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        pass


class JointPolicy:
    """Walk every joint to its goal at 0.4 rad/s, thinking for 30 ms; `endless`: to and fro."""

    def __init__(self, embodiment: dict[str, Any], endless: bool = False) -> None:
        self.endless, self._name = endless, embodiment["name"]
        self._delta = embodiment["action"][0]["mode"] == "delta"

    def predict(self, history: Any, *, seed: int) -> Any:
        time.sleep(0.03)
        now, steps = history[-1], np.arange(24)[:, None]
        joints = np.asarray(now.state[:-1], float)
        if self.endless:
            motion = 0.005 * np.sign(np.sin(2 * np.pi * (now.stamp + 0.0125 * steps) / 2.0)) + 0 * joints
        else:
            motion = np.clip((JOINT_GOAL - joints) / 24, -0.005, 0.005) + 0 * steps
        values = motion if self._delta else joints + np.cumsum(motion, axis=0)
        values = np.column_stack([values, np.full(24, -1.0)])
        return SimpleNamespace(values=values, stamp=now.stamp, action_dt=0.0125, embodiment=self._name)


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


def main(
    name: str, domain_id: int, endless: bool = False, joints: int = 0, inject: bool = False, expert: bool = False
) -> None:
    bus = open_bus("dds", name, domain_id)
    embodiment = joint_embodiment(joints) if joints else EMBODIMENT
    if name == "twin":
        env = JointEnv(embodiment) if joints else PointEnv()
        serve(TwinNode(bus, env, embodiment, command_timeout=0.1, inject=inject, expert=expert))
        return
    names = ("images", "state", "instruction", "stamp")

    def observation(*values: Any) -> Any:
        return SimpleNamespace(**dict(zip(names, values, strict=True)))

    timing = {"slop": 0.033, "max_age": 0.15, "interval": 0.0}
    policy = JointPolicy(embodiment, endless) if joints else PointPolicy(endless)
    serve(PolicyNode(bus, policy, embodiment, "0" * 64, observation, n_obs_steps=2, seed=0, **timing))


if __name__ == "__main__":
    main(sys.argv[1], **json.loads(sys.argv[2]))
    os._exit(0)
