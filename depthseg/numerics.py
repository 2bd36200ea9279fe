"""In which numbers a network computes, by the name that a Plan gives them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def inference(device: torch.device, precision: str) -> Iterator[None]:
    """No gradients, and autocast to a key of PRECISIONS other than fp32."""
    dtype = PRECISIONS[precision]
    with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        yield
