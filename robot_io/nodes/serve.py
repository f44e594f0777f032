"""Run one node until it is told to leave."""

import gc
import signal
from typing import Any


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
