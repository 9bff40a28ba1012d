"""What every filter promises: a score that says before training how good a candidate will be."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import nn

from compression.card import MethodCard
from compression.models import ModelSpec
from compression.search.space import Workshop
from compression.search.trials import TrialResult
from compression.types import Frozen


class Filter(Frozen):
    """Base of every filter: candidates with a low score are rows of the study that were never trained."""

    keep: float = Field(default=0.5, gt=0.0, le=1.0)
    """Share of scored candidates that is trained: those at or above this share of the scores so far."""
    first: int = Field(default=2, ge=1)
    """So many candidates are trained whatever their score, so that there is something to compare with."""

    card: ClassVar[MethodCard]

    def check(self, shop: Workshop) -> None:
        """Nothing, when it has what it needs.

        Raises:
            CompressionError: it has not.
        """
        del shop

    @abstractmethod
    def score(
        self, model: nn.Module, spec: ModelSpec, row: TrialResult, rows: Sequence[TrialResult], shop: Workshop
    ) -> float | None:
        """How good the candidate will be, higher is better, as a function of the arguments; None: cannot say, train it.

        Args:
            model: as its trial would start from it, eval mode; left as it was.
            spec: rebuilds it.
            row: what is known: choices, macs, params, size_bytes, latency_p50_ms.
            rows: the outcomes so far.
            shop: of the study.
        """

    def passes(self, score: float, earlier: Sequence[float]) -> bool:
        """Whether a candidate with this score is trained, given the scores of those before it."""
        if len(earlier) < self.first:
            return True
        better = sum(other > score for other in earlier)
        return better < self.keep * (len(earlier) + 1)
