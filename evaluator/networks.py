"""The network definitions: which torchvision architecture, which layers PaDiM takes from it."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

from evaluator.errors import EvaluatorError, is_out_of_memory

# PaDiM's layers and random dimensions: Defard et al. 2021 for ResNets, ours for MobileNetV2.
RESNET_LAYERS = ("layer1", "layer2", "layer3")
PADIM: dict[str, tuple[tuple[str, ...], int]] = {
    "resnet18": (RESNET_LAYERS, 100),
    "resnet50": (RESNET_LAYERS, 550),
    "wide_resnet50_2": (RESNET_LAYERS, 550),
    "mobilenet_v2": (("features.3", "features.6", "features.13"), 100),
}
HEADS = ("fc.", "classifier.", "head.", "heads.", "AuxLogits.", "aux1.", "aux2.")


def build(arch: str) -> nn.Module:
    """A torchvision classifier by name, freshly initialised; EvaluatorError names the nearest."""
    known = models.list_models(module=models)
    if arch not in known:
        nearest = difflib.get_close_matches(arch, known, n=1, cutoff=0.0)[0]
        raise EvaluatorError(
            f"architecture {arch!r}: torchvision knows none of this name; did you mean {nearest!r}?"
        )
    network: nn.Module = models.get_model(arch, weights=None)
    return network


def is_head(key: str) -> bool:
    """Whether a state-dict key belongs to a classifier, which PaDiM does not use."""
    return key.startswith(HEADS)


@dataclass(frozen=True)
class Network:
    """A frozen feature extractor: uint8 photographs in, one array per layer out.

    `shapes` holds (channels, height, width) per layer for photographs of `size_px`.
    """

    name: str
    extractor: nn.Module
    layers: tuple[str, ...]
    shapes: tuple[tuple[int, int, int], ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    device: torch.device

    @property
    def channels(self) -> int:
        """Channels of all layers together."""
        return sum(channels for channels, _, _ in self.shapes)

    def __call__(self, pixels: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.float32]]:
        """Features of uint8 [images, size, size, 3]: per layer float32 [images, h, w, channels]."""
        with torch.inference_mode():
            images = torch.from_numpy(pixels).to(self.device).permute(0, 3, 1, 2)
            outputs = self.extractor(_normalise(images, self.mean, self.std))
            return [
                outputs[layer].float().permute(0, 2, 3, 1).contiguous().cpu().numpy()
                for layer in self.layers
            ]


def _normalise(
    images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> torch.Tensor:
    """(x / 255 - mean) / std per channel, channels last in memory (faster convolutions)."""
    shape = (1, 3, 1, 1)
    centre = torch.tensor(mean, device=images.device).view(shape)
    spread = torch.tensor(std, device=images.device).view(shape)
    return ((images.float() / 255 - centre) / spread).to(memory_format=torch.channels_last)


def make_network(
    name: str,
    classifier: nn.Module,
    layers: tuple[str, ...],
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    size_px: int,
    device: torch.device,
) -> Network:
    """Cut `classifier` after the last of `layers`, in eval mode, and learn the layers' shapes.

    Raises EvaluatorError for a layer that is not there, is there twice or gives no feature map,
    and for a network that does not run on photographs of `size_px`.
    """
    known = [path for path, _ in classifier.named_modules() if path]
    for layer in layers:
        if layer not in known:
            nearest = difflib.get_close_matches(layer, known, n=1, cutoff=0.0)[0]
            raise EvaluatorError(
                f"backbone {name!r}: no layer {layer!r}; did you mean {nearest!r}?"
            )
        if layers.count(layer) > 1:
            raise EvaluatorError(f"backbone {name!r}: layer {layer!r} is given twice; once counts")
    try:
        extractor, outputs = _cut_and_run(classifier, layers, size_px, device)
    except Exception as error:  # tracing and running raise whatever the network's code provokes
        if is_out_of_memory(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise EvaluatorError(
            f"backbone {name!r}: layers {', '.join(layers)} do not run on {size_px} px photographs "
            f"({reason:.200}); choose other --layers, or --resize and --crop that the network takes"
        ) from None
    shapes = []
    for layer in layers:
        output = outputs[layer]
        if not isinstance(output, torch.Tensor) or output.ndim != 4:
            found = f"{getattr(output, 'ndim', 'no')} axes"
            raise EvaluatorError(
                f"backbone {name!r}: layer {layer!r} gives {found}, PaDiM wants a feature map "
                "[images, channels, rows, columns]"
            )
        shapes.append((output.shape[1], output.shape[2], output.shape[3]))
    return Network(name, extractor, layers, tuple(shapes), mean, std, device)


def _cut_and_run(
    classifier: nn.Module, layers: tuple[str, ...], size_px: int, device: torch.device
) -> tuple[nn.Module, dict[str, object]]:
    """The feature extractor, and what its layers give for one blank photograph."""
    torch.backends.cudnn.allow_tf32 = False  # float32 is promised; TF32 keeps 10 bits of 23
    extractor = create_feature_extractor(classifier.eval(), {layer: layer for layer in layers})
    extractor = extractor.to(device).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        blank = torch.zeros(1, 3, size_px, size_px, device=device)
        return extractor, extractor(blank.to(memory_format=torch.channels_last))
