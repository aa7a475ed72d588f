"""Command line of the builder: demo-data, build, show."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import click

from builder import __version__

INTERRUPTED = 130


@contextlib.contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Ctrl-C is no accident: one line and its own exit code."""
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"Interrupted; the same command goes on in {out}.", err=True)
        raise SystemExit(INTERRUPTED) from None


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def main() -> None:
    """Build pseudo-defect datasets from normal photographs."""


@main.command("demo-data")
@click.argument("out", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option("--train", default=60, show_default=True, help="Normal training images a product.")
@click.option("--good", default=15, show_default=True, help="Normal test images a product.")
@click.option("--defects", default=8, show_default=True, help="Test images a kind of defect.")
@click.option(
    "--size", "size_px", default=256, show_default=True, help="Edge in pixels, 48 to 1024."
)
@click.option("--seed", default=0, show_default=True, help="Another seed is another set.")
@click.option("--jobs", type=click.IntRange(1), help="Processes; default: all usable cores.")
def demo_data(
    out: Path, train: int, good: int, defects: int, size_px: int, seed: int, jobs: int | None
) -> None:
    """Write the procedural inspection set (three products, MVTec AD layout) to DIR."""
    from builder.demo import make_demo_data

    with resumable(out):
        summary = make_demo_data(
            out,
            train=train,
            good=good,
            per_defect=defects,
            size_px=size_px,
            seed=seed,
            jobs=jobs,
        )
    click.echo(summary)


@main.command()
@click.argument("recipe")
@click.option("--normals", required=True, help="Folder of images, or a manifest's name or path.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Dataset folder.")
@click.option("--root", type=click.Path(path_type=Path), help="Where the manifest's data lie.")
@click.option("--samples", type=click.IntRange(1), help="Instead of the recipe's number.")
@click.option("--jobs", type=click.IntRange(1), help="Processes; default: all usable cores.")
@click.option("--licence", help="Licence of a folder's photographs; recorded in the dataset.")
@click.option("--allow-incomplete", is_flag=True, help="Build in spite of missing or bad files.")
def build(
    recipe: str,
    normals: str,
    out: Path,
    root: Path | None,
    samples: int | None,
    jobs: int | None,
    licence: str | None,
    allow_incomplete: bool,
) -> None:
    """Build the dataset of RECIPE (paper, fine, demo, or a TOML file) from normal photographs.

    The same command resumes a build that was cut off; finished shards are verified, not rebuilt.
    """
    from builder.artifacts import parse_model
    from builder.build import build as run
    from builder.recipe import Recipe, load_recipe
    from builder.sources import find_source
    from builder.workers import usable_cores

    made = load_recipe(recipe)
    if samples is not None:
        made = parse_model(
            Recipe, {**made.model_dump(), "samples": samples}, f"--samples {samples}"
        )
    source = find_source(normals, root, licence)
    with resumable(out):
        summary = run(
            made, source, out, jobs=jobs or usable_cores(), allow_incomplete=allow_incomplete
        )
    for category in summary.source.categories:
        rejected = "".join(f", {n} {reason}" for reason, n in sorted(category.rejected.items()))
        click.echo(
            f"normals {category.category}: {category.found} found, {category.kept} kept{rejected}"
        )
    if summary.source.other_files:
        click.echo(f"normals: {summary.source.other_files} other files left out, no images by name")
    for fault in summary.source.faults:
        click.echo(f"went on without: {fault}")
    rate = summary.built_samples / summary.render_seconds
    click.echo(
        f"shards: {summary.built} built, {summary.kept} verified as they stood, "
        f"{summary.built + summary.kept} in all\n"
        f"samples: {summary.samples}, {summary.bytes / 1e6:.1f} MB; {summary.built_samples} "
        f"rendered in {summary.render_seconds:.1f} of {summary.seconds:.1f} s: "
        f"{rate:.0f} images/s\n"
        f"dataset {summary.content_sha256[:16]}: {out}"
    )


@main.command()
@click.argument("dataset", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="PNG; default: DIR's name + .png.")
@click.option("--samples", default=24, show_default=True, type=click.IntRange(1, 1000))
@click.option("--seed", default=0, type=click.IntRange(0), help="Another seed, other samples.")
def show(dataset: Path, out: Path | None, samples: int, seed: int) -> None:
    """Write a contact sheet of the dataset in DIR: normal, anomaly, mask with ellipses."""
    from builder.show import contact_sheet

    folder = dataset.resolve()
    path = out or folder.with_name(folder.name + ".png")
    keys = contact_sheet(dataset, path, samples=samples, seed=seed)
    click.echo(f"{len(keys)} samples: {path}")


if __name__ == "__main__":
    main()
