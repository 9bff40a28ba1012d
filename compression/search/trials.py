"""The rows of a study and the file they are written to."""

import csv
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

State = Literal["complete", "infeasible", "filtered", "stopped", "duplicate", "failed"]

Objective = Literal["accuracy", "ece", "latency_p50_ms", "latency_p95_ms", "size_bytes", "macs"]
"""What a study may optimise: accuracy upward, the others downward."""

OBJECTIVES: tuple[Objective, ...] = ("accuracy", "latency_p50_ms", "size_bytes")
"""The usual ones."""

COLUMNS = (
    *("number", "state", "reason", "space", "choices"),
    *("accuracy", "ece", "latency_p50_ms", "latency_p95_ms", "latency_predicted_ms"),
    *("size_bytes", "macs", "params", "score", "seconds", "cpu_seconds"),
    *("on_front", "knee", "finalist", "checkpoint"),
)
"""Columns of trials.csv; what was not measured is empty, ``finalist`` counts from 1."""


@dataclass(frozen=True)
class Score:
    """What the short training of a candidate came to, on the validation split."""

    accuracy: float
    """Share, 0..1."""
    ece: float | None = None
    """Expected calibration error in 15 bins, 0..1."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call."""

    p50: float
    p95: float | None = None


@dataclass(frozen=True)
class TrialResult:
    """One candidate; what was not measured is None."""

    number: int
    space: str
    """Label of the space it came from, for example ``prune-resnet-taylor``."""
    choices: dict[str, Any]
    """What was chosen in that space, for example ``{"ratio": 0.5}``."""
    state: State
    reason: str = ""
    """Why it is infeasible, filtered, stopped, a duplicate or failed; empty when complete."""
    accuracy: float | None = None
    """Validation accuracy after the short distillation, 0..1."""
    latency_p50_ms: float | None = None
    size_bytes: int | None = None
    macs: int | None = None
    params: int | None = None
    seconds: float | None = None
    """Wall time spent on the candidate."""
    checkpoint: Path | None = None
    """Folder with the candidate as it was before the short distillation."""
    digest: str = ""
    """Hash of its architecture and starting weights; empty when it was not built."""
    on_front: bool = False
    ece: float | None = None
    latency_p95_ms: float | None = None
    latency_predicted_ms: float | None = None
    """What the latency model said."""
    score: float | None = None
    """What the filter said before training."""
    cpu_seconds: float | None = None
    """CPU time spent on the candidate, building included."""
    curve: tuple[float, ...] = ()
    """Validation accuracy after each epoch."""
    excess: float | None = None
    """By what share it exceeds the budget it fails; None when it is within all."""

    @property
    def objectives(self) -> tuple[float, ...]:
        """The usual three; see ``values``."""
        return self.values(OBJECTIVES)

    def values(self, objectives: Sequence[Objective]) -> tuple[float, ...]:
        """1 - accuracy and the others as they are: all to be minimised, infinite when not complete."""
        found = [getattr(self, name) for name in objectives]
        if self.state != "complete" or None in found:
            return (math.inf,) * len(found)
        pairs = zip(objectives, found, strict=True)
        return tuple(1.0 - value if name == "accuracy" else float(value) for name, value in pairs)


def write_trials(
    path: Path, rows: Sequence[TrialResult], chosen: Sequence[TrialResult], compromise: TrialResult | None
) -> None:
    """Replaces ``path`` in one step."""
    places = {trial.number: place for place, trial in enumerate(chosen, start=1)}
    draft = path.with_name(path.name + ".part")
    with draft.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for row in rows:
            writer.writerow(
                vars(row)
                | {
                    "choices": json.dumps(row.choices, sort_keys=True),
                    "knee": compromise is not None and row.number == compromise.number,
                    "finalist": places.get(row.number, ""),
                    "checkpoint": "" if row.checkpoint is None else row.checkpoint.name,
                }
            )
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
