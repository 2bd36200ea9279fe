import cv2
import numpy as np
import pytest

from depthseg import masks
from depthseg.schema import Crop


def blobs(seed, size=(40, 56), count=1):
    """Random bool masks made of a few boxes, some with noise in them."""
    g = np.random.default_rng(seed)
    out = np.zeros((count, *size), bool)
    for m in out:
        for _ in range(g.integers(1, 4)):
            y, x = g.integers(0, size[0]), g.integers(0, size[1])
            m[y : y + g.integers(1, 20), x : x + g.integers(1, 20)] = True
        if g.random() < 0.5:
            m ^= g.random(size) < 0.03
    return out


def test_encode_and_decode_are_inverse():
    for m in [*blobs(0, count=10), np.zeros((5, 7), bool), np.ones((5, 7), bool), np.ones((1, 1), bool)]:
        rle = masks.encode(m)
        assert rle["size"] == list(m.shape) and isinstance(rle["counts"], str)
        back = masks.decode(rle)
        assert back.dtype == bool and np.array_equal(back, m)
        assert np.array_equal(masks.decode({**rle, "counts": rle["counts"].encode()}), m)


def pieces(mask, seed):
    """Crops that hold all of a mask: the whole, the tightest, one of full height, one of full width, and some between."""
    g, (h, w) = np.random.default_rng(seed), mask.shape
    y, x = (np.flatnonzero(mask.any(1 - axis)) for axis in (0, 1))
    y0, y1, x0, x1 = (y[0], y[-1] + 1, x[0], x[-1] + 1) if len(y) else (0, 1, 0, 1)
    for top, bottom, left, right in [
        (0, h, 0, w), (y0, y1, x0, x1), (0, h, x0, x1), (y0, y1, 0, w),
        *((g.integers(0, y0 + 1), g.integers(y1, h + 1), g.integers(0, x0 + 1), g.integers(x1, w + 1)) for _ in range(4)),
    ]:  # fmt: skip
        yield Crop(mask[top:bottom, left:right], (int(left), int(top)), (h, w))


@pytest.mark.parametrize("size", [(40, 56), (1, 1), (1, 9), (9, 1), (31, 17)])
def test_a_piece_gives_the_bytes_of_the_whole(size):
    g = np.random.default_rng(5)
    noise = g.random((6, *size)) < g.random((6, 1, 1))
    for seed, m in enumerate([*blobs(4, size, 10), *noise, np.zeros(size, bool), np.ones(size, bool)]):
        for crop in pieces(m, seed):
            assert np.array_equal(crop.whole(), m)
            assert masks.encode_crop(crop) == masks.encode(m)
            assert np.array_equal(crop.wider(3).whole(), m) and min(crop.wider(3).corner) >= 0


@pytest.mark.parametrize("edges", [True, False])
@pytest.mark.parametrize("least", [0, 2, 5, 12, 60, 5000])
def test_cleaning_a_piece_is_cleaning_the_whole(least, edges):
    for seed, m in enumerate(blobs(6, count=30)):
        for crop in pieces(m, seed):
            assert np.array_equal(masks.clean_crop(crop, least, edges).whole(), masks.clean(m, least, edges))


def test_decode_takes_uncompressed_runs():
    m = masks.decode({"size": [3, 2], "counts": [1, 2, 1, 2]})  # column by column, background first
    assert np.array_equal(m, [[0, 0], [1, 1], [1, 1]])


def test_area_boxes_and_iou_against_pixels():
    stack = blobs(1, count=12)
    rles = [masks.encode(m) for m in stack]
    assert masks.area(rles).dtype == np.int64 and np.array_equal(masks.area(rles), stack.sum((1, 2)))
    for box, m in zip(masks.boxes(rles), stack):
        y, x = np.nonzero(m)
        assert np.array_equal(box, [x.min(), y.min(), x.max() + 1, y.max() + 1])
    expected = [[(a & b).sum() / (a | b).sum() for b in stack[:5]] for a in stack]
    np.testing.assert_allclose(masks.iou(rles, rles[:5]), expected)


def test_nothing_is_allowed():
    some = [masks.encode(np.ones((2, 2), bool))]
    assert masks.area([]).shape == (0,) and masks.boxes([]).shape == (0, 4)
    assert masks.boxes([]).dtype == np.float32
    assert masks.iou([], some).shape == (0, 1) and masks.iou(some, []).shape == (1, 0) and masks.iou([], []).shape == (0, 0)
    assert np.array_equal(masks.boxes([masks.encode(np.zeros((4, 4), bool))]), [[0, 0, 0, 0]])
    assert masks.suppress([], np.zeros(0), 0.5).shape == (0,)
    assert np.array_equal(masks.label_map([], (2, 3)), np.zeros((2, 3)))


def test_outermost():
    whole, part, apart = np.zeros((3, 20, 20), bool)
    whole[2:12, 2:12] = part[5:9, 5:9] = apart[8:18, 8:18] = True
    rles = [masks.encode(m) for m in (part, whole, apart, whole)]
    assert masks.outermost(rles).tolist() == [1, 2, 3]  # equal masks are no parts of each other
    assert masks.outermost([]).tolist() == []


def test_hundreds_of_masks():
    rles = [masks.encode(np.arange(700).reshape(1, -1) < n) for n in range(700)]
    assert np.array_equal(masks.area(rles), np.arange(700))
    assert np.array_equal(masks.boxes(rles)[1:, 2], np.arange(1, 700))
    assert masks.iou(rles, rles).shape == (700, 700)
    assert masks.suppress(rles, np.arange(700), 0.5).tolist() == [699, 349, 174, 87, 43, 21, 10, 5, 2, 1, 0]


def test_stability():
    low = np.full((3, 2, 2), -5, np.float32)
    low[0] = [[2, 2], [0, -2]]  # 2 above +1, 3 above -1
    low[1] = 7
    score = masks.stability(low)
    assert score.dtype == np.float32
    np.testing.assert_allclose(score, [2 / 3, 1, 0])
    assert masks.stability(low, offset=3)[0] == 0
    assert masks.stability(low[:0]).shape == (0,)


def clean_by_opencv(mask, least):
    """SAM's rules with OpenCV's components, on the whole picture."""
    for background in (True, False):
        count, regions, stats, _ = cv2.connectedComponentsWithStats((mask ^ background).astype(np.uint8), connectivity=8)
        sizes = stats[1:, cv2.CC_STAT_AREA]
        small = [i for i in range(1, count) if sizes[i - 1] < least]
        if background:
            mask = mask | np.isin(regions, small)
        elif small:
            large = [i for i in range(1, count) if i not in small] or [1 + int(np.argmax(sizes))]
            mask = np.isin(regions, large)
    return mask


@pytest.mark.parametrize("least", [0, 1, 2, 5, 12, 60, 5000])
def test_clean_equals_opencv(least):
    for m in blobs(2, count=40):
        before = m.copy()
        assert np.array_equal(masks.clean(m, least), clean_by_opencv(m, least))
        assert np.array_equal(m, before)


def test_clean_by_hand():
    m = np.zeros((30, 30), bool)
    m[5:20, 5:20] = True
    m[10, 10] = False  # a hole
    m[25, 25] = True  # an island
    whole = np.zeros((30, 30), bool)
    whole[5:20, 5:20] = True
    assert np.array_equal(masks.clean(m, 4), whole)
    assert not masks.clean(np.zeros((4, 4), bool), 3).any()


@pytest.mark.parametrize("least", [2, 5, 60])
def test_clean_without_edges_equals_filling_from_outside(least):
    """A background that reaches the picture's edge gets a huge margin, which is taken off again: then it is no hole."""
    for m in blobs(7, count=30):
        expected = clean_by_opencv(np.pad(m, 100), least)[100:-100, 100:-100]
        assert np.array_equal(masks.clean(m, least, edges=False), expected)


def test_clean_may_leave_the_edge_alone():
    m = np.ones((12, 12), bool)
    m[:3, :3] = m[6, 6] = False  # a corner of 9 pixels and a hole of one
    assert masks.clean(m, 10).all()
    kept = masks.clean(m, 10, edges=False)
    assert not kept[:3, :3].any() and kept.sum() == 144 - 9


def suppress_by_pixels(stack, scores, threshold, nested):
    def whole(a, b):
        return min(a.sum(), b.sum()) if nested else (a | b).sum()

    kept = []
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        if all((stack[i] & stack[j]).sum() <= threshold * max(1, whole(stack[i], stack[j])) for j in kept):
            kept.append(i)
    return kept


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5, 0.7, 1.0])
def test_suppress_equals_the_plain_way(threshold, nested):
    stack = blobs(3, size=(24, 24), count=60)
    stack[10:20] = np.roll(stack[:10], 1, 2)  # near duplicates
    stack[20:25], stack[25] = stack[:5], False  # exact ones; an empty mask
    scores = np.random.default_rng(4).integers(0, 20, len(stack)) / 20  # with ties
    rles = [masks.encode(m) for m in stack]
    kept = masks.suppress(rles, scores, threshold, nested=nested)
    assert kept.tolist() == suppress_by_pixels(stack, scores, threshold, nested)
    assert masks.suppress(rles, scores, threshold, boxes=masks.boxes(rles), nested=nested).tolist() == kept.tolist()


def test_suppress_keeps_what_lies_exactly_at_the_threshold():
    a, b = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    a[:, :2], b[:, :1] = True, True  # IoU 0.5
    rles = [masks.encode(a), masks.encode(b)]
    assert masks.suppress(rles, np.array([0.1, 0.9]), 0.5).tolist() == [1, 0]
    assert masks.suppress(rles, np.array([0.1, 0.9]), 0.49).tolist() == [1]


def test_label_map_puts_the_best_on_top():
    a, b = np.zeros((3, 4), bool), np.zeros((3, 4), bool)
    a[:2], b[1:, :3] = True, True
    labels = masks.label_map([masks.encode(a), masks.encode(b)], (3, 4))
    assert labels.dtype == np.uint16
    assert np.array_equal(labels, [[1, 1, 1, 1], [1, 1, 1, 1], [2, 2, 2, 0]])
