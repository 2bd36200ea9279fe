"""The official EfficientViT-SAM predictor loop, written from its description: what `bench` and the examples compare ours with.

One image at a time and one prompt in each call; PIL's bilinear resize; fp32; the network as it is, with nothing folded into anything;
all three candidates enlarged to the whole picture in two steps, and only then the best one chosen. Meant to be plain, not fast.
"""

from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch.nn import functional as F

from depthseg import masks
from depthseg.schema import CORNER_MAX, CORNER_MIN, PIXEL_MEAN, PIXEL_STD, PROMPT_SIDE, Array


def _long_side_to(size: tuple[int, int], side: int) -> tuple[int, int]:
    scale = side / max(size)
    return int(size[0] * scale + 0.5), int(size[1] * scale + 0.5)


def plain() -> Any:
    """The context in which a network takes its training form, where every layer is computed as it was published.

    Gradients are on in it: a network whose parameters want none (`requires_grad_(False)`) records nothing.
    """
    return torch.enable_grad()


def preprocess(pixels: Array, side: int) -> torch.Tensor:
    """uint8 RGB (h, w, 3) -> (1, 3, side, side): long side to `side`, normalised, then padded with zeros right and below."""
    h, w = _long_side_to(pixels.shape[:2], side)
    if pixels.shape[:2] != (h, w):
        pixels = np.asarray(PILImage.fromarray(pixels).resize((w, h), PILImage.Resampling.BILINEAR))
    x = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255
    mean, std = (torch.from_numpy(v).view(3, 1, 1) / 255 for v in (PIXEL_MEAN, PIXEL_STD))
    return F.pad((x - mean) / std, (0, side - w, 0, side - h))[None]


def set_image(network: Any, pixels: Array) -> Any:
    """Features of one picture, uint8 RGB (h, w, 3); of a depth-aware network those of its RGB part."""
    with plain():
        return network.encode(preprocess(pixels, network.side).to(next(network.parameters()).device))


def predict(
    network: Any, features: Any, size: tuple[int, int], points: Array, labels: Array, multimask: bool = True
) -> tuple[Array, Array]:
    """Masks bool (M, h, w) and predicted IoU (M,) of a prompt: points (K, 2) in pixels of the picture of `size` (h, w), labels (K,).

    M is 3, or 1 without `multimask`. A box is two points labelled CORNER_MIN and CORNER_MAX.
    """
    (h, w), (ph, pw) = size, _long_side_to(size, PROMPT_SIDE)
    device = features[0].device
    xy = torch.from_numpy(np.asarray(points, np.float32) * np.array([pw / w, ph / h], np.float32))[None].to(device)
    owner = torch.zeros(1, dtype=torch.long, device=device)
    with plain():
        low, iou = network.decode(features, owner, xy, torch.from_numpy(labels)[None].to(device), None, multimask)
    return enlarge(low, size).cpu().numpy()[0], iou.cpu().numpy()[0]


def enlarge(low: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Low-resolution logits (P, M, s, s) -> bool (P, M, h, w): to the prompt frame, without its padding, to the picture's `size`."""
    h, w = _long_side_to(size, PROMPT_SIDE)
    large = F.interpolate(low, (PROMPT_SIDE, PROMPT_SIDE), mode="bilinear", align_corners=False)
    return F.interpolate(large[..., :h, :w], size, mode="bilinear", align_corners=False) > 0


def segment(network: Any, jpeg: bytes, boxes: Array) -> list[dict]:
    """From the bytes of a picture and boxes (N, 4), xyxy, to the RLE of the best mask for each box."""
    pixels = np.asarray(PILImage.open(BytesIO(jpeg)).convert("RGB"))
    features, out = set_image(network, pixels), []
    multimask = network.single_mask_for == "never"
    for box in boxes:
        found, iou = predict(network, features, pixels.shape[:2], box.reshape(2, 2), np.array([CORNER_MIN, CORNER_MAX]), multimask)
        out.append(masks.encode(found[iou.argmax()]))
    return out


def ellipses(boxes: Array | torch.Tensor, side: int) -> torch.Tensor:
    """Logits (P, 1, side, side) of the ellipses inside boxes (P, 4) in the prompt frame: 0 on the edge, 0.4 in the middle.

    Random weights answer with speckles all over the picture, which no step after the network is made for: with these added to its
    logits (which deviate by about 0.07) a network's masks are about as large as things are, and as ragged as its numbers make them.
    """
    boxes = torch.as_tensor(boxes, dtype=torch.float32)
    at = (torch.arange(side, device=boxes.device) + 0.5) * PROMPT_SIDE / side
    low, high = (boxes[:, part, None] for part in (slice(0, 2), slice(2, 4)))
    squares = ((2 * at - low - high) / (high - low).clamp(min=1)) ** 2  # (P, 2, side): along x, along y
    return (0.4 * (1 - squares[:, 0, None] - squares[:, 1, :, None]).clamp(min=-1))[:, None]


def in_things(network: Any) -> Any:
    """The network with `ellipses` added to all it answers to boxes."""
    decode = network.decode

    def shaped(features: Any, owner: torch.Tensor, points: torch.Tensor, *rest: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        low, iou = decode(features, owner, points, *rest, **named)
        return low + ellipses(points[:, :2].flatten(1), low.shape[-1]).to(low), iou

    network.decode = shaped
    return network
