"""Networks that transformers loads from a folder in Hugging Face's format. Nothing here asks the network."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from depthseg import catalog, weights
from depthseg.errors import DepthsegError

_DAMAGED = "It may be damaged: `depthseg weights rm` and `depthseg weights pull` fetch it again."


def load(build: str, folder: Path, types: Sequence[str], role: str) -> Any:
    """The network of a folder by a class of transformers, in eval mode, every weight accounted for.

    types: values of the config's model_type that are expected. role: a key of catalog.WAYS. Raises DepthsegError.
    """
    for name in weights.HUB_NEEDED:
        catalog.there(folder / name, folder.name, role)
    try:
        found = json.loads((folder / "config.json").read_bytes())["model_type"]
    except (ValueError, TypeError, KeyError) as e:
        raise DepthsegError(f"{folder / 'config.json'} is not the config of a model", _DAMAGED) from e
    if found not in types:
        raise DepthsegError(f"{folder} holds a model of type {found}, not {' or '.join(types)}", "See `depthseg models`.")
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        network, info = getattr(transformers, build).from_pretrained(
            folder, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except Exception as e:  # a cut-off file, or tensors of other shapes
        raise DepthsegError(f"{folder} cannot be loaded ({str(e).strip()[:120]})", _DAMAGED) from e
    if info["missing_keys"]:
        raise DepthsegError(f"{folder} lacks weights: {', '.join(sorted(info['missing_keys'])[:3])}", _DAMAGED)
    network.config._name_or_path = ""  # two folders with the same files hold the same network
    return network.eval()


def of_tensors(network: Any, *names: str) -> Any:
    """The network as a module that takes one tensor (B, 3, H, W) and gives these fields of its answer: one, or a tuple of them."""
    import torch

    class Fields(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Any) -> Any:
            answer = self.network(x)
            return tuple(answer[name] for name in names) if len(names) > 1 else answer[names[0]]

        def extra_repr(self) -> str:  # the layers alone do not say all that is computed
            return network.config.to_json_string()

    return Fields().eval()
