"""Pictures for a report: the images that went worst and best, with what was wanted and what came."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from PIL import Image as PILImage

from depthseg import masks as rles
from depthseg.data import Unreadable, read
from depthseg.formats import overlay, ramp
from depthseg.report import Picture
from depthseg.schema import Array, Depth, Image, Masks
from depthseg.truth import Dataset, Truth

SIDE = 480  # long side of a panel, pixels
EACH = 6  # pictures of one kind


def pictures(
    dataset: Dataset,
    results: Sequence[dict],
    quality: dict[int, float],
    groups: Mapping[str, Sequence[int]],
    depth: Depth | None = None,
    others: Mapping[str, Sequence[dict]] | None = None,
) -> list[Picture]:
    """For each group the images with these ids: photograph, depth, truth and prediction; `others` are predictions of other runs.

    quality: mean IoU in percent by image id, for the captions. An image that cannot be read any more is left out.
    """
    truths = {t.image.id: t for t in dataset.truths}
    runs = {"prediction": results, **(others or {})}
    found = {name: _by_image(some, {i for ids in groups.values() for i in ids}) for name, some in runs.items()}
    out = []
    for group, ids in groups.items():
        for i in ids:
            try:
                image = read(truths[i].image)
            except Unreadable:
                continue
            panels = [("photograph", _small(np.asarray(image.pixels)))]
            if depth:
                panels.append(("depth", _depth(depth, image)))
            things = truths[i].keep(np.flatnonzero(~truths[i].crowd))
            panels.append(("truth", _drawn(image, _of_truth(things, dataset.names))))
            panels += [
                (name, _drawn(image, _of_results(some.get(i, []), len(things), dataset.names)))
                for name, some in found.items()
                if name in runs
            ]
            score = f", mean IoU {quality[i]:.1f}" if i in quality else ""
            out.append(Picture(group, f"{image.key}: {len(things)} masks{score}", panels))
    return out


def extremes(quality: dict[int, float]) -> dict[str, list[int]]:
    """The ids of the worst and of the best images."""
    order = sorted(quality, key=lambda i: quality[i])
    return {"worst": order[:EACH], "best": order[::-1][: min(EACH, max(0, len(order) - EACH))]}


def _by_image(results: Sequence[dict], wanted: set[int]) -> dict[int, list[dict]]:
    """The results of these images; of several rounds of clicks, the last."""
    last = max((r.get("clicks", 0) for r in results), default=0)
    out: dict[int, list[dict]] = {}
    for r in results:
        if r["image_id"] in wanted and r.get("clicks", 0) == last:
            out.setdefault(r["image_id"], []).append(r)
    return out


def _of_truth(truth: Truth, names: dict[int, str]) -> Masks:
    return _masks(truth.rle, np.ones(len(truth)), truth.label, names)


def _of_results(results: Sequence[dict], most: int, names: dict[int, str]) -> Masks:
    """The best `most` results; masks that answer prompts come as they are, and so in the order of the truth."""
    if any("annotation_id" not in r for r in results):
        results = sorted(results, key=lambda r: -r["score"])[:most]
    score, label = (np.array([r[field] for r in results]) for field in ("score", "category_id"))
    return _masks([r["segmentation"] for r in results], score, label.astype(np.int64), names)


def _masks(some: Sequence[dict], score: Array, label: Array, names: dict[int, str]) -> Masks:
    score = score.astype(np.float32)
    return Masks(list(some), rles.boxes(some), rles.area(some), score, score, score, label, names)


def _drawn(image: Image, masks: Masks) -> PILImage.Image:
    return _small(np.asarray(overlay(np.asarray(image.pixels), masks)))


def _depth(depth: Callable[[list[Image]], Sequence[Array]], image: Image) -> PILImage.Image:
    (found,) = depth([image])
    near = PILImage.fromarray(found.astype(np.float32)).resize(image.size[::-1], PILImage.Resampling.BILINEAR)
    return _small(ramp(np.asarray(near)))


def _small(pixels: Array) -> PILImage.Image:
    picture = PILImage.fromarray(pixels)
    picture.thumbnail((SIDE, SIDE), PILImage.Resampling.LANCZOS)
    return picture
