"""What every sampler must keep to; a new one adds one row to CASES."""

import importlib
import math
import pkgutil
from fractions import Fraction
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

import compression.distill.samplers as package
from compression.augment import NoAugment, ShiftFlip
from compression.card import MethodCard
from compression.data.dataset import Dataset, Split
from compression.distill import (
    AnySampler,
    ClassSubset,
    CrossEntropy,
    DistillConfig,
    Full,
    Kd,
    Kd3,
    RandomSubset,
    Rs2,
    distill,
    plain_step,
)
from compression.distill.samplers.random_subset import reweighted, teacher_share
from compression.errors import CompressionError
from compression.teacher_outputs import OutputsSpec
from compression.train import Hardware, TrainConfig, fit
from compression.train.batches import Batches, shuffled
from compression.train.loop import one_cycle
from compression.types import Frozen, Preprocessing
from tests.compression.tiny_data import tiny_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [
    Full(),
    Rs2(share=0.3),
    Rs2(share=0.7),
    Rs2(share=1.0),
    Rs2(share=0.3, replacement=True),
    RandomSubset(share=0.3),
    RandomSubset(share=1.0),
    Kd3(share=0.3),
]

CPU = Hardware(accelerator="cpu")
LABELS = torch.tensor([0] * 41 + [1] * 7 + [2] * 30 + [4] * 23)[torch.randperm(101, generator=torch.manual_seed(0))]


@pytest.fixture(params=CASES, ids=str)
def config(request) -> AnySampler:
    return request.param


def epochs(config: AnySampler, count: int, *, seed: int = 0, labels: Tensor = LABELS) -> list[Tensor]:
    sampler = config.build()
    return [sampler.indices(epoch, labels, seed) for epoch in range(count)]


# ---------------------------------------------------------------- every sampler


def test_every_file_of_the_folder_is_in_the_union():
    members = set(get_args(AnySampler))
    for module in pkgutil.iter_modules(package.__path__):
        name = f"{package.__name__}.{module.name}"
        here = {
            item
            for item in vars(importlib.import_module(name)).values()
            if isinstance(item, type) and issubclass(item, Frozen) and item.__module__ == name
        }
        assert here, f"samplers/{module.name}.py has no config"
        assert here <= members, f"samplers/{module.name}.py is not in AnySampler"


def test_every_member_has_a_case_a_card_and_a_round_trip():
    cases = {type(case) for case in CASES}
    assert cases | {ClassSubset} == set(get_args(AnySampler))  # that one wants a file: tests/compression
    for member in get_args(AnySampler):
        assert isinstance(member.card, MethodCard)
        assert all(member.card.model_dump().values())
        assert member().kind == member.model_fields["kind"].default
        assert all(field.description for name, field in member.model_fields.items() if name != "kind")
    for case in CASES:
        assert TypeAdapter(AnySampler).validate_json(case.model_dump_json()) == case
        whole = DistillConfig(train=TrainConfig(epochs=1), sampler=case)
        assert DistillConfig.model_validate_json(whole.model_dump_json()) == whole


def test_epochs_have_the_promised_size_and_no_sample_twice(config):
    size = config.build().size(len(LABELS))
    assert 1 <= size <= len(LABELS)
    for rows in epochs(config, 25):
        assert rows.dtype == torch.int64
        assert len(rows) == len(set(rows.tolist())) == size
        assert 0 <= int(rows.min()) <= int(rows.max()) < len(LABELS)


def test_same_seed_same_sequence_other_seed_other_sequence(config):
    first, other = epochs(config, 6), epochs(config, 6, seed=1)
    torch.manual_seed(5)
    assert all(torch.equal(a, b) for a, b in zip(first, epochs(config, 6), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first[1:], first, strict=False))


def test_an_epoch_does_not_depend_on_the_ones_before(config):
    sampler = config.build()
    late = sampler.indices(17, LABELS, 3)
    assert torch.equal(late, epochs(config, 18, seed=3)[17])


def test_the_random_state_of_the_process_is_left_alone(config):
    before = torch.get_rng_state()
    epochs(config, 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_names_tell_samplers_apart():
    names = [case.build().name for case in CASES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_tiny_splits_still_show_something(config, count):
    labels = torch.zeros(count, dtype=torch.int64)
    for rows in epochs(config, 5, labels=labels):
        assert len(set(rows.tolist())) == config.build().size(count) >= 1


@pytest.mark.parametrize("kind", ["rs2", "random_subset"])
@pytest.mark.parametrize("share", [0, -0.1, 1.1])
def test_shares_outside_the_unit_interval_are_refused(kind, share):
    with pytest.raises(ValidationError):
        TypeAdapter(AnySampler).validate_python({"kind": kind, "share": share})


# ---------------------------------------------------------------- full


def test_full_is_the_shuffle_of_a_training_without_a_sampler():
    batches = Batches(
        Split(torch.zeros(101, 1, 2, 2), LABELS, torch.arange(101)),
        Preprocessing(scale=1.0, mean=(0.0,), std=(1.0,)),
        NoAugment(),
        7,
        0,
        None,
        16,
        None,
        torch.device("cpu"),
    )
    for epoch, rows in enumerate(epochs(Full(), 3, seed=7)):
        assert torch.equal(rows, batches.permutation(epoch))


# ---------------------------------------------------------------- rs2


@given(n=st.integers(1, 60), share=st.sampled_from(["0.05", "0.1", "0.25", "0.29", "0.5", "0.6", "0.7", "0.95", "1"]))
@settings(max_examples=80, deadline=None)
def test_rs2_cuts_permutations_into_equal_chunks(n, share):
    """One after the other the epochs are whole permutations: each n samples in a row hold every index once."""
    size = max(1, math.floor(Fraction(share) * n))
    rounds = epochs(Rs2(share=float(share)), 3 * math.ceil(n / size) + 2, labels=torch.zeros(n, dtype=torch.int64))
    assert {len(rows) for rows in rounds} == {size}
    assert all(len(set(rows.tolist())) == size for rows in rounds)
    row = torch.cat(rounds)
    for start in range(0, len(row) - n + 1, n):
        assert sorted(row[start : start + n].tolist()) == list(range(n))


@pytest.mark.parametrize(("n", "share"), [(100, 0.3), (100, 0.1), (96, 0.5), (120, 0.7), (99, 1 / 3), (60, 0.15)])
def test_rs2_shows_every_sample_within_one_over_share_rounds(n, share):
    rounds = epochs(Rs2(share=share), math.ceil(round(1 / share, 9)), labels=torch.zeros(n, dtype=torch.int64))
    assert set(torch.cat(rounds).tolist()) == set(range(n))


@pytest.mark.parametrize("replacement", [False, True])
def test_rs2_with_all_data_is_a_shuffled_epoch(replacement):
    for epoch, rows in enumerate(epochs(Rs2(share=1.0, replacement=replacement), 4, seed=2)):
        assert torch.equal(rows, shuffled(len(LABELS), seed=2, epoch=epoch))


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_rs2_shows_every_sample_about_equally_often_in_the_first_epoch_of_a_permutation(share):
    """Keeping repeats out of a spanning chunk must not favour anyone in the long run."""
    n, seeds = 10, 3000
    counts = torch.zeros(n)
    for seed in range(seeds):
        counts[Rs2(share=share).build().indices(3, torch.zeros(n, dtype=torch.int64), seed)] += 1
    expected = seeds * share
    assert float((counts - expected).abs().max()) < 5 * math.sqrt(expected)


def test_rs2_with_replacement_draws_every_epoch_from_all():
    first, second, third, _ = epochs(Rs2(share=0.3, replacement=True), 4)
    assert set(first.tolist()) & (set(second.tolist()) | set(third.tolist()))


# ---------------------------------------------------------------- random subset


@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(sum),
    share=st.floats(0.01, 1.0),
    seed=st.integers(0, 9),
)
@settings(max_examples=80, deadline=None)
def test_subset_keeps_the_histogram(counts, share, seed):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    rows = epochs(RandomSubset(share=share), 1, seed=seed, labels=labels)[0]
    kept = torch.bincount(labels[rows], minlength=len(counts))
    exact = torch.tensor(counts, dtype=torch.float64) * len(rows) / len(labels)
    assert float((kept - exact).abs().max()) < 1
    assert (kept <= torch.tensor(counts)).all()


def test_subset_is_the_same_in_every_epoch_and_another_for_another_seed():
    rounds = epochs(RandomSubset(share=0.3), 5)
    assert len({frozenset(rows.tolist()) for rows in rounds}) == 1
    assert not torch.equal(rounds[0], rounds[1])
    assert set(rounds[0].tolist()) != set(epochs(RandomSubset(share=0.3), 1, seed=1)[0].tolist())


def test_teachers_count_more_the_less_data_is_left():
    assert teacher_share(1.0) == 0.5
    assert teacher_share(0.1) == teacher_share(0.01) == 1.0
    values = [teacher_share(share / 100) for share in range(1, 101)]
    assert values == sorted(values, reverse=True)
    assert teacher_share(0.55) == pytest.approx(0.75)


def test_weights_move_from_labels_to_teachers():
    losses = (CrossEntropy(weight=0.6), Kd(weight=0.3), Kd(weight=0.1, temperature=4.0))
    found = reweighted(losses, 0.55)
    assert [loss.weight for loss in found] == pytest.approx([0.25, 0.5625, 0.1875])
    assert [loss.weight for loss in reweighted(losses, 0.1)] == pytest.approx([0.0, 0.75, 0.25])
    assert found[2] == losses[2].model_copy(update={"weight": found[2].weight})


def test_equal_weights_on_all_data_and_lone_groups_stay_as_they_are():
    for losses in (
        (CrossEntropy(), Kd()),
        (Kd(weight=0.3), CrossEntropy(weight=0.3, label_smoothing=0.1)),
    ):
        assert reweighted(losses, 1.0) == losses
    for losses in ((Kd(weight=0.7),), (CrossEntropy(),), (CrossEntropy(weight=0.0), Kd())):
        assert reweighted(losses, 0.2) == losses


def test_schedule_can_be_switched_off_and_is_for_subsets_alone():
    train = TrainConfig(epochs=1)
    for sampler in (Full(), Rs2(share=0.1), RandomSubset(share=0.1, kd_weight_schedule=False)):
        config = DistillConfig(train=train, sampler=sampler)
        assert config.weighted_losses == config.losses
    weights = [loss.weight for loss in DistillConfig(train=train, sampler=RandomSubset(share=0.1)).weighted_losses]
    assert weights == [0.0, 1.0]


def test_schedule_that_leaves_nothing_to_learn_from_is_refused():
    from compression.distill.losses import Sinkd

    losses = (CrossEntropy(), Sinkd())
    assert Sinkd.needs.another_term
    DistillConfig(train=TrainConfig(epochs=1), losses=losses, sampler=RandomSubset(share=0.2))
    with pytest.raises(ValidationError, match="takes all weight from cross_entropy"):
        DistillConfig(train=TrainConfig(epochs=1), losses=losses, sampler=RandomSubset(share=0.1))


# ---------------------------------------------------------------- in a training


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return tiny_dataset(train=96, validation=40)


def net(seed: int = 1) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)
        )


class Teacher:
    """Says what the labels of the bars are, in every view."""

    class_names = ("a", "b", "c", "d")

    def __init__(self) -> None:
        self.spec = OutputsSpec(views=2, seed=0, augment=ShiftFlip(pad=1, flip=False))
        self.seen: list[Tensor] = []

    def logits(self, ids: Tensor, view: int) -> Tensor:
        del view
        self.seen.append(ids)
        return nn.functional.one_hot(ids % 4, 4) * 3.0


def train(model: nn.Module, dataset: Dataset, config: TrainConfig, sampler: AnySampler | None, **options):
    built = None if sampler is None else sampler.build()
    options = {"seed": 0, "augment": ShiftFlip(pad=1), "hardware": CPU} | options
    return fit(model, plain_step(), dataset, config, sampler=built, **options)


def assert_same_weights(left: nn.Module, right: nn.Module) -> None:
    for (name, mine), theirs in zip(left.state_dict().items(), right.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


@pytest.mark.parametrize("sampler", [Full(), Rs2(share=1.0), RandomSubset(share=1.0)], ids=str)
def test_all_data_equals_a_training_without_a_sampler_bit_for_bit(dataset, sampler):
    config, plain, ours = TrainConfig(epochs=2, batch_size=16), net(), net()
    train(plain, dataset, config, None)
    train(ours, dataset, config, sampler)
    assert_same_weights(ours, plain)


def test_distillation_on_a_subset_of_all_is_plain_distillation_bit_for_bit(dataset):
    students = [net(), net()]
    for student, sampler in zip(students, (Full(), RandomSubset(share=1.0)), strict=True):
        config = DistillConfig(train=TrainConfig(epochs=2, batch_size=16), views=2, sampler=sampler)
        distill(student, [Teacher()], dataset, config, seed=0, augment=Teacher().spec.augment, hardware=CPU)
    assert_same_weights(*students)


@pytest.mark.parametrize(("sampler", "steps"), [(Rs2(share=0.5), 3), (Rs2(share=0.1), 1), (RandomSubset(share=0.4), 2)])
def test_the_schedule_has_as_many_steps_as_the_training(dataset, sampler, steps):
    seen = []
    config = TrainConfig(epochs=8, batch_size=16)
    history = train(net(), dataset, config, sampler, on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 8 * steps) for done in range(1, 8 * steps + 1)]
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))])
    schedule = one_cycle(optimizer, config, 8 * steps)
    for row in history.rows:
        for _ in range(steps):
            optimizer.step()
            schedule.step()
        assert row["learning_rate"] == pytest.approx(optimizer.param_groups[0]["lr"])


def test_student_and_control_arm_see_the_same_samples(dataset):
    config = DistillConfig(train=TrainConfig(epochs=2, batch_size=16), views=2, sampler=RandomSubset(share=0.4))
    teacher, shown = Teacher(), []
    rows = distill(net(), [teacher], dataset, config, seed=3, augment=teacher.spec.augment, hardware=CPU).rows
    control, student = net(), net()
    control.register_forward_pre_hook(lambda module, args: shown.append(len(args[0])))
    distill(control, [], dataset, config, seed=3, augment=teacher.spec.augment, hardware=CPU)
    train(student, dataset, config.train, config.sampler, seed=3, augment=teacher.spec.augment, views=2)
    assert_same_weights(control, student)
    assert shown.count(16) == 4
    subset = config.sampler.build().indices(0, dataset.train.labels, 3)
    assert set(torch.cat(teacher.seen).tolist()) <= set(dataset.train.ids[subset].tolist())
    assert "kd" in rows[0]


def test_distillation_uses_the_weights_of_the_schedule(dataset):
    """At a tenth of the data the labels count nothing."""
    config = DistillConfig(train=TrainConfig(epochs=1, batch_size=16), views=2, sampler=RandomSubset(share=0.1))
    rows = distill(net(), [Teacher()], dataset, config, seed=0, augment=Teacher().spec.augment, hardware=CPU).rows
    assert rows[0]["cross_entropy"] == 0
    assert rows[0]["kd"] > 0


class Stop(BaseException):
    """Ends a training as a kill would, but in this process."""


@pytest.mark.parametrize("stop", [4, 6, 11])
def test_killed_rs2_training_goes_on_to_the_same_bits(dataset, tmp_path, stop):
    """Chunks of 67 of 96 span permutations, so the order of later epochs depends on earlier ones."""
    config, sampler = TrainConfig(epochs=5, batch_size=16, checkpoint_every_steps=3), Rs2(share=0.7)

    def on_step(done: int, total: int) -> None:
        assert total == 20
        if done == stop:
            raise Stop

    whole, again = net(), net(seed=9)
    train(whole, dataset, config, sampler)
    with pytest.raises(Stop):
        train(net(), dataset, config, sampler, checkpoint_dir=tmp_path, on_step=on_step)
    train(again, dataset, config, sampler, checkpoint_dir=tmp_path)
    assert_same_weights(again, whole)


@pytest.mark.parametrize("other", [None, Rs2(share=0.5, replacement=True), Rs2(share=0.51), RandomSubset(share=0.5)])
def test_state_of_another_sampler_is_refused(dataset, tmp_path, other):
    config = TrainConfig(epochs=1, batch_size=16)
    train(net(), dataset, config, Rs2(share=0.5), checkpoint_dir=tmp_path)
    with pytest.raises(CompressionError, match="state of another run"):
        train(net(), dataset, config, other, checkpoint_dir=tmp_path)
