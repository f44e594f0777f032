"""Damage stores in every way of the fault table and write down what was noticed; seeded, and continues when stopped.

Writes docs/evidence/store_faults.md and the JSON behind it. Exit code 1 if anything was silent or lost.

make evidence-store
python benchmarks/store_faults.py --kills 20 --flips 40 --out /tmp/quick
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from rich.progress import track
from zarr.errors import ZarrUserWarning

import dita.datasets.jpeg  # noqa: F401  lets zarr-python read codec=jpeg
from dita.datasets.shards import INDEX_BYTES, MISSING
from dita.datasets.store import Store, StoreError
from dita.datasets.writer import StoreWriter
from dita.embodiment import embodiment_from_dict
from dita.types import CameraSpec, Episode

PAGE = Path(__file__).parent.parent / "docs" / "evidence"
LENGTHS = (150, 1, 200, 90)  # two shards per camera; the second begins inside an episode
KILLED = tuple(range(20, 28))  # lengths of the episodes that killed writers write
CALLS = ("fsync", "rename", "unlink", "rmdir", "mkdir", "open")  # what a writer does to the disk through `os`
REGIONS = ("chunks", "shard index", "metadata", "manifest")


def field(name: str, kind: str, size: int, slot: int) -> dict[str, Any]:
    """Return one absolute field of an embodiment."""
    return {
        "name": name, "kind": kind, "size": size, "unit": "m", "frame": "base", "mode": "absolute", "reference": None,
        "scale": 1.0, "slot": slot, "low": [-1.0] * size, "high": [1.0] * size,
    }  # fmt: skip


SPEC = embodiment_from_dict({
    "name": "arm", "robot": "no real arm", "limits": None, "obs_dt": 0.1, "action_dt": 0.1, "control_hz": 10.0,
    "state": [field("hand", "ee_position", 3, 0), field("grip", "gripper_position", 1, 9)],
    "action": [field("hand", "ee_position", 3, 0), field("grip", "gripper_position", 1, 6)],
    "cameras": [{"name": f"cam{i}", "height": 8, "width": 8, "slot": i} for i in range(2)],
})  # fmt: skip


def make_episode(number: int, length: int) -> Episode:
    """Return an episode that depends on its arguments only."""
    rng = np.random.default_rng([number, length])
    return Episode(
        images={c.name: rng.integers(0, 256, (length, c.height, c.width, 3), np.uint8) for c in SPEC.cameras},
        state=rng.uniform(-1, 1, (length, 4)).astype(np.float32),
        action=rng.uniform(-1, 1, (length, 4)).astype(np.float32),
        stamp=np.arange(length) / SPEC.control_hz,
        instruction="press the button",
        success=True,
        source=f"{number:03d}",
    )


def writer(path: Path, **changes: Any) -> StoreWriter:
    """Create or continue a store."""
    return StoreWriter.create(path, SPEC, source="faults", licence="CC0-1.0", exist="resume", **changes)


def make_store(path: Path, lengths: tuple[int, ...] = LENGTHS, codec: str = "raw") -> None:
    """Write a sealed store."""
    with writer(path, codec=codec) as store:
        for number, length in enumerate(lengths):
            store.add(make_episode(number, length))


def content(store: Store) -> dict[str, tuple[bytes, ...]]:
    """Return every byte of every episode by its source, through the checked reader."""
    return {
        e.source: (
            *(store.read_frames(i, c.name, range(store.length(i))).tobytes() for c in store.spec.cameras),
            *(getattr(store, name)(i).tobytes() for name in ("state", "action", "stamp")),
        )
        for i, e in enumerate(store.episodes)
    }


def expected(lengths: tuple[int, ...]) -> dict[str, tuple[bytes, ...]]:
    """Return what `content` gives for a raw store of `lengths`."""
    episodes = [make_episode(i, n) for i, n in enumerate(lengths)]
    return {
        e.source: (*(a.tobytes() for a in e.images.values()), e.state.tobytes(), e.action.tobytes(), e.stamp.tobytes())
        for e in episodes
    }


# --- C1: kills


def write_and_report(path: Path, pipe: int, kill_at: int) -> None:
    """Write two segments, telling each finished step and the disk calls so far; die at call `kill_at` (0: never)."""
    calls = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return run

    def tell(what: str) -> None:
        os.write(pipe, f"{what} {calls}\n".encode())

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    with writer(path) as store:
        for number, length in enumerate(KILLED):
            store.add(make_episode(number, length))
            tell(f"{number:03d}")
            if number == len(KILLED) // 2:
                tell("sealing")
                store.seal()
                tell("adding")
        tell("sealing")
    tell("end")


def run_killed(
    path: Path, kill_at: int = 0, wait: int = 0, delay: float | None = None
) -> tuple[list[str], list[float]]:
    """Run a writer in a child until its end, its disk call `kill_at`, or `delay` after its line `wait`.

    Forked, since starting Python takes longer than the writing; this process has no threads that could be lost.
    Return the lines it told, and the times of its start and of each line.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            write_and_report(path, write, kill_at)
        os._exit(0)
    os.close(write)
    lines, times = [], [time.perf_counter()]
    with os.fdopen(read) as pipe:
        while delay is None or len(lines) < wait:
            if not (line := pipe.readline()):
                break
            lines.append(line)
            times.append(time.perf_counter())
        if delay is not None:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        lines += pipe.readlines()
    os.waitpid(child, 0)
    return lines, times


@dataclasses.dataclass(frozen=True)
class Step:
    """What an undisturbed writer did between two lines."""

    phase: str
    line: int  # number of lines told before
    calls: tuple[int, int]  # first and last disk call
    seconds: float


def steps_of(lines: list[str], times: list[float]) -> list[Step]:
    """Cut an undisturbed run into steps."""
    steps, phase = [], "adding"
    for i, line in enumerate(lines):
        calls = (int(lines[i - 1].split()[1]) + 1 if i else 1, int(line.split()[1]))
        if calls[0] <= calls[1]:
            steps.append(Step(phase, i, calls, times[i + 1] - times[i]))
        if line.split()[0] in ("adding", "sealing"):
            phase = line.split()[0]
    return steps


def kill_case(case: int, steps: list[Step], folder: Path) -> dict[str, Any]:
    """Kill one writer, look at what is left, and let a second one finish the work."""
    path = folder / "s.zarr"
    rng = np.random.default_rng([case, 1])
    by_call, phase = case % 2 == 0, ("adding", "sealing")[case // 2 % 2]
    mine = [s for s in steps if s.phase == phase]
    while True:  # a clock that came after the end killed nobody
        step = mine[int(rng.integers(len(mine)))]
        if by_call:
            lines, _ = run_killed(path, kill_at=int(rng.integers(step.calls[0], step.calls[1] + 1)))
        else:
            lines, _ = run_killed(path, wait=step.line, delay=float(rng.uniform(0, step.seconds)))
        if not lines or not lines[-1].startswith("end"):
            break
        fresh(folder)
    told = "".join(re.sub(r" \d+$", "", line, flags=re.MULTILINE) for line in lines)
    phase = (["adding", *re.findall(r"^(adding|sealing)", told, re.MULTILINE)])[-1]
    acknowledged = set(re.findall(r"^\d{3}$", told, re.MULTILINE))
    want = expected(KILLED)
    sealed = 0
    try:
        store = Store(path)
        store.verify()
        found = content(store)
        sealed = len(found)
        intact = all(want[source] == data for source, data in found.items())
    except FileNotFoundError:
        intact = not path.exists() and not acknowledged
    except StoreError as e:
        begun = e.code == "E_SCHEMA" and not acknowledged  # killed while the store was created
        intact = e.code == "E_UNSEALED" or begun
    leftovers = [p for p in path.glob("staging/*/*.partial")]
    leftovers += [
        p for p in path.glob("segments/*") if p.is_dir() and not p.with_name(f"{p.name}.sealed.json").exists()
    ]
    with writer(path) as again:
        kept = acknowledged <= again.sources()
        reported = all(any(p.stem in line for line in again.cleaned) for p in leftovers)
        for number, length in enumerate(KILLED):
            if f"{number:03d}" not in again.sources():
                again.add(make_episode(number, length))
    store = Store(path)
    store.verify()
    tidy = sorted(p.name for p in path.iterdir()) == ["segments", "zarr.json"] and not list(path.rglob("*.partial"))
    ok = intact and kept and reported and tidy and content(store) == want
    return {
        "ok": ok, "phase": phase, "by": "call" if by_call else "clock",
        "acknowledged": len(acknowledged), "sealed": sealed, "reported": len(leftovers),
    }  # fmt: skip


# --- C3: bit flips


def files_of(path: Path, region: str) -> list[tuple[Path, int, int]]:
    """Return (file, first byte, end) of every part of a store that a region means."""
    shards = [p for p in sorted(path.rglob("*")) if p.is_file() and "/c/" in str(p)]
    if region == "chunks":
        return [(p, 0, p.stat().st_size - INDEX_BYTES) for p in shards]
    if region == "shard index":
        return [(p, p.stat().st_size - INDEX_BYTES, p.stat().st_size) for p in shards]
    name = "zarr.json" if region == "metadata" else "*.sealed.json"
    return [(p, 0, p.stat().st_size) for p in sorted(path.rglob(name))]


def flip_case(case: int, path: Path, codec: str, want: dict[str, tuple[bytes, ...]]) -> dict[str, Any]:
    """Flip one bit and say at which step it was noticed, and whether the file was named."""
    rng = np.random.default_rng([case, 2])
    region = REGIONS[case % len(REGIONS)]
    parts = files_of(path, region)
    file, first, stop = parts[case // len(REGIONS) % len(parts)]
    position, bit = int(rng.integers(first, stop)), int(rng.integers(8))
    original = file.read_bytes()
    flipped = bytearray(original)
    flipped[position] ^= 1 << bit
    file.write_bytes(flipped)
    step, error, wrong = "opening", None, False
    try:
        store = Store(path)
        step = "reading"
        wrong = content(store) != want
        step = "verify"
        store.verify()
        step = "never"
    except StoreError as e:
        error = e
    finally:
        file.write_bytes(original)
    named = error is not None and str(file) in str(error)
    return {
        "ok": named and not wrong, "codec": codec, "region": region, "noticed": step, "wrong_bytes": wrong,
        "code": error.code if error else None, "file": str(file.relative_to(path)), "position": position, "bit": bit,
    }  # fmt: skip


# --- the other rows


def row(code: str, attempt: Callable[[], object], *words: str) -> dict[str, Any]:
    """Say whether an attempt is refused with a code in one line that holds all words."""
    try:
        attempt()
        line = "no error"
    except (ValueError, OSError) as e:
        line = str(e)
    ok = line.startswith(f"{code}:") and "\n" not in line and all(word in line for word in words)
    return {"ok": ok, "code": code, "line": line}


SHARD = "segments/main-0000/images/cam1/c/1/0/0/0"


def missing_chunk(path: Path) -> dict[str, Any]:
    """C2: the chunk is gone from the index, and the index is consistent: what zarr-python reads as zeros."""
    make_store(path)
    data = bytearray((path / SHARD).read_bytes())
    slot = len(data) - INDEX_BYTES + 16 * 10  # frame 266 of the segment: frame 115 of the third episode
    data[slot : slot + 16] = struct.pack("<QQ", MISSING, MISSING)
    data[-4:] = struct.pack("<I", google_crc32c.value(bytes(data[-INDEX_BYTES:-4])))
    (path / SHARD).write_bytes(data)
    plain: Any = zarr.open_group(path, mode="r")["segments/main-0000/images/cam1"]
    found = row("E_CHUNK_MISSING", lambda: Store(path).read_frames(2, "cam1", [115]), SHARD, "episode 2", "frame 115")
    return found | {"ok": found["ok"] and int(plain[266].max()) == 0}


def missing_files(path: Path) -> dict[str, Any]:
    """C2: each file of a segment deleted in turn."""
    return each_file(path, lambda file: file.unlink(), "E_CHUNK_MISSING")


def truncated(path: Path) -> dict[str, Any]:
    """C4: each file of a segment cut at a random byte."""
    rng = np.random.default_rng(4)
    return each_file(path, lambda f: os.truncate(f, int(rng.integers(1, f.stat().st_size))), "E_TRUNCATED")


def emptied(path: Path) -> dict[str, Any]:
    """C4: each file of a segment emptied."""
    return each_file(path, lambda file: os.truncate(file, 0), "E_TRUNCATED")


def each_file(path: Path, damage: Callable[[Path], None], code: str) -> dict[str, Any]:
    """Damage each file of a segment in turn; return the last row, ok if all were."""
    make_store(path)
    rows = []
    for file in sorted(p for p in (path / "segments/main-0000").rglob("*") if p.is_file()):
        kept = file.read_bytes()
        damage(file)
        rows.append(row(code, lambda: Store(path), str(file)))
        file.write_bytes(kept)
    Store(path).verify()
    bad = [r for r in rows if not r["ok"]]
    return (bad or rows)[-1] | {"line": f"{len(rows)} files; " + (bad or rows)[-1]["line"]}


def leftover_partial(path: Path) -> dict[str, Any]:
    """C4: what killed writers leave is ignored by readers, reported and cleaned by the next writer."""
    make_store(path)
    (path / "staging/main/abc.partial").mkdir(parents=True)
    (path / "segments/main-0001/state").mkdir(parents=True)
    read = content(Store(path)) == expected(LENGTHS)
    with writer(path) as again:
        told = again.cleaned
    left = sorted(p.name for p in path.iterdir())
    return {"ok": read and len(told) == 2 and left == ["segments", "zarr.json"], "code": "-", "line": "; ".join(told)}


SECOND = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from store_faults import make_episode, writer
with writer(Path(sys.argv[2]), writer=sys.argv[3]) as store:
    for i in range(int(sys.argv[4]), int(sys.argv[5])):
        store.add(make_episode(i, 20))
"""


def second_writer(path: Path, name: str, first: int, stop: int) -> subprocess.Popen[str]:
    """Start another process that writes."""
    arguments = [str(Path(__file__).parent), str(path), name, str(first), str(stop)]
    return subprocess.Popen([sys.executable, "-c", SECOND, *arguments], stderr=subprocess.PIPE, text=True)


def two_writers(path: Path) -> dict[str, Any]:
    """C5: a second process under the same name."""
    with writer(path) as store:
        store.add(make_episode(0, 20))
        process = second_writer(path, "main", 1, 2)
        line = process.communicate()[1].strip().splitlines()[-1].rpartition("StoreError: ")[2]
    ok = line.startswith("E_LOCKED:") and f"process {os.getpid()}" in line and len(Store(path).episodes) == 1
    return {"ok": ok, "code": "E_LOCKED", "line": line}


def many_writers(path: Path) -> dict[str, Any]:
    """C5: three processes under names of their own, at the same time."""
    processes = [second_writer(path, f"w{i}", 4 * i, 4 * i + 4) for i in range(3)]
    errors = [p.communicate()[1] for p in processes]
    store = Store(path)
    store.verify()
    ok = not any(errors) and content(store) == expected((20,) * 12)
    return {"ok": ok, "code": "-", "line": f"3 writers, {len(store.episodes)} of 12 episodes, byte-equal"}


def unequal(path: Path) -> dict[str, Any]:
    """C6: arrays of unequal lengths."""
    episode = make_episode(0, 10)
    short = dataclasses.replace(episode, action=episode.action[:-1])
    with writer(path) as store:
        return row("E_LENGTH", lambda: store.add(short), "'state': 10", "'action': 9")


def consolidated(path: Path) -> dict[str, Any]:
    """C7: somebody consolidated the metadata, which then goes stale."""
    make_store(path)
    zarr.consolidate_metadata(str(path))
    return row("E_SCHEMA", lambda: Store(path), "zarr.json", "consolidated_metadata")


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def disk_full(path: Path) -> dict[str, Any]:
    """C8: writing fails at 40 sizes, while adding and while sealing; then there is room again."""
    make_store(path)
    before = content(Store(path))
    rng = np.random.default_rng(8)
    lines = []
    for number in range(40):
        size = int(rng.integers(0, 20_000))
        with suppress(StoreError), writer(path) as store:
            if number % 2:
                store.add(make_episode(100 + number, 60))
            with file_limit(size):
                try:
                    store.seal() if number % 2 else store.add(make_episode(100 + number, 60))
                except StoreError as e:
                    lines.append(str(e))
            if content(Store(path)) | before != content(Store(path)):
                return {"ok": False, "code": "E_NOSPACE", "line": f"limit {size}: earlier episodes changed"}
            if f"{100 + number:03d}" not in store.sources():
                store.add(make_episode(100 + number, 60))
    store = Store(path)
    store.verify()
    found = content(store)
    ok = all(line.startswith("E_NOSPACE:") for line in lines) and len(found) == 44 and found | before == found
    return {"ok": ok and len(lines) > 20, "code": "E_NOSPACE", "line": f"{len(lines)} of 40 refused; {lines[-1]}"}


def edited_fields(path: Path) -> dict[str, Any]:
    """C9: each field of an array's metadata set to something else."""
    make_store(path)
    file = path / "segments/main-0000/images/cam0/zarr.json"
    kept = file.read_text()
    other = {
        "zarr_format": 2, "node_type": "group", "shape": [440, 8, 8, 3], "data_type": "int8", "fill_value": 7,
        "chunk_grid": {}, "chunk_key_encoding": {"name": "v2"}, "codecs": [], "attributes": {"a": 1},
    }  # fmt: skip
    rows = []
    for key, value in other.items():
        text = json.dumps(json.loads(kept) | {key: value}, indent=2, sort_keys=True)
        # of the old length, so that the size does not give it away
        file.write_text(text.ljust(len(kept)) if len(text) <= len(kept) else text)
        rows.append(row("E_SCHEMA" if len(text) <= len(kept) else "E_CHECKSUM", lambda: Store(path), str(file)))
        rows[-1]["ok"] &= len(text) > len(kept) or key in rows[-1]["line"]
    file.write_text(kept)
    Store(path).verify()
    bad = [r for r in rows if not r["ok"]]
    return (bad or rows[3:])[0] | {"line": f"{len(rows)} fields; " + (bad or rows[3:])[0]["line"]}


def unknown_codec(path: Path) -> dict[str, Any]:
    """C9: a codec nobody knows."""
    make_store(path)
    file = path / "segments/main-0000/images/cam0/zarr.json"
    file.write_text(file.read_text().replace('"crc32c"', '"lzmagi"'))
    return row("E_SCHEMA", lambda: Store(path), str(file), "codecs", "lzmagi")


def zarr_v2(path: Path) -> dict[str, Any]:
    """C9: a Zarr v2 group."""
    zarr.open_group(path, mode="w", zarr_format=2)
    return row("E_SCHEMA", lambda: Store(path), str(path), "Zarr v2")


def newer(path: Path) -> dict[str, Any]:
    """C9: a store of a later dita."""
    make_store(path)
    text = (path / "zarr.json").read_text()
    (path / "zarr.json").write_text(text.replace('"format_version": 1', '"format_version": 2'))
    return row("E_VERSION", lambda: Store(path), str(path), "upgrade dita")


def hostile_names(path: Path) -> dict[str, Any]:
    """C18: names of writers and cameras that are no names; nothing may appear outside the store."""
    names = ("../x", "/etc/x", "a/b", "x\0y", "n" * 300, "", ".hidden", "..", "CAM0")
    outside = sorted(p.name for p in path.parent.iterdir())
    rows = []
    for name in names:
        cameras = (SPEC.cameras[0], dataclasses.replace(SPEC.cameras[1], name=name))
        rows.append(row("E_PATH", lambda cameras=cameras: create(path, cameras)))
        if name != "CAM0":  # only beside cam0 a collision
            rows.append(row("E_PATH", lambda name=name: writer(path, writer=name)))
    ok = all(r["ok"] for r in rows) and sorted(p.name for p in path.parent.iterdir()) == outside
    return rows[0] | {"ok": ok, "line": f"{len(rows)} names; {rows[-1]['line']}"}


def link_out(path: Path) -> dict[str, Any]:
    """C18: a file of the store that is a link to somewhere else."""
    make_store(path)
    (path / SHARD).rename(path.parent / "elsewhere")
    (path / SHARD).symlink_to(path.parent / "elsewhere")
    return row("E_PATH", lambda: Store(path), SHARD)


def create(path: Path, cameras: tuple[CameraSpec, ...]) -> StoreWriter:
    """Create a store with other cameras."""
    spec = dataclasses.replace(SPEC, cameras=cameras)
    return StoreWriter.create(path, spec, source="faults", licence="CC0-1.0")


def duplicates(path: Path) -> dict[str, Any]:
    """C17: the same content under another name."""
    with writer(path) as store:
        store.add(make_episode(0, 10))
        return row("E_DUP", lambda: store.add(dataclasses.replace(make_episode(0, 10), source="other")), "'000'")


def plain_zarr(path: Path) -> dict[str, Any]:
    """Plain zarr-python reads equal arrays, raw and JPEG."""
    ok = True
    for codec in ("raw", "jpeg"):
        make_store(path / codec, codec=codec)
        store = Store(path / codec)
        group: Any = zarr.open_group(path / codec, mode="r")["segments/main-0000"]
        for i, e in enumerate(store.episodes):
            here = slice(e.start, e.stop)
            ok = ok and all(np.array_equal(getattr(store, n)(i), group[n][here]) for n in ("state", "action", "stamp"))
            for c in ("cam0", "cam1"):
                ok = ok and np.array_equal(store.read_frames(i, c, range(store.length(i))), group[f"images/{c}"][here])
    return {"ok": ok, "code": "-", "line": f"zarr-python {zarr.__version__}: equal arrays, raw and JPEG"}


FAULTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "C2 missing chunk, which zarr-python reads as zeros": missing_chunk,
    "C2 missing file": missing_files,
    "C4 file cut short": truncated,
    "C4 empty file": emptied,
    "C4 leftovers of killed writers": leftover_partial,
    "C5 second writer, same name": two_writers,
    "C5 three writers at once, own names": many_writers,
    "C6 arrays of unequal lengths": unequal,
    "C7 consolidated metadata": consolidated,
    "C8 disk full while adding or sealing": disk_full,
    "C9 edited zarr.json": edited_fields,
    "C9 unknown codec": unknown_codec,
    "C9 Zarr v2 store": zarr_v2,
    "C9 newer format": newer,
    "C17 same content twice": duplicates,
    "C18 hostile names": hostile_names,
    "C18 link out of the store": link_out,
    "A store opens with plain zarr-python": plain_zarr,
}


# --- running and reporting


class Results:
    """One JSON line per case, kept at once; what is there already is not done again."""

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.file = file
        lines = file.read_text().splitlines() if file.exists() else []
        self.rows: dict[str, dict[str, Any]] = {r.pop("case"): r for r in map(json.loads, lines)}

    def do(self, case: str, run: Callable[[], dict[str, Any]]) -> None:
        """Run a case once."""
        if case not in self.rows:
            self.rows[case] = run()
            with self.file.open("a") as file:
                file.write(json.dumps({"case": case, **self.rows[case]}) + "\n")

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Return the rows of a kind of case."""
        return [r for case, r in self.rows.items() if case.startswith(f"{kind}/")]


def measure(results: Results, kills: int, flips: int) -> None:
    """Run what is missing of all cases."""
    with tempfile.TemporaryDirectory(prefix="dita-faults-") as folder:
        work = Path(folder)
        steps = steps_of(*run_killed(work / "whole.zarr"))
        for case in track(range(kills), "kills"):
            results.do(f"kill/{case}", lambda case=case: kill_case(case, steps, fresh(work / "kill")))
        for codec in ("raw", "jpeg"):
            path = fresh(work / codec) / "s.zarr"
            make_store(path, codec=codec)
            want = content(Store(path))
            for case in track(range(flips // 2), f"flips, {codec}"):
                results.do(
                    f"flip/{codec}/{case}",
                    lambda case=case, path=path, codec=codec, want=want: flip_case(case, path, codec, want),
                )
            Store(path).verify()
        for name, run in FAULTS.items():
            results.do(f"fault/{name}", lambda run=run: run(fresh(work / "fault") / "s.zarr"))


def fresh(folder: Path) -> Path:
    """Return an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def page(results: Results) -> str:
    """Return the Markdown page."""
    kills, flips, faults = results.of("kill"), results.of("flip"), results.of("fault")
    phases = Counter(r["phase"] for r in kills)
    by_call = sum(r["by"] == "call" for r in kills)
    lines = [
        "# What a store survives",
        "",
        "`make evidence-store`; seeded, minutes on one core. Codes are those of `dita.datasets`; lines are what the",
        "user sees, paths shortened. A bit flip counts as noticed only if an error names its file.",
        "",
        "## Writers killed with SIGKILL",
        "",
        f"{len(kills)} kills, {by_call} at a disk call and {len(kills) - by_call} by the clock: "
        + ", ".join(f"{n} while {p}" for p, n in sorted(phases.items()))
        + ".",
        f"In {sum(r['ok'] for r in kills)} of {len(kills)} the store opens or says that nothing is sealed, sealed",
        "episodes are byte-equal, every episode that `add` had returned for is there, leftovers are reported",
        f"({sum(r['reported'] for r in kills)} of them), and a second run ends with the same episodes, byte-equal.",
        "",
        "## Single bit flips",
        "",
        "| codec | part | flips | at opening | when read | by --verify | silent |",
        "|---|---|---|---|---|---|---|",
    ]
    for codec in ("raw", "jpeg"):
        for region in REGIONS:
            rows = [r for r in flips if (r["codec"], r["region"]) == (codec, region)]
            steps = Counter(r["noticed"] for r in rows)
            silent = sum(not r["ok"] for r in rows)
            cells = [len(rows), *(steps[s] for s in ("opening", "reading", "verify")), silent]
            lines.append(f"| {codec} | {region} | " + " | ".join(map(str, cells)) + " |")
    lines += ["", f"{sum(r['ok'] for r in flips)} of {len(flips)} noticed, file named. \"When read\" is the crc32c of",
              "the chunk or of the shard's index, without `--verify`.", "", "## The other faults", "",
              "| fault | as promised | what is said |", "|---|---|---|"]  # fmt: skip
    for case, r in results.rows.items():
        if case.startswith("fault/"):
            said = re.sub(r"/tmp/dita-faults-[^/]+/fault/", "", r["line"]).replace("|", "\\|").replace("\0", "\\0")
            lines.append(f"| {case.removeprefix('fault/')} | {'yes' if r['ok'] else '**no**'} | {said[:300]} |")
    failed = [case for case, r in results.rows.items() if not r["ok"]]
    lines += ["", f"{len(faults)} rows; not as promised: {', '.join(failed) or 'none'}."]
    return "\n".join(lines) + "\n"


def summary(results: Results) -> dict[str, Any]:
    """Return what is kept as JSON: counts, every failure, and the rows of the fault table."""
    return {
        "kills": len(results.of("kill")),
        "kills_ok": sum(r["ok"] for r in results.of("kill")),
        "flips": len(results.of("flip")),
        "flips_ok": sum(r["ok"] for r in results.of("flip")),
        "faults": {c.removeprefix("fault/"): r for c, r in results.rows.items() if c.startswith("fault/")},
        "kill_cases": results.of("kill"),
        "failed": {case: r for case, r in results.rows.items() if not r["ok"]},
        "versions": {"python": sys.version.split()[0], "zarr": zarr.__version__, "numpy": np.__version__},
    }


def main() -> int:
    """Run everything and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=120)
    parser.add_argument("--flips", type=int, default=1200, help="over a raw and a JPEG store")
    parser.add_argument("--work", type=Path, default=Path("outputs/store_faults"), help="keeps single results")
    parser.add_argument("--overwrite", action="store_true", help="forget the single results first")
    parser.add_argument("--out", type=Path, default=PAGE, help="gets the page and the JSON")
    args = parser.parse_args()
    if args.overwrite:
        shutil.rmtree(args.work, ignore_errors=True)
    logging.getLogger("dita").setLevel(logging.ERROR)  # what writers report is counted
    warnings.simplefilter("ignore", ZarrUserWarning)
    results = Results(args.work / "results.jsonl")
    measure(results, args.kills, args.flips)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "store_faults.md").write_text(page(results))
    (args.out / "store_faults.json").write_text(json.dumps(summary(results), indent=1) + "\n")
    failed = summary(results)["failed"]
    print(f"{len(results.rows)} cases, {len(failed)} not as promised; {args.out / 'store_faults.md'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
