"""The protocols on tiny pictures with a network that finds the bright rectangle, and what geometry alone gets on COCO."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from pycocotools import mask as coco
from torch import nn

from depthseg import masks, metrics, prompts
from depthseg.errors import DepthsegError
from depthseg.evaluate import evaluate, filled_box, inscribed_ellipse, read_truth
from depthseg.plan import Plan
from depthseg.schema import Boxes, Prompts
from depthseg.segment import Segmenter, View


class Bright(nn.Module):
    """A box gives its bright part, clicks what is bright right of the leftmost and not near a negative one.

    So a first click cannot be perfect, and later rounds differ from it.
    """

    side, zoom_side, alpha, single_mask_for = 64, 64, None, "never"

    def __init__(self):
        super().__init__()
        self.encoded = 0

    grid_limits, specks = (0.7, 0.85), 0.0

    def encode(self, rgb, depth=None):
        self.encoded += len(rgb)
        return (10 * nn.functional.avg_pool2d(rgb.mean(1, keepdim=True), 2),)

    def decode(self, features, owner, points, labels, masks=None, multimask=True):
        logits = features[0][owner].repeat(1, 3, 1, 1)
        at = (torch.arange(logits.shape[-1]) + 0.5) * 1024 / logits.shape[-1]
        for p, (xy, label) in enumerate(zip(points, labels)):
            if 1 in label:
                logits[p, :, :, at < xy[label == 1, 0].min()] = -10
            for (x, y), sign in zip(xy, label):
                if sign == 0:
                    logits[p, :, (((at[:, None] - y) ** 2 + (at[None] - x) ** 2) < 60**2)] = -10
            if label[0] == 2:
                (x0, y0), (x1, y1) = xy[:2]
                logits[p] = torch.where(((at >= x0) & (at <= x1)) & ((at >= y0) & (at <= y1))[:, None], logits[p], -10)
        return logits, torch.tensor([[0.1, 0.9, 0.2]]).repeat(len(owner), 1)


@pytest.fixture
def coco_file(pictures, tmp_path) -> Path:
    """Annotations of the three pictures, one of each way to write a mask; the last is a crowd, and one has no area."""
    images, annotations = [], []
    for n, name in enumerate(("a.png", "b.jpg", "sub/c.png"), 1):
        w, h = PILImage.open(pictures / name).size
        mask = np.zeros((h, w), bool)
        mask[h // 4 : h // 2, w // 4 : 3 * w // 4] = True
        x0, y0, x1, y1 = w // 4, h // 4, 3 * w // 4, h // 2
        runs = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=False))
        segmentation = {
            1: [[x0, y0, x1, y0, x1, y1, x0, y1]],
            2: masks.encode(mask),
            3: {"size": [h, w], "counts": np.diff([0, *runs, mask.size]).tolist()},
        }[n]
        images.append({"id": n, "file_name": name, "height": h, "width": w})
        common = {"id": n, "image_id": n, "category_id": 1, "bbox": [x0, y0, x1 - x0, y1 - y0]}
        annotations.append({**common, "segmentation": segmentation, "area": int(mask.sum()), "iscrowd": int(n == 3)})
    annotations.append({**annotations[0], "id": 9, "area": 0.4})
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}))
    return path


def segmenter(plan: Plan, source=lambda images: []) -> Segmenter:
    return Segmenter(plan, network=Bright(), source=source)


def test_truth_is_read_from_polygons_and_both_kinds_of_rle(pictures, coco_file):
    truths = read_truth(pictures, coco_file)
    assert [len(t.rle) for t in truths] == [1, 1, 1] and [t.crowd.tolist() for t in truths] == [[False], [False], [True]]
    for t in truths:
        h, w = t.image.size
        assert masks.decode(t.rle[0])[h // 4 : h // 2, w // 4 : 3 * w // 4].all() and masks.area(t.rle)[0] == h // 4 * (w // 2)
        assert t.box[0] == pytest.approx([w // 4, h // 4, 3 * w // 4, h // 2]) and isinstance(t.rle[0]["counts"], str)
    assert len(read_truth(pictures, coco_file, subset=2)) == 2


def test_an_image_is_found_by_its_id_in_twelve_digits(pictures, coco_file):
    (pictures / "a.png").rename(pictures / "000000000001.png")
    assert read_truth(pictures, coco_file)[0].image.path == pictures / "000000000001.png"


@pytest.mark.parametrize("zoom", [False, True])
def test_boxes(pictures, coco_file, zoom):
    seen = []
    plan = Plan(batch=2, zoom=zoom)
    report = evaluate(pictures, coco_file, plan=plan, progress=lambda *at: seen.append(at), segmenter=segmenter(plan))
    assert report["images"] == report["annotations"] == 3 and seen == [(2, 3), (3, 3)]
    assert 80 < report["miou"] <= 100 and report["miou"] == report["miou_small"] and report["miou_large"] is None
    assert report["baseline_box"] == pytest.approx(100, abs=1e-3) and 65 < report["baseline_ellipse"] < 90
    assert report["iou_correlation"] is None and ("zoom" in report["protocol"]) == zoom  # a constant prediction has none
    assert json.loads(json.dumps(report))["plan"]["batch"] == 2


def test_correlation_is_that_of_predicted_and_true_iou(pictures, coco_file):
    class Sure(Bright):
        def decode(self, features, owner, points, *rest):
            logits, _ = super().decode(features, owner, points, *rest)
            return logits, torch.linspace(0, 1, 3)[None] + torch.arange(len(owner))[:, None]

    plan = Plan(batch=3)
    report = evaluate(pictures, coco_file, plan=plan, segmenter=Segmenter(plan, network=Sure(), source=lambda images: []))
    assert report["iou_correlation"] is not None and -1 <= report["iou_correlation"] <= 1


def test_clicks_come_out_of_one_pass_and_equal_separate_ones(pictures, coco_file):
    def run(clicks, batch):
        plan = Plan(batch=batch, prompt_batch=2)
        ready = segmenter(plan)
        report = evaluate(pictures, coco_file, plan=plan, prompt="point", clicks=clicks, segmenter=ready)
        assert ready.network.encoded == 3  # features once for each image, whatever the number of rounds
        return {k: v for k, v in report.items() if k.startswith("miou")}

    together = run((1, 2, 3), 2)
    assert set(together) == {f"miou_{n}{size}" for n in (1, 2, 3) for size in ("", "_small", "_medium", "_large")}
    apart = {k: v for n in (1, 2, 3) for k, v in run((n,), 1).items()}
    assert together.keys() == apart.keys()
    for name, value in together.items():
        assert value == (None if apart[name] is None else pytest.approx(apart[name]))
    assert 50 < together["miou_1"] < together["miou_2"]


def test_the_second_click_goes_to_the_error_of_the_first(pictures, coco_file):
    """The rounds of `evaluate` against the protocol written down for one mask."""
    plan = Plan()
    report = evaluate(pictures, coco_file, plan=plan, prompt="point", clicks=(3,), subset=1, segmenter=segmenter(plan))
    (truth,) = read_truth(pictures, coco_file, subset=1)
    one, mask = segmenter(plan), masks.decode(truth.rle[0])
    pixels = np.asarray(PILImage.open(truth.image.path).convert("RGB"))
    encoded = one.encode([View(pixels, None, truth.image.size)], 64)
    seen, xy, signs = np.zeros_like(mask), np.zeros((0, 2), int), []
    for _ in range(3):
        x, y, positive = prompts.next_click(mask, seen, xy)
        xy, signs = np.concatenate([xy, [[x, y]]]), [*signs, int(positive)]
        ((answer,),) = one.decode(encoded, [Prompts.of(points=[xy], signs=[signs])])
        seen = masks.decode(answer.rle)
    assert report["miou_3"] == pytest.approx(100 * metrics.mask_iou(truth.rle, [answer.rle])[0])


def test_offline_leaves_crowds_out(pictures, coco_file):
    def source(images):
        return [
            Boxes(np.array([[w // 4, h // 4, 3 * w // 4, h // 2]], np.float32), np.ones(1, np.float32), np.ones(1, np.int64))
            for h, w in (image.size for image in images)
        ]

    plan = Plan()
    report = evaluate(pictures, coco_file, plan=plan, prompt="offline", segmenter=segmenter(plan, source))
    assert report["masks"] == 3 and report["recall_50"] == pytest.approx(100)


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda table: "not json", "not a COCO instances file"),
        (lambda table: [1, 2], "not a COCO instances file"),
        (lambda table: {"images": []}, "not a COCO instances file"),
        (lambda table: {"images": [], "annotations": []}, "lists no images"),
        (lambda table: {**table, "annotations": [{"image_id": 1, "bbox": [1, 2, 3, 4]}]}, "not a COCO instances file"),
        (lambda table: {**table, "images": [{**table["images"][0], "file_name": "z.png", "id": 77}]}, "z.png is not in"),
    ],
)
def test_what_is_no_truth_is_refused(pictures, coco_file, spoil, word):
    changed = spoil(json.loads(coco_file.read_text()))
    coco_file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(DepthsegError, match=word):
        evaluate(pictures, coco_file, plan=Plan())
    with pytest.raises(DepthsegError, match="cannot read"):
        evaluate(pictures, coco_file.with_name("nowhere.json"), plan=Plan())


def test_an_unreadable_image_or_another_size_ends_the_run(pictures, coco_file):
    PILImage.new("RGB", (5, 5)).save(pictures / "a.png")
    with pytest.raises(DepthsegError, match=r"a\.png has"):
        evaluate(pictures, coco_file, plan=Plan(), segmenter=segmenter(Plan()))
    (pictures / "a.png").write_bytes(b"")
    with pytest.raises(DepthsegError, match=r"a\.png cannot be read"):
        evaluate(pictures, coco_file, plan=Plan(), segmenter=segmenter(Plan()))


def test_unknown_prompts_and_clicks_are_refused(pictures, coco_file):
    with pytest.raises(DepthsegError, match="no prompt"):
        evaluate(pictures, coco_file, plan=Plan(), prompt="word")
    with pytest.raises(DepthsegError, match="clicks"):
        evaluate(pictures, coco_file, plan=Plan(), prompt="point", clicks=(0, 1))


def polygon(box, size, ellipse: bool) -> dict:
    """The same shapes through pycocotools' polygons: another way to the same pixels."""
    if ellipse:
        angle = np.linspace(0, 2 * np.pi, 64, endpoint=False)
        xy = (box[:2] + box[2:]) / 2 + (box[2:] - box[:2]) / 2 * np.stack([np.cos(angle), np.sin(angle)], 1)
    else:
        xy = box[[0, 1, 2, 1, 2, 3, 0, 3]]
    return coco.frPyObjects([xy.ravel().tolist()], *size)[0]


def test_geometry_alone_on_coco(shared):
    """815 annotations, pixels whose centres are inside: inscribed ellipse 62.4, filled box 58.4."""
    folder = shared / "data" / "coco-mini"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/coco-mini")
    truths = read_truth(folder / "images", folder / "annotations" / "instances_val.json")
    area = np.concatenate([t.area for t in truths])
    assert len(area) == 815 and sum(t.crowd.sum() for t in truths) == 11
    for shape, known in ((inscribed_ellipse, 62.4), (filled_box, 58.4)):
        ours, theirs = (
            metrics.miou(np.concatenate([metrics.mask_iou(t.rle, [f(b, t.image.size) for b in t.box]) for t in truths]), area)["miou"]
            for f in (shape, lambda box, size, round=shape is inscribed_ellipse: polygon(box, size, round))
        )
        assert round(ours, 1) == known and ours == pytest.approx(theirs, abs=0.1)
