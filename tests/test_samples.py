"""Training data: SA-1B's layout in folders and tars, COCO files, views and their prompts."""

import csv
import gzip
import json
import tarfile

import numpy as np
import pytest
from conftest import write_sample
from PIL import Image as PILImage
from scipy import ndimage

from depthseg import masks, sa1b
from depthseg.augment import Asked, view
from depthseg.errors import DepthsegError
from depthseg.schema import ABSENT, CORNER_MAX, CORNER_MIN, NEGATIVE, PADDING, POSITIVE
from depthseg.tasks.batches import Order
from depthseg.tasks.depth import DepthSource


@pytest.mark.parametrize("zipped", [False, True])
def test_tar_and_folder_hold_the_same_samples(root, tmp_path, zipped: bool) -> None:
    path = tmp_path / "sa_000000.tar"
    with tarfile.open(path, "w") as tar:
        for f in sorted((root / "sa_000000").glob("sa_?.*")):
            tar.add(f, f"./{f.name}")
    if zipped:  # as the example archive is published
        path.write_bytes(gzip.compress(path.read_bytes()))
    a, b = sa1b.index([root]), sa1b.index([path])
    assert len(a) == len(b) == 4
    for x, y in zip(map(sa1b.load, a), map(sa1b.load, b), strict=True):
        assert np.array_equal(x.pixels, y.pixels) and x.rles == y.rles
    assert sa1b.index([tmp_path]) == b  # found again below a folder, the unpacked copy not counted twice


def test_manifest_names_the_source(root) -> None:
    with (root.parent / "manifest.csv").open("w", newline="") as f:
        csv.writer(f).writerows([["file", "source_repo"], ["train/sa_000000/sa_2.jpg", "somewhere"]])
    assert [e.source for e in sa1b.index([root])] == ["", "", "somewhere", ""]


def test_a_coco_file_is_a_data_set(root, tmp_path) -> None:
    (tmp_path / "photos").mkdir()
    sample = sa1b.load(sa1b.index([root])[0])
    PILImage.fromarray(sample.pixels).save(tmp_path / "photos" / "a.png")
    polygon = [[10, 10, 50, 10, 50, 40, 10, 40]]
    found = [{"image_id": 3, "segmentation": s, "iscrowd": i} for i, s in enumerate([polygon, sample.rles[0]])]
    content = {"images": [{"id": 3, "file_name": "photos/a.png"}, {"id": 4, "file_name": "empty.png"}], "annotations": found}
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(content))
    (entry,) = sa1b.index([path])  # a picture without objects is none
    assert (entry.key, entry.source) == ("photos/a.png", "instances.json")
    again = sa1b.load(entry)
    assert np.array_equal(again.pixels, sample.pixels)
    assert masks.boxes(again.rles).tolist() == [[10, 10, 50, 40]]  # without the crowd
    path.write_text("[]")
    with pytest.raises(DepthsegError, match="not a COCO instances file"):
        sa1b.index([path])


def test_a_coco_file_of_other_sizes_is_named(root, tmp_path) -> None:
    PILImage.new("RGB", (10, 10)).save(tmp_path / "a.png")
    rle = sa1b.load(sa1b.index([root])[0]).rles[0]
    rows = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "segmentation": rle}]}
    (tmp_path / "x.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"a\.png: a mask of"):
        sa1b.load(sa1b.index([tmp_path / "x.json"])[0])


def test_polygons_lie_on_the_picture_that_inference_sees(tmp_path) -> None:
    """Upright by its EXIF orientation; and polygons of a picture of another size are refused, for they have no size of their own."""
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[5:15, 5:20] = 255
    picture = PILImage.fromarray(pixels)
    turned = picture.getexif()
    turned[0x0112] = 3  # stands on its head
    picture.save(tmp_path / "a.png", exif=turned)
    picture.resize((30, 20)).save(tmp_path / "b.png")
    images = [{"id": i, "file_name": f"{name}.png", "width": 60, "height": 40} for i, name in enumerate("ab")]
    rows = [{"image_id": i, "segmentation": [[40, 25, 55, 25, 55, 35, 40, 35]]} for i in range(2)]
    (tmp_path / "x.json").write_text(json.dumps({"images": images, "annotations": rows}))
    a, b = sa1b.index([tmp_path / "x.json"])
    sample = sa1b.load(a)
    assert (sample.pixels[masks.decode(sample.rles[0])] == 255).all()
    with pytest.raises(ValueError, match=r"b\.png: it has 30 x 20 pixels, its annotations say 60 x 40"):
        sa1b.load(b)


def test_a_sample_without_a_pixel_of_a_mask_shows_nothing() -> None:
    nothing = sa1b.Sample("a", np.zeros((64, 64, 3), np.uint8), [masks.encode(np.zeros((64, 64), bool))])
    assert view(nothing, None, None, 160, 2, 2, 0.5, Asked(0.5, 0.5, 0.5), np.random.default_rng(0)) is None


def test_depth_of_another_size_is_named(tmp_path) -> None:
    PILImage.new("RGB", (64, 48)).save(tmp_path / "a.png")
    PILImage.fromarray(np.full((24, 32), 900, np.uint16)).save(tmp_path / "d.png")
    source = DepthSource([sa1b.DepthPair(tmp_path / "a.png", tmp_path / "d.png", "metric", "s")])
    with pytest.raises(ValueError, match=r"a\.png: 64 x 48 pixels, but its depth map"):
        source.sample(0, np.random.default_rng(0), None)


def test_bad_roots(tmp_path) -> None:
    with pytest.raises(DepthsegError, match="no such data folder"):
        sa1b.index([tmp_path / "none"])
    with pytest.raises(DepthsegError, match="no sample") as e:
        sa1b.index([tmp_path])
    assert e.value.code == 4


def test_mask_of_another_size_is_named(root, tmp_path) -> None:
    write_sample(tmp_path, 7)
    PILImage.new("RGB", (10, 10)).save(tmp_path / "sa_7.jpg")
    with pytest.raises(ValueError, match="masks of another size"):
        sa1b.load(sa1b.index([tmp_path])[0])


def test_views_keep_prompt_and_mask_together(root) -> None:
    samples = [sa1b.load(e) for e in sa1b.index([root])]
    depth = np.linspace(0, 1, 96 * 128, dtype=np.float32).reshape(96, 128)
    rng = np.random.default_rng(0)
    seen = set()
    for i in range(60):
        v = view(samples[i % 4], depth, (samples[(i + 1) % 4], depth) if i % 2 else None, 96, 2, 3, 0.2, Asked(0.5, 0.5, 0.5), rng)
        if v is None:
            continue
        assert v.rgb.shape == v.depth.shape == (3, 96, 96) and v.target.shape[1:] == (48, 48)
        for t, box, xy, labels in zip(v.target, v.boxes, v.points, v.labels, strict=True):
            if CORNER_MIN in labels:
                assert labels[:2].tolist() == [CORNER_MIN, CORNER_MAX] and (labels[2:] == ABSENT).all()
                assert np.abs(xy[:2].ravel() / 1024 - box).max() < 0.3
                seen.add("box")
            else:
                clicks = [(p, s) for p, s in zip(xy, labels, strict=True) if s in (POSITIVE, NEGATIVE)]
                assert labels[len(clicks)] == PADDING and labels[0] == POSITIVE
                for p, s in clicks:
                    x, y = (p / 1024 * 48).astype(int).clip(0, 47)
                    assert t[y, x] > 0 if s == POSITIVE else t[y, x] < 1
                    seen.add(int(s))
    assert seen == {"box", POSITIVE, NEGATIVE}


def test_shares_decide_which_prompts_are_drawn(root) -> None:
    sample, rng = sa1b.load(sa1b.index([root])[0]), np.random.default_rng(0)

    def drawn(*shares: float) -> list[tuple[int, bool]]:
        """Of each mask how many clicks it got, 0 for a box, and whether none of its cells lies deeper than the first of them."""
        found = []
        for v in (view(sample, None, None, 96, 1, 3, 1.0, Asked(*shares), rng) for _ in range(20)):
            for t, xy, labels in zip(v.target, v.points, v.labels, strict=True):
                depth = ndimage.distance_transform_edt(np.pad(t > 0.5, 1))[1:-1, 1:-1]
                x, y = (xy[0] / 1024 * 96).astype(int).clip(0, 95)
                found.append((int(np.isin(labels, (POSITIVE, NEGATIVE)).sum()), bool(depth[y, x] == depth.max())))
        return found

    assert {n for n, _ in drawn(1, 0, 0)} == {0}
    assert set(drawn(0, 1, 1)) == {(1, True)}
    assert min(n for n, _ in drawn(0, 0, 1)) == 2
    assert not all(deepest for _, deepest in drawn(0, 1, 0))


def test_an_epoch_shows_each_sample_once() -> None:
    order = Order(5, seed=3)
    rng = np.random.default_rng(0)
    first, second = ([order.at(n, rng) for n in range(k, k + 5)] for k in (0, 5))
    assert sorted(first) == sorted(second) == [0, 1, 2, 3, 4] and first != second
    assert [Order(5, seed=3).at(n, rng) for n in range(5)] == first
    drawn = Order(3, 0, np.array([0.0, 1.0, 3.0]))
    counts = np.bincount([drawn.at(n, rng) for n in range(4000)], minlength=3)
    assert counts[0] == 0 and 2.6 < counts[2] / counts[1] < 3.4
