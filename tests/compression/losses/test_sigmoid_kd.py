"""Sigmoids against specialists: the target, its mask, the self-paced scales, and training with them."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from compression.distill import DistillConfig, Shapes
from compression.distill.losses.sigmoid_kd import SelfPaced, SigmoidKd, paced, targets
from compression.errors import CompressionError, ShapeError
from compression.teacher_outputs import OutputsSpec
from compression.train import TrainConfig
from compression.types import UNKNOWN, Outputs, TeacherOutputs, known
from tests.compression.losses.short_training import (
    CLASSES,
    SHIFT,
    Stop,
    assert_same,
    distilled,
    fresh_parts,
    net,
    stop_at,
)
from tests.compression.tiny_data import tiny_dataset

BATCH = 6
VERTICALS = ((0, 1, 2), (3, 4))
"""Classes that each of two specialists knows."""
NO_LABELS = torch.full((BATCH,), -1)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unknown_but(logits: Tensor, classes: tuple[int, ...]) -> Tensor:
    """The logits, of these classes alone."""
    mine = torch.zeros(logits.shape[-1], dtype=torch.bool)
    mine[list(classes)] = True
    return torch.where(mine, logits, UNKNOWN)


def specialists(weights: Tensor | None = None) -> TeacherOutputs:
    """Two teachers of VERTICALS; the first has the first half of the batch, the second the other."""
    logits = torch.stack([unknown_but(randn(BATCH, 5, seed=k + 1), mine) for k, mine in enumerate(VERTICALS)])
    first = (torch.arange(BATCH) < BATCH // 2).double()
    return TeacherOutputs(logits, torch.stack([first, 1 - first]) if weights is None else weights)


def loss_of(student: Tensor, teachers: TeacherOutputs, **settings) -> Tensor:
    return SigmoidKd(**settings).build()(Outputs(student), teachers, NO_LABELS)


# ---------------------------------------------------------------- the target


def test_targets_stay_within_the_specialists_classes():
    teachers = specialists()
    target, taught = targets(teachers, top_k=100)
    for row in range(BATCH):
        mine = list(VERTICALS[row >= BATCH // 2])
        others = [c for c in range(5) if c not in mine]
        assert taught[row].nonzero().flatten().tolist() == mine
        assert torch.equal(target[row, others], torch.zeros(len(others)).double())
        own = teachers.logits[int(row >= BATCH // 2), row, mine]
        torch.testing.assert_close(target[row, mine], own.softmax(-1))


@pytest.mark.parametrize("top_k", [1, 2, 4, 5, 100])
def test_the_largest_probabilities_are_kept_as_they_are(top_k):
    teachers = TeacherOutputs(randn(2, BATCH, 5), torch.full((2, BATCH), 0.5).double())
    target, taught = targets(teachers, top_k=top_k)
    probs = teachers.probs()
    assert taught.all()
    assert ((target > 0).sum(-1) == min(top_k, 5)).all()
    assert torch.equal(target, torch.where(target > 0, probs, 0.0))
    torch.testing.assert_close(target.sum(-1), probs.sort(descending=True).values[:, :top_k].sum(-1))


def test_teachers_are_mixed_by_weight_and_one_without_weight_teaches_nothing():
    share = torch.rand(BATCH, generator=torch.Generator().manual_seed(5)).double()
    teachers = specialists(torch.stack([share, 1 - share]))
    target, taught = targets(teachers, top_k=100)
    torch.testing.assert_close(target, teachers.probs())
    assert taught.all()
    alone, _ = targets(TeacherOutputs(teachers.logits[1:], torch.ones(1, BATCH)), top_k=100)
    mixed, taught = targets(specialists(torch.stack([torch.zeros(BATCH), torch.ones(BATCH)])), top_k=100)
    torch.testing.assert_close(mixed, alone)
    assert not taught[:, list(VERTICALS[0])].any()


# ---------------------------------------------------------------- the loss


def test_one_teacher_of_all_classes_gives_plain_sigmoid_distillation():
    student, teacher = randn(BATCH, 5), randn(1, BATCH, 5, seed=1)
    probs = teacher[0].softmax(-1)
    expected = -(probs * student.sigmoid().log() + (1 - probs) * (-student).sigmoid().log()).sum(-1).mean()
    for mask_unknown in (True, False):
        found = loss_of(student, TeacherOutputs(teacher, torch.ones(1, BATCH)), mask_unknown=mask_unknown)
        torch.testing.assert_close(found, expected)


def test_is_least_at_the_teachers_probabilities_and_is_their_entropy_there():
    teachers = TeacherOutputs(randn(1, BATCH, 5, seed=1), torch.ones(1, BATCH))
    probs = teachers.probs()
    student = torch.logit(probs).requires_grad_()
    value = loss_of(student, teachers)
    value.backward()
    entropy = -(probs * probs.log() + (1 - probs) * (1 - probs).log()).sum(-1).mean()
    torch.testing.assert_close(value.detach(), entropy)
    assert student.grad.abs().max() < 1e-12


def test_unknown_classes_are_left_alone_or_pushed_down():
    teachers, student = specialists(), randn(BATCH, 5).requires_grad_()
    target, taught = targets(teachers, top_k=100)
    pull = (student.detach().sigmoid() - target) / BATCH
    (masked,) = torch.autograd.grad(loss_of(student, teachers), student)
    (pushed,) = torch.autograd.grad(loss_of(student, teachers, mask_unknown=False), student)
    torch.testing.assert_close(masked, pull * taught)
    torch.testing.assert_close(pushed, pull)
    assert torch.equal(masked[~taught], torch.zeros(BATCH // 2 * 5).double())
    assert (pushed[~taught] > 0).all()


def test_weights_that_round_to_more_than_1_do_not_make_it_negative():
    student, teacher = torch.tensor([[1e6, -1e6]]), torch.tensor([[[1e3, 0.0]]])
    assert loss_of(student, TeacherOutputs(teacher, torch.tensor([[1 + 2e-7]]))) == 0


@pytest.mark.parametrize("self_paced", [False, True])
def test_samples_that_nobody_knows_anything_about_count_nothing(self_paced):
    logits = torch.full((2, BATCH, 5), UNKNOWN)
    loss = SigmoidKd(self_paced=self_paced).build()
    if self_paced:
        loss.prepare(Shapes(5, 4, num_teachers=2))
    student = randn(BATCH, 5).requires_grad_()
    value = loss(Outputs(student), TeacherOutputs(logits, torch.full((2, BATCH), 0.5)), NO_LABELS)
    value.backward()
    assert value == 0
    assert torch.equal(student.grad, torch.zeros(BATCH, 5).double())
    target, taught = targets(TeacherOutputs(logits, torch.full((2, BATCH), 0.5)), top_k=100)
    assert not target.any()
    assert not taught.any()


def test_refuses_teachers_of_other_classes():
    with pytest.raises(ShapeError, match="Use teachers of the same classes"):
        loss_of(randn(BATCH, 4), specialists())


# ---------------------------------------------------------------- self-paced


class Specialist:
    """Stored outputs of a teacher that knows two or three of the four classes."""

    spec = OutputsSpec(views=2, seed=0, augment=SHIFT)
    class_names = CLASSES

    def __init__(self, classes: tuple[int, ...], seed: int) -> None:
        data = tiny_dataset(validation=16)
        self._rows = unknown_but(randn(64, 4, seed=seed).float() + 4 * hot(data.train.labels), classes)
        self.validation_logits = unknown_but(4 * hot(data.validation.labels), classes)

    def logits(self, ids: Tensor, view: int) -> Tensor:
        del view
        return self._rows[ids]

    def features(self, ids: Tensor, view: int) -> Tensor:
        raise AssertionError


def hot(labels: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(labels, 4).float()


def self_paced(**settings) -> SelfPaced:
    loss = SigmoidKd(self_paced=True, **settings).build()
    loss.prepare(Shapes(5, 4, num_teachers=2))
    return loss.double()


def test_scales_start_at_the_root_of_the_number_of_classes():
    loss = SigmoidKd(self_paced=True).build()
    loss.prepare(Shapes(4, 6, num_teachers=3))
    torch.testing.assert_close(loss.scales, torch.full((3,), 2.0))
    loss.observe([Specialist((0, 1, 3), 1), Specialist((2,), 2)], tiny_dataset(validation=16))
    torch.testing.assert_close(loss.scales, torch.tensor([math.sqrt(3), 1.0, 2.0]))  # the third one is live


def test_is_the_plain_loss_where_the_scales_are_the_lengths_of_the_logits():
    teachers, student = specialists().rows(torch.tensor([4])), randn(1, 5)
    loss = self_paced(mask_unknown=False)
    lengths = torch.stack([student[0, list(mine)].norm() for mine in VERTICALS])
    with torch.no_grad():
        loss.log_scales.copy_(lengths.log())
    found = loss(Outputs(student), teachers, NO_LABELS[:1])
    torch.testing.assert_close(found, loss_of(student, teachers, mask_unknown=False))


def test_logits_of_a_vertical_get_the_length_of_its_scale_and_keep_their_order():
    teachers, student, scales = specialists(), randn(BATCH, 5), torch.tensor([2.5, 0.3]).double()
    found = paced(student, known(teachers.logits), teachers.weights, scales)
    for mine, scale in zip(VERTICALS, scales, strict=True):
        part = found[:, list(mine)]
        torch.testing.assert_close(part.norm(dim=-1), scale.expand(BATCH))
        assert torch.equal(part.argsort(-1), student[:, list(mine)].argsort(-1))


def test_the_size_of_the_students_logits_is_not_trained():
    teachers, loss, student = specialists(), self_paced(), randn(BATCH, 5).requires_grad_()
    value = loss(Outputs(student), teachers, NO_LABELS)
    value.backward()
    first, second = (list(mine) for mine in VERTICALS)
    assert student.grad.abs().max() > 1e-3
    assert (student.grad * student)[:, first].sum(-1).abs().max() < 1e-12
    stretched = student.detach().clone()
    stretched[:, first] *= 7
    stretched[:, second] *= 0.1
    torch.testing.assert_close(loss(Outputs(stretched), teachers, NO_LABELS), value)


def test_a_class_of_several_teachers_gets_the_mean_of_its_scaled_logits():
    theirs = torch.tensor([[True, True, False, False], [False, True, True, False]]).unsqueeze(1)
    student, scales = torch.tensor([[3.0, 4.0, 3.0, 9.0]]), torch.tensor([10.0, 5.0])
    found = paced(student, theirs, torch.tensor([[0.25], [0.75]]), scales)
    torch.testing.assert_close(found, torch.tensor([[6.0, 0.25 * 8 + 0.75 * 4, 3.0, 9.0]]))
    torch.testing.assert_close(
        paced(student, theirs, torch.tensor([[1.0], [0.0]]), scales), torch.tensor([[6.0, 8.0, 3.0, 9.0]])
    )


def test_gradients_of_scales_and_logits_are_those_of_finite_differences():
    teachers, loss = specialists(), self_paced(mask_unknown=False)

    def value(student: Tensor, log_scales: Tensor) -> Tensor:
        return torch.func.functional_call(loss, {"log_scales": log_scales}, (Outputs(student), teachers, NO_LABELS))

    at = (randn(BATCH, 5).requires_grad_(), torch.tensor([0.4, -0.2]).double().requires_grad_())
    assert torch.autograd.gradcheck(value, at)


def test_logits_of_zeros_give_finite_gradients():
    student, loss = torch.zeros(BATCH, 5).requires_grad_(), self_paced()
    loss(Outputs(student), specialists(), NO_LABELS).backward()
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().max() > 0


def test_self_paced_wants_to_know_its_teachers():
    loss = SigmoidKd(self_paced=True).build()
    with pytest.raises(CompressionError, match="0 teachers announced, expected at least 1"):
        loss.prepare(Shapes(5, 4))
    with pytest.raises(ShapeError, match="have 1 teachers, expected the 2"):
        self_paced()(Outputs(randn(BATCH, 5)), TeacherOutputs(randn(1, BATCH, 5), torch.ones(1, BATCH)), NO_LABELS)


# ---------------------------------------------------------------- training


def test_scales_learn_resume_and_stay_out_of_the_student(tmp_path):
    data, loss = tiny_dataset(validation=16), SigmoidKd(self_paced=True)
    teachers = [Specialist((0, 1), 1), Specialist((1, 2, 3), 2)]
    start = fresh_parts(loss, net(6, seed=3), teachers, data)
    student, parts, history = distilled(loss, teachers, data, tmp_path / "whole")
    assert list(parts) == list(start)
    (name,) = parts
    assert name.endswith("log_scales")
    assert ((parts[name] - start[name]).abs() > 1e-3).all()
    assert history.rows[-1]["sigmoid_kd"] < history.rows[0]["sigmoid_kd"]
    assert list(student.state_dict()) == list(net(6, seed=3).state_dict())

    with pytest.raises(Stop):
        distilled(loss, teachers, data, tmp_path / "cut", on_step=stop_at(7))
    again, parts_again, _ = distilled(loss, teachers, data, tmp_path / "cut")
    assert_same(again.state_dict(), student.state_dict())
    assert_same(parts_again, parts)


def test_is_refused_alone_since_nothing_would_compare_the_specialists():
    with pytest.raises(ValidationError, match="'sigmoid_kd' alone, expected another term beside it"):
        DistillConfig(train=TrainConfig(epochs=1), losses=(SigmoidKd(),))


@pytest.mark.parametrize("wrong", [{"top_k": 0}, {"weight": -1}, {"temperature": 2.0}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        SigmoidKd.model_validate(wrong)
