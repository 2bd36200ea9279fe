"""`depthseg eval` and `depthseg compare`: options, one call after the other, tables."""

import contextlib
import json
import re
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from depthseg import catalog, table_cli
from depthseg import options as opt
from depthseg.errors import REGRESSION, SOME_FAILED, DepthsegError
from depthseg.options import DEPTH, INPUT, MODEL, OUTPUT, PROMPTS, RUN
from depthseg.plan import TABLES, Plan
from depthseg.terminal import FAILURES_SHOWN, downloads, interruptible, many, number, progress, say, table, take, write_json

IMAGES_SHOWN = 5  # of those that got better, and worse
CLICKS = {"efficientsam": "1,3", "amr": "2"}  # after which the papers score, where it is not 1, 3 and 5
ALIKE = {"map": "ap", "map50": "ap50", "map75": "ap75"}  # other words for our metrics


def evaluate(
    ctx: typer.Context,
    images: Annotated[Path, typer.Option(help="Folder of the images.", rich_help_panel=INPUT, metavar="DIR")],
    annotations: Annotated[
        Path | None, typer.Option(help="COCO or LVIS annotations (JSON); not for depth.", rich_help_panel=INPUT, metavar="FILE")
    ] = None,
    dataset: Annotated[
        Literal["coco", "lvis"] | None,
        typer.Option(help="What the annotations must be; without it, what they are.", rich_help_panel=INPUT),
    ] = None,
    subset: Annotated[int | None, typer.Option(min=1, help="Only N images, drawn with --seed.", rich_help_panel=INPUT, metavar="N")] = None,
    only: opt.Only = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the subset and of random clicks.", rich_help_panel=RUN)] = 0,
    prompt: Annotated[
        Literal["box", "point", "detector", "depth"],
        typer.Option(
            help="True boxes, clicks on the true mask, boxes of a detector; depth scores the depth estimator alone.",
            rich_help_panel=PROMPTS,
        ),
    ] = "box",
    clicks: Annotated[
        str | None,
        typer.Option(
            help="point: score after so many clicks; without it 1,3,5, for efficientsam 1,3 and for amr 2.",
            rich_help_panel=PROMPTS,
            show_default=False,
        ),
    ] = None,
    protocol: Annotated[
        Literal["official", "strict", "efficientsam", "amr"],
        typer.Option(
            help="Rules of prompting and scoring, which the report has in words. "
            "official (EfficientViT-SAM, the depth paper): bbox fields as boxes; clicks at the deepest error; of a detector's box the "
            "candidate of the highest predicted IoU; crowds count. strict: likewise, without crowds, sizes on a bound counted once. "
            "efficientsam: tightest boxes of the masks; random clicks in the mask; the candidate with the highest IoU with the box. "
            "amr (adaptive mask refinement): tightest boxes; two random clicks in the mask.",
            rich_help_panel=PROMPTS,
        ),
    ] = "official",
    rank: Annotated[
        Literal["detector", "predicted_iou", "product"],
        typer.Option("--score", help="detector: the score that ranks the masks.", rich_help_panel=PROMPTS),
    ] = "detector",
    detector: opt.DetectorName = Plan.detector,
    boxes: opt.Boxes = Plan.boxes,
    detector_weights: opt.DetectorWeights = Plan.detector_weights,
    text: opt.Text = Plan.text,
    classes: opt.Classes = Plan.classes,
    confidence: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Drop boxes under this score: AP needs it low, and 0.001 is the default.", rich_help_panel=PROMPTS),
    ] = Plan.confidence,
    max_boxes: opt.MaxBoxes = Plan.max_boxes,
    predictions: Annotated[
        Path | None,
        typer.Option(help="Score these COCO results instead of running a model.", rich_help_panel=PROMPTS, metavar="FILE"),
    ] = None,
    agnostic: Annotated[
        bool, typer.Option("--agnostic", help="detector: ignore classes, as always for nano and grid.", rich_help_panel=PROMPTS)
    ] = False,
    depth: opt.DepthName = Plan.depth,
    depth_side: opt.DepthSide = Plan.depth_side,
    ablate_depth: Annotated[
        bool,
        typer.Option("--ablate-depth", help="Again without depth, with a constant, and with other images' depth.", rich_help_panel=DEPTH),
    ] = False,
    model: opt.ModelName = Plan.model,
    table_number: Annotated[
        int | None,
        typer.Option(
            "--table",
            min=1,
            max=3,
            help="A table of the papers: 1 boxes of detectors, 2 clicks, 3 true boxes; an evaluation for each of --models, in "
            "DIR/table3/coco/nano and so on. Whole pictures, unless --zoom is given. Goes on where it was stopped.",
            rich_help_panel=MODEL,
            show_default=False,
        ),
    ] = None,
    models: Annotated[
        str | None, typer.Option(help="--table: the rows, separated by commas.", rich_help_panel=MODEL, metavar="NAMES")
    ] = None,
    weights: opt.Weights = Plan.weights,
    zoom: opt.Zoom = Plan.zoom,
    central: opt.Central = Plan.central,
    refine: opt.Refine = Plan.refine,
    refine_rounds: opt.RefineRounds = Plan.refine_rounds,
    refine_points: opt.RefinePoints = Plan.refine_points,
    refine_below: opt.RefineBelow = Plan.refine_below,
    device: opt.Device = Plan.device,
    precision: opt.Precision = Plan.precision,  # type: ignore[assignment]
    backend: opt.Backend = Plan.backend,  # type: ignore[assignment]
    batch: opt.Batch = Plan.batch,
    threads: opt.Threads = Plan.threads,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder of the report and the predictions.", rich_help_panel=OUTPUT, metavar="DIR"),
    ] = None,
    expect: Annotated[
        list[str] | None,
        typer.Option(help="End with code 6 unless this holds; repeatable.", rich_help_panel=OUTPUT, metavar="'mAP>=44.0'"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start anew in a folder with another run.", rich_help_panel=RUN)] = False,
    pull: opt.Pull = False,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Score a model against COCO or LVIS ground truth: the tables of the papers.

    [bold]depthseg eval --images val/ --annotations instances_val.json -o report[/bold]   true boxes (Table 3)\n
    [bold]depthseg eval ... --prompt point --clicks 1,3,5[/bold]   clicks (Table 2)\n
    [bold]depthseg eval ... --prompt detector --boxes coco_vitdet.json[/bold]   a detector's boxes (Table 1)\n
    [bold]depthseg eval ... --table 3 --models nano,efficientvit-sam-l2 -o tables[/bold]   the whole table
    """

    def named(*options: str) -> list[str]:  # on the command line: a setting for all commands is no mistake
        return [n for n in options if str(ctx.get_parameter_source(n)).endswith("COMMANDLINE")]

    if (table_number is None) != (models is None):
        raise DepthsegError("a table needs its number and its rows", "Give --table 3 and --models a,b,c together.")
    if table_number:
        if alone := named("prompt", "model", "predictions", "ablate_depth", "expect"):
            raise DepthsegError(f"--{alone[0].replace('_', '-')} is for a single evaluation", "Leave it out, or --table.")
        if output is None:
            raise DepthsegError("a table is kept in a folder, to go on from there", "Add -o DIR.")
        prompt, zoom = TABLES[table_number], bool(zoom)  # type: ignore[assignment]
    given = {name: value for name, value in locals().items() if name in Plan.__dataclass_fields__}
    if prompt != "detector":
        given |= {name: getattr(Plan, name) for name in ("boxes", "text", "classes", "detector_weights")} | {"detector": "grid"}
    plan = Plan(**given, draft=False)  # scores are those of every pixel
    opt.check_names(plan)
    wanted = [_expectation(e) for e in expect or []]
    if prompt == "depth":
        if annotations or predictions or subset or only or ablate_depth:
            raise DepthsegError("the depth estimator is scored on a folder of depth pairs", "Leave all but --images and --depth out.")
        return _gate(_depth(images, depth, device, precision, backend, output, pull, as_json), wanted)
    if annotations is None:
        raise DepthsegError("no ground truth was named", "Add --annotations FILE.")
    counts = _counts(clicks or CLICKS.get(protocol, "1,3,5"))
    of_detector = named("detector", "boxes", "text", "classes", "detector_weights")
    if prompt != "detector" and of_detector:
        raise DepthsegError(
            f"the prompts are the truth's ({prompt}), and a detector or its boxes are named", "Add --prompt detector, or take --table 1."
        )
    if table_number:
        rows = table_cli.plans(plan, models or "", pull)
    elif predictions is None:
        opt.check_files(plan, None, pull)
    elif ablate_depth:
        raise DepthsegError("predictions of a file cannot be asked again", "Leave --ablate-depth or --predictions out.")
    if output:
        take(output)
    again = f"stopped; run the same command again to go on in {output}" if output else "stopped; with -o DIR it could go on"
    with contextlib.ExitStack() as held:
        held.enter_context(contextlib.redirect_stdout(sys.stderr))  # libraries that print must not spoil stdout
        held.enter_context(interruptible(again))
        folder = output or Path(held.enter_context(tempfile.TemporaryDirectory(prefix="depthseg-eval-")))
        from depthseg import asking, score, truth
        from depthseg import evaluate as run

        data = truth.read(images, annotations, dataset, subset, seed, only or [])
        ask = score.Request(prompt, counts if prompt == "point" else (), protocol, seed, rank, agnostic)
        how: dict[str, Any] = {"pictures": bool(output), "command": shlex.join(["depthseg", *sys.argv[1:]])}
        for name, *_ in wanted:
            catalog.row(dict.fromkeys(score.names_of(ask, data.kind), catalog.Row("")), name, "metric of this evaluation")
        if table_number and output:
            command = str(how["command"])
            made, failed = table_cli.run(table_number, rows, data, ask, output, pull, command, overwrite, bool(of_detector))
        elif predictions:
            report = run.from_file(data, predictions, ask, folder, **how)
        else:
            with downloads() as fetched:
                segmenter = asking.segmenter_for(data, plan, ask, pull, fetched)
            for note in segmenter.notes:
                if not note.startswith("warning: "):  # those come with the report's own
                    say(note)
            with progress("images") as show:
                report = run.run(data, segmenter, ask, folder, overwrite=overwrite, ablate=ablate_depth, progress=show, **how)
    if table_number:
        table_cli.show(made, as_json)
        raise typer.Exit(SOME_FAILED if failed else 0)
    if as_json:
        typer.echo(json.dumps(report))
    else:
        _told(report, output)
    _gate(report["metrics"], wanted)
    if report["state"]["failed"]:
        raise typer.Exit(SOME_FAILED)


Expectation = tuple[str, str, float, str]  # metric, sign, number and the text itself


def _gate(metrics: dict[str, Any], wanted: list[Expectation]) -> None:
    """Leave with REGRESSION unless all expectations hold."""
    if unmet := [text for name, sign, least, text in wanted if not _holds(metrics, name, sign, least)]:
        say(f"not met: {', '.join(unmet)}")
        raise typer.Exit(REGRESSION)


def _counts(clicks: str) -> tuple[int, ...]:
    try:
        return tuple(sorted({int(n) for n in clicks.split(",")}))
    except ValueError:
        raise DepthsegError(f"--clicks {clicks} is not a list of numbers", "Write it like 1,3,5.") from None


def _expectation(text: str) -> Expectation:
    found = re.fullmatch(r"\s*(\w+)\s*(>=|<=|>|<)\s*(-?\d+(?:\.\d+)?)\s*", text)
    if not found:
        raise DepthsegError(f"--expect '{text}' cannot be read", "Write it like 'mAP>=44.0' or 'miou_small>70'.")
    name = found[1].lower()
    return ALIKE.get(name, name), found[2], float(found[3]), text


def _holds(metrics: dict[str, Any], name: str, sign: str, least: float) -> bool:
    if name not in metrics:
        raise DepthsegError(f"there is no metric '{name}' in this report", f"It has {', '.join(metrics)}.")
    value = metrics[name]
    if value is None:
        return False
    return {">=": value >= least, "<=": value <= least, ">": value > least, "<": value < least}[sign]


def _told(report: dict, output: Path | None) -> None:
    state = report["state"]
    for failure in state["failed"][:FAILURES_SHOWN]:
        say(f"failed: {failure['key']}: {failure['reason']}")
    for warning in report["warnings"]:
        say(f"warning: {warning}")
    bounds = report.get("intervals") or {}
    rows = [[k, number(v), " to ".join(map(number, bounds[k])) if bounds.get(k) else ""] for k, v in report["metrics"].items()]
    table(["score", "value", "95 % interval"], rows)
    if report.get("ablation"):
        rows = [
            [d["mode"], d["metric"], f"{d['value']:+.2f}", f"{d['low']:+.2f} to {d['high']:+.2f}" if d["low"] is not None else ""]
            for d in report["ablation"]["differences"]
        ]
        table(["instead of depth", "score", "what depth adds", "95 % interval"], rows)
    typer.echo(" ".join(report["protocol_in_words"]))
    failed = f", {len(state['failed'])} FAILED and not in the scores" if state["failed"] else ""
    typer.echo(f"{report['title']}: {many(state['done'], 'image')}{failed}")
    if output:
        typer.echo(output / "report" / "index.html")


def _depth(
    images: Path, depth: str, device: str, precision: str, backend: str, output: Path | None, pull: bool, as_json: bool
) -> dict[str, Any]:
    """Score the depth estimator alone: its report."""
    if output:
        take(output)
    with contextlib.redirect_stdout(sys.stderr), interruptible("stopped; nothing was written"):
        from depthseg.evaluate import evaluate_depth

        chosen = opt.estimator(depth, device, precision, pull, backend)
        with progress("images") as show:
            report = evaluate_depth(images, chosen.estimator, progress=show)
    if output:
        write_json(output / "report.json", report)
    if as_json:
        typer.echo(json.dumps({"schema_version": 1, **report}))
    else:
        table(["score", "value"], [[k, number(v)] for k, v in report.items() if not isinstance(v, dict | list | str)])
        typer.echo(report["protocol"])
    return report


def compare(
    run_a: Annotated[Path, typer.Argument(help="Folder that `depthseg eval -o` wrote.", show_default=False)],
    run_b: Annotated[Path, typer.Argument(help="Another one, on the same images.", show_default=False)],
    fail_on_regression: Annotated[
        float | None,
        typer.Option(
            min=0, help="End with code 6 if the headline score of B is more than X points lower.", rich_help_panel=OUTPUT, metavar="X"
        ),
    ] = None,
    as_json: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Two evaluations side by side: differences with paired intervals, and the images that got better and worse.

    [bold]depthseg compare reports/nano reports/nano-depth --fail-on-regression 0.5[/bold]
    """
    with contextlib.redirect_stdout(sys.stderr):
        from depthseg.compare import compare as pair

        rows, images, headline = pair(run_a, run_b)
    if as_json:
        typer.echo(json.dumps({"schema_version": 1, "headline": headline, "rows": [r._asdict() for r in rows], "images": dict(images)}))
    else:
        _compared(rows, images, str(run_a), str(run_b))
    (a, b), *_ = [(row.a, row.b) for row in rows if row.metric == headline]
    if fail_on_regression is not None and (a is not None and (b is None or b < a - fail_on_regression)):
        say(f"{headline} fell from {number(a)} to {number(b)}")
        raise typer.Exit(REGRESSION)


def _compared(rows: list[Any], images: list[tuple[str, float]], a: str, b: str) -> None:
    """The tables of `compare`."""
    lines = []
    for row in rows:
        change = None if row.a is None or row.b is None else row.b - row.a
        bounds = f"{row.low:+.2f} to {row.high:+.2f}" if row.low is not None and row.high is not None else ""
        lines.append([row.metric, number(row.a), number(row.b), "" if change is None else f"{change:+.2f}", bounds])
    table(["score", a, b, "B - A", "95 % interval"], lines)
    better, worse = [pair for pair in images[::-1] if pair[1] > 0], [pair for pair in images if pair[1] < 0]
    for title, some in ((f"{many(len(better), 'image')} got better", better), (f"{many(len(worse), 'image')} got worse", worse)):
        table([title, "mean IoU, points"], [[key, f"{change:+.1f}"] for key, change in some[:IMAGES_SHOWN]])
