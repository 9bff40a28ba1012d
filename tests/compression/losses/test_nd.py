"""Norm and direction of features: where it is zero, its two regimes, class means, and training with it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn

from compression.augment import NoAugment
from compression.data.dataset import Dataset
from compression.distill import CrossEntropy, DistillationStep, DistillConfig, Nd, Shapes, Uniform
from compression.distill.losses import nd
from compression.distill.losses.nd import NormAndDirection, class_means, norm_and_direction
from compression.distill.teachers import Partition
from compression.errors import CompressionError, ShapeError
from compression.teacher_outputs import OutputsSpec
from compression.train import TrainConfig
from compression.types import Outputs, TeacherOutputs
from tests.compression.losses.short_training import (
    CLASSES,
    Stop,
    assert_same,
    distilled,
    fresh_parts,
    net,
    stop_at,
    stored,
)
from tests.compression.tiny_data import tiny_dataset

WIDTH = 5
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])
BATCH = len(LABELS)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(values: Tensor) -> Tensor:
    return values / values.norm(dim=-1, keepdim=True)


class Teacher:
    """Stored outputs whose features are a function of the sample's id."""

    spec = OutputsSpec(views=1, seed=0, augment=NoAugment(), features=True)
    class_names = CLASSES
    validation_logits = torch.zeros(16, len(CLASSES))

    def __init__(self, width: int) -> None:
        self.width, self.asked = width, []

    def logits(self, ids: Tensor, view: int) -> Tensor:
        raise AssertionError("class means are of features")

    def features(self, ids: Tensor, view: int) -> Tensor:
        assert view == 0
        self.asked.append(len(ids))
        return torch.sin(ids.unsqueeze(-1) * torch.arange(1, self.width + 1) * 0.7).float() + 0.5


def dataset(*, without: int | None = None) -> Dataset:
    """The tiny data set in another order, without the samples of one class."""
    whole = tiny_dataset(validation=16)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(4))
    if without is not None:
        order = order[whole.train.labels[order] != without]
    train = whole.train
    return replace(whole, train=replace(train, images=train.images[order], labels=train.labels[order], ids=order))


def prepared(widths: tuple[int, ...] = (WIDTH,), **options) -> NormAndDirection:
    """The loss in float64, ready for teachers of these widths; nothing observed yet."""
    loss = Nd(**options).build()
    assert isinstance(loss, NormAndDirection)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss.prepare(Shapes(num_classes=len(CLASSES), student_width=WIDTH, teacher_widths=widths))
    return loss.double()


def outputs(features: Tensor) -> Outputs:
    return Outputs(torch.zeros(len(features), len(CLASSES)), {"penultimate": features})


def panel(*features: Tensor, weights: Tensor | None = None) -> TeacherOutputs:
    count, batch = len(features), len(features[0])
    shares = torch.full((count, batch), 1 / count, dtype=torch.float64) if weights is None else weights
    return TeacherOutputs(torch.zeros(count, batch, len(CLASSES)), shares, features)


# ---------------------------------------------------------------- the formula


def test_is_zero_along_the_class_mean_from_the_teachers_norm_on():
    loss, teacher = prepared(), randn(BATCH, WIDTH, seed=1)
    loss.means(0).copy_(randn(len(CLASSES), WIDTH, seed=2))
    along = unit(loss.means(0)[LABELS]) * teacher.norm(dim=-1, keepdim=True)
    for factor in (1.0, 1.5, 20.0):
        assert loss(outputs(along * factor), panel(teacher), LABELS).abs() < 1e-12
    assert float(loss(outputs(along * 0.9), panel(teacher), LABELS)) == pytest.approx(0.1)
    assert float(loss(outputs(-along), panel(teacher), LABELS)) == pytest.approx(2.0)


@given(seed=st.integers(0, 2**16), ours=st.floats(1e-3, 1e3), theirs=st.floats(1e-3, 1e3))
@settings(max_examples=60, deadline=None)
def test_lies_between_0_and_2(seed, ours, theirs):
    values = norm_and_direction(
        randn(8, 4, seed=seed) * ours, randn(8, 4, seed=seed + 1) * theirs, randn(8, 4, seed=seed + 2)
    )
    assert values.shape == (8,)
    assert (values >= -1e-12).all()
    assert (values <= 2 + 1e-12).all()


def test_beyond_the_teachers_norm_it_is_one_minus_the_cosine_at_any_scale():
    teacher, means = unit(randn(BATCH, WIDTH)), randn(BATCH, WIDTH, seed=2)
    student = unit(randn(BATCH, WIDTH, seed=1)) * 1.01
    expected = 1 - nn.functional.cosine_similarity(student, means)
    for scale in (1.0, 3.0, 100.0):
        torch.testing.assert_close(norm_and_direction(student * scale, teacher, means), expected)
    shorter = norm_and_direction(student * 0.5, teacher, means)
    assert (shorter - expected).abs().max() > 0.1


def test_below_the_teachers_norm_the_gradient_is_constant_along_the_class_mean():
    """-e_y / (B |f_t|), exactly."""
    loss, teacher = prepared(), unit(randn(BATCH, WIDTH, seed=1)) * torch.linspace(2, 5, BATCH).double().unsqueeze(-1)
    loss.means(0).copy_(randn(len(CLASSES), WIDTH, seed=2))
    student = (unit(randn(BATCH, WIDTH)) * 1.9).requires_grad_()
    loss(outputs(student), panel(teacher), LABELS).backward()
    expected = -unit(loss.means(0)[LABELS]) / (BATCH * teacher.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(student.grad, expected)


def test_beyond_the_teachers_norm_the_gradient_turns_and_does_not_stretch():
    """It flows through the student's norm, so that it is orthogonal to the features."""
    student = (unit(randn(BATCH, WIDTH)) * 4).requires_grad_()
    norm_and_direction(student, unit(randn(BATCH, WIDTH, seed=1)), randn(BATCH, WIDTH, seed=2)).sum().backward()
    assert student.grad.abs().max() > 1e-2
    assert (student.grad * student).sum(-1).abs().max() < 1e-12


def test_features_of_zeros_give_finite_numbers():
    student = torch.zeros(2, WIDTH, dtype=torch.float64, requires_grad=True)
    values = norm_and_direction(student, torch.zeros(2, WIDTH).double(), randn(2, WIDTH))
    values.sum().backward()
    torch.testing.assert_close(values, torch.ones(2).double())
    assert student.grad.norm(dim=-1).max() <= 1 + 1e-12


def test_teachers_count_with_their_weights_per_sample():
    student, first, second = randn(BATCH, WIDTH), randn(BATCH, WIDTH, seed=1), randn(BATCH, WIDTH, seed=2)
    loss = prepared((WIDTH, WIDTH))
    for number in range(2):
        loss.means(number).copy_(randn(len(CLASSES), WIDTH, seed=3 + number))
    share = torch.rand(BATCH, generator=torch.Generator().manual_seed(5)).double()
    losses = [
        norm_and_direction(student, theirs, loss.means(number)[LABELS]) for number, theirs in enumerate((first, second))
    ]
    expected = (share * losses[0] + (1 - share) * losses[1]).mean()
    found = loss(outputs(student), panel(first, second, weights=torch.stack([share, 1 - share])), LABELS)
    torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------- class means


def naive_means(teacher: Teacher, data: Dataset) -> Tensor:
    means = torch.zeros(len(CLASSES), teacher.width, dtype=torch.float64)
    for c in range(len(CLASSES)):
        rows = [
            teacher.features(data.train.ids[i : i + 1], 0)[0]
            for i in range(len(data.train.ids))
            if data.train.labels[i] == c
        ]
        if rows:
            means[c] = torch.stack(rows).double().mean(0)
    return means


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_class_means_are_those_of_a_plain_loop(monkeypatch, chunk):
    monkeypatch.setattr(nd, "CHUNK", chunk)
    teacher, data = Teacher(7), dataset()
    found = class_means(teacher, data, 7)
    assert sum(teacher.asked) == 64
    assert max(teacher.asked) == min(chunk, 64)
    torch.testing.assert_close(found, naive_means(teacher, data).float())
    assert (found[0] - found[1]).abs().max() > 1e-2


def test_observed_means_are_kept_in_buffers_of_the_final_shape():
    loss = Nd().build()
    loss.prepare(Shapes(len(CLASSES), WIDTH, (7, WIDTH)))
    empty = {name: tuple(value.shape) for name, value in loss.state_dict().items()}
    assert (empty["means_0"], empty["means_1"]) == ((4, 7), (4, WIDTH))
    data, teachers = dataset(), [Teacher(7), Teacher(WIDTH)]
    loss.observe(teachers, data)
    assert {name: tuple(value.shape) for name, value in loss.state_dict().items()} == empty
    for number, teacher in enumerate(teachers):
        torch.testing.assert_close(loss.means(number), naive_means(teacher, data).float())
    again = Nd().build()
    again.prepare(Shapes(len(CLASSES), WIDTH, (7, WIDTH)))
    again.load_state_dict(loss.state_dict())
    assert torch.equal(again.means(0), loss.means(0))


def test_classes_without_samples_contribute_nothing():
    loss, student = prepared(), randn(BATCH, WIDTH).requires_grad_()
    teacher = randn(BATCH, WIDTH, seed=1)
    loss.observe([Teacher(WIDTH)], dataset(without=2))
    assert torch.equal(loss.means(0)[2], torch.zeros(WIDTH).double())
    assert torch.isfinite(loss.means(0)).all()
    found = loss(outputs(student), panel(teacher), LABELS)
    found.backward()
    absent = LABELS == 2
    assert absent.any()
    assert torch.equal(student.grad[absent], torch.zeros(1, WIDTH).double())
    assert (student.grad[~absent].abs().amax(-1) > 0).all()
    others = norm_and_direction(student.detach()[~absent], teacher[~absent], loss.means(0)[LABELS[~absent]])
    torch.testing.assert_close(found.detach(), others.sum() / BATCH)


def test_is_zero_before_it_has_seen_any_features():
    student = randn(BATCH, WIDTH).requires_grad_()
    found = prepared()(outputs(student), panel(randn(BATCH, WIDTH, seed=1)), LABELS)
    found.backward()
    assert found == 0
    assert student.grad.abs().max() == 0


def test_teachers_without_stored_outputs_are_refused_before_training():
    step = DistillationStep((CrossEntropy(), Nd()), Uniform(), (), [net(8, seed=1)])
    with pytest.raises(CompressionError, match=r"stored outputs of 0 teachers, expected all 1.*features: true"):
        step.prepare(net(6, seed=3), tiny_dataset(validation=16))


# ---------------------------------------------------------------- projectors


def test_projectors_stand_only_where_widths_differ():
    loss = prepared((WIDTH, 7, 3))
    assert isinstance(loss.projectors[0], nn.Identity)
    for number, width in ((1, 7), (2, 3)):
        norm, dropout, linear = loss.projectors[number]
        assert isinstance(norm, nn.BatchNorm1d)
        assert isinstance(dropout, nn.Dropout)
        assert (dropout.p, linear.in_features, linear.out_features) == (0.5, WIDTH, width)
    assert not list(prepared((WIDTH, WIDTH)).parameters())


def test_projected_features_are_what_is_compared():
    loss, student, teacher = prepared((7,), dropout=0.0), randn(BATCH, WIDTH), randn(BATCH, 7, seed=1)
    loss.means(0).copy_(randn(len(CLASSES), 7, seed=2))
    linear = loss.projectors[0][2]
    normed = (student - student.mean(0)) / (student.var(0, unbiased=False) + 1e-5).sqrt()
    expected = norm_and_direction(normed @ linear.weight.T + linear.bias, teacher, loss.means(0)[LABELS]).mean()
    torch.testing.assert_close(loss(outputs(student), panel(teacher), LABELS), expected)


def test_refuses_other_teachers_and_a_batch_of_one():
    loss = prepared((7,))
    with pytest.raises(ShapeError, match=r"\[\[6, 3\]\], expected \[\[6, 7\]\]"):
        loss(outputs(randn(BATCH, WIDTH)), panel(randn(BATCH, 3)), LABELS)
    with pytest.raises(ShapeError, match=r"\[\], expected \[\[6, 7\]\]"):
        none = TeacherOutputs(torch.zeros(1, BATCH, len(CLASSES)), torch.ones(1, BATCH))
        loss(outputs(randn(BATCH, WIDTH)), none, LABELS)
    with pytest.raises(ShapeError, match="Raise train.batch_size"):
        loss(outputs(randn(1, WIDTH)), panel(randn(1, 7)), LABELS[:1])
    same = prepared((WIDTH,))
    assert torch.isfinite(same(outputs(randn(1, WIDTH)), panel(randn(1, WIDTH)), LABELS[:1]))


@pytest.mark.parametrize("classes", [3, 5])
def test_refuses_teachers_of_other_classes(classes):
    teachers = TeacherOutputs(torch.zeros(1, BATCH, classes), torch.ones(1, BATCH), (randn(BATCH, WIDTH),))
    with pytest.raises(ShapeError, match="Use teachers of the same classes"):
        prepared()(outputs(randn(BATCH, WIDTH)), teachers, LABELS)


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """One as wide as the student, and a wider one."""
    folder = tmp_path_factory.mktemp("outputs")
    return [stored(tiny_dataset(validation=16), folder / str(width), width=width, seed=width) for width in (6, 8)]


def test_projector_learns_resumes_and_stays_out_of_the_student(teachers, tmp_path):
    data, loss = tiny_dataset(validation=16), Nd(weight=2.0)
    start = fresh_parts(loss, net(6, seed=3), teachers, data)
    student, parts, history = distilled(loss, teachers, data, tmp_path / "whole")
    assert sorted(parts) == sorted(start)
    assert not any(name.startswith("0.projectors.0") for name in parts)
    for name in ("weight", "bias"):
        for place in ("0.projectors.1.0", "0.projectors.1.2"):
            key = f"{place}.{name}"
            assert (parts[key] - start[key]).abs().max() > 1e-3, key
    for number, teacher in enumerate(teachers):
        assert torch.equal(parts[f"0.means_{number}"], class_means(teacher, data, (6, 8)[number]))
    assert history.rows[-1]["nd"] < history.rows[0]["nd"]
    assert list(student.state_dict()) == list(net(6, seed=3).state_dict())

    with pytest.raises(Stop):
        distilled(loss, teachers, data, tmp_path / "cut", on_step=stop_at(7))
    again, parts_again, _ = distilled(loss, teachers, data, tmp_path / "cut")
    assert_same(again.state_dict(), student.state_dict())
    assert_same(parts_again, parts)


def test_is_refused_alone_since_nothing_would_train_the_classifier():
    with pytest.raises(ValidationError, match="'nd' alone, expected another term beside it"):
        DistillConfig.model_validate({"train": {"epochs": 1}, "losses": (Nd(),)})


@pytest.mark.parametrize("wrong", [{"dropout": 1.0}, {"dropout": -0.1}, {"weight": -1}, {"projector": True}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        Nd.model_validate(wrong)


def test_a_snapshot_of_the_student_as_a_teacher_is_refused_with_the_recipe() -> None:
    with pytest.raises(ValidationError, match=r"'nd'.*stored features of every teacher.*'partition'"):
        DistillConfig(train=TrainConfig(epochs=1), losses=(CrossEntropy(), Nd()), teachers=Partition())
