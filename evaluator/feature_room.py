"""Who uses which files of a shared folder, and which ones go when it grows too large.

A process holds a lease for as long as it uses files: a file in `leases/` that lists them, locked
with flock. The kernel lets go of the lock when the process ends, however it ends; so a lease that
can be locked is a dead one. Whoever takes a lease or removes files holds the folder's own lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from evaluator.errors import EvaluatorError

LEASES = "leases"
# Nothing else is ever removed, whatever else the folder holds.
LEASE_NAME = re.compile(r"[0-9a-f]{16}")
GROUP_NAME = re.compile(r"[0-9a-f]{64}")
STORED_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
TEMPORARY_NAME = re.compile(r"\.[0-9a-f]{64}\.safetensors\.([0-9a-f]{16})\.tmp")


@dataclass(frozen=True)
class StoredFile:
    """A file that counts against the limit."""

    path: Path
    size_bytes: int
    used_ns: int


def temporary_path(path: Path, lease: str) -> Path:
    """Where the holder of `lease` writes what becomes `path`."""
    return path.with_name(f".{path.name}.{lease}.tmp")


@contextlib.contextmanager
def lease(folder: Path, paths: Iterable[Path]) -> Iterator[str]:
    """Protect `paths`, there already or not, from removal by any process; gives the lease's name.

    Raises EvaluatorError when the folder cannot be written or locked.
    """
    name = secrets.token_hex(8)
    file = folder / LEASES / name
    with contextlib.ExitStack() as stack:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with _folder_lock(folder):
                held = stack.enter_context(file.open("x"))
                stack.callback(file.unlink, missing_ok=True)
                fcntl.flock(held, fcntl.LOCK_EX)
                held.writelines(f"{path.relative_to(folder)}\n" for path in paths)
                held.flush()
        except OSError as error:
            raise EvaluatorError(
                f"{folder}: cannot be used for cached features ({error.strerror}); "
                "choose another folder"
            ) from None
        yield name


def make_room(folder: Path, limit_bytes: int) -> tuple[int, int]:
    """Remove what killed writers left, then least recently used files until the rest fits.

    Files under a lease of a living process stay, even when they alone exceed the limit. Returns
    how many files went and the bytes that stay. Raises EvaluatorError.
    """
    try:
        with _folder_lock(folder):
            in_use, alive = _living_leases(folder)
            stored = list(_stored_files(folder, alive))
            total = sum(file.size_bytes for file in stored)
            removed = 0
            for file in sorted(stored, key=lambda file: file.used_ns):
                if total <= limit_bytes:
                    break
                if str(file.path.relative_to(folder)) not in in_use:
                    file.path.unlink(missing_ok=True)
                    total -= file.size_bytes
                    removed += 1
    except OSError as error:
        raise EvaluatorError(f"{folder}: cannot make room ({error.strerror})") from None
    return removed, total


@contextlib.contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    with (folder / LEASES / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _living_leases(folder: Path) -> tuple[set[str], set[str]]:
    """The files in use, and the names of the leases; leases of the dead are removed."""
    in_use: set[str] = set()
    alive: set[str] = set()
    for path in (folder / LEASES).iterdir():
        if not LEASE_NAME.fullmatch(path.name):
            continue
        try:
            file = path.open()
        except FileNotFoundError:  # its holder is done
            continue
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                in_use.update(file.read().splitlines())
                alive.add(path.name)
            else:
                path.unlink(missing_ok=True)
    return in_use, alive


def _stored_files(folder: Path, alive: set[str]) -> Iterator[StoredFile]:
    """All files of features; temporary ones of the dead are removed."""
    for group in os.scandir(folder):
        if not GROUP_NAME.fullmatch(group.name) or not group.is_dir(follow_symlinks=False):
            continue
        for entry in os.scandir(group):
            temporary = TEMPORARY_NAME.fullmatch(entry.name)
            try:
                if temporary and temporary[1] not in alive:
                    Path(entry.path).unlink()
                elif STORED_NAME.fullmatch(entry.name):
                    status = entry.stat()
                    yield StoredFile(Path(entry.path), status.st_size, status.st_mtime_ns)
            except FileNotFoundError:  # renamed by its writer meanwhile
                continue
