"""Class tables of the data sets, and picking classes by name.

An id is the data set's own category id, as its annotation files and result files have it.
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from depthseg.errors import DepthsegError

# COCO's 80 classes in the order of their category ids, which run from 1 to 90 with ten holes (instances_val2017.json).
COCO_NAMES = [
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light", "fire hydrant",
    "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra",
    "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite",
    "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork",
    "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut",
    "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard",
    "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
]  # fmt: skip
COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
COCO = dict(zip(COCO_IDS, COCO_NAMES, strict=True))
_OTHERS = {  # how Pascal VOC, and detectors that follow it, call some of COCO's classes
    "motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "pottedplant": "potted plant",
    "diningtable": "dining table", "tvmonitor": "tv",
}  # fmt: skip


@cache
def lvis() -> dict[int, str]:
    """The 1203 categories of LVIS v1: id -> name as its files write it (words joined by _, notes in brackets)."""
    names = (Path(__file__).parents[1] / "names" / "lvis_v1.txt").read_text("utf-8").split("\n")[:-1]
    return dict(enumerate(names, 1))


def table(names: Sequence[str]) -> dict[int, str]:
    """Ids for a model's own list of names: COCO's if they are COCO's 80 in order, 1..1203 of LVIS for that many, else the index."""
    usual = [_OTHERS.get(name, name) for name in names]
    if usual == COCO_NAMES:
        return dict(COCO)
    return lvis() if len(names) == len(lvis()) else dict(enumerate(names))


def words(name: str) -> str:
    """A class name as one says it: lower case, without _ and a note in brackets at its end, without the marks that end a phrase."""
    plain = re.sub(r"\([^()]*\)$", "", name.lower().strip()).replace("_", " ")
    return " ".join(plain.translate({ord(c): " " for c in ".?/"}).split())


def vocabulary(wanted: Sequence[str]) -> dict[int, str]:
    """What to look for, for a detector that reads: `coco` or `lvis` stand for all their categories, other phrases count from 1."""
    if len(wanted) == 1 and wanted[0].lower() in ("coco", "lvis"):
        return dict(COCO) if wanted[0].lower() == "coco" else lvis()
    once: dict[str, str] = {}
    for name in wanted:
        once.setdefault(name.lower(), name)
    return dict(enumerate(once.values(), 1))


def choose(wanted: Sequence[str], known: Mapping[int, str], who: str) -> list[int] | None:
    """The ids of the classes that are wanted, by name or by id; None if all are. Unknown ones are refused with the nearest names."""
    if not wanted:
        return None
    by_name: dict[str, list[int]] = {}  # LVIS has several kinds of bow and of fish
    for i, name in known.items():
        for form in {name.lower(), words(name)}:
            by_name.setdefault(form, []).append(i)
    out: list[int] = []
    for name in wanted:
        found = by_name.get(name.lower(), [int(name)] if name.isdecimal() and int(name) in known else [])
        if not found:
            near = difflib.get_close_matches(name.lower(), by_name, n=3, cutoff=0.5)
            hint = f"Did you mean {' or '.join(near)}?" if near else f"It knows {', '.join(list(known.values())[:12])}, ..."
            raise DepthsegError(f"{who} knows no class '{name}'", hint)
        out += found
    return out
