"""A run folder in object storage and the local folder that mirrors it: verified both ways.

Files go up with their length and SHA-256 read back, checkpoint.json after all that it names, so
what it names is there whole. `.mirror.json` remembers what this mirror last wrote there: when the
bucket holds something else, another machine has been at work, and the bucket's state counts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, Literal, cast

import click
from pydantic import Field

from trainer.artifacts import (
    MAX_JSON_BYTES,
    Model,
    Sha256,
    atomic_file,
    parse_model,
    read_json,
    sha256_of,
    sha256_of_file,
    verify_file,
    write_json,
)
from trainer.checkpoint import CHECKPOINT_FILE, Checkpoints
from trainer.errors import TrainerError
from trainer.ledger import LEDGER_FILE
from trainer.metrics import METRICS_FILE
from trainer.run import LOCK_FILE, MIRROR_FILE, RUN_FILE, Run
from trainer.storage import Storage, Unfetched

READ_BACK_FILE = ".read-back"
SNAPSHOT = ".push-"  # and a number: a folder with what is on its way up
TRIES = 3  # for bytes that arrive whole, but are others
MAX_METRICS_BYTES = 2**31


class MirrorState(Model):
    """`.mirror.json`: what this mirror knows the bucket to hold, or to have been sent."""

    format: Literal["semiformula-mirror"]
    format_version: Literal[1]
    url: str
    run_sha256: list[Sha256 | None] = Field(description="of run.json, null for none")
    index_sha256: list[Sha256 | None] = Field(description="of checkpoint.json, likewise")


class OtherWriter(TrainerError):
    """Another trainer writes to the same place in the bucket."""


class Damaged(TrainerError):
    """A file in the bucket is missing, or has other bytes than its record states."""


def pull(storage: Storage, folder: Path) -> bool:
    """Bring the locked local folder to where the run in the bucket stands.

    The bucket's state is taken, unless nobody else wrote there and the mirror is as far or further
    on. Returns whether the newest checkpoint in the bucket had to be passed over. Raises
    TrainerError when the place holds something else than a run, or no checkpoint there is good.
    """
    _remove_remains(folder)
    run, index = _read(storage, RUN_FILE), _read(storage, CHECKPOINT_FILE)
    if run is None:
        if found := storage.names():
            raise TrainerError(
                f"{storage.url}: holds {found[0]} and no {RUN_FILE}; give another --out"
            )
        _clear(folder)
        _write_state(folder, storage, None, None)
        return False
    checkpoints = None
    if index is not None:
        checkpoints = _parsed(index, storage.where(CHECKPOINT_FILE))
    if _goes_on(folder, run, index, checkpoints):
        return False
    if (folder / CHECKPOINT_FILE).exists():
        click.echo(f"{folder}: going on from what {storage.url} holds.", err=True)
    _clear(folder)
    _write(folder / RUN_FILE, run)
    passed_over = checkpoints is not None and _take(storage, folder, checkpoints)
    _write_state(folder, storage, run, index)
    return passed_over


def send(storage: Storage, source: Path, folder: Path, name: str, sha256: str) -> None:
    """Put a file, and read it back; for run.json and checkpoint.json remember it in the mirror.

    Raises OtherWriter when another trainer has written there since, Unfetched when what is read
    back stays other than what was sent.
    """
    if name in (RUN_FILE, CHECKPOINT_FILE):
        _refuse_other_writer(storage, folder, name, sha256)
    size = source.stat().st_size
    for _ in range(TRIES):
        storage.put(name, source)
        with (folder / READ_BACK_FILE).open("wb") as file:
            storage.fetch(name, size, file)
        if sha256_of_file(folder / READ_BACK_FILE) == sha256:
            break
    else:
        raise Unfetched(f"{storage.where(name)}: came back other than it was sent, {TRIES} times")
    (folder / READ_BACK_FILE).unlink()


def fetch_verified(storage: Storage, name: str, size: int, sha256: str, path: Path) -> None:
    """Fetch a file into place; Damaged when it is missing or its bytes stay other ones."""
    where = storage.where(name)
    with atomic_file(path) as file:
        for _ in range(TRIES):
            try:
                storage.fetch(name, size, cast(BinaryIO, file))
            except FileNotFoundError:
                raise Damaged(f"{where}: no such file") from None
            except Unfetched as error:
                storage.read(CHECKPOINT_FILE)  # a storage that is down is another matter
                raise Damaged(error.message) from None
            file.flush()
            if sha256_of_file(Path(file.name)) == sha256:
                return
        raise Damaged(f"{where}: SHA-256 differs from its record; it is damaged")


def remove_others(storage: Storage, keep: Iterable[str]) -> None:
    """Remove checkpoints from the bucket that its checkpoint.json no longer names."""
    kept = set(keep)
    for name in storage.names():
        if name.startswith("checkpoint-") and name.endswith(".safetensors") and name not in kept:
            storage.delete(name)


def _goes_on(
    folder: Path, run: bytes, index: bytes | None, checkpoints: Checkpoints | None
) -> bool:
    """Whether nobody else wrote to the bucket and the mirror is at least as far, and whole."""
    try:
        state = read_json(MirrorState, folder / MIRROR_FILE)
        if _digest(run) not in state.run_sha256 or _digest(index) not in state.index_sha256:
            return False
        read_json(Run, folder / RUN_FILE)
        if checkpoints is None:
            return True
        own = read_json(Checkpoints, folder / CHECKPOINT_FILE).checkpoints[0]
        verify_file(folder / own.file, own.bytes, own.sha256)
    except TrainerError:  # missing or damaged: what the bucket holds is better
        return False
    return own.step >= checkpoints.checkpoints[0].step


def _take(storage: Storage, folder: Path, checkpoints: Checkpoints) -> bool:
    """Fetch the newest good checkpoint and what belongs to it; whether newer ones are bad."""
    faults = []
    for number, record in enumerate(checkpoints.checkpoints):
        try:
            fetch_verified(storage, record.file, record.bytes, record.sha256, folder / record.file)
        except Damaged as error:
            faults.append(error.message)
            continue
        if faults:
            click.echo(
                f"Warning: {'; '.join(faults)}: going on from {record.file}, step {record.step}.",
                err=True,
            )
        for name in (METRICS_FILE, LEDGER_FILE):
            data = _read(storage, name, MAX_METRICS_BYTES)
            if data is not None:
                _write(folder / name, data)
        rest = checkpoints.checkpoints[number:]
        write_json(folder / CHECKPOINT_FILE, checkpoints.model_copy(update={"checkpoints": rest}))
        return bool(faults)
    raise TrainerError(f"{'; '.join(faults)}: no checkpoint is good, start another --out")


def _refuse_other_writer(storage: Storage, folder: Path, name: str, sha256: str) -> None:
    """OtherWriter when the bucket's file is not the one this mirror wrote; then note the next."""
    state = read_json(MirrorState, folder / MIRROR_FILE)
    key = "run_sha256" if name == RUN_FILE else "index_sha256"
    found = _digest(_read(storage, name))
    if found != sha256 and found not in getattr(state, key):
        raise OtherWriter(
            f"{storage.where(name)}: is not what this run left there; is another trainer at work "
            "in the same --out? This one stops"
        )
    # Both may be there after a kill: the write may arrive although nobody is told.
    write_json(folder / MIRROR_FILE, state.model_copy(update={key: [sha256, found]}))


def _digest(data: bytes | None) -> str | None:
    return None if data is None else sha256_of(data)


def _read(storage: Storage, name: str, max_bytes: int = MAX_JSON_BYTES) -> bytes | None:
    """A small file, None where there is none.

    Two readings have to agree, because nothing states its hash. Raises Unfetched when none do.
    """
    readings: list[bytes | None] = []
    for _ in range(TRIES + 1):
        try:
            readings.append(storage.read(name, max_bytes))
        except FileNotFoundError:
            readings.append(None)
        if readings[-2:-1] == readings[-1:]:
            return readings[-1]
        del readings[:-1]
    raise Unfetched(f"{storage.where(name)}: reads otherwise each time, {TRIES + 1} times")


def _parsed(index: bytes, where: str) -> Checkpoints:
    try:
        data = json.loads(index)
    except (ValueError, RecursionError) as error:
        raise TrainerError(f"{where}: not readable as JSON ({error}); is the file cut?") from None
    return parse_model(Checkpoints, data, where)


def _write(path: Path, data: bytes) -> None:
    with atomic_file(path) as file:
        file.write(data)


def _write_state(folder: Path, storage: Storage, run: bytes | None, index: bytes | None) -> None:
    state = MirrorState(
        format="semiformula-mirror",
        format_version=1,
        url=storage.url,
        run_sha256=[_digest(run)],
        index_sha256=[_digest(index)],
    )
    write_json(folder / MIRROR_FILE, state)


def _remove_remains(folder: Path) -> None:
    """What a killed trainer left on its way; all in this folder is ours."""
    for pattern in (".*.tmp-*", f"{SNAPSHOT}*", READ_BACK_FILE):
        for path in folder.glob(pattern):
            _remove(path)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.name != LOCK_FILE:
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
