"""Training samples in SA-1B's layout: `sa_N.jpg` beside `sa_N.json`, in folders or in tar archives (plain or gzip, as published).

Also reads EfficientViT's layout of them (`images/`, `masks/` and `sa_images_ids.txt`), packs of `data pack` (tars that hold depth, too),
a COCO instances file, whose pictures lie below its own folder, and RGB + depth pairs (`rgb/`, `depth/`, a manifest).
Knows nothing of crops, prompts or tensors.
"""

import csv
import glob
import io
import json
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image as PILImage

from depthseg import masks
from depthseg.data import decode, find
from depthseg.errors import NOTHING_TO_DO, DepthsegError
from depthseg.schema import Array, Image

IDS = "sa_images_ids.txt"  # of EfficientViT's layout


@dataclass(frozen=True)
class Entry:
    """Where one sample lies: files in a folder, or members (offset, bytes) of a tar."""

    key: str  # relative path of the picture, POSIX
    root: Path  # folder or archive
    source: str = ""  # where the picture came from, if a manifest.csv in the root says so
    image: tuple[int, int] | None = None  # offset and length inside the archive
    annotation: tuple[int, int] | None = None
    depth: tuple[int, int] | None = None  # likewise: a 16-bit PNG, near is bright
    masks: str = ""  # path of the annotation below the root, where it is not beside the picture
    segmentations: tuple[list | dict, ...] | None = None  # of a COCO file, which is read once
    size: tuple[int, int] | None = None  # h, w that it says the picture has


@dataclass(frozen=True)
class Sample:
    """pixels uint8 RGB (h, w, 3); one compressed RLE per mask."""

    key: str
    pixels: Array
    rles: list[dict]


def _unzipped(path: Path) -> Path:
    """The archive itself, or, since a gzip stream cannot be read at random, its unpacked copy beside it (made once)."""
    with path.open("rb") as f:
        if f.read(2) != b"\x1f\x8b":  # SA-1B's example archive is gzip in spite of its name
            return path
    plain = path.with_suffix(".unzipped.tar")
    if not plain.exists():
        import gzip
        import shutil

        part = plain.with_suffix(f".{os.getpid()}.part")  # processes of one training may meet here
        try:
            with gzip.open(path) as src, part.open("wb") as dst:
                shutil.copyfileobj(src, dst, 1 << 22)
            part.replace(plain)
        finally:
            part.unlink(missing_ok=True)
    return plain


def in_tar(path: Path) -> tuple[Path, dict[str, dict[str, tuple[int, int]]]]:
    """The archive itself, not zipped, and offset and bytes of its members by stem and kind: jpg, json or depth."""
    members: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        plain = _unzipped(path)
        with tarfile.open(plain, "r:") as tar:  # not xz or bzip2, in which no offset would be right
            for m in tar:
                stem, _, kind = m.name.rpartition(".")
                if kind == "png" and stem.endswith(".depth"):
                    stem, kind = stem.removesuffix(".depth"), "depth"
                if m.isfile() and kind in ("jpg", "json", "depth") and ".." not in stem.split("/"):  # a key also names a depth map
                    members.setdefault(stem, {})[kind] = (m.offset_data, m.size)
    except Exception as e:  # a dozen types from gzip, zlib and tarfile, for archives that are cut off or none
        raise DepthsegError(f"{path} is not a readable .tar archive ({e})", "The file may be cut off: fetch it again.") from e
    return plain, members


def _in_tar(path: Path) -> list[Entry]:
    plain, members = in_tar(path)
    return [
        Entry(f"{path.stem}/{stem}.jpg", plain, image=v["jpg"], annotation=v["json"], depth=v.get("depth"))
        for stem, v in sorted(members.items())
        if "jpg" in v and "json" in v
    ]


def _in_upstreams_layout(root: Path) -> list[Entry]:
    """`images/sa_N.jpg` and `masks/sa_N.json` for each N of `sa_images_ids.txt`, a number a line; a missing file is a broken sample."""
    try:
        numbers = (root / IDS).read_text().split()
    except (OSError, UnicodeError) as e:
        raise DepthsegError(f"{root / IDS} cannot be read ({e})", "It needs one number of an image a line.") from e
    if strange := [n for n in numbers if not n.isdecimal()]:
        raise DepthsegError(f"{root / IDS} holds '{strange[0][:40]}'", "It needs one number of an image a line.")
    return [Entry(f"images/sa_{n}.jpg", root, masks=f"masks/sa_{n}.json") for n in numbers]


def _in_coco(path: Path) -> list[Entry]:
    """The pictures of a COCO instances file that show an object, without crowd regions; the source is the file's name."""
    try:
        content = json.loads(path.read_bytes())
        segmentations: dict[int, list] = {}
        for a in content["annotations"]:
            if not a.get("iscrowd"):
                segmentations.setdefault(a["image_id"], []).append(a["segmentation"])
        rows = {i["id"]: i for i in content["images"]}
        sizes = {k: (i["height"], i["width"]) for k, i in rows.items() if "height" in i and "width" in i}
        return [
            Entry(rows[k]["file_name"], path.parent, path.name, segmentations=tuple(v), size=sizes.get(k)) for k, v in segmentations.items()
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise DepthsegError(f"{path} is not a COCO instances file ({type(e).__name__}: {e})", "It needs images and annotations.") from e


def _listed(manifest: Path) -> list[dict[str, str]]:
    try:
        with manifest.open(newline="", encoding="utf-8") as f:
            return list(csv.DictReader(f, restval=""))
    except (OSError, ValueError, csv.Error) as e:
        raise DepthsegError(f"{manifest} is not a CSV file ({e})", "It needs a line of column names.") from e


def index(roots: list[Path]) -> list[Entry]:
    """All samples below the roots (folders, .tar files themselves, or COCO instances files), in a fixed order.

    Raises DepthsegError when a root is missing or holds no pair of picture and annotation.
    """
    out: list[Entry] = []
    for root in roots:
        if not root.exists():
            raise DepthsegError(f"no such data folder: {root}", "Pass --data with a folder or a .tar in SA-1B's layout.")
        sources = {}
        manifest = root.parent / "manifest.csv"  # lists files relative to itself: train/sa_000000/sa_1.jpg
        if root.is_dir() and manifest.exists():
            sources = {r["file"]: r.get("source_repo", "") for r in _listed(manifest) if "file" in r}
        found = []
        if root.is_file():
            found = _in_coco(root) if root.suffix == ".json" else _in_tar(root)
        elif (root / IDS).is_file():
            found = _in_upstreams_layout(root)
        else:
            for annotation in sorted(root.rglob("sa_*.json")):
                picture = annotation.with_suffix(".jpg")
                if picture.exists():
                    key = picture.relative_to(root).as_posix()
                    found.append(Entry(key, root, sources.get(f"{root.name}/{key}", "")))
            for tar in tars(root):
                found += _in_tar(tar)
        if not found:
            raise DepthsegError(
                f"no sample in {root}", "Expected pairs sa_N.jpg and sa_N.json, in folders or in .tar archives.", NOTHING_TO_DO
            )
        out += found
    return out


def tars(root: Path) -> list[Path]:
    """The archives below a folder, or the one that it is."""
    if root.is_file():
        return [root] if root.suffix == ".tar" else []
    return sorted(t for t in root.rglob("*.tar") if not t.name.endswith(".unzipped.tar"))


def picture(entry: Entry) -> Image:
    """A sample's picture, not read."""
    return Image(entry.key, 0, entry.root / entry.key if entry.image is None else entry.root, (0, 0), span=entry.image)


def pictures(paths: Sequence[str | Path], exclude: Path | None = None) -> list[Image]:
    """Like `data.find`, and the pictures in tars too: in those that are named, and below folders in those called as SA-1B's are."""
    found: list[Path] = []
    for path in map(str, paths):
        if path.endswith(".tar"):
            found += [Path(p) for p in sorted(glob.glob(path)) or [path]]
        elif Path(path).is_dir():
            found += [tar for tar in tars(Path(path)) if tar.name.startswith("sa_")]
    packed = [picture(e) for tar in found for e in _in_tar(tar)]
    plain = [p for p in paths if not str(p).endswith(".tar")]
    try:
        return (find(plain, exclude=exclude) if plain else []) + packed
    except DepthsegError as error:
        if packed and error.code == NOTHING_TO_DO:
            return packed
        raise


def _bytes(entry: Entry, suffix: str, where: tuple[int, int] | None) -> bytes:
    if where is None:
        picture = entry.root / entry.key
        path = picture if suffix == ".jpg" else entry.root / entry.masks if entry.masks else picture.with_suffix(suffix)
        if not path.is_file():  # a device or a pipe would be read for ever
            raise ValueError("no such file")
        return path.read_bytes()
    with entry.root.open("rb") as f:
        f.seek(where[0])
        return f.read(where[1])


def load(entry: Entry) -> Sample:
    """The picture and its masks, decoded and checked against each other. Raises ValueError naming the sample."""
    try:
        pixels, size = decode(io.BytesIO(_bytes(entry, ".jpg", entry.image)))  # upright, as inference sees it
        if entry.size and entry.size != size:  # polygons have no size of their own
            raise ValueError(f"it has {size[1]} x {size[0]} pixels, its annotations say {entry.size[1]} x {entry.size[0]}")
        if entry.segmentations is not None:
            return Sample(entry.key, pixels, [masks.of_coco(s, size) for s in entry.segmentations])
        rles = [a["segmentation"] for a in json.loads(_bytes(entry, ".json", entry.annotation))["annotations"]]
        if any(tuple(r["size"]) != size for r in rles):
            raise ValueError(f"masks of another size than the picture {size}")
        return Sample(entry.key, pixels, [masks.of_coco(r, size) for r in rles])
    except Exception as e:  # broken pictures and masks raise a dozen types
        raise ValueError(f"{entry.key}: {e}") from e


def depth_of(entry: Entry) -> Array | None:
    """The depth map (h', w') float32 0..1 that lies in a pack beside the picture, None where there is none. Raises ValueError."""
    if entry.depth is None:
        return None
    try:
        stored = np.asarray(PILImage.open(io.BytesIO(_bytes(entry, ".png", entry.depth)), formats=("PNG",)))
        if stored.ndim != 2 or stored.dtype != np.uint16:
            raise ValueError("no 16-bit map")
    except (OSError, ValueError, SyntaxError) as e:
        raise ValueError(f"{entry.key}: its depth map cannot be read ({e})") from e
    return stored.astype(np.float32) / np.float32(65535)


@dataclass(frozen=True)
class DepthPair:
    """One RGB + depth file pair and how to read the depth."""

    rgb: Path
    depth: Path
    kind: str  # metric (larger is farther) or inverse (larger is nearer)
    scene: str


def depth_pairs(roots: list[Path]) -> list[DepthPair]:
    """Pairs listed in `manifest.csv` beside each root folder (columns rgb, depth, scene, optionally kind)."""
    out = []
    for root in roots:
        manifest = root.parent / "manifest.csv"
        if not manifest.exists():
            raise DepthsegError(f"no manifest.csv beside {root}", "Depth training needs a manifest with columns rgb, depth, scene.")
        for r in _listed(manifest):
            if not {"rgb", "depth", "scene"} <= r.keys():
                raise DepthsegError(f"{manifest} lacks a column", "Depth training needs a manifest with columns rgb, depth, scene.")
            if r["rgb"].startswith(root.name + "/"):
                kind = "metric" if r.get("kind", "metric") == "metric" else "inverse"
                out.append(DepthPair(root.parent / r["rgb"], root.parent / r["depth"], kind, r["scene"]))
    if not out:
        raise DepthsegError("no RGB and depth pairs found", "Check --data.", NOTHING_TO_DO)
    return out
