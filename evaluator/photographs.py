"""Finds photographs and decodes them ahead of whoever uses them, a batch at a time."""

from __future__ import annotations

import io
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.ExifTags import Base

from evaluator.errors import EvaluatorError
from evaluator.images import FORMATS, SUFFIXES, load_image, read_file
from evaluator.protocols import Protocol

DECODE_THREADS = 4  # Pillow decodes and resizes without the interpreter lock
NAMES_SHOWN = 5  # of what is left out


@dataclass(frozen=True)
class Decoded:
    """A photograph as the network sees it, uint8 [size, size, 3], or why there is none."""

    path: Path
    pixels: npt.NDArray[np.uint8] | None
    fault: EvaluatorError | None
    seconds: float
    turned: bool = False


@dataclass(frozen=True)
class Found:
    """What lies below a folder, sorted: whatever is named as an image, and what is left out."""

    photographs: list[Path]
    other_files: list[Path]
    linked_folders: list[Path]


def find_photographs(folder: Path) -> Found:
    """List a folder and its subfolders; names that begin with a dot are not looked at.

    Linked subfolders are not followed: they may lead back, or out of the folder. Raises
    EvaluatorError for a folder that is not there or cannot be listed.
    """
    if not folder.is_dir():
        what = "a file" if folder.exists() else "no such folder"
        raise EvaluatorError(f"{folder}: {what}; expected a folder of photographs")
    found, ahead = Found([], [], []), [folder]
    while ahead:
        here = ahead.pop()
        try:
            for path in here.iterdir():
                if not path.name.startswith("."):
                    _sort_in(path, found, ahead)
        except OSError as error:
            raise EvaluatorError(f"{here}: cannot be listed ({error.strerror})") from None
    for paths in (found.photographs, found.other_files, found.linked_folders):
        paths.sort()
    return found


def _sort_in(path: Path, found: Found, ahead: list[Path]) -> None:
    is_folder, is_link = path.is_dir(), path.is_symlink()
    if is_folder and not is_link:
        ahead.append(path)
    if path.suffix.lower() in SUFFIXES:
        found.photographs.append(path)
    elif not is_folder:
        found.other_files.append(path)
    elif is_link:
        found.linked_folders.append(path)


def left_out(other_files: Sequence[Path], linked_folders: Sequence[Path]) -> list[str]:
    """One line for the files that are no photographs, one for linked folders; none for nothing."""
    lines = []
    if other_files:
        count = f"{len(other_files)} file{'s' if len(other_files) > 1 else ''}"
        lines.append(f"{count} left out: {shown(other_files)}; taken are {', '.join(SUFFIXES)}")
    if linked_folders:
        count = f"{len(linked_folders)} linked folder{'s' if len(linked_folders) > 1 else ''}"
        lines.append(f"{count} not followed: {shown(linked_folders)}")
    return lines


def shown(paths: Sequence[Path]) -> str:
    """The first names."""
    more = ", …" if len(paths) > NAMES_SHOWN else ""
    return ", ".join(map(str, paths[:NAMES_SHOWN])) + more


def turned_line(count: int) -> list[str]:
    """What is said where photographs carry an orientation, as phones write it."""
    if not count:
        return []
    if count == 1:
        return ["1 photograph carries an EXIF orientation; it is read as stored"]
    return [f"{count} photographs carry an EXIF orientation; they are read as stored"]


def read_photograph(path: Path) -> bytes:
    """The bytes of a photograph; EvaluatorError for whatever is no file that can be read."""
    try:
        if path.is_file():
            return read_file(path)
        # A pipe would be waited for.
        what = "a folder, though named as an image" if path.is_dir() else "no file"
        if path.is_symlink() and not path.exists():
            what = "a link to a file that is not there"
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
    raise EvaluatorError(f"{path}: {what}; rename or remove it")


def is_turned(data: bytes) -> bool:
    """Whether Pillow leaves it to us to turn the picture; a TIFF it turns itself."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            # Only what stands in the header: a PNG's may follow its pixels.
            return "exif" in image.info and image.getexif().get(Base.Orientation, 1) not in (0, 1)
    except Exception:  # a damaged tag raises whatever it provokes, and the pixels do not need it
        return False


def decoded_batches(
    paths: Sequence[Path], protocol: Protocol, batch_size: int
) -> Iterator[list[Decoded]]:
    """Batches in order, the next one being decoded meanwhile."""
    starts = range(0, len(paths), batch_size)
    pool = ThreadPoolExecutor(DECODE_THREADS)
    ahead: deque[list[Future[Decoded]]] = deque()
    try:
        for start in starts:
            batch = paths[start : start + batch_size]
            ahead.append([pool.submit(_decode, path, protocol) for path in batch])
            if len(ahead) > 1:
                yield [future.result() for future in ahead.popleft()]
        while ahead:
            yield [future.result() for future in ahead.popleft()]
    finally:
        pool.shutdown(cancel_futures=True)


def _decode(path: Path, protocol: Protocol) -> Decoded:
    started = time.perf_counter()
    try:
        data = read_photograph(path)
        pixels, fault, turned = load_image(path, protocol, data), None, is_turned(data)
    except EvaluatorError as error:
        pixels, fault, turned = None, error, False
    return Decoded(path, pixels, fault, time.perf_counter() - started, turned)


def stacked(batch: Sequence[Decoded]) -> npt.NDArray[np.uint8]:
    """The pixels of a batch, uint8 [images, size, size, 3]; the first fault is raised."""
    pixels = []
    for item in batch:
        if item.fault is not None:
            raise item.fault
        assert item.pixels is not None
        pixels.append(item.pixels)
    return np.stack(pixels)
