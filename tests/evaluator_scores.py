"""Small made-up maps with masks for the tests of metrics."""

import numpy as np

from evaluator.ranks import label_regions
from evaluator.statistics import Statistics, statistics


def tied_category(seed: int = 0, images: int = 6, size: int = 12):
    """Maps with many ties, masks, and which images are defective.

    The first two images are good, the third is defective with an empty mask.
    """
    rng = np.random.default_rng(seed)
    masks = np.zeros((images, size, size), np.bool_)
    for mask in masks[3:]:
        mask[1:4, 2:5] = True
        mask[6:, rng.integers(0, size)] = True
    maps = (rng.normal(size=masks.shape) + masks).round(1).astype(np.float32)
    return maps, masks, np.arange(images) >= 2


def count(maps, masks, defective=None) -> Statistics:
    """The statistics of maps; defective are the images with a mask unless told."""
    defective = masks.any(axis=(1, 2)) if defective is None else defective
    return statistics(maps, label_regions(masks)[0], defective)
