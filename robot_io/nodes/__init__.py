"""One module per process; `robot_io.live` runs them together.

    python -m robot_io.nodes guard '{"tick_hz": 160}'

The guard's path imports neither torch, dita, hydra, zarr nor mujoco: it runs from a copy of this folder.
"""

import ctypes
import importlib
import json
import signal
import sys
from typing import Any, Callable, Sequence

NODES = (
    "blackbox",
    "guard",
    "operator",
    "policy",
    "preflight",
    "recorder",
    "teleop",
    "twin",
)  # the modules here that have a `run`


def entry(name: str) -> Callable[..., Any]:
    """Return the function that runs one node; only that node's libraries are imported.

    Raises:
        ValueError: no such node.
    """
    if name not in NODES:
        raise ValueError(f"no node {name!r}; there are {', '.join(NODES)}")
    return importlib.import_module(f"robot_io.nodes.{name}").run


def main(arguments: Sequence[str]) -> int:
    """Run one node: its name, its arguments as JSON, and `--with-parent` to end when the parent does."""
    name, values, *flags = arguments
    if "--with-parent" in flags:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    try:
        entry(name)(**json.loads(values))
    except (ValueError, KeyError, OSError, TypeError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0
