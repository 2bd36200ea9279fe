"""`depthseg weights`: list, pull, verify, find, convert, average and remove."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from depthseg import catalog
from depthseg import options as opt
from depthseg.errors import MISSING_PIECE, DepthsegError
from depthseg.options import MODEL, OUTPUT
from depthseg.terminal import downloads, interruptible, listing, say, take

app = typer.Typer(help="Weights on this machine: list, pull, verify, find, convert, average, remove.", no_args_is_help=True)
Names = Annotated[list[str], typer.Argument(help="Names from `depthseg weights list`.", show_default=False)]


@app.command("list")
def weights_list(
    here: Annotated[bool, typer.Option("--here", help="Only what is on this machine.")] = False,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Every set of weights: size, licence, source and whether it is here."""
    from depthseg import weights

    rows = []
    remarks: dict[str, list[str]] = {}
    for role, entries in catalog.TABLES.items():
        for name, entry in entries.items():
            if not (entry.file or entry.hub):
                continue
            state = weights.state(entry)
            if here and state not in ("here", "embedded"):
                continue
            path = weights.find(entry)
            size = sum(f.stat().st_size for f in (path.iterdir() if path.is_dir() else [path])) / 1e6 if path else entry.megabytes
            licence, _, remark = entry.licence.partition(": ")
            for text in filter(None, (remark, entry.note)):
                remarks.setdefault(text, []).append(name)
            source = entry.hub or (entry.url or "").split("/")[2:3] or "this package"
            rows.append([name, role, f"{size:.1f} MB" if size else "", licence, source if isinstance(source, str) else source[0], state])
    listing(["name", "role", "size", "licence", "source", "state"], rows, as_json)
    for text, which in remarks.items() if not as_json else ():
        typer.echo(f"{', '.join(dict.fromkeys(which))}: {text}")


@app.command("pull")
def weights_pull(names: Names, debug: opt.Debug = False) -> None:
    """Fetch weights now, so that runs need no network; one that broke off is continued."""
    entries = {name: catalog.pullable(name) for name in names}
    from depthseg import weights

    with contextlib.redirect_stdout(sys.stderr), interruptible("stopped; run the same command again to go on"):
        for name, entry in entries.items():
            with downloads() as fetched:
                path = weights.pull(entry, name, fetched)
            for note in catalog.terms({name: entry}):
                say(note)
            say(f"{name}: {path}")


@app.command("verify")
def weights_verify(
    names: Annotated[list[str] | None, typer.Argument(help="These; without a name all that is here.", show_default=False)] = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Compare weights with their publishers' hashes, or with those written down when they were pulled."""
    from depthseg import weights

    chosen = (
        {n: catalog.pullable(n) for n in names} if names else {f"{n} ({r})": e for r, t in catalog.TABLES.items() for n, e in t.items()}
    )
    found = {name: weights.verify(entry) for name, entry in chosen.items() if entry.file or entry.hub}
    rows = [[name, state] for name, state in found.items() if names or state != "missing"]
    listing(["name", "state"], rows, as_json)
    if bad := [name for name, state in rows if state not in ("sound", "no reference")]:
        raise DepthsegError(f"not sound: {', '.join(bad)}", "Run `depthseg weights rm`, then `depthseg weights pull`.", MISSING_PIECE)


@app.command("path")
def weights_path(name: Annotated[str, typer.Argument(help="A name from `depthseg weights list`.")], debug: opt.Debug = False) -> None:
    """Print where weights lie."""
    from depthseg import weights

    entry = catalog.pullable(name)
    path = weights.find(entry)
    if path is None:
        raise DepthsegError(f"the weights of {name} are not on this machine", f"Fetch them: depthseg weights pull {name}", MISSING_PIECE)
    typer.echo(path)


@app.command("rm")
def weights_rm(names: Names, debug: opt.Debug = False) -> None:
    """Delete pulled weights."""
    entries = {name: catalog.pullable(name) for name in names}
    from depthseg import weights

    for name, entry in entries.items():
        say(f"{name}: {weights.remove(entry, name) / 1e6:.1f} MB freed")


Written = Annotated[Path, typer.Option("-o", "--output", help="The .safetensors to write.", rich_help_panel=OUTPUT, metavar="FILE")]
Half = Annotated[bool, typer.Option("--half", help="Matrices and kernels in fp16.", rich_help_panel=OUTPUT)]


@app.command("convert")
def weights_convert(
    source: Annotated[Path, typer.Argument(help="A checkpoint: .pt, .pkl or .safetensors.", metavar="FILE")],
    output: Written,
    model: Annotated[str, typer.Option(help="The segmentation model or ViTDet that it fits.", rich_help_panel=MODEL, metavar="NAME")],
    half: Half = False,
    debug: opt.Debug = False,
) -> None:
    """Turn a checkpoint into safetensors with a card, and a plain one into the start of a depth-aware model.

    [bold]depthseg weights convert efficientvit_sam_l2.pt -o start.safetensors --model efficientvit-sam-l2-depth[/bold]
    """
    catalog.pullable(model)
    _writable(output)
    from depthseg.weights import convert

    _told(convert(source, output, model, half), output)


@app.command("mean")
def weights_mean(
    sources: Annotated[list[Path], typer.Argument(help="Checkpoints of one model.", metavar="FILE", show_default=False)],
    output: Written,
    model: Annotated[str, typer.Option(help="The segmentation model that they fit.", rich_help_panel=MODEL, metavar="NAME")],
    half: Half = False,
    debug: opt.Debug = False,
) -> None:
    """Average the weights of several trainings that began alike, which is often better than each.

    [bold]depthseg weights mean first/weights.safetensors second/weights.safetensors -o mean.safetensors --model nano[/bold]
    """
    catalog.pullable(model)
    if len(sources) < 2:
        raise DepthsegError("the mean of one checkpoint is that checkpoint", "Name two or more.")
    _writable(output)
    from depthseg.weights import mean

    _told(mean(sources, output, model, half), output)


def _writable(output: Path) -> None:
    if output.suffix != ".safetensors" or output.is_dir():
        raise DepthsegError(f"{output} is no name of a .safetensors file", "Write it like -o start.safetensors.")
    if output.with_suffix(".md").exists():
        raise DepthsegError(f"{output.with_suffix('.md')} is there already", "The card would take its place: choose another name.")
    take(output.parent)


def _told(card: dict[str, str], output: Path) -> None:
    for heading, text in card.items():
        say(f"{heading}: {text}")
    typer.echo(output)
