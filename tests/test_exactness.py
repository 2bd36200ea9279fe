"""A choice is compared with the plain network, and a difference is seen."""

import numpy as np
import pytest
import torch

from depthseg import backends
from depthseg.data import find, read
from depthseg.exactness import exactness
from depthseg.plan import Plan
from depthseg.schema import Prompts


def compared(pictures, count=2):
    images = [read(image) for image in find([pictures])][:count]
    asked = [Prompts.of(boxes=np.array([[w / 4, h / 4, 3 * w / 4, h / 2], [0, 0, w / 2, h]])) for h, w in (i.size for i in images)]
    return exactness(Plan(detector="grid", depth="nano", device="cpu", zoom=False), images, asked)


def test_the_folded_network_in_fp32_gives_the_same_masks(pictures):
    found = compared(pictures)
    assert 0 < found.features < 1e-5 and len(found.iou) == 4 and found.iou.mean() >= 0.999 and min(found.seconds) > 0


def test_another_network_is_noticed(pictures, monkeypatch):
    def worse(network, *how):
        torch.manual_seed(0)
        for p in network.parameters():
            p.data *= 1 + 0.3 * torch.randn(p.shape)
        return network

    monkeypatch.setattr(backends, "ready", worse)
    found = compared(pictures, count=1)
    assert found.features > 0.05 and found.iou.mean() < 0.999


@pytest.mark.slow
def test_openvino_gives_the_same_masks(pictures):
    pytest.importorskip("openvino")
    images = [read(image) for image in find([pictures])][:1]
    plan = Plan(detector="grid", depth="nano", device="cpu", zoom=False, backend="openvino")
    assert exactness(plan, images, [Prompts.of(boxes=np.array([[10, 10, 40, 30]]))]).iou.mean() >= 0.999
