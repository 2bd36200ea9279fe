"""Weights in and out of networks: safetensors, torch files and detectron2's pickles, loaded strictly or refused with a readable
difference. No file is ever allowed to run code.
"""

import io
import pickle
import re
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialised
from torch import Tensor, nn

from depthseg.errors import MISSING_PIECE, DepthsegError
from depthseg.formats import atomic


class _Dtype:
    """Stands for numpy.dtype in a pickle: plain numbers only, since an array of objects would be made of the file's own pointers."""

    def __init__(self, code: str, *_: Any):
        if not re.fullmatch(r"[<>=|]?[biuf]\d{1,2}", code):
            raise pickle.UnpicklingError(f"it holds an array of kind {code!r}")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """Stands for numpy.ndarray: its pixels are copied from the file's bytes, which must be as many as it says."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, fortran, data = state
        data = data.encode("latin1") if isinstance(data, str) else data
        self.value = np.frombuffer(data, kind.dtype).reshape(shape, order="F" if fortran else "C").astype(kind.dtype.newbyteorder("="))


_STANDINS = {
    ("numpy.core.multiarray", "_reconstruct"): lambda kind, shape, code: _Array(),  # before NumPy 2
    ("numpy._core.multiarray", "_reconstruct"): lambda kind, shape, code: _Array(),
    ("numpy", "ndarray"): "the first argument above",  # cannot be called
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): lambda text, how: text.encode("latin1"),  # how Python 3 pickles bytes for Python 2
    ("collections", "OrderedDict"): dict,
}


class _Arrays(pickle._Unpickler):
    """Admits arrays of numbers in plain containers and nothing else. Nothing that the file names is ever looked up.

    Python's own unpickler: the faster one would make a table of as many entries as a single number in the file says; as this one
    would make an empty bytearray, which no weights contain.
    """

    dispatch = {code: load for code, load in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}  # noqa: RUF012

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _STANDINS:
            raise pickle.UnpicklingError(f"it wants to call {module}.{name}")
        return _STANDINS[module, name]


def _pickled(file: IO[bytes]) -> dict[str, Tensor]:
    """The arrays of a detectron2 file: {"model": {name: array}, "__author__": ...}."""
    content = _Arrays(file, encoding="latin1").load()
    table = content["model"] if isinstance(content, dict) and isinstance(content.get("model"), dict) else content
    return {k: torch.from_numpy(v.value) if isinstance(v, _Array) else v for k, v in table.items()}


def _from_file(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".pkl":
        with path.open("rb") as file:
            return _pickled(file)
    if path.suffix == ".zip":  # as EfficientSAM-S is published
        with zipfile.ZipFile(path) as archive:
            (part,) = [p for p in archive.infolist() if p.filename.endswith(".pt") and not p.filename.startswith("__MACOSX")]
            if part.file_size > 4 * path.stat().st_size:  # weights hardly become smaller
                raise ValueError("it would unpack to many times its own size")
            return _torch(io.BytesIO(archive.read(part)), part.file_size)
    with path.open("rb") as file:
        return _torch(file, path.stat().st_size)


def _torch(file: IO[bytes], size: int) -> Any:
    """What torch wrote into a file of so many bytes."""
    if zipfile.is_zipfile(file):  # torch stores its tensors as they are: what unpacks to more is a bomb
        with zipfile.ZipFile(file) as archive:
            if sum(part.file_size for part in archive.infolist()) > size:
                raise ValueError("it would unpack to more than its own size")
    file.seek(0)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:  # torch's own words tell how to run the code that is in the file
        raise ValueError("it holds something else than tensors") from e


def read(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name: safetensors, a torch file (flat, or under `state_dict` or `model`; also zipped), or a .pkl.

    Never executes code from the file. Raises DepthsegError when there is no such file or it is no checkpoint.
    """
    if not path.is_file():
        raise DepthsegError(f"no such weights file: {path}", "Check the path.", MISSING_PIECE)
    try:
        state = _from_file(path)
    except Exception as e:  # on foreign bytes the readers raise anything from struct.error to IndexError: all mean the same
        reason = str(e).strip().splitlines()[0][:120] if str(e).strip() else type(e).__name__
        raise DepthsegError(f"{path} is not a readable checkpoint ({reason})", "The file may be cut off: fetch it again.") from e
    for wrapping in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapping), dict):
            state = state[wrapping]
    if not isinstance(state, dict) or not all(isinstance(k, str) and _plain(v) for k, v in state.items()):
        raise DepthsegError(f"{path} holds no plain table of weights", "Expected an EfficientViT-SAM or depthseg checkpoint.")
    return state


def _plain(value: object) -> bool:
    """A tensor that can be looked at and copied: not sparse, quantised, complex, without storage, or a few bytes shown many times."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not (value.is_quantized or value.is_complex())
        and value.nbytes <= value.untyped_storage().nbytes()
    )


def difference(network: nn.Module, state: dict[str, Tensor]) -> list[str]:
    """What keeps `state` from fitting `network`, one line each, a few examples of every kind."""
    own = network.state_dict()
    kinds = {
        "missing": [k for k in own if k not in state],
        "unknown": [k for k in state if k not in own],
        "of another shape": [
            f"{k} {list(state[k].shape)} instead of {list(own[k].shape)}" for k in own if k in state and own[k].shape != state[k].shape
        ],
    }
    return [f"{len(v)} {kind}: {', '.join(v[:3])}{', ...' if len(v) > 3 else ''}" for kind, v in kinds.items() if v]


def load_into(network: nn.Module, path: Path) -> None:
    """Fill `network` with the checkpoint at `path`, every key accounted for.

    A plain checkpoint fits a depth-aware network: it becomes the RGB branch and the head, and alpha is set to 0, so that the
    network computes exactly the RGB model. Raises DepthsegError with the difference otherwise.
    """
    state = network.published(path) if hasattr(network, "published") else read(path)  # type: ignore[operator]
    alpha = getattr(network, "alpha", None)
    if alpha is not None and "alpha" not in state and not any(k.startswith("depth_encoder.") for k in state):
        own = network.state_dict()
        state = {
            **state,
            **{k: v for k, v in own.items() if k.startswith("depth_encoder.")},
            "alpha": torch.zeros_like(own["alpha"]),
        }
    fill(network, state, path, "network", "Is --model the one the checkpoint was made for?")


def fill(network: nn.Module, state: dict[str, Tensor], path: Path, what: str, hint: str) -> None:
    """Fill `network` with `state` if it fits exactly and holds numbers; path, what and hint are for the message otherwise."""
    if lines := difference(network, state):
        raise DepthsegError(f"{path} does not fit this {what}: {'; '.join(lines)}", hint)
    if bad := [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]:
        raise DepthsegError(
            f"{path} holds values that are not finite, in {', '.join(bad[:3])}", "The file is damaged: fetch or export it again."
        )
    network.load_state_dict(state, strict=True)  # fp16 tensors are copied into the network's fp32 ones


def save(network: nn.Module, path: Path, metadata: dict[str, str], half: bool = True) -> None:
    """Write inference weights as safetensors: kernels and matrices in fp16, vectors in fp32, since variances may exceed fp16's 65504.

    half: False leaves everything as it is.
    """
    state = {k: (v.half() if half and v.is_floating_point() and v.ndim > 1 else v).contiguous() for k, v in network.state_dict().items()}
    with atomic(path) as part:
        part.write_bytes(serialised(state, metadata))  # its own save_file would let nobody else read the file
