"""The folder of a run: who holds it, what it was started with, which checkpoint is good, and how a run is stopped."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from dita.checkpoint import read_json, verify_train_state, whole_checkpoints, write_json
from dita.config import TrainConfig, to_dict
from dita.datasets.filters import filter_hash
from dita.datasets.store import Store

Exist = Literal["error", "resume", "overwrite"]
LEASE = 60.0  # [s]; a lock of another machine that is older was left behind
MAY_CHANGE_ON_RESUME = (
    *("run", "threads", "device", "log_every", "save_every", "keep_last", "keep_best", "async_save", "parallel"),
    *("collective_timeout", "save_timeout", "worker_timeout", "peak_tflops", "wandb", "data.workers", "data.cache"),
    *("validation.every", "validation.windows", "validation.rollouts"),
)


class Preempted(Exception):
    """SIGTERM or SIGUSR1 came; a checkpoint is there. The exit code tells a job script to requeue."""

    exit_code = 85


@contextmanager
def run_folder(run: Path, config: TrainConfig, exist: Exist, stores: Sequence[Store] = ()) -> Iterator[None]:
    """Claim a run folder for this process and write or compare its config.

    Raises:
        FileExistsError: it holds a run (use --resume or --overwrite), or a live process holds it.
        ValueError: resumed with another config or other episodes; the differences are listed.
    """
    if exist == "error" and (run / "config.json").exists():
        raise FileExistsError(f"{run} holds a run already; continue it with --resume or start over with --overwrite")
    run.mkdir(parents=True, exist_ok=True)
    lock = _Lock(run / "lock")
    lock.take()
    try:
        if exist == "resume" and (run / "config.json").exists():
            _refuse_drift(read_json(run / "config.json"), _described(config, stores), run)
        elif exist == "overwrite":
            shutil.rmtree(run / "checkpoints", ignore_errors=True)
            for name in ("log.jsonl", "validation.jsonl"):
                (run / name).unlink(missing_ok=True)
        for folder in (run / "checkpoints").glob("[0-9]*"):  # what killed saves left
            whole = (folder / "train" / "manifest.json").is_file()
            for left in folder.glob(".*.partial") if whole else [folder]:
                shutil.rmtree(left)
        write_json(run / "config.json", _described(config, stores))
        yield
    finally:
        lock.release()


class _Lock:
    """A file with the holder's machine and process; touched while held, so that other machines see it live."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stop = threading.Event()

    def take(self) -> None:
        """Raises FileExistsError while another process holds it."""
        try:
            fd = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            self._refuse_if_held()
            self.path.unlink(missing_ok=True)
            return self.take()
        with os.fdopen(fd, "w") as file:
            file.write(f"{os.getpid()} {socket.gethostname()} {_start_time(os.getpid())}")
        threading.Thread(target=self._touch, daemon=True).start()

    def release(self) -> None:
        self._stop.set()
        self.path.unlink(missing_ok=True)

    def _refuse_if_held(self) -> None:
        try:
            words, age = self.path.read_text().split(), time.time() - self.path.stat().st_mtime
        except FileNotFoundError:
            return  # given back meanwhile
        if not words:
            held, who = age < LEASE, "a process"  # killed, or not yet, between creating and writing
        elif len(words) > 1 and words[1] != socket.gethostname():
            held, who = age < LEASE, f"process {words[0]} on {words[1]}"
        else:
            began = _start_time(int(words[0]))
            held, who = began is not None and (len(words) < 3 or words[2] == began), f"process {words[0]}"
        if held:
            raise FileExistsError(f"{who} is training in {self.path.parent}; stop it or use another run=")

    def _touch(self) -> None:
        while not self._stop.wait(LEASE / 6):
            try:
                os.utime(self.path)
            except FileNotFoundError:
                return


def _start_time(pid: int) -> str | None:
    """Return when a process of this machine began, in ticks since boot: ids are given again, this is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return None


def _refuse_drift(saved: dict[str, Any], now: dict[str, Any], run: Path) -> None:
    now = json.loads(json.dumps(now))
    known = {key: value for key, value in now.items() if key in saved}  # a knob that is newer than the run is no drift
    changed = [f"{k}: was {a!r}, now {b!r}" for k, a, b in _flat_diff({k: saved[k] for k in known}, known)
               if not k.startswith(MAY_CHANGE_ON_RESUME)]  # fmt: skip
    if changed:
        raise ValueError(f"{run} was started with another config: {'; '.join(changed[:8])}; use another run=")


def _described(config: TrainConfig, stores: Sequence[Store]) -> dict[str, Any]:
    """Return the config with the content of the filters and stores it names: an edited one is another run."""
    hashes = {s.filter: filter_hash(s.filter) for s in config.data.stores if s.filter is not None}
    episodes = {
        str(store.path): hashlib.sha256("".join(e.content_hash for e in store.episodes).encode()).hexdigest()
        for store in stores
    }
    return to_dict(config) | {"filters_sha256": hashes, "episodes_sha256": episodes}


def _flat_diff(a: Any, b: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = sorted(a.keys() | b.keys())
        return [d for k in keys for d in _flat_diff(a.get(k), b.get(k), f"{path}.{k}" if path else k)]
    return [] if a == b else [(path, a, b)]


def newest_good(run: Path) -> str | None:
    """Return the name of the newest undamaged checkpoint; None: there is none at all.

    Raises:
        ValueError: there are some, and every one is damaged.
    """
    error: ValueError | None = None
    for folder in reversed(whole_checkpoints(run)):
        try:
            verify_train_state(folder / "train")
        except ValueError as e:
            error = e
            print(f"DAMAGED CHECKPOINT {folder.name} IS NOT USED: {e}; looking for an older one", file=sys.stderr)
            continue
        if error is not None:
            print(f"CONTINUING FROM THE OLDER CHECKPOINT {folder.name}: its steps are taken again", file=sys.stderr)
        return folder.name
    if error is not None:
        raise error
    return None


class StopFlag:
    """Turns SIGTERM, SIGUSR1 and the first Ctrl-C into a checkpoint at the end of the running step."""

    def __init__(self) -> None:
        self.asked: int | None = None  # the signal

    def __enter__(self) -> StopFlag:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number
