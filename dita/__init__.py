"""Dita: a generalist Transformer diffusion policy for robots (arXiv 2503.19757).

Importing this package imports nothing heavy: `DitaPolicy` is resolved on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_LAZY = {
    "DitaPolicy": "dita.policy.policy",
    "RawObservation": "dita.types",
    "ActionChunk": "dita.types",
    "EmbodimentSpec": "dita.types",
    "load_embodiment": "dita.embodiment",
}

if TYPE_CHECKING:
    from dita.embodiment import load_embodiment
    from dita.policy.policy import DitaPolicy
    from dita.types import ActionChunk, EmbodimentSpec, RawObservation

__all__ = ["ActionChunk", "DitaPolicy", "EmbodimentSpec", "RawObservation", "__version__", "load_embodiment"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'dita' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_LAZY[name]), name)
