"""The trainer's data path against plain webdataset, and its renderer in pieces and whole."""

import tempfile
from pathlib import Path

import numpy as np
import torch
import webdataset

from builder.artifacts import parse_model
from builder.build import build
from builder.demo import make_demo_data
from builder.images import decode_pixels
from builder.recipe import Recipe, load_recipe
from builder.shards import read_samples
from builder.sources import find_source
from builder.storage import open_storage
from tests.benchmarks.timing import seconds, table
from trainer import render
from trainer.dataset import read_dataset
from trainer.losses import heads
from trainer.shards import ShardSamples, index_samples

SAMPLES = 512
BATCH = 64


def main() -> None:
    """Build 512 samples of 224 x 224 and read them in one process; render 64 at 128 px."""
    with tempfile.TemporaryDirectory() as name:
        loading(Path(name))
    rendering()


def loading(root: Path) -> None:
    """Milliseconds a sample from shard to batch of tensors, one process, files in the cache."""
    make_demo_data(root / "demo", train=10, good=1, per_defect=1)
    changed = {**load_recipe("paper").model_dump(), "samples": SAMPLES, "samples_per_shard": 256}
    source = find_source("demo", root / "demo", None)
    build(parse_model(Recipe, changed, "bench"), source, root / "data", jobs=2)
    dataset = read_dataset(root / "data")
    samples = ShardSamples(root / "data", dataset, index_samples(root / "data", dataset))
    order = np.random.default_rng(0).permutation(SAMPLES)
    batches = [order[i : i + BATCH].tolist() for i in range(0, SAMPLES, BATCH)]
    storage = open_storage(str(root / "data"))
    images = [
        members["webp"]
        for shard in dataset.shards
        for _, members in read_samples(storage, shard.name, map("{:09d}".format, order))
    ]

    def plain_webdataset() -> None:
        urls = [str(root / "data" / shard.name) for shard in dataset.shards]
        stream = webdataset.WebDataset(urls, shardshuffle=False).decode("torchrgb")
        for _ in stream.to_tuple("webp", "theta.npy").batched(BATCH):
            pass

    rows = [
        ("trainer, any order", lambda: [samples.batch(batch) for batch in batches], ""),
        ("webdataset, in file order", plain_webdataset, 'decode("torchrgb"), batched'),
        ("decoding alone", lambda: [decode_pixels(image, 3) for image in images], "the floor"),
    ]
    table(
        "from shard to batch, WebP 224 x 224, one process",
        "ms/image",
        [(name, seconds(work, 3) / SAMPLES * 1e3, remark) for name, work, remark in rows],
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
