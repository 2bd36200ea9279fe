"""Counts on the meta device against the published numbers and against a real forward pass; cases in turns with the official loop."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import needs_ultralytics
from PIL import Image as PILImage
from torch.utils.flop_counter import FlopCounterMode

from depthseg import bench, catalog, cli, masks, peers, reference
from depthseg.errors import DepthsegError
from depthseg.plan import Plan
from depthseg.published import SIZES
from depthseg.segment import Segmenter


@pytest.mark.parametrize("name", [name for name in SIZES if name.startswith("efficientvit")])
def test_the_papers_numbers(name):
    got, (said,) = bench.measure(name), SIZES[name]
    assert got["params"] / 1e6 == pytest.approx(said.millions, abs=0.11)  # 118.7 counts BatchNorm's buffers too: 118.6 without
    assert got["macs"] / 1e9 == pytest.approx(said.gmacs, abs=0.5)


def test_every_published_size_belongs_to_a_row():
    assert set(SIZES) <= set(catalog.MODELS)


def test_exact_counts_of_l2():
    assert bench.measure("efficientvit-sam-l2") == {"params": 61_328_592, "macs": 68_554_326_016}
    depth = bench.measure("efficientvit-sam-l2-depth")
    assert depth == {"params": 118_592_625, "macs": 2 * 68_554_326_016}


def test_the_meta_device_counts_what_a_real_pass_does():
    row = catalog.MODELS["nano"]
    network = catalog.resolve(row)(**row.args).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network.encode(torch.zeros(1, 3, row.input, row.input))
    assert bench.measure("nano")["macs"] == counter.get_total_flops() // 2


@pytest.mark.parametrize("name", catalog.MODELS)
def test_the_table_shows_what_is_counted(name):
    if "extra yolo" in catalog.MODELS[name].note:
        needs_ultralytics()
    got, row = bench.measure(name), catalog.MODELS[name]
    assert round(got["params"] / 1e6, 1) == row.millions and got["macs"] / 1e9 == pytest.approx(row.gmacs, abs=0.011)


def test_stages_are_timed_and_boxes_compared(pictures, capsys, monkeypatch):
    PILImage.new("RGB", (30, 20)).save(pictures / "0-blank.png")  # comes first and has no boxes
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as leaving:
        cli.main(
            ["bench", str(pictures), "--detector", "nano", "--rounds", "1", "--batch", "2", "--model", "nano-depth", "--device", "cpu"]
        )
    told = capsys.readouterr()
    assert leaving.value.code == 0, told.err
    rows = {line.split()[0]: line.split()[1:] for line in told.out.splitlines() if len(line.split()) == 3}
    assert {"detect", "depth", "all"} <= set(rows) and all(float(v) >= 0 for row in rows.values() for v in row)
    assert float(rows["all"][0]) == pytest.approx(sum(float(v[0]) for k, v in rows.items() if k != "all"), abs=1)
    assert "boxes of the detector differ by at most" in told.out


def test_photographs_are_the_same_in_every_run_and_boxes_lie_on_them(tmp_path):
    one, two = (bench.photographs((90, 120), 2, 7, folder) for folder in (tmp_path, tmp_path))
    assert [p.jpeg for p in one] == [p.jpeg for p in two] and one[0].jpeg != one[1].jpeg
    for photo in one:
        assert photo.image.path.read_bytes() == photo.jpeg and PILImage.open(photo.image.path).size == (120, 90)
        low, high = photo.boxes[:, :2], photo.boxes[:, 2:]
        assert len(photo.boxes) == 7 and (low >= 0).all() and (high <= (120, 90)).all() and (high > low).all()


@pytest.fixture
def network():
    return bench.network_for(Plan(model="nano"), False)[0]


def test_cases_take_turns_and_compare_masks(tmp_path, network):
    asked = []

    def loop(jpeg, boxes):
        asked.append(len(boxes))
        return reference.segment(network, jpeg, boxes)

    network.specks = 0.0
    ours = {"none": Segmenter(Plan(model="nano", zoom=False, device="cpu"), network=network, source=lambda images: [])}
    rows = bench.cases(ours, {"loop": loop}, [(60, 80)], [1, 3], tmp_path, images=2, rounds=2)
    assert asked == [1, *[1] * 4, *[3] * 4]
    for row, count in zip(rows, (1, 3), strict=True):
        assert (row["size"], row["boxes"], row["depth"]) == ("80x60", count, "none")
        assert set(row["stages"]) == {"read", "detect", "encode", "decode", "masks"}
        for clock in (0, 1):  # wall, process CPU
            assert sum(s[clock] for s in row["stages"].values()) <= row["seconds"][clock] * 1.5
            assert row["model"][clock] == pytest.approx(row["stages"]["encode"][clock] + row["stages"]["decode"][clock], abs=2e-6)
        assert row["operations"]["encode"] == 2 * bench.measure("nano")["macs"] and row["operations"]["decode"] > count * 1e7
        it = row["against"]["loop"]
        assert it["ratio"] == sorted(it["ratio"]) and it["miou"] > 0.999
    assert "encode" not in network.__dict__ and "decode" not in network.__dict__


def test_masks_that_differ_are_told(tmp_path, network):
    ours = {"none": Segmenter(Plan(model="nano", zoom=False, device="cpu"), network=network, source=lambda images: [])}
    nothing = lambda jpeg, boxes: [masks.encode(np.zeros((60, 80), bool)) for _ in boxes]  # noqa: E731
    (row,) = bench.cases(ours, {"nothing": nothing}, [(60, 80)], [2], tmp_path, images=1, rounds=1)
    assert row["against"]["nothing"]["miou"] == 0 and row["against"]["nothing"]["ratio"][1] < 1


def test_peaks_are_rates():
    found = bench.peaks(torch.device("cpu"), "fp32", repeats=1)
    assert set(found) == {"matrix product", "convolution"} and min(found.values()) > 1e8


def run(capsys, *words):
    with pytest.raises(SystemExit) as leaving:
        cli.main(["bench", *words])
    told = capsys.readouterr()
    return leaving.value.code, told.out, told.err


def test_without_pictures_cases_are_made_up(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    words = ("--size", "80x60", "--boxes-per-image", "2", "--rounds", "1", "--limit", "1", "--device", "cpu")
    code, out, err = run(capsys, *words, "--json", "--reference")
    told = json.loads(out)
    assert code == 0, err
    assert told["schema_version"] == 1 and told["weights"] == "trained" and told["macs"] == bench.measure("nano-depth")["macs"]
    assert [(c["depth"], c["boxes"]) for c in told["cases"]] == [("none", 2), ("nano", 2)]
    assert told["cases"][0]["against"]["official loop"]["miou"] > 0.999
    code, out, err = run(capsys, *words, "--depth", "none", "--model", "efficientvit-sam-l0", "--reference")
    assert code == 0 and "random" in out and "random" in err and "official loop" in out and "GFLOP/s" in out, err


def test_own_pictures_are_cut_to_the_sizes(capsys, pictures):
    code, out, err = run(capsys, str(pictures), "--size", "80x60,0.01mp", "--boxes-per-image", "1", "--rounds", "1", "--limit", "1",
                         "--model", "nano", "--json")  # fmt: skip
    assert code == 0 and [c["size"] for c in json.loads(out)["cases"]] == ["80x60", "115x87"], err


@pytest.mark.parametrize(
    "words, said",
    [
        (("--size", "640"), "no size"),
        (("--size", "0mp"), "no size"),
        (("--boxes-per-image", "1,x"), "no numbers"),
        (("--boxes-per-image", "0"), "no numbers"),
        (("--peer", "nobody"), "no peer"),
        (("--text", "a cat ."), "fixed rule"),
        (("--detector", "nano", "--reference", "x.jpg"), "fixed rule"),
    ],
)
def test_what_cannot_be_measured_is_refused(capsys, words, said):
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "") and said in err and "hint: " in err


def test_a_peer_without_its_package_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ultralytics", None)
    code, _, err = run(capsys, "--peer", "mobilesam")
    assert code == 5 and "pip install 'depthseg[yolo]'" in err


@pytest.mark.slow
@pytest.mark.parametrize("name", peers.PEERS)
def test_peers_answer_with_a_mask_for_each_box(name, tmp_path):
    if name == "mobilesam":
        needs_ultralytics()
    (photo,) = bench.photographs((96, 128), 1, 3, tmp_path)
    found = peers.PEERS[name](torch.device("cpu"))(photo.jpeg, photo.boxes)
    sides = photo.boxes[:, 2:] - photo.boxes[:, :2]
    assert len(found) == 3 and all(rle["size"] == [96, 128] for rle in found)
    np.testing.assert_allclose(masks.area(found), np.pi / 4 * sides.prod(1), rtol=0.6, atol=20)


def test_depth_anything_of_the_catalogs_size(tmp_path):
    estimator = bench.random_depth("depth-anything-v2-small", tmp_path / "d", torch.device("cpu"), "fp32")
    assert sum(p.numel() for p in estimator._network.parameters()) == pytest.approx(24.8e6, rel=0.01)
    with pytest.raises(DepthsegError):
        bench.random_depth("depth-anything-v2-large", tmp_path / "l", torch.device("cpu"), "fp32")


def test_what_a_card_computes_is_counted_in_wall_time():
    assert bench.counts_in("cuda:1") == 0 and bench.counts_in("cpu") == 1
    found = [[{"size": [1, 1], "counts": "01"}]]
    wall_apart = [np.array([2.0, 9.0])], [np.array([1.0, 9.0])], found, found
    assert bench._against(*wall_apart, 0)["ratio"] == [2.0, 2.0, 2.0]
    assert bench._against(*wall_apart, 1)["ratio"] == [1.0, 1.0, 1.0]
