"""What runs on a card, on a machine that has none: tensors that say they lie on cuda:0, and are computed by the CPU.

An operation on tensors of both sides fails as it does there, so does numpy's, and autocast follows CUDA's rules. What it cannot show:
kernels and their rounding, streams, several cards, and the backward pass, which torch does not begin without a driver.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from test_train import _log, _plan
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

from depthseg import catalog, edges, masks
from depthseg.learner import Learner
from depthseg.models import checkpoint
from depthseg.plan import Plan
from depthseg.predictor import prepared
from depthseg.reference import in_things
from depthseg.schema import Boxes, Image
from depthseg.segment import Segmenter
from depthseg.stages import STAGES
from depthseg.train import train

CARD, CPU, aten = torch.device("cuda", 0), torch.device("cpu"), torch.ops.aten
SUMS = (aten.convolution.default, aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)


class OnCard(torch.Tensor):
    """Says that it lies on the card; `held` has its numbers."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held):
        how = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype, "device": CARD}
        out = torch.Tensor._make_wrapper_subclass(cls, held.shape, **how)
        out.held = held
        return out

    def tolist(self):
        return self.held.tolist()

    def new_tensor(self, values):
        return torch.tensor(values, dtype=self.dtype, device=CARD)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


class Card(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


def computed(func, args, kwargs):
    """What an operation gives: by the CPU, and on the card where the device that it names, or one of its tensors, is."""
    flat = tree_flatten((args, kwargs))[0]
    there = [t for t in flat if isinstance(t, OnCard)]
    named = next((d for d in flat if isinstance(d, torch.device)), None)
    if not there and (named is None or named.type == "cpu"):
        return func(*args, **kwargs)
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):  # so they come in inference mode
        with Card():
            return func.decompose(*args, **kwargs)
    moves = func in (aten.copy_.default, aten._to_copy.default)
    indexes = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and isinstance(args[0], OnCard)
    here = [t for t in flat if isinstance(t, torch.Tensor) and not isinstance(t, OnCard) and t.ndim]  # single numbers may lie anywhere
    if there and here and not (moves or indexes):
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")
    args, kwargs = tree_map_only(OnCard, lambda t: t.held, (args, kwargs))
    args, kwargs = tree_map_only(torch.device, lambda d: CPU, (args, kwargs))
    if func is aten._softmax.default and args[2]:  # from fp16 to fp32 at once, which the CPU cannot
        args = args[0].float(), args[1], False
    kind = next((t.dtype for t in there if t.is_floating_point()), None)
    if func in SUMS and kind in (torch.bfloat16, torch.float16):  # as a card adds up; CPUs may take a hundred times as long
        args = tree_map_only(torch.Tensor, lambda t: t.float() if t.is_floating_point() else t, args)
        out = tree_map_only(torch.Tensor, lambda t: t.to(kind), func(*args, **kwargs))
    else:
        out = func(*args, **kwargs)
    if (named is not None and named.type == "cpu") or (func is aten.copy_.default and not isinstance(flat[0], OnCard)):
        return out
    same = {id(t.held): t for t in there}  # of operations in place
    with torch.inference_mode(False):
        return tree_map_only(torch.Tensor, lambda t: same[id(t)] if id(t) in same else OnCard(t), out)


class Stream:
    """Writes down who waits for whom."""

    told: ClassVar[list[tuple]] = []

    def __init__(self, device=CARD):
        assert device == CARD

    def wait_stream(self, other):
        self.told.append((self, "waits", other))

    @contextmanager
    def taken(self):
        self.told.append((self, "begins"))
        yield
        self.told.append((self, "ends"))


MAIN = Stream()


@pytest.fixture
def card(monkeypatch) -> Iterator[None]:
    """A card that is there on paper: torch finds it, and its tensors can be made, saved and loaded."""
    torch._C._ensureCUDADeviceGuardSet()
    found = {
        "is_available": True,
        "device_count": 1,
        "is_bf16_supported": True,
        "get_device_properties": SimpleNamespace(major=8),
        "max_memory_allocated": 0,
    }
    for name, value in found.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    for name in ("_lazy_init", "synchronize", "set_device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    made, saved, loaded, serialised = torch.tensor, torch.save, torch.load, checkpoint.serialised
    monkeypatch.setattr(torch, "tensor", lambda values, device=None, **how: made(values, **how).to(device or CPU))
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self.clone())
    monkeypatch.setattr(torch, "save", lambda state, file: saved(_moved(state, CPU), file))
    monkeypatch.setattr(torch, "load", lambda file, map_location, **how: _moved(loaded(file, map_location="cpu", **how), map_location))
    monkeypatch.setattr(checkpoint, "serialised", lambda state, about: serialised(_moved(state, CPU), about))
    for name, value in {"Stream": Stream, "current_stream": lambda *_: MAIN, "stream": Stream.taken}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda t, stream: Stream.told.append(("keeps", stream)))
    Stream.told.clear()
    monkeypatch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False), Card():
        yield


def _moved(tree, device):
    return tree_map_only(torch.Tensor, lambda t: t.detach().to(device, copy=True), tree)


def test_the_paper_card_behaves_like_one(card):
    a = torch.arange(4.0, device="cuda")
    assert a.is_cuda and (a + 1)[1:].cpu().tolist() == [2, 3, 4]
    a[:2].mul_(2)
    assert a.tolist() == [0, 2, 2, 3]
    with pytest.raises(RuntimeError, match="same device"):
        a + torch.ones(4)
    with pytest.raises((RuntimeError, TypeError)):
        a.numpy()
    with torch.autocast("cuda", torch.bfloat16):
        assert torch.nn.Linear(4, 2).to("cuda")(a).dtype == torch.bfloat16 and a.softmax(0).dtype == torch.float32


def ramp(images):
    return [np.linspace(0, 1, 48 * 64, dtype=np.float32).reshape(48, 64) for _ in images]


def answers(model: str, device: str, precision: str = "fp32", **options) -> list[dict]:
    """Masks of two boxes on each of two pictures, by a network with random weights and a small input."""
    g = np.random.default_rng(0)
    images = [Image(str(k), k, None, (48, 64), g.integers(0, 256, (48, 64, 3), dtype=np.uint8)) for k in range(2)]
    boxes = Boxes(np.array([[8, 6, 50, 40], [30, 4, 60, 30]], np.float32), np.ones(2, np.float32), np.ones(2, np.int64))
    plan = Plan(model=model, device=device, precision=precision, **options)
    row = catalog.MODELS[model]
    torch.manual_seed(0)
    network = in_things(catalog.resolve(row)(**row.args).eval())
    network.side = network.zoom_side = 64
    network.specks = 0.0
    if network.alpha is not None:
        network.alpha.data.fill_(0.5)
        for encoder in ("image_encoder", "depth_encoder") if device == "cuda" else ():
            getattr(network, encoder).register_forward_pre_hook(lambda *_, name=encoder: Stream.told.append(name))
    segmenter = Segmenter(
        plan, network=prepared(network, plan, precision, torch.device(device)), source=lambda some: [boxes for _ in some],
        depth=ramp if network.alpha is not None else None,
    )  # fmt: skip
    return [rle for record in segmenter.segment(images) for rle in record.masks.rle]


CASES = [
    ("nano-depth", "fp32", {}),
    ("nano-depth", "bf16", {"refine": "mirror"}),
    pytest.param("nano-depth", "fp16", {}, marks=pytest.mark.slow),
    *(
        pytest.param(name, "bf16", {}, marks=pytest.mark.slow)
        for name in ("efficientvit-sam-l0-depth", "mobile-sam", "edge-sam", "efficient-sam-ti")
    ),
]


@pytest.mark.parametrize(("model", "precision", "options"), CASES)
def test_segmenting_on_a_card_answers_as_the_cpu(model, precision, options, card, monkeypatch):
    on_card, rles = [], edges.rles
    monkeypatch.setattr(edges, "rles", lambda low, frame: on_card.append(low.is_cuda) or rles(low, frame))
    expected, found = answers(model, "cpu", **options), answers(model, "cuda", precision, **options)
    assert len(expected) == len(found) == 4 and masks.area(expected).min() > 100
    assert np.diag(masks.iou(expected, found)).min() > (0.999 if precision == "fp32" else 0.9)
    if model.endswith("-depth"):
        side = Stream.told[0][0]
        wanted = [(side, "waits", MAIN), (side, "begins"), "depth_encoder", (side, "ends"), "image_encoder", (MAIN, "waits", side)]
        assert Stream.told[:8] == [*wanted, ("keeps", side), ("keeps", MAIN)]
    assert on_card == ([] if model == "efficient-sam-ti" else [True] * 2)  # it has a frame of its own


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "precision"), [("0", "fp16"), ("boxes", "bf16")])
def test_training_on_a_card_computes_the_losses_of_the_cpu(stage, precision, root, tmp_path, card, monkeypatch):
    """With a gradient of ones in the place of the backward pass: what is scaled, clipped, averaged, saved and loaded is the same."""
    learning, cached, begin = [], [], Learner.__init__

    def noted(self, *given):
        begin(self, *given)
        learning[:] = self.learns
        self.task.loss.register_forward_pre_hook(lambda *_: cached.append(torch.is_autocast_cache_enabled()))

    def ones(loss):
        assert loss.is_cuda and loss.requires_grad
        for p in learning:
            p.grad = torch.ones_like(p)

    plan = {"stage": stage, "steps": 1, "log_every": 1}
    train(_plan(root, tmp_path / "cpu", **plan))
    monkeypatch.setattr(Learner, "__init__", noted)
    monkeypatch.setattr(torch.Tensor, "backward", ones)
    train(_plan(root, tmp_path / "card", **plan, device="cuda", precision=precision), check=True)
    assert cached and not any(cached)
    (expected,), (found,) = _log(tmp_path / "cpu"), _log(tmp_path / "card")
    for name in STAGES[stage].weights:
        assert found[name] == pytest.approx(expected[name], rel=0.05), name
    state = torch.load(tmp_path / "card" / "last.pt", map_location="cpu", weights_only=True)
    assert not any(t.is_cuda for t in state["network"].values()) and bool(state["scaler"]) == (precision == "fp16")
