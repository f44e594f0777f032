"""Damaged samples that training leaves out instead of stopping: few, named as they are met, listed at the end.

A window whose pictures cannot be read stays in its batch and counts for nothing: no step of it is valid, so the loss is
the mean over the others. Nothing takes its place, and a resumed run leaves out the same ones.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dita.train_log import warn

SHOWN = 20  # lines at the end; the file has all
Place = tuple[str, int, int]  # store, episode, frame


class Quarantine:
    """What a run left out, the same on every rank; rank 0 writes RUN/quarantine.jsonl."""

    def __init__(self, path: Path, windows: int, share: float, known: Sequence[dict[str, Any]], first: bool) -> None:
        """Go on with what was left out before.

        Args:
            path: of the list.
            windows: that are trained on.
            share: of them that may be left out.
            known: lines of the list, of before the step that is continued from.
            first: whether this rank writes and speaks.
        """
        self.path, self.windows, self.share, self.first = path, windows, share, first
        self.lines = {_place(line): line for line in known}

    def leave_out(self, step: int, name: dict[str, Any], why: Callable[[], str]) -> None:
        """Take in a sample of a step.

        Args:
            step: that it was drawn for.
            name: its store, episode and frame.
            why: reads it again, for what is wrong with it; called on rank 0, once per sample.

        Raises:
            ValueError: more are damaged than may be left out.
        """
        if _place(name) in self.lines:
            return
        line = self.lines[_place(name)] = {"step": step, **name}
        if self.first:
            line["why"] = why()
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            warn(f"step {step}: left out as damaged ({len(self.lines)} of {self.windows} samples): {line['why']}")
        if len(self.lines) > self.share * self.windows:
            raise ValueError(
                f"{len(self.lines)} of {self.windows} samples are damaged, more than data.quarantine={self.share:g} "
                f"lets training leave out; {self.path} lists them: restore the store, or leave their episodes out with "
                f"a filter; the last: {line.get('why') or name}"
            )

    def report(self) -> None:
        """Say at the end of a run what it left out, since it began."""
        if not self.lines or not self.first:
            return
        shown = [line["why"] for line in self.lines.values()][:SHOWN]
        more = f"\n  and {len(self.lines) - SHOWN} more" if len(self.lines) > SHOWN else ""
        share = len(self.lines) / self.windows
        warn(f"{len(self.lines)} of {self.windows} samples ({share:.3%}) were left out as damaged, see {self.path}:\n  "
             + "\n  ".join(shown) + more)  # fmt: skip


def read_quarantine(path: Path, before: int) -> list[dict[str, Any]]:
    """Return the lines of the steps before one, and forget the others: they will be met again."""
    if not path.exists():
        return []
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    kept = [line for line in lines if json.loads(line)["step"] < before]
    path.write_text("".join(kept))
    return [json.loads(line) for line in kept]


def _place(line: dict[str, Any]) -> Place:
    return line["store"], line["episode"], line["frame"]
