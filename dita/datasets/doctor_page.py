"""What the doctor found, as one HTML page that stands alone: a table of all findings, plots and frames of some."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from dita.datasets.doctor import FAULTS, Diagnosis, Finding, dims
from dita.datasets.store import Store
from dita.page import BLUE, GREEN, ORANGE, RC, Draw, escape, grid, plot, section, strip, table, write_page

MAX_ROWS = 300  # findings listed; doctor.json has all of them
MAX_EPISODES = 24  # shown with plots and frames: every code in turn, errors first
PLOTS = 4  # per episode
STRIP_FRAMES = 6
STRIP_WIDTH = 240  # [px] of a shown frame, about


def write_doctor_page(target: Path, diagnosis: Diagnosis, stores: Sequence[Store]) -> None:
    """Write the page; frames are read from the stores."""
    sections = [_headline(diagnosis), _counts(diagnosis), _stores(diagnosis), _list(diagnosis)]
    with matplotlib.rc_context(RC):
        shown = [_episode(store, number, mine) for store, number, mine in _chosen(diagnosis, stores)]
    if shown:
        sections.append(section("Episodes with findings, errors first", *shown))
    names = ", ".join(s.name for s in stores)
    write_page(target, f"Dita doctor: {names}", "\n".join(sections))


def _headline(d: Diagnosis) -> str:
    episodes, errors = sum(s.episodes for s in d.stores), sum(f.severity == "error" for f in d.findings)
    tiles = (
        ("episodes", str(episodes), f"{sum(s.frames for s in d.stores)} frames"),
        ("errors", str(errors), "their episodes are left out by filter.json"),
        ("warnings", str(len(d.findings) - errors), "to look at"),
        ("left out", f"{d.left_out} / {episodes}", "episodes"),
    )
    cells = "".join(
        f"<div><small>{escape(what)}</small><strong>{escape(value)}</strong><span>{escape(note)}</span></div>"
        for what, value, note in tiles
    )
    names = ", ".join(s.path for s in d.stores)
    return f'<header><h1>Dita doctor</h1><p>{escape(names)}</p></header><div class="tiles">{cells}</div>'


def _counts(d: Diagnosis) -> str:
    if not d.counts:
        return section("Findings", "<p>None.</p>")
    rows = [[code, FAULTS[code[2:]].title, str(n), FAULTS[code[2:]].advice] for code, n in d.counts.items()]
    return section("Findings", table(("code", "fault", "findings", "what to do"), rows))


def _stores(d: Diagnosis) -> str:
    rows = [
        [s.path, s.embodiment, str(s.episodes), str(s.frames), f"{s.control_hz:g}",
         "cannot be told" if s.lag_s is None else f"{s.lag_s:.3f}",
         ", ".join(f"{name} {rate:.1%}" for name, rate in s.clip_rate.items())]
        for s in d.stores
    ]  # fmt: skip
    head = ("store", "embodiment", "episodes", "frames", "rate [Hz]", "motion behind action [s]", "outside q01..q99")
    return section("Stores", table(head, rows))


def _list(d: Diagnosis) -> str:
    if not d.findings:
        return ""
    rows = [
        [f.code, Path(f.store).name, "all" if f.episode is None else f"{f.episode}: {f.source}", f.where,
         "" if f.first_frame is None else str(f.first_frame), f"{f.share:.1%}", f.what]
        for f in sorted(d.findings, key=lambda f: f.severity)[:MAX_ROWS]
    ]  # fmt: skip
    more = (
        f"<p>The first {MAX_ROWS} of {len(d.findings)}; doctor.json has all.</p>" if len(d.findings) > MAX_ROWS else ""
    )
    head = ("code", "store", "episode", "where", "from frame", "share", "what")
    return section("All findings", table(head, rows), more)


def _chosen(d: Diagnosis, stores: Sequence[Store]) -> list[tuple[Store, int, list[Finding]]]:
    """Choose episodes so that each code is shown before any is shown twice."""
    by_path = {str(s.path): s for s in stores}
    by_code: dict[str, list[tuple[str, int]]] = {}
    for f in sorted(d.findings, key=lambda f: f.severity):
        if f.episode is not None:
            by_code.setdefault(f.code, []).append((f.store, f.episode))
    chosen: dict[tuple[str, int], None] = {}
    for turn in range(max(map(len, by_code.values()), default=0)):
        chosen |= dict.fromkeys(places[turn] for places in by_code.values() if turn < len(places))
    return [
        (by_path[path], number, [f for f in d.findings if (f.store, f.episode) == (path, number)])
        for path, number in list(chosen)[:MAX_EPISODES]
    ]


def _episode(store: Store, number: int, findings: Sequence[Finding]) -> str:
    spec, stamp = store.episodes[number], store.stamp(number)
    lines = "".join(
        f"<li>{escape(f'{f.code}, {f.where}, from frame {f.first_frame}, {f.share:.1%} of the frames: {f.what}')}</li>"
        for f in findings
    )
    signals = _signals(store, number)
    names = list(dict.fromkeys(name for f in findings for name in _about(f, list(signals))))[:PLOTS]
    plots = [plot("time [s]", name, _draw(signals[name], stamp, name, findings), height=1.7) for name in names]
    title = f'{store.name}, episode {number}: {spec.source}, "{spec.instruction}"'
    kind = "failure" if any(f.severity == "error" for f in findings) else "success"
    pictures = _pictures(store, number, findings)
    return f'<article class="{kind}"><h3>{escape(title)}</h3><ul>{lines}</ul>{grid(plots)}{pictures}</article>'


def _signals(store: Store, number: int) -> dict[str, tuple[np.ndarray, float, float]]:
    """Return name -> (values over frames, low, high) of everything that can be plotted."""
    arrays = (("state", store.spec.state, store.state(number)), ("action", store.spec.action, store.action(number)))
    signals = {
        f"{dim.name} [{field.unit}]": (values[:, dim.index], field.low[dim.offset], field.high[dim.offset])
        for group, fields, values in arrays
        for field, dim in dims(fields, group)
    }
    step = 1e3 * np.diff(store.stamp(number), prepend=np.nan)
    return signals | {"stamp: time since the frame before [ms]": (step, np.nan, np.nan)}


def _about(f: Finding, names: Sequence[str]) -> list[str]:
    """Choose the signals that show a finding."""
    if f.where == "state and action":
        return [name for group in ("state.", "action.") for name in names if name.startswith(group)][:2]
    mine = [name for name in names if name.startswith((f"{f.where} [", f"{f.where}[", f"{f.where}:", f"{f.where}."))]
    grippers = [name for name in names if f.code.endswith("POLARITY") and "gripper" in name]
    return [*mine[:2], *grippers] if not f.where.startswith("camera") else []


def _draw(signal: tuple[np.ndarray, float, float], stamp: np.ndarray, name: str, findings: Sequence[Finding]) -> Draw:
    values, low, high = signal

    def draw(ax: Axes) -> None:
        time = stamp - stamp[0]
        ax.plot(time, values, color=BLUE, linewidth=1.2)
        for f in findings:
            if f.first_frame is not None and name in _about(f, [name]):
                ax.axvline(time[f.first_frame], color=ORANGE, linestyle="--", linewidth=1)
        if np.any((values < low) | (values > high)):
            ax.axhline(low, color=GREEN, linestyle=":")
            ax.axhline(high, color=GREEN, linestyle=":")

    return draw


def _pictures(store: Store, number: int, findings: Sequence[Finding]) -> str:
    """Show the frames around each camera finding, or else some of the whole episode."""
    length, stamp = store.length(number), store.stamp(number)
    parts = []
    for camera in store.spec.cameras:
        mine = [f.first_frame for f in findings if f.where == f"camera {camera.name}" and f.first_frame is not None]
        if mine:
            first = max(0, min(mine[0] - 2, length - STRIP_FRAMES))
            shown = list(range(first, min(first + STRIP_FRAMES, length)))
        elif not parts:
            shown = sorted({round(x) for x in np.linspace(0, length - 1, STRIP_FRAMES)})
        else:
            continue
        step = max(1, camera.width // STRIP_WIDTH)
        frames = [f[::step, ::step] for f in store.read_frames(number, camera.name, shown)]
        parts.append(strip(frames, [f"{camera.name}, frame {i}, {stamp[i] - stamp[0]:.2f} s" for i in shown]))
    return "".join(parts)
