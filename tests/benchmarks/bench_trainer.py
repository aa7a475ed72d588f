"""The trainer's data path against plain webdataset, and its renderer in pieces and whole.

On demo images, or on the photographs of a folder: BENCH_NORMALS=FOLDER.
"""

import itertools
import multiprocessing
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import webdataset
from torchvision.transforms.functional import to_tensor

from builder.artifacts import parse_model
from builder.build import build
from builder.demo import make_demo_data
from builder.recipe import Recipe, load_recipe
from builder.sources import Source, find_source
from tests.benchmarks.timing import seconds, table
from trainer import images, render
from trainer.dataset import Dataset, read_dataset
from trainer.decoded import Decoded, decoded_cache, row_bytes
from trainer.images import decode_into
from trainer.loader import batches_from
from trainer.losses import heads
from trainer.node import DataOptions, Node, node
from trainer.order import DEFAULT_WINDOW_SHARDS, Order, train_counts
from trainer.paint import paint
from trainer.samples import Batch, Samples
from trainer.storage import open_storage

SAMPLES = 1024
BATCH = 64
SIZE_PX = 224
ROUNDS = 4  # interleaved; the best of each counts, as others use the machine too
WORKERS = 1


def main() -> None:
    """Build 1,024 samples of 224 x 224 twice and load them; render 64 at 128 px."""
    with tempfile.TemporaryDirectory() as name:
        folder = os.environ.get("BENCH_NORMALS")
        if folder is None:
            make_demo_data(Path(name) / "demo", train=10, good=1, per_defect=1)
        source = (
            find_source("demo", Path(name) / "demo", None)
            if folder is None
            else find_source(folder, None, "CC0-1.0")
        )
        for codec in ("webp", "jpeg"):
            loading(built(Path(name) / codec, source, codec), codec)
        normals = parameter_only(built(Path(name) / "theta", source, "webp", "parameters"))
        painting(normals)
    seeking()
    rendering()


def built(out: Path, source: Source, codec: str, contents: str = "images") -> Path:
    """A dataset of the paper's recipe."""
    changed = {"samples": SAMPLES, "samples_per_shard": 128, "size_px": SIZE_PX, "codec": codec}
    recipe = parse_model(Recipe, {**load_recipe("paper").model_dump(), **changed}, "bench")
    build(recipe, source, out, jobs=2, contents=contents)  # type: ignore[arg-type]
    return out


class Loaders:
    """The ways to load one dataset; each gives batches from a worker process to this one."""

    def __init__(self, folder: Path, decoded: Decoded | None) -> None:
        self.folder = folder
        self.dataset = dataset_of(folder)
        self.decoded = decoded
        self.suffix = self.dataset.image.suffix
        self.urls = [str(folder / shard.name) for shard in self.dataset.shards]

    def webdataset(self, decoder: str) -> Iterable[object]:
        """What users write: WebDataset, decode, ToTensor or not, batched, DataLoader."""
        stream = (
            webdataset.WebDataset(self.urls, shardshuffle=False)
            .decode(decoder)
            .to_tuple(self.suffix, "theta.npy")
        )
        if decoder == "pil":
            stream = stream.map_tuple(to_tensor)
        return torch.utils.data.DataLoader(
            stream.batched(BATCH), batch_size=None, num_workers=WORKERS
        )

    @contextmanager
    def ours(self, decoded: Decoded | None = None) -> Iterator[Iterator[Batch]]:
        """The trainer's: fetcher, window order, workers; all shards verified on the way."""
        counts = np.array([shard.samples for shard in self.dataset.shards])
        order = Order(self.dataset.order_key, 0, counts, window_shards=8)
        parts = (order.samples(i, i + BATCH).tolist() for i in range(0, SAMPLES, BATCH))
        with (
            opened_node(self.folder, self.dataset, order, decoded) as shards,
            batches_from(Samples(self.dataset, shards, decoded), parts, WORKERS, False) as stream,
        ):
            yield stream


@contextmanager
def opened_node(
    folder: Path, dataset: Dataset, order: Order, decoded: Decoded | None = None
) -> Iterator[Node]:
    options = DataOptions(str(folder), folder / "cache", 2**40)
    storage = open_storage(str(folder))
    with node(
        options, storage, dataset, order, 0, 0, lambda: None, str, 2 * BATCH, SAMPLES, decoded
    ) as shards:
        yield shards


def loading(folder: Path, codec: str) -> None:
    """Milliseconds a sample from shard to batch, by one worker process, files in the cache."""
    dataset = dataset_of(folder)
    room = (row_bytes(dataset) + 1) * SAMPLES + 4096
    with decoded_cache(folder, room, dataset, 0, lambda: None, str) as decoded:
        loaders = Loaders(folder, decoded)
        with loaders.ours(decoded) as stream:  # the first epoch fills the cache
            data = [len(batch.index) for batch in stream]
        assert sum(data) == SAMPLES
        encoded = encoded_images(loaders)
        pixels = Samples(dataset, None).rows(BATCH).images  # type: ignore[arg-type]

        def bare() -> Iterator[int]:
            for row, image in enumerate(encoded):
                decode_into(pixels[row % BATCH], image, loaders.suffix, "bench")
                yield row

        ways: dict[str, Callable[[], Pace]] = {
            'webdataset decode("pil") + ToTensor': lambda: paced(loaders.webdataset("pil")),
            'webdataset decode("rgb8")': lambda: paced(loaders.webdataset("rgb8")),
            "trainer": lambda: paced_within(loaders.ours()),
            "trainer, decoded cache": lambda: paced_within(loaders.ours(decoded)),
            "decoding alone": lambda: paced(bare(), SAMPLES),
            "decoding alone, Pillow": lambda: paced_with_pillow(bare),
        }
        rounds = [[way() for way in ways.values()] for _ in range(ROUNDS)]
        best = [Pace(*map(min, zip(*paces, strict=True))) for paces in zip(*rounds, strict=True)]
    report(dict(zip(ways, best, strict=True)), codec)


class Pace(NamedTuple):
    """Seconds a sample: by the clock, and of the processor in the process that decodes."""

    clock: float
    worker: float


def report(best: dict[str, Pace], codec: str) -> None:
    """The table, and the bars; the processor's time is the less disturbed by other programs."""
    rows = [
        (name, pace.clock * 1e3, f"{1 / pace.clock:>6,.0f} images/s; CPU {pace.worker * 1e3:.3f}")
        for name, pace in best.items()
    ]
    title = f"from shard to batch, {codec} {SIZE_PX} x {SIZE_PX}, {WORKERS} worker, batch {BATCH}"
    table(title, "ms/image", rows)
    plain, eight, ours, cached, bare, _ = best.values()
    for what, kind in (("clock", 0), ("CPU of the worker", 1)):
        print(
            f"  by {what}: trainer {plain[kind] / ours[kind]:.2f} times plain webdataset (bar "
            f"2.2), {eight[kind] / ours[kind]:.2f} times rgb8; {100 * bare[kind] / ours[kind]:.0f} "
            f"% of the bare decode rate (bar 95); decoded cache {1 / cached[kind]:,.0f} images/s "
            "(bar 3,000)"
        )


def paced(stream: Iterable[object], count: int = SAMPLES // BATCH) -> Pace:
    """From the middle on to the last item but one: neither start nor end counts."""
    iterator = iter(stream)
    warm_up = sum(1 for _ in itertools.islice(iterator, count // 2))
    start, spent = time.perf_counter(), worker_seconds()
    found = sum(1 for _ in itertools.islice(iterator, count - warm_up - 1))
    seconds, more = time.perf_counter() - start, worker_seconds() - spent
    assert warm_up + found + sum(1 for _ in iterator) == count
    samples = found * SAMPLES / count
    return Pace(seconds / samples, more / samples)


def worker_seconds() -> float:
    """Processor time of the worker processes, or of this one where there are none."""
    pids = [child.pid for child in multiprocessing.active_children()] or ["self"]
    files = [file for pid in pids for file in Path(f"/proc/{pid}/task").glob("*/schedstat")]
    return sum(int(file.read_text().split()[0]) for file in files) / 1e9


@contextmanager
def without_fast_decoders() -> Iterator[None]:
    before, images.FAST = images.FAST, {}
    try:
        yield
    finally:
        images.FAST = before


def paced_with_pillow(bare: Callable[[], Iterator[int]]) -> Pace:
    with without_fast_decoders():
        return paced(bare(), SAMPLES)


def paced_within(opened: object) -> Pace:
    with opened as stream:  # type: ignore[attr-defined]
        return paced(stream)


def encoded_images(loaders: Loaders) -> list[bytes]:
    """The image files of the shards, in memory."""
    counts = np.array([shard.samples for shard in loaders.dataset.shards])
    order = Order(loaders.dataset.order_key, 0, counts, window_shards=len(counts))
    found = []
    with opened_node(loaders.folder, loaders.dataset, order) as shards:
        for number in range(len(counts)):
            slot = shards.shard(number, lambda: False)
            assert slot is not None
            data = slot.path.read_bytes()
            found += [data[start : start + size] for start, size, *_ in slot.rows.tolist()]
    return found


def dataset_of(folder: Path) -> Dataset:
    return read_dataset(open_storage(str(folder)))


def parameter_only(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Read a parameter-only set, and give 64 normals and parameters for `painting`."""
    loaders = Loaders(folder, None)
    best = min(paced_within(loaders.ours()).clock for _ in range(3))
    table(
        f"parameters alone, {WORKERS} worker, batch {BATCH}",
        "ms/image",
        [("trainer", best * 1e3, f"{1 / best:,.0f} samples/s")],
    )
    with loaders.ours() as stream:
        theta = next(stream).theta.clone()
    return torch.randint(256, (BATCH, SIZE_PX, SIZE_PX, 3), dtype=torch.uint8), theta


def painting(given: tuple[torch.Tensor, torch.Tensor]) -> None:
    """What rendering parameters on this device costs beside decoding their images."""
    normals, theta = given
    table(
        f"paint, batch {BATCH}, {SIZE_PX} x {SIZE_PX}, {torch.get_num_threads()} threads",
        "ms/image",
        [("in pieces", seconds(lambda: paint(normals, theta), 2) / BATCH * 1e3, "")],
    )


def seeking() -> None:
    """The order of a simulated epoch of 10^9 samples: what finding a position takes."""
    counts = train_counts(np.full(10**6, 1000), holdout=512)
    tracemalloc.start()
    start = time.perf_counter()
    order = Order("0" * 64, 0, counts, DEFAULT_WINDOW_SHARDS)
    order.samples(7 * 10**9 + 123_456_789, 7 * 10**9 + 123_456_789 + 256)
    first = time.perf_counter() - start
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    again = seconds(lambda: order.samples(7 * 10**9 + 923_456_789, 7 * 10**9 + 923_457_045), 3)
    print(
        f"seek in 10^9 samples, 10^6 shards: {first:.2f} s at first, {again * 1e3:.1f} ms "
        f"from then on, {(counts.nbytes + peak) / 1e6:.0f} MB at most"
    )


def rendering() -> None:
    """Forward and backward of f_ano, in cache-sized pieces (the trainer's way) and at once."""
    torch.manual_seed(0)
    outputs = torch.randn(BATCH, 271, requires_grad=True)
    normal = torch.rand(BATCH, 3, 128, 128) * 2 - 1
    coordinates = render.pixel_coordinates(128, 128)

    def step() -> None:
        render.render(normal, heads(outputs, 3), coordinates).square().mean().backward()

    pieces = seconds(step, 3)
    before, render.CHUNK_VALUES["cpu"] = render.CHUNK_VALUES["cpu"], 2**40
    whole = seconds(step, 3)
    render.CHUNK_VALUES["cpu"] = before
    table(
        f"f_ano forward and backward, batch {BATCH}, 128 x 128, {torch.get_num_threads()} threads",
        "ms/image",
        [
            ("in pieces, rendered again in backward", pieces / BATCH * 1e3, ""),
            ("the whole batch at once", whole / BATCH * 1e3, ""),
        ],
    )


if __name__ == "__main__":
    main()
