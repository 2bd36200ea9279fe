"""Where boxes and clicks come from: a JSON file, YOLOv8, or our own class-agnostic network.

Each class is called with a list of images and answers for each of them, in order. torch and ultralytics are imported in the
constructor that needs them, after it has looked for the weights. Knows no masks, and reads no files but its own.
"""

import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from depthseg import catalog
from depthseg.errors import MISSING_PIECE, NOTHING_TO_DO, DepthsegError
from depthseg.plan import CONFIDENCE, MAX_BOXES
from depthseg.schema import ABSENT, Array, Boxes, Frame, Image, Prompts

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

YOLO_SIDE = 640  # pixels, as trained
YOLO_IOU = 0.7  # of its own suppression: ultralytics' default
NANO_SHARED = 0.5  # of the smaller box


def _best(xyxy: Array, score: Array, label: Array, names: dict[int, str], size: tuple[int, int], least: float, most: int | None) -> Boxes:
    """Boxes clipped to an image of `size`, without empty ones and scores under `least` or NaN, best first, at most `most`."""
    h, w = size
    xyxy = np.clip(np.asarray(xyxy, np.float64).reshape(-1, 4), 0, (w, h, w, h)).astype(np.float32)
    score = np.asarray(score, np.float32)
    (keep,) = np.nonzero((score >= np.float32(least)) & (xyxy[:, 2:] > xyxy[:, :2]).all(1))
    keep = keep[np.argsort(-score[keep], kind="stable")][:most]
    label = np.asarray(label, np.int64)[keep]
    return Boxes(xyxy[keep], score[keep], label, {i: names[i] for i in sorted(set(label.tolist())) if i in names})


# ---- files ----


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise DepthsegError(f"no such file: {path}", "Check the path.")
    try:
        return json.loads(path.read_bytes())
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
    if isinstance(value, list) and len(value) == count and all(type(v) in (int, float) for v in value):
        try:
            if all(math.isfinite(v) for v in value):
                return value
        except OverflowError:  # a whole number of more than 308 digits
            pass
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
    All boxes are used, unless `confidence` or `max_boxes` says otherwise.
    images_json: a COCO file whose images say which image an image_id is; without it, image_id 139 is 000000000139.jpg.
    The whole file is checked here; DepthsegError names the file, the entry and the field.
    """

    def __init__(
        self,
        path: str | Path,
        confidence: float | None = None,
        max_boxes: int | None = None,
        images_json: str | Path | None = None,
    ):
        content = _read_json(Path(path))
        extra = _read_json(Path(images_json)) if images_json else None
        whole: dict = content if isinstance(content, dict) else {}  # a ground-truth file carries its own tables
        tables: dict = extra if isinstance(extra, dict) else whole
        if extra is not None and "images" not in tables:
            raise DepthsegError(f"{images_json} has no 'images'", "Give a COCO annotation file.")
        listed: Any = whole.get("annotations", content)
        self.confidence, self.max_boxes = -math.inf if confidence is None else confidence, max_boxes
        self._entries = entries = _Entries(Path(path), listed, tables.get("images"))
        self._names = _category_names(Path(path), whole.get("categories") or tables.get("categories"))
        self._xyxy = np.zeros((len(listed), 4))
        self._score = np.ones(len(listed), np.float32)
        self._label = np.ones(len(listed), np.int64)
        for at, entry in enumerate(listed):
            self._xyxy[at] = _xyxy(entries, at, "bbox", entry.get("bbox"))
            if "score" in entry:
                (self._score[at],) = _numbers(entries, at, "score", [entry["score"]], 1)
            if "category_id" in entry:
                self._label[at] = _whole(entries, at, "category_id", entry["category_id"])
            if entry.get("iscrowd"):
                self._score[at] = np.nan  # under every threshold

    def __call__(self, images: list[Image], text: Sequence[str] = ()) -> list[Boxes]:
        rows = [np.array(self._entries.of(image.key), int) for image in images]
        return [
            _best(self._xyxy[r], self._score[r], self._label[r], self._names, image.size, self.confidence, self.max_boxes)
            for image, r in zip(images, rows)
        ]

    def __len__(self) -> int:
        return len(self._label)

    def expect(self, keys: Iterable[str]) -> list[str]:
        """Bind the entries to the keys of all images of a run: the name of each entry that is about none of them.

        Raises DepthsegError for entries that fit two images, and with code NOTHING_TO_DO if no entry fits any.
        """
        return self._entries.expect(keys)


def _category_names(path: Path, categories: Any) -> dict[int, str]:
    try:
        return {int(c["id"]): str(c["name"]) for c in categories or ()}
    except (TypeError, KeyError, ValueError) as e:
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
        for at, entry in enumerate(listed):
            points, signs, box = entry.get("points", []), entry.get("labels"), entry.get("box")
            if not isinstance(points, list) or not (points or box is not None):
                raise entries.error(at, "points", f"a list of [x, y] is expected where there is no box, not {_short(points)}")
            xy = np.array([_numbers(entries, at, "points", p, 2) for p in points], np.float64).reshape(1, -1, 2)
            signs = [1] * len(points) if signs is None else signs
            if not isinstance(signs, list) or len(signs) != len(points) or not all(type(s) is int and s in (0, 1) for s in signs):
                raise entries.error(at, "labels", f"a 0 or 1 for each of the {len(points)} points is expected, not {_short(signs)}")
            xyxy = None if box is None else np.array([_xyxy(entries, at, "box", box)])
            self._prompts.append(Prompts.of(xyxy, xy if points else None, np.array([signs])))
            self._label.append(_whole(entries, at, "category_id", entry.get("category_id", 1)))

    def __call__(self, images: list[Image], text: Sequence[str] = ()) -> list[Prompts]:
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

    def __len__(self) -> int:
        return len(self._label)

    def expect(self, keys: Iterable[str]) -> list[str]:
        """Bind the entries to the keys of all images of a run: the name of each entry that is about none of them.

        Raises DepthsegError for entries that fit two images, and with code NOTHING_TO_DO if no entry fits any.
        """
        return self._entries.expect(keys)


# ---- networks ----


def _weights(path: str | Path, what: str) -> Path:
    """The path, if there is a file; ultralytics would otherwise try to download what is missing."""
    if not Path(path).is_file():
        raise catalog.missing(f"the weights of {what} are not at {path}", "detector")
    return Path(path)


class Yolo:
    """YOLOv8 by ultralytics (AGPL-3.0, an optional extra), offline and silent.

    Labels are COCO's category ids if the model has exactly COCO's classes, else the model's own class index.
    fp16 works on CUDA only; bf16 means fp32 here, because ultralytics has none.
    """

    def __init__(
        self,
        path: str | Path,
        device: Any = "cpu",
        precision: str = "fp32",
        confidence: float = CONFIDENCE,
        max_boxes: int = MAX_BOXES,
    ):
        path = _weights(path, "YOLO")
        if path.suffix != ".pt":  # a .yaml would become a random model, an .onnx would look for another runtime
            raise DepthsegError(f"{path} is not an ultralytics checkpoint: its name does not end in .pt", "Give a .pt file.")
        os.environ.update(  # read once, when ultralytics is imported
            YOLO_OFFLINE="true",  # no probe, no analytics, no download
            YOLO_AUTOINSTALL="false",  # it would run pip by itself
            YOLO_VERBOSE="false",
            YOLO_CONFIG_DIR=str(catalog.cache() / "ultralytics"),  # it writes a settings file
            ULTRALYTICS_SAFE_LOAD="1",  # its checkpoints are pickles: admit only its own classes
        )
        import torch

        theirs = PILImage.open, torch.save
        try:
            import ultralytics

            network = ultralytics.YOLO  # here the real import happens
        except ImportError as e:
            install = "Install the extra depthseg[yolo] (AGPL-3.0): pip install 'depthseg[yolo]'; or use --detector nano."
            raise DepthsegError(f"YOLO needs the package ultralytics ({e})", install, MISSING_PIECE) from e
        finally:  # ultralytics replaces both in the whole process; its Image.open raises ModuleNotFoundError for a broken picture
            PILImage.open, torch.save = theirs  # type: ignore[assignment]
        if ultralytics.settings["sync"]:
            ultralytics.settings.update({"sync": False})  # analytics
        self.device = torch.device(device)
        self.confidence, self.max_boxes = confidence, max_boxes
        self._half = precision == "fp16" and self.device.type == "cuda"
        try:
            self._model = network(str(path), verbose=False)
            self._names = {int(i): str(name) for i, name in self._model.names.items()}
        except Exception as e:  # whatever unpickling a foreign file may raise
            reason = str(e).strip().splitlines() or [type(e).__name__]
            raise DepthsegError(f"{path} is not a readable YOLO checkpoint ({reason[0][:120]})", "Fetch it again with --pull.") from e
        if self._model.task not in ("detect", "segment"):
            raise DepthsegError(f"{path} is a YOLO model for '{self._model.task}', which gives no boxes", "Use a detection model.")
        coco = [self._names.get(i) for i in range(len(self._names))] == COCO_NAMES
        self._ids = COCO_IDS if coco else list(range(max(self._names, default=-1) + 1))
        self._names = {self._ids[i]: name for i, name in self._names.items()}

    def __call__(self, images: list[Image], text: Sequence[str] = ()) -> list[Boxes]:
        by_size: dict[tuple[int, int], list[int]] = {}  # mixed sizes would be padded otherwise than each alone
        for at, image in enumerate(images):
            by_size.setdefault(image.size, []).append(at)
        out: list[Boxes] = [Boxes.empty()] * len(images)
        for same in by_size.values():
            for at, found in zip(same, self._predict([images[at] for at in same])):
                out[at] = found
        return out

    def _predict(self, images: list[Image]) -> list[Boxes]:
        """Boxes of images of one size, in one call of the network."""
        import torch

        threads = torch.get_num_threads()
        pictures = [PILImage.fromarray(np.asarray(image.pixels)) for image in images]  # PIL images are taken as RGB, arrays as BGR
        results = self._model.predict(
            pictures, imgsz=YOLO_SIDE, conf=self.confidence, iou=YOLO_IOU, max_det=self.max_boxes, device=str(self.device),
            verbose=False, save=False, **({"quantize": 16} if self._half else {}),
        )  # fmt: skip
        torch.set_num_threads(threads)  # on the CPU, ultralytics sets its own number for the whole process
        out = []
        for image, result in zip(images, results):
            b = result.boxes.cpu().numpy()
            label = np.array([self._ids[int(c)] for c in b.cls], np.int64)
            out.append(_best(b.xyxy, b.conf, label, self._names, image.size, self.confidence, self.max_boxes))
        return out


class NanoBoxes:
    """Our own network of models/boxes.py: boxes around whatever looks like an object. One label, 1.

    The network is unsure and likes parts. So a box's score is the geometric mean of what the network says and of the box's size (the
    root of its share of the picture), and a box is dropped when half of it, or of a better box, lies in the other: wholes win.
    """

    def __init__(
        self,
        path: str | Path,
        device: Any = "cpu",
        precision: str = "fp32",
        confidence: float = CONFIDENCE,
        max_boxes: int = MAX_BOXES,
    ):
        path = _weights(path, "the nano box proposer")
        import torch

        from depthseg.models.boxes import BoxNet

        self.device = torch.device(device)
        self.precision = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.confidence, self.max_boxes = confidence, max_boxes
        self._network = BoxNet.load(path).to(self.device)

    def __call__(self, images: list[Image], text: Sequence[str] = ()) -> list[Boxes]:
        import torch

        if not images:
            return []
        side = self._network.side
        frames = [Frame(image.size, side) for image in images]
        x = torch.from_numpy(np.stack([f.image(np.asarray(image.pixels)) for f, image in zip(frames, images)])).to(self.device)
        half = self.precision != torch.float32
        with torch.inference_mode(), torch.autocast(self.device.type, self.precision, enabled=half):
            scores, boxes = self._network(x)  # (B, N), (B, N, 4)
        return [self._kept(s.float(), b.float(), frame) for s, b, frame in zip(scores, boxes, frames)]

    def _kept(self, score: Any, xyxy: Any, frame: Frame) -> Boxes:
        """Scores (N,) and boxes (N, 4) of the network's square -> the best boxes in original pixels, without their parts."""
        (h, w), (ih, iw) = frame.size, frame.inner
        xyxy = np.clip(xyxy.cpu().numpy() * np.array([w / iw, h / ih] * 2), 0, (w, h, w, h))
        area = (xyxy[:, 2:] - xyxy[:, :2]).clip(0).prod(1)
        score = np.sqrt(score.cpu().numpy() * np.sqrt(area / (h * w)))
        order = np.argsort(-score, kind="stable")
        keep: list[int] = []
        for at in order[score[order] >= self.confidence]:
            low, high = np.maximum(xyxy[at, :2], xyxy[keep, :2]), np.minimum(xyxy[at, 2:], xyxy[keep, 2:])
            shared = (high - low).clip(0).prod(1) / np.minimum(area[at], area[keep]).clip(1e-6)
            if not (shared > NANO_SHARED).any():
                keep.append(int(at))
            if len(keep) == self.max_boxes:
                break
        names = {1: "object"}
        return _best(xyxy[keep], score[keep], np.ones(len(keep)), names, frame.size, self.confidence, self.max_boxes)
