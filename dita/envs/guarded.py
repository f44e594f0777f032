"""The robot's guard between a policy and an environment, in one process and without latency.

What `dita eval guard=true` plays: the same guard as live, so that the difference to a live run is time alone.
"""

from __future__ import annotations

import numpy as np
import yaml
from jaxtyping import Float32, Float64

from dita.embodiment import config_folder, embodiment_to_dict
from dita.envs.base import RobotEnv
from robot_io.core.chunk_buffer import Chunk
from robot_io.core.guard import Guard, GuardConfig
from robot_io.core.limits import parse_robot
from robot_io.core.state_machine import State

KNOBS = ("state_timeout", "stream_timeout", "hold_timeout", "max_skew", "clamp_margin")


def shipped_guard() -> GuardConfig:
    """Return the knobs of `configs/robot.yaml`."""
    values = yaml.safe_load((config_folder() / "robot.yaml").read_text(encoding="utf-8"))
    return GuardConfig(tick=1.0 / values["tick_hz"], **{name: values[name] for name in KNOBS})


class Guarded:
    """One episode's guard: chunks in, one action of the environment per control step out."""

    def __init__(self, env: RobotEnv, config: GuardConfig) -> None:
        """Arm a guard at the measured position of an environment that was just reset.

        Raises:
            ValueError: an embodiment that moves something else than a tool position, ticks that do not fill a control
                step, or a start at which the guard does not arm.
        """
        self.env, self.config = env, config
        self.robot = parse_robot(embodiment_to_dict(env.embodiment))
        self.guard = Guard(self.robot, config)
        self.ticks = round(self.robot.action_dt / config.tick)
        if self.robot.space.tangent != 3 or self.robot.space.name != "cartesian":
            raise ValueError(f"{self.robot.name}: guard=true executes tool positions only; it moves {self.robot.space}")
        if abs(self.ticks * config.tick - self.robot.action_dt) > 1e-9:
            raise ValueError(f"a tick of {config.tick} s does not fill a step of {self.robot.action_dt} s")
        self._measure()
        self.guard.arm(env.stamp)

    def chunk(self, values: Float32[np.ndarray, "n a"]) -> None:
        """Hand over a chunk that begins at this control step."""
        robot = self.robot
        motion = np.asarray(values[:, robot.action_slice(robot.motion)], float)
        gripper = None if robot.gripper is None else np.asarray(values[:, robot.action_slice(robot.gripper)], float)
        closing = None if gripper is None else gripper[:, 0]
        self.guard.on_chunk(Chunk(self.env.stamp, robot.action_dt, motion, closing), self.env.stamp)

    def action(self) -> Float32[np.ndarray, "a"]:
        """Return what the environment gets for this control step: the way to where the guard is at its end."""
        self._measure()
        begin, command = self.env.stamp, None
        for i in range(self.ticks):
            command = self.guard.tick(begin + i * self.config.tick)[0]
        assert command is not None, "an armed guard commands at every tick"
        robot, field = self.robot, self.robot.motion
        target = command.configuration
        motion = target - self.env.commanded_position if field.mode == "delta" else target
        action = np.zeros(robot.action_dim, np.float32)
        action[robot.action_slice(field)] = np.clip(motion, field.low, field.high)
        if robot.gripper is not None:
            middle = 0.5 * (robot.gripper.low + robot.gripper.high)
            action[robot.action_slice(robot.gripper)] = middle if command.gripper is None else command.gripper
        return action

    def fault(self) -> str:
        """Return why the guard has stopped for good, or nothing."""
        machine = self.guard.machine
        return machine.reason if machine.state is State.FAULT else ""

    def _measure(self) -> None:
        self.guard.on_state(self.env.stamp, self._position())

    def _position(self) -> Float64[np.ndarray, "3"]:
        start = 0
        for field in self.env.embodiment.state:
            if field.kind == "ee_position":
                return np.asarray(self.env.state[start : start + field.size], float)
            start += field.size
        raise ValueError(f"{self.robot.name}: guard=true needs a measured ee_position in its state")
