"""Build this folder as a ROS 2 package (ament_python): it is import package and package root at once.

Only colcon uses this file; `pip install` uses the repository's pyproject.toml. The tracker needs ruckig from PyPI.
"""

from setuptools import setup

NAMES = ("blackbox", "guard", "live", "operator", "policy", "preflight", "recorder", "teleop", "twin")

setup(
    name="robot_io",
    version="0.1.0",
    packages=["robot_io", "robot_io.core", "robot_io.nodes"],
    package_dir={"robot_io": "."},
    data_files=[
        ("share/ament_index/resource_index/packages", ["resource/robot_io"]),
        ("share/robot_io", ["package.xml"]),
        ("share/robot_io/launch", ["launch/dita.launch.py"]),
        ("share/robot_io/security", ["security/policy.xml", "security/README.md"]),
    ],
    install_requires=["setuptools", "numpy", "ruckig"],
    entry_points={"console_scripts": [f"{name} = robot_io.nodes.ros2:{name}" for name in NAMES]},
    # where `ros2 run` looks
    options={"install": {"install_scripts": "$base/lib/robot_io"}, "develop": {"script_dir": "$base/lib/robot_io"}},
)
