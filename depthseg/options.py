"""Options that more than one command has or that say where prompts come from, and what can be checked about them at once.

Standard library, Typer and ground modules only: nothing here waits for torch.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from depthseg import catalog
from depthseg.errors import DepthsegError
from depthseg.plan import MAX_BOXES, READER, REFINEMENTS, Plan
from depthseg.terminal import say

# help panels
INPUT, PROMPTS, DEPTH, MODEL, OUTPUT, RUN = (
    "Input",
    "Prompts and detector",
    "Depth",
    "Model and device",
    "Output",
    "Run control",
)

ModelName = Annotated[
    str,
    typer.Option(
        help=f"One of {', '.join(catalog.MODELS)}.",
        rich_help_panel=MODEL,
        autocompletion=lambda: list(catalog.MODELS),
        metavar="NAME",
    ),
]
Weights = Annotated[str | None, typer.Option(help="A checkpoint instead of the model's own.", rich_help_panel=MODEL, metavar="PATH")]
DepthName = Annotated[
    str,
    typer.Option(
        help=f"auto (Depth Anything V2 Small when it is here, else nano), {', '.join(catalog.DEPTHS)}, none, "
        "or the PATH of a folder of depth maps.",
        rich_help_panel=DEPTH,
        autocompletion=lambda: ["auto", "none", *catalog.DEPTHS],
        metavar="NAME|PATH",
    ),
]
DepthSide = Annotated[
    int | None,
    typer.Option(
        min=14,
        help="Pixels of the shorter side of Depth Anything's input: 392 takes half the time of its own 518.",
        rich_help_panel=DEPTH,
        show_default=False,
        metavar="PIXELS",
    ),
]
DetectorName = Annotated[
    str,
    typer.Option(
        help="Where boxes come from: auto (Grounding DINO for --text, else YOLOv8 when its weights are here, else nano), "
        f"{', '.join(catalog.DETECTORS)}.",
        rich_help_panel=PROMPTS,
        autocompletion=lambda: ["auto", *catalog.DETECTORS],
        metavar="NAME",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.", rich_help_panel=MODEL)]
Precision = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    typer.Option(help="auto is fp32 on the CPU, bf16 or fp16 on CUDA.", rich_help_panel=MODEL),
]
Backend = Annotated[
    Literal["torch", "openvino", "compile"],
    typer.Option(
        help="What computes encoders, depth and detectors but YOLO and Grounding DINO: torch, OpenVINO (an extra, CPU only), or torch's "
        "compiler.",
        rich_help_panel=MODEL,
    ),
]
Confidence = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Drop boxes under this score; without it, 0.25 for a detector (0.3 for nano) and no box of --boxes.",
        rich_help_panel=PROMPTS,
        show_default=False,
    ),
]
MaxBoxes = Annotated[
    int | None,
    typer.Option(
        min=1,
        help=f"Boxes of one image, best first; without it, {MAX_BOXES} for a detector and all of --boxes.",
        rich_help_panel=PROMPTS,
        show_default=False,
    ),
]
Boxes = Annotated[
    str | None,
    typer.Option(help="COCO detection results (JSON) instead of a detector.", rich_help_panel=PROMPTS, metavar="FILE"),
]
ImagesJson = Annotated[
    Path | None,
    typer.Option(help="COCO images file that gives the names to --boxes' image_id.", rich_help_panel=PROMPTS, metavar="FILE"),
]
Points = Annotated[str | None, typer.Option(help="Clicks from a file instead of a detector.", rich_help_panel=PROMPTS, metavar="FILE")]
DetectorWeights = Annotated[
    str | None,
    typer.Option(help="A checkpoint, or a folder, instead of the detector's own.", rich_help_panel=PROMPTS, metavar="PATH"),
]
Text = Annotated[
    str | None,
    typer.Option(help='What to look for, for a detector that reads: "a cat . a dog ."', rich_help_panel=PROMPTS, metavar="PHRASES"),
]
Classes = Annotated[
    str | None,
    typer.Option(
        help="Only these classes of the detector, by name or id, separated by commas; coco or lvis for one that reads.",
        rich_help_panel=PROMPTS,
        metavar="NAMES",
    ),
]
PointsPerSide = Annotated[int, typer.Option(min=1, help="grid: points along each side.", rich_help_panel=PROMPTS)]
MinPredictedIou = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="grid: drop masks under this predicted IoU, instead of the model's limit.", rich_help_panel=PROMPTS),
]
MinStability = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="grid: drop masks under this stability, instead of the model's limit.", rich_help_panel=PROMPTS),
]
Nms = Annotated[
    float,
    typer.Option(min=0, max=1, help="grid, nano: drop masks that overlap a better one by more (IoU).", rich_help_panel=PROMPTS),
]
MinArea = Annotated[
    int | None, typer.Option(min=1, help="Drop masks of fewer pixels.", rich_help_panel=OUTPUT, show_default=False, metavar="PIXELS")
]
MaxArea = Annotated[
    int | None, typer.Option(min=1, help="Drop masks of more pixels.", rich_help_panel=OUTPUT, show_default=False, metavar="PIXELS")
]
Only = Annotated[
    list[str] | None, typer.Option(help="Only the image of this key; repeatable.", rich_help_panel=INPUT, metavar="KEY", show_default=False)
]
Keys = Annotated[Path | None, typer.Option(help="Only the images of this list, a key in each line.", rich_help_panel=INPUT, metavar="FILE")]
Shard = Annotated[
    str | None,
    typer.Option(help="i/n: only every n-th image from the i-th on, for n runs side by side.", rich_help_panel=INPUT, metavar="I/N"),
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Only the first so many images.", rich_help_panel=INPUT, metavar="N", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else.", rich_help_panel=OUTPUT)]
MinRegion = Annotated[
    int, typer.Option(min=0, help="grid: fill holes and drop islands smaller than this, in pixels.", rich_help_panel=PROMPTS)
]
Zoom = Annotated[
    bool | None,
    typer.Option(
        "--zoom/--no-zoom",
        help="Look at every box, and at the answer to clicks, on a crop of its own: better on small objects. Without either: nano does, "
        "the large models do not.",
        rich_help_panel=PROMPTS,
    ),
]
Central = Annotated[
    bool,
    typer.Option(
        "--central/--anywhere",
        help="zoom: one click lies near the middle of what is meant, as people click, or anywhere in it.",
        rich_help_panel=PROMPTS,
    ),
]
Refine = Annotated[
    str,
    typer.Option(
        help=f"A better mask at more time: {'; '.join(f'{name}: {what}' for name, what in REFINEMENTS.items())}.",
        rich_help_panel=PROMPTS,
        autocompletion=lambda: list(REFINEMENTS),
        metavar="NAME",
    ),
]
RefineRounds = Annotated[
    int,
    typer.Option(min=1, help="amr, rim: further passes, each for masks that the last one replaced.", rich_help_panel=PROMPTS),
]
RefinePoints = Annotated[int, typer.Option(min=1, help="amr, rim: points added to a prompt.", rich_help_panel=PROMPTS)]
RefineBelow = Annotated[
    float | None,
    typer.Option(
        min=0, max=1, help="amr, rim: only masks of a lower predicted IoU; without it, all.", rich_help_panel=PROMPTS, show_default=False
    ),
]
Batch = Annotated[int, typer.Option(min=1, help="Images in one call of the encoder.", rich_help_panel=MODEL)]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Threads of torch on the CPU: 1 where others work on this machine too; by default the cores that this process may use.",
        rich_help_panel=MODEL,
        show_default=False,
    ),
]
Draft = Annotated[
    bool,
    typer.Option(help="Decode large JPEGs to fewer pixels where no stage needs them; masks keep the full size.", rich_help_panel=INPUT),
]
Pull = Annotated[bool, typer.Option("--pull", help="Fetch missing weights first; a run uses no network otherwise.", rich_help_panel=RUN)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=RUN)]


def check_names(plan: Plan) -> None:
    """Refuse unknown names."""
    catalog.row(catalog.MODELS, plan.model, "model")
    if plan.detector != "auto":
        catalog.row(catalog.DETECTORS, plan.detector, "detector")
    if plan.depth not in ("auto", "none") and not Path(plan.depth).exists():
        catalog.row(catalog.DEPTHS, plan.depth, "depth estimator, file or folder")


def check_files(plan: Plan, images_json: Path | None, pull: bool) -> None:
    """Refuse files that are not there, and, without `pull`, names whose weights are not."""
    for option, path in (("weights", plan.weights), ("boxes", plan.boxes), ("points", plan.points), ("images-json", images_json)):
        folder = option == "weights" and catalog.MODELS[plan.model].folder
        if path and not (Path(path).is_file() or (folder and Path(path).is_dir())):
            raise DepthsegError(f"no such file{' or folder' if folder else ''}: {path}", f"Check --{option}.")
    wanted = {} if plan.weights else {plan.model: catalog.MODELS[plan.model]}
    if plan.depth in catalog.DEPTHS:
        wanted[plan.depth] = catalog.DEPTHS[plan.depth]
    _check_weights(wanted, pull)
    if not (plan.boxes or plan.points):
        check_detector(plan, pull)


def check_detector(plan: Plan, pull: bool) -> None:
    """Likewise for the detector alone, and classes that it is known not to have."""
    name = READER if plan.text and plan.detector == "auto" else plan.detector
    entry = catalog.DETECTORS.get(name)
    if entry and entry.reads and not plan.wanted():
        raise catalog.wordless()
    if own := plan.detector_weights:
        if not Path(own).exists():
            raise DepthsegError(f"no such file or folder: {own}", "Check --detector-weights.")
        if entry and Path(own).is_dir() is bool(entry.file):
            wanted = "a file" if entry.file else "a folder, with a config.json in it"
            raise DepthsegError(f"the weights of {name} are {wanted}, and {own} is none", "Check --detector-weights.")
    elif entry:
        if plan.classes and entry.classes:
            from depthseg.detect import classes

            classes.choose(plan.wanted(), classes.COCO if entry.classes == "coco" else classes.lvis(), name)
        _check_weights({name: entry}, pull)


def _check_weights(wanted: dict[str, catalog.Row], pull: bool) -> None:
    from depthseg import weights

    for name, entry in wanted.items():
        if (entry.file or entry.hub) and not pull:
            weights.locate(entry, name, fetch=False)


def estimator(choice: str, device: str, precision: str, pull: bool, backend: str = Plan.backend) -> Any:
    """The depth estimator that works alone, announced with its terms."""
    from depthseg.depth import depth_estimator
    from depthseg.numerics import device_of, precision_of, set_up

    where = device_of(device)
    numbers = precision_of(precision, where)
    set_up(where, numbers)
    chosen = depth_estimator(choice, where, numbers, pull, backend)
    for note in (chosen.note, *catalog.terms({f"depth {chosen.name}": catalog.DEPTHS[chosen.name]})):
        say(note)
    return chosen
