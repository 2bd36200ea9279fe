"""nano's class-agnostic box proposer: nano's backbone, a small pyramid and one anchor-free head at strides 8, 16 and 32.

Each cell says how likely it is the centre of an object and how far away the four sides are (as FCOS, Tian et al. 2019, does).
Suppression of duplicates is the caller's. Trained by `depthseg train --stage boxes`.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from depthseg.models import checkpoint
from depthseg.models.efficientvit import VARIANTS, Backbone

WIDTH = 64
STRIDES = (8, 16, 32)


def _block() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.Hardswish())


class BoxNet(nn.Module):
    """(B, 3, S, S) normalised as by Frame.image -> scores (B, N) in 0..1 and boxes (B, N, 4) xyxy in input pixels."""

    side = 256

    def __init__(self) -> None:
        super().__init__()
        v = VARIANTS["nano"]
        self.backbone = Backbone(v)
        self.lateral = nn.ModuleList(nn.Conv2d(c, WIDTH, 1) for c in v.widths[-3:])
        self.smooth = nn.ModuleList(_block() for _ in STRIDES)
        self.tower = nn.Sequential(_block(), _block())
        self.score = nn.Conv2d(WIDTH, 1, 3, padding=1)
        self.reach = nn.Conv2d(WIDTH, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.ones(len(STRIDES)))
        nn.init.constant_(
            dict(self.score.named_parameters())["bias"], -4.6
        )  # starts at 1 % objects, so that the many empty cells do not rule the loss

    def raw(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Score logits (B, N), boxes (B, N, 4) and, per cell, its centre and stride (N, 3), input pixels."""
        stages = self.backbone(x)[-3:]
        maps: list[Tensor] = []
        for k in (2, 1, 0):
            z = self.lateral[k](stages[k])
            if maps:
                z = z + F.interpolate(maps[0], z.shape[-2:], mode="nearest")
            maps.insert(0, self.smooth[k](z))
        logits, boxes, cells = [], [], []
        for k, (y, stride) in enumerate(zip(maps, STRIDES, strict=True)):
            h, w = y.shape[-2:]
            y = self.tower(y)
            cy, cx = torch.meshgrid(torch.arange(h, device=x.device), torch.arange(w, device=x.device), indexing="ij")
            centre = (torch.stack([cx, cy], -1).reshape(-1, 2) + 0.5) * stride
            reach = (self.reach(y).flatten(2).transpose(1, 2) * self.scale[k]).clamp(-4, 5).exp() * stride  # left, top, right, bottom
            logits.append(self.score(y).flatten(1))
            boxes.append(torch.cat([centre - reach[..., :2], centre + reach[..., 2:]], -1))
            cells.append(torch.cat([centre, torch.full_like(centre[:, :1], stride)], 1))
        return torch.cat(logits, 1), torch.cat(boxes, 1), torch.cat(cells)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, boxes, _ = self.raw(x)
        return logits.sigmoid(), boxes

    @classmethod
    def load(cls, path: Path) -> "BoxNet":
        """The proposer with the weights of `path`, in eval mode. Raises DepthsegError where they do not fit."""
        network = cls()
        checkpoint.load_into(network, path)
        return network.eval()
