"""Binary masks: compressed RLE, their boxes, areas and overlaps, SAM's quality measures, and duplicates.

A mask is bool (h, w) in original pixels while it is worked on and COCO compressed RLE wherever it is kept. Knows no images, no
logit frames and no files.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from pycocotools import mask as coco
from scipy import ndimage

from depthseg.schema import Array, Crop

_EIGHT = np.ones((3, 3), bool)  # neighbours that count as connected
_MOST = 2**29 - 1  # pixels of a mask in a file: pycocotools writes run lengths of up to six base-32 digits, and computes in 32 bits
_LONGEST = 2**22  # pixels along a polygon in a file: pycocotools takes 80 bytes for each


def encode(mask: Array) -> dict:
    """Compressed RLE {"size": [h, w], "counts": str} of a bool mask (h, w)."""
    rle = coco.encode(np.asfortranarray(mask, np.uint8))
    return {"size": rle["size"], "counts": rle["counts"].decode("ascii")}


def encode_crop(crop: Crop) -> dict:
    """What `encode` makes of the whole mask, byte for byte, from the piece: run lengths are the distances between edges."""
    (x, y), (h, w) = crop.corner, crop.size
    tall = len(crop.pixels) + 1
    columns = np.zeros((crop.pixels.shape[1], tall), bool)  # with a gap below each, so that no run goes on into the next
    columns[:, :-1] = crop.pixels.T
    flat = np.concatenate([[False], columns.ravel()])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    edges += edges // tall * (h - tall) + (x * h + y)  # from a column of the piece to one of the picture
    if tall > h:  # a column of the picture ends where the next begins: what reaches both ends is one run
        (same,) = np.nonzero(edges[1:] == edges[:-1])
        edges = np.delete(edges, np.concatenate([same, same + 1]))
    return encode_edges(edges, (h, w))


def encode_edges(edges: Array, size: tuple[int, int]) -> dict:
    """What `encode` makes of a mask of `size` (h, w) whose runs begin and end at `edges` (N,), counted down the columns."""
    h, w = size
    runs = np.diff(edges, prepend=0, append=h * w)
    rle = coco.frPyObjects({"size": [h, w], "counts": runs if runs[-1] else runs[:-1]}, h, w)
    return {"size": [h, w], "counts": rle["counts"].decode("ascii")}


def decode(rle: dict) -> Array:
    """Bool mask (h, w) of an RLE: counts as str, as bytes, or uncompressed as a list of run lengths.

    An RLE from a file goes through `of_coco` first: a wrong one is not found out here.
    """
    if isinstance(rle["counts"], list):
        rle = coco.frPyObjects(rle, *rle["size"])
    return coco.decode(rle).astype(bool)


def crop(rle: dict) -> Crop:
    """The piece of a mask that has all its pixels; one pixel of an empty one."""
    x0, y0, x1, y1 = boxes([rle])[0].astype(int).tolist()
    return Crop(decode(rle)[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)], (x0, y0), (rle["size"][0], rle["size"][1]))


def of_coco(segmentation: list | dict, size: tuple[int, int]) -> dict:
    """Compressed RLE of an annotation's `segmentation`: polygons, or an RLE that may be compressed already. ValueError if another size.

    Where a file's masks come in: pycocotools does not check them, and would crash or never end on those that are refused here.
    """
    h, w = size
    if h < 1 or w < 1 or h * w > _MOST:
        raise ValueError(f"no image has the size {size}")
    if isinstance(segmentation, list):
        polygons = [_polygon(p) for p in segmentation if len(p) >= 6]  # pycocotools would read four numbers as a box
        if not polygons:
            return encode(np.zeros(size, bool))
        rle = coco.merge(coco.frPyObjects(polygons, h, w))
        return {"size": [h, w], "counts": rle["counts"].decode("ascii")}
    if tuple(segmentation["size"]) != size:
        raise ValueError(f"a mask of {segmentation['size']} on an image of {size}")
    counts = segmentation["counts"]
    if isinstance(counts, list):
        if not all(type(run) is int and 0 <= run <= _MOST for run in counts) or sum(counts) != h * w:
            raise ValueError("run lengths that do not fill the image")
        counts = coco.frPyObjects({"size": [h, w], "counts": counts}, h, w)["counts"]
    counts = counts.decode("ascii") if isinstance(counts, bytes) else counts
    runs = _runs(counts.encode())
    if (runs < 0).any() or runs.sum() != h * w:
        raise ValueError("run lengths that do not fill the image")
    rle = {"size": [h, w], "counts": counts}
    return rle if runs[1:].all() else encode(decode(rle))  # pycocotools compares masks up to a run of 0 only


def _polygon(xy: list) -> list:
    """The polygon x0, y0, x1, y1, ... if it is one."""
    if all(-_LONGEST < v < _LONGEST for v in xy):  # NaN is not
        at = np.array(xy, float)
        if np.abs(at - np.roll(at, 2)).sum() < _LONGEST:
            return xy
    raise ValueError("a polygon that is not made of numbers, or goes too far")


def _runs(counts: bytes) -> Array:
    """The run lengths (N,) of compressed counts: base-32 digits, lowest first, with a sixth bit where more follow and the last one's
    highest bit as the sign; from the fourth number on it is the difference to the last but one."""
    digits = np.frombuffer(counts, np.uint8).astype(np.int64) - ord("0")
    ends = np.flatnonzero(digits < 32)
    starts = np.append(0, ends + 1)[:-1]
    if not len(ends) or ends[-1] != len(digits) - 1 or digits.min() < 0 or digits.max() > 63 or (ends - starts).max() > 5:
        raise ValueError("counts that are no run lengths")
    place = 5 * (np.arange(len(digits)) - np.repeat(starts, ends - starts + 1))
    runs = np.add.reduceat((digits & 31) << place, starts) - np.where(digits[ends] & 16, 32 << place[ends], 0)
    for parity in (1, 2):
        runs[parity::2] = np.cumsum(runs[parity::2])
    return runs


def area(rles: Sequence[dict]) -> Array:
    """Pixels of each mask, int64 (N,)."""
    # pycocotools 2.0.11 with NumPy 2 refuses more than 255 masks in one call (it makes their number a uint8).
    parts = [coco.area(list(rles[i : i + 255])) for i in range(0, len(rles), 255)]
    return np.concatenate([np.zeros(0, np.int64), *parts], dtype=np.int64)


def boxes(rles: Sequence[dict]) -> Array:
    """Box of each mask's pixels, float32 xyxy (N, 4); the far edge is one past the last pixel, an empty mask has zeros."""
    xywh = np.asarray(coco.toBbox(list(rles)), np.float32).reshape(-1, 4)
    return np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)


def iou(a: Sequence[dict], b: Sequence[dict]) -> Array:
    """IoU of every mask of `a` with every mask of `b`, float64 (len(a), len(b))."""
    if not len(a) or not len(b):
        return np.zeros((len(a), len(b)))
    return coco.iou(list(a), list(b), [0] * len(b))


def covered(a: Sequence[dict], b: Sequence[dict]) -> Array:
    """How much of every mask of `a` lies in every mask of `b`, float64 (len(a), len(b))."""
    if not len(a) or not len(b):
        return np.zeros((len(a), len(b)))
    return coco.iou(list(a), list(b), [1] * len(b))  # as for crowds: the intersection over the first mask's own area


def outermost(rles: Sequence[dict], share: float = 0.8) -> Array:
    """Indices of the masks that are no part of another: not `share` of their pixels lie in one larger mask."""
    sizes = area(rles)
    if not len(sizes):
        return np.zeros(0, np.int64)
    return np.nonzero(~((covered(rles, rles) > share) & (sizes[None] > sizes[:, None])).any(1))[0]


def stability(low: Array, offset: float = 1.0) -> Array:
    """SAM's stability score of logits (N, s, s), float32 (N,): IoU of the masks at thresholds +offset and -offset.

    0 where nothing is above -offset. Logits of the padding are to be cut off before.
    """
    inner = np.count_nonzero(low > offset, axis=(1, 2))
    outer = np.count_nonzero(low > -offset, axis=(1, 2))
    return (inner / np.maximum(outer, 1)).astype(np.float32)


def clean(mask: Array, min_region: int, edges: bool = True) -> Array:
    """The bool mask (h, w) with holes filled, then islands dropped, that have under `min_region` pixels (8-connected).

    SAM's rules: a small piece of background at the image's edge is a hole too (unless `edges` is False); if all islands are small,
    the largest stays.
    """
    if min_region <= 1 or not mask.any():
        return mask.copy()
    # With a margin of min_region, background that goes on outside the window is big enough within it: same answer, less work.
    # Without edges it is no hole however big it is.
    margin = min_region if edges else 0
    y, x = (slice(max(0, hit[0] - margin), hit[-1] + 1 + margin) for hit in _extent(mask))
    out = mask.copy()
    window = out[y, x]  # a view

    regions, sizes = _regions(~window)
    hole = sizes < min_region
    hole[0] = False  # the mask itself
    if not edges:
        hole[np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]])] = False
    window |= hole[regions]

    regions, sizes = _regions(window)
    small = sizes < min_region
    if small[1:].all():
        small[1 + np.argmax(sizes[1:])] = False
    window &= ~small[regions]
    return out


def clean_crop(crop: Crop, min_region: int, edges: bool = True) -> Crop:
    """What `clean` makes of the whole mask, from the piece."""
    if edges and min_region > 1:  # what lies between mask and edge is to be seen
        crop = crop.wider(min_region)
    return replace(crop, pixels=clean(crop.pixels, min_region, edges))


def _extent(mask: Array) -> tuple[Array, Array]:
    """Rows and columns in which a mask has pixels."""
    return np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))


def _regions(mask: Array) -> tuple[Array, Array]:
    """Region number of each pixel (0 is outside the mask), and the pixels of each number."""
    regions, count = ndimage.label(mask, _EIGHT)
    return regions, np.bincount(regions.ravel(), minlength=count + 1)


def suppress(rles: Sequence[dict], scores: Array, threshold: float, boxes: Array | None = None, nested: bool = False) -> Array:
    """Positions that stay, best score first: a mask goes if its IoU with a better one that stays is above `threshold`.

    boxes: what `boxes(rles)` gives, if it is known already (the boxes of the masks, not of a detector).
    nested: measure the overlap as a share of the smaller mask, so that parts and wholes exclude each other too.
    """
    box = np.asarray(_boxes(rles) if boxes is None else boxes, np.float64)
    size = area(rles)
    left = np.argsort(-np.asarray(scores), kind="stable")
    kept = []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        # Pixels are compared only where boxes and areas leave room for so much overlap.
        sides = np.minimum(box[left, 2:], box[best, 2:]) - np.maximum(box[left, :2], box[best, :2])
        most = np.minimum(np.clip(sides, 0, None).prod(1), np.minimum(size[left], size[best]))
        whole = np.minimum(size[left], size[best]) if nested else size[left] + size[best] - most
        near = np.flatnonzero(most > threshold * whole * (1 - 1e-9))  # 1e-9: rounding
        some = [rles[i] for i in left[near]]
        if nested:
            overlap = covered(some, [rles[best]])[:, 0] * size[left[near]] / np.maximum(whole[near], 1)
        else:
            overlap = iou(some, [rles[best]])[:, 0]
        left = np.delete(left, near[overlap > threshold])
    return np.array(kept, np.int64)


_boxes = boxes  # within `suppress` the name is taken by the argument


def label_map(rles: Sequence[dict], size: tuple[int, int]) -> Array:
    """One picture of all instances, uint16 (h, w): 0 is background, i + 1 is mask i; a lower index lies on top."""
    out = np.zeros(size, np.uint16)
    for i in reversed(range(len(rles))):
        out[decode(rles[i])] = i + 1
    return out
