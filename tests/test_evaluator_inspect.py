"""`evaluator inspect`: scores, pictures, names, exit codes."""

import csv
import io
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from evaluator.heat_map import TOP_OF_SCALE, Verdict, draw, original_place
from evaluator.inspect_list import list_parts
from evaluator.protocols import PROTOCOLS
from tests.inspection_models import SIZE, describe, fit, run, tensors_of, write_parts

pytestmark = pytest.mark.usefixtures("one_thread")
PAPER, FULL = PROTOCOLS["paper"], PROTOCOLS["full"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model of twenty good parts. Not to be changed."""
    folder = tmp_path_factory.mktemp("model")
    result = fit(write_parts(folder / "parts", 20), folder / "model")
    assert result.exit_code == 0, result.output
    return folder / "model"


@pytest.fixture
def parts(tmp_path) -> Path:
    """One good part (one of those fitted on) and two defective ones."""
    write_parts(tmp_path / "parts" / "good", 1)
    write_parts(tmp_path / "parts" / "bad", 2, seed=7, defect=True)
    return tmp_path / "parts"


def inspect(model: Path, out: Path, *more: object):
    return run("inspect", model, "--out", out, "--device", "cpu", *more)


def rows_of(out: Path) -> dict[str, dict[str, str]]:
    with (out / "scores.csv").open(newline="") as file:
        return {"/".join(Path(row["file"]).parts[-2:]): row for row in csv.DictReader(file)}


def test_defects_are_rejected_and_found(model, parts, tmp_path):
    result = inspect(model, tmp_path / "out", parts)
    assert result.exit_code == 3
    assert "3 photographs: 1 accepted, 2 rejected; " in result.stdout
    rows = rows_of(tmp_path / "out")
    assert [row["rejected"] for row in rows.values()] == ["1", "1", "0"]  # bad/, then good/
    for name in ("bad/000.png", "bad/001.png"):
        row = rows[name]
        assert float(row["score"]) > float(row["threshold"])
        assert float(row["p_value"]) == pytest.approx(1 / 6, rel=1e-5)  # above all five
        # The square of write_parts, give or take the blur.
        assert 56 <= int(row["x_px"]) <= 80
        assert 16 <= int(row["y_px"]) <= 40
    good = rows["good/000.png"]
    assert float(good["score"]) <= float(good["threshold"])
    for row in rows.values():
        with Image.open(tmp_path / "out" / row["heat_map"]) as picture:
            assert picture.format == "PNG"
            assert picture.width > 2 * 448


def test_good_parts_exit_with_0(model, parts, tmp_path):
    result = inspect(model, tmp_path / "out", parts / "good" / "000.png", "--no-maps")
    assert result.exit_code == 0, result.output
    assert rows_of(tmp_path / "out")["good/000.png"]["heat_map"] == ""
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["scores.csv"]


def test_unreadable_photograph_is_one_line_and_the_rest_goes_on(model, parts, tmp_path):
    (parts / "bad" / "0005.png").write_bytes(b"\x89PNG\r\n\x1a\n cut")
    result = inspect(model, tmp_path / "out", parts, "--batch-size", "2")
    assert result.exit_code == 1
    assert "4 photographs: 1 accepted, 2 rejected, 1 unreadable; " in result.stdout
    (line,) = [line for line in result.stderr.splitlines() if "0005.png" in line]
    assert line.startswith("unreadable: ")
    rows = rows_of(tmp_path / "out")
    assert len(rows) == 4
    assert "not a readable image" in rows["bad/0005.png"]["error"]
    assert rows["bad/0005.png"]["rejected"] == ""


def test_scores_do_not_depend_on_the_batch(model, parts, tmp_path):
    for size in (1, 3):
        inspect(model, tmp_path / str(size), parts, "--no-maps", "--batch-size", size)
    one, three = rows_of(tmp_path / "1"), rows_of(tmp_path / "3")
    for name, row in one.items():
        assert float(row["score"]) == pytest.approx(float(three[name]["score"]), rel=1e-4)


def test_rerun_replaces_the_pictures_of_the_earlier_run_only(model, parts, tmp_path):
    out = tmp_path / "out"
    inspect(model, out, parts)
    assert len(list(out.rglob("*.png"))) == 3
    (out / "maps" / "mine.png").write_bytes(b"kept")
    shutil.rmtree(parts / "bad")
    result = inspect(model, out, parts)
    assert result.exit_code == 0
    assert {path.name for path in out.rglob("*.png")} == {"000.png", "mine.png"}
    assert list(rows_of(out)) == ["good/000.png"]


def test_scores_that_name_files_elsewhere_delete_nothing(model, parts, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "victim.png").write_bytes(b"kept")
    (out / "scores.csv").write_text("file,heat_map\na,maps/../../victim.png\nb,/etc/x.png\n")
    assert inspect(model, out, parts / "good").exit_code == 0
    assert (tmp_path / "victim.png").exists()


def test_names_that_collide_get_pictures_of_their_own(tmp_path):
    for name in ("a/1.png", "a/1.bmp", "b/1.png", "a/1-2.png", "a/deep/1.PNG"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    given = [tmp_path / "a", tmp_path / "b", tmp_path / "a" / "1.png"]
    parts = list_parts(given, tmp_path / "out").parts
    found = {part.path.relative_to(tmp_path).as_posix(): str(part.picture) for part in parts}
    assert list(found) == ["a/1-2.png", "a/1.bmp", "a/1.png", "a/deep/1.PNG", "b/1.png"]
    assert len({name.casefold() for name in found.values()}) == 5
    assert found["a/deep/1.PNG"] == "deep/1.png"
    assert (found["a/1.bmp"], found["a/1.png"]) == ("1.png", "1-3.png")


def test_own_output_is_not_inspected(tmp_path):
    write_parts(tmp_path, 1)
    write_parts(tmp_path / "out" / "maps", 2)
    (part,) = list_parts([tmp_path], tmp_path / "out").parts
    assert part.path == tmp_path / "000.png"


def test_folder_without_photographs_is_one_line(model, tmp_path):
    (tmp_path / "empty").mkdir()
    result = inspect(model, tmp_path / "out", tmp_path / "empty")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {tmp_path / 'empty'}: no photographs (.png, .jpg")
    assert result.stderr.count("\n") == 1


def test_no_photograph_is_wrong_usage(model, tmp_path):
    assert inspect(model, tmp_path / "out").exit_code == 2


@pytest.mark.parametrize("given", ["nowhere.png", "nowhere"])
def test_photograph_that_is_not_there_is_one_line(model, tmp_path, given):
    result = inspect(model, tmp_path / "out", tmp_path / given)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {tmp_path / given}: no such file or folder")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["file", "nowhere"])
def test_model_that_is_no_folder_is_one_line(parts, tmp_path, name):
    (tmp_path / "file").touch()
    result = inspect(tmp_path / name, tmp_path / "out", parts)
    assert result.exit_code == 1
    assert "expected a folder that `evaluator fit` wrote" in result.stderr


def test_scores_that_are_not_finite_reject_and_accept_nothing(model, parts, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    path = tensors_of(tmp_path / "model")
    tensors = load_file(path)
    tensors["whiten.0"].fill_(3e38)  # finite, its squares are not
    save_file(tensors, path)
    describe(path)
    result = inspect(tmp_path / "model", tmp_path / "out", parts)
    assert result.exit_code == 1
    assert "3 photographs: 0 accepted, 0 rejected, 3 unreadable; " in result.stdout
    for row in rows_of(tmp_path / "out").values():
        assert "scores are not finite" in row["error"]
        assert row["score"] == row["rejected"] == ""


def test_out_among_the_photographs_leaves_only_its_pictures_out(model, parts, tmp_path):
    for _ in range(2):
        result = inspect(model, parts / "good", parts)
        assert "3 photographs: 1 accepted, 2 rejected; " in result.stdout
    assert f"3 left out below {parts / 'good' / 'maps'}, where the pictures go" in result.stderr
    assert "scores.csv" not in result.stderr


def test_what_is_left_out_is_said(model, parts, tmp_path):
    for name in ("a.heic", "b.gif", "c.tif.gz", ".hidden"):
        (parts / name).touch()
    (parts / "linked").symlink_to(parts, target_is_directory=True)
    (parts / "good" / "dangling.png").symlink_to(tmp_path / "nowhere.png")
    (parts / "good" / "folder.png").mkdir()
    os.mkfifo(parts / "good" / "pipe.png")
    result = inspect(model, tmp_path / "out", parts, "--no-maps")
    assert result.exit_code == 1
    assert "3 files left out: " in result.stderr
    assert "c.tif.gz; taken are .png" in result.stderr
    assert f"1 linked folder not followed: {parts / 'linked'}\n" in result.stderr
    assert "6 photographs: 1 accepted, 2 rejected, 3 unreadable; " in result.stdout
    errors = {name: row["error"] for name, row in rows_of(tmp_path / "out").items()}
    assert "a link to a file that is not there" in errors["good/dangling.png"]
    assert "a folder, though named as an image" in errors["good/folder.png"]
    assert "no file" in errors["good/pipe.png"]


def test_long_names_get_short_pictures_of_their_own(model, parts, tmp_path):
    for end in "ab":  # 255 bytes; cut after 150 of them
        shutil.copy(parts / "bad" / "000.png", parts / "good" / f"{'ä' * 125}{end}.png")
    shutil.copy(parts / "bad" / "000.png", os.fsencode(parts / "good") + b"/\xff.png")
    result = inspect(model, tmp_path / "out", parts / "good")
    assert result.exit_code == 3, result.output
    names = sorted(path.name for path in (tmp_path / "out" / "maps").iterdir())
    assert names == ["000.png", f"{'ä' * 75}-2.png", f"{'ä' * 75}.png", "\udcff.png"]


def test_picture_that_cannot_be_written_is_its_rows_error(model, parts, tmp_path):
    (tmp_path / "out" / "maps" / "good" / "000.png").mkdir(parents=True)
    result = inspect(model, tmp_path / "out", parts)
    assert result.exit_code == 1
    assert "1 accepted, 2 rejected; 1 pictures not written; " in result.stdout
    row = rows_of(tmp_path / "out")["good/000.png"]
    assert "picture not written" in row["error"]
    assert (row["rejected"], row["heat_map"]) == ("0", "")
    assert len(list((tmp_path / "out" / "maps" / "bad").iterdir())) == 2


def test_photographs_that_carry_an_orientation_are_counted(model, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for name in ("a.jpg", "b.webp", "c.tif"):  # Pillow turns the third itself
        Image.new("RGB", SIZE).save(tmp_path / name, exif=exif)
    Image.new("RGB", SIZE).save(tmp_path / "d.jpg")
    result = inspect(model, tmp_path / "out", tmp_path, "--no-maps")
    assert "2 photographs carry an EXIF orientation; they are read as stored" in result.stderr


def interrupt_when(condition: Callable[[], bool]) -> threading.Thread:
    def wait() -> None:
        ends = time.monotonic() + 30
        while not condition() and time.monotonic() < ends:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_interrupt_says_what_is_kept(model, parts, tmp_path):
    for i in range(60):
        os.link(parts / "bad" / "000.png", parts / "bad" / f"1{i:02d}.png")
    out = tmp_path / "out"
    thread = interrupt_when((out / "maps" / "102.png").exists)
    result = inspect(model, out, parts / "bad", "--batch-size", 1)
    thread.join()
    assert result.exit_code == 130
    (count,) = re.findall(r"scores.csv holds the first (\d+) photographs", result.stderr)
    assert len(rows_of(out)) == int(count) >= 4


def test_pipe_in_the_models_place_is_not_waited_for(model, parts, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "model.json").unlink()
    os.mkfifo(tmp_path / "model" / "model.json")
    result = inspect(tmp_path / "model", tmp_path / "out", parts)
    assert result.exit_code == 1
    assert "model.json: not a file" in result.stderr


def test_folder_that_is_no_model_is_one_line(parts, tmp_path):
    result = inspect(parts, tmp_path / "out", parts)
    assert result.exit_code == 1
    assert result.stderr == f"Error: {parts / 'model.json'}: no such file\n"


@pytest.mark.parametrize(
    ("place", "protocol", "expected"),
    [
        ((0, 0), FULL, (1, 0)),  # half a map pixel: 0.5 x 512 / 256 = 1, 0.5 x 128 / 256 = 0.25
        ((255, 255), FULL, (511, 127)),
        ((0, 0), PAPER, (33, 8)),  # 16.5 x 2 = 33, 16.5 / 2 = 8.25
        ((100, 10), PAPER, (53, 58)),  # row 100, column 10
    ],
)
def test_place_is_in_pixels_of_the_original(place, protocol, expected):
    assert original_place(*place, (512, 128), protocol) == expected


def picture_of(map_value: float, threshold: float = 2.0) -> np.ndarray:
    photograph = io.BytesIO()
    Image.new("RGB", SIZE, (10, 20, 30)).save(photograph, "PNG")
    scores = np.full((256, 256), map_value, np.float32)
    verdict = Verdict("a.png", map_value, threshold, (0, 0))
    data = draw(photograph.getvalue(), scores, verdict, FULL)
    return np.asarray(Image.open(io.BytesIO(data)))


def test_picture_keeps_the_aspect_and_one_scale():
    # Panels of 448 x 299 (96 x 64) from (12, 42); the second begins at 12 + 448 + 12.
    low, top, over = (picture_of(value) for value in (0.0, 2.0 * TOP_OF_SCALE, 99.0))
    assert low.shape[:2] == (42 + 299 + 12, 4 * 12 + 2 * 448 + 18 + 52)
    middle = (42 + 150, 12 + 448 + 12 + 224)
    assert low[42 + 150, 12 + 224].tolist() == [10, 20, 30]
    assert low[middle].tolist() == [0, 0, 3]  # inferno's ends
    assert top[middle].tolist() == over[middle].tolist() == [252, 254, 164]


def test_picture_outlines_what_passes_the_threshold():
    edge = (42 + 298, 12 + 448 + 12 + 200)  # the map's last row
    assert picture_of(2.1)[edge].tolist() == [0, 230, 255]
    assert picture_of(1.9)[edge].tolist() != [0, 230, 255]
