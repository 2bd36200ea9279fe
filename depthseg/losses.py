"""Losses of the paper's Eq. 2 and 3, per prompt and per candidate mask, on low-resolution logits.

Targets are soft: the share of each cell that the true mask covers. Every function returns one number per leading index and leaves
weighting, choosing among candidates and averaging to the trainer.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def mask_loss(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Binary cross-entropy, mean over cells (weighted if asked): (..., n) -> (...)."""
    loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return loss.mean(-1) if weight is None else (loss * weight).sum(-1) / weight.sum(-1)


def dice_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - dice of the probabilities, +1 in numerator and denominator as upstream: (..., n) -> (...)."""
    p = logits.sigmoid()
    return 1 - (2 * (p * target).sum(-1) + 1) / (p.sum(-1) + target.sum(-1) + 1)


def iou(logits: Tensor, target: Tensor) -> Tensor:
    """IoU of the thresholded prediction with the soft target: (..., n) -> (...). No gradient."""
    p = (logits.detach() > 0).to(target.dtype)
    inter = torch.minimum(p, target).sum(-1)
    return inter / (torch.maximum(p, target).sum(-1) + 1e-6)


def boundary(p: Tensor) -> Tensor:
    """How much a probability map (N, s, s) changes within its 3 x 3 neighbourhoods: 1 on a crisp edge, 0 elsewhere."""
    x = p[:, None]
    return (F.max_pool2d(x, 3, 1, 1) + F.max_pool2d(-x, 3, 1, 1))[:, 0]


def boundary_loss(logits: Tensor, target: Tensor) -> Tensor:
    """1 - dice between the edges of prediction and truth: (N, s, s) -> (N,). The paper's L_aux, see train.py."""
    a, b = boundary(logits.sigmoid()).flatten(1), boundary(target).flatten(1)
    return 1 - (2 * (a * b).sum(-1) + 1) / (a.square().sum(-1) + b.square().sum(-1) + 1)


def uncertain_points(logits: Tensor, count: int, oversample: float = 3, share: float = 0.75) -> Tensor:
    """Positions (N, count, 2) in 0..1 where the logits (N, s, s) are least certain, and some at random (PointRend, upstream's rule).

    `share` of them are the smallest |logit| of `oversample` times as many uniform draws.
    """
    drawn = torch.rand(len(logits), int(count * oversample), 2, device=logits.device)
    doubt = at_points(logits.detach(), drawn).abs()
    certain = int(count * share)
    best = doubt.topk(certain, dim=1, largest=False).indices
    chosen = drawn.gather(1, best[..., None].expand(-1, -1, 2))
    return torch.cat([chosen, torch.rand(len(logits), count - certain, 2, device=logits.device)], 1)


def at_points(maps: Tensor, points: Tensor) -> Tensor:
    """Maps (N, h, w) read bilinearly at points (N, k, 2), x and y in 0..1 -> (N, k)."""
    return F.grid_sample(maps[:, None], 2 * points[:, None] - 1, mode="bilinear", align_corners=False)[:, 0, 0]


def local_weight(boxes: Tensor, size: int, grow: float = 0.15, outside: float = 0.3) -> Tensor:
    """Weights (P, size, size): 1 inside each box (xyxy in 0..1) grown by a share of its sides; the rest together `outside` of that.

    With uniform weights small objects drown in background.
    """
    centre = (torch.arange(size, device=boxes.device) + 0.5) / size
    margin = (boxes[:, 2:] - boxes[:, :2]) * grow + 1 / size
    low, high = boxes[:, :2] - margin, boxes[:, 2:] + margin
    x, y = ((centre >= low[:, i, None]) & (centre <= high[:, i, None]) for i in (0, 1))
    inside = (y[:, :, None] & x[:, None, :]).float()
    n = inside.sum((1, 2), keepdim=True)
    return inside + (1 - inside) * outside * n / (size * size - n).clamp_min(1)
