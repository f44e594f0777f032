"""Episode filters: which episodes of a store training leaves out, and why. The doctor writes them; people may too.

{"version": 1, "stores": {"data/demo.zarr": {"metaworld/reach-v3/seed=3": ["E_LAG"]}}}
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dita.checkpoint import read_json
from dita.datasets.store import Store
from dita.embodiment import canonical_json

VERSION = 1


def write_filter(path: Path, stores: Mapping[str, Mapping[str, Iterable[str]]]) -> None:
    """Write store -> source -> codes."""
    plain = {store: {source: list(codes) for source, codes in out.items()} for store, out in stores.items()}
    path.write_text(canonical_json({"version": VERSION, "stores": plain}) + "\n")


def read_filter(path: str | Path, store: Store) -> dict[str, list[str]]:
    """Return source -> codes of the episodes that a filter leaves out of a store.

    The store is found in the filter by its path, or, where it was moved, by its folder's name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no filter, is not about this store, or names episodes that the store does not have.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no filter at {path}; `dita inspect {store.path} --doctor` writes one")
    values = read_json(path)
    stores: Any = values.get("stores")
    if values.get("version") != VERSION or not _is_filter(stores):
        raise ValueError(
            f'{path} is no filter: expected {{"version": {VERSION}, "stores": {{store: {{source: [code]}}}}}}'
        )
    same = [s for s in stores if _place(s) == _place(str(store.path))]
    same = same or [s for s in stores if Path(s).name == store.name]
    if len(same) != 1:
        raise ValueError(f"{path} is about {', '.join(sorted(stores)) or 'no store'}, not about {store.path}")
    out = stores[same[0]]
    unknown = sorted(out.keys() - {e.source for e in store.episodes})
    if unknown:
        raise ValueError(
            f"{path} leaves out {len(unknown)} episodes that {store.path} does not have: {', '.join(unknown[:3])}; "
            "run `dita inspect --doctor` on this store again"
        )
    return out


def _place(path: str) -> str:
    """Return what names a store whichever way it was written: a URL as it is, a folder resolved."""
    return path.rstrip("/") if "://" in path else str(Path(path).resolve())


def kept(store: Store, filter: str | None) -> tuple[int, ...]:
    """Return the numbers of the episodes that a filter keeps; all without one.

    Raises:
        FileNotFoundError, ValueError: as `read_filter`, or nothing is left.
    """
    if filter is None:
        return tuple(range(len(store.episodes)))
    out = read_filter(filter, store)
    numbers = tuple(i for i, e in enumerate(store.episodes) if e.source not in out)
    if not numbers:
        raise ValueError(f"{filter} leaves no episode of {store.path}; correct what it names and run the doctor again")
    return numbers


def filter_hash(path: str) -> str:
    """Hash a filter's content, however it is written."""
    return hashlib.sha256(canonical_json(read_json(Path(path))).encode()).hexdigest()


def _is_filter(stores: object) -> bool:
    return isinstance(stores, dict) and all(
        isinstance(out, dict) and all(isinstance(codes, list) for codes in out.values()) for out in stores.values()
    )
