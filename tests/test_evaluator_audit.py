"""The audit of inspection photographs: one finding for each thing that would distort a score."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluator.audit import audit, format_findings
from evaluator.audited import checked_findings
from evaluator.datasets import find_categories
from evaluator.protocols import PAPER, changed
from evaluator.report import Finding
from tests.evaluator_inspection import save, square, write_category, write_loco, write_visa

WHOLE = changed(PAPER, resize_px=64, crop_px=0)
MANIFEST = Path(__file__).parent.parent / "data_manifests" / "inspection_counts.csv"


@pytest.fixture
def bolt(tmp_path: Path) -> Path:
    return write_category(tmp_path / "bolt")


def audited(root: Path, protocol=WHOLE) -> list[tuple[str, str, str]]:
    """Kind, file and message of all findings."""
    findings = audit(find_categories(root, None), protocol)
    assert all("\n" not in finding.message for finding in findings)
    return [(finding.kind, finding.file, finding.message) for finding in findings]


def only(root: Path, kind: str, file: str, protocol=WHOLE) -> str:
    """The message of the only finding."""
    ((found_kind, found_file, message),) = audited(root, protocol)
    assert (found_kind, found_file) == (kind, file)
    return message


def test_clean_set_has_no_findings(bolt):
    assert audited(bolt.parent) == []
    assert format_findings([]) == ""


def test_empty_mask(bolt):
    save(bolt / "ground_truth" / "light" / "000_mask.png", np.zeros((64, 64), np.uint8))
    assert "no pixel above 0" in only(bolt.parent, "mask_empty", "test/light/000.png")


def test_share_of_a_defect_outside_the_crop_with_the_worst_first(bolt):
    # Squares of 14 x 14 from 20 and 28; the crop shows 24 to 39: 10 x 10 and 12 x 12 of them.
    found = audited(bolt.parent, changed(PAPER, resize_px=64, crop_px=16))
    assert [(kind, file, message.split(" lies")[0]) for kind, file, message in found] == [
        ("defect_cropped", "test/dark/000.png", "49.0 % of the defect (96 of 196 px)"),
        ("defect_cropped", "test/light/000.png", "49.0 % of the defect (96 of 196 px)"),
        ("defect_cropped", "test/dark/001.png", "26.5 % of the defect (52 of 196 px)"),
    ]
    assert "centre crop of 16 of 64 px" in found[0][2]


def test_defect_wholly_outside_the_crop(bolt):
    save(bolt / "ground_truth" / "light" / "000_mask.png", square(at=0))
    protocol = changed(PAPER, resize_px=64, crop_px=44)
    message = only(bolt.parent, "defect_lost", "test/light/000.png", protocol)
    assert message.startswith("the defect (100 px) lies outside the centre crop of 44 of 64 px")


def test_defect_that_the_resize_loses(bolt):
    mask = np.zeros((64, 64), np.uint8)
    mask[30, 30] = 255  # half the size shows odd rows and columns only
    save(bolt / "ground_truth" / "light" / "000_mask.png", mask)
    protocol = changed(PAPER, resize_px=32, crop_px=0)
    message = only(bolt.parent, "defect_lost", "test/light/000.png", protocol)
    assert message == "the defect (1 px) vanishes when the mask is resized to 32 x 32"


def test_grey_levels_say_how_much_is_unclear(bolt):
    mask = square(255)
    mask[20:25, 20:30] = 1  # the upper half of the square
    save(bolt / "ground_truth" / "light" / "000_mask.png", mask)
    message = only(bolt.parent, "mask_grey_levels", "ground_truth/light/000_mask.png")
    assert message.startswith("3 grey levels")
    assert message.endswith("50.0 % of them below 128")


def test_mask_without_background(bolt):
    mask = np.full((64, 64), 10, np.uint8)
    mask[20:30, 20:30] = 255
    save(bolt / "ground_truth" / "light" / "000_mask.png", mask)
    message = only(bolt.parent, "mask_grey_levels", "ground_truth/light/000_mask.png")
    assert message == "no pixel is 0 (the lowest is 10), so the whole photograph is defective"


@pytest.mark.parametrize("high", [1, 7])
def test_masks_of_two_values_are_fine(bolt, high):
    save(bolt / "ground_truth" / "light" / "000_mask.png", square(high))
    assert audited(bolt.parent) == []


def test_masks_with_codes_are_fine(tmp_path):
    codes = square(2)
    codes[0:5, 0:5] = 3
    save(write_visa(tmp_path) / "Data/Masks/Anomaly/000.png", codes)
    loco = write_loco(tmp_path / "juice")
    save(loco / "ground_truth/structural_anomalies/000/000.png", codes)
    kinds = {kind for kind, _, _ in audited(tmp_path)}
    assert "mask_grey_levels" not in kinds


def test_loco_masks_are_judged_together(tmp_path):
    loco = write_loco(tmp_path / "bottle")
    save(loco / "ground_truth/logical_anomalies/000/000.png", np.zeros((64, 64), np.uint8))
    assert "mask_empty" not in {kind for kind, _, _ in audited(tmp_path)}


def test_test_photograph_that_the_model_is_fitted_on(bolt):
    shutil.copy(bolt / "train" / "good" / "003.png", bolt / "test" / "good" / "001.png")
    message = only(bolt.parent, "duplicate", "test/good/001.png")
    assert message.startswith("same file as train/good/003.png, which the model is fitted on")


def test_photograph_twice_in_training_by_its_pixels(bolt):
    good = bolt / "train" / "good"
    Image.open(good / "001.png").save(good / "004.bmp")
    message = only(bolt.parent, "duplicate", "train/good/004.bmp")
    assert (
        message == "same pixels as train/good/001.png in another file; it weighs twice in the fit"
    )


def test_photograph_twice_in_the_test(bolt):
    shutil.copy(bolt / "test" / "good" / "000.png", bolt / "test" / "good" / "001.png")
    message = only(bolt.parent, "duplicate", "test/good/001.png")
    assert message == "same file as test/good/000.png; it counts twice in the test"


def test_photograph_with_two_labels(bolt):
    shutil.copy(bolt / "test" / "good" / "000.png", bolt / "test" / "light" / "000.png")
    message = only(bolt.parent, "duplicate", "test/light/000.png")
    assert message.endswith("test/good/000.png; one is labelled good, the other defective")


def test_pixels_that_cannot_be_decoded_are_fatal(bolt):
    path = bolt / "train" / "good" / "002.png"
    Image.open(path).save(path.with_suffix(".jpg"))
    path.unlink()
    path = path.with_suffix(".jpg")
    path.write_bytes(path.read_bytes()[:-500])  # its header is right, so the listing takes it
    (finding,) = audit(find_categories(bolt.parent, None), WHOLE)
    assert (finding.kind, finding.file, finding.fatal) == ("unreadable", "train/good/002.jpg", True)


def test_files_that_the_listing_could_not_read_are_named_once(bolt):
    for path in ("train/good/000.png", "train/good/001.png", "test/dark/000.png"):
        (bolt / path).write_bytes(b"")
    (bolt / "ground_truth" / "light" / "000_mask.png").write_bytes(b"no image")
    found = audited(bolt.parent)
    assert [kind for kind, _, _ in found] == ["unreadable"] * 4
    assert len({file for _, file, _ in found}) == 4


def test_counts_of_a_known_dataset(tmp_path):
    write_category(tmp_path / "bottle")
    assert audited(tmp_path) == [
        ("count", "train", "5 photographs to fit on; MVTec AD's bottle has 209"),
        ("count", "test", "2 good photographs to score; MVTec AD's bottle has 20"),
        ("count", "test", "3 defective photographs to score; MVTec AD's bottle has 63"),
    ]


def test_counts_are_compared_within_the_datasets_layout_alone(tmp_path):
    write_category(tmp_path / "pushpins")  # LOCO's name, MVTec AD's folders
    assert audited(tmp_path) == []
    write_category(tmp_path / "visa_as_mvtec" / "candle")
    message = "5 photographs to fit on; VisA's candle has 900"
    assert ("count", "train", message) in audited(tmp_path / "visa_as_mvtec")
    write_visa(tmp_path / "visa")
    message = "2 photographs to fit on; VisA's candle has 900"
    assert ("count", "Data", message) in audited(tmp_path / "visa")


def test_published_counts_add_up():
    sums: dict[str, list[int]] = {}
    with MANIFEST.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            total = sums.setdefault(row["dataset"], [0, 0, 0, 0])
            counts = (int(row[key]) for key in ("train", "test_good", "test_defective"))
            total[:] = [a + b for a, b in zip(total, (1, *counts), strict=True)]
    assert sums == {
        "MVTec AD": [15, 3629, 467, 1258],
        "BTAD": [3, 1799, 451, 290],
        "VisA": [12, 8659, 962, 1200],
        "MVTec LOCO AD": [5, 1778, 575, 993],
    }


def test_format_shows_the_first_of_each_kind_and_counts_the_rest():
    def finding(category: str, kind: str, file: str, fatal: bool = False) -> Finding:
        entry = {"category": category, "kind": kind, "file": file, "message": "is odd"}
        return Finding.model_validate({**entry, "fatal": fatal})

    findings = [finding("nut", "duplicate", f"{i}.png") for i in range(5)]
    findings.append(finding("bolt", "count", "train"))
    findings.append(finding("nut", "mask_size", "a.png", fatal=True))
    assert format_findings(findings).splitlines() == [
        "nut",
        "  mask size (1, prevents scoring)",
        "    a.png: is odd",
        "  duplicate (5)",
        "    0.png: is odd",
        "    1.png: is odd",
        "    2.png: is odd",
        "    ... and 2 more",
        "bolt",
        "  count (1)",
        "    train: is odd",
    ]


def test_audit_is_kept_for_the_next_run(bolt, tmp_path):
    save(bolt / "train" / "good" / "001.png", np.zeros((64, 64, 3), np.uint8))
    save(bolt / "train" / "good" / "002.bmp", np.zeros((64, 64, 3), np.uint8))
    (category,) = find_categories(bolt.parent, None)
    kept = tmp_path / "cells"
    first = checked_findings([category], WHOLE, kept)
    assert [finding.kind for finding in first] == ["duplicate"]
    (path,) = kept.iterdir()
    before = path.stat().st_mtime_ns
    assert checked_findings([category], WHOLE, kept) == first
    assert path.stat().st_mtime_ns == before
    path.write_text(path.read_text()[:-9])
    assert checked_findings([category], WHOLE, kept) == first
    checked_findings([category], changed(PAPER, resize_px=64, crop_px=16), kept)
    assert len(list(kept.iterdir())) == 2
