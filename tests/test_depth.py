"""The normalisation, DepthAnything with a tiny random network, maps from a folder, our own network, and the cache."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from depthseg import depth as depth_module
from depthseg import weights
from depthseg.data import find, read
from depthseg.depth import Cached, DepthAnything, DepthFolder, NanoDepth, depth_estimator, normalise, write_maps
from depthseg.errors import MISSING_PIECE, USAGE, DepthsegError
from depthseg.schema import Image


def image(key="a.jpg", h=40, w=60, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
    return Image(key, seed, None, (h, w), pixels)


# ---- normalise ----


def test_normalise_is_min_max_of_any_scale():
    x = np.random.default_rng(0).random((20, 30))
    y = normalise(x)
    assert y.dtype == np.float32 and (y.min(), y.max()) == (0, 1)
    assert np.abs(y - (x - x.min()) / (x.max() - x.min())).max() <= 0.5 / 65535 + 1e-7
    for other in (7 * x - 3, (1e6 * x).astype(np.float32)):
        assert np.abs(normalise(other) - y).max() < 2e-5
    assert np.array_equal(normalise(y), y)
    assert np.array_equal(normalise(np.array([[0, 100, 200]], np.uint8)), normalise(np.array([[0, 0.5, 1]])))


def test_spikes_are_clipped_and_small_objects_are_not():
    x = np.tile(np.linspace(1, 2, 100), (100, 1))
    spiked = x.copy()
    spiked[50, 50], spiked[9, 9] = 1000, -1000
    y = normalise(spiked)
    assert y[50, 50] == 1 and y[9, 9] == 0
    rest = np.ones_like(x, bool)
    rest[50, 50] = rest[9, 9] = False
    assert np.abs(y - (x - 1))[rest].max() < 0.02
    assert np.array_equal(normalise(y), y)
    plane = np.zeros((100, 100))
    plane[40:42, 40:42] = 5  # 4 pixels in 10000
    assert np.array_equal(normalise(plane), plane / 5)


def test_holes_take_the_nearest_value():
    x = np.array([[1.0, np.nan, np.nan, np.nan, 3.0, np.inf, 2.0, 99.0]])
    valid = np.ones(x.shape, bool)
    valid[0, 7] = False
    y = normalise(x, valid)
    assert y[0].tolist()[:2] == [0, 0] and y[0, 3] == 1 and y[0, 4] == 1 and y[0, 5] in (1, np.float32(32768 / 65535))
    assert y[0, 6] == y[0, 7] == np.float32(32768 / 65535)
    big = np.random.default_rng(1).random((30, 30))
    holes = np.zeros(big.shape, bool)
    holes[10:14, 3:20] = True
    filled = normalise(big, ~holes)
    rows, columns = np.nonzero(~holes)
    for i, j in zip(*np.nonzero(holes)):
        distance = (rows - i) ** 2 + (columns - j) ** 2
        nearest = distance == distance.min()
        assert filled[i, j] in filled[rows[nearest], columns[nearest]]


@pytest.mark.parametrize("x", [np.full((3, 4), 7.0), np.full((3, 4), np.nan), np.array([[np.nan, 2.0]])])
def test_nothing_to_see_is_zero(x):
    assert np.array_equal(normalise(x), np.zeros(x.shape, np.float32))


# ---- DepthAnything ----


@pytest.fixture(scope="module")
def anything(tmp_path_factory):
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    backbone = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=56,
        out_indices=[1, 2, 3, 4],
        reshape_hidden_states=False,
    )
    folder = tmp_path_factory.mktemp("anything")
    for kind in ("relative", "metric"):
        torch.manual_seed(0)
        config = DepthAnythingConfig(
            backbone_config=backbone, reassemble_hidden_size=32, neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16,
            head_hidden_size=8, depth_estimation_type=kind, max_depth=20,
        )  # fmt: skip
        network = DepthAnythingForDepthEstimation(config)
        for p in network.head.parameters():  # start outside of the flat part of the last ReLU
            torch.nn.init.uniform_(p, 0, 0.5)
        network.save_pretrained(folder / kind)
    return folder


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(DepthAnything, "SIDE", 56)
    monkeypatch.setattr(DepthAnything, "LONGEST", 112)


def test_depth_anything_in_a_batch_equals_one_by_one(anything, small, capfd):
    estimator = DepthAnything(anything / "relative", batch=2)
    images = [image(h=40, w=60), image(h=60, w=40, seed=1), *(image(h=40, w=60, seed=s) for s in (2, 3))]
    batched = estimator(images)
    assert [d.shape for d in batched] == [(56, 84), (84, 56), (56, 84), (56, 84)]
    for one, together in zip(images, batched):
        (alone,) = estimator([one])
        assert np.abs(alone - together).max() < 1e-3 and alone.dtype == np.float32
        assert (together.min(), together.max()) == (0, 1) and together.std() > 0.01
    assert np.abs(batched[0] - batched[2]).max() > 0.01  # it does look at the picture
    assert estimator([]) == []
    assert capfd.readouterr() == ("", "")  # no progress bar


def test_another_side_for_depth_anything_only(anything, small, monkeypatch, weights_cache):
    monkeypatch.setattr("depthseg.weights.locate", lambda *rest: anything / "relative")
    shapes = {}
    for side in (None, 28):
        chosen = depth_estimator("depth-anything-v2-small", "cpu", "fp32", False, side=side)
        shapes[side] = chosen.estimator([image(h=40, w=60)])[0].shape
    assert shapes == {None: (56, 84), 28: (28, 42)}  # the cache keeps them apart
    monkeypatch.undo()
    with pytest.raises(DepthsegError, match="one input size"):
        depth_estimator("nano", "cpu", "fp32", False, side=28)


def test_depth_anything_is_what_transformers_gives(anything, small):
    from transformers import DepthAnythingForDepthEstimation, DPTImageProcessorPil

    one = image(h=70, w=112)
    processor = DPTImageProcessorPil(
        do_resize=True, size={"height": 56, "width": 56}, keep_aspect_ratio=True, ensure_multiple_of=14, resample=3,
        do_rescale=True, do_normalize=True, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    x = processor(PILImage.fromarray(one.pixels), return_tensors="pt")["pixel_values"]
    estimator = DepthAnything(anything / "relative")
    assert tuple(x.shape[2:]) == estimator._size(70, 112) == (56, 84)
    assert np.abs(estimator._input(one, x.shape[2:]) - x[0].numpy()).max() < 1e-5
    with torch.inference_mode():
        expected = DepthAnythingForDepthEstimation.from_pretrained(anything / "relative").eval()(x).predicted_depth[0].numpy()
    assert np.abs(estimator([one])[0] - normalise(expected)).max() < 1e-3


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (518, 686)),
        ((1080, 1920), (518, 924)),
        ((200, 300), (518, 784)),
        ((400, 5000), (84, 1036)),
        ((1, 3000), (14, 1036)),
    ],
)
def test_input_sizes(anything, size, expected):
    assert DepthAnything._size(DepthAnything, *size) == expected


def test_openvino_computes_depth_anything_at_any_size_by_one_model(anything, small, weights_cache):
    pytest.importorskip("openvino")
    from transformers import DepthAnythingForDepthEstimation

    theirs = DepthAnythingForDepthEstimation.from_pretrained(anything / "relative").eval()
    plain, other = (DepthAnything(anything / "relative", "cpu", "fp32", backend)._network for backend in ("torch", "openvino"))
    with torch.inference_mode():
        for shape in ((1, 56, 84), (2, 84, 56), (2, 70, 98), (1, 28, 112), (1, 126, 126)):  # odd numbers of patches too
            x = torch.randn(shape[0], 3, *shape[1:], generator=torch.Generator().manual_seed(0))
            expected = theirs(x).predicted_depth
            assert expected.std() > 0.01
            for y in (plain(x), other(x)):
                assert y.shape == expected.shape == shape and (y - expected).norm() < 1e-5 * expected.norm()
    assert len(list((weights_cache / "openvino").iterdir())) == 1


def test_openvino_tells_networks_of_equal_weights_apart(anything, small, weights_cache, tmp_path):
    """A relative and a metric network differ in their config alone, and so do two depths of one; another folder changes nothing."""
    pytest.importorskip("openvino")
    far, moved = (shutil.copytree(anything / like, tmp_path / like) for like in ("metric", "relative"))
    config = json.loads((far / "config.json").read_text())
    (far / "config.json").write_text(json.dumps({**config, "max_depth": 80}))
    x = torch.randn(1, 3, 56, 84)
    with torch.inference_mode():
        relative, metric, further, again = (
            DepthAnything(folder, "cpu", "fp32", "openvino")._network(x)
            for folder in (anything / "relative", anything / "metric", far, moved)
        )
    assert not torch.equal(relative, metric) and torch.allclose(further, 4 * metric) and torch.equal(relative, again)
    assert len(list((weights_cache / "openvino").iterdir())) == 3


def test_a_metric_variant_is_inverted(anything, small):
    one = image()
    estimator = DepthAnything(anything / "metric")
    with torch.inference_mode():
        metres = estimator._network(torch.from_numpy(estimator._input(one, (56, 84)))[None])[0].numpy()
    (near,) = estimator([one])
    assert metres.min() > 0 and metres.std() > 0
    assert np.abs(near - normalise(1 / metres)).max() < 1e-3


def test_half_precision_is_close(anything, small):
    (fine,), (coarse,) = (DepthAnything(anything / "relative", precision=p)([image()]) for p in ("fp32", "bf16"))
    assert 0 < np.abs(fine - coarse).max() < 0.2


def test_hub_name_is_found_in_the_cache(anything, small, tmp_path, monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert not any(map(weights.hub_folder, ("someone/depth-small-hf", None, "/no/such/folder", "a--b")))
    repository = tmp_path / "models--someone--depth-small-hf"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123")
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_bytes((anything / "relative" / "config.json").read_bytes())
    assert not weights.hub_folder("someone/depth-small-hf")  # a pull that broke off
    (snapshot / "model.safetensors").write_bytes((anything / "relative" / "model.safetensors").read_bytes())
    assert weights.hub_folder("someone/depth-small-hf")
    one = image()
    assert np.array_equal(DepthAnything("someone/depth-small-hf")([one])[0], DepthAnything(anything / "relative")([one])[0])


def test_broken_folders(anything, tmp_path):
    config = json.loads((anything / "relative" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(DepthsegError, match="not on this machine") as error:
        DepthAnything(tmp_path)
    assert error.value.code == MISSING_PIECE
    weights = (anything / "relative" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(DepthsegError, match="cannot be loaded"):
        DepthAnything(tmp_path)
    from safetensors.torch import load, save_file

    state = load(weights)
    save_file({k: v for k, v in state.items() if "head.conv1" not in k}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(DepthsegError, match=r"lacks weights: head\.conv1"):
        DepthAnything(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "dpt"}))
    with pytest.raises(DepthsegError, match="type dpt"):
        DepthAnything(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DepthsegError, match=r"config\.json"):
        DepthAnything(tmp_path)


@pytest.mark.parametrize(("name", "what"), [("DepthAnything", "depth-anything/Depth-Anything-V2-Small-hf"), ("NanoDepth", "none")])
def test_missing_weights_are_an_error_at_once(name, what):
    code = f"""
import sys
from depthseg.depth import {name}
from depthseg.errors import DepthsegError
try:
    {name}({what!r}, "cpu", "fp32")
except DepthsegError as e:
    ways = all(way in e.hint for way in ("--pull", "--depth FOLDER", "--depth nano"))
    print(e.code, ways, "torch" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.split() == [str(MISSING_PIECE), "True", "False"]  # without torch it comes within a second


# ---- our own network ----


class Fake(torch.nn.Module):
    """Brightness at half resolution."""

    side = 64

    def forward(self, x):
        assert x.shape[1:] == (3, 64, 64)
        return torch.nn.functional.avg_pool2d(x.mean(1), 2)

    @classmethod
    def load(cls, path):
        return cls().eval()


def test_nano_depth_without_the_padding(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "depthseg.models.depthnet", SimpleNamespace(DepthNet=Fake))
    (tmp_path / "fake").touch()
    estimator = NanoDepth(tmp_path / "fake", "cpu", "fp32")
    ramp = np.repeat(np.tile(np.arange(100, 228, dtype=np.uint8), (64, 1))[..., None], 3, 2)
    wide = Image("a.jpg", 0, None, (64, 128), ramp)
    tall = Image("b.jpg", 1, None, (128, 64), np.ascontiguousarray(ramp.transpose(1, 0, 2)))
    a, b = estimator([wide, tall])
    assert a.shape == (16, 32) and np.array_equal(a.T, b)  # brighter than the padding: nothing of it is left
    assert np.abs(a[3] - np.linspace(0, 1, 32)).max() < 0.02
    assert estimator([image(h=1, w=500)])[0].shape == (1, 32)
    assert estimator([]) == []


def test_nano_depth_in_a_batch_equals_one_by_one(tmp_path):
    depthnet = pytest.importorskip("depthseg.models.depthnet")
    checkpoint = pytest.importorskip("depthseg.models.checkpoint")
    torch.manual_seed(0)
    checkpoint.save(depthnet.DepthNet(), tmp_path / "depth.safetensors", {})
    estimator = NanoDepth(tmp_path / "depth.safetensors", "cpu", "fp32")
    images = [image(h=40, w=60), image(h=60, w=40, seed=1)]
    for one, together in zip(images, estimator(images)):
        assert np.abs(estimator([one])[0] - together).max() < 1e-3
        assert together.shape == tuple(side * 128 // 60 for side in one.size)


# ---- a folder of maps ----

METRES = np.linspace(1, 5, 40 * 60).reshape(40, 60)
NEAR = normalise(1 / METRES)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array) if path.suffix == ".npy" else PILImage.fromarray(array).save(path)


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("a.png", np.round(METRES * 1000).astype(np.uint16)),
        ("a.tif", np.round(METRES * 1000).astype(np.uint16)),
        ("a.tiff", METRES.astype(np.float32)),
        ("a.npy", METRES),
        ("a.npy", METRES.astype(np.float32)),
        ("a.npy", np.round(METRES * 1000).astype(np.int32)),
        ("a.jpg.png", np.round(METRES * 5000).astype(np.uint16)),
        ("a.png", np.round(NEAR * 255).astype(np.uint8)),
        ("a.npy", np.round(NEAR * 255).astype(np.uint8)),
        ("a.jpg.png", np.repeat(np.round(NEAR * 255).astype(np.uint8)[..., None], 3, 2)),
    ],
)
def test_every_form_gives_the_same_depth(tmp_path, name, stored):
    save(tmp_path / "sub" / name, stored)
    (found,) = DepthFolder(tmp_path)([image("sub/a.jpg")])
    assert found.dtype == np.float32 and np.abs(found - NEAR).max() < 0.01


@pytest.mark.parametrize("form", ["npy", "png"])
def test_holes_of_metric_maps(tmp_path, form):
    metres = METRES.copy()
    holes = [(5, 5), (20, 30), (39, 59), (12, 40)]
    for (i, j), nothing in zip(holes, (0, np.nan, np.inf, -1) if form == "npy" else (0, 0, 0, 0)):
        metres[i, j] = nothing
    save(tmp_path / f"a.{form}", metres if form == "npy" else np.round(metres * 1000).astype(np.uint16))
    (found,) = DepthFolder(tmp_path)([image()])
    assert np.abs(found - NEAR).max() < 0.01


def test_kind_may_be_stated(tmp_path):
    save(tmp_path / "a.png", np.round(NEAR * 65535).astype(np.uint16))
    (found,) = DepthFolder(tmp_path, kind="inverse")([image()])
    assert np.array_equal(found, NEAR)
    assert np.corrcoef(DepthFolder(tmp_path)([image()])[0].ravel(), NEAR.ravel())[0, 1] < 0
    (tmp_path / "depth.json").write_text('{"kind": "inverse", "unit": "none"}')
    assert np.array_equal(DepthFolder(tmp_path)([image()])[0], NEAR)
    for wrong in ("{}", "[", "[]", '{"kind": "deep"}', '{"kind": ["inverse"]}'):
        (tmp_path / "depth.json").write_text(wrong)
        with pytest.raises(DepthsegError) as error:
            DepthFolder(tmp_path)
        assert error.value.code == USAGE and error.value.hint


def test_any_resolution_but_not_any_shape(tmp_path):
    save(tmp_path / "a.npy", METRES[::2, ::2])
    assert DepthFolder(tmp_path)([image()])[0].shape == (20, 30)
    assert DepthFolder(tmp_path)([image(h=400, w=606)])[0].shape == (20, 30)  # 1 % off: rounding
    with pytest.raises(DepthsegError, match=r"a\.npy is 30 x 20 pixels.* 40 x 60"):
        DepthFolder(tmp_path)([image(h=60, w=40)])
    save(tmp_path / "thin.npy", METRES[:3])  # 3 of exactly 2.55 rows
    assert DepthFolder(tmp_path)([image("thin.jpg", h=85, w=2000)])[0].shape == (3, 60)


@pytest.fixture
def photos(tmp_path):
    """a.jpg and b.jpg, 60 x 40; c.jpg, the same turned by EXIF; and d.jpg, which is broken behind its header."""
    exif = PILImage.Exif()
    exif[0x0112] = 6
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed, name in enumerate("abcd"):
        picture = PILImage.fromarray(image(seed=seed).pixels)
        picture.save(folder / f"{name}.jpg", **({"exif": exif} if name == "c" else {}))
    (folder / "d.jpg").write_bytes((folder / "d.jpg").read_bytes()[:700])
    return find([folder])


def test_a_wrong_folder_is_known_before_the_run(photos, tmp_path):
    save(tmp_path / "maps" / "a.png", METRES.astype(np.uint8))
    save(tmp_path / "maps" / "b.npy", METRES)
    save(tmp_path / "maps" / "c.tif", METRES.T.astype(np.float32))
    DepthFolder(tmp_path / "maps").check(photos)  # d.jpg has no map, but it cannot be read either
    save(tmp_path / "maps" / "c.tif", METRES.astype(np.float32))
    with pytest.raises(DepthsegError, match=r"c\.tif is 60 x 40 pixels.* 40 x 60.*2 of 4 images") as error:
        DepthFolder(tmp_path / "maps").check(photos)
    assert error.value.code == USAGE and error.value.hint
    (tmp_path / "maps" / "b.npy").unlink()
    with pytest.raises(DepthsegError, match=r"no depth map for b\.jpg.*3 of 4 images"):
        DepthFolder(tmp_path / "maps").check(photos)
    (tmp_path / "maps" / "a.png").write_bytes(b"no picture")
    with pytest.raises(DepthsegError, match=r"a\.png is not a readable depth map"):
        DepthFolder(tmp_path / "maps").check(photos)


# ---- making a folder of maps ----


def test_maps_are_written_at_the_images_shape_and_read_back(photos, tmp_path):
    def wide(images):
        return [np.tile(np.linspace(0, 1, 31, dtype=np.float32), (31, 1)) for _ in images]  # of no image's shape

    told = []
    (failed,) = write_maps(photos, wide, "wide", tmp_path / "maps", 2, lambda *at: told.append(at))
    assert (failed.image.key, failed.stage) == ("d.jpg", "read") and told[-1] == (4, 4)
    assert json.loads((tmp_path / "maps" / "depth.json").read_text()) == {"kind": "inverse", "estimator": "wide"}
    folder = DepthFolder(tmp_path / "maps")
    folder.check(photos)
    shapes = [folder([read(photo)])[0].shape for photo in photos[:3]]
    assert shapes == [(21, 31), (21, 31), (31, 21)]
    (tmp_path / "maps" / "b.jpg.png").unlink()
    seen = []
    write_maps(photos, lambda images: seen.extend(i.key for i in images) or wide(images), "wide", tmp_path / "maps", 2, lambda *at: None)
    assert seen == ["b.jpg"]


@pytest.mark.parametrize("holds", ["notes.txt", '{"kind": "inverse"}', '{"kind": "inverse", "estimator": "other"}', "[", "[]"])
def test_maps_are_not_mixed_with_anything_else(photos, tmp_path, holds):
    folder = tmp_path / "maps"
    folder.mkdir()
    (folder / ("notes.txt" if holds == "notes.txt" else "depth.json")).write_text(holds)
    with pytest.raises(DepthsegError, match="maps") as error:
        write_maps(photos, Counting(), "mine", folder, 2, lambda *at: None)
    assert error.value.code == USAGE and error.value.hint and len(list(folder.iterdir())) == 1


def test_a_map_that_cannot_be_written_is_one_images_failure(tmp_path):
    pixels = np.zeros((4, 6, 3), np.uint8)
    images = [Image(key, 1, None, (4, 6), pixels) for key in ("a.jpg", f"{'b' * 254}.jpg", "c.jpg")]
    (failed,) = write_maps(images, Counting(), "mine", tmp_path / "maps", 4, lambda *at: None)
    assert failed.stage == "write" and failed.image is images[1] and (tmp_path / "maps" / "c.jpg.png").is_file()


def test_the_fuller_name_comes_first(tmp_path):
    save(tmp_path / "a.jpg.png", np.round(NEAR * 255).astype(np.uint8))
    save(tmp_path / "a.png", np.zeros((3, 3, 3), np.uint8))
    assert DepthFolder(tmp_path)([image()])[0].shape == (40, 60)


def test_bad_maps(tmp_path):
    with pytest.raises(DepthsegError, match="no such folder"):
        DepthFolder(tmp_path / "none")
    folder = DepthFolder(tmp_path)
    with pytest.raises(DepthsegError, match=r"no depth map for sub/a\.jpg") as error:
        folder([image("sub/a.jpg")])
    assert "sub/a.jpg.png" in error.value.hint and "sub/a.npy" in error.value.hint
    colours = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    save(tmp_path / "colour.png", colours)
    PILImage.fromarray(colours).convert("P").save(tmp_path / "palette.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "text.npy").write_text("no array")
    save(tmp_path / "cube.npy", np.zeros((4, 40, 60)))
    save(tmp_path / "word.npy", np.array([["a"]]))
    np.save(tmp_path / "object.npy", np.array([[None]]), allow_pickle=True)
    save(tmp_path / "cut.png", (METRES * 1000).astype(np.uint16))
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    for name in ("colour", "palette", "text", "cube", "word", "object", "cut"):
        with pytest.raises(DepthsegError, match="depth map") as error:
            folder([image(f"{name}.jpg")])
        assert error.value.hint and name in error.value.message
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PILImage, "MAX_IMAGE_PIXELS", 100)
        with pytest.raises(DepthsegError, match="not a readable"):
            folder([image("colour.jpg")])
    (tmp_path / "text.png").unlink()
    with pytest.raises(DepthsegError, match=r"text\.npy is not a readable"):
        folder([image("text.jpg")])


# ---- the cache ----


class Counting:
    def __init__(self):
        self.seen = []

    def __call__(self, images):
        self.seen += [i.key for i in images]
        return [np.random.default_rng(i.id).random((5, 7)).astype(np.float32) for i in images]


def test_the_cache_gives_the_same_and_asks_once(tmp_path):
    inner = Counting()
    images = [image(f"{k}.jpg", seed=k) for k in range(3)]
    cached = Cached(inner, tmp_path / "cache", "fake")
    first = cached(images[:2])
    second = cached([images[2], images[1], images[0]])
    assert inner.seen == ["0.jpg", "1.jpg", "2.jpg"]
    assert np.array_equal(first[0], second[2]) and np.array_equal(first[1], second[1])  # bit for bit
    for found, exact in zip(first, Counting()(images)):
        assert found.dtype == np.float32 and np.abs(found - exact).max() <= 0.5 / 65535 + 1e-7
    renamed = Image("other.jpg", 9, None, images[0].size, images[0].pixels)
    assert np.array_equal(cached([renamed])[0], first[0]) and len(inner.seen) == 3  # the pixels count, not the name
    reshaped = Image("x.jpg", 5, None, (60, 40), images[0].pixels.reshape(60, 40, 3))
    cached([reshaped])
    Cached(inner, tmp_path / "cache", "another")(images[:1])
    assert inner.seen[3:] == ["x.jpg", "0.jpg"]
    assert len(list((tmp_path / "cache").iterdir())) == 5 and not list((tmp_path / "cache").glob("*.part"))


def test_normalised_depth_is_untouched_by_the_cache(tmp_path):
    (exact,) = found = [NEAR]
    cached = Cached(lambda images: found, tmp_path, "near")
    assert np.array_equal(cached([image()])[0], exact) and np.array_equal(cached([image()])[0], exact)


@pytest.mark.parametrize("damage", [lambda b: b[:60], lambda b: b"", lambda b: b[:-30] + bytes(30), lambda b: b"noise"])
def test_a_damaged_file_is_computed_again(tmp_path, damage):
    inner = Counting()
    cached = Cached(inner, tmp_path, "fake")
    (first,) = cached([image()])
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert np.array_equal(cached([image()])[0], first) and len(inner.seen) == 2
    assert path.read_bytes() == whole


def test_a_foreign_picture_in_the_cache_is_computed_again(tmp_path):
    cached = Cached(Counting(), tmp_path, "fake")
    (first,) = cached([image()])
    (path,) = tmp_path.iterdir()
    PILImage.fromarray(np.zeros((5, 7, 3), np.uint8)).save(path)
    assert np.array_equal(cached([image()])[0], first)


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def refuse(*names):
        raise OSError("disk full")

    monkeypatch.setattr(depth_module.os, "replace", refuse)
    with pytest.raises(OSError, match="disk full"):
        Cached(Counting(), tmp_path, "fake")([image()])
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DepthsegError, match="cannot be made"):
        Cached(Counting(), tmp_path / "file" / "cache", "fake")
