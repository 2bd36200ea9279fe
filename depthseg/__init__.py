"""Promptable, depth-aware batch segmentation.

`depthseg.load(name)` builds a model from the table of names and `depthseg.Segmenter` runs the whole chain;
both are resolved on first use, so that `import depthseg` stays free of torch.
"""

__version__ = "0.8.0"

_LAZY = {"Segmenter": "depthseg.segment", "load": "depthseg.catalog", "Plan": "depthseg.plan"}
__all__ = ["__version__", *sorted(_LAZY)]


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'depthseg' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)
