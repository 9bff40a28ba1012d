"""Verdicts: the answers of the gate, on one file, one target and a whole run."""

from collections.abc import Mapping, Sequence
from typing import Literal

from compression.types import Frozen

Outcome = Literal["accept", "inconclusive", "regression", "infeasible", "anomalous"]
"""From best to worst. ``anomalous`` means: too strange to believe, a person has to look."""

SEVERITY: dict[Outcome, int] = {
    "accept": 0,
    "inconclusive": 1,
    "regression": 2,
    "infeasible": 3,
    "anomalous": 4,
}


class Check(Frozen):
    """One question to the evidence, and its answer in words."""

    name: str
    outcome: Literal["pass", "fail", "inconclusive", "skipped"]
    found: str
    expected: str
    reason: str
    on_fail: Outcome = "regression"
    """What the verdict becomes when this check fails."""


class Verdict(Frozen):
    """The decision on one target (or one file of it)."""

    target: str
    candidate: str
    """The file the checks are about."""
    outcome: Outcome
    checks: tuple[Check, ...]
    ships: str | None = None
    """Name of the file that ships; none unless accepted."""
    reasons: tuple[str, ...] = ()
    """Why, in sentences."""
    ran: bool = True
    """False for an engine that was built but not run here."""


class RunVerdict(Frozen):
    """The decision on a whole run; ``verdict.json``."""

    outcome: Outcome
    summary: str
    targets: dict[str, Verdict]


def combine(verdicts: Mapping[str, Verdict]) -> RunVerdict:
    """The verdict on a run: the worst of the targets that ran here.

    Targets that were built but cannot run here are listed and leave the outcome alone, unless nothing ran.
    """
    ran = {name: verdict for name, verdict in verdicts.items() if verdict.ran}
    unrun = sorted(set(verdicts) - set(ran))
    outcome: Outcome = "inconclusive"
    if ran:
        outcome = max((verdict.outcome for verdict in ran.values()), key=SEVERITY.__getitem__)
    parts = [f"{name}: {_headline(verdict)}" for name, verdict in ran.items()]
    if unrun:
        parts.append(f"{', '.join(unrun)}: built, not run here")
    return RunVerdict(
        outcome=outcome, summary="; ".join(parts) or "there was no target to judge", targets=dict(verdicts)
    )


def _headline(verdict: Verdict) -> str:
    if verdict.outcome == "accept":
        return f"'{verdict.ships}' ships"
    return f"{verdict.outcome}, {verdict.reasons[0]}" if verdict.reasons else verdict.outcome


def best_of(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict with the mildest outcome; the first of them on a tie."""
    return min(verdicts, key=lambda verdict: SEVERITY[verdict.outcome])
