"""EfficientSAM (Xiong et al. 2023): a plain small ViT, and a decoder of SAM's shape with rules of its own.

What differs from SAM: the picture is stretched to the square, a prompt is always six tokens, negative points have no embedding, no
mask can be a prompt, and tokens keep their positional code through the decoder's second self-attention. Blocks are timm's.
"""

from functools import partial

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F

from depthseg.errors import DepthsegError
from depthseg.models.depthseg import Features
from depthseg.models.mobile_sam import neck
from depthseg.models.sam import MASK_TOKENS, Attention, PositionalEncoding
from depthseg.models.sam_vit import SIDE
from depthseg.schema import CORNER_MAX, CORNER_MIN, POSITIVE, PROMPT_SIDE, StretchedFrame

TOKENS = 6  # of a prompt, filled up; a box takes two
DIM, HIDDEN, HEADS, DEPTH = 256, 2048, 8, 12
PRETRAINED = 14  # cells along each side of the position table, which is followed by a class token's
VARIANTS = {"ti": (192, 3), "s": (384, 6)}  # width and heads of the ViT


class Vit(nn.Module):
    """(B, 3, 1024, 1024) normalised -> (B, 256, 64, 64); every block attends to the whole picture."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.patch_embed = PatchEmbed(SIDE, 16, 3, width, flatten=False, strict_img_size=False)
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + PRETRAINED**2, width))
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.Sequential(*(Block(width, heads, qkv_bias=True, norm_layer=norm) for _ in range(DEPTH)))
        self.neck = neck(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)  # (B, width, 64, 64)
        table = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, (PRETRAINED, PRETRAINED))
        x = x + F.interpolate(table, x.shape[-2:], mode="bicubic", align_corners=False)
        size = x.shape[-2:]
        x = self.blocks(x.flatten(2).transpose(1, 2))
        return self.neck(x.transpose(1, 2).unflatten(2, size))


class PromptEncoder(nn.Module):
    """Points and corners -> six tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.pe_layer = PositionalEncoding(DIM // 2)
        self.invalid_points, self.point_embeddings = nn.Embedding(1, DIM), nn.Embedding(1, DIM)
        self.bbox_top_left_embeddings, self.bbox_bottom_right_embeddings = nn.Embedding(1, DIM), nn.Embedding(1, DIM)

    def forward(self, points: Tensor, labels: Tensor) -> Tensor:
        """points (P, K, 2) in the 1024 frame, labels (P, K) -> (P, 6, dim). Raises DepthsegError for more than six points."""
        if int((labels >= 0).sum(1).max()) > TOKENS:
            raise too_many(int((labels >= 0).sum(1).max()))
        points, labels = F.pad(points, (0, 0, 0, TOKENS)), F.pad(labels, (0, TOKENS), value=-1)
        first = (labels < 0).byte().argsort(dim=1, stable=True)[:, :TOKENS]  # real ones first; their order does not matter
        points, labels = points.gather(1, first[..., None].expand(-1, -1, 2)), labels.gather(1, first)
        points = torch.where((labels < 0)[..., None], -1.0, points)  # where the empty ones lie in the official code
        code = self.pe_layer((points + 0.5) / PROMPT_SIDE)
        for meant, table in (
            (labels < 0, self.invalid_points),
            (labels == POSITIVE, self.point_embeddings),
            (labels == CORNER_MIN, self.bbox_top_left_embeddings),
            (labels == CORNER_MAX, self.bbox_bottom_right_embeddings),
        ):
            code = code + table.weight * meant[..., None]
        return code


def too_many(count: int) -> DepthsegError:
    """The error for a prompt of so many points."""
    return DepthsegError(
        f"EfficientSAM takes at most {TOKENS} points in a prompt, of which a box counts as two, not {count}",
        "Use fewer clicks, or another model.",
    )


class MLP(nn.Module):
    """Linear layers with GELU between them."""

    def __init__(self, inside: int, hidden: int, out: int, depth: int):
        super().__init__()
        widths = [inside, *[hidden] * (depth - 2)]
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(w, hidden), nn.GELU()) for w in widths))
        self.fc = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(x))


class TwoWayBlock(nn.Module):
    """Tokens attend to themselves, tokens to the image, MLP, image to the tokens; every step has a residual."""

    def __init__(self, first: bool):
        super().__init__()
        self.first = first  # the first block's self-attention has no positional code
        self.self_attn = Attention(DIM, HEADS)
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(DIM) for _ in range(4))
        self.cross_attn_token_to_image = Attention(DIM, HEADS, 2)
        self.mlp = MLP(DIM, HIDDEN, DIM, 2)
        self.cross_attn_image_to_token = Attention(DIM, HEADS, 2)

    def forward(self, t: Tensor, image: Tensor, code: Tensor, image_code: Tensor) -> tuple[Tensor, Tensor]:
        if not self.first:
            t = t + code  # unlike in SAM the code stays, also in the values
        t = self.norm1(t + self.self_attn(t, t, t))
        t = self.norm2(t + _gather(self.cross_attn_token_to_image, t + code, image, image_code))
        t = self.norm3(t + self.mlp(t))
        back = self.cross_attn_image_to_token
        if back.folds(t.shape[1]):
            return t, self.norm4(back.to_image(image, image + image_code, t + code, t, None, None))
        return t, self.norm4(image + back(image + image_code, t + code, t))


def _gather(attention: Attention, t: Tensor, image: Tensor, image_code: Tensor) -> Tensor:
    """What tokens gather from the image, by the cheaper of two equal ways (see Attention)."""
    placed = image + image_code
    return attention.from_image(t, image, placed, None) if attention.folds(t.shape[1]) else attention(t, placed, image)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayBlock(first) for first in (True, False))
        self.final_attn_token_to_image = Attention(DIM, HEADS, 2)
        self.norm_final_attn = nn.LayerNorm(DIM)

    def forward(self, image: Tensor, image_code: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """image (P, h * w, dim), image_code (h * w, dim), tokens (P, T, dim) -> tokens, image."""
        t = tokens
        for layer in self.layers:
            t, image = layer(t, image, tokens, image_code)
        return self.norm_final_attn(t + _gather(self.final_attn_token_to_image, t + tokens, image, image_code)), image


class MaskDecoder(nn.Module):
    """Image embedding and prompt tokens -> low-resolution mask logits and predicted IoU."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = Transformer()
        self.iou_token, self.mask_tokens = nn.Embedding(1, DIM), nn.Embedding(MASK_TOKENS, DIM)
        self.final_output_upscaling_layers = nn.Sequential(
            nn.Sequential(nn.ConvTranspose2d(DIM, DIM // 4, 2, 2), nn.GroupNorm(1, DIM // 4), nn.GELU()),
            nn.Sequential(nn.ConvTranspose2d(DIM // 4, DIM // 8, 2, 2), nn.Identity(), nn.GELU()),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(MLP(DIM, DIM, DIM // 8, 3) for _ in range(MASK_TOKENS))
        self.iou_prediction_head = MLP(DIM, DIM, MASK_TOKENS, 3)

    def forward(self, embedding: Tensor, image_code: Tensor, sparse: Tensor, which: range) -> tuple[Tensor, Tensor]:
        """embedding (P, dim, h, w), image_code (h * w, dim), sparse (P, K, dim) -> (P, M, 4h, 4w) and (P, M)."""
        fixed = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).expand(len(sparse), -1, -1)
        t, image = self.transformer(embedding.flatten(2).transpose(1, 2), image_code, torch.cat([fixed, sparse], 1))
        upscaled = self.final_output_upscaling_layers(image.transpose(1, 2).unflatten(2, embedding.shape[-2:]))
        weights = torch.stack([self.output_hypernetworks_mlps[i](t[:, 1 + i]) for i in which], 1)
        logits = (weights @ upscaled.flatten(2)).unflatten(2, upscaled.shape[-2:])
        return logits, self.iou_prediction_head(t[:, 0])[:, which.start : which.stop]


class EfficientSam(nn.Module):
    """`encode` pictures once, `decode` any number of prompts of any of them. Attributes as DepthSeg's; no depth branch.

    Prompts are flat, as for SamHead: an embedding is copied once for each prompt of a call, and not at all for those of one image.
    """

    frame = StretchedFrame
    side = zoom_side = SIDE
    alpha = None
    single_mask_for = "never"  # its code always answers with three
    grid_limits = (0.7, 0.9)  # of its own notebook
    specks = 0.0
    most_points: int | None = TOKENS
    hears_negatives = False

    def __init__(self, variant: str):
        super().__init__()
        self.image_encoder = Vit(*VARIANTS[variant])
        self.prompt_encoder = PromptEncoder()
        self.mask_decoder = MaskDecoder()

    def encode(self, rgb: Tensor, depth: Tensor | None = None) -> Features:
        """(B, 3, 1024, 1024) normalised picture -> features."""
        if depth is not None:
            raise ValueError("this network has no depth branch")
        return (self.image_encoder(rgb),)

    def decode(
        self,
        features: Features,
        owner: Tensor,
        points: Tensor,
        labels: Tensor,
        masks: Tensor | None = None,
        multimask: bool = True,
        best: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """As DepthSeg.decode. Raises DepthsegError for a mask as prompt and for more than six points."""
        if masks is not None:
            raise DepthsegError("EfficientSAM takes no mask as a prompt", "Use boxes or points, or another model.")
        sparse, (embedding,) = self.prompt_encoder(points, labels), features
        code = self.prompt_encoder.pe_layer.grid((embedding.shape[-2], embedding.shape[-1]))
        own = embedding.expand(len(owner), -1, -1, -1) if len(embedding) == 1 else embedding[owner]
        return self.mask_decoder(own, code, sparse, range(1, MASK_TOKENS) if multimask else range(1))


def build(variant: str) -> EfficientSam:
    """The network of one row of the catalog, with random weights."""
    return EfficientSam(variant)
