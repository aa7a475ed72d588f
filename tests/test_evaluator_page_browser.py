"""report.html in a real browser."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from evaluator.page import write_page
from evaluator.report import Report
from tests.chromium import chromium, find_chromium
from tests.reports_by_hand import PANEL_SIZE, make_panels, make_report

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium on this machine: apt-get install chromium"
)
HOSTILE = "</script><script>document.title='taken'</script>\"'><img src=x onerror=alert(1)>"
MEANS = "[...document.querySelectorAll('.metric:not([hidden]) .main tbody:not(.others) tr')]"
COLUMN = ".metric:not([hidden]) .main th[data-column='1']"


@pytest.fixture(scope="module")
def report() -> Report:
    return make_report(["bolt", "bottle", "cable", HOSTILE], ["ImageNet", HOSTILE, "random"])


@pytest.fixture(scope="module")
def tab(report: Report, tmp_path_factory: pytest.TempPathFactory):
    file = tmp_path_factory.mktemp("page") / "report.html"
    write_page(file, report, make_panels(report))
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        opened.open(file.as_uri())
        yield opened


def test_all_pictures_load_and_nothing_is_asked_for(tab, report):
    tab.run("document.querySelectorAll('img').forEach(e => { e.loading = 'eager'; })")
    tab.run("Promise.all([...document.images].map(e => e.decode()))")
    widths = tab.run("[...document.images].map(e => e.complete ? e.naturalWidth : 0)")
    images = sum(len(record.images) for record in report.categories)
    assert widths == [PANEL_SIZE] * images * (len(report.backbones) + 1)
    assert tab.errors == []
    assert "taken" not in tab.run("document.title")


def test_click_on_a_head_sorts_both_ways(tab):
    values = f"{MEANS}.map(e => Number(e.cells[1].dataset.sort))"
    before = tab.run(values)
    tab.click(f"{COLUMN} button")
    assert tab.run(values) == sorted(before, reverse=True)
    assert tab.run(f'document.querySelector("{COLUMN}").ariaSort') == "descending"
    tab.click(f"{COLUMN} button")
    assert tab.run(values) == sorted(before)
    assert tab.run(f'document.querySelector("{COLUMN}").ariaSort') == "ascending"
    names = f"{MEANS}.map(e => e.cells[0].dataset.sort)"
    tab.click(".metric:not([hidden]) .main th[data-column='0'] button")
    assert tab.run(names) == tab.run(f"{names}.sort((a, b) => a.localeCompare(b))")
    assert tab.run(f'document.querySelector("{COLUMN}").ariaSort') == "none"
    assert tab.run("document.activeElement.tagName") == "BUTTON"  # the keyboard gets there too


def test_metric_is_chosen(tab):
    tab.run(
        "(() => { const e = document.getElementById('metric'); e.value = 'image_auroc';"
        "e.dispatchEvent(new Event('change')); })()"
    )
    shown = tab.run(
        "[...document.querySelectorAll('.metric')].filter(e => e.offsetParent)"
        ".map(e => e.dataset.metric)"
    )
    assert shown == ["image_auroc"]


def test_filters_leave_what_was_chosen(tab):
    chosen = (
        "(() => { for (const [id, value] of [['category', %s], ['defect', %s]]) {"
        "const e = document.getElementById(id); e.value = value;"
        "e.dispatchEvent(new Event('change')); }"
        "return [document.getElementById('count').textContent,"
        "[...document.querySelectorAll('.category')].filter(e => e.offsetParent).length]; })()"
    )
    assert tab.run(chosen % ("'c1'", "'hole'")) == ["2 images", 1]
    assert tab.run(chosen % ("''", "'good'")) == ["8 images", 4]
    assert tab.run(chosen % ("''", "''")) == ["24 images", 4]


def test_picture_is_enlarged_and_left_with_its_neighbours(tab):
    tab.click(".panel:nth-of-type(1) figure:nth-child(3) .frame")
    assert tab.run("document.querySelector('dialog').open") is True
    first = tab.run("document.querySelector('dialog img').src")
    tab.press("ArrowRight")
    assert tab.run("document.querySelector('dialog img').src") != first
    tab.click("dialog figcaption")
    assert tab.run("document.querySelector('dialog').open") is False
    assert tab.errors == []


def test_wide_table_scrolls_in_its_own_frame(tab, tmp_path):
    made = make_report(15, 4, seeds=5, images=3)
    write_page(tmp_path / "wide.html", made, make_panels(made, every=3))
    tab.open((tmp_path / "wide.html").as_uri(), width=900)
    page = "document.documentElement"
    assert tab.run(f"{page}.scrollWidth <= {page}.clientWidth") is True
    frame = "document.querySelector('.metric .scroll')"
    assert tab.run(f"{frame}.scrollWidth > {frame}.clientWidth") is True
    seen = np.asarray(Image.open(io.BytesIO(tab.screenshot())).convert("RGB"))
    assert seen.std() > 10  # something is on the screen
    assert tab.errors == []
