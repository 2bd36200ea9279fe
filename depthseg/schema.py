"""The nouns that flow between stages: frozen dataclasses of parallel NumPy arrays, and the Frame that scales between them.

One coordinate frame at every boundary: pixels of the original image (after EXIF orientation), XYXY, float32. Only `Frame` knows
other frames: the encoder's square input and SAM's 1024-pixel prompt frame. Knows no files and no torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image as PILImage
from scipy.sparse import csr_array

Array = np.ndarray

# Prompt labels, as in SAM's ONNX convention: a box is its two corners.
NEGATIVE, POSITIVE, CORNER_MIN, CORNER_MAX = 0, 1, 2, 3
PADDING = -1  # SAM's own "not a point" token, which it appends to points that come without a box
ABSENT = -10  # no token at all: fills ragged rows, is masked out of the attention

# SAM's normalisation, RGB, in grey levels.
PIXEL_MEAN = np.array([123.675, 116.28, 103.53], np.float32)
PIXEL_STD = np.array([58.395, 57.12, 57.375], np.float32)
IMAGENET_MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # RGB, of 0..1
IMAGENET_STD = np.array([0.229, 0.224, 0.225], np.float32)
GREY = 114 / 255  # YOLO's padding
PROMPT_SIDE = 1024  # prompts live in a 1024 frame, whatever the encoder's input (EfficientViT-SAM, SAM)


@dataclass(frozen=True)
class Image:
    """One picture. `pixels` is uint8 RGB (h, w, 3) once read, None before; a large one may be read at fewer pixels than `size`."""

    key: str  # relative POSIX path with extension
    id: int
    path: Path | None
    size: tuple[int, int]  # h, w after EXIF orientation
    pixels: Array | None = None
    span: tuple[int, int] | None = None  # offset and bytes, where the path is an archive


@dataclass(frozen=True)
class Boxes:
    """Detections of one image."""

    xyxy: Array  # (N, 4) float32, original pixels
    score: Array  # (N,) float32
    label: Array  # (N,) int64, the data set's own category id
    names: dict[int, str] = field(default_factory=dict)  # category id -> name, for those that occur

    def __post_init__(self) -> None:
        if self.xyxy.shape != (len(self.score), 4) or len(self.label) != len(self.score):
            raise ValueError(f"boxes {self.xyxy.shape}, scores {self.score.shape} and labels {self.label.shape} do not match")

    def __len__(self) -> int:
        return len(self.score)

    def keep(self, index: Array) -> "Boxes":
        return replace(self, xyxy=self.xyxy[index], score=self.score[index], label=self.label[index])

    @classmethod
    def best(
        cls,
        xyxy: Array,
        score: Array,
        label: Array,
        names: Mapping[int, str],
        size: tuple[int, int],
        least: float,
        most: int | None,
    ) -> "Boxes":
        """Boxes clipped to an image of `size` (h, w), without empty ones and scores under `least` or NaN, best first, at most `most`."""
        h, w = size
        xyxy = np.clip(np.asarray(xyxy, np.float64).reshape(-1, 4), 0, (w, h, w, h)).astype(np.float32)
        score = np.asarray(score, np.float32)
        (keep,) = np.nonzero((score >= np.float32(least)) & (xyxy[:, 2:] > xyxy[:, :2]).all(1))
        keep = keep[np.argsort(-score[keep], kind="stable")][:most]
        label = np.asarray(label, np.int64)[keep]
        return cls(xyxy[keep], score[keep], label, {i: names[i] for i in sorted(set(label.tolist())) if i in names})

    @classmethod
    def empty(cls) -> "Boxes":
        return cls(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))


@dataclass(frozen=True)
class Prompts:
    """Prompts of one image, each up to K points. Boxes are two points labelled CORNER_MIN and CORNER_MAX."""

    points: Array  # (P, K, 2) float32 x, y in original pixels
    labels: Array  # (P, K) int64
    masks: Array | None = None  # (P, 1, s, s) float32 low-resolution logits of an earlier answer

    def __post_init__(self) -> None:
        if self.points.shape[:2] != self.labels.shape or self.points.shape[2:] != (2,):
            raise ValueError(f"points {self.points.shape} and labels {self.labels.shape} do not match")

    def __len__(self) -> int:
        return len(self.labels)

    @classmethod
    def of(cls, boxes: Array | None = None, points: Array | None = None, signs: Array | None = None) -> "Prompts":
        """Boxes (P, 4), or points (P, K, 2) with signs (P, K), or both.

        Points without a box get SAM's padding token, as the official predictor does.
        """
        xy, labels = [], []
        if points is not None:
            count = len(points)
            xy.append(np.asarray(points, np.float32))
            labels.append(np.ones(xy[0].shape[:2]) if signs is None else np.asarray(signs))
            if boxes is None:
                xy.append(np.zeros((count, 1, 2), np.float32))
                labels.append(np.full((count, 1), PADDING))
        if boxes is not None:
            xy.append(np.asarray(boxes, np.float32).reshape(-1, 2, 2))
            labels.append(np.tile([CORNER_MIN, CORNER_MAX], (len(xy[-1]), 1)))
        return cls(np.concatenate(xy, 1), np.concatenate(labels, 1).astype(np.int64))

    def clicked(self, points: Array, sign: int) -> "Prompts":
        """The prompts with points (P, N, 2) of one sign before their own."""
        signs = np.full(points.shape[:2], sign, np.int64)
        joined = np.concatenate([points.astype(np.float32), self.points], 1)
        return replace(self, points=joined, labels=np.concatenate([signs, self.labels], 1))


@dataclass(frozen=True)
class Crop:
    """A mask of which only a piece is held, which has all its pixels: nothing of a picture's size need ever be made."""

    pixels: Array  # bool (h', w')
    corner: tuple[int, int]  # x, y of the piece in the picture
    size: tuple[int, int]  # h, w of the picture

    def wider(self, margin: int) -> "Crop":
        """With so many pixels more on each side, as far as the picture goes."""
        (x, y), (h, w), (ph, pw) = self.corner, self.size, self.pixels.shape
        before, after = (min(y, margin), min(x, margin)), (min(h - y - ph, margin), min(w - x - pw, margin))
        return Crop(np.pad(self.pixels, list(zip(before, after))), (x - before[1], y - before[0]), self.size)

    def whole(self) -> Array:
        """Bool (h, w)."""
        (h, w), (x, y), (ph, pw) = self.size, self.corner, self.pixels.shape
        out = np.zeros((h, w), bool)
        out[y : y + ph, x : x + pw] = self.pixels
        return out


def _fit(h: int, w: int, side: int) -> tuple[int, int]:
    """Height and width with the long side at `side`; halves round up, each side on its own, as the official code does."""
    scale = side / max(h, w)
    return max(1, int(h * scale + 0.5)), max(1, int(w * scale + 0.5))


def _linear(n_in: int, n_out: int) -> csr_array:
    """(n_out, n_in) float64 matrix of bilinear interpolation along one axis, half-pixel centres (torch's align_corners=False).

    Positions are float32, as in torch: at a few hundred cells they are off by up to 1e-5, which decides pixels whose logit is next to 0.
    """
    half = np.float32(0.5)
    at = np.maximum(np.float32(n_in) / np.float32(n_out) * (np.arange(n_out, dtype=np.float32) + half) - half, 0)
    low = np.minimum(at.astype(int), n_in - 1)
    high = np.minimum(low + 1, n_in - 1)
    frac = at - low.astype(np.float32)
    taps, weights = np.stack([low, high], 1), np.stack([1 - frac, frac], 1).astype(float)
    return csr_array((weights.ravel(), taps.ravel(), np.arange(0, 2 * n_out + 1, 2)), (n_out, n_in))


class _Axis(NamedTuple):
    """One axis of the way from low-resolution logits to original pixels."""

    matrix: csr_array  # (original, low) float32: four numbers at most in a row
    first: Array  # (original,) of the low-resolution positions that make a pixel, the lowest
    last: Array  # and the highest; both only grow

    def reach(self, low: int, high: int) -> slice:
        """The original pixels that are made of any of the positions low to high."""
        return slice(int(np.searchsorted(self.last, low)), int(np.searchsorted(self.first, high, "right")))

    def part(self, pixels: slice) -> tuple[csr_array, slice]:
        """The matrix of these pixels alone, and the positions that it is for."""
        cells = slice(int(self.first[pixels.start]), int(self.last[pixels.stop - 1]) + 1)
        rows = self.matrix.indptr[pixels.start : pixels.stop + 1]
        used = slice(rows[0], rows[-1])  # scipy's own slicing of rows, then columns, takes longer than the product
        parts = self.matrix.data[used], self.matrix.indices[used] - cells.start, rows - rows[0]
        return csr_array(parts, (pixels.stop - pixels.start, cells.stop - cells.start)), cells


@lru_cache(maxsize=64)  # two for each size of picture
def _upsampling(low: int, inner: int, original: int) -> _Axis:
    """Low-resolution axis -> 1024 frame -> without the padding -> original pixels, composed.

    The official post-processing interpolates twice; both steps are linear and separable, so one matrix per axis is the same map. As
    a sparse matrix it costs a tenth of BLAS, whose threads would get in the way of torch's, and an original pixel is the same sum
    whatever is cut out around it.
    """
    m = (_linear(inner, original) @ _linear(low, PROMPT_SIDE)[:inner]).astype(np.float32)
    m.eliminate_zeros()
    m.sort_indices()
    return _Axis(m, m.indices[m.indptr[:-1]], m.indices[m.indptr[1:] - 1])


@dataclass(frozen=True)
class Frame:
    """How one image lies in the encoder's square input. The only code that scales images, coordinates or masks."""

    size: tuple[int, int]  # original h, w
    side: int  # encoder input, pixels

    @property
    def inner(self) -> tuple[int, int]:
        """h, w of the resized image inside the encoder's square; the rest (right, bottom) is padding."""
        return self.size if max(self.size) == self.side else _fit(*self.size, self.side)

    @property
    def prompt_inner(self) -> tuple[int, int]:
        """h, w in the prompt frame: rounded on its own, not twice `inner` (the official code's 1 px quirk, kept)."""
        return _fit(*self.size, PROMPT_SIDE)

    def image(self, pixels: Array) -> Array:
        """uint8 (h, w, 3) -> normalised float32 (3, side, side), padded with zeros after normalising."""
        h, w = self.inner
        if pixels.shape[:2] != (h, w):
            pixels = np.asarray(PILImage.fromarray(pixels).resize((w, h), PILImage.Resampling.BILINEAR))
        x = np.zeros((3, self.side, self.side), np.float32)
        x[:, :h, :w] = ((pixels.astype(np.float32) / 255 - PIXEL_MEAN / 255) / (PIXEL_STD / 255)).transpose(2, 0, 1)
        return x

    def depth(self, depth: Array) -> Array:
        """Depth in 0..1, near is 1, any resolution of the same view -> float32 (3, side, side), one channel replicated.

        Normalised with SAM's mean and deviation as if it were a grey picture, so that a depth encoder may start from RGB weights.
        """
        h, w = self.inner
        if depth.shape != (h, w):
            depth = np.asarray(PILImage.fromarray(depth.astype(np.float32)).resize((w, h), PILImage.Resampling.BILINEAR))
        x = np.zeros((3, self.side, self.side), np.float32)
        x[:, :h, :w] = (depth[None] - PIXEL_MEAN[:, None, None] / 255) / (PIXEL_STD[:, None, None] / 255)
        return x

    def to_prompt(self, xy: Array) -> Array:
        """(..., 2) x, y in original pixels -> the prompt frame."""
        (h, w), (ih, iw) = self.size, self.prompt_inner
        return np.asarray(xy, np.float32) * np.array([iw / w, ih / h], np.float32)

    def valid(self, low: int) -> tuple[int, int]:
        """h, w of the part of a (low, low) logit map that shows the image and not the padding, rounded up."""
        ih, iw = self.prompt_inner
        return -(-ih * low // PROMPT_SIDE), -(-iw * low // PROMPT_SIDE)

    def _axes(self, low: int) -> tuple[_Axis, _Axis]:
        """Down and across, for low-resolution logits of `low` cells a side."""
        (h, w), (ih, iw) = self.size, self.prompt_inner
        return _upsampling(low, ih, h), _upsampling(low, iw, w)

    def logits(self, low: Array) -> Array:
        """Low-resolution logits (s, s) -> float32 (h, w) in original pixels: SAM's post-processing."""
        down, across = self._axes(len(low))
        return (across.matrix @ (down.matrix @ low).T).T

    def crop(self, low: Array) -> Crop:
        """Low-resolution logits (s, s) -> exactly the pixels where `logits(low) > 0`, computed only where that can be.

        No pixel is positive unless one of the logits that it is made of is.
        """
        positive, axes = low > 0, self._axes(len(low))
        hits = [np.flatnonzero(positive.any(1 - axis)) for axis in (0, 1)]
        y, x = (axis.reach(hit[0], hit[-1]) if len(hit) else slice(0, 0) for axis, hit in zip(axes, hits))
        if y.start == y.stop or x.start == x.stop:  # nothing, or in the padding alone
            return Crop(np.zeros((1, 1), bool), (0, 0), self.size)
        (down, rows), (across, columns) = (axis.part(reach) for axis, reach in zip(axes, (y, x)))
        return Crop((across @ (down @ low[rows, columns]).T > 0).T, (x.start, y.start), self.size)


@lru_cache(maxsize=64)
def _bilinear(n_in: int, n_out: int) -> csr_array:
    """(n_out, n_in) float32: bilinear interpolation along one axis, without smoothing first."""
    return _linear(n_in, n_out).astype(np.float32)


@lru_cache(maxsize=64)
def _bicubic(n_in: int, n_out: int) -> csr_array:
    """(n_out, n_in) float32: cubic convolution with a = -0.75 along one axis, the edges repeated (torch's align_corners=False)."""
    at = (np.arange(n_out) + 0.5) * (n_in / n_out) - 0.5
    low, a = np.floor(at).astype(int), -0.75
    m = np.zeros((n_out, n_in))
    for tap in (-1, 0, 1, 2):
        d = np.abs(at - low - tap)
        near, far = ((a + 2) * d - (a + 3)) * d * d + 1, ((d - 5) * d + 8) * d * a - 4 * a
        np.add.at(m, (np.arange(n_out), np.clip(low + tap, 0, n_in - 1)), np.where(d <= 1, near, far))
    return csr_array(m.astype(np.float32))


def _sampled(pixels: Array, size: tuple[int, int]) -> Array:
    """uint8 (h, w, 3) -> float32 (3, *size) in 0..1, bilinear without smoothing."""
    rows, columns = (_bilinear(n_in, n_out) for n_in, n_out in zip(pixels.shape, size))
    return np.stack([(columns @ (rows @ plane).T).T for plane in (pixels.astype(np.float32) / 255).transpose(2, 0, 1)])


class StretchedFrame(Frame):
    """EfficientSAM's: the picture fills the whole square whatever its shape, bilinear without smoothing, ImageNet's statistics."""

    @property
    def inner(self) -> tuple[int, int]:
        return self.side, self.side

    @property
    def prompt_inner(self) -> tuple[int, int]:
        return PROMPT_SIDE, PROMPT_SIDE

    def image(self, pixels: Array) -> Array:
        return (_sampled(pixels, self.inner) - IMAGENET_MEAN[:, None, None]) / IMAGENET_STD[:, None, None]

    def logits(self, low: Array) -> Array:
        (h, w), s = self.size, low.shape[0]
        return (_bicubic(s, w) @ (_bicubic(s, h) @ low).T).T

    def crop(self, low: Array) -> Crop:
        return Crop(self.logits(low) >= 0, (0, 0), self.size)  # everywhere: a cubic may be positive beside negative numbers


class GreyFrame(Frame):
    """YOLO's: the long side fills the square, bilinear without smoothing, values in 0..1, grey below or beside the picture.

    ultralytics centres the picture between two grey bands; here, as everywhere, it lies in the upper left corner.
    """

    def image(self, pixels: Array) -> Array:
        h, w = self.inner
        x = np.full((3, self.side, self.side), GREY, np.float32)
        x[:, :h, :w] = np.rint(255 * _sampled(pixels, (h, w))) / 255
        return x


@dataclass(frozen=True)
class Masks:
    """Instances of one image, best first; masks are compressed where they are born."""

    rle: list[dict]  # N times {"size": [h, w], "counts": str}, COCO compressed RLE
    box: Array  # (N, 4) float32 xyxy of the mask, original pixels
    area: Array  # (N,) int64 pixels
    predicted_iou: Array  # (N,) float32
    stability: Array  # (N,) float32
    score: Array  # (N,) float32 detector score (predicted IoU where there is no detector)
    label: Array  # (N,) int64 category id
    names: dict[int, str] = field(default_factory=dict)  # category id -> name
    prompt: Array | None = None  # (N,) int64 position of the prompt that each answers

    def __len__(self) -> int:
        return len(self.rle)

    def keep(self, index: Array) -> "Masks":
        """The instances at `index` (positions), in that order."""
        arrays = {n: getattr(self, n)[index] for n in ("box", "area", "predicted_iou", "stability", "score", "label")}
        prompt = None if self.prompt is None else self.prompt[index]
        return replace(self, rle=[self.rle[i] for i in index], prompt=prompt, **arrays)


@dataclass(frozen=True)
class Record:
    """The answer for one image: one JSON line, of which every output format is a projection."""

    image: Image
    masks: Masks
    plan: str = ""  # Plan.digest()
    seconds: dict[str, float] = field(default_factory=dict)  # by stage, this image's share of its batch
    depth: Array | None = None  # float32 (h', w') 0..1, near is 1; for drawing, not part of the JSON


class Detector(Protocol):
    def __call__(self, images: list[Image], text: Sequence[str] = ()) -> list[Boxes]: ...


class Depth(Protocol):
    def __call__(self, images: list[Image]) -> list[Array]: ...


class Network(Protocol):
    def encode(self, rgb: Any, depth: Any = None) -> Any: ...

    def decode(
        self, features: Any, owner: Any, points: Any, labels: Any, masks: Any = None, multimask: bool = True, best: bool = False
    ) -> Any: ...
