"""Mean answers per class, and their angle to a perfect teacher's."""

import pytest
import torch

from compression.select.black_box import BlackBox, black_box_score, mean_answers


def score(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return black_box_score(torch.zeros(1), logits, labels)


def right(labels: torch.Tensor, lead: float, classes: int = 4) -> torch.Tensor:
    return lead * torch.nn.functional.one_hot(labels, classes).float()


LABELS = torch.arange(40) % 4


def test_a_perfect_teacher_has_one_and_a_clueless_one_the_root_of_a_share():
    assert score(right(LABELS, 50.0), LABELS) == pytest.approx(1.0)
    assert score(torch.zeros(40, 4), LABELS) == pytest.approx(0.5)
    assert score(right((LABELS + 1) % 4, 50.0), LABELS) == pytest.approx(0.0, abs=1e-9)


def test_better_answers_score_higher():
    scores = [score(right(LABELS, lead), LABELS) for lead in (-2.0, 0.0, 1.0, 3.0)]
    assert scores == sorted(scores)
    assert scores[0] < scores[1] < scores[2] < scores[3]


def test_answers_are_means_per_true_class():
    logits = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    answers = mean_answers(logits, LABELS)
    assert answers.shape == (4, 4)
    torch.testing.assert_close(answers[2], logits.double().softmax(1)[LABELS == 2].mean(0))
    torch.testing.assert_close(answers.sum(1), torch.ones(4, dtype=torch.float64))


def test_an_absent_class_is_left_out_of_both_sides():
    some = LABELS[LABELS != 3]
    assert score(right(some, 50.0), some) == pytest.approx(1.0)


def test_the_same_teacher_twice_has_the_same_score_whatever_its_features_and_order():
    logits = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    build = BlackBox().build()
    first = build(torch.zeros(40, 3), logits, LABELS)
    assert build(torch.ones(40, 9), logits.clone(), LABELS.clone()) == first
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert build(torch.zeros(1), logits[order], LABELS[order]) == pytest.approx(first)
    assert 0 <= first <= 1
