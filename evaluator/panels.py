"""One line of pictures: a test photograph, its truth, and its map under every backbone."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Panel:
    """What the pages show of one test photograph.

    `image` uint8 [size, size, 3]; `mask` bool [size, size], None where there is none; `levels` one
    uint8 [size, size] a backbone, in the report's order (see `good_false_positive_levels`).
    `image_index` is its place in the category's `images`; `label` its defect and file name.
    """

    category: str
    image_index: int
    label: str
    image: npt.NDArray[np.uint8]
    mask: npt.NDArray[np.bool_] | None
    levels: list[npt.NDArray[np.uint8]]
