"""The roll-up of licences."""

from __future__ import annotations

import pytest

from builder.errors import BuilderError
from builder.publish.licence import LICENCES, UNKNOWN, hub_licence, parse_licence, roll_up


@pytest.mark.parametrize(
    ("text", "spdx"),
    [
        ("CC0-1.0", "CC0-1.0"),
        ("cc0", "CC0-1.0"),
        ("CC BY-NC-SA 4.0", "CC-BY-NC-SA-4.0"),
        ("CC-BY-4.0", "CC-BY-4.0"),
        ("apache-2.0", "Apache-2.0"),
    ],
)
def test_licence_is_recognised_in_its_usual_spellings(text, spdx):
    assert parse_licence(text).spdx == spdx


@pytest.mark.parametrize("text", ["unknown", "", "CC BY", "CC-BY-5.0", "free for research"])
def test_licence_is_not_guessed(text):
    assert parse_licence(text) is None


@pytest.mark.parametrize(
    ("licences", "result"),
    [
        (["CC0-1.0"], "CC0-1.0"),
        (["CC0-1.0", "CC-BY-4.0"], "CC-BY-4.0"),
        (["CC-BY-4.0", "CC-BY-NC-4.0", "MIT"], "CC-BY-NC-4.0"),
        (["CC-BY-SA-3.0", "CC-BY-SA-4.0", "CC0-1.0"], "CC-BY-SA-4.0"),
        (["CC-BY-NC-4.0", "CC BY-NC-SA 4.0"], "CC-BY-NC-SA-4.0"),
        (["MIT", "Apache-2.0"], "Apache-2.0"),
    ],
)
def test_strictest_licence_wins(licences, result):
    assert roll_up({f"source {i}": text for i, text in enumerate(licences)}).spdx == result


@pytest.mark.parametrize("other", ["CC-BY-NC-SA-4.0", "CC-BY-NC-4.0"])
def test_incompatible_pair_is_named(other):
    expected = f"first is CC-BY-SA-4.0 and second is {other}: no one licence allows both"
    with pytest.raises(BuilderError, match=expected):
        roll_up({"first": "CC-BY-SA-4.0", "second": other}, i_know=True)


def test_unknown_licence_is_refused_by_source():
    expected = "mine: licence 'unknown' is not one whose terms are known here .*--i-know"
    with pytest.raises(BuilderError, match=expected):
        roll_up({"theirs": "CC0-1.0", "mine": "unknown"})
    assert roll_up({"theirs": "CC0-1.0", "mine": "unknown"}, i_know=True) == UNKNOWN


def test_licence_without_derivatives_is_refused_whatever_is_known():
    with pytest.raises(BuilderError, match="forbids publishing adaptations"):
        roll_up({"mine": "CC BY-NC-ND 4.0"}, i_know=True)


def test_hub_names_of_licences():
    assert hub_licence(parse_licence("CC-BY-SA-4.0")) == [("license", "cc-by-sa-4.0")]
    assert hub_licence(parse_licence("PDDL-1.0")) == [("license", "pddl")]
    assert hub_licence(UNKNOWN) == [("license", "unknown")]
    assert all(hub_licence(licence) for licence in LICENCES)
