"""From a run folder to ``report.html`` and ``report.md``: what the templates show, and nothing else."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from export.comparison import BY_NAME, COLUMNS, NOT_MEASURED, Column, is_missing, marginal_gains, show
from export.report import plots
from export.report.run_folder import RunFolder, open_run

logger = logging.getLogger(__name__)

HEADLINES = {
    "accept": ("Accepted", "The shipped file meets every limit of the policy."),
    "inconclusive": ("Inconclusive", "The data cannot tell whether the limits are met, so nothing ships."),
    "regression": ("Regression", "A limit on quality or speed is broken, so nothing ships."),
    "infeasible": ("Infeasible", "The target's budget cannot be met by this model, so nothing ships."),
    "anomalous": ("Anomalous", "The numbers are too strange to believe; a person has to look."),
    "not run": ("Not judged", "The gate was not run."),
}

KEY_NUMBERS = (
    ("accuracy", "Accuracy", "share of correct answers on the test split"),
    ("macs", "Compute", "multiply-accumulates for one image"),
    ("size_bytes", "File size", "the file that ships"),
    ("latency_p50_ms", "Latency", "median of one call"),
)

PARITY_COLUMNS = ("name", "against", "status", "top1", "flips", "kl", "max_abs", "floor", "note")


LINEAGE_COLUMNS = tuple(
    (name, title, kind, "")
    for name, title, kind in (
        ("stage", "stage", "text"),
        ("name", "name", "text"),
        ("state", "state", "text"),
        ("seconds", "time", "seconds"),
        ("key", "key", "text"),
        ("output", "output", "text"),
        ("mlflow_run_id", "MLflow run", "text"),
    )
)


def build_report(run_folder: Path) -> Path:
    """Writes ``report.html``, ``report.md`` and ``pareto.png`` into the run folder; returns the HTML's path.

    The page is one file without outside parts. A section whose file is missing says "not run", a value that
    is missing says "not measured".

    Raises:
        ArtifactError: there is no such folder.
    """
    run = open_run(run_folder)
    facts = contents(run)
    html_path = run.path / "report.html"
    html_path.write_text(_render("template.html.jinja", facts | {"plots": drawings(run)}, escape=True))
    (run.path / "report.md").write_text(_render("template.md.jinja", facts, escape=False))
    plots.save_pareto(run.path / "pareto.png", run.trials, _landmarks(run))
    logger.info("report: wrote '%s'", html_path)
    return html_path


def contents(run: RunFolder) -> dict[str, Any]:
    """Everything the templates show except the plots, as plain values and text."""
    outcome = run.verdict.outcome if run.verdict else "not run"
    timings = [row.model_dump() for row in run.latency.rows] if run.latency else []
    floors = run.latency.noise_floors if run.latency else ()
    title, meaning = HEADLINES.get(outcome, (str(outcome), ""))
    teacher, shipped = best_teacher(run.comparison), shipped_row(run.comparison)
    used = [c for c in COLUMNS if any(not is_missing(row.get(c.name)) for row in run.comparison)]
    short = [column for column in used if column.main]
    return {
        "run": run,
        "title": run.name,
        "outcome": outcome,
        "headline": title,
        "meaning": meaning,
        "summary": run.verdict.summary if run.verdict else "",
        "targets": list(run.verdict.targets.values()) if run.verdict else [],
        "teacher": teacher,
        "shipped": shipped,
        "shipped_label": "shipped file" if shipped and shipped.get("verdict") == "ships" else "best student",
        "key_numbers": [_key_number(*which, teacher, shipped) for which in KEY_NUMBERS],
        "pipeline": pipeline(run.lineage),
        "total_seconds": show(sum(e.get("seconds") or 0.0 for e in run.lineage) or None, "seconds"),
        "lineage_table": table(_lineage_rows(run.lineage), LINEAGE_COLUMNS),
        "short_table": table(run.comparison, [_as_column(c) for c in short]),
        "full_table": table(run.comparison, [_as_column(c) for c in used]),
        "unmeasured": [c.title for c in COLUMNS if c not in used],
        "teacher_table": table(run.teachers, _guess_columns(run.teachers)),
        "parity_table": table(run.parity, _parity_columns(run.parity)),
        "reference": run.latency.reference if run.latency else "the reference",
        "latency_table": table(timings, _latency_columns()),
        "noise_floors": [(floor.batch, show(floor.spread, "share")) for floor in floors],
        "latency_failures": run.latency.failures if run.latency else {},
        "gains": marginal_gains(run.comparison),
        "selection": selection(run.selection),
        "environment": flat(run.env or (run.latency.environment if run.latency else {})),
        "show": show,
    }


def drawings(run: RunFolder) -> dict[str, str]:
    """Inline SVG by section; empty text for a plot without data."""
    students = {name: rows for name, rows in run.histories.items() if rows}
    reference = run.latency.reference if run.latency else ""
    floors = {floor.batch: floor.spread for floor in run.latency.noise_floors} if run.latency else {}
    batches = sorted({batch for _, batch in run.samples})
    gains = {str(g["id"]): g["gain"] * 100 for g in marginal_gains(run.comparison) if g["gain"] is not None}
    figures = {
        "pareto": (plots.pareto(run.trials, _landmarks(run)), "accuracy over latency of every candidate"),
        "accuracy": (
            plots.curves(students, "validation_accuracy", "validation accuracy (%)"),
            "validation accuracy per epoch",
        ),
        "loss": (plots.curves(students, "loss", "training loss"), "training loss per epoch"),
        "reliability": (plots.reliability(run.reliability), "accuracy over confidence per model"),
        "gains": (
            plots.bars(gains, "accuracy gained over its control (points)"),
            "marginal gain of each stage",
        ),
    }
    for batch in batches:
        figure = plots.latency(run.samples, reference, batch, floors.get(batch))
        figures[f"latency_{batch}"] = (figure, f"latency ratios at batch {batch}")
    return {
        name: "" if figure is None else plots.svg(figure, name, description)
        for name, (figure, description) in figures.items()
    }


def best_teacher(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The most accurate teacher's row, at the smallest batch it was timed with."""
    teachers = [row for row in rows if row.get("role") == "teacher"]
    return min(teachers, key=lambda r: (-(r.get("accuracy") or 0), _batch(r)), default=None)


def shipped_row(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The shipped file's row at its smallest batch; without one the most accurate student's or file's."""
    shipped = [row for row in rows if row.get("verdict") == "ships"]
    if shipped:
        return min(shipped, key=_batch)
    others = [row for row in rows if row.get("role") in ("student", "file")]
    return min(others, key=lambda r: (-(r.get("accuracy") or 0), _batch(r)), default=None)


def pipeline(lineage: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Stages in order, entries of one stage together, with what they cost and whether they were cached."""
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for entry in lineage:
        stages.setdefault(str(entry.get("stage", "?")), []).append(entry)
    totals = {name: sum(e.get("seconds") or 0.0 for e in entries) for name, entries in stages.items()}
    longest = max(totals.values(), default=0.0) or 1.0
    return [
        {
            "stage": name,
            "state": _state(entries),
            "count": len(entries),
            "cached": sum(bool(e.get("cached")) for e in entries),
            "names": _few([str(e["name"]) for e in entries if not is_missing(e.get("name"))]),
            "seconds": show(totals[name], "seconds")
            if any("seconds" in e for e in entries)
            else NOT_MEASURED,
            "share": totals[name] / longest,
        }
        for name, entries in stages.items()
    ]


def _few(names: Sequence[str], limit: int = 4) -> list[str]:
    shown = list(dict.fromkeys(names))
    return shown if len(shown) <= limit else [*shown[: limit - 1], f"and {len(shown) - limit + 1} more"]


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[tuple[str, str, str, str]]) -> dict[str, Any]:
    """Header cells and formatted rows; ``columns`` are (name, title, kind, meaning)."""
    return {
        "columns": [
            {"title": title, "kind": kind, "meaning": meaning, "numeric": kind != "text"}
            for _, title, kind, meaning in columns
        ],
        "rows": [
            {
                "cells": [show(row.get(name), kind) for name, _, kind, _ in columns],
                "ships": row.get("verdict") == "ships",
                "role": str(row.get("role") or ""),
            }
            for row in rows
        ],
    }


def selection(report: Mapping[str, Any]) -> dict[str, Any]:
    """Teacher selection by teacher: (score, rank) per selector, and whether it was taken."""
    scores: Mapping[str, Mapping[str, float]] = report.get("scores", {})
    ranks: Mapping[str, Mapping[str, int]] = report.get("ranks", {})
    panel = list(report.get("panel", ()))
    names = sorted({name for row in scores.values() for name in row}, key=lambda n: (n not in panel, n))
    return {
        "selectors": list(scores),
        "rank_by": report.get("rank_by", NOT_MEASURED),
        "panel": panel,
        "rows": [
            {
                "name": name,
                "taken": name in panel,
                "cells": [(show(scores[s].get(name), "number"), ranks.get(s, {}).get(name)) for s in scores],
            }
            for name in names
        ],
    }


def flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested facts as (dotted name, text) pairs."""
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            pairs.extend(flat(value, f"{name}."))
        elif isinstance(value, list | tuple):
            pairs.append((name, ", ".join(str(v) for v in value) or "none"))
        else:
            pairs.append((name, show(value)))
    return pairs


def _render(template: str, facts: Mapping[str, Any], *, escape: bool) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(facts)


def _lineage_rows(lineage: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    def short(value: object) -> str | None:
        return None if is_missing(value) else str(value)[:12]

    return [
        {
            "stage": entry.get("stage"),
            "name": entry.get("name"),
            "state": _state([entry]),
            "seconds": entry.get("seconds"),
            "key": short(entry.get("key")),
            "output": short(entry.get("output") or entry.get("sha256")),
            "mlflow_run_id": short(entry.get("mlflow_run_id")),
        }
        for entry in lineage
    ]


def _state(entries: Sequence[Mapping[str, Any]]) -> str:
    if any(entry.get("failed") or entry.get("error") for entry in entries):
        return "failed"
    return "cached" if all(entry.get("cached") for entry in entries) else "ran"


def _key_number(
    name: str, title: str, meaning: str, teacher: Mapping[str, Any] | None, shipped: Mapping[str, Any] | None
) -> dict[str, Any]:
    kind = BY_NAME[name].kind
    before, after = (teacher or {}).get(name), (shipped or {}).get(name)
    change, good = "", None
    if not is_missing(before) and not is_missing(after) and before and after:
        if kind == "share":
            points = (after - before) * 100
            change, good = f"{points:+.2f} points", points >= 0
        else:
            factor = before / after
            good = factor > 1
            words = {"bytes": ("smaller", "larger"), "ms": ("faster", "slower")}.get(kind, ("less", "more"))
            shown = factor if good else 1 / factor
            change = f"{shown:.0f}× {words[not good]}" if shown >= 10 else f"{shown:.1f}× {words[not good]}"
    share = None
    if kind != "share" and before and after:
        share = min(after / before, 1.0)
    return {
        "title": title,
        "meaning": meaning,
        "before": show(before, kind),
        "after": show(after, kind),
        "change": change,
        "good": good,
        "share": after if kind == "share" and not is_missing(after) else share,
    }


def _landmarks(run: RunFolder) -> list[Mapping[str, Any]]:
    # The teachers and what shipped, at the batch size the search measured; candidates are drawn as points.
    batch = _search_batch(run)
    wanted = [row for row in run.comparison if row.get("role") == "teacher" or row.get("verdict") == "ships"]
    at_batch = [row for row in wanted if row.get("batch") == batch]
    chosen: dict[Any, Mapping[str, Any]] = {}
    for row in at_batch or wanted:
        chosen.setdefault(row.get("id"), row)
    return list(chosen.values())


def _batch(row: Mapping[str, Any]) -> float:
    return row.get("batch") or float("inf")


def _search_batch(run: RunFolder) -> int | None:
    import yaml

    try:
        recipe = yaml.safe_load(run.recipe) or {}
        return int(recipe["search"]["batch"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        return None


def _as_column(column: Column) -> tuple[str, str, str, str]:
    return column.name, column.title, column.kind, column.meaning


def _guess_columns(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    names = list(dict.fromkeys(name for row in rows for name in row))
    known = {name: (column.title, column.kind, column.meaning) for name, column in BY_NAME.items()}
    return [(name, *known.get(name, (name.replace("_", " "), _kind_of(rows, name), ""))) for name in names]


def _kind_of(rows: Sequence[Mapping[str, Any]], name: str) -> str:
    if name.endswith("accuracy"):
        return "share"
    return "number" if any(isinstance(row.get(name), float) for row in rows) else "text"


def _parity_columns(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str]]:
    known = {
        "name": ("form", "text", "this form of the model"),
        "against": ("compared with", "text", "the form before it"),
        "status": ("status", "text", "measured, or built but not run here"),
        "top1": ("accuracy", "share", "share of correct answers"),
        "flips": ("flips", "share", "share of answers that changed"),
        "kl": ("KL", "number", "divergence of the probabilities, nats"),
        "max_abs": ("max diff", "number", "largest difference of a logit"),
        "floor": ("rounding floor", "number", "the model against itself under input noise of 1e-7"),
        "note": ("note", "text", ""),
    }
    extra = [name for name in ("target",) if any(not is_missing(row.get(name)) for row in rows)]
    wanted = [n for n in PARITY_COLUMNS if n != "note" or any(not is_missing(row.get(n)) for row in rows)]
    return [(name, name, "text", "") for name in extra] + [(name, *known[name]) for name in wanted]


def _latency_columns() -> list[tuple[str, str, str, str]]:
    names = (
        "batch",
        "ratio_to_reference",
        "latency_p50_ms",
        "latency_p90_ms",
        "latency_p95_ms",
        "latency_p99_ms",
    )
    more = ("throughput_per_s", "load_ms", "first_inference_ms", "peak_rss_bytes", "size_bytes")
    columns = [(n, BY_NAME[n].title, BY_NAME[n].kind, BY_NAME[n].meaning) for n in (*names, *more)]
    return [("model", "model", "text", ""), *columns]
