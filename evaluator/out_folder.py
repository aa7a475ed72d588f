"""Makes the folder that a command writes to, and finds out at once whether it can."""

from __future__ import annotations

import tempfile
from pathlib import Path

from evaluator.artifacts import remove_leftovers
from evaluator.errors import EvaluatorError


def prepare_out(folder: Path) -> None:
    """Create `folder`, write to it once, remove what killed writers left.

    Raises EvaluatorError where that cannot be done, before hours of work are lost on it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0")
    except OSError as error:
        raise EvaluatorError(f"--out {folder}: cannot be written ({error.strerror})") from None
    remove_leftovers(folder)
