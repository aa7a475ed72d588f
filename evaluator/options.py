"""What the commands share: option types, one-line errors, devices, normalisations."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from evaluator.errors import EvaluatorError, is_out_of_memory

if TYPE_CHECKING:
    import torch

    from evaluator.backbones import WeightsDefaults

INTERRUPTED = 130
PROTOCOL_NAMES = ("paper", "anomalib", "full")  # a test compares them with protocols.PROTOCOLS


class FiniteFloat(click.FloatRange):
    """A number within a range; click's own lets not-a-number pass every bound."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number; a usage error where it is not finite or out of range."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


@contextlib.contextmanager
def one_line_errors(out: Path, interrupted: str = "") -> Iterator[None]:
    """Ctrl-C is one line and exit code 130; a full disk, no memory, no torch one line and 1."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise EvaluatorError(
            f"{error.name} is not installed; pip install 'semiformula[eval]' brings all it needs"
        ) from None
    except KeyboardInterrupt:
        click.echo(interrupted or f"Interrupted; the same command continues in {out}.", err=True)
        raise SystemExit(INTERRUPTED) from None
    except OSError as error:  # a full disk, a folder without permission
        raise EvaluatorError(f"{error.filename or out}: {error.strerror or error}") from None
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise EvaluatorError(
            f"memory ran out ({reason:.200}); lower --batch-size or --max-memory, the same command "
            f"continues in {out}"
        ) from None


def names_of(text: str | None, option: str) -> list[str] | None:
    """The parts of a comma-separated option."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise click.UsageError(f"{option} {text!r}: expected names separated by commas")
    return parts


def numbers_of(text: str | None, option: str, least: int) -> list[int]:
    """The whole numbers of a comma-separated option, ascending, each once."""
    try:
        numbers = sorted({int(part) for part in names_of(text, option) or []})
    except ValueError:
        raise click.UsageError(f"{option} {text!r}: expected whole numbers A,B,C") from None
    if numbers and numbers[0] < least:
        raise click.UsageError(f"{option} {text!r}: {numbers[0]} is below {least}")
    return numbers


def weights_defaults(
    arch: str, input_norm: str | None, mean: str | None, std: str | None
) -> WeightsDefaults:
    """What weights files do not say of themselves, from --arch, --input-norm, --mean, --std."""
    from evaluator.backbones import NORMALISATIONS, WeightsDefaults

    if (mean is None) != (std is None) or (mean is not None and input_norm is not None):
        raise click.UsageError("give --input-norm, or --mean and --std together")
    if mean is not None and std is not None:
        spread = _rgb(std, "--std")
        if min(spread) <= 0:
            raise click.UsageError(f"--std {std}: must be above 0")
        return WeightsDefaults(arch, _rgb(mean, "--mean"), spread)
    if input_norm is not None:
        return WeightsDefaults(arch, *NORMALISATIONS[input_norm])
    return WeightsDefaults(arch)


def _rgb(text: str, option: str) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(part) for part in text.split(","))
    except ValueError:
        raise click.UsageError(f"{option} {text!r}: expected three numbers R,G,B") from None
    if not all(abs(value) < 1e6 for value in (red, green, blue)):  # not-a-number included
        raise click.UsageError(f"{option} {text!r}: expected three finite numbers")
    return red, green, blue


def device_of(name: str) -> torch.device:
    """The torch device of --device; `auto` is cuda where there is one."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise EvaluatorError("--device cuda: torch finds no CUDA device; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def backbone_options(command: Any) -> Any:
    """The options of every command that opens weights and runs them."""
    for option in reversed(
        [
            click.option(
                "--arch", default="", help="Architecture of weights files that do not name theirs."
            ),
            click.option(
                "--dims",
                default=None,
                type=click.IntRange(1, 100_000),
                help="Random dimensions; default: the architecture's.",
            ),
            click.option(
                "--layers",
                default=None,
                metavar="A,B,C",
                help="Layers, by torchvision's names; default: the architecture's.",
            ),
            click.option(
                "--batch-size",
                default=32,
                show_default=True,
                type=click.IntRange(1, 4096),
                help="Images.",
            ),
            click.option(
                "--device",
                default="auto",
                show_default=True,
                type=click.Choice(["auto", "cpu", "cuda"]),
                help="auto: cuda where there is one.",
            ),
            click.option(
                "--max-memory",
                default=1.0,
                show_default=True,
                metavar="GIB",
                type=FiniteFloat(0, 4096, min_open=True),
                help="Most that the scoring may take at once.",
            ),
            click.option(
                "--input-norm",
                default=None,
                type=click.Choice(["imagenet", "signed"]),
                help="Normalisation of weights files that do not name theirs; signed: pixels in "
                "[-1, 1].",
            ),
            click.option(
                "--mean", default=None, metavar="R,G,B", help="The same as numbers, with --std."
            ),
            click.option(
                "--std", default=None, metavar="R,G,B", help="See --mean; pixels are in [0, 1]."
            ),
        ]
    ):
        command = option(command)
    return command
