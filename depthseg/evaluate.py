"""A model asked with the prompts of a data set: boxes or clicks from the truth, or boxes from a detector; and the report on it.

Predictions are written as they come, and what they are worth is said by score.py, which needs no model. The ablation asks again with
other depth; `evaluate_depth` scores a depth estimator by itself.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from depthseg import catalog, compare, gallery, masks, metrics, predictions, prompts, sa1b, score, weights
from depthseg.data import Failure, read, read_ahead
from depthseg.detect import BoxesFile
from depthseg.detect.classes import words
from depthseg.errors import NOTHING_TO_DO, DepthsegError
from depthseg.plan import Plan
from depthseg.protocols import PROTOCOLS
from depthseg.report import Picture
from depthseg.report import write as write_report
from depthseg.schema import Array, Boxes, Depth, Image, Prompts, Record
from depthseg.segment import Segmenter, View, one_by_one_if_need_be
from depthseg.sink import resolved
from depthseg.truth import Dataset, Truth

LOW_CONFIDENCE = 0.001  # of a detector's boxes: AP needs the whole curve
MOST = {"coco": 100, "lvis": 300}  # boxes of one image, as each evaluation counts them
MODES = ("off", "constant", "shuffled")  # of the ablation, beside depth as it is

Tell = Callable[[int, int], None]  # told (images done, images)


@dataclass(frozen=True)
class Request:
    """What is asked and how it is scored, beside the Plan."""

    prompt: str = "box"  # box, point or detector
    clicks: tuple[int, ...] = ()  # point: masks are kept after so many
    protocol: str = "official"  # a key of PROTOCOLS
    seed: int = 0  # of random clicks
    rank: str = "detector"  # a key of score.RANKS
    agnostic: bool = False  # detector: classes count for nothing

    def __post_init__(self) -> None:
        if self.prompt not in ("box", "point", "detector"):
            raise DepthsegError(f"no prompt is called '{self.prompt}'", "Use box, point or detector.")
        if self.prompt == "point" and (not self.clicks or min(self.clicks) < 1):
            raise DepthsegError(f"no score after {self.clicks} clicks", "Name numbers from 1 up, like 1,3,5.")

    def settings(self, dataset: Dataset, segmenter: Segmenter) -> dict:
        """What decides the predictions, as JSON values."""
        asked: dict = {"prompt": self.prompt, "protocol": self.protocol}
        if self.prompt == "point":
            asked |= {"clicks": list(self.clicks), "seed": self.seed if PROTOCOLS[self.protocol].random else None}
        made_by = resolved(segmenter.provenance)
        return {**asked, "annotations": dataset.sha256, "plan": segmenter.plan.decisive(), "made by": made_by}


def segmenter_for(
    dataset: Dataset, plan: Plan, ask: Request, pull: bool = False, progress: Callable[[int, int], None] | None = None
) -> Segmenter:
    """The stages of the plan; the detector only where it is asked, with a threshold and a number of boxes that suit AP."""
    if ask.prompt != "detector":
        return Segmenter(plan, pull, progress=progress, source=lambda images: [])
    if plan.boxes:
        listed = [{"id": t.image.id, "file_name": t.image.key} for t in dataset.truths]
        source = BoxesFile(plan.boxes, plan.confidence, plan.max_boxes, images=listed)
        ready = Segmenter(plan, pull, progress=progress, source=source)
        ready.provenance["detector"] = {"name": Path(plan.boxes).stem, "sha256": weights.sha256(Path(plan.boxes))}
        ready.notes += ready.expect([t.image for t in dataset.truths])
        return ready
    confidence = LOW_CONFIDENCE if plan.confidence is None else plan.confidence
    return Segmenter(replace(plan, confidence=confidence, max_boxes=plan.max_boxes or MOST[dataset.kind]), pull, progress=progress)


def run(
    dataset: Dataset,
    segmenter: Segmenter,
    ask: Request,
    folder: Path,
    *,
    pictures: bool = True,
    command: str = "",
    overwrite: bool = False,
    ablate: bool = False,
    progress: Tell = lambda done, total: None,
) -> dict:
    """Ask, score and write the report with all that belongs to it into `folder`; the report.

    ablate: ask again with each other depth of MODES. pictures: galleries in the page.
    """
    if ablate and segmenter.depth is None:
        raise DepthsegError("there is no depth to be changed", "Choose a model with depth, like nano-depth, and leave --depth none out.")
    notes = len(segmenter.notes)
    results, seconds, failed = predict(dataset, segmenter, ask, folder, overwrite, progress)
    bad = {f.image.id for f in failed}
    done = dataset.only({t.image.id for t in dataset.truths} - bad)
    agnostic = ask.agnostic or segmenter.detector in ("nano", "grid")
    least = catalog.DETECTORS["nano"].confidence if segmenter.detector == "nano" else 0.0
    scored = _scored(done, results, ask, agnostic, least)
    report = _report(
        done,
        scored,
        ask,
        agnostic,
        zoom=segmenter.zoom and ask.prompt != "point",
        single=segmenter.network.single_mask_for != "never",
        model=segmenter.plan.model,
        detector=segmenter.provenance.get("detector", {}).get("name", "") if ask.prompt == "detector" else "",
        failed=failed,
        warnings=[note for note in segmenter.notes[notes:] if ask.prompt == "detector"],
        seconds=seconds,
        device=str(segmenter.device),
        provenance={"command": command, **segmenter.provenance, "plan": segmenter.plan.to_json()},
    )
    others: dict[str, list[dict]] = {}
    if ablate:
        report["ablation"], others = _ablate(done, segmenter, ask, folder, overwrite, progress, results, scored, agnostic)
    _write(done, results, scored, report, folder, segmenter.depth if pictures else None, others, pictures)
    return report


def from_file(dataset: Dataset, file: Path, ask: Request, folder: Path, pictures: bool = True, command: str = "") -> dict:
    """Score the results of a file, write the report into `folder`; the report. No model is used."""
    results, warnings = predictions.read(file, dataset, ask.agnostic)
    scored = _scored(dataset, results, ask, ask.agnostic, 0.0)
    provenance = {"command": command, "predictions": {"file": str(file), "sha256": weights.sha256(file)}}
    report = _report(dataset, scored, ask, ask.agnostic, warnings=warnings, provenance=provenance, detector=file.stem)
    _write(dataset, results, scored, report, folder, None, {}, pictures)
    return report


def _scored(dataset: Dataset, results: list[dict], ask: Request, agnostic: bool, least: float) -> score.Scored:
    if ask.prompt == "detector":
        return score.detected(dataset, results, ask.rank, agnostic, least)
    return score.prompted(dataset, results, ask.protocol, ask.clicks)


def _report(dataset: Dataset, scored: score.Scored, ask: Request, agnostic: bool, **given: Any) -> dict:
    about: dict[str, Any] = {"prompt": ask.prompt, "protocol": ask.protocol, "clicks": ask.clicks, "rank": ask.rank, "agnostic": agnostic}
    return score.report(dataset, scored, **about, **given)


def _write(
    dataset: Dataset,
    results: list[dict],
    scored: score.Scored,
    report: dict,
    folder: Path,
    depth: Depth | None,
    others: dict[str, list[dict]],
    pictures: bool,
) -> None:
    shown: list[Picture] = []
    if pictures:
        quality = gallery.means(scored.table["image_id"], scored.table["iou"])
        shown = gallery.pictures(dataset, results, quality, gallery.extremes(quality), depth)
        if others:  # those that depth changed most
            without = _scored_table(dataset, others["without depth"], report)
            change = {i: abs(quality[i] - without[i]) for i in quality if i in without}
            most = sorted(change, key=lambda i: -change[i])[: gallery.EACH]
            shown += gallery.pictures(dataset, results, quality, {"most changed by depth": most}, depth, others)
    write_report(report, folder, shown)
    compare.write_scores(folder, dataset, scored.table)


def _scored_table(dataset: Dataset, results: list[dict], report: dict) -> dict[int, float]:
    """Mean IoU in percent by image id."""
    ask = Request(report["prompt"], tuple(report["clicks"] or ()), report["protocol"])
    table = _scored(dataset, results, ask, report["agnostic"], 0.0).table
    return gallery.means(table["image_id"], table["iou"])


def predict(
    dataset: Dataset, segmenter: Segmenter, ask: Request, folder: Path, overwrite: bool = False, progress: Tell = lambda done, total: None
) -> tuple[list[dict], list[dict[str, float]], list[Failure]]:
    """The results for all images of `dataset`, seconds by stage of each image, and the images that failed.

    Results lie in `folder` as each image is done: a stopped run goes on there, and ends with the same files. What is wrong with one
    image ends that image only. Raises DepthsegError.
    """
    answers = _clicks if ask.prompt == "point" else _boxes
    failed: list[Failure] = []
    with predictions.Journal(folder, ask.settings(dataset, segmenter), overwrite) as journal:
        todo = [t for t in dataset.truths if t.image.id not in journal.done]
        before = len(dataset.truths) - len(todo)
        for done, (truth, answer) in enumerate(answers(dataset, todo, segmenter, ask), 1):
            if isinstance(answer, Failure):
                failed.append(answer)
            else:
                journal.write(truth.image.id, *answer)
            progress(before + done, len(dataset.truths))
        wanted = {t.image.id for t in dataset.truths} & journal.done
        if not wanted:
            raise DepthsegError(f"no image could be used: {failed[0].image.key}: {failed[0].reason}" if failed else "there are no images")
        return (*journal.results(wanted), failed)


Answers = tuple[list[dict], dict[str, float]]  # results of one image, seconds by stage


def _boxes(dataset: Dataset, truths: Sequence[Truth], segmenter: Segmenter, ask: Request) -> Iterator[tuple[Truth, Answers | Failure]]:
    """Boxes of the truth, or of the segmenter's own source."""
    rules = PROTOCOLS[ask.protocol]
    of_truth = {t.image.key: rules.asked(t) for t in truths} if ask.prompt == "box" else {}
    boxes: dict[str, Boxes | Prompts] = {}  # of the images in flight
    source = segmenter.source
    table = _classes(dataset, segmenter) if ask.prompt == "detector" else None

    def given(images: list[Image]) -> list[Boxes | Prompts]:
        if ask.prompt == "detector":
            found = list(source(images))
        else:
            asked = [of_truth[image.key] for image in images]
            found = [Boxes(rules.boxes(t), np.ones(len(t), np.float32), t.label) for t in asked]
        boxes.update(zip((image.key for image in images), found))
        return found

    segmenter.source = given
    segmenter.by_box = rules.by_box and ask.prompt == "detector"
    try:
        for truth, record in zip(truths, segmenter.segment(t.image for t in truths)):
            if isinstance(record, Failure):
                yield truth, record
            elif record.image.size != truth.image.size:
                yield truth, _other_size(record.image, truth)
            else:
                asked = boxes.pop(truth.image.key)
                own = of_truth.get(truth.image.key)
                yield truth, (list(_results(record, asked, own, table)), record.seconds)
    finally:
        segmenter.source, segmenter.by_box = source, False


def _results(record: Record, asked: Boxes | Prompts, own: Truth | None, table: dict[int, int] | None) -> Iterator[dict]:
    """COCO results of one image; own: the annotations that were asked for; table: from the detector's classes to the data set's."""
    found = record.masks
    assert found.prompt is not None
    for i, prompt in enumerate(found.prompt.tolist()):
        label = int(found.label[i])
        if table is not None and label not in table:
            continue
        result: dict = {"category_id": label if table is None else table[label]}
        if own is not None:
            contrast = metrics.depth_contrast(masks.decode(own.rle[prompt]), record.depth) if record.depth is not None else None
            result |= {"annotation_id": int(own.id[prompt]), "depth_contrast": _rounded(contrast)}
        if isinstance(asked, Boxes):
            x0, y0, x1, y1 = asked.xyxy[prompt].tolist()
            result["prompt_box"] = [round(v, 3) for v in (x0, y0, x1 - x0, y1 - y0)]
        yield {**result, **_scores(float(found.score[i]), float(found.predicted_iou[i]), float(found.stability[i]), found.rle[i])}


def _scores(score: float, predicted: float, stability: float, rle: dict) -> dict:
    six = {"score": round(score, 6), "predicted_iou": round(predicted, 6), "stability_score": round(stability, 6)}
    return {**six, "segmentation": {"size": list(rle["size"]), "counts": rle["counts"]}}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 5)


def _classes(dataset: Dataset, segmenter: Segmenter) -> dict[int, int] | None:
    """From the classes of the boxes to those of the data set, by name, or by id in a file without names; None if there are none."""
    source = segmenter.source
    names = getattr(source, "names", None)
    if names and dataset.names:
        table, strange = predictions.by_name(names, dataset, words)
    elif isinstance(source, BoxesFile) and dataset.names:
        table = {i: i for i in source.labels if i in dataset.names}
        strange = [f"id {i}" for i in source.labels if i not in table]
        if len(strange) > len(table):
            raise DepthsegError(f"most category ids of the boxes are not in {dataset.file.name}: {_some(strange)}", "Number them alike.")
    else:
        return None
    if strange:
        segmenter.notes.append(f"{len(strange)} classes of the boxes are not in {dataset.file.name} and are left out: {_some(strange)}")
    return table


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[: predictions.NAMES_SHOWN]) + (", ..." if len(names) > predictions.NAMES_SHOWN else "")


def _other_size(image: Image, truth: Truth) -> Failure:
    (h, w), (th, tw) = image.size, truth.image.size
    return Failure(truth.image, "read", f"the picture has {w} x {h} pixels, its annotations say {tw} x {th}")


def _clicks(dataset: Dataset, truths: Sequence[Truth], segmenter: Segmenter, ask: Request) -> Iterator[tuple[Truth, Answers | Failure]]:
    """Features once for each image, then rounds: the masks after 1, 3 and 5 clicks come out of one pass of five."""
    rules = PROTOCOLS[ask.protocol]
    pairs = zip(truths, read_ahead(t.image for t in truths))
    while held := list(islice(pairs, segmenter.plan.batch)):
        spent: defaultdict[str, float] = defaultdict(float)
        out: dict[int, Failure] = {}
        for k, (truth, image) in enumerate(held):
            if isinstance(image, Failure):
                out[k] = image
            elif image.size != truth.image.size:
                out[k] = _other_size(image, truth)
        good = {k: image for k, (_, image) in enumerate(held) if k not in out and isinstance(image, Image)}
        depths = dict.fromkeys(good, None)
        if segmenter.depth:
            depths = dict(zip(good, one_by_one_if_need_be("depth", segmenter.depth, list(good.values()))))
            out |= {k: depth for k, depth in depths.items() if isinstance(depth, Failure)}
        left = [k for k in good if k not in out]
        asked = [rules.asked(held[k][0]) for k in left]
        views = [View(np.asarray(good[k].pixels), depths[k], good[k].size) for k in left]
        found = _rounds(segmenter, ask, asked, views, spent) if left else []
        share = {stage: seconds / len(left) for stage, seconds in spent.items()}
        answers = dict(zip(left, found))
        for k, (truth, _) in enumerate(held):
            yield truth, out[k] if k in out else (answers[k], share)


def _rounds(
    segmenter: Segmenter, ask: Request, asked: Sequence[Truth], views: Sequence[View], spent: defaultdict[str, float]
) -> list[list[dict]]:
    """The results of each view, after each number of clicks that is kept."""
    encoded = segmenter.encode(views, segmenter.network.side, spent)
    wanted = [[masks.decode(rle) for rle in t.rle] for t in asked]
    contrast = [
        [None if view.depth is None else _rounded(metrics.depth_contrast(mask, view.depth)) for mask in those]
        for view, those in zip(views, wanted)
    ]
    seen = [[np.zeros_like(mask) for mask in those] for those in wanted]
    xy = [np.zeros((len(those), 0, 2), np.int64) for those in wanted]
    signs = [np.zeros((len(those), 0), np.int64) for those in wanted]
    results: list[list[dict]] = [[] for _ in views]
    for n in range(1, max(ask.clicks) + 1):
        for v, (truth, those) in enumerate(zip(asked, wanted)):
            new = [_next(ask, int(truth.id[i]), mask, seen[v][i], xy[v][i]) for i, mask in enumerate(those)]
            added = np.array(new, np.int64).reshape(-1, 1, 3)  # x, y, positive
            xy[v], signs[v] = np.concatenate([xy[v], added[..., :2]], 1), np.concatenate([signs[v], added[..., 2]], 1)
        answers = segmenter.decode(encoded, [Prompts.of(points=p, signs=s) for p, s in zip(xy, signs)], spent=spent)
        seen = [[masks.decode(a.rle) for a in found] for found in answers]
        if n in ask.clicks:
            for v, (truth, found) in enumerate(zip(asked, answers)):
                for i, a in enumerate(found):
                    about = {"annotation_id": int(truth.id[i]), "clicks": n, "depth_contrast": contrast[v][i]}
                    results[v].append({
                        "category_id": int(truth.label[i]), **about, **_scores(a.predicted_iou, a.predicted_iou, a.stability, a.rle)
                    })  # fmt: skip
    return results


def _next(ask: Request, annotation: int, truth: Array, seen: Array, clicked: Array) -> tuple[int, int, bool]:
    """The next click: x, y, positive."""
    if not PROTOCOLS[ask.protocol].random:
        return prompts.next_click(truth, seen, clicked)
    return prompts.random_click(truth, len(clicked), np.random.default_rng([ask.seed, annotation]))


# ---- depth ----


def _ablate(
    dataset: Dataset,
    segmenter: Segmenter,
    ask: Request,
    folder: Path,
    overwrite: bool,
    progress: Tell,
    results: list[dict],
    scored: score.Scored,
    agnostic: bool,
) -> tuple[dict, dict[str, list[dict]]]:
    """The same questions with each other depth: metrics by mode, paired differences, and the results without depth."""
    depth, provenance = segmenter.depth, segmenter.provenance
    assert depth is not None
    modes, differences = {"on": scored.report["metrics"]}, list[dict]()
    without: list[dict] = []
    metric = "ap" if ask.prompt == "detector" else f"miou_{max(ask.clicks)}" if ask.clicks else "miou"
    try:
        for mode in MODES:
            segmenter.depth = other_depth(mode, depth, dataset)
            segmenter.provenance = {**provenance, "depth": {"name": mode}}
            found, _, failed = predict(dataset, segmenter, ask, folder / "ablation" / mode, overwrite, progress)
            if failed:
                raise DepthsegError(f"{failed[0].image.key} failed with depth {mode}: {failed[0].reason}", "Leave the image out.")
            other = _scored(dataset, found, ask, agnostic, 0.0)
            modes[mode] = other.report["metrics"]
            without = found if mode == "off" else without
            differences += _differences(dataset, mode, metric, scored, other, results, found, agnostic)
    finally:
        segmenter.depth, segmenter.provenance = depth, provenance
    return {"metric": metric, "modes": modes, "differences": differences}, {"without depth": without}


def _differences(
    dataset: Dataset,
    mode: str,
    metric: str,
    scored: score.Scored,
    other: score.Scored,
    results: list[dict],
    found: list[dict],
    agnostic: bool,
) -> list[dict]:
    """Depth less the other mode, with paired intervals where they can be had."""
    bounds: dict[str, list[float] | None] = {}
    if metric == "ap":
        if dataset.kind == "coco" and len(dataset.truths) <= score.AP_IMAGES:
            bounds["ap"] = score.paired_ap(dataset, [results, found], agnostic)
    else:
        for name, column in ((metric, "iou"), ("boundary_iou", "boundary_iou")):
            change = scored.table[column] - other.table[column]
            bounds[name] = score.interval(score.ids_of(dataset), scored.table["image_id"], change)
    names = {metric, *bounds, *(f"{metric}_{size}" for size in ("small", "medium", "large"))}
    rows = []
    for name, value in scored.report["metrics"].items():
        against = other.report["metrics"][name]
        if name in names and value is not None and against is not None:
            low, high = bounds.get(name) or (None, None)
            rows.append({"mode": mode, "metric": name, "value": value - against, "low": low, "high": high})
    return rows


def other_depth(mode: str, depth: Depth, dataset: Dataset) -> Depth | None:
    """Another depth in the place of `depth`, by one of MODES: none, the same everywhere, or that of another picture."""
    if mode == "off":
        return None
    if mode == "constant":
        return lambda images: [np.full((8, 8), 0.5, np.float32) for _ in images]
    order = np.random.default_rng(0).permutation(len(dataset.truths))
    after = dict(zip(order.tolist(), np.roll(order, 1).tolist()))  # one circle: nobody keeps his own
    partner = {t.image.key: dataset.truths[after[at]].image for at, t in enumerate(dataset.truths)}
    return lambda images: depth([read(partner[image.key]) for image in images])


def evaluate_depth(root: Path, depth: Depth, progress: Tell | None = None) -> dict:
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
