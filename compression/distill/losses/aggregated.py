"""Meta-DMoE: a small transformer reads all teachers' features, and the student's features follow what it made of them.

Legend: K teachers, B batch, C classes, D width of the student's penultimate features, Dt of a teacher's, W width of
the aggregator.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from compression.card import MethodCard
from compression.distill.mixture import check_classes, check_features
from compression.distill.types import Helper, LossFn, Needs, Shapes, widened
from compression.types import Frozen, Outputs, TeacherOutputs


def standardised(values: Tensor) -> Tensor:
    """Return each row of [B,W] with mean 0 and variance 1; a constant row becomes 0."""
    return F.layer_norm(values, values.shape[-1:])


def adapted(weight: Tensor, bias: Tensor, features: Tensor, target: Tensor, *, rate: float) -> tuple[Tensor, Tensor]:
    """Return weight [W,D] and bias [W] of a linear layer after one gradient step towards ``target``.

    The step descends |weight f + bias - t|^2 / (2 D), batch mean, for features f [B,D] and targets t [B,W]. It is
    spelt out, so that gradients reach everything it was made of, the target too. With standardised features a rate
    of 1 about closes the gap of a single sample, and 0 changes nothing.
    """
    gap = F.linear(features, weight, bias) - target
    scale = rate / (features.shape[0] * features.shape[1])
    return weight - scale * gap.T @ features, bias - scale * gap.sum(dim=0)


def halves(hardness: Tensor) -> tuple[Tensor, Tensor]:
    """Return two halves of the batch by position, int64: every other sample of [B] by rank, and the rest.

    Going by rank makes the halves alike and independent of the order of the batch. A batch of one is both halves.
    """
    order = hardness.detach().argsort(stable=True)
    return order[::2], order[1::2] if len(order) > 1 else order


class Aggregator(nn.Module):
    """One pre-norm transformer layer over the experts of a sample, without positions, and their mean.

    Every expert has a projection of its own; apart from that their order does not matter.
    """

    def __init__(self, widths: Sequence[int], *, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(each, width) for each in widths)
        self.layer = nn.TransformerEncoderLayer(
            width, heads, 2 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )

    def forward(self, features: Sequence[Tensor], present: Tensor) -> Tensor:
        """Return a standardised summary [B,W] of standardised features, K of [B,Dt], where ``present``, bool [K,B]."""
        experts = zip(self.projections, features, strict=True)
        tokens = torch.stack([projection(standardised(each)) for projection, each in experts], dim=1)  # [B,K,W]
        mixed = self.layer(tokens, src_key_padding_mask=~present.T)
        share = present.T.to(mixed.dtype) / present.sum(dim=0).unsqueeze(-1)
        return standardised((share.unsqueeze(-1) * mixed).sum(dim=1))


class AggregatedExperts(Helper):
    """The aggregator's own loss, and the distance of the student's adapted features, in float32 under autocast too.

    Zhong et al. 2022 (arXiv:2210.03885). Three terms: the cross entropy of the aggregator's linear head;
    ``follow`` times the squared distance, a mean over the width, of the student's features behind a linear adapter
    from the aggregator's output, which gets no gradient from it; and ``meta`` times a cross entropy after adaptation.
    For that one the adapter makes a gradient step (:func:`adapted`) on one half of the batch towards the aggregator,
    and the other half is classified through it by the aggregator's head. Its gradient passes through the step, so
    that the aggregator learns to say what helps, and reaches the student, adapter and head. A teacher with weight 0
    for a sample is left out of its attention and mean; otherwise the weights do not matter. No gradient reaches the
    teachers.

    Ours: the inner step moves the adapter alone, where the paper moves the whole student and adapts it again, without
    labels, to each new domain. One optimiser trains all parts in one stage. Features and the aggregator's output are
    standardised per sample. Halves go by rank of the aggregator's cross entropy, and a batch of one is both of them.
    """

    def __init__(
        self, *, width: int, heads: int, dropout: float, follow: float, meta: float, inner_rate: float
    ) -> None:
        super().__init__()
        self.width, self.heads, self.dropout = width, heads, dropout
        self.follow, self.meta, self.inner_rate = follow, meta, inner_rate

    def prepare(self, shapes: Shapes) -> None:
        """Make the aggregator, its head and the student's adapter."""
        self.widths = shapes.teacher_widths
        self.aggregator = Aggregator(self.widths, width=self.width, heads=self.heads, dropout=self.dropout)
        self.head = nn.Linear(self.width, shapes.num_classes)
        self.adapter = nn.Linear(shapes.student_width, self.width)

    def forward(self, student: Outputs, teachers: TeacherOutputs, labels: Tensor) -> Tensor:
        """Return the loss, batch mean.

        Args:
            student: penultimate features [B,D]; of its logits [B,C] the shape alone is looked at.
            teachers: features, K of [B,Dt], weights [K,B]; of its logits [K,B,C] the shape alone is looked at.
            labels: int64 [B].

        Raises:
            ShapeError: the teachers have other classes or widths than announced.
        """
        check_classes(student.logits, teachers)
        given = widened(student.features["penultimate"])
        check_features(given, teachers, self.widths)
        with torch.autocast(given.device.type, enabled=False):
            features = standardised(given)
            target = self.aggregator([widened(each.detach()) for each in teachers.features], teachers.weights > 0)
            hardness = F.cross_entropy(self.head(target), labels, reduction="none")
            gap = (self.adapter(features) - target.detach()).square().mean()
            loss = hardness.mean() + self.follow * gap
            if self.inner_rate > 0:
                loss = loss + self.meta * self.after_adaptation(features, target, labels, *halves(hardness))
        return loss

    def after_adaptation(
        self, features: Tensor, target: Tensor, labels: Tensor, support: Tensor, query: Tensor
    ) -> Tensor:
        """Return the cross entropy of the ``query`` samples once the adapter has stepped on the ``support`` ones.

        Args:
            features: standardised, of the student [B,D].
            target: output of the aggregator [B,W].
            labels: int64 [B].
            support: positions in the batch, int64.
            query: the same.
        """
        weight, bias = adapted(
            self.adapter.weight, self.adapter.bias, features[support], target[support], rate=self.inner_rate
        )
        return F.cross_entropy(self.head(F.linear(features[query], weight, bias)), labels[query])


class Aggregated(Frozen):
    """Distance of the student's features from a learnt summary of the teachers'."""

    kind: Literal["aggregated"] = "aggregated"
    weight: Annotated[float, Field(ge=0)] = 1.0
    """Factor of this term in the sum."""
    width: Annotated[int, Field(ge=2, le=4096)] = 128
    """Numbers in the aggregator's summary of a sample."""
    heads: Annotated[int, Field(ge=1, le=64)] = 4
    """Attention heads of the aggregator; a divisor of ``width``."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of values the aggregator drops in training."""
    follow: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the distance between the student's adapted features and the summary."""
    meta: Annotated[float, Field(ge=0)] = 1.0
    """Factor of the cross entropy after adaptation."""
    inner_rate: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of its gap to the summary that a lone sample closes in the inner step; 0 leaves out the meta term."""

    needs: ClassVar[Needs] = Needs(
        student_features=True,
        teacher_features=True,
        labels=True,
        another_term="it shapes features and does not train the student's own classifier",
    )
    card: ClassVar[MethodCard] = MethodCard(
        name="Aggregated experts (Meta-DMoE)",
        paper="Zhong et al. 2022, Meta-DMoE: Adapting to Domain Shift by Meta-Distillation from Mixture-of-Experts, "
        "arXiv:2210.03885",
        summary="Research: a one-layer transformer, trained on the labels, sums up the teachers' features; the "
        "student's features follow it, and it learns through one step of theirs what helps them. For several teachers "
        "whose features mean different things; without the paper's adaptation to new domains.",
        needs="Labels, stored penultimate features of every teacher, and another term that trains the student's "
        "classifier, say cross_entropy.",
        cost="Stored features, and a transformer layer over as many tokens as teachers during training; nothing "
        "afterwards.",
        evidence="Measured on our data: see `measured`.",
    )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "Aggregated":
        if self.width % self.heads:
            raise ValueError(
                f"aggregated has heads {self.heads}, expected a divisor of width {self.width}. Change one of them."
            )
        return self

    def build(self) -> LossFn:
        """Return the loss, without its weight."""
        return AggregatedExperts(
            width=self.width,
            heads=self.heads,
            dropout=self.dropout,
            follow=self.follow,
            meta=self.meta,
            inner_rate=self.inner_rate,
        )
