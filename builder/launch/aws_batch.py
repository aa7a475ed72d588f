"""AWS Batch: an array job of `builder work`, and a last job that finishes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any

from builder.errors import BuilderError

MAX_ARRAY_SIZE = 10_000
ATTEMPTS = 5
_END = "END_OF_JSON"


@dataclass(frozen=True)
class BatchJob:
    """What the requests are made of; memory in MiB."""

    url: str
    tasks: int
    cores: int
    image: str
    queue: str
    name: str
    memory_mib: int
    job_role: str | None = None
    execution_role: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


def requests_of(job: BatchJob) -> dict[str, dict[str, Any]]:
    """The inputs of register-job-definition and of the two submit-job.

    Raises BuilderError for names and numbers that AWS Batch refuses, and for a local folder.
    """
    if "://" not in job.url:
        raise BuilderError(f"{job.url}: no container sees this folder; give an s3:// URL")
    if not re.fullmatch(r"[A-Za-z0-9][\w-]{0,100}", job.name, re.ASCII):
        raise BuilderError(f"--name {job.name!r}: expected letters, digits, hyphens, underscores")
    if job.tasks > MAX_ARRAY_SIZE:
        raise BuilderError(f"--tasks {job.tasks}: AWS Batch takes at most {MAX_ARRAY_SIZE}")
    command = ["python", "-m", "builder", "work", job.url, "--jobs", str(job.cores)]
    container: dict[str, Any] = {
        "image": job.image,
        # Each child of an array is told its index and their number; an array has two at least.
        "command": [*command, "--task", "auto" if job.tasks > 1 else "0/1"],
        "environment": [{"name": name, "value": job.environment[name]} for name in job.environment],
        "resourceRequirements": [
            {"type": "VCPU", "value": str(job.cores)},
            {"type": "MEMORY", "value": str(job.memory_mib)},
        ],
    }
    if job.job_role is not None:
        container["jobRoleArn"] = job.job_role
    if job.execution_role is not None:
        container["executionRoleArn"] = job.execution_role
    definition = {
        "jobDefinitionName": job.name,
        "type": "container",
        "platformCapabilities": ["EC2"],
        "containerProperties": container,
        "retryStrategy": {
            "attempts": ATTEMPTS,
            "evaluateOnExit": [
                {"onStatusReason": "Host EC2*", "action": "RETRY"},  # a Spot host was taken back
                {"onExitCode": "2", "action": "EXIT"},  # a wrong command line stays wrong
                {"onReason": "*", "action": "RETRY"},
            ],
        },
    }
    shared = {"jobQueue": job.queue, "jobDefinition": job.name}
    work: dict[str, Any] = {"jobName": f"{job.name}-work", **shared}
    if job.tasks > 1:
        work["arrayProperties"] = {"size": job.tasks}
    finish = {
        "jobName": f"{job.name}-finish",
        **shared,
        "containerOverrides": {"command": ["python", "-m", "builder", "finish", job.url]},
    }
    return {"definition": definition, "work": work, "finish": finish}


def script_of(job: BatchJob) -> str:
    """A bash script that registers the definition and submits both jobs with the AWS CLI."""
    inputs = "\n".join(
        f"{name}_input() {{\ncat <<'{_END}'\n{json.dumps(request, indent=1)}\n{_END}\n}}\n"
        for name, request in requests_of(job).items()
    )
    return f"""#!/bin/bash
# Builds {job.url!r} by {job.tasks} tasks of {job.cores} cores, then finishes it.
# Run it where the AWS CLI is. What is built already is kept: run it again for what is missing.
set -euo pipefail
{inputs}
definition=$(aws batch register-job-definition --cli-input-json "$(definition_input)" \\
  --query jobDefinitionArn --output text)
work=$(aws batch submit-job --cli-input-json "$(work_input)" --job-definition "$definition" \\
  --query jobId --output text)
finish=$(aws batch submit-job --cli-input-json "$(finish_input)" --job-definition "$definition" \\
  --depends-on jobId="$work" --query jobId --output text)
echo "submitted: work $work, finish $finish"
echo "watch: aws batch describe-jobs --jobs $work $finish"
"""
