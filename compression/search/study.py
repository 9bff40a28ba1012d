"""The search stage: one multi-objective study over all spaces, by measured latency.

Deb et al. 2002, "A fast and elitist multiobjective genetic algorithm: NSGA-II" (doi:10.1109/4235.996017),
through Optuna. Objectives: validation accuracy after a short distillation, measured latency, weights' size.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from compression import profile
from compression.augment import normalise
from compression.card import MethodCard
from compression.data.dataset import Dataset
from compression.errors import CompressionError
from compression.models import ModelSpec
from compression.search.candidate import (
    Candidates,
    TrainTrial,
    attempt,
    checked_latency,
    digest_of,
    genes_of,
    labels_of,
)
from compression.search.front import Prefer, choose_finalists, hypervolume, knee, pareto_front
from compression.search.ledger import Ledger, drawn, first_trials, opened
from compression.search.prune import Prune
from compression.search.scale import Scale
from compression.search.trials import TrialResult, write_trials
from compression.train import TrainConfig
from compression.types import Frozen

logger = logging.getLogger(__name__)

REJECTED_PER_TRIAL = 20  # infeasible and duplicate proposals allowed per trial of the budget
REJECTED_IN_A_ROW = 3  # after so many, the sampler is helped to a candidate nobody has proposed yet
CALIBRATION_IMAGES = 1024


class Study(Frozen):
    """Search all spaces together and hand the best candidates to the full distillation."""

    kind: Literal["study"] = "study"
    spaces: tuple[Prune | Scale, ...] = Field(min_length=1)
    """Where candidates come from."""
    trials: int = Field(default=16, ge=1, le=10_000)
    """How many candidates are trained; those over budget and duplicates do not count."""
    train: TrainConfig
    """The short distillation each candidate gets."""
    max_macs: Annotated[int, Field(gt=0)] | None = None
    """Most multiply-accumulates for one image."""
    max_macs_share: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Most multiply-accumulates as a share of the best teacher's."""
    max_latency_ms: Annotated[float, Field(gt=0.0)] | None = None
    """Highest p50 latency of one call at ``batch``."""
    max_size_kib: Annotated[float, Field(gt=0.0)] | None = None
    """Most kibibytes of float32 weights."""
    batch: int = Field(default=32, ge=1)
    """Images per call when latency is measured."""
    finalists: int = Field(default=1, ge=1)
    """How many candidates go on to the full distillation."""
    prefer: Prefer = "accuracy"
    """Which of the front go on first."""
    sampler: Literal["nsga2", "tpe"] = "nsga2"
    population: int = Field(default=8, ge=2)
    """Trials per generation of NSGA-II, and random trials before TPE starts."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Multi-objective study",
        paper="Deb et al. 2002, NSGA-II, doi:10.1109/4235.996017",
        summary="Breeds candidates from the best so far by accuracy, measured latency and size, "
        "across pruned teachers and scaled zoo networks alike.",
        needs="Teachers for their weights or outputs, and a machine to measure latency on.",
        cost="One short distillation and one latency measurement per trial.",
        evidence="Measured on Fashion-MNIST: MACs do not predict time, and a hand-made net can beat a pruned "
        "one in both objectives, so both kinds compete here.",
    )


@dataclass(frozen=True)
class StudyResult:
    """What a study found."""

    trials: tuple[TrialResult, ...]
    """Every proposal, by number, infeasible and failed ones too."""
    front: tuple[TrialResult, ...]
    """Trials no other one dominates, fastest first."""
    chosen: tuple[TrialResult, ...]
    """The finalists, in order."""
    knee: TrialResult
    hypervolume: float
    """Share of the box (accuracy 1, the best teacher's latency and size) that the front dominates, 0..1."""

    @property
    def finalists(self) -> tuple[Path, ...]:
        """Checkpoint folders of the finalists, in order: as they were before the short distillation."""
        return tuple(trial.checkpoint for trial in self.chosen if trial.checkpoint is not None)


def run_study(
    config: Study,
    *,
    parents: Mapping[str, tuple[nn.Module, ModelSpec]],
    dataset: Dataset,
    seed: int,
    latency_ms: Callable[[nn.Module], float],
    train_trial: TrainTrial,
    storage: Path,
    folder: Path,
    best_teacher: str | None = None,
    on_trial: Callable[[TrialResult], None] | None = None,
) -> StudyResult:
    """Every trial, the front and the finalists; ``folder`` gets trials.csv and their checkpoints.

    ``latency_ms`` gives the p50 of one call of ``config.batch`` images; ``best_teacher`` names the parent
    that ``max_macs_share`` and the hypervolume refer to. ``storage`` is an sqlite file: called again with the
    same arguments after a kill, the interrupted trial runs again with the same choices, finished ones do not.
    A candidate that fails is a row; an unusable store is raised, and the trial runs again next time.

    Raises:
        CompressionError: a parent is missing, the file is in use or of another study, or no trial completed.
    """
    spaces = labels_of(config.spaces)
    max_macs = _check(config, parents, best_teacher)
    candidates = Candidates(
        spaces,
        parents,
        dataset,
        seed,
        calibration=_calibration(config, dataset),
        max_macs=max_macs,
        max_size_bytes=None if config.max_size_kib is None else config.max_size_kib * 1024,
        max_latency_ms=config.max_latency_ms,
    )
    folder.mkdir(parents=True, exist_ok=True)
    genes = {label: genes_of(space) for label, space in spaces.items()}
    with opened(
        storage,
        genes,
        sampler=config.sampler,
        population=config.population,
        seed=seed,
        fingerprint=_fingerprint(config, parents, dataset, seed, best_teacher),
    ) as ledger:
        reference = _reference(ledger, parents, best_teacher, latency_ms)
        for space, choices in first_trials(genes):
            ledger.enqueue(space, choices)
        rows = ledger.rows(folder)
        while _wants_more(config, ledger, rows):
            proposal = ledger.ask()
            row, excess = attempt(proposal, candidates, rows, latency_ms, train_trial, folder)
            ledger.tell(row, excess=excess)
            rows = ledger.rows(folder)
            write_trials(folder / "trials.csv", _marked(rows), (), None)
            if on_trial is not None:
                on_trial(row)
    return _result(config, _marked(rows), reference, folder)


def _check(config: Study, parents: Mapping[str, tuple[nn.Module, ModelSpec]], best_teacher: str | None) -> int | None:
    """The MACs budget, None for none; raises when a name is unknown."""
    wanted = [space.parent for space in config.spaces if isinstance(space, Prune)]
    for name in [*wanted, *([best_teacher] if best_teacher is not None else [])]:
        if name not in parents:
            raise CompressionError(
                f"Search has parent '{name}', expected one of {', '.join(sorted(parents)) or 'no teachers'}. "
                "Name a teacher of the recipe."
            )
    limits = [config.max_macs] if config.max_macs is not None else []
    if config.max_macs_share is not None:
        if best_teacher is None:
            raise CompressionError(
                f"Search has max_macs_share {config.max_macs_share} and no best teacher, expected the "
                "name of one. Pass best_teacher, or set max_macs."
            )
        model, spec = parents[best_teacher]
        limits.append(math.floor(config.max_macs_share * profile.macs(model, spec.input_shape)))
    return min(limits, default=None)


def _calibration(config: Study, dataset: Dataset) -> tuple[Tensor, Tensor] | None:
    """Normalised calibration images and labels, when a criterion needs them."""
    if not any(isinstance(space, Prune) and space.criterion == "taylor" for space in config.spaces):
        return None
    split = dataset.calibration
    count = len(split.labels)
    spread = torch.linspace(0, count - 1, min(count, CALIBRATION_IMAGES)).long()
    return normalise(split.images[spread], dataset.preprocessing), split.labels[spread]


def _wants_more(config: Study, ledger: Ledger, rows: Sequence[TrialResult]) -> bool:
    """Whether another candidate is due; helps the sampler out of repeating itself."""
    spent = [row for row in rows if row.state in ("complete", "failed")]
    rejected = len(rows) - len(spent)
    if len(spent) >= config.trials:
        return False
    unseen = ledger.unseen(rows)
    if not unseen:
        logger.info("all candidates of all spaces were proposed after %d of %d trials", len(spent), config.trials)
        return False
    if rejected >= REJECTED_PER_TRIAL * config.trials:
        logger.warning("search ends after %d of %d trials: %d rejected", len(spent), config.trials, rejected)
        return False
    recent = [row.state for row in rows[-REJECTED_IN_A_ROW:]]
    if len(recent) == REJECTED_IN_A_ROW and all(state in ("infeasible", "duplicate") for state in recent):
        ledger.enqueue(*drawn(unseen, seed=len(rows)))
    return True


def _fingerprint(
    config: Study,
    parents: Mapping[str, tuple[nn.Module, ModelSpec]],
    dataset: Dataset,
    seed: int,
    best_teacher: str | None,
) -> str:
    """A hash over everything but how many trials and finalists are wanted."""
    used = {space.parent for space in config.spaces if isinstance(space, Prune)}
    used |= set() if best_teacher is None else {best_teacher}
    content = {
        "config": config.model_dump(mode="json", exclude={"trials", "finalists", "prefer"}),
        "parents": {name: digest_of(*parents[name]) for name in sorted(used)},
        "data": dict(sorted(dataset.hashes.items())),
        "seed": seed,
        "best_teacher": best_teacher,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _reference(
    ledger: Ledger,
    parents: Mapping[str, tuple[nn.Module, ModelSpec]],
    best_teacher: str | None,
    latency_ms: Callable[[nn.Module], float],
) -> tuple[float, float] | None:
    """Latency and bytes of the best teacher, measured once per study; None without one."""
    if best_teacher is None:
        return None
    if (known := ledger.note("reference")) is None:
        model, _ = parents[best_teacher]
        known = [checked_latency(latency_ms(model)), profile.state_bytes(model)]
        ledger.set_note("reference", known)
    return float(known[0]), float(known[1])


def _marked(rows: Sequence[TrialResult]) -> list[TrialResult]:
    """The rows with ``on_front`` set."""
    numbers = {trial.number for trial in pareto_front(rows)}
    return [replace(row, on_front=row.number in numbers) for row in rows]


def _result(config: Study, rows: list[TrialResult], reference: tuple[float, float] | None, folder: Path) -> StudyResult:
    front, compromise = pareto_front(rows), knee(rows)
    chosen = choose_finalists(rows, count=config.finalists, prefer=config.prefer)
    write_trials(folder / "trials.csv", rows, chosen, compromise)
    if compromise is None:
        reasons = "; ".join(sorted({f"{row.state}: {row.reason}" for row in rows if row.state != "duplicate"})[:5])
        raise CompressionError(
            f"Search has 0 complete candidates of {len(rows)} proposals, expected at least one ({reasons}). "
            "Widen the budget or the spaces; every row is in trials.csv."
        )
    points = [trial.objectives for trial in front]
    if reference is None:  # no teacher to compare with: the worst of the front, a little widened
        reference = (max(p[1] for p in points) * 1.1, max(p[2] for p in points) * 1.1)
    return StudyResult(tuple(rows), front, chosen, compromise, hypervolume(points, (1.0, *reference)))
