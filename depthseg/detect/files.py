"""Boxes from COCO detection results and clicks from a JSON list; both find their images by name or number."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from depthseg.data import Failure, beside, read_ahead
from depthseg.errors import NOTHING_TO_DO, DepthsegError
from depthseg.formats import atomic
from depthseg.schema import ABSENT, NEGATIVE, POSITIVE, Array, Boxes, Image, Prompts

_MOST = 1e38  # the sum of two such numbers is still one in float32; NaN is not below it
_POINTS = 1000  # of one prompt: the others of the image are filled up to as many


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise DepthsegError(f"no such file: {path}", "Check the path.")
    try:
        return json.loads(path.read_bytes())
    except OSError as e:
        raise DepthsegError(f"cannot read {path} ({e.strerror})") from e
    except (ValueError, RecursionError) as e:  # ValueError: bad JSON or bad UTF-8
        raise DepthsegError(f"{path} is not JSON ({e})", "The file may be cut off, or be of another format.") from e


class _Entries:
    """The entries of a file by image: an image finds its own by key, by the end of its path, or by the number in its name."""

    def __init__(self, path: Path, entries: Any, images: Any = None):
        """`entries` and `images` are unchecked JSON; `images` is COCO's list that gives the file name of every image_id."""
        self.path = path
        if not isinstance(entries, list):
            raise DepthsegError(f"{path}: a list of entries is expected", "See `depthseg segment --help` for the formats.")
        file_names: dict[Any, str] | None = None
        if images is not None:
            try:
                file_names = {image["id"]: str(image["file_name"]) for image in images}
            except (TypeError, KeyError) as e:
                raise DepthsegError(f"{path}: each of its images needs an id and a file_name", "Give a COCO images file.") from e
        self.rows: dict[str | int, list[int]] = {}  # file name or image_id -> positions in the file
        for at, entry in enumerate(entries):
            if not isinstance(entry, dict):
                raise self.error(at, "", f"an object is expected, not {_short(entry)}")
            name, number = entry.get("file_name"), entry.get("image_id")
            if name is None and isinstance(number, str | int) and file_names is not None:
                name = file_names.get(number, f"image_id {number}")  # unknown there: reported as unmatched
            if isinstance(name, str):
                self.rows.setdefault(name, []).append(at)
            elif name is not None:
                raise self.error(at, "file_name", f"a text is expected, not {_short(name)}")
            elif isinstance(number, int) and not isinstance(number, bool):
                self.rows.setdefault(number, []).append(at)
            else:
                raise self.error(at, "image_id", f"a whole number is expected where there is no file_name, not {_short(number)}")
        self.ends: dict[str, list[str]] = {}  # last part of a file name -> file names
        for row in self.rows:
            if isinstance(row, str):
                self.ends.setdefault(_last(row), []).append(row)
        self.owner: dict[str | int, str] = {}  # which image took which row

    def error(self, at: int, field: str, what: str) -> DepthsegError:
        where = f"entry {at}" + (f", field {field}" if field else "")
        return DepthsegError(f"{self.path}: {where}: {what}", "Entries count from 0.")

    def row(self, key: str) -> str | int | None:
        """Under which file name or image_id the image called `key` stands in the file, or None."""
        if key in self.rows:
            return key
        alike = [n for n in self.ends.get(_last(key), []) if f"/{n}".endswith(f"/{key}") or f"/{key}".endswith(f"/{n}")]
        if len(alike) == 1:
            return alike[0]
        stem = _last(key).rpartition(".")[0]
        return int(stem) if stem.isascii() and stem.isdecimal() and int(stem) in self.rows else None

    def of(self, key: str) -> list[int]:
        """Positions of the entries of this image. Two images with the same entries are an error: one of them is not meant."""
        if (row := self.row(key)) is None:
            return []
        if (other := self.owner.setdefault(row, key)) != key:
            if other == row:  # the path as it is belongs to that image alone
                return []
            raise DepthsegError(
                f"{self.path}: '{row}' fits two images, {other} and {key}",
                "Write the path of the image below the input folder as file_name.",
            )
        return self.rows[row]

    def expect(self, keys: Iterable[str]) -> list[str]:
        """Settle whose the entries are, among all images of a run: the names (or image_ids) of those that are nobody's.

        One text for each such entry. Raises DepthsegError for entries that fit two images, and with code NOTHING_TO_DO if no
        entry fits any.
        """
        keys = list(keys)
        self.owner.clear()
        for key in sorted(keys, key=lambda key: key not in self.rows):  # exact names first
            self.of(key)
        left = [(at, str(row)) for row, positions in self.rows.items() if row not in self.owner for at in positions]
        if keys and left and not self.owner:
            raise DepthsegError(
                f"{self.path}: no entry names an image of this run; the first is about {left[0][1]}",
                f"A file_name is the path below the input folder, like {keys[0]}; --images-json gives the names to image_ids.",
                NOTHING_TO_DO,
            )
        return [name for _, name in sorted(left)]


def _last(path: str) -> str:
    return path.rpartition("/")[2]


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _numbers(entries: _Entries, at: int, field: str, value: object, count: int) -> list[float]:
    """`count` finite numbers, or an error that names the entry and the field."""
    if isinstance(value, list) and len(value) == count and all(type(v) in (int, float) and -_MOST < v < _MOST for v in value):
        return value
    raise entries.error(at, field, f"{count} finite number{'s are' if count > 1 else ' is'} expected, not {_short(value)}")


def _xyxy(entries: _Entries, at: int, field: str, value: object) -> list[float]:
    x, y, w, h = _numbers(entries, at, field, value, 4)
    if w < 0 or h < 0:
        raise entries.error(at, field, f"width and height may not be negative: {_short(value)}")
    return [x, y, x + w, y + h]


def _whole(entries: _Entries, at: int, field: str, value: object) -> int:
    if type(value) is not int or abs(value) >= 2**63:
        raise entries.error(at, field, f"a whole number is expected, not {_short(value)}")
    return value


class BoxesFile:
    """Boxes from COCO detection results, or the ground truth of a COCO file (crowd regions left out: they are no object).

    An entry has bbox [x, y, w, h] in pixels and file_name or image_id; a missing score is 1, and so is a missing category_id.
    A category_name is shown where no table of categories says another.
    All boxes are used, unless `confidence` or `max_boxes` says otherwise.
    images_json: a COCO file whose images say which image an image_id is, or images: that list itself; without them, image_id 139
    is 000000000139.jpg.
    The whole file is checked here; DepthsegError names the file, the entry and the field.
    """

    def __init__(
        self,
        path: str | Path,
        confidence: float | None = None,
        max_boxes: int | None = None,
        images_json: str | Path | None = None,
        images: list[dict] | None = None,
    ):
        content = _read_json(Path(path))
        extra = _read_json(Path(images_json)) if images_json else None
        whole: dict = content if isinstance(content, dict) else {}  # a ground-truth file carries its own tables
        tables: dict = extra if isinstance(extra, dict) else whole
        if extra is not None and "images" not in tables:
            raise DepthsegError(f"{images_json} has no 'images'", "Give a COCO annotation file.")
        listed: Any = whole.get("annotations", content)
        images = tables.get("images") if images is None else images
        self.confidence, self.max_boxes = -math.inf if confidence is None else confidence, max_boxes
        self._entries = entries = _Entries(Path(path), listed, images)
        self.names: dict[int, str] = {}
        for at, e in enumerate(listed):
            if "category_name" in e and type(e.get("category_id")) is int:
                name = self.names.setdefault(e["category_id"], str(e["category_name"]))
                if name != str(e["category_name"]):
                    raise entries.error(at, "category_name", f"{_short(e['category_name'])} has the category_id of {_short(name)}")
        self.names |= _category_names(Path(path), whole.get("categories") or tables.get("categories"))
        self._xyxy = np.zeros((len(listed), 4))
        self._score = np.ones(len(listed), np.float32)
        self._label = np.ones(len(listed), np.int64)
        self.outside: set[int] = set()  # entries without a pixel of their picture, of the pictures asked about so far
        for at, entry in enumerate(listed):
            self._xyxy[at] = _xyxy(entries, at, "bbox", entry.get("bbox"))
            if "score" in entry:
                (self._score[at],) = _numbers(entries, at, "score", [entry["score"]], 1)
            if "category_id" in entry:
                self._label[at] = _whole(entries, at, "category_id", entry["category_id"])
            if entry.get("iscrowd"):
                self._score[at] = np.nan  # under every threshold

    def __call__(self, images: list[Image]) -> list[Boxes]:
        rows = [np.array(self._entries.of(image.key), int) for image in images]
        for image, r in zip(images, rows):
            low, high, (h, w) = self._xyxy[r, :2], self._xyxy[r, 2:], image.size
            self.outside.update(r[((low >= (w, h)) | (high <= 0)).any(1)].tolist())
        return [
            Boxes.best(self._xyxy[r], self._score[r], self._label[r], self.names, image.size, self.confidence, self.max_boxes)
            for image, r in zip(images, rows)
        ]

    def __len__(self) -> int:
        return len(self._label)

    @property
    def labels(self) -> list[int]:
        """The category ids that occur."""
        return np.unique(self._label).tolist()

    def expect(self, keys: Iterable[str]) -> list[str]:
        """Bind the entries to the keys of all images of a run: the name of each entry that is about none of them.

        Raises DepthsegError for entries that fit two images, and with code NOTHING_TO_DO if no entry fits any.
        """
        return self._entries.expect(keys)


def _category_names(path: Path, categories: Any) -> dict[int, str]:
    try:
        return {int(c["id"]): str(c["name"]) for c in categories or ()}
    except (TypeError, KeyError, ValueError, OverflowError) as e:
        raise DepthsegError(f"{path}: each of its categories needs an id and a name", "Give a COCO annotation file.") from e


class PointsFile:
    """Clicks from a JSON list, one prompt an entry, as Prompts in original pixels; an image without entries gets none.

    An entry has file_name or image_id, points [[x, y], ...] with labels [1, 0, ...] (1 = on the object, 0 = off it; by default
    all 1), and/or a box [x, y, w, h]. Rows are filled up with ABSENT. The whole file is checked here.
    """

    def __init__(self, path: str | Path):
        listed = _read_json(Path(path))
        self._entries = entries = _Entries(Path(path), listed)
        self._prompts: list[Prompts] = []  # one row each
        self._label: list[int] = []
        self.outside: set[int] = set()  # entries with a point outside their picture, of the pictures asked about so far
        for at, entry in enumerate(listed):
            points, signs, box = entry.get("points", []), entry.get("labels"), entry.get("box")
            if not isinstance(points, list) or not (points or box is not None):
                raise entries.error(at, "points", f"a list of [x, y] is expected where there is no box, not {_short(points)}")
            if len(points) > _POINTS:
                raise entries.error(at, "points", f"at most {_POINTS} are one prompt, not {len(points)}")
            xy = np.array([_numbers(entries, at, "points", p, 2) for p in points], np.float64).reshape(1, -1, 2)
            signs = [1] * len(points) if signs is None else signs
            if not isinstance(signs, list) or len(signs) != len(points) or not all(type(s) is int and s in (0, 1) for s in signs):
                raise entries.error(at, "labels", f"a 0 or 1 for each of the {len(points)} points is expected, not {_short(signs)}")
            xyxy = None if box is None else np.array([_xyxy(entries, at, "box", box)])
            self._prompts.append(Prompts.of(xyxy, xy if points else None, np.array([signs])))
            self._label.append(_whole(entries, at, "category_id", entry.get("category_id", 1)))

    def __call__(self, images: list[Image]) -> list[Prompts]:
        for image in images:
            h, w = image.size
            for at in self._entries.of(image.key):
                own = self._prompts[at]
                clicks = own.points[np.isin(own.labels, (NEGATIVE, POSITIVE))]
                if ((clicks < 0) | (clicks > (w, h))).any():
                    self.outside.add(at)
        return [self._stack([self._prompts[at] for at in self._entries.of(image.key)]) for image in images]

    @staticmethod
    def _stack(rows: list[Prompts]) -> Prompts:
        """One Prompts of single rows of any length."""
        width = max((r.labels.shape[1] for r in rows), default=1)
        points, labels = np.zeros((len(rows), width, 2), np.float32), np.full((len(rows), width), ABSENT, np.int64)
        for i, row in enumerate(rows):
            k = row.labels.shape[1]
            points[i, :k], labels[i, :k] = row.points[0], row.labels[0]
        return Prompts(points, labels)

    def categories(self, image: Image) -> Array:
        """The category_id (P,) int64 of each prompt of this image, 1 where the file gives none."""
        return np.array([self._label[at] for at in self._entries.of(image.key)], np.int64)

    @property
    def most(self) -> int:
        """Points of the largest prompt; a box counts as two."""
        return max((int((p.labels >= 0).sum()) for p in self._prompts), default=0)

    @property
    def negatives(self) -> bool:
        """Whether some points are negative."""
        return any((p.labels == NEGATIVE).any() for p in self._prompts)

    def __len__(self) -> int:
        return len(self._label)

    def expect(self, keys: Iterable[str]) -> list[str]:
        """Bind the entries to the keys of all images of a run: the name of each entry that is about none of them.

        Raises DepthsegError for entries that fit two images, and with code NOTHING_TO_DO if no entry fits any.
        """
        return self._entries.expect(keys)


def write_boxes(
    images: Sequence[Image],
    detector: Callable[[list[Image]], Sequence[Boxes]],
    path: Path,
    batch: int,
    progress: Callable[[int, int], None],
) -> tuple[int, list[Failure]]:
    """Write what a detector finds as COCO detection results, which BoxesFile reads; the file appears when all is done.

    Returns the number of boxes, and the images that could not be read. Memory does not grow with the number of images.
    """
    stream = read_ahead(images, beside(), batch)
    failed: list[Failure] = []
    count = done = 0
    with atomic(path) as part, part.open("w", encoding="utf-8") as file:
        file.write("[")
        while held := list(islice(stream, batch)):
            failed += [item for item in held if isinstance(item, Failure)]
            good = [item for item in held if isinstance(item, Image)]
            for image, boxes in zip(good, detector(good)):
                for entry in _entries(image, boxes):
                    file.write(f"{',' if count else ''}\n{json.dumps(entry)}")
                    count += 1
            done += len(held)
            progress(done, len(images))
        file.write("\n]\n")
    return count, failed


def _entries(image: Image, boxes: Boxes) -> Iterable[dict]:
    for (x0, y0, x1, y1), score, label in zip(boxes.xyxy.astype(float), boxes.score.astype(float), boxes.label.tolist()):
        xywh = [round(v, 3) for v in (x0, y0, x1 - x0, y1 - y0)]
        name = {"category_name": boxes.names[label]} if label in boxes.names else {}
        yield {"file_name": image.key, "image_id": image.id, "category_id": label, **name, "bbox": xywh, "score": round(score, 6)}
