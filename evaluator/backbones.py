"""Opens backbones: a SPEC of the command line -> a frozen network and its record."""

from __future__ import annotations

import difflib
import hashlib
import re
import urllib.error
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torchvision import models

from evaluator.artifacts import read_json, sha256_of_file
from evaluator.errors import EvaluatorError
from evaluator.networks import PADIM, Network, build, is_head, make_network
from evaluator.report import BackboneRecord, ExportedBackbone, Rgb

NORMALISATIONS: dict[str, tuple[Rgb, Rgb]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "signed": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # pixels in [-1, 1]
}
NAME = re.compile(r"\w[\w .+-]{0,39}")
OPTION = re.compile(r",([a-z_-]+)=([^,=]*)$")
OPTIONS = ("arch", "norm")
# The weights of PaDiM's paper; torchvision's V2 recipes came later.
TORCHVISION_WEIGHTS = "IMAGENET1K_V1"
MAX_WEIGHTS_BYTES = 8 * 2**30

Kind = Literal["export", "weights", "random", "torchvision"]


@dataclass(frozen=True)
class Spec:
    """One --backbone: `NAME=SPEC[,arch=ARCH][,norm=NORM]`, taken apart but not opened."""

    name: str
    text: str
    kind: Kind
    arch: str = ""
    detail: str = ""  # seed of a random network, weights of a torchvision one
    path: Path = Path()
    norm: str = ""


@dataclass(frozen=True)
class WeightsDefaults:
    """What a weights file does not say of itself, where its own options do not either."""

    arch: str = ""
    mean: Rgb | None = None
    std: Rgb | None = None


@dataclass(frozen=True)
class LayersAndDims:
    """PaDiM's layers and dimensions when the user sets them; None: the architecture's own."""

    layers: tuple[str, ...] | None = None
    dims: int | None = None


def parse_spec(text: str) -> Spec:
    """Take `NAME=SPEC` apart; the name may be left out for `random:` and `torchvision:`."""
    name, separator, rest = text.partition("=")
    if not separator or not NAME.fullmatch(name):
        name, rest = "", text
    if not rest:
        raise EvaluatorError(f"--backbone {text!r}: nothing after the name; expected NAME=SPEC")
    options: dict[str, str] = {}
    while (found := OPTION.search(rest)) is not None:
        if found[1] not in OPTIONS:
            nearest = difflib.get_close_matches(found[1], OPTIONS, n=1, cutoff=0.0)[0]
            raise EvaluatorError(
                f"--backbone {text}: unknown option {found[1]!r}; did you mean {nearest!r}?"
            )
        options[found[1]], rest = found[2], rest[: found.start()]
    norm = options.get("norm", "")
    if norm and norm not in NORMALISATIONS:
        raise EvaluatorError(
            f"--backbone {text}: norm={norm!r} is not one of {', '.join(NORMALISATIONS)}"
        )
    if rest.partition(":")[0] in ("random", "torchvision"):
        return _named_spec(name, text, rest, options)
    if not name:
        raise EvaluatorError(f"--backbone {text}: give it a name, as in --backbone NAME={text}")
    path = Path(rest)
    if not path.exists():
        raise EvaluatorError(
            f"--backbone {text}: no such file or folder {rest!r}; a SPEC is a run folder, a "
            "backbone.json, a weights file, random:ARCH[:SEED] or torchvision:ARCH"
        )
    if path.is_dir() or path.suffix == ".json":
        if options:
            raise EvaluatorError(
                f"--backbone {text}: backbone.json knows its architecture and normalisation; "
                f"remove {', '.join(options)}"
            )
        return Spec(name, text, "export", path=path / "backbone.json" if path.is_dir() else path)
    return Spec(name, text, "weights", arch=options.get("arch", ""), path=path, norm=norm)


def _named_spec(name: str, text: str, rest: str, options: dict[str, str]) -> Spec:
    """`random:ARCH[:SEED]` or `torchvision:ARCH[:WEIGHTS]`."""
    kind, arch, *details = rest.split(":")
    detail = details[0] if details else ""
    if len(details) > 1 or "arch" in options or (kind == "torchvision" and "norm" in options):
        raise EvaluatorError(
            f"--backbone {text}: expected random:ARCH[:SEED][,norm=NORM] or "
            "torchvision:ARCH[:WEIGHTS]"
        )
    if kind == "random" and detail and not (detail.isdecimal() and len(detail) <= 18):
        raise EvaluatorError(f"--backbone {text}: seed {detail!r} is no whole number >= 0")
    name = name or "-".join(part for part in (kind, arch, detail) if part)
    checked: Kind = "random" if kind == "random" else "torchvision"
    return Spec(name, text, checked, arch=arch, detail=detail, norm=options.get("norm", ""))


def open_backbone(
    spec: Spec, defaults: WeightsDefaults, choice: LayersAndDims, size_px: int, device: torch.device
) -> tuple[Network, BackboneRecord]:
    """Load and check a backbone; EvaluatorError when it is missing, damaged or does not fit."""
    opened = _OPENERS[spec.kind](spec, defaults)
    layers, dims = _layers_and_dims(spec, opened, choice)
    network = make_network(
        spec.name, opened.classifier, layers, opened.mean, opened.std, size_px, device
    )
    if dims > network.channels:
        raise EvaluatorError(
            f"backbone {spec.name!r}: {dims} dimensions wanted, layers {', '.join(layers)} have "
            f"{network.channels} channels; lower --dims"
        )
    record = BackboneRecord(
        name=spec.name,
        spec=spec.text,
        kind=spec.kind,
        arch=opened.arch,
        weights_sha256=opened.weights_sha256,
        ignored_keys=opened.ignored_keys,
        mean=opened.mean,
        std=opened.std,
        layers=list(layers),
        dims=dims,
        export=opened.export,
    )
    return network, record


@dataclass(frozen=True)
class _LoadedClassifier:
    arch: str
    classifier: nn.Module
    weights_sha256: str
    mean: Rgb
    std: Rgb
    ignored_keys: list[str]
    export: ExportedBackbone | None = None


def _layers_and_dims(
    spec: Spec, opened: _LoadedClassifier, choice: LayersAndDims
) -> tuple[tuple[str, ...], int]:
    if opened.export is not None:
        default = (tuple(opened.export.padim.layers), opened.export.padim.dims)
    elif opened.arch in PADIM:
        default = PADIM[opened.arch]
    elif choice.layers is None or choice.dims is None:
        raise EvaluatorError(
            f"backbone {spec.name!r}: no layers are known for {opened.arch}; give --layers and "
            f"--dims (known: {', '.join(PADIM)})"
        )
    else:
        default = (choice.layers, choice.dims)
    return choice.layers or default[0], choice.dims or default[1]


def _open_export(spec: Spec, defaults: WeightsDefaults) -> _LoadedClassifier:
    if not spec.path.is_file():
        raise EvaluatorError(
            f"{spec.path}: no such file; a run folder holds it once its training has finished"
        )
    export = read_json(ExportedBackbone, spec.path)
    path = spec.path.parent / export.weights.file
    if not path.is_file():
        raise EvaluatorError(f"{path}: missing, though {spec.path} names it")
    size = path.stat().st_size
    if size != export.weights.bytes:
        raise EvaluatorError(
            f"{path}: {size} bytes, {spec.path} expects {export.weights.bytes}; is the file cut?"
        )
    digest = sha256_of_file(path)
    if digest != export.weights.sha256:
        raise EvaluatorError(
            f"{path}: sha256 is {digest[:12]}…, {spec.path} expects "
            f"{export.weights.sha256[:12]}…; the file is damaged, export it again"
        )
    classifier = build(export.arch)
    ignored = fill(classifier, read_state(path), path, export.arch)
    mean, std = export.input.mean, export.input.std
    return _LoadedClassifier(export.arch, classifier, digest, mean, std, ignored, export)


def _open_weights(spec: Spec, defaults: WeightsDefaults) -> _LoadedClassifier:
    arch = spec.arch or defaults.arch
    mean, std = NORMALISATIONS[spec.norm] if spec.norm else (defaults.mean, defaults.std)
    if not arch or mean is None or std is None:
        missing = "an architecture (--arch)" if not arch else "a normalisation (--input-norm)"
        raise EvaluatorError(
            f"--backbone {spec.text}: a weights file needs {missing}; or write "
            f"{spec.name}={spec.path},arch=ARCH,norm=imagenet|signed"
        )
    classifier = build(arch)
    ignored = fill(classifier, read_state(spec.path), spec.path, arch)
    return _LoadedClassifier(arch, classifier, sha256_of_file(spec.path), mean, std, ignored)


def _open_random(spec: Spec, defaults: WeightsDefaults) -> _LoadedClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(spec.detail or 0))
        classifier = build(spec.arch)
    digest = hashlib.sha256()
    for key, tensor in classifier.state_dict().items():
        digest.update(key.encode() + tensor.numpy().tobytes())
    mean, std = NORMALISATIONS[spec.norm or "signed"]
    return _LoadedClassifier(spec.arch, classifier, digest.hexdigest(), mean, std, [])


def _open_torchvision(spec: Spec, defaults: WeightsDefaults) -> _LoadedClassifier:
    classifier = build(spec.arch)
    known = {entry.name: entry for entry in models.get_model_weights(spec.arch)}
    wanted = spec.detail or TORCHVISION_WEIGHTS
    if wanted not in known:
        raise EvaluatorError(
            f"--backbone {spec.text}: no weights {wanted!r}; torchvision has {', '.join(known)}"
        )
    weights = known[wanted]
    path = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rsplit("/", 1)[1]
    if not path.is_file():
        _download(spec, weights.url, path)
    digest = sha256_as_named(path)
    ignored = fill(classifier, read_state(path), path, spec.arch)
    mean, std = NORMALISATIONS["imagenet"]
    return _LoadedClassifier(spec.arch, classifier, digest, mean, std, ignored)


def sha256_as_named(path: Path) -> str:
    """Hex SHA-256 of a file of torchvision's; EvaluatorError unless it begins as the name ends.

    `resnet18-f37072fd.pth` has a SHA-256 that begins with f37072fd.
    """
    expected = _hash_in_name(path)
    digest = sha256_of_file(path)
    if not digest.startswith(expected):
        raise EvaluatorError(
            f"{path}: sha256 is {digest[:12]}…, its name says {expected}…; the file is damaged or "
            "another one, delete it to download it again"
        )
    return digest


def _hash_in_name(path: Path) -> str:
    return path.stem.rsplit("-", 1)[1]


def _download(spec: Spec, url: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The hash is compared here as well: no wrong file comes to lie in the place.
        torch.hub.download_url_to_file(
            url, str(path), hash_prefix=_hash_in_name(path), progress=False
        )
    except (OSError, urllib.error.URLError, RuntimeError) as error:
        raise EvaluatorError(
            f"--backbone {spec.text}: weights cannot be downloaded ({error}); fetch {url} where "
            f"there is a network and put it at {path}"
        ) from None


_OPENERS = {
    "export": _open_export,
    "weights": _open_weights,
    "random": _open_random,
    "torchvision": _open_torchvision,
}


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors or state-dict file by key, on the CPU; nothing is executed.

    Raises EvaluatorError for a file that is damaged, too large or holds anything but tensors.
    """
    if path.stat().st_size > MAX_WEIGHTS_BYTES:
        raise EvaluatorError(f"{path}: larger than {MAX_WEIGHTS_BYTES} bytes, refused")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            data: object = load_file(path)
        else:
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise whatever a damaged file provokes
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise EvaluatorError(
            f"{path}: not readable as weights ({reason:.200}); expected a safetensors file or a "
            "state dict of tensors (.pth)"
        ) from None
    for wrapper in ("state_dict", "model"):
        if isinstance(data, dict) and isinstance(data.get(wrapper), dict):
            data = data[wrapper]
    if not isinstance(data, dict) or not data:
        raise EvaluatorError(f"{path}: holds no state dict (found {type(data).__name__})")
    state = {str(key).removeprefix("module."): value for key, value in data.items()}
    for key, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise EvaluatorError(f"{path}: {key!r} is a {type(value).__name__}, not a tensor")
    return state


def fill(classifier: nn.Module, state: dict[str, torch.Tensor], path: Path, arch: str) -> list[str]:
    """Load `state` into a torchvision model, all but the classifier; returns the ignored keys.

    Raises EvaluatorError for a missing or surplus key, another shape, or a value that is not
    finite.
    """
    ignored = sorted(key for key in state if is_head(key))
    expected = {key: value for key, value in classifier.state_dict().items() if not is_head(key)}
    found = {key: value for key, value in state.items() if not is_head(key)}
    hint = f"is it a {arch} with torchvision's key names?"
    for key, value in expected.items():
        if key not in found:
            if key.endswith("num_batches_tracked"):  # not in files from before torch 0.4
                continue
            raise EvaluatorError(f"{path}: key {key!r} is missing; {hint}")
        if found[key].numel() != value.numel() or (value.ndim and found[key].shape != value.shape):
            raise EvaluatorError(
                f"{path}: {key!r} has shape {list(found[key].shape)}, {arch} expects "
                f"{list(value.shape)}; {hint}"
            )
        if not bool(torch.isfinite(found[key].float()).all()):
            raise EvaluatorError(f"{path}: {key!r} holds values that are not finite")
    for key in found:
        if key not in expected:
            raise EvaluatorError(f"{path}: unknown key {key!r}; {hint}")
    shaped = {key: value.reshape(expected[key].shape) for key, value in found.items()}
    classifier.load_state_dict(shaped, strict=False)
    return ignored
