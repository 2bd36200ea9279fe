"""Ground truth: the annotations of COCO and LVIS files by image, and where the images lie. Reads no pixels.

A set of one's own in COCO's format works alike. An LVIS file is known by the `frequency` of its categories.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from depthseg import masks
from depthseg.data import EXTENSIONS
from depthseg.errors import NOTHING_TO_DO, DepthsegError
from depthseg.schema import Array, Image


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
        raise DepthsegError(f"cannot read {annotations} ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
    elsewhere = [t.image.key for t in truths for astray in _astray(t) if astray]
    warnings = [
        *([f"{strangers} annotations are about images that the file does not list"] if strangers else []),
        *([f"{outside} boxes reach more than a pixel out of their image"] if outside else []),
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
        raise DepthsegError(f"{annotations} lists no images")
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
    if not any(path.is_file() for _, path in located):
        raise DepthsegError(f"the image {located[0][1].name} is not in {folder}", "Give the folder that the annotations are about.")
    yield from located


def _locate(folder: Path, row: dict) -> Path:
    """The path of an image; where it should be if it is nowhere."""
    name, parts = str(row.get("file_name") or ""), str(row.get("coco_url") or "").split("/")
    numbered = [f"{row['id']:012d}{extension}" for extension in EXTENSIONS] if isinstance(row.get("id"), int) else []
    candidates = [name, "/".join(parts[-2:]), parts[-1], Path(name).name, *numbered]
    paths = [folder / candidate for candidate in candidates if candidate]
    return next((path for path in paths if path.is_file()), paths[0] if paths else folder / str(row.get("id")))


def _key(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.as_posix()


def _truth(annotations: Path, row: dict, path: Path, folder: Path, found: list[tuple[int, dict]], names: dict[int, str]) -> Truth:
    where = f"image {row.get('id')}: "
    try:
        size = int(row["height"]), int(row["width"])
        rles, labels = [], []
        for number, annotation in found:
            where = f"annotation {number}: "
            rles.append(masks.of_coco(annotation["segmentation"], size))
            labels.append(int(annotation.get("category_id", 1)))
            if names and labels[-1] not in names:
                raise ValueError(f"its category {labels[-1]} is not in the list of categories")
        xywh = np.array([annotation["bbox"] for _, annotation in found], np.float32).reshape(-1, 4)
        own = masks.area(rles)
        area = np.array([annotation.get("area", pixels) for (_, annotation), pixels in zip(found, own)], float)
        lists = {k: list(map(int, row.get(f"{k}_category_ids") or ())) for k in ("neg", "not_exhaustive")}
        image = Image(_key(path, folder), int(row["id"]), path, size)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _foreign(annotations, error, where) from error
    box = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
    crowd = np.array([bool(annotation.get("iscrowd", 0)) for _, annotation in found], bool)
    ids = np.array([number for number, _ in found], np.int64)
    return Truth(image, ids, rles, box, area, crowd, np.array(labels, np.int64), lists["neg"], lists["not_exhaustive"])


def _astray(truth: Truth) -> Array:
    """Which bbox fields miss half of their mask's own box, bool (N,): LVIS v0.5 has such, in pictures that were turned."""
    own = masks.boxes(truth.rle)
    sides = np.minimum(own[:, 2:], truth.box[:, 2:]) - np.maximum(own[:, :2], truth.box[:, :2])
    return np.clip(sides, 0, None).prod(1) < 0.5 * (own[:, 2:] - own[:, :2]).prod(1)


def _beyond(truth: Truth) -> Array:
    """How far each box reaches out of its image, in pixels (N,)."""
    h, w = truth.image.size
    return np.maximum(-truth.box[:, :2], truth.box[:, 2:] - (w, h)).max(1, initial=0)
