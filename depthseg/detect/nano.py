"""Our own class-agnostic network: boxes around whatever looks like an object."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from depthseg import catalog
from depthseg.errors import DepthsegError
from depthseg.plan import CONFIDENCE, MAX_BOXES
from depthseg.schema import Boxes, Frame, Image

NMS = 0.4  # IoU


class NanoBoxes:
    """The network of models/boxes.py: one label, 1; a score is the IoU with an object that the network expects of its box."""

    def __init__(
        self,
        path: str | Path,
        device: Any = "cpu",
        precision: str = "fp32",
        confidence: float = CONFIDENCE,
        max_boxes: int = MAX_BOXES,
        classes: Sequence[str] = (),
        backend: str = "torch",
    ):
        if classes:
            raise DepthsegError("the nano detector knows no classes", "Leave --classes out, or choose another --detector.")
        path = catalog.there(path, "the nano box proposer", "detector")
        import torch

        from depthseg import backends
        from depthseg.models.boxes import BoxNet

        self.device = torch.device(device)
        self.precision = precision
        self.confidence, self.max_boxes = confidence, max_boxes
        self._side = BoxNet.side
        self._network = backends.ready(BoxNet.load(path), backend, precision, self.device)

    def __call__(self, images: list[Image]) -> list[Boxes]:
        import torch

        from depthseg.numerics import inference

        if not images:
            return []
        frames = [Frame(image.size, self._side) for image in images]
        x = torch.from_numpy(np.stack([f.image(np.asarray(image.pixels)) for f, image in zip(frames, images)])).to(self.device)
        with inference(self.device, self.precision):
            scores, boxes = self._network(x)  # (B, N), (B, N, 4)
        return [self._kept(s.float(), b.float(), frame) for s, b, frame in zip(scores, boxes, frames)]

    def _kept(self, score: Any, xyxy: Any, frame: Frame) -> Boxes:
        """Scores (N,) and boxes (N, 4) of the network's square -> the best boxes in original pixels."""
        from torchvision.ops import nms

        (h, w), (ih, iw) = frame.size, frame.inner
        xyxy = (xyxy * xyxy.new_tensor([w / iw, h / ih] * 2)).clamp(min=0).minimum(xyxy.new_tensor([w, h] * 2))
        some = (score >= self.confidence) & (xyxy[:, 2:] > xyxy[:, :2]).all(1)  # those in the padding have become empty
        xyxy, score = xyxy[some], score[some]
        keep = nms(xyxy, score, NMS)[: self.max_boxes]
        xyxy, score = xyxy[keep].cpu().numpy(), score[keep].cpu().numpy()
        return Boxes.best(xyxy, score, np.ones(len(score)), {1: "object"}, frame.size, self.confidence, self.max_boxes)
