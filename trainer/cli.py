"""Command line of the trainer."""

import click


@click.group()
def main() -> None:
    """Trainer."""
