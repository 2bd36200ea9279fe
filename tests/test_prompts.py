import json
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt

from depthseg import masks, schema
from depthseg.prompts import centredness, grid, next_click
from depthseg.schema import Crop

OFFICIAL = json.loads((Path(__file__).parent / "data" / "protocol.json").read_text())  # answers of the official clicker


def draw(shape):
    """Bool mask of a formula in protocol.json; None is empty."""
    y, x = np.mgrid[: OFFICIAL["canvas"][0], : OFFICIAL["canvas"][1]]
    if shape is None:
        return np.zeros(y.shape, bool)
    kind, a, b, c, d = shape
    return ((y - a) / c) ** 2 + ((x - b) / d) ** 2 <= 1 if kind == "ell" else (a <= y) & (y < c) & (b <= x) & (x < d)


def test_grid():
    g = grid((100, 200), 2)
    assert g.points.dtype == np.float32 and g.points.shape == (4, 2, 2)
    assert g.points[:, 0].tolist() == [[50, 25], [150, 25], [50, 75], [150, 75]]
    assert g.labels.tolist() == [[schema.POSITIVE, schema.PADDING]] * 4
    assert grid((7, 5), 1).points[0, 0].tolist() == [2.5, 3.5]
    assert len(grid((3, 700), 16)) == 256


@pytest.mark.parametrize("name", OFFICIAL["cases"])
def test_clicks_equal_the_official_ones(name):
    case = OFFICIAL["cases"][name]
    truth = draw(case["gt"])
    assert truth.sum() == case["gt_area"]
    clicks = []
    for shown in [None, *case["predictions_shown_after_each_click"]]:
        clicked = np.array([click[:2] for click in clicks], int).reshape(-1, 2)
        clicks.append(next_click(truth, draw(shown), clicked))
    assert clicks == [(c["x"], c["y"], c["positive"]) for c in case["clicks"]]
    assert all(type(x) is int and type(y) is int and type(p) is bool for x, y, p in clicks)


def test_centredness():
    mask = np.zeros((9, 12), bool)
    mask[2:9, 5:12] = True  # 7 x 7 up to the border, which is a rim, too
    for crop in (Crop(mask, (0, 0), mask.shape), Crop(mask[1:, 4:], (4, 1), mask.shape), masks.crop(masks.encode(mask))):
        assert [centredness(crop, np.array(at)) for at in ((8.9, 5), (5, 2), (7.5, 5.5))] == [1, 0.25, 0.75]
        assert [centredness(crop, np.array(at)) for at in ((4.9, 5), (12, 5), (8, 9.2), (-0.5, 5))] == [0, 0, 0, 0]
    nothing = masks.crop(masks.encode(np.zeros((9, 12), bool)))
    assert nothing.pixels.shape == (1, 1) and centredness(nothing, np.array((0, 0))) == 0


def test_centredness_in_a_large_mask_is_that_of_a_coarser_one():
    y, x = np.mgrid[:900, :1300]
    mask = (x - 700) ** 2 + (y - 450) ** 2 < 400**2
    crop = masks.crop(masks.encode(mask))
    for at in ((700, 450), (850, 450), (700, 90), (330, 400)):
        exact = max(0, 1 - np.hypot(at[0] - 700, at[1] - 450) / 400)
        assert abs(centredness(crop, np.array(at)) - exact) < 0.02


def next_click_on_the_whole_picture(truth, prediction, clicked):
    missing, wrong = (distance_transform_edt(np.pad(m, 1))[1:-1, 1:-1] for m in (truth & ~prediction, prediction & ~truth))
    for x, y in clicked:
        missing[y, x] = wrong[y, x] = 0
    positive = bool(missing.max() > wrong.max())
    y, x = divmod(int((missing if positive else wrong).argmax()), truth.shape[1])
    return x, y, positive


def test_the_window_changes_nothing():
    g = np.random.default_rng(0)
    for _ in range(200):
        h, w = g.integers(1, 30, 2)
        truth, prediction = np.zeros((2, h, w), bool)
        for m in (truth, prediction):
            for _ in range(g.integers(0, 3)):
                y, x = g.integers(0, h), g.integers(0, w)
                m[y : y + g.integers(1, 12), x : x + g.integers(1, 12)] = True
            m ^= g.random((h, w)) < g.choice([0, 0.02])
        clicked = np.zeros((0, 2), int)
        for _ in range(4):
            click = next_click(truth, prediction, clicked)
            assert click == next_click_on_the_whole_picture(truth, prediction, clicked)
            clicked = np.concatenate([clicked, [click[:2]]])


def test_nothing_left_to_click():
    one = np.zeros((4, 5), bool)
    one[2, 3] = True
    assert next_click(one, ~one & one, np.zeros((0, 2), int)) == (3, 2, True)
    assert next_click(one, ~one & one, np.array([[3, 2]])) == (0, 0, False)
    assert next_click(one, one, np.zeros((0, 2), int)) == (0, 0, False)
