from itertools import pairwise

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from compression.augment import normalise
from compression.data.dataset import Split
from compression.errors import CompressionError, ShapeError
from compression.robustness.accuracy import (
    Answers,
    RobustnessConfig,
    chosen_images,
    conditions,
    corruption_accuracy,
    corruption_answers,
    gap_increase,
    paired_mean,
    robustness_of,
)
from compression.robustness.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    Corruption,
    corrupt,
    patch_size,
    shift_size,
    shifted,
)
from compression.types import Preprocessing

IDS = torch.arange(500, 516)
PREPROCESSING = Preprocessing(scale=255.0, mean=(0.4,), std=(0.3,))


def photos(count: int = 16, channels: int = 1, height: int = 28, width: int = 28, seed: int = 0) -> Tensor:
    """Bright discs of random place on a dark ground: smooth, as photographs are, unlike noise."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.rand(count, channels, 2, 1, 1, generator=generator) * 0.3 + 0.35
    y, x = torch.linspace(0, 1, height).view(-1, 1), torch.linspace(0, 1, width)
    distance = (y - place[:, :, 0]).square() + (x - place[:, :, 1]).square()
    return (20 + 200 * torch.sigmoid((0.08 - distance) * 60)).round().to(torch.uint8)


def distance(images: Tensor, corruption: Corruption, severity: int, scale: float = 255.0) -> float:
    changed = corrupt(images, IDS[: len(images)], corruption=corruption, severity=severity, seed=3, scale=scale)
    return float((changed.double() - images.double()).square().mean().sqrt())


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize("side", [8, 12, 28, 96])
def test_every_severity_is_further_from_the_clean_image_than_the_one_before(corruption: Corruption, side: int) -> None:
    images = photos(height=side, width=side)
    found = [distance(images, corruption, severity) for severity in (0, *SEVERITIES)]
    assert found[0] == 0
    assert all(less < more for less, more in pairwise(found)), found


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_severity_0_is_the_image_bit_for_bit_and_others_keep_type_shape_range_and_input(
    corruption: Corruption, dtype: torch.dtype
) -> None:
    images = photos(channels=3, height=20, width=12).to(dtype)
    before = images.clone()
    assert torch.equal(corrupt(images, IDS, corruption=corruption, severity=0, seed=0), before)
    changed = corrupt(images, IDS, corruption=corruption, severity=5, seed=0)
    assert torch.equal(images, before)
    assert (changed.shape, changed.dtype) == (images.shape, dtype)
    assert float(changed.min()) >= 0
    assert float(changed.max()) <= 255


@pytest.mark.parametrize("corruption", CORRUPTIONS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_an_image_is_corrupted_alike_in_every_batch_and_order(corruption: Corruption, dtype: torch.dtype) -> None:
    images = photos(channels=3, height=11, width=13).to(dtype)
    whole = corrupt(images, IDS, corruption=corruption, severity=3, seed=7)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(corrupt(images[order], IDS[order], corruption=corruption, severity=3, seed=7), whole[order])
    alone = [corrupt(images[i : i + 1], IDS[i : i + 1], corruption=corruption, severity=3, seed=7) for i in range(16)]
    assert torch.equal(torch.cat(alone), whole)


@pytest.mark.parametrize("corruption", ["noise", "occlusion", "shift"])
def test_seed_and_sample_decide_what_is_random(corruption: Corruption) -> None:
    images = photos()[:1].expand(16, 1, 28, 28)
    first = corrupt(images, IDS, corruption=corruption, severity=3, seed=0)
    assert not torch.equal(corrupt(images, IDS, corruption=corruption, severity=3, seed=1), first)
    assert len({each.numpy().tobytes() for each in first}) > 2


def test_shift_moves_by_the_stated_pixels_along_both_axes() -> None:
    point = torch.zeros(16, 1, 40, 40, dtype=torch.uint8)
    point[:, :, 20, 20] = 9
    ways: set[tuple[int, ...]] = set()
    for severity in SEVERITIES:
        far, near = shift_size(severity, 40, 40)
        assert far + near == max(severity, round(0.06 * severity * 40))
        moved = corrupt(point, IDS, corruption="shift", severity=severity, seed=0)
        places = moved.nonzero()[:, 2:] - 20
        assert len(places) == 16
        assert {tuple(sorted(place)) for place in places.abs().tolist()} == {(near, far)}
        ways |= {tuple(place) for place in places.sign().tolist()}
    assert {(-1, -1), (-1, 1), (1, -1), (1, 1)} <= ways


def test_shifted_is_a_copy_of_the_image_with_zeros_coming_in() -> None:
    images = photos(2, channels=2, height=9, width=10)
    moved = shifted(images, np.array([2, -3]), np.array([-1, 4]))
    assert torch.equal(moved[0, :, 2:, :-1], images[0, :, :-2, 1:])
    assert torch.equal(moved[1, :, :-3, 4:], images[1, :, 3:, :-4])
    assert int(moved[0, :, :2].sum()) == int(moved[0, :, :, -1].sum()) == int(moved[1, :, :, :4].sum()) == 0


@pytest.mark.parametrize(("height", "width"), [(8, 8), (28, 28), (16, 40)])
def test_occlusion_covers_the_stated_share_with_grey_and_grows_over_what_it_covered(height: int, width: int) -> None:
    images = torch.zeros(16, 3, height, width, dtype=torch.uint8)
    before = torch.zeros(16, height, width, dtype=torch.bool)
    for severity, share in zip(SEVERITIES, (1 / 64, 4 / 64, 9 / 64, 16 / 64, 25 / 64), strict=True):
        covered = corrupt(images, IDS, corruption="occlusion", severity=severity, seed=0)
        tall, wide = patch_size(severity, height, width)
        assert abs(tall * wide / (height * width) - share) < 0.5 * (height + width) / (height * width)
        assert set(covered.unique().tolist()) == {0, 128}
        assert (covered[:, 0] > 0).sum(dim=(1, 2)).tolist() == [tall * wide] * 16
        assert not bool((before & (covered[:, 0] == 0)).any())
        before = covered[:, 0] > 0


def test_noise_has_the_stated_spread_and_blur_keeps_the_mean_and_flat_images() -> None:
    flat = torch.full((4, 1, 64, 64), 0.5)
    noise = corrupt(flat, IDS[:4], corruption="noise", severity=2, seed=0, scale=1.0) - flat
    assert abs(float(noise.std()) - 0.1) < 0.003
    assert abs(float(noise.mean())) < 0.004
    for corruption in ("blur", "contrast"):
        changed = corrupt(flat, IDS[:4], corruption=corruption, severity=5, seed=0, scale=1.0)
        torch.testing.assert_close(changed, flat, rtol=0, atol=1e-6)
    image = photos(1, height=64, width=64).float()
    assert abs(float(corrupt(image, IDS[:1], corruption="blur", severity=4, seed=0).mean() - image.mean())) < 0.5


def test_contrast_scales_differences_to_the_mean() -> None:
    image = photos(3).float()
    mean = image.mean(dim=(1, 2, 3), keepdim=True)
    changed = corrupt(image, IDS[:3], corruption="contrast", severity=2, seed=0)
    torch.testing.assert_close(changed - mean, 0.5 * (image - mean), rtol=1e-4, atol=1e-3)


def test_values_beyond_the_scale_stay_what_they_are() -> None:
    images = torch.linspace(-3, 3, 100).view(1, 1, 10, 10)
    changed = corrupt(images, IDS[:1], corruption="noise", severity=5, seed=0, scale=1.0)
    assert float(changed.max()) == 3.0
    assert -3.0 <= float(changed.min()) < -2.9
    assert float(changed.std()) > 1.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corruption": "fog"}, "'fog' is unknown, expected one of noise"),
        ({"severity": 6}, "has severity 6, expected 0 to 5"),
        ({"images": torch.zeros(16, 1, 7, 9)}, "at least 8 x 8"),
        ({"ids": IDS[:3]}, "with 3 ids"),
    ],
)
def test_what_cannot_be_corrupted_is_refused(changes: dict, message: str) -> None:
    given = {"images": photos(), "ids": IDS, "corruption": "noise", "severity": 1} | changes
    with pytest.raises((CompressionError, ShapeError), match=message):
        corrupt(given["images"], given["ids"], corruption=given["corruption"], severity=given["severity"], seed=0)


@pytest.mark.parametrize(
    "fields",
    [{"severities": [0]}, {"severities": [1, 1]}, {"corruptions": []}, {"corruptions": ["fog"]}, {"images": 3}],
)
def test_a_config_that_says_nothing_is_refused(fields: dict) -> None:
    with pytest.raises(ValidationError):
        RobustnessConfig.model_validate(fields)


def pale_and_bright(count: int = 120) -> Split:
    """Class 1 is a bright image, class 0 a dark one."""
    labels = torch.arange(count) % 2
    images = photos(count) // 2 + 90 * labels.view(-1, 1, 1, 1).to(torch.uint8)
    return Split(images=images, labels=labels, ids=torch.arange(count))


def two_logits(signal: Tensor, of_split: Tensor) -> Tensor:
    """Class 1 where a signal [B] is above the middle of what it is on the clean images of both classes."""
    labels = pale_and_bright().labels
    middle = (of_split[labels == 0].mean() + of_split[labels == 1].mean()) / 2
    return torch.stack([torch.zeros_like(signal), signal - middle], dim=1)


CLEAN = normalise(pale_and_bright().images, PREPROCESSING)


def by_mean(images: Tensor) -> Tensor:
    """Looks at all pixels, so that noise and blur hardly harm it."""
    return two_logits(images.mean(dim=(1, 2, 3)), CLEAN.mean(dim=(1, 2, 3)))


def by_corner(images: Tensor) -> Tensor:
    """Looks at one pixel."""
    return two_logits(images[:, 0, 0, 0], CLEAN[:, 0, 0, 0])


CONFIG = RobustnessConfig(corruptions=("noise", "blur"), severities=(2, 5), images=None)


def test_accuracy_is_measured_per_corruption_and_the_gap_is_clean_minus_their_mean() -> None:
    split = pale_and_bright()
    found = corruption_accuracy(by_corner, split, PREPROCESSING, CONFIG, 0)
    rows = [(row.corruption, row.severity) for row in found.conditions]
    assert rows == conditions(CONFIG) == [("noise", 2), ("noise", 5), ("blur", 2), ("blur", 5)]
    assert found.clean_accuracy == 1.0
    assert found.corrupted_accuracy == pytest.approx(np.mean([row.accuracy for row in found.conditions]))
    assert found.robust_gap == pytest.approx(1.0 - found.corrupted_accuracy)
    assert found.conditions[1].accuracy < found.conditions[0].accuracy
    assert found.conditions[2].accuracy == 1.0  # a corner's neighbours are like it
    assert found.gap_increase is None
    by_hand = corrupt(split.images, split.ids, corruption="noise", severity=5, seed=0)
    right = by_corner(normalise(by_hand, PREPROCESSING)).argmax(dim=1) == split.labels
    assert found.conditions[1].accuracy == float(right.double().mean())


def test_all_models_see_the_same_images_and_the_fragile_one_has_the_wider_gap() -> None:
    split = pale_and_bright()
    answers = corruption_answers({"robust": by_mean, "fragile": by_corner}, split, PREPROCESSING, CONFIG, 0)
    for name, model in (("robust", by_mean), ("fragile", by_corner)):
        alone = corruption_answers({"x": model}, split, PREPROCESSING, CONFIG, 0)["x"]
        assert torch.equal(alone.corrupted, answers[name].corrupted)
    found = robustness_of(answers["fragile"], CONFIG, reference=answers["robust"])
    increase = found.gap_increase
    assert increase is not None
    assert increase.low > 0.02
    other_way = gap_increase(answers["fragile"], answers["robust"], seed=0)
    assert other_way.estimate == pytest.approx(-increase.estimate)


def test_the_gap_increase_is_the_corrupted_drop_minus_the_clean_drop() -> None:
    generator = torch.Generator().manual_seed(0)

    def model(clean: float, corrupted: float) -> Answers:
        return Answers(
            clean=torch.rand(2000, generator=generator) < clean,
            corrupted=torch.rand(4, 2000, generator=generator) < corrupted,
        )

    teacher, student = model(0.95, 0.85), model(0.93, 0.75)
    found = gap_increase(teacher, student, seed=0)
    drops = [
        (one.double().mean() - other.double().mean()).item()
        for one, other in ((teacher.corrupted, student.corrupted), (teacher.clean, student.clean))
    ]
    assert found.estimate == pytest.approx(drops[0] - drops[1])
    assert found.low < 0.08 < found.high
    same = gap_increase(teacher, teacher, seed=0)
    assert same.estimate == 0
    assert same.low < 0 < same.high  # equal on 2000 images is no proof of equality


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        sample = torch.from_numpy(rng.choice([-0.5, 0.0, 0.25, 1.0], size=150, p=[0.2, 0.5, 0.2, 0.1]))
        found = paired_mean(sample, seed=trial, resamples=400)
        hits += found.low <= 0.05 <= found.high
    assert 180 <= hits <= 198


def test_answers_about_other_images_are_not_compared() -> None:
    some = Answers(clean=torch.ones(3).bool(), corrupted=torch.ones(2, 3).bool())
    other = Answers(clean=torch.ones(4).bool(), corrupted=torch.ones(2, 4).bool())
    with pytest.raises(ShapeError, match="same images and corruptions"):
        gap_increase(some, other, seed=0)


def test_the_images_are_a_function_of_seed_and_ids_alone() -> None:
    split = pale_and_bright()
    some = chosen_images(split, 50, seed=1)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(2))
    shuffled = Split(images=split.images[order], labels=split.labels[order], ids=split.ids[order])
    assert len(some.ids) == 50
    assert set(chosen_images(shuffled, 50, seed=1).ids.tolist()) == set(some.ids.tolist())
    assert set(chosen_images(split, 50, seed=2).ids.tolist()) != set(some.ids.tolist())
    assert torch.equal(some.images, split.images[some.ids])
    assert chosen_images(split, None, seed=1) is split
