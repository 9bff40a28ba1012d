"""Parity counts changed predictions, and knows the noise floor of rounding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.errors import ShapeError
from export.parity import ENGINE_NOT_RUN, Rung, compare, self_perturbation_floor


def logits(seed: int, samples: int = 40, classes: int = 5) -> torch.Tensor:
    return torch.randn(samples, classes, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_model_is_at_parity_with_itself(seed):
    values = logits(seed)
    labels = values.argmax(1)
    parity = compare(values, values, labels)
    assert (parity.flips, parity.kl, parity.max_abs, parity.mean_abs) == (0, 0, 0, 0)
    assert parity.top1 == parity.reference_top1 == 1


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), noise=st.floats(0.01, 3))
def test_bounds_and_order(seed, noise):
    reference = logits(seed)
    candidate = reference + noise * logits(seed + 1)
    parity = compare(reference, candidate, torch.zeros(40, dtype=torch.int64))
    assert 0 <= parity.flips <= 1
    assert parity.kl >= 0
    assert 0 < parity.mean_abs <= parity.max_abs
    assert abs(parity.top1 - parity.reference_top1) <= parity.flips + 1e-9


def test_known_values():
    reference = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [0.0, 2.0]])
    candidate = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 2.0], [0.0, 1.0]])
    parity = compare(reference, candidate, torch.tensor([0, 1, 0, 0]))
    assert parity.flips == 0.25
    assert (parity.reference_top1, parity.top1) == (0.75, 0.5)
    assert parity.max_abs == 2
    assert parity.mean_abs == pytest.approx(5 / 8)
    p, q = reference.softmax(1), candidate.softmax(1)
    assert parity.kl == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-5)
    assert parity.num_samples == 4


def test_a_shift_of_all_logits_changes_nothing_that_matters():
    parity = compare(logits(1), logits(1) + 7, torch.zeros(40, dtype=torch.int64))
    assert parity.flips == 0
    assert parity.kl == pytest.approx(0, abs=1e-9)
    assert parity.max_abs == pytest.approx(7, rel=1e-5)


@pytest.mark.parametrize(
    ("reference", "candidate", "labels"),
    [(logits(0), logits(0, samples=3), 40), (logits(0), logits(0), 3), (logits(0, 0), logits(0, 0), 0)],
)
def test_what_does_not_fit_is_refused(reference, candidate, labels):
    with pytest.raises(ShapeError):
        compare(reference, candidate, torch.zeros(labels, dtype=torch.int64))


def test_floor_is_zero_for_a_constant_and_a_step_for_a_rounded_model(exported):
    images = exported.images(64)
    assert self_perturbation_floor(lambda x: torch.ones(len(x), 3), images) == 0
    smooth = self_perturbation_floor(exported.model, images)
    rounded = self_perturbation_floor(exported.quantized, images)
    assert smooth < 1e-3
    assert rounded == self_perturbation_floor(exported.quantized, images)
    assert self_perturbation_floor(exported.quantized, images, noise=1e-2) > 1e-3


def test_an_engine_is_a_rung_that_was_not_run():
    rung = Rung(name="engine SM86", against=None, parity=None, status=ENGINE_NOT_RUN)
    assert Rung.model_validate_json(rung.model_dump_json()) == rung
