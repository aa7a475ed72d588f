"""Cached features: computed once, equal to the network's, never trusted when damaged."""

import re
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, safe_open
from torch import nn

from evaluator.errors import EvaluatorError
from evaluator.features import FeatureCache, feature_kind
from evaluator.networks import Network
from evaluator.protocols import changed
from tests.evaluator_features import (
    CPU,
    FILE_BYTES,
    PROTOCOL,
    SHAPES,
    WEIGHTS,
    make_network,
    photographs,
    pixels,
    read_all,
    stored,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache", 2**30)


@pytest.fixture
def images(tmp_path: Path) -> list[tuple[Path, str]]:
    return photographs(tmp_path / "photographs")


def test_features_are_the_networks(cache, images):
    network = make_network()
    expected = network.extractor(
        torch.from_numpy(pixels(images)).permute(0, 3, 1, 2).float() / 255 * 2 - 1
    )
    fine, coarse = read_all(cache, network, images)
    assert fine.shape == (3, 8, 8, 5)
    assert coarse.shape == (3, 4, 4, 7)
    for found, layer in ((fine, "fine"), (coarse, "coarse")):
        wanted = expected[layer].permute(0, 2, 3, 1).detach().numpy()
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_rows_are_a_part_of_the_layer(cache, images):
    with cache.features(
        make_network(), WEIGHTS, "tiny", images, PROTOCOL, "float32", 2, lambda n: None
    ) as features:
        fine = features.layers[0]
        assert (fine.images, fine.channels, fine.height, fine.width) == (3, 5, 8, 8)
        np.testing.assert_array_equal(fine.read(3, 5), fine.read(0, 8)[:, 3:5])
        assert fine.read(7, 8).dtype == np.float32


def test_second_run_asks_the_network_nothing(cache, images):
    first = read_all(cache, make_network(), images)
    network, heard = make_network(), []
    again = read_all(cache, network, images, on_images=heard.append)
    assert network.extractor.seen == 0
    assert sum(heard) == 3
    assert cache.statistics.found == cache.statistics.computed == 3
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_only_missing_photographs_are_computed(cache, images):
    read_all(cache, make_network(), images[:2])
    network = make_network()
    read_all(cache, network, images)
    assert network.extractor.seen == 1


def test_equal_photographs_are_computed_once(cache, images):
    path, digest = images[0]
    copy = path.with_name("copy.png")
    copy.write_bytes(path.read_bytes())
    network, heard = make_network(), []
    fine, _ = read_all(cache, network, [*images, (copy, digest)], on_images=heard.append)
    assert network.extractor.seen == 3
    assert sum(heard) == 4
    np.testing.assert_array_equal(fine[3], fine[0])


def test_order_is_the_one_asked_for(cache, images):
    forward, _ = read_all(cache, make_network(), images)
    backward, _ = read_all(cache, make_network(), images[::-1])
    np.testing.assert_array_equal(backward, forward[::-1])


def test_float16_rounds_to_the_nearest(cache, images):
    exact, _ = read_all(cache, make_network(), images)
    rounded, _ = read_all(cache, make_network(), images, dtype="float16")
    assert rounded.dtype == np.float32
    np.testing.assert_array_equal(rounded, exact.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize(
    "change",
    [
        lambda kind: kind(weights="1" * 64),
        lambda kind: kind(arch="other"),
        lambda kind: kind(dtype="float16"),
        lambda kind: kind(protocol=changed(PROTOCOL, resize_px=17)),
        lambda kind: kind(protocol=changed(PROTOCOL, crop_px=15)),
        lambda kind: kind(protocol=changed(PROTOCOL, interpolation="bilinear")),
        lambda kind: kind(mean=(0.5, 0.5, 0.4)),
        lambda kind: kind(std=(0.5, 0.5, 0.4)),
        lambda kind: kind(layers=("fine", "other")),
    ],
)
def test_whatever_changes_the_values_has_a_folder_of_its_own(change):
    def kind(
        weights=WEIGHTS,
        arch="tiny",
        dtype="float32",
        protocol=PROTOCOL,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        layers=("fine", "coarse"),
    ):
        network = Network("any name", nn.Identity(), layers, SHAPES, mean, std, CPU)
        return feature_kind(network, weights, arch, protocol, dtype).name

    assert re.fullmatch("[0-9a-f]{64}", kind())
    assert change(kind) != kind()


def test_blur_and_epsilon_share_the_features():
    network = make_network()
    names = {
        feature_kind(network, WEIGHTS, "tiny", protocol, "float32").name
        for protocol in (PROTOCOL, changed(PROTOCOL, blur_sigma_px=2.0, epsilon=0.1))
    }
    assert len(names) == 1


def test_file_is_a_safetensors_file_that_describes_itself(cache, images):
    fine, coarse = read_all(cache, make_network(), images[:1])
    (path,) = stored(cache.folder)
    assert path.stat().st_size == FILE_BYTES
    tensors = load_file(path)
    np.testing.assert_array_equal(tensors["fine"], fine[0])
    np.testing.assert_array_equal(tensors["coarse"], coarse[0])
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    assert metadata["format"] == "semiformula-features"
    assert metadata["format_version"] == "1"
    assert metadata["image_sha256"] == images[0][1]
    assert sha256(metadata["description"].encode()).hexdigest() == path.parent.name


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:100],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:5000] + bytes([data[5000] ^ 1]) + data[5001:],
        lambda data: data.replace(b'"format_version":"1"', b'"format_version":"2"'),
        lambda data: data[:4095] + b"\n" + data[4096:],
        lambda data: bytes(len(data)),
    ],
)
def test_damaged_file_is_computed_again(cache, images, damage):
    before = read_all(cache, make_network(), images)
    path = stored(cache.folder)[1]
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    network = make_network()
    after = read_all(cache, network, images)
    assert network.extractor.seen == 1
    assert cache.statistics.damaged == 1
    assert cache.summary() == (
        "features of 4 photographs computed (1 of them because their file was damaged), "
        f"of 2 found; 0.00 GiB kept in {cache.folder}"
    )
    np.testing.assert_allclose(after[0], before[0], atol=1e-6)
    assert len(path.read_bytes()) == len(whole)


def test_another_photographs_file_is_not_taken(cache, images):
    read_all(cache, make_network(), images)
    first, second, _ = stored(cache.folder)
    second.write_bytes(first.read_bytes())
    network = make_network()
    read_all(cache, network, images)
    assert network.extractor.seen == 1


def test_photograph_that_changed_since_it_was_hashed_is_refused(cache, images):
    path, _ = images[1]
    Image.new("RGB", (20, 20)).save(path)
    with pytest.raises(EvaluatorError, match=re.escape(f"{path}: changed since it was checked")):
        read_all(cache, make_network(), images)


def test_features_that_are_not_finite_name_the_photograph(cache, images):
    with pytest.raises(EvaluatorError, match=r"'tiny': features of .*0\.png are not finite"):
        read_all(cache, make_network(float("nan")), images)
    assert stored(cache.folder) == []


def test_features_too_large_for_float16_are_refused(cache, images):
    large = make_network(1e6)
    with pytest.raises(EvaluatorError, match=r"0\.png are .* beyond float16's 65504; choose"):
        read_all(cache, large, images, dtype="float16")
    assert np.abs(read_all(cache, large, images)[0]).max() > 65504
