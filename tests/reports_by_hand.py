"""Reports made up for tests: valid, seeded, of any number of categories, backbones and seeds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluator.panels import Panel
from evaluator.protocols import PAPER, protocol_sha256
from evaluator.report import Report

METRICS = ("pixel_auroc", "aupro_30", "aupro_05", "aupro_01", "pixel_ap", "pixel_f1_max")
IMAGE_METRICS = ("image_auroc", "image_ap", "image_f1_max")
COMPARED = ("pixel_auroc", "aupro_30", "aupro_05", "aupro_01", "image_auroc")
PAPER_CATEGORIES = (
    *("metal_nut", "pill", "tile", "wood", "bottle", "cable", "capsule", "carpet"),
    *("grid", "hazelnut", "leather", "screw", "toothbrush", "transistor", "zipper"),
)
FPR = [0.0, *np.round(np.logspace(-4, 0, 41), 8).tolist()]
PANEL_SIZE = 32
LAYERS = ["layer1", "layer2", "layer3"]


def make_report(
    categories: int | Sequence[str] = 2,
    backbones: int | Sequence[str] = 3,
    seeds: int = 2,
    images: int = 6,
    masks: bool = True,
    curve: bool = True,
) -> Report:
    """A valid report with made-up numbers; the first third of each category's images is good."""
    rng = np.random.default_rng(0)
    names = _names(categories, ["bolt", "bottle", *PAPER_CATEGORIES])
    models = _names(backbones, ["ImageNet", "BTAD direct", "BTAD indirect", "random"])
    records = [_category(name, images, masks) for name in names]
    metrics = [*(METRICS if masks else ()), *IMAGE_METRICS]
    scores = [
        _scores(rng, record, model, metrics, seeds, curve) for record in records for model in models
    ]
    table = _table(records, models, scores, metrics)
    return Report.model_validate(
        {
            "format": "semiformula-report",
            "format_version": 2,
            "evaluator_version": "0.1.0",
            "versions": {"python": "3.11.7", "torch": "2.14.1"},
            "data": "parts",
            "protocol": PAPER,
            "protocol_sha256": protocol_sha256(PAPER),
            "seeds": list(range(seeds)),
            "feature_dtype": "float16",
            "bootstrap": {"draws": 1000, "seed": 0, "level": 0.95},
            "backbones": [_backbone(index, name) for index, name in enumerate(models)],
            "dims": [_dims(seeds)],
            "categories": records,
            "scores": scores,
            "table": table,
            "comparisons": _comparisons(table, models, records),
            "published": [
                {
                    "source": "PaDiM paper",
                    "arch": "wide_resnet50_2",
                    "category": name,
                    "metric": "pixel_auroc",
                    "value": 96.5,
                }
                for name in names
                if name in PAPER_CATEGORIES
            ],
            "protocol_moves": [
                {
                    "protocol": "full",
                    "protocol_sha256": "f" * 64,
                    "category": names[0],
                    "backbone": models[0],
                    "metric": metrics[0],
                    "mean": 91.25,
                    "difference": -0.75,
                }
            ],
        }
    )


def make_panels(report: Report, every: int = 1) -> list[Panel]:
    """Noise for photographs and maps, a square for the truth."""
    rng = np.random.default_rng(0)
    panels = []
    for record in report.categories:
        for index, image in list(enumerate(record.images))[::every]:
            mask = np.zeros((PANEL_SIZE, PANEL_SIZE), np.bool_)
            mask[8:20, 10:18] = True
            panels.append(
                Panel(
                    category=record.category,
                    image_index=index,
                    label=f"{image.defect}/{Path(image.file).name}",
                    image=rng.integers(0, 256, (PANEL_SIZE, PANEL_SIZE, 3), np.uint8),
                    mask=mask if image.regions else None,
                    levels=[
                        rng.integers(0, 256, (PANEL_SIZE, PANEL_SIZE), np.uint8)
                        for _ in report.backbones
                    ],
                )
            )
    return panels


def _names(wanted: int | Sequence[str], some: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(some))[:wanted] if isinstance(wanted, int) else list(wanted)


def _category(name: str, images: int, masks: bool) -> dict[str, Any]:
    good = max(1, images // 3)
    kinds = ["good"] * good + [("crack", "hole")[i % 2] for i in range(images - good)]
    low = PAPER_CATEGORIES.index(name) < 4 if name in PAPER_CATEGORIES else False
    return {
        "category": name,
        "group": ("low" if low else "other") if name in PAPER_CATEGORIES else "own",
        "layout": "mvtec",
        "train": 209,
        "test_good": good,
        "test_defective": images - good,
        "defects": {kind: kinds.count(kind) for kind in dict.fromkeys(kinds[good:])},
        "masks": masks,
        "defective_pixel_share": 0.0314159 if masks else None,
        "images": [
            {
                "file": f"test/{kind}/{index:03d}.png",
                "defect": kind,
                "regions": [120, 7] if masks and kind != "good" else [],
            }
            for index, kind in enumerate(kinds)
        ],
        "findings": [
            {
                "category": name,
                "kind": "defect_cropped",
                "file": "test/crack/004.png",
                "message": "12.5 % of the defect lies outside the crop",
                "fatal": False,
            }
        ],
        "sha256": f"{len(name):064x}",
    }


def _backbone(index: int, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "spec": f"{name}=random:resnet18",
        "kind": "random",
        "arch": "resnet18",
        "weights_sha256": f"{index + 1:064x}",
        "ignored_keys": [],
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "layers": LAYERS,
        "dims": 4,
        "export": None,
    }


def _dims(seeds: int) -> dict[str, Any]:
    draws = [{"seed": seed, "indices": [seed, 64 + seed, 200, 300]} for seed in range(seeds)]
    return {
        "arch": "resnet18",
        "layers": LAYERS,
        "channels": [64, 128, 256],
        "dims": 4,
        "seeds": draws,
    }


def _scores(
    rng: np.random.Generator,
    record: dict[str, Any],
    model: str,
    metrics: Sequence[str],
    seeds: int,
    curve: bool,
) -> dict[str, Any]:
    steep = rng.uniform(0.08, 0.4)  # of the curves
    per_seed = {
        metric: (rng.uniform(0.7, 0.97) + rng.uniform(-0.01, 0.01, seeds)).tolist()
        for metric in metrics
    }
    images = []
    for image in record["images"]:
        has_auroc = record["masks"] and image["defect"] != "good"
        images.append(
            {
                "score": (rng.uniform(5, 30) + rng.uniform(-0.5, 0.5, seeds)).tolist(),
                "pixel_auroc": float(rng.uniform(0.6, 1)) if has_auroc else None,
                "regions_aupro_30": rng.uniform(0.4, 1, len(image["regions"])).tolist(),
                "layer_shares": rng.dirichlet([3, 2, 1]).tolist(),
            }
        )
    points = [
        {
            "train": train,
            "metrics": {
                metric: [value - 0.5 / train for value in values]
                for metric, values in per_seed.items()
            },
        }
        for train in ((10, 25, 50, 100) if curve else ())
    ]
    curves = {
        "fpr": FPR,
        "tpr": [fpr**steep for fpr in FPR],
        "pro": [fpr ** (1.2 * steep) for fpr in FPR],
    }
    return {
        "category": record["category"],
        "backbone": model,
        "metrics": per_seed,
        "curves": curves if record["masks"] else None,
        "images": images,
        "learning_curve": points,
        "statistics": [_stored("statistics.npz")] * seeds,
        "maps": _stored("maps.png"),
        "shown": list(range(len(images))),
        "form": "dual",
        "extracted": 292,
        "features_s": 12.5,
        "scoring_s": 3.25,
        "device": "cpu",
    }


def _stored(name: str) -> dict[str, Any]:
    return {"file": f"cells/{name}", "bytes": 100, "sha256": "a" * 64}


def _table(
    records: Sequence[dict[str, Any]],
    models: Sequence[str],
    scores: Sequence[dict[str, Any]],
    metrics: Sequence[str],
) -> list[dict[str, Any]]:
    values = {
        (score["category"], score["backbone"], metric): 100 * np.array(score["metrics"][metric])
        for score in scores
        for metric in metrics
    }
    rows = []
    for metric in metrics:
        lines = [(r["group"], r["category"], [r["category"]]) for r in records]
        for group in ("low", "other", "own", "all"):
            members = [r["category"] for r in records if group in (r["group"], "all")]
            lines += [(group, "mean", members)] if members else []
        for (group, category, members), model in itertools.product(lines, models):
            per_seed = np.mean([values[name, model, metric] for name in members], axis=0)
            mean = round(float(per_seed.mean()), 4)
            row = {"group": group, "category": category, "backbone": model, "metric": metric}
            row |= {"mean": mean, "sd": None, "low": None, "high": None, "n_seeds": len(per_seed)}
            if len(per_seed) > 1:
                row["sd"] = round(float(per_seed.std(ddof=1)), 4)
            if metric in COMPARED:
                row |= {"low": round(mean - 2.25, 4), "high": round(min(100, mean + 1.5), 4)}
            rows.append(row)
    return rows


def _comparisons(
    table: Sequence[dict[str, Any]], models: Sequence[str], records: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    groups = [record["group"] for record in records]
    repeated = {group for group in groups if groups.count(group) == 1}
    if len(set(groups)) == 1:
        repeated.add("all")
    found = []
    rows = {(r["group"], r["category"], r["metric"], r["backbone"]): r["mean"] for r in table}
    lines = dict.fromkeys((r["group"], r["category"], r["metric"]) for r in table)
    for line in lines:
        if line[1] == "mean" and line[0] in repeated:
            continue
        for a, b in itertools.combinations(models, 2) if line[2] in COMPARED else ():
            difference = round(rows[*line, a] - rows[*line, b], 4)
            p = round(min(1.0, 2 ** -abs(difference)), 4)
            found.append(
                {
                    **dict(zip(("group", "category", "metric"), line, strict=True)),
                    **{"a": a, "b": b, "difference": difference, "p": p},
                    **{"low": round(difference - 2, 4), "high": round(difference + 2, 4)},
                    **{"p_holm": min(1.0, 3 * p), "distinct": 3 * p < 0.05},
                }
            )
    return found
