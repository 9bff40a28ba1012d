"""``regression.html``, ``regression.md`` and ``regression.json`` of a run: one page, no outside parts."""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from export.comparison import Column, show
from export.regression import trend as over_nights
from export.regression.compare import Comparison, Regression, amount, bounds
from export.regression.trend import TrendRow
from export.report.tables import table

logger = logging.getLogger(__name__)

STEM = "regression"
CLASSES = {"better": "pass", "worse": "fail", "cannot tell": "inconclusive", "same": "skipped"}
ICONS = {"better": "▲", "worse": "▼", "cannot tell": "?", "same": "=", "same within chance": "="}
TREND_ROWS = 30

NUMBERS = (
    Column("target", "target", "what the file is for"),
    Column("what", "number", "what is compared"),
    Column("before", "before", "the other run's"),
    Column("now", "tonight", "this run's"),
    Column("change", "change", "tonight minus before; for latency and size tonight over before"),
    Column("bounds", "95 % interval", "of the change", missing="exact"),
    Column("word", "verdict", "by the bounds of the interval"),
    Column("note", "note", "how it was compared", missing="none"),
)
STEPS = (
    Column("label", "after stage", "in the order of the chain"),
    Column("before", "before", "accuracy", "share"),
    Column("now", "tonight", "accuracy", "share"),
    Column("change", "change", "in points"),
    Column("bounds", "95 % interval", "of the change"),
    Column("word", "verdict", "by the bounds of the interval"),
    Column("measured_on", "measured on", "which images, and whether sample by sample"),
)
CHANGES = (
    Column("kind", "kind", "dependency, machine, data or recipe"),
    Column("name", "name", "what changed"),
    Column("before", "before", "in the other run"),
    Column("now", "tonight", "in this run"),
)


def write_pages(folder: Path, regression: Regression, rows: Sequence[TrendRow], *, stem: str = STEM) -> Path:
    """Write the three files into the run folder; returns the HTML's path."""
    facts = contents(folder, regression, rows)
    (folder / f"{stem}.json").write_text(regression.model_dump_json(indent=1), encoding="utf-8")
    (folder / f"{stem}.md").write_text(_render("regression.md.jinja", facts, escape=False), encoding="utf-8")
    page = folder / f"{stem}.html"
    drawn = facts | {"plots": over_nights.drawings(rows)}
    page.write_text(_render("regression.html.jinja", drawn, escape=True), encoding="utf-8")
    logger.info("regression: wrote '%s'", page)
    return page


def contents(folder: Path, regression: Regression, rows: Sequence[TrendRow]) -> dict[str, Any]:
    """Everything the templates show except the plots, as plain values and text."""
    headline, tone = _headline(regression)
    shown = [over_nights.cells(row) for row in reversed(rows[-TREND_ROWS:])]
    return {
        "regression": regression,
        "headline": headline,
        "tone": tone,
        "comparisons": [_comparison(folder, each) for each in regression.comparisons],
        "trend_table": table(shown, over_nights.COLUMNS),
        "num_nights": len(rows),
        "classes": CLASSES,
        "icons": ICONS,
        "has_report": (folder / "report.html").is_file(),
    }


def _headline(regression: Regression) -> tuple[str, str]:
    """(headline, class of its colour)."""
    if regression.regressed:
        return "Regressed", "regression"
    if not regression.comparisons:
        return "First accepted run" if regression.outcome == "accept" else "Nothing to compare with", "not-run"
    basis = next((each for each in regression.comparisons if "champion" not in each.against), None)
    if basis is None:
        return "Compared with the champion alone", "not-run"
    if any(row.word == "better" for row in basis.rows) and not basis.worse:
        return "Better", "accept"
    if any(row.word == "cannot tell" for row in basis.rows):
        return "No regression shown", "inconclusive"
    return "No regression", "accept"


def _comparison(folder: Path, each: Comparison) -> dict[str, Any]:
    other = Path(each.folder) / "report.html"
    rows = [
        {
            "target": row.target,
            "what": row.what,
            "before": _shown(row.before, row.kind),
            "now": _shown(row.now, row.kind),
            "change": amount(row),
            "bounds": bounds(row),
            "word": row.word,
            "note": row.note,
        }
        for row in each.rows
    ]
    steps = [
        {
            **step.model_dump(exclude={"change"}),
            "label": step.label,
            "change": None if step.change is None else f"{step.change.estimate * 100:+.2f}",
            "bounds": None if step.change is None else f"{step.change.low * 100:+.2f} to {step.change.high * 100:+.2f}",
        }
        for step in each.blame.steps
    ]
    return {
        "against": each.against,
        "run": each.run,
        "outcome": each.outcome,
        "report": os.path.relpath(other, folder) if other.is_file() else "",
        "notes": each.notes,
        "rows": rows,
        "numbers": table(rows, NUMBERS),
        "blame": each.blame,
        "causes": [(origin.label, origin.words) for origin in each.blame.origins],
        "steps": table(steps, STEPS),
        "changes": table([change.model_dump() for change in each.changes], CHANGES),
    }


def _render(template: str, facts: Mapping[str, Any], *, escape: bool) -> str:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader([here, here.parent / "report"]),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["coded"] = _coded
    return environment.get_template(template).render(facts)


def _coded(text: str) -> Any:
    """Text for HTML in which what stands between backticks is code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _shown(value: float | None, kind: str) -> str:
    return f"{value:.4f}" if kind == "number" and value is not None else show(value, kind)
