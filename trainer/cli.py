"""Command line of the trainer. Heavy imports live inside the commands, so that --help is quick."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import click

from trainer import __version__
from trainer.choices import Arch, Loss
from trainer.errors import TrainerError

FOLDER = click.Path(file_okay=False, path_type=Path)
DEFAULT_EPOCHS = 50.0


class FiniteRange(click.FloatRange):
    """A float above 0 and at most `max`; FloatRange alone lets nan through."""

    def __init__(self, max: float) -> None:
        super().__init__(0, max, min_open=True)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number: float = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value} is not a number.", param, ctx)
        return number


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="trainer")
def main() -> None:
    """Pre-train a CNN to tell the parameters of painted pseudo-defects."""


@main.command(context_settings={"show_default": True})
@click.option("--data", type=FOLDER, required=True, help="Dataset of `builder build`.")
@click.option("--out", type=FOLDER, required=True, help="Run folder; the same one resumes.")
@click.option("--loss", type=click.Choice(get_args(Loss)), required=True,
              help="Equation 9 on the parameters, or 11 on the re-rendered image.")  # fmt: skip
@click.option("--arch", type=click.Choice(get_args(Arch)), default="wide_resnet50_2")
@click.option("--size", "size_px", type=click.IntRange(16, 4096),
              help="Edge of the images in pixels.  [default: the dataset's]")  # fmt: skip
@click.option("--epochs", type=FiniteRange(10**6),
              help="How long, in passes over the samples.  [default: 50]")  # fmt: skip
@click.option("--steps", type=click.IntRange(1, 10**9), help="How long, in optimizer steps.")
@click.option("--minutes", type=FiniteRange(10**6),
              help="How long, in minutes of training, resumes added up.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(2, 65536), default=64)
@click.option("--lr", type=FiniteRange(10), default=1e-3,
              help="Adam's learning rate, constant.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0)
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--workers", type=click.IntRange(0, 256),
              help="Processes that decode.  [default: 1, beside a GPU up to 8]")  # fmt: skip
@click.option("--precision", type=click.Choice(["auto", "bf16", "fp32"]), default="auto",
              help="auto: bf16 on a GPU or a CPU with bf16 instructions.")  # fmt: skip
@click.option("--holdout", type=click.IntRange(0),
              help="Last samples, never trained on.  [default: 512, at most a tenth]")  # fmt: skip
@click.option("--checkpoint-every", type=click.IntRange(1), metavar="STEPS",
              help="Steps between checkpoints.  [default: every 5 minutes]")  # fmt: skip
def pretrain(
    epochs: float | None, steps: int | None, minutes: float | None, **options: object
) -> None:
    """Train on a dataset; the defaults are the paper's.

    Writes the run folder of CHECKPOINT.md: metrics, loss curve, checkpoints, and at the end
    backbone.safetensors. Ends with a checkpoint on Ctrl-C; the same command goes on from there.
    """
    if sum(value is not None for value in (epochs, steps, minutes)) > 1:
        raise click.UsageError("give one of --epochs, --steps and --minutes")
    with interruptible():
        from trainer.run import Duration
        from trainer.train import Options, pretrain

        if steps is None and minutes is None:
            epochs = epochs or DEFAULT_EPOCHS
        duration = Duration(epochs=epochs, steps=steps, minutes=minutes)
        pretrain(Options(duration=duration, **options))  # type: ignore[arg-type]


@main.command()
@click.argument("run", type=FOLDER)
@click.option("--data", help="Folder or URL where the dataset is now.  [default: as trained]")
@click.option("--out", "png", type=click.Path(dir_okay=False, path_type=Path),
              help="[default: RUN/figure5.png]")  # fmt: skip
def show(run: Path, data: str | None, png: Path | None) -> None:
    """Draw figure 5 of the paper for held-out samples."""
    if png is not None and png.suffix.lower() != ".png":
        raise click.UsageError(f"--out {png}: the figure is a PNG, give a name that ends in .png")
    with interruptible():
        from trainer.show import show_run

        if not run.is_dir():
            raise TrainerError(f"{run}: no such folder; expected one of `trainer pretrain`")
        png = png or run / "figure5.png"
        what, error = show_run(run, data, png)
        click.echo(f"{png}: {what}, error {error:.1f} grey levels (root mean square)")


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C is one line and exit code 130; a full disk, no memory, no torch one line and 1."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise TrainerError(
            f"{error.name} is not installed; pip install 'semiformula[train]' brings all it needs"
        ) from None
    except OSError as error:
        raise TrainerError(f"{error.filename or 'output'}: {error.strerror or error}") from None
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        first = (str(error) or "MemoryError").splitlines()[0].rstrip(". ")
        raise TrainerError(
            f"out of memory ({first}); use a smaller --batch-size in a new --out"
        ) from None
    except KeyboardInterrupt:
        click.echo("Interrupted.", err=True)
        raise SystemExit(130) from None


def out_of_memory(error: Exception) -> bool:
    """Python's and NumPy's, torch's of a GPU, torch's of the CPU; --help must not import torch."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )
