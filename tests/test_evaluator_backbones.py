"""Backbones: how a SPEC is read, what is loaded, and what is refused."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torchvision.models import get_model

from evaluator.backbones import (
    NORMALISATIONS,
    LayersAndDims,
    WeightsDefaults,
    open_backbone,
    parse_spec,
    sha256_as_named,
)
from evaluator.errors import EvaluatorError

CPU = torch.device("cpu")
SIGNED = WeightsDefaults("resnet18", *NORMALISATIONS["signed"])


DEFAULT = LayersAndDims()


def opened(text: str, defaults: WeightsDefaults = SIGNED, choice: LayersAndDims = DEFAULT):
    return open_backbone(parse_spec(text), defaults, choice, 32, CPU)


def refused(
    pattern: str, text: str, defaults: WeightsDefaults = SIGNED, choice: LayersAndDims = DEFAULT
):
    with pytest.raises(EvaluatorError, match=pattern) as caught:
        opened(text, defaults, choice)
    assert "\n" not in caught.value.message


def state_of(arch: str = "resnet18", seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return get_model(arch, weights=None).state_dict()


def write_export(folder: Path, **changes: object) -> Path:
    """A run folder's export as the trainer writes it: no classifier."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: value for key, value in state_of().items() if not key.startswith("fc.")}
    save_file(state, folder / "backbone.safetensors")
    data = (folder / "backbone.safetensors").read_bytes()
    record = {
        "format": "semiformula-backbone",
        "format_version": 1,
        "trainer_version": "0.1.0",
        "arch": "resnet18",
        "weights": {
            "file": "backbone.safetensors",
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        },
        "loss": "direct",
        "dataset": {
            "name": "demo",
            "content_sha256": "a" * 64,
            "recipe_sha256": "b" * 64,
            "samples": 100,
        },
        "input": {"size_px": 64, "channels": 3, "mean": [0.5] * 3, "std": [0.5] * 3},
        "padim": {"layers": ["layer1", "layer2", "layer3"], "dims": 100},
        "training": {"steps": 10, "epochs": 0.1, "lr": 0.001},
        "metrics": {"train_loss": 0.1, "holdout_loss": None},
    }
    (folder / "backbone.json").write_text(json.dumps(record | changes))
    return folder


def test_spec_with_name_and_options():
    spec = parse_spec(f"imagenet={__file__},arch=mobilenet_v2,norm=signed")
    assert (spec.name, spec.kind, spec.arch, spec.norm) == (
        "imagenet",
        "weights",
        "mobilenet_v2",
        "signed",
    )
    assert spec.path == Path(__file__)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("random:resnet18", "random-resnet18"),
        ("random:resnet18:3", "random-resnet18-3"),
        ("torchvision:resnet50", "torchvision-resnet50"),
        ("noise=random:resnet18,norm=imagenet", "noise"),
        ("random:resnet18,norm=imagenet", "random-resnet18"),
    ],
)
def test_spec_without_name_gets_one(text, name):
    assert parse_spec(text).name == name


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("a=nowhere.pth", "no such file or folder 'nowhere.pth'"),
        ("nowhere.pth", "give it a name"),
        ("a=", "nothing after the name"),
        ("a=random:resnet18,nrom=signed", "unknown option 'nrom'; did you mean 'norm'"),
        ("a=random:resnet18,norm=zero", "norm='zero' is not one of imagenet, signed"),
        ("a=random:resnet18:-1", "seed '-1' is no whole number"),
        ("a=random:resnet18:1:2", "expected random:ARCH"),
        ("a=random:resnet81", "did you mean 'resnet18'"),
        ("a=torchvision:resnet18:V9", "no weights 'V9'; torchvision has IMAGENET1K_V1"),
        ("a=random:resnet34", "no layers are known for resnet34; give --layers"),
    ],
)
def test_spec_that_is_wrong_is_one_line(text, pattern):
    refused(pattern, text)


def test_random_backbone_depends_on_its_seed_alone():
    torch.manual_seed(99)
    first, second, other = (
        opened(f"random:resnet18:{seed}")[1].weights_sha256 for seed in (4, 4, 5)
    )
    assert first == second != other


def test_random_backbone_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    opened("random:resnet18:4")
    assert torch.rand(1) == expected


def test_network_gives_the_layers_of_torchvision():
    network, _ = opened("random:resnet18")
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    first, second, third = network(pixels)
    torch.manual_seed(0)
    model = get_model("resnet18", weights=None).eval()
    with torch.no_grad():
        x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
        x = model.layer1(model.maxpool(model.relu(model.bn1(model.conv1(x)))))
        expected = [x, model.layer2(x), model.layer3(model.layer2(x))]
    for found, wanted in zip((first, second, third), expected, strict=True):
        np.testing.assert_allclose(found, wanted.permute(0, 2, 3, 1).numpy(), atol=1e-4)
    assert network.shapes == ((64, 8, 8), (128, 4, 4), (256, 2, 2))


def test_export_is_opened_by_folder_and_by_file(tmp_path):
    run = write_export(tmp_path / "run")
    for text in (f"ours={run}", f"ours={run / 'backbone.json'}"):
        _, record = opened(text)
        assert record.kind == "export"
        assert record.export is not None
        assert record.export.loss == "direct"
        assert (record.layers, record.dims) == (["layer1", "layer2", "layer3"], 100)


def test_folder_without_export_says_when_it_comes(tmp_path):
    refused("backbone.json: no such file; a run folder holds it once", f"ours={tmp_path}")


VERSION_2 = {
    "format_version": 2,
    "loss": "cross_entropy",
    "dataset": {
        "name": "dagm2007",
        "content_sha256": "a" * 64,
        "recipe_sha256": None,
        "samples": 1000,
    },
    "training": {
        "steps": 10,
        "epochs": 0.64,
        "samples_seen": 640,
        "quarantined": 0,
        "processes": 2,
        "batch_size": 64,
        "micro_batches": 2,
        "lr": 0.001,
        "schedule": "cosine",
        "ema": 0.999,
        "seed": 0,
    },
}


@pytest.mark.parametrize("changes", [{}, VERSION_2])
def test_export_of_both_versions_is_opened(tmp_path, changes):
    run = write_export(tmp_path, **changes)
    _, record = opened(f"ours={run}")
    assert record.export is not None
    assert record.export.model_dump(mode="json") == json.loads((run / "backbone.json").read_text())


@pytest.mark.parametrize("version", [0, 3, "2", None])
def test_export_of_another_version_is_refused(tmp_path, version):
    run = write_export(tmp_path, format_version=version)
    refused(f"format_version is {version!r}, this version reads 1 and 2 only", f"ours={run}")


def test_export_with_unknown_key_names_the_nearest(tmp_path):
    run = write_export(tmp_path, arhc="resnet18")
    refused("unknown key 'arhc'; did you mean 'arch'", f"ours={run}")


def test_export_of_another_architecture_is_refused(tmp_path):
    run = write_export(tmp_path, arch="mobilenet_v2")
    refused("is missing; is it a mobilenet_v2 with torchvision's key names", f"ours={run}")


def test_export_with_flipped_byte_is_refused(tmp_path):
    run = write_export(tmp_path)
    data = bytearray((run / "backbone.safetensors").read_bytes())
    data[-5] ^= 1
    (run / "backbone.safetensors").write_bytes(data)
    refused("sha256 is .* expects .* damaged", f"ours={run}")


def test_export_that_is_cut_is_refused(tmp_path):
    run = write_export(tmp_path)
    path = run / "backbone.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused("is the file cut", f"ours={run}")


def test_export_pointing_outside_its_folder_is_refused(tmp_path):
    weights = {"file": "../backbone.safetensors", "bytes": 1, "sha256": "a" * 64}
    run = write_export(tmp_path / "run", weights=weights)
    refused("key 'weights.file'", f"ours={run}")


def test_weights_file_ignores_and_reports_the_classifier(tmp_path):
    state = state_of() | {"fc.weight": torch.zeros(1001, 512), "fc.bias": torch.zeros(1001)}
    save_file(state, tmp_path / "w.safetensors")
    _, record = opened(f"w={tmp_path / 'w.safetensors'}")
    assert record.ignored_keys == ["fc.bias", "fc.weight"]


def test_state_dict_file_with_wrapper_and_prefix_is_opened(tmp_path):
    state = {f"module.{key}": value for key, value in state_of(seed=3).items()}
    torch.save({"state_dict": state, "epoch": 7}, tmp_path / "w.pth")
    network, _ = opened(f"w={tmp_path / 'w.pth'}")
    same, _ = opened("random:resnet18:3")
    pixels = np.zeros((1, 32, 32, 3), np.uint8)
    np.testing.assert_array_equal(network(pixels)[2], same(pixels)[2])


def test_weights_file_with_own_options_overrules_the_defaults(tmp_path):
    torch.save(state_of("mobilenet_v2"), tmp_path / "w.pth")
    _, record = opened(f"w={tmp_path / 'w.pth'},arch=mobilenet_v2,norm=imagenet")
    assert (record.arch, record.mean) == ("mobilenet_v2", (0.485, 0.456, 0.406))
    assert record.layers == ["features.3", "features.6", "features.13"]


@pytest.mark.parametrize(
    ("defaults", "pattern"),
    [
        (WeightsDefaults(), r"needs an architecture \(--arch\)"),
        (WeightsDefaults("resnet18"), r"needs a normalisation \(--input-norm\)"),
    ],
)
def test_weights_file_needs_architecture_and_normalisation(tmp_path, defaults, pattern):
    torch.save(state_of(), tmp_path / "w.pth")
    refused(pattern, f"w={tmp_path / 'w.pth'}", defaults)


def test_pickled_object_is_refused(tmp_path):
    torch.save({"conv1.weight": Path("x")}, tmp_path / "w.pth")
    refused("w.pth: not readable as weights", f"w={tmp_path / 'w.pth'}")


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_damaged_weights_file_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x08" * 100)
    refused("not readable as weights", f"w={tmp_path / name}")


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"layer1.0.conv1.weight": torch.zeros(64, 64, 1, 1)}, "has shape .* expects"),
        ({"layer1.0.bn1.bias": torch.full((64,), torch.nan)}, "values that are not finite"),
        ({"layer9.weight": torch.zeros(1)}, "unknown key 'layer9.weight'"),
        ({"layer1.0.bn1.bias": "text"}, "is a str, not a tensor"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, pattern):
    torch.save(state_of() | change, tmp_path / "w.pth")
    refused(pattern, f"w={tmp_path / 'w.pth'}")


def test_torchvision_without_network_says_where_to_put_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nobody listens there
    where = "fetch https://.*resnet18-f37072fd.pth .* put it at .*checkpoints"
    refused(where, "torchvision:resnet18")


def test_torchvision_file_that_is_another_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(state_of(), folder / "resnet18-f37072fd.pth")
    refused("sha256 is .*, its name says f37072fd…; .* delete it", "torchvision:resnet18")


def test_file_is_taken_when_its_name_ends_as_its_hash_begins(tmp_path):
    digest = hashlib.sha256(b"weights").hexdigest()
    path = tmp_path / f"resnet18-{digest[:8]}.pth"
    path.write_bytes(b"weights")
    assert sha256_as_named(path) == digest


def test_layers_and_dims_by_choice():
    _, record = opened("random:resnet34", choice=LayersAndDims(("layer2", "layer3"), 50))
    assert (record.layers, record.dims) == (["layer2", "layer3"], 50)


@pytest.mark.parametrize(
    ("choice", "pattern"),
    [
        (LayersAndDims(("layer2", "layer5"), None), "no layer 'layer5'; did you mean"),
        (LayersAndDims(None, 449), "449 dimensions wanted, .* have 448 channels"),
        (LayersAndDims(("fc",), 10), "gives 2 axes"),
        (LayersAndDims(("layer1", "layer1"), 10), "layer 'layer1' is given twice"),
    ],
)
def test_layers_and_dims_that_cannot_be_are_refused(choice, pattern):
    refused(pattern, "random:resnet18", choice=choice)


@pytest.mark.parametrize(
    ("arch", "layer", "size_px"),
    [("googlenet", "aux1", 64), ("vit_b_16", "conv_proj", 48), ("vgg11", "features.20", 16)],
)
@pytest.mark.filterwarnings("ignore:The default weight initialization:FutureWarning")
def test_network_that_cannot_run_is_refused(arch, layer, size_px):
    pattern = f"layers {layer} do not run on {size_px} px photographs .*; choose other --layers"
    with pytest.raises(EvaluatorError, match=pattern) as caught:
        open_backbone(
            parse_spec(f"random:{arch}"), SIGNED, LayersAndDims((layer,), 5), size_px, CPU
        )
    assert "\n" not in caught.value.message
