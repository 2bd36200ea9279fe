"""Every backend computes what torch computes with the network as it was loaded."""

import copy
import importlib.util
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from depthseg import backends, catalog
from depthseg.errors import MISSING_PIECE, DepthsegError
from depthseg.models.boxes import BoxNet
from depthseg.models.depthnet import DepthNet
from depthseg.models.depthseg import DepthSeg
from depthseg.models.efficientvit import ImageEncoder
from depthseg.numerics import inference
from depthseg.plan import BACKENDS, Plan
from depthseg.schema import ABSENT
from depthseg.segment import Segmenter

CPU = torch.device("cpu")
openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs the extra openvino")


def random(network: nn.Module) -> nn.Module:
    """With norms that do something."""
    g = torch.Generator().manual_seed(0)
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.2, generator=g)
            m.running_var.uniform_(0.5, 2, generator=g)
    return network.eval()


def outputs(network, x, precision="fp32"):
    with inference(CPU, precision):
        found = network(x)
    return found if isinstance(found, tuple) else (found,)


def apart(ours, theirs) -> float:
    return max(float((a.float() - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))


NETWORKS = {
    "nano": lambda: ImageEncoder("nano"),
    "l0": lambda: ImageEncoder("l0"),
    "depth": DepthNet,
    "boxes": BoxNet,
}


@pytest.mark.parametrize("name", NETWORKS)
def test_folded_norms_change_rounding_alone(name):
    torch.manual_seed(0)
    plain, x = random(NETWORKS[name]()), torch.randn(2, 3, 64, 96)
    before = list(plain.state_dict())
    network = backends.ready(copy.deepcopy(plain))
    assert not any(isinstance(m, nn.BatchNorm2d) for m in network.modules()) and list(plain.state_dict()) == before
    assert 0 < apart(outputs(network, x), outputs(plain, x)) < 3e-6


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_stays_close(precision):
    torch.manual_seed(0)
    plain, x = random(ImageEncoder("nano")), torch.randn(1, 3, 64, 64)
    network = backends.ready(copy.deepcopy(plain), precision=precision)
    assert apart(outputs(network, x, precision), outputs(plain, x)) < (0.03 if precision == "bf16" else 0.005)
    assert network.norm.weight.dtype == torch.float32


def test_a_segmenter_folds_its_own_copy():
    fresh = catalog.load("nano-depth")
    segmenter = Segmenter(Plan(detector="grid", device="cpu"))
    kinds = [[type(m) for m in network.modules()].count(nn.BatchNorm2d) for network in (fresh, segmenter.network)]
    assert kinds[0] > 50 and kinds[1] == 0
    x, d = torch.randn(2, 1, 3, 160, 160)
    with torch.inference_mode():
        assert apart(segmenter.network.encode(x, d), fresh.encode(x, d)) < 3e-6


@openvino
@pytest.mark.parametrize("name", ["nano", *(pytest.param(name, marks=pytest.mark.slow) for name in ("depth", "boxes"))])
def test_openvino_answers_as_torch_at_any_size_and_from_its_cache(name, weights_cache, monkeypatch):
    torch.manual_seed(0)
    plain = random(NETWORKS[name]())
    network = backends.ready(copy.deepcopy(plain), "openvino")
    (folder,) = (weights_cache / "openvino").iterdir()
    monkeypatch.setattr("openvino.convert_model", None)
    again = backends.ready(copy.deepcopy(plain), "openvino")
    for shape in ((1, 3, 96, 96), (3, 3, 64, 160), (1, 3, 256, 256)):
        x = torch.randn(*shape)
        expected = outputs(plain, x)
        for one in (network, again):
            assert apart(outputs(one, x), expected) < 1e-5
            assert isinstance(one(x), tuple) is isinstance(plain(x), tuple)
        alone = [torch.cat(parts) for parts in zip(*(outputs(again, x[i : i + 1]) for i in range(len(x))), strict=True)]
        assert apart(outputs(again, x), alone) < 1e-5
    assert [p.name for p in (weights_cache / "openvino").iterdir()] == [folder.name]
    plain.load_state_dict({k: v + 1 if v.is_floating_point() else v for k, v in plain.state_dict().items()})
    with pytest.raises(TypeError):  # other weights are another model
        backends.ready(plain, "openvino")


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")
def test_compile_answers_as_torch():
    torch.manual_seed(0)
    plain = random(ImageEncoder("nano"))
    network = backends.ready(copy.deepcopy(plain), "compile")
    for shape in ((1, 3, 96, 96), (3, 3, 96, 96)):
        x = torch.randn(*shape)
        assert apart(outputs(network, x), outputs(plain, x)) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")
@pytest.mark.parametrize("model", ["nano", "l0"])
def test_a_compiled_head_answers_any_number_of_prompts(model):
    torch.manual_seed(0)
    plain = random(DepthSeg(model, depth=False)).requires_grad_(False)
    network = copy.deepcopy(plain)
    torch._dynamo.reset()
    counters["stats"].clear()
    network.answer = backends.ready_for_any_number(network.answer)
    with inference(CPU, "fp32"):
        features = plain.encode(torch.randn(2, 3, 128, 128))
        for n, owner in enumerate(([0, 0, 0, 0, 1], [0, 1], [1], [1, 1, 1], [0, 0, 0, 1, 1, 1, 1])):
            labels = torch.tensor([[1, 0, ABSENT if n % 2 else 0]]).repeat(len(owner), 1)
            asked = torch.tensor(owner), 1024 * torch.rand(len(owner), 3, 2), labels, None, True, True
            found, expected = network.decode(features, *asked), plain.decode(features, *asked)
            assert [f.shape for f in found] == [e.shape for e in expected] and apart(found, expected) < 1e-5
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("backend", "device", "lacks", "code", "word"),
    [
        ("tensorrt", "cpu", "", 2, "tensorrt"),
        ("openvino", "cuda", "", 2, "cuda"),
        ("openvino", "cpu", "openvino", MISSING_PIECE, r"package openvino"),
        ("compile", "cpu", "g++", MISSING_PIECE, r"C\+\+ compiler"),
        ("compile", "cuda", "triton", MISSING_PIECE, "triton"),
    ],
)
def test_a_backend_that_cannot_run_here_says_so(backend, device, lacks, code, word, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == lacks else found(name))
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(DepthsegError, match=word) as error:
        backends.check(backend, torch.device(device))
    assert error.value.code == code and error.value.hint
    if device == "cpu":
        with pytest.raises(DepthsegError, match=word):
            Segmenter(Plan(backend=backend, detector="grid", device="cpu"))
    backends.check("torch", torch.device(device))


def test_a_backend_is_part_of_what_decides_the_masks():
    assert len({Plan(backend=b).digest() for b in BACKENDS}) == len(BACKENDS)
    assert BACKENDS[0] == Plan().backend


def test_a_cpu_that_lacks_a_precision_is_named(monkeypatch):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False, raising=False)
    assert "fp32 is faster" in str(backends.note("torch", "bf16", CPU)) and "fp32 instead" in str(backends.note("openvino", "bf16", CPU))
    assert backends.note("torch", "fp32", CPU) is backends.note("torch", "bf16", torch.device("cuda")) is None
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True, raising=False)
    assert backends.note("torch", "bf16", CPU) is None


@openvino
def test_a_signal_finds_its_stack_when_compiled_networks_are_gone(tmp_path):
    """In a process of its own, for what is tested is that it lives."""
    code = (
        "import gc, os, signal, faulthandler; faulthandler.enable()\n"
        "from depthseg import backends, catalog\n"
        "a, b = (backends.ready(catalog.load('nano').image_encoder, 'openvino') for _ in range(2))\n"
        "del a; gc.collect(); del b; gc.collect()\n"
        "signal.signal(signal.SIGTERM, lambda number, frame: print('heard'))\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr[-500:]
