"""Run one node until it is told to leave."""

import gc
import signal
from typing import Any


def serve(node: Any) -> None:
    """Spin until SIGINT, SIGTERM or the node's own end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: node.stop())
    gc.collect()
    gc.freeze()  # or the collector would go through everything that was imported, for 30 ms in the middle of a tick
    node.bus.spin()
    node.close()
