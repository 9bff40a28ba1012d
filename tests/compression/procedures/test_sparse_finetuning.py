"""The student ends as its start plus a sparse delta, whatever weight decay does, and goes on after a kill."""

import copy
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from compression.card import MethodCard
from compression.data.dataset import Dataset
from compression.deltas import apply_delta, delta_of, largest_changes, maskable
from compression.distill import CrossEntropy, DistillConfig, Kd, Nd
from compression.distill.merging import Merge
from compression.distill.procedures import Training
from compression.distill.procedures.sparse_finetuning import Anchored, SparseFinetuning
from compression.errors import CompressionError
from compression.train import Hardware, TrainConfig
from tests.compression.losses.short_training import SHIFT, Stop, assert_same, net, stop_at, stored
from tests.compression.tiny_data import tiny_dataset

FREE = ("1.weight", "1.bias", "5.weight", "5.bias")
"""Batch norm and classifier of the student."""
LOSSES = (CrossEntropy(), Kd())


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """The suite's own fixture, for every test here."""


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return tiny_dataset(validation=16)


@pytest.fixture(scope="module")
def panel(dataset, tmp_path_factory):
    return [stored(dataset, tmp_path_factory.mktemp("outputs"), width=8, seed=8)]


def training(panel, dataset, folder=None, *, epochs=3, decay=0.02, losses=LOSSES, **changes):
    """4 steps an epoch on labels and one teacher, from the network with seed 3."""
    train = TrainConfig(epochs=epochs, batch_size=16, learning_rate=0.01, weight_decay=decay, checkpoint_every_steps=2)
    return Training(
        student=net(6, seed=3),
        panel=panel,
        teachers=(),
        dataset=dataset,
        config=DistillConfig(train=train, losses=losses, views=2),
        seed=0,
        augment=SHIFT,
        hardware=Hardware(accelerator="cpu"),
        checkpoint_dir=folder,
        **changes,
    )


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in maskable(model).values()])


@pytest.mark.parametrize(("share", "count"), [(0.001, 1), (0.25, 15), (0.5, 30)])
def test_exactly_k_weights_differ_and_the_rest_keeps_its_bits_under_weight_decay(panel, dataset, share, count):
    given, start = training(panel, dataset, decay=1.0), net(6, seed=3)
    rows = SparseFinetuning(keep_share=share).build()(given).rows
    assert flat(start).numel() == 60
    assert int((flat(given.student) != flat(start)).sum()) == count
    assert rows[-1]["delta_entries"] == count
    assert rows[-1]["delta_share"] == count / 60
    for name in FREE:
        assert not torch.equal(given.student.state_dict()[name], start.state_dict()[name]), name
    delta = delta_of(start, given.student)
    assert delta.count == count
    apply_delta(start, delta)
    assert_same(start.state_dict(), given.student.state_dict())


def test_those_change_that_moved_most_in_the_full_training(panel, dataset):
    given, start = training(panel, dataset), net(6, seed=3)
    full = training(panel, dataset)
    full.run(train=full.config.train.model_copy(update={"epochs": 1}))
    chosen = largest_changes(maskable(start), maskable(full.student), 15)
    SparseFinetuning(keep_share=0.25, full_share=0.3).build()(given)
    for name, parameter in maskable(given.student).items():
        assert torch.equal(parameter != maskable(start)[name], chosen[name])


def test_the_second_part_starts_where_the_first_did(panel, dataset):
    """With all weights free it is the plain training of its own epochs, from the student as it was."""
    given, plain = training(panel, dataset), training(panel, dataset)
    rows = SparseFinetuning(keep_share=1.0, full_share=0.3).build()(given).rows
    alone = plain.run(train=plain.config.train.model_copy(update={"epochs": 2})).rows
    assert_same(given.student.state_dict(), plain.student.state_dict())
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert [row["loss"] for row in rows[1:]] == [row["loss"] for row in alone]
    assert not given.student.training


@pytest.mark.parametrize(
    ("epochs", "share", "parts"), [(2, 0.01, (1, 1)), (2, 0.99, (1, 1)), (4, 0.5, (2, 2)), (4, 0.75, (3, 1))]
)
def test_epochs_are_shared_and_each_part_has_one(panel, dataset, epochs, share, parts):
    steps = []
    given = training(panel, dataset, epochs=epochs, on_step=lambda done, total: steps.append((done, total)))
    rows = SparseFinetuning(full_share=share).build()(given).rows
    assert [total for done, total in steps if done == 1] == [4 * part for part in parts]
    assert len(rows) == epochs


@pytest.mark.parametrize("config", [SparseFinetuning(keep_share=0.2), SparseFinetuning(l1=5.0)], ids=["plain", "l1"])
def test_killed_in_either_part_it_ends_with_the_same_bits(panel, dataset, tmp_path, config):
    losses = (CrossEntropy(), Nd())
    whole = training(panel, dataset, tmp_path / "whole", losses=losses)
    rows = config.build()(whole).rows
    seen = []

    def first_part(done, total):
        if done == 3:
            raise Stop

    def second_part(done, total):
        seen.append(total)
        if done == 3 and 8 in seen and len(seen) > 3:
            raise Stop

    for number, kill in enumerate((first_part, second_part)):
        again = training(panel, dataset, tmp_path / "cut", losses=losses, on_step=kill)
        with pytest.raises(Stop):
            config.build()(again)
        assert (tmp_path / "cut" / "sparse").is_dir() == bool(number)
    again = training(panel, dataset, tmp_path / "cut", losses=losses)
    found = config.build()(again).rows
    assert_same(again.student.state_dict(), whole.student.state_dict())
    assert found[-1]["delta_entries"] == rows[-1]["delta_entries"] > 0
    assert [row["loss"] for row in found] == [row["loss"] for row in rows]


def test_two_runs_are_equal_and_another_seed_differs(panel, dataset):
    runs = [training(panel, dataset) for _ in range(2)] + [replace(training(panel, dataset), seed=1)]
    for given in runs:
        SparseFinetuning().build()(given)
    assert_same(runs[0].student.state_dict(), runs[1].student.state_dict())
    assert not torch.equal(flat(runs[0].student), flat(runs[2].student))


def test_l1_is_a_term_of_both_parts_and_draws_weights_to_the_start(panel, dataset):
    start, distances = flat(net(6, seed=3)), {}
    for l1 in (0.0, 10.0):
        given = training(panel, dataset)
        rows = SparseFinetuning(keep_share=1.0, l1=l1).build()(given).rows
        distances[l1] = float((flat(given.student) - start).abs().mean())
        assert [("l1" in row) for row in rows] == [l1 > 0] * 3
        if l1:
            assert all(row["l1"] > 0 for row in rows)
    assert distances[10.0] < 0.75 * distances[0.0]


def test_distance_is_a_mean_that_reaches_the_weights():
    model = net(6, seed=3)
    anchored = Anchored(model)
    assert anchored.distance().item() == 0.0
    with torch.no_grad():
        model[0].weight.view(-1)[:2] += torch.tensor([0.5, -1.0])
    distance = anchored.distance()
    torch.testing.assert_close(distance.item(), 1.5 / anchored.total)
    distance.backward()
    expected = torch.tensor([1.0, -1.0, 0.0]) / anchored.total
    torch.testing.assert_close(model[0].weight.grad.view(-1)[:3], expected)
    assert model[5].weight.grad is None


def test_a_student_that_has_learnt_starts_its_second_part_no_worse(panel, dataset):
    """The reason for it all: a good start and few changes still learn."""
    before = training(panel, dataset, epochs=10)
    before.run()
    learnt = copy.deepcopy(before.student)
    given = replace(training(panel, dataset, epochs=4), student=copy.deepcopy(learnt))
    rows = SparseFinetuning(keep_share=0.1).build()(given).rows
    assert rows[-1]["delta_entries"] == 6
    assert rows[-1]["loss"] < training(panel, dataset, epochs=4).run().rows[-1]["loss"]


def test_what_cannot_be_done_is_refused_before_any_step(panel, dataset):
    run = SparseFinetuning().build()
    kill = stop_at(1)
    with pytest.raises(CompressionError, match="has 1 epoch, expected at least 2"):
        run(training(panel, dataset, epochs=1, on_step=kill))
    given = training(panel, dataset, on_step=kill)
    with pytest.raises(CompressionError, match=r"has a merge after it, expected none.*Remove merge"):
        run(replace(given, config=given.config.model_copy(update={"merge": Merge(train=given.config.train)})))
    with pytest.raises(CompressionError, match=r"'Sequential' has 0 weights outside its classifier and norms"):
        run(replace(given, student=nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 4))))


@pytest.mark.parametrize(
    "wrong", [{"keep_share": 0}, {"keep_share": 1.1}, {"full_share": 0}, {"full_share": 1}, {"l1": -1}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        SparseFinetuning.model_validate(wrong)


def test_card_is_full_and_json_comes_back():
    config = SparseFinetuning(keep_share=0.1)
    assert isinstance(config.card, MethodCard)
    assert all(len(text) > 5 for text in config.card.model_dump().values())
    assert SparseFinetuning.model_validate_json(config.model_dump_json()) == config
