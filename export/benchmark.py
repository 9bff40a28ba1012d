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
from collections.abc import Callable, Sequence
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
    shapes: dict[str, tuple[PositiveInt, ...]] = {}
    """Input -> all its sizes, for inputs with open sizes beyond the batch; the first size gives way to the batch."""

    @model_validator(mode="after")
    def _reference_is_a_model(self) -> "BenchmarkJob":
        if self.reference not in self.models:
            raise ValueError(f"reference '{self.reference}' is not a model, expected one of {sorted(self.models)}.")
        clash = [name for name in self.models if name.endswith(AGAIN)]
        if clash:
            raise ValueError(f"model '{clash[0]}' ends in '{AGAIN}', which is kept for the reference. Rename it.")
        return self


def run_benchmark(
    job: BenchmarkJob, folder: Path, *, on_progress: Callable[[int, int], object] | None = None
) -> BenchmarkResult:
    """Times the job in its own process; writes ``latency.json`` and ``latency_raw.csv`` into ``folder``.

    A model that cannot be loaded or run is named in ``failures`` and does not stop the others, not even by taking its
    process with it (where ``memory`` is asked for: each model then runs alone before it runs beside the others).

    Args:
        job: What to time.
        folder: Where the results go.
        on_progress: Called with (rounds done, rounds in all).

    Raises:
        ExportError: A file is missing, the reference itself failed, or the timing process died.
    """
    for name, path in job.models.items():
        if not path.is_file():
            raise ExportError(f"Model '{name}' has no file at '{path}', expected an ONNX file. Export it first.")
    folder.mkdir(parents=True, exist_ok=True)
    raw_path = folder / "latency_raw.csv"
    memory, failures = _probes(job) if job.memory else ({}, {})
    _refuse_dead_reference(job, failures)
    entrants = {name: path for name, path in job.models.items() if name not in failures}
    entrants[job.reference + AGAIN] = job.models[job.reference]
    request = job.model_dump(mode="json") | {"entrants": {name: str(path) for name, path in entrants.items()}}
    with tempfile.TemporaryDirectory() as scratch:
        job_path, out_path = Path(scratch, "job.json"), Path(scratch, "out.json")
        job_path.write_text(json.dumps(request))
        run_child(
            "time", str(job_path), str(out_path), str(raw_path), threads=job.threads, on_line=_progress(on_progress)
        )
        facts = json.loads(out_path.read_text())
    failures |= {name: why for name, why in facts["failures"].items() if not name.endswith(AGAIN)}
    _refuse_dead_reference(job, failures)
    result = summarize(job, read_raw(raw_path), memory=memory, failures=failures)
    result = result.model_copy(
        update={"environment": environment(job) | {k: facts[k] for k in ("load_before", "load_after")}}
    )
    (folder / "latency.json").write_text(result.model_dump_json(indent=2))
    timed = {row.model for row in result.rows}
    for name, why in failures.items():
        level = logging.INFO if name in timed else logging.WARNING  # timed at another batch size
        logger.log(level, "benchmark: model '%s' could not be timed: %s", name, why)
    return result


def _probes(job: BenchmarkJob) -> tuple[dict[str, dict[str, float]], dict[str, str]]:
    """Memory and load time of each model from a process of its own, and why there are none."""
    memory, failures = {}, {}
    for name, path in job.models.items():
        try:
            said = run_child("probe", str(path), str(job.threads), json.dumps(job.shapes), threads=job.threads)
            memory[name] = json.loads(said)
        except ExportError as error:
            failures[name] = str(error)
    return memory, failures


def _refuse_dead_reference(job: BenchmarkJob, failures: dict[str, str]) -> None:
    if job.reference in failures:
        raise ExportError(f"Reference '{job.reference}' cannot be timed: {failures[job.reference]}")


def _progress(on_progress: Callable[[int, int], object] | None) -> Callable[[str], object] | None:
    if on_progress is None:
        return None
    return lambda line: on_progress(*map(int, line.split()))


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


def run_child(*arguments: str, threads: int, on_line: Callable[[str], object] | None = None) -> str:
    """What ``python -m export.timing ARGUMENTS`` prints; every line goes to ``on_line`` when it is there.

    Raises:
        ExportError: The process failed; the message has its last words.
    """
    env = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    command = [sys.executable, "-m", "export.timing", *arguments]
    said = []
    with tempfile.TemporaryFile("w+") as last_words:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=last_words, text=True, env=env) as process:
            for line in process.stdout or ():
                said.append(line)
                if on_line is not None:
                    on_line(line)
        last_words.seek(0)
        wrong = last_words.read().strip()
    if process.returncode:
        raise ExportError(
            f"Timing process '{arguments[0]}' has exit code {process.returncode}, expected 0. "
            f"Its last words: {(wrong.splitlines() or ['none'])[-1][-800:]}"
        )
    return "".join(said)


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
