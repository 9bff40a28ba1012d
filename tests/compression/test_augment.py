import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compression.augment import NoAugment, ShiftFlip, augment, normalise
from compression.types import Preprocessing


def images(count: int = 12, channels: int = 1, side: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 255, (count, channels, side, side), generator=generator, dtype=torch.uint8)


CONFIG = ShiftFlip(pad=2, flip=True)


@given(seed=st.integers(0, 2**40), view=st.integers(0, 1000))
def test_a_view_is_a_function_of_seed_view_and_sample_alone(seed: int, view: int) -> None:
    raw, ids = images(), torch.arange(100, 112)
    whole = augment(raw, ids, view=view, seed=seed, config=CONFIG)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    shuffled = augment(raw[order], ids[order], view=view, seed=seed, config=CONFIG)
    assert torch.equal(shuffled, whole[order])
    alone = torch.cat([augment(raw[i : i + 1], ids[i : i + 1], view=view, seed=seed, config=CONFIG) for i in range(12)])
    assert torch.equal(alone, whole)


@pytest.mark.parametrize(("seed", "view"), [(1, 0), (0, 1)])
def test_another_seed_or_view_is_another_picture(seed: int, view: int) -> None:
    raw, ids = images(), torch.arange(12)
    first = augment(raw, ids, view=0, seed=0, config=CONFIG)
    assert not torch.equal(augment(raw, ids, view=view, seed=seed, config=CONFIG), first)


def test_the_input_is_not_changed_and_type_and_shape_stay() -> None:
    raw = images(channels=3)
    before = raw.clone()
    changed = augment(raw, torch.arange(12), view=3, seed=0, config=CONFIG)
    assert torch.equal(raw, before)
    assert (changed.shape, changed.dtype) == (raw.shape, raw.dtype)


def test_each_result_is_a_shift_and_maybe_a_mirror_of_its_image() -> None:
    raw = images(count=40, side=7)
    changed = augment(raw, torch.arange(40), view=0, seed=0, config=CONFIG)
    kinds = set()
    for before, after in zip(raw, changed, strict=True):
        found = []
        for mirrored in (False, True):
            padded = torch.nn.functional.pad(before.flip(-1) if mirrored else before, (2, 2, 2, 2))
            found += [
                (mirrored, dy, dx)
                for dy in range(5)
                for dx in range(5)
                if torch.equal(padded[:, dy : dy + 7, dx : dx + 7], after)
            ]
        assert found
        kinds.add(found[0])
    assert len({mirrored for mirrored, _, _ in kinds}) == 2
    assert len(kinds) > 10


def test_without_flip_nothing_is_mirrored_and_without_pad_nothing_moves() -> None:
    raw, ids = images(), torch.arange(12)
    assert torch.equal(augment(raw, ids, view=5, seed=0, config=ShiftFlip(pad=0, flip=False)), raw)
    assert torch.equal(augment(raw, ids, view=5, seed=0, config=NoAugment()), raw)


def test_shifts_are_spread_evenly() -> None:
    point = torch.zeros(5000, 1, 5, 5, dtype=torch.uint8)
    point[:, :, 2, 2] = 1
    moved = augment(point, torch.arange(5000), view=0, seed=0, config=ShiftFlip(pad=1, flip=False)).sum(0)[0]
    counts = moved[1:4, 1:4].float()
    assert moved.sum() == 5000
    assert (counts - 5000 / 9).abs().max() < 110  # about 4.7 standard deviations


def test_normalise_gives_the_textbook_formula() -> None:
    raw = images(channels=2)
    preprocessing = Preprocessing(scale=255.0, mean=(0.2, 0.4), std=(0.5, 0.1))
    wanted = (raw.double() / 255 - torch.tensor([0.2, 0.4]).view(1, 2, 1, 1)) / torch.tensor([0.5, 0.1]).view(
        1, 2, 1, 1
    )
    torch.testing.assert_close(normalise(raw, preprocessing).double(), wanted, atol=1e-5, rtol=1e-5)
