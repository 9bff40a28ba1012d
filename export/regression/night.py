"""One finished run as the comparison sees it: its folder, and its artifacts where they are still kept."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from compression.errors import ArtifactError, DataError
from export.comparison import read_comparison
from export.report.run_folder import RunFolder
from export.verdict import RunVerdict, Verdict

Artifacts = Callable[[str], Path | None]
"""Digest of an artifact -> its verified folder, or None when it is gone or damaged."""


@dataclass(frozen=True)
class Night:
    """A run folder with its store behind it."""

    folder: RunFolder
    artifacts: Artifacts

    @property
    def path(self) -> Path:
        return self.folder.path

    @property
    def name(self) -> str:
        """The run's id."""
        return self.path.name

    @property
    def lineage(self) -> list[dict[str, Any]]:
        return self.folder.lineage

    @cached_property
    def summary(self) -> dict[str, Any]:
        """``summary.json``, empty when there is none."""
        try:
            return dict(json.loads((self.path / "summary.json").read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return {}

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe as plain values."""
        return yaml.safe_load(self.folder.recipe) or {}

    @property
    def outcome(self) -> str:
        return self.folder.verdict.outcome if self.folder.verdict else "not run"

    @property
    def data(self) -> str | None:
        """Digest of the prepared data, test split included."""
        return self.output("data")

    @property
    def reference(self) -> str | None:
        """The best teacher's file."""
        return self.folder.calibration.get("teacher")

    def judged(self) -> dict[str, Verdict]:
        """Target -> verdict, of the targets that ran here."""
        verdict = self.folder.verdict
        return {name: each for name, each in verdict.targets.items() if each.ran} if verdict else {}

    def file_of(self, target: str) -> str | None:
        """The file that ships for a target, else the one that was judged for it."""
        verdict = self.judged().get(target)
        return (verdict.ships or verdict.candidate) if verdict else None

    def row(self, stage: str, name: str | None = None) -> Mapping[str, Any] | None:
        """The last lineage row of a stage, of one name or of any."""
        rows = [row for row in self.lineage if row["stage"] == stage and name in (None, row["name"])]
        return rows[-1] if rows else None

    def output(self, stage: str, name: str | None = None) -> str | None:
        row = self.row(stage, name)
        return str(row["output"]) if row else None

    def open(self, stage: str, name: str | None = None) -> Path | None:
        """The folder of what a stage made, if it is still kept."""
        digest = self.output(stage, name)
        return self.artifacts(digest) if digest else None

    def measured(self, file: str, column: str, batch: int | None = None) -> float | None:
        """A number of ``comparison.csv``."""
        for row in self.folder.comparison:
            if row.get("id") == file and batch in (None, row.get("batch")) and isinstance(row.get(column), int | float):
                return float(row[column])
        return None

    def count(self, split: str) -> int | None:
        """Images of a split."""
        row = self.row("data")
        found = (row or {}).get("metrics", {}).get(f"num_{split}")
        return int(found) if found else None

    def correct(self, file: str) -> Tensor | None:
        """Which test images a file answered rightly, [N] bool; None when it was not evaluated or is not kept."""
        place = self.open("evaluate")
        path = place / f"{file}.correct.npy" if place else None
        if path is None or not path.is_file():
            return None
        return torch.from_numpy(np.load(path, allow_pickle=False))

    def labels(self) -> Tensor | None:
        """Right answers of the test split, [N]."""
        from compression.data import open_dataset

        place = self.open("data")
        try:
            return open_dataset(place).test.labels if place else None
        except (DataError, OSError, KeyError, ValueError):
            return None

    def onnx(self, file: str) -> Path | None:
        """A file as it was exported; the copy in the run folder when the store has it no more."""
        place = self.open("export", file)
        if place is not None and (place / "model.onnx").is_file():
            return place / "model.onnx"
        for target in self.judged():
            copy = self.path / "export" / target / "model.onnx"
            if self.file_of(target) == file and copy.is_file():
                return copy
        return None


def open_night(path: Path, artifacts: Artifacts) -> Night:
    """A finished run; reads only what is compared, so that many nights are read quickly.

    Raises:
        ArtifactError: there is no such folder, or a file of it is missing or broken.
    """
    path = path.resolve()
    try:
        return Night(_read(path), artifacts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"Run '{path}' cannot be read ({error}), expected the folder of a finished run. "
            "Name another run of runs/<recipe>/."
        ) from error


def _read(path: Path) -> RunFolder:
    def load(name: str, empty: Any) -> Any:
        file = path / name
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else empty

    return RunFolder(
        path=path,
        env=load("env.json", {}),
        lineage=load("lineage.json", []),
        verdict=RunVerdict.model_validate_json((path / "verdict.json").read_text(encoding="utf-8")),
        comparison=read_comparison(path / "comparison.csv"),
        reliability=load("reliability.json", {}),
        calibration=load("calibration.json", {}),
        recipe=(path / "recipe.resolved.yaml").read_text(encoding="utf-8"),
    )
