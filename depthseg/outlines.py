"""The outlines of masks as polygons that readers fill to the very same pixels: traced, moved inside, joined. Arrays only."""

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import KDTree

Array = np.ndarray

_INSET = 0.1  # pixels; above what six decimals of a wide picture blur, below what anyone sees


def outlines(mask: Array) -> list[Array]:
    """The outline of each part of a bool mask (h, w), exactly along the edges of its pixels.

    Each is int (K, 4), clockwise: x and y of the corners (two pixels side by side have 0, 0, 2, 0, 2, 1, 0, 1), and the steps right and
    down, each 1 or -1, that lead from the corner into the mask. Pixels that meet in a corner only belong to different parts. A hole is
    not lost: a slit without width leads along a row from the left into it and back, and it is run through against the clock, so that
    it stays open for readers that count crossings and for those that count turns.
    """
    p = np.pad(mask, 1).astype(np.int8)
    a, b, c, d = p[:-1, :-1], p[:-1, 1:], p[1:, :-1], p[1:, 1:]  # the four pixels around each corner of the grid
    touching = (a == d) & (b == c) & (a != b)  # two pixels meet there: a corner of either
    turns = touching | ((a + b + c + d) % 2 == 1)
    y, x = np.repeat(np.argwhere(turns), 1 + touching[turns], axis=0).T
    again = np.append(np.zeros(min(1, len(x)), bool), (y[1:] == y[:-1]) & (x[1:] == x[:-1]))
    double, falling = touching[y, x], a[y, x] == 1
    right = np.where(double, np.where(again, 1, -1), (b + d - a - c)[y, x])  # of two the left one comes first
    down = np.where(double, np.where(falling, right, -right), (c + d - a - b)[y, x])

    # Along each row, and along each column, an edge joins the first corner with the second, the third with the fourth, and so on.
    # The way along an edge has the mask on its right hand.
    columns = np.lexsort((down, y, x))
    after = np.empty(len(x), int)
    for first, second, ahead in ((*np.arange(len(x)).reshape(-1, 2).T, down == 1), (*columns.reshape(-1, 2).T, right == -1)):
        after[np.where(ahead[first], first, second)] = np.where(ahead[first], second, first)
    _, ring = connected_components(coo_array((np.ones(len(x)), (np.arange(len(x)), after)), (len(x), len(x))), directed=False)
    starts = np.sort(np.unique(ring, return_index=True)[1])  # the leftmost of the highest corners of each ring
    corners, way = np.stack([x, y, right, down], 1).tolist(), after.tolist()

    place = (x * len(p) + y)[columns]
    for hole in starts[right[starts] < 0].tolist():
        x0, y0 = corners[hole][:2]
        edge = int(np.flatnonzero(p[y0 + 1, : x0 + 1] == 0)[-1])  # the nearest outline to the left: of the part or of an earlier hole
        lower = columns[np.searchsorted(place, edge * len(p) + y0, "right")]
        n = len(way)
        corners += [[edge, y0, 1, 1], [x0, y0, -1, 1], [x0, y0, -1, 1], [edge, y0, 1, 1]]
        way += [n + 1, way[hole], n + 3, way[lower]]
        way[hole], way[lower] = n + 2, n

    parts = []
    for start in starts[right[starts] > 0].tolist():
        part, at = [corners[start]], start
        while (at := way[at]) != start:
            part.append(corners[at])
        parts.append(np.array(part))
    return parts


def exact(outline: Array) -> Array:
    """Its corners, int (K, 2): pycocotools gets the very mask from them. Corners that a slit says twice in a row are said once."""
    xy = outline[:, :2]
    return xy[(xy != np.roll(xy, 1, axis=0)).any(1)]


def inset(outline: Array) -> Array:
    """Its corners a tenth of a pixel inside, float (K, 2).

    LabelMe (by Pillow) and ultralytics (by OpenCV) round corners down and fill the pixels on the outline as well: exact corners would
    add a row and a column, these give the very mask.
    """
    return outline[..., :2] + _INSET * outline[..., 2:]


def joined(parts: list[Array]) -> tuple[Array, Array]:
    """The outlines as one, (K, 4): each part hangs on an earlier one by a line, there and back, between their nearest corners.

    And those lines (len(parts) - 1, 2, 4).
    """
    path, lines = parts[0], []
    for part in parts[1:]:
        distance, nearest = KDTree(path[:, :2]).query(part[:, :2])
        here = int(np.argmin(distance))
        there = int(nearest[here])
        lines.append((path[there], part[here]))
        path = np.concatenate([path[: there + 1], part[here:], part[: here + 1], path[there:]])
    return path, np.array(lines, int).reshape(-1, 2, 4)
