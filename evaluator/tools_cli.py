"""The commands for the person on the line: fit, inspect, export-onnx."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from evaluator.options import (
    INTERRUPTED,
    PROTOCOL_NAMES,
    FiniteFloat,
    backbone_options,
    device_of,
    names_of,
    one_line_errors,
    weights_defaults,
)

if TYPE_CHECKING:
    from evaluator.inspect_parts import Row

SOMETHING_REJECTED = 3
INCOMPLETE = 1

Folder = click.Path(path_type=Path, file_okay=False)
# Whether it is there is said where it is opened, in a line of our own.
Given = click.Path(path_type=Path)
DEVICE = click.option(
    "--device",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="auto: cuda where there is one.",
)


@contextlib.contextmanager
def _interrupted(line: Callable[[], str]) -> Iterator[None]:
    """Ctrl-C is this line, as it is true then, and exit code 130."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(line(), err=True)
        raise SystemExit(INTERRUPTED) from None


@click.command()
@click.option(
    "--normals",
    required=True,
    type=Given,
    help="Folder of photographs of good parts, searched with its subfolders (linked ones not).",
)
@click.option(
    "--backbone",
    "spec",
    required=True,
    metavar="[NAME=]SPEC",
    help="As in `evaluator padim`: a run folder, a backbone.json, random:ARCH[:SEED], "
    "torchvision:ARCH[:WEIGHTS], or a weights file.",
)
@click.option("--out", required=True, type=Folder, help="Folder of the model.")
@click.option(
    "--protocol",
    "protocol_name",
    default="full",
    show_default=True,
    type=click.Choice(PROTOCOL_NAMES),
    help="Resize, crop, interpolation, epsilon and blur; full: no crop, the whole part is seen; "
    "paper cuts the border off.",
)
@click.option(
    "--false-reject-rate",
    default=0.05,
    show_default=True,
    type=FiniteFloat(0, 1, min_open=True, max_open=True),
    help="Share of good parts that may be rejected; it sets the threshold.",
)
@click.option(
    "--held-out",
    default=0.2,
    show_default=True,
    type=FiniteFloat(0, 1, min_open=True, max_open=True),
    help="Share of the photographs that set the threshold and are not fitted on.",
)
@click.option(
    "--check",
    default=None,
    type=Given,
    help="Folder of further good photographs, to see how many of them are rejected.",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    type=click.IntRange(0, 2**63 - 1),
    help="Of the random dimensions and of the held-out share.",
)
@backbone_options
def fit(
    normals: Path,
    spec: str,
    out: Path,
    protocol_name: str,
    false_reject_rate: float,
    held_out: float,
    check: Path | None,
    seed: int,
    arch: str,
    dims: int | None,
    layers: str | None,
    batch_size: int,
    device: str,
    max_memory: float,
    input_norm: str | None,
    mean: str | None,
    std: str | None,
) -> None:
    """Learn good parts from photographs, and the score above which a part is rejected.

    Writes model.json and model-HASH.safetensors to --out, for `evaluator inspect`.
    """
    with one_line_errors(out), _interrupted(lambda: "Interrupted; no model was written."):
        from evaluator.backbones import LayersAndDims
        from evaluator.fit import fit as fit_model
        from evaluator.fit_check import check_lines
        from evaluator.fit_photographs import FitOptions
        from evaluator.protocols import PROTOCOLS

        options = FitOptions(
            normals=normals,
            check=check,
            out=out,
            spec=spec,
            weights_defaults=weights_defaults(arch, input_norm, mean, std),
            layers_and_dims=LayersAndDims(tuple(names_of(layers, "--layers") or ()) or None, dims),
            protocol=PROTOCOLS[protocol_name],
            seed=seed,
            false_reject_rate=false_reject_rate,
            held_out=held_out,
            device=device_of(device),
            batch_size=batch_size,
            max_memory_bytes=int(max_memory * 2**30),
        )
        fitted = fit_model(options)
        with _interrupted(lambda: f"Interrupted; {out} holds the model, --check is not finished."):
            click.echo(fitted.lines)
            if fitted.check is not None:
                calibration = fitted.record.calibration
                click.echo(check_lines(fitted.check, fitted.scorer, calibration, options))


@click.command()
@click.argument("model", type=Given)
@click.argument("images", nargs=-1, required=True, type=Given)
@click.option("--out", required=True, type=Folder, help="Folder of scores.csv and maps/.")
@click.option(
    "--batch-size", default=8, show_default=True, type=click.IntRange(1, 4096), help="Images."
)
@DEVICE
@click.option("--maps/--no-maps", default=True, help="Draw a picture of every photograph.")
def inspect(
    model: Path, images: tuple[Path, ...], out: Path, batch_size: int, device: str, maps: bool
) -> None:
    """Score photographs of new parts (files, or folders with their subfolders) with MODEL.

    Writes scores.csv and maps/ to --out; an earlier run's are replaced. Exit code 0: all accepted,
    3: something rejected, 1: something could not be read or went wrong, 2: wrong usage.
    """
    rows: list[Row] = []

    def kept() -> str:
        if not rows:
            return "Interrupted; no photograph was inspected."
        return f"Interrupted; {out / 'scores.csv'} holds the first {len(rows)} photographs."

    with one_line_errors(out), _interrupted(kept):
        from evaluator.inspect_parts import InspectOptions
        from evaluator.inspect_parts import inspect as inspect_parts

        options = InspectOptions(model, images, out, batch_size, device_of(device), maps)
        found = inspect_parts(options, rows)
        click.echo(found.summary)
    if not found.complete:
        raise SystemExit(INCOMPLETE)
    if found.rejected:
        raise SystemExit(SOMETHING_REJECTED)


@click.command("export-onnx")
@click.argument("model", type=Given)
@click.option(
    "--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The .onnx file."
)
def export_onnx(model: Path, out: Path) -> None:
    """Write MODEL as one ONNX graph, photograph to map and score, checked against our own."""
    with one_line_errors(out.parent), _interrupted(lambda: f"Interrupted; {out} was not written."):
        from evaluator.onnx import export

        click.echo(export(model, out))
