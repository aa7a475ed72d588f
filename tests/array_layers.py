"""Features of a layer that lie in an array."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class ArrayLayer:
    """Features in memory: float32 [images, height, width, channels]."""

    values: npt.NDArray[np.float32]

    @property
    def images(self) -> int:
        return self.values.shape[0]

    @property
    def height(self) -> int:
        return self.values.shape[1]

    @property
    def width(self) -> int:
        return self.values.shape[2]

    @property
    def channels(self) -> int:
        return self.values.shape[3]

    def read(self, first_row: int, last_row: int) -> npt.NDArray[np.float32]:
        return self.values[:, first_row:last_row]
