"""Ground truth: the annotations of COCO and LVIS files by image, and where the images lie. Reads no pixels.

A set of one's own in COCO's format works alike. An LVIS file is known by the `frequency` of its categories.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from depthseg import masks
from depthseg.data import EXTENSIONS
from depthseg.errors import NOTHING_TO_DO, DepthsegError
from depthseg.schema import Array, Image

_FAR = 1e9  # pixels: no bbox reaches as far


@dataclass(frozen=True)
class Truth:
    """The annotations of one image."""

    image: Image
    id: Array  # (N,) int64, of the annotation
    rle: list[dict]  # N, compressed, original pixels
    box: Array  # (N, 4) float32 xyxy, the bbox field
    area: Array  # (N,) float64, the area field
    crowd: Array  # (N,) bool
    label: Array  # (N,) int64 category id
    negative: list[int] = field(default_factory=list)  # LVIS: categories known to be absent
    not_exhaustive: list[int] = field(default_factory=list)  # LVIS: categories of which some objects are not annotated

    def __len__(self) -> int:
        return len(self.rle)

    def keep(self, index: Array) -> "Truth":
        arrays = {name: getattr(self, name)[index] for name in ("id", "box", "area", "crowd", "label")}
        return replace(self, rle=[self.rle[i] for i in np.arange(len(self))[index]], **arrays)


@dataclass(frozen=True)
class Dataset:
    """The images that are evaluated, with their annotations."""

    kind: str  # coco or lvis
    file: Path
    folder: Path  # of the images
    sha256: str
    truths: list[Truth]
    names: dict[int, str]  # category id -> name
    frequency: dict[int, str]  # LVIS: category id -> r, c or f
    left_out: int  # images of the file that were not chosen
    warnings: list[str]

    def only(self, ids: Collection[int]) -> "Dataset":
        """The part with these image ids."""
        return replace(self, truths=[t for t in self.truths if t.image.id in ids])

    def about(self) -> dict:
        """The facts as JSON values."""
        return {
            "kind": self.kind,
            "annotations": str(self.file),
            "images_folder": str(self.folder),
            "sha256": self.sha256,
            "images": len(self.truths),
            "masks": sum(map(len, self.truths)),
            "crowds": int(sum(t.crowd.sum() for t in self.truths)),
            "categories": len(self.names),
        }


def read(
    images: Path, annotations: Path, kind: str | None = None, subset: int | None = None, seed: int = 0, only: Collection[str] = ()
) -> Dataset:
    """The annotations of a COCO or LVIS file.

    An image is looked for below `images` by its file_name, by the last two parts of its coco_url (train2017/... or val2017/...), by
    the last part of either, and by its id in twelve digits. kind: coco or lvis where the file must be that. subset: so many images,
    drawn with `seed`. only: images by key (path below `images`) or file_name. Raises DepthsegError for a file that is none, names or
    ids that occur twice, and if not one image is there; single missing images are left for the reader to report.
    """
    try:
        content = Path(annotations).read_bytes()
        table = json.loads(content)
        listed, annotated = _rows(table, "images"), _rows(table, "annotations")
        names = {int(c["id"]): str(c["name"]) for c in table.get("categories") or ()}
        frequency = {int(c["id"]): str(c["frequency"]) for c in table.get("categories") or () if "frequency" in c}
    except OSError as error:
        raise DepthsegError(f"cannot read {annotations} ({error.strerror})", "Check --annotations.") from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise _foreign(annotations, error) from error
    found = "lvis" if frequency else "coco"
    if kind and kind != found:
        raise DepthsegError(f"{annotations} is a {found.upper()} file, not a {kind.upper()} one", f"Say --dataset {found}, or nothing.")
    _once(annotations, "image", [row.get("id") for row in listed])
    _once(annotations, "annotation", [row.get("id", at) for at, row in enumerate(annotated, 1)])
    by_image: dict[int, list[tuple[int, dict]]] = {row["id"]: [] for row in listed}
    strangers = 0
    for at, row in enumerate(annotated, 1):
        own = row.get("image_id")
        if type(own) is int and own in by_image:
            by_image[own].append((row.get("id", at), row))
        else:
            strangers += 1
    chosen = sorted(_choose(Path(images), annotations, listed, subset, seed, only), key=lambda pair: pair[0]["id"])
    truths = [_truth(annotations, row, path, Path(images), by_image[row["id"]], names) for row, path in chosen]
    outside = sum(int((_beyond(t) > 1).sum()) for t in truths)
    empty = sum(int((masks.area(t.rle) == 0).sum()) for t in truths)
    tiny = sum(int((t.area < 1).sum()) for t in truths)
    elsewhere = [t.image.key for t in truths for astray in _astray(t) if astray]
    warnings = [
        *([f"{strangers} annotations are about images that the file does not list"] if strangers else []),
        *([f"{outside} boxes reach more than a pixel out of their image"] if outside else []),
        *([f"{empty} masks have no pixel: nothing can be right there"] if empty else []),
        *([f"{tiny} annotations have an area of less than one pixel and are not asked for"] if tiny else []),
        *([f"{len(elsewhere)} bbox fields lie elsewhere than their masks, as in {elsewhere[0]}"] if elsewhere else []),
    ]
    sha = hashlib.sha256(content).hexdigest()
    return Dataset(found, Path(annotations), Path(images), sha, truths, names, frequency, len(listed) - len(truths), warnings)


def _rows(table: dict, name: str) -> list[dict]:
    rows = table[name]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise TypeError(f"{name} is no list of objects")
    return rows


def _foreign(annotations: Path, error: Exception, where: str = "") -> DepthsegError:
    reason = f"{where}{type(error).__name__}: {error}"
    return DepthsegError(f"{annotations} is not a COCO instances file ({reason})", "It needs images and annotations with masks.")


def _once(annotations: Path, what: str, ids: list) -> None:
    if wrong := [i for i in ids if type(i) is not int]:
        raise _foreign(annotations, TypeError(f"the {what} id {str(wrong[0])[:40]!r} is no whole number"))
    (worst, times), *_ = Counter(ids).most_common(1) or [(None, 0)]
    if times > 1:
        raise DepthsegError(f"{annotations}: the {what} id {worst} occurs {times} times", "Each id may occur once.")


def _choose(
    folder: Path, annotations: Path, listed: list[dict], subset: int | None, seed: int, only: Collection[str]
) -> Iterator[tuple[dict, Path]]:
    """The rows of the images to take, with their paths."""
    if not listed:
        raise DepthsegError(f"{annotations} lists no images", "Give the annotations of a data set.", NOTHING_TO_DO)
    if subset is not None and subset < len(listed):
        drawn = np.random.default_rng(seed).choice(len(listed), subset, replace=False)
        listed = [listed[i] for i in sorted(drawn)]
    located = [(row, _locate(folder, row)) for row in listed]
    if only:
        names = {id(row): {str(row.get("file_name")), _key(path, folder)} for row, path in located}
        if strange := set(only) - set().union(*names.values()):
            what = f"no image of {annotations} is called {' or '.join(sorted(strange))}"
            raise DepthsegError(what, "Keys are paths below --images.", NOTHING_TO_DO)
        located = [(row, path) for row, path in located if names[id(row)] & set(only)]
    paths = Counter(path for _, path in located)
    if paths and paths.most_common(1)[0][1] > 1:
        twice = paths.most_common(1)[0][0]
        raise DepthsegError(
            f"{annotations}: two images are found in one file, {twice}", "Keep the folders of their file_name below --images."
        )
    if not any(os.path.isfile(path) for _, path in located):
        raise DepthsegError(f"the image {located[0][1].name} is not in {folder}", "Give the folder that the annotations are about.")
    yield from located


def _locate(folder: Path, row: dict) -> Path:
    """The path of an image; where it should be if it is nowhere."""
    name, parts = str(row.get("file_name") or ""), str(row.get("coco_url") or "").split("/")
    numbered = [f"{row['id']:012d}{extension}" for extension in EXTENSIONS] if isinstance(row.get("id"), int) else []
    candidates = [name, "/".join(parts[-2:]), parts[-1], Path(name).name, *numbered]
    paths = [folder / candidate for candidate in candidates if candidate]  # any text: Path.is_file raises for names that are too long
    return next((path for path in paths if os.path.isfile(path)), paths[0] if paths else folder / str(row.get("id")))


def _key(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()


def _truth(annotations: Path, row: dict, path: Path, folder: Path, found: list[tuple[int, dict]], names: dict[int, str]) -> Truth:
    where = f"image {row.get('id')}: "
    try:
        size = int(row["height"]), int(row["width"])
        rles, labels, xywh, area, crowd = [], [], [], [], []
        for number, annotation in found:
            where = f"annotation {number}: "
            rles.append(masks.of_coco(annotation["segmentation"], size))
            labels.append(_label(annotation, names))
            xywh.append(_box(annotation["bbox"]))
            crowd.append(_flag(annotation.get("iscrowd", 0)))
            area.append(_area(annotation.get("area"), rles[-1]))
        lists = {k: list(map(int, row.get(f"{k}_category_ids") or ())) for k in ("neg", "not_exhaustive")}
        image = Image(_key(path, folder), row["id"], path, size)
        _, ids, label = (np.array(numbers, np.int64) for numbers in ([row["id"]], [number for number, _ in found], labels))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise _foreign(annotations, error, where) from error
    corner_and_size = np.array(xywh, np.float32).reshape(-1, 4)
    box = np.concatenate([corner_and_size[:, :2], corner_and_size[:, :2] + corner_and_size[:, 2:]], 1)
    return Truth(image, ids, rles, box, np.array(area, float), np.array(crowd, bool), label, lists["neg"], lists["not_exhaustive"])


def _label(annotation: dict, names: dict[int, str]) -> int:
    label = annotation["category_id"] if names else annotation.get("category_id", 1)
    if type(label) is not int or (names and label not in names):
        raise ValueError(f"its category {str(label)[:40]} is not in the list of categories")
    return label


def _box(value: list) -> list[float]:
    if len(value) != 4 or not all(type(v) in (int, float) and abs(v) < _FAR for v in value):  # NaN is not under it
        raise ValueError(f"its bbox {str(value)[:60]} is no box")
    return value


def _flag(value: object) -> bool:
    if value not in (0, 1, None):
        raise ValueError(f"its iscrowd is {str(value)[:40]!r}, not 0 or 1")
    return bool(value)


def _area(value: float | None, rle: dict) -> float:
    """The field, or the mask's own pixels where there is none."""
    if value is None:
        return float(masks.area([rle])[0])
    if type(value) not in (int, float) or not 0 <= value < _FAR**2:
        raise ValueError(f"its area is {str(value)[:40]}")
    return float(value)


def _astray(truth: Truth) -> Array:
    """Which bbox fields miss half of their mask's own box, bool (N,): LVIS v0.5 has such, in pictures that were turned."""
    own = masks.boxes(truth.rle)
    sides = np.minimum(own[:, 2:], truth.box[:, 2:]) - np.maximum(own[:, :2], truth.box[:, :2])
    return np.clip(sides, 0, None).prod(1) < 0.5 * (own[:, 2:] - own[:, :2]).prod(1)


def _beyond(truth: Truth) -> Array:
    """How far each box reaches out of its image, in pixels (N,)."""
    h, w = truth.image.size
    return np.maximum(-truth.box[:, :2], truth.box[:, 2:] - (w, h)).max(1, initial=0)
