"""Weights to begin with, batch norms recentred on new images, statistics taken anew."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from trainer.cli import main
from trainer.errors import TrainerError
from trainer.initial import begin_with, recentre, some_of
from trainer.models import build_model

TASK = SimpleNamespace(device=torch.device("cpu"), size_px=32)


def trained(arch: str = "resnet18", seed: int = 0) -> torch.nn.Module:
    """A network whose batch norms are not those of a new one."""
    torch.manual_seed(seed)
    model = build_model(arch, 7)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return model


def weights_file(path: Path, model: torch.nn.Module) -> Path:
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return path


def images(count: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)


def signed(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def test_begin_with_takes_everything_but_the_last_layer(tmp_path: Path) -> None:
    model, other = trained(seed=0), trained(seed=1)
    begin_with(model, "resnet18", weights_file(tmp_path / "w.safetensors", other))
    own, theirs = model.state_dict(), other.state_dict()
    assert all(torch.equal(own[k], theirs[k]) for k in own if not k.startswith("fc."))
    assert not torch.equal(own["fc.weight"], theirs["fc.weight"])


def test_begin_with_a_count_stored_as_a_list(tmp_path: Path) -> None:
    state = {k: v.contiguous() for k, v in trained().state_dict().items()}
    state = {k: v.reshape(1) if v.ndim == 0 else v for k, v in state.items()}
    save_file(state, tmp_path / "w.safetensors")
    begin_with(trained(seed=1), "resnet18", tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("conv1.weight"), "key 'conv1.weight' is missing; is it a resnet18?"),
        (lambda s: s.update(new=torch.zeros(1)), "unknown key 'new'; is it a resnet18?"),
        (
            lambda s: s.update({"bn1.weight": torch.ones(65)}),
            "'bn1.weight' has shape [65], resnet18 expects [64]",
        ),
        (
            lambda s: s.update({"bn1.weight": torch.full((64,), torch.nan)}),
            "'bn1.weight' holds values that are not finite",
        ),
    ],
)
def test_begin_with_refuses_other_weights(tmp_path: Path, change, said: str) -> None:
    state = {k: v.contiguous() for k, v in trained().state_dict().items()}
    change(state)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(TrainerError) as caught:
        begin_with(trained(), "resnet18", tmp_path / "w.safetensors")
    assert caught.value.message == f"{tmp_path}/w.safetensors: {said}"


def test_begin_with_refuses_a_cut_file(tmp_path: Path) -> None:
    path = weights_file(tmp_path / "w.safetensors", trained())
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(TrainerError, match="not readable as safetensors") as caught:
        begin_with(trained(), "resnet18", path)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2"])
def test_recentred_network_in_evaluation_is_the_same_function(arch: str) -> None:
    model = trained(arch).eval()
    with torch.no_grad():
        before = model(signed(images(3)))
        recentre(TASK, model, images())
        after = model(signed(images(3)))
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3 * before.abs().max().item())


def test_recentred_network_in_training_is_that_in_evaluation() -> None:
    model = trained().eval()
    with torch.no_grad():
        expected = model(signed(images()))
        away = model.train()(signed(images()))
        model = trained().eval()
        recentre(TASK, model, images())
        found = model.train()(signed(images()))
    assert (found - expected).abs().max() < 0.02 * (away - expected).abs().max()


def test_some_of_is_evenly_spaced() -> None:
    assert some_of(np.arange(10, dtype=np.uint8), 4).tolist() == [0, 2, 5, 7]
    assert some_of(np.arange(3, dtype=np.uint8), 4).tolist() == [0, 1, 2]


def ran(*words: object):
    return CliRunner().invoke(main, [str(word) for word in words])


def pretrain(dataset: Path, out: Path, *words: object):
    return ran(
        *("pretrain", "--data", dataset, "--out", out, "--arch", "resnet18", "--size", 32),
        *("--batch-size", 4, "--device", "cpu", "--workers", 0, "--precision", "fp32", *words),
    )


@pytest.fixture(scope="module")
def finished(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run begun with given weights, over all options of the losses."""
    folder = tmp_path_factory.mktemp("initial")
    weights = weights_file(folder / "w.safetensors", trained())
    options = ("--loss", "sum", "--matching", "one-to-one", "--components", "visible")
    result = pretrain(dataset, folder / "run", *options, "--steps", 2, "--init", weights)
    assert result.exit_code == 0, result.output
    return folder


def test_run_records_what_it_began_with(finished: Path) -> None:
    config = json.loads((finished / "run/run.json").read_text())["config"]
    training = json.loads((finished / "run/backbone.json").read_text())["training"]
    assert config["loss"] == "sum"
    assert training["matching"] == "one-to-one"
    assert training["components"] == "visible"
    assert training["init_sha256"] == config["init_sha256"]
    assert len(config["init_sha256"]) == 64


def test_run_goes_on_with_the_same_weights_alone(finished: Path, dataset: Path) -> None:
    options = ("--loss", "sum", "--matching", "one-to-one", "--components", "visible")
    result = pretrain(dataset, finished / "run", *options, "--steps", 3)
    assert result.exit_code == 1
    assert "was started with --init of sha256" in result.output
    assert "now without --init" in result.output


def test_matching_is_refused_for_the_indirect_loss(dataset: Path, tmp_path: Path) -> None:
    result = pretrain(
        dataset, tmp_path / "run", "--loss", "indirect", "--matching", "one-to-one", "--steps", 1
    )
    assert result.exit_code == 1
    assert result.output == "Error: --matching one-to-one: of --loss direct or sum alone\n"


def test_weights_that_are_not_there_are_one_line(dataset: Path, tmp_path: Path) -> None:
    result = pretrain(
        dataset, tmp_path / "run", "--loss", "direct", "--steps", 1, "--init", tmp_path / "none"
    )
    assert result.exit_code == 1
    assert (
        result.output == f"Error: --init {tmp_path}/none: no such file; give safetensors weights\n"
    )
    assert not (tmp_path / "run").exists()


def test_restated_backbone_has_the_statistics_of_the_normals(
    finished: Path, dataset: Path, tmp_path: Path
) -> None:
    result = ran(
        *("restate", finished / "run", "--data", dataset, "--out", tmp_path / "new"),
        *("--size", 48, "--images", 5),
    )
    assert result.exit_code == 0, result.output
    before = load_file(finished / "run/backbone.safetensors")
    after = load_file(tmp_path / "new/backbone.safetensors")
    changed = {key.rsplit(".", 1)[1] for key in after if not torch.equal(before[key], after[key])}
    assert changed == {"running_mean", "running_var", "num_batches_tracked"}
    training = json.loads((tmp_path / "new/backbone.json").read_text())["training"]
    assert training["restated_size_px"] == 48
    content = json.loads((dataset / "dataset.json").read_text())["content_sha256"]
    assert training["restated_dataset_sha256"] == content
    # The first batch norm sees a plain convolution of the images.
    from trainer.cache import Cache, default_bytes, default_folder
    from trainer.dataset import read_dataset
    from trainer.shards import read_normals
    from trainer.storage import open_storage
    from trainer.task import resized

    storage = open_storage(str(dataset))
    cache = Cache(default_folder(), default_bytes(default_folder()))
    table = torch.from_numpy(read_normals(storage, cache, read_dataset(storage)))
    rows = torch.from_numpy(some_of(table.numpy(), 5))
    assert training["restated_images"] == len(rows)
    maps = torch.nn.functional.conv2d(
        signed(resized(rows, 48)), before["conv1.weight"], stride=2, padding=3
    )
    torch.testing.assert_close(
        after["bn1.running_mean"], maps.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5
    )


def test_restate_refuses_what_is_no_finished_run(dataset: Path, tmp_path: Path) -> None:
    result = ran("restate", tmp_path, "--data", dataset, "--out", tmp_path / "new")
    assert result.exit_code == 1
    assert result.output.startswith(f"Error: {tmp_path}: holds no backbone.json")


def test_restate_refuses_a_run_that_is_still_training(
    finished: Path, dataset: Path, tmp_path: Path
) -> None:
    (tmp_path / "run.json").write_text("{}")
    result = ran("restate", finished / "run", "--data", dataset, "--out", tmp_path)
    assert result.exit_code == 1
    assert "holds a run's own backbone; give another folder" in result.output


def test_restate_refuses_to_write_over_the_run(finished: Path, dataset: Path) -> None:
    run = finished / "run"
    result = ran("restate", run, "--data", dataset, "--out", run)
    assert result.exit_code == 1
    assert "is the run itself" in result.output
