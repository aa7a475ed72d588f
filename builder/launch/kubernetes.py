"""Kubernetes: an Indexed Job whose pods run `builder work`."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field
from typing import Any

from builder.errors import BuilderError

MAX_COMPLETIONS = 100_000  # with a limit of retries per index
_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"


@dataclass(frozen=True)
class KubernetesJob:
    """What the manifest is made of; `claim` is a volume claim's name and where it is mounted."""

    url: str
    tasks: int
    cores: int
    image: str
    name: str
    memory: str
    scratch: str
    at_once: int | None = None
    claim: tuple[str, str] | None = None
    secret: str | None = None
    service_account: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


def manifest_of(job: KubernetesJob) -> dict[str, Any]:
    """The Job. Raises BuilderError for names and numbers that Kubernetes refuses."""
    if not re.fullmatch(_LABEL, job.name):
        raise BuilderError(f"--name {job.name!r}: expected lower-case letters, digits and hyphens")
    if job.tasks > MAX_COMPLETIONS:
        raise BuilderError(f"--tasks {job.tasks}: Kubernetes takes at most {MAX_COMPLETIONS}")
    if "://" not in job.url and not (job.claim and job.url.startswith(f"{job.claim[1]}/")):
        raise BuilderError(
            f"{job.url}: no pod sees this folder; give --claim NAME:/FOLDER with the URL below "
            "/FOLDER, or an s3:// or gs:// URL"
        )
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": job.name, "labels": {"app.kubernetes.io/name": "semiformula"}},
        "spec": {
            "completionMode": "Indexed",
            "completions": job.tasks,
            "parallelism": min(job.tasks, job.at_once or job.tasks),
            "backoffLimitPerIndex": 5,
            "podFailurePolicy": {
                "rules": [
                    # A preempted or evicted pod is no failure of its task.
                    {
                        "action": "Ignore",
                        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                    },
                    # A wrong command line is wrong for every pod.
                    {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}},
                ]
            },
            "template": {"spec": _pod(job)},
        },
    }


def _pod(job: KubernetesJob) -> dict[str, Any]:
    scratch = "/scratch"
    variables = {
        "JOB_COMPLETIONS": str(job.tasks),  # Kubernetes states the index alone
        "TMPDIR": scratch,
        "NUMBA_CACHE_DIR": f"{scratch}/numba",
        **job.environment,
    }
    mounts = [{"name": "scratch", "mountPath": scratch}]
    volumes: list[dict[str, Any]] = [{"name": "scratch", "emptyDir": {"sizeLimit": job.scratch}}]
    container: dict[str, Any] = {
        "name": "builder",
        "image": job.image,
        "command": [
            *("python", "-m", "builder", "work", job.url),
            *("--task", "auto", "--jobs", str(job.cores)),
        ],
        "env": [{"name": name, "value": value} for name, value in variables.items()],
        "resources": {
            "requests": {"cpu": str(job.cores), "memory": job.memory},
            "limits": {"memory": job.memory},
        },
        "securityContext": {"allowPrivilegeEscalation": False},
        "volumeMounts": mounts,
    }
    if job.secret is not None:
        container["envFrom"] = [{"secretRef": {"name": job.secret}}]
    if job.claim is not None:
        mounts.append({"name": "data", "mountPath": job.claim[1]})
        volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": job.claim[0]}})
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "containers": [container],
        "volumes": volumes,
    }
    if job.service_account is not None:
        pod["serviceAccountName"] = job.service_account
    return pod


def text_of(job: KubernetesJob) -> str:
    """The manifest as YAML, with the two commands around it."""
    return (
        "# builder launch kubernetes ... | kubectl apply -f -\n"
        f"# kubectl wait --for=condition=complete --timeout=-1s job/{job.name}\n"
        f"# builder finish {shlex.quote(job.url)}\n"
        f"{yaml_of(manifest_of(job))}\n"
    )


def yaml_of(value: Any, indent: str = "") -> str:
    """YAML of tables, lists and scalars; strings are quoted as in JSON, which YAML contains.

    But for escapes: JSON's two surrogates of a character would be two characters in YAML.
    """
    if isinstance(value, dict) and value:
        lines = []
        for key, item in value.items():
            nested = isinstance(item, dict | list) and bool(item) and not _flat(item)
            between = "\n" if nested else " "
            lines.append(f"{indent}{key}:{between}{yaml_of(item, indent + '  ' * nested)}")
        return "\n".join(lines)
    if isinstance(value, list) and value and not _flat(value):
        items = (yaml_of(item, indent + "  ") for item in value)
        return "\n".join(f"{indent}- {item.lstrip()}" for item in items)
    text = json.dumps(value, ensure_ascii=False)
    return "".join(c if " " <= c <= "~" else f"\\U{ord(c):08x}" for c in text)


def _flat(value: Any) -> bool:
    return isinstance(value, list) and not any(isinstance(item, dict | list) for item in value)
