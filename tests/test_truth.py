"""Annotation files of COCO and LVIS, whole and spoilt."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from depthseg import masks, truth
from depthseg.errors import NOTHING_TO_DO, DepthsegError


def test_truth_is_read_from_polygons_and_both_kinds_of_rle(pictures, coco_file):
    data = truth.read(pictures, coco_file)
    assert [len(t) for t in data.truths] == [2, 1, 1] and [t.crowd.tolist() for t in data.truths] == [[False] * 2, [False], [True]]
    for t in data.truths:
        h, w = t.image.size
        assert masks.decode(t.rle[0])[h // 4 : h // 2, w // 4 : 3 * w // 4].all() and masks.area(t.rle)[0] == h // 4 * (w // 2)
        assert t.box[0] == pytest.approx([w // 4, h // 4, 3 * w // 4, h // 2]) and isinstance(t.rle[0]["counts"], str)
    assert data.kind == "coco" and data.names == {1: "thing"} and data.left_out == 0
    assert data.warnings == ["1 annotations have an area of less than one pixel and are not asked for"]
    assert data.about()["masks"] == 4 and data.about()["crowds"] == 1 and len(data.sha256) == 64
    assert json.loads(json.dumps(data.about())) == data.about()


def test_a_subset_is_drawn_with_its_seed_and_only_takes_keys(pictures, coco_file):
    drawn = [tuple(t.image.key for t in truth.read(pictures, coco_file, subset=2, seed=s).truths) for s in range(8)]
    assert len(set(drawn)) > 1 and all(len(d) == 2 for d in drawn)
    again = truth.read(pictures, coco_file, subset=2, seed=3)
    assert tuple(t.image.key for t in again.truths) == drawn[3] and again.left_out == 1
    assert [t.image.key for t in truth.read(pictures, coco_file, only=["sub/c.png"]).truths] == ["sub/c.png"]
    with pytest.raises(DepthsegError, match="is called z") as error:
        truth.read(pictures, coco_file, only=["a.png", "z"])
    assert error.value.code == NOTHING_TO_DO
    assert len(truth.read(pictures, coco_file, subset=99).truths) == 3


@pytest.mark.parametrize(
    ("place", "row"),
    [
        ("000000000001.png", {}),
        ("val2017/x.png", {"coco_url": "http://images.cocodataset.org/val2017/x.png"}),
        ("x.png", {"coco_url": "http://images.cocodataset.org/train2017/x.png"}),
        ("deep/er/x.png", {"file_name": "deep/er/x.png"}),
        ("x.png", {"file_name": "elsewhere/x.png"}),
    ],
)
def test_where_an_image_is_looked_for(pictures, coco_file, place, row):
    table = json.loads(coco_file.read_text())
    table["images"][0] = {"id": 1, "height": 48, "width": 64, **row}
    coco_file.write_text(json.dumps(table))
    (pictures / place).parent.mkdir(parents=True, exist_ok=True)
    (pictures / "a.png").rename(pictures / place)
    found = truth.read(pictures, coco_file).truths[0].image
    assert found.path == pictures / place and found.key == place and found.size == (48, 64)


def test_an_lvis_file_is_known_by_its_frequencies(pictures, coco_file):
    table = json.loads(coco_file.read_text())
    table["categories"] = [{"id": 1, "name": "thing", "frequency": "r"}, {"id": 2, "name": "other", "frequency": "f"}]
    table["images"][0] |= {"neg_category_ids": [2], "not_exhaustive_category_ids": [1]}
    coco_file.write_text(json.dumps(table))
    data = truth.read(pictures, coco_file, "lvis")
    assert data.kind == "lvis" and data.frequency == {1: "r", 2: "f"}
    assert (data.truths[0].negative, data.truths[0].not_exhaustive, data.truths[1].negative) == ([2], [1], [])
    with pytest.raises(DepthsegError, match="LVIS file, not a COCO"):
        truth.read(pictures, coco_file, "coco")


def without(table, *names):
    return {k: v for k, v in table.items() if k not in names}


def with_first(table, what, **changes):
    return {**table, what: [{**table[what][0], **changes}, *table[what][1:]]}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda table: "not json", ["not a COCO instances file"]),
        (lambda table: [1, 2], ["not a COCO instances file"]),
        (lambda table: without(table, "annotations"), ["not a COCO instances file"]),
        (lambda table: {**table, "images": {"a": 1}}, ["images is no list"]),
        (lambda table: {**table, "images": []}, ["lists no images"]),
        (lambda table: {**table, "images": table["images"] * 2}, ["image id 1 occurs 2 times"]),
        (lambda table: {**table, "annotations": table["annotations"] * 3}, ["annotation id 1 occurs 3 times"]),
        (lambda table: with_first(table, "annotations", segmentation=None), ["annotation 1"]),
        (lambda table: with_first(table, "annotations", category_id=7), ["annotation 1", "category 7"]),
        (lambda table: with_first(table, "annotations", bbox=[1, 2]), ["not a COCO instances file"]),
        (lambda table: with_first(table, "annotations", segmentation={"size": [3, 3], "counts": [9]}), ["annotation 1", "(48, 64)"]),
        (lambda table: with_first(table, "images", height="tall"), ["image 1"]),
        (lambda table: with_first(table, "annotations", bbox=[0, 0, float("nan"), 1]), ["annotation 1", "bbox"]),
        (lambda table: with_first(table, "annotations", iscrowd="0"), ["annotation 1", "iscrowd"]),
        (lambda table: with_first(table, "annotations", area=float("nan")), ["annotation 1", "area"]),
        (lambda table: with_first(table, "annotations", category_id=None), ["annotation 1", "category"]),
        (lambda table: with_first(table, "images", id=[1]), ["not a COCO instances file"]),
        (lambda table: with_first(table, "annotations", id="abc"), ["annotation id 'abc'"]),
        (lambda table: with_first(table, "images", id=1.5), ["image id '1.5'"]),
        (lambda table: with_first(table, "images", file_name="x/b.jpg"), ["two images are found in one file"]),
        (lambda table: {**table, "images": [{**table["images"][0], "file_name": "z.png", "id": 77}]}, ["z.png is not in"]),
    ],
)
def test_what_is_no_truth_is_refused(pictures, coco_file, spoil, words):
    changed = spoil(json.loads(coco_file.read_text()))
    coco_file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(DepthsegError) as error:
        truth.read(pictures, coco_file)
    assert all(word in error.value.message for word in words), error.value.message
    with pytest.raises(DepthsegError, match="cannot read"):
        truth.read(pictures, coco_file.with_name("nowhere.json"))


def test_what_is_odd_is_counted(pictures, coco_file):
    table = json.loads(coco_file.read_text())
    table["annotations"][0]["bbox"] = [-5, 0, 20, 20]
    table["annotations"] += [{**table["annotations"][0], "id": 70, "image_id": 99}]
    table["images"] = [row for row in table["images"] if row["id"] != 2]
    coco_file.write_text(json.dumps(table))
    data = truth.read(pictures, coco_file)
    assert data.warnings == [
        "2 annotations are about images that the file does not list",
        "1 boxes reach more than a pixel out of their image",
        "1 annotations have an area of less than one pixel and are not asked for",
        "1 bbox fields lie elsewhere than their masks, as in a.png",
    ]


def test_the_packs_are_read(shared):
    """The two kinds of file as their publishers wrote them."""
    for pack, file, kind, count in (("coco-mini", "instances_val", "coco", 815), ("lvis-mini", "lvis_val_mini", "lvis", 200)):
        folder = shared / "data" / pack
        if not folder.is_dir():
            pytest.skip(f"needs ../shared/data/{pack}")
        data = truth.read(folder / "images", folder / "annotations" / f"{file}.json")
        assert data.kind == kind and sum(map(len, data.truths)) == count and all(Path(t.image.path).is_file() for t in data.truths)
        assert all(PILImage.open(t.image.path).size == t.image.size[::-1] for t in data.truths)
        assert sorted(t.image.id for t in data.truths) == [t.image.id for t in data.truths]
        assert np.isfinite(np.concatenate([t.area for t in data.truths])).all()
