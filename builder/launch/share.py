"""What all schedulers are told: where the dataset is, by how many tasks, in words that are safe."""

from __future__ import annotations

import re
from pathlib import Path

from builder.errors import BuilderError
from builder.estimate import estimate
from builder.plan import read_plan
from builder.storage import open_storage

# Long beside the seconds that a task takes to start, short beside what a lost one costs.
TASK_SECONDS = 20 * 60


def farm_url(url: str) -> str:
    """The URL as every node may use it: a folder's absolute path. Raises BuilderError."""
    if not url.isprintable():
        raise BuilderError(f"{url!r}: a URL of printable characters expected")
    return url if "://" in url else str(Path(url).absolute())


def task_count(url: str, asked: int | None, cores: int) -> int:
    """How many tasks: as asked, or about twenty minutes each; at most one a shard.

    Raises BuilderError when there is no plan.
    """
    storage = open_storage(url)
    plan = read_plan(storage)
    if asked is None:
        asked = round(estimate(storage, plan).core_seconds / (cores * TASK_SECONDS))
    return max(1, min(asked, plan.shard_count))


def refuse_odd_words(**options: str | None) -> None:
    """Raise BuilderError for an option that holds more than a word: it ends up in a script."""
    for name, value in options.items():
        if value is not None and not re.fullmatch(r"[\w.:,+@/%=\[\]-]+", value, re.ASCII):
            raise BuilderError(f"--{name.replace('_', '-')} {value!r}: expected one plain word")


def environment(pairs: tuple[str, ...]) -> dict[str, str]:
    """NAME=VALUE options as a table. Raises BuilderError for what looks like a secret."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise BuilderError(f"--env {pair!r}: expected NAME=VALUE")
        if re.search("SECRET|TOKEN|PASSWORD|KEY", name.upper()):
            raise BuilderError(
                f"--env {name}: looks like a secret, and a manifest is no place for one; name the "
                "scheduler's own secret or role instead"
            )
        found[name] = value
    return found
