"""Better masks without training: what a first mask says about itself, and the points that a second pass is asked with.

Adaptive mask refinement (AMR; Mohan, Anuraj and Kumar, "EfficientSAM: Leveraged Masked Image Pretraining for Efficient Segment
Anything", section XI): a mask in several pieces or with a ragged outline is asked again with points on its rim, a compact one with
points deep inside it. Arrays only: knows no network, and no image.

The paper says twice, and differently, where a mask in several pieces belongs: the formula of its section A.2 sends it to the rim, the
prose of section B to the middle. `RULES` has both. It leaves open what follows, and this is how it is read here: the points are
positive and join the prompt of the first pass; the image's edge is background; "needed" is what `--refine-below` says. A third rule
is ours: clicks on the rim that say what they are, off the mask.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from depthseg.schema import NEGATIVE, POSITIVE, Array

COMPACT = 0.6  # isoperimetric quotient under which an outline is ragged (section A.2)
DEEP = 0.7  # of the largest distance to the background: the middle of a mask (section C)


class Rule(NamedTuple):
    """What a second pass is asked with."""

    rim: Callable[[int, float], bool]  # of a mask's pieces and compactness: whether the points go to its rim, not to its middle
    sign: int = POSITIVE


RULES = {
    "amr": Rule(lambda pieces, quotient: pieces > 1 or quotient < COMPACT),
    "amr-prose": Rule(lambda pieces, quotient: pieces == 1 and quotient < COMPACT),
    "rim": Rule(lambda pieces, quotient: True, NEGATIVE),
}


def pieces(mask: Array) -> int:
    """Connected parts of a bool mask (h, w); pixels that touch in a corner only are apart, as in the paper's `ndimage.label`."""
    return ndimage.label(mask)[1]


def compactness(mask: Array) -> float:
    """The isoperimetric quotient 4 pi area / perimeter^2 of a bool mask (h, w): about 1 for a disc, less for a ragged outline; 0 if empty.

    The perimeter is that of the polygons through the middles between neighbouring pixels in and out, from the 16 kinds of 2 x 2 windows
    (Gray, "Local properties of binary images in two dimensions", 1971). Outlines of holes and of all parts count.
    """
    p = np.pad(mask, 1).astype(np.uint8)
    inside = p[:-1, :-1] + p[1:, :-1] + p[:-1, 1:] + p[1:, 1:]
    crossed = np.count_nonzero((inside == 2) & (p[:-1, :-1] == p[1:, 1:]))  # two pixels that meet in a corner
    cut = np.count_nonzero(inside & 1) + 2 * crossed  # corners that are cut off, half a diagonal each
    perimeter = np.count_nonzero(inside == 2) - crossed + np.sqrt(0.5) * cut
    return float(4 * np.pi * np.count_nonzero(mask) / perimeter**2) if perimeter else 0.0


def points(mask: Array, rule: str, count: int) -> Array:
    """Where a second pass clicks, int x, y (count, 2), for a bool mask (h, w) by one of RULES; (0, 2) where there is nowhere to click."""
    if not mask.any():
        return np.zeros((0, 2), int)
    # Nothing outside the mask's box and the rim around it matters.
    (top, bottom), (left, right) = ((max(0, hit[0] - 1), hit[-1] + 2) for hit in (np.flatnonzero(mask.any(axis)) for axis in (1, 0)))
    window = mask[top:bottom, left:right]
    region = rim(window) if RULES[rule].rim(pieces(window), compactness(window)) else middle(window)
    return spread(region, count) + (left, top)


def rim(mask: Array) -> Array:
    """The boundary strategy: the pixels around a bool mask (h, w), its 3 x 3 dilation without itself."""
    return ndimage.binary_dilation(mask, np.ones((3, 3), bool)) & ~mask


def middle(mask: Array) -> Array:
    """The centre strategy: the pixels of a bool mask (h, w) that are at least DEEP times as far from the background as the deepest."""
    depth = ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1]
    return mask & (depth >= DEEP * depth.max())


def spread(region: Array, count: int) -> Array:
    """x, y (count, 2) of pixels of a bool region (h, w), at equal steps of its pixels row by row (the paper's `np.linspace`)."""
    at = np.argwhere(region)[:, ::-1]
    return at[np.linspace(0, len(at) - 1, count).round().astype(int)] if len(at) else at
