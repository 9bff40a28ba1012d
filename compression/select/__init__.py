"""Teacher selection: score every teacher, rank them, take a panel."""

from collections.abc import Mapping
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from pydantic import PositiveInt
from torch import Tensor

from compression.errors import CompressionError
from compression.select.black_box import BlackBox
from compression.select.nll import Nll
from compression.select.osborn import Osborn
from compression.select.ped import Ped
from compression.select.tmi import Tmi
from compression.teacher_outputs import StoredOutputs
from compression.types import Frozen

AnySelector = Nll | Tmi | Ped | Osborn | BlackBox
"""Ways to score a teacher."""


@runtime_checkable
class RanksSets(Protocol):
    """A selector whose view of a teacher depends on those already picked: it orders them all at once."""

    def order(self, outputs: Mapping[str, StoredOutputs], labels: Tensor) -> dict[str, float]:
        """Return teacher -> score in the order of picks, best first; labels int64 [N] of the validation split."""
        ...


class SelectConfig(Frozen):
    """How the panel is chosen."""

    panel_size: PositiveInt = 2
    """Teachers in the panel."""
    rank_by: Literal["nll", "tmi", "ped", "osborn", "black_box"] = "nll"
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
    agreement: dict[str, dict[str, float]] = {}
    """Selector -> other selector -> Spearman's rank correlation of their scores, -1 to 1; with fewer than three
    teachers none, and none of a selector to which all are alike."""


def rank_teachers(outputs: Mapping[str, StoredOutputs], labels: Tensor, config: SelectConfig) -> SelectionReport:
    """Score teachers on the validation split, labels int64 [N]; ties keep the recipe's order.

    Raises:
        CompressionError: the deciding score is not among the selectors, or the panel is larger than the field.
    """
    selectors = {selector.kind: selector for selector in config.selectors}
    if config.rank_by not in selectors:
        raise CompressionError(
            f"Selection ranks by '{config.rank_by}', expected one of the selectors {sorted(selectors)}. "
            "Add it to select.selectors."
        )
    if config.panel_size > len(outputs):
        raise CompressionError(
            f"Panel has size {config.panel_size}, expected at most {len(outputs)} teachers. Lower it."
        )
    order: dict[str, list[str]] = {}
    scores: dict[str, dict[str, float]] = {}
    for kind, selector in selectors.items():
        found = _scores(selector, outputs, labels)
        order[kind] = list(found)
        scores[kind] = {name: found[name] for name in outputs}
    ranks = {kind: {name: names.index(name) + 1 for name in outputs} for kind, names in order.items()}
    return SelectionReport(
        rank_by=config.rank_by,
        scores=scores,
        ranks=ranks,
        panel=tuple(order[config.rank_by][: config.panel_size]),
        agreement=agreement(scores),
    )


def agreement(scores: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return Spearman's rank correlation between the scores of every two selectors; ties share their mean rank.

    Pairs without one are left out: fewer than three teachers, or a selector that gives all of them the same score.
    """
    from scipy.stats import rankdata

    centred: dict[str, np.ndarray] = {}
    for kind, row in scores.items():
        places = rankdata(list(row.values()))
        spread = places - places.mean()
        if len(row) >= 3 and spread.any():
            centred[kind] = spread / np.linalg.norm(spread)
    return {
        kind: {other: float(np.clip(mine @ theirs, -1, 1)) for other, theirs in centred.items() if other != kind}
        for kind, mine in centred.items()
        if len(centred) > 1
    }


def _scores(selector: AnySelector, outputs: Mapping[str, StoredOutputs], labels: Tensor) -> dict[str, float]:
    """Return teacher -> score, best first."""
    if isinstance(selector, RanksSets):
        return selector.order(outputs, labels)
    score = selector.build()
    row = {
        name: score(stored.validation_features, stored.validation_logits, labels) for name, stored in outputs.items()
    }
    return dict(sorted(row.items(), key=lambda item: -item[1]))


__all__ = [
    "AnySelector",
    "BlackBox",
    "Nll",
    "Osborn",
    "Ped",
    "RanksSets",
    "SelectConfig",
    "SelectionReport",
    "Tmi",
    "agreement",
    "rank_teachers",
]
