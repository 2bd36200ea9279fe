"""A run in the formats that other tools read: made from its journal, picture by picture, with neither a model nor torch.

A format is a context manager in FORMATS: it opens on its own folder, gives a function that writes the answer for one picture, and
closes what the pictures share. That function returns, for each instance, how many pixels a reader of the format will get wrong (nothing:
none). Coordinates are pixels of the upright photograph: 0, 0 is the outer corner of the first pixel.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw
from pycocotools import mask as coco

from depthseg import data, formats, sink
from depthseg import masks as rles
from depthseg.data import Failure, Unreadable
from depthseg.errors import NOTHING_TO_DO, DepthsegError
from depthseg.outlines import exact, inset, joined, outlines
from depthseg.schema import Array, Image, Masks

_LABELME = "5.5.0"  # the version of the JSON; LabelMe warns about another first number
_MOST_LABELS = 65535  # of a 16-bit label map


class Refused(ValueError):
    """A picture that a format cannot hold; the message is the cause, in one phrase."""


class Answer(NamedTuple):
    image: Image
    masks: Masks
    found: list[dict]  # the same instances as the journal tells them


Write = Callable[[Answer], Sequence[int] | Array | None]


@dataclass
class Report:
    """How a conversion went. lost: format -> instances that a reader will not get exactly, and how many of their pixels."""

    images: int = 0
    instances: int = 0
    failures: list[tuple[str, Failure]] = field(default_factory=list)  # format, and what it could not take
    lost: dict[str, tuple[int, int]] = field(default_factory=dict)


# ---- the run ----


@dataclass(frozen=True)
class Run:
    """What the journal of a run holds. Keys, sizes and file positions stay in memory, masks do not."""

    journal: Path
    images: list[Image]  # with the path of the photograph if its folder is known
    offsets: list[int]  # where the line of each image starts in the journal
    names: dict[int, str]  # category id -> name, ordered by id
    refused: list[Failure]

    @classmethod
    def read(cls, folder: Path, photographs: Path | None = None) -> "Run":
        """The run in `folder`, however it ended. photographs: the folder that its keys are relative to.

        Pictures have the ids and the order of images.json. A run that is going on, or was killed, has none that is up to date:
        then they are the journal's own. Raises DepthsegError.
        """
        journal = folder / "journal.jsonl"
        heads: dict[str, tuple[int, int, tuple[int, int]]] = {}  # key -> id, offset, size; a later line replaces an earlier one
        names: dict[int, str] = {}
        try:
            going_on = json.loads((folder / "run.json").read_bytes())["state"] == "running"
            listed = [] if going_on else json.loads((folder / "images.json").read_bytes())["images"]
            with open(journal, "rb") as lines:
                offset = 0
                for raw in lines:
                    with suppress(ValueError, KeyError, TypeError):  # torn by a crash
                        line = json.loads(raw)
                        h, w = line["size"]
                        names |= {i["category_id"]: i["category"] for i in line["instances"]}
                        heads[line["key"]] = line["id"], offset, (h, w)
                    offset += len(raw)
        except (OSError, ValueError, KeyError, TypeError):
            raise DepthsegError(f"{folder} holds no run", "Give a folder that `depthseg segment` wrote into.") from None
        ids = {i["file_name"]: i["id"] for i in listed}
        if going_on:
            free, taken = count(1 + max((id for id, *_ in heads.values()), default=0)), set[int]()
            for key, (id, *_) in heads.items():
                ids[key] = next(free) if id in taken else id  # two sources may number alike
                taken.add(id)
        if not ids:
            raise DepthsegError(f"no picture of the run in {folder} is done", "Run `depthseg segment` again to go on.", NOTHING_TO_DO)
        images, offsets, refused = [], [], []
        for key, id in ids.items():
            _, offset, size = heads.get(key, (id, 0, (0, 0)))
            image = Image(key, id, photographs / key if photographs else None, size)
            if key not in heads:
                refused.append(Failure(image, "read", "the journal has no whole line about it"))
            elif not _stays_inside(key):
                refused.append(Failure(image, "read", "its key leads out of the folder"))
            else:
                images.append(image)
                offsets.append(offset)
        return cls(journal, images, offsets, dict(sorted(names.items())), refused)

    def answers(self) -> Iterator[Answer | Failure]:
        with open(self.journal, "rb") as lines:
            for image, offset in zip(self.images, self.offsets):
                lines.seek(offset)
                try:
                    found = json.loads(lines.readline())["instances"]
                    yield Answer(image, _masks(found, image.size), found)
                except (AttributeError, KeyError, TypeError, ValueError) as error:
                    yield Failure(image, "read", f"its masks in the journal are broken ({error})")


def _stays_inside(key: str) -> bool:
    path = Path(key)
    return bool(path.parts) and not path.anchor and ".." not in path.parts and "\0" not in key


def _masks(found: list[dict], size: tuple[int, int]) -> Masks:
    rle = [rles.of_coco(i["segmentation"], size) for i in found]

    def column(name: str, kind: type = np.float32) -> Array:
        return np.array([i[name] for i in found], kind)

    quality = column("predicted_iou"), column("stability_score"), column("score")
    names = {i["category_id"]: i["category"] for i in found}
    return Masks(rle, rles.boxes(rle), rles.area(rle), *quality, column("category_id", np.int64), names)


def convert(
    run: Run, output: Path, names: Sequence[str], polygons: bool = False, progress: Callable[[int, int], None] = lambda done, total: None
) -> Report:
    """Write the run in these formats, each into a folder of its name below `output`.

    polygons: coco-instances has polygons instead of RLE. progress: called with images (done, total).
    A picture that one format cannot take is told in the Report and ends neither the others nor the other formats.
    """
    report = Report(failures=[("all formats", failure) for failure in run.refused])
    with ExitStack() as opened:
        writers = {name: opened.enter_context(FORMATS[name](output.resolve() / name, run, polygons)) for name in names}
        for done, answer in enumerate(run.answers(), 1):
            if isinstance(answer, Failure):
                report.failures.append(("all formats", answer))
            else:
                report.images += 1
                report.instances += len(answer.masks)
                for name, write in writers.items():
                    try:
                        told = write(answer)
                        wrong = np.array([] if told is None else told, np.int64)
                        instances, pixels = report.lost.get(name, (0, 0))
                        report.lost[name] = instances + int(np.count_nonzero(wrong)), pixels + int(wrong.sum())
                    except (Refused, Unreadable) as error:
                        report.failures.append((name, Failure(answer.image, "read", str(error))))
                    except OSError as error:
                        report.failures.append((name, data.not_written(answer.image, error)))
            progress(done, len(run.images))
    return report


def check_output(output: Path, names: Sequence[str], inputs: Sequence[Path], overwrite: bool) -> None:
    """Refuse folders of formats that are, hold, or lie inside one of the inputs, or, without `overwrite`, that are not empty."""
    for folder in (output / name for name in names):
        sink.check_output(folder, inputs)
        if any(path.resolve().is_relative_to(folder.resolve()) for path in inputs):
            raise DepthsegError(f"the folder {folder} holds an input", "Choose another one with -o.")
        if folder.exists() and not folder.is_dir():
            raise DepthsegError(f"{folder} is a file", "Choose another folder with -o.")
        if not overwrite and folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise DepthsegError(f"the folder {folder} is not empty", "Choose another with -o, or add --overwrite to replace what is there.")


# ---- formats ----


def _parts(masks: Masks) -> Iterator[tuple[Array, list[Array]]]:
    """Each mask cut to its box, and its outlines in the frame of the whole picture."""
    for rle, (x0, y0, x1, y1) in zip(masks.rle, masks.box.astype(int).tolist()):
        window = rles.decode(rle)[y0:y1, x0:x1]
        yield window, [part + (x0, y0, 0, 0) for part in outlines(window)]


@contextmanager
def _listed(path: Path, before: str = "", after: str = "") -> Iterator[Callable[[dict], None]]:
    """A function that adds an entry to the JSON list in a file, which has `before` and `after` around it."""
    with formats.text_file(path) as file:
        file.write(before + "[")
        between = "\n"

        def add(entry: dict) -> None:
            nonlocal between
            file.write(between + json.dumps(entry))
            between = ",\n"

        yield add
        file.write("\n]" + after + "\n")


@contextmanager
def coco_results(folder: Path, run: Run, polygons: bool) -> Iterator[Write]:
    """predictions.json as the run writes it, or would have written it at its end."""
    with _listed(folder / "predictions.json") as add:

        def write(answer: Answer) -> None:
            about = {"image_id": answer.image.id, "file_name": answer.image.key}
            for instance in answer.found:
                add(about | {name: value for name, value in instance.items() if name != "category"})

        yield write


@contextmanager
def coco_instances(folder: Path, run: Run, polygons: bool) -> Iterator[Write]:
    """instances.json, a data set to train on: areas and boxes of the masks, no crowds, and the score as an extra."""
    images = [{"id": i.id, "file_name": i.key, "height": i.size[0], "width": i.size[1]} for i in run.images]
    categories = [{"id": id, "name": name} for id, name in run.names.items()]
    before = f'{{"images": {json.dumps(images)},\n"categories": {json.dumps(categories)},\n"annotations": '
    ids = count(1)  # COCO's evaluation takes 0 for no match
    with _listed(folder / "instances.json", before, "}") as add:

        def write(answer: Answer) -> None:
            masks = answer.masks
            shapes = [[exact(part).ravel().tolist() for part in parts] for _, parts in _parts(masks)] if polygons else masks.rle
            for n, ((x0, y0, x1, y1), shape) in enumerate(zip(masks.box.tolist(), shapes)):
                if masks.area[n]:
                    annotation = {"id": next(ids), "image_id": answer.image.id, "category_id": int(masks.label[n]), "segmentation": shape}
                    measured = {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": int(masks.area[n]), "iscrowd": 0}
                    add(annotation | measured | {"score": answer.found[n]["score"]})

        yield write


@contextmanager
def yolo_seg(folder: Path, run: Run, polygons: bool) -> Iterator[Write]:
    """labels/KEY.txt without the photograph's extension, where ultralytics looks for it if the photographs lie in images/; data.yaml.

    One line for each instance: its class and its outline. Several parts are joined by lines, as ultralytics itself does with COCO's
    polygons; a reader then takes the pixels under those lines for the instance.
    """
    position = {id: n for n, id in enumerate(run.names)}
    path_of = _bare_names(folder / "labels", ".txt")

    def write(answer: Answer) -> list[int]:
        (h, w), lines, wrong = answer.image.size, [], []
        for label, (window, parts), box in zip(answer.masks.label.tolist(), _parts(answer.masks), answer.masks.box):
            if parts:
                outline, joints = joined(parts)
                numbers = (inset(outline) / (w, h)).ravel()
                lines.append(" ".join([str(position[label]), *(f"{v:.6f}" for v in numbers)]) + "\n")
                wrong.append(_pixels_under(inset(joints) - box[:2], window))
        with formats.text_file(path_of(answer.image.key)) as file:
            file.write("".join(lines))
        return wrong

    yield write
    with formats.text_file(folder / "data.yaml") as file:
        file.write("# Put the photographs into images/, in the same folders as their labels in labels/.\ntrain: images\nval: images\n")
        file.write(f"names: {json.dumps(list(run.names.values()), ensure_ascii=False)}\n")


def _pixels_under(lines: Array, mask: Array) -> int:
    """How many pixels outside of a mask lie under lines (n, 2, 2), from x, y to x, y."""
    canvas = PILImage.fromarray(mask)
    for line in lines.astype(int).tolist():
        ImageDraw.Draw(canvas).line([tuple(end) for end in line], 1)
    return int(np.count_nonzero(np.asarray(canvas) & ~mask))


def _bare_names(folder: Path, extension: str) -> Callable[[str], Path]:
    """A function from a key to the path with `extension` in the place of its own. Raises Refused if another key had that path."""
    owner: dict[str, str] = {}

    def path_of(key: str) -> Path:
        bare = str(PurePosixPath(key).with_suffix(""))
        if owner.setdefault(bare, key) != key:
            raise Refused(f"{owner[bare]} has the same name but for its extension, which this format leaves out")
        return folder / (bare + extension)

    return path_of


@contextmanager
def labelme(folder: Path, run: Run, polygons: bool) -> Iterator[Write]:
    """KEY.json without the photograph's extension, as LabelMe names it: a polygon for each part, those of one instance in a group.

    imagePath leads from the JSON to the photograph; where its folder is not known, it is the name alone, for a JSON put beside it.
    """
    path_of = _bare_names(folder, ".json")

    def write(answer: Answer) -> None:
        image, masks, shapes = answer.image, answer.masks, []
        path = path_of(image.key)
        for n, (_, parts) in enumerate(_parts(masks)):
            about = {"label": answer.found[n]["category"], "score": answer.found[n]["score"], "group_id": n + 1 if len(parts) > 1 else None}
            for part in parts:
                shapes.append(about | {"points": inset(part).round(1).tolist(), "shape_type": "polygon", "description": "", "flags": {}})
        photograph = os.path.relpath(image.path, path.parent).replace(os.sep, "/") if image.path else PurePosixPath(image.key).name
        content: dict[str, object] = {"version": _LABELME, "flags": {}, "shapes": shapes, "imagePath": photograph, "imageData": None}
        content |= {"imageHeight": image.size[0], "imageWidth": image.size[1]}
        with formats.text_file(path) as file:
            file.write(json.dumps(content) + "\n")

    yield write


def _each(write: Callable[[Path, Answer], Sequence[int] | Array | None]) -> Callable[[Path, Run, bool], AbstractContextManager[Write]]:
    """A format without files that pictures share."""

    @contextmanager
    def opened(folder: Path, run: Run, polygons: bool) -> Iterator[Write]:
        yield partial(write, folder)

    return opened


@_each
def instances(folder: Path, answer: Answer) -> None:
    """KEY/: a 1-bit PNG for each instance, as large as the picture."""
    formats.write_instances(folder / answer.image.key, answer.masks)


@_each
def labelmap(folder: Path, answer: Answer) -> Array:
    """KEY.png with value n + 1 on instance n, in 8 bits or 16; KEY.json says what each value is. The better instance hides the other."""
    image, masks, _ = answer
    if len(masks) > _MOST_LABELS:
        raise Refused(f"it has {len(masks)} instances, and a label map holds {_MOST_LABELS}")
    formats.write_label_map(folder / f"{image.key}.png", masks, image.size)
    about = [{"category_id": i["category_id"], "category": i["category"], "score": i["score"]} for i in answer.found]
    with formats.text_file(folder / f"{image.key}.json") as file:
        file.write(json.dumps({n: entry for n, entry in enumerate(about, 1)}, indent=1) + "\n")
    hidden, above = np.zeros(len(masks), np.int64), rles.encode(np.zeros(image.size, bool))
    for n, rle in enumerate(masks.rle):
        hidden[n] = rles.area([coco.merge([above, rle], intersect=True)])[0]
        above = coco.merge([above, rle])
    return hidden


@_each
def overlay(folder: Path, answer: Answer) -> None:
    """KEY as JPEG: the photograph with its masks."""
    formats.write_overlay(folder / formats.overlay_name(answer.image.key), _photograph(answer.image), answer.masks)


@_each
def cutouts(folder: Path, answer: Answer) -> None:
    """KEY/: each instance cut out of the photograph, an RGBA PNG of its box; alpha is the mask. PNGs of an earlier answer go away."""
    image, masks, _ = answer
    pixels, folder = _photograph(image), folder / image.key
    for old in folder.glob("*.png"):
        old.unlink()
    for n, (rle, (x0, y0, x1, y1)) in enumerate(zip(masks.rle, masks.box.astype(int).tolist())):
        if masks.area[n]:
            alpha = rles.decode(rle)[y0:y1, x0:x1, None] * np.uint8(255)
            with formats.atomic(folder / formats.instance_name(masks, n)) as part:
                PILImage.fromarray(np.concatenate([pixels[y0:y1, x0:x1], alpha], 2)).save(part, "PNG")


def _photograph(image: Image) -> Array:
    """Its pixels, uint8 (h, w, 3). Raises Unreadable, also for a picture of another size than the one that was segmented."""
    seen = data.read(image)
    if seen.size != image.size:
        (h, w), (height, width) = seen.size, image.size
        raise Unreadable(f"the photograph is {w} x {h} pixels, the one that was segmented had {width} x {height}")
    assert seen.pixels is not None
    return seen.pixels


@_each
def npz(folder: Path, answer: Answer) -> None:
    """KEY.npz with masks uint8 (N, h, ceil(w / 8)), eight pixels of a row in a byte; size (h, w); boxes xyxy, scores, labels, names.

    np.unpackbits(file["masks"], axis=2, count=file["size"][1]) makes masks (N, h, w) of zeros and ones.
    """
    image, masks, found = answer
    h, w = image.size
    packed = np.zeros((len(masks), h, -(-w // 8)), np.uint8)
    for n, rle in enumerate(masks.rle):
        packed[n] = np.packbits(rles.decode(rle), axis=1)
    names = np.array([i["category"] for i in found], str)
    with formats.atomic(folder / f"{image.key}.npz") as part, open(part, "wb") as file:
        np.savez_compressed(
            file, masks=packed, size=np.array(image.size), boxes=masks.box, scores=masks.score, labels=masks.label, names=names
        )


FORMATS: dict[str, Callable[[Path, Run, bool], AbstractContextManager[Write]]] = {
    "coco-results": coco_results,
    "coco-instances": coco_instances,
    "instances": instances,
    "labelmap": labelmap,
    "overlay": overlay,
    "cutouts": cutouts,
    "yolo-seg": yolo_seg,
    "labelme": labelme,
    "npz": npz,
}
NEED_PHOTOGRAPHS = ("overlay", "cutouts")
LOSSES = {  # what the pixels are that a reader gets wrong
    "labelmap": "hidden where instances overlap",
    "yolo-seg": "added under the lines that join the parts of an instance",
}
