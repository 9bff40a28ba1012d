"""What is read off the trials of a study: Pareto front, hypervolume, knee, finalists."""

import math
from collections.abc import Sequence
from typing import Literal

from compression.search.trials import TrialResult

Prefer = Literal["accuracy", "knee", "latency"]


def dominates(left: Sequence[float], right: Sequence[float]) -> bool:
    """Whether ``left`` is nowhere worse than ``right`` and somewhere better; smaller is better."""
    return all(a <= b for a, b in zip(left, right, strict=True)) and tuple(left) != tuple(right)


def pareto_front(trials: Sequence[TrialResult]) -> tuple[TrialResult, ...]:
    """The complete trials no other one dominates, fastest first."""
    complete = [trial for trial in trials if trial.state == "complete"]
    kept = [trial for trial in complete if not any(dominates(other.objectives, trial.objectives) for other in complete)]
    return tuple(sorted(kept, key=lambda trial: (trial.objectives[1], trial.objectives[0], trial.number)))


def hypervolume(points: Sequence[tuple[float, float, float]], reference: tuple[float, float, float]) -> float:
    """Volume dominated by ``points`` within the box from 0 to ``reference``, as a share of it, 0..1.

    All three coordinates are minimised and not negative; points outside the box add nothing. Comparable
    between studies that use the same reference.
    """
    if min(reference) <= 0:
        return 0.0
    inside = [
        tuple(max(value, 0.0) / limit for value, limit in zip(point, reference, strict=True))
        for point in points
        if all(value < limit for value, limit in zip(point, reference, strict=True))
    ]
    inside.sort(key=lambda point: point[2])
    volume = 0.0
    for i, point in enumerate(inside):
        above = inside[i + 1][2] if i + 1 < len(inside) else 1.0
        volume += _area([(p[0], p[1]) for p in inside[: i + 1]]) * (above - point[2])
    return volume


def _area(points: Sequence[tuple[float, float]]) -> float:
    """Area dominated by the points within the unit square."""
    area, lowest = 0.0, 1.0
    for x, y in sorted(points):
        if y < lowest:
            area += (1.0 - x) * (lowest - y)
            lowest = y
    return area


def knee(trials: Sequence[TrialResult]) -> TrialResult | None:
    """The front's best compromise: nearest to the ideal corner, each objective scaled to 0..1 over the front.

    None when nothing is complete; ties go to the more accurate, then to the earlier trial.
    """
    front = pareto_front(trials)
    if not front:
        return None
    columns = list(zip(*(trial.objectives for trial in front), strict=True))
    lows = [min(column) for column in columns]
    spans = [(max(column) - min(column)) or 1.0 for column in columns]

    def distance(trial: TrialResult) -> float:
        scaled = zip(trial.objectives, lows, spans, strict=True)
        return math.hypot(*((value - low) / span for value, low, span in scaled))

    return min(front, key=lambda trial: (round(distance(trial), 12), trial.objectives[0], trial.number))


def choose_finalists(
    trials: Sequence[TrialResult],
    *,
    count: int,
    prefer: Prefer = "accuracy",
    max_latency_ms: float | None = None,
    max_size_bytes: int | None = None,
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

    front = pareto_front(within)
    on_front = {trial.number for trial in front}
    ranked = sorted(front, key=rank)
    rest = sorted((trial for trial in within if trial.number not in on_front), key=rank)
    compromise = knee(within)
    assert compromise is not None
    if prefer == "knee":
        ranked.remove(compromise)
        ranked.insert(0, compromise)
    elif count > 1 and compromise not in ranked[:count]:
        ranked.remove(compromise)
        ranked.insert(count - 1, compromise)
    return tuple((ranked + rest)[:count])
