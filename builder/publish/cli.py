"""The command `builder publish-files`."""

from __future__ import annotations

import re
import shlex

import click


def _date(_: click.Context, __: click.Parameter, value: str) -> str:
    if value and not re.fullmatch(r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])", value):
        raise click.BadParameter(f"{value!r} is not a date such as 2026-05-31")
    return value


def _version(_: click.Context, __: click.Parameter, value: str) -> str:
    if not re.fullmatch(r"\d+\.\d+\.\d+", value):
        raise click.BadParameter(f"{value!r} is not MAJOR.MINOR.PATCH, such as 1.0.0")
    return value


def _repo(_: click.Context, __: click.Parameter, value: str) -> str:
    if value and not re.fullmatch(r"[\w.-]+/[\w.-]+", value):
        raise click.BadParameter(f"{value!r} is not USER/NAME")
    return value


@click.command("publish-files")
@click.argument("url")
@click.option("--title", default="", help="Name for people; default: semiformula and the recipe.")
@click.option("--author", "authors", multiple=True, help="Who publishes; may be given repeatedly.")
@click.option("--repo", default="", callback=_repo, help="USER/NAME on the Hugging Face hub.")
@click.option("--homepage", default="", help="Where the dataset will be found.")
@click.option("--version", default="1.0.0", show_default=True, callback=_version)
@click.option("--date", default="", callback=_date, help="Of publication, YYYY-MM-DD.")
@click.option("--i-know", is_flag=True, help="Go on though the photographs' licence is unknown.")
def publish_files(
    url: str,
    title: str,
    authors: tuple[str, ...],
    repo: str,
    homepage: str,
    version: str,
    date: str,
    i_know: bool,
) -> None:
    """Write what the finished dataset at URL needs to be published.

    A dataset card, Croissant metadata, a datasheet, checksums, a citation, all parameters as
    Parquet, statistics and a gallery, beside the shards. They replace those of an earlier run; the
    same dataset and options give the same bytes.
    """
    from builder.publish import PUBLISHED
    from builder.publish.facts import Options, gigabytes
    from builder.publish.files import publish_files as run
    from builder.storage import open_storage

    options = Options(title, authors, repo, homepage, version, date)
    try:
        facts = run(open_storage(url), options, i_know=i_know)
    except KeyboardInterrupt:
        click.echo(f"Interrupted; the same command starts again in {url}.", err=True)
        raise SystemExit(130) from None
    for name in PUBLISHED:
        click.echo(f"{facts.sizes[name] / 1e6:10.2f} MB  {name}")
    visible, size = facts.statistics.visibility, facts.data_bytes + facts.normals_bytes
    local = "DIR" if "://" in url else shlex.quote(url)  # hf uploads from a disk
    click.echo(
        f"licence: {facts.licence.spdx}\n"
        f"invisible: {visible.below_count} of {visible.samples} random samples\n"
        f"to publish {gigabytes(size)} of shards and these files:\n"
        f"  hf upload {facts.repo} {local} . --repo-type dataset --exclude 'records/*'\n"
        f"  aws s3 sync {shlex.quote(url)} s3://BUCKET/PREFIX --exclude 'records/*'"
    )
