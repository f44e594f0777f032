"""Datasets of other formats -> our store; nothing here imports a format's library until an input is opened."""

from __future__ import annotations

import importlib
from types import ModuleType

# source -> the module that holds `open_source(path, embodiment, options)` and `OPTIONS`; contract: base.py
SOURCES = {
    "robomimic": "dita.datasets.convert.robomimic",
    "lerobot": "dita.datasets.convert.lerobot",
    "rlds": "dita.datasets.convert.rlds",
    "aloha": "dita.datasets.convert.aloha",
    "diffusion_policy": "dita.datasets.convert.diffusion_policy",
    "mcap": "dita.datasets.convert.mcap",
}


def load_source(name: str) -> ModuleType:
    """Import the module of one source.

    Raises:
        ValueError: no such source, or a package it needs is not installed.
    """
    if name not in SOURCES:
        raise ValueError(f"unknown source {name!r}; there are: {', '.join(SOURCES)}")
    try:
        return importlib.import_module(SOURCES[name])
    except ModuleNotFoundError as e:
        raise ValueError(f"source {name} needs the package {e.name}: pip install 'dita[convert]'") from None
