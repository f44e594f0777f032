"""The twin of `fake_robot`, with an expert that teleoperates it while a human is said to be in control.

python tests/fake_teleop.py '{"domain_id": 3}'
"""

import json
import os
import sys

import numpy as np
from fake_robot import EMBODIMENT, GOAL, PointEnv

from robot_io import messages as m
from robot_io.bus import COMMAND, STATE, open_bus
from robot_io.core.limits import parse_robot
from robot_io.nodes.serve import serve
from robot_io.nodes.teleop import send_chunk
from robot_io.nodes.topics import TAKEOVER, TELEOP, TELEOP_GRIPPER
from robot_io.nodes.twin import TwinNode

DT = EMBODIMENT["action_dt"]


class VisibleEnv(PointEnv):
    """A point that starts where its seed says, with a picture in which it moves."""

    def reset(self, *, seed, options):
        super().reset(seed=seed, options=options)
        self.commanded_position += np.random.default_rng(seed).uniform(-0.05, 0.05, 3)
        self.hand = self.commanded_position.copy()

    def step(self, action):
        super().step(action)
        self.grip = 0.5 * (float(action[3]) + 1)  # an effort of -1 closes
        return ({"state": self._state()},)

    def observe(self):
        observation = super().observe()
        wave = np.arange(24)[:, None, None] * 0.3 + np.arange(32)[None, :, None] * 0.2
        observation.images["corner"] = (128 + 100 * np.sin(wave + 200 * self.hand)).astype(np.uint8)
        return observation


def main(domain_id: int) -> None:
    bus = open_bus("dds", "twin", domain_id)
    env, robot, state = VisibleEnv(), parse_robot(EMBODIMENT, need_limits=False), {"active": False, "id": 0}
    chunk = bus.publisher(TELEOP, m.CARTESIAN_TRAJECTORY, COMMAND)
    gripper = bus.publisher(TELEOP_GRIPPER, m.JOINT_TRAJECTORY, COMMAND)
    bus.subscribe(TAKEOVER, m.STRING, STATE, lambda message: state.update(m.json_from_ros(message)))
    node = TwinNode(bus, env, EMBODIMENT, command_timeout=0.1)

    def teleoperate() -> None:
        if state["active"] and node._episode:
            state["id"] += 1
            motion = np.tile(np.clip((GOAL - env.hand) / 12, -0.004, 0.004), (8, 1))
            stamp = node._begin + node._done * DT  # the twin's own grid
            send_chunk(bus, robot, chunk, gripper, stamp, motion, -1.0, state["id"])

    bus.timer(2 * DT, teleoperate)
    node.reset({"episode": -1, "task": "go", "seed": 0})
    serve(node)


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
    os._exit(0)
