"""The comparison of any runs as one HTML file: table with filters, Pareto plot, learning curves, gains and cost."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from export.comparing.view import Row, columns_for
from export.comparison import Column, is_missing
from export.report import figures_cost
from export.report.explorer import explorer
from export.report.render import render
from export.report.run_folder import RunFolder, open_run
from export.report.tables import table, used_columns

RUNS = (
    Column("recipe", "recipe", "what was run"),
    Column("run", "run", "its folder"),
    Column("outcome", "verdict", "what the gate decided", missing="not run"),
    Column("cpu", "processor", "what it was measured on"),
    Column("files", "files", "rows of different files", "count"),
    Column("spent", "time spent", "wall time of the stages that ran", "seconds"),
    Column("kept", "time kept", "wall time that kept stages had taken before", "seconds"),
)


def write_page(path: Path, rows: Sequence[Row], folders: Sequence[Path]) -> Path:
    """Write the page over these rows of these run folders; it needs nothing from outside, and no JavaScript to be read.

    Raises:
        ArtifactError: one of the folders does not exist.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = contents(rows, [open_run(folder) for folder in folders])
    path.write_text(render("comparing.html.jinja", facts, escape=True, folder=Path(__file__).parent), encoding="utf-8")
    return path


def contents(rows: Sequence[Row], runs: Sequence[RunFolder]) -> dict[str, Any]:
    """Everything the page shows."""
    names = sorted({str(row["recipe"]) for row in rows if not is_missing(row.get("recipe"))})
    processors = sorted({_processor(run) for run in runs} - {""})
    columns = used_columns(columns_for(rows), rows)
    several = len(runs) > 1
    if not several:
        columns = [column for column in columns if column.name != "run"]
    gains = [{"run": run.path.name, **gain} for run in runs for gain in figures_cost.gains(run.lineage, run.comparison)]
    return {
        "title": ", ".join(names) or "no recipe",
        "explorer": explorer(rows, columns, histories={run.path.name: run.histories for run in runs}),
        "runs_table": table([_run_row(run) for run in runs], RUNS),
        "processors": processors,
        "gains_table": table(gains, (*figures_cost.GAINS, RUNS[1]) if several else figures_cost.GAINS),
        "ledgers": [
            {"name": run.name, **figures_cost.section(run.lineage, run.comparison)} for run in runs if run.lineage
        ],
    }


def _processor(run: RunFolder) -> str:
    return str((run.env.get("cpu") or {}).get("model") or "")


def _run_row(run: RunFolder) -> dict[str, Any]:
    def seconds(cached: bool) -> float:
        return float(sum(e.get("seconds") or 0.0 for e in run.lineage if bool(e.get("cached")) is cached))

    return {
        "recipe": run.path.parent.name,
        "run": run.path.name,
        "outcome": run.verdict.outcome if run.verdict else None,
        "cpu": _processor(run) or None,
        "files": len({row.get("id") for row in run.comparison}),
        "spent": seconds(cached=False) if run.lineage else None,
        "kept": seconds(cached=True) if run.lineage else None,
    }
