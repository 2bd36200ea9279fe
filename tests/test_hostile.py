"""Hostile inputs: 7,297 malformed inputs are tried, and each ends in an answer or in one sentence that says why not.

Never in a traceback, a crash or a hang, in code from a file that runs, or in a file outside the output folder. The inputs are made
here: by hand, and by mutating good ones with a generator that is seeded by their name, so that they are the same everywhere. Each
kind is tried in a process of its own, which may crash or hang without taking the tests with it, and whose memory is measured.

python tests/test_hostile.py          prints how many inputs of each kind there are
python tests/test_hostile.py masks    tries one kind and prints what came of it, as JSON
"""

import contextlib
import copy
import gzip
import io
import json
import lzma
import os
import pickle
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PILImage

from depthseg import data, masks, sa1b, truth
from depthseg.detect import BoxesFile, PointsFile
from depthseg.errors import SOME_FAILED, DepthsegError
from depthseg.formats import overlay_name
from depthseg.schema import Image

resource = pytest.importorskip("resource", reason="limits of memory, pipes and sockets are POSIX")

TRIED = {
    "pictures": 1873,
    "files": 41,
    "masks": 1410,
    "boxes": 1293,
    "clicks": 646,
    "annotations": 1103,
    "archives": 471,
    "checkpoints": 380,
    "runs": 80,
}
SECONDS, MIB = 5, 300  # at most, for one input and for all of a kind
MOST = 4_000_000  # pixels of a picture, so that MIB is enough
SIZE = (24, 31)  # of the pictures that masks are about

Case = tuple[str, Callable[[], object], tuple[type[Exception], ...]]  # name, what to try, which exceptions are answers


# ---- what makes inputs hostile ----


def mutants(name: str, whole: bytes, other: bytes, count: int) -> Iterator[tuple[str, bytes]]:
    """Cut off, with flipped bits, with a header of ones or zeros, spliced with `other`, with pieces left out or repeated."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    for i in range(count):
        b, head, few = bytearray(whole), int(rng.integers(min(64, len(whole)))), int(rng.integers(1, 9))
        at = int(rng.integers(len(b)))
        match i % 8:
            case 0:
                del b[at:]
            case 1 | 2 as near:
                for k in rng.integers(len(b) if near == 1 else min(64, len(b)), size=few):
                    b[k] ^= 1 << int(rng.integers(8))
            case 3:
                b[head : head + few] = b"\xff" * few
            case 4:
                b[head : head + few] = bytes(few)
            case 5:
                b[:at] = other[:at]
            case 6:
                del b[at : at + 4 * few]
            case 7:
                b[at:at] = b[at : at + 16 * few] * few
        yield f"{name} mutant {i}", bytes(b)


STRANGE = [
    None, True, -1, 0, 1.5, float("nan"), float("inf"), -float("inf"), 1e300, -1e300, 2**31, 2**63, -(2**63) - 1, 10**400, "", "1", "NaN",
    "\0", "a\nb.jpg", "../../a.jpg", "/etc/passwd", "/dev/zero", "x" * 5000, "<b>&\"'[bold]", "\x1b[31m\u202e😀", "\ud800", [], {}, [[]],
    [None], {"a": 1}, [float("nan")] * 4, [-1, -1, -1, -1], [10**400] * 4, [1e308] * 4, list(range(6)), "700 LISTS",
]  # fmt: skip


def json_mutants(name: str, value: object, count: int) -> Iterator[tuple[str, bytes]]:
    """Values replaced by strange ones, left out and repeated; then spoilt as text."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    for i in range(count):
        whole = {"": copy.deepcopy(value)}  # so that all of it stands in a place, too
        for _ in range(1 + i % 2):
            places = list(_places(whole))
            holder, key = places[rng.integers(len(places))]
            if i % 5 == 4 and holder is not whole:
                del holder[key]
            elif i % 5 == 3 and isinstance(holder, list):
                holder.append(holder[key])
            else:
                holder[key] = copy.deepcopy(STRANGE[rng.integers(len(STRANGE))])
        yield f"{name} value {i}", json.dumps(whole[""]).replace('"700 LISTS"', "[" * 700 + "]" * 700).encode()
    text = json.dumps(value).encode()
    yield from mutants(f"{name} text", text, text[::-1], count // 2)
    deep = {f"{n} levels": b'[{"file_name": "a.jpg", "bbox": ' + b"[" * n + b"]" * n + b"}]" for n in range(900, 1000, 3)}
    yield from ((f"{name} {what}", spoilt) for what, spoilt in {
        "UTF-8 with a mark": b"\xef\xbb\xbf" + text, "UTF-16": text.decode().encode("utf-16"), "UTF-32": text.decode().encode("utf-32"),
        "not UTF-8": text.replace(b'"', b'"\xff', 1), "half of UTF-16": text.decode().encode("utf-16")[:-1], "nothing": b"",
        "brackets": b"[" * 100_000, "braces": b'{"a":' * 100_000, "long number": b"[" + b"1" * 5000 + b"]",
        "keys twice": text.replace(b"{", b'{"file_name": "b.jpg", "bbox": 3, "id": [], "images": 1, ', 1), "a pickle": pickle.dumps(value),
        **deep,
    }.items())  # fmt: skip


def _places(value: dict | list) -> Iterator[tuple[dict | list, object]]:
    """Container and key of everything in a JSON value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from _places(value[key])


# ---- pictures ----


def encoded(picture: PILImage.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def seeds() -> dict[str, bytes]:
    """A good picture of every supported kind."""
    noise = np.random.default_rng(0).integers(0, 256, (18, 25, 4), np.uint8)
    rgba = PILImage.fromarray(noise)
    rgb, grey, p = rgba.convert("RGB"), rgba.convert("L"), rgba.convert("RGB").convert("P")
    wide = PILImage.fromarray(noise[..., 0].astype(np.uint16) * 257)
    turned = PILImage.Exif()
    turned[0x0112] = 6
    moving = {"save_all": True, "append_images": [rgb.transpose(PILImage.Transpose.ROTATE_180)]}
    header, rows = b"BM" + struct.pack("<IHHI", 0, 0, 0, 1078), b"\4\1\0\0" * 18 + b"\0\1"
    rle = header + struct.pack("<IiiHHIIiiII", 40, 25, 18, 1, 8, 1, len(rows), 0, 0, 0, 0) + bytes(1024) + rows
    return {
        "jpg": encoded(rgb, "JPEG"), "jpg grey": encoded(grey, "JPEG"), "jpg scans": encoded(rgb, "JPEG", progressive=True),
        "jpg CMYK": encoded(rgb.convert("CMYK"), "JPEG"), "jpg turned": encoded(rgb, "JPEG", exif=turned),
        "png": encoded(rgb, "PNG"), "png alpha": encoded(rgba, "PNG"), "png 16 bit": encoded(wide, "PNG"),
        "png palette": encoded(p, "PNG", transparency=3), "png 1 bit": encoded(grey.convert("1"), "PNG"),
        "png turned": encoded(rgb, "PNG", exif=turned), "apng": encoded(rgb, "PNG", **moving),
        "tif": encoded(rgb, "TIFF"), "tif lzw": encoded(rgb, "TIFF", compression="tiff_lzw"), "tif 16 bit": encoded(wide, "TIFF"),
        "tif deflate": encoded(rgba, "TIFF", compression="tiff_deflate"), "tif CMYK": encoded(rgb.convert("CMYK"), "TIFF"),
        "tif float": encoded(grey.convert("F"), "TIFF"), "tif jpeg": encoded(rgb, "TIFF", compression="jpeg"),
        "tif fax": encoded(grey.convert("1"), "TIFF", compression="group4"), "tif pages": encoded(rgb, "TIFF", **moving),
        "gif": encoded(p, "GIF"), "gif moving": encoded(p, "GIF", **moving), "gif clear": encoded(p, "GIF", transparency=0),
        "webp": encoded(rgb, "WEBP"), "webp alpha": encoded(rgba, "WEBP", lossless=True), "webp moving": encoded(rgb, "WEBP", **moving),
        "ppm": encoded(rgb, "PPM"), "pgm": encoded(grey, "PPM"), "pgm 16 bit": encoded(wide, "PPM"),
        "pbm": encoded(grey.convert("1"), "PPM"), "ppm plain": b"P3 25 18 255\n" + b" ".join(b"%d" % v for v in noise[..., :3].ravel()),
        "bmp": encoded(rgb, "BMP"), "bmp palette": encoded(p, "BMP"), "bmp alpha": encoded(rgba, "BMP"), "bmp rle": rle,
    }  # fmt: skip


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(w: int, h: int, depth: int, colour: int, content: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")


def patched(whole: bytes, at: int, new: bytes) -> bytes:
    return whole[:at] + new + whole[at + len(new) :]


def tiff(whole: bytes, tags: dict[int, tuple[int, int, int]]) -> bytes:
    """With other types, counts and values of the tags in the first directory."""
    (start,) = struct.unpack("<I", whole[4:8])
    for at in range(start + 2, start + 2 + 12 * struct.unpack("<H", whole[start : start + 2])[0], 12):
        (tag,) = struct.unpack("<H", whole[at : at + 2])
        if tag in tags:
            whole = patched(whole, at + 2, struct.pack("<HII", *tags[tag]))
    return whole


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"


def made_pictures() -> Iterator[tuple[str, bytes]]:
    """Headers that lie about the size, bombs, extremes of shape, and what is no picture."""
    good = seeds()
    moving = good["webp moving"].index(b"VP8X") + 12
    for w, h in ((0, 0), (0, 9), (1, 65535), (65535, 1), (1999, 1999), (65535, 65535), (2**31 - 1, 2**31 - 1), (2**32 - 1, 1)):
        short = struct.pack(">HH", h & 65535, w & 65535)
        for kind, mark in (("jpg", b"\xff\xc0"), ("jpg scans", b"\xff\xc2"), ("jpg CMYK", b"\xff\xc0")):
            yield f"{kind} of {w} x {h}", patched(good[kind], good[kind].index(mark) + 5, short)
        for kind, colour in (("grey", 0), ("colours", 2), ("palette", 3), ("alpha", 6)):
            yield f"png {kind} of {w} x {h}", png(w, h, 8, colour, b"few")
        yield f"gif of {w} x {h}", patched(good["gif"], 6, short[3:1:-1] + short[1::-1])
        for kind in ("bmp", "bmp palette"):
            yield f"{kind} of {w} x {h}", patched(good[kind], 18, struct.pack("<II", w, h))
        yield f"webp of {w} x {h}", patched(good["webp moving"], moving, b"".join(struct.pack("<I", v)[:3] for v in (w, h)))
        for magic in range(1, 7):
            yield f"P{magic} of {w} x {h}", b"P%d %d %d 255\n" % (magic, w, h) + b"1 2 3"
        for kind in ("tif", "tif deflate", "tif float", "tif fax", "tif jpeg"):
            yield f"{kind} of {w} x {h}", tiff(good[kind], {256: (4, 1, w), 257: (4, 1, h), 278: (4, 1, h)})
    for tag in (258, 259, 262, 273, 274, 277, 278, 279, 284, 317, 320, 338, 339):
        for value in ((3, 1, 0), (3, 1, 65535), (4, 2**31, 8), (5, 1, 2**32 - 1), (2, 2**32 - 1, 0), (99, 1, 1), (12, 1000, 8)):
            yield f"tif with tag {tag} {value}", tiff(good["tif"], {tag: value})
    (start,) = struct.unpack("<I", good["tif"][4:8])
    last = start + 2 + 12 * struct.unpack("<H", good["tif"][start : start + 2])[0]
    yield "tif that goes round", patched(good["tif"], last, struct.pack("<I", start))
    for values in ([-3.4e38, 3.4e38, 0], [0, 1e-45, 0], [np.nan] * 3, [np.inf, -np.inf, 0], [np.inf] * 3, [3e38, 2e38, np.nan]):
        yield f"tif of {values}", encoded(PILImage.fromarray(np.array([values], np.float32)), "TIFF")
    yield "tif of all integers", encoded(PILImage.fromarray(np.array([[-(2**31), 2**31 - 1]], np.int32)), "TIFF")
    for kind in ("PNG", "JPEG", "TIFF", "GIF", "WEBP", "PPM", "BMP"):
        yield f"{kind} of one pixel", encoded(PILImage.new("RGB", (1, 1)), kind)
        for size in ((1, 30_000), (30_000, 1)):
            if kind != "WEBP":  # which ends at 16383
                yield f"{kind} of {size}", encoded(PILImage.new("RGB", size, (9, 9, 9)), kind)
    big = bytes(16 << 20)
    at = good["png"].index(b"IDAT") - 4
    for kind, head in ((b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0"), (b"iCCP", b"a\0\0")):
        yield f"png with a bomb in {kind!r}", good["png"][:at] + chunk(kind, head + zlib.compress(big)) * 3 + good["png"][at:]
        yield f"png with many {kind!r}", good["png"][:at] + chunk(kind, head + zlib.compress(bytes(1 << 19))) * 130 + good["png"][at:]
    yield "png with more than its size", png(16, 16, 8, 2, big)
    yield "png above the limit", png(20_000, 20_000, 1, 0, b"")
    wide = encoded(PILImage.new("L", (1999, 1999), 7), "JPEG", progressive=True)
    scan = wide[wide.rindex(b"\xff\xda") : -2]
    yield "jpg of a hundred thousand scans", wide[:-2] + scan * 100_000 + wide[-2:]
    one = b"MM\0*\0\0\0\x08\0\x01"  # a directory of one tag
    for what, exif in {
        "a loop": one + struct.pack(">HHIII", 0x8769, 4, 1, 8, 8), "a lying count": one + struct.pack(">HHII", 0x0112, 3, 2**32 - 1, 0),
        "many tags": one[:8] + b"\xff\xff" + struct.pack(">HHII", 0x0112, 3, 2**31, 0) * 5000, "nothing": b"",
        "a text": one + struct.pack(">HHI4s", 0x0112, 2, 4, b"abc"), "turned by 60000": one + struct.pack(">HHIHH", 0x0112, 3, 1, 60000, 0),
    }.items():  # fmt: skip
        app1 = b"Exif\0\0" + exif[:60_000]
        yield f"png whose EXIF is {what}", good["png"][:at] + chunk(b"eXIf", exif) + good["png"][at:]
        yield f"jpg whose EXIF is {what}", good["jpg"][:2] + b"\xff\xe1" + struct.pack(">H", 2 + len(app1)) + app1 + good["jpg"][2:]
        yield (
            f"webp whose EXIF is {what}",
            patched(good["webp moving"], moving - 4, b"\x0a") + b"EXIF" + struct.pack("<I", len(exif)) + exif,
        )
    fill = {
        "nothing": b"",
        "zeros": bytes(999),
        "ones": b"\xff" * 999,
        "noise": np.random.default_rng(1).bytes(999),
        "text": b" 1 1 1" * 99,
    }
    for magic in sorted({m for several, _ in data._DECODERS for m in several} | {b"", b"P7", b"PF", b"\0\0\0\x0cjP  "}):
        for what, rest in fill.items():
            yield f"{magic!r} and {what}", magic + rest
    yield from {
        "EPS": EPS, "PDF": b"%PDF-1.7\n1 0 obj",
        "SVG": b'<?xml version="1.0"?><!DOCTYPE a [<!ENTITY b "bb">]><svg>&b;</svg>', "HTML": b"<html>", "ZIP": b"PK\3\4" + bytes(99),
        "ELF": b"\x7fELF" + bytes(99), "AVIF": b"\0\0\0\x1cftypavif" + bytes(99), "ICO": b"\0\0\1\0\1\0" + bytes(99),
        "PSD": b"8BPS\0\1" + bytes(99), "EXR": b"v/1\1" + bytes(99), "FITS": b"SIMPLE  =" + bytes(99), "script": b"#!/bin/sh\nexit\n",
    }.items()  # fmt: skip


def pictures(folder: Path) -> Iterator[Case]:
    good = seeds()
    others = list(good.values())[1:] + [good["jpg"]]
    spoilt = [mutants(name, whole, other, 40) for (name, whole), other in zip(good.items(), others)]
    for number, (name, content) in enumerate(case for source in (made_pictures(), *spoilt) for case in source):
        yield name, partial(see, folder / f"{number}.jpg", content), (data.Unreadable,)


def see(path: Path, content: bytes | None = None) -> None:
    """Read a picture; what comes is pixels of the size that the header tells."""
    if content is not None:
        path.write_bytes(content)
    image = Image("k", 1, path, (0, 0))
    try:
        told = data.upright_size(image)
    except data.Unreadable as error:
        told, why = None, error
    answer = data.read(image, MOST)
    assert answer.pixels.dtype == np.uint8 and answer.pixels.shape == (*answer.size, 3)
    assert told == answer.size, f"{answer.size} pixels and a header of {told or why}"


# ---- files that are none ----


def no_files(folder: Path) -> list[str]:
    """Fill a new folder with what may be called like a picture. Returns the names that `find` should give, none of which is one."""
    whole = encoded(PILImage.new("RGB", (9, 9)), "JPEG")
    (folder / "folder.jpg").mkdir(parents=True)
    os.mkfifo(folder / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as end, contextlib.chdir(folder):  # the path of a socket may not be long
        end.bind("socket.jpg")
    links = {
        "loop.jpg": "loop.jpg", "loop": "loop", "round.jpg": "there.jpg", "there.jpg": "round.jpg", "gone.jpg": "nowhere.jpg",
        "device.jpg": "/dev/zero", "memory.jpg": "/proc/self/mem", "to-pipe.jpg": "pipe.jpg", "to-socket.jpg": "socket.jpg",
        "long.jpg": "x" * 999, "up": "..", "self": ".",
    }  # fmt: skip
    for name, target in links.items():
        (folder / name).symlink_to(target)
    (folder / ".hidden.jpg").write_bytes(whole)
    names = [
        "empty.jpg", "new\nline.jpg", "[bold]red.jpg", "<b>&\"'.jpg", "-rf.jpg", "\x1b[31m.jpg", "😀\u202e.jpg", "%s{0}.jpg", "a\\b.jpg",
        os.fsdecode(b"\xff\xfe.jpg"), "y" * 251 + ".jpg", "jpg.jpg", " .jpg", "*.jpg", "CON.jpg",
    ]  # fmt: skip
    for name in names:
        (folder / name).write_bytes(whole[: len(whole) // 2] if name != "empty.jpg" else b"")
    return sorted([*names, *(name for name in links if name.endswith(".jpg"))])


def files(folder: Path) -> Iterator[Case]:
    def listed() -> None:
        found = data.find([folder])
        assert sorted(image.key for image in found) == expected
        assert all(isinstance(item, data.Failure) for item in data.read_ahead(found))

    def named(path: Path) -> None:
        with contextlib.suppress(data.Unreadable):
            see(path)
        list(data.read_ahead(data.find([path])))

    def changed(path: Path, then: Callable[[Path], object]) -> None:
        path.write_bytes(good["png"])
        (image,) = data.find([path])
        path.unlink()
        then(path)
        data.read(image, MOST)

    expected, good = no_files(folder), seeds()
    yield "the folder", listed, ()
    for name in (*expected, "folder.jpg", "pipe.jpg", "socket.jpg", "x" * 300, "a\0b", "a" * 5000):
        yield f"a file called {name[:40]!r}", partial(named, folder / name), (DepthsegError,)
    away = folder.parent / "away"
    away.mkdir()
    for name, then in {
        "vanished": lambda path: None, "became a folder": Path.mkdir, "became a pipe": os.mkfifo, "emptied": Path.touch,
        "grew": lambda path: path.write_bytes(good["png"] + good["png"]), "became another": lambda path: path.write_bytes(good["gif"]),
        "shrank": lambda path: path.write_bytes(good["png"][:50]), "became a loop": lambda path: path.symlink_to(path.name),
        "became a device": lambda path: path.symlink_to("/dev/zero"), "became text": lambda path: path.write_text("text"),
    }.items():  # fmt: skip
        yield f"a file that {name}", partial(changed, away / f"{name}.png", then), (data.Unreadable,)


# ---- masks ----

FAR = [float("nan"), float("inf"), -float("inf"), 1e300, -1e300, 2**31, -(2**31), 1e9, 4e8, 1e6, 10**400, None, "3", "x", [], [1], {}, True]
SIZES = [
    [31, 24],
    [0, 0],
    [24, 0],
    [-24, -31],
    [24],
    [24, 31, 1],
    [24.5, 31],
    [10**400, 1],
    ["24", "31"],
    None,
    "24",
    5,
    {},
    [2**32 + 24, 31],
]
COUNTS = [
    "", "0", "o", "oooooo", "oooooo0", "ooooooo0", "o" * 10_000, "0" * 10_000, "P" * 999, "`", "\0", "é", "\ud800", b"\xff", None, 5, [],
    {}, [[]], [0] * 10_000 + [24 * 31], [2**31, 2**31, 24 * 31], [2**32 - 1, 1] * 1000 + [24 * 31],
]  # fmt: skip
SHAPES = [
    [], [[]], [[1, 2, 3, 4]], [[1, 2, 3, 4, 5]], [1, 2, 3, 4, 5, 6], [[1, 2, 3, 4, 5, 6, 7]], [{}] * 6, ["123456"], [None], None, 3, "x",
    {}, {"size": [24, 31]}, {"counts": "x"}, [[0, 0, 1e6, 1e6] * 5000], [[1, 1, 9, 1, 9, 9]] * 1000,
]  # fmt: skip


def segmentations() -> Iterator[tuple[str, object]]:
    """Of pictures of SIZE."""
    h, w = SIZE
    rng = np.random.default_rng(2)
    for n in range(12):
        mask = rng.random(SIZE) < rng.choice([0.01, 0.2, 0.5])
        mask[4:9, 3:20] |= n % 2 == 0
        counts, runs = masks.encode(mask)["counts"], masks._runs(masks.encode(mask)["counts"].encode()).tolist()
        for i, (name, text) in enumerate(mutants(f"counts {n}", counts.encode(), b"o0_P~\x7f" * 99, 64)):
            yield name, {"size": [h, w], "counts": text.decode("latin1") if i % 2 else text}
        for i in range(40):
            spoilt: list = list(runs)
            for _ in range(1 + i % 3):
                odd = [0, -1, 1, 2**31, 2**32 - 1, 2**32, 2**63, 10**400, 0.5, float("nan"), float("inf"), None, "3", [], True]
                spoilt[rng.integers(len(spoilt))] = odd[rng.integers(len(odd))]
            yield f"runs {n} {i}", {"size": [h, w], "counts": spoilt if i % 8 else spoilt[: i + 1]}
    for value in FAR:
        for at in range(0, 8, 3):
            polygon: list = [2, 2, 20, 3, 21, 17, 4, 16]
            polygon[at] = value
            yield f"polygon with {str(value)[:20]} at {at}", [polygon]
        yield f"polygon of {str(value)[:20]}", [[value] * 6]
    yield "a thousand corners out of the picture", [rng.uniform(-900, 900, 2000).tolist()]
    yield from ((f"size {str(size)[:30]}", {"size": size, "counts": [h * w]}) for size in SIZES)
    yield from ((f"counts {str(counts)[:30]!r}", {"size": [h, w], "counts": counts}) for counts in COUNTS)
    yield from ((f"segmentation {str(what)[:30]}", what) for what in SHAPES)


def mask_files(folder: Path) -> Iterator[Case]:
    whole = masks.encode(np.ones(SIZE, bool))

    def take(segmentation: object, size: tuple[int, int]) -> dict:
        try:
            return masks.of_coco(segmentation, size)  # type: ignore[arg-type]
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # what those who call it turn into a sentence
            raise DepthsegError(str(error)) from error

    def work(segmentation: object) -> None:
        """Everything that is done with masks of a file."""
        rle = take(segmentation, SIZE)
        pixels = masks.decode(rle)
        assert pixels.shape == SIZE and masks.area([rle]).tolist() == [np.count_nonzero(pixels)]
        x0, y0, x1, y1 = masks.boxes([rle])[0]
        assert 0 <= x0 <= x1 <= SIZE[1] and 0 <= y0 <= y1 <= SIZE[0]
        for a, b in ((rle, whole), (whole, rle), (rle, rle)):
            assert 0 <= masks.iou([a], [b])[0, 0] <= 1 and 0 <= masks.covered([a], [b])[0, 0] <= 1
        masks.suppress([rle, whole, rle], np.array([0.3, 0.2, 0.1]), 0.5)

    for name, segmentation in segmentations():
        yield name, partial(work, segmentation), (DepthsegError,)
    for size in ((0, 5), (5, 0), (0, 0), (-3, 4), (-3, -4), (2**16, 2**16), (2**31, 2**31), (10**30, 1), (1, 2**30)):
        for what in ([[0, 0, 5, 5, 1, 7]], [], *({"size": list(size), "counts": counts} for counts in ([0, size[0] * size[1]], "05"))):
            yield f"{what} in a picture of {size}", partial(take, what, size), (DepthsegError,)


# ---- boxes, clicks and annotations ----


def written(path: Path, content: bytes, use: Callable[[Path], object]) -> object:
    path.write_bytes(content)
    return use(path)


def shown(key: str = "a.jpg") -> Image:
    return Image(key, 1, None, (40, 60), np.zeros((40, 60, 3), np.uint8))


def box_files(folder: Path) -> Iterator[Case]:
    def use(path: Path) -> None:
        source = BoxesFile(path)
        source.expect(["a.jpg", "sub/new\nline.jpg", "7.jpg"])
        for key in ("a.jpg", "sub/new\nline.jpg", "7.jpg"):
            (found,) = source([shown(key)])
            assert np.isfinite(found.xyxy).all() and np.isfinite(found.score).all() and found.xyxy.min(initial=0) >= 0
            assert (found.xyxy <= (60, 40, 60, 40)).all()
        json.dumps([source.labels, source.names])

    entry = {"file_name": "a.jpg", "bbox": [1, 2, 10, 20], "score": 0.5, "category_id": 3, "category_name": "cat"}
    plain = [entry, {**entry, "file_name": "new\nline.jpg"}, {"image_id": 7, "bbox": [0, 0, 5.5, 5]}, {**entry, "iscrowd": 1}]
    table = {"images": [{"id": 1, "file_name": "a.jpg"}], "categories": [{"id": 3, "name": "cat"}]}
    whole = {**table, "annotations": [{"id": 1, "image_id": 1, "bbox": [1, 2, 3, 4], "category_id": 3}]}
    large = {
        "whole numbers whose sum is no float": [{**entry, "bbox": [10**308, 0, 10**308, 1]}],
        "a score beyond float32": [{**entry, "score": 1e300}],
        "an infinite category": {**whole, "categories": [{"id": float("inf"), "name": "cat"}]},
    }
    cases = [(name, json.dumps(value).encode()) for name, value in large.items()]
    cases += [*json_mutants("boxes", plain, 400), *json_mutants("boxes of annotations", whole, 400)]
    for number, (name, content) in enumerate(cases):
        yield name, partial(written, folder / f"{number}.json", content, use), (DepthsegError,)


def click_files(folder: Path) -> Iterator[Case]:
    def use(path: Path) -> None:
        source = PointsFile(path)
        source.expect(["a.jpg"])
        (found,) = source([shown()])
        assert np.isfinite(found.points).all() and len(source.categories(shown())) == len(found)

    entries = [
        {"file_name": "a.jpg", "points": [[10, 20], [30, 5]], "labels": [1, 0], "category_id": 4},
        {"file_name": "a.jpg", "points": [[3, 4]], "box": [1, 2, 10, 20]},
        {"image_id": 7, "box": [0, 0, 5, 6]},
    ]
    many = [{"file_name": "a.jpg", "points": [[1, 1]]}] * 3000 + [{"file_name": "a.jpg", "points": [[1, 1]] * 100_000}]
    for number, (case, content) in enumerate([*json_mutants("clicks", entries, 400), ("clicks without end", json.dumps(many).encode())]):
        yield case, partial(written, folder / f"{number}.json", content, use), (DepthsegError,)


def annotation_files(folder: Path) -> Iterator[Case]:
    (folder / "images").mkdir()
    PILImage.new("RGB", SIZE[::-1]).save(folder / "images" / "a.png")
    rle = masks.encode(np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) % 7 < 2)
    runs = {"size": list(SIZE), "counts": [100, 44, 600]}
    common = {"image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 12], "area": 60.5, "iscrowd": 0}
    forms = ([[2, 2, 20, 3, 21, 17, 4, 16]], rle, runs)
    table = {
        "images": [{"id": 1, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1], "coco_url": "x/y/a.png", "neg_category_ids": [2]}],
        "annotations": [{"id": n, "segmentation": form, **common} for n, form in enumerate(forms)],
        "categories": [{"id": 1, "name": "cat", "frequency": "r"}, {"id": 2, "name": "dog", "frequency": "f"}],
    }

    def judge(path: Path) -> None:
        with contextlib.suppress(DepthsegError):
            found = truth.read(path.parent, path)
            json.dumps(found.about())
            assert all(np.isfinite(t.box).all() for t in found.truths)
        for entry in sa1b.index([path]):  # also what to learn from
            sa1b.load(entry)

    def with_mask(segmentation: object) -> bytes:
        return json.dumps({**table, "annotations": [{"id": 1, **common, "segmentation": segmentation}]}, default=str).encode()

    cases = [*json_mutants("annotations", table, 400), *((name, with_mask(what)) for name, what in list(segmentations())[::3])]
    for number, (name, content) in enumerate(cases):
        yield name, partial(written, folder / "images" / f"{number}.json", content, judge), (DepthsegError, ValueError)


# ---- archives ----


def tar(*members: tuple[str, bytes, dict]) -> bytes:
    """An archive of (name, content, other fields of the header)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content, fields in members:
            info = tarfile.TarInfo(name)
            for field, value in {"size": len(content), **fields}.items():
                setattr(info, field, value)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


NOTES = [
    b"", b"[", b"[]", b"{}", b"null", b'{"annotations": null}', b'{"annotations": 3}', b'{"annotations": [3]}', b'{"annotations": [{}]}',
    b'{"annotations": {"a": 1}}', b"\xff", b"[" * 100_000,
]  # fmt: skip
MANIFESTS = [
    b"", b"\xff\xfe", b"\0", b"a,b\n1", b"rgb\nroot/a", b"file\n" + b"x" * 200_000, b'"', b"rgb,depth,scene\nroot/a",
    b"rgb,depth,scene\n1,2,3,4,5",
]  # fmt: skip


def archives(folder: Path) -> Iterator[Case]:
    sample = encoded(PILImage.new("RGB", SIZE[::-1]), "JPEG")
    rle = masks.encode(np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) % 5 < 2)
    note = json.dumps({"annotations": [{"segmentation": rle}] * 2}).encode()

    def pair(name: str, note: bytes = note, picture: bytes = sample, **about) -> bytes:
        return tar((f"{name}.jpg", picture, about), (f"{name}.json", note, about))

    def learn(path: Path) -> None:
        entries = sa1b.index([path])
        assert all(".." not in entry.key.split("/") for entry in entries)
        read = [sa1b.load(entry) for entry in entries]
        assert all(s.pixels.shape == (*SIZE, 3) and masks.decode(r).shape == SIZE for s in read for r in s.rles)

    good = pair("sa_1")
    zipped = gzip.compress(good, mtime=0)
    kinds = {
        "link": tarfile.SYMTYPE,
        "hard link": tarfile.LNKTYPE,
        "device": tarfile.CHRTYPE,
        "pipe": tarfile.FIFOTYPE,
        "folder": tarfile.DIRTYPE,
    }
    made = {
        "climbing": pair("../../sa_1"), "climbing inside": pair("a/../../sa_1"), "absolute": pair("/sa_1"), "twice": good[:-1024] + good,
        "of a strange name": pair("sa\n<b>[bold]\x1b[31m😀"), "without name": pair(""), "a long name": pair("x" * 5000),
        **{f"a {name}": pair("sa_1", b"", b"", type=kind, linkname="/etc/passwd", devmajor=1, devminor=5) for name, kind in kinds.items()},
        "sparse": pair("sa_1", type=tarfile.GNUTYPE_SPARSE), "nothing": b"", "zeros": bytes(10240), "text": b"text",
        "no pair": tar(("sa_1.jpg", sample, {})), "a zip": b"PK\3\4" + bytes(99), "gzip of nothing": gzip.compress(b""),
        "gzip twice": gzip.compress(zipped), "a bomb": gzip.compress(bytes(64 << 20)), "gzip of text": gzip.compress(b"text" * 999),
        "xz": lzma.compress(good), "an EPS": pair("sa_1", picture=EPS), "too large": pair("sa_1", picture=png(20_000, 20_000, 1, 0, b"")),
        "of another size": pair("sa_1", picture=encoded(PILImage.new("RGB", (9, 9)), "JPEG")),
        "a wrong sum": patched(good, 148, b"0000000\0"),
        "a lying size": patched(good, 124, b"77777777777\0"), "a negative size": patched(good, 124, b"\xff" * 12),
        **{f"JSON {content[:30]!r}": pair("sa_1", content) for content in NOTES},
    }  # fmt: skip
    for name, segmentation in list(segmentations())[::6]:
        made[name] = pair("sa_1", json.dumps({"annotations": [{"segmentation": segmentation}]}, default=str).encode())
    for number, (name, content) in enumerate([*made.items(), *mutants("tar", good, zipped, 96), *mutants("tar.gz", zipped, good, 96)]):
        (folder / f"{number}").mkdir()
        yield f"archive {name[:60]!r}", partial(written, folder / f"{number}" / "sa.tar", content, learn), (DepthsegError, ValueError)

    def listed(path: Path) -> None:
        with contextlib.suppress(DepthsegError):
            sa1b.index([path.parent / "root"])
        sa1b.depth_pairs([path.parent / "root"])

    for number, content in enumerate(MANIFESTS):
        (folder / f"manifest {number}" / "root").mkdir(parents=True)
        yield f"{content[:20]!r}", partial(written, folder / f"manifest {number}" / "manifest.csv", content, listed), (DepthsegError,)


# ---- checkpoints ----


class Opens:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def checkpoints(folder: Path) -> Iterator[Case]:
    import torch
    from safetensors.torch import save

    from depthseg.models import checkpoint

    warnings.simplefilter("ignore")  # torch's remarks on its own kinds of tensors
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    state = network.state_dict()

    def stored(content: object, **options) -> bytes:
        out = io.BytesIO()
        torch.save(content, out, **options)
        return out.getvalue()

    def load(path: Path) -> None:
        try:
            checkpoint.load_into(network, path)
        finally:
            assert not marker.exists(), "code from the file was run"

    def zipped(change: Callable[[str, bytes], bytes], how: int = zipfile.ZIP_STORED, times: int = 1) -> bytes:
        """The torch file with other members."""
        out = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(good["pt"])) as source, zipfile.ZipFile(out, "w", how) as target:
            for name in source.namelist() * times:
                target.writestr(name, change(name, source.read(name)))
        return out.getvalue()

    def tensors(header: bytes | dict, size: int | None = None, content: bytes = bytes(64)) -> bytes:
        header = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(header) if size is None else size) + header + content

    marker = folder / "was-here"
    table = {name: tensor.numpy() for name, tensor in state.items()}
    good = {
        "pt": stored(state), "safetensors": save(state), "pkl": pickle.dumps({"model": table, "__author__": "x"}, 2),
        "pth": stored({"model": state}, _use_new_zipfile_serialization=False),
    }  # fmt: skip
    opens = Opens(marker)
    evil = pickle.dumps({"a": opens})
    calls = (
        b"".join(b"c%b\n%b\n(S'touch %b'\ntR0" % (*f.split(), str(marker).encode()) for f in (b"os system", b"subprocess getoutput"))
        + b"N."
    )
    for bait in (evil, calls):  # which works, where it is not refused
        pickle.loads(bait)
        marker.unlink()
    one = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    weights = {
        "meta": torch.zeros(2, 3, device="meta"), "sparse": torch.ones(2, 3).to_sparse(), "complex": torch.ones(2, 3) * 1j,
        "quantised": torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8), "wide": torch.ones(1).expand(10**6, 10**6),
        "NaN": torch.full((2, 3), float("nan")), "text": "x", "none": None, "nested": state, "double": torch.ones(2, 3).double(),
    }  # fmt: skip
    round_: dict = {}
    round_["model"] = round_

    def pickled(content: bytes) -> bytes:
        """The torch file with another pickle."""
        return zipped(lambda name, old: content if name.endswith("data.pkl") else old)

    made = {
        **{f"{name}.pt": stored({**state, "0.weight": value}) for name, value in weights.items()}, "round.pt": stored(round_),
        "module.pt": stored(network), "evil.pt": stored({"a": opens}), "evil state.pt": stored({**state, "a": opens}),
        "evil.pth": stored({"a": opens}, _use_new_zipfile_serialization=False), "evil data.pt": pickled(evil),
        "calls data.pt": pickled(calls),
        "evil version.pt": zipped(lambda name, b: evil if name.endswith("version") else b), "calls.pkl": calls, "calls.pt": calls,
        **{f"evil.{kind}": evil for kind in ("pkl", "bin", "ckpt", "safetensors")}, "evil model.pkl": pickle.dumps({"model": opens}, 2),
        "evil array.pkl": pickle.dumps({"model": {"a": np.array([opens], object)}}, 2), "nested.pt": pickled(good["pt"]),
        "bomb.pt": zipped(lambda name, b: bytes(64 << 20) if "/data/" in name else b, zipfile.ZIP_DEFLATED),
        "lying sizes.pt": zipped(lambda name, b: b.replace(b"K\6", b"J\0\0\0\x40")), "empty parts.pt": zipped(lambda name, b: b""),
        "twice.pt": zipped(lambda name, b: b, times=2), "zip in zip.pt": zipped(lambda name, b: good["pt"]),
        "no parts.pt": b"PK\5\6" + bytes(18),
        "tar.pt": tar(*((name, good["pt"], {}) for name in ("sys_info", "pickle", "storages", "tensors"))),
        "gzip.pt": gzip.compress(good["pt"]),
        "memo.pkl": b"\x80\x04Nr" + struct.pack("<I", 2**28) + b".", "bytes.pkl": b"\x80\x04\x8e" + struct.pack("<Q", 2**40) + b".",
        "bytearray.pkl": b"\x80\x05\x96" + struct.pack("<Q", 2**33) + b".", "frame.pkl": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.",
        "deep.pkl": b"\x80\x04" + b"]" * 10**5 + b"a" * (10**5 - 1) + b".", "number.pkl": b"\x80\x02\x8b" + b"\xff\xff\xff\x7f.",
        "persistent.pkl": b"Pcmd\n.", "extension.pkl": b"\x80\x02\x82\x01.", "stack.pkl": b"\x80\x040000.", "mark.pkl": b"ttttt.",
        **{f"{name}.safetensors": tensors({"a": {**one, **change}}) for name, change in {
            "lying offsets": {"data_offsets": [0, 2**60]}, "backwards": {"data_offsets": [24, 0]}, "lying shape": {"shape": [2**32, 2**32]},
            "negative": {"shape": [-2, -3]}, "of no kind": {"dtype": "O"}, "of a list": {"dtype": []}, "without shape": {"shape": None},
        }.items()},
        "lying length.safetensors": tensors({"a": one}, 2**60), "longer than it is.safetensors": tensors({"a": one}, 2**20),
        "no header.safetensors": tensors(b""), "list.safetensors": tensors(b"[]"), "deep.safetensors": tensors(b"[" * 100_000),
        "overlapping.safetensors": tensors({"a": one, "b": one}), "not UTF-8.safetensors": tensors(b'{"\xff": 1}'),
        "names twice.safetensors": tensors(b'{"a": 1, "a": 2}'), "metadata.safetensors": tensors({"__metadata__": {"a": [1]}, "a": one}),
    }  # fmt: skip
    spoilt = [mutants(f"{k} checkpoint", whole, good["pt" if k != "pt" else "pkl"], 80) for k, whole in good.items()]
    named = [(f"{name}.{name.split()[0]}", content) for source in spoilt for name, content in source]
    for number, (name, content) in enumerate([*made.items(), *named]):
        yield name, partial(written, folder / f"{number}.{name.rpartition('.')[2]}", content, load), (DepthsegError,)


# ---- trying them ----

KINDS: dict[str, Callable[[Path], Iterator[Case]]] = {
    "pictures": pictures, "files": files, "masks": mask_files, "boxes": box_files, "clicks": click_files, "annotations": annotation_files,
    "archives": archives, "checkpoints": checkpoints,
}  # fmt: skip


def attempt(kind: str) -> dict:
    """Try all inputs of one kind: how many were answered and refused, and what should not have happened."""
    warnings.simplefilter("error", RuntimeWarning)  # arithmetic with NaN or beyond the range
    wrong: list[str] = []
    tally = {"answered": 0, "refused": 0}
    slowest, before = (0.0, ""), 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "outer", "inner")
        folder.mkdir(parents=True)
        for name, call, expected in KINDS[kind](folder):
            before = before or _peak()  # with all that is imported, and the first input
            start = time.perf_counter()
            try:
                call()
                tally["answered"] += 1
            except expected as error:
                tally["refused"] += 1
                said = getattr(error, "message", str(error))
                if not said.strip() or (isinstance(error, data.Unreadable) and not (said.isprintable() and len(said) < 300)):
                    wrong.append(f"{name}: says {said[:99]!r}")
            except Exception as error:
                wrong.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
            slowest = max(slowest, (time.perf_counter() - start, name))
        if strays := {path.name for path in (*Path(scratch).iterdir(), *folder.parent.iterdir())} - {"outer", "inner", "away"}:
            wrong.append(f"written outside: {strays}")
        if kept := [str(path) for path in folder.rglob("*.part")]:
            wrong.append(f"left behind: {kept}")
    return {**tally, "slowest": [round(slowest[0], 2), slowest[1]], "MiB": _peak() - before, "wrong": wrong}


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


@pytest.mark.parametrize("kind", KINDS)
def test_every_input_is_answered_or_refused_with_a_reason(kind):
    done = subprocess.run([sys.executable, __file__, kind], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
    tally = json.loads(done.stdout)
    assert not tally["wrong"], "\n".join(tally["wrong"])
    assert tally["answered"] + tally["refused"] == TRIED[kind]
    assert tally["slowest"][0] < SECONDS and tally["MiB"] < MIB, tally


def state_of(folder: Path, but: Path | None = None) -> dict[Path, tuple[int, int, int]]:
    """Kind, size and time of everything in a folder."""
    paths = [path for path in folder.rglob("*") if not (but and path.is_relative_to(but))]
    return {path: (about.st_mode, about.st_size, about.st_mtime_ns) for path in paths if (about := path.lstat()) and path != folder}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # pytest takes the place of the module's own filter
def test_a_run_over_hostile_files_does_the_good_ones(tmp_path, capfd):
    from depthseg import cli

    folder, out = tmp_path / "photos", tmp_path / "out"
    bad, good = no_files(folder), ["[bold]good\n<b>&\"'.jpg", "good 😀 ünïcode.png"]
    bad.append("z" * 250 + ".png")  # a good picture, but with .jpg behind it the name of its overlay is too long
    whole = PILImage.fromarray(np.kron(np.eye(4), np.ones((20, 20))).astype(np.uint8) * 200).convert("RGB")
    for name in (*good, bad[-1]):
        whole.save(folder / name)
    odd = {f"{n} {name.replace('/', ' ')[:60]}.jpg": content for n, (name, content) in enumerate(made_pictures()) if n % 8 == 0}
    for name, content in odd.items():  # most are no pictures either
        (folder / name).write_bytes(content)
    box = {"bbox": [2, 2, 30, 30], "score": 0.9, "category_id": 1, "category_name": "<i>\n😀"}
    (tmp_path / "boxes.json").write_text(json.dumps([{**box, "file_name": key} for key in (*good, *bad, *odd, "../../etc/passwd")]))
    before = state_of(tmp_path)
    with pytest.raises(SystemExit) as leaving:
        cli.main(["segment", str(folder), "-o", str(out), "--model", "nano", "--depth", "none", "--boxes", str(tmp_path / "boxes.json")])
    said = capfd.readouterr()
    assert leaving.value.code == SOME_FAILED, said.err
    assert "Traceback" not in said.err and "unexpected" not in said.err and said.out.strip() == str(out)
    assert state_of(tmp_path, but=out) == before

    failures = [json.loads(line) for line in (out / "failures.jsonl").read_text().split("\n")[:-1]]
    assert all(f["reason"].isprintable() for f in failures)
    failed, done = ([f[name] for f in rows] for name, rows in (("key", failures), ("file_name", read_json(out / "images.json")["images"])))
    assert sorted(failed + done) == sorted([*good, *bad, *odd]) and {*bad} <= {*failed} and {*good} <= {*done}
    counts = read_json(out / "run.json")["counts"]
    assert (counts["images"], counts["done"], counts["failed"]) == (len(good + bad) + len(odd), len(done), len(failed))
    assert {*good} <= {found["file_name"] for found in read_json(out / "predictions.json")} <= {*done}
    drawn = [path.relative_to(out / "overlays").as_posix() for path in (out / "overlays").rglob("*") if path.is_file()]
    assert sorted(drawn) == sorted(map(overlay_name, done))
    assert len(bad) + len(odd) == TRIED["runs"]


def read_json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def test_the_number_that_is_told_is_the_number_that_is_tried():
    assert f"{sum(TRIED.values()):,} malformed inputs" in str(__doc__)


if __name__ == "__main__":
    for kind in sys.argv[1:]:
        print(json.dumps(attempt(kind), indent=1))
    if not sys.argv[1:]:
        for kind, count in TRIED.items():
            print(f"{kind:12} {count:6,}")
        print(f"{'in all':12} {sum(TRIED.values()):6,} malformed inputs")
