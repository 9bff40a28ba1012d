"""TGeo-KD: what the controller sees, how it learns, that the student does not notice, and training with it."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from compression.augment import NoAugment, normalise
from compression.distill import CrossEntropy, DistillationStep, Kd, Shapes, Uniform
from compression.distill.losses import tgeo
from compression.distill.losses.tgeo import (
    FusionRatio,
    HeldOut,
    Tgeo,
    fused,
    fused_gradient,
    geometry,
    held_out,
    usual_answers,
)
from compression.errors import CompressionError, ShapeError
from compression.teacher_outputs import OutputsSpec
from compression.types import Batch, Outputs, TeacherOutputs
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

BATCH, WIDTH = 6, 5
LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Teacher:
    """Stored outputs whose logits are a function of the sample's id."""

    spec = OutputsSpec(views=1, seed=0, augment=NoAugment(), features=False)
    class_names = CLASSES
    validation_logits = torch.zeros(16, len(CLASSES))

    def __init__(self, pitch: float = 0.7) -> None:
        self.pitch, self.asked = pitch, []

    def logits(self, ids: Tensor, view: int) -> Tensor:
        assert view == 0
        self.asked.append(len(ids))
        return 3 * torch.sin(ids.unsqueeze(-1) * torch.arange(1, len(CLASSES) + 1) * self.pitch)

    def features(self, ids: Tensor, view: int) -> Tensor:
        raise AssertionError("logits are enough")


def prepared(classes: int = len(CLASSES), width: int = WIDTH, **options) -> FusionRatio:
    """The loss in float64; nothing observed yet."""
    loss = Tgeo(**options).build()
    assert isinstance(loss, FusionRatio)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss.prepare(Shapes(num_classes=classes, student_width=width))
    return loss.double()


def observed(**options) -> FusionRatio:
    """The loss in float32, after a look at the tiny data."""
    loss = prepared(width=6, **options).float()
    loss.observe([Teacher(), Teacher(1.3)], tiny_dataset(validation=16))
    return loss


def outputs(logits: Tensor, features: Tensor | None = None) -> Outputs:
    return Outputs(logits, {} if features is None else {"penultimate": features})


def panel(*logits: Tensor) -> TeacherOutputs:
    said = torch.stack(logits)
    return TeacherOutputs(said, torch.full_like(said[..., 0], 1 / len(said)))


def batch_of(size: int = 16, step: int = 0) -> Batch:
    split = tiny_dataset(validation=16).train
    images = normalise(split.images[:size], tiny_dataset(validation=16).preprocessing)
    return Batch(images=images, labels=split.labels[:size], ids=split.ids[:size], view=0, epoch=0, step=step)


def controller_of(loss: FusionRatio) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in loss.controller.state_dict().items()}


# ---------------------------------------------------------------- what the controller sees


def test_describes_a_sample_by_five_distances_and_four_probabilities():
    student = torch.tensor([[0.5, 0.5, 0.0], [0.2, 0.3, 0.5]])
    teacher = torch.tensor([[0.0, 1.0, 0.0], [0.2, 0.3, 0.5]])
    usual = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]])
    found = geometry(student, teacher, usual, torch.tensor([0, 2]))
    expected = torch.tensor(
        [
            [0.0, 0.5, 0.5, 2.0, 0.5, 0.5, 0.0, 0.5, 1.0],
            [0.38, 0.38, 0.0, 0.38, 0.0, 0.5, 0.5, 1.0, 0.5],
        ]
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_measures_stay_in_their_range(scale):
    student, teacher, usual = ((randn(50, 7, seed=k) * scale).softmax(-1) for k in range(3))
    found = geometry(student, teacher, usual, torch.arange(50) % 7)
    assert found.shape == (50, 9)
    assert found.min() >= 0
    assert found[:, :5].max() <= 2 + 1e-12
    assert found[:, 5:].max() <= 1 + 1e-12


def test_the_ratio_of_a_sample_does_not_depend_on_the_others():
    loss = prepared()
    measures = geometry(*(randn(BATCH, 4, seed=k).softmax(-1) for k in range(3)), LABELS)
    ratio = loss.ratio(measures)
    assert ((ratio > 0) & (ratio < 1)).all()
    assert ratio.std() > 1e-4
    order = torch.randperm(BATCH, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(loss.ratio(measures[order]), ratio[order])
    torch.testing.assert_close(torch.cat([loss.ratio(row.unsqueeze(0)) for row in measures]), ratio)


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_usual_answers_are_the_mean_over_each_class(monkeypatch, chunk):
    monkeypatch.setattr(tgeo, "CHUNK", chunk)
    data, teachers = tiny_dataset(validation=16), [Teacher(), Teacher(1.3)]
    labels = data.train.labels.clone()
    labels[labels == 2] = 3
    labels[5] = -1
    data = replace(data, train=replace(data.train, labels=labels))
    found = usual_answers(teachers, data)
    assert max(teachers[0].asked) == min(chunk, 63)
    for c in (0, 1, 3):
        ids = data.train.ids[labels == c]
        probs = [teacher.logits(ids, 0).softmax(-1).mean(0) for teacher in teachers]
        torch.testing.assert_close(found[c], (probs[0] + probs[1]) / 2)
    assert torch.equal(found[2], torch.zeros(4))


# ---------------------------------------------------------------- the loss


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_with_a_constant_ratio_it_is_kd_and_cross_entropy_with_fixed_weights(share):
    loss, teachers = prepared(temperature=2.0), panel(randn(BATCH, 4, seed=1), randn(BATCH, 4, seed=2))
    with torch.no_grad():
        loss.controller[-1].weight.zero_()
        loss.controller[-1].bias.fill_(torch.logit(torch.tensor(share)))
    student = randn(BATCH, 4).requires_grad_()
    kd = Kd(temperature=2.0).build()(Outputs(student), teachers, LABELS)
    expected = share * kd + (1 - share) * F.cross_entropy(student, LABELS)
    found = loss(outputs(student), teachers, LABELS)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    by_hand, by_loss = (torch.autograd.grad(each, student)[0] for each in (expected, found))
    torch.testing.assert_close(by_loss, by_hand, rtol=1e-6, atol=1e-6)


def test_the_loss_gives_the_student_a_gradient_and_the_controller_none():
    loss, student = prepared(), randn(BATCH, 4).requires_grad_()
    loss(outputs(student), panel(randn(BATCH, 4, seed=1)), LABELS).backward()
    assert student.grad.abs().max() > 1e-3
    assert all(each.grad is None for each in loss.parameters())
    assert {id(each) for each in loss.self_trained()} == {id(each) for each in loss.parameters()}


def test_gradient_by_the_logits_in_closed_form():
    logits, softened = randn(BATCH, 4).requires_grad_(), (randn(BATCH, 4, seed=1) / 1.5).softmax(-1)
    ratio = torch.rand(BATCH, generator=torch.Generator().manual_seed(2)).double()
    value = fused(logits, softened, LABELS, ratio, temperature=1.5)
    (expected,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(fused_gradient(logits, softened, LABELS, ratio, temperature=1.5), expected)


# ---------------------------------------------------------------- how the controller learns


@pytest.mark.parametrize("bias", [False, True])
def test_controller_gradient_is_that_of_finite_differences_on_a_tiny_student(bias):
    """The virtual step is made on the real student, by automatic differentiation; without bias it has 2 parameters."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=bias)).double()
    loss, labels = prepared(classes=2, width=1, inner_rate=0.7), torch.tensor([0, 1, 1, 0])
    images, seen, theirs = randn(4, 1, 1, 1), randn(8, 1, 1, 1, seed=1), randn(4, 2, seed=2) * 2
    answers = torch.tensor([0, 1] * 4)
    softened, teacher = (theirs / loss.temperature).softmax(-1), theirs.softmax(-1)
    usual = torch.full((4, 2), 0.5).double()
    logits = student(images).detach()
    measures = geometry(logits.softmax(-1), teacher, usual, labels)

    def unrolled() -> float:
        ratio = loss.ratio(measures).detach()
        value = fused(student(images), softened, labels, ratio, temperature=loss.temperature)
        names, parameters = zip(*student.named_parameters(), strict=True)
        slopes = torch.autograd.grad(value, parameters)
        moved = {name: p - 0.7 * slope for name, p, slope in zip(names, parameters, slopes, strict=True)}
        return F.cross_entropy(torch.func.functional_call(student, moved, (seen,)), answers).item()

    outer = loss.outer_loss(held_out(student, seen, answers), images.flatten(1), logits, softened, measures, labels)
    assert outer.item() == pytest.approx(unrolled(), rel=1e-12)
    largest = 0.0
    for parameter, gradient in zip(loss.self_trained(), torch.autograd.grad(outer, loss.self_trained()), strict=True):
        flat, place = parameter.data.view(-1), int(gradient.abs().argmax())
        middle, values = float(flat[place]), []
        for change in (1e-5, -1e-5):
            flat[place] = middle + change
            values.append(unrolled())
        flat[place] = middle
        slope = float(gradient.view(-1)[place])
        assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-11)
        largest = max(largest, abs(slope))
    assert largest > 1e-5


def test_looks_at_the_batch_at_hand_with_the_classifier_at_hand():
    loss, student, batch = observed(), net(6, seed=3).train(), batch_of()
    loss.before_step(student, batch)
    ahead = loss.ahead
    data = tiny_dataset(validation=16)
    assert sorted(ahead.labels.tolist()) == sorted(data.calibration.labels.tolist())
    assert torch.equal(ahead.weight, student[-1].weight)
    assert torch.equal(ahead.bias, student[-1].bias)
    assert not any(each.requires_grad for each in (ahead.features, ahead.weight, ahead.bias))
    expected = student.eval()(normalise(data.calibration.images[loss.order], data.preprocessing))
    torch.testing.assert_close(F.linear(ahead.features, ahead.weight, ahead.bias), expected)


def test_learns_in_the_step_that_looked_ahead_and_in_no_other():
    loss, student = observed(outer_every=3), net(6, seed=3)
    teachers = panel(randn(16, 4, seed=1).float())
    moved = []
    for step in range(7):
        before, batch = controller_of(loss), batch_of(step=step)
        loss.before_step(student, batch)
        given = outputs(student(batch.images), randn(16, 6, seed=5).float())
        loss(given, teachers, batch.labels).backward()
        moved.append(any(not torch.equal(value, before[name]) for name, value in controller_of(loss).items()))
        assert loss.ahead is None
        assert all(each.grad is None for each in loss.self_trained())
    assert moved == [True, False, False, True, False, False, True]
    assert int(loss.taken) == 3


def test_an_outer_step_that_no_loss_made_is_not_made_later():
    loss, student = observed(outer_every=2), net(6, seed=3)
    loss.before_step(student, batch_of(step=0))
    loss.before_step(student, batch_of(step=1))
    assert loss.ahead is None


def test_held_out_batches_take_turns():
    loss, student, seen = observed(outer_batch=3, outer_every=1), net(6, seed=3), []
    places = loss.order.tolist()
    for count in range(4):
        loss.taken.fill_(count)
        loss.before_step(student, batch_of())
        seen += loss.ahead.labels.tolist()
    assert seen == [(places * 2)[i] % 4 for i in range(12)]


def test_its_optimiser_is_adam_with_the_state_in_buffers():
    """Three steps, with a move to another object in between, end where torch's own do."""
    loss, reference = prepared(controller_rate=0.05), prepared()
    adam = torch.optim.Adam(reference.controller.parameters(), lr=0.05)
    measures = torch.rand(BATCH, 9, generator=torch.Generator().manual_seed(0)).double()
    for number in range(3):
        target = 0.2 * number
        adam.zero_grad()
        (reference.ratio(measures) - target).square().sum().backward()
        adam.step()
        loss._learn((loss.ratio(measures) - target).square().sum())
        again = prepared(controller_rate=0.05)
        again.load_state_dict(loss.state_dict())
        loss = again
    for mine, theirs in zip(loss.self_trained(), reference.controller.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert int(loss.taken) == 3


def test_learns_to_distrust_a_teacher_where_it_is_surely_wrong():
    loss = prepared(classes=2, width=2, controller_rate=0.02)
    labels = torch.arange(32) % 2
    features = F.one_hot(labels, 2).double() * 2 - 1 + 0.3 * randn(32, 2)
    right = torch.arange(32) < 16
    says = torch.where(right, labels, 1 - labels)
    softened = (F.one_hot(says, 2).double() * 8 / loss.temperature).softmax(-1)
    teacher = (F.one_hot(says, 2).double() * 8).softmax(-1)
    ahead = HeldOut(features.flip(0), labels.flip(0), torch.zeros(2, 2).double(), None)
    logits = features @ ahead.weight.T
    measures = geometry(logits.softmax(-1), teacher, torch.full((32, 2), 0.5).double(), labels)
    before = loss.ratio(measures).detach()
    for _ in range(40):
        loss._learn(loss.outer_loss(ahead, features, logits, softened, measures, labels))
    after = loss.ratio(measures).detach()
    assert (before[right].mean() - before[~right].mean()).abs() < 0.1
    assert after[~right].max() < 0.2
    assert after[right].min() > 0.8


# ---------------------------------------------------------------- the student does not notice


def test_the_outer_step_leaves_the_student_and_the_random_state_alone():
    student = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(6, 4)
    )
    student[4].eval()
    student[0].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    modes = [module.training for module in student.modules()]
    flags = [each.requires_grad for each in student.parameters()]
    loss, batch, random = observed(), batch_of(), torch.get_rng_state()
    loss.before_step(student, batch)
    loss(outputs(randn(16, 4).float(), randn(16, 6).float()), panel(randn(16, 4, seed=1).float()), batch.labels)
    assert int(loss.taken) == 1
    assert torch.equal(torch.get_rng_state(), random)
    assert_same(student.state_dict(), before)
    assert [module.training for module in student.modules()] == modes
    assert [each.requires_grad for each in student.parameters()] == flags
    assert all(each.grad is None for each in student.parameters())
    assert all(not module._forward_hooks for module in student.modules())


def test_a_student_that_draws_in_inference_too_does_not_move_the_random_state():
    student = net(6, seed=3)
    student[2].register_forward_hook(lambda _module, _inputs, output: output + torch.rand_like(output))
    loss, random = observed(), torch.get_rng_state()
    loss.before_step(student, batch_of())
    assert torch.equal(torch.get_rng_state(), random)


# ---------------------------------------------------------------- refusals


class Scaled(nn.Module):
    """Logits that are not the classifier's outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net(6, seed=3)

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images) * 2


@pytest.mark.parametrize(
    ("student", "found"),
    [
        (nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten()), "'Sequential' has Conv2d as its last layer"),
        (nn.Sequential(nn.AvgPool2d(4), nn.Flatten()), "'Sequential' has no linear layer"),
        (Scaled(), "'Scaled' has Linear as its last layer, expected a Linear whose outputs are the logits"),
    ],
)
def test_a_student_without_a_plain_linear_classifier_is_refused_and_left_alone(student, found):
    with pytest.raises(CompressionError, match=f"{found}.*Take kd and cross_entropy"):
        observed().before_step(student.train(), batch_of())
    assert all(module.training and not module._forward_hooks for module in student.modules())


def test_teachers_without_stored_outputs_are_refused_before_training():
    step = DistillationStep((CrossEntropy(), Tgeo()), Uniform(), (), [net(8, seed=1)])
    with pytest.raises(CompressionError, match=r"stored outputs of 0 teachers, expected at least 1.*'tgeo'"):
        step.prepare(net(6, seed=3), tiny_dataset(validation=16))


def test_an_empty_calibration_split_is_refused():
    data = tiny_dataset(validation=16)
    none = replace(data.calibration, images=data.calibration.images[:0], labels=data.calibration.labels[:0])
    with pytest.raises(CompressionError, match="Calibration split of data set 'blobs' has 0 samples"):
        prepared().observe([Teacher()], replace(data, calibration=none))


def test_refuses_teachers_of_other_classes():
    with pytest.raises(ShapeError, match="Use teachers of the same classes"):
        prepared()(outputs(randn(BATCH, 4)), panel(randn(BATCH, 5)), LABELS)


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0}, {"inner_rate": 0}, {"controller_rate": 0}, {"outer_every": 0}, {"alpha": 0.5}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        Tgeo.model_validate(wrong)


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    return [stored(tiny_dataset(validation=16), folder / str(width), width=width, seed=width) for width in (6, 8)]


def test_controller_learns_resumes_and_stays_out_of_the_student(teachers, tmp_path):
    data, loss = tiny_dataset(validation=16), Tgeo(outer_every=2, outer_batch=3)
    start = fresh_parts(loss, net(6, seed=3), teachers, data)
    student, parts, history = distilled(loss, teachers, data, tmp_path / "whole")
    assert sorted(parts) == sorted(start)
    assert int(parts["0.taken"]) == 6
    torch.testing.assert_close(parts["0.usual"], usual_answers(teachers, data))
    for key, value in parts.items():
        if key != "0.usual":
            assert (value - start[key]).abs().max() > 1e-9, key
    assert history.rows[-1]["tgeo"] < history.rows[0]["tgeo"]
    assert list(student.state_dict()) == list(net(6, seed=3).state_dict())

    with pytest.raises(Stop):
        distilled(loss, teachers, data, tmp_path / "cut", on_step=stop_at(7))
    again, parts_again, _ = distilled(loss, teachers, data, tmp_path / "cut")
    assert_same(again.state_dict(), student.state_dict())
    assert_same(parts_again, parts)
