"""One process at a time in a folder, on a disk that several machines may share."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOCK = "lock"  # the file's name
LEASE = 60.0  # [s]; a lock of another machine that is older was left behind


@contextmanager
def held(folder: Path, doing: str, option: str) -> Iterator[None]:
    """Hold a folder for this process.

    Args:
        folder: that exists.
        doing: what this process does there, for the message to the next one: "training in".
        option: that names another folder: "run=".

    Raises:
        FileExistsError: a live process holds it.
    """
    lock = _Lock(folder / LOCK, doing, option)
    lock.take()
    try:
        yield
    finally:
        lock.release()


class _Lock:
    """A file with the holder's machine and process; touched while held, so that other machines see it live."""

    def __init__(self, path: Path, doing: str, option: str) -> None:
        self.path, self.doing, self.option = path, doing, option
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
            raise FileExistsError(f"{who} is {self.doing} {self.path.parent}; stop it or use another {self.option}")

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
