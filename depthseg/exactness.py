"""How far a choice of backend and precision is from the network as it was loaded, computed by torch in fp32.

Beside a speed stands what it costs in exactness: how the features and, in the end, the masks differ.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from depthseg import catalog, masks
from depthseg.plan import Plan
from depthseg.schema import Array, Image, Prompts
from depthseg.segment import Segmenter
from depthseg.views import View


@dataclass(frozen=True)
class Exactness:
    """What `exactness` finds of one plan."""

    features: float  # largest relative difference of an image's features, in the L2 norm
    iou: Array  # (masks,) with the masks of the plain network
    seconds: tuple[float, float]  # of the process' CPU time for all images, plain and as planned, a first image apart


def exactness(plan: Plan, images: Sequence[Image], asked: Sequence[Prompts]) -> Exactness:
    """Compare the plan's network, and its depth, with the plain one on images (with pixels) and the prompts of each.

    The two take turns. Raises DepthsegError where the plan cannot run here.
    """
    plain = replace(plan, backend="torch", precision="fp32")
    network = catalog.load(plan.model, plan.weights)
    sides = [Segmenter(plain, network=network, source=_none), Segmenter(plan, source=_none)]
    warm = (images[:1], asked[:1])
    features, ious, seconds = [], [], np.zeros(2)
    for first, (some, prompts) in ((True, warm), *((False, ([i], [p])) for i, p in zip(images, asked))):
        answers, encoded = [], []
        for k, side in enumerate(sides):
            start = time.process_time()
            views = [View(np.asarray(i.pixels), d, i.size) for i, d in zip(some, side.depths(list(some)))]
            encoded.append(side.encode(views, side.network.side).features)
            answers.append(side.masks_for(views, prompts)[0])
            if not first:
                seconds[k] += time.process_time() - start
        exact, other = ([f.float() for f in own] for own in encoded)
        features.append(max(float((a - b).norm() / a.norm()) for a, b in zip(exact, other)))
        if not first:
            ious += [masks.iou([a.rle], [b.rle])[0, 0] if masks.area([a.rle, b.rle]).any() else 1.0 for a, b in zip(*answers)]
    return Exactness(max(features), np.array(ious), (float(seconds[0]), float(seconds[1])))


def _none(images: list[Image]) -> list[Prompts]:
    return []
