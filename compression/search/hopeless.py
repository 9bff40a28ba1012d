"""Trials that are not worth finishing."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from compression.search.trials import TrialResult


@dataclass(frozen=True)
class Hopeless:
    """Stops a trial that lies far behind, at the same epoch, of trials that are no slower and no larger.

    A rule of the kind of Golovin et al. 2017 (Google Vizier, median stopping), for several objectives: only trials
    that beat the candidate in everything but accuracy are compared with it, and only finished epochs.
    """

    margin: float
    """How far below their median it may lie, as a share of right answers."""
    at_least: int = 2
    """So many such trials are needed."""

    class Stop(Exception):  # noqa: N818
        """Ends the training of a trial; its text is the reason."""

    def check(self, curve: Sequence[float], row: TrialResult, rows: Sequence[TrialResult]) -> None:
        """Nothing, or raises ``Stop``. ``curve`` has the validation accuracy of each epoch so far."""
        epoch = len(curve)
        rivals = [
            other.curve[epoch - 1]
            for other in rows
            if other.state == "complete" and len(other.curve) > epoch and _no_worse(other, row)
        ]
        if len(rivals) < self.at_least:
            return
        level = median(rivals)
        if curve[-1] < level - self.margin:
            raise Hopeless.Stop(
                f"accuracy {curve[-1]:.4f} after epoch {epoch} is more than {self.margin:g} below {level:.4f}, the "
                f"median of {len(rivals)} trials that are no slower and no larger"
            )


def _no_worse(other: TrialResult, row: TrialResult) -> bool:
    for name in ("latency_p50_ms", "size_bytes"):
        found, limit = getattr(other, name), getattr(row, name)
        if found is None or limit is None or found > limit:
            return False
    return True
