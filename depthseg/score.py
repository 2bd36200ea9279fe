"""From ground truth and predictions to a report: metrics, their intervals, and where the errors come from. No model, no pixels."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

import numpy as np

from depthseg import ap, fates, masks, metrics, published
from depthseg.data import Failure
from depthseg.errors import NOTHING_TO_DO, DepthsegError
from depthseg.protocols import PROTOCOLS, in_words
from depthseg.schema import Array
from depthseg.truth import Dataset, Truth

RANKS = {"detector": "the score of the box", "predicted_iou": "predicted IoU", "product": "score x predicted IoU"}
WHOLE = {"coco": 5000, "lvis": 19809}  # images of COCO val2017 and LVIS v1 val, on which others published figures
MOST_CLICKS = 100
DRAWS = 1000  # of the bootstrap
AP_DRAWS, AP_IMAGES = 100, 500  # an AP has to be computed anew for each draw: fewer, and none for more images
CROWDING = ((1, 2), (3, 7), (8, 15), (16, None))  # masks in one picture
CONTRAST = (0.02, 0.1)  # bounds between flat, middling and clear jumps of depth at a mask's boundary
BINS = 20


@dataclass(frozen=True)
class Request:
    """What is asked of a model, and how the answers become numbers, beside the Plan."""

    prompt: str = "box"  # box, point or detector
    clicks: tuple[int, ...] = ()  # point: masks are kept after so many
    protocol: str = "official"  # a key of PROTOCOLS
    seed: int = 0  # of random clicks
    rank: str = "detector"  # a key of RANKS
    agnostic: bool = False  # detector: classes count for nothing
    threshold: float = 0.0  # agnostic: recall and precision are of predictions with this score or more

    def __post_init__(self) -> None:
        if self.prompt not in ("box", "point", "detector"):
            raise DepthsegError(f"no prompt is called '{self.prompt}'", "Use box, point or detector.")
        if self.prompt == "point" and (not self.clicks or min(self.clicks) < 1 or max(self.clicks) > MOST_CLICKS):
            raise DepthsegError(f"no score after {self.clicks} clicks", f"Name numbers from 1 to {MOST_CLICKS}, like 1,3,5.")
        if self.seed < 0:
            raise DepthsegError(f"the seed {self.seed} is negative", "Use 0 or more.")

    def scored(self, dataset: Dataset, results: Sequence[dict]) -> "Scored":
        if self.prompt == "detector":
            return detected(dataset, results, self.rank, self.agnostic, self.threshold)
        return prompted(dataset, results, self.protocol, self.clicks)


def names_of(ask: Request, kind: str) -> list[str]:
    """The metrics that such a request gives on a data set of this kind."""
    if ask.prompt == "detector":
        engine = list(ap.LVIS_NAMES.values()) if kind == "lvis" and not ask.agnostic else list(ap.COCO_NAMES)
        return [*engine, "predictions", "recall_50", "precision_50"]
    means = [*(f"miou_{n}" for n in ask.clicks), *([] if ask.clicks else ["miou"]), "boundary_iou"]
    by_size = [f"{name}{size}" for name in means for size in ("", "_small", "_medium", "_large")]
    return [*by_size, "iou_correlation", *([] if ask.clicks else ["baseline_box", "baseline_ellipse"])]


class Scored(NamedTuple):
    """The parts of a report, and what single masks scored."""

    report: dict  # JSON values: metrics, intervals, per_class, slices, histogram, calibration, pr, errors, warnings, engine
    table: dict[str, Array]  # columns of equal length: image_id, and iou as fractions, of the last click if there are several


def prompted(dataset: Dataset, results: Sequence[dict], protocol: str, clicks: Sequence[int] = ()) -> Scored:
    """Scores of masks that answer the prompts of annotations: mIoU by the protocol's rules, after so many clicks if any are named.

    Each result has annotation_id and, with clicks, their number. A prompt without a result scores 0.
    Beside boxes stands what geometry alone gets from them: the filled box and the inscribed ellipse.
    """
    rules = PROTOCOLS[protocol]
    asked = [rules.asked(t) for t in dataset.truths]
    answers: dict[tuple[int, int], dict] = {}
    for r in results:
        if "annotation_id" not in r:
            continue
        key = (r["annotation_id"], r.get("clicks", 0))
        if key in answers:
            raise DepthsegError(f"two predictions answer annotation {key[0]}", "Give the predictions of one run.")
        answers[key] = r
    rounds = list(clicks) or [0]
    ids = np.concatenate([t.id for t in asked]) if asked else np.zeros(0, np.int64)
    missing = sum((i, n) not in answers for i in ids.tolist() for n in rounds)
    if not len(ids):
        raise DepthsegError(f"{dataset.file} has no mask to ask for under these rules", "Choose other images or rules.", NOTHING_TO_DO)
    if results and missing == len(ids) * len(rounds):
        raise DepthsegError("no prediction answers a prompt", "They need annotation_id" + (" and clicks." if clicks else "."))
    empty = [masks.encode(np.zeros(t.image.size, bool)) for t in asked]
    found = [[[answers.get((i, n), {"segmentation": nothing}) for i in t.id.tolist()] for t, nothing in zip(asked, empty)] for n in rounds]
    ious = [_join([metrics.mask_iou(t.rle, [r["segmentation"] for r in some]) for t, some in zip(asked, last)]) for last in found]
    rims = _join([metrics.boundary_iou(t.rle, [r["segmentation"] for r in some]) for t, some in zip(asked, found[-1])])
    area, predicted = _join([t.area for t in asked]), _field(found[-1], "predicted_iou")
    image = _join([np.full(len(t), t.image.id) for t in asked]).astype(np.int64)
    names = [f"miou_{n}" if n else "miou" for n in rounds]
    scores = {
        name.replace("miou", of): value for of, some in zip(names, ious) for name, value in metrics.miou(some, area, rules.shared).items()
    }
    scores |= {k.replace("miou", "boundary_iou"): v for k, v in metrics.miou(rims, area, rules.shared).items()}
    known = ~np.isnan(predicted)
    scores["iou_correlation"] = _correlation(ious[-1][known], predicted[known])
    table = {"image_id": image, "annotation_id": ids, "area": area, "iou": ious[-1], "boundary_iou": rims}
    if clicks:
        table |= {f"iou_{n}": some for n, some in zip(rounds, ious)}
    else:
        for name, shape in (("baseline_box", filled_box), ("baseline_ellipse", inscribed_ellipse)):
            alone = [metrics.mask_iou(t.rle, [shape(b, t.image.size) for b in rules.boxes(t)]) for t in asked]
            scores[name] = metrics.miou(_join(alone), area)["miou"]
    return Scored(
        {
            "metrics": scores,
            "intervals": {name: interval(ids_of(dataset), image, some) for name, some in zip(names, ious) if len(some)},
            "per_class": _classes(dataset, _join([t.label for t in asked]).astype(int), ious[-1]),
            "slices": _slices(asked, ious[-1], names[-1], _field(found[-1], "depth_contrast")),
            "histogram": _histogram(ious[-1]),
            "calibration": _calibration(predicted[known], ious[-1][known]),
            "warnings": [f"{missing} prompts have no prediction and count as 0"] if missing else [],
        },
        table,
    )


def detected(dataset: Dataset, results: Sequence[dict], rank: str = "detector", agnostic: bool = False, threshold: float = 0) -> Scored:
    """Scores of detections: COCO's or LVIS' AP and AR, ranked by one of RANKS, and what became of truths and predictions.

    agnostic: all classes count as one, by COCO's rules. threshold: as in ap.coco. Results may have `prompt_box` (xywh); without it a
    mask's own box stands in.
    """
    by_score = ranked(results, rank)
    as_lvis = dataset.kind == "lvis" and not agnostic
    draws = _draws(len(dataset.truths), AP_DRAWS) if len(dataset.truths) <= AP_IMAGES else None
    parts = ap.lvis(dataset, by_score) if as_lvis else ap.coco(dataset, by_score, agnostic, threshold, draws)
    drawn = parts.pop("drawn", None)
    spoken = {r["image_id"] for r in results}
    silent = [t.image.key for t in dataset.truths if len(t) and t.image.id not in spoken]
    errors, image, best = fates.errors(dataset, by_score, agnostic)
    return Scored(
        {
            **parts,
            "metrics": {**parts["metrics"], "predictions": len(results)},
            "intervals": {} if drawn is None else {"ap": _bounds(drawn)},
            "errors": errors,
            "histogram": _histogram(best),
            "warnings": [f"{len(silent)} of {len(dataset.truths)} images have no prediction, like {silent[0]}"] if silent else [],
        },
        {"image_id": image, "iou": best},
    )


def ranked(results: Sequence[dict], rank: str) -> list[dict]:
    """The results with the score that one of RANKS means."""
    if rank != "detector" and (without := sum(r.get("predicted_iou") is None for r in results)):
        raise DepthsegError(f"{without} predictions have no predicted_iou", "Rank them by --score detector.")
    own = {
        "detector": lambda r: r["score"],
        "predicted_iou": lambda r: r["predicted_iou"],
        "product": lambda r: r["score"] * r["predicted_iou"],
    }[rank]
    return [{**r, "score": own(r)} for r in results]


def by_image(table: dict[str, Array]) -> dict[int, float]:
    """Mean IoU in percent by image id, from the columns of Scored.table."""
    ids, at = np.unique(table["image_id"], return_inverse=True)
    means = 100 * np.bincount(at, table["iou"], len(ids)) / np.maximum(np.bincount(at, minlength=len(ids)), 1)
    return dict(zip(ids.tolist(), means.tolist()))


def ids_of(dataset: Dataset) -> Array:
    """The image ids, ascending."""
    return np.array([t.image.id for t in dataset.truths])


def _join(parts: Sequence[Array]) -> Array:
    return np.concatenate(parts) if len(parts) else np.zeros(0)


def _field(found: Sequence[Sequence[dict]], name: str) -> Array:
    """A number of every result, NaN where it has none."""
    return np.array([np.nan if (v := r.get(name)) is None else v for some in found for r in some], float)


def _correlation(a: Array, b: Array) -> float | None:
    """Pearson's; None where it is not defined."""
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 and a.std() > 0 and b.std() > 0 else None


def _classes(dataset: Dataset, label: Array, iou: Array) -> list[dict]:
    return [
        {
            "id": i,
            "name": dataset.names.get(i, str(i)),
            "frequency": dataset.frequency.get(i),
            "masks": int((label == i).sum()),
            "miou": float(100 * iou[label == i].mean()),
        }
        for i in sorted(set(label.tolist()))
    ]


def _slices(asked: Sequence[Truth], iou: Array, metric: str, contrast: Array) -> list[dict]:
    company = _join([np.full(len(t), len(t)) for t in asked])
    crowded = [(f"{a} or more" if b is None else f"{a} to {b}", (company >= a) & (company <= (b or np.inf))) for a, b in CROWDING]
    flat, clear = CONTRAST
    jumps = [
        (f"under {flat}", contrast < flat),
        (f"{flat} to {clear}", (contrast >= flat) & (contrast < clear)),
        (f"{clear} or more", contrast >= clear),
    ]
    return [
        {"by": by, "metric": metric, "rows": rows}
        for by, parts in (("masks in the picture", crowded), ("jump of depth at the boundary (0 to 1)", jumps))
        if (rows := [{"name": n, "masks": int(p.sum()), "value": float(100 * iou[p].mean())} for n, p in parts if p.any()])
    ]


def _histogram(iou: Array) -> dict:
    counts, edges = np.histogram(iou, BINS, (0, 1))
    return {"edges": np.round(edges, 4).tolist(), "counts": counts.tolist()}


def _calibration(predicted: Array, true: Array) -> dict | None:
    """Mean predicted and true IoU in ten bins of the predicted one."""
    if not len(predicted):
        return None
    at = np.clip((predicted * 10).astype(int), 0, 9)
    rows = [(predicted[at == k], true[at == k]) for k in range(10)]
    mean = [[float(values.mean()) if len(values) else None for values in pair] for pair in rows]
    return {"predicted": [a for a, _ in mean], "true": [b for _, b in mean], "counts": [len(a) for a, _ in rows]}


# ---- intervals: images are drawn with replacement, for masks of one image are not independent ----


def _draws(images: int, times: int) -> Array:
    """Positions of images, (times, images)."""
    return np.random.default_rng(0).integers(0, images, (times, images))


def _bounds(values: Array) -> list[float] | None:
    """The middle 95 percent."""
    values = values[np.isfinite(values)]
    return [float(v) for v in np.percentile(values, [2.5, 97.5])] if len(values) else None


def interval(ids: Array, image: Array, iou: Array) -> list[float] | None:
    """95 % interval in percent of the mean of fractions (N,), or of differences of two runs: then it is a paired one.

    ids: of all images, ascending; image: that of each mask (N,).
    """
    at = np.searchsorted(ids, image)
    total, count = np.bincount(at, iou, len(ids)), np.bincount(at, minlength=len(ids))
    sums = np.array([(total[drawn].sum(), count[drawn].sum()) for drawn in _draws(len(ids), DRAWS)])  # one by one: LVIS is large
    with np.errstate(invalid="ignore"):  # a draw without any mask is left out
        return _bounds(100 * sums[:, 0] / sums[:, 1])


def paired_miou(ids: Array, ask: Request, a: dict[str, Array], b: dict[str, Array]) -> dict[str, list[float] | None]:
    """95 % intervals of a - b by metric, from the columns of Scored.table; ids: of all images, ascending."""
    columns = {f"miou_{n}": f"iou_{n}" for n in ask.clicks} or {"miou": "iou"}
    columns["boundary_iou"] = "boundary_iou"
    return {name: interval(ids, a["image_id"], a[c] - b[c]) for name, c in columns.items()}


def paired_ap(dataset: Dataset, ask: Request, a: Sequence[dict], b: Sequence[dict]) -> dict[str, list[float] | None]:
    """95 % interval of the difference of COCO's AP of two sets of results, on the same draws; nothing for LVIS or many images."""
    if (dataset.kind == "lvis" and not ask.agnostic) or len(dataset.truths) > AP_IMAGES:
        return {}
    draws = _draws(len(dataset.truths), AP_DRAWS)
    first, second = (ap.resampled(dataset, ranked(results, ask.rank), draws, ask.agnostic) for results in (a, b))
    return {"ap": _bounds(first - second)}


# ---- what geometry alone gets from a box ----


def filled_box(box: Array, size: tuple[int, int]) -> dict:
    """The RLE of the pixels whose centres lie in the box (4,)."""
    return _shape(box, size, lambda x, y: (x >= box[0]) & (x <= box[2]) & (y >= box[1]) & (y <= box[3]))


def inscribed_ellipse(box: Array, size: tuple[int, int]) -> dict:
    """The RLE of the pixels whose centres lie in the ellipse that touches the sides of the box (4,)."""
    (cx, cy), (rx, ry) = (box[:2] + box[2:]) / 2, np.maximum(box[2:] - box[:2], 1e-6) / 2
    return _shape(box, size, lambda x, y: ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1)


def _shape(box: Array, size: tuple[int, int], inside: Callable[[Array, Array], Array]) -> dict:
    """The RLE of the pixels in the box's window for whose centres `inside` (x, y) holds."""
    out = np.zeros(size, bool)
    x0, y0 = np.clip(np.floor(box[:2]), 0, None).astype(int)
    x1, y1 = np.ceil(np.maximum(box[2:], 0)).astype(int)
    window = out[y0:y1, x0:x1]
    h, w = window.shape
    window[:] = inside(np.arange(x0, x0 + w) + 0.5, (np.arange(y0, y0 + h) + 0.5)[:, None])
    return masks.encode(out)


# ---- the report ----


def report(
    dataset: Dataset,
    scored: Scored,
    ask: Request,
    *,
    zoom: bool = False,
    single: bool = False,
    refine: str = "none",
    model: str = "",
    detector: str = "",
    failed: Sequence[Failure] = (),
    warnings: Sequence[str] = (),
    seconds: Sequence[dict[str, float]] = (),
    peak: float | None = None,
    device: str = "",
    provenance: dict | None = None,
) -> dict:
    """The one object behind report.json, report.md and the page, of JSON values.

    zoom, single, refine: as in protocols.in_words. seconds: by stage, of each image. peak: memory in MiB.
    """
    prompt, protocol, clicks = ask.prompt, ask.protocol, ask.clicks
    parts = dict(scored.report)
    many = ", ".join(map(str, clicks))
    what = {"box": "true boxes", "point": f"{many} clicks", "detector": f"boxes of {detector or 'a detector'}"}[prompt]
    rules = in_words(protocol, prompt, zoom, single, refine)
    if prompt == "detector":
        rules += [
            f"Predictions are ranked by {RANKS[ask.rank]}.",
            f"AP by {parts.pop('engine')}{', without classes' if ask.agnostic else ''}.",
        ]
    kind = next((k for k in ("vitdet", "yolov8", "groundingdino") if k in detector), "") if prompt == "detector" else ""
    whole = not dataset.left_out and not failed and len(dataset.truths) == WHOLE[dataset.kind]
    comparable = whole and not ask.agnostic and not zoom and refine == "none" and (prompt != "detector" or kind)
    figures = published.rows(dataset.kind, prompt, kind, protocol) if comparable else []
    done = {t.image.id for t in dataset.truths}
    known = [*dataset.warnings, *warnings, *parts.pop("warnings")]
    if dataset.left_out:
        known.append(f"{dataset.left_out} images of {dataset.file.name} were not chosen: the numbers are not those of the whole set")
    if zoom and protocol == "official":
        known.append("masks are looked for on crops (zoom), which the official evaluation does not do")
    means = {s: float(1000 * np.mean([row.get(s, 0.0) for row in seconds])) for s in dict.fromkeys(s for row in seconds for s in row)}
    total = sum(map(sum, (row.values() for row in seconds)))
    return {
        "schema_version": 1,
        "title": f"{model or 'predictions'} on {dataset.file.name}, {what}",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "state": {
            "images": len(done) + len(failed),
            "done": len(done),
            "failed": [{"key": f.image.key, "stage": f.stage, "reason": f.reason} for f in failed],
            "left_out": dataset.left_out,
        },
        "warnings": known,
        "prompt": prompt,
        "clicks": list(clicks) or None,
        "protocol": protocol,
        "agnostic": ask.agnostic,
        "rank": ask.rank,
        "protocol_in_words": rules,
        "dataset": dataset.about(),
        **parts,
        "published": {"metrics": list(published.METRICS[prompt]), "rows": figures} if figures else None,
        "speed": {"stages": means, "images_per_second": len(seconds) / total, "seconds": total, "peak_mib": peak, "device": device}
        if total
        else None,
        "provenance": provenance or {},
    }


def headline(report: dict) -> str:
    """The metric that stands for the run: ap, miou, or miou after the last click."""
    return {"box": "miou", "point": f"miou_{max(report['clicks'] or [1])}", "detector": "ap"}[report["prompt"]]


def peak_mib() -> float | None:
    """The most memory that this process has held, in MiB."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most / 2**20 if sys.platform == "darwin" else most / 2**10  # bytes there, KiB elsewhere
