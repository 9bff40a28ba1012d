"""What is read off the trials of a study: Pareto front, hypervolume, knee, finalists."""

import math
from collections.abc import Sequence
from typing import Literal

from compression.search.trials import OBJECTIVES, Objective, TrialResult

Prefer = Literal["accuracy", "knee", "latency"]


def dominates(left: Sequence[float], right: Sequence[float]) -> bool:
    """Whether ``left`` is nowhere worse than ``right`` and somewhere better; smaller is better."""
    return all(a <= b for a, b in zip(left, right, strict=True)) and tuple(left) != tuple(right)


def pareto_front(
    trials: Sequence[TrialResult], objectives: Sequence[Objective] = OBJECTIVES
) -> tuple[TrialResult, ...]:
    """The complete trials no other one dominates, fastest first."""
    points = {trial.number: trial.values(objectives) for trial in trials if trial.state == "complete"}
    kept = [
        trial
        for trial in trials
        if trial.number in points and not any(dominates(other, points[trial.number]) for other in points.values())
    ]
    return tuple(sorted(kept, key=lambda trial: (trial.latency_p50_ms or 0.0, -(trial.accuracy or 0.0), trial.number)))


def hypervolume(points: Sequence[Sequence[float]], reference: Sequence[float]) -> float:
    """Volume dominated by ``points`` within the box from 0 to ``reference``, as a share of it, 0..1.

    All coordinates are minimised and not negative; points outside the box add nothing. Comparable
    between studies that use the same reference.
    """
    if min(reference) <= 0:
        return 0.0
    inside = [
        tuple(max(value, 0.0) / limit for value, limit in zip(point, reference, strict=True))
        for point in points
        if all(value < limit for value, limit in zip(point, reference, strict=True))
    ]
    return _volume(inside)


def _volume(points: Sequence[Sequence[float]]) -> float:
    """Volume dominated by the points within the unit box, by slices along the last coordinate."""
    if not points:
        return 0.0
    if len(points[0]) == 1:
        return 1.0 - min(point[0] for point in points)
    ordered = sorted(points, key=lambda point: point[-1])
    volume = 0.0
    for number, point in enumerate(ordered):
        above = ordered[number + 1][-1] if number + 1 < len(ordered) else 1.0
        if above > point[-1]:
            volume += _volume([other[:-1] for other in ordered[: number + 1]]) * (above - point[-1])
    return volume


def knee(trials: Sequence[TrialResult], objectives: Sequence[Objective] = OBJECTIVES) -> TrialResult | None:
    """The front's best compromise: nearest to the ideal corner, each objective scaled to 0..1 over the front.

    None when nothing is complete; ties go to the more accurate, then to the earlier trial.
    """
    front = pareto_front(trials, objectives)
    if not front:
        return None
    columns = list(zip(*(trial.values(objectives) for trial in front), strict=True))
    lows = [min(column) for column in columns]
    spans = [(max(column) - min(column)) or 1.0 for column in columns]

    def distance(trial: TrialResult) -> float:
        scaled = zip(trial.values(objectives), lows, spans, strict=True)
        return math.hypot(*((value - low) / span for value, low, span in scaled))

    return min(front, key=lambda trial: (round(distance(trial), 12), -(trial.accuracy or 0.0), trial.number))


def choose_finalists(
    trials: Sequence[TrialResult],
    *,
    count: int,
    prefer: Prefer = "accuracy",
    max_latency_ms: float | None = None,
    max_size_bytes: int | None = None,
    objectives: Sequence[Objective] = OBJECTIVES,
) -> tuple[TrialResult, ...]:
    """Up to ``count`` complete trials within budget, in the order they deserve a full distillation.

    ``accuracy``: the most accurate of the front; of two or more places, the last is the knee's.
    ``latency``: the same with the fastest. ``knee``: the knee, then the most accurate.
    When the front is too small, dominated trials follow in the same order: after a short distillation
    their rank is uncertain.
    """
    within = [
        trial
        for trial in trials
        if trial.state == "complete"
        and (max_latency_ms is None or trial.objectives[1] <= max_latency_ms)
        and (max_size_bytes is None or trial.objectives[2] <= max_size_bytes)
    ]
    if not within or count < 1:
        return ()
    first, second = (1, 0) if prefer == "latency" else (0, 1)

    def rank(trial: TrialResult) -> tuple[float, float, int]:
        return (trial.objectives[first], trial.objectives[second], trial.number)

    front = pareto_front(within, objectives)
    on_front = {trial.number for trial in front}
    ranked = sorted(front, key=rank)
    rest = sorted((trial for trial in within if trial.number not in on_front), key=rank)
    compromise = knee(within, objectives)
    assert compromise is not None
    if prefer == "knee":
        ranked.remove(compromise)
        ranked.insert(0, compromise)
    elif count > 1 and compromise not in ranked[:count]:
        ranked.remove(compromise)
        ranked.insert(count - 1, compromise)
    return tuple((ranked + rest)[:count])
