import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from builder.demo import make_demo_data
from builder.demo_defects import KINDS
from builder.demo_noise import cells, polygon_distance, stream
from builder.demo_render import PRODUCTS, render_defect, render_normal
from builder.errors import BuilderError

SMALL = {"train": 2, "good": 1, "per_defect": 1, "size_px": 64, "jobs": 1}


@pytest.fixture(scope="module")
def demo_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("demo")
    make_demo_data(out, **SMALL)
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_demo_data_has_the_layout_of_mvtec_ad(demo_set: Path):
    expected = {"LICENSE.txt", "README.md", "demo.json"}
    for product in ("plank", "plate", "terrazzo"):
        expected |= {f"{product}/train/good/00{i}.png" for i in (0, 1)}
        expected |= {f"{product}/test/good/000.png"}
        for kind in ("chip", "missing_part", "scratch", "stain"):
            expected |= {f"{product}/test/{kind}/000.png"}
            expected |= {f"{product}/ground_truth/{kind}/000_mask.png"}
    assert set(files(demo_set)) == expected


def test_demo_pictures_are_rgb_and_masks_binary(demo_set: Path):
    for path in demo_set.rglob("*.png"):
        image = Image.open(path)
        assert image.size == (64, 64)
        if path.stem.endswith("_mask"):
            assert image.mode == "L"
            assert set(np.unique(np.asarray(image))) == {0, 255}
        else:
            assert image.mode == "RGB"
            assert np.asarray(image).std() > 5


def test_demo_record_counts_add_up(demo_set: Path):
    record = json.loads((demo_set / "demo.json").read_text())
    del record["sha256"]
    written = files(demo_set)
    del written["demo.json"]
    assert record == {
        "format": "semiformula-demo-data", "format_version": 1, "licence": "CC0-1.0",
        "seed": 0, "size_px": 64, "products": ["plank", "plate", "terrazzo"],
        "kinds": ["chip", "missing_part", "scratch", "stain"],
        "train": 2, "good": 1, "per_defect": 1,
        "files": 3 * (2 + 1 + 4 + 4) + 2, "bytes": sum(map(len, written.values())),
    }  # fmt: skip


def test_demo_data_is_the_same_again_with_more_pictures_and_other_workers(
    demo_set: Path, tmp_path: Path
):
    make_demo_data(tmp_path / "more", **{**SMALL, "train": 12, "jobs": 2})
    more = files(tmp_path / "more")
    for name, data in files(demo_set).items():
        assert name == "demo.json" or more[name] == data, name


def test_demo_pictures_differ_by_seed_split_kind_and_index():
    pictures = [
        render_normal("plank", "train", 0, size_px=64, seed=0),
        render_normal("plank", "train", 1, size_px=64, seed=0),
        render_normal("plank", "test", 0, size_px=64, seed=0),
        render_normal("plank", "test", 0, size_px=64, seed=0, kind="chip"),
        render_normal("plank", "train", 0, size_px=64, seed=1),
    ]
    assert len({picture.tobytes() for picture in pictures}) == 5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("product", PRODUCTS)
def test_mask_marks_what_the_defect_changed(product: str, kind: str):
    for index in range(3):
        clean = render_normal(product, "test", index, size_px=128, seed=0, kind=kind)
        image, mask = render_defect(product, kind, index, size_px=128, seed=0)
        change = np.abs(image.astype(int) - clean.astype(int)).max(axis=2)
        assert (change[mask == 0] == 0).all()
        assert 4e-4 <= (mask == 255).mean() <= 0.2
        assert (change[mask == 255] >= 3).mean() > 0.3
        for region in regions(mask):
            assert change[region].max() >= 4


def regions(mask: np.ndarray) -> list[np.ndarray]:
    """Connected regions (8 neighbours) of a mask as boolean fields, by flooding."""
    left, found = mask > 0, []
    while left.any():
        region = np.zeros_like(left)
        region.flat[np.flatnonzero(left)[0]] = True
        while True:
            padded = np.pad(region, 1)
            rows, columns = mask.shape
            neighbours = [padded[i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
            grown = np.logical_or.reduce(neighbours)
            grown &= left
            if (grown == region).all():
                break
            region = grown
        found.append(region)
        left &= ~region
    return found


def test_defects_stay_where_a_centre_crop_sees_them():
    for product in PRODUCTS:
        for kind in KINDS:
            _, mask = render_defect(product, kind, 0, size_px=64, seed=1)
            assert (mask[4:60, 4:60] == 255).any(), (product, kind)


def test_demo_data_found_complete_is_left_alone(demo_set: Path):
    before = {path: path.stat().st_mtime_ns for path in demo_set.rglob("*.png")}
    summary = make_demo_data(demo_set, **SMALL)
    assert (summary.written, summary.images, summary.masks) == (0, 21, 12)
    assert {path: path.stat().st_mtime_ns for path in demo_set.rglob("*.png")} == before


def test_demo_summary_adds_up(demo_set: Path):
    first, second = str(make_demo_data(demo_set, **SMALL)).splitlines()
    assert first == (
        "products: 3 (plank, plate, terrazzo), each 7 images: 2 train, 1 test good, "
        "4 test with defects (1 each of chip, missing_part, scratch, stain)"
    )
    assert second.startswith("files: 35 (21 images, 12 masks, LICENSE.txt, README.md), ")
    assert second.endswith(" MB, complete already")


def test_interrupted_and_damaged_demo_data_are_made_whole(tmp_path: Path):
    out = tmp_path / "demo"
    small = {**SMALL, "products": ("plate",), "per_defect": 0}
    make_demo_data(out, **small)
    whole = files(out)
    (out / "demo.json").unlink()
    (out / "plate/test/good/000.png").unlink()
    (out / "plate/train/good/.000.png.tmp-1").write_bytes(b"half")
    (out / "plate/train/good/001.png").write_bytes(b"cut")
    make_demo_data(out, **small)
    assert files(out) == whole
    (out / "plate/train/good/001.png").write_bytes(b"flipped")
    make_demo_data(out, **small)
    assert files(out) == whole


def refused(out: Path, **changes: object) -> str:
    with pytest.raises(BuilderError) as error:
        make_demo_data(out, **{**SMALL, **changes})
    assert "\n" not in error.value.message
    return error.value.message


def test_demo_data_of_other_parameters_is_refused(demo_set: Path):
    assert refused(demo_set, seed=7) == (
        f"{demo_set}: holds a demo set with seed 0, asked for 7; "
        "delete the folder or name another one"
    )


def test_folder_with_other_content_is_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    assert refused(tmp_path) == (
        f"{tmp_path}: holds notes.txt, which is not part of the demo set; "
        "name an empty or new folder"
    )


def test_pictures_of_others_under_the_same_names_are_refused(tmp_path: Path):
    (tmp_path / "plank/train/good").mkdir(parents=True)
    (tmp_path / "plank/train/good/000.png").write_bytes(b"a photograph")
    assert "holds plank/train/good/000.png, which is not part" in refused(tmp_path)
    assert (tmp_path / "plank/train/good/000.png").read_bytes() == b"a photograph"


def test_file_instead_of_folder_is_refused(tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert (
        refused(tmp_path / "file")
        == f"{tmp_path / 'file'}: is a file; name a folder for the demo data"
    )


def test_parameters_out_of_range_are_refused(tmp_path: Path):
    assert refused(tmp_path, size_px=8) == "demo data: size_px must lie in [48, 1024], found 8"
    assert refused(tmp_path, train=0) == "demo data: train must lie in [1, 10000], found 0"
    assert refused(tmp_path, products=("cloth",)) == (
        "demo data: products must be some of plank, plate, terrazzo, each once; found cloth"
    )


def test_polygon_distance_of_a_square():
    square = np.array([[0.0, 0.0], [4.0, 0.0], [4.0, 4.0], [0.0, 4.0]])
    x, y = np.array([[2.0, 6.0, 1.0]]), np.array([[2.0, 2.0, 2.0]])
    np.testing.assert_allclose(polygon_distance(x, y, square), [[-2.0, 2.0, -1.0]])


def test_cells_are_those_of_the_nearest_seed():
    x, y = np.meshgrid(np.linspace(-30, 30, 40), np.linspace(-30, 30, 40))
    number, border, count = cells(stream("cells"), x, y, 12.0, jitter=0.0)
    # Without jitter the seeds are a lattice, the cells squares of 12 with borders at multiples.
    assert len(np.unique(number)) == 36
    assert number.max() < count
    expected = np.minimum(np.minimum(x % 12, 12 - x % 12), np.minimum(y % 12, 12 - y % 12))
    np.testing.assert_allclose(border, expected, atol=1e-4)
