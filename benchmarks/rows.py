"""Every row, by the name that `make bench ROWS=` takes."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.eval_rows import eval_throughput
from benchmarks.harness import Case
from benchmarks.latency_rows import node_latency
from benchmarks.loader_rows import loader
from benchmarks.policy_rows import denoise_exact, tick_gpu, tick_stream, train_multinoise
from benchmarks.process_rows import memory, startup
from benchmarks.stitching_rows import stitching
from benchmarks.train_rows import ddp_scaling

ROWS: dict[str, Callable[[str], list[Case]]] = {
    "denoise_exact": denoise_exact,
    "tick_stream": tick_stream,
    "tick_gpu": tick_gpu,
    "train_multinoise": train_multinoise,
    "loader": loader,
    "memory": memory,
    "eval_throughput": eval_throughput,
    "startup": startup,
    "node_latency": node_latency,
    "stitching": stitching,
    "ddp_scaling": ddp_scaling,
}
