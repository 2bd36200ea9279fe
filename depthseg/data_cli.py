"""`depthseg data`: training data looked at before it is used, and packed for reading fast."""

import contextlib
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from depthseg import options as opt
from depthseg.errors import NOTHING_TO_DO, SOME_FAILED, DepthsegError
from depthseg.options import DEPTH, INPUT, OUTPUT, RUN
from depthseg.terminal import FAILURES_SHOWN, interruptible, listing, progress, say, take

app = typer.Typer(name="data", help="Look at training data, and pack it for reading fast.", no_args_is_help=True)

Roots = Annotated[
    list[Path],
    typer.Argument(
        help="As --data of `train`: SA-1B layout in folders or tars, EfficientViT's layout, packs, COCO files.", show_default=False
    ),
]
Workers = Annotated[int, typer.Option(min=1, help="Threads that decode.", rich_help_panel=RUN)]


@app.command()
def check(
    roots: Roots,
    limit: Annotated[int | None, typer.Option(min=1, help="Look at the first so many samples.", rich_help_panel=INPUT)] = None,
    workers: Workers = 2,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Read every sample and say what is wrong with it: broken pictures, masks of other sizes, none at all, duplicates.

    [bold]depthseg data check sa1b/[/bold]   one line a sample on stdout; exit code 3 where something cannot be used
    """
    with contextlib.redirect_stdout(sys.stderr), interruptible("stopped; nothing was changed"):
        from depthseg import packs, sa1b

        entries = sa1b.index(roots)[:limit]
        found = packs.unpaired(roots)
        with progress("samples") as show:
            found += packs.check(entries, workers, show)
    unusable = sum(packs.FAULTS[fault][0] for _, fault, _ in found)
    rows = [[key, fault, said] for key, fault, said in found]
    if rows or as_json:
        listing(["sample", "fault", "what is wrong"], rows, as_json, samples=len(entries), unusable=unusable)
    say(f"{len(entries):,} samples; {unusable:,} cannot be used, {len(found) - unusable:,} are doubtful")
    if unusable:
        raise typer.Exit(SOME_FAILED)


@app.command()
def pack(
    roots: Roots,
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the shards.", rich_help_panel=OUTPUT, metavar="DIR")],
    side: Annotated[
        int, typer.Option(min=32, help="Longest side of the pictures: the encoder's input, more where crops are to be seen.")
    ] = 512,
    depth_maps: Annotated[
        str | None, typer.Option(help="Folder of depth maps to be packed with them.", rich_help_panel=DEPTH, metavar="DIR")
    ] = None,
    workers: Workers = 2,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Write resized samples (picture, 16-bit depth, masks) into tars of about 256 MB, which --data reads fast and in any order.

    [bold]depthseg depth sa1b/ -o maps[/bold]   then   [bold]depthseg data pack sa1b/ --depth-maps maps -o packs[/bold]
    """
    with contextlib.redirect_stdout(sys.stderr), interruptible(f"stopped; the same command goes on behind the last shard in {output}"):
        from depthseg import packs, sa1b
        from depthseg.depth import DepthFolder, maps_of
        from depthseg.schema import Image

        entries = sa1b.index(roots)
        folder = DepthFolder(depth_maps) if depth_maps else None
        take(output)

        def depth_of(entry: sa1b.Entry, size: tuple[int, int]):
            own = sa1b.depth_of(entry)
            return own if own is not None or folder is None else folder([Image(entry.key, 0, None, size)])[0]

        packed = folder is not None or any(e.depth is not None for e in entries)
        with progress("samples") as show:
            count, left_out = packs.pack(
                entries, output, side, depth_of if packed else None, maps_of(depth_maps, *map(str, roots)), workers, progress=show
            )
    for reason in left_out[:FAILURES_SHOWN]:
        say(f"left out: {reason}")
    if as_json:
        typer.echo(json.dumps({"schema_version": 1, "output": str(output), "samples": count, "left_out": left_out}))
    else:
        typer.echo(output)
    say(f"{count:,} samples are packed, {len(left_out):,} were left out")
    if not count:
        raise DepthsegError("no sample could be packed", "`depthseg data check` names what is wrong.", NOTHING_TO_DO)
    if left_out:
        raise typer.Exit(SOME_FAILED)
