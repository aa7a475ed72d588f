"""The paper's network for as long as a GPU is at hand: both losses, and what comes back of them.

    python -m tests.benchmarks.wide train --normals DIR --loss direct --minutes 8 --out OUT
    python -m tests.benchmarks.wide restore OUT/direct-*.safetensors --to direct.safetensors
    evaluator padim --data DIR --backbone direct=direct.safetensors,arch=wide_resnet50_2,norm=signed

`train` builds a dataset of parameters alone (recipe `paper`), trains WideResNet-50-2 at 224 px on
images painted on the device, and leaves in OUT layers 1 to 3 in float16, in files of at most 15 MB,
the run's metrics, and LOSS.json: images/s, share of the device's peak, and how long the paper's 50
million images would take. A trial anywhere: --arch resnet18 --size 32 --samples 600 --steps 5.

`restore` joins the files to float32 weights that the evaluator opens; layer 4, which PaDiM does not
read, is random.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from tests.benchmarks.gpu import device_name, peak
from trainer.metrics import read_metrics
from trainer.models import build_model

PART_BYTES = 15 * 10**6
PAPER_IMAGES = 50 * 10**6
LEFT_OUT = ("layer4.", "fc.")


def main(words: list[str] | None = None) -> None:
    """Train, or restore."""
    options = parse(words)
    if options.what == "restore":
        restore(options.files, options.to, options.arch)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="semiformula-wide-", dir=options.work) as name:
        print(json.dumps(train(Path(name), options), indent=1))


def parse(words: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
    one = commands.add_parser("train")
    one.add_argument("--normals", required=True)
    one.add_argument("--loss", choices=["direct", "indirect", "sum"], required=True)
    one.add_argument("--out", type=Path, required=True)
    duration = one.add_mutually_exclusive_group(required=True)
    duration.add_argument("--minutes", type=float)
    duration.add_argument("--steps", type=int)
    one.add_argument("--arch", default="wide_resnet50_2")
    one.add_argument("--size", type=int, default=224)
    one.add_argument("--samples", type=int, default=200_000)
    one.add_argument("--batch-size", type=int, default=64)
    one.add_argument("--device", default="auto")
    one.add_argument("--work", type=Path, help="Folder for the dataset; default: the system's.")
    two = commands.add_parser("restore")
    two.add_argument("files", type=Path, nargs="+")
    two.add_argument("--to", type=Path, required=True)
    two.add_argument("--arch", default="wide_resnet50_2")
    return parser.parse_args(words)


def train(root: Path, options: argparse.Namespace) -> dict[str, object]:
    """Build, train, keep layers 1 to 3; returns what LOSS.json holds."""
    run, out = root / "run", options.out
    duration = ["--minutes", str(options.minutes)]
    if options.steps is not None:
        duration = ["--steps", str(options.steps)]
    command(
        *("builder", "build", "paper", "--normals", options.normals, "--images", "none"),
        *("--samples", str(options.samples), "--out", str(root / "dataset")),
    )
    command(
        *("trainer", "pretrain", "--data", str(root / "dataset"), "--out", str(run)),
        *("--loss", options.loss, "--arch", options.arch, "--size", str(options.size)),
        *("--batch-size", str(options.batch_size), "--device", options.device, *duration),
    )
    shutil.copy(run / "metrics.jsonl", out / f"{options.loss}-metrics.jsonl")
    backbone = json.loads((run / "backbone.json").read_text(encoding="utf-8"))
    keep(load_file(run / "backbone.safetensors"), out, options.loss)
    rate = images_per_s(run)
    name = device_name(options.device)
    most = peak(name)
    flops = 3 * forward_flops(options.arch, options.size)  # backward: twice the forward
    said = {
        "device": name,
        "arch": options.arch,
        "loss": options.loss,
        "training": backbone["training"],
        "metrics": backbone["metrics"],
        "dataset": backbone["dataset"],
        "images_per_s": rate,
        "share_of_peak": None if most is None else rate * flops / most,
        "days_for_50_million_images": PAPER_IMAGES / rate / 86400,
    }
    (out / f"{options.loss}.json").write_text(json.dumps(said, indent=1), encoding="utf-8")
    return said


def command(*words: str) -> None:
    """Run one of the commands; its output is ours."""
    subprocess.run([sys.executable, "-m", *words], check=True)


def images_per_s(run: Path) -> float:
    """The median rate of the run's lines: the first ones, which warm up, weigh little."""
    rates = sorted(line["images_per_s"] for line in read_metrics(run) if line["kind"] == "train")
    return float(rates[len(rates) // 2])


def forward_flops(arch: str, size: int) -> float:
    """FLOPs of one image through the network, of which a multiplication and an addition are two."""
    model = build_model(arch, 271).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, size, size))
    return float(counter.get_total_flops())


def keep(state: dict[str, torch.Tensor], out: Path, loss: str) -> None:
    """Write stem and layers 1 to 3 in float16 to LOSS-NN.safetensors, none above PART_BYTES."""
    parts: list[dict[str, torch.Tensor]] = [{}]
    room = PART_BYTES
    for key, value in state.items():
        if key.startswith(LEFT_OUT):
            continue
        half = value.half() if value.is_floating_point() else value
        if not bool(torch.isfinite(half.float()).all()):
            raise SystemExit(f"{key}: does not fit float16")
        if half.nbytes > room and parts[-1]:
            parts.append({})
            room = PART_BYTES
        parts[-1][key] = half.contiguous()
        room -= half.nbytes
    for number, part in enumerate(parts):
        save_file(part, out / f"{loss}-{number:02d}.safetensors")


def restore(files: list[Path], to: Path, arch: str) -> None:
    """Join the parts to a file that `evaluator padim` opens."""
    torch.manual_seed(0)
    state = build_model(arch, 1).state_dict()
    found = {key: value for path in files for key, value in load_file(path).items()}
    wanted = {key for key in state if not key.startswith(LEFT_OUT)}
    if found.keys() != wanted:
        odd = sorted(found.keys() ^ wanted)[0]
        raise SystemExit(f"{files[0].parent}: {odd!r} is missing or too much; give all parts")
    state |= {key: value.to(state[key].dtype) for key, value in found.items()}
    save_file({key: value.contiguous() for key, value in state.items()}, to)
    print(f"{to}: {len(found)} tensors of {len(files)} files; layer 4 is random")


if __name__ == "__main__":
    main()
