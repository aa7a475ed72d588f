"""The device benchmark, in small and on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks.gpu import Row, bars, line_of, main, peak

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("2 CPU cores", None),
    ],
)
def test_peak_is_found_by_the_devices_name(name: str, flops: float | None) -> None:
    assert peak(name) == flops


def test_line_has_shares_in_percent() -> None:
    row = Row("direct", 64, "webp", 2500.0, 0.96, 0.345, None, True)
    assert line_of(row).split() == [
        "direct", "64", "webp", "2500.0", "96.0", "%", "34.5", "%", "-", "yes",
    ]  # fmt: skip


def test_bars_are_of_the_full_trainer() -> None:
    rows = [
        Row(loss, 64, path, rate, share, None, None, None)
        for loss, path, rate, share in (
            ("direct", "bare step", 3000.0, 1.0),
            ("direct", "webp", 2900.0, 0.967),
            ("indirect", "webp", 2400.0, 0.98),
        )
    ]
    assert bars(rows) == [
        "least share of the bare step: 96.7 % (direct, batch 64, webp); bar 95 %",
        "direct: 2900 images/s; bar 2,500 on an H200",
        "indirect: 82.8 % of direct; bar 80 %",
    ]


@pytest.mark.slow
def test_paths_are_measured_in_small(
    photographs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "work").mkdir()
    words = ["--photographs", str(photographs), "--out", str(tmp_path / "gpu.json")]
    words += ["--work", str(tmp_path / "work"), "--device", "cpu", "--arch", "mobilenet_v2"]
    words += ["--size", "32", "--batch-sizes", "8", "--samples", "16", "--steps", "2"]
    words += ["--precision", "fp32", "--losses", "indirect", "--workers", "0"]
    words += ["--paths", "decoded cache", "parameters"]
    main(words)
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["path"] for row in report["rows"]] == ["bare step", "decoded cache", "parameters"]
    assert all(row["images_per_s"] > 0 for row in report["rows"])
    assert report["peak_flop_per_s"] is None
    assert [row["waiting"] is None for row in report["rows"]] == [True, False, False]
    assert list((tmp_path / "work").iterdir()) == []
    said = capsys.readouterr().out
    assert "least share of the bare step" in said
