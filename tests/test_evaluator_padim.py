"""PaDiM's arithmetic against the slow version, and its edges."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from evaluator.errors import EvaluatorError
from evaluator.gaussians import repeated_index
from evaluator.padim import Scored, anomaly_maps, draw_dims, score
from evaluator.plan import Plan
from evaluator.protocols import PROTOCOLS, Protocol, changed
from tests import naive
from tests.array_layers import ArrayLayer

CPU = torch.device("cpu")
PAPER = PROTOCOLS["paper"]
FORMS = ["dual", "primal"]
NESTED = ((8, 8), (4, 4), (2, 2))
TEST = 4


def made_up(seed: int, images: int, grids, channels=(4, 5, 6)) -> list[np.ndarray]:
    """Layers [images, channels, rows, columns] that depend on one another, as a network's do.

    The spread of the channels differs by a thousand.
    """
    rng = np.random.default_rng(seed)
    causes = rng.normal(size=(images, 3, 1, 1))
    layers = []
    for count, grid in zip(channels, grids, strict=True):
        mixed = np.tensordot(rng.normal(size=(count, 3)), causes, (1, 1)).transpose(1, 0, 2, 3)
        noise = rng.normal(3, 0.3, (images, count, *grid))
        spread = rng.uniform(0.01, 10, (1, count, 1, 1))
        layers.append(((mixed + noise) * spread).astype(np.float32))
    return layers


def scored(
    features: list[np.ndarray],
    dims: list[list[int]],
    train: int,
    form: str,
    epsilon: float = 0.01,
    tile_rows: int = 4,
    workers: int = 1,
    split_seeds: int = 0,
) -> Scored:
    """The first `train` images fitted on, the others scored."""
    layers = [ArrayLayer(np.ascontiguousarray(f.transpose(0, 2, 3, 1))) for f in features]
    images = range(len(features[0]))
    plan = Plan(form, tile_rows, workers, 0, 0)
    return score(layers, dims, images[:train], images[train:], epsilon, plan, CPU, split_seeds)


def assert_as_naive(features, dims, train, form, epsilon=0.01, **options) -> None:
    found = scored(features, [dims], train, form, epsilon, split_seeds=1, **options)
    expected = naive.padim_distances(features, dims, train, epsilon)
    np.testing.assert_allclose(found.distance[0], expected, rtol=1e-4)
    assert (found.shares >= 0).all()
    np.testing.assert_allclose(found.shares[0].sum(0), expected**2, rtol=2e-4)
    whole = scored(features, [dims], train, form, epsilon, **options)  # without the split
    np.testing.assert_allclose(whole.distance[0], expected, rtol=1e-4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("train", [2, 5, 7, 8, 20])  # fewer images than dimensions, as many, more
def test_distances_equal_the_slow_version(form, train):
    assert_as_naive(made_up(0, train + TEST, NESTED), [0, 3, 4, 7, 9, 10, 14], train, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "grids",
    [
        ((9, 9), (5, 5), (2, 2)),  # 75, 38 and 19 in small: 9 = 2 x 5 - 1
        ((7, 5), (4, 3), (3, 2)),
        ((5, 5), (5, 5), (3, 3)),
        ((4, 5), (8, 2), (3, 3)),  # the second layer has more rows than the grid
        ((6, 6), (1, 1), (6, 6)),
    ],
)
@pytest.mark.parametrize("tile_rows", [2, 9])
def test_grids_that_do_not_nest(form, grids, tile_rows):
    features = made_up(1, 6 + TEST, grids)
    assert_as_naive(features, [0, 2, 3, 4, 8, 9, 11, 12, 14], 6, form, tile_rows=tile_rows)


@pytest.mark.parametrize("form", FORMS)
def test_constant_channels(form):
    features = made_up(2, 9, NESTED)
    features[0][:, 1] = 7
    features[2][:, :] = 0
    assert_as_naive(features, list(range(15)), 5, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("train", [3, 6, 30])
def test_variances_a_million_times_epsilon(form, train):
    features = [f / f.std() * 100 for f in made_up(3, train + TEST, NESTED)]
    assert_as_naive(features, list(range(0, 15, 2)), train, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("train", [2, 6, 30])
def test_images_that_were_fitted_on(form, train):
    features = made_up(4, train, NESTED)
    copied = [np.concatenate((f, f[:2])) for f in features]
    assert_as_naive(copied, list(range(15)), train, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("train", [4, 12])
def test_one_layer(form, train):
    features = made_up(5, train + TEST, ((5, 4),), channels=(8,))
    assert_as_naive(features, [0, 1, 2, 4, 6, 7], train, form)
    assert_as_naive(features, [3], train, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dims", [[2], [6], [13], [0, 12]])
def test_layers_without_a_chosen_channel(form, dims):
    assert_as_naive(made_up(6, 9, NESTED), dims, 5, form)


@pytest.mark.parametrize("form", FORMS)
def test_split_is_the_layer_given_the_coarser_ones(form):
    features = made_up(7, 9, NESTED)
    found = scored(features, [list(range(15))], 5, form, split_seeds=1)
    upper = [np.repeat(np.repeat(f, 8 // f.shape[2], 2), 8 // f.shape[3], 3) for f in features]
    coarsest = naive.padim_distances(upper[2:], list(range(6)), 5, 0.01) ** 2
    two = naive.padim_distances(upper[1:], list(range(11)), 5, 0.01) ** 2
    three = naive.padim_distances(upper, list(range(15)), 5, 0.01) ** 2
    expected = np.stack((three - two, two - coarsest, coarsest))
    np.testing.assert_allclose(found.shares[0], expected, rtol=1e-4, atol=1e-4 * three.max())


@pytest.mark.parametrize("form", FORMS)
def test_seeds_tiles_and_workers_change_nothing(form):
    features = made_up(8, 12, NESTED)
    dims = [[1, 5, 11], [0, 2, 4, 6, 8, 10], [3]]
    whole = scored(features, dims, 8, form)
    other = scored(features, dims, 8, form, tile_rows=3, workers=3, split_seeds=2)
    np.testing.assert_allclose(other.distance, whole.distance, rtol=1e-6)
    for seed, own in enumerate(dims):
        alone = scored(features, [own], 8, form)
        np.testing.assert_array_equal(alone.distance[0], whole.distance[seed])
    assert other.shares.shape == (2, 3, 4, 8, 8)


def test_chosen_images_in_any_order():
    features = made_up(9, 10, NESTED)
    train, test = [7, 1, 4, 2, 8], [3, 0]
    layers = [ArrayLayer(f.transpose(0, 2, 3, 1)) for f in features]
    plan = Plan("dual", 4, 1, 0, 0)
    found = score(layers, [[0, 5, 9, 12]], train, test, 0.01, plan, CPU).distance[0]
    ordered = [f[train + test] for f in features]
    np.testing.assert_allclose(
        found, naive.padim_distances(ordered, [0, 5, 9, 12], 5, 0.01), rtol=1e-4
    )


def test_tiles_are_reported():
    heard = []
    layers = [ArrayLayer(f.transpose(0, 2, 3, 1)) for f in made_up(10, 6, NESTED)]
    plan = Plan("primal", 3, 2, 0, 0)
    score(layers, [[0]], range(4), [4, 5], 0.01, plan, CPU, on_tile=lambda *n: heard.append(n))
    assert heard == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("form", FORMS)
def test_distance_of_a_known_gaussian(form):
    # Train 0 and 2: mean 1, variance 2; with epsilon 0.01 the test value 4 lies 3 / sqrt(2.01) off.
    values = np.array([0.0, 2.0, 4.0], np.float32).reshape(3, 1, 1, 1)
    found = scored([values], [[0]], 2, form).distance
    np.testing.assert_allclose(found, [[[[3 / np.sqrt(2.01)]]]], rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_covariance_that_is_not_positive_definite_is_one_line(form):
    values = np.full((3, 2, 1, 1), 1e18, np.float32) * np.array([1, 2, 3]).reshape(3, 1, 1, 1)
    with pytest.raises(EvaluatorError, match="raise it"):
        scored([values.astype(np.float32)], [[0, 1]], 2, form, 1e-6)


def of_variance(total: float, train: int) -> list[np.ndarray]:
    """30 channels in two layers, whose variances over the first images sum to `total`; two copies.

    Images that were fitted on cancel most.
    """
    values = np.random.default_rng(12).normal(size=(train, 30, 1, 1))
    values *= np.sqrt(total / values.var(axis=0, ddof=1).sum())
    copied = np.concatenate((values, values[:2])).astype(np.float32)
    return [copied[:, :12], copied[:, 12:]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("train", [5, 20, 60])
def test_variances_up_to_the_most_allowed(form, train):
    assert_as_naive(of_variance(0.9e11 * 0.01, train), list(range(30)), train, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("train", [5, 20, 60])
def test_variances_beyond_the_most_allowed_are_one_line(form, train):
    expected = r"variances of the features sum to 2\.\de\+09 .*epsilon 0\.01 .*; raise --epsilon"
    with pytest.raises(EvaluatorError, match=expected) as caught:
        scored(of_variance(2.1e11 * 0.01, train), [list(range(30))], train, form)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("image", [1, 7])  # fitted on, scored
def test_features_that_are_not_numbers_are_one_line(form, image):
    features = made_up(11, 8, NESTED)
    features[0][image, 2, 3, 3] = np.nan
    with pytest.raises(EvaluatorError, match="features are not finite"):
        scored(features, [list(range(15))], 5, form)


def test_distances_leave_the_thread_count_alone():
    before = torch.get_num_threads()
    scored(made_up(2, 12, NESTED), [[0, 5]], 9, "primal", workers=2)
    assert torch.get_num_threads() == before


def test_coarse_grids_are_repeated_by_nearest():
    assert repeated_index(6, 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert repeated_index(5, 3).tolist() == [0, 0, 1, 1, 2]


def test_dims_are_the_smallest_words_of_philox():
    words = np.random.Philox(key=7).random_raw(20).tolist()
    expected = sorted(sorted(range(20), key=words.__getitem__)[:6])
    assert draw_dims(20, 6, seed=7) == expected


def test_dims_stay_what_they_were():
    assert draw_dims(448, 100, seed=0)[:8] == [0, 1, 2, 9, 11, 17, 20, 21]
    assert draw_dims(448, 100, seed=1)[:8] == [2, 3, 5, 9, 23, 24, 26, 27]


def sized(size_px: int, **changes) -> Protocol:
    return changed(PAPER, resize_px=size_px, crop_px=0, **changes)


def test_maps_of_a_constant_grid_are_constant():
    maps = anomaly_maps(np.full((2, 3, 4, 4), 2.5, np.float32), sized(32))
    np.testing.assert_allclose(maps, np.full((2, 3, 32, 32), 2.5), rtol=1e-6)


def test_maps_are_upsampled_with_half_pixel_centres():
    maps = anomaly_maps(np.array([[[0, 4], [0, 4]]], np.float32), sized(16, blur_sigma_px=0))
    slope = [0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3.25, 3.75]
    np.testing.assert_allclose(maps[0], [[0] * 4 + slope + [4] * 4] * 16)


@pytest.mark.parametrize("grid", [(14, 14), (19, 7), (1, 1), (80, 80)])
def test_maps_without_blur_equal_torch(grid):
    distance = np.random.default_rng(1).random((2, *grid), dtype=np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(distance)[:, None].double(), (56, 56), mode="bilinear"
    )[:, 0]
    maps = anomaly_maps(distance, sized(56, blur_sigma_px=0))
    np.testing.assert_allclose(maps, expected, rtol=1e-6)


@pytest.mark.parametrize("border", ["reflect", "mirror"])
@pytest.mark.parametrize(("size_px", "sigma"), [(56, 4.0), (16, 9.0), (40, 1.3)])
def test_blur_equals_scipy(border, size_px, sigma):
    distance = np.random.default_rng(2).random((2, 8, 8), dtype=np.float32)
    sharp = anomaly_maps(distance, sized(size_px, blur_sigma_px=0))
    maps = anomaly_maps(distance, sized(size_px, blur_sigma_px=sigma, blur_border=border))
    for blurred, grid in zip(maps, sharp, strict=True):
        expected = gaussian_filter(grid.astype(float), sigma, mode=border)
        np.testing.assert_allclose(blurred, expected, rtol=1e-6)


def test_blur_ends_at_the_radius_of_the_protocol():
    spot = np.zeros((1, 64, 64), np.float32)
    spot[0, 32, 32] = 1
    maps = anomaly_maps(spot, sized(64, blur_radius_px=3))
    assert np.flatnonzero(maps[0, 32]).tolist() == list(range(29, 36))
