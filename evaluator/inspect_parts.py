"""`evaluator inspect`: photographs of new parts -> scores, verdicts, pictures."""

from __future__ import annotations

import contextlib
import csv
import io
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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
class Scored:
    """Map float32 [size, size] and score of a photograph; the seconds of decoding and scoring."""

    map: npt.NDArray[np.float32]
    score: float
    seconds: float


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
    inner_of: dict[Path, Path] = {}  # photograph -> its path below the folder that was given
    for given in paths:
        if given.is_dir():
            for path in find_photographs(given):
                inner_of.setdefault(path, path.relative_to(given))
        else:
            inner_of.setdefault(given, Path(given.name))
    ours = out.resolve()
    seen: set[Path] = set()
    taken: set[str] = set()
    parts = []
    for path, inner in inner_of.items():
        real = path.resolve()
        if real in seen or real.is_relative_to(ours):
            continue
        seen.add(real)
        picture, number = inner.with_suffix(".png"), 2
        while str(picture).casefold() in taken:  # some file systems ignore case
            picture, number = inner.with_name(f"{inner.stem}-{number}.png"), number + 1
        taken.add(str(picture).casefold())
        parts.append(Part(path, PurePosixPath(picture.as_posix())))
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
    started = time.perf_counter()
    readable = [item.pixels for item in batch if item.pixels is not None]
    results: Iterator[tuple[npt.NDArray[np.float32], np.float32]] = iter(())
    if readable:
        results = zip(*model(np.stack(readable)), strict=True)
    each_s = (time.perf_counter() - started) / max(1, len(readable))
    rows: list[Row | Future[Row]] = []
    for part, item in zip(parts, batch, strict=True):
        if item.fault is not None:
            click.echo(f"unreadable: {item.fault.message}", err=True)
            rows.append(Row(str(part.path), error=item.fault.message))
        else:
            scores, score = next(results)
            scored = Scored(scores, float(score), item.seconds + each_s)
            rows.append(pool.submit(_part_row, model, part, scored, options))
    return [row if isinstance(row, Row) else row.result() for row in rows]


def _part_row(model: Inspector, part: Part, scored: Scored, options: InspectOptions) -> Row:
    """The row of one part; its picture is written first."""
    protocol = model.record.protocol
    data = read_file(part.path)
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        size = image.size
    row, column = divmod(int(scored.map.argmax()), protocol.size_px)
    place = original_place(row, column, size, protocol)
    verdict = Verdict(str(part.path), scored.score, model.threshold, place)
    picture = ""
    if options.maps:
        picture = str(PurePosixPath(MAPS_FOLDER) / part.picture)
        write_bytes(options.out / picture, draw(data, scored.map, verdict, protocol))
    return Row(
        file=str(part.path),
        score=f"{scored.score:.9g}",
        threshold=f"{model.threshold:.9g}",
        rejected=str(int(verdict.rejected)),
        x_px=str(place[0]),
        y_px=str(place[1]),
        p_value=f"{conformal.p_value(model.record.calibration.scores, scored.score):.6g}",
        seconds=f"{scored.seconds:.4f}",
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
