"""How a network computes: by torch, or compiled by torch's inductor or by OpenVINO. Other orders of the same sums.

`ready` is for inference alone: BatchNorm is folded away, so that what comes out can no longer be trained, saved or loaded into.
"""

import hashlib
import importlib.util
import os
import shutil
import warnings
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from depthseg import __version__, catalog
from depthseg.errors import MISSING_PIECE, DepthsegError
from depthseg.numerics import PRECISIONS
from depthseg.plan import BACKENDS

_HINTS = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}  # precisions as OpenVINO calls them
# OpenVINO lays a stack for signals with each model and takes them away in the order in which the models go, not the other way round:
# the next SIGTERM would meet one that is gone. So none goes before the process does.
_KEPT: list[Any] = []
_COMPILERS = ("g++", "clang++", "c++", "cl")
_C_COMPILERS = ("clang", "gcc")  # for what triton builds at its first use


def check(backend: str, device: torch.device) -> None:
    """Raise DepthsegError unless the backend can run on the device of this machine."""
    if backend not in BACKENDS:
        raise DepthsegError(f"no backend is called '{backend}'", f"Use {', '.join(BACKENDS)}.")
    if backend == "openvino":
        if device.type != "cpu":
            raise DepthsegError(f"OpenVINO computes on the CPU, not on {device}", "Use --device cpu, or --backend torch or compile.")
        if importlib.util.find_spec("openvino") is None:
            install = "Install the extra: pip install 'depthseg[openvino]'; or use --backend torch."
            raise DepthsegError("the backend openvino needs the package openvino", install, MISSING_PIECE)
    if backend == "compile":
        if device.type == "cpu" and not any(map(shutil.which, [os.environ.get("CXX") or "", *_COMPILERS])):
            raise DepthsegError(
                "the backend compile needs a C++ compiler", "Install g++ or clang++, or use --backend torch.", MISSING_PIECE
            )
        if device.type == "cuda" and importlib.util.find_spec("triton") is None:
            raise DepthsegError("the backend compile needs the package triton on CUDA", "Use --backend torch.", MISSING_PIECE)
        if device.type == "cuda" and os.name != "nt" and not any(map(shutil.which, [os.environ.get("CC") or "", *_C_COMPILERS])):
            raise DepthsegError("the backend compile needs a C compiler on CUDA", "Install gcc, or use --backend torch.", MISSING_PIECE)


def note(backend: str, precision: str, device: torch.device) -> str | None:
    """What a user should know about the choice on this machine: whether its CPU has no instructions for the precision."""
    native = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    if device.type != "cpu" or precision == "fp32" or (precision == "bf16" and native()):
        return None
    how = "OpenVINO computes in fp32 instead" if backend == "openvino" else "fp32 is faster"
    return f"precision: this CPU has no instructions for {precision}; {how}"


def ready(
    network: nn.Module,
    backend: str = "torch",
    precision: str = "fp32",
    device: torch.device | str = "cpu",
    size: tuple[int, int] = (96, 96),
) -> nn.Module:
    """The network, which takes one tensor (B, 3, H, W) and is in eval mode, made fast for inference; it is called as before.

    The network that is given is used up. Its kernels take the precision (a key of PRECISIONS); it is called inside
    `numerics.inference` with the same one. size: (H, W) that the network takes; what fits all where it takes any.
    Raises DepthsegError where the backend cannot run.
    """
    check(backend, torch.device(device))
    network = folded(network.requires_grad_(False)).to(device).to(memory_format=torch.channels_last)
    if backend == "openvino":
        return OpenVino(network, precision, size)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):  # autocast would do it again at each call; norms stay in fp32
            module.to(PRECISIONS[precision])
    if backend == "compile":
        cpu = torch.device(device).type == "cpu"
        return torch.compile(network, options={"freezing": True} if cpu else None)  # type: ignore[return-value]
    return network


def ready_for_any_number(answer: Callable[..., Any]) -> Callable[..., Any]:
    """SamHead.answer compiled for any number of prompts: (P, ...) flat, of whatever images.

    Compiled once for each number of points, size of the features and kind of answer. For cards alone, where it saves launches: on a CPU the
    cells that prompts of an image share are worth more, and it took 0.9 (nano) and 1.4 times (L0) as long.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)  # past it, torch would give up on all of them
    compiled = torch.compile(answer, dynamic=True)

    def call(
        cells: Tensor, counts: list[int], finer: tuple[Tensor, ...] | None, points: Tensor, labels: Tensor, ragged: bool, *rest: Any
    ) -> Any:
        few = len(points)
        owner = torch.repeat_interleave(torch.tensor(counts, device=cells.device), output_size=few)
        at = torch.arange(max(few, 2), device=cells.device).clamp(max=few - 1)  # a single one would be a case of its own, and asks twice
        each = None if finer is None else tuple(f[at] for f in finer)
        answers = compiled(cells[owner[at]], None, each, points[at], labels[at], True, *rest)
        return tuple(None if out is None else out[:few] for out in answers)

    return call


def folded(network: nn.Module) -> nn.Module:
    """The network with each BatchNorm that directly follows a convolution folded into it, in place: equal but for rounding."""
    for module in list(network.modules()):
        for (a, conv), (b, norm) in pairwise(list(module.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, a, fuse_conv_bn_eval(conv, norm))
                setattr(module, b, nn.Identity())
    return network


class OpenVino(nn.Module):
    """A network of one tensor, compiled for the CPU. Model and machine code stay in the user's cache, by weights and version.

    It is traced once, at `size`. It answers at other sizes too where the network does, and its code makes no plain numbers of sizes.
    """

    def __init__(self, network: nn.Module, precision: str, size: tuple[int, int]):
        super().__init__()
        import openvino

        example = torch.zeros(1, 3, *size)
        folder = catalog.cache() / "openvino" / _digest(network, size, openvino.__version__)
        try:
            if not (folder / "model.xml").is_file():
                _convert(network, example, folder)
            core = openvino.Core()
            _KEPT.append(core)
            self._run = core.compile_model(
                core.read_model(folder / "model.xml"),
                "CPU",
                {
                    "INFERENCE_PRECISION_HINT": _HINTS[precision],
                    "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                    "NUM_STREAMS": 1,
                    "CACHE_DIR": str(folder),
                },
            )
            _KEPT.append(self._run)
        except OSError as e:
            raise DepthsegError(f"OpenVINO's cache {folder} cannot be written ({e.strerror})", "Set DEPTHSEG_WEIGHTS to a folder.") from e
        with torch.inference_mode():
            self._many = isinstance(network(example), tuple | list)

    def forward(self, x: Tensor) -> Any:
        found = self._run(np.ascontiguousarray(x.numpy()))
        out = tuple(torch.from_numpy(found[k]) for k in range(len(found)))
        return out if self._many else out[0]


def _digest(network: nn.Module, size: tuple[int, int], version: str) -> str:
    """Names what an OpenVINO of this version makes of the network: of its layers, as they are printed, and weights."""
    out = hashlib.blake2b(f"{network} {size} {version} {__version__}".encode(), digest_size=12)
    for name, value in network.state_dict().items():
        out.update(f" {name} {tuple(value.shape)} ".encode())
        out.update(value.contiguous().flatten().numpy())
    return out.hexdigest()


def _convert(network: nn.Module, example: Tensor, folder: Path) -> None:
    """Write the network as OpenVINO's model.xml and model.bin into a new folder."""
    import openvino

    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: which branch is taken does not depend on the size
        model = openvino.convert_model(network, example_input=example)
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        openvino.save_model(model, part / "model.xml", compress_to_fp16=False)
        if not folder.exists():
            part.rename(folder)
    except OSError:
        if not (folder / "model.xml").is_file():  # else another process was faster
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
