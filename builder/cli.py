"""Command line of the builder."""

import click


@click.group()
def main() -> None:
    """Builder."""
