"""Rows of any runs as one view: gathered, marked with champion and front, filtered, sorted, in chosen columns."""

import difflib
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compression.errors import InputError
from export.comparison import COLUMNS, Column, is_missing, pareto_flags, parse_cell, read_comparison

Row = dict[str, Any]

RUN = Column("run", "run", "the run folder that the row is from")
CHAMPION = Column("champion", "champion", "version that is in production", main=True, missing="no")
VIEW = (COLUMNS[0], RUN, *COLUMNS[1:], CHAMPION)
"""What a view over runs can show: the columns of ``comparison.csv``, the run, and the champion."""

OPERATORS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "!=": operator.ne,
    "=": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
}


@dataclass(frozen=True)
class Champion:
    """The file in production, as the registry knows it."""

    recipe: str
    version: str
    file: str
    folder: Path | None
    """Folder of the run that made it, if it is still known."""


@dataclass(frozen=True)
class Where:
    """One condition on one column; a cell that was not measured meets none."""

    column: str
    sign: str
    value: Any

    def __call__(self, row: Mapping[str, Any]) -> bool:
        found = row.get(self.column)
        if is_missing(found):
            return False
        if isinstance(self.value, str):
            found = str(found)
        return OPERATORS[self.sign](found, self.value)


@dataclass(frozen=True)
class Filters:
    """Which rows to show; an empty field lets all through."""

    recipes: Sequence[str] = ()
    roles: Sequence[str] = ()
    targets: Sequence[str] = ()
    precisions: Sequence[str] = ()
    batches: Sequence[int] = ()
    where: Sequence[Where] = field(default=())
    front: bool = False

    def __call__(self, row: Mapping[str, Any]) -> bool:
        wanted = {
            "recipe": self.recipes,
            "role": self.roles,
            "target": self.targets,
            "precision": self.precisions,
            "batch": self.batches,
        }
        return (
            all(not values or _lists(row.get(name), values) for name, values in wanted.items())
            and all(condition(row) for condition in self.where)
            and (not self.front or row.get("pareto") is True)
        )


def _lists(cell: Any, wanted: Sequence[Any]) -> bool:
    values = cell.split(", ") if isinstance(cell, str) else [cell]
    return any(value in wanted for value in values)


def column_named(name: str) -> Column:
    """The column of that name or title.

    Raises:
        InputError: there is none.
    """
    known = {column.name: column for column in VIEW}
    titles = {column.title.lower(): column for column in VIEW}
    if name in known or name.lower() in titles:
        return known.get(name) or titles[name.lower()]
    close = list(dict.fromkeys(difflib.get_close_matches(name, [*known, *titles], n=4)))
    hint = f"Did you mean {', '.join(map(repr, close))}?" if close else f"There are: {', '.join(known)}."
    raise InputError(f"Column '{name}' does not exist, expected a column of comparison.csv. {hint}")


def parse_where(text: str) -> Where:
    """The condition in ``accuracy>=0.9`` or ``role!=control``.

    Raises:
        InputError: not a column, a sign and a value; or words where the column holds numbers.
    """
    found = re.fullmatch(r"\s*(.+?)\s*(>=|<=|!=|==?|>|<)\s*(.+?)\s*", text)
    if found is None:
        raise InputError(
            f"Condition '{text}' has no sign, expected COLUMN SIGN VALUE with one of {' '.join(OPERATORS)}, "
            "for example --where 'accuracy>=0.9'."
        )
    name, sign, written = found.groups()
    column, value = column_named(name), parse_cell(found[3])
    if written.lower() in ("yes", "no"):
        value = written.lower() == "yes"
    numeric = column.kind != "text"
    if numeric and not isinstance(value, int | float):
        shares = ", shares from 0 to 1" if column.kind in ("share", "points") else ""
        raise InputError(
            f"Condition '{text}' has the value '{written}', expected a number: '{column.name}' holds numbers{shares}. "
            f"Write {column.name}{sign}0.9, say."
        )
    if not numeric and not isinstance(value, bool):
        if sign not in ("=", "==", "!="):
            raise InputError(
                f"Condition '{text}' has the sign {sign}, expected = or !=: '{column.name}' holds words. "
                f"Write {column.name}={written}."
            )
        value = written
    return Where(column.name, "=" if sign == "==" else sign, value)


def told_apart_by(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns without which rows of different runs look alike: recipe, run, both or none."""
    recipes = {row.get("recipe") for row in rows}
    runs = {(row.get("recipe"), row.get("run")) for row in rows}
    return (["recipe"] if len(recipes) > 1 else []) + (["run"] if len(runs) > len(recipes) else [])


def columns_for(rows: Sequence[Mapping[str, Any]]) -> list[Column]:
    """``VIEW`` with those columns first and shown."""
    names = told_apart_by(rows)
    first = [replace(column, main=True) for column in VIEW if column.name in names]
    return [VIEW[0], *first, *(column for column in VIEW[1:] if column.name not in names)]


def gather(folders: Iterable[Path]) -> list[Row]:
    """The rows of run folders, each with the name of its run.

    Raises:
        InputError: a folder is not one of a run.
    """
    rows: list[Row] = []
    for folder in folders:
        path = folder / "comparison.csv"
        if not path.is_file():
            raise InputError(
                f"Run '{folder}' has no comparison.csv, expected a folder runs/<recipe>/<run-id>. "
                "Correct the path, or name a recipe to take its newest run."
            )
        rows += [{"run": folder.name, **row} for row in read_comparison(path)]
    return rows


def mark_fronts(rows: Sequence[Row]) -> list[Row]:
    """The rows with ``pareto`` set over all of them: among rows of one recipe, batch size and kind of processor.

    Of the rows of one run this is what its ``comparison.csv`` says.
    """
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, row in enumerate(rows):
        if not is_missing(row.get("latency_p50_ms")) and not is_missing(row.get("accuracy")):
            groups.setdefault(tuple(row.get(key) for key in ("recipe", "batch", "provider", "isa")), []).append(place)
    marked = [dict(row) for row in rows]
    for places in groups.values():
        flags = pareto_flags([(rows[place]["latency_p50_ms"], rows[place]["accuracy"]) for place in places])
        for place, flag in zip(places, flags, strict=True):
            marked[place]["pareto"] = flag
    return marked


def mark_champions(rows: Sequence[Row], champions: Iterable[Champion]) -> list[Row]:
    """The rows with ``champion`` set to its version; a champion of a run that is not among them is added to them."""
    marked = [dict(row) for row in rows]
    for champion in champions:
        if champion.folder is None:
            continue
        run = champion.folder.name
        if not any(row["run"] == run and row.get("recipe") == champion.recipe for row in marked):
            if not (champion.folder / "comparison.csv").is_file():
                continue
            marked += [row for row in gather([champion.folder]) if row.get("id") == champion.file]
        for row in marked:
            if (row.get("recipe"), row["run"], row.get("id")) == (champion.recipe, run, champion.file):
                row["champion"] = f"version {champion.version}"
    return marked


def sort_rows(rows: Sequence[Row], name: str) -> list[Row]:
    """By a column, smallest first; ``-name`` is largest first; what was not measured comes last."""
    column = column_named(name.removeprefix("-")).name
    measured = [row for row in rows if not is_missing(row.get(column))]
    rest = [row for row in rows if is_missing(row.get(column))]
    return [*sorted(measured, key=lambda row: row[column], reverse=name.startswith("-")), *rest]
