"""Other people's segmenters with the same work to do, as their packages run them: from a picture's bytes and boxes to RLE.

Weights are random, for speed does not depend on them; `ellipses` make their masks as large as ours. Each constructor says what is
missing where its package is not there.
"""

from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage

from depthseg import masks
from depthseg.detect.yolo import contained, package
from depthseg.reference import ellipses
from depthseg.schema import PROMPT_SIDE, Array


class MobileSam:
    """MobileSAM by `predict` of ultralytics: all boxes of a picture in one call."""

    def __init__(self, device: Any = "cpu"):
        package("the peer mobilesam", "leave --peer mobilesam out")
        with contained():
            from ultralytics.models.sam.build import build_mobile_sam
            from ultralytics.models.sam.predict import Predictor

        network = build_mobile_sam(None)
        network.mask_decoder.register_forward_hook(self._shape)
        fixed = {"task": "segment", "mode": "predict", "imgsz": PROMPT_SIDE, "save": False, "verbose": False, "device": str(device)}
        self._predictor = Predictor(overrides={**fixed, "conf": 0.0})
        self._predictor.setup_model(model=network, verbose=False)
        self._boxes = np.zeros((0, 4), np.float32)

    def _shape(self, module: Any, given: Any, answer: Any) -> Any:
        low, iou = answer
        return low + ellipses(self._boxes, low.shape[-1]).to(low), torch.ones_like(iou)  # predict drops masks whose score is under 0

    def __call__(self, jpeg: bytes, boxes: Array) -> list[dict]:
        pixels = np.asarray(PILImage.open(BytesIO(jpeg)).convert("RGB"))
        self._boxes = boxes * (PROMPT_SIDE / max(pixels.shape[:2]))
        found = self._predictor(source=np.ascontiguousarray(pixels[..., ::-1]), bboxes=boxes)[0]  # arrays are taken as BGR
        return [masks.encode(mask) for mask in found.masks.data.cpu().numpy()]


class SamB:
    """SAM ViT-B by transformers: processor, model, post_process_masks; all boxes of a picture in one call."""

    def __init__(self, device: Any = "cpu"):
        from transformers import SamConfig, SamImageProcessor, SamModel, SamProcessor

        self.device = torch.device(device)
        self._network = SamModel(SamConfig()).eval().to(self.device)  # whose defaults are ViT-B
        self._processor = SamProcessor(SamImageProcessor())

    def __call__(self, jpeg: bytes, boxes: Array) -> list[dict]:
        picture = PILImage.open(BytesIO(jpeg)).convert("RGB")
        given = self._processor(images=picture, input_boxes=[boxes.tolist()], return_tensors="pt")
        sizes = given["original_sizes"], given["reshaped_input_sizes"]
        with torch.inference_mode():
            answer = self._network(pixel_values=given["pixel_values"].to(self.device), input_boxes=given["input_boxes"].to(self.device))
        low = answer.pred_masks.float().cpu()  # (1, P, 3, 256, 256)
        low = low + ellipses(given["input_boxes"][0].numpy(), low.shape[-1])
        found = self._processor.image_processor.post_process_masks(low, *sizes)[0].numpy()
        best = answer.iou_scores[0].float().argmax(-1).tolist()
        return [masks.encode(candidates[k]) for candidates, k in zip(found, best)]


PEERS: dict[str, Callable[[Any], Any]] = {"mobilesam": MobileSam, "sam-b": SamB}
