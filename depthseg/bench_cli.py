"""`depthseg bench`: what it costs here, and against the official loop and others."""

import contextlib
import json
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from depthseg import catalog
from depthseg import options as opt
from depthseg.errors import DepthsegError
from depthseg.options import INPUT, RUN
from depthseg.plan import Plan
from depthseg.terminal import downloads, interruptible, progress, say, table

CASES = "Sizes, boxes and peers"  # help panel
SIZES, COUNTS = "640x480,12mp", "1,10,100"
CLOCKS = ("wall", "CPU")  # of bench.clock


def bench(
    paths: Annotated[
        list[str] | None,
        typer.Argument(help="Images, folders (searched whole), globs; without any, pictures that are made up.", show_default=False),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Take so many images; by default 16, or 2 of each size.", rich_help_panel=INPUT, show_default=False),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions, in turns; medians are shown.", rich_help_panel=RUN)] = 3,
    size: Annotated[
        str | None,
        typer.Option(
            help=f"Sizes of the pictures, like {SIZES}; images that are given are cut and scaled to them.",
            rich_help_panel=CASES,
            show_default=False,
            metavar="SIZES",
        ),
    ] = None,
    boxes_per_image: Annotated[
        str | None,
        typer.Option(help=f"Numbers of boxes, like {COUNTS}, by a fixed rule.", rich_help_panel=CASES, show_default=False, metavar="N,N"),
    ] = None,
    reference: Annotated[
        bool, typer.Option("--reference", help="Take turns with the official EfficientViT-SAM loop and compare.", rich_help_panel=CASES)
    ] = False,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            help="Take turns with mobilesam (by ultralytics) or sam-b (SAM ViT-B by transformers) too; repeatable.",
            rich_help_panel=CASES,
            show_default=False,
        ),
    ] = None,
    draft: opt.Draft = Plan.draft,
    detector: opt.DetectorName = Plan.detector,
    detector_weights: opt.DetectorWeights = Plan.detector_weights,
    text: opt.Text = Plan.text,
    classes: opt.Classes = Plan.classes,
    boxes: opt.Boxes = Plan.boxes,
    depth: opt.DepthName = Plan.depth,
    depth_side: opt.DepthSide = Plan.depth_side,
    model: opt.ModelName = Plan.model,
    weights: opt.Weights = Plan.weights,
    zoom: opt.Zoom = Plan.zoom,
    device: opt.Device = Plan.device,
    precision: opt.Precision = Plan.precision,  # type: ignore[assignment]
    backend: opt.Backend = Plan.backend,  # type: ignore[assignment]
    batch: opt.Batch = Plan.batch,
    threads: opt.Threads = Plan.threads,
    pull: opt.Pull = False,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Measure what it costs here: from a picture's bytes to its masks for sizes and numbers of boxes, or each stage on your images.

    [bold]depthseg bench[/bold]\n
    [bold]depthseg bench --model efficientvit-sam-l2-depth --boxes-per-image 10,100 --size 640x480 --reference[/bold]\n
    [bold]depthseg bench photos/ --reference --no-zoom[/bold]   with real pictures the masks are compared in earnest\n
    [bold]depthseg bench photos/ --detector yolov8m --model efficientvit-sam-l2[/bold]   the detector and all that follows, by stage
    """
    plan = Plan(
        model=model, weights=weights, detector=detector, detector_weights=detector_weights, text=text, classes=classes, boxes=boxes,
        depth=depth, zoom=zoom, device=device, precision=precision, backend=backend, batch=batch,
        threads=threads, draft=draft, depth_side=depth_side,
    )  # fmt: skip
    opt.check_names(plan)
    ruled = not paths or size or boxes_per_image or reference or peer
    if ruled and (text or classes or boxes or detector != Plan.detector):
        raise DepthsegError("boxes follow a fixed rule here", "Name images, and leave --size, --boxes-per-image, --reference, --peer out.")
    if ruled:
        told = _cases(plan, paths or [], limit or 2, rounds, _sizes(size or SIZES), _counts(boxes_per_image or COUNTS), reference,
                      list(peer or []), pull)  # fmt: skip
        return typer.echo(json.dumps(told)) if as_json else _show(told)
    opt.check_files(plan, None, pull)
    with contextlib.redirect_stdout(sys.stderr), interruptible("stopped"):
        from depthseg import data

        images = data.find(paths or [])[: limit or 16]
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


def _sizes(text: str) -> list[tuple[int, int]]:
    """h, w of each size in 640x480,12mp; so many megapixels have the shape 4 to 3."""
    out = []
    for part in text.lower().split(","):
        if found := re.fullmatch(r"\s*(\d{2,5})x(\d{2,5})\s*", part):
            out.append((int(found[2]), int(found[1])))
        elif (found := re.fullmatch(r"\s*(\d{1,3}(?:\.\d+)?)mp\s*", part)) and float(found[1]):
            out.append((round((float(found[1]) * 750_000) ** 0.5), round((float(found[1]) / 0.75) ** 0.5 * 1000)))
        else:
            raise DepthsegError(f"'{part}' is no size of a picture", f"Write it like {SIZES}: width x height, or megapixels.")
    return out


def _counts(text: str) -> list[int]:
    try:
        out = [int(part) for part in text.split(",")]
    except ValueError:
        out = [0]
    if min(out) < 1 or max(out) > 1000:
        raise DepthsegError(f"'{text}' are no numbers of boxes", f"Write them like {COUNTS}, up to 1000.")
    return out


def _cases(
    plan: Plan, paths: list[str], images: int, rounds: int, sizes: list[tuple[int, int]], counts: list[int], reference: bool,
    peers: list[Any], pull: bool,
) -> dict[str, Any]:  # fmt: skip
    """Measure, and return what --json prints."""
    with (
        contextlib.redirect_stdout(sys.stderr),
        interruptible("stopped"),
        tempfile.TemporaryDirectory(prefix="depthseg-") as scratch,
    ):
        from depthseg import data

        own = data.find(paths) if paths else []
        import torch

        from depthseg import bench, depth, weights
        from depthseg import peers as other
        from depthseg import reference as official
        from depthseg.numerics import device_of, precision_of
        from depthseg.predictor import prepared
        from depthseg.segment import Segmenter

        where = device_of(plan.device)
        precision = precision_of(plan.precision, where)
        torch.manual_seed(0)
        for name in set(peers) - set(other.PEERS):
            raise DepthsegError(f"no peer is called '{name}'", f"Choose from {', '.join(other.PEERS)}.")
        others: dict[str, Callable] = {name: other.PEERS[name](where) for name in peers}  # first: a package may not be there
        with downloads() as fetched:
            network, random = bench.network_for(plan, pull, fetched)
        if random:
            say(f"the weights of {plan.model} are not on this machine: random ones, which are as fast")
        if reference:
            network.specks = 0.0  # rules of ours that the official loop does not have
            plan = replace(plan, zoom=bool(plan.zoom))
            same = bench.network_for(plan, False)[0].to(where)
            others = {"official loop": lambda jpeg, boxes: official.segment(same, jpeg, boxes), **others}
        chosen = None
        if network.alpha is not None and plan.depth != "none":
            if plan.depth in catalog.DEPTHS and not pull and (row := catalog.DEPTHS[plan.depth]).hub and not weights.find(row):
                say(f"the weights of {plan.depth} are not on this machine: random ones")
                made = bench.random_depth(plan.depth, Path(scratch, "depth"), where, precision, plan.backend, plan.depth_side)
                chosen = plan.depth, made
            else:
                ready = depth.depth_estimator(plan.depth, where, precision, pull, plan.backend, plan.depth_side)
                chosen = ready.name, ready.estimator.depth if isinstance(ready.estimator, depth.Cached) else ready.estimator
        network = prepared(network, plan, precision, where)
        ours = {"none": Segmenter(replace(plan, depth="none"), network=network, source=lambda images: [])}
        if chosen:
            ours[chosen[0]] = Segmenter(plan, network=network, source=lambda images: [], depth=chosen[1])
        with progress("turns") as show:
            rows = bench.cases(ours, others, sizes, counts, Path(scratch), images, rounds, own, show)
        for measured in rows:
            for name in peers:
                measured["against"][name]["miou"] = None  # another network's masks say nothing about ours
        about = {"model": plan.model, "weights": "random" if random else "trained", **bench.measure(plan.model), "device": str(where)}
        settings = {
            "backend": plan.backend,
            "precision": precision,
            "threads": torch.get_num_threads(),
            "batch": plan.batch,
            "images": images,
            "rounds": rounds,
            "ratios_of": CLOCKS[bench.counts_in(where)],
        }
        return {"schema_version": 1, **about, **settings, "peaks": bench.peaks(where, precision), "cases": rows}


def _show(told: dict[str, Any]) -> None:
    """The same for people: times in milliseconds for an image."""
    typer.echo(
        f"{told['model']} ({told['weights']} weights): {told['params'] / 1e6:.1f} M parameters, {told['macs'] / 1e9:.2f} G multiply-adds "
        f"to encode; {told['backend']} in {told['precision']} on {told['device']}, {told['threads']} threads, {told['images']} images in "
        f"batches of {told['batch']}, medians of {told['rounds']}"
    )
    rows, shares = [], []
    which = CLOCKS.index(told["ratios_of"])
    unit = f"{CLOCKS[which]} ms"
    names = [s for s in ("read", "depth", "encode", "decode", "masks") if any(s in row["stages"] for row in told["cases"])]
    for row in told["cases"]:
        wall, cpu = row["seconds"]
        stages = [f"{1000 * row['stages'][s][which]:.1f}" if s in row["stages"] else "" for s in names]
        rates = [f"{1 / seconds:.2f}" for seconds in (wall, row["model"][0])]
        rows.append([*_case(row), *rates, f"{1000 * wall:.1f}", f"{1000 * cpu:.1f}", *stages])
        speed = {s: row["operations"][s] / row["stages"][s][which] for s in ("encode", "decode") if row["operations"][s]}
        shares.append([*_case(row), *(f"{v / 1e9:.0f} ({100 * v / told['peaks']['convolution']:.0f} %)" for v in speed.values())])
    table(["size", "boxes", "depth", "images/s", "model only", "wall ms", "CPU ms", *(f"{s} {unit}" for s in names)], rows)
    against = [
        [name, *_case(row), f"{1000 * it['seconds'][which]:.0f}", f"{1000 * row['seconds'][which]:.0f}",
         *(f"{v:.2f}" for v in it["ratio"]), "" if it["miou"] is None else f"{it['miou']:.5f}"]
        for row in told["cases"] for name, it in row["against"].items()
    ]  # fmt: skip
    if against:
        if told["precision"] != "fp32":
            typer.echo(
                f"ours computes in {told['precision']}, the others in fp32: with --precision fp32 the ratios are those of the code alone"
            )
        table(["against", "size", "boxes", "depth", f"its {unit}", "ours", "ratio: least", "median", "most", "mIoU of masks"], against)
    peaks = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in told["peaks"].items())
    typer.echo(f"the best of torch here, GFLOP/s of {('the card', 'one core')[which]}: {peaks}")
    if all(len(row) == 5 for row in shares):
        table(["size", "boxes", "depth", "encode GFLOP/s (of the convolution)", "decode"], shares)


def _case(row: dict[str, Any]) -> list[str]:
    return [row["size"], str(row["boxes"]), row["depth"]]
