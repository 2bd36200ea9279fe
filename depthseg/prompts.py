"""Where prompts come from when nobody gives any: the point grid, and the clicks of a simulated user.

Geometry in original pixels. Knows no network and no files.
"""

import numpy as np
from scipy.ndimage import distance_transform_edt

from depthseg.schema import Array, Crop, Prompts


def grid(size: tuple[int, int], per_side: int) -> Prompts:
    """SAM's grid: per_side x per_side positive points in the middle of equal cells of the image (h, w), row by row."""
    h, w = size
    at = (np.arange(per_side) + 0.5) / per_side
    x, y = np.meshgrid(at * w, at * h)
    return Prompts.of(points=np.stack([x, y], -1).reshape(-1, 1, 2))


def next_click(truth: Array, prediction: Array, clicked: Array) -> tuple[int, int, bool]:
    """The next click (x, y, positive) of a user who wants `truth` and sees `prediction`, both bool (h, w).

    It goes to the pixel deepest inside the error, as in the evaluation of RITM and EfficientViT-SAM: positive only if the deepest
    missing pixel is strictly deeper than the deepest wrong one, the first of equals in row-major order. Without any error it is a
    negative click at (0, 0), as there.

    clicked: (n, 2) int x, y of the clicks so far, which are not clicked again.
    """
    missing, wrong = _deepest(truth & ~prediction, clicked), _deepest(prediction & ~truth, clicked)
    positive = missing[0] > wrong[0]
    _, x, y = missing if positive else wrong
    return x, y, positive


def depths(region: Array) -> tuple[Array, int, int]:
    """Distance of each pixel of a bool region (h, w) to its rim, in the region's own box, and the box's left and top.

    The image's edge is a rim. Nothing outside the box can be nearer than the box's own rim. The region must not be empty.
    """
    rows, columns = np.flatnonzero(region.any(1)), np.flatnonzero(region.any(0))
    top, left = int(rows[0]), int(columns[0])
    window = region[top : rows[-1] + 1, left : columns[-1] + 1]
    return distance_transform_edt(np.pad(window, 1))[1:-1, 1:-1], left, top


def _deepest(region: Array, clicked: Array) -> tuple[float, int, int]:
    """Distance to the rim, x and y of the pixel deepest inside a bool region (h, w); 0, 0, 0 if all of it has been clicked."""
    if not region.any():
        return 0.0, 0, 0
    depth, left, top = depths(region)
    x, y = (np.asarray(clicked, int).reshape(-1, 2) - (left, top)).T
    inside = (x >= 0) & (y >= 0) & (x < depth.shape[1]) & (y < depth.shape[0])
    depth[y[inside], x[inside]] = 0
    y, x = divmod(int(depth.argmax()), depth.shape[1])
    deepest = float(depth[y, x])
    return (deepest, left + x, top + y) if deepest else (0.0, 0, 0)


def centredness(mask: Crop, point: Array) -> float:
    """How near the middle of a mask a point (2,) of its picture lies: its distance to the rim over the largest one, 0 outside of the mask.

    On every so many pixels of a large mask: no more than 128 along a side.
    """
    step = -(-max(mask.pixels.shape) // 128)
    coarse = mask.pixels[step // 2 :: step, step // 2 :: step]
    column, row = np.floor((np.asarray(point) - mask.corner) / step).astype(int)
    if not (0 <= row < coarse.shape[0] and 0 <= column < coarse.shape[1] and coarse[row, column]):
        return 0.0
    depth, left, top = depths(coarse)
    return float(depth[row - top, column - left] / depth.max())


def random_click(truth: Array, earlier: int, generator: np.random.Generator) -> tuple[int, int, bool]:
    """The click after `earlier` others that were drawn by an equal generator: uniform in a bool mask (h, w), none twice; positive.

    EfficientSAM's evaluation. A mask with too few pixels is clicked where it was before, an empty one at (0, 0).
    """
    pixels = np.flatnonzero(truth)
    if not len(pixels):
        return 0, 0, True
    y, x = divmod(int(generator.permutation(pixels)[earlier % len(pixels)]), truth.shape[1])
    return x, y, True
