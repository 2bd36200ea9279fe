import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from torch.nn.functional import interpolate

from depthseg import edges, masks, truth
from depthseg.schema import ABSENT, CORNER_MAX, CORNER_MIN, NEGATIVE, PADDING, POSITIVE, PROMPT_SIDE, Boxes, Frame, Prompts

OFFICIAL = json.loads((Path(__file__).parent / "data" / "geometry.json").read_text())  # answers of the official transforms
SIZES = [(640, 427), (1, 1), (3, 700), (480, 640), (700, 3), (333, 500)]


def logits(kind, s=256, seed=0):
    """Low-resolution logits: noise around 0, or a few smooth blobs on a negative ground."""
    g = np.random.default_rng(seed)
    if kind == "noise":
        return g.standard_normal((s, s)).astype(np.float32)
    if kind == "negative":
        return -1 - g.random((s, s)).astype(np.float32)
    y, x = np.mgrid[:s, :s]
    low = np.full((s, s), -4.0)
    for _ in range(3):
        cy, cx, r = g.integers(0, s), g.integers(0, s), g.integers(2, s // 4)
        low += 8 * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * r**2))
    return low.astype(np.float32)


@pytest.mark.parametrize("case", OFFICIAL, ids=lambda c: f"{c['h']}x{c['w']}")
def test_frame_equals_the_official_geometry(case):
    size = case["h"], case["w"]
    assert list(Frame(size, 512).inner) == case["size512"]
    assert list(Frame(size, 1024).inner) == case["size1024"]
    frame = Frame(size, 512)
    assert list(frame.prompt_inner) == case["size1024"]
    np.testing.assert_allclose(frame.to_prompt(np.array(case["points"])), case["points_1024"], rtol=1e-6)


def two_steps(low, size):
    """The official post-processing: the whole 1024 frame, then the whole picture."""
    h, w = Frame(size, 512).prompt_inner
    big = interpolate(torch.from_numpy(low)[None, None], (PROMPT_SIDE, PROMPT_SIDE), mode="bilinear", align_corners=False)
    return interpolate(big[..., :h, :w], size, mode="bilinear", align_corners=False)[0, 0].numpy()


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["noise", "blobs"])
def test_logits_equal_two_interpolations(size, kind):
    low = logits(kind)
    ours = Frame(size, 512).logits(low)
    assert ours.shape == size and ours.dtype == np.float32
    np.testing.assert_allclose(ours, two_steps(low, size), atol=3e-6)


@pytest.mark.parametrize("size", [*SIZES, (1, 500), (1023, 767), (3000, 4000)], ids=str)
@pytest.mark.parametrize("kind", ["noise", "blobs", "both"])
def test_rle_is_byte_for_byte_that_of_two_interpolations(size, kind):
    for seed in range(1 if max(size) > 2000 else 10):
        low = sum(logits(k, seed=seed) for k in (["noise", "blobs"] if kind == "both" else [kind]))
        assert masks.encode_crop(Frame(size, 512).crop(low)) == masks.encode(two_steps(low, size) > 0)


@pytest.mark.parametrize("size", [*SIZES, (1, 500), (1023, 767)], ids=str)
def test_on_a_card_runs_are_found_as_on_the_host(size, monkeypatch):
    """The same code on the CPU: masks of several prompts, an empty and a full one among them, also in more than one turn."""
    low = np.stack([logits("noise"), logits("blobs"), np.full((256, 256), -1, np.float32), np.full((256, 256), 1, np.float32)])
    frame = Frame(size, 512)
    h, w = frame.valid(256)
    for pixels in (2**25, 1):
        monkeypatch.setattr(edges, "_AT_ONCE", pixels)
        assert edges.rles(torch.from_numpy(low), frame) == [masks.encode_crop(frame.crop(one)) for one in low]
    assert np.allclose(edges.stability(torch.from_numpy(low), frame), masks.stability(low[:, :h, :w]))


def test_rle_of_real_masks_is_that_of_two_interpolations(shared):
    """Logits as SAM gives them for true masks: steep at the outline, uneven elsewhere."""
    picked = truth.read(shared / "data" / "coco-mini" / "images", shared / "data" / "coco-mini" / "annotations" / "instances_val.json")
    count = 0
    for seed, t in enumerate(picked.truths[:20]):
        h, w = Frame(t.image.size, 512).prompt_inner
        for rle in t.rle[:8]:
            frame = np.zeros((PROMPT_SIDE, PROMPT_SIDE), np.float32)
            frame[:h, :w] = np.asarray(PILImage.fromarray(masks.decode(rle)).resize((w, h)))
            low = interpolate(torch.from_numpy(frame)[None, None], (256, 256), mode="area")[0, 0].numpy()
            low = 20 * low - 10 + logits("noise", seed=seed)
            for size in (t.image.size, (1500, 2001)):
                count += 1
                assert masks.encode_crop(Frame(size, 512).crop(low)) == masks.encode(two_steps(low, size) > 0)
    assert count > 200


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", ["noise", "blobs", "negative"])
def test_mask_is_the_sign_of_the_logits(size, kind):
    frame = Frame(size, 512)
    for seed in range(6):
        low = logits(kind, seed=seed)
        mask = frame.crop(low).whole()
        assert mask.shape == size and mask.dtype == bool
        assert np.array_equal(mask, frame.logits(low) > 0)


def test_mask_finds_single_pixels_and_ignores_the_padding():
    frame = Frame((480, 640), 512)
    for at in ((0, 0), (100, 37), (191, 255)):
        low = np.full((256, 256), -1, np.float32)
        low[at] = 50
        assert frame.crop(low).whole().any() and np.array_equal(frame.crop(low).whole(), frame.logits(low) > 0)
    low = np.full((256, 256), -1, np.float32)
    low[200:] = 50  # below the image: it fills rows 0 to 191
    assert not frame.crop(low).whole().any()
    assert frame.valid(256) == (192, 256)


@pytest.mark.parametrize("size", [(30, 40), (64, 64), (9, 64), (50, 20)])
def test_image_is_normalised_then_padded(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    frame = Frame(size, 64)
    x, (h, w) = frame.image(pixels), frame.inner
    assert x.shape == (3, 64, 64) and x.dtype == np.float32 and max(h, w) == 64
    assert not x[:, h:].any() and not x[:, :, w:].any() and x[:, :h, :w].any(0).mean() > 0.99
    if size == (h, w):
        np.testing.assert_allclose(x[0, :h, :w], (pixels[..., 0] - 123.675) / 58.395, atol=1e-5)
    grey = np.full(size, 0.5, np.float32)
    np.testing.assert_allclose(frame.depth(grey)[1, :h, :w], (127.5 - 116.28) / 57.12, atol=1e-5)
    np.testing.assert_allclose(frame.depth(grey[:7, :5])[:, :h, :w], frame.depth(grey)[:, :h, :w], atol=1e-5)  # any resolution


def test_prompts_of_boxes_and_points():
    boxes = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    points, signs = np.array([[[10, 20], [30, 40]], [[50, 60], [70, 80]]]), np.array([[1, 0], [1, 1]])

    p = Prompts.of(boxes=boxes)
    assert p.points.shape == (2, 2, 2) and p.points.dtype == np.float32 and p.points[1].tolist() == [[5, 6], [7, 8]]
    assert p.labels.tolist() == [[CORNER_MIN, CORNER_MAX]] * 2 and p.labels.dtype == np.int64

    p = Prompts.of(points=points, signs=signs)
    assert p.points.shape == (2, 3, 2) and p.points[0].tolist() == [[10, 20], [30, 40], [0, 0]]
    assert p.labels.tolist() == [[POSITIVE, NEGATIVE, PADDING], [POSITIVE, POSITIVE, PADDING]]

    p = Prompts.of(points=points)
    assert p.labels.tolist() == [[POSITIVE, POSITIVE, PADDING]] * 2

    p = Prompts.of(boxes, points, signs)  # no padding token where there is a box
    assert p.points.shape == (2, 4, 2) and p.points[0].tolist() == [[10, 20], [30, 40], [1, 2], [3, 4]]
    assert p.labels.tolist() == [[1, 0, 2, 3], [1, 1, 2, 3]] and len(p) == 2

    assert Prompts.of(boxes=boxes[:0]).points.shape == (0, 2, 2)
    assert Prompts.of(points=points[:0], signs=signs[:0]).points.shape == (0, 3, 2)
    assert ABSENT not in p.labels


def test_arrays_that_do_not_match_are_refused():
    with pytest.raises(ValueError):
        Prompts(np.zeros((2, 3, 2)), np.zeros((2, 2)))
    with pytest.raises(ValueError):
        Boxes(np.zeros((2, 4)), np.zeros(3), np.zeros(2))
    assert len(Boxes.empty()) == 0
    kept = Boxes(np.arange(12).reshape(3, 4), np.array([0.1, 0.2, 0.3]), np.array([7, 8, 9])).keep(np.array([2, 0]))
    assert kept.label.tolist() == [9, 7] and kept.xyxy[0].tolist() == [8, 9, 10, 11]


def test_memory_does_not_grow_with_the_number_of_sizes():
    """Interpolation matrices are kept for a few sizes only: a folder may hold as many sizes as pictures."""
    from depthseg import schema

    for i in range(40):
        Frame((300 + i, 400 - i), 512).logits(np.zeros((256, 256), np.float32))
    assert schema._upsampling.cache_info().currsize <= 64
    assert not hasattr(schema._linear, "cache_info")
