"""Photographs that cannot be used: counted by reason, and a stop unless the user allows them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from builder.errors import BuilderError
from builder.index import SourceReport
from builder.sources import Photograph

MAX_FAULTS_SHOWN = 5


def count_kept(report: SourceReport, rejected: Iterable[tuple[Photograph, str]]) -> SourceReport:
    """The report after preparation: kept and rejected by reason, so that the counts add up."""
    reasons = {category.category: Counter[str]() for category in report.categories}
    faults = list(report.faults)
    for photograph, fault in rejected:
        reasons[photograph.category][fault.split(" (")[0]] += 1
        faults.append(f"{fault}: {photograph.name}")
    categories = [
        category.model_copy(
            update={
                "kept": category.found - reasons[category.category].total(),
                "rejected": dict(reasons[category.category]),
            }
        )
        for category in report.categories
    ]
    return report.model_copy(
        update={"categories": categories, "faults": faults, "incomplete": bool(faults)}
    )


def refuse_faults(report: SourceReport, allow_incomplete: bool) -> None:
    """Raise BuilderError where a source has faults that the user has not allowed."""
    if not report.faults or allow_incomplete:
        return
    shown = "; ".join(report.faults[:MAX_FAULTS_SHOWN])
    more = len(report.faults) - MAX_FAULTS_SHOWN
    raise BuilderError(
        f"source {report.name}: {shown}{f'; and {more} more' if more > 0 else ''}; "
        "mend it, or go on without with --allow-incomplete"
    )


def source_lines(report: SourceReport, what: str) -> str:
    """For people: found, kept and rejected of each category, which `what` names."""
    lines = []
    for category in report.categories:
        rejected = "".join(f", {n} {reason}" for reason, n in sorted(category.rejected.items()))
        lines.append(
            f"{what} {category.category}: {category.found} found, {category.kept} kept{rejected}"
        )
    if report.other_files:
        lines.append(f"{what}: {report.other_files} other files left out, no images by name")
    lines += [f"went on without: {fault}" for fault in report.faults]
    return "\n".join(lines)
