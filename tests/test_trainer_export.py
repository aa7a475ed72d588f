"""The exported backbone loads where people load weights, and says what it is."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.runs_by_hand import run_by_hand
from trainer.export import Backbone, export_backbone
from trainer.models import ARCHITECTURES, build_model


def export(out: Path, arch: str) -> torch.nn.Module:
    """Export a network with random weights; returns it."""
    run = run_by_hand(arch=arch)
    torch.manual_seed(0)
    model = build_model(arch, outputs=19).eval()
    export_backbone(
        out, run, model.state_dict(), steps=6, samples_seen=24, train_samples=8, processes=3,
        quarantined=1, train_loss=0.5, holdout_loss=None,
    )  # fmt: skip
    return model


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "mobilenet_v2"])
def test_export_loads_into_torchvision_apart_from_the_classifier(tmp_path: Path, arch: str) -> None:
    import torchvision

    ours = export(tmp_path, arch)
    other = getattr(torchvision.models, arch)(weights=None)
    classifier = {
        key for key in other.state_dict() if key.startswith(ARCHITECTURES[arch].classifier)
    }
    weights = load_file(tmp_path / "backbone.safetensors")
    result = other.load_state_dict(weights, strict=False)
    assert set(result.missing_keys) == classifier
    assert result.unexpected_keys == []
    kept = {key: other.state_dict()[key] for key in classifier}
    other.load_state_dict({**weights, **kept}, strict=True)
    name = "features" if arch == "mobilenet_v2" else "layer4"
    assert_same_features(ours, other.eval(), name, name)


@pytest.mark.parametrize("arch", ["resnet18", "resnet50", "wide_resnet50_2"])
def test_export_loads_into_timm(tmp_path: Path, arch: str) -> None:
    import timm

    ours = export(tmp_path, arch)
    other = timm.create_model(arch, num_classes=0)  # without a classifier
    other.load_state_dict(load_file(tmp_path / "backbone.safetensors"), strict=True)
    assert_same_features(ours, other.eval(), "layer4", "layer4")


def assert_same_features(
    ours: torch.nn.Module, other: torch.nn.Module, our_layer: str, other_layer: str
) -> None:
    features = []
    for model, layer in ((ours, our_layer), (other, other_layer)):
        handle = model.get_submodule(layer).register_forward_hook(
            lambda module, inputs, output: features.append(output)
        )
        with torch.inference_mode():
            model(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32))
        handle.remove()
    torch.testing.assert_close(features[0], features[1])


def test_backbone_json_typed_by_hand(tmp_path: Path) -> None:
    export(tmp_path, "mobilenet_v2")
    data = (tmp_path / "backbone.safetensors").read_bytes()
    assert json.loads((tmp_path / "backbone.json").read_text()) == {
        "format": "semiformula-backbone",
        "format_version": 2,
        "trainer_version": "0.1.0",
        "arch": "mobilenet_v2",
        "weights": {
            "file": "backbone.safetensors",
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        },
        "loss": "direct",
        "dataset": {
            "name": "by-hand",
            "content_sha256": "1" * 64,
            "recipe_sha256": "2" * 64,
            "samples": 9,
        },
        "input": {"size_px": 32, "channels": 3, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
        "padim": {"layers": ["features.3", "features.6", "features.13"], "dims": 100},
        "training": {
            "steps": 6,
            "epochs": 3.0,
            "samples_seen": 24,
            "quarantined": 1,
            "processes": 3,
            "batch_size": 4,
            "micro_batches": 2,
            "lr": 0.001,
            "schedule": "constant",
            "ema": None,
            "seed": 0,
            "matching": "nearest",
            "components": "all",
            "init_sha256": None,
            "restated_images": None,
            "restated_size_px": None,
            "restated_dataset_sha256": None,
        },
        "metrics": {"train_loss": 0.5, "holdout_loss": None},
    }


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_padim_layers_have_more_channels_than_dims(arch: str) -> None:
    model = build_model(arch, outputs=19).eval()
    widths: list[int] = []
    for layer in ARCHITECTURES[arch].layers:
        model.get_submodule(layer).register_forward_hook(
            lambda module, inputs, output: widths.append(output.shape[1])
        )
    with torch.inference_mode():
        model(torch.zeros(1, 3, 32, 32))
    expected = {"resnet18": 448, "mobilenet_v2": 152}.get(arch, 1792)
    assert sum(widths) == expected
    assert expected > ARCHITECTURES[arch].dims


def test_backbone_refuses_an_unknown_key() -> None:
    with pytest.raises(ValueError, match="Extra inputs"):
        Backbone.model_validate({"surprise": 1})
