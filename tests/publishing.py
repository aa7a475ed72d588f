"""What the tests of publish-files share: a published copy of the small dataset."""

from __future__ import annotations

import shutil
from pathlib import Path

from builder.publish.facts import Options
from builder.publish.files import publish_files
from builder.storage import Folder

OPTIONS = Options(
    title="Small defects",
    authors=("A. Publisher", "B. Publisher"),
    repo="someone/small",
    date="2026-05-31",
)


def published_copy(dataset: Path, out: Path, options: Options = OPTIONS) -> Path:
    """The dataset, copied and published."""
    shutil.copytree(dataset, out)
    publish_files(Folder(out), options)
    return out
