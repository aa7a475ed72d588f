"""The script for a GPU's hour, in small on a CPU: what it trains comes back and is evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evaluator.backbones import LayersAndDims, WeightsDefaults, open_backbone, parse_spec
from tests.benchmarks import wide


@pytest.mark.slow
def test_trained_layers_come_back_in_parts_and_open(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wide, "PART_BYTES", 4 * 10**6)
    wide.main(
        [
            *("train", "--normals", str(photographs), "--loss", "sum", "--out", str(tmp_path)),
            *("--steps", "10", "--arch", "resnet18", "--size", "32", "--samples", "60"),
            *("--batch-size", "4", "--device", "cpu"),
        ]
    )
    said = json.loads((tmp_path / "sum.json").read_text())
    assert said["training"]["samples_seen"] == 40
    assert said["share_of_peak"] is None  # of a CPU nobody says
    assert said["days_for_50_million_images"] == pytest.approx(50e6 / said["images_per_s"] / 86400)
    parts = sorted(tmp_path.glob("sum-*.safetensors"))
    assert len(parts) > 1
    wide.main(["restore", *map(str, parts), "--to", str(tmp_path / "w.safetensors"),
               "--arch", "resnet18"])  # fmt: skip
    half = load_file(parts[0])["conv1.weight"]
    assert half.dtype == torch.float16
    assert torch.equal(load_file(tmp_path / "w.safetensors")["conv1.weight"], half.float())
    spec = parse_spec(f"ours={tmp_path}/w.safetensors,arch=resnet18,norm=signed")
    network, _ = open_backbone(spec, WeightsDefaults(), LayersAndDims(), 32, torch.device("cpu"))
    assert network.channels == 448


def test_restore_refuses_missing_parts(tmp_path: Path) -> None:
    state = {"conv1.weight": torch.zeros(64, 3, 7, 7)}
    wide.keep(state, tmp_path, "direct")
    with pytest.raises(SystemExit, match="is missing or too much; give all parts"):
        wide.restore([tmp_path / "direct-00.safetensors"], tmp_path / "w", "resnet18")


def test_flops_of_the_network_are_those_known() -> None:
    # ResNet-18 at 224 px: 1.82 billion multiplications and additions.
    assert wide.forward_flops("resnet18", 224) == pytest.approx(2 * 1.814e9, rel=0.01)
