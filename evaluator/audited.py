"""The audit before a run: printed, kept with the cells, and fatal where scoring is impossible."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import click

from evaluator import __version__
from evaluator.artifacts import read_json, sha256_of, write_json
from evaluator.audit import audit, format_findings
from evaluator.datasets import Category
from evaluator.errors import EvaluatorError
from evaluator.protocols import Protocol, protocol_sha256
from evaluator.records import category_record
from evaluator.report import AuditOfCategory, Finding


def audited(categories: Sequence[Category], protocol: Protocol) -> str:
    """A summary of the audit, its findings printed; EvaluatorError when one of them is fatal."""
    findings = checked_findings(categories, protocol, None)
    for category in categories:
        category_record(category, protocol, findings)  # raises what else prevents scoring
    photographs = sum(len(category.train) + len(category.test) for category in categories)
    return (
        f"{len(categories)} categories, {photographs} photographs, protocol {protocol.name}: "
        f"{len(findings)} findings, none of them prevents scoring"
    )


def checked_findings(
    categories: Sequence[Category], protocol: Protocol, kept: Path | None
) -> list[Finding]:
    """All findings, printed; EvaluatorError when one of them is fatal.

    What decoding every photograph found is kept in the folder `kept` for the next run.
    """
    findings = [
        finding for category in categories for finding in _findings(category, protocol, kept)
    ]
    if findings:
        click.echo(format_findings(findings), err=True)
    fatal = [finding for finding in findings if finding.fatal]
    if fatal:
        more = f" (and {len(fatal) - 1} more, listed above)" if len(fatal) > 1 else ""
        first = fatal[0]
        raise EvaluatorError(f"{first.category}/{first.file}: {first.message}{more}")
    return findings


def _findings(category: Category, protocol: Protocol, kept: Path | None) -> list[Finding]:
    listed = list(category.findings)
    if kept is None or any(finding.fatal for finding in listed):
        return audit([category], protocol)
    depends_on = [category.sha256, protocol_sha256(protocol), __version__, version("pillow")]
    digest = sha256_of("\n".join(depends_on).encode())
    path = kept / f"audit--{digest[:32]}.json"
    if path.is_file():
        try:
            found = read_json(AuditOfCategory, path)
            if found.depends_on == depends_on:
                return listed + found.findings
        except EvaluatorError as error:
            click.echo(f"auditing again: {error.message}", err=True)
    looked_at = audit([category], protocol)[len(listed) :]
    if not any(finding.fatal for finding in looked_at):
        record = AuditOfCategory(
            format="semiformula-report-audit",
            format_version=1,
            depends_on=depends_on,
            findings=looked_at,
        )
        write_json(path, record)
    return listed + looked_at
