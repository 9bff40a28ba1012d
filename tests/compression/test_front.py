"""What is read off the trials of a study: front, hypervolume, knee, finalists."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.search.front import choose_finalists, dominates, hypervolume, knee, pareto_front
from compression.search.trials import TrialResult


def trial(number: int, accuracy: float, latency: float, size: int = 1000, **changes) -> TrialResult:
    row = TrialResult(number, "space", {}, "complete", "", accuracy, latency, size)
    return replace(row, **changes)


FRONT = [
    trial(0, 0.95, 10.0),
    trial(1, 0.94, 4.0),
    trial(2, 0.85, 3.0),
    trial(3, 0.70, 1.0),
    trial(4, 0.60, 8.0),  # dominated
]


def test_front_is_what_nothing_dominates():
    assert [one.number for one in pareto_front(FRONT)] == [3, 2, 1, 0]
    failed = replace(FRONT[0], number=9, state="failed", accuracy=1.0)
    assert failed not in pareto_front([*FRONT, failed])


def test_knee_is_the_best_compromise():
    best = knee(FRONT)
    assert best is not None
    assert best.number == 1
    assert knee([]) is None
    assert knee([FRONT[4]]) is FRONT[4]


@pytest.mark.parametrize(
    ("prefer", "count", "numbers"),
    [
        ("accuracy", 1, [0]),
        ("accuracy", 2, [0, 1]),
        ("accuracy", 9, [0, 1, 2, 3, 4]),
        ("knee", 1, [1]),
        ("knee", 2, [1, 0]),
        ("latency", 1, [3]),
        ("latency", 2, [3, 1]),
    ],
)
def test_finalists_by_policy(prefer, count, numbers):
    chosen = choose_finalists(FRONT, count=count, prefer=prefer)
    assert [one.number for one in chosen] == numbers


def test_finalists_are_within_budget():
    chosen = choose_finalists(FRONT, count=2, max_latency_ms=5.0)
    assert [one.number for one in chosen] == [1, 2] or [one.number for one in chosen] == [1, 3]
    assert all(one.latency_p50_ms <= 5.0 for one in chosen)
    assert choose_finalists(FRONT, count=2, max_size_bytes=10) == ()


points = st.lists(st.tuples(*[st.floats(0.0, 1.2)] * 3), max_size=8)


@settings(deadline=None, max_examples=40)
@given(points=points)
def test_hypervolume_agrees_with_counting_cells(points):
    grid = [(min(round(x * 10), 12), min(round(y * 10), 12), min(round(z * 10), 12)) for x, y, z in points]
    cells = {
        (i, j, k)
        for i in range(10)
        for j in range(10)
        for k in range(10)
        if any(a <= i and b <= j and c <= k for a, b, c in grid)
    }
    scaled = [(a / 10, b / 10, c / 10) for a, b, c in grid]
    assert hypervolume(scaled, (1.0, 1.0, 1.0)) == pytest.approx(len(cells) / 1000, abs=1e-9)


@given(points=points, extra=st.tuples(*[st.floats(0.0, 1.2)] * 3))
def test_hypervolume_never_falls_when_a_point_is_added(points, extra):
    before = hypervolume(points, (1.0, 1.0, 1.0))
    after = hypervolume([*points, extra], (1.0, 1.0, 1.0))
    assert before <= after + 1e-12
    if any(dominates(point, extra) for point in points):
        assert after == pytest.approx(before)
