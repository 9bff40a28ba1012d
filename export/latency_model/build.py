"""Building a latency model: its table is read, or the sample is timed and the table kept."""

import itertools
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from compression.errors import CompressionError
from compression.search.space import Operator
from export.latency_model.clocks import Clock, OnnxRuntimeClock, Timing
from export.latency_model.fit import FittedLatency, held_out
from export.latency_model.operators import InputShape, operators_of
from export.latency_model.sample import FAMILIES, max_macs_of, sample_nets
from export.latency_model.table import FORMAT, LatencyTable, OperatorRow, Row, fingerprint, keep, kept, row_of

LOGGER = logging.getLogger(__name__)

NETS = 96
"""Networks that are timed for the fit; a quarter as many again are timed for the report."""


def build_latency_model(
    input_shape: InputShape,
    *,
    batch: int,
    folder: Path,
    nets: int = NETS,
    seed: int = 0,
    clock: Clock | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> FittedLatency:
    """The latency model of this machine: read from ``folder`` if it was measured before, else measured now and kept.

    The file is ``<fingerprint>-b<batch>-<C>x<H>x<W>.json``. One of another machine, version, seed or of fewer networks,
    and a damaged one, is replaced, which the log says.

    Args:
        input_shape: Channels, height, width.
        batch: Images per call.
        folder: Where tables are kept; made if missing.
        nets: Networks to fit to; a quarter as many are timed besides, to report the error.
        seed: Of the sample.
        clock: What times them; ONNX Runtime on one thread of this CPU by default.
        on_progress: Gets the number of networks that are done, and of all.

    Raises:
        CompressionError: ``nets`` or ``batch`` is too small.
    """
    if nets < len(set(FAMILIES)) or batch < 1:
        raise CompressionError(
            f"Latency model '{'x'.join(map(str, input_shape))}' has nets {nets} and batch {batch}, expected at least "
            f"{len(set(FAMILIES))} networks (one of each family) and one image. Leave nets at {NETS}."
        )
    chosen: Clock = clock if clock is not None else OnnxRuntimeClock(input_shape, batch=batch)
    facts = dict(chosen.facts)
    path = folder / f"{fingerprint(facts)}-b{batch}-{'x'.join(map(str, input_shape))}.json"
    wanted = {"format": FORMAT, "facts": facts, "input_shape": input_shape, "batch": batch, "seed": seed}
    table = kept(path, wanted, nets)
    if table is None:
        table = _measured(chosen, input_shape, batch=batch, nets=nets, seed=seed, on_progress=on_progress)
        keep(table, path)
    return FittedLatency(table)


def _measured(
    clock: Clock,
    input_shape: InputShape,
    *,
    batch: int,
    nets: int,
    seed: int,
    on_progress: Callable[[int, int], None] | None,
) -> LatencyTable:
    parts = {"fit": nets, "held-out": max(4, nets // 4)}
    timed: dict[str, list[tuple[list[Operator], Timing]]] = {part: [] for part in parts}
    done = itertools.count(1)
    for part, count in parts.items():
        for _, model in sample_nets(count, input_shape, seed=f"{seed}-{part}", max_macs=max_macs_of(batch)):
            timing = clock.measure(model, kernels=part == "fit")
            timed[part].append((operators_of(model, input_shape, block=clock.block), timing))
            if on_progress is not None:
                on_progress(next(done), sum(parts.values()))
    reference_ms = float(np.median([timing.reference_ms for pairs in timed.values() for _, timing in pairs]))
    rows = [
        Row(source="net", operators=tuple(map(row_of, bag)), ms=timing.ratio * reference_ms)
        for bag, timing in timed["fit"]
    ]
    table = LatencyTable(
        facts=dict(clock.facts),
        input_shape=input_shape,
        batch=batch,
        block=clock.block,
        nets=nets,
        seed=seed,
        reference_ms=reference_ms,
        rows=(*rows, *_kernel_rows([timing for _, timing in timed["fit"]], reference_ms)),
    )
    bags = [bag for bag, _ in timed["held-out"]]
    found = held_out(FittedLatency(table), bags, [timing.ratio * reference_ms for _, timing in timed["held-out"]])
    LOGGER.info("latency model at batch %d, on networks not seen: %s", batch, found)
    return table.model_copy(update={"held_out": found})


def _kernel_rows(timings: Sequence[Timing], reference_ms: float) -> list[Row]:
    """One row for each kernel that was seen, the median where it was seen often, at the speed of the session."""
    seen: dict[tuple[OperatorRow, ...], list[float]] = {}
    for timing in timings:
        for row in timing.kernels:
            seen.setdefault(row.operators, []).append(row.ms * reference_ms / timing.reference_ms)
    return [Row(source="kernel", operators=bag, ms=float(np.median(found))) for bag, found in seen.items()]
