"""Checkpoints whose values follow from their names: what the official code answered for them is known (tests/data)."""

import json
import zlib
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).parent / "data"


def tensor(key: str, shape: list[int]) -> np.ndarray:
    """The value of one official key: drawn from a generator seeded by the key, scaled by what kind of tensor it is."""
    g = np.random.default_rng(zlib.crc32(key.encode()))
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if leaf == "running_var":
        return (0.5 + g.random(shape)).astype(np.float32)
    z = g.standard_normal(shape)
    if leaf == "weight":
        z = 1 + 0.1 * z if len(shape) == 1 else z / np.sqrt(np.prod(shape[1:]))
    else:
        z = z * {"running_mean": 0.1, "bias": 0.05, "positional_encoding_gaussian_matrix": 1}.get(leaf, 0.2)
    return np.asarray(z, np.float32)


def checkpoint(listing: Path) -> dict[str, torch.Tensor]:
    """The state dict of a key list (rows of key, shape, crc32 of the bytes), every tensor checked against its crc32."""
    rows = json.loads(listing.read_text())
    if isinstance(rows, dict):
        rows = rows["keys"]
    state = {}
    for row in rows:
        key, shape, crc = (row["key"], row["shape"], row["crc32"]) if isinstance(row, dict) else row
        value = tensor(key, shape)
        assert zlib.crc32(np.ascontiguousarray(value).tobytes()) == crc, key
        state[key] = torch.from_numpy(np.array(value))
    return state


def picture() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(480, 640, 3), dtype=np.uint8)
