"""Play the live stack for a long time, without faults, and against the same episodes played offline behind the guard.

Segments of a few episodes are written as they end: an interrupted run continues, and a longer one adds to the same
table. Trains the demo's policy first if there is none. Writes docs/evidence/live_soak.md and the JSON behind it. Exit
code 1 if a command was outside the envelope or not finite.

make soak MINUTES=30
python -m benchmarks.live_soak --minutes 240        adds hours to the same table
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dita.config import DemoConfig, LiveConfig, from_dict
from dita.demo import demo_steps
from dita.statistics import compare_pairs, wilson
from robot_io.live import live

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "evidence"
SEED = 2_000_000  # of the first start: seen neither in training nor in `dita eval`
REACTIONS = ("R0", "R1", "R2", "R3")
WIRE_HZ = 120.0  # commands per second of wall time, at least
LATE_PERIODS = 2.0  # of the guard's tick: a longer one is late
IMAGE_HZ = 20.0  # of the twin, by its own clock


def demo_config(out: Path) -> DemoConfig:
    """Return the shipped demo in a folder."""
    values = yaml.safe_load((ROOT / "configs" / "demo.yaml").read_text())
    return from_dict(DemoConfig, {**values, "out": str(out)}, "demo")


def live_config(checkpoint: Path, tasks: Sequence[str], out: Path, domain_id: int, rate: float) -> LiveConfig:
    """Return the shipped live configuration for a checkpoint; in slow motion, too, 120 commands a second are sent."""
    values = yaml.safe_load((ROOT / "configs" / "robot.yaml").read_text())
    del values["defaults"]
    env = yaml.safe_load((ROOT / "configs" / "env" / "metaworld.yaml").read_text())
    values |= {"checkpoint": str(checkpoint), "out": str(out), "domain_id": domain_id, "real_time_factor": rate}
    values["tick_hz"] = max(values["tick_hz"], WIRE_HZ / rate)
    return from_dict(LiveConfig, {**values, "env": {**env, "tasks": tasks}}, "robot")


def dita(*arguments: str) -> None:
    """Run a command of Dita; its own output says what goes wrong.

    Raises:
        RuntimeError: it failed.
    """
    code = subprocess.run([sys.executable, "-m", "dita.cli", *arguments], cwd=ROOT).returncode
    if code:
        raise RuntimeError(f"dita {arguments[0]} failed with exit code {code}; run this again: it continues")


def trained(folder: Path) -> Path:
    """Return the demo's checkpoint, training it if it is not there."""
    steps = demo_steps(demo_config(folder))
    if not (folder / "train" / "checkpoints").is_dir():
        dita(*steps["collect"])
        dita(*steps["train"])
    return folder / "train"


PROBE = """
import os, sys, time
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(60))
while True:
    begin = time.monotonic()
    time.sleep(0.002)
    gap = time.monotonic() - begin
    if gap > float(sys.argv[1]):
        print(gap, flush=True)
"""


def begin_probe(gap_s: float) -> subprocess.Popen:
    """Start a process above all of ours in priority that only sleeps; it notes when it comes late [s of wall time]."""
    return subprocess.Popen([sys.executable, "-c", PROBE, str(gap_s)], stdout=subprocess.PIPE, text=True)


def end_probe(probe: subprocess.Popen) -> list[float] | None:
    """Return for how long the machine stood still, each time [s]; None where the probe got no real-time priority."""
    refused = probe.poll() is not None
    probe.terminate()
    return None if refused else [float(line) for line in probe.communicate()[0].splitlines()]


def segment(config: LiveConfig, number: int, per_task: int) -> dict[str, Any]:
    """Play the segment's starts live, or return what was played before."""
    config = replace(
        config,
        out=str(Path(config.out) / f"segment_{number:04d}"),
        episodes=per_task * len(config.env.tasks),
        seed=SEED + number * per_task,
    )
    began, probe = time.monotonic(), begin_probe(LATE_PERIODS / config.tick_hz / config.real_time_factor)
    try:
        result = live(config, exist="resume")
    finally:
        stalls = end_probe(probe)
    seconds = Path(config.out) / "seconds.json"
    if not seconds.exists():
        measured = {"wall": time.monotonic() - began, "load": os.getloadavg()[0], "stalls": stalls}
        seconds.write_text(json.dumps(measured))
    return {**result, **json.loads(seconds.read_text()), "rate": config.real_time_factor}


def armed_minutes(segments: Sequence[Mapping[str, Any]]) -> float:
    """Return for how long the arm was armed, all segments together."""
    return sum(e["seconds"] for s in segments for e in s["episodes"]) / 60


def offline(config: LiveConfig, out: Path, per_task: int) -> list[dict[str, Any]]:
    """Play the same starts in one process, behind the same guard."""
    tasks = f"env.tasks=[{','.join(config.env.tasks)}]"
    folder = out / f"offline_{per_task}"
    dita(
        "eval", config.checkpoint, f"out={folder}", tasks, f"episodes={per_task}", f"seed={SEED}", "guard=true",
        f"env.max_steps={config.env.max_steps}", "videos=0", "n_envs=2", "batch_size=2", "--resume",
    )  # fmt: skip
    return [json.loads(line) for line in (folder / "episodes.jsonl").read_text().splitlines()]


def summary(segments: Sequence[Mapping[str, Any]], played_offline: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the page says, as plain values."""
    episodes = [e for s in segments for e in s["episodes"]]
    latencies = [v for s in segments for v in s["latency_ms"]["values"]]
    violations: Counter = Counter()
    for s in segments:
        violations.update(s["envelope"]["violations"])
    guard = {name: int(sum(s["guard"].get(name, 0) for s in segments)) for name in REACTIONS}
    reasons: Counter = Counter()
    for s in segments:
        reasons.update({k: int(v) for k, v in s["guard"].items() if k[:3] in ("R1 ", "R2 ", "R3 ")})
    other = {(e["task"], e["seed"]): e for e in played_offline}
    pairs = [
        {"task": e["task"], "seed": e["seed"], "live": e["success"], "live_end": e["end"], "live_steps": e["steps"],
         "offline": other[e["task"], e["seed"]]["success"], "offline_end": other[e["task"], e["seed"]]["reason"],
         "offline_steps": other[e["task"], e["seed"]]["steps"]}
        for e in episodes if (e["task"], e["seed"]) in other
    ]  # fmt: skip
    weights = [s["envelope"]["commands"] for s in segments]
    publish = {
        name: float(np.average([s["publish"][name] for s in segments], weights=weights))
        for name in ("period_mean_ms", "jitter_std_ms")
    }
    paired = compare_pairs([p["offline"] for p in pairs], [p["live"] for p in pairs]) if pairs else None
    return {
        "checkpoint": os.path.relpath(segments[0]["checkpoint"], ROOT),
        "tick_hz": segments[0]["tick_hz"],
        "rate": segments[0]["rate"],
        "segments": len(segments),
        "wall_minutes": sum(s["wall"] for s in segments) / 60,
        "armed_minutes": armed_minutes(segments),
        "load": max(s["load"] for s in segments),
        "real_time_factor": min(s["real_time_factor"] for s in segments),
        "commands": sum(weights),
        "non_finite": sum(s["envelope"]["non_finite"] for s in segments),
        "violations": dict(violations),
        "late_ticks": sum(s["publish"]["late_ticks"] for s in segments),
        "stalls": None if any(s["stalls"] is None for s in segments) else [g for s in segments for g in s["stalls"]],
        "publish": {**publish, "period_max_ms": max(s["publish"]["period_max_ms"] for s in segments)},
        "latency_ms": {
            "n": len(latencies), "p50": float(np.percentile(latencies or [0.0], 50)),
            "p99": float(np.percentile(latencies or [0.0], 99)),
        },
        "reactions": guard,
        "stops": dict(reasons),
        "simulator_warnings": sum(s["simulator_warnings"] for s in segments),
        "driver_timeouts": sum(s["deadline_misses"] for s in segments),
        "live": {"episodes": len(episodes), "successes": sum(e["success"] for e in episodes)},
        "offline": {"episodes": len(pairs), "successes": sum(p["offline"] for p in pairs)},
        "paired": None if paired is None else {
            "pairs": paired.pairs, "offline_only": paired.a_only, "live_only": paired.b_only,
            "difference": paired.difference, "interval": list(paired.interval), "p": paired.p,
            "power_20": paired.power_20,
        },
        "pairs": pairs,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.release()}",
    }  # fmt: skip


def page(r: Mapping[str, Any], command: str) -> str:
    """Return the page of evidence."""
    reactions, publish, latency = r["reactions"], r["publish"], r["latency_ms"]
    kinds = ", ".join(f"{k} {v}" for k, v in r["violations"].items())
    stops = ", ".join(f"{k} {v}" for k, v in r["stops"].items() if not k.startswith("R1")) or "none"
    period = f"{publish['period_mean_ms']:.3f} ms; {publish['jitter_std_ms']:.3f} ms; {publish['period_max_ms']:.1f} ms"
    stood = "not measured: it takes real-time priority, as root has"
    if r["stalls"] is not None:
        stood = f"{len(r['stalls'])} times, longest {1e3 * max(r['stalls'], default=0.0):.0f} ms of wall time"
    time = f"{r['armed_minutes']:.1f} min in {r['segments']} segments ({r['wall_minutes']:.1f} min of wall time)"
    rows = [
        ("armed, in all", time),
        ("real-time factor of every clock, set; reached, lowest", f"{r['rate']:g}; {r['real_time_factor']:.3f}"),
        ("images per second of wall time", f"{IMAGE_HZ * r['rate']:.0f}"),
        (
            "commands",
            f"{r['commands']} at {r['tick_hz']:.0f} Hz, {r['tick_hz'] * r['rate']:.0f} per second of wall time",
        ),
        ("outside the envelope", f"{sum(r['violations'].values())} ({kinds})"),
        ("not finite", str(r["non_finite"])),
        ("late ticks (more than two periods)", str(r["late_ticks"])),
        ("the machine stood still for as long, noted by a process that only sleeps, above all of ours", stood),
        ("period, mean; jitter, std; longest", period),
        (
            "image -> first command of its chunk, p50 / p99",
            f"{latency['p50']:.1f} / {latency['p99']:.1f} ms (n = {latency['n']})",
        ),
        ("R0 dropped, R1 clamped", f"{reactions['R0']}, {reactions['R1']}"),
        ("false stops (R2 and R3; no fault was injected)", f"{reactions['R2'] + reactions['R3']}: {stops}"),
        ("simulator warnings, driver timeouts", f"{r['simulator_warnings']}, {r['driver_timeouts']}"),
    ]
    text = f"# The live stack without faults\n\n`{command}`. Machine: {r['machine']}; "
    text += f"load average up to {r['load']:.1f}.\n"
    text += (
        f"Policy (`{r['checkpoint']}`), guard, black box and a Meta-World twin, a process each, over DDS; a reader of\n"
    )
    text += (
        "its own judges every command by its stamp. Times are the clocks' own: in slow motion a second of wall time\n"
    )
    text += "has less of them, for limits, timeouts and latencies alike.\n\n| | |\n|---|---|\n"
    text += "\n".join(f"| {name} | {value} |" for name, value in rows)
    text += (
        "\n\n## The same episodes, live and offline\n\nOffline is `dita eval guard=true`: the same guard, no latency. "
    )
    text += "Same tasks and starts, paired.\n\n"
    for name in ("live", "offline"):
        k, n = r[name]["successes"], r[name]["episodes"]
        low, high = wilson(k, n) if n else (0.0, 1.0)
        text += f"- {name}: {k}/{n}, 95 % {low:.0%} .. {high:.0%}\n"
    if r["paired"]:
        p = r["paired"]
        low, high = p["interval"]
        text += (
            f"- difference live - offline {p['difference']:+.1%}, 95 % {low:+.1%} .. {high:+.1%} (Tango); only offline "
            f"{p['offline_only']}, only live {p['live_only']}; McNemar, exact: p = {p['p']:.3f}; so many pairs show\n"
            f"  20 points with probability {p['power_20']:.2f}\n"
        )
    text += "\nEpisodes that one solved and the other did not (all of them: live_soak.json):\n\n"
    text += "| task | seed | live | offline |\n|---|---|---|---|\n"
    for q in [q for q in r["pairs"] if q["live"] != q["offline"]]:
        ends = f"{q['live_end']}, {q['live_steps']} | {q['offline_end']}, {q['offline_steps']}"
        text += f"| {q['task']} | {q['seed']} | {ends} |\n"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Play until the minutes are full, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0, help="armed, in all: earlier segments count")
    parser.add_argument("--per-task", type=int, default=10, help="episodes per task and segment")
    parser.add_argument("--demo", type=Path, default=ROOT / "outputs" / "demo", help="holds train/, or gets it")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "soak", help="keeps the segments")
    parser.add_argument("--page", type=Path, default=PAGE, help="gets live_soak.md and live_soak.json")
    parser.add_argument("--real-time-factor", type=float, default=0.5, help="1: real time, on four cores or more")
    parser.add_argument("--domain-id", type=int, default=59)
    args = parser.parse_args(arguments)
    tasks = demo_config(args.demo).tasks
    config = live_config(trained(args.demo), tasks, args.out, args.domain_id, args.real_time_factor)
    segments: list[dict[str, Any]] = []
    while armed_minutes(segments) < args.minutes:
        segments.append(segment(config, len(segments), args.per_task))
        print(f"{armed_minutes(segments):.1f} of {args.minutes:g} minutes armed, {len(segments)} segments", flush=True)
    result = summary(segments, offline(config, args.out, args.per_task * len(segments)))
    args.page.mkdir(parents=True, exist_ok=True)
    (args.page / "live_soak.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.page / "live_soak.md").write_text(page(result, f"make soak MINUTES={args.minutes:g}"))
    bad = sum(result["violations"].values()) + result["non_finite"] + result["simulator_warnings"]
    print(f"{args.page / 'live_soak.md'}: {result['commands']} commands, {bad} of them bad")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
