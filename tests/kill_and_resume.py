"""SIGKILL the trainer at random moments; the results equal an undisturbed run's.

    python -m tests.kill_and_resume --photographs DIR

DIR is a folder of normal photographs. The trainer runs once in peace and once with kills; the
bytes of the exported weights (on the CPU) must be the same, and so must the losses on the way.
Minutes: about 3. For the builder there is `builder selftest --chaos`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def main() -> None:
    """Run the trainer in peace and with kills; exit code 1 when anything differs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photographs", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--recipe", default="fine")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    moments = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        words = ["builder", "build", options.recipe, "--samples", str(options.samples)]
        run([*words, "--normals", str(options.photographs), "--out", f"{folder}/calm"])
        same = trainer_survives(Path(folder), options, moments)
    sys.exit(0 if same else 1)


def trainer_survives(root: Path, options: argparse.Namespace, moments: random.Random) -> bool:
    """Whether the exported weights and the losses of every step are the same after kills."""
    words = ["trainer", "pretrain", "--data", str(root / "calm"), "--loss", "indirect"]
    words += ["--arch", "resnet18", "--size", str(options.size), "--batch-size", "16"]
    words += ["--device", "cpu", "--checkpoint-every", "5", "--steps", str(options.steps)]
    calm, killed = root / "run-calm", root / "run-killed"
    spent = run([*words, "--out", str(calm)])
    kills = run_with_kills([*words, "--out", str(killed)], spent, options.kills, moments)
    pattern = "backbone.safetensors"
    same = hashes(calm, pattern) == hashes(killed, pattern) and losses(calm) == losses(killed)
    return report("trainer", kills, same)


def run(words: list[str]) -> float:
    """Run a command to its end and return its seconds."""
    start = time.monotonic()
    subprocess.run([sys.executable, "-m", *words], check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - start


def run_with_kills(
    words: list[str], spent: float, kills: int, moments: random.Random
) -> list[float]:
    """SIGKILL the command `kills` times, each at a moment of its own, then let it end."""
    done: list[float] = []
    while len(done) < kills:
        moment = moments.uniform(0.05, 0.6) * spent
        process = subprocess.Popen(
            [sys.executable, "-m", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(moment)
        if process.poll() is None:
            # In turn the parent alone, and the parent with its workers.
            (os.killpg if len(done) % 2 else os.kill)(process.pid, signal.SIGKILL)
            done.append(moment)
        else:  # it was through before its moment came: begin again, and strike earlier
            assert process.returncode == 0, words
            shutil.rmtree(words[-1])
            done.clear()  # those kills went with the folder
            spent *= 0.7
        process.wait()
    run(words)
    return done


def hashes(folder: Path, pattern: str) -> dict[str, str]:
    """SHA-256 by name of the files below a folder; there must be some."""
    found = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob(pattern))
        if path.is_file()
    }
    assert found, f"nothing in {folder}"
    return found


def losses(folder: Path) -> list[tuple[str, int, float]]:
    """Kind, step and loss of each line of metrics; their times differ from run to run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["kind"], line["step"], line["loss"]) for line in lines]


def report(name: str, kills: list[float], same: bool) -> bool:
    """Print the verdict and hand it on."""
    listed = ", ".join(f"{moment:.1f}" for moment in kills)
    print(
        f"{name}: killed {len(kills)} times (after {listed} s): {'same' if same else 'DIFFERENT'}"
    )
    return same


if __name__ == "__main__":
    main()
