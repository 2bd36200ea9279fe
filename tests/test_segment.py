"""Segmenter with a network that answers with the bright part of the picture, so that no weights are needed."""

import json
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image as PILImage
from torch import nn

from depthseg import catalog, edges, masks, views
from depthseg.data import Failure, find, read
from depthseg.errors import MISSING_PIECE, NOTHING_TO_DO, DepthsegError
from depthseg.models.depthseg import DepthSeg
from depthseg.plan import Plan
from depthseg.schema import ABSENT, CORNER_MAX, CORNER_MIN, PADDING, Boxes, Crop, Frame, Image, Prompts, Record
from depthseg.segment import Segmenter
from depthseg.views import Answer, View


class Bright(nn.Module):
    """Features are the brightness at half the input; a mask is what is bright, inside the box if there is one."""

    side, zoom_side, alpha, single_mask_for = 64, 64, None, "never"
    frame, most_points, hears_negatives = Frame, None, True

    def __init__(self):
        super().__init__()
        self.grid_limits, self.specks = (0.7, 0.85), 0.0
        self.calls = []  # what was asked for: ("encode", side, views) and ("decode", prompts, candidates)

    def encode(self, rgb, depth=None):
        self.calls.append(("encode", rgb.shape[-1], len(rgb)))
        return (10 * nn.functional.avg_pool2d(rgb.mean(1, keepdim=True), 2),)

    def decode(self, features, owner, points, labels, masks=None, multimask=True, best=False):
        self.calls.append(("decode", len(owner), 3 if multimask else 1))
        logits = features[0][owner]  # (P, 1, s, s)
        at = (torch.arange(logits.shape[-1]) + 0.5) * 1024 / logits.shape[-1]
        for p, (xy, label) in enumerate(zip(points, labels)):
            if CORNER_MIN in label:
                (x0, y0), (x1, y1) = xy[int((label == CORNER_MIN).nonzero()[0]) :][:2]
                inside = ((at >= x0) & (at <= x1)) & ((at >= y0) & (at <= y1))[:, None]
                logits[p] = torch.where(inside, logits[p], -10)
        if not multimask:
            return logits, torch.full((len(owner), 1), 0.9)
        return torch.cat([-torch.ones_like(logits), logits, -torch.ones_like(logits)], 1), torch.tensor([[0.1, 0.9, 0.2]]).repeat(
            len(owner), 1
        )


def rectangle(image: Image) -> np.ndarray:
    """The bright rectangle of the fixture's pictures, xyxy."""
    h, w = image.size
    return np.array([w // 4, h // 4, 3 * w // 4, h // 2], np.float32)


def truth(image: Image) -> dict:
    x0, y0, x1, y1 = rectangle(image).astype(int)
    mask = np.zeros(image.size, bool)
    mask[y0:y1, x0:x1] = True
    return masks.encode(mask)


def around(images: list[Image]) -> list[Boxes]:
    """Two boxes for each image: the rectangle's own, and, with the better score, its left half."""
    whole = [rectangle(image) for image in images]
    half = [b - np.array([0, 0, (b[2] - b[0]) / 2, 0], np.float32) for b in whole]
    return [Boxes(np.stack([a, b]), np.array([0.4, 0.8], np.float32), np.array([3, 7]), {3: "box"}) for a, b in zip(whole, half)]


def run(segmenter: Segmenter, images: list[Image]) -> list[Record]:
    answers = list(segmenter.segment(images))
    assert all(isinstance(a, Record) for a in answers), answers
    return answers  # type: ignore[return-value]


def test_boxes_from_a_file(pictures, tmp_path):
    images = find([pictures])
    entries = [{"file_name": "a.png", "category_id": 7, "bbox": [16, 12, 32, 12], "score": 0.9}]
    entries += [{"file_name": "sub/c.png", "category_id": 9, "bbox": [8, 8, 16, 8], "score": 0.5}]
    (tmp_path / "boxes.json").write_text(json.dumps(entries))
    segmenter = Segmenter(Plan(boxes=str(tmp_path / "boxes.json")), network=Bright())
    a, b, c = run(segmenter, images)
    assert [r.image.key for r in (a, b, c)] == ["a.png", "b.jpg", "sub/c.png"]
    assert len(b.masks) == 0 and len(a.masks) == len(c.masks) == 1
    assert a.masks.score == pytest.approx([0.9]) and a.masks.label.tolist() == [7] and c.masks.label.tolist() == [9]
    assert a.masks.predicted_iou == pytest.approx([0.9])
    assert masks.iou(a.masks.rle, [truth(a.image)])[0, 0] > 0.9
    assert np.abs(a.masks.box[0] - [16, 12, 48, 24]).max() <= 1 and a.masks.area[0] == masks.area(a.masks.rle)[0]
    assert set(a.seconds) == {"read", "detect", "encode", "decode", "masks"} and min(a.seconds.values()) > 0
    assert a.plan == segmenter.plan.digest()
    assert segmenter.provenance["detector"]["name"] == "file" and segmenter.provenance["versions"]["torch"]


def test_best_score_comes_first_with_its_own_label(pictures):
    for record in run(Segmenter(Plan(), network=Bright(), source=around), find([pictures])):
        assert record.masks.score == pytest.approx([0.8, 0.4]) and record.masks.label.tolist() == [7, 3]
        assert record.masks.area[0] < record.masks.area[1] and record.masks.names == {3: "box"}


@pytest.mark.parametrize("zoom", [False, True])
def test_batched_equals_one_by_one(pictures, zoom):
    together = run(Segmenter(Plan(batch=3, prompt_batch=4, zoom=zoom), network=Bright(), source=around), find([pictures]))
    alone = run(Segmenter(Plan(batch=1, prompt_batch=1, zoom=zoom), network=Bright(), source=around), find([pictures]))
    for a, b in zip(together, alone, strict=True):
        assert a.image.key == b.image.key and a.masks.rle == b.masks.rle and len(a.masks) == 2
        assert np.allclose(a.masks.stability, b.masks.stability)


def test_batched_equals_one_by_one_in_a_real_network(pictures):
    """Prompts of different lengths in one call: the filling must not be seen."""
    torch.manual_seed(0)
    network = DepthSeg("nano", depth=False).eval()
    network.side = 64

    def source(images):
        kinds = [Prompts.of(boxes=[[4, 4, 20, 20]]), Prompts.of(points=[[[9, 9], [3, 20], [5, 5]]], signs=[[1, 0, 1]])]
        return [kinds[image.size[0] % 3 == 0] for image in images]

    def answers(plan):
        segmenter = Segmenter(plan, network=network, source=source)
        views = [View(np.asarray(PILImage.open(i.path).convert("RGB")), None, i.size) for i in images]
        encoded = segmenter.encode(views, 64)
        return segmenter.decode(encoded, source(images))

    images = [Image(i.key, i.id, i.path, PILImage.open(i.path).size[::-1]) for i in find([pictures])]
    for a, b in zip(answers(Plan(prompt_batch=16)), answers(Plan(prompt_batch=1)), strict=True):
        assert len(a) == len(b) == 1
        assert a[0].predicted_iou == pytest.approx(b[0].predicted_iou, abs=1e-5)
        assert a[0].stability == pytest.approx(b[0].stability, abs=0.01)


def small(tmp_path) -> Image:
    """A large dark picture with a bright rectangle of 24 x 16 pixels."""
    pixels = np.zeros((600, 800, 3), np.uint8)
    pixels[201:217, 303:327] = 255
    PILImage.fromarray(pixels).save(tmp_path / "small.png")
    return find([tmp_path])[0]


def clicked(image: Image, prompts: Prompts, **plan) -> tuple[list[Answer], list[tuple]]:
    network = Bright()
    segmenter = Segmenter(Plan(**plan), network=network, source=lambda images: [])
    answers = segmenter.masks_for([views.whole(read(image), None)], [prompts])[0]
    return answers, network.calls


def test_what_is_clicked_is_looked_at_again_from_nearer(tmp_path):
    image = small(tmp_path)
    true = np.zeros((600, 800), bool)
    true[201:217, 303:327] = True
    prompts = Prompts.of(points=np.array([[[310, 205]], [[320, 210]]]))
    far, calls = clicked(image, prompts, zoom=False)
    assert calls == [("encode", 64, 1), ("decode", 2, 3)]
    near, calls = clicked(image, prompts, zoom=True)
    looks = [("encode", 64, 4), ("encode", 64, 2)] * (views.LOOKS + 1)  # at three answers to each, four crops in a call; the last by box
    assert [call for call in calls if call[0] == "encode"] == [("encode", 64, 1), *looks] and views.LOOKS == 2
    ious = [[masks.iou([a.rle], [masks.encode(true)])[0, 0] for a in answers] for answers in (far, near)]
    assert max(ious[0]) < 0.7 and min(ious[1]) > 0.9
    assert [a.prompt for a in near] == [0, 1]


def test_everything_mode_looks_twice_from_nearer(tmp_path):
    network, prompts = Bright(), Prompts.of(points=np.array([[[310, 205]]]))
    segmenter = Segmenter(Plan(zoom=True, min_predicted_iou=0, min_stability=0), network=network, source=lambda images: [])
    (found,) = segmenter.masks_for([views.whole(read(small(tmp_path)), None)], [prompts], strict=True)
    assert [call for call in network.calls if call[0] == "encode"] == [("encode", 64, 1)] * 3 and len(found) == 1


def test_what_one_click_finds_is_asked_for_by_its_box_and_what_more_clicks_find_is_not(tmp_path):
    image, asked = small(tmp_path), []

    class Listening(Bright):
        def decode(self, features, owner, points, labels, *rest, **more):
            asked.extend(tuple(sorted(set(row))) for row in labels.tolist())
            return super().decode(features, owner, points, labels, *rest, **more)

    for points, boxed in (([[310, 205]], True), ([[310, 205], [320, 210]], False)):
        asked.clear()
        segmenter = Segmenter(Plan(zoom=True), network=Listening(), source=lambda images: [])
        segmenter.masks_for([views.whole(read(image), None)], [Prompts.of(points=np.array([points]))])
        assert ((CORNER_MIN, CORNER_MAX) in asked) == boxed, asked


def test_a_click_lies_in_the_middle_or_anywhere(tmp_path):
    """A large thing clicked at its edge, a small one there in its middle: which of them is meant is for the plan to say."""
    image, prompts = small(tmp_path), Prompts.of(points=np.array([[[305, 209]]]))

    class Both(Bright):
        """Candidates: the bright rectangle, and its left sixth, of which it is slightly less sure."""

        def decode(self, features, owner, points, labels, *rest, **more):
            logits, iou = super().decode(features, owner, points, labels, *rest, **more)
            if logits.shape[1] == 3:
                columns = (logits[:, 1] > 0).any(1)  # (P, s)
                part = columns & (columns.cumsum(1) <= columns.sum(1, keepdim=True) / 6)
                logits[:, 0] = torch.where(part[:, None], logits[:, 1], -logits[:, 1].abs())
                iou[:, 0] = iou[:, 1] - 0.05
            return logits, iou

    area = {}
    for central in (True, False):
        segmenter = Segmenter(Plan(zoom=True, central=central), network=Both(), source=lambda images: [])
        ((answer,),) = segmenter.masks_for([views.whole(read(image), None)], [prompts])
        area[central] = masks.area([answer.rle])[0]
    assert area[True] < 100 < 300 < area[False], area


def test_of_several_answers_that_is_given_which_the_others_speak_for():
    def answer(predicted, *box, centredness=1.0):
        mask = np.zeros((20, 20), bool)
        mask[box[1] : box[3], box[0] : box[2]] = True
        return Answer(0, masks.encode(mask), predicted, 1.0, centredness)

    stray, thing, again = answer(0.6, 0, 0, 4, 4), answer(0.55, 6, 6, 16, 16), answer(0.5, 6, 6, 16, 15)
    assert views.likeliest([stray, thing, again], [stray, thing, again], True) == [thing]
    assert views.likeliest([stray, thing], [stray, thing], True) == [stray]  # one against one: the surer
    assert views.likeliest([stray, again], [stray, thing, again], True) == [again]  # what speaks need not be among what is given
    assert views.likeliest([stray], [thing], True) == [stray] and views.likeliest([], [thing], True) == []
    aside = answer(0.6, 0, 0, 4, 4, centredness=0.5)
    assert views.likeliest([aside, thing], [aside, thing], True) == [thing]  # one against one: the one that was clicked in the middle
    assert views.likeliest([aside, thing], [aside, thing], False) == [aside]  # a click may lie anywhere


def test_any_answer_to_a_click_may_be_given_but_in_everything_mode_the_last_looks_alone(monkeypatch):
    def answer(predicted, left):
        mask = np.zeros((60, 80), bool)
        mask[20:40, left : left + 20] = True
        return Answer(0, masks.encode(mask), predicted, 1.0)

    first, stray = answer(0.9, 30), answer(0.2, 45)
    segmenter = Segmenter(Plan(zoom=True), network=Bright(), source=lambda images: [])
    monkeypatch.setattr(segmenter, "_on_crops", lambda views, asked, which, *rest, **more: iter([[stray] for _ in which]))
    view, prompts = View(np.zeros((60, 80, 3), np.uint8), None, (60, 80)), Prompts.of(points=np.array([[[50, 30]]]))
    for strict, given in ((False, first), (True, stray)):
        ((found,),) = segmenter.closer([view], [prompts], [[first]], strict)
        assert found.rle == given.rle


def test_candidates_know_how_near_their_middle_they_were_clicked(tmp_path):
    segmenter = Segmenter(Plan(zoom=True), network=Bright(), source=lambda images: [])
    view = views.whole(read(small(tmp_path)), None).crop(np.array([303, 201, 327, 217]))
    encoded = segmenter.encode([view], 64)
    x, y = np.array([315, 209]) - view.corner

    def heard(prompts):
        return [a.centredness for a in segmenter.decode(encoded, [prompts], every=True)[0]]

    middle, aside = heard(Prompts.of(points=np.array([[[x, y]], [[x - 10, y]]])))[1::3]  # of three candidates the second has an area
    assert middle > 0.8 and 0 < aside < 0.5
    assert set(heard(Prompts.of(points=np.array([[[2, 2]]])))) == {0.0}  # beside the mask
    two = Prompts.of(points=np.array([[[x - 10, y], [x, y]]]))
    boxed = Prompts.of(points=np.array([[[x - 10, y]]]), boxes=[[x - 12, y - 8, x + 12, y + 8]])
    assert set(heard(two)) | set(heard(boxed)) == {1.0}  # said of one click alone


def test_nothing_is_looked_at_again_without_a_positive_click_or_with_a_mask(tmp_path):
    image = small(tmp_path)
    negative = Prompts.of(points=np.array([[[310, 205]]]), signs=np.array([[0]]))
    assert clicked(image, negative, zoom=True)[1] == [("encode", 64, 1), ("decode", 1, 3)]
    before = replace(Prompts.of(points=np.array([[[310, 205]]])), masks=np.zeros((1, 1, 16, 16), np.float32))
    assert clicked(image, before, zoom=True)[1] == [("encode", 64, 1), ("decode", 1, 3)]


def test_a_crop_hears_its_own_clicks_alone():
    prompts = Prompts.of(points=np.array([[[310, 205], [700, 20], [320, 205]]]), signs=np.array([[1, 0, 0]]))
    view = View(np.zeros((600, 800, 3), np.uint8), None, (600, 800))
    box = views.around(prompts, 0, masks.encode(np.zeros((600, 800), bool)))
    assert box.tolist() == [310, 205, 311, 206]  # an empty mask says nothing
    seen = np.zeros((600, 800), bool)
    seen[200:220, 300:305] = True
    assert views.around(prompts, 0, masks.encode(seen)).tolist() == [300, 200, 311, 220]
    crop = view.crop(views.around(prompts, 0, masks.encode(seen)))
    one = views.on_crop(prompts, 0, crop)
    assert crop.corner == (285, 190) and one.labels[0].tolist() == [1, ABSENT, 0, PADDING]
    assert one.points[0, 0].tolist() == [25, 15]
    edge = Prompts.of(points=np.array([[[800, 600]]]))
    corner = view.crop(views.around(edge, 0, masks.encode(seen & False)))
    assert views.on_crop(edge, 0, corner).labels[0].tolist() == [1, PADDING]  # on the border, and heard
    boxed = Prompts.of(boxes=[[10, 10, 20, 20]], points=np.array([[[40, 15]]]))
    assert views.around(boxed, 0).tolist() == [10, 10, 41, 20]  # a click beside the box is part of what is meant


def test_what_is_wrong_with_one_image_ends_that_image_only(pictures):
    (pictures / "aa.png").write_bytes(b"not a picture")
    images = find([pictures])

    def source(images):
        if any(image.key == "b.jpg" for image in images):
            raise DepthsegError("no boxes for b.jpg", "Look again.")
        return around(images)

    def depth(images):
        if any(image.key.startswith("sub") for image in images):
            raise DepthsegError("a depth map of another shape")
        return [np.ones(image.size, np.float32) for image in images]

    for batch in (1, 2, 4):
        a, aa, b, c = Segmenter(Plan(batch=batch), network=Bright(), source=source, depth=depth).segment(images)
        assert isinstance(a, Record) and len(a.masks) == 2 and a.depth is not None
        assert isinstance(aa, Failure) and aa.stage == "read" and aa.image.key == "aa.png"
        assert isinstance(b, Failure) and (b.stage, b.reason) == ("detect", "no boxes for b.jpg")
        assert isinstance(c, Failure) and (c.stage, c.reason) == ("depth", "a depth map of another shape")


def test_a_programming_error_is_raised(pictures):
    with pytest.raises(ZeroDivisionError):
        list(Segmenter(Plan(), network=Bright(), source=lambda images: [1 / 0]).segment(find([pictures])))


def test_zoom_pastes_at_the_right_place_and_skips_the_whole_image(tmp_path):
    pixels = np.zeros((200, 300, 3), np.uint8)
    pixels[150:173, 260:291] = 255
    PILImage.fromarray(pixels).save(tmp_path / "a.png")
    exact = masks.encode(pixels[..., 0] > 0)
    box = Boxes(np.array([[260, 150, 291, 173]], np.float32), np.ones(1, np.float32), np.ones(1, np.int64))
    iou = {}
    for zoom in (False, True):
        network = Bright()
        (record,) = run(Segmenter(Plan(zoom=zoom), network=network, source=lambda images: [box]), find([tmp_path]))
        iou[zoom] = masks.iou(record.masks.rle, [exact])[0, 0]
        assert [call[0] for call in network.calls] == ["encode", "decode"]
    assert iou[True] > 0.85 and iou[True] > iou[False] + 0.05 > 0.5, iou


def test_boxes_and_clicks_with_zoom(pictures):
    network = Bright()
    network.zoom_side = 32
    mixed = {"a.png": Prompts.of(boxes=[[16, 12, 48, 24], [16, 12, 32, 24]]), "b.jpg": Prompts.of(points=[[[20, 20]]])}
    source = lambda images: [mixed.get(image.key, Prompts.of(boxes=np.zeros((0, 4)))) for image in images]  # noqa: E731
    a, b, c = run(Segmenter(Plan(zoom=True), network=network, source=source), find([pictures]))
    assert [len(r.masks) for r in (a, b, c)] == [2, 1, 0]
    assert [call[1:] for call in network.calls if call[0] == "encode"] == [(64, 1), (32, 2)] + [(32, 3)] * (views.LOOKS + 1)
    assert masks.iou(b.masks.rle, [truth(b.image)])[0, 0] > 0.8


def test_a_crop_is_twice_the_box_and_stays_in_the_picture():
    ramp = np.tile(np.arange(50, dtype=np.float32), (40, 1)) / 50  # half the picture's resolution
    view = View(np.zeros((80, 100, 3), np.uint8), ramp, (80, 100))
    middle = view.crop(np.array([40, 30, 60, 46], np.float32))
    assert middle.pixels.shape[:2] == (40, 40) and middle.corner == (30, 18)
    assert middle.depth.shape == (40, 40) and np.allclose(middle.depth.mean(0), (np.arange(30, 70) / 2 - 0.25) / 50, atol=1e-2)
    assert view.crop(np.array([50, 40, 52, 42], np.float32)).pixels.shape[:2] == (32, 32)
    corner = view.crop(np.array([90, 70, 100, 80], np.float32))
    assert corner.pixels.shape[:2] == (21, 21) and corner.corner == (79, 59)
    outside = view.crop(np.array([150, 90, 170, 95], np.float32))
    assert min(outside.pixels.shape[:2]) >= 16
    pasted = corner.paste(Crop(np.ones((20, 18), bool), (3, 1), (21, 21)))
    assert pasted.corner == (82, 60) and pasted.size == (80, 100)
    assert pasted.whole().sum() == 20 * 18 and pasted.whole()[60:, 82:].all()


def test_grid_gives_each_thing_once(pictures):
    plan = Plan(detector="grid", points_per_side=4, min_stability=0.5, min_region=4)
    for record in run(Segmenter(plan, network=Bright()), find([pictures])):
        assert len(record.masks) == 1 and masks.iou(record.masks.rle, [truth(record.image)])[0, 0] > 0.7
        assert record.masks.names == {1: "object"} and record.masks.score == pytest.approx([0.9])


@pytest.mark.parametrize("zoom", [False, True])
@pytest.mark.parametrize("limit", [{"min_predicted_iou": 0.95}, {"min_stability": 1.1}])
def test_grid_drops_what_is_not_sure(pictures, limit, zoom):
    for record in run(Segmenter(Plan(detector="grid", points_per_side=2, zoom=zoom, **limit), network=Bright()), find([pictures])):
        assert len(record.masks) == 0


def test_empty_masks_are_dropped(tmp_path):
    PILImage.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "black.png")
    (record,) = run(Segmenter(Plan(), network=Bright(), source=around), find([tmp_path]))
    assert len(record.masks) == 0 and record.masks.box.shape == (0, 4)


def test_clear_prompts_get_one_candidate_where_the_network_says_so(pictures):
    asked = [
        (Prompts.of(boxes=[[1, 1, 9, 9]]), 1),
        (Prompts.of(points=[[[1, 1], [9, 9]]]), 3),
        (Prompts.of(points=[[[1, 1], [9, 9], [5, 5]]]), 1),
    ]
    for rule in ("unambiguous", "never"):
        for prompt, candidates in asked:
            network = Bright()
            network.single_mask_for = rule
            run(Segmenter(Plan(), network=network, source=lambda images, p=prompt: [p for _ in images]), find([pictures]))
            assert network.calls[-1] == ("decode", 3, candidates if rule == "unambiguous" else 3)


def test_half_precision_changes_little(pictures):
    images = find([pictures])
    fine, coarse = (run(Segmenter(Plan(precision=p), network=Bright(), source=around), images) for p in ("fp32", "bf16"))
    for a, b in zip(fine, coarse):
        assert masks.iou(a.masks.rle, b.masks.rle).diagonal().min() > 0.95


def test_auto_takes_yolo_when_its_weights_are_here(monkeypatch, weights_cache):
    monkeypatch.setattr(catalog, "resolve", lambda row: lambda path, *rest: path.name)
    monkeypatch.setattr(catalog, "embedded", lambda: weights_cache)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    (weights_cache / "nano").mkdir(parents=True)
    (weights_cache / "nano" / "nano-boxes.safetensors").write_bytes(b"nano")
    segmenter = Segmenter(Plan(), network=Bright())
    assert segmenter.source == "nano-boxes.safetensors" and segmenter.detector == "nano"
    assert any("--pull" in note for note in segmenter.notes) and any("research only" in note for note in segmenter.notes)
    (weights_cache / "yolov8l.pt").write_bytes(b"l")
    assert Segmenter(Plan(), network=Bright()).source == "yolov8l.pt"
    (weights_cache / "yolov8m.pt").write_bytes(b"m")
    segmenter = Segmenter(Plan(), network=Bright())
    assert segmenter.source == "yolov8m.pt" and len(segmenter.provenance["detector"]["sha256"]) == 64
    assert any("AGPL-3.0" in note for note in segmenter.notes)
    assert Segmenter(Plan(detector="nano"), network=Bright()).source == "nano-boxes.safetensors"


@pytest.mark.parametrize(
    ("plan", "code", "word"),
    [
        (Plan(model="efficientvit-sam-l0"), MISSING_PIECE, "efficientvit_sam_l0.pt"),
        (Plan(model="nono"), 2, "nono"),
        (Plan(device="banana"), 2, "banana"),
        (Plan(device="cuda:99"), MISSING_PIECE, "cuda:99"),
        (Plan(precision="fp8"), 2, "fp8"),
    ],
)
def test_what_a_user_can_get_wrong(plan, code, word):
    with pytest.raises(DepthsegError, match=word) as error:
        Segmenter(plan)
    assert error.value.code == code and error.value.hint


def test_depth_is_refused_where_the_model_has_none():
    for depth in ("auto", "none"):
        assert Segmenter(Plan(model="nano", depth=depth, detector="grid"), network=Bright()).depth is None
    with pytest.raises(DepthsegError, match="does not use depth") as error:
        Segmenter(Plan(model="nano", depth="nano", detector="grid"), network=Bright())
    assert "nano-depth" in error.value.hint


def test_depth_from_a_folder_reaches_the_network(pictures, tmp_path):
    network = Bright()
    network.alpha = torch.zeros(())
    network.encode = lambda rgb, depth=None: Bright.encode(network, depth)
    for image in find([pictures]):
        h, w = PILImage.open(image.path).size[::-1]
        near = np.zeros((h, w), np.uint8)
        near[h // 4 : h // 2, w // 4 : 3 * w // 4] = 200
        path = (tmp_path / "maps" / image.key).with_suffix(".png")
        path.parent.mkdir(parents=True, exist_ok=True)
        PILImage.fromarray(near).save(path)
    segmenter = Segmenter(Plan(depth=str(tmp_path / "maps")), network=network, source=around)
    for record in run(segmenter, find([pictures])):
        assert record.depth is not None and 0 <= record.depth.min() < record.depth.max() <= 1
        assert len(record.masks) == 2 and masks.iou(record.masks.rle[1:], [truth(record.image)])[0, 0] > 0.7


def test_the_stream_may_be_left_early(pictures):
    before = threading.active_count()
    answers = Segmenter(Plan(batch=1), network=Bright(), source=around).segment(find([pictures]))
    assert isinstance(next(answers), Record)
    answers.close()
    assert threading.active_count() == before


def test_clicks_from_a_file_keep_their_category(pictures, tmp_path):
    entries = [
        {"file_name": "a.png", "points": [[30, 18]], "category_id": 5},
        {"file_name": "a.png", "box": [16, 12, 16, 12], "points": [[20, 18]], "category_id": 6},
    ]
    (tmp_path / "points.json").write_text(json.dumps(entries))
    a, b, c = run(Segmenter(Plan(points=str(tmp_path / "points.json")), network=Bright()), find([pictures]))
    assert len(b.masks) == len(c.masks) == 0 and sorted(a.masks.label.tolist()) == [5, 6]
    both = dict(zip(a.masks.label.tolist(), a.masks.area.tolist()))
    assert both[5] > 1.5 * both[6] > 0


def test_a_card_makes_the_runs_itself_and_the_answers_are_the_same(pictures, monkeypatch):
    """As on CUDA, but on the CPU: prompts of several pictures in one decoder call. Crops stay with the host."""
    images, asked = find([pictures]), []
    rles = edges.rles
    monkeypatch.setattr(edges, "rles", lambda low, frame: asked.append(len(low)) or rles(low, frame))
    for zoom in (False, True):
        host, card = (Segmenter(Plan(prompt_batch=5, zoom=zoom), network=Bright(), source=around) for _ in range(2))
        card.edges_on_device = True
        for a, b in zip(run(host, images), run(card, images), strict=True):
            assert a.masks.rle == b.masks.rle and len(a.masks) == 2
            assert np.allclose(a.masks.stability, b.masks.stability) and np.allclose(a.masks.predicted_iou, b.masks.predicted_iou)
        assert asked == [2, 2, 1, 1], "six prompts in calls of five and one"


def test_what_lies_outside_its_picture_is_said(pictures, tmp_path):
    """A box beside its picture gives no mask, a click beside it hardly a good one."""
    (tmp_path / "boxes.json").write_text(json.dumps([{"file_name": "a.png", "bbox": box} for box in ([16, 12, 16, 12], [900, 2, 9, 9])]))
    (tmp_path / "points.json").write_text(json.dumps([{"file_name": "b.jpg", "points": p} for p in ([[3, 4]], [[-1, 4]], [[3, 900]])]))
    for asked, said in (
        ({"boxes": "boxes.json"}, "1 of 2 entries of boxes.json lies"),
        ({"points": "points.json"}, "2 of 3 entries of points.json lie"),
    ):
        plan = Plan(detector="grid", **{k: str(tmp_path / v) for k, v in asked.items()})
        segmenter = Segmenter(plan, network=Bright())
        assert "detector: grid is not asked, for the file says where to look" in segmenter.notes
        assert segmenter.remarks() == []
        run(segmenter, find([pictures]))
        assert segmenter.remarks() == [f"warning: {said} outside the picture"]


def test_files_are_compared_with_all_images_before_the_run(pictures, tmp_path):
    images = find([pictures])
    entries = [{"file_name": name, "bbox": [1, 2, 9, 9], "score": 0.01} for name in ("a.png", *"vwxyv")]
    boxes, table = tmp_path / "boxes.json", tmp_path / "images.json"
    boxes.write_text(json.dumps(entries))
    table.write_text(json.dumps({"images": []}))
    segmenter = Segmenter(Plan(boxes=str(boxes)), images_json=table, network=Bright())
    assert segmenter.expect(images) == ["warning: 5 of 6 entries of boxes.json name no image of this run: v, w, x, ..."]
    assert len(segmenter.source([images[0]])[0]) == 0  # no size yet: nothing is left of the box
    assert len(segmenter.provenance["images_json"]["sha256"]) == 64
    with pytest.raises(DepthsegError, match="no entry names an image") as error:
        segmenter = Segmenter(Plan(boxes=str(boxes)), network=Bright())
        segmenter.expect([Image("other.png", 1, None, (0, 0))])
    assert error.value.code == NOTHING_TO_DO
    (record, *_) = run(Segmenter(Plan(boxes=str(boxes)), network=Bright()), images)
    assert record.masks.score == pytest.approx([0.01]) or not len(record.masks)
    folder = tmp_path / "maps"
    folder.mkdir()
    network = Bright()
    network.alpha = torch.zeros(())
    segmenter = Segmenter(Plan(depth=str(folder)), network=network, source=around)
    with pytest.raises(DepthsegError, match=r"no depth map for a\.png.*3 of 3"):
        segmenter.expect(images)


def test_detectors_get_their_defaults(monkeypatch, weights_cache):
    monkeypatch.setattr(catalog, "resolve", lambda row: lambda *given: given[-3:-1])
    (weights_cache / "nano").mkdir(parents=True)
    (weights_cache / "nano" / "nano-boxes.safetensors").write_bytes(b"nano")
    given = [Segmenter(Plan(detector="nano", **limits), network=Bright()).source for limits in ({}, {"confidence": 0.0, "max_boxes": 3})]
    assert given == [(0.3, 100), (0.0, 3)]


def test_only_slow_depth_is_cached_and_by_precision(monkeypatch, weights_cache):
    weight = weights_cache / "nano" / "nano-depth-estimator.safetensors"
    weight.parent.mkdir(parents=True)
    weight.write_bytes(b"weights")
    monkeypatch.setattr(catalog, "embedded", lambda: weights_cache)
    monkeypatch.setattr(catalog, "resolve", lambda row: lambda *args: "built")
    network = Bright()
    network.alpha = torch.zeros(())
    nano = Segmenter(Plan(detector="grid"), network=network)
    assert nano.depth == "built" and any("depth: nano (embedded)" in note for note in nano.notes)
    monkeypatch.setattr("depthseg.weights.hub_folder", lambda hub, revision: weights_cache)
    slow = [
        Segmenter(Plan(detector="grid", precision=p, depth="depth-anything-v2-small"), network=network).depth.name for p in ("fp32", "bf16")
    ]
    assert len(set(slow)) == 2


def test_large_jpegs_are_decoded_small_only_where_no_stage_needs_more(tmp_path, monkeypatch):
    h, w = 2400, 3600
    y, x = np.mgrid[:h, :w]
    blob = ((x - 2000) / 900) ** 2 + ((y - 1100) / 500) ** 2 < 1
    PILImage.fromarray(np.where(blob, 220, 30).astype(np.uint8)).save(tmp_path / "a.jpg")
    entries = [{"file_name": "a.jpg", "category_id": 7, "bbox": [1000, 500, 2100, 1200], "score": 0.9}]
    (tmp_path / "boxes.json").write_text(json.dumps(entries))

    def answer(**plan):
        segmenter = Segmenter(Plan(boxes=str(tmp_path / "boxes.json"), **plan), network=Bright())
        return run(segmenter, find([tmp_path / "a.jpg"]))[0]

    full, small, zoomed = answer(), answer(draft=True), answer(draft=True, zoom=True)
    shapes = [r.image.pixels.shape[:2] for r in (full, small, zoomed)]
    assert shapes == [(h, w), (h // 2, w // 2), (h, w)]
    assert {r.image.size for r in (full, small, zoomed)} == {(h, w)} == {tuple(r.masks.rle[0]["size"]) for r in (full, small, zoomed)}
    assert masks.iou(small.masks.rle, full.masks.rle)[0, 0] > 0.999
    assert masks.iou(small.masks.rle, [masks.encode(blob)])[0, 0] > 0.9
    given = Segmenter(Plan(draft=True), network=Bright(), source=around)
    assert run(given, find([tmp_path / "a.jpg"]))[0].image.pixels.shape[:2] == (h, w)  # it may look at pixels


def test_threads_are_those_that_were_asked_for():
    before = torch.get_num_threads()
    try:
        Segmenter(Plan(threads=before + 1, device="cpu"), network=Bright(), source=around)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
