"""The page's words: what was compared, on what, how, and what each number is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from evaluator.page_numbers import escaped, number, percent, share, signed
from evaluator.page_table import metrics_of, sort_button, swatch
from evaluator.report import Finding, Metric, Report
from evaluator.table import TITLES

MEANINGS: dict[Metric, str] = {
    "pixel_auroc": "the chance that a defective pixel scores higher than a good one, over all test "
    "pixels of the category; ties count half",
    "aupro_30": "mean share of each connected defect (8 neighbours) found, integrated over the "
    "false positive rate of the pixels from 0 to 30 %, divided by 30 %: small defects weigh as "
    "much as large ones",
    "aupro_05": "the same up to 5 %",
    "aupro_01": "the same up to 1 %, where inspection works",
    "pixel_ap": "area under precision over recall of the pixels; depends on the share of defective "
    "pixels, so do not compare it between categories",
    "pixel_f1_max": "best F1 of the pixels over all thresholds; that threshold is fitted on the "
    "test labels, so read it as an upper limit",
    "image_auroc": "the chance that a defective photograph scores higher than a good one; the "
    "score of a photograph is its map's largest pixel",
    "image_ap": "area under precision over recall of the photographs",
    "image_f1_max": "best F1 of the photographs over all thresholds, fitted on the test labels: an "
    "upper limit",
}
FINDINGS = {
    "mask_missing": "mask missing",
    "mask_without_image": "mask without image",
    "mask_empty": "mask empty",
    "mask_grey_levels": "mask with grey levels",
    "mask_size": "mask of another size",
    "defect_cropped": "defect partly outside the crop",
    "defect_lost": "defect outside the crop",
    "duplicate": "duplicate",
    "count": "count differs",
    "unreadable": "unreadable",
}
SHORT: dict[Metric, str] = {
    "pixel_auroc": "pixel AUROC",
    "aupro_30": "AUPRO 30 %",
    "aupro_05": "AUPRO 5 %",
    "aupro_01": "AUPRO 1 %",
    "pixel_ap": "pixel AP",
    "pixel_f1_max": "pixel F1-max*",
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1_max": "image F1-max*",
}


def title_of(report: Report) -> str:
    """What the page is called."""
    backbones, categories = len(report.backbones), len(report.categories)
    return (
        f"{backbones} {'pre-trainings' if backbones > 1 else 'pre-training'} on "
        f"{categories} {'categories' if categories > 1 else 'category'}"
    )


def compared(report: Report, data: Any) -> str:
    """Backbones and protocol."""
    seeds = ", ".join(number(data, ("seeds", i)) for i in range(len(report.seeds)))
    draws = number(data, ("bootstrap", "draws"))
    facts = [
        ("data", escaped(report.data)),
        ("protocol", escaped(report.protocol.name)),
        ("seeds of the dimensions", seeds),
        ("bootstrap", f"{draws} draws of the test images" if report.bootstrap.draws else "none"),
        ("features", escaped(report.feature_dtype)),
    ]
    listed = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    return (
        f'<dl class="facts">{listed}</dl><div class="columns"><div>'
        f"<h2>Backbones</h2>{_backbones(report, data)}</div>"
        f"<div><h2>Protocol</h2>{_protocol(report, data)}</div></div>"
    )


def _backbones(report: Report, data: Any) -> str:
    rows = []
    for index, backbone in enumerate(report.backbones):
        trained = escaped(backbone.kind)
        if backbone.export is not None:
            dataset = backbone.export.dataset
            images = number(data, ("backbones", index, "export", "dataset", "samples"))
            trained = f"{escaped(dataset.name)}, {images} samples, {escaped(backbone.export.loss)}"
        dims = number(data, ("backbones", index, "dims"))
        layers = escaped(", ".join(backbone.layers))
        rows.append(
            f'<tr><th scope="row">{swatch(index)}{escaped(backbone.name)}</th>'
            f"<td>{escaped(backbone.arch)}</td><td>{trained}</td><td>{dims} of {layers}</td>"
            f"<td>{_hash(backbone.weights_sha256)}</td></tr>"
        )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Backbones">'
        '<table class="plain"><thead><tr><th>name</th><th>architecture</th><th>pre-training</th>'
        f"<th>dimensions</th><th>weights SHA-256</th></tr></thead><tbody>{''.join(rows)}</tbody>"
        "</table></div>"
    )


def _protocol(report: Report, data: Any) -> str:
    def at(key: str) -> str:
        return number(data, ("protocol", key))

    crop = f"centre crop {at('crop_px')} px" if report.protocol.crop_px else "no crop"
    parts = [
        f"resize {at('resize_px')} px ({escaped(report.protocol.interpolation)}), {crop}",
        f"maps upsampled {escaped(report.protocol.upsampling)}, Gaussian blur of "
        f"{at('blur_sigma_px')} px, border {escaped(report.protocol.blur_border)}",
        f"{at('epsilon')} on the diagonal of each covariance",
        "defective where a mask is above 0 in any channel, resized with nearest",
    ]
    listed = "".join(f"<li>{part}</li>" for part in parts)
    return (
        f'<ul class="plain">{listed}</ul><p class="soft">SHA-256 of these settings; two reports '
        f'can be compared when it is the same:<br><code class="whole">'
        f"{escaped(report.protocol_sha256)}</code></p>"
    )


def _hash(sha256: str) -> str:
    """The whole hash, of which the style shows the start."""
    return f'<code class="hash" title="{escaped(sha256)}">{escaped(sha256)}</code>'


def datasets(report: Report, data: Any) -> str:
    """Counts and hashes of the categories."""
    rows = []
    for index, record in enumerate(report.categories):
        at = ("categories", index)
        pixels = "–"
        if record.defective_pixel_share is not None:
            pixels = number(data, (*at, "defective_pixel_share"), share)
        rows.append(
            f'<tr><th scope="row" data-sort="{escaped(record.category)}">'
            f'<a href="#c{index}">{escaped(record.category)}</a></th>'
            + "".join(
                f'<td data-sort="{getattr(record, key)}">{number(data, (*at, key))}</td>'
                for key in ("train", "test_good", "test_defective")
            )
            + f'<td data-sort="{record.defective_pixel_share or 0!r}">{pixels}</td>'
            f'<td class="text" data-sort="{escaped(record.layout)}">{escaped(record.layout)}</td>'
            f'<td class="text" data-sort="{record.sha256}">{_hash(record.sha256)}</td></tr>'
        )
    titles = (
        *("category", "normal, to fit", "test good", "test defective"),
        *("defective pixels, %", "layout", "SHA-256"),
    )
    head = "".join(sort_button(index, title) for index, title in enumerate(titles))
    return (
        '<div class="scroll tall" tabindex="0" role="region" aria-label="Data">'
        f'<table class="sortable plain"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def findings(report: Report) -> str:
    """What the audit of the files found, counted by kind, then one line each."""
    found = [finding for record in report.categories for finding in record.findings]
    if not found:
        return "<p>The audit of masks, sizes, crops, duplicates and counts found nothing.</p>"
    kinds = Counter(finding.kind for finding in found)
    counted = ", ".join(f"{FINDINGS[kind]}: {count}" for kind, count in kinds.most_common())
    opened = " open" if len(found) <= 12 else ""
    titles = ("category", "kind", "file", "finding")
    head = "".join(sort_button(index, title) for index, title in enumerate(titles))
    return (
        f"<details{opened}><summary>{counted}</summary>"
        '<div class="scroll tall" tabindex="0" role="region" aria-label="Audit">'
        f'<table class="sortable words"><thead><tr>{head}</tr></thead><tbody>'
        f"{''.join(map(_finding, found))}</tbody></table></div></details>"
    )


def _finding(finding: Finding) -> str:
    kind = FINDINGS[finding.kind] + (" (fatal)" if finding.fatal else "")
    words = (finding.category, kind, finding.file, finding.message)
    cells = "".join(f'<td data-sort="{escaped(w)}">{escaped(w)}</td>' for w in words)
    return f"<tr>{cells}</tr>"


def category_metrics(report: Report, data: Any, category: str) -> str:
    """All metrics of a category: the legend of its plots too."""
    places = {
        (row.backbone, row.metric): index
        for index, row in enumerate(report.table)
        if row.category == category
    }
    metrics = [m for m in metrics_of(report) if (report.backbones[0].name, m) in places]
    head = "".join(
        f'<th scope="col" title="{escaped(TITLES[metric])}">{SHORT[metric]}</th>'
        for metric in metrics
    )
    rows = "".join(
        f'<tr><th scope="row">{swatch(index)}{escaped(backbone.name)}</th>'
        + "".join(
            f"<td>{number(data, ('table', places[backbone.name, metric], 'mean'), percent)}</td>"
            for metric in metrics
        )
        + "</tr>"
        for index, backbone in enumerate(report.backbones)
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Metrics of the category">'
        f'<table class="plain all"><thead><tr><th scope="col">%, mean of the seeds</th>{head}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
    )


def moves(report: Report, data: Any) -> str:
    """How far the same weights move under other protocols."""
    if not report.protocol_moves:
        return ""
    titles = ("protocol", "category", "backbone", "metric", "%", "difference, points")
    head = "".join(
        sort_button(index, title, "text" if index < 4 else "") for index, title in enumerate(titles)
    )
    rows = []
    for index, move in enumerate(report.protocol_moves):
        words = (move.protocol, move.category, move.backbone, TITLES[move.metric])
        at = ("protocol_moves", index)
        rows.append(
            "<tr>"
            + "".join(
                f'<td class="text" data-sort="{escaped(word)}">{escaped(word)}</td>'
                for word in words
            )
            + f'<td data-sort="{move.mean!r}">{number(data, (*at, "mean"), percent)}</td>'
            f'<td data-sort="{move.difference!r}">{number(data, (*at, "difference"), signed)}</td>'
            "</tr>"
        )
    return (
        '<h2 id="protocols">The same weights under other protocols</h2>'
        f'<details><summary>{len(rows)} in all</summary><div class="scroll tall" tabindex="0" '
        'role="region" aria-label="Other protocols"><table class="sortable"><thead><tr>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def methods(report: Report) -> str:
    """What each number is, in plain words."""
    listed = "".join(
        f"<dt>{escaped(TITLES[metric])}</dt><dd>{MEANINGS[metric]}.</dd>"
        for metric in metrics_of(report)
    )
    paragraphs = [
        "<b>Score.</b> PaDiM: at each position of the feature grid, the Mahalanobis distance of "
        "the photograph's features to the Gaussian of the normal training photographs, computed "
        "exactly. Each seed draws other random dimensions, the same for all backbones of an "
        "architecture.",
        "<b>What was fitted on what.</b> The Gaussians: on the normal training photographs alone. "
        "The colours of the maps and the line at 1 %: on the good test photographs of the "
        "category, for each backbone. F1-max (*): its threshold is fitted on the test labels. "
        "Everything else depends on the order of the scores alone.",
        "<b>Intervals.</b> The test photographs are drawn again with replacement, good and "
        "defective ones apart, the same draws for every backbone. The intervals and p-values say "
        "how far the numbers move with other test photographs of the same kind. They do not cover "
        "four things: another pre-training run with the same recipe; other random dimensions (the "
        "mean over the seeds is taken as it is, and with one seed one draw counts as the truth); "
        "other normal photographs to fit on; other categories (the mean of a group is about its "
        "categories, not about others like them). Standard deviations are over the seeds of the "
        "random dimensions alone. With fewer than ten good or defective photographs, the intervals "
        "are too narrow.",
        "<b>Comparisons.</b> Paired: both backbones see the same draws. Two-sided p: the larger "
        "one of the bootstrap's and of a t test whose variance comes from leaving out each "
        "photograph in turn, so that few photographs are not taken for many; never below "
        "2 / 2<sup>n</sup> for n photographs, and 1 where good or defective ones are a single one. "
        "Corrected by "
        "Holm's method over all pairs and categories of a metric; the groups' means are a family "
        "of their own, without those that repeat a category or another group.",
        "<b>Maps.</b> A colour says which share of the pixels of the category's good test "
        "photographs the same backbone scores as high, so that colours mean the same in every "
        "column. Maps, curves and scores of photographs are of the first seed. A photograph's "
        "place counts the category's test photographs by score, the highest first.",
        "<b>Share of the score.</b> The squared distance at the map's highest position splits "
        "exactly into one part for each layer: what the layer adds, given the coarser ones.",
    ]
    return f'<dl class="meanings">{listed}</dl>' + "".join(f"<p>{p}</p>" for p in paragraphs)


def versions(report: Report) -> str:
    """The software that computed the numbers."""
    found: Sequence[tuple[str, str]] = [
        ("evaluator", report.evaluator_version),
        *report.versions.items(),
    ]
    return ", ".join(f"{escaped(name)} {escaped(version)}" for name, version in found)
