"""Active distillation: greedy centres, the budget of labels, rounds that start afresh and go on after a kill."""

from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from compression.data.dataset import Dataset, without_labels
from compression.distill import CrossEntropy, DistillConfig, Kd
from compression.distill.procedures import Training, active
from compression.distill.procedures.active import Active, balanced, first_labelled, k_centre_greedy, masked
from compression.errors import CompressionError
from compression.train import Hardware, History, TrainConfig
from tests.compression.losses.short_training import SHIFT, Stop, assert_same, net, stop_at, stored
from tests.compression.tiny_data import tiny_dataset

pytestmark = pytest.mark.usefixtures("one_thread")


def probs(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(count, 4, generator=generator, dtype=torch.float64)).softmax(-1)


def radius(pool: Tensor, centres: Tensor) -> float:
    return float(torch.cdist(pool, centres).amin(dim=1).max())


# ---------------------------------------------------------------- centres


def test_every_choice_is_the_farthest_from_all_before_it():
    pool, labelled = probs(40), probs(5, seed=1)
    chosen = k_centre_greedy(pool, labelled, 12)
    for place, row in enumerate(chosen.tolist()):
        centres = torch.cat([labelled, pool[chosen[:place]]])
        distance = torch.tensor([min(float((each - centre).norm()) for centre in centres) for each in pool])
        assert row == int(distance.argmax())


def test_nothing_is_chosen_twice_even_among_equals():
    pool = probs(3).repeat(4, 1)
    chosen = k_centre_greedy(pool, pool[:1], 12)
    assert sorted(chosen.tolist()) == list(range(12))


def test_labelled_distributions_are_not_chosen_while_others_are_left():
    pool = probs(20)
    assert not set(k_centre_greedy(pool, pool[:6], 14).tolist()) & set(range(6))


def test_the_radius_never_grows_and_is_at_most_twice_the_best():
    pool, labelled = probs(14), probs(1, seed=1)
    for count in range(1, 4):
        found = radius(pool, torch.cat([labelled, pool[k_centre_greedy(pool, labelled, count)]]))
        best = min(
            radius(pool, torch.cat([labelled, pool[list(each)]])) for each in combinations(range(len(pool)), count)
        )
        assert best - 1e-9 <= found <= 2 * best + 1e-9
    chosen = k_centre_greedy(pool, labelled, 14)
    radii = [radius(pool, torch.cat([labelled, pool[chosen[:count]]])) for count in range(15)]
    assert radii == sorted(radii, reverse=True)


@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_chunks_of_labelled_samples_change_nothing(monkeypatch, chunk):
    pool, labelled = probs(40), probs(7, seed=1)
    expected = k_centre_greedy(pool, labelled, 9)
    monkeypatch.setattr(active, "CHUNK", chunk)
    assert torch.equal(k_centre_greedy(pool, labelled, 9), expected)


def test_without_labels_the_first_of_the_pool_comes_first():
    pool = probs(10)
    chosen = k_centre_greedy(pool, pool[:0], 4)
    assert chosen[0] == 0
    assert torch.equal(chosen[1:], k_centre_greedy(pool, pool[:1], 3))


def test_more_than_the_pool_is_refused():
    assert k_centre_greedy(probs(3), probs(1), 0).tolist() == []
    with pytest.raises(CompressionError, match="Pool has 3 samples, expected at least the 4"):
        k_centre_greedy(probs(3), probs(1), 4)


# ---------------------------------------------------------------- labels


def test_the_first_labels_are_one_of_each_class_by_seed():
    labels = torch.tensor([2, 0, -1, 2, 3, 0, 2, -1, 0, 3])
    seen = set()
    for seed in range(30):
        rows = first_labelled(labels, seed=seed)
        assert sorted(labels[rows].tolist()) == [0, 2, 3]
        assert torch.equal(rows, first_labelled(labels, seed=seed))
        seen |= set(rows.tolist())
    assert seen == {0, 1, 3, 4, 5, 6, 8, 9}


def test_all_other_labels_are_hidden():
    data = tiny_dataset(validation=16)
    rows = torch.tensor([5, 2, 40])
    found = masked(data, rows)
    assert found.train.labels[rows].tolist() == [1, 2, 0]
    assert int((found.train.labels == -1).sum()) == 61
    assert data.train.labels.min() == 0
    assert found.train.images is data.train.images
    assert found.hashes == masked(data, rows.flip(0)).hashes
    assert found.hashes != masked(data, rows[:2]).hashes
    assert found.hashes["train"] == data.hashes["train"]


def test_few_labels_count_as_much_as_many_but_never_more_than_one_in_its_batch():
    losses = (CrossEntropy(weight=0.3), Kd(weight=0.7))
    found = balanced(losses, labelled=8, samples=64, batch_size=16)
    assert [loss.weight for loss in found] == pytest.approx([2.4, 0.7])
    assert [loss.weight for loss in balanced(losses, labelled=2, samples=64, batch_size=16)] == pytest.approx(
        [4.8, 0.7]
    )
    assert balanced(losses, labelled=64, samples=64, batch_size=16) == losses


# ---------------------------------------------------------------- rounds


@pytest.fixture(scope="module")
def panel(tmp_path_factory):
    return [stored(tiny_dataset(validation=16), tmp_path_factory.mktemp("outputs"), width=8, seed=1)]


def training(panel, folder: Path | None = None, data: Dataset | None = None, **options) -> Training:
    train = TrainConfig(epochs=4, batch_size=16, learning_rate=0.01, checkpoint_every_steps=2)
    return Training(
        student=net(6, seed=3),
        panel=panel,
        teachers=(),
        dataset=tiny_dataset(validation=16) if data is None else data,
        config=DistillConfig(train=train, losses=(CrossEntropy(), Kd()), views=2),
        seed=0,
        augment=SHIFT,
        hardware=Hardware(accelerator="cpu"),
        checkpoint_dir=folder,
        **options,
    )


def run(panel, folder: Path | None = None, data: Dataset | None = None, **options) -> tuple[nn.Module, History]:
    config = Active(rounds=3, queries=5, round_epochs=options.pop("round_epochs", None))
    given = training(panel, folder, data, **options)
    return given.student, config.build()(given)


def scaled(labelled: int) -> tuple:
    """The losses of a round with so many of the 64 samples labelled."""
    return (CrossEntropy(weight=0.5 * 64 / labelled), Kd())


@pytest.fixture
def spied(monkeypatch) -> list[Tensor]:
    """The labelled rows of each round."""
    rows: list[Tensor] = []
    monkeypatch.setattr(active, "masked", lambda dataset, chosen: rows.append(chosen) or masked(dataset, chosen))
    return rows


def test_rounds_buy_labels_and_say_how_many(panel, spied):
    told = []
    _, history = run(panel, on_epoch=told.append)
    assert [len(rows) for rows in spied] == [4, 9, 14]
    assert all(len(rows) == len(set(rows.tolist())) for rows in spied)
    assert all(torch.equal(more[: len(few)], few) for few, more in pairwise(spied))
    assert [(row["epoch"], row["labelled"]) for row in history.rows] == [
        (0, 4),
        (1, 9),
        *((n, 14) for n in range(2, 6)),
    ]
    assert [row["labelled"] for row in told] == [4, 9, 14, 14, 14, 14]
    assert {"cross_entropy", "kd", "validation_accuracy"} <= set(history.rows[0])


def test_the_student_is_that_of_one_fresh_training_on_the_last_labels(panel, spied):
    student, _ = run(panel, round_epochs=2)
    alone = training(panel)
    alone.run(losses=scaled(14), dataset=masked(alone.dataset, spied[-1]))
    assert_same(student.state_dict(), alone.student.state_dict())


def test_labels_that_were_not_bought_do_not_matter(panel, spied):
    """Past the samples that were looked through for one of each class, all other labels may be anything."""
    student, _ = run(panel)
    data, order = tiny_dataset(validation=16), active.shuffled(64, seed=0, epoch=-1).tolist()
    looked_through = 1 + max(order.index(row) for row in spied[0].tolist())
    free = sorted(set(order[looked_through:]) - set(spied[-1].tolist()))
    assert len(free) > 30
    labels = data.train.labels.clone()
    labels[free] = (labels[free] + 1) % 4
    other, _ = run(panel, data=replace(data, train=replace(data.train, labels=labels)))
    assert_same(other.state_dict(), student.state_dict())


def test_choices_are_the_centres_of_the_rounds_own_predictions(panel, spied):
    run(panel)
    first = training(panel)
    short = first.config.train.model_copy(update={"epochs": 1})
    first.run(train=short, losses=scaled(4), dataset=masked(first.dataset, spied[0]))
    found = active.predict(first.student, first.dataset.train, first.dataset.preprocessing).softmax(1)
    pool = torch.tensor([row for row in range(64) if row not in spied[0].tolist()])
    expected = pool[k_centre_greedy(found[pool], found[spied[0]], 5)]
    assert torch.equal(spied[1][4:], expected)


@pytest.mark.parametrize("stop", [3, 7])
def test_a_killed_training_goes_on_to_the_same_bits(panel, tmp_path, spied, stop):
    whole, history = run(panel, tmp_path / "whole")
    expected, steps = spied[:], []

    def on_step(done: int, total: int) -> None:
        steps.append(done)
        if len(steps) == stop:
            raise Stop

    with pytest.raises(Stop):
        run(panel, tmp_path / "cut", on_step=on_step)
    spied.clear()
    again, rows = run(panel, tmp_path / "cut")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(spied, expected, strict=True))
    assert_same(again.state_dict(), whole.state_dict())
    timeless = [[{k: v for k, v in row.items() if k != "seconds"} for row in each.rows] for each in (rows, history)]
    assert timeless[0] == timeless[1]


def test_a_finished_training_is_not_trained_again(panel, tmp_path):
    whole, _ = run(panel, tmp_path / "whole")
    again, _ = run(panel, tmp_path / "whole", on_step=stop_at(1))
    assert_same(again.state_dict(), whole.state_dict())


def test_the_budget_ends_with_the_pool(panel, spied):
    config = Active(rounds=3, queries=50, round_epochs=1)
    given = training(panel)
    short = given.config.train.model_copy(update={"epochs": 1})
    config.build()(replace(given, config=given.config.model_copy(update={"train": short})))
    assert [len(rows) for rows in spied] == [4, 54, 64]


def test_by_default_as_many_are_bought_as_there_are_classes(panel, spied):
    given = training(panel)
    short = given.config.train.model_copy(update={"epochs": 1})
    given = replace(given, config=given.config.model_copy(update={"train": short}))
    assert len(Active(rounds=2).build()(given).rows) == 2
    assert [len(rows) for rows in spied] == [4, 8]


def test_data_without_labels_is_refused(panel):
    with pytest.raises(CompressionError, match="0 labelled train samples, expected some.*looks labels up"):
        run(panel, data=without_labels(tiny_dataset(validation=16)))


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"queries": 0}, {"round_epochs": 0}, {"heads": 2}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        Active.model_validate(wrong)
