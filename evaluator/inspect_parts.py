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
from evaluator.artifacts import write_bytes
from evaluator.errors import EvaluatorError
from evaluator.heat_map import Verdict, draw, original_place
from evaluator.images import DAMAGE, FORMATS
from evaluator.inspect_list import MAPS_FOLDER, SCORES_FILE, Part, list_parts
from evaluator.model import NOT_FINITE, Inspector, are_finite, load_model
from evaluator.out_folder import prepare_out
from evaluator.photographs import Decoded, decoded_batches, read_photograph, turned_line

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
class Scored:
    """Map float32 [size, size] and score of a photograph; the seconds of decoding and scoring."""

    map: npt.NDArray[np.float32]
    score: float
    seconds: float


@dataclass(frozen=True)
class Row:
    """One line of scores.csv; what a photograph that cannot be judged lacks is empty."""

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
    """What came of it: accepted, rejected and unreadable add up to the photographs given."""

    accepted: int
    rejected: int
    unreadable: int
    without_picture: int
    seconds: float

    @property
    def complete(self) -> bool:
        """Whether every photograph has been judged, and drawn where that was wanted."""
        return not (self.unreadable or self.without_picture)

    @property
    def summary(self) -> str:
        """One line."""
        readable = self.accepted + self.rejected
        rate = readable / self.seconds if self.seconds > 0 else 0.0
        unreadable = f", {self.unreadable} unreadable" if self.unreadable else ""
        without = f"; {self.without_picture} pictures not written" if self.without_picture else ""
        return (
            f"{readable + self.unreadable} photographs: {self.accepted} accepted, {self.rejected} "
            f"rejected{unreadable}{without}; {rate:.1f} images/s"
        )


def inspect(options: InspectOptions, rows: list[Row]) -> Inspected:
    """Score every photograph and write scores.csv and the pictures; an interrupt keeps `rows`.

    `rows` is filled as the batches come, so that who catches the interrupt knows what is kept.
    """
    listed = list_parts(options.paths, options.out)
    for note in listed.notes:
        click.echo(note, err=True)
    parts, turned = listed.parts, 0
    model = load_model(options.model, options.device)
    prepare_out(options.out)
    _remove_earlier(options.out)
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
            turned += sum(item.turned for item in batch)
            bar.update(len(batch))
    for line in turned_line(turned):
        click.echo(line, err=True)
    return _counted(rows, time.perf_counter() - started)


def _counted(rows: Sequence[Row], seconds: float) -> Inspected:
    rejected = sum(row.rejected == "1" for row in rows)
    unreadable = sum(not row.rejected for row in rows)
    return Inspected(
        accepted=len(rows) - rejected - unreadable,
        rejected=rejected,
        unreadable=unreadable,
        without_picture=sum(bool(row.rejected and row.error) for row in rows),
        seconds=seconds,
    )


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
    results: Iterator[tuple[npt.NDArray[np.float32], float, np.bool_]] = iter(())
    if readable:
        maps, scores = model(np.stack(readable))
        results = iter(zip(maps, scores.tolist(), are_finite(maps, scores), strict=True))
    each_s = (time.perf_counter() - started) / max(1, len(readable))
    rows: list[Row | Future[Row]] = []
    for part, item in zip(parts, batch, strict=True):
        if item.fault is not None:
            rows.append(_row_without_score(part, item.fault.message))
            continue
        one_map, value, finite = next(results)
        if finite:
            scored = Scored(one_map, value, item.seconds + each_s)
            rows.append(pool.submit(_part_row, model, part, scored, options))
        else:
            rows.append(_row_without_score(part, f"{part.path}: {NOT_FINITE}"))
    return [row if isinstance(row, Row) else row.result() for row in rows]


def _row_without_score(part: Part, message: str) -> Row:
    click.echo(f"unreadable: {message}", err=True)
    return Row(str(part.path), error=message)


def _part_row(model: Inspector, part: Part, scored: Scored, options: InspectOptions) -> Row:
    """The row of one part; its picture is written first."""
    protocol = model.record.protocol
    try:
        data = read_photograph(part.path)
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            size = image.size
    except (EvaluatorError, *DAMAGE) as error:  # it was readable a moment ago
        return _row_without_score(part, f"{part.path}: changed while it was inspected ({error})")
    row, column = divmod(int(scored.map.argmax()), protocol.size_px)
    place = original_place(row, column, size, protocol)
    verdict = Verdict(str(part.path), scored.score, model.threshold, place)
    picture, fault = "", ""
    if options.maps:
        try:
            picture = str(PurePosixPath(MAPS_FOLDER) / part.picture)
            write_bytes(options.out / picture, draw(data, scored.map, verdict, protocol))
        except OSError as error:
            fault = f"{options.out / picture}: picture not written ({error.strerror or error})"
            picture = ""
            click.echo(fault, err=True)
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
        error=fault,
    )


def _remove_earlier(out: Path) -> None:
    """Delete the scores and pictures of an earlier run into `out`, and nothing else."""
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
