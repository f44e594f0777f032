"""Run one node until it is told to leave."""

import contextlib
import gc
import os
import signal
from pathlib import Path
from typing import Any


def be_nice(niceness: int) -> None:
    """Set this process's niceness, below 0 where that is allowed; its session's, too, which Linux may share time by."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, niceness)
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(niceness), encoding="ascii")


def serve(node: Any) -> None:
    """Spin until SIGINT, SIGTERM or the node's own end; an exception in a callback stops the node first."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: node.stop())
    node.bus.on_stop(getattr(node, "on_stop", lambda reason: node.stop()))
    gc.collect()
    gc.freeze()  # or the collector would go through everything that was imported, for 30 ms in the middle of a tick
    try:
        node.bus.spin()
    finally:
        node.close()
