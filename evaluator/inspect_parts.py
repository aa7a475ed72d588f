"""`evaluator inspect`: photographs of new parts -> scores, verdicts, pictures."""

from __future__ import annotations

import contextlib
import csv
import io
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path, PurePosixPath

import click
import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from tqdm import tqdm

from evaluator import conformal
from evaluator.artifacts import remove_leftovers, write_bytes
from evaluator.errors import EvaluatorError
from evaluator.heat_map import Verdict, draw, original_place
from evaluator.images import FORMATS, read_file
from evaluator.model import Inspector, load_model
from evaluator.photographs import Decoded, decoded_batches, find_photographs

SCORES_FILE, MAPS_FOLDER = "scores.csv", "maps"
MAX_CSV_BYTES = 2**30


@dataclass(frozen=True)
class InspectOptions:
    """The command line of `inspect`."""

    model: Path
    paths: tuple[Path, ...]
    out: Path
    batch_size: int
    device: torch.device
    maps: bool


@dataclass(frozen=True)
class Part:
    """A photograph, and where its picture goes below the folder of maps."""

    path: Path
    picture: PurePosixPath


@dataclass(frozen=True)
class Row:
    """One line of scores.csv; what an unreadable photograph lacks is empty."""

    file: str
    score: str = ""
    threshold: str = ""
    rejected: str = ""
    x_px: str = ""
    y_px: str = ""
    p_value: str = ""
    seconds: str = ""
    heat_map: str = ""
    error: str = ""


@dataclass(frozen=True)
class Inspected:
    """What came of it: the counts add up to the photographs given."""

    accepted: int
    rejected: int
    unreadable: int
    seconds: float

    @property
    def summary(self) -> str:
        """One line."""
        readable = self.accepted + self.rejected
        rate = readable / self.seconds if self.seconds > 0 else 0.0
        unreadable = f", {self.unreadable} unreadable" if self.unreadable else ""
        return (
            f"{readable + self.unreadable} photographs: {self.accepted} accepted, {self.rejected} "
            f"rejected{unreadable}; {rate:.1f} images/s"
        )


def list_parts(paths: Sequence[Path], out: Path) -> list[Part]:
    """The photographs of files and folders, each once, every one with a picture of its own.

    What lies below `out` is ours and not looked at. Raises EvaluatorError where nothing is left.
    """
    named: dict[Path, PurePosixPath] = {}
    for given in paths:
        for path in find_photographs(given) if given.is_dir() else [given]:
            inner = path.relative_to(given) if given.is_dir() else Path(path.name)
            named.setdefault(path, PurePosixPath(inner.as_posix()))
    ours = out.resolve()
    seen: set[Path] = set()
    parts, taken = [], set()
    for path, inner in named.items():
        real = path.resolve()
        if real in seen or real.is_relative_to(ours):
            continue
        seen.add(real)
        picture, number = inner.with_suffix(".png"), 2
        while str(picture).casefold() in taken:  # some file systems ignore case
            picture, number = inner.with_name(f"{inner.stem}-{number}.png"), number + 1
        taken.add(str(picture).casefold())
        parts.append(Part(path, picture))
    if not parts:
        raise EvaluatorError(f"{', '.join(map(str, paths))}: no photographs to inspect")
    return parts


def inspect(options: InspectOptions) -> Inspected:
    """Score every photograph and write scores.csv and the pictures; an interrupt keeps the rows."""
    parts = list_parts(options.paths, options.out)
    model = load_model(options.model, options.device)
    options.out.mkdir(parents=True, exist_ok=True)
    _remove_earlier(options.out)
    rows: list[Row] = []
    started = time.perf_counter()
    with (
        _kept(options.out, rows),
        ThreadPoolExecutor(2) as pool,
        tqdm(total=len(parts), desc="inspecting", unit="img", disable=None) as bar,
    ):
        batches = decoded_batches(
            [part.path for part in parts], model.record.protocol, options.batch_size
        )
        for batch in batches:
            here = parts[len(rows) : len(rows) + len(batch)]
            rows += _batch_rows(model, here, batch, options, pool)
            bar.update(len(batch))
    rejected = sum(row.rejected == "1" for row in rows)
    unreadable = sum(bool(row.error) for row in rows)
    seconds = time.perf_counter() - started
    return Inspected(len(rows) - rejected - unreadable, rejected, unreadable, seconds)


@contextlib.contextmanager
def _kept(out: Path, rows: list[Row]) -> Iterator[None]:
    """Whatever happens, scores.csv holds the rows that are there."""
    try:
        yield
    finally:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        names = [field.name for field in fields(Row)]
        writer.writerow(names)
        writer.writerows([getattr(row, name) for name in names] for row in rows)
        write_bytes(out / SCORES_FILE, text.getvalue().encode(errors="surrogateescape"))


def _batch_rows(
    model: Inspector,
    parts: Sequence[Part],
    batch: Sequence[Decoded],
    options: InspectOptions,
    pool: ThreadPoolExecutor,
) -> list[Row]:
    """The rows of one batch, in order; its pictures are written when it returns."""
    readable = [k for k, item in enumerate(batch) if item.pixels is not None]
    started = time.perf_counter()
    maps = np.empty((0, 1, 1), np.float32)
    scores = np.empty(0, np.float32)
    if readable:
        maps, scores = model(np.stack([batch[k].pixels for k in readable]))  # type: ignore[arg-type]
    each_s = (time.perf_counter() - started) / max(1, len(readable))
    rows: list[Row | None] = [None] * len(batch)
    for k, item in enumerate(batch):
        if item.fault is not None:
            click.echo(f"unreadable: {item.fault.message}", err=True)
            rows[k] = Row(str(item.path), error=item.fault.message)
    jobs = [
        (k, float(scores[i]), maps[i], batch[k].seconds + each_s) for i, k in enumerate(readable)
    ]
    made = pool.map(lambda job: _part_row(model, parts[job[0]], *job[1:], options), jobs)
    for (k, *_), row in zip(jobs, made, strict=True):
        rows[k] = row
    return [row for row in rows if row is not None]


def _part_row(
    model: Inspector,
    part: Part,
    score: float,
    scores: npt.NDArray[np.float32],
    seconds: float,
    options: InspectOptions,
) -> Row:
    """The row of one part; its picture is written first."""
    protocol = model.record.protocol
    data = read_file(part.path)
    row, column = divmod(int(scores.argmax()), scores.shape[1])
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        size = image.size
    place = original_place(row, column, size, protocol)
    verdict = Verdict(str(part.path), score, model.threshold, place)
    picture = ""
    if options.maps:
        picture = str(PurePosixPath(MAPS_FOLDER) / part.picture)
        write_bytes(options.out / picture, draw(data, scores, verdict, protocol))
    return Row(
        file=str(part.path),
        score=f"{score:.9g}",
        threshold=f"{model.threshold:.9g}",
        rejected=str(int(verdict.rejected)),
        x_px=str(place[0]),
        y_px=str(place[1]),
        p_value=f"{conformal.p_value(model.record.calibration.scores, score):.6g}",
        seconds=f"{seconds:.4f}",
        heat_map=picture,
    )


def _remove_earlier(out: Path) -> None:
    """Delete the scores and pictures of an earlier run into `out`, and nothing else."""
    remove_leftovers(out)
    path, folder = out / SCORES_FILE, out / MAPS_FOLDER
    if not path.is_file() or path.stat().st_size > MAX_CSV_BYTES:
        return
    with path.open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        for row in csv.DictReader(file):
            name = row.get("heat_map") or ""
            picture = out / name
            inside = name.endswith(".png") and picture.resolve().is_relative_to(folder.resolve())
            if inside and "\0" not in name:
                picture.unlink(missing_ok=True)
    path.unlink()
