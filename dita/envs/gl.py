"""Choose an OpenGL backend that works on this machine, before anything imports mujoco."""

from __future__ import annotations

import os
import subprocess
import sys

BACKENDS = ("egl", "osmesa")
INSTALL = "apt-get install -y libegl1 libgl1  (or, without EGL: libosmesa6 libgl1)"
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
    """Set MUJOCO_GL to the first backend that renders and return it; a value that is already set is kept.

    Worker processes inherit the choice, so the probe runs once.

    Raises:
        ValueError: mujoco was imported without MUJOCO_GL (it binds its backend then), or no backend works.
    """
    # Mesa's software rasteriser: one process per environment already fills the cores (7.0 -> 6.1 ms a frame)
    os.environ.setdefault("LP_NUM_THREADS", "0")
    if chosen := os.environ.get("MUJOCO_GL"):
        return chosen
    if "mujoco" in sys.modules:
        raise ValueError("mujoco was imported before dita chose an OpenGL backend; set MUJOCO_GL=egl (or osmesa)")
    for backend in BACKENDS:
        if works(backend):
            os.environ["MUJOCO_GL"] = backend
            return backend
    raise ValueError(f"no OpenGL backend renders here (tried {', '.join(BACKENDS)}); run: {INSTALL}")
