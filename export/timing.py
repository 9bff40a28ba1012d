"""The clock: what runs inside the benchmark's own processes.

Standard library, numpy and ONNX Runtime only, so that a process started from here begins in under a second
and the memory it reports is the model's and the runtime's, not a training framework's.

    python -m export.timing time  JOB.json OUT.json RAW.csv     all models side by side
    python -m export.timing probe MODEL.onnx THREADS            load, first inference, peak memory
"""

import csv
import gc
import json
import math
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

MIN_SAMPLES = 120
"""Fewest timed calls of one model at one batch size, whatever the rounds: p99 needs a tail to look at."""

CALLS_BESIDE = 7
"""Fewest calls in a round when two files are compared for a search."""

RAW_COLUMNS = ("batch", "round", "order", "model", "ms")


def open_session(path: Path, *, threads: int) -> Any:
    """An ONNX Runtime session on the CPU with a fixed number of threads and no spinning.

    Raises:
        RuntimeError: The runtime chose another provider than the CPU.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    if session.get_providers()[0] != "CPUExecutionProvider":
        raise RuntimeError(f"Session '{path}' has provider {session.get_providers()[0]}, expected the CPU.")
    return session


def feed_of(session: Any, batch: int, seed: int) -> dict[str, Any]:
    """Standard-normal inputs for every input of the session, its dynamic first axis set to ``batch``.

    Raises:
        ValueError: The graph has a fixed batch size other than ``batch``, or an unknown input type.
    """
    import numpy as np

    dtypes = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64}
    rng = np.random.default_rng(seed)
    feed = {}
    for spec in session.get_inputs():
        if spec.type not in dtypes:
            raise ValueError(f"Input '{spec.name}' has type {spec.type}, expected one of {sorted(dtypes)}.")
        first, *rest = spec.shape
        if isinstance(first, int) and first != batch:
            raise ValueError(f"Input '{spec.name}' has the fixed batch size {first}, expected {batch}.")
        shape = (batch, *(size if isinstance(size, int) else 1 for size in rest))
        feed[spec.name] = rng.standard_normal(shape, dtype=np.float32).astype(dtypes[spec.type])
    return feed


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far.

    Linux keeps the high-water mark of the address space in ``VmHWM``. ``ru_maxrss`` would also count the
    parent as it was when it started this process, so it is only the way elsewhere.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def probe(path: Path, *, threads: int) -> dict[str, float]:
    """Load and first-inference time in ms and memory in bytes of one model; call it in a fresh process.

    It runs one image, or as many as the graph is fixed to.

    ``model_rss_bytes`` is what the model added to the runtime that was already loaded.
    """
    import numpy  # noqa: F401  (part of the runtime's own memory, not of the model's)
    import onnxruntime  # noqa: F401

    runtime_bytes = peak_rss_bytes()
    started = time.perf_counter()
    session = open_session(path, threads=threads)
    loaded = time.perf_counter()
    batch = session.get_inputs()[0].shape[0]
    feed = feed_of(session, batch if isinstance(batch, int) else 1, seed=0)
    ready = time.perf_counter()
    session.run(None, feed)
    first = time.perf_counter()
    for _ in range(5):
        session.run(None, feed)
    peak = peak_rss_bytes()
    return {
        "load_ms": (loaded - started) * 1e3,
        "first_inference_ms": (first - ready) * 1e3,
        "peak_rss_bytes": peak,
        "model_rss_bytes": peak - runtime_bytes,
    }


def calls_per_round(call: Callable[[], object], *, warmup: int, inner_ms: float, rounds: int) -> int:
    """How many calls fill ``inner_ms`` after the warm-up, and at least the share of ``MIN_SAMPLES``."""
    for _ in range(warmup):
        call()
    repeats = 5
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    per_call_ms = (time.perf_counter() - started) / repeats * 1e3
    return max(math.ceil(MIN_SAMPLES / rounds), int(inner_ms / max(per_call_ms, 1e-6)))


def time_calls(call: Callable[[], object], count: int, clock: Callable[[], int] = time.perf_counter_ns) -> list[float]:
    """Duration of each of ``count`` calls, in ms by ``clock``, which counts nanoseconds."""
    durations = []
    for _ in range(count):
        started = clock()
        call()
        durations.append((clock() - started) / 1e6)
    return durations


def side_by_side(
    entrants: Mapping[str, Path], job: Mapping[str, Any], keep: Callable[[Sequence[Any]], object]
) -> dict[str, str]:
    """Times every entrant in shuffled rounds, hands each sample to ``keep``; says who failed and why.

    In a round each model runs for about ``inner_ms``, one after the other in an order drawn anew, so that a
    slow spell of the machine hits all of them alike. A sample is (batch, round, order, model, ms).
    """
    failures: dict[str, str] = {}
    sessions = {}
    for name, path in entrants.items():
        try:
            sessions[name] = open_session(path, threads=job["threads"])
        except Exception as error:  # a broken file is a row of the result
            failures[name] = f"{type(error).__name__}: {error}"
    rng = random.Random(job["seed"])
    for batch in job["batches"]:
        calls: dict[str, Callable[[], object]] = {}
        counts: dict[str, int] = {}
        for name, session in sessions.items():
            try:
                feed = feed_of(session, batch, job["seed"])
                run = session.run
                call: Callable[[], object] = lambda run=run, feed=feed: run(None, feed)  # noqa: E731
                counts[name] = calls_per_round(
                    call, warmup=job["warmup"], inner_ms=job["inner_ms"], rounds=job["rounds"]
                )
                calls[name] = call
            except Exception as error:
                failures.setdefault(name, f"at batch {batch}: {type(error).__name__}: {error}")
        gc.collect()
        gc.disable()
        for turn in range(job["rounds"]):
            order = list(calls)
            rng.shuffle(order)
            for place, name in enumerate(order):
                for duration in time_calls(calls[name], counts[name]):
                    keep((batch, turn, place, name, f"{duration:.6f}"))
        gc.enable()
    return failures


def latency_beside(
    path: Path,
    reference: Path,
    *,
    batch: int,
    threads: int = 1,
    warmup: int = 10,
    rounds: int = 9,
    inner_ms: float = 15.0,
) -> tuple[float, float]:
    """p50 and p95 of one ONNX file in this process as shares of the p50 of another; a quick look for searches.

    The two run in turn, at least ``CALLS_BESIDE`` calls each and round by round; the p50 is the median over rounds of
    the ratio of their medians. One thread is timed by its own CPU clock: on a machine that is busy with other work a
    long call is interrupted more often than a short one, and a clock on the wall would take that for slowness.
    Reports use ``export.benchmark``.
    """
    clock = time.thread_time_ns if threads == 1 else time.perf_counter_ns
    runs, counts = [], []
    for each in (path, reference):
        session = open_session(each, threads=threads)
        feed = feed_of(session, batch, seed=0)
        call: Callable[[], object] = lambda session=session, feed=feed: session.run(None, feed)  # noqa: E731
        runs.append(call)
        fitting = calls_per_round(call, warmup=warmup, inner_ms=inner_ms, rounds=MIN_SAMPLES)
        counts.append(max(CALLS_BESIDE, fitting))
    ratios, own = [], []
    for turn in range(rounds):
        order = (0, 1) if turn % 2 == 0 else (1, 0)
        times = {place: sorted(time_calls(runs[place], counts[place], clock)) for place in order}
        medians = {place: found[len(found) // 2] for place, found in times.items()}
        ratios.append(medians[0] / medians[1])
        own += times[0]
    own.sort()
    p50 = sorted(ratios)[rounds // 2]
    return p50, p50 * own[min(len(own) - 1, int(0.95 * len(own)))] / own[len(own) // 2]


def latency_p50_ms(path: Path, *, batch: int, threads: int = 1, warmup: int = 10, seconds: float = 0.3) -> float:
    """Median latency of one ONNX file in this process, in ms; a quick look for searches, not for reports.

    One thread is timed by its own CPU clock, so that other work on the machine does not count. Only comparable with
    other values taken in the same few minutes; reports use ``export.benchmark``.
    """
    session = open_session(path, threads=threads)
    feed = feed_of(session, batch, seed=0)
    count = calls_per_round(lambda: session.run(None, feed), warmup=warmup, inner_ms=seconds * 1e3, rounds=12)
    clock = time.thread_time_ns if threads == 1 else time.perf_counter_ns
    durations = sorted(time_calls(lambda: session.run(None, feed), count, clock))
    return durations[len(durations) // 2]


def main(arguments: Sequence[str]) -> None:
    """Runs one of the two commands of the module's docstring."""
    command, *rest = arguments
    if command == "probe":
        path, threads = rest
        sys.stdout.write(json.dumps(probe(Path(path), threads=int(threads))) + "\n")
        return
    job_path, out_path, raw_path = map(Path, rest)
    job = json.loads(job_path.read_text())
    load_before = os.getloadavg()
    with raw_path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(RAW_COLUMNS)
        failures = side_by_side({name: Path(path) for name, path in job["entrants"].items()}, job, writer.writerow)
    facts = {"failures": failures, "load_before": load_before, "load_after": os.getloadavg()}
    out_path.write_text(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1:])
