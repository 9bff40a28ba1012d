"""Plackett-Luce distillation: special cases, gradient and shape of the loss."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from compression.distill import Pld
from compression.types import Outputs, TeacherOutputs


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one(logits: torch.Tensor) -> TeacherOutputs:
    return TeacherOutputs(logits.unsqueeze(0), torch.ones(1, len(logits), dtype=logits.dtype))


def loss(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, **fields: float) -> torch.Tensor:
    return Pld(**fields).build()(Outputs(student), one(teacher), labels)


def inputs(seed: int, batch: int, classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    labels = torch.randint(0, classes, (batch,), generator=torch.Generator().manual_seed(seed))
    return 2 * randn(batch, classes, seed=seed), 2 * randn(batch, classes, seed=seed + 1), labels


def ranking(teacher: list[float], label: int) -> list[int]:
    return [label, *sorted((c for c in range(len(teacher)) if c != label), key=lambda c: -teacher[c])]


sizes = given(seed=st.integers(0, 2**16), batch=st.integers(1, 6), classes=st.integers(2, 9))


@sizes
@settings(max_examples=30, deadline=None)
def test_equals_the_likelihood_of_the_ranking_choice_by_choice(seed, batch, classes):
    student, teacher, labels = inputs(seed, batch, classes)
    total = 0.0
    for s, t, label in zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True):
        left = ranking(t, label)
        mass = sum(math.exp(v) for v in t)
        while left:
            chosen = left[0]
            total += math.exp(t[chosen]) / mass * (math.log(sum(math.exp(s[c]) for c in left)) - s[chosen])
            left = left[1:]
    assert float(loss(student, teacher, labels)) == pytest.approx(total / batch, rel=1e-10)


@sizes
@settings(max_examples=30, deadline=None)
def test_gradient_is_the_weighted_sum_of_softmax_over_those_left_less_the_chosen(seed, batch, classes):
    student, teacher, labels = inputs(seed, batch, classes)
    student.requires_grad_()
    loss(student, teacher, labels).backward()
    expected = torch.zeros(batch, classes, dtype=torch.float64)
    for i in range(batch):
        order = ranking(teacher[i].tolist(), int(labels[i]))
        for rank, chosen in enumerate(order):
            left = torch.tensor(order[rank:])
            weight = teacher[i].softmax(0)[chosen] / batch
            expected[i, left] += weight * student.detach()[i, left].softmax(0)
            expected[i, chosen] -= weight
    torch.testing.assert_close(student.grad, expected)
    torch.testing.assert_close(student.grad.sum(1), torch.zeros(batch, dtype=torch.float64))


@sizes
@settings(max_examples=30, deadline=None)
def test_invariant_to_shifts_of_student_and_teacher(seed, batch, classes):
    student, teacher, labels = inputs(seed, batch, classes)
    there = loss(student + 5 * randn(batch, 1, seed=seed + 2), teacher + 5 * randn(batch, 1, seed=seed + 3), labels)
    torch.testing.assert_close(there, loss(student, teacher, labels))


@sizes
@settings(max_examples=30, deadline=None)
def test_a_teacher_sure_of_the_label_leaves_cross_entropy(seed, batch, classes):
    student, teacher, labels = inputs(seed, batch, classes)
    sure = teacher + 1000.0 * F.one_hot(labels, classes)
    torch.testing.assert_close(loss(student, sure, labels), F.cross_entropy(student, labels))


def test_a_uniform_teacher_leaves_the_likelihood_of_one_ranking_over_the_classes():
    """Ties are ranked by class number; exp(-sum of costs) is the probability of drawing that order."""
    student, _, _ = inputs(3, 1, 4)
    worth = student[0].exp().tolist()
    order, drawn, left = [2, 0, 1, 3], 1.0, sum(worth)
    for c in order:
        drawn *= worth[c] / left
        left -= worth[c]
    value = loss(student, torch.zeros(1, 4, dtype=torch.float64), torch.tensor([2]))
    assert math.exp(-4 * float(value)) == pytest.approx(drawn, rel=1e-9)


def test_the_last_choice_costs_nothing():
    """Of two classes only the choice of the label is left, weighted with the teacher's probability of it."""
    student, teacher, labels = inputs(5, 6, 2)
    each = F.cross_entropy(student, labels, reduction="none")
    expected = teacher.softmax(1).gather(1, labels[:, None])[:, 0] * each
    torch.testing.assert_close(loss(student, teacher, labels), expected.mean())


@sizes
@settings(max_examples=30, deadline=None)
def test_convex_in_the_student(seed, batch, classes):
    here, teacher, labels = inputs(seed, batch, classes)
    there = 3 * randn(batch, classes, seed=seed + 9)
    for share in (0.25, 0.5, 0.9):
        between = loss(share * here + (1 - share) * there, teacher, labels)
        chord = share * loss(here, teacher, labels) + (1 - share) * loss(there, teacher, labels)
        assert float(between) <= float(chord) + 1e-12


def test_scaling_rightly_ordered_logits_lowers_it_towards_zero():
    _, teacher, _ = inputs(7, 8, 6)
    labels = teacher.argmax(1)
    values = [float(loss(scale * teacher, teacher, labels)) for scale in (1, 2, 4, 8, 16, 32, 1000)]
    assert values[0] > 0.01
    assert all(later < earlier for earlier, later in pairwise(values))
    assert values[-1] < 1e-3 * values[0]


def test_class_numbers_mean_nothing():
    student, teacher, labels = inputs(8, 5, 7)
    order = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    where = torch.argsort(order)
    torch.testing.assert_close(
        loss(student[:, order], teacher[:, order], where[labels]), loss(student, teacher, labels)
    )


def test_label_is_ranked_first_whatever_the_teacher_says():
    """A teacher against the label: lowering the label's logit still raises the loss."""
    teacher = torch.tensor([[3.0, 1.0, -3.0]], dtype=torch.float64)
    student = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    loss(student, teacher, torch.tensor([2])).backward()
    assert student.grad[0, 2] < 0


def test_floor_adds_cross_entropy_where_a_sure_teacher_silences_the_label():
    student, _, labels = inputs(9, 4, 5)
    wrong = 60.0 * F.one_hot((labels + 1) % 5, 5).double()
    student.requires_grad_()
    (silent,) = torch.autograd.grad(loss(student, wrong, labels), student)
    assert float(silent.gather(1, labels[:, None]).abs().max()) < 1e-12
    with_floor = loss(student, wrong, labels, label_floor=0.3)
    added = with_floor - loss(student, wrong, labels)
    torch.testing.assert_close(added, 0.3 * F.cross_entropy(student, labels))
    (heard,) = torch.autograd.grad(with_floor, student)
    assert float(heard.gather(1, labels[:, None]).max()) < -1e-3


def test_temperature_softens_the_teacher_alone():
    student, teacher, labels = inputs(10, 5, 6)
    torch.testing.assert_close(
        loss(student, 4 * teacher, labels, temperature=4.0), loss(student, teacher, labels, temperature=1.0)
    )


def test_several_teachers_rank_by_their_mixture():
    """The mixture prefers class 1 although the mean of the logits prefers class 2."""
    teachers = torch.tensor([[[0.0, 9.0, 0.0, -9.0]], [[0.0, -9.0, 1.0, 0.0]]], dtype=torch.float64)
    weights = torch.full((2, 1), 0.5, dtype=torch.float64)
    mean, mixed = teachers.mean(0), teachers.softmax(-1).mean(0)
    assert mean[0, 1] < mean[0, 2]
    assert mixed[0, 1] > mixed[0, 2]
    student, _, _ = inputs(11, 1, 4)
    labels = torch.tensor([0])
    value = Pld().build()(Outputs(student), TeacherOutputs(teachers, weights), labels)
    torch.testing.assert_close(value, loss(student, mixed.log(), labels))
