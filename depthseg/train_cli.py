"""`depthseg train`: the options of a training run, and what it shows while it goes."""

import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from depthseg import catalog
from depthseg import options as opt
from depthseg.errors import DepthsegError
from depthseg.options import DEPTH, INPUT, MODEL, OUTPUT, RUN
from depthseg.plan import Plan
from depthseg.stages import STAGES, TrainPlan
from depthseg.terminal import duration, gracefully, interruptible, say, take

LEARNING, CHECKS = "Learning", "Validation and checks"  # help panels
_PLAN = TrainPlan("", (), "")  # the home of the defaults


def train(
    stage: Annotated[
        Literal["0", "1", "2", "distil", "sam", "tune", "depth", "boxes"],
        typer.Option(help="; ".join(f"{name}: {stage.about}" for name, stage in STAGES.items()) + "."),
    ],
    data: Annotated[
        list[Path],
        typer.Option(
            help="SA-1B layout in folders or tars, EfficientViT's layout, packs, or a COCO instances file; repeatable.",
            rich_help_panel=INPUT,
            metavar="ROOT",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder of checkpoints and curves.", rich_help_panel=OUTPUT)],
    model: opt.ModelName = Plan.model,
    init: Annotated[str | None, typer.Option(help="Start from these weights.", rich_help_panel=MODEL, metavar="FILE")] = None,
    depth_maps: Annotated[
        str | None, typer.Option(help="Folder of depth maps of the images.", rich_help_panel=DEPTH, metavar="DIR")
    ] = None,
    mix: Annotated[
        list[str] | None,
        typer.Option(
            help="PART=WEIGHT: how often images are drawn whose source (in manifest.csv) contains PART; repeatable.",
            rich_help_panel=INPUT,
            metavar="PART=WEIGHT",
        ),
    ] = None,
    overfit: Annotated[
        int | None, typer.Option(min=1, help="Only the first so many samples, always the same views; with --steps.", rich_help_panel=CHECKS)
    ] = None,
    fast_dev_run: Annotated[
        bool, typer.Option("--fast-dev-run", help="Three steps of everything, in OUTPUT/fast-dev-run.", rich_help_panel=CHECKS)
    ] = False,
    preflight: Annotated[
        bool, typer.Option("--preflight/--no-preflight", help="Try everything once before the first step.", rich_help_panel=CHECKS)
    ] = True,
    steps: Annotated[int | None, typer.Option(min=1, help="Length in steps, instead of the stage's own.", rich_help_panel=RUN)] = None,
    epochs: Annotated[float | None, typer.Option(min=0, help="Length in epochs, instead of the stage's own.", rich_help_panel=RUN)] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0, help="Length by the clock; the schedule follows it, so runs differ.", rich_help_panel=RUN),
    ] = None,
    max_hours: Annotated[
        float | None, typer.Option(min=0, help="Save and stop then; --resume goes on.", rich_help_panel=RUN, metavar="HOURS")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in OUTPUT.", rich_help_panel=RUN)] = False,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that read samples ahead; by default one, on CUDA up to eight.", rich_help_panel=RUN)
    ] = None,
    save_every: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.", rich_help_panel=RUN)] = _PLAN.save_every,
    keep: Annotated[int, typer.Option(min=0, help="Earlier checkpoints that stay.", rich_help_panel=RUN)] = _PLAN.keep,
    log_every: Annotated[int, typer.Option(min=1, help="Steps between lines of the log.", rich_help_panel=RUN)] = _PLAN.log_every,
    max_unreadable: Annotated[
        int, typer.Option(min=0, help="Samples that may be broken before the run stops.", rich_help_panel=RUN)
    ] = _PLAN.max_unreadable,
    batch: Annotated[int | None, typer.Option(min=1, help="Images in one step, over all processes.", rich_help_panel=LEARNING)] = None,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Images that a process computes at once; gradients are added up.", rich_help_panel=LEARNING)
    ] = None,
    masks: Annotated[int | None, typer.Option(min=1, help="Masks of one image in one step.", rich_help_panel=LEARNING)] = None,
    lr: Annotated[
        float | None, typer.Option(min=0, help="Peak learning rate, instead of the stage's own.", rich_help_panel=LEARNING)
    ] = None,
    loss: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=WEIGHT: another weight for one of the stage's losses; repeatable.", rich_help_panel=LEARNING, metavar="NAME=WEIGHT"
        ),
    ] = None,
    boxes_share: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of the masks prompted with a box; the rest with clicks.", rich_help_panel=LEARNING),
    ] = None,
    one_click: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of the clicked masks that are clicked once.", rich_help_panel=LEARNING)
    ] = None,
    central: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of the first clicks deepest inside the mask; the rest anywhere.", rich_help_panel=LEARNING),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=0, help="Clicks that answer the network's own errors, at most.", rich_help_panel=LEARNING)
    ] = None,
    batchnorm: Annotated[
        Literal["batch", "frozen"] | None, typer.Option(help="Statistics of each micro-batch, or kept ones.", rich_help_panel=LEARNING)
    ] = None,
    ema: Annotated[float, typer.Option(min=0, max=1, help="Decay of the moving average.", rich_help_panel=LEARNING)] = _PLAN.ema,
    clip: Annotated[float, typer.Option(min=0, help="Largest norm of the gradient; 0: any.", rich_help_panel=LEARNING)] = _PLAN.clip,
    teacher: Annotated[str, typer.Option(help="distil: whose embeddings are learned.", rich_help_panel=LEARNING)] = _PLAN.teacher,
    teacher_weights: Annotated[
        str | None, typer.Option(help="distil: a checkpoint of it.", rich_help_panel=LEARNING, metavar="FILE")
    ] = None,
    validate: Annotated[
        str | None, typer.Option(help="COCO or LVIS annotations to validate on.", rich_help_panel=CHECKS, metavar="FILE")
    ] = None,
    validate_images: Annotated[
        str | None, typer.Option(help="Their images; else `images` beside them.", rich_help_panel=CHECKS, metavar="DIR")
    ] = None,
    validate_depth: Annotated[
        str, typer.Option(help="Depth of these images, as --depth of segment.", rich_help_panel=CHECKS)
    ] = _PLAN.validate_depth,
    validate_every: Annotated[int, typer.Option(min=1, help="Steps between validations.", rich_help_panel=CHECKS)] = _PLAN.validate_every,
    validate_count: Annotated[int, typer.Option(min=1, help="Images, drawn once.", rich_help_panel=CHECKS)] = _PLAN.validate_count,
    seed: Annotated[int, typer.Option(min=0, rich_help_panel=RUN)] = _PLAN.seed,
    device: opt.Device = Plan.device,
    precision: opt.Precision = Plan.precision,  # type: ignore[assignment]
    compile_: Annotated[bool, typer.Option("--compile", help="Compile the image encoders.", rich_help_panel=MODEL)] = False,
    debug: opt.Debug = False,
) -> None:
    """Train a model on masks, by the two stages of the paper, or one of the stages around them.

    [bold]depthseg train --stage 1 --data sa1b --depth-maps depth --init nano.safetensors -o one[/bold]\n
    [bold]depthseg train --stage 2 --data sa1b --depth-maps depth --init one/weights.safetensors -o two[/bold]\n
    [bold]depthseg train --stage tune --model nano --init nano.safetensors --data mine.json --validate val.json -o tuned[/bold]\n
    [bold]torchrun --nproc-per-node 8 -m depthseg train ...[/bold]   several processes
    """
    catalog.row(catalog.MODELS, model, "model")
    if sum(v is not None for v in (steps, epochs, minutes)) > 1:
        raise DepthsegError("more than one of --steps, --epochs and --minutes is given", "Give one of them.")
    if overfit and mix:
        raise DepthsegError("--overfit takes the first samples, whatever their source", "Leave --mix out.")
    plan = TrainPlan(
        stage=stage, data=tuple(map(str, data)), output=str(output), model=model, init=init, depth_maps=depth_maps, teacher=teacher,
        teacher_weights=teacher_weights, steps=steps, epochs=epochs, minutes=minutes, max_hours=max_hours, batch=batch,
        micro_batch=micro_batch, masks=masks, lr=lr, boxes_share=boxes_share, one_click=one_click, central=central, rounds=rounds,
        batchnorm=batchnorm, losses=_numbers(loss), mix=_numbers(mix), overfit=overfit, seed=seed,
        device=device, precision=precision, compile=compile_,
        workers=workers, ema=ema, clip=clip, save_every=save_every, keep=keep, log_every=log_every, validate=validate,
        validate_images=validate_images, validate_depth=validate_depth, validate_every=validate_every, validate_count=validate_count,
        max_unreadable=max_unreadable,
    )  # fmt: skip
    if fast_dev_run:
        plan = replace(plan, output=str(output / "fast-dev-run"), steps=3, epochs=None, minutes=None, save_every=1, log_every=1,
                       validate_every=2, validate_count=2)  # fmt: skip
    take(output)
    again = "stopped; run the same command with --resume to go on from the newest checkpoint"
    with contextlib.redirect_stdout(sys.stderr), interruptible(again):
        from depthseg.learner import World
        from depthseg.train import train as run

        with _shown() as tell, gracefully("saving after this step; once more to stop at once") as stop:
            weights = run(plan, resume=resume, check=preflight, anew=fast_dev_run, tell=tell, stop=stop)
    if World().rank == 0:
        typer.echo(weights)


def _numbers(given: list[str] | None) -> dict[str, float]:
    try:
        found = {k: float(v) for k, _, v in (m.rpartition("=") for m in given or [])}
        if all(k and 0 <= v < math.inf for k, v in found.items()):
            return found
    except ValueError:
        pass
    raise DepthsegError("--mix and --loss take NAME=NUMBER, numbers from 0", "Write them like --mix coco=3 --loss dice=2.")


@contextlib.contextmanager
def _shown() -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """A function that shows what a run tells: a live table on a terminal, lines elsewhere."""
    from rich.columns import Columns
    from rich.console import Console, Group
    from rich.live import Live

    console = Console(stderr=True)
    first: tuple[float, float] | None = None  # share done and time when a run, new or resumed, first told of itself
    rows: dict[str, dict[str, Any]] = {}

    def left(done: float) -> str:
        nonlocal first
        now = time.monotonic()
        first = first or (done, now)
        return f"{duration((now - first[1]) * (1 - done) / (done - first[0]))} left" if done > first[0] else ""

    def line(kind: str, values: dict[str, Any]) -> None:
        end = f"  {left(values['done'])}" if "done" in values else ""
        say(("" if kind == "log" else f"{kind}: ") + "  ".join(f"{k} {_short(v)}" for k, v in values.items() if k != "done") + end)

    if not console.is_terminal:
        yield line
        return

    def table() -> Group:
        return Group(*(Columns([f"[dim]{k}[/dim] {_short(v)}" for k, v in values.items()], (0, 2)) for values in rows.values()))

    with Live(console=console, auto_refresh=False) as live:

        def show(kind: str, values: dict[str, Any]) -> None:
            if kind in ("preflight", "note"):
                line(kind, values)
                return
            done = values.get("done")
            rows[kind] = {k: v for k, v in values.items() if k != "done"} | ({"": f"{done:.1%} {left(done)}"} if done is not None else {})
            live.update(table(), refresh=True)

        yield show


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
