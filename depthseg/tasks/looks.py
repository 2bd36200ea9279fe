"""Looks at crops around what one click has found, as the predictor takes them with `zoom`, for training: batches made from batches."""

from collections import defaultdict

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from depthseg.models.depthseg import DepthSeg
from depthseg.prompts import window
from depthseg.schema import ABSENT, PADDING, POSITIVE, PROMPT_SIDE, Frame
from depthseg.tasks.batches import Batch


@torch.no_grad()
def first(network: DepthSeg, features: tuple[Tensor, ...], batch: Batch) -> tuple[Tensor, Tensor, bool]:
    """Rows (N,) of the prompts that are one click, xyxy (N, 4) in input pixels of one of the three answers to each, and True.

    Without such prompts the first of all and False: each process must ask the encoder, or those with SyncBatchNorm would wait for it.
    """
    labels = batch["labels"]
    rows = ((labels[:, 0] == POSITIVE) & (labels[:, 1] == PADDING)).nonzero()[:, 0]
    real = len(rows) > 0
    rows = rows if real else torch.zeros(1, dtype=torch.long, device=labels.device)
    points = batch["points"][rows]
    logits, _ = network.decode(features, batch["owner"][rows], points, labels[rows])
    drawn = (batch["dither"][rows] * logits.shape[1]).long().clamp(max=logits.shape[1] - 1)
    return rows, around(logits[torch.arange(len(rows)), drawn], points[:, 0]) * batch["rgb"].shape[-1], real


@torch.no_grad()
def crops(network: DepthSeg, batch: Batch, rows: Tensor, boxes: Tensor) -> Batch:
    """Prompts of a batch, each on the crop around its box xyxy (N, 4) in input pixels.

    Besides what a batch has: hidden (N,), how much of the target the crop does not show, in cells; corner (N, 2) and extent (N,) of the
    crop's square, in input pixels of the batch. Each prompt is its first point, as a click.
    """
    side, stride = network.zoom_side, network.mask_stride
    clicks = batch["points"][rows, 0].cpu().numpy() * np.float32(batch["rgb"].shape[-1] / PROMPT_SIDE)
    inner = batch["inner"].tolist()
    parts: defaultdict[str, list[Tensor]] = defaultdict(list)
    corners, extents = [], []
    for row, v, box, click in zip(rows.tolist(), batch["owner"][rows].tolist(), boxes.cpu().numpy(), clicks):
        x0, y0, x1, y1 = window(box, inner[v])
        frame = Frame((y1 - y0, x1 - x0), side)
        target = batch["target"][None, row].repeat_interleave(stride, 1).repeat_interleave(stride, 2)  # in input pixels
        for name, x in [("target", target), *((name, batch[name][v]) for name in ("rgb", "depth") if name in batch)]:
            h, w = frame.inner
            piece = F.interpolate(x[None, :, y0:y1, x0:x1], (h, w), mode="bilinear", antialias=True)
            parts[name].append(F.pad(piece, (0, side - w, 0, side - h)))
        corners.append((x0, y0))
        extents.append(max(frame.size))
        elsewhere = target.sum() - target[:, y0:y1, x0:x1].sum()
        parts["hidden"].append(elsewhere[None] * (side / extents[-1] / stride) ** 2)
        parts["points"].append(torch.from_numpy(frame.to_prompt(click - corners[-1]))[None])
    out = {name: torch.cat(some).to(boxes.device) for name, some in parts.items()}
    target, click = F.avg_pool2d(out["target"], stride)[:, 0], out["points"]
    points, labels = torch.zeros_like(batch["points"][rows]), torch.full_like(batch["labels"][rows], ABSENT)
    points[:, 0] = click
    labels[:, :2] = torch.tensor([POSITIVE, PADDING])
    return {
        **out, "target": target, "boxes": around(target - 0.5, click), "points": points, "labels": labels,
        "owner": torch.arange(len(rows), device=rows.device),
        "corner": boxes.new_tensor(corners), "extent": boxes.new_tensor(extents),
    }  # fmt: skip


def around(logits: Tensor, clicks: Tensor) -> Tensor:
    """xyxy (N, 4) in 0..1 of the square: the box of each mask (N, s, s) with the cell of its click (N, 2), which is in the 1024 frame."""
    s = logits.shape[-1]
    cell = (clicks * s / PROMPT_SIDE).floor().clamp(0, s - 1)
    hit = torch.stack([(logits > 0).any(1), (logits > 0).any(2)], 1)  # columns, rows: (N, 2, s)
    at = torch.arange(s, device=hit.device)
    low = torch.minimum(torch.where(hit, at, s).amin(2), cell)
    high = torch.maximum(torch.where(hit, at + 1, 0).amax(2), cell + 1)
    return torch.cat([low, high], 1) / s
