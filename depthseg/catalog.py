"""The table of names: every model, depth estimator and detector that can be chosen, as rows.

A row says how to build the thing (`build`: dotted path to a function or class, `args`), which file holds its weights, and under
which terms. Choices in `--help`, `depthseg models`, loading and the test matrix all come from here. Standard library only.
"""

import difflib
import importlib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from depthseg.errors import MISSING_PIECE, DepthsegError
from depthseg.pins import MEGABYTES, REVISIONS, SHA256


@dataclass(frozen=True)
class Row:
    """One name that can be chosen."""

    build: str  # "package.module:name"
    args: dict = field(default_factory=dict)
    file: str | None = None  # weights: path below weights/ or below the user's cache
    hub: str | None = None  # Hugging Face repository that holds `file`, or the whole model (transformers)
    url: str | None = None  # direct address of `file`
    folder: str | None = None  # Hugging Face repository whose folder --weights takes in the place of `file`
    inside: str | None = None  # path of the file in the hub's repository, where it is not `file`
    revision: str | None = None  # commit of the hub's repository
    sha256: str | None = None  # of `file`, or of the repository's model.safetensors; see pins.py
    megabytes: float = 0  # about, as the hub's page says
    input: int = 0  # side of the network's input in pixels
    licence: str = ""
    note: str = ""
    role: str = "model"  # a key of WAYS
    classes: str = ""  # of a detector: the data set whose classes it has, where that is known without its weights
    reads: bool = False  # a detector that has to be told in words what to look for
    overlap: str = ""  # how masks of its prompts exclude each other: by IoU, or by the share of the smaller one, or not
    confidence: float = 0.25  # of a detector: boxes under this score are dropped where the plan says nothing
    millions: float = 0  # parameters: counted by `depthseg models NAME`, or as the publisher says
    gmacs: float = 0  # multiply-adds of encoding one image, in billions, likewise
    score: str = ""  # published, and where


_PULL = "run again with --pull on a machine with a network"
WAYS = {  # how to go on without the weights of a model, a detector or a depth estimator, in words that fit every command
    "model": f"pass --weights PATH, or {_PULL}",
    "detector": f"use --detector nano, which is embedded, or {_PULL}",
    "depth": f"give --depth FOLDER with depth maps, use --depth nano, or {_PULL}",
    "boxes": "run `depthseg weights pull` on a machine with a network",
}
FREE_LICENCES = ("", "Apache-2.0")

_OFFICIAL = "mit-han-lab/efficientvit-sam"
_NANO = "research only: trained on sources with non-commercial terms, see weights/nano/README.md"


_EFFICIENTVIT_SAM = {  # millions of parameters without and with depth, billions of multiply-adds (ours), COCO mask AP (the paper's)
    "l0": (34.8, 65.5, 34.77, 45.7),
    "l1": (47.7, 91.2, 48.98, 46.2),
    "l2": (61.3, 118.6, 68.55, 46.6),
    "xl0": (117.0, 229.9, 184.8, 47.5),
    "xl1": (203.3, 402.6, 321.87, 47.8),
}


def _models() -> dict[str, Row]:
    build = "depthseg.models.depthseg:build"
    rows = {
        "nano": Row(
            build, {"variant": "nano", "depth": False}, "nano/nano.safetensors", input=512, licence=_NANO, millions=2.9, gmacs=3.67
        ),
        "nano-depth": Row(
            build, {"variant": "nano", "depth": True}, "nano/nano-depth.safetensors", input=512, licence=_NANO, millions=5.6, gmacs=7.34
        ),
    }
    for v, (plain, deep, gmacs, ap) in _EFFICIENTVIT_SAM.items():
        size = 1024 if v.startswith("xl") else 512
        official = Row(build, {"variant": v, "depth": False}, f"efficientvit_sam_{v}.pt", hub=_OFFICIAL, input=size, licence="Apache-2.0",
                       millions=plain, gmacs=gmacs, score=f"COCO mask AP {ap} with ViTDet boxes (EfficientViT-SAM, Table 1)")  # fmt: skip
        rows[f"efficientvit-sam-{v}"] = official
        rows[f"efficientvit-sam-{v}-depth"] = replace(
            official,
            args={"variant": v, "depth": True},
            millions=deep,
            gmacs=round(2 * gmacs, 2),
            score="COCO mIoU 76.6 with true boxes (Depth-Aware EfficientViT-SAM, Table 3; its weights are not published)"
            if v == "l2"
            else "",
            note="starts as the RGB model (alpha 0) until a trained depth branch is given with --weights",
        )
    return rows


_WITH_VITDET = "COCO mask AP {} with ViTDet boxes (EfficientViT-SAM, Table 1)"
_RAW = "https://raw.githubusercontent.com"
_ULTRALYTICS = "https://github.com/ultralytics/assets/releases/download/v8.3.0"


def _systems() -> dict[str, Row]:
    """The other systems of the papers' tables."""
    rows = {}
    for size, file, megabytes, hub, millions, gmacs in (
        ("b", "sam_vit_b_01ec64.pth", 375.0, "base", 93.7, 486.04),
        ("l", "sam_vit_l_0b3195.pth", 1249.5, "large", 312.3, 1492.84),
        ("h", "sam_vit_h_4b8939.pth", 2564.6, "huge", 641.1, 2980.54),
    ):
        rows[f"sam-vit-{size}"] = Row(
            "depthseg.models.sam_vit:build",
            {"variant": size},
            file,
            url=f"https://dl.fbaipublicfiles.com/segment_anything/{file}",
            folder=f"facebook/sam-vit-{hub}",
            megabytes=megabytes,
            input=1024,
            licence="Apache-2.0",
            millions=millions,
            gmacs=gmacs,
            score=_WITH_VITDET.format(46.5) if size == "h" else "",
        )
    rows["mobile-sam"] = Row(
        "depthseg.models.mobile_sam:build",
        file="mobile_sam.pt",
        url=f"{_RAW}/ChaoningZhang/MobileSAM/master/weights/mobile_sam.pt",
        megabytes=40.7,
        input=1024,
        licence="Apache-2.0",
        millions=9.8,
        gmacs=38.77,
        score=_WITH_VITDET.format(38.7),
    )
    rows["edge-sam"] = Row(
        "depthseg.models.edge_sam:build",
        file="edge_sam.pth",
        url="https://huggingface.co/spaces/chongzhou/EdgeSAM/resolve/main/weights/edge_sam.pth",
        input=1024,
        licence="S-Lab-1.0: non-commercial use only",
        note="rates masks by their stability",
        millions=9.6,
        gmacs=20.05,
        score=_WITH_VITDET.format(42.1),
    )
    for size, file, millions, gmacs, score in (
        ("ti", "efficient_sam_vitt.pt", 10.2, 102.27, "COCO mask AP 42.3 with ViTDet boxes (EfficientSAM, Table 5)"),
        ("s", "efficient_sam_vits.pt.zip", 26.4, 245.62, _WITH_VITDET.format(44.4)),
    ):
        rows[f"efficient-sam-{size}"] = Row(
            "depthseg.models.efficient_sam:build",
            {"variant": size},
            file,
            url=f"{_RAW}/yformer/EfficientSAM/main/weights/{file}",
            input=1024,
            licence="Apache-2.0",
            note="takes no notice of negative points, and at most six points in a prompt, of which a box is two",
            millions=millions,
            gmacs=gmacs,
            score=score,
        )
    for size, megabytes, millions, gmacs, score in (
        ("s", 23.7, 11.8, 51.09, ""),
        ("x", 144.0, 71.8, 419.75, "COCO mask AP 37.9 with ViTDet boxes (EfficientSAM, Table 5)"),
    ):
        rows[f"fastsam-{size}"] = Row(
            "depthseg.fast_sam:build",
            {"variant": size},
            f"FastSAM-{size}.pt",
            url=f"{_ULTRALYTICS}/FastSAM-{size}.pt",
            megabytes=megabytes,
            input=1024,
            licence="AGPL-3.0",
            note="chooses among the masks that it finds without a prompt; needs the extra yolo",
            millions=millions,
            gmacs=gmacs,
            score=score,
        )
    return rows


def _depths() -> dict[str, Row]:
    file = "nano/nano-depth-estimator.safetensors"
    rows = {"nano": Row("depthseg.depth:NanoDepth", file=file, input=256, licence=_NANO, role="depth", millions=2.6)}
    for version, owner, prefix in (
        ("v2", "depth-anything", "Depth-Anything-V2-{}-hf"),
        ("v1", "LiheYoung", "depth-anything-{}-hf"),
    ):
        for size, millions in (("small", 24.8), ("base", 97.5), ("large", 335.3)):  # as Depth Anything V2's page says
            name = size.capitalize() if version == "v2" else size
            free = version == "v1" or size == "small"
            rows[f"depth-anything-{version}-{size}"] = Row(
                "depthseg.depth:DepthAnything",
                hub=f"{owner}/{prefix.format(name)}",
                input=518,
                licence="Apache-2.0" if free else "CC-BY-NC-4.0",
                note="" if free else "non-commercial use only",
                role="depth",
                millions=millions,
            )
    return rows


_VITDET = {  # size, data, cascade -> run and file and box AP as detectron2's projects/ViTDet says; parameters without the mask head
    ("b", "coco", True): ("f325358525/model_final_435fa9.pkl", 141.5, 54.0),
    ("l", "coco", True): ("f328021305/model_final_1a9f28.pkl", 362.3, 57.6),
    ("h", "coco", True): ("f328730692/model_final_f05665.pkl", 693.8, 58.7),
    ("b", "lvis", True): ("329226874/model_final_df306f.pkl", 145.0, 43.0),
    ("l", "lvis", True): ("329042206/model_final_3e81c2.pkl", 365.8, 49.2),
    ("h", "lvis", True): ("332552778/model_final_11bbb7.pkl", 697.3, 51.5),
    ("b", "coco", False): ("f325346929/model_final_61ccd1.pkl", 111.2, 51.6),
    ("l", "coco", False): ("f325599698/model_final_6146ed.pkl", 332.0, 55.5),
    ("h", "coco", False): ("f329145471/model_final_7224f1.pkl", 663.6, 56.7),
    ("b", "lvis", False): ("329225748/model_final_5251c5.pkl", 117.0, 40.2),
    ("l", "lvis", False): ("329211570/model_final_021b3a.pkl", 337.8, 46.1),
    ("h", "lvis", False): ("332434656/model_final_866730.pkl", 669.3, 49.1),
}


def _detectors() -> dict[str, Row]:
    detect = "depthseg.detect"
    rows = {
        "nano": Row(
            f"{detect}.nano:NanoBoxes",
            file="nano/nano-boxes.safetensors",
            input=256,
            licence=_NANO,
            role="detector",
            overlap="share",
            confidence=0.3,
            millions=2.8,
        ),
        "grid": Row("depthseg.prompts:grid", note="everything mode: a grid of points, no boxes", role="detector", overlap="iou"),
    }
    for size, millions, ap in (("n", 3.2, 37.3), ("s", 11.2, 44.9), ("m", 25.9, 50.2), ("l", 43.7, 52.9), ("x", 68.2, 53.9)):
        rows[f"yolov8{size}"] = Row(
            f"{detect}.yolo:Yolo",
            file=f"yolov8{size}.pt",
            url=f"https://github.com/ultralytics/assets/releases/download/v8.3.0/yolov8{size}.pt",
            input=640,
            licence="AGPL-3.0",
            role="detector",
            classes="coco",
            millions=millions,
            score=f"COCO box AP {ap} (ultralytics)",
        )
    for size, data, megabytes, published in (
        ("nano", "coco", 15.3, None),
        ("small", "obj2coco", 41.5, 50.7),
        ("medium", "obj2coco", 78.7, 55.1),
        ("large", "obj2coco-e25", 126, 57.1),
        ("xlarge", "obj2coco", 252, 59.3),
    ):
        rows[f"dfine-{size}"] = Row(
            f"{detect}.hub:HubDetector",
            hub=f"ustc-community/dfine-{size}-{data}",
            megabytes=megabytes,
            input=640,
            licence="Apache-2.0",
            role="detector",
            classes="coco",
            millions=round(megabytes / 4.03),  # its file holds little else, in fp32
            score=f"COCO box AP {published} (D-FINE)" if published else "",
        )
    for depth, millions, ap in ((18, 20, 48.1), (34, 31, 49.9), (50, 42, 53.4), (101, 76, 54.3)):
        rows[f"rtdetrv2-r{depth}"] = Row(
            f"{detect}.hub:HubDetector",
            hub=f"PekingU/rtdetr_v2_r{depth}vd",
            input=640,
            licence="Apache-2.0",
            role="detector",
            classes="coco",
            millions=millions,
            score=f"COCO box AP {ap} (RT-DETRv2)",
        )
    words = "finds what --text or --classes names"
    seen = "; trained on COCO too, so its COCO numbers are not zero-shot"
    reader = Row(f"{detect}.grounding:GroundingDino", input=800, licence="Apache-2.0", role="detector", reads=True)
    zero_shot = "COCO box AP 48.4, zero-shot (Grounding DINO)"
    rows["groundingdino-tiny"] = replace(
        reader,
        hub="IDEA-Research/grounding-dino-tiny",
        note=words,
        millions=172.3,
        score=zero_shot,
    )
    rows["groundingdino-base"] = replace(reader, hub="IDEA-Research/grounding-dino-base", note=words + seen, millions=232.3)
    for size, score in (("tiny", "COCO box AP 50.6, LVIS 31.9, both zero-shot (MM-Grounding-DINO)"), ("base", "")):
        hub = f"openmmlab-community/mm_grounding_dino_{size}_o365v1_goldg_v3det"
        rows[f"mm-groundingdino-{size}"] = replace(reader, hub=hub, note=words, score=score)
    extra = "; needs the extra groundingdino"
    for size, config, release, note, millions, score in (
        ("swint", "GroundingDINO_SwinT_OGC", "v0.1.0-alpha/groundingdino_swint_ogc.pth", words + extra, 172.8, zero_shot),
        ("swinb", "GroundingDINO_SwinB_cfg", "v0.1.0-alpha2/groundingdino_swinb_cogcoor.pth", words + seen + extra, 0, ""),
    ):
        rows[f"groundingdino-{size}-original"] = replace(
            reader,
            build=f"{detect}.original:OriginalGroundingDino",
            args={"config": config, "words": rows["groundingdino-tiny"].hub},
            file=release.rpartition("/")[2],
            url=f"https://github.com/IDEA-Research/GroundingDINO/releases/download/{release}",
            note=note,
            millions=millions,
            score=score,
        )
    for (size, data, cascade), (path, millions, ap) in _VITDET.items():
        stem = "vitdet" if cascade else "vitdet-single"
        kind = "cascade_mask_rcnn" if cascade else "mask_rcnn"
        rows[f"{stem}-{size}-{data}"] = Row(
            f"{detect}.vitdet:ViTDet",
            {"variant": size, "data": data, "cascade": cascade},
            file=f"{stem}_{size}_{data}.pkl",
            url=f"https://dl.fbaipublicfiles.com/detectron2/ViTDet/{data.upper()}/{kind}_vitdet_{size}/{path}",
            input=1024,
            licence="CC-BY-SA-3.0",  # of detectron2's model zoo, whose page for ViTDet names none of its own
            role="detector",
            classes=data,
            millions=millions,
            score=f"{data.upper()} box AP {ap} (detectron2)",
        )
    for short, name in (("yolov8", "yolov8x"), ("groundingdino", "groundingdino-tiny"), ("vitdet", "vitdet-h-coco")):
        rows[short] = replace(rows[name], note=f"the same as {name}")
    return rows


def _pinned(rows: dict[str, Row]) -> dict[str, Row]:
    """The rows with hash, commit and size of what is fetched."""

    def pin(entry: Row) -> Row:
        key = entry.file or entry.hub or ""
        megabytes = entry.megabytes or MEGABYTES.get(key, 0)
        return replace(entry, sha256=SHA256.get(key), revision=REVISIONS.get(entry.hub or ""), megabytes=megabytes)

    return {name: pin(entry) for name, entry in rows.items()}


MODELS = _pinned(_models() | _systems())
DEPTHS = _pinned(_depths())
DETECTORS = _pinned(_detectors())
BOXES = {  # what the published tables of EfficientViT-SAM were made with: detections of COCO val2017 and LVIS val, for --boxes
    name: Row(
        "",
        file=f"{name}.json",
        hub=_OFFICIAL,
        inside=f"source_json_file/{name}.json",
        licence="Apache-2.0",
        megabytes=megabytes,
        role="boxes",
    )
    for name, megabytes in (("coco_vitdet", 38.1), ("coco_yolov8", 43.9), ("coco_groundingdino", 236), ("lvis_vitdet", 1310))
}
TABLES = {"model": MODELS, "depth": DEPTHS, "detector": DETECTORS, "boxes": BOXES}


def row(table: dict[str, Row], name: str, what: str) -> Row:
    """The row called `name`; an unknown name is refused with the nearest ones. `what` is the word for the message."""
    if name in table:
        return table[name]
    near = difflib.get_close_matches(name, table, n=3, cutoff=0.4)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Known names: {', '.join(table)}."
    raise DepthsegError(f"no {what} is called '{name}'", hint)


def pullable(name: str) -> Row:
    """The row called `name`, whatever its role; `nano` is the segmenter."""
    every: dict[str, Row] = {}
    for table in TABLES.values():
        every |= {k: v for k, v in table.items() if k not in every}
    return row(every, name, "set of weights")


def embedded() -> Path:
    """The folder of the weights that come with the package: inside the wheel, or at the root of a checkout."""
    inside = Path(__file__).parent / "weights"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "weights"


def cache() -> Path:
    """The user's folder for pulled weights: $DEPTHSEG_WEIGHTS, else depthseg/ in the user's cache folder."""
    if chosen := os.environ.get("DEPTHSEG_WEIGHTS"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "depthseg"


def find(entry: Row) -> Path | None:
    """Where this row's weight file lies on this machine, or None. Never asks the network."""
    if entry.file is None:
        return None
    for folder in (cache(), embedded()):
        if (folder / entry.file).is_file():
            return folder / entry.file
    return None


def require(entry: Row, name: str) -> Path:
    """Like `find`, but a missing file is an error that names the ways out (exit code 5)."""
    if path := find(entry):
        return path
    raise missing(f"the weights of {name} ({entry.file}) are not on this machine", entry.role)


def missing(message: str, role: str) -> DepthsegError:
    """The error for weights that are not here, with the ways out for this role."""
    return DepthsegError(message, f"Ways out: {WAYS[role]}.", MISSING_PIECE)


def wordless() -> DepthsegError:
    """The error for a detector that reads and was given nothing to read."""
    return DepthsegError("Grounding DINO has to be told what to look for", 'Add --text "a cat . a dog ." or --classes coco.')


def there(path: str | Path, what: str, role: str) -> Path:
    """The path, if there is a file; libraries would otherwise try to download what is missing."""
    if not Path(path).is_file():
        raise missing(f"the weights of {what} are not at {path}", role)
    return Path(path)


def terms(chosen: dict[str, Row]) -> list[str]:
    """What a user must know about the rows that are used, equal terms together. Keys are the words for the rows."""
    pieces: dict[str, list[str]] = {}
    for name, entry in chosen.items():
        for text in (f"licence {entry.licence}" if entry.licence not in FREE_LICENCES else "", entry.note):
            if text:
                pieces.setdefault(text, []).append(name)
    return [f"{', '.join(names)}: {text}" for text, names in pieces.items()]


def resolve(entry: Row) -> Any:
    """The function or class that builds this row: the one step upward in the import order, by dotted name."""
    module, _, name = entry.build.partition(":")
    return getattr(importlib.import_module(module), name)


def load(name: str, weights: str | Path | None = None) -> Any:
    """The segmentation network called `name`, in eval mode on the CPU, with its weights loaded.

    weights: a checkpoint (official .pt or our .safetensors) instead of the row's own file.
    Raises DepthsegError for an unknown name, a missing file (code 5) or a checkpoint that does not fit.
    """
    entry = row(MODELS, name, "model")
    path = Path(weights) if weights else require(entry, name)
    network = resolve(entry)(**entry.args)
    importlib.import_module("depthseg.models.checkpoint").load_into(network, path)
    return network.eval()
