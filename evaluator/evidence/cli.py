"""`evaluator evidence`: run the experiments, and collect what they found."""

from __future__ import annotations

import os
from pathlib import Path

import click

from evaluator.options import names_of, one_line_errors

FOLDER = click.Path(path_type=Path, file_okay=False)


@click.group()
def evidence() -> None:
    """Run the experiments of a folder, and collect their results."""


EXPERIMENTS = click.option(
    "--experiments",
    type=FOLDER,
    default=Path("data_manifests/experiments"),
    show_default=True,
    help="Folder of NN-name.toml, one an arm.",
)
RUNS = click.option(
    "--runs",
    type=FOLDER,
    default=Path("runs/evidence"),
    show_default=True,
    help="Where datasets, training runs and reports go; the same folder resumes.",
)
ONLY = click.option("--only", metavar="A,B", help="Only these arms; default: all.")


@evidence.command()
@EXPERIMENTS
@click.option(
    "--data",
    "photographs",
    type=FOLDER,
    required=True,
    help="Folder of photographs: normals/KIND/, inspection/CATEGORY/, weights/.",
)
@RUNS
@ONLY
@click.option(
    "--jobs",
    type=click.IntRange(1),
    help="Arms at a time, each with its share of the cores; default: one a core, at most 2.",
)
@click.option("--print", "print_only", is_flag=True, help="Print the commands, run nothing.")
def run(
    experiments: Path,
    photographs: Path,
    runs: Path,
    only: str | None,
    jobs: int | None,
    print_only: bool,
) -> None:
    """Train and evaluate every arm; what is finished is not done again."""
    chosen = names_of(only, "--only")
    with one_line_errors(runs):
        from evaluator.evidence.commands import Place
        from evaluator.evidence.experiment import read_arms
        from evaluator.evidence.listing import command_lines, selected
        from evaluator.evidence.run import run_arms

        arms = selected(read_arms(experiments), chosen)
        place = Place(experiments, photographs, runs)
        if print_only:
            for line in command_lines(place, arms):
                click.echo(line)
            return
        cores = len(os.sched_getaffinity(0))
        records = run_arms(place, arms, jobs or min(2, cores))
        failed = [record.arm for record in records if not record.done]
        failed += sorted({arm.name for arm in arms} - {record.arm for record in records})
        click.echo(f"{len(arms) - len(failed)} of {len(arms)} arms done: {runs}")
        if failed:
            click.echo(f"Failed: {', '.join(failed)}; see log.txt of each.", err=True)
            raise SystemExit(1)


@evidence.command()
@EXPERIMENTS
@click.option(
    "--data", "photographs", type=FOLDER, required=True, help="The folder given to `run`."
)
@RUNS
@click.option(
    "--results",
    type=FOLDER,
    default=Path("data_manifests/results"),
    show_default=True,
    help="Where the page goes.",
)
def collect(experiments: Path, photographs: Path, runs: Path, results: Path) -> None:
    """Write README.md, CSV files and pictures of the arms that are done."""
    with one_line_errors(results):
        from evaluator.evidence.collect import collect as write
        from evaluator.evidence.commands import Place
        from evaluator.evidence.experiment import read_arms

        click.echo(write(Place(experiments, photographs, runs), read_arms(experiments), results))
