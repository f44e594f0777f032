"""Inject every fault of table A into the live stack, over real DDS between processes, and write down what happened.

Each fault comes at random moments (seeded), many times; a reader process of its own judges what is on the wire. Every
repetition is a line of trials.jsonl as it ends: an interrupted run continues. Writes docs/evidence/live_faults.md.
Exit code 1 if a repetition was not as promised, or the control run, whose guard checks nothing, was not caught.

make chaos
python -m benchmarks.chaos --robot panda --repeat 20 --out outputs/chaos_panda --page /tmp/panda.md
python -m benchmarks.chaos --rows A1,A9 --repeat 2 --out /tmp/quick --page /tmp/quick/live_faults.md
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import shutil
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.chaos_faults import (
    ABSOLUTE,
    DOMAINS,
    GOAL,
    HELPERS,
    MARGIN,
    NEAR,
    PANDA_ROWS,
    ROWS,
    STAND,
    Expect,
    Row,
    Trial,
)
from benchmarks.chaos_page import failed, git, page, read_trials
from benchmarks.chaos_rig import ROOT, Rig, Void

PAGE = ROOT / "docs" / "evidence" / "live_faults.md"
TRIES = 4  # of a repetition whose arm did not move steadily before the fault: a busy machine


# --- one repetition


def bound_of(row: Row, expect: Expect) -> float:
    """Return by when a repetition must decelerate [s]; MuJoCo computes on the cores of what is judged: the goal's."""
    return max(expect.bound, GOAL[1]) if row.robots == ("panda",) else expect.bound


def judge(row: Row, expect: Expect, verdict: Mapping[str, Any], rig: Rig) -> dict[str, Any]:
    """Compare a verdict with what was promised; returns the repetition's numbers and its problems."""
    problems, bound = list(expect.problems), bound_of(row, expect)
    if verdict["non_finite"]:
        problems.append(f"{verdict['non_finite']} commands not finite")
    if verdict["violations"]:
        problems.append(f"outside the envelope: {verdict['violations']}")
    if (verdict["measured_outside"] and expect.honest) or verdict["warnings"]:
        problems.append(f"measured outside {verdict['measured_outside']}, warnings {verdict['warnings']}")
    nearest = verdict["clearance"]
    if nearest is not None and nearest["m"] < MARGIN:
        problems.append(f"{1e3 * nearest['m']:.1f} mm, {nearest['what']}")
    if expect.near and (nearest is None or nearest["m"] > NEAR):
        problems.append(f"it never came near: {nearest}")
    if verdict["executed_back"]:
        problems.append(f"{verdict['executed_back']} steps executed out of order")
    decel, still, state = verdict["decel_s"], verdict["still_s"], verdict["state"]
    begin = max(0.0, verdict["queue_s"] or 0.0) if expect.after_queue else 0.0  # of the condition
    decel = None if decel is None else decel - begin
    if expect.stop is False and (state is not None or decel is not None):
        problems.append(f"stopped without need: {state}")
    if expect.silent:
        decel, still = verdict["ended_s"], None
    if expect.stop:
        if decel is None:
            problems.append("no deceleration")
        elif decel > bound:
            problems.append(f"deceleration after {1e3 * decel:.0f} ms")
        if not expect.silent and (still is None or still - verdict["decel_s"] > STAND):
            problems.append(
                "no standstill" if still is None else f"standstill {still - verdict['decel_s']:.2f} s later"
            )
        if expect.latest is not None and verdict["decel_s"] is not None and verdict["decel_s"] > expect.latest:
            problems.append(f"deceleration {1e3 * verdict['decel_s']:.0f} ms after the injection")
    if (expect.stop or expect.held) and not set(verdict["states"]) & set(expect.state):
        problems.append(f"never {' or '.join(expect.state)}: {verdict['states']}")
    if expect.frozen is not None and (verdict["measured_still_s"] or 0.0) > expect.frozen:
        problems.append(f"the arm moved for {verdict['measured_still_s']:.3f} s")
    named = verdict["named"]["s"] if expect.names and verdict["named"] else None
    if expect.wall:
        if verdict["wall_s"] is None:
            problems.append("it never came to the wall")
        elif named is not None:
            named = max(0.0, named - verdict["wall_s"])
    if expect.names and (named is None or named > expect.named_in):
        problems.append("not named" if named is None else f"named after {named:.2f} s")
    return {
        "ok": not problems, "problems": problems, "stop": expect.stop, "bound_s": bound,
        "decel_s": decel if expect.stop is not False else None,
        "decel_from_injection_s": verdict["ended_s" if expect.silent else "decel_s"],
        "stand_s": None if still is None or verdict["decel_s"] is None else still - verdict["decel_s"],
        "speeds": verdict["speeds"] if problems else None, "state_s": state["s"] if state else None, "state": state,
        "reaction_s": state["s"] - begin if state and expect.stop else None,
        "fault_s": verdict["fault_s"], "measured_still_s": verdict["measured_still_s"] if expect.frozen else None,
        "named_s": named, "named_in": expect.named_in, "must_name": bool(expect.names),
        "text": verdict["named"]["text"] if expect.names and verdict["named"] else None,
        "commands": verdict["commands"], "details": verdict["details"],
        "violations": verdict["violations"], "non_finite": verdict["non_finite"],
        "speed": verdict["speed"], "extra": dict(expect.extra), "clearance": nearest, "note": expect.note,
    }  # fmt: skip


def repetition(row: Row, rig: Rig, k: int, seed: int) -> dict[str, Any]:
    """Play one repetition and return its record."""
    rng = np.random.default_rng([seed, zlib.crc32(row.id.encode()), k])
    variant = row.variants[k % len(row.variants)]
    helper = HELPERS.get(row.id)
    for name in set(HELPERS.values()) - {helper}:
        rig.end(name)  # the replayer also offers chunks: while it lives, a policy is never quite gone
    if helper and not rig.alive(helper):
        rig.start(helper)
        rig.spin(1.5)
    for attempt in range(TRIES):
        since = time.monotonic()
        with contextlib.suppress(Void) if rig.loss > 50 else contextlib.nullcontext():
            catch_up = 0.8 * (rig.robot in ABSOLUTE)
            rig.move(catch_up + float(rng.uniform(*row.phase)))
        trial = Trial(rig, variant, rng, since)
        expect = row.run(trial)
        verdict = rig.verdict(since, expect.t0, expect.names or "$^")
        steady = rig.loss > 50 or (verdict["speed"] or 0.0) > 0.1
        rig.clear()
        if steady or attempt == TRIES - 1:
            break
    result = judge(row, expect, verdict, rig)
    recover(rig)
    return {
        "row": row.id, "k": k, "seed": seed, "variant": variant, "loss": rig.loss, "control": rig.unsafe,
        **result, "voids": attempt,
    }  # fmt: skip


def recover(rig: Rig) -> None:
    """Bring the rig back to idle with the arm where it began, for the next repetition."""
    for name in ("twin", "policy", "guard"):
        if not rig.alive(name):
            rig.end(name)
            rig.start(name)
            rig.spin(1.0)
    rig.idle()
    rig.reset()
    rig.spin(0.1)


def run(rows: Sequence[Row], repeat: int, seed: int, work: Path, domain_id: int, control: bool) -> list[dict[str, Any]]:
    """Play what is missing of every row, and of the control run; one faulty row does not stop the others.

    Returns every trial of this seed in `work`, other rows' included: the page shows what was played there.
    """
    work.mkdir(parents=True, exist_ok=True)
    path = work / "trials.jsonl"
    records = read_trials(path)
    done = {(r["row"], r["k"], r["seed"], r["control"]) for r in records}
    todo = [(row, k, False) for row in rows for k in range(repeat)]
    todo += [(row, k, True) for row in rows if row.control and control for k in range(max(1, repeat // 4))]
    missing = [(row, k, unsafe) for row, k, unsafe in todo if (row.id, k, seed, unsafe) not in done]
    order = [row.id for row in rows]
    missing.sort(key=lambda item: (rig_key(*item), order.index(item[0].id), item[1]))
    with progress() as bar, path.open("a") as lines:
        task = bar.add_task("chaos", total=len(todo), completed=len(todo) - len(missing), text="")
        with Rigs(domain_id) as rigs:
            for row, k, unsafe in missing:
                record = attempt(rigs, row, k, unsafe, seed)
                record |= {"load": os.getloadavg()[0], "commit": git("rev-parse", "HEAD"), "time": time.time()}
                lines.write(json.dumps(record) + "\n")
                lines.flush()
                records.append(record)
                bar.update(
                    task, advance=1, text=f"{row.id} {'' if record['ok'] else '; '.join(record['problems'])[:80]}"
                )
    return [r for r in records if r["k"] < repeat and r["seed"] == seed]


def rig_key(row: Row, k: int, unsafe: bool) -> tuple[str, int, bool]:
    """Return which rig a repetition runs on."""
    return row.robots[k // len(row.variants) % len(row.robots)], row.loss[k % len(row.loss)], unsafe


def attempt(rigs: Rigs, row: Row, k: int, unsafe: bool, seed: int) -> dict[str, Any]:
    """Play a repetition; a rig that does not work is replaced, once."""
    for last in (False, True):
        try:
            return repetition(row, rigs.get(*rig_key(row, k, unsafe)), k, seed)
        except (TimeoutError, Void, queue.Empty, OSError) as e:
            rigs.close()
            if last:
                variant = row.variants[k % len(row.variants)]
                return {
                    "row": row.id, "k": k, "seed": seed, "variant": variant, "loss": row.loss[k % len(row.loss)],
                    "control": unsafe, "ok": False, "problems": [f"rig: {e}"],
                }  # fmt: skip
    raise AssertionError


class Rigs:
    """The rig of the moment; another kind replaces it."""

    def __init__(self, domain_id: int) -> None:
        self._domain_id, self._made = domain_id, 0
        self._rig: Rig | None = None
        self._key: Any = None

    def get(self, robot: str, loss: int, unsafe: bool) -> Rig:
        """Return a rig of a kind."""
        key = (robot, loss, unsafe)
        if self._rig is None or self._key != key:
            self.close()
            domain_id = self._domain_id + self._made % DOMAINS  # a killed rig is known to its domain for some seconds
            self._rig, self._key, self._made = Rig(domain_id, robot, loss, unsafe), key, self._made + 1
        return self._rig

    def close(self) -> None:
        """End the rig."""
        if self._rig is not None:
            self._rig.close()
            self._rig = None

    def __enter__(self) -> Rigs:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def progress() -> Progress:
    """Return the bar: what was played last, how many, how long it will take."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[text]}"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the table and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = {**ROWS, **PANDA_ROWS}
    parser.add_argument("--rows", default="", help=f"comma-separated, of {', '.join(every)}; default: all of --robot")
    parser.add_argument(
        "--robot", choices=("light", "panda", "all"), default="light",
        help="panda: rows that end in p, in MuJoCo; needs the robosuite extra",
    )  # fmt: skip
    parser.add_argument("--repeat", type=int, default=20, help="of every row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--domain-id", type=int, default=60, help=f"the first of {DOMAINS}")
    parser.add_argument("--no-control", action="store_true", help="leave out the run with the guard's checks off")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "chaos", help="keeps trials.jsonl")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--overwrite", action="store_true", help="forget the trials first")
    args = parser.parse_args(arguments)
    unknown = [name for name in args.rows.split(",") if name and name not in every]
    if unknown:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(every)}")
    of = {"light": ROWS, "panda": PANDA_ROWS, "all": every}[args.robot]
    rows = [every[name] for name in args.rows.split(",") if name] or list(of.values())
    if args.overwrite:
        shutil.rmtree(args.out, ignore_errors=True)
    command = (
        f"make chaos ({args.robot} rows, {args.repeat} times each)"
        if not args.rows
        else f"rows {args.rows}, {args.repeat} times each"
    )
    records = run(rows, args.repeat, args.seed, args.out, args.domain_id, not args.no_control)
    args.page.parent.mkdir(parents=True, exist_ok=True)
    args.page.write_text(page(list(every.values()), records, command, args.seed))
    wanted = {row.id for row in rows}
    records = [r for r in records if r["row"] in wanted]
    lines = failed(records)
    print("\n".join([*lines[:40], f"{len(records)} repetitions, {len(lines)} not as promised; {args.page}"]))
    return 1 if lines else 0


if __name__ == "__main__":
    raise SystemExit(main())
