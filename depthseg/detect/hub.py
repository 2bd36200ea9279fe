"""Detectors that transformers runs from a folder in Hugging Face's format: D-FINE and RT-DETRv2 (Apache-2.0)."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image as PILImage

from depthseg import catalog
from depthseg.detect import classes as tables
from depthseg.plan import CONFIDENCE, MAX_BOXES
from depthseg.pretrained import load, of_tensors
from depthseg.schema import Boxes, Image


class HubDetector:
    """D-FINE or RT-DETRv2: the whole picture stretched to a square, 300 queries, no suppression.

    Labels are COCO's category ids if the model has COCO's classes, else the model's own class index.
    """

    def __init__(
        self,
        folder: str | Path,
        device: Any = "cpu",
        precision: str = "fp32",
        confidence: float = CONFIDENCE,
        max_boxes: int = MAX_BOXES,
        classes: Sequence[str] = (),
        backend: str = "torch",
    ):
        network = load("AutoModelForObjectDetection", Path(folder), ("d_fine", "rt_detr_v2", "rt_detr"), "detector")
        import torch
        from transformers import RTDetrImageProcessorPil

        from depthseg import backends

        self.device = torch.device(device)
        self.precision = precision
        self.confidence, self.max_boxes = confidence, max_boxes
        catalog.there(Path(folder) / "preprocessor_config.json", Path(folder).name, "detector")
        self._processor = RTDetrImageProcessorPil.from_pretrained(folder, local_files_only=True)
        self._network = of_tensors(network.to(self.device), "logits", "pred_boxes")
        if backend != "torch":  # which computes as transformers does, to the last digit
            size = self._processor.size["height"], self._processor.size["width"]
            self._network = backends.ready(self._network, backend, precision, self.device, size)
        names = network.config.id2label
        self.names = tables.table([names[i] for i in sorted(names)])
        self._ids = np.array(list(self.names))
        self._only = tables.choose(classes, self.names, "this detector")

    def __call__(self, images: list[Image]) -> list[Boxes]:
        from depthseg.numerics import inference

        if not images:
            return []
        pictures = [PILImage.fromarray(np.asarray(image.pixels)) for image in images]
        x = self._processor(images=pictures, return_tensors="pt")["pixel_values"].to(self.device)
        with inference(self.device, self.precision):
            logits, boxes = self._network(x)
        answers = SimpleNamespace(logits=logits.float(), pred_boxes=boxes.float())
        found = self._processor.post_process_object_detection(answers, threshold=0.0, target_sizes=[image.size for image in images])
        return [self._boxes(f, image) for f, image in zip(found, images)]

    def _boxes(self, found: dict, image: Image) -> Boxes:
        xyxy, score, index = (found[k].cpu().numpy() for k in ("boxes", "scores", "labels"))
        label = self._ids[index]
        if self._only is not None:
            keep = np.isin(label, self._only)
            xyxy, score, label = xyxy[keep], score[keep], label[keep]
        return Boxes.best(xyxy, score, label, self.names, image.size, self.confidence, self.max_boxes)
