"""The clock: what runs inside the benchmark's own processes.

Standard library, numpy and ONNX Runtime only, so that a process started from here begins in under a second
and the memory it reports is the model's and the runtime's, not a training framework's.

    python -m export.timing time    JOB.json OUT.json RAW.csv   all models side by side
    python -m export.timing probe   MODEL.onnx THREADS [SHAPES] load, first inference, peak memory
    python -m export.timing profile JOB.json OUT.json           time per operator of one model

SHAPES is JSON: input -> sizes, for inputs with open sizes beyond the batch.
"""

import csv
import gc
import json
import math
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from export.feed import Shapes, feed_of, fixed_batch, inputs_of

MIN_SAMPLES = 120
"""Fewest timed calls of one model at one batch size, whatever the rounds: p99 needs a tail to look at."""

CALLS_BESIDE = 7
"""Fewest calls in a round when two files are compared for a search."""

RAW_COLUMNS = ("batch", "round", "order", "model", "ms")

PROFILED_CALLS = 200
"""Most calls that are profiled: the runtime writes about a kilobyte for each operator of each call."""

CONTROL = frozenset({"If", "Loop", "Scan"})
"""Operators whose time holds that of the operators inside them."""


def open_session(
    path: Path, *, threads: int, profile_prefix: str | None = None, optimized_path: Path | None = None
) -> Any:
    """An ONNX Runtime session on the CPU with a fixed number of threads and no spinning.

    Args:
        path: The graph.
        threads: Intra-op threads.
        profile_prefix: Start of the name of the file the runtime's profiler writes; None: no profile.
        optimized_path: Where the runtime writes the graph it really runs.

    Raises:
        RuntimeError: The runtime chose another provider than the CPU.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile_prefix
    if optimized_path is not None:
        options.optimized_model_filepath = str(optimized_path)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    if session.get_providers()[0] != "CPUExecutionProvider":
        raise RuntimeError(f"Session '{path}' has provider {session.get_providers()[0]}, expected the CPU.")
    return session


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


def probe(path: Path, *, threads: int, shapes: Shapes | None = None) -> dict[str, float]:
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
    feed = feed_of(session, fixed_batch(inputs_of(session)) or 1, seed=0, shapes=shapes)
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
    entrants: Mapping[str, Path],
    job: Mapping[str, Any],
    keep: Callable[[Sequence[Any]], object],
    tell: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, str]:
    """Times every entrant in shuffled rounds, hands each sample to ``keep``; says who failed and why.

    ``tell(done, total)`` hears of every finished round, between timed calls.

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
    for place_of_batch, batch in enumerate(job["batches"]):
        calls: dict[str, Callable[[], object]] = {}
        counts: dict[str, int] = {}
        for name, session in sessions.items():
            try:
                feed = feed_of(session, batch, job["seed"], job.get("shapes"))
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
            tell(place_of_batch * job["rounds"] + turn + 1, len(job["batches"]) * job["rounds"])
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


def profile(job: Mapping[str, Any]) -> dict[str, Any]:
    """Time per operator by ONNX Runtime's own profiler; call it in a fresh process.

    ``job`` has path, optimized (where the graph the runtime really runs goes), threads, batch (None: as the graph
    has it), shapes, seed and seconds (about how long to profile).

    The answer has batch, calls, ``call_us`` (one call without the profiler) and ``profiled_us`` (with it), and nodes
    in order of execution: name, operator, microseconds, input types and sizes of the first output. Times are the mean
    of the middle half of the calls: as robust as the median, and finer than the profiler's whole microseconds.
    """
    path, threads = Path(job["path"]), job["threads"]
    session = open_session(path, threads=threads)
    batch = job["batch"] or fixed_batch(inputs_of(session)) or 1
    feed = feed_of(session, batch, job["seed"], job["shapes"])
    call = lambda run=session.run: run(None, feed)  # noqa: E731
    count = calls_per_round(call, warmup=3, inner_ms=job["seconds"] * 1e3, rounds=MIN_SAMPLES)
    count = max(5, min(count, PROFILED_CALLS))
    call_us = midmean(time_calls(call, count)) * 1e3
    del session, call
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(
            path, threads=threads, profile_prefix=str(Path(folder, "profile")), optimized_path=Path(job["optimized"])
        )
        session.run(None, feed)
        first = time.perf_counter()
        done = 1
        for _ in range(count):
            session.run(None, feed)
            done += 1
            if done >= 6 and time.perf_counter() - first > 4 * job["seconds"]:
                break
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes, profiled_us = node_times(events)
    return {"batch": batch, "calls": done - 1, "call_us": call_us, "profiled_us": profiled_us, "nodes": nodes}


def node_times(events: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], float]:
    """Nodes in order of execution with their time, and the time of one call, in microseconds, from a profile.

    The first call is the warm-up and does not count. What runs inside If, Loop and Scan counts as theirs.
    """
    calls = sorted((e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "model_run")[1:]
    timed = sorted((e for e in events if e["cat"] == "Node" and "op_name" in e["args"]), key=lambda e: e["ts"])
    durations: dict[str, list[float]] = {}
    facts: dict[str, dict[str, Any]] = {}
    for number, (start, end) in enumerate(calls):
        inside = [e for e in timed if start <= e["ts"] <= end]
        blocks = [(e["ts"], e["ts"] + e["dur"], e["name"]) for e in inside if e["args"]["op_name"] in CONTROL]
        for event in inside:
            name, args = event["name"].removesuffix("_kernel_time"), event["args"]
            if any(s <= event["ts"] < e and event["name"] != block for s, e, block in blocks):
                continue
            times = durations.setdefault(name, [0.0] * len(calls))
            times[number] += event["dur"]
            outputs = args.get("output_type_shape") or [{}]
            types = [kind for each in args.get("input_type_shape", ()) for kind in each]
            shape = next(iter(outputs[0].values()), [])
            facts.setdefault(name, {"operator": args["op_name"], "types": types, "shape": shape})
    nodes = [{"name": name, "microseconds": midmean(times)} | facts[name] for name, times in durations.items()]
    return nodes, midmean([end - start for start, end in calls])


def midmean(values: Sequence[float]) -> float:
    """Mean of the middle half."""
    ordered = sorted(values)
    cut = len(ordered) // 4
    middle = ordered[cut : len(ordered) - cut]
    return sum(middle) / len(middle)


def main(arguments: Sequence[str]) -> None:
    """Runs one of the commands of the module's docstring."""
    command, *rest = arguments
    if command == "probe":
        path, threads, *shapes = rest
        found = probe(Path(path), threads=int(threads), shapes=json.loads(shapes[0]) if shapes else None)
        sys.stdout.write(json.dumps(found) + "\n")
        return
    if command == "profile":
        job_path, out_path = map(Path, rest)
        out_path.write_text(json.dumps(profile(json.loads(job_path.read_text()))))
        return
    job_path, out_path, raw_path = map(Path, rest)
    job = json.loads(job_path.read_text())

    def tell(done: int, total: int) -> None:
        sys.stdout.write(f"{done} {total}\n")
        sys.stdout.flush()

    load_before = os.getloadavg()
    with raw_path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(RAW_COLUMNS)
        entrants = {name: Path(path) for name, path in job["entrants"].items()}
        failures = side_by_side(entrants, job, writer.writerow, tell)
    facts = {"failures": failures, "load_before": load_before, "load_after": os.getloadavg()}
    out_path.write_text(json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1:])
