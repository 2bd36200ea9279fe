"""Adaptive mask refinement: what it sees in a mask, where it clicks, what it keeps; and the mirror image."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from depthseg import catalog, masks, refine
from depthseg.errors import DepthsegError
from depthseg.models.mirrored import Mirrored, mirrored
from depthseg.plan import REFINEMENTS, Plan
from depthseg.schema import ABSENT, NEGATIVE, PADDING, POSITIVE, Frame, Prompts
from depthseg.segment import Segmenter
from depthseg.views import View


def disc(radius: float, size: int = 64) -> np.ndarray:
    y, x = np.mgrid[:size, :size] - size / 2
    return x * x + y * y < radius * radius


def test_compactness_knows_discs_squares_and_combs():
    square = np.zeros((40, 40), bool)
    square[5:35, 5:35] = True
    comb = square.copy()
    comb[5:30, 6:35:2] = False
    assert refine.compactness(disc(20)) == pytest.approx(1 / 1.055**2, abs=0.02)  # steps of 45 degrees are 5.5 % longer than a circle
    assert refine.compactness(square) == pytest.approx(np.pi / 4, rel=0.03)
    assert refine.compactness(comb) < 0.1 < refine.COMPACT and refine.compactness(np.zeros((5, 5), bool)) == 0


def test_compactness_is_that_of_opencv():
    cv2 = pytest.importorskip("cv2")
    from scipy.ndimage import gaussian_filter

    for seed in range(5):
        mask = gaussian_filter(np.random.default_rng(seed).normal(size=(96, 96)), 8) > 0.02
        mask = masks.clean(mask, 96 * 96)  # one piece, without holes
        (outline,), _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        theirs = 4 * np.pi * mask.sum() / cv2.arcLength(outline, True) ** 2  # through the middles of the pixels: a little shorter
        assert refine.compactness(mask) == pytest.approx(theirs, rel=0.15)


def test_the_papers_two_rules():
    two = np.zeros((32, 32), bool)
    two[4:12, 4:12] = two[20:28, 20:28] = True
    ragged = np.zeros((32, 32), bool)
    ragged[4:28, 4:28:3] = ragged[4] = True
    for mask, formula, prose in ((disc(10), False, False), (two, True, False), (ragged, True, True)):
        found = [rule.rim(refine.pieces(mask), refine.compactness(mask)) for rule in refine.RULES.values()]
        assert (list(refine.RULES), found) == (["amr", "amr-prose", "rim"], [formula, prose, True])
        for rule, rim in zip(refine.RULES, found):
            at = refine.points(mask, rule, 4)
            assert at.shape == (4, 2) and all(mask[y, x] != rim for x, y in at)


def test_points_of_the_rim_and_of_the_middle():
    mask = np.zeros((20, 30), bool)
    mask[5:14, 8:21] = True
    at = refine.spread(refine.rim(mask), 2)
    assert at.tolist() == [[7, 4], [21, 14]]  # first and last in rows
    y, x = np.nonzero(refine.middle(mask))
    assert (y.min(), y.max(), x.min(), x.max()) == (8, 10, 11, 17)  # at least 0.7 * 5 = 3.5 pixels from the background
    moved = np.roll(mask, (3, 4), (0, 1))
    assert (refine.points(moved, "amr", 3) == refine.points(mask, "amr", 3) + (4, 3)).all()  # the window leaves no trace
    for nowhere in (np.zeros((4, 4), bool), ~np.zeros((4, 4), bool)):
        assert len(refine.spread(refine.rim(nowhere), 2)) == 0
    assert len(refine.points(np.zeros((4, 4), bool), "amr", 2)) == 0
    assert len(refine.points(~np.zeros((4, 4), bool), "amr", 2)) == 2  # the image's edge is background


class Growing(nn.Module):
    """A disc around the last token, the larger and the surer the more positive points there are; cells are 4 pixels of 64."""

    side, zoom_side, alpha, single_mask_for, grid_limits, specks = 64, 64, None, "never", (0.0, 0.0), 0.0
    frame, most_points, hears_negatives = Frame, None, True

    def __init__(self, sure: float = 0.1):
        super().__init__()
        self.sure, self.calls = sure, []

    def encode(self, rgb, depth=None):
        self.encoded = getattr(self, "encoded", 0) + len(rgb)
        return (rgb,)

    def decode(self, features, owner, points, labels, earlier=None, multimask=True, best=False):
        self.calls.append(labels.tolist())
        known = (labels == POSITIVE).sum(1)
        at = (torch.arange(256) + 0.5) * 4
        x, y = points[torch.arange(len(points)), -2 if PADDING in labels else -1].T[..., None]
        near = ((at[None, :, None] - y[..., None]) ** 2 + (at - x)[:, None] ** 2).sqrt()
        logits = (60 + 40 * known[:, None, None] - near)[:, None].repeat(1, 3, 1, 1)
        return logits, (0.5 + self.sure * known)[:, None] + torch.tensor([[0, 0.01, 0]])


def asked(network, **given):
    ready = Segmenter(Plan(prompt_batch=3, **given), network=network, source=lambda images: [])
    views = [View(np.zeros((64, 64, 3), np.uint8), None, (64, 64)) for _ in range(2)]
    clicks = [Prompts.of(points=np.full((n, 1, 2), 32.0)) for n in (1, 3)]
    return ready.decode(ready.encode(views, 64), clicks)


def test_a_second_pass_is_one_call_and_the_surer_mask_is_kept():
    plain, refined = Growing(), Growing()
    first, second = asked(plain), asked(refined, refine="amr")
    assert [len(call) for call in plain.calls] == [3, 1] and [len(call) for call in refined.calls] == [3, 3, 1, 1]
    assert refined.encoded == plain.encoded == 2  # the features are used again
    assert all(row == [POSITIVE, POSITIVE, POSITIVE, PADDING] for row in refined.calls[1])
    for a, b in zip(first, second):
        assert [x.prompt for x in a] == [x.prompt for x in b]
        assert [y.predicted_iou for y in b] == pytest.approx([x.predicted_iou + 0.2 for x in a])
        assert (masks.area([y.rle for y in b]) > masks.area([x.rle for x in a])).all()
    unsure = Growing(sure=-0.1)
    assert asked(unsure, refine="amr") == asked(Growing(sure=-0.1)) and len(unsure.calls) == 4
    outside = Growing()
    asked(outside, refine="rim")
    assert outside.calls[1] == 3 * [[NEGATIVE, NEGATIVE, POSITIVE, PADDING]]


def test_rounds_points_and_limits():
    network = Growing()
    asked(network, refine="amr", refine_points=1, refine_rounds=3)
    # each round replaces the points of the last one: the second is no surer, and there is no third
    assert [len(call) for call in network.calls] == [3, 3, 3, 1, 1, 1] and len(network.calls[1][0]) == 3
    network = Growing()
    asked(network, refine="amr", refine_below=0.6)
    assert len(network.calls) == 2  # they are all surer than that
    for wrong in ({"refine": "none", "refine_rounds": 2}, {"refine": "mirror", "refine_below": 0.5}, {"refine": "amr", "refine_points": 0}):
        with pytest.raises(DepthsegError):
            Plan(**wrong)
    with pytest.raises(DepthsegError, match="no refinement is called"):
        Plan(refine="magic")
    assert set(refine.RULES) < set(REFINEMENTS) and Plan().digest() != Plan(refine="amr").digest()


def test_the_mirror_of_the_mirror_image_is_the_answer_to_the_picture():
    torch.manual_seed(0)
    row = catalog.MODELS["nano-depth"]
    network = catalog.resolve(row)(**row.args).eval()
    twice = Mirrored(network).eval()
    assert (twice.side, twice.zoom_side, twice.alpha) == (network.side, network.zoom_side, network.alpha)
    rgb, depth = torch.randn(2, 1, 3, 160, 160)
    points = torch.tensor([[[100.0, 200], [600, 700], [0, 0]], [[300, 400], [500, 900], [650, 650]]])
    labels = torch.tensor([[2, 3, ABSENT], [2, 3, NEGATIVE]])
    owner = torch.zeros(2, dtype=torch.long)
    earlier = torch.randn(2, 1, 80, 80)
    with torch.inference_mode():
        for mask in (None, earlier):
            one = twice.decode(twice.encode(rgb, depth), owner, points, labels, mask)
            turned = None if mask is None else mask.flip(-1)
            other = twice.decode(twice.encode(rgb.flip(-1), depth.flip(-1)), owner, mirrored(points, labels), labels, turned)
            assert torch.allclose(one[0], other[0].flip(-1), atol=1e-4) and torch.allclose(one[1], other[1], atol=1e-5)
            single = network.decode(network.encode(rgb, depth), owner, points, labels, mask)
            assert not torch.allclose(one[0], single[0], atol=1e-3)
    assert torch.equal(mirrored(mirrored(points, labels), labels), points)
    assert mirrored(points, labels)[0, :2].tolist() == [[424, 200], [924, 700]]


def test_segment_with_every_refinement(run, pictures, tmp_path):
    for name in REFINEMENTS:
        code, _, err = run("segment", pictures, "-o", tmp_path / name, "--model", "nano", "--detector", "nano", "--refine", name)
        assert code == 0, err
    assert run("segment", pictures, "-o", tmp_path / "none", "--model", "nano", "--detector", "nano", "--refine", "amr")[0] == 2
    code, _, err = run("segment", pictures, "-o", tmp_path / "x", "--refine", "arm")
    assert code == 2 and "amr" in err and "hint: " in err


def test_a_refined_evaluation_says_so(run, pictures, coco_file, tmp_path):
    words = ["eval", "--images", pictures, "--annotations", coco_file, "--model", "nano", "--only", "a.png"]
    code, stdout, err = run(*words, "--refine", "amr", "--refine-rounds", "2", "--refine-below", "0.9", "-o", tmp_path / "o")
    assert code == 0 and "Refined (amr): a second pass" in " ".join(stdout.split()), err
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert report["provenance"]["plan"]["refine_rounds"] == 2 and "refine" in report["speed"]["stages"]
    code, _, err = run(*words, "-o", tmp_path / "o")
    assert code == 2 and "plan.refine (was 'amr', is 'none')" in err
    code, _, err = run(*words, "--refine-points", "3")
    assert code == 2 and "Add --refine amr" in err
