"""`depthseg models` and `depthseg bench`: what can be chosen, how large it is, and what it costs here."""

import contextlib
import json
import sys
from dataclasses import asdict
from typing import Annotated

import typer

from depthseg import catalog
from depthseg import options as opt
from depthseg.options import INPUT, RUN
from depthseg.plan import Plan
from depthseg.terminal import downloads, interruptible, listing, progress, say, table


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
    backend: opt.Backend = Plan.backend,  # type: ignore[assignment]
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
        depth=depth, zoom=zoom, device=device, precision=precision, backend=backend, batch=batch,
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
    from depthseg.bench import measure
    from depthseg.published import SIZES

    rows = []
    for name in names:
        got = measure(name)
        said = "; ".join(map(str, SIZES.get(name, ())))
        rows.append([name, str(catalog.MODELS[name].input), f"{got['params']:,}", f"{got['macs'] / 1e9:.2f} G", said])
    listing(["model", "input", "parameters", "encoder MACs", "published"], rows, as_json)


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
