"""The files of cached features: one per photograph and network; REPORT.md describes them."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from evaluator.artifacts import sha256_of
from evaluator.errors import EvaluatorError

FORMAT = "semiformula-features"
FORMAT_VERSION = 1
SUFFIX = ".safetensors"
HEADER_STEP_BYTES = 4096  # the values begin at a whole page
PIECE_BYTES = 2**20
MAX_FLOAT16 = 65504.0
DTYPES = {"float16": "F16", "float32": "F32"}  # ours: safetensors' names
Shape = tuple[int, int, int]  # channels, height, width


@dataclass(frozen=True)
class FeatureKind:
    """What all feature files of one folder share; `description` is all that the values depend on.

    The description is canonical JSON; the folder is named by its SHA-256.
    """

    description: str
    layers: tuple[str, ...]
    shapes: tuple[Shape, ...]
    dtype: str

    @property
    def name(self) -> str:
        """The folder's name."""
        return sha256_of(self.description.encode())

    @property
    def item_bytes(self) -> int:
        """Bytes of one value."""
        return np.dtype(self.dtype).itemsize

    @property
    def payload_bytes(self) -> int:
        """Bytes of all values of one photograph."""
        return self.item_bytes * sum(math.prod(shape) for shape in self.shapes)

    def header(self, image_sha256: str, crc32: int) -> bytes:
        """The bytes before the values: a little-endian 64-bit length, JSON, and spaces."""
        content: dict[str, object] = {
            "__metadata__": {
                "format": FORMAT,
                "format_version": str(FORMAT_VERSION),
                "description": self.description,
                "image_sha256": image_sha256,
                "crc32": f"{crc32:08x}",
            }
        }
        start = 0
        for layer, (channels, height, width) in zip(self.layers, self.shapes, strict=True):
            end = start + self.item_bytes * channels * height * width
            shape = [height, width, channels]
            content[layer] = {
                "dtype": DTYPES[self.dtype],
                "shape": shape,
                "data_offsets": [start, end],
            }
            start = end
        text = json.dumps(content, separators=(",", ":")).encode()
        padded = -(-(8 + len(text)) // HEADER_STEP_BYTES) * HEADER_STEP_BYTES
        return (padded - 8).to_bytes(8, "little") + text.ljust(padded - 8)

    def file_bytes(self) -> int:
        """Bytes of a whole file; the same for every photograph."""
        return len(self.header("0" * 64, 0)) + self.payload_bytes


def write_features(
    path: Path,
    temporary: Path,
    kind: FeatureKind,
    image_sha256: str,
    values: Sequence[npt.NDArray[np.float32]],
) -> None:
    """Write one photograph's layers, float32 [height, width, channels] each, whole or not at all.

    Not flushed to the disk: a file that a power cut tore fails its check and is computed again.
    Raises OSError, and OverflowError for values that are not finite or above float16's range.
    """
    limit = MAX_FLOAT16 if kind.dtype == "float16" else float(np.finfo(np.float32).max)
    pieces = []
    crc32 = 0
    for layer in values:
        low, high = float(layer.min()), float(layer.max())  # NaN passes through both
        if not (-limit <= low and high <= limit):
            raise OverflowError(f"{low:.6g} to {high:.6g}")
        if kind.dtype == "float16":
            piece = (
                torch.from_numpy(layer).half().numpy()
            )  # NumPy's conversion takes 30 times as long
        else:
            piece = np.ascontiguousarray(layer)
        crc32 = zlib.crc32(piece.data.cast("B"), crc32)
        pieces.append(piece)
    try:
        with temporary.open("wb") as file:
            file.write(kind.header(image_sha256, crc32))
            for piece in pieces:
                file.write(piece.data.cast("B"))
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_whole(path: Path, kind: FeatureKind, image_sha256: str) -> bool:
    """Whether the file is there, of this kind and photograph, and its checksum is right.

    The header is compared with the only one that is right for the checksum of what follows it,
    so that nothing in the file is believed.
    """
    try:
        with path.open("rb", buffering=0) as file:
            if os.fstat(file.fileno()).st_size != kind.file_bytes():
                return False
            found = file.read(kind.file_bytes() - kind.payload_bytes)
            crc32 = 0
            buffer = memoryview(bytearray(PIECE_BYTES))
            while count := file.readinto(buffer):
                crc32 = zlib.crc32(buffer[:count], crc32)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise EvaluatorError(f"{path}: cannot be read ({error.strerror})") from None
    return found == kind.header(image_sha256, crc32)


class LayerFiles:
    """One layer of the cached features of many photographs, read row by row from their files."""

    def __init__(self, paths: Sequence[Path], kind: FeatureKind, layer: int) -> None:
        self.images = len(paths)
        self.channels, self.height, self.width = kind.shapes[layer]
        self._paths = paths
        self._dtype = kind.dtype
        self._row_bytes = kind.item_bytes * self.width * self.channels
        before = sum(math.prod(shape) for shape in kind.shapes[:layer])
        self._start = kind.file_bytes() - kind.payload_bytes + kind.item_bytes * before

    def read(self, first_row: int, last_row: int) -> npt.NDArray[np.float32]:
        """Rows `first_row` up to but not `last_row`: float32 [images, rows, width, channels].

        Raises EvaluatorError when a file is no longer there.
        """
        assert 0 <= first_row < last_row <= self.height
        shape = (last_row - first_row, self.width, self.channels)
        rows = np.empty((self.images, *shape), np.float32)
        offset = self._start + first_row * self._row_bytes
        if self._dtype == "float32":
            for path, target in zip(self._paths, rows, strict=True):
                _read_into(path, target.data.cast("B"), offset)
            return rows
        # Many photographs are converted at once: each call may start threads, and wait for them.
        together = min(self.images, max(1, PIECE_BYTES * 8 // (rows[0].nbytes // 2)))
        halves = np.empty((together, *shape), np.float16)
        for start in range(0, self.images, together):
            paths = self._paths[start : start + together]
            for path, half in zip(paths, halves, strict=False):
                _read_into(path, half.data.cast("B"), offset)
            part = torch.from_numpy(rows[start : start + together])
            part.copy_(torch.from_numpy(halves[: len(paths)]))
        return rows


def _read_into(path: Path, buffer: memoryview, offset: int) -> None:
    try:
        file = os.open(path, os.O_RDONLY)
        try:
            done = 0
            while done < len(buffer) and (count := os.preadv(file, [buffer[done:]], offset + done)):
                done += count
        finally:
            os.close(file)
    except OSError as error:
        raise EvaluatorError(
            f"{path}: cached features cannot be read ({error.strerror}); run again"
        ) from None
    if done < len(buffer):
        raise EvaluatorError(f"{path}: cached features were cut while in use; run again")
