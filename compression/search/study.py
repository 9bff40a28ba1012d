"""The search stage: one multi-objective study over all spaces, by measured latency.

Samplers propose candidates, a filter may look at them before they are trained, and what is read off at the end is the
front of accuracy, latency and size (or whichever objectives are named).
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import nn

from compression import profile
from compression.card import MethodCard
from compression.checkpoint import save_checkpoint
from compression.data.dataset import Dataset
from compression.errors import CompressionError
from compression.models import ModelSpec
from compression.search.candidate import (
    Candidates,
    MeasureLatency,
    TrainTrial,
    attempt,
    checked_latency,
    digest_of,
    labels_of,
)
from compression.search.filters import AnyFilter
from compression.search.front import Prefer, choose_finalists, hypervolume, knee, pareto_front
from compression.search.hopeless import Hopeless
from compression.search.ledger import MOST_INTERRUPTIONS, Ledger, Proposal, drawn, first_trials, opened
from compression.search.priors import AnyPriors, Prior
from compression.search.samplers import AnySampler, Nsga2, Situation
from compression.search.space import LatencyModel, StartTraining, Workshop
from compression.search.spaces import AnySpace
from compression.search.trials import OBJECTIVES, Objective, TrialResult, write_trials
from compression.train import TrainConfig
from compression.types import Frozen, Slug

if TYPE_CHECKING:
    from compression.quantize.sensitivity import Sensitivity
    from compression.search.bank import PastTrial

logger = logging.getLogger(__name__)

REJECTED_PER_TRIAL = 20  # proposals over budget, filtered or seen before that are allowed per trial of the budget
REJECTED_IN_A_ROW = 3  # after so many, the sampler is helped to a candidate nobody has proposed yet
POLL_SECONDS = 2.0  # while other workers finish the last trials of a shared study


class Study(Frozen):
    """Search all spaces together and hand the best candidates to the full distillation."""

    kind: Literal["study"] = "study"
    spaces: tuple[AnySpace, ...] = Field(min_length=1)
    """Where candidates come from."""
    trials: int = Field(default=16, ge=1, le=10_000)
    """How many candidates are trained; those over budget, filtered and duplicates do not count."""
    train: TrainConfig
    """The short distillation each candidate gets."""
    objectives: Annotated[tuple[Objective, ...], Field(min_length=2)] = OBJECTIVES
    """What the front is of; accuracy is always one of them."""
    sampler: AnySampler = Nsga2()
    """Who proposes candidates."""
    filter: AnyFilter | None = None
    """Who looks at candidates before they are trained."""
    priors: AnyPriors | None = None
    """What earlier studies say about where to start."""
    stop_behind: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Stop trials that lie so far (a share of right answers) below the median of trials no slower and no larger, at
    the same epoch."""
    max_macs: Annotated[int, Field(gt=0)] | None = None
    """Most multiply-accumulates for one image."""
    max_macs_share: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Most multiply-accumulates as a share of the best teacher's."""
    max_latency_ms: Annotated[float, Field(gt=0.0)] | None = None
    """Highest p50 latency of one call at ``batch``."""
    device: Slug | None = None
    """A device that has reported: max_latency_ms is then in its milliseconds, not in those of this machine."""
    max_latency_share: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Highest p50 latency as a share of the best teacher's."""
    max_size_kib: Annotated[float, Field(gt=0.0)] | None = None
    """Most kibibytes of float32 weights."""
    batch: int = Field(default=32, ge=1)
    """Images per call when latency is measured."""
    latency: Literal["measured", "predicted"] = "measured"
    """Whether each candidate is timed, or the latency model of this machine is asked; finalists are always timed."""
    finalists: int = Field(default=1, ge=1)
    """How many candidates go on to the full distillation."""
    prefer: Prefer = "accuracy"
    """Which of the front go on first."""

    card: ClassVar[MethodCard] = MethodCard(
        name="Multi-objective study",
        paper="Akiba et al. 2019, Optuna, arXiv:1907.10902 (ask and tell, storage)",
        summary="Tries candidates of all spaces, pruned teachers and fresh networks alike, by accuracy, measured "
        "latency and size, and keeps the front.",
        needs="Teachers for their weights or outputs, and a machine to measure latency on.",
        cost="One short distillation and one latency measurement per trial.",
        evidence="Measured on Fashion-MNIST: MACs do not predict time, and a hand-made net can beat a pruned "
        "one in both objectives, so both kinds compete here.",
    )

    @model_validator(mode="after")
    def _accuracy_counts(self) -> Self:
        if "accuracy" not in self.objectives or len(set(self.objectives)) != len(self.objectives):
            raise ValueError(
                f"objectives are {', '.join(self.objectives)}, expected each once, with accuracy. Correct them."
            )
        if self.latency == "predicted" and "latency_p95_ms" in self.objectives:
            raise ValueError("objectives have latency_p95_ms, which is only measured. Set latency to measured.")
        return self

    @model_validator(mode="after")
    def _device_has_a_budget(self) -> Self:
        if self.device is not None and (self.max_latency_ms is None or self.batch != 1):
            raise ValueError(
                f"device is '{self.device}' with max_latency_ms {self.max_latency_ms} and batch {self.batch}, expected "
                "a budget for one image, as devices measure. Set max_latency_ms, and batch to 1."
            )
        return self

    @property
    def wants_latency_model(self) -> bool:
        """Whether the latency model of this machine is of use."""
        return self.latency == "predicted" or any(space.wants_latency_model for space in self.spaces)

    @property
    def wants_sensitivity(self) -> tuple[str, ...]:
        """The teachers whose sensitivity table some space reads."""
        wanted = (space.parent_name for space in self.spaces if space.wants_sensitivity)
        return tuple(sorted({name for name in wanted if name is not None}))

    @property
    def wants_past(self) -> bool:
        """Whether the trials of earlier studies are of use."""
        return self.priors is not None or getattr(self.filter, "wants_past", False)


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
    fingerprint: str
    """Equal for studies of equal settings, data, parents and seed."""

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
    latency: MeasureLatency,
    train_trial: TrainTrial,
    storage: Path | str,
    folder: Path,
    best_teacher: str | None = None,
    start_training: StartTraining | None = None,
    latency_model: LatencyModel | None = None,
    past: Sequence["PastTrial"] = (),
    sensitivity: Mapping[str, "Sensitivity"] | None = None,
    on_trial: Callable[[TrialResult], None] | None = None,
) -> StudyResult:
    """Every trial, the front and the finalists; ``folder`` gets trials.csv and their checkpoints.

    ``latency`` times one call of ``config.batch`` images; ``best_teacher`` names the parent that shares and the
    hypervolume refer to. ``storage`` is an SQLite file, or the URL of a database that several workers share: each
    calls this with equal arguments and a folder of its own, and gets the same result. Called again with the
    same arguments after a kill, the interrupted trial runs again with the same choices, finished ones do not.
    A candidate that fails is a row; an unusable store is raised, and the trial runs again next time.
    ``sensitivity`` has tables of parents by name; those that ``config.wants_sensitivity`` names must be there.

    Raises:
        CompressionError: a parent or its table is missing, the file is in use or of another study, or no trial
            completed.
    """
    spaces = labels_of(config.spaces)
    folder.mkdir(parents=True, exist_ok=True)
    shop = Workshop(
        parents,
        dataset,
        seed,
        folder / "shop",
        start_training,
        latency_model,
        best_teacher,
        past,
        sensitivity={name: table for name, table in (sensitivity or {}).items() if name in config.wants_sensitivity},
    )
    max_macs = _check(config, shop)
    genes = {label: space.genes(shop) for label, space in spaces.items()}
    prior = None if config.priors is None else config.priors.look(genes, spaces, shop)
    fingerprint = _fingerprint(config, parents, dataset, seed, best_teacher, shop.sensitivity)
    guesses = [(label, choices) for label, space in spaces.items() for choices in space.first_choices(shop)]
    with opened(
        storage,
        genes,
        sampler=config.sampler,
        objectives=config.objectives,
        seed=seed,
        fingerprint=fingerprint,
    ) as ledger:
        reference = _reference(ledger, shop, latency)
        candidates = Candidates(
            spaces,
            shop,
            latency,
            train_trial,
            folder,
            look=config.filter,
            hopeless=None if config.stop_behind is None else Hopeless(config.stop_behind),
            max_macs=max_macs,
            max_size_bytes=None if config.max_size_kib is None else config.max_size_kib * 1024,
            max_latency_ms=_latency_limit(config, reference),
            measured=config.latency == "measured",
        )
        for space, choices in [*(prior.best if prior is not None else ()), *guesses, *first_trials(genes)]:
            ledger.enqueue(space, choices)
        rows = ledger.rows(folder)
        while _wants_more(config, ledger, rows, prior):

            def situation(number: int, drawn_seed: int, rows: list[TrialResult] = rows) -> Situation:
                return Situation(spaces, genes, rows, number, drawn_seed, shop, max_macs)

            proposal = ledger.ask(situation)
            row = _carried_out(proposal, candidates, rows, ledger)
            ledger.tell(row)
            rows = ledger.rows(folder)
            write_trials(folder / "trials.csv", _marked(rows, config), (), None)
            if on_trial is not None:
                on_trial(row)
        while ledger.shared and ledger.running_elsewhere():
            ledger.revive()
            time.sleep(POLL_SECONDS)
        rows = ledger.rows(folder)
    return _result(config, rows, reference, candidates, fingerprint)


def _carried_out(
    proposal: Proposal, candidates: Candidates, rows: Sequence[TrialResult], ledger: Ledger
) -> TrialResult:
    """The outcome of a proposal; one that ended the process again and again is not tried once more."""
    if (times := ledger.interruptions(proposal.number)) >= MOST_INTERRUPTIONS:
        reason = f"the process ended {times} times while it ran; was it out of memory?"
        return TrialResult(proposal.number, proposal.space, proposal.choices, "failed", reason)
    with ledger.alive(proposal.number):
        return attempt(proposal, candidates, rows)


def _check(config: Study, shop: Workshop) -> int | None:
    """The MACs budget, None for none; raises when a name is unknown or a share has nothing to refer to."""
    wanted = [space.parent_name for space in config.spaces] + [shop.best_teacher]
    for name in wanted:
        if name is not None:
            shop.parent(name)
    limits = [config.max_macs] if config.max_macs is not None else []
    for share in ("max_macs_share", "max_latency_share"):
        if getattr(config, share) is not None and shop.best_teacher is None:
            raise CompressionError(
                f"Search has {share} {getattr(config, share)} and no best teacher, expected the "
                f"name of one. Pass best_teacher, or set an absolute limit."
            )
    if config.latency == "predicted" and shop.latency is None:
        raise CompressionError(
            "Search has latency 'predicted' and no latency model, expected one. Pass latency_model, or set latency to "
            "measured."
        )
    config.sampler.check(labels_of(config.spaces), shop)
    if config.filter is not None:
        config.filter.check(shop)
    if config.max_macs_share is not None:
        limits.append(math.floor(config.max_macs_share * shop.teacher_macs()))
    return min(limits, default=None)


def _latency_limit(config: Study, reference: Mapping[str, float] | None) -> float | None:
    limits = [config.max_latency_ms] if config.max_latency_ms is not None else []
    if config.max_latency_share is not None and reference is not None:
        limits.append(config.max_latency_share * reference["latency_p50_ms"])
    return min(limits, default=None)


def _wants_more(config: Study, ledger: Ledger, rows: Sequence[TrialResult], prior: Prior | None) -> bool:
    """Whether another candidate is due; helps the sampler out of repeating itself."""
    ledger.revive()
    spent = [row for row in rows if row.state in ("complete", "failed", "stopped")]
    rejected = len(rows) - len(spent)
    if len(spent) + (ledger.running_elsewhere() if ledger.shared else 0) >= config.trials:
        return False
    if rejected >= REJECTED_PER_TRIAL * config.trials:
        logger.warning("search ends after %d of %d trials: %d rejected", len(spent), config.trials, rejected)
        return False
    recent = [row.state for row in rows[-REJECTED_IN_A_ROW:]]
    stuck = len(recent) == REJECTED_IN_A_ROW and all(state in ("infeasible", "duplicate") for state in recent)
    drawing = prior is not None and len(rows) < config.sampler.warm_up
    if not (unseen := ledger.unseen(rows)):
        logger.info("all candidates of all spaces were proposed after %d of %d trials", len(spent), config.trials)
        return False
    if drawing and prior is not None:
        ledger.enqueue(*prior.drawn(seed=len(rows)))
    elif stuck:
        ledger.enqueue(*drawn(unseen, seed=len(rows)))
    return True


def _fingerprint(
    config: Study,
    parents: Mapping[str, tuple[nn.Module, ModelSpec]],
    dataset: Dataset,
    seed: int,
    best_teacher: str | None,
    sensitivity: Mapping[str, "Sensitivity"],
) -> str:
    """A hash over everything but how many trials and finalists are wanted."""
    used = {space.parent_name for space in config.spaces} | {best_teacher}
    content = {
        "config": config.model_dump(mode="json", exclude={"trials", "finalists", "prefer"}),
        "parents": {name: digest_of(*parents[name]) for name in sorted(name for name in used if name is not None)},
        "data": dict(sorted(dataset.hashes.items())),
        "seed": seed,
        "best_teacher": best_teacher,
    }
    if sensitivity:
        content["sensitivity"] = {name: table.model_dump(mode="json") for name, table in sensitivity.items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _reference(ledger: Ledger, shop: Workshop, latency: MeasureLatency) -> dict[str, float] | None:
    """What the best teacher costs, measured once per study; None without one."""
    if shop.best_teacher is None:
        return None
    if (known := ledger.note("reference")) is None:
        model, spec = shop.parent(shop.best_teacher)
        found = latency(model)
        known = {
            "latency_p50_ms": checked_latency(found.p50),
            "latency_p95_ms": checked_latency(found.p95 if found.p95 is not None else found.p50),
            "size_bytes": float(profile.state_bytes(model)),
            "macs": float(profile.macs(model, spec.input_shape)),
        }
        ledger.set_note("reference", known)
    return dict(known)


def _marked(rows: Sequence[TrialResult], config: Study) -> list[TrialResult]:
    """The rows with ``on_front`` set."""
    numbers = {trial.number for trial in pareto_front(rows, config.objectives)}
    return [replace(row, on_front=row.number in numbers) for row in rows]


def _result(
    config: Study,
    rows: Sequence[TrialResult],
    reference: Mapping[str, float] | None,
    candidates: Candidates,
    fingerprint: str,
) -> StudyResult:
    rows = _timed_finalists(config, list(rows), candidates)
    folder = candidates.folder
    rows = _marked(rows, config)
    front, compromise = pareto_front(rows, config.objectives), knee(rows, config.objectives)
    chosen = choose_finalists(rows, count=config.finalists, prefer=config.prefer, objectives=config.objectives)
    write_trials(folder / "trials.csv", rows, chosen, compromise)
    if compromise is None:
        raise CompressionError(_nothing_found(rows))
    chosen = tuple(_at_hand(trial, candidates) for trial in chosen)
    points = [trial.values(config.objectives) for trial in front]
    corner = [
        1.0
        if name in ("accuracy", "ece")
        else (reference[name] if reference is not None else max(point[place] for point in points) * 1.1)
        for place, name in enumerate(config.objectives)
    ]  # without a teacher to compare with: the worst of the front, a little widened
    return StudyResult(tuple(rows), front, chosen, compromise, hypervolume(points, corner), fingerprint)


def _timed_finalists(config: Study, rows: list[TrialResult], candidates: Candidates) -> list[TrialResult]:
    """The rows, of which those that would be finalists were timed where the study went by predictions.

    One that is over budget when it is timed is no finalist, and the next one is looked at.
    """
    timed: set[int] = set()
    while not candidates.measured:
        chosen = choose_finalists(rows, count=config.finalists, prefer=config.prefer, objectives=config.objectives)
        due = [trial for trial in chosen if trial.number not in timed]
        if not due:
            break
        for trial in due:
            timed.add(trial.number)
            model, _ = candidates.build(Proposal(trial.number, trial.space, trial.choices))
            found = candidates.latency(model)
            row = replace(trial, latency_p50_ms=checked_latency(found.p50), latency_p95_ms=found.p95)
            if (over := candidates.excess(row)) is not None:
                row = replace(row, state="infeasible", reason=f"when it was timed, {over[0]}", excess=over[1])
            rows[rows.index(trial)] = row
    return rows


def _at_hand(trial: TrialResult, candidates: Candidates) -> TrialResult:
    """The trial with its checkpoint in the folder: that of another worker is built again."""
    place = candidates.folder / f"trial-{trial.number:04d}"
    if not (place / "spec.json").is_file():
        model, spec = candidates.build(Proposal(trial.number, trial.space, trial.choices))
        if digest_of(model, spec) != trial.digest:
            logger.warning("trial %d was built again with other weights than its worker's", trial.number)
        save_checkpoint(model, spec, place)
    return replace(trial, checkpoint=place)


def _nothing_found(rows: Sequence[TrialResult]) -> str:
    """Why there is no candidate: which bound, and how near the best came."""
    reasons = "; ".join(sorted({f"{row.state}: {row.reason}" for row in rows if row.state != "duplicate"})[:5])
    over = [row for row in rows if row.excess is not None]
    nearest = ""
    if over:
        best = min(over, key=lambda row: (row.excess or 0.0, row.number))
        nearest = (
            f" The nearest, trial {best.number} ({best.space} {json.dumps(best.choices, sort_keys=True)}), is "
            f"{(best.excess or 0.0):.1%} over: {best.reason}."
        )
    return (
        f"Search has 0 complete candidates of {len(rows)} proposals, expected at least one ({reasons}).{nearest} "
        "Widen the budget or the spaces; every row is in trials.csv."
    )
