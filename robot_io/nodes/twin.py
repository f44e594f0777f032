"""A simulated arm behind a driver's topics."""

from typing import Any, Dict, Mapping, Optional

import numpy as np

from robot_io import messages as m
from robot_io.bus import COMMAND, LATCHED, SENSOR, STATE, Bus, open_bus
from robot_io.core.limits import parse_robot
from robot_io.nodes.serve import serve
from robot_io.nodes.topics import (
    BASE_FRAME,
    EPISODE,
    EPISODE_STATE,
    GRIPPER,
    INSTRUCTION,
    JOINTS,
    TARGET_POSE,
    TOOL_POSE,
    gripper_quantity,
    image_topic,
    is_tool,
    joint_names,
)

MAX_CATCH_UP = 20  # steps it may be late before simulated time slips


class TwinNode:
    """A simulated arm behind a driver's topics, in real time."""

    def __init__(self, bus: Bus, env: Any, embodiment: Mapping[str, Any], command_timeout: float) -> None:
        """Join the graph.

        Args:
            env: a `dita.envs` RobotEnv, or anything with its reset, step, observe, success, warnings,
                instruction and commanded_position.
            embodiment: the env's, as plain values.
            command_timeout: without a command for this long [s] the arm holds, as a driver does.
        """
        self.bus, self.env, self.robot = bus, env, parse_robot(embodiment, need_limits=False)
        self._timeout = command_timeout
        self._dt = 1.0 / embodiment["control_hz"]
        self._per_image = round(self.robot.obs_dt / self._dt)
        self._episode: Dict[str, Any] = {}
        self._images = {c: bus.publisher(image_topic(c), m.IMAGE, SENSOR) for c in self.robot.cameras}
        self._pose = bus.publisher(TOOL_POSE, m.POSE, STATE)
        self._joints = bus.publisher(JOINTS, m.JOINT_STATE, STATE)
        self._instruction = bus.publisher(INSTRUCTION, m.STRING, LATCHED)
        self._state = bus.publisher(EPISODE_STATE, m.STRING, STATE)
        bus.subscribe(TARGET_POSE, m.POSE, COMMAND, self._on_target)
        bus.subscribe(GRIPPER, m.JOINT_TRAJECTORY, COMMAND, self._on_gripper)
        bus.subscribe(EPISODE, m.STRING, STATE, self._on_episode)
        bus.timer(self._dt, self._run)

    def stop(self) -> None:
        """Leave."""
        self.bus.shutdown()

    def close(self) -> None:
        """Free the simulator's renderers and leave the graph."""
        self.env.close()
        self.bus.close()

    def _on_episode(self, message: Any) -> None:
        order = m.json_from_ros(message)
        if order["episode"] != self._episode.get("episode"):
            self.reset(order)

    def reset(self, order: Mapping[str, Any]) -> None:
        """Begin an episode: its number, task and seed."""
        self.env.reset(seed=order["seed"], options={"task": order["task"]})
        self._target: Optional[np.ndarray] = None
        self._target_time = -np.inf
        gripper = self.robot.gripper
        self._closing = np.zeros(0) if gripper is None else 0.5 * (gripper.low + gripper.high)
        self._begin, self._start, self._done = self.bus.now(), self.bus.steady(), 0
        self._episode = {
            **order,
            **{"steps": 0, "success": False, "clipped": 0, "timeouts": 0, "refused": 0, "slipped_s": 0.0},
        }
        self._instruction.publish(self.bus.msg(m.STRING, data=self.env.instruction))
        self._send_images(self._begin)

    def _on_target(self, message: Any) -> None:
        position = m.pose_from_ros(message)[0]
        if not np.all(np.isfinite(position)):
            self._refuse("a target pose")  # MuJoCo would silently zero every control
        elif self._episode:
            self._target, self._target_time = position, self.bus.now()

    def _on_gripper(self, message: Any) -> None:
        assert self.robot.gripper is not None
        value = m.joint_chunk_from_ros(message, gripper_quantity(self.robot.gripper))[1][-1]
        if not np.all(np.isfinite(value)):
            self._refuse("a gripper command")
        elif self._episode:
            self._closing = value

    def _refuse(self, what: str) -> None:
        self.bus.log("error", f"{what} is not finite and was refused")
        if self._episode:
            self._episode["refused"] += 1

    def _run(self) -> None:
        """Make every step that time asks for; too far behind, simulated time slips and the factor drops below 1."""
        if not self._episode:
            return
        due = int((self.bus.steady() - self._start) / self._dt)
        if due - self._done > MAX_CATCH_UP:
            late = (due - self._done - 1) * self._dt
            self._begin, self._start = self._begin + late, self._start + late
            self._episode["slipped_s"] += late
            due = self._done + 1
        while self._done < due:
            self._step()

    def _step(self) -> None:
        observation = self.env.step(self._action())[0]
        self._done += 1
        stamp = self._begin + self._done * self._dt
        self._episode["steps"] += self._target is not None
        self._episode["success"] = bool(self.env.success)
        if self._done % self._per_image == 0:
            self._send_images(stamp)
        else:
            self._send_state(stamp, observation["state"])

    def _action(self) -> np.ndarray:
        """Return the env's SI action toward the target, or to stay where the arm is commanded to be."""
        commanded = np.asarray(self.env.commanded_position, float)
        if self._target is not None and self.bus.now() - self._target_time > self._timeout:
            self._target = None
            self._episode["timeouts"] += 1
        target = commanded if self._target is None else self._target
        field = self.robot.motion
        motion = target - commanded if field.mode == "delta" else target
        clipped = np.clip(motion, field.low, field.high)
        self._episode["clipped"] += bool(np.any(np.abs(clipped - motion) > 1e-9))
        action = np.zeros(self.robot.action_dim, np.float32)
        action[self.robot.action_slice(field)] = clipped
        action[self.robot.action_slice(self.robot.gripper)] = self._closing
        return action

    def _send_images(self, stamp: float) -> None:
        observation = self.env.observe()
        self._send_state(stamp, observation.state)  # first: an image is paired with the state that is there by then
        for camera, publisher in self._images.items():
            publisher.publish(m.image_to_ros(self.bus.msg, stamp, observation.images[camera], camera))
        self._report()

    def _send_state(self, stamp: float, state: np.ndarray) -> None:
        joints: Dict[str, float] = {}
        start = 0
        for field in self.robot.state:
            values = np.asarray(state[start : start + field.size], float)
            start += field.size
            if is_tool(field):
                self._pose.publish(m.pose_to_ros(self.bus.msg, stamp, values, BASE_FRAME))
            else:
                joints.update(zip(joint_names(field), values.tolist(), strict=True))
        if joints:
            self._joints.publish(m.joints_to_ros(self.bus.msg, stamp, joints))

    def _report(self) -> None:
        simulated = self._done * self._dt
        factor = simulated / (simulated + self._episode["slipped_s"]) if simulated else 1.0
        self._state.publish(
            m.json_to_ros(self.bus.msg, {**self._episode, "real_time_factor": factor, "warnings": self.env.warnings()})
        )


def run(*, bus: Mapping[str, Any], env: Mapping[str, Any], command_timeout: float, seed: int) -> None:
    """Run a simulated arm until it is stopped.

    Args:
        bus: arguments of `open_bus`.
        env: plain values of `dita.config.EnvConfig`.
        command_timeout: of the driver [s].
        seed: of the start that it shows until it is reset.
    """
    from dita.config import EnvConfig, from_dict
    from dita.embodiment import embodiment_to_dict
    from dita.envs import make

    config = from_dict(EnvConfig, env, "env")
    made = make(config, config.tasks[0])
    node = TwinNode(open_bus(name="twin", **bus), made, embodiment_to_dict(made.embodiment), command_timeout)
    node.reset({"episode": -1, "task": config.tasks[0], "seed": seed})
    serve(node)
