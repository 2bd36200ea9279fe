"""What to run, as names and numbers: the one home of every default of `segment`.

A Plan knows no file contents, no model and no device handle. The command line fills one, `run.json` records it beside every
output, and a resumed run compares its digest.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields

from depthseg.errors import DepthsegError

# Fields that change how fast a run goes or what is drawn; in predictions.json the last digits at most (sums in another order).
_SPEED_ONLY = {"device", "threads", "batch", "prompt_batch", "overlays", "depth_panel", "instances", "labelmaps"}

BACKENDS = ("torch", "openvino", "compile")
CONFIDENCE = 0.25  # of a detector that is built without a plan
MAX_BOXES = 100  # of a detector, where the plan says nothing
READER = "groundingdino-tiny"  # the detector that auto takes for text

TABLES = {1: "detector", 2: "point", 3: "box"}  # prompts of the depth paper's tables, which are EfficientViT-SAM's

REFINEMENTS = {
    "none": "the first answer",
    "amr": "a second pass with points on the rim of a broken or ragged mask, else in its middle, kept if its predicted IoU is higher",
    "amr-prose": "likewise, but a broken mask gets its points in the middle",
    "rim": "likewise, but always with points on the rim, and as not belonging to the object",
    "mirror": "the mean of the answers to the picture and to its mirror image, at twice the time",
}


@dataclass(frozen=True)
class Plan:
    """One run of `segment`. Every field is a JSON value; paths are strings."""

    model: str = "nano-depth"  # a row of catalog.MODELS
    weights: str | None = None  # a checkpoint instead of the row's own
    detector: str = "auto"  # a row of catalog.DETECTORS; auto = Grounding DINO for text, else YOLOv8 when its weights are here, else nano
    boxes: str | None = None  # COCO detection results: takes the place of the detector
    points: str | None = None  # clicks from a file: likewise
    detector_weights: str | None = None  # a checkpoint, or a folder, instead of the detector's own
    text: str | None = None  # phrases to look for, each ended by a period
    classes: str | None = None  # names, or ids, of the classes to look for, separated by commas; coco and lvis for a detector that reads
    depth: str = "auto"  # a row of catalog.DEPTHS, a folder of depth maps, or none
    device: str = "auto"  # auto = cuda when there is one, else cpu
    precision: str = "auto"  # fp32, bf16, fp16; auto = fp32 on the CPU, bf16 or fp16 on CUDA
    backend: str = "torch"  # one of BACKENDS: other orders of sums, hence other last digits
    batch: int = 4  # images in one encoder call
    prompt_batch: int = 16  # prompts in one decoder call; 4 to 16 is best on a CPU (cache and allocator)
    confidence: float | None = None  # boxes under this score are dropped; None: the detector's own limit, none of a file's
    max_boxes: int | None = None  # per image, best first; None: MAX_BOXES for a detector, all of a file's
    depth_side: int | None = None  # pixels of the shorter side of Depth Anything's input; None: 518, as it was trained
    draft: bool = False  # large JPEGs are decoded to a half, quarter or eighth of their size where no stage needs more
    threads: int | None = None  # of torch's on the CPU; None: the cores that this process may use
    zoom: bool | None = None  # masks on crops twice as large as the box or the answer to clicks; None: where that costs little (nano)
    central: bool = True  # zoom: one click lies near the middle of what is meant, as people click; False: anywhere in it
    refine: str = "none"  # a key of REFINEMENTS
    refine_rounds: int = 1  # amr, rim: passes after the first, each only for masks that the one before replaced
    refine_points: int = 2  # amr, rim: points added to the prompt ("two additional prompts", in its abstract)
    refine_below: float | None = None  # amr, rim: only masks of a lower predicted IoU; None: all
    points_per_side: int = 16  # grid: points along each side of the image
    min_predicted_iou: float | None = None  # grid; None: the model's own limit
    min_stability: float | None = None  # likewise
    nms: float = 0.7  # grid and nano boxes: masks that overlap a better one by more are dropped
    min_area: int | None = None  # masks of fewer pixels are dropped
    max_area: int | None = None  # masks of more pixels are dropped
    min_region: int = 64  # grid: holes and islands under this many pixels are filled or dropped
    overlays: bool = True
    labelmaps: bool = True
    depth_panel: bool = False  # the depth map beside the overlay
    instances: bool = False  # one PNG for each mask

    def __post_init__(self) -> None:
        if self.min_area is not None and self.max_area is not None and self.min_area > self.max_area:
            raise DepthsegError(f"no mask has {self.min_area} pixels or more and {self.max_area} or fewer", "Change one of them.")
        if self.refine not in REFINEMENTS:
            raise DepthsegError(f"no refinement is called '{self.refine}'", f"Use one of {', '.join(REFINEMENTS)}.")
        if self.refine_rounds < 1 or self.refine_points < 1:
            raise DepthsegError("a refinement has one round and one point at least", "Use --refine none to have none.")
        limits = ("refine_rounds", "refine_points", "refine_below")
        if self.refine in ("none", "mirror") and any(getattr(self, name) != getattr(Plan, name) for name in limits):
            raise DepthsegError(f"the refinement {self.refine} has no second pass with rounds, points or limits", "Add --refine amr.")
        if self.boxes and self.points:
            raise DepthsegError("boxes and points are both given", "Give one of them.")
        for name, given in (("text", self.text), ("classes", self.classes)):
            if given is not None and not self.wanted():
                raise DepthsegError(f"{name} names nothing to look for", "Write it like 'a cat . a dog .' or cat,dog, or leave it out.")
        if self.text and self.classes:
            raise DepthsegError("text and classes are both given", "Give one of them.")
        if (self.boxes or self.points) and (self.text or self.classes or self.detector_weights):
            raise DepthsegError("boxes or points leave the detector nothing to do", "Leave text, classes and detector weights out.")
        if self.detector == "grid" and (self.text or self.classes or self.detector_weights):
            raise DepthsegError("the grid looks for no classes and has no weights", "Leave text, classes and detector weights out.")
        if self.detector == "auto" and self.detector_weights:
            raise DepthsegError("detector weights were given without a detector", "Name it too, like --detector yolov8m.")

    def wanted(self) -> list[str]:
        """The phrases of `text`, or the names of `classes`."""
        mark, given = (",", self.classes or "") if self.text is None else (".", self.text)
        return [name for part in given.split(mark) if (name := part.strip())]

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict) -> "Plan":
        """The Plan of a dict as `to_json` gave it. Unknown keys are refused."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise DepthsegError(f"unknown option in the plan: {', '.join(sorted(unknown))}")
        return cls(**values)

    def decisive(self) -> dict:
        """The fields that decide the masks: a run may go on in a folder only if these are unchanged."""
        return {k: v for k, v in asdict(self).items() if k not in _SPEED_ONLY}

    def digest(self) -> str:
        """Twelve hex digits that name the decisive fields."""
        return hashlib.sha256(json.dumps(self.decisive(), sort_keys=True).encode()).hexdigest()[:12]
