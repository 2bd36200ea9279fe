"""Masks to be scored, as COCO results: written image by image while a run goes on, and read back from any file of that format.

Beside COCO's image_id, category_id, segmentation and score, an entry may say `predicted_iou`, `annotation_id` (whose prompt it
answers), `clicks` (after so many), `prompt_box` (xywh) and `depth_contrast`. A run that was stopped goes on where it stopped.
"""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from depthseg import masks
from depthseg.data import stamp
from depthseg.errors import NOTHING_TO_DO, DepthsegError
from depthseg.formats import text_file
from depthseg.journal import Lines, locked
from depthseg.schema import Image
from depthseg.truth import Dataset

JOURNAL, RESULTS, SETTINGS = "predictions.jsonl", "predictions.json", "run.json"
OURS = (JOURNAL, RESULTS, SETTINGS, "report.json", "report.md", "scores.json", "report/index.html")
POOR = 0.5  # of the entries; if fewer are about this data set, it is the wrong one
NAMES_SHOWN = 5


class Journal:
    """The predictions of one run in its folder. `done` holds the ids of the images that need no work any more.

    settings: JSON values that decide the predictions: a run may go on only with the same ones. An image whose file has changed since
    is done again.
    """

    def __init__(self, folder: Path, settings: dict, dataset: Dataset, overwrite: bool = False):
        self.folder, self.settings, self.overwrite = folder, json.loads(json.dumps(settings)), overwrite
        self.images = {t.image.id: t.image for t in dataset.truths}
        self._at: dict[int, int] = {}  # image id -> where its line starts

    def __enter__(self) -> Self:
        """Raises DepthsegError if the folder holds a run with other settings, or another process writes to it."""
        with contextlib.ExitStack() as undo:
            self.folder.mkdir(parents=True, exist_ok=True)
            undo.enter_context(locked(self.folder))
            self._claim()
            self._lines = undo.enter_context(Lines(self.folder / JOURNAL, "results"))
            self._resume()
            self._held = undo.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._held.close()

    @property
    def done(self) -> set[int]:
        return self._at.keys() & self.images.keys()

    def _claim(self) -> None:
        held = self.folder / SETTINGS
        if wrong := [name for name in OURS if (self.folder / name).is_dir()]:
            raise DepthsegError(f"{self.folder / wrong[0]} is a folder", "Choose an empty or a new folder.")
        if self.overwrite:
            for name in OURS:
                (self.folder / name).unlink(missing_ok=True)
        if held.exists():
            try:
                earlier = dict(json.loads(held.read_bytes())["settings"])
            except (ValueError, KeyError, TypeError):
                raise DepthsegError(f"{held} is not from an evaluation of depthseg", "Choose an empty or a new folder.") from None
            if differ := _difference(earlier, self.settings):
                raise DepthsegError(
                    f"{self.folder} holds a run with other options: {', '.join(differ)}",
                    "Choose another folder, or start anew in this one with --overwrite.",
                )
        elif any((self.folder / name).exists() for name in OURS):
            raise DepthsegError(f"{self.folder} holds predictions but no {SETTINGS}", "Choose another folder, or add --overwrite.")
        with text_file(held) as file:
            file.write(json.dumps({"schema_version": 1, "settings": self.settings}, indent=1) + "\n")

    def _resume(self) -> None:
        for at, head in self._lines.heads():
            with contextlib.suppress(KeyError):
                image = self.images.get(head["image_id"])
                if image is None or head["file"] == stamp(image):
                    self._at[head["image_id"]] = at

    def write(self, image: Image, results: list[dict], seconds: dict[str, float]) -> None:
        """One line for an image. The results lack image_id, which stands in front of them."""
        head = {"image_id": image.id, "file": stamp(image), "seconds": {name: round(s, 5) for name, s in seconds.items()}}
        self._at[image.id] = self._lines.append({**head, "results": results})

    def take(self, results: list[dict]) -> None:
        """Results from elsewhere, all at once."""
        by_image: dict[int, list[dict]] = {}
        for r in results:
            by_image.setdefault(r["image_id"], []).append({k: v for k, v in r.items() if k != "image_id"})
        for image in self.images.values():
            self.write(image, by_image.get(image.id, []), {})
        self.results()

    def results(self) -> tuple[list[dict], list[dict[str, float]]]:
        """The results of the images in the order of their ids, written to predictions.json too; and the seconds of each image."""
        found: list[dict] = []
        seconds = []
        with text_file(self.folder / RESULTS) as file:
            file.write("[")
            for i in sorted(self.done):
                line = self._lines.read(self._at[i])
                seconds.append(line["seconds"])
                for result in line["results"]:
                    found.append({"image_id": i, **result})
                    file.write((",\n" if len(found) > 1 else "\n") + json.dumps(found[-1]))
            file.write("\n]\n")
        return found, seconds


def _difference(earlier: dict, now: dict, inside: str = "") -> list[str]:
    """The settings that differ, in words."""
    out = []
    for name in {**earlier, **now}:
        a, b = earlier.get(name), now.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            out += _difference(a, b, f"{inside}{name}.")
        elif a != b:
            out.append(f"{inside}{name} (was {a!r}, is {b!r})")
    return out


def read(path: Path, dataset: Dataset, agnostic: bool = False) -> tuple[list[dict], list[str]]:
    """The entries of a COCO results file that are about the images and classes of `dataset`, and warnings about the others.

    Raises DepthsegError for a file that is none, naming the entry and the field, and where most entries are about something else.
    """
    try:
        listed = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise DepthsegError(f"cannot read {path} ({error.strerror})", "Check --predictions.") from error
    except (ValueError, RecursionError) as error:
        raise DepthsegError(f"{path} is not JSON ({error})", "The file may be cut off, or be of another format.") from error
    if not isinstance(listed, list):
        raise DepthsegError(f"{path}: a list of COCO results is expected", "Give the predictions.json of a run.")
    sizes = {t.image.id: t.image.size for t in dataset.truths}
    kept, images, classes = [], 0, 0
    for at, entry in enumerate(listed):
        entry = _checked(path, at, entry, sizes)
        if entry["image_id"] not in sizes:
            images += 1
        elif not agnostic and dataset.names and entry["category_id"] not in dataset.names:
            classes += 1
        else:
            kept.append(entry)
    part = dataset.left_out and kept and classes < POOR * len(listed)  # a subset: most may be about the others
    if listed and len(kept) < POOR * len(listed) and not part:
        what = f"{images} are about other images, {classes} have other classes"
        raise DepthsegError(
            f"{path}: only {len(kept)} of {len(listed)} predictions fit {dataset.file} ({what})",
            "Give predictions for these images and classes.",
            NOTHING_TO_DO,
        )
    warnings = [
        *([f"{images} predictions are about images that are not evaluated"] if images else []),
        *([f"{classes} predictions have a category that {dataset.file.name} does not list"] if classes else []),
    ]
    return kept, warnings


def _checked(path: Path, at: int, entry: Any, sizes: dict[int, tuple[int, int]]) -> dict:
    """The entry with a compressed mask, if every field that scoring reads is what it must be."""

    def wrong(what: str) -> DepthsegError:
        return DepthsegError(f"{path}: entry {at}: {what}", "Entries count from 0.")

    if not isinstance(entry, dict):
        raise wrong("an object is expected")
    for name in ("image_id", "category_id"):
        if type(entry.get(name)) is not int:
            raise wrong(f"{name} must be a whole number")
    score = entry.get("score", entry.get("predicted_iou"))
    if not _finite(score):
        raise wrong("score must be a finite number")
    whole = {name: entry[name] for name in ("annotation_id", "clicks") if name in entry}
    if any(type(value) is not int for value in whole.values()):
        raise wrong("annotation_id and clicks must be whole numbers")
    predicted, box = entry.get("predicted_iou"), entry.get("prompt_box", [0, 0, 0, 0])
    contrast = entry.get("depth_contrast")
    for name, value in (("predicted_iou", predicted), ("depth_contrast", contrast)):
        if value is not None and not _finite(value):
            raise wrong(f"{name} must be a finite number")
    if not isinstance(box, list) or len(box) != 4 or not all(map(_finite, box)):
        raise wrong("prompt_box must be four finite numbers")
    if entry["image_id"] not in sizes:
        return entry
    try:
        rle = masks.of_coco(entry["segmentation"], sizes[entry["image_id"]])
        masks.area([rle])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise wrong(f"segmentation is no mask of this image ({error})") from error
    return {**entry, "segmentation": rle, "score": float(score or 0)}


def _finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # NaN is not


def some(names: Sequence[str]) -> str:
    """The first few of them."""
    return ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")


def by_name(names: dict[int, str], dataset: Dataset, words: Any) -> tuple[dict[int, int], list[str]]:
    """From a detector's class ids to the data set's, by name, and the detector's names that the data set does not have.

    words: a function that gives a name's plain form. Raises DepthsegError if fewer than half of the names of the smaller table are
    found in the other: their zeros would look like a bad detector.
    """
    exact = {name.lower(): i for i, name in dataset.names.items()}
    plain: dict[str, list[int]] = {}  # LVIS has five names that two kinds of thing share, but for a note in brackets
    for i, name in dataset.names.items():
        plain.setdefault(words(name), []).append(i)
    table = {}
    for i, name in names.items():
        alike = [exact[name.lower()]] if name.lower() in exact else plain.get(words(name), [])
        if len(alike) == 1:
            table[i] = alike[0]
    strange = [name for i, name in names.items() if i not in table]
    if len(table) < POOR * min(len(names), len(dataset.names)):
        raise DepthsegError(
            f"only {len(table)} of the detector's {len(names)} classes are in {dataset.file.name}; it lacks {some(strange)}",
            "Choose a detector for this data set, or give one that reads its names with --classes.",
        )
    return table, strange
