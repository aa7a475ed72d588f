"""What the tests of `builder classes` share: a folder of class folders, and how it is built."""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path

import numpy as np
from click.testing import CliRunner, Result
from PIL import Image

from builder.classes.build import Options, build_classes
from builder.classes.index import ClassSet
from builder.classes.sources import find_classes
from builder.cli import main

SMALL = Options(size_px=16, codec="webp", samples_per_shard=4, seed=0)


def photograph(path: Path, value: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 24, 3), value, np.uint8)).save(path)
    return path


def write_folder(folder: Path) -> Path:
    """Seven photographs in two class folders, and a note."""
    for i in range(4):
        photograph(folder / "good" / f"{i}.png", 10 + i)
    for i in range(3):
        photograph(folder / "bad" / "deeper" / f"{i}.png", 200 + i)
    (folder / "notes.txt").write_text("")
    return folder


def call(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def built(folder: Path, out: Path, options: Options = SMALL, **more: bool) -> ClassSet:
    source = find_classes(str(folder), None, "CC0-1.0")
    return build_classes(source, str(out), options, jobs=1, **more).dataset


def members(folder: Path) -> dict[str, bytes]:
    """The members of all shards by name, in order."""
    found = {}
    for path in sorted((folder / "data").iterdir()):
        with tarfile.open(path) as tar:
            found |= {one.name: tar.extractfile(one).read() for one in tar}  # type: ignore[union-attr]
    return found


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
