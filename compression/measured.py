"""What was measured of each method: written by ``benchmarks/distillation.py``, shown by ``stillhouse methods``."""

import json
from functools import lru_cache
from pathlib import Path

from compression.types import Frozen

PLACE = Path(__file__).parent / "measured.json"


class Gap(Frozen):
    """A paired difference of test accuracies."""

    base: str
    """The arm it is compared with."""
    points: float
    """Percentage points; above 0 the method is better."""
    low: float
    """Lower bound of the 95 % interval."""
    high: float
    """Upper bound."""


class Measured(Frozen):
    """One method in one benchmark."""

    method: str
    """Kind of method and method: ``losses.pld``."""
    arm: str
    """Name of the row in docs/benchmarks.md."""
    data: str
    setting: str
    """Student, schedule, seeds and share of the data, in words."""
    accuracy: float
    """Mean test accuracy over the seeds, percent."""
    ece: float | None = None
    gaps: tuple[Gap, ...]
    """To the same student without teachers, then to the arm that lacks this method alone."""
    cost: float | None
    """CPU time of the training over that of the last of ``gaps``."""

    def words(self) -> str:
        """The gap to the last base and the cost, in one line."""
        if not self.gaps:
            return f"{self.data}: {self.accuracy:.2f} %"
        gap = self.gaps[-1]
        cost = "" if self.cost is None else f", cost x{self.cost:.2f}"
        return f"{self.data}: {gap.points:+.2f} ({gap.low:+.2f} to {gap.high:+.2f}) points to '{gap.base}'{cost}"


@lru_cache
def measured() -> tuple[Measured, ...]:
    """All records, in the order of the benchmark's tables."""
    return tuple(Measured.model_validate(row) for row in json.loads(PLACE.read_text(encoding="utf-8")))


def measured_of(kind: str, method: str) -> tuple[Measured, ...]:
    """Records of one method of a kind of the catalogue, say ``losses`` and ``pld``."""
    return tuple(row for row in measured() if row.method == f"{kind}.{method}")
