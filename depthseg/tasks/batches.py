"""Which samples a step of training gets, and the share of one process in it.

A step is a function of (seed, step) alone: a resumed run sees the same ones, and how many processes share it changes nothing, but that
each of them gets a sample where a step of large inputs takes fewer than there are.
"""

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from depthseg.errors import DepthsegError
from depthseg.schema import Array

Batch = dict[str, Tensor]
IN_A_ROW = 20  # samples that cannot be used, before the run is given up
NOTHING_SHOWN = 200  # views in a row without a mask to learn from, likewise


class Source(Protocol):
    """Samples of one task."""

    def setting(self, rng: np.random.Generator) -> Any:
        """What all samples of one step have in common, such as the encoder's input; None if nothing."""

    def share(self, setting: Any) -> float:
        """How much of the batch such a step takes, 0..1: larger inputs come in smaller batches."""

    def sample(self, index: int, rng: np.random.Generator, setting: Any) -> Any:
        """One random view of a sample; None if it shows nothing to learn from. Raises ValueError for one that cannot be read."""

    def collate(self, items: list, setting: Any) -> Batch:
        """Views as one batch."""


@dataclass
class Order:
    """Which of `count` samples comes n-th: each once in an epoch, shuffled anew, or drawn by `chance` (count,) if that is given."""

    count: int
    seed: int
    chance: Array | None = None
    _epoch: int = field(default=-1, init=False)
    _shuffled: Array = field(default_factory=lambda: np.zeros(0, np.int64), init=False)

    def __post_init__(self) -> None:
        if self.chance is not None:
            self._sums = np.cumsum(self.chance / self.chance.sum())

    def at(self, n: int, rng: np.random.Generator) -> int:
        if self.chance is not None:
            return min(int(np.searchsorted(self._sums, rng.random(), side="right")), self.count - 1)
        epoch, place = divmod(n, self.count)
        if epoch != self._epoch:
            self._epoch, self._shuffled = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.count)
        return int(self._shuffled[place])

    def another(self, rng: np.random.Generator) -> int:
        """In the place of one that cannot be used."""
        return int(rng.integers(self.count)) if self.chance is None else self.at(0, rng)


@dataclass(frozen=True)
class Step:
    """What one process computes in one step."""

    batches: list[Batch]  # micro-batches
    unreadable: list[str]  # samples that were passed over, with reasons
    seconds: float  # of CPU that reading took
    failure: str = ""  # why there is nothing to compute

    def pin_memory(self) -> "Step":
        return Step([{k: v.pin_memory() for k, v in b.items()} for b in self.batches], self.unreadable, self.seconds, self.failure)


@dataclass
class Steps(torch.utils.data.Dataset):
    """The steps of a run for one of `world` processes. repeat: steps after which the same views come again (overfitting on purpose)."""

    source: Source
    order: Order
    batch: int  # over all processes
    micro: int  # of one process, computed at once
    seed: int
    rank: int = 0
    world: int = 1
    repeat: int | None = None

    def __getitem__(self, step: int) -> Step:
        start = time.process_time()
        step = step % self.repeat if self.repeat else step
        setting = self.source.setting(np.random.default_rng([self.seed, step]))
        count = max(1, round(self.batch * self.source.share(setting) / self.world)) * self.world
        items: list[Any] = []
        unreadable: list[str] = []
        for i in range(self.rank, count, self.world):
            rng = np.random.default_rng([self.seed, step, i])
            try:
                items.append(self._view(self.order.at(step * self.batch + i, rng), rng, setting, unreadable))
            except ValueError as error:
                return Step([], unreadable, time.process_time() - start, str(error))
        parts = [items[k : k + self.micro] for k in range(0, len(items), self.micro)]
        return Step([self.source.collate(part, setting) for part in parts], unreadable, time.process_time() - start)

    def _view(self, index: int, rng: np.random.Generator, setting: Any, unreadable: list[str]) -> Any:
        """A view of the sample, or of others in its place. Raises ValueError when there is none."""
        broken = 0
        for _ in range(NOTHING_SHOWN):
            try:
                view = self.source.sample(index, rng, setting)
            except ValueError as error:
                unreadable.append(str(error))
                broken += 1
                if broken == IN_A_ROW:
                    raise ValueError(f"{IN_A_ROW} training samples in a row cannot be read, the last: {error}") from error
            else:
                if view is not None:
                    return view
                broken = 0
            index = self.order.another(rng)
        raise ValueError("the training samples show no mask large enough to learn from")


def chances(names: list[str], mix: dict[str, float]) -> Array | None:
    """How often each sample is drawn (N,), by the first key of `mix` that its source's name contains; None without a mix.

    Raises DepthsegError for a key that no source contains.
    """
    if not mix:
        return None
    if strange := [part for part in mix if not any(part in name for name in set(names))]:
        raise DepthsegError(
            f"--mix: no sample comes from '{strange[0]}'",
            "manifest.csv beside the data names their sources; samples in tars and packs have none.",
        )
    return np.array([next((weight for part, weight in mix.items() if part in name), 1.0) for name in names])
