"""ViTDet against what detectron2 answered on a synthetic checkpoint (slow), its key lists, and a tiny one for the rest."""

import json
import pickle
import zlib

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from depthseg.errors import DepthsegError
from depthseg.models import checkpoint
from depthseg.models.vitdet import Variant, ViTDet, _anchors, from_zoo
from depthseg.schema import PIXEL_MEAN, PIXEL_STD

TINY = Variant(32, 2, 2, (1,))


def tiny(**changes) -> ViTDet:
    torch.manual_seed(0)
    return ViTDet(TINY, 5, **{"side": 64, "window": 3, **changes}).eval()


def pictures(count: int) -> torch.Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("cascade", [True, False])
def test_a_batch_equals_one_by_one(cascade):
    net, x = tiny(cascade=cascade), pictures(3)
    sizes = [(64, 64), (48, 64), (64, 17)]
    with torch.inference_mode():
        together = net(x, sizes, least=0.0, most=20)
        for i, (boxes, scores, labels) in enumerate(together):
            alone = net(x[i : i + 1], sizes[i : i + 1], least=0.0, most=20)[0]
            for a, b in zip((boxes, scores, labels), alone, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
            h, w = sizes[i]
            assert 0 < len(boxes) <= 20 and (boxes >= 0).all() and (boxes[:, 2] <= w).all() and (boxes[:, 3] <= h).all()
            assert (scores.diff() <= 0).all() and set(labels.tolist()) <= set(range(5))


def test_nothing_certain_is_an_empty_answer():
    with torch.inference_mode():
        boxes, scores, labels = tiny()(pictures(1), [(64, 64)], least=0.99)[0]
    assert boxes.shape == (0, 4) and scores.shape == labels.shape == (0,)


def test_an_anchor_has_its_area_and_is_not_rounded():
    a = _anchors((2, 3), 4, 32)
    assert a.shape == (2 * 3 * 3, 4)
    size = a[:, 2:] - a[:, :2]
    torch.testing.assert_close(size.prod(1), torch.full((18,), 1024.0))
    assert ((a[:, :2] + a[:, 2:]) / 2)[-3:].allclose(torch.tensor([8.0, 4.0]))
    assert (a != a.round()).any()


def zoo_file(net: ViTDet, path, **changes):
    """The network's weights as detectron2 publishes them: arrays in a pickle, the embedding of 14 x 14 patches and a class token."""
    state = {k: v.numpy() for k, v in net.state_dict().items()}
    state["backbone.net.pos_embed"] = np.zeros((1, 1 + 14 * 14, 32), np.float32)
    state["roi_heads.mask_head.predictor.weight"] = np.zeros((5, 256, 1, 1), np.float32)
    with open(path, "wb") as file:
        pickle.dump({"model": {**state, **changes}, "__author__": "someone"}, file, protocol=2)
    return path


def test_a_zoo_file_loads_without_its_mask_head(tmp_path):
    net, other = tiny(), tiny()
    with torch.no_grad():
        net.roi_heads.box_head[2].fc1.bias.fill_(3)
    other.load(zoo_file(net, tmp_path / "model.pkl"))
    assert (other.roi_heads.box_head[2].fc1.bias == 3).all() and other.backbone.net.pos_embed.shape == (1, 4, 4, 32)
    with pytest.raises(DepthsegError, match=r"does not fit this ViTDet: .*missing.*unknown"):
        tiny(cascade=False).load(tmp_path / "model.pkl")


class Calls:
    def __init__(self, what):
        self.what = what

    def __reduce__(self):
        return self.what


@pytest.mark.parametrize("name", ["model.pkl", "model.pt"])
def test_a_file_that_wants_to_run_code_is_refused(tmp_path, name):
    """Both kinds of pickles, with the code inside a table that looks right otherwise."""
    victim = tmp_path / "victim"
    content = {"model": {"w": np.zeros(2, np.float32), "x": Calls((open, (str(victim), "w")))}}
    if name.endswith(".pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(content))
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(DepthsegError, match="not a readable checkpoint"):
        checkpoint.read(tmp_path / name)
    assert not victim.exists()


@pytest.mark.parametrize(("keys", "variant", "classes"), [("b", "b", 80), ("l_coco", "l", 80), ("h_coco", "h", 80), ("h_lvis", "h", 1203)])
def test_the_zoos_keys_are_covered(shared, keys, variant, classes):
    rows = json.loads((shared / "parity" / f"vitdet_{keys}.keys.json").read_text())
    with torch.device("meta"):
        net = ViTDet(variant, classes, sigmoid=classes > 80)
        state = from_zoo({row["key"]: torch.empty(row["shape"]) for row in rows}, (64, 64))
    assert checkpoint.difference(net, state) == []


def synthetic(key: str, shape: list[int]) -> np.ndarray:
    z = np.random.default_rng(zlib.crc32(key.encode())).standard_normal(shape)
    return (1 + 0.02 * z if key.endswith(".weight") and len(shape) == 1 else 0.02 * z).astype(np.float32)


def picture() -> np.ndarray:
    y, x = np.meshgrid(np.arange(480.0), np.arange(640.0), indexing="ij")
    waves = np.sin(x / 23 + y / 41), np.cos(x / 37 - y / 19), np.sin((x + y) / 53)
    pixels = np.rint(127.5 + 127.5 * np.stack(waves, -1)).clip(0, 255).astype(np.uint8)
    pixels[100:300, 200:420], pixels[350:440, 60:160] = (200, 30, 60), (20, 180, 90)
    return pixels


@pytest.mark.slow
def test_equals_detectron2(shared, tmp_path):
    rows = json.loads((shared / "parity" / "vitdet_b.keys.json").read_text())
    with open(tmp_path / "b.pkl", "wb") as file:
        pickle.dump({"model": {row["key"]: synthetic(row["key"], row["shape"]) for row in rows}, "__author__": ""}, file)
    net = ViTDet("b", 80).load(tmp_path / "b.pkl")
    expected = np.load(shared / "parity" / "vitdet_b.npz")
    small = np.asarray(PILImage.fromarray(picture()).resize((1024, 768), PILImage.Resampling.BILINEAR))
    x, size = torch.zeros(1, 3, 1024, 1024), [(768, 1024)]
    x[0, :, :768] = torch.from_numpy(((small - PIXEL_MEAN) / PIXEL_STD).astype(np.float32)).permute(2, 0, 1)
    with torch.inference_mode():
        maps = net.backbone(x)
        for level, y in enumerate(maps, 2):
            i, j = expected[f"p{level}_offset"]
            assert np.abs(y[0, :16, i : i + 4, j : j + 4].numpy() - expected[f"p{level}_slice"]).max() < 2e-5
        found = net.proposal_generator(maps, size)[0].numpy()
        nearest = np.abs(found[:, None] - expected["proposals"][None]).max(-1)
        assert len(found) == 1000 and (nearest.min(0) < 0.05).all() and (nearest.min(1) < 0.05).all()
        ((boxes, scores, labels),) = net(x, size)
    assert len(boxes) == 13 and labels.tolist() == expected["default_classes"].tolist()
    assert np.abs(boxes.numpy() - expected["default_boxes"]).max() < 1e-3
    assert np.abs(scores.numpy() - expected["default_scores"]).max() < 1e-5
