"""report.html: every number is report.json's, nothing of a file's name is markup, and it works."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluator import page_plots
from evaluator.page import page as page_of
from evaluator.page import write_page
from evaluator.page_numbers import pointer, probability, signed
from evaluator.page_panels import choose, disagreement, map_url, outline, palette
from evaluator.report import Report
from evaluator.table import markdown, paper_table
from tests.reports_by_hand import make_panels, make_report

HOSTILE = "</script><script>document.title='taken'</script>\"'><img src=x onerror=alert(1)>&amp;"


class Reader(HTMLParser):
    """Collects marked numbers (attributes, text), tags, and text that is in no marked number."""

    VOID = ("meta", "link", "img", "br", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.numbers: list[tuple[dict[str, str], str]] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.loose: list[str] = []
        self._open: list[tuple[str, dict[str, str]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        found = {key: value or "" for key, value in attrs}
        self.tags.append((tag, found))
        if tag not in self.VOID:
            self._open.append((tag, found))

    def handle_endtag(self, tag):
        assert self._open.pop()[0] == tag

    def handle_data(self, data):
        if not self._open:
            return
        if "data-value" in self._open[-1][1]:
            self.numbers.append((self._open[-1][1], data))
        elif not {"script", "style", "svg", "footer"} & {tag for tag, _ in self._open}:
            self.loose.append(data)


@pytest.fixture(scope="module")
def report() -> Report:
    return make_report(["bolt", "bottle", "cable", HOSTILE], ["ImageNet", HOSTILE + "2", "random"])


@pytest.fixture(scope="module")
def file(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(path, report, make_panels(report))
    return path


@pytest.fixture(scope="module")
def read(file: Path) -> Reader:
    return Reader(file.read_text(encoding="utf-8"))


def at(data: object, path: str) -> object:
    """What stands at a JSON pointer, as RFC 6901 says."""
    for part in path.split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        data = data[int(part)] if isinstance(data, list) else data[part]  # type: ignore[index]
    return data


def paper_at(place: str) -> float:
    category, column = place.split("/")
    return paper_table().values[category][paper_table().columns.index(column)]


def expected(data: object, marks: dict[str, str]) -> object:
    """The value of a marked number, worked out from report.json alone."""
    if "data-path" in marks:
        return at(data, marks["data-path"])
    if "data-place-of" in marks:
        _, scores, index, *_ = re.findall(r"[^/]+", marks["data-place-of"].replace("/images", ""))
        images = data["scores"][int(scores)]["images"]  # type: ignore[index]
        ranked = sorted((image["score"][0] for image in images), reverse=True)
        return 1 + ranked.index(images[int(index)]["score"][0])
    if "data-paper" in marks:
        return paper_at(marks["data-paper"])
    if "data-paper-mean-of" in marks:
        # A column's name may hold a space: the places are split at the categories.
        places = re.findall(r"\S+/.+?(?=$| [a-z_]+/)", marks["data-paper-mean-of"])
        return pytest.approx(np.mean([paper_at(place) for place in places]), abs=1e-12)
    key = "data-mean-of" if "data-mean-of" in marks else "data-spread-of"
    values = [at(data, path) for path in marks[key].split(" ")]
    value = np.mean(values) if key == "data-mean-of" else max(values) - min(values)
    return pytest.approx(value, abs=1e-12)


def check_numbers(data: object, numbers: list[tuple[dict[str, str], str]]) -> None:
    for marks, text in numbers:
        value = json.loads(marks["data-value"])
        assert value == expected(data, marks), marks
        shown = float(text.replace("−", "-").replace("< 0.001", "0.0005"))
        # One decimal of a percentage; a share in [0, 1] is shown in percent; scores: three digits.
        off = min(abs(shown - value), abs(shown - 100 * value))
        assert off <= 0.0500001 or abs(shown - value) < 0.005 * abs(value), (marks, text)


def test_every_number_is_the_one_in_report_json(report, read):
    assert len(read.numbers) > 1000
    check_numbers(json.loads(report.model_dump_json()), read.numbers)


@pytest.mark.parametrize(
    ("mark", "text"),
    [
        ('data-path="/seeds/1" data-value="2"', "2"),
        ('data-path="/seeds/1" data-value="1"', "1.1"),
        ('data-mean-of="/seeds/0 /seeds/1" data-value="0.6"', "0.6"),
        ('data-spread-of="/seeds/0 /seeds/1" data-value="0.5"', "0.5"),
        ('data-place-of="/scores/0/images/0/score/0" data-value="7"', "7"),
        ('data-paper="bottle/BTAD" data-value="98.1"', "98.1"),
    ],
)
def test_number_that_is_not_the_report_s_would_be_noticed(report, mark, text):
    wrong = Reader(f"<p><span {mark}>{text}</span></p>").numbers
    with pytest.raises(AssertionError):
        check_numbers(json.loads(report.model_dump_json()), wrong)


def test_no_number_with_a_decimal_stands_without_its_place(read):
    words = " ".join(text for text in read.loose if "outside the crop" not in text)
    # The ticks of the colour bar, and the level that p-values are held against.
    assert set(re.findall(r"\d+\.\d+", words)) <= {"0.1", "0.01", "0.05"}


def test_page_shows_the_whole_table_all_comparisons_and_all_scores(report, read):
    places = {marks.get("data-path") for marks, _ in read.numbers}
    members = {row.group for row in report.table if row.category != "mean"}
    single = {g for g in members if sum(c.group == g for c in report.categories) == 1}
    for index, row in enumerate(report.table):
        keys = ["mean", "sd", *(["low", "high"] if row.low is not None else [])]
        for key in keys:
            shown = pointer(("table", index, key)) in places
            assert shown == (row.category != "mean" or row.group not in single)
    for index in range(len(report.comparisons)):
        assert pointer(("comparisons", index, "p_holm")) in places
    for index, cell in enumerate(report.scores):
        for image in range(len(cell.images)):
            assert pointer(("scores", index, "images", image, "score", 0)) in places


def test_curves_are_drawn_where_their_values_say(report, read):
    data = json.loads(report.model_dump_json())
    drawn = [marks for tag, marks in read.tags if tag == "polyline"]
    assert len(drawn) == 4 * len(report.scores)  # ROC, PRO, two learning curves
    up = page_plots.HEIGHT - page_plots.TOP - page_plots.BOTTOM
    for marks in drawn:
        if marks["data-curve"].endswith(("tpr", "pro")):
            values = at(data, marks["data-curve"])[1:]  # the first is at FPR 0, no place on a log
            points = [float(point.split(",")[1]) for point in marks["points"].split()]
            found = [(page_plots.HEIGHT - page_plots.BOTTOM - y) / up for y in points]
            assert found == pytest.approx(values, abs=0.001)


def test_names_of_files_are_never_markup(file, read):
    text = file.read_text(encoding="utf-8")
    assert HOSTILE not in text
    assert "<img src=x" not in text
    assert [tag for tag, _ in read.tags].count("script") == 1
    assert {key for _, marks in read.tags for key in marks if key.startswith("on")} == set()
    assert any(HOSTILE in text for text in read.loose)


def test_page_asks_for_nothing(read):
    for tag, marks in read.tags:
        for key in ("src", "href"):
            assert marks.get(key, "#").startswith(("data:", "#")), (tag, marks)


@pytest.mark.parametrize(
    ("changes", "has", "has_not"),
    [
        ({"masks": False}, "no mask", "polyline class"),
        ({"backbones": 1}, "1 pre-training on", 'class="differences"'),
        ({"seeds": 1}, "(one seed)", 'class="sd"'),
        ({"categories": 1}, "on 1 category", '<td class="mean"'),
    ],
)
def test_page_of_less(changes, has, has_not):
    made = make_report(**{"categories": 2, "backbones": 2, "curve": False, **changes})
    text = page_of(made, make_panels(made, every=3))
    body = text[text.index("<body>") : text.index("<script>")]
    assert has in body
    assert has_not not in body
    Reader(text)


def test_page_without_bootstrap_marks_nothing_as_the_same():
    made = make_report(backbones=2)
    rows = [row.model_copy(update={"low": None, "high": None}) for row in made.table]
    text = page_of(made.model_copy(update={"table": rows, "comparisons": []}), [])
    assert "This metric was not resampled" in text
    assert 'class="sign"' not in text
    assert 'class="interval"' not in text


def test_best_is_bold_and_what_cannot_be_told_apart_is_marked():
    made = make_report(categories=1, backbones=3)
    means = {"ImageNet": 90.0, "BTAD direct": 80.0, "BTAD indirect": 89.0}
    rows = [row.model_copy(update={"mean": means[row.backbone]}) for row in made.table]
    pairs = [
        pair.model_copy(update={"distinct": "BTAD direct" in (pair.a, pair.b)})
        for pair in made.comparisons
    ]
    text = page_of(made.model_copy(update={"table": rows, "comparisons": pairs}), [])
    table = text.split('<table class="main')[1].split("</table>")[0]
    lines = [line for line in table.split("<tr>") if 'scope="row" data-sort' in line]
    assert [("<b>" in line, "≈" in line) for line in lines[:3]] == [
        (True, False),
        (False, False),
        (False, True),
    ]
    assert "Not told apart from it: BTAD indirect" in text


def test_first_of_equals_is_bold_and_the_others_are_marked_as_in_the_markdown():
    made = make_report(categories=1, backbones=2)
    rows = [row.model_copy(update={"mean": 100.0, "sd": None}) for row in made.table]
    pairs = [
        pair.model_copy(update={"difference": 0.0, "p_holm": 1.0, "distinct": False})
        for pair in made.comparisons
    ]
    for changes in ({"comparisons": pairs}, {"comparisons": []}):
        equal = made.model_copy(update={"table": rows, **changes})
        table = page_of(equal, []).split('<table class="main')[1].split("</table>")[0]
        lines = [line for line in table.split("<tr>") if 'scope="row" data-sort' in line]
        assert [("<b>" in line, "≈" in line) for line in lines] == [(True, False), (False, True)]
        line = next(line for line in markdown(equal).splitlines() if line.startswith("| bolt"))
        assert [cell.strip() for cell in line.split("|")[2:4]] == ["100.0", "100.0 ≈"]


def test_page_tells_what_limits_the_comparisons():
    made = make_report(categories=["bolt"], backbones=2)
    text = page_of(made, [])
    assert "Fewer than 10 test images of a kind: bolt (2 good, 4 defective)." in text
    assert "cannot tell anything apart" not in text
    few = made.model_copy(update={"bootstrap": made.bootstrap.model_copy(update={"draws": 20})})
    assert "20 draws cannot tell anything apart among 1 comparison;" in page_of(few, [])
    many = make_report(categories=["bolt"], backbones=2, images=30)
    assert 'class="note"' not in page_of(many, [])


def test_page_names_what_intervals_do_not_cover():
    text = page_of(make_report(), [])
    for words in (
        "another pre-training run",
        "other random dimensions",
        "other normal photographs to fit on",
        "other categories",
    ):
        assert words in text


def test_panels_where_backbones_disagree_most_come_first():
    made = make_report(categories=1, backbones=2, images=4)
    spreads = {0: None, 1: 0.1, 2: 0.4, 3: 0.2}
    cells = []
    for sign, cell in zip((0, 1), made.scores, strict=True):
        images = [
            image.model_copy(
                update={"pixel_auroc": None if spreads[i] is None else 0.5 + sign * spreads[i]}
            )
            for i, image in enumerate(cell.images)
        ]
        cells.append(cell.model_copy(update={"images": images}))
    changed = made.model_copy(update={"scores": cells})
    [chosen] = choose(changed, make_panels(changed)).values()
    assert [panel.image_index for panel in chosen] == [2, 3, 1, 0]


def test_disagreement_without_masks_is_of_places():
    made = make_report(categories=1, backbones=2, images=3, masks=False)
    cells = [
        cell.model_copy(
            update={
                "images": [
                    image.model_copy(update={"score": [score]})
                    for image, score in zip(cell.images, scores, strict=True)
                ]
            }
        )
        for cell, scores in zip(made.scores, ([1.0, 2.0, 3.0], [300.0, 200.0, 250.0]), strict=True)
    ]
    # Places 0, 1/2, 1 against 1, 0, 1/2.
    assert [disagreement(cells, i) for i in range(3)] == [(False, 1.0), (False, 0.5), (False, 0.5)]


def test_number_of_panels_is_bounded_and_told():
    made = make_report(categories=1, backbones=1, images=30, curve=False)
    text = page_of(made, make_panels(made))
    assert text.count('class="row panel"') == 20
    assert "20 of 30 test images; 10 left out" in text


def test_outline_runs_along_the_pixels_edges():
    mask = np.zeros((4, 5), np.bool_)
    mask[1:3, 0:2] = True  # touches the left border
    found = outline(mask, 0.5)
    assert found.startswith("M")
    assert found.endswith("z")
    numbers = [float(n) for n in re.findall(r"-?[\d.]+", found)]
    places = np.cumsum(np.reshape(numbers, (-1, 2)), axis=0)
    # Half-way between the middles of the pixels inside and outside: columns 0..2, rows 1..3.
    assert (places.min(0).tolist(), places.max(0).tolist()) == ([0.0, 1.0], [2.0, 3.0])
    assert outline(np.zeros((4, 4)), 0.5) == ""


def test_map_keeps_levels_to_a_sixteenth_of_a_decade():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    picture = Image.open(io.BytesIO(base64.b64decode(map_url(levels).split(",")[1])))
    shown = np.asarray(picture.convert("RGB"))
    for level, colour in enumerate(shown.reshape(-1, 3)):
        assert (palette()[max(0, level - 2) : level + 3] == colour).all(1).any()


def test_forms_of_numbers():
    assert (signed(0.04), signed(-0.04), signed(1.25), signed(-3)) == ("0.0", "0.0", "+1.2", "−3.0")
    assert (probability(0.0004), probability(0.0316)) == ("< 0.001", "0.032")
    assert pointer(("a/b", 0, "c~d")) == "/a~1b/0/c~0d"
