"""The command line: a command parses, calls one function and prints. The only place that prints or exits.

Data that was asked for (tables, the path of the output) goes to stdout, everything else to stderr. Only ground modules are
imported at the top, so that help, version and argument errors cost no torch. What two commands share is in options.py.
"""

import contextlib
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from depthseg import __version__
from depthseg import options as opt
from depthseg.bench_cli import bench
from depthseg.config import Config
from depthseg.config import app as config_app
from depthseg.convert_cli import convert
from depthseg.data_cli import app as data_app
from depthseg.doctor import doctor
from depthseg.errors import SOME_FAILED, DepthsegError
from depthseg.eval_cli import compare, evaluate
from depthseg.models_cli import models
from depthseg.options import OUTPUT
from depthseg.plan import Plan
from depthseg.segment_cli import detect, segment
from depthseg.terminal import FAILURES_SHOWN, interruptible, progress, say, take
from depthseg.train_cli import train
from depthseg.weights_cli import app as weights_app

app = typer.Typer(
    name="depthseg",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"depthseg {__version__}")
        raise typer.Exit()


app.add_typer(weights_app, name="weights")
app.add_typer(data_app, name="data")
app.add_typer(config_app, name="config")


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = False,
    settings: Config = None,
) -> None:
    """A folder of photographs becomes instance masks, with the help of depth."""


app.command()(segment)
app.command()(detect)
app.command("eval")(evaluate)
app.command("compare")(compare)
app.command("convert")(convert)


@app.command("depth")
def depth_maps(
    paths: Annotated[list[str], typer.Argument(help="Images, folders (searched whole), globs, SA-1B's tars.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the maps.", rich_help_panel=OUTPUT, metavar="DIR")],
    depth: opt.DepthName = Plan.depth,
    device: opt.Device = Plan.device,
    precision: opt.Precision = Plan.precision,  # type: ignore[assignment]
    backend: opt.Backend = Plan.backend,  # type: ignore[assignment]
    batch: opt.Batch = Plan.batch,
    pull: opt.Pull = False,
    debug: opt.Debug = False,
) -> None:
    """Write a depth map of every image: 16-bit PNG, near is bright, named like the image.

    [bold]depthseg depth sa1b/ -o maps[/bold]   then   [bold]depthseg train --depth-maps maps[/bold] or [bold]segment --depth maps[/bold]
    """
    plan = Plan(depth=depth, device=device, precision=precision, backend=backend, batch=batch)
    opt.check_names(plan)
    with contextlib.redirect_stdout(sys.stderr), interruptible(f"stopped; the maps in {output} are whole"):
        from depthseg import sa1b, sink

        sink.check_output(output, paths)
        images = sa1b.pictures(paths, exclude=output)
        take(output)
        from depthseg.depth import write_maps

        chosen = opt.estimator(depth, device, precision, pull, backend)
        with progress("maps") as show:
            failed = write_maps(images, chosen.estimator, chosen.name, output, batch, show)
        for failure in failed[:FAILURES_SHOWN]:
            say(f"failed: {failure.image.key}: {failure.reason}")
    typer.echo(output)
    if failed:
        raise typer.Exit(SOME_FAILED)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="The folder that `segment` wrote.", show_default=False)],
    debug: opt.Debug = False,
) -> None:
    """Make a page of a run's pictures, with filters by class and score and what failed; it opens offline.

    [bold]depthseg report out[/bold]
    """
    with interruptible("stopped; run the same command again"):
        from depthseg import album

        page = album.write(run)
    typer.echo(page)


app.command()(train)
app.command()(bench)
app.command()(models)
app.command()(doctor)


_MEMORY_FULL = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # of the CPU, a card, and NVIDIA's libraries


def main(argv: list[str] | None = None) -> None:
    """Run the command line and leave the process with its exit code."""
    argv = (sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        sys.exit(app(argv, prog_name="depthseg", standalone_mode=False) or 0)
    except DepthsegError as error:
        caught: Exception = error
        code = error.code
        _explain("error", error.message, error.hint)
    except Exception as error:
        caught, code = error, getattr(error, "exit_code", 1)
        if hasattr(error, "format_message"):  # Typer's own: an unknown option, a value of the wrong type
            verb = f" {argv[0]}" if argv[0] in _verbs() else ""
            if message := error.format_message():  # empty where a group of commands has printed its help instead
                _explain("error", message, f"depthseg{verb} --help lists what there is.")
        elif isinstance(error, MemoryError) or any(sign in str(error) for sign in _MEMORY_FULL):
            _explain(
                "error", "the memory is full", "Use a smaller --batch or --prompt-batch (training: --micro-batch), or another --model."
            )
        else:
            _explain("unexpected error", f"{type(error).__name__}: {error}", "Add --debug to see the traceback.")
    if "--debug" in argv:
        traceback.print_exception(caught)
    sys.exit(code)


def _verbs() -> list[str]:
    own = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
    return [*own, *(group.name for group in app.registered_groups if group.name)]


def _explain(kind: str, message: str, hint: str) -> None:
    """One line that says what is wrong, one that says what to do."""
    say(f"{kind}: {' '.join(message.split())}")
    if hint:
        say(f"hint: {hint}")
