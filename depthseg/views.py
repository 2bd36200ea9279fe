"""What the network looks at and what it answers: plain values that go from step to step of the segmenter."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image as PILImage

from depthseg import masks
from depthseg.plan import Plan
from depthseg.schema import (
    ABSENT,
    CORNER_MAX,
    CORNER_MIN,
    NEGATIVE,
    POSITIVE,
    PROMPT_SIDE,
    Array,
    Boxes,
    Crop,
    Frame,
    Image,
    Masks,
    Prompts,
)

ZOOM_FACTOR = 2  # side of a crop over the longer side of its box
ZOOM_LEAST = 32  # pixels: a smaller crop shows nothing
LOOKS = 2  # at crops around the answers to clicks, after the one at the whole picture
TRUST = 2  # power of the predicted IoU, and of centredness, in likeliest


class Answer(NamedTuple):
    """One mask."""

    prompt: int  # position of the prompt that it answers
    rle: dict  # in original pixels
    predicted_iou: float
    stability: float
    centredness: float = 1.0  # of the click, for candidates that answer one click alone


@dataclass(frozen=True)
class View:
    """What the encoder looks at: a whole picture, or a piece of it."""

    pixels: Array  # uint8 (h, w, 3)
    depth: Array | None  # float (h', w') of the same view, near is 1
    canvas: tuple[int, int]  # h, w of the whole picture
    corner: tuple[int, int] = (0, 0)  # x, y of this piece in it
    size: tuple[int, int] | None = None  # h, w of this view in the picture's own pixels, where `pixels` are fewer

    def crop(self, box: Array) -> "View":
        """The square piece twice as long as the box (4,), clipped to the picture."""
        h, w = self.canvas
        low, high = np.clip(box[:2], 0, (w, h)), np.clip(box[2:], 0, (w, h))
        half = max(ZOOM_FACTOR * float((high - low).max()), ZOOM_LEAST) / 2
        x0, y0 = np.floor(np.maximum((low + high) / 2 - half, 0)).astype(int).tolist()
        x1, y1 = np.ceil(np.minimum((low + high) / 2 + half, (w, h))).astype(int).tolist()
        depth = self.depth
        if depth is not None:  # its pixels need not be those of the picture: cut out with fractions of a pixel
            sx, sy = depth.shape[1] / w, depth.shape[0] / h
            relief = PILImage.fromarray(depth.astype(np.float32))
            piece = (x0 * sx, y0 * sy, x1 * sx, y1 * sy)
            depth = np.asarray(relief.resize((x1 - x0, y1 - y0), PILImage.Resampling.BILINEAR, box=piece))
        return View(self.pixels[y0:y1, x0:x1], depth, self.canvas, (x0, y0))

    def paste(self, crop: Crop) -> Crop:
        """A mask of this view as one of the whole picture."""
        (x, y), (left, top) = crop.corner, self.corner
        return Crop(crop.pixels, (left + x, top + y), self.canvas)


class Encoded(NamedTuple):
    """Features of some views, with what it takes to ask about them. Held by the caller, never by the Segmenter."""

    features: Any  # what the network's encode gave
    views: list[View]
    frames: list[Frame]


def fit(logits: torch.Tensor, points: Array, labels: Array) -> torch.Tensor:
    """IoU (P, C) of each candidate, logits (P, C, s, s), with the prompt's own box; points (P, K, 2) in the prompt frame."""
    at = (torch.arange(logits.shape[-1], device=logits.device) + 0.5) * PROMPT_SIDE / logits.shape[-1]
    corners = [torch.from_numpy(points[labels == label]).to(logits.device) for label in (CORNER_MIN, CORNER_MAX)]  # each (P, 2)
    (x0, y0), (x1, y1) = (c.T[..., None] for c in corners)
    box = ((at >= y0) & (at <= y1))[:, None, :, None] & ((at >= x0) & (at <= x1))[:, None, None]
    mask = logits > 0
    return (mask & box).sum((2, 3)) / (mask | box).sum((2, 3)).clamp(min=1)


def whole(image: Image, depth: Array | None) -> View:
    """All of a picture."""
    assert image.pixels is not None
    return View(image.pixels, depth, image.size, size=image.size)


def prompts_of(asked: Boxes | Prompts) -> Prompts:
    """Boxes as prompts."""
    return Prompts.of(boxes=asked.xyxy) if isinstance(asked, Boxes) else asked


def rows_of(asked: Prompts, index: Array) -> Prompts:
    """Some of the prompts."""
    return Prompts(asked.points[index], asked.labels[index], None if asked.masks is None else asked.masks[index])


def on_crop(asked: Prompts, row: int, crop: View) -> Prompts:
    """One prompt in the coordinates of a piece of its picture, without the negative clicks that lie elsewhere."""
    one = rows_of(asked, np.array([row]))
    points = one.points - np.array(crop.corner, np.float32)
    h, w = crop.pixels.shape[:2]
    lost = (one.labels == NEGATIVE) & ((points < 0) | (points >= (w, h))).any(-1)
    return replace(one, points=points, labels=np.where(lost, ABSENT, one.labels))


def is_boxed(asked: Prompts) -> Array:
    """Which prompts have a box: bool (P,)."""
    return (asked.labels == CORNER_MIN).any(1)


def is_clicked(asked: Prompts) -> Array:
    """Which prompts are clicks alone, one of them positive: bool (P,)."""
    return (asked.labels == POSITIVE).any(1) & ~is_boxed(asked) if asked.masks is None else np.zeros(len(asked), bool)


def is_one_click(asked: Prompts) -> Array:
    """Which prompts are one positive click and nothing else: bool (P,)."""
    return is_clicked(asked) & (np.isin(asked.labels, (NEGATIVE, POSITIVE)).sum(1) == 1)


def the_click(asked: Prompts, row: int) -> Array:
    """x, y (2,) of a prompt that is one click."""
    return asked.points[row][asked.labels[row] == POSITIVE][0]


def around(asked: Prompts, row: int, seen: dict | None = None) -> Array:
    """xyxy (4,) of what a prompt is about: its box, or the mask that answered it (RLE), with its positive clicks."""
    points, labels = asked.points[row], asked.labels[row]
    clicks = points[labels == POSITIVE]
    low, high = points[labels == CORNER_MIN], points[labels == CORNER_MAX]
    if seen is not None and masks.area([seen])[0]:
        box = masks.boxes([seen])
        low, high = box[:, :2], box[:, 2:]
    return np.concatenate([np.concatenate([low, clicks]).min(0), np.concatenate([high, clicks + 1]).max(0)])


def likeliest(answers: list[Answer], heard: list[Answer], central: bool) -> list[Answer]:
    """Of some answers to one prompt, the one with the highest expected IoU with what is meant; none of none.

    What is meant may be any of `heard`, each as likely as its predicted IoU and the click's centredness to the power TRUST say: a mask
    that several looks find wins over a stray one that the network is slightly surer of. And what is given was itself clicked near
    its middle, if anything was: it counts by its centredness once more. central: as in Plan; else centredness says nothing.
    """
    if len(answers) < 2:
        return answers

    def middle(found: list[Answer]) -> Array:
        return np.array([a.centredness if central else 1.0 for a in found])

    weight = (np.array([max(a.predicted_iou, 0) for a in heard]) * middle(heard)) ** TRUST
    expected = masks.iou([a.rle for a in answers], [a.rle for a in heard]) @ weight
    return [answers[int((expected * middle(answers)).argmax())]]


def masks_of(answers: list[Answer], asked: Boxes | Prompts, labels: Array | None, overlap: str, plan: Plan) -> Masks:
    """The masks with an area that the plan takes, best score first; with `overlap`, without those that overlap a better one too much.

    labels: category id of each prompt (P,) where there are no boxes to say it. overlap: as in catalog.Row.
    """
    area = masks.area([a.rle for a in answers])
    taken = (area >= max(1, plan.min_area or 1)) & (area <= (plan.max_area or np.inf))
    answers, area = [a for a, keep in zip(answers, taken) if keep], area[taken]
    rle = [a.rle for a in answers]
    prompt = np.array([a.prompt for a in answers], int)
    ious = np.array([a.predicted_iou for a in answers], np.float32)
    stability = np.array([a.stability for a in answers], np.float32)
    if isinstance(asked, Boxes):
        score, label, names = asked.score[prompt], asked.label[prompt], asked.names
    else:
        score, label, names = ious, np.ones(len(ious), np.int64) if labels is None else labels[prompt], {1: "object"}
    result = Masks(rle, masks.boxes(rle), area, ious, stability, score, label, names, prompt)
    return result.keep(masks.suppress(rle, score, plan.nms, nested=overlap == "share") if overlap else np.argsort(-score, kind="stable"))
