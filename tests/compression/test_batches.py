"""The n-th batch of an epoch depends on seed and epoch alone."""

import pytest
import torch

from compression.augment import NoAugment, ShiftFlip
from compression.data.dataset import Split
from compression.train.batches import Batches
from compression.types import Preprocessing


def noise(count: int, first_id: int) -> Split:
    generator = torch.Generator().manual_seed(first_id)
    images = torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return Split(images=images, labels=torch.arange(count) % 4, ids=torch.arange(first_id, first_id + count))


def make_batches(count: int = 20, **options) -> Batches:
    values = {
        "split": noise(count, 100),
        "preprocessing": Preprocessing(scale=255.0, mean=(0.0,), std=(1.0,)),
        "augment": NoAugment(),
        "seed": 3,
        "augment_seed": 5,
        "views": None,
        "batch_size": 8,
        "max_steps": None,
        "device": torch.device("cpu"),
    }
    return Batches(**(values | options))


def test_every_epoch_is_another_order_of_distinct_samples():
    batches = make_batches()
    first, second = ([batch.ids for batch in batches.epoch(epoch)] for epoch in (0, 1))
    assert [len(ids) for ids in first] == [8, 8]
    assert len(set(torch.cat(first).tolist())) == 16
    assert not torch.equal(torch.cat(first), torch.cat(second))
    assert sorted(batches.permutation(0).tolist()) == list(range(20))


def test_an_epoch_can_start_anywhere():
    whole = list(make_batches().epoch(2))
    rest = list(make_batches().epoch(2, start=1))
    assert [batch.step for batch in rest] == [1]
    assert torch.equal(rest[0].ids, whole[1].ids)
    assert torch.equal(rest[0].images, whole[1].images)


def test_rows_belong_together():
    split = noise(20, 100)
    for batch in make_batches().epoch(0):
        assert torch.equal(batch.labels, split.labels[batch.ids - 100])
        torch.testing.assert_close(batch.images, split.images[batch.ids - 100] / 255.0)


def test_ranks_share_a_batch_without_overlap():
    whole = next(make_batches().epoch(0)).ids
    parts = [next(make_batches(rank=rank, world_size=2).epoch(0)).ids for rank in (0, 1)]
    assert [len(part) for part in parts] == [4, 4]
    assert sorted(torch.cat(parts).tolist()) == sorted(whole.tolist())


@pytest.mark.parametrize(("views", "expected"), [(None, [0, 1, 2, 3, 4]), (2, [0, 1, 0, 1, 0]), (1, [0, 0, 0, 0, 0])])
def test_epochs_take_views_in_turn(views, expected):
    batches = make_batches(views=views)
    assert [next(batches.epoch(epoch)).view for epoch in range(5)] == expected


def test_order_and_views_have_their_own_seeds():
    config = ShiftFlip(pad=2)
    here, there = (
        {
            int(i): image
            for batch in make_batches(augment=config, seed=seed).epoch(0)
            for i, image in zip(batch.ids, batch.images, strict=True)
        }
        for seed in (1, 2)
    )
    shared = here.keys() & there.keys()
    assert shared
    assert all(torch.equal(here[i], there[i]) for i in shared)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_split_smaller_than_a_batch_is_one_batch(count):
    batches = make_batches(count)
    assert batches.steps_per_epoch == 1
    assert len(next(batches.epoch(0)).ids) == count
