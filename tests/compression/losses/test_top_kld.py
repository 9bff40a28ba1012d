"""Top-K divergence: between kd, the bucket and the reverse divergence of the rest."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from compression.distill import Kd, TopKld
from compression.types import Outputs, TeacherOutputs


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one(logits: torch.Tensor) -> TeacherOutputs:
    return TeacherOutputs(logits.unsqueeze(0), torch.ones(1, len(logits), dtype=logits.dtype))


def loss(student: torch.Tensor, teacher: torch.Tensor, **fields: float | None) -> torch.Tensor:
    return TopKld(**fields).build()(Outputs(student), one(teacher), torch.zeros(len(student), dtype=torch.int64))


sizes = given(seed=st.integers(0, 2**16), batch=st.integers(1, 6), classes=st.integers(2, 9), data=st.data())


@sizes
@settings(max_examples=30, deadline=None)
def test_zero_at_the_teacher_up_to_a_shift(seed, batch, classes, data):
    top_k = data.draw(st.none() | st.integers(0, classes + 1))
    teacher = 2 * randn(batch, classes, seed=seed)
    student = (teacher + randn(batch, 1, seed=seed + 1)).requires_grad_()
    value = loss(student, teacher, top_k=top_k, temperature=2.0)
    value.backward()
    assert abs(value.item()) < 1e-10
    assert float(student.grad.abs().max()) < 1e-10


@pytest.mark.parametrize("top_k", [6, 7, 500])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_all_classes_are_kd(top_k, temperature):
    student, teacher = 2 * randn(5, 6, seed=1), 2 * randn(5, 6, seed=2)
    kd = Kd(temperature=temperature).build()(Outputs(student), one(teacher), torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(loss(student, teacher, top_k=top_k, beta=9.0, temperature=temperature), kd)


def test_all_but_one_class_are_kd_too():
    """The bucket holds one class, and alone it has no shape."""
    student, teacher = 2 * randn(5, 6, seed=1), 2 * randn(5, 6, seed=2)
    torch.testing.assert_close(loss(student, teacher, top_k=5, beta=9.0), loss(student, teacher, top_k=6))


def test_no_class_leaves_the_reverse_divergence():
    student, teacher = 2 * randn(5, 6, seed=3), 2 * randn(5, 6, seed=4)
    reverse = F.kl_div(teacher.log_softmax(1), student.softmax(1), reduction="batchmean")
    torch.testing.assert_close(loss(student, teacher, top_k=0, beta=0.7), 0.7 * reverse)


@sizes
@settings(max_examples=30, deadline=None)
def test_the_bucket_never_exceeds_the_full_divergence_and_grows_with_every_class_taken_out(seed, batch, classes, data):
    del data
    student, teacher = 2 * randn(batch, classes, seed=seed), 2 * randn(batch, classes, seed=seed + 1)
    values = [float(loss(student, teacher, top_k=k, beta=0.0)) for k in range(classes + 1)]
    full = float(F.kl_div(student.log_softmax(1), teacher.softmax(1), reduction="batchmean"))
    assert abs(values[0]) < 1e-12
    assert all(fewer <= more + 1e-12 for fewer, more in pairwise(values))
    assert values[-1] == pytest.approx(full, rel=1e-10, abs=1e-12)


def test_known_value():
    teacher = torch.tensor([[0.1, 0.5, 0.1, 0.3]], dtype=torch.float64).log()
    student = torch.tensor([[0.2, 0.4, 0.1, 0.3]], dtype=torch.float64).log()
    explicit = 0.5 * math.log(0.5 / 0.4) + 0.2 * math.log(0.2 / 0.3)
    implicit = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    assert float(loss(student, teacher, top_k=2, beta=0.0)) == pytest.approx(explicit, rel=1e-12)
    assert float(loss(student, teacher, top_k=2, beta=3.0)) == pytest.approx(explicit + 3 * implicit, rel=1e-12)


def test_explicit_term_does_not_see_how_the_rest_is_shared():
    student, teacher = 2 * randn(5, 6, seed=6), 2 * randn(5, 6, seed=5)
    order = teacher.argsort(1, descending=True)
    swapped, top = student.clone(), student.clone()
    swapped.scatter_(1, order[:, 3:], student.gather(1, order[:, 3:]).roll(1, 1))
    top.scatter_(1, order[:, :3], student.gather(1, order[:, :3]).roll(1, 1))
    here = loss(student, teacher, top_k=3, beta=0.0)
    torch.testing.assert_close(loss(swapped, teacher, top_k=3, beta=0.0), here)
    assert float((loss(top, teacher, top_k=3, beta=0.0) - here).abs()) > 0.01
    assert float((loss(swapped, teacher, top_k=3) - loss(student, teacher, top_k=3)).abs()) > 0.01


@pytest.mark.parametrize(("classes", "top_k"), [(2, 1), (9, 1), (10, 1), (39, 3), (1500, 100)])
def test_a_tenth_of_the_classes_is_taken_by_default(classes, top_k):
    student, teacher = 2 * randn(3, classes, seed=7), 2 * randn(3, classes, seed=8)
    torch.testing.assert_close(loss(student, teacher), loss(student, teacher, top_k=top_k), rtol=0, atol=0)
    if classes > 2:
        assert float((loss(student, teacher) - loss(student, teacher, top_k=top_k + 1)).abs()) > 1e-6


def test_square_of_the_temperature_is_inside():
    student, teacher = randn(6, 5, seed=9), randn(6, 5, seed=10)
    torch.testing.assert_close(
        loss(4 * student, 4 * teacher, top_k=2, temperature=4.0), 16 * loss(student, teacher, top_k=2)
    )


def test_several_teachers_choose_the_top_by_their_mixture():
    """The mean of the logits would choose class 2."""
    teachers = torch.tensor([[[9.0, 0.0, 1.0, 0.0]], [[-9.0, 0.0, 1.0, 0.0]]], dtype=torch.float64)
    panel = TeacherOutputs(teachers, torch.full((2, 1), 0.5, dtype=torch.float64))
    student = randn(1, 4, seed=11)
    value = TopKld(top_k=1).build()(Outputs(student), panel, torch.tensor([0]))
    torch.testing.assert_close(value, loss(student, panel.probs().log(), top_k=1))
    assert int(panel.probs().argmax()) == 0
