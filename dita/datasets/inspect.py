"""What a store holds: as JSON, as a table, as a contact sheet; and a check of every byte."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dita.datasets.segments import staged_episodes
from dita.datasets.store import Store
from dita.embodiment import slices
from dita.types import FieldSpec

SHEET_ROWS_PER_INSTRUCTION = 3
SHEET_COLUMNS = 8


def inspect_command(path: str, verify: bool, as_json: bool, sheet: str | None) -> None:
    """Run `dita inspect`.

    Raises:
        FileNotFoundError: nothing is at `path`.
        ValueError: it is no store, or it is damaged (StoreError; with `verify`, any byte of it).
    """
    store = Store(path)
    if verify:
        verify_store(store)
    info = inspect(store) | {"verified": verify}
    if sheet is not None:
        contact_sheet(store, sheet)
    if as_json:
        print(json.dumps(info, indent=2))
    else:
        print_table(info)
        if sheet is not None:
            Console().print(f"frames of sampled episodes: {sheet}")


def inspect(store: Store) -> dict[str, Any]:
    """Describe a store in plain JSON values; units and ranges are SI."""
    spec = store.spec
    episodes = range(len(store.episodes))
    state = [store.state(i) for i in episodes]
    action = [store.action(i) for i in episodes]
    return {
        "path": str(store.path),
        "format_version": store.attributes["format_version"],
        "source": store.attributes["source"],
        "licence": store.attributes["licence"],
        "codecs": list(store.codecs),
        "segments": list(store.segments),
        "staged_unsealed": len(staged_episodes(store.files)),
        "embodiment": spec.name,
        "robot": spec.robot,
        "fps": spec.control_hz,
        "fps_measured": 1
        / float(np.median(np.concatenate([[store.dt], *(np.diff(store.stamp(i)) for i in episodes)]))),
        "episodes": len(episodes),
        "frames": sum(store.length(i) for i in episodes),
        "frames_per_episode": [store.length(i) for i in episodes],
        "successes": sum(e.success is True for e in store.episodes),
        "success_unknown": sum(e.success is None for e in store.episodes),
        "instructions": dict(Counter(e.instruction for e in store.episodes)),
        "cameras": [{"name": c.name, "height": c.height, "width": c.width} for c in spec.cameras],
        "state": _describe(spec.state, state),
        "action": _describe(spec.action, action),
        "sources": [e.source for e in store.episodes],
        "instruction_by_episode": [e.instruction for e in store.episodes],
        "success_by_episode": [e.success for e in store.episodes],
        "action_sum": [a.sum(0, dtype=np.float64).tolist() for a in action],
        "action_first": [a[0].tolist() for a in action],
        "action_last": [a[-1].tolist() for a in action],
        "frame_sha256": {
            c.name: [{"first": _hash(store, i, c.name, 0), "last": _hash(store, i, c.name, -1)} for i in episodes]
            for c in spec.cameras
        },
    }


def print_table(info: dict[str, Any], console: Console | None = None) -> None:
    """Print what `inspect` found, for people."""
    console = console or Console()
    lengths = info["frames_per_episode"]
    unknown = f", {info['success_unknown']} unknown" if info["success_unknown"] else ""
    facts = {
        "store": f"{info['path']} (format {info['format_version']}, {', '.join(info['codecs'])} images)",
        "embodiment": f"{info['embodiment']}: {info['robot']}",
        "source": f"{info['source']} ({info['licence']})",
        "episodes": f"{info['episodes']}, {info['successes']} successful{unknown}",
        "frames": f"{info['frames']}; {min(lengths)} to {max(lengths)} per episode, median {np.median(lengths):.0f}",
        "rate": f"{info['fps']:g} Hz declared, {info['fps_measured']:.4g} Hz by the stamps",
        "cameras": ", ".join(f"{c['name']} {c['width']} x {c['height']}" for c in info["cameras"]),
        "segments": ", ".join(info["segments"]),
        "checked": "every byte" if info.get("verified") else "sizes and manifests (--verify checks every byte)",
    }
    if info["staged_unsealed"]:
        facts["unsealed"] = (
            f"{info['staged_unsealed']} staged episodes wait for sealing: rerun the writer with --resume"
        )
    overview = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for key, value in facts.items():
        overview.add_row(f"[bold]{key}", value)
    console.print(overview)

    fields = _table("field", "unit", "mode", "observed", "limits")
    for group in ("state", "action"):
        for f in info[group]:
            for d in range(f["size"]):
                fields.add_row(
                    f"{group}.{f['name']}" + (f"\\[{d}]" if f["size"] > 1 else ""),
                    f["unit"],
                    f["mode"],
                    f"{f['min'][d]:.4g} .. {f['max'][d]:.4g}",
                    f"{f['low'][d]:g} .. {f['high'][d]:g}",
                )
    console.print("", fields)

    instructions = _table("instruction", "episodes")
    for instruction, count in info["instructions"].items():
        instructions.add_row(instruction, str(count))
    console.print("", instructions)


def contact_sheet(store: Store, path: str | Path) -> None:
    """Write a PNG: for each instruction some episodes, one row per episode and camera, frames over time."""
    from matplotlib.figure import Figure

    rows = [(e, c) for e in _sampled_episodes(store) for c in store.spec.cameras]
    shape = max(c.height / c.width for c in store.spec.cameras)
    figure = Figure(figsize=(1.5 * SHEET_COLUMNS, (1.5 * shape + 0.45) * len(rows)), dpi=100, layout="constrained")
    axes = figure.subplots(len(rows), SHEET_COLUMNS, squeeze=False)
    for row, (episode, camera) in zip(axes, rows, strict=True):
        spec = store.episodes[episode]
        steps = np.linspace(0, store.length(episode) - 1, SHEET_COLUMNS).round().astype(int).tolist()
        stamps = store.stamp(episode)
        for ax, step, frame in zip(row, steps, store.read_frames(episode, camera.name, steps), strict=True):
            ax.imshow(frame)
            ax.set(xticks=[], yticks=[])
            ax.set_xlabel(f"{stamps[step] - stamps[0]:.2f} s", fontsize=7, labelpad=1, color="gray")
        outcome = {True: "success", False: "failure", None: "outcome unknown"}[spec.success]
        text = f'{episode}: "{spec.instruction}", {camera.name}, {outcome}'
        row[0].set_title(text, fontsize=8, pad=2, loc="left")
    figure.savefig(path)


def verify_store(store: Store) -> int:
    """Check every byte with a progress bar on stderr; return how many; raise as `Store.verify`."""
    columns = (TextColumn("verify"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("verify")
        return store.verify(lambda done, total: bar.update(task, completed=done, total=total))


def _table(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold underline")
    for column in columns:
        table.add_column(column)
    return table


def _sampled_episodes(store: Store) -> list[int]:
    by_instruction: dict[str, list[int]] = {}
    for i, e in enumerate(store.episodes):
        by_instruction.setdefault(e.instruction, []).append(i)
    chosen: list[int] = []
    for numbers in by_instruction.values():
        picks = np.linspace(0, len(numbers) - 1, min(len(numbers), SHEET_ROWS_PER_INSTRUCTION)).round().astype(int)
        chosen += [numbers[p] for p in picks.tolist()]
    return chosen


def _describe(fields: tuple[FieldSpec, ...], episodes: list[np.ndarray]) -> list[dict[str, Any]]:
    low = np.min([e.min(0) for e in episodes], axis=0)
    high = np.max([e.max(0) for e in episodes], axis=0)
    return [
        {
            "name": f.name,
            "kind": f.kind,
            "size": f.size,
            "unit": f.unit,
            "frame": f.frame,
            "mode": f.mode,
            "reference": f.reference,
            "scale": f.scale,  # stored value = scale * the source's own
            "min": low[here].tolist(),
            "max": high[here].tolist(),
            "low": list(f.low),
            "high": list(f.high),
        }
        for f, here, _ in slices(fields)
    ]


def _hash(store: Store, episode: int, camera: str, frame: int) -> str:
    index = frame % store.length(episode)
    return hashlib.sha256(store.read_frames(episode, camera, [index])[0].data).hexdigest()
