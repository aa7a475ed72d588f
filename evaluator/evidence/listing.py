"""Which arms are meant, and the commands that make them, for people to read."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from evaluator.errors import EvaluatorError
from evaluator.evidence import commands
from evaluator.evidence.commands import Place
from evaluator.evidence.experiment import Arm


def selected(arms: Sequence[Arm], names: Sequence[str] | None) -> list[Arm]:
    """The arms of these names and those whose runs they take, in order; without names all."""
    if names is None:
        return list(arms)
    known = [arm.name for arm in arms]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f" ({', '.join(known)})"
            raise EvaluatorError(f"--only: no arm {name!r}{hint}")
    sources = {arm.experiment.runs for arm in arms if arm.name in names}
    return [arm for arm in arms if arm.name in names or arm.name in sources]


def command_lines(place: Place, arms: Sequence[Arm]) -> Iterator[str]:
    """Every command of the arms in order, each arm under a line with its name."""
    yield shlex.join(commands.demo_data(place))
    yield from _linked(place.inspection, commands.inspection_links(place))
    for arm in arms:
        experiment = arm.experiment
        yield f"# {arm.name}: {experiment.title}"
        if experiment.data is not None:
            links = commands.normals_links(place, experiment.data)
            yield from _linked(place.normals(experiment.data), links)
            yield from map(shlex.join, commands.of_data(place, experiment.data))
        yield from map(shlex.join, commands.of_arm(place, arm))


def _linked(folder: Path, links: Mapping[str, Path]) -> Iterator[str]:
    yield shlex.join(["mkdir", "-p", str(folder)])
    for name, target in links.items():
        yield shlex.join(["ln", "-sfn", str(target.absolute()), str(folder / name)])
