"""Class subsets: votes and their order, reading a target, what is kept, refusals, and a training on the subset."""

import itertools

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from compression.data.dataset import Dataset
from compression.distill import DistillConfig, distill
from compression.distill.samplers.class_subset import (
    ClassSubset,
    ClassSubsetSampler,
    class_means,
    feature_mapping,
    feature_votes,
    label_mapping,
    label_votes,
    read_target,
)
from compression.errors import CompressionError, ShapeError
from compression.train import Hardware, TrainConfig
from tests.compression.losses.short_training import SHIFT, Stop, assert_same, net, stop_at, stored
from tests.compression.tiny_data import blobs, tiny_dataset

pytestmark = pytest.mark.usefixtures("one_thread")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def surrogate() -> nn.Module:
    """Knows the tiny data: its features are the means of the eight rows, its logits the four that may be bright."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 4))
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(8).repeat_interleave(8, dim=1) / 8)
        model[2].weight.copy_(torch.eye(8)[::2])
        model[1].bias.zero_()
        model[2].bias.zero_()
    return model


def target_of(path, *classes: int):
    """A file with 35 images of the first class and 30 of each other one."""
    split = blobs(400, 7000)
    rows = [(split.labels == label).nonzero().squeeze(1)[: 35 if label == classes[0] else 30] for label in classes]
    np.savez(path, images=split.images[torch.cat(rows)].numpy())
    return path


def looked(path, data: Dataset, **options) -> ClassSubsetSampler:
    sampler = ClassSubset(target=path, **options).build()
    assert isinstance(sampler, ClassSubsetSampler)
    sampler.look([], [surrogate()], data)
    return sampler


# ---------------------------------------------------------------- votes


def test_votes_add_up_to_the_images_of_the_target():
    probs, features, means = randn(700, 9).softmax(-1), randn(700, 5, seed=1), randn(9, 5, seed=2)
    for votes in (label_votes(probs), feature_votes(features, means)):
        assert votes.shape == (9,)
        assert int(votes.sum()) == 700
    assert torch.equal(label_votes(probs), torch.tensor([int((probs.argmax(1) == c).sum()) for c in range(9)]))


def test_every_image_votes_for_the_class_whose_mean_is_nearest():
    features, means = randn(60, 5, seed=1), randn(9, 5, seed=2)
    expected = [0] * 9
    for each in features:
        expected[int((means - each).square().sum(1).argmin())] += 1
    assert feature_votes(features, means).tolist() == expected


def test_a_planted_class_is_recovered_by_features():
    """Twenty points about the mean of class 7: they vote for 7, and not for the places they have in the batch."""
    means = randn(10, 6) * 5
    votes = feature_votes(means[7] + 0.1 * randn(20, 6, seed=1), means)
    assert votes.tolist() == [0] * 7 + [20, 0, 0]
    assert int(feature_mapping(means[7] + 0.1 * randn(20, 6, seed=1), means, torch.full((20, 10), 0.1))[0]) == 7


def test_a_class_without_samples_is_nobodys_nearest():
    means = torch.tensor([[0.0, 0.0], [torch.nan, torch.nan], [9.0, 9.0]])
    assert feature_votes(torch.zeros(4, 2), means).tolist() == [4, 0, 0]


def test_classes_come_by_votes_and_ties_by_mean_probability():
    probs = torch.tensor([[0.9, 0.0, 0.02, 0.08], [0.8, 0.0, 0.05, 0.15], [0.3, 0.0, 0.6, 0.1], [0.2, 0.0, 0.1, 0.7]])
    assert label_mapping(probs).tolist() == [0, 3, 2, 1]
    means, features = torch.eye(4), torch.eye(4)[[2, 2, 1, 0]]
    assert feature_mapping(features, means, probs).tolist() == [2, 0, 1, 3]


def test_kept_sets_are_nested_and_all_classes_are_in_the_order():
    order = label_mapping(randn(50, 12).softmax(-1))
    assert sorted(order.tolist()) == list(range(12))


# ---------------------------------------------------------------- the target


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 1, 8, 8)])
def test_a_target_may_leave_its_one_channel_out(tmp_path, shape):
    images = np.arange(192, dtype=np.uint8).reshape(shape)
    np.savez(tmp_path / "t.npz", images=images)
    found = read_target(tmp_path / "t.npz", (1, 8, 8))
    assert found.shape == (3, 1, 8, 8)
    assert found.dtype == torch.uint8
    assert np.array_equal(found.numpy().reshape(shape), images)


def test_unusable_targets_are_refused(tmp_path):
    def written(**arrays) -> object:
        np.savez(tmp_path / "t.npz", **arrays)
        return tmp_path / "t.npz"

    (tmp_path / "text.npz").write_text("no archive")
    np.save(tmp_path / "lone.npy", np.zeros(3))
    for path in (tmp_path / "absent.npz", tmp_path / "text.npz", tmp_path / "lone.npy", written(other=np.zeros(3))):
        with pytest.raises(CompressionError, match=r"has no array 'images' that reads.*numpy\.savez"):
            read_target(path, (1, 8, 8))
    with pytest.raises(ShapeError, match=r"shape \[2, 1, 9, 8\], expected N of \[1, 8, 8\]"):
        read_target(written(images=np.zeros((2, 9, 8))), (1, 8, 8))
    with pytest.raises(CompressionError, match="has 0 images"):
        read_target(written(images=np.zeros((0, 8, 8))), (1, 8, 8))
    with pytest.raises(CompressionError, match="of type <U1"):
        read_target(written(images=np.full((1, 8, 8), "a")), (1, 8, 8))


def test_without_a_target_there_is_no_sampler():
    with pytest.raises(CompressionError, match=r"'dp4tl' has no target, expected an \.npz.*Set sampler\.target"):
        ClassSubset().build()


# ---------------------------------------------------------------- the sampler


@pytest.mark.parametrize("mapping", ["label", "feature"])
def test_classes_of_the_target_are_found_and_kept_whole(tmp_path, mapping):
    data = tiny_dataset(train=66, validation=16)
    sampler = looked(target_of(tmp_path / "t.npz", 3, 1), data, mapping=mapping, keep_classes=2)
    assert sampler.kept.tolist() == [3, 1]
    wanted = [row for row, label in enumerate(data.train.labels.tolist()) if label in (1, 3)]
    for epoch in range(3):
        rows = sampler.indices(epoch, data.train.labels, seed=0)
        assert sorted(rows.tolist()) == wanted
        assert len(rows) == sampler.size(66) == len(wanted)
    assert not torch.equal(rows, sampler.indices(1, data.train.labels, seed=0))
    assert not torch.equal(rows, sampler.indices(2, data.train.labels, seed=1))
    assert sampler.name == f"dp4tl:{mapping}:2:1,3"


def test_more_classes_contain_fewer_and_all_keep_all(tmp_path):
    data, path = tiny_dataset(validation=16), target_of(tmp_path / "t.npz", 2, 0)
    kept = [looked(path, data, keep_classes=count).kept.tolist() for count in range(1, 5)]
    assert all(set(few) < set(more) for few, more in itertools.pairwise(kept))
    assert kept[0] == [2]
    assert looked(path, data, keep_classes=4).size(64) == 64


def test_means_are_those_of_a_plain_loop_and_the_teacher_stays_as_it_was():
    data, model = tiny_dataset(validation=16), net(6, seed=1).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    means = class_means(model, data)
    assert model.training
    assert_same(model.state_dict(), before)
    features = model.eval()[:-1]
    inputs = (data.train.images.float() / 255 - 0.3) / 0.2
    expected = torch.stack([features(inputs[data.train.labels == label]).mean(0) for label in range(4)])
    torch.testing.assert_close(means.float(), expected, atol=1e-5, rtol=1e-5)


def test_refuses_to_choose_without_teachers_or_among_too_few_classes(tmp_path):
    data, path = tiny_dataset(validation=16), target_of(tmp_path / "t.npz", 2, 0)
    sampler = ClassSubset(target=path, keep_classes=2).build()
    with pytest.raises(CompressionError, match="0 live teachers, expected at least 1"):
        sampler.look([], [], data)
    with pytest.raises(CompressionError, match="Call its look first"):
        sampler.size(64)
    with pytest.raises(CompressionError, match="keep_classes 5, expected at most 4"):
        looked(path, data, keep_classes=5)


def test_kept_classes_without_a_sample_are_refused(tmp_path):
    data = tiny_dataset(validation=16)
    data.train.labels[data.train.labels == 2] = -1
    with pytest.raises(CompressionError, match="0 labelled samples in the 1 classes it keeps"):
        looked(target_of(tmp_path / "t.npz", 2, 0), data, keep_classes=1)


# ---------------------------------------------------------------- training


def test_a_training_shows_the_kept_classes_alone_and_resumes_bit_for_bit(tmp_path):
    data, shown = tiny_dataset(validation=16), []
    panel = [stored(data, tmp_path / "outputs", width=8, seed=1)]
    train = TrainConfig(epochs=3, batch_size=8, learning_rate=0.01, checkpoint_every_steps=3)
    sampler = ClassSubset(target=target_of(tmp_path / "t.npz", 3, 1), keep_classes=2)
    config = DistillConfig(train=train, views=2).model_copy(update={"sampler": sampler})
    panel[0].logits = lambda ids, view, of=panel[0].logits: shown.append(ids) or of(ids, view)

    def trained(folder: str, **options) -> nn.Module:
        student, cpu = net(6, seed=3), Hardware(accelerator="cpu")
        more = {"seed": 0, "augment": SHIFT, "hardware": cpu, "teachers": [surrogate()]}
        distill(student, panel, data, config, checkpoint_dir=tmp_path / folder, **more, **options)
        return student

    whole = trained("whole")
    assert [len(ids) for ids in shown] == [8] * 12
    assert set(torch.cat(shown).tolist()) == {each for each in range(64) if each % 4 in (1, 3)}
    with pytest.raises(Stop):
        trained("cut", on_step=stop_at(7))
    assert_same(trained("cut").state_dict(), whole.state_dict())


@pytest.mark.parametrize("wrong", [{"mapping": "pixel"}, {"keep_classes": 0}, {"share": 0.5}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        ClassSubset.model_validate(wrong)
