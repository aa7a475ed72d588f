"""Decodes one image of a shard: the only place that touches an image library."""

from __future__ import annotations

import io
import struct

import numpy as np
import numpy.typing as npt
from PIL import Image

from trainer.errors import TrainerError

FORMATS = {"webp": "WEBP", "png": "PNG", "jpg": "JPEG"}
MODES = {1: ("L", "RGB"), 3: ("RGB",)}  # WebP has no grey: one channel is the first of three equal

FAULTS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    struct.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,  # where warnings are errors
)


def decode_image(
    data: bytes, suffix: str, size_px: int, channels: int, where: str
) -> npt.NDArray[np.uint8]:
    """Decode WebP, PNG or JPEG bytes into uint8 [size_px, size_px, channels].

    Raises TrainerError naming `where` when the bytes are no such image or have another size; the
    size is compared before anything is decoded.
    """
    try:
        with Image.open(io.BytesIO(data), formats=[FORMATS[suffix]]) as image:
            if image.size != (size_px, size_px) or image.mode not in MODES[channels]:
                raise TrainerError(
                    f"{where}: image of {image.width} x {image.height} pixels, mode {image.mode}; "
                    f"dataset.json says {size_px} x {size_px} with {channels} channel(s)"
                )
            pixels = np.asarray(image)
    except FAULTS as error:
        raise TrainerError(f"{where}: not readable as {FORMATS[suffix]} ({error})") from None
    return pixels.reshape(size_px, size_px, -1)[:, :, :channels]
