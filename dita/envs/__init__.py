"""Simulated suites behind one interface; nothing here imports mujoco until an environment is made."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING

from dita.config import EnvConfig
from dita.envs import gl

if TYPE_CHECKING:
    from dita.envs.base import RobotEnv

# suite -> the module that holds `make(config, task) -> RobotEnv`, `TASKS` and INSTRUCTIONS by task; maybe PARAPHRASES,
# several by task, and `swapped(task)`
SUITES = {
    "aloha": "dita.envs.aloha",
    "choice": "dita.envs.choice",
    "fetch": "dita.envs.fetch",
    "libero": "dita.envs.libero",
    "metaworld": "dita.envs.metaworld",
    "robosuite": "dita.envs.robosuite",
}
# suite -> what installs its package
INSTALL = {
    **{suite: "pip install 'dita[sim]'" for suite in ("aloha", "fetch", "robosuite")},
    "metaworld": "pip install 'dita[sim-core]'",
    # its robosuite 1.4 is not the 1.5 of dita[sim]
    "libero": "python3.11 -m venv .venv-libero, an environment of its own, and then the pip lines of docs/libero.md",
}


def make(config: EnvConfig, task: str) -> RobotEnv:
    """Build the environment of one task.

    Raises:
        ValueError: unknown suite, task or embodiment (with what exists), or no OpenGL backend works.
    """
    return suite_module(config.suite).make(config, task)


def check_tasks(config: EnvConfig) -> None:
    """Refuse unknown suites and tasks, and a machine that cannot render, before anything is written or started.

    Raises:
        ValueError: with what exists, or with what to install.
    """
    known = suite_module(config.suite).TASKS
    for task in config.tasks:
        expect_known("task", task, known)
    if not config.tasks or len(set(config.tasks)) < len(config.tasks):
        raise ValueError(f"env.tasks must name at least one task, none twice; got {list(config.tasks)}")


def expect_known(kind: str, name: str, known: Iterable[str]) -> None:
    """Raise a ValueError that says the nearest names, or all, unless `name` is among `known`."""
    names = sorted(known)
    if name in names:
        return
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? ({len(names)} exist)" if near else f"there are: {', '.join(names)}"
    raise ValueError(f"unknown {kind} {name!r}; {hint}")


def suite_module(name: str) -> ModuleType:
    """Import a suite.

    Raises:
        ValueError: it does not exist, its package is not installed, or no OpenGL backend works.
    """
    expect_known("suite", name, SUITES)
    gl.select_backend()
    try:
        return importlib.import_module(SUITES[name])
    except ModuleNotFoundError as e:
        raise ValueError(f"suite {name} needs the package {e.name}: {INSTALL[name]}") from None
