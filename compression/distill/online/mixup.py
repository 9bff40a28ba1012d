"""Partial mixup: a few images of each batch become blends of two.

Legend: B batch, C classes, M mixed rows.
"""

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from compression.card import MethodCard
from compression.distill.online.base import Changed, OnlineAugment
from compression.distill.types import Shapes
from compression.types import Batch, Frozen


def mixed(
    images: Tensor, labels: Tensor, rows: Tensor, partners: Tensor, shares: Tensor, *, num_classes: int
) -> Changed:
    """Return the batch with ``shares * own + (1 - shares) * partner`` at ``rows``, images and one-hot labels alike.

    Mixed rows get the label -1, all rows get soft labels. A row of soft labels is 0 where a sample in it has no
    label, so that a cross entropy learns nothing from it; otherwise it sums to 1.

    Args:
        images: [B,C,H,W]; not modified.
        labels: int64 [B], -1 for none.
        rows: int64 [M], distinct.
        partners: int64 [M].
        shares: [M], 0..1; what is left of the row's own image.
        num_classes: C.
    """
    shares = shares.to(images.device, images.dtype)
    known = (labels >= 0).unsqueeze(-1)
    one_hot = F.one_hot(labels.clamp(min=0), num_classes).to(images.dtype) * known
    blended, soft, hard = images.clone(), one_hot.clone(), labels.clone()
    per_image = shares.view(-1, 1, 1, 1)
    blended[rows] = per_image * images[rows] + (1 - per_image) * images[partners]
    per_row = shares.unsqueeze(-1)
    both = known[rows] & known[partners]
    soft[rows] = (per_row * one_hot[rows] + (1 - per_row) * one_hot[partners]) * both
    hard[rows] = -1
    return Changed(images=blended, labels=hard, soft_labels=soft)


def partners_of(rows: Tensor, batch_size: int) -> Tensor:
    """Return a partner for each of ``rows``, int64 [M], from a random permutation without fixed points.

    Samples stand in a ring of random order and each is given its neighbour, so that no image is mixed with itself
    (but for a batch of one). Uses the random state of the process.
    """
    ring = torch.randperm(batch_size)
    neighbour = torch.empty_like(ring)
    neighbour[ring] = ring.roll(-1)
    return neighbour[rows]


class PartialMixup(OnlineAugment):
    """Mixes exactly floor(fraction * B) images of a batch, each by a share of its own from Beta(beta, beta).

    Choi et al. 2023 (arXiv:2211.03946) after Zhang et al. 2018 (arXiv:1710.09412). Ours: rows are chosen by a
    permutation, so that the fraction is what it says (drawn with replacement, "10 %" came to about 41 %), and
    an image is never its own partner. Teachers see the mixed images; they are best trained without mixup.
    """

    def __init__(self, *, fraction: float, beta: float) -> None:
        super().__init__()
        self.fraction, self.beta = fraction, beta

    def prepare(self, shapes: Shapes) -> None:
        """Remember the number of classes."""
        self.num_classes = shapes.num_classes

    def forward(self, batch: Batch, student: nn.Module, teachers: Sequence[nn.Module]) -> Changed:
        """Return the batch with some of its images mixed; student and teachers are not looked at."""
        del student, teachers
        size, device = len(batch.labels), batch.labels.device
        rows = torch.randperm(size)[: math.floor(self.fraction * size + 1e-9 * size)]
        shares = torch.distributions.Beta(self.beta, self.beta).sample((len(rows),))
        partners = partners_of(rows, size).to(device)
        return mixed(batch.images, batch.labels, rows.to(device), partners, shares, num_classes=self.num_classes)


class Mixup(Frozen):
    """A fraction of each batch is mixed, image with image and label with label."""

    kind: Literal["mixup"] = "mixup"
    fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Part of each batch that is mixed, rounded down; with less than one image nothing is."""
    beta: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Both parameters of the Beta distribution of shares: 1 takes all alike, less keeps images nearly whole."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Partial mixup",
        paper="Choi et al. 2023, Understanding the Role of Mixup in Knowledge Distillation: An Empirical Study, "
        "arXiv:2211.03946",
        summary="Blends a small, exact fraction of each batch with other images of it; the teachers are asked about "
        "the blends. Losses of hard labels see the other images alone, cross_entropy learns the blend of labels.",
        needs="The teachers themselves, best trained without mixup.",
        cost="Live teachers: a forward pass of each in every step, instead of a look-up.",
        evidence="The paper recommends little mixing for students, 10 % of a batch, and none for teachers. Not "
        "measured on our data yet.",
    )

    def build(self) -> OnlineAugment:
        """Return the augmentation."""
        return PartialMixup(fraction=self.fraction, beta=self.beta)
