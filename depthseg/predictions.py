"""Masks to be scored, as COCO results: written image by image while a run goes on, and read back from any file of that format.

Beside COCO's image_id, category_id, segmentation and score, an entry may say `predicted_iou`, `annotation_id` (whose prompt it
answers), `clicks` (after so many), `prompt_box` (xywh) and `depth_contrast`. A run that was stopped goes on where it stopped.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from depthseg import masks
from depthseg.errors import NOTHING_TO_DO, DepthsegError
from depthseg.formats import atomic
from depthseg.truth import Dataset

JOURNAL, RESULTS, SETTINGS = "predictions.jsonl", "predictions.json", "run.json"
POOR = 0.5  # of the entries; if fewer are about this data set, it is the wrong one
NAMES_SHOWN = 5


class Journal:
    """The predictions of one run in its folder. `done` holds the ids of the images that need no work any more.

    settings: JSON values that decide the predictions: a run may go on only with the same ones.
    """

    def __init__(self, folder: Path, settings: dict, overwrite: bool = False):
        self.folder, self.settings, self.overwrite = folder, json.loads(json.dumps(settings)), overwrite
        self.done: set[int] = set()

    def __enter__(self) -> Self:
        """Raises DepthsegError if the folder holds a run with other settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        held, journal = self.folder / SETTINGS, self.folder / JOURNAL
        if self.overwrite:
            for name in (JOURNAL, RESULTS, SETTINGS):
                (self.folder / name).unlink(missing_ok=True)
        if held.exists():
            try:
                earlier = dict(json.loads(held.read_bytes())["settings"])
            except (ValueError, KeyError, TypeError):
                raise DepthsegError(f"{held} is not from a run of depthseg", "Choose an empty or a new folder.") from None
            if differ := _difference(earlier, self.settings):
                raise DepthsegError(
                    f"{self.folder} holds a run with other options: {', '.join(differ)}",
                    "Choose another folder, or start anew in this one with --overwrite.",
                )
        elif journal.exists() or (self.folder / RESULTS).exists():
            raise DepthsegError(f"{self.folder} holds predictions but no {SETTINGS}", "Choose another folder, or add --overwrite.")
        with atomic(held) as part:
            part.write_text(json.dumps({"schema_version": 1, "settings": self.settings}, indent=1) + "\n")
        self._file = open(journal, "a+b", buffering=0)  # held open until __exit__
        self._file.seek(0)
        end = 0
        for line in iter(self._file.readline, b""):
            if not line.endswith(b"\n"):  # torn by a crash
                break
            self.done.add(json.loads(line)["image_id"])
            end += len(line)
        self._file.truncate(end)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def write(self, image_id: int, results: list[dict], seconds: dict[str, float]) -> None:
        """One line for an image. The results lack image_id, which stands in front of them."""
        self._file.write(json.dumps({"image_id": image_id, "seconds": seconds, "results": results}).encode() + b"\n")
        self.done.add(image_id)

    def lines(self) -> Iterator[dict]:
        with open(self.folder / JOURNAL, "rb") as file:
            yield from map(json.loads, file)

    def results(self, ids: set[int]) -> tuple[list[dict], list[dict[str, float]]]:
        """The results of these images in the order of their ids, written to predictions.json too; and the seconds of each image."""
        lines = sorted((line for line in self.lines() if line["image_id"] in ids), key=lambda line: line["image_id"])
        found = [{"image_id": line["image_id"], **result} for line in lines for result in line["results"]]
        with atomic(self.folder / RESULTS) as part, open(part, "w", encoding="utf-8") as file:
            file.write("[" + ",\n".join(map(json.dumps, found)) + "]\n")
        return found, [line["seconds"] for line in lines]


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
    if listed and len(kept) < POOR * len(listed) and not (dataset.left_out and classes < POOR * len(listed)):
        what = f"{images} are about other images, {classes} have other classes"
        raise DepthsegError(f"{path}: only {len(kept)} of {len(listed)} predictions fit {dataset.file} ({what})", "", NOTHING_TO_DO)
    warnings = [
        *([f"{images} predictions are about images that are not evaluated"] if images else []),
        *([f"{classes} predictions have a category that {dataset.file.name} does not list"] if classes else []),
    ]
    return kept, warnings


def _checked(path: Path, at: int, entry: Any, sizes: dict[int, tuple[int, int]]) -> dict:
    """The entry, with a compressed mask and every field that scoring reads."""

    def wrong(what: str) -> DepthsegError:
        return DepthsegError(f"{path}: entry {at}: {what}", "Entries count from 0.")

    if not isinstance(entry, dict):
        raise wrong("an object is expected")
    for name in ("image_id", "category_id"):
        if type(entry.get(name)) is not int:
            raise wrong(f"{name} must be a whole number")
    score = entry.get("score", entry.get("predicted_iou"))
    if not isinstance(score, int | float) or not math.isfinite(score):
        raise wrong("score must be a finite number")
    if entry["image_id"] not in sizes:
        return entry
    try:
        rle = masks.of_coco(entry["segmentation"], sizes[entry["image_id"]])
        masks.area([rle])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise wrong(f"segmentation is no mask of this image ({error})") from error
    return {**entry, "segmentation": rle, "score": float(score)}


def by_name(names: dict[int, str], dataset: Dataset, words: Any) -> tuple[dict[int, int], list[str]]:
    """From a detector's class ids to the data set's, by name, and the detector's names that the data set does not have.

    words: a function that gives a name's plain form. Raises DepthsegError if fewer than half of the names of the smaller table are
    found in the other: their zeros would look like a bad detector.
    """
    known: dict[str, int] = {}
    for i, name in dataset.names.items():
        known.setdefault(words(name), i)
    table = {i: known[words(name)] for i, name in names.items() if words(name) in known}
    strange = [name for i, name in names.items() if i not in table]
    if len(table) < POOR * min(len(names), len(dataset.names)):
        some = ", ".join(strange[:NAMES_SHOWN]) + (", ..." if len(strange) > NAMES_SHOWN else "")
        raise DepthsegError(
            f"only {len(table)} of the detector's {len(names)} classes are in {dataset.file.name}; it lacks {some}",
            "Choose a detector for this data set, or give one that reads its names with --classes.",
        )
    return table, strange
