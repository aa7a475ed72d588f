"""Which photographs `evaluator fit` fits on, and which ones set the threshold."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import torch
from tqdm import tqdm

from evaluator import conformal
from evaluator.backbones import LayersAndDims, WeightsDefaults
from evaluator.errors import EvaluatorError
from evaluator.images import SUFFIXES
from evaluator.model import JSON_FILE, TENSORS_FILE, Photographs
from evaluator.photographs import (
    find_photographs,
    is_turned,
    left_out,
    read_photograph,
    turned_line,
)
from evaluator.protocols import Protocol

MIN_FITTED = 2  # a covariance with ddof 1
SPLIT_STREAM = 1  # beside the stream of the dimensions, which is the seed alone


@dataclass(frozen=True)
class FitOptions:
    """The command line of `fit`."""

    normals: Path
    check: Path | None
    out: Path
    spec: str
    weights_defaults: WeightsDefaults
    layers_and_dims: LayersAndDims
    protocol: Protocol
    seed: int
    false_reject_rate: float
    held_out: float
    device: torch.device
    batch_size: int
    max_memory_bytes: int


@dataclass(frozen=True)
class Split:
    """Photographs to fit on, and to choose the threshold with."""

    fitted: list[Path]
    held_out: list[Path]
    record: Photographs
    digests: frozenset[str]


def split_photographs(options: FitOptions) -> Split:
    """List --normals, leave copies out, and hold a seeded share back.

    Raises EvaluatorError when too few are left to fit on or for the false-reject rate.
    """
    folder = options.normals
    paths = listed("--normals", folder, options)
    first: dict[str, Path] = {}
    turned = 0
    with warnings.catch_warnings():  # of huge pictures: they are refused when they are decoded
        warnings.simplefilter("ignore")
        for path in tqdm(paths, desc="reading", unit="img", disable=None, leave=False):
            data = read_photograph(path)
            first.setdefault(hashlib.sha256(data).hexdigest(), path)
            turned += is_turned(data)
    distinct = sorted(first.values())
    held_out = conformal.held_out_of(len(distinct), options.held_out)
    if held_out < conformal.least_held_out(options.false_reject_rate) or (
        len(distinct) - held_out < MIN_FITTED
    ):
        raise _too_few(options, len(distinct))
    for line in turned_line(turned):
        click.echo(line, err=True)
    words = np.random.Philox(key=[options.seed, SPLIT_STREAM]).random_raw(len(distinct))
    chosen = set(np.argsort(words, kind="stable")[:held_out].tolist())
    digest = hashlib.sha256()
    for sha256, path in sorted(first.items(), key=lambda item: item[1]):
        name = path.relative_to(folder).as_posix()
        digest.update(f"{sha256} {name}\n".encode(errors="surrogateescape"))
    record = Photographs(
        fitted=len(distinct) - held_out,
        held_out=held_out,
        duplicates=len(paths) - len(distinct),
        sha256=digest.hexdigest(),
    )
    return Split(
        [path for i, path in enumerate(distinct) if i not in chosen],
        [path for i, path in enumerate(distinct) if i in chosen],
        record,
        frozenset(first),
    )


def listed(option: str, folder: Path, options: FitOptions) -> list[Path]:
    """The photographs of a folder, what is left out being printed; EvaluatorError for none."""
    found = find_photographs(folder)
    others = [
        path
        for path in found.other_files
        if path != options.out / JSON_FILE
        and not (path.parent == options.out and TENSORS_FILE.fullmatch(path.name))
    ]
    lines = left_out(others, found.linked_folders)
    if not found.photographs:
        none = f"no photographs ({', '.join(SUFFIXES)}) in it or its subfolders"
        raise EvaluatorError("; ".join([f"{option} {folder}: {none}", *lines]))
    for line in lines:
        click.echo(f"{option}: {line}", err=True)
    return found.photographs


def _too_few(options: FitOptions, count: int) -> EvaluatorError:
    rate, share = options.false_reject_rate, options.held_out
    enough = conformal.sufficient_share(count, rate, share, MIN_FITTED)
    other = ""
    if enough is not None:
        held_out = conformal.held_out_of(count, enough)
        other = f"set --held-out {enough:g} ({held_out} held out, {count - held_out} fitted), "
    return EvaluatorError(
        f"{options.normals}: {count} different photographs; a false-reject rate of {rate:g} needs "
        f"{conformal.least_held_out(rate)} held out, so "
        f"{conformal.least_in_all(rate, share, MIN_FITTED)} in all at --held-out {share:g}; "
        f"photograph more good parts, {other}or raise --false-reject-rate"
    )
