"""The guard as a managed ROS 2 node; dita's nodes in their own Python environment, over DDS.

    ros2 launch robot_io dita.launch.py embodiment:=arm.yaml checkpoint:=outputs/train dita:=/opt/dita/bin/dita
    ros2 launch robot_io dita.launch.py embodiment:=arm.yaml checkpoint:=outputs/train twin:=true preflight:=false \
        require_preflight:=false overrides:="env=robosuite"
    ros2 service call /dita/arm std_srvs/srv/SetBool "{data: true}"

A guard that dies is started again, IDLE: nobody but a person arms it. rclpy pins NumPy 1 on Humble and dita needs
NumPy 2: they never share a process.
"""

import shlex

from launch import LaunchDescription  # pyright: ignore
from launch.actions import (  # pyright: ignore[reportMissingImports]
    DeclareLaunchArgument,
    ExecuteProcess,
    OpaqueFunction,
    SetEnvironmentVariable,
)
from launch.substitutions import EnvironmentVariable, LaunchConfiguration  # pyright: ignore[reportMissingImports]
from launch_ros.actions import LifecycleNode  # pyright: ignore[reportMissingImports]
from launch_ros.parameter_descriptions import ParameterValue  # pyright: ignore[reportMissingImports]

# as in configs/robot.yaml
GUARD = {
    "tick_hz": 160.0,
    "state_timeout": 0.1,
    "stream_timeout": 0.1,
    "hold_timeout": 1.0,
    "max_skew": 0.05,
    "clamp_margin": 0.25,
}
# of the arm's driver; the command's and the gripper's are in the embodiment file
TOPICS = {"tool_pose": "/tool_pose", "joint_states": "/joint_states", "driver_mode": "/driver/mode"}
# dita's nodes, and whether they run unless asked
ROLES = {"policy": "true", "preflight": "true", "blackbox": "true", "recorder": "false", "twin": "false"}
ARGUMENTS = {
    "embodiment": (None, "the guard's own file of this robot: limits and driver"),
    "checkpoint": ("", "run, checkpoint or policy folder; the policy and the preflight need one"),
    "dita": ("dita", "the dita command of its environment"),
    "overrides": ("", "further settings of `dita robot`, as in configs/robot.yaml: 'env=robosuite device=cuda'"),
    "discovery_range": ("LOCALHOST", "LOCALHOST, or SUBNET for several machines by multicast"),
    "peers": ("", "other machines by unicast, with LOCALHOST: '10.0.0.5;10.0.0.6'"),
    "require_preflight": ("true", "refuse to arm until the preflight passed"),
    "autostart": ("true", "the guard configures and activates itself; false: a lifecycle manager does"),
    "respawn": ("true", "start a guard that died again, in IDLE"),
    "enclave": ("", "the guard's SROS2 enclave: /dita/guard"),
}


def nodes(context):
    """Return the guard and the commands of dita's nodes."""
    value = {name: LaunchConfiguration(name).perform(context) for name in (*ARGUMENTS, *TOPICS, *ROLES)}
    if value["policy"] == "true" and not value["checkpoint"]:
        raise ValueError("checkpoint:= is missing; policy:=false preflight:=false run the guard without one")
    parameters = {name: ParameterValue(LaunchConfiguration(name), value_type=float) for name in GUARD}
    for name in ("require_preflight", "autostart"):
        parameters[name] = ParameterValue(LaunchConfiguration(name), value_type=bool)
    parameters["embodiment"] = ParameterValue(LaunchConfiguration("embodiment"), value_type=str)
    guard = LifecycleNode(
        package="robot_io",
        executable="guard",
        name="guard",
        namespace="",
        parameters=[parameters],
        remappings=[(default, value[name]) for name, default in TOPICS.items()],
        ros_arguments=["--enclave", value["enclave"]] if value["enclave"] else [],
        respawn=value["respawn"] == "true",
        respawn_delay=1.0,
        output="screen",
    )
    domain = EnvironmentVariable("ROS_DOMAIN_ID", default_value="0").perform(context)
    remaps = [f"'{default}:={value[name]}'" for name, default in TOPICS.items() if value[name] != default]
    settings = [f"domain_id={domain}", *([f"remap=[{','.join(remaps)}]"] if remaps else [])]
    settings += [f"checkpoint={value['checkpoint']}"] if value["checkpoint"] else []
    settings += shlex.split(value["overrides"])
    return [guard] + [
        ExecuteProcess(cmd=[value["dita"], "robot", role, *settings], name=role, output="screen")
        for role in ROLES
        if value[role] == "true"
    ]


def generate_launch_description():
    """Return every argument, the discovery range and the nodes."""
    named = {**ARGUMENTS, **{name: (topic, f"where the arm has {topic}") for name, topic in TOPICS.items()}}
    named.update({role: (default, f"run dita's {role}") for role, default in ROLES.items()})
    named.update({name: (str(default), "of the guard, see configs/robot.yaml") for name, default in GUARD.items()})
    return LaunchDescription(
        [
            *[DeclareLaunchArgument(name, default_value=v, description=text) for name, (v, text) in named.items()],
            SetEnvironmentVariable("ROS_AUTOMATIC_DISCOVERY_RANGE", LaunchConfiguration("discovery_range")),
            SetEnvironmentVariable("ROS_STATIC_PEERS", LaunchConfiguration("peers")),
            OpaqueFunction(function=nodes),
        ]
    )
