"""The graph's names: topics, frames, and how an embodiment's fields travel on them."""

from typing import List

from robot_io import messages as m
from robot_io.core.limits import Field, Robot

TOOL_POSE = "/tool_pose"  # twin -> all: measured position
JOINTS = "/joint_states"  # twin -> policy: gripper and joints, by name
TARGET_POSE = "/target_pose"  # guard -> twin: the command topic
GRIPPER = "/gripper_controller/joint_trajectory"  # guard -> twin
CHUNK = "/dita/chunk"  # policy -> guard
CHUNK_GRIPPER = "/dita/chunk_gripper"  # policy -> guard: same stamp, which is the chunk's id
EXECUTED = "/dita/executed"  # guard -> policy
CONTRACT = "/dita/contract"  # policy -> all, latched
INSTRUCTION = "/dita/instruction"  # operator or twin -> policy, latched
ARM = "/dita/arm"  # operator -> guard
GUARD_STATE = "/dita/state"  # guard -> all
EPISODE = "/dita/episode"  # operator -> twin: reset
EPISODE_STATE = "/dita/episode_state"  # twin -> operator
INJECT = "/twin/inject"  # rehearsal -> twin: a fault to have, see nodes/inject.py
INJECTED = "/twin/injected"  # twin -> rehearsal, latched
TELEOP = "/dita/teleop"  # human -> guard, as CHUNK
TELEOP_GRIPPER = "/dita/teleop_gripper"  # human -> guard, as CHUNK_GRIPPER
HEARTBEAT = "/dita/heartbeat"  # policy or human -> guard: the callbacks still run
TAKEOVER = "/dita/takeover"  # human -> guard: whose chunks count
SPEED = "/dita/speed"  # operator -> guard: scale of the limits
APPROVAL = "/dita/approval"  # operator -> guard: chunks wait for approval, or not
APPROVE = "/dita/approve"  # operator -> guard: this chunk may go
RECORD = "/dita/record"  # operator -> recorder
RECORD_STATE = "/dita/record_state"  # recorder -> all, latched
POLICY_STATE = "/dita/policy_state"  # policy -> guard, latched: whether it may act, and why not
NO_INSTRUCTION = f"no instruction on {INSTRUCTION}"  # on POLICY_STATE: it waits for somebody, nothing is wrong
PREFLIGHT = "/dita/preflight"  # preflight -> guard, latched
DIAGNOSTICS = "/diagnostics"

BASE_FRAME = "base_link"


def image_topic(camera: str) -> str:
    """Return the topic of a camera."""
    return f"/{camera}/image_raw"


def joint_names(field: Field) -> List[str]:
    """Return the names under which a state field travels as joints.

    Raises:
        ValueError: a tool rotation, which no joint state can carry.
    """
    if field.kind.startswith("ee_rotation"):
        raise ValueError(f"state field {field.name}: {field.kind} is not carried by the live stack yet")
    return [field.name] if field.size == 1 else [f"{field.name}_{i}" for i in range(field.size)]


def is_tool(field: Field) -> bool:
    """Return whether a state field travels as the tool's pose."""
    return field.kind == "ee_position"


def gripper_quantity(field: Field) -> str:
    """Return the trajectory quantity of a gripper field."""
    return "effort" if field.kind == "gripper_effort" else "positions"


def chunk_type(robot: Robot) -> str:
    """Return the type of a robot's chunks and executed steps."""
    return m.JOINT_TRAJECTORY if robot.space.name == "joint" else m.CARTESIAN_TRAJECTORY


def command_type(robot: Robot) -> str:
    """Return the type of a robot's command topic."""
    return {
        "pose": m.POSE,
        "twist": m.TWIST,
        "joint_trajectory": m.JOINT_TRAJECTORY,
        "position_array": m.ARRAY,
    }[robot.driver.command]
