"""Command line of the builder: demo-data; plan, work, status, finish; build; classes; ..."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from builder import __version__
from builder.classes.cli import classes
from builder.launch.cli import launch
from builder.publish.cli import publish_files
from builder.verify_cli import render_from, verify

if TYPE_CHECKING:  # imported by the commands that need them: --help answers at once
    from builder.index import Contents
    from builder.recipe import Recipe
    from builder.sources import Source
    from builder.work import Engine

F = TypeVar("F", bound=Callable[..., None])

INTERRUPTED = 130


@contextlib.contextmanager
def _stoppable(hint: str = "") -> Iterator[None]:
    """Ctrl-C and SIGTERM are no accidents: one line and an exit code of their own."""
    from builder.signals import TERMINATED, Terminated, heeding_sigterm

    try:
        with heeding_sigterm():
            yield
    except KeyboardInterrupt:
        click.echo(f"Interrupted{hint}.", err=True)
        raise SystemExit(INTERRUPTED) from None
    except Terminated:
        click.echo(f"Terminated{hint}.", err=True)
        raise SystemExit(TERMINATED) from None


def resumable(out: str | Path) -> contextlib.AbstractContextManager[None]:
    """The block of a command that finds in `out` what an interrupted run of it has done."""
    return _stoppable(f"; the same command goes on in {out}")


class _Group(click.Group):
    """A group whose commands all end on a signal with one line; click's own says "Aborted!"."""

    def invoke(self, ctx: click.Context) -> Any:
        with _stoppable():
            return super().invoke(ctx)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
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
@click.argument("out", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
@click.option("--count", default=600, show_default=True, help="How many, of six families in turn.")
@click.option("--size", "size_px", default=256, show_default=True, help="Edge in pixels.")
@click.option("--seed", default=0, show_default=True, help="Another seed is another set.")
@click.option("--jobs", type=click.IntRange(1), help="Processes; default: all usable cores.")
def textures(out: Path, count: int, size_px: int, seed: int, jobs: int | None) -> None:
    """Draw procedural textures to DIR: backgrounds beside photographs, or in their place."""
    from builder.textures import make_textures

    with resumable(out):
        click.echo(make_textures(out, count=count, size_px=size_px, seed=seed, jobs=jobs))


def _source_options(command: F) -> F:
    """What `plan` and `build` ask for: the recipe, the photographs, and where the dataset goes."""
    for decorate in reversed(
        (
            click.argument("recipe"),
            click.option(
                "--normals",
                required=True,
                help="Folder (or URL) of images, or a manifest's name or path.",
            ),
            click.option("--out", required=True, help="Dataset folder, or URL (s3://, gs://)."),
            click.option("--root", help="Folder or URL where the manifest's data lie."),
            click.option(
                "--samples", type=click.IntRange(1), help="Instead of the recipe's number."
            ),
            click.option(
                "--images",
                type=click.Choice(["stored", "none"]),
                default="stored",
                show_default=True,
                help="none: parameters and normals alone, for readers that render.",
            ),
            click.option(
                "--licence", help="Licence of a folder's photographs; recorded in the dataset."
            ),
            click.option(
                "--allow-incomplete", is_flag=True, help="Go on without missing or bad files."
            ),
        )
    ):
        command = decorate(command)
    return command


_jobs = click.option("--jobs", type=click.IntRange(1), help="Processes; default: all usable cores.")
_engine = click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Who runs the processes: this machine, or a Ray cluster.",
)
_address = click.option("--address", help="Ray cluster to join; default: start one here.")


@main.command()
@_source_options
@click.option("--cores", type=click.IntRange(1), help="Of the farm, for the estimated wall time.")
@_jobs
def plan(cores: int | None, jobs: int | None, **source: Any) -> None:
    """Plan the dataset of RECIPE: prepare the normals, write plan.json, estimate what it takes.

    Any number of `builder work` may then build its shards, anywhere.
    """
    from builder.estimate import estimate, refuse_small_disk
    from builder.plan import make_plan
    from builder.rejects import source_lines
    from builder.status import survey
    from builder.storage import open_storage
    from builder.workers import usable_cores

    recipe, found, contents = _asked(source)
    storage = open_storage(source["out"])
    with resumable(source["out"]):
        made = make_plan(
            storage,
            recipe,
            found,
            contents=contents,
            jobs=jobs or usable_cores(),
            allow_incomplete=source["allow_incomplete"],
        )
        estimated = estimate(storage, made)
    click.echo(source_lines(made.normals.source, "normals"))
    click.echo(estimated.lines(made, cores or usable_cores()))
    refuse_small_disk(storage, estimated, int(survey(storage).rows["bytes"].sum()))
    click.echo(f"plan {made.sha256[:16]}: {source['out']}; next: builder work {source['out']}")


@main.command()
@click.argument("url")
@click.option(
    "--task",
    default="auto",
    show_default=True,
    help="i/n, or auto: as the scheduler says.",
)
@_jobs
@_engine
@_address
def work(url: str, task: str, jobs: int | None, engine: str, address: str | None) -> None:
    """Build this task's share of the planned dataset at URL; without a number, what is missing.

    Any number of these may run at once, be killed, and be started again.
    """
    from builder.work import work as run

    with resumable(url):
        done = run(url, task, _engine_of(engine, address, jobs))
    rate = done.built_samples / max(done.seconds, 1e-9)
    click.echo(
        f"shards: {done.built} built, {done.kept} stood already; {done.built_samples} samples in "
        f"{done.seconds:.1f} s: {rate:.0f} images/s"
    )


@main.command()
@click.argument("url")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def status(url: str, as_json: bool) -> None:
    """Say what stands at URL: done, missing, bad, rate and time left, from the storage alone."""
    import dataclasses
    import json

    from builder.status import status_of
    from builder.storage import open_storage

    found = status_of(open_storage(url))
    click.echo(json.dumps(dataclasses.asdict(found)) if as_json else found.lines())


@main.command()
@click.argument("url")
def finish(url: str) -> None:
    """Write dataset.json at URL when every shard's record verifies."""
    from builder.status import finish as run
    from builder.storage import open_storage

    head = run(open_storage(url))
    click.echo(f"samples: {head.samples}\ndataset {head.content_sha256[:16]}: {url}")


@main.command()
@_source_options
@_jobs
@_engine
@_address
def build(jobs: int | None, engine: str, address: str | None, **source: Any) -> None:
    """Build the dataset of RECIPE (paper, fine, demo, or a TOML file) from normal photographs.

    Plan, work and finish on one machine. The same command resumes a build that was cut off;
    finished shards are verified, not rebuilt.
    """
    from builder.build import build as run
    from builder.rejects import source_lines
    from builder.workers import usable_cores

    recipe, found, contents = _asked(source)
    with resumable(source["out"]):
        summary = run(
            recipe,
            found,
            source["out"],
            jobs=jobs or usable_cores(),
            contents=contents,
            allow_incomplete=source["allow_incomplete"],
            engine=_engine_of(engine, address, jobs),
        )
    click.echo(source_lines(summary.source, "normals"))
    rate = summary.built_samples / summary.render_seconds
    click.echo(
        f"shards: {summary.built} built, {summary.kept} verified as they stood, "
        f"{summary.built + summary.kept} in all\n"
        f"samples: {summary.samples}, {summary.bytes / 1e6:.1f} MB; {summary.built_samples} "
        f"rendered in {summary.render_seconds:.1f} of {summary.seconds:.1f} s: "
        f"{rate:.0f} images/s\n"
        f"dataset {summary.content_sha256[:16]}: {source['out']}"
    )


def _asked(source: dict[str, Any]) -> tuple[Recipe, Source, Contents]:
    """The recipe, the photographs and the contents that the options ask for."""
    from builder.artifacts import parse_model
    from builder.recipe import Recipe, load_recipe
    from builder.sources import find_source

    recipe = load_recipe(source["recipe"])
    if source["samples"] is not None:
        changed = {**recipe.model_dump(), "samples": source["samples"]}
        recipe = parse_model(Recipe, changed, f"--samples {source['samples']}")
    found = find_source(source["normals"], source["root"], source["licence"])
    return recipe, found, "parameters" if source["images"] == "none" else "images"


def _engine_of(name: str, address: str | None, jobs: int | None) -> Engine:
    if name == "local":
        from builder.work import local_engine
        from builder.workers import usable_cores

        if address is not None:
            raise click.UsageError("--address is for --engine ray")
        return local_engine(jobs or usable_cores())
    from builder.ray_engine import ray_engine

    return ray_engine(address, jobs)


@main.command()
@click.argument("dataset", metavar="URL")
@click.option("--out", type=click.Path(path_type=Path), help="PNG; default: URL's name + .png.")
@click.option("--samples", default=24, show_default=True, type=click.IntRange(1, 1000))
@click.option("--seed", default=0, type=click.IntRange(0), help="Another seed, other samples.")
def show(dataset: str, out: Path | None, samples: int, seed: int) -> None:
    """Write a contact sheet of the dataset at URL: normal, anomaly, mask with ellipses."""
    from builder.show import contact_sheet

    folder = Path(dataset).resolve()
    beside = folder.with_name(folder.name + ".png")
    default = Path(beside.name) if "://" in dataset else beside
    path = out or default
    keys = contact_sheet(dataset, path, samples=samples, seed=seed)
    click.echo(f"{len(keys)} samples: {path}")


main.add_command(classes)
main.add_command(launch)
main.add_command(verify)
main.add_command(render_from)
main.add_command(publish_files)


@main.command()
@click.option("--chaos", is_flag=True, required=True, help="Kill and damage; the one test so far.")
@click.option("--samples", default=320, show_default=True, type=click.IntRange(1, 10**6))
@click.option("--kills", default=6, show_default=True, type=click.IntRange(0, 1000))
@click.option("--seed", default=0, type=click.IntRange(0), help="Other moments, other damage.")
@click.option("--normals", help="Folder of photographs; default: six that a program draws.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where to work, and to keep what came out; default: a temporary folder, removed.",
)
def selftest(
    chaos: bool, samples: int, kills: int, seed: int, normals: str | None, out: Path | None
) -> None:
    """Build a small dataset in peace, and again among kills, damage and storage errors.

    The final bytes must be the same: exit code 0, else 1 and the names of what differs.
    """
    import shutil
    import tempfile

    from builder.selftest import chaos as run

    folder = out or Path(tempfile.mkdtemp(prefix="semiformula-selftest-"))
    try:
        account = run(
            folder, samples=samples, kills=kills, seed=seed, normals=normals, say=click.echo
        )
    except KeyboardInterrupt:
        click.echo(f"Interrupted; what was built is kept in {folder}.", err=True)
        raise SystemExit(INTERRUPTED) from None
    if out is None:  # what differs is kept, to be looked at
        shutil.rmtree(folder)
    click.echo(f"same bytes as the calm build, after {account.line()}")


if __name__ == "__main__":
    main()
