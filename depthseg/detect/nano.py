"""Our own class-agnostic network: boxes around whatever looks like an object."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from depthseg import catalog
from depthseg.errors import DepthsegError
from depthseg.plan import CONFIDENCE, MAX_BOXES
from depthseg.schema import Boxes, Frame, Image

SHARED = 0.5  # of the smaller box


class NanoBoxes:
    """Our own network of models/boxes.py: boxes around whatever looks like an object. One label, 1.

    The network is unsure and likes parts. So a box's score is the geometric mean of what the network says and of the box's size (the
    root of its share of the picture), and a box is dropped when half of it, or of a better box, lies in the other: wholes win.
    """

    def __init__(
        self,
        path: str | Path,
        device: Any = "cpu",
        precision: str = "fp32",
        confidence: float = CONFIDENCE,
        max_boxes: int = MAX_BOXES,
        classes: Sequence[str] = (),
    ):
        if classes:
            raise DepthsegError("the nano detector knows no classes", "Leave --classes out, or choose another --detector.")
        path = catalog.there(path, "the nano box proposer", "detector")
        import torch

        from depthseg.models.boxes import BoxNet

        self.device = torch.device(device)
        self.precision = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.confidence, self.max_boxes = confidence, max_boxes
        self._network = BoxNet.load(path).to(self.device)

    def __call__(self, images: list[Image]) -> list[Boxes]:
        import torch

        if not images:
            return []
        side = self._network.side
        frames = [Frame(image.size, side) for image in images]
        x = torch.from_numpy(np.stack([f.image(np.asarray(image.pixels)) for f, image in zip(frames, images)])).to(self.device)
        half = self.precision != torch.float32
        with torch.inference_mode(), torch.autocast(self.device.type, self.precision, enabled=half):
            scores, boxes = self._network(x)  # (B, N), (B, N, 4)
        return [self._kept(s.float(), b.float(), frame) for s, b, frame in zip(scores, boxes, frames)]

    def _kept(self, score: Any, xyxy: Any, frame: Frame) -> Boxes:
        """Scores (N,) and boxes (N, 4) of the network's square -> the best boxes in original pixels, without their parts."""
        (h, w), (ih, iw) = frame.size, frame.inner
        xyxy = np.clip(xyxy.cpu().numpy() * np.array([w / iw, h / ih] * 2), 0, (w, h, w, h))
        area = (xyxy[:, 2:] - xyxy[:, :2]).clip(0).prod(1)
        score = np.sqrt(score.cpu().numpy() * np.sqrt(area / (h * w)))
        order = np.argsort(-score, kind="stable")
        keep: list[int] = []
        for at in order[score[order] >= self.confidence]:
            low, high = np.maximum(xyxy[at, :2], xyxy[keep, :2]), np.minimum(xyxy[at, 2:], xyxy[keep, 2:])
            shared = (high - low).clip(0).prod(1) / np.minimum(area[at], area[keep]).clip(1e-6)
            if not (shared > SHARED).any():
                keep.append(int(at))
            if len(keep) == self.max_boxes:
                break
        names = {1: "object"}
        return Boxes.best(xyxy[keep], score[keep], np.ones(len(keep)), names, frame.size, self.confidence, self.max_boxes)
