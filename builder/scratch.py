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
from builder.errors import BuilderError
from builder.images import decode_pixels
from builder.index import Normals
from builder.recipe import Recipe
from builder.shards import fault_of, read_samples
from builder.storage import Storage


class Table(NamedTuple):
    """The normals: pixels uint8 [M, H, W, C], a read-only map, and the category of each."""

    pixels: npt.NDArray[np.uint8]
    categories: list[str]


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
    it. Raises BuilderError for damaged shards.
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
                raise BuilderError(f"{storage.where(shard.name)}: {fault}; plan again to mend it")
            for _, members in read_samples(storage, shard.name):
                pixels = decode_pixels(members[normals.suffix], recipe.channels)
                if pixels.shape != shape[1:]:
                    raise BuilderError(
                        f"{storage.where(shard.name)}: an image of {pixels.shape}, "
                        f"expected {shape[1:]}"
                    )
                file.write(pixels.tobytes())
                categories.append(json.loads(members["json"])["category"])
        with atomic_file(path.with_suffix(".json")) as listing:
            listing.write(json.dumps(categories).encode())
