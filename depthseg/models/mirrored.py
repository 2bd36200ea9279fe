"""A network that looks twice, at a picture and at its mirror image, and answers with the mean: test-time augmentation."""

from typing import Any

from torch import Tensor, nn

from depthseg.schema import CORNER_MAX, CORNER_MIN, PROMPT_SIDE


class Mirrored(nn.Module):
    """Any network of `encode` and `decode`, at twice its cost. All else (`side`, `alpha`, ...) is that of the network inside.

    The whole input is turned around with its padding, so that the low-resolution logits turn around exactly.
    """

    network: Any

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def __getattr__(self, name: str) -> Any:
        inside: Any = super().__getattr__("network")
        return inside if name == "network" else getattr(inside, name)

    def encode(self, rgb: Tensor, depth: Tensor | None = None) -> Any:
        return self.network.encode(rgb, depth), self.network.encode(rgb.flip(-1), None if depth is None else depth.flip(-1))

    def decode(
        self,
        features: Any,
        owner: Tensor,
        points: Tensor,
        labels: Tensor,
        masks: Tensor | None = None,
        multimask: bool = True,
        best: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Logits (P, M, s, s) and predicted IoU (P, M), candidate by candidate the mean of both. Shapes as in models.depthseg."""
        logits, iou = self.network.decode(features[0], owner, points, labels, masks, multimask)
        earlier = None if masks is None else masks.flip(-1)
        turned, other = self.network.decode(features[1], owner, mirrored(points, labels), labels, earlier, multimask)
        return (logits + turned.flip(-1)) / 2, (iou + other) / 2


def mirrored(points: Tensor, labels: Tensor) -> Tensor:
    """Prompt points (P, K, 2) in the 1024 frame turned around left to right; labels (P, K). A box's corners change their x."""
    out = points.clone()
    out[..., 0] = PROMPT_SIDE - points[..., 0]
    x, low, high = out[..., 0], labels == CORNER_MIN, labels == CORNER_MAX  # one of each in a row, or none
    x[low], x[high] = x[high], x[low]
    return out
