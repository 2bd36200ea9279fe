"""Masks from prompts: views of SA-1B's samples with boxes and clicks, and Eq. 3's losses.

Losses are returned by name as sums over the prompts of a batch, with their number: what the trainer divides by is the number in the
whole step, however many processes and micro-batches share it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor, nn
from torch.nn import functional as F

from depthseg import losses, sa1b
from depthseg.augment import TOKENS, Asked, View, view
from depthseg.depth import DepthFolder
from depthseg.errors import DepthsegError
from depthseg.models.depthseg import DepthSeg
from depthseg.schema import CORNER_MIN, NEGATIVE, PADDING, POSITIVE, PROMPT_SIDE, Array, Image
from depthseg.tasks.batches import Batch

POINTS = 12_544  # uncertain points per mask, as upstream; maps with fewer cells are used whole
DEEPEST = 24  # cells: errors that reach further from their rim count as equally deep


@dataclass(frozen=True)
class Look:
    """What the samples of one step have in common."""

    side: int  # of the encoder's input
    whole: float  # how often the whole picture is shown
    rounds: int  # clicks that answer the network's own errors


@dataclass
class MaskSource:
    """Views with prompts, and with depth where there are maps of the pictures: in the entries themselves, or in a folder."""

    entries: list[sa1b.Entry]
    depth: DepthFolder | None
    with_depth: bool
    masks: int  # per view
    sides: tuple[tuple[int, float, float], ...]  # encoder inputs, how often, and how often the whole picture is shown then
    stride: int  # input pixels to one cell of the network's masks
    asked: Asked
    paste: float
    rounds: int

    def setting(self, rng: np.random.Generator) -> Look:
        side, _, whole = self.sides[int(rng.choice(len(self.sides), p=[share for _, share, _ in self.sides]))]
        return Look(side, whole, int(rng.integers(self.rounds + 1)))

    def share(self, setting: Look) -> float:
        return (min(side for side, *_ in self.sides) / setting.side) ** 2

    def sample(self, index: int, rng: np.random.Generator, setting: Look) -> View | None:
        shown, depth = self._read(index)
        other = self._read(int(rng.integers(len(self.entries)))) if rng.random() < self.paste else None
        return view(shown, depth, other, setting.side, self.stride, self.masks, setting.whole, self.asked, rng)

    def _read(self, index: int) -> tuple[sa1b.Sample, Array | None]:
        entry = self.entries[index]
        sample = sa1b.load(entry)
        if not self.with_depth:
            return sample, None
        h, w = sample.pixels.shape[:2]
        d = sa1b.depth_of(entry)
        if d is None:
            assert self.depth is not None
            try:
                (d,) = self.depth([Image(entry.key, 0, None, (h, w))])
            except DepthsegError as error:  # one map is one sample, not the run
                raise ValueError(f"{entry.key}: {error.message}") from error
        return sample, np.asarray(PILImage.fromarray(d).resize((w, h), PILImage.Resampling.BILINEAR))

    def collate(self, items: list[View], setting: Look) -> Batch:
        out = {
            "rgb": np.stack([v.rgb for v in items]),
            "owner": np.repeat(np.arange(len(items)), [len(v.labels) for v in items]),
            "rounds": np.array(setting.rounds),
            "dither": np.concatenate([v.dither for v in items]),
            **{k: np.concatenate([getattr(v, k) for v in items]) for k in ("target", "boxes", "points", "labels")},
        }
        if self.with_depth:
            out["depth"] = np.stack([v.depth for v in items if v.depth is not None])
        return {k: torch.from_numpy(np.asarray(v)) for k, v in out.items()}


class MaskLoss(nn.Module):
    """Eq. 3's five terms for one batch of MaskSource by name, and the IoU of the masks; sums over its prompts."""

    def __init__(self, network: DepthSeg, mask: float, dice: float, direct: bool):
        super().__init__()
        self.network = network
        self.mask, self.dice = mask, dice  # their weights also decide which candidate is the best
        self.direct = direct

    def forward(self, batch: Batch) -> tuple[Batch, Tensor]:
        net = self.network
        features = net.encode(batch["rgb"], batch.get("depth"))
        points, labels = self._interactive(features, batch)
        logits, quality, early = net(features, batch["owner"], points, labels, intermediate=self.direct)
        p, tokens = logits.shape[:2]
        target = batch["target"]
        # Token 0 answers unambiguous prompts, tokens 1..3 compete for the others. Where the evaluation always takes the best of
        # three (official weights), every prompt trains both.
        clear = _clear(labels)
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
        out: Batch = {}
        for group in groups:
            best = cost.masked_fill(~group, float("inf")).argmin(1)
            error = (quality - truth).square() * group
            terms = {
                "mask": mask[rows, best],
                "dice": dice[rows, best],
                "iou": error.sum(1) / group.sum(1),
                "aux": losses.boundary_loss(logits[rows, best], target),
                "true_iou": truth[rows, best],
            }
            if early is not None:
                m, d = cells(early[rows, best][:, None])
                terms["direct"] = (self.mask * m + self.dice * d)[:, 0]
            for name, values in terms.items():
                out[name] = out.get(name, 0) + values.sum() / len(groups)
        return out, torch.tensor(float(p), device=labels.device)

    @torch.no_grad()
    def _interactive(self, features: tuple[Tensor, ...], batch: Batch) -> tuple[Tensor, Tensor]:
        """The prompts, those of clicks with as many more clicks as the step has rounds, each where the answer before was most wrong."""
        points, labels = batch["points"], batch["labels"]
        clicked = (labels == PADDING).any(1)
        if not int(batch["rounds"]) or not clicked.any():
            return points, labels
        rows = clicked.nonzero()[:, 0]
        xy, signs, owner, target, dither = (v[rows] for v in (points, labels, batch["owner"], batch["target"], batch["dither"]))
        every = torch.arange(len(rows), device=rows.device)
        for _ in range(int(batch["rounds"])):
            logits, quality, _ = self.network(features, owner, xy, signs)
            three = quality[:, 1:].argmax(1) + 1
            best = torch.where(_clear(signs), 0, three) if self.network.single_mask_for == "unambiguous" else three
            where, sign = deepest_errors(logits[every, best], target, dither)
            end = (signs == PADDING).int().argmax(1)  # the padding token moves behind the new click
            room = end < TOKENS - 1
            at = every[room], end[room]
            xy, signs = xy.clone(), signs.clone()
            xy[at], signs[at] = where[room] * PROMPT_SIDE, sign[room]
            signs[at[0], at[1] + 1] = PADDING
        points, labels = points.clone(), labels.clone()
        points[rows], labels[rows] = xy, signs
        return points, labels

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


def _clear(labels: Tensor) -> Tensor:
    """Which prompts (P, K) have one answer: boxes, and three clicks or more."""
    clicks = ((labels == POSITIVE) | (labels == NEGATIVE)).sum(1)
    return (labels == CORNER_MIN).any(1) | (clicks >= 3)


def deepest_errors(logits: Tensor, target: Tensor, dither: Tensor) -> tuple[Tensor, Tensor]:
    """The next click for each answer (P, s, s): x and y in 0..1 (P, 2), and POSITIVE or NEGATIVE (P,).

    As the evaluation's clicker: at the cell of the missed or of the wrongly covered region that lies deepest in it (here in steps
    of king's moves, up to DEEPEST); which of equally deep ones follows from `dither` (P,) 0..1, so that it is the sample's and not the
    process' luck. An answer without error is clicked inside once more.
    """
    inside, found = target > 0.5, logits > 0
    regions = torch.stack([~inside & found, inside & ~found], 1)  # in the order of NEGATIVE, POSITIVE
    perfect = ~regions.flatten(1).any(1)
    regions[perfect, POSITIVE] = inside[perfect]
    padded = F.pad(regions, (1, 1, 1, 1))
    alive, depth = padded[..., 1:-1, 1:-1], regions.to(torch.uint8)
    for _ in range(DEEPEST - 1):
        across = padded[..., :-2] & padded[..., 1:-1] & padded[..., 2:]
        alive.copy_(across[..., :-2, :] & across[..., 1:-1, :] & across[..., 2:, :])
        depth += alive
    depth = depth.float()
    s = target.shape[-1]
    golden = torch.arange(2 * s * s, device=depth.device, dtype=torch.float64) * 0.6180339887498949
    noise = ((golden[None] + dither[:, None].double()) % 1).to(depth.dtype).view_as(depth)
    at = (depth + 0.9 * noise * (depth > 0)).flatten(1).argmax(1)
    sign, cell = at // (s * s), at % (s * s)
    xy = torch.stack([cell % s, cell // s], 1)
    return (xy + 0.5) / s, sign
