"""Supermasks: scores choose, exclusive weights are trained, and older tasks keep every bit of their outputs."""

import pytest
import torch
from torch import nn

from compression.data.dataset import Dataset
from compression.errors import CompressionError
from compression.sparsify import Supermask
from compression.sparsify.nm import Masks, layers_of
from compression.sparsify.supermask import (
    TaskMasks,
    exclusive,
    kept_count,
    learn_task,
    set_signed_constants,
    signed_constant,
    straight_through_mask,
)
from tests.compression.sparse_training import SPARSE, TRAIN, made_sparse, session, student
from tests.compression.tiny_data import tiny_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = Supermask(train=TRAIN, keep=0.3, start="signed_constant")


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return tiny_dataset()


def test_the_largest_scores_by_size_are_kept_and_all_get_a_gradient():
    scores = torch.tensor([0.1, -0.9, 0.5, -0.2], requires_grad=True)
    mask = straight_through_mask(scores, 2)
    assert mask.tolist() == [0.0, 1.0, 1.0, 0.0]
    (mask * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum().backward()
    assert scores.grad.tolist() == [1.0, -2.0, 3.0, -4.0]  # through |scores|


def test_counts_are_rounded_down_to_one_at_least():
    assert kept_count(torch.zeros(3, 5), 0.5) == 7
    assert kept_count(torch.zeros(2, 4), 0.1) == 1


def test_signed_constants_have_one_size_and_both_signs():
    weight = signed_constant(torch.zeros(16, 8, 3, 3), torch.Generator().manual_seed(0))
    assert weight.abs().unique().tolist() == pytest.approx([(2 / 72) ** 0.5])
    assert 0.4 < (weight > 0).double().mean() < 0.6


def test_exclusive_masks_are_disjoint():
    masks: list[Masks] = [{"a": torch.rand(50, 4, generator=torch.Generator().manual_seed(s)) < 0.4} for s in range(3)]
    owned = [exclusive(mask, masks[:number])["a"] for number, mask in enumerate(masks)]
    assert torch.equal(owned[0], masks[0]["a"])
    assert not (owned[0] & owned[1]).any()
    assert not (owned[0] & owned[2]).any()
    assert not (owned[1] & owned[2]).any()
    assert torch.equal(owned[0] | owned[1] | owned[2], masks[0]["a"] | masks[1]["a"] | masks[2]["a"])
    assert torch.equal(masks[1]["a"], exclusive(masks[1], [])["a"])


@pytest.fixture(scope="module")
def tasks(dataset) -> tuple[TaskMasks, dict[str, torch.Tensor], nn.Module, torch.Tensor]:
    """Two tasks learnt one after the other; what the first gave before the second was learnt."""
    torch.set_num_threads(1)
    model, spec = student(dataset)
    layers = layers_of(model)
    set_signed_constants(layers, seed=0)
    together = TaskMasks(layers)
    images = torch.randn(8, *dataset.input_shape, generator=torch.Generator().manual_seed(0))
    outputs: dict[str, torch.Tensor] = {}
    for seed, task in enumerate(("old", "new")):
        together.start(layers)
        masks, _ = learn_task(session(model, spec, dataset, seed=seed), CONFIG, list(together.masks.values()))
        together.add(task, model, masks)
        plain, _ = student(dataset)
        together.load(task, plain)
        outputs[task] = plain(images).detach()
    return together, outputs, model, images


def test_a_new_task_leaves_old_outputs_bit_for_bit(tasks, dataset):
    together, outputs, _, images = tasks
    again, _ = student(dataset, seed=9)
    together.load("old", again)
    assert torch.equal(again(images), outputs["old"])
    assert not torch.equal(outputs["new"], outputs["old"])


def test_a_new_task_reads_old_weights_and_changes_only_its_own(tasks, dataset):
    together, _, model, _ = tasks
    old, new = together.masks["old"], together.masks["new"]
    both, first = 0, student(dataset)[0]
    set_signed_constants(layers_of(first), seed=0)
    for name in SPARSE:
        free = exclusive(new, [old])[name]
        kept = model.get_parameter(name).detach()
        assert torch.equal(kept != 0, new[name] & (together.weights[name] != 0))
        assert torch.equal(kept[new[name] & old[name]], together.weights[name][new[name] & old[name]])
        start = first.get_parameter(name).detach()
        assert (kept != start)[free].all()
        unused = ~(old[name] | new[name])
        assert torch.equal(together.weights[name][unused], start[unused])
        both += int((new[name] & old[name]).sum())
    assert both > 0


def test_each_task_predicts_as_it_was_trained(tasks, dataset):
    together, _, model, images = tasks
    again, _ = student(dataset, seed=9)
    together.load("new", again)
    torch.testing.assert_close(again(images), model(images))


def test_a_task_is_added_once_and_with_the_same_layers(tasks):
    together, _, model, _ = tasks
    with pytest.raises(CompressionError, match="Task 'old'"):
        together.add("old", model, together.masks["old"])
    with pytest.raises(CompressionError, match=r"masks of 1 weights, expected .* same 3"):
        together.add("third", model, {SPARSE[0]: together.masks["old"][SPARSE[0]]})


def test_from_a_student_the_first_scores_are_its_weights(dataset):
    start, _ = student(dataset)
    config = Supermask(train=TRAIN, keep=0.5, mask_share=1.0, mask_learning_rate=1e-9)
    model, _ = made_sparse(config, dataset)
    for name in SPARSE:
        before, after = start.get_parameter(name), model.get_parameter(name)
        count = before.numel() // 2
        assert torch.equal((after != 0).flatten().nonzero().flatten(), before.abs().flatten().topk(count)[1].sort()[0])
        assert torch.equal(after, torch.where(after != 0, before, 0.0))


def test_from_constants_frozen_weights_have_one_size(dataset):
    model, _ = made_sparse(CONFIG.model_copy(update={"mask_share": 1.0}), dataset)
    for name in SPARSE:
        weight = model.get_parameter(name)
        assert int((weight != 0).sum()) == kept_count(weight, 0.3)
        assert len(weight[weight != 0].abs().unique()) == 1


def test_training_scores_changes_the_mask(dataset):
    still = CONFIG.model_copy(update={"mask_share": 1.0, "mask_learning_rate": 1e-9})
    moved = CONFIG.model_copy(update={"mask_share": 1.0, "mask_learning_rate": 0.1})
    left, right = made_sparse(still, dataset)[0], made_sparse(moved, dataset)[0]
    assert any(not torch.equal(left.get_parameter(name) != 0, right.get_parameter(name) != 0) for name in SPARSE)
