"""Standardised distillation: blind to scale and offset, its gradient, flat rows, classes a teacher does not know."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from compression.distill.losses.mix_std import FLAT, MixStd, mix_std, standardised
from compression.errors import ShapeError
from compression.types import UNKNOWN, Outputs, TeacherOutputs

BATCH, WIDTH = 6, 5
LABELS = torch.zeros(BATCH, dtype=torch.int64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def panel(*logits: Tensor, weights: Tensor | None = None) -> TeacherOutputs:
    count, batch = len(logits), len(logits[0])
    shares = logits[0].new_full((count, batch), 1 / count) if weights is None else weights
    return TeacherOutputs(torch.stack(logits), shares)


def loss(student: Tensor, teachers: TeacherOutputs) -> Tensor:
    return mix_std(Outputs(student), teachers, LABELS)


def test_is_the_divergence_of_rows_divided_by_their_deviation():
    student, teacher = randn(BATCH, WIDTH), randn(BATCH, WIDTH, seed=1)
    expected = 0.0
    for s, t in zip(student, teacher, strict=True):
        p, q = ((row / row.std(correction=0)).softmax(-1) for row in (t, s))
        expected += float((p * (p.log() - q.log())).sum()) / BATCH
    assert float(loss(student, panel(teacher))) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("scale", "offset"), [(7.0, 0.0), (0.05, -3.0), (1e3, 50.0)])
def test_a_positive_scale_and_an_offset_of_any_row_change_nothing(scale, offset):
    student, teacher = randn(BATCH, WIDTH), randn(BATCH, WIDTH, seed=1)
    plain = loss(student, panel(teacher))
    assert plain > 0.1
    factor = scale * torch.linspace(0.5, 2.0, BATCH, dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(loss(student * factor + offset, panel(teacher)), plain)
    torch.testing.assert_close(loss(student, panel(teacher * factor + offset)), plain)
    assert abs(float(loss(-student, panel(teacher)) - plain)) > 1e-3


def test_is_zero_at_the_teacher_whatever_its_scale():
    teacher = randn(BATCH, WIDTH)
    assert abs(float(loss(3 * teacher - 2, panel(teacher)))) < 1e-12


def test_gradient_flows_through_the_deviation():
    """The finite difference moves the deviation too; along the row itself nothing changes."""
    student, teacher = randn(BATCH, WIDTH).requires_grad_(), panel(randn(BATCH, WIDTH, seed=1))
    assert torch.autograd.gradcheck(lambda s: loss(s, teacher), student)
    loss(student, teacher).backward()
    along = (student.grad * student.detach()).sum(dim=1)
    torch.testing.assert_close(along, torch.zeros_like(along), atol=1e-12, rtol=0)
    assert student.grad.abs().max() > 1e-2


@pytest.mark.parametrize("constant", [0.0, 4.0])
def test_rows_without_deviation_give_finite_values_and_gradients(constant):
    flat, other = torch.full((BATCH, WIDTH), constant), randn(BATCH, WIDTH).float()
    student = flat.clone().requires_grad_()
    value = loss(student, panel(other))
    value.backward()
    assert torch.isfinite(value)
    assert student.grad.abs().max() < 1 / FLAT
    assert student.grad.abs().max() > 0
    uniform = loss(other, panel(flat))
    q = standardised(other).log_softmax(-1)
    torch.testing.assert_close(uniform, (-math.log(WIDTH) - q).mean(1).mean())


def test_several_teachers_are_mixed_after_each_is_standardised():
    student, first, second = (randn(BATCH, WIDTH, seed=number) for number in range(3))
    weights = torch.stack([torch.linspace(0, 1, BATCH), 1 - torch.linspace(0, 1, BATCH)]).double()
    found = loss(student, panel(first, 100 * second, weights=weights))
    target = weights[0, :, None] * standardised(first).softmax(-1) + weights[1, :, None] * standardised(second).softmax(
        -1
    )
    q = standardised(student).log_softmax(-1)
    torch.testing.assert_close(found, (target * (target.log() - q)).sum(1).mean())


def test_a_class_that_a_teacher_does_not_know_has_no_part_in_its_deviation():
    student, teacher = randn(BATCH, WIDTH), randn(BATCH, WIDTH - 1, seed=1)
    blind = torch.cat([teacher, torch.full((BATCH, 1), UNKNOWN, dtype=torch.float64)], dim=1)
    p, q = standardised(teacher).softmax(-1), standardised(student).log_softmax(-1)[:, :-1]
    torch.testing.assert_close(loss(student, panel(blind)), (p * (p.log() - q)).sum(1).mean())


def test_refuses_teachers_of_other_classes():
    with pytest.raises(ShapeError, match="Use teachers of the same classes"):
        loss(randn(BATCH, WIDTH), panel(randn(BATCH, WIDTH + 1)))


def test_descent_leads_to_the_teacher_up_to_scale_and_offset():
    student, teacher = randn(BATCH, WIDTH), randn(BATCH, WIDTH, seed=1)
    before = loss(student, panel(teacher))
    for _ in range(60):
        student.requires_grad_()
        (gradient,) = torch.autograd.grad(loss(student, panel(teacher)), student)
        student = (student - 5.0 * gradient).detach()
    assert loss(student, panel(teacher)) < 0.02 * before
    assert (standardised(student) * standardised(teacher)).mean() > 0.98


@pytest.mark.parametrize("wrong", [{"weight": -1}, {"temperature": 2.0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        MixStd.model_validate(wrong)
