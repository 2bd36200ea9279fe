"""Where the errors of detections come from: what became of each truth and of each prediction, at IoU 0.5."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from depthseg import masks
from depthseg.schema import Array
from depthseg.truth import Dataset

MATCH = 0.5  # IoU from which a prediction counts as right
NEAR = 0.1  # IoU from which a prediction of the right class counts as a poor mask and not as background


def errors(dataset: Dataset, results: Sequence[dict], agnostic: bool) -> tuple[dict, Array, Array]:
    """What became of each truth and of the best predictions (as many as there are truths), at IoU 0.5; crowds are left out.

    Also the image id and the best IoU of a right-class prediction, for each truth.
    """
    by_image: dict[int, list[dict]] = {}
    for r in results:
        by_image.setdefault(r["image_id"], []).append(r)
    truths, fates, best, image, boxed = Counter[str](), [], [], [], []
    for t in dataset.truths:
        found = sorted(by_image.get(t.image.id, []), key=lambda r: -r["score"])
        things = t.keep(np.flatnonzero(~t.crowd))
        rles = [r["segmentation"] for r in found]
        overlap = masks.iou(rles, things.rle)
        label = np.array([r["category_id"] for r in found], int)
        same = np.ones(overlap.shape, bool) if agnostic else label[:, None] == things.label[None]
        boxes = np.array([_xyxy(r["prompt_box"]) if "prompt_box" in r else masks.boxes([r["segmentation"]])[0] for r in found])
        box_iou = _box_iou(boxes.reshape(-1, 4), things.box)
        for g in range(len(things)):
            mine, near = np.where(same[:, g], overlap[:, g], 0), same[:, g] & (box_iou[:, g] >= MATCH)
            best.append(mine.max(initial=0))
            image.append(t.image.id)
            if near.any():
                boxed.append(overlap[int(near.argmax()), g])
            if best[-1] >= MATCH:
                truths["found"] += 1
            elif near.any():
                truths["poor_mask"] += 1
            else:
                truths["wrong_class" if (overlap[:, g] >= MATCH).any() else "missed"] += 1
        on_crowd = masks.covered(rles, [t.rle[i] for i in np.flatnonzero(t.crowd)]).max(1, initial=0) >= MATCH
        known = {*t.label.tolist(), *t.negative} if dataset.kind == "lvis" and not agnostic else None
        told = np.array([known is None or r["category_id"] in known for r in found], bool)  # LVIS: of other classes nothing is known
        loose = np.array([known is not None and r["category_id"] in t.not_exhaustive for r in found], bool)
        fates += _fates(overlap, same, on_crowd | loose | ~told, [r["score"] for r in found])
    fates.sort(key=lambda pair: -pair[0])
    predictions = Counter(fate for _, fate in fates[: len(best)])
    total = max(1, len(best))
    return (
        {
            "truth": {name: truths[name] for name in ("found", "poor_mask", "wrong_class", "missed")},
            "predictions": {name: predictions[name] for name in ("right", "duplicate", "wrong_class", "poor_mask", "background")},
            "box_recall": 100 * len(boxed) / total,
            "miou_given_box": float(100 * np.mean(boxed)) if boxed else None,
        },
        np.array(image, np.int64),
        np.array(best, float),
    )


def _fates(overlap: Array, same: Array, excused: Array, scores: Sequence[float]) -> list[tuple[float, str]]:
    """Score and fate of each prediction of one image, best first.

    excused: on a crowd, or of a class of which not all objects are annotated: if it hits nothing, it has no fate.
    """
    taken, out = np.zeros(overlap.shape[1], bool), []
    for row, kind, excuse, score in zip(overlap, same, excused, scores):
        hit = kind & (row >= MATCH)
        if (hit & ~taken).any():
            taken[np.where(hit & ~taken, row, -1).argmax()] = True
            fate = "right"
        elif hit.any():
            fate = "duplicate"
        elif excuse:
            continue
        elif (row >= MATCH).any():
            fate = "wrong_class"
        else:
            fate = "poor_mask" if (kind & (row >= NEAR)).any() else "background"
        out.append((score, fate))
    return out


def _xyxy(box: Sequence[float]) -> list[float]:
    x, y, w, h = box
    return [x, y, x + w, y + h]


def _box_iou(a: Array, b: Array) -> Array:
    """IoU of boxes xyxy, (len(a), len(b))."""
    sides = np.minimum(a[:, None, 2:], b[None, :, 2:]) - np.maximum(a[:, None, :2], b[None, :, :2])
    both = np.clip(sides, 0, None).prod(2)
    areas = [(x[:, 2:] - x[:, :2]).prod(1) for x in (a, b)]
    return both / np.maximum(areas[0][:, None] + areas[1][None] - both, 1e-9)
