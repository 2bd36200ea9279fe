"""Answers as pictures: the overlay that people look at, label maps and one-bit instances; and how a file is written whole.

Pillow and NumPy only. Knows the layout of the pictures below an output folder by their names, but neither journal nor plan.
"""

import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw, ImageFont

from depthseg import masks as rles
from depthseg.schema import Array, Masks

_FILL = 0.45  # opacity of a mask's colour
PACK = "pack.json"  # what a folder of `data pack` says of itself
LONG_SIDE = (512, 1600)  # working resolution of overlays, pixels: text stays readable, files stay small
_MAX_TAGS = 25  # more labels than this hide the picture
# Far to near: black, violet, red, orange, pale yellow; lightness rises evenly, so that nearness reads in grey as well.
_RAMP = np.array(
    [
        (0, 0, 8),
        (30, 12, 70),
        (82, 16, 108),
        (135, 33, 106),
        (188, 55, 84),
        (227, 90, 49),
        (249, 140, 14),
        (249, 200, 50),
        (252, 254, 175),
    ]
)


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder that takes the place of `path` at the end, or goes away after an exception.

    The name depends on `path` alone: what a killed process left behind is overwritten by the next one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f".{zlib.crc32(path.name.encode(errors='surrogateescape')):08x}.part"
    try:
        yield part
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextmanager
def text_file(path: Path) -> Iterator[IO[str]]:
    """A file of text, UTF-8, lines ended by \\n, that appears when it is whole; what is no Unicode becomes a question mark."""
    with atomic(path) as part, open(part, "w", encoding="utf-8", errors="replace", newline="\n") as file:
        yield file


def overlay_name(key: str) -> str:
    """File name of an overlay, always JPEG: a JPEG key keeps its name, others get .jpg behind it, so that no two collide."""
    stem, _, extension = key.rpartition(".")
    clear = re.search(r"\.(jpe?g|png|bmp|tiff?|webp|gif|p[pg]m)$", stem, re.IGNORECASE) is None  # a.png and a.png.jpg differ
    return key if extension.lower() in ("jpg", "jpeg") and clear else f"{key}.jpg"


def palette(n: int) -> Array:
    """n colours, uint8 RGB (n, 3); colour i is the same for every n, and far in hue from its neighbours."""
    i = np.arange(n)
    hue = 2 * np.pi * ((0.62 + i * 0.6180339887) % 1)  # the golden ratio never comes back near a hue soon
    light = np.array([0.76, 0.68, 0.83])[i % 3]
    a, b = 0.17 * np.cos(hue), 0.17 * np.sin(hue)
    # OKLab to linear sRGB (Ottosson 2020): equal steps look equal, so that no colour shouts.
    lms = np.stack([
        light + 0.3963377774 * a + 0.2158037573 * b,
        light - 0.1055613458 * a - 0.0638541728 * b,
        light - 0.0894841775 * a - 1.2914855480 * b,
    ]) ** 3  # fmt: skip
    matrix = np.array([
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ])  # fmt: skip
    linear = np.clip(matrix @ lms, 0, 1).T
    rgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (rgb * 255 + 0.5).astype(np.uint8)


def overlay(pixels: Array, masks: Masks, depth: Array | None = None) -> PILImage.Image:
    """The picture with tinted, outlined and labelled instances; with `depth` (0..1, near is 1) a panel of it to the right.

    pixels: uint8 RGB (h, w, 3), of the masks' size or fewer. The long side of the answer is between 512 and 1600 pixels, whatever theirs.
    """
    h, w = pixels.shape[:2]
    scale = float(np.clip(max(h, w), *LONG_SIDE)) / max(h, w)
    size = max(1, round(w * scale)), max(1, round(h * scale))
    picture = PILImage.fromarray(pixels)
    if size != (w, h):
        picture = picture.resize(size, PILImage.Resampling.LANCZOS if scale < 1 else PILImage.Resampling.BICUBIC, reducing_gap=3)
    canvas = np.array(picture)
    colours = palette(len(masks))
    line = max(size) / 400
    tops = {}  # instance -> x, y of its highest row's middle
    for i in np.argsort(-masks.area, kind="stable"):  # small ones over large ones
        found = _coverage(masks.rle[i], masks.box[i], size, margin=2 * round(line) + 2)
        if found is not None:
            cover, x, y = found
            thin = math.sqrt(masks.area[i]) * size[0] / masks.rle[i]["size"][1] / 12  # an outline must not fill a small instance
            window = canvas[y : y + cover.shape[0], x : x + cover.shape[1]]
            _paint(window, cover, colours[i], max(1, round(min(line, thin))))
            row = int(np.argmax(cover.max(1) > 127))
            tops[i] = x + int(np.median(np.flatnonzero(cover[row] >= cover[row].max()))), y + row
    picture = PILImage.fromarray(canvas)
    _tag(picture, masks, colours, tops)
    return picture if depth is None else _beside(picture, depth)


def _coverage(rle: dict, box: Array, size: tuple[int, int], margin: int) -> tuple[Array, int, int] | None:
    """How far the mask covers each pixel of the canvas around it, uint8 (h', w'), and where that window lies (x, y)."""
    h, w = rle["size"]
    if box[2] <= box[0] or box[3] <= box[1]:
        return None
    sx, sy = size[0] / w, size[1] / h
    x0, y0 = max(0, math.floor(box[0] * sx) - margin), max(0, math.floor(box[1] * sy) - margin)
    x1, y1 = min(size[0], math.ceil(box[2] * sx) + margin), min(size[1], math.ceil(box[3] * sy) + margin)
    left, top, right, bottom = math.floor(x0 / sx), math.floor(y0 / sy), math.ceil(x1 / sx), math.ceil(y1 / sy)
    mask = PILImage.fromarray(rles.decode(rle)[top:bottom, left:right].astype(np.uint8) * 255)
    source = (x0 / sx - left, y0 / sy - top, min(x1 / sx - left, mask.width), min(y1 / sy - top, mask.height))
    cover = np.asarray(mask.resize((x1 - x0, y1 - y0), PILImage.Resampling.BILINEAR, source))
    if sx > 1:  # enlarged: the blur of the interpolation, narrowed to one pixel
        cover = np.clip((cover - 127.5) * sx + 127.5, 0, 255).astype(np.uint8)
    return (cover, x0, y0) if cover.max() > 127 else None


def _grow(cover: Array, steps: int) -> Array:
    """Grey dilation by an octagon of radius `steps` pixels: crosses and squares in turn."""
    for step in range(steps):
        p = np.pad(cover, 1, mode="edge")
        wide = np.maximum(np.maximum(p[:, :-2], p[:, 2:]), p[:, 1:-1])
        rows = wide if step % 2 else p[:, 1:-1]
        cover = np.maximum(np.maximum(rows[:-2], rows[2:]), wide[1:-1])
    return cover


def _paint(window: Array, cover: Array, colour: Array, line: int) -> None:
    """Tint and outline one instance in place: its colour inside, a bright line on its edge, a thin dark one outside that."""
    inner = 255 - _grow(255 - cover, line)
    dark = (_grow(cover, max(1, line // 2)) - cover) * np.float32(0.5 / 255)
    edge = (cover - inner) * np.float32(0.95 / 255)
    fill = cover * np.float32(_FILL / 255) * (1 - edge)
    bright = (0.55 * colour + 0.45 * 255).astype(np.float32)
    out = window * (1 - (dark + edge + fill))[..., None]
    out += fill[..., None] * colour + edge[..., None] * bright
    window[:] = np.clip(out + 0.5, 0, 255)


def _tag(picture: PILImage.Image, masks: Masks, colours: Array, tops: dict[int, tuple[int, int]]) -> None:
    """Label and score on small rounded tags near each instance's top, inside the picture and not on one another."""
    width, height = picture.size
    font = ImageFont.load_default(size=max(12, round(max(picture.size) / 62)))
    ascent, descent = _metrics(font)
    pad = max(3, round(ascent * 0.34))
    tall = ascent + descent + 2 * (pad // 2)
    placed: list[tuple[int, int, int, int]] = []
    importance = np.sqrt(masks.area) * masks.score
    for i in sorted(tops, key=lambda i: -importance[i])[:_MAX_TAGS]:
        name = " ".join(masks.names.get(int(masks.label[i]), "").split())[:40]
        text = f"{name} {masks.score[i]:.2f}".strip()
        wide = math.ceil(font.getlength(text)) + 2 * pad
        x, y = tops[i]
        boxes = []
        for down in (-tall - 2, 3, -2 * tall - 4, tall + 6):  # on the edge, inside it, then further away
            for right in (0, -wide // 2, wide // 2):
                left = max(2, min(x - wide // 2 + right, width - wide - 2))
                top = max(2, min(y + down, height - tall - 2))
                boxes.append((left, top, left + wide, top + tall))
        best = min(boxes, key=lambda box: sum(_overlap(box, other) for other in placed))  # the first of equals
        placed.append(best)
        plate = tuple(int(c) for c in colours[i])
        picture.paste(plate, best[:2], _plate(wide, tall))
        draw = ImageDraw.Draw(picture)
        draw.text((best[0] + pad, best[1] + pad // 2), text, (12, 12, 16), font)


def _metrics(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> tuple[int, int]:
    """Pixels above and below the base line; the bitmap font of a Pillow without FreeType is 11 pixels high."""
    return font.getmetrics() if isinstance(font, ImageFont.FreeTypeFont) else (9, 2)


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> int:
    """Pixels that two boxes share, with a gap of one pixel around."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0]) + 1) * max(0, min(a[3], b[3]) - max(a[1], b[1]) + 1)


@lru_cache(maxsize=256)
def _plate(width: int, height: int) -> PILImage.Image:
    """Mask of a rounded rectangle with smooth edges: drawn four times as large, then reduced."""
    big = PILImage.new("L", (4 * width, 4 * height))
    ImageDraw.Draw(big).rounded_rectangle((0, 0, 4 * width - 1, 4 * height - 1), height, 240)
    return big.resize((width, height), PILImage.Resampling.BOX)


def _beside(picture: PILImage.Image, depth: Array) -> PILImage.Image:
    """The picture, a thin gap, and the depth map with a key of its colours."""
    width, height = picture.size
    gap = max(2, max(picture.size) // 200)
    out = PILImage.new("RGB", (2 * width + gap, height), (255, 255, 255))
    out.paste(picture)
    near = PILImage.fromarray(np.nan_to_num(depth).astype(np.float32)).resize(picture.size, PILImage.Resampling.BILINEAR)
    panel = PILImage.fromarray(ramp(np.asarray(near)))
    font = ImageFont.load_default(size=max(12, round(max(picture.size) / 62)))
    ascent, descent = _metrics(font)
    tall, pad, bar = ascent + descent, max(4, ascent // 2), ascent * 6
    ends = [math.ceil(font.getlength(text)) for text in ("far", "near")]
    wide = sum(ends) + bar + 4 * pad
    if wide + 2 * pad < width and tall + 3 * pad < height:
        x, y = pad, height - tall - 2 * pad
        panel.paste((12, 12, 16), (x, y), _plate(wide, tall + pad))
        draw = ImageDraw.Draw(panel)
        draw.text((x + pad, y + pad // 2), "far", (240, 240, 240), font)
        draw.text((x + wide - pad - ends[1], y + pad // 2), "near", (240, 240, 240), font)
        colours = ramp(np.tile(np.linspace(0, 1, bar, dtype=np.float32), (max(3, ascent * 2 // 3), 1)))
        panel.paste(PILImage.fromarray(colours), (x + 2 * pad + ends[0], y + (tall + pad - colours.shape[0]) // 2))
    out.paste(panel, (width + gap, 0))
    return out


def ramp(values: Array) -> Array:
    """0..1 (h, w) -> uint8 RGB (h, w, 3), brighter is more."""
    at = np.linspace(0, len(_RAMP) - 1, 256)
    table = np.stack([np.interp(at, np.arange(len(_RAMP)), channel) for channel in _RAMP.T], 1).astype(np.uint8)
    return table[(np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8)]


def write_overlay(path: Path, pixels: Array, masks: Masks, depth: Array | None = None) -> None:
    """The overlay as JPEG."""
    with atomic(path) as part:
        overlay(pixels, masks, depth).save(part, "JPEG", quality=90)


def write_label_map(path: Path, masks: Masks, size: tuple[int, int]) -> None:
    """A PNG of `size` (h, w) whose pixels are 0 outside and i + 1 on instance i, with a palette; 16 bit above 255 instances."""
    labels = rles.label_map(masks.rle, size)
    if len(masks) <= 255:
        picture = PILImage.fromarray(labels.astype(np.uint8))
        picture.putpalette(np.concatenate([np.zeros((1, 3), np.uint8), palette(len(masks))]).tobytes())
    else:
        picture = PILImage.fromarray(labels)
    with atomic(path) as part:
        picture.save(part, "PNG")


def instance_name(masks: Masks, i: int) -> str:
    """File name of one instance: its position, class and score."""
    name = re.sub(r"[^\w-]+", "_", masks.names.get(int(masks.label[i]), "")).strip("_")[:40] or "object"
    return f"{i:03d}_{name}_{masks.score[i]:.2f}.png"


def write_instances(folder: Path, masks: Masks) -> None:
    """One 1-bit PNG for each mask: position, label and score in the name. PNGs of an earlier answer go away."""
    if folder.is_dir():
        for old in folder.glob("*.png"):
            old.unlink()
    for i, rle in enumerate(masks.rle):
        with atomic(folder / instance_name(masks, i)) as part:
            PILImage.fromarray(rles.decode(rle)).save(part, "PNG")
