"""Codecs, and the builder end to end against a naive one (NumPy + PNG + webdataset.ShardWriter)."""

import io
import tempfile
import time
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from builder.artifacts import parse_model
from builder.build import build
from builder.demo import make_demo_data
from builder.images import decode_pixels, encode_pixels
from builder.prior import draw
from builder.recipe import Recipe, load_recipe
from builder.sources import find_source
from builder.workers import usable_cores
from tests import naive
from tests.benchmarks.timing import seconds, table

SAMPLES = 3000
FEW = 60


def main() -> None:
    """Build demo photographs once; time codecs and builds on them."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_demo_data(root / "demo", train=20, good=1, per_defect=1)
        source = find_source("demo", root / "demo", None)
        photographs = [
            np.asarray(Image.open(one.path).resize((224, 224))) for one in source.photographs
        ]
        codecs(photographs)
        end_to_end(root, photographs)


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


def end_to_end(root: Path, photographs: list[np.ndarray]) -> None:
    """Core time an image of whole builds; start-up and preparation included."""
    cores = usable_cores()
    source = find_source("demo", root / "demo", None)
    rows = []
    for codec in ("webp", "jpeg"):
        for jobs in sorted({1, cores}):
            changed = {"samples": SAMPLES, "samples_per_shard": 500, "codec": codec}
            recipe = parse_model(Recipe, {**load_recipe("fine").model_dump(), **changed}, "bench")
            start = time.perf_counter()
            build(recipe, source, root / f"{codec}-{jobs}", jobs=jobs)
            spent = time.perf_counter() - start
            remark = f"{SAMPLES / spent:.0f} images/s"
            rows.append(
                (f"builder {codec}, {jobs} processes", jobs * spent / SAMPLES * 1e3, remark)
            )
    start = time.perf_counter()
    naive_build(root, photographs)
    spent = time.perf_counter() - start
    rows.append(("NumPy + PNG + ShardWriter", spent / FEW * 1e3, f"{FEW / spent:.0f} images/s"))
    table(f"build of {SAMPLES} samples, recipe 'fine'", "core-ms", rows)


def naive_build(root: Path, photographs: list[np.ndarray]) -> None:
    """What one writes first."""
    normal_index, theta = draw(load_recipe("fine"), 0, FEW, len(photographs))
    with webdataset.ShardWriter(str(root / "naive-%06d.tar"), verbose=0) as writer:
        for i in range(FEW):
            image = naive.render(photographs[normal_index[i]], theta[i])
            file = io.BytesIO()
            Image.fromarray(image).save(file, format="PNG")
            writer.write({"__key__": f"{i:09d}", "png": file.getvalue(), "theta.npy": theta[i]})


if __name__ == "__main__":
    main()
