"""Command line of the evaluator."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from evaluator import __version__
from evaluator.evidence.cli import evidence
from evaluator.options import (
    PROTOCOL_NAMES,
    FiniteFloat,
    backbone_options,
    device_of,
    names_of,
    numbers_of,
    one_line_errors,
    weights_defaults,
)
from evaluator.tools_cli import export_onnx, fit, inspect

LAYOUTS = ("auto", "mvtec", "btad", "visa", "loco", "folders")
BACKBONE_HELP = (
    "SPEC: a run folder of the trainer, a backbone.json, random:ARCH[:SEED], "
    "torchvision:ARCH[:WEIGHTS], or a safetensors or state-dict file "
    "(FILE[,arch=ARCH][,norm=imagenet|signed]). NAME= may be left out for random: and "
    "torchvision:."
)
DATA = click.option(
    "--data",
    "root",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of the categories: MVTec AD, BTAD, VisA, MVTec LOCO, or good/ and defective/.",
)
CATEGORIES = click.option("--categories", metavar="A,B", help="Only these; default: all.")
LAYOUT = click.option(
    "--layout",
    default="auto",
    show_default=True,
    type=click.Choice(LAYOUTS),
    help="How --data is laid out; auto: told by its folders.",
)
PROTOCOL = click.option(
    "--protocol",
    "protocol_name",
    default="paper",
    show_default=True,
    type=click.Choice(PROTOCOL_NAMES),
    help="Resize, crop, interpolation, epsilon and blur; paper: 256 to 224 px, anomalib and full: "
    "256 px.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="evaluator")
def main() -> None:
    """Compare pre-trained backbones by what PaDiM makes of them on inspection photographs."""


@main.command()
@DATA
@click.option(
    "--backbone",
    "specs",
    required=True,
    multiple=True,
    metavar="NAME=SPEC",
    help=f"Repeatable. {BACKBONE_HELP}",
)
@click.option(
    "--out",
    required=True,
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the report; the same command continues an interrupted one.",
)
@CATEGORIES
@LAYOUT
@PROTOCOL
@click.option(
    "--protocol-diff",
    is_flag=True,
    help="Also score the same weights under the other protocols, and print how far they move.",
)
@click.option(
    "--seeds",
    default=5,
    show_default=True,
    type=click.IntRange(1, 100),
    help="Draws of the random dimensions: seeds 0, 1, ...",
)
@click.option(
    "--learning-curve",
    metavar="A,B,C",
    help="Also fit on the first A, B, C of the shuffled normal photographs.",
)
@click.option(
    "--bootstrap",
    "draws",
    default=10_000,
    show_default=True,
    type=click.IntRange(0, 100_000),
    help="Draws of the test images for the 95 % intervals and comparisons; 0: none.",
)
@click.option(
    "--resize",
    type=click.IntRange(16, 4096),
    help="Pixels; photographs become squares of this size. Default: the protocol's.",
)
@click.option("--crop", type=click.IntRange(0, 4096), help="Pixels of the centre crop; 0: none.")
@click.option("--blur-sigma", type=FiniteFloat(0, 100), help="Gaussian blur of the maps, pixels.")
@click.option(
    "--epsilon",
    type=FiniteFloat(0, 1e6, min_open=True),
    help="Added to the covariances' diagonals.",
)
@backbone_options
@click.option(
    "--features",
    "features_folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder where features are kept for other runs; default: OUT/features.",
)
@click.option(
    "--features-max",
    default=20.0,
    show_default=True,
    metavar="GIB",
    type=FiniteFloat(0),
    help="Most that the folder may hold between categories; the longest unused go first.",
)
@click.option(
    "--feature-dtype",
    default="float32",
    show_default=True,
    type=click.Choice(["float16", "float32"]),
    help="float16 halves the folder; maps then differ by 1e-4 in the median, 1e-2 at most.",
)
def padim(
    root: Path,
    specs: tuple[str, ...],
    out: Path,
    categories: str | None,
    layout: str,
    protocol_name: str,
    protocol_diff: bool,
    seeds: int,
    learning_curve: str | None,
    draws: int,
    resize: int | None,
    crop: int | None,
    blur_sigma: float | None,
    epsilon: float | None,
    features_folder: Path | None,
    features_max: float,
    feature_dtype: str,
    **common: Any,
) -> None:
    """Score every backbone on every category with PaDiM.

    Writes report.html, report.json, table.csv, table.md and figure6.png to --out and prints the
    table.
    """
    chosen = names_of(categories, "--categories")
    sizes = numbers_of(learning_curve, "--learning-curve", 2)
    with one_line_errors(out):
        from evaluator.backbones import LayersAndDims
        from evaluator.cells import Resources
        from evaluator.features import FeatureCache
        from evaluator.padim import usable_cores
        from evaluator.protocols import PROTOCOLS, changed
        from evaluator.report import Bootstrap
        from evaluator.run import Options, evaluate

        protocol = changed(
            PROTOCOLS[protocol_name],
            resize_px=resize,
            crop_px=crop,
            blur_sigma_px=blur_sigma,
            epsilon=epsilon,
        )
        if protocol.crop_px > protocol.resize_px:
            raise click.UsageError(
                f"--crop {protocol.crop_px} is larger than --resize {protocol.resize_px}"
            )
        layers = tuple(names_of(common["layers"], "--layers") or ()) or None
        device = device_of(common["device"])
        options = Options(
            root=root,
            layout=layout,
            specs=specs,
            categories=chosen,
            protocol=protocol,
            seeds=list(range(seeds)),
            feature_dtype=feature_dtype,
            learning_curve=sizes,
            bootstrap=Bootstrap(draws=draws, seed=0, level=0.95),
            protocol_diff=protocol_diff,
            weights_defaults=weights_defaults(
                common["arch"], common["input_norm"], common["mean"], common["std"]
            ),
            layers_and_dims=LayersAndDims(layers, common["dims"]),
            device=device,
            resources=Resources(
                out=out,
                features=FeatureCache(
                    features_folder or out / "features", int(features_max * 2**30)
                ),
                batch_size=common["batch_size"],
                max_memory_bytes=int(common["max_memory"] * 2**30),
                cores=usable_cores(device),
            ),
        )
        click.echo(evaluate(options))
        click.echo(f"{out}: report.html, report.json, table.csv, table.md, figure6.png")


@main.command()
@DATA
@CATEGORIES
@LAYOUT
@PROTOCOL
def audit(root: Path, categories: str | None, layout: str, protocol_name: str) -> None:
    """Look at every photograph and mask, and say what would distort the scores.

    Exit code 1 when something makes scoring impossible.
    """
    chosen = names_of(categories, "--categories")
    with one_line_errors(root, "Interrupted."):
        from evaluator.audited import audited
        from evaluator.datasets import find_categories
        from evaluator.protocols import PROTOCOLS

        found = find_categories(root, chosen, layout)
        click.echo(audited(found, PROTOCOLS[protocol_name]))


@main.command()
@click.argument("report", type=click.Path(path_type=Path, file_okay=False))
def recheck(report: Path) -> None:
    """Work out the numbers of a report again, from its statistics and without images.

    Metrics, curves, image scores, regions, counts, intervals, comparisons and table follow from the
    statistics; dimensions, protocol hash and published numbers from this version; maps are read and
    hashed. Learning curves, shares of layers and other protocols have no statistics: their form is
    checked, and cells/*.json where it is there. Names, hashes, versions and times are records.
    report.html and figure6.png are not looked at.
    """
    with one_line_errors(report, "Interrupted."):
        from evaluator.recheck import recheck as work_out_again

        click.echo(work_out_again(report))


for command in (fit, inspect, export_onnx, evidence):
    main.add_command(command)
