"""The tables of a report: their columns, and rows as text."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from export.comparison import BY_NAME, NONE, NOT_RUN, Column, is_missing, show

Cells = dict[str, Any]
"""A table ready for a template: ``columns`` and ``rows``."""


def table(rows: Iterable[Mapping[str, Any]], columns: Sequence[Column]) -> Cells:
    """Header cells and formatted rows."""
    return {
        "columns": [{"title": c.title, "meaning": c.meaning, "numeric": c.kind != "text"} for c in columns],
        "rows": [
            {
                "cells": [
                    {
                        "text": show(row.get(c.name), c.kind, c.missing),
                        "missing": is_missing(row.get(c.name)),
                    }
                    for c in columns
                ],
                "ships": row.get("verdict") == "ships",
            }
            for row in rows
        ],
    }


def used_columns(columns: Iterable[Column], rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """The columns in which some row has a value."""
    return [c for c in columns if any(not is_missing(row.get(c.name)) for row in rows)]


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """A column for every key of the rows; known names keep their title and unit."""
    names = dict.fromkeys(name for row in rows for name in row)

    def guess(name: str) -> Column:
        number = any(isinstance(row.get(name), float) for row in rows)
        kind = "share" if name.endswith("accuracy") else "number" if number else "text"
        return Column(name, name.replace("_", " "), "", kind)

    return [BY_NAME.get(name) or guess(name) for name in names]


def trials_in_words(trials: Sequence[Mapping[str, Any]]) -> str:
    """How many proposals of a search came to what: ``12 proposals: 8 trained, 4 over a budget``; empty for none."""
    if not trials:
        return ""
    counts = {words: sum(row.get("state") == state for row in trials) for state, words in STATES.items()}
    proposals = "1 proposal" if len(trials) == 1 else f"{len(trials)} proposals"
    return f"{proposals}: " + ", ".join(f"{count} {words}" for words, count in counts.items() if count)


def lineage_rows(lineage: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per stage entry, long hashes cut to twelve digits."""

    def short(value: object) -> str | None:
        return None if is_missing(value) else str(value)[:12]

    return [
        {
            "stage": entry.get("stage"),
            "name": entry.get("name"),
            "state": stage_state([entry]),
            "seconds": entry.get("seconds"),
            "key": short(entry.get("key")),
            "output": short(entry.get("output") or entry.get("sha256")),
            "mlflow_run_id": short(entry.get("mlflow_run_id")),
        }
        for entry in lineage
    ]


def stage_state(entries: Sequence[Mapping[str, Any]]) -> str:
    """``failed`` if any entry failed, ``cached`` if all were taken from the store, else ``ran``."""
    if any(entry.get("failed") or entry.get("error") for entry in entries):
        return "failed"
    return "cached" if all(entry.get("cached") for entry in entries) else "ran"


LINEAGE = (
    Column("stage", "stage", "part of the pipeline"),
    Column("name", "name", "what it was about", missing=NONE),
    Column("state", "state", "ran, cached or failed"),
    Column("seconds", "time", "wall time", "seconds"),
    Column("key", "key", "hash of code, configuration, inputs and seed", missing=NONE),
    Column("output", "output", "sha256 of what it made", missing=NONE),
    Column("mlflow_run_id", "MLflow run", "where its metrics are", missing=NONE),
)

PARITY = (
    Column("target", "target", "what it was exported for"),
    Column("name", "form", "this form of the model"),
    Column("against", "compared with", "the form before it", missing="nothing (first form)"),
    Column("status", "status", "measured, or built but not run here", missing=NOT_RUN),
    Column("top1", "accuracy", "share of correct answers", "share", missing=NOT_RUN),
    Column("flips", "flips", "share of answers that changed", "share", missing=NOT_RUN),
    Column("kl", "KL", "divergence of the probabilities, nats", "number", missing=NOT_RUN),
    Column("max_abs", "max diff", "largest difference of a logit", "number", missing=NOT_RUN),
    Column("floor", "rounding floor", "the model against itself under input noise of 1e-7", "number"),
    Column("num_samples", "images", "test images compared", "count", missing=NOT_RUN),
    Column("note", "note", "what else to know", missing=NONE),
)

TRIALS = (
    Column("number", "trial", "in the order they were tried"),
    Column("space", "space", "the search space it comes from"),
    BY_NAME["accuracy"],
    BY_NAME["latency_p50_ms"],
    Column("latency_predicted_ms", "predicted ms", "what the latency model said", "number"),
    BY_NAME["ece"],
    BY_NAME["macs"],
    BY_NAME["size_bytes"],
    Column("score", "filter's score", "what was said before training; compare within a study", "number"),
    Column("choices", "choices", "what was chosen in that space"),
)

STATES = {
    "complete": "trained",
    "stopped": "stopped early",
    "filtered": "filtered before training",
    "infeasible": "over a budget",
    "duplicate": "seen before",
    "failed": "failed",
}
"""State of a trial -> in words."""

CALIBRATION = tuple(BY_NAME[name] for name in ("id", "ece", "nll", "brier"))

LATENCY = (
    Column("model", "model", "the file that was timed"),
    *(
        BY_NAME[name]
        for name in (
            "batch",
            "ratio_to_reference",
            "latency_p50_ms",
            "latency_p90_ms",
            "latency_p95_ms",
            "latency_p99_ms",
            "throughput_per_s",
            "load_ms",
            "first_inference_ms",
            "peak_rss_bytes",
            "size_bytes",
        )
    ),
)
