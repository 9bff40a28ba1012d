"""The teacher moves slowly beside its student, the student sees it as it is, and the original stays as it was."""

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

from compression.data.dataset import Dataset, without_labels
from compression.distill import AnyLoss, BdKd, CrossEntropy, DistillationStep, DistillConfig, Helper, Kd, Nd
from compression.distill.losses.kd import kd
from compression.distill.procedures import Training
from compression.distill.procedures.online_teacher import (
    MovedTeacher,
    Moves,
    OnlineTeacher,
    TrainsTeacher,
    teacher_loss,
)
from compression.errors import CompressionError
from compression.features import looked_at
from compression.train import Hardware, TrainConfig
from compression.train.step_checkpoint import load_state
from compression.types import Batch, Outputs, TeacherOutputs
from tests.compression.losses.short_training import SHIFT, Stop, assert_same, net, stop_at, stored
from tests.compression.tiny_data import CLASSES, tiny_dataset

BATCH = 6
LABELS = torch.tensor([0, 3, -1, 1, 2, -1])
IMAGES = torch.randn(BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """The suite's own fixture, for every test here."""


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# ---------------------------------------------------------------- the teacher's own loss


def test_teacher_learns_labels_and_is_drawn_to_the_student():
    teacher = randn(BATCH, 4, seed=1, dtype=torch.float64).requires_grad_()
    student = randn(BATCH, 4, seed=2, dtype=torch.float64).requires_grad_()
    loss = teacher_loss(teacher, student, LABELS, weight=0.5, temperature=4.0)
    loss.backward()
    known = LABELS >= 0
    theirs, ours = ((each / 4.0).softmax(-1) for each in (teacher, student))
    pull = 16.0 * (theirs * (theirs / ours).log()).sum(-1).mean()
    hard = F.cross_entropy(teacher[known], LABELS[known], reduction="sum") / BATCH
    torch.testing.assert_close(loss, hard + 0.5 * pull)
    assert student.grad is None
    assert (teacher.grad.abs().amax(-1) > 0).all()


def test_pull_is_zero_at_equality_and_for_any_shift_of_a_row():
    logits = randn(BATCH, 4, dtype=torch.float64).requires_grad_()
    none = torch.full_like(LABELS, -1)
    loss = teacher_loss(logits, logits.detach() + randn(BATCH, 1, seed=1), none, weight=1.0, temperature=2.0)
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert logits.grad.abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_give_a_finite_float32_value_and_gradient(dtype):
    teacher = (1e4 * randn(BATCH, 4, seed=1)).to(dtype).requires_grad_()
    loss = teacher_loss(teacher, (1e4 * randn(BATCH, 4, seed=2)).to(dtype), LABELS, weight=1.0, temperature=1.0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(teacher.grad).all()


# ---------------------------------------------------------------- a teacher that moves


def test_starts_out_as_the_teacher_and_says_so_without_gradient_where_none_is_wanted():
    teacher = net(8, seed=1).eval()
    moves = Moves(teacher, 0.01)
    online = MovedTeacher(teacher, moves)
    with torch.no_grad():
        logits = online(IMAGES)
        torch.testing.assert_close(logits, teacher(IMAGES), rtol=0, atol=0)
    assert not logits.requires_grad
    online.latest.square().sum().backward()
    assert all(move.grad.abs().max() > 0 for move in moves.parameters())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_gradient_reaches_the_images_where_it_is_wanted():
    teacher = net(8, seed=1).eval()
    images, same = IMAGES.clone().requires_grad_(), IMAGES.clone().requires_grad_()
    MovedTeacher(teacher, Moves(teacher, 0.01))(images).square().sum().backward()
    teacher(same).square().sum().backward()
    torch.testing.assert_close(images.grad, same.grad)


def test_a_step_of_adam_moves_every_weight_by_the_share_of_the_learning_rate():
    teacher = net(8, seed=1).eval()
    moves = Moves(teacher, 0.01)
    online = MovedTeacher(teacher, moves)
    optimizer = torch.optim.AdamW(moves.parameters(), lr=0.1, weight_decay=0.5)
    before = {name: parameter.detach().clone() for name, parameter in teacher.named_parameters()}
    (1e3 * F.cross_entropy(online(IMAGES), LABELS, ignore_index=-1)).backward()
    optimizer.step()
    applied = moves.applied(teacher)
    for name, parameter in teacher.named_parameters():
        assert torch.equal(parameter, before[name]), name
    for name in ("0.weight", "5.weight"):
        distance = (applied[name] - before[name]).abs()
        torch.testing.assert_close(distance.max(), torch.tensor(0.01 * 0.1), rtol=1e-3, atol=0)
        assert distance.max() <= 0.01 * 0.1 * 1.001


def test_features_and_stages_are_those_of_the_moved_teacher():
    teacher, like = net(8, seed=1).eval(), net(8, seed=1).eval()
    moves = Moves(teacher, 0.5)
    with torch.no_grad():
        for number, (move, parameter) in enumerate(zip(moves.moves, like.parameters(), strict=True)):
            move.copy_(randn(*move.shape, seed=number))
            parameter.add_(0.5 * move)
        found = looked_at(MovedTeacher(teacher, moves), IMAGES, features=True, stages=("2", "3"))
        expected = looked_at(like, IMAGES, features=True, stages=("2", "3"))
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.features["penultimate"], expected.features["penultimate"])
    for ours, theirs in zip(found.maps, expected.maps, strict=True):
        torch.testing.assert_close(ours.detach(), theirs)


class Skewed(Helper):
    """A combination with a term of its own."""

    def forward(self, teachers: torch.Tensor, labels: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        return torch.tensor([0.25, 0.75]).unsqueeze(1).expand(2, len(labels))

    def terms(self, student: Outputs, teachers: TeacherOutputs, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"own": student.logits.new_tensor(3.0)}


def test_the_configured_combination_keeps_its_weights_and_its_terms():
    teacher = net(8, seed=1).eval()
    online = MovedTeacher(teacher, Moves(teacher, 0.01))
    combine = TrainsTeacher(Skewed(), online, weight=1.0, temperature=2.0)
    logits, student = torch.stack([online(IMAGES).detach(), randn(BATCH, 4)]), randn(BATCH, 4, seed=2)
    weights = combine(logits, LABELS, student)
    assert weights[:, 0].tolist() == [0.25, 0.75]
    terms = combine.terms(Outputs(student), TeacherOutputs(logits, weights), LABELS)
    assert list(terms) == ["own", "online_teacher"]
    expected = teacher_loss(logits[0], student, LABELS, weight=1.0, temperature=2.0)
    torch.testing.assert_close(terms["online_teacher"].detach(), expected)
    assert not list(combine.parameters())


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return tiny_dataset(validation=16)


@pytest.fixture(scope="module")
def panel(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs")
    return [stored(dataset, folder / str(width), width=width, seed=width) for width in (8, 6)]


def training(panel, dataset, folder, *, losses: tuple[AnyLoss, ...] = (CrossEntropy(), BdKd()), **changes) -> Training:
    """12 steps in 3 epochs on labels and the teachers behind the panel."""
    train = TrainConfig(epochs=3, batch_size=16, learning_rate=0.01, checkpoint_every_steps=2)
    given = {
        "student": net(6, seed=3),
        "panel": panel,
        "teachers": [net(width, seed=width) for width in (8, 6)[: len(panel)]],
        "dataset": dataset,
        "config": DistillConfig(train=train, losses=losses, views=2),
        "seed": 0,
        "augment": SHIFT,
        "hardware": Hardware(accelerator="cpu"),
        "checkpoint_dir": folder,
    }
    return Training(**(given | changes))


def test_the_teacher_learns_resumes_and_its_original_stays(panel, dataset, tmp_path):
    procedure, whole = OnlineTeacher(learning_rate_share=0.5).build(), training(panel[:1], dataset, tmp_path / "whole")
    rows = procedure(whole).rows
    assert rows[-1]["online_teacher"] < rows[0]["online_teacher"]
    assert_same(whole.teachers[0].state_dict(), net(8, seed=8).state_dict())
    assert list(whole.student.state_dict()) == list(net(6, seed=3).state_dict())
    moves = load_state(tmp_path / "whole")["helpers"]
    assert [list(move.shape) for move in moves.values()] == [list(each.shape) for each in net(8, seed=8).parameters()]
    assert all(move.abs().max() > 1e-3 for move in moves.values())

    with pytest.raises(Stop):
        procedure(training(panel[:1], dataset, tmp_path / "cut", on_step=stop_at(7)))
    again = training(panel[:1], dataset, tmp_path / "cut")
    procedure(again)
    assert_same(again.student.state_dict(), whole.student.state_dict())
    assert_same(load_state(tmp_path / "cut")["helpers"], moves)


def test_a_teacher_that_hardly_moves_teaches_like_one_that_stays(panel, dataset):
    stays, moves, live = (training(panel, dataset, None) for _ in range(3))
    OnlineTeacher(learning_rate_share=1e-9).build()(stays)
    OnlineTeacher(learning_rate_share=1.0).build()(moves)
    live.run(step=DistillationStep(live.config.losses, live.config.teachers, (), live.teachers, epochs=3))
    with torch.no_grad():
        expected = live.student(IMAGES)
        torch.testing.assert_close(stays.student(IMAGES), expected, rtol=0, atol=1e-4)
        assert (moves.student(IMAGES) - expected).abs().max() > 1e-2


def test_the_student_sees_the_first_teacher_as_it_is_now_and_the_others_as_they_are(panel, dataset):
    given = training(panel, dataset, None, losses=(CrossEntropy(), Kd(weight=1.0, temperature=2.0)))
    step, moves = OnlineTeacher(learning_rate_share=0.1).step_of(given)
    labels = torch.arange(BATCH) % len(CLASSES)
    moved, other = net(8, seed=8).eval(), net(6, seed=6).eval()
    with torch.no_grad():
        for move, parameter in zip(moves.moves, moved.parameters(), strict=True):
            move.add_(1.0)
            parameter.add_(0.1)
        terms = step(given.student, Batch(IMAGES, labels, labels, view=0, epoch=0, step=0))
        teachers = TeacherOutputs(torch.stack([moved(IMAGES), other(IMAGES)]), torch.full((2, BATCH), 0.5))
        expected = kd(Outputs(given.student(IMAGES)), teachers, labels, temperature=2.0)
    torch.testing.assert_close(terms["kd"], expected)


def test_losses_on_features_follow_the_moved_teacher(panel, dataset, tmp_path):
    given = training(panel, dataset, tmp_path, losses=(CrossEntropy(), Nd()))
    rows = OnlineTeacher().build()(given).rows
    assert rows[-1]["nd"] < rows[0]["nd"]


def test_teachers_and_labels_must_be_there(panel, dataset):
    procedure = OnlineTeacher().build()
    with pytest.raises(CompressionError, match=r"outputs of 2 teachers and 0 teachers.*Give them as teachers"):
        procedure(training(panel, dataset, None, teachers=()))
    with pytest.raises(CompressionError, match=r"'blobs' has 0 labels for 64 samples.*Set distill.labels to all"):
        procedure(training(panel, without_labels(dataset), None))


@pytest.mark.parametrize(
    "wrong", [{"learning_rate_share": 0}, {"learning_rate_share": 1.5}, {"weight": -1}, {"temperature": 0}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        OnlineTeacher.model_validate(wrong)
