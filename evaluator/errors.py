"""The evaluator's one exception class, and how to tell that memory ran out."""

import click


class EvaluatorError(click.ClickException):
    """What went wrong, where, expected, found, and what to do, in one line.

    A click exception, so the command line prints the line and exits with 1; no traceback.
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the CPU or on a GPU.

    Torch's have no class of their own on the CPU, and naming the GPU's would import torch here.
    """
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "allocate memory" in text)
    )
