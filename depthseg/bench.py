"""What a segmentation network costs: parameters and the encoder's multiply-adds, counted without computing anything.

Knows no images, no weights and no devices: networks are built on torch's `meta` device, where a forward pass only tracks shapes.
"""

import torch
from torch.utils.flop_counter import FlopCounterMode

from depthseg import catalog

# Published: millions of parameters of the whole model, billions of multiply-adds of the encoder at its native input.
PAPER = {
    "efficientvit-sam-l0": (34.8, 35),  # EfficientViT-SAM (Zhang et al. 2024), Table 1
    "efficientvit-sam-l1": (47.7, 49),
    "efficientvit-sam-l2": (61.3, 69),
    "efficientvit-sam-xl0": (117.0, 185),
    "efficientvit-sam-xl1": (203.3, 322),
    "efficientvit-sam-l2-depth": (118.7, 137),  # Depth-Aware EfficientViT-SAM (Zhou et al.)
}


def measure(name: str) -> dict[str, int]:
    """`params` of the whole network called `name`, and `macs`: multiply-adds of encoding one image at the native input."""
    entry = catalog.row(catalog.MODELS, name, "model")
    with torch.device("meta"), torch.no_grad():
        network = catalog.resolve(entry)(**entry.args).eval()
        picture = torch.empty(1, 3, entry.input, entry.input)
        with FlopCounterMode(display=False) as counter:
            network.encode(picture, picture if network.alpha is not None else None)
    return {"params": sum(p.numel() for p in network.parameters()), "macs": counter.get_total_flops() // 2}
