"""Runs a backbone over photographs once and keeps its layers in files that vanish by themselves."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from evaluator.errors import EvaluatorError
from evaluator.inspection import load_image
from evaluator.networks import Network
from evaluator.padim import LayerFeatures

DECODE_THREADS = 4  # Pillow decodes and resizes without the interpreter lock


@contextlib.contextmanager
def feature_store(network: Network, images: int, folder: Path) -> Iterator[list[LayerFeatures]]:
    """Room for the features of `images` photographs, in unnamed files below `folder`.

    Memory-mapped, so that memory stays bounded; unlinked from the start, so that a killed run
    leaves nothing behind; allocated beforehand, so that a full disk is an EvaluatorError and not
    a crash. Position first: a tile of positions is one piece of the file.
    """
    with contextlib.ExitStack() as stack:
        layers = []
        for channels, height, width in network.shapes:
            shape = (height * width, images, channels)
            size_bytes = 4 * height * width * images * channels
            try:
                file = stack.enter_context(tempfile.TemporaryFile(dir=folder))
                os.posix_fallocate(file.fileno(), 0, size_bytes)
            except OSError as error:
                raise EvaluatorError(
                    f"{folder}: no room for {size_bytes / 2**30:.2f} GiB of features of "
                    f"{images} images ({error.strerror}); choose an --out on another disk"
                ) from None
            values = np.memmap(file, np.float32, mode="r+", shape=shape)
            layers.append(LayerFeatures(height, width, values))
        yield layers


@torch.inference_mode()
def extract(
    network: Network,
    paths: Sequence[Path],
    resize_px: int,
    crop_px: int,
    batch_size: int,
    layers: list[LayerFeatures],
    on_images: Callable[[int], object],
) -> None:
    """Run the network once over `paths` and fill `layers`; `on_images` hears of each batch's size.

    Raises EvaluatorError for an image that cannot be decoded and for features that are not finite.
    """
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        for start in range(0, len(paths), batch_size):
            batch = paths[start : start + batch_size]
            pixels = list(pool.map(lambda path: load_image(path, resize_px, crop_px), batch))
            outputs = network(np.stack(pixels))
            for layer, output in zip(layers, outputs, strict=True):
                _check_finite(network, output, batch)
                layer.values[:, start : start + len(batch)] = output
            on_images(len(batch))


def _check_finite(network: Network, output: npt.NDArray[np.float32], batch: Sequence[Path]) -> None:
    finite = np.isfinite(output).all(axis=(0, 2))  # per image
    if not finite.all():
        raise EvaluatorError(
            f"backbone {network.name!r}: features of {batch[int(np.argmin(finite))]} are not "
            "finite; wrong --input-norm, or damaged weights?"
        )
