"""Photographs in, encoded 8-bit images out, and back: every use of Pillow for pixels."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from builder.artifacts import sha256_of
from builder.recipe import Codec

MAX_FILE_BYTES = 2**30
# What Pillow raises for bytes that are no picture, or too large a one.
UNDECODABLE = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


class Prepared(NamedTuple):
    """A photograph made ready: its file's hash and its pixels encoded, or a fault.

    `encoded` is empty where the photograph was only examined.
    """

    sha256: str
    encoded: bytes
    fault: str


class Unusable(Exception):
    """Why a photograph cannot be used, in words for a report."""


def prepare_normal(path: Path, size_px: int, channels: int) -> Prepared:
    """Read, turn upright, convert to grey or RGB, and resize (Lanczos, aspect not kept).

    16-bit grey is divided by 257. Rejected, with the reason: what cannot be read, files over
    1 GiB, more than 89 million pixels, several frames, transparency, 32-bit pixels.
    """
    try:
        return prepare_bytes(read_photograph(path), size_px, channels)
    except Unusable as fault:
        return Prepared("", b"", str(fault))


def read_photograph(path: Path) -> bytes:
    """A photograph's file; raises Unusable."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise Unusable("larger than 1 GiB")
        return path.read_bytes()
    except OSError as error:
        raise Unusable(f"unreadable ({error})".replace("\n", " ")) from None


def prepare_bytes(data: bytes, size_px: int, channels: int, codec: Codec = "webp") -> Prepared:
    """The same as `prepare_normal` for the bytes of a photograph's file; raises Unusable."""
    image = _upright(data, channels)
    image = image.resize((size_px, size_px), Image.Resampling.LANCZOS)
    return Prepared(sha256_of(data), encode(image, codec), "")


def examine_bytes(data: bytes, channels: int) -> Prepared:
    """Hash and decode alone: what `prepare_bytes` would reject raises Unusable here too."""
    _upright(data, channels)
    return Prepared(sha256_of(data), b"", "")


def _upright(data: bytes, channels: int) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as opened:
                _refuse_ambiguous(opened)
                return _to_8_bit(ImageOps.exif_transpose(opened), "L" if channels == 1 else "RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise Unusable("more than 89 million pixels") from None
    except UnidentifiedImageError:
        raise Unusable("not an image") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise Unusable(f"unreadable ({error})".replace("\n", " ")) from None


def _refuse_ambiguous(image: Image.Image) -> None:
    if getattr(image, "n_frames", 1) > 1:
        raise ValueError("several frames; which one is the photograph?")
    if image.has_transparency_data:
        alpha = image.convert("RGBA").getchannel("A")
        if alpha.getextrema() != (255, 255):
            raise ValueError("transparent pixels have no known colour")


def _to_8_bit(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip at 255
        grey = np.asarray(image, np.uint16)
        image = Image.fromarray(((grey.astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of 32 bit (mode {image.mode}) have no known range")
    return image.convert(mode)


# What each codec is told. WebP method 0, quality 0 means lossless with the least effort.
_ENCODER: dict[str, dict[str, Any]] = {
    "webp": {"format": "WEBP", "lossless": True, "method": 0, "quality": 0},
    "png": {"format": "PNG", "compress_level": 1},
    "jpeg": {"format": "JPEG", "quality": 95, "subsampling": 0},
}


def encode(image: Image.Image, codec: str) -> bytes:
    """The bytes of an 8-bit grey or RGB image in the given codec."""
    file = io.BytesIO()
    image.save(file, **_ENCODER[codec])
    return file.getvalue()


def encode_pixels(pixels: npt.NDArray[np.uint8], codec: str) -> bytes:
    """The bytes of uint8 [H, W, C], C 1 or 3, in the given codec."""
    return encode(Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels), codec)


def decode_pixels(data: bytes, channels: int) -> npt.NDArray[np.uint8]:
    """The uint8 [H, W, C] of one of our own images; with one channel, a WebP's first plane."""
    with Image.open(io.BytesIO(data)) as image:
        pixels = np.asarray(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels[..., :channels]
