"""Options that more than one command has, declared once. Standard library, Typer and the table of names only."""

from typing import Annotated, Literal

import typer

from depthseg import catalog

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
DetectorName = Annotated[
    str,
    typer.Option(
        help=f"Where boxes come from: auto (YOLOv8 when its weights are here, else nano), {', '.join(catalog.DETECTORS)}.",
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
Confidence = Annotated[float, typer.Option(min=0, max=1, help="Drop boxes under this detector score.", rich_help_panel=PROMPTS)]
Zoom = Annotated[
    bool,
    typer.Option(help="Decode every box on a crop of its own: slower, better on small objects.", rich_help_panel=PROMPTS),
]
Batch = Annotated[int, typer.Option(min=1, help="Images in one call of the encoder.", rich_help_panel=MODEL)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", rich_help_panel=RUN)]
