"""`depthseg convert`: a run in the formats of other tools."""

from pathlib import Path
from typing import Annotated

import typer

from depthseg import options as opt
from depthseg.errors import SOME_FAILED, DepthsegError
from depthseg.options import INPUT, OUTPUT, RUN
from depthseg.terminal import interruptible, many, progress, say, take

NAMES = "coco-results coco-instances instances labelmap overlay cutouts yolo-seg labelme npz".split()  # those of export.FORMATS
FAILURES_SHOWN = 10


def convert(
    run: Annotated[Path, typer.Argument(help="The output folder of `depthseg segment`.", metavar="RUN", show_default=False)],
    output: Annotated[
        Path,
        typer.Option("-o", "--output", help="Each format gets a folder of its name here.", rich_help_panel=OUTPUT, metavar="FOLDER"),
    ],
    to: Annotated[str, typer.Option(help=f"Formats, separated by commas: {', '.join(NAMES)}.", rich_help_panel=OUTPUT, metavar="FORMATS")],
    images: Annotated[
        Path | None,
        typer.Option(
            help="The folder of the photographs: overlay and cutouts need them, labelme then leads to them.",
            rich_help_panel=INPUT,
            metavar="FOLDER",
        ),
    ] = None,
    polygons: Annotated[
        bool, typer.Option("--polygons", help="coco-instances: polygons instead of RLE; holes are cut open.", rich_help_panel=OUTPUT)
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there already.", rich_help_panel=RUN)] = False,
    debug: opt.Debug = False,
) -> None:
    """Write the masks of a run, finished or not, in formats that other tools read; no model is needed.

    [bold]depthseg convert out -o dataset --to coco-instances,yolo-seg[/bold]\n
    [bold]depthseg convert out -o pictures --to cutouts,overlay --images photos[/bold]
    """
    names = list(dict.fromkeys(name.strip() for name in to.split(",")))
    if strange := [name for name in names if name not in NAMES]:
        raise DepthsegError(f"no format is called '{strange[0]}'", f"Use {', '.join(NAMES)}.")
    if images and not images.is_dir():
        raise DepthsegError(f"there is no folder {images}", "Check --images.")
    if polygons and "coco-instances" not in names:
        raise DepthsegError("--polygons is about coco-instances alone", "Leave it out, or add coco-instances to --to.")
    from depthseg import export

    blind = [name for name in names if name in export.NEED_PHOTOGRAPHS and not images]
    if blind:
        hint = "Add --images FOLDER; the keys of the run are paths below it."
        raise DepthsegError(f"{' and '.join(blind)} need the photographs, and a run does not record where they lie", hint)
    found = export.Run.read(run, images.resolve() if images else None)
    export.check_output(output, names, [run, *([images] if images else [])], overwrite)
    take(output)
    with interruptible("stopped; run the same command with --overwrite to start again"), progress("images") as show:
        report = export.convert(found, output, names, polygons, show)

    for name, failure in report.failures[:FAILURES_SHOWN]:
        say(f"failed: {failure.image.key}, {name}: {failure.reason}")
    if len(report.failures) > FAILURES_SHOWN:
        say(f"failed: {len(report.failures) - FAILURES_SHOWN} more")
    for name, (instances, pixels) in report.lost.items():
        if instances:
            say(f"{name}: {instances} of {report.instances} instances are not exact: {pixels} pixels {export.LOSSES[name]}")
    say(f"{many(report.images, 'image')}, {many(report.instances, 'mask')}")
    typer.echo(output)
    if report.failures:
        raise typer.Exit(SOME_FAILED)
