"""The Zarr v3 codec `imagecodecs_jpeg` over simplejpeg, so that zarr-python opens stores with codec=jpeg.

Import this module once before opening such a store with zarr-python; an installed imagecodecs-zarr does as well (same
id, same configuration keys). Dita's own reader needs neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import simplejpeg
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer
from zarr.registry import register_codec

from dita.datasets.shards import decode_jpeg


@dataclass(frozen=True)
class Jpeg(ArrayBytesCodec):
    """Encode a chunk of one RGB frame, uint8 [1, h, w, 3], as a JPEG file."""

    is_fixed_size = False
    level: int  # quality, 1..100
    subsampling: str  # "444", "422" or "420"

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Build from the codec's JSON metadata."""
        return cls(**data["configuration"])

    def to_dict(self) -> dict[str, Any]:
        """Return the codec's JSON metadata."""
        return {
            "name": "imagecodecs_jpeg",
            "configuration": {"level": self.level, "subsampling": self.subsampling},
        }

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Refuse: a JPEG has no fixed size."""
        raise NotImplementedError

    async def _encode_single(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        frame = chunk_array.as_numpy_array().reshape(chunk_spec.shape[1:])
        jpeg = simplejpeg.encode_jpeg(frame, self.level, "RGB", self.subsampling)
        return chunk_spec.prototype.buffer.from_bytes(jpeg)

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        frame = decode_jpeg(chunk_bytes.to_bytes())
        return chunk_spec.prototype.nd_buffer.from_numpy_array(frame.reshape(chunk_spec.shape))


register_codec("imagecodecs_jpeg", Jpeg)
