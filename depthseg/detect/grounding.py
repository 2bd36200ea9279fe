"""Grounding DINO and MM-Grounding-DINO through transformers (Apache-2.0): boxes for whatever words name.

Phrases are classes by construction: the prompt is put together from the tokens of each phrase, so it is known which tokens are
whose. A class scores the mean probability of its tokens, and a box may answer for several classes, as in the official evaluation.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from depthseg import catalog
from depthseg.data import alike
from depthseg.detect import classes as tables
from depthseg.errors import MISSING_PIECE, DepthsegError
from depthseg.plan import CONFIDENCE, MAX_BOXES
from depthseg.pretrained import load
from depthseg.schema import Array, Boxes, Image

SHORT, LONG = 800, 1333  # pixels: the shorter side, unless the longer one would exceed its limit
MEAN, STD = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)  # ImageNet, RGB in 0..1
TOKENS = 256  # of one prompt, with [CLS] and [SEP]
MOST = 300  # boxes of one image, as evaluated officially

Prompt = tuple[list[int], list[tuple[int, slice]]]  # token ids; category id and tokens of each phrase


class GroundingDino:
    """classes: phrases, or ("coco",) or ("lvis",) for all their categories; more than one prompt holds are asked in several."""

    def __init__(
        self,
        folder: str | Path,
        device: Any = "cpu",
        precision: str = "fp32",
        confidence: float = CONFIDENCE,
        max_boxes: int = MAX_BOXES,
        classes: Sequence[str] = (),
    ):
        if not classes:
            raise catalog.wordless()
        network, self._tokenizer = self._open(Path(folder))
        import torch

        self.device = torch.device(device)
        self.precision = precision
        self.confidence, self.max_boxes = confidence, min(max_boxes, MOST)
        self._network = network.to(self.device)
        self.names = tables.vocabulary(classes)
        self._prompts = list(self._packed())

    def _open(self, folder: Path) -> tuple[Any, Any]:
        """The network, called like those of transformers, and the tokenizer."""
        network = load("AutoModelForZeroShotObjectDetection", folder, ("grounding-dino", "mm-grounding-dino"), "detector")
        from transformers import AutoTokenizer

        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
            raise DepthsegError(f"{folder} has no tokenizer", "It needs tokenizer.json, or vocab.txt, beside the weights.", MISSING_PIECE)
        return network, AutoTokenizer.from_pretrained(folder, local_files_only=True)

    def _packed(self) -> Iterator[Prompt]:
        """Prompts that together hold every phrase: [CLS] phrase . phrase . [SEP], as many as fit."""
        t = self._tokenizer
        start, stop, end = t.cls_token_id, t.convert_tokens_to_ids("."), t.sep_token_id
        if stop == t.unk_token_id:  # transformers makes one of five tokens where it finds no vocabulary
            raise DepthsegError("the tokenizer knows no words", "Its vocabulary is missing: fetch it again.", MISSING_PIECE)
        ids: list[int] = [start]
        spans: list[tuple[int, slice]] = []
        for category, name in self.names.items():
            own = t(tables.words(name), add_special_tokens=False)["input_ids"]
            if not own or len(own) > TOKENS - 3:
                raise DepthsegError(f"'{name[:60]}' is no phrase that fits a prompt of {TOKENS} tokens", "Shorten it.")
            if len(ids) + len(own) + 2 > TOKENS:
                yield [*ids, end], spans
                ids, spans = [start], []
            spans.append((category, slice(len(ids), len(ids) + len(own))))
            ids += [*own, stop]
        yield [*ids, end], spans

    def __call__(self, images: list[Image]) -> list[Boxes]:
        return alike(images, lambda image: _size(*image.size), self._detect)  # padding would change the answers

    def _detect(self, images: list[Image], size: tuple[int, int]) -> list[Boxes]:
        import torch

        from depthseg.numerics import inference

        x = torch.from_numpy(np.stack([_input(image, size) for image in images])).to(self.device)
        xyxy, score, label = [], [], []
        for ids, spans in self._prompts:
            tokens = torch.tensor([ids], device=self.device).expand(len(images), -1)
            with inference(self.device, self.precision):
                answer = self._network(pixel_values=x, input_ids=tokens, attention_mask=torch.ones_like(tokens))
            p = answer.logits.float().sigmoid()  # (B, queries, TOKENS)
            s = torch.stack([p[..., where].mean(-1) for _, where in spans], -1).flatten(1)  # (B, queries x phrases)
            best, index = s.topk(min(MOST, s.shape[1]), 1)
            query, phrase = index // len(spans), index % len(spans)
            boxes = answer.pred_boxes.float().gather(1, query[..., None].expand(-1, -1, 4))
            xyxy.append(torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1))
            score.append(best)
            label.append(torch.tensor([c for c, _ in spans], device=self.device)[phrase])
        flat = [torch.cat(part, 1).cpu().numpy() for part in (xyxy, score, label)]
        return [self._boxes(image, *(part[i] for part in flat)) for i, image in enumerate(images)]

    def _boxes(self, image: Image, xyxy: Array, score: Array, label: Array) -> Boxes:
        h, w = image.size
        return Boxes.best(xyxy * np.array([w, h, w, h]), score, label, self.names, image.size, self.confidence, self.max_boxes)


def _size(h: int, w: int) -> tuple[int, int]:
    """Height and width of the network's input for an image of h x w: DETR's rule, never under a pixel."""
    short, long = min(h, w), max(h, w)
    exact = SHORT if long / short * SHORT <= LONG else LONG * short / long
    side = max(1, round(exact))
    other = max(1, int(exact * long / short))
    return (side, other) if h <= w else (other, side)


def _input(image: Image, size: tuple[int, int]) -> Array:
    pixels = PILImage.fromarray(np.asarray(image.pixels)).resize(size[::-1], PILImage.Resampling.BILINEAR)
    return ((np.asarray(pixels, np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1)
