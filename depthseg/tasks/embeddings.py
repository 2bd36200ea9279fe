"""Distillation: an image encoder learns the embeddings of a larger one (EfficientViT-SAM, Sec. 3: L2 on those of SAM ViT-H)."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from depthseg import sa1b
from depthseg.errors import DepthsegError
from depthseg.models.depthseg import DepthSeg
from depthseg.schema import Array, Frame
from depthseg.tasks.batches import Batch


@dataclass
class EmbeddingSource:
    """Whole pictures, flipped at random, at the sides of student and teacher."""

    entries: list[sa1b.Entry]
    side: int
    teacher_side: int = 1024

    def setting(self, rng: np.random.Generator) -> None:
        return None

    def share(self, setting: None) -> float:
        return 1.0

    def sample(self, index: int, rng: np.random.Generator, setting: None) -> tuple[Array, Array]:
        pixels = sa1b.load(self.entries[index]).pixels
        if rng.random() < 0.5:
            pixels = np.ascontiguousarray(pixels[:, ::-1])
        size = (pixels.shape[0], pixels.shape[1])
        return Frame(size, self.side).image(pixels), Frame(size, self.teacher_side).image(pixels)

    def collate(self, items: list[tuple[Array, Array]], setting: None) -> Batch:
        small, large = zip(*items, strict=True)
        return {"rgb": torch.from_numpy(np.stack(small)), "large": torch.from_numpy(np.stack(large))}


class EmbeddingLoss(nn.Module):
    """Mean squared error of the embedding, and for the log the cosine between the two; sums over pictures."""

    def __init__(self, network: DepthSeg, teacher: nn.Module):
        super().__init__()
        self.network = network
        self._teacher = [teacher]  # in a list: it is no part of what learns or is kept

    def forward(self, batch: Batch) -> tuple[Batch, Tensor]:
        (teacher,) = self._teacher
        found = self.network.encode(batch["rgb"])[0]
        with torch.no_grad():
            wanted = teacher.to(found.device).encode(batch["large"])[0]  # type: ignore[operator]
        if found.shape != wanted.shape:
            raise DepthsegError(
                f"the teacher's embeddings are {list(wanted.shape[1:])}, the student's {list(found.shape[1:])}",
                "Choose a student of the efficientvit-sam family.",
            )
        error = (found - wanted).square().mean((1, 2, 3)).sum()
        cosine = torch.cosine_similarity(found.detach(), wanted, 1).mean((1, 2)).sum()
        return {"embedding": error, "cosine": cosine}, torch.tensor(float(len(found)), device=found.device)
