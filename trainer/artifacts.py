"""Reads and writes the trainer's JSON artifacts: checked on the way in, atomic on the way out."""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from trainer.errors import TrainerError

MAX_JSON_BYTES = 256 * 2**20
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
DISK_FAULTS = (*NO_ROOM, errno.EFBIG, errno.EIO, errno.EROFS)  # of a write: they name no file

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Model(BaseModel):
    """Base of every artifact model: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


ModelT = TypeVar("ModelT", bound=BaseModel)


def parse_model(model: type[ModelT], data: object, where: str) -> ModelT:
    """Check `data` (parsed JSON) against `model`; `where` names the file in errors.

    Raises TrainerError with one line: the key, what was expected and found.
    """
    if not isinstance(data, dict):
        raise TrainerError(f"{where}: expected an object of keys, found {type(data).__name__}")
    for key in ("format", "format_version"):
        field = model.model_fields.get(key)
        if field is not None:
            expected = field.annotation.__args__[0]  # type: ignore[union-attr]
            if data.get(key) != expected:
                raise TrainerError(
                    f"{where}: {key} is {data.get(key)!r}, this version reads {expected!r} only; "
                    "use the matching version of semiformula"
                )
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise TrainerError(f"{where}: {_first_fault(model, error)}") from None


def _first_fault(model: type[BaseModel], error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    path = [str(part) for part in fault["loc"]]
    if fault["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(path[-1], list(model.model_fields), n=1, cutoff=0.6)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        return f"unknown key {'.'.join(path)!r}{hint}"
    message = fault["msg"].removeprefix("Value error, ")
    found = "" if fault["type"] in ("missing", "value_error") else f", found {fault['input']!r:.80}"
    return f"key {'.'.join(path) or '(top)'!r}: {message}{found}"


def read_json(model: type[ModelT], path: Path) -> ModelT:
    """Read the JSON file at `path` as `model`; TrainerError when missing, damaged or wrong."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise TrainerError(f"{path}: larger than {MAX_JSON_BYTES} bytes, not one of our files")
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise TrainerError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise TrainerError(
            f"{path}: not readable as JSON ({error}); is the file cut? Bring back a whole copy"
        ) from None
    except OSError as error:
        raise TrainerError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_model(model, data, str(path))


def canonical_json(model: BaseModel) -> bytes:
    """The one byte string that stands for a model in hashes: sorted keys, no spaces, UTF-8."""
    return json.dumps(
        model.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    ).encode()


def sha256_of(data: bytes) -> str:
    """Hex SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify_file(path: Path, expected_bytes: int, expected_sha256: str) -> None:
    """TrainerError unless the file has the length and SHA-256 that its record states.

    Asks the system to forget its copy of the file first, so that the disk is read where it can be.
    """
    try:
        with path.open("rb") as file:
            found_bytes = os.fstat(file.fileno()).st_size
            if found_bytes != expected_bytes:
                raise TrainerError(
                    f"{path}: {found_bytes} bytes, its record says {expected_bytes}; it is damaged"
                )
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise TrainerError(f"{path}: no such file") from None
    except OSError as error:
        raise TrainerError(f"{path}: cannot be read ({error.strerror})") from None
    if found != expected_sha256:
        raise TrainerError(f"{path}: SHA-256 differs from its record; the file is damaged")


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that appears whole or not at all: temporary name, fsync, rename, fsync folder.

    Nothing appears when an exception passes through. The temporary name holds the process id, so
    two writers of the same path cannot mix their bytes. TrainerError when the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in DISK_FAULTS:
            raise unwritable(path, error) from None
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def unwritable(path: Path, error: OSError) -> TrainerError:
    """The line for a file that the disk does not take."""
    room = "make room there, then " if error.errno in NO_ROOM else ""
    return TrainerError(
        f"{path}: cannot be written ({error.strerror}); {room}the same command goes on"
    )


def write_json(path: Path, model: BaseModel) -> None:
    """Write a model as readable JSON, atomically."""
    text = json.dumps(model.model_dump(mode="json"), indent=1, ensure_ascii=False)
    with atomic_file(path) as file:
        file.write(text.encode() + b"\n")
