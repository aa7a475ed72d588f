"""The commands `builder verify` and `builder render-from`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from builder.recipe import Codec


@click.command()
@click.argument("url")
@click.option(
    "--rerender", default=0, type=click.IntRange(0), help="Random samples to paint again."
)
@click.option("--rebuild", default=0, type=click.IntRange(0), help="Random shards to build again.")
@click.option("--seed", default=0, type=click.IntRange(0), help="Another seed, other samples.")
@click.option("--jobs", type=click.IntRange(1), help="Processes; default: all usable cores.")
@click.option(
    "--report", type=click.Path(dir_okay=False, path_type=Path), help="Write all of it as JSON."
)
def verify(
    url: str, rerender: int, rebuild: int, seed: int, jobs: int | None, report: Path | None
) -> None:
    """Check every byte of the finished dataset at URL; a line a fault, exit code 1 if any.

    Reads each shard once: length, SHA-256, members, images' headers, parameters against the
    recipe's draw; then records, plan and surplus files. Changes nothing.
    """
    from builder.artifacts import refuse_unwritable, write_json
    from builder.classes.index import is_class_set
    from builder.classes.verify import verify_classes
    from builder.errors import BuilderError
    from builder.storage import open_storage
    from builder.verify import verify as run
    from builder.workers import usable_cores

    if report is not None:
        refuse_unwritable(report)
    jobs = jobs or usable_cores()
    # Nothing of an interrupted check is kept: the group's line says that it was, no more.
    if not is_class_set(open_storage(url)):
        found = run(url, rerender=rerender, rebuilds=rebuild, seed=seed, jobs=jobs)
    elif rerender or rebuild:
        raise BuilderError(f"{url}: holds photographs with labels; nothing in it was painted")
    else:
        found = verify_classes(url, jobs=jobs)
    click.echo(found.lines())
    if report is not None:
        write_json(report, found)
    if not found.is_rebuilt:
        raise BuilderError(
            f"--rebuild {rebuild}: rebuilt {found.counts.rebuilt} shards; a note above says why"
        )
    if not found.is_whole:
        raise SystemExit(1)


@click.command("render-from")
@click.argument("source")
@click.option("--out", required=True, help="Dataset folder, or URL (s3://, gs://).")
@click.option(
    "--codec",
    type=click.Choice(["webp", "png", "jpeg"]),
    help="Instead of the recipe's; no parameter depends on it.",
)
@click.option(
    "--plan-only", is_flag=True, help="Stop at the plan; go on with work and finish on a farm."
)
@click.option("--jobs", type=click.IntRange(1), help="Processes; default: all usable cores.")
def render_from(
    source: str, out: str, codec: Codec | None, plan_only: bool, jobs: int | None
) -> None:
    """Paint the images of the dataset at SOURCE from its stored parameters.

    The bytes are those of `builder build` with its recipe and photographs. The same command
    resumes what was cut off.
    """
    from builder.cli import resumable
    from builder.render_from import plan_render
    from builder.render_from import render_from as run
    from builder.storage import open_storage
    from builder.workers import usable_cores

    with resumable(out):
        if plan_only:
            plan = plan_render(source, open_storage(out), codec)
            click.echo(f"plan {plan.sha256[:16]}: {out}; next: builder work {out}")
            return
        done = run(source, out, codec=codec, jobs=jobs or usable_cores())
    rate = done.built_samples / max(done.render_seconds, 1e-9)
    click.echo(
        f"shards: {done.built} built, {done.kept} verified as they stood, "
        f"{done.built + done.kept} in all\n"
        f"samples: {done.samples}, {done.bytes / 1e6:.1f} MB; {done.built_samples} rendered in "
        f"{done.render_seconds:.1f} of {done.seconds:.1f} s: {rate:.0f} images/s\n"
        f"dataset {done.content_sha256[:16]}: {out}"
    )
