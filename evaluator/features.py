"""Runs a backbone over photographs once, ever: their layers stay in a folder that runs share."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from evaluator.artifacts import sha256_of
from evaluator.errors import EvaluatorError
from evaluator.feature_files import (
    FORMAT_VERSION,
    SUFFIX,
    FeatureKind,
    LayerFiles,
    is_whole,
    write_features,
)
from evaluator.feature_room import lease, make_room, temporary_path
from evaluator.images import load_image, read_file
from evaluator.networks import Network
from evaluator.protocols import Protocol

THREADS = 4  # Pillow, zlib and file reads let go of the interpreter lock
BATCHES_AHEAD = 2  # decoded while the network runs
CPU_BATCH = 8  # photographs at once on a CPU: more take memory and no less time

Photograph = tuple[Path, str]  # file, SHA-256 of its bytes


@dataclass(frozen=True)
class Features:
    """The layers of the photographs asked for, in their order, and how many were there before."""

    layers: list[LayerFiles]
    found: int
    computed: int


@dataclass
class CacheStatistics:
    """What one cache did: photographs found, computed, among these for a damaged file, removed."""

    found: int = 0
    computed: int = 0
    damaged: int = 0
    removed: int = 0
    stored_bytes: int = 0


class FeatureCache:
    """A folder of features that stays below `limit_bytes`, but for what living processes use."""

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self.limit_bytes = limit_bytes
        self.statistics = CacheStatistics()

    def summary(self) -> str:
        """What happened, in a few words."""
        did = self.statistics
        damaged = f" ({did.damaged} of them because their file was damaged)" if did.damaged else ""
        return (
            f"features of {did.computed} photographs computed{damaged}, of {did.found} found; "
            f"{did.stored_bytes / 2**30:.2f} GiB kept in {self.folder}"
        )

    @contextlib.contextmanager
    def features(
        self,
        network: Network,
        weights_sha256: str,
        arch: str,
        photographs: Sequence[Photograph],
        protocol: Protocol,
        dtype: str,
        batch_size: int,
        on_images: Callable[[int], object],
    ) -> Iterator[Features]:
        """The features of `photographs`; the network runs over those that are not there yet.

        `dtype` is float16 or float32; `on_images` hears how many more photographs are ready. The
        files stay for as long as the context lasts. Raises EvaluatorError for a photograph that
        cannot be read, features that are not finite or too large for float16, and a full disk.
        """
        kind = feature_kind(network, weights_sha256, arch, protocol, dtype)
        group = self.folder / kind.name
        paths = {digest: group / f"{digest}{SUFFIX}" for _, digest in photographs}
        with lease(self.folder, paths.values()) as holder:
            whole = _whole_files(paths, kind)
            missing = list({d: (p, d) for p, d in photographs if d not in whole}.values())
            self._count_found(len(paths), [paths[digest] for _, digest in missing])
            on_images(sum(digest in whole for _, digest in photographs))
            self._make_room(len(missing) * kind.file_bytes())
            if missing:
                size = batch_size if network.device.type != "cpu" else min(batch_size, CPU_BATCH)
                store = _Store(group, kind, holder)
                with _creating(self.folder, len(missing), kind):
                    group.mkdir(exist_ok=True)
                    for count in _compute(network, missing, protocol, size, store):
                        self.statistics.computed += count
                        on_images(count)
            repeated = sum(digest not in whole for _, digest in photographs) - len(missing)
            on_images(repeated)
            order = [paths[digest] for _, digest in photographs]
            layers = [LayerFiles(order, kind, layer) for layer in range(len(kind.layers))]
            yield Features(layers, len(paths) - len(missing), len(missing))
        self._make_room(0)

    def _count_found(self, wanted: int, missing: list[Path]) -> None:
        self.statistics.found += wanted - len(missing)
        self.statistics.damaged += sum(path.exists() for path in missing)

    def _make_room(self, needed_bytes: int) -> None:
        removed, kept = make_room(self.folder, self.limit_bytes - needed_bytes)
        self.statistics.removed += removed
        self.statistics.stored_bytes = kept


def feature_kind(
    network: Network, weights_sha256: str, arch: str, protocol: Protocol, dtype: str
) -> FeatureKind:
    """The kind of features: whatever changes a value changes its description."""
    description = {
        "format_version": FORMAT_VERSION,
        "arch": arch,
        "weights_sha256": weights_sha256,
        "layers": network.layers,
        "shapes": network.shapes,
        "mean": network.mean,
        "std": network.std,
        "resize_px": protocol.resize_px,
        "crop_px": protocol.crop_px,
        "interpolation": protocol.interpolation,
        "dtype": dtype,
        "device": network.device.type,
        "torch": torch.__version__,
        "pillow": version("pillow"),
    }
    text = json.dumps(description, sort_keys=True, separators=(",", ":"))
    return FeatureKind(text, network.layers, network.shapes, dtype)


@dataclass(frozen=True)
class _Store:
    """Where new files of one kind go."""

    group: Path
    kind: FeatureKind
    holder: str

    def write(
        self, photograph: Photograph, values: list[npt.NDArray[np.float32]], name: str
    ) -> None:
        image, digest = photograph
        path = self.group / f"{digest}{SUFFIX}"
        temporary = temporary_path(path, self.holder)
        try:
            write_features(path, temporary, self.kind, digest, values)
        except OverflowError as error:
            limit = f"{error}, beyond float16's 65504; choose float32"
            reason = "not finite; wrong --input-norm, or damaged weights?"
            finite = all(np.isfinite(layer).all() for layer in values)
            raise EvaluatorError(
                f"backbone {name!r}: features of {image} are {limit if finite else reason}"
            ) from None


def _whole_files(paths: dict[str, Path], kind: FeatureKind) -> set[str]:
    """Which photographs have their file, checked; these count as used now."""

    def check(digest: str) -> bool:
        if not is_whole(paths[digest], kind, digest):
            return False
        with contextlib.suppress(OSError):  # somebody else's file can be read all the same
            os.utime(paths[digest])
        return True

    with _threads() as pool:
        return {
            digest for digest, whole in zip(paths, pool.map(check, paths), strict=True) if whole
        }


def _compute(
    network: Network,
    missing: Sequence[Photograph],
    protocol: Protocol,
    batch_size: int,
    store: _Store,
) -> Iterator[int]:
    """Run the network over `missing`; yields how many more files there are, batch by batch."""
    starts = deque(range(0, len(missing), batch_size))
    batches: deque[tuple[Sequence[Photograph], list[Future[npt.NDArray[np.uint8]]]]] = deque()
    written: list[Future[None]] = []
    with _threads() as pool:
        while starts or batches:
            while starts and len(batches) <= BATCHES_AHEAD:
                start = starts.popleft()
                batch = missing[start : start + batch_size]
                batches.append((batch, [pool.submit(_pixels, p, protocol) for p in batch]))
            batch, decoded = batches.popleft()
            outputs = network(np.stack([future.result() for future in decoded]))
            yield _finish(written)
            written = [
                pool.submit(store.write, photograph, [layer[i] for layer in outputs], network.name)
                for i, photograph in enumerate(batch)
            ]
        yield _finish(written)


def _finish(written: list[Future[None]]) -> int:
    for future in written:
        future.result()
    return len(written)


def _pixels(photograph: Photograph, protocol: Protocol) -> npt.NDArray[np.uint8]:
    path, digest = photograph
    data = read_file(path)
    if sha256_of(data) != digest:  # its features would be kept under another's name
        raise EvaluatorError(f"{path}: changed since it was checked; run again")
    return load_image(path, protocol, data)


@contextlib.contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """A pool that forgets what has not begun when an exception or ctrl-C passes."""
    pool = ThreadPoolExecutor(THREADS)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _creating(folder: Path, images: int, kind: FeatureKind) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        advice = "choose another folder for them"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "make room, or choose a folder on another disk"
        size = images * kind.file_bytes() / 2**30
        raise EvaluatorError(
            f"{folder}: cannot keep {size:.2f} GiB of features of {images} photographs "
            f"({error.strerror}); {advice}"
        ) from None
