"""Run the guard's core on a fake clock through random events in every space; resumes; writes soak_core.json (evidence).

python benchmarks/soak_core.py [--ticks 10000000] [--workers 2]; the events and the independent checker are those of
tests/test_guard_properties.py. An episode is its number: the same events on any machine and with any workers. One that
breaks a promise is named, and ends the run. What was run with other sources of the guard does not count.
"""

import argparse
import hashlib
import importlib
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "evidence" / "soak_core.json"
EVENTS_PER_EPISODE = 200
SEED = 5
SAVE_EVERY = 20  # episodes


def sources() -> str:
    """Return a digest of all that the guard's core imports, and of what plays and judges it."""
    importlib.import_module("robot_io.core.guard")
    core = {Path(str(m.__file__)) for name, m in sys.modules.items() if name.startswith("robot_io.core.")}
    files = sorted(core) + [ROOT / "tests" / name for name in ("guard_arm.py", "test_guard_properties.py")]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:12]


def episode(number: int) -> dict[str, Any]:
    """Play one episode and return its counts."""
    import numpy as np
    from guard_arm import SPACES, Arm, embodiment  # pyright: ignore[reportMissingImports]
    from test_guard_properties import EVENTS, play  # pyright: ignore[reportMissingImports]

    begin, rng = time.process_time(), np.random.default_rng([SEED, number])
    arm = Arm(embodiment(*SPACES[number % len(SPACES)])).arm()
    for event in rng.choice(EVENTS, EVENTS_PER_EPISODE):
        if arm.state.value in ("IDLE", "FAULT") and rng.random() < 0.5:
            event = "arm"  # else most of the time would pass without motion
        play(arm, str(event), int(rng.integers(1, 17)), rng)
    stops = arm.guard.counts["envelope_stops"]
    return {
        "number": number,
        "space": " ".join(map(str, SPACES[number % len(SPACES)])),
        "ticks": arm.ticks,
        "commands": arm.checker.commands,
        "cpu_s": time.process_time() - begin,
        "reactions": {name: arm.guard.counts[name] for name in ("R0", "R1", "R2", "R3")},
        "violations": {**arm.checker.violations, **({"envelope stops": stops} if stops else {})},
    }


def add(done: dict[str, Any], played: dict[str, Any]) -> None:
    """Add an episode's counts to those of all."""
    done["episodes"] += 1
    for name in ("ticks", "commands", "cpu_s"):
        done[name] += played[name]
    done["ticks_by_space"][played["space"]] = done["ticks_by_space"].get(played["space"], 0) + played["ticks"]
    for kind in ("reactions", "violations"):
        for name, count in played[kind].items():
            done[kind][name] = done[kind].get(name, 0) + count


def main() -> int:
    """Play episodes, the spaces in turn, until there are enough ticks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ticks", type=int, default=10_000_000, help="in total, with those of earlier runs")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--out", type=Path, default=RESULTS, help="gets the counts, and is continued")
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # forked workers have it, too
    counts = {"episodes": 0, "ticks": 0, "commands": 0, "cpu_s": 0.0}
    fresh = {"sources": sources(), "seed": SEED, **counts, "ticks_by_space": {}, "reactions": {}, "violations": {}}
    done = json.loads(options.out.read_text()) if options.out.exists() else fresh
    if done["sources"] != fresh["sources"]:
        print(f"{options.out}: {done['ticks']} ticks were of other sources ({done['sources']}): starting anew")
        done = fresh
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.1f} %"))
    numbers = iter(range(done["episodes"], sys.maxsize))
    fork = multiprocessing.get_context("fork")
    with fork.Pool(options.workers) as pool, Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task("ticks", total=options.ticks, completed=done["ticks"])
        while done["ticks"] < options.ticks and not done["violations"]:
            for played in pool.map(episode, [next(numbers) for _ in range(SAVE_EVERY)], chunksize=1):
                add(done, played)
                if played["violations"]:
                    print(f"episode {played['number']} ({played['space']}) broke {played['violations']}")
            options.out.write_text(json.dumps(done, indent=1) + "\n")
            bar.update(task, completed=done["ticks"])
    outside = sum(done["violations"].values())
    print(
        f"{done['ticks']} ticks in {done['episodes']} episodes, {done['commands']} commands, {outside} outside the "
        f"envelope or stopped by its last check; {done['ticks'] / done['cpu_s']:.0f} ticks per second of a core"
    )
    return 1 if done["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
