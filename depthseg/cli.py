"""The command line: a command parses, calls one function and prints. The only place that prints or exits.

Data that was asked for (tables, the path of the output) goes to stdout, everything else to stderr. Only ground modules are
imported at the top, so that help, version and argument errors cost no torch.
"""

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from depthseg import __version__, catalog
from depthseg.errors import SOME_FAILED, DepthsegError
from depthseg.options import (
    DEPTH,
    INPUT,
    MODEL,
    OUTPUT,
    PROMPTS,
    RUN,
    Batch,
    Confidence,
    Debug,
    DepthName,
    DetectorName,
    Device,
    ModelName,
    Precision,
    Weights,
    Zoom,
)
from depthseg.plan import Plan

LINE_EVERY = 10.0  # seconds between plain progress lines where stderr is no terminal
FAILURES_SHOWN = 20  # failures.jsonl has them all

app = typer.Typer(
    name="depthseg",
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"depthseg {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = False,
) -> None:
    """A folder of photographs becomes instance masks, with the help of depth."""


@app.command()
def segment(
    paths: Annotated[
        list[str] | None,
        typer.Argument(help="Images, folders (searched whole), globs; - reads a list from stdin.", show_default=False),
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="Segment the photographs that installed packages carry.", rich_help_panel=INPUT)
    ] = False,
    detector: DetectorName = Plan.detector,
    boxes: Annotated[
        str | None,
        typer.Option(help="COCO detection results (JSON) instead of a detector.", rich_help_panel=PROMPTS, metavar="FILE"),
    ] = Plan.boxes,
    images_json: Annotated[
        Path | None,
        typer.Option(help="COCO images file that gives the names to --boxes' image_id.", rich_help_panel=PROMPTS, metavar="FILE"),
    ] = None,
    points: Annotated[
        str | None,
        typer.Option(help="Clicks from a file instead of a detector.", rich_help_panel=PROMPTS, metavar="FILE"),
    ] = Plan.points,
    confidence: Confidence = Plan.confidence,
    max_boxes: Annotated[int, typer.Option(min=1, help="Boxes of one image, best first.", rich_help_panel=PROMPTS)] = Plan.max_boxes,
    points_per_side: Annotated[
        int, typer.Option(min=1, help="grid: points along each side.", rich_help_panel=PROMPTS)
    ] = Plan.points_per_side,
    min_predicted_iou: Annotated[
        float, typer.Option(min=0, max=1, help="grid: drop masks under this predicted IoU.", rich_help_panel=PROMPTS)
    ] = Plan.min_predicted_iou,
    min_stability: Annotated[
        float, typer.Option(min=0, max=1, help="grid: drop masks under this stability.", rich_help_panel=PROMPTS)
    ] = Plan.min_stability,
    nms: Annotated[
        float,
        typer.Option(min=0, max=1, help="grid, nano: drop masks that overlap a better one by more (IoU).", rich_help_panel=PROMPTS),
    ] = Plan.nms,
    min_region: Annotated[
        int, typer.Option(min=0, help="grid: fill holes and drop islands smaller than this, in pixels.", rich_help_panel=PROMPTS)
    ] = Plan.min_region,
    depth: DepthName = Plan.depth,
    model: ModelName = Plan.model,
    weights: Weights = Plan.weights,
    zoom: Zoom = Plan.zoom,
    device: Device = Plan.device,
    precision: Precision = Plan.precision,  # type: ignore[assignment]  # a str in Plan, one of four here
    batch: Batch = Plan.batch,
    prompt_batch: Annotated[
        int, typer.Option(min=1, help="Prompts in one call of the decoder.", rich_help_panel=MODEL)
    ] = Plan.prompt_batch,
    seed: Annotated[int, typer.Option(help="Seed of whatever is random.", rich_help_panel=MODEL)] = Plan.seed,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="Folder of the results; --demo needs none.",
            rich_help_panel=OUTPUT,
            show_default=False,
            metavar="DIR",
        ),
    ] = None,
    overlays: Annotated[bool, typer.Option(help="Pictures with the masks drawn.", rich_help_panel=OUTPUT)] = Plan.overlays,
    labelmaps: Annotated[bool, typer.Option(help="16-bit PNG with the number of the instance.", rich_help_panel=OUTPUT)] = Plan.labelmaps,
    depth_panel: Annotated[
        bool, typer.Option("--depth-panel", help="Draw the depth map beside the overlay.", rich_help_panel=OUTPUT)
    ] = Plan.depth_panel,
    instances: Annotated[bool, typer.Option("--instances", help="One PNG for each instance.", rich_help_panel=OUTPUT)] = Plan.instances,
    pull: Annotated[
        bool, typer.Option("--pull", help="Fetch missing weights first; a run uses no network otherwise.", rich_help_panel=RUN)
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew in a folder that holds other results.", rich_help_panel=RUN)
    ] = False,
    debug: Debug = False,
) -> None:
    """Write the masks of every image into a folder.

    [bold]depthseg segment --demo[/bold]\n
    [bold]depthseg segment photos/ -o out[/bold]\n
    [bold]depthseg segment photos/ -o out --detector yolov8m --depth depth-anything-v2-small --pull[/bold]\n
    [bold]find . -name '*.jpg' | depthseg segment - -o out --boxes detections.json --zoom[/bold]\n

    Stopped and started again, a run goes on where it stopped.
    """
    values = locals()
    plan = Plan(**{f.name: values[f.name] for f in fields(Plan)})
    _check_names(plan)
    if not paths and not demo:
        raise DepthsegError("nothing to segment was named", "Give images or folders, or --demo for photographs that are here already.")
    if output is None and not demo:
        raise DepthsegError("no output folder was named", "Add -o OUT.")
    out = output or Path("depthseg-demo")
    again = f"stopped; run the same command again to go on in {out}"
    with contextlib.redirect_stdout(sys.stderr), _interruptible(again):  # libraries that print must not spoil stdout
        failed = _segment(plan, paths or [], demo, out, pull, overwrite, images_json)
    typer.echo(out)
    if failed:
        raise typer.Exit(SOME_FAILED)


def _segment(plan: Plan, paths: list[str], demo: bool, out: Path, pull: bool, overwrite: bool, images_json: Path | None) -> int:
    """Run the plan over the images and say how it went. Returns how many images failed."""
    from depthseg import data, sink

    named = [p for p in paths if p != "-"]
    named += data.from_list(sys.stdin) if "-" in paths else []
    sink.check_output(out, named)
    images = data.find([*(str(image.path) for image in (data.demo() if demo else [])), *named], exclude=out)

    from depthseg.segment import Segmenter  # torch: only once the paths are known to be right

    segmenter = Segmenter(plan, pull=pull, images_json=images_json)
    for note in segmenter.notes:
        _say(note)

    masks, failed = 0, 0
    with sink.Sink(out, plan, images, segmenter.provenance, overwrite=overwrite) as written:
        todo = [image for image in images if image.key not in written.done]
        if len(todo) < len(images):
            _say(f"{len(images) - len(todo)} of {len(images)} images are done already")
        start = time.monotonic()
        with _progress("images") as show:
            show(0, len(todo))
            for done, answer in enumerate(segmenter.segment(todo), 1):
                if isinstance(answer, data.Failure):
                    failed += 1
                    if failed <= FAILURES_SHOWN:
                        _say(f"failed: {answer.image.key}: {answer.reason}")
                    written.failed(answer)
                else:
                    masks += len(answer.masks)
                    written.write(answer)
                show(done, len(todo))
        seconds = time.monotonic() - start
    if todo:
        _say(f"{len(todo) - failed} images, {masks} masks in {_duration(seconds)}, {len(todo) / seconds:.2f} images/s")
    if failed:
        _say(f"{failed} images failed: see {out / 'failures.jsonl'}")
    return failed


@app.command("eval")
def evaluate(
    images: Annotated[Path, typer.Option(help="Folder of the images.", rich_help_panel=INPUT, metavar="DIR")],
    annotations: Annotated[
        Path | None, typer.Option(help="COCO annotations (JSON); not for depth.", rich_help_panel=INPUT, metavar="FILE")
    ] = None,
    prompt: Annotated[
        Literal["box", "point", "offline", "depth"],
        typer.Option(
            help="Ground-truth boxes, clicks on the mask, the detector or grid; depth scores the depth estimator alone.",
            rich_help_panel=PROMPTS,
        ),
    ] = "box",
    clicks: Annotated[str, typer.Option(help="point: score after so many clicks.", rich_help_panel=PROMPTS)] = "1,3,5",
    subset: Annotated[int | None, typer.Option(min=1, help="Score only the first N images.", rich_help_panel=INPUT, metavar="N")] = None,
    detector: DetectorName = Plan.detector,
    confidence: Confidence = Plan.confidence,
    depth: DepthName = Plan.depth,
    model: ModelName = Plan.model,
    weights: Weights = Plan.weights,
    zoom: Zoom = Plan.zoom,
    device: Device = Plan.device,
    batch: Batch = Plan.batch,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder for report.json.", rich_help_panel=OUTPUT, metavar="DIR")
    ] = None,
    debug: Debug = False,
) -> None:
    """Score a model against COCO ground truth.

    [bold]depthseg eval --images val/ --annotations instances_val.json[/bold]\n
    [bold]depthseg eval --images val/ --annotations instances_val.json --prompt point --clicks 1,3,5 -o report[/bold]
    """
    plan = Plan(model=model, weights=weights, depth=depth, zoom=zoom, device=device, batch=batch, detector=detector, confidence=confidence)
    _check_names(plan)
    try:
        counts = tuple(int(n) for n in clicks.split(","))
    except ValueError:
        raise DepthsegError(f"--clicks {clicks} is not a list of numbers", "Write it like 1,3,5.") from None
    with contextlib.redirect_stdout(sys.stderr), _interruptible("stopped; nothing was written"):
        from depthseg.evaluate import evaluate as score

        with _progress("images") as show:
            if prompt == "depth":
                from depthseg.evaluate import evaluate_depth
                from depthseg.segment import depth_estimator, depth_name, device_of, precision_of

                where = device_of(device)
                estimator, _ = depth_estimator(depth_name(depth, pull=False), where, precision_of("auto", where), pull=False)
                report = evaluate_depth(images, estimator, progress=show)
            elif annotations is None:
                raise DepthsegError("no ground truth was named", "Add --annotations FILE.")
            else:
                report = score(images, annotations, prompt=prompt, clicks=counts, plan=plan, subset=subset, progress=show)
    if output:
        _write_json(output / "report.json", report)
    _table(["score", "value"], [[k, _number(v)] for k, v in report.items() if not isinstance(v, dict | str)])
    typer.echo(report["protocol"])


@app.command("depth")
def depth_maps(
    paths: Annotated[list[str], typer.Argument(help="Images, folders (searched whole), globs.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the maps.", rich_help_panel=OUTPUT, metavar="DIR")],
    depth: DepthName = Plan.depth,
    device: Device = Plan.device,
    precision: Precision = Plan.precision,  # type: ignore[assignment]
    batch: Batch = Plan.batch,
    pull: Annotated[bool, typer.Option("--pull", help="Fetch missing weights first.", rich_help_panel=RUN)] = False,
    debug: Debug = False,
) -> None:
    """Write a depth map of every image: 16-bit PNG, near is bright, named like the image.

    [bold]depthseg depth sa1b/ -o maps[/bold]   then   [bold]depthseg train --depth-maps maps[/bold] or [bold]segment --depth maps[/bold]
    """
    plan = Plan(depth=depth, device=device, precision=precision, batch=batch)
    _check_names(plan)
    with contextlib.redirect_stdout(sys.stderr), _interruptible(f"stopped; the maps in {output} are whole"):
        from depthseg import data, sink

        sink.check_output(output, paths)
        images = data.find(paths, exclude=output)
        from depthseg.depth import write_maps
        from depthseg.segment import depth_estimator, depth_name, device_of, precision_of

        where = device_of(device)
        estimator, _ = depth_estimator(depth_name(depth, pull), where, precision_of(precision, where), pull)
        with _progress("maps") as show:
            failed = write_maps(images, estimator, output, batch, show)
        for failure in failed[:FAILURES_SHOWN]:
            _say(f"failed: {failure.image.key}: {failure.reason}")
    typer.echo(output)
    if failed:
        raise typer.Exit(SOME_FAILED)


@app.command()
def train(
    stage: Annotated[
        Literal["0", "1", "2", "depth", "boxes"],
        typer.Option(help="0 the RGB model, 1 the depth encoder alone, 2 end to end; depth, boxes: nano's estimator and detector."),
    ],
    data: Annotated[list[Path], typer.Option(help="SA-1B layout, folder or tars; repeatable.", rich_help_panel=INPUT, metavar="ROOT")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of checkpoints and curves.", rich_help_panel=OUTPUT)],
    model: ModelName = Plan.model,
    init: Annotated[str | None, typer.Option(help="Start from these weights.", rich_help_panel=MODEL, metavar="FILE")] = None,
    depth_maps: Annotated[
        str | None, typer.Option(help="Folder of depth maps of the images.", rich_help_panel=DEPTH, metavar="DIR")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Length in steps, instead of the stage's own.", rich_help_panel=RUN)] = None,
    epochs: Annotated[float | None, typer.Option(min=0, help="Length in epochs, instead of the stage's own.", rich_help_panel=RUN)] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0, help="Length by the clock; the schedule follows it, so runs differ.", rich_help_panel=RUN),
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Images in one step, over all processes.", rich_help_panel=RUN)] = None,
    masks: Annotated[int | None, typer.Option(min=1, help="Masks of one image in one step.", rich_help_panel=RUN)] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(
            help="PART=WEIGHT: how often images are drawn whose source (in manifest.csv) contains PART; repeatable.",
            rich_help_panel=INPUT,
            metavar="PART=WEIGHT",
        ),
    ] = None,
    loss: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=WEIGHT: another weight for one of the stage's losses; repeatable.", rich_help_panel=RUN, metavar="NAME=WEIGHT"
        ),
    ] = None,
    boxes_share: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of the masks prompted with a box; the rest with clicks.", rich_help_panel=RUN)
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read samples ahead.", rich_help_panel=RUN)] = 1,
    lr: Annotated[float | None, typer.Option(min=0, help="Peak learning rate, instead of the stage's own.", rich_help_panel=RUN)] = None,
    seed: Annotated[int, typer.Option(rich_help_panel=RUN)] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in OUTPUT.", rich_help_panel=RUN)] = False,
    device: Device = Plan.device,
    precision: Precision = Plan.precision,  # type: ignore[assignment]
    debug: Debug = False,
) -> None:
    """Train a model on masks, by the two stages of the paper.

    [bold]depthseg train --stage 1 --data sa1b --depth-maps depth --init nano.safetensors -o one[/bold]\n
    [bold]depthseg train --stage 2 --data sa1b --depth-maps depth --init one/weights.safetensors -o two[/bold]\n
    [bold]torchrun --nproc-per-node 8 -m depthseg train ...[/bold]   several processes
    """
    catalog.row(catalog.MODELS, model, "model")
    if sum(v is not None for v in (steps, epochs, minutes)) > 1:
        raise DepthsegError("more than one of --steps, --epochs and --minutes is given", "Give one of them.")
    try:
        shares, losses = ({k: float(v) for k, _, v in (m.rpartition("=") for m in given or [])} for given in (mix, loss))
    except ValueError:
        raise DepthsegError("--mix and --loss take NAME=NUMBER", "Write them like --mix coco=3 --loss dice=2.") from None
    again = "stopped; run the same command with --resume to go on from the newest checkpoint"
    with contextlib.redirect_stdout(sys.stderr), _interruptible(again):
        from depthseg.train import TrainPlan
        from depthseg.train import train as run

        plan = TrainPlan(
            stage=stage,
            data=tuple(map(str, data)),
            output=str(output),
            model=model,
            init=init,
            depth_maps=depth_maps,
            steps=steps,
            epochs=epochs,
            minutes=minutes,
            batch=batch,
            masks=masks,
            mix=shares,
            losses=losses,
            boxes_share=boxes_share,
            workers=workers,
            lr=lr,
            seed=seed,
            device=device,
            precision=precision,
        )
        weights = run(plan, resume=resume, progress=lambda line: _say("  ".join(f"{k} {v:.4g}" for k, v in line.items())))
    typer.echo(weights)


@app.command()
def models(
    names: Annotated[list[str] | None, typer.Argument(help="Measure these; without a name all are listed.", show_default=False)] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Count parameters and multiply-adds of every segmentation model.")] = False,
    debug: Debug = False,
) -> None:
    """List what can be chosen: models, depth estimators, detectors, their terms and whether their weights are here.

    [bold]depthseg models[/bold]\n
    [bold]depthseg models efficientvit-sam-l2 efficientvit-sam-l2-depth[/bold]   measured numbers beside the paper's
    """
    for name in names or []:
        catalog.row(catalog.MODELS, name, "model")
    if names or measure:
        _measured(names or list(catalog.MODELS))
    else:
        _listed()


def _measured(names: list[str]) -> None:
    from depthseg.bench import PAPER, measure

    rows = []
    for name in names:
        got, paper = measure(name), PAPER.get(name)
        rows.append(
            [
                name,
                str(catalog.MODELS[name].input),
                f"{got['params']:,}",
                f"{paper[0]:.1f} M" if paper else "",
                f"{got['macs'] / 1e9:.2f} G",
                f"{paper[1]:.0f} G" if paper else "",
            ]
        )
    _table(["model", "input", "parameters", "paper", "encoder MACs", "paper"], rows)


def _listed() -> None:
    from depthseg import weights

    remarks: dict[str, list[str]] = {}
    for title, table in (("model", catalog.MODELS), ("depth", catalog.DEPTHS), ("detector", catalog.DETECTORS)):
        rows = []
        for name, entry in table.items():
            licence, _, remark = entry.licence.partition(": ")
            for text in filter(None, (remark, entry.note)):
                remarks.setdefault(text, []).append(name)
            rows.append([name, str(entry.input or ""), licence, weights.state(entry)])
        _table([title, "input", "licence", "weights"], rows)
    for text, which in remarks.items():
        typer.echo(f"{', '.join(dict.fromkeys(which))}: {text}")


def _check_names(plan: Plan) -> None:
    """Refuse unknown names before anything heavy is imported."""
    catalog.row(catalog.MODELS, plan.model, "model")
    if plan.detector != "auto":
        catalog.row(catalog.DETECTORS, plan.detector, "detector")
    if plan.depth not in ("auto", "none") and not Path(plan.depth).exists():
        catalog.row(catalog.DEPTHS, plan.depth, "depth estimator, file or folder")


@contextlib.contextmanager
def _interruptible(how_to_go_on: str) -> Iterator[None]:
    """Ctrl-C and SIGTERM (Slurm, Kubernetes) leave with one line, and 130 or 143."""

    def terminated(number: int, frame: Any) -> None:
        raise KeyboardInterrupt(number)

    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    except KeyboardInterrupt as stop:
        _say(how_to_go_on)
        raise typer.Exit(128 + (stop.args[0] if stop.args else signal.SIGINT)) from None
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _progress(unit: str) -> Iterator[Callable[[int, int], None]]:
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
                _say(f"{done}/{total} {unit}, {speed:.2f} {unit}/s, {_duration((total - done) / max(speed, 1e-9))} left")

        yield line
        return
    speed = TextColumn("{task.fields[speed]}")
    with Progress(BarColumn(), MofNCompleteColumn(), TextColumn(unit), speed, TimeRemainingColumn(), console=console) as bar:
        task = bar.add_task(unit, total=None, speed="")

        def move(done: int, total: int) -> None:
            seconds = max(time.monotonic() - start, 1e-9)
            bar.update(task, completed=done, total=total, speed=f"{done / seconds:.2f}/s" if done else "")

        yield move


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _number(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "-" if value is None else str(value)


def _table(head: list[str], rows: list[list[str]]) -> None:
    """A table on stdout; columns of numbers are right-aligned."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE)
    for i, name in enumerate(head):
        numeric = all(row[i][:1].isdigit() or not row[i] for row in rows)
        table.add_column(name, justify="right" if numeric else "left", no_wrap=not i)
    for row in rows:
        table.add_row(*row)
    console = Console()
    Console(width=None if console.is_terminal else 200).print(table)


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(part, path)


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
            _explain("error", error.format_message(), f"depthseg{verb} --help lists what there is.")
        else:
            _explain("unexpected error", f"{type(error).__name__}: {error}", "Add --debug to see the traceback.")
    if "--debug" in argv:
        traceback.print_exception(caught)
    sys.exit(code)


def _verbs() -> list[str]:
    return [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]


def _explain(kind: str, message: str, hint: str) -> None:
    """One line that says what is wrong, one that says what to do."""
    _say(f"{kind}: {' '.join(message.split())}")
    if hint:
        _say(f"hint: {hint}")
