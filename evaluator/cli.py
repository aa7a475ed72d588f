"""Command line of the evaluator."""

import click


@click.group()
def main() -> None:
    """Evaluator."""
