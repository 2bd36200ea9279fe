"""From samples to training views: crops, scale, flips, colour, copy-paste, and prompts drawn from the masks.

A view is what inference sees too: part of a picture laid into the encoder's square by `Frame`. NumPy and Pillow only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
from PIL import Image as PILImage

from depthseg import masks
from depthseg.prompts import depths
from depthseg.sa1b import Sample
from depthseg.schema import ABSENT, CORNER_MAX, CORNER_MIN, NEGATIVE, PADDING, POSITIVE, PROMPT_SIDE, Array, Frame

MAX_CLICKS = 10
TOKENS = MAX_CLICKS + 1  # and SAM's padding token


@dataclass(frozen=True)
class Asked:
    """How training prompts are drawn: shares in 0..1."""

    boxes: float  # of the masks get a box, the rest clicks
    one_click: float  # of the clicked masks get one click, the rest 2 to MAX_CLICKS
    central: float  # of the first clicks lie deepest inside the mask, as the evaluation's, the rest anywhere in it


@dataclass(frozen=True)
class View:
    """One training input with its prompts."""

    rgb: Array  # (3, S, S) float32 normalised
    depth: Array | None  # (3, S, S)
    target: Array  # (P, s, s) float32 0..1: share of each cell of the network's masks that the mask covers
    boxes: Array  # (P, 4) true boxes, xyxy in 0..1 of the square
    points: Array  # (P, TOKENS, 2) in the 1024 frame
    labels: Array  # (P, TOKENS)
    dither: Array  # (P,) float32 0..1, for choices that are made later


def _window(box: Array, size: tuple[int, int], whole: float, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A square of 1.2 to 8 times the box around it (mostly under 4), cut to the picture; sometimes the whole picture."""
    h, w = size
    if rng.random() < whole:
        return 0, 0, w, h
    x0, y0, x1, y1 = box
    side = max(x1 - x0, y1 - y0, 8) * np.exp(rng.uniform(np.log(1.2), np.log(4 if rng.random() < 0.9 else 8)))
    slack = np.array([side - (x1 - x0), side - (y1 - y0)]).clip(0)
    left = int(max(0, x0 - slack[0] * rng.uniform(0.1, 0.9)))
    top = int(max(0, y0 - slack[1] * rng.uniform(0.1, 0.9)))
    return left, top, int(min(w, left + side)), int(min(h, top + side))


def colour(x: Array, rng: np.random.Generator) -> Array:
    """Gain, offset, contrast, saturation, colour cast; one in ten turns grey."""
    y = x.astype(np.float32)
    grey = y.mean(2, keepdims=True)
    y = grey + (y - grey) * (0 if rng.random() < 0.1 else rng.uniform(0.5, 1.5))
    y = (y - y.mean()) * rng.uniform(0.7, 1.3) + y.mean() * rng.uniform(0.7, 1.3) + rng.uniform(-12, 12)
    y *= rng.uniform(0.9, 1.1, 3).astype(np.float32)
    if rng.random() < 0.1:
        y += rng.normal(0, rng.uniform(2, 10), y.shape).astype(np.float32)
    return y.clip(0, 255).astype(np.uint8)


def _paste(
    pixels: Array, depth: Array | None, found: list[Array], other: tuple[Sample, Array | None], rng: np.random.Generator
) -> tuple[Array, Array | None, list[Array]]:
    """Lay one object of another sample over the crop; masks below lose what it hides, and it joins the list."""
    sample, other_depth = other
    if not sample.rles:
        return pixels, depth, found
    mask = masks.decode(sample.rles[rng.integers(len(sample.rles))])
    ys, xs = np.nonzero(mask)
    if len(ys) < 200:
        return pixels, depth, found
    part = (slice(ys.min(), ys.max() + 1), slice(xs.min(), xs.max() + 1))
    h, w = pixels.shape[:2]
    scale = rng.uniform(0.25, 0.7) * max(h, w) / max(np.ptp(ys) + 1, np.ptp(xs) + 1)
    size = (max(4, int((np.ptp(xs) + 1) * scale)), max(4, int((np.ptp(ys) + 1) * scale)))  # w, h
    shape = np.asarray(PILImage.fromarray(mask[part]).convert("L").resize(size, PILImage.Resampling.BILINEAR)) > 127
    colours = np.asarray(PILImage.fromarray(sample.pixels[part]).resize(size, PILImage.Resampling.BILINEAR))
    top, left = (int(rng.integers(-n // 4, max(1, m - 3 * n // 4))) for m, n in zip((h, w), shape.shape, strict=True))
    y0, x0, y1, x1 = max(0, top), max(0, left), min(h, top + shape.shape[0]), min(w, left + shape.shape[1])
    if y1 - y0 < 4 or x1 - x0 < 4:
        return pixels, depth, found
    shape, colours = shape[y0 - top : y1 - top, x0 - left : x1 - left], colours[y0 - top : y1 - top, x0 - left : x1 - left]
    pixels = pixels.copy()
    pixels[y0:y1, x0:x1][shape] = colours[shape]
    pasted = np.zeros((h, w), bool)
    pasted[y0:y1, x0:x1] = shape
    if depth is not None and other_depth is not None:
        # in front of what it hides: its own relief, moved up to the nearest depth below it
        relief = np.asarray(PILImage.fromarray(other_depth[part]).resize(size, PILImage.Resampling.BILINEAR))
        relief = relief[y0 - top : y1 - top, x0 - left : x1 - left]
        depth = depth.copy()
        if shape.any():
            lift = depth[y0:y1, x0:x1][shape].max() - relief[shape].min()
            depth[y0:y1, x0:x1][shape] = (relief[shape] + max(0.0, lift)).clip(0, 1)
    return pixels, depth, [m & ~pasted for m in found] + [pasted]


def view(
    sample: Sample,
    depth: Array | None,
    other: tuple[Sample, Array | None] | None,
    side: int,
    stride: int,
    count: int,
    whole: float,
    asked: Asked,
    rng: np.random.Generator,
) -> View | None:
    """A random view of the sample with up to `count` prompted masks, or None when the crop shows none large enough.

    stride: input pixels to one cell of the network's masks.
    whole: how often the whole picture is shown.
    """
    areas = masks.area(sample.rles).astype(float)
    if not areas.any():
        return None
    chance = areas**0.25  # neither the largest nor the most numerous masks shall rule
    focus = int(rng.choice(len(areas), p=chance / chance.sum()))
    x0, y0, x1, y1 = _window(masks.boxes([sample.rles[focus]])[0], sample.pixels.shape[:2], whole, rng)
    crop = np.s_[y0:y1, x0:x1]
    picked = [focus, *rng.permutation([i for i in range(len(areas)) if i != focus])[: 4 * count]]
    found: Iterator[Array] = (m for m in (masks.decode(sample.rles[i])[crop] for i in picked) if m.any())  # no more than are needed
    pixels, relief = sample.pixels[crop], None if depth is None else depth[crop]
    if other is not None:
        pixels, relief, below = _paste(pixels, relief, list(islice(found, count + 2)), other, rng)
        found = iter([below[-1], *below[:-1]])  # the pasted object is asked for
    flip = rng.random() < 0.5
    frame = Frame((pixels.shape[0], pixels.shape[1]), side)
    h, w = frame.inner
    if h < pixels.shape[0]:  # colours change at the size that is seen: a photograph has a hundred times its pixels
        pixels = np.asarray(PILImage.fromarray(pixels).resize((w, h), PILImage.Resampling.BILINEAR))
    pixels = colour(pixels[:, ::-1] if flip else pixels, rng)
    relief = relief if relief is None or not flip else relief[:, ::-1]
    targets, boxes, points, labels = [], [], [], []
    for m in found:
        m = m[:, ::-1] if flip else m
        small = np.asarray(PILImage.fromarray(m).convert("L").resize((w, h), PILImage.Resampling.BOX)) / np.float32(255)
        if small.sum() < 24:
            continue
        square = np.zeros((side, side), np.float32)
        square[:h, :w] = small
        ys, xs = np.nonzero(square > 0.5)
        if not len(ys):
            continue
        box = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1], np.float32) / side
        xy, sign = _prompt(square > 0.5, box, asked, rng)
        targets.append(square.reshape(side // stride, stride, side // stride, stride).mean((1, 3)))
        boxes.append(box)
        points.append(xy * PROMPT_SIDE)
        labels.append(sign)
        if len(targets) == count:
            break
    if not targets:
        return None
    return View(
        Frame((pixels.shape[0], pixels.shape[1]), side).image(np.ascontiguousarray(pixels)),
        None if relief is None else frame.depth(np.ascontiguousarray(relief)),
        np.stack(targets), np.stack(boxes), np.stack(points).astype(np.float32), np.stack(labels),
        rng.random(len(targets)).astype(np.float32),
    )  # fmt: skip


def _prompt(mask: Array, box: Array, asked: Asked, rng: np.random.Generator) -> tuple[Array, Array]:
    """A box (half exact, half jittered by 4 % of its sides), or 1 to 10 clicks; xy (TOKENS, 2) in 0..1 and labels."""
    xy = np.zeros((TOKENS, 2), np.float32)
    labels = np.full(TOKENS, ABSENT)
    if rng.random() < asked.boxes:
        jitter = rng.normal(0, 0.04, 4) if rng.random() < 0.5 else np.zeros(4)
        xy[:2] = (box + jitter * np.tile(box[2:] - box[:2], 2)).reshape(2, 2)
        labels[:2] = CORNER_MIN, CORNER_MAX
        return xy, labels
    clicks = 1 if rng.random() < asked.one_click else int(rng.integers(2, MAX_CLICKS + 1))
    side = mask.shape[0]
    inside = np.argwhere(mask)
    # false positives worth a click lie near the object: the box grown by a third, without the mask
    grow = (box[2:] - box[:2]) / 3
    a, b = ((v * side).astype(int).clip(0, side) for v in (box[:2] - grow, box[2:] + grow))
    outside = np.argwhere(~mask[a[1] : b[1], a[0] : b[0]]) + [a[1], a[0]]
    for i in range(clicks):
        if i == 0 and rng.random() < asked.central:
            depth, left, top = depths(mask)
            at = np.array(np.unravel_index(depth.argmax(), depth.shape)) + (top, left)
            sign = POSITIVE
        else:
            negative = i > 0 and rng.random() < 0.4 and len(outside) > 0
            pool = outside if negative else inside
            at, sign = pool[rng.integers(len(pool))], NEGATIVE if negative else POSITIVE
        xy[i] = (np.array(at[::-1]) + 0.5) / side
        labels[i] = sign
    labels[clicks] = PADDING
    return xy, labels
