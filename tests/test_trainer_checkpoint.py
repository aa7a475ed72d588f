"""Checkpoints: exact, read back, kept, passed over when damaged, never code."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from tests.runs_by_hand import Trained, config_by_hand, run_by_hand, save_by_hand
from tests.shards_by_hand import cut, flip_byte
from trainer.artifacts import verify_file, write_json
from trainer.checkpoint import newest_good, restore
from trainer.errors import TrainerError
from trainer.run import read_run, refuse_other_run
from trainer.state import load_training_state
from trainer.tensors import write_tensors

pytestmark = pytest.mark.usefixtures("one_thread")


def index_of(out: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((out / "checkpoint.json").read_text())
    return content


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


def trained_to(step: int, **options: bool) -> Trained:
    trained = Trained(**options)
    for _ in range(step):
        trained.step()
    return trained


def test_record_typed_by_hand(tmp_path: Path) -> None:
    save_by_hand(tmp_path, trained_to(1), 7, metrics_bytes=99)
    data = (tmp_path / "checkpoint-00000007.safetensors").read_bytes()
    assert index_of(tmp_path) == {
        "format": "semiformula-checkpoint",
        "format_version": 2,
        "trainer_version": "0.1.0",
        "arch": "resnet18",
        "loss": "direct",
        "checkpoints": [
            {
                "file": "checkpoint-00000007.safetensors",
                "bytes": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
                "step": 7,
                "samples_seen": 28,
                "seconds": 3.5,
                "metrics_bytes": 99,
                "ledger": [{"epoch": 0, "samples": 28, "limbs": [1, 2, 3, 2**64 - 1]}],
                "quarantined": ["data/train-00003-of-00004.tar"],
            }
        ],
    }


def test_tensors_are_those_of_the_page(tmp_path: Path) -> None:
    record = save_by_hand(tmp_path, trained_to(1, ema=True), 1)
    weights = {"0.weight", "0.bias", "1.weight", "1.bias"}
    buffers = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert load_file(tmp_path / record.file).keys() == (
        {f"model/{name}" for name in weights | buffers}
        | {f"ema/{name}" for name in weights | buffers}
        | {f"optimizer/{n}/{k}" for n in weights for k in ("step", "exp_avg", "exp_avg_sq")}
        | {"rng/cpu"}
        | ({"rng/cuda"} if torch.cuda.is_available() else set())
    )


@pytest.mark.parametrize("adam", [{}, {"fused": True}, {"foreach": True}])
@pytest.mark.parametrize("ema", [False, True])
def test_restored_run_goes_on_bit_for_bit(tmp_path: Path, adam: dict[str, bool], ema: bool) -> None:
    calm = trained_to(3, ema=ema, **adam)
    save_by_hand(tmp_path, calm, 3)
    calm.step()
    other = Trained(seed=1, ema=ema, **adam)
    other.step()
    record = restore(tmp_path, config_by_hand(), other.model, other.optimizer, other.ema)
    assert record is not None
    assert record.step == 3
    other.step()
    found, expected = other.state(), calm.state()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_moments_take_the_memory_layout_of_the_weights(tmp_path: Path) -> None:
    save_by_hand(tmp_path, trained_to(1), 1)
    other = Trained(seed=1)
    restore(tmp_path, config_by_hand(), other.model, other.optimizer)
    weight = other.model[0].weight
    assert other.optimizer.state[weight]["exp_avg"].stride() == weight.stride()
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_fused_adam_counts_its_steps_on_the_device() -> None:
    like = {"dtype": torch.float32, "device": torch.device("cpu")}
    for adam in ({}, {"fused": True}):
        trained, other = trained_to(2, **adam), Trained(seed=1, **adam)
        where = Path("checkpoint")
        load_training_state(trained.state(), config_by_hand(), where, other.model, other.optimizer)
        for parameter in other.model.parameters():
            step = other.optimizer.state[parameter]["step"]
            assert {"dtype": step.dtype, "device": step.device} == like
            assert step.item() == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_fused_adam_counts_its_steps_on_the_gpu() -> None:
    trained, other = trained_to(2), Trained(seed=1)
    other.model.cuda()
    other.optimizer = torch.optim.Adam(other.model.parameters(), fused=True)
    state = {k: v for k, v in trained.state().items() if k != "rng/cuda"}
    load_training_state(state, config_by_hand(), Path("x"), other.model, other.optimizer)
    parameter = next(other.model.parameters())
    assert other.optimizer.state[parameter]["step"].device == parameter.device


def test_averaged_weights_that_are_missing_are_refused(tmp_path: Path) -> None:
    save_by_hand(tmp_path, trained_to(1), 1)
    other = Trained(ema=True)
    with pytest.raises(TrainerError, match=r"ema/0\.bias is missing, expected torch\.float32"):
        restore(tmp_path, config_by_hand(), other.model, other.optimizer, other.ema)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_last_few_checkpoints_are_kept(tmp_path: Path, keep: int) -> None:
    trained = trained_to(1)
    for step in (5, 10, 15, 20):
        save_by_hand(tmp_path, trained, step, keep)
    kept = [f"checkpoint-{step:08d}.safetensors" for step in (20, 15, 10)][:keep]
    assert [record["file"] for record in index_of(tmp_path)["checkpoints"]] == kept  # type: ignore
    assert names(tmp_path) == sorted([*kept, "checkpoint.json"])


def damaged_run(out: Path, *damages: str) -> Trained:
    """Checkpoints of step 1, 2 and 3; the newest ones get these damages."""
    trained = Trained()
    for step in (1, 2, 3):
        trained.step()
        save_by_hand(out, trained, step, keep=3)
    for step, damage in zip((3, 2, 1), damages, strict=False):
        path = out / f"checkpoint-{step:08d}.safetensors"
        {"flip": lambda p: flip_byte(p, -5), "cut": lambda p: cut(p, 100), "gone": Path.unlink}[
            damage
        ](path)
    return trained


@pytest.mark.parametrize(
    ("damages", "step", "said"),
    [
        (["flip"], 2, "00000003.safetensors: SHA-256 differs from its record; the file is damaged"),
        (["cut"], 2, "00000003.safetensors: 100 bytes, its record says "),
        (["gone"], 2, "00000003.safetensors: no such file"),
        (["flip", "gone"], 1, "the file is damaged; "),
    ],
)
def test_damaged_checkpoint_is_passed_over_with_a_line(
    tmp_path: Path, damages: list[str], step: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged_run(tmp_path, *damages)
    good = newest_good(tmp_path, config_by_hand())
    assert good is not None
    assert good.record.step == step
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("Warning: ")
    assert error.endswith(f": going on from checkpoint-{step:08d}.safetensors, step {step}.\n")
    assert error.count("\n") == 1


def test_no_good_checkpoint_is_an_error(tmp_path: Path) -> None:
    damaged_run(tmp_path, "flip", "gone", "cut")
    with pytest.raises(TrainerError) as error:
        newest_good(tmp_path, config_by_hand())
    assert error.value.message.endswith("no checkpoint is good, start another --out")
    assert "\n" not in error.value.message


def test_checkpoint_after_a_damaged_one_takes_its_place(tmp_path: Path) -> None:
    damaged_run(tmp_path, "flip")
    other = Trained(seed=1)
    restore(tmp_path, config_by_hand(), other.model, other.optimizer)
    save_by_hand(tmp_path, other, 5, keep=3)
    steps = [record["step"] for record in index_of(tmp_path)["checkpoints"]]  # type: ignore
    assert steps == [5, 2, 1]
    assert "checkpoint-00000003.safetensors" not in names(tmp_path)


def test_disk_that_keeps_other_bytes_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"as it was written")
    digest = hashlib.sha256(b"as it was written").hexdigest()
    verify_file(path, 17, digest)
    flip_byte(path, 3)
    with pytest.raises(TrainerError, match="SHA-256 differs from its record"):
        verify_file(path, 17, digest)


class Code:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("code-was-run",)


def test_full_disk_is_one_line_with_what_to_do(tmp_path: Path) -> None:
    save_by_hand(tmp_path, trained_to(1), 3)
    before = names(tmp_path)
    path = tmp_path / "checkpoint-00000006.safetensors"
    path.with_name(f".{path.name}.tmp-{os.getpid()}").symlink_to("/dev/full")
    with pytest.raises(TrainerError) as error:
        save_by_hand(tmp_path, trained_to(1), 6)
    assert error.value.message == (
        f"{path}: cannot be written (No space left on device); make room there, then the same "
        "command goes on; the last good checkpoint is of step 3"
    )
    assert names(tmp_path) == before


def test_file_is_the_librarys_written_in_pieces(tmp_path: Path) -> None:
    state = trained_to(1, ema=True).state() | {
        "none": torch.empty(0, 3),
        'half \N{EN DASH} "bf16"': torch.ones(3, dtype=torch.bfloat16),
        "double": torch.ones(2, dtype=torch.float64),
    }
    with (tmp_path / "pieces").open("wb") as file:
        size, digest = write_tensors(file, state, {"format": "by-hand"})
    data = save(state, {"format": "by-hand"})
    assert (tmp_path / "pieces").read_bytes() == data
    assert (size, digest) == (len(data), hashlib.sha256(data).hexdigest())


def test_checkpoint_takes_no_second_state_of_memory(tmp_path: Path) -> None:
    state = {f"weight-{number}": torch.zeros(2**20) for number in range(4)}  # 16 MB
    with (tmp_path / "tensors").open("wb") as file:
        tracemalloc.start()
        write_tensors(file, state, {})
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**20


def test_checkpoint_with_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_by_hand(tmp_path, trained_to(1), 1)
    path = tmp_path / "checkpoint-00000001.safetensors"
    path.write_bytes(pickle.dumps(Code()))
    index = index_of(tmp_path)
    record = index["checkpoints"][0]  # type: ignore[index]
    record |= {
        "bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }  # fmt: skip
    (tmp_path / "checkpoint.json").write_text(json.dumps(index))
    with pytest.raises(TrainerError, match="not readable as safetensors") as error:
        newest_good(tmp_path, config_by_hand())
    assert "\n" not in error.value.message
    assert not (tmp_path / "code-was-run").exists()


def test_header_of_ten_gigabytes_is_refused(tmp_path: Path) -> None:
    record = save_by_hand(tmp_path, trained_to(1), 1)
    data = (10 * 2**30).to_bytes(8, "little") + save({"x": torch.zeros(2)})[8:]
    (tmp_path / record.file).write_bytes(data)
    index = index_of(tmp_path)
    index["checkpoints"][0] |= {  # type: ignore[index]
        "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(),
    }  # fmt: skip
    (tmp_path / "checkpoint.json").write_text(json.dumps(index))
    with pytest.raises(TrainerError, match="not readable as safetensors"):
        newest_good(tmp_path, config_by_hand())


def test_index_that_names_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    save_by_hand(tmp_path, trained_to(1), 1)
    index = index_of(tmp_path)
    index["checkpoints"][0]["file"] = "../checkpoint-00000001.safetensors"  # type: ignore[index]
    (tmp_path / "checkpoint.json").write_text(json.dumps(index))
    with pytest.raises(TrainerError, match=r"key 'checkpoints\.0\.file'"):
        newest_good(tmp_path, config_by_hand())


@pytest.mark.parametrize(
    ("name", "read"),
    [("run.json", read_run), ("checkpoint.json", lambda out: newest_good(out, config_by_hand()))],
)
def test_version_one_is_refused_by_name_and_number(
    tmp_path: Path, name: str, read: Callable[[Path], object]
) -> None:
    save_by_hand(tmp_path, trained_to(1), 1)
    write_json(tmp_path / "run.json", run_by_hand())
    path = tmp_path / name
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 1}))
    with pytest.raises(TrainerError) as error:
        read(tmp_path)
    assert error.value.message == (
        f"{path}: format_version is 1, this version reads 2 only; use the matching version of "
        "semiformula"
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"micro_batches": 4}, "with --micro-batches 2, now with --micro-batches 4; use the same"),
        ({"window_shards": 8}, "was started with --window 16, now with --window 8"),
        ({"ema": 0.999}, "was started without --ema, now with --ema 0.999"),
        ({"warmup_steps": 5}, "was started with --warmup-steps 0, now with --warmup-steps 5"),
        (
            {"schedule": "cosine", "total_steps": 5},
            "with --schedule constant, now with --schedule cosine",
        ),
    ],
)
def test_changed_option_is_refused(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(TrainerError) as error:
        refuse_other_run(tmp_path, run_by_hand(), run_by_hand(**changes))
    assert said in error.value.message


def test_cosine_of_another_length_is_refused(tmp_path: Path) -> None:
    was, asked = (run_by_hand(schedule="cosine", total_steps=n) for n in (100, 200))
    with pytest.raises(TrainerError, match="with a cosine over 100 steps, asked for 200; give"):
        refuse_other_run(tmp_path, was, asked)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"schedule": "cosine"}, "expected total_steps with the cosine schedule"),
        ({"total_steps": 5}, "expected total_steps with the cosine schedule"),
        ({"micro_batches": 5}, "5 micro_batches of a batch of 4 samples"),
        ({"ema": 1.0}, "less than 1"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        config_by_hand(**changes)
