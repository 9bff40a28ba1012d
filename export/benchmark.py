"""Latency, throughput and memory of ONNX files, measured so that two of them can be compared.

The models of a job run interleaved in shuffled rounds in a process of their own; what counts is the median
over rounds of the ratio to a reference model *of the same round*. The reference enters twice: how far it
strays from itself is the noise floor, and no difference below it means anything.

    python -m export.benchmark JOB.json OUT.json      (OUT.json; raw samples go to latency_raw.csv beside it)
"""

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
from pydantic import Field, PositiveInt, ValidationError, model_validator

from compression.errors import ExportError
from compression.types import Frozen
from export.latency import (
    AGAIN,
    BenchmarkResult,
    NoiseFloor,
    Samples,
    median_interval,
    quartiles,
    read_raw,
    round_ratios,
    timing_of,
)
from export.runtime import cpu_features

logger = logging.getLogger(__name__)


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
    samples = read_raw(raw_path)
    for name in sorted({name for name, _ in samples} & set(job.models)) if job.memory else ():
        try:
            memory[name] = json.loads(_run_child("probe", str(job.models[name]), str(job.threads), threads=job.threads))
        except ExportError as error:  # it was timed, so its row stands; only its memory is unknown
            failures.setdefault(name, str(error))
    result = summarize(job, samples, memory=memory, failures=failures)
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
                    ratio_iqr=quartiles(ratios),
                    spread=max(abs(low - 1), abs(high - 1)),
                )
            )
        for name, path in job.models.items():
            rounds = samples.get((name, batch))
            if rounds is None:
                continue
            facts = {"size_bytes": path.stat().st_size} | (memory or {}).get(name, {})
            rows.append(timing_of(name, batch, rounds, reference, facts, seed=job.seed))
    return BenchmarkResult(
        reference=job.reference,
        rows=tuple(rows),
        noise_floors=tuple(floors),
        failures=failures or {},
        environment={},
    )


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


def _version_of(*names: str) -> str:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "unknown"


def _run_child(*arguments: str, threads: int) -> str:
    env = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    done = subprocess.run(
        [sys.executable, "-m", "export.timing", *arguments],
        capture_output=True,
        text=True,
        env=env,
        check=False,
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
        logger.critical("%s", error)
        return 2
    out_path.write_text(result.model_dump_json(indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
