"""Counts on the meta device against the published numbers and against a real forward pass."""

import pytest
import torch
from PIL import Image as PILImage
from torch.utils.flop_counter import FlopCounterMode

from depthseg import bench, catalog, cli
from depthseg.published import SIZES


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
        pytest.importorskip("ultralytics")
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
