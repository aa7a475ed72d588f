"""The model that inspects new parts: two files. MODEL.md is its spec page."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator

from evaluator import conformal
from evaluator.artifacts import (
    Model,
    Sha256,
    read_json,
    sha256_of,
    sha256_of_file,
    write_bytes,
    write_json,
)
from evaluator.errors import EvaluatorError
from evaluator.networks import Network, build, make_network
from evaluator.protocols import Protocol, protocol_sha256
from evaluator.report import BackboneRecord
from evaluator.scorer import Scorer
from evaluator.whitening import Tables, Tree, make_tables, make_tree, table_shapes

JSON_FILE = "model.json"
TENSORS_FILE = re.compile(r"model-[0-9a-f]{12}\.safetensors")
MAX_TENSORS_BYTES = 16 * 2**30
MAX_SCORES = 1_000_000
MAX_SEED = 2**63 - 1
LEAST_STD = 1e-6  # of pixels in [0, 1]; float32 turns far smaller ones to 0
NOT_FINITE = "scores are not finite; are the weights, --mean or --std damaged or wrong?"
DTYPES = {torch.float16: "F16", torch.float32: "F32"}

Form = Literal["features", "factors"]
Score = Annotated[float, Field(ge=0)]


class LayerRecord(Model):
    """One layer of the backbone, and the channels of it that are used, ascending."""

    name: str
    channels: int = Field(ge=1)
    height: int = Field(ge=1)
    width: int = Field(ge=1)
    dims: list[Annotated[int, Field(ge=0)]] = Field(min_length=1)

    @model_validator(mode="after")
    def _ascending(self) -> Self:
        if sorted(set(self.dims)) != self.dims or self.dims[-1] >= self.channels:
            raise ValueError("dims must be ascending channels of the layer, each once")
        return self


class Photographs(Model):
    """What the model was made from; the hash covers names and bytes of all of them."""

    fitted: int = Field(ge=2)
    held_out: int = Field(ge=1)
    duplicates: int = Field(ge=0, description="byte for byte another one's copies, left out")
    sha256: Sha256


class Calibration(Model):
    """The scores of the held-out photographs, ascending, and what follows from them."""

    false_reject_rate: float = Field(gt=0, lt=1)
    threshold: Score
    scores: list[Score] = Field(min_length=1, max_length=MAX_SCORES)

    @model_validator(mode="after")
    def _follows(self) -> Self:
        rank = conformal.rank_of_threshold(len(self.scores), self.false_reject_rate)
        if self.scores != sorted(self.scores):
            raise ValueError("scores must be ascending")
        if rank > len(self.scores) or self.threshold != self.scores[rank - 1]:
            raise ValueError("threshold must be the ceil((n + 1)(1 - rate))-th smallest of scores")
        return self


class TensorsFile(Model):
    """The file beside model.json."""

    file: str = Field(pattern=f"^{TENSORS_FILE.pattern}$", description="begins as sha256 does")
    bytes: int = Field(ge=8, le=MAX_TENSORS_BYTES)
    sha256: Sha256

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.file != tensors_file(self.sha256):
            raise ValueError("file must be model-, the first 12 digits of sha256, .safetensors")
        return self


class PadimModel(Model):
    """`model.json`."""

    format: Literal["semiformula-padim"]
    format_version: Literal[1]
    evaluator_version: str
    versions: dict[str, str]
    protocol: Protocol
    protocol_sha256: Sha256
    seed: int = Field(
        ge=0, le=MAX_SEED, description="of the random dimensions and of the held-out share"
    )
    backbone: BackboneRecord
    layers: list[LayerRecord] = Field(min_length=1)
    form: Form
    photographs: Photographs
    calibration: Calibration
    tensors: TensorsFile

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.protocol_sha256 != protocol_sha256(self.protocol):
            raise ValueError("protocol_sha256 is not that of protocol")
        if min(self.backbone.std) < LEAST_STD:
            raise ValueError(f"backbone.std must be at least {LEAST_STD:g}")
        if [layer.name for layer in self.layers] != self.backbone.layers:
            raise ValueError("layers must be those of backbone, in the same order")
        if sum(len(layer.dims) for layer in self.layers) != self.backbone.dims:
            raise ValueError("layers must hold as many dims as backbone says")
        if self.photographs.held_out != len(self.calibration.scores):
            raise ValueError("photographs.held_out must be the number of calibration.scores")
        return self


@dataclass(frozen=True)
class Inspector:
    """A loaded model, ready to score."""

    record: PadimModel
    scorer: Scorer
    device: torch.device

    @property
    def threshold(self) -> float:
        """Scores above it are rejected."""
        return self.record.calibration.threshold

    def __call__(
        self, pixels: npt.NDArray[np.uint8]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Maps [images, size, size] and scores [images] of uint8 [images, size, size, 3]."""
        return score(self.scorer, pixels, self.device)


def score(
    scorer: Scorer, pixels: npt.NDArray[np.uint8], device: torch.device
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Maps [images, size, size], scores [images] of photographs uint8 [images, size, size, 3]."""
    with torch.inference_mode():
        images = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 255
        maps, scores = scorer(images)
        return maps.cpu().numpy(), scores.cpu().numpy()


def are_finite(
    maps: npt.NDArray[np.float32], scores: npt.NDArray[np.float32]
) -> npt.NDArray[np.bool_]:
    """Which of the photographs can be judged, bool [images]: not-a-number is above no threshold."""
    finite: npt.NDArray[np.bool_] = np.isfinite(scores) & np.isfinite(maps).all(axis=(1, 2))
    return finite


def is_dual(images: int, dims: int) -> bool:
    """Whether the features themselves are the smaller exact form: fewer images than dimensions."""
    return images - 1 < dims


def tree_of(layers: Sequence[LayerRecord]) -> Tree:
    """The levels of the layers, coarsest first."""
    return make_tree([(layer.height, layer.width) for layer in layers])


def backbone_tensors(network: Network) -> dict[str, torch.Tensor]:
    """The weights that the layers need, by torchvision's names; counters of batches left out."""
    return {
        key: value.detach().cpu().float().contiguous()
        for key, value in network.extractor.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }


def expected_tensors(
    record: PadimModel, network: Network
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name, type and shape of every tensor of the file."""
    expected = {
        f"backbone.{key}": (torch.float32, tuple(value.shape))
        for key, value in backbone_tensors(network).items()
    }
    tree, fitted = tree_of(record.layers), record.photographs.fitted
    dims = [len(record.layers[level.layer].dims) for level in tree.levels]
    if record.form == "features":
        for level, size in zip(tree.levels, dims, strict=True):
            expected[f"features.{level.layer}"] = (torch.float16, (fitted, level.cells, size))
        return expected
    for level, (mean, whiten, _) in zip(
        tree.levels, table_shapes(tree, dims, fitted, dual=False), strict=True
    ):
        expected[f"mean.{level.layer}"] = (torch.float32, mean)
        expected[f"whiten.{level.layer}"] = (torch.float32, whiten)
    return expected


def make_scorer(
    network: Network,
    layers: Sequence[LayerRecord],
    protocol: Protocol,
    dual: bool,
    tables: Sequence[Tables],
) -> Scorer:
    """The scorer of a network and its tables, which are in the order of the tree's levels."""
    dims = [layer.dims for layer in layers]
    return Scorer(network, dims, tree_of(layers), tables, protocol, dual)


def tensors_file(sha256: str) -> str:
    """The name of the tensors' file: another content never takes the place of this one."""
    return f"model-{sha256[:12]}.safetensors"


def save_model(folder: Path, record: PadimModel, tensors: Mapping[str, torch.Tensor]) -> PadimModel:
    """Write both files, then delete the tensors of an earlier model; returns the whole record.

    model.json is written last and names its file, so a kill leaves the earlier model or this one.
    """
    from safetensors.torch import save

    data = save(dict(tensors))
    digest = sha256_of(data)
    described = TensorsFile(file=tensors_file(digest), bytes=len(data), sha256=digest)
    record = record.model_copy(update={"tensors": described})
    write_bytes(folder / described.file, data)
    write_json(folder / JSON_FILE, record)
    for path in folder.iterdir():
        if TENSORS_FILE.fullmatch(path.name) and path.name != described.file:
            path.unlink()
    return record


def load_model(folder: Path, device: torch.device) -> Inspector:
    """Open a model folder: every hash, size, shape and value is checked, tables are prepared.

    Raises EvaluatorError, in one line, for anything that is not as model.json says.
    """
    if not folder.is_dir():
        what = "a file" if folder.exists() else "no such folder"
        raise EvaluatorError(f"{folder}: {what}; expected a folder that `evaluator fit` wrote")
    record = read_json(PadimModel, folder / JSON_FILE)
    path = _checked_file(folder, record)
    backbone = record.backbone
    network = make_network(
        backbone.name,
        build(backbone.arch),
        tuple(backbone.layers),
        backbone.mean,
        backbone.std,
        record.protocol.size_px,
        device,
    )
    for layer, shape in zip(record.layers, network.shapes, strict=True):
        if shape != (layer.channels, layer.height, layer.width):
            raise EvaluatorError(
                f"{folder / JSON_FILE}: layer {layer.name!r} is {layer.channels} x {layer.height} "
                f"x {layer.width}, {backbone.arch} gives {' x '.join(map(str, shape))}"
            )
    tensors = _read_tensors(path, expected_tensors(record, network))
    state = network.extractor.state_dict()
    state |= {key.partition(".")[2]: t for key, t in tensors.items() if key.startswith("backbone.")}
    network.extractor.load_state_dict(state)
    scorer = make_scorer(
        network, record.layers, record.protocol, record.form == "features", _tables(record, tensors)
    )
    return Inspector(record, scorer, device)


def _checked_file(folder: Path, record: PadimModel) -> Path:
    path, expected = folder / record.tensors.file, record.tensors
    if not path.is_file():
        raise EvaluatorError(f"{path}: missing, though {JSON_FILE} names it")
    size = path.stat().st_size
    if size != expected.bytes:
        raise EvaluatorError(
            f"{path}: {size} bytes, {JSON_FILE} expects {expected.bytes}; is the file cut?"
        )
    digest = sha256_of_file(path)
    if digest != expected.sha256:
        raise EvaluatorError(
            f"{path}: sha256 is {digest[:12]}…, {JSON_FILE} expects {expected.sha256[:12]}…; the "
            "file is damaged, or of another fit: copy both files again"
        )
    return path


def _read_tensors(
    path: Path, expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file that holds exactly `expected`, all values finite."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, torch.Tensor] = {}
    try:
        with safe_open(path, "pt") as file:
            found = set(file.keys())
            for key in sorted(found ^ expected.keys()):
                what = "missing" if key in expected else "surplus"
                raise EvaluatorError(f"{path}: tensor {key!r} is {what}")
            for key, (dtype, shape) in expected.items():
                view = file.get_slice(key)
                # Compared before a byte of it is read.
                if view.get_dtype() != DTYPES[dtype] or tuple(view.get_shape()) != shape:
                    raise EvaluatorError(
                        f"{path}: {key!r} is {view.get_dtype()} {view.get_shape()}, expected "
                        f"{DTYPES[dtype]} {list(shape)}"
                    )
                tensors[key] = file.get_tensor(key)
    except SafetensorError as error:
        raise EvaluatorError(f"{path}: not a safetensors file ({error})") from None
    for key, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise EvaluatorError(f"{path}: {key!r} holds values that are not finite")
    return tensors


def _tables(record: PadimModel, tensors: Mapping[str, torch.Tensor]) -> list[Tables]:
    levels = tree_of(record.layers).levels
    if record.form == "features":
        features = [tensors[f"features.{level.layer}"].numpy() for level in levels]
        return make_tables(tree_of(record.layers), features, record.protocol.epsilon, dual=True)
    return [
        Tables(tensors[f"mean.{k}"], tensors[f"whiten.{k}"], torch.empty(0))
        for k in (level.layer for level in levels)
    ]


def table_tensors(form: Form, tree: Tree, tables: Sequence[Tables]) -> dict[str, torch.Tensor]:
    """The tables of the primal form by their names in the file."""
    tensors: dict[str, torch.Tensor] = {}
    if form == "factors":
        for level, table in zip(tree.levels, tables, strict=True):
            tensors[f"mean.{level.layer}"] = table.mean.contiguous()
            tensors[f"whiten.{level.layer}"] = table.whiten
    return tensors


def library_versions() -> dict[str, str]:
    """What a model was made with."""
    names = ("torch", "torchvision", "numpy", "pillow", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
