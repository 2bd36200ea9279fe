"""What scoring says about made-up predictions, by hand; and predictions of files, whole and spoilt."""

import json

import numpy as np
import pytest
from scipy.ndimage import binary_erosion
from test_ap import SIZE, dataset, made_up

from depthseg import ap, compare, masks, metrics, predictions, score
from depthseg.errors import DepthsegError


def box(x0, y0, x1, y1):
    m = np.zeros(SIZE, bool)
    m[y0:y1, x0:x1] = True
    return masks.encode(m)


def table(*annotations):
    """A data set of one image with (category, box) annotations."""
    return {
        "images": [{"id": 5, "height": SIZE[0], "width": SIZE[1], "file_name": "5.png"}],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [
            {
                "id": n, "image_id": 5, "category_id": label, "segmentation": box(*xyxy), "area": float(masks.area([box(*xyxy)])[0]),
                "bbox": [xyxy[0], xyxy[1], xyxy[2] - xyxy[0], xyxy[3] - xyxy[1]], "iscrowd": crowd,
            }
            for n, (label, xyxy, crowd) in enumerate(annotations, 1)
        ],
    }  # fmt: skip


def result(label, xyxy, value, prompt=None, **more):
    x0, y0, x1, y1 = prompt or xyxy
    return {
        "image_id": 5, "category_id": label, "segmentation": box(*xyxy), "score": value, "prompt_box": [x0, y0, x1 - x0, y1 - y0], **more
    }  # fmt: skip


def test_what_became_of_truths_and_predictions():
    truth = table(
        (1, (0, 0, 10, 10), 0), (1, (20, 0, 30, 10), 0), (2, (40, 0, 50, 10), 0), (2, (60, 0, 70, 10), 0), (1, (0, 30, 80, 60), 1)
    )
    found = [
        result(1, (0, 0, 10, 10), 0.9),  # right
        result(1, (0, 0, 10, 9), 0.8),  # the same again
        result(1, (20, 0, 30, 3), 0.7, (20, 0, 30, 10)),  # the right box, a poor mask
        result(1, (40, 0, 50, 10), 0.6),  # the right mask, the wrong class
        result(1, (10, 40, 20, 50), 0.5),  # on the crowd: nothing is said
        result(2, (70, 20, 75, 25), 0.4),  # nothing there
    ]
    errors = score.detected(dataset(truth), found).report["errors"]
    assert errors["truth"] == {"found": 1, "poor_mask": 1, "wrong_class": 1, "missed": 1}
    # the best four, as many as there are things
    assert errors["predictions"] == {"right": 1, "duplicate": 1, "poor_mask": 1, "wrong_class": 1, "background": 0}
    assert errors["box_recall"] == 50 and errors["miou_given_box"] == pytest.approx(100 * (1 + 0.3) / 2)
    blind = score.detected(dataset(truth), found, agnostic=True).report
    assert blind["errors"]["truth"] == {"found": 2, "poor_mask": 1, "wrong_class": 0, "missed": 1} and blind["per_class"] == []


def test_the_score_that_ranks():
    truth = table((1, (0, 0, 10, 10), 0))
    found = [result(1, (0, 0, 10, 10), 0.5, predicted_iou=0.9), result(1, (30, 30, 40, 40), 0.6, predicted_iou=0.1)]
    ap50 = [score.detected(dataset(truth), found, rank).report["metrics"]["ap50"] for rank in score.RANKS]
    assert ap50 == pytest.approx([50, 100, 100])
    with pytest.raises(DepthsegError, match="no predicted_iou"):
        score.detected(dataset(truth), [{k: v for k, v in found[0].items() if k != "predicted_iou"}], "product")


def test_prompts_without_an_answer_count_as_nothing():
    truth = table((1, (0, 0, 10, 10), 0), (2, (20, 20, 40, 40), 0))
    found = [result(1, (0, 0, 10, 10), 1.0, annotation_id=1, predicted_iou=0.5)]
    scored = score.prompted(dataset(truth), found, "official")
    assert scored.report["metrics"]["miou"] == pytest.approx(50)
    assert scored.report["warnings"] == ["1 prompts have no prediction and count as 0"]
    assert [row["miou"] for row in scored.report["per_class"]] == pytest.approx([100, 0])
    assert score.prompted(dataset(truth), [], "official").report["metrics"]["miou"] == 0
    with pytest.raises(DepthsegError, match="two predictions answer"):
        score.prompted(dataset(truth), found * 2, "official")
    with pytest.raises(DepthsegError, match="annotation_id"):
        score.prompted(dataset(truth), [result(1, (0, 0, 10, 10), 1.0)] * 2, "official")


def test_bounds_of_sizes_and_crowds_by_protocol():
    truth = table((1, (0, 0, 32, 32), 0), (1, (40, 0, 72, 32), 1))
    found = [result(1, (0, 0, 32, 32), 1.0, annotation_id=1), result(1, (40, 0, 72, 16), 1.0, annotation_id=2)]
    official, strict = (score.prompted(dataset(truth), found, p).report["metrics"] for p in ("official", "strict"))
    assert (official["miou"], official["miou_small"], official["miou_medium"]) == pytest.approx((75, 75, 75))
    assert strict["miou_medium"] == pytest.approx(100) and strict["miou_small"] is None


def test_intervals_hold_the_mean_and_shrink_with_agreement():
    g = np.random.default_rng(0)
    ids, image, iou = np.arange(50), np.repeat(np.arange(50), 4), g.random(200)
    low, high = score.interval(ids, image, iou)
    assert low < 100 * iou.mean() < high and 2 < high - low < 25
    assert score.interval(ids, image, iou - iou) == [0, 0]
    low, high = score.interval(ids, image, np.full(200, 0.25))
    assert low == pytest.approx(25) == pytest.approx(high)
    data = dataset(made_up(4)[0])
    ask, results = score.Request("detector"), made_up(4)[1]
    assert score.paired_ap(data, ask, results, results) == {"ap": [0, 0]}
    low, high = score.paired_ap(data, ask, results, [])["ap"]
    plain = ap.coco(data, results)["metrics"]["ap"]
    assert 0 < low < plain < high
    assert score.interval(ids, np.zeros(4, int), np.full(4, 0.8)) == pytest.approx([80, 80])  # one image holds all masks


def by_erosion(mask, steps):
    return mask & ~binary_erosion(np.pad(mask, 1), np.ones((3, 3)), iterations=steps)[1:-1, 1:-1]


@pytest.mark.parametrize("seed", range(6))
def test_boundary_iou_equals_plain_erosion(seed):
    g = np.random.default_rng(seed)
    size = tuple(g.integers(20, 120, 2))
    y, x = np.mgrid[: size[0], : size[1]]

    def shape():
        cy, cx, r = g.uniform(0, size[0]), g.uniform(0, size[1]), g.uniform(0, 70)
        return (((y - cy) ** 2 + (x - cx) ** 2) < r**2) ^ (g.random(size) > 0.995)

    pairs = [(shape(), shape()) for _ in range(5)] + [(np.zeros(size, bool), shape()), (np.zeros(size, bool),) * 2]
    steps = max(1, round(0.02 * np.hypot(*size)))
    expected = [(a & b).sum() / max(1, (a | b).sum()) for a, b in ((by_erosion(p, steps), by_erosion(q, steps)) for p, q in pairs)]
    ours = metrics.boundary_iou(*([masks.encode(m) for m in some] for some in zip(*pairs)))
    assert ours.tolist() == expected


def test_depth_jumps_at_a_boundary():
    mask = np.zeros((60, 80), bool)
    mask[20:40, 20:60] = True
    step = np.where(mask, 0.9, 0.2).astype(np.float32)
    assert metrics.depth_contrast(mask, step) == pytest.approx(0.7)
    assert metrics.depth_contrast(mask, step[::2, ::2]) == pytest.approx(0.7)
    assert metrics.depth_contrast(mask, np.full((5, 5), 0.5)) == 0
    assert metrics.depth_contrast(np.zeros((60, 80), bool), step) is None and metrics.depth_contrast(np.ones((60, 80), bool), step) is None


# ---- predictions of a file ----


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is not JSON"),
        ('{"a": 1}', "a list of COCO results"),
        ("[1]", "entry 0: an object"),
        ('[{"image_id": "a"}]', "entry 0: image_id"),
        ('[{"image_id": 5, "category_id": 1}]', "entry 0: score"),
        ('[{"image_id": 5, "category_id": 1, "score": NaN}]', "entry 0: score"),
        ('[{"image_id": 5, "category_id": 1, "score": 1, "segmentation": {"size": [1, 1], "counts": "11"}}]', "entry 0: segmentation"),
        ('[{"image_id": 5, "category_id": 1, "score": 1}]', "entry 0: segmentation"),
        ('[{"image_id": 6, "category_id": 1, "score": 1}]', "only 0 of 1 predictions fit"),
    ],
)
def test_what_are_no_predictions_is_refused(tmp_path, content, words):
    path = tmp_path / "p.json"
    path.write_text(content)
    with pytest.raises(DepthsegError) as error:
        predictions.read(path, dataset(table((1, (0, 0, 10, 10), 0))))
    assert words in error.value.message
    with pytest.raises(DepthsegError, match="cannot read"):
        predictions.read(tmp_path / "nowhere.json", dataset(table()))


def test_predictions_about_something_else_are_counted(tmp_path):
    data, path = dataset(table((1, (0, 0, 10, 10), 0))), tmp_path / "p.json"
    good = [result(1, (0, 0, 10, 10), 0.5), result(2, (0, 0, 10, 10), 0.4), result(1, (0, 0, 5, 5), 0.4)]
    path.write_text(json.dumps([*good, {**good[0], "image_id": 99}, {**good[0], "category_id": 9}]))
    kept, warnings = predictions.read(path, data)
    assert [k["score"] for k in kept] == [0.5, 0.4, 0.4] and len(warnings) == 2
    polygon = [{"image_id": 5, "category_id": 1, "score": 1, "segmentation": [[0, 0, 10, 0, 10, 10, 0, 10]]}]
    path.write_text(json.dumps(polygon))
    assert masks.area([predictions.read(path, data)[0][0]["segmentation"]]) == [100]


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(DepthsegError, match="not from an evaluation"), predictions.Journal(tmp_path, {}, dataset(table())):
        pass
    (tmp_path / "run.json").unlink()
    (tmp_path / "predictions.json").write_text("mine")
    with pytest.raises(DepthsegError, match="predictions but no"), predictions.Journal(tmp_path, {}, dataset(table())):
        pass
    assert (tmp_path / "predictions.json").read_text() == "mine"


# ---- two runs ----


def written(folder, results, data, **changes):
    """A finished evaluation in a folder."""
    folder.mkdir()
    scored = score.prompted(data, results, "official")
    report = {**score.report(data, scored, score.Request()), **changes}
    (folder / "report.json").write_text(json.dumps(report))
    compare.write_scores(folder, data, scored.table)
    return folder


def test_two_runs_are_compared(tmp_path):
    data = dataset(table((1, (0, 0, 10, 10), 0), (2, (20, 20, 40, 40), 0)))
    right = [result(1, (0, 0, 10, 10), 1.0, annotation_id=1), result(1, (20, 20, 40, 40), 1.0, annotation_id=2)]
    half = [right[0], result(1, (20, 20, 40, 30), 1.0, annotation_id=2)]
    a, b = written(tmp_path / "a", right, data), written(tmp_path / "b", half, data)
    rows, images, headline = compare.compare(a, b)
    row = {r.metric: r for r in rows}["miou"]
    assert (row.a, row.b) == pytest.approx((100, 75)) and row.low == pytest.approx(-25) and headline == "miou"
    assert images == [("5.png", pytest.approx(-25))]
    with pytest.raises(DepthsegError, match="holds no finished evaluation"):
        compare.compare(a, tmp_path)
    with pytest.raises(DepthsegError, match="other protocols"):
        compare.compare(a, written(tmp_path / "c", right, data, protocol="strict"))
    with pytest.raises(DepthsegError, match="other images"):
        compare.compare(a, written(tmp_path / "d", right[:1], dataset(table((1, (0, 0, 10, 10), 0)))))
