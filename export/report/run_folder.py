"""Reading a run folder: every file is optional; one that is missing or broken leaves its section empty."""

import csv
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compression.errors import ArtifactError
from export.comparison import parse_cell, read_comparison
from export.latency import BenchmarkResult, Samples, read_raw
from export.verdict import RunVerdict

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFolder:
    """What the files of one run say; nothing here is computed."""

    path: Path
    env: dict[str, Any] = field(default_factory=dict)
    """``env.json``: processor, versions, commit, seed."""
    lineage: list[dict[str, Any]] = field(default_factory=list)
    """``lineage.json``: one entry per stage, in order."""
    verdict: RunVerdict | None = None
    """``verdict.json``."""
    comparison: list[dict[str, Any]] = field(default_factory=list)
    """``comparison.csv``."""
    teachers: list[dict[str, Any]] = field(default_factory=list)
    """``teachers.csv``."""
    selection: dict[str, Any] = field(default_factory=dict)
    """``selection.json``: a selection report."""
    trials: list[dict[str, Any]] = field(default_factory=list)
    """``trials.csv``."""
    histories: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """``histories.json``: name -> rows per epoch."""
    parity: list[dict[str, Any]] = field(default_factory=list)
    """``parity.csv``."""
    latency: BenchmarkResult | None = None
    """``latency.json``."""
    samples: Samples = field(default_factory=dict)
    """``latency_raw.csv``."""
    reliability: dict[str, list[list[float]]] = field(default_factory=dict)
    """``reliability.json``: name -> [confidence, accuracy, count] per bin."""
    ladders: list[dict[str, Any]] = field(default_factory=list)
    """``ladder.json``: one parity ladder for each student, with its layers."""
    diagnosis: dict[str, Any] = field(default_factory=dict)
    """``diagnosis.json``: why each file is, or is not, faster."""
    sensitivity: dict[str, Any] = field(default_factory=dict)
    """``sensitivity.json``: what each layer of each model costs, and what accuracy control did."""
    calibration: dict[str, Any] = field(default_factory=dict)
    """``calibration.json``: confidence of every file, before and after its temperature."""
    robustness: dict[str, Any] = field(default_factory=dict)
    """``robustness.json``: accuracy on corrupted images."""
    attention: dict[str, Any] = field(default_factory=dict)
    """``attention.json``: maps of teacher and students, and how far they agree."""
    champion: dict[str, Any] = field(default_factory=dict)
    """``champion.json``: the model in production when this run ended."""
    data: dict[str, Any] = field(default_factory=dict)
    """``data.json``: hashes and sizes of the splits."""
    recipe: str = ""
    """``recipe.resolved.yaml``, as text."""
    problems: tuple[str, ...] = ()
    """Files that are there and could not be read, with the reason."""

    @property
    def name(self) -> str:
        """Recipe and run id, from the folder's place."""
        return f"{self.path.parent.name} / {self.path.name}"


def open_run(path: Path) -> RunFolder:
    """Reads ``runs/<recipe>/<run-id>/``.

    Raises:
        ArtifactError: there is no such folder.
    """
    path = path.resolve()
    if not path.is_dir():
        raise ArtifactError(f"Run '{path}' has no folder, expected runs/<recipe>/<run-id>. Run the recipe first.")
    problems: list[str] = []

    def read(name: str, reader: Any, empty: Any) -> Any:
        file = path / name
        if not file.is_file():
            return empty
        try:
            found = reader(file)
        except (ValueError, KeyError, TypeError, OSError, csv.Error) as error:
            problems.append(f"{name}: {error}")
            logger.warning("report: '%s' of run '%s' could not be read: %s", name, path.name, error)
            return empty
        if empty is not None and not isinstance(found, type(empty)):
            problems.append(f"{name}: holds a {type(found).__name__}, expected a {type(empty).__name__}")
            return empty
        return found

    return RunFolder(
        path=path,
        env=read("env.json", _json, {}),
        lineage=read("lineage.json", _json, []),
        verdict=read("verdict.json", lambda f: RunVerdict.model_validate_json(f.read_text()), None),
        comparison=read("comparison.csv", read_comparison, []),
        teachers=read("teachers.csv", _csv, []),
        selection=read("selection.json", _json, {}),
        trials=read("trials.csv", _csv, []),
        histories=read("histories.json", _json, {}),
        parity=read("parity.csv", _csv, []),
        latency=read("latency.json", lambda f: BenchmarkResult.model_validate_json(f.read_text()), None),
        samples=read("latency_raw.csv", read_raw, {}),
        reliability=read("reliability.json", _json, {}),
        ladders=read("ladder.json", _json, []),
        diagnosis=read("diagnosis.json", _json, {}),
        sensitivity=read("sensitivity.json", _json, {}),
        calibration=read("calibration.json", _json, {}),
        robustness=read("robustness.json", _json, {}),
        attention=read("attention.json", _json, {}),
        champion=read("champion.json", _json, {}),
        data=read("data.json", _json, {}),
        recipe=read("recipe.resolved.yaml", lambda f: f.read_text(), ""),
        problems=tuple(problems),  # arguments are evaluated in order, so this one comes last
    )


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def _csv(path: Path) -> list[dict[str, Any]]:
    with path.open(newline="") as file:
        return [{name: parse_cell(cell) for name, cell in row.items()} for row in csv.DictReader(file)]
