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
