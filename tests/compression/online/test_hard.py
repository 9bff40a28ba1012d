"""Hard augmentations: the transform and its limits, whose turn it is, what a step changes, and training with it."""

import math

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from compression.distill import CrossEntropy, DistillConfig, Kd, distill
from compression.distill.online.hard import Hard, SpatialAugmentor, drawn, transformed
from compression.errors import CompressionError
from compression.train import Hardware, TrainConfig
from compression.train.step_checkpoint import load_state
from compression.types import Batch
from tests.compression.losses.short_training import SHIFT, Stop, assert_same, net, stop_at, stored
from tests.compression.tiny_data import tiny_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

LIMITS = {"rotation_degrees": 30.0, "shift": 0.2, "scale": 0.2}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def batch_of(size: int = 8) -> Batch:
    images = randn(size, 1, 8, 8).contiguous(memory_format=torch.channels_last)
    return Batch(images=images, labels=torch.arange(size) % 4, ids=torch.arange(size), view=0, epoch=0, step=0)


def augmentor(**options) -> SpatialAugmentor:
    built = Hard(**options).build()
    assert isinstance(built, SpatialAugmentor)
    return built


def learning(**options) -> SpatialAugmentor:
    """An augmentor whose turn it is, for good."""
    built = augmentor(**({"lower": 1e3, "upper": 1e4} | options))
    built.learning.fill_(True)
    return built


def pixel(row: int, column: int, size: int = 21) -> Tensor:
    image = torch.zeros(1, 1, size, size)
    image[..., row, column] = 1.0
    return image


def brightest(image: Tensor) -> tuple[int, int]:
    row, column = divmod(int(image.argmax()), image.shape[-1])
    return row, column


# ---------------------------------------------------------------- the transform


@pytest.mark.parametrize("shape", [(3, 1, 8, 8), (2, 3, 5, 7)])
def test_identity_returns_the_images_exactly(shape):
    images = randn(*shape) * 37
    assert torch.equal(transformed(images, torch.zeros(shape[0], 4), **LIMITS), images)


def test_each_number_does_what_it_says():
    """At 1: a fifth of 20 pixels to the side or down, 30 degrees about the centre, a fifth larger."""
    centre, limits = 10, {"rotation_degrees": 30.0, "shift": 4 / 21, "scale": 0.2}

    def moved(row: int, column: int, *numbers: float) -> tuple[int, int]:
        return brightest(transformed(pixel(row, column), torch.tensor([numbers]), **limits))

    assert moved(centre, centre, 0, 1, 0, 0) == (centre, centre + 4)
    assert moved(centre, centre, 0, 0, 1, 0) == (centre + 4, centre)
    assert moved(centre, centre, 0, -0.5, 0, 0) == (centre, centre - 2)
    assert moved(centre, centre + 5, 0, 0, 0, 1) == (centre, centre + 6)
    assert moved(centre, centre + 5, 0, 0, 0, -1) == (centre, centre + 4)
    row, column = moved(centre, centre + 8, 1, 0, 0, 0)
    assert math.hypot(row - centre, column - centre) == pytest.approx(8, abs=0.8)
    assert abs(math.degrees(math.atan2(row - centre, column - centre))) == pytest.approx(30, abs=5)


def test_a_turn_keeps_lengths_in_images_that_are_not_square():
    image = torch.zeros(1, 1, 15, 31)
    image[..., 7, 15 + 6] = 1.0
    row, column = brightest(transformed(image, torch.tensor([[1.0, 0, 0, 0]]), **(LIMITS | {"rotation_degrees": 90.0})))
    assert (abs(row - 7), column) == (6, 15)


def test_numbers_stay_within_their_limits_whatever_was_learnt():
    for scale in (1.0, 100.0):
        found = drawn(randn(2, 4) * scale, randn(50, 4, seed=1))
        assert found.abs().max() <= 1
    assert drawn(torch.zeros(2, 4), torch.zeros(3, 4)).abs().max() == 0


def test_gradient_of_the_transform_is_its_finite_difference():
    x = torch.linspace(0, 3, 9, dtype=torch.float64)
    images = (torch.sin(x).unsqueeze(1) + torch.cos(x)).view(1, 1, 9, 9)
    numbers = torch.tensor([[0.31, 0.13, -0.22, 0.4]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda n: transformed(images, n, **LIMITS), numbers)


# ---------------------------------------------------------------- one step


def test_a_step_of_the_distribution_increases_what_it_ascends():
    images, noise = batch_of(16).images, randn(16, 4, seed=2)
    student, teacher = net(6, seed=3).eval(), net(8, seed=1).eval()
    augment = learning(learning_rate=0.003)
    before, disagreement = augment.objective(images, noise, student, [teacher])
    for _ in range(20):
        augment._learnt(images, noise, student, [teacher])
    after, later = augment.objective(images, noise, student, [teacher])
    assert after > before + 1e-3
    assert later > disagreement


def test_a_step_of_the_student_decreases_the_disagreement():
    images, noise = batch_of(16).images, randn(16, 4, seed=2)
    student, teacher = net(6, seed=3).eval(), net(8, seed=1).eval()
    augment = augmentor()
    before, _ = augment.disagreement(images, noise, student, [teacher])
    gradients = torch.autograd.grad(before, list(student.parameters()))
    with torch.no_grad():
        for parameter, gradient in zip(student.parameters(), gradients, strict=True):
            parameter -= 0.05 * gradient
    after, _ = augment.disagreement(images, noise, student, [teacher])
    assert after < before - 1e-3


def test_the_disagreement_is_that_of_the_mean_of_the_teachers():
    images, noise = batch_of().images, torch.zeros(8, 4)
    student, teachers = net(6, seed=3).eval(), [net(8, seed=1).eval(), net(7, seed=2).eval()]
    found, _ = augmentor().disagreement(images, noise, student, teachers)
    target = torch.stack([teacher(images).softmax(-1) for teacher in teachers]).mean(0)
    torch.testing.assert_close(found, F.kl_div(student(images).log_softmax(-1), target, reduction="batchmean"))


def test_teachers_that_no_longer_know_the_image_hold_the_distribution_back():
    images, noise = batch_of().images, randn(8, 4)
    student, teacher = net(6, seed=3).eval(), net(8, seed=1).eval()
    free, found = learning(keep_label=0.0).objective(images, noise, student, [teacher])
    assert free == found
    shown = augmentor().changed(images, noise)
    clean, changed = teacher(images).log_softmax(-1), teacher(shown).log_softmax(-1)
    lost = F.kl_div(changed, clean, reduction="batchmean", log_target=True)
    held, _ = learning(keep_label=3.0).objective(images, noise, student, [teacher])
    torch.testing.assert_close(free - held, 3 * lost)
    assert lost > 0


def test_adam_takes_the_steps_of_the_reference():
    augment, reference = augmentor(learning_rate=0.02), nn.Parameter(augmentor().distribution.detach().clone())
    optimizer = torch.optim.Adam([reference], lr=0.02, maximize=True)
    for seed in range(5):
        gradient = randn(2, 4, seed=seed)
        augment._ascend(gradient)
        reference.grad = gradient
        optimizer.step()
    torch.testing.assert_close(augment.distribution, reference)


def test_the_distribution_becomes_neither_a_point_nor_endless():
    augment = augmentor(learning_rate=1.0)
    for sign in (-1.0, 1.0):
        for _ in range(20):
            augment._ascend(torch.full((2, 4), sign))
        assert augment.distribution[0].abs().max() <= 3
        assert -4 <= augment.distribution[1].min() <= augment.distribution[1].max() <= 1


def test_student_and_teachers_are_left_as_they_were():
    batch, augment = batch_of(), learning()
    student, teacher = net(6, seed=3).train(), net(8, seed=1).train()
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in (student, teacher)]
    start = augment.distribution.detach().clone()
    augment(batch, student, [teacher])
    assert (augment.distribution - start).abs().max() > 1e-3
    for model, state in zip((student, teacher), before, strict=True):
        assert_same(model.state_dict(), state)
        assert all(module.training for module in model.modules())
        assert all(each.requires_grad and each.grad is None for each in model.parameters())
    assert augment.distribution.grad is None


def test_a_share_of_the_rows_is_changed_and_labels_stay():
    batch, seen = batch_of(9), []
    student = net(6, seed=3)
    for seed in range(12):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            found = augmentor(share=0.5)(batch, student, [net(8, seed=1)])
        rows = (found.images != batch.images).flatten(1).any(dim=1)
        assert int(rows.sum()) == 4
        seen.append(rows)
        assert torch.equal(found.labels, batch.labels)
        assert found.soft_labels is None
        assert not found.images.requires_grad
        assert found.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.stack(seen).any(dim=0).all()
    assert torch.equal(batch.images, batch_of(9).images)


def test_the_distribution_learns_under_the_lower_bound_until_it_is_over_the_upper(monkeypatch):
    augment, batch, values = augmentor(lower=0.1, upper=0.5), batch_of(), iter([0.3, 0.05, 0.3, 0.5, 0.6, 0.3, 0.05])
    monkeypatch.setattr(augment, "_learnt", lambda *args: torch.tensor(next(values)))
    turns = []
    for _ in range(7):
        augment(batch, net(6, seed=3), [net(8, seed=1)])
        turns.append(bool(augment.learning))
    assert turns == [False, True, True, True, False, False, True]


def test_nothing_is_learnt_while_it_rests():
    augment = augmentor(lower=0.0)
    start = augment.distribution.detach().clone()
    for _ in range(3):
        augment(batch_of(), net(6, seed=3), [net(8, seed=1)])
    assert torch.equal(augment.distribution, start)
    assert augment.steps == 0


def test_refuses_to_work_without_teachers():
    with pytest.raises(CompressionError, match="'hard' has 0 teachers, expected at least 1"):
        augmentor()(batch_of(), net(6, seed=3), [])


# ---------------------------------------------------------------- training


def test_a_training_learns_transforms_resumes_bit_for_bit_and_leaves_nothing_in_the_student(tmp_path):
    data, teacher = tiny_dataset(validation=16), net(8, seed=1)
    panel = [stored(data, tmp_path / "outputs", width=8, seed=1)]
    train = TrainConfig(epochs=2, batch_size=16, learning_rate=0.01, checkpoint_every_steps=2)
    config = DistillConfig(train=train, losses=(CrossEntropy(), Kd()), views=2)
    config = config.model_copy(update={"online": Hard(lower=1e3, upper=1e4)})
    weights = {name: value.clone() for name, value in teacher.state_dict().items()}

    def trained(folder: str, **options) -> tuple[nn.Module, dict[str, Tensor]]:
        student, cpu = net(6, seed=3), Hardware(accelerator="cpu")
        more = {
            "seed": 0,
            "augment": SHIFT,
            "hardware": cpu,
            "checkpoint_dir": tmp_path / folder,
            "teachers": [teacher],
        }
        distill(student, panel, data, config, **more, **options)
        state = load_state(tmp_path / folder)
        assert state is not None
        return student, state["helpers"]

    student, parts = trained("whole")
    assert sorted(parts) == [f"0.{name}" for name in ("distribution", "first", "learning", "second", "steps")]
    assert (parts["0.steps"], parts["0.learning"]) == (7, True)
    assert (parts["0.distribution"] - augmentor().distribution).abs().max() > 0.01
    assert list(student.state_dict()) == list(net(6, seed=3).state_dict())
    assert_same(teacher.state_dict(), weights)
    with pytest.raises(Stop):
        trained("cut", on_step=stop_at(5))
    again, parts_again = trained("cut")
    assert_same(again.state_dict(), student.state_dict())
    assert_same(parts_again, parts)


@pytest.mark.parametrize(
    "wrong", [{"lower": 0.5, "upper": 0.5}, {"share": 0}, {"scale": 1.0}, {"rotation_degrees": 181}, {"angle": 3}]
)
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        Hard.model_validate(wrong)
