"""Slurm: array jobs of `builder work`, and a last job that finishes."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass

from builder.errors import BuilderError

USUAL_MAX_ARRAY_SIZE = 1001  # Slurm's own default
_ANSWER_SECONDS = 30
_END = "END_OF_SBATCH_SCRIPT"


@dataclass(frozen=True)
class SlurmJob:
    """What the script is made of; `options` are those of both jobs, as (name, word)."""

    url: str
    tasks: int
    cores: int
    max_array_size: int
    python: str
    logs: str
    options: tuple[tuple[str, str], ...] = ()
    setup: tuple[str, ...] = ()
    at_once: int | None = None


def script_of(job: SlurmJob) -> str:
    """A bash script that submits the arrays and the job that finishes, each of them written out.

    Raises BuilderError when fewer tasks may run at once than there are arrays.
    """
    python, url = shlex.quote(job.python), shlex.quote(job.url)
    task = f'"$((SEMIFORMULA_FIRST_TASK + SLURM_ARRAY_TASK_ID))/{job.tasks}"'
    work = _sbatch_script(
        job,
        job.cores,
        ["--requeue"],  # after a preemption or the loss of a node
        "# exec: Slurm's SIGTERM reaches the builder itself, which drops begun shards and ends.\n"
        f'exec {python} -m builder work {url} --task {task} --jobs "$SLURM_CPUS_PER_TASK"',
    )
    finish = _sbatch_script(
        job,
        1,
        ["--requeue"],
        f"{python} -m builder status {url}\nexec {python} -m builder finish {url}",
    )
    arrays = "\n".join(
        f"submit_work {first} 0-{count - 1}{limit}"
        for (first, count), limit in zip(_arrays(job), _limits(job), strict=True)
    )
    logs = shlex.quote(job.logs)
    status = shlex.quote(f"{python} -m builder status {url}")
    return f"""#!/bin/bash
# Builds {job.url!r} by {job.tasks} tasks of {job.cores} cores, then finishes it.
# Run it where sbatch is. What is built already is kept: run it again to build what is missing.
set -euo pipefail
mkdir -p {logs}

work_script() {{
cat <<'{_END}'
{work}
{_END}
}}

finish_script() {{
cat <<'{_END}'
{finish}
{_END}
}}

submit_work() {{ # number of the first task, indices of the array
  id=$(work_script | sbatch --parsable --job-name=semiformula-work --array="$2" \\
    --output={logs}/work-%A_%a.log --export=ALL,SEMIFORMULA_FIRST_TASK="$1")
  jobs="$jobs${{jobs:+:}}${{id%%;*}}" # sbatch adds ;cluster where there are several
}}

jobs=
{arrays}
finish=$(finish_script | sbatch --parsable --job-name=semiformula-finish \\
  --dependency="afterany:$jobs" --output={logs}/finish-%j.log)
echo "submitted: work ${{jobs//:/ }}; finish ${{finish%%;*}}"
echo "watch: squeue --jobs ${{jobs//:/,}},${{finish%%;*}};" {status}
"""


def _sbatch_script(job: SlurmJob, cores: int, flags: list[str], command: str) -> str:
    options = [
        *(f"--{name}={word}" for name, word in job.options),
        "--ntasks=1",
        f"--cpus-per-task={cores}",
        "--open-mode=append",  # a requeued task goes on in its log
        *flags,
    ]
    lines = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options)]
    return "\n".join([*lines, "set -e", *job.setup, command])


def _arrays(job: SlurmJob) -> list[tuple[int, int]]:
    """Arrays of at most MaxArraySize tasks: the number of the first task, and how many."""
    size = job.max_array_size
    return [(first, min(size, job.tasks - first)) for first in range(0, job.tasks, size)]


def _limits(job: SlurmJob) -> list[str]:
    """What lets at most `at_once` tasks of all arrays run: Slurm counts those of each apart."""
    number = len(_arrays(job))
    if job.at_once is None:
        return [""] * number
    if job.at_once < number:
        raise BuilderError(
            f"--at-once {job.at_once}: {number} arrays of at most {job.max_array_size} tasks run "
            f"side by side; give at least {number}, or fewer --tasks"
        )
    share, more = divmod(job.at_once, number)
    return [f"%{share + (i < more)}" for i in range(number)]


def max_array_size() -> int | None:
    """MaxArraySize of the reachable Slurm; None without one."""
    if shutil.which("scontrol") is None:
        return None
    try:
        shown = subprocess.run(
            ["scontrol", "show", "config"], capture_output=True, text=True, timeout=_ANSWER_SECONDS
        )
    except subprocess.TimeoutExpired:
        return None
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", shown.stdout, re.MULTILINE)
    return int(match[1]) if match and int(match[1]) > 0 else None


def submit(script: str) -> str:
    """Run the script here; what it prints. Raises BuilderError for what sbatch refuses."""
    if shutil.which("sbatch") is None:
        raise BuilderError(
            "--submit: no sbatch here; run the printed script where Slurm's commands are"
        )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise BuilderError(f"--submit: {lines[-1]}; `squeue --me` shows what was submitted")
    return done.stdout
