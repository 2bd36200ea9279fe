"""Two evaluated runs side by side: what changed, how sure that is, and on which images. Reads their folders, runs no model."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from depthseg import predictions, score, truth
from depthseg.errors import DepthsegError
from depthseg.formats import atomic
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
    with atomic(folder / SCORES) as part:
        part.write_text(json.dumps({"images": images, "masks": {name: column.tolist() for name, column in table.items()}}) + "\n")


def compare(folder_a: Path, folder_b: Path) -> tuple[list[Row], list[tuple[str, float]], str]:
    """Rows for the metrics that both runs have, images with their change of mean IoU in percent (b - a), and the headline metric.

    Intervals come from a paired bootstrap over images: for mIoU always, for COCO's AP where the annotation file is still there.
    Raises DepthsegError for folders without a report, and for runs on other data, images or prompts.
    """
    a, images, masks_a = _load(folder_a)
    b, others, masks_b = _load(folder_b)
    for what, first, second in (
        ("prompts", a["prompt"], b["prompt"]),
        ("protocols", a["protocol"], b["protocol"]),
        ("clicks", a["clicks"], b["clicks"]),
        ("annotations", a["dataset"]["annotations"], b["dataset"]["annotations"]),
    ):
        if first != second and not (what == "annotations" and a["dataset"]["sha256"] == b["dataset"]["sha256"]):
            raise DepthsegError(f"the two runs have other {what}: {first} and {second}", "Compare runs of one evaluation.")
    same = ("image_id", "annotation_id")
    if images != others or any(not np.array_equal(masks_a.get(c, []), masks_b.get(c, [])) for c in same):
        raise DepthsegError("the two runs are about other images", "Evaluate both on the same ones.")
    intervals = _intervals((folder_a, folder_b), a, np.array(images["id"]), masks_a, masks_b)
    rows = [
        Row(name, value, b["metrics"][name], *(intervals.get(name) or (None, None)))
        for name, value in a["metrics"].items()
        if name in b["metrics"]
    ]
    change = 100 * (masks_b["iou"] - masks_a["iou"])
    by_image = [(key, float(change[own].mean())) for i, key in zip(images["id"], images["key"]) if (own := masks_a["image_id"] == i).any()]
    return rows, sorted(by_image, key=lambda pair: pair[1]), score.headline(a)


def _load(folder: Path) -> tuple[dict, dict, dict[str, Array]]:
    """The report of a folder, its images, and the columns of its masks."""
    try:
        report = json.loads((folder / "report.json").read_bytes())
        scores = json.loads((folder / SCORES).read_bytes())
        columns = {name: np.array(column) for name, column in scores["masks"].items()}
        return report, scores["images"], columns
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DepthsegError(
            f"{folder} holds no finished evaluation ({error})", "Give two folders that `depthseg eval -o` wrote."
        ) from error


def _intervals(
    folders: tuple[Path, Path], a: dict, ids: Array, masks_a: dict[str, Array], masks_b: dict[str, Array]
) -> dict[str, list[float] | None]:
    """Intervals of b - a by metric; ids: of the images."""
    about = a["dataset"]
    if a["prompt"] != "detector":
        columns = {f"miou_{n}": f"iou_{n}" for n in a["clicks"] or ()} or {"miou": "iou"}
        columns["boundary_iou"] = "boundary_iou"
        return {name: score.interval(ids, masks_a["image_id"], masks_b[c] - masks_a[c]) for name, c in columns.items()}
    there = Path(about["annotations"]).is_file() and Path(about["images_folder"]).is_dir()
    if about["kind"] == "lvis" or len(ids) > score.AP_IMAGES or not there:
        return {}
    data = truth.read(Path(about["images_folder"]), Path(about["annotations"])).only(set(ids.tolist()))
    pair = [predictions.read(folder / predictions.RESULTS, data, a["agnostic"])[0] for folder in folders[::-1]]
    return {"ap": score.paired_ap(data, pair, a["agnostic"])}
