"""Enhanced targets: the identity at epsilon 1, and which way larger ones push; branches on the student's stages."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from compression.distill import Helper, Kd, Needs, Ofa, Shapes
from compression.distill.losses.ofa import OfaBranches, TokenBranch, enhanced
from compression.errors import ShapeError
from compression.types import Outputs, TeacherOutputs
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


def test_of_soft_labels_the_largest_class_is_enhanced():
    student, teachers, config = randn(BATCH, CLASSES), panel(), Ofa(epsilon=1.5)
    soft = 0.7 * F.one_hot(LABELS, CLASSES).double() + 0.3 * F.one_hot(LABELS.roll(1), CLASSES).double()
    assert torch.equal(value(config, student, teachers, soft), value(config, student, teachers))


def test_labels_that_are_not_known_are_needed_for_the_true_class_alone():
    unknown = torch.full((BATCH,), -1)
    student, teachers = randn(BATCH, CLASSES), panel()
    assert torch.equal(value(Ofa(), student, teachers, unknown), value(Ofa(), student, teachers))
    assert Ofa().needs == Needs()
    assert Ofa(epsilon=1.5).needs == Needs(labels=True, soft_labels=True)


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


@pytest.mark.parametrize(
    "wrong", [{"epsilon": 0.9}, {"epsilon": 11}, {"temperature": 0}, {"weight": -1}, {"branches": -1}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        Ofa.model_validate(wrong)


# ---------------------------------------------------------------- branches


PYRAMID = ((2, 8, 8), (6, 4, 4), (8, 2, 2), (10, 1, 1))
TOKENS = ((9, 6), (9, 6))


def prepared(shapes=PYRAMID, **options) -> OfaBranches:
    """The loss with branches, in float64 and out of training."""
    loss = Ofa(**({"branches": 1.0} | options)).build()
    assert isinstance(loss, OfaBranches)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss.prepare(Shapes(num_classes=CLASSES, student_width=10, student_maps=shapes))
    return loss.double().eval()


def outputs(shapes=PYRAMID, batch: int = BATCH) -> Outputs:
    maps = tuple(randn(batch, *shape, seed=10 + number) for number, shape in enumerate(shapes))
    return Outputs(randn(batch, CLASSES), maps=maps)


def test_without_branches_it_is_a_plain_function():
    assert not isinstance(Ofa().build(), Helper)
    assert not Ofa().needs.student_maps
    assert Ofa(branches=0.5).needs == Needs(student_maps=True)
    assert not Ofa(branches=0.5).needs.teacher_maps


@pytest.mark.parametrize("shapes", [PYRAMID, TOKENS, (*PYRAMID[:1], *TOKENS)])
@pytest.mark.parametrize(("epsilon", "branches"), [(1.0, 1.0), (1.5, 0.3)])
def test_every_branch_is_taught_as_the_student_is(shapes, epsilon, branches):
    """With epsilon 1 each term is the cross entropy with soft labels, and kd / temperature^2 plus an entropy."""
    loss, student, teachers = (
        prepared(shapes, epsilon=epsilon, branches=branches, temperature=2),
        outputs(shapes),
        panel(2),
    )
    found = loss(student, teachers, LABELS)
    logits = loss.branch_logits(student)
    assert [list(each.shape) for each in logits] == [[BATCH, CLASSES]] * len(shapes)
    alone = Ofa(epsilon=epsilon, temperature=2)
    terms = [value(alone, each, teachers) for each in (student.logits, *logits)]
    torch.testing.assert_close(found, terms[0] + branches * sum(terms[1:]))
    if epsilon == 1:
        target = teachers.probs(2)
        entropy = -(target * target.log()).sum(-1).mean()
        for each, term in zip((student.logits, *logits), terms, strict=True):
            torch.testing.assert_close(term, F.cross_entropy(each / 2, target))
            torch.testing.assert_close(term, value(Kd(temperature=2), each, teachers) / 4 + entropy)


def test_earlier_stages_have_more_separable_blocks_of_double_width_up_to_the_last_stages():
    widths = [
        [module.num_features for module in branch.modules() if isinstance(module, nn.BatchNorm2d)][1::2]
        for branch in prepared().branches
    ]
    assert widths == [[4, 8, 10], [10, 10], [10], []]
    sides = [
        list(branch[:-3](each).shape[1:]) for branch, each in zip(prepared().branches, outputs().maps, strict=True)
    ]
    assert sides == [[10, 1, 1]] * 4


def test_later_stages_of_tokens_have_fewer_attention_blocks_but_one():
    assert [len(branch.blocks) for branch in prepared(((9, 6),) * 4).branches] == [3, 2, 1, 1]


@pytest.mark.parametrize(
    ("tokens", "left"), [(49, 49), (100, 100), (196, 49), (225, 64), (784, 49), (197, 197), (200, 200)]
)
def test_large_squares_of_tokens_are_merged(tokens, left):
    branch, seen = TokenBranch(tokens, 6, 1, CLASSES), []
    assert branch.blocks[0].attn.num_heads == 2  # four do not divide the width
    branch.norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape))
    given = torch.randn(2, tokens, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    branch(given).sum().backward()
    assert seen == [(2, left, 6)]
    assert (given.grad.abs().sum(dim=(0, 2)) > 0).all()  # none is cut off


@pytest.mark.parametrize("shapes", [PYRAMID, TOKENS])
def test_gradient_goes_to_stages_and_branches_and_not_to_the_teachers(shapes):
    loss, student, teachers = prepared(shapes).train(), outputs(shapes), panel(2)
    for tensor in (student.logits, *student.maps, teachers.logits, teachers.weights):
        tensor.requires_grad_()
    loss(student, teachers, LABELS).backward()
    assert all(each.grad.abs().sum() > 0 for each in (student.logits, *student.maps))
    assert all(parameter.grad.abs().sum() > 0 for parameter in loss.parameters())
    assert teachers.logits.grad is None
    assert teachers.weights.grad is None
    plain = student.logits.detach().requires_grad_()
    value(Ofa(), plain, teachers).backward()
    torch.testing.assert_close(student.logits.grad, plain.grad)


def test_branches_work_in_float32_on_half_maps_and_under_autocast():
    shapes = (*PYRAMID[:1], *TOKENS)
    loss, student = prepared(shapes).float(), outputs(shapes)
    teachers = TeacherOutputs(panel().logits.float(), panel().weights.float())
    half = Outputs(student.logits.bfloat16(), maps=tuple(each.bfloat16() for each in student.maps))
    full = Outputs(half.logits.float(), maps=tuple(each.float() for each in half.maps))
    expected = loss(full, teachers, LABELS)
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(half, teachers, LABELS), expected)


def test_refuses_students_without_stages_and_other_ones_than_announced():
    with pytest.raises(ShapeError, match="0 maps of the student.*Set branches to 0"):
        prepared(())
    for other in (PYRAMID[:-1], (*PYRAMID[:-1], (10, 2, 1))):
        with pytest.raises(ShapeError, match="Use the student and the image size the loss was prepared for"):
            prepared()(outputs(other), panel(), LABELS)


def test_one_sample_is_refused_only_where_branches_normalise_over_the_batch():
    teachers = TeacherOutputs(randn(1, 1, CLASSES), torch.ones(1, 1).double())
    with pytest.raises(ShapeError, match="Raise train.batch_size"):
        prepared().train()(outputs(batch=1), teachers, LABELS[:1])
    for shapes in (TOKENS, PYRAMID[-1:]):
        assert torch.isfinite(prepared(shapes).train()(outputs(shapes, batch=1), teachers, LABELS[:1]))


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    return [stored(tiny_dataset(validation=16), tmp_path_factory.mktemp("outputs") / "8", width=8, seed=8)]


def test_branches_learn_resume_and_stay_out_of_the_student(teachers, tmp_path):
    data, loss = tiny_dataset(validation=16), Ofa(branches=1.0, epsilon=1.5)
    start = fresh_parts(loss, net(6, seed=3), teachers, data)
    student, parts, history = distilled(loss, teachers, data, tmp_path / "whole")
    assert sorted(parts) == sorted(start)
    assert all(name.startswith("0.branches.") for name in parts)
    for name, value_now in parts.items():
        if name.endswith(("weight", "bias")):
            assert (value_now - start[name]).abs().max() > 1e-4, name
    assert history.rows[-1]["ofa"] < history.rows[0]["ofa"]

    assert list(student.state_dict()) == list(net(6, seed=3).state_dict())
    bare, images = net(6, seed=4), torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    bare.load_state_dict(student.state_dict())
    assert torch.equal(bare.eval()(images), student.eval()(images))

    with pytest.raises(Stop):
        distilled(loss, teachers, data, tmp_path / "cut", on_step=stop_at(7))
    again, parts_again, _ = distilled(loss, teachers, data, tmp_path / "cut")
    assert_same(again.state_dict(), student.state_dict())
    assert_same(parts_again, parts)
