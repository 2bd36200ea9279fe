"""MobileSAM (Zhang et al. 2023): SAM with TinyViT-5M (Wu et al. 2022) as image encoder, assembled from timm's blocks.

The blocks are put together anew because here the last stage keeps the resolution, and each stage ends with the next one's downsampling.
"""

from itertools import pairwise

from timm.models.tiny_vit import Attention, ConvNorm, MBConv, PatchEmbed, PatchMerging, TinyVitBlock
from torch import Tensor, device, nn

from depthseg.models.efficientvit import LayerNorm2d
from depthseg.models.sam_vit import Sam

WIDTHS, DEPTHS, HEADS, WINDOWS = (64, 128, 160, 320), (2, 2, 6, 2), (2, 4, 5, 10), (7, 7, 14, 7)
OUT = 256


class UncachedAttention(Attention):
    """timm's attention without its cache of biases.

    There, and in MobileSAM's own code, weights that are loaded after the first use in eval mode are answered with the old biases.
    """

    def get_attention_biases(self, device: device) -> Tensor:
        return self.attention_biases[:, self.attention_bias_idxs]  # (heads, cells, cells): a few ten thousand numbers


class Stage(nn.Module):
    """The blocks of one stage, then the way to the next one's size."""

    def __init__(self, blocks: list[nn.Module], downsample: nn.Module | None):
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.windowed = isinstance(blocks[0], TinyVitBlock)  # channels last inside
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h', w')."""
        x = self.blocks(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if self.windowed else self.blocks(x)
        return x if self.downsample is None else self.downsample(x)


def _block(width: int, heads: int, window: int) -> TinyVitBlock:
    block = TinyVitBlock(width, heads, window)
    block.attn = UncachedAttention(width, width // heads, heads, attn_ratio=1, resolution=(window, window))
    return block


def neck(width: int) -> nn.Sequential:
    """SAM's neck: (B, width, h, w) -> (B, 256, h, w)."""
    return nn.Sequential(
        nn.Conv2d(width, OUT, 1, bias=False), LayerNorm2d(OUT), nn.Conv2d(OUT, OUT, 3, padding=1, bias=False), LayerNorm2d(OUT)
    )


class TinyVit(nn.Module):
    """(B, 3, 1024, 1024) normalised -> (B, 256, 64, 64): strides 4, 8, 16 and 16."""

    RENAMES = (
        (r"^image_encoder\.(norm_head|head)\..*", ""),  # ImageNet's classifier, which nobody uses
        (r"^(image_encoder\.patch_embed)\.seq\.0\.", r"\1.conv1."),
        (r"^(image_encoder\.patch_embed)\.seq\.2\.", r"\1.conv2."),
        (r"^(image_encoder\..*)\.c\.weight$", r"\1.conv.weight"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(3, WIDTHS[0], nn.GELU)
        merges: list[nn.Module | None] = [PatchMerging(a, b, nn.GELU) for a, b in pairwise(WIDTHS)]
        merges[-1].conv2 = ConvNorm(WIDTHS[-1], WIDTHS[-1], 3, 1, 1, groups=WIDTHS[-1])  # type: ignore[union-attr]  # stride 1
        blocks: list[list[nn.Module]] = [[MBConv(WIDTHS[0], WIDTHS[0], 4.0, nn.GELU, 0.0) for _ in range(DEPTHS[0])]]
        blocks += [[_block(w, h, n) for _ in range(d)] for w, d, h, n in list(zip(WIDTHS, DEPTHS, HEADS, WINDOWS))[1:]]
        self.layers = nn.Sequential(*(Stage(b, merge) for b, merge in zip(blocks, [*merges, None])))
        self.neck = neck(WIDTHS[-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.neck(self.layers(self.patch_embed(x)))


def build() -> Sam:
    """The network of the row of the catalog, with random weights."""
    return Sam(TinyVit())
