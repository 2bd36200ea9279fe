"""Average precision of masks: COCO's by pycocotools, LVIS' by the package lvis; the engines' own numbers, in percent.

Results are COCO's: dicts with image_id, category_id, segmentation (RLE) and score. None where nothing was there to measure.
"""

import contextlib
import copy
import io
import logging
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from depthseg import masks
from depthseg.errors import MISSING_PIECE, DepthsegError
from depthseg.schema import Array
from depthseg.truth import Dataset

COCO_NAMES = (
    "ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large",
    "ar_1", "ar_10", "ar_100", "ar_small", "ar_medium", "ar_large",
)  # fmt: skip
LVIS_NAMES = {
    "AP": "ap", "AP50": "ap50", "AP75": "ap75", "APs": "ap_small", "APm": "ap_medium", "APl": "ap_large",
    "APr": "ap_rare", "APc": "ap_common", "APf": "ap_frequent",
    "AR@300": "ar_300", "ARs@300": "ar_small", "ARm@300": "ar_medium", "ARl@300": "ar_large",
}  # fmt: skip
LVIS_MOST = 300  # detections of one image
CURVES = {"IoU 0.50": 0, "IoU 0.75": 5}  # index of the threshold


def coco(
    dataset: Dataset, results: Sequence[dict], agnostic: bool = False, threshold: float = 0, draws: Array | None = None
) -> dict[str, Any]:
    """COCO's twelve numbers as `metrics`, `per_class` rows and precision-recall curves `pr`, and the `engine` that gave them.

    agnostic: classes are ignored, and recall_50 and precision_50 are told: of predictions with a score of `threshold` or more, at
    IoU 0.50. draws: as in `resampled`, whose answer is `drawn`.
    """
    run = _run(dataset, results, agnostic)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools talks
        run.summarize()
    metrics = {name: _percent(value) for name, value in zip(COCO_NAMES, run.stats, strict=True)}
    precision = run.eval["precision"]  # (IoU, recall level, class, area, limit)
    if agnostic:  # predictions are matched best first, so that a limit of the score keeps the beginning of the matches
        some = [e for e in run.evalImgs[: len(run.params.imgIds)] if e]  # of any size
        counted = [(np.array(e["dtScores"]) >= threshold) & (e["dtIgnore"][0] == 0) for e in some]
        hits = np.concatenate([np.zeros(0, bool), *((e["dtMatches"][0] > 0)[c] for e, c in zip(some, counted))])
        things = sum(int((np.array(e["gtIgnore"]) == 0).sum()) for e in some)
        metrics |= {
            "recall_50": 100 * int(hits.sum()) / things if things else None,
            "precision_50": 100 * float(hits.mean()) if len(hits) else None,
        }
    limit = 2  # the best 100 of an image
    per_class = [] if agnostic else _per_class(dataset, run.params.catIds, precision[:, :, :, 0, limit])
    pr = _curves(precision[:, :, :, 0, limit], run.params.recThrs)
    drawn = None if draws is None else _resampled(run, draws)  # last: the run is not what it was after that
    return {"metrics": metrics, "per_class": per_class, "pr": pr, "engine": f"pycocotools {version('pycocotools')}", "drawn": drawn}


def _run(dataset: Dataset, results: Sequence[dict], agnostic: bool) -> COCOeval:
    """COCO's evaluation, accumulated."""
    tables = _truths(dataset), _found(dataset, results)
    if agnostic:  # useCats alone would drop predictions of classes that the truth does not list
        for table in tables:
            table["categories"] = [{"id": 1, "name": "object"}]
            table["annotations"] = [{**a, "category_id": 1} for a in table["annotations"]]
    truth, found = (_index(COCO(), table) for table in tables)
    with contextlib.redirect_stdout(io.StringIO()):
        run = COCOeval(truth, found, "segm")
        if agnostic:
            most = max([100, *np.unique([r["image_id"] for r in results], return_counts=True)[1]])
            run.params.maxDets = [1, 10, 100, most]
        run.evaluate()
        run.accumulate()
    return run


def resampled(dataset: Dataset, results: Sequence[dict], draws: Array, agnostic: bool = False) -> Array:
    """AP of resampled images, (D,) in percent: for bootstrap intervals.

    draws: (D, I) positions of images, in the order of their ids. An image that is drawn twice counts twice. NaN where AP is undefined.
    """
    return _resampled(_run(dataset, results, agnostic), draws)


def _resampled(run: COCOeval, draws: Array) -> Array:
    every = np.array(run.evalImgs, object).reshape(len(run.params.catIds), len(run.params.areaRng), -1)[:, 0]  # of any size
    run.params.areaRng, run.params.areaRngLbl = run.params.areaRng[:1], ["all"]
    run.params.maxDets = run.params.maxDets[2:3]
    run.params.imgIds = list(range(draws.shape[1]))
    run._paramsEval = copy.deepcopy(run.params)
    out = np.full(len(draws), np.nan)
    for at, drawn in enumerate(draws):
        run.evalImgs = every[:, drawn].ravel().tolist()
        with contextlib.redirect_stdout(io.StringIO()):
            run.accumulate()
        value = _percent(_mean(run.eval["precision"]))
        out[at] = np.nan if value is None else value
    return out


def lvis(dataset: Dataset, results: Sequence[dict]) -> dict[str, Any]:
    """LVIS' numbers, as `coco` gives them: federated, 300 detections of an image. Raises DepthsegError without the package lvis."""
    theirs = _package()
    truth = _index(theirs.LVIS.__new__(theirs.LVIS), _truths(dataset))
    found = theirs.LVISResults.__new__(theirs.LVISResults)  # its constructor fails on an empty list
    found.logger = logging.getLogger("lvis")
    table = _found(dataset, results)
    _index(found, {**table, "annotations": found.limit_dets_per_image(table["annotations"], LVIS_MOST)} if results else table)
    run = theirs.LVISEval(truth, found, "segm")
    with _numpy_1():
        run.run()
    metrics = {ours: _percent(run.results[name]) for name, ours in LVIS_NAMES.items()}
    precision = run.eval["precision"][:, :, :, 0]
    per_class = _per_class(dataset, run.params.cat_ids, precision)
    return {"metrics": metrics, "per_class": per_class, "pr": _curves(precision, run.params.rec_thrs), "engine": f"lvis {version('lvis')}"}


def _package() -> Any:
    """The package lvis, without its changes to the logging of the whole process."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    try:
        import lvis
    except ImportError as error:
        hint = "Install it: pip install 'depthseg[lvis]'."
        raise DepthsegError(f"LVIS is scored by the package lvis ({error})", hint, MISSING_PIECE) from error
    finally:
        root.handlers[:], root.level = before[0], before[1]
    return lvis


@contextlib.contextmanager
def _numpy_1() -> Iterator[None]:
    """While lvis 0.5.3 runs, its evaluator sees a NumPy that has the name `float`; nobody else does."""
    import lvis.eval

    class Numpy1:
        float = float

        def __getattr__(self, name: str) -> Any:
            return getattr(np, name)

    before, lvis.eval.np = lvis.eval.np, Numpy1()
    try:
        yield
    finally:
        lvis.eval.np = before


def _truths(dataset: Dataset) -> dict:
    """The truth as the dict that both packages index."""
    annotations: list[dict] = [
        {
            "image_id": t.image.id,
            "category_id": int(t.label[i]),
            "iscrowd": int(t.crowd[i]),
            "area": float(t.area[i]),
            "segmentation": t.rle[i],
        }
        for t in dataset.truths
        for i in range(len(t))
    ]
    for number, annotation in enumerate(annotations, 1):  # both take 0 for "no match", and files with ids from 0 exist
        annotation["id"] = number
    return _table(dataset, annotations)


def _found(dataset: Dataset, results: Sequence[dict]) -> dict:
    areas = masks.area([r["segmentation"] for r in results])
    fields = ("image_id", "category_id", "segmentation", "score")
    annotations = [
        {**{name: r[name] for name in fields}, "id": at, "area": int(areas[at - 1]), "iscrowd": 0} for at, r in enumerate(results, 1)
    ]
    return _table(dataset, annotations)


def _table(dataset: Dataset, annotations: list[dict]) -> dict:
    images = [
        {
            "id": t.image.id,
            "height": t.image.size[0],
            "width": t.image.size[1],
            "neg_category_ids": t.negative,
            "not_exhaustive_category_ids": t.not_exhaustive,
        }
        for t in dataset.truths
    ]
    names = dataset.names or {i: str(i) for i in sorted({a["category_id"] for a in annotations})}
    frequency = dataset.frequency
    categories = [{"id": i, "name": name, **({"frequency": frequency[i]} if i in frequency else {})} for i, name in names.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def _index(table: Any, dataset: dict) -> Any:
    """A COCO, LVIS or LVISResults object around a dict."""
    table.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        if isinstance(table, COCO):
            table.createIndex()
        else:
            table.logger = logging.getLogger("lvis")
            table._create_index()
    return table


def _per_class(dataset: Dataset, ids: Sequence[int], precision: Array) -> list[dict]:
    """AP and AP50 of each class that occurs; precision: (IoU, recall level, class), -1 where undefined."""
    counts: dict[int, int] = {}
    for t in dataset.truths:
        for label in t.label[~t.crowd].tolist():
            counts[label] = counts.get(label, 0) + 1
    return [
        {
            "id": int(i),
            "name": dataset.names.get(i, str(i)),
            "frequency": dataset.frequency.get(i),
            "masks": counts[i],
            "ap": _percent(_mean(precision[:, :, k])),
            "ap50": _percent(_mean(precision[0, :, k])),
        }
        for k, i in enumerate(ids)
        if i in counts
    ]


def _curves(precision: Array, levels: Array) -> list[dict]:
    """Precision at each recall level, mean over the classes that have one."""
    out = []
    for name, some in {**{name: precision[at : at + 1] for name, at in CURVES.items()}, "mean of 0.50 to 0.95": precision}.items():
        good = some > -1
        if good.any():
            mean = np.where(good, some, 0).sum((0, 2)) / np.maximum(good.sum((0, 2)), 1)
            out.append({"name": name, "recall": np.round(levels, 4).tolist(), "precision": np.round(mean, 5).tolist()})
    return out


def _mean(values: Array) -> float:
    """Of what is defined; -1, the engines' word for undefined, if nothing is."""
    values = np.asarray(values, float)
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0


def _percent(value: float) -> float | None:
    return None if value <= -1 else 100 * float(value)
