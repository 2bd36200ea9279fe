"""Where and in which numbers a network computes, by the names that a Plan gives them."""

import contextlib
import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from depthseg.data import cores
from depthseg.errors import MISSING_PIECE, DepthsegError

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_memory() -> None:
    """Let glibc's malloc keep what networks free, for the whole process; elsewhere nothing happens.

    A CPU network frees and asks for the same large blocks at each layer. By default each goes back to the system, which clears its
    pages for the next layer again: that doubles the time of a batch of prompts.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, 1 << 30)
        mallopt(_TRIM_THRESHOLD, 2**31 - 1)


def take_threads(count: int | None) -> None:
    """Let torch's operations have so many threads on the CPU; None: as many as cores, but no more than a container's share of them.

    Its threads wait for one another at each operation: with more of them than cores, each waits for one that does not run.
    """
    if count is None:
        count = min(torch.get_num_threads(), cores())
    if count != torch.get_num_threads():
        torch.set_num_threads(count)


def set_up(device: torch.device, precision: str, threads: int | None = None) -> None:
    """Set up the process for computing there in a key of PRECISIONS. threads: of the CPU; None as in `take_threads`."""
    if device.type == "cpu":
        keep_memory()
        take_threads(threads)
    else:
        torch.backends.cudnn.allow_tf32 = precision != "fp32"  # or convolutions in fp32 would have fp16's ten bits


@contextmanager
def inference(device: torch.device, precision: str) -> Iterator[None]:
    """No gradients, and autocast to a key of PRECISIONS other than fp32."""
    dtype = PRECISIONS[precision]
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        yield


def device_of(name: str) -> torch.device:
    """The device of this name; auto is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DepthsegError(f"no device is called '{name}'", "Use cpu, cuda, cuda:1 or auto.") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DepthsegError(f"there is no device {name} on this machine", "Use --device cpu or auto.", MISSING_PIECE)
    if device.type not in ("cpu", "cuda"):
        raise DepthsegError(f"the device {name} is not supported", "Use cpu, cuda, cuda:1 or auto.")
    return device


def precision_of(name: str, device: torch.device) -> str:
    """A key of PRECISIONS; auto is fp32 on the CPU and bf16 on CUDA, or fp16 where bf16 would be emulated."""
    if name == "auto":
        if device.type == "cpu":
            return "fp32"
        return "bf16" if torch.cuda.get_device_properties(device).major >= 8 else "fp16"
    if name not in PRECISIONS:
        raise DepthsegError(f"no precision is called '{name}'", f"Use {', '.join(PRECISIONS)} or auto.")
    return name
