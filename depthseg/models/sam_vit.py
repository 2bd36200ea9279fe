"""SAM itself (Kirillov et al. 2023): the ViT image encoder of transformers, and around any encoder SAM's head as SAM has it.

Checkpoints of Meta (`sam_vit_*.pth`) and folders in Hugging Face's format load alike. Knows nothing of other heads.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import SamVisionConfig
from transformers.models.sam.modeling_sam import SamVisionEncoder

from depthseg.models import checkpoint
from depthseg.models.depthseg import Features
from depthseg.models.sam import SamHead
from depthseg.schema import Frame

NORM_EPS = 1e-5  # of the nine LayerNorms of SAM's transformer: torch's default, where EfficientViT-SAM has 1e-6
SIDE = 1024  # pixels, input of every SAM

State = dict[str, Tensor]


class Sam(SamHead):
    """SAM's head and preprocessing around `image_encoder`: (B, 3, 1024, 1024) normalised -> (B, 256, 64, 64).

    Attributes as DepthSeg's; there is no depth branch.
    """

    frame = Frame
    side = zoom_side = SIDE
    alpha = None
    single_mask_for = "never"  # in the papers' comparisons, as for EfficientViT-SAM
    grid_limits = (0.88, 0.95)  # of SAM's own everything mode
    specks = 0.0
    most_points: int | None = None
    hears_negatives = True

    def __init__(self, image_encoder: nn.Module, dim: int = 256, hidden: int = 2048, iou_hidden: int = 256):
        super().__init__(dim, hidden=hidden, iou_hidden=iou_hidden)
        self.image_encoder = image_encoder
        for norm in self.mask_decoder.transformer.modules():
            if isinstance(norm, nn.LayerNorm):
                norm.eps = NORM_EPS

    def encode(self, rgb: Tensor, depth: Tensor | None = None) -> Features:
        """(B, 3, S, S) normalised picture -> features."""
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
        """As DepthSeg.decode."""
        logits, iou, _ = self(features, owner, points, labels, masks, range(1, 4) if multimask else range(1), best=best)
        return logits, iou

    def published(self, path: Path) -> State:
        """The tensors of a publisher's file, or folder, under the names of this network. Raises DepthsegError."""
        return renamed(checkpoint.read(path), self.image_encoder.RENAMES)  # type: ignore[arg-type]


def renamed(state: State, pairs: tuple[tuple[str, str], ...]) -> State:
    """The tensors under other names: each pair is a pattern, tried at every place of a name in this order, and what replaces it.

    A tensor whose name becomes empty is left out.
    """
    out = {}
    for name, tensor in state.items():
        for pattern, new in pairs:
            name = re.sub(pattern, new, name)
        if name:
            out[name] = tensor
    return out


@dataclass(frozen=True)
class Variant:
    """One size of SAM's ViT (segment-anything, build_sam.py)."""

    width: int
    depth: int
    heads: int
    whole: tuple[int, ...]  # blocks that attend to the whole picture; the others to windows of 14 x 14 cells


VARIANTS = {
    "b": Variant(768, 12, 12, (2, 5, 8, 11)),
    "l": Variant(1024, 24, 16, (5, 11, 17, 23)),
    "h": Variant(1280, 32, 16, (7, 15, 23, 31)),
}

# The first lines are Hugging Face's names of the head, the last ones both publishers' names of the encoder.
HEAD = (
    (r"^(prompt_encoder\.shared_embedding|shared_image_embedding)\.positional_embedding$",
     "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"\.point_embed\.", ".point_embeddings."),
    *((rf"\.mask_embed\.{theirs}\.", rf".mask_downscaling.{ours}.")
      for theirs, ours in (("conv1", 0), ("layer_norm1", 1), ("conv2", 3), ("layer_norm2", 4), ("conv3", 6))),
    *((rf"\.{theirs}\.", rf".output_upscaling.{ours}.")
      for theirs, ours in (("upscale_conv1", 0), ("upscale_layer_norm", 1), ("upscale_conv2", 3))),
    (r"\.layer_norm_final_attn\.", ".norm_final_attn."),
    (r"^(mask_decoder\.transformer\..*)\.layer_norm(\d)\.", r"\1.norm\2."),
    *((rf"(iou_prediction_head|output_hypernetworks_mlps\.\d)\.{theirs}\.", rf"\1.{ours}.")
      for theirs, ours in ((r"layers\.0", "layers.1"), ("proj_in", "layers.0"), ("proj_out", "layers.2"))),
)  # fmt: skip
ENCODER = (
    (r"^vision_encoder\.", "image_encoder."),
    (r"^image_encoder\.patch_embed\.proj\.", "image_encoder.patch_embed.projection."),
    (r"^image_encoder\.blocks\.(\d+)\.norm(\d)\.", r"image_encoder.layers.\1.layer_norm\2."),
    (r"^image_encoder\.blocks\.", "image_encoder.layers."),
    *((rf"^image_encoder\.neck\.{at}\.", f"image_encoder.neck.{name}.")
      for at, name in enumerate(("conv1", "layer_norm1", "conv2", "layer_norm2"))),
)  # fmt: skip


class VitEncoder(SamVisionEncoder):
    """transformers' SamVisionEncoder, a picture at a time."""

    RENAMES = ENCODER

    def forward(self, x: Tensor, **options: Any) -> Tensor:  # type: ignore[override]
        """(B, 3, 1024, 1024) -> (B, 256, 64, 64). One by one: the attention over a whole picture takes about 1 GiB for each."""
        return torch.cat([super(VitEncoder, self).forward(one, **options).last_hidden_state for one in x.split(1)])


class SamVit(Sam):
    """SAM with a ViT."""

    def published(self, path: Path) -> State:
        """As Sam.published; a folder in Hugging Face's format is taken too."""
        state = checkpoint.read(path / "model.safetensors" if path.is_dir() else path)
        if any(name.startswith("vision_encoder.") for name in state):
            state = renamed(state, HEAD)
        return renamed(state, ENCODER)


def build(variant: str) -> SamVit:
    """The network of one row of the catalog, with random weights."""
    v = VARIANTS[variant]
    config = SamVisionConfig(
        hidden_size=v.width, num_hidden_layers=v.depth, num_attention_heads=v.heads, global_attn_indexes=list(v.whole),
        attn_implementation="sdpa",
    )  # fmt: skip
    return SamVit(VitEncoder(config))
