"""One candidate of a study: built, checked against the budgets, measured, kept, trained."""

import hashlib
import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from compression import profile
from compression.checkpoint import save_checkpoint
from compression.data.dataset import Dataset
from compression.errors import ArtifactError, CompressionError
from compression.models import ModelSpec
from compression.search.ledger import Genes, Proposal
from compression.search.prune import Prune, prune_model
from compression.search.scale import Scale, scale_model
from compression.search.trials import TrialResult

logger = logging.getLogger(__name__)

TrainTrial = Callable[[nn.Module, int, Path], float]
"""Trains in place: (model, trial number, folder for step checkpoints) -> validation accuracy, 0..1."""


@dataclass(frozen=True)
class Candidates:
    """How proposals of one study become networks, and the budgets they must keep."""

    spaces: dict[str, Prune | Scale]
    parents: Mapping[str, tuple[nn.Module, ModelSpec]]
    dataset: Dataset
    seed: int
    calibration: tuple[Tensor, Tensor] | None = None
    """Normalised images and labels, for criteria that need them."""
    max_macs: int | None = None
    max_size_bytes: float | None = None
    max_latency_ms: float | None = None

    def build(self, proposal: Proposal) -> tuple[nn.Module, ModelSpec]:
        """The untrained (or only pruned) candidate, eval mode, and its spec."""
        space = self.spaces[proposal.space]
        if isinstance(space, Prune):
            parent, spec = self.parents[space.parent]
            return prune_model(
                parent,
                spec,
                ratio=float(proposal.choices["ratio"]),
                criterion=space.criterion,
                round_to=space.round_to,
                calibration=self.calibration,
                seed=self.seed,
            )
        template = ModelSpec(
            model=space.base,
            num_classes=self.dataset.num_classes,
            input_shape=self.dataset.input_shape,
            class_names=self.dataset.class_names,
            preprocessing=self.dataset.preprocessing,
        )
        width, depth = float(proposal.choices["width"]), int(proposal.choices["depth"])
        return scale_model(space, template, width=width, depth=depth, seed=self.seed)

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


def labels_of(spaces: Sequence[Prune | Scale]) -> dict[str, Prune | Scale]:
    """The spaces under short names that tell them apart: ``prune-resnet-taylor``, ``scale-plain_cnn-2``."""
    named: dict[str, Prune | Scale] = {}
    for space in spaces:
        name = f"prune-{space.parent}-{space.criterion}" if isinstance(space, Prune) else f"scale-{space.base.kind}"
        label, count = name, 1
        while label in named:
            count += 1
            label = f"{name}-{count}"
        named[label] = space
    return named


def genes_of(space: Prune | Scale) -> Genes:
    """What may be chosen in a space."""
    if isinstance(space, Prune):
        return {"ratio": space.ratios}
    return {"width": space.widths, "depth": space.depths}


def attempt(
    proposal: Proposal,
    candidates: Candidates,
    rows: Sequence[TrialResult],
    latency_ms: Callable[[nn.Module], float],
    train_trial: TrainTrial,
    folder: Path,
) -> tuple[TrialResult, float | None]:
    """The outcome of one proposal, and by what share it exceeds a budget (None when it does not).

    Budgets and duplicates are checked before training; ``folder/trial-NNNN`` holds the candidate as it was
    before, so that a later training without teachers is a clean control of one with them.
    A failure is an outcome too, except that of the store: the trial must then run again.

    Raises:
        ArtifactError, OSError: the store cannot be used.
    """
    started = time.perf_counter()
    row = TrialResult(proposal.number, proposal.space, proposal.choices, "failed")
    key = proposal.key
    for other in rows:
        if Proposal(other.number, other.space, other.choices).key == key:
            return replace(row, state="duplicate", reason=f"same choices as trial {other.number}"), None
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
                reason = f"same architecture and weights as trial {other.number}"
                return replace(row, state="duplicate", reason=reason), None
        over = candidates.excess(row)
        if over is None:
            row = replace(row, latency_p50_ms=checked_latency(latency_ms(model)))
            over = candidates.excess(row)
        if over is not None:
            reason, excess = over
            return replace(row, state="infeasible", reason=reason), excess
        name = f"trial-{proposal.number:04d}"
        scratch = folder / "training" / name
        save_checkpoint(model, spec, folder / name)
        accuracy = _checked_accuracy(train_trial(model, proposal.number, scratch))
        shutil.rmtree(scratch, ignore_errors=True)
        seconds = time.perf_counter() - started
        row = replace(row, state="complete", accuracy=accuracy, seconds=seconds, checkpoint=folder / name)
    except ArtifactError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and not isinstance(error, TimeoutError):
            raise
        logger.warning("trial %d (%s %s) failed", proposal.number, proposal.space, proposal.choices, exc_info=True)
        reason = f"{type(error).__name__}: {error}"
        row = replace(row, state="failed", reason=reason, seconds=time.perf_counter() - started)
    return row, None


def checked_latency(latency: float) -> float:
    """``latency`` in ms; raises CompressionError when it is not a positive number."""
    if not math.isfinite(latency) or latency <= 0:
        raise CompressionError(
            f"Latency measurement has result {latency} ms, expected a positive number. Measure again."
        )
    return float(latency)


def _checked_accuracy(accuracy: float) -> float:
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
