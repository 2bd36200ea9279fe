"""Finding pictures and reading them: every kind of file becomes upright RGB or a phrase that says why not."""

import errno
import io
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from depthseg import data
from depthseg.errors import MISSING_PIECE, NOTHING_TO_DO, USAGE, DepthsegError
from depthseg.schema import Image


def keys(paths, exclude=None):
    return [image.key for image in data.find(paths, exclude)]


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def load(path: Path, max_pixels: int = 300_000_000) -> np.ndarray:
    image = data.read(Image("k", 1, path, (0, 0)), max_pixels)
    assert image.pixels.dtype == np.uint8 and image.size == image.pixels.shape[:2] and image.pixels.shape[2] == 3
    return image.pixels


def reason(path: Path, max_pixels: int = 300_000_000) -> str:
    with pytest.raises(data.Unreadable) as caught:
        load(path, max_pixels)
    return str(caught.value)


# ---- finding ----


def test_a_folder_keeps_its_tree_and_hides_the_hidden(tmp_path):
    root = touch(tmp_path / "in", "b.PNG", "a.jpg", "sub/deep/c.webp", "notes.txt", ".hidden.jpg", ".git/d.jpg")
    images = data.find([root])
    assert [i.key for i in images] == ["a.jpg", "b.PNG", "sub/deep/c.webp"]
    assert [i.id for i in images] == [1, 2, 3]
    assert images[2].path == root / "sub/deep/c.webp" and images[0].size == (0, 0) and images[0].pixels is None


def test_files_globs_and_repetitions(tmp_path):
    root = touch(tmp_path / "in", "a.jpg", "b.png", "[1].jpg", "sub/c.jpg")
    assert keys([root / "b.png", root / "a.jpg"]) == ["b.png", "a.jpg"]
    assert keys([root / "?.jpg"]) == ["a.jpg"]
    assert keys([root / "**/*.jpg"]) == ["[1].jpg", "a.jpg", "c.jpg"]
    assert keys([root / "[1].jpg"]) == ["[1].jpg"], "a name that looks like a glob"
    assert keys([root, root / "a.jpg", root / "sub"]) == ["[1].jpg", "a.jpg", "b.png", "sub/c.jpg"]


def test_a_named_file_is_taken_whatever_it_is_called(tmp_path):
    touch(tmp_path, "in/a.heic", "in/b", "in/c.jpg")
    assert keys([tmp_path / "in/a.heic", tmp_path / "in/b"]) == ["a.heic", "b"]
    assert keys([tmp_path / "in"]) == keys([tmp_path / "in/*"]) == ["c.jpg"]
    assert keys([tmp_path / "in", tmp_path / "in/a.heic"]) == ["c.jpg", "a.heic"]


def test_a_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(touch(tmp_path, "in/a.jpg", "in/sub/b.jpg"))
    assert keys(["in"]) == keys(["./in/"]) == keys([tmp_path / "in"])


def test_colliding_inputs_get_their_folders_in_front(tmp_path):
    touch(tmp_path, "x/cam/1.jpg", "x/cam/2.jpg", "y/cam/1.jpg", "y/other/3.jpg")
    assert keys([tmp_path / "x/cam", tmp_path / "y/cam"]) == ["x/cam/1.jpg", "x/cam/2.jpg", "y/cam/1.jpg"]
    assert keys([tmp_path / "x/cam/1.jpg", tmp_path / "y/other"]) == ["1.jpg", "3.jpg"]
    assert keys([tmp_path / "x", tmp_path / "y/cam/1.jpg"]) == ["cam/1.jpg", "cam/2.jpg", "1.jpg"]


def test_ids_are_the_stems_when_those_are_unique_integers(tmp_path):
    touch(tmp_path, "a/000000005001.jpg", "a/12.png")
    assert [i.id for i in data.find([tmp_path / "a"])] == [5001, 12]
    touch(tmp_path, "a/0012.jpg")
    assert [i.id for i in data.find([tmp_path / "a"])] == [1, 2, 3]


def test_the_output_folder_is_never_read(tmp_path):
    touch(tmp_path, "a.jpg", "out/overlays/a.jpg")
    assert keys([tmp_path], exclude=tmp_path / "out") == ["a.jpg"]
    assert keys([tmp_path / "**/*.jpg"], exclude=tmp_path / "out") == ["a.jpg"]
    assert keys([tmp_path], exclude=tmp_path / "new") == ["a.jpg", "out/overlays/a.jpg"]


def test_links_are_followed_once_and_loops_end(tmp_path):
    touch(tmp_path, "in/a.jpg", "in/sub/b.jpg", "far/c.jpg")
    (tmp_path / "in/sub/loop").symlink_to(tmp_path / "in")
    (tmp_path / "in/again").symlink_to(tmp_path / "in/sub")
    (tmp_path / "in/away").symlink_to(tmp_path / "far")
    (tmp_path / "in/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    assert keys([tmp_path / "in"]) == ["a.jpg", "away/c.jpg", "gone.jpg", "sub/b.jpg"]
    assert reason(tmp_path / "in/gone.jpg") == "no such file"


@pytest.mark.parametrize(("name", "code"), [("gone", USAGE), ("empty", NOTHING_TO_DO), ("*.jpg", NOTHING_TO_DO)])
def test_nothing_found_says_what_and_why(tmp_path, name, code):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DepthsegError, match=name.replace("*", r"\*")) as caught:
        data.find([tmp_path / name])
    assert caught.value.code == code
    assert code == USAGE or "webp" in caught.value.hint


def test_lists_are_lines_or_nul_separated():
    assert data.from_list(io.StringIO("a.jpg\r\n\nb c.jpg\n")) == ["a.jpg", "b c.jpg"]
    assert data.from_list(io.StringIO("a\nb.jpg\0c.jpg\0")) == ["a\nb.jpg", "c.jpg"]


def test_demo_photographs_or_how_to_get_them(monkeypatch):
    images = data.find(data.demo())
    assert {i.key for i in images} & {"bus.jpg", "grace_hopper.jpg"}
    assert min(data.read(images[0]).size) > 100
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DepthsegError, match="demo") as caught:
        data.demo()
    assert caught.value.code == MISSING_PIECE and "pip install" in caught.value.hint


# ---- reading ----

GREYS = np.arange(0, 65536, 1024, np.int64).reshape(8, 8)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path):
    expected = np.rint(GREYS / 257).astype(np.uint8)
    for name, array in {
        "a.png": GREYS.astype(np.uint16),
        "b.tif": GREYS.astype(np.uint16),
        "c.tif": GREYS.astype(np.int32),
    }.items():
        PILImage.fromarray(array).save(tmp_path / name)
        np.testing.assert_array_equal(load(tmp_path / name), expected[..., None].repeat(3, 2), err_msg=name)
    (tmp_path / "d.pgm").write_bytes(b"P5 8 8 65535\n" + GREYS.astype(">u2").tobytes())
    np.testing.assert_array_equal(load(tmp_path / "d.pgm")[..., 0], expected)


def test_floats_and_wide_integers_go_from_least_to_most(tmp_path):
    values = np.array([[-2.0, 0.0], [2.0, np.nan]], np.float32)
    PILImage.fromarray(values).save(tmp_path / "f.tif")
    assert load(tmp_path / "f.tif")[..., 1].tolist() == [[0, 128], [255, 0]]
    PILImage.fromarray(np.array([[0, 1_000_000]], np.int32)).save(tmp_path / "i.tif")
    assert load(tmp_path / "i.tif")[..., 1].tolist() == [[0, 255]]
    PILImage.fromarray(np.full((2, 2), 7, np.float32)).save(tmp_path / "flat.tif")
    assert load(tmp_path / "flat.tif").shape == (2, 2, 3)


def test_transparency_lies_on_white(tmp_path):
    red_to_clear = np.zeros((1, 2, 4), np.uint8)
    red_to_clear[..., 0] = 200
    red_to_clear[0, 0, 3] = 255
    rgba = PILImage.fromarray(red_to_clear)
    rgba.save(tmp_path / "rgba.png")
    rgba.convert("LA").save(tmp_path / "la.png")
    rgba.save(tmp_path / "rgba.webp", lossless=True)
    palette = PILImage.fromarray(np.array([[0, 1]], np.uint8))
    palette.putpalette([200, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "p.png", transparency=b"\xff\x00")
    palette.save(tmp_path / "p.gif", transparency=1)
    for name in ("rgba.png", "rgba.webp", "p.png", "p.gif"):
        assert load(tmp_path / name).tolist() == [[[200, 0, 0], [255, 255, 255]]], name
    assert load(tmp_path / "la.png")[0, 1].tolist() == [255] * 3


MODES = [("CMYK", "jpg"), ("CMYK", "tif"), ("L", "jpg"), ("1", "png"), ("1", "tif"), ("P", "png"), ("RGB", "ppm"), ("RGB", "bmp")]


@pytest.mark.parametrize(("mode", "extension"), MODES)
def test_every_mode_becomes_rgb(tmp_path, mode, extension):
    path = tmp_path / f"a.{extension}"
    PILImage.new("RGB", (16, 8), (255, 255, 255)).convert(mode).save(path)
    pixels = load(path)
    assert pixels.shape == (8, 16, 3) and pixels.min() > 245


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
def test_exif_orientation_is_undone_as_pillow_does(tmp_path, orientation, name):
    from PIL import ImageOps

    picture = PILImage.fromarray(np.kron(np.arange(6).reshape(2, 3), np.ones((8, 8))).astype(np.uint8) * 40).convert("RGB")
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / name, exif=exif)
    with PILImage.open(tmp_path / name) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    np.testing.assert_array_equal(load(tmp_path / name), expected)
    assert load(tmp_path / name).shape[:2] == ((16, 24) if orientation < 5 else (24, 16))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")  # pytest takes the place of the module's own filter
def test_broken_exif_does_not_cost_the_picture(tmp_path):
    PILImage.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    assert load(tmp_path / "a.jpg").shape == (8, 8, 3)


def test_unreadable_files_say_why(tmp_path):
    noise = PILImage.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    for name in ("a.jpg", "a.png", "a.bmp", "a.tif"):
        noise.save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        assert "truncated" in reason(tmp_path / name), name
    (tmp_path / "empty.jpg").touch()
    assert "empty" in reason(tmp_path / "empty.jpg")
    (tmp_path / "text.jpg").write_text("this is a text, whatever the name says")
    assert "not an image" in reason(tmp_path / "text.jpg")
    (tmp_path / "phone.jpg").write_bytes(b"\0\0\0\x18ftypheic" + bytes(32))
    assert "HEIC" in reason(tmp_path / "phone.jpg")
    assert reason(tmp_path / "gone.jpg") == "no such file"
    (tmp_path / "folder.jpg").mkdir()
    assert "not a regular file" in reason(tmp_path / "folder.jpg")
    noise.save(tmp_path / "large.png")
    assert "too large (64 x 64" in reason(tmp_path / "large.png", max_pixels=4095)
    assert load(tmp_path / "large.png", max_pixels=4096).shape == (64, 64, 3)


def test_beyond_pillows_own_limits_without_a_word(tmp_path):
    """100 megapixels decode; 400 are refused from the header; Pillow's global limit stays. In a process with plain warnings."""
    PILImage.new("L", (10_000, 10_000), 128).save(tmp_path / "a.jpg", quality=10)
    PILImage.new("1", (20_000, 20_000)).save(tmp_path / "b.png")
    (tmp_path / "c.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:300])
    PILImage.new("L", (9, 9)).save(tmp_path / "d.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff garbage")
    code = (
        "import sys; from PIL import Image as P; from depthseg import data; before = P.MAX_IMAGE_PIXELS\n"
        "for item in data.read_ahead(data.find(sys.argv[1:]), workers=1, ahead=1):\n"
        "    print(item.reason if isinstance(item, data.Failure) else (item.size, int(item.pixels[0, 0, 0])))\n"
        "assert P.MAX_IMAGE_PIXELS == before"
    )
    command = [sys.executable, "-W", "always", "-c", code, str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    lines = ran.stdout.splitlines()
    assert lines[0] == "((10000, 10000), 128)" and "400 megapixels, the limit is 300" in lines[1]
    assert lines[2:] == ["truncated file", "((9, 9), 0)"]
    assert ran.stderr == ""


def test_pixels_in_memory_are_left_alone():
    image = Image("k", 1, None, (2, 3), np.zeros((2, 3, 3), np.uint8))
    assert data.read(image) is image


# ---- reading ahead ----


def photograph(h: int, w: int) -> PILImage.Image:
    """Noise at several scales."""
    g = np.random.default_rng(0)
    octaves = [PILImage.fromarray(g.integers(0, 256, (n, n, 3), dtype=np.uint8)).resize((w, h), 3) for n in (4, 16, 64)]
    return PILImage.blend(PILImage.blend(octaves[0], octaves[1], 0.4), octaves[2], 0.2)


@pytest.mark.parametrize("orientation", (1, 6))
@pytest.mark.parametrize("mode", ("RGB", "L", "CMYK"))
@pytest.mark.parametrize("side", (803, 800))
def test_a_large_jpeg_comes_smaller_where_that_is_enough(tmp_path, orientation, mode, side):
    exif = PILImage.Exif()
    exif[0x0112] = orientation
    photograph(side - 200, side).convert(mode).save(tmp_path / "a.jpg", quality=90, exif=exif)
    whole = load(tmp_path / "a.jpg")
    for enough, scale in ((1000, 1), (side, 1), (side // 2 + 1, 1), (side // 2, 2), (200, 4), (100, 8), (10, 8)):
        image = data.read(Image("a.jpg", 1, tmp_path / "a.jpg", (0, 0)), enough=enough)
        assert image.size == whole.shape[:2] == ((side - 200, side) if orientation == 1 else (side, side - 200))
        assert image.pixels.shape[:2] == tuple(-(-n // scale) for n in image.size)
        small = np.asarray(PILImage.fromarray(whole).resize(image.pixels.shape[1::-1], PILImage.Resampling.BOX))
        assert np.abs(image.pixels.astype(int) - small).mean() < (1 if side % 8 == 0 else 6)  # the last pixel reaches beyond the edge


def test_only_jpegs_come_smaller(tmp_path):
    photograph(60, 80).save(tmp_path / "a.png")
    image = data.read(Image("a.png", 1, tmp_path / "a.png", (0, 0)), enough=10)
    assert image.size == image.pixels.shape[:2] == (60, 80)


def test_reading_ahead_keeps_order_and_bounds(pictures, monkeypatch):
    (pictures / "bad.jpg").write_text("no")
    images = data.find([pictures]) * 10
    lock, alive, most, real = threading.Lock(), 0, 0, data.read

    def counting(image, enough=None):
        nonlocal alive, most
        done = real(image)
        with lock:
            alive += 1
            most = max(most, alive)
        return done

    monkeypatch.setattr(data, "read", counting)
    seen = []
    for item in data.read_ahead(images, workers=3, ahead=4):
        seen.append(item.image.key if isinstance(item, data.Failure) else item.key)
        if isinstance(item, data.Failure):
            assert item.stage == "read" and "not an image" in item.reason
        else:
            with lock:
                alive -= 1
    assert seen == [image.key for image in images]
    assert most <= 4


def test_leaving_early_ends_the_threads(pictures):
    before = threading.active_count()
    stream = data.read_ahead(data.find([pictures]) * 50, workers=2, ahead=4)
    next(stream)
    assert threading.active_count() > before
    stream.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("turned", [1, 3, 6, 8])
def test_the_size_is_known_from_the_header(tmp_path, kind, turned):
    exif = PILImage.Exif()
    exif[0x0112] = turned
    path = tmp_path / f"a.{kind}"
    PILImage.new("RGB", (40, 24)).save(path, exif=exif)
    image = Image("k", 1, path, (0, 0))
    assert data.upright_size(image) == data.read(image).size == ((40, 24) if turned > 4 else (24, 40))
    path.write_bytes(path.read_bytes()[:5])
    with pytest.raises(data.Unreadable):
        data.upright_size(image)


def test_a_refused_file_is_a_failure_and_a_full_disk_is_not():
    image = Image("k", 1, None, (0, 0))
    assert data.not_written(image, OSError(errno.ENAMETOOLONG, "File name too long")) == data.Failure(image, "write", "File name too long")
    with pytest.raises(DepthsegError, match="full"):
        data.not_written(image, OSError(errno.ENOSPC, "disk full"))


def test_an_exception_comes_after_the_results_before_it():
    def items():
        yield from (1, 2, 3)
        raise KeyboardInterrupt(15)

    stream, seen = data.in_threads(lambda n: 6 // (n - 2), items(), workers=2, ahead=5), []
    with pytest.raises(ZeroDivisionError):
        seen += [next(stream), next(stream)]
    stream = data.in_threads(str, items(), workers=2, ahead=5)
    with pytest.raises(KeyboardInterrupt, match="15"):
        for n in stream:
            seen.append(n)
    assert seen == ["1", "2", "3"]
