"""The rules by which masks are asked for and scored, as rows; numbers of different protocols cannot be compared."""

from dataclasses import dataclass

import numpy as np

from depthseg import masks
from depthseg.plan import REFINEMENTS
from depthseg.schema import Array
from depthseg.truth import Truth


@dataclass(frozen=True)
class Protocol:
    """One set of rules."""

    source: str
    crowds: bool = True  # annotations with iscrowd are prompted and counted in mIoU
    shared: bool = True  # an area on a bound of the size bins counts on both sides of it
    tight: bool = False  # box prompts are the boxes of the masks, not the bbox field
    random: bool = False  # clicks are drawn uniformly inside the mask, not placed at the deepest error
    by_box: bool = False  # of the candidates for a detector's box, the one with the highest IoU with it, not the highest predicted IoU

    def asked(self, truth: Truth) -> Truth:
        """The annotations that are prompted and counted in mIoU: those of at least one pixel, without crowds if they are left out."""
        return truth.keep(np.flatnonzero((truth.area >= 1) & (self.crowds | ~truth.crowd)))

    def boxes(self, truth: Truth) -> Array:
        """The box prompts of these annotations, float32 xyxy (N, 4)."""
        return masks.boxes(truth.rle) if self.tight else truth.box


PROTOCOLS = {
    "official": Protocol("the evaluation script of EfficientViT-SAM"),
    "strict": Protocol("textbook rules", crowds=False, shared=False),
    "efficientsam": Protocol("EfficientSAM's paper", tight=True, random=True, by_box=True),
    "amr": Protocol("the paper of adaptive mask refinement", tight=True, random=True),
}


def in_words(name: str, prompt: str, zoom: bool = False, single: bool = False, refine: str = "none") -> list[str]:
    """The rules of a protocol for one kind of prompt (box, point or detector), a sentence each.

    zoom: boxes, and the answers to clicks, on crops of their own. single: the model answers a box, or three and more points, with one mask.
    refine: a key of plan.REFINEMENTS.
    """
    p = PROTOCOLS[name]
    crowd = "Crowd regions are prompted and counted like instances." if p.crowds else "Crowd regions are left out."
    bounds = "32^2 and 96^2 pixels of the area field; an area on a bound counts " + ("on both sides." if p.shared else "above it only.")
    by = "IoU with the box" if p.by_box and prompt == "detector" else "predicted IoU"
    best = f"Of three candidate masks the one with the highest {by} is the answer."
    if single:
        best = "The model answers a box, or three and more points, with one mask; fewer points with the best of three by predicted IoU."
    mean = ["IoU at original resolution, intersection / (union + 1e-7); the mean is over annotations of at least one pixel."]
    lines = {
        "box": [
            f"Prompts are the {'tightest boxes of the true masks' if p.tight else 'bbox fields of the annotations'}.",
            best,
            *mean,
            crowd,
            f"Sizes are split at {bounds}",
        ],
        "point": [
            "Clicks are drawn uniformly inside the true mask, the same ones in every run with the same seed."
            if p.random
            else "The first click goes to the deepest point of the mask, each later one to the deepest point of the error.",
            "All clicks so far are sent each time; no mask is fed back.",
            best,
            *mean,
            crowd,
            f"Sizes are split at {bounds}",
        ],
        "detector": [
            "Boxes are clipped to the image; those without area, and answers without a pixel, are left out.",
            best,
            "Areas of predictions come from their masks.",
        ],
    }[prompt]
    if zoom:
        clicks = "Clicks are asked on the whole picture, then three times on crops around the answers, which vote (zoom)."
        lines.append(clicks if prompt == "point" else "Boxes are looked at on crops of their own, clicks again around the answers (zoom).")
    if refine != "none":
        lines.append(f"Refined ({refine}): {REFINEMENTS[refine]}.")
    return [f"Protocol {name}: {p.source}.", *lines]
