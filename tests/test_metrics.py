import json
from pathlib import Path

import numpy as np
import pytest

from depthseg import masks, metrics

OFFICIAL = json.loads((Path(__file__).parent / "data" / "protocol.json").read_text())  # answers of the official evaluation


def draw(shape):
    """RLE of a formula in protocol.json; None is empty."""
    y, x = np.mgrid[: OFFICIAL["canvas"][0], : OFFICIAL["canvas"][1]]
    if shape is None:
        return masks.encode(np.zeros(y.shape, bool))
    kind, a, b, c, d = shape
    inside = ((y - a) / c) ** 2 + ((x - b) / d) ** 2 <= 1 if kind == "ell" else (a <= y) & (y < c) & (b <= x) & (x < d)
    return masks.encode(inside)


def square(y, x, side=10, size=(40, 60)):
    m = np.zeros(size, bool)
    m[y : y + side, x : x + side] = True
    return masks.encode(m)


@pytest.mark.parametrize("name", OFFICIAL["cases"])
def test_mask_iou_equals_the_official_one(name):
    case = OFFICIAL["cases"][name]
    shown = [draw(s) for s in case["predictions_shown_after_each_click"]]
    np.testing.assert_allclose(100 * metrics.mask_iou([draw(case["gt"])] * len(shown), shown), case["iou_percent"], rtol=1e-12)


def test_mask_iou_of_nothing():
    assert metrics.mask_iou([draw(None)], [draw(None)]).tolist() == [OFFICIAL["iou_empty_vs_empty"]]
    assert metrics.mask_iou([], []).shape == (0,)
    assert metrics.mask_iou([square(0, 0)] * 300, [square(0, 5)] * 300) == pytest.approx(1 / 3)
    with pytest.raises(ValueError):
        metrics.mask_iou([draw(None)], [square(0, 0)])
    with pytest.raises(ValueError):
        metrics.mask_iou([draw(None)], [])


def test_miou_equals_the_official_one():
    rows, result = OFFICIAL["iou_metric"]["rows"], OFFICIAL["iou_metric"]["result"]
    ours = metrics.miou(np.array([r["iou"] / 100 for r in rows]), np.array([r["area"] for r in rows]))
    assert ours == pytest.approx({"miou": result["all"], **{f"miou_{n}": result[n] for n in ("small", "medium", "large")}})


def test_miou_of_empty_bins_is_none():
    assert metrics.miou(np.array([0.5]), np.array([100])) == {
        "miou": 50.0,
        "miou_small": 50.0,
        "miou_medium": None,
        "miou_large": None,
    }
    assert set(metrics.miou(np.zeros(0), np.zeros(0)).values()) == {None}


def test_class_agnostic_by_hand(capsys):
    truths = [[square(0, 0), square(20, 20)], [square(5, 5)], []]
    predictions = [
        ([square(0, 0), square(0, 0), square(20, 22)], np.array([0.9, 0.8, 0.7])),  # exact, again, IoU 80 / 120
        ([square(30, 30)], np.array([0.95])),  # wrong
        ([], np.zeros(0)),
    ]
    s = metrics.class_agnostic(truths, predictions)
    assert s["precision_50"] == pytest.approx(100 * 2 / 4)
    assert s["recall_50"] == pytest.approx(100 * 2 / 3)
    # 0.667 passes 0.50, 0.55, 0.60, 0.65: 2 of 3 truths there, 1 of 3 above
    assert s["ar_10"] == s["ar_100"] == pytest.approx(100 * (4 * 2 / 3 + 6 * 1 / 3) / 10)
    # by score: wrong, right, wrong, right; precision 1/2 up to recall 1/3, 2/4 up to 2/3; 67 of 101 levels
    assert s["ap_50"] == pytest.approx(50 * 67 / 101)
    assert s["ap"] == pytest.approx(50 * (4 * 67 + 6 * 34) / 10 / 101)
    assert capsys.readouterr().out == ""


def matched_at_half(truths, predictions):
    """Greedy matching at IoU 0.5, best score first, image by image: how many predictions are right."""
    right = 0
    for truth, (rles, scores) in zip(truths, predictions):
        overlap = masks.iou(rles, truth)
        for i in np.argsort(-scores, kind="stable"):
            if overlap.shape[1] and overlap[i].max() >= 0.5:
                overlap[:, overlap[i].argmax()] = -1
                right += 1
    return right


def test_recall_and_precision_equal_plain_matching():
    g = np.random.default_rng(0)
    truths = [[square(*g.integers(0, (30, 50))) for _ in range(g.integers(0, 7))] for _ in range(8)]
    predictions = []
    for truth in truths:
        near = [np.roll(masks.decode(t), g.integers(-4, 5, 2), (0, 1)) for t in truth for _ in range(2)]
        rles = [*map(masks.encode, near), *(square(*g.integers(0, (30, 50))) for _ in range(3))]
        predictions.append((rles, g.permutation(len(rles)) / 100))
    s = metrics.class_agnostic(truths, predictions)
    right = matched_at_half(truths, predictions)
    assert s["precision_50"] == pytest.approx(100 * right / sum(len(r) for r, _ in predictions))
    assert s["recall_50"] == pytest.approx(100 * right / sum(map(len, truths)))
    assert 0 < s["ar_10"] <= s["ar_100"] <= s["recall_50"] and s["ap"] < s["ap_50"]


def test_limits_count_the_best_of_each_image():
    wrong, right = [square(0, 0)] * 120, [square(20, 20)]
    scores = np.linspace(1, 0.5, 120)
    for place, ar_10, ar_100, recall in ((5, 100, 100, 100), (50, 0, 100, 100), (120, 0, 0, 100)):
        rles = [*wrong[:place], *right, *wrong[place:]]
        s = metrics.class_agnostic([right], [(rles, np.insert(scores, place, scores[place - 1]))])
        assert (s["ar_10"], s["ar_100"], s["recall_50"]) == (ar_10, ar_100, recall)
        assert s["precision_50"] == pytest.approx(100 / 121)


def test_class_agnostic_of_nothing():
    none = {"ar_10": None, "ar_100": None, "recall_50": None, "precision_50": None, "ap_50": None, "ap": None}
    empty: tuple = ([], np.zeros(0))
    assert metrics.class_agnostic([], []) == none
    assert metrics.class_agnostic([[]], [empty]) == none
    assert metrics.class_agnostic([[]], [([square(0, 0)], np.ones(1))]) == {**none, "precision_50": 0.0}
    missed = metrics.class_agnostic([[square(0, 0)]], [empty])
    assert missed == {**dict.fromkeys(none, 0.0), "precision_50": None}
    with pytest.raises(ValueError):
        metrics.class_agnostic([[]], [])
