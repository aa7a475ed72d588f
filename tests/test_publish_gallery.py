"""The gallery in a real browser."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from builder.publish.gallery import MAX_BYTES
from tests.chromium import chromium, find_chromium
from tests.publishing import published_copy

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium on this machine: apt-get install chromium"
)


@pytest.fixture(scope="module")
def gallery(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = published_copy(dataset, tmp_path_factory.mktemp("gallery") / "small")
    return out / "gallery" / "index.html"


@pytest.fixture(scope="module")
def page(gallery: Path, tmp_path_factory: pytest.TempPathFactory):
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        opened.open(gallery.as_uri())
        yield opened


def test_page_is_one_small_file_that_asks_for_nothing(gallery, page):
    assert gallery.stat().st_size < MAX_BYTES
    assert [file.name for file in gallery.parent.iterdir()] == ["index.html"]
    assert page.errors == []


def test_every_sheet_shows_decoded_pictures(page):
    titles = page.run("[...document.querySelectorAll('h2')].map(e => e.textContent)")
    assert titles == [
        *("By s", "By mean sigma", "By change, grey levels", "Extremes", "Random"),
        *("On steel", "On wood"),
    ]
    widths = page.run("[...document.querySelectorAll('.sheet img')].map(e => e.naturalWidth)")
    assert len(widths) > 60
    assert set(widths) == {32}


def test_click_shows_normal_image_mask_and_vector(page):
    page.click(".sheet .column:nth-child(10) button")
    assert page.run("document.querySelector('dialog').open") is True
    widths = page.run(
        "['normal', 'anomaly', 'mask'].map(i => document.getElementById(i).naturalWidth)"
    )
    assert widths == [32, 32, 32]
    assert page.run("document.querySelectorAll('tbody tr').length") == 30
    shares = page.run(
        "[...document.querySelectorAll('tbody tr')].map(e => Number(e.lastChild.textContent))"
    )
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1, abs=0.02)
    seen = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB"))
    assert seen.std() > 10  # something is on the screen
    first = page.run("document.getElementById('key').textContent")
    assert first.startswith("Sample 0000000")
    page.press("ArrowRight")
    assert page.run("document.getElementById('key').textContent") != first
    page.click("#close")
    assert page.run("document.querySelector('dialog').open") is False
    assert page.errors == []


def test_browser_s_errors_would_be_noticed(page, tmp_path):
    faulty = tmp_path / "faulty.html"
    faulty.write_text("<script>nothing.here()</script><img src='http://127.0.0.1:9/x.png'>")
    page.open(faulty.as_uri())
    found = " ".join(page.errors)
    page.errors.clear()
    assert "nothing is not defined" in found
    assert "request to http://127.0.0.1:9/x.png" in found
