"""ViTDet with the published weights of detectron2: what its data loader and its `inference` do around the network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from depthseg import catalog
from depthseg.detect import classes as tables
from depthseg.plan import CONFIDENCE, MAX_BOXES
from depthseg.schema import Array, Boxes, Frame, Image


class ViTDet:
    """ViTDet B, L or H, trained on COCO or LVIS v1; labels are their category ids.

    variant: b, l or h. data: coco or lvis. cascade: False for the single-stage models. The network itself drops scores under
    0.05 (COCO) or 0.02 (LVIS), unless `confidence` is lower.
    """

    def __init__(
        self,
        path: str | Path,
        device: Any = "cpu",
        precision: str = "fp32",
        confidence: float = CONFIDENCE,
        max_boxes: int = MAX_BOXES,
        classes: Sequence[str] = (),
        backend: str = "torch",
        *,
        variant: Any = "b",
        data: str = "coco",
        cascade: bool = True,
        **size: int,  # of the input, in tests
    ):
        path = catalog.there(path, "ViTDet", "detector")
        known = tables.lvis() if data == "lvis" else tables.COCO
        self._ids, self.names = np.array(list(known)), known
        chosen = tables.choose(classes, known, "ViTDet")
        self._only = None if chosen is None else [list(known).index(i) for i in chosen]
        import torch

        from depthseg import backends
        from depthseg.models.vitdet import ViTDet as Network

        self.device = torch.device(device)
        self.precision = precision
        self.confidence, self.max_boxes = confidence, max_boxes
        self._network = Network(variant, len(known), cascade, sigmoid=data == "lvis", **size).load(path).to(self.device)
        if backend != "torch":  # for the ViT and its maps, which are most of the work; how many boxes follow differs
            side = self._network.side
            self._network.backbone = backends.ready(self._network.backbone, backend, precision, self.device, (side, side))  # type: ignore[assignment]

    def __call__(self, images: list[Image]) -> list[Boxes]:
        import torch

        from depthseg.numerics import inference

        if not images:
            return []
        frames = [Frame(image.size, self._network.side) for image in images]
        x = torch.from_numpy(np.stack([f.image(np.asarray(image.pixels)) for f, image in zip(frames, images)])).to(self.device)
        least = min(self.confidence, self._network.least)
        with inference(self.device, self.precision):
            answers = self._network(
                x, [f.inner for f in frames], least=least, most=max(self.max_boxes, self._network.most), only=self._only
            )
        return [self._boxes([t.cpu().numpy() for t in answer], frame) for answer, frame in zip(answers, frames)]

    def _boxes(self, answer: list[Array], frame: Frame) -> Boxes:
        xyxy, score, index = answer
        (h, w), (ih, iw) = frame.size, frame.inner
        scaled = xyxy * np.array([w / iw, h / ih] * 2)
        return Boxes.best(scaled, score, self._ids[index], self.names, frame.size, self.confidence, self.max_boxes)
