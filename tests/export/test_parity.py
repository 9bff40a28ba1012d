"""Parity counts changed predictions, and knows the noise floor of rounding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compression.errors import ShapeError
from export.ladder import sentence
from export.parity import (
    ENGINE_NOT_RUN,
    LIMITS,
    Parity,
    Rung,
    RungLimits,
    broken_limits,
    compare,
    self_perturbation_floor,
)


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
    assert rung.outcome == "not run"


# --- limits -------------------------------------------------------------------------------------------


def parity(**changes: float) -> Parity:
    same = {"top1": 0.9, "reference_top1": 0.9, "flips": 0.0, "kl": 0.0, "max_abs": 0.0, "mean_abs": 0.0}
    return Parity.model_validate({**same, "num_samples": 1000, **changes})


def broken(found: Parity, limits: RungLimits = LIMITS["int8-symmetric"], floor: float = 0.0) -> tuple[str, ...]:
    return broken_limits(found, limits, largest_logit=10.0, floor=floor, attribution=None)


def test_each_limit_is_broken_by_its_own_measure():
    assert broken(parity()) == ()
    for found, word in (
        (parity(flips=0.02), "answers change"),
        (parity(top1=0.88), "accuracy changes by -2.00 points"),
        (parity(top1=0.92), "accuracy changes by +2.00 points"),
        (parity(max_abs=1.1), "a logit differs by 1.1, at most 1 may be"),
        (parity(max_abs=float("nan")), "a logit differs"),
    ):
        (words,) = broken(found)
        assert word in words


def test_a_difference_near_the_noise_floor_is_rounding():
    assert broken(parity(max_abs=2.9), floor=1.0) == ()
    assert broken(parity(max_abs=3.1), floor=1.0)


def test_one_image_proves_nothing_but_two_do():
    limits = LIMITS["float32"]
    assert broken(parity(num_samples=200, flips=1 / 200), limits) == ()
    assert broken(parity(num_samples=200, flips=2 / 200), limits)


def test_where_nothing_may_change_one_image_is_enough():
    assert broken(parity(flips=1 / 1000), LIMITS["inputs"])


def test_limits_tighten_with_what_a_hop_should_cost():
    for field in ("flips", "accuracy", "layer"):
        exact, half, eight = (getattr(LIMITS[hop], field) for hop in ("float32", "float16", "int8-symmetric"))
        assert exact < half <= eight


# --- the sentence -------------------------------------------------------------------------------------


def rung(name: str, against: str | None, exceeded: tuple[str, ...] = (), **changes: float) -> Rung:
    return Rung(name=f"s: {name}", against=against and f"s: {against}", parity=parity(**changes), exceeded=exceeded)


def test_the_sentence_names_the_broken_hop_that_loses_most():
    rungs = [
        rung("torch float32", None),
        rung("torch fake-quant", "torch float32", top1=0.7, flips=0.3),
        rung("ONNX INT8 symmetric", "torch fake-quant", ("x",), top1=0.89, flips=0.02),
        rung("ONNX INT8 u8", "torch fake-quant", ("x",), top1=0.869, flips=0.02),
    ]
    assert sentence(rungs) == "ONNX INT8 u8 loses 3.1 points to torch fake-quant. 1 more is over a limit."
    assert sentence(rungs[:2]).startswith("The one hop is within its limits; torch fake-quant loses 20.0 points")
    assert sentence([]) == "Nothing was compared."


def test_wrong_inputs_come_before_everything_else():
    inputs = rung("reference inputs", None, ("file 's.int8' has no preprocessing",))
    found = sentence([inputs, rung("ONNX INT8 u8", "torch fake-quant", ("x",), top1=0.1)])
    assert found == "The files don't get the inputs the model was trained with: file 's.int8' has no preprocessing."
