"""`evaluator recheck`: whatever is altered in a report is named, though its tables agree."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from evaluator.artifacts import parse_model, sha256_of
from evaluator.cli import main
from evaluator.errors import EvaluatorError
from evaluator.protocols import PROTOCOLS, protocol_sha256
from evaluator.recheck import recheck
from evaluator.report import Report
from evaluator.table import csv_text, markdown
from tests.evaluator_inspection import write_category, write_folders

Data = dict[str, Any]
OPTIONS = ["--resize", "64", "--crop", "48", "--dims", "12", "--seeds", "2", "--device", "cpu"]
OPTIONS += ["--layers", "layer1,layer2", "--bootstrap", "1000", "--learning-curve", "2,3"]
OPTIONS += ["--backbone", "a=random:resnet18", "--backbone", "b=random:resnet18:1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A report of two categories with masks (`bottle` of MVTec AD) and one without."""
    folder = tmp_path_factory.mktemp("recheck")
    write_category(folder / "data" / "bolt")
    write_category(folder / "data" / "bottle", seed=1)
    write_folders(folder / "data" / "plain", masks=False)
    arguments = ["padim", "--data", str(folder / "data"), "--out", str(folder / "out"), *OPTIONS]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    shutil.rmtree(folder / "out" / "features")
    return folder / "out"


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    """A copy to alter."""
    shutil.copytree(finished, tmp_path / "report")
    return tmp_path / "report"


def data_of(folder: Path) -> Data:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def write(folder: Path, data: Data) -> None:
    """report.json with the tables that agree with it, as a careful forger leaves them."""
    report = parse_model(Report, copy.deepcopy(data), "altered")
    (folder / "report.json").write_text(json.dumps(data), encoding="utf-8")
    (folder / "table.csv").write_text(csv_text(report.table), encoding="utf-8")
    (folder / "table.md").write_text(markdown(report), encoding="utf-8")


def moves(data: Data) -> list[Data]:
    """Lines as --protocol-diff writes them: everything half a percent lower under `full`."""
    return [
        {
            "protocol": "full",
            "protocol_sha256": protocol_sha256(PROTOCOLS["full"]),
            "category": row["category"],
            "backbone": row["backbone"],
            "metric": row["metric"],
            "mean": round(row["mean"] - 0.5, 4),
            "difference": round(round(row["mean"] - 0.5, 4) - row["mean"], 4),
        }
        for row in data["table"]
        if row["category"] != "mean"
    ]


def test_report_as_written_is_equal(finished):
    text = recheck(finished)
    assert "6 cells" in text
    assert "worked out again, all equal" in text
    assert "checked for form only (layer_shares, learning_curve, protocol_moves)" in text


def test_report_without_its_cells_files_is_equal(folder):
    for path in (folder / "cells").glob("*.json"):
        path.unlink()
    assert "all equal" in recheck(folder)


def test_report_with_other_protocols_is_equal(folder):
    data = data_of(folder)
    write(folder, {**data, "protocol_moves": moves(data)})
    assert "all equal" in recheck(folder)


def put(*path: str | int, value: Any) -> Callable[[Data], None]:
    """Set what lies at `path`; a function is called with what is there."""

    def alter(data: Data) -> None:
        place: Any = data
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value(place[path[-1]]) if callable(value) else value

    return alter


CELL = ("scores", 0)
CATEGORY = ("categories", 0)
DRAW = ("dims", 0, "seeds", 1, "indices")
ALTERED = [
    (put(*CELL, "metrics", "pixel_ap", 1, value=0.5), "bolt, a: pixel_ap, seed 1 is 0.5"),
    (put(*CELL, "metrics", "pixel_ap", 1, value=lambda v: v - 1e-6), "pixel_ap, seed 1"),
    (put(*CELL, "curves", value=None), "bolt, a: curves: whether there are any is False"),
    (put(*CELL, "curves", "tpr", 30, value=0.5), "curves.tpr"),
    (put(*CELL, "curves", "fpr", value=lambda v: v[:-1]), "curves.fpr"),
    (put(*CELL, "images", 3, "score", 0, value=1.0), "images[3].score"),
    (put(*CELL, "shown", 0, value=1), "shown"),
    (put(*CELL, "shown", value=[]), "shown is []"),
    (put(*CELL, "maps", "sha256", value="0" * 64), "sha256 is not the recorded one"),
    (put(*CELL, "learning_curve", value=[]), "learning_curve, train is []"),
    (put(*CELL, "learning_curve", 0, "metrics", "aupro_30", 0, value=0.5), "beside cells/bolt"),
    (put(*CELL, "images", 0, "layer_shares", value=[0.5, 0.5]), "layer_shares"),
    (put(*CATEGORY, "images", value=lambda v: v[:-1]), "images"),
    (put(*CATEGORY, "images", 0, "regions", value=[1]), "bolt: images[0].regions is [1]"),
    (put(*CATEGORY, "images", 0, "defect", value="good"), "bolt: defects"),
    (put(*CATEGORY, "test_good", value=3), "bolt: test_good is 3, worked out again it is 2"),
    (put(*CATEGORY, "test_defective", value=2), "test_defective"),
    (put(*CATEGORY, "defects", "dark", value=3), "bolt: defects"),
    (put(*CATEGORY, "masks", value=False), "bolt: masks is False"),
    (put(*CATEGORY, "defective_pixel_share", value=None), "defective_pixel_share is None"),
    (put(*CATEGORY, "group", value="low"), "group is 'low'"),
    (put(*DRAW, value=lambda v: [v[0] + 1, *v[1:]]), "dims[0]: indices of seed 1"),
    (put("dims", 0, "channels", value=[64, -1]), "number of channels is possible"),
    (put("dims", 0, "channels", value=[64, 10**30]), "number of channels is possible"),
    (put("dims", value=lambda v: v + v), "dims: network, layers and number"),
    (put("seeds", value=[0, -1]), "seeds are of 64 bits"),
    (put("published", value=[]), "published is []"),
    (put("published", 0, "value", value=1.0), "published"),
    (put("protocol", "blur_sigma_px", value=2.0), "protocol_sha256"),
    (put("protocol", "name", value="paper"), "protocol 'paper'"),
    (put("table", 0, "mean", value=lambda v: v - 2e-4), "table[0].mean"),
    (put("table", 0, "low", value=lambda v: v - 2e-4), "table[0].low"),
    (put("table", value=lambda v: v[:-1]), "number of rows in table"),
    (put("comparisons", value=[]), "number of rows in comparisons is 0"),
    (put("comparisons", 0, "difference", value=lambda v: v + 2e-4), "comparisons[0].difference"),
    (put("comparisons", 0, "p", value=0.0), "comparisons[0].p is 0"),
    (put("comparisons", 0, "p_holm", value=lambda v: v / 2), "comparisons[0].p_holm"),
    (put("comparisons", 0, "distinct", value=lambda v: not v), "comparisons[0].distinct"),
]


@pytest.mark.parametrize(("alter", "message"), ALTERED, ids=[text for _, text in ALTERED])
def test_what_was_altered_is_named(folder, alter, message):
    data = data_of(folder)
    alter(data)
    try:
        write(folder, data)
    except EvaluatorError:  # not even a report
        (folder / "report.json").write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(EvaluatorError) as caught:
        recheck(folder)
    assert message in caught.value.message
    assert "\n" not in caught.value.message


ALTERED_MOVES = [
    (put("protocol_moves", 0, "mean", value=50.0), "protocol_moves[0].difference"),
    (put("protocol_moves", 0, "difference", value=-0.4), "protocol_moves[0].difference"),
    (put("protocol_moves", value=lambda v: v[1:]), "protocol_moves: their lines"),
    (put("protocol_moves", 0, "protocol_sha256", value="0" * 64), "[0].protocol_sha256"),
    (put("protocol_moves", 0, "category", value="nut"), "protocol_moves: their lines"),
    (put("scores", 1, "learning_curve", 0, "train", value=4), "bolt, a: learning_curve, train"),
    (put("scores", 0, "learning_curve", 1, "metrics", "aupro_30", value=[0.5]), "of aupro_30 is 1"),
    (put("scores", 0, "learning_curve", 1, "metrics", value={}), "3: names of the metrics"),
    (put("scores", 0, "images", 0, "layer_shares", value=[0.5, 0.4]), "their sum is 0.9"),
    (put("scores", 0, "images", 0, "layer_shares", value=[1.0]), "layer_shares, how many is 1"),
]


@pytest.mark.parametrize(("alter", "message"), ALTERED_MOVES, ids=[m for _, m in ALTERED_MOVES])
def test_form_is_checked_where_no_statistics_are(folder, alter, message):
    for path in (folder / "cells").glob("*.json"):
        path.unlink()
    data = data_of(folder)
    data["protocol_moves"] = moves(data)
    alter(data)
    write(folder, data)
    with pytest.raises(EvaluatorError) as caught:
        recheck(folder)
    assert message in caught.value.message


def test_p_may_differ_by_a_few_draws(folder):
    data = data_of(folder)
    pairs = [pair for pair in data["comparisons"] if pair["metric"] == "aupro_30"]
    family = [pair for pair in pairs if pair["category"] != "mean"]
    assert len(family) == 2  # bolt and bottle; what counts below is Holm's correction of two
    for pair in family:
        pair["p"] = min(1.0, pair["p"] + 2 * 2 / 1001)
    small, large = sorted(family, key=lambda pair: pair["p"])
    small["p_holm"] = min(1.0, 2 * small["p"])
    large["p_holm"] = max(small["p_holm"], large["p"])
    for pair in family:
        pair["distinct"] = pair["p_holm"] < 1 - 0.95
    write(folder, data)
    assert "all equal" in recheck(folder)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((48, 48), np.uint8), "48 rows are not its maps'"),
        (np.zeros((5 * 24, 24), np.uint8), "shape of the maps is (5, 24, 24)"),
        (None, "not readable as PNG"),
    ],
)
def test_maps_of_another_size_are_named(folder, pixels, message):
    data = data_of(folder)
    stored = data["scores"][0]["maps"]
    path = folder / stored["file"]
    if pixels is None:
        path.write_bytes(path.read_bytes()[:100])
    else:
        Image.fromarray(pixels).save(path)
    stored["bytes"], stored["sha256"] = path.stat().st_size, sha256_of(path.read_bytes())
    write(folder, data)
    with pytest.raises(EvaluatorError) as caught:
        recheck(folder)
    assert message in caught.value.message


def test_tables_that_disagree_are_named(folder):
    path = folder / "table.csv"
    path.write_text(path.read_text("utf-8").replace("own,bolt", "own,bold", 1), encoding="utf-8")
    with pytest.raises(EvaluatorError, match=r"table\.csv: not what report\.json says"):
        recheck(folder)


def test_damaged_statistics_are_one_line_and_exit_1(folder):
    path = sorted((folder / "cells").glob("*.npz"))[0]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    result = CliRunner().invoke(main, ["recheck", str(folder)])
    assert result.exit_code == 1
    assert "sha256 is not the recorded one" in result.stderr
    assert result.stderr.count("\n") == 1
