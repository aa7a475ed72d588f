"""Stands in for the node: slots of a local dataset, indexed with tarfile and NumPy alone."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from trainer.artifacts import parse_model
from trainer.dataset import Dataset
from trainer.node import Slot


class Slots:
    """`shard` as the node's; shards in `quarantined` are None, and `asked` lists the calls."""

    def __init__(self, folder: Path, dataset: Dataset) -> None:
        self.quarantined: set[int] = set()
        self.asked: list[int] = []
        self.slots: list[Slot] = []
        first = 0
        for record in dataset.shards:
            path = folder / record.name
            rows = index(path)
            about = path.stat()
            stamp = (about.st_size, about.st_mtime_ns, about.st_ino)
            self.slots.append(Slot(path, rows, first, stamp))
            first += len(rows)

    def shard(self, shard: int, stop: Callable[[], bool]) -> Slot | None:
        self.asked.append(shard)
        return None if shard in self.quarantined else self.slots[shard]


def dataset_of(folder: Path) -> Dataset:
    """dataset.json as it stands, whatever its contents."""
    path = folder / "dataset.json"
    return parse_model(Dataset, json.loads(path.read_text()), str(path))


def index(path: Path) -> np.ndarray:
    """int64 [n, 5]: image start, bytes, theta start, bytes, normal or label."""
    with tarfile.open(path) as tar:
        held = {m.name: (m.offset_data, m.size, tar.extractfile(m).read()) for m in tar}  # type: ignore[union-attr]
    parameters = [name for name in held if name.endswith(".normal.npy")]
    if parameters:
        name = parameters[0].removesuffix(".normal.npy") + ".theta.npy"
        normal = np.load(io.BytesIO(held[parameters[0]][2]))
        start, size, data = held[name]
        each = np.load(io.BytesIO(data)).nbytes // len(normal)
        data_start = start + size - each * len(normal)
        return np.array([[0, 0, data_start + each * i, each, n] for i, n in enumerate(normal)])
    rows: dict[str, list[int]] = {}
    for name, (start, size, data) in held.items():
        key, suffix = name.split(".", 1)
        row = rows.setdefault(key, [0] * 5)
        if suffix == "theta.npy":
            row[2:4] = start, size
        elif suffix == "json":
            row[4] = int(json.loads(data).get("normal", row[4]))
        elif suffix == "cls":
            row[4] = int(data)
        else:
            row[0:2] = start, size
    return np.array(list(rows.values()), np.int64)
