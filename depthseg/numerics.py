"""In which numbers a network computes, by the name that a Plan gives them."""

import contextlib
import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import torch

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


@contextmanager
def inference(device: torch.device, precision: str) -> Iterator[None]:
    """No gradients, and autocast to a key of PRECISIONS other than fp32."""
    dtype = PRECISIONS[precision]
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        yield
