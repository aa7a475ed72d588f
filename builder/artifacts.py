"""JSON artifacts and TOML recipes: checked on the way in, atomic on the way out."""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import json
import os
import secrets
import tempfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from builder.errors import BuilderError

MAX_JSON_BYTES = 256 * 2**20
TEMPORARY = ".tmp-"  # in the name of a file that is being written, before the process id


class Model(BaseModel):
    """Base of every artifact model: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


ModelT = TypeVar("ModelT", bound=BaseModel)


def parse_model(model: type[ModelT], data: object, where: str) -> ModelT:
    """Check `data` (parsed JSON or TOML) against `model`; `where` names the file in errors.

    Raises BuilderError with one line: the key, what was expected and found, and for an unknown
    key the nearest valid one.
    """
    if not isinstance(data, dict):
        raise BuilderError(f"{where}: expected an object of keys, found {type(data).__name__}")
    for key in ("format", "format_version"):
        field = model.model_fields.get(key)
        if field is not None:
            expected = field.annotation.__args__[0]  # type: ignore[union-attr]
            if data.get(key, field.default) != expected:
                raise BuilderError(
                    f"{where}: {key} is {data.get(key)!r}, this version reads {expected!r} only; "
                    "use the matching version of semiformula"
                )
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise BuilderError(f"{where}: {_first_fault(model, error)}") from None


def _first_fault(model: type[BaseModel], error: ValidationError) -> str:
    faults = error.errors(include_url=False)
    # A misspelt key is also a missing one: name what was written first.
    fault = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    path = [str(part) for part in fault["loc"]]
    if fault["type"] == "extra_forbidden":
        known = _keys_at(model.model_json_schema(), fault["loc"][:-1])
        nearest = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.0)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        return f"unknown key {'.'.join(path)!r}{hint}"
    message = fault["msg"].removeprefix("Value error, ")
    found = "" if fault["type"] in ("missing", "value_error") else f", found {fault['input']!r:.80}"
    return f"key {'.'.join(path) or '(top)'!r}: {message}{found}"


def _keys_at(schema: dict[str, Any], path: tuple[int | str, ...]) -> list[str]:
    """The valid keys of the object that `path` leads to in a JSON Schema."""
    nodes = [schema]
    for part in path:
        following: list[dict[str, Any]] = []
        for node in _alternatives(schema, nodes):
            if part in node.get("properties", {}):
                following.append(node["properties"][part])
            elif isinstance(part, int) and "items" in node:
                following.append(node["items"])
            elif node.get("title") == part or part in _tags(node):
                following.append(node)
        nodes = following
    return [key for node in _alternatives(schema, nodes) for key in node.get("properties", {})]


def _alternatives(schema: dict[str, Any], nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Follow `$ref` and unions until only plain objects are left."""
    plain = []
    queue = list(nodes)
    while queue:
        node = queue.pop()
        if "$ref" in node:
            queue.append(schema["$defs"][node["$ref"].rsplit("/", 1)[1]])
        elif "oneOf" in node or "anyOf" in node:
            queue.extend(node.get("oneOf", node.get("anyOf", [])))
        else:
            plain.append(node)
    return plain


def _tags(node: dict[str, Any]) -> list[str]:
    """The values that mark a node of a discriminated union."""
    return [str(prop["const"]) for prop in node.get("properties", {}).values() if "const" in prop]


def read_json(model: type[ModelT], path: Path) -> ModelT:
    """Read the JSON file at `path` as `model`; BuilderError when missing, damaged or wrong."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise BuilderError(f"{path}: larger than {MAX_JSON_BYTES} bytes, not one of our files")
        data = path.read_bytes()
    except FileNotFoundError:
        raise BuilderError(f"{path}: no such file") from None
    except OSError as error:
        raise BuilderError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_json(model, data, str(path))


def parse_json(model: type[ModelT], data: bytes, where: str) -> ModelT:
    """Check the bytes of a JSON file against `model`; BuilderError when damaged or wrong."""
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BuilderError(f"{where}: not readable as JSON ({error}); is the file cut?") from None
    return parse_model(model, parsed, where)


def read_toml(model: type[ModelT], path: Path) -> ModelT:
    """Read the TOML file at `path` as `model`; BuilderError when missing, damaged or wrong."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BuilderError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise BuilderError(f"{path}: not readable as TOML ({error})") from None
    except OSError as error:
        raise BuilderError(f"{path}: cannot be read ({error.strerror})") from None
    return parse_model(model, data, str(path))


def canonical_json(model: BaseModel) -> bytes:
    """The one byte string that stands for a model in hashes: sorted keys, no spaces, UTF-8."""
    fields = model.model_dump(mode="json")
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.encode()


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

    Nothing appears when an exception passes through. Raises BuilderError when the path cannot be
    written (a full disk, no permission, a file where a folder should be).
    """
    # The process id is not enough: two nodes may share the folder.
    mark = f"{os.getpid()}-{secrets.token_hex(4)}"
    temporary = path.with_name(f".{path.name}{TEMPORARY}{mark}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb", buffering=2**20) as file:  # few system calls a shard
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
    except OSError as error:
        if error.errno is None:  # no answer of the system: what the caller did in the block
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        hint = "; what is finished is kept: free space and run the same command again"
        raise BuilderError(
            f"{path}: cannot be written ({error.strerror}){hint if full else ''}"
        ) from None


def refuse_unwritable(path: Path) -> None:
    """Raise BuilderError where no file can be written: asked before work of hours, not after."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise BuilderError(f"{path}: cannot be written ({error.strerror})") from None


def readable_json(model: BaseModel) -> bytes:
    """A model as JSON for people: indented, UTF-8, with a line's end."""
    text = json.dumps(model.model_dump(mode="json"), indent=1, ensure_ascii=False)
    return text.encode() + b"\n"


def write_json(path: Path, model: BaseModel) -> None:
    """Write a model as readable JSON, atomically."""
    with atomic_file(path) as file:
        file.write(readable_json(model))
