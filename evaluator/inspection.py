"""Reads inspection photographs in MVTec AD layout: folder -> checked categories, images, masks.

ROOT/<category>/train/good/*            normal photographs to fit on
ROOT/<category>/test/good/*             normal photographs to score
ROOT/<category>/test/<defect>/*         defective photographs to score
ROOT/<category>/ground_truth/<defect>/<stem>_mask.png   defective where > 0
"""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from evaluator.errors import EvaluatorError

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
MAX_PIXELS = 64 * 10**6
MAX_FILE_BYTES = 512 * 2**20
MIN_TRAIN_IMAGES = 2  # a covariance with ddof 1 needs two
DAMAGE = (
    OSError,
    SyntaxError,  # Pillow's PNG reader on a broken chunk
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


@dataclass(frozen=True)
class TestImage:
    """A photograph to score; `mask` is None for a good one."""

    __test__ = False  # not a pytest class

    path: Path
    defect: str
    mask: Path | None


@dataclass(frozen=True)
class Category:
    """One product: its files in a fixed order, and the SHA-256 over their names and bytes."""

    name: str
    train: tuple[Path, ...]
    test: tuple[TestImage, ...]
    sha256: str = ""
    defects: dict[str, int] = field(default_factory=dict)

    @property
    def good(self) -> int:
        """How many test photographs show no defect."""
        return sum(image.mask is None for image in self.test)


def find_categories(root: Path, names: list[str] | None) -> list[Category]:
    """The categories below `root`, all or the named ones, with every file checked.

    Raises EvaluatorError, before any network runs, for a wrong folder, an incomplete category, a
    file that is no image, a mask that is missing, surplus or of another size than its image.
    """
    if not root.is_dir():
        raise EvaluatorError(f"{root}: no such folder; --data wants the folder of the categories")
    if (root / "train").is_dir() and (root / "test").is_dir():
        raise EvaluatorError(
            f"{root}: is itself a category; give the folder above it and --categories {root.name}"
        )
    present = [path.name for path in _subfolders(root) if _looks_like_category(path)]
    if not present:
        raise EvaluatorError(
            f"{root}: no categories found; expected {root}/<category>/train/good and test/ "
            "(MVTec AD layout)"
        )
    for name in names or []:
        if name not in present:
            raise EvaluatorError(
                f"{root}: no category {name!r}; --categories knows {', '.join(present)}"
            )
    chosen = [name for name in present if names is None or name in names]
    listed = [_list_category(root / name) for name in chosen]
    return [_check_files(root, category) for category in listed]


def _looks_like_category(folder: Path) -> bool:
    return (folder / "train").is_dir() or (folder / "test").is_dir()


def _subfolders(folder: Path) -> list[Path]:
    found = (path for path in folder.iterdir() if path.is_dir())
    return sorted(path for path in found if not path.name.startswith("."))


def _names(folder: Path) -> set[str]:
    return {path.name for path in _subfolders(folder)} if folder.is_dir() else set()


def _images(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else iter(())
    return sorted(
        path for path in found if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )


def _list_category(folder: Path) -> Category:
    """List one category's files and check that the layout is complete."""
    train = _images(folder / "train" / "good")
    if len(train) < MIN_TRAIN_IMAGES:
        raise EvaluatorError(
            f"{folder / 'train' / 'good'}: {len(train)} images; PaDiM's covariance needs at least "
            f"{MIN_TRAIN_IMAGES} normal photographs"
        )
    test: list[TestImage] = []
    defects: dict[str, int] = {}
    # Both sides, so that a lost folder of images shows by the masks it left behind.
    for kind in sorted(_names(folder / "test") | _names(folder / "ground_truth")):
        images = _images(folder / "test" / kind)
        if kind == "good":
            test.extend(TestImage(path, "good", None) for path in images)
            continue
        test.extend(_with_masks(folder, kind, images))
        if images:
            defects[kind] = len(images)
    good = sum(image.mask is None for image in test)
    if not test:
        raise EvaluatorError(
            f"{folder / 'test'}: no test images; expected test/good/* and test/<defect>/*"
        )
    if good == 0 or good == len(test):
        missing = "good" if good == 0 else "defective"
        raise EvaluatorError(
            f"{folder / 'test'}: {len(test)} images, none of them {missing}; AUROC needs both kinds"
        )
    return Category(folder.name, tuple(train), tuple(test), defects=defects)


def _with_masks(folder: Path, defect: str, images: list[Path]) -> Iterator[TestImage]:
    masks = folder / "ground_truth" / defect
    expected: dict[Path, Path] = {}
    for path in images:
        mask = masks / f"{path.stem}_mask.png"
        if mask in expected:
            raise EvaluatorError(
                f"{path}: has the same mask {mask} as {expected[mask].name}; rename one of the "
                "images, and give it a mask of its own"
            )
        expected[mask] = path
    for surplus in _images(masks):
        if surplus not in expected:
            raise EvaluatorError(
                f"{surplus}: mask without image; expected "
                f"{folder / 'test' / defect / surplus.stem.removesuffix('_mask')}.png"
            )
    for mask, path in expected.items():
        if not mask.is_file():
            raise EvaluatorError(f"{path}: defective image without mask; expected {mask}")
        yield TestImage(path, defect, mask)


def _check_files(root: Path, category: Category) -> Category:
    """Look at every file once: headers and checksums of images, masks in full; hash them all."""
    digest = hashlib.sha256()
    files = [(path, None) for path in category.train]
    files += [(image.path, image.mask) for image in category.test]  # type: ignore[misc]
    for path, mask in tqdm(
        files, desc=f"checking {category.name}", unit="img", disable=None, leave=False
    ):
        size = _check_image(path, digest, root)
        if mask is not None:
            mask_size = _check_image(mask, digest, root)
            if mask_size != size:
                raise EvaluatorError(
                    f"{mask}: mask is {mask_size[0]} x {mask_size[1]} pixels, its image {path} "
                    f"{size[0]} x {size[1]}; they must match"
                )
    return Category(
        category.name, category.train, category.test, digest.hexdigest(), category.defects
    )


def _check_image(path: Path, digest: hashlib._Hash, root: Path) -> tuple[int, int]:
    """Width and height of an image whose header and chunk checksums are right."""
    data = _read(path)
    try:
        digest.update(f"{path.relative_to(root).as_posix()} {len(data)}\n".encode())
    except UnicodeEncodeError:
        raise EvaluatorError(f"{str(path)!r}: the name is not UTF-8; rename it") from None
    digest.update(data)
    with warnings.catch_warnings():
        # Here alone, in the main thread: warning filters are global to the process.
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        image = _open(data, path)
    try:
        image.verify()  # PNG checksums; the pixels are decoded when they are needed
    except DAMAGE as error:
        raise _unreadable(path, error) from None
    return image.size


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise EvaluatorError(f"{path}: larger than {MAX_FILE_BYTES} bytes, refused")
        return path.read_bytes()
    except OSError as error:
        raise EvaluatorError(f"{path}: cannot be read ({error.strerror})") from None


def _open(data: bytes, path: Path) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
    except DAMAGE as error:
        raise _unreadable(path, error) from None
    if image.width * image.height > MAX_PIXELS:
        raise EvaluatorError(
            f"{path}: {image.width} x {image.height} pixels, more than {MAX_PIXELS}; refused"
        )
    if image.mode.startswith(("I", "F")):
        raise EvaluatorError(
            f"{path}: pixel mode {image.mode} (more than 8 bit); convert it to 8 bit grey or RGB"
        )
    return image


def _unreadable(path: Path, error: BaseException) -> EvaluatorError:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    reason = reason.replace("<_io.BytesIO object at ", "<").split(" <")[0]
    return EvaluatorError(f"{path}: not a readable image ({reason}); replace or remove the file")


def load_image(path: Path, resize_px: int, crop_px: int) -> npt.NDArray[np.uint8]:
    """The photograph as the network sees it: uint8 [size, size, 3], RGB.

    Resized to `resize_px` x `resize_px` (Lanczos; a photograph that is not square is squeezed, its
    mask with it), then the centre `crop_px` x `crop_px` (0: all of it).
    """
    image = _open(_read(path), path)
    try:
        square = image.convert("RGB").resize((resize_px, resize_px), Image.Resampling.LANCZOS)
    except DAMAGE as error:
        raise _unreadable(path, error) from None
    return _centre(np.asarray(square), crop_px)


def load_mask(path: Path, resize_px: int, crop_px: int) -> npt.NDArray[np.bool_]:
    """The ground truth on the same pixels as `load_image`: bool [size, size], True = defective.

    Binarised `> 0` in any channel first, then resized with nearest, then cropped.
    """
    image = _open(_read(path), path)
    try:
        values = np.asarray(image if image.mode in ("1", "L") else image.convert("RGB"))
    except DAMAGE as error:
        raise _unreadable(path, error) from None
    binary = values.reshape(*values.shape[:2], -1).any(axis=-1)
    square = Image.fromarray(binary.astype(np.uint8)).resize(
        (resize_px, resize_px), Image.Resampling.NEAREST
    )
    return _centre(np.asarray(square), crop_px) > 0


def _centre(pixels: npt.NDArray[np.uint8], crop_px: int) -> npt.NDArray[np.uint8]:
    if crop_px == 0:
        return pixels
    start = (pixels.shape[0] - crop_px) // 2
    return pixels[start : start + crop_px, start : start + crop_px]
