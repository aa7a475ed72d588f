"""All that the metrics of a category need to know about its maps: counts, no pixels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evaluator.errors import EvaluatorError
from evaluator.npz import Array, load_arrays, save_arrays
from evaluator.ranks import rank_pixels

FORMAT = b"semiformula-statistics"
FORMAT_VERSION = 1

# The types that each array may have, and its number of dimensions.
_UNSIGNED = ("|u1", "<u2", "<u4")
_STORED: dict[str, tuple[tuple[str, ...], int]] = {
    "above": (("<u4",), 1),
    "tied": (("<u4",), 1),
    "same_score": (("|b1",), 1),
    "region": (_UNSIGNED, 1),
    "region_image": (("<i8",), 1),
    "region_pixels": (("<i8",), 1),
    "positives_of": (("<i8",), 1),
    "negatives_of": (("<i8",), 1),
    "pairs": (("<i8",), 2),
    "grid_negatives": (("<u4",), 2),
    "grid_region": (("<u4",), 2),
    "image_score": (("<f4",), 1),
    "image_defective": (("|b1",), 1),
}
# Never falling along the last axis: differences are small numbers.
_DIFFERENCES = ("above", "grid_negatives", "grid_region")


@dataclass(frozen=True, eq=False)
class Statistics:
    """Sufficient for every metric, exactly, and for resampling images without sorting again.

    T test images, D of them defective (rows in their order), P positive pixels (of defects), R
    regions, G thresholds. Without masks P = R = G = 0, and the counts of pixels are 0.

    Positive pixels in descending order of score; where no metric sees their order, by region:
    above, tied: uint32 [P], negative pixels of all images with a higher and with the same score.
    same_score: bool [P], the score is that of the positive pixel before.
    region: unsigned [P], from 0.

    region_image: int64 [R]; region_pixels: int64 [R]; positives_of, negatives_of: int64 [T].
    pairs: int64 [D, T], twice the number of pairs (positive pixel of defective image i, negative
    pixel of image j) with the positive higher, plus the number of ties.
    grid_negatives: uint32 [T, G], grid_region: uint32 [R, G]: negative pixels of each image and
    pixels of each region that reach each of G descending thresholds, dense where false positives
    are few; the last is reached by all.
    image_score: float32 [T], the largest of the map; image_defective: bool [T].
    """

    above: npt.NDArray[np.uint32]
    tied: npt.NDArray[np.uint32]
    same_score: npt.NDArray[np.bool_]
    region: npt.NDArray[np.unsignedinteger]
    region_image: npt.NDArray[np.int64]
    region_pixels: npt.NDArray[np.int64]
    positives_of: npt.NDArray[np.int64]
    negatives_of: npt.NDArray[np.int64]
    pairs: npt.NDArray[np.int64]
    grid_negatives: npt.NDArray[np.uint32]
    grid_region: npt.NDArray[np.uint32]
    image_score: npt.NDArray[np.float32]
    image_defective: npt.NDArray[np.bool_]

    @property
    def has_masks(self) -> bool:
        """Whether there are pixel metrics."""
        return len(self.region_pixels) > 0

    @property
    def positives(self) -> int:
        """Positive pixels of the category."""
        return len(self.above)

    @property
    def negatives(self) -> int:
        """Negative pixels of the category, on good and defective images."""
        return int(self.negatives_of.sum())


def statistics(
    maps: npt.NDArray[np.float32],
    regions: npt.NDArray[np.int32] | None,
    defective: npt.NDArray[np.bool_],
) -> Statistics:
    """Count once; every metric follows.

    maps: float32 [T, S, S], the anomaly maps of all test images; regions: int32 [T, S, S] of
    `label_regions`, or None where there are no masks; defective: bool [T]. A defective image with
    an empty mask counts as defective, its pixels as negatives. Raises EvaluatorError when a score
    is not finite and when a kind of image or pixel is missing.
    """
    lowest, highest = maps.min(axis=(1, 2)), maps.max(axis=(1, 2))
    broken = np.flatnonzero(~(np.isfinite(lowest) & np.isfinite(highest)))
    if len(broken):
        raise EvaluatorError(
            f"the anomaly map of test image {broken[0]} has a score that is not finite; "
            "are the weights of the backbone damaged?"
        )
    if defective.all() or not defective.any():
        missing = "good" if defective.all() else "defective"
        raise EvaluatorError(f"no {missing} test image; every metric needs good and defective")
    images = len(maps)
    if regions is None:
        none = np.zeros(images, np.int64)
        empty = np.empty(0, np.uint32)
        return Statistics(
            above=empty,
            tied=empty,
            same_score=np.empty(0, np.bool_),
            region=np.empty(0, np.uint8),
            region_image=np.empty(0, np.int64),
            region_pixels=np.empty(0, np.int64),
            positives_of=none,
            negatives_of=none,
            pairs=np.zeros((int(defective.sum()), images), np.int64),
            grid_negatives=np.empty((images, 0), np.uint32),
            grid_region=np.empty((0, 0), np.uint32),
            image_score=highest,
            image_defective=defective,
        )
    ranked = rank_pixels(maps, regions, defective)
    return Statistics(
        above=ranked.above,
        tied=ranked.tied,
        same_score=ranked.same_score,
        region=ranked.region,
        region_image=ranked.region_image,
        region_pixels=np.bincount(ranked.region),
        positives_of=maps[0].size - ranked.negatives_of,
        negatives_of=ranked.negatives_of,
        pairs=ranked.pairs,
        grid_negatives=ranked.grid_negatives,
        grid_region=ranked.grid_region,
        image_score=highest,
        image_defective=defective,
    )


def save_statistics(s: Statistics) -> bytes:
    """The .npz file of `s`: the same bytes for the same statistics."""
    arrays = {"format": np.array(FORMAT), "format_version": np.array(FORMAT_VERSION, "<i8")}
    for name, (types, _) in _STORED.items():
        array = np.asarray(getattr(s, name))
        array = np.asarray(array, array.dtype if name == "region" else types[0])
        if name in _DIFFERENCES:
            array = np.diff(array, axis=-1, prepend=array.dtype.type(0))
        arrays[name] = _planes(array)
    return save_arrays(arrays)


def _planes(array: Array) -> Array:
    """The lowest bytes of all numbers, then the next ones: mostly 0, which deflate well."""
    if array.dtype.kind not in "iu" or array.itemsize == 1:
        return array
    little = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<")))
    parts = little.view(np.uint8).reshape(*array.shape, array.itemsize)
    return np.ascontiguousarray(np.moveaxis(parts, -1, 0))


def load_statistics(data: bytes, name: str) -> Statistics:
    """The statistics in `data`, the bytes of a file called `name` in errors.

    Raises EvaluatorError for anything but a whole file of ours whose counts agree.
    """
    try:
        arrays = load_arrays(data, ["format", "format_version", *_STORED])
        _check_format(arrays)
        decoded = {key: _decoded(key, arrays) for key in _STORED}
        result = Statistics(**decoded)
        _check_shapes(result)
        _check_counts(result)
    except ValueError as error:
        raise EvaluatorError(f"{name}: not statistics of semiformula: {error}") from None
    return result


def _check_format(arrays: Mapping[str, Array]) -> None:
    form, version = arrays["format"], arrays["format_version"]
    if form.shape != () or form.dtype.kind != "S" or form.item() != FORMAT:
        raise ValueError(f"format is {form.tolist()!r:.60}, expected {FORMAT!r}")
    if version.shape != () or version.dtype.kind != "i" or version.item() != FORMAT_VERSION:
        raise ValueError(
            f"format_version is {version.tolist()!r:.20}, this version reads {FORMAT_VERSION} only"
        )


def _decoded(name: str, arrays: Mapping[str, Array]) -> Array:
    types, dimensions = _STORED[name]
    stored = arrays[name]
    dtype = np.dtype(types[0])
    if name == "region" and stored.ndim == 2:
        dtype = np.dtype(f"<u{stored.shape[0]}") if stored.shape[0] in (2, 4) else np.dtype("V1")
    elif name == "region":
        dtype = np.dtype("|u1")
    planes = dtype.kind in "iu" and dtype.itemsize > 1
    expected = np.dtype("|u1") if planes else dtype
    if (
        stored.dtype != expected
        or stored.ndim != dimensions + planes
        or (planes and stored.shape[0] != dtype.itemsize)
    ):
        raise ValueError(f"{name} has type {stored.dtype} and shape {stored.shape}")
    if dtype.kind == "b" and stored.size and stored.view(np.uint8).max() > 1:
        raise ValueError(f"{name} holds neither 0 nor 1")
    array = stored
    if planes:
        parts = np.ascontiguousarray(np.moveaxis(stored, 0, -1))
        array = parts.view(dtype).reshape(stored.shape[1:])
    if name in _DIFFERENCES:
        total = np.cumsum(array, axis=-1, dtype=np.uint64)
        if total.size and total.max() > np.iinfo(np.uint32).max:
            raise ValueError(f"{name} has counts above 2^32")
        array = total.astype(np.uint32)
    return array.astype(dtype.newbyteorder("="))


def _check_shapes(s: Statistics) -> None:
    images, regions, pixels = len(s.image_score), len(s.region_pixels), len(s.above)
    rows = int(s.image_defective.sum())
    grid = s.grid_negatives.shape[1]
    expected = {
        "tied": (pixels,),
        "same_score": (pixels,),
        "region": (pixels,),
        "region_image": (regions,),
        "positives_of": (images,),
        "negatives_of": (images,),
        "image_defective": (images,),
        "pairs": (rows, images),
        "grid_negatives": (images, grid),
        "grid_region": (regions, grid if regions else 0),
    }
    for name, shape in expected.items():
        found = getattr(s, name).shape
        if found != shape:
            raise ValueError(f"{name} has shape {found}, expected {shape}")
    _require(0 < rows < images, "good and defective images are needed")
    _require((pixels > 0) == (regions > 0) == (grid > 0), "some arrays of pixels are empty")


def _check_counts(s: Statistics) -> None:
    """What was counted twice in different ways has to agree."""
    _require(bool(np.isfinite(s.image_score).all()), "an image score is not finite")
    small = (s.region_image, s.region_pixels, s.positives_of, s.negatives_of, s.pairs)
    _require(all(bool(((one >= 0) & (one < 2**53)).all()) for one in small), "a count is absurd")
    if not s.has_masks:
        nothing = not (s.pairs.any() or s.positives_of.any() or s.negatives_of.any())
        _require(nothing, "there are counts of pixels, but no regions")
        return
    regions, images = len(s.region_pixels), len(s.image_score)
    _require(int(s.region.max()) < regions, "a pixel lies in no region")
    _require(int(s.region_image.max()) < images, "a region lies in no image")
    _require(bool(s.image_defective[s.region_image].all()), "a region lies in a good image")
    by_region = np.bincount(s.region, minlength=regions)
    _require(np.array_equal(by_region, s.region_pixels), "region_pixels disagree with region")
    by_image = np.bincount(s.region_image, s.region_pixels, minlength=images)
    _require(np.array_equal(by_image, s.positives_of), "positives_of disagree with region_pixels")
    _require(0 < s.negatives < 2**32, "negatives_of are absurd")

    reached = s.above.astype(np.int64) + s.tied
    same = s.same_score[1:]
    ordered = np.where(
        same,
        (s.above[1:] == s.above[:-1]) & (s.tied[1:] == s.tied[:-1]),
        s.above[1:] >= reached[:-1],
    )
    _require(bool(ordered.all()) and not s.same_score[0], "above and tied are out of order")
    _require(int(reached[-1]) <= s.negatives, "more negatives above a pixel than there are")
    right = 2 * s.negatives - s.above.astype(np.int64) - reached
    rows = s.region_image[s.region]
    pairs = np.bincount(rows, right, minlength=images)[s.image_defective]
    _require(np.array_equal(pairs, s.pairs.sum(axis=1)), "pairs disagree with above and tied")
    most = 2 * np.outer(s.positives_of[s.image_defective], s.negatives_of)
    _require(bool((s.pairs <= most).all()), "more pairs than pixels")
    _require(np.array_equal(s.grid_negatives[:, -1], s.negatives_of), "grid_negatives end early")
    _require(np.array_equal(s.grid_region[:, -1], s.region_pixels), "grid_region ends early")


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)
