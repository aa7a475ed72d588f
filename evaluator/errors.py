"""The evaluator's one exception class."""

import click


class EvaluatorError(click.ClickException):
    """What went wrong, where, expected, found, and what to do, in one line.

    A click exception, so the command line prints the line and exits with 1; no traceback.
    """
