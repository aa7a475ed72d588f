"""PaDiM's arithmetic against the slow version, and its edges."""

import numpy as np
import pytest
import torch

from evaluator.errors import EvaluatorError
from evaluator.padim import (
    LayerFeatures,
    anomaly_maps,
    distance_tiles,
    draw_dims,
    plan_tiles,
    repeated_index,
)
from tests import naive

CPU = torch.device("cpu")


def layer_of(features: np.ndarray) -> LayerFeatures:
    """[images, channels, rows, columns] -> [positions, images, channels]."""
    images, channels, rows, columns = features.shape
    values = features.reshape(images, channels, -1).transpose(2, 0, 1)
    return LayerFeatures(rows, columns, np.ascontiguousarray(values))


def made_up_layers(seed: int, grids: tuple[tuple[int, int], ...]) -> list[np.ndarray]:
    """Three layers of 14 images whose channels differ in spread by a thousand."""
    rng = np.random.default_rng(seed)
    return [
        (
            rng.normal(3, 1, (14, channels, *grid)) * rng.uniform(0.01, 10, (1, channels, 1, 1))
        ).astype(np.float32)
        for channels, grid in zip((4, 5, 6), grids, strict=True)
    ]


def distances(
    features: list[np.ndarray], dims: list[int], train: int, tile: int, workers: int = 1
) -> np.ndarray:
    layers = [layer_of(f) for f in features]
    rows, columns = features[0].shape[2:]
    found = np.empty((14 - train, rows * columns), np.float32)
    for positions, values in distance_tiles(layers, dims, train, 0.01, tile, workers, CPU):
        found[:, positions] = values.T
    return found.reshape(-1, rows, columns)


@pytest.mark.parametrize("grids", [((8, 8), (4, 4), (2, 2)), ((7, 5), (4, 3), (2, 2))])
@pytest.mark.parametrize("train", [10, 5])  # more and fewer images than dimensions
def test_distances_equal_the_slow_version(grids, train):
    features = made_up_layers(0, grids)
    dims = [0, 3, 4, 7, 9, 10, 14]
    expected = naive.padim_distances(features, dims, train, 0.01)
    np.testing.assert_allclose(distances(features, dims, train, 6), expected, rtol=1e-5)


def test_distances_do_not_depend_on_tiles_and_workers():
    features = made_up_layers(1, ((8, 8), (4, 4), (2, 2)))
    dims = [1, 5, 11]
    whole = distances(features, dims, 9, 64)
    np.testing.assert_array_equal(distances(features, dims, 9, 1), whole)
    np.testing.assert_array_equal(distances(features, dims, 9, 5, workers=3), whole)


def test_distance_of_a_known_gaussian():
    # Train 0 and 2: mean 1, variance 2; with epsilon 0.01 the test value 4 lies 3 / sqrt(2.01) off.
    values = np.array([[[0.0], [2.0], [4.0]]], np.float32)
    ((_, found),) = distance_tiles([LayerFeatures(1, 1, values)], [0], 2, 0.01, 1, 1, CPU)
    np.testing.assert_allclose(found, [[3 / np.sqrt(2.01)]], rtol=1e-6)


def test_covariance_that_is_not_positive_definite_is_one_line():
    values = np.full((1, 3, 2), 1e18, np.float32) * np.array([[[1], [2], [3]]], np.float32)
    with pytest.raises(EvaluatorError, match="raise it"):
        list(distance_tiles([LayerFeatures(1, 1, values)], [0, 1], 2, 1e-6, 1, 1, CPU))


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


def test_maps_of_a_constant_grid_are_constant():
    maps = anomaly_maps(np.full((2, 4, 4), 2.5, np.float32), 32, 4.0)
    np.testing.assert_allclose(maps, np.full((2, 32, 32), 2.5), rtol=1e-6)


def test_maps_are_upsampled_with_half_pixel_centres():
    maps = anomaly_maps(np.array([[[0, 4], [0, 4]]], np.float32), 4, 0.0)
    np.testing.assert_allclose(maps[0], [[0, 1, 3, 4]] * 4)


def test_blur_keeps_the_mean_and_mirrors_at_the_border():
    grid = np.random.default_rng(0).random((1, 8, 8), dtype=np.float32)
    sharp, blurred = anomaly_maps(grid, 64, 0.0), anomaly_maps(grid, 64, 4.0)
    # A mirrored border gives back what the kernel takes out of the frame.
    np.testing.assert_allclose(blurred.mean(), sharp.mean(), rtol=1e-5)
    assert blurred.std() < sharp.std()


def test_distances_leave_the_thread_count_alone():
    before = torch.get_num_threads()
    distances(made_up_layers(2, ((4, 4), (2, 2), (1, 1))), [0, 5], 9, 4, workers=2)
    assert torch.get_num_threads() == before


def test_tiles_fit_the_memory():
    # One position of 10 images x 100 dims: 8 (2 100 100 + 3 10 100) = 184,000 bytes.
    assert plan_tiles(10, 100, 1_000_000, max_workers=1) == (5, 1)
    assert plan_tiles(10, 100, 1_000_000, max_workers=2) == (2, 2)
    assert plan_tiles(10, 100, 400_000, max_workers=8) == (1, 2)
    assert plan_tiles(10, 100, 184_000, max_workers=8) == (1, 1)


def test_tile_that_does_not_fit_is_refused():
    with pytest.raises(EvaluatorError, match="--max-memory: one position of 10 images x 100"):
        plan_tiles(10, 100, 183_999, max_workers=1)
