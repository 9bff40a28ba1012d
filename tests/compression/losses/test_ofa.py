"""Enhanced targets: the identity at epsilon 1, and which way larger ones push."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from compression.distill import Kd, Ofa
from compression.distill.losses.ofa import enhanced
from compression.errors import ShapeError
from compression.types import Outputs, TeacherOutputs

BATCH, CLASSES = 6, 5
LABELS = torch.tensor([0, 1, 2, 3, 4, 0])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def panel(count: int = 1, scale: float = 2.0) -> TeacherOutputs:
    weights = torch.rand(count, BATCH, generator=torch.Generator().manual_seed(5)).double()
    return TeacherOutputs(randn(count, BATCH, CLASSES, seed=1) * scale, weights / weights.sum(0))


def value(config: Ofa | Kd, student: Tensor, teachers: TeacherOutputs, labels: Tensor = LABELS) -> Tensor:
    return config.build()(Outputs(student), teachers, labels)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_at_epsilon_one_it_is_cross_entropy_with_soft_labels(temperature):
    student, teachers = randn(BATCH, CLASSES), panel(2)
    target = teachers.probs(temperature)
    found = value(Ofa(temperature=temperature), student, teachers)
    torch.testing.assert_close(found, F.cross_entropy(student / temperature, target))
    entropy = -(target * target.log()).sum(-1).mean()
    divergence = value(Kd(temperature=temperature), student, teachers) / temperature**2
    torch.testing.assert_close(found, divergence + entropy)


def test_at_epsilon_one_labels_do_not_matter():
    student, teachers = randn(BATCH, CLASSES), panel()
    other = LABELS.roll(1)
    torch.testing.assert_close(value(Ofa(), student, teachers, other), value(Ofa(), student, teachers))
    high = Ofa(epsilon=2)
    assert abs(float(value(high, student, teachers, other) - value(high, student, teachers))) > 1e-2


@given(
    seed=st.integers(0, 2**16),
    classes=st.integers(2, 12),
    epsilon=st.floats(1.05, 4.0),
    more=st.floats(0.05, 2.0),
)
@settings(max_examples=60, deadline=None)
def test_larger_epsilon_raises_the_true_class_and_lowers_every_other(seed, classes, epsilon, more):
    probs = randn(8, classes, seed=seed).softmax(-1)
    labels = torch.randint(0, classes, (8,), generator=torch.Generator().manual_seed(seed))
    true = F.one_hot(labels, classes).bool()
    levels = [probs, enhanced(probs, labels, epsilon=epsilon), enhanced(probs, labels, epsilon=epsilon + more)]
    for lower, higher in pairwise(levels):
        assert (higher[true] > lower[true]).all()
        assert (higher[~true] < lower[~true]).all()
        assert (higher >= 0).all()


def test_target_is_the_power_of_the_mixture_less_the_label():
    """Sample by sample and class by class; teachers are mixed before the power is taken."""
    student, teachers, epsilon = randn(BATCH, CLASSES), panel(3), 1.5
    log_student = (student / 2).log_softmax(-1)
    total = 0.0
    for i in range(BATCH):
        for c in range(CLASSES):
            p = sum(teachers.weights[k, i] * (teachers.logits[k, i] / 2).softmax(-1)[c] for k in range(3))
            hot = float(LABELS[i] == c)
            total -= float(((p + hot) ** epsilon - hot) * log_student[i, c])
    found = value(Ofa(temperature=2, epsilon=epsilon), student, teachers)
    assert float(found) == pytest.approx(total / BATCH, rel=1e-12)


def test_gradient_has_no_square_of_the_temperature():
    """dL/ds = (q_sum p_student - q) / (T B), with q_sum the sum of a row of the target."""
    student, teachers = randn(BATCH, CLASSES).requires_grad_(), panel()
    value(Ofa(temperature=4, epsilon=1.5), student, teachers).backward()
    target = enhanced(teachers.probs(4.0), LABELS, epsilon=1.5)
    expected = target.sum(-1, keepdim=True) * (student / 4).softmax(-1).detach() - target
    torch.testing.assert_close(student.grad, expected / (4 * BATCH))


def test_probabilities_that_underflow_do_no_harm():
    student, teachers = (randn(BATCH, CLASSES) * 1e4).float().requires_grad_(), panel(scale=1e4)
    teachers = TeacherOutputs(teachers.logits.float(), teachers.weights.float())
    assert (teachers.probs() == 0).any()
    found = value(Ofa(epsilon=1.5), student, teachers)
    found.backward()
    assert torch.isfinite(found)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("shape", [(1, BATCH, CLASSES + 1), (1, 1, CLASSES), (BATCH, CLASSES)])
def test_refuses_shapes_that_would_broadcast(shape):
    with pytest.raises(ShapeError, match="Use teachers of the same classes"):
        value(Ofa(), randn(BATCH, CLASSES), TeacherOutputs(torch.zeros(shape), torch.ones(shape[:-1])))


@pytest.mark.parametrize("wrong", [{"epsilon": 0.9}, {"epsilon": 11}, {"temperature": 0}, {"weight": -1}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        Ofa.model_validate(wrong)
