"""The rows of ``comparison.csv`` in MLflow, a child run for each file; and the champion they are compared with."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from export.comparison import COLUMNS, NOT_RUN, is_missing, read_comparison
from tasks import registry, tracking

FILE = "file"
"""Tag ``stage`` of a file's run."""
KEYS = ("id", "batch", "pareto")
"""Name of the run, suffix of its metrics, and a parameter for all batches."""
PARAMS = tuple(column.name for column in COLUMNS if column.kind == "text" and column.name not in KEYS)
METRICS = tuple(column for column in COLUMNS if column.kind != "text" and column.name not in KEYS)

Row = Mapping[str, Any]


def log_rows(parent: tracking.Run, rows: Sequence[Row]) -> None:
    """A child run for each file, named like it, once; times carry their batch size: ``latency_p50_ms.b32``."""
    files: dict[str, list[Row]] = {}
    for row in rows:
        files.setdefault(str(row["id"]), []).append(row)
    for name, of_file in files.items():
        params = {key: of_file[0][key] for key in PARAMS if not is_missing(of_file[0].get(key))}
        tracking.log_candidate(
            parent, name, params={**params, "pareto": _front(of_file)}, metrics=metrics_of(of_file), stage=FILE
        )


def metrics_of(rows: Sequence[Row]) -> dict[str, float]:
    """Every number of one file's rows, by metric name."""
    found: dict[str, float] = {}
    for row in rows:
        for column in METRICS:
            value = row.get(column.name)
            if not is_missing(value):
                found[metric_name(column.name, row.get("batch"))] = float(value)  # type: ignore[arg-type]
    return found


def metric_name(column: str, batch: Any) -> str:
    """What MLflow calls a number of a row."""
    per_batch = next(each.per_batch for each in COLUMNS if each.name == column)
    return column if not per_batch or is_missing(batch) else f"{column}.b{batch}"


def _front(rows: Sequence[Row]) -> str:
    """The batch sizes at which a file is on the front, as words."""
    timed = [row for row in rows if not is_missing(row.get("pareto"))]
    if not timed:
        return NOT_RUN
    return ", ".join(f"b{row.get('batch')}" for row in timed if row["pareto"] is True) or "no"


def champion_facts(recipe: str) -> dict[str, Any]:
    """``champion.json``: version, file and numbers of the model in production as its own run measured them, or {}."""
    version = registry.champion(recipe)
    if version is None:
        return {}
    file, folder = version.tags.get("file", ""), champion_folder(version)
    rows = [] if folder is None else [row for row in read_comparison(folder / "comparison.csv") if row["id"] == file]
    times = {str(row["batch"]): row["latency_p50_ms"] for row in rows if not is_missing(row["latency_p50_ms"])}
    first = rows[0] if rows else {}
    return {
        "version": version.version,
        "file": file,
        "run": None if folder is None else folder.name,
        **{name: first.get(name) for name in ("accuracy", "ece", "size_bytes", "latency_p50_ms")},
        "latency_p50_ms_by_batch": times,
    }


def champion_folder(version: registry.Version) -> Path | None:
    """The run folder that a version is from, while it is kept."""
    place = version.tags.get("run_folder")
    return Path(place) if place and (Path(place) / "comparison.csv").is_file() else None
