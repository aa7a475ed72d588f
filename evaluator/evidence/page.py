"""The results page: Markdown whose every number stands in a CSV file beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from evaluator.evidence.differences import Difference, Noise, group_score, half_interval
from evaluator.evidence.experiment import Arm
from evaluator.evidence.gathered import METRICS, SETTINGS, Result
from evaluator.evidence.pictures import TITLES
from evaluator.evidence.questions import Questions
from evaluator.report import Metric


def page(
    questions: Questions,
    arms: Sequence[Arm],
    results: Sequence[Result],
    others: Mapping[str, str],
    found: Sequence[Difference],
    noises: Mapping[tuple[str, Metric], Mapping[str, Noise]],
    pictures: Sequence[str],
    photographs: str,
) -> str:
    """README.md of the results folder; `photographs` names those that were evaluated."""
    categories = results[0].categories
    untouched = [name for name in categories if name in questions.untouched]
    parts = [
        "# Evidence",
        questions.introduction.strip(),
        "This page is written by `make evidence`; its words are those of "
        "`../experiments/questions.toml`, its numbers those of `arms.csv` (every score with the "
        "hashes of dataset, weights and protocol, seeds, commit and command), `differences.csv` "
        "and `commands.csv`.",
        f"Photographs evaluated: `{photographs}`.",
        _method(
            questions, categories, noises["chosen", "pixel_auroc"], len(results[0].report.seeds)
        ),
        "## All arms",
        _all_arms(results, categories, noises),
    ]
    if others:
        lines = [f"* `{name}`: {said}" for name, said in others.items()]
        parts.append("Not in the table:\n\n" + "\n".join(lines))
    parts += [
        f"![Each arm minus its baseline, largest first]({name})"
        for name in pictures
        if name.startswith("differences")
    ]
    titles = {arm.name: arm.experiment.title for arm in arms}
    for question in questions.questions:
        own = [r for r in results if r.arm.experiment.question == question.name]
        parts += [
            f"## {question.title}",
            f"**Asked.** {question.asked.strip()}",
            _differences(own, found, titles, untouched),
        ]
        if questions.photographs in (None, photographs):
            parts += [f"**Saw.** {question.saw.strip()}"]
            parts += [f"**Changed.** {question.changed.strip()}"]
        else:
            parts.append("Nothing is written yet about these photographs.")
    shown = {
        "losses.png": "Training loss over images seen",
        "figure5.png": f"Figure 5: held-out images of the arm `{questions.pictured}`, and what its "
        "estimates paint",
        "figure6.png": "Figure 6 on the procedural products",
    }
    parts.append("## Pictures")
    parts += [f"![{text}]({name})\n\n{text}." for name, text in shown.items() if name in pictures]
    return "\n\n".join(part for part in parts if part) + "\n"


def _method(
    questions: Questions, categories: Sequence[str], noises: Mapping[str, Noise], seeds: int
) -> str:
    chosen = [name for name in categories if name not in questions.untouched]
    untouched = [name for name in categories if name in questions.untouched]
    spread = "; ".join(
        f"{arch} {noise.variance**0.5:.2f} points from {noise.freedom} degrees of freedom"
        for arch, noise in noises.items()
    )
    apart = (
        f"; **{', '.join(untouched)} is untouched by the choice** and stands in columns of its own"
        if untouched
        else ""
    )
    return (
        f"Recipes were chosen by the mean of {', '.join(chosen)}{apart}. A score is the mean over "
        f"training seeds and {seeds} seeds of PaDiM's dimensions. Intervals are 95 %: "
        f"{SETTINGS.draws:,} paired bootstrap draws of the test images, and the variance between "
        "training seeds, pooled over all trained arms of a network (standard deviation of one "
        f"run's pixel AUROC, mean of the chosen categories: {spread}; random weights: their own "
        "where that is larger; trained arms: their own where it stands out from the others' by an "
        "F test, p < 0.001; arms that share the baseline's runs: that of their own paired "
        "differences), Student's t. A mean of pixel scores is that of the categories with masks. "
        "**Bold**: told apart from the baseline after Holm's correction over all arms."
    )


def _all_arms(
    results: Sequence[Result],
    categories: Sequence[str],
    noises: Mapping[tuple[str, Metric], Mapping[str, Noise]],
) -> str:
    lines = [
        "Pixel AUROC in percent by category, then the means over all categories; ± half of the "
        "95 % interval.",
        "",
        f"| arm | {' | '.join(categories)} | "
        + " | ".join(f"mean {TITLES[metric]}" for metric in METRICS)
        + " |",
        "|---" * (1 + len(categories) + len(METRICS)) + "|",
    ]
    columns: list[tuple[str, Sequence[str], Metric]] = [
        *((category, [category], "pixel_auroc") for category in categories),
        *(("all", categories, metric) for metric in METRICS),
    ]
    for result in results:
        cells = [
            _value(result, members, metric, noises[group, metric])
            for group, members, metric in columns
        ]
        title = f"`{result.arm.name}` {result.arm.experiment.title}"
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _value(
    result: Result, categories: Sequence[str], metric: Metric, pooled: Mapping[str, Noise]
) -> str:
    score = group_score(result, categories, metric)
    if score is None:
        return "–"
    half = half_interval(result, categories, metric, pooled)
    return f"{score.value:.1f}" + ("" if math.isnan(half) else f" ± {half:.1f}")


def _differences(
    own: Sequence[Result],
    found: Sequence[Difference],
    titles: Mapping[str, str],
    untouched: Sequence[str],
) -> str:
    groups = ["chosen", *untouched]
    columns = [(group, metric) for group in groups for metric in METRICS]
    heads = [
        f"{TITLES[metric]}{'' if group == 'chosen' else f', {group}'}" for group, metric in columns
    ]
    lines = [
        f"| arm − baseline | {' | '.join(heads)} |",
        "|---" * (1 + len(heads)) + "|",
    ]
    by_key = {(one.arm, one.categories, one.metric): one for one in found}
    for result in own:
        baseline = result.arm.experiment.baseline
        if baseline is None:
            continue
        cells = []
        for group, metric in columns:
            one = by_key.get((result.arm.name, group, metric))
            cells.append("–" if one is None else _interval(one))
        title = f"{titles[result.arm.name]} − `{baseline}`"
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _interval(one: Difference) -> str:
    if math.isnan(one.low):
        return f"{one.difference:+.1f} (–)"
    text = f"{one.difference:+.1f} ({one.low:+.1f} to {one.high:+.1f})"
    return f"**{text}**" if one.distinct else text
