"""What `ros2 run robot_io NAME` starts. The guard is a managed node of this ROS 2; the others are dita's.

    ros2 run robot_io guard --ros-args -p embodiment:=/etc/dita/arm.yaml -p tick_hz:=160.0
    ros2 run robot_io policy checkpoint=outputs/train domain_id=0
    ros2 run robot_io blackbox '{"bus": {"kind": "rclpy", "domain_id": 0}}'

rclpy pins a NumPy that dita may not run with, so dita's nodes usually live in dita's own environment, over DDS:
`dita robot NAME`, which is what launch/dita.launch.py starts.
"""

import gc
import os
import signal
import sys
from typing import Any, Callable

from robot_io.nodes import main

USAGE = """usage: ros2 run robot_io guard --ros-args -p embodiment:=FILE [-p NAME:=VALUE ...]

The guard as a lifecycle node: the only writer of the command topic. Parameters, in seconds:
  embodiment         string  this robot's own file (YAML or JSON), with its limits and driver
  tick_hz            double  of the output, at least 100
  state_timeout, stream_timeout, hold_timeout, max_skew, clamp_margin   double, see configs/robot.yaml
  require_preflight  bool    refuse to arm until the preflight passed (true)
  autostart          bool    configure and activate without being asked (true)
Without ROS 2: python -m robot_io.nodes guard '{"bus": {"kind": "dds", "domain_id": 0}, "embodiment": ...}'"""


def run_managed(name: str, build: Callable[[Any], Any]) -> None:
    """Run a managed node until it is shut down; `build(bus)` makes it.

    It configures and activates itself unless its parameter `autostart` is false, so that one that is started again
    after a crash comes up without a launch file's help. SIGINT and SIGTERM are its shutdown transition.
    """
    from robot_io.bus_rclpy import RclpyBus

    bus = RclpyBus(name, None, build)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, bus.ask_to_leave)
    try:
        if bus.param("autostart", True):
            bus.start()
        gc.collect()
        gc.freeze()
        bus.spin()
    finally:
        bus.close()


def _build_guard(bus: Any) -> Any:
    from robot_io.nodes.guard import from_parameters

    node = from_parameters(bus)
    bus.on_stop(node.on_stop)
    return node


def guard() -> None:
    """Run the guard."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(USAGE)
        return
    try:
        run_managed("guard", _build_guard)
    except ImportError as e:
        _end(f"guard: {e}: source a ROS 2, and pip install what is missing beside it; --help says how to do without")
    except (ValueError, KeyError, OSError) as e:
        _end(f"guard: {e}")
    sys.stdout.flush()
    os._exit(0)  # DDS's own threads may outlive Python's clean-up


def _dita(role: str) -> None:
    """Run one of dita's nodes, with plain JSON arguments or with `dita robot`'s."""
    if sys.argv[1:] and sys.argv[1].startswith("{"):
        raise SystemExit(main([role, *sys.argv[1:]]))
    try:
        from dita.cli import main as dita
    except ImportError as e:
        missing = (e.name or str(e)).partition(".")[0]
        _end(f"{role}: {missing} is not in {sys.executable}: run `dita robot {role}` in dita's own environment")
    raise SystemExit(dita(["robot", role, *sys.argv[1:]]))


def _end(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)
    os._exit(1)


def policy() -> None:
    """Run the policy."""
    _dita("policy")


def twin() -> None:
    """Run the simulated arm."""
    _dita("twin")


def recorder() -> None:
    """Run the recorder of demonstrations."""
    _dita("recorder")


def blackbox() -> None:
    """Run the black box."""
    _dita("blackbox")


def teleop() -> None:
    """Run a human's controls."""
    _dita("teleop")


def operator() -> None:
    """Run the operator's console."""
    _dita("operator")


def preflight() -> None:
    """Run the preflight check."""
    _dita("preflight")


def live() -> None:
    """Run the whole stack with a simulated arm."""
    _dita("live")
