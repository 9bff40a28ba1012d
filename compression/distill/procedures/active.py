"""Active distillation: labels are bought for the few samples that say most.

Legend: N samples of the pool, M labelled samples, C classes, Q samples chosen.
"""

import copy
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compression.card import MethodCard
from compression.data.dataset import Dataset
from compression.distill.losses import AnyLoss
from compression.distill.procedures.training import ProcedureFn, Training, joined
from compression.errors import CompressionError
from compression.metrics import predict
from compression.train import History, Row
from compression.train.batches import shuffled
from compression.types import Frozen

logger = logging.getLogger(__name__)

CHUNK = 256
"""Labelled samples whose distances to the pool are in memory at a time."""


def k_centre_greedy(pool_probs: Tensor, labelled_probs: Tensor, count: int) -> Tensor:
    """Return ``count`` rows of the pool, int64 [Q], each the farthest from all labelled and chosen before it.

    Distance is Euclidean between distributions (Kang et al. 2025, arXiv:2506.00910). The distance of every sample
    to its nearest centre is kept and only lowered, so that a choice costs one pass over the pool. Equal distances go to
    the lower row. The radius that the choice covers is at most twice the best possible.

    Args:
        pool_probs: [N,C].
        labelled_probs: [M,C]; with none, the first row of the pool is chosen first.
        count: at most N.

    Raises:
        CompressionError: more rows are asked for than there are.
    """
    if count > len(pool_probs):
        raise CompressionError(
            f"Pool has {len(pool_probs)} samples, expected at least the {count} that are to be chosen. Ask for fewer."
        )
    pool, nearest = pool_probs.double(), torch.full((len(pool_probs),), torch.inf, dtype=torch.float64)
    for centres in labelled_probs.double().split(CHUNK):
        if len(centres):
            distance = torch.cdist(pool, centres, compute_mode="donot_use_mm_for_euclid_dist")
            nearest = torch.minimum(nearest, distance.amin(dim=1))
    chosen = torch.empty(count, dtype=torch.int64)
    for place in range(count):
        farthest = nearest.argmax()
        chosen[place] = farthest
        nearest = torch.minimum(nearest, (pool - pool[farthest]).norm(dim=1))
        nearest[farthest] = -1.0  # farther than any: never again
    return chosen


def first_labelled(labels: Tensor, *, seed: int) -> Tensor:
    """Return one row per class that occurs, int64, at random by ``seed``; labels int64 [N], -1 is no class."""
    order = shuffled(len(labels), seed=seed, epoch=-1)  # an order that no epoch uses
    ordered = labels[order]
    return torch.stack([order[ordered == each][0] for each in labels[labels >= 0].unique()])


def masked(dataset: Dataset, rows: Tensor) -> Dataset:
    """The data set with the train labels of ``rows`` alone, -1 elsewhere; its hashes tell which."""
    labels = torch.full_like(dataset.train.labels, -1)
    labels[rows] = dataset.train.labels[rows]
    digest = hashlib.sha256(rows.sort().values.numpy().tobytes()).hexdigest()
    train = replace(dataset.train, labels=labels)
    return replace(dataset, train=train, hashes=dataset.hashes | {"labelled": digest})


def balanced(losses: Sequence[AnyLoss], *, labelled: int, samples: int, batch_size: int) -> tuple[AnyLoss, ...]:
    """The losses, those of labels with ``samples / labelled`` times their weight, but at most ``batch_size`` times.

    A step counts a loss of labels by the labelled share of its batch. With this factor it is, on average, the mean over
    labelled samples, as it is meant beside the losses of teachers; the limit is a batch with one label among others.
    """
    factor = min(samples / labelled, batch_size)
    return tuple(
        loss.model_copy(update={"weight": loss.weight * factor}) if loss.needs.labels else loss for loss in losses
    )


def active(training: Training, *, rounds: int, queries: int | None, round_epochs: int | None) -> History:
    """Train the student with labels for some samples alone, in rounds, and return the curves of all rounds.

    Kang et al. 2025 (arXiv:2506.00910), ActiveKD with PCoreSet. The first round has a label of each class. After each
    round but the last, samples are chosen whose distributions, by the student of that round, are the farthest from
    those of labelled ones, and their labels are looked up. Every round starts from the same initial weights. Losses of
    labels see labelled rows, losses of teachers all of them, and the few labels are not outweighed (see ``balanced``).
    Rows have ``labelled``, the number of labels used.

    Ours: one linear head. The authors train a second one on the teachers and average the probabilities of the two; that
    is no linear head, so it could not be exported as one. Both kinds of loss train the head that is deployed, and its
    distributions choose.

    Raises:
        CompressionError: the train split has no labels to look up.
    """
    if (training.dataset.train.labels < 0).all():
        raise CompressionError(
            f"Data set '{training.dataset.name}' has 0 labelled train samples, expected some, because procedure "
            "'active' looks labels up. Set labels to all, or take another procedure."
        )
    dataset, train = training.dataset, training.config.train
    short = train.model_copy(update={"epochs": round_epochs or max(1, train.epochs // 4)})
    asked = dataset.num_classes if queries is None else queries
    start = copy.deepcopy(training.student)
    rows, parts = first_labelled(dataset.train.labels, seed=training.seed), []
    for number in range(1, rounds + 1):
        last = number == rounds
        student = training.student if last else copy.deepcopy(start)
        part = _telling(training, labelled=len(rows)).run(
            student,
            name=f"round-{number}",
            train=train if last else short,
            losses=balanced(
                training.config.weighted_losses,
                labelled=len(rows),
                samples=len(dataset.train.labels),
                batch_size=train.batch_size,
            ),
            dataset=masked(dataset, rows),
        )
        parts.append(History([row | {"labelled": len(rows)} for row in part.rows]))
        logger.info("Round %d of %d used %d of %d labels.", number, rounds, len(rows), len(dataset.train.labels))
        if not last:
            probs = predict(student, dataset.train, dataset.preprocessing).softmax(dim=1)
            rows = torch.cat([rows, _chosen(probs, dataset.train.labels, rows, asked)])
    return joined(*parts)


def _chosen(probs: Tensor, labels: Tensor, labelled: Tensor, count: int) -> Tensor:
    """Rows to label next: of those that have a label and are not labelled yet, as many as are left."""
    free = labels >= 0
    free[labelled] = False
    pool = free.nonzero().squeeze(1)
    return pool[k_centre_greedy(probs[pool], probs[labelled], min(count, len(pool)))]


def _telling(training: Training, *, labelled: int) -> Training:
    """The training, whose ``on_epoch`` also hears of the number of labels."""
    on_epoch = training.on_epoch
    if on_epoch is None:
        return training

    def told(row: Row) -> None:
        on_epoch(row | {"labelled": labelled})

    return replace(training, on_epoch=told)


class Active(Frozen):
    """A small budget of labels, spent on the samples whose predictions are least like those labelled before."""

    kind: Literal["active"] = "active"
    rounds: Annotated[int, Field(gt=0)] = 4
    """Trainings; between two of them labels are bought. The first has one label per class."""
    queries: Annotated[int, Field(gt=0)] | None = None
    """Labels bought between two rounds; as many as there are classes when None."""
    round_epochs: Annotated[int, Field(gt=0)] | None = None
    """Epochs of every round but the last, which has all of ``train.epochs``; a quarter of them when None."""

    needs_teachers: ClassVar[bool] = False
    """Whether the teachers themselves are needed, beside what they said."""
    card: ClassVar[MethodCard] = MethodCard(
        name="Active distillation (ActiveKD, PCoreSet)",
        paper="Kang et al. 2025, PCoreSet: Effective Active Learning through Knowledge Distillation from "
        "Vision-Language Models, arXiv:2506.00910",
        summary="Uses the labels of few samples: one per class, then in rounds those whose predicted distribution is "
        "farthest from all labelled ones. All samples learn from the teachers. Shows what a labelling budget is worth.",
        needs="A panel that knows the task without these labels, losses of labels and of teachers, and someone to "
        "label; here the labels of the train split, of which no others are looked at.",
        cost="By default each round but the last adds a quarter of a training and a pass over the train split.",
        evidence="Measured on our data: see `measured`.",
    )

    def build(self) -> ProcedureFn:
        """Return the procedure."""
        return partial(active, rounds=self.rounds, queries=self.queries, round_epochs=self.round_epochs)
