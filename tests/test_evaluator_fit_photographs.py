"""`evaluator fit`: which photographs it takes, what it refuses, what it says of --check."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from PIL import Image

from evaluator import conformal
from evaluator.artifacts import parse_model, read_json
from evaluator.errors import EvaluatorError
from evaluator.model import JSON_FILE, PadimModel
from evaluator.photographs import find_photographs
from tests.inspection_models import fit, run, tensors_of, write_parts
from tests.test_evaluator_fit import EXAMPLE

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    """Twenty photographs of good parts. Not to be changed."""
    return write_parts(tmp_path_factory.mktemp("parts"), 20)


def error_of(result) -> str:
    """The one line of an error."""
    assert result.exit_code == 1, result.output
    assert result.stderr.count("\n") == 1, result.stderr
    return result.stderr


@pytest.mark.parametrize(
    ("count", "rate", "near", "expected"),
    [
        (40, 0.05, 0.2, 0.47),  # 19 of 40 are 47.5 %; 0.47 x 40 = 18.8
        (20, 0.05, 0.2, None),  # 19 of 20: one is left to fit on
        (21, 0.05, 0.2, 0.89),  # 0.89 x 21 = 18.69
        (20, 0.2, 0.95, 0.92),  # 0.92 x 20 = 18.4: two are left
    ],
)
def test_share_that_suffices_by_hand(count, rate, near, expected):
    assert conformal.sufficient_share(count, rate, near, 2) == expected


@pytest.mark.parametrize(
    ("rate", "share", "expected"), [(0.05, 0.25, 75), (0.2, 0.95, 30), (0.5, 0.999, 1500)]
)
def test_least_in_all_by_hand(rate, share, expected):
    assert conformal.least_in_all(rate, share, 2) == expected


def test_too_few_photographs_name_the_share_that_suffices(parts, tmp_path):
    line = error_of(fit(parts, tmp_path / "out", "--false-reject-rate", "0.1"))
    assert "needs 9 held out" in line
    assert "set --held-out 0.43 (9 held out, 11 fitted), or raise" in line  # 8.6
    line = error_of(fit(parts, tmp_path / "out", "--false-reject-rate", "0.05"))
    assert "set --held-out" not in line


def test_folder_without_photographs_names_the_suffixes(tmp_path):
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "a.heic").touch()
    line = error_of(fit(tmp_path / "parts", tmp_path / "out"))
    assert "no photographs (.png, .jpg, .jpeg, .bmp, .tif, .tiff, .webp) in it" in line
    assert "1 file left out: " in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "what"), [("file", "a file"), ("nowhere", "no such folder")])
@pytest.mark.parametrize("option", ["--normals", "--check"])
def test_folder_that_is_not_there_is_one_line(parts, tmp_path, name, what, option):
    (tmp_path / "file").touch()
    more = [option, tmp_path / name]
    assert f"Error: {tmp_path / name}: {what}" in error_of(fit(parts, tmp_path / "out", *more))


def test_what_cannot_be_a_photograph_is_one_line(parts, tmp_path):
    shutil.copytree(parts, tmp_path / "parts")
    for name, make, what in (
        ("link.png", lambda path: path.symlink_to(tmp_path / "nowhere"), "a link to a file"),
        ("pipe.png", os.mkfifo, "no file"),
        ("folder.png", Path.mkdir, "a folder, though named as an image"),
    ):
        path = tmp_path / "parts" / name
        make(path)
        assert f"{path}: {what}" in error_of(fit(tmp_path / "parts", tmp_path / "out"))
        path.rmdir() if path.is_dir() else path.unlink()


def test_links_that_lead_back_are_not_followed(tmp_path):
    write_parts(tmp_path / "a" / "b", 1)
    (tmp_path / "a" / "b" / "back").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "a" / "self.png").symlink_to(tmp_path / "a" / "self.png")
    found = find_photographs(tmp_path / "a")
    assert [path.name for path in found.photographs] == ["000.png", "self.png"]
    assert found.linked_folders == [tmp_path / "a" / "b" / "back"]


def test_out_that_cannot_be_written_is_said_before_any_network_runs(parts, tmp_path):
    (tmp_path / "file").touch()
    result = fit(parts, tmp_path / "file" / "out", "--backbone", "random:no_such_network")
    assert "--out" in (line := error_of(result))
    assert "cannot be written (Not a directory)" in line


def test_spread_that_float32_turns_to_0_is_refused():
    record = EXAMPLE | {"backbone": EXAMPLE["backbone"] | {"std": [0.5, 1e-300, 0.5]}}
    with pytest.raises(EvaluatorError, match=r"backbone\.std must be at least 1e-06"):
        parse_model(PadimModel, record, "model.json")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"calibration": EXAMPLE["calibration"] | {"threshold": float("nan")}}, "threshold"),
        ({"calibration": EXAMPLE["calibration"] | {"threshold": float("inf")}}, "threshold"),
        ({"protocol": EXAMPLE["protocol"] | {"blur_sigma_px": 1e300}}, "blur_sigma_px"),
        ({"protocol": EXAMPLE["protocol"] | {"blur_radius_px": 10**12}}, "blur_radius_px"),
        ({"protocol": EXAMPLE["protocol"] | {"epsilon": 1e7}}, "epsilon"),
        ({"seed": 2**63}, "seed"),
        ({"seed": 10**400}, "seed"),
        ({"tensors": EXAMPLE["tensors"] | {"file": "../model-222222222222.safetensors"}}, "file"),
        ({"tensors": EXAMPLE["tensors"] | {"file": "model-222222222223.safetensors"}}, "file"),
    ],
)
def test_number_out_of_bounds_is_refused(tmp_path, change, key):
    (tmp_path / JSON_FILE).write_text(json.dumps(EXAMPLE | change))
    with pytest.raises(EvaluatorError, match=key) as caught:
        read_json(PadimModel, tmp_path / JSON_FILE)
    assert "\n" not in caught.value.message


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_pickle_that_runs_a_command_is_refused_and_not_run(parts, tmp_path, protocol):
    path, made = tmp_path / "weights.pth", tmp_path / "made"
    path.write_bytes(pickle.dumps({"conv1.weight": Touch(made)}, protocol=protocol))
    spec = f"x={path},arch=resnet18,norm=imagenet"
    line = error_of(fit(parts, tmp_path / "out", "--backbone", spec))
    assert f"{path}: not readable as weights" in line
    assert not made.exists()


def test_check_names_what_it_cannot_read_and_keeps_the_model(parts, tmp_path):
    check = write_parts(tmp_path / "check", 3, seed=5)
    (check / "002.png").write_bytes(b"no image")
    (check / "003.png").symlink_to(tmp_path / "nowhere.png")
    (check / "notes.txt").touch()
    out = tmp_path / "out"
    result = fit(parts, out, "--check", check, "--held-out", "0.25")
    assert result.exit_code == 0, result.output
    assert "002.png: not a readable image" in result.stderr
    assert "003.png: a link to a file that is not there" in result.stderr
    assert "--check: 1 file left out: " in result.stderr
    assert f"Of 2 in {check} (2 unreadable), " in result.stdout
    assert tensors_of(out).exists()


def test_check_without_photographs_is_said_before_the_fit(parts, tmp_path):
    line = error_of(fit(parts, tmp_path / "out", "--check", parts))
    assert "no photographs to check with (20 that the model knows left out, 0 unreadable)" in line
    assert not (tmp_path / "out").exists()


def test_refit_replaces_the_model_and_its_tensors(parts, tmp_path):
    folder, out = tmp_path / "parts", tmp_path / "out"
    shutil.copytree(parts, folder)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(folder / "000.png").save(folder / "turned.jpg", exif=exif)
    words = ["fit", "--normals", folder, "--out", out, "--backbone", "random:shufflenet_v2_x0_5"]
    words += ["--layers", "maxpool,stage2", "--dims", 8, "--false-reject-rate", 0.25]
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert "1 photograph carries an EXIF orientation; it is read as stored" in result.stderr
    assert json.loads((out / JSON_FILE).read_text())["protocol"]["name"] == "full"
    assert "cuts the border off" not in result.stdout
    first = tensors_of(out)
    (out / "model.safetensors").write_bytes(b"another program's")
    result = fit(folder, out)
    assert "cuts the border off" in result.stdout
    assert tensors_of(out) != first  # one file, and another one
    assert (out / "model.safetensors").exists()
