"""Transport of batches of outputs: marginals, limits, and what it cannot teach."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from compression.distill import CrossEntropy, Dhkd, DistillConfig, Kd, Sinkd
from compression.distill.losses.sinkd import sinkhorn_plan, transport_cost
from compression.errors import ShapeError
from compression.types import Outputs, TeacherOutputs

NO_LABELS = torch.empty(0, dtype=torch.int64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def probs(batch: int, classes: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return (randn(batch, classes, seed=seed) * scale).softmax(-1)


def alone(logits: Tensor) -> TeacherOutputs:
    """A panel of one."""
    return TeacherOutputs(logits.unsqueeze(0), torch.ones(1, len(logits), dtype=logits.dtype))


def value(config: Sinkd, student: Tensor, teachers: TeacherOutputs) -> Tensor:
    return config.build()(Outputs(student), teachers, NO_LABELS)


@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 9),
    epsilon=st.floats(0.01, 1.0),
    rounds=st.integers(1, 30),
)
@settings(max_examples=40, deadline=None)
def test_columns_of_the_plan_sum_to_one_after_any_round(seed, batch, epsilon, rounds):
    cost = torch.cdist(probs(batch, 5, seed), probs(batch, 5, seed + 1), p=1.0)
    plan = sinkhorn_plan(cost, epsilon=epsilon, rounds=rounds)
    torch.testing.assert_close(plan.sum(0), torch.ones(batch).double(), rtol=1e-12, atol=0)
    assert (plan >= 0).all()


def test_rows_of_the_plan_sum_to_one_once_it_has_converged():
    cost = torch.cdist(probs(12, 5), probs(12, 5, seed=1), p=1.0)
    ones = torch.ones(12).double()
    assert (sinkhorn_plan(cost, epsilon=0.1, rounds=1).sum(1) - ones).abs().max() > 1e-2
    torch.testing.assert_close(sinkhorn_plan(cost, epsilon=0.1, rounds=2000).sum(1), ones, rtol=1e-6, atol=0)


def test_is_the_plain_scaling_of_the_kernel():
    """The published form: exp(-W/epsilon), rows, columns; here in float64, where it does not underflow."""
    student, teacher = randn(7, 5) * 3, randn(7, 5, seed=1) * 3
    left, right = (student / 2).softmax(-1), (teacher / 2).softmax(-1)
    cost = (left.unsqueeze(1) - right.unsqueeze(0)).abs().sum(-1)
    plan = torch.exp(-cost / 0.1)
    for _ in range(20):
        plan = plan / plan.sum(1, keepdim=True)
        plan = plan / plan.sum(0, keepdim=True)
    torch.testing.assert_close(value(Sinkd(), student, alone(teacher)), (plan * cost).sum() / 7)


def test_small_epsilon_gives_the_cheapest_assignment():
    left, right = probs(8, 6), probs(8, 6, seed=1)
    cost = torch.cdist(left, right, p=1.0)
    rows, columns = linear_sum_assignment(cost.numpy())
    found = transport_cost(left, right, epsilon=0.002, rounds=5000)
    torch.testing.assert_close(found, cost[rows, columns].mean(), rtol=1e-2, atol=0)
    assert found < 0.95 * cost.diagonal().mean()


@pytest.mark.parametrize("debiased", [False, True])
def test_rows_of_the_student_may_change_places(debiased):
    """Why it cannot teach alone."""
    config, order = Sinkd(debiased=debiased), torch.randperm(9, generator=torch.Generator().manual_seed(2))
    student, teacher = randn(9, 5), alone(randn(9, 5, seed=1))
    assert not torch.equal(order, torch.arange(9))
    torch.testing.assert_close(value(config, student[order], teacher), value(config, student, teacher))
    assert abs(float(value(Kd(), student[order], teacher) - value(Kd(), student, teacher))) > 1e-3


def test_cost_at_equality_vanishes_with_epsilon():
    logits = randn(10, 6) * 2
    costs = [float(value(Sinkd(epsilon=each, rounds=200), logits, alone(logits))) for each in (1, 0.1, 0.01, 0.001)]
    assert costs[0] > costs[1] > costs[2] >= costs[3] >= 0
    assert costs[1] > 1e-2, "the blur's own cost"
    assert costs[3] < 1e-6


def test_debiased_cost_and_its_gradient_are_zero_at_equality():
    logits = randn(10, 6) * 4
    student = logits.clone().requires_grad_()
    found = value(Sinkd(debiased=True, rounds=500), student, alone(logits))
    found.backward()
    assert abs(float(found.detach())) < 1e-12
    assert student.grad.abs().max() < 1e-6
    plain = logits.clone().requires_grad_()
    value(Sinkd(rounds=500), plain, alone(logits)).backward()
    assert plain.grad.abs().max() > 1e-4, "without it, equality is no minimum"


def test_debiased_is_the_cost_less_half_of_either_side_against_itself():
    student, teacher = randn(7, 5), randn(7, 5, seed=1)

    def cost(left: Tensor, right: Tensor) -> Tensor:
        return value(Sinkd(), left, alone(right))

    expected = cost(student, teacher) - 0.5 * cost(student, student) - 0.5 * cost(teacher, teacher)
    torch.testing.assert_close(value(Sinkd(debiased=True), student, alone(teacher)), expected)
    assert expected < cost(student, teacher)


@pytest.mark.parametrize("debiased", [False, True])
def test_gradient_is_that_of_differences(debiased):
    student, teacher = randn(4, 3).requires_grad_(), alone(randn(4, 3, seed=1))
    config = Sinkd(epsilon=0.5, debiased=debiased)
    assert torch.autograd.gradcheck(lambda logits: value(config, logits, teacher), student)


def test_does_not_grow_with_the_batch():
    """A mean: every sample twice costs the same; a sum would double."""
    student, teacher = randn(6, 5), randn(6, 5, seed=1)
    twice = value(Sinkd(), student.repeat(2, 1), alone(teacher.repeat(2, 1)))
    torch.testing.assert_close(twice, value(Sinkd(), student, alone(teacher)))


def test_half_precision_does_not_underflow():
    """All pairs at cost 2: exp(-2/0.1) is 0 in float16, and scaling would divide 0 by 0."""
    student, teacher = torch.zeros(4, 6, dtype=torch.float16), torch.zeros(4, 6, dtype=torch.float16)
    student[:, :3] = randn(4, 3).half() + 200
    teacher[:, 3:] = randn(4, 3, seed=1).half() + 200
    assert torch.tensor(-20.0).exp().half() == 0
    student.requires_grad_()
    found = value(Sinkd(), student, alone(teacher))
    found.backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(2.0))
    assert torch.isfinite(student.grad).all()


def test_target_rows_are_the_mixture_of_softened_teachers():
    student, logits = randn(6, 5), randn(2, 6, 5, seed=1)
    weights = torch.rand(2, 6, generator=torch.Generator().manual_seed(5)).double()
    weights /= weights.sum(0)
    mixed = (weights.unsqueeze(-1) * (logits / 3).softmax(-1)).sum(0)
    expected = transport_cost((student / 3).softmax(-1), mixed, epsilon=0.1, rounds=20)
    torch.testing.assert_close(value(Sinkd(temperature=3), student, TeacherOutputs(logits, weights)), expected)


@pytest.mark.parametrize("shape", [(1, 6, 6), (1, 1, 5), (6, 5)])
def test_refuses_shapes_that_would_broadcast(shape):
    with pytest.raises(ShapeError, match="Use teachers of the same classes"):
        value(Sinkd(), randn(6, 5), TeacherOutputs(torch.zeros(shape), torch.ones(shape[:-1])))


@pytest.mark.parametrize("others", [(), (CrossEntropy(weight=0),), (Dhkd(),)])
def test_is_refused_without_a_term_that_teaches(others):
    with pytest.raises(ValidationError, match="expected another term beside it") as refusal:
        DistillConfig.model_validate({"train": {"epochs": 1}, "losses": (Sinkd(), *others)})
    assert "'sinkd'" in str(refusal.value)
    assert "cannot teach which image is which" in str(refusal.value)


@pytest.mark.parametrize("other", [Kd(), CrossEntropy()])
def test_is_taken_beside_one(other):
    config = DistillConfig.model_validate({"train": {"epochs": 1}, "losses": (Sinkd(), other)})
    assert config.losses == (Sinkd(), other)


@pytest.mark.parametrize("wrong", [{"epsilon": 0}, {"rounds": 0}, {"temperature": 0}, {"weight": -1}, {"blur": 1}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        Sinkd.model_validate(wrong)
