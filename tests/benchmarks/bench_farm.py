"""Plan, status and finish of a dataset of very many shards, made up; seconds and peak memory.

    python -m tests.benchmarks.bench_farm [SHARDS]

The shards are files of one byte with records that say so: two inodes each, removed afterwards.
The bar is a minute and 1 GiB for each command at a million shards.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from builder.plan import read_plan
from builder.recipe import RECIPES
from builder.storage import open_storage
from tests.conftest import write_photographs

SHARDS = 100_000
WORDS = [sys.executable, "-m", "builder"]


def main(shards: int = SHARDS) -> None:
    """Make up the shards, run the three commands, print a line each."""
    print(f"\n{shards} shards of one byte, local disk")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        recipe, out = root / "many.toml", root / "out"
        text = (RECIPES / "fine.toml").read_text()
        for key, value in {"samples": shards, "samples_per_shard": 1, "size_px": 32}.items():
            text = re.sub(rf"(?m)^{key} = .*$", f"{key} = {value}", text)
        recipe.write_text(text)
        normals = str(write_photographs(root / "photographs"))
        measure("plan", str(recipe), "--normals", normals, "--out", str(out), "--jobs", "1")
        start = time.perf_counter()
        make_up(out)
        print(f"  making up {2 * shards} files: {time.perf_counter() - start:.1f} s")
        measure("status", str(out))
        measure("finish", str(out))
        print(f"  dataset.json: {(out / 'dataset.json').stat().st_size / 1e6:.0f} MB")
        start = time.perf_counter()
        subprocess.run(["rm", "-rf", str(out)], check=True)
        print(f"  removing them: {time.perf_counter() - start:.1f} s", flush=True)


def make_up(out: Path) -> None:
    """A file of one byte and a record for each shard of the plan at `out`."""
    plan = read_plan(open_storage(str(out)))
    start = (
        f'{{"format": "semiformula-commit", "format_version": 1, "plan_sha256": "{plan.sha256}", '
    )
    (out / "data").mkdir()
    (out / "records").mkdir()
    for index in range(plan.shard_count):
        name = plan.shard(index)
        record = (
            f'"shard": {{"name": "{name}", "samples": 1, "bytes": 1, "sha256": "{index:064x}"}}}}'
        )
        write(out / name, b"x")
        write(
            out / name.replace("data/", "records/").replace(".tar", ".json"),
            (start + record).encode(),
        )


def write(path: Path, data: bytes) -> None:
    number = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.write(number, data)
    os.close(number)


def measure(*words: str) -> None:
    """Run a command to its end; print its wall time and the peak memory of its processes."""
    start = time.perf_counter()
    process = subprocess.Popen([*WORDS, *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, code, usage = os.wait4(process.pid, 0)
    process.returncode = code
    assert code == 0, said
    last = said.strip().splitlines()[0]
    print(
        f"  {words[0]:<8} {time.perf_counter() - start:>7.1f} s "
        f"{usage.ru_maxrss / 2**10:>7.0f} MiB   {last}",
        flush=True,
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
