"""Boxes of all objects of a picture: views with whole objects, and the losses of a centre-based proposer."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor, nn
from torch.nn import functional as F

from depthseg import masks, sa1b
from depthseg.augment import colour
from depthseg.models.boxes import STRIDES, BoxNet
from depthseg.schema import Array, Frame
from depthseg.tasks.batches import Batch


@dataclass
class BoxSource:
    """Pictures, or large parts of them, with the boxes of their objects: parts of objects and what is too small are left out."""

    entries: list[sa1b.Entry]

    def setting(self, rng: np.random.Generator) -> int:
        """The input's side: cheaper batches in between, and objects of other sizes."""
        return int(rng.choice((BoxNet.side * 3 // 4, BoxNet.side)))

    def share(self, setting: int) -> float:
        return 1.0

    def sample(self, index: int, rng: np.random.Generator, setting: int) -> tuple[Array, Array]:
        side = setting
        sample = sa1b.load(self.entries[index])
        h, w = sample.pixels.shape[:2]
        share = rng.uniform(0.45, 1) if rng.random() < 0.7 else 1.0
        ch, cw = int(h * share), int(w * share)
        top, left = int(rng.integers(0, h - ch + 1)), int(rng.integers(0, w - cw + 1))
        pixels = colour(sample.pixels[top : top + ch, left : left + cw], rng)
        b = masks.boxes([sample.rles[i] for i in masks.outermost(sample.rles)])
        seen = np.stack([b[:, 0].clip(left, left + cw), b[:, 1].clip(top, top + ch),
                         b[:, 2].clip(left, left + cw), b[:, 3].clip(top, top + ch)], 1)  # fmt: skip
        before, after = ((r[:, 2:] - r[:, :2]).prod(1) for r in (b, seen))
        # what the crop cuts off is still an object if a good part of it, or a large piece, is seen
        b = seen[(after > 0.3 * before) | (after > 0.1 * ch * cw)] - np.array([left, top, left, top], np.float32)
        if rng.random() < 0.5:
            pixels = np.ascontiguousarray(pixels[:, ::-1])
            b = np.stack([cw - b[:, 2], b[:, 1], cw - b[:, 0], b[:, 3]], 1)
        if rng.random() < 0.5:  # wider or narrower than it was
            stretch = rng.uniform(0.75, 1.33)
            pixels = np.asarray(PILImage.fromarray(pixels).resize((round(cw * stretch), ch)))
            b, cw = b * np.array([stretch, 1, stretch, 1], np.float32), round(cw * stretch)
        # sometimes shown smaller than the square, so that small objects occur
        frame = Frame((ch, cw), int(side * (rng.uniform(0.5, 1) if rng.random() < 0.3 else 1)))
        x = np.zeros((3, side, side), np.float32)
        x[:, : frame.side, : frame.side] = frame.image(pixels)
        ih, iw = frame.inner
        b = b * np.array([iw / cw, ih / ch] * 2, np.float32)
        b = b[np.minimum(b[:, 2] - b[:, 0], b[:, 3] - b[:, 1]) > 6]
        return x, b

    def collate(self, items: list[tuple[Array, Array]], setting: int) -> Batch:
        rgb, boxes = zip(*items, strict=True)
        return {
            "rgb": torch.from_numpy(np.stack(rgb)),
            "boxes": torch.from_numpy(np.concatenate(boxes).astype(np.float32)),
            "owner": torch.from_numpy(np.repeat(np.arange(len(boxes)), [len(b) for b in boxes])),
        }


class BoxLoss(nn.Module):
    """Centre-based assignment as FCOS, GIoU on the boxes of positive cells, and scores that learn the IoU of their box.

    The last is the quality focal loss of Li et al. 2020: a cell's score is to rank its box, not only to say that something is there.
    Sums over the cells that answer for an object.
    """

    REACH = ((0, 64), (48, 160), (120, 1e6))  # longest side of the objects that each stride answers for, input pixels

    def __init__(self, network: BoxNet):
        super().__init__()
        self.network = network

    def forward(self, batch: Batch) -> tuple[Batch, Tensor]:
        from torchvision.ops import generalized_box_iou_loss

        logits, boxes, cells = self.network.raw(batch["rgb"])
        logits, boxes = logits.float(), boxes.float()  # they may come from autocast
        truth, owner = batch["boxes"], batch["owner"]
        centre, half = (truth[:, :2] + truth[:, 2:]) / 2, (truth[:, 2:] - truth[:, :2]) / 2
        longest = 2 * half.amax(1)
        positive = torch.zeros_like(logits, dtype=torch.bool)
        match = torch.full_like(logits, -1, dtype=torch.long)
        strides = cells[:, 2]
        low, high = (torch.zeros_like(strides) for _ in range(2))
        for stride, (a, b) in zip(STRIDES, self.REACH, strict=True):
            low[strides == stride], high[strides == stride] = a, b
        for k in longest.argsort(descending=True).tolist():  # small objects last: they win a contested cell
            near = (cells[:, :2] - centre[k]).abs() <= torch.maximum(
                torch.minimum(half[k] * 0.4, 1.5 * strides[:, None]), 0.51 * strides[:, None]
            )
            mine = near.all(1) & (longest[k] >= low) & (longest[k] <= high)
            positive[owner[k], mine] = True
            match[owner[k], mine] = k
        quality = torch.zeros_like(logits)
        box = boxes.sum() * 0
        if positive.any():
            found, wanted = boxes[positive], truth[match[positive]]
            box = generalized_box_iou_loss(found, wanted, reduction="sum")
            quality[positive] = _iou(found.detach(), wanted)
        error = (logits.sigmoid() - quality).abs()
        score = (error.square() * F.binary_cross_entropy_with_logits(logits, quality, reduction="none")).sum()
        return {"score": score, "box": box, "true_iou": quality.sum()}, positive.sum().float()


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes xyxy in pairs, (N, 4) and (N, 4) -> (N,)."""
    shared = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp_min(0).prod(1)
    return shared / ((a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - shared)
