"""Correlation distillation: what it sees, what it is blind to, and rows that have no correlation."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from compression.distill import Dist, Kd
from compression.types import Outputs, TeacherOutputs


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one(logits: torch.Tensor) -> TeacherOutputs:
    return TeacherOutputs(logits.unsqueeze(0), torch.ones(1, len(logits), dtype=logits.dtype))


def loss(student: torch.Tensor, teacher: torch.Tensor, **fields: float) -> torch.Tensor:
    return Dist(**fields).build()(Outputs(student), one(teacher), torch.zeros(len(student), dtype=torch.int64))


sizes = given(seed=st.integers(0, 2**16), batch=st.integers(1, 7), classes=st.integers(2, 9))


@sizes
@settings(max_examples=30, deadline=None)
def test_zero_at_the_teacher_up_to_a_shift(seed, batch, classes):
    teacher = 2 * randn(batch, classes, seed=seed)
    student = (teacher + randn(batch, 1, seed=seed + 1)).requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert abs(value.item()) < 1e-10
    assert float(student.grad.abs().max()) < 1e-8


@sizes
@settings(max_examples=30, deadline=None)
def test_equals_the_correlations_of_numpy(seed, batch, classes):
    student, teacher = 2 * randn(batch + 3, classes + 3, seed=seed), 2 * randn(batch + 3, classes + 3, seed=seed + 1)
    p, q = (side.softmax(1).numpy() for side in (student, teacher))
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    assert float(loss(student, teacher, beta=2.0, gamma=3.0)) == pytest.approx(
        2 * inter + 3 * intra, rel=1e-6, abs=1e-9
    )


@given(seed=st.integers(0, 2**16), share=st.floats(0.05, 1.0))
@settings(max_examples=30, deadline=None)
def test_inter_is_blind_to_positive_affine_maps_of_a_samples_probabilities(seed, share):
    """The teacher's probabilities, thinned with a uniform part: far from the teacher for kd, the same here."""
    teacher = 2 * randn(6, 5, seed=seed)
    thinned = (share * teacher.softmax(1) + (1 - share) / 5).log()
    assert abs(float(loss(thinned, teacher, gamma=0.0))) < 1e-10
    reference = 2 * randn(6, 5, seed=seed + 1)
    torch.testing.assert_close(loss(reference, thinned, gamma=0.0), loss(reference, teacher, gamma=0.0))
    torch.testing.assert_close(loss(thinned, reference, gamma=0.0), loss(teacher, reference, gamma=0.0))


@given(seed=st.integers(0, 2**16), share=st.floats(0.3, 0.9))
@settings(max_examples=30, deadline=None)
def test_intra_is_blind_to_positive_affine_maps_of_a_classes_probabilities(seed, share):
    """The same share of another distribution mixed into every sample moves whole columns, not their course."""
    teacher, other = randn(6, 5, seed=seed), randn(1, 5, seed=seed + 1)
    moved = (share * teacher.softmax(1) + (1 - share) * other.softmax(1)).log()
    assert abs(float(loss(moved, teacher, beta=0.0))) < 1e-10
    assert float(loss(moved, teacher, gamma=0.0)) > 1e-6


def test_blind_to_confidence_where_kd_is_not():
    teacher = 6 * randn(6, 5, seed=3)
    timid = (0.05 * teacher.softmax(1) + 0.95 / 5).log()
    assert float(timid.softmax(1).max()) < 0.25
    assert abs(float(loss(timid, teacher))) < 1e-10
    labels = torch.zeros(6, dtype=torch.int64)
    assert float(Kd(temperature=1.0).build()(Outputs(timid), one(teacher), labels)) > 0.5


def test_opposite_opinions_cost_two_and_unrelated_ones_cost_one():
    teacher = torch.tensor([[0.0, 1.0], [3.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(loss(teacher.flip(1), teacher, gamma=0.0), torch.tensor(2.0, dtype=torch.float64))
    left = torch.tensor([[0.4, 0.4, 0.1, 0.1]], dtype=torch.float64).log()
    right = torch.tensor([[0.4, 0.1, 0.4, 0.1]], dtype=torch.float64).log()
    torch.testing.assert_close(loss(left, right), torch.tensor(1.0, dtype=torch.float64))


def test_gradient_matches_finite_differences():
    teacher = 2 * randn(4, 5, seed=5)
    student = (2 * randn(4, 5, seed=6)).requires_grad_()
    assert torch.autograd.gradcheck(lambda given: loss(given, teacher, gamma=2.0), (student,))


def test_square_of_the_temperature_is_inside():
    student, teacher = randn(6, 5, seed=7), randn(6, 5, seed=8)
    torch.testing.assert_close(loss(4 * student, 4 * teacher, temperature=4.0), 16 * loss(student, teacher))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_single_sample_has_inter_alone(dtype):
    student, teacher = randn(1, 5, seed=9).to(dtype).requires_grad_(), randn(1, 5, seed=10).to(dtype)
    value = loss(student, teacher)
    value.backward()
    torch.testing.assert_close(value, loss(student, teacher, gamma=0.0))
    assert torch.isfinite(student.grad).all()
    assert loss(student, teacher, beta=0.0).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_constant_teacher_rows_count_nothing(dtype, classes):
    student = (3 * randn(16, classes, seed=11)).to(dtype).requires_grad_()
    value = loss(student, torch.full((16, classes), 0.3, dtype=dtype))
    value.backward()
    assert value.item() == 0
    assert float(student.grad.abs().max()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_constant_student_costs_one_each_and_has_a_bounded_gradient_downhill(dtype):
    """A fresh head of zeros: it must neither explode nor stand still."""
    teacher = (2 * randn(16, 10, seed=12)).to(dtype)
    student = torch.zeros(16, 10, dtype=dtype, requires_grad=True)
    value = loss(student, teacher)
    value.backward()
    torch.testing.assert_close(value, torch.tensor(2.0, dtype=dtype), rtol=1e-3, atol=1e-3)
    assert 0 < float(student.grad.abs().max()) < 1e3
    step = 1e-2 / student.grad.abs().max()
    assert float(loss(student.detach() - step * student.grad, teacher)) < 1.9


def test_a_class_that_is_hardly_ever_probable_is_still_followed():
    """Its probabilities are 1e-30, and their squares round to 0 in single precision."""
    teacher, student = randn(8, 5, seed=13).float(), randn(8, 5, seed=14).float()
    teacher[:, 0] -= 69.0
    student[:, 0] -= 69.0
    wide, narrow = loss(student.double(), teacher.double()), loss(student.requires_grad_(), teacher)
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-4, atol=1e-5)
    narrow.backward()
    assert torch.isfinite(student.grad).all()
    assert float(student.grad[:, 0].abs().max()) > 1e-4


def test_refuses_both_factors_zero():
    with pytest.raises(ValidationError, match="Raise one of them"):
        Dist(beta=0.0, gamma=0.0)
