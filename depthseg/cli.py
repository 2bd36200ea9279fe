"""The command line: a command parses, calls one function and prints. The only place that prints or exits.

Data that was asked for (tables, the path of the output) goes to stdout, everything else to stderr. Only ground modules are
imported at the top, so that help, version and argument errors cost no torch. Longer than other files because an option takes
several lines: what two commands share is in options.py, and what a command does is a call.
"""

import contextlib
import json
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from depthseg import __version__, catalog
from depthseg import options as opt
from depthseg.config import Config
from depthseg.config import app as config_app
from depthseg.convert_cli import convert
from depthseg.doctor import doctor
from depthseg.errors import SOME_FAILED, DepthsegError
from depthseg.eval_cli import compare, evaluate
from depthseg.options import DEPTH, INPUT, MODEL, OUTPUT, RUN
from depthseg.plan import Plan
from depthseg.terminal import downloads, duration, gracefully, interruptible, progress, say, show, table, take
from depthseg.weights_cli import app as weights_app

FAILURES_SHOWN = 20  # failures.jsonl has them all
REHEARSED = 4  # images of a --dry-run

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
app.add_typer(config_app, name="config")


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)] = False,
    settings: Config = None,
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
    only: opt.Only = None,
    keys: opt.Keys = None,
    shard: opt.Shard = None,
    limit: opt.Limit = None,
    detector: opt.DetectorName = Plan.detector,
    boxes: opt.Boxes = Plan.boxes,
    images_json: opt.ImagesJson = None,
    points: opt.Points = Plan.points,
    detector_weights: opt.DetectorWeights = Plan.detector_weights,
    text: opt.Text = Plan.text,
    classes: opt.Classes = Plan.classes,
    confidence: opt.Confidence = Plan.confidence,
    max_boxes: opt.MaxBoxes = Plan.max_boxes,
    points_per_side: opt.PointsPerSide = Plan.points_per_side,
    min_predicted_iou: opt.MinPredictedIou = Plan.min_predicted_iou,
    min_stability: opt.MinStability = Plan.min_stability,
    nms: opt.Nms = Plan.nms,
    min_region: opt.MinRegion = Plan.min_region,
    min_area: opt.MinArea = Plan.min_area,
    max_area: opt.MaxArea = Plan.max_area,
    depth: opt.DepthName = Plan.depth,
    model: opt.ModelName = Plan.model,
    weights: opt.Weights = Plan.weights,
    zoom: opt.Zoom = Plan.zoom,
    device: opt.Device = Plan.device,
    precision: opt.Precision = Plan.precision,  # type: ignore[assignment]  # a str in Plan, one of four here
    batch: opt.Batch = Plan.batch,
    prompt_batch: Annotated[
        int, typer.Option(min=1, help="Prompts in one call of the decoder.", rich_help_panel=MODEL)
    ] = Plan.prompt_batch,
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
    pull: opt.Pull = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Start anew in a folder that holds other results.", rich_help_panel=RUN)
    ] = False,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Take only the images that failed in the run before.", rich_help_panel=RUN)
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Say what would be done and, after a few images, how long it takes and how much disk.", rich_help_panel=RUN
        ),
    ] = False,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
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
    opt.check_names(plan)
    if not paths and not demo:
        raise DepthsegError("nothing to segment was named", "Give images or folders, or --demo for photographs that are here already.")
    if output is None and not demo:
        raise DepthsegError("no output folder was named", "Add -o OUT.")
    opt.check_files(plan, images_json, pull)
    out = output or Path("depthseg-demo")
    again = f"stopped; run the same command again to go on in {out}"
    with contextlib.redirect_stdout(sys.stderr), interruptible(again):  # libraries that print must not spoil stdout
        from depthseg import data, selection, sink

        named = [p for p in paths or [] if p != "-"]
        named += data.from_list(sys.stdin) if "-" in (paths or []) else []
        sink.check_output(out, named)
        found = data.find([*(data.demo() if demo else []), *named], exclude=out)
        tried = [*(only or []), *(sink.failed_keys(out) if retry_failed else [])]
        images = selection.select(found, tried, keys, shard, limit)

        from depthseg.segment import Segmenter  # torch: only once the paths are known to be right

        with downloads() as fetched:
            segmenter = Segmenter(plan, pull=pull, images_json=images_json, progress=fetched)
        for note in segmenter.notes:
            say(note)
        for warning in segmenter.expect(images):
            say(warning)
        if dry_run:
            told = _rehearse(segmenter, plan, images, out)
        else:
            told = _segment(segmenter, plan, found, images, out, overwrite)
    if as_json or not dry_run:
        typer.echo(json.dumps(told) if as_json else out)
    if told["failed"] and not dry_run:
        raise typer.Exit(SOME_FAILED)


def _segment(segmenter: Any, plan: Plan, found: list[Any], images: list[Any], out: Path, overwrite: bool) -> dict[str, Any]:
    """Segment the images, some of those that were found, into the folder and say how it went; what --json prints."""
    from depthseg import data, sink

    masks, failed = 0, 0
    with sink.Sink(out, plan, found, segmenter.provenance, overwrite, images) as written, gracefully() as stopping:
        todo = [image for image in images if image.key not in written.done]
        if len(todo) < len(images):
            say(f"{len(images) - len(todo)} of {len(images)} images are done already")
        start = time.monotonic()
        with progress("images") as show:
            show(0, len(todo))
            for done, answer in enumerate(segmenter.segment(todo), 1):
                failure = answer if isinstance(answer, data.Failure) else None
                if not isinstance(answer, data.Failure):
                    try:
                        written.write(answer)
                        masks += len(answer.masks)
                    except OSError as error:
                        failure = data.not_written(answer.image, error)
                if failure:
                    failed += 1
                    if failed <= FAILURES_SHOWN:
                        say(f"failed: {failure.image.key}: {failure.reason}")
                    written.failed(failure)
                show(done, len(todo))
                if stopping() and done % plan.batch == 0:
                    say(f"{done - failed} images done, {len(todo) - done} left")
                    raise KeyboardInterrupt(stopping())
        seconds = time.monotonic() - start
    if todo:
        say(f"{len(todo) - failed} images, {masks} masks in {duration(seconds)}, {len(todo) / seconds:.2f} images/s")
    if failed:
        say(f"{failed} images failed: see {out / 'failures.jsonl'}")
    counts = {"images": len(found), "done": len(images) - failed, "failed": failed, "skipped": len(found) - len(images)}
    return {"schema_version": 1, "output": str(out), **counts, "masks": masks, "seconds": round(seconds, 3)}


def _rehearse(segmenter: Any, plan: Plan, images: list[Any], out: Path) -> dict[str, Any]:
    """Segment a few images into a folder that is thrown away, and say what all of them would take."""
    from depthseg import data, sink

    few = images[:: max(1, len(images) // REHEARSED)][:REHEARSED]
    with tempfile.TemporaryDirectory(prefix="depthseg-") as scratch:
        failed = 0
        with sink.Sink(scratch, plan, few, segmenter.provenance) as written:
            start = time.monotonic()
            for answer in segmenter.segment(few):
                if isinstance(answer, data.Failure):
                    failed += 1
                    say(f"would fail: {answer.image.key}: {answer.reason}")
                else:
                    written.write(answer)
            seconds = (time.monotonic() - start) / len(few)
        size = sum(f.stat().st_size for f in Path(scratch).rglob("*") if f.is_file()) / len(few)
    for name, value in plan.to_json().items():
        if value != getattr(Plan, name):
            say(f"{name}: {value}")
    say(f"{len(images)} images into {out}; tried {len(few)}: {1 / seconds:.2f} images/s, about {duration(seconds * len(images))} in all")
    say(f"about {size * len(images) / 2**20:.0f} MiB of disk")
    about = {"images": len(images), "failed": failed, "images_per_second": 1 / seconds, "seconds": seconds * len(images)}
    return {"schema_version": 1, "output": str(out), **about, "bytes": round(size * len(images)), "plan": plan.to_json()}


@app.command()
def detect(
    paths: Annotated[list[str], typer.Argument(help="Images, folders (searched whole), globs.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="The JSON file to write.", rich_help_panel=OUTPUT, metavar="FILE")],
    detector: opt.DetectorName = Plan.detector,
    detector_weights: opt.DetectorWeights = Plan.detector_weights,
    text: opt.Text = Plan.text,
    classes: opt.Classes = Plan.classes,
    confidence: opt.Confidence = Plan.confidence,
    max_boxes: opt.MaxBoxes = Plan.max_boxes,
    device: opt.Device = Plan.device,
    precision: opt.Precision = Plan.precision,  # type: ignore[assignment]
    batch: opt.Batch = Plan.batch,
    pull: opt.Pull = False,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Write the boxes of every image as COCO detection results: detect once, segment many times.

    [bold]depthseg detect photos/ -o boxes.json --detector yolov8x[/bold]\n
    [bold]depthseg segment photos/ -o out --boxes boxes.json[/bold]
    """
    plan = Plan(
        detector=detector, detector_weights=detector_weights, text=text, classes=classes, confidence=confidence, max_boxes=max_boxes,
        device=device, precision=precision, batch=batch,
    )  # fmt: skip
    opt.check_names(plan)
    if detector == "grid":
        raise DepthsegError("the grid is made of points and finds no boxes", "Choose another --detector.")
    if output.suffix != ".json" or output.is_dir():
        raise DepthsegError(f"the output {output} is no name of a .json file", "Write it like -o boxes.json.")
    opt.check_detector(plan, pull)
    with contextlib.redirect_stdout(sys.stderr), interruptible("stopped; nothing was written"):
        from depthseg import data

        images = data.find(paths)
        take(output.parent)
        from depthseg.detect.choose import detector as choose
        from depthseg.detect.files import write_boxes
        from depthseg.numerics import device_of, precision_of

        where = device_of(device)
        with downloads() as fetched:
            chosen = choose(plan, where, precision_of(precision, where), pull, fetched)
        for note in (*chosen.notes, *catalog.terms({f"detector {chosen.name}": chosen.entry} if chosen.entry else {})):
            say(note)
        with progress("images") as show:
            count, failed = write_boxes(images, chosen.source, output, batch, show)  # type: ignore[arg-type]
        say(f"{count} boxes in {len(images) - len(failed)} images")
        for failure in failed[:FAILURES_SHOWN]:
            say(f"failed: {failure.image.key}: {failure.reason}")
    counts = {"images": len(images), "boxes": count, "failed": len(failed)}
    typer.echo(json.dumps({"schema_version": 1, "output": str(output), **counts}) if as_json else output)
    if failed:
        raise typer.Exit(SOME_FAILED)


app.command("eval")(evaluate)
app.command("compare")(compare)
app.command("convert")(convert)


@app.command("depth")
def depth_maps(
    paths: Annotated[list[str], typer.Argument(help="Images, folders (searched whole), globs.", show_default=False)],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of the maps.", rich_help_panel=OUTPUT, metavar="DIR")],
    depth: opt.DepthName = Plan.depth,
    device: opt.Device = Plan.device,
    precision: opt.Precision = Plan.precision,  # type: ignore[assignment]
    batch: opt.Batch = Plan.batch,
    pull: opt.Pull = False,
    debug: opt.Debug = False,
) -> None:
    """Write a depth map of every image: 16-bit PNG, near is bright, named like the image.

    [bold]depthseg depth sa1b/ -o maps[/bold]   then   [bold]depthseg train --depth-maps maps[/bold] or [bold]segment --depth maps[/bold]
    """
    plan = Plan(depth=depth, device=device, precision=precision, batch=batch)
    opt.check_names(plan)
    with contextlib.redirect_stdout(sys.stderr), interruptible(f"stopped; the maps in {output} are whole"):
        from depthseg import data, sink

        sink.check_output(output, paths)
        images = data.find(paths, exclude=output)
        take(output)
        from depthseg.depth import write_maps

        chosen = opt.estimator(depth, device, precision, pull)
        with progress("maps") as show:
            failed = write_maps(images, chosen.estimator, chosen.name, output, batch, show)
        for failure in failed[:FAILURES_SHOWN]:
            say(f"failed: {failure.image.key}: {failure.reason}")
    typer.echo(output)
    if failed:
        raise typer.Exit(SOME_FAILED)


@app.command()
def train(
    stage: Annotated[
        Literal["0", "1", "2", "depth", "boxes"],
        typer.Option(help="0 the RGB model, 1 the depth encoder alone, 2 end to end; depth, boxes: nano's estimator and detector."),
    ],
    data: Annotated[
        list[Path],
        typer.Option(help="SA-1B layout, folder or tars, or a COCO instances file; repeatable.", rich_help_panel=INPUT, metavar="ROOT"),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of checkpoints and curves.", rich_help_panel=OUTPUT)],
    model: opt.ModelName = Plan.model,
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
    device: opt.Device = Plan.device,
    precision: opt.Precision = Plan.precision,  # type: ignore[assignment]
    debug: opt.Debug = False,
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
    take(output)
    again = "stopped; run the same command with --resume to go on from the newest checkpoint"
    with contextlib.redirect_stdout(sys.stderr), interruptible(again):
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
        weights = run(plan, resume=resume, progress=lambda line: say("  ".join(f"{k} {v:.4g}" for k, v in line.items())))
    typer.echo(weights)


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


@app.command()
def bench(
    paths: Annotated[list[str], typer.Argument(help="Images, folders (searched whole), globs.", show_default=False)],
    limit: Annotated[int, typer.Option(min=1, help="Take only the first so many images.", rich_help_panel=INPUT)] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions, in turns; medians are shown.", rich_help_panel=RUN)] = 3,
    detector: opt.DetectorName = Plan.detector,
    detector_weights: opt.DetectorWeights = Plan.detector_weights,
    text: opt.Text = Plan.text,
    classes: opt.Classes = Plan.classes,
    boxes: opt.Boxes = Plan.boxes,
    depth: opt.DepthName = Plan.depth,
    model: opt.ModelName = Plan.model,
    weights: opt.Weights = Plan.weights,
    zoom: opt.Zoom = Plan.zoom,
    device: opt.Device = Plan.device,
    precision: opt.Precision = Plan.precision,  # type: ignore[assignment]
    batch: opt.Batch = Plan.batch,
    pull: opt.Pull = False,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Measure what each stage costs for an image, alone and in batches, and whether the detector answers the same.

    [bold]depthseg bench photos/ --detector yolov8m --model efficientvit-sam-l2[/bold]
    """
    plan = Plan(
        model=model, weights=weights, detector=detector, detector_weights=detector_weights, text=text, classes=classes, boxes=boxes,
        depth=depth, zoom=zoom, device=device, precision=precision, batch=batch,
    )  # fmt: skip
    opt.check_names(plan)
    opt.check_files(plan, None, pull)
    with contextlib.redirect_stdout(sys.stderr), interruptible("stopped"):
        from depthseg import data

        images = data.find(paths)[:limit]
        from depthseg.bench import stages
        from depthseg.segment import Segmenter

        with downloads() as fetched:
            segmenter = Segmenter(plan, pull, progress=fetched)
        with progress("turns") as show:
            found = stages(segmenter, images, rounds, show)
    for note in found.notes:
        say(note)
    if as_json:
        boxes_told = {"boxes": found.boxes, "pixels": found.pixels}
        typer.echo(json.dumps({"schema_version": 1, "batch": batch, "alone": found.alone, "batched": found.batched, **boxes_told}))
        return
    rows = [[s, f"{1000 * found.alone[s]:.1f}", f"{1000 * found.batched[s]:.1f}"] for s in found.alone]
    total = [f"{1000 * sum(times.values()):.1f}" for times in (found.alone, found.batched)]
    table(["stage", "ms/image alone", f"in batches of {batch}"], [*rows, ["all", *total]])
    if found.pixels is not None:
        typer.echo(f"{found.boxes} boxes of the detector differ by at most {found.pixels:.2g} pixels between the two")


@app.command()
def models(
    names: Annotated[list[str] | None, typer.Argument(help="Measure these; without a name all are listed.", show_default=False)] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Count parameters and multiply-adds of every segmentation model.")] = False,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """List what can be chosen: models, depth estimators, detectors, their terms and whether their weights are here.

    [bold]depthseg models[/bold]\n
    [bold]depthseg models efficientvit-sam-l2 efficientvit-sam-l2-depth[/bold]   measured numbers beside the paper's
    """
    for name in names or []:
        catalog.row(catalog.MODELS, name, "model")
    if names or measure:
        _measured(names or list(catalog.MODELS), as_json)
    else:
        _listed(as_json)


def _measured(names: list[str], as_json: bool) -> None:
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
    show(["model", "input", "parameters", "paper's parameters", "encoder MACs", "paper's MACs"], rows, as_json)


def _listed(as_json: bool) -> None:
    from depthseg import weights

    if as_json:
        known = {role: {name: {**asdict(e), "weights": weights.state(e)} for name, e in t.items()} for role, t in catalog.TABLES.items()}
        typer.echo(json.dumps({"schema_version": 1, **known}))
        return

    remarks: dict[str, list[str]] = {}
    for title, entries in (("model", catalog.MODELS), ("depth", catalog.DEPTHS), ("detector", catalog.DETECTORS)):
        rows = []
        for name, entry in entries.items():
            licence, _, remark = entry.licence.partition(": ")
            for text in filter(None, (remark, entry.note)):
                remarks.setdefault(text, []).append(name)
            size = f"{entry.millions:g} M" if entry.millions else ""
            macs = f"{entry.gmacs:g} G" if entry.gmacs else ""
            rows.append([name, str(entry.input or ""), size, macs, licence, weights.state(entry), entry.score])
        table([title, "input", "parameters", "encoder MACs", "licence", "weights", "published score"], rows)
    for text, which in remarks.items():
        typer.echo(f"{', '.join(dict.fromkeys(which))}: {text}")


app.command()(doctor)


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
        else:
            _explain("unexpected error", f"{type(error).__name__}: {error}", "Add --debug to see the traceback.")
    if "--debug" in argv:
        traceback.print_exception(caught)
    sys.exit(code)


def _verbs() -> list[str]:
    return [command.name or command.callback.__name__ for command in app.registered_commands if command.callback] + ["weights", "config"]


def _explain(kind: str, message: str, hint: str) -> None:
    """One line that says what is wrong, one that says what to do."""
    say(f"{kind}: {' '.join(message.split())}")
    if hint:
        say(f"hint: {hint}")
