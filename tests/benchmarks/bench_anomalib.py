"""The complete PaDiM of anomalib beside ours: photographs to maps, same weights and dimensions.

`python -m tests.benchmarks anomalib --data FOLDER_OF_A_CATEGORY [--weights MOBILENET_V2]`

Our tensors go into its PadimModel, our random dimensions into its `idx`; its own `fit()` and its
own forward in eval mode do the rest. We use the protocol `anomalib` (its epsilon, its border). Each
side runs in a process of its own, on one thread. Differences that remain are named by changing one
thing at a time on our side, and by a float64 reference with an explicit inverse at some positions.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from evaluator.gaussians import repeated_index
from tests import naive
from tests.benchmarks.memory import forget_peak, peak_bytes

BATCH = 32  # anomalib's default
DIMS = 100
CORNER = 8  # rows and columns of the grid that the reference scores
NETWORKS = {
    "resnet18": ("layer1", "layer2", "layer3"),
    "mobilenet_v2": ("features.3", "features.6", "features.13"),
}


def main(arguments: tuple[str, ...] = ()) -> None:
    """Print the table for each category and network."""
    parser = argparse.ArgumentParser(prog="anomalib", description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="*", default=[], help="folders like bottle/")
    parser.add_argument("--weights", type=Path, help="MobileNetV2, .safetensors, torchvision keys")
    options = parser.parse_args(arguments)
    if not options.data:
        print("\nPaDiM of anomalib, complete: left out (it needs --data FOLDER_OF_A_CATEGORY)")
        return
    if importlib.util.find_spec("anomalib") is None:
        print("\nPaDiM of anomalib, complete: left out (install the extra `bench`)")
        return
    for data in options.data:
        compare(data, "resnet18", None)
        if options.weights:
            compare(data, "mobilenet_v2", options.weights)


def compare(data: Path, arch: str, weights: Path | None) -> None:
    """Run both sides and print how far they agree."""
    print(
        f"\nPaDiM complete on {data.name}: {arch}, {weights.name if weights else 'random weights'}"
    )
    with tempfile.TemporaryDirectory() as folder:
        rows = {}
        for side in ("evaluator", "anomalib"):
            rows[side] = run(data, arch, weights, side, Path(folder))
        found = {side: dict(np.load(Path(folder) / f"{side}.npz")) for side in rows}
    print(
        f"  {'':<10} {'pixel AUROC':>12} {'image AUROC':>12} {'CPU s':>8} {'wall s':>8} {'GB':>6}"
    )
    for side, row in rows.items():
        print(
            f"  {side:<10} {row['pixel_auroc']:12.6f} {row['image_auroc']:12.6f} "
            f"{row['cpu_s']:8.2f} {row['wall_s']:8.2f} {row['peak'] / 1e9:6.2f}   {row['parts']}"
        )
    ours, theirs = found["evaluator"], found["anomalib"]
    print("  relative difference to anomalib's maps:        median   largest")
    for name in ("maps", "epsilon 0.01", "border reflect"):
        label = "protocol anomalib" if name == "maps" else f"the same, but {name}"
        print(f"    {label:<38} {spread(ours[name], theirs['maps'])}")
    print(f"    {'distances, before upsampling':<38} {spread(ours['grid'], theirs['grid'])}")
    print("  relative difference to float64 with an explicit inverse, a corner of the grid:")
    for side, values in found.items():
        corner = values["grid"][:, :CORNER, :CORNER]
        print(f"    {side:<38} {spread(corner, ours['reference'])}")


def spread(found: np.ndarray, expected: np.ndarray) -> str:
    """Median and largest relative difference."""
    relative = np.abs(found.astype(np.float64) - expected) / expected
    return f"{np.median(relative):9.1e} {relative.max():9.1e}"


def run(data: Path, arch: str, weights: Path | None, side: str, folder: Path) -> dict:
    """Start one side in a fresh interpreter on one thread and read its one line."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    module = "tests.benchmarks.bench_anomalib"
    options = [str(data), arch, str(weights or ""), side, str(folder)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", module, *options],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def photographs(data: Path):
    """(train, test) float32 tensors [images, 3, size, size] in [-1, 1], and masks bool."""
    import torch

    from evaluator.images import load_image, load_mask
    from evaluator.protocols import PROTOCOLS

    protocol = PROTOCOLS["anomalib"]
    train = sorted((data / "train" / "good").iterdir())
    test = sorted(path for path in (data / "test").glob("*/*") if path.is_file())
    masks = np.zeros((len(test), protocol.size_px, protocol.size_px), bool)
    for index, path in enumerate(test):
        truth = data / "ground_truth" / path.parent.name / f"{path.stem}_mask.png"
        if truth.is_file():
            masks[index] = load_mask([truth], protocol)
    tensors = []
    for paths in (train, test):
        pixels = np.stack([load_image(path, protocol) for path in paths])
        tensors.append(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1)
    return *tensors, masks


def network(arch: str, weights: str):
    """The classifier of torchvision with `weights`, or with random ones, the same every time."""
    import torch
    import torchvision
    from safetensors.torch import load_file

    torch.manual_seed(0)
    if not weights:
        return getattr(torchvision.models, arch)(weights=None).eval()
    state = load_file(weights)
    classes = state["classifier.1.bias"].shape[0]
    model = getattr(torchvision.models, arch)(weights=None, num_classes=classes)
    model.load_state_dict(state)
    return model.eval()


def chosen_dims(channels: int) -> list[int]:
    from evaluator.padim import draw_dims

    return draw_dims(channels, DIMS, seed=0)


def theirs(model, arch: str, train, test):
    """anomalib's PadimModel with our dimensions; (maps, distances, seconds of its parts)."""
    import torch
    from anomalib.models.image.padim.torch_model import PadimModel

    padim = PadimModel(model, list(NETWORKS[arch]), pre_trained=False, n_features=DIMS)
    padim.idx = torch.tensor(chosen_dims(padim.n_features_original))
    padim.train()
    padim.feature_extractor.eval()  # as its lightning module keeps it

    def work():
        clock = [time.perf_counter()]
        for batch in train.split(BATCH):
            padim(batch)
        clock.append(time.perf_counter())
        padim.fit()
        clock.append(time.perf_counter())
        padim.eval()
        maps = torch.cat([padim(batch).anomaly_map for batch in test.split(BATCH)])
        clock.append(time.perf_counter())
        return maps[:, 0].numpy(), np.diff(clock)

    def extra() -> dict[str, np.ndarray]:
        embedding = padim.generate_embedding(padim.feature_extractor(test))
        statistics = [padim.gaussian.mean, padim.gaussian.inv_covariance]
        grid = padim.anomaly_map_generator.compute_distance(embedding, statistics)
        return {"grid": grid[:, 0].numpy()}

    return work, extra, "features {:.1f}, fit {:.1f}, features + score {:.1f} s"


def ours(model, arch: str, train, test):
    """The evaluator on the same tensors."""
    import torch
    from torchvision.models.feature_extraction import create_feature_extractor

    from evaluator.padim import anomaly_maps, score
    from evaluator.plan import make_plan
    from evaluator.protocols import PROTOCOLS
    from tests.array_layers import ArrayLayer

    protocol = PROTOCOLS["anomalib"]
    extractor = create_feature_extractor(model, list(NETWORKS[arch]))
    images = range(len(train) + len(test))
    fitted, tested = images[: len(train)], images[len(train) :]
    kept: dict = {}

    def distances(epsilon: float) -> np.ndarray:
        layers = kept["layers"]
        shapes = [(layer.channels, layer.height, layer.width) for layer in layers]
        dims = [chosen_dims(sum(shape[0] for shape in shapes))]
        plan = make_plan(shapes, dims, len(train), len(test), 2**30, cores=1)
        return score(layers, dims, fitted, tested, epsilon, plan, torch.device("cpu")).distance[0]

    def work():
        clock = [time.perf_counter()]
        found: list[list[np.ndarray]] = [[] for _ in NETWORKS[arch]]
        for batch in [*train.split(BATCH), *test.split(BATCH)]:
            for parts, values in zip(found, extractor(batch).values(), strict=True):
                parts.append(values.permute(0, 2, 3, 1).contiguous().numpy())
        kept["layers"] = []
        for parts in found:
            kept["layers"].append(ArrayLayer(np.concatenate(parts)))
            parts.clear()
        clock.append(time.perf_counter())
        kept["grid"] = distances(protocol.epsilon)
        clock.append(time.perf_counter())
        maps = anomaly_maps(kept["grid"], protocol)
        clock.append(time.perf_counter())
        return maps, np.diff(clock)

    def extra() -> dict[str, np.ndarray]:
        reflect = protocol.model_copy(update={"blur_border": "reflect"})
        return {
            "grid": kept["grid"],
            "epsilon 0.01": anomaly_maps(distances(0.01), protocol),
            "border reflect": anomaly_maps(kept["grid"], reflect),
            "reference": reference(kept["layers"], len(train), protocol.epsilon),
        }

    return work, extra, "features {:.1f}, fit + score {:.1f}, maps {:.1f} s"


def reference(layers, train: int, epsilon: float) -> np.ndarray:
    """float64 distances with an explicit inverse at a corner of the grid."""
    corner = []
    for layer in layers:
        rows = repeated_index(layers[0].height, layer.height)[:CORNER]
        columns = repeated_index(layers[0].width, layer.width)[:CORNER]
        part = layer.values[:, rows][:, :, columns]
        corner.append(part.transpose(0, 3, 1, 2))
    dims = chosen_dims(sum(layer.channels for layer in layers))
    return naive.padim_distances(corner, dims, train, epsilon)


def side(data: Path, arch: str, weights: str, name: str, folder: Path) -> None:
    """Do the work of one side, keep its maps, print its figures as JSON."""
    import torch
    from sklearn.metrics import roc_auc_score

    torch.set_num_threads(1)
    train, test, masks = photographs(data)
    with torch.inference_mode():
        maker = {"evaluator": ours, "anomalib": theirs}[name]
        work, extra, parts = maker(network(arch, weights), arch, train, test)
        forget_peak()
        start = time.process_time(), time.perf_counter()
        maps, seconds = work()
        figures = {
            "cpu_s": time.process_time() - start[0],
            "wall_s": time.perf_counter() - start[1],
            "peak": peak_bytes(),
            "parts": parts.format(*seconds),
            "pixel_auroc": roc_auc_score(masks.ravel(), maps.ravel()),
            "image_auroc": roc_auc_score(masks.any((1, 2)), maps.max((1, 2))),
        }
        np.savez(folder / f"{name}.npz", maps=maps, **extra())
    print(json.dumps(figures))


if __name__ == "__main__":
    side(Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4], Path(sys.argv[5]))
