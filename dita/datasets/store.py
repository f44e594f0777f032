"""Episodes of a sealed store: read without zarr-python, checked at every step.

`dita.datasets.segments` is the format, `dita.datasets.writer` writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64, UInt8

from dita.datasets.files import open_files
from dita.datasets.segments import Files, Segment, read_root, sealed_segments, staged_episodes
from dita.datasets.shards import StoreError
from dita.datasets.writer import StoreWriter
from dita.types import EpisodeSpec

__all__ = ["Store", "StoreError", "StoreWriter"]

Progress = Callable[[int, int], None]  # (done, total)


class Store:
    """Read a sealed store, on a local disk or behind s3://, gs://, http:// or https://.

    Opening is cheap: it checks version, schema, lengths and manifests, and the size of every file. Each chunk is
    checked when it is read; `verify` checks every byte. A store pickles without its open files and opens them anew in
    each process; segments sealed meanwhile stay out, so that episode numbers keep their meaning.
    """

    def __init__(self, path: str | Path, segments: Sequence[str] | None = None) -> None:
        """Open the store at a folder or URL, or only the named segments of it.

        Raises:
            FileNotFoundError: nothing is there.
            StoreError: E_SCHEMA (not a store, or a field is not as the format says), E_VERSION (newer format),
                E_UNSEALED (no sealed segment), E_LENGTH, E_CHUNK_MISSING, E_TRUNCATED, E_CHECKSUM, E_PATH; remote:
                E_NETWORK, E_DENIED.
        """
        self.files = open_files(path)
        self.path: Path | str = self.files.root
        root = read_root(self.files)
        self.attributes, self.spec = root.attributes, root.spec
        ids = sealed_segments(self.files) if segments is None else list(segments)
        if not ids:
            raise _nothing_sealed(self.files)
        self._segments = self.files.map(lambda segment: Segment(self.files, segment, root), ids)
        self._by_episode = [(s, entry) for s in self._segments for entry in s.episodes]
        self.episodes: tuple[EpisodeSpec, ...] = tuple(
            EpisodeSpec(
                store=str(self.path),
                segment=segment.id,
                dt=1 / self.spec.control_hz,
                embodiment=self.spec.name,
                **entry,
            )
            for segment, entry in self._by_episode
        )

    @property
    def name(self) -> str:
        """Last part of the path or URL."""
        return str(self.path).rstrip("/").rpartition("/")[2]

    @property
    def segments(self) -> tuple[str, ...]:
        """Ids of the open segments."""
        return tuple(s.id for s in self._segments)

    @property
    def codecs(self) -> tuple[str, ...]:
        """Image codecs in use, "raw" or "jpeg"."""
        return tuple(sorted({s.codec for s in self._segments}))

    @property
    def dt(self) -> float:
        """Time between frames [s]."""
        return 1 / self.spec.control_hz

    def length(self, episode: int) -> int:
        """Return the number of frames of an episode."""
        return self.episodes[episode].stop - self.episodes[episode].start

    def read_frames(self, episode: int, camera: str, frames: Sequence[int]) -> UInt8[np.ndarray, "t h w 3"]:
        """Read frames of one camera by their index in the episode; one may be asked for twice.

        Raises:
            ValueError: no such camera, or an index outside the episode.
            StoreError: E_CHUNK_MISSING, E_CHECKSUM, E_TRUNCATED, with file, episode and frame.
        """
        segment, entry = self._by_episode[episode]
        start, length = entry["start"], entry["stop"] - entry["start"]
        if min(frames, default=0) < 0 or max(frames, default=0) >= length:
            raise ValueError(f"episode {episode} has frames 0..{length - 1}, asked for {list(frames)}")
        return segment.reader(f"images/{camera}").read([start + i for i in frames])

    def state(self, episode: int) -> Float32[np.ndarray, "m s"]:
        """Return the state at every frame of an episode, SI, as the embodiment's fields; read-only."""
        return self._low_dim(episode, "state")

    def action(self, episode: int) -> Float32[np.ndarray, "m a"]:
        """Return the action taken at every frame of an episode, SI, as the embodiment's fields; read-only."""
        return self._low_dim(episode, "action")

    def stamp(self, episode: int) -> Float64[np.ndarray, "m"]:
        """Return the stamp of every frame of an episode [s]; read-only."""
        return self._low_dim(episode, "stamp")

    def verify(self, progress: Progress | None = None) -> int:
        """Check every byte against the manifests; return how many bytes that were.

        Raises:
            StoreError: the first fault: E_CHUNK_MISSING, E_TRUNCATED or E_CHECKSUM, with file, episode and frame.
        """
        total, done = sum(s.bytes for s in self._segments), 0
        for segment in self._segments:
            for size in segment.verify():
                done += size
                if progress is not None:
                    progress(done, total)
        return done

    def _low_dim(self, episode: int, name: str) -> np.ndarray:
        segment, entry = self._by_episode[episode]
        return getattr(segment, name)[entry["start"] : entry["stop"]]


def _nothing_sealed(files: Files) -> StoreError:
    staged = len(staged_episodes(files))
    if staged:
        what = (
            f"{staged} staged episodes but no sealed segment: run the command that wrote it with --resume to seal them"
        )
    else:
        what = "no episodes"
    return StoreError(f"E_UNSEALED: {files.root} has {what}")
