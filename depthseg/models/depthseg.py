"""Depth-Aware EfficientViT-SAM (Zhou et al.): two encoders of one architecture, F_rgb + alpha * F_depth (Eq. 1), SAM's head.

Without the depth branch this is EfficientViT-SAM itself: the baseline and the method are one class. Features are returned, never
kept on the object.
"""

import functools

import torch
from torch import Tensor, nn

from depthseg.models.efficientvit import VARIANTS, ImageEncoder
from depthseg.models.sam import SamHead
from depthseg.schema import Frame

Features = tuple[Tensor, ...]


class DepthSeg(SamHead):
    """`encode` pictures once, `decode` any number of prompts of any of them.

    side: native encoder input. alpha: learnable scalar, None without depth branch. single_mask_for: "never" (the official protocol:
    three masks, the best predicted IoU wins, for every prompt) or "unambiguous" (boxes and three or more clicks take token 0).
    grid_limits: predicted IoU and stability under which everything mode drops a mask. specks: holes and islands of a mask under this
    share of its area are filled or dropped. frame: how a picture lies in the input. most_points: of one prompt, a
    box being two; None for any number. hears_negatives: whether negative points mean something to it.
    """

    frame = Frame
    most_points: int | None = None
    hears_negatives = True

    def __init__(self, variant: str, depth: bool):
        v = VARIANTS[variant]
        if v.skips:
            super().__init__(v.out, heads=4, hidden=256, iou_hidden=64, dense_prompt=True, skips=(v.widths[1], v.widths[0]))
        else:
            super().__init__()
        self.variant = variant
        self.side = v.side
        self.zoom_side = 192 if v.skips else v.side  # encoder input for crops around one box or answer
        self.mask_stride = v.side // 256  # input pixels to one cell of the low-resolution masks
        self.single_mask_for = "unambiguous" if v.skips else "never"
        self.grid_limits = (0.4, 0.6) if v.skips else (0.7, 0.85)  # nano is seldom sure of a mask from one click
        self.specks = 0.05 if v.skips else 0.0
        self.image_encoder = ImageEncoder(variant)
        self.depth_encoder = ImageEncoder(variant) if depth else None
        # 0 computes exactly the RGB model; training starts elsewhere, since a branch behind 0 gets no gradient (see train.py)
        self.alpha = nn.Parameter(torch.zeros(())) if depth else None

    def encode(self, rgb: Tensor, depth: Tensor | None = None) -> Features:
        """(B, 3, S, S) normalised picture and depth (one channel replicated) -> features. depth=None is the RGB model."""
        if depth is None:
            return self.image_encoder(rgb)
        if self.depth_encoder is None or self.alpha is None:
            raise ValueError("this network has no depth branch")
        if rgb.is_cuda and not torch.is_grad_enabled():
            features, deep = _side_by_side(self.image_encoder, rgb, self.depth_encoder, depth)
        else:
            features, deep = self.image_encoder(rgb), self.depth_encoder(depth)
        return tuple(f + self.alpha * d for f, d in zip(features, deep, strict=True))

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
        """Logits (P, M, s, s) and predicted IoU (P, M): M = 3 candidates, or 1 with multimask=False. Shapes as in SamHead.

        best: of the candidates only the one with the highest predicted IoU.
        """
        logits, iou, _ = self(features, owner, points, labels, masks, range(1, 4) if multimask else range(1), best=best)
        return logits, iou


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for the process: what is freed on a stream serves that stream alone."""
    return torch.cuda.Stream(device)


def _side_by_side(first: nn.Module, x: Tensor, second: nn.Module, y: Tensor) -> tuple[Features, Features]:
    """What two networks give on a card, the second on a stream of its own: small batches leave room for both."""
    main, side = torch.cuda.current_stream(y.device), _side_stream(y.device)
    side.wait_stream(main)  # until y is there
    with torch.cuda.stream(side):
        theirs = second(y)
    ours = first(x)
    main.wait_stream(side)
    for t in (y, *theirs):  # the allocator knows one stream for each: it must not give their memory away while the other needs it
        t.record_stream(side if t is y else main)
    return ours, theirs


def build(variant: str, depth: bool) -> DepthSeg:
    """The network of one row of the catalog, with random weights."""
    return DepthSeg(variant, depth)
