"""The guard as a ROS 2 node; policy and twin in their own Python environment, over DDS.

    ros2 launch robot_io dita.launch.py checkpoint:=outputs/train dita:=/opt/dita/bin/dita
    ros2 topic pub --once /dita/arm std_msgs/msg/Bool "data: true"

rclpy pins NumPy 1 on Humble and dita needs NumPy 2: they never share a process.
"""

from launch import LaunchDescription  # pyright: ignore
from launch.actions import (  # pyright: ignore[reportMissingImports]
    DeclareLaunchArgument,
    ExecuteProcess,
    SetEnvironmentVariable,
)
from launch.conditions import IfCondition  # pyright: ignore[reportMissingImports]
from launch.substitutions import EnvironmentVariable, LaunchConfiguration  # pyright: ignore[reportMissingImports]
from launch_ros.actions import Node  # pyright: ignore[reportMissingImports]
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


def generate_launch_description():
    """Return guard, policy and, on request, the twin."""
    domain = ["domain_id=", EnvironmentVariable("ROS_DOMAIN_ID", default_value="0")]
    dita, checkpoint = LaunchConfiguration("dita"), LaunchConfiguration("checkpoint")
    parameters = {name: ParameterValue(LaunchConfiguration(name), value_type=float) for name in GUARD}
    return LaunchDescription(
        [
            DeclareLaunchArgument("checkpoint", description="run, checkpoint or policy folder"),
            DeclareLaunchArgument("dita", default_value="dita", description="the dita command of its environment"),
            DeclareLaunchArgument("twin", default_value="false", description="also run the simulated arm"),
            DeclareLaunchArgument("discovery_range", default_value="LOCALHOST"),
            *[DeclareLaunchArgument(name, default_value=str(value)) for name, value in GUARD.items()],
            SetEnvironmentVariable("ROS_AUTOMATIC_DISCOVERY_RANGE", LaunchConfiguration("discovery_range")),
            Node(package="robot_io", executable="guard", name="guard", parameters=[parameters], output="screen"),
            ExecuteProcess(cmd=[dita, "robot", "policy", ["checkpoint=", checkpoint], domain], output="screen"),
            ExecuteProcess(
                cmd=[dita, "robot", "twin", domain],
                condition=IfCondition(LaunchConfiguration("twin")),
                output="screen",
            ),
        ]
    )
