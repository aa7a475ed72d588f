"""Codecs, one shard against its parts, and whole builds against a naive one.

The naive builder is what one writes first: NumPy, Pillow's default PNG, webdataset.ShardWriter.
"""

import io
import tempfile
import time
from pathlib import Path

import numba
import numpy as np
import webdataset
from PIL import Image

from builder.artifacts import parse_model
from builder.build import build
from builder.demo import make_demo_data
from builder.images import decode_pixels, encode_pixels
from builder.plan import make_plan
from builder.prior import draw
from builder.recipe import Recipe, load_recipe
from builder.render import render
from builder.scratch import normals_table
from builder.sources import Source, find_source
from builder.storage import open_storage
from builder.work import build_shard, local_engine, work
from builder.workers import usable_cores
from tests import naive
from tests.benchmarks.timing import seconds, table

SAMPLES = 4000
SHARD = 500
FEW = 60


def main() -> None:
    """Build demo photographs once; time codecs, one shard and whole builds on them."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_demo_data(root / "demo", train=20, good=1, per_defect=1)
        source = find_source("demo", root / "demo", None)
        photographs = [
            np.asarray(Image.open(one.path).resize((224, 224))) for one in source.photographs
        ]
        codecs(photographs)
        for codec in ("webp", "jpeg"):
            one_shard(root, source, codec)
        whole_builds(root, source, photographs)


def codecs(photographs: list[np.ndarray]) -> None:
    """Encode and decode time and size of each codec on photographs of 224 x 224."""
    rows = []
    for codec in ("webp", "png", "jpeg"):
        encoded = [encode_pixels(one, codec) for one in photographs]
        decode = seconds(lambda e=encoded: [decode_pixels(one, 3) for one in e], 3)
        encode = seconds(lambda c=codec: [encode_pixels(one, c) for one in photographs], 3)
        size = sum(map(len, encoded)) / len(encoded) / 1e3
        remark = f"decode {decode / len(encoded) * 1e3:.2f} ms, {size:.0f} kB"
        rows.append((f"encode {codec}", encode / len(encoded) * 1e3, remark))
    table("codecs, 224 x 224 RGB, one core", "ms/image", rows)


def recipe_of(**changes: object) -> Recipe:
    """The `paper` recipe in small."""
    small = {"samples": SAMPLES, "samples_per_shard": SHARD, **changes}
    return parse_model(Recipe, {**load_recipe("paper").model_dump(), **small}, "bench")


def one_shard(root: Path, source: Source, codec: str) -> None:
    """Core time of a shard (draw, render, encode, tar, hash, commit) against kernel + encoder."""
    numba.set_num_threads(1)
    recipe = recipe_of(codec=codec, samples=SHARD)
    out = root / f"shard-{codec}"
    plan = make_plan(open_storage(str(out)), recipe, source, jobs=1)
    record = out / f"records/train-00000-of-{plan.shard_count:05d}.json"

    def whole() -> None:
        record.unlink(missing_ok=True)
        assert build_shard(str(out), 0, False).built

    images = np.empty((SHARD, 224, 224, 3), np.uint8)
    clock = time.process_time
    with normals_table(open_storage(str(out)), plan.normals, recipe) as table_of_normals:
        normals = table_of_normals.pixels
        normal_index, theta = draw(recipe, 0, SHARD, len(normals))
        kernel = seconds(lambda: render(normals, normal_index, theta, images), 5, clock)
        encoder = seconds(lambda: [encode_pixels(one, codec) for one in images], 5, clock)
        shard = seconds(whole, 5, clock)
    table(
        f"core time of a shard of {SHARD}, recipe 'paper', {codec}",
        "ms/image",
        [
            ("kernel + encoder", (kernel + encoder) / SHARD * 1e3, "what cannot be saved"),
            ("the shard, from draw to commit", shard / SHARD * 1e3, "bar x1.1"),
            ("kernel alone", kernel / SHARD * 1e3, ""),
            (f"encoder alone ({codec})", encoder / SHARD * 1e3, ""),
        ],
    )


def whole_builds(root: Path, source: Source, photographs: list[np.ndarray]) -> None:
    """Core time an image of the work of whole builds, start of the processes included."""
    rows = []
    for codec in ("webp", "jpeg"):
        for jobs in sorted({1, usable_cores()}):
            out = root / f"{codec}-{jobs}"
            make_plan(open_storage(str(out)), recipe_of(codec=codec), source, jobs=jobs)
            spent = work(str(out), "0/1", local_engine(jobs)).seconds
            remark = f"{SAMPLES / spent:.0f} images/s"
            rows.append((f"work, {codec}, {jobs} processes", jobs * spent / SAMPLES * 1e3, remark))
    start = time.perf_counter()
    build(recipe_of(), source, root / "parameters", jobs=usable_cores(), contents="parameters")
    spent = time.perf_counter() - start
    rows.append(("build --images none", usable_cores() * spent / SAMPLES * 1e3, ""))
    start = time.perf_counter()
    naive_build(root, photographs)
    spent = time.perf_counter() - start
    rows.append(("NumPy + PNG + ShardWriter", spent / FEW * 1e3, f"{FEW / spent:.0f} images/s"))
    table(f"{SAMPLES} samples, recipe 'paper'", "core-ms", rows)


def naive_build(root: Path, photographs: list[np.ndarray]) -> None:
    """What one writes first."""
    normal_index, theta = draw(load_recipe("paper"), 0, FEW, len(photographs))
    with webdataset.ShardWriter(str(root / "naive-%06d.tar"), verbose=0) as writer:
        for i in range(FEW):
            image = naive.render(photographs[normal_index[i]], theta[i])
            file = io.BytesIO()
            Image.fromarray(image).save(file, format="PNG")
            writer.write({"__key__": f"{i:09d}", "png": file.getvalue(), "theta.npy": theta[i]})


if __name__ == "__main__":
    main()
