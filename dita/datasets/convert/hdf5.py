"""Read HDF5 without being led out of the file: no links, no external storage, no strings, no unwritten chunk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dita.datasets.convert.base import Rejected, check_inside, check_size

FILTERS = {1: "gzip", 2: "shuffle", 3: "fletcher32", 4: "szip", 32000: "lzf"}  # built into h5py; others load plugins
SIGNATURE = b"\x89HDF\r\n\x1a\n"
RESTORE = "restore the file from a copy, or remove it"


def open_file(path: Path, root: Path) -> h5py.File:
    """Open one file of the input for reading.

    Raises:
        Rejected: E_PATH (a link out of the input), E_TRUNCATED, E_SCHEMA (not HDF5).
    """
    check_inside(root, path)
    if path.stat().st_size == 0:
        raise Rejected("E_TRUNCATED", path, "", "", "an HDF5 file", "0 bytes", RESTORE)
    with path.open("rb") as file:
        signature = file.read(len(SIGNATURE))
    try:
        return h5py.File(path, "r", locking=False)  # read-only and network file systems cannot lock
    except OSError as e:
        cut = signature == SIGNATURE and "truncated" in str(e)
        code = "E_TRUNCATED" if cut else "E_SCHEMA" if signature != SIGNATURE else "E_CHECKSUM"
        found = str(e) if signature == SIGNATURE else f"a file that begins with {signature!r}"
        raise Rejected(code, path, "", "", "an HDF5 file", found, RESTORE) from None


@contextmanager
def refused_when_damaged(path: Path) -> Iterator[None]:
    """Turn what h5py says about a damaged file into E_CHECKSUM."""
    try:
        yield
    except Rejected:
        raise
    except (OSError, RuntimeError, KeyError, TypeError, ValueError, OverflowError) as e:
        found = f"{type(e).__name__}: {e}"
        raise Rejected("E_CHECKSUM", path, "", "", "a readable HDF5 file", found, RESTORE) from None


def group(parent: h5py.Group, name: str) -> h5py.Group:
    """Return a group below `parent`; raises as `member`."""
    return member(parent, name, h5py.Group)


def names(parent: h5py.Group) -> list[str]:
    """Return the names in a group."""
    return [str(name) for name in parent]


def member(parent: h5py.Group, name: str, kind: type) -> Any:
    """Return parent/name (one step, or several by "/"), which must be a plain member of this file.

    Raises:
        Rejected: E_KEY (with what exists), E_LINK (soft or external), E_SCHEMA (another kind of object).
    """
    found: Any = parent
    wanted = kind.__name__.lower()
    for step in name.split("/"):
        file, where = parent.file.filename, f"{str(found.name).rstrip('/')}/{step}"
        if not isinstance(found, h5py.Group):
            raise Rejected("E_SCHEMA", file, "", str(found.name), "a group", type(found).__name__, RESTORE)
        link = found.get(step, getlink=True)
        if link is None:
            have = ", ".join(names(found)[:12]) or "nothing"
            raise Rejected("E_KEY", file, "", where, f"a {wanted}", f"only {have}", "correct or remove it")
        if not isinstance(link, h5py.HardLink):
            target = f"{getattr(link, 'filename', '')}:{getattr(link, 'path', '?')}"
            what = "an external link" if isinstance(link, h5py.ExternalLink) else "a soft link"
            todo = "links are not followed: copy what they point to into the file (h5repack, h5copy)"
            raise Rejected("E_LINK", file, "", where, f"a {wanted} of this file", f"{what} to {target}", todo)
        found = found[step]
    if not isinstance(found, kind):
        have = type(found).__name__.lower()
        raise Rejected("E_SCHEMA", parent.file.filename, "", str(found.name), f"a {wanted}", have, RESTORE)
    return found


def dataset(parent: h5py.Group, name: str, kinds: str = "fiub", ndim: int | None = None) -> h5py.Dataset:
    """Return a dataset of numbers that can be read whole: typed, allocated, of a sane size.

    Args:
        parent: where to look.
        name: one or several steps.
        kinds: NumPy kinds that are welcome.
        ndim: number of axes, frames first.

    Raises:
        Rejected: as `member`, and E_DTYPE, E_SCHEMA (axes, filter), E_LINK (external storage, virtual), E_PATH (size),
            E_CHUNK_MISSING: HDF5 reads what was never written as zeros.
    """
    data = member(parent, name, h5py.Dataset)
    file, key = data.file.filename, str(data.name)
    if data.dtype.kind not in kinds:
        found = "strings" if h5py.check_string_dtype(data.dtype) else f"dtype {data.dtype}"
        raise Rejected("E_DTYPE", file, "", key, "numbers", found, "correct or remove the episode")
    if data.is_virtual or data.external:
        what = "a virtual dataset" if data.is_virtual else "data in another file"
        raise Rejected("E_LINK", file, "", key, "data of this file", what, "copy the data into the file (h5repack)")
    if data.shape is None or (ndim is not None and data.ndim != ndim):
        shape = "nothing" if data.shape is None else list(data.shape)
        raise Rejected("E_SCHEMA", file, "", key, f"{ndim} axes", f"{shape}", "correct or remove the episode")
    plist = data.id.get_create_plist()
    for i in range(plist.get_nfilters()):
        number, _, _, label = plist.get_filter(i)
        if number not in FILTERS:
            found = f"filter {number} ({label.decode(errors='replace')})"
            todo = "rewrite the file with h5repack -f GZIP=4"
            raise Rejected("E_SCHEMA", file, "", key, f"filters {', '.join(FILTERS.values())}", found, todo)
    stored = data.id.get_storage_size()
    check_size(data.shape, data.dtype.itemsize, file, key, stored)
    _check_allocated(data, stored)
    return data


def read(data: h5py.Dataset) -> np.ndarray:
    """Read a dataset that `dataset` returned.

    Raises:
        Rejected: E_CHECKSUM: damaged (gzip, fletcher32 or the index say so).
    """
    try:
        return data[()]
    except (OSError, RuntimeError) as e:
        raise Rejected("E_CHECKSUM", data.file.filename, "", str(data.name), "readable data", str(e), RESTORE) from None


def _check_allocated(data: h5py.Dataset, stored: int) -> None:
    if data.size == 0:
        return
    if data.chunks is None:
        missing, total = int(stored == 0), 1
    else:
        total = int(np.prod([-(-n // c) for n, c in zip(data.shape, data.chunks, strict=True)]))
        missing = total - data.id.get_num_chunks()
    if missing:
        found = f"{missing} of {total} chunks were never written"
        todo = "they would read as zeros: write the file again, or remove the episode"
        raise Rejected("E_CHUNK_MISSING", data.file.filename, "", str(data.name), "all data", found, todo)
