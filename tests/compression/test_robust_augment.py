"""Robust views: a share of them is changed, and what teachers say is what they say of the clean view."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from compression.augment import (
    NoAugment,
    Robust,
    ShiftFlip,
    augment,
    clean_part,
    normalise,
    sample_words,
    uniform_numbers,
)
from compression.distill import DistillConfig, distill
from compression.errors import CompressionError
from compression.robustness.chains import mixed_chains
from compression.teacher_outputs import OutputsSpec, StoredOutputs, write_teacher_outputs
from compression.teachers import Teacher, obtain_teacher
from compression.train import Hardware
from tests.compression.tiny_data import tiny_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

SHIFT = ShiftFlip(pad=1, flip=False)
ROBUST = Robust(base=SHIFT, share=0.5, strength=6)
IDS = torch.arange(100, 164)


def images(channels: int = 1, dtype: torch.dtype = torch.uint8, *, height: int = 14, width: int = 14) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (64, channels, height, width), generator=generator, dtype=torch.uint8).to(dtype)


def view(raw: Tensor, config: Robust, number: int = 0, ids: Tensor = IDS, seed: int = 5) -> Tensor:
    return augment(raw, ids, view=number, seed=seed, config=config)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_view_is_a_function_of_seed_view_and_sample_alone(dtype: torch.dtype) -> None:
    raw = images(3, dtype, height=11, width=17)
    whole = view(raw, ROBUST)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(view(raw[order], ROBUST, ids=IDS[order]), whole[order])
    alone = [view(raw[i : i + 1], ROBUST, ids=IDS[i : i + 1]) for i in range(64)]
    assert torch.equal(torch.cat(alone), whole)
    assert not torch.equal(view(raw, ROBUST, number=1), whole)
    assert not torch.equal(view(raw, ROBUST, seed=6), whole)


def test_the_share_is_changed_and_the_rest_is_the_clean_view_bit_for_bit() -> None:
    raw, ids = images()[:1].repeat(4000, 1, 1, 1), torch.arange(4000)
    clean = augment(raw, ids, view=2, seed=0, config=SHIFT)
    for share in (0.25, 0.5, 1.0):
        seen = augment(raw, ids, view=2, seed=0, config=ROBUST.model_copy(update={"share": share}))
        changed = (seen != clean).flatten(1).any(dim=1).double().mean()
        assert abs(float(changed) - share) < 0.03  # 4 standard deviations
    assert clean_part(ROBUST) == SHIFT
    assert clean_part(SHIFT) == SHIFT
    assert clean_part(Robust(base=NoAugment())) == NoAugment()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_type_shape_range_and_input_stay(dtype: torch.dtype) -> None:
    raw = images(3, dtype)
    before = raw.clone()
    changed = mixed_chains(raw, sample_words(IDS, view=0, seed=0), strength=10, width=3)
    assert torch.equal(raw, before)
    assert (changed.shape, changed.dtype) == (raw.shape, dtype)
    assert float(changed.min()) >= 0
    assert float(changed.max()) <= 255


def test_changes_grow_with_strength_and_leave_the_centre_of_a_disc_where_it_is() -> None:
    y, x = torch.linspace(-1, 1, 32).view(-1, 1), torch.linspace(-1, 1, 32)
    disc = (200.0 * (y.square() + x.square() < 0.3)).expand(64, 1, 32, 32)
    words = sample_words(IDS, view=0, seed=0)
    found = [mixed_chains(disc, words, strength=strength, width=3) for strength in (1, 4, 10)]
    distances = [float((each - disc).square().mean()) for each in found]
    assert distances == sorted(distances)
    weight = found[-1][(found[-1][:, 0, 0, 0] < 1) & (found[-1][:, 0, 16, 16] > 50)]  # without inverted highlights
    assert len(weight) > 20
    total = weight.sum(dim=(1, 2, 3))
    for axis, places in ((2, y), (3, x.view(1, -1))):
        centre = (weight * places).sum(dim=(1, 2, 3)) / total
        assert float(centre.abs().max()) < 0.05, axis  # a shift is for the test alone


def test_uniform_numbers_are_uniform_and_not_related() -> None:
    numbers = torch.from_numpy(uniform_numbers(sample_words(torch.arange(20000), view=0, seed=0), 3))
    assert numbers.min() > 0
    assert numbers.max() < 1
    assert (numbers.mean(dim=0) - 0.5).abs().max() < 0.01
    assert (numbers.var(dim=0) - 1 / 12).abs().max() < 0.002
    assert (torch.corrcoef(numbers.T) - torch.eye(3)).abs().max() < 0.03


def net(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4))


def store(folder: Path, config: Robust | ShiftFlip) -> StoredOutputs:
    write_teacher_outputs(net(0), tiny_dataset(), OutputsSpec(views=2, seed=5, augment=config), folder)
    return StoredOutputs.open(folder)


def test_stored_outputs_are_those_of_the_clean_view_whatever_the_share(tmp_path) -> None:
    dataset = tiny_dataset()
    stored = store(tmp_path / "robust", ROBUST)
    assert stored.spec == OutputsSpec(views=2, seed=5, augment=SHIFT)
    raw = augment(dataset.train.images, dataset.train.ids, view=1, seed=5, config=SHIFT)
    with torch.no_grad():
        clean = net(0)(normalise(raw, dataset.preprocessing))
    torch.testing.assert_close(stored.logits(dataset.train.ids, 1), clean, atol=2e-3, rtol=2e-3)
    plain = store(tmp_path / "plain", SHIFT)
    assert torch.equal(stored.logits(dataset.train.ids, 0), plain.logits(dataset.train.ids, 0))


CONFIG = {"train": {"epochs": 2, "batch_size": 16}, "views": 2, "losses": [{"kind": "kd", "weight": 1.0}]}


class Seen(nn.Module):
    """Keeps what it was shown while it was trained."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.shown = net(1), []

    def forward(self, shown: Tensor) -> Tensor:
        if self.training:
            self.shown.append(shown.detach().clone())
        return self.inner(shown)


def test_a_student_sees_changed_views_and_stored_targets_serve_it(tmp_path) -> None:
    dataset, student = tiny_dataset(), Seen()
    distill(
        student,
        [store(tmp_path, SHIFT)],
        dataset,
        DistillConfig.model_validate(CONFIG),
        seed=0,
        augment=ROBUST,
        hardware=Hardware(accelerator="cpu"),
    )

    def views(config: Robust | ShiftFlip) -> set[bytes]:
        train = dataset.train
        raw = augment(train.images, train.ids, view=0, seed=5, config=config)
        return {each.numpy().tobytes() for each in normalise(raw, dataset.preprocessing)}

    first_epoch = {each.contiguous().numpy().tobytes() for batch in student.shown[:4] for each in batch}
    assert first_epoch == views(ROBUST)
    assert 0.3 < len(first_epoch & views(SHIFT)) / 64 < 0.7


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"online": {"kind": "mixup"}}, "online augmentation 'mixup'"),
        ({"teachers": {"kind": "partition"}}, "combination 'partition'"),
    ],
)
def test_teachers_that_would_see_changed_views_are_refused(tmp_path, changes: dict, named: str) -> None:
    config = DistillConfig.model_validate(CONFIG | changes)
    with pytest.raises(CompressionError, match=f"'robust' has {named} beside it"):
        distill(net(1), [store(tmp_path, SHIFT)], tiny_dataset(), config, seed=0, augment=ROBUST, teachers=[net(0)])


def test_a_teacher_may_have_an_augmentation_of_its_own() -> None:
    model = {"kind": "plain_cnn", "widths": [4], "depths": [1], "strides": [2], "stem_width": 4}

    def weights(own: dict | None, recipe: ShiftFlip | Robust) -> Tensor:
        source = {"kind": "train", "train": {"epochs": 1, "batch_size": 16}, "augment": own}
        teacher = Teacher.model_validate({"name": "t", "model": model, "source": source})
        trained, _, _ = obtain_teacher(teacher, tiny_dataset(), seed=0, augment=recipe)
        return torch.cat([each.flatten() for each in trained.parameters()])

    own = ROBUST.model_dump()
    assert torch.equal(weights(own, SHIFT), weights(None, ROBUST))
    assert torch.equal(weights(SHIFT.model_dump(), ROBUST), weights(None, SHIFT))
    assert not torch.equal(weights(own, SHIFT), weights(None, SHIFT))
