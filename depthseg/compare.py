"""Two evaluated runs side by side: what changed, how sure that is, and on which images. Reads their folders, runs no model."""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from depthseg import predictions, score, truth
from depthseg.errors import DepthsegError
from depthseg.formats import text_file
from depthseg.schema import Array
from depthseg.truth import Dataset

SCORES = "scores.json"  # beside report.json: what single masks scored


class Row(NamedTuple):
    """One metric of two runs."""

    metric: str
    a: float | None
    b: float | None
    low: float | None  # 95 % interval of b - a, where one can be had
    high: float | None


def write_scores(folder: Path, dataset: Dataset, table: dict[str, Array]) -> None:
    """The images, and the columns of score.Scored.table, as JSON for a later comparison."""
    images = {"id": [t.image.id for t in dataset.truths], "key": [t.image.key for t in dataset.truths]}
    with text_file(folder / SCORES) as file:
        file.write(json.dumps({"images": images, "masks": {name: column.tolist() for name, column in table.items()}}) + "\n")


def compare(folder_a: Path, folder_b: Path) -> tuple[list[Row], list[tuple[str, float]], str]:
    """Rows for the metrics that both runs have, images with their change of mean IoU in percent (b - a), and the headline metric.

    Intervals come from a paired bootstrap over images: for mIoU always, for COCO's AP where the annotation file is still there.
    Raises DepthsegError for folders without a report, and for runs on other data, images or prompts.
    """
    a, images, masks_a = _load(folder_a)
    b, others, masks_b = _load(folder_b)
    for what, of in (
        ("prompts", lambda r: r["prompt"]),
        ("protocols", lambda r: r["protocol"]),
        ("clicks", lambda r: r["clicks"]),
        ("rankings", lambda r: r["rank"]),
        ("uses of classes", lambda r: r["agnostic"]),
        ("annotations", lambda r: r["dataset"]["sha256"]),
    ):
        if of(a) != of(b):
            raise DepthsegError(f"the two runs have other {what}: {of(a)} and {of(b)}", "Compare runs of one evaluation.")
    same = ("image_id", "annotation_id")
    if images != others or any(not np.array_equal(masks_a.get(c, []), masks_b.get(c, [])) for c in same):
        raise DepthsegError("the two runs are about other images", "Evaluate both on the same ones.")
    intervals = _intervals((folder_b, folder_a), a, images["id"], masks_b, masks_a)
    rows = [
        Row(name, value, b["metrics"][name], *(intervals.get(name) or (None, None)))
        for name, value in a["metrics"].items()
        if name in b["metrics"]
    ]
    keys = dict(zip(images["id"], images["key"]))
    change = score.by_image({"image_id": masks_a["image_id"], "iou": masks_b["iou"] - masks_a["iou"]})
    by_image = [(keys[i], value) for i, value in change.items()]
    return rows, sorted(by_image, key=lambda pair: pair[1]), score.headline(a)


def _load(folder: Path) -> tuple[dict, dict, dict[str, Array]]:
    """The report of a folder, its images, and the columns of its masks."""
    try:
        report = json.loads((folder / "report.json").read_bytes())
        scores = json.loads((folder / SCORES).read_bytes())
        columns = {name: np.array(column, int if name.endswith("_id") else float) for name, column in scores["masks"].items()}
        if not all(value is None or math.isfinite(value) for value in report["metrics"].values()):
            raise ValueError("a metric is no number")
        if len({len(column) for column in columns.values()}) != 1 or report["metrics"][score.headline(report)] is None:
            raise ValueError("its scores are not whole")
        report["protocol"], report["rank"], report["agnostic"], report["dataset"]["sha256"]
        return report, scores["images"], columns
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DepthsegError(
            f"{folder} holds no finished evaluation ({error})", "Give two folders that `depthseg eval -o` wrote."
        ) from error


def _intervals(
    folders: tuple[Path, Path], about: dict, ids: list[int], first: dict[str, Array], second: dict[str, Array]
) -> dict[str, list[float] | None]:
    """Intervals of first less second by metric."""
    ask = score.Request(about["prompt"], tuple(about["clicks"] or ()), about["protocol"], 0, about["rank"], about["agnostic"])
    if ask.prompt != "detector":
        return score.paired_miou(np.array(ids), ask, first, second)
    folder, file = (Path(about["dataset"][name]) for name in ("images_folder", "annotations"))
    if len(ids) > score.AP_IMAGES or not file.is_file() or not folder.is_dir():
        return {}
    data = truth.read(folder, file).only(set(ids))
    if data.sha256 != about["dataset"]["sha256"]:
        return {}
    pair = [predictions.read(f / predictions.RESULTS, data, ask.agnostic)[0] for f in folders]
    return score.paired_ap(data, ask, *pair)
