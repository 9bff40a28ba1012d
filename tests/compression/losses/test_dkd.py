"""Decoupled distillation: it puts kd together again, and its parts see what they should and no more."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch.nn import functional as F

from compression.distill import Dkd, Kd
from compression.types import Outputs, TeacherOutputs


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one(logits: torch.Tensor) -> TeacherOutputs:
    return TeacherOutputs(logits.unsqueeze(0), torch.ones(1, len(logits), dtype=logits.dtype))


def loss(student: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor, **fields: float) -> torch.Tensor:
    return Dkd(**fields).build()(Outputs(student), one(teacher), labels)


def inputs(seed: int, batch: int, classes: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    labels = torch.randint(0, classes, (batch,), generator=torch.Generator().manual_seed(seed))
    return 2 * randn(batch, classes, seed=seed), 2 * randn(batch, classes, seed=seed + 1), labels


sizes = given(
    seed=st.integers(0, 2**16), batch=st.integers(1, 5), classes=st.integers(2, 9), temperature=st.floats(0.5, 8.0)
)


@sizes
@settings(max_examples=30, deadline=None)
def test_is_kd_with_the_factors_that_kd_has(seed, batch, classes, temperature):
    """KD = target term + (1 - p) * non-target term, p the mixture's probability of the label, sample by sample."""
    student, _, labels = inputs(seed, batch, classes)
    teachers = TeacherOutputs(2 * randn(3, batch, classes, seed=seed + 5), randn(3, batch, seed=seed + 6).softmax(0))
    probs = teachers.probs(temperature)
    parts = [
        Dkd(alpha=1.0, beta=1.0 - float(probs[i, labels[i]]), temperature=temperature).build()(
            Outputs(student[i : i + 1]),
            TeacherOutputs(teachers.logits[:, i : i + 1], teachers.weights[:, i : i + 1]),
            labels[i : i + 1],
        )
        for i in range(batch)
    ]
    whole = Kd(temperature=temperature).build()(Outputs(student), teachers, labels)
    torch.testing.assert_close(torch.stack(parts).mean(), whole)


@sizes
@settings(max_examples=30, deadline=None)
def test_zero_at_the_teacher_up_to_a_shift(seed, batch, classes, temperature):
    _, teacher, labels = inputs(seed, batch, classes)
    student = (teacher + randn(batch, 1, seed=seed + 2)).requires_grad_()
    value = loss(student, teacher, labels, temperature=temperature)
    value.backward()
    assert abs(value.item()) < 1e-10
    assert float(student.grad.abs().max()) < 1e-10


@sizes
@settings(max_examples=30, deadline=None)
def test_non_target_term_sees_the_logit_of_the_label_on_neither_side(seed, batch, classes, temperature):
    student, teacher, labels = inputs(seed, batch, classes)
    at_label = F.one_hot(labels, classes)
    student.requires_grad_()
    value = loss(student, teacher, labels, alpha=0.0, temperature=temperature)
    value.backward()
    assert torch.all(student.grad[at_label.bool()].abs() < 1e-12)
    moved = loss(student + 7 * at_label, teacher + 11 * at_label, labels, alpha=0.0, temperature=temperature)
    torch.testing.assert_close(moved, value)


def test_target_term_is_the_divergence_of_two_coins():
    student, teacher, labels = inputs(1, 6, 5)
    p, q = ((side / 3).softmax(1).gather(1, labels[:, None]) for side in (teacher, student))
    expected = 9 * (F.binary_cross_entropy(q, p) - F.binary_cross_entropy(p, p))
    torch.testing.assert_close(loss(student, teacher, labels, beta=0.0, temperature=3.0), expected)


def test_target_term_does_not_see_which_other_class_has_the_mass():
    student, teacher, labels = inputs(2, 1, 5)
    others = [c for c in range(5) if c != int(labels[0])]
    shuffled = student.clone()
    shuffled[:, others] = student[:, [others[i] for i in (2, 0, 3, 1)]]
    torch.testing.assert_close(loss(shuffled, teacher, labels, beta=0.0), loss(student, teacher, labels, beta=0.0))
    assert float((loss(shuffled, teacher, labels) - loss(student, teacher, labels)).abs()) > 0.01


def test_of_two_classes_nothing_is_left_beside_the_target():
    student, teacher, labels = inputs(3, 6, 2)
    kd = Kd(temperature=4.0).build()(Outputs(student), one(teacher), labels)
    torch.testing.assert_close(loss(student, teacher, labels, beta=8.0), kd)


def test_a_sure_teacher_silences_kd_and_not_the_non_target_term():
    student, teacher, labels = inputs(4, 4, 6)
    sure = teacher + 80.0 * F.one_hot(labels, 6)
    student = (student + 80.0 * F.one_hot(labels, 6)).requires_grad_()
    (of_kd,) = torch.autograd.grad(Kd(temperature=1.0).build()(Outputs(student), one(sure), labels), student)
    (of_dkd,) = torch.autograd.grad(loss(student, sure, labels, temperature=1.0), student)
    assert float(of_kd.abs().max()) < 1e-12
    assert float(of_dkd.abs().max()) > 0.1


def test_square_of_the_temperature_is_inside():
    student, teacher, labels = inputs(5, 6, 5)
    torch.testing.assert_close(
        loss(4 * student, 4 * teacher, labels, temperature=4.0), 16 * loss(student, teacher, labels, temperature=1.0)
    )


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_single_precision_keeps_its_value_at_extreme_logits(scale):
    """Probabilities of the label and of all others round to 0 here; their logarithms do not."""
    student, teacher, labels = inputs(6, 8, 5)
    wide = loss(student * scale, teacher * scale, labels, temperature=1.0)
    narrow = loss((student * scale).float(), (teacher * scale).float(), labels, temperature=1.0)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-4, atol=0)


def test_refuses_both_factors_zero():
    with pytest.raises(ValidationError, match="Raise one of them"):
        Dkd(alpha=0.0, beta=0.0)
