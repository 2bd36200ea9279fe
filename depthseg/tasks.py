"""What the trainer's stages feed and minimise: one data set of batches and one loss module for masks, depth and boxes each.

A batch is a function of (seed, step, rank) alone, so a resumed run sees the same ones. Losses are returned by name; the trainer
weighs and sums them.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor, nn
from torch.nn import functional as F

from depthseg import losses, masks, sa1b
from depthseg.augment import View, colour, view
from depthseg.depth import DepthFolder
from depthseg.models.boxes import STRIDES, BoxNet
from depthseg.models.depthnet import DepthNet
from depthseg.models.depthseg import DepthSeg
from depthseg.schema import CORNER_MIN, NEGATIVE, POSITIVE, Array, Frame, Image

POINTS = 12_544  # uncertain points per mask, as upstream; maps with fewer cells are used whole
Batch = dict[str, Tensor]


def _rng(seed: int, step: int, rank: int) -> np.random.Generator:
    return np.random.default_rng([seed, step, rank])


def _readable(entries: list[sa1b.Entry], chance: Array, rng: np.random.Generator) -> tuple[sa1b.Entry, sa1b.Sample]:
    """A random sample; one that cannot be read is passed over, but not twenty in a row."""
    for _ in range(20):
        entry = entries[rng.choice(len(entries), p=chance)]
        try:
            return entry, sa1b.load(entry)
        except ValueError as e:
            reason = str(e)
    raise ValueError(f"twenty training samples in a row cannot be read, the last: {reason}")


@dataclass
class MaskData:
    """Batches of views with prompts, and of depth where there are maps of the pictures."""

    entries: list[sa1b.Entry]
    chance: Array  # (len(entries),) how often each is drawn
    depth: DepthFolder | None
    batch: int
    masks: int  # per view
    sides: tuple[tuple[int, float], ...]  # encoder inputs and how often
    stride: int  # input pixels to one cell of the network's masks
    whole: float
    boxes_share: float
    paste: float
    steps: int
    seed: int
    rank: int = 0

    def __len__(self) -> int:
        return self.steps

    def _draw(self, rng: np.random.Generator) -> tuple[sa1b.Sample, Array | None]:
        entry, sample = _readable(self.entries, self.chance, rng)
        if self.depth is None:
            return sample, None
        h, w = sample.pixels.shape[:2]
        (d,) = self.depth([Image(entry.key, 0, None, (h, w))])
        return sample, np.asarray(PILImage.fromarray(d).resize((w, h), PILImage.Resampling.BILINEAR))

    def __getitem__(self, step: int) -> Batch:
        rng = _rng(self.seed, step, self.rank)
        sides, odds = zip(*self.sides, strict=True)
        side = int(rng.choice(sides, p=odds))
        # larger inputs come in smaller batches, so that a step costs about the same
        count = max(1, round(self.batch * (min(sides) / side) ** 2))
        views: list[View] = []
        for tried in itertools.count():
            if len(views) == count:
                break
            if tried > 200 * count:
                raise ValueError("the training samples show no mask large enough to learn from")
            sample, depth = self._draw(rng)
            other = self._draw(rng) if rng.random() < self.paste else None
            if v := view(sample, depth, other, side, self.stride, self.masks, self.whole, self.boxes_share, rng):
                views.append(v)
        out = {
            "rgb": np.stack([v.rgb for v in views]),
            "owner": np.repeat(np.arange(count), [len(v.labels) for v in views]),
            **{k: np.concatenate([getattr(v, k) for v in views]) for k in ("target", "boxes", "points", "labels")},
        }
        if self.depth is not None:
            out["depth"] = np.stack([v.depth for v in views if v.depth is not None])
        return {k: torch.from_numpy(v) for k, v in out.items()}


class MaskLoss(nn.Module):
    """Eq. 3's five terms for one batch of MaskData, by name."""

    def __init__(self, network: DepthSeg, mask: float, dice: float, direct: bool):
        super().__init__()
        self.network = network
        self.mask, self.dice = mask, dice  # their weights also decide which candidate is the best
        self.direct = direct

    def forward(self, batch: Batch) -> Batch:
        net = self.network
        features = net.encode(batch["rgb"], batch.get("depth"))
        labels = batch["labels"]
        logits, quality, early = net(features, batch["owner"], batch["points"], labels, intermediate=self.direct)
        p, tokens = logits.shape[:2]
        target = batch["target"]
        # Token 0 answers unambiguous prompts, tokens 1..3 compete for the others. Where the evaluation always takes the best of
        # three (official weights), every prompt trains both.
        clicks = ((labels == POSITIVE) | (labels == NEGATIVE)).sum(1)
        clear = (labels == CORNER_MIN).any(1) | (clicks >= 3)
        single = torch.arange(tokens, device=labels.device) == 0
        cells = self._cells(logits, batch)
        if net.single_mask_for == "unambiguous":
            groups = [torch.where(clear[:, None], single, ~single)]
        else:
            groups = [single.expand(p, -1), (~single).expand(p, -1)]
        mask, dice = cells(logits)
        with torch.no_grad():
            cost = self.mask * mask + self.dice * dice
            truth = losses.iou(logits.flatten(2), target.flatten(1)[:, None])
        rows = torch.arange(p, device=labels.device)
        out: Batch = {k: logits.new_zeros(()) for k in ("mask", "dice", "iou", "direct", "aux", "true_iou")}
        for group in groups:
            best = cost.masked_fill(~group, float("inf")).argmin(1)
            out["mask"] = out["mask"] + mask[rows, best].mean() / len(groups)
            out["dice"] = out["dice"] + dice[rows, best].mean() / len(groups)
            error = (quality - truth).square() * group
            out["iou"] = out["iou"] + error.sum() / group.sum() / len(groups)
            out["aux"] = out["aux"] + losses.boundary_loss(logits[rows, best], target).mean() / len(groups)
            out["true_iou"] = out["true_iou"] + truth[rows, best].mean() / len(groups)
            if early is not None:
                m, d = cells(early[rows, best][:, None])
                out["direct"] = out["direct"] + (self.mask * m + self.dice * d).mean() / len(groups)
        return out

    def _cells(self, logits: Tensor, batch: Batch):
        """A function (P, n, s, s) -> mask and dice loss (P, n), on all cells or on upstream's uncertain points."""
        target, s = batch["target"], logits.shape[-1]
        if s * s <= POINTS:
            weight = losses.local_weight(batch["boxes"], s).flatten(1)[:, None]
            t = target.flatten(1)[:, None]
            return lambda x: (
                losses.mask_loss(x.flatten(2), t.expand_as(x.flatten(2)), weight),
                losses.dice_loss(x.flatten(2), t),
            )
        t = target[:, None]

        def at_points(x: Tensor) -> tuple[Tensor, Tensor]:
            flat, truth = x.flatten(0, 1), t.expand_as(x).flatten(0, 1)
            where = losses.uncertain_points(flat, POINTS)
            a, b = losses.at_points(flat, where), losses.at_points(truth, where)
            return losses.mask_loss(a, b).view(x.shape[:2]), losses.dice_loss(a, b).view(x.shape[:2])

        return at_points


def _jitter(pixels: Array, rng: np.random.Generator) -> Array:
    gain, offset = rng.uniform(0.7, 1.3, 3) * rng.uniform(0.8, 1.2), rng.uniform(-20, 20)
    return (pixels * gain + offset).clip(0, 255).astype(np.uint8)


@dataclass
class DepthData:
    """Batches of crops with inverse depth; holes are NaN."""

    pairs: list[sa1b.DepthPair]
    chance: Array
    batch: int
    steps: int
    seed: int
    rank: int = 0

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        rng = _rng(self.seed, step, self.rank)
        side = DepthNet.side
        rgb, inverse = [], []
        for i in rng.choice(len(self.pairs), self.batch, p=self.chance):
            pair = self.pairs[i]
            pixels = np.asarray(PILImage.open(pair.rgb).convert("RGB"))
            stored = np.asarray(PILImage.open(pair.depth)).astype(np.float32)
            d = np.full(stored.shape, np.nan, np.float32)
            valid = stored > 0
            d[valid] = 1000 / stored[valid] if pair.kind == "metric" else stored[valid] / 255
            h, w = pixels.shape[:2]
            share = rng.uniform(0.6, 1)
            ch, cw = max(32, int(h * share)), max(32, int(w * share))
            top, left = int(rng.integers(0, h - ch + 1)), int(rng.integers(0, w - cw + 1))
            crop = np.s_[top : top + ch, left : left + cw]
            pixels, d = _jitter(pixels[crop], rng), d[crop]
            if rng.random() < 0.5:
                pixels, d = pixels[:, ::-1], d[:, ::-1]
            frame = Frame((pixels.shape[0], pixels.shape[1]), side)
            rgb.append(frame.image(np.ascontiguousarray(pixels)))
            ih, iw = frame.inner
            square = np.full((side // 2, side // 2), np.nan, np.float32)
            small = PILImage.fromarray(np.ascontiguousarray(d)).resize((max(1, iw // 2), max(1, ih // 2)), PILImage.Resampling.NEAREST)
            square[: small.height, : small.width] = np.asarray(small)
            inverse.append(square)
        return {"rgb": torch.from_numpy(np.stack(rgb)), "inverse": torch.from_numpy(np.stack(inverse))}


def _standardised(x: Tensor, valid: Tensor) -> Tensor:
    """Per image: minus the median, over the mean absolute deviation of valid cells (MiDaS' scale- and shift-free form)."""
    flat = x.masked_fill(~valid, float("nan")).flatten(1)
    median = flat.nanmedian(1).values[:, None, None]
    spread = ((x - median).abs() * valid).sum((1, 2)) / valid.sum((1, 2)).clamp_min(1)
    return (x - median) / (spread[:, None, None] + 1e-4)


class DepthLoss(nn.Module):
    """Scale- and shift-free L1 on inverse depth, and its gradients at four scales (Ranftl et al. 2020)."""

    def __init__(self, network: DepthNet):
        super().__init__()
        self.network = network

    def forward(self, batch: Batch) -> Batch:
        target = batch["inverse"]
        valid = target.isfinite()
        keep = valid.sum((1, 2)) > 50
        p = self.network(batch["rgb"])[keep]
        valid, target = valid[keep], target[keep].nan_to_num()
        a, b = _standardised(p, valid), _standardised(target, valid)
        error = (a - b) * valid
        out = {"depth": (error.abs().clamp_max(5).sum((1, 2)) / valid.sum((1, 2))).mean()}
        gradient = p.new_zeros(())
        for k in range(4):
            e, v = error[:, :: 2**k, :: 2**k], valid[:, :: 2**k, :: 2**k]
            for dim in (1, 2):
                n = e.shape[dim] - 1
                both = v.narrow(dim, 1, n) & v.narrow(dim, 0, n)
                step = (e.narrow(dim, 1, n) - e.narrow(dim, 0, n)).abs() * both
                gradient = gradient + (step.sum((1, 2)) / both.sum((1, 2)).clamp_min(1)).mean()
        return {**out, "gradient": gradient}


@dataclass
class BoxData:
    """Pictures, or large parts of them, with the boxes of their objects: parts of objects and what is too small are left out."""

    entries: list[sa1b.Entry]
    chance: Array
    batch: int
    steps: int
    seed: int
    rank: int = 0

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        rng = _rng(self.seed, step, self.rank)
        side = int(rng.choice((BoxNet.side * 3 // 4, BoxNet.side)))  # cheaper batches in between, and objects of other sizes
        rgb, boxes, owner = [], [], []
        for n in range(self.batch):
            _, sample = _readable(self.entries, self.chance, rng)
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
            rgb.append(x)
            boxes.append(b)
            owner.append(np.full(len(b), n))
        return {
            "rgb": torch.from_numpy(np.stack(rgb)),
            "boxes": torch.from_numpy(np.concatenate(boxes).astype(np.float32)),
            "owner": torch.from_numpy(np.concatenate(owner)),
        }


class BoxLoss(nn.Module):
    """Centre-based assignment as FCOS, GIoU on the boxes of positive cells, and scores that learn the IoU of their box.

    The last is the quality focal loss of Li et al. 2020: a cell's score is to rank its box, not only to say that something is there.
    """

    REACH = ((0, 64), (48, 160), (120, 1e6))  # longest side of the objects that each stride answers for, input pixels

    def __init__(self, network: BoxNet):
        super().__init__()
        self.network = network

    def forward(self, batch: Batch) -> Batch:
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
        count = positive.sum().clamp_min(1)
        quality = torch.zeros_like(logits)
        box = boxes.sum() * 0
        if positive.any():
            found, wanted = boxes[positive], truth[match[positive]]
            box = generalized_box_iou_loss(found, wanted, reduction="mean")
            quality[positive] = _iou(found.detach(), wanted)
        error = (logits.sigmoid() - quality).abs()
        score = (error.square() * F.binary_cross_entropy_with_logits(logits, quality, reduction="none")).sum() / count
        return {"score": score, "box": box, "true_iou": quality.sum() / count}


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of boxes xyxy in pairs, (N, 4) and (N, 4) -> (N,)."""
    shared = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp_min(0).prod(1)
    return shared / ((a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - shared)


def loss_of(network: nn.Module, mask: float, dice: float, direct: bool) -> nn.Module:
    """The loss module that goes with a network."""
    if isinstance(network, DepthSeg):
        return MaskLoss(network, mask, dice, direct)
    if isinstance(network, BoxNet):
        return BoxLoss(network)
    assert isinstance(network, DepthNet)
    return DepthLoss(network)
