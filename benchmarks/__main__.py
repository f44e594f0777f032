"""Run benchmark rows; see `benchmarks.harness`."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

# waiting OpenMP threads that spin would slow down whatever is measured next to them
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from benchmarks import harness
from benchmarks.rows import ROWS


def main(argv: list[str] | None = None) -> int:
    """Run what is asked for, keep the JSON and rewrite the README's table; return 0, or 1 if a row broke."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=harness.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"which rows (all): {', '.join(ROWS)}")
    parser.add_argument("--tier", choices=["full", "quick"], default="full")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the JSON")
    parser.add_argument("--table", action="store_true", help="run nothing, rewrite the README's table")
    args = parser.parse_args(argv)
    if unknown := [row for row in args.rows if row not in ROWS]:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(ROWS)}")
    broken = False
    for row in [] if args.table else args.rows or list(ROWS):
        began = time.perf_counter()
        try:
            cases = ROWS[row](args.tier)
        except Exception as e:  # the other rows are worth having; this one is said and fails the command
            print(f"{row}: {type(e).__name__}: {e}", file=sys.stderr)
            broken = True
            continue
        harness.save(row, args.tier, cases, time.perf_counter() - began, args.out)
        harness.print_cases(row, cases)
    if args.out == harness.RESULTS and args.tier == "full":
        harness.write_readme()
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
