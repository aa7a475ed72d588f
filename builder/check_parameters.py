"""Check stored parameters: their ranges, the recipe's draw of them, and the images they give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from builder.check import DataTask, ShardCheck
from builder.errors import BuilderError
from builder.images import decode_pixels, encode_pixels
from builder.prior import draw
from builder.render import check_theta, render
from builder.scratch import normals_table
from builder.storage import open_storage

# Another libjpeg may round coefficients the other way. At quality 95 a step is at most 12, of which
# at most a quarter reaches a pixel; several meet in a block. Photographs encoded with one in ten
# pixels off by one, which is more than that, differed by up to 15 after decoding.
MAX_JPEG_DIFFERENCE = 16
MAX_KERNEL_DIFFERENCE = 1  # that of any builder's kernel from equations 3 to 7

Flags = npt.NDArray[np.bool_]


class Stored(NamedTuple):
    """A stored sample. `image` is empty unless it is to be painted again; `normal` -1: unknown."""

    number: int
    image: bytes
    theta: npt.NDArray[np.float32]
    readable: bool
    normal: int


def check_vectors(
    check: ShardCheck, task: DataTask, start: int, theta: npt.NDArray[np.float32], readable: Flags
) -> tuple[Flags, Flags, npt.NDArray[np.int64]]:
    """Check the vectors, float32 [n, L], of the samples from `start` on.

    Returns which are in range [n], which are not the recipe's draw [n], and the normals that the
    recipe draws, int64 [n]. Those not `readable` are reported already.
    """
    in_range = readable.copy()
    try:
        check_theta(theta[readable], task.head.theta.channels)
    except BuilderError:
        for row in np.flatnonzero(readable).tolist():
            try:
                check_theta(theta[row : row + 1], task.head.theta.channels)
            except BuilderError as error:
                in_range[row] = False
                message = error.message.replace("row 0 ", "")
                check.add("theta", f"{start + row:09d}", message)
    recipe = task.head.recipe
    normal, drawn = draw(recipe, start, start + len(theta), task.head.normals.count)
    # As bits: a NaN differs from every number, and -0.0 from 0.0.
    other = theta.view(np.uint32) != drawn.view(np.uint32)
    differs = other.any(1) & readable
    if task.drawn:
        for row in np.flatnonzero(differs).tolist():
            column = int(other[row].argmax())
            check.add(
                "draw",
                f"{start + row:09d}",
                f"theta is not the recipe's draw: value {column} expected "
                f"{float(drawn[row, column])!r}, found {float(theta[row, column])!r}",
            )
    return in_range, differs, normal


def check_choice(
    check: ShardCheck,
    task: DataTask,
    start: int,
    found: npt.NDArray[np.int64],
    drawn: npt.NDArray[np.int64],
) -> Flags:
    """Compare the normals that the samples from `start` on name (-1: reported) with the draw."""
    differs: Flags = (found != drawn) & (found >= 0)
    if task.drawn:
        for row in np.flatnonzero(differs).tolist():
            check.add(
                "draw",
                f"{start + row:09d}",
                f"normal is not the recipe's draw: expected {drawn[row]:09d}, "
                f"found {found[row]:09d}",
            )
    return differs


def paint_again(check: ShardCheck, task: DataTask, samples: Sequence[Stored]) -> None:
    """Render the samples from their stored vectors and normals; compare with the stored images."""
    head = task.head
    with normals_table(open_storage(task.url), head.normals, head.recipe) as table:
        for one in samples:
            painted = render(table.pixels, np.array([one.normal]), one.theta[None])[0]
            fault = _difference(task, one.image, painted)
            if fault:
                check.add("rerender", f"{one.number:09d}", fault)
            check.rerendered += 1


def _difference(task: DataTask, stored: bytes, painted: npt.NDArray[np.uint8]) -> str:
    """Why the stored image is not the painted one, uint8 [H, W, C], or an empty string."""
    image = task.head.image
    try:
        found = decode_pixels(stored, 3).astype(np.int16)  # all planes: a grey WebP's are equal
        expected = painted
        if not image.lossless:
            encoded = encode_pixels(painted, image.codec)
            if encoded == stored:
                return ""
            expected = decode_pixels(encoded, 3)
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # what Pillow raises
        return f"the image cannot be decoded ({error})".replace("\n", " ")
    difference = np.abs(found - expected).max(2)
    largest = int(difference.max())
    if largest == 0 and not image.lossless and task.tolerance == 0:
        return "its pixels are those of theta and normal, its bytes are not the encoder's"
    if largest <= task.tolerance:
        return ""
    return (
        f"not the image of its theta and normal: {np.count_nonzero(difference)} pixels differ, "
        f"by up to {largest} grey levels"
    )
