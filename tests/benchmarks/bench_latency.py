"""Milliseconds a photograph at 224 px on two threads: ours against anomalib's PadimModel, same run.

The numbers inside the Gaussians do not change the time: ours come from noise (200 images), and
anomalib's inverse covariances are filled in, for its own fit takes minutes and 18 GB.
"""

import io
import itertools
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from evaluator.model import backbone_tensors, is_dual, score
from evaluator.networks import PADIM, Network, build, make_network
from evaluator.padim import draw_dims
from evaluator.protocols import PAPER
from evaluator.scorer import Scorer
from evaluator.whitening import Tables, Tree, make_tables, make_tree
from tests.benchmarks.timing import seconds, table

TRAIN, THREADS, REPEATS = 200, 2, 12
SIZES = {"ResNet-18": "resnet18", "WideResNet-50-2": "wide_resnet50_2"}


def main() -> None:
    """Both sizes; the thread count is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    try:
        for name, arch in SIZES.items():
            one_size(name, arch)
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def one_size(name: str, arch: str) -> None:
    """Print latency and size of one architecture."""
    scorer, our_bytes, load_s = our_scorer(arch)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), np.uint8)
    image = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    outputs = scorer.extractor(image)
    layers = [outputs[key] for key in scorer.names]
    cpu = torch.device("cpu")
    whole = {"evaluator": lambda: score(scorer, pixels, cpu)}
    alone: dict[str, Callable[[], object]] = {"evaluator": lambda: scorer.maps(layers)}
    remarks = {"evaluator": f"model {our_bytes / 1e6:.0f} MB, prepared in {load_s:.1f} s at load"}
    peer = anomalib_model(arch)
    if peer is None:
        print("\nanomalib is not installed: its rows are left out (pip install '.[bench]')")
    else:
        embedding = peer.generate_embedding(peer.feature_extractor(image))
        stats = {"mean": peer.gaussian.mean, "inv_covariance": peer.gaussian.inv_covariance}
        stats |= {"embedding": embedding, "image_size": (224, 224)}
        whole["anomalib PadimModel"] = lambda: peer(image)
        alone["anomalib anomaly_map_generator"] = lambda: peer.anomaly_map_generator(**stats)
        size = saved_bytes(peer)
        remarks["anomalib PadimModel"] = f"model {size / 1e6:.0f} MB (torch.save)"
        print(f"\n{name}: the model is 1/{size / our_bytes:.1f} of anomalib's")
    threads = f"{THREADS} threads, N = {TRAIN}"
    for title, works in (("photograph to map and score", whole), ("features to map", alone)):
        rows = [(key, ms, remarks.get(key, "")) for key, ms in in_turn(works).items()]
        table(f"latency, {name}, {title}, {threads}", "ms", rows)


def in_turn(works: dict[str, Callable[[], object]]) -> dict[str, float]:
    """The least milliseconds of each, run in turn so that a busy machine disturbs all alike."""
    best = dict.fromkeys(works, float("inf"))
    for _ in range(REPEATS):
        for name, work in works.items():
            best[name] = min(best[name], 1e3 * seconds(work, 1))
    return best


def our_scorer(arch: str) -> tuple[Scorer, int, float]:
    """A scorer with Gaussians of noise, the bytes of its model on disk, the seconds to prepare."""
    names, count = PADIM[arch]
    half = (0.5, 0.5, 0.5)
    network = make_network("bench", build(arch), names, half, half, 224, torch.device("cpu"))
    drawn = draw_dims(network.channels, count, 0)
    starts = np.cumsum([0, *(shape[0] for shape in network.shapes)])
    dims = [
        [dim - int(first) for dim in drawn if first <= dim < last]
        for first, last in itertools.pairwise(starts)
    ]
    tree, dual = make_tree([shape[1:] for shape in network.shapes]), is_dual(TRAIN, count)
    rng = np.random.default_rng(0)
    dtype = np.float16 if dual else np.float32
    features = [
        rng.normal(size=(TRAIN, level.cells, len(dims[level.layer]))).astype(dtype)
        for level in tree.levels
    ]
    tables: list[Tables] = []

    def prepare() -> None:
        tables[:] = make_tables(tree, features, PAPER.epsilon, dual)

    load_s = seconds(prepare, 1)
    size_bytes = model_bytes(network, tree, tables, features if dual else None)
    return Scorer(network, dims, tree, tables, PAPER, dual), size_bytes, load_s


def model_bytes(
    network: Network, tree: Tree, tables: list[Tables], features: list[np.ndarray] | None
) -> int:
    """The size of a real file with the tensors of a model."""
    tensors = {f"backbone.{key}": value for key, value in backbone_tensors(network).items()}
    for k in range(len(tree.levels)):
        if features is not None:
            tensors[f"features.{k}"] = torch.from_numpy(features[k])
        else:
            tensors[f"mean.{k}"], tensors[f"whiten.{k}"] = tables[k].mean, tables[k].whiten
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(tensors, path)
        return path.stat().st_size


def anomalib_model(arch: str) -> torch.nn.Module | None:
    """Its PadimModel with random weights, Gaussians filled in; None where it is not installed."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        from anomalib.models.image.padim.torch_model import PadimModel
    except ImportError:
        return None
    names, count = PADIM[arch]
    model = PadimModel(backbone=arch, layers=list(names), pre_trained=False, n_features=count)
    inverse = torch.zeros(56 * 56, count, count)
    inverse.diagonal(dim1=1, dim2=2).fill_(1.0)
    model.gaussian.mean = torch.zeros(count, 56 * 56)
    model.gaussian.inv_covariance = inverse
    return model.eval()


class _Counter(io.RawIOBase):
    """Counts what is written: 3.8 GB need not lie on the disk."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        size = memoryview(data).nbytes  # type: ignore[arg-type]
        self.bytes += size
        return size


def saved_bytes(model: torch.nn.Module) -> int:
    """The length of `torch.save` of a model's state dict."""
    counter = _Counter()
    torch.save(model.state_dict(), counter)
    return counter.bytes


if __name__ == "__main__":
    main()
