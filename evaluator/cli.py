"""Command line of the evaluator."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from evaluator import __version__
from evaluator.errors import EvaluatorError, is_out_of_memory

if TYPE_CHECKING:
    from evaluator.backbones import WeightsDefaults

INTERRUPTED = 130


class FiniteFloat(click.FloatRange):
    """A number within a range; click's own lets not-a-number pass every bound."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number; a usage error where it is not finite or out of range."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


@contextlib.contextmanager
def one_line_errors(out: Path) -> Iterator[None]:
    """Ctrl-C is one line and exit code 130; a full disk, no memory, no torch one line and 1."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise EvaluatorError(
            f"{error.name} is not installed; pip install 'semiformula[eval]' brings all it needs"
        ) from None
    except KeyboardInterrupt:
        click.echo(f"Interrupted; the same command continues in {out}.", err=True)
        raise SystemExit(INTERRUPTED) from None
    except OSError as error:  # a full disk, a folder without permission
        raise EvaluatorError(f"{error.filename or out}: {error.strerror or error}") from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise EvaluatorError(
            f"memory ran out ({reason:.200}); lower --batch-size or --max-memory, the same command "
            f"continues in {out}"
        ) from None


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="evaluator")
def main() -> None:
    """Compare pre-trained backbones by what PaDiM makes of them on inspection photographs."""


@main.command()
@click.option(
    "--data",
    "root",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of the categories, MVTec AD layout.",
)
@click.option(
    "--backbone",
    "specs",
    required=True,
    multiple=True,
    metavar="NAME=SPEC",
    help="Repeatable. SPEC: a run folder of the trainer, a backbone.json, random:ARCH[:SEED], "
    "torchvision:ARCH[:WEIGHTS], or a safetensors or state-dict file "
    "(FILE[,arch=ARCH][,norm=imagenet|signed]). NAME= may be left out for random: and "
    "torchvision:.",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the report; the same command continues an interrupted one.",
)
@click.option("--arch", default="", help="Architecture of weights files that do not name theirs.")
@click.option("--categories", default=None, metavar="A,B", help="Only these; default: all.")
@click.option(
    "--seeds",
    default=5,
    show_default=True,
    type=click.IntRange(1, 100),
    help="Draws of the random dimensions: seeds 0, 1, ...",
)
@click.option(
    "--dims",
    default=None,
    type=click.IntRange(1, 100_000),
    help="Random dimensions; default: the architecture's.",
)
@click.option(
    "--layers",
    default=None,
    metavar="A,B,C",
    help="Layers, by torchvision's names; default: the architecture's.",
)
@click.option(
    "--resize",
    default=256,
    show_default=True,
    type=click.IntRange(16, 4096),
    help="Pixels; photographs become squares of this size.",
)
@click.option(
    "--crop",
    default=224,
    show_default=True,
    type=click.IntRange(0, 4096),
    help="Pixels of the centre crop; 0: none.",
)
@click.option(
    "--blur-sigma",
    default=4.0,
    show_default=True,
    type=FiniteFloat(0, 100),
    help="Gaussian blur of the maps, in pixels.",
)
@click.option(
    "--epsilon",
    default=0.01,
    show_default=True,
    type=FiniteFloat(0, 1e6, min_open=True),
    help="Added to the covariances' diagonals.",
)
@click.option(
    "--batch-size", default=32, show_default=True, type=click.IntRange(1, 4096), help="Images."
)
@click.option(
    "--device",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "cpu", "cuda"]),
    help="auto: cuda where there is one.",
)
@click.option(
    "--max-memory",
    default=1.0,
    show_default=True,
    metavar="GIB",
    type=FiniteFloat(0, 4096, min_open=True),
    help="Most that a tile of covariances may take.",
)
@click.option(
    "--input-norm",
    default=None,
    type=click.Choice(["imagenet", "signed"]),
    help="Normalisation of weights files that do not name theirs; signed: pixels in [-1, 1].",
)
@click.option("--mean", default=None, metavar="R,G,B", help="The same as numbers, with --std.")
@click.option("--std", default=None, metavar="R,G,B", help="See --mean; pixels are in [0, 1].")
def padim(
    root: Path,
    specs: tuple[str, ...],
    out: Path,
    arch: str,
    categories: str | None,
    seeds: int,
    dims: int | None,
    layers: str | None,
    resize: int,
    crop: int,
    blur_sigma: float,
    epsilon: float,
    batch_size: int,
    device: str,
    max_memory: float,
    input_norm: str | None,
    mean: str | None,
    std: str | None,
) -> None:
    """Score every backbone on every category with PaDiM.

    Writes report.json, table.csv, table.md and figure6.png to --out and prints the table.
    """
    if crop > resize:
        raise click.UsageError(f"--crop {crop} is larger than --resize {resize}")
    with one_line_errors(out):
        from evaluator.backbones import LayersAndDims
        from evaluator.cells import Resources
        from evaluator.padim import BLUR_BORDER
        from evaluator.report import Protocol
        from evaluator.run import Options, evaluate

        options = Options(
            root=root,
            specs=specs,
            categories=_names(categories, "--categories"),
            protocol=Protocol(
                resize_px=resize,
                crop_px=crop,
                blur_sigma_px=blur_sigma,
                blur_border=BLUR_BORDER,
                epsilon=epsilon,
                seeds=list(range(seeds)),
            ),
            weights_defaults=_weights_defaults(arch, input_norm, mean, std),
            layers_and_dims=LayersAndDims(tuple(_names(layers, "--layers") or ()) or None, dims),
            device=_device(device),
            resources=Resources(out, batch_size, int(max_memory * 2**30)),
        )
        click.echo(evaluate(options))
        click.echo(f"{out}: report.json, table.csv, table.md, figure6.png")


def _names(text: str | None, option: str) -> list[str] | None:
    """The parts of a comma-separated option."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise click.UsageError(f"{option} {text!r}: expected names separated by commas")
    return parts


def _weights_defaults(
    arch: str, input_norm: str | None, mean: str | None, std: str | None
) -> WeightsDefaults:
    from evaluator.backbones import NORMALISATIONS, WeightsDefaults

    if (mean is None) != (std is None) or (mean is not None and input_norm is not None):
        raise click.UsageError("give --input-norm, or --mean and --std together")
    if mean is not None and std is not None:
        spread = _rgb(std, "--std")
        if min(spread) <= 0:
            raise click.UsageError(f"--std {std}: must be above 0")
        return WeightsDefaults(arch, _rgb(mean, "--mean"), spread)
    if input_norm is not None:
        return WeightsDefaults(arch, *NORMALISATIONS[input_norm])
    return WeightsDefaults(arch)


def _rgb(text: str, option: str) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(part) for part in text.split(","))
    except ValueError:
        raise click.UsageError(f"{option} {text!r}: expected three numbers R,G,B") from None
    if not all(abs(value) < 1e6 for value in (red, green, blue)):  # not-a-number included
        raise click.UsageError(f"{option} {text!r}: expected three finite numbers")
    return red, green, blue


def _device(name: str):  # type: ignore[no-untyped-def]
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise EvaluatorError("--device cuda: torch finds no CUDA device; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
