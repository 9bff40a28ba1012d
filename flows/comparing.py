"""``stillhouse compare``: one table over the files of any runs, for people, for programs and as a page."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from compression.errors import InputError, StillhouseError
from export.comparing.view import (
    CHAMPION,
    VIEW,
    Champion,
    Filters,
    Row,
    column_named,
    columns_for,
    gather,
    mark_champions,
    mark_fronts,
    parse_where,
    sort_rows,
    told_apart_by,
)
from export.comparison import Column, console_columns, console_table, write_comparison
from export.report.tables import used_columns
from tasks.run_folder import run_folders
from tasks.settings import settings

logger = logging.getLogger(__name__)


def compare_runs(
    console: Console,
    runs: Sequence[str] = (),
    *,
    recipes: Sequence[str] = (),
    roles: Sequence[str] = (),
    targets: Sequence[str] = (),
    precisions: Sequence[str] = (),
    batches: Sequence[int] = (),
    where: Sequence[str] = (),
    front: bool = False,
    sort: str | None = None,
    columns: str | None = None,
    all_columns: bool = False,
    as_json: bool = False,
    csv_path: Path | None = None,
    html_path: Path | None = None,
) -> int:
    """Print the rows that pass, or write them; 0 when there are any, else 1.

    Raises:
        InputError: there is no run, or a run, column or condition is not one.
    """
    filters = Filters(recipes, roles, targets, precisions, batches, [parse_where(text) for text in where], front)
    chosen = _columns(columns, all_columns)
    if sort is not None:
        column_named(sort.removeprefix("-"))
    folders = [resolve_run(run) for run in runs] or newest_of_each()
    if not folders:
        raise InputError("There is no run to compare. Start one: stillhouse compress recipes/digits.yaml")
    champions = known_champions({folder.parent.name for folder in folders})
    rows = mark_fronts(mark_champions(gather(folders), champions))
    rows = [row for row in rows if filters(row)]
    if sort is not None:
        rows = sort_rows(rows, sort)
    if csv_path is not None:
        written = chosen or VIEW
        write_comparison([{c.name: row.get(c.name) for c in written} for row in rows], csv_path, written)
    if html_path is not None:
        from export.comparing.page import write_page

        write_page(html_path, rows, list(dict.fromkeys([*folders, *_folders_of(rows, champions)])))
    if as_json:
        console.print_json(json.dumps(_as_json(rows, chosen or VIEW, folders, champions)), indent=1, highlight=False)
        return 0 if rows else 1
    _print(console, rows, chosen, folders, champions)
    for path in (csv_path, html_path):
        if path is not None:
            console.print(f"Wrote {path}.", soft_wrap=True)
    return 0 if rows else 1


def resolve_run(name: str) -> Path:
    """The run folder of a path, of ``<recipe>/<run-id>``, or the newest one of a recipe.

    Raises:
        InputError: there is none.
    """
    for place in (Path(name), settings().runs_dir / name):
        if (place / "comparison.csv").is_file():
            return place.absolute()
        if place.is_dir() and (found := run_folders(place.name)) and found[-1].parent.samefile(place):
            return found[-1]
    known = ", ".join(sorted({folder.parent.name for folder in run_folders()})) or "none yet"
    raise InputError(
        f"Run '{name}' has no run folder, expected one, <recipe>/<run-id> or a recipe (known: {known}). "
        "Correct it, or leave it out to take the newest run of every recipe."
    )


def newest_of_each() -> list[Path]:
    """The newest finished run of every recipe."""
    return list({folder.parent: folder for folder in run_folders()}.values())


def known_champions(recipes: set[str]) -> list[Champion]:
    """The champions of the recipes; none where there is no registry, or it does not answer."""
    uri = settings().tracking_uri
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        return []
    from tasks import registry
    from tasks.candidates import champion_folder

    found = []
    try:
        for recipe in sorted(recipes):
            version = registry.champion(recipe)
            if version is not None:
                file = version.tags.get("file", "")
                found.append(Champion(recipe, str(version.version), file, champion_folder(version)))
    except StillhouseError as error:
        logger.warning("Champions are not marked: %s", error)
    return found


def _folders_of(rows: Sequence[Row], champions: Sequence[Champion]) -> list[Path]:
    shown = {row["run"] for row in rows}
    return [each.folder for each in champions if each.folder is not None and each.folder.name in shown]


def _columns(names: str | None, all_columns: bool) -> list[Column] | None:
    if names is None:
        return list(VIEW) if all_columns else None
    return [column_named(name.strip()) for name in names.split(",") if name.strip()]


def _as_json(
    rows: Sequence[Row], columns: Sequence[Column], folders: Sequence[Path], champions: Sequence[Champion]
) -> dict[str, Any]:
    return {
        "runs": [str(folder) for folder in folders],
        "champions": [
            {"recipe": each.recipe, "version": each.version, "file": each.file, "run": each.folder and each.folder.name}
            for each in champions
        ],
        "rows": [{column.name: row.get(column.name) for column in columns} for row in rows],
    }


def _print(
    console: Console,
    rows: Sequence[Row],
    columns: Sequence[Column] | None,
    folders: Sequence[Path],
    champions: Sequence[Champion],
) -> None:
    shown = list(columns or console_columns(console.width))
    if columns is None:
        apart = [column for column in columns_for(rows) if column.name in told_apart_by(rows)]
        shown = [*shown[:1], *apart, *shown[1:], *used_columns([CHAMPION], rows)]
    title = f"{folders[0].parent.name} {folders[0].name}" if len(folders) == 1 else ""
    console.print(console_table(rows, title=title, width=console.width, columns=shown))
    if not rows:
        console.print("No row passes these filters.")
    for each in champions:
        run = "an unknown run" if each.folder is None else f"run {each.folder.name}"
        console.print(f"Champion of {each.recipe}: version {each.version}, {each.file} of {run}.", highlight=False)
    if not any(row.get("pareto") is not None for row in rows):
        return
    fronts: dict[str, list[str]] = {}
    for row in rows:
        on_front = fronts.setdefault(str(row.get("recipe")), [])
        if row.get("pareto") is True and row["id"] not in on_front:
            on_front.append(row["id"])
    for recipe, files in fronts.items():
        console.print(f"Pareto front of {recipe}: {', '.join(files) or 'none of these rows'}.", highlight=False)


def show_card(console: Console, run: str) -> None:
    """Write the model card of an accepted run again, in its folder, in MLflow and in the registry; and print it.

    Raises:
        InputError: there is no such run, or it was not accepted.
    """
    from rich.markdown import Markdown

    from tasks.model_card import log_card, write_card

    folder = resolve_run(run)
    summary = json.loads((folder / "summary.json").read_text()) if (folder / "summary.json").is_file() else {}
    path = write_card(folder, summary.get("registered"))
    if summary.get("mlflow_run"):
        log_card(folder, summary["mlflow_run"])
    console.print(Markdown(path.read_text(encoding="utf-8")))
    console.print(f"Wrote {path} and {path.with_suffix('.html').name}.", soft_wrap=True)
