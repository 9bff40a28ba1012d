"""What every combination of teachers must keep to; a new one adds one row to CASES."""

import importlib
import pkgutil
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import compression.distill.teachers as package
from compression.card import MethodCard
from compression.distill import (
    AnyCombination,
    Confidence,
    Helper,
    Kd,
    Partition,
    Router,
    Shapes,
    Specialists,
    Uniform,
    ValidationWeighted,
)
from compression.types import Frozen, Outputs, TeacherOutputs

CASES = [
    Uniform(),
    Confidence(),
    Confidence(labels=False),
    ValidationWeighted(),
    Partition(),
    Partition(labels=False),
    Router(),
    Router(top_k=2),
    Specialists(),
    Specialists(labels=False),
]

Weigh = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Teacher logits [K,B,C] and labels [B] -> weights [K,B], for one student."""


def built(config: AnyCombination) -> Weigh:
    """The combination, ready for whatever number of teachers it is first asked about."""
    made = config.build()

    def weigh(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if isinstance(made, Helper):
            made.prepare(Shapes(logits.shape[2], 4, num_teachers=len(logits)))
        student = torch.linspace(-1, 1, logits.shape[2], dtype=logits.dtype).expand(logits.shape[1:])
        return made(logits, labels, student)

    return weigh


@pytest.fixture(params=CASES, ids=str)
def combine(request) -> Weigh:
    return built(request.param)


def draw(teachers: int, batch: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (batch,), generator=generator)
    return torch.randn(teachers, batch, classes, generator=generator) * 3, labels


def test_every_file_of_the_folder_is_in_the_union():
    members = set(get_args(AnyCombination))
    for module in pkgutil.iter_modules(package.__path__):
        name = f"{package.__name__}.{module.name}"
        here = {
            item
            for item in vars(importlib.import_module(name)).values()
            if isinstance(item, type) and issubclass(item, Frozen) and item.__module__ == name
        }
        assert here, f"teachers/{module.name}.py has no config"
        assert here <= members, f"teachers/{module.name}.py is not in AnyCombination"


def test_every_member_has_a_case_a_card_and_a_round_trip():
    assert {type(case) for case in CASES} == set(get_args(AnyCombination))
    for member in get_args(AnyCombination):
        assert isinstance(member.card, MethodCard)
        assert all(member.card.model_dump().values())
        assert member.model_validate_json(member().model_dump_json()) == member()
        assert member().kind == member.model_fields["kind"].default
        assert isinstance(member.adds_snapshot, bool)


@given(
    case=st.sampled_from(CASES),
    seed=st.integers(0, 2**16),
    teachers=st.integers(1, 5),
    batch=st.integers(1, 8),
    classes=st.integers(2, 12),
)
@settings(max_examples=80, deadline=None)
def test_weights_are_a_distribution_over_teachers(case, seed, teachers, batch, classes):
    logits, labels = draw(teachers, batch, classes, seed)
    weights = built(case)(logits, labels)
    assert weights.shape == (teachers, batch)
    assert weights.dtype == torch.float32
    assert (weights >= 0).all()
    torch.testing.assert_close(weights.sum(0), torch.ones(batch))


def test_one_teacher_has_all_the_weight(combine):
    assert torch.equal(combine(*draw(1, 5, 4)), torch.ones(1, 5))


def test_equal_teachers_share_equally(combine):
    logits, labels = draw(1, 5, 4)
    torch.testing.assert_close(combine(logits.expand(3, -1, -1), labels), torch.full((3, 5), 1 / 3))


def test_order_of_teachers_and_samples_carries_over(combine):
    logits, labels = draw(3, 6, 4)
    weights = combine(logits, labels)
    torch.testing.assert_close(combine(logits.flip(0), labels), weights.flip(0))
    torch.testing.assert_close(combine(logits.flip(1), labels.flip(0)), weights.flip(1))


def test_a_shift_of_a_teachers_row_changes_nothing(combine):
    logits, labels = draw(3, 6, 4)
    torch.testing.assert_close(
        combine(logits + torch.tensor([8.0, -4.0, 0.5])[:, None, None], labels), combine(logits, labels)
    )


def test_extreme_and_half_precision_logits_still_give_a_distribution(combine):
    logits, labels = draw(3, 6, 4)
    for values in (logits * 1e4, logits.half()):
        weights = combine(values, labels).float()
        torch.testing.assert_close(weights.sum(0), torch.ones(6), rtol=1e-3, atol=1e-3)


def test_no_gradient_reaches_the_teachers(combine):
    logits, labels = draw(3, 6, 4)
    assert not combine(logits.requires_grad_(), labels).requires_grad


def test_confidence_by_label_takes_the_one_surest_of_the_truth():
    logits, labels = draw(4, 50, 6)
    weights = built(Confidence())(logits, labels)
    assert set(weights.unique().tolist()) == {0.0, 1.0}
    truth = logits.softmax(-1)[:, torch.arange(50), labels]
    assert torch.equal(weights.argmax(0), truth.argmax(0))


def test_confidence_without_labels_ignores_them():
    logits, labels = draw(4, 50, 6)
    combine = built(Confidence(labels=False))
    weights = combine(logits, labels)
    assert torch.equal(weights, combine(logits, (labels + 1) % 6))
    assert torch.equal(weights.argmax(0), logits.softmax(-1).amax(-1).argmax(0))


def test_confidence_with_a_dominating_teacher_is_distillation_from_it():
    logits, labels = draw(3, 20, 5)
    logits[1, torch.arange(20), labels] += 100
    student = torch.randn(20, 5, generator=torch.Generator().manual_seed(9))
    weights = built(Confidence())(logits, labels)
    kd = Kd().build()
    torch.testing.assert_close(
        kd(Outputs(student), TeacherOutputs(logits, weights), labels),
        kd(Outputs(student), TeacherOutputs(logits[1:2], torch.ones(1, 20)), labels),
    )


def test_samples_without_a_label_still_have_teachers(combine):
    logits, labels = draw(3, 6, 4)
    weights = combine(logits, torch.where(torch.arange(6) < 3, -1, labels))
    torch.testing.assert_close(weights.sum(0), torch.ones(6))
    torch.testing.assert_close(weights[:, 3:], combine(logits, labels)[:, 3:])
