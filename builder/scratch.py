"""One table of decoded normals a node, mapped by all its processes: one copy in memory for all.

It lies in the temporary folder (or $SEMIFORMULA_SCRATCH) under the hash of its shards, so that the
tasks of an array job that land on one node share it. A shared lock says that it is in use; the
last user removes it.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from builder.artifacts import atomic_file, sha256_of
from builder.check_image import image_fault
from builder.errors import BuilderError
from builder.images import decode_pixels
from builder.index import ImageFormat, Normals
from builder.recipe import Recipe
from builder.shards import fault_of, read_samples
from builder.storage import Storage


class Table(NamedTuple):
    """The normals: pixels uint8 [M, H, W, C], a read-only map, and the category of each."""

    pixels: npt.NDArray[np.uint8]
    categories: list[str]


class DamagedNormals(BuilderError):
    """The stored normals are not what SHARDS.md says: a fault of the dataset, of nothing else."""


def scratch_folder() -> Path:
    """A folder on this node that belongs to this user alone. Raises BuilderError if it does not."""
    given = os.environ.get("SEMIFORMULA_SCRATCH")
    folder = Path(given) if given else Path(tempfile.gettempdir()) / f"semiformula-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BuilderError(f"scratch folder {folder}: {error.strerror}") from None
    about = folder.stat()
    if about.st_uid != os.getuid() or (not given and about.st_mode & 0o077):
        raise BuilderError(
            f"scratch folder {folder}: others may write to it; set SEMIFORMULA_SCRATCH to one of "
            "your own"
        )
    return folder


@contextmanager
def normals_table(storage: Storage, normals: Normals, recipe: Recipe) -> Iterator[Table]:
    """The decoded normals.

    Made from the stored shards, whose hashes are checked, when no process of this node has made
    it. Raises DamagedNormals, and BuilderError for the troubles of this machine and the storage.
    """
    mark = sha256_of("".join(shard.sha256 for shard in normals.shards).encode())[:24]
    path = scratch_folder() / f"normals-{mark}.npy"
    with path.with_suffix(".lock").open("ab") as lock:
        while True:
            fcntl.flock(lock, fcntl.LOCK_SH)
            if path.exists():
                break
            # Not atomic: between the two locks another may make it, or its last user remove it.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _write_table(path, storage, normals, recipe)
        try:
            pixels = np.load(path, mmap_mode="r", allow_pickle=False)
            yield Table(pixels, json.loads(path.with_suffix(".json").read_bytes()))
        finally:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass  # others use it
            else:
                path.unlink(missing_ok=True)
                path.with_suffix(".json").unlink(missing_ok=True)


def _write_table(path: Path, storage: Storage, normals: Normals, recipe: Recipe) -> None:
    shape = (normals.count, recipe.size_px, recipe.size_px, recipe.channels)
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    categories: list[str] = []
    with atomic_file(path) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for shard in normals.shards:
            fault = fault_of(storage, shard)
            if fault:
                raise DamagedNormals(f"{storage.where(shard.name)}: {fault}; plan again to mend it")
            for key, members in read_samples(storage, shard.name):
                try:
                    pixels, category = _decoded(members, normals, recipe)
                except (OSError, ValueError, SyntaxError, EOFError) as error:  # what Pillow raises
                    line = f"{error}".replace("\n", " ")
                    raise DamagedNormals(
                        f"{storage.where(shard.name)}: normal {key}: {line}"
                    ) from None
                file.write(pixels.tobytes())
                categories.append(category)
        if len(categories) != normals.count:
            raise DamagedNormals(
                f"{storage.url}: {len(categories)} normals, expected {normals.count}"
            )
        with atomic_file(path.with_suffix(".json")) as listing:
            listing.write(json.dumps(categories).encode())


def _decoded(
    members: dict[str, bytes], normals: Normals, recipe: Recipe
) -> tuple[npt.NDArray[np.uint8], str]:
    """The pixels, uint8 [H, W, C], and the category; ValueError or Pillow's for what is neither."""
    size_px, channels = recipe.size_px, recipe.channels
    image = ImageFormat(
        size_px=size_px, channels=channels, codec="webp", suffix="webp", lossless=True
    )
    data = members.get(normals.suffix, b"")
    fault = image_fault(data, "webp", image)  # before Pillow makes room for what the header says
    if fault:
        raise ValueError(fault)
    pixels = decode_pixels(data, channels)
    if pixels.shape != (size_px, size_px, channels):
        raise ValueError(f"an image of {pixels.shape}")
    try:
        category = json.loads(members.get("json", b""))["category"]
    except (KeyError, TypeError, ValueError, RecursionError):
        category = None
    if not isinstance(category, str):
        raise ValueError("no category")
    return pixels, category
