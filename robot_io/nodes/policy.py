"""The policy on a bus: observations from topics in, chunks onto topics out."""

from typing import Any, Callable, Dict, List, Mapping, Optional

import numpy as np

from robot_io import messages as m
from robot_io.bus import COMMAND, LATCHED, SENSOR, STATE, Bus, open_bus
from robot_io.core.limits import Field, parse_robot
from robot_io.core.policy_loop import PolicyLoop, Predictor
from robot_io.core.state_machine import State
from robot_io.core.sync import Synchronizer
from robot_io.nodes.serve import serve
from robot_io.nodes.topics import (
    BASE_FRAME,
    CHUNK,
    CHUNK_GRIPPER,
    CONTRACT,
    DIAGNOSTICS,
    GUARD_STATE,
    HEARTBEAT,
    INSTRUCTION,
    JOINTS,
    TOOL_POSE,
    gripper_quantity,
    image_topic,
    is_tool,
    joint_names,
)

HEARTBEAT_S = 0.03  # a third of the guard's shortest wait


class PolicyNode:
    """Observations from topics into a policy, its chunks onto topics."""

    def __init__(
        self,
        bus: Bus,
        policy: Predictor,
        embodiment: Mapping[str, Any],
        contract_hash: str,
        observation: Callable[..., Any],
        *,
        n_obs_steps: int,
        seed: int,
        slop: float,
        max_age: float,
        interval: float,
    ) -> None:
        """Join the graph.

        Args:
            embodiment: plain values, `dita.embodiment.embodiment_to_dict`.
            observation: builds what the policy takes, from images, state, instruction and stamp.
            n_obs_steps: frames in a history.
            slop: largest spread of stamps within an observation [s].
            max_age: oldest observation to act on [s].
            interval: least time between two predictions' observations [s].
        """
        self.bus, self.robot, self._observation = bus, parse_robot(embodiment, need_limits=False), observation
        self.error: Optional[BaseException] = None
        self._armed = False
        self._instruction = ""
        self._missing: Dict[str, int] = {}  # why there was no observation -> how often
        self._sync = Synchronizer(self.robot.cameras, self._sources(), slop, max_age)
        self._loop = PolicyLoop(
            policy, n_obs_steps, self.robot.obs_dt, self._publish, self._fail, seed, bus.steady, interval
        )
        self._contract = bus.publisher(CONTRACT, m.STRING, LATCHED)
        self._chunk = bus.publisher(CHUNK, m.CARTESIAN_TRAJECTORY, COMMAND)
        self._chunk_gripper = bus.publisher(CHUNK_GRIPPER, m.JOINT_TRAJECTORY, COMMAND)
        self._diagnostics = bus.publisher(DIAGNOSTICS, m.DIAGNOSTICS, STATE)
        for camera in self.robot.cameras:
            bus.subscribe(image_topic(camera), m.IMAGE, SENSOR, self._image_callback(camera))
        bus.subscribe(TOOL_POSE, m.POSE, STATE, self._on_pose)
        bus.subscribe(JOINTS, m.JOINT_STATE, STATE, self._on_joints)
        bus.subscribe(INSTRUCTION, m.STRING, LATCHED, self._on_instruction)
        bus.subscribe(GUARD_STATE, m.STRING, LATCHED, self._on_guard)
        self._contract.publish(m.json_to_ros(bus.msg, {"embodiment": dict(embodiment), "hash": contract_hash}))
        heartbeat = bus.publisher(HEARTBEAT, m.STRING, STATE)
        bus.timer(HEARTBEAT_S, lambda: heartbeat.publish(bus.msg(m.STRING, data="policy")))
        bus.timer(1.0, self._diagnose)
        self._loop.start()

    def stop(self) -> None:
        """End inference and leave."""
        self.bus.shutdown()

    def close(self) -> None:
        """Wait for the inference thread, leave the graph, and raise what inference raised."""
        self._loop.stop()
        self.bus.close()
        if self.error is not None:
            raise self.error

    def _sources(self) -> List[str]:
        tool = [TOOL_POSE for f in self.robot.state if is_tool(f)]
        return tool + ([JOINTS] if any(not is_tool(f) for f in self.robot.state) else [])

    def _image_callback(self, camera: str) -> Callable[[Any], None]:
        def on_image(message: Any) -> None:
            self._sync.offer(camera, m.stamp_of(message), m.image_from_ros(message))
            self._observe()

        return on_image

    def _on_pose(self, message: Any) -> None:
        self._sync.offer(TOOL_POSE, m.stamp_of(message), m.pose_from_ros(message)[0])

    def _on_joints(self, message: Any) -> None:
        self._sync.offer(JOINTS, m.stamp_of(message), m.joints_from_ros(message))

    def _on_instruction(self, message: Any) -> None:
        self._instruction = message.data

    def _on_guard(self, message: Any) -> None:
        armed = m.json_from_ros(message)["state"] in (State.ARMED, State.HOLDING)
        if armed and not self._armed:
            self._loop.clear()
        self._armed = armed

    def _observe(self) -> None:
        if not self._armed or not self._instruction:
            return
        found, reason = self._sync.latest(self.bus.now())
        if found is None:
            self._missing[reason] = self._missing.get(reason, 0) + 1
            return
        stamp, values = found
        images = {camera: values[camera] for camera in self.robot.cameras}
        state = np.concatenate([self._field(f, values) for f in self.robot.state]).astype(np.float32)
        self._loop.offer(self._observation(images, state, self._instruction, stamp))

    def _field(self, field: Field, values: Mapping[str, Any]) -> np.ndarray:
        if is_tool(field):
            return values[TOOL_POSE]
        joints, names = values[JOINTS], joint_names(field)
        missing = [name for name in names if name not in joints]
        if missing:
            raise ValueError(f"{JOINTS} has {', '.join(joints)} but the policy needs {', '.join(missing)}")
        return np.array([joints[name] for name in names])

    def _publish(self, chunk: Any) -> None:
        """Send a chunk's fields; called in the inference thread."""
        msg, robot = self.bus.msg, self.robot
        values = np.asarray(chunk.values, float)
        motion, gripper = values[:, robot.action_slice(robot.motion)], values[:, robot.action_slice(robot.gripper)]
        delta = robot.motion.mode == "delta"
        if robot.gripper is not None:
            names, quantity = [robot.gripper.name], gripper_quantity(robot.gripper)
            closing = m.joint_chunk_to_ros(msg, chunk.stamp, chunk.action_dt, names, gripper, quantity)
            self._chunk_gripper.publish(closing)
        self._chunk.publish(
            m.cartesian_chunk_to_ros(msg, chunk.stamp, chunk.action_dt, robot.motion.name, BASE_FRAME, motion, delta)
        )

    def _fail(self, error: BaseException) -> None:
        self.error = error
        self.bus.shutdown()

    def _diagnose(self) -> None:
        values: Dict[str, Any] = {"inferences": self._loop.inference.count}
        values.update(self._loop.inference.to_dict("execution_time"))
        values.update({f"no observation: {reason}": n for reason, n in self._missing.items()})
        self._diagnostics.publish(m.diagnostics_to_ros(self.bus.msg, self.bus.now(), "policy", 0, "", values))


def run(
    *,
    bus: Mapping[str, Any],
    checkpoint: str,
    embodiment: str,
    seed: int,
    num_inference_steps: Optional[int],
    device: str,
    precision: Any,
    path: Any,
    slop: float,
    max_age: float,
    interval: float,
) -> None:
    """Run a checkpoint's policy until it is stopped; arguments as in `PolicyNode`."""
    import torch

    from dita.embodiment import embodiment_to_dict
    from dita.policy.fast import PolicySession
    from dita.policy.policy import DitaPolicy
    from dita.types import RawObservation

    torch.set_num_threads(1)  # the guard and the twin need the other core
    model = DitaPolicy.from_pretrained(checkpoint, device, precision)
    session = PolicySession(model, embodiment=embodiment, num_inference_steps=num_inference_steps, path=path)
    spec = embodiment_to_dict(model.specs[embodiment])
    node = PolicyNode(
        open_bus(name="policy", **bus),
        session,
        spec,
        model.contract.hash_of(embodiment),
        RawObservation,
        n_obs_steps=model.config.n_obs_steps,
        seed=seed,
        slop=slop,
        max_age=max_age,
        interval=interval,
    )
    serve(node)
