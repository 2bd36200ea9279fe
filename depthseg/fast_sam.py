"""FastSAM (Zhao et al. 2023) by ultralytics (AGPL-3.0, an optional extra): YOLOv8-seg finds every mask, prompts choose among them.

A box takes the mask with the highest IoU with it; points take the masks that have a positive point in them and no negative one,
merged. (The paper also speaks of morphological operations on merged masks, which its code does not have.)
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert, nms

from depthseg.detect.yolo import contained, opened, package
from depthseg.errors import DepthsegError
from depthseg.schema import CORNER_MAX, CORNER_MIN, NEGATIVE, POSITIVE, PROMPT_SIDE, GreyFrame

CONFIDENCE, NMS, MOST = 0.4, 0.9, 300  # of the masks to choose from: FastSAM's README, and ultralytics' limit for one picture
STRIDE = 4  # input pixels to one cell of the prototypes
NOTHING = -20.0  # logit where there is no mask

Features = tuple[Tensor, Tensor]


class FastSam(nn.Module):
    """`encode` finds boxes with coefficients and prototypes of masks, `decode` chooses. Attributes as DepthSeg's; no depth branch."""

    frame = GreyFrame
    side = zoom_side = PROMPT_SIDE
    alpha = None
    single_mask_for = "never"
    grid_limits = (0.0, 0.0)  # every mask has passed CONFIDENCE
    specks = 0.0
    most_points: int | None = None
    hears_negatives = True

    def __init__(self, variant: str):
        super().__init__()
        package("FastSAM", "use another model")
        with contained():
            from ultralytics.nn.tasks import SegmentationModel, yaml_model_load

        with torch.device("cpu"):  # it computes its strides by a real pass
            self.image_encoder = SegmentationModel(yaml_model_load(f"yolov8{variant}-seg.yaml") | {"nc": 1}, verbose=False)
        head = self.image_encoder.model[-1]
        head._get_decode_boxes = partial(_boxes, head, head._get_decode_boxes)

    def _apply(self, fn, recurse=True):  # type: ignore[no-untyped-def]
        strides = self.image_encoder.model[-1].stride
        super()._apply(fn, recurse)
        self.image_encoder.model[-1].stride = strides  # three numbers, which ultralytics would move along
        return self

    def encode(self, rgb: Tensor, depth: Tensor | None = None) -> Features:
        """(B, 3, 1024, 1024) in 0..1 -> boxes xywh, confidence and coefficients (B, 37, N) and prototypes (B, 32, 256, 256)."""
        if depth is not None:
            raise ValueError("this network has no depth branch")
        (found, prototypes), _ = self.image_encoder(rgb)
        return found, prototypes

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
        """Logits (P, 1, 256, 256) and confidence (P, 1) of the masks that the prompts choose; shapes as in SamHead.

        Raises DepthsegError for a mask as prompt.
        """
        if masks is not None:
            raise DepthsegError("FastSAM takes no mask as a prompt", "Use boxes or points, or another model.")
        s = features[1].shape[-1]
        logits, score = features[1].new_full((len(owner), 1, s, s), NOTHING, dtype=torch.float32), points.new_zeros(len(owner), 1)
        with torch.autocast(logits.device.type, enabled=False):  # areas of 65,536 cells are more than fp16 holds
            for image in owner.unique():
                every, confidence = _masks(features[0][image], features[1][image])
                if not len(every):
                    continue
                rows = (owner == image).nonzero()[:, 0]
                for row, taken in zip(rows.tolist(), _chosen(every > 0, points[rows], labels[rows])):
                    if taken.any():
                        logits[row, 0], score[row, 0] = every[taken].amax(0), confidence[taken].max()
        return logits, score

    def published(self, path: Path) -> dict[str, Tensor]:
        """The tensors of a FastSAM checkpoint. Raises DepthsegError."""
        if path.suffix == ".safetensors":
            from depthseg.models import checkpoint

            return checkpoint.read(path)
        model = opened(package("FastSAM", "use another model").YOLO, path)
        return {f"image_encoder.{name}": tensor for name, tensor in model.model.float().state_dict().items()}


def _boxes(head: Any, decoded: Callable[[dict], Tensor], raw: dict) -> Tensor:
    """Boxes xywh (B, 4, N) in input pixels: what ultralytics decodes, in fp32 where the head computes in less.

    bf16 has eight bits: a coordinate of 1,000 pixels would be off by up to four.
    """
    if raw["boxes"].dtype == torch.float32:
        return decoded(raw)
    from ultralytics.utils.tal import dist2bbox, make_anchors

    with torch.autocast(raw["boxes"].device.type, enabled=False):
        anchors, strides = make_anchors([level.float() for level in raw["feats"]], head.stride, 0.5)
        sides = raw["boxes"].float().unflatten(1, (4, head.reg_max)).softmax(2)
        away = (sides * torch.arange(head.reg_max, device=sides.device)[:, None]).sum(2)  # from the anchor, in strides
        return dist2bbox(away, anchors.T[None], xywh=True, dim=1) * strides.T


def _masks(found: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (N, s, s) of every mask of one picture, cut off at its box, and confidence (N,); best first."""
    found = found.T[found[4] > CONFIDENCE].float()  # (N, 37)
    boxes = box_convert(found[:, :4], "cxcywh", "xyxy")
    kept = nms(boxes, found[:, 4], NMS)[:MOST]  # ultralytics' own is a loop in Python where torchvision was not imported before
    logits = (found[kept, 5:] @ prototypes.float().flatten(1)).unflatten(1, prototypes.shape[1:])
    x0, y0, x1, y1 = (boxes[kept] / STRIDE).T[..., None]
    at = torch.arange(logits.shape[-1], device=logits.device) + 0.5
    inside = ((at >= y0) & (at < y1))[:, :, None] & ((at >= x0) & (at < x1))[:, None]
    return torch.where(inside, logits, -logits.abs()), found[kept, 4]  # as steep outside as inside, so that the rim stays in its place


def _chosen(every: Tensor, points: Tensor, labels: Tensor) -> Tensor:
    """Which of the masks (N, s, s) each prompt takes, bool (P, N); points (P, K, 2) in the 1024 frame, labels (P, K)."""
    s = every.shape[-1]
    cell = (points * (s / PROMPT_SIDE)).long().clamp(0, s - 1)
    under = every[:, cell[..., 1], cell[..., 0]].permute(1, 2, 0)  # (P, K, N)
    positive, negative = ((labels == sign)[..., None] for sign in (POSITIVE, NEGATIVE))
    taken = (under & positive).any(1) | ~positive.any(1)  # without a positive point, all that no negative one is in
    taken &= ~(under & negative).any(1)
    boxed = (labels == CORNER_MIN).any(1)
    low, high = ((points * (labels == corner)[..., None]).sum(1) * (s / PROMPT_SIDE) for corner in (CORNER_MIN, CORNER_MAX))  # (P, 2)
    at = torch.arange(s, device=points.device)
    cover = (torch.minimum(at + 1, high[..., None]) - torch.maximum(at, low[..., None])).clamp(0, 1)  # (P, 2, s): share of each cell
    shared = torch.einsum("py,nyx,px->pn", cover[:, 1], every.float(), cover[:, 0])
    union = (high - low).prod(1)[:, None] + every.sum((1, 2)) - shared
    iou = torch.where(taken, shared / union.clamp_min(1e-6), -1.0)
    best = torch.zeros_like(taken).scatter(1, iou.argmax(1, keepdim=True), True)
    return torch.where(boxed[:, None], best & taken, taken)


def build(variant: str) -> FastSam:
    """The network of one row of the catalog, with random weights."""
    return FastSam(variant)
