"""Scores photographs with a model just fitted: those that set its threshold, and --check."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from tqdm import tqdm

from evaluator import conformal
from evaluator.errors import EvaluatorError
from evaluator.fit_photographs import FitOptions, Split, listed
from evaluator.model import NOT_FINITE, Calibration, are_finite, score
from evaluator.photographs import decoded_batches, read_photograph
from evaluator.scorer import Scorer

UNLIKELY = 0.01


@dataclass(frozen=True)
class CheckSet:
    """The photographs of --check that the model does not know, and why some cannot be used."""

    folder: Path
    paths: list[Path]
    known: int
    faults: list[str]


def read_check_set(options: FitOptions, split: Split) -> CheckSet | None:
    """List and read --check before anything is fitted; None where it is not given.

    Raises EvaluatorError when no photograph is left to check with.
    """
    if options.check is None:
        return None
    check = CheckSet(options.check, [], 0, [])
    paths, known = [], 0
    for path in listed("--check", options.check, options):
        try:
            digest = hashlib.sha256(read_photograph(path)).hexdigest()
        except EvaluatorError as error:
            check.faults.append(error.message)
            continue
        if digest in split.digests:
            known += 1
        else:
            paths.append(path)
    if not paths:
        raise EvaluatorError(
            f"--check {options.check}: no photographs to check with ({known} that the model knows "
            f"left out, {len(check.faults)} unreadable)"
        )
    return CheckSet(options.check, paths, known, check.faults)


def score_files(
    scorer: Scorer, paths: Sequence[Path], options: FitOptions, what: str
) -> list[float | EvaluatorError]:
    """The scores of photographs, in order, or why there is none."""
    results: list[float | EvaluatorError] = []
    with tqdm(total=len(paths), desc=what, unit="img", disable=None) as bar:
        for batch in decoded_batches(paths, options.protocol, options.batch_size):
            readable = [item.pixels for item in batch if item.pixels is not None]
            judged: Iterator[tuple[float, np.bool_]] = iter(())
            if readable:
                maps, scores = score(scorer, np.stack(readable), options.device)
                judged = iter(zip(scores.tolist(), are_finite(maps, scores), strict=True))
            for item in batch:
                if item.fault is not None:
                    results.append(item.fault)
                    continue
                value, finite = next(judged)
                results.append(value if finite else EvaluatorError(f"{item.path}: {NOT_FINITE}"))
            bar.update(len(batch))
    return results


def calibrate(scorer: Scorer, held_out: Sequence[Path], options: FitOptions) -> Calibration:
    """The threshold, from photographs that were not fitted on; EvaluatorError without a score."""
    scores: list[float] = []
    for result in score_files(scorer, held_out, options, "held out"):
        if isinstance(result, EvaluatorError):
            raise result
        scores.append(result)
    scores.sort()
    rate = options.false_reject_rate
    threshold = conformal.threshold(scores, rate)
    return Calibration(false_reject_rate=rate, threshold=threshold, scores=scores)


def check_lines(
    check: CheckSet, scorer: Scorer, calibration: Calibration, options: FitOptions
) -> str:
    """How many of --check are rejected, with an interval, and which of them cannot be read."""
    results = score_files(scorer, check.paths, options, "check")
    faults = [*check.faults, *(one.message for one in results if isinstance(one, EvaluatorError))]
    for fault in faults:
        click.echo(f"unreadable: {fault}", err=True)
    scores = [one for one in results if not isinstance(one, EvaluatorError)]
    if not scores:
        return f"Of {check.folder}, no photograph could be scored ({len(faults)} unreadable)."
    left_out = [
        text
        for count, text in (
            (check.known, f"{check.known} that the model knows left out"),
            (len(faults), f"{len(faults)} unreadable"),
        )
        if count
    ]
    which = f" ({', '.join(left_out)})" if left_out else ""
    rejected = sum(value > calibration.threshold for value in scores)
    low, high = conformal.clopper_pearson(rejected, len(scores))
    line = (
        f"Of {len(scores)} in {check.folder}{which}, "
        f"{rejected} are rejected ({100 * rejected / len(scores):.1f} %; 95 % interval "
        f"{100 * low:.1f} to {100 * high:.1f} %)."
    )
    held_out, rate = len(calibration.scores), calibration.false_reject_rate
    chance = conformal.chance(rejected, len(scores), held_out, rate)
    if chance >= UNLIKELY:
        return line
    return (
        f"{line}\nSo many have a probability of {chance:.1e} where photographs are like --normals: "
        "these differ from them, and the promise does not hold for such ones. Photograph good "
        "parts as they will be inspected, and fit again."
    )
