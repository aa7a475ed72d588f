"""Named protocols: what they fix, and the hash that tells them apart."""

import re

import pytest
from pydantic import ValidationError

from evaluator.protocols import PROTOCOLS, Protocol, changed, protocol_sha256

PAPER = PROTOCOLS["paper"]


def test_paper_is_the_paper_and_its_reimplementation():
    assert PAPER.model_dump() == {
        "name": "paper",
        "resize_px": 256,
        "crop_px": 224,
        "interpolation": "lanczos",
        "mask_rule": "nonzero-nearest",
        "upsampling": "bilinear",
        "blur_sigma_px": 4.0,
        "blur_border": "reflect",
        "blur_radius_px": 0,
        "epsilon": 0.01,
    }


def test_anomalib_differs_where_its_code_does():
    found, paper = PROTOCOLS["anomalib"].model_dump(), PAPER.model_dump()
    assert {key: value for key, value in found.items() if value != paper[key]} == {
        "name": "anomalib",
        "crop_px": 0,
        "interpolation": "bilinear",
        "mask_rule": "nonzero-nearest-corner",
        "blur_border": "mirror",
        "epsilon": 0.01001,
    }


def test_full_is_the_paper_without_crop():
    assert PROTOCOLS["full"] == PAPER.model_copy(update={"name": "full", "crop_px": 0})


@pytest.mark.parametrize(("name", "size_px"), [("paper", 224), ("anomalib", 256), ("full", 256)])
def test_scored_pixels(name, size_px):
    assert PROTOCOLS[name].name == name
    assert PROTOCOLS[name].size_px == size_px


def test_hash_ignores_the_name_alone():
    digest = protocol_sha256(PAPER)
    assert re.fullmatch("[0-9a-f]{64}", digest)
    assert protocol_sha256(PAPER.model_copy(update={"name": "same"})) == digest
    assert len({protocol_sha256(protocol) for protocol in PROTOCOLS.values()}) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"resize_px": 257},
        {"crop_px": 223},
        {"interpolation": "bicubic"},
        {"mask_rule": "nonzero-nearest-corner"},
        {"blur_sigma_px": 3.0},
        {"blur_border": "mirror"},
        {"blur_radius_px": 15},
        {"epsilon": 0.02},
    ],
)
def test_every_setting_changes_the_hash_and_the_name(change):
    other = changed(PAPER, **change)
    assert other.name == "own"
    assert protocol_sha256(other) != protocol_sha256(PAPER)


def test_change_to_the_same_value_keeps_the_name():
    assert changed(PAPER, crop_px=224, epsilon=None) is PAPER


@pytest.mark.parametrize(
    "change",
    [
        {"resize_px": 15},
        {"crop_px": -1},
        {"interpolation": "nearest"},
        {"epsilon": 0.0},
        {"epsilon": float("nan")},
        {"surplus": 1},
    ],
)
def test_impossible_setting_is_refused(change):
    with pytest.raises(ValidationError):
        Protocol.model_validate(PAPER.model_dump() | change)


def test_crop_that_is_larger_than_the_photograph_is_refused():
    with pytest.raises(ValidationError, match="crop_px 257 is more than resize_px 256"):
        Protocol.model_validate(PAPER.model_dump() | {"crop_px": 257})
