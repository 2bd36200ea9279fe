"""Boxes and clicks from files, YOLOv8 with random weights, and our own box network in front of a five-line fake."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from depthseg import schema
from depthseg.detect import BoxesFile, PointsFile
from depthseg.detect.classes import COCO_IDS, COCO_NAMES
from depthseg.detect.nano import NanoBoxes
from depthseg.detect.yolo import Yolo
from depthseg.errors import MISSING_PIECE, NOTHING_TO_DO, USAGE, DepthsegError
from depthseg.schema import Boxes, Image, Prompts


def image(key="a.jpg", h=40, w=60, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
    return Image(key, seed, None, (h, w), pixels)


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def entry(**changes):
    return {"file_name": "a.jpg", "bbox": [1, 2, 10, 20], "score": 0.5, "category_id": 3, **changes}


# ---- boxes from a file ----


def test_boxes_are_clipped_sorted_limited_and_by_image(tmp_path):
    entries = [
        entry(score=0.2),
        entry(file_name="b.jpg", category_id=7),
        entry(bbox=[-5, 30, 1000, 1e30], score=0.9),  # beyond the image
        entry(bbox=[70, 5, 10, 10], score=0.99),  # outside the image: nothing is left
        entry(bbox=[5, 5, 0, 10], score=0.98),  # no width
        entry(bbox=[0, 0, 4, 4], score=0.05),  # under the confidence
        entry(bbox=[2, 2, 4, 4], score=0.2),  # as good as the first, which stays before it
    ]
    detector = BoxesFile(write(tmp_path / "boxes.json", entries), confidence=0.1)
    b, none, a = detector([image("b.jpg"), image("c.jpg"), image("a.jpg")])
    assert a.xyxy.tolist() == [[0, 30, 60, 40], [1, 2, 11, 22], [2, 2, 6, 6]]
    assert a.score.tolist() == pytest.approx([0.9, 0.2, 0.2]) and a.label.tolist() == [3, 3, 3]
    assert (a.xyxy.dtype, a.score.dtype, a.label.dtype) == (np.float32, np.float32, np.int64)
    assert len(none) == 0 and b.label.tolist() == [7]
    (best,) = BoxesFile(tmp_path / "boxes.json", max_boxes=1)([image("a.jpg")])
    assert best.xyxy.tolist() == [[0, 30, 60, 40]]
    assert detector([]) == []


def test_missing_score_and_category_are_one(tmp_path):
    (found,) = BoxesFile(write(tmp_path / "b.json", [{"file_name": "a.jpg", "bbox": [1, 2, 3, 4]}]))([image()])
    assert found.score.tolist() == [1] and found.label.tolist() == [1] and found.names == {}


@pytest.mark.parametrize(
    ("name", "key", "fits"),
    [
        ("a.jpg", "a.jpg", True),
        ("a.jpg", "sub/a.jpg", True),
        ("val2017/a.jpg", "a.jpg", True),
        ("val2017/a.jpg", "coco/val2017/a.jpg", True),
        ("train/a.jpg", "val/a.jpg", False),
        ("a.jpg", "aa.jpg", False),
        ("a.jpg", "a.png", False),
    ],
)
def test_how_names_match(tmp_path, name, key, fits):
    detector = BoxesFile(write(tmp_path / "b.json", [entry(file_name=name)]))
    if fits:
        assert detector.expect([key]) == []
    else:
        with pytest.raises(DepthsegError, match=f"the first is about {name}") as error:
            detector.expect([key])
        assert error.value.code == NOTHING_TO_DO and key in error.value.hint
    assert len(detector([image(key)])[0]) == fits


def test_a_name_that_fits_two_images_is_refused_before_the_first(tmp_path):
    detector = BoxesFile(write(tmp_path / "b.json", [entry(file_name="a.jpg")]))
    with pytest.raises(DepthsegError, match=r"x/a\.jpg and y/a\.jpg") as error:
        detector.expect(["x/a.jpg", "z.jpg", "y/a.jpg"])
    assert error.value.code == USAGE
    detector = BoxesFile(tmp_path / "b.json")
    assert detector.expect(["x/a.jpg", "a.jpg"]) == []  # the whole path is not ambiguous
    assert [len(found) for found in detector([image("x/a.jpg"), image("a.jpg")])] == [0, 1]


def test_names_that_fit_nothing_are_told_by_entry(tmp_path):
    entries = [entry(file_name="y/a.jpg"), entry(file_name="x/a.jpg"), {"image_id": 7, "bbox": [1, 2, 3, 4]}, entry(file_name="y/a.jpg")]
    detector = BoxesFile(write(tmp_path / "b.json", entries))
    assert detector.expect(["a.jpg", "x/a.jpg"]) == ["y/a.jpg", "7", "y/a.jpg"] and len(detector) == 4
    assert [len(found) for found in detector([image("a.jpg"), image("x/a.jpg")])] == [0, 1]  # a.jpg fits two entries
    assert BoxesFile(write(tmp_path / "b.json", [])).expect(["a.jpg"]) == []


def test_a_users_boxes_are_all_used(tmp_path):
    entries = [entry(score=-3), *(entry(score=0.001 * k) for k in range(150))]
    path = write(tmp_path / "b.json", entries)
    assert [len(BoxesFile(path, **limits)([image()])[0]) for limits in ({}, {"confidence": 0.1}, {"max_boxes": 7})] == [151, 50, 7]


def test_image_ids(tmp_path):
    entries = [{"image_id": 139, "bbox": [1, 2, 3, 4]}, {"image_id": 5, "bbox": [1, 2, 3, 4]}]
    path = write(tmp_path / "b.json", entries)
    detector = BoxesFile(path)
    assert [len(f) for f in detector([image("val/000000000139.jpg"), image("x139.jpg"), image("-5.jpg")])] == [1, 0, 0]
    assert detector.expect(["val/000000000139.jpg"]) == ["5"]
    table = {"images": [{"id": 139, "file_name": "cat.jpg"}], "categories": [{"id": 1, "name": "person"}]}
    detector = BoxesFile(path, images_json=write(tmp_path / "images.json", table))
    (cat, number) = detector([image("cat.jpg"), image("139.jpg")])
    assert len(cat) == 1 and len(number) == 0 and cat.names == {1: "person"}
    assert detector.expect(["cat.jpg"]) == ["image_id 5"]


def test_ground_truth_file(tmp_path):
    truth = {
        "images": [{"id": 8, "file_name": "a.jpg"}],
        "categories": [{"id": 3, "name": "car"}, {"id": 4, "name": "boat"}],
        "annotations": [
            {"id": 1, "image_id": 8, "bbox": [1, 2, 3, 4], "category_id": 3, "iscrowd": 0},
            {"id": 2, "image_id": 8, "bbox": [0, 0, 30, 30], "category_id": 4, "iscrowd": 1},
        ],
    }
    (found,) = BoxesFile(write(tmp_path / "truth.json", truth))([image("a.jpg")])
    assert found.xyxy.tolist() == [[1, 2, 4, 6]] and found.score.tolist() == [1] and found.names == {3: "car"}
    assert BoxesFile(write(tmp_path / "empty.json", {**truth, "annotations": []}))([image()])[0].xyxy.shape == (0, 4)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[{", ["not JSON"]),
        ("[" * 100_000, ["not JSON"]),
        ({"boxes": []}, ["a list"]),
        ([entry(), 3], ["entry 1", "object"]),
        ([entry(), {"file_name": "a.jpg"}], ["entry 1", "bbox"]),
        ([entry(bbox=[1, 2, 3])], ["entry 0", "bbox"]),
        ([entry(bbox=[1, 2, "3", 4])], ["entry 0", "bbox"]),
        ([entry(bbox=[1, 2, True, 4])], ["entry 0", "bbox"]),
        ([entry(bbox=[1, 2, 10**400, 4])], ["entry 0", "bbox"]),
        ([entry(bbox=[1, 2, float("nan"), 4])], ["entry 0", "bbox"]),
        ([entry(bbox=[1, 2, float("inf"), 4])], ["entry 0", "bbox"]),
        ([entry(bbox=[1, 2, -3, 4])], ["entry 0", "bbox", "negative"]),
        ([entry(score=None)], ["entry 0", "score"]),
        ([entry(score=float("nan"))], ["entry 0", "score"]),
        ([entry(category_id="cat")], ["entry 0", "category_id"]),
        ([entry(category_id=2**70)], ["entry 0", "category_id"]),
        ([entry(file_name=3)], ["entry 0", "file_name"]),
        ([{"bbox": [1, 2, 3, 4]}], ["entry 0", "image_id"]),
        ({"annotations": [], "images": [{"id": 3}]}, ["images", "file_name"]),
        ({"annotations": [], "categories": [{"id": 3}]}, ["categories", "name"]),
    ],
)
def test_bad_files_name_the_entry_and_the_field(tmp_path, content, words):
    path = write(tmp_path / "bad.json", content)
    with pytest.raises(DepthsegError) as error:
        BoxesFile(path)
    assert error.value.code == USAGE and error.value.hint
    assert all(word in error.value.message for word in [*words, "bad.json"]), error.value.message


def test_missing_files(tmp_path):
    with pytest.raises(DepthsegError, match="no such file"):
        BoxesFile(tmp_path / "none.json")
    with pytest.raises(DepthsegError, match="no 'images'"):
        BoxesFile(write(tmp_path / "b.json", []), images_json=write(tmp_path / "i.json", []))


# ---- clicks ----


def test_points_become_prompts(tmp_path):
    clicks = [
        {"file_name": "a.jpg", "points": [[10, 20], [30, 5]], "labels": [1, 0], "category_id": 4},
        {"file_name": "b.jpg", "points": [[1, 2]]},
        {"file_name": "a.jpg", "points": [[3, 4]], "box": [1, 2, 10, 20]},
        {"file_name": "a.jpg", "box": [0, 0, 5, 6]},
    ]
    source = PointsFile(write(tmp_path / "points.json", clicks))
    b, none, a = source([image("b.jpg"), image("c.jpg"), image("a.jpg")])
    expected = [
        Prompts.of(points=np.array([[[10, 20], [30, 5]]]), signs=np.array([[1, 0]])),
        Prompts.of(np.array([[1, 2, 11, 22]]), np.array([[[3, 4]]])),
        Prompts.of(np.array([[0, 0, 5, 6]])),
    ]
    for row, alone in enumerate(expected):
        k = alone.labels.shape[1]
        assert np.array_equal(a.points[row, :k], alone.points[0]) and np.array_equal(a.labels[row, :k], alone.labels[0])
        assert (a.labels[row, k:] == schema.ABSENT).all() and not a.points[row, k:].any()
    assert a.labels.tolist() == [[1, 0, schema.PADDING], [1, 2, 3], [2, 3, schema.ABSENT]]
    assert b.labels.tolist() == [[1, schema.PADDING]] and b.points.tolist() == [[[1, 2], [0, 0]]]
    assert len(none) == 0 and none.points.shape[2] == 2
    assert source.categories(image("a.jpg")).tolist() == [4, 1, 1]
    assert source.expect(["a.jpg"]) == ["b.jpg"] and len(source) == 4


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"points": []}, "points"),
        ({"points": "3"}, "points"),
        ({"points": [[1, 2, 3]]}, "points"),
        ({"points": [[1, None]]}, "points"),
        ({"labels": [1, 1]}, "labels"),
        ({"labels": [2]}, "labels"),
        ({"labels": [True]}, "labels"),
        ({"box": [1, 2, -1, 2]}, "box"),
        ({"category_id": 1.5}, "category_id"),
    ],
)
def test_bad_points_name_the_entry_and_the_field(tmp_path, change, field):
    good = {"image_id": 3, "points": [[1, 2]]}
    with pytest.raises(DepthsegError, match=f"p.json: entry 1, field {field}"):
        PointsFile(write(tmp_path / "p.json", [good, {**good, **change}]))


# ---- our own network ----


class Fake(torch.nn.Module):
    """Two boxes that overlap, one apart and one unsure, whatever it sees; and where the picture ends."""

    side = 64

    def forward(self, x):
        assert x.shape[1:] == (3, 64, 64) and x.dtype == torch.float32
        boxes = torch.tensor([[0, 0, 20, 20], [1, 0, 20, 20], [32, 16, 80, 32], [40, 0, 50, 9]], dtype=torch.float32)
        ends = torch.stack([torch.stack([x.new_zeros(()), x.new_zeros(()), *self.end(p)]) for p in x])
        return torch.tensor([[0.6, 0.8, 0.7, 0.1, 0.3]]).repeat(len(x), 1), torch.cat([boxes.expand(len(x), 4, 4), ends[:, None]], 1)

    def end(self, picture):
        shown = (picture != 0).any(0)
        return shown.any(0).sum(), shown.any(1).sum()

    @classmethod
    def load(cls, path):
        return cls().eval()


@pytest.fixture
def fake_network(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "depthseg.models.boxes", SimpleNamespace(BoxNet=Fake))
    (tmp_path / "fake").touch()
    return tmp_path / "fake"


def test_nano_boxes_come_back_in_original_pixels(fake_network):
    detector = NanoBoxes(fake_network)
    wide, tall = detector([image(h=64, w=128), image(h=96, w=64)])  # half and 2/3 of their size in the network's square
    assert wide.xyxy.tolist() == [[2, 0, 40, 40], [64, 32, 128, 64], [0, 0, 128, 64]]  # its double is left out, and what is unsure
    assert wide.score.tolist() == pytest.approx([0.8, 0.7, 0.3])
    assert wide.names == {1: "object"} and set(wide.label) == {1}
    assert np.abs(tall.xyxy - [[1.5, 0, 30, 30], [48, 24, 64, 48], [0, 0, 64, 96]]).max() < 0.5
    assert [len(f) for f in NanoBoxes(fake_network, confidence=0.59, max_boxes=1)([image(h=64, w=128)])] == [1]
    assert [len(f) for f in NanoBoxes(fake_network, confidence=0.9)([image()])] == [0]
    assert detector([]) == []


def test_nano_boxes_in_a_batch_equal_one_by_one(tmp_path):
    boxes = pytest.importorskip("depthseg.models.boxes")
    checkpoint = pytest.importorskip("depthseg.models.checkpoint")
    torch.manual_seed(0)
    network = boxes.BoxNet()
    torch.nn.init.normal_(network.score.weight)  # scores far apart, so that rounding cannot change their order
    checkpoint.save(network, tmp_path / "boxes.safetensors", {})
    detector = NanoBoxes(tmp_path / "boxes.safetensors", confidence=0.0, max_boxes=20)
    images = [image(h=40, w=60), image(h=60, w=40, seed=1)]
    same(detector(images), [detector([i])[0] for i in images], 1e-2)


def same(batched: list[Boxes], alone: list[Boxes], pixels: float):
    for a, b in zip(batched, alone, strict=True):
        assert len(a) == len(b) > 0 and np.array_equal(a.label, b.label)
        assert np.abs(a.xyxy - b.xyxy).max() < pixels and np.abs(a.score - b.score).max() < 1e-4


# ---- YOLO ----


@pytest.fixture(scope="module")
def yolo_file(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PILImage, "open", PILImage.open)  # ultralytics replaces both: give them back to the other tests
        patch.setattr(torch, "save", torch.save)
        YOLO = pytest.importorskip("ultralytics", reason="needs the extra yolo").YOLO
    torch.manual_seed(0)
    model = YOLO("yolov8n.yaml", verbose=False)
    for module in model.model.modules():  # random, but with answers that differ from place to place
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.fill_(0.17)
    for branch in model.model.model[-1].cv3:  # class scores about 0.5 instead of 0.0002
        torch.nn.init.normal_(branch[-1].weight)
        torch.nn.init.constant_(branch[-1].bias, -2)
    path = tmp_path_factory.mktemp("yolo") / "random.pt"
    model.save(str(path))
    return path


def test_yolo_in_a_batch_equals_one_by_one(yolo_file, capfd):
    threads = torch.get_num_threads()
    detector = Yolo(yolo_file, confidence=0.001, max_boxes=7)
    images = [image("a.jpg", 64, 96), image("b.jpg", 96, 64, 1), image("c.jpg", 64, 96, 2)]
    batched = detector(images)
    same(batched, [detector([i])[0] for i in images], 1e-3)
    for i, found in zip(images, batched):
        h, w = i.size
        assert len(found) <= 7 and (np.diff(found.score) <= 0).all() and found.score.min() >= 0.001
        assert found.xyxy.min() >= 0 and (found.xyxy <= [w, h, w, h]).all() and (found.xyxy[:, 2:] > found.xyxy[:, :2]).all()
        assert found.names == {int(label): str(label) for label in set(found.label)}  # its classes are called 0 to 79
    assert detector([]) == [] and torch.get_num_threads() == threads
    assert [len(f) for f in Yolo(yolo_file, confidence=0.9999)(images[:1])] == [0]
    assert capfd.readouterr() == ("", "")


def test_yolo_sees_what_ultralytics_sees(yolo_file):
    from ultralytics import YOLO

    one = image("a.jpg", 64, 96)
    bgr = np.ascontiguousarray(one.pixels[..., ::-1])
    (expected,) = YOLO(str(yolo_file)).predict([bgr], imgsz=640, conf=0.001, iou=0.7, max_det=5, verbose=False, device="cpu")
    (found,) = Yolo(yolo_file, confidence=0.001, max_boxes=5)([one])
    order = np.argsort(-expected.boxes.conf.numpy(), kind="stable")
    assert np.allclose(found.xyxy, expected.boxes.xyxy.numpy()[order], atol=1e-3)
    assert found.label.tolist() == expected.boxes.cls.numpy()[order].tolist()


def test_yolo_labels_are_coco_categories(yolo_file, tmp_path):
    import ultralytics
    import yaml
    from ultralytics.data.converter import coco80_to_coco91_class

    own = os.path.join(os.path.dirname(ultralytics.__file__), "cfg", "datasets", "coco.yaml")
    with open(own, encoding="utf-8") as file:
        assert list(yaml.safe_load(file)["names"].values()) == COCO_NAMES
    assert coco80_to_coco91_class() == COCO_IDS
    model = ultralytics.YOLO(str(yolo_file))
    model.model.names = dict(enumerate(COCO_NAMES))
    model.save(str(tmp_path / "coco.pt"))
    plain, coco = (Yolo(p, confidence=0.001)([image()])[0] for p in (yolo_file, tmp_path / "coco.pt"))
    assert coco.label.tolist() == [COCO_IDS[i] for i in plain.label] and np.array_equal(coco.xyxy, plain.xyxy)
    assert coco.names == {COCO_IDS[i]: COCO_NAMES[i] for i in plain.names}
    kept = int(coco.label[0])
    (some,) = Yolo(tmp_path / "coco.pt", confidence=0.001, classes=[coco.names[kept]])([image()])
    assert set(some.label.tolist()) == {kept} and len(some) >= (coco.label == kept).sum()
    with pytest.raises(DepthsegError, match="knows no class 'catt'") as error:
        Yolo(tmp_path / "coco.pt", classes=["catt"])
    assert "cat" in error.value.hint


def test_foreign_files_are_refused(yolo_file, tmp_path):
    (tmp_path / "noise.pt").write_bytes(b"not a checkpoint")
    (tmp_path / "cut.pt").write_bytes(yolo_file.read_bytes()[:100_000])
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    (tmp_path / "yolov8n.yaml").write_text("nc: 80")
    for name in ("noise.pt", "cut.pt", "other.pt", "yolov8n.yaml"):
        with pytest.raises(DepthsegError, match=name) as error:
            Yolo(tmp_path / name)
        assert error.value.code == USAGE and error.value.hint


@pytest.mark.parametrize("name", ["yolo:Yolo", "nano:NanoBoxes", "hub:HubDetector", "grounding:GroundingDino", "vitdet:ViTDet"])
def test_missing_weights_are_an_error_at_once(tmp_path, name):
    module, _, name = name.partition(":")
    code = f"""
import sys
from depthseg.detect.{module} import {name}
from depthseg.errors import DepthsegError
try:
    {name}({str(tmp_path / "yolov8n.pt")!r}, classes=[] if {name!r} != "GroundingDino" else ["cat"])
except DepthsegError as e:
    print(e.code, "--pull" in e.hint, "torch" in sys.modules, "ultralytics" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.split() == [str(MISSING_PIECE), "True", "False", "False"]  # without torch it comes within a second
    assert list(tmp_path.iterdir()) == []


def test_without_ultralytics_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    (tmp_path / "yolov8n.pt").touch()
    with pytest.raises(DepthsegError) as error:
        Yolo(tmp_path / "yolov8n.pt")
    assert error.value.code == MISSING_PIECE and "depthseg[yolo]" in error.value.hint


class Evil:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_fresh_process_is_left_alone(yolo_file, tmp_path):
    """ultralytics replaces functions of other packages, prints, writes to the home folder and runs what a checkpoint says."""
    torch.save({"model": Evil(tmp_path / "was-here")}, tmp_path / "evil.pt")
    code = f"""
import sys
seen = []
watched = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
sys.addaudithook(lambda event, arguments: seen.append((event, arguments)) if event in watched else None)
written = set()
def opened(event, arguments):
    if event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
        written.add(str(arguments[0]))
sys.addaudithook(opened)
import PIL.Image, torch
before = PIL.Image.open, torch.save, torch.get_num_threads()
import numpy as np
from depthseg.detect.yolo import DepthsegError, Image, Yolo
assert len(Yolo({str(yolo_file)!r})([Image("a", 0, None, (64, 64), np.zeros((64, 64, 3), np.uint8))])) == 1
assert before == (PIL.Image.open, torch.save, torch.get_num_threads())
try:
    Yolo({str(tmp_path / "evil.pt")!r})
except DepthsegError as e:
    assert "not a readable YOLO checkpoint" in e.message
else:
    raise AssertionError
seen = [s for s in seen if "ldconfig" not in str(s)]  # how Python's ctypes finds libraries
assert not seen, seen
ours = {str(tmp_path)!r}
outside = [name for name in written if not name.startswith((ours, "/dev/", "/proc/", "/tmp/")) and not name.isdigit()]
assert not [name for name in outside if not name.endswith(".pyc") and "__pycache__" not in name], outside
"""
    own = {**os.environ, "DEPTHSEG_WEIGHTS": str(tmp_path), "HOME": str(tmp_path / "home"), "YOLO_CONFIG_DIR": str(tmp_path / "x")}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=own)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    settings = json.loads(next((tmp_path / "ultralytics").rglob("settings.json")).read_text())
    assert settings["sync"] is False and not any((tmp_path / name).exists() for name in ("home", "x", "was-here"))
