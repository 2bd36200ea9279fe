"""The protocols on tiny pictures with a network that finds the bright rectangle, and what geometry alone gets on COCO."""

import json

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from pycocotools import mask as coco
from torch import nn

from depthseg import masks, metrics, predictions, prompts, truth
from depthseg.asking import other_depth, segmenter_for
from depthseg.errors import DepthsegError
from depthseg.evaluate import from_file, run
from depthseg.plan import Plan
from depthseg.schema import Boxes, Frame, Prompts
from depthseg.score import Request, filled_box, inscribed_ellipse
from depthseg.segment import Segmenter
from depthseg.views import View


class Bright(nn.Module):
    """A box gives its bright part, clicks what is bright right of the leftmost and not near a negative one.

    So a first click cannot be perfect, and later rounds differ from it.
    """

    side, zoom_side, alpha, single_mask_for = 64, 64, None, "never"
    frame, most_points, hears_negatives = Frame, None, True

    def __init__(self):
        super().__init__()
        self.encoded = 0

    grid_limits, specks = (0.7, 0.85), 0.0

    def encode(self, rgb, depth=None):
        self.encoded += len(rgb)
        return (10 * nn.functional.avg_pool2d(rgb.mean(1, keepdim=True), 2),)

    def decode(self, features, owner, points, labels, masks=None, multimask=True, best=False):
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


def segmenter(plan: Plan, source=lambda images: [], network=None) -> Segmenter:
    return Segmenter(plan, network=network or Bright(), source=source)


def ask(pictures, coco_file, folder, request=None, plan=None, ready=None, **given) -> dict:
    request, plan = request or Request(), plan or Plan(zoom=False)
    ready = ready or segmenter(plan)
    return run(truth.read(pictures, coco_file), ready, request, folder, pictures=False, **given)


@pytest.mark.parametrize("zoom", [False, True])
def test_boxes(pictures, coco_file, tmp_path, zoom):
    seen = []
    report = ask(pictures, coco_file, tmp_path / "o", plan=Plan(batch=2, zoom=zoom), progress=lambda *at: seen.append(at))
    assert report["state"]["done"] == 3 and seen == [(1, 3), (2, 3), (3, 3)]
    m = report["metrics"]
    assert 80 < m["miou"] <= 100 and m["miou"] == m["miou_small"] and m["miou_large"] is None
    assert m["baseline_box"] == pytest.approx(100, abs=1e-3) and 65 < m["baseline_ellipse"] < 90
    assert m["iou_correlation"] is None and ("zoom" in str(report["protocol_in_words"])) == zoom  # a constant prediction has none
    assert json.loads((tmp_path / "o" / "report.json").read_text()) == report and report["schema_version"] == 1
    low, high = report["intervals"]["miou"]
    assert low <= m["miou"] <= high
    results = json.loads((tmp_path / "o" / "predictions.json").read_text())
    assert [r["annotation_id"] for r in results] == [1, 2, 3]  # 9 has no pixel
    assert (
        metrics.mask_iou([r["segmentation"] for r in results], [t.rle[0] for t in truth.read(pictures, coco_file).truths]).mean() * 100
        == m["miou"]
    )


def test_the_strict_protocol_leaves_crowds_out(pictures, coco_file, tmp_path):
    report = ask(pictures, coco_file, tmp_path / "o", Request(protocol="strict"))
    assert len(json.loads((tmp_path / "o" / "predictions.json").read_text())) == 2 and "left out" in str(report["protocol_in_words"])


def test_the_box_of_efficientsam_is_that_of_the_mask(pictures, coco_file, tmp_path):
    table = json.loads(coco_file.read_text())
    for annotation in table["annotations"]:
        annotation["bbox"] = [0, 0, 5, 5]
    coco_file.write_text(json.dumps(table))
    good, bad = (ask(pictures, coco_file, tmp_path / p, Request(protocol=p))["metrics"]["miou"] for p in ("efficientsam", "official"))
    assert good > 80 > bad


def test_correlation_is_that_of_predicted_and_true_iou(pictures, coco_file, tmp_path):
    class Sure(Bright):
        def decode(self, features, owner, points, *rest):
            logits, _ = super().decode(features, owner, points, *rest)
            return logits, torch.linspace(0, 1, 3)[None] + torch.arange(len(owner))[:, None]

    plan = Plan(batch=3)
    report = ask(pictures, coco_file, tmp_path / "o", plan=plan, ready=segmenter(plan, network=Sure()))
    results = json.loads((tmp_path / "o" / "predictions.json").read_text())
    rles = [t.rle[0] for t in truth.read(pictures, coco_file).truths]
    iou = metrics.mask_iou(rles, [r["segmentation"] for r in results])
    expected = np.corrcoef(iou, [r["predicted_iou"] for r in results])[0, 1]
    assert report["metrics"]["iou_correlation"] == pytest.approx(expected)


@pytest.mark.parametrize("zoom", [False, True])
def test_clicks_come_out_of_one_pass_and_equal_separate_ones(pictures, coco_file, tmp_path, zoom):
    def clicked(clicks, batch):
        plan = Plan(batch=batch, prompt_batch=2, zoom=zoom)
        ready = segmenter(plan)
        report = ask(pictures, coco_file, tmp_path / f"{clicks}{batch}", Request("point", clicks), plan, ready)
        assert zoom or ready.network.encoded == 3  # features once for each image, whatever the number of rounds
        assert ("then three times on crops" in str(report["protocol_in_words"])) is zoom
        return {k: v for k, v in report["metrics"].items() if k.startswith("miou")}

    together = clicked((1, 2, 3), 2)
    assert set(together) == {f"miou_{n}{size}" for n in (1, 2, 3) for size in ("", "_small", "_medium", "_large")}
    apart = {k: v for n in (1, 2, 3) for k, v in clicked((n,), 1).items()}
    assert together == apart and 50 < together["miou_1"] < together["miou_2"]


@pytest.mark.parametrize("zoom", [False, True])
def test_the_second_click_goes_to_the_error_of_the_first(pictures, coco_file, tmp_path, zoom):
    """The rounds of `run` against the protocol written down for one mask, which is asked for as `segment` does."""
    plan = Plan(zoom=zoom)
    data = truth.read(pictures, coco_file, only=["a.png"])
    report = run(data, segmenter(plan), Request("point", (1, 3)), tmp_path / "o", pictures=False)
    one, mask = segmenter(plan), masks.decode(data.truths[0].rle[0])
    pixels = np.asarray(PILImage.open(data.truths[0].image.path).convert("RGB"))
    view = View(pixels, None, data.truths[0].image.size)
    seen, xy, signs = np.zeros_like(mask), np.zeros((0, 2), int), []
    for _ in range(3):
        x, y, positive = prompts.next_click(mask, seen, xy)
        xy, signs = np.concatenate([xy, [[x, y]]]), [*signs, int(positive)]
        ((answer,),) = one.masks_for([view], [Prompts.of(points=[xy], signs=[signs])])
        seen = masks.decode(answer.rle)
        if len(xy) == 1:
            assert report["metrics"]["miou_1"] == pytest.approx(100 * metrics.mask_iou(data.truths[0].rle[:1], [answer.rle])[0])
    assert report["metrics"]["miou_3"] == pytest.approx(100 * metrics.mask_iou(data.truths[0].rle[:1], [answer.rle])[0])


def test_random_clicks_lie_inside_and_are_the_same_again(pictures, coco_file, tmp_path):
    first, again, other = (
        ask(pictures, coco_file, tmp_path / str(n), Request("point", (1, 3), "efficientsam", seed))["metrics"]
        for n, seed in enumerate((0, 0, 5))
    )
    assert first == again and first != other
    mask = np.zeros((6, 7), bool)
    mask[2:4, 3:6] = True
    clicks = [prompts.random_click(mask, n, np.random.default_rng(1)) for n in range(6)]
    assert len(set(clicks)) == 6 and all(mask[y, x] and positive for x, y, positive in clicks)


def exact(names=None):
    """A detector that finds what the annotations of the fixture are about, with a second, worse box."""

    def source(images):
        return [
            Boxes(
                np.array([[w // 4, h // 4, 3 * w // 4, h // 2], [0, 0, w, h]], np.float32),
                np.array([0.9, 0.2], np.float32),
                np.array([4, 4], np.int64),
                names or {},
            )
            for h, w in (image.size for image in images)
        ]

    if names:
        source.names = names
    return source


def test_classes_of_a_detector_are_found_by_name(pictures, coco_file, tmp_path):
    plan = Plan()
    ready = segmenter(plan, exact({4: "Thing", 5: "thing else"}))
    report = ask(pictures, coco_file, tmp_path / "o", Request("detector"), plan, ready)
    assert {r["category_id"] for r in json.loads((tmp_path / "o" / "predictions.json").read_text())} == {1}
    assert report["metrics"]["ap50"] == pytest.approx(100) and any("thing else" in w for w in report["warnings"])
    assert report["errors"]["truth"] == {"found": 3, "poor_mask": 0, "wrong_class": 0, "missed": 0}
    with pytest.raises(DepthsegError, match="of the detector's 2 classes"):
        ask(pictures, coco_file, tmp_path / "p", Request("detector"), plan, segmenter(plan, exact({4: "cat", 5: "dog"})))


def test_a_detector_without_names_is_scored_without_classes(pictures, coco_file, tmp_path):
    plan = Plan()
    report = ask(pictures, coco_file, tmp_path / "o", Request("detector", agnostic=True), plan, segmenter(plan, exact()))
    assert report["metrics"]["recall_50"] > 50 and report["agnostic"] and report["metrics"]["predictions"] == 6


def test_boxes_of_a_file_find_their_images_by_the_ids_of_the_annotations(pictures, coco_file, tmp_path):
    boxes = tmp_path / "boxes.json"
    table = json.loads(coco_file.read_text())
    found = [{"image_id": a["image_id"], "category_id": 1, "bbox": a["bbox"], "score": 0.5} for a in table["annotations"][:3]]
    boxes.write_text(json.dumps([*found, {**found[0], "file_name": "gone.png"}]))
    data, plan, request = truth.read(pictures, coco_file), Plan(model="nano", boxes=str(boxes)), Request("detector")
    ready = segmenter_for(data, plan, request)
    ready.network, ready.zoom = Bright(), False
    report = run(data, ready, request, tmp_path / "o", pictures=False)
    assert report["metrics"]["predictions"] == 3 and report["metrics"]["ap50"] > 60  # of annotation 9, too small to see, nothing is known
    assert any("1 of 4 entries" in warning for warning in report["warnings"])
    assert report["provenance"]["detector"]["name"] == "boxes"
    boxes.write_text(json.dumps([*found, {**found[0], "category_id": 0}]))
    with pytest.raises(DepthsegError, match="category ids of the boxes"):
        run(data, segmenter_for(data, plan, request), request, tmp_path / "p", pictures=False)


def test_a_stopped_run_goes_on_and_ends_alike(pictures, coco_file, tmp_path):
    plan = Plan(batch=1, zoom=False)
    whole = ask(pictures, coco_file, tmp_path / "whole", plan=plan)

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(pictures, coco_file, tmp_path / "o", plan=plan, progress=stop)
    journal = tmp_path / "o" / "predictions.jsonl"
    assert len(journal.read_text().splitlines()) == 2
    with open(journal, "a") as file:
        file.write('{"image_id": 3, "resul')  # torn by a crash
    ready = segmenter(plan)
    report = ask(pictures, coco_file, tmp_path / "o", plan=plan, ready=ready)
    assert ready.network.encoded == 1 and report["metrics"] == whole["metrics"]
    assert (tmp_path / "o" / "predictions.json").read_bytes() == (tmp_path / "whole" / "predictions.json").read_bytes()
    with pytest.raises(DepthsegError, match=r"plan\.zoom \(was False, is True\)"):
        ask(pictures, coco_file, tmp_path / "o", plan=Plan(zoom=True))
    with pytest.raises(DepthsegError, match="protocol"):
        ask(pictures, coco_file, tmp_path / "o", Request(protocol="strict"), plan=plan)
    assert ask(pictures, coco_file, tmp_path / "o", Request(protocol="strict"), plan=plan, overwrite=True)["state"]["done"] == 3


@pytest.mark.parametrize("request_", [Request(), Request("point", (1,))])
def test_an_image_that_cannot_be_used_is_told_and_not_scored(pictures, coco_file, tmp_path, request_):
    PILImage.new("RGB", (5, 5)).save(pictures / "a.png")
    (pictures / "b.jpg").write_bytes(b"")
    report = ask(pictures, coco_file, tmp_path / "o", request_)
    failed = {f["key"]: f["reason"] for f in report["state"]["failed"]}
    assert set(failed) == {"a.png", "b.jpg"} and "5 x 5" in failed["a.png"] and report["state"]["done"] == 1
    assert report["dataset"]["images"] == 1 and report["state"]["images"] == 3
    (pictures / "sub" / "c.png").unlink()
    with pytest.raises(DepthsegError, match="no image could be used"):
        ask(pictures, coco_file, tmp_path / "p", request_)


def test_predictions_of_a_file_give_the_report_of_the_run(pictures, coco_file, tmp_path):
    data = truth.read(pictures, coco_file)
    for n, request in enumerate((Request(), Request("point", (1, 2)), Request("detector", agnostic=True))):
        plan = Plan(zoom=False)
        first = run(data, segmenter(plan, exact()), request, tmp_path / f"a{n}", pictures=False)
        second = from_file(data, tmp_path / f"a{n}" / "predictions.json", request, tmp_path / f"b{n}", pictures=False)
        assert first["metrics"] == second["metrics"] and first["per_class"] == second["per_class"]


class Deep(Bright):
    """Sees what is near: masks follow the depth map, if there is one."""

    alpha = nn.Parameter(torch.ones(()))

    def encode(self, rgb, depth=None):
        (features,) = super().encode(rgb)
        return (features if depth is None else features * 0 + 10 * nn.functional.avg_pool2d(depth.mean(1, keepdim=True), 2),)


def test_the_ablation_of_depth(pictures, coco_file, tmp_path):
    def near(images):
        out = []
        for h, w in (image.size for image in images):
            depth = np.zeros((h, w), np.float32)
            depth[h // 4 : h // 2, w // 4 : 3 * w // 4] = 1
            out.append(depth)
        return out

    plan = Plan(zoom=False)
    ready = Segmenter(plan, network=Deep(), source=lambda images: [], depth=near)
    report = ask(pictures, coco_file, tmp_path / "o", plan=plan, ready=ready, ablate=True)
    modes = report["ablation"]["modes"]
    assert (
        set(modes) == {"on", "off", "constant", "shuffled"} and modes["on"]["miou"] == report["metrics"]["miou"] > modes["constant"]["miou"]
    )
    of = {(d["mode"], d["metric"]): d for d in report["ablation"]["differences"]}
    assert of["constant", "miou"]["value"] == pytest.approx(modes["on"]["miou"] - modes["constant"]["miou"])
    assert of["constant", "miou"]["low"] <= of["constant", "miou"]["value"] <= of["constant", "miou"]["high"]
    assert ready.depth is near and all(
        (tmp_path / "o" / "ablation" / m / "predictions.json").exists() for m in ("off", "constant", "shuffled")
    )
    results = json.loads((tmp_path / "o" / "predictions.json").read_text())
    assert all(r["depth_contrast"] == 1 for r in results)
    with pytest.raises(DepthsegError, match="no depth to be changed"):
        ask(pictures, coco_file, tmp_path / "p", ablate=True)
    with pytest.raises(DepthsegError, match="fewer than two images"):
        run(truth.read(pictures, coco_file, only=["a.png"]), ready, Request(), tmp_path / "q", pictures=False, ablate=True)


def test_depth_is_ablated_for_a_detector_by_the_same_rules(pictures, coco_file, tmp_path):
    def flat(images):
        return [np.zeros((8, 8), np.float32) for _ in images]  # what "constant" is too

    plan, request = Plan(zoom=False), Request("detector", rank="predicted_iou", agnostic=True, threshold=0.5)
    ready = Segmenter(plan, network=Deep(), source=exact(), depth=flat)
    report = run(truth.read(pictures, coco_file), ready, request, tmp_path / "o", pictures=False, ablate=True)
    modes = report["ablation"]["modes"]
    assert modes["on"] == modes["constant"] != modes["off"] and report["rank"] == "predicted_iou"


def test_an_image_that_changed_is_asked_again(pictures, coco_file, tmp_path):
    plan = Plan(zoom=False)
    first = ask(pictures, coco_file, tmp_path / "o", plan=plan)
    PILImage.fromarray(np.zeros((48, 64, 3), np.uint8)).save(pictures / "a.png")
    ready = segmenter(plan)
    again = ask(pictures, coco_file, tmp_path / "o", plan=plan, ready=ready)
    assert ready.network.encoded == 1 and again["metrics"]["miou"] < first["metrics"]["miou"]
    with (
        predictions.Journal(
            tmp_path / "o", json.loads((tmp_path / "o" / "run.json").read_text())["settings"], truth.read(pictures, coco_file)
        ),
        pytest.raises(DepthsegError, match="another process"),
    ):
        ask(pictures, coco_file, tmp_path / "o", plan=plan)


def test_shuffled_depth_is_that_of_another_image(pictures, coco_file):
    data = truth.read(pictures, coco_file)
    keys = []
    other = other_depth("shuffled", lambda images: [keys.append(image.key) for image in images], data)
    other([t.image for t in data.truths])
    assert sorted(keys) == sorted(t.image.key for t in data.truths) and all(a != t.image.key for a, t in zip(keys, data.truths))


def test_unknown_prompts_and_clicks_are_refused():
    with pytest.raises(DepthsegError, match="no prompt"):
        Request("word")
    with pytest.raises(DepthsegError, match="clicks"):
        Request("point", (0, 1))


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
    truths = truth.read(folder / "images", folder / "annotations" / "instances_val.json").truths
    area = np.concatenate([t.area for t in truths])
    assert len(area) == 815 and sum(t.crowd.sum() for t in truths) == 11
    for shape, known in ((inscribed_ellipse, 62.4), (filled_box, 58.4)):
        ours, theirs = (
            metrics.miou(np.concatenate([metrics.mask_iou(t.rle, [f(b, t.image.size) for b in t.box]) for t in truths]), area)["miou"]
            for f in (shape, lambda box, size, round=shape is inscribed_ellipse: polygon(box, size, round))
        )
        assert round(ours, 1) == known and ours == pytest.approx(theirs, abs=0.1)
