"""Whether an encoded image is what SHARDS.md says, by its header alone: nothing is decoded."""

from __future__ import annotations

import io
import warnings

from PIL import Image

from builder.index import ImageFormat
from builder.recipe import Codec

_FORMATS = {"webp": "WEBP", "png": "PNG", "jpeg": "JPEG"}
_VP8L_SIGNATURE = 0x2F


def image_fault(data: bytes, codec: Codec, image: ImageFormat) -> str:
    """Why `data` is no image of this codec, size and mode, or an empty string."""
    if codec == "webp":
        return _webp_fault(data, image.size_px)
    return _pillow_fault(data, codec, image.size_px, "L" if image.channels == 1 else "RGB")


def _webp_fault(data: bytes, size_px: int) -> str:
    """By hand: Pillow allocates the whole picture when it opens a WebP, slower than SHA-256 is."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return "not a WebP"
    stated = int.from_bytes(data[4:8], "little") + 8
    if stated != len(data):
        return f"WebP of {stated} bytes by its header, found {len(data)}"
    kind = data[12:16]
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        if data[20] != _VP8L_SIGNATURE or bits >> 29:
            return "not a lossless WebP"
        if bits >> 28 & 1:
            return "WebP with transparency"
    elif kind == b"VP8X":  # with a colour profile, as some photographs have
        width = int.from_bytes(data[24:27], "little") + 1
        height = int.from_bytes(data[27:30], "little") + 1
    else:
        return f"not a lossless WebP (chunk {kind!r})"
    if (width, height) != (size_px, size_px):
        return _size_fault(width, height, size_px)
    return "" if kind == b"VP8L" else _pillow_fault(data, "webp", size_px, "RGB")


def _pillow_fault(data: bytes, codec: Codec, size_px: int, mode: str) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=(_FORMATS[codec],)) as image:
                if image.size != (size_px, size_px):
                    return _size_fault(*image.size, size_px)
                if image.mode != mode:
                    return f"mode {image.mode}, expected {mode}"
                frames = getattr(image, "n_frames", 1)
                return "" if frames == 1 else f"{frames} frames"
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        return "more than 89 million pixels"
    except (OSError, ValueError, SyntaxError, EOFError):  # what Pillow raises for damaged headers
        return f"not readable as {_FORMATS[codec]}"


def _size_fault(width: int, height: int, size_px: int) -> str:
    return f"{width} x {height} pixels, expected {size_px} x {size_px}"
