"""`evaluator padim` end to end on tiny photographs, and its errors."""

import csv
import io
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from PIL import Image
from sklearn.metrics import roc_auc_score
from torchvision.models import get_model

from evaluator.artifacts import read_json
from evaluator.cli import LAYOUTS, main
from evaluator.errors import EvaluatorError
from evaluator.options import PROTOCOL_NAMES, one_line_errors
from evaluator.protocols import PROTOCOLS, protocol_sha256
from evaluator.report import Report
from tests import naive
from tests.evaluator_inspection import save, write_category

SMALL = ["--resize", "64", "--crop", "48", "--dims", "12", "--seeds", "2", "--layers"]
SMALL += ["layer1,layer2", "--device", "cpu", "--bootstrap", "200"]


def padim(root: Path, out: Path, *more: str):
    """Run the command with two random backbones unless others are given."""
    specs = [] if "--backbone" in more else ["--backbone", "a=random:resnet18"]
    arguments = ["padim", "--data", str(root), "--out", str(out), *SMALL, *specs, *more]
    return CliRunner().invoke(main, arguments)


SPECS = ["--backbone", "a=random:resnet18", "--backbone", "random:resnet18:1"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Path, str]:
    """Two categories, two backbones, two seeds: (data, out, output)."""
    folder = tmp_path_factory.mktemp("inspection")
    write_category(folder / "data" / "bolt")
    write_category(folder / "data" / "bottle", seed=1)
    result = padim(folder / "data", folder / "out", *SPECS)
    assert result.exit_code == 0, result.output
    return folder / "data", folder / "out", result.stdout


def test_padim_writes_report_table_and_page(finished):
    _, out, text = finished
    report = read_json(Report, out / "report.json")
    assert [b.name for b in report.backbones] == ["a", "random-resnet18-1"]
    assert len(report.dims) == 1  # one architecture, one draw per seed
    assert [len(seed.indices) for seed in report.dims[0].seeds] == [12, 12]
    assert report.categories[0].defects == {"dark": 2, "light": 1}
    assert (out / "table.md").read_text(encoding="utf-8") in text
    with Image.open(out / "figure6.png") as page:
        assert page.width > 500
    assert "4 cells of 2 seeds: 4 computed, 0 from an earlier run" in text


def test_padim_finds_the_squares(finished):
    _, out, _ = finished
    report = read_json(Report, out / "report.json")
    for cell in report.scores:
        assert min(cell.metrics["pixel_auroc"]) > 0.9
        assert min(cell.metrics["image_auroc"]) == 1.0
        defective = [image for image in cell.images if image.pixel_auroc is not None]
        assert len(defective) == 3
        assert all(sum(image.layer_shares) == pytest.approx(1) for image in cell.images)


def test_csv_has_the_promised_columns_and_rows(finished):
    _, out, _ = finished
    rows = list(csv.DictReader(io.StringIO((out / "table.csv").read_text(encoding="utf-8"))))
    columns = ["group", "category", "backbone", "metric", "mean", "sd", "low", "high", "n_seeds"]
    assert list(rows[0]) == columns
    assert {(row["group"], row["category"]) for row in rows} == {
        ("own", "bolt"),
        ("other", "bottle"),
        ("own", "mean"),
        ("other", "mean"),
        ("all", "mean"),
    }
    assert len(rows) == 5 * 2 * 9
    for row in rows:
        assert 0 <= float(row["mean"]) <= 100
        if row["low"]:
            assert float(row["low"]) <= float(row["high"])


def test_out_holds_the_promised_files(finished):
    _, out, _ = finished
    names = {path.name for path in out.iterdir()}
    promised = {"report.json", "report.html", "table.csv", "table.md", "figure6.png"}
    assert names == promised | {"cells", "features"}


def test_rerun_takes_finished_cells_and_writes_the_same(finished):
    data, out, _ = finished
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    result = padim(data, out, *SPECS)
    assert "4 cells of 2 seeds: 0 computed, 4 from an earlier run" in result.stdout
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before


def test_rerun_computes_a_damaged_cell_again(finished):
    data, out, _ = finished
    maps = sorted((out / "cells").glob("bolt--*.npz"))[0]
    maps.write_bytes(maps.read_bytes()[:-1])
    result = padim(data, out, *SPECS)
    assert "1 computed, 3 from an earlier run" in result.stdout
    assert "computing again" in result.stderr


def test_other_settings_do_not_take_old_cells(finished, tmp_path):
    data, out, _ = finished
    shutil.copytree(out, tmp_path / "out")
    result = padim(data, tmp_path / "out", "--categories", "bolt", "--epsilon", "0.02")
    assert "1 cells of 2 seeds: 1 computed, 0 from an earlier run" in result.stdout


def test_other_settings_take_kept_features(finished, tmp_path):
    data, out, _ = finished
    more = ["--categories", "bolt", "--seeds", "3", "--features", str(out / "features")]
    result = padim(data, tmp_path / "out", *SPECS, *more)
    assert result.exit_code == 0, result.output
    report = read_json(Report, tmp_path / "out" / "report.json")
    assert [cell.extracted for cell in report.scores] == [0, 0]


def test_recheck_works_out_the_same_numbers_without_images(finished, tmp_path):
    _, out, _ = finished
    shutil.copytree(out, tmp_path / "report", ignore=shutil.ignore_patterns("features"))
    result = CliRunner().invoke(main, ["recheck", str(tmp_path / "report")])
    assert result.exit_code == 0, result.output
    assert "4 cells" in result.stdout
    assert "all equal" in result.stdout


def test_protocol_diff_scores_the_same_weights_under_the_others(finished, tmp_path):
    data, _, _ = finished
    more = ["--categories", "bolt", "--seeds", "1", "--protocol-diff"]
    result = padim(data, tmp_path / "out", "--layers", "layer1", *more)
    assert result.exit_code == 0, result.output
    report = read_json(Report, tmp_path / "out" / "report.json")
    assert report.protocol.name == "own"  # 64 px
    assert {m.protocol: m.protocol_sha256 for m in report.protocol_moves} == {
        name: protocol_sha256(protocol) for name, protocol in PROTOCOLS.items()
    }
    assert "the same weights under" in result.stdout


def test_category_that_another_protocol_loses_is_left_out_there(tmp_path):
    bolt = write_category(tmp_path / "data" / "bolt")
    corner = np.pad(np.full((3, 3), 255, np.uint8), ((0, 61), (0, 61)))
    for path in (bolt / "ground_truth").glob("*/*.png"):
        save(path, corner)
    more = ["--crop", "0", "--seeds", "1", "--protocol-diff", "--layers", "layer1"]
    result = padim(tmp_path / "data", tmp_path / "out", *more)
    assert result.exit_code == 0, result.output
    assert "bolt: no defective pixel is left under protocol paper; left out" in result.stderr
    report = read_json(Report, tmp_path / "out" / "report.json")
    assert {move.protocol for move in report.protocol_moves} == {"anomalib", "full"}


def test_learning_curve_has_a_point_for_each_smaller_number(finished, tmp_path):
    data, out, _ = finished
    more = [
        "--categories",
        "bolt",
        "--learning-curve",
        "2,3,50",
        "--features",
        str(out / "features"),
    ]
    result = padim(data, tmp_path / "out", *more)
    assert result.exit_code == 0, result.output
    (cell,) = read_json(Report, tmp_path / "out" / "report.json").scores
    assert [point.train for point in cell.learning_curve] == [2, 3]
    assert "bolt: 5 normal photographs; --learning-curve 50 left out" in result.stderr
    assert len(cell.learning_curve[0].metrics["aupro_30"]) == 2


def test_audit_prints_findings_and_a_summary(tmp_path):
    write_category(tmp_path / "bolt")
    result = CliRunner().invoke(main, ["audit", "--data", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "1 categories, 10 photographs, protocol paper" in result.stdout


def test_audit_refuses_what_padim_would(tmp_path):
    bolt = write_category(tmp_path / "bolt")
    for path in (bolt / "ground_truth").glob("*/*.png"):
        save(path, np.zeros((64, 64), np.uint8))
    result = CliRunner().invoke(main, ["audit", "--data", str(tmp_path)])
    assert result.exit_code == 1
    assert "no mask has a defective pixel" in result.stderr


def test_long_category_names_make_short_file_names(tmp_path):
    write_category(tmp_path / "data" / ("é" * 120))
    result = padim(tmp_path / "data", tmp_path / "out", "--seeds", "1", "--layers", "layer1")
    assert result.exit_code == 0, result.output


def test_options_name_what_is_there():
    from evaluator.datasets import LAYOUTS as known

    assert ("auto", *known) == LAYOUTS
    assert tuple(PROTOCOLS) == PROTOCOL_NAMES


def relu_features(paths: list[Path]) -> np.ndarray:
    """The first feature map of `random:resnet18` by torchvision alone: [images, 64, 32, 32]."""
    torch.manual_seed(0)
    model = get_model("resnet18", weights=None).eval()
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths])
    with torch.no_grad():
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
        return model.relu(model.bn1(model.conv1(x))).numpy()


def test_scores_equal_the_slow_version(tmp_path):
    bolt = write_category(tmp_path / "data" / "bolt", train=4)
    options = ["--crop", "0", "--blur-sigma", "0", "--layers", "relu", "--dims", "5"]
    result = padim(tmp_path / "data", tmp_path / "out", *options, "--batch-size", "3")
    assert result.exit_code == 0, result.output
    report = read_json(Report, tmp_path / "out" / "report.json")

    test = sorted((bolt / "test").glob("*/*.png"))
    features = relu_features([*sorted((bolt / "train" / "good").iterdir()), *test])
    masks = np.zeros((5, 64, 64), bool)
    for mask, path in zip(masks, test, strict=True):
        truth = bolt / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"
        if truth.exists():
            mask[:] = np.asarray(Image.open(truth)) > 0
    for index, seed in enumerate(report.dims[0].seeds):
        distance = naive.padim_distances([features], seed.indices, 4, 0.01)
        maps = F.interpolate(torch.from_numpy(distance)[None], (64, 64), mode="bilinear")[0]
        pixel = roc_auc_score(masks.ravel(), maps.numpy().ravel())
        image = naive.auroc(masks.any(axis=(1, 2)).tolist(), maps.amax(dim=(1, 2)).tolist())
        found = report.scores[0].metrics
        assert found["pixel_auroc"][index] == pytest.approx(pixel, abs=1e-5)
        assert found["image_auroc"][index] == pytest.approx(image, abs=1e-9)


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--data", "nowhere"], 1, "Error: nowhere: no such folder"),
        (["--backbone", "random:resnet99"], 1, "did you mean 'resnet"),
        (["--categories", "nut"], 1, "--categories knows bolt, bottle"),
        (["--max-memory", "0.000001"], 1, "--max-memory: 10 images x 12 dimensions need"),
        (["--dims", "193"], 1, "193 dimensions wanted"),
        (["--learning-curve", "1,5"], 2, "--learning-curve '1,5': 1 is below 2"),
        (["--learning-curve", "x"], 2, "expected whole numbers"),
        (["--crop", "65"], 2, "--crop 65 is larger than --resize 64"),
        (["--seeds", "0"], 2, "Invalid value for '--seeds'"),
        (["--mean", "0,0,0"], 2, "--mean and --std together"),
        (["--mean", "0,0", "--std", "1,1,1"], 2, "expected three numbers"),
        (["--mean", "0,0,0", "--std", "1,nan,1"], 2, "expected three finite numbers"),
        (["--categories", "a,,b"], 2, "expected names separated by commas"),
        (["--epsilon", "nan"], 2, "'--epsilon': 'nan' is not a finite number"),
        (["--blur-sigma", "nan"], 2, "'--blur-sigma': 'nan' is not a finite number"),
        (["--max-memory", "nan"], 2, "'--max-memory': 'nan' is not a finite number"),
        (["--max-memory", "inf"], 2, "Invalid value for '--max-memory'"),
        (["--layers", "layer1,layer1"], 1, "layer 'layer1' is given twice"),
    ],
)
def test_wrong_input_is_one_line(finished, tmp_path, more, code, message):
    data, _, _ = finished
    result = padim(data, tmp_path / "out", *more)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    if code == 1:
        assert len([line for line in result.stderr.splitlines() if "Error" in line]) == 1


def test_two_backbones_of_one_name_are_refused(finished, tmp_path):
    data, _, _ = finished
    specs = ["--backbone", "a=random:resnet18", "--backbone", "a=random:resnet18:1"]
    result = padim(data, tmp_path / "out", *specs)
    assert result.exit_code == 1
    assert "the name 'a' is taken" in result.stderr


def test_defects_outside_the_crop_are_refused(tmp_path):
    bolt = write_category(tmp_path / "data" / "bolt")
    for path in (bolt / "ground_truth").glob("*/*.png"):
        save(path, np.pad(np.full((4, 4), 255, np.uint8), ((0, 60), (0, 60))))
    result = padim(tmp_path / "data", tmp_path / "out")
    assert result.exit_code == 1
    assert "no mask has a defective pixel in the 48 px crop" in result.stderr


def test_out_that_cannot_be_made_is_one_line(finished, tmp_path):
    data, _, _ = finished
    (tmp_path / "file").write_text("")
    result = padim(data, tmp_path / "file" / "out")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {tmp_path / 'file'}")


def raise_(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: np.empty(2**50, np.uint8),
        lambda: torch.empty(2**50, dtype=torch.uint8),
        lambda: raise_(torch.OutOfMemoryError("CUDA out of memory.")),
    ],
    ids=["numpy", "torch", "cuda"],
)
def test_memory_that_runs_out_is_one_line(tmp_path, allocate):
    expected = r"memory ran out \(.*\); lower --batch-size or --max-memory"
    with pytest.raises(EvaluatorError, match=expected) as caught, one_line_errors(tmp_path):
        allocate()
    assert "\n" not in caught.value.message


def test_other_runtime_errors_are_not_hidden(tmp_path):
    with pytest.raises(RuntimeError, match="a bug"), one_line_errors(tmp_path):
        raise RuntimeError("a bug")


def test_file_names_are_no_formulas(tmp_path):
    bolt = write_category(tmp_path / "data" / "$x_{")
    (bolt / "test" / "light" / "000.png").rename(bolt / "test" / "light" / r"a$\foo$.png")
    masks = bolt / "ground_truth" / "light"
    (masks / "000_mask.png").rename(masks / r"a$\foo$_mask.png")
    result = padim(tmp_path / "data", tmp_path / "out", "--seeds", "1")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "figure6.png").exists()


def test_killed_run_continues_where_it_was(finished, tmp_path):
    data, calm, _ = finished
    out, cells = tmp_path / "out", tmp_path / "out" / "cells"
    command = [sys.executable, "-m", "evaluator", "padim", "--data", str(data), "--out", str(out)]
    process = subprocess.Popen([*command, *SMALL, *SPECS], stdout=subprocess.DEVNULL)
    while not list(cells.glob("*--resnet18--*.json")) and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in cells.glob("*--resnet18--*.json")}
    assert 1 <= len(before) <= 3
    # Of a kill inside a write, by a process that cannot be: pids end at 2^22.
    leftovers = [out / ".table.csv.tmp-4999999", cells / ".a.npz.tmp-4999999"]
    for path in leftovers:
        path.write_bytes(b"half")

    result = padim(data, out, *SPECS)
    assert f"{4 - len(before)} computed, {len(before)} from an earlier run" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (out / "table.csv").read_bytes() == (calm / "table.csv").read_bytes()
    assert not any(path.exists() for path in leftovers)


def test_interrupt_is_one_line_and_130(tmp_path):
    write_category(tmp_path / "data" / "bolt", train=120)
    command = [sys.executable, "-m", "evaluator", "padim", "--data", str(tmp_path / "data")]
    command += ["--out", str(tmp_path / "out"), "--backbone", "random:resnet18", "--resize", "256"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1].startswith("Interrupted; the same command continues")
    assert "Traceback" not in errors


def test_command_line_loads_neither_torch_nor_numpy():
    code = "import sys, evaluator.cli; print({'torch', 'numpy', 'pydantic'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def test_version():
    result = CliRunner().invoke(main, ["--version"])
    assert result.output == "evaluator, version 0.1.0\n"
