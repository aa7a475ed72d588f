"""Reads and writes the evaluator's JSON artifacts: checked on the way in, atomic on the way out."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from evaluator.errors import EvaluatorError

MAX_JSON_BYTES = 64 * 2**20

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Model(BaseModel):
    """Base of every artifact model: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


ModelT = TypeVar("ModelT", bound=BaseModel)


def parse_model(model: type[ModelT], data: object, where: str) -> ModelT:
    """Check `data` (parsed JSON) against `model`; `where` names the file in errors.

    Raises EvaluatorError with one line: the key, what was expected and found, and for an unknown
    top-level key the nearest valid one.
    """
    if not isinstance(data, dict):
        raise EvaluatorError(f"{where}: expected an object of keys, found {type(data).__name__}")
    for key in ("format", "format_version"):
        field = model.model_fields.get(key)
        if field is not None:
            known = field.annotation.__args__  # type: ignore[union-attr]
            if data.get(key) not in known:
                expected = " and ".join(map(repr, known))
                raise EvaluatorError(
                    f"{where}: {key} is {data.get(key)!r}, this version reads {expected} only; "
                    "use the matching version of semiformula"
                )
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise EvaluatorError(f"{where}: {_first_fault(model, error)}") from None


def _first_fault(model: type[BaseModel], error: ValidationError) -> str:
    fault = error.errors(include_url=False)[0]
    path = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        hint = ""
        if len(fault["loc"]) == 1:
            nearest = difflib.get_close_matches(path, list(model.model_fields), n=1, cutoff=0.0)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        return f"unknown key {path!r}{hint}"
    found = "" if fault["type"] in ("missing", "value_error") else f", found {fault['input']!r:.80}"
    return f"key {path or '(top)'!r}: {fault['msg'].removeprefix('Value error, ')}{found}"


def read_json(model: type[ModelT], path: Path) -> ModelT:
    """Read the JSON file at `path` as `model`; EvaluatorError when missing, damaged or wrong."""
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise EvaluatorError(f"{path}: not a file")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise EvaluatorError(
                f"{path}: larger than {MAX_JSON_BYTES} bytes, not one of our files"
            )
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise EvaluatorError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise EvaluatorError(f"{path}: not readable as JSON ({error}); is the file cut?") from None
    except OSError as error:
        raise EvaluatorError(f"{path}: cannot be read ({error.strerror})") from None
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
    """Hex SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Write a file that appears whole or not at all: temporary name, fsync, rename, fsync folder.

    Nothing appears when an exception passes through. The temporary name holds the process id, so
    two writers of the same path cannot mix their bytes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    name = os.fsencode(path.name)[:200].decode(errors="ignore")  # file names end at 255 bytes
    temporary = path.with_name(f".{name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that killed writers left in `folder`; the living keep theirs."""
    for path in folder.glob(".*.tmp-[0-9]*"):
        process = path.name.rpartition("-")[2]
        if process.isdecimal() and not Path("/proc", process).exists():
            path.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically."""
    with atomic_file(path) as file:
        file.write(data)


def readable_json(value: Any) -> str:
    """JSON with one key a line, and lists of plain numbers on one line each."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    # A JSON string holds no raw newline, so the pattern matches lists only.
    return re.sub(
        r'\[\n\s*([^\[\]{}"]*?)\n\s*\]',
        lambda match: "[" + re.sub(r",\n\s*", ", ", match[1]) + "]",
        text,
    )


def write_json(path: Path, model: BaseModel) -> None:
    """Write a model as readable JSON, atomically."""
    write_bytes(path, readable_json(model.model_dump(mode="json")).encode() + b"\n")
