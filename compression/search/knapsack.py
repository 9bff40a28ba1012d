"""Which items to take so that their cost is enough and their score as small as can be: a 0/1 covering knapsack."""

import math
from collections.abc import Sequence

MOST_STATES = 20_000
"""Partial choices that are kept apart; above, those of almost one cost are told apart no longer."""

TOLERANCE = 1e-9
"""Share of the need that rounding may eat: ten costs of 0.1 are enough for 1."""

State = tuple[float, float, int]
"""Cost, score, and the chosen items as bits."""


def cheapest_cover(scores: Sequence[float], costs: Sequence[float], need: float) -> tuple[int, ...]:
    """Positions, ascending, of the items with the smallest sum of scores whose costs sum to ``need`` at least.

    Exact, by dynamic programming over the items: of the choices among the first i, those are kept that no other one
    beats in cost and score both. Costs need no rounding for it; only where more than ``MOST_STATES`` choices remain,
    costs are rounded to that many steps of ``need`` to thin them out, and the sum is still enough. Nothing is
    taken that could be left.

    Args:
        scores: What taking each item does harm, finite.
        costs: What taking each item saves, not negative.
        need: What must be saved.

    Raises:
        ValueError: Numbers of scores and costs differ, one is not finite or a cost negative, or all items are not
            enough.
    """
    if len(scores) != len(costs):
        raise ValueError(f"knapsack has {len(scores)} scores and {len(costs)} costs, expected as many. Give one each.")
    if not all(map(math.isfinite, (*scores, *costs, need))) or any(cost < 0 for cost in costs):
        raise ValueError(
            f"knapsack has scores {list(scores)}, costs {list(costs)} and need {need}, expected finite numbers and no "
            "negative cost. Correct them."
        )
    enough = need - TOLERANCE * abs(need)
    if sum(costs) < enough:
        raise ValueError(f"knapsack has costs that sum to {sum(costs)}, expected {need} at least. Lower the need.")
    states: list[State] = [(0.0, 0.0, 0)]
    for place, (score, cost) in enumerate(zip(scores, costs, strict=True)):
        taken = [(sum_cost + cost, sum_score + score, bits | 1 << place) for sum_cost, sum_score, bits in states]
        states = _undominated([*states, *taken], enough)
        if len(states) > MOST_STATES:
            states = _thinned(states, enough)
    chosen = [place for place in range(len(costs)) if states[0][2] >> place & 1]
    # What scores 0 was taken where it came first; it stays only where it is needed.
    for place in sorted(chosen, key=lambda place: (-scores[place], -costs[place])):
        rest = [other for other in chosen if other != place]
        if scores[place] >= 0 and sum(costs[other] for other in rest) >= enough:
            chosen = rest
    return tuple(chosen)


def _undominated(states: Sequence[State], enough: float) -> list[State]:
    """Those that no other one beats in cost and score both, most cost first; a cost above ``enough`` counts as that."""
    ordered = sorted(states, key=lambda state: (-min(state[0], enough), state[1], state[2]))
    kept: list[State] = []
    for state in ordered:
        if not kept or state[1] < kept[-1][1]:
            kept.append(state)
    return kept


def _thinned(states: Sequence[State], enough: float) -> list[State]:
    """The smallest score in each of ``MOST_STATES`` steps of cost, most cost first; the first one stays."""
    steps: dict[int, State] = {}
    for state in states:
        step = int(min(state[0], enough) / enough * MOST_STATES) if enough > 0 else 0
        if step not in steps or state[1] < steps[step][1]:
            steps[step] = state
    return list(dict.fromkeys((states[0], *steps.values())))
