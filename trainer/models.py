"""The networks: torchvision's, with as many outputs as theta is long."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from trainer.errors import TrainerError


@dataclass(frozen=True)
class Architecture:
    """What the rest of the trainer and PaDiM need to know of a network."""

    classifier: str  # prefix of the last layer's keys, left out of the export
    layers: tuple[str, ...]  # PaDiM's feature layers
    dims: int  # how many of their channels PaDiM draws


RESNET_LAYERS = ("layer1", "layer2", "layer3")
ARCHITECTURES: dict[str, Architecture] = {  # the names of trainer.choices.Arch
    "wide_resnet50_2": Architecture("fc.", RESNET_LAYERS, 550),  # of 1792
    "resnet18": Architecture("fc.", RESNET_LAYERS, 100),  # of 448
    "resnet50": Architecture("fc.", RESNET_LAYERS, 550),  # of 1792
    "mobilenet_v2": Architecture(
        "classifier.", ("features.3", "features.6", "features.13"), 100
    ),  # of 152
}


def build_model(arch: str, outputs: int) -> nn.Module:
    """torchvision's `arch` with `outputs` outputs and random weights from torch's generator.

    The input is [B, 3, H, W]. MobileNetV2 loses its dropout: the task is a regression and the
    paper uses none.
    """
    import torchvision

    if arch not in ARCHITECTURES:
        raise TrainerError(f"architecture {arch!r}: not one of {', '.join(ARCHITECTURES)}")
    options = {"dropout": 0.0} if arch == "mobilenet_v2" else {}
    model: nn.Module = getattr(torchvision.models, arch)(
        weights=None, num_classes=outputs, **options
    )
    return model
