"""The place where a dataset is to lie: one planner at a time, and nobody else's files."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Set
from contextlib import contextmanager

from builder.artifacts import TEMPORARY
from builder.errors import BuilderError
from builder.storage import Folder, Storage, is_temporary

PLAN = "plan.json"


@contextmanager
def alone(storage: Storage) -> Iterator[None]:
    """Hold a folder against other planners; a killed one lets go. Object stores have no lock."""
    if not isinstance(storage, Folder):
        yield
        return
    path = storage.path / f".{PLAN}{TEMPORARY}lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("ab")
    except OSError as error:
        raise BuilderError(f"{storage.url}: cannot be written ({error.strerror})") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BuilderError(
                f"{storage.url}: another plan is being made here; wait for it, then run the same "
                "command again"
            ) from None
        except OSError:
            pass  # a file system without locks: as in an object store, we look again at the end
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def refuse_foreign(storage: Storage, own_folders: Set[str] = frozenset()) -> None:
    """Raise BuilderError where a place without a plan holds more than a killed planner leaves."""
    foreign = [entry.name for entry in storage.entries("") if not is_temporary(entry.name)]
    if isinstance(storage, Folder) and storage.path.is_dir():
        folders = (path.name for path in storage.path.iterdir() if path.is_dir())
        foreign += [name for name in folders if name not in own_folders]
    if foreign:
        raise BuilderError(
            f"{storage.url}: not empty and not a dataset folder (it holds {foreign[0]}); "
            "choose another --out"
        )
