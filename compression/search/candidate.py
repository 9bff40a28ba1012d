"""One candidate of a study: built, checked against the budgets, measured, filtered, kept, trained."""

import hashlib
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from compression import profile
from compression.checkpoint import save_checkpoint
from compression.errors import ArtifactError, CompressionError
from compression.models import ModelSpec
from compression.search.filters import Filter
from compression.search.hopeless import Hopeless
from compression.search.ledger import Proposal
from compression.search.space import Space, Workshop
from compression.search.trials import Latency, Score, TrialResult

logger = logging.getLogger(__name__)

OnEpoch = Callable[[float], None]
"""Gets the validation accuracy after each epoch of a trial; may end it by an exception that must pass through."""

TrainTrial = Callable[[nn.Module, int, Path, OnEpoch], Score]
"""Trains in place: (model, trial number, folder for step checkpoints, on_epoch) -> how good it is."""

MeasureLatency = Callable[[nn.Module], Latency]
"""Times one call of the candidate in the runtime that ships."""


@dataclass(frozen=True)
class Candidates:
    """How proposals of one study become networks, and the budgets they must keep."""

    spaces: Mapping[str, Space]
    shop: Workshop
    latency: MeasureLatency
    train: TrainTrial
    folder: Path
    """Gets a folder for each trained candidate."""
    look: Filter | None = None
    hopeless: Hopeless | None = None
    max_macs: int | None = None
    max_size_bytes: float | None = None
    max_latency_ms: float | None = None
    measured: bool = True
    """Whether latency is measured; else it is the model's prediction."""

    def build(self, proposal: Proposal) -> tuple[nn.Module, ModelSpec]:
        """The untrained (or only pruned) candidate, eval mode, and its spec."""
        return self.spaces[proposal.space].build(proposal.choices, self.shop)

    def excess(self, row: TrialResult) -> tuple[str, float] | None:
        """The first budget ``row`` exceeds: the reason, and by what share; None when it is within all."""
        for name, found, limit in (
            ("macs", row.macs, self.max_macs),
            ("size_bytes", row.size_bytes, self.max_size_bytes),
            ("latency_p50_ms", row.latency_p50_ms, self.max_latency_ms),
        ):
            if found is not None and limit is not None and found > limit:
                return f"{name} {found:.6g} is over {limit:.6g}", found / limit - 1.0
        return None


def labels_of(spaces: Sequence[Space]) -> dict[str, Space]:
    """The spaces under short names that tell them apart: ``prune-resnet-taylor``, ``scale-plain_cnn-2``."""
    named: dict[str, Space] = {}
    for space in spaces:
        label, count = space.label, 1
        while label in named:
            count += 1
            label = f"{space.label}-{count}"
        named[label] = space
    return named


def attempt(proposal: Proposal, candidates: Candidates, rows: Sequence[TrialResult]) -> TrialResult:
    """The outcome of one proposal.

    Budgets, duplicates and the filter come before training; ``folder/trial-NNNN`` holds the candidate as it was
    before, so that a later training without teachers is a clean control of one with them.
    A failure is an outcome too, except that of the store: the trial must then run again.

    Raises:
        ArtifactError, OSError: the store cannot be used.
    """
    started, cpu_started = time.perf_counter(), time.process_time()
    row = TrialResult(proposal.number, proposal.space, proposal.choices, "failed")
    curve: list[float] = []

    def ended(**changes: object) -> TrialResult:
        spent = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu_started}
        return replace(row, **(spent | {"curve": tuple(curve)} | changes))

    for other in rows:
        if Proposal(other.number, other.space, other.choices).key == proposal.key:
            return replace(row, state="duplicate", reason=f"same choices as trial {other.number}")
    try:
        model, spec = candidates.build(proposal)
        row = replace(
            row,
            macs=profile.macs(model, spec.input_shape),
            params=profile.params(model),
            size_bytes=profile.state_bytes(model),
            digest=digest_of(model, spec),
        )
        for other in rows:
            if other.digest == row.digest:
                return ended(state="duplicate", reason=f"same architecture and weights as trial {other.number}")
        over = candidates.excess(row)
        if over is None:
            row = _timed(row, model, spec, candidates)
            over = candidates.excess(row)
        if over is not None:
            reason, excess = over
            return ended(state="infeasible", reason=reason, excess=excess)
        row, passes = _looked_at(row, model, spec, candidates, rows)
        if not passes:
            return ended(state="filtered", reason=f"score {row.score:.6g} is low among those so far")
        name = f"trial-{proposal.number:04d}"
        scratch = candidates.folder / "training" / name
        save_checkpoint(model, spec, candidates.folder / name)

        def on_epoch(accuracy: float) -> None:
            curve.append(accuracy)
            if candidates.hopeless is not None:
                candidates.hopeless.check(curve, row, rows)

        try:
            score = candidates.train(model, proposal.number, scratch, on_epoch)
        except Hopeless.Stop as stop:
            shutil.rmtree(scratch, ignore_errors=True)
            return ended(state="stopped", reason=str(stop), checkpoint=candidates.folder / name)
        shutil.rmtree(scratch, ignore_errors=True)
        row = ended(
            state="complete", accuracy=checked_share(score.accuracy), ece=score.ece, checkpoint=candidates.folder / name
        )
    except ArtifactError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, TimeoutError):
            raise
        logger.warning("trial %d (%s %s) failed", proposal.number, proposal.space, proposal.choices, exc_info=True)
        row = ended(state="failed", reason=f"{type(error).__name__}: {error}")
    return row


def _timed(row: TrialResult, model: nn.Module, spec: ModelSpec, candidates: Candidates) -> TrialResult:
    """The row with the latency predicted, where there is a model, and measured, where that is wanted."""
    predictor = candidates.shop.latency
    if predictor is not None:
        row = replace(row, latency_predicted_ms=checked_latency(predictor.predict_ms(model, spec.input_shape)))
        if not candidates.measured:
            return replace(row, latency_p50_ms=row.latency_predicted_ms)
    found = candidates.latency(model)
    return replace(row, latency_p50_ms=checked_latency(found.p50), latency_p95_ms=found.p95)


def _looked_at(
    row: TrialResult, model: nn.Module, spec: ModelSpec, candidates: Candidates, rows: Sequence[TrialResult]
) -> tuple[TrialResult, bool]:
    """The row with the filter's score, and whether the candidate is to be trained."""
    if candidates.look is None:
        return row, True
    score = candidates.look.score(model, spec, row, rows, candidates.shop)
    if score is None or not math.isfinite(score):
        return row, True
    earlier = [other.score for other in rows if other.score is not None]
    return replace(row, score=score), candidates.look.passes(score, earlier)


def checked_latency(latency: float) -> float:
    """``latency`` in ms; raises CompressionError when it is not a positive number."""
    if not math.isfinite(latency) or latency <= 0:
        raise CompressionError(
            f"Latency measurement has result {latency} ms, expected a positive number. Measure again."
        )
    return float(latency)


def checked_share(accuracy: float) -> float:
    """``accuracy``; raises CompressionError when it is not a share."""
    if not 0.0 <= accuracy <= 1.0:
        raise CompressionError(
            f"Trial has validation accuracy {accuracy}, expected a share in 0..1. Lower the learning rate."
        )
    return float(accuracy)


def digest_of(model: nn.Module, spec: ModelSpec) -> str:
    """A hash over the architecture and the weights: equal for candidates that would train alike."""
    digest = hashlib.sha256(spec.model_dump_json().encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
