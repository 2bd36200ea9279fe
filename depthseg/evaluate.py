"""A model against COCO ground truth: boxes, clicks, or no prompt at all, by EfficientViT-SAM's published protocol.

Boxes are the annotations' own `bbox`, clicks go to the deepest point of the error, and the mean is over annotations, crowds
included. Beside the score of boxes stands what geometry alone gets: filled box and inscribed ellipse. Knows no output files.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image as PILImage

from depthseg import masks, metrics, prompts, sa1b
from depthseg.data import Failure, read, read_ahead
from depthseg.errors import NOTHING_TO_DO, DepthsegError
from depthseg.plan import Plan
from depthseg.schema import Array, Depth, Image, Prompts
from depthseg.segment import Segmenter, View

PROTOCOLS = {
    "box": "the annotation's bbox; crowds included; IoU at original resolution, mean over annotations",
    "point": "clicks at the deepest point of the error, no mask fed back; crowds included; mean over annotations",
    "offline": "no prompt from the truth: the plan's detector or grid; masks without classes, crowds left out",
}


def evaluate_depth(root: Path, depth: Depth, progress: Callable[[int, int], None] | None = None) -> dict:
    """AbsRel and delta1 of a depth estimator on the metric pairs of a folder `root`/rgb, `root`/depth with a manifest beside it.

    Beside it stands what needs no picture: one constant for all pixels, and a ramp from top (far) to bottom (near).
    """
    pairs = [p for p in sa1b.depth_pairs([root]) if p.kind == "metric"]
    if not pairs:
        raise DepthsegError(f"no metric depth below {root}", "Only metric maps can be scored.", NOTHING_TO_DO)
    rows: dict[str, list[tuple[float, float]]] = {"estimator": [], "ramp": [], "constant": []}
    for i, pair in enumerate(pairs, 1):
        image = read(Image(pair.rgb.name, i, pair.rgb, (0, 0)))
        truth = np.asarray(PILImage.open(pair.depth)).astype(np.float32)
        h, w = truth.shape
        (found,) = depth([image])
        guess = np.asarray(PILImage.fromarray(found).resize((w, h), PILImage.Resampling.BILINEAR))
        ramp = np.broadcast_to(np.linspace(0, 1, h)[:, None], (h, w))
        for name, inverse in (("estimator", guess), ("ramp", ramp), ("constant", np.zeros((h, w)))):
            rows[name].append(metrics.depth_errors(inverse, truth))
        if progress:
            progress(i, len(pairs))
    means = {name: np.mean(values, 0) for name, values in rows.items()}
    scores = {f"{name}_{what}": float(m[k]) for name, m in means.items() for k, what in enumerate(("abs_rel", "delta1"))}
    return {
        "protocol": "scale and shift fitted per image in inverse depth; mean over images",
        "images": len(pairs),
        "abs_rel": scores.pop("estimator_abs_rel"),
        "delta1": scores.pop("estimator_delta1"),
        **scores,
    }


@dataclass(frozen=True)
class Truth:
    """The annotations of one image."""

    image: Image
    rle: list[dict]  # N, original pixels
    box: Array  # (N, 4) xyxy, the bbox field
    area: Array  # (N,) the area field
    crowd: Array  # (N,) bool


def evaluate(
    images: Path,
    annotations: Path,
    *,
    plan: Plan,
    prompt: str = "box",
    clicks: tuple[int, ...] = (1, 3, 5),
    subset: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    segmenter: Segmenter | None = None,
) -> dict:
    """Scores in percent of `plan.model` on a folder of images with COCO instance annotations, as a dict of JSON values.

    prompt: a key of PROTOCOLS. clicks: scores after so many. subset: only the first so many images of the annotation file.
    progress: told (images done, images). segmenter: a ready-made one in place of the plan's.
    """
    if prompt not in PROTOCOLS:
        raise DepthsegError(f"no prompt is called '{prompt}'", f"Use one of {', '.join(PROTOCOLS)}.")
    if prompt == "point" and (not clicks or min(clicks) < 1):
        raise DepthsegError(f"no score after {clicks} clicks", "Name numbers from 1 up, like 1,3,5.")
    truths = read_truth(images, annotations, subset)
    if segmenter is None:  # the detector is not built where it is not asked
        segmenter = Segmenter(plan) if prompt == "offline" else Segmenter(plan, source=lambda images: [])
    start = time.perf_counter()
    tell = progress or (lambda done, total: None)
    if prompt == "box":
        scores = _boxes(segmenter, truths, tell)
    elif prompt == "point":
        scores = _clicks(segmenter, truths, tell, clicks)
    else:
        scores = _offline(segmenter, truths, tell)
    return {
        "protocol": PROTOCOLS[prompt] + ("; each box on a crop of its own (zoom)" if segmenter.zoom and prompt != "point" else ""),
        "images": len(truths),
        "annotations": sum(len(t.rle) for t in truths),
        **scores,
        "seconds": time.perf_counter() - start,
        "notes": segmenter.notes,
        "model": segmenter.provenance,
        "plan": plan.to_json(),
    }


def read_truth(images: Path, annotations: Path, subset: int | None = None) -> list[Truth]:
    """The annotations of each image of a COCO instances file, those of less than one pixel left out; no pixels are read.

    An image is looked for by its file_name below `images`, then by the last part of it, then by its id in twelve digits.
    """
    try:
        table = json.loads(Path(annotations).read_text())
        listed = sorted(table["images"], key=lambda row: row["id"])[:subset]
        rows: dict[int, list[dict]] = {row["id"]: [] for row in listed}
        for row in table["annotations"]:
            if row["image_id"] in rows and row.get("area", 1) >= 1:
                rows[row["image_id"]].append(row)
        sizes = {row["id"]: (int(row["height"]), int(row["width"])) for row in listed}
        rles = {i: [masks.of_coco(row["segmentation"], sizes[i]) for row in found] for i, found in rows.items()}
        boxes = {i: np.array([row["bbox"] for row in found], np.float32).reshape(-1, 4) for i, found in rows.items()}
    except OSError as error:
        raise DepthsegError(f"cannot read {annotations} ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DepthsegError(
            f"{annotations} is not a COCO instances file ({reason})", "It needs images and annotations with masks."
        ) from error
    if not listed:
        raise DepthsegError(f"{annotations} lists no images")
    truths = []
    for row in listed:
        i, found = row["id"], rows[row["id"]]
        image = Image(str(row.get("file_name", i)), i, _locate(Path(images), row), sizes[i])
        xywh = boxes[i]
        area = np.array([a.get("area", masks.area([rle])[0]) for a, rle in zip(found, rles[i])], float)
        crowd = np.array([bool(a.get("iscrowd", 0)) for a in found], bool)
        truths.append(Truth(image, rles[i], np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1), area, crowd))
    return truths


def _locate(folder: Path, row: dict) -> Path:
    name = str(row.get("file_name", ""))
    for path in (folder / name, folder / Path(name).name):
        if name and path.is_file():
            return path
    for path in folder.glob(f"{row['id']:012d}.*"):
        return path
    raise DepthsegError(f"the image {name or row['id']} is not in {folder}", "Give the folder that the annotations are about.")


def _read(truths: list[Truth], batch: int) -> Iterator[list[tuple[Truth, Image]]]:
    """The truths with their images read, by batch. An image that cannot be read would falsify a score: it ends the run."""
    pairs = zip(truths, read_ahead(t.image for t in truths))
    while some := list(islice(pairs, batch)):
        for truth, image in some:
            if isinstance(image, Failure):
                raise DepthsegError(f"the image {truth.image.key} cannot be read: {image.reason}")
            if image.size != truth.image.size:
                raise DepthsegError(f"the image {image.key} has {image.size} pixels, its annotations say {truth.image.size}")
        yield [(truth, image) for truth, image in some if isinstance(image, Image)]


def _views(segmenter: Segmenter, images: list[Image]) -> list[View]:
    return [View(image.pixels, depth, image.size) for image, depth in zip(images, segmenter.depths(images)) if image.pixels is not None]


def _boxes(segmenter: Segmenter, truths: list[Truth], progress: Callable[[int, int], None]) -> dict:
    iou, predicted, ellipse, box, done = [], [], [], [], 0
    for some in _read(truths, segmenter.plan.batch):
        asked = [Prompts.of(boxes=truth.box) for truth, _ in some]
        answers = segmenter.masks_for(_views(segmenter, [image for _, image in some]), asked)
        for (truth, _), found in zip(some, answers):
            iou.append(metrics.mask_iou(truth.rle, [a.rle for a in found]))
            predicted += [a.predicted_iou for a in found]
            ellipse.append(metrics.mask_iou(truth.rle, [inscribed_ellipse(b, truth.image.size) for b in truth.box]))
            box.append(metrics.mask_iou(truth.rle, [filled_box(b, truth.image.size) for b in truth.box]))
        progress(done := done + len(some), len(truths))
    area = np.concatenate([t.area for t in truths])
    scored = np.concatenate(iou)
    return {
        **metrics.miou(scored, area),
        "iou_correlation": _correlation(scored, np.array(predicted)),
        "baseline_ellipse": metrics.miou(np.concatenate(ellipse), area)["miou"],
        "baseline_box": metrics.miou(np.concatenate(box), area)["miou"],
    }


def _clicks(segmenter: Segmenter, truths: list[Truth], progress: Callable[[int, int], None], clicks: tuple[int, ...]) -> dict:
    """Features once for each image, then rounds: the scores after 1, 3 and 5 clicks come out of one pass of five."""
    scores: dict[int, list[Array]] = {n: [] for n in clicks}
    done = 0
    for some in _read(truths, segmenter.plan.batch):
        encoded = segmenter.encode(_views(segmenter, [image for _, image in some]), segmenter.network.side)
        wanted = [[masks.decode(rle) for rle in truth.rle] for truth, _ in some]
        seen = [[np.zeros_like(mask) for mask in those] for those in wanted]
        xy = [np.zeros((len(those), 0, 2), np.int64) for those in wanted]
        signs = [np.zeros((len(those), 0), np.int64) for those in wanted]
        for n in range(1, max(clicks) + 1):
            for v, those in enumerate(wanted):
                new = [prompts.next_click(mask, seen[v][i], xy[v][i]) for i, mask in enumerate(those)]
                added = np.array(new, np.int64).reshape(-1, 1, 3)  # x, y, positive
                xy[v], signs[v] = np.concatenate([xy[v], added[..., :2]], 1), np.concatenate([signs[v], added[..., 2]], 1)
            answers = segmenter.decode(encoded, [Prompts.of(points=p, signs=s) for p, s in zip(xy, signs)])
            seen = [[masks.decode(a.rle) for a in found] for found in answers]
            if n in scores:
                scores[n] += [metrics.mask_iou(t.rle, [a.rle for a in found]) for (t, _), found in zip(some, answers)]
        progress(done := done + len(some), len(truths))
    area = np.concatenate([t.area for t in truths])
    return {
        name.replace("miou", f"miou_{n}"): value for n in clicks for name, value in metrics.miou(np.concatenate(scores[n]), area).items()
    }


def _offline(segmenter: Segmenter, truths: list[Truth], progress: Callable[[int, int], None]) -> dict:
    found: list[tuple[list[dict], Array]] = []
    for done, (truth, answer) in enumerate(zip(truths, segmenter.segment(t.image for t in truths)), 1):
        if isinstance(answer, Failure):
            raise DepthsegError(f"the image {truth.image.key} failed at {answer.stage}: {answer.reason}")
        found.append((answer.masks.rle, answer.masks.score))
        progress(done, len(truths))
    things = [[rle for rle, crowd in zip(t.rle, t.crowd) if not crowd] for t in truths]
    return {**metrics.class_agnostic(things, found), "masks": sum(len(rle) for rle, _ in found)}


def filled_box(box: Array, size: tuple[int, int]) -> dict:
    """The RLE of the pixels whose centres lie in the box (4,)."""
    x, y = (np.arange(size[1]) + 0.5), (np.arange(size[0]) + 0.5)[:, None]
    return masks.encode((x >= box[0]) & (x <= box[2]) & (y >= box[1]) & (y <= box[3]))


def inscribed_ellipse(box: Array, size: tuple[int, int]) -> dict:
    """The RLE of the pixels whose centres lie in the ellipse that touches the sides of the box (4,)."""
    (cx, cy), (rx, ry) = (box[:2] + box[2:]) / 2, np.maximum(box[2:] - box[:2], 1e-6) / 2
    x, y = (np.arange(size[1]) + 0.5), (np.arange(size[0]) + 0.5)[:, None]
    return masks.encode(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1)


def _correlation(a: Array, b: Array) -> float | None:
    """Pearson's; None where it is not defined."""
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 and a.std() > 0 and b.std() > 0 else None
