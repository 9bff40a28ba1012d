"""Balanced divergences: both directions, and which one counts more for whom."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from compression.distill import BdKd
from compression.types import Outputs, TeacherOutputs


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def one(logits: torch.Tensor) -> TeacherOutputs:
    return TeacherOutputs(logits.unsqueeze(0), torch.ones(1, len(logits), dtype=logits.dtype))


def loss(student: torch.Tensor, teacher: torch.Tensor, **fields: float) -> torch.Tensor:
    return BdKd(**fields).build()(Outputs(student), one(teacher), torch.zeros(len(student), dtype=torch.int64))


def kl(p_logits: torch.Tensor, q_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """temperature^2 * KL(p || q) of each row."""
    each = F.kl_div((q_logits / temperature).log_softmax(1), (p_logits / temperature).softmax(1), reduction="none")
    return temperature**2 * each.sum(1)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Categorical(logits=logits).entropy()


sizes = given(
    seed=st.integers(0, 2**16), batch=st.integers(1, 6), classes=st.integers(2, 9), temperature=st.floats(0.5, 8.0)
)


@sizes
@settings(max_examples=30, deadline=None)
def test_zero_at_the_teacher_up_to_a_shift(seed, batch, classes, temperature):
    teacher = 2 * randn(batch, classes, seed=seed)
    student = (teacher + randn(batch, 1, seed=seed + 1)).requires_grad_()
    value = loss(student, teacher, temperature=temperature, delta=3.0)
    value.backward()
    assert abs(value.item()) < 1e-10
    assert float(student.grad.abs().max()) < 1e-10


@sizes
@settings(max_examples=30, deadline=None)
def test_delta_one_is_forward_plus_reverse(seed, batch, classes, temperature):
    student, teacher = 2 * randn(batch, classes, seed=seed), 2 * randn(batch, classes, seed=seed + 1)
    both = (kl(teacher, student, temperature) + kl(student, teacher, temperature)).mean()
    torch.testing.assert_close(loss(student, teacher, temperature=temperature, delta=1.0), both)
    torch.testing.assert_close(loss(teacher, student, temperature=temperature, delta=1.0), both)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_delta_multiplies_forward_for_the_too_sure_and_reverse_for_the_others(temperature):
    teacher = 2 * randn(6, 5, seed=2)
    bent = randn(6, 5, seed=3)
    sharp, flat = 4 * teacher + bent, 0.2 * teacher + 0.2 * bent
    assert torch.all(entropy(sharp) < entropy(teacher))
    assert torch.all(entropy(flat) > entropy(teacher))
    for student, emphasised in ((sharp, kl(teacher, sharp, temperature)), (flat, kl(flat, teacher, temperature))):
        extra = loss(student, teacher, temperature=temperature, delta=3.0) - loss(
            student, teacher, temperature=temperature, delta=1.0
        )
        torch.testing.assert_close(extra, 2 * emphasised.mean())
    mixed = torch.cat([sharp[:3], flat[3:]])
    extra = loss(mixed, teacher, temperature=temperature, delta=3.0) - loss(
        mixed, teacher, temperature=temperature, delta=1.0
    )
    each = torch.cat([kl(teacher, mixed, temperature)[:3], kl(mixed, teacher, temperature)[3:]])
    torch.testing.assert_close(extra, 2 * each.mean())


def test_certainty_is_compared_without_softening():
    """A pair whose entropies change places when both are softened by 4."""
    teacher = torch.tensor([[2.5, 2.5, -9.0, -9.0, -9.0, -9.0]], dtype=torch.float64)
    student = torch.tensor([[4.5, 0.0, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert entropy(student) < entropy(teacher)
    assert entropy(student / 4) > entropy(teacher / 4)
    extra = loss(student, teacher, delta=2.0) - loss(student, teacher, delta=1.0)
    torch.testing.assert_close(extra, kl(teacher, student, 4.0).mean())


@sizes
@settings(max_examples=30, deadline=None)
def test_gradient_is_that_of_constant_factors(seed, batch, classes, temperature):
    """a (q - p) + b q (log q/p - KL(q||p)) at temperature T, times T / B: no share comes through the entropies."""
    student, teacher = 2 * randn(batch, classes, seed=seed), 2 * randn(batch, classes, seed=seed + 1)
    too_sure = (entropy(student) < entropy(teacher)).unsqueeze(1)
    a, b = torch.where(too_sure, 5.0, 1.0).double(), torch.where(too_sure, 1.0, 5.0).double()
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    ratio = (q / p).log()
    expected = temperature / batch * (a * (q - p) + b * q * (ratio - (q * ratio).sum(1, keepdim=True)))
    student.requires_grad_()
    loss(student, teacher, temperature=temperature, delta=5.0).backward()
    torch.testing.assert_close(student.grad, expected)


def test_several_teachers_are_as_sure_as_their_mixture():
    """Two sure teachers who disagree are an unsure panel: a student less sure than each is too sure."""
    teachers = torch.tensor([[[6.0, 0.0, 0.0]], [[0.0, 6.0, 0.0]]], dtype=torch.float64)
    panel = TeacherOutputs(teachers, torch.full((2, 1), 0.5, dtype=torch.float64))
    student = torch.tensor([[3.5, 0.0, 0.0]], dtype=torch.float64)
    mixed = panel.probs().log()
    assert entropy(teachers[0]) < entropy(student) < entropy(mixed)
    found = [
        BdKd(temperature=1.0, delta=delta).build()(Outputs(student), panel, torch.tensor([0])) for delta in (1.0, 2.0)
    ]
    torch.testing.assert_close(found[1] - found[0], kl(mixed, student, 1.0).mean())
