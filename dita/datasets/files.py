"""The files of a store, on a local disk or behind s3://, gs://, http:// and https://: one small seam, two sides.

Remote ones are read through obstore, whose credentials, region and endpoint come
from the environment only (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION, AWS_ENDPOINT_URL,
GOOGLE_APPLICATION_CREDENTIALS, ...); what a server answers is never echoed, since it may quote them. Neither side
writes.
"""

from __future__ import annotations

import hashlib
import logging
import mmap
import os
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar
from urllib.parse import unquote, urlsplit

import numpy as np

from dita.datasets.shards import StoreError

SCHEMES = ("s3", "gs", "http", "https")
CLIENT = {"connect_timeout": "5s", "timeout": "60s", "allow_http": True}  # http only where an endpoint says so
RETRY = {"max_retries": 4, "retry_timeout": timedelta(seconds=60)}
PARALLEL = 16  # requests at once while opening
RESIDENT = 512 * 2**20  # [bytes] of files that may stay mapped whole; of more, pages are given back
GIVE_BACK = 32  # pieces read between two files whose pages are given back
WHOLE_FILES = 4  # kept of a server that cannot send parts
REASONS = {  # words of an error -> what we say
    "Connection refused": "connection refused",
    "dns error": "the host name is not known",
    "TimedOut": "timed out",
    "timed out": "timed out",
}
T, U = TypeVar("T"), TypeVar("U")

log = logging.getLogger(__name__)


def open_files(path: str | Path) -> LocalFiles | RemoteFiles:
    """Return the files under a folder or URL.

    Raises:
        ValueError: a scheme we do not read, or a URL that carries credentials or a query.
        ImportError: a remote store without the extra `remote`.
    """
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", str(path))
    if scheme is None:
        return LocalFiles(Path(path))
    if scheme[1] not in SCHEMES:
        raise ValueError(f"no stores behind {scheme[1]}://; a store is a local folder or {'://, '.join(SCHEMES)}://")
    parts = urlsplit(str(path))
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise ValueError(
            f"{scheme[1]}://{parts.netloc.rpartition('@')[2]}{parts.path}: a store's address carries no credentials or "
            "query; put credentials into the environment"
        )
    try:
        import obstore  # noqa: F401
    except ImportError:
        raise ImportError("remote stores need obstore: pip install 'dita[remote]'") from None
    return RemoteFiles(str(path).rstrip("/"))


@dataclass(frozen=True, eq=False)
class LocalFiles:
    """The files under a folder."""

    root: Path

    def at(self, name: str) -> Path:
        """Name a file for people."""
        return self.root / name

    def exists(self) -> bool:
        """Say whether anything is there."""
        return self.root.exists()

    def names(self, folder: str) -> list[str]:
        """Return the names directly inside a folder; none where there is no such folder."""
        try:
            return os.listdir(self.root / folder)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def sizes(self, folder: str, names: Iterable[str]) -> dict[str, int | None]:
        """Return the size of each file in a folder or below [bytes]; None where there is none.

        Raises:
            StoreError: E_PATH: a link leads out of the store.
        """
        inside = os.path.realpath(self.root) + os.sep
        sizes: dict[str, int | None] = {}
        for name in names:
            path = self.root / folder / name
            sizes[name] = path.stat().st_size if path.is_file() else None
            if not os.path.realpath(path).startswith(inside):
                raise StoreError(f"E_PATH: {path} is a link that leaves the store; copy the file into it")
        return sizes

    def read(self, name: str) -> bytes:
        """Read a whole file; raise FileNotFoundError where there is none."""
        return (self.root / name).read_bytes()

    def sha256(self, name: str) -> str:
        """Hash a file."""
        with (self.root / name).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def open(self, name: str, tail: int) -> tuple[LocalPieces, bytes]:
        """Open a file to read pieces of it; return its last `tail` bytes along, fewer where it is shorter."""
        with (self.root / name).open("rb") as file:
            pieces = LocalPieces(file.fileno())
        return pieces, pieces.data[-tail:].tobytes()

    def map(self, call: Callable[[T], U], items: Iterable[T]) -> list[U]:
        """Call on each item, in order."""
        return [call(item) for item in items]


class LocalPieces:
    """One file, mapped into memory.

    The pages of a mapping count as this process's memory until the kernel is told otherwise: without that, a loader
    grows by the data set. One file after the other is let go, so that the memory stays level.
    """

    _mapped: ClassVar[weakref.WeakSet[LocalPieces]] = weakref.WeakSet()
    _next: ClassVar[list[weakref.ref[LocalPieces]]] = []  # whose pages are given back next
    _read: ClassVar[int] = 0  # pieces since the last one

    def __init__(self, file: int) -> None:
        """Map an open file."""
        self.size = os.fstat(file).st_size
        self._map = mmap.mmap(file, 0, access=mmap.ACCESS_READ) if self.size else None
        self.data = np.frombuffer(self._map or b"", np.uint8)
        LocalPieces._mapped.add(self)

    def cut(self, pieces: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Return the bytes of each (offset, length), not copied."""
        LocalPieces._read += len(pieces)
        if LocalPieces._read > GIVE_BACK:
            LocalPieces._give_back()
        return [self.data[start : start + length] for start, length in pieces]

    @classmethod
    def _give_back(cls) -> None:
        cls._read = 0
        if not cls._next and sum(mapped.size for mapped in cls._mapped) > RESIDENT:
            cls._next = [weakref.ref(mapped) for mapped in cls._mapped]
        mapped = cls._next.pop()() if cls._next else None
        if mapped is not None and mapped._map is not None:
            mapped._map.madvise(mmap.MADV_DONTNEED)


@dataclass(frozen=True, eq=False)
class RemoteFiles:
    """The files under a URL; pickles as it, and connects anew in each process."""

    root: str

    def __reduce__(self) -> tuple:
        """Leave connections behind."""
        return RemoteFiles, (self.root,)

    def at(self, name: str) -> str:
        """Name a file for people."""
        return f"{self.root}/{name}"

    def exists(self) -> bool:
        """Say whether anything is there."""
        return bool(self.names(""))

    def names(self, folder: str) -> list[str]:
        """Return the names directly inside a folder; none where there is no such folder.

        HTTP knows no listing: there the links of the folder's index page count, if the server makes one.
        """
        import obstore

        try:
            with self._errors(folder):
                if not self.root.startswith("http"):
                    found = obstore.list_with_delimiter(self._store, folder)
                    return [p.rpartition("/")[2] for p in (*found["common_prefixes"], *_paths(found["objects"]))]
                page = bytes(obstore.get(self._store, folder).bytes()).decode(errors="replace")
        except FileNotFoundError:
            return []
        return [unquote(link.rstrip("/")) for link in re.findall(r"href=[\"']([^\"'?#]+)", page)]

    def sizes(self, folder: str, names: Iterable[str]) -> dict[str, int | None]:
        """Return the size of each file in a folder or below [bytes]; None where there is none."""
        import obstore

        names = list(names)
        if self.root.startswith("http"):
            return dict(zip(names, self.map(lambda name: self._size(f"{folder}/{name}"), names), strict=True))
        with self._errors(folder):
            found = {o["path"]: o["size"] for part in obstore.list(self._store, folder) for o in part}
        return {name: found.get(f"{folder}/{name}") for name in names}

    def read(self, name: str) -> bytes:
        """Read a whole file; raise FileNotFoundError where there is none."""
        import obstore

        with self._errors(name):
            return bytes(obstore.get(self._store, name).bytes())

    def sha256(self, name: str) -> str:
        """Hash a file."""
        import obstore

        digest = hashlib.sha256()
        with self._errors(name):
            for part in obstore.get(self._store, name).stream():
                digest.update(part)
        return digest.hexdigest()

    def open(self, name: str, tail: int) -> tuple[RemotePieces, bytes]:
        """Open a file to read pieces of it; return its last `tail` bytes along, fewer where it is shorter."""
        import obstore
        from obstore.exceptions import BaseError

        with self._errors(name):
            try:
                found = obstore.get(self._store, name, options={"range": {"suffix": tail}})
                return RemotePieces(self, name, found.meta["size"], False), bytes(found.bytes())
            except BaseError as e:
                if "RangeNotSupported" not in str(e) and "NotPartial" not in str(e):
                    raise
                data = self._whole(name)
                return RemotePieces(self, name, len(data), True), data[-tail:]

    def cut(self, name: str, pieces: Sequence[tuple[int, int]], whole: bool) -> list[np.ndarray]:
        """Return the bytes of each (offset, length) of a file, in as few requests as their distances allow."""
        import obstore

        starts, lengths = [p[0] for p in pieces], [p[1] for p in pieces]
        with self._errors(name):
            if not whole:
                found = obstore.get_ranges(self._store, name, starts=starts, lengths=lengths)
                return [np.frombuffer(part, np.uint8) for part in found]  # pyright: ignore
            data = np.frombuffer(self._whole(name), np.uint8)
            return [data[start : start + length] for start, length in pieces]

    def map(self, call: Callable[[T], U], items: Iterable[T]) -> list[U]:
        """Call on each item, several at once; results in order."""
        with ThreadPoolExecutor(PARALLEL) as pool:
            return list(pool.map(call, items))

    @cached_property
    def _store(self) -> Any:
        from obstore.store import from_url

        try:
            return from_url(self.root, client_options=CLIENT, retry_config=RETRY)  # pyright: ignore
        except Exception:
            raise ValueError(f"{self.root}: not an address, or AWS_* / GOOGLE_* variables that do not fit") from None

    @cached_property
    def _whole(self) -> Callable[[str], bytes]:
        log.warning("%s: the server sends whole files only; slow, unless with data.cache=ram", self.root)
        return lru_cache(WHOLE_FILES)(self.read)

    def _size(self, name: str) -> int | None:
        import obstore

        try:
            with self._errors(name):
                return obstore.head(self._store, name)["size"]
        except FileNotFoundError:
            return None

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        from obstore.exceptions import BaseError

        try:
            yield
        except (BaseError, OSError) as e:
            raise self._explain(name, e) from None

    def _explain(self, name: str, error: Exception) -> Exception:
        text = str(error)
        status = re.search(r"status code: (\d+)", text)
        code = status[1] if status else ""
        if isinstance(error, FileNotFoundError) or code == "404":  # a bucket that is not there, too
            return FileNotFoundError(f"{self.at(name)} does not exist")
        if code in ("401", "403") or "169.254.169.254" in text or isinstance(error, PermissionError):
            return StoreError(
                f"E_DENIED: {self.at(name)}: access refused; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
                "GOOGLE_APPLICATION_CREDENTIALS, or AWS_SKIP_SIGNATURE=true for what is public"
            )
        if code == "416":
            return StoreError(f"E_TRUNCATED: {self.at(name)}: shorter than when it was opened")
        reasons = (say for word, say in REASONS.items() if word in text)
        reason = f"the server answered {code}" if code else next(reasons, "the request failed")
        return StoreError(f"E_NETWORK: {self.at(name)}: {reason}; check the address, the network and AWS_ENDPOINT_URL")


@dataclass(frozen=True, eq=False)
class RemotePieces:
    """One remote file; each cut is one or few requests."""

    files: RemoteFiles
    name: str
    size: int
    whole: bool  # the server cannot send parts

    def cut(self, pieces: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Return the bytes of each (offset, length)."""
        return self.files.cut(self.name, pieces, self.whole)


def _paths(objects: Any) -> Iterator[str]:
    return (entry["path"] for entry in objects)
