"""What every loss must keep to; a new loss adds one row to CASES."""

import importlib
import pkgutil
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import compression.distill.losses as package
from compression.card import MethodCard
from compression.distill import AnyLoss, CrossEntropy, Kd
from compression.distill.types import LossFn
from compression.errors import ShapeError
from compression.types import Frozen, Outputs, TeacherOutputs

CASES = [CrossEntropy(), CrossEntropy(label_smoothing=0.1), Kd(), Kd(temperature=1.0), Kd(temperature=8.0)]

BATCH, CLASSES, TEACHERS = 6, 5, 2


@pytest.fixture(params=CASES, ids=str)
def loss(request) -> LossFn:
    return request.param.build()


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def panel(logits: torch.Tensor) -> TeacherOutputs:
    weights = torch.full(logits.shape[:2], 1.0 / len(logits), dtype=logits.dtype)
    return TeacherOutputs(logits=logits, weights=weights)


def inputs(seed: int = 0) -> tuple[torch.Tensor, TeacherOutputs, torch.Tensor]:
    labels = torch.randint(0, CLASSES, (BATCH,), generator=torch.Generator().manual_seed(seed))
    return randn(BATCH, CLASSES, seed=seed), panel(randn(TEACHERS, BATCH, CLASSES, seed=seed + 1)), labels


def test_every_file_of_the_folder_is_in_the_union():
    members = set(get_args(AnyLoss))
    for module in pkgutil.iter_modules(package.__path__):
        name = f"{package.__name__}.{module.name}"
        here = {
            item
            for item in vars(importlib.import_module(name)).values()
            if isinstance(item, type) and issubclass(item, Frozen) and item.__module__ == name
        }
        assert here, f"losses/{module.name}.py has no config"
        assert here <= members, f"losses/{module.name}.py is not in AnyLoss"


def test_every_member_has_a_case_a_card_and_a_round_trip():
    assert {type(case) for case in CASES} == set(get_args(AnyLoss))
    for member in get_args(AnyLoss):
        assert isinstance(member.card, MethodCard)
        assert all(member.card.model_dump().values())
        default = member()
        assert default.kind == member.model_fields["kind"].default
        assert member.model_validate_json(default.model_dump_json()) == default
        assert default.weight > 0
        assert all(field.description for name, field in member.model_fields.items() if name != "kind")


def test_gives_a_finite_non_negative_float32_scalar(loss):
    student, teachers, labels = inputs()
    value = loss(Outputs(student), teachers, labels)
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert value >= 0


def test_gradient_goes_to_the_student_alone(loss):
    student, teachers, labels = inputs()
    student.requires_grad_()
    teachers.logits.requires_grad_()
    teachers.weights.requires_grad_()
    loss(Outputs(student), teachers, labels).backward()
    assert student.grad is not None
    assert student.grad.abs().sum() > 0
    assert teachers.logits.grad is None
    assert teachers.weights.grad is None


def test_order_of_the_batch_changes_nothing(loss):
    student, teachers, labels = inputs()
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(3))
    mixed = TeacherOutputs(teachers.logits[:, order], teachers.weights[:, order])
    torch.testing.assert_close(
        loss(Outputs(student[order]), mixed, labels[order]), loss(Outputs(student), teachers, labels)
    )


def test_order_of_the_teachers_changes_nothing(loss):
    student, teachers, labels = inputs()
    swapped = TeacherOutputs(teachers.logits.flip(0), teachers.weights.flip(0))
    torch.testing.assert_close(loss(Outputs(student), swapped, labels), loss(Outputs(student), teachers, labels))


def test_is_a_mean_over_the_batch(loss):
    student, teachers, labels = inputs()
    singles = [
        loss(
            Outputs(student[i : i + 1]),
            TeacherOutputs(teachers.logits[:, i : i + 1], teachers.weights[:, i : i + 1]),
            labels[i : i + 1],
        )
        for i in range(BATCH)
    ]
    torch.testing.assert_close(torch.stack(singles).mean(), loss(Outputs(student), teachers, labels))


@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_finite_value_and_gradient_at_extreme_logits(loss, scale):
    student, teachers, labels = inputs()
    student = (student * scale).requires_grad_()
    value = loss(Outputs(student), TeacherOutputs(teachers.logits * scale, teachers.weights), labels)
    value.backward()
    assert torch.isfinite(value)
    assert student.grad is not None
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_widened(loss, dtype):
    student, teachers, labels = inputs()
    narrow = student.to(dtype)
    half = loss(Outputs(narrow), teachers, labels)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, loss(Outputs(narrow.float()), teachers, labels))


def test_works_under_autocast(loss):
    student, teachers, labels = inputs()
    expected = loss(Outputs(student), teachers, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss(Outputs(student), teachers, labels), expected)


def test_invariant_to_a_shift_of_any_row(loss):
    student, teachers, labels = inputs()
    shifted = TeacherOutputs(teachers.logits + randn(TEACHERS, BATCH, 1, seed=8), teachers.weights)
    torch.testing.assert_close(
        loss(Outputs(student + randn(BATCH, 1, seed=9)), shifted, labels),
        loss(Outputs(student), teachers, labels),
        rtol=1e-4,
        atol=1e-5,
    )


# ---------------------------------------------------------------- the formula of kd


@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 8),
    classes=st.integers(2, 12),
    temperature=st.floats(0.5, 10.0),
)
@settings(max_examples=40, deadline=None)
def test_kd_is_zero_at_the_teacher_up_to_a_shift(seed, batch, classes, temperature):
    teacher = randn(1, batch, classes, seed=seed).double()
    student = teacher[0] + randn(batch, 1, seed=seed + 1).double()
    value = Kd(temperature=temperature).build()(Outputs(student), panel(teacher), torch.zeros(batch, dtype=torch.int64))
    assert abs(float(value)) < 1e-10


@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 8),
    classes=st.integers(2, 12),
    temperature=st.floats(0.5, 10.0),
)
@settings(max_examples=40, deadline=None)
def test_kd_gradient_is_the_difference_of_softened_distributions(seed, batch, classes, temperature):
    """dL/ds = (T / B) (p_student - p_teacher), both softened by T."""
    student = randn(batch, classes, seed=seed).double().requires_grad_()
    teacher = randn(1, batch, classes, seed=seed + 1).double()
    Kd(temperature=temperature).build()(
        Outputs(student), panel(teacher), torch.zeros(batch, dtype=torch.int64)
    ).backward()
    expected = (student / temperature).softmax(-1) - (teacher[0] / temperature).softmax(-1)
    torch.testing.assert_close(student.grad, temperature / batch * expected.detach())


def test_kd_at_high_temperature_matches_centred_logits():
    """T -> infinity: 1/(2C) of the squared distance of row-centred logits, mean over the batch."""
    student, teacher = randn(16, 10).double() * 3, randn(1, 16, 10, seed=1).double() * 3
    value = Kd(temperature=100.0).build()(Outputs(student), panel(teacher), torch.zeros(16, dtype=torch.int64))
    gap = (student - student.mean(1, keepdim=True)) - (teacher[0] - teacher[0].mean(1, keepdim=True))
    limit = gap.square().sum(1).mean() / 20
    torch.testing.assert_close(value, limit, rtol=2e-2, atol=0)
    from compression.distill.losses.kd import kd

    far = kd(Outputs(student), panel(teacher), torch.zeros(16, dtype=torch.int64), temperature=1e4)
    torch.testing.assert_close(far, limit, rtol=2e-4, atol=0)


def test_kd_teaches_the_weighted_mixture_of_softened_teachers():
    student, labels = randn(BATCH, CLASSES), torch.zeros(BATCH, dtype=torch.int64)
    logits = randn(TEACHERS, BATCH, CLASSES, seed=4)
    weights = torch.rand(TEACHERS, BATCH, generator=torch.Generator().manual_seed(5))
    weights /= weights.sum(0)
    target = sum(weights[k, :, None] * (logits[k] / 2).softmax(-1) for k in range(TEACHERS))
    log_student = (student / 2).log_softmax(-1)
    expected = 4 * (target * (target.log() - log_student)).sum(1).mean()
    value = Kd(temperature=2.0).build()(Outputs(student), TeacherOutputs(logits, weights), labels)
    torch.testing.assert_close(value, expected)


def test_kd_of_a_teacher_without_weight_is_kd_of_the_others():
    student, teachers, labels = inputs()
    weights = torch.stack([torch.ones(BATCH), torch.zeros(BATCH)])
    alone = panel(teachers.logits[:1])
    value = Kd().build()(Outputs(student), TeacherOutputs(teachers.logits, weights), labels)
    torch.testing.assert_close(value, Kd().build()(Outputs(student), alone, labels))


def test_kd_differs_from_soft_cross_entropy_by_the_teachers_entropy():
    student, teachers, labels = inputs()
    probs = teachers.probs(1.0)
    soft = -(probs * student.log_softmax(-1)).sum(1).mean()
    entropy = -(probs * probs.log()).sum(1).mean()
    torch.testing.assert_close(Kd(temperature=1.0).build()(Outputs(student), teachers, labels), soft - entropy)


@pytest.mark.parametrize("shape", [(1, BATCH, CLASSES + 1), (1, 1, CLASSES), (BATCH, CLASSES)])
def test_kd_refuses_shapes_that_would_broadcast(shape):
    student, _, labels = inputs()
    teachers = TeacherOutputs(torch.zeros(shape), torch.ones(shape[:-1]))
    with pytest.raises(ShapeError, match="Use teachers of the same classes"):
        Kd().build()(Outputs(student), teachers, labels)


def test_cross_entropy_does_not_look_at_the_teachers():
    student, _, labels = inputs()
    empty = TeacherOutputs(torch.empty(0, BATCH, CLASSES), torch.empty(0, BATCH))
    torch.testing.assert_close(
        CrossEntropy().build()(Outputs(student), empty, labels),
        -student.log_softmax(-1)[torch.arange(BATCH), labels].mean(),
    )
