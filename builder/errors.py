"""The builder's one exception class."""

import click


class BuilderError(click.ClickException):
    """What went wrong, where, expected, found, and what to do, in one line.

    A click exception, so the command line prints the line and exits with 1; no traceback.
    """
