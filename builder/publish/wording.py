"""The facts in words: what fills the templates of the card, the datasheet and the gallery."""

from __future__ import annotations

from importlib import resources
from string import Template

from builder.artifacts import readable_json
from builder.publish.facts import METHOD, Facts, brace_names, gigabytes, p_value, prose
from builder.publish.licence import UNKNOWN


def fill(template: str, said: dict[str, str]) -> str:
    """A file of `templates` with its $names filled in; a name without words is an error."""
    source = resources.files("builder.publish").joinpath("templates", template)
    return Template(source.read_text(encoding="utf-8")).substitute(said)


def words(facts: Facts) -> dict[str, str]:
    """Every fact in words, safe in Markdown and, escaped once more, in HTML."""
    dataset, source = facts.dataset, facts.dataset.normals.source
    found = dataset.environment.model_dump()
    environment = ", ".join(f"{name} {prose(str(value))}" for name, value in found.items())
    faults = (
        f"\n{len(source.faults)} photographs were missing or unusable; `dataset.json` lists them.\n"
    )
    return {
        "title": prose(facts.title),
        "description": facts.description,
        "method": METHOD,
        "authors": prose(", ".join(facts.authors)),
        "repo": facts.repo,
        "url": facts.url,
        "version": facts.options.version,
        "date": f"Published {facts.options.date}." if facts.options.date else "No date is stated.",
        "builder_version": dataset.builder_version,
        "environment": environment,
        "recipe": readable_json(dataset.recipe).decode().rstrip(),
        "recipe_sha256": dataset.recipe_sha256,
        "content_sha256": dataset.content_sha256,
        "content_short": dataset.content_sha256[:16],
        "recipe_name": dataset.recipe.name,
        "licence_name": facts.licence.spdx,
        "seed": str(dataset.recipe.seed),
        "shards": brace_names(facts),
        "shard_count": f"{len(dataset.shards):,}",
        "samples": f"{dataset.samples:,}",
        "suffix": dataset.image.suffix,
        "size_px": str(dataset.image.size_px),
        "mode": "RGB" if dataset.image.channels == 3 else "grey",
        "length": str(dataset.theta.length),
        "members": _members(facts),
        "data_size": gigabytes(facts.data_bytes),
        "normals": f"{dataset.normals.count:,}",
        "normals_size": gigabytes(facts.normals_bytes),
        "source": prose(source.name),
        "citation": _citation(facts),
        "licence": _licence(facts),
        "commercial": "Nor commercially: see the licence." if facts.licence.non_commercial else "",
        "licence_rows": _rows(facts.licences),
        "category_rows": _rows(facts.categories),
        "faults": faults if source.incomplete else "",
        "missing": faults.strip() if source.incomplete else "No.",
        "lossy": "" if dataset.image.lossless or not facts.images else _LOSSY,
        "limits": "\n".join(f"* {limit}" for limit in _limits(facts)),
        **_offsets(facts),
        **_measured(facts),
    }


_LOSSY = "The images are lossy: they differ from what theta describes by the codec's error."


def _rows(counts: dict[str, int]) -> str:
    return "\n".join(f"| {prose(name)} | {count:,} |" for name, count in sorted(counts.items()))


def _members(facts: Facts) -> str:
    image, length = facts.dataset.image, facts.dataset.theta.length
    if facts.images:
        loss = "lossless" if image.lossless else "lossy"
        return (
            f"`KEY.{image.suffix}` (the painted image, 8 bit, {loss}), `KEY.theta.npy` (float32 "
            f"[{length}]), `KEY.json` (`index`, `normal`: the key of its normal image, `category`)"
        )
    return (
        f"a tar each of `KEY.theta.npy` (float32 [n, {length}]) and `KEY.normal.npy` (int32 [n], "
        "the index of each one's normal image); the images follow from them"
    )


def _citation(facts: Facts) -> str:
    source = facts.dataset.normals.source
    homepage = f" ({prose(source.homepage)})" if source.homepage else ""
    return homepage + (f": {prose(source.citation)}" if source.citation else ".")


def _licence(facts: Facts) -> str:
    if facts.licence == UNKNOWN:
        return (
            "**The licence of the normal photographs is not known.** Whoever publishes or uses the "
            "images answers for it."
        )
    return (
        f"**[{facts.licence.spdx}]({facts.licence.url})**: the strictest of the photographs' "
        "licences; its terms hold for every painted image."
    )


def _offsets(facts: Facts) -> dict[str, str]:
    channels = facts.dataset.theta.channels
    width = channels + 6
    return {
        "width": str(width),
        "last_offset": str(width - 1),
        "last_component": str(facts.dataset.theta.components - 1),
        "color_offsets": "0 .. 2" if channels == 3 else "0",
        "color_names": "red, green, blue" if channels == 3 else "grey",
        "mean_offsets": f"{channels}, {channels + 1}",
        "sigma_offsets": f"{channels + 2}, {channels + 3}",
        "rho_offset": str(channels + 4),
        "pi_offset": str(channels + 5),
    }


def _measured(facts: Facts) -> dict[str, str]:
    statistics = facts.statistics
    visible = statistics.visibility
    low, high = visible.below_share_95_percent
    rows = [
        f"| `{test.kind}` | {test.law} | {test.values:,} | "
        f"{'–' if test.statistic is None else f'{test.statistic:.4f}'} | {p_value(test.p_value)} |"
        for test in statistics.kinds
    ]
    each = ""
    if statistics.smallest_p_value is not None:
        each = (
            f"Each of the {statistics.parameters_tested} parameters that vary by itself: the "
            f"smallest p-value is {p_value(statistics.smallest_p_value)} "
            f"(`{statistics.smallest_p_value_of}`), "
            f"{p_value(statistics.smallest_p_value_corrected)} after Bonferroni's correction."
        )
    return {
        "tested": f"{statistics.samples_tested:,}",
        "test_rows": "\n".join(rows),
        "each": each,
        "painted": f"{visible.samples:,}",
        "invisible_count": str(visible.below_count),
        "invisible_percent": f"{100 * visible.below_share:.1f}",
        "invisible_low": f"{100 * low:.1f}",
        "invisible_high": f"{100 * high:.1f}",
        "invisible_levels": str(visible.below_levels),
        "change_median": f"{visible.quantiles['0.5']:.0f}",
        "change_low": f"{visible.quantiles['0.05']:.0f}",
        "change_high": f"{visible.quantiles['0.95']:.0f}",
    }


def _limits(facts: Facts) -> list[str]:
    share = 100 * facts.statistics.visibility.below_share
    limits = [
        "The defects are mixtures of Gaussians: no sharp edges, no texture, no missing parts. They "
        "serve to pre-train and stand for the defects of no product.",
        "Components have no order: vectors that differ by a permutation of components are the same "
        "image. Compare vectors by a matching, or compare images.",
        f"About {share:.1f} % of the samples show nothing that an eye could see; their label is "
        "right all the same.",
        "Photographs were resized to a square; their aspect is not kept.",
        "Samples of one normal photograph share its background: split by `normal`, not by sample.",
    ]
    if facts.images and not facts.dataset.image.lossless:
        limits.append(_LOSSY)
    if facts.images and facts.dataset.image.channels == 1 and facts.dataset.image.suffix == "webp":
        limits.append("WebP has no grey: the images hold three equal planes.")
    return limits
