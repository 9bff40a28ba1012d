"""Intervals and tests behind every claim: paired bootstrap, McNemar, Wilson."""

from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from compression.errors import ShapeError
from compression.types import Frozen


class Interval(Frozen):
    """An estimate and the bounds it lies between with probability ``level``."""

    estimate: float
    low: float
    high: float
    level: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.95


def accuracy_drop(
    reference_correct: Tensor,
    candidate_correct: Tensor,
    *,
    level: float = 0.95,
    seed: int,
    resamples: int = 2000,
) -> Interval:
    """accuracy(reference) - accuracy(candidate) on the same samples, with a paired percentile bootstrap.

    Efron and Tibshirani 1993. A sample counts +1 (only the reference is right), -1 (only the candidate) or 0, so a
    resample is a multinomial draw of the three counts: exact and fast. Where no sample differs the bootstrap has no
    width; the bounds are then the rule of three's, because absence in N samples proves no absence.

    Args:
        reference_correct: [N] bool.
        candidate_correct: [N] bool, same samples in the same order.
        level: Probability of the interval.
        seed: Of the resampling.
        resamples: Number of bootstrap draws.

    Raises:
        ShapeError: lengths differ, or there are no samples.
    """
    lost, gained, size = _discordant(reference_correct, candidate_correct)
    estimate = (lost - gained) / size
    if lost + gained == 0:
        bound = -np.log(1 - level) / size
        return Interval(estimate=0.0, low=-float(bound), high=float(bound), level=level)
    draws = np.random.default_rng(seed).multinomial(
        size, [lost / size, gained / size, 1 - (lost + gained) / size], size=resamples
    )
    drops = (draws[:, 0] - draws[:, 1]) / size
    low, high = np.quantile(drops, [(1 - level) / 2, (1 + level) / 2])
    return Interval(estimate=estimate, low=float(low), high=float(high), level=level)


def mcnemar(reference_correct: Tensor, candidate_correct: Tensor) -> float:
    """Exact two-sided p-value that both are equally accurate (McNemar 1947, binomial form); 1 if none differs."""
    from scipy.stats import binomtest

    lost, gained, _ = _discordant(reference_correct, candidate_correct)
    return 1.0 if lost + gained == 0 else float(binomtest(lost, lost + gained, 0.5).pvalue)


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Share of successes with Wilson's score interval (Wilson 1927).

    Raises:
        ShapeError: ``n`` is 0, or successes are not within 0..n.
    """
    from scipy.stats import binomtest

    if n < 1 or not 0 <= successes <= n:
        raise ShapeError(f"Share has {successes} of {n}, expected 0 <= successes <= n and n >= 1.")
    bounds = binomtest(successes, n).proportion_ci(confidence_level=level, method="wilson")
    return Interval(estimate=successes / n, low=float(bounds.low), high=float(bounds.high), level=level)


def _discordant(reference: Tensor, candidate: Tensor) -> tuple[int, int, int]:
    if reference.shape != candidate.shape or reference.ndim != 1 or len(reference) == 0:
        raise ShapeError(
            f"Answers have shapes {list(reference.shape)} and {list(candidate.shape)}, expected two equal [N]. "
            "Compare both models on the same samples."
        )
    reference, candidate = reference.bool(), candidate.bool()
    lost = int(torch.logical_and(reference, ~candidate).sum())
    gained = int(torch.logical_and(~reference, candidate).sum())
    return lost, gained, len(reference)
