"""What commands talk to the user with: lines, progress, tables, and leaving politely. Prints, like the command line itself."""

import contextlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

from depthseg.errors import DepthsegError

FAILURES_SHOWN = 20  # of the images that failed: the files of a run have them all
ECHO = 1.0  # seconds, under torchrun: it hands on a signal that its processes got from the system, too
LINE_EVERY = 10.0  # seconds between plain progress lines where stderr is no terminal


def say(text: str) -> None:
    """One line on stderr; what a file's name would do to a terminal is shown instead of done."""
    typer.echo("".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text), err=True)


def take(folder: Path) -> None:
    """Make the output folder, or refuse it before any work is done for it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))  # a full disk still takes names
    except OSError as error:
        raise DepthsegError(f"cannot write to {folder} ({error.strerror})", "Choose another folder with -o.") from None


@contextlib.contextmanager
def interruptible(how_to_go_on: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM (Slurm, Kubernetes) leave with one line, and 130 or 143."""

    told = signal.SIGINT.value

    def terminated(number: int, frame: Any) -> None:
        nonlocal told
        told = number  # kept here too: an import that is interrupted may lose what the exception carries
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    except KeyboardInterrupt as stop:
        say(how_to_go_on)
        raise typer.Exit(128 + (stop.args[0] if stop.args else told)) from None
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def gracefully(words: str = "stopping after this batch; once more to stop at once") -> Iterator[Callable[[], int]]:
    """A function that tells the signal which asked to stop, 0 as long as none did; a second Ctrl-C or SIGTERM stops at once.

    For the inside of `interruptible`: who is told to stop ends what is in hand and raises KeyboardInterrupt with the signal's number.
    """
    asked, when = 0, 0.0

    def stop(number: int, frame: Any) -> None:
        nonlocal asked, when
        if not asked:
            asked, when = number, time.monotonic()
            say(words)
        elif "TORCHELASTIC_RUN_ID" not in os.environ or time.monotonic() - when > ECHO:
            raise KeyboardInterrupt(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def progress(unit: str) -> Iterator[Callable[[int, int], None]]:
    """A function of (done, total) that shows speed and time left: a bar on a terminal, elsewhere a line every ten seconds."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    start = last = time.monotonic()
    console = Console(stderr=True)
    if not console.is_terminal:

        def line(done: int, total: int) -> None:
            nonlocal last
            if (now := time.monotonic()) - last >= LINE_EVERY and done:
                last, speed = now, done / (now - start)
                say(f"{done}/{total} {unit}, {speed:.2f} {unit}/s, {duration((total - done) / max(speed, 1e-9))} left")

        yield line
        return
    speed = TextColumn("{task.fields[speed]}")
    with Progress(BarColumn(), MofNCompleteColumn(), TextColumn(unit), speed, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(unit, total=None, speed="")

        def move(done: int, total: int) -> None:
            seconds = max(time.monotonic() - start, 1e-9)
            bar.update(task, completed=done, total=total, speed=f"{done / seconds:.2f}/s" if done else "")

        yield move


@contextlib.contextmanager
def downloads() -> Iterator[Callable[[int, int], None]]:
    """A function of bytes (done, total) that shows a download, from its first call on."""
    with contextlib.ExitStack() as open_bars:
        show: Callable[[int, int], None] | None = None

        def tell(done: int, total: int) -> None:
            nonlocal show
            show = show or open_bars.enter_context(progress("MiB"))
            show(done >> 20, max(done, total) >> 20)  # a server need not say the total

        yield tell


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def many(count: int, thing: str) -> str:
    """1 image, 2 images."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def number(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "-" if value is None else str(value)


def table(head: list[str], rows: list[list[str]]) -> None:
    """A table on stdout; columns of numbers are right-aligned."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE)
    for i, name in enumerate(head):
        numeric = all(row[i][:1].isdigit() or not row[i] for row in rows)
        table.add_column(escape(name), justify="right" if numeric else "left", no_wrap=not i)
    for row in rows:
        table.add_row(*map(escape, row))  # [yolo] is no markup
    console = Console()
    Console(width=None if console.is_terminal else 200).print(table)


def listing(head: list[str], rows: list[list[str]], as_json: bool, **more: Any) -> None:
    """A table on stdout; as_json: one object with the rows as objects instead, and what else is named."""
    if as_json:
        typer.echo(json.dumps({"schema_version": 1, **more, "rows": [dict(zip(head, row)) for row in rows]}))
    else:
        table(head, rows)


def write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(part, path)
