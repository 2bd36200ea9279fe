"""What a network in training is worth: the papers' tables of boxes and of clicks on a few pictures, and a sheet of its masks."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image as PILImage
from torch import nn

from depthseg import masks, truth
from depthseg.asking import box_answers, click_answers
from depthseg.data import Failure, Unreadable, read
from depthseg.errors import DepthsegError
from depthseg.formats import atomic, overlay
from depthseg.models.depthseg import DepthSeg
from depthseg.plan import Plan
from depthseg.schema import Masks
from depthseg.score import Request
from depthseg.segment import Segmenter
from depthseg.stages import TrainPlan
from depthseg.truth import Dataset

CLICKS = (1, 3, 5)
SHEET = (4, 3)  # pictures across and down
TILE = 480  # pixels


class Validation:
    """A fixed choice of pictures with annotations, by COCO's or LVIS' format. Raises DepthsegError where they cannot serve."""

    def __init__(self, plan: TrainPlan):
        assert plan.validate
        file = Path(plan.validate)
        if not file.is_file():
            raise DepthsegError(f"no such file: {file}", "Check --validate.")
        folder = Path(plan.validate_images) if plan.validate_images else _beside(file)
        self.dataset: Dataset = truth.read(folder, file, subset=plan.validate_count)
        self.plan = Plan(model=plan.model, depth=plan.validate_depth, device=plan.device, precision=plan.precision)

    def score(self, network: nn.Module, sheet: Path) -> dict[str, float]:
        """mIoU in percent after boxes (miou, and by size) and after 1, 3 and 5 clicks; writes the picture `sheet`.

        network: left as it is; a copy of it answers.
        """
        assert isinstance(network, DepthSeg)
        answering = copy.deepcopy(network).eval()
        plan = self.plan if network.alpha is not None else replace(self.plan, depth="auto")
        segmenter = Segmenter(plan, network=answering, source=lambda images: [])
        truths = self.dataset.truths
        out: dict[str, float] = {}
        boxes: dict[str, list[dict]] = {}
        for ask, answers in ((Request("box"), box_answers), (Request("point", clicks=CLICKS), click_answers)):
            segmenter.zoom &= ask.prompt == "box"  # clicks on whole pictures, as in the papers
            found = []
            for asked, answer in answers(self.dataset, truths, segmenter, ask):
                if isinstance(answer, Failure):
                    raise DepthsegError(f"the validation picture {asked.image.key} cannot be used ({answer.reason})", "Leave it out.")
                found += [{"image_id": asked.image.id, **result} for result in answer[0]]
                if ask.prompt == "box":
                    boxes[asked.image.key] = answer[0]
            metrics = ask.scored(self.dataset, found).report["metrics"]
            out |= {k: round(v, 2) for k, v in metrics.items() if k.startswith("miou") and v is not None}
            if ask.prompt == "box":
                out["iou_correlation"] = round(metrics.get("iou_correlation") or 0.0, 3)
        self._sheet(boxes, sheet)
        return out

    def _sheet(self, found: dict[str, list[dict]], path: Path) -> None:
        """The first pictures with the masks that answer the true boxes."""
        across, down = SHEET
        page = PILImage.new("RGB", (across * TILE, down * TILE), "white")
        for at, t in enumerate(self.dataset.truths[: across * down]):
            try:
                pixels = read(t.image).pixels
            except Unreadable:
                continue
            assert pixels is not None
            tile = overlay(pixels, _masks(found.get(t.image.key, [])))
            tile.thumbnail((TILE - 8, TILE - 8), PILImage.Resampling.LANCZOS)
            page.paste(tile, (at % across * TILE, at // across * TILE))
        rows = -(-min(len(self.dataset.truths), across * down) // across)
        with atomic(path) as part:
            page.crop((0, 0, across * TILE, rows * TILE)).save(part, "PNG")


def _masks(results: Sequence[dict]) -> Masks:
    rle = [r["segmentation"] for r in results]
    predicted, stability = (np.array([r[k] for r in results], np.float32) for k in ("predicted_iou", "stability_score"))
    return Masks(rle, masks.boxes(rle), masks.area(rle), predicted, stability, predicted, np.zeros(len(rle), np.int64))


def _beside(file: Path) -> Path:
    """The folder of images that belongs to annotations: `images` beside them or above, else their own."""
    return next((f for f in (file.parent / "images", file.parent.parent / "images") if f.is_dir()), file.parent)
