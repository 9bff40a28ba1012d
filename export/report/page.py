"""From a run folder to ``report.html`` and ``report.md``: what the templates show, and nothing else."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from export.comparison import BY_NAME, COLUMNS, NOT_MEASURED, is_missing, marginal_gains, show
from export.report import (
    figures_attention,
    figures_calibration,
    figures_cost,
    figures_diagnosis,
    figures_parity,
    figures_robustness,
    figures_sensitivity,
    plots,
)
from export.report.explorer import champion_marks, explorer
from export.report.render import render
from export.report.run_folder import RunFolder, open_run
from export.report.tables import (
    CALIBRATION,
    LATENCY,
    LINEAGE,
    TRIALS,
    columns_of,
    lineage_rows,
    stage_state,
    table,
    trials_in_words,
    used_columns,
)

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


def build_report(run_folder: Path) -> Path:
    """Writes ``report.html``, ``report.md``, ``pareto.png`` and heat maps; returns the HTML's path.

    The page is one file without outside parts. A section whose file is missing says "not run", a value that
    is missing says "not measured".

    Raises:
        ArtifactError: there is no such folder.
    """
    run = open_run(run_folder)
    facts = contents(run)
    html_path = run.path / "report.html"
    html_path.write_text(render("template.html.jinja", facts | {"plots": drawings(run)}, escape=True))
    (run.path / "report.md").write_text(render("template.md.jinja", facts, escape=False))
    plots.save_pareto(run.path / "pareto.png", run.trials, _landmarks(run))
    figures_sensitivity.save_heat_maps(run.path, run.sensitivity)
    logger.info("report: wrote '%s'", html_path)
    return html_path


def contents(run: RunFolder) -> dict[str, Any]:
    """Everything the templates show except the plots, as plain values and text."""
    outcome = run.verdict.outcome if run.verdict else "not run"
    timings = [row.model_dump() for row in run.latency.rows] if run.latency else []
    floors = run.latency.noise_floors if run.latency else ()
    title, meaning = HEADLINES.get(outcome, (str(outcome), ""))
    teacher, shipped = best_teacher(run.comparison), shipped_row(run.comparison)
    used = used_columns(COLUMNS, run.comparison)
    front = sorted((t for t in run.trials if t.get("on_front")), key=lambda t: t.get("latency_p50_ms") or 0.0)
    calibrated = list({row.get("id"): row for row in run.comparison if not is_missing(row.get("ece"))}.values())
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
        "lineage_table": table(lineage_rows(run.lineage), LINEAGE),
        "short_table": table(run.comparison, short),
        "explorer": explorer(run.comparison, used, marks=champion_marks(run.champion)),
        "unmeasured": [c.title for c in COLUMNS if c not in used],
        "teacher_table": table(run.teachers, columns_of(run.teachers)),
        **figures_cost.section(run.lineage, run.comparison),
        **figures_parity.section(run.ladders, run.parity),
        **figures_diagnosis.section(run.diagnosis),
        **figures_sensitivity.section(run.sensitivity),
        **figures_calibration.section(run.calibration),
        **figures_robustness.section(run.robustness or None),
        **figures_attention.section(run.attention),
        "reference": run.latency.reference if run.latency else "the reference",
        "latency_table": table(timings, LATENCY),
        "noise_floors": [(floor.batch, show(floor.spread, "share")) for floor in floors],
        "latency_failures": run.latency.failures if run.latency else {},
        "front_table": table(front, used_columns(TRIALS, front)),
        "trials_in_words": trials_in_words(run.trials),
        "calibration_table": table(calibrated, CALIBRATION),
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
        "hacking": (
            plots.teacher_hacking(students),
            "validation NLL over the divergence from the teachers, from right to left as training goes on",
        ),
        "reliability": (plots.reliability(run.reliability), "accuracy over confidence per model"),
        "gains": (
            plots.bars(gains, "accuracy gained over its control (points)"),
            "marginal gain of each stage",
        ),
    }
    for topic, content in (
        (figures_diagnosis, run.diagnosis),
        (figures_calibration, run.calibration),
        (figures_attention, run.attention),
    ):
        figures |= topic.figures(content)
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
            "state": stage_state(entries),
            "count": len(entries),
            "cached": sum(bool(e.get("cached")) for e in entries),
            "names": _few([str(e["name"]) for e in entries if not is_missing(e.get("name"))]),
            "seconds": show(totals[name], "seconds") if any("seconds" in e for e in entries) else NOT_MEASURED,
            "share": totals[name] / longest,
        }
        for name, entries in stages.items()
    ]


def _few(names: Sequence[str], limit: int = 4) -> list[str]:
    shown = list(dict.fromkeys(names))
    return shown if len(shown) <= limit else [*shown[: limit - 1], f"and {len(shown) - limit + 1} more"]


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
    # The teachers, what shipped and the champion, at the batch size the search measured; candidates are points.
    batch = _search_batch(run)
    wanted = [row for row in run.comparison if row.get("role") == "teacher" or row.get("verdict") == "ships"]
    at_batch = [row for row in wanted if row.get("batch") == batch]
    chosen: dict[Any, Mapping[str, Any]] = {}
    for row in at_batch or wanted:
        chosen.setdefault(row.get("id"), row)
    champion = [mark for mark in champion_marks(run.champion) if mark.batch == batch]
    return [*chosen.values(), *({"id": mark.label, **vars(mark), "champion": True} for mark in champion)]


def _batch(row: Mapping[str, Any]) -> float:
    return row.get("batch") or float("inf")


def _search_batch(run: RunFolder) -> int | None:
    import yaml

    try:
        recipe = yaml.safe_load(run.recipe) or {}
        return int(recipe["search"]["batch"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        return None
