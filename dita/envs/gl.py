"""Choose an OpenGL backend that works on this machine, before anything imports mujoco."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

BACKENDS = ("egl", "osmesa")
PACKAGES = ("libegl1", "libgl1", "libosmesa6")
INSTALL = f"apt-get install -y {' '.join(PACKAGES)}"
_TRIED = "DITA_OPENGL"  # the backend a parent process has seen to work
_PROBE = (
    "import mujoco; r = mujoco.Renderer(mujoco.MjModel.from_xml_string('<mujoco/>'), 16, 16); r.render(); r.close()"
)


def works(backend: str) -> bool:
    """Render one picture with `backend` in a subprocess: a broken driver may abort the process that tries it."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], env={**os.environ, "MUJOCO_GL": backend}, capture_output=True, timeout=60
        )
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def select_backend() -> str:
    """Set MUJOCO_GL to the first backend that renders and return it; a value that is already set is the only try.

    Worker processes inherit the choice, so the probe runs once.

    Raises:
        ValueError: mujoco was imported without MUJOCO_GL (it binds its backend then), or no backend works.
    """
    # Mesa's software rasteriser: one process per environment already fills the cores (7.0 -> 6.1 ms a frame)
    os.environ.setdefault("LP_NUM_THREADS", "0")
    chosen = os.environ.get("MUJOCO_GL")
    if chosen and chosen == os.environ.get(_TRIED):
        return chosen
    if "mujoco" in sys.modules and not chosen:
        raise ValueError("mujoco was imported before dita chose an OpenGL backend; set MUJOCO_GL=egl (or osmesa)")
    tries = (chosen,) if chosen else BACKENDS
    for backend in tries:
        if works(backend):
            os.environ["MUJOCO_GL"] = os.environ[_TRIED] = backend
            return backend
    unset = f"unset MUJOCO_GL={chosen}, or " if chosen else ""
    raise ValueError(f"no OpenGL backend renders here (tried {', '.join(tries)}); {unset}run: {INSTALL}")


def ensure_backend() -> str:
    """Return a backend that works; as root on Debian or Ubuntu, install what is missing first.

    Raises:
        ValueError: none works and it cannot be installed from here; the message has the one command to run.
    """
    try:
        return select_backend()
    except ValueError:
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            raise
    print(f"no OpenGL backend renders here; running: {INSTALL}", flush=True)
    quiet = {"stdout": subprocess.DEVNULL, "env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}}
    subprocess.run(["apt-get", "update", "-q"], **quiet)
    subprocess.run(["apt-get", "install", "-y", "-q", *PACKAGES], **quiet)
    return select_backend()
