"""Finds photographs and decodes them ahead of whoever uses them, a batch at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from evaluator.errors import EvaluatorError
from evaluator.images import SUFFIXES, load_image
from evaluator.protocols import Protocol

DECODE_THREADS = 4  # Pillow decodes and resizes without the interpreter lock


@dataclass(frozen=True)
class Decoded:
    """A photograph as the network sees it, uint8 [size, size, 3], or why there is none."""

    path: Path
    pixels: npt.NDArray[np.uint8] | None
    fault: EvaluatorError | None
    seconds: float


def find_photographs(folder: Path) -> list[Path]:
    """All image files below `folder`, sorted; names that begin with a dot are not looked at."""
    found = []
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.suffix.lower() in SUFFIXES and not hidden and path.is_file():
            found.append(path)
    return sorted(found)


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
        pixels, fault = load_image(path, protocol), None
    except EvaluatorError as error:
        pixels, fault = None, error
    return Decoded(path, pixels, fault, time.perf_counter() - started)


def stacked(batch: Sequence[Decoded]) -> npt.NDArray[np.uint8]:
    """The pixels of a batch, uint8 [images, size, size, 3]; the first fault is raised."""
    pixels = []
    for item in batch:
        if item.fault is not None:
            raise item.fault
        assert item.pixels is not None
        pixels.append(item.pixels)
    return np.stack(pixels)
