"""Run the guard's core on a fake clock through random events in every space; resumes; writes build/soak_core.json.

python benchmarks/soak_core.py [--ticks 10000000]; the events and the independent checker are those of
tests/test_guard_properties.py. An episode that breaks a promise is named with its seed, and ends the run.
"""

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "build" / "soak_core.json"
EVENTS_PER_EPISODE = 200


def main() -> int:
    """Play episodes, the spaces in turn, until there are enough ticks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ticks", type=int, default=10_000_000, help="in total, with those of earlier runs")
    options = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import numpy as np
    from guard_arm import SPACES, Arm, embodiment  # pyright: ignore[reportMissingImports]
    from test_guard_properties import EVENTS, play  # pyright: ignore[reportMissingImports]

    done = {"episodes": 0, "ticks": 0, "commands": 0, "seconds": 0.0, "reactions": {}, "violations": {}}
    if RESULTS.exists():
        done = json.loads(RESULTS.read_text())
    RESULTS.parent.mkdir(exist_ok=True)
    while done["ticks"] < options.ticks:
        episode, begin = done["episodes"], time.perf_counter()
        rng = np.random.default_rng([5, episode])
        arm = Arm(embodiment(*SPACES[episode % len(SPACES)])).arm()
        for event in rng.choice(EVENTS, EVENTS_PER_EPISODE):
            if arm.state.value in ("IDLE", "FAULT") and rng.random() < 0.5:
                event = "arm"  # else most of the time would pass without motion
            play(arm, str(event), int(rng.integers(1, 17)), rng)
        done["episodes"] += 1
        done["ticks"] += arm.ticks
        done["commands"] += arm.checker.commands
        done["seconds"] += time.perf_counter() - begin
        for name in ("R0", "R1", "R2", "R3"):
            done["reactions"][name] = done["reactions"].get(name, 0) + arm.guard.counts[name]
        stops = arm.guard.counts["envelope_stops"]
        broken = {**arm.checker.violations, **({"envelope stops": stops} if stops else {})}
        for name, count in broken.items():
            done["violations"][name] = done["violations"].get(name, 0) + count
        RESULTS.write_text(json.dumps(done, indent=1))
        if broken:
            print(f"episode {episode} ({SPACES[episode % len(SPACES)]}) broke {broken}")
            return 1
    rate = done["ticks"] / done["seconds"]
    print(f"{done['ticks']} ticks, {done['commands']} commands, 0 outside the envelope; {rate:.0f} ticks/s; {done}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
