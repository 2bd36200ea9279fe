"""Figures that others published for this task, each with its source, to stand beside ours in a report.

Percent, as printed. They compare only within one protocol, on all of COCO val2017 or of LVIS v1 val. Knows no score of ours.
"""

from dataclasses import dataclass

METRICS = {
    "box": ("miou", "miou_small", "miou_medium", "miou_large"),
    "point": ("miou_1", "miou_3", "miou_5"),  # after so many clicks
    "detector": ("ap", "ap_small", "ap_medium", "ap_large"),
}
DEPTH_PAPER = "Depth-Aware EfficientViT-SAM (arXiv 2602.11804)"
EVIT_PAPER = "EfficientViT-SAM (arXiv 2402.05008)"
ESAM_PAPER = "EfficientSAM (arXiv 2312.00863)"
EVIT_README = "EfficientViT-SAM's README"  # applications/efficientvit_sam in mit-han-lab/efficientvit

H, EVIT, L2_DEPTH = "SAM-ViT-H", "EfficientViT-SAM-", "EfficientViT-SAM-L2-Depth"


@dataclass(frozen=True)
class Figure:
    """One published number."""

    model: str
    dataset: str  # coco or lvis
    prompt: str  # box (the truth's), point or detector
    detector: str  # vitdet, yolov8 or groundingdino; "" where the prompt is no detector's box
    metric: str  # one of METRICS[prompt]
    value: float  # percent
    source: str
    protocol: str = "official"  # a key of protocols.PROTOCOLS


# Where from, data set, prompt, detector -> model -> values in the order of METRICS[prompt]; None is not given, or not to be read.
# The depth paper's Table 1 (detectors' boxes) is absent: the text at hand has lost which row and which detector its numbers
# belong to. Its rows of SAM-ViT-H and XL1 in Tables 2 and 3 are EfficientViT-SAM's, printed again (with 83.7 where that has 83.8).
# The README's COCO scores with ViTDet's boxes are those of Table 4.
_TABLES: dict[tuple[str, str, str, str], dict[str, tuple[float | None, ...]]] = {
    (f"{DEPTH_PAPER}, Table 3", "coco", "box", ""): {
        H: (77.4, 72.3, 80.4, 81.8),
        f"{EVIT}L2": (75.6, 69.7, 78.7, 81.7),
        L2_DEPTH: (76.6, 72.2, 78.9, 81.2),
        f"{EVIT}XL1": (79.9, 75.8, 82.2, 83.7),
    },
    (f"{DEPTH_PAPER}, Table 3", "lvis", "box", ""): {
        H: (77.0, 70.6, 87.5, 89.9),
        f"{EVIT}L2": (75.5, 68.6, 84.9, 88.8),
        L2_DEPTH: (76.7, 70.6, 85.1, 88.6),
        f"{EVIT}XL1": (79.9, 74.4, 88.4, 91.6),
    },
    (f"{DEPTH_PAPER}, Table 2", "coco", "point", ""): {
        H: (58.4, 69.6, 71.4),
        f"{EVIT}L2": (56.1, 67.2, 69.4),
        L2_DEPTH: (52.6, 71.6, 75.5),
        f"{EVIT}XL1": (59.8, 71.3, 75.3),
    },
    (f"{DEPTH_PAPER}, Table 2", "lvis", "point", ""): {
        H: (59.2, 66.0, 66.8),
        f"{EVIT}L2": (57.8, 64.9, 66.1),
        L2_DEPTH: (56.3, 70.4, 73.8),
        f"{EVIT}XL1": (56.6, 67.0, 71.7),
    },
    (f"{EVIT_PAPER}, Table 3", "coco", "box", ""): {H: (77.4, 72.3, 80.4, 81.8), f"{EVIT}XL1": (79.9, 75.8, 82.2, 83.8)},
    (f"{EVIT_PAPER}, Table 3", "lvis", "box", ""): {H: (77.0, 70.6, 87.5, 89.9), f"{EVIT}XL1": (79.9, 74.4, 88.4, 91.6)},
    (f"{EVIT_PAPER}, Table 2", "coco", "point", ""): {H: (58.4, 69.6, 71.4), f"{EVIT}XL1": (59.8, 71.3, 75.3)},
    (f"{EVIT_PAPER}, Table 2", "lvis", "point", ""): {H: (59.2, 66.0, 66.8), f"{EVIT}XL1": (56.6, 67.0, 71.7)},
    (f"{EVIT_PAPER}, Table 4", "coco", "detector", "vitdet"): {
        H: (46.5, 30.8, 51.0, 61.7),
        "MobileSAM": (38.7, 23.7, None, 54.3),  # one legible AP of medium objects for three models: left out
        "EdgeSAM": (42.1, 26.6, None, 56.9),
        "EfficientSAM": (44.4, 28.4, None, 60.1),
        f"{EVIT}L0": (45.7, 28.2, 49.5, 63.4),
        f"{EVIT}L1": (46.2, 28.7, 50.4, 64.0),
        f"{EVIT}L2": (46.6, 28.9, 50.8, 64.2),
        f"{EVIT}XL0": (47.5, 30.0, 51.5, 64.6),
        f"{EVIT}XL1": (47.8, 30.5, 51.8, 64.7),
    },
    (f"{EVIT_PAPER}, Table 4", "lvis", "detector", "vitdet"): {  # most of the first two columns is illegible
        H: (44.2, 31.8, 57.1, 65.3),
        "MobileSAM": (None, None, 47.8, 59.1),
        "EdgeSAM": (None, None, 51.3, 59.3),
        "EfficientSAM": (None, None, 53.4, 62.2),
        f"{EVIT}L0": (None, None, 53.4, 64.7),
        f"{EVIT}L1": (42.1, 29.1, 54.3, 65.0),
        f"{EVIT}L2": (None, None, 55.1, 65.5),
        f"{EVIT}XL0": (None, None, 56.2, 65.9),
        f"{EVIT}XL1": (None, None, 57.0, 66.4),
    },
    (f"{EVIT_PAPER}, Table 5", "coco", "detector", "yolov8"): {H: (43.8, 26.1, 48.1, 60.4), f"{EVIT}XL1": (44.7, 26.0, 48.9, 62.9)},
    (f"{EVIT_PAPER}, Table 5", "coco", "detector", "groundingdino"): {
        H: (46.9, 31.5, 51.8, 64.4),
        f"{EVIT}XL1": (48.2, 31.5, 52.6, 67.3),
    },
    (EVIT_README, "coco", "box", ""): {f"{EVIT}XL1": (79.927, 75.833, 82.210, 83.748)},
    (EVIT_README, "lvis", "box", ""): {f"{EVIT}XL1": (79.886, 74.412, 88.447, 91.577)},
    (EVIT_README, "coco", "point", ""): {f"{EVIT}XL1": (59.757, None, None)},
    (EVIT_README, "lvis", "point", ""): {f"{EVIT}XL1": (56.624, None, None)},
    (EVIT_README, "lvis", "detector", "vitdet"): {
        f"{EVIT}{name}": (value, None, None, None) for name, value in {"L0": 41.8, "L1": 42.1, "L2": 42.7, "XL0": 43.9, "XL1": 44.4}.items()
    },
    (f"{ESAM_PAPER}, Table 4", "coco", "box", ""): {
        "SAM": (78.4, None, None, None),
        "MobileSAM": (74.2, None, None, None),
        "EfficientSAM-Ti": (75.7, None, None, None),
        "EfficientSAM-S": (76.9, None, None, None),
    },
    (f"{ESAM_PAPER}, Table 4", "lvis", "box", ""): {
        "SAM": (78.9, None, None, None),
        "MobileSAM": (73.8, None, None, None),
        "EfficientSAM-Ti": (74.3, None, None, None),
        "EfficientSAM-S": (75.4, None, None, None),
    },
    (f"{ESAM_PAPER}, Table 4", "coco", "point", ""): {
        "SAM": (55.6, 74.1, None),
        "MobileSAM": (43.7, 59.7, None),
        "EfficientSAM-Ti": (45.5, 67.2, None),
        "EfficientSAM-S": (50.0, 69.8, None),
    },
    (f"{ESAM_PAPER}, Table 4", "lvis", "point", ""): {
        "SAM": (59.8, 75.2, None),
        "MobileSAM": (51.0, 54.4, None),
        "EfficientSAM-Ti": (52.7, 66.8, None),
        "EfficientSAM-S": (56.2, 68.7, None),
    },
    (f"{ESAM_PAPER}, Table 5", "coco", "detector", "vitdet"): {
        "SAM": (46.5, 30.8, 51.0, 61.7),
        "MobileSAM": (38.7, 23.7, 42.2, 54.3),
        "FastSAM": (37.9, 23.9, 43.4, 50.0),
        "EfficientSAM-Ti": (42.3, 26.7, 46.2, 57.4),
        "EfficientSAM-S": (44.4, 28.4, 48.3, 60.1),
    },
    (f"{ESAM_PAPER}, Table 5", "lvis", "detector", "vitdet"): {
        "SAM": (44.7, 32.5, 57.6, 65.5),
        "MobileSAM": (34.4, 23.8, 44.9, 53.7),
        "FastSAM": (34.5, 24.6, 46.2, 50.8),
        "EfficientSAM-Ti": (39.9, 28.9, 51.0, 59.9),
        "EfficientSAM-S": (42.3, 30.8, 54.0, 62.3),
    },
}

FIGURES = [
    Figure(model, dataset, prompt, detector, metric, value, source, "efficientsam" if source.startswith(ESAM_PAPER) else "official")
    for (source, dataset, prompt, detector), models in _TABLES.items()
    for model, values in models.items()
    for metric, value in zip(METRICS[prompt], values, strict=True)
    if value is not None
]


@dataclass(frozen=True)
class Size:
    """What a paper says a model costs."""

    millions: float  # parameters of the whole model
    gmacs: float | None  # multiply-adds of the encoder at its native input
    source: str

    def __str__(self) -> str:
        return f"{self.millions:g} M{f', {self.gmacs:g} G' if self.gmacs else ''} ({self.source})"


_EVIT, _ESAM, _EDGE, _AMR = "EfficientViT-SAM, Table 1", "EfficientSAM, Table 8", "EdgeSAM's README", "its reproduction with AMR"
SIZES = {  # by the name in catalog.MODELS; what they count (encoder or all, with or without unused parts) differs as the numbers do
    "efficientvit-sam-l0": (Size(34.8, 35, _EVIT),),
    "efficientvit-sam-l1": (Size(47.7, 49, _EVIT),),
    "efficientvit-sam-l2": (Size(61.3, 69, _EVIT),),
    "efficientvit-sam-xl0": (Size(117.0, 185, _EVIT),),
    "efficientvit-sam-xl1": (Size(203.3, 322, _EVIT),),
    "efficientvit-sam-l2-depth": (Size(118.7, 137, "Depth-Aware EfficientViT-SAM"),),
    "sam-vit-h": (Size(641.1, 2973, _EVIT), Size(641.1, 2734.8, _EDGE), Size(636, None, _ESAM), Size(632, None, f"EfficientSAM, {_AMR}")),
    "mobile-sam": (Size(9.8, 39, _EVIT), Size(9.8, 38.2, _EDGE), Size(9.66, None, "MobileSAM's README")),
    "edge-sam": (Size(9.6, 20, _EVIT), Size(9.6, 22.1, _EDGE)),
    "efficient-sam-ti": (Size(10, None, _ESAM), Size(9.66, None, _AMR)),
    "efficient-sam-s": (Size(25.3, 247, _EVIT), Size(25, None, _ESAM), Size(25.02, None, _AMR)),
    "fastsam-x": (Size(68, None, "FastSAM's README"), Size(68.2, 887.6, _EDGE)),
}


def rows(dataset: str, prompt: str, detector: str = "", protocol: str = "official") -> list[dict]:
    """One {"model", "source", "values": {metric: percent}} for each model and source, the depth paper's first."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for f in FIGURES:
        if (f.dataset, f.prompt, f.detector, f.protocol) == (dataset, prompt, detector, protocol):
            found.setdefault((f.model, f.source), {})[f.metric] = f.value
    return [{"model": model, "source": source, "values": values} for (model, source), values in found.items()]
