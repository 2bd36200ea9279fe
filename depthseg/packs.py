"""Training data looked at before it is used, and packed for reading fast.

`check` reads every sample and says what is wrong with it. `pack` writes resized samples into tars of some hundred megabytes: picture
(JPEG), depth (16-bit PNG) and masks (SA-1B's JSON), as `sa1b.index` reads them again; a stopped run goes on at the next shard.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image as PILImage

from depthseg import masks, sa1b
from depthseg.data import OF_THE_DISK, gave_out, in_threads
from depthseg.errors import DepthsegError
from depthseg.formats import PACK, atomic, text_file
from depthseg.schema import Array

SHARD = 256_000_000  # bytes
QUALITY = 95  # of JPEG
AHEAD = 4  # samples that wait for each thread
TINY = 24  # pixels: a mask of fewer teaches nothing

# What can be wrong with a sample: whether it cannot be used at all, and in words.
FAULTS = {
    "unreadable": (True, "cannot be read"),
    "empty": (True, "has no mask"),
    "tiny": (False, f"has only masks of fewer than {TINY} pixels"),
    "unpaired": (True, "lacks its picture or its annotation"),
    "duplicate": (False, "shows the same pixels as"),
}

Tell = Callable[[int, int], None]  # told (done, in all)
DepthOf = Callable[[sa1b.Entry, tuple[int, int]], Array | None]  # the map of a picture of (h, w), float 0..1


def check(entries: Sequence[sa1b.Entry], workers: int = 2, progress: Tell = lambda done, total: None) -> Iterator[tuple[str, str, str]]:
    """What is wrong: the sample's key, a key of FAULTS, and a sentence. Every picture and every mask is decoded."""
    seen: dict[str, sa1b.Entry] = {}
    for at, (entry, found) in enumerate(zip(entries, in_threads(_look, entries, workers, AHEAD * workers)), 1):
        fault, said, digest = found
        if digest and (first := seen.setdefault(digest, entry)) is not entry and not fault:
            fault, said = "duplicate", first.key if first.key != entry.key else str(first.root / first.key)  # in another root
        if fault:
            yield entry.key, fault, f"{FAULTS[fault][1]}{f' {said}' if fault == 'duplicate' else f' ({said})' if said else ''}"
        progress(at, len(entries))


def unpaired(roots: Sequence[Path]) -> list[tuple[str, str, str]]:
    """Files of SA-1B's layout, in folders and tars, that have no partner, as `check` says what is wrong."""
    out = []
    for root in roots:
        if root.is_dir() and not (root / sa1b.IDS).is_file():
            names = {p.relative_to(root).as_posix() for p in root.rglob("sa_*") if p.suffix in (".jpg", ".json")}
            other = {".jpg": ".json", ".json": ".jpg"}
            alone = sorted(n for n in names if str(Path(n).with_suffix(other[Path(n).suffix]).as_posix()) not in names)
            out += [(name, "unpaired", FAULTS["unpaired"][1]) for name in alone]
        for tar in sa1b.tars(root):
            for stem, kinds in sorted(sa1b.in_tar(tar)[1].items()):
                if len(kinds.keys() & {"jpg", "json"}) == 1:
                    out.append((f"{tar.stem}/{stem}.{min(kinds.keys() - {'depth'})}", "unpaired", FAULTS["unpaired"][1]))
    return out


def _look(entry: sa1b.Entry) -> tuple[str, str, str]:
    """Fault ("" for none), what there is to say, and a digest of the pixels ("" if there are none)."""
    try:
        sample = sa1b.load(entry)
    except ValueError as error:
        return "unreadable", str(error).removeprefix(f"{entry.key}: "), ""
    digest = hashlib.sha1(f"{sample.pixels.shape}".encode() + sample.pixels.tobytes()).hexdigest()
    areas = masks.area(sample.rles)
    if not len(areas) or not areas.max():
        return "empty", "", digest
    return ("tiny" if areas.max() < TINY else ""), "", digest


def pack(
    entries: Sequence[sa1b.Entry],
    output: Path,
    side: int,
    depth: DepthOf | None = None,
    maps: str = "",
    workers: int = 2,
    shard: int = SHARD,
    progress: Tell = lambda done, total: None,
) -> tuple[int, list[str]]:
    """Write the samples into shards `output`/shard-00000.tar; how many there are now, and why others were left out.

    side: longest side of the pictures, pixels; smaller ones stay as they are. depth: maps to be packed with them, at most as large.
    maps: who made these.
    Samples come in an order drawn once, so that the head of a shard is no series. Raises DepthsegError for a folder of other settings.
    """
    order = np.random.default_rng(0).permutation(len(entries)).tolist()
    made = {"side": side, "depth": depth is not None, "maps": maps, "entries": _digest(entries)}
    state = _begin(output, made, len(entries))
    left_out: list[str] = state["left_out"]
    done, count = state["done"], state["packed"]
    number = len(state["shards"])
    stream = in_threads(lambda at: _packed(entries[at], side, depth), order[done:], workers, AHEAD * workers)
    while done < len(order):
        name = f"shard-{number:05d}.tar"
        try:
            with atomic(output / name) as part:
                size, done, count = _write_shard(part, stream, done, count, shard, len(order), left_out, progress)
            state["shards"].append({"file": name, "bytes": size})
            state |= {"done": done, "packed": count, "left_out": left_out}
            _note(output, state)
        except OSError as error:
            if error.errno in OF_THE_DISK:
                raise gave_out(error) from error
            raise
        number += 1
    return count, left_out


def _write_shard(
    part: Path, stream: Iterator, done: int, count: int, shard: int, total: int, left_out: list[str], progress: Tell
) -> tuple[int, int, int]:
    """Fill one tar from the stream: its bytes, samples looked at so far, and samples packed so far."""
    size = 0
    with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
        for files in stream:
            if isinstance(files, str):
                left_out.append(files)
            else:
                for kind, data in files.items():
                    info = tarfile.TarInfo(f"sa_{count:08d}.{kind}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                    size += len(data)
                count += 1
            done += 1
            progress(done, total)
            if size >= shard:
                break
    return size, done, count


def _begin(output: Path, made: dict, total: int) -> dict:
    """What the folder says of itself: that of a stopped run of the same settings, or a new one."""
    try:
        state = {"maps": "", **json.loads((output / PACK).read_bytes())}  # earlier packs did not say
        before = {name: state[name] for name in made}
    except FileNotFoundError:
        output.mkdir(parents=True, exist_ok=True)
        if any(not path.name.startswith(".") for path in output.iterdir()):
            raise DepthsegError(f"{output} is not empty and holds no pack", "Choose an empty or a new folder.") from None
        state = {**made, "samples": total, "done": 0, "packed": 0, "left_out": [], "shards": []}
        _note(output, state)
        return state
    except (ValueError, KeyError, TypeError) as error:
        raise DepthsegError(f"{output / PACK} cannot be read ({error})", "Choose an empty or a new folder.") from error
    differ = [f"{name} (was {before[name]}, is {value})" for name, value in made.items() if before[name] != value]
    if differ:
        raise DepthsegError(f"{output} holds a pack of other settings: {', '.join(differ)}", "Use the same, or another folder.")
    return state


def _note(output: Path, state: dict) -> None:
    with text_file(output / PACK) as file:
        file.write(json.dumps(state, indent=1))


def _digest(entries: Sequence[sa1b.Entry]) -> str:
    """Names the samples and their order."""
    return hashlib.sha256("\n".join(e.key for e in entries).encode(errors="surrogateescape")).hexdigest()[:16]


def _packed(entry: sa1b.Entry, side: int, depth: DepthOf | None) -> dict[str, bytes] | str:
    """The files of one sample by suffix, or why there are none."""
    try:
        sample = sa1b.load(entry)
        h, w = sample.pixels.shape[:2]
        scale = min(1.0, side / max(h, w))
        size = max(1, round(h * scale)), max(1, round(w * scale))
        picture = PILImage.fromarray(sample.pixels)
        shrunk = [_shrunk(rle, size) for rle in sample.rles] if scale < 1 else sample.rles
        kept = [rle for rle, area in zip(shrunk, masks.area(shrunk)) if area >= TINY]
        if not kept:
            return f"{entry.key}: no mask of {TINY} pixels is left at this size"
        if scale < 1:
            picture = picture.resize(size[::-1], PILImage.Resampling.BILINEAR)
        about = {"image": {"key": entry.key, "source": entry.source, "size": [h, w]},
                 "annotations": [{"segmentation": {"size": list(r["size"]), "counts": r["counts"]}} for r in kept]}  # fmt: skip
        found = depth(entry, (h, w)) if depth else None
        relief = {"depth.png": _png(found, side)} if found is not None else {}
        return {"jpg": _jpeg(picture), "json": json.dumps(about, separators=(",", ":")).encode(), **relief}
    except (ValueError, DepthsegError) as error:
        return str(error)


def _shrunk(rle: dict, size: tuple[int, int]) -> dict:
    """The mask at another size (h, w): a pixel belongs to it if half of what it covers does."""
    small = PILImage.fromarray(masks.decode(rle)).convert("L").resize(size[::-1], PILImage.Resampling.BOX)
    return masks.encode(np.asarray(small) >= 128)


def _jpeg(picture: PILImage.Image) -> bytes:
    picture.save(data := io.BytesIO(), "JPEG", quality=QUALITY)
    return data.getvalue()


def _png(depth: Array, side: int) -> bytes:
    """A map 0..1 as 16-bit PNG, its longest side at most `side`."""
    h, w = depth.shape
    scale = min(1.0, side / max(h, w))
    if scale < 1:
        depth = np.asarray(PILImage.fromarray(depth).resize((round(w * scale), round(h * scale)), PILImage.Resampling.BILINEAR))
    PILImage.fromarray(np.round(depth * 65535).astype(np.uint16)).save(data := io.BytesIO(), "PNG", compress_level=1)
    return data.getvalue()
