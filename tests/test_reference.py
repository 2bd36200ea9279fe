"""The official loop: computed plainly, and equal to ours where the network says the same."""

import io

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from depthseg import catalog, masks, reference
from depthseg.models.sam import Attention
from depthseg.plan import Plan
from depthseg.schema import PROMPT_SIDE, Boxes, Frame, Image
from depthseg.segment import Segmenter

SIZES = [(480, 640), (640, 427), (37, 641), (200, 200), (1, 30)]


@pytest.fixture(scope="module")
def network():
    return catalog.load("nano").requires_grad_(False)


@pytest.mark.parametrize("size", SIZES)
def test_masks_equal_ours_on_equal_logits(size):
    low = torch.randn(3, 1, 256, 256, generator=torch.Generator().manual_seed(0))
    low[0] += 20 * reference.ellipses(np.array([[100, 50, 500, 400]]), 256)[0]
    theirs = reference.enlarge(low, size).numpy()[:, 0]
    frame = Frame(size, 512)
    for mask, logits in zip(theirs, low.numpy()[:, 0]):
        apart = mask != frame.crop(logits).whole()
        # two interpolations in turn round otherwise than one composed: only a pixel that is nearly 0 may differ
        assert np.abs(frame.logits(logits)[apart]).max(initial=0) < 1e-5 and apart.mean() < 1e-4


@pytest.mark.parametrize("size", SIZES)
def test_pictures_are_prepared_as_ours_are(size):
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    np.testing.assert_allclose(reference.preprocess(pixels, 512)[0].numpy(), Frame(size, 512).image(pixels), atol=1e-6)


def test_the_loop_answers_as_segment_does_without_folding_anything(network, tmp_path, monkeypatch):
    g = np.random.default_rng(0)
    pixels = g.integers(0, 60, (120, 160, 3), dtype=np.uint8)
    pixels[30:80, 40:110] = (220, 180, 60)
    PILImage.fromarray(pixels).save(tmp_path / "a.png")
    boxes = np.array([[40, 30, 110, 80], [10, 20, 150, 110]], np.float32)
    asked = Boxes(boxes, np.ones(2, np.float32), np.ones(2, np.int64))
    monkeypatch.setattr(network, "specks", 0.0)  # a rule of ours that the loop does not have
    segmenter = Segmenter(Plan(zoom=False), network=network, source=lambda images: [asked])
    (record,) = segmenter.segment([Image("a.png", 1, tmp_path / "a.png", (0, 0))])
    monkeypatch.setattr(Attention, "from_image", None)
    monkeypatch.setattr(Attention, "to_image", None)
    found = reference.segment(network, (tmp_path / "a.png").read_bytes(), boxes)
    assert not any(p.requires_grad for p in network.parameters())
    for prompt, rle in zip(record.masks.prompt, record.masks.rle, strict=True):
        assert masks.iou([found[prompt]], [rle])[0, 0] > 0.999


def test_ellipses_lie_in_their_boxes():
    box = np.array([[256, 128, 768, 512]], np.float32)
    mask = reference.ellipses(box, 256)[0, 0].numpy() > 0
    y, x = np.nonzero(mask)
    cell = PROMPT_SIDE / 256
    assert (x.min() * cell, (x.max() + 1) * cell, y.min() * cell, (y.max() + 1) * cell) == pytest.approx((256, 768, 128, 512), abs=cell)
    assert mask.sum() == pytest.approx(np.pi / 4 * 128 * 96, rel=0.02)


def test_a_random_network_answers_in_the_size_of_things():
    torch.manual_seed(0)
    row = catalog.MODELS["nano"]
    network = reference.in_things(catalog.resolve(row)(**row.args).eval().requires_grad_(False))
    picture = PILImage.fromarray(np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8))
    written = io.BytesIO()
    picture.save(written, "JPEG")
    box = np.array([[20, 30, 100, 90]], np.float32)
    (rle,) = reference.segment(network, written.getvalue(), box)
    assert 0.5 < masks.area([rle])[0] / (np.pi / 4 * 80 * 60) < 1.5
