"""What a run costs: parameters and multiply-adds, counted without computing anything, and the time of each stage, measured.

Counting builds networks on torch's `meta` device, where a forward pass only tracks shapes, and needs no weights. `stages` times a
detector and all that follows on one's own pictures; `cases` times everything from a picture's bytes to RLE for given sizes and numbers
of boxes, in turns with whatever else does the same work, and compares the masks.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageDraw, ImageOps
from torch.utils.flop_counter import FlopCounterMode

from depthseg import catalog, masks, weights
from depthseg.data import Failure, Unreadable, read
from depthseg.depth import Cached, DepthAnything
from depthseg.errors import DepthsegError
from depthseg.numerics import PRECISIONS
from depthseg.plan import Plan
from depthseg.reference import in_things
from depthseg.schema import Array, Boxes, Depth, Image
from depthseg.segment import Segmenter


def measure(name: str) -> dict[str, int]:
    """`params` of the whole network called `name`, and `macs`: multiply-adds of encoding one image at the native input."""
    entry = catalog.row(catalog.MODELS, name, "model")
    with torch.device("meta"), torch.no_grad():
        network = catalog.resolve(entry)(**entry.args).eval().to("meta")
        picture = torch.empty(1, 3, entry.input, entry.input)
        with FlopCounterMode(display=False) as counter:
            network.encode(picture, picture if network.alpha is not None else None)
    return {"params": sum(p.numel() for p in network.parameters()), "macs": counter.get_total_flops() // 2}


class Timing(NamedTuple):
    """What `stages` measures."""

    notes: list[str]  # what ran, for the user
    alone: dict[str, float]  # stage -> median seconds for an image, images one by one
    batched: dict[str, float]  # likewise by batch
    pixels: float | None  # largest difference of a box between the two, None where no detector gives boxes
    boxes: int  # that were compared


def stages(
    whole: Segmenter, images: list[Image], rounds: int = 3, progress: Callable[[int, int], None] = lambda done, total: None
) -> Timing:
    """Time the stages over the images, one by one and in batches as the plan says, in turns; a first round is not counted.

    The detector's boxes of the two ways are compared. Raises DepthsegError for an image that cannot be used.
    """
    try:
        images = [read(image) for image in images]
    except Unreadable as error:
        raise DepthsegError(f"an image cannot be read ({error})", "Leave it out.") from error
    if isinstance(whole.depth, Cached):
        whole.depth = whole.depth.depth  # the estimator itself, not what it said before
    single = Segmenter(replace(whole.plan, batch=1), network=whole.network, source=whole.source, depth=whole.depth)
    single.detector, single.zoom = whole.detector, whole.zoom
    seconds: dict[int, list[dict[str, float]]] = {id(single): [], id(whole): []}
    for turn in range(rounds + 1):
        for k, segmenter in enumerate((single, whole)):
            for record in segmenter.segment(images):
                if isinstance(record, Failure):
                    raise DepthsegError(f"{record.image.key} cannot be used ({record.reason})", "Leave it out.")
                if turn:
                    seconds[id(segmenter)].append(record.seconds)
            progress(2 * turn + k + 1, 2 * (rounds + 1))
    names = dict.fromkeys(s for rows in seconds.values() for r in rows for s in r)  # an image without prompts skips some
    alone, batched = ({s: median(r.get(s, 0.0) for r in rows) for s in names} for rows in seconds.values())
    one_by_one = [whole.source([image])[0] for image in images]
    together = [b for i in range(0, len(images), whole.plan.batch) for b in whole.source(images[i : i + whole.plan.batch])]
    pairs = [(a, b) for a, b in zip(one_by_one, together, strict=True) if isinstance(a, Boxes) and isinstance(b, Boxes)]
    if any(len(a) != len(b) for a, b in pairs):
        return Timing(whole.notes, alone, batched, float("inf"), sum(len(a) for a, _ in pairs))
    apart = [float(np.abs(a.xyxy - b.xyxy).max()) for a, b in pairs if len(a)]
    return Timing(whole.notes, alone, batched, max(apart, default=0.0) if pairs else None, sum(len(a) for a, _ in pairs))


# ---- from bytes to masks ----

Other = Callable[[bytes, Array], list[dict]]  # a picture's bytes and boxes (N, 4) -> RLE for each box
PATIENCE = 3.0  # seconds for a peak: a CPU without bf16 takes seconds for one product of it
MODEL_STAGES = ("depth", "encode", "decode")  # of Record.seconds: what the networks take


class Photo(NamedTuple):
    """A picture on the disk, its bytes, and boxes (N, 4) on it, xyxy."""

    image: Image
    jpeg: bytes
    boxes: Array


def photographs(size: tuple[int, int], count: int, boxes: int, folder: Path, own: Sequence[Image] = ()) -> list[Photo]:
    """`count` JPEGs of `size` (h, w) in `folder`, with `boxes` boxes each, equal in every run.

    Boxes are between 4 and 50 percent as long as the picture, as objects of COCO are, and lie anywhere. A picture shows noise at all
    scales, as a photograph does, and an ellipse in each box; or it is one of `own`, cut and scaled. Raises DepthsegError for one of
    those that cannot be read.
    """
    (h, w), out = size, []
    for k in range(count):
        g = np.random.default_rng(k)
        sides = np.exp(g.uniform(np.log(0.04), np.log(0.5), (boxes, 2))) * (w, h)
        corner = g.uniform(0, 1, (boxes, 2)) * ((w, h) - sides)
        xyxy = np.concatenate([corner, corner + sides], 1).astype(np.float32)
        if own:
            try:
                picture = ImageOps.fit(PILImage.fromarray(np.asarray(read(own[k % len(own)]).pixels)), (w, h))
            except Unreadable as error:
                raise DepthsegError(f"{own[k % len(own)].key} cannot be read ({error})", "Leave it out.") from error
        else:
            picture = _picture(size, xyxy[:10], g)
        written = BytesIO()
        picture.save(written, "JPEG", quality=90)
        path = folder / f"{w}x{h}-{k}.jpg"
        path.write_bytes(written.getvalue())
        out.append(Photo(Image(path.name, k, path, (0, 0)), written.getvalue(), xyxy))
    return out


def _picture(size: tuple[int, int], boxes: Array, g: np.random.Generator) -> PILImage.Image:
    h, w = size
    ground = np.zeros((h, w, 3), np.float32)
    for cells in (4, 16, 64, 256):  # each octave pair half as strong
        noise = PILImage.fromarray(g.integers(0, 256, (max(1, cells * h // w), cells, 3), dtype=np.uint8))
        ground += np.asarray(noise.resize((w, h), PILImage.Resampling.BICUBIC), np.float32) * (2 / cells**0.5)
    picture = PILImage.fromarray((ground * (255 / ground.max())).astype(np.uint8))
    things = picture.copy()
    draw = ImageDraw.Draw(things)
    for box in boxes:
        draw.ellipse(box.tolist(), fill=tuple(g.integers(0, 256, 3).tolist()))
    return PILImage.blend(picture, things, 0.6)


def network_for(plan: Plan, pull: bool, progress: Callable[[int, int], None] | None = None) -> tuple[Any, bool]:
    """The network of the plan on the CPU, and whether its weights are random because none are here. Raises DepthsegError."""
    entry = catalog.row(catalog.MODELS, plan.model, "model")
    if plan.weights or pull or weights.find(entry):
        path = Path(plan.weights) if plan.weights else weights.locate(entry, plan.model, pull, progress)
        return catalog.load(plan.model, path).requires_grad_(False), False
    torch.manual_seed(0)
    return in_things(catalog.resolve(entry)(**entry.args).eval().requires_grad_(False)), True


def random_depth(name: str, folder: Path, device: Any, precision: str, backend: str = "torch", side: int | None = None) -> Depth:
    """Depth Anything Small with random weights, which are laid into `folder`. Raises DepthsegError for another estimator."""
    entry = catalog.row(catalog.DEPTHS, name, "depth estimator")
    if not name.endswith("-small") or not entry.hub:
        raise catalog.missing(f"the weights of {name} are not on this machine", "depth")
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation

    DepthAnythingForDepthEstimation(DepthAnythingConfig()).save_pretrained(folder)  # the defaults are Small
    estimator = DepthAnything(folder, device, precision, backend)
    estimator.side = side
    return estimator


def clock() -> Array:
    """Seconds of wall and of process-CPU time."""
    return np.array([time.perf_counter(), time.process_time()])


def counts_in(device: Any) -> int:
    """Which of `clock`'s seconds tell what work costs: wall on a card, whose work takes no CPU, process-CPU elsewhere."""
    return 0 if torch.device(device).type == "cuda" else 1


def cases(
    ours: dict[str, Segmenter],
    others: dict[str, Other],
    sizes: Sequence[tuple[int, int]],
    counts: Sequence[int],
    folder: Path,
    images: int = 2,
    rounds: int = 3,
    own: Sequence[Image] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict]:
    """What each size (h, w) with each number of boxes costs: a row of JSON values for each of `ours`, by name of its depth.

    Pictures are as `photographs` makes them in `folder`. All sides take turns on the same pictures and boxes; before the first turn at
    a size each is asked for one box. Seconds are medians over the turns for one image, [wall, process CPU]. Ratios are of process-CPU
    time (on a card of wall time) within one turn, [min, median, max], above 1 where ours is faster; `miou` is the mean IoU of the masks
    of both.
    """
    rows: list[dict] = []
    total = len(sizes) * len(counts) * rounds
    for size in sizes:
        photos = photographs(size, images, max(counts), folder, own)
        work: dict[str, dict[str, float]] = {}
        for name, segmenter in ours.items():
            work[name] = _operations(segmenter, photos[0])
        for other in others.values():
            other(photos[0].jpeg, photos[0].boxes[:1])
        for count in counts:
            turns: dict[str, list[Array]] = {name: [] for name in (*ours, *others)}
            stages: dict[str, list[dict[str, Array]]] = {name: [] for name in ours}
            found: dict[str, list[list[dict]]] = {}
            for segmenter in ours.values():
                if (
                    segmenter.plan.backend == "compile"
                ):  # it compiles at the first call of a shape, and nothing while operations are counted
                    _ours(segmenter, photos, count)
            for _ in range(rounds):
                for name in turns:
                    start = clock()
                    if name in ours:
                        found[name], spent = _ours(ours[name], photos, count)
                        stages[name].append(spent)
                    else:
                        found[name] = [others[name](p.jpeg, p.boxes[:count]) for p in photos]
                    turns[name].append((clock() - start) / len(photos))
                progress(len(rows) // len(ours) * rounds + len(turns[name]), total)
            for name in ours:
                row = {"size": f"{size[1]}x{size[0]}", "boxes": count, "depth": name, **_medians(turns[name], stages[name])}
                row["operations"] = {"encode": work[name]["encode"], "decode": work[name]["decode"] * count}
                which = counts_in(ours[name].device)
                row["against"] = {o: _against(turns[o], turns[name], found[o], found[name], which) for o in others}
                rows.append(row)
    return rows


def _ours(segmenter: Segmenter, photos: Sequence[Photo], count: int) -> tuple[list[list[dict]], dict[str, Array]]:
    """RLE for each of the first `count` boxes of each photo, and the time of each stage for an image."""
    boxes = {p.image.key: Boxes(p.boxes[:count], np.ones(count, np.float32), np.ones(count, np.int64)) for p in photos}
    segmenter.source = lambda images: [boxes[image.key] for image in images]
    segmenter.detector = "file"  # as if they came from one
    segmenter.clock = clock
    out: list[list[dict]] = []
    seconds: dict[str, Array] = {}
    for record in segmenter.segment([p.image for p in photos]):
        if isinstance(record, Failure):
            raise DepthsegError(f"{record.image.key} cannot be used ({record.reason})", "Leave it out.")
        by_prompt = dict(zip(np.asarray(record.masks.prompt).tolist(), record.masks.rle))
        nothing = masks.encode(np.zeros(record.image.size, bool))
        out.append([by_prompt.get(k, nothing) for k in range(count)])  # an empty mask is no instance
        for stage, spent in record.seconds.items():
            seconds[stage] = seconds.get(stage, np.zeros(2)) + np.asarray(spent) / len(photos)
    return out, seconds


def _operations(segmenter: Segmenter, photo: Photo) -> dict[str, float]:
    """Floating-point operations, two for each multiply-add, of encoding a photo and of decoding a box, as they are done here.

    0 where they are not done by torch. Zoomed encoders look at each box.
    """
    network, counted = segmenter.network, dict.fromkeys(("encode", "decode"), 0.0)

    def counting(stage: str, call: Callable) -> Callable:
        def counts(*given: Any, **named: Any) -> Any:
            with FlopCounterMode(display=False) as counter:
                answer = call(*given, **named)
            counted[stage] += counter.get_total_flops()
            return answer

        return counts

    before = {stage: network.__dict__.get(stage) for stage in counted}
    try:
        for stage in counted:
            setattr(network, stage, counting(stage, getattr(network, stage)))
        _ours(segmenter, [photo], 1)
    finally:
        for stage, own in before.items():
            with suppress(AttributeError):
                delattr(network, stage)
            if own is not None:
                setattr(network, stage, own)
    return counted


def _medians(turns: list[Array], stages: list[dict[str, Array]]) -> dict[str, Any]:
    def middle(values: list[Array]) -> list[float]:
        return [round(float(v), 6) for v in np.median(values, 0)]

    by_stage = {name: middle([s.get(name, np.zeros(2)) for s in stages]) for name in stages[0]}
    model = [round(sum(by_stage[s][k] for s in MODEL_STAGES if s in by_stage), 6) for k in (0, 1)]
    return {"seconds": middle(turns), "model": model, "stages": by_stage}


def _against(
    theirs: list[Array], ours: list[Array], their_masks: list[list[dict]], our_masks: list[list[dict]], which: int
) -> dict[str, Any]:
    ratios = [float(a[which] / b[which]) for a, b in zip(theirs, ours)]
    pairs = [(a, b) for x, y in zip(their_masks, our_masks) for a, b in zip(x, y)]
    ious = [1.0 if a == b else float(masks.iou([a], [b])[0, 0]) for a, b in pairs]
    spread = [round(v, 3) for v in (min(ratios), median(ratios), max(ratios))]
    return {**_medians(theirs, [{}]), "ratio": spread, "miou": round(float(np.mean(ious)), 6)}


# ---- what the machine can do ----


def peaks(device: torch.device, precision: str, repeats: int = 10) -> dict[str, float]:
    """The best rates of a matrix product and of a 3 x 3 convolution that torch reaches here, in operations a second.

    On a CPU in process-CPU seconds, so that the rate is that of one core whatever the number of threads; on CUDA in wall seconds.
    """
    dtype = PRECISIONS[precision]

    def rate(operations: float, call: Callable[[], Any]) -> float:
        spent: list[float] = []
        while len(spent) <= repeats and sum(spent) < PATIENCE:
            start = clock()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            spent.append(float((clock() - start)[0 if device.type == "cuda" else 1]))
        return operations / min(spent)

    size, c, side = (8192, 256, 512) if device.type == "cuda" else (1024, 256, 64)
    with torch.inference_mode():
        a = torch.randn(size, size, device=device, dtype=dtype)
        x = torch.randn(1, c, side, side, device=device, dtype=dtype).to(memory_format=torch.channels_last)
        conv = torch.nn.Conv2d(c, c, 3, padding=1, bias=False, device=device, dtype=dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return {
            "matrix product": rate(2 * size**3, lambda: a @ a),
            "convolution": rate(2 * 9 * (c * side) ** 2, lambda: conv(x)),
        }
