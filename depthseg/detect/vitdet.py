"""ViTDet with the published weights of detectron2: what its data loader and its `inference` do around the network."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from depthseg import catalog
from depthseg.detect import classes as tables
from depthseg.plan import CONFIDENCE, MAX_BOXES
from depthseg.schema import Array, Boxes, Image


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
        *,
        variant: Any = "b",
        data: str = "coco",
        cascade: bool = True,
        **size: int,  # of the input, in tests
    ):
        path = catalog.there(path, "ViTDet", "detector")
        known = tables.lvis() if data == "lvis" else tables.COCO
        self._ids, self._names = np.array(list(known)), known
        chosen = tables.choose(classes, known, "ViTDet")
        self._only = None if chosen is None else [list(known).index(i) for i in chosen]
        import torch

        from depthseg.models.vitdet import ViTDet as Network

        self.device = torch.device(device)
        self.precision = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.confidence, self.max_boxes = confidence, max_boxes
        self._network = Network(variant, len(known), cascade, sigmoid=data == "lvis", **size).load(path).to(self.device)

    def __call__(self, images: list[Image]) -> list[Boxes]:
        import torch

        if not images:
            return []
        sizes = [self._inner(*image.size) for image in images]
        x = torch.from_numpy(np.stack([self._input(image, size) for image, size in zip(images, sizes)])).to(self.device)
        half = self.precision != torch.float32
        least = min(self.confidence, self._network.least)
        with torch.inference_mode(), torch.autocast(self.device.type, self.precision, enabled=half):
            answers = self._network(x, sizes, least=least, most=max(self.max_boxes, self._network.most), only=self._only)
        found = [tuple(t.cpu().numpy() for t in answer) for answer in answers]
        return [self._boxes(*arrays, image, size) for arrays, image, size in zip(found, images, sizes)]  # type: ignore[call-arg]

    def _inner(self, h: int, w: int) -> tuple[int, int]:
        """Height and width in the network's square: the longer side fills it, halves round up."""
        scale = self._network.side / max(h, w)
        return max(1, int(h * scale + 0.5)), max(1, int(w * scale + 0.5))

    def _input(self, image: Image, size: tuple[int, int]) -> Array:
        from depthseg.models.vitdet import MEAN, STD

        h, w = size
        pixels = PILImage.fromarray(np.asarray(image.pixels)).resize((w, h), PILImage.Resampling.BILINEAR)
        x = np.zeros((3, self._network.side, self._network.side), np.float32)
        x[:, :h, :w] = ((np.asarray(pixels, np.float32) - np.array(MEAN, np.float32)) / np.array(STD, np.float32)).transpose(2, 0, 1)
        return x

    def _boxes(self, xyxy: Array, score: Array, index: Array, image: Image, inner: tuple[int, int]) -> Boxes:
        label = self._ids[index]
        (h, w), (ih, iw) = image.size, inner
        scaled = xyxy * np.array([w / iw, h / ih] * 2)
        return Boxes.best(scaled, score, label, self._names, image.size, self.confidence, self.max_boxes)
