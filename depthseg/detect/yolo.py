"""YOLOv8, or any detection model of ultralytics, through that package (AGPL-3.0, an optional extra)."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as PILImage

from depthseg import catalog
from depthseg.data import alike
from depthseg.detect import classes as tables
from depthseg.errors import MISSING_PIECE, DepthsegError
from depthseg.plan import CONFIDENCE, MAX_BOXES
from depthseg.schema import Boxes, Image

SIDE = 640  # pixels, as trained
NMS = 0.7  # of its own suppression: ultralytics' default


@contextmanager
def contained() -> Iterator[None]:
    """Around imports of ultralytics: it replaces functions of the whole process; its Image.open raises ModuleNotFoundError for a
    broken picture."""
    import torch

    theirs = PILImage.open, torch.save
    try:
        yield
    finally:
        PILImage.open, torch.save = theirs  # type: ignore[assignment]


def package(who: str, instead: str) -> Any:
    """The package ultralytics, offline and silent, without what it does to other packages.

    who needs it, and what can be done instead, are for the message where it is missing.
    """
    os.environ.update(  # read once, when ultralytics is imported
        YOLO_OFFLINE="true",  # no probe, no analytics, no download
        YOLO_AUTOINSTALL="false",  # it would run pip by itself
        YOLO_VERBOSE="false",
        YOLO_CONFIG_DIR=str(catalog.cache() / "ultralytics"),  # it writes a settings file
        ULTRALYTICS_SAFE_LOAD="1",  # its checkpoints are pickles: admit only its own classes
    )
    import torch

    try:
        with contained(), torch.device("cpu"):  # it makes tensors while it is imported, which all its networks share
            import ultralytics

            _ = ultralytics.YOLO  # here the real import happens
    except ImportError as e:
        install = f"Install the extra depthseg[yolo] (AGPL-3.0): pip install 'depthseg[yolo]'; or {instead}."
        raise DepthsegError(f"{who} needs the package ultralytics ({e})", install, MISSING_PIECE) from e
    if ultralytics.settings["sync"]:
        ultralytics.settings.update({"sync": False})  # analytics
    return ultralytics


def opened(network: Any, path: Path) -> Any:
    """What a class of ultralytics makes of a checkpoint. Raises DepthsegError."""
    if path.suffix != ".pt":  # a .yaml would become a random model, an .onnx would look for another runtime
        raise DepthsegError(f"{path} is not an ultralytics checkpoint: its name does not end in .pt", "Give a .pt file.")
    try:
        return network(str(path), verbose=False)
    except Exception as e:  # whatever unpickling a foreign file may raise
        reason = str(e).strip().splitlines() or [type(e).__name__]
        raise DepthsegError(
            f"{path} is not a readable YOLO checkpoint ({reason[0][:120]})",
            "It may be damaged: `depthseg weights rm` and `depthseg weights pull` fetch it again.",
        ) from e


class Yolo:
    """YOLOv8 by ultralytics (AGPL-3.0, an optional extra), offline and silent.

    Labels are COCO's category ids if the model has exactly COCO's classes, else the model's own class index (detect/classes.py).
    fp16 works on CUDA only; bf16 means fp32 here, because ultralytics has none.
    """

    def __init__(
        self,
        path: str | Path,
        device: Any = "cpu",
        precision: str = "fp32",
        confidence: float = CONFIDENCE,
        max_boxes: int = MAX_BOXES,
        classes: Sequence[str] = (),
    ):
        path = catalog.there(path, "YOLO", "detector")
        network = package("YOLO", "use --detector nano").YOLO
        import torch

        self.device = torch.device(device)
        self.confidence, self.max_boxes = confidence, max_boxes
        self._half = precision == "fp16" and self.device.type == "cuda"
        self._model = opened(network, path)
        self.names = {int(i): str(name) for i, name in self._model.names.items()}
        if self._model.task not in ("detect", "segment"):
            raise DepthsegError(f"{path} is a YOLO model for '{self._model.task}', which gives no boxes", "Use a detection model.")
        count = max(self.names, default=-1) + 1
        known = tables.table([self.names.get(i, "") for i in range(count)])
        self._ids = list(known)
        self.names = {self._ids[i]: known[self._ids[i]] for i in self.names}
        chosen = tables.choose(classes, self.names, "this YOLO model")
        self._only = None if chosen is None else [self._ids.index(i) for i in chosen]

    def __call__(self, images: list[Image]) -> list[Boxes]:
        return alike(images, lambda image: image.size, self._predict)  # mixed sizes would be padded otherwise than each alone

    def _predict(self, images: list[Image], size: tuple[int, int]) -> list[Boxes]:
        """Boxes of images of one size, in one call of the network."""
        import torch

        threads = torch.get_num_threads()
        pictures = [PILImage.fromarray(np.asarray(image.pixels)) for image in images]  # PIL images are taken as RGB, arrays as BGR
        results = self._model.predict(
            pictures, imgsz=SIDE, conf=self.confidence, iou=NMS, max_det=self.max_boxes, device=str(self.device),
            verbose=False, save=False, classes=self._only, **({"quantize": 16} if self._half else {}),
        )  # fmt: skip
        torch.set_num_threads(threads)  # on the CPU, ultralytics sets its own number for the whole process
        out = []
        for image, result in zip(images, results):
            b = result.boxes.cpu().numpy()
            label = np.array([self._ids[int(c)] for c in b.cls], np.int64)
            out.append(Boxes.best(b.xyxy, b.conf, label, self.names, image.size, self.confidence, self.max_boxes))
        return out
