"""Where a run lives: a local folder, or object storage with a local mirror that is worked in.

Pushes run in a thread, from hard links and copies made at the moment of the checkpoint: training
does not wait for the network, and a storage that is down costs a warning until the run ends.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from trainer.artifacts import read_json, sha256_of_file
from trainer.checkpoint import CHECKPOINT_FILE, Checkpoints
from trainer.errors import TrainerError
from trainer.export import BACKBONE_FILE, WEIGHTS_FILE
from trainer.ledger import LEDGER_FILE
from trainer.metrics import METRICS_FILE
from trainer.mirror import SNAPSHOT, OtherWriter, pull, remove_others, send
from trainer.run import RUN_FILE, locked
from trainer.storage import Storage, is_remote, local_path, open_storage

# What goes up beside the checkpoints; checkpoint.json follows after all that it names.
PUSHED = (RUN_FILE, METRICS_FILE, LEDGER_FILE, "curves.png", "figure5/*.png", "tensorboard/*")
PRODUCT = (WEIGHTS_FILE, BACKBONE_FILE)
POLL_SECONDS = 0.2
READ_ONLY = ("http://", "https://")


@contextmanager
def run_dir(out: str, cache: Path) -> Iterator[RunDir]:
    """Hold the run folder alone and bring it to where the run stands; for the first process.

    `cache` is the folder below which the mirror of a remote --out lies. Raises TrainerError when
    another process trains there, or when the place holds something else than a run.
    """
    if out.startswith(READ_ONLY):
        raise TrainerError(
            f"--out {out}: http cannot be written to; give a folder, or a URL such as s3://BUCKET"
        )
    storage = open_storage(out.rstrip("/")) if is_remote(out) else None
    if storage is None:
        folder = local_path(out)
    else:
        folder = cache / "runs" / hashlib.sha256(storage.url.encode()).hexdigest()[:32]
    with locked(folder):
        yield RunDir(folder, storage)


class RunDir:
    """The local run folder, and the storage that it is pushed to; None where it is the place."""

    def __init__(self, folder: Path, storage: Storage | None) -> None:
        self.folder = folder
        self._storage = storage
        self._sent: dict[str, str] = {}  # SHA-256 by name: there, and read back
        self._lock = threading.Lock()
        self._next: Path | None = None  # the snapshot that waits for the thread
        self._thread: threading.Thread | None = None
        self._count = 0
        self._fault: TrainerError | None = None  # why the last push failed
        self._passed_over = storage is not None and pull(storage, folder)

    def begin(self) -> None:
        """Send run.json, once it is written; TrainerError where nothing can be written there."""
        if self._storage is None:
            return
        self._send(self.folder, RUN_FILE)
        if self._passed_over:  # before metrics.jsonl loses what a damaged checkpoint would need
            self._send(self.folder, CHECKPOINT_FILE)

    def push(self) -> None:
        """Send what the newest checkpoint needs, in the background; the newest push counts.

        TrainerError when another trainer was found to write to the same place.
        """
        if self._storage is None:
            return
        self._refuse_fatal()
        snapshot = self._snapshot()
        with self._lock:
            late, self._next = self._next, snapshot
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._send_all, daemon=True)
                self._thread.start()
        if late is not None:
            shutil.rmtree(late)

    def settle(self) -> bool:
        """Wait for the push on its way, as long as the storage's deadline; whether all is there.

        TrainerError when another trainer was found to write to the same place.
        """
        while (thread := self._thread) is not None and thread.is_alive():
            thread.join(POLL_SECONDS)  # in pieces: a signal's handler runs in between
        self._refuse_fatal()
        return self._fault is None

    def finish(self) -> None:
        """Send everything, the product last; TrainerError in one line when it is not there."""
        if self._storage is None:
            return
        self.settle()
        try:
            self._send_files(self.folder)
            for name in PRODUCT:
                self._send(self.folder, name)
        except OtherWriter:
            raise
        except TrainerError as error:
            raise TrainerError(
                f"{error.message}; the run is finished and its backbone in {self.folder}"
            ) from None

    def _refuse_fatal(self) -> None:
        if isinstance(self._fault, OtherWriter):
            raise self._fault

    def _snapshot(self) -> Path:
        """A folder with the files as they are now: links of checkpoints, copies of the others."""
        self._count += 1
        snapshot = self.folder / f"{SNAPSHOT}{self._count}"
        shutil.rmtree(snapshot, ignore_errors=True)
        for name in self._names(self.folder):
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".safetensors"):
                _link(self.folder / name, snapshot / name)
            else:
                shutil.copyfile(self.folder / name, snapshot / name)
        return snapshot

    def _names(self, folder: Path) -> list[str]:
        """What is to be sent, in this order."""
        named = _named(folder)
        files = [name for name in named if (folder / name).exists()]
        others = [path for pattern in PUSHED for path in sorted(folder.glob(pattern))]
        names = [path.relative_to(folder).as_posix() for path in others]
        return [*files, *names, *([CHECKPOINT_FILE] if named else [])]

    def _send_all(self) -> None:
        """The thread: send snapshots until none waits."""
        while True:
            with self._lock:
                snapshot, self._next = self._next, None
                if snapshot is None:
                    self._thread = None
                    return
            try:
                self._send_files(snapshot)
                self._fault = None
            except Exception as error:  # also a full disk: what is on its way must be settled
                self._fault = self._line_of(error)
                if not isinstance(error, OtherWriter):
                    click.echo(
                        f"Warning: {self._fault.message}; training goes on, and the next "
                        "checkpoint sends it again.",
                        err=True,
                    )
            finally:
                shutil.rmtree(snapshot, ignore_errors=True)

    def _line_of(self, error: Exception) -> TrainerError:
        assert self._storage is not None
        if isinstance(error, TrainerError):
            return error
        why = error.strerror if isinstance(error, OSError) else None
        return TrainerError(
            f"{self._storage.url}: the push failed ({why or f'{type(error).__name__}: {error}'})"
        )

    def _send_files(self, folder: Path) -> None:
        assert self._storage is not None
        for name in self._names(folder):
            self._send(folder, name)
        remove_others(self._storage, _named(folder))

    def _send(self, folder: Path, name: str) -> None:
        """Send one file of the run folder or a snapshot of it, unless it is there."""
        assert self._storage is not None
        sha256 = sha256_of_file(folder / name)
        if self._sent.get(name) != sha256:
            send(self._storage, folder / name, self.folder, name, sha256)
            self._sent[name] = sha256


def _named(folder: Path) -> list[str]:
    """The checkpoint files that checkpoint.json names."""
    index = folder / CHECKPOINT_FILE
    if not index.exists():
        return []
    return [record.file for record in read_json(Checkpoints, index).checkpoints]


def _link(source: Path, target: Path) -> None:
    """A hard link keeps a checkpoint that is removed meanwhile; a copy where there are none."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
