"""Latency results: the rows of a benchmark and the statistics behind them. No clock runs here."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from compression.errors import ExportError
from compression.types import Frozen

AGAIN = " (again)"
"""Suffix of the reference's second entry, from which the noise floor is taken."""

Samples = dict[tuple[str, int], list[NDArray[np.float64]]]
"""(model, batch) -> one array of durations in ms for each round."""


class Timing(Frozen):
    """One model at one batch size. Milliseconds are per call, not per image."""

    model: str
    batch: int
    latency_p50_ms: float
    latency_p90_ms: float
    latency_p95_ms: float
    latency_p99_ms: float
    latency_mean_ms: float
    latency_std_ms: float
    latency_p95_low_ms: float
    """Lower 95 % bound of p95, resampled over rounds."""
    latency_p95_high_ms: float
    throughput_per_s: float
    """Images per second at the median latency."""
    ratio_to_reference: float
    """Median over rounds of this model's median latency over the reference's in the same round."""
    ratio_iqr: tuple[float, float]
    """25th and 75th percentile of those ratios."""
    ratio_low: float
    """Lower 95 % bound of the median ratio (order statistics)."""
    ratio_high: float
    samples: int
    """Timed calls behind the percentiles."""
    size_bytes: int
    load_ms: float | None = None
    first_inference_ms: float | None = None
    peak_rss_bytes: int | None = None
    """Peak resident memory of a fresh process that runs this model, runtime included."""
    model_rss_bytes: int | None = None
    """The part of it that came with the model."""


class NoiseFloor(Frozen):
    """How far the reference strays from itself when it is entered twice."""

    batch: int
    ratio: float
    """Median ratio of the second entry to the first; 1 on a silent machine."""
    ratio_iqr: tuple[float, float]
    spread: float
    """Largest distance from 1 within the 95 % interval of that median, as a share: 0.03 means 3 %."""


class BenchmarkResult(Frozen):
    """Everything a job found; ``latency.json`` of a run."""

    reference: str
    rows: tuple[Timing, ...]
    noise_floors: tuple[NoiseFloor, ...]
    failures: dict[str, str]
    """Model -> why it has no row (or lacks a batch size)."""
    environment: dict[str, str | int | list[str] | list[float]]

    def row(self, model: str, batch: int) -> Timing:
        """The timing of one model at one batch size.

        Raises:
            ExportError: There is none; the message says why.
        """
        for row in self.rows:
            if (row.model, row.batch) == (model, batch):
                return row
        known = sorted({(row.model, row.batch) for row in self.rows})
        why = self.failures.get(model, f"measured were {known}")
        raise ExportError(f"Benchmark has no timing of '{model}' at batch {batch}: {why}.")

    def noise_floor(self, batch: int) -> float:
        """Share below which a difference in latency means nothing, at this batch size."""
        for floor in self.noise_floors:
            if floor.batch == batch:
                return floor.spread
        raise ExportError(f"Benchmark has no noise floor at batch {batch}, expected one of its batch sizes.")


def round_ratios(
    rounds: Sequence[NDArray[np.float64]], reference: Sequence[NDArray[np.float64]]
) -> NDArray[np.float64]:
    """Median latency of each round over the reference's median in the same round, [rounds]."""
    return np.array([np.median(a) / np.median(b) for a, b in zip(rounds, reference, strict=True)])


def median_interval(values: NDArray[np.float64], level: float = 0.95) -> tuple[float, float]:
    """Distribution-free interval of the median: the order statistics a binomial(n, 1/2) allows.

    With fewer than six values no pair of order statistics reaches 95 %; the range is the answer then.
    """
    from scipy.stats import binom

    ordered = np.sort(values)
    rank = int(binom.ppf((1 - level) / 2, len(ordered), 0.5))
    rank = max(rank, 1)
    return float(ordered[rank - 1]), float(ordered[len(ordered) - rank])


def read_raw(path: Path) -> Samples:
    """Raw samples of ``latency_raw.csv``, grouped by model and batch, one array per round."""
    grouped: dict[tuple[str, int], dict[int, list[float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            rounds = grouped.setdefault((row["model"], int(row["batch"])), {})
            rounds.setdefault(int(row["round"]), []).append(float(row["ms"]))
    return {
        key: [np.array(rounds[turn], dtype=np.float64) for turn in sorted(rounds)] for key, rounds in grouped.items()
    }


def timing_of(
    name: str,
    batch: int,
    rounds: Sequence[NDArray[np.float64]],
    reference: Sequence[NDArray[np.float64]],
    facts: dict[str, float],
    *,
    seed: int,
) -> Timing:
    """One row from the raw rounds of a model and of the reference.

    Args:
        name: Of the model.
        batch: Images per call.
        rounds: Durations of the model in ms, one array per round.
        reference: The same of the reference, in the same rounds.
        facts: ``size_bytes`` and, where measured, the values of ``export.timing.probe``.
        seed: Of the resampling.
    """
    pooled = np.concatenate(rounds)
    p50, p90, p95, p99 = (float(value) for value in np.percentile(pooled, (50, 90, 95, 99)))
    ratios = round_ratios(rounds, reference)
    ratio_low, ratio_high = median_interval(ratios)
    p95_low, p95_high = _p95_interval(rounds, seed)
    return Timing(
        model=name,
        batch=batch,
        latency_p50_ms=p50,
        latency_p90_ms=p90,
        latency_p95_ms=p95,
        latency_p99_ms=p99,
        latency_mean_ms=float(pooled.mean()),
        latency_std_ms=float(pooled.std()),
        latency_p95_low_ms=min(p95_low, p95),
        latency_p95_high_ms=max(p95_high, p95),
        throughput_per_s=batch / p50 * 1e3,
        ratio_to_reference=float(np.median(ratios)),
        ratio_iqr=quartiles(ratios),
        ratio_low=ratio_low,
        ratio_high=ratio_high,
        samples=len(pooled),
        size_bytes=int(facts["size_bytes"]),
        load_ms=facts.get("load_ms"),
        first_inference_ms=facts.get("first_inference_ms"),
        peak_rss_bytes=int(facts["peak_rss_bytes"]) if "peak_rss_bytes" in facts else None,
        model_rss_bytes=int(facts["model_rss_bytes"]) if "model_rss_bytes" in facts else None,
    )


def _p95_interval(rounds: Sequence[NDArray[np.float64]], seed: int, resamples: int = 200) -> tuple[float, float]:
    # Whole rounds are drawn, not calls: calls of one round share the machine's mood.
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(rounds), (resamples, len(rounds)))
    values = [np.percentile(np.concatenate([rounds[i] for i in draw]), 95) for draw in draws]
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def quartiles(values: NDArray[np.float64]) -> tuple[float, float]:
    """25th and 75th percentile."""
    low, high = np.percentile(values, (25, 75))
    return float(low), float(high)
