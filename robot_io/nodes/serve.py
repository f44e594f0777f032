"""Run one node until it is told to leave."""

import contextlib
import ctypes
import gc
import os
import signal
from pathlib import Path
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def be_nice(niceness: int) -> None:
    """Set this process's niceness, below 0 where that is allowed; its session's, too, which Linux may share time by."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, niceness)
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(str(niceness), encoding="ascii")


def keep_memory() -> None:
    """Let glibc keep what images leave free; else each one is mapped anew, which takes a millisecond.

    Does nothing under another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, 128 << 20)
        mallopt(M_MMAP_THRESHOLD, 64 << 20)


def serve(node: Any) -> None:
    """Spin until SIGINT, SIGTERM or the node's own end; an exception in a callback stops the node first."""
    keep_memory()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: node.stop())
    node.bus.on_stop(getattr(node, "on_stop", lambda reason: node.stop()))
    gc.collect()
    gc.freeze()  # or the collector would go through everything that was imported, for 30 ms in the middle of a tick
    try:
        node.bus.spin()
    finally:
        node.close()
