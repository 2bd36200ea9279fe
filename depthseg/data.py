"""Where pictures come from: files, folders, globs and lists become Images; reading turns an Image into upright RGB pixels.

Pillow is the only decoder. Every kind of picture (grey, 16 bit, palette, CMYK, transparent) becomes uint8 RGB by one rule each,
and what cannot be read raises Unreadable with the cause. Knows nothing of detectors, masks or output folders.
"""

import errno
import importlib.util
import io
import os
import stat
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from glob import has_magic, iglob
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
from PIL import BmpImagePlugin, GifImagePlugin, JpegImagePlugin, PngImagePlugin, PpmImagePlugin, TiffImagePlugin, WebPImagePlugin
from PIL import Image as PILImage

from depthseg.errors import GAVE_OUT, MISSING_PIECE, NOTHING_TO_DO, DepthsegError
from depthseg.schema import Array, Image

S = TypeVar("S")
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm")

# First bytes -> decoder. Image.open is not used: it measures by a global size limit (and warns), while `read` has its own.
_DECODERS: tuple[tuple[tuple[bytes, ...], Callable], ...] = (
    ((b"\xff\xd8\xff",), JpegImagePlugin.JpegImageFile),
    ((b"\x89PNG\r\n\x1a\n",), PngImagePlugin.PngImageFile),
    ((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), TiffImagePlugin.TiffImageFile),
    ((b"GIF87a", b"GIF89a"), GifImagePlugin.GifImageFile),
    ((b"RIFF",), WebPImagePlugin.WebPImageFile),
    ((b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"), PpmImagePlugin.PpmImageFile),
    ((b"BM",), BmpImagePlugin.BmpImageFile),
)
_SCANNED = 30_000_000_000  # pixels times scans of a progressive JPEG: about a minute; a camera's have ten scans
MOST_PIXELS = 300_000_000  # of a picture
_ORIENTATION = 0x0112  # EXIF tag; its values 2..8 are undone by these
_UPRIGHT = dict(enumerate(PILImage.Transpose[n] for n in (
    "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90")))  # fmt: skip

# What Pillow has to say about odd metadata would fill the terminal of a batch run; real failures are exceptions.
warnings.filterwarnings("ignore", module=r"PIL\.")


class Unreadable(ValueError):
    """A picture that cannot be decoded; the message is the cause, in one phrase."""


@dataclass(frozen=True)
class Failure:
    """An image that was given up, and where."""

    image: Image
    stage: str  # read, detect, depth, segment or write
    reason: str


OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # a full or read-only disk is no matter of one image


def gave_out(error: OSError) -> DepthsegError:
    """The error for an output folder that takes nothing any more."""
    again = "Mend that and run the same command again: it goes on, nothing that was done is lost."
    return DepthsegError(f"the output folder takes nothing any more ({error.strerror or error})", again, GAVE_OUT)


def not_written(image: Image, error: OSError) -> Failure:
    """The Failure of an image whose results the file system refuses. Raises DepthsegError where it would refuse all others too."""
    if error.errno in OF_THE_DISK:
        raise gave_out(error) from error
    return Failure(image, "write", error.strerror or str(error))


def stamp(image: Image) -> list[int] | None:
    """Size and time of the picture's file: tell whether another picture has taken its name. None without a file."""
    try:
        about = os.stat(image.path) if image.path else None
    except OSError:
        return None
    return [about.st_size, about.st_mtime_ns] if about else None


def find(paths: Sequence[str | Path], exclude: Path | None = None) -> list[Image]:
    """The images below files, folders and globs, in the order of the inputs, each folder sorted; sizes are (0, 0) until read.

    A file that is named is taken whatever it is called; folders and globs give files with EXTENSIONS.
    A key is the path below the given folder, or a file's name. Inputs whose keys collide get as many of their own parent
    folders in front as it takes to differ. Hidden files are skipped, and so is everything in `exclude`, the output folder.
    Raises DepthsegError for a path that does not exist, and with code NOTHING_TO_DO when there is no image.
    """
    files: dict[str, tuple[int, str]] = {}  # absolute path -> index of its root, key below it
    roots: list[list[str]] = []  # folder names that may go in front of a key, outermost first
    skipped = os.path.abspath(exclude) if exclude else None
    for path, named in _expand(paths):
        absolute = os.path.abspath(path)
        folder = os.path.isdir(absolute)
        drive, *names = Path(absolute if folder else os.path.dirname(absolute)).parts
        roots.append([name for name in (drive.strip(":\\/"), *names) if name])
        if folder:
            found = sorted(_walk(absolute, skipped))
        elif (named or absolute.lower().endswith(EXTENSIONS)) and not (skipped and Path(absolute).is_relative_to(skipped)):
            found = [os.path.basename(absolute)]
        else:
            found = []
        for key in found:
            files.setdefault(os.path.join(absolute, key) if folder else absolute, (len(roots) - 1, key))
    if not files:
        what = ", ".join(str(p) for p in paths) or "an empty list"
        kinds = " ".join(e[1:] for e in EXTENSIONS)
        raise DepthsegError(f"no image found in {what}", f"Files with these extensions are read: {kinds}.", NOTHING_TO_DO)
    keys = _unique(list(files.values()), roots)
    return [Image(key, id, Path(path), (0, 0)) for key, id, path in zip(keys, _ids(keys), files, strict=True)]


def _expand(paths: Sequence[str | Path]) -> Iterator[tuple[str, bool]]:
    """The paths, with globs replaced by what they match (some shells leave that to the program); True where it was named."""
    for path in map(str, paths):
        if os.path.lexists(path):  # also a file whose name happens to look like a glob
            yield path, True
        elif has_magic(path):
            yield from ((found, False) for found in sorted(iglob(path, recursive=True)))
        else:
            raise DepthsegError(f"there is no file or folder '{path}'")


def _walk(root: str, exclude: str | None) -> Iterator[str]:
    """Relative POSIX paths of the image files below `root`. Linked folders are followed, but no folder is entered twice."""

    def identity(folder: str) -> tuple[int, int]:
        status = os.stat(folder)
        return status.st_dev, status.st_ino

    seen = {identity(exclude)} if exclude and os.path.isdir(exclude) else set()
    folders: list[tuple[str, str]] = [(root, "")]
    links: list[tuple[str, str]] = []
    while folders or links:
        folder, prefix = folders.pop() if folders else links.pop(0)  # links last, so that a file keeps its own path
        try:
            if (this := identity(folder)) in seen:
                continue
            seen.add(this)
            entries = list(os.scandir(folder))
        except OSError as error:
            raise DepthsegError(f"cannot list the folder '{folder}' ({error.strerror})") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():  # entry.is_dir raises for a link to itself
                (links if entry.is_symlink() else folders).append((entry.path, f"{prefix}{entry.name}/"))
            elif entry.name.lower().endswith(EXTENSIONS) and (entry.is_symlink() or entry.is_file()):
                yield prefix + entry.name  # a dangling link too: it becomes a failure, not a gap


def _unique(files: list[tuple[int, str]], roots: list[list[str]]) -> list[str]:
    """Keys with enough of the parent folders in front that all differ. One root's files share the same prefix."""
    depth = [0] * len(roots)
    while True:
        prefix = [("/".join(parts[-d:]) + "/") if d else "" for parts, d in zip(roots, depth, strict=True)]
        keys = [prefix[root] + key for root, key in files]
        count = Counter(keys)
        if len(count) == len(keys):
            return keys
        # Different files differ at the latest with their whole path in front.
        for root in {root for (root, _), key in zip(files, keys, strict=True) if count[key] > 1}:
            depth[root] = min(depth[root] + 1, len(roots[root]))


def _ids(keys: list[str]) -> Sequence[int]:
    """The integer file stems, as COCO has them, when they are all unique integers; else 1..N."""
    stems = [key.rpartition("/")[2].rpartition(".")[0] for key in keys]
    if all(s.isascii() and s.isdecimal() and len(s) < 16 for s in stems):  # a JSON number is exact below 2**53
        numbers = [int(s) for s in stems]
        if len(set(numbers)) == len(numbers):
            return numbers
    return range(1, len(keys) + 1)


def from_list(stream: IO[str]) -> list[str]:
    """Paths from a text stream, one a line, or separated by NUL as `find -print0` writes them."""
    text = stream.read()
    lines = text.split("\0") if "\0" in text else [line.removesuffix("\r") for line in text.split("\n")]
    return [line for line in lines if line.strip()]


def demo() -> list[Path]:
    """Photographs that come inside other installed packages, which are located but not imported."""
    photos = {"ultralytics": ("assets/bus.jpg", "assets/zidane.jpg"), "matplotlib": ("mpl-data/sample_data/grace_hopper.jpg",)}
    found = []
    for package, names in photos.items():
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or ()) if spec else ():
            found += [Path(folder, name) for name in names if Path(folder, name).is_file()]
    if not found:
        hint = "To get one: pip install 'depthseg[demo]'."
        raise DepthsegError("the demo photographs of ultralytics or matplotlib are not installed", hint, MISSING_PIECE)
    return found


def read(image: Image, max_pixels: int = MOST_PIXELS, enough: int | None = None) -> Image:
    """The image with `pixels`, uint8 RGB (h, w, 3), upright by its EXIF orientation, and its `size`.

    The first frame counts; transparency is laid on white. An image that has pixels already comes back as it is.
    enough: where a long side of so many pixels will do, a larger JPEG is decoded to a half, a quarter or an eighth, which libjpeg does
    in a fraction of the time; `size` is the file's own all the same.
    Raises Unreadable. More than `max_pixels` is refused from the header, before anything is decoded.
    """
    if image.pixels is not None:
        return image
    pixels, size = _from_file(image, lambda file: decode(file, max_pixels, enough))
    return replace(image, pixels=pixels, size=size)


def upright_size(image: Image) -> tuple[int, int]:
    """The size (h, w) that `read` will give, from the first bytes of the file. Raises Unreadable."""
    return image.size if image.pixels is not None else _from_file(image, _header)


def _from_file(image: Image, use: Callable[[IO[bytes]], T]) -> T:
    """What `use` gives for the image's open file; whatever goes wrong is Unreadable."""
    if image.path is None:
        raise Unreadable("neither pixels nor a path")
    try:
        status = os.stat(image.path)
        if not stat.S_ISREG(status.st_mode):
            raise Unreadable("not a regular file")
        if status.st_size == 0:
            raise Unreadable("empty file (0 bytes)")
        with open(image.path, "rb") as file:
            if image.span is None:
                return use(file)
            return use(io.BufferedReader(_Part(file, *image.span)))
    except Unreadable:
        raise
    except FileNotFoundError:
        raise Unreadable("no such file") from None
    except PermissionError:
        raise Unreadable("permission denied") from None
    except MemoryError:
        raise Unreadable("not enough memory to decode it") from None
    except Exception as error:  # decoders raise a dozen types on broken files: OSError, SyntaxError, struct.error, EOFError...
        if any(word in str(error).lower() for word in ("truncated", "not enough", "eof", "end of file")):
            raise Unreadable("truncated file") from error
        if isinstance(error, OSError) and error.strerror:  # the system's own, without the path, which is no news
            raise Unreadable(error.strerror.lower()) from error
        raise Unreadable(f"broken file ({str(error) or type(error).__name__})") from error


class _Part(io.RawIOBase):
    """Some bytes of an open file as a file of its own."""

    def __init__(self, file: IO[bytes], start: int, length: int):
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = (0, self._at, self._length)[whence] + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._at)
        found = self._file.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


def _open(file: IO[bytes]) -> PILImage.Image:
    head = file.read(16)
    if head[4:8] == b"ftyp":
        raise Unreadable("a HEIC, AVIF or video file, whatever its name says")
    decoder = next((d for magic, d in _DECODERS if head.startswith(magic)), None)
    if decoder is None:
        raise Unreadable("not an image (no JPEG, PNG, BMP, TIFF, WebP, GIF or PPM inside)")
    file.seek(0)
    return decoder(file)


def _header(file: IO[bytes]) -> tuple[int, int]:
    with _open(file) as picture:
        width, height = picture.size
        try:
            turned = PILImage.Image.getexif(picture).get(_ORIENTATION, 1)  # the decoder's own would load a PNG
        except Exception:
            turned = 1
        if turned in (5, 6, 7, 8) and not isinstance(picture, TiffImagePlugin.TiffImageFile):  # TIFF says its size upright
            width, height = height, width
    return height, width


def decode(file: IO[bytes], max_pixels: int = MOST_PIXELS, enough: int | None = None) -> tuple[Array, tuple[int, int]]:
    """The pixels as `read` gives them, and the size (h, w) that all of them would have. Raises Unreadable, and what decoders raise."""
    with _open(file) as picture:
        width, height = picture.size
        if width * height > max_pixels:
            limit = f"{max_pixels / 1e6:g}"
            raise Unreadable(f"too large ({width} x {height} = {width * height / 1e6:g} megapixels, the limit is {limit})")
        if not width * height:
            raise Unreadable("no pixels (a side is 0)")
        if "progressive" in picture.info:  # each scan is a pass over all pixels and may take but a few bytes: hours in a small file
            file.seek(0)
            if file.read().count(b"\xff\xda") * width * height > _SCANNED:
                raise Unreadable("too many scans for a picture of this size")
        if enough and enough < max(width, height):  # a no-op for all but JPEG
            picture.draft(None, (max(1, width * enough // max(width, height)), max(1, height * enough // max(width, height))))
        reduced = picture.size
        picture.load()
        try:
            turned = picture.getexif().get(_ORIENTATION, 1)  # after load: TIFF pictures are turned there, and lose the tag
        except Exception:  # broken EXIF must not cost the picture
            turned = 1
        rgb = _rgb(picture)
    if isinstance(turned, int) and 2 <= turned <= 8:
        rgb = rgb.transpose(_UPRIGHT[turned - 2])
    pixels = np.array(rgb)
    if reduced == (width, height):
        return pixels, pixels.shape[:2]
    return pixels, (width, height) if turned in (5, 6, 7, 8) else (height, width)


def _rgb(picture: PILImage.Image) -> PILImage.Image:
    """Any mode to RGB. Pillow itself would clip 16 bits at 255 and drop alpha."""
    mode = picture.mode
    if mode == "F" or mode.startswith("I"):
        grey = np.asarray(picture)
        low, high = (0, 65535) if mode != "F" else (np.inf, -np.inf)
        if mode == "F" or (mode == "I" and (grey.min() < low or grey.max() > high)):  # no natural range: from least to most
            grey = grey.astype(np.float64)
            finite = np.isfinite(grey)
            low, high = (grey[finite].min(), grey[finite].max()) if finite.any() else (0, 1)
            grey = np.clip(np.nan_to_num(grey, nan=low, posinf=high, neginf=low), low, high)
            grey, low, high = (grey - low) / ((high - low) or 1), 0, 1  # still float64: float32 need not hold the range
        scaled = (grey.astype(np.float32) - np.float32(low)) * np.float32(255 / ((high - low) or 1))
        return PILImage.fromarray((scaled + 0.5).clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.has_transparency_data or mode in ("RGBa", "La"):
        layer = picture.convert("RGBA")
        white = PILImage.new("RGB", layer.size, "white")
        white.paste(layer, mask=layer.getchannel("A"))
        return white
    return picture if mode == "RGB" else picture.convert("RGB")  # which would copy it: a gigabyte for the largest


def alike(images: Sequence[Image], key: Callable[[Image], K], answer: Callable[[list[Image], K], Sequence[T]]) -> list[T]:
    """What `answer` gives for the images, those of the same key together, in the order of the images."""
    groups: dict[K, list[int]] = {}
    for at, image in enumerate(images):
        groups.setdefault(key(image), []).append(at)
    out: dict[int, T] = {}
    for same, members in groups.items():
        out.update(zip(members, answer([images[at] for at in members], same), strict=True))
    return [out[at] for at in range(len(images))]


def cores() -> int:
    """CPU cores that this process may use, no more than a container's share of them."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no Linux, no limit ("max")
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
        count = min(count, max(1, quota // period))
    return count


def beside() -> int:
    """Threads that read, or draw, while others compute: a card finishes pictures faster than two threads decode them."""
    return min(8, max(2, cores()))


def read_ahead(images: Iterable[Image], workers: int = 2, ahead: int = 8, enough: int | None = None) -> Iterator[Image | Failure]:
    """Each image with its pixels, or a Failure, in input order, decoded in threads as `in_threads` says; enough: as in `read`."""

    def attempt(image: Image) -> Image | Failure:
        try:
            return read(image, enough=enough)
        except Unreadable as error:
            return Failure(image, "read", str(error))

    return in_threads(attempt, images, workers, ahead)


def in_threads(call: Callable[[S], T], items: Iterable[S], workers: int, ahead: int) -> Generator[T]:
    """What `call` gives for each item, in the order of the items, computed in threads while the caller is at work.

    At most `ahead` results wait at any time, or one for each worker where those are more. An exception, of a call or of `items`, comes
    after the results before it. The threads end with the iterator, also when it is left early.
    """
    pool = ThreadPoolExecutor(workers, call.__name__)
    waiting: deque[Future[T]] = deque()
    source, broken = iter(items), None
    try:
        while broken is None:
            try:
                waiting.append(pool.submit(call, next(source)))
            except StopIteration:
                break
            except BaseException as error:  # Ctrl-C too: what is in hand must not be lost
                broken = error
            if len(waiting) >= max(ahead, workers):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
        if broken is not None:
            raise broken
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
