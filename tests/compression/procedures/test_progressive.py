"""A group grows member by member, never jumps, learns most where it is wrong, and says what early exit is worth."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

from compression.augment import normalise
from compression.data.dataset import Dataset
from compression.distill import AnyLoss, CrossEntropy, DistillationStep, DistillConfig, Kd, Nd, Uniform
from compression.distill.procedures import Single, Training
from compression.distill.procedures.progressive import (
    Growing,
    Progressive,
    Weighing,
    exits,
    sample_losses,
    sample_weights,
    shared_epochs,
)
from compression.errors import CompressionError
from compression.metrics import evaluate, predict
from compression.train import Hardware, TrainConfig
from compression.train.step_checkpoint import load_state
from compression.types import Batch, TeacherOutputs
from compression.zoo.group import Group, GroupNet, early_exit
from compression.zoo.plain_cnn import PlainCnn
from tests.compression.losses.short_training import SHIFT, Stop, assert_same, net, stored
from tests.compression.tiny_data import CLASSES, tiny_dataset

BATCH = 8
LABELS = torch.tensor([0, 3, 1, 1, 2, 0, 2, 3])
MEMBER = PlainCnn(widths=(8,), depths=(1,), strides=(2,), stem_width=8)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """The suite's own fixture, for every test here."""


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def group(members: int) -> GroupNet:
    """The same fresh networks at every call; the first ones are those of a smaller group."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return GroupNet([MEMBER.build(len(CLASSES), (1, 8, 8)) for _ in range(members)])


# ---------------------------------------------------------------- how much a sample counts


def test_losses_are_those_of_label_and_teachers_per_sample():
    logits = randn(BATCH, 4, seed=1, dtype=torch.float64)
    teachers = TeacherOutputs(randn(2, BATCH, 4, seed=2, dtype=torch.float64), torch.full((2, BATCH), 0.5).double())
    labels = LABELS.clone()
    labels[::3] = -1
    found = sample_losses(logits, teachers, labels, hard_share=0.25, temperature=3.0)
    for row, label in enumerate(labels.tolist()):
        target, ours = teachers.probs(3.0)[row], (logits[row] / 3.0).softmax(-1)
        soft = 9.0 * float((target * (target / ours).log()).sum())
        hard = float(F.cross_entropy(logits[row], torch.tensor(label))) if label >= 0 else None
        expected = soft if hard is None else 0.25 * hard + 0.75 * soft
        assert float(found[row]) == pytest.approx(expected, rel=1e-9)


def test_a_group_that_says_what_its_teacher_says_has_no_loss_but_that_of_the_label():
    logits = randn(BATCH, 4, seed=1)
    teachers = TeacherOutputs(logits.unsqueeze(0), torch.ones(1, BATCH))
    found = sample_losses(logits + 5.0, teachers, LABELS, hard_share=0.5, temperature=2.0)
    torch.testing.assert_close(found, 0.5 * F.cross_entropy(logits, LABELS, reduction="none"))
    assert sample_losses(logits, teachers, LABELS, hard_share=0.0, temperature=2.0).max() < 1e-5


def test_losses_of_extreme_logits_are_finite_and_not_negative():
    teachers = TeacherOutputs(1e4 * randn(2, BATCH, 4, seed=2), torch.full((2, BATCH), 0.5))
    found = sample_losses(1e4 * randn(BATCH, 4), teachers, LABELS, hard_share=0.5, temperature=1.0)
    assert torch.isfinite(found).all()
    assert (found >= 0).all()


def test_weights_are_in_proportion_with_mean_one():
    losses = randn(BATCH).abs()
    weights = sample_weights(losses)
    torch.testing.assert_close(weights.mean(), torch.tensor(1.0))
    torch.testing.assert_close(weights / weights[0], losses / losses[0])
    torch.testing.assert_close(sample_weights(7 * losses), weights)
    assert sample_weights(torch.zeros(BATCH)).tolist() == [1.0] * BATCH


@pytest.mark.parametrize(("epochs", "members", "expected"), [(6, 3, [2, 2, 2]), (8, 3, [3, 3, 2]), (1, 1, [1])])
def test_epochs_are_shared_evenly(epochs, members, expected):
    assert shared_epochs(epochs, members) == expected


# ---------------------------------------------------------------- a group that grows


def test_a_head_of_zeros_changes_nothing_and_members_that_are_done_stay_as_they_are():
    first, second = group(2).members
    nn.init.zeros_(second.head.weight)
    nn.init.zeros_(second.head.bias)
    growing, images = Growing([first], second), randn(BATCH, 1, 8, 8)
    before = {name: value.clone() for name, value in first.state_dict().items()}
    nn.Module.train(growing, True)
    assert not any(module.training for module in first.modules())
    assert all(module.training for module in second.modules())
    logits = growing(images)
    torch.testing.assert_close(logits, first.eval()(images).detach(), rtol=0, atol=0)
    F.cross_entropy(logits, LABELS).backward()
    assert all(parameter.grad is None for parameter in first.parameters())
    assert second.head.weight.grad.abs().max() > 0
    assert_same(first.state_dict(), before)


def test_each_sample_counts_by_what_the_group_before_gets_wrong():
    first, second = group(2).members
    growing, teacher, images = Growing([first], second).train(), net(8, seed=1), randn(BATCH, 1, 8, 8)
    step = DistillationStep((CrossEntropy(weight=0.3), Kd(weight=0.7, temperature=2.0)), Uniform(), (), [teacher])
    step.combine = Weighing(step.combine, growing, hard_share=0.5, temperature=3.0)
    terms = step(growing, Batch(images, LABELS, LABELS, view=0, epoch=0, step=0))
    sum(terms.values()).backward()
    found = [parameter.grad.clone() for parameter in second.parameters()]
    second.zero_grad()

    with torch.no_grad():
        before = first(images)
        teachers = TeacherOutputs(teacher(images).unsqueeze(0), torch.ones(1, BATCH))
    weights = sample_weights(sample_losses(before, teachers, LABELS, hard_share=0.5, temperature=3.0))
    assert weights.max() > 1.2 * weights.min()
    logits = before + second(images)
    hard = F.cross_entropy(logits, LABELS, reduction="none")
    log_probs, target = (logits / 2.0).log_softmax(-1), teachers.probs(2.0)
    soft = 4.0 * (target * (target.log() - log_probs)).sum(-1)
    (weights * (0.3 * hard + 0.7 * soft)).mean().backward()
    for ours, parameter in zip(found, second.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms["cross_entropy"], 0.3 * hard.mean())


def test_weights_of_one_batch_do_not_reach_the_next():
    growing = Growing(group(1).members, group(2).members[1]).train()
    growing(randn(BATCH, 1, 8, 8))
    growing.weights = torch.zeros(BATCH)
    growing(randn(3, 1, 8, 8)).sum().backward()
    assert growing.member.head.bias.grad.tolist() == [3.0] * len(CLASSES)


# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return tiny_dataset(validation=16)


@pytest.fixture(scope="module")
def panel(dataset, tmp_path_factory):
    return [stored(dataset, tmp_path_factory.mktemp("outputs"), width=8, seed=8)]


def training(
    panel,
    dataset,
    student: nn.Module,
    folder=None,
    *,
    epochs: int = 4,
    learning_rate: float = 0.01,
    losses: tuple[AnyLoss, ...] = (CrossEntropy(), Kd()),
    on_step=None,
) -> Training:
    """4 steps an epoch on labels and one teacher."""
    train = TrainConfig(epochs=epochs, batch_size=16, learning_rate=learning_rate, checkpoint_every_steps=3)
    return Training(
        student=student,
        panel=panel,
        teachers=(),
        dataset=dataset,
        config=DistillConfig(train=train, losses=losses, views=2),
        seed=0,
        augment=SHIFT,
        hardware=Hardware(accelerator="cpu"),
        checkpoint_dir=folder,
        on_step=on_step,
    )


def untimed(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_grows_resumes_in_any_part_and_leaves_finished_members_alone(panel, dataset, tmp_path):
    procedure, whole = Progressive().build(), training(panel, dataset, group(3), tmp_path / "whole", epochs=5)
    history = procedure(whole)
    assert [row["epoch"] for row in history.rows] == [0, 1, 2, 3, 4]
    assert history.rows[-1]["validation_nll"] < history.rows[0]["validation_nll"]
    assert not any(module.training for module in whole.student.modules())
    assert all(parameter.requires_grad for parameter in whole.student.parameters())
    assert list(whole.student.state_dict()) == list(group(3).state_dict())
    assert all(member.head.weight.abs().max() > 0 for member in whole.student.members)

    states = [load_state(tmp_path / "whole" / f"member-{number}")["model"] for number in (1, 2, 3)]
    assert_same(whole.student.members[0].state_dict(), states[0])
    for name, value in states[0].items():
        assert torch.equal(states[1][f"done.0.{name}"], value)
        assert torch.equal(states[2][f"done.0.{name}"], value)
    for name, value in whole.student.members[1].state_dict().items():
        assert torch.equal(states[1][f"member.{name}"], value)
        assert torch.equal(states[2][f"done.1.{name}"], value)

    for cut in (5, 13):  # steps: 8 of the first member, 8 of the second, 4 of the third
        left = iter(range(cut))

        def stop(done: int, total: int, left=left) -> None:
            if next(left, None) is None:
                raise Stop

        with pytest.raises(Stop):
            procedure(training(panel, dataset, group(3), tmp_path / str(cut), epochs=5, on_step=stop))
        again = training(panel, dataset, group(3), tmp_path / str(cut), epochs=5)
        rows = procedure(again).rows
        assert_same(again.student.state_dict(), whole.student.state_dict())
        assert untimed(rows) == untimed(history.rows)


def test_a_new_member_starts_where_the_group_was(panel, dataset, tmp_path):
    grown, alone = group(2), training(panel, dataset, group(1).members[0], epochs=1, learning_rate=1e-9)
    Progressive().build()(training(panel, dataset, grown, epochs=2, learning_rate=1e-9))
    Single().build()(alone)
    logits = predict(grown, dataset.validation, dataset.preprocessing)
    torch.testing.assert_close(logits, predict(alone.student, dataset.validation, dataset.preprocessing))


def test_one_member_is_trained_as_ever(panel, dataset):
    lone, plain = group(1), training(panel, dataset, group(1).members[0])
    rows = Progressive().build()(training(panel, dataset, lone)).rows
    expected = Single().build()(plain).rows
    assert_same(lone.members[0].state_dict(), plain.student.state_dict())
    extra = {"early_exit_share", "mean_members_used", "early_exit_accuracy"}
    assert [{k: v for k, v in row.items() if k not in extra} for row in untimed(rows)] == untimed(expected)
    assert (rows[-1]["early_exit_share"], rows[-1]["mean_members_used"]) == (0.0, 1.0)


def test_last_row_says_what_early_exit_does(panel, dataset):
    given = training(panel, dataset, group(2), epochs=6, learning_rate=0.03)
    last = Progressive(exit_threshold=0.37).build()(given).rows[-1]
    images = normalise(dataset.validation.images, dataset.preprocessing)
    logits, used = early_exit(given.student, images, 0.37)
    assert last["early_exit_share"] == pytest.approx(float((used < 2).double().mean()))
    assert last["mean_members_used"] == pytest.approx(float(used.double().mean()))
    right = (logits.argmax(-1) == dataset.validation.labels).double().mean()
    assert last["early_exit_accuracy"] == pytest.approx(float(right))
    assert 0 < last["early_exit_share"] < 1
    nobody = exits(given.student, dataset.validation, dataset.preprocessing, 1.0)
    whole = evaluate(given.student, dataset.validation, dataset.preprocessing).accuracy
    assert nobody == {"early_exit_share": 0.0, "mean_members_used": 2.0, "early_exit_accuracy": pytest.approx(whole)}


def test_losses_with_parts_of_their_own_follow_the_member_that_learns(panel, dataset, tmp_path):
    given = training(panel, dataset, group(2), tmp_path, epochs=2, losses=(CrossEntropy(), Nd(dropout=0.0)))
    rows = Progressive().build()(given).rows
    assert all(row["nd"] > 0 for row in rows)
    for number in (1, 2):
        assert "0.means_0" in load_state(tmp_path / f"member-{number}")["helpers"]


def test_students_that_are_no_groups_and_schedules_too_short_are_refused(panel, dataset):
    with pytest.raises(CompressionError, match=r"'Sequential' has no members.*students of kind 'group'"):
        Progressive().build()(training(panel, dataset, net(6, seed=3)))
    student = group(3)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(CompressionError, match=r"2 epochs for a group of 3.*Raise distill.train.epochs to 3"):
        Progressive().build()(training(panel, dataset, student, epochs=2))
    assert_same(student.state_dict(), before)


def test_a_built_group_is_what_the_procedure_wants(panel, dataset):
    student = Group(members=(MEMBER, MEMBER)).build(len(CLASSES), (1, 8, 8))
    assert len(Progressive().build()(training(panel, dataset, student, epochs=2)).rows) == 2


@pytest.mark.parametrize("wrong", [{"hard_share": 1.1}, {"temperature": 0}, {"exit_threshold": 0}, {"members": 3}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        Progressive.model_validate(wrong)
