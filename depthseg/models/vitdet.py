"""ViTDet (Li et al. 2022): a plain ViT, a pyramid from its last map, proposals, and box heads. Inference, boxes only.

The rules are those of detectron2's `projects/ViTDet` and so are the parameter names, so that its published checkpoints load as
they are, without their mask heads. The ViT is timm's (that of Segment Anything). Knows tensors only.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.layers import LayerNorm2d
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import batched_nms, clip_boxes_to_image, roi_align

from depthseg.models import checkpoint

WIDTH = 256
STRIDES = (4, 8, 16, 32, 64)
ANCHORS = (32, 64, 128, 256, 512)  # sides in pixels, one for each stride
RATIOS = (0.5, 1.0, 2.0)  # height over width
PROPOSALS, PROPOSAL_NMS = 1000, 0.7
POOLED = 7
MAX_GROWTH = math.log(1000 / 16)  # of a side, in one regression
DELTA_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))  # of the cascade's stages
EPS = 1e-6


@dataclass(frozen=True)
class Variant:
    """One size of the backbone."""

    width: int
    depth: int
    heads: int
    whole: tuple[int, ...]  # blocks that attend to the whole map; the others look at windows


VARIANTS = {
    "b": Variant(768, 12, 12, (2, 5, 8, 11)),
    "l": Variant(1024, 24, 16, (5, 11, 17, 23)),
    "h": Variant(1280, 32, 16, (7, 15, 23, 31)),
}


class Conv(nn.Conv2d):
    """A convolution with a norm inside it, as detectron2 names it."""

    def __init__(self, inside: int, kernel: int):
        super().__init__(inside, WIDTH, kernel, padding=kernel // 2, bias=False)
        self.norm = LayerNorm2d(WIDTH, eps=EPS)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(super().forward(x))


class Pyramid(nn.Module):
    """The backbone: maps at STRIDES, all from the ViT's single one at stride 16."""

    def __init__(self, v: Variant, side: int, window: int):
        super().__init__()
        c = v.width
        self.net = VisionTransformerSAM(
            side, 16, embed_dim=c, depth=v.depth, num_heads=v.heads, use_rel_pos=True, window_size=window,
            global_attn_indexes=v.whole, neck_chans=0, num_classes=0, norm_layer=lambda d, **kw: nn.LayerNorm(d, eps=EPS, **kw),
        )  # fmt: skip
        self.net.neck = nn.Identity()  # without a neck timm would put a norm there
        half = nn.ConvTranspose2d(c, c // 2, 2, 2)
        self.simfp_2 = nn.Sequential(
            half, LayerNorm2d(c // 2, eps=EPS), nn.GELU(), nn.ConvTranspose2d(c // 2, c // 4, 2, 2), Conv(c // 4, 1), Conv(WIDTH, 3)
        )
        self.simfp_3 = nn.Sequential(nn.ConvTranspose2d(c, c // 2, 2, 2), Conv(c // 2, 1), Conv(WIDTH, 3))
        self.simfp_4 = nn.Sequential(Conv(c, 1), Conv(WIDTH, 3))
        self.simfp_5 = nn.Sequential(nn.MaxPool2d(2), Conv(c, 1), Conv(WIDTH, 3))

    def forward(self, x: Tensor) -> list[Tensor]:
        y = self.net.forward_features(x)
        maps = [f(y) for f in (self.simfp_2, self.simfp_3, self.simfp_4, self.simfp_5)]
        return [*maps, maps[-1][..., ::2, ::2]]


def _decode(deltas: Tensor, boxes: Tensor, weights: tuple[float, ...] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Boxes xyxy (N, 4) moved and scaled by deltas (N, 4)."""
    size = boxes[:, 2:] - boxes[:, :2]
    centre = boxes[:, :2] + 0.5 * size
    d = deltas / deltas.new_tensor(weights)
    centre, size = d[:, :2] * size + centre, d[:, 2:].clamp(max=MAX_GROWTH).exp() * size
    return torch.cat([centre - 0.5 * size, centre + 0.5 * size], 1)


class Proposals(nn.Module):
    """The region proposal network: which anchors hold something, whatever it is."""

    def __init__(self) -> None:
        super().__init__()
        self.rpn_head = nn.ModuleDict(
            {
                "conv": nn.ModuleDict({f"conv{k}": nn.Conv2d(WIDTH, WIDTH, 3, padding=1) for k in range(2)}),
                "objectness_logits": nn.Conv2d(WIDTH, len(RATIOS), 1),
                "anchor_deltas": nn.Conv2d(WIDTH, 4 * len(RATIOS), 1),
            }
        )

    def forward(self, maps: list[Tensor], sizes: list[tuple[int, int]]) -> list[Tensor]:
        """Boxes (<= PROPOSALS, 4) in input pixels for each image, best first. sizes: (h, w) of the images without padding."""
        logits, boxes, levels = [], [], []
        for level, (x, stride, side) in enumerate(zip(maps, STRIDES, ANCHORS, strict=True)):
            for conv in self.rpn_head["conv"].values():  # type: ignore[operator,union-attr]
                x = conv(x).relu()
            score = self.rpn_head["objectness_logits"](x).permute(0, 2, 3, 1).flatten(1)  # (B, h w 3)
            b, n = score.shape
            deltas = self.rpn_head["anchor_deltas"](x).unflatten(1, (-1, 4)).permute(0, 3, 4, 1, 2).reshape(b, n, 4)
            best, index = score.float().topk(min(n, PROPOSALS), 1)
            anchors = _anchors(x.shape[-2:], stride, side).to(x.device)
            boxes.append(torch.stack([_decode(d[i].float(), anchors[i]) for d, i in zip(deltas, index, strict=True)]))
            logits.append(best)
            levels.append(torch.full_like(index, level))
        return [
            self._kept(score, box, level, size)
            for score, box, level, size in zip(torch.cat(logits, 1), torch.cat(boxes, 1), torch.cat(levels, 1), sizes, strict=True)
        ]

    @staticmethod
    def _kept(score: Tensor, boxes: Tensor, levels: Tensor, size: tuple[int, int]) -> Tensor:
        boxes = clip_boxes_to_image(boxes, size)
        some = (boxes[:, 2:] > boxes[:, :2]).all(1)  # those in the padding have become empty
        boxes = boxes[some]
        return boxes[batched_nms(boxes, score[some], levels[some], PROPOSAL_NMS)[:PROPOSALS]]


def _anchors(shape: tuple[int, int] | torch.Size, stride: int, side: int) -> Tensor:
    """(h w 3, 4): anchors of equal area and three shapes at every cell, their centres at multiples of the stride, unrounded."""
    w = torch.tensor([math.sqrt(side**2 / r) for r in RATIOS], dtype=torch.float64)
    h = side**2 / w
    around = (torch.stack([-w, -h, w, h], 1) / 2).float()
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) * stride for n in shape), indexing="ij")
    return (torch.stack([x, y, x, y], -1).reshape(-1, 1, 4) + around).reshape(-1, 4)


def _pool(maps: list[Tensor], boxes: list[Tensor]) -> Tensor:
    """(N, 256, 7, 7) of all boxes of all images, each from the level that fits its size (FPN's rule)."""
    flat = torch.cat(boxes)
    owner = torch.cat([flat.new_full((len(b), 1), i) for i, b in enumerate(boxes)])
    area = (flat[:, 2:] - flat[:, :2]).prod(1)
    level = (4 + torch.log2(area.sqrt() / 224 + 1e-8)).floor().clamp(2, 5) - 2
    out = maps[0].new_zeros(len(flat), WIDTH, POOLED, POOLED, dtype=torch.float32)
    for k, stride in enumerate(STRIDES[:-1]):
        mine = (level == k).nonzero()[:, 0]
        rois = torch.cat([owner[mine], flat[mine]], 1)  # in half precision they would be off by pixels
        out[mine] = roi_align(maps[k].float(), rois, POOLED, 1 / stride, sampling_ratio=0, aligned=True)
    return out


class BoxHead(nn.Module):
    """Four convolutions and a layer of 1024."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3, self.conv4 = (Conv(WIDTH, 3) for _ in range(4))
        self.fc1 = nn.Linear(WIDTH * POOLED**2, 1024)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = conv(x).relu()
        return self.fc1(x.flatten(1)).relu()


class Predictor(nn.Module):
    """Class logits (N, classes + background) and box deltas (N, 4), or (N, 4 classes)."""

    def __init__(self, classes: int, deltas: int):
        super().__init__()
        self.cls_score = nn.Linear(1024, classes + 1)
        self.bbox_pred = nn.Linear(1024, deltas)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x).float(), self.bbox_pred(x).float()


class RoiHeads(nn.Module):
    """A cascade of three stages, each refining the boxes of the one before, or a single one with a box for each class."""

    def __init__(self, classes: int, cascade: bool, sigmoid: bool):
        super().__init__()
        self.cascade, self.sigmoid = cascade, sigmoid
        if cascade:
            self.box_head: nn.Module = nn.ModuleList(BoxHead() for _ in DELTA_WEIGHTS)
            self.box_predictor: nn.Module = nn.ModuleList(Predictor(classes, 4) for _ in DELTA_WEIGHTS)
        else:
            self.box_head, self.box_predictor = BoxHead(), Predictor(classes, 4 * classes)

    def stage(self, k: int, maps: list[Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Class probabilities (N, classes) and boxes (N, 4), or (N, classes, 4) without a cascade, of all images together."""
        head, predictor = (self.box_head[k], self.box_predictor[k]) if self.cascade else (self.box_head, self.box_predictor)  # type: ignore[index]
        logits, deltas = predictor(head(_pool(maps, boxes)))
        score = logits.sigmoid() if self.sigmoid else logits.softmax(1)
        flat = torch.cat(boxes)
        if self.cascade:
            return score[:, :-1], _decode(deltas, flat, DELTA_WEIGHTS[k])
        n = deltas.shape[1] // 4
        return score[:, :-1], _decode(deltas.view(-1, 4), flat.repeat_interleave(n, 0), DELTA_WEIGHTS[0]).view(-1, n, 4)

    def forward(self, maps: list[Tensor], boxes: list[Tensor], sizes: list[tuple[int, int]]) -> list[tuple[Tensor, Tensor]]:
        """For each image, scores (n, classes) and boxes (n, 4) or (n, classes, 4), clipped to it."""
        counts = [len(b) for b in boxes]
        scores = []
        for k in range(len(DELTA_WEIGHTS) if self.cascade else 1):
            score, flat = self.stage(k, maps, boxes)
            boxes = [clip_boxes_to_image(b, size) for b, size in zip(flat.split(counts), sizes, strict=True)]
            scores.append(score)
        return list(zip(torch.stack(scores).mean(0).split(counts), boxes, strict=True))


class ViTDet(nn.Module):
    """(B, 3, S, S) normalised and padded as by Frame.image -> for each image boxes, scores and class indices.

    classes: 80 of COCO, whose scores are a softmax, or 1203 of LVIS v1, with a sigmoid. side and window only for tests.
    """

    def __init__(
        self, variant: str | Variant, classes: int, cascade: bool = True, sigmoid: bool = False, side: int = 1024, window: int = 14
    ):
        super().__init__()
        v = VARIANTS[variant] if isinstance(variant, str) else variant
        self.side, self.classes = side, classes
        self.least, self.most = (0.02, 300) if sigmoid else (0.05, 100)  # score and number, as each data set is evaluated
        self.backbone = Pyramid(v, side, window)
        self.proposal_generator = Proposals()
        self.roi_heads = RoiHeads(classes, cascade, sigmoid)

    def forward(
        self,
        x: Tensor,
        sizes: list[tuple[int, int]],
        least: float | None = None,
        nms: float = 0.5,
        most: int | None = None,
        only: list[int] | None = None,
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Boxes (n, 4) in input pixels, scores (n,), best first, and class indices (n,) for each image.

        sizes: (h, w) of each image in the input. least, most: scores above this, and at most so many; by default the data set's.
        only: class indices to look for.
        """
        maps = self.backbone(x)
        proposals = self.proposal_generator(maps, sizes)
        answers = self.roi_heads(maps, proposals, sizes)
        if only is not None:
            answers = [(s[:, only], b if b.ndim == 2 else b[:, only]) for s, b in answers]
        found = [self._best(s, b, self.least if least is None else least, nms, most or self.most) for s, b in answers]
        return found if only is None else [(b, s, torch.as_tensor(only, device=c.device)[c]) for b, s, c in found]

    @staticmethod
    def _best(scores: Tensor, boxes: Tensor, least: float, nms: float, most: int) -> tuple[Tensor, Tensor, Tensor]:
        finite = scores.isfinite().all(1) & boxes.flatten(1).isfinite().all(1)
        row, label = ((scores > least) & finite[:, None]).nonzero(as_tuple=True)
        score, box = scores[row, label], boxes[row] if boxes.ndim == 2 else boxes[row, label]
        keep = batched_nms(box, score, label, nms)[:most]
        return box[keep], score[keep], label[keep]

    def load(self, path: Path) -> "ViTDet":
        """Fill with a checkpoint of detectron2's model zoo, or a conversion of it; in eval mode. Raises DepthsegError."""
        state = from_zoo(checkpoint.read(path), self.backbone.net.pos_embed.shape[1:3])
        checkpoint.fill(self, state, path, "ViTDet", "Is it of the size and data set that were named?")
        return self.eval()


UNUSED = ("roi_heads.mask_head.", "pixel_mean", "pixel_std", "proposal_generator.anchor_generator.")


def from_zoo(state: dict[str, Tensor], grid: tuple[int, int] | torch.Size) -> dict[str, Tensor]:
    """A checkpoint of detectron2 without what boxes do not need, and its position embedding brought to the grid of patches."""
    out = {k: v for k, v in state.items() if not k.startswith(UNUSED) and not k.endswith(".fed_loss_cls_weights")}
    embedding = out.get("backbone.net.pos_embed")
    if embedding is not None and embedding.ndim == 3:  # (1, 1 + n n, C), the class token first
        n = math.isqrt(embedding.shape[1])
        square = embedding[:, 1:].float().reshape(1, n, n, -1).permute(0, 3, 1, 2)
        if (n, n) != tuple(grid):
            square = F.interpolate(square, tuple(grid), mode="bicubic", align_corners=False)
        out["backbone.net.pos_embed"] = square.permute(0, 2, 3, 1).contiguous()
    return out
