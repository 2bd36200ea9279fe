"""Scores of masks against the truth: functions of RLE lists and arrays that return numbers.

Knows no data set, no model and no report. Percentages unless a docstring says otherwise; None where nothing was there to measure.
"""

import math
from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco
from scipy.ndimage import maximum_filter, minimum_filter

from depthseg import masks

Array = np.ndarray

SMALL, LARGE = 32**2, 96**2  # COCO's bounds of area in pixels


def mask_iou(truth: Sequence[dict], predicted: Sequence[dict]) -> Array:
    """IoU of each pair of masks as a fraction, float64 (N,): intersection / (union + 1e-7), so two empty masks score 0."""
    if len(truth) != len(predicted) or any(t["size"] != p["size"] for t, p in zip(truth, predicted)):
        raise ValueError("masks do not come in pairs of one size")
    both = masks.area([coco.merge([t, p], intersect=True) for t, p in zip(truth, predicted)])
    return both / (masks.area(truth) + masks.area(predicted) - both + 1e-7)  # EfficientViT-SAM's evaluation


def miou(ious: Array, areas: Array, shared: bool = True) -> dict[str, float | None]:
    """Plain mean of IoUs (N,) (fractions) over annotations, all and by the annotation's area (N,), in percent.

    shared: an area exactly on a bound counts on both sides, as in EfficientViT-SAM's evaluation; otherwise above it only.
    """
    ious, areas = np.asarray(ious, float), np.asarray(areas, float)
    bins = {
        "miou": np.ones(len(areas), bool),
        "miou_small": areas <= SMALL if shared else areas < SMALL,
        "miou_medium": (areas >= SMALL) & (areas <= LARGE if shared else areas < LARGE),
        "miou_large": areas >= LARGE,
    }
    return {name: float(100 * ious[chosen].mean()) if chosen.any() else None for name, chosen in bins.items()}


def boundary_iou(truth: Sequence[dict], predicted: Sequence[dict], ratio: float = 0.02) -> Array:
    """IoU of the inner rims of each pair of masks as a fraction, float64 (N,) (Cheng et al. 2021, Boundary IoU); 0 for empty masks.

    The rim is what erosion by a 3 x 3 square takes away, repeated for `ratio` of the image's diagonal; outside the image is background.
    """
    out = np.zeros(len(truth))
    for i, (t, p) in enumerate(zip(truth, predicted, strict=True)):
        h, w = t["size"]
        steps = max(1, round(ratio * math.hypot(h, w)))
        both = masks.boxes([t, p])  # an empty mask has zeros: a larger window, no error
        (x0, y0), (x1, y1) = both[:, :2].min(0).astype(int), both[:, 2:].max(0).astype(int)
        a, b = (_rim(masks.decode(m)[y0:y1, x0:x1], steps) for m in (t, p))
        out[i] = int(np.count_nonzero(a & b)) / max(1, int(np.count_nonzero(a | b)))
    return out


def _rim(mask: Array, steps: int) -> Array:
    """The pixels of a bool mask within `steps` of the background in the chessboard's distance; around the window is background."""
    mask = np.ascontiguousarray(mask)
    eroded = minimum_filter(mask.view(np.uint8), 2 * steps + 1, mode="constant", cval=0)
    return mask & ~eroded.view(bool)


def depth_contrast(mask: Array, depth: Array, steps: int = 2) -> float | None:
    """How far depth (h', w') in 0..1 jumps at the boundary of a bool mask (h, w): the difference of the medians of two thin rims.

    The mask is sampled at the depth map's resolution, where a rim is `steps` pixels wide; None if one of the two is empty.
    """
    (h, w), (dh, dw) = mask.shape, depth.shape
    small = mask[((np.arange(dh) + 0.5) * h / dh).astype(int)][:, ((np.arange(dw) + 0.5) * w / dw).astype(int)]
    rows, columns = np.flatnonzero(small.any(1)), np.flatnonzero(small.any(0))
    if not len(rows):
        return None
    top, left = max(0, rows[0] - steps), max(0, columns[0] - steps)
    window = np.s_[top : rows[-1] + 1 + steps, left : columns[-1] + 1 + steps]
    piece, near = np.ascontiguousarray(small[window]), depth[window]
    inner = _rim(piece, steps)
    outer = ~piece & maximum_filter(piece.view(np.uint8), 2 * steps + 1, mode="constant", cval=0).view(bool)
    return abs(float(np.median(near[inner]) - np.median(near[outer]))) if inner.any() and outer.any() else None


def depth_errors(inverse: Array, truth: Array) -> tuple[float, float]:
    """AbsRel and delta1 (share within a factor of 1.25) of a relative inverse depth against metric depth, both (h, w).

    Scale and shift are fitted by least squares in inverse depth, as for all relative estimators (Ranftl et al. 2020). Holes of the
    truth are 0. A fit that would place a pixel behind infinity puts it at 1.5 times the farthest true depth.
    """
    valid = truth > 0
    x, y = inverse[valid].astype(np.float64), 1 / truth[valid].astype(np.float64)
    (scale, shift), *_ = np.linalg.lstsq(np.stack([x, np.ones_like(x)], 1), y, rcond=None)
    predicted, true = 1 / np.maximum(scale * x + shift, y.min() / 1.5), 1 / y
    ratio = np.maximum(predicted / true, true / predicted)
    return float((np.abs(predicted - true) / true).mean()), float((ratio < 1.25).mean())
