"""Pictures of answers: names that never collide, files that are whole, and overlays in which the instances can be seen."""

import numpy as np
import pytest
from PIL import Image as PILImage

from depthseg import formats, masks
from depthseg.schema import Masks


def answer(*regions: np.ndarray, name: str = "person") -> Masks:
    rle = [masks.encode(r) for r in regions]
    n = len(rle)
    score = np.linspace(0.93, 0.5, n, dtype=np.float32)
    return Masks(
        rle,
        masks.boxes(rle),
        np.array([r.sum() for r in regions], np.int64),
        score,
        score,
        score,
        np.ones(n, np.int64),
        {1: name},
    )


def block(size, top, left, bottom, right):
    mask = np.zeros(size, bool)
    mask[top:bottom, left:right] = True
    return mask


def test_atomic_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "deep/a.txt"
    with formats.atomic(path) as part:
        part.write_text("old")
    with pytest.raises(KeyboardInterrupt), formats.atomic(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_atomic_with_the_longest_name(tmp_path):
    path = tmp_path / ("x" * 255)
    with formats.atomic(path) as part:
        part.write_text("fits")
    assert path.read_text() == "fits"


def test_overlay_names_are_jpegs_and_never_collide():
    assert formats.overlay_name("sub/a.jpg") == "sub/a.jpg"
    assert formats.overlay_name("sub/a.png") == "sub/a.png.jpg"
    assert formats.overlay_name("v1.2/a.b.JPEG") == "v1.2/a.b.JPEG"
    keys = [stem + end for stem in ("a", "a.png", "a.png.jpg", "a.jpg") for end in (".jpg", ".jpeg", ".png", ".JPG", ".tif")]
    assert len({formats.overlay_name(k) for k in keys}) == len(keys)


def test_colours_are_fixed_by_their_index_and_differ():
    colours = formats.palette(30)
    np.testing.assert_array_equal(formats.palette(7), colours[:7])
    assert formats.palette(0).shape == (0, 3)
    distance = np.abs(colours[:, None].astype(int) - colours[None]).sum(-1) + 999 * np.eye(30, dtype=int)
    assert distance.min() > 8 and distance[:8, :8].min() > 60
    assert colours.max(1).min() > 150, "no colour is too dark for the dark text on it"


SIZES = [
    ((48, 64), (512, 384)),
    ((600, 400), (400, 600)),
    ((1000, 3200), (1600, 500)),
    ((1, 1), (512, 512)),
    ((2, 900), (900, 2)),
]


@pytest.mark.parametrize(("size", "expected"), SIZES)
def test_overlays_have_a_working_resolution(size, expected):
    h, w = size
    mask = block(size, 0, 0, max(1, h // 2), max(1, w // 2))
    pixels = np.full((h, w, 3), 90, np.uint8)
    assert formats.overlay(pixels, answer(mask)).size == expected
    assert formats.overlay(pixels, answer()).size == expected
    gap = max(2, max(expected) // 200)
    assert formats.overlay(pixels, answer(mask), np.zeros((5, 7))).size == (2 * expected[0] + gap, expected[1])


@pytest.mark.parametrize("scale", [0.1, 1, 4])
def test_tint_and_outline_lie_where_the_mask_is(scale):
    h, w = round(500 * scale), round(600 * scale)
    mask = block((h, w), h * 2 // 5, w // 3, h * 4 // 5, w * 2 // 3)
    grey = np.full((h, w, 3), 100, np.uint8)
    picture = formats.overlay(grey, answer(mask))
    plain = formats.overlay(grey, answer())
    change = np.abs(np.asarray(picture, int) - np.asarray(plain, int)).sum(-1)
    H, W = change.shape
    assert (change[: H // 5] == 0).all() and (change[-H // 6 :] == 0).all() and (change[:, : W // 4] == 0).all()
    inside = np.asarray(picture)[H * 3 // 5, W // 2].astype(float)
    np.testing.assert_allclose(inside, 0.55 * 100 + 0.45 * formats.palette(1)[0], atol=1.5)
    row = np.asarray(picture, float)[H * 3 // 5].sum(-1)
    edge = W // 3
    assert row[edge : edge + 4].max() > inside.sum() + 60, "a bright line inside of the edge"
    assert row[edge - 4 : edge].min() < 290, "a dark one outside of it"


def test_the_picture_given_is_not_painted_on():
    pixels = np.full((600, 600, 3), 100, np.uint8)
    pixels.flags.writeable = False
    formats.overlay(pixels, answer(block((600, 600), 100, 100, 500, 500)))
    assert (pixels == 100).all()


def test_small_instances_lie_over_large_ones():
    size = (600, 600)
    both = answer(block(size, 250, 250, 350, 350), block(size, 50, 50, 550, 550))
    grey = np.full((*size, 3), 100, np.uint8)
    under = 0.55 * 100 + 0.45 * formats.palette(2)[1]
    np.testing.assert_allclose(np.asarray(formats.overlay(grey, both))[320, 300], 0.55 * under + 0.45 * formats.palette(2)[0], atol=2)


def test_tags_stay_inside_and_apart(monkeypatch):
    size, plates = (600, 600), []
    monkeypatch.setattr(PILImage.Image, "paste", lambda self, im, box, mask=None: plates.append((*box, *mask.size)))
    corners = [(0, 0), (0, 560), (560, 0), (560, 560), (0, 540), (280, 280), (285, 285), (290, 290)]
    formats.overlay(np.zeros((*size, 3), np.uint8), answer(*[block(size, y, x, y + 40, x + 40) for y, x in corners]))
    assert len(plates) == len(corners)
    for x, y, w, h in plates:
        assert x >= 0 and y >= 0 and x + w <= 600 and y + h <= 600
    for i, (x, y, w, h) in enumerate(plates):
        for x2, y2, w2, h2 in plates[:i]:
            assert x >= x2 + w2 or x2 >= x + w or y >= y2 + h2 or y2 >= y + h
    plates.clear()
    formats.overlay(np.zeros((*size, 3), np.uint8), answer(*[block(size, 5 * i, 3 * i, 5 * i + 20, 3 * i + 20) for i in range(60)]))
    assert len(plates) == formats._MAX_TAGS


def test_empty_masks_and_odd_names_are_drawn():
    size = (40, 40)
    masks = answer(np.zeros(size, bool), block(size, 0, 0, 1, 1), name="犬 é\n" * 30)
    assert np.asarray(formats.overlay(np.zeros((*size, 3), np.uint8), masks)).any(), "nothing was drawn on the black picture"


def test_near_is_bright():
    depth = np.tile(np.linspace(0, 1, 50, dtype=np.float32), (20, 1))
    picture = np.asarray(formats.overlay(np.zeros((240, 600, 3), np.uint8), answer(), depth), float)
    light = picture[10, -600:] @ [0.2126, 0.7152, 0.0722]
    assert light[0] < 15 and light[-1] > 235 and (np.diff(light[::20]) > 0).all()
    depth[0, 0] = np.nan
    formats.overlay(np.zeros((240, 600, 3), np.uint8), answer(), depth)


@pytest.mark.parametrize("count", [0, 2, 255, 300])
def test_label_maps_read_back(tmp_path, count):
    size = (20, 30)
    found = answer(*[block(size, i // 30, i % 30, i // 30 + 1, i % 30 + 1) for i in range(count)])
    formats.write_label_map(tmp_path / "sub/a.jpg.png", found, size)
    with PILImage.open(tmp_path / "sub/a.jpg.png") as picture:
        assert picture.mode == ("P" if count <= 255 else "I;16")
        np.testing.assert_array_equal(np.asarray(picture), masks.label_map(found.rle, size))
        assert picture.size == (30, 20)
        if count == 2:
            assert picture.getpalette()[:9] == [0, 0, 0, *formats.palette(2).ravel().tolist()]


def test_instances_are_one_bit_with_safe_names(tmp_path):
    size = (9, 7)
    found = answer(block(size, 1, 1, 3, 3), block(size, 4, 4, 9, 7), name="../dining table")
    formats.write_instances(tmp_path / "a.jpg", found)
    names = ["000_dining_table_0.93.png", "001_dining_table_0.50.png"]
    assert sorted(p.name for p in (tmp_path / "a.jpg").iterdir()) == names
    for name, rle in zip(names, found.rle, strict=True):
        with PILImage.open(tmp_path / "a.jpg" / name) as picture:
            assert picture.mode == "1"
            np.testing.assert_array_equal(np.asarray(picture), masks.decode(rle))
    formats.write_instances(tmp_path / "a.jpg", found.keep(np.array([1])))
    assert [p.name for p in (tmp_path / "a.jpg").iterdir()] == ["000_dining_table_0.50.png"]


def test_write_overlay_is_a_jpeg(tmp_path):
    formats.write_overlay(tmp_path / "a.JPEG", np.zeros((30, 40, 3), np.uint8), answer(block((30, 40), 5, 5, 20, 20)))
    with PILImage.open(tmp_path / "a.JPEG") as picture:
        assert picture.format == "JPEG" and picture.size == (512, 384)
