"""TensorBoard files, made of metrics.jsonl and of nothing else: an extra.

The file's bytes follow from the lines alone: its name is fixed, and the time of an event is the
training time up to it. So a resumed run writes it anew as it was, and no curve is there twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from trainer.artifacts import atomic_file
from trainer.errors import TrainerError

EVENTS_FILE = "tensorboard/events.out.tfevents.0.semiformula"


class Events:
    """RUN/tensorboard/: begins with the lines that there are, then grows with each.

    Raises TrainerError when the package is not installed.
    """

    def __init__(self, out: Path, lines: Iterable[dict[str, Any]]) -> None:
        try:
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ModuleNotFoundError:
            raise TrainerError(
                "--tensorboard needs one more package: pip install 'semiformula[tensorboard]'"
            ) from None
        self._seconds, self._samples = 0.0, 0
        with atomic_file(out / EVENTS_FILE) as file:
            writer = RecordWriter(file)
            writer.write(_event(0.0, file_version="brain.Event:2"))
            for line in lines:
                writer.write(self._record(line))
            writer.flush()
        self._file = (out / EVENTS_FILE).open("ab")
        self._writer = RecordWriter(self._file)

    def append(self, line: dict[str, Any]) -> None:
        """Add the event of one line of metrics.jsonl."""
        self._writer.write(self._record(line))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _record(self, line: dict[str, Any]) -> bytes:
        from tensorboard.compat.proto.summary_pb2 import Summary

        if line["kind"] == "train":
            self._seconds += (line["samples"] - self._samples) / line["images_per_s"]
            self._samples = line["samples"]
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(line)]
        return _event(self._seconds, step=line["step"], summary=Summary(value=values))


def scalars(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The numbers of a line and their names: those of training and of held-out samples apart.

    >>> list(scalars({"kind": "holdout", "step": 7, "samples": 28, "loss": 0.5, "terms": {}}))
    [('loss/holdout', 0.5)]
    """
    kind = line["kind"]
    yield f"loss/{kind}", line["loss"]
    for name, value in line["terms"].items():
        yield f"{name}/{kind}", value
    if kind == "train":
        for name in ("epoch", "lr", "grad_norm", "images_per_s", "data_wait", "device"):
            yield name, line[name]
        for name, value in line["waits"].items():
            yield f"waits/{name}", value


def _event(seconds: float, **fields: Any) -> bytes:
    from tensorboard.compat.proto.event_pb2 import Event

    data: bytes = Event(wall_time=seconds, **fields).SerializeToString(deterministic=True)
    return data
