"""Scores of masks against the truth: functions of RLE lists and arrays that return numbers.

Knows no data set, no model and no report. Percentages unless a docstring says otherwise; None where nothing was there to measure.
"""

import contextlib
import io
from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from depthseg import masks

Array = np.ndarray

SMALL, LARGE = 32**2, 96**2  # COCO's bounds of area in pixels


def mask_iou(truth: Sequence[dict], predicted: Sequence[dict]) -> Array:
    """IoU of each pair of masks as a fraction, float64 (N,): intersection / (union + 1e-7), so two empty masks score 0."""
    if len(truth) != len(predicted) or any(t["size"] != p["size"] for t, p in zip(truth, predicted)):
        raise ValueError("masks do not come in pairs of one size")
    both = masks.area([coco.merge([t, p], intersect=True) for t, p in zip(truth, predicted)])
    return both / (masks.area(truth) + masks.area(predicted) - both + 1e-7)  # EfficientViT-SAM's evaluation


def miou(ious: Array, areas: Array) -> dict[str, float | None]:
    """Plain mean of IoUs (N,) (fractions) over annotations, all and by the annotation's area (N,), in percent.

    EfficientViT-SAM's bins: an area exactly on a bound counts in both.
    """
    ious, areas = np.asarray(ious, float), np.asarray(areas, float)
    bins = {
        "miou": np.ones(len(areas), bool),
        "miou_small": areas <= SMALL,
        "miou_medium": (areas >= SMALL) & (areas <= LARGE),
        "miou_large": areas >= LARGE,
    }
    return {name: float(100 * ious[chosen].mean()) if chosen.any() else None for name, chosen in bins.items()}


def class_agnostic(truths: Sequence[Sequence[dict]], predictions: Sequence[tuple[Sequence[dict], Array]]) -> dict[str, float | None]:
    """COCO's mask scores without classes, in percent, from a list of masks and a (masks, scores) pair for each image.

    ar_10, ar_100: recall, mean over IoU 0.50:0.95, of the best 10 or 100 predictions of an image
    ap, ap_50: average precision over IoU 0.50:0.95 and at 0.50, best 100 predictions of an image
    recall_50, precision_50: share of truths found and of predictions that are right at IoU 0.50, all predictions, no score cut
    """
    if len(truths) != len(predictions):
        raise ValueError(f"{len(truths)} images with truth, {len(predictions)} with predictions")
    most = max([100, *(len(scores) for _, scores in predictions)])
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools talks
        run = COCOeval(_coco(truths), _coco([rles for rles, _ in predictions], [scores for _, scores in predictions]), "segm")
        run.params.useCats = 0
        run.params.maxDets = [10, 100, most]
        run.params.areaRng, run.params.areaRngLbl = [[0, 1e10]], ["all"]
        run.evaluate()
        run.accumulate()
    recall = run.eval["recall"][:, 0, 0]  # (IoU thresholds, limits)
    precision = run.eval["precision"][:, :, 0, 0, 1]  # (IoU thresholds, recall levels), best 100
    matches = [image["dtMatches"][0] > 0 for image in run.evalImgs if image]  # at IoU 0.50
    hits = np.concatenate(matches) if matches else np.zeros(0)
    return {
        "ar_10": _percent(recall[:, 0]),
        "ar_100": _percent(recall[:, 1]),
        "recall_50": _percent(recall[0, 2]),
        "precision_50": _percent(hits),
        "ap_50": _percent(precision[0]),
        "ap": _percent(precision),
    }


def _percent(values: Array) -> float | None:
    """Mean in percent; None for no values or for -1, COCOeval's word for an absent one."""
    values = np.asarray(values)
    return float(100 * values.mean()) if values.size and values.min() > -1 else None


def _coco(rles: Sequence[Sequence[dict]], scores: Sequence[Array] | None = None) -> COCO:
    """Masks per image as the object that COCOeval reads, with one category."""
    found = COCO()
    annotations: list[dict] = [
        {"image_id": i, "category_id": 1, "iscrowd": 0, "segmentation": rle, "score": float(scores[i][j]) if scores else 1.0}
        for i, image in enumerate(rles)
        for j, rle in enumerate(image)
    ]
    areas = masks.area([a["segmentation"] for a in annotations])
    for i, annotation in enumerate(annotations):
        annotation.update(id=i + 1, area=int(areas[i]))  # ids from 1: COCOeval takes 0 for "no match"
    images = [{"id": i, "height": 0, "width": 0} for i in range(len(rles))]  # sizes are asked for, but used for polygons only
    found.dataset = {"images": images, "annotations": annotations, "categories": [{"id": 1}]}
    found.createIndex()
    return found


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
