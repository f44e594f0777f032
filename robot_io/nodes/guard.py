"""The guard on a bus: the only writer of the command topic.

Imports neither torch, dita, hydra, zarr nor mujoco: it runs from a copy of this folder.
"""

import contextlib
import json
import os
from dataclasses import MISSING, fields
from typing import Any, Mapping, Optional, Tuple

import numpy as np

from robot_io import messages as m
from robot_io.bus import COMMAND, LATCHED, STATE, Bus, open_bus
from robot_io.core.chunk_buffer import Chunk
from robot_io.core.diagnostics import LoopTiming
from robot_io.core.guard import Guard, GuardConfig
from robot_io.core.limits import parse_robot
from robot_io.core.state_machine import State
from robot_io.nodes.serve import serve
from robot_io.nodes.topics import (
    ARM,
    BASE_FRAME,
    CHUNK,
    CHUNK_GRIPPER,
    CONTRACT,
    DIAGNOSTICS,
    EXECUTED,
    GRIPPER,
    GUARD_STATE,
    TARGET_POSE,
    TOOL_POSE,
    gripper_quantity,
)


class GuardNode:
    """The guard on a bus: the only writer of the command topic."""

    def __init__(self, bus: Bus, config: GuardConfig, contract: Optional[Mapping[str, Any]] = None) -> None:
        self.bus, self.config = bus, config
        self.guard: Optional[Guard] = None
        self.hash = ""
        self.refused = ""  # why the last arming was
        self.timing = LoopTiming(config.tick)
        self._stopping = False
        self._shown: Tuple[Any, ...] = ()
        self._gripper_sent: Optional[float] = None
        self._motion: Any = None  # the newest halves of a chunk, until both are there
        self._gripper: Any = None
        self._command = bus.publisher(TARGET_POSE, m.POSE, COMMAND)
        self._gripper_command = bus.publisher(GRIPPER, m.JOINT_TRAJECTORY, COMMAND)
        self._executed = bus.publisher(EXECUTED, m.CARTESIAN_TRAJECTORY, STATE)
        self._state = bus.publisher(GUARD_STATE, m.STRING, LATCHED)
        self._diagnostics = bus.publisher(DIAGNOSTICS, m.DIAGNOSTICS, STATE)
        bus.subscribe(TOOL_POSE, m.POSE, STATE, self._on_pose)
        bus.subscribe(CHUNK, m.CARTESIAN_TRAJECTORY, COMMAND, self._on_motion)
        bus.subscribe(CHUNK_GRIPPER, m.JOINT_TRAJECTORY, COMMAND, self._on_gripper)
        bus.subscribe(ARM, m.BOOL, STATE, self._on_arm)
        if contract is None:
            bus.subscribe(CONTRACT, m.STRING, LATCHED, self._on_contract)
        else:
            self.use(contract)
        bus.on_liveliness(CHUNK, self._on_policy_liveliness)
        self._anchor()
        bus.timer(config.tick, self._tick)
        bus.timer(0.1, self._watch)
        bus.timer(1.0, self._diagnose)

    def use(self, contract: Mapping[str, Any]) -> None:
        """Take the robot's description; another one than before is a fault until the guard is restarted."""
        if self.guard is None:
            self.guard = Guard(parse_robot(contract["embodiment"]), self.config)
            self.hash = contract["hash"]
            self.bus.log("info", f"guarding {self.guard.robot.name}, contract {self.hash[:12]}")
        elif contract["hash"] != self.hash:
            self.refused = f"the contract changed from {self.hash[:12]} to {contract['hash'][:12]}; restart the guard"
            self.guard.fault(self.refused, self.bus.now())
            self.bus.log("error", self.refused)

    def stop(self) -> None:
        """Decelerate, then leave."""
        self._stopping = True
        if self.guard is not None:
            self.guard.disarm("stopped")

    def close(self) -> None:
        """Leave the graph."""
        self.bus.close()

    def _anchor(self) -> None:
        """Tie the grid of ticks to both clocks."""
        self._steady, self._wall = self.bus.steady(), self.bus.now()

    def _tick(self) -> None:
        guard = self.guard
        if guard is None or (guard.state is State.IDLE and not guard.tracker.moving):
            self.timing.pause()
            self._anchor()
            if self._stopping:
                self.bus.shutdown()
            return
        steady = self.bus.steady()
        self.timing.begin(steady)
        periods = max(1, round((steady - self._steady) / self.config.tick))
        self._steady += periods * self.config.tick
        self._wall += periods * self.config.tick
        skew = (self.bus.now() - self._wall) - (steady - self._steady)
        if abs(skew) > self.config.max_skew:
            guard.fault(f"the wall clock jumped by {skew:.3f} s", self.bus.now())
            self._wall += skew
        self._wall += 0.01 * skew  # follow a clock that is being slewed, without a step in the stamps
        self._send(guard, self._wall, periods)
        self.timing.end(self.bus.steady())

    def _send(self, guard: Guard, now: float, periods: int) -> None:
        command, executed = guard.tick(now, periods)
        msg, motion, dt = self.bus.msg, guard.robot.motion, guard.robot.action_dt
        if command is not None:
            self._command.publish(m.pose_to_ros(msg, command.stamp, command.configuration[:3], BASE_FRAME))
            if command.gripper != self._gripper_sent and command.gripper is not None and guard.robot.gripper:
                field, value = guard.robot.gripper, np.array([[command.gripper]])
                quantity = gripper_quantity(field)
                self._gripper_command.publish(
                    m.joint_chunk_to_ros(msg, command.stamp, dt, [field.name], value, quantity)
                )
                self._gripper_sent = command.gripper
        if executed is not None:
            chunk, index, gripper = executed.step.chunk.stamp, executed.step.index, self.guard and self.guard.gripper
            step = m.ExecutedStep(chunk, 0, index, now, executed.goal, executed.delta, "policy", gripper)
            self._executed.publish(m.executed_to_ros(msg, step, dt, [motion.name], joint=False))
        self._show(guard)

    def _show(self, guard: Guard) -> None:
        shown = (guard.state.value, guard.machine.reason, self.refused)
        if shown != self._shown:
            self._shown = shown
            self._state.publish(
                m.json_to_ros(self.bus.msg, dict(zip(("state", "reason", "refused"), shown, strict=True)))
            )
            if guard.state in (State.HOLDING, State.FAULT):
                self.bus.log("warning", f"{guard.state.value}: {guard.machine.reason}")

    def _watch(self) -> None:
        if self.guard is not None:
            others = [w.node for w in self.bus.writers(TARGET_POSE)]
            if self.bus.name in others:
                others.remove(self.bus.name)
            self.guard.on_writers(others, self.bus.now())
            self._show(self.guard)

    def _diagnose(self) -> None:
        if self.guard is not None:
            level = {State.HOLDING: 1, State.FAULT: 2}.get(self.guard.state, 0)
            values = {**self.guard.to_dict(), **self.timing.to_dict()}
            text = f"{self.guard.state.value}: {self.guard.machine.reason}"
            self._diagnostics.publish(m.diagnostics_to_ros(self.bus.msg, self.bus.now(), "guard", level, text, values))

    def _on_contract(self, message: Any) -> None:
        try:
            self.use(m.json_from_ros(message))
        except (ValueError, KeyError, TypeError) as e:  # nothing that somebody sends may end the guard
            self.bus.log("error", f"contract refused: {e}")

    def _on_pose(self, message: Any) -> None:
        if self.guard is not None:
            self.guard.on_state(m.stamp_of(message), m.pose_from_ros(message)[0])

    def _on_motion(self, message: Any) -> None:
        self._motion = message
        self._on_chunk()

    def _on_gripper(self, message: Any) -> None:
        self._gripper = message
        self._on_chunk()

    def _on_chunk(self) -> None:
        """Hand a chunk to the guard once its halves are both there, and only once."""
        guard, motion, gripper = self.guard, self._motion, self._gripper
        if guard is None or motion is None:
            return
        if guard.robot.gripper is not None and (gripper is None or m.stamp_of(gripper) != m.stamp_of(motion)):
            return
        self._motion = self._gripper = None
        try:
            dt, values = m.cartesian_chunk_from_ros(motion, guard.robot.motion.mode == "delta")
            closing = None
            if guard.robot.gripper is not None:
                closing = m.joint_chunk_from_ros(gripper, gripper_quantity(guard.robot.gripper))[1][:, 0]
        except ValueError as e:
            self.bus.log("error", f"chunk refused: {e}")
            guard.counts["R0"] += 1
            return
        guard.on_chunk(Chunk(m.stamp_of(motion), dt, values, closing), self.bus.now())

    def _on_arm(self, message: Any) -> None:
        if self.guard is None:
            self.bus.log("error", f"not armed: no contract yet on {CONTRACT}; is the policy running?")
            return
        if not message.data:
            self.guard.disarm()
            return
        try:
            self.guard.arm(self.bus.now())
            self.refused, self._gripper_sent = "", None
        except ValueError as e:
            self.refused = str(e)
            self.bus.log("error", self.refused)
        self._show(self.guard)

    def _on_policy_liveliness(self, alive: int) -> None:
        if alive == 0 and self.guard is not None:
            self.guard.hold("the policy is gone", self.bus.now())


def run(*, bus: Mapping[str, Any], contract: Optional[str] = None, tick_hz: float, **limits: Any) -> None:
    """Run the guard until it is stopped.

    Args:
        bus: arguments of `open_bus`.
        contract: JSON file with embodiment and hash; None: wait for it on /dita/contract.
        tick_hz: of the output, at least 100.
        limits: the other fields of `GuardConfig`.
    """
    config = GuardConfig(tick=1.0 / tick_hz, **limits)
    with contextlib.suppress(PermissionError):  # real-time priority, as ros2_control asks for; not everybody may
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))
    values = None
    if contract is not None:
        with open(contract, encoding="utf-8") as file:
            values = json.load(file)
    serve(GuardNode(open_bus(name="guard", **bus), config, values))


def ros2_guard() -> None:
    """Run the guard as a ROS 2 lifecycle node (`ros2 run robot_io guard`); its knobs are node parameters."""
    bus = open_bus("rclpy", "guard", int(os.environ.get("ROS_DOMAIN_ID", "0")))
    names = [f.name for f in fields(GuardConfig) if f.name != "tick" and f.default is MISSING]
    values = {name: bus.param(name, 0.0) for name in names}
    tick_hz = bus.param("tick_hz", 0.0)
    if not tick_hz > 0:
        raise ValueError("guard: set its parameters (tick_hz, ...), as launch/dita.launch.py does")
    serve(GuardNode(bus, GuardConfig(tick=1.0 / tick_hz, **values)))
