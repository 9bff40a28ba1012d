"""Sparse layers of equal arithmetic, and masks that move while the student trains."""

from dataclasses import replace

import pytest
import torch

from compression import profile
from compression.data.dataset import Dataset
from compression.sparsify import Rigl
from compression.sparsify.nm import layers_of
from compression.sparsify.sparse_ift import (
    MovingMasks,
    branches,
    doped_rank,
    drop_share,
    exchanged,
    factorised_width,
    flops_ratio,
    wide_factor,
)
from compression.zoo import PlainCnn
from tests.compression.sparse_training import SPARSE, TRAIN, made_sparse, session, student
from tests.compression.tiny_data import tiny_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = Rigl(train=TRAIN, every_steps=2, sparsity=0.5)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return tiny_dataset()


@pytest.mark.parametrize("family", ["wide", "parallel", "doped", "factorised"])
@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("widths", [(64, 64), (64, 128), (256, 512)], ids=str)
def test_every_family_costs_what_the_dense_layer_does(family, sparsity, widths):
    assert flops_ratio(family, *widths, sparsity=sparsity) == pytest.approx(1.0, abs=0.015)


def test_sizes_by_hand():
    assert (branches(0.5), branches(0.75), branches(0.9)) == (2, 4, 10)
    assert wide_factor(0.75) == 2.0
    assert doped_rank(64, 64, sparsity=0.5) == 28  # 0.5 * 9 * 64 * 64 / (10 * 64) = 28.8
    assert factorised_width(64, 64, sparsity=0.5) == 116  # 9 * 64 * 64 / (0.5 * 10 * 64) = 115.2


def test_a_net_twice_as_wide_at_three_quarters_zeros_has_the_products_of_the_dense_one(dataset):
    base = PlainCnn(widths=(16, 32), depths=(2, 2), strides=(1, 2), stem_width=16)
    wide = base.scaled(width=wide_factor(0.75), round_to=1)
    dense, large = base.build(4, (1, 16, 16)), wide.build(4, (1, 16, 16))

    def inner(model) -> int:
        """Without stem and head, which one side of alone grows."""
        stem = profile.macs(torch.nn.Sequential(model.stem), (1, 16, 16))
        head = model.head.weight.numel()
        return profile.macs(model, (1, 16, 16)) - stem - head

    assert inner(large) * 0.25 == inner(dense)


def test_the_exchange_falls_as_a_cosine_and_ends():
    config = Rigl(train=TRAIN, drop=0.3, every_steps=10, until=0.75)
    assert drop_share(config, 10, 400) == pytest.approx(0.3, abs=2e-3)
    assert drop_share(config, 150, 400) == pytest.approx(0.15)
    assert drop_share(config, 290, 400) < 0.001
    assert [drop_share(config, done, 400) for done in (15, 300, 310, 400)] == [0.0] * 4


def test_the_smallest_go_and_those_with_the_largest_gradients_come():
    mask = torch.tensor([[True, True, True, False, False, False]])
    weight = torch.tensor([[3.0, -0.1, 2.0, 0.0, 0.0, 0.0]])
    gradient = torch.tensor([[9.0, 0.1, 9.0, 0.5, -2.0, 1.0]])
    assert exchanged(mask, weight, gradient, 0.34).tolist() == [[True, False, True, False, True, False]]
    assert torch.equal(exchanged(mask, weight, gradient, 0.0), mask)
    # A weight that just went may come back.
    gradient[0, 1] = 5.0
    assert torch.equal(exchanged(mask, weight, gradient, 0.34), mask)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_the_number_kept_stays(share):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(8, 9, generator=generator) < 0.7
    weight = torch.randn(8, 9, generator=generator) * mask
    after = exchanged(mask, weight, torch.randn(8, 9, generator=generator), share)
    assert after.sum() == mask.sum()
    assert not torch.equal(after, mask)


def test_masks_move_during_training_and_then_stay(dataset):
    model, spec = student(dataset)
    seen: list[dict[str, torch.Tensor]] = []

    def look(done: int, total: int) -> None:
        seen.append({name: model.get_parameter(name).detach() != 0 for name in SPARSE})

    CONFIG.run(replace(session(model, spec, dataset), on_step=look))
    assert len(seen) == 8
    name = SPARSE[0]
    # Exchanges after steps 2 and 4; from step 6 (three quarters) on the masks stay.
    assert not torch.equal(seen[0][name], seen[2][name])
    for later in seen[6:]:
        assert torch.equal(later[name], seen[5][name])
    half = model.get_parameter(name).numel() // 2
    assert all(int(each[name].sum()) <= half for each in seen)


def test_moving_masks_are_part_of_the_state_by_name():
    masks = MovingMasks({"a.b.weight": torch.tensor([True, False])})
    other = MovingMasks({"a.b.weight": torch.tensor([False, False])})
    other.load_state_dict(masks.state_dict())
    assert other.current()["a.b.weight"].tolist() == [True, False]


def test_fresh_weights_and_masks_depend_on_the_seed_alone(dataset):
    fresh = CONFIG.model_copy(update={"start": "fresh"})
    left, _ = made_sparse(fresh, dataset, seed=3)
    model, spec = student(dataset, seed=8)  # another start, which does not matter
    fresh.run(session(model, spec, dataset, seed=3))
    assert all(torch.equal(a, b) for a, b in zip(left.state_dict().values(), model.state_dict().values(), strict=True))
    kept, _ = made_sparse(CONFIG, dataset, seed=3)
    assert not torch.equal(kept.get_parameter("head.weight"), left.get_parameter("head.weight"))


def test_the_student_starts_from_its_largest_weights(dataset):
    model, spec = student(dataset)
    before = {name: layer.weight.detach().clone() for name, layer in layers_of(model).items()}
    first: dict[str, torch.Tensor] = {}

    def look(done: int, total: int) -> None:
        if done == 1:
            first.update({name: model.get_parameter(name).detach() != 0 for name in SPARSE})

    CONFIG.run(replace(session(model, spec, dataset), on_step=look))
    for name, weight in before.items():
        assert weight[first[name]].abs().min() >= weight[~first[name]].abs().max()
