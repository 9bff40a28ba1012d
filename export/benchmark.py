"""Latency, throughput and memory of ONNX files, measured so that two of them can be compared.

The models of a job run interleaved in shuffled rounds in a process of their own; what counts is the median
over rounds of the ratio to a reference model *of the same round*. The reference enters twice: how far it
strays from itself is the noise floor, and no difference below it means anything.

    python -m export.benchmark JOB.json OUT.json      (OUT.json; raw samples go to latency_raw.csv beside it)
"""

import csv
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, ValidationError, model_validator

from compression.errors import ExportError
from compression.types import Frozen
from export.runtime import cpu_features

logger = logging.getLogger(__name__)

AGAIN = " (again)"
"""Suffix of the reference's second entry, from which the noise floor is taken."""

Samples = dict[tuple[str, int], list[NDArray[np.float64]]]
"""(model, batch) -> one array of durations in ms for each round."""


class BenchmarkJob(Frozen):
    """What to time, against what, and for how long."""

    models: dict[str, Path]
    """Name -> ONNX file."""
    reference: str
    """The model all ratios are taken to; one of ``models``."""
    batches: tuple[PositiveInt, ...] = (1, 32)
    """Batch sizes: one for latency, one for throughput."""
    rounds: Annotated[int, Field(ge=3)] = 30
    """How often each model gets its turn, in an order drawn anew."""
    threads: PositiveInt = 1
    """Threads of each session; pinned, never left to the runtime."""
    warmup: Annotated[int, Field(ge=1)] = 20
    """Calls before the clock starts."""
    inner_ms: Annotated[float, Field(gt=0)] = 15.0
    """About how long one model runs in one round, in ms."""
    seed: int = 0
    """Draws the inputs and the order within the rounds."""
    memory: bool = True
    """Also start each model in a fresh process for its peak memory, load and first-inference time."""

    @model_validator(mode="after")
    def _reference_is_a_model(self) -> "BenchmarkJob":
        if self.reference not in self.models:
            raise ValueError(f"reference '{self.reference}' is not a model, expected one of {sorted(self.models)}.")
        clash = [name for name in self.models if name.endswith(AGAIN)]
        if clash:
            raise ValueError(f"model '{clash[0]}' ends in '{AGAIN}', which is kept for the reference. Rename it.")
        return self


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


def run_benchmark(job: BenchmarkJob, folder: Path) -> BenchmarkResult:
    """Times the job in its own process; writes ``latency.json`` and ``latency_raw.csv`` into ``folder``.

    A model that cannot be loaded or run is named in ``failures`` and does not stop the others.

    Raises:
        ExportError: A file is missing, the reference itself failed, or the timing process died.
    """
    for name, path in job.models.items():
        if not path.is_file():
            raise ExportError(f"Model '{name}' has no file at '{path}', expected an ONNX file. Export it first.")
    folder.mkdir(parents=True, exist_ok=True)
    raw_path = folder / "latency_raw.csv"
    entrants = {**job.models, job.reference + AGAIN: job.models[job.reference]}
    request = job.model_dump(mode="json") | {"entrants": {name: str(path) for name, path in entrants.items()}}
    with tempfile.TemporaryDirectory() as scratch:
        job_path, out_path = Path(scratch, "job.json"), Path(scratch, "out.json")
        job_path.write_text(json.dumps(request))
        _run_child("time", str(job_path), str(out_path), str(raw_path), threads=job.threads)
        facts = json.loads(out_path.read_text())
    failures: dict[str, str] = {k: v for k, v in facts["failures"].items() if not k.endswith(AGAIN)}
    if job.reference in failures:
        raise ExportError(f"Reference '{job.reference}' cannot be timed: {failures[job.reference]}")
    memory: dict[str, dict[str, float]] = {}
    for name, path in job.models.items():
        if job.memory and name not in failures:
            memory[name] = json.loads(_run_child("probe", str(path), str(job.threads), threads=job.threads))
    result = summarize(job, read_raw(raw_path), memory=memory, failures=failures)
    result = result.model_copy(
        update={"environment": environment(job) | {k: facts[k] for k in ("load_before", "load_after")}}
    )
    (folder / "latency.json").write_text(result.model_dump_json(indent=2))
    for name, why in failures.items():
        logger.warning("benchmark: model '%s' could not be timed: %s", name, why)
    return result


def summarize(
    job: BenchmarkJob,
    samples: Samples,
    *,
    memory: dict[str, dict[str, float]] | None = None,
    failures: dict[str, str] | None = None,
) -> BenchmarkResult:
    """Percentiles, ratios and noise floors from raw samples; a pure function, no clock involved."""
    rows, floors = [], []
    for batch in job.batches:
        reference = samples[job.reference, batch]
        again = samples.get((job.reference + AGAIN, batch))
        if again is not None:
            ratios = round_ratios(again, reference)
            low, high = median_interval(ratios)
            floors.append(
                NoiseFloor(
                    batch=batch,
                    ratio=float(np.median(ratios)),
                    ratio_iqr=_quartiles(ratios),
                    spread=max(abs(low - 1), abs(high - 1)),
                )
            )
        for name, path in job.models.items():
            rounds = samples.get((name, batch))
            if rounds is None:
                continue
            facts = {"size_bytes": path.stat().st_size} | (memory or {}).get(name, {})
            rows.append(_timing(name, batch, rounds, reference, facts, seed=job.seed))
    return BenchmarkResult(
        reference=job.reference,
        rows=tuple(rows),
        noise_floors=tuple(floors),
        failures=failures or {},
        environment={},
    )


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
        key: [np.array(rounds[turn], dtype=np.float64) for turn in sorted(rounds)]
        for key, rounds in grouped.items()
    }


def environment(job: BenchmarkJob) -> dict[str, str | int | list[str] | list[float]]:
    """What a reader needs to judge the numbers: processor, instruction sets, threads, versions."""
    features = cpu_features().model_dump()
    return {
        "cpu": features["model"],
        "isa": [name for name, found in features.items() if found is True],
        "cores": os.cpu_count() or 0,
        "threads": job.threads,
        "rounds": job.rounds,
        "os": platform.platform(),
        "python": platform.python_version(),
        "onnxruntime": _version_of("onnxruntime-gpu", "onnxruntime"),
        "numpy": metadata.version("numpy"),
        "provider": "CPUExecutionProvider",
    }


def _timing(
    name: str,
    batch: int,
    rounds: Sequence[NDArray[np.float64]],
    reference: Sequence[NDArray[np.float64]],
    facts: dict[str, float],
    *,
    seed: int,
) -> Timing:
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
        ratio_iqr=_quartiles(ratios),
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


def _quartiles(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(values, (25, 75))
    return float(low), float(high)


def _version_of(*names: str) -> str:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def _run_child(*arguments: str, threads: int) -> str:
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run(
        [sys.executable, "-m", "export.timing", *arguments], capture_output=True, text=True, env=env, check=False
    )
    if done.returncode:
        raise ExportError(
            f"Timing process '{arguments[0]}' has exit code {done.returncode}, expected 0. "
            f"Its last words: {done.stderr.strip()[-800:]}"
        )
    return done.stdout


def main(arguments: Sequence[str]) -> int:
    """``JOB.json OUT.json`` -> 0; raw samples go to ``latency_raw.csv`` beside OUT.json."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    job_path, out_path = map(Path, arguments)
    try:
        job = BenchmarkJob.model_validate_json(job_path.read_text())
        result = run_benchmark(job, out_path.parent)
    except (ExportError, ValidationError) as error:
        logger.error("%s", error)
        return 2
    out_path.write_text(result.model_dump_json(indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
