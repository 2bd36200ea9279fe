"""From the names in a Plan to a detector that is ready to use."""

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from depthseg import catalog, prompts, weights
from depthseg.plan import MAX_BOXES, READER, Plan
from depthseg.schema import Boxes, Image, Prompts

Source = Callable[[list[Image]], Sequence[Boxes | Prompts]]  # what to ask about each image
YOLO_BY_PREFERENCE = ("yolov8m", "yolov8n", "yolov8s", "yolov8l", "yolov8x")  # auto takes the first that is here


class Chosen(NamedTuple):
    """A detector, ready to use."""

    name: str  # its row in catalog.DETECTORS
    source: Source
    entry: catalog.Row | None  # None where the weights are the user's own
    path: Path | None  # of the weights
    notes: list[str]  # for the user


def detector(plan: Plan, device: Any, precision: str, pull: bool, progress: Callable[[int, int], None] | None = None) -> Chosen:
    """The detector that the plan means; auto is Grounding DINO for text, else YOLOv8 if it can run here, else the embedded one.

    pull: fetch missing weights first, telling `progress` (bytes done, bytes in all). Raises DepthsegError.
    """
    name, notes = _auto(plan, pull) if plan.detector == "auto" else (plan.detector, [])
    entry = catalog.row(catalog.DETECTORS, name, "detector")
    if name == "grid":
        notes = [f"prompts: a grid of {plan.points_per_side} x {plan.points_per_side} points"]
        return Chosen(name, lambda images: [prompts.grid(i.size, plan.points_per_side) for i in images], None, None, notes)
    own = plan.detector_weights
    path = Path(own) if own else weights.locate(entry, name, pull, progress)
    least = entry.confidence if plan.confidence is None else plan.confidence
    build = catalog.resolve(entry)
    faster = {"backend": plan.backend} if "backend" in inspect.signature(build).parameters else {}
    if not faster and plan.backend != "torch":
        notes = [*notes, f"detector: {name} computes in torch, whatever the backend"]
    source = build(path, device, precision, least, plan.max_boxes or MAX_BOXES, plan.wanted(), **entry.args, **faster)
    return Chosen(name, source, None if own else entry, path, notes)


def _auto(plan: Plan, pull: bool) -> tuple[str, list[str]]:
    if plan.text:
        return READER, [f"detector: {READER}"]
    installed = importlib.util.find_spec("ultralytics") is not None
    here = [name for name in YOLO_BY_PREFERENCE if catalog.find(catalog.DETECTORS[name])]
    if installed and (here or pull):
        name = (here or YOLO_BY_PREFERENCE)[0]
        return name, [f"detector: {name}"]
    install = "" if installed else "pip install ultralytics, then "
    return "nano", [f"detector: nano (embedded); for better boxes: {install}--detector {YOLO_BY_PREFERENCE[0]} --pull"]
