"""Frames -> mp4, with PyAV: no system ffmpeg needed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from jaxtyping import UInt8


def write_mp4(path: Path, frames: Sequence[UInt8[np.ndarray, "h w 3"]], fps: int) -> None:
    """Write RGB frames of one even size as H.264 in yuv420p, which every browser plays."""
    height, width, _ = frames[0].shape
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": "20", "threads": "1"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
