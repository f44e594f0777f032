"""JPEG and PNG pictures of other formats -> RGB frames; the header's size is checked before anything is decoded."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from dita.datasets.convert.base import Rejected, check_pixels
from dita.datasets.shards import import_simplejpeg

JPEG, PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
ADVICE = "restore the file from a copy, or remove the episode"


def picture_size(data: bytes | memoryview, file: str | Path, key: str) -> tuple[int, int]:
    """Return (height, width) from the header of a JPEG or PNG.

    Raises:
        Rejected: E_SCHEMA: neither, or a damaged header; E_PATH: too large to be a frame.
    """
    head = bytes(data[:33])
    if head.startswith(PNG) and head[12:16] == b"IHDR" and len(head) == 33:
        width, height = struct.unpack(">II", head[16:24])
    elif head.startswith(JPEG):
        try:
            height, width, _, _ = import_simplejpeg().decode_jpeg_header(data)
        except ValueError as e:
            raise Rejected("E_SCHEMA", file, "", key, "a JPEG picture", str(e), ADVICE) from None
    else:
        found = f"{len(data)} bytes beginning {head[:8].hex() or 'with nothing'}"
        raise Rejected("E_SCHEMA", file, "", key, "a JPEG or PNG picture", found, ADVICE)
    check_pixels(width, height, file, key)
    return height, width


def decode_picture(data: bytes | memoryview, file: str | Path, key: str) -> UInt8[np.ndarray, "h w 3"]:
    """Decode a JPEG or an 8-bit RGB PNG as it is: no rotation, no resize, no colour management.

    Raises:
        Rejected: E_SCHEMA: neither, damaged, or another pixel type; E_PATH: too large to be a frame.
    """
    height, width = picture_size(data, file, key)
    try:
        decode = _decode_jpeg if bytes(data[:3]) == JPEG else _decode_png
        frame = decode(bytes(data))
    except (ValueError, OSError, SyntaxError) as e:  # Pillow reports broken PNG chunks as SyntaxError
        raise Rejected("E_SCHEMA", file, "", key, "a picture that decodes", str(e), ADVICE) from None
    if frame.shape != (height, width, 3):
        expected = f"{width} x {height} RGB as the header says"
        raise Rejected("E_SCHEMA", file, "", key, expected, f"{list(frame.shape)}", ADVICE)
    return frame


def _decode_jpeg(data: bytes) -> np.ndarray:
    return import_simplejpeg().decode_jpeg(data, "RGB")


def _decode_png(data: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=["PNG"]) as image:
        if image.mode != "RGB":
            raise ValueError(f"a PNG of mode {image.mode}; 8-bit RGB is what a camera gives")
        return np.asarray(image)
