"""nano's monocular depth estimator: nano's backbone and a small pyramid; relative inverse depth, larger is nearer.

Trained by `depthseg train --stage depth` with a loss that ignores scale and shift, so only the order and the relief mean anything.
"""

from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from depthseg.models import checkpoint
from depthseg.models.efficientvit import VARIANTS, Backbone

WIDTH = 48


class DepthNet(nn.Module):
    """(B, 3, S, S) normalised as by Frame.image -> (B, S/2, S/2) relative inverse depth."""

    side = 256

    def __init__(self) -> None:
        super().__init__()
        v = VARIANTS["nano"]
        self.backbone = Backbone(v)
        self.lateral = nn.ModuleList(nn.Conv2d(c, WIDTH, 1) for c in v.widths)
        self.smooth = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH, bias=False),
                nn.Conv2d(WIDTH, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.Hardswish(),
            )
            for _ in v.widths
        )  # fmt: skip
        self.out = nn.Conv2d(WIDTH, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        stages = self.backbone(x)
        y = None
        for stage, lateral, smooth in zip(reversed(stages), reversed(self.lateral), self.smooth, strict=True):
            z = lateral(stage)
            y = smooth(z if y is None else z + F.interpolate(y, z.shape[-2:], mode="bilinear", align_corners=False))
        return self.out(y)[:, 0]

    @classmethod
    def load(cls, path: Path) -> "DepthNet":
        """The estimator with the weights of `path`, in eval mode. Raises DepthsegError where they do not fit."""
        network = cls()
        checkpoint.load_into(network, path)
        return network.eval()
