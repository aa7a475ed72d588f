"""One table of decoded normals a node, mapped by all its processes: one copy in memory for all.

It lies in the temporary folder (or $SEMIFORMULA_SCRATCH) under the hash of its shards, so that the
tasks of an array job that land on one node share it. A shared lock says that it is in use; the
last user removes it, or, where that one was killed, the first user of the next table.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt

from builder.artifacts import TEMPORARY, atomic_file, sha256_of, sha256_of_file
from builder.check_image import image_fault
from builder.errors import BuilderError
from builder.images import UNDECODABLE, decode_pixels
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
        # In a folder that all may write to, a link may be another's trap.
        about = folder.stat() if given else folder.lstat()
    except OSError as error:
        raise BuilderError(f"scratch folder {folder}: {error.strerror}") from None
    ours = stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid()
    if not ours or (not given and about.st_mode & 0o077):
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
    shape = (normals.count, recipe.size_px, recipe.size_px, recipe.channels)
    # Grey photographs give the same shards for one channel and for three.
    shards = "".join(shard.sha256 for shard in normals.shards)
    mark = sha256_of(f"{shape} {shards}".encode())[:24]
    path = scratch_folder() / f"normals-{mark}.npy"
    with _opened_lock(path) as lock:
        while True:
            if _locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):  # no other uses it
                _sweep(path)
                if not _is_whole(path):
                    _write_table(path, storage, normals, recipe)
                # Not atomic: between the two locks another may come and go, and remove it.
                _locked(lock, fcntl.LOCK_SH)
            elif not _locked(lock, fcntl.LOCK_SH | fcntl.LOCK_NB):  # another makes or checks it
                _locked(lock, fcntl.LOCK_SH)
                _locked(lock, fcntl.LOCK_UN)
                continue
            if path.exists():
                break
            _locked(lock, fcntl.LOCK_UN)
        try:
            yield _mapped(path)
        finally:
            if _locked(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):  # else others use it
                _remove(path)


@contextmanager
def _opened_lock(path: Path) -> Iterator[IO[bytes]]:
    try:
        lock = path.with_suffix(".lock").open("ab")
    except OSError as error:
        raise _unusable(path, error) from None
    with lock:
        yield lock


def _locked(lock: IO[bytes], how: int) -> bool:
    """Lock, wait for it unless LOCK_NB is given; False when another holds it."""
    try:
        fcntl.flock(lock, how)
    except BlockingIOError:
        return False
    except OSError as error:  # a network disk that knows no locks
        raise _unusable(Path(lock.name), error) from None
    return True


def _unusable(path: Path, error: OSError) -> BuilderError:
    return BuilderError(
        f"scratch folder {path.parent}: cannot be used ({error.strerror}); set "
        "SEMIFORMULA_SCRATCH to a folder on a local disk"
    )


def _sweep(ours: Path) -> None:
    """Remove what killed processes left: their tables, and the half-written ones. Locks stay."""
    _remove_temporaries(ours)
    for lock in ours.parent.glob("normals-*.lock"):
        path = lock.with_suffix(".npy")
        if path == ours:
            continue
        with suppress(OSError), lock.open("ab") as held:  # who cannot be locked is left alone
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_temporaries(path)
            _remove(path)


def _remove_temporaries(path: Path) -> None:
    for left in path.parent.glob(f".{path.stem}.*{TEMPORARY}*"):
        with suppress(OSError):
            left.unlink()


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink(missing_ok=True)
        path.with_suffix(".json").unlink(missing_ok=True)


def _is_whole(path: Path) -> bool:
    """Whether a table that was found here holds the bytes that were written."""
    try:
        stated: object = json.loads(path.with_suffix(".json").read_bytes())["sha256"]
        return stated == sha256_of_file(path)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _mapped(path: Path) -> Table:
    try:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        return Table(pixels, json.loads(path.with_suffix(".json").read_bytes())["categories"])
    except OSError as error:
        raise _unusable(path, error) from None


def _write_table(path: Path, storage: Storage, normals: Normals, recipe: Recipe) -> None:
    shape = (normals.count, recipe.size_px, recipe.size_px, recipe.channels)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": shape}
    )
    digest = hashlib.sha256(header.getvalue())
    categories: list[str] = []
    with atomic_file(path) as file:
        file.write(header.getvalue())
        for shard in normals.shards:
            fault = fault_of(storage, shard)
            if fault:
                raise DamagedNormals(f"{storage.where(shard.name)}: {fault}; plan again to mend it")
            for key, members in read_samples(storage, shard.name):
                try:
                    pixels, category = _decoded(members, normals, recipe)
                except UNDECODABLE as error:
                    line = f"{error}".replace("\n", " ")
                    raise DamagedNormals(
                        f"{storage.where(shard.name)}: normal {key}: {line}"
                    ) from None
                data = pixels.tobytes()
                digest.update(data)
                file.write(data)
                categories.append(category)
        if len(categories) != normals.count:
            raise DamagedNormals(
                f"{storage.url}: {len(categories)} normals, expected {normals.count}"
            )
        with atomic_file(path.with_suffix(".json")) as listing:
            about = {"sha256": digest.hexdigest(), "categories": categories}
            listing.write(json.dumps(about).encode())


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
