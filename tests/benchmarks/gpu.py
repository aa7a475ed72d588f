"""How near the trainer comes to the device's speed: WideResNet-50-2 at 224 px, as in the paper.

    python -m tests.benchmarks.gpu --photographs DIR --out gpu.json      about half an hour on a GPU
    python -m tests.benchmarks.gpu --device cpu --arch resnet18 --size 32 --batch-sizes 8 \\
      --samples 32 --steps 4 --precision fp32                            a trial anywhere

For each loss and batch size: the bare step on synthetic data, then `trainer pretrain` itself on
shards of WebP, of JPEG, on the cache of decoded images, and on parameters without images. The
first pass over the samples is not counted: it fills the cache, and compiles. Share of peak counts
the FLOPs of the network and the loss against the dense bf16 peak of the device.

Bars, on an H200: full trainer 95 % of the bare step; direct 2,500 images/s; indirect 80 % of that.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from builder.artifacts import parse_model
from builder.build import build
from builder.demo import make_demo_data
from builder.recipe import Recipe, load_recipe
from builder.sources import find_source
from trainer.bare import Bare, bare_config, bare_step, known_normals, make_bare
from trainer.dataset import Dataset, read_dataset
from trainer.preflight import settle, try_compiled, verdict, wanted
from trainer.samples import Batch
from trainer.task import on_device

# Dense bf16 without sparsity, from the vendor's data sheets, in FLOP/s; the first match counts.
PEAKS = {
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
}
WARM_UP_STEPS = 5
# What `trainer pretrain` reads: the set, and what else it is told.
PATHS: dict[str, tuple[str, tuple[str, ...]]] = {
    "webp": ("webp", ()),
    "jpeg": ("jpeg", ()),
    "decoded cache": ("webp", ("--cache-decoded", "64GB")),
    "parameters": ("parameters", ()),
}


@dataclass(frozen=True)
class Row:
    """One measurement; shares between 0 and 1, None where they cannot be told."""

    loss: str
    batch_size: int
    path: str
    images_per_s: float
    of_bare: float | None
    of_peak: float | None
    waiting: float | None
    compiled: bool | None


def main(words: list[str] | None = None) -> None:
    """Measure, print a table, and write all of it as JSON."""
    options = parse(words)
    with tempfile.TemporaryDirectory(prefix="semiformula-gpu-", dir=options.work) as name:
        sets = build_sets(Path(name), options)
        rows: list[Row] = []
        for batch_size in options.batch_sizes:
            for loss in options.losses:
                rows += measure(Path(name), sets, loss, batch_size, options)
    report = {
        "device": device_name(options.device),
        "peak_flop_per_s": peak(device_name(options.device)),
        "versions": {name: version(name) for name in ("torch", "torchvision", "numpy")},
        "options": {key: str(value) for key, value in vars(options).items()},
        "rows": [asdict(row) for row in rows],
    }
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report["device"], rows))
    print("\n".join(bars(rows)))


def parse(words: list[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", type=Path, help="normal images; default: the demo's")
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--work", type=Path, help="where the shards are built; default: $TMPDIR")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--arch", default="wide_resnet50_2")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--losses", nargs="+", default=["direct", "indirect"])
    parser.add_argument("--paths", nargs="+", default=list(PATHS), choices=list(PATHS))
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--compile", default="auto", choices=["auto", "measure", "off"])
    parser.add_argument("--samples", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=100, help="measured, after the first pass")
    parser.add_argument("--workers", type=int, default=max(1, len(os.sched_getaffinity(0)) - 2))
    return parser.parse_args(words)


def build_sets(root: Path, options: argparse.Namespace) -> dict[str, Path]:
    """The same samples as WebP, as JPEG, and as parameters alone."""
    photographs = options.photographs
    if photographs is None:
        photographs = root / "photographs"
        make_demo_data(photographs, train=10, good=1, per_defect=1, size_px=256)
    source = find_source(str(photographs), None, None)
    small = {
        "samples": options.samples,
        "samples_per_shard": max(1, min(1000, options.samples // 8)),
        "size_px": options.size,
    }
    jobs = len(os.sched_getaffinity(0))
    sets = {}
    for name in sorted({PATHS[path][0] for path in options.paths}):
        codec = "webp" if name == "parameters" else name
        recipe = {**load_recipe("paper").model_dump(), **small, "codec": codec}
        sets[name] = root / name
        build(
            parse_model(Recipe, recipe, "gpu.py"),
            source,
            sets[name],
            jobs=jobs,
            contents="parameters" if name == "parameters" else "images",
        )
    return sets


def measure(
    root: Path, sets: dict[str, Path], loss: str, batch_size: int, options: argparse.Namespace
) -> list[Row]:
    """The bare step and every path of one loss and batch size."""
    dataset = read_dataset(sets.get("webp") or next(iter(sets.values())))
    bare, flops, compiled = bare_rate(dataset, loss, batch_size, options)
    most = peak(device_name(options.device))

    def row(path: str, rate: float, waiting: float | None, compiled: bool | None) -> Row:
        of_peak = None if most is None else rate * flops / most
        return Row(loss, batch_size, path, rate, rate / bare, of_peak, waiting, compiled)

    rows = [row("bare step", bare, None, compiled)]
    print_row(rows[-1])
    for path in options.paths:
        data, more = PATHS[path]
        out = root / f"run-{loss}-{batch_size}-{data}-{len(more)}"
        rate, waiting, compiled = full_trainer(sets[data], out, loss, batch_size, more, options)
        rows.append(row(path, rate, waiting, compiled))
        print_row(rows[-1])
    return rows


def bare_rate(
    dataset: Dataset, loss: str, batch_size: int, options: argparse.Namespace
) -> tuple[float, float, bool]:
    """Images/s of the trainer's step on a batch that stays on the device, FLOPs, if compiled."""
    device = torch.device(options.device)
    config = bare_config(
        dataset,
        loss=loss,  # type: ignore[arg-type]
        arch=options.arch,
        size_px=options.size,
        batch_size=batch_size,
        precision=options.precision,
    )
    torch.manual_seed(0)
    bare = make_bare(config, dataset, device, compiled=False)
    batch = synthetic(dataset, batch_size, device)
    flops = flops_per_image(bare, batch)
    compiled = False
    if wanted(options.compile, device):
        network: torch.nn.Module = torch.compile(bare.model, dynamic=False)  # type: ignore[assignment]
        part = on_device(bare.task, known_normals(bare, batch))
        found = try_compiled(bare.task, bare.model, network, part)
        compiled, line = verdict(found.right, found.eager_s, found.compiled_s)
        print(f"{loss}, batch {batch_size}: {line}", file=sys.stderr, flush=True)
        bare = replace(bare, net=network if compiled else bare.model)
    for _ in range(WARM_UP_STEPS):
        bare_step(bare, batch)
    settle(device)
    start = time.perf_counter()
    for _ in range(options.steps):
        bare_step(bare, batch)
    settle(device)
    return options.steps * batch_size / (time.perf_counter() - start), flops, compiled


def synthetic(dataset: Dataset, batch_size: int, device: torch.device) -> Batch:
    """Random pixels and parameters within their ranges, on the device."""
    size, channels = dataset.image.size_px, dataset.image.channels
    edge = 0 if dataset.contents == "parameters" else size
    parts = (
        torch.randint(256, (batch_size, edge, edge, channels), dtype=torch.uint8),
        torch.rand(batch_size, dataset.theta.length) * 0.8 + 0.1,
        torch.randint(dataset.normals.count, (batch_size,)),
    )
    images, theta, normal = (part.to(device) for part in parts)
    return Batch(images, theta, normal, torch.arange(batch_size), torch.zeros(3).double())


def flops_per_image(bare: Bare, batch: Batch) -> float:
    """Multiplications and additions of forward, loss and backward, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        bare_step(bare, batch)
    return counter.get_total_flops() / len(batch.index)


def full_trainer(
    data: Path,
    out: Path,
    loss: str,
    batch_size: int,
    more: tuple[str, ...],
    options: argparse.Namespace,
) -> tuple[float, float, bool | None]:
    """Images/s and share of waiting of `trainer pretrain` after its first pass; if compiled."""
    steps = math.ceil(options.samples / batch_size) + options.steps
    words = ["--data", data, "--out", out, "--loss", loss, "--arch", options.arch]
    words += ["--size", options.size, "--batch-size", batch_size, "--steps", steps]
    words += ["--precision", options.precision, "--device", options.device, "--holdout", 1]
    words += ["--workers", options.workers, "--checkpoint-every", steps, "--lr", 1e-4, *more]
    words += ["--compile", options.compile]
    run = subprocess.run(
        [sys.executable, "-m", "trainer", "pretrain", *map(str, words)],
        capture_output=True,
        text=True,
    )
    if run.returncode:
        sys.exit(f"`trainer pretrain {' '.join(map(str, words))}` failed:\n{run.stderr}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    counted = [line for line in train if line["step"] > steps - options.steps] or train[-1:]
    images = sum(line["steps"] for line in counted) * batch_size
    seconds = sum(line["steps"] * batch_size / line["images_per_s"] for line in counted)
    waited = sum(
        line["data_wait"] * line["steps"] * batch_size / line["images_per_s"] for line in counted
    )
    compiled = json.loads((out / "run.json").read_text()).get("compiled")
    return images / seconds, waited / seconds, compiled


def device_name(device: str) -> str:
    """The GPU's name, or the number of cores."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{len(os.sched_getaffinity(0))} CPU cores"


def peak(name: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name; None where the table has none.

    >>> peak("NVIDIA H200")
    989000000000000.0
    """
    return next((flops for part, flops in PEAKS.items() if part in name), None)


HEAD = f"{'loss':<10}{'batch':>6}  {'path':<14}{'images/s':>10}{'of bare':>9}{'of peak':>9}"
HEAD += f"{'waiting':>9}  compiled"


def print_row(row: Row) -> None:
    """As soon as it is measured, for people who wait."""
    print(line_of(row), file=sys.stderr, flush=True)


def line_of(row: Row) -> str:
    """One line of the table."""
    shares = "".join(
        f"{'-' if share is None else f'{100 * share:.1f} %':>9}"
        for share in (row.of_bare, row.of_peak, row.waiting)
    )
    compiled = {True: "yes", False: "no", None: "-"}[row.compiled]
    return (
        f"{row.loss:<10}{row.batch_size:>6}  {row.path:<14}{row.images_per_s:>10.1f}{shares}  "
        f"{compiled}"
    )


def table(device: Any, rows: list[Row]) -> str:
    """All measurements, for people."""
    return "\n".join([f"\n{device}, torch {version('torch')}", HEAD, *map(line_of, rows)])


def bars(rows: list[Row]) -> list[str]:
    """What the bars come to: worst path against the bare step, direct alone, indirect to direct."""
    full = [row for row in rows if row.path != "bare step"]
    said = []
    if full:
        worst = min(full, key=lambda row: row.of_bare or 0)
        share = 100 * (worst.of_bare or 0)
        said.append(
            f"least share of the bare step: {share:.1f} % ({worst.loss}, batch "
            f"{worst.batch_size}, {worst.path}); bar 95 %"
        )
    best = {
        loss: max((row.images_per_s for row in full if row.loss == loss), default=0.0)
        for loss in ("direct", "indirect")
    }
    if best["direct"]:
        said.append(f"direct: {best['direct']:.0f} images/s; bar 2,500 on an H200")
    if all(best.values()):
        said.append(
            f"indirect: {100 * best['indirect'] / best['direct']:.1f} % of direct; bar 80 %"
        )
    return said


if __name__ == "__main__":
    start = time.monotonic()
    main()
    print(f"{(time.monotonic() - start) / 60:.1f} minutes")
