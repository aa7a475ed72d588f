"""`trainer doctor`: what it measures, predicts and advises, and that it leaves nothing behind."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.classes_by_hand import write_class_set
from tests.parameters_by_hand import write_parameters
from tests.shards_by_hand import write_dataset
from trainer.cli import main
from trainer.diagnosis import Findings, advice, predicted, report, size_text
from trainer.doctor import Late, Options, doctor, rate_of, time_limit
from trainer.errors import TrainerError
from trainer.faulty import Faults, faulty_server

pytestmark = pytest.mark.usefixtures("one_thread")

STAGES = ["network", "verify", "decode", "hand-off", "device"]


def quick(data: object, **more: object) -> Findings:
    """A doctor's visit of a second."""
    options = {"size_px": 32, "batch_size": 4, "workers": 1, "device": "cpu", "seconds": 1.0}
    return doctor(Options(str(data), "mobilenet_v2", **(options | more)))  # type: ignore[arg-type]


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go, to see that none is left."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return tmp_path / "temporary"


def left(folder: Path) -> list[Path]:
    """What is in a folder, but for torch's own folder of compiled code, which it makes at once."""
    return [path for path in folder.iterdir() if not path.name.startswith("torchinductor")]


@pytest.mark.parametrize("write", [write_dataset, write_parameters, write_class_set])
def test_every_stage_of_every_kind_of_set_is_measured(
    tmp_path: Path, temporary: Path, write: object
) -> None:
    write(tmp_path / "set")  # type: ignore[operator]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")}
    found = quick(tmp_path / "set")
    assert list(found.stages) == STAGES
    assert all(stage.images_per_s > 0 for stage in found.stages.values())
    assert not found.remote
    assert 0 < predicted(found) <= min(s.images_per_s for s in found.stages.values())
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "set").rglob("*")} == before
    assert left(temporary) == []


def test_remote_set_is_fetched_past_the_cache(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(tmp_path / "set")
    monkeypatch.setenv("SEMIFORMULA_CACHE", str(tmp_path / "cache"))
    with faulty_server(tmp_path / "set") as server:
        found = quick(server.url)
        assert sum(path.endswith(".tar") for path in server.counts.paths) == 3
    assert found.remote
    assert found.stages["network"].remark.endswith(", 3 shards")
    assert not (tmp_path / "cache").exists()
    assert left(temporary) == []


def test_network_that_drips_is_the_bottleneck_in_bounded_time(
    tmp_path: Path, temporary: Path
) -> None:
    write_dataset(tmp_path / "set")
    faults = Faults({".tar": ["drip..."]}, drip_bytes_per_s=1000)
    start = time.monotonic()
    with faulty_server(tmp_path / "set", faults) as server:
        said = report(quick(server.url))
    assert time.monotonic() - start < 10
    assert "MB/s, 0 shards" in said
    assert "The bottleneck is the network: --cache-bytes 1MB holds the dataset, and later" in said
    assert left(temporary) == []


def findings(**changed: float) -> Findings:
    """A GPU with room for workers, whose stages do 1,000 images a second unless told."""
    found = Findings(
        cores=16,
        workers=2,
        on_cuda=True,
        remote=True,
        decodes=True,
        dataset_bytes=53 * 10**9,
        decoded_bytes=152 * 10**9 + 1,
        decode_of_one=400.0,
    )
    for name in STAGES:
        found.add(name, changed.get(name, 1000.0), "as told")
    return found


@pytest.mark.parametrize(
    ("stage", "cores", "workers", "line"),
    [
        ("network", 16, 2, "--cache-bytes 53GB holds the dataset, and later epochs read no "
         "network; or move it nearer."),
        ("verify", 16, 2, "--cache-decoded 153GB keeps later epochs from reading shards; or a "
         "faster disk."),
        ("decode", 16, 2, "--workers 3 keeps up."),  # 1.1 * 1000 / 400
        ("decode", 3, 1, "--workers 2 helps, and --cache-decoded 153GB decodes each image once."),
        ("decode", 3, 2, "--cache-decoded 153GB decodes each image once; or train on parameters "
         "without images, which the device paints."),
        ("hand-off", 16, 2, "a larger --batch-size hands over more at a time, and fewer --workers "
         "wake it less often."),
        ("device", 16, 2, "the data keep up with it; more devices (torchrun) or a smaller --size "
         "or --arch."),
    ],
)  # fmt: skip
def test_bottleneck_is_named_with_what_to_do(
    stage: str, cores: int, workers: int, line: str
) -> None:
    found = findings(**{stage: 250.0})
    found.cores, found.workers = cores, workers
    named = f"The bottleneck is the {stage} (the next is 4.0 times as fast): "
    assert advice(found) == named + line


def test_prediction_is_the_slowest_stage_where_cores_are_many() -> None:
    assert predicted(findings(device=700.0)) == 700


def test_prediction_on_a_cpu_shares_the_cores() -> None:
    found = findings(device=100.0)
    found.on_cuda, found.cores, found.threads = False, 2, 2
    found.decode_of_one, found.stages["verify"] = 200.0, findings(verify=1000.0).stages["verify"]
    # A core spends 20 ms training an image, 5 ms decoding and 1 ms verifying it.
    assert predicted(found) == pytest.approx(2 / 0.026)


def test_report_has_a_line_for_each_stage() -> None:
    found = findings(decode=500.0)
    found.measured = 480.0
    lines = report(found).splitlines()
    assert lines[:4] == [
        "stage         images/s    busy",
        "network        1,000.0    50 %  as told",
        "verify         1,000.0    50 %  as told",
        "decode           500.0   100 %  as told",
    ]
    assert lines[6] == "predicted: 500.0 images/s; measured with the loader: 480.0"
    assert lines[7].startswith("The bottleneck is the decode")
    assert len(lines) == 8


def test_sizes_are_rounded_up() -> None:
    assert [size_text(n) for n in (1, 10**6, 10**6 + 1, 10**9)] == ["1MB", "1MB", "2MB", "1GB"]


def test_rate_counts_what_was_done() -> None:
    assert rate_of(lambda: time.sleep(0.1) or 10, 0.25) == pytest.approx(100, rel=0.3)


def test_time_limit_interrupts_and_is_forgotten() -> None:
    with pytest.raises(Late), time_limit(0.05):
        time.sleep(5)
    with time_limit(0.05):
        pass
    time.sleep(0.1)


def test_missing_dataset_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(TrainerError, match="no such folder"):
        quick(tmp_path / "none")


def test_command_prints_the_report(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    words = ["doctor", "--data", str(tmp_path), "--arch", "mobilenet_v2", "--size", "32"]
    words += ["--batch-size", "4", "--workers", "0", "--device", "cpu", "--seconds", "1"]
    run = CliRunner().invoke(main, words)
    assert run.exit_code == 0, run.output
    assert run.output.splitlines()[0].split() == ["stage", "images/s", "busy"]
    assert "The bottleneck is the device (the next is" in run.output
