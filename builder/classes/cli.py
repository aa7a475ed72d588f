"""The command `builder classes`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from builder.recipe import Codec


@click.command()
@click.argument("given", metavar="MANIFEST-or-FOLDER")
@click.option("--root", help="Folder or URL where the manifest's data lie.")
@click.option("--out", required=True, help="Dataset folder, or URL (s3://, gs://).")
@click.option(
    "--size", "size_px", default=224, show_default=True, type=click.IntRange(16, 4096),
    help="Edge of the images in pixels.",
)  # fmt: skip
@click.option("--codec", type=click.Choice(["webp", "jpeg"]), default="webp", show_default=True)
@click.option(
    "--samples-per-shard", default=1000, show_default=True, type=click.IntRange(1, 1_000_000)
)
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1),
    help="Of the order of the samples.",
)  # fmt: skip
@click.option("--licence", help="Licence of a folder's photographs; recorded in the dataset.")
@click.option("--allow-incomplete", is_flag=True, help="Go on without missing or bad files.")
@click.option("--jobs", type=click.IntRange(1), help="Processes; default: all usable cores.")
def classes(
    given: str,
    root: str | None,
    out: str,
    size_px: int,
    codec: Codec,
    samples_per_shard: int,
    seed: int,
    licence: str | None,
    allow_incomplete: bool,
    jobs: int | None,
) -> None:
    """Write labelled shards for `trainer pretrain --task classify`.

    From a folder that holds one folder of photographs a class, or a manifest with [[classes]]
    (btad, dagm2007, or a TOML file). The same command resumes what was cut off.
    """
    from builder.classes.build import Options, build_classes
    from builder.classes.sources import find_classes
    from builder.cli import resumable
    from builder.rejects import source_lines
    from builder.workers import usable_cores

    source = find_classes(given, root, licence)
    with resumable(out):
        done = build_classes(
            source,
            out,
            Options(size_px, codec, samples_per_shard, seed),
            jobs=jobs or usable_cores(),
            allow_incomplete=allow_incomplete,
        )
    dataset = done.dataset
    click.echo(source_lines(dataset.source, "class"))
    rate = done.built_samples / max(done.shard_seconds, 1e-9)
    click.echo(
        f"shards: {done.built} built, {done.kept} verified as they stood, "
        f"{done.built + done.kept} in all\n"
        f"samples: {dataset.samples} of {len(dataset.classes)} classes, "
        f"{sum(shard.bytes for shard in dataset.shards) / 1e6:.1f} MB; {done.built_samples} "
        f"written in {done.shard_seconds:.1f} of {done.seconds:.1f} s: {rate:.0f} images/s\n"
        f"dataset {dataset.content_sha256[:16]}: {out}"
    )
