"""Commands about the trainer itself: doctor and selftest."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import click

from trainer.choices import Arch


@click.command(context_settings={"show_default": True})
@click.option("--data", required=True, help="Dataset: a folder, or a URL (s3://, gs://, http://).")
@click.option("--size", "size_px", type=click.IntRange(16, 4096),
              help="Edge of the images in pixels.  [default: the dataset's]")  # fmt: skip
@click.option("--arch", type=click.Choice(get_args(Arch)), default="wide_resnet50_2")
@click.option("--loss", type=click.Choice(["direct", "indirect"]), default="direct",
              help="Of a dataset with parameters.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(2, 65536), default=64)
@click.option("--workers", type=click.IntRange(0, 256),
              help="Processes that decode.  [default: as `trainer pretrain`]")  # fmt: skip
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--precision", type=click.Choice(["auto", "bf16", "fp32"]), default="auto")
@click.option("--seconds", type=click.FloatRange(1, 3600), default=20.0,
              help="How long to measure, about.")  # fmt: skip
def doctor(**options: object) -> None:
    """Say how fast each stage from storage to device is here, and which one to mend.

    Fetches a few shards, verifies and decodes them, and trains on them for a moment; keeps nothing.
    """
    from trainer.cli import interruptible

    with interruptible():
        from trainer.diagnosis import report
        from trainer.doctor import Options, doctor

        click.echo(report(doctor(Options(**options))))  # type: ignore[arg-type]


@click.command(context_settings={"show_default": True})
@click.option("--chaos", is_flag=True, required=True, help="Kill and damage; the one test so far.")
@click.option("--data", required=True,
              type=click.Path(file_okay=False, path_type=Path),
              help="A folder; small, such as `builder build ... --samples 600`.")  # fmt: skip
@click.option("--seed", type=click.IntRange(0), default=0, help="Other moments, other damage.")
@click.option("--rounds", type=click.IntRange(0, 1000), default=9, help="Strikes.")
@click.option("--epochs", type=click.IntRange(1, 1000), default=6, help="Of each run.")
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Work in DIR, and keep it all.  [default: a temporary folder]")  # fmt: skip
def selftest(
    chaos: bool, data: Path, seed: int, rounds: int, epochs: int, keep: Path | None
) -> None:
    """Train a small network in peace, and again among kills, damage and storage faults.

    Ledger and weights must be those of the calm run: exit code 0, else 1 and what differs.
    """
    import shutil
    import tempfile

    from trainer.cli import interruptible
    from trainer.errors import TrainerError

    with interruptible():
        from trainer.selftest import Options, selftest

        if keep is not None and keep.exists() and any(keep.iterdir()):
            raise TrainerError(f"{keep}: is not empty; choose another --keep")
        folder = keep or Path(tempfile.mkdtemp(prefix="semiformula-selftest-"))
        try:
            verdict = selftest(Options(data, seed, rounds, epochs), folder, click.echo)
        except BaseException:
            if any(folder.iterdir()):  # what differs is kept, to be looked at
                click.echo(f"What was done is kept in {folder}.", err=True)
            elif keep is None:
                folder.rmdir()
            raise
        if keep is None:
            shutil.rmtree(folder)
        click.echo(verdict)


@click.command(context_settings={"show_default": True})
@click.argument("run", type=click.Path(path_type=Path, file_okay=False))
@click.option("--data", required=True,
              help="Dataset whose unpainted normals are looked at.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True,
              help="Folder of the new backbone.")  # fmt: skip
@click.option("--size", "size_px", type=click.IntRange(16, 4096),
              help="Edge of the images in pixels.  [default: the dataset's]")  # fmt: skip
@click.option("--images", type=click.IntRange(2, 10**6), default=1024, help="At most so many.")
def restate(run: Path, data: str, out: Path, size_px: int | None, images: int) -> None:
    """Take the batch norm statistics of RUN's backbone anew, from unpainted photographs.

    The weights stay; running means and variances become those of the photographs at --size, such
    as the size of the inspection. Writes backbone.safetensors and backbone.json to --out.
    """
    from trainer.cli import interruptible

    with interruptible():
        from trainer.restate import restate as take_anew

        click.echo(take_anew(run, data, out, size_px=size_px, images=images))
