"""EdgeSAM (Zhou et al. 2023): SAM with RepViT-M1 (Wang et al. 2023) as image encoder, assembled from timm's blocks.

As published the last two stages are fused: the deeper one is enlarged and added to the last features before it shrinks.
"""

from typing import Any

from timm.models.repvit import ConvNorm, RepViTBlock, RepVitMlp, RepVitStem
from torch import Tensor, nn
from torch.nn import functional as F

from depthseg.models.mobile_sam import OUT, neck
from depthseg.models.sam_vit import Sam

WIDTHS, DEPTHS = (48, 96, 192, 384), (2, 2, 14, 2)
KERNEL, EXPAND = 3, 2


class Downsample(nn.Module):
    """Half the size, other channels, then an MLP with a residual."""

    def __init__(self, inside: int, out: int):
        super().__init__()
        self.spatial = ConvNorm(inside, inside, KERNEL, 2, KERNEL // 2, groups=inside)
        self.channel = ConvNorm(inside, out)
        self.channel_mixer = RepVitMlp(out, EXPAND * out, nn.GELU)

    def forward(self, x: Tensor) -> Tensor:
        x = self.channel(self.spatial(x))
        return x + self.channel_mixer(x)


def _block(width: int, squeeze: bool) -> RepViTBlock:
    return RepViTBlock(width, EXPAND, KERNEL, use_se=squeeze, act_layer=nn.GELU, legacy=True)


class RepVit(nn.Module):
    """(B, 3, 1024, 1024) normalised -> (B, 256, 64, 64)."""

    RENAMES = (
        (r"\.features\.0\.0\.", ".features.0.conv1."),
        (r"\.features\.0\.2\.", ".features.0.conv2."),
        (r"\.token_mixer\.0\.(c|bn)\.", r".spatial.\1."),
        (r"\.token_mixer\.2\.", ".channel."),
        (r"\.token_mixer\.0\.", ".token_mixer."),
        (r"\.token_mixer\.1\.", ".se."),
        (r"\.channel_mixer\.m\.0\.", ".channel_mixer.conv1."),
        (r"\.channel_mixer\.m\.2\.", ".channel_mixer.conv2."),
        (r"\.fuse_stage3\.op_list\.0\.", ".fuse_stage3."),
    )

    def __init__(self) -> None:
        super().__init__()
        blocks: list[nn.Module] = [RepVitStem(3, WIDTHS[0], nn.GELU)]
        for stage, (width, depth) in enumerate(zip(WIDTHS, DEPTHS)):
            if stage:
                blocks += [_block(WIDTHS[stage - 1], squeeze=False), Downsample(WIDTHS[stage - 1], width)]
            blocks += [_block(width, squeeze=i % 2 == 0) for i in range(depth)]
        self.features = nn.ModuleList(blocks)
        self.fuse_stage2, self.fuse_stage3 = (nn.Conv2d(width, OUT, 1, bias=False) for width in WIDTHS[2:])
        self.neck = neck(OUT)

    def forward(self, x: Tensor) -> Tensor:
        before = x
        for block in self.features:
            if isinstance(block, Downsample):
                before = x  # what the earlier stage ends with: at stride 16, in the end
            x = block(x)
        finer = self.fuse_stage2(before)
        deeper = F.interpolate(self.fuse_stage3(x).float(), finer.shape[-2:], mode="bicubic", align_corners=False).to(finer.dtype)
        return self.neck(finer + deeper)


class EdgeSam(Sam):
    """SAM whose masks are rated by their stability: the head that predicts IoU was not distilled, as its README says."""

    def decode(self, *asked: Any, **more: Any) -> tuple[Tensor, Tensor]:
        """As DepthSeg.decode, with SAM's stability score (offset 1) in the place of the predicted IoU."""
        logits, _ = super().decode(*asked[:6], **more)  # all candidates: they are ranked by another number
        inner, outer = ((logits > offset).sum((2, 3)) for offset in (1.0, -1.0))
        return logits, inner / outer.clamp_min(1)


def build() -> EdgeSam:
    """The network of the row of the catalog, with random weights."""
    return EdgeSam(RepVit())
