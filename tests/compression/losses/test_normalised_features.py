"""Normalised features: what scaling does, how unlike maps are brought together, running means, and training with it."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional as F

from compression.augment import ShiftFlip
from compression.distill import CrossEntropy, DistillationStep, DistillConfig, Progress, Shapes, Uniform, distill
from compression.distill.losses.normalised_features import NormalisedFeatures, StageDistances, matched
from compression.errors import CompressionError, ShapeError
from compression.teacher_outputs import OutputsSpec, StoredOutputs, write_teacher_outputs
from compression.train import Hardware, TrainConfig
from compression.train.step_checkpoint import load_state
from compression.types import Outputs, TeacherOutputs
from tests.compression.losses.short_training import Stop, assert_same, one_thread, stop_at
from tests.compression.tiny_data import CLASSES, tiny_dataset

BATCH = 3
LABELS = torch.tensor([0, 1, 2])
SHAPES = ((4, 6, 6), (5, 3, 3))
"""Two stages of images, with which most checks are made."""


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def maps(shapes=SHAPES, seed: int = 0) -> tuple[Tensor, ...]:
    return tuple(randn(BATCH, *shape, seed=seed + number) for number, shape in enumerate(shapes))


def prepared(student=SHAPES, teachers=(SHAPES,), **options) -> StageDistances:
    """The loss in float64, for a student and teachers with maps of these shapes."""
    loss = NormalisedFeatures(**options).build()
    assert isinstance(loss, StageDistances)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss.prepare(Shapes(num_classes=4, student_width=5, student_maps=student, teacher_maps=teachers))
    return loss.double()


def value(loss: StageDistances, student, *teachers, weights: Tensor | None = None) -> Tensor:
    count = len(teachers)
    shares = torch.full((count, BATCH), 1 / count, dtype=torch.float64) if weights is None else weights
    panel = TeacherOutputs(torch.zeros(count, BATCH, 4), shares, maps=teachers)
    return loss(Outputs(torch.zeros(BATCH, 4), maps=student), panel, LABELS)


# ---------------------------------------------------------------- the formula


def test_is_zero_at_equality_and_one_where_the_student_is_silent():
    teacher = maps()
    assert value(prepared(), teacher, teacher) == 0
    silent = tuple(torch.zeros_like(each) for each in teacher)
    assert float(value(prepared(), silent, teacher)) == pytest.approx(1.0, rel=1e-5)
    for stage in range(2):
        mixed = tuple(silent[n] if n == stage else teacher[n] for n in range(2))
        assert float(value(prepared(), mixed, teacher)) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("factor", [1e-1, 30.0, 1e3])
def test_scaling_one_stage_of_both_networks_changes_nothing(stage, factor):
    student, teacher = maps(seed=5), maps()

    def scaled(each):
        return tuple(part * factor if number == stage else part for number, part in enumerate(each))

    expected = value(prepared(), student, teacher)
    torch.testing.assert_close(value(prepared(), scaled(student), scaled(teacher)), expected, rtol=1e-3, atol=0)
    assert abs(float(value(prepared(), student, scaled(teacher)) - expected)) > 0.1


def test_is_the_mean_over_stages_of_relative_squared_errors():
    student, teacher = maps(seed=5), maps()
    terms = [
        F.mse_loss(ours, theirs) / (theirs.square().mean() + 1e-6)
        for ours, theirs in zip(student, teacher, strict=True)
    ]
    torch.testing.assert_close(value(prepared(), student, teacher), sum(terms) / 2)


def test_the_size_of_the_teacher_is_a_constant_to_the_gradient():
    student, teacher = maps(seed=5), maps()
    for each in (*student, *teacher):
        each.requires_grad_()
    value(prepared(), student, teacher).backward()
    for ours, theirs in zip(student, teacher, strict=True):
        expected = 2 * (ours - theirs) / (ours.numel() * (theirs.square().mean() + 1e-6)) / 2
        torch.testing.assert_close(ours.grad, expected.detach())
        assert theirs.grad is None


def test_teachers_count_with_their_weights_per_sample():
    """Samples are of unlike size here, so that the weights of one must not move the size of a teacher."""
    student, teachers = maps(seed=5), (maps(), maps(seed=9))
    weights = torch.tensor([[1.0, 0.25, 0.0], [0.0, 0.75, 1.0]], dtype=torch.float64)
    expected = 0.0
    for k in range(2):
        for stage in range(2):
            size = teachers[k][stage].square().mean() + 1e-6
            errors = (student[stage] - teachers[k][stage]).square().mean(dim=(1, 2, 3))
            expected += float((weights[k] * errors).mean() / size) / 2
    found = value(prepared(teachers=(SHAPES, SHAPES)), student, *teachers, weights=weights)
    assert float(found) == pytest.approx(expected, rel=1e-12)


def test_a_silent_stage_of_the_teacher_is_finite():
    teacher = tuple(torch.zeros_like(each) for each in maps())
    assert value(prepared(), teacher, teacher) == 0
    assert torch.isfinite(value(prepared(), maps(), teacher))


# ---------------------------------------------------------------- unlike maps


def test_stages_are_paired_from_the_last_one_backwards():
    three = ((3, 8, 8), *SHAPES)
    student, teacher = maps(seed=5), maps()
    extra = randn(BATCH, 3, 8, 8)
    alone = value(prepared(), student, teacher)
    assert value(prepared(teachers=(three,)), student, (extra, *teacher)) == alone
    assert value(prepared(student=three), (extra, *student), teacher) == alone


@pytest.mark.parametrize(
    ("student", "teacher", "positions"),
    [
        ((2, 6, 6), (3, 6, 6), 36),
        ((2, 8, 8), (3, 4, 4), 16),
        ((2, 4, 4), (3, 7, 7), 16),
        ((2, 8, 3), (3, 4, 6), 12),  # each side goes to its smaller one
        ((10, 2), (10, 3), 10),  # as many tokens, square or not
        ((16, 2), (9, 3), 9),
        ((16, 2), (3, 4, 4), 16),
        ((12, 2), (3, 3, 4), 12),  # an image of as many positions, read row by row
        ((3, 4, 4), (25, 2), 16),
        ((2, 8, 8), (16, 3), 16),
    ],
)
def test_maps_meet_at_the_smaller_of_both_sides(student, teacher, positions):
    ours, theirs = matched(randn(BATCH, *student), randn(BATCH, *teacher))
    widths = [shape[0] if len(shape) == 3 else shape[1] for shape in (student, teacher)]
    assert ours.shape == (BATCH, positions, widths[0])
    assert theirs.shape == (BATCH, positions, widths[1])


def test_the_larger_map_is_averaged_and_the_smaller_left_alone():
    large, small = randn(BATCH, 2, 4, 4), randn(BATCH, 2, 2, 2)
    pooled = F.avg_pool2d(large, 2)
    for ours, theirs in (matched(large, small), matched(small, large)[::-1]):
        torch.testing.assert_close(ours, pooled.flatten(2).transpose(1, 2))
        torch.testing.assert_close(theirs, small.flatten(2).transpose(1, 2))
    tokens = large.flatten(2).transpose(1, 2)
    torch.testing.assert_close(matched(tokens, small)[0], pooled.flatten(2).transpose(1, 2))


def test_an_image_and_its_own_tokens_are_equal():
    image = randn(BATCH, 4, 3, 5)
    tokens = image.flatten(2).transpose(1, 2)
    assert value(prepared(student=((15, 4),), teachers=(((4, 3, 5),),)), (tokens,), (image,)) == 0


def test_linear_layers_stand_only_where_widths_differ():
    loss = prepared(teachers=(SHAPES, ((4, 3, 3), (7, 3, 3)), ((9, 8),)))
    assert [[type(each) for each in of_teacher] for of_teacher in loss.projectors] == [
        [nn.Identity, nn.Identity],
        [nn.Identity, nn.Linear],
        [nn.Linear],
    ]
    assert not list(prepared().parameters())


def test_projected_maps_are_what_is_compared():
    wider = ((4, 6, 6), (7, 3, 3))
    loss, student, teacher = prepared(teachers=(wider,)), maps(seed=5), maps(wider)
    linear = loss.projectors[0][1]
    assert isinstance(linear, nn.Linear)
    projected = torch.einsum("bdhw,ed->behw", student[1], linear.weight) + linear.bias[:, None, None]
    expected = value(prepared(wider, (wider,)), (student[0], projected), teacher)
    torch.testing.assert_close(value(loss, student, teacher), expected)


def test_works_in_float32_on_half_maps_and_under_autocast():
    wider = ((3, 4, 4), (9, 8))
    loss, student, teacher = prepared(teachers=(wider,)).float(), maps(seed=5), maps(wider)
    halves = [tuple(each.bfloat16() for each in part) for part in (student, teacher)]
    weights = torch.ones(1, BATCH)
    expected = value(loss, *(tuple(each.float() for each in part) for part in halves), weights=weights)
    assert expected.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(value(loss, *halves, weights=weights), expected)


def test_refuses_networks_without_stages_and_tokens_that_make_no_square():
    with pytest.raises(ShapeError, match=r"0 maps of the student and \[2\] of its teachers"):
        prepared(student=())
    with pytest.raises(ShapeError, match=r"\[2, 0\] of its teachers"):
        prepared(teachers=(SHAPES, ()))
    with pytest.raises(ShapeError, match="2 maps of the student and .* of its teachers"):
        prepared(teachers=())
    with pytest.raises(ShapeError, match="17 tokens, expected a square number"):
        prepared(student=((17, 4),), teachers=(((4, 2, 2),),))


@pytest.mark.parametrize(
    ("student", "teachers"), [(((4, 6, 6), (5, 3, 2)), (SHAPES,)), (SHAPES, (SHAPES[:1],)), (SHAPES, (SHAPES, SHAPES))]
)
def test_refuses_other_maps_than_announced(student, teachers):
    with pytest.raises(ShapeError, match="Use the networks and the image size the loss was prepared for"):
        value(prepared(), maps(student), *(maps(each) for each in teachers))


# ---------------------------------------------------------------- running means


def test_running_means_are_those_of_the_first_epoch():
    loss, student = prepared(running=True), maps(seed=5)
    batches = [tuple(each * size for each in maps(seed=10 * size)) for size in (1, 2, 3)]
    seen = torch.stack([torch.stack([each.square().mean() for each in batch]) for batch in batches])
    for number, batch in enumerate(batches[:2]):
        found = value(loss, student, batch)
        so_far = seen[: number + 1].mean(0)
        torch.testing.assert_close(loss.mean_squares(0), so_far)
        errors = torch.stack([F.mse_loss(ours, theirs) for ours, theirs in zip(student, batch, strict=True)])
        torch.testing.assert_close(found, (errors / (so_far + 1e-6)).mean())
    loss.progress = Progress(epoch=1, epochs=2)
    found = value(loss, student, batches[2])
    torch.testing.assert_close(loss.mean_squares(0), seen[:2].mean(0))
    errors = torch.stack([F.mse_loss(ours, theirs) for ours, theirs in zip(student, batches[2], strict=True)])
    torch.testing.assert_close(found, (errors / (seen[:2].mean(0) + 1e-6)).mean())


def test_nothing_is_counted_outside_training_and_the_batch_measures_itself():
    loss, student, teacher = prepared(running=True).eval(), maps(seed=5), maps()
    before = {name: each.clone() for name, each in loss.state_dict().items()}
    assert value(loss, student, teacher) == value(prepared(), student, teacher)
    assert_same(loss.state_dict(), before)


def test_without_running_there_is_no_state():
    assert not prepared().state_dict()


# ---------------------------------------------------------------- training


SHIFT = ShiftFlip(pad=1, flip=False)


def staged(widths: tuple[int, ...], seed: int) -> nn.Module:
    """A network of stages of these widths, each of half the resolution, for images of 8 by 8."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        stages = [
            nn.Sequential(nn.Conv2d(before, after, 3, stride=2, padding=1), nn.ReLU())
            for before, after in zip((1, *widths[:-1]), widths, strict=True)
        ]
        side = 8 >> len(widths)
        return nn.Sequential(*stages, nn.Flatten(), nn.Linear(widths[-1] * side**2, len(CLASSES)))


WIDTHS = (4, 6)


@pytest.fixture(scope="module")
def panel(tmp_path_factory):
    """Two teachers and their stored outputs: one as wide as the student, and a wider one."""
    models = [staged(WIDTHS, seed=1), staged((5, 8), seed=2)]
    outputs = []
    for number, model in enumerate(models):
        folder = tmp_path_factory.mktemp("outputs") / str(number)
        write_teacher_outputs(model, tiny_dataset(validation=16), OutputsSpec(views=2, seed=0, augment=SHIFT), folder)
        outputs.append(StoredOutputs.open(folder))
    return models, outputs


def config(**options) -> DistillConfig:
    train = TrainConfig(epochs=3, batch_size=16, learning_rate=0.01, checkpoint_every_steps=2)
    return DistillConfig(train=train, losses=(CrossEntropy(), NormalisedFeatures(**options)), views=2)


def distilled(panel, folder, *, on_step=None, **options):
    """A student, the state of its helper, and the history of 12 steps in 3 epochs."""
    models, outputs = panel
    student = staged(WIDTHS, seed=3)
    with one_thread():
        history = distill(
            student,
            outputs,
            tiny_dataset(validation=16),
            config(**options),
            seed=0,
            augment=SHIFT,
            teachers=models,
            hardware=Hardware(accelerator="cpu"),
            checkpoint_dir=folder,
            on_step=on_step,
        )
    state = load_state(folder)
    assert state is not None
    return student, state["helpers"], history


def test_learns_resumes_and_stays_out_of_the_student(panel, tmp_path):
    models, _ = panel
    before = [{name: each.clone() for name, each in model.state_dict().items()} for model in models]
    student, parts, history = distilled(panel, tmp_path / "whole", running=True, weight=2.0)
    assert history.rows[-1]["normalised_features"] < 0.9 * history.rows[0]["normalised_features"]
    assert list(student.state_dict()) == list(staged(WIDTHS, seed=3).state_dict())
    for model, weights in zip(models, before, strict=True):
        assert_same(model.state_dict(), weights)

    step = DistillationStep(config(running=True).losses, Uniform(), (), models)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        step.prepare(staged(WIDTHS, seed=3), tiny_dataset(validation=16))
    start = step.helpers.state_dict()
    assert sorted(parts) == sorted(start)
    trained = {name for name, _ in step.helpers.named_parameters()}
    assert trained == {f"0.projectors.1.{stage}.{name}" for stage in (0, 1) for name in ("weight", "bias")}
    for name in trained:
        assert (parts[name] - start[name]).abs().max() > 1e-3, name
    assert parts["0.batches"] == 4
    assert (parts["0.mean_squares_0"] > 0).all()

    with pytest.raises(Stop):
        distilled(panel, tmp_path / "cut", running=True, weight=2.0, on_step=stop_at(3))
    again, parts_again, _ = distilled(panel, tmp_path / "cut", running=True, weight=2.0)
    assert_same(again.state_dict(), student.state_dict())
    assert_same(parts_again, parts)


def test_stored_outputs_alone_are_refused(panel):
    models, outputs = panel
    with pytest.raises(CompressionError, match="stored teachers, expected live ones alone"):
        DistillationStep(config().losses, Uniform(), outputs, models)
    with pytest.raises(CompressionError, match="'normalised_features' runs them"):
        distill(staged(WIDTHS, seed=3), outputs, tiny_dataset(validation=16), config(), seed=0, augment=SHIFT)


def test_is_refused_alone_since_nothing_would_train_the_classifier():
    with pytest.raises(ValidationError, match="'normalised_features' alone, expected another term beside it"):
        DistillConfig.model_validate({"train": {"epochs": 1}, "losses": (NormalisedFeatures(),)})


@pytest.mark.parametrize("wrong", [{"weight": -1}, {"running": "often"}, {"epsilon": 0.1}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ValidationError):
        NormalisedFeatures.model_validate(wrong)
