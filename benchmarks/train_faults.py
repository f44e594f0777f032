"""Kill, stop and damage training in every way of the fault table and write down what was lost; seeded, continues.

Writes docs/evidence/train_faults.md and the JSON behind it. Exit code 1 if anything was lost, silent or not equal.
Trainers are forked from this process, which has imported everything: a kill costs a second, not ten.

make evidence-train
python benchmarks/train_faults.py --kills 5 --stops 3 --flips 20 --out /tmp/quick
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.utils.tensorboard
from rich.progress import track

from dita.checkpoint import load_policy, load_train_state, whole_checkpoints
from dita.cli import compose
from dita.config import TrainConfig
from dita.datasets.store import StoreWriter
from dita.embodiment import load_embodiment
from dita.run_folder import newest_good
from dita.train import train
from dita.types import Episode

PAGE = Path(__file__).parent.parent / "docs" / "evidence"
SEED = 7


def main(argv: list[str] | None = None) -> int:
    """Run every row that has no result yet and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="kill -9 at random moments of saves (100)")
    parser.add_argument("--stops", type=int, default=20, help="stops and resumes; changes of the number of ranks (20)")
    parser.add_argument("--flips", type=int, default=200, help="flipped bits, and damaged files (200)")
    parser.add_argument("--out", type=Path, default=PAGE, help="folder of the page")
    parser.add_argument("--work", type=Path, default=Path("build/train_faults"), help="runs; delete it to start over")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    store = make_store(args.work / "small.zarr")
    rows: dict[str, Callable[[Path, Path], dict[str, Any]]] = {
        "B1, B2, B13: SIGTERM at random steps, resumed": lambda w, s: stops(w, s, args.stops),
        "B3: kill -9 at random moments of saves": lambda w, s: kills(w, s, args.kills, signal.SIGKILL, False),
        "B3: the same, saves in a thread": lambda w, s: kills(w, s, args.kills, signal.SIGKILL, True),
        "B14: SIGTERM twice while saving": lambda w, s: kills(w, s, args.stops, signal.SIGTERM, False),
        "B3, two ranks: kill -9 one of them while saving": lambda w, s: rank_kills(w, s, max(2, args.stops // 2)),
        "B4: a rank is stopped (SIGSTOP) mid-step": lambda w, s: rank_stops(w, s, 3),
        "B15: 1 <-> 2 processes at random steps": lambda w, s: worlds(w, s, max(2, args.stops // 2)),
        "B5: a flipped bit": lambda w, s: damage(w, s, args.flips, flip),
        "B6: a truncated, emptied or missing file": lambda w, s: damage(w, s, args.flips // 2, cut),
        "B7: writes refused beyond a size": lambda w, s: full(w, s, 5),
    }
    for name, row in rows.items():
        if name not in results:
            work = args.work / f"row{list(rows).index(name)}"
            shutil.rmtree(work, ignore_errors=True)
            began = time.monotonic()
            results[name] = row(work, store) | {"seconds": round(time.monotonic() - began)}
            path.write_text(json.dumps(results, indent=1))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "train_faults.json").write_text(json.dumps(results, indent=1) + "\n")
    (args.out / "train_faults.md").write_text(page(results))
    return int(any(r["bad"] for r in results.values()))


def make_store(path: Path) -> Path:
    """Write four short episodes of noise."""
    if path.exists():
        return path
    spec, rng = load_embodiment("pusht"), np.random.default_rng(SEED)
    with StoreWriter.create(path, spec, source="noise", licence="CC0-1.0") as writer:
        for i in range(4):
            images = {c.name: rng.integers(0, 256, (20 + i, c.height, c.width, 3), np.uint8) for c in spec.cameras}
            state, action = (
                rng.uniform(0, 1, (20 + i, d)).astype(np.float32) for d in (spec.state_dim, spec.action_dim)
            )
            writer.add(Episode(images, state, action, np.arange(20 + i) / spec.control_hz, "push", True, f"noise/{i}"))
        writer.seal()
    return path


def config_of(store: Path, run: Path, **changes: Any) -> TrainConfig:
    """Return the smallest training there is, deterministic, with two microbatches."""
    overrides = ["experiment=smoke", f"data.stores=[{{path:{store},weight:1}}]", f"run={run}", "threads=1"]
    overrides += ["augment.shift=2", "peak_tflops=1", "microbatch_size=2", "policy.vision.image_size=48"]
    config = compose("train", overrides, TrainConfig)
    return dataclasses.replace(config, **({"save_every": 1, "keep_last": 3, "collective_timeout": 30.0} | changes))


def start(
    config: TrainConfig, rank: int = 0, world: int = 1, port: int = 0, before: Callable[[], None] | None = None
) -> int:
    """Fork a trainer that continues a run; exit code as the command line's. Its words go to RUN.log."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        out = os.open(f"{config.run}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        if world > 1:
            os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="localhost", MASTER_PORT=str(port))
        if before is not None:
            before()
        train(config, "resume")
        code = 0
    except BaseException as e:
        print(f"{type(e).__name__}: {e}", flush=True)
        code = getattr(e, "exit_code", 130 if isinstance(e, KeyboardInterrupt) else 1)
    finally:
        os._exit(code)


def end(pid: int, within: float = 600.0) -> int:
    """Wait for a child; its exit code, minus the signal that killed it."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -999


def newest(run: Path) -> int:
    """Return the step of the newest whole checkpoint; 0: none."""
    found = whole_checkpoints(run)
    return int(found[-1].name) if found else 0


def loss_hash(run: Path) -> str:
    """Return the chained hash of every step's loss of a finished run."""
    return load_train_state(whole_checkpoints(run)[-1] / "train")[1]["loss_hash"]


def compared(run: Path, store: Path, config: TrainConfig) -> dict[str, Any]:
    """Finish a run, and the same without interruption, and compare the hashes of all losses."""
    code = end(start(config), 3600)
    straight = dataclasses.replace(config, run=str(run) + "_straight", save_every=config.steps)
    other = end(start(straight), 3600)
    equal = code == other == 0 and loss_hash(run) == loss_hash(Path(straight.run))
    return {"bit_equal": equal, "steps": config.steps}


def stops(work: Path, store: Path, times: int) -> dict[str, Any]:
    """SIGTERM at random steps: exit code 85, a checkpoint of the running step, and nothing lost."""
    run, rng = work / "run", np.random.default_rng(SEED)
    run.parent.mkdir(parents=True)
    config = config_of(store, run, steps=3 * times + 4, save_every=1000)
    codes, seconds, last = [], [], 0
    for _ in track(range(times), "stops"):
        pid = start(config)
        wanted = last + int(rng.integers(1, 4))
        wait_for(lambda wanted=wanted: steps_logged(run) >= min(wanted, config.steps - 1), pid)
        began = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
        codes.append(end(pid))
        seconds.append(time.monotonic() - began)
        if newest(run) <= last and newest(run) < config.steps:
            return {"times": len(codes), "bad": 1, "what": f"no new checkpoint after a stop; codes {codes}"}
        last = newest(run)
    found = compared(run, store, config)
    bad = sum(c not in (85, 0) for c in codes) + (not found["bit_equal"])
    return {"times": times, "bad": bad, "codes": tally(codes), "stop_s_max": round(max(seconds), 2), **found}


def steps_logged(run: Path) -> int:
    """Return the last step in the log; 0: none."""
    try:
        lines = (run / "log.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"] if lines else 0
    except (FileNotFoundError, json.JSONDecodeError):
        return 0


def wait_for(there: Callable[[], bool], pid: int, within: float = 600.0) -> None:
    """Wait until something is there, or the process has ended."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline and not there() and Path(f"/proc/{pid}/fd").exists():
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.002)


def kills(work: Path, store: Path, times: int, number: int, threaded: bool) -> dict[str, Any]:
    """Signal at a moment drawn uniformly over a save; the run must continue from the checkpoint before or of it."""
    run, rng = work / "run", np.random.default_rng(SEED + number)
    run.parent.mkdir(parents=True)
    config = config_of(store, run, steps=2 * times + 4, async_save=threaded)
    length, lost, codes, inside, last = 0.2, [], [], 0, 0
    for _ in track(range(times), f"kills with {signal.Signals(number).name}"):
        pid = start(config)
        wait_for(lambda last=last: newest(run) > last or half_written(run), pid)
        wait_for(lambda: half_written(run), pid, 5.0)
        began = time.monotonic()
        time.sleep(rng.uniform(0, length))
        inside += bool(half_written(run))
        before = newest(run)
        for _ in range(1 if number == signal.SIGKILL else 2):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        codes.append(end(pid))
        length = 0.8 * length + 0.2 * min(2.0, 2 * (time.monotonic() - began))
        good = newest_good(run) if newest(run) else "0"
        lost.append(max(0, before - int(good or 0)))
        if int(good or 0):
            load_policy(run / "checkpoints" / str(good))
        last = newest(run)
    found = compared(run, store, config)
    expected = (-9, 0) if number == signal.SIGKILL else (85, 0)
    bad = sum(c not in expected for c in codes) + sum(n > 0 for n in lost) + (not found["bit_equal"])
    left = len(list((run / "checkpoints").glob("*/.*.partial")))
    return {"times": times, "bad": bad + left, "inside_a_save": inside, "codes": tally(codes),
            "checkpoints_lost": sum(lost), "left_over": left, **found}  # fmt: skip


def half_written(run: Path) -> bool:
    """Say whether a save is under way."""
    return any((run / "checkpoints").glob("*/.*.partial"))


def pair(config: TrainConfig, **changes: Any) -> list[int]:
    """Fork two ranks."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [start(dataclasses.replace(config, **changes), rank, 2, port) for rank in range(2)]


def rank_kills(work: Path, store: Path, times: int) -> dict[str, Any]:
    """Kill one of two ranks while they save; the other one must end by itself, and the run continue bit-equal."""
    run, rng = work / "run", np.random.default_rng(SEED + 2)
    run.parent.mkdir(parents=True)
    config = config_of(store, run, steps=2 * times + 4)
    codes, seconds, last = [], [], 0
    for i in track(range(times), "kills of a rank"):
        pids = pair(config)
        wait_for(lambda last=last: newest(run) > last, pids[0])
        wait_for(lambda: half_written(run), pids[0], 5.0)
        time.sleep(rng.uniform(0, 0.3))
        began = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[i % 2], signal.SIGKILL)
        end(pids[i % 2])
        codes.append(end(pids[1 - i % 2]))
        seconds.append(time.monotonic() - began)
        last = newest(run)
    found = compared(run, store, config)
    bad = sum(c == -999 for c in codes) + (not found["bit_equal"])
    return {"times": times, "bad": bad, "codes": tally(codes), "other_ended_s_max": round(max(seconds), 1), **found}


def rank_stops(work: Path, store: Path, times: int) -> dict[str, Any]:
    """Suspend one of two ranks: the other one must end within collective_timeout, and the run continue bit-equal."""
    run = work / "run"
    run.parent.mkdir(parents=True)
    config = config_of(store, run, steps=3 * times + 4, collective_timeout=10.0)
    codes, seconds, last = [], [], 0
    for _ in track(range(times), "suspended ranks"):
        pids = pair(config)
        wait_for(lambda last=last: newest(run) > last, pids[0])
        os.kill(pids[1], signal.SIGSTOP)
        began = time.monotonic()
        codes.append(end(pids[0], 120))
        seconds.append(time.monotonic() - began)
        os.kill(pids[1], signal.SIGKILL)
        end(pids[1])
        last = newest(run)
    found = compared(run, store, config)
    bad = sum(c in (-999, 0) for c in codes) + (not found["bit_equal"])
    return {"times": times, "bad": bad, "codes": tally(codes), "other_ended_s_max": round(max(seconds), 1), **found}


def worlds(work: Path, store: Path, times: int) -> dict[str, Any]:
    """Continue with one and two processes in turn, stopped at random steps."""
    run, rng = work / "run", np.random.default_rng(SEED + 3)
    run.parent.mkdir(parents=True)
    config = config_of(store, run, steps=3 * times + 4, save_every=1000)
    codes, last = [], 0
    for i in track(range(times), "changes of the number of ranks"):
        pids = pair(config) if i % 2 == 0 else [start(config)]
        wanted = last + int(rng.integers(1, 4))
        wait_for(lambda wanted=wanted: steps_logged(run) >= min(wanted, config.steps - 1), pids[0])
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[-1], signal.SIGTERM)
        codes += [end(pid) for pid in pids]
        last = newest(run)
    found = compared(run, store, config)
    return {"times": times, "bad": sum(c not in (85, 0) for c in codes) + (not found["bit_equal"]),
            "codes": tally(codes), **found}  # fmt: skip


def damage(work: Path, store: Path, times: int, hurt: Callable[[Path, np.random.Generator], str]) -> dict[str, Any]:
    """Damage the newest of two checkpoints; it must be refused by file name, and the older one be taken."""
    run, rng = work / "run", np.random.default_rng(SEED + 4)
    run.parent.mkdir(parents=True)
    if code := end(start(config_of(store, run, steps=2))):
        return {"times": 0, "bad": 1, "what": f"training ended with {code}"}
    silent, unnamed, kinds = 0, 0, []
    for _ in track(range(times), "damage"):
        copy = work / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        part = copy / "checkpoints" / "0000002" / ("train", "policy")[int(rng.integers(2))]
        files = sorted(p for p in part.iterdir() if p.name != "manifest.json" or hurt is flip)
        path = files[int(rng.integers(len(files)))]
        kinds.append(hurt(path, rng))
        try:
            if part.name == "policy":
                load_policy(part)
                silent += 1
            else:
                with open(work / "said", "w") as said, contextlib.redirect_stderr(said):
                    taken = newest_good(copy)
                silent += taken != "0000001"
                unnamed += part.parent.name not in (work / "said").read_text()
        except ValueError as e:
            unnamed += str(part) not in str(e)
    return {"times": times, "bad": silent + unnamed, "silent": silent, "unnamed": unnamed, "codes": tally(kinds)}


def flip(path: Path, rng: np.random.Generator) -> str:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    return path.suffix.lstrip(".")


def cut(path: Path, rng: np.random.Generator) -> str:
    """Truncate, empty or delete a file."""
    kind = ("truncated", "emptied", "deleted")[int(rng.integers(3))]
    if kind == "deleted":
        path.unlink()
    else:
        os.truncate(path, 0 if kind == "emptied" else int(rng.integers(path.stat().st_size)))
    return kind


def full(work: Path, store: Path, times: int) -> dict[str, Any]:
    """Refuse writes beyond a size, as a full disk does: exit code 75, the older checkpoint good, nothing left over."""
    run = work / "run"
    run.parent.mkdir(parents=True)
    config = config_of(store, run, steps=2 * times + 4)
    codes, bad = [], end(start(dataclasses.replace(config, save_every=1), before=stop_after(2)))
    bad = int(bad not in (85, 0))
    for i in track(range(times), "full disks"):
        limit = 4096 * 8**i  # from a page to all but everything
        codes.append(
            end(start(config, before=lambda limit=limit: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))))
        )
        bad += codes[-1] not in (75, 0) or newest_good(run) is None or half_written(run)
    found = compared(run, store, config)
    return {"times": times, "bad": bad + (not found["bit_equal"]), "codes": tally(codes), **found}


def stop_after(step: int) -> Callable[[], None]:
    """Return what makes a trainer of this process stop after a step."""

    def patch() -> None:
        from dita.train import Trainer

        follow = Trainer._follow

        def patched(self: Trainer, now: int) -> None:
            follow(self, now)
            if now + 1 == step:
                signal.raise_signal(signal.SIGTERM)

        setattr(Trainer, "_follow", patched)  # noqa: B010 of this process only

    return patch


def tally(values: list[Any]) -> dict[str, int]:
    """Count equal values."""
    return {str(v): values.count(v) for v in sorted(set(values), key=str)}


def page(results: Mapping[str, Any]) -> str:
    """Return the page."""
    lines = [
        "# Faults of training",
        "",
        "`make evidence-train`, on noise with the smallest network, two processes over gloo where it says ranks. Exit "
        "codes: 85 told to make room and saved, 75 disk full, 0 the run came to its end, -9 killed. *Bit-equal*: the "
        "chained hash of every step's loss at the end is that of a run that was never interrupted.",
        "",
        "| fault | times | exit codes, kinds | bit-equal | more | failures |",
        "|---|---|---|---|---|---|",
    ]
    shown = ("times", "bad", "codes", "bit_equal", "steps")
    for name, r in results.items():
        equal = {True: f"yes, {r.get('steps')} steps", False: "**no**"}.get(r.get("bit_equal"), "-")  # pyright: ignore
        codes = ", ".join(f"{k}: {v}" for k, v in r.get("codes", {}).items())
        more = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in r.items() if k not in shown)
        lines.append(f"| {name} | {r['times']} | {codes} | {equal} | {more} | {r['bad']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
