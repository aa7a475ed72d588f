"""Figure 6 for print."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluator.panels import Panel
from evaluator.show import DPI, PAGE_INCH, write_figure6

SIZE = 24


def panel(category: str = "bolt", label: str = "crack/000.png", maps: int = 2, mask: bool = True):
    truth = np.zeros((SIZE, SIZE), np.bool_)
    truth[4:9, 5:12] = True
    levels = np.linspace(0, 255, SIZE * SIZE).reshape(SIZE, SIZE).astype(np.uint8)
    return Panel(
        category=category,
        image_index=0,
        label=label,
        image=np.full((SIZE, SIZE, 3), (10, 200, 30), np.uint8),
        mask=truth if mask else None,
        levels=[levels] * maps,
    )


def opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        picture.load()
    return picture


def test_figure_is_for_print_and_as_wide_as_a_page(tmp_path):
    write_figure6(tmp_path / "f.png", ["a", "b"], [panel(), panel("nut"), panel("nut")])
    picture = opened(tmp_path / "f.png")
    assert picture.info["dpi"] == pytest.approx((DPI, DPI), abs=0.1)
    assert picture.width / DPI <= PAGE_INCH[0] + 0.1
    assert picture.height / DPI <= PAGE_INCH[1]
    colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
    assert (10, 200, 30) in colours  # the photograph's own
    # The outline of the truth and the line at 1 %, as drawn in the key and the maps.
    pixels = np.asarray(picture.convert("RGB")).astype(int)
    cyan = (np.abs(pixels - (0x28, 0xD7, 0xE6)).max(-1) < 24).any(0)
    assert cyan[: picture.width // 2].sum() < cyan.sum()


def test_more_rows_than_a_page_holds_are_left_out_evenly(tmp_path):
    many = [panel(category, maps=1) for category in ("bolt", "nut") for _ in range(9)]
    write_figure6(tmp_path / "many.png", ["a"], many)
    write_figure6(tmp_path / "few.png", ["a"], many[6:12])  # three of each
    assert opened(tmp_path / "many.png").size == opened(tmp_path / "few.png").size
    each = [panel(f"category {i}", maps=0) for i in range(9)]
    write_figure6(tmp_path / "each.png", [], each)
    assert opened(tmp_path / "each.png").height / DPI > PAGE_INCH[1]  # none is left out


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["a $x_{ formula", "<b>&"], panel("$cost_{", "cr$ack/0$0.png")),
        (["名前", "\n"], panel("缺陷", "缺/陷.png")),
        (["long " * 30, "unbroken" * 20], panel("a very long name of a category " * 3, "d" * 90)),
        (["a", "b"], panel(mask=False)),
        (["a", "b"], panel(label="good/000.png", mask=False)),
        ([], panel(maps=0)),
        ([f"backbone {i}" for i in range(9)], panel(maps=9)),
    ],
)
def test_any_name_and_shape_is_drawn(tmp_path, names, shown):
    write_figure6(tmp_path / "f.png", names, [shown])
    assert opened(tmp_path / "f.png").height < 3 * DPI


def test_maps_without_the_line_are_drawn(tmp_path):
    flat = panel(maps=0)
    low = Panel(**{**flat.__dict__, "levels": [np.zeros((SIZE, SIZE), np.uint8)]})
    full = Panel(**{**low.__dict__, "mask": np.ones((SIZE, SIZE), np.bool_)})
    write_figure6(tmp_path / "f.png", ["a"], [low, full])
    assert opened(tmp_path / "f.png").width > DPI
