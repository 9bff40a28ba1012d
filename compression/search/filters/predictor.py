"""A predictor of accuracy, fitted to the trials of earlier studies and of this one.

After AIO-P (Mills et al. 2023, arXiv:2211.17228): accuracies of networks of all sizes and tasks are made comparable by
dividing them by the order of magnitude of the FLOPs and standardising them over a reference sample.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field
from torch import nn

from compression.card import MethodCard
from compression.models import ModelSpec
from compression.search.bank import PastTask, features_at, features_of, task_of
from compression.search.filters.look import Filter
from compression.search.space import Workshop
from compression.search.task_embedding import write_json
from compression.search.trials import TrialResult

logger = logging.getLogger(__name__)

THIS_STUDY = "this study"
FEWEST_OF_A_SAMPLE = 5
"""So many trials make a reference sample; a study that has as many is no longer new to the predictor."""
FEWEST_TO_RANK = 4
"""A study with fewer trials says nothing about how well they are ranked."""
MOST_LEFT_OUT = 40
"""Of up to so many trials each is left out by itself; of more, a tenth at a time."""
FOLDS = 10
GROWTH = 20
"""The predictor is fitted again when its trials grew by about 1 / GROWTH."""


@dataclass(frozen=True)
class Known:
    """A trained candidate as the predictor sees it."""

    study: str
    task: str
    """Hash of the data."""
    family: str
    """First word of its space's label, say ``prune``."""
    facts: Mapping[str, float]
    """Features of the candidate, and of the data."""
    flops: float
    accuracy: float = math.nan
    """Share, 0..1; unknown before it is trained."""


def per_magnitude(accuracy: float, flops: float) -> float:
    """``accuracy / (log10(flops + 1) + 1)``."""
    return accuracy / (math.log10(flops + 1.0) + 1.0)


@dataclass(frozen=True)
class Reference:
    """Mean and standard deviation of ``per_magnitude`` over a reference sample."""

    mean: float
    std: float

    @classmethod
    def of(cls, sample: Sequence[Known]) -> "Reference":
        """That of some trials, at least one; no spread counts as 1."""
        values = np.array([per_magnitude(known.accuracy, known.flops) for known in sample])
        return cls(float(values.mean()), float(values.std()) or 1.0)

    @classmethod
    def mean_of(cls, references: Sequence["Reference"]) -> "Reference":
        """That of a study which is as the average of some."""
        count = len(references)
        return cls(sum(each.mean for each in references) / count, sum(each.std for each in references) / count)

    def standardised(self, accuracy: float, flops: float) -> float:
        """What the trees learn."""
        return (per_magnitude(accuracy, flops) - self.mean) / self.std

    def restored(self, target: float, flops: float) -> float:
        """The accuracy that ``standardised`` turned into ``target``."""
        return (target * self.std + self.mean) * (math.log10(flops + 1.0) + 1.0)


class Fitted:
    """Gradient-boosted trees on the facts all trials have, and on the family.

    The reference sample of a trial is its study: one task, one schedule. A study with too few trials, or none yet, has
    the mean reference of the studies of its task, or of all. One sample of trials from several studies would not do:
    its spread is mostly that between studies, which turns the ranks within a study around.
    """

    def __init__(self, sample: Sequence[Known], *, seed: int) -> None:
        """Fits at once; ``sample`` has two trials at least."""
        from sklearn.ensemble import HistGradientBoostingRegressor

        self._facts = sorted(set.intersection(*(set(known.facts) for known in sample)))
        self._families = sorted({known.family for known in sample})
        self._references = _references(sample)
        self._tasks = {known.study: known.task for known in sample}
        boosting: Any = HistGradientBoostingRegressor
        self._trees = boosting(
            max_leaf_nodes=8,
            min_samples_leaf=min(20, max(2, len(sample) // 10)),
            early_stopping=False,
            random_state=seed,
        ).fit(
            self._table(sample), [self.reference(known).standardised(known.accuracy, known.flops) for known in sample]
        )

    def reference(self, known: Known) -> Reference:
        """The reference of a trial's study."""
        if known.study in self._references:
            return self._references[known.study]
        alike = [found for study, found in self._references.items() if self._tasks.get(study) == known.task]
        return Reference.mean_of(alike or list(self._references.values()))

    def accuracies(self, candidates: Sequence[Known]) -> list[float]:
        """Predicted accuracies; not clipped to 0..1."""
        targets = self._trees.predict(self._table(candidates))
        return [
            self.reference(known).restored(float(target), known.flops)
            for known, target in zip(candidates, targets, strict=True)
        ]

    def _table(self, sample: Sequence[Known]) -> np.ndarray:
        return np.array(
            [
                [known.facts.get(name, math.nan) for name in self._facts]
                + [float(known.family == family) for family in self._families]
                for known in sample
            ]
        )


def _references(sample: Sequence[Known]) -> dict[str, Reference]:
    """By study; all trials make one where no study has enough."""
    groups: dict[str, list[Known]] = {}
    for known in sample:
        groups.setdefault(known.study, []).append(known)
    found = {study: Reference.of(group) for study, group in groups.items() if len(group) >= FEWEST_OF_A_SAMPLE}
    return found or {"": Reference.of(sample)}


def rank_correlation(left: Sequence[float], right: Sequence[float]) -> float:
    """Spearman's, -1..1; 0 when one of them is constant."""
    from scipy import stats

    if len(set(left)) < 2 or len(set(right)) < 2:
        return 0.0
    found: Any = stats.spearmanr(left, right)
    return float(found.statistic)


def held_out_correlation(sample: Sequence[Known], parts: Sequence[int], *, seed: int) -> float | None:
    """How well trials are ranked within their study when the part they belong to was not fitted, -1..1.

    The mean over studies, weighted by their trials; None where there are no two parts or no study can be ranked.
    """
    studies: dict[str, list[int]] = {}
    for place, known in enumerate(sample):
        studies.setdefault(known.study, []).append(place)
    ranked = [places for places in studies.values() if len(places) >= FEWEST_TO_RANK]
    if len(set(parts)) < 2 or not ranked:
        return None
    predicted = [math.nan] * len(sample)
    for part in sorted(set(parts)):
        inside = [place for place, of in enumerate(parts) if of == part]
        rest = [known for known, of in zip(sample, parts, strict=True) if of != part]
        if len(rest) < 2:
            return None
        found = Fitted(rest, seed=seed).accuracies([sample[place] for place in inside])
        for place, accuracy in zip(inside, found, strict=True):
            predicted[place] = accuracy
    weighted = [
        len(places) * rank_correlation([predicted[at] for at in places], [sample[at].accuracy for at in places])
        for places in ranked
    ]
    return sum(weighted) / sum(len(places) for places in ranked)


def parts_by_trial(sample: Sequence[Known], *, seed: int) -> list[int]:
    """Every trial a part of its own; ``FOLDS`` random parts where there are more than ``MOST_LEFT_OUT``."""
    if len(sample) <= MOST_LEFT_OUT:
        return list(range(len(sample)))
    return [int(place) % FOLDS for place in np.random.default_rng(seed).permutation(len(sample))]


def parts_by_study(sample: Sequence[Known]) -> list[int]:
    """Every study a part of its own; ``FOLDS`` groups of studies where there are more."""
    place = {study: number % FOLDS for number, study in enumerate(sorted({known.study for known in sample}))}
    return [place[known.study] for known in sample]


@dataclass(frozen=True)
class Report:
    """How far the predictor can be trusted; what ``predictor.json`` holds."""

    trials: int
    """That it was fitted to."""
    own: int
    """Of these, of this study."""
    studies: int
    """This one included once it has trials."""
    leave_one_out: float | None
    """Mean rank correlation within studies; each trial predicted from the others."""
    leave_one_study_out: float | None
    """The same, each study predicted from the others: what a new study may expect. None with one study."""
    used: bool
    reason: str
    """Why it is used, or not."""


class Predictor(Filter):
    """Predicts a candidate's accuracy from its structure; trains it untried while too little is known to say.

    Differs from the paper: trees on features of the structure in place of a graph network with adapters, and the
    accuracy as a share: over a reference sample of one study, one relative to the teacher gives the same targets.
    Latency is no feature, since other studies ran on other machines. The score is accuracy alone, so that a small
    ``keep`` favours large candidates.
    """

    kind: Literal["predictor"] = "predictor"
    min_trials: int = Field(default=20, ge=8)
    """Trained candidates, of earlier studies and this one, below which it does not say anything."""
    min_correlation: float = Field(default=0.3, ge=-1.0, le=1.0)
    """Rank correlation on trials it was not fitted to, below which it does not say anything: that of studies left out
    while this one is new, that of trials left out later."""

    wants_past: ClassVar[bool] = True
    """Whether the trials of earlier studies are of use."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Performance predictor from past trials (AIO-P)",
        paper="Mills et al. 2023, AIO-P, arXiv:2211.17228",
        summary="Research: predicts the accuracy of a candidate from its structure by trees fitted to the trials of "
        "all earlier studies and of this one, and leaves the lower ones out; silent while it ranks badly.",
        needs="About 20 trained candidates of earlier studies or this one.",
        cost="One forward pass of one image a candidate, and a few seconds when the trees are fitted again.",
        evidence="The paper reports a mean absolute error below 1 % and rank correlations above 0.5 across tasks, with "
        "graph networks. Not measured on our data yet.",
    )

    def score(
        self, model: nn.Module, spec: ModelSpec, row: TrialResult, rows: Sequence[TrialResult], shop: Workshop
    ) -> float | None:
        """The predicted accuracy; None while there are too few trials or it ranks them badly.

        Writes ``predictor.json`` into the shop's folder whenever it is fitted again. Trials of other workers, whose
        checkpoints are not in this one's folder, are not learnt from.
        """
        features = features_of(model, spec)
        shop.memory.setdefault("predictor features", {})[row.digest] = features
        fitted = self._fitted(rows, shop)
        if fitted is None:
            return None
        task = task_of(shop.dataset)
        candidate = _known(THIS_STUDY, task, row.space, features, row.macs or 0)
        return fitted.accuracies([candidate])[0]

    def _fitted(self, rows: Sequence[TrialResult], shop: Workshop) -> Fitted | None:
        """The predictor as far as it is known; None while it cannot say."""
        own = _own(rows, shop)
        known = self._past(rows, shop)
        own = own[: _milestone(len(known), len(own))]
        seen, earlier = shop.memory.get("predictor", (None, None))
        if seen == (now := (len(known), tuple(number for number, _ in own))):
            return earlier
        sample = [*known, *(each for _, each in own)]
        report, found = self._judged(sample, len(own), seed=shop.seed)
        write_json(shop.folder / "predictor.json", asdict(report))
        if seen is None or (earlier is None) != (found is None):
            logger.info("predictor: %s", report.reason)
        shop.memory["predictor"] = (now, found)
        return found

    def _judged(self, sample: Sequence[Known], own: int, *, seed: int) -> tuple[Report, Fitted | None]:
        studies = len({known.study for known in sample})
        if len(sample) < self.min_trials:
            reason = f"not used, {len(sample)} trials are fewer than {self.min_trials}"
            return Report(len(sample), own, studies, None, None, False, reason), None
        by_trial = held_out_correlation(sample, parts_by_trial(sample, seed=seed), seed=seed)
        by_study = held_out_correlation(sample, parts_by_study(sample), seed=seed)
        new = own < FEWEST_OF_A_SAMPLE and by_study is not None
        found, left_out = (by_study, "studies") if new else (by_trial, "trials")
        used = found is not None and found >= self.min_correlation
        reason = (
            f"{'used' if used else 'not used'}, its rank correlation on {left_out} left out is "
            f"{'unknown' if found is None else f'{found:.2f}'}, wanted is {self.min_correlation:.2f}"
        )
        report = Report(len(sample), own, studies, by_trial, by_study, used, reason)
        return report, Fitted(sample, seed=seed) if used else None

    def _past(self, rows: Sequence[TrialResult], shop: Workshop) -> list[Known]:
        """Trials of earlier studies; those that this study has itself, since it was run before, are left out."""
        here = task_of(shop.dataset).data_hash
        own = [(row.space, row.choices, row.accuracy) for row in rows if row.state == "complete"]
        return [
            _known(past.study, past.task, past.space, past.features, past.macs, past.accuracy)
            for past in shop.past
            if past.features and not (past.task.data_hash == here and (past.space, past.choices, past.accuracy) in own)
        ]


def _own(rows: Sequence[TrialResult], shop: Workshop) -> list[tuple[int, Known]]:
    """Numbers and facts of this study's trained candidates."""
    features: dict[str, dict[str, float] | None] = shop.memory.setdefault("predictor features", {})
    task = task_of(shop.dataset)
    found: list[tuple[int, Known]] = []
    for row in rows:
        if row.state != "complete" or row.accuracy is None or row.macs is None:
            continue
        if features.get(row.digest) is None:
            features[row.digest] = features_at(row.checkpoint)
        known = features[row.digest]
        if known is not None:
            found.append((row.number, _known(THIS_STUDY, task, row.space, known, row.macs, row.accuracy)))
    return found


def _known(
    study: str, task: PastTask, space: str, features: Mapping[str, float], macs: int, accuracy: float = math.nan
) -> Known:
    data = {
        "classes": float(task.classes),
        "train_images": float(task.train_images),
        "channels": float(task.input_shape[0]),
        "pixels": float(task.input_shape[1] * task.input_shape[2]),
    }
    return Known(study, task.data_hash, space.partition("-")[0], data | dict(features), 2.0 * macs, accuracy)


def _milestone(past: int, own: int) -> int:
    """So many of its own trials are learnt from: all, or as many as made the last growth worth a new fit."""
    reached = 0
    while (following := reached + max(1, (past + reached) // GROWTH)) <= own:
        reached = following
    return reached
