"""Average precision against the evaluators reading files of their own, to the last digit."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from depthseg import ap, masks, truth
from depthseg.schema import Image
from depthseg.truth import Dataset, Truth

SIZE = (60, 80)


def blob(g, near=None):
    """A random mask, or one near another."""
    if near is not None:
        return np.roll(near, g.integers(-4, 5, 2), (0, 1))
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    cy, cx, ry, rx = g.uniform(0, SIZE[0]), g.uniform(0, SIZE[1]), g.uniform(1, 30), g.uniform(1, 40)
    return ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1


def made_up(seed, kind="coco", images=7, classes=4):
    """A data set as a file has it, and results for it: near misses, wrong classes, crowds, ties, images without either."""
    g = np.random.default_rng(seed)
    table = {
        "images": [{"id": 10 + 3 * i, "height": SIZE[0], "width": SIZE[1], "file_name": f"{i}.png"} for i in range(images)],
        "categories": [{"id": 2 * c + 1, "name": f"class {c}"} for c in range(classes)],
        "annotations": [],
    }
    if kind == "lvis":
        for c, category in enumerate(table["categories"]):
            category |= {"frequency": "rcf"[c % 3], "image_count": c + 1}
    results = []
    for image in table["images"][1:]:
        labels = []
        for _ in range(g.integers(0, 6)):
            mask, label = blob(g), int(2 * g.integers(0, classes) + 1)
            if not mask.any():
                continue
            rle = masks.encode(mask)
            x0, y0, x1, y1 = masks.boxes([rle])[0].tolist()
            crowd = int(kind == "coco" and g.random() < 0.15)
            area = float(masks.area([rle])[0]) * g.choice([1, 1, 10])  # large things too
            labels.append(label)
            table["annotations"].append({
                "id": len(table["annotations"]) + 1, "image_id": image["id"], "category_id": label, "segmentation": rle,
                "area": area, "bbox": [x0, y0, x1 - x0, y1 - y0], "iscrowd": crowd,
            })  # fmt: skip
            for _ in range(g.integers(0, 4)):
                other = label if g.random() < 0.8 else int(2 * g.integers(0, classes) + 1)
                results.append({"image_id": image["id"], "category_id": other, "segmentation": masks.encode(blob(g, mask))})
        for _ in range(g.integers(0, 3)):
            results.append(
                {"image_id": image["id"], "category_id": int(2 * g.integers(0, classes) + 1), "segmentation": masks.encode(blob(g))}
            )
        if kind == "lvis":
            absent = [c["id"] for c in table["categories"] if c["id"] not in labels]
            image |= {"neg_category_ids": absent[:1], "not_exhaustive_category_ids": sorted(set(labels))[:1]}
    if kind == "lvis":
        table["images"][0] |= {"neg_category_ids": [1], "not_exhaustive_category_ids": []}
    for r in results:
        r["score"] = float(np.round(g.random(), 2))  # ties
    return table, [r for r in results if masks.area([r["segmentation"]])[0]]


def dataset(table, kind="coco") -> Dataset:
    """What truth.read makes of such a file, without pictures."""
    truths = []
    for row in table["images"]:
        own = [a for a in table["annotations"] if a["image_id"] == row["id"]]
        xywh = np.array([a["bbox"] for a in own], np.float32).reshape(-1, 4)
        truths.append(Truth(
            Image(row["file_name"], row["id"], None, (row["height"], row["width"])), np.array([a["id"] for a in own], np.int64),
            [a["segmentation"] for a in own], np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1),
            np.array([a["area"] for a in own], float), np.array([a["iscrowd"] for a in own], bool),
            np.array([a["category_id"] for a in own], np.int64), row.get("neg_category_ids", []),
            row.get("not_exhaustive_category_ids", []),
        ))  # fmt: skip
    names = {c["id"]: c["name"] for c in table["categories"]}
    frequency = {c["id"]: c["frequency"] for c in table["categories"] if "frequency" in c}
    return Dataset(kind, Path("made_up.json"), Path(), "0", truths, names, frequency, 0, [])


def by_pycocotools(folder, table, results):
    (folder / "truth.json").write_text(json.dumps(table))
    (folder / "results.json").write_text(json.dumps(results))
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO(str(folder / "truth.json"))
        run = COCOeval(gt, gt.loadRes(str(folder / "results.json")), "segm")
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


@pytest.mark.parametrize("seed", range(12))
def test_coco_equals_pycocotools(tmp_path, seed):
    table, results = made_up(seed)
    ours, run = ap.coco(dataset(table), results), by_pycocotools(tmp_path, table, results)
    assert list(ours["metrics"].values()) == [None if s == -1 else 100 * s for s in run.stats]
    precision = run.eval["precision"][:, :, :, 0, 2]
    for row in ours["per_class"]:
        some = precision[:, :, run.params.catIds.index(row["id"])]
        assert row["ap"] == (None if some.max() == -1 else pytest.approx(100 * some[some > -1].mean(), abs=1e-12))
    assert ours["engine"].startswith("pycocotools ") and len(ours["pr"]) == 3


def test_coco_equals_pycocotools_on_real_masks(shared, tmp_path):
    """Predictions near the truth of coco-mini: shifted, of a wrong class, twice, or absent."""
    folder = shared / "data" / "coco-mini"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/coco-mini")
    file = folder / "annotations" / "instances_val.json"
    data, g = truth.read(folder / "images", file), np.random.default_rng(0)
    results = []
    for t in data.truths:
        for rle, label in zip(t.rle, t.label.tolist()):
            for _ in range(g.integers(0, 3)):
                moved = masks.encode(np.roll(masks.decode(rle), g.integers(-6, 7, 2), (0, 1)))
                wrong = int(g.choice(list(data.names))) if g.random() < 0.1 else label
                results.append({"image_id": t.image.id, "category_id": wrong, "segmentation": moved, "score": float(g.random())})
    ours, run = ap.coco(data, results), by_pycocotools(tmp_path, json.loads(file.read_text()), results)
    assert list(ours["metrics"].values()) == [100 * s for s in run.stats] and 10 < ours["metrics"]["ap"] < 90


@pytest.mark.parametrize("seed", range(8))
def test_lvis_equals_its_package(tmp_path, seed, monkeypatch):
    lvis = pytest.importorskip("lvis")
    table, results = made_up(seed, "lvis")
    ours = ap.lvis(dataset(table, "lvis"), results)
    assert not hasattr(np, "float"), "NumPy was changed for the whole process"
    (tmp_path / "truth.json").write_text(json.dumps(table))
    (tmp_path / "results.json").write_text(json.dumps(results))
    monkeypatch.setattr(np, "float", float, raising=False)  # what the released package needs
    run = lvis.LVISEval(str(tmp_path / "truth.json"), str(tmp_path / "results.json"), "segm")
    run.run()
    for theirs, name in ap.LVIS_NAMES.items():
        assert ours["metrics"][name] == (None if run.results[theirs] == -1 else 100 * run.results[theirs]), name
    assert ours["engine"].startswith("lvis ")


def test_lvis_without_predictions_is_zero_not_an_error():
    pytest.importorskip("lvis")
    table, _ = made_up(1, "lvis")
    assert ap.lvis(dataset(table, "lvis"), [])["metrics"]["ap"] == 0


def test_the_package_lvis_leaves_logging_alone():
    import logging

    pytest.importorskip("lvis")
    before = logging.getLogger().handlers[:], logging.getLogger().level
    ap._package()
    assert (logging.getLogger().handlers, logging.getLogger().level) == before


def test_without_predictions_or_truth():
    table, results = made_up(0)
    assert ap.coco(dataset(table), [])["metrics"]["ap"] == 0
    bare = {**table, "annotations": []}
    assert ap.coco(dataset(bare), results)["metrics"]["ap"] is None and ap.coco(dataset(bare), results)["per_class"] == []


@pytest.mark.parametrize("agnostic", [False, True])
def test_resampled_ap_of_every_image_once_is_ap(agnostic):
    table, results = made_up(3)
    data = dataset(table)
    plain = ap.coco(data, results, agnostic)["metrics"]["ap"]
    count = len(data.truths)
    draws = np.array([np.arange(count), np.arange(count)[::-1], np.zeros(count, int)])
    values = ap.resampled(data, results, draws, agnostic)
    assert values[0] == plain and ap.resampled(data, [], draws, agnostic)[0] == 0
    assert values[1] == pytest.approx(plain, abs=2)  # the order decides among equal scores only
    assert np.isnan(values[2])  # the first image has no truth


def square(y, x, side=10, size=(40, 60)):
    m = np.zeros(size, bool)
    m[y : y + side, x : x + side] = True
    return masks.encode(m)


def agnostic(truths, predictions, least=0.0):
    """Scores without classes of masks by image."""
    table = {
        "images": [{"id": i, "file_name": str(i), "height": 40, "width": 60} for i in range(len(truths))],
        "categories": [],
        "annotations": [],
    }
    for i, rles in enumerate(truths):
        for rle in rles:
            table["annotations"].append({
                "id": len(table["annotations"]), "image_id": i, "category_id": 1, "segmentation": rle, "area": 100.0,
                "bbox": [0, 0, 1, 1], "iscrowd": 0,
            })  # fmt: skip
    results = [
        {"image_id": i, "category_id": 7, "segmentation": rle, "score": float(score)}
        for i, (rles, scores) in enumerate(predictions)
        for rle, score in zip(rles, scores)
    ]
    return ap.coco(dataset(table), results, True, least)["metrics"]


def test_agnostic_by_hand(capsys):
    truths = [[square(0, 0), square(20, 20)], [square(5, 5)], []]
    predictions = [
        ([square(0, 0), square(0, 0), square(20, 22)], np.array([0.9, 0.8, 0.7])),  # exact, again, IoU 80 / 120
        ([square(30, 30)], np.array([0.95])),  # wrong
        ([], np.zeros(0)),
    ]
    s = agnostic(truths, predictions)
    assert s["precision_50"] == pytest.approx(100 * 2 / 4)
    assert s["recall_50"] == pytest.approx(100 * 2 / 3)
    # 0.667 passes 0.50, 0.55, 0.60, 0.65: 2 of 3 truths there, 1 of 3 above
    assert s["ar_10"] == pytest.approx(s["ar_100"]) and s["ar_100"] == pytest.approx(100 * (4 * 2 / 3 + 6 * 1 / 3) / 10)
    # by score: wrong, right, wrong, right; precision 1/2 up to recall 1/3, 2/4 up to 2/3; 67 of 101 levels
    assert s["ap50"] == pytest.approx(50 * 67 / 101)
    assert s["ap"] == pytest.approx(50 * (4 * 67 + 6 * 34) / 10 / 101)
    assert capsys.readouterr().out == ""
    sure = agnostic(truths, predictions, 0.85)  # the wrong one and the exact one are left
    assert (sure["precision_50"], sure["recall_50"]) == (pytest.approx(50), pytest.approx(100 / 3)) and sure["ap"] == s["ap"]


def test_recall_and_precision_count_all_predictions():
    wrong, right = [square(0, 0)] * 120, [square(20, 20)]
    scores = np.linspace(1, 0.5, 120)
    for place, ar_10, ar_100, recall in ((5, 100, 100, 100), (50, 0, 100, 100), (120, 0, 0, 100)):
        rles = [*wrong[:place], *right, *wrong[place:]]
        s = agnostic([right], [(rles, np.insert(scores, place, scores[place - 1]))])
        assert (s["ar_10"], s["ar_100"], s["recall_50"]) == (ar_10, ar_100, recall)
        assert s["precision_50"] == pytest.approx(100 / 121)
