"""Batches cut from tensors in memory: the n-th batch of an epoch is a pure function of seed and epoch.

Legend: N samples of the split, B samples of a batch.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from compression.augment import AnyAugment, augment, normalise
from compression.data.dataset import Split
from compression.types import Batch, Preprocessing


class Sampler(Protocol):
    """Which samples an epoch shows, and in what order: a pure function of seed and epoch."""

    @property
    def name(self) -> str:
        """Changes with everything that decides the order."""
        ...

    def size(self, n: int) -> int:
        """Return the number of samples per epoch, 1..n, out of ``n``."""
        ...

    def indices(self, epoch: int, labels: Tensor, seed: int) -> Tensor:
        """Return ``size(N)`` distinct row numbers int64 in order, for labels int64 [N]."""
        ...


def shuffled(n: int, *, seed: int, epoch: int) -> Tensor:
    """Return 0..n-1 in the order of an epoch, int64 [n]: a pure function of its arguments."""
    digest = hashlib.sha256(f"order of samples:{seed}:{epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randperm(n, generator=generator)


def count_of(n: int, share: float) -> int:
    """Return ``floor(share * n)``, at least 1; what a decimal share makes whole stays whole (0.29 of 100 is 29)."""
    return max(1, math.floor(share * n + 1e-9 * n))


@dataclass(frozen=True)
class Batches:
    """The training split as epochs of shuffled, augmented, normalised batches."""

    split: Split
    preprocessing: Preprocessing
    augment: AnyAugment
    seed: int
    """Seed of the order of samples."""
    augment_seed: int
    """Seed of the views; one seed per data set lets students share stored teacher outputs."""
    views: int | None
    """Number of views that epochs take in turn; None gives every epoch its own."""
    batch_size: int
    max_steps: int | None
    device: torch.device
    rank: int = 0
    world_size: int = 1
    sampler: Sampler | None = None
    """What an epoch shows; None shows the whole split."""

    @property
    def size(self) -> int:
        """Samples of an epoch, before the remainder is cut."""
        count = len(self.split.labels)
        return count if self.sampler is None else self.sampler.size(count)

    @property
    def global_batch(self) -> int:
        """Samples per step over all ranks: a multiple of the ranks, never more than the epoch holds."""
        wanted = min(self.batch_size, self.size) // self.world_size
        return max(1, wanted) * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Full batches in the epoch's samples; the shuffled remainder waits for another epoch."""
        steps = max(1, self.size // self.global_batch)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def view_of(self, epoch: int) -> int:
        """Return the number of the augmented view that an epoch uses."""
        return epoch if self.views is None else epoch % self.views

    def permutation(self, epoch: int) -> Tensor:
        """Return the order of samples in an epoch, int64 [size]: a pure function of seed and epoch."""
        if self.sampler is None:
            return shuffled(len(self.split.labels), seed=self.seed, epoch=epoch)
        return self.sampler.indices(epoch, self.split.labels, self.seed)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of an epoch from step ``start`` on; of each, this rank's share."""
        order, view, size = self.permutation(epoch), self.view_of(epoch), self.global_batch
        for step in range(start, self.steps_per_epoch):
            rows = order[step * size : (step + 1) * size][self.rank :: self.world_size]
            ids = self.split.ids[rows]
            raw = self.split.images[rows].to(self.device)
            raw = augment(raw, ids, view=view, seed=self.augment_seed, config=self.augment)
            images = normalise(raw.contiguous(memory_format=torch.channels_last), self.preprocessing)
            labels = self.split.labels[rows].to(self.device)
            yield Batch(images=images, labels=labels, ids=ids, view=view, epoch=epoch, step=step)
