"""The folder of a run: who holds it, what it was started with, which checkpoint is good, and how a run is stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from dita.checkpoint import read_json, verify_train_state, whole_checkpoints, write_json
from dita.config import TrainConfig, to_dict
from dita.datasets.filters import filter_hash
from dita.datasets.store import Store
from dita.lock import held

Exist = Literal["error", "resume", "overwrite"]
Change = tuple[str, Any, Any]  # field, what it was, what it is now
MAY_CHANGE = (  # on resume: none of them changes a loss
    *("run", "threads", "device", "log_every", "save_every", "keep_last", "keep_best", "async_save", "parallel"),
    *("collective_timeout", "save_timeout", "worker_timeout", "peak_tflops", "wandb", "data.workers", "data.cache"),
    "data.quarantine",  # while it was lower, nothing was left out or the run stopped
    *("validation.every", "validation.windows", "validation.rollouts", "replay", "env"),
)
NEVER_CHANGES = ("policy", "diffusion", "preprocess", "method", "lora", "statistics")  # what saved weights mean
CONTENT = ("filters_sha256", "episodes_sha256", "code")  # by name; of a config's other parts, keys may be added
HERE = Path(__file__).parent
CODE = (  # what the result of a step is computed by
    *("train.py", "train_data.py", "optimize.py", "preprocess.py", "normalize.py", "relative.py", "lora.py"),
    "policy/*.py",
    *(f"datasets/{name}.py" for name in ("augment", "dataset", "mixture", "segments", "shards", "store", "windows")),
)


class Preempted(Exception):
    """SIGTERM, SIGUSR1 or SIGUSR2 came; a checkpoint is there. The exit code tells a job script to requeue."""

    exit_code = 85

    def __init__(self, text: str, number: int = signal.SIGTERM) -> None:
        super().__init__(text)
        self.signal = number


@contextmanager
def run_folder(run: Path, now: Mapping[str, Any], exist: Exist, allow_drift: Sequence[str] = ()) -> Iterator[None]:
    """Claim a run folder for this process and compare what it was started with; `write_description` updates that.

    Args:
        run: the folder.
        now: `describe`d config.
        exist: as of `dita.train.train`.
        allow_drift: fields that may differ, with everything below them.

    Raises:
        FileExistsError: it holds a run (use --resume or --overwrite), or a live process holds it.
        ValueError: resumed with another config, other data or other code; the differences are printed.
    """
    if exist == "error" and (run / "config.json").exists():
        raise FileExistsError(f"{run} holds a run already; continue it with --resume or start over with --overwrite")
    if allow_drift and exist != "resume":
        raise ValueError("--allow-drift is of --resume: nothing is continued")
    run.mkdir(parents=True, exist_ok=True)
    with held(run, "training in", "run="):
        if exist == "resume" and (run / "config.json").exists():
            refuse_drift(run, now, allow_drift)
        elif exist == "overwrite":
            shutil.rmtree(run / "checkpoints", ignore_errors=True)
            for name in ("log.jsonl", "validation.jsonl", "drift.jsonl", "quarantine.jsonl"):
                (run / name).unlink(missing_ok=True)
        for folder in (run / "checkpoints").glob("[0-9]*"):  # what killed saves left
            whole = (folder / "train" / "manifest.json").is_file()
            for left in folder.glob(".*.partial") if whole else [folder]:
                shutil.rmtree(left)
        yield


def describe(config: TrainConfig, stores: Sequence[Store]) -> dict[str, Any]:
    """Return as JSON has it what a run is started with.

    That is the config, the content of the filters and stores it names, and the code that computes a step.
    """
    hashes = {s.filter: filter_hash(s.filter) for s in config.data.stores if s.filter is not None}
    episodes = {
        str(store.path): hashlib.sha256("".join(e.content_hash for e in store.episodes).encode()).hexdigest()
        for store in stores
    }
    files = sorted(path for pattern in CODE for path in HERE.glob(pattern))
    code = {f"dita/{p.relative_to(HERE)}": hashlib.sha256(p.read_bytes()).hexdigest()[:12] for p in files}
    code |= {name: version(name) for name in ("torch", "numpy")}
    content = {"filters_sha256": hashes, "episodes_sha256": episodes, "code": code}
    return json.loads(json.dumps(to_dict(config) | content))


def refuse_drift(run: Path, now: Mapping[str, Any], allow_drift: Sequence[str]) -> None:
    """Print how a run's description differs from the one it was started with, and refuse what may not.

    Raises:
        ValueError: a field changed that decides losses and is not allowed to, or that never may; or there is no field
            of an allowed name.
    """
    saved = read_json(run / "config.json")
    for field in allow_drift:
        if not (_there(saved, field) or _there(now, field)):
            raise ValueError(f"--allow-drift {field}: there is no such field; see the keys of {run}/config.json")
        if _below(field, NEVER_CHANGES):
            raise ValueError(f"--allow-drift {field}: it says what the saved weights mean and never changes")
    changes = _flat_diff(saved, now)
    notes = [_verdict(field, allow_drift) for field, _, _ in changes]
    if changes:
        lines = [f"--- {run}/config.json", "+++ now"]
        for (field, was, is_now), note in zip(changes, notes, strict=True):
            lines += [f"-{field}: {json.dumps(was)}", f"+{field}: {json.dumps(is_now)}  # {note}"]
        print("\n".join(lines), file=sys.stderr, flush=True)
    refused = [c for c, note in zip(changes, notes, strict=True) if note.startswith(("refused", "never"))]
    if refused:
        listed = "; ".join(f"{field}: was {was!r}, now {is_now!r}" for field, was, is_now in refused[:8])
        roots = dict.fromkeys(f.split(".")[0] if _below(f, CONTENT) else f for f, _, _ in refused)
        never = [f for f, _, _ in refused if _below(f, NEVER_CHANGES)]
        way = "" if never else f", or with {' '.join(f'--allow-drift {f}' for f in roots)} to take the change knowingly"
        raise ValueError(f"{run} was started with another config: {listed}; use another run={way}")


def write_description(run: Path, now: Mapping[str, Any], step: int) -> None:
    """Write RUN/config.json; what changed since the run began, and decides losses, goes to RUN/drift.jsonl."""
    path = run / "config.json"
    changes = _flat_diff(read_json(path), now) if path.exists() and step else []
    changes = [c for c in changes if not _below(c[0], MAY_CHANGE)]
    if changes:
        with (run / "drift.jsonl").open("a") as file:
            fields = {field: [was, is_now] for field, was, is_now in changes}
            file.write(json.dumps({"step": step, "was, now": fields}) + "\n")
    write_json(path, now)


def _verdict(field: str, allow_drift: Sequence[str]) -> str:
    if _below(field, MAY_CHANGE):
        return "may change"
    if _below(field, NEVER_CHANGES):
        return "never changes"
    return "allowed" if _below(field, allow_drift) else "refused"


def _below(field: str, fields: Sequence[str]) -> bool:
    """Say whether a field is one of some, or inside one."""
    return any(field == f or field.startswith((f"{f}.", f"{f}[")) for f in fields)


def _there(values: Any, field: str) -> bool:
    """Say whether nested values have a field, whose names may have dots."""
    if isinstance(values, list):
        index, _, rest = field.removeprefix("[").partition("]")
        there = field.startswith("[") and index.isdigit() and int(index) < len(values)
        return there and (not rest or _there(values[int(index)], rest.removeprefix(".")))
    if not isinstance(values, dict):
        return False
    return field in values or any(
        _there(values[k], field[len(k) :].removeprefix(".")) for k in values if field.startswith((f"{k}.", f"{k}["))
    )


def _flat_diff(was: Any, now: Any, path: str = "") -> list[Change]:
    """List what differs; a key of a config that is newer than the run is no change."""
    if isinstance(was, dict) and isinstance(now, dict):
        keys = was.keys() | now.keys() if path in CONTENT else was.keys()
        return [d for k in sorted(keys) for d in _flat_diff(was.get(k), now.get(k), f"{path}.{k}" if path else k)]
    if isinstance(was, list) and isinstance(now, list) and len(was) == len(now) and was and isinstance(was[0], dict):
        return [d for i in range(len(was)) for d in _flat_diff(was[i], now[i], f"{path}[{i}]")]
    return [] if was == now else [(path, was, now)]


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
    """Turns SIGTERM, SIGUSR1, SIGUSR2 and the first Ctrl-C into a checkpoint at the end of the running step."""

    def __init__(self) -> None:
        self.asked: int | None = None  # the signal

    def __enter__(self) -> StopFlag:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = number
