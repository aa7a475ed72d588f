"""Plain arrays in an .npz file: equal bytes for equal arrays, and safe to read."""

from __future__ import annotations

import io
import math
import re
import struct
import zipfile
import zlib
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_BYTES = 2**30  # unpacked

Array = npt.NDArray[Any]

_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}
# What zipfile raises for damaged files; ValueError passes as it is.
_ZIP_FAULTS = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
)
_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([^']{1,8})', 'fortran_order': False, "
    rb"'shape': \(([0-9, ]{0,40})\), \} *\n",
    re.DOTALL,
)
_TYPES = re.compile(r"[|<](S[0-9]{1,3}|[iu][1248]|f[48]|b1)")


def save_arrays(arrays: Mapping[str, Array]) -> bytes:
    """The .npz file of little-endian `arrays`, in their order, without dates."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, array in arrays.items():
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            member.compress_type = zipfile.ZIP_DEFLATED
            member.create_system = 3  # else it tells Windows from the rest
            content = io.BytesIO()
            np.lib.format.write_array(content, array, version=(1, 0), allow_pickle=False)
            file.writestr(member, content.getvalue())
    return buffer.getvalue()


def load_arrays(data: bytes, names: Collection[str]) -> dict[str, Array]:
    """The arrays of an .npz file that holds exactly `names`; at most `MAX_BYTES` are unpacked.

    Raises ValueError for anything else; its text says what.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            members = file.infolist()
            found = [member.filename for member in members]
            expected = {f"{name}.npy" for name in names}
            if sorted(found) != sorted(expected):
                odd = sorted(set(found) ^ expected) or found
                raise ValueError(f"missing, unknown or doubled member {odd[0]!r:.60}")
            total = sum(member.file_size for member in members)
            if total > MAX_BYTES:
                raise ValueError(f"{total} bytes unpacked, at most {MAX_BYTES} are read")
            if not {one.compress_type for one in members} <= _METHODS:
                raise ValueError("a member is compressed in another way than deflate")
            # zipfile unpacks no more than file_size says, and checks the CRC.
            return {one.filename.removesuffix(".npy"): _array(file.read(one)) for one in members}
    except _ZIP_FAULTS as error:
        raise ValueError(f"not a whole .npz file ({error})") from None


def _array(content: bytes) -> Array:
    """A .npy file of format 1.0 and a plain type; no pickle, no code."""
    header = _HEADER.match(content)
    if header is None or int.from_bytes(content[8:10], "little") != header.end() - 10:
        raise ValueError("a member has no plain .npy header")
    descr = header[1].decode("ascii", "replace")
    if not _TYPES.fullmatch(descr):
        raise ValueError(f"a member has type {descr!r}")
    dtype = np.dtype(descr)
    shape = tuple(int(part) for part in header[2].replace(b" ", b"").split(b",") if part)
    size = math.prod(shape)
    if len(content) - header.end() != size * dtype.itemsize:
        raise ValueError(f"a member of shape {shape} has {len(content) - header.end()} bytes")
    return np.frombuffer(content, dtype, size, header.end()).reshape(shape)
