"""The comparison as people explore it: one table with filters, sorting and a Pareto plot, from the rows alone.

The page holds the rows twice: as a table that needs no JavaScript, and as JSON with the numbers as they were measured,
from which ``explorer.js.jinja`` filters, sorts and draws.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from export.comparison import Column, is_missing, show

FILTERS = ("recipe", "run", "role", "target", "precision", "batch", "verdict")
"""Columns with a menu, where the rows differ in them."""
CURVES = ("validation_accuracy", "loss")
"""What is drawn of a training, per epoch."""

Row = Mapping[str, Any]
Histories = Mapping[str, Sequence[Row]]


@dataclass(frozen=True)
class Mark:
    """A point of the plot that is no row of the table, say the champion of another night."""

    label: str
    accuracy: float
    latency_p50_ms: float
    batch: int


def explorer(
    rows: Sequence[Row],
    columns: Sequence[Column],
    *,
    marks: Sequence[Mark] = (),
    histories: Mapping[str, Histories] | None = None,
) -> dict[str, Any]:
    """What ``explorer.html.jinja`` shows.

    Args:
        rows: Comparison rows; ``champion`` marks the one in production.
        columns: The columns, in order.
        marks: Further points of the plot.
        histories: Run -> name of a training -> its rows per epoch; the run is "" where rows name none.
    """
    curves, places = _curves(histories or {})
    cells = [
        [
            {"text": show(row.get(c.name), c.kind, c.missing), "missing": is_missing(row.get(c.name)), "numeric": _n(c)}
            | {"extra": not c.main}
            for c in columns
        ]
        for row in rows
    ]
    content = {
        "columns": [{"name": c.name, "title": c.title, "kind": c.kind, "main": c.main} for c in columns],
        "rows": [{c.name: value for c in columns if not is_missing(value := row.get(c.name))} for row in rows],
        "marks": [vars(mark) for mark in marks],
        "curves": curves,
        "trained": [_trained(row, places) for row in rows],
    }
    return {
        "columns": [
            {"name": c.name, "title": c.title, "meaning": c.meaning, "numeric": _n(c), "extra": not c.main}
            for c in columns
        ],
        "rows": [
            {"cells": line, "ships": row.get("verdict") == "ships", "champion": not is_missing(row.get("champion"))}
            for line, row in zip(cells, rows, strict=True)
        ],
        "filters": _filters(rows, columns),
        "has_curves": bool(curves),
        "json": as_script(content),
    }


def champion_marks(champion: Row) -> list[Mark]:
    """The points of ``champion.json``, one for each batch it was timed with."""
    if is_missing(champion.get("accuracy")):
        return []
    times: Mapping[str, Any] = champion.get("latency_p50_ms_by_batch") or {}
    label = f"champion, version {champion.get('version')}"
    return [
        Mark(label, float(champion["accuracy"]), float(time), int(batch))
        for batch, time in times.items()
        if not is_missing(time)
    ]


def as_script(content: Any) -> str:
    """JSON that may stand between script tags: no tag can begin in it."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")


def _n(column: Column) -> bool:
    return column.kind != "text"


def _filters(rows: Sequence[Row], columns: Sequence[Column]) -> list[dict[str, Any]]:
    titles = {column.name: column.title for column in columns}
    found = []
    for name in FILTERS:
        values = {value for row in rows for value in values_of(row.get(name))}
        if name in titles and len(values) > 1:
            ordered = sorted(values, key=lambda value: (isinstance(value, str), value))
            found.append({"name": name, "title": titles[name], "choices": ordered})
    return found


def values_of(value: Any) -> list[Any]:
    """A cell may list several, as targets do."""
    if is_missing(value):
        return []
    return value.split(", ") if isinstance(value, str) else [value]


def _curves(histories: Mapping[str, Histories]) -> tuple[list[dict[str, Any]], dict[tuple[str, str], int]]:
    curves: list[dict[str, Any]] = []
    places: dict[tuple[str, str], int] = {}
    for run, trainings in histories.items():
        for name, epochs in trainings.items():
            drawn = {key: [epoch.get(key) for epoch in epochs] for key in CURVES}
            drawn = {key: values for key, values in drawn.items() if not any(map(is_missing, values))}
            if drawn:
                places[run, name] = len(curves)
                curves.append({"label": f"{name} · {run}" if len(histories) > 1 else name, **drawn})
    return curves, places


def _trained(row: Row, places: Mapping[tuple[str, str], int]) -> list[int]:
    """The trainings behind a file: of its model, and of its integers where they were fine-tuned."""
    base, _, form = str(row.get("id")).partition(".")
    names = [base.removeprefix("teacher-") if row.get("role") == "teacher" else base]
    if form.startswith("int8") and form != "int8-ptq":
        names.append(f"{base} (quantize)")
    run = str(row.get("run") or "")
    return [places[run, name] for name in names if (run, name) in places]
