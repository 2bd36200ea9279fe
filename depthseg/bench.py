"""What a run costs: parameters and multiply-adds, counted without computing anything, and the time of each stage, measured.

Counting builds networks on torch's `meta` device, where a forward pass only tracks shapes, and needs no weights.
"""

from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from depthseg import catalog
from depthseg.data import Failure, Unreadable, read
from depthseg.depth import Cached
from depthseg.errors import DepthsegError
from depthseg.schema import Boxes, Image
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
