"""`builder launch`: the job scripts and manifests of other schedulers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., None])


@click.group()
def launch() -> None:
    """Print what a scheduler needs to build the planned dataset at URL."""


def _shared_options(command: F) -> F:
    for decorate in (
        click.option("--at-once", type=click.IntRange(1), help="Tasks that run at the same time."),
        click.option(
            "--cpus-per-task",
            "cores",
            type=click.IntRange(1),
            default=4,
            show_default=True,
            help="Cores, and so processes, of a task.",
        ),
        click.option(
            "--tasks",
            type=click.IntRange(1),
            help="Default: as many as take about 20 minutes each, by an estimate made here.",
        ),
        click.argument("url"),
    ):
        command = decorate(command)
    return command


def _container_options(command: F) -> F:
    for decorate in (
        click.option("--env", multiple=True, metavar="NAME=VALUE", help="For the containers."),
        click.option("--name", default="semiformula", show_default=True, help="Of the job."),
        click.option("--image", required=True, help="With this package installed."),
    ):
        command = decorate(command)
    return command


@launch.command()
@_shared_options
@click.option("--time", help="Limit of a task, as sbatch takes it: 2:00:00.")
@click.option("--partition")
@click.option("--account")
@click.option("--qos")
@click.option("--mem", help="Memory of a task, as sbatch takes it: 8G.")
@click.option("--setup", multiple=True, help="Line to run first: 'module load python'; repeatable.")
@click.option("--python", default=sys.executable, help="Interpreter on the nodes; default: this.")
@click.option("--logs", default="semiformula-logs", show_default=True, help="Folder of the logs.")
@click.option("--max-array-size", type=click.IntRange(2), help="Default: as this Slurm says.")
@click.option(
    "--out-script", type=click.Path(dir_okay=False, path_type=Path), help="Write it here."
)
@click.option("--submit", is_flag=True, help="Submit it here and print the jobs' ids.")
def slurm(
    url: str,
    tasks: int | None,
    cores: int,
    at_once: int | None,
    setup: tuple[str, ...],
    python: str,
    logs: str,
    max_array_size: int | None,
    out_script: Path | None,
    submit: bool,
    **options: str | None,
) -> None:
    """Print the script that submits an array of `builder work`, and a job that finishes."""
    from builder.errors import BuilderError
    from builder.launch import slurm
    from builder.launch.share import farm_url, refuse_odd_words, task_count

    refuse_odd_words(**options)
    for line in setup:
        if not line.isprintable():
            raise BuilderError(f"--setup {line!r}: expected one line")
    url = farm_url(url)
    job = slurm.SlurmJob(
        url=url,
        tasks=task_count(url, tasks, cores),
        cores=cores,
        max_array_size=max_array_size or slurm.max_array_size() or slurm.USUAL_MAX_ARRAY_SIZE,
        python=python,
        logs=farm_url(logs),
        options=tuple((name, word) for name, word in options.items() if word is not None),
        setup=setup,
        at_once=at_once,
    )
    script = slurm.script_of(job)
    if out_script is not None:
        _write(out_script, script)
    if submit:
        click.echo(slurm.submit(script), nl=False)
    elif out_script is None:
        click.echo(script, nl=False)
    else:
        click.echo(f"{job.tasks} tasks: bash {out_script}")


@launch.command()
@_shared_options
@_container_options
@click.option("--memory", default="4Gi", show_default=True, help="Of a task.")
@click.option("--scratch", default="20Gi", show_default=True, help="Disk of a task.")
@click.option("--claim", metavar="NAME:/FOLDER", help="Volume claim that holds the URL's folder.")
@click.option("--secret", help="Name of a Secret whose keys become variables (AWS_...).")
@click.option("--service-account", help="Whose rights the pods have.")
def kubernetes(
    url: str,
    tasks: int | None,
    cores: int,
    claim: str | None,
    env: tuple[str, ...],
    **options: Any,
) -> None:
    """Print an Indexed Job for `kubectl apply -f -`."""
    from builder.errors import BuilderError
    from builder.launch.kubernetes import KubernetesJob, text_of
    from builder.launch.share import environment, farm_url, refuse_odd_words, task_count

    words = ("image", "memory", "scratch", "secret", "service_account")
    refuse_odd_words(**{word: options[word] for word in words})
    variables = environment(env)
    name, _, folder = (claim or "").partition(":")
    if claim is not None and not (name and folder.startswith("/")):
        raise BuilderError(f"--claim {claim!r}: expected NAME:/FOLDER")
    url = farm_url(url)
    job = KubernetesJob(
        url=url,
        # A claim's folder need not be mounted here.
        tasks=tasks if claim and tasks else task_count(url, tasks, cores),
        cores=cores,
        claim=(name, folder.rstrip("/")) if claim is not None else None,
        environment=variables,
        **options,
    )
    click.echo(text_of(job), nl=False)


@launch.command("aws-batch")
@_shared_options
@_container_options
@click.option("--queue", required=True, help="Name or ARN of the job queue.")
@click.option("--memory", "memory_mib", default=4096, show_default=True, help="Of a task, in MiB.")
@click.option("--job-role", metavar="ARN", help="Whose rights on the bucket the tasks have.")
@click.option("--execution-role", metavar="ARN", help="Whose rights the agent has.")
def aws_batch(
    url: str,
    tasks: int | None,
    cores: int,
    at_once: int | None,
    env: tuple[str, ...],
    **options: Any,
) -> None:
    """Print the script that submits an array job and a job that finishes with the AWS CLI."""
    from builder.errors import BuilderError
    from builder.launch.aws_batch import BatchJob, script_of
    from builder.launch.share import environment, farm_url, refuse_odd_words, task_count

    if at_once is not None:
        raise BuilderError("--at-once: AWS Batch has no such limit; set it in the queue's maxvCpus")
    words = ("image", "queue", "job_role", "execution_role")
    refuse_odd_words(**{word: options[word] for word in words})
    variables = environment(env)
    if "://" not in url:
        raise BuilderError(f"{url}: no container sees this folder; give an s3:// URL")
    url = farm_url(url)
    job = BatchJob(
        url=url,
        tasks=task_count(url, tasks, cores),
        cores=cores,
        environment=variables,
        **options,
    )
    click.echo(script_of(job), nl=False)


def _write(path: Path, text: str) -> None:
    from builder.artifacts import atomic_file

    with atomic_file(path) as file:
        file.write(text.encode())
