"""Depth for images: DepthAnything, our own network, or a folder of maps; and the cache on disk.

Each class is called with a list of images and gives one float32 array (h', w') each: relative inverse depth in 0..1, near is 1,
at any resolution of the same view. `normalise` is the one place that decides what these numbers are, for training and inference.
torch and transformers are imported in the constructor that needs them, after it has looked for the weights.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path, PurePosixPath
from tokenize import TokenError
from typing import Any, NamedTuple

import numpy as np
from PIL import Image as PILImage
from scipy.ndimage import distance_transform_edt

from depthseg import catalog, weights
from depthseg.data import Failure, Unreadable, alike, not_written, read, read_ahead, upright_size
from depthseg.errors import DepthsegError
from depthseg.formats import PACK, atomic
from depthseg.pretrained import load, of_tensors
from depthseg.schema import Array, Depth, Frame, Image

SPIKES = 0.001  # share of the pixels that is clipped at either end
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, TokenError, PILImage.DecompressionBombError)  # what Pillow and NumPy raise
_FORMATS = ("PNG", "TIFF")  # Pillow would run Ghostscript for an EPS called .png
BETTER_DEPTH = "depth-anything-v2-small"  # than nano
STEPS = 65535  # depth is a multiple of 1/65535, so that 16-bit PNG holds it without loss


def normalise(inverse: Array, valid: Array | None = None) -> Array:
    """Inverse depth on any scale (h, w) -> float32 0..1, near is 1, in steps of 1/65535. Training and inference both use it.

    Per image, the lowest value becomes 0 and the highest 1, as in DepthAnything's scripts, but one pixel in a thousand is clipped
    at either end: one pixel of 1 mm in a sensor's map would otherwise push all others to 0. Not more, because a small object on a
    plane is few pixels too. Only finite pixels, and of these only `valid` ones, count; the others take the nearest one's value.
    A constant image, and one without a valid pixel, is all 0. Normalising again changes nothing.
    """
    good = np.isfinite(inverse) if valid is None else np.isfinite(inverse) & valid
    values = inverse[good].astype(np.float64)
    if not len(values):
        return np.zeros(inverse.shape, np.float32)
    k = int(SPIKES * (len(values) - 1))
    low, high = np.partition(values, (k, len(values) - 1 - k))[[k, -1 - k]]
    if low == high:  # all but a few pixels are equal: then the few are what there is to see
        low, high = values.min(), values.max()
    out = np.zeros(inverse.shape)
    if low < high:
        out[good] = (np.clip(values, low, high) - low) / (high - low)
    if not good.all():
        out = out[tuple(distance_transform_edt(~good, return_distances=False, return_indices=True))]
    return _from_16_bit(_to_16_bit(out))


def _to_16_bit(depth: Array) -> Array:
    return np.round(depth * STEPS).astype(np.uint16)


def _from_16_bit(stored: Array) -> Array:
    return stored.astype(np.float32) / np.float32(STEPS)


# ---- DepthAnything ----


class DepthAnything:
    """DepthAnything V1 or V2 through transformers, from a folder or from the Hugging Face cache; never from the network.

    Images of equal size go through the network together, at most `batch` of them. A metric variant is inverted.
    OpenVINO answers as torch but where the input is one row or column of patches, by default about 50 times as long as wide: it scales the
    position embedding otherwise then.
    """

    SIDE = 518  # pixels of the shorter side, as trained
    LONGEST = 1036  # of the longer side: panoramas become smaller as a whole, or the memory would have no bound
    PATCH = 14  # both sides are multiples of it
    MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # ImageNet, RGB in 0..1
    STD = np.array([0.229, 0.224, 0.225], np.float32)
    side: int | None = None  # another SIDE

    def __init__(self, repo_or_folder: str | Path, device: Any = "cpu", precision: str = "fp32", backend: str = "torch", batch: int = 4):
        folder = Path(repo_or_folder) if Path(repo_or_folder).is_dir() else weights.hub_folder(str(repo_or_folder))
        if folder is None or not all((folder / name).is_file() for name in weights.HUB_NEEDED):
            raise catalog.missing(f"the weights of {repo_or_folder} are not on this machine", "depth")
        network = load("DepthAnythingForDepthEstimation", folder, ("depth_anything",), "depth")
        import torch

        from depthseg import backends

        class Head(torch.nn.Module):
            """The network's head; traced, transformers' own would keep the size of the first map, of which it makes plain numbers."""

            def __init__(self) -> None:
                super().__init__()
                self.of = network.head

            def forward(self, features: Any, rows: Any, columns: Any) -> Any:
                of = self.of
                size = rows * of.patch_size, columns * of.patch_size
                x = torch.nn.functional.interpolate(of.conv1(features[of.head_in_index]), size, mode="bilinear", align_corners=True)
                return (of.activation2(of.conv3(of.activation1(of.conv2(x)))) * of.max_depth).squeeze(1)

        network.head = Head()
        self.device, self.precision, self.batch = torch.device(device), precision, batch
        self._metric = network.config.depth_estimation_type == "metric"
        self._network = backends.ready(of_tensors(network, "predicted_depth"), backend, precision, self.device)

    def __call__(self, images: list[Image]) -> list[Array]:
        return alike(images, lambda image: self._size(*image.size), self._of_one_size)

    def _of_one_size(self, images: list[Image], size: tuple[int, int]) -> list[Array]:
        import torch

        from depthseg.numerics import inference

        out: list[Array] = []
        for start in range(0, len(images), self.batch):
            x = torch.from_numpy(np.stack([self._input(image, size) for image in images[start : start + self.batch]])).to(self.device)
            with inference(self.device, self.precision):
                depth = self._network(x).float().cpu().numpy()  # (B, h', w'), larger is nearer
            out += [normalise(_inverse(d), d > 0) if self._metric else normalise(d) for d in depth]
        return out

    def _size(self, h: int, w: int) -> tuple[int, int]:
        """Height and width of the network's input for an image of h x w."""
        scale = min((self.side or self.SIDE) / min(h, w), self.LONGEST / max(h, w))
        return tuple(max(1, round(side * scale / self.PATCH)) * self.PATCH for side in (h, w))  # type: ignore[return-value]

    def _input(self, image: Image, size: tuple[int, int]) -> Array:
        """The normalised picture (3, h, w)."""
        small = PILImage.fromarray(np.asarray(image.pixels)).resize(size[::-1], PILImage.Resampling.BICUBIC)
        return ((np.asarray(small, np.float32) / 255 - self.MEAN) / self.STD).transpose(2, 0, 1)


def _inverse(depth: Array) -> Array:
    """1 / depth in float64, and 0 where depth is not above 0."""
    return np.divide(1, depth, out=np.zeros(depth.shape), where=depth > 0, dtype=np.float64)


# ---- our own network ----


class NanoDepth:
    """Our own estimator of models/depthnet.py, which comes with the package."""

    def __init__(self, path: str | Path, device: Any = "cpu", precision: str = "fp32", backend: str = "torch"):
        if not Path(path).is_file():
            raise catalog.missing(f"the weights of the nano depth estimator are not at {path}", "depth")
        import torch

        from depthseg import backends
        from depthseg.models.depthnet import DepthNet

        self.device, self.precision, self._side = torch.device(device), precision, DepthNet.side
        self._network = backends.ready(DepthNet.load(Path(path)), backend, precision, self.device)

    def __call__(self, images: list[Image]) -> list[Array]:
        import torch

        from depthseg.numerics import inference

        if not images:
            return []
        frames = [Frame(image.size, self._side) for image in images]
        x = torch.from_numpy(np.stack([f.image(np.asarray(image.pixels)) for f, image in zip(frames, images)])).to(self.device)
        with inference(self.device, self.precision):
            inverse = self._network(x).float().cpu().numpy()  # (B, side / 2, side / 2), scale and shift without meaning
        return [normalise(y[: max(1, h // 2), : max(1, w // 2)]) for y, (h, w) in zip(inverse, (f.inner for f in frames))]


# ---- maps from a folder ----


class DepthFolder:
    """Depth maps made elsewhere. The map of sub/a.jpg is sub/a.jpg.png or sub/a.png, or the same with .tif, .tiff or .npy.

    What a map means follows from its numbers, unless `kind`, or {"kind": ...} in depth.json in the folder, says it:

    ====================  =========  ==========================================
    numbers               kind       holes
    ====================  =========  ==========================================
    8-bit                 inverse    none; bright is near
    16-bit, 32-bit        metric     0; millimetres, or any other unit
    float                 metric     0, negative, NaN, infinite; metres, or any
    ====================  =========  ==========================================

    "inverse" is larger for nearer, on any scale, with NaN and infinite as holes; "metric" is the distance, in any unit: it
    becomes 1 / distance, and only the relief counts. Grey pictures saved as RGB are taken, coloured ones are not depth.
    """

    SUFFIXES = (".png", ".tif", ".tiff", ".npy")

    def __init__(self, root: str | Path, kind: str = "auto"):
        self.root = Path(root)
        if not self.root.is_dir():
            raise DepthsegError(f"no such folder of depth maps: {root}", "Check --depth.")
        if kind == "auto" and (note := self.root / "depth.json").is_file():
            try:
                kind = json.loads(note.read_bytes())["kind"]
            except (ValueError, TypeError, KeyError) as e:
                raise DepthsegError(f'{note} does not say {{"kind": "metric"}} or {{"kind": "inverse"}}', "Correct the file.") from e
        if kind not in ("auto", "inverse", "metric"):
            raise DepthsegError(f"'{kind}' is no kind of depth map", "Use inverse, metric or auto.")
        self.kind = kind

    def __call__(self, images: list[Image]) -> list[Array]:
        return [self._one(image) for image in images]

    def check(self, images: Sequence[Image]) -> None:
        """Raise DepthsegError unless every readable image has a map of its shape. Reads headers, hardly any pixels."""
        wrong: list[tuple[Image, DepthsegError]] = []
        for image in images:
            try:
                seen = replace(image, size=upright_size(image))
                path = self._find(image)
                self._fit(path, _shape(path), seen)
            except Unreadable:
                pass  # it will be a failure of its own
            except DepthsegError as error:
                wrong.append((image, error))
        for at, (image, first) in enumerate(wrong):
            with suppress(Unreadable):
                if image.path is not None:
                    read(image)  # a picture that is broken behind its header has no map for that reason
                raise DepthsegError(f"{first.message} ({len(wrong) - at} of {len(images)} images lack a fitting map)", first.hint)

    def _one(self, image: Image) -> Array:
        path = self._find(image)
        stored = _read_map(path)
        self._fit(path, stored.shape, image)
        kind = self.kind if self.kind != "auto" else "inverse" if stored.dtype == np.uint8 else "metric"
        if kind == "inverse":
            return normalise(stored)
        return normalise(_inverse(stored), np.isfinite(stored) & (stored > 0))

    def _find(self, image: Image) -> Path:
        stem = str(PurePosixPath(image.key).with_suffix(""))
        tried = [name + suffix for name in (image.key, stem) for suffix in self.SUFFIXES]
        path = next((self.root / name for name in tried if os.path.isfile(self.root / name)), None)
        if path is None:
            raise DepthsegError(f"no depth map for {image.key} in {self.root}", f"Tried {', '.join(tried)}.")
        return path

    def _fit(self, path: Path, shape: tuple[int, ...], image: Image) -> None:
        (h, w), (mh, mw) = image.size, shape
        if abs(mw * h / (mh * w) - 1) > 0.02 + 1 / min(mh, mw):  # the sides of a map are whole pixels
            raise DepthsegError(
                f"{path} is {mw} x {mh} pixels, but its image {image.key} is {w} x {h}: another aspect ratio",
                "A depth map shows the same view as its image, at any resolution.",
            )


def _shape(path: Path) -> tuple[int, int]:
    """Height and width of a depth map, from its header."""
    try:
        if path.suffix == ".npy":
            h, w = np.load(path, mmap_mode="r", allow_pickle=False).shape[:2]
        else:
            with PILImage.open(path, formats=_FORMATS) as picture:
                w, h = picture.size
    except _BROKEN as e:
        raise _unreadable(path, e) from e
    if not h * w:
        raise _unreadable(path, ValueError("no pixels"))
    return h, w


def _unreadable(path: Path, error: Exception) -> DepthsegError:
    return DepthsegError(f"{path} is not a readable depth map ({str(error)[:120]})", "Save it as PNG, TIFF or NPY.")


def _read_map(path: Path) -> Array:
    """The numbers of a depth map (h, w) as they are stored."""
    try:
        if path.suffix == ".npy":
            stored = np.load(path, allow_pickle=False)
        else:
            with PILImage.open(path, formats=_FORMATS) as picture:
                palette = picture.mode == "P"  # numbers are colours then
                stored = np.asarray(picture)
    except _BROKEN as e:
        raise _unreadable(path, e) from e
    if stored.ndim == 3 and stored.shape[2] == 3 and (stored == stored[..., :1]).all():
        stored = stored[..., 0]
    if stored.ndim != 2 or not stored.size or stored.dtype.kind not in "uif" or (path.suffix != ".npy" and palette):
        raise DepthsegError(
            f"{path} is no depth map: one number for each pixel is expected, not {stored.dtype} of shape {stored.shape}",
            "Coloured pictures of depth cannot be read back: save the numbers.",
        )
    return stored


def maps_of(*folders: str | None) -> str:
    """Which estimators made the maps of folders and packs, as their depth.json or pack.json say; "" where nothing is said."""
    names = set()
    for folder in filter(None, folders):
        for file, key in (("depth.json", "estimator"), (PACK, "maps")):
            with suppress(OSError, ValueError, AttributeError):
                names.add(str(json.loads((Path(folder) / file).read_bytes()).get(key, "")))
    return ", ".join(sorted(names - {""}))


# ---- the cache ----


class Cached:
    """Another depth estimator with its answers kept in a folder, as 16-bit PNG by the pixels and `name`.

    The first and all later runs give the same numbers, because the answer is rounded to 1/65535 before it is used. Only for
    estimators that look at nothing but the pixels. Processes may share the folder; a damaged file is computed again.
    """

    def __init__(self, depth: Depth, folder: Path, name: str):
        self.depth, self.folder, self.name = depth, folder, name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise DepthsegError(f"the depth cache {folder} cannot be made ({e.strerror})", "Set DEPTHSEG_WEIGHTS to a folder.") from e

    def __call__(self, images: list[Image]) -> list[Array]:
        paths = [self._path(image) for image in images]
        stored = [self._read(path) for path in paths]
        missing = [at for at, s in enumerate(stored) if s is None]
        if missing:
            for at, depth in zip(missing, self.depth([images[at] for at in missing])):
                stored[at] = new = _to_16_bit(depth)
                self._write(paths[at], new)
        return [_from_16_bit(s) for s in stored if s is not None]

    def _path(self, image: Image) -> Path:
        assert image.pixels is not None
        digest = hashlib.sha1(f"{self.name} {image.pixels.shape} ".encode())
        digest.update(np.ascontiguousarray(image.pixels).data)
        return self.folder / f"{digest.hexdigest()}.png"

    def _read(self, path: Path) -> Array | None:
        try:
            with PILImage.open(path, formats=_FORMATS) as picture:
                stored = np.asarray(picture)
        except _BROKEN:  # not there, or damaged
            return None
        return stored if stored.ndim == 2 and stored.dtype == np.uint16 else None

    def _write(self, path: Path, stored: Array) -> None:
        part = path.with_suffix(f".{os.getpid()}.part")
        try:
            PILImage.fromarray(stored).save(part, "PNG", compress_level=1)
            os.replace(part, path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise


# ---- choosing one ----


class ChosenDepth(NamedTuple):
    """A depth estimator, ready to use."""

    name: str  # its row in catalog.DEPTHS
    estimator: Depth
    file: Path | None  # of its weights, if they are one file
    note: str  # for the user


def depth_estimator(choice: str, device: Any, precision: str, pull: bool, backend: str = "torch", side: int | None = None) -> ChosenDepth:
    """The estimator that a choice means: auto is Depth Anything V2 Small where it is here, or may be fetched, else nano.

    Slow ones keep their answers below the user's cache. side: pixels of the shorter side of Depth Anything's input, instead of 518.
    """
    name = choice if choice != "auto" else BETTER_DEPTH if pull or weights.find(catalog.DEPTHS[BETTER_DEPTH]) else "nano"
    entry = catalog.row(catalog.DEPTHS, name, "depth estimator")
    better = "" if choice != "auto" or name == BETTER_DEPTH else f" (embedded); for better maps: --depth {BETTER_DEPTH} --pull"
    path = weights.locate(entry, name, pull)
    built = catalog.resolve(entry)(path, device, precision, backend)
    if side is not None:
        if not isinstance(built, DepthAnything):
            raise DepthsegError(f"the depth estimator {name} has one input size", "Leave --depth-side out.")
        built.side = side
    about = f"{name} {precision}{'' if backend == 'torch' else ' ' + backend}{f' {side}' if side else ''}"
    estimator = built if path.is_file() else Cached(built, catalog.cache() / "depth", about)
    return ChosenDepth(name, estimator, path if path.is_file() else None, f"depth: {name}{better}")


# ---- making a folder of maps ----


def write_maps(
    images: Sequence[Image], depth: Depth, name: str, output: Path, batch: int, progress: Callable[[int, int], None]
) -> list[Failure]:
    """Write the depth map of every image as 16-bit PNG, `output`/<key>.png, near is bright, for DepthFolder to read back.

    name: of the estimator; a folder with maps of another one, or with anything else in it, is refused with DepthsegError.
    Maps that are there already are left alone. Returns the images that could not be read, or whose map could not be written.
    """
    _claim(output, name)
    todo = [image for image in images if not os.path.exists(output / f"{image.key}.png")]
    failed: list[Failure] = []
    done = len(images) - len(todo)
    stream = read_ahead(todo, workers=1, ahead=max(2, batch))
    while held := list(islice(stream, batch)):
        failed += [item for item in held if isinstance(item, Failure)]
        good = [item for item in held if isinstance(item, Image)]
        for image, found in zip(good, depth(good)):
            try:
                with atomic(output / f"{image.key}.png") as part:
                    PILImage.fromarray(_to_16_bit(_in_shape(found, image.size))).save(part, "PNG")
            except OSError as error:
                failed.append(not_written(image, error))
        done += len(held)
        progress(done, len(images))
    return failed


def _claim(output: Path, name: str) -> None:
    """See to it that the folder holds nothing but maps of the estimator called `name`, and says so in depth.json."""
    note = output / "depth.json"
    try:
        says = json.loads(note.read_bytes())
        theirs = says["estimator"] if says["kind"] == "inverse" else None
    except FileNotFoundError:
        output.mkdir(parents=True, exist_ok=True)
        if any(not path.name.startswith(".") for path in output.iterdir()):
            raise DepthsegError(f"{output} is not empty and holds no maps of ours", "Choose an empty or a new folder.") from None
        with atomic(note) as part:
            part.write_text(json.dumps({"kind": "inverse", "estimator": name}) + "\n")
        return
    except (ValueError, KeyError, TypeError):
        theirs = None
    if theirs != name:
        raise DepthsegError(f"{output} holds maps of {theirs or 'another source'}, not of {name}", "Choose an empty or a new folder.")


def _in_shape(depth: Array, size: tuple[int, int]) -> Array:
    """The map at the aspect of an image of `size` (h, w): its long side stays."""
    h, w = (max(1, round(side * max(depth.shape) / max(size))) for side in size)
    if depth.shape == (h, w):
        return depth
    return np.asarray(PILImage.fromarray(depth).resize((w, h), PILImage.Resampling.BILINEAR))
