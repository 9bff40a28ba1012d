"""Partial mixup: the exact fraction, what a blend is, its labels, and a training with it."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from compression.distill import CrossEntropy, DistillConfig, Kd, Shapes, distill
from compression.distill.online.mixup import Mixup, PartialMixup, mixed, partners_of
from compression.train import Hardware, TrainConfig
from compression.types import Batch
from tests.compression.losses.short_training import SHIFT, Stop, assert_same, net, stop_at, stored
from tests.compression.tiny_data import tiny_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 4


def batch_of(size: int, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 2, 3, 5, generator=generator).contiguous(memory_format=torch.channels_last)
    return Batch(images=images, labels=torch.arange(size) % CLASSES, ids=torch.arange(size), view=0, epoch=0, step=0)


def changed(batch: Batch, seed: int = 0, **options):
    augment = Mixup(**options).build()
    augment.prepare(Shapes(num_classes=CLASSES, student_width=1))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return augment(batch, nn.Identity(), ())


def blends(batch: Batch, images: Tensor) -> Tensor:
    """Rows whose image is not the one of the batch."""
    return (images != batch.images).flatten(1).any(dim=1)


@pytest.mark.parametrize(("fraction", "size", "count"), [(0.1, 128, 12), (0.29, 100, 29), (1.0, 7, 7), (0.1, 9, 0)])
def test_exactly_the_fraction_is_mixed(fraction, size, count):
    batch = batch_of(size)
    for seed in range(3):
        found = changed(batch, seed, fraction=fraction)
        rows = blends(batch, found.images)
        assert int(rows.sum()) == count
        assert torch.equal(found.labels == -1, rows)
        assert torch.equal(found.labels[~rows], batch.labels[~rows])
        assert torch.equal(found.images[~rows], batch.images[~rows])


def test_images_and_labels_are_blended_by_the_same_share():
    batch = batch_of(6)
    rows, partners, shares = torch.tensor([4, 1]), torch.tensor([0, 3]), torch.tensor([0.25, 0.9])
    found = mixed(batch.images, batch.labels, rows, partners, shares, num_classes=CLASSES)
    torch.testing.assert_close(found.images[4], 0.25 * batch.images[4] + 0.75 * batch.images[0])
    torch.testing.assert_close(found.images[1], 0.9 * batch.images[1] + 0.1 * batch.images[3])
    expected = torch.eye(CLASSES)[batch.labels]
    expected[4], expected[1] = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0, 0.9, 0, 0.1])
    torch.testing.assert_close(found.soft_labels, expected)
    assert found.labels.tolist() == [0, -1, 2, 3, -1, 1]
    assert found.images.is_contiguous(memory_format=torch.channels_last)


def test_soft_labels_sum_to_one():
    found = changed(batch_of(50), fraction=0.5)
    torch.testing.assert_close(found.soft_labels.sum(dim=1), torch.ones(50))
    assert found.soft_labels.min() >= 0
    assert (found.soft_labels.max(dim=1).values < 1).any()


def test_a_share_of_one_reproduces_the_batch():
    batch = batch_of(8)
    rows = torch.arange(8)
    found = mixed(batch.images, batch.labels, rows, rows.roll(1), torch.ones(8), num_classes=CLASSES)
    assert torch.equal(found.images, batch.images)
    assert torch.equal(found.soft_labels, torch.eye(CLASSES)[batch.labels])


def test_the_batch_that_came_in_stays_as_it_was():
    batch = batch_of(8)
    before, labels = batch.images.clone(), batch.labels.clone()
    changed(batch, fraction=1.0)
    assert torch.equal(batch.images, before)
    assert torch.equal(batch.labels, labels)


def test_blends_with_an_unlabelled_image_teach_no_label():
    batch = batch_of(4)
    labels = torch.tensor([0, -1, 2, 3])
    rows, partners, shares = torch.tensor([0, 2]), torch.tensor([1, 3]), torch.tensor([0.5, 0.5])
    soft = mixed(batch.images, labels, rows, partners, shares, num_classes=CLASSES).soft_labels
    assert soft.sum(dim=1).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("size", [2, 3, 17])
def test_partners_are_a_permutation_without_fixed_points(size):
    rows = torch.arange(size)
    for seed in range(20):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            partners = partners_of(rows, size)
        assert sorted(partners.tolist()) == rows.tolist()
        assert not (partners == rows).any()


@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_shares_follow_the_beta_distribution(beta):
    """Image i has its one bright pixel at i and so shows its own share: mean 1/2, variance 1 / (4 (2 beta + 1))."""
    count = 400
    images = torch.eye(count).view(count, 1, 1, count)
    batch = replace(batch_of(count), images=images)
    shares = changed(batch, fraction=1.0, beta=beta).images.flatten(1).diagonal()
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.06)
    assert float(shares.var()) == pytest.approx(1 / (4 * (2 * beta + 1)), rel=0.25)


def test_a_training_shows_teachers_the_blends_and_resumes_bit_for_bit(tmp_path):
    data, teacher, seen = tiny_dataset(validation=16), net(8, seed=1), []
    panel = [stored(data, tmp_path / "outputs", width=8, seed=1)]
    teacher.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    train = TrainConfig(epochs=2, batch_size=16, learning_rate=0.01, checkpoint_every_steps=2)
    config = DistillConfig(train=train, losses=(CrossEntropy(), Kd()), views=2)
    config = config.model_copy(update={"online": Mixup(fraction=0.5)})

    def trained(folder: str, **options) -> nn.Module:
        student = net(6, seed=3)
        student.register_forward_pre_hook(lambda module, args: shown.append(args[0]) if module.training else None)
        cpu = Hardware(accelerator="cpu")
        more = {
            "seed": 0,
            "augment": SHIFT,
            "hardware": cpu,
            "checkpoint_dir": tmp_path / folder,
            "teachers": [teacher],
        }
        distill(student, panel, data, config, **more, **options)
        return student

    shown: list[Tensor] = []
    whole = trained("whole")
    of_teacher = [each for each in seen if len(each) == 16]
    assert len(shown) == 8
    assert all(any(torch.equal(each, other) for other in of_teacher) for each in shown)
    with pytest.raises(Stop):
        trained("cut", on_step=stop_at(5))
    assert_same(trained("cut").state_dict(), whole.state_dict())


@pytest.mark.parametrize("wrong", [{"fraction": 1.1}, {"fraction": -0.1}, {"beta": 0}, {"alpha": 1}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        Mixup.model_validate(wrong)


def test_is_built_with_its_settings():
    augment = Mixup(fraction=0.3, beta=2.0).build()
    assert isinstance(augment, PartialMixup)
    assert (augment.fraction, augment.beta) == (0.3, 2.0)
