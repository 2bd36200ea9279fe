"""Inverse depth from one picture: crops with measured depth, and MiDaS' scale- and shift-free losses."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor, nn

from depthseg import sa1b
from depthseg.models.depthnet import DepthNet
from depthseg.schema import Array, Frame
from depthseg.tasks.batches import Batch


def _jitter(pixels: Array, rng: np.random.Generator) -> Array:
    gain, offset = rng.uniform(0.7, 1.3, 3) * rng.uniform(0.8, 1.2), rng.uniform(-20, 20)
    return (pixels * gain + offset).clip(0, 255).astype(np.uint8)


@dataclass
class DepthSource:
    """Crops with inverse depth; holes are NaN."""

    pairs: list[sa1b.DepthPair]

    def setting(self, rng: np.random.Generator) -> None:
        return None

    def share(self, setting: None) -> float:
        return 1.0

    def sample(self, index: int, rng: np.random.Generator, setting: None) -> tuple[Array, Array]:
        pair = self.pairs[index]
        try:
            pixels = np.asarray(PILImage.open(pair.rgb).convert("RGB"))
            stored = np.asarray(PILImage.open(pair.depth)).astype(np.float32)
            if stored.shape != pixels.shape[:2]:
                raise ValueError(f"{pixels.shape[1]} x {pixels.shape[0]} pixels, but its depth map is of shape {stored.shape}")
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"{pair.rgb.name}: {error}") from error
        d = np.full(stored.shape, np.nan, np.float32)
        valid = stored > 0
        d[valid] = 1000 / stored[valid] if pair.kind == "metric" else stored[valid] / 255
        h, w = pixels.shape[:2]
        share = rng.uniform(0.6, 1)
        ch, cw = max(32, int(h * share)), max(32, int(w * share))
        top, left = int(rng.integers(0, h - ch + 1)), int(rng.integers(0, w - cw + 1))
        crop = np.s_[top : top + ch, left : left + cw]
        pixels, d = _jitter(pixels[crop], rng), d[crop]
        if rng.random() < 0.5:
            pixels, d = pixels[:, ::-1], d[:, ::-1]
        side = DepthNet.side
        frame = Frame((pixels.shape[0], pixels.shape[1]), side)
        ih, iw = frame.inner
        square = np.full((side // 2, side // 2), np.nan, np.float32)
        small = PILImage.fromarray(np.ascontiguousarray(d)).resize((max(1, iw // 2), max(1, ih // 2)), PILImage.Resampling.NEAREST)
        square[: small.height, : small.width] = np.asarray(small)
        return frame.image(np.ascontiguousarray(pixels)), square

    def collate(self, items: list[tuple[Array, Array]], setting: None) -> Batch:
        rgb, inverse = zip(*items, strict=True)
        return {"rgb": torch.from_numpy(np.stack(rgb)), "inverse": torch.from_numpy(np.stack(inverse))}


def _standardised(x: Tensor, valid: Tensor) -> Tensor:
    """Per image: minus the median, over the mean absolute deviation of valid cells (MiDaS' scale- and shift-free form)."""
    flat = x.masked_fill(~valid, float("nan")).flatten(1)
    median = flat.nanmedian(1).values[:, None, None]
    spread = ((x - median).abs() * valid).sum((1, 2)) / valid.sum((1, 2)).clamp_min(1)
    return (x - median) / (spread[:, None, None] + 1e-4)


class DepthLoss(nn.Module):
    """Scale- and shift-free L1 on inverse depth, and its gradients at four scales (Ranftl et al. 2020);
    sums over the pictures with depth."""

    def __init__(self, network: DepthNet):
        super().__init__()
        self.network = network

    def forward(self, batch: Batch) -> tuple[Batch, Tensor]:
        target = batch["inverse"]
        valid = target.isfinite()
        keep = valid.sum((1, 2)) > 50
        p = self.network(batch["rgb"]).float()[keep]  # it may come from autocast
        valid, target = valid[keep], target[keep].nan_to_num()
        a, b = _standardised(p, valid), _standardised(target, valid)
        error = (a - b) * valid
        out = {"depth": (error.abs().clamp_max(5).sum((1, 2)) / valid.sum((1, 2))).sum()}
        gradient = p.new_zeros(())
        for k in range(4):
            e, v = error[:, :: 2**k, :: 2**k], valid[:, :: 2**k, :: 2**k]
            for dim in (1, 2):
                n = e.shape[dim] - 1
                both = v.narrow(dim, 1, n) & v.narrow(dim, 0, n)
                step = (e.narrow(dim, 1, n) - e.narrow(dim, 0, n)).abs() * both
                gradient = gradient + (step.sum((1, 2)) / both.sum((1, 2)).clamp_min(1)).sum()
        return {**out, "gradient": gradient}, keep.sum().float()
