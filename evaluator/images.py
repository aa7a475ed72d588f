"""Reads photographs and masks as a protocol wants them; whatever is damaged is one clear line."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from evaluator.errors import EvaluatorError
from evaluator.protocols import Protocol

ScalarT = TypeVar("ScalarT", bound=np.generic)
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # Pillow's other readers are never run
MAX_PIXELS = 64 * 10**6
MAX_FILE_BYTES = 512 * 2**20
DAMAGE = (
    OSError,
    SyntaxError,  # Pillow's PNG reader on a broken chunk
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
RESAMPLING = {
    "lanczos": Image.Resampling.LANCZOS,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def read_file(path: Path) -> bytes:
    """The bytes of an image file; EvaluatorError when it cannot be read or is too large."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise EvaluatorError(f"{path}: larger than {MAX_FILE_BYTES} bytes, refused")
        return path.read_bytes()
    except OSError as error:
        raise EvaluatorError(f"{path}: cannot be read ({error.strerror})") from None


def image_size(path: Path, data: bytes | None = None) -> tuple[int, int]:
    """Width and height of an image whose header and chunk checksums are right, not decoded.

    `data` spares reading the file again. Raises EvaluatorError as `load_image` does. Call it from
    the main thread: warning filters are global to the process.
    """
    content = read_file(path) if data is None else data
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = _open(content, path)
    size = image.size
    try:
        image.verify()  # PNG checksums; the pixels are decoded when they are needed
    except DAMAGE as error:
        raise _unreadable(path, error) from None
    return size


def load_image(path: Path, protocol: Protocol, data: bytes | None = None) -> npt.NDArray[np.uint8]:
    """The photograph as the network sees it: uint8 [size, size, 3], RGB; `data` as above.

    Resized to a square (a photograph that is not square is squeezed, its mask with it), then the
    centre crop. Raises EvaluatorError for a file that is damaged, huge or has more than 8 bits.
    """
    image = _open(read_file(path) if data is None else data, path)
    side = (protocol.resize_px, protocol.resize_px)
    try:
        square = _rgb(image).resize(side, RESAMPLING[protocol.interpolation])
    except DAMAGE as error:
        raise _unreadable(path, error) from None
    return centre_crop(np.asarray(square), protocol.crop_px)


def load_pixels(path: Path) -> npt.NDArray[np.uint8]:
    """The photograph at its own size: uint8 [height, width, 3], RGB."""
    image = _open(read_file(path), path)
    try:
        return np.asarray(_rgb(image))
    except DAMAGE as error:
        raise _unreadable(path, error) from None


def load_mask(paths: Sequence[Path], protocol: Protocol) -> npt.NDArray[np.bool_]:
    """The ground truth on the same pixels as `load_image`: bool [size, size], True = defective.

    Defective where any channel of any of the masks is above 0, then resized by the protocol's
    rule, then cropped. No masks: nothing is defective.
    """
    union = np.zeros((protocol.resize_px, protocol.resize_px), np.bool_)
    for path in paths:
        union |= resize_mask(mask_values(path).max(axis=-1) > 0, protocol)
    return centre_crop(union, protocol.crop_px)


def resize_mask(defective: npt.NDArray[np.bool_], protocol: Protocol) -> npt.NDArray[np.bool_]:
    """The ground truth bool [height, width] as bool [resize, resize], not yet cropped."""
    rows = _nearest(defective.shape[0], protocol)
    columns = _nearest(defective.shape[1], protocol)
    return defective[np.ix_(rows, columns)]


def mask_values(path: Path, data: bytes | None = None) -> npt.NDArray[np.uint8]:
    """The pixels of a mask file as they are: uint8 [height, width, 1 or 3]; `data` as above."""
    image = _open(read_file(path) if data is None else data, path)
    try:
        values = np.asarray(image if image.mode in ("1", "L") else _rgb(image), np.uint8)
    except DAMAGE as error:
        raise _unreadable(path, error) from None
    return values.reshape(*values.shape[:2], -1)


def _nearest(source_px: int, protocol: Protocol) -> npt.NDArray[np.intp]:
    """Which of `source_px` rows each of the resized rows shows."""
    scale = source_px / protocol.resize_px
    offset = 0.5 if protocol.mask_rule == "nonzero-nearest" else 0.0
    positions = (np.arange(protocol.resize_px) + offset) * scale
    return np.minimum(positions.astype(np.intp), source_px - 1)


def _open(data: bytes, path: Path) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except DAMAGE as error:
        raise _unreadable(path, error) from None
    if image.width * image.height > MAX_PIXELS:
        raise EvaluatorError(
            f"{path}: {image.width} x {image.height} pixels, more than {MAX_PIXELS}; refused"
        )
    if image.mode.startswith(("I", "F")):
        raise EvaluatorError(
            f"{path}: pixel mode {image.mode} (more than 8 bit); convert it to 8 bit grey or RGB"
        )
    return image


def _rgb(image: Image.Image) -> Image.Image:
    """Without transparency; a palette with it goes through RGBA, or Pillow warns."""
    return (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")


def _unreadable(path: Path, error: BaseException) -> EvaluatorError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    reason = reason.replace("<_io.BytesIO object at ", "<").split(" <")[0]
    return EvaluatorError(f"{path}: not a readable image ({reason}); replace or remove the file")


def centre_crop(pixels: npt.NDArray[ScalarT], crop_px: int) -> npt.NDArray[ScalarT]:
    """The middle `crop_px` rows and columns of a square; 0: all."""
    if crop_px == 0:
        return pixels
    start = (pixels.shape[0] - crop_px) // 2
    return pixels[start : start + crop_px, start : start + crop_px]
