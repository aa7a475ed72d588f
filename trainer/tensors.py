"""Writes a safetensors file piece by piece: the library joins all tensors in memory first."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import IO

import torch

# The format's names, in the order in which the library lays tensors out: wide types first.
DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ALIGN_BYTES = 8


def write_tensors(
    file: IO[bytes], tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> tuple[int, str]:
    """Write contiguous CPU tensors as `safetensors.torch.save` does; their bytes and SHA-256.

    The format: the header's length (uint64, little-endian), the header (JSON, filled up with
    spaces), the tensors' bytes without a gap.
    """
    order = list(DTYPES)
    names = sorted(tensors, key=lambda name: (order.index(tensors[name].dtype), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for name in names:
        tensor = tensors[name]
        stop = start + tensor.nbytes
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, stop],
        }
        start = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGN_BYTES)
    digest, written = hashlib.sha256(), 0
    views = (tensors[name].reshape(-1).view(torch.uint8).numpy().data for name in names)
    pieces: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text, *views]
    for piece in pieces:
        file.write(piece)
        digest.update(piece)
        written += len(piece)
    return written, digest.hexdigest()
