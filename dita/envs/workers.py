"""Objects that live in spawned processes: one simulator per process, since OpenGL and MuJoCo want their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Collection
from multiprocessing.connection import Connection, wait
from typing import Any


class Worker:
    """An object of class `cls`, which has `close()`, in a process of its own; one call is in flight at a time.

    The process ends with this one, however this one ends: its pipe closes. Scripts that use workers need the usual
    `if __name__ == "__main__":` of spawned processes.

    Args:
        cls: made in that process.
        args: of it.
        nice: how far the process stands back when others want its core, 0 to 19.
    """

    def __init__(self, cls: type, *args: Any, nice: int = 0) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, far_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(far_end, cls, args, nice), daemon=True)
        self._process.start()
        far_end.close()
        self._job, self._busy = "", False

    def call(self, job: str, method: str, *args: Any) -> None:
        """Start a method; `job` names what it works on, should the process die.

        A result that nobody took is dropped.
        """
        if self._busy:
            self.result()
        self._job, self._busy = job, True
        try:
            self._pipe.send((method, args))
        except OSError:
            raise self._died() from None

    def result(self) -> Any:
        """Wait for the call and return its value, or raise what it raised.

        Raises:
            RuntimeError: the process died; names the job.
        """
        try:
            ok, value = self._pipe.recv()
        except (EOFError, OSError):
            raise self._died() from None
        self._busy = False
        if not ok:
            raise value
        return value

    def close(self) -> None:
        """End the process; a call in flight is finished or, after 5 s, killed."""
        self._pipe.close()
        self._process.join(5)
        self._process.kill()
        self._process.join()

    def _died(self) -> RuntimeError:
        self._process.join(5)
        return RuntimeError(
            f"the worker process of {self._job} died (exit code {self._process.exitcode}); if the kernel killed it, "
            "use fewer workers; --resume continues"
        )


def answered(workers: Collection[Worker]) -> list[Worker]:
    """Wait until a result of at least one of the workers is there; return those, in the given order."""
    pipes = wait([w._pipe for w in workers])
    return [w for w in workers if w._pipe in pipes]


def _serve(pipe: Connection, cls: type, args: tuple[Any, ...], nice: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent closes the pipe
    os.nice(nice)
    target = None
    try:
        while True:
            method, values = pipe.recv()
            try:
                target = target or cls(*args)
                reply = (True, getattr(target, method)(*values))
            except Exception as e:
                reply = (False, e)
            pipe.send(reply)
    except (EOFError, OSError):
        pass
    finally:
        if target is not None:
            target.close()
