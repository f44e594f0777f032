"""What this machine can do, one line each, and what to install for the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

# extra -> modules that tell whether it is there (pyproject.toml says who imports them)
EXTRAS = {
    "sim-core": ("metaworld",),
    "sim": ("robosuite", "gym_aloha", "gymnasium_robotics"),
    "robot": ("cyclonedds", "rosbags", "ruckig"),
    "convert": ("h5py", "pyarrow", "simplejpeg"),
    "remote": ("obstore",),
    "finetune": ("peft",),
    "cluster": ("ray",),
    "view": ("rerun",),
}
DISK_GB = 5  # a demo with its checkpoints and videos, with room
MEMORY_GB = 3  # what the demo may take
DDS_SECONDS = 5.0


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    ok: bool
    text: str  # what there is, or what to do


def machine_report() -> list[Check]:
    """Check Python, OpenGL, DDS, torch, disk, memory and extras; a missing part is a line, never an exception."""
    checks: list[tuple[str, Callable[[], tuple[bool, str]]]] = [
        ("Python", _python),
        ("OpenGL", _opengl),
        ("DDS on loopback", _dds),
        ("torch", _torch),
        ("disk", _disk),
        ("memory", _memory),
    ]
    lines = []
    for name, check in checks:
        try:
            lines.append(Check(name, *check()))
        except Exception as e:  # a broken installation is what this command is there to report
            lines.append(Check(name, False, f"{type(e).__name__}: {e}"))
    return lines + [Check(f"extra {name}", *_extra(name, modules)) for name, modules in EXTRAS.items()]


def print_machine() -> None:
    """Print the report as a table."""
    table = Table("", "what", "state", show_header=False, box=None)
    for check in machine_report():
        table.add_row("[green]ok[/green]" if check.ok else "[yellow]missing[/yellow]", check.name, Text(check.text))
    Console().print(table)


def _python() -> tuple[bool, str]:
    return sys.version_info >= (3, 11), f"{platform.python_version()} on {platform.platform()}; 3.11 or newer is needed"


def _opengl() -> tuple[bool, str]:
    from dita.envs import gl

    chosen = os.environ.get("MUJOCO_GL")
    working = [backend for backend in ((chosen,) if chosen else gl.BACKENDS) if gl.works(backend)]
    if not working:
        return False, f"no {chosen or ' or '.join(gl.BACKENDS)} renders here; run: {gl.INSTALL}"
    return True, f"{working[0]}{' (set by MUJOCO_GL)' if chosen else ''}"


def _dds() -> tuple[bool, str]:
    try:
        from robot_io.bus_dds import loopback_check
    except ModuleNotFoundError as e:
        return False, f"no package {e.name}: pip install 'dita[robot]'"
    problem = loopback_check(DDS_SECONDS)
    return problem is None, problem or "two participants exchanged a message"


def _torch() -> tuple[bool, str]:
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return True, f"{torch.__version__}, {torch.get_num_threads()} threads, CUDA: {', '.join(devices) or 'none'}"


def _disk() -> tuple[bool, str]:
    free = shutil.disk_usage(".").free / 1e9
    return free >= DISK_GB, f"{free:.0f} GB free here; the demo wants {DISK_GB}"


def _memory() -> tuple[bool, str]:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / 1e9
    return total >= MEMORY_GB, f"{total:.0f} GB, {free:.0f} GB unused; the demo wants {MEMORY_GB}"


def _extra(name: str, modules: tuple[str, ...]) -> tuple[bool, str]:
    missing = [m for m in modules if importlib.util.find_spec(m) is None]
    return not missing, f"no {', '.join(missing)}: pip install 'dita[{name}]'" if missing else ", ".join(modules)
