"""Repeated random subsets: each epoch is a fresh random share of the data.

Legend: N samples of the split, S samples of an epoch.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compression.card import MethodCard
from compression.train.batches import Sampler, count_of, shuffled
from compression.types import Frozen


@dataclass(frozen=True)
class Rs2Sampler:
    """Chunks of S = floor(share * N) samples, all of the same size.

    Okanovic et al. 2023 (arXiv:2305.18424). Without replacement the epochs cut one endless row of permutations of
    the split into chunks, so that each permutation is used up before the next begins and no sample is lost where
    they meet. A chunk that spans two permutations has no sample twice: the next one starts with others.
    With replacement each epoch draws anew from the whole split, in itself without repeats.
    """

    share: float
    replacement: bool

    @property
    def name(self) -> str:
        """Kind and fields."""
        return f"rs2:{self.share}:{self.replacement}"

    def size(self, n: int) -> int:
        """``floor(share * n)``, at least 1."""
        return count_of(n, self.share)

    def indices(self, epoch: int, labels: Tensor, seed: int) -> Tensor:
        """The epoch's chunk, int64 [S]."""
        n, size = len(labels), self.size(len(labels))
        if self.replacement:
            return shuffled(n, seed=seed, epoch=epoch)[:size]
        number, offset = divmod(epoch * size, n)
        chunk = _permutation(number, n, size, seed)[offset : offset + size]
        if len(chunk) == size:
            return chunk
        return torch.cat([chunk, _permutation(number + 1, n, size, seed)[: size - len(chunk)]])


def _permutation(number: int, n: int, size: int, seed: int) -> Tensor:
    """Return the ``number``-th permutation int64 [N] of the row that chunks of ``size`` cut.

    It depends on the end of the one before it, with which its first samples may share a chunk. Where a chunk is at
    most half of the split that end is as it was drawn; otherwise the row is built from its beginning.
    """
    first = max(0, number - 1) if 2 * size <= n else 0
    order = shuffled(n, seed=seed, epoch=first)
    for current in range(first + 1, number + 1):
        begun = current * n % size  # samples of the spanning chunk that the permutation before has given
        barred = order[n - begun :] if begun else order[:0]
        order = shuffled(n, seed=seed, epoch=current)
        if begun:
            head = order[~_marked(barred, n)[order]][: size - begun]
            order = torch.cat([head, order[~_marked(head, n)[order]]])
    return order


def _marked(rows: Tensor, n: int) -> Tensor:
    marks = torch.zeros(n, dtype=torch.bool)
    marks[rows] = True
    return marks


class Rs2(Frozen):
    """A fresh random share of the data in every epoch."""

    kind: Literal["rs2"] = "rs2"
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Share of the train split that an epoch shows, and of the optimiser steps that it takes."""
    replacement: bool = False
    """Draw every epoch from the whole split; off, samples come again only when all have been shown."""

    needs_teachers: ClassVar[bool] = False
    """Whether the teachers themselves are asked which samples to show."""
    adaptive: ClassVar[bool] = False
    """Whether the choice looks at the student or at what the teachers said."""
    card: ClassVar[MethodCard] = MethodCard(
        name="Repeated random subsets (RS2)",
        paper="Okanovic et al. 2023, arXiv:2305.18424",
        summary="Each epoch shows the next chunk of a shuffled data set. Equal to ordinary training with a "
        "compressed schedule, so compare it with full data at `share` times the epochs.",
        needs="Nothing; no scores and no labels.",
        cost="`share` of the steps of an epoch on all data; validation and views still come once per epoch.",
        evidence="The paper reports 66 % against 69 % with all data (ResNet-18, ImageNet, a tenth of the steps), "
        "where the best selection by scores reached 55 %. Measured on our data: see `measured`.",
    )

    def build(self) -> Sampler:
        """Return the sampler."""
        return Rs2Sampler(self.share, self.replacement)
