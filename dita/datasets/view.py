"""Episodes in Rerun: images, state and action by field, on the episodes' own stamps."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dita.datasets.store import Store
from dita.embodiment import slices

DEFAULT_EPISODES = 10
BLOCK = 32  # frames of one camera in memory
JPEG_QUALITY = 90  # of what the viewer shows; raw frames would fill its memory


def view_command(path: str, out: str | None, episodes: Sequence[int] | None) -> None:
    """Run `dita inspect --view`: open the viewer, or write an .rrd file.

    Raises:
        ImportError: rerun-sdk is not installed.
        FileNotFoundError: there is no store.
        ValueError: no such episode, or the store is damaged.
    """
    rerun, store = import_rerun(), Store(path)
    known = range(len(store.episodes))
    chosen = list(known[:DEFAULT_EPISODES] if episodes is None else dict.fromkeys(episodes))
    if wrong := [e for e in chosen if e not in known]:
        raise ValueError(f"{path} has episodes 0..{len(known) - 1}, asked for {', '.join(map(str, wrong))}")
    recording = rerun.RecordingStream("dita")
    if out is None:
        recording.spawn()
    else:
        recording.save(out)
    columns = (TextColumn("episodes"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        for number in bar.track(chosen):
            log_episode(rerun, recording, store, number)
    recording.flush()
    recording.disconnect()
    more = f" of {len(known)}; choose with --episodes" if len(chosen) < len(known) else ""
    print(f"{len(chosen)} episodes{more}: {out or 'in the viewer'}")


def log_episode(rerun: ModuleType, recording: Any, store: Store, number: int) -> None:
    """Log one episode below `episode_<number>`; timelines are its `stamp` [s] and its `frame`."""
    spec, root, stamp = store.episodes[number], f"episode_{number:05d}", store.stamp(number)
    outcome = {True: "success", False: "failure", None: "outcome unknown"}[spec.success]
    text = f"{spec.instruction}\n\n{outcome}; source {spec.source}; {len(stamp)} frames; {store.spec.robot}"
    recording.log(f"{root}/about", rerun.TextDocument(text), static=True)
    times = [rerun.TimeColumn("stamp", duration=stamp), rerun.TimeColumn("frame", sequence=np.arange(len(stamp)))]
    for group, fields, values in (
        ("state", store.spec.state, store.state(number)),
        ("action", store.spec.action, store.action(number)),
    ):
        for field, here, _ in slices(fields):
            at = f"{root}/{group}/{field.name}"
            names = [f"{field.name}[{i}] [{field.unit}]" for i in range(field.size)]
            recording.log(at, rerun.SeriesLines(names=names), static=True)
            scalars = rerun.Scalars.columns(scalars=values[:, here].astype(np.float64))
            recording.send_columns(at, times, scalars)
    for camera in store.spec.cameras:
        for start in range(0, len(stamp), BLOCK):
            frames = range(start, min(start + BLOCK, len(stamp)))
            for i, picture in zip(frames, store.read_frames(number, camera.name, frames), strict=True):
                recording.set_time("stamp", duration=stamp[i])
                recording.set_time("frame", sequence=i)
                image = rerun.Image(picture).compress(jpeg_quality=JPEG_QUALITY)
                recording.log(f"{root}/images/{camera.name}", image)


def import_rerun() -> ModuleType:
    """Import rerun-sdk; raise ImportError saying how to get it."""
    try:
        import rerun  # pyright: ignore
    except ImportError:
        raise ImportError("--view needs rerun-sdk: pip install 'dita[view]'") from None
    return rerun
