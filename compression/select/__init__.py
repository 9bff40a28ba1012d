"""Teacher selection: score every teacher, rank them, take a panel."""

from collections.abc import Mapping
from typing import Literal

from pydantic import PositiveInt
from torch import Tensor

from compression.errors import CompressionError
from compression.select.nll import Nll
from compression.select.tmi import Tmi
from compression.teacher_outputs import StoredOutputs
from compression.types import Frozen

AnySelector = Nll | Tmi
"""Ways to score a teacher."""


class SelectConfig(Frozen):
    """How the panel is chosen."""

    panel_size: PositiveInt = 2
    """Teachers in the panel."""
    rank_by: Literal["nll", "tmi"] = "nll"
    """Score that decides; all scores are shown."""
    selectors: tuple[AnySelector, ...] = (Nll(), Tmi())
    """Scores that are computed."""


class SelectionReport(Frozen):
    """All scores, all ranks, and the panel."""

    rank_by: str
    scores: dict[str, dict[str, float]]
    """Selector -> teacher -> score; higher is better."""
    ranks: dict[str, dict[str, int]]
    """Selector -> teacher -> rank, 1 is best."""
    panel: tuple[str, ...]
    """Chosen teachers, best first."""


def rank_teachers(outputs: Mapping[str, StoredOutputs], labels: Tensor, config: SelectConfig) -> SelectionReport:
    """Score teachers on the validation split, labels int64 [N]; ties keep the recipe's order.

    Raises:
        CompressionError: the deciding score is not among the selectors, or the panel is larger than the field.
    """
    selectors = {selector.kind: selector.build() for selector in config.selectors}
    if config.rank_by not in selectors:
        raise CompressionError(
            f"Selection ranks by '{config.rank_by}', expected one of the selectors {sorted(selectors)}. "
            "Add it to select.selectors."
        )
    if config.panel_size > len(outputs):
        raise CompressionError(
            f"Panel has size {config.panel_size}, expected at most {len(outputs)} teachers. Lower it."
        )
    scores = {
        kind: {
            name: score(stored.validation_features, stored.validation_logits, labels)
            for name, stored in outputs.items()
        }
        for kind, score in selectors.items()
    }
    order = {kind: sorted(row, key=lambda name, row=row: -row[name]) for kind, row in scores.items()}
    ranks = {kind: {name: names.index(name) + 1 for name in outputs} for kind, names in order.items()}
    return SelectionReport(
        rank_by=config.rank_by,
        scores=scores,
        ranks=ranks,
        panel=tuple(order[config.rank_by][: config.panel_size]),
    )


__all__ = ["AnySelector", "Nll", "SelectConfig", "SelectionReport", "Tmi", "rank_teachers"]
