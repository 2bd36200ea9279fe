"""What a run becomes in other formats is what those formats' own readers make of it: the very masks, or a loss that was counted."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image as PILImage
from PIL import ImageDraw
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from scipy import ndimage
from typer.testing import CliRunner

from depthseg import convert_cli, data, export, masks, outlines
from depthseg.errors import NOTHING_TO_DO, SOME_FAILED, USAGE, DepthsegError
from depthseg.plan import Plan
from depthseg.schema import Masks, Record
from depthseg.sink import Sink

PLAN = Plan(overlays=False, labelmaps=False)
NAMES = {17: "cat", 1: "a person/é", 0: "object"}
PICTURES = {"a.png": (40, 56), "empty.jpg": (16, 24), "sub/a.png": (33, 21)}  # h, w
app = typer.Typer()
app.command()(convert_cli.convert)


def shapes(size) -> list[np.ndarray]:
    """Bool masks (h, w): a ring with an island in its hole, parts that meet in a corner and one far away, one pixel, a frame along the
    border, everything, and a ragged one."""
    h, w = size
    out = np.zeros((6, h, w), bool)
    out[0, 4:14, 5:17] = True
    out[0, 6:12, 7:15] = False
    out[0, 8:10, 9:12] = True
    out[1, 16:20, 2:6] = out[1, 20:24, 6:10] = out[1, 28:31, 15:19] = True
    out[2, 9, 10] = True
    out[3] = True
    out[3, 1:-1, 2:-2] = False
    out[4] = True
    out[5] = ndimage.gaussian_filter(np.random.default_rng(h).random(size), 1.5) > 0.52
    return list(out)


def record(image, regions) -> Record:
    rle = [masks.encode(m) for m in regions]
    n = len(rle)
    score = np.linspace(0.93, 0.4, n, dtype=np.float32)
    label = np.array([17, 1, 0, 17, 1, 0] * n)[:n]
    found = Masks(rle, masks.boxes(rle), masks.area(rle), score, score, score, label, {i: NAMES[i] for i in set(label.tolist())})
    return Record(image, found, PLAN.digest())


def write_run(folder: Path, photos: Path, regions=shapes) -> Path:
    images = data.find([photos])
    with Sink(folder, PLAN, images, {}) as sink:
        for image in images:
            image = data.read(image)
            sink.write(record(image, [] if "empty" in image.key else regions(image.size)))
    return folder


@pytest.fixture
def photos(tmp_path):
    for seed, (name, size) in enumerate(PICTURES.items()):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        PILImage.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)
    return tmp_path / "photos"


@pytest.fixture
def run(tmp_path, photos):
    return write_run(tmp_path / "run", photos)


def convert(run, output, *names, photos=None, polygons=False) -> export.Report:
    return export.convert(export.Run.read(run, photos), output, names, polygons)


def command(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def drawn(size, points) -> np.ndarray:
    """As LabelMe draws a polygon."""
    canvas = PILImage.new("L", size[::-1])
    ImageDraw.Draw(canvas).polygon([tuple(xy) for xy in points], outline=1, fill=1)
    return np.array(canvas, bool)


# ---- outlines ----


@pytest.mark.parametrize("smooth", [0, 0.6, 2])
def test_outlines_give_the_very_mask_to_every_reader(smooth):
    rng = np.random.default_rng(1)
    for _ in range(150):
        size = tuple(rng.integers(1, 36, 2).tolist())
        noise = rng.random(size)
        noise = ndimage.gaussian_filter(noise, smooth) if smooth else noise
        mask = noise >= np.quantile(noise, rng.random())
        parts = outlines.outlines(mask)
        assert len(parts) == ndimage.label(mask)[1]
        corners = [outlines.exact(part) for part in parts]
        assert all(len(xy) >= 4 for xy in corners), "pycocotools would read fewer as a box"
        rle = coco_mask.merge(coco_mask.frPyObjects([xy.ravel().tolist() for xy in corners], *size))
        assert np.array_equal(coco_mask.decode(rle), mask)
        turned = [np.roll(xy, -1, axis=0) for xy in corners]
        assert sum((a[:, 0] * b[:, 1] - b[:, 0] * a[:, 1]).sum() for a, b in zip(corners, turned)) == 2 * mask.sum(), "clockwise, holes not"
        assert np.array_equal(np.any([drawn(size, outlines.inset(part)) for part in parts], axis=0), mask)


def test_outlines_by_hand():
    assert outlines.outlines(np.zeros((3, 4), bool)) == []
    (two,) = outlines.outlines(np.ones((1, 2), bool))
    assert two.tolist() == [[0, 0, 1, 1], [2, 0, -1, 1], [2, 1, -1, -1], [0, 1, 1, -1]]
    ring = np.ones((3, 3), bool)
    ring[1, 1] = False
    (cut,) = outlines.outlines(ring)
    assert outlines.exact(cut).tolist() == [[0, 0], [3, 0], [3, 3], [0, 3], [0, 1], [1, 1], [1, 2], [2, 2], [2, 1], [1, 1], [0, 1]]
    assert len(outlines.outlines(np.eye(3, dtype=bool))) == 3, "corners do not connect"


# ---- COCO ----


def test_coco_results_are_what_the_run_wrote(tmp_path, run):
    report = convert(run, tmp_path / "out", "coco-results")
    written = tmp_path / "out/coco-results/predictions.json"
    assert written.read_bytes() == (run / "predictions.json").read_bytes()
    assert (report.images, report.instances, report.failures, report.lost) == (3, 12, [], {"coco-results": (0, 0)})
    truth = COCO()
    truth.dataset = json.loads((run / "images.json").read_text())
    truth.createIndex()
    assert len(truth.loadRes(str(written)).anns) == 12


@pytest.mark.parametrize("polygons", [False, True])
def test_coco_instances_are_the_masks(tmp_path, run, polygons):
    convert(run, tmp_path / "out", "coco-instances", polygons=polygons)
    read = COCO(str(tmp_path / "out/coco-instances/instances.json"))
    assert {i["file_name"]: (i["height"], i["width"]) for i in read.imgs.values()} == PICTURES
    assert {c["id"]: c["name"] for c in read.cats.values()} == NAMES
    assert sorted(read.anns) == list(range(1, 13)), "an id of 0 would count as no match"
    for image in read.imgs.values():
        expected = [] if "empty" in image["file_name"] else shapes((image["height"], image["width"]))
        found = read.imgToAnns[image["id"]]
        assert len(found) == len(expected)
        for annotation, mask in zip(found, expected):
            assert np.array_equal(read.annToMask(annotation), mask)
            assert isinstance(annotation["segmentation"], list) is polygons
            (y0, y1), (x0, x1) = ((hit.min(), hit.max() + 1) for hit in np.nonzero(mask))
            assert annotation["bbox"] == [x0, y0, x1 - x0, y1 - y0]
            assert (annotation["area"], annotation["iscrowd"]) == (mask.sum(), 0)


def test_an_instance_without_pixels_is_left_out(tmp_path, photos):
    run = write_run(tmp_path / "run", photos, lambda size: [np.zeros(size, bool), *shapes(size)[:1]])
    report = convert(run, tmp_path / "out", *export.FORMATS, photos=photos, polygons=True)
    assert report.failures == []
    assert len(COCO(str(tmp_path / "out/coco-instances/instances.json")).anns) == 2
    assert (tmp_path / "out/yolo-seg/labels/a.txt").read_text().count("\n") == 1


# ---- YOLO ----


def test_ultralytics_reads_the_masks(tmp_path, run, photos):
    pytest.importorskip("ultralytics")
    from ultralytics.data.dataset import YOLODataset
    from ultralytics.data.utils import check_det_dataset, polygon2mask, verify_image_label

    report = convert(run, tmp_path / "out", "yolo-seg")
    folder = tmp_path / "out/yolo-seg"
    (photos.parent / "photos").rename(folder / "images")
    found = check_det_dataset(str(folder / "data.yaml"))
    assert found["names"] == {0: "object", 1: "a person/é", 2: "cat"}, "ordered by category id"

    dataset = YOLODataset(img_path=found["train"], data=found, task="segment", augment=False, imgsz=56)
    about = {Path(label["im_file"]).relative_to(folder / "images").as_posix(): label for label in dataset.labels}
    assert about.keys() == PICTURES.keys() and len(about["empty.jpg"]["cls"]) == 0
    added, joined = 0, 0
    for key in ("a.png", "sub/a.png"):
        (h, w), label = PICTURES[key], about[key]
        assert label["cls"].ravel().tolist() == [2, 1, 0, 2, 1, 0]
        for mask, points, box in zip(shapes((h, w)), label["segments"], label["bboxes"]):
            seen = polygon2mask((h, w), [(points * (w, h)).ravel()]).astype(bool)
            assert seen[mask].all()
            parts = ndimage.label(mask)[1]
            assert parts > 1 or np.array_equal(seen, mask)
            added, joined = added + (seen & ~mask).sum(), joined + (parts > 1)
            (y0, y1), (x0, x1) = ((hit.min(), hit.max() + 1) for hit in np.nonzero(mask))
            assert np.allclose(box * (w, h, w, h), [(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0], atol=0.3)
        checked = verify_image_label((str(folder / "images" / key), str(folder / f"labels/{key[:-4]}.txt"), "", False, 3, 0, 2, False))
        assert checked[-1] == "" and checked[5:9] == (0, 1, 0, 0), "nothing missing, empty or corrupt"
    instances, pixels = report.lost["yolo-seg"]
    assert 0 < instances <= joined and 0.8 * added <= pixels <= 1.2 * added, "OpenCV may step diagonally elsewhere than Pillow"

    whole = next(item for item in dataset if item["im_file"].endswith("images/a.png"))  # 40 x 56, on a square of 56
    assert whole["masks"].max() == 6 and len(whole["bboxes"]) == 6


def test_names_that_differ_in_their_extension_alone(tmp_path, photos):
    (photos / "a.jpg").write_bytes((photos / "a.png").read_bytes())
    run = write_run(tmp_path / "run", photos)
    report = convert(run, tmp_path / "out", "yolo-seg", "labelme", "labelmap")
    assert [(name, failure.image.key) for name, failure in report.failures] == [("yolo-seg", "a.png"), ("labelme", "a.png")]
    assert "a.jpg has the same name" in report.failures[0][1].reason
    assert (tmp_path / "out/labelmap/a.jpg.png").exists() and (tmp_path / "out/labelmap/a.png.png").exists()


# ---- LabelMe ----


@pytest.mark.parametrize("known", [True, False])
def test_labelme_has_what_its_loader_asks_for(tmp_path, run, photos, known):
    report = convert(run, tmp_path / "out", "labelme", photos=photos if known else None)
    assert report.lost == {"labelme": (0, 0)}
    for key, (h, w) in PICTURES.items():
        path = (tmp_path / "out/labelme" / key).with_suffix(".json")
        read = json.loads(path.read_text())
        assert {"version", "flags", "shapes", "imagePath", "imageData", "imageHeight", "imageWidth"} == set(read)
        assert (read["imageHeight"], read["imageWidth"], read["imageData"]) == (h, w, None)
        assert (path.parent / read["imagePath"]).samefile(photos / key) if known else read["imagePath"] == Path(key).name
        for shape in read["shapes"]:
            assert isinstance(shape["label"], str) and isinstance(shape["flags"], dict) and shape["shape_type"] == "polygon"
            assert len(shape["points"]) > 2 and all(0 <= x <= w and 0 <= y <= h for x, y in shape["points"])
        at = 0
        for n, mask in enumerate([] if key == "empty.jpg" else shapes((h, w)), 1):
            parts = ndimage.label(mask)[1]
            mine, at = read["shapes"][at : at + parts], at + parts
            assert {shape["group_id"] for shape in mine} == {n if parts > 1 else None}
            assert np.array_equal(np.any([drawn((h, w), shape["points"]) for shape in mine], axis=0), mask)
        assert at == len(read["shapes"])


# ---- pictures and arrays ----


def test_npz(tmp_path, run):
    convert(run, tmp_path / "out", "npz")
    for key, size in PICTURES.items():
        expected = [] if key == "empty.jpg" else shapes(size)
        with np.load(tmp_path / f"out/npz/{key}.npz", allow_pickle=False) as file:
            assert tuple(file["size"]) == size
            unpacked = np.unpackbits(file["masks"], axis=2, count=file["size"][1])
            assert unpacked.shape == (len(expected), *size) and all(np.array_equal(a, b) for a, b in zip(unpacked, expected))
            assert file["boxes"].shape == (len(expected), 4) and file["scores"].dtype == np.float32
            assert file["names"].tolist() == [NAMES[i] for i in file["labels"].tolist()]


def test_cutouts_are_the_photograph_under_the_mask(tmp_path, run, photos):
    assert convert(run, tmp_path / "out", "cutouts", photos=photos).failures == []
    for key in ("a.png", "sub/a.png"):
        pixels, files = np.asarray(PILImage.open(photos / key)), sorted((tmp_path / "out/cutouts" / key).iterdir())
        assert [f.name for f in files][:3] == ["000_cat_0.93.png", "001_a_person_é_0.82.png", "002_object_0.72.png"]
        for path, mask in zip(files, shapes(PICTURES[key]), strict=True):
            (y0, y1), (x0, x1) = ((hit.min(), hit.max() + 1) for hit in np.nonzero(mask))
            cut = np.asarray(PILImage.open(path))
            assert np.array_equal(cut[..., 3], mask[y0:y1, x0:x1] * 255) and np.array_equal(cut[..., :3], pixels[y0:y1, x0:x1])
    assert not (tmp_path / "out/cutouts/empty.jpg").exists()


def test_labelmap_says_what_its_values_are_and_what_it_hides(tmp_path, run):
    report = convert(run, tmp_path / "out", "labelmap")
    hidden = []
    for key in PICTURES:
        labels = np.asarray(PILImage.open(tmp_path / f"out/labelmap/{key}.png"))
        about = json.loads((tmp_path / f"out/labelmap/{key}.json").read_text())
        assert labels.dtype == np.uint8 and labels.shape == PICTURES[key]
        above = np.zeros(labels.shape, bool)
        for n, mask in enumerate([] if key == "empty.jpg" else shapes(labels.shape), 1):
            assert np.array_equal(labels == n, mask & ~above)
            assert about[str(n)]["category"] == NAMES[about[str(n)]["category_id"]] and 0.4 <= about[str(n)]["score"] <= 0.93
            hidden.append(int((mask & above).sum()))
            above |= mask
        assert len(about) == (0 if key == "empty.jpg" else 6), "one that is hidden altogether is listed too"
    assert report.lost == {"labelmap": (np.count_nonzero(hidden), sum(hidden))}


def test_a_labelmap_of_many_and_of_too_many(tmp_path, photos, monkeypatch):
    def dots(size):
        return [np.arange(size[0] * size[1]).reshape(size) == i for i in range(300)]

    run = write_run(tmp_path / "run", photos, dots)
    assert convert(run, tmp_path / "out", "labelmap").failures == []
    labels = np.asarray(PILImage.open(tmp_path / "out/labelmap/a.png.png"))
    assert labels.dtype == np.uint16 and labels.max() == 300
    monkeypatch.setattr(export, "_MOST_LABELS", 299)
    report = convert(run, tmp_path / "fewer", "labelmap", "npz")
    assert [(name, failure.image.key) for name, failure in report.failures] == [("labelmap", "a.png"), ("labelmap", "sub/a.png")]
    assert sorted(p.name for p in (tmp_path / "fewer/labelmap").iterdir()) == ["empty.jpg.json", "empty.jpg.png"]
    assert (tmp_path / "fewer/npz/a.png.npz").exists()


def test_overlays_and_instances(tmp_path, run, photos):
    convert(run, tmp_path / "out", "overlay", "instances", photos=photos)
    assert {p.relative_to(tmp_path / "out/overlay").as_posix() for p in (tmp_path / "out/overlay").rglob("*.jpg")} == {
        "a.png.jpg",
        "empty.jpg",
        "sub/a.png.jpg",
    }
    files = sorted((tmp_path / "out/instances/sub/a.png").iterdir())
    for path, mask in zip(files, shapes(PICTURES["sub/a.png"]), strict=True):
        assert np.array_equal(np.asarray(PILImage.open(path)), mask)


def test_a_photograph_that_is_gone_or_another_one(tmp_path, run, photos):
    (photos / "a.png").unlink()
    PILImage.new("RGB", (8, 8)).save(photos / "sub/a.png")
    report = convert(run, tmp_path / "out", "overlay", "labelmap", photos=photos)
    reasons = {failure.image.key: failure.reason for name, failure in report.failures if name == "overlay"}
    assert reasons == {
        "a.png": "no such file",
        "sub/a.png": "the photograph is 8 x 8 pixels, the one that was segmented had 21 x 33",
    }
    assert len(report.failures) == 2 and (tmp_path / "out/labelmap/a.png.png").exists()


# ---- the run ----


def test_a_killed_run_whose_last_line_is_torn(tmp_path, run):
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(about | {"state": "running"}))
    whole = (run / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (run / "journal.jsonl").write_bytes(whole[0] + whole[1] + whole[0] + whole[2][:-200])
    (run / "predictions.json").unlink()
    (run / "images.json").write_text("what an earlier run left")
    report = convert(run, tmp_path / "out", "coco-results", "coco-instances")
    assert (report.images, report.instances) == (2, 6), "a picture that was done twice counts once"
    images = json.loads((tmp_path / "out/coco-instances/instances.json").read_text())["images"]
    assert [(i["id"], i["file_name"]) for i in images] == [(1, "a.png"), (2, "empty.jpg")]


def test_ids_are_unique_in_a_killed_run_of_two_sources(tmp_path, run):
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(about | {"state": "running"}))
    lines = [json.loads(line) | {"id": 7} for line in (run / "journal.jsonl").read_text().splitlines()]
    (run / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert sorted(image.id for image in export.Run.read(run).images) == [7, 8, 9]


def test_a_broken_line_is_a_failure(tmp_path, run):
    text = (run / "journal.jsonl").read_text().splitlines()
    text[0] = text[0].replace('"counts": "', '"counts": "~')
    text[2] = "{"
    (run / "journal.jsonl").write_text("\n".join(text) + "\n")
    report = convert(run, tmp_path / "out", "npz")
    assert report.images == 1 and {failure.image.key for _, failure in report.failures} == {"a.png", "sub/a.png"}


@pytest.mark.parametrize("key", ["../evil.png", "/tmp/evil.png", "sub/../../evil.png", "..", "", "a\0.png"])
def test_a_hostile_key_writes_nothing(tmp_path, run, photos, key):
    for name in ("journal.jsonl", "images.json"):
        text = (run / name).read_text().replace(json.dumps("sub/a.png"), json.dumps(key))
        (run / name).write_text(text)
    before = {path for path in tmp_path.rglob("*")}
    report = convert(run, tmp_path / "deep/er/out", *export.FORMATS, photos=photos)
    assert [(name, failure.reason) for name, failure in report.failures] == [("all formats", "its key leads out of the folder")]
    new = {path for path in tmp_path.rglob("*")} - before - {tmp_path / "deep", tmp_path / "deep/er"}
    assert all(path.is_relative_to(tmp_path / "deep/er/out") for path in new)
    assert not any("evil" in path.name for path in new) and not Path("/tmp/evil.png.npz").exists()


# ---- the command ----


def test_the_command(tmp_path, run, photos):
    out = tmp_path / "out"
    done = command(run, "-o", out, "--to", "labelmap, yolo-seg,npz", "--images", photos)
    assert done.exit_code == 0 and done.stdout.strip() == str(out)
    assert sorted(path.name for path in out.iterdir()) == ["labelmap", "npz", "yolo-seg"]
    assert "labelmap: 6 of 12 instances are not exact" in done.stderr and "pixels hidden where instances overlap" in done.stderr
    assert "yolo-seg: " in done.stderr and "3 images, 12 masks" in done.stderr
    assert "npz:" not in done.stderr
    assert not list(out.rglob(".*.part"))


def test_the_command_knows_every_format():
    assert list(export.FORMATS) == convert_cli.NAMES
    assert set(export.LOSSES) | set(export.NEED_PHOTOGRAPHS) <= set(export.FORMATS)


@pytest.mark.parametrize(
    "words, said",
    [
        ("run -o out --to npz,tiff", "no format is called 'tiff'"),
        ("run -o out --to npz,", "no format is called ''"),
        ("photos -o out --to npz", "holds no run"),
        ("nowhere -o out --to npz", "holds no run"),
        ("run -o out --to overlay,cutouts", "overlay and cutouts need the photographs"),
        ("run -o out --to overlay --images nowhere", "there is no folder nowhere"),
        ("run -o out --to npz --polygons", "--polygons is about coco-instances alone"),
        ("run -o run --to instances", "lies inside the input run"),
        ("run -o run/overlays --to npz", "lies inside the input run"),
        ("run -o photos --to overlay --images photos", "lies inside the input photos"),
        ("full -o full --to npz", "holds no run"),
        ("run -o full --to npz", "is not empty"),
        ("run -o full --to labelmap", "is a file"),
    ],
)
def test_what_the_command_refuses(tmp_path, run, photos, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full/npz").mkdir(parents=True)
    (tmp_path / "full/npz/mine.txt").touch()
    (tmp_path / "full/labelmap").touch()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    done = command(*words.split())
    assert isinstance(done.exception, DepthsegError) and said in done.exception.message and done.exception.code == USAGE
    assert done.exception.hint
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_overwriting(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out/npz").mkdir(parents=True)
    (tmp_path / "out/npz/a.png.npz").touch()
    assert command("run", "-o", "out", "--to", "npz", "--overwrite").exit_code == 0
    assert np.load("out/npz/a.png.npz")["scores"].shape == (6,)
    (tmp_path / "npz").mkdir()
    run.rename(tmp_path / "npz/run")
    done = command("npz/run", "-o", ".", "--to", "npz", "--overwrite")
    assert "holds an input" in done.exception.message


def test_failures_are_told_and_end_in_their_exit_code(tmp_path, run, photos):
    (photos / "a.png").unlink()
    done = command(run, "-o", tmp_path / "out", "--to", "overlay", "--images", photos)
    assert done.exit_code == SOME_FAILED and "failed: a.png, overlay: no such file" in done.stderr


def test_a_run_with_nothing_done(tmp_path, photos):
    with Sink(tmp_path / "run", PLAN, data.find([photos]), {}):
        pass
    done = command(tmp_path / "run", "-o", tmp_path / "out", "--to", "npz")
    assert done.exception.code == NOTHING_TO_DO


def test_no_torch_is_needed(tmp_path, run):
    words = [str(run), "-o", str(tmp_path / "out"), "--to", "coco-instances,yolo-seg,labelme,npz,labelmap,instances,coco-results"]
    code = f"import sys, typer\nfrom depthseg.convert_cli import convert\ntyper.run(convert) if sys.argv[1:] else None\n{words!r}"
    done = subprocess.run([sys.executable, "-X", "importtime", "-c", code, *words], capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "out/npz/a.png.npz").exists(), done.stderr[-2000:]
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "depthseg.export" in loaded and "torch" not in loaded
