"""Compare a finished run with the last good one and the champion; keep the report in its folder and in MLflow."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from compression.errors import ArtifactError, InputError
from export.regression.compare import Against, Comparison, Regression, amount, bounds, compare_runs
from export.regression.night import Artifacts, Night, open_night
from export.regression.page import STEM, write_pages
from export.regression.trend import TrendRow, trend
from tasks import registry, tracking
from tasks.artifacts import Artifact, Store
from tasks.run_folder import run_folders
from tasks.settings import settings

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

logger = logging.getLogger(__name__)

COLOURS = {"better": "green", "worse": "red", "cannot tell": "yellow"}


def write_regression(folder: Path, *, against: Path | None = None) -> tuple[Regression, Path]:
    """Write the report of a finished run into its folder and log it on its MLflow run; returns it and its page.

    Args:
        folder: The run.
        against: Another run to compare with; default: the last good run of the recipe and the champion's. A chosen one
            gets files of its own (``regression-<its id>.html``), so that the night's report stays as it is.

    Raises:
        ArtifactError: one of the folders is not of a finished run.
    """
    artifacts = kept_artifacts(Store(settings().store_dir))
    now = open_night(folder, artifacts)
    recipe = str(now.recipe.get("name", now.path.parent.name))
    champion, why = folder_of(recipe, registry.CHAMPION)
    others, notes = _others(now, recipe, against, champion, artifacts)
    regression = compare_runs(now, others, seed=int(now.recipe.get("seed", 0)))
    regression = regression.model_copy(update={"notes": (*notes, *([why] if why and against is None else []))})
    stem = STEM if against is None else f"{STEM}-{against.resolve().name}"
    page = write_pages(now.path, regression, _nights(recipe, champion, artifacts), stem=stem)
    _log(now, regression, stem)
    return regression, page


def kept_artifacts(store: Store) -> Artifacts:
    """Opens artifacts by their digest; None for one that is gone or damaged."""

    def find(digest: str) -> Path | None:
        try:
            return store.open(Artifact(kind="artifact", sha256=digest, size_bytes=0))
        except (ArtifactError, OSError) as error:
            logger.info("regression: %s", error)
            return None

    return find


def last_good(recipe: str, before: str) -> Path | None:
    """The newest run of the recipe that is older than run ``before`` and was accepted."""
    for folder in reversed(run_folders(recipe)):
        if folder.name < before and _outcome(folder) == "accept":
            return folder
    return None


def folder_of(recipe: str, alias: str) -> tuple[Path | None, str]:
    """(the run folder of the version with that alias, why there is none)."""
    version = next((each for each in registry.versions(recipe) if alias in each.aliases), None)
    if version is None:
        return None, f"There is no {alias} yet."
    folder = version.tags.get("run_folder", "")
    if not folder or not (Path(folder) / "summary.json").is_file():
        return None, f"The {alias}, version {version.version}, is not compared: its run folder is kept no more."
    return Path(folder), ""


def show_regression(console: "Console", run: Path, against: Path | None = None) -> int:
    """Write the report of a run, print it, and return the exit code: 1 for a regression, else 0.

    Raises:
        InputError: ``run`` or ``against`` is not the folder of a finished run.
    """
    for folder in filter(None, (run, against)):
        if not (folder / "verdict.json").is_file():
            raise InputError(
                f"Run '{folder}' has no verdict.json, expected the folder of a finished run, runs/<recipe>/<run-id>. "
                "`stillhouse compare` lists the newest runs."
            )
    regression, page = write_regression(run, against=against)
    for each in regression.comparisons:
        console.print(_table(each))
        for note in each.notes:
            console.print(note, markup=False, highlight=False)
    for note in regression.notes:
        console.print(note, markup=False, highlight=False)
    word = "[bold red]Regressed.[/]" if regression.regressed else "[bold]No regression.[/]"
    console.print(word, end=" ")
    console.print(regression.sentence, markup=False, highlight=False)
    console.print(f"Report:  {page}", soft_wrap=True)
    return int(regression.regressed)


def _others(
    now: Night, recipe: str, against: Path | None, champion: Path | None, artifacts: Artifacts
) -> tuple[dict[Against, Night], list[str]]:
    """The runs to compare with, and what to say about those that are left out."""
    if against is not None:
        return {"chosen run": open_night(against, artifacts)}, []
    notes = []
    others: dict[Against, Night] = {}
    good = last_good(recipe, now.name)
    if good is None:
        notes.append("There is no earlier accepted run.")
    else:
        others["last good run"] = open_night(good, artifacts)
    if champion is not None and champion.resolve() == now.path:
        notes.append("This run's file is the champion.")
        previous, _ = folder_of(recipe, registry.PREVIOUS)
        if previous is not None and previous.resolve() not in (now.path, good.resolve() if good else None):
            others["previous champion"] = open_night(previous, artifacts)
    elif champion is not None and good is not None and champion.resolve() == good.resolve():
        notes.append("The last good run's file is the champion.")
    elif champion is not None:
        others["champion"] = open_night(champion, artifacts)
    return others, notes


def _nights(recipe: str, champion: Path | None, artifacts: Artifacts) -> list[TrendRow]:
    nights = []
    for folder in run_folders(recipe):
        try:
            nights.append(open_night(folder, artifacts))
        except ArtifactError as error:
            logger.warning("regression: a night is left out of the trend: %s", error)
    return trend(nights, champion.name if champion else None)


def _log(now: Night, regression: Regression, stem: str) -> None:
    """Files and two tags on the run's MLflow parent."""
    parent = now.summary.get("mlflow_run")
    if not parent:
        return
    run = tracking.Run(parent)
    for end in ("html", "md", "json"):
        run.log_file(now.path / f"{stem}.{end}")
    if stem == STEM:
        word = "regressed" if regression.regressed else "no regression"
        run.tag({"regression": word, "regression.sentence": regression.sentence[:4000]})


def _outcome(folder: Path) -> str:
    return str(json.loads((folder / "summary.json").read_text(encoding="utf-8")).get("outcome", ""))


def _table(comparison: Comparison) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = f"Against the {comparison.against}, {comparison.run} ({comparison.outcome})"
    table = Table("target", "number", title=title, box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in ("change", "95 % interval"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict")
    for row in comparison.rows:
        word = f"[{COLOURS[row.word]}]{row.word}[/]" if row.word in COLOURS else row.word
        table.add_row(row.target, row.what, amount(row), bounds(row) or "exact", word)
    return table
