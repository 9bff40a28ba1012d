"""One table over everything a run produced: its columns, its files, and who is on the Pareto front."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.table import Table

NOT_MEASURED = "not measured"
NOT_RUN = "not run"
NONE = "none"
"""For relations: a teacher has no parent, and nobody failed to measure it."""

Row = Mapping[str, Any]
"""One candidate x runtime x batch; a key that is absent, ``None`` or NaN reads "not measured"."""


@dataclass(frozen=True)
class Column:
    """One column: where its value is, how it is shown, and what it means."""

    name: str
    title: str
    meaning: str
    kind: Literal["text", "share", "points", "number", "count", "bytes", "ms", "seconds", "joules", "ratio"] = "text"
    main: bool = False
    """Whether the short table shows it."""
    missing: str = NOT_MEASURED
    """What an empty cell reads."""
    per_batch: bool = False
    """Whether the rows of one file differ in it, one value for each batch size."""


COLUMNS: tuple[Column, ...] = (
    Column("id", "candidate", "name of the model or file", main=True),
    Column("role", "role", "teacher, student, control or file", main=True),
    Column("parent", "parent", "what it was made from", missing=NONE),
    Column("control", "control", "the row without this stage, for the stage's marginal gain", missing=NONE),
    Column("stages", "stages", "the stages that made it, in order", missing=NONE),
    Column("recipe", "recipe", "the recipe of the run"),
    Column("teachers", "teachers", "who taught it", missing=NONE),
    Column("seed", "seed", "seed of the run", "count"),
    Column("accuracy", "accuracy", "share of correct answers on the test split", "share", main=True),
    Column("accuracy_top5", "top-5", "the right class is among the five most probable", "share"),
    Column("delta_teacher", "vs teacher", "accuracy minus the best teacher's, in points", "points", main=True),
    Column("delta_control", "vs control", "accuracy minus its control's, in points", "points"),
    Column("drop_low", "drop, low", "lower 95 % bound of the accuracy lost to the best teacher", "points"),
    Column("drop_high", "drop, high", "upper 95 % bound of it", "points"),
    Column("worst_class_drop", "worst class", "largest accuracy drop of one class", "points"),
    Column("agreement_teacher", "agreement", "share of samples on which it answers like the teacher", "share"),
    Column("flips", "flips", "share of answers changed by the last conversion", "share"),
    Column("nll", "NLL", "negative log-likelihood, nats", "number"),
    Column("ece", "ECE", "expected calibration error over 15 bins", "number", main=True),
    Column("ece_scaled", "ECE scaled", "the same after temperature scaling", "number"),
    Column("brier", "Brier", "mean squared error of the probabilities", "number"),
    Column("accuracy_corrupted", "corrupted", "accuracy on corrupted images, mean", "share"),
    Column("params", "params", "trainable numbers", "count"),
    Column("macs", "MACs", "multiply-accumulates for one image", "count", main=True),
    Column("nonzero_share", "non-zero", "share of weights that are not zero", "share"),
    Column("tensorrt_sparse_layers", "2:4 layers", "weights TensorRT may read with sparse kernels", "count"),
    Column("compressed_bytes", "weights packed", "bytes of the weights if 2:4 ones were packed; arithmetic", "bytes"),
    Column("target", "target", "the recipe's targets it was measured on or built for", missing=NONE),
    Column("precision", "precision", "number format of the file", main=True),
    Column("size_bytes", "size", "size of the file that ships", "bytes", main=True),
    Column("peak_rss_bytes", "peak memory", "peak resident memory of a fresh process", "bytes"),
    Column("runtime", "runtime", "what ran it, with version"),
    Column("provider", "provider", "the runtime's back end"),
    Column("isa", "ISA", "instruction sets of the processor"),
    Column("threads", "threads", "threads of the session", "count"),
    Column("batch", "batch", "images per call", "count", main=True, per_batch=True),
    Column("load_ms", "load", "time to open the file", "ms"),
    Column("first_inference_ms", "first call", "time of the first inference", "ms"),
    Column("latency_p50_ms", "p50", "median time of one call", "ms", main=True, per_batch=True),
    Column("latency_p90_ms", "p90", "90th percentile", "ms", per_batch=True),
    Column("latency_p95_ms", "p95", "95th percentile", "ms", main=True, per_batch=True),
    Column("latency_p99_ms", "p99", "99th percentile", "ms", per_batch=True),
    Column("latency_std_ms", "std", "standard deviation of the calls", "ms", per_batch=True),
    Column("throughput_per_s", "images/s", "images per second at the median", "number", per_batch=True),
    Column(
        "ratio_to_reference",
        "time ratio",
        "median of per-round ratios to the reference",
        "ratio",
        main=True,
        per_batch=True,
    ),
    Column("energy_j", "energy", "joules per inference", "number", per_batch=True),
    Column("parity_max_abs", "max diff", "largest logit difference to the torch model", "number"),
    Column("parity_kl", "parity KL", "KL divergence to the torch model, nats", "number"),
    Column("seconds", "cost", "seconds the stages took that made it", "seconds"),
    Column(
        "pareto",
        "Pareto",
        "nothing measured is both faster and more accurate",
        main=True,
        missing=NOT_RUN,
        per_batch=True,
    ),
    Column("verdict", "verdict", "what the gate decided", main=True, missing=NOT_RUN),
    Column("status", "status", "measured, cached, failed with reason, or built but not run", missing=NOT_RUN),
)

BY_NAME = {column.name: column for column in COLUMNS}


def is_missing(value: object) -> bool:
    """Whether a cell holds nothing: absent, empty, NaN, or the words for it."""
    return (
        value is None or value in ("", NONE, NOT_RUN, NOT_MEASURED) or (isinstance(value, float) and math.isnan(value))
    )


def show(value: object, kind: str = "text", missing: str = NOT_MEASURED) -> str:
    """A cell as people read it, with its unit; ``missing`` for an empty one."""
    if is_missing(value):
        return missing
    if isinstance(value, bool):
        return "yes" if value else "no"
    if kind == "text" or not isinstance(value, int | float):
        return str(value)
    if kind == "share":
        return f"{value * 100:.2f} %"
    if kind == "points":
        return f"{value * 100:+.2f}"
    if kind == "bytes":
        return _scaled(float(value), 1024, ("B", "KiB", "MiB", "GiB"))
    if kind == "count":
        return str(round(value)) if abs(value) < 10_000 else _scaled(float(value), 1000, ("", "k", "M", "G"))
    if kind == "ratio":
        return f"{value:.3f}×"
    if kind == "ms":
        return f"{value:,.{3 if abs(value) < 10 else 1}f} ms"
    if kind == "joules":
        return f"{value:,.{0 if abs(value) >= 10 else 1}f} J"
    if kind == "seconds":
        return f"{value:,.{0 if abs(value) >= 10 else 1}f} s"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def write_comparison(rows: Iterable[Row], path: Path, columns: Sequence[Column] = COLUMNS) -> None:
    """Writes ``comparison.csv``: the columns in order, missing cells in the column's words.

    Raises:
        ValueError: a row has a key that is not a column.
    """
    known = {column.name for column in columns} | set(BY_NAME)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(column.name for column in columns)
        for row in rows:
            unknown = sorted(set(row) - known)
            if unknown:
                raise ValueError(f"Row '{row.get('id')}' has unknown columns {unknown}, expected only known ones.")
            writer.writerow(
                column.missing if is_missing(row.get(column.name)) else row[column.name] for column in columns
            )


def read_comparison(path: Path) -> list[dict[str, Any]]:
    """Rows of ``comparison.csv`` with numbers and truth values as such, and ``None`` for "not measured"."""
    with path.open(newline="") as file:
        return [{name: parse_cell(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def parse_cell(cell: str | None) -> str | int | float | bool | None:
    """The value a CSV cell stands for."""
    if is_missing(cell) or cell is None:
        return None
    if cell in ("True", "False"):
        return cell == "True"
    for convert in (int, float):
        try:
            value = convert(cell)
        except ValueError:
            continue
        return value if math.isfinite(value) else None
    return cell


NARROW = ("id", "accuracy", "batch", "latency_p50_ms", "ratio_to_reference", "verdict")
"""Columns that fit a terminal of 80 characters."""
COMPACT = (*NARROW, "delta_teacher", "macs", "size_bytes")
"""Columns that fit a terminal of 115 characters."""


def console_columns(width: int) -> tuple[Column, ...]:
    """The columns that fit a terminal of ``width`` characters."""
    names = NARROW if width < 115 else COMPACT if width < 170 else [column.name for column in COLUMNS if column.main]
    return tuple(column for column in COLUMNS if column.name in names)


def console_table(
    rows: Sequence[Row], *, title: str = "", width: int = 200, columns: Sequence[Column] | None = None
) -> "Table":
    """A table for a terminal of ``width`` characters: the shipped row in bold, fewer columns when narrow."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    columns = console_columns(width) if columns is None else columns
    table = Table(
        title=title or None,
        header_style="bold",
        row_styles=("", "dim"),
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in columns:
        title_with_unit = f"{column.title} ms" if column.kind == "ms" else column.title
        table.add_column(title_with_unit, justify="left" if column.kind == "text" else "right", no_wrap=True)
    for row in rows:
        style = "bold green" if row.get("verdict") == "ships" else None
        cells = (show(row.get(column.name), column.kind).removesuffix(" ms") for column in columns)
        table.add_row(*("-" if cell == NOT_MEASURED else cell for cell in cells), style=style)
    return table


def marginal_gains(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What each stage added over its control arm: one entry for every candidate that names a ``control``.

    ``gain`` is in accuracy share, ``seconds`` what the row cost more than its control; ``None`` where one
    of the two was not measured.
    """
    by_id = {row.get("id"): row for row in reversed(rows)}  # the first row of each wins
    by_id = dict(reversed(by_id.items()))
    gains = []
    for row in by_id.values():
        control = by_id.get(row.get("control"))
        if is_missing(row.get("control")):
            continue

        def difference(name: str, row: Row = row, control: Row | None = control) -> float | None:
            pair = (row.get(name), (control or {}).get(name))
            return None if any(map(is_missing, pair)) else float(pair[0]) - float(pair[1])  # type: ignore[arg-type]

        gains.append(
            {
                "id": row.get("id"),
                "control": row.get("control"),
                "stages": row.get("stages"),
                "gain": difference("accuracy"),
                "ece_change": difference("ece"),
                "seconds": difference("seconds"),
            }
        )
    return gains


def pareto_flags(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Which of the points (cost, value) are on the front: less cost and more value are better.

    A point is off the front when another is at least as good in both and better in one; equal points stay
    together. Points that are not finite are never on it.
    """
    finite = [math.isfinite(cost) and math.isfinite(value) for cost, value in points]

    def beaten(i: int) -> bool:
        cost, value = points[i]
        return any(
            finite[j] and c <= cost and v >= value and (c < cost or v > value) for j, (c, v) in enumerate(points)
        )

    return [finite[i] and not beaten(i) for i in range(len(points))]


def hypervolume(points: Sequence[tuple[float, float]], *, reference: tuple[float, float]) -> float:
    """Area between the front of (cost, value) points and a reference worse than all of them.

    Points beyond the reference in either coordinate add nothing.
    """
    worst_cost, worst_value = reference
    inside = sorted({(c, v) for c, v in points if c < worst_cost and v > worst_value})
    area, level = 0.0, worst_value
    for cost, value in inside:
        if value > level:
            area += (worst_cost - cost) * (value - level)
            level = value
    return area


def knee(points: Sequence[tuple[float, float]]) -> int | None:
    """Index of the front's knee: the point farthest above the line between the front's two ends.

    ``None`` without a finite point. With one or two on the front it is the one of higher value.
    """
    front = [i for i, on_front in enumerate(pareto_flags(points)) if on_front]
    if not front:
        return None
    front.sort(key=lambda i: points[i])
    (low_cost, low_value), (high_cost, high_value) = points[front[0]], points[front[-1]]
    if len(front) < 3 or high_cost == low_cost or high_value == low_value:
        return max(front, key=lambda i: points[i][1])

    def height(i: int) -> float:
        cost = (points[i][0] - low_cost) / (high_cost - low_cost)
        return (points[i][1] - low_value) / (high_value - low_value) - cost

    return max(front, key=height)


def _scaled(value: float, step: int, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if abs(value) < step:
            return f"{value:.3g} {unit}".strip()
        value /= step
    return f"{value:.3g} {units[-1]}"
