"""A model asked with the prompts of a data set: boxes or clicks from the truth, or boxes from a detector.

Predictions are written as they come; what they are worth is said elsewhere, without a model.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np

from depthseg import __version__, masks, metrics, predictions, prompts, weights
from depthseg.data import Failure, read, read_ahead
from depthseg.depth import DepthFolder
from depthseg.detect import BoxesFile
from depthseg.detect.classes import words
from depthseg.errors import NOTHING_TO_DO, SOME_FAILED, DepthsegError
from depthseg.plan import Plan
from depthseg.protocols import PROTOCOLS
from depthseg.schema import Array, Boxes, Depth, Image, Prompts, Record
from depthseg.score import Request
from depthseg.segment import Segmenter, one_by_one_if_need_be
from depthseg.sink import resolved
from depthseg.truth import Dataset, Truth
from depthseg.views import View

LOW_CONFIDENCE = 0.001  # of a detector's boxes: AP needs the whole curve
MOST = {"coco": 100, "lvis": 300}  # boxes of one image, as each evaluation counts them
MODES = ("off", "constant", "shuffled")  # of the ablation, beside depth as it is

Tell = Callable[[int, int], None]  # told (images done, images)
Answers = tuple[list[dict], dict[str, float]]  # results of one image, seconds by stage


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


def settings(dataset: Dataset, segmenter: Segmenter, ask: Request) -> dict:
    """What decides the predictions beside the pictures, as JSON values."""
    asked: dict = {"version": __version__, "prompt": ask.prompt, "protocol": ask.protocol, "agnostic": ask.agnostic}
    if ask.prompt == "point":
        asked |= {"clicks": list(ask.clicks), "seed": ask.seed if PROTOCOLS[ask.protocol].random else None}
    if isinstance(segmenter.depth, DepthFolder):
        asked["depth maps"] = _listing(segmenter.depth.root)
    return {**asked, "annotations": dataset.sha256, "plan": segmenter.plan.decisive(), "made by": resolved(segmenter.provenance)}


def _listing(folder: Path) -> str:
    """A hash of the names, sizes and times of the files below a folder."""
    files = sorted((f.relative_to(folder).as_posix(), f.stat().st_size, f.stat().st_mtime_ns) for f in folder.rglob("*") if f.is_file())
    return hashlib.sha256(repr(files).encode()).hexdigest()[:12]


def predict(
    dataset: Dataset, segmenter: Segmenter, ask: Request, folder: Path, overwrite: bool = False, progress: Tell = lambda done, total: None
) -> tuple[list[dict], list[dict[str, float]], list[Failure]]:
    """The results for all images of `dataset`, seconds by stage of each image, and the images that failed.

    Results lie in `folder` as each image is done: a stopped run goes on there. What is wrong with one image ends that image only.
    Raises DepthsegError.
    """
    rules = PROTOCOLS[ask.protocol]
    if ask.prompt != "detector" and not any(len(rules.asked(t)) for t in dataset.truths):
        raise DepthsegError(f"{dataset.file} has no mask to ask for under these rules", "Choose other images or rules.", NOTHING_TO_DO)
    if ask.prompt == "point":
        segmenter.notes += [note.removeprefix("warning: ") for note in segmenter.suits(max(ask.clicks), negatives=not rules.random)]
    answers = click_answers if ask.prompt == "point" else box_answers
    failed: list[Failure] = []
    with predictions.Journal(folder, settings(dataset, segmenter, ask), dataset, overwrite) as journal:
        todo = [t for t in dataset.truths if t.image.id not in journal.done]
        before = len(dataset.truths) - len(todo)
        for done, (truth, answer) in enumerate(answers(dataset, todo, segmenter, ask), 1):
            if isinstance(answer, Failure):
                failed.append(answer)
            else:
                journal.write(truth.image, *answer)
            progress(before + done, len(dataset.truths))
        if failed and len(failed) == len(dataset.truths):
            raise DepthsegError(f"no image could be used; {failed[0].image.key}: {failed[0].reason}", "Check --images.", SOME_FAILED)
        return (*journal.results(), failed)


def box_answers(dataset: Dataset, truths: Sequence[Truth], segmenter: Segmenter, ask: Request) -> Iterator[tuple[Truth, Answers | Failure]]:
    """Boxes of the truth, or of the segmenter's own source."""
    rules = PROTOCOLS[ask.protocol]
    of_truth = {t.image.key: rules.asked(t) for t in truths} if ask.prompt == "box" else {}
    boxes: dict[str, Boxes | Prompts] = {}  # of the images in flight
    source = segmenter.source
    table = _classes(dataset, segmenter) if ask.prompt == "detector" and not ask.agnostic else None

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
    """From the classes of the boxes to those of the data set, by name; None if there are no names, and the ids are the data set's."""
    source, names = segmenter.source, dict(getattr(segmenter.source, "names", {}))
    if not dataset.names:
        return None
    table, strange = predictions.by_name(names, dataset, words) if names else ({}, [])
    if isinstance(source, BoxesFile) and (bare := [i for i in source.labels if i not in names]):
        if unknown := [str(i) for i in bare if i not in dataset.names]:  # as where 80 classes are counted from 0
            raise DepthsegError(
                f"category ids of the boxes are not in {dataset.file.name}: {predictions.some(unknown)}",
                "Number them like the annotations, write a category_name into each entry, or ignore classes with --agnostic.",
            )
        table |= {i: i for i in bare}
    elif not names:
        return None
    if strange:
        segmenter.notes.append(
            f"{len(strange)} classes of the boxes are not in {dataset.file.name} and are left out: {predictions.some(strange)}"
        )
    return table


def _other_size(image: Image, truth: Truth) -> Failure:
    (h, w), (th, tw) = image.size, truth.image.size
    return Failure(truth.image, "read", f"the picture has {w} x {h} pixels, its annotations say {tw} x {th}")


def click_answers(
    dataset: Dataset, truths: Sequence[Truth], segmenter: Segmenter, ask: Request
) -> Iterator[tuple[Truth, Answers | Failure]]:
    """Features of whole images once, then rounds: the masks after 1, 3 and 5 clicks come out of one pass of five."""
    rules = PROTOCOLS[ask.protocol]
    pairs = zip(truths, read_ahead(t.image for t in truths))
    while True:
        spent: defaultdict[str, float] = defaultdict(float)
        with segmenter.timed(spent, "read"):
            held = list(islice(pairs, segmenter.plan.batch))
        if not held:
            return
        out: dict[int, Failure] = {}
        for k, (truth, image) in enumerate(held):
            if isinstance(image, Failure):
                out[k] = image
            elif image.size != truth.image.size:
                out[k] = _other_size(image, truth)
        good = {k: image for k, (_, image) in enumerate(held) if k not in out and isinstance(image, Image)}
        depths = dict.fromkeys(good, None)
        if segmenter.depth:
            with segmenter.timed(spent, "depth"):
                depths = dict(zip(good, one_by_one_if_need_be("depth", segmenter.depth, list(good.values()))))
            out |= {k: depth for k, depth in depths.items() if isinstance(depth, Failure)}
        left = [k for k in good if k not in out]
        asked = [rules.asked(held[k][0]) for k in left]
        views = [View(np.asarray(good[k].pixels), depths[k], good[k].size) for k in left]
        found = _rounds(segmenter, ask, asked, views, spent) if left else []
        share = {stage: seconds / max(1, len(left)) for stage, seconds in spent.items()}
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
        clicks = [Prompts.of(points=p, signs=s) for p, s in zip(xy, signs)]
        candidates = segmenter.decode(encoded, clicks, spent=spent, every=segmenter.zoom)
        answers = segmenter.closer(views, clicks, candidates, spent=spent)
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
    return prompts.random_click(truth, len(clicked), np.random.default_rng([ask.seed, abs(annotation)]))


# ---- other depth ----


def other_depth(mode: str, depth: Depth, dataset: Dataset) -> Depth | None:
    """Another depth in the place of `depth`, by one of MODES: none, the same everywhere, or that of another picture."""
    if mode == "off":
        return None
    if mode == "constant":
        return lambda images: [np.zeros((8, 8), np.float32) for _ in images]  # what normalising makes of a map without relief
    if len(dataset.truths) < 2:
        raise DepthsegError("depth cannot be shuffled among fewer than two images", "Take more images, or leave --ablate-depth out.")
    order = np.random.default_rng(0).permutation(len(dataset.truths))
    after = dict(zip(order.tolist(), np.roll(order, 1).tolist()))  # one circle: nobody keeps his own
    partner = {t.image.key: dataset.truths[after[at]].image for at, t in enumerate(dataset.truths)}
    return lambda images: depth([read(partner[image.key]) for image in images])
