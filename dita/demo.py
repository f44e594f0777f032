"""The main job, end to end: the same commands a user would type, each resumable on its own."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dita.checkpoint import read_json, write_json
from dita.config import DemoConfig
from dita.statistics import wilson
from robot_io.live import closing_lines


def demo(config: DemoConfig) -> None:
    """Collect, inspect, train, evaluate, run live and report into one folder; an interrupted demo continues.

    Raises:
        RuntimeError: a step failed; its own message stands above.
    """
    console = Console()
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for name, arguments in demo_steps(config).items():
        _run_step(console, out, name, arguments)
    _closing_table(console, out, time.monotonic() - began)


def demo_steps(config: DemoConfig) -> dict[str, list[str]]:
    """Return the command of each step, in order."""
    out = config.out
    store, run = f"{out}/demonstrations.zarr", f"{out}/train"
    tasks = f"env.tasks=[{','.join(config.tasks)}]"
    train = ["train", f"experiment={config.train_experiment}", f"data.stores=[{{path:{store},weight:1}}]"]
    return {
        "collect": ["collect", f"out={store}", tasks, f"episodes={config.demonstrations}", "--resume"],
        "inspect": ["inspect", store, "--sheet", f"{out}/demonstrations.png"],
        "train": [*train, f"run={run}", f"seed={config.seed}", "--resume"],
        "eval": ["eval", run, f"out={out}/eval", tasks, f"episodes={config.eval_episodes}", "--resume"],
        "live": [
            "robot", "live", f"checkpoint={run}", f"out={out}/live", tasks,
            f"episodes={config.live_episodes}", f"real_time_factor={config.live_real_time_factor}", "--overwrite",
        ],
        "report": ["report", out],
    }  # fmt: skip


def _run_step(console: Console, out: Path, name: str, arguments: list[str]) -> None:
    times = read_json(out / "times.json") if (out / "times.json").exists() else {}
    done = times.get(name, {})
    if done.get("command") == arguments and name != "report":
        console.print(f"[dim]{name}: done before ({done['seconds']:.0f} s)[/dim]")
        return
    console.rule(f"[bold]{name}")
    console.print(f"$ dita {shlex.join(arguments)}", style="dim", markup=False, highlight=False, soft_wrap=True)
    began = time.monotonic()
    # a process each: OpenGL, threads and memory of one step do not weigh on the next
    code = subprocess.run([sys.executable, "-m", "dita.cli", *arguments], env=dict(os.environ)).returncode
    if code != 0:
        raise RuntimeError(
            f"step {name} failed with exit code {code}; fix its cause and run the demo again: it continues"
        )
    write_json(out / "times.json", times | {name: {"command": arguments, "seconds": time.monotonic() - began}})


def _closing_table(console: Console, out: Path, seconds: float) -> None:
    result, live = read_json(out / "eval" / "eval_info.json"), read_json(out / "live" / "live.json")
    table = Table(title=f"Dita demo, {seconds / 60:.1f} minutes")
    for column in ("task", "success", "95 % interval", "episodes"):
        table.add_column(column)
    for task, row in result["tasks"].items():
        low, high = row["interval"]
        table.add_row(task, f"{row['success_rate']:.0%}", f"{low:.0%} .. {high:.0%}", str(row["episodes"]))
    wins, rounds = live["successes"], len(live["episodes"])
    low, high = wilson(wins, rounds)
    table.add_row("live, over DDS", f"{wins / rounds:.0%}", f"{low:.0%} .. {high:.0%}", str(rounds))
    console.print(table)
    console.print("\n".join(closing_lines(live)), highlight=False)
    console.print(f"report: {out.resolve() / 'report.html'}")
