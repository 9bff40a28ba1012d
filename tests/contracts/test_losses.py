"""What every loss must keep to; a new loss adds one row to CASES."""

import importlib
import pkgutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import compression.distill.losses as package
from compression.augment import NoAugment
from compression.card import MethodCard
from compression.data.dataset import Dataset, Split
from compression.distill import (
    Aggregated,
    AnyLoss,
    Auxiliary,
    BdKd,
    ClassRelation,
    CrossEntropy,
    Dhkd,
    Dist,
    Dkd,
    Helper,
    Kd,
    MixStd,
    MultiAspect,
    Nd,
    NormalisedFeatures,
    Ofa,
    Pld,
    ProcKd,
    Shapes,
    SigmoidKd,
    Sinkd,
    Talking,
    Tgeo,
    TopKld,
    Trg,
)
from compression.distill.types import LossFn
from compression.errors import ShapeError
from compression.teacher_outputs import OutputsSpec
from compression.types import Frozen, Outputs, Preprocessing, TeacherOutputs


@dataclass(frozen=True)
class Case:
    """A loss, and which of the shared properties its formula has; a false one is explained at the row."""

    config: AnyLoss
    shift_invariant: bool = True
    """A constant added to a row of logits changes nothing."""
    batch_mean: bool = True
    """The loss of a batch is the mean over its samples."""
    teacher_order: bool = True
    """Teachers may change places."""
    still: tuple[str, ...] = ()
    """Last names of parts that get no gradient in an only epoch."""


ANSWERS = Path(tempfile.mkdtemp()) / "answers.npz"
np.savez(ANSWERS, answers=np.random.default_rng(0).random((15, 3), dtype=np.float32), ids=np.arange(15))

CASES = [
    Case(CrossEntropy()),
    Case(CrossEntropy(label_smoothing=0.1)),
    Case(Kd()),
    Case(Kd(temperature=1.0)),
    Case(Kd(temperature=8.0)),
    Case(Pld()),
    Case(Pld(temperature=4.0, label_floor=0.1)),
    Case(Dkd()),
    Case(Dkd(alpha=0.0, temperature=1.0)),
    Case(Dist(), batch_mean=False),  # correlates the samples of the batch
    Case(Dist(gamma=0.0, temperature=4.0)),
    Case(BdKd()),
    Case(BdKd(temperature=1.0, delta=1.0)),
    Case(TopKld()),
    Case(TopKld(top_k=2, temperature=2.0)),
    Case(Ofa()),
    Case(Ofa(temperature=2.0, epsilon=1.5)),
    Case(Sinkd(), batch_mean=False),  # matches the batch as a set
    Case(Sinkd(debiased=True, epsilon=0.5), batch_mean=False),  # the same
    Case(Dhkd()),
    Case(Dhkd(centred=False, temperature=1.0), shift_invariant=False),  # its head follows absolute logits
    # A teacher has its own projector and class means. In training the projector's batch norm also ties the batch.
    Case(Nd(), teacher_order=False),
    # Measures by the batch; a teacher has its own linear layers.
    Case(NormalisedFeatures(), batch_mean=False, teacher_order=False),
    Case(NormalisedFeatures(running=True), batch_mean=False, teacher_order=False),
    Case(Ofa(branches=1.0)),
    Case(Ofa(temperature=2.0, epsilon=1.5, branches=0.5)),
    # Ties patches of the whole batch; a teacher has its own projections.
    Case(Trg(), batch_mean=False, teacher_order=False),
    # A teacher has its own codebook, which stands still in the second phase.
    Case(ProcKd(), teacher_order=False, still=("prototypes",)),
    Case(MixStd()),
    Case(Talking(), teacher_order=False),
    Case(Aggregated(), batch_mean=False, teacher_order=False),
    Case(Tgeo()),
    Case(SigmoidKd(), shift_invariant=False),
    Case(SigmoidKd(self_paced=True), shift_invariant=False, teacher_order=False),
    Case(ClassRelation()),
    Case(MultiAspect(answers=ANSWERS)),
    Case(Auxiliary()),
]

BATCH, CLASSES, TEACHERS = 6, 5, 2
STUDENT_MAPS = ((3, 4, 4), (4, 2, 2))
TEACHER_MAPS = (((5, 4, 4), (7, 2, 2)), ((4, 6), (4, 3)))  # images of the first teacher, tokens of the second
SHAPES = Shapes(
    num_classes=CLASSES,
    student_width=4,
    teacher_widths=(7, 3),
    student_maps=STUDENT_MAPS,
    teacher_maps=TEACHER_MAPS,
    num_teachers=TEACHERS,
)


class Stored:
    """What a teacher of SHAPES said about OBSERVED, whatever the view."""

    spec = OutputsSpec(views=1, seed=0, augment=NoAugment(), features=True)
    class_names = tuple("abcde")

    def __init__(self, number: int) -> None:
        self._logits = randn(len(OBSERVED.train.ids), CLASSES, seed=41 + number)
        self._features = randn(len(OBSERVED.train.ids), SHAPES.teacher_widths[number], seed=51 + number)
        self.validation_logits = self._logits[:CLASSES]

    def logits(self, ids: torch.Tensor, view: int) -> torch.Tensor:
        return self._logits[ids]

    def features(self, ids: torch.Tensor, view: int) -> torch.Tensor:
        return self._features[ids]


def split(start: int, stop: int) -> Split:
    """Samples by number, the classes in turn."""
    ids = torch.arange(start, stop)
    return Split(images=torch.zeros(len(ids), 1, 2, 2), labels=ids % CLASSES, ids=ids)


OBSERVED = Dataset(
    name="observed",
    class_names=Stored.class_names,
    preprocessing=Preprocessing(scale=1.0, mean=(0.0,), std=(1.0,)),
    train=split(0, 15),
    validation=split(15, 20),
    calibration=split(20, 25),
    test=split(25, 30),
    hashes={},
)


def built(config: AnyLoss) -> LossFn:
    """The loss, ready for SHAPES, after a look at OBSERVED; the parts of a helper do not drop out."""
    loss = config.build()
    if isinstance(loss, Helper):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            loss.prepare(SHAPES)
        loss.observe([Stored(number) for number in range(TEACHERS)], OBSERVED)
        loss.eval()
    return loss


@pytest.fixture(params=CASES, ids=[f"{number}-{case.config.kind}" for number, case in enumerate(CASES)])
def case(request) -> Case:
    return request.param


@pytest.fixture
def loss(case: Case) -> LossFn:
    return built(case.config)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def student_of(logits: torch.Tensor, features: torch.Tensor | None = None) -> Outputs:
    """Student outputs with the logits, and features that do not depend on them."""
    given = randn(len(logits), SHAPES.student_width, seed=21) if features is None else features
    return Outputs(logits, {"penultimate": given.to(logits.dtype)}, maps_of(SHAPES.student_maps, logits, seed=61))


def maps_of(shapes: tuple[tuple[int, ...], ...], like: torch.Tensor, seed: int) -> tuple[torch.Tensor, ...]:
    """Positive feature maps for the batch of ``like``, as after a rectifier."""
    return tuple(
        randn(like.shape[-2], *shape, seed=seed + number).abs().to(like.dtype) for number, shape in enumerate(shapes)
    )


def panel(logits: torch.Tensor) -> TeacherOutputs:
    weights = torch.full(logits.shape[:2], 1.0 / len(logits), dtype=logits.dtype)
    features = tuple(
        randn(logits.shape[1], width, seed=31 + number).to(logits.dtype)
        for number, width in enumerate(SHAPES.teacher_widths[: len(logits)])
    )
    maps = tuple(
        maps_of(shapes, logits, seed=71 + 10 * number)
        for number, shapes in enumerate(SHAPES.teacher_maps[: len(logits)])
    )
    return TeacherOutputs(logits, weights, features, maps, torch.arange(logits.shape[1]))


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
    assert {type(case.config) for case in CASES} == set(get_args(AnyLoss))
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
    value = loss(student_of(student), teachers, labels)
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert torch.isfinite(value)
    assert value >= 0


def test_gradient_goes_to_the_student_alone(loss):
    student, teachers, labels = inputs()
    features = randn(BATCH, SHAPES.student_width, seed=21)
    ours = student_of(student, features)
    taught = (student, features, *ours.maps)
    teaching = (
        teachers.logits,
        teachers.weights,
        *teachers.features,
        *(each for maps in teachers.maps for each in maps),
    )
    for tensor in (*taught, *teaching):
        tensor.requires_grad_()
    loss(ours, teachers, labels).backward()
    assert sum(float(each.grad.abs().sum()) for each in taught if each.grad is not None) > 0
    for tensor in teaching:
        assert tensor.grad is None


def test_parts_of_a_helper_learn_and_make_the_round_trip(case):
    loss = built(case.config)
    if not isinstance(loss, Helper):
        return
    student, teachers, labels = inputs()
    value = loss(student_of(student.requires_grad_()), teachers, labels)
    value.backward()
    itself = {id(parameter) for parameter in loss.self_trained()}
    for name, parameter in loss.named_parameters():
        still = id(parameter) in itself or name.rsplit(".", 1)[-1] in case.still
        assert (parameter.grad is None) == still, name
    again = case.config.build()
    again.prepare(SHAPES)
    again.load_state_dict(loss.state_dict())
    torch.testing.assert_close(again.eval()(student_of(student), teachers, labels), value)


def test_order_of_the_batch_changes_nothing(loss):
    student, teachers, labels = inputs()
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(3))
    whole = student_of(student)
    torch.testing.assert_close(
        loss(whole.rows(order), teachers.rows(order), labels[order]), loss(whole, teachers, labels)
    )


def test_order_of_the_teachers_changes_nothing(case, loss):
    student, teachers, labels = inputs()
    swapped = TeacherOutputs(
        teachers.logits.flip(0), teachers.weights.flip(0), teachers.features[::-1], teachers.maps[::-1], teachers.ids
    )
    if case.teacher_order:
        torch.testing.assert_close(
            loss(student_of(student), swapped, labels), loss(student_of(student), teachers, labels)
        )


def test_is_a_mean_over_the_batch(case, loss):
    student, teachers, labels = inputs()
    whole = student_of(student)
    singles = [loss(whole.rows(row), teachers.rows(row), labels[row]) for row in torch.arange(BATCH).split(1)]
    if case.batch_mean:
        torch.testing.assert_close(torch.stack(singles).mean(), loss(whole, teachers, labels))


@pytest.mark.parametrize("scale", [1e3, 1e4])
def test_finite_value_and_gradient_at_extreme_logits(loss, scale):
    student, teachers, labels = inputs()
    student = (student * scale).requires_grad_()
    features = randn(BATCH, SHAPES.student_width, seed=21).requires_grad_()
    extreme = replace(teachers, logits=teachers.logits * scale)
    value = loss(student_of(student, features), extreme, labels)
    value.backward()
    assert torch.isfinite(value)
    for tensor in (student, features):
        assert tensor.grad is None or torch.isfinite(tensor.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_widened(loss, dtype):
    student, teachers, labels = inputs()
    narrow = student.to(dtype)
    features = randn(BATCH, SHAPES.student_width, seed=21).to(dtype)
    given = student_of(narrow, features)
    half = loss(given, teachers, labels)
    assert half.dtype == torch.float32
    wide = Outputs(narrow.float(), {"penultimate": features.float()}, tuple(each.float() for each in given.maps))
    torch.testing.assert_close(half, loss(wide, teachers, labels))


def test_works_under_autocast(loss):
    student, teachers, labels = inputs()
    expected = loss(student_of(student), teachers, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(loss(student_of(student), teachers, labels), expected)


def test_invariant_to_a_shift_of_any_row(case, loss):
    student, teachers, labels = inputs()
    shifts = randn(TEACHERS, BATCH, 1, seed=8)
    shifted = replace(teachers, logits=teachers.logits + shifts)
    if case.shift_invariant:
        torch.testing.assert_close(
            loss(student_of(student + randn(BATCH, 1, seed=9)), shifted, labels),
            loss(student_of(student), teachers, labels),
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
