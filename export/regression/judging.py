"""Better, worse or neither: a change held against its interval, as the gate holds a value against a limit."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from compression.statistics import Interval, wilson
from compression.types import Frozen

Word = Literal["better", "same within chance", "same", "worse", "cannot tell"]
"""``same`` is for exact numbers; ``same within chance`` for an interval too narrow to hide a change that matters."""


class Row(Frozen):
    """One number of one target in both runs."""

    target: str
    what: str
    kind: str
    """How the numbers are shown: share, ratio, ms, bytes, number."""
    now: float | None
    before: float | None
    change: Interval | None = None
    """Now minus before; for latency and size now over before."""
    word: Word
    note: str = ""


def judged(change: Interval, margin: float, *, higher_is_better: bool, neutral: float = 0.0) -> Word:
    """Better or worse when the whole interval lies on one side of ``neutral``; the same when it stays within margin."""
    low, high = change.low - neutral, change.high - neutral
    if not higher_is_better:
        low, high = -high, -low
    if low > 0:
        return "better"
    if high < 0:
        return "worse"
    return "same within chance" if max(-low, high) <= margin else "cannot tell"


def judged_ratio(ratio: Interval, floor: float, margin: float = 0.05) -> Word:
    """The same for a ratio of times, of which nothing within the noise floor counts."""
    if ratio.high < 1 - floor:
        return "better"
    if ratio.low > 1 + floor:
        return "worse"
    around = max(floor, margin)
    return "same within chance" if 1 - around <= ratio.low and ratio.high <= 1 + around else "cannot tell"


def unpaired_change(now: float, n_now: int, before: float, n_before: int) -> Interval:
    """Difference of two shares on different samples (Newcombe 1998, method 10: from Wilson's intervals)."""
    a, b = wilson(round(now * n_now), n_now), wilson(round(before * n_before), n_before)
    change = a.estimate - b.estimate
    low = change - float(np.hypot(a.estimate - a.low, b.high - b.estimate))
    high = change + float(np.hypot(a.high - a.estimate, b.estimate - b.low))
    return Interval(estimate=change, low=low, high=high, level=a.level)


def negated(interval: Interval) -> Interval:
    """The change of which the interval is the drop."""
    return Interval(
        estimate=0.0 - interval.estimate, low=0.0 - interval.high, high=0.0 - interval.low, level=interval.level
    )


def ece_change(
    now: Sequence[Sequence[float]], before: Sequence[Sequence[float]], *, seed: int, draws: int = 2000
) -> Interval:
    """Calibration error now minus before, from reliability bins of (confidence, accuracy, count).

    The answers in each bin are drawn anew from its accuracy; both runs independently, so that the interval is wider
    than a paired one. Drawing adds to the error of both, which the difference of the means takes out again.
    """
    rng = np.random.default_rng(seed)
    (a, drawn_a), (b, drawn_b) = (_ece(bins, rng, draws) for bins in (now, before))
    noise = drawn_a - drawn_b
    low, high = np.quantile(noise - noise.mean(), [0.025, 0.975])
    return Interval(estimate=a - b, low=a - b + float(low), high=a - b + float(high))


def _ece(bins: Sequence[Sequence[float]], rng: np.random.Generator, draws: int) -> tuple[float, Any]:
    confidence, accuracy, count = np.array([row for row in bins if row[2] > 0], dtype=float).T
    share = count / count.sum()
    drawn = rng.binomial(count.astype(int), np.clip(accuracy, 0, 1), size=(draws, len(count))) / count
    return float((share * np.abs(accuracy - confidence)).sum()), (share * np.abs(drawn - confidence)).sum(axis=1)
