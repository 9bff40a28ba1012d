"""The rows of a study and the file they are written to."""

import csv
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["complete", "infeasible", "duplicate", "failed"]

COLUMNS = (
    *("number", "state", "reason", "space", "choices"),
    *("accuracy", "latency_p50_ms", "size_bytes", "macs", "params", "seconds"),
    *("on_front", "knee", "finalist", "checkpoint"),
)
"""Columns of trials.csv; what was not measured is empty, ``finalist`` counts from 1."""


@dataclass(frozen=True)
class TrialResult:
    """One candidate; what was not measured is None."""

    number: int
    space: str
    """Label of the space it came from, for example ``prune-resnet-taylor``."""
    choices: dict[str, float | int]
    """What was chosen in that space, for example ``{"ratio": 0.5}``."""
    state: State
    reason: str = ""
    """Why it is infeasible, a duplicate or failed; empty when complete."""
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

    @property
    def objectives(self) -> tuple[float, float, float]:
        """(1 - accuracy, latency in ms, bytes): all three to be minimised; infinite when not complete."""
        if self.state != "complete" or None in (self.accuracy, self.latency_p50_ms, self.size_bytes):
            return (math.inf, math.inf, math.inf)
        assert self.accuracy is not None
        assert self.latency_p50_ms is not None
        assert self.size_bytes is not None
        return (1.0 - self.accuracy, self.latency_p50_ms, float(self.size_bytes))


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
