"""Counts on the meta device against the published numbers and against a real forward pass."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from depthseg import bench, catalog


@pytest.mark.parametrize("name", bench.PAPER)
def test_the_papers_numbers(name):
    got = bench.measure(name)
    params, macs = bench.PAPER[name]
    assert got["params"] / 1e6 == pytest.approx(params, abs=0.11)  # 118.7 counts BatchNorm's buffers too: 118.6 without
    assert got["macs"] / 1e9 == pytest.approx(macs, abs=0.5)


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
    got, row = bench.measure(name), catalog.MODELS[name]
    assert round(got["params"] / 1e6, 1) == row.millions and got["macs"] / 1e9 == pytest.approx(row.gmacs, abs=0.011)
