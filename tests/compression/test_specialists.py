"""Samples go to the teachers that know their class, by the label or by the student."""

import pytest
import torch
from torch import Tensor

from compression.distill import Kd
from compression.distill.teachers.specialists import Specialists, by_student
from compression.types import UNKNOWN, Outputs, TeacherOutputs, known

CLASSES = 5
OWN = ((0, 1, 2), (2, 3))
"""Classes that each of two teachers knows: one is shared, and 4 is nobody's."""
LABELS = torch.tensor([0, 1, 2, 3, 4, -1, -1])
BATCH = len(LABELS)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def panel(*own: tuple[int, ...], batch: int = BATCH) -> Tensor:
    """Logits [K,B,C] of a teacher for each set of classes."""
    logits = torch.full((len(own), batch, CLASSES), UNKNOWN)
    for number, classes in enumerate(own):
        logits[number][:, list(classes)] = 3 * randn(batch, len(classes), seed=number + 1)
    return logits


def weigh(logits: Tensor, labels: Tensor, student: Tensor, *, by_label: bool = True) -> Tensor:
    return Specialists(labels=by_label).build()(logits, labels, student)


def test_a_labelled_sample_belongs_to_the_teachers_that_know_its_label():
    weights = weigh(panel(*OWN), LABELS, randn(BATCH, CLASSES))
    expected = torch.tensor([[1.0, 1.0, 0.5, 0.0, 0.5], [0.0, 0.0, 0.5, 1.0, 0.5]])  # nobody knows the last
    torch.testing.assert_close(weights[:, :5], expected)


def test_what_a_teacher_says_does_not_matter_and_neither_does_the_student_for_labelled_samples():
    logits = panel(*OWN)
    louder = torch.where(known(logits), 7 * logits.flip(1) + 40, logits)
    weights = weigh(logits, LABELS, randn(BATCH, CLASSES))
    assert torch.equal(weigh(louder, LABELS, randn(BATCH, CLASSES)), weights)
    assert torch.equal(weigh(logits, LABELS, randn(BATCH, CLASSES, seed=9))[:, :5], weights[:, :5])


def test_unlabelled_samples_are_shared_by_the_students_probability_of_a_teachers_classes():
    logits, student = panel(*OWN), randn(BATCH, CLASSES)
    share = torch.stack([student.softmax(-1)[:, list(classes)].sum(-1) for classes in OWN])
    share = share / share.sum(0)
    torch.testing.assert_close(weigh(logits, LABELS, student)[:, 5:], share[:, 5:])
    torch.testing.assert_close(weigh(logits, LABELS, student, by_label=False), share)
    assert torch.equal(
        weigh(logits, LABELS, student, by_label=False), weigh(logits, LABELS.flip(0), student, by_label=False)
    )


def test_without_labels_distillation_moves_the_student_within_a_specialists_classes_alone():
    """The probability of each specialist's classes has no gradient, however sure the specialists are."""
    logits, student = panel((0, 1, 4), (2, 3)), randn(BATCH, CLASSES).requires_grad_()
    weights = weigh(logits, LABELS, student, by_label=False)
    Kd(temperature=1.0).build()(Outputs(student), TeacherOutputs(logits, weights), LABELS).backward()
    assert student.grad.abs().max() > 1e-2
    for classes in ((0, 1, 4), (2, 3)):
        assert student.grad[:, list(classes)].sum(-1).abs().max() < 1e-7
    surest = logits.softmax(-1).amax(-1)
    by_confidence = TeacherOutputs(logits, surest / surest.sum(0))
    (other,) = torch.autograd.grad(Kd(temperature=1.0).build()(Outputs(student), by_confidence, LABELS), student)
    assert other[:, [2, 3]].sum(-1).abs().max() > 1e-2


def test_a_student_that_is_sure_sends_the_sample_to_the_teacher_of_that_class():
    student = torch.zeros(4, CLASSES)
    student[torch.arange(4), [0, 2, 3, 4]] = 50
    weights = weigh(panel(*OWN, batch=4), torch.full((4,), -1), student)
    torch.testing.assert_close(weights, torch.tensor([[1.0, 0.5, 0.0, 0.6], [0.0, 0.5, 1.0, 0.4]]))  # 3 and 2 of 5


@pytest.mark.parametrize("by_label", [True, False])
def test_where_nobody_knows_anything_all_count_the_same(by_label):
    weights = weigh(torch.full((3, BATCH, CLASSES), UNKNOWN), LABELS, randn(BATCH, CLASSES), by_label=by_label)
    torch.testing.assert_close(weights, torch.full((3, BATCH), 1 / 3))


def test_a_teacher_that_knows_nothing_gets_nothing_and_extreme_students_still_share():
    theirs = torch.tensor([[True, False, False], [False, True, False], [False, False, False]]).unsqueeze(1)
    for student in ([[0.0, 0.0, 1e4]], [[-1e4, -1e4, 0.0]]):  # next to no probability for any known class
        weights = by_student(theirs, torch.tensor(student))
        torch.testing.assert_close(weights, torch.tensor([[0.5], [0.5], [0.0]]))


def test_a_single_teacher_of_everything_is_distillation_from_it():
    logits = 3 * randn(1, BATCH, CLASSES)
    for by_label in (True, False):
        assert torch.equal(weigh(logits, LABELS, randn(BATCH, CLASSES), by_label=by_label), torch.ones(1, BATCH))


def test_no_gradient_reaches_the_student():
    student = randn(BATCH, CLASSES).requires_grad_()
    assert not weigh(panel(*OWN).requires_grad_(), LABELS, student, by_label=False).requires_grad
