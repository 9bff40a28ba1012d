"""A look at the weights a candidate starts with: how often it is right before anything was trained."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import nn

from compression.card import MethodCard
from compression.metrics import predict
from compression.models import ModelSpec
from compression.search.filters.look import Filter
from compression.search.space import Workshop
from compression.search.trials import TrialResult


class Inherited(Filter):
    """Trains the candidates alone whose inherited weights are among the best so far.

    The search without retraining of AutoDistil, which ranks the sub-networks of a trained supernet by a held-out loss;
    here by validation accuracy, which is what trials are judged by, and the best ones are then trained.
    """

    kind: Literal["inherited"] = "inherited"
    spaces: tuple[str, ...] = ()
    """Labels of the spaces to look at, or how they begin, e.g. ``subnets``; candidates of others are trained without a
    look, as fresh networks should be. Empty looks at all."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Accuracy of inherited weights",
        paper="Xu et al. 2022, AutoDistil, arXiv:2201.12507 (search without retraining)",
        summary="Measures a candidate on the validation split as it was built and trains it only if it is among the "
        "better ones so far.",
        needs="Candidates that start with weights worth measuring: of a supernet, or lightly pruned.",
        cost="One forward pass over the validation split per candidate.",
        evidence="Measured on Fashion-MNIST only as the filter of a supernet: see `measured` of space subnets.",
    )

    def score(
        self, model: nn.Module, spec: ModelSpec, row: TrialResult, rows: Sequence[TrialResult], shop: Workshop
    ) -> float | None:
        del rows
        if self.spaces and not row.space.startswith(self.spaces):
            return None
        split = shop.dataset.validation
        logits = predict(model, split, spec.preprocessing)
        return float((logits.argmax(dim=1) == split.labels).double().mean())
