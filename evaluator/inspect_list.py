"""Which photographs `evaluator inspect` looks at, and what the picture of each is called."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from evaluator.errors import EvaluatorError
from evaluator.images import SUFFIXES
from evaluator.photographs import find_photographs, left_out, shown

SCORES_FILE, MAPS_FOLDER = "scores.csv", "maps"
MAX_STEM_BYTES = 150  # file names end at 255 bytes, and a number may follow


@dataclass(frozen=True)
class Part:
    """A photograph, and where its picture goes below the folder of maps."""

    path: Path
    picture: PurePosixPath


@dataclass(frozen=True)
class Listed:
    """The photographs to inspect, and lines on what is left out."""

    parts: list[Part]
    notes: list[str]


def list_parts(paths: Sequence[Path], out: Path) -> Listed:
    """The photographs of files and folders, each once, every one with a picture of its own.

    What lies below the pictures' own folder is not looked at. Raises EvaluatorError for a path
    that is not there, and where no photograph is left.
    """
    inner_of: dict[Path, Path] = {}  # photograph -> its path below the folder that was given
    other_files: list[Path] = []
    linked_folders: list[Path] = []
    for given in paths:
        if given.is_dir():
            found = find_photographs(given)
            other_files += found.other_files
            linked_folders += found.linked_folders
            for path in found.photographs:
                inner_of.setdefault(path, path.relative_to(given))
        elif given.exists():
            inner_of.setdefault(given, Path(given.name))
        else:
            raise EvaluatorError(f"{given}: no such file or folder; expected photographs")
    scores, pictures = _real(out) / SCORES_FILE, _real(out) / MAPS_FOLDER
    kept: dict[Path, Path] = {}  # the real file -> its first name
    ours = []
    for path in inner_of:
        real = _real(path) if path.exists() else path.absolute()
        if real.is_relative_to(pictures):
            ours.append(path)
        else:
            kept.setdefault(real, path)
    others = [path for path in other_files if _real(path) != scores]
    notes = left_out(others, linked_folders)
    if ours:
        notes.append(
            f"{len(ours)} left out below {out / MAPS_FOLDER}, where the pictures go: {shown(ours)}"
        )
    if not kept:
        none = f"no photographs ({', '.join(SUFFIXES)}) to inspect"
        raise EvaluatorError("; ".join([f"{', '.join(map(str, paths))}: {none}", *notes]))
    return Listed(_with_pictures({path: inner_of[path] for path in kept.values()}), notes)


def _with_pictures(inner_of: dict[Path, Path]) -> list[Part]:
    """Names of pictures: as the photographs', numbered where two would collide."""
    taken: set[str] = set()
    numbers: dict[str, int] = {}
    parts = []
    for path, inner in inner_of.items():
        stem = inner.stem
        while len(os.fsencode(stem)) > MAX_STEM_BYTES:
            stem = stem[:-1]
        first = picture = inner.with_name(f"{stem}.png")
        while str(picture).casefold() in taken:  # some file systems ignore case
            number = numbers[str(first).casefold()] = numbers.get(str(first).casefold(), 1) + 1
            picture = inner.with_name(f"{stem}-{number}.png")
        taken.add(str(picture).casefold())
        parts.append(Part(path, PurePosixPath(picture.as_posix())))
    return parts


def _real(path: Path) -> Path:
    """Without links; a link that leads to itself stays as it is."""
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        return path.absolute()
