"""The second head: its formula, what it leaves alone, when it stops, and training with it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from compression.augment import normalise
from compression.distill import CrossEntropy, Dhkd, DistillationStep, DistillConfig, Progress, Shapes, Uniform
from compression.distill.losses.dhkd import DualHead, binary_kl
from compression.errors import ShapeError
from compression.types import Batch, Outputs, TeacherOutputs
from tests.compression.losses.short_training import (
    Stop,
    assert_same,
    distilled,
    fresh_parts,
    net,
    stop_at,
    stored,
)
from tests.compression.tiny_data import tiny_dataset

BATCH, CLASSES = 6, 5
NO_LABELS = torch.empty(0, dtype=torch.int64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def panel(count: int = 1, scale: float = 3.0) -> TeacherOutputs:
    weights = torch.rand(count, BATCH, generator=torch.Generator().manual_seed(5)).double()
    return TeacherOutputs(randn(count, BATCH, CLASSES, seed=1) * scale + 4, weights / weights.sum(0))


def student_of(features: Tensor) -> Outputs:
    return Outputs(torch.zeros(len(features), CLASSES, dtype=features.dtype), {"penultimate": features})


def through(**options) -> DualHead:
    """The loss with a second head that hands its C features on as logits, in float64."""
    loss = Dhkd(**options).build()
    assert isinstance(loss, DualHead)
    loss.prepare(Shapes(num_classes=CLASSES, student_width=CLASSES))
    with torch.no_grad():
        loss.head.weight.copy_(torch.eye(CLASSES))
        loss.head.bias.zero_()
    return loss.double()


# ---------------------------------------------------------------- the formula


@given(
    seed=st.integers(0, 2**16),
    classes=st.integers(1, 12),
    temperature=st.floats(0.5, 8.0),
    scale=st.floats(0.01, 10.0),
)
@settings(max_examples=60, deadline=None)
def test_closed_form_is_the_divergence_of_a_fair_coin(seed, classes, temperature, scale):
    logits, target = randn(4, classes, seed=seed) * scale, randn(4, classes, seed=seed + 1) * scale
    gap = (logits - target) / temperature
    half = torch.tensor(0.5, dtype=torch.float64)
    bernoulli = half * (half.log() - F.logsigmoid(gap)) + half * (half.log() - F.logsigmoid(-gap))
    expected = temperature**2 * bernoulli.sum(-1).mean()
    torch.testing.assert_close(binary_kl(logits, target, temperature=temperature), expected, rtol=1e-9, atol=1e-12)


def test_gradient_is_a_bounded_pull():
    """(T / 2B) tanh(gap / 2T), for the weighted mean of centred logits as target."""
    features, teachers = randn(BATCH, CLASSES).requires_grad_(), panel(2)
    loss = through(temperature=1.5)
    loss(student_of(features), teachers, NO_LABELS).backward()
    centred = teachers.logits - teachers.logits.mean(-1, keepdim=True)
    gap = features.detach() - (teachers.weights.unsqueeze(-1) * centred).sum(0)
    torch.testing.assert_close(features.grad, 1.5 / (2 * BATCH) * torch.tanh(gap / 3))


def test_is_zero_where_the_head_gives_the_centred_logits():
    teachers = panel()
    centred = (teachers.logits[0] - teachers.logits[0].mean(-1, keepdim=True)).requires_grad_()
    found = through()(student_of(centred), teachers, NO_LABELS)
    found.backward()
    assert found.abs() < 1e-12
    assert centred.grad.abs().max() < 1e-12
    plain = through(centred=False)
    assert plain(student_of(teachers.logits[0]), teachers, NO_LABELS).abs() < 1e-12
    assert plain(student_of(centred.detach()), teachers, NO_LABELS) > 1


def test_offsets_of_the_teachers_matter_only_uncentred():
    features, teachers = student_of(randn(BATCH, CLASSES)), panel(2)
    shifted = TeacherOutputs(teachers.logits + randn(2, BATCH, 1, seed=7), teachers.weights)
    loss = through()
    torch.testing.assert_close(loss(features, shifted, NO_LABELS), loss(features, teachers, NO_LABELS))
    plain = through(centred=False)
    assert (plain(features, shifted, NO_LABELS) - plain(features, teachers, NO_LABELS)).abs() > 1e-2


@pytest.mark.parametrize(("gap", "expected"), [(80.0, 77.227), (-80.0, 77.227), (1e4, 9997.2274)])
def test_large_gaps_stay_finite_in_float32_and_keep_their_pull(gap, expected):
    logits = torch.tensor([[gap]], requires_grad=True)
    found = binary_kl(logits, torch.zeros(1, 1), temperature=2.0)
    found.backward()
    assert found.dtype == torch.float32
    assert float(found.detach()) == pytest.approx(expected, abs=2e-3 + 1e-6 * abs(gap))
    assert float(logits.grad) == pytest.approx(1.0 if gap > 0 else -1.0, abs=1e-6)


def test_small_gaps_keep_their_digits_in_float32():
    """Near 0 it is gap^2 / 8; |x| + softplus(-2|x|) - ln 2 would lose it in rounding."""
    gap = torch.tensor([[1e-3]])
    assert float(binary_kl(gap, torch.zeros(1, 1), temperature=2.0)) == pytest.approx(1e-6 / 8, rel=1e-3)
    assert float(binary_kl(gap, gap, temperature=2.0)) == 0


@pytest.mark.parametrize("shape", [(1, BATCH, CLASSES + 1), (1, 1, CLASSES), (BATCH, CLASSES)])
def test_refuses_shapes_that_would_broadcast(shape):
    teachers = TeacherOutputs(torch.zeros(shape), torch.ones(shape[:-1]))
    with pytest.raises(ShapeError, match="Use teachers of the same classes"):
        through()(student_of(randn(BATCH, CLASSES)), teachers, NO_LABELS)


# ---------------------------------------------------------------- when it stops


@pytest.mark.parametrize(
    ("share", "epochs", "first_stopped"),
    [(1.0, 1, 1), (1.0, 7, 7), (0.5, 100, 50), (0.5, 5, 3), (0.07, 100, 7), (0.3, 10, 3), (0.7, 10, 7), (0.01, 3, 1)],
)
def test_teaches_for_its_share_of_the_epochs(share, epochs, first_stopped):
    loss = through(stop_share=share)
    stopped = []
    for epoch in range(epochs + 1):
        loss.progress = Progress(epoch=epoch, epochs=epochs)
        stopped.append(loss.stopped)
    assert stopped == [epoch >= first_stopped for epoch in range(epochs + 1)]


def test_after_its_share_value_and_gradients_are_zeros():
    loss, features, teachers = through(stop_share=0.5), randn(BATCH, CLASSES).requires_grad_(), panel()
    loss.progress = Progress(epoch=1, epochs=4)
    assert loss(student_of(features), teachers, NO_LABELS) > 0.1
    loss.progress = Progress(epoch=2, epochs=4)
    found = loss(student_of(features), teachers, NO_LABELS)
    found.backward()
    assert found == 0
    for tensor in (features, *loss.parameters()):
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


# ---------------------------------------------------------------- beside a student


@pytest.fixture(scope="module")
def dataset():
    return tiny_dataset(validation=16)


@pytest.fixture(scope="module")
def teachers(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    return [stored(dataset, folder / str(width), width=width, seed=width) for width in (6, 8)]


def test_trains_the_backbone_and_leaves_the_classifier_and_the_outputs_alone(dataset, teachers):
    student = net(6, seed=3).eval()
    step = DistillationStep((CrossEntropy(), Dhkd()), Uniform(), teachers)
    step.prepare(student, dataset)
    rows, split = torch.arange(16), dataset.train
    images = normalise(split.images[rows], dataset.preprocessing)
    batch = Batch(images, split.labels[rows], split.ids[rows], view=0, epoch=0, step=0)
    before, logits = step(student, batch), student(images)
    before["dhkd"].backward()
    assert student[0].weight.grad.abs().max() > 0
    assert student[-1].weight.grad is None
    with torch.no_grad():
        for parameter in step.helpers.parameters():
            parameter += 1
    after = step(student, batch)
    assert torch.equal(student(images), logits)
    assert torch.equal(after["cross_entropy"], before["cross_entropy"])
    assert after["dhkd"] != before["dhkd"]


def test_head_learns_resumes_and_stays_out_of_the_student(dataset, teachers, tmp_path):
    start = fresh_parts(Dhkd(), net(6, seed=3), teachers, dataset)
    student, parts, history = distilled(Dhkd(), teachers, dataset, tmp_path / "whole")
    assert sorted(parts) == sorted(start) == ["0.head.bias", "0.head.weight"]
    for name, value in parts.items():
        assert (value - start[name]).abs().max() > 1e-3, name
    assert history.rows[-1]["dhkd"] < history.rows[0]["dhkd"]
    assert list(student.state_dict()) == list(net(6, seed=3).state_dict())

    with pytest.raises(Stop):
        distilled(Dhkd(), teachers, dataset, tmp_path / "cut", on_step=stop_at(7))
    again, parts_again, _ = distilled(Dhkd(), teachers, dataset, tmp_path / "cut")
    assert_same(again.state_dict(), student.state_dict())
    assert_same(parts_again, parts)


def test_in_a_training_it_stops_after_its_share(dataset, teachers, tmp_path):
    _, _, history = distilled(Dhkd(stop_share=0.4), teachers, dataset, tmp_path)
    values = [row["dhkd"] for row in history.rows]
    assert values[0] > 0
    assert values[1] > 0
    assert values[2] == 0


def test_is_refused_alone_since_nothing_would_train_the_classifier():
    with pytest.raises(ValidationError, match="'dhkd' alone, expected another term beside it"):
        DistillConfig.model_validate({"train": {"epochs": 1}, "losses": (Dhkd(),)})


@pytest.mark.parametrize("wrong", [{"stop_share": 0}, {"stop_share": 1.1}, {"temperature": 0}, {"weight": -1}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        Dhkd.model_validate(wrong)
