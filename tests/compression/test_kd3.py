"""KD^3 selection: schedule, thresholds, which samples an epoch shows, and a training that goes on alike."""

import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from compression.augment import NoAugment
from compression.distill import DistillConfig, Progress
from compression.distill.procedures import Training
from compression.distill.samplers.kd3 import (
    ConfidentSampler,
    Kd3,
    confident,
    mean_logits,
    teacher_part,
    thresholds,
)
from compression.errors import CompressionError
from compression.teacher_outputs import OutputsSpec
from compression.train import Hardware, History, TrainConfig
from compression.train.step_checkpoint import load_state
from compression.types import UNKNOWN
from tests.compression.losses.short_training import SHIFT, Stop, assert_same, net, stop_at, stored
from tests.compression.tiny_data import CLASSES, tiny_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

COUNT = 64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Teacher:
    """Says what it is given, in view 0."""

    spec = OutputsSpec(views=1, seed=0, augment=NoAugment())
    class_names = CLASSES
    validation_logits = torch.zeros(16, len(CLASSES))

    def __init__(self, logits: Tensor) -> None:
        self.given = logits

    def logits(self, ids: Tensor, view: int) -> Tensor:
        assert view == 0
        return self.given[ids]

    def features(self, ids: Tensor, view: int) -> Tensor:
        raise AssertionError("selection looks at logits")


def looked(teachers: list[Tensor], epochs: int = 4, **options) -> ConfidentSampler:
    sampler = Kd3(**options).build()
    assert isinstance(sampler, ConfidentSampler)
    sampler.progress = Progress(epochs=epochs)
    sampler.look([Teacher(each) for each in teachers], (), tiny_dataset(validation=16))
    return sampler


# ---------------------------------------------------------------- formulas


def test_the_schedule_is_the_papers_for_240_epochs_and_stretched_for_others():
    for epoch in range(240):
        expected = 1 - math.exp(-5 * ((epoch + 1) / 160 - 1) ** 2) if epoch < 120 else 0.0
        assert teacher_part(epoch, 240) == pytest.approx(expected, abs=1e-12)
    assert teacher_part(5, 60) == pytest.approx(teacher_part(23, 240))


@pytest.mark.parametrize("epochs", [2, 3, 4, 5, 7, 30, 240])
def test_the_part_of_the_teachers_only_falls_and_ends_at_zero(epochs):
    parts = [teacher_part(epoch, epochs) for epoch in range(epochs)]
    assert parts == sorted(parts, reverse=True)
    assert all(0 <= part < 1 for part in parts)
    assert parts[0] > 0
    assert parts[-1] == 0


def test_thresholds_fall_with_the_count():
    found = thresholds(torch.tensor([100, 50, 10, 0]))
    assert found[0] == 0.95
    torch.testing.assert_close(found, torch.tensor([0.95, 0.31667, 0.05, 0.0]).double(), atol=1e-4, rtol=0)
    assert thresholds(torch.zeros(3, dtype=torch.int64)).tolist() == [0, 0, 0]


def test_samples_are_confident_by_the_threshold_of_the_class_they_are_predicted_as():
    """Class 0 is predicted four times (limit 0.95), class 1 twice (0.317), class 2 never."""
    tops = torch.tensor([0.96, 0.94, 0.99, 0.5, 0.36, 0.40])
    rows = [0, 0, 0, 0, 1, 1]
    probs = ((1 - tops) / 2).unsqueeze(1).repeat(1, 3)
    probs[torch.arange(6), rows] = tops
    confidence, eligible = confident(probs.log() + randn(6, 1))
    torch.testing.assert_close(confidence, tops.double(), atol=1e-6, rtol=0)
    assert eligible.tolist() == [True, False, True, False, True, True]


def test_the_panel_speaks_by_its_mean_over_those_who_know_the_class():
    first = torch.tensor([[1.0, 2.0, UNKNOWN], [3.0, UNKNOWN, UNKNOWN]])
    second = torch.tensor([[3.0, 0.0, 5.0], [1.0, 4.0, UNKNOWN]])
    found = mean_logits([Teacher(first), Teacher(second)], torch.arange(2))
    assert found.tolist() == [[2, 1, 5], [2, 4, UNKNOWN]]


# ---------------------------------------------------------------- the choice


@pytest.mark.parametrize(("epoch", "epochs"), [(0, 4), (1, 4), (3, 4)])
def test_teachers_and_student_are_blended_by_the_schedule(epoch, epochs):
    logits = [randn(COUNT, 4) * 3, randn(COUNT, 4, seed=1) * 3]
    sampler, student, data = looked(logits, epochs), net(6, seed=3), tiny_dataset(validation=16)
    with torch.no_grad():
        student[-1].weight.mul_(20)
    sampler.choose(epoch, student)
    with torch.no_grad():
        ours = student.eval()((data.train.images.float() / 255 - 0.3) / 0.2)
    part = teacher_part(epoch, epochs)
    confidence, eligible = confident(part * (logits[0] + logits[1]) / 2 + (1 - part) * ours)
    torch.testing.assert_close(sampler.confidence, confidence.float(), atol=1e-5, rtol=1e-5)
    assert torch.equal(sampler.eligible, eligible)
    assert 0 < int(eligible.sum()) < COUNT


def test_the_student_keeps_its_mode_and_statistics():
    student = net(6, seed=3).train()
    student[1].eval()
    modes = [module.training for module in student.modules()]
    before, state = {name: value.clone() for name, value in student.state_dict().items()}, torch.get_rng_state()
    looked([randn(COUNT, 4)]).choose(0, student)
    assert [module.training for module in student.modules()] == modes
    assert_same(student.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("count", [0, 10, 32, 50, 64])
def test_an_epoch_has_one_size_and_takes_confident_samples_first(count):
    sampler, labels = looked([randn(COUNT, 4)], share=0.5), torch.zeros(COUNT, dtype=torch.int64)
    sampler.eligible.copy_(torch.arange(COUNT) < count)
    sampler.confidence.copy_(torch.arange(COUNT) / COUNT)
    rows = sampler.indices(0, labels, seed=0)
    assert rows.dtype == torch.int64
    assert len(rows) == len(set(rows.tolist())) == sampler.size(COUNT) == 32
    if count >= 32:
        assert max(rows.tolist()) < count
    else:
        assert set(rows.tolist()) == {*range(count), *range(32 + count, COUNT)}


def test_the_order_is_a_function_of_seed_epoch_and_choice():
    sampler, labels = looked([randn(COUNT, 4)], share=0.25), torch.zeros(COUNT, dtype=torch.int64)
    first = sampler.indices(3, labels, seed=0)
    assert torch.equal(first, sampler.indices(3, labels, seed=0))
    assert set(first.tolist()) != set(sampler.indices(4, labels, seed=0).tolist())
    assert set(first.tolist()) != set(sampler.indices(3, labels, seed=1).tolist())
    sampler.eligible.copy_(torch.arange(COUNT) % 4 == 1)
    assert set(sampler.indices(3, labels, seed=0).tolist()) == set(range(1, COUNT, 4))
    few = sampler.indices(3, labels, seed=0)
    assert not torch.equal(few, few.sort().values)


def test_labelled_samples_may_be_kept_whatever_is_predicted():
    data, flat = tiny_dataset(validation=16), torch.zeros(COUNT, 4)
    data.train.labels[16:] = -1
    for keep, expected in ((True, 16), (False, 0)):
        sampler = Kd3(keep_labelled=keep, share=0.25).build()
        sampler.progress = Progress(epochs=4)
        sampler.look([Teacher(flat)], (), data)
        student = net(6, seed=3)
        nn.init.zeros_(student[-1].weight)
        nn.init.zeros_(student[-1].bias)
        sampler.choose(0, student)
        assert int(sampler.eligible.sum()) == expected
    kept = looked([flat], share=0.25, keep_labelled=True)
    kept.choose(0, net(6, seed=3))
    assert kept.eligible.all()


def test_before_the_first_choice_all_samples_are_alike():
    labels, sampler = torch.zeros(COUNT, dtype=torch.int64), Kd3(share=0.25).build()
    rows = [sampler.indices(epoch, labels, seed=0) for epoch in range(40)]
    assert set(torch.cat(rows).tolist()) == set(range(COUNT))
    assert {len(each) for each in rows} == {16}
    assert torch.equal(looked([randn(COUNT, 4)], share=0.25).indices(0, labels, seed=0), rows[0])


def test_refuses_an_epoch_beyond_the_training_it_knows_of():
    sampler = looked([randn(COUNT, 4)], epochs=2)
    with pytest.raises(CompressionError, match="a training of 2 epochs, expected more than 2"):
        sampler.choose(2, net(6, seed=3))


# ---------------------------------------------------------------- training


def run(folder: Path, name: str, **options) -> tuple[nn.Module, dict[str, Tensor], History, list[Tensor]]:
    data, shown = tiny_dataset(validation=16), []
    panel = [stored(data, folder / f"outputs-{name}", width=8, seed=1)]
    panel[0].logits = lambda ids, view, of=panel[0].logits: shown.append(ids) or of(ids, view)
    train = TrainConfig(epochs=4, batch_size=8, learning_rate=0.02, checkpoint_every_steps=3)
    student, sampler = net(6, seed=3), Kd3(share=0.5).build()
    sampler.progress = Progress(epochs=4)
    training = Training(
        student=student,
        panel=panel,
        teachers=(),
        dataset=data,
        config=DistillConfig(train=train, views=2),
        seed=0,
        augment=SHIFT,
        hardware=Hardware(accelerator="cpu"),
        checkpoint_dir=folder / name,
        **options,
    )
    history = training.run(sampler=sampler)
    state = load_state(folder / name)
    assert state is not None
    return student, state["helpers"], history, [ids for ids in shown if len(ids) == 8]


def test_a_training_chooses_each_epoch_and_goes_on_alike_after_a_kill(tmp_path):
    student, parts, history, shown = run(tmp_path, "whole")
    assert len(shown) == 16
    assert len(history.rows) == 4
    chosen = [frozenset(torch.cat(shown[4 * epoch : 4 * epoch + 4]).tolist()) for epoch in range(4)]
    assert all(len(each) == 32 for each in chosen)
    assert len(set(chosen)) > 1
    last = looked([randn(COUNT, 4)])
    last.load_state_dict({name: parts[f"1.{name}"] for name in ("eligible", "confidence")})
    assert last.confidence.max() > 0
    assert chosen[3] == frozenset(last.indices(3, torch.zeros(COUNT), seed=0).tolist())
    assert list(student.state_dict()) == list(net(6, seed=3).state_dict())
    for stop in (7, 12):  # within an epoch, and at the end of one
        with pytest.raises(Stop):
            run(tmp_path, f"cut-{stop}", on_step=stop_at(stop))
        again, parts_again, _, _ = run(tmp_path, f"cut-{stop}")
        assert_same(again.state_dict(), student.state_dict())
        assert_same(parts_again, parts)


@pytest.mark.parametrize("wrong", [{"share": 0}, {"share": 1.1}, {"threshold": 0.9}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        Kd3.model_validate(wrong)


def test_names_tell_settings_apart():
    names = [Kd3(**options).build().name for options in ({}, {"share": 0.4}, {"keep_labelled": True})]
    assert len(set(names)) == 3
