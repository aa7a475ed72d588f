"""Command line of the trainer. Heavy imports live inside the commands, so that --help is quick."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args

import click

from trainer import __version__
from trainer.choices import Arch, Components, Matching, Schedule
from trainer.errors import TrainerError
from trainer.options import Bytes, FiniteRange, Place
from trainer.tools_cli import doctor, restate, selftest

FOLDER = click.Path(file_okay=False, path_type=Path)
DEFAULT_EPOCHS = 50.0


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="trainer")
def main() -> None:
    """Pre-train a CNN to tell the parameters of painted pseudo-defects."""


@main.command(context_settings={"show_default": True})
@click.option("--data", type=Place(), required=True,
              help="Dataset of `builder build`: folder, or URL (s3, gs, http).")  # fmt: skip
@click.option("--out", type=Place(), required=True,
              help="Run folder, or a URL to keep it at; the same one resumes.")  # fmt: skip
@click.option("--task", type=click.Choice(["parameters", "classify"]), default="parameters",
              help="classify: the classes of a labelled dataset.")  # fmt: skip
@click.option("--loss", type=click.Choice(["direct", "indirect", "sum"]),
              help="Of --task parameters: equation 9 on the parameters, 11 on the re-rendered "
              "image, or both added.")  # fmt: skip
@click.option("--matching", type=click.Choice(get_args(Matching)), default="nearest",
              help="Of true and estimated components in the direct loss; nearest: the "
              "paper's.")  # fmt: skip
@click.option("--components", type=click.Choice(get_args(Components)), default="all",
              help="Components that the direct loss counts; visible: a grey level or "
              "more.")  # fmt: skip
@click.option("--arch", type=click.Choice(get_args(Arch)), default="wide_resnet50_2")
@click.option("--init", type=click.Path(dir_okay=False, path_type=Path),
              help="Begin with these weights: safetensors with torchvision's keys, input in "
              "[-1, 1].")  # fmt: skip
@click.option("--size", "size_px", type=click.IntRange(16, 4096),
              help="Edge of the images in pixels.  [default: the dataset's]")  # fmt: skip
@click.option("--epochs", type=FiniteRange(10**6),
              help="How long, in passes over the samples.  [default: 50]")  # fmt: skip
@click.option("--steps", type=click.IntRange(1, 10**9), help="How long, in optimizer steps.")
@click.option("--minutes", type=FiniteRange(10**6),
              help="How long, in minutes of training, resumes added up.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(2, 65536), default=64,
              help="Samples of a step, of all processes together.")  # fmt: skip
@click.option("--micro-batches", type=click.IntRange(1, 65536),
              help="Parts of a batch, each with batch norms of its own; the most processes that "
              "can share the work.  [default: the processes at the start]")  # fmt: skip
@click.option("--lr", type=FiniteRange(10), default=3e-4, help="Adam's learning rate.")
@click.option("--schedule", type=click.Choice(get_args(Schedule)), default="constant",
              help="cosine: down to 0 at the end of --epochs or --steps.")  # fmt: skip
@click.option("--warmup-steps", type=click.IntRange(0, 10**9), default=0,
              help="Steps over which the learning rate rises to --lr.")  # fmt: skip
@click.option("--ema", type=FiniteRange(1, max_open=True), metavar="DECAY",
              help="Average the weights, such as 0.999; the average is exported.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0)
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--workers", type=click.IntRange(0, 256),
              help="Processes that decode.  [default: 1, beside a GPU up to 8]")  # fmt: skip
@click.option("--precision", type=click.Choice(["auto", "bf16", "fp32"]), default="auto",
              help="auto: bf16 on a GPU or a CPU with bf16 instructions.")  # fmt: skip
@click.option("--compile", type=click.Choice(["auto", "measure", "off"]), default="auto",
              help="torch.compile where a trial finds it faster; auto: on a GPU.")  # fmt: skip
@click.option("--holdout", type=click.IntRange(0),
              help="Last samples, never trained on.  [default: 512, at most a tenth]")  # fmt: skip
@click.option("--window", "window_shards", type=click.IntRange(1, 10**6), default=16,
              help="Shards whose samples are shuffled together.")  # fmt: skip
@click.option("--cache", type=FOLDER,
              help="Where shards of a URL are kept.  [default: ~/.cache/semiformula]")  # fmt: skip
@click.option("--cache-bytes", type=Bytes(), metavar="SIZE",
              help="What they may take, as 50GB.  [default: 80 % of what is free]")  # fmt: skip
@click.option("--cache-decoded", "decoded_bytes", type=Bytes(), default=0, metavar="SIZE",
              help="Keep so much of decoded images, to decode each once.")  # fmt: skip
@click.option("--max-bad-ratio", type=FiniteRange(1, min_open=False), default=0.0,
              help="Leave bad shards out, up to this share of the samples.")  # fmt: skip
@click.option("--checkpoint-every", type=click.IntRange(1), metavar="STEPS",
              help="Steps between checkpoints.  [default: every 5 minutes]")  # fmt: skip
@click.option("--keep", type=click.IntRange(1, 10**6), default=2, help="Checkpoints to keep.")
@click.option("--tensorboard", is_flag=True, help="Write RUN/tensorboard, too.")
def pretrain(
    task: str,
    loss: str | None,
    epochs: float | None,
    steps: int | None,
    minutes: float | None,
    **options: object,
) -> None:
    """Train on a dataset; the defaults are the paper's.

    Writes the run folder of CHECKPOINT.md: metrics, curves, checkpoints, ledger, and at the end
    backbone.safetensors. Ctrl-C, SIGTERM and SIGUSR1 end it with a checkpoint, and the same command
    goes on from there. For several GPUs: torchrun --nproc-per-node N -m trainer pretrain ...
    """
    if sum(value is not None for value in (epochs, steps, minutes)) > 1:
        raise click.UsageError("give one of --epochs, --steps and --minutes")
    if (task == "classify") == (loss is not None):
        raise click.UsageError("give --loss direct, indirect or sum, or --task classify alone")
    with interruptible():
        from trainer.config import Options
        from trainer.run import Duration
        from trainer.train import pretrain

        if steps is None and minutes is None:
            epochs = epochs or DEFAULT_EPOCHS
        duration = Duration(epochs=epochs, steps=steps, minutes=minutes)
        loss = loss or "cross_entropy"
        pretrain(Options(duration=duration, loss=loss, **options))  # type: ignore[arg-type]


@main.command()
@click.argument("run", type=Place())
@click.option("--data", type=Place(),
              help="Folder or URL where the dataset is now.  [default: as trained]")  # fmt: skip
@click.option("--out", "png", type=click.Path(dir_okay=False, path_type=Path),
              help="[default: RUN/figure5.png, figure5.png where RUN is a URL]")  # fmt: skip
def show(run: str, data: str | None, png: Path | None) -> None:
    """Draw figure 5 of the paper for held-out samples of RUN, a run folder or its URL."""
    if png is not None and png.suffix.lower() != ".png":
        raise click.UsageError(f"--out {png}: the figure is a PNG, give a name that ends in .png")
    with interruptible():
        from trainer.show import show
        from trainer.storage import is_remote, local_path

        png = png or (Path() if is_remote(run) else local_path(run)) / "figure5.png"
        what, error = show(run, data, png)
        click.echo(f"{png}: {what}, error {error:.1f} grey levels (root mean square)")


main.add_command(doctor)
main.add_command(selftest)
main.add_command(restate)


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
