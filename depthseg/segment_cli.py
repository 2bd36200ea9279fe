"""`depthseg segment` and `depthseg detect`: options, one call after the other, what is said on the way."""

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from depthseg import catalog
from depthseg import options as opt
from depthseg.errors import SOME_FAILED, DepthsegError
from depthseg.options import INPUT, MODEL, OUTPUT, RUN
from depthseg.plan import Plan
from depthseg.terminal import FAILURES_SHOWN, downloads, duration, gracefully, interruptible, many, progress, say, take

REHEARSED = 4  # images of a --dry-run


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
    draft: opt.Draft = Plan.draft,
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
    depth_side: opt.DepthSide = Plan.depth_side,
    model: opt.ModelName = Plan.model,
    weights: opt.Weights = Plan.weights,
    zoom: opt.Zoom = Plan.zoom,
    central: opt.Central = Plan.central,
    refine: opt.Refine = Plan.refine,
    refine_rounds: opt.RefineRounds = Plan.refine_rounds,
    refine_points: opt.RefinePoints = Plan.refine_points,
    refine_below: opt.RefineBelow = Plan.refine_below,
    device: opt.Device = Plan.device,
    precision: opt.Precision = Plan.precision,  # type: ignore[assignment]  # a str in Plan, one of four here
    backend: opt.Backend = Plan.backend,  # type: ignore[assignment]
    batch: opt.Batch = Plan.batch,
    prompt_batch: Annotated[
        int, typer.Option(min=1, help="Prompts in one call of the decoder.", rich_help_panel=MODEL)
    ] = Plan.prompt_batch,
    threads: opt.Threads = Plan.threads,
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

    masks, failed, done = 0, 0, 0
    with sink.Sink(out, plan, found, segmenter.provenance, overwrite, images) as written, gracefully() as stopping:
        todo = [image for image in images if image.key not in written.done]
        if len(todo) < len(images):
            say(f"{len(images) - len(todo)} of {many(len(images), 'image')} done already")

        def answers() -> Iterator[Any]:
            """Those of all images, or, when asked to stop, up to the end of a batch."""
            for count, answer in enumerate(segmenter.segment(todo), 1):
                yield answer
                if stopping() and count % plan.batch == 0:
                    return

        start = time.monotonic()
        with progress("images") as show, contextlib.closing(written.drawn(answers())) as drawn:
            show(0, len(todo))
            for done, answer in enumerate(drawn, 1):
                if isinstance(answer, data.Failure):
                    failed += 1
                    if failed <= FAILURES_SHOWN:
                        say(f"failed: {answer.image.key}: {answer.reason}")
                    written.failed(answer)
                else:
                    written.note(answer)
                    masks += len(answer.masks)
                show(done, len(todo))
        if done < len(todo):
            say(f"{many(done - failed, 'image')} done, {len(todo) - done} left")
            raise KeyboardInterrupt(stopping())
        seconds = time.monotonic() - start
    if todo:
        what = f"{many(len(todo) - failed, 'image')}, {many(masks, 'mask')}"
        say(f"{what} in {duration(seconds)}, {len(todo) / seconds:.2f} images/s")
    for remark in segmenter.remarks():
        say(remark)
    if failed:
        say(f"{many(failed, 'image')} failed: see {out / 'failures.jsonl'}")
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
    speed = f"{1 / seconds:.2f} images/s, about {duration(seconds * len(images))} in all"
    say(f"{many(len(images), 'image')} into {out}; tried {len(few)}: {speed}")
    say(f"about {size * len(images) / 2**20:.0f} MiB of disk")
    about = {"images": len(images), "failed": failed, "images_per_second": 1 / seconds, "seconds": seconds * len(images)}
    return {"schema_version": 1, "output": str(out), **about, "bytes": round(size * len(images)), "plan": plan.to_json()}


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
    backend: opt.Backend = Plan.backend,  # type: ignore[assignment]
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
        device=device, precision=precision, backend=backend, batch=batch,
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
        from depthseg.numerics import device_of, precision_of, set_up

        where = device_of(device)
        with downloads() as fetched:
            numbers = precision_of(precision, where)
            set_up(where, numbers)
            chosen = choose(plan, where, numbers, pull, fetched)
        for note in (*chosen.notes, *catalog.terms({f"detector {chosen.name}": chosen.entry} if chosen.entry else {})):
            say(note)
        with progress("images") as show:
            count, failed = write_boxes(images, chosen.source, output, batch, show)  # type: ignore[arg-type]
        boxes = f"{count} box{'' if count == 1 else 'es'}"
        say(f"{boxes} in {many(len(images) - len(failed), 'image')}")
        for failure in failed[:FAILURES_SHOWN]:
            say(f"failed: {failure.image.key}: {failure.reason}")
    counts = {"images": len(images), "boxes": count, "failed": len(failed)}
    typer.echo(json.dumps({"schema_version": 1, "output": str(output), **counts}) if as_json else output)
    if failed:
        raise typer.Exit(SOME_FAILED)
