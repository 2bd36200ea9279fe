"""EfficientViT image encoders of EfficientViT-SAM (Zhang et al. 2024): backbone, neck, channel norm.

Assembled from timm's EfficientViT blocks under the official parameter names, because timm's own class cannot express the XL
variants. `nano` is one more row of the same table: a narrow L. Knows nothing of prompts or masks.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

from timm.layers import GELUTanh
from timm.models.efficientvit_mit import ConvBlock, ConvNormAct, FusedMBConv, LiteMLA, MBConv, ResidualBlock
from torch import Tensor, nn
from torch.nn import functional as F

# The official factory sets 1e-6 on every norm of the model (torch's default would be 1e-5, timm's is 1e-7), and the linear
# attention's denominator carries 1e-15.
NORM_EPS = 1e-6
ATTENTION_EPS = 1e-15
_norm = partial(nn.BatchNorm2d, eps=NORM_EPS)


@dataclass(frozen=True)
class Variant:
    """One row of the table: stage k has `blocks[k]` blocks of kind `kinds[k]` after its stride-2 opening block."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    kinds: tuple[str, ...]  # res, fmb (fused MBConv), mb (MBConv), att (linear attention + MBConv)
    expands: tuple[int, ...]  # inside a stage; the opening block expands four times as much
    scale: int  # kernel of the attention's extra scale
    neck_width: int
    neck_depth: int
    neck_expand: int
    side: int  # native input, pixels
    out: int = 256
    skips: bool = False  # also return the features at stride 4 and 2
    act: type[nn.Module] = GELUTanh  # nano: Hardswish, a fifth cheaper to train on a CPU


_L: dict[str, Any] = dict(kinds=("res", "fmb", "fmb", "mb", "att"), expands=(1, 4, 4, 4, 6), scale=5, neck_expand=1, side=512)
_XL: dict[str, Any] = dict(kinds=("res", "fmb", "fmb", "fmb", "att", "att"), expands=(1, 4, 4, 4, 4, 6), scale=3, neck_expand=4, side=1024)
_WIDTHS = (32, 64, 128, 256, 512)
VARIANTS = {
    "nano": Variant(
        widths=(16, 24, 48, 96, 192),
        depths=(1, 1, 1, 2, 2),
        neck_width=64,
        neck_depth=2,
        out=64,
        skips=True,
        act=nn.Hardswish,
        **_L,
    ),
    "l0": Variant(widths=_WIDTHS, depths=(1, 1, 1, 4, 4), neck_width=256, neck_depth=4, **_L),
    "l1": Variant(widths=_WIDTHS, depths=(1, 1, 1, 6, 6), neck_width=256, neck_depth=8, **_L),
    "l2": Variant(widths=_WIDTHS, depths=(1, 2, 2, 8, 8), neck_width=256, neck_depth=12, **_L),
    "xl0": Variant(widths=(*_WIDTHS, 1024), depths=(0, 1, 1, 2, 3, 3), neck_width=256, neck_depth=6, **_XL),
    "xl1": Variant(widths=(*_WIDTHS, 1024), depths=(1, 2, 2, 4, 6, 6), neck_width=256, neck_depth=12, **_XL),
}


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.by_pixel(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def by_pixel(self, x: Tensor) -> Tensor:
        """The same for (..., C)."""
        return super().forward(x)


class Ops(nn.Module):
    """A sequence called `op_list`, as the official parameter names want it."""

    def __init__(self, blocks: list[nn.Module]):
        super().__init__()
        self.op_list = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.op_list:
            x = block(x)
        return x


class Attention(nn.Module):
    """Multi-scale linear attention, then an MBConv, each with a residual."""

    def __init__(self, channels: int, expand: int, scale: int, act: type[nn.Module]):
        super().__init__()
        mla = LiteMLA(channels, channels, dim=32, norm_layer=(None, _norm), scales=(scale,), eps=ATTENTION_EPS)
        self.context_module = ResidualBlock(mla, nn.Identity())
        self.local_module = ResidualBlock(_local("mb", channels, channels, 1, expand, act, fewer_norms=True), nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return self.local_module(self.context_module(x))


def _local(kind: str, inside: int, out: int, stride: int, expand: int, act: type[nn.Module], fewer_norms: bool = False) -> nn.Module:
    """res, fmb or mb. With fewer norms, all convolutions but the last have a bias instead of a BatchNorm."""
    inner = (True, None) if fewer_norms else (False, _norm)
    if kind == "res":
        return ConvBlock(inside, out, 3, stride, expand_ratio=1, norm_layer=_norm, act_layer=(act, None))
    if kind == "fmb":
        return FusedMBConv(
            inside, out, 3, stride, expand_ratio=expand,
            use_bias=(inner[0], False), norm_layer=(inner[1], _norm), act_layer=(act, None),
        )  # fmt: skip
    return MBConv(
        inside, out, 3, stride, expand_ratio=expand,
        use_bias=(inner[0], inner[0], False), norm_layer=(inner[1], inner[1], _norm), act_layer=(act, act, None),
    )  # fmt: skip


class Backbone(nn.Module):
    """The stages; stage k has stride 2 ** (k + 1)."""

    def __init__(self, v: Variant):
        super().__init__()
        stem: list[nn.Module] = [ConvNormAct(3, v.widths[0], 3, 2, norm_layer=_norm, act_layer=v.act)]
        stem += [ResidualBlock(_local("res", v.widths[0], v.widths[0], 1, 1, v.act), nn.Identity()) for _ in range(v.depths[0])]
        stages = [Ops(stem)]
        for k in range(1, len(v.widths)):
            kind, width, expand = v.kinds[k], v.widths[k], v.expands[k]
            fewer = kind == "att" or k >= len(v.widths) - 2  # the last two stages have no inner norms
            opening = "mb" if kind == "att" else kind
            blocks: list[nn.Module] = [ResidualBlock(_local(opening, v.widths[k - 1], width, 2, 4 * expand, v.act, fewer))]
            for _ in range(v.depths[k]):
                if kind == "att":
                    blocks.append(Attention(width, expand, v.scale, v.act))
                else:
                    blocks.append(ResidualBlock(_local(kind, width, width, 1, expand, v.act, fewer), nn.Identity()))
            stages.append(Ops(blocks))
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        out = []
        for stage in self.stages:
            x = stage(x)
            out.append(x)
        return out


class Neck(nn.Module):
    """The last three stages, brought to the size of the shallowest of them and summed, then fused MBConvs and a projection."""

    def __init__(self, v: Variant):
        super().__init__()
        self.input_ops = nn.ModuleList(
            Ops([ConvNormAct(c, v.neck_width, 1, norm_layer=_norm, act_layer=None)]) for c in reversed(v.widths[-3:])
        )
        w = v.neck_width
        self.middle = Ops([ResidualBlock(_local("fmb", w, w, 1, v.neck_expand, v.act), nn.Identity()) for _ in range(v.neck_depth)])
        self.output_ops = nn.ModuleList([Ops([ConvNormAct(w, v.out, 1, bias=True, norm_layer=None, act_layer=None)])])

    def forward(self, stages: list[Tensor]) -> Tensor:
        size = stages[-3].shape[-2:]  # 64 x 64 at the native input
        deep, mid, shallow = (
            # bicubic in fp32: half precision is not implemented everywhere, and the next convolution wants its own type back
            F.interpolate(y.float(), size, mode="bicubic", align_corners=False).to(y.dtype) if y.shape[-2:] != size else y
            for y in (op(x) for op, x in zip(self.input_ops, reversed(stages[-3:]), strict=True))
        )
        return self.output_ops[0](self.middle(deep + (mid + shallow)))  # official order of the sum


class ImageEncoder(nn.Module):
    """(B, 3, S, S) normalised -> tuple of the embedding (B, out, s, s) and, where the variant has skips, strides 4 and 2."""

    def __init__(self, variant: str):
        super().__init__()
        v = VARIANTS[variant]
        self.skips = v.skips
        self.backbone = Backbone(v)
        self.neck = Neck(v)
        self.norm = LayerNorm2d(v.out)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        stages = self.backbone(x)
        embedding = self.norm(self.neck(stages))
        return (embedding, stages[1], stages[0]) if self.skips else (embedding,)
