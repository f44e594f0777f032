"""Frames of an mp4 by their time stamps, decoded one after the other through PyAV; a damaged frame is never shown."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from jaxtyping import Float64, UInt8

from dita.datasets.convert.base import Rejected, check_pixels

ADVICE = "record the episode again, or --quarantine to write a new store of the others"


def read_frames(
    path: Path, times: Float64[np.ndarray, "m"], tolerance: float, size: tuple[int, int], key: str, *, whole: bool
) -> UInt8[np.ndarray, "m h w 3"]:
    """Decode the frames of an mp4 at `times`, from the key frame before the first one to the last one.

    Args:
        path: of the file; only what these frames take is held in memory.
        times: [s], increasing.
        tolerance: [s] between a time and its frame.
        size: (height, width) that the frames must have.
        key: for errors.
        whole: the file holds these frames and no more.

    Raises:
        Rejected: E_CHUNK_MISSING; E_TRUNCATED: it ends before its own header says, or a frame is damaged; E_VIDEO: it
            has fewer frames than times or, when `whole`, more; E_STAMP: no frame within the tolerance; E_SCHEMA: no
            video, or another size.
    """

    def no(code: str, expected: str, found: str) -> Rejected:
        return Rejected(code, path, "", key, expected, found, ADVICE)

    if not path.is_file():
        raise no("E_CHUNK_MISSING", "an mp4 file", "none")
    try:
        # the format is named, since a playlist that calls itself mp4 would open other files
        with av.open(str(path.absolute()), format="mp4", metadata_errors="replace") as container:
            if not container.streams.video:
                raise no("E_SCHEMA", "a video", "none")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise no("E_SCHEMA", "a codec that PyAV decodes (AV1, H.264, HEVC)", "another")
            check_pixels(stream.width, stream.height, path, key)
            stream.codec_context.thread_count = 1  # the workers share the cores
            return _decode(container, stream, times, tolerance, size, whole, no)
    except (FFmpegError, OSError) as e:
        raise no("E_TRUNCATED", "an mp4 that decodes", f"{e}") from None


def _decode(
    container: Any,
    stream: Any,
    times: Float64[np.ndarray, "m"],
    tolerance: float,
    size: tuple[int, int],
    whole: bool,
    no: Callable[[str, str, str], Rejected],
) -> UInt8[np.ndarray, "m h w 3"]:
    frames = np.empty((len(times), *size, 3), np.uint8)
    done, end = 0, 0.0
    for at, picture in _pictures(container, stream, float(times[0]), tolerance):
        if done == len(times):
            if not whole:
                break
            raise no("E_VIDEO", f"{done} frames, as rows in the table", f"{max(stream.frames, done + 1)}")
        end = at
        if at < times[done] - tolerance:
            continue
        if picture is None:
            raise no("E_TRUNCATED", f"{len(times)} whole frames", f"{done}, then a damaged one at {at:.6f} s")
        if at > times[done] + tolerance:
            raise no("E_STAMP", f"frame {done} at {times[done]:.6f} s within {tolerance:.2g} s", f"one at {at:.6f} s")
        if (picture.height, picture.width) != size:
            raise no("E_SCHEMA", f"{size[1]} x {size[0]}", f"{picture.width} x {picture.height} at frame {done}")
        frames[done] = picture.to_ndarray(format="rgb24")
        done += 1
    if done < len(times):
        promised = float((stream.duration or 0) * stream.time_base)
        found = f"{done}, the last at {end:.6f} s"
        if promised > times[done] + tolerance:
            raise no("E_TRUNCATED", f"{len(times)} frames", f"{found}; its header promises {promised:.6f} s")
        raise no("E_VIDEO", f"{len(times)} frames, as rows in the table", found)
    return frames


def _pictures(container: Any, stream: Any, start: float, tolerance: float) -> Iterator[tuple[float, Any]]:
    """Yield (time [s], frame, None where it is damaged) from the key frame before `start` on."""
    if start > tolerance:
        container.seek(int((start - tolerance) / stream.time_base), stream=stream)
        decoded = _demux(container, stream)
        head = next(decoded, None)
        if head is not None and head[0] <= start + tolerance:
            yield head
            yield from decoded
            return
        container.seek(0, stream=stream)  # an index that leads too far
    yield from _demux(container, stream)


def _demux(container: Any, stream: Any) -> Iterator[tuple[float, Any]]:
    for packet in container.demux(stream):
        if packet.size and packet.is_corrupt:
            yield float((packet.pts or 0) * stream.time_base), None
            return
        for picture in packet.decode():
            yield float(picture.time or 0.0), None if picture.is_corrupt else picture
