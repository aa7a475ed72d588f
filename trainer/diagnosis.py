"""What `trainer doctor` makes of its measurements: a prediction, the bottleneck, and what to do."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

KEEPS_UP = 1.1  # workers are advised for so many times the next slower stage's speed


@dataclass(frozen=True)
class Stage:
    """A stage's speed, and what it was measured on."""

    name: str
    images_per_s: float
    remark: str


@dataclass
class Findings:
    """What was measured; `measured` is the speed with the loader, where there was time for it."""

    cores: int
    workers: int
    on_cuda: bool
    remote: bool
    decodes: bool  # false for a parameter-only dataset
    dataset_bytes: int
    decoded_bytes: int  # what a cache of all decoded images takes
    threads: int = 1  # of the network, on a CPU
    decode_of_one: float = 0.0  # images a second of one worker alone on the machine
    measured: float | None = None
    stages: dict[str, Stage] = field(default_factory=dict)

    def add(self, name: str, images_per_s: float, remark: str) -> None:
        """Note a stage."""
        self.stages[name] = Stage(name, images_per_s, remark)

    def rate(self, name: str) -> float:
        """Images a second of a stage, without end for one that was not measured."""
        stage = self.stages.get(name)
        return math.inf if stage is None else stage.images_per_s


def predicted(found: Findings) -> float:
    """Images a second of a run: its slowest stage, or what the cores can do of all together.

    On a GPU the cores fetch, verify and decode; on a CPU they train as well.
    """
    seconds = 1 / found.rate("verify")
    if found.decodes and found.decode_of_one:
        seconds += 1 / found.decode_of_one
    if not found.on_cuda:
        seconds += found.threads / found.rate("device")
    together = found.cores / seconds if seconds else math.inf
    return min(together, *(stage.images_per_s for stage in found.stages.values()))


def bottleneck(found: Findings) -> Stage:
    """The slowest stage."""
    return min(found.stages.values(), key=lambda stage: stage.images_per_s)


def advice(found: Findings) -> str:
    """One sentence: the bottleneck, and what to do about it."""
    slowest = bottleneck(found)
    others = [s.images_per_s for s in found.stages.values() if s.name != slowest.name]
    said = f"The bottleneck is the {slowest.name}"
    gain = f"{min(others) / slowest.images_per_s:.1f} times" if others else ""
    gained = f" (the next is {gain} as fast)" if others else ""
    return f"{said}{gained}: {REMEDIES[slowest.name](found)}."


def _network(found: Findings) -> str:
    room = f"--cache-bytes {size_text(found.dataset_bytes)}"
    if found.remote:
        return f"{room} holds the dataset, and later epochs read no network; or move it nearer"
    return "put the dataset on a faster disk, or in memory"


def _verify(found: Findings) -> str:
    if found.decodes:
        cache = f"--cache-decoded {size_text(found.decoded_bytes)}"
        return f"{cache} keeps later epochs from reading shards; or a faster disk"
    return "a faster disk or core, for each shard is hashed whenever it is used"


def _decode(found: Findings) -> str:
    cache = f"--cache-decoded {size_text(found.decoded_bytes)} decodes each image once"
    rest = min(s.images_per_s for s in found.stages.values() if s.name != "decode")
    wanted = math.ceil(KEEPS_UP * rest / max(found.decode_of_one, 1e-9))
    spare = found.cores - 1
    if found.workers < min(wanted, spare):
        more = f"--workers {min(wanted, spare)}"
        return f"{more} keeps up" if wanted <= spare else f"{more} helps, and {cache}"
    return f"{cache}; or train on parameters without images, which the device paints"


def _hand_off(found: Findings) -> str:
    return "a larger --batch-size hands over more at a time, and fewer --workers wake it less often"


def _device(found: Findings) -> str:
    if found.on_cuda:
        return "the data keep up with it; more devices (torchrun) or a smaller --size or --arch"
    return "the data keep up with it; a GPU, or a smaller --size or --arch"


REMEDIES = {
    "network": _network,
    "verify": _verify,
    "decode": _decode,
    "hand-off": _hand_off,
    "device": _device,
}


def size_text(count: int) -> str:
    """Bytes as an option takes them, rounded up.

    >>> size_text(1_500_000_000), size_text(20_000)
    ('2GB', '1MB')
    """
    unit, name = (10**9, "GB") if count >= 10**9 else (10**6, "MB")
    return f"{-(-count // unit)}{name}"


def report(found: Findings) -> str:
    """The table of stages, the prediction, and the advice, for people."""
    slowest = bottleneck(found).images_per_s
    lines = [f"{'stage':<10}{'images/s':>12}{'busy':>8}"]
    lines += [
        f"{s.name:<10}{s.images_per_s:>12,.1f}{100 * slowest / s.images_per_s:>6.0f} %  {s.remark}"
        for s in found.stages.values()
    ]
    measured = (
        "" if found.measured is None else f"; measured with the loader: {found.measured:,.1f}"
    )
    lines.append(f"predicted: {predicted(found):,.1f} images/s{measured}")
    lines.append(advice(found))
    return "\n".join(lines)
