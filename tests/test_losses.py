"""The losses against the official code's numbers and their own definitions."""

import json

import numpy as np
import torch
from synthetic import DATA

from depthseg import losses

TRUTH = json.loads((DATA / "losses.json").read_text())


def test_cross_entropy_and_dice_equal_upstream() -> None:
    logits = torch.from_numpy((2 * np.random.default_rng(1).standard_normal((3, 500))).astype(np.float32))
    target = torch.from_numpy((np.random.default_rng(2).random((3, 500)) > 0.6).astype(np.float32))
    np.testing.assert_allclose(losses.mask_loss(logits, target).numpy(), TRUTH["ce_none"], rtol=1e-6)
    np.testing.assert_allclose(losses.dice_loss(logits, target).numpy(), TRUTH["dice_none"], rtol=1e-5)


def test_points_are_read_as_upstream_reads_them() -> None:
    maps = torch.from_numpy(np.random.default_rng(3).standard_normal((2, 1, 32, 32)).astype(np.float32))[:, 0]
    points = torch.from_numpy(np.random.default_rng(4).random((2, 7, 2)).astype(np.float32))
    np.testing.assert_allclose(losses.at_points(maps, points).numpy(), TRUTH["point_sample"], atol=1e-6)


def test_uncertain_points_seek_the_edge() -> None:
    torch.manual_seed(0)
    ramp = torch.linspace(-8, 8, 64).expand(2, 64, 64).contiguous()
    x = losses.uncertain_points(ramp, 400)[..., 0]
    assert x.shape == (2, 400)
    assert ((x - 0.5).abs() < 0.15).float().mean() > 0.7


def test_boundary_is_a_thin_line_and_its_loss_falls_with_overlap() -> None:
    disc = ((torch.arange(64) - 32) ** 2 + (torch.arange(64)[:, None] - 32) ** 2 < 400).float()[None]
    edge = losses.boundary(disc)
    assert 100 < edge.sum() < 400  # two or three cells wide
    moved = torch.roll(disc, 6, 2)
    near, far = (losses.boundary_loss(20 * (m - 0.5), disc) for m in (disc, moved))
    assert near < 0.01 < 0.5 < far


def test_local_weight_gives_the_outside_a_fixed_share() -> None:
    w = losses.local_weight(torch.tensor([[0.4, 0.4, 0.6, 0.6]]), 80)[0]
    inside = w == 1
    assert 0 < inside.float().mean() < 0.15
    torch.testing.assert_close(w[~inside].sum(), 0.3 * w[inside].sum())


def test_iou_of_soft_targets() -> None:
    target = torch.tensor([[0.0, 0.5, 1.0, 1.0]])
    assert torch.isclose(losses.iou(torch.tensor([[-1.0, -1, 1, 1]]), target), torch.tensor([2 / 2.5])).all()
