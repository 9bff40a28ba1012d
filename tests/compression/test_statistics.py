import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compression.errors import ShapeError
from compression.statistics import accuracy_drop, mcnemar, wilson


def answers(both: int, lost: int, gained: int, neither: int) -> tuple[torch.Tensor, torch.Tensor]:
    reference = torch.tensor([True] * (both + lost) + [False] * (gained + neither))
    candidate = torch.tensor([True] * both + [False] * lost + [True] * gained + [False] * neither)
    return reference, candidate


@given(both=st.integers(0, 300), lost=st.integers(0, 60), gained=st.integers(0, 60), neither=st.integers(1, 60))
def test_the_interval_holds_the_estimate_and_turns_around(both: int, lost: int, gained: int, neither: int) -> None:
    reference, candidate = answers(both, lost, gained, neither)
    drop = accuracy_drop(reference, candidate, seed=0)
    assert drop.low <= drop.estimate + 1e-12
    assert drop.estimate - 1e-12 <= drop.high
    assert drop.estimate == pytest.approx(reference.float().mean().item() - candidate.float().mean().item(), abs=1e-6)
    assert accuracy_drop(candidate, reference, seed=0).estimate == pytest.approx(-drop.estimate)


def test_more_samples_make_it_narrower_and_the_level_wider() -> None:
    few = accuracy_drop(*answers(80, 10, 4, 6), seed=0)
    many = accuracy_drop(*answers(8000, 1000, 400, 600), seed=0)
    assert many.high - many.low < few.high - few.low
    sure = accuracy_drop(*answers(80, 10, 4, 6), seed=0, level=0.999)
    assert sure.high - sure.low > few.high - few.low


def test_no_difference_seen_is_no_certainty() -> None:
    drop = accuracy_drop(*answers(90, 0, 0, 10), seed=0)
    assert drop.estimate == 0
    assert drop.low < 0 < drop.high
    assert drop.high == pytest.approx(0.03, abs=0.001)  # rule of three


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(300):
        draw = torch.rand(400, generator=generator)
        reference = draw < 0.9
        candidate = (draw < 0.8) | (draw > 0.95)  # true drop 0.9 - 0.85 = 0.05
        drop = accuracy_drop(reference, candidate, seed=trial, resamples=500)
        covered += drop.low <= 0.05 <= drop.high
    assert 270 <= covered <= 297  # 95 % of 300 is 285


def test_mcnemar_knows_chance_from_difference() -> None:
    assert mcnemar(*answers(50, 0, 0, 50)) == 1.0
    assert mcnemar(*answers(50, 5, 5, 50)) == pytest.approx(1.0)
    assert mcnemar(*answers(50, 10, 0, 50)) == pytest.approx(2 * 0.5**10)


def test_wilson_is_the_published_interval() -> None:
    found = wilson(8, 10)
    assert (found.low, found.high) == (pytest.approx(0.4902, abs=1e-3), pytest.approx(0.9433, abs=1e-3))
    assert wilson(0, 10).low == 0


def test_unequal_answers_are_refused() -> None:
    with pytest.raises(ShapeError):
        accuracy_drop(torch.ones(3, dtype=torch.bool), torch.ones(4, dtype=torch.bool), seed=0)
    with pytest.raises(ShapeError):
        wilson(3, 2)
